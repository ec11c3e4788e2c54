"""Two and three servers (network namespaces) train from a rank table; one is cut off, the others say which."""

import contextlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from ci.test.namespace_servers import NotPermitted, Server, servers
from common import rank_table
from common.errors import PREEMPTED
from common.run import result_file

ROOT = Path(__file__).resolve().parents[2]
VIT = ["model.img_size=16", "data.num_workers=0", "--log_every=1", "do_eval=false"]
COLLECTIVE_TIMEOUT_S = 5


@contextlib.contextmanager
def connected(count: int):
    try:
        with servers(count) as made:
            yield made
    except NotPermitted as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for index, name in enumerate(("blue", "red")):
        (root / "train" / name).mkdir(parents=True)
        (root / "val" / name).mkdir(parents=True)
        for number in range(60):
            colour = (200 * index, 4 * number, 200 - 200 * index)
            Image.new("RGB", (20, 20), colour).save(root / "train" / name / f"{number:02}.png")
    return root


def table_of(made: list[Server], folder: Path) -> Path:
    tables = [rank_table.generate(server.address, {0: f"192.168.{n}.1"}) for n, server in enumerate(made)]
    return rank_table.write(rank_table.merge(tables), folder / "table.json")


def start(server: Server, project: str, *flags: str) -> subprocess.Popen:
    names = ("RANK", "RANK_ID", "MASTER_ADDR", "GLOO_SOCKET_IFNAME")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / project / "test" / "train_cluster.sh"), "--device=cpu", *flags]
    return server.start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def vit_flags(pictures: Path, output: Path, *flags: str) -> list[str]:
    data = [f"--data_path={pictures}", f"--output_dir={output}", "--config=configs/run_vit_demo.yaml"]
    return [*data, "--batch_size=4", f"--collective_timeout={COLLECTIVE_TIMEOUT_S}", *flags]


def losses(output: Path) -> dict[int, set[float]]:
    """Every loss that was logged for a step, by any attempt."""
    found: dict[int, set[float]] = {}
    for text in (output / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        if line["kind"] == "train":
            found.setdefault(line["step"], set()).add(line["loss"])
    return found


def wait_for(path: Path, *processes: subprocess.Popen) -> None:
    deadline = time.monotonic() + 600
    while not path.exists():
        ended = next((process for process in processes if process.poll() is not None), None)
        assert ended is None, ended.communicate()[0]
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.05)


def test_three_servers_one_is_cut_off_the_others_name_it_and_the_rerun_resumes(pictures, tmp_path):
    with connected(3) as made:
        flags = vit_flags(pictures, tmp_path, f"--rank_table_file={table_of(made, tmp_path)}", "--epochs=200")
        options = ["--", *VIT, "--save_every=3"]
        running = [start(server, "ViT_for_PyTorch", *flags, *options) for server in made]
        wait_for(tmp_path / "checkpoints" / "checkpoint-6.pt", *running)
        made[2].pull_cable()
        outputs = [process.communicate(timeout=600)[0] for process in running]
        assert all(process.returncode != 0 for process in running)
        for rank in range(2):
            lost = f"no answer from rank 2 on {made[2].address}"
            assert f"{lost} (" in (tmp_path / f"train_{rank}.log").read_text() and lost in outputs[rank]
        assert f"no other host answers {made[2].address}: this host itself may be cut off" in outputs[2]
        assert result_file.read(next(tmp_path.glob("*_3p_acc.log")))["Status"] == "FAILED"

        made[2].plug_in()
        before = max(losses(tmp_path))
        flags += [f"--max_steps={before + 2}", "--resume=auto"]
        running = [start(server, "ViT_for_PyTorch", *flags, *options) for server in made]
        outputs = [process.communicate()[0] for process in running]
        assert all(process.returncode == 0 for process in running), outputs
    assert re.search(r"resuming from step \d+ \(\S+/checkpoint-\d+\.pt\)", outputs[0]), outputs[0]  # scripts read it
    logged = losses(tmp_path)
    assert list(logged) == list(range(1, before + 3))
    assert all(len(values) == 1 for values in logged.values())  # steps that both runs took have the same loss


def test_two_servers_train_clip_until_one_is_cut_off(small_case, tmp_path):
    clip_sample = runpy.run_path(str(ROOT / "CLIP_for_PyTorch" / "test" / "clip_sample.py"))
    clip_sample["write_coco_zips"](tmp_path / "coco", {"train": 24, "val": 8})
    output = tmp_path / "output"
    with connected(2) as made:
        flags = [f"--rank_table_file={table_of(made, tmp_path)}", f"--data_path={tmp_path / 'coco'}"]
        flags += [
            f"--model_path={small_case('CLIP_for_PyTorch') / 'clip-roberta'}",
            f"--output_dir={output}",
            "--precision=fp32",
        ]
        flags += [
            "--workers=0",
            "--batch_size=4",
            "--train_epochs=1000",
            f"--collective_timeout={COLLECTIVE_TIMEOUT_S}",
        ]
        running = [start(server, "CLIP_for_PyTorch", *flags, "--", "--log_every", "1") for server in made]
        wait_for(output / "metrics.jsonl", *running)
        while len(losses(output)) < 3:
            time.sleep(0.05)
        made[1].pull_cable()
        outputs = [process.communicate(timeout=600)[0] for process in running]
        assert all(process.returncode != 0 for process in running)
        for here, other in ((0, 1), (1, 0)):
            assert f"no answer from rank {other} on {made[other].address}" in outputs[here]
    assert result_file.read(next(output.glob("*_2p_acc.log")))["Status"] == "FAILED"


def test_a_node_leaves_and_returns_and_the_run_goes_on(pictures, tmp_path):
    with connected(2) as made:
        flags = vit_flags(pictures, tmp_path, f"--rank_table_file={table_of(made, tmp_path)}", "--epochs=200")
        flags += ["--max_restarts=2", "--", *VIT, "--save_every=3"]
        running = [start(server, "ViT_for_PyTorch", *flags) for server in made]
        wait_for(tmp_path / "checkpoints" / "checkpoint-3.pt", *running)
        left = running[1]
        os.killpg(left.pid, signal.SIGTERM)
        left.communicate(timeout=600)
        assert left.returncode == PREEMPTED and running[0].poll() is None
        before = max(losses(tmp_path))
        back = start(made[1], "ViT_for_PyTorch", *flags)
        while max(losses(tmp_path)) < before + 6:
            assert running[0].poll() is None, running[0].communicate()[0]
            time.sleep(0.1)
        for process in (running[0], back):
            os.killpg(process.pid, signal.SIGTERM)
        output = running[0].communicate(timeout=600)[0]
        back.communicate(timeout=600)
    assert re.search(r"resuming from step \d+ \(", output), output
    logged = losses(tmp_path)
    assert list(logged) == list(range(1, max(logged) + 1)) and all(len(values) == 1 for values in logged.values())
