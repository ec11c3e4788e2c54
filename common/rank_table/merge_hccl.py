"""Make one rank table of the servers' tables: `python common/merge_hccl.py hccl*.json`.

Output name and JSON are those of MindFormers' merge_hccl.py where that gives a usable table. Different on purpose:
- every input and the result are checked: a server or a device address that occurs twice is refused, as HCCL and our
  launcher would refuse it; what is only doubtful is warned of, and refused with `--strict`;
- an earlier output that `hccl*.json` also matches is left out when all its servers have tables of their own;
- arguments in text order, as a shell lists `hccl*.json` (10.0.0.10 before 10.0.0.2), are put in order of host number;
  an order typed by hand is kept, the first server being the master. `--order` chooses one of the two;
- the ranks of a server keep the order they have in its table, and version 1.2 stays 1.2.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from common import rank_table
from common.rank_table import RankTable
from common.rank_table.servers import parse_servers
from common.rank_table.validation import RankTableError, warnings

_OUTPUT_NAME = re.compile(r"hccl_[0-9]+s_[0-9]+p\.json")


def add_arguments(parser: argparse.ArgumentParser, order: str = "auto") -> None:
    """The options, shared with `python -m common.rank_table merge`."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="rank tables, usually hccl*.json")
    parser.add_argument("-o", "--output", help="default: hccl_{servers}s_{ranks}p.json in this folder")
    text = "of hosts: by number, as the arguments stand, or by number unless typed by hand (default: %(default)s)"
    parser.add_argument("--order", choices=("number", "arguments", "auto"), default=order, help=text)
    parser.add_argument("--strict", action="store_true", help="refuse what is only warned of")
    parser.add_argument("--devices_per_server", type=int, help="default: 8, or 16 for version 1.2")
    parser.set_defaults(run=_run)


def without_earlier_outputs(tables: Sequence[RankTable]) -> list[RankTable]:
    """`tables` less those named like an output of this tool whose servers all have tables of their own here."""
    outputs = [t for t in tables if t.path is not None and _OUTPUT_NAME.fullmatch(t.path.name)]
    own = {server_id for t in tables if t not in outputs for server_id in _server_ids(t)}
    earlier = [t for t in outputs if (servers := _server_ids(t)) and servers <= own]
    for table in earlier:
        print(f"left out {table.path}: an earlier merge of servers that are given one by one")
    return [t for t in tables if t not in earlier]


def in_text_order(names: Sequence[str]) -> bool:
    """Whether `names` stand as a shell lists them: by character, or by letters and digits only (as en_US does)."""
    letters = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in names]
    return list(names) == sorted(names) or letters == sorted(letters)


def _server_ids(table: RankTable) -> set[str]:
    return {server.server_id for server in parse_servers(table, lambda *_: None) if server.server_id is not None}


def _read_all(paths: Sequence[str]) -> list[RankTable]:
    tables, problems = [], []
    for path in paths:
        try:
            tables.append(rank_table.read(path))
        except RankTableError as error:
            problems += error.problems
    if problems:
        raise RankTableError(problems)
    return tables


def _run(options: argparse.Namespace) -> None:
    tables = without_earlier_outputs(_read_all(options.files))
    keep_order = options.order == "arguments"
    if options.order == "auto":
        keep_order = not in_text_order([str(table.path) for table in tables])
    merged = rank_table.merge(tables, keep_order, options.devices_per_server)
    doubtful = warnings(merged)
    if problems := rank_table.check(merged, options.devices_per_server) + (doubtful if options.strict else []):
        raise RankTableError(problems)
    for warning in doubtful:
        print(f"warning: {warning}", file=sys.stderr)
    hosts = [server["server_id"] for server in merged["server_list"]]
    print(f"hosts {'as given' if keep_order else 'by number'}: {', '.join(hosts)}")
    ranks = sum(len(server["device"]) for server in merged["server_list"])
    path = Path(options.output) if options.output else Path.cwd() / f"hccl_{len(hosts)}s_{ranks}p.json"
    rank_table.write(merged, path)
    print(f"Completed: hccl file was save in : {path}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="merge_hccl.py", description="Make one rank table of many.")
    add_arguments(parser)
    rank_table.exit_with_problems("merge_hccl.py", parser.parse_args(argv))
