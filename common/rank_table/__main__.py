"""The commands of `python -m common.rank_table`: check, show, merge, generate."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from common import rank_table
from common.rank_table import hccl_tools, merge_hccl
from common.rank_table.validation import RankTableError, check, warnings


def _check_command(options: argparse.Namespace) -> None:
    failed = False
    for path in options.files:
        try:
            table = rank_table.read(path)
            problems = check(table, options.devices_per_server)
        except RankTableError as error:
            problems = error.problems
        if problems:
            failed = True
            print("\n".join(problems), file=sys.stderr)
            continue
        for warning in warnings(table):
            print(f"warning: {warning}", file=sys.stderr)
        plan = rank_table.world(table, options.devices_per_server)
        print(f"{path}: good, {plan['nnodes']} servers, {plan['world_size']} ranks")
    if failed:
        raise SystemExit(1)


def _show_command(options: argparse.Namespace) -> None:
    table = rank_table.read(options.file)
    plan = rank_table.world(table, options.devices_per_server)
    for notice in check(table, options.devices_per_server) + warnings(table):
        print(f"warning: {notice}", file=sys.stderr)
    print(f"world size {plan['world_size']}, {plan['nnodes']} nodes, master {plan['master_addr']}")
    print(f"{'rank':>4} {'node':>4} {'local':>5} {'device':>6}  server_id        device_ip")
    for row in plan["ranks"]:
        numbers = f"{row['rank']:>4} {row['node_rank']:>4} {row['local_rank']:>5} {row['device_id']:>6}"
        print(f"{numbers}  {row['server_id']:<16} {row['device_ip'] or '-'}")
    print("\nto run it, on each server:")
    for server_id, line in rank_table.torchrun_lines(plan, options.master_port).items():
        print(f"  {server_id}: {line} SCRIPT ...")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="rank_table", description="Check, show, merge and generate rank tables.")
    commands = parser.add_subparsers(required=True, metavar="check|show|merge|generate")
    check_parser = commands.add_parser("check", help="print every problem; exit status 1 when there is one")
    check_parser.add_argument("files", nargs="+", metavar="FILE")
    check_parser.set_defaults(run=_check_command)
    show_parser = commands.add_parser("show", help="print the world and the torchrun line of each server")
    show_parser.add_argument("file", metavar="FILE")
    show_parser.add_argument("--master_port", type=int, default=rank_table.MASTER_PORT, help="default: %(default)s")
    show_parser.set_defaults(run=_show_command)
    for command in (check_parser, show_parser):
        command.add_argument("--devices_per_server", type=int, help="default: 8, or 16 for version 1.2")
    merge_hccl.add_arguments(commands.add_parser("merge", help="make one table of many"), order="number")
    hccl_tools.add_arguments(commands.add_parser("generate", help="make the table of this server"))
    options = parser.parse_args(argv)
    rank_table.exit_with_problems("rank_table", options)


if __name__ == "__main__":
    main()
