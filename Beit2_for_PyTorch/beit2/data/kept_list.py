"""A listing kept in a file beside the data, or where that is read-only among the user's caches."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def places(root: Path, name: str) -> tuple[Path, Path]:
    """Where a folder's listing may lie."""
    digest = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "beit2")
    return root / name, cache / f"{digest}{Path(name).suffix}"


def keep(files: Sequence[Path], header: dict[str, Any], payload: bytes) -> None:
    """Writes it to the first place that takes it; nowhere, if all are read-only or full."""
    for file in files:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps(header | {"crc": zlib.crc32(payload)}).encode()
            file.write_bytes(line + b"\n" + payload)
            return
        except OSError:
            continue


def read(file: Path) -> tuple[dict[str, Any], bytes] | None:
    """Header and payload; None where there is none, or a damaged one."""
    try:
        first, _, payload = file.read_bytes().partition(b"\n")
        header = json.loads(first)
        return (header, payload) if header["crc"] == zlib.crc32(payload) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
