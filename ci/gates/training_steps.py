"""Watches a project's own training from outside, step by step: the entry script's `main`, whole and unchanged.

Every entry script calls `RunLog.step` once at the end of an optimizer step and fetches its batches inside
`RunLog.data_wait`. Hooking those two gives the boundaries of a step of the real code, whatever it looks like inside.
This module imports nothing of the repo, so that the process that times another revision can use it, too.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path


class TrainingStopped(BaseException):
    """Raised by an observer to end a run; no `except Exception` of the training holds it up."""


class Observer:
    """What happens at the boundaries of a step. The default does nothing."""

    def step_ended(self, step: int, samples: int) -> None:
        """After `RunLog.step` of the step with this number, counted from 1, and this many samples over all ranks."""

    def data_begins(self) -> None:
        """The run asks for its next batch."""

    def data_ends(self) -> None:
        """The batch is there."""


def use_tree(tree: Path, project: str) -> None:
    """Puts a checkout's root and one of its project folders first on the import path."""
    sys.path[:0] = [str(tree / project), str(tree)]


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Hooks `RunLog` of the tree on the import path for the time of the block."""
    run_log = importlib.import_module("common.run_log").RunLog
    step, data_wait = run_log.step, run_log.data_wait

    @functools.wraps(step)
    def observed_step(self, number, samples, *args, **kwargs):
        step(self, number, samples, *args, **kwargs)
        observer.step_ended(number, samples)

    @contextlib.contextmanager
    def observed_data_wait(self):
        observer.data_begins()
        try:
            with data_wait(self):
                yield
        finally:
            observer.data_ends()

    run_log.step, run_log.data_wait = observed_step, observed_data_wait
    try:
        yield
    finally:
        run_log.step, run_log.data_wait = step, data_wait


def train(entry: str, arguments: list[str], observer: Observer) -> bool:
    """Runs `main(arguments)` of an entry script, e.g. "run_vit"; returns whether the observer ended it early."""
    with observed(observer):
        try:
            importlib.import_module(entry).main(arguments)
        except TrainingStopped:
            return True
    return False
