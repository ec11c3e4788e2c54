"""What the variables of torchrun, or of the user, say of this process among the ranks."""

from __future__ import annotations

import os

from common.errors import UsageError


def ranks() -> tuple[int, int, int, int]:
    """(rank, ranks, local rank, local ranks); 0, 1, 0, 1 where nobody started several."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "RANK" not in os.environ:
        if os.environ.get("RANK_SIZE", "1") != "1" and "RANK_ID" in os.environ:
            # else each rank would train a copy of its own, and overwrite the others' files
            raise UsageError(
                f"RANK_ID={os.environ['RANK_ID']} RANK_SIZE={os.environ['RANK_SIZE']} are set but torch's RANK is not: "
                "start through bash test/*.sh, which translates them, or with torchrun"
            )
        return 0, 1, int(os.environ.get("LOCAL_RANK", 0)), 1
    missing = [name for name in (*names[:3], "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UsageError(f"RANK is set but {', '.join(missing)} is not: start with torchrun, or unset RANK")
    try:
        rank, size, local_rank, local_size = (int(os.environ.get(name, 1)) for name in names)
    except ValueError as error:
        raise UsageError(f"{', '.join(names)} must be integers: {error}") from None
    if not 0 <= rank < size:
        raise UsageError(f"RANK={rank} is not below WORLD_SIZE={size}: start with torchrun")
    return rank, size, local_rank, local_size


def timeout_of_user() -> int | None:
    """Seconds that a collective may take, of COLLECTIVE_TIMEOUT_S."""
    text = os.environ.get("COLLECTIVE_TIMEOUT_S") or None
    if text is not None and not (text.isdecimal() and int(text) > 0):
        raise UsageError(f"COLLECTIVE_TIMEOUT_S={text}: must be a whole number of seconds above 0")
    return text and int(text)
