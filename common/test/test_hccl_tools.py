"""hccl_tools.py: the reference's cases, addresses from hccn_tool and hccn.conf."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.rank_table import RankTableError, check, device_addresses, hccl_tools, read, world
from common.rank_table import __main__ as rank_table_commands

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden" / "ranktable"
HCCL_CASES = json.loads((GOLDEN / "hccl_tools/cases.json").read_text())


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    words = [sys.executable, *map(str, command)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture
def hccn_tool(tmp_path) -> str:
    """PATH on which the reference goldens' stub is the hccn_tool."""
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin/hccn_tool"
    tool.write_bytes((GOLDEN / "hccl_tools/hccn_tool_stub.sh").read_bytes())
    tool.chmod(0o755)
    return f"{tool.parent}:{os.environ['PATH']}"


# Where the reference ends with a traceback or writes a wrong table: what ours says, or the table it writes instead.
HCCL_DIFFERENT = {
    "cross_group_3_6": "must be in the same group",
    "reversed": "must be less than",
    "empty_range_2_2": "must be less than",
    "space_in_range": "hccl_8p_01234567_10.90.43.21.json",
    "out_of_range_9": "must be in the range [0,8)",
    "two_digit_0_16": "must be in the range [0,8)",
    "visible_4567_0_4": "hccl_4p_4567_10.90.43.21.json",
    "visible_short": "asks for device 3 but --visible_devices 0,1 has 2 devices",
    "visible_4_logical_4_8": "asks for device 7 but --visible_devices 0,1,2,3 has 4 devices",
    "hccn_fails_no_conf": "no address of device 0, 1, 2, 3, 4, 5, 6, 7",
    "hccn_missing_dev5": "no address of device 5",
    "bad_server_ip_unvalidated": "server_id 'not an ip' is neither an IP address nor a host name",
    "garbage_range": "'abc' is not a range",
    "short_garbage": "'8' is not a range",
    "r12_space": "hccl_8p_01234567_10.90.43.21.json",
}


@pytest.mark.parametrize("case", HCCL_CASES, ids=[case["name"] for case in HCCL_CASES])
def test_hccl_tools_equals_the_reference_where_that_is_sane(case, hccn_tool, tmp_path):
    if case["env"] and Path("/etc/hccn.conf").exists():
        pytest.skip("this machine has an /etc/hccn.conf")
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    done = run(ROOT / "common/hccl_tools.py", *case["args"], cwd=cwd, PATH=hccn_tool, **case["env"])
    written = {path.name: json.loads(path.read_text()) for path in cwd.iterdir()}
    different = HCCL_DIFFERENT.get(case["name"])
    if different is None:
        assert done.returncode == 0 and written == case["files"]
        assert done.stdout.replace(str(cwd), "<cwd>").splitlines() == case["stdout"]
    elif different.endswith(".json"):
        assert done.returncode == 0 and list(written) == [different]
        assert check(written[different]) == []
    else:
        assert done.returncode == 1 and different in done.stderr and not written
        assert len(done.stderr.splitlines()) == 1


def test_visible_devices_take_the_addresses_of_the_real_devices(hccn_tool, tmp_path):
    arguments = ["--device_num", "[0,4)", "--visible_devices", "4,5,6,7", "--server_ip", "10.90.43.21"]
    run(ROOT / "common/hccl_tools.py", *arguments, cwd=tmp_path, PATH=hccn_tool)
    written = json.loads((tmp_path / "hccl_4p_4567_10.90.43.21.json").read_text())
    assert written == json.loads((GOLDEN / "valid/single_4p_4567.json").read_text())
    with pytest.raises(RankTableError, match="names a device twice"):
        hccl_tools.visible_devices([0, 1], "4,4")


def test_explicit_and_ipv6_addresses(tmp_path, capsys):
    out = tmp_path / "table.json"
    arguments = [
        "generate",
        str(out),
        "--device_num",
        "[0,2)",
        "--server_ip",
        "fd00::1",
        "--device_ip",
        "fd01::1,fd01::2",
    ]
    rank_table_commands.main(arguments)
    assert check(read(out)) == []
    assert world(read(out))["master_addr"] == "fd00::1"
    capsys.readouterr()
    with pytest.raises(SystemExit, match="1 addresses for 2 devices"):
        rank_table_commands.main([*arguments[:-1], "fd01::1"])
    with pytest.raises(SystemExit, match="duplicate device_ip fd01::1"):
        rank_table_commands.main([*arguments[:-1], "fd01::1,fd01:0::1"])


def test_hccn_conf_fills_in_and_a_contradiction_is_reported(tmp_path):
    tool = tmp_path / "tool.sh"
    tool.write_text('#!/bin/bash\n[ "$2" == 0 ] && echo "ipaddr:fd01::5" || exit 1\n')
    tool.chmod(0o755)
    conf = tmp_path / "hccn.conf"
    conf.write_text("address_0=fd01::6\nnetmask_0=255.255.255.0\naddress_1=192.168.0.2\n")
    said: list[str] = []
    found = device_addresses.device_addresses([0, 1], tool=str(tool), conf=conf, report=said.append)
    assert found == {0: "fd01::5", 1: "192.168.0.2"}
    assert "gave no address of device 1" in said[0]
    assert "fd01::5" in said[1] and "fd01::6" in said[1]


def test_own_address_prefers_a_reachable_one(monkeypatch):
    monkeypatch.setattr("socket.gethostbyname", lambda _: "127.0.1.1")
    monkeypatch.setattr(device_addresses, "_default_route_address", lambda: "10.1.2.3")
    said: list[str] = []
    assert device_addresses.own_address(said.append) == "10.1.2.3"
    assert "127.0.1.1" in said[0] and "--server_ip" in said[0]
