"""Which of a project's device patches apply: all but those that an environment variable names."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from common.errors import UsageError


def chosen(patches: Mapping[str, Callable], variable: str) -> dict[str, Callable]:
    """The patches that `variable`=NAME,NAME does not name: the switch to find out whether one is to blame.

    Raises:
        UsageError: a name that is none of the project's patches.
    """
    off = {name for name in os.environ.get(variable, "").split(",") if name}
    if unknown := sorted(off - set(patches)):
        raise UsageError(f"{variable}={','.join(unknown)}: choose from this project's patches, {', '.join(patches)}")
    return {name: patch for name, patch in patches.items() if name not in off}
