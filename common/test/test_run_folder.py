"""Who owns an output folder; what killed runs left in it; what a resumed run must share with its checkpoint."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from common import checkpoint_file
from common.distributed import World
from common.errors import UsageError
from common.launch import outcome
from common.run import folder_lock, result_file, run_folder
from common.run_log import RunLog

ROOT = Path(__file__).resolve().parents[2]
HOLD = (
    "import sys, time\nfrom common.run import run_folder\nfrom common.distributed import World\n"
    "with run_folder.owned(sys.argv[1], World()):\n    print('mine', flush=True)\n    time.sleep(600)\n"
)


def lock_of(folder: Path, name: str = folder_lock.NAME, **changes) -> None:
    """A lock as a run elsewhere wrote it."""
    content = {"host": "node9", "pid": 17, "started": 1.0, "since": "2026-01-01 00:00:00", "place": "elsewhere"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content | changes))


def test_a_second_run_is_refused_by_name_and_a_killed_one_is_followed(tmp_path, capfd):
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "mine\n"
    (tmp_path / "checkpoint-1.pt").write_text("the first run's")
    with pytest.raises(UsageError, match=f"belongs to the run of process {first.pid} on {socket.gethostname()}"):
        RunLog(tmp_path, World(), "Net", 4).__enter__()
    # the launcher's word on the refused run does not touch the living one's result
    outcome.conclude(outcome.Case.begin(str(tmp_path), "Net", "4", 1, "acc"), "FAILED", "exit code 2")
    assert sorted(os.listdir(tmp_path)) == [".lock", "checkpoint-1.pt"]
    first.kill()
    first.wait()
    with run_folder.owned(tmp_path, World()):
        assert f"process {first.pid}" in capfd.readouterr().out
        with pytest.raises(UsageError, match=f"process {os.getpid()}"), run_folder.owned(tmp_path, World()):
            pass  # of the same process
    assert not (tmp_path / ".lock").exists()


def test_a_pid_that_another_process_has_now_is_no_owner(tmp_path):
    lock_of(tmp_path, pid=os.getpid(), place=folder_lock._place())  # this process started at another time
    assert folder_lock.living_owner(tmp_path) is None
    (tmp_path / ".lock").write_text("")  # cut short, and by nobody who could be asked
    os.utime(tmp_path / ".lock", (1, 1))
    assert folder_lock.living_owner(tmp_path) is None


def test_a_killed_owner_that_still_gives_its_memory_back_is_no_owner(tmp_path, monkeypatch):
    """Such a process has no environment and no memory in /proc, like a zombie, but is none yet (long on a busy host).

    It was taken for a living owner, so that the launcher left `Status = RUNNING` of a run that it had ended itself.
    """
    with subprocess.Popen(["sleep", "600"]) as owner:
        me = {**folder_lock.Lock(tmp_path / folder_lock.NAME).me, "pid": owner.pid}
        me["started"] = psutil.Process(owner.pid).create_time()
        (tmp_path / folder_lock.NAME).write_text(json.dumps(me))
        assert folder_lock.living_owner(tmp_path)
        owner.kill()
        while psutil.Process(owner.pid).memory_info().vms:
            time.sleep(0.01)
        monkeypatch.setattr(psutil.Process, "status", lambda _: psutil.STATUS_RUNNING)
        assert folder_lock.living_owner(tmp_path) is None  # not waited for: still in the table of processes


def test_a_run_of_another_host_is_known_by_its_touch(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "SILENT_S", 3.0)
    monkeypatch.setattr(folder_lock, "BEAT_S", 0.2)
    with run_folder.owned(tmp_path, World()):
        lock = json.loads((tmp_path / ".lock").read_text())
        (tmp_path / ".lock").write_text(json.dumps(lock | {"place": "elsewhere"}))
        time.sleep(0.5)
        assert "process" in folder_lock.living_owner(tmp_path)
    lock_of(tmp_path)
    os.utime(tmp_path / ".lock", (time.time() + 3600,) * 2)  # that host's clock is wrong: waited for all the same
    monkeypatch.setattr(folder_lock, "_silence", lambda path: 99.0)
    with run_folder.owned(tmp_path, World()):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_only_leftovers_of_killed_writes_are_removed(tmp_path):
    leftovers = (
        ".checkpoint-20.pt.ab12cd_9.tmp",
        ".Net_bs4_1p_acc.log.tmp",
        "checkpoints/.checkpoint-4.pt.x1y2z3w4.tmp",
    )
    users = ("notes.tmp", ".mine.tmp", ".git", "checkpoint-1.pt", "earlier/.checkpoint-2.pt.ab12cd_9.tmp", ".old")
    for name in (*leftovers, *users):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in (".checkpoint-8.writing", ".best.saving", ".checkpoint-9.old", ".checkpoint-7.old", "checkpoint-7"):
        (tmp_path / "checkpoints" / name).mkdir()
    lock_of(tmp_path, ".Net_eval_bs4_1p_acc.lock", place=folder_lock._place())
    done = run_folder.tidy(tmp_path)
    assert all((tmp_path / name).exists() for name in users)
    assert not any((tmp_path / name).exists() for name in leftovers)
    # the one that a crash had moved away is back, the one that has a successor is gone
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["checkpoint-7", "checkpoint-9"]
    assert len(done) == 8 and not (tmp_path / ".Net_eval_bs4_1p_acc.lock").exists()


def test_a_stale_running_becomes_failed_and_a_living_evaluation_s_stays(tmp_path):
    for name in ("Net_bs4_1p_acc", "Net_eval_bs4_1p_acc"):
        (tmp_path / f"{name}.log").write_text("Network = Net\nStatus = RUNNING\n")
    with run_folder.owned(tmp_path, World(), ".Net_eval_bs4_1p_acc.lock"):
        run_folder.tidy(tmp_path)
    training, evaluation = (result_file.read(tmp_path / f"Net{kind}_bs4_1p_acc.log") for kind in ("", "_eval"))
    assert training["Status"] == "FAILED" and "without a word" in training["Error"] and training["Network"] == "Net"
    assert evaluation["Status"] == "RUNNING"


def test_an_evaluation_beside_a_training_moves_nothing(tmp_path):
    with RunLog(tmp_path, World(), "Net", 4, log_every=1) as training:
        training.step(1, 4, loss=1.0, lr=0.1)
        with RunLog(tmp_path, World(), "Net_eval", 4, evaluation=True) as evaluation:
            evaluation.record(1, "eval", top1=5.0)
            evaluation.finish(accuracy=5.0)
        training.step(2, 4, loss=2.0, lr=0.1)
        training.finish()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert "top1" in (tmp_path / "metrics_Net_eval_bs4_1p_acc.jsonl").read_text()
    assert {result_file.read(path)["Status"] for path in tmp_path.glob("*_acc.log")} == {"OK"}
    assert not (tmp_path / "earlier").exists() and not list(tmp_path.glob(".*"))


TWO_HOSTS = """
import os, sys
from pathlib import Path
from common.run import run_folder
from common.distributed import World, process_group
from common.errors import UsageError
from common.run_log import RunLog
with process_group("cpu") as world:
    world = World(world.device, world.rank, 2, 0, 1)  # one rank a host
    folders = [Path(sys.argv[1]), Path(sys.argv[1], f"host{world.rank}")]
    folders[1].mkdir(exist_ok=True)
    for folder in folders:
        absent = run_folder.hosts_without(folder, world)
        print("absent", len(absent), flush=True)
    os.chdir(folders[0])
    for name in ("both", "host0/c"):
        if world.rank == 1 and name != "both":
            os.chdir(folders[1])  # where there is no host0/c
        try:
            print("agreed on", run_folder.agree_on(Path(name), world), flush=True)
        except UsageError as error:
            print("refused:", error, flush=True)
    try:
        with RunLog(folders[1], world, "Net", 4, needs_shared=True):
            print("entered")
    except UsageError as error:
        print("refused:", error, flush=True)
