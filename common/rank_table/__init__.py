"""RANK_TABLE_FILE: read, check, merge and generate Ascend rank tables, and turn one into a torchrun world.

    python -m common.rank_table check FILE...            every problem, exit status 1 when there is one
    python -m common.rank_table show FILE                nodes, ranks and the torchrun line of each node
    python -m common.rank_table merge FILE... [-o OUT]   one table of many, hosts ordered by number
    python -m common.rank_table generate [OUT] --device_num "[0,8)" [--server_ip=... --device_ip=...]

Pure Python, no torch. Layouts: servers.py; checks: validation.py. A table is the parsed JSON, a dict; `read` also notes
the path, so that messages can name the file. The table names devices for HCCL; rendezvous still goes by MASTER_ADDR.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from common.rank_table.servers import Device, Server, ip_address, natural_key, parse_servers
from common.rank_table.validation import RankTableError, check, launch_problems

MASTER_PORT = 29500


class RankTable(dict[str, Any]):
    """The JSON object of a rank table that knows the file it came from."""

    path: Path | None = None


def read(path: str | os.PathLike[str]) -> RankTable:
    """The rank table in the file `path`, not yet checked.

    Raises RankTableError when there is no such file or it holds no JSON object.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RankTableError([f"{path}: cannot be read: {error}"]) from None
    if not text.strip():
        raise RankTableError([f"{path}: file is empty; generate the table anew"])
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise RankTableError([f"{path}: not valid JSON ({where}): {error.msg}; generate the table anew"]) from None
    except (RecursionError, ValueError) as error:  # brackets nested too deep, a number of thousands of digits
        raise RankTableError([f"{path}: not valid JSON: {error}; generate the table anew"]) from None
    if not isinstance(content, dict):
        raise RankTableError([f"{path}: {problem}" for problem in launch_problems(content)])
    table = RankTable(content)
    table.path = path
    return table


def world(table: dict[str, Any], devices_per_server: int | None = None) -> dict[str, Any]:
    """The torchrun world of `table`: nodes in order of their first rank, local ranks in order of rank.

    Returns a dict with world_size, nnodes, master_addr (the address of rank 0's server), node_rank and nproc_per_node
    (by server_id) and ranks, a list of {rank, server_id, node_rank, local_rank, device_id, device_ip} in order of rank.
    Raises RankTableError when no world can be made of the table (device addresses used twice are left to `check`).
    """
    if problems := launch_problems(table, devices_per_server):
        raise RankTableError(problems)
    servers = _in_rank_order(parse_servers(table, lambda *_: None))
    ranks = []
    for node_rank, server in enumerate(servers):
        for local_rank, device in enumerate(server.devices):
            ranks.append(
                {
                    "rank": device.rank_id,
                    "server_id": server.server_id,
                    "node_rank": node_rank,
                    "local_rank": local_rank,
                    "device_id": device.device_id,
                    "device_ip": device.device_ip,
                }
            )
    return {
        "world_size": len(ranks),
        "nnodes": len(servers),
        "master_addr": servers[0].address,
        "node_rank": {server.server_id: node_rank for node_rank, server in enumerate(servers)},
        "nproc_per_node": {server.server_id: len(server.devices) for server in servers},
        "ranks": ranks,
    }


def torchrun_lines(plan: dict[str, Any], master_port: int = MASTER_PORT) -> dict[str, str]:
    """For each server_id the start of the command that runs its part of `plan`, which `world` gave."""
    lines = {}
    for server_id, node_rank in plan["node_rank"].items():
        numbers = sorted(row["device_id"] for row in plan["ranks"] if row["server_id"] == server_id)
        devices = ",".join(map(str, numbers))  # ascending: CANN knows no other order
        lines[server_id] = (
            f"ASCEND_RT_VISIBLE_DEVICES={devices} torchrun --nnodes={plan['nnodes']} --node_rank={node_rank} "
            f"--nproc_per_node={plan['nproc_per_node'][server_id]} --master_addr={plan['master_addr']} "
            f"--master_port={master_port}"
        )
    return lines


