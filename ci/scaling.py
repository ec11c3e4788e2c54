"""Predicts step time, all-reduce time and memory of every project on 1 to 1,000 cards; checks the model; draws it.

    make scaling                                              this CPU's steps, links as assumed below
    python -m ci.scaling --size full --device npu             the real models' steps, on one card
    python -m ci.scaling --inter_gbps 25 --step_seconds CLIP=0.145/64   one card's step of 64 samples takes 0.145 s

Per project one device is measured (`ci/scaling_measure.py`): seconds T1 of a step, bytes G of its gradients, of what
stays in memory and of what backward needs. Links have a latency a and a bandwidth b. Then, for N cards:

  ring all-reduce      R(S, N) = 2 (N - 1) (a + S / (N b)): N - 1 steps of reduce-scatter, as many of all-gather, each
                       of S / N bytes. Thakur, Rabenseifner, Gropp 2005 (IJHPCA 19:1) have the a-b model, Patarasuk and
                       Yuan 2009 (JPDC 69:2) show that no algorithm moves fewer bytes.
  several servers      reduce-scatter inside a server of C cards, R of each card's S / C bytes between the servers over
                       the card's own network interface, all-gather inside the server.
  overlap (DDP)        gradients leave in buckets of 25 MiB as backward produces them (Li et al. 2020, VLDB 13:12);
                       backward is 2/3 of T1, and buckets are ready in equal parts of it, k-th at r_k:
                       exposed = max over k of (r_k + sum over i >= k of R(S_i, N)) - r_last.
                       data2vec reduces one flat buffer after backward: nothing is hidden, exposed = R(G, N).
  FSDP                 two all-gathers of the weights (half their bytes, bf16), one reduce-scatter of fp32 gradients;
                       all but the first unit's gather and the last unit's reduce-scatter may hide behind T1.
  CLIP                 every rank gathers all features and reduces their gradients: E bytes a rank, so N E in all:
                       exposed too = all-gather of N E + R(N E, N). It grows with N whatever the links do.
  step time            T(N) = T1 + exposed.
  memory, DDP          what stays + gradients + what backward needs: the same for every N.
  memory, FSDP         weights, gradients and optimizer state divide by N; two gathered units do not.

Not in it: trees, which libraries take instead of rings for small buckets on many servers (a ring's latency grows with
their number, a tree's with its logarithm), slow cards and hosts that all others wait for, shared switches, data loading
and file systems, and the growth of CLIP's N-fold logits. So it is a bound from below, and a measured run on two servers
should replace its constants.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ci.namespace_servers import NotPermitted
from ci.scaling_measure import MEGABYTE, measure_all_reduce, measure_step
from ci.training_cases import CASES, SIZES, TIMED, short_names

BUCKET = 25 * 2**20
BACKWARD = 2 / 3  # of a step: backward has twice the products of forward
CARDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
NO_OVERLAP = ("Data2vec_for_PyTorch",)
FSDP = ("ViT_for_PyTorch", "Beit2_for_PyTorch")
# bytes a sample of the features that CLIP exchanges: picture and caption, 512 numbers of 4 bytes each
FEATURE_BYTES = {"CLIP_for_PyTorch": 2 * 512 * 4}
TEST_MEGABITS = 100
FITTED, HELD_OUT = (400_000, 4_000_000), (1_000_000, 2_000_000)  # bytes


@dataclass(frozen=True)
class Link:
    """Latency in seconds, bandwidth in bytes a second."""

    latency: float
    bandwidth: float

    def reduce_scatter(self, size: float, ranks: int) -> float:
        """Seconds; an all-gather takes as long."""
        return (ranks - 1) * (self.latency + size / (ranks * self.bandwidth))

    def all_reduce(self, size: float, ranks: int) -> float:
        return 2 * self.reduce_scatter(size, ranks)


@dataclass(frozen=True)
class Cluster:
    """Servers of some cards: the link between cards of a server, and that of each card to other servers."""

    intra: Link
    inter: Link
    cards_per_server: int = 8

    def reduce_scatter(self, size: float, cards: int) -> float:
        inside = min(cards, self.cards_per_server)
        return self.intra.reduce_scatter(size, inside) + self.inter.reduce_scatter(
            size / inside, -(-cards // self.cards_per_server)
        )

    def all_reduce(self, size: float, cards: int) -> float:
        return 2 * self.reduce_scatter(size, cards)


def exposed(buckets: Sequence[float], backward: float, all_reduce: Callable[[float], float]) -> float:
    """Seconds that a step waits for its buckets (bytes, in the order in which backward hands them out)."""
    ready = [(k + 1) / len(buckets) * backward for k in range(len(buckets))]
    times = [all_reduce(size) for size in buckets]
    return max(at + sum(times[k:]) for k, at in enumerate(ready)) - backward


def in_buckets(size: float) -> list[float]:
    whole = int(size // BUCKET)
    return [float(BUCKET)] * whole + [size - whole * BUCKET] * (size > whole * BUCKET)


def predict(step: dict[str, Any], cluster: Cluster, cards: int) -> dict[str, float]:
    """Of one project on `cards` cards: seconds of a step and of its all-reduce, efficiency, bytes of memory."""
    project, alone, gradients = step["project"], step["step_s"], step["gradient_bytes"]
    memory = step["state_bytes"] + gradients + step["activation_bytes"]
    result = {"cards": cards, "all_reduce_s": cluster.all_reduce(gradients, cards)}
    wait = 0.0
    if cards > 1:
        backward = 0.0 if project in NO_OVERLAP else BACKWARD * alone
        buckets = [float(gradients)] if project in NO_OVERLAP else in_buckets(gradients)
        wait = exposed(buckets, backward, lambda size: cluster.all_reduce(size, cards))
        features = FEATURE_BYTES.get(project, 0) * step["samples"] * cards
        if features:
            wait += 3 * cluster.reduce_scatter(features, cards)
    result |= {"step_s": alone + wait, "efficiency": alone / (alone + wait), "memory_bytes": memory}
    if project in FSDP:
        moved = 2 * cluster.reduce_scatter(gradients / 2, cards) + cluster.reduce_scatter(gradients, cards)
        ends = cluster.reduce_scatter(1.5 * step["unit_bytes"], cards)
        wait = max(ends, moved - alone) if cards > 1 else 0.0
        sharded = 4 * gradients  # weights, gradients, two moments
        result["fsdp_step_s"] = alone + wait
        result["fsdp_memory_bytes"] = memory - sharded + sharded / cards + 2 * step["unit_bytes"] * (cards > 1)
    return result


def fit(times: dict[int, float], ranks: int) -> Link:
    """Latency and bandwidth from all-reduces of two sizes."""
    (small, large), rounds = sorted(times), 2 * (ranks - 1)
    bandwidth = rounds / ranks * (large - small) / (times[large] - times[small])
    return Link(max(0.0, times[small] / rounds - small / ranks / bandwidth), bandwidth)


def validate() -> dict[str, Any]:
    """The model against gloo: fitted on two sizes between two ranks, then asked about other sizes, ranks and a step.

    Raises:
        NotPermitted: no network namespaces here.
    """
    buckets, pause = [500_000.0] * 4, 0.3
    measured = {
        n: measure_all_reduce(n, TEST_MEGABITS, [*FITTED, *HELD_OUT], list(map(int, buckets)), pause) for n in (2, 4)
    }
    link = fit({size: measured[2]["sizes"][size] for size in FITTED}, 2)
    rows = []
    for ranks, result in measured.items():
        asked = [(f"all-reduce of {size / MEGABYTE:g} MB", seconds, link.all_reduce(size, ranks))
                 for size, seconds in result["sizes"].items() if ranks > 2 or size in HELD_OUT]  # fmt: skip
        waits = exposed(buckets, pause, lambda size, ranks=ranks: link.all_reduce(size, ranks))
        asked.append((f"step of {pause} s and {len(buckets)} buckets of 0.5 MB", result["step"], pause + waits))
        rows += [{"ranks": ranks, "what": what, "measured_s": seconds, "predicted_s": expected,
                  "error": expected / seconds - 1} for what, seconds, expected in asked]  # fmt: skip
    return {
        "links": f"{TEST_MEGABITS} Mbit/s each, by tc in network namespaces",
        "fitted": {"latency_s": link.latency, "megabytes_a_second": link.bandwidth / MEGABYTE},
        "rows": rows,
        "largest_error": max(abs(row["error"]) for row in rows),
    }


def draw(predictions: dict[str, list[dict[str, float]]], path: Path, title: str) -> None:
    """Four panels over the number of cards: efficiency, step, all-reduce, memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [("efficiency", "efficiency, T1 / T(N)", 100, "%"), ("step_s", "step", 1000, "ms"),
              ("all_reduce_s", "all-reduce of the gradients, not hidden", 1000, "ms"),
              ("memory_bytes", "memory a card", 1 / 2**30, "GiB")]  # fmt: skip
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    for axis, (key, name, factor, unit) in zip(axes.flat, panels, strict=True):
        for project, rows in predictions.items():
            cards = [row["cards"] for row in rows]
            (line,) = axis.plot(cards, [factor * row[key] for row in rows], marker=".", label=project.split("_")[0])
            if f"fsdp_{key}" in rows[0]:
                values = [factor * row[f"fsdp_{key}"] for row in rows]
                axis.plot(cards, values, "--", color=line.get_color(), label=f"{project.split('_')[0]}, FSDP")
        axis.set(xscale="log", xlabel="cards", ylabel=unit, title=name, ylim=(0, None))
        axis.legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def report(steps: list[dict], predictions: dict[str, list[dict]], checked: dict | str) -> str:
    """The tables, as text."""
    lines = ["measured on one device:"]
    for step in steps:
        numbers = {k: step[k] / MEGABYTE for k in ("gradient_bytes", "state_bytes", "activation_bytes")}
        megabytes = ", ".join(f"{name.removesuffix('_bytes')} {value:.1f} MB" for name, value in numbers.items())
        lines.append(f"  {step['project']:22} {step['step_s']:8.4f} s a step of {step['samples']} samples; {megabytes}")
    for project, rows in predictions.items():
        lines.append(f"\n{project}: cards, step ms, all-reduce ms, efficiency %, memory MB (DDP / FSDP)")
        for row in rows:
            sharded = f" / {row['fsdp_memory_bytes'] / MEGABYTE:.1f}" if "fsdp_memory_bytes" in row else ""
            lines.append(
                f"  {row['cards']:5} {1000 * row['step_s']:10.2f} {1000 * row['all_reduce_s']:10.2f} "
                f"{100 * row['efficiency']:7.1f} {row['memory_bytes'] / MEGABYTE:10.1f}{sharded}"
            )
    if isinstance(checked, str):
        return "\n".join([*lines, f"\nthe model was not checked: {checked}"])
    lines.append(f"\nthe model against gloo, {checked['links']}; fitted: {checked['fitted']}")
    for row in checked["rows"]:
        lines.append(f"  {row['ranks']} ranks, {row['what']:44} measured {row['measured_s']:.4f} s, "
                     f"predicted {row['predicted_s']:.4f} s, {100 * row['error']:+.1f} %")  # fmt: skip
    return "\n".join([*lines, f"  largest error {100 * checked['largest_error']:.1f} %"])


