"""Many ranks of an entry script for the price of one start: imports once, then forks a process for each rank.

    echo '[[8, ["--device", "cpu", ...]], [2, [...]]]' | python -m ci.gates.forked_ranks run_vit.py vit.engine

For tests on CPUs: importing torch, timm or transformers takes seconds, which torchrun's ranks each pay again. A run is
a number of ranks, their arguments and, if need be, an object of environment variables; runs follow one another. The
ranks meet over gloo as under torchrun and call the script's `main`. The output of rank 0 and of the first failing rank
goes to stdout; the exit code is the latter's.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(script: Path, preload: Sequence[str], *runs: tuple, **environment: str) -> subprocess.CompletedProcess:
    """Runs `script` as described above in a process of its own; `preload` are modules that the script imports late."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [sys.executable, "-m", "ci.gates.forked_ranks", str(script), *preload],
        cwd=ROOT,
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
        input=json.dumps(runs),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def load_script(path: Path) -> Callable[[list[str]], object]:
    """The `main` of an entry script, whose folder and the repo's root become importable."""
    for folder in (path.parent, path.parent.parent):
        sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module.main


def run_ranks(
    size: int, main: Callable[[list[str]], object], arguments: list[str], environment: dict[str, str] | None = None
) -> int:
    """Runs `main(arguments)` on `size` forked ranks; returns the exit code of the first that failed, or 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sys.stdout.flush()
    logs = [tempfile.TemporaryFile() for _ in range(size)]
    rank_of = {}
    for rank, log in enumerate(logs):
        pid = os.fork()
        if pid == 0:
            os.environ.update(environment or {})
            _be_rank(rank, size, port, log.fileno(), main, arguments)
        rank_of[pid] = rank
    codes: dict[int, int] = {}
    while rank_of:
        pid, status = os.wait()
        codes[rank_of.pop(pid)] = os.waitstatus_to_exitcode(status)
        for other in rank_of if status else ():  # they may wait for it for ever
            os.kill(other, signal.SIGKILL)
    failed = next((rank for rank, code in codes.items() if code), None)
    for rank, log in enumerate(logs):
        if rank in (0, failed):
            log.seek(0)
            sys.stdout.write(log.read().decode(errors="replace"))
    return 0 if failed is None else abs(codes[failed])


def _be_rank(
    rank: int, size: int, port: int, log: int, main: Callable[[list[str]], object], arguments: list[str]
) -> None:
    """Never returns: the forked process ends here."""
    os.dup2(log, 1)
    os.dup2(log, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    code = 0
    try:
        main(arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(arguments: list[str]) -> int:
    script, *preload = arguments
    main_of_script = load_script(Path(script).resolve())
    for name in preload:
        importlib.import_module(name)
    codes = (run_ranks(size, main_of_script, *rest) for size, *rest in json.load(sys.stdin))
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