def merge(
    tables: Sequence[dict[str, Any]], keep_order: bool = False, devices_per_server: int | None = None
) -> dict[str, Any]:
    """One table of all servers of `tables`, with ranks counted anew.

    Hosts are ordered by number (10.0.0.2 before 10.0.0.10), so that every machine that merges the same tables gets the
    same ranks; with `keep_order` they stay in the order given. Inside a server the order of the ranks is kept. The
    result has the layout of version 1.0, or 1.2 when all tables do.

    Raises RankTableError when a table has problems, versions differ, or a server occurs twice. Device addresses that
    two servers share are left to `check`, as in `world`.
    """
    if not tables:
        raise RankTableError(["nothing to merge; give at least one rank table"])
    if problems := [problem for table in tables for problem in launch_problems(table, devices_per_server)]:
        raise RankTableError(problems)
    versions = sorted({str(table.get("version", "1.0")) for table in tables})
    if len(versions) > 1:
        raise RankTableError(
            [f"tables of versions {', '.join(versions)} cannot be merged; generate all in one version"]
        )
    servers = [server for table in tables for server in _in_rank_order(parse_servers(table, lambda *_: None))]
    if not keep_order:
        servers.sort(key=_host_order)
    merged: dict[str, Any] = {"version": versions[0], "server_count": str(len(servers)), "server_list": []}
    next_rank = 0
    for server in servers:
        merged["server_list"].append(_server_row(server, next_rank))
        next_rank += len(server.devices)
    if versions[0] == "1.2":
        merged["super_pod_list"] = _merged_super_pods(tables)
    merged["status"] = "completed"
    if problems := launch_problems(merged, devices_per_server):
        raise RankTableError(problems)
    return merged


def generate(
    server_id: str, device_ips: Mapping[int, str | None], devices_per_server: int | None = None
) -> dict[str, Any]:
    """The table (version 1.0) of one server; `device_ips` maps device ids, in order of rank, to their addresses.

    Raises RankTableError when an address is bad or used twice.
    """
    devices = []
    for rank, (device_id, device_ip) in enumerate(device_ips.items()):
        address = {} if device_ip is None else {"device_ip": str(device_ip)}
        devices.append({"device_id": str(device_id), **address, "rank_id": str(rank)})
    server = {"server_id": server_id, "device": devices, "host_nic_ip": "reserve"}
    table = {"version": "1.0", "server_count": "1", "server_list": [server], "status": "completed"}
    if problems := check(table, devices_per_server):
        raise RankTableError(problems)
    return table


def write(table: dict[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write `table` to `path` as the reference tools do (indent 4); another table of that name is kept as `*.old`."""
    path = Path(path)
    text = json.dumps(table, indent=4)
    if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
        path.replace(path.with_name(path.name + ".old"))
        print(f"the earlier {path.name} is now {path.name}.old")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path


def _in_rank_order(servers: list[Server]) -> list[Server]:
    """The servers by first rank, their devices by rank; every rank must be known."""
    for server in servers:
        server.devices.sort(key=_rank)
    return sorted(servers, key=lambda server: _rank(server.devices[0]))


def _rank(device: Device) -> int:
    """Of a checked table, where it is known."""
    return cast(int, device.rank_id)


def _host_order(server: Server) -> tuple[int, int, Any]:
    address = ip_address(server.server_id)
    return (1, 0, natural_key(server.server_id or "")) if address is None else (0, address.version, int(address))


def _server_row(server: Server, first_rank: int) -> dict[str, Any]:
    rows = []
    for rank, device in enumerate(server.devices, start=first_rank):
        rows.append({**device.row, "device_id": str(device.device_id), "rank_id": str(rank)})
    extra = {k: v for k, v in server.row.items() if k not in ("server_id", "device", "devices", "pod_name")}
    return {"server_id": server.server_id, "device": rows, "host_nic_ip": "reserve", **extra}


def _merged_super_pods(tables: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    pods: dict[str, dict[str, Any]] = {}
    for table in tables:
        for pod in table["super_pod_list"]:
            merged = pods.setdefault(pod["super_pod_id"], {**pod, "server_list": []})
            merged["server_list"] = merged["server_list"] + pod["server_list"]
    return list(pods.values())


def exit_with_problems(program: str, options: argparse.Namespace) -> None:
    """Run the command in `options.run`; a RankTableError becomes lines on stderr and exit status 1."""
    try:
        options.run(options)
    except RankTableError as error:
        raise SystemExit("\n".join(f"{program}: error: {problem}" for problem in error.problems)) from None
