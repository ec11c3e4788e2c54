"""The launcher owns its processes: whatever ends it, no rank, no temporary file and no RUNNING is left."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from common.errors import PREEMPTED
from common.run import folder_lock, result_file

PROGRAM = """
import os, signal, sys, tempfile, time
rank = int(os.environ.get("RANK", "0"))
print("ARGS", sys.argv[1:], flush=True)
words = [word for word in sys.argv[1:] if word.startswith("--do=")]
def do(what):
    return f"--do={what}" in words
tempfile.mkdtemp(prefix="pymp-")
if do("deaf"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
asked = False
def ask(*_):
    global asked
    asked = True
if do("save"):
    signal.signal(signal.SIGUSR1, ask)
if do("causes"):
    # rank 1 fails first and is the last to end: what is registered runs after the traceback is printed
    if rank:
        import atexit
        atexit.register(time.sleep, 600)
        atexit.register(lambda: open("failed1", "w").close())
        raise ValueError("rank 1 has no data")
    while not os.path.exists("failed1"):
        time.sleep(0.05)
    raise RuntimeError("Connection closed by peer [127.0.0.1]:2345")
if do("usage"):
    print("error: the sentence for the user", file=sys.stderr)
    sys.exit(2)
if do("fail once") and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
    if not rank:
        open("began0", "w").close()
    while not os.path.exists("began0"):  # else torchrun might end rank 0 before it has said a word
        time.sleep(0.05)
    sys.exit(9 * rank)
if do("wait"):
    open(f"started{rank}", "w").close()
    while not asked:
        time.sleep(0.05)
    if do("hang"):
        time.sleep(600)
    time.sleep(2 * rank)  # a rank that writes its part of a checkpoint for longer
    open(f"saved{rank}", "w").close()
    sys.exit(75)
"""


@pytest.fixture
def run(project, tmp_path):
    """The trial project with our program; a started launcher is ended with the test."""
    (project / "run.py").write_text(PROGRAM)
    (tmp_path / "scratch").mkdir()
    started = []

    def start(*words: str, flags: tuple[str, ...] = (), before: tuple[str, ...] = (), **streams) -> subprocess.Popen:
        command = [*before, "bash", "test/trial.sh", "--data_path=.", "--device=cpu", "--nproc=2", *flags, "--"]
        clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "ASCEND_DEVICE_ID", "RANK_ID")}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**clean, "PATH": path, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "scratch")}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **streams}
        command += [f"--do={word}" for word in words] + [f"--mark={tmp_path}"]
        started.append(subprocess.Popen(command, cwd=project, env=environment, **streams))
        return started[-1]

    yield start
    for process in [*started, *left_of(tmp_path)]:
        process.kill()


def left_of(mark: Path) -> list[psutil.Process]:
    """Living processes of the run that `mark` names on their command line."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if f"--mark={mark}" in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def wait_for_start(project: Path, process: subprocess.Popen, ranks: int = 2) -> None:
    deadline = time.monotonic() + 300
    while not all((project / f"started{rank}").exists() for rank in range(ranks)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def result(project: Path, ranks: int = 2) -> dict[str, str]:
    path = project / "test" / "output" / "0" / f"Trial_bs4_{ranks}p_acc.log"
    return result_file.read(path) if path.exists() else {}


def logs(project: Path) -> str:
    return "".join(path.read_text() for path in (project / "test" / "output" / "0").glob("*.log"))


@pytest.mark.parametrize("what", ["HUP", "USR1", "TERM", "INT", "KILL", "KILL torchrun"])
def test_nothing_is_left_however_the_run_ends(project, run, tmp_path, what):
    deaf = ["deaf"] if what in ("TERM", "KILL torchrun") else []  # to SIGTERM, which costs a test five seconds
    process = run("wait", *deaf, before=("env", "--default-signal=HUP,INT"))  # pytest itself may be under nohup
    wait_for_start(project, process)
    number = getattr(signal, f"SIG{what.split()[0]}")
    torchrun = psutil.Process(process.pid).children()[0]
    begin = time.monotonic()
    (torchrun if "torchrun" in what else process).send_signal(number)
    while left_of(tmp_path):
        assert time.monotonic() - begin < 60  # 10 s, on a machine with nothing else to do
        time.sleep(0.05)
    _, errors = process.communicate()
    expected = {"KILL": -9, "KILL torchrun": 137}.get(what, 128 + number)
    assert process.returncode == expected, errors
    assert "Traceback" not in errors
    while what == "KILL" and (any((tmp_path / "scratch").iterdir()) or "Error" not in result(project)):
        assert time.monotonic() - begin < 120  # the guard does it, a moment later
        time.sleep(0.05)
    assert list((tmp_path / "scratch").iterdir()) == []
    assert result(project)["Status"] == "FAILED"


def test_a_preempted_run_ends_when_all_ranks_have_saved_and_goes_on_when_started_again(project, run, tmp_path):
    script = project / "test" / "trial.sh"
    script.write_text(script.read_text().replace("require data_path", "on_restart=(--resume auto)"))
    process = run("wait", "save", flags=("--max_restarts=3",))
    wait_for_start(project, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == PREEMPTED, errors
    assert "SIGTERM: the ranks end their step and write a checkpoint" in errors
    assert (project / "saved0").exists() and (project / "saved1").exists()  # none was ended for the other's sake
    assert result(project)["Status"] == "PREEMPTED" and "--resume" not in logs(project).split("ARGS", 1)[1]
    assert list((tmp_path / "scratch").iterdir()) == [] and not left_of(tmp_path)
    process = run()
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "'--resume', 'auto']" in output


def test_the_second_signal_ends_at_once(project, run, tmp_path):
    process = run("wait", "save", "hang")
    wait_for_start(project, process)
    process.send_signal(signal.SIGINT)
    assert "Ctrl-C again ends them at once" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and not left_of(tmp_path), errors


def test_a_restart_after_a_failure_gets_what_makes_it_go_on(project, run):
    script = project / "test" / "trial.sh"
    script.write_text(script.read_text().replace("require data_path", "on_restart=(--resume auto)"))
    process = run("fail once", flags=("--max_restarts=1",))
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    first, second = [line for line in output.splitlines() if line.startswith("ARGS")]
    assert "--resume" not in first and second.endswith("'--resume', 'auto']")
    assert "rank 1 failed with exit code 9" in errors and "(1 of 1 restarts)" in errors


def test_the_error_is_the_first_cause_and_stands_there_once(project, run):
    process = run("causes")
    output, errors = process.communicate()
    assert process.returncode == 1
    assert result(project)["Error"] == "rank 1: ValueError: rank 1 has no data (exit code 1)"
    assert (output + errors).count("ValueError: rank 1 has no data") == 1


def test_a_sentence_that_every_rank_has_is_shown_once_and_no_secret_is_logged(project, run):
    process = run("usage", "x --token abc", flags=("--model_path=x",))
    output, errors = process.communicate()
    assert process.returncode == 2 and (output + errors).count("the sentence for the user") == 1, output + errors
    command = [
        "bash",
        "test/trial.sh",
        "--data_path=.",
        "--device=cpu",
        "--",
        "--hub_token",
        "s3cret",
        "--tokenizer",
        "t",
    ]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run([*command, "--api_key=s3cret"], cwd=project, capture_output=True, text=True, env=environment)
    assert done.returncode == 0
    (header,) = [line for line in logs(project).splitlines() if line.startswith("==== ") and "hub_token" in line]
    assert "s3cret" not in header and "--tokenizer t" in header


def test_nohup_is_kept_and_a_reader_that_goes_away_does_not_end_a_run(project, run, tmp_path):
    process = run("wait", "save", before=("nohup",))
    wait_for_start(project, process)
    process.stdout.close()  # as in `| head`
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert len(left_of(tmp_path)) == 2 + 0 and process.poll() is None
    process.send_signal(signal.SIGUSR1)
    process.wait()
    assert process.returncode == PREEMPTED


def test_a_port_that_is_taken_is_one_line(project, run):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        flags = ("--nnodes=2", "--node_rank=0", "--master_addr=127.0.0.1", f"--master_port={port}")
        process = run(flags=flags)
        output, errors = process.communicate()
    assert process.returncode == 2 and output == ""
    assert errors == f"error: --master_port={port}: taken on this host; give another, the same on every node\n"


def test_a_stale_running_is_found_and_a_living_runs_result_is_left_alone(project, run):
    output = project / "test" / "output" / "0"
    output.mkdir(parents=True)
    path = output / "Other_bs4_1p_acc.log"
    path.write_text("Status = RUNNING\n")
    assert run().wait() == 0
    assert result_file.read(path)["Status"] == "FAILED" and "without a word" in result_file.read(path)["Error"]
    lock = folder_lock.Lock(output / folder_lock.NAME)  # this process is the run that has the folder
    try:
        own = output / "Trial_bs4_2p_acc.log"
        for file in (path, own):
            file.write_text("Status = RUNNING\n")
        assert run("usage").wait() == 2
        assert path.read_text() == own.read_text() == "Status = RUNNING\n"
    finally:
        lock.release()


def test_odd_surroundings(project, run, tmp_path):
    """A symlink to the script, CDPATH, a locale without UTF-8, a name that is no ASCII."""
    script = project / "test" / "trial.sh"
    script.write_text(script.read_text().replace('"${BASH_SOURCE[0]}"', '"$(realpath "${BASH_SOURCE[0]}")"'))
    link = tmp_path / "söme link.sh"
    link.symlink_to(project / "test" / "trial.sh")
    (tmp_path / "Bilder ü").mkdir()
    surroundings = {"CDPATH": f"{project.parent}:/", "LC_ALL": "C", "PYTHONUTF8": "0"}
    environment = {**os.environ, **surroundings, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", link.name, "--data_path=Bilder ü", "--device=cpu", "--output_dir=Ausgabe ß"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    assert f"{tmp_path}/Bilder ü" in (tmp_path / "Ausgabe ß" / "train_0.log").read_text(encoding="utf-8")
