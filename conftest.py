"""Fixtures and import paths that the tests of every project share."""

import gzip
import json
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
PROJECTS = ("ViT_for_PyTorch", "Beit2_for_PyTorch", "CLIP_for_PyTorch", "Data2vec_for_PyTorch")
for folder in (ROOT, *(ROOT / project for project in PROJECTS)):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def pytest_collectstart(collector: pytest.Collector) -> None:
    if isinstance(collector, pytest.Module):
        scripts_of_project(collector.path)


def pytest_runtest_setup(item: pytest.Item) -> None:
    scripts_of_project(item.path)


def scripts_of_project(test: Path) -> None:
    """Two projects may have a script of one name: `import extract_features` means that of the test's own project."""
    project = next((ROOT / name for name in PROJECTS if ROOT / name in test.parents), None)
    if project is None:
        return
    sys.path.remove(str(project))
    sys.path.insert(0, str(project))
    for script in project.glob("*.py"):
        known = sys.modules.get(script.stem)
        if known is not None and Path(known.__file__ or "").parent != project:
            del sys.modules[script.stem]


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """Folder with the small real data sets of ci/sample_data/README.md; built on the first run (needs network).

    The build holds a file lock, so several pytest processes may ask for it at once.
    """
    from ci.sample_data.build import DEFAULT_OUTPUT, build

    return build(DEFAULT_OUTPUT)


@pytest.fixture
def check_profile() -> Callable[[Path, str, str], str]:
    """Function (folder of a run with --profile, steps as in "10 to 12", an operator of every step) -> its summary."""

    def check(output: Path, steps: str, operator: str) -> str:
        first, last = map(int, steps.split(" to "))
        text = (output / "profile" / "summary.txt").read_text()
        assert f", steps {steps} of this run, rank 0 of 1, " in text and len(text.splitlines()) < 60
        for line in ("time a step", "wait for data", "peak memory", "host syncs", "operators by host time"):
            assert f"\n{line}" in text
        with gzip.open(output / "profile" / "trace.json.gz") as file:
            events = [event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "cpu_op"]
        calls = events.count(operator)
        assert calls and calls % (last - first + 1) == 0, "of whole steps"
        return text

    return check


_AT_START = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}


@pytest.fixture(autouse=True)
def own_signals():
    """A run preempted inside this process ignores signals on its way out; the processes of later tests would, too."""
    _restore_signals()
    yield
    _restore_signals()


def _restore_signals() -> None:
    if threading.current_thread() is threading.main_thread():
        for number, handler in _AT_START.items():
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)