def given_steps(parser: argparse.ArgumentParser, texts: Sequence[str]) -> dict[str, dict[str, float]]:
    """{"CLIP_for_PyTorch": {"step_s": 0.145, "samples": 64}} of ["CLIP=0.145/64"]."""
    steps = {}
    for text in texts:
        try:
            name, value = text.split("=")
            seconds, samples = value.split("/")
            steps[short_names([name])[0]] = {"step_s": float(seconds), "samples": int(samples)}
        except ValueError as error:
            parser.error(f"--step_seconds {text}: write PROJECT=SECONDS/SAMPLES ({error})")
    return steps


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--projects", nargs="+", help="default: all")
    parser.add_argument("--size", choices=SIZES, default=TIMED, help="of the models whose step is measured")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument(
        "--step_seconds", nargs="*", default=[], metavar="PROJECT=S", help="instead of what is measured"
    )
    parser.add_argument("--intra_gbps", type=float, default=160, help="Gbit/s between cards of a server; an assumption")
    parser.add_argument("--inter_gbps", type=float, default=100, help="Gbit/s of a card's network; an assumption")
    parser.add_argument("--intra_latency_us", type=float, default=10, help="of one message; an assumption")
    parser.add_argument("--inter_latency_us", type=float, default=30, help="of one message; an assumption")
    parser.add_argument("--cards_per_server", type=int, default=8)
    parser.add_argument("--skip_check", action="store_true", help="only predict; do not measure all-reduces")
    parser.add_argument("--output_dir", type=Path, default=Path("ci/reports/scaling"))
    options = parser.parse_args(argv)
    given = given_steps(parser, options.step_seconds)
    steps = []
    for project in short_names(options.projects) if options.projects else CASES:
        step = measure_step(project, options.size, options.device, options.precision)
        steps.append(step | given.get(project, {}))
    cluster = Cluster(
        Link(options.intra_latency_us * 1e-6, options.intra_gbps * 1e9 / 8),
        Link(options.inter_latency_us * 1e-6, options.inter_gbps * 1e9 / 8),
        options.cards_per_server,
    )
    predictions = {step["project"]: [predict(step, cluster, cards) for cards in CARDS] for step in steps}
    try:
        checked: dict | str = "--skip_check" if options.skip_check else validate()
    except NotPermitted as reason:
        checked = str(reason)
    links = (
        f"{options.intra_gbps:g} / {options.inter_gbps:g} Gbit/s inside / between servers of {options.cards_per_server}"
    )
    step_of = "given steps" if given else f"steps of one {options.device} device, {options.precision}"
    title = f"predicted, not measured: {options.size} models, {step_of}, {links}"
    options.output_dir.mkdir(parents=True, exist_ok=True)
    draw(predictions, options.output_dir / "scaling.png", title)
    content = {"what": title, "steps": steps, "predictions": predictions, "check": checked}
    (options.output_dir / "scaling.json").write_text(json.dumps(content, indent=1) + "\n")
    print(report(steps, predictions, checked))
    print(f"\nwritten to {options.output_dir}/scaling.json and scaling.png")
    return content


if __name__ == "__main__":
    main()
