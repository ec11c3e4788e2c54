"""A forgotten `pip install` as one line instead of a traceback: every entry script imports this before anything else.

Nothing is looked for in a run that works. Where an import fails, all that requirements.txt names is. `--help | head`
ends as with any other program, without a traceback of the pipe that was closed. transformers keeps its reports to
itself (what does not fit is an error of ours, in a line), and in a log file its progress bars. A line is written when
it is said, in a pipe or log file too: a run that hangs or is killed has left its last words.
"""

from __future__ import annotations

import importlib.util
import io
import os
import re
import signal
import sys
import warnings
from pathlib import Path
from types import TracebackType

IMPORTED_AS = {"pillow": "PIL", "scikit-learn": "sklearn", "pyyaml": "yaml"}


def required(file: Path) -> dict[str, str]:
    """{name to import: name to install} of the lines of a requirements.txt."""
    lines = (line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    names = [re.split(r"[^\w.-]", line)[0] for line in lines if line and not line.startswith("-")]
    return {IMPORTED_AS.get(name.lower(), name): name for name in names}


def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """`sys.excepthook`: the sentence and exit code 2 where a required package is not installed, else the traceback."""
    file = _requirements()
    packages = required(file) if file is not None else {}
    absent = error.name.partition(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else None
    if absent not in packages:
        sys.__excepthook__(kind, error, trace)
        return
    missing = [
        name for module, name in packages.items() if module == absent or importlib.util.find_spec(module) is None
    ]
    print(
        f"error: {sys.executable} has no {', '.join(missing)}: activate the environment with the requirements, or "
        f"pip install -r {file}",
        file=sys.stderr,
    )
    sys.exit(2)


def _requirements() -> Path | None:
    """requirements.txt beside the script that was started; None for any other program."""
    started = getattr(sys.modules["__main__"], "__file__", None)
    file = Path(started).resolve().with_name("requirements.txt") if started else None
    return file if file is not None and file.is_file() else None


# how many workers is the user's choice; what the run waits for them is in every line, as data_ms
warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(line_buffering=True)
if _requirements() is not None:
    sys.excepthook = explain
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty() and os.environ.get("PROGRESS_BAR") != "1":
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
if not {"-h", "--help", "--help_all"}.isdisjoint(sys.orig_argv):  # of no training: its sockets break with an error
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
