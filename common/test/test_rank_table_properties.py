"""Rank tables of any shape: what is generated is clean, any single fault is found, nothing ends in a traceback."""

import copy
import ipaddress
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.rank_table import RankTableError, check, generate, merge, read, torchrun_lines, world
from common.rank_table.servers import natural_key
from common.rank_table.validation import warnings

GOLDEN = Path(__file__).parent / "golden" / "ranktable" / "valid"
FUZZED_TABLES = 10_000


@st.composite
def servers(draw: st.DrawFn) -> list[dict]:
    """The tables of one to twelve different servers with one to eight devices each, every address its own."""
    hosts = draw(st.lists(st.integers(1, 2**24 - 2), min_size=1, max_size=12, unique=True))
    version_6 = draw(st.booleans())
    tables = []
    for index, host in enumerate(hosts):
        device_ids = sorted(draw(st.sets(st.integers(0, 7), min_size=1)))
        name = ipaddress.ip_address((0xFD00 << 112 if version_6 else 10 << 24) + host)
        tables.append(generate(str(name), {n: f"192.168.{index}.{n + 1}" for n in device_ids}))
    return tables


@settings(deadline=None, max_examples=80, derandomize=True)
@given(servers(), st.randoms(use_true_random=False))
def test_generate_merge_check_is_clean_and_gives_a_world(tables, shuffler):
    merged = merge(tables)
    assert check(merged) == []
    plan = world(merged)
    assert plan["world_size"] == sum(plan["nproc_per_node"].values()) == len(plan["ranks"])
    assert [row["rank"] for row in plan["ranks"]] == list(range(plan["world_size"]))
    names = list(plan["node_rank"])
    assert ":" in names[0] or names == sorted(names, key=natural_key)
    assert len(torchrun_lines(plan)) == plan["nnodes"] == len(tables)
    shuffler.shuffle(tables)
    assert merge(tables) == merged
    assert merge([merged]) == merged


def a_device(table: dict, rng: random.Random) -> dict:
    return rng.choice(rng.choice(table["server_list"])["device"])


def another_device(table: dict, not_this: dict, rng: random.Random) -> dict | None:
    others = [d for server in table["server_list"] for d in server["device"] if d is not not_this]
    return rng.choice(others) if others else None


def copy_between_devices(key: str):
    def fault(table: dict, rng: random.Random) -> None:
        device = a_device(table, rng)
        other = another_device(table, device, rng)
        device[key] = other[key] if other else "garbage"

    return fault


def drop(*keys: str):
    def fault(table: dict, rng: random.Random) -> None:
        key = rng.choice(keys)
        rows = {"top": [table], "server": table["server_list"], "device": [a_device(table, rng)]}
        for candidates in rows.values():
            row = rng.choice(candidates)
            if key in row:
                del row[key]
                return

    return fault


def set_device(key: str, *values: object):
    return lambda table, rng: a_device(table, rng).update({key: rng.choice(values)})


def set_server(key: str, *values: object):
    return lambda table, rng: rng.choice(table["server_list"]).update({key: rng.choice(values)})


def repeat_device(table: dict, rng: random.Random) -> None:
    devices = rng.choice(table["server_list"])["device"]
    devices.append(copy.deepcopy(rng.choice(devices)))


FAULTS = {
    "equal_rank": copy_between_devices("rank_id"),
    "equal_device_ip": copy_between_devices("device_ip"),
    "wrong_rank": set_device("rank_id", "-1", "1.5", "", None, True, [], 10_000, "10000", "x"),
    "wrong_device": set_device("device_id", "-1", "8", 16, "", None, {}, "two"),
    "wrong_device_ip": set_device("device_ip", "192.168.300.1", "xx.xx.xx.xx", "nowhere", 7, "0.0.0.0", "10.0.0"),
    "wrong_server": set_server("server_id", "10.0.0.300", "xx.xx.xx.xx", "", None, 5, "not an ip", "a/b"),
    "wrong_nic": set_server("host_nic_ip", "eth0", "10.0.0.300", 5),
    "no_devices": set_server("device", [], None, {}, "0,1"),
    "dropped_key": drop("version", "status", "server_count", "server_list", "server_id", "device_id", "rank_id"),
    "not_ready": lambda table, rng: table.update(status=rng.choice(["initializing", "", None, "COMPLETED", 1])),
    "wrong_version": lambda table, rng: table.update(version=rng.choice(["2.0", "", None, [], "1"])),
    "wrong_count": lambda table, rng: table.update(server_count=rng.choice(["0", "99", -1, "", None, 1.5])),
    "repeated_device": repeat_device,
    "repeated_server": lambda table, rng: table["server_list"].append(copy.deepcopy(table["server_list"][0])),
    "lost_server": lambda table, rng: table["server_list"].pop(rng.randrange(len(table["server_list"]))),
    "lost_first_device": lambda table, rng: table["server_list"][0]["device"].pop(0),
    "server_is_text": lambda table, rng: table["server_list"].append(table["server_list"][0]["server_id"]),
}


