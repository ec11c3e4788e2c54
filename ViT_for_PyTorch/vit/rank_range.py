"""The arguments of MindFormers' run_distribute.sh, checked against the rank table; printed as shell assignments.

    python vit/rank_range.py RANK_TABLE CONFIG [a,b] MODE [RANK_SIZE] [PREDICT_DATA] [FLAGS of launch.sh]

As in the reference, [a,b] leaves out b. Without RANK_SIZE it names the devices of the only server; with it, the ranks
of this server among RANK_SIZE. Unlike the reference, which never opens the table, a range that the table does not have
is refused, and predicting is done once, by rank 0, not the same by every rank. Pure Python, no torch.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from common.launch.world import LaunchError, Node, nodes_of_table

USAGE = "bash run_distribute.sh RANK_TABLE CONFIG [a,b] MODE [RANK_SIZE], or ... predict [RANK_SIZE] PREDICT_DATA"
MODES = ("train", "finetune", "eval", "knn", "linear", "predict")


def share_of_server(words: Sequence[str], devices_per_server: int | None = None) -> dict[str, str]:
    """What the server that is meant by `words` runs, by shell variable: the flags of launch.sh and of run_vit.py.

    `starts_nothing` is the reason, where another server does all there is to do. Raises LaunchError otherwise.
    """
    words = list(words)
    if len(words) < 4:
        raise LaunchError(f"{len(words)} arguments are too few: {USAGE}")
    table, config, text, mode = words[:4]
    rest = words[4:]
    if mode not in MODES:
        raise LaunchError(f"MODE {mode!r} is unknown: choose {', '.join(MODES)}")
    predict_data = rest.pop() if mode == "predict" and rest else ""
    if mode == "predict" and not predict_data:
        raise LaunchError(f"predict needs PREDICT_DATA, pictures or a folder of them: {USAGE}")
    if len(rest) > 1:
        raise LaunchError(f"{len(words)} arguments are too many for {mode}: {USAGE}")
    if not Path(config).is_file():
        raise LaunchError(f"CONFIG {config} is not a file")
    found = re.fullmatch(r"\[\s*([0-9]{1,7})\s*,\s*([0-9]{1,7})\s*[\])]", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise LaunchError(f"range {text!r} is not [a,b] with a below b, both whole numbers, such as [0,8]")
    first, end = int(found[1]), int(found[2])
    nodes = nodes_of_table(table, devices_per_server=devices_per_server)
    node_rank = _node_of_ranks(nodes, first, end, rest[0]) if rest else _only_node(nodes, first, end)

    share = {"servers": str(len(nodes)), "config": str(Path(config).resolve()), "run_mode": mode, "starts_nothing": ""}
    if mode == "predict":
        share |= {"predict_data": str(Path(predict_data).resolve()), "nproc": "1"}
        share["device_id"] = str(nodes[node_rank].devices[0])
        if node_rank > 0:
            share["starts_nothing"] = "rank 0 predicts, on another server: nothing to do here"
    else:
        share |= {"rank_table_file": str(Path(table).resolve()), "node_rank": str(node_rank)}
    return share


def _only_node(nodes: Sequence[Node], first: int, end: int) -> int:
    if len(nodes) > 1:
        size = sum(node.nproc for node in nodes)
        raise LaunchError(f"the rank table has {len(nodes)} servers: give RANK_SIZE ({size}) after MODE")
    devices = nodes[0].devices
    if devices != tuple(range(first, end)):
        have = ",".join(map(str, devices))
        advice = f"make a table with hccl_tools.py --device_num '[{first},{end})'"
        raise LaunchError(f"[{first},{end}] means devices {first} to {end - 1}, the rank table has {have}: {advice}")
    return 0


def _node_of_ranks(nodes: Sequence[Node], first: int, end: int, rank_size: str) -> int:
    size = sum(node.nproc for node in nodes)
    if rank_size != str(size):
        remedy = ": bash has not multiplied; write device_num=$((8*server_count))" if "*" in rank_size else ""
        raise LaunchError(f"RANK_SIZE {rank_size!r}, but the rank table has {size} ranks{remedy}")
    begin, shares = 0, []
    for index, node in enumerate(nodes):
        if (begin, begin + node.nproc) == (first, end):
            return index
        shares.append(f"[{begin},{begin + node.nproc}] on {node.address}")
        begin += node.nproc
    raise LaunchError(
        f"[{first},{end}] of {size} ranks is no server's share; choose one that the rank table has, {', '.join(shares)}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    positional = list(itertools.takewhile(lambda word: not word.startswith("--"), words))
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--devices_per_server", type=int)  # the one of launch.sh's flags that the range depends on
    flags, _ = parser.parse_known_args(words[len(positional) :])
    try:
        share = share_of_server(positional, flags.devices_per_server)
    except LaunchError as error:
        raise SystemExit("\n".join(f"error: {line}" for line in str(error).splitlines())) from None
    for name, value in share.items():
        print(f"{name}={shlex.quote(value)}")


if __name__ == "__main__":
    main()
