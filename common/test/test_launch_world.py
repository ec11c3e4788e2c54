"""A rank table, a host file or flags all become one world, and launch.sh runs it: on two nodes too."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ci.test.namespace_servers import NotPermitted, servers
from common import rank_table
from common.launch import world as launch_world
from common.launch.world import LaunchError, Node, nodes_of_hostfile, nodes_of_table, own_node, own_rank

GOLDEN = Path(__file__).parent / "golden" / "ranktable"
DUAL = GOLDEN / "valid" / "dual_16p.json"
SINGLE = GOLDEN / "valid" / "single_4p_4567.json"
WORLDS = json.loads((GOLDEN / "valid/expected_world.json").read_text())
SUM_OF_RANKS = """
import os, sys, torch
torch.distributed.init_process_group("gloo")
total = torch.tensor([torch.distributed.get_rank() + 1])
torch.distributed.all_reduce(total)
print("TOTAL", total.item(), "rank", os.environ["RANK"], "local", os.environ["LOCAL_RANK"], flush=True)
torch.distributed.destroy_process_group()
"""


def environment(**extra: str) -> dict[str, str]:
    names = ("RANK", "RANK_ID", "RANK_SIZE", "DEVICE_ID", "RANK_TABLE_FILE", "ASCEND_DEVICE_ID", "MASTER_ADDR")
    clean = {k: v for k, v in os.environ.items() if k not in names}
    return {**clean, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **extra}


def start(project: Path, *flags: str, **extra: str) -> subprocess.Popen:
    command = ["bash", "test/trial.sh", "--data_path=.", *flags]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=project, env=environment(**extra), **streams)


def bash(project: Path, *flags: str, **extra: str) -> tuple[int, str, str]:
    process = start(project, *flags, **extra)
    output, errors = process.communicate()
    return process.returncode, output, errors


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def hostfile(folder: Path, text: str) -> str:
    (folder / "hosts").write_text(text)
    return str(folder / "hosts")


@pytest.mark.parametrize("name", [name for name in WORLDS if "must_warn_or_fail" not in WORLDS[name]])
def test_nodes_of_a_rank_table_are_its_world(name):
    expected = WORLDS[name]
    nodes = nodes_of_table(str(GOLDEN / "valid" / name))
    assert [node.address for node in nodes] == list(expected["node_rank"])
    assert {node.address: node.nproc for node in nodes} == expected["nproc_per_node"]
    assert [number for node in nodes for number in node.devices] == [row["device_id"] for row in expected["ranks"]]


def test_a_hostfile_has_comments_slots_and_a_default(tmp_path):
    path = hostfile(tmp_path, "# the cluster\n\nnode1 slots=4  # the first\n10.0.0.2\nfe80::3 slots = 1\n")
    assert nodes_of_hostfile(path, None, 8) == [Node("node1", 4), Node("10.0.0.2", 8), Node("fe80::3", 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("a slots=2\na\n", "line 2: a is listed twice"),
        ("a slots=0\n", "line 1: 'a slots=0' is not"),
        ("a 8\n", "line 1: 'a 8' is not 'address' or 'address slots=N'"),
        ("10.0.0.300\n", "line 1: '10.0.0.300' is not"),
        ("a slots=4\n", "slots=4, but --nproc=2"),
        ("127.0.0.1\n10.0.0.2\n", "loopback address among others"),
    ],
)
def test_a_bad_hostfile_is_refused_with_its_line(tmp_path, text, message):
    with pytest.raises(LaunchError, match="hosts") as caught:
        nodes_of_hostfile(hostfile(tmp_path, text), 2 if "slots=4" in text else None, 1)
    assert message in str(caught.value)


def test_a_machine_finds_itself_by_address_and_by_name():
    others = [Node("198.51.100.1", 8), Node("198.51.100.2", 8)]
    assert own_node([*others, Node("127.0.0.1", 8)]) == 2
    assert own_node([Node(f"{socket.gethostname()}.cluster.example", 8), *others]) == 0
    with pytest.raises(LaunchError, match=r"is none of 198.51.100.1, 198.51.100.2: say which with --node_rank"):
        own_node(others)
    with pytest.raises(LaunchError, match=r"127.0.0.1 and 127.0.0.2 are all this machine"):
        own_node([Node("127.0.0.1", 1), Node("127.0.0.2", 1)])


def test_loopback_and_foreign_addresses_name_no_interface():
    assert launch_world.interface_of("127.0.0.1") is None
    assert launch_world.interface_of("198.51.100.1") is None


def test_ascends_names_of_a_rank_become_torchs():
    nodes = nodes_of_table(str(DUAL))
    variables = {"RANK_ID": "11", "RANK_SIZE": "16", "DEVICE_ID": "3"}
    assert own_rank({}, nodes, 16, True) == {}
    assert own_rank(variables, nodes, 16, True) == {
        "RANK": "11",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "3",
        "LOCAL_WORLD_SIZE": "8",
        "GROUP_RANK": "1",
    }
    single = {"RANK_ID": "1", "RANK_SIZE": "4", "DEVICE_ID": "5"}
    assert own_rank(single, nodes_of_table(str(SINGLE)), 4, True)["LOCAL_RANK"] == "1"  # the second visible card
    assert own_rank(single, [Node("", 1)], None, False) == {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "5"}


def test_a_run_of_one_rank_takes_only_its_device_from_ascends_names(monkeypatch, capsys):
    for name, value in {"RANK_ID": "0", "RANK_SIZE": "1", "DEVICE_ID": "2"}.items():
        monkeypatch.setenv(name, value)
    launch_world.main([])
    assert "rank_variables=(LOCAL_RANK=2)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK_SIZE": "8"}, "RANK_SIZE=8, but the run has 16 ranks"),
        ({"RANK_SIZE": "8*12"}, "RANK_SIZE is '8*12'"),
        ({"DEVICE_ID": ""}, "DEVICE_ID is ''"),
        ({"RANK_ID": "16"}, "RANK_ID=16 must be below RANK_SIZE=16"),
        ({"RANK": "2"}, "RANK_ID=11, but RANK=2: unset one"),
        ({"LOCAL_RANK": "0"}, "DEVICE_ID=3, but LOCAL_RANK=0"),
        (
            {"DEVICE_ID": "4"},
            "RANK_ID=11 DEVICE_ID=4: correct them: in the rank table rank 11 is device 3 of 10.90.43.22",
        ),
    ],
)
def test_contradicting_rank_variables_are_an_error(changes, message):
    variables = {"RANK_ID": "11", "RANK_SIZE": "16", "DEVICE_ID": "3", **changes}
    with pytest.raises(LaunchError) as caught:
        own_rank(variables, nodes_of_table(str(DUAL)), 16, True)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "variables", "message"),
    [
        ([f"--rank_table_file={GOLDEN}/malformed/m02_rank_gap.json"], {}, "rank ids must be 0..7; missing 7"),
        (["--rank_table_file=gone.json"], {}, "gone.json: cannot be read"),
        ([f"--rank_table_file={DUAL}"], {}, "is none of 10.90.43.21, 10.90.43.22: say which with --node_rank"),
        ([f"--rank_table_file={DUAL}", "--node_rank=2"], {}, "--node_rank=2: must be below --nnodes=2"),
        ([f"--rank_table_file={DUAL}", "--nnodes=3"], {}, "--nnodes=3, but"),
        ([f"--rank_table_file={DUAL}", "--nproc=4"], {}, "--nproc=4, but"),
        ([f"--rank_table_file={SINGLE}", "--device_id=1"], {}, "the rank table says which devices"),
        ([f"--rank_table_file={SINGLE}", "--hostfile=x"], {}, "give only one of them"),
        (["--hostfile=gone"], {}, "--hostfile=gone: cannot be read"),
        ([], {"RANK_ID": "0", "RANK_SIZE": "8", "DEVICE_ID": "0"}, "needs --master_addr"),
        (["--nproc=2"], {"RANK_ID": "0", "RANK_SIZE": "1", "DEVICE_ID": "0"}, "RANK_SIZE=1, but the run has 2 ranks"),
    ],
)
def test_an_invalid_world_is_refused_before_anything_runs(project, flags, variables, message):
    code, output, errors = bash(project, "--device=cpu", *flags, **variables)
    assert code == 2 and errors.startswith("error: ") and message in errors and "ARGS" not in output
    assert not (project / "test" / "output").exists()


def test_a_dry_run_shows_the_command_of_every_node(project):
    flags = [f"--rank_table_file={DUAL}", "--device=npu", "--dry_run"]
    code, output, errors = bash(project, *flags, etp_running_flag="true")
    assert code == 0, errors
    lines = output.splitlines()
    assert lines[0::2] == ["# node 0, 10.90.43.21", "# node 1, 10.90.43.22"]
    for node, line in enumerate(lines[1::2]):
        assert f"env ASCEND_RT_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 RANK_TABLE_FILE={DUAL} python3 -m" in line.replace(
            "\\", ""
        )
        assert f"--nnodes 2 --node_rank {node} --master_addr 10.90.43.21" in line and "--nproc_per_node 8" in line
    _, output, _ = bash(project, f"--rank_table_file={SINGLE}", "--device=cpu", "--dry_run")
    assert "--nproc_per_node 4" in output and "RANK_TABLE_FILE" not in output and "VISIBLE_DEVICES" not in output


def test_servers_of_sixteen_cards_are_launched_when_they_are_said_to_be(project, tmp_path):
    addresses = {n: f"192.168.1.{n + 1}" for n in range(16)}
    path = rank_table.write(rank_table.generate("127.0.0.1", addresses, 16), tmp_path / "sixteen.json")
    flags = [f"--rank_table_file={path}", "--device=cpu", "--dry_run"]
    code, _, errors = bash(project, *flags)
    assert code == 2 and "max 8 per server); remove rows, or say --devices_per_server 16" in errors
    code, output, errors = bash(project, *flags, "--devices_per_server=16")
    assert code == 0 and "--nproc_per_node 16" in output, errors


def test_the_rank_table_of_the_environment_counts_on_an_npu_only(project):
    variables = {"RANK_TABLE_FILE": str(SINGLE), "etp_running_flag": "true"}
    script = project / "test" / "trial.sh"
    script.write_text(script.read_text().replace("RankSize=1", "RankSize=2"))
    _, output, _ = bash(project, "--device=npu", "--dry_run", **variables)
    assert "ASCEND_RT_VISIBLE_DEVICES=4\\,5\\,6\\,7" in output and "--nproc_per_node 4" in output
    _, output, _ = bash(project, "--device=cpu", "--dry_run", **variables)
    assert "--nproc_per_node 2" in output
    code, _, errors = bash(project, "--device=npu", f"--rank_table_file={DUAL}", **variables)
    assert code == 2 and "give one file" in errors
    code, _, errors = bash(project, "--device=npu", **variables, ASCEND_RT_VISIBLE_DEVICES="0,1")
    assert code == 2 and "the rank table has devices 4,5,6,7, but ASCEND_RT_VISIBLE_DEVICES=0,1" in errors


def test_ranks_that_the_user_starts_himself_meet(project):
    (project / "run.py").write_text(SUM_OF_RANKS)
    flags = ["--device=cpu", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    ranks = [start(project, *flags, RANK_ID=str(n), RANK_SIZE="2", DEVICE_ID=str(n)) for n in range(2)]
    for rank, process in enumerate(ranks):
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        log = (project / f"test/output/0/train_{rank}.log").read_text()
        assert f"TOTAL 3 rank {rank} local {rank}" in log


def test_two_nodes_meet_and_share_a_folder_of_logs(project):
    (project / "run.py").write_text(SUM_OF_RANKS)
    flags = ["--device=cpu", "--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    nodes = [start(project, *flags, f"--node_rank={node}") for node in range(2)]
    for rank, node in enumerate(nodes):
        _, errors = node.communicate()
        assert node.returncode == 0, errors
        assert f"TOTAL 3 rank {rank} local 0" in (project / f"test/output/0/train_{rank}.log").read_text()


@pytest.fixture
def two_servers():
    try:
        with servers(2) as made:
            yield made
    except NotPermitted as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("way", ["rank table", "flags"])
def test_two_servers_find_themselves_and_meet(project, two_servers, way):
    (project / "run.py").write_text(SUM_OF_RANKS)
    tables = [rank_table.generate(server.address, {0: f"192.168.{n}.1"}) for n, server in enumerate(two_servers)]
    table = rank_table.write(rank_table.merge(tables), project / "table.json")
    command = ["bash", "test/trial.sh", "--data_path=.", "--device=cpu"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = []
    for rank, server in enumerate(two_servers):
        flags = [f"--rank_table_file={table}"]
        if way == "flags":
            flags = ["--nnodes=2", f"--node_rank={rank}", f"--master_addr={two_servers[0].address}"]
        running.append(server.start([*command, *flags], cwd=project, env=environment(), **streams))
    for rank, (process, server) in enumerate(zip(running, two_servers, strict=True)):
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        expected = server.address if way == "rank table" else f"the way to {two_servers[0].address}"
        assert f"GLOO_SOCKET_IFNAME=eth0, the interface of {expected}" in output
        assert f"TOTAL 3 rank {rank} local 0" in (project / f"test/output/0/train_{rank}.log").read_text()