@pytest.mark.parametrize("name", FAULTS)
@settings(deadline=None, max_examples=40, derandomize=True)
@given(tables=servers(), seed=st.integers(0, 2**32))
def test_any_single_fault_is_found(name, tables, seed):
    table = merge(tables)
    FAULTS[name](table, random.Random(seed))
    found = check(table)
    assert found, f"{name} went unnoticed"
    assert all(isinstance(problem, str) and ";" in problem for problem in found)


ODD_VALUES = [
    *(None, True, False, 0, -1, 8, 10**30, 1.5, float("nan"), float("inf"), "", "0", "7", "８", "²", "\ud800", "\0"),
    *("1.0", "1.2", "completed", "10.0.0.1", "::1", "fe80::1%eth0", "9" * 5000, "a" * 5000, "xx.xx", "127.0.0.1"),
    *([], {}, [[]], [{}], [None], {"device": 1}, {"a": {"b": []}}, [[[[[[[[[[]]]]]]]]]]),
]


def mutate(node: object, rng: random.Random) -> None:
    """One random change somewhere below `node`: another value, a lost, doubled, moved or renamed entry."""
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(node[key], (dict, list)) and rng.random() < 0.75:
            node = node[key]
            continue
        break
    action = rng.randrange(5)
    if action == 0:
        node[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    elif action == 1:
        del node[key]
    elif action == 2 and isinstance(node, list):
        node.append(copy.deepcopy(node[key]))
    elif action == 3:
        node[rng.choice(keys)] = copy.deepcopy(node[key])
    elif isinstance(node, dict):
        node[rng.choice(["device", "devices", "group_list", "server_list", "x"])] = node.pop(key)


def test_ten_thousand_mutated_tables_never_give_a_traceback(tmp_path):
    rng = random.Random(0)
    sources = [path.read_text() for path in sorted(GOLDEN.glob("*.json")) if "expected" not in path.name]
    other = read(GOLDEN / "single_8p.json")
    good = bad = 0
    for number in range(FUZZED_TABLES):
        table = json.loads(rng.choice(sources))
        for _ in range(rng.randint(1, 4)):
            mutate(table, rng)
        uses = [world]
        if number % 5 == 0:  # through a file and into a merge too
            uses += [lambda t: merge([t]), lambda t: merge([t, other])]
            (tmp_path / "table.json").write_text(json.dumps(table))
            table = read(tmp_path / "table.json")
        problems = check(table)
        "\n".join(problems + warnings(table)).encode()  # printable
        for use in uses:
            try:
                use(table)
                good += 1
            except RankTableError as error:
                bad += 1
                "\n".join(error.problems).encode()
    assert good > 100 and bad > FUZZED_TABLES / 2  # both kinds were met


def test_damaged_files_never_give_a_traceback(tmp_path):
    rng = random.Random(1)
    content = (GOLDEN / "dual_16p.json").read_bytes()
    refused = 0
    for _ in range(500):
        damaged = bytearray(content[: rng.choice([len(content), rng.randrange(1, len(content))])])
        for _ in range(rng.randint(0, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / "table.json").write_bytes(damaged)
        try:
            problems = check(read(tmp_path / "table.json"))
        except RankTableError as error:
            problems = error.problems
        refused += bool(problems)
        assert all("table.json" in problem for problem in problems)
    assert 250 < refused <= 500
