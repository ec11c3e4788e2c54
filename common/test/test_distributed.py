"""Collectives on two real gloo processes, and the process group's behaviour when something is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common import distributed
from common.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(code: str, tmp_path: Path, ranks: int = 2) -> subprocess.CompletedProcess:
    """Runs `code` under torchrun; each rank may write to its own file `rank<r>` in the folder given as argv[1]."""
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, str(script), str(tmp_path)], capture_output=True, text=True, env=environment)


def test_a_process_meets_the_others_as_often_as_it_likes(tmp_path):
    """As Trainer.train(), .evaluate(), .train() do; ranks never come at the same moment."""
    code = """
import os, pathlib, time, torch
from common import distributed as d
for meeting in range(3):
    time.sleep(0.2 * int(os.environ["RANK"]))
    with d.process_group("cpu") as world:
        total = d.all_reduce_sum(torch.tensor(meeting + world.rank)).item()
        pathlib.Path(sys.argv[1], f"rank{world.rank}").write_text(f"{meeting} {total}")
"""
    process = run_ranks(code, tmp_path)
    assert process.returncode == 0, process.stderr
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["2 5", "2 5"]


def test_ranks_wait_for_a_late_one_in_no_collective_and_learn_when_one_is_gone(tmp_path):
    code = """
import os, pathlib, time
from common import distributed as d
from common.network import lost_ranks
with d.process_group("cpu") as world:
    all_reduce, d.dist.all_reduce = d.dist.all_reduce, None
    began = time.monotonic()
    time.sleep(1.0 * world.rank)
    d.wait_for_all()
    d.wait_for_all()
    waited, d.LOOK_S = time.monotonic() - began, 0.0
    if world.rank == 1:
        os._exit(0)
    try:
        d.wait_for_all()
    except lost_ranks.RanksLost as lost:
        pathlib.Path(sys.argv[1], "told").write_text(f"{waited > 0.9} {lost}")
        os._exit(0)
"""
    process = run_ranks(code, tmp_path)
    assert process.returncode == 0, process.stderr
    assert "True rank 0 waits for the other ranks: ended: rank 1" in (tmp_path / "told").read_text()


def test_collectives_on_two_ranks(tmp_path):
    code = """
import json, pathlib, torch
from common import distributed as d
with d.process_group("cpu") as world:
    x = torch.full((2, 1), float(world.rank + 1), requires_grad=True)
    gathered = d.all_gather_with_grad(x)
    (gathered * torch.arange(4.0)[:, None]).sum().mul(world.rank + 1).backward()
    out = dict(
        world=[world.rank, world.size, world.is_main, world.device.type],
        gathered=gathered.flatten().tolist(), gradient=x.grad.flatten().tolist(),
        mean=d.all_reduce_mean(torch.tensor(float(world.rank))).item(), sum=d.all_reduce_sum(torch.tensor(2)).item(),
        objects=d.gather_objects("abc"[world.rank]), broadcast=d.broadcast_object({"from": world.rank}),
    )
    pathlib.Path(sys.argv[1], f"rank{world.rank}").write_text(json.dumps(out))
"""
    process = run_ranks(code, tmp_path)
    assert process.returncode == 0, process.stderr
    first, second = (json.loads((tmp_path / f"rank{r}").read_text()) for r in range(2))
    assert first.pop("world") == [0, 2, True, "cpu"] and second.pop("world") == [1, 2, False, "cpu"]
    # the sum over ranks of d(rank + 1) * sum_i i * gathered_i / d x: weights 0, 1 on rank 0 and 2, 3 on rank 1, times 3
    assert first.pop("gradient") == [0.0, 3.0] and second.pop("gradient") == [6.0, 9.0]
    assert first == second
    assert first["gathered"] == [1.0, 1.0, 2.0, 2.0] and first["mean"] == 0.5 and first["sum"] == 4
    assert first["objects"] == ["a", "b"] and first["broadcast"] == {"from": 0}


@pytest.mark.parametrize("fails", [False, True])
def test_a_ddp_model_that_outlives_the_group_does_not_hang_the_exit(tmp_path, fails):
    code = f"""
import torch
from common import distributed as d
def main():
    with d.process_group("cpu") as world:
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))
        for step in range(20):
            model(torch.ones(2, 64)).sum().backward()
            if {fails} and world.rank == 1 and step == 10:
                raise ValueError("this is the cause")
    print("left the group with the model alive", type(model).__name__)
main()
"""
    process = run_ranks(code, tmp_path, ranks=3)
    assert ("this is the cause" in process.stderr) == fails == (process.returncode != 0)
    assert process.stdout.count("with the model alive") == (0 if fails else 3)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed in Linux's /proc")
def test_no_collective_thread_is_left_when_python_shuts_down(tmp_path):
    """A thread that asks for Python's lock during the shut-down aborts the process ("terminate called ...")."""
    code = """
import atexit, os, pathlib, torch
file = pathlib.Path(sys.argv[1], "rank" + os.environ["RANK"])
def threads():
    names = [task.joinpath("comm").read_text() for task in pathlib.Path("/proc/self/task").iterdir()]
    return sum(name.startswith("pt_gloo") for name in names)
atexit.register(lambda: file.open("a").write(f"at the exit {threads()}"))  # runs after what was registered later
from common import distributed as d
def main():
    with d.process_group("cpu"):
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))
        model(torch.ones(2, 64)).sum().backward()
        file.write_text(f"in the group {threads() > 0}, ")
main()
"""
    process = run_ranks(code, tmp_path)
    assert process.returncode == 0, process.stderr
    assert [(tmp_path / f"rank{r}").read_text() for r in range(2)] == ["in the group True, at the exit 0"] * 2


def test_one_failing_rank_ends_all_and_its_error_is_shown(tmp_path):
    code = """
import torch
from common import distributed as d
with d.process_group("cpu", train_timeout_s=600) as world:
    if world.rank == 1:
        raise ValueError("this is the cause")
    d.barrier()  # waits for the failed rank, and must not wait for ten minutes
"""
    process = run_ranks(code, tmp_path)
    assert process.returncode != 0
    assert "ValueError: this is the cause" in process.stderr


def test_a_lost_rank_is_noticed_within_the_training_time_out(tmp_path):
    code = """
import pathlib, time, torch
from common import distributed as d
with d.process_group("cpu", train_timeout_s=3) as world:
    if world.rank == 1:
        time.sleep(60)  # hangs
    try:
        d.barrier()
    except RuntimeError as error:
        pathlib.Path(sys.argv[1], "noticed").write_text(str(error))
        raise
"""
    assert run_ranks(code, tmp_path).returncode != 0
    assert "imed out" in (tmp_path / "noticed").read_text()


def test_without_torchrun_there_is_one_rank_and_no_group(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with distributed.process_group("cpu") as world:
        assert world == distributed.World()
        tensor = torch.ones(3, requires_grad=True)
        assert distributed.all_gather_with_grad(tensor) is tensor
        assert distributed.all_reduce_mean(tensor).tolist() == [1.0] * 3
        assert distributed.gather_objects("a") == ["a"] and distributed.world_size() == 1


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"RANK_ID": "1", "RANK_SIZE": "8"}, "RANK_ID=1 RANK_SIZE=8 .*torchrun"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK=2"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "integers"),
    ],
)
def test_contradictory_variables_are_named(monkeypatch, variables, message):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message), distributed.process_group("cpu"):
        pass
