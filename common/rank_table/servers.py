"""What a rank table says, in any of its layouts: servers and their devices. Pure Python, no torch.

Layouts: version 1.0, version 1.2 (super pods: `super_device_id`, `super_pod_list`) and ModelArts' `jobstart_hccl.json`
(`group_list`, ranks implied by order). 1.2 and ModelArts follow published examples; neither was run on Ascend hardware.
MindCluster's hccl.json has the pod's address as `server_ip` or `container_ip`, which is where the processes are.
"""

from __future__ import annotations

import ipaddress
import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ADDRESS_KEYS = ("server_ip", "container_ip", "host_ip")  # in the order of preference
_HOST_NAME = re.compile(r"(?!\d+(\.\d+)*$)(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?")
Report = Callable[[str, str], None]  # (place and value, remedy)


@dataclass
class Device:
    """One row of a table; what is missing or unreadable is None (and was reported)."""

    place: str
    row: dict[str, Any]
    device_id: int | None
    rank_id: int | None
    device_ip: str | None


@dataclass
class Server:
    """One machine of a table with its devices, in the order of the file."""

    place: str
    row: dict[str, Any]
    server_id: str | None
    devices: list[Device]

    @property
    def address(self) -> str | None:
        """Where its processes are reached: the pod's address, the host's, or what server_id says."""
        return next((self.row[key] for key in ADDRESS_KEYS if ip_address(self.row.get(key))), self.server_id)

    @property
    def label(self) -> str:
        """The name for messages; what is no host name is quoted, so that it can be printed whatever it holds."""
        name = self.server_id
        return self.place if name is None else name if is_host(name) else reprlib.repr(name)


def parse_servers(table: Any, report: Report) -> list[Server]:
    """The servers of any layout; rows that are no rows are reported and left out."""
    if not isinstance(table, dict):
        return []
    if "group_list" in table:
        return _parse_modelarts(table, report)
    servers = []
    for place, row in rows_of(table, "server_list", "", report):
        devices = []
        for device_place, device in rows_of(row, "device", place, report):
            rank = number_of(device, "rank_id", device_place, report)
            devices.append(_device(device_place, device, rank, report))
        servers.append(Server(place, row, text_of(row, "server_id", place, report), devices))
    return servers


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sort key by which `host2` and `10.0.0.2` come before `host10` and `10.0.0.10`."""
    parts = re.findall(r"[0-9]+|[^0-9]+", text)
    numbers = [part.lstrip("0") if part[0] in "0123456789" else None for part in parts]
    return [(1, 0, part) if n is None else (0, len(n), n) for part, n in zip(parts, numbers, strict=True)]


def ip_address(text: str | None) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """`text` as an address, None when it is not one."""
    try:
        return ipaddress.ip_address(text) if isinstance(text, str) else None
    except ValueError:
        return None


def is_loopback(text: str | None) -> bool:
    """Whether `text` is an address that leads back to the machine itself."""
    address = ip_address(text)
    return address is not None and address.is_loopback


def is_host(text: str) -> bool:
    """Whether `text` can name a machine: an IP address or a host name (four numbers must be an address)."""
    return ip_address(text) is not None or _HOST_NAME.fullmatch(text) is not None


def ignore(what: str, remedy: str) -> None:
    """A Report for a table that has been checked already."""


def _parse_modelarts(table: dict[str, Any], report: Report) -> list[Server]:
    """Ranks count through the groups in order of the file, and in each through the pods by number of their name."""
    servers = []
    ranks = iter(range(1_000_000))
    for place, group in rows_of(table, "group_list", "", report):
        instances = rows_of(group, "instance_list", place, report)
        instances.sort(key=lambda item: natural_key(_name(item[1].get("pod_name"))))
        for instance_place, row in instances:
            rows = rows_of(row, "devices", instance_place, report)
            devices = [_device(device_place, device, next(ranks), report) for device_place, device in rows]
            servers.append(Server(instance_place, row, text_of(row, "server_id", instance_place, report), devices))
        check_count(group, "instance_count", "instance_list", place, report)
        if "device_count" in group:
            listed = sum(len(row["devices"]) for _, row in instances if isinstance(row.get("devices"), list))
            if integer(group["device_count"]) != listed:
                value = reprlib.repr(group["device_count"])
                report(f"{place}: device_count is {value} but {listed} devices are listed", "correct one of them")
    return servers


def _device(place: str, row: dict[str, Any], rank: int | None, report: Report) -> Device:
    device_ip = row.get("device_ip")
    if device_ip is not None and not isinstance(device_ip, str):
        report(f"{place}: device_ip {reprlib.repr(device_ip)} is not an IP address", "write it as text")
    known_ip = device_ip if isinstance(device_ip, str) and device_ip else None
    return Device(place, row, number_of(row, "device_id", place, report), rank, known_ip)


def rows_of(parent: dict[str, Any], key: str, place: str, report: Report) -> list[tuple[str, dict[str, Any]]]:
    """(place, row) of each object in the list `parent[key]`."""
    where = f"{place}.{key}" if place else key
    rows = parent.get(key)
    if key not in parent:
        report(f"{place}: missing {key}" if place else f"missing {key}", "generate the table anew")
    elif not isinstance(rows, list):
        report(f"{where} must be a list, got {type(rows).__name__}", "generate the table anew")
    elif not rows:
        report(f"{where} is empty", "generate the table anew")
    if not isinstance(rows, list):
        return []
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            report(f"{where}[{index}] must be a JSON object, got {type(row).__name__}", "remove or correct it")
    return [(f"{where}[{index}]", row) for index, row in enumerate(rows) if isinstance(row, dict)]


def number_of(row: dict[str, Any], key: str, place: str, report: Report) -> int | None:
    """The whole number `row[key]`; None, and reported, where there is none."""
    if key not in row:
        report(f"{place}: missing {key}", "every device needs one")
        return None
    number = integer(row[key])
    if number is None:
        report(f"{place}: {key} {reprlib.repr(row[key])} is not a number", "write a whole number from 0")
    return number


def text_of(row: dict[str, Any], key: str, place: str, report: Report) -> str | None:
    """The text `row[key]`; None, and reported, where there is none."""
    if key not in row:
        report(f"{place}: missing {key}", "write the server's address")
        return None
    if not isinstance(row[key], str) or not row[key]:
        report(f"{place}: {key} {reprlib.repr(row[key])} is not an address", "write the server's address")
        return None
    return row[key]


def _name(value: Any) -> str:
    return value if isinstance(value, str) else ""


def integer(value: Any) -> int | None:
    """A whole number from 0, written as one or as text; None for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value if 0 <= value < 10**9 else None
    return int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value) else None


def check_count(row: dict[str, Any], key: str, list_key: str, place: str, report: Report) -> None:
    """Reports a count that is not the length of its list."""
    entries = row.get(list_key)
    if key in row and isinstance(entries, list) and integer(row[key]) != len(entries):
        where = f"{place}: " if place else ""
        text = f"{where}{key} is {_plain(row[key])} but {list_key} has {len(entries)} entries"
        report(text, f"set {key} to {len(entries)} or complete the list")


def _plain(value: Any) -> str:
    return value if isinstance(value, str) and value.isdigit() else reprlib.repr(value)
