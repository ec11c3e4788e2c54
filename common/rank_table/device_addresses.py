"""The RoCE address of each Ascend device of this machine, and this machine's own address. Pure Python, no torch.

Device addresses come from `hccn_tool -i N -ip -g` and, where that says nothing, from the lines `address_N=...` of
/etc/hccn.conf, as in the reference's hccl_tools.py.
"""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from common.network.hosts import address_towards
from common.rank_table.servers import ip_address, is_loopback
from common.rank_table.validation import RankTableError

HCCN_CONF = Path("/etc/hccn.conf")
_TOOL_TIMEOUT_S = 30


def device_addresses(
    device_ids: Sequence[int],
    tool: str = "hccn_tool",
    conf: Path = HCCN_CONF,
    report: Callable[[str], None] = print,
) -> dict[int, str]:
    """The address of every device in `device_ids`; what was looked up where is said through `report`.

    Raises RankTableError naming all devices for which neither source has an address.
    """
    from_tool = {n: address for n in device_ids if (address := _from_tool(tool, n)) is not None}
    from_conf = _from_conf(conf)
    missing = [n for n in device_ids if n not in from_tool]
    if missing:
        report(f"{tool} gave no address of device {', '.join(map(str, missing))}, reading {conf}")
    for n in from_tool:
        if n in from_conf and ip_address(from_conf[n]) != ip_address(from_tool[n]):
            report(f"device {n}: {tool} says {from_tool[n]}, {conf} says {from_conf[n]}; taking {tool}'s")
    found = {**from_conf, **from_tool}
    if absent := [n for n in device_ids if n not in found]:
        text = f"no address of device {', '.join(map(str, absent))}: neither {tool} -i N -ip -g nor {conf} has one"
        raise RankTableError([f"{text}; set it with hccn_tool, or give --device_ip"])
    return {n: found[n] for n in device_ids}


def own_address(report: Callable[[str], None] = print) -> str:
    """This machine's address: what its host name stands for, unless that is a loopback address.

    Raises RankTableError when it has none that other machines could reach by name or route.
    """
    try:
        named = socket.gethostbyname(socket.gethostname())
    except OSError as error:
        named = None
        report(f"the host name {socket.gethostname()} cannot be resolved ({error})")
    if named is not None and not is_loopback(named):
        return named
    routed = _default_route_address()
    if routed is not None:
        report(f"the host name stands for {named}, taking {routed} of the default route; --server_ip overrides it")
        return routed
    if named is not None:
        report(f"the host name stands for {named}, a loopback address: good for one server only; see --server_ip")
        return named
    raise RankTableError(["cannot find this server's address; give it with --server_ip"])


def _from_tool(tool: str, device_id: int) -> str | None:
    command = [tool, "-i", str(device_id), "-ip", "-g"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TOOL_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"^\s*ipaddr\w*\s*:\s*(\S+)", done.stdout, flags=re.MULTILINE)  # an IPv6 address has colons too
    return found[1] if done.returncode == 0 and found else None


def _from_conf(conf: Path) -> dict[int, str]:
    try:
        text = conf.read_text(errors="replace")
    except OSError:
        return {}
    return {int(n): address for n, address in re.findall(r"^\s*address_([0-9]{1,4})\s*=\s*(\S+)", text, re.MULTILINE)}


def _default_route_address() -> str | None:
    address = address_towards("192.0.2.1")  # an address reserved for documentation (RFC 5737)
    return None if is_loopback(address) else address
