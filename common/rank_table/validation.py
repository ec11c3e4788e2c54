"""Everything that can be wrong with a rank table, found at once. Pure Python, no torch; layouts: see servers.py.

What HCCL accepts is read from its source (cann-hccl, topoinfo_ranktableConcise.cc) and its guide (hcclug, rank table):
`server_id` is any name of its own, with the address in `host_ip`; ranks go to the devices of a server in any order (a
ring: 0, 1, 3, 2); `device_ip` may be absent on one server, and must be there, each once, between servers.
"""

from __future__ import annotations

import re
import reprlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from common.rank_table.servers import (
    ADDRESS_KEYS,
    Report,
    Server,
    check_count,
    ignore,
    ip_address,
    is_host,
    is_loopback,
    number_of,
    parse_servers,
    rows_of,
    text_of,
)

DEVICES_PER_SERVER = {"1.0": 8, "1.2": 16}
_PLACEHOLDER = re.compile(r"[xX*]+(\.[xX*]+)+|<.*>")


class RankTableError(ValueError):
    """A rank table that cannot be used; `problems` lists everything that is wrong with it."""

    def __init__(self, problems: Sequence[str]):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def check(table: Any, devices_per_server: int | None = None) -> list[str]:
    """Every problem of `table`, each saying file (when known), place, value and remedy; empty = good.

    Args:
        table: what `rank_table.read` gave, or the parsed JSON.
        devices_per_server: the most devices a server may have; default 8 for version 1.0, 16 for 1.2.
    """
    problems = launch_problems(table, devices_per_server)
    found, report = _reporter(table)
    _check_equal_device_ips(parse_servers(table, ignore), report)
    path = getattr(table, "path", None)
    if path is not None and path.is_symlink():
        report(f"the file is a symbolic link to {path.resolve()}", "torch_npu refuses links, give the file itself")
    return problems + found


def warnings(table: Any) -> list[str]:
    """What works but deserves a look: unequal servers, a loopback address."""
    found, report = _reporter(table)
    servers = parse_servers(table, ignore)
    counts = [len(server.devices) for server in servers]
    if len(set(counts)) > 1:
        report(
            f"{' vs '.join(map(str, dict.fromkeys(counts)))} devices per server",
            "HCCL needs equal counts for most topologies; torchrun needs another --nproc_per_node on each node",
        )
    for server in servers:
        known = ((d.rank_id, d.device_id) for d in server.devices if d.device_id is not None and d.rank_id is not None)
        by_rank = [device_id for _, device_id in sorted(known)]
        if by_rank != sorted(by_rank):
            text = f"server {server.label}: device ids in order of rank are {', '.join(map(str, by_rank))}"
            report(text, "good for HCCL and test/*.sh; plain torchrun gives the ranks cards in ascending order")
        if len(servers) == 1 and is_loopback(server.address):
            report(f"{server.place}: {server.address} is a loopback address", "fine on one machine only")
    return found


def launch_problems(table: Any, devices_per_server: int | None = None) -> list[str]:
    """The problems that leave no usable world: all but device addresses used twice and a symbolic link."""
    found, report = _reporter(table)
    if not isinstance(table, dict):
        report(f"top level must be a JSON object, got {type(table).__name__}", "see hccl_tools.py for the format")
        return found
    servers = parse_servers(table, report)
    _check_header(table, report)
    _check_server_ids(servers, report)
    limit = devices_per_server or DEVICES_PER_SERVER.get(_version(table), 8)
    for server in servers:
        _check_devices(server, limit, report)
    _check_ranks(servers, report)
    _check_device_ips(servers, report)
    if _version(table) == "1.2":
        _check_super_pods(table, servers, report)
    return found


def _reporter(table: Any) -> tuple[list[str], Report]:
    path = getattr(table, "path", None)
    found: list[str] = []
    return found, lambda what, remedy: found.append(f"{path}: {what}; {remedy}" if path else f"{what}; {remedy}")


def _version(table: dict[str, Any]) -> str:
    version = table.get("version")
    return str(version) if isinstance(version, (str, float)) else reprlib.repr(version)


def _check_header(table: dict[str, Any], report: Report) -> None:
    if "status" not in table:
        report("missing status", "a finished table says 'completed'")
    elif table["status"] != "completed":
        value = reprlib.repr(table["status"])
        report(f"status is {value}, expected 'completed' (table not ready)", "wait for the table or generate it anew")
    if "group_list" in table:
        check_count(table, "group_count", "group_list", "", report)
        return
    if "version" not in table:
        report("missing version", "write '1.0', or '1.2' with super pods")
    elif _version(table) not in DEVICES_PER_SERVER:
        report(f"version {reprlib.repr(table['version'])} is unknown", "known are '1.0' and '1.2'")
    if "server_count" not in table:
        report("missing server_count", "write the number of servers")
    check_count(table, "server_count", "server_list", "", report)


def _check_server_ids(servers: list[Server], report: Report) -> None:
    for server in servers:
        name = server.server_id
        if name is None:
            continue
        if _PLACEHOLDER.fullmatch(name):
            report(f"{server.place}: server_id {name!r} is a documentation placeholder", "write the server's address")
        elif server.address == name and not is_host(name):
            remedy = "write the server's address, or give it as host_ip"
            report(f"{server.place}: server_id {reprlib.repr(name)} is neither an IP address nor a host name", remedy)
        elif len(servers) > 1 and is_loopback(server.address):
            report(f"{server.place}: {server.address} is a loopback address", "give hccl_tools.py --server_ip")
        for key in ADDRESS_KEYS:
            if server.row.get(key) not in (None, "") and ip_address(server.row[key]) is None:
                remedy = "write the server's address or remove it"
                report(f"{server.place}: {key} {reprlib.repr(server.row[key])} is not an IP address", remedy)
        nic = server.row.get("host_nic_ip", "reserve")
        if nic != "reserve" and ip_address(nic) is None:
            report(f"{server.place}: host_nic_ip {reprlib.repr(nic)} is not an IP address", "write it or 'reserve'")
    for name, places in _repeated((s.server_id and (ip_address(s.server_id) or s.label), s.place) for s in servers):
        remedy = "(typical: merge without --server_ip) make each server's table with its own address"
        report(f"duplicate server_id {name} in {places}", remedy)
    separate = [s for s in servers if s.address != s.server_id]
    for address, places in _repeated((ip_address(s.address), s.place) for s in separate):
        report(f"duplicate address {address} in {places}", "every server needs its own")


