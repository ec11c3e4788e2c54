"""run_distribute.sh against the reference's script, and train_cluster.sh."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from common import rank_table
from common.launch.world import LaunchError, nodes_of_table
from common.run import result_file
from vit import rank_range

PROJECT = Path(__file__).resolve().parents[1]
# What the reference's script started, recorded with a stub in place of python.
GOLDEN = {c["name"]: c for c in json.loads((Path(__file__).parent / "golden/run_distribute_cases.json").read_text())}
DEMO = PROJECT / "configs" / "run_vit_demo.yaml"


def server(number: int, devices: range) -> dict:
    return rank_table.generate(f"10.0.0.{number}", {n: f"192.168.{number}.{n + 1}" for n in devices})


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with tables of one and of two servers."""
    rank_table.write(server(1, range(8)), tmp_path / "eight.json")
    rank_table.write(server(1, range(4, 8)), tmp_path / "half.json")
    rank_table.write(server(1, range(2)), tmp_path / "two.json")
    rank_table.write(rank_table.merge([server(1, range(8)), server(2, range(8))]), tmp_path / "sixteen.json")
    return tmp_path


def share_of(folder: Path, name: str, table: str) -> tuple[dict[str, str], Path]:
    """Our reading of the golden case's arguments, with a table and a configuration that exist."""
    _, _, *rest = GOLDEN[name]["args"]
    return rank_range.share_of_server([str(folder / table), str(DEMO), *rest]), folder / table


def bash(script: str, *words: str, folder: Path = PROJECT) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", PROJECT / script, *words], cwd=folder, capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("single_0_8_train_8", "eight.json"),
        ("single_0_8_train_4args", "eight.json"),
        ("server1_8_16_of_16", "sixteen.json"),
        ("half_4_8_4args", "half.json"),
    ],
)
def test_a_sane_call_starts_the_ranks_of_the_reference(folder, name, table):
    share, path = share_of(folder, name, table)
    nodes = nodes_of_table(str(path))
    node_rank = int(share["node_rank"])
    first = sum(node.nproc for node in nodes[:node_rank])
    size = sum(node.nproc for node in nodes)
    started = [
        {"RANK_ID": str(rank), "DEVICE_ID": str(device), "RANK_SIZE": str(size)}
        for rank, device in enumerate(nodes[node_rank].devices, start=first)
    ]
    assert started == GOLDEN[name]["ranks"]
    assert share["run_mode"] == "train" and share["rank_table_file"] == str(path)


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("half_4_8_5args_BUG_device_ids", "half.json", "[4,8] of 4 ranks is no server's share"),
        ("half_4_8_4args", "eight.json", "[4,8] means devices 4 to 7, the rank table has 0,1,2,3,4,5,6,7"),
        ("single_0_8_train_4args", "sixteen.json", "has 2 servers: give RANK_SIZE (16) after MODE"),
        (
            "readme_literal_device_num",
            "eight.json",
            "has 8 ranks: bash has not multiplied; write device_num=$((8*server_count))",
        ),
        ("missing_table", "nope.json", "nope.json: cannot be read"),
        ("bad_range", "eight.json", "range '[a,8]' is not [a,b]"),
        ("no_brackets", "eight.json", "range '0,8' is not [a,b]"),
        ("three_args", "eight.json", "3 arguments are too few: bash run_distribute.sh"),
        ("unknown_mode", "eight.json", "MODE 'fly' is unknown: choose train, finetune, eval, knn, linear, predict"),
    ],
)
def test_an_invalid_world_is_refused_where_the_reference_may_start_it(folder, name, table, message):
    with pytest.raises(LaunchError) as caught:
        share_of(folder, name, table)
    assert message in str(caught.value)


def test_a_server_of_sixteen_cards(folder):
    addresses = {n: f"192.168.1.{n + 1}" for n in range(16)}
    path = rank_table.write(rank_table.generate("127.0.0.1", addresses, 16), folder / "one.json")
    words = [str(path), str(DEMO), "[0,16]", "train", "--device=cpu", "--dry_run"]
    done = bash("run_distribute.sh", *words)
    assert done.returncode == 2 and "say --devices_per_server 16" in done.stderr
    for flags in (["--devices_per_server=16"], ["--devices_per_server", "16"]):
        done = bash("run_distribute.sh", *words, *flags, "--", "epochs=1")
        assert done.returncode == 0 and "--nproc_per_node 16" in done.stdout, done.stderr


