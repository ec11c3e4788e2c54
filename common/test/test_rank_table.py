"""Rank tables: goldens of the reference tools, every malformed table, and the command lines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import rank_table
from common.rank_table import (
    RankTableError,
    check,
    merge,
    merge_hccl,
    read,
    torchrun_lines,
    world,
)
from common.rank_table.validation import warnings

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden" / "ranktable"
WORLDS = json.loads((GOLDEN / "valid/expected_world.json").read_text())
MALFORMED = json.loads((GOLDEN / "malformed/expected.json").read_text())


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    words = [sys.executable, *map(str, command)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)


def problems_of(path: Path) -> list[str]:
    try:
        return check(read(path))
    except RankTableError as error:
        return error.problems


def server_table(number: int, devices: int = 8, **changes: object) -> dict:
    """The table of the server 10.0.0.`number`, some top-level keys changed."""
    addresses = {n: f"192.168.{number}.{n + 1}" for n in range(devices)}
    return {**rank_table.generate(f"10.0.0.{number}", addresses), **changes}


@pytest.mark.parametrize("name", WORLDS)
def test_world_of_a_valid_table(name):
    table = read(GOLDEN / "valid" / name)
    plan = world(table)
    assert plan == {key: WORLDS[name][key] for key in plan}
    assert bool(check(table)) == ("must_warn_or_fail" in WORLDS[name])
    assert warnings(table) == []


def test_a_device_address_used_twice_is_a_problem_that_names_both_ranks():
    found = check(read(GOLDEN / "valid/readme_dual_16p_duplicate_device_ip.json"))
    assert len(found) == 4
    assert "duplicate device_ip 192.168.0.1" in found[0] and "(rank 4)" in found[0] and "(rank 8)" in found[0]


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "m01_duplicate_rank_id": ["duplicate rank_id 4", "device[4]", "device[5]", "missing rank_id 5"],
        "m02_rank_gap": ["rank ids must be 0..7; missing 7, unexpected 8"],
        "m03_duplicate_device_id_same_server": ["server 10.90.43.21: duplicate device_id 2"],
        "m04_missing_device_ip": ["server_list[0].device[2]: missing device_ip (only legal for a 1-device table)"],
        "m05_missing_rank_id": ["server_list[0].device[2]: missing rank_id"],
        "m06_server_count_mismatch": ["server_count is 1 but server_list has 2 entries"],
        "m07_bad_json_truncated": ["not valid JSON (line 46, column 30)"],
        "m08_status_initializing": ["status is 'initializing', expected 'completed' (table not ready)"],
        "m09_bad_device_ip": ["device_ip '192.168.300.1' is not an IP address"],
        "m10_more_than_8_devices": ["9 devices on one server", "device_id 8 outside 0..7", "--devices_per_server 16"],
        "m11_empty_file": ["file is empty"],
        "m12_empty_server_list": ["server_list is empty"],
        "m14_duplicate_server_id": ["duplicate server_id 10.90.43.21", "merge without --server_ip"],
        "m15_top_level_list": ["top level must be a JSON object, got list"],
        "m18_missing_status": ["missing status"],
        "m23_placeholder_server_id": ["server_id 'xx.xx.xx.xx' is a documentation placeholder"],
    }.items(),
)
def test_a_malformed_table_is_rejected_with_file_place_and_value(name, words):
    found = problems_of(GOLDEN / "malformed" / f"{name}.json")
    assert found and all(problem.startswith(str(GOLDEN)) for problem in found)
    for word in words:
        assert any(word in problem for problem in found), (word, found)


def test_every_malformed_golden_has_its_verdict():
    for name, expected in MALFORMED.items():
        rejected = bool(problems_of(GOLDEN / "malformed" / name))
        assert rejected == (expected["expect"] != "warn"), name
    unequal = read(GOLDEN / "malformed/m21_unequal_devices_per_server.json")
    assert "8 vs 4 devices per server" in warnings(unequal)[0]
    assert world(unequal)["nproc_per_node"] == {"10.90.43.21": 8, "10.90.43.22": 4}


def test_all_problems_are_found_at_once():
    table = server_table(1, status="initializing", server_count="3")
    table["server_list"][0]["device"][0] = {"device_id": "1", "device_ip": "nowhere", "rank_id": "1"}
    found = "\n".join(check(table))
    for word in ("status is", "server_count is 3", "duplicate device_id 1", "duplicate rank_id 1", "'nowhere'"):
        assert word in found


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: t["server_list"][0].update(server_id="127.0.1.1"), "127.0.1.1 is a loopback address"),
        (lambda t: t["server_list"][0].update(server_id="10.0.0.300"), "neither an IP address nor a host name"),
        (lambda t: t["server_list"][0].update(host_nic_ip="eth0"), "host_nic_ip 'eth0'"),
        (lambda t: t.update(version="2.0"), "version '2.0' is unknown"),
        (lambda t: swap_ranks(t, 7, 8), "the ranks of servers are interleaved"),
        (lambda t: t["server_list"][1].update(device=[]), "server_list[1].device is empty"),
        (lambda t: t["server_list"].append("server"), "server_list[2] must be a JSON object, got str"),
        (lambda t: t["server_list"][1]["device"][3].update(rank_id=True), "rank_id True is not a number"),
        (lambda t: t["server_list"][1]["device"][3].update(rank_id="-1"), "rank_id '-1' is not a number"),
    ],
)
def test_a_fault_of_two_servers_is_found(change, word):
    table = merge([server_table(1), server_table(2)])
    change(table)
    assert any(word in problem for problem in check(table)), check(table)
    with pytest.raises(RankTableError):
        world(table)


def test_what_hccl_and_mindcluster_publish_is_read_as_they_mean_it():
    """The layouts of HCCL's guide (a name beside host_ip) and of MindCluster's hccl.json (server_ip, container_ip)."""
    table = merge([server_table(1, 2), server_table(2, 2)])
    for number, server in enumerate(table["server_list"]):
        server.update(server_id=f"node {number}", host_ip=f"172.16.0.{100 + number}")
    assert check(table) == [] and world(table)["master_addr"] == "172.16.0.100"
    assert world(table)["nproc_per_node"] == {"node 0": 2, "node 1": 2}
    table["server_list"][0]["container_ip"] = "192.168.60.11"  # the pod, where the processes are
    assert world(table)["master_addr"] == "192.168.60.11"
    table["server_list"][0].update(server_id="10.174.216.1", server_ip="192.168.60.12")
    assert world(table)["master_addr"] == "192.168.60.12"
    table["server_list"][1]["host_ip"] = "192.168.60.12"
    assert any("duplicate address 192.168.60.12" in problem for problem in check(table))
    table["server_list"][1]["host_ip"] = "172.16.0.300"
    assert any("host_ip '172.16.0.300' is not an IP address" in problem for problem in check(table))


def test_ranks_may_follow_a_ring_and_one_server_may_have_no_device_addresses():
    table = server_table(1)
    table["server_list"][0]["device"][2:4] = table["server_list"][0]["device"][3:1:-1]
    renumber(table)
    assert check(table) == [] and "0, 1, 3, 2, 4" in warnings(table)[0]
    assert [row["device_id"] for row in world(table)["ranks"]][:4] == [0, 1, 3, 2]
    assert "ASCEND_RT_VISIBLE_DEVICES=0,1,2,3,4" in torchrun_lines(world(table))["10.0.0.1"]
    for device in table["server_list"][0]["device"]:
        del device["device_ip"]
    assert check(table) == []
    other = {
        **server_table(2),
        "server_list": [{"server_id": "10.0.0.2", "device": [{"device_id": "0", "rank_id": "0"}]}],
    }
    with pytest.raises(RankTableError, match="missing device_ip .* between servers each device needs one"):
        merge([table, other])


def renumber(table: dict) -> None:
    devices = [device for server in table["server_list"] for device in server["device"]]
    for rank, device in enumerate(devices):
        device["rank_id"] = str(rank)


def swap_ranks(table: dict, one: int, other: int) -> None:
    devices = [device for server in table["server_list"] for device in server["device"]]
    devices[one]["rank_id"], devices[other]["rank_id"] = devices[other]["rank_id"], devices[one]["rank_id"]


def test_super_pods_are_checked():
    table = read(GOLDEN / "valid/v1_2_superpod_16p.json")
    table["super_pod_list"][0]["server_list"].pop()
    del table["server_list"][0]["device"][3]["super_device_id"]
    table["server_list"][0]["device"][0]["super_device_id"] = "1"
    found = "\n".join(check(table))
    assert "server 10.90.43.22 is in no super pod" in found
    assert "server_list[0].device[3]: missing super_device_id" in found
    assert "duplicate super_device_id 1" in found


def test_modelarts_pods_are_ordered_by_number():
    table = read(GOLDEN / "valid/modelarts_jobstart_hccl_8p.json")
    pods = []
    for number in (10, 2):
        addresses = [{"device_id": str(n), "device_ip": f"192.168.{number}.{n}"} for n in range(1, 3)]
        pods.append({"pod_name": f"worker-{number}", "server_id": f"10.0.0.{number}", "devices": addresses})
    table["group_list"][0].update(instance_list=pods, instance_count="2", device_count="4")
    assert check(table) == []
    assert world(table)["node_rank"] == {"10.0.0.2": 0, "10.0.0.10": 1}
    table["group_list"][0]["device_count"] = "8"
    assert "device_count is '8' but 4 devices are listed" in check(table)[0]
    table["group_list"][0]["device_count"] = "4"
    assert [s["server_id"] for s in merge([table])["server_list"]] == ["10.0.0.2", "10.0.0.10"]


def test_a_symlinked_file_is_a_problem(tmp_path):
    link = tmp_path / "table.json"
    link.symlink_to(GOLDEN / "valid/single_8p.json")
    found = check(read(link))
    assert len(found) == 1 and "symbolic link" in found[0] and str(link) in found[0]


@pytest.mark.parametrize("content", [b"\xff\xfe{", b"[" * 100_000, b"1" * 10_000, b'{"a":' * 20_000, b"nul"])
def test_a_file_that_is_no_json_is_a_rank_table_error(tmp_path, content):
    (tmp_path / "table.json").write_bytes(content)
    with pytest.raises(RankTableError, match="table.json"):
        read(tmp_path / "table.json")
    with pytest.raises(RankTableError, match="cannot be read"):
        read(tmp_path / "absent.json")


def test_torchrun_lines():
    lines = torchrun_lines(world(read(GOLDEN / "malformed/m21_unequal_devices_per_server.json")), master_port=1234)
    assert lines["10.90.43.22"] == (
        "ASCEND_RT_VISIBLE_DEVICES=0,1,2,3 torchrun --nnodes=2 --node_rank=1 --nproc_per_node=4 "
        "--master_addr=10.90.43.21 --master_port=1234"
    )


# What merge_hccl.py gives for the reference's cases; the others differ from the reference on purpose.
SAME_AS_REFERENCE = ["single", "two_8p", "two_8p_reversed_argv", "already_merged_plus_one", "unequal_8_plus_4"]


def merge_golden(name: str, cwd: Path, *options: str) -> tuple[subprocess.CompletedProcess, str]:
    case = GOLDEN / "merge" / name
    expected = json.loads((case / "result.json").read_text())
    for path in case.glob("*.json"):
        if path.name in expected["argv"]:
            (cwd / path.name).write_bytes(path.read_bytes())
    return run(ROOT / "common/merge_hccl.py", *expected["argv"], *options, cwd=cwd), expected["outputs"][0]


@pytest.mark.parametrize("name", SAME_AS_REFERENCE)
def test_merge_hccl_equals_the_reference(name, tmp_path):
    done, output = merge_golden(name, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / output).read_text()) == json.loads(
        (GOLDEN / "merge" / name / f"OUT_{output}").read_text()
    )
    assert f"Completed: hccl file was save in : {tmp_path / output}" in done.stdout
    assert check(read(tmp_path / output)) == []


def own_addresses(table: dict) -> dict:
    """The golden's 12 servers share their devices' addresses, which HCCL refuses: here each device has its own."""
    for server in table["server_list"]:
        for device in server["device"]:
            device["device_ip"] = f"192.168.{server['server_id'].split('.')[-1]}.{int(device['device_id']) + 1}"
    return table


def test_merge_orders_a_shell_listing_by_number(tmp_path):
    done, output = merge_golden("lexicographic_glob_12_servers", tmp_path)
    assert done.returncode == 1 and not (tmp_path / output).exists()  # launch would refuse it
    assert "duplicate device_ip 192.1.27.6" in done.stderr and len(done.stderr.splitlines()) == 8
    for path in tmp_path.glob("*.json"):
        path.write_text(json.dumps(own_addresses(json.loads(path.read_text()))))
    names = sorted(path.name for path in tmp_path.glob("*.json"))
    done = run(ROOT / "common/merge_hccl.py", *names, cwd=tmp_path)
    assert "hosts by number: 10.0.0.1, 10.0.0.2, 10.0.0.3" in done.stdout
    merged = read(tmp_path / output)
    assert [s["server_id"] for s in merged["server_list"]] == [f"10.0.0.{n}" for n in range(1, 13)]
    run(ROOT / "common/merge_hccl.py", *names, "--order", "arguments", cwd=tmp_path)
    reference = GOLDEN / "merge/lexicographic_glob_12_servers" / f"OUT_{output}"
    assert json.loads((tmp_path / output).read_text()) == own_addresses(json.loads(reference.read_text()))
    assert (tmp_path / f"{output}.old").exists()  # the other order, kept aside


def test_text_order_is_recognised_in_more_than_one_locale():
    names = ["hccl_8p_10.0.0.1.json", "hccl_8p_10.0.0.10.json", "hccl_8p_10.0.0.2.json"]
    assert merge_hccl.in_text_order(names)
    assert merge_hccl.in_text_order(sorted(names, key=lambda n: n.replace(".", "").replace("_", "")))
    assert not merge_hccl.in_text_order(names[::-1])


def test_merge_is_the_same_for_every_order_of_its_tables():
    tables = [server_table(n, devices=2) for n in (9, 10, 100, 1)]
    merged = merge(tables)
    assert [s["server_id"] for s in merged["server_list"]] == [f"10.0.0.{n}" for n in (1, 9, 10, 100)]
    assert merge(tables[::-1]) == merged
    assert [s["server_id"] for s in merge(tables, keep_order=True)["server_list"]][0] == "10.0.0.9"


def test_merge_keeps_the_rank_order_inside_a_server(tmp_path):
    done, output = merge_golden("device_order_shuffled_input", tmp_path)
    assert done.returncode == 0
    rows = world(read(tmp_path / output))["ranks"]
    assert [row["device_id"] for row in rows] == [*range(8), *range(8)]  # the reference would turn the first 8 round


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("same_file_twice", ["duplicate server_id 10.90.43.21 in server_list[0], server_list[1]"]),
        ("version_1_2_input", ["a.json", "missing super_pod_list", "missing super_device_id"]),
    ],
)
def test_merge_refuses_what_the_reference_lets_through(name, words, tmp_path):
    done, output = merge_golden(name, tmp_path)
    assert done.returncode == 1 and not (tmp_path / output).exists()
    assert all(word in done.stderr for word in words) and "Traceback" not in done.stderr


def test_merge_refuses_what_is_doubtful_when_strict(tmp_path):
    for number, devices in ((1, 8), (2, 4)):
        rank_table.write(server_table(number, devices), tmp_path / f"{number}.json")
    command = [ROOT / "common/merge_hccl.py", "1.json", "2.json"]
    done = run(*command, "--strict", cwd=tmp_path)
    assert done.returncode == 1 and "8 vs 4 devices per server" in done.stderr
    assert not (tmp_path / "hccl_2s_12p.json").exists()
    assert run(*command, cwd=tmp_path).returncode == 0 and (tmp_path / "hccl_2s_12p.json").exists()


def test_merge_never_includes_its_own_earlier_output(tmp_path):
    for number in (1, 2):
        rank_table.write(server_table(number), tmp_path / f"hccl_8p_01234567_10.0.0.{number}.json")
    names = sorted(path.name for path in tmp_path.glob("hccl*.json"))
    assert run(ROOT / "common/merge_hccl.py", *names, cwd=tmp_path).returncode == 0
    first = (tmp_path / "hccl_2s_16p.json").read_bytes()
    names = sorted(path.name for path in tmp_path.glob("hccl*.json"))
    assert "hccl_2s_16p.json" in names
    done = run(ROOT / "common/merge_hccl.py", *names, cwd=tmp_path)
    assert done.returncode == 0 and "left out hccl_2s_16p.json" in done.stdout
    assert (tmp_path / "hccl_2s_16p.json").read_bytes() == first


def test_merge_keeps_super_pods_and_refuses_mixed_versions():
    whole = read(GOLDEN / "valid/v1_2_superpod_16p.json")
    halves = []
    for index in range(2):
        half = json.loads(json.dumps(whole))
        half["server_list"] = [half["server_list"][index]]
        half["super_pod_list"][0]["server_list"] = [half["super_pod_list"][0]["server_list"][index]]
        half["server_count"] = "1"
        renumber(half)
        halves.append(half)
    assert merge(halves) == whole
    with pytest.raises(RankTableError, match="versions 1.0, 1.2 cannot be merged"):
        merge([halves[0], server_table(5)])


def test_the_command_line_checks_and_shows(tmp_path):
    good, bad = GOLDEN / "valid/dual_16p.json", GOLDEN / "malformed/m08_status_initializing.json"
    done = run("-m", "common.rank_table", "check", good, cwd=tmp_path)
    assert done.returncode == 0 and "good, 2 servers, 16 ranks" in done.stdout
    done = run("-m", "common.rank_table", "check", good, bad, tmp_path / "absent.json", cwd=tmp_path)
    assert done.returncode == 1 and "status is 'initializing'" in done.stderr and "absent.json" in done.stderr
    done = run("-m", "common.rank_table", "show", good, "--master_port", "1234", cwd=tmp_path)
    assert done.returncode == 0
    assert "10.90.43.22: ASCEND_RT_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 torchrun --nnodes=2 --node_rank=1" in done.stdout
    done = run("-m", "common.rank_table", "show", bad, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    sources = [GOLDEN / "merge/two_8p" / f"hccl_8p_01234567_10.90.43.{n}.json" for n in (22, 21)]
    done = run("-m", "common.rank_table", "merge", *sources, "-o", "all.json", cwd=tmp_path)
    assert done.returncode == 0 and world(read(tmp_path / "all.json"))["master_addr"] == "10.90.43.21"


def test_nothing_imports_torch():
    code = "import sys, common.rank_table, common.hccl_tools, common.merge_hccl; sys.exit('torch' in sys.modules)"
    assert run("-c", code, cwd=ROOT).returncode == 0
