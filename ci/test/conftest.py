"""What several tests of this folder prepare once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ci.training_cases import CASES, COUNTED


@pytest.fixture(scope="session")
def small_case(tmp_path_factory) -> Callable[[str], Path]:
    """The folder with what the small training case of a project reads."""
    made: dict[str, Path] = {}

    def folder_of(project: str) -> Path:
        if project not in made:
            made[project] = tmp_path_factory.mktemp(project)
            CASES[project].prepare(made[project], COUNTED)
        return made[project]

    return folder_of