def test_predicting_is_done_once_by_rank_0(folder):
    share, _ = share_of(folder, "predict_single", "two.json")
    assert share["device_id"] == "0" and share["nproc"] == "1" and share["starts_nothing"] == ""
    words = [str(folder / "sixteen.json"), str(DEMO), "[8,16]", "predict", "16", "img.png"]
    assert "rank 0 predicts" in rank_range.share_of_server(words)["starts_nothing"]
    done = bash("run_distribute.sh", *words)
    assert done.returncode == 0 and "nothing to do here" in done.stdout
    with pytest.raises(LaunchError, match="predict needs PREDICT_DATA"):
        rank_range.share_of_server(words[:4])


def test_two_ranks_train_from_a_rank_table_with_relative_paths(folder):
    for split, count in (("train", 4), ("val", 1)):
        for name, colour in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
            (folder / "pictures" / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (20, 20), colour).save(folder / "pictures" / split / name / f"{index}.png")
    (folder / "tiny.yaml").write_text(
        "model: {name: vit_demo, img_size: 16}\n"
        "optimizer: {warmup_epochs: 0}\n"
        "epochs: 1\nbatch_size: 2\ndo_eval: false\n"
        f"data:\n  num_workers: 0\n  train_dataset_dir: {folder}/pictures/train\n"
    )
    words = ["two.json", "tiny.yaml", "[0,2]", "train", "2", "--device=cpu", "--output_dir=out"]
    done = bash("run_distribute.sh", *words, folder=folder)
    assert done.returncode == 0, done.stderr
    results = list((folder / "out").glob("ViT_for_PyTorch_bs*_2p_acc.log"))
    assert len(results) == 1 and result_file.read(results[0])["Status"] == "OK"
    assert (folder / "out" / "train_1.log").exists()


def test_a_cluster_script_needs_a_cluster_and_shows_every_server(folder):
    data = f"--data_path={folder}"
    done = bash("test/train_cluster.sh", data)
    assert done.returncode == 2 and "give --rank_table_file, --hostfile or --nnodes" in done.stderr
    done = bash("test/train_cluster.sh", data, "--device=cpu", f"--rank_table_file={folder}/sixteen.json", "--dry_run")
    assert done.returncode == 0 and "# node 1, 10.0.0.2" in done.stdout and "--nproc_per_node 8" in done.stdout
    assert "--hostfile=FILE" in bash("test/train_cluster.sh", "--help").stdout


def dry_run(folder, *flags):
    words = [str(folder / "two.json"), str(DEMO), "[0,2]", "train", "2", "--device=cpu", *flags, "--dry_run"]
    done = bash("run_distribute.sh", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_flags_of_the_scripts_in_test_reach_the_training(folder):
    assert f"--train_dataset_dir {folder}/train --eval_dataset_dir {folder}/val" in dry_run(
        folder, f"--data_path={folder}"
    )
    assert "--resume_training auto" in dry_run(folder, "--resume=auto")
    assert "--resume_training auto" in dry_run(folder, "--max_restarts=2")  # a restart goes on, and does not begin anew
    assert "resume_training" not in dry_run(folder)


def test_of_several_servers_each_returns_at_once(folder):
    """As in the reference, so that a loop over ssh reaches the servers after the first; the ranks run on."""
    words = [str(folder / "sixteen.json"), str(folder / "gone.yaml"), "[0,8]", "train", "16", "--device=cpu"]
    wrong = bash("run_distribute.sh", *words)
    assert wrong.returncode == 2 and "gone.yaml" in wrong.stderr  # what is wrong is said at once
    words[1] = str(DEMO)
    started = bash("run_distribute.sh", *words, "--unknown_flag=1")  # ends by itself, and says so in its log
    assert started.returncode == 0 and "meets the other servers" in started.stdout
    log = Path(started.stdout.split("its log: ")[1].split(";")[0])
    deadline = time.monotonic() + 300
    while "unknown_flag" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert "unknown_flag" in log.read_text()
