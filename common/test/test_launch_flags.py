"""Flags: what does not go together is refused, a card that is named is that card, a run's meeting is its own."""

import json
from pathlib import Path

import pytest

from common import rank_table
from common.launch import commands
from common.launch.flags import Flags, check, parse, plan_of
from common.launch.world import LaunchError

NAMES = """data_path batch_size epochs max_steps device device_id nproc precision ckpt_path output_dir nnodes node_rank
  master_addr master_port rank_table_file devices_per_server hostfile cpu_bind max_restarts min_nodes
  collective_timeout deterministic dry_run help profile model_path resume subset""".split()
SETTINGS = {"network": "Trial", "case_kind": "acc", "output_dir": "/data/out/one"}


def flags_of(*words: str, folder: Path = Path("/nowhere")) -> Flags:
    return parse(words, dict.fromkeys(NAMES, ""), folder)


def plan(*words: str, ranks: int = 1, **environ: str) -> dict:
    flags = flags_of(*words)
    check(flags, environ, ["epochs"], "train_eval_1p.sh")
    return plan_of(flags, environ, ranks)


def command(made: dict, node: int = 0, **settings: str) -> commands.NodeCommand:
    return commands.node_command(made, node, ["python3", "run.py"], {**SETTINGS, **settings}, "python3")


