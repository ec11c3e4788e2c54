"""`common.launch.cluster` with a stand-in for ssh that runs the command here, and the scheduler templates."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from common.launch.world import nodes_of_hostfile

COMMON = Path(__file__).resolve().parents[1]
DUAL = COMMON / "test" / "golden" / "ranktable" / "valid" / "dual_16p.json"
# As sshd does, the words after the host are joined and given to a shell.
SSH = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift 2; done
[[ $1 != unreachable ]] || { echo "ssh: connect to host $1: No route to host" >&2; exit 255; }
shift
exec bash -c "$*"
"""
# One node: fails, or waits to be ended, by the node rank that launch_cluster gives it.
NODE = """#!/usr/bin/env bash
echo "ARGS $*"
for word in "$@"; do case $word in --node_rank=*) node=${word#*=} ;; esac; done
trap 'touch "ended$node"; exit 143' TERM
touch "started$node"
if [[ $node == 1 && " $* " == *" --die "* ]]; then
  while [[ ! -e started0 ]]; do sleep 0.1; done
  echo "the cause is here"
  exit 7
fi
[[ " $* " == *" --wait "* ]] || exit 0
while true; do sleep 0.1; done
"""
SUM_OF_RANKS = """
import os, torch
torch.distributed.init_process_group("gloo")
total = torch.tensor([torch.distributed.get_rank() + 1])
torch.distributed.all_reduce(total)
print("TOTAL", total.item(), "local", os.environ["LOCAL_RANK"], flush=True)
torch.distributed.destroy_process_group()
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a space in its name that has node.sh, a file of two hosts and, first on PATH, our ssh."""
    folder = tmp_path / "the repo"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "ssh").write_text(SSH)
    (folder / "bin" / "ssh").chmod(0o755)
    (folder / "node.sh").write_text(NODE)
    (folder / "hosts").write_text("host0\nhost1\n")
    return folder


def environment(folder: Path, **extra: str) -> dict[str, str]:
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "RANK_ID", "MASTER_ADDR")}
    return {**clean, "PATH": path, "PYTHONPATH": str(COMMON.parent), "OMP_NUM_THREADS": "1", **extra}


def start(folder: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "common.launch.cluster", *words]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment(folder), **streams)


def cluster(folder: Path, *words: str) -> tuple[int, str, str]:
    process = start(folder, *words)
    output, errors = process.communicate()
    return process.returncode, output, errors


def wait_for(*paths: Path) -> None:
    deadline = time.time() + 60
    while not all(path.exists() for path in paths):
        assert time.time() < deadline, paths
        time.sleep(0.05)


def test_the_command_of_every_node_is_printed(folder):
    script = ["bash", "test/train_cluster.sh", "--data_path=my data", "--", "--note", "x y"]
    code, output, errors = cluster(folder, f"--rank_table_file={DUAL}", "--before=source venv/bin/activate", *script)
    assert code == 0, errors
    lines = output.splitlines()
    assert lines[0::2] == ["# node 0, 10.90.43.21", "# node 1, 10.90.43.22"]
    for node, line in enumerate(lines[1::2]):
        ssh, host, command = shlex.split(line)
        assert (ssh, host) == ("ssh", f"10.90.43.2{node + 1}")
        script = f"bash test/train_cluster.sh '--data_path=my data' --rank_table_file={DUAL} --node_rank={node}"
        assert command == f"cd '{folder}' && {{ source venv/bin/activate; }} || exit 2; {script} -- --note 'x y'"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hostfile=hosts", "python", "train.py"], "give the script after the options"),
        (["bash", "node.sh"], "give one of --rank_table_file and --hostfile"),
        (["--hostfile=gone", "bash", "node.sh"], "--hostfile=gone: cannot be read"),
        ([f"--rank_table_file={DUAL}", "--nproc=4", "bash", "node.sh"], "--nproc=4, but"),
    ],
)
def test_bad_options_are_one_clear_error(folder, words, message):
    code, _, errors = cluster(folder, *words)
    assert code == 2 and message in errors and "Traceback" not in errors


def test_the_size_of_a_server_is_passed_on(folder):
    words = [f"--rank_table_file={DUAL}", "--devices_per_server=4", "bash", "node.sh"]
    code, _, errors = cluster(folder, *words)
    assert code == 2 and "8 devices on one server (max 4 per server)" in errors
    words[1] = "--devices_per_server=16"
    code, output, errors = cluster(folder, *words)
    assert code == 0 and output.count("--devices_per_server=16") == 2, errors


def test_every_node_runs_and_has_a_log(folder):
    code, output, errors = cluster(
        folder, "--hostfile=hosts", "--master_port=4000", "--run", "bash", "node.sh", "--x=a b"
    )
    assert code == 0, errors
    for node in range(2):
        expected = f"ARGS --x=a b --hostfile={folder / 'hosts'} --master_port=4000 --node_rank={node}"
        assert expected in (folder / f"cluster_logs/node_{node}_host{node}.log").read_text()
        assert f"node {node}  host{node}  exit code 0" in output
    assert output.count("ARGS") == 1  # the first node is shown


