"""The Markdown tables of what is kept in ci/baselines/, between markers in the documents that show them.

`<!-- peers:begin -->` is all comparisons with peers; `<!-- X:begin -->` is table_X.json, which has columns and rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ci.peers import ROOT

BASELINES = ROOT / "ci" / "baselines"
SHOWN_IN = (ROOT / "docs" / "performance.md",)
MARKED = re.compile(r"<!-- (\w+):begin -->\n.*?<!-- \1:end -->", re.DOTALL)
COLUMNS = ("benchmark", "peer", "peer's time / ours (range)", "our share of matmul peak", "memory, ours / peer", "on")
# other files of ci/baselines/<device>/ are not comparisons with peers
RESULTS = re.compile(r"(vit|beit2|clip|data2vec|device_step)_")
# how a result's keys name the peer, where the path to the ratio does not
_NAMELESS = {"versus", "ratio", "peer_over_ours"}


@dataclass(frozen=True)
class Comparison:
    """One ratio of a result file."""

    benchmark: str
    peer: str
    median: float
    low: float
    high: float
    share: float | None  # of the matmul peak, ours
    memory: tuple[int, int] | None  # MiB: ours, the peer's
    device: str


def comparisons(name: str, result: dict[str, Any]) -> Iterator[Comparison]:
    """The ratios of one result, wherever in it they stand.

    A ratio is {"median" or "ratio", "low", "high"} or {"median", "range"}, or those keys at the top of the file with
    "ratio_" before them; above 1 ours is faster.
    """
    for path, node in _dicts(result):
        ratio = _ratio(node)
        if ratio is None:
            continue
        parent = _parent(result, path)
        labels = [label for label in path if label not in _NAMELESS]
        peer = str(result.get("peer", "")) or re.sub(r"_over_ours$", "", ", ".join(labels)).replace("_", " ")
        memory = _memory(result, parent)
        device = f"{result.get('cpu') or result.get('device', '')}, torch {result.get('torch', '')}"
        yield Comparison(name, peer or "plain reference", *ratio, _share(result, parent, node), memory, device)


def _dicts(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict]]:
    if isinstance(node, dict):
        yield path, node
        for key, value in node.items():
            yield from _dicts(value, (*path, key))


def _parent(result: dict, path: tuple[str, ...]) -> dict:
    for key in path[:-1]:
        result = result[key]
    return result


def _ratio(node: dict) -> tuple[float, float, float] | None:
    median = node.get("median", node.get("ratio"))
    if not isinstance(median, int | float):
        return None
    low, high = (node.get(key, node.get(f"ratio_{key}")) for key in ("low", "high"))
    if "range" in node:
        low, high = node["range"]
    return (median, low, high) if low is not None and high is not None else None


def _share(result: dict, parent: dict, node: dict) -> float | None:
    """Ours, under one of the names that the benchmarks give it."""
    places = (node.get("our_gemm_peak_share"), result.get("share_of_gemm_peak"), result.get("ours_share_of_gemm_peak"))
    places = tuple(share["ours"] if isinstance(share, dict) else share for share in places)
    if isinstance(parent.get("ours"), dict):
        places += (parent["ours"].get("share_of_matmul_peak"),)
    return next((value for value in places if isinstance(value, float)), None)


def _memory(result: dict, parent: dict) -> tuple[int, int] | None:
    sides = (parent.get("ours"), parent.get("peer"))
    if all(isinstance(side, dict) and "peak_memory_mib" in side for side in sides):
        return sides[0]["peak_memory_mib"], sides[1]["peak_memory_mib"]
    values = result.get("peak_memory_mib_ours_plain")
    return (values[0], values[1]) if values else None


def all_comparisons(baselines: Path = BASELINES) -> list[Comparison]:
    """Of every result directly in ci/baselines/<device>/, in the order of the names."""
    return [
        comparison
        for path in sorted(baselines.glob("*/*.json"))
        if RESULTS.match(path.name) and path.parent.name not in ("counters", "outcomes")
        for comparison in comparisons(path.stem, json.loads(path.read_text(encoding="utf-8")))
    ]


def markdown(rows: list[Comparison]) -> str:
    text = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
    for row in rows:
        share = "" if row.share is None else f"{100 * row.share:.0f} %"
        memory = "" if row.memory is None else f"{row.memory[0]} / {row.memory[1]} MiB"
        ratio = f"{row.median:.2f} ({row.low:.2f} to {row.high:.2f})"
        text += f"| {row.benchmark} | {row.peer} | {ratio} | {share} | {memory} | {row.device} |\n"
    return text


def plain_table(result: dict[str, Any]) -> str:
    """A result with columns and rows, and below them on what it was measured."""
    lines = [result["columns"], ["---"] * len(result["columns"]), *result["rows"]]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{text}\n{result['cpu']}, {result['threads']} thread, torch {result['torch']}{result.get('note', '')}.\n"


def table_of(name: str, baselines: Path = BASELINES) -> str:
    if name == "peers":
        return markdown(all_comparisons(baselines))
    [path] = baselines.glob(f"*/table_{name}.json")
    return plain_table(json.loads(path.read_text(encoding="utf-8")))


def with_tables(text: str, table: Callable[[str], str] = table_of) -> str:
    """The document with the tables between its markers; unchanged without any."""
    return MARKED.sub(lambda found: f"<!-- {found[1]}:begin -->\n{table(found[1])}<!-- {found[1]}:end -->", text)


def rewrite() -> list[Path]:
    """Brings the documents' tables up to date; returns those that changed."""
    changed = []
    for path in SHOWN_IN:
        old = path.read_text(encoding="utf-8")
        new = with_tables(old)
        if new != old:
            path.write_text(new, encoding="utf-8")
            changed.append(path)
    return changed
