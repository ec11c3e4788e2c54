"""Make this server's rank table: `python common/hccl_tools.py --device_num "[0,8)" [--server_ip --visible_devices]`.

Options, printed lines, file name and JSON are those of MindFormers' hccl_tools.py (r0.8, r1.2.0) where that gives a
usable table. Different on purpose: numbers of two digits and spaces in the range are understood, `--visible_devices`
works, a bad address or an empty range is an error instead of a table, and every problem is one line.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from common import rank_table
from common.rank_table import device_addresses
from common.rank_table.validation import RankTableError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options, shared with `python -m common.rank_table generate`."""
    parser.add_argument("output", nargs="?", metavar="FILE", help="default: hccl_{N}p_{devices}_{server_ip}.json here")
    parser.add_argument(
        "--device_num", default="[0,8)", help="range of devices, the end excluded (default: %(default)s)"
    )
    parser.add_argument("--visible_devices", help="device ids that 0, 1, ... of --device_num stand for: 4,5,6,7")
    parser.add_argument("--server_ip", default="", help="this server's address (default: found by its host name)")
    parser.add_argument("--device_num_per_node", type=int, default=8, help="devices of a server (default: %(default)s)")
    parser.add_argument(
        "--device_ip", help="addresses of the devices, in order, instead of asking hccn_tool: IP,IP,..."
    )
    parser.set_defaults(run=_run)


def device_range(text: str, per_node: int = 8) -> list[int]:
    """The devices in "[a,b)"; "[a,b]" is read as "[a,b)", as the reference does.

    Raises RankTableError when it is no such range, is empty, exceeds the server, or crosses the two groups of four of
    an 8-device server (unless it is all 8): HCCL on Atlas 800 joins devices of one group only.
    """
    match = re.fullmatch(r"\s*\[\s*([0-9]{1,4})\s*,\s*([0-9]{1,4})\s*[\])]\s*", text)
    if match is None:
        raise RankTableError([f'--device_num {text!r} is not a range; write it like "[0,8)", the end excluded'])
    first, last = int(match[1]), int(match[2])
    if first >= last:
        raise RankTableError([f"--device_num {text}: the first number {first} must be less than the last {last}"])
    if last > per_node:
        hint = "see --device_num_per_node"
        raise RankTableError(
            [f"--device_num {text} must be in the range [0,{per_node}) of one server's devices; {hint}"]
        )
    if per_node == 8 and first < 4 < last and last - first != 8:
        hint = "a choice across groups can be made with --visible_devices"
        raise RankTableError([f"--device_num {text} must be in the same group of [0,4) or [4,8); {hint}"])
    return list(range(first, last))


def visible_devices(logical: Sequence[int], visible: str | None) -> list[int]:
    """The device ids that `logical` stands for in the comma-separated list `visible` (None: itself)."""
    if visible is None:
        return list(logical)
    listed = [item.strip() for item in visible.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,4}", item) for item in listed):
        raise RankTableError([f"--visible_devices {visible!r} is not a list of numbers; write it like 4,5,6,7"])
    if logical[-1] >= len(listed):
        text = f"--device_num asks for device {logical[-1]} but --visible_devices {visible} has {len(listed)} devices"
        raise RankTableError([f"{text}, counted from 0; name more or ask for fewer"])
    chosen = [int(listed[number]) for number in logical]
    if len(set(chosen)) < len(chosen):
        raise RankTableError([f"--visible_devices {visible} names a device twice; name each once"])
    return chosen


def _run(options: argparse.Namespace) -> None:
    logical = device_range(options.device_num, options.device_num_per_node)
    device_ids = visible_devices(logical, options.visible_devices)
    shown = options.visible_devices or ",".join(map(str, range(options.device_num_per_node)))
    print(f"visible_devices:{[item.strip() for item in shown.split(',')]}")
    server_id = options.server_ip or device_addresses.own_address()
    print(f"server_id:{server_id}")
    print(f"device_num_list: {logical}")
    if options.device_ip is None:
        device_ips = device_addresses.device_addresses(device_ids)
    else:
        given = [item.strip() for item in options.device_ip.split(",")]
        if len(given) != len(device_ids):
            raise RankTableError(
                [f"--device_ip has {len(given)} addresses for {len(device_ids)} devices; give as many"]
            )
        device_ips = dict(zip(device_ids, given, strict=True))
    table = rank_table.generate(server_id, device_ips, options.device_num_per_node)
    for row in table["server_list"][0]["device"]:
        print(f"rank_id:{row['rank_id']}, device_id:{row['device_id']}, device_ip:{row['device_ip']}")
    name = f"hccl_{len(device_ids)}p_{''.join(map(str, device_ids))}_{server_id}.json"
    path = rank_table.write(table, Path(options.output) if options.output else Path.cwd() / name)
    print(f"Completed: hccl file was save in : {path}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="hccl_tools.py", description="Make this server's rank table.")
    add_arguments(parser)
    rank_table.exit_with_problems("hccl_tools.py", parser.parse_args(argv))