def test_the_first_node_that_fails_ends_the_others_and_gives_the_exit_code(folder):
    code, output, errors = cluster(folder, "--hostfile=hosts", "--run", "bash", "node.sh", "--die", "--wait")
    assert code == 7
    assert "node 1 (host1) failed first, with exit code 7" in errors and "| the cause is here" in errors
    assert (folder / "ended0").exists() and "node 0  host0  exit code 143" in output


def test_a_host_that_cannot_be_reached_ends_the_run(folder):
    (folder / "hosts").write_text("host0\nunreachable\n")
    code, _, errors = cluster(folder, "--hostfile=hosts", "--run", "bash", "node.sh", "--wait")
    assert code == 255
    assert "node 1 (unreachable): ssh could not connect" in errors and "| ssh: connect to host" in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_nodes_end_with_the_launcher_however_it_ends(folder, number):
    process = start(folder, "--hostfile=hosts", "--run", "bash", "node.sh", "--wait")
    wait_for(folder / "started0", folder / "started1")
    process.send_signal(number)
    process.communicate()
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    wait_for(folder / "ended0", folder / "ended1")


def test_two_nodes_of_one_and_two_ranks_meet(project, folder):
    (project / "run.py").write_text(SUM_OF_RANKS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=2\n")
    script = ["bash", "test/trial.sh", "--data_path=.", "--device=cpu"]
    words = ["--hostfile=hosts", f"--master_port={port}", "--run", f"--folder={project}", *script]
    code, output, errors = cluster(folder, *words)
    assert code == 0, errors + output
    for rank, local_rank in enumerate((0, 0, 1)):  # the nodes share a folder: logs go by rank
        assert f"TOTAL 6 local {local_rank}" in (project / f"test/output/0/train_{rank}.log").read_text()


def test_the_slurm_script_starts_every_node_with_its_rank(folder):
    stand_ins = {
        "squeue": "cat state",
        "scontrol": '[[ $1 == requeue ]] && echo "$*" || { echo "node7"; echo "node9"; }',
        # two nodes of one task each, as srun would start them
        "srun": 'while [[ $1 == -* ]]; do shift; done; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
    }
    for name, text in stand_ins.items():
        (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    variables = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[7,9]", "SLURM_NNODES": "2"}
    command = ["bash", COMMON / "launch" / "slurm.sh", "node.sh", "--data_path=my data"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment(folder, **variables))
    assert done.returncode == 0, done.stderr
    assert "requeue" not in done.stdout
    for node in range(2):
        flags = f"--nnodes=2 --node_rank={node} --master_addr=node7 --master_port=23456 --data_path=my data"
        assert f"ARGS {flags}\n" in done.stdout
    (folder / "node.sh").write_text("exit 75\n")  # stopped with a checkpoint
    for state in ("RUNNING", "COMPLETING"):  # the latter: somebody has cancelled the job
        (folder / "state").write_text(state)
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment(folder, **variables))
        assert done.returncode == 75 and ("requeue 123456" in done.stdout) == (state == "RUNNING"), done.stderr


def test_the_volcano_job_starts_all_pods_and_names_a_script_and_flags_that_exist(tmp_path):
    job = yaml.safe_load((COMMON / "launch" / "volcano_job.yaml").read_text())
    (task,) = job["spec"]["tasks"]
    assert job["spec"]["minAvailable"] == task["replicas"] and {"svc", "env"} <= set(job["spec"]["plugins"])
    assert {"exitCode": 75, "action": "RestartJob"} in job["spec"]["policies"]
    (container,) = task["template"]["spec"]["containers"]
    words = shlex.split(container["command"][2])
    assert words[:2] == ["exec", "bash"] and (COMMON.parent / words[2]).is_file()
    assert f"--hostfile=/etc/volcano/{task['name']}.host" in words and "--node_rank=$VC_TASK_INDEX" in words
    assert f"--nproc={container['resources']['limits']['huawei.com/Ascend910']}" in words
    # what the svc plugin writes into that file, by Volcano's documentation
    hosts = tmp_path / "worker.host"
    hosts.write_text("vit-train-worker-0.vit-train\nvit-train-worker-1.vit-train\n")
    assert [node.nproc for node in nodes_of_hostfile(str(hosts), 8, 1)] == [8, 8]


@pytest.mark.parametrize(
    "script", sorted(COMMON.parent.glob("*_for_PyTorch/test/train_cluster.sh")), ids=lambda path: path.parts[-3]
)
def test_the_cluster_script_of_a_project_needs_a_cluster_and_shows_every_node(folder, script):
    words = ["bash", script, f"--data_path={folder}", f"--output_dir={folder}", "--device=cpu", "--dry_run"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment(folder))
    assert done.returncode == 2 and "give --rank_table_file, --hostfile or --nnodes" in done.stderr
    words += [f"--rank_table_file={DUAL}", *([f"--model_path={folder}"] if "CLIP" in str(script) else [])]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment(folder))
    assert done.returncode == 0 and "# node 1, 10.90.43.22" in done.stdout and "--nnodes 2" in done.stdout, done.stderr