def _check_devices(server: Server, limit: int, report: Report) -> None:
    where = f"server {server.label}"
    if len(server.devices) > limit:
        text = f"{where}: {len(server.devices)} devices on one server (max {limit} per server)"
        report(text, "remove rows, or say --devices_per_server 16 where a server has so many")
    for device in server.devices:
        if device.device_id is not None and device.device_id >= limit:
            text = f"{device.place}: device_id {device.device_id} outside 0..{limit - 1} (max {limit} per server)"
            report(text, "correct it, or say --devices_per_server 16 where a server has so many")
    for number, places in _repeated((d.device_id, d.place) for d in server.devices):
        report(f"{where}: duplicate device_id {number} in {places}", "every device may appear once")


def _check_ranks(servers: list[Server], report: Report) -> None:
    devices = [device for server in servers for device in server.devices]
    ranks = [device.rank_id for device in devices if device.rank_id is not None]
    for rank, places in _repeated((d.rank_id, d.place) for d in devices):
        report(f"duplicate rank_id {rank} in {places}", "every device needs a rank of its own")
    if len(ranks) < len(devices):
        return
    missing = sorted(set(range(len(ranks))) - set(ranks))
    unexpected = sorted(set(ranks) - set(range(len(ranks))))
    if missing and not unexpected:
        report(f"missing rank_id {_some(missing)}", f"rank ids must be 0..{len(ranks) - 1}, each once")
    elif missing:
        text = f"rank ids must be 0..{len(ranks) - 1}; missing {_some(missing)}, unexpected {_some(unexpected)}"
        report(text, "number the ranks without gaps")
    owners = [index for _, index in sorted((d.rank_id, i) for i, s in enumerate(servers) for d in s.devices)]
    blocks = [owner for n, owner in enumerate(owners) if n == 0 or owners[n - 1] != owner]
    if len(blocks) != len(set(blocks)):
        text = "the ranks of servers are interleaved: " + ", ".join(servers[i].place for i in blocks[:6])
        report(text, "torchrun gives each server a block of ranks: number server by server")


def _check_device_ips(servers: list[Server], report: Report) -> None:
    devices = [device for server in servers for device in server.devices]
    some_have_one = any(device.device_ip is not None for device in devices)
    for device in devices:
        if device.device_ip is None:
            if not device.row.get("device_ip") and (len(servers) > 1 or some_have_one):
                why = "between servers each device needs one" if len(servers) > 1 else "others of the server have one"
                text = f"{device.place}: missing device_ip (only legal for a 1-device table) while {why}"
                report(text, "see hccn_tool -i N -ip -g")
            continue
        address = ip_address(device.device_ip)
        if address is None or address.is_unspecified or address.is_multicast:
            text = f"{device.place}: device_ip {reprlib.repr(device.device_ip)} is not an IP address of a device"
            report(text, "see hccn_tool -i N -ip -g")


def _check_equal_device_ips(servers: list[Server], report: Report) -> None:
    devices = [device for server in servers for device in server.devices]
    for address, places in _repeated((ip_address(d.device_ip), f"{d.place} (rank {d.rank_id})") for d in devices):
        report(f"duplicate device_ip {address} in {places}", "every device needs its own; see hccn_tool -i N -ip -g")


def _check_super_pods(table: dict[str, Any], servers: list[Server], report: Report) -> None:
    pod_of: dict[str, str] = {}
    members = []
    for place, pod in rows_of(table, "super_pod_list", "", report):
        name = text_of(pod, "super_pod_id", place, report)
        for server_place, row in rows_of(pod, "server_list", place, report):
            server_id = text_of(row, "server_id", server_place, report)
            members.append((server_id, server_place))
            if server_id is not None and name is not None:
                pod_of[server_id] = reprlib.repr(name)
    known = {server.server_id for server in servers}
    for server_id, place in members:
        if server_id is not None and server_id not in known:
            report(f"{place}: server {reprlib.repr(server_id)} is not in server_list", "add it or remove it here")
    for server_id, places in _repeated(members):
        report(
            f"super_pod_list has server {reprlib.repr(server_id)} more than once: {places}",
            "a server is in one super pod",
        )
    for server in servers:
        if server.server_id is not None and server.server_id not in pod_of and pod_of:
            report(f"{server.place}: server {server.label} is in no super pod", "add it to super_pod_list")
    numbers = []
    for server in servers:
        for device in server.devices:
            number = number_of(device.row, "super_device_id", device.place, report)
            if number is not None:
                numbers.append(((pod_of.get(server.server_id or ""), number), device.place))
    for (pod, number), places in _repeated(numbers):
        report(f"super pod {pod}: duplicate super_device_id {number} in {places}", "each device needs its own")


def _repeated(items: Iterable[tuple[Hashable, str]]) -> list[tuple[Any, str]]:
    """(value, places) of every value that is not None and occurs more than once."""
    places = defaultdict(list)
    for value, place in items:
        if value is not None:
            places[value].append(place)
    return [(value, ", ".join(found)) for value, found in places.items() if len(found) > 1]


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
