"""The nodes and ranks of a run, and which of them this machine starts; printed as assignments for launch.sh.

    python -m common.launch.world [--rank_table_file=FILE | --hostfile=FILE] [--nnodes=N --node_rank=K --nproc=N ...]

A rank table, a host file (`address [slots=N]` a line, # starts a comment) or --nnodes and --master_addr all become the
same world. This machine finds its own node by its addresses and host name; --node_rank overrides that. Where the user
starts every rank himself, Ascend's RANK_ID, RANK_SIZE and DEVICE_ID become torch's names. Pure Python, no torch.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import rank_table
from common.launch.addresses import interface_of, is_own_address
from common.network.hosts import address_towards
from common.rank_table.servers import ip_address, is_host, parse_servers
from common.rank_table.validation import RankTableError, warnings

MASTER_PORT = 29500
# Ascend's name of a rank's place, and torch's
TORCH_NAMES = {"RANK_ID": "RANK", "RANK_SIZE": "WORLD_SIZE", "DEVICE_ID": "LOCAL_RANK"}


class LaunchError(ValueError):
    """A world that cannot be launched; the message says why and what to do."""


@dataclass(frozen=True)
class Node:
    """One machine of a run: its address, how many ranks it starts, and their devices in order (empty: all it has)."""

    address: str
    nproc: int
    devices: tuple[int, ...] = ()
    name: str = ""  # another one by which the machine may know itself


def nodes_of_table(path: str, nproc: int | None = None, devices_per_server: int | None = None) -> list[Node]:
    """The nodes of a rank table, in order of rank.

    Args:
        nproc: the devices that every server is said to have.
        devices_per_server: the most that a server may have; by default what its version says (`rank_table.check`).

    Raises LaunchError with every problem of the table, or when a server has another count than `nproc`.
    """
    try:
        table = rank_table.read(path)
        if problems := rank_table.check(table, devices_per_server):
            raise RankTableError(problems)
        plan = rank_table.world(table, devices_per_server)
    except RankTableError as error:
        raise LaunchError("\n".join(error.problems)) from None
    for warning in warnings(table):
        print(f"warning: {warning}", file=sys.stderr)
    addresses = {server.server_id: server.address for server in parse_servers(table, lambda *_: None)}
    nodes = []
    for server_id in plan["node_rank"]:
        devices = tuple(row["device_id"] for row in plan["ranks"] if row["server_id"] == server_id)
        if nproc not in (None, len(devices)):
            raise LaunchError(f"--nproc={nproc}, but {path} has {len(devices)} devices on server {server_id}: omit it")
        nodes.append(Node(addresses[server_id] or server_id, len(devices), devices, server_id))
    return nodes


def nodes_of_hostfile(path: str, nproc: int | None, default_nproc: int) -> list[Node]:
    """The nodes of a host file, in order of its lines; a line without slots starts `nproc` or `default_nproc` ranks.

    Raises LaunchError naming file, line and value.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"--hostfile={path}: cannot be read: {error}") from None
    nodes: list[Node] = []
    for number, line in enumerate(lines, start=1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        found = re.fullmatch(r"(\S+)(?:\s+slots\s*=\s*([0-9]{1,4}))?", line)
        place = f"{path}, line {number}"
        if found is None or not is_host(found[1]) or found[2] == "0":
            raise LaunchError(f"{place}: {line!r} is not 'address' or 'address slots=N' with N of at least 1")
        if any(node.address == found[1] for node in nodes):
            raise LaunchError(f"{place}: {found[1]} is listed twice; write each host once, with slots=N")
        slots = int(found[2]) if found[2] else None
        if slots and nproc and slots != nproc:
            raise LaunchError(f"{place}: slots={slots}, but --nproc={nproc}: give only one of them")
        nodes.append(Node(found[1], slots or nproc or default_nproc))
    if not nodes:
        raise LaunchError(f"--hostfile={path}: names no host; write one 'address [slots=N]' a line")
    if len({_is_loopback(node.address) for node in nodes}) > 1:
        raise LaunchError(
            f"--hostfile={path}: no other host can reach a loopback address among others: write this host's own"
        )
    return nodes


def own_node(nodes: Sequence[Node]) -> int:
    """The index of the node that this machine is.

    Raises LaunchError when it is none of them, or several.
    """
    own = [index for index, node in enumerate(nodes) if is_own_address(node.address)]
    own = own or [index for index, node in enumerate(nodes) if node.name and is_own_address(node.name)]
    if len(own) == 1:
        return own[0]
    listed = ", ".join(node.address for node in nodes[:8]) + (", ..." if len(nodes) > 8 else "")
    if own:
        which = " and ".join(nodes[index].address for index in own[:8])
        raise LaunchError(f"{which} are all this machine: say which node to start with --node_rank=K")
    raise LaunchError(f"this machine ({socket.gethostname()}) is none of {listed}: say which with --node_rank=K")


def own_rank(environ: Mapping[str, str], nodes: Sequence[Node], size: int | None, has_table: bool) -> dict[str, str]:
    """torch's variables of the one rank that RANK_ID, RANK_SIZE and DEVICE_ID in `environ` name; empty without RANK_ID.

    Args:
        size: the ranks of the run as far as it is known otherwise (table, host file, flags), to compare with RANK_SIZE.
        has_table: `nodes` come from a rank table, whose row of the rank says device and local rank.

    Raises LaunchError when a name is missing, is no number, or contradicts torch's name, the table or the flags.
    """
    if "RANK_ID" not in environ:
        return {}
    advice = "set all three to start each rank yourself, or unset RANK_ID to have them started"
    given: dict[str, int] = {}
    for name in TORCH_NAMES:
        if not re.fullmatch(r"[0-9]{1,7}", environ.get(name, "")):
            value = f"is {environ[name]!r}" if name in environ else "is not set"
            raise LaunchError(f"RANK_ID={environ['RANK_ID']} is set, but {name} {value}: {advice}")
        given[name] = int(environ[name])
    for name, torch_name in TORCH_NAMES.items():
        if environ.get(torch_name, environ[name]) != environ[name]:
            raise LaunchError(f"{name}={environ[name]}, but {torch_name}={environ[torch_name]}: unset one of them")
    rank, world_size, device = given.values()
    if size not in (None, world_size):
        raise LaunchError(f"RANK_SIZE={world_size}, but the run has {size} ranks: correct RANK_SIZE, or unset RANK_ID")
    if rank >= world_size:
        raise LaunchError(f"RANK_ID={rank} must be below RANK_SIZE={world_size}")
    variables = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": device}
    if has_table:
        local_rank = rank
        for node in nodes:
            if local_rank < node.nproc:
                break
            local_rank -= node.nproc
        if node.devices[local_rank] != device:
            expected = f"device {node.devices[local_rank]} of {node.address}"
            raise LaunchError(
                f"RANK_ID={rank} DEVICE_ID={device}: correct them: in the rank table rank {rank} is {expected}"
            )
        local_rank = sorted(node.devices).index(device)  # cards are visible in ascending order only
        variables |= {"LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": node.nproc, "GROUP_RANK": nodes.index(node)}
    return {name: str(value) for name, value in variables.items()}


def shell_assignments(options: argparse.Namespace, environ: Mapping[str, str]) -> dict[str, str | list[str]]:
    """What launch.sh needs to know: a string or a list of strings by shell variable.

    Raises LaunchError for anything that leaves no clear world.
    """
    listed = options.rank_table_file or options.hostfile
    if options.rank_table_file and options.hostfile:
        raise LaunchError("--rank_table_file and --hostfile: give only one of them")
    if options.rank_table_file:
        nodes = nodes_of_table(options.rank_table_file, options.nproc, options.devices_per_server)
    elif options.hostfile:
        nodes = nodes_of_hostfile(options.hostfile, options.nproc, options.default_nproc)
    else:
        count = 1 if options.nnodes is None else options.nnodes
        nproc = options.default_nproc if options.nproc is None else options.nproc
        if min(count, nproc) < 1:
            raise LaunchError(f"--nproc={nproc} --nnodes={count}: both must be at least 1")
        nodes = [Node("", nproc)] * count
    if options.nnodes not in (None, len(nodes)):
        raise LaunchError(f"--nnodes={options.nnodes}, but {listed} has {len(nodes)} nodes: omit --nnodes")

    world_size = sum(node.nproc for node in nodes)
    known_size = world_size if listed or options.nproc or options.nnodes or world_size > 1 else None
    variables = own_rank(environ, nodes, known_size, bool(options.rank_table_file))
    world_size = int(variables.get("WORLD_SIZE", world_size))
    node_rank = options.node_rank if options.node_rank is not None else variables.get("GROUP_RANK")
    if node_rank is None:
        node_rank = own_node(nodes) if listed and len(nodes) > 1 and not options.dry_run else 0
    if int(node_rank) >= len(nodes):
        raise LaunchError(f"--node_rank={node_rank}: must be below --nnodes={len(nodes)}")

    master_addr = options.master_addr or nodes[0].address or (environ.get("MASTER_ADDR", "") if variables else "")
    if not master_addr and (len(nodes) > 1 or (variables and world_size > 1)):
        ranks = f"RANK_ID and RANK_SIZE={world_size} are set: this" if variables else f"--nnodes={len(nodes)}"
        raise LaunchError(f"{ranks} needs --master_addr, the address of node 0")
    master_port = options.master_port or (environ.get("MASTER_PORT") if variables else None) or MASTER_PORT
    if variables and world_size > 1:
        variables |= {"MASTER_ADDR": master_addr, "MASTER_PORT": str(master_port)}
    elif variables:  # one rank needs no group, only its device
        variables = {"LOCAL_RANK": variables["LOCAL_RANK"]}
    own_address = nodes[int(node_rank)].address or address_towards(master_addr)
    interface = interface_of(own_address) if len(nodes) > 1 and own_address else None
    return {
        "nnodes": str(len(nodes)),
        "node_rank": str(node_rank),
        "master_addr": master_addr,
        "master_port": str(master_port),
        "world_size": str(world_size),
        "node_addresses": [node.address for node in nodes],
        "node_nproc": [str(node.nproc) for node in nodes],
        "node_devices": [",".join(map(str, node.devices)) for node in nodes],
        "node_interface": interface or "",
        "own_address": own_address or "",
        "rank_variables": [f"{name}={value}" for name, value in variables.items()],
    }


def _is_loopback(address: str) -> bool:
    known = ip_address(address)
    return known.is_loopback if known is not None else address == "localhost"


def _number(text: str) -> int | None:
    return int(text) if text else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags by which a run's nodes are named; an empty value is a flag that was not given."""
    parser.add_argument("--rank_table_file", default="", metavar="FILE", help="rank table of the run")
    parser.add_argument("--hostfile", default="", metavar="FILE", help="a line 'address [slots=N]' for each node")
    parser.add_argument("--nproc", type=_number, help="ranks a node")
    text = "most devices of a server in the rank table; default: 8, or 16 for version 1.2"
    parser.add_argument("--devices_per_server", type=_number, help=text)
    parser.add_argument("--master_addr", default="", help="default: the address of node 0")
    parser.add_argument("--master_port", type=_number, help=f"default: {MASTER_PORT}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="launch_world", description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--nnodes", type=_number)
    parser.add_argument("--node_rank", type=_number, help="default: found by this machine's addresses")
    parser.add_argument("--default_nproc", type=int, default=1, help="ranks a node where nothing else says it")
    parser.add_argument("--dry_run", nargs="?", const="true", default="", help="node 0, whichever machine this is")
    try:
        assignments = shell_assignments(parser.parse_args(argv), os.environ)
    except LaunchError as error:
        raise SystemExit("\n".join(f"error: {line}" for line in str(error).splitlines())) from None
    for name, value in assignments.items():
        quoted = shlex.quote(value) if isinstance(value, str) else f"({shlex.join(value)})"
        print(f"{name}={quoted}")


if __name__ == "__main__":
    main()