@pytest.mark.parametrize(
    ("words", "environ", "message"),
    [
        (["--device_id=3", "--nproc=8"], {}, "--device_id=3 names one card, but this node has 8 ranks"),
        (["--device=npu", "--nproc=8"], {"ASCEND_DEVICE_ID": "3"}, "ASCEND_DEVICE_ID=3 names one card"),
        (["--device=npu"], {"ASCEND_DEVICE_ID": "three"}, "ASCEND_DEVICE_ID=three: must be a whole number"),
        (["--device_id=3"], {"RANK_ID": "0", "RANK_SIZE": "1", "DEVICE_ID": "2"}, "but DEVICE_ID=2"),
        (["--master_port=4000"], {}, "--master_port=4000 needs --nnodes"),
        (["--master_addr=host"], {}, "--master_addr=host needs --nnodes"),
        (["--node_rank=0"], {}, "--node_rank=0 needs --nnodes"),
        (["--master_port=70000", "--nnodes=2"], {}, "must be at most 65535"),
        (["--master_port=0", "--nnodes=2"], {}, "--master_port=0: must be at least 1"),
        (["--devices_per_server=16"], {}, "--devices_per_server=16 needs --rank_table_file"),
        (["--collective_timeout=60"], {}, "--collective_timeout=60 needs several ranks"),
        (["--max_restarts=0", "--min_nodes=1", "--nproc=2"], {}, "--min_nodes=1 needs --max_restarts"),
        (["--epochs=1"], {}, "--epochs does nothing in train_eval_1p.sh"),
        (["--dry_run=true"], {}, "--dry_run takes no value"),
        (["--nproc=1.5"], {}, "--nproc=1.5: must be a whole number"),
        (["--nproc=²"], {}, "--nproc=²: must be a whole number"),
        (["--nproc=99999999999999999999"], {}, "must be a whole number"),
    ],
)
def test_what_does_not_go_together_is_refused(words, environ, message):
    with pytest.raises(LaunchError) as caught:
        plan(*words, **environ)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("words", "environ", "variable"),
    [
        (["--device=npu", "--device_id=3"], {}, "ASCEND_RT_VISIBLE_DEVICES"),
        (["--device=npu"], {"ASCEND_DEVICE_ID": "3"}, "ASCEND_RT_VISIBLE_DEVICES"),
        (["--device=npu"], {"ASCEND_DEVICE_ID": "3", "ASCEND_RT_VISIBLE_DEVICES": "2,3"}, "ASCEND_RT_VISIBLE_DEVICES"),
        (["--device=cuda", "--device_id=3"], {}, "CUDA_VISIBLE_DEVICES"),
        (["--device=cuda"], {"ASCEND_DEVICE_ID": "3"}, "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_card_that_is_named_is_the_one_that_the_run_sees(monkeypatch, words, environ, variable):
    for name in ("ASCEND_RT_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert command(plan(*words, **environ)).variables == {variable: "3"}
    monkeypatch.setenv(variable, "0,1")
    with pytest.raises(LaunchError, match=f"3, but {variable}=0,1: set only one of them"):
        command(plan(*words, **environ))


def test_zero_and_a_cpu_leave_the_variable_as_the_name_of_a_folder(monkeypatch):
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "4,5")
    assert command(plan("--device=npu", ASCEND_DEVICE_ID="0")).variables == {}
    assert command(plan("--device=cpu", ASCEND_DEVICE_ID="3")).variables == {}
    assert command(plan("--device=cpu", "--nproc=2", ASCEND_DEVICE_ID="3")).variables == {}


def test_ranks_along_a_ring_get_their_own_cards(tmp_path):
    table = rank_table.generate("127.0.0.1", {n: f"192.168.1.{n}" for n in (1, 2, 4, 3)})
    path = rank_table.write(table, tmp_path / "ring.json")
    made = plan("--device=npu", f"--rank_table_file={path}")
    assert command(made).variables["ASCEND_RT_VISIBLE_DEVICES"] == "1,2,3,4"  # CANN takes ascending numbers only
    assert commands.card_indices(made) == [0, 1, 3, 2]


def test_the_meeting_is_the_runs_own(monkeypatch):
    words = ["--nnodes=2", "--master_addr=127.0.0.1", "--max_restarts=1"]

    def meeting(node: int, *more: str, **settings: str) -> str:
        line = command(plan(*words, f"--node_rank={node}", *more), node, **settings).words
        return line[line.index("--rdzv_id") + 1]

    one = meeting(0)
    assert one == meeting(1) == meeting(1, output_dir="/mnt/elsewhere/out/one")  # the same on every node
    others = {meeting(0, output_dir="/data/out/two"), meeting(0, "--master_port=4000"), meeting(0, network="Other")}
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    others.add(meeting(0))
    assert len(others | {one}) == 5


def test_only_paths_are_taken_from_where_the_user_stands(tmp_path):
    for name in ("valid", "8", "data", "gone"):
        (tmp_path / name).mkdir()
    found = flags_of("--subset=valid", "--nproc=8", "--data_path=data", "--model_path", "hub/name", folder=tmp_path)
    assert (found["subset"], found["nproc"], found["model_path"]) == ("valid", "8", "hub/name")
    assert found["data_path"] == str(tmp_path / "data")


def test_secrets_are_not_shown_and_a_tokenizer_is_none():
    words = ["--hub_token", "a", "--token=b", "--api-key=c", "db.password=d", "--tokenizer_name", "e", "--num_tokens=5"]
    shown = commands.redacted([*words, "https://me:pw@host/x", "--max_tokens", "6"])
    assert shown == ["--hub_token", "***", "--token=***", "--api-key=***", "db.password=***", "--tokenizer_name", "e",
                     "--num_tokens=5", "https://***@host/x", "--max_tokens", "6"]  # fmt: skip


def test_a_plan_is_json():
    assert json.loads(json.dumps(plan("--nproc=2"))) == plan("--nproc=2")


@pytest.mark.parametrize(
    ("addresses", "interface", "given", "expected"),
    [
        (["10.0.0.7"], "eth1", {}, {"HCCL_IF_IP": "10.0.0.7"}),  # of a rank table or host file
        (["node-7"], "eth1", {}, {"HCCL_SOCKET_IFNAME": "=eth1"}),
        ([""], "eth1", {}, {"HCCL_SOCKET_IFNAME": "=eth1"}),  # the way to --master_addr
        (["127.0.0.1"], "", {}, {}),
        ([""], "", {}, {}),
        (["10.0.0.7"], "eth1", {"HCCL_SOCKET_IFNAME": "bond"}, {}),
        (["10.0.0.7"], "eth1", {"HCCL_IF_IP": "10.0.0.8"}, {}),
    ],
)
def test_hccl_s_hosts_meet_where_the_rank_table_says(monkeypatch, capsys, addresses, interface, given, expected):
    for name in ("HCCL_IF_IP", "HCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    made = plan("--device=npu", "--nproc=2") | {"node_addresses": addresses, "node_interface": interface}
    found = commands.common_environment(made, 4)
    assert {name: value for name, value in found.items() if name.startswith("HCCL_")} == expected
    assert all(f"{name}={value}" in capsys.readouterr().out for name, value in expected.items())
    assert not any(name.startswith("HCCL") for name in commands.common_environment(made | {"npu_is_meant": False}, 4))