"""


def test_hosts_that_share_no_folder_are_told_before_the_first_step(tmp_path):
    checkpoint_file.save({}, tmp_path / "both")
    checkpoint_file.save({"of": "rank 0"}, tmp_path / "host0" / "c")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", TWO_HOSTS, str(tmp_path)]
    runs = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | meeting | {"RANK": str(rank), "LOCAL_RANK": "0", "PYTHONPATH": str(ROOT)},
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank, run in enumerate(runs):
        output = run.communicate(timeout=600)[0]
        assert run.returncode == 0 and "absent 0\nabsent 1\nagreed on both\n" in output, output
        assert f"refused: host0/c: not there, or another one, on {socket.gethostname()}" in output, output
        assert "host0: not shared by" in output or rank, output
        assert "entered" not in output and output.count("refused:") == 2, output


# -- what a resumed run must share -------------------------------------------------------------------------------------

SAVED = {"data": {"count": 3, "digest": "ab"}, "recipe": {"lr": 0.1, "betas": (0.9, 0.999)}, "epochs": 3, "seed": 0}


def test_what_changes_the_mathematics_is_refused_with_old_and_new_and_the_flag():
    now = {"data": {"count": 4, "digest": "cd"}, "recipe": {"lr": 0.2, "betas": [0.9, 0.999]}, "epochs": 5, "seed": 1}
    may_change = ("recipe.lr", "epochs")
    assert run_folder.compare("c.pt", SAVED, SAVED | {"recipe": now["recipe"]}, may_change=may_change) == (
        "changed since c.pt: recipe.lr 0.1 -> 0.2"
    )
    with pytest.raises(UsageError) as refused:
        run_folder.compare("c.pt", SAVED, now, may_change=may_change)
    for part in ("data.count was 3, is now 4", "seed was 0, is now 1", "--accept_changes data.count,data.digest,seed"):
        assert part in str(refused.value)
    assert "lr" not in str(refused.value)
    for accepted in ("data,seed", ["data", "seed"], "all"):
        note = run_folder.compare("c.pt", SAVED, now, may_change=may_change, accepted=accepted)
        assert "seed 0 -> 1" in note and "epochs 3 -> 5" in note
    with pytest.raises(UsageError, match="--accept_changes sede: no such name; there are data.count"):
        run_folder.compare("c.pt", SAVED, now, accepted="sede")
    with pytest.raises(UsageError, match="seed was 0, is now 1.* or begin a new run: .* do not fit with seed changed"):
        run_folder.compare("c.pt", SAVED, now, may_change=may_change, accepted="all", fixed=["seed"])
    assert run_folder.compare("c.pt", SAVED, SAVED, fixed=["seed"]) is None
    assert "does not say what it is of" in run_folder.compare("old.pt", None, now)


def test_a_listing_is_known_by_names_labels_classes_and_sizes(tmp_path):
    for name, size in (("a.jpg", 3), ("b.jpg", 4)):
        (tmp_path / name).write_bytes(b"x" * size)
    names = [str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")]
    one = run_folder.listing_identity(names, [0, 1], ["cat", "dog"], root=tmp_path)
    assert one["count"] == 2 and one["classes"] == ["cat", "dog"]
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (moved / name).write_bytes((tmp_path / name).read_bytes())
    assert run_folder.listing_identity([f"{moved}/a.jpg", f"{moved}/b.jpg"], [0, 1], ["cat", "dog"], root=moved) == one
    assert run_folder.listing_identity(names, [1, 0], ["cat", "dog"], root=tmp_path) != one
    (tmp_path / "b.jpg").write_bytes(b"x" * 5)
    assert run_folder.listing_identity(names, [0, 1], ["cat", "dog"], root=tmp_path) != one
    assert run_folder.listing_identity(["ab", "c"]) != run_folder.listing_identity(["a", "bc"])
