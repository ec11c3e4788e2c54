"""The page of a first run: a table, advice from the profiles, and one sentence about what is wrong first."""

from __future__ import annotations

import re
from dataclasses import dataclass

WAITS_FOR_DATA = 10.0  # percent of a step from which the loader is the first thing to mend
SYNCS = 10.0  # host waits a step; here every step has a log line, which reads each of its values


@dataclass
class Run:
    """What twenty steps of one project in one precision came to."""

    project: str
    precision: str
    problem: str = ""
    losses: tuple[float, ...] = ()
    gap: float | None = None
    fps: str = ""
    memory: str = ""
    step_ms: str = ""
    reference: str = "the CPU"
    profile: str = ""  # summary.txt of a profiled run
    mfu: str = ""  # percent; empty where it is not known
    peak: str = ""  # what it is over, in words

    def profiled(self, pattern: str) -> str:
        """What the profile's page says, by a pattern with one group; empty without one."""
        found = re.search(pattern, self.profile, re.M)
        return found.group(1).strip() if found else ""

    @property
    def data_wait(self) -> str:
        return self.profiled(r"^wait for data .*?([\d.]+) %$")

    @property
    def host_waits(self) -> str:
        return self.profiled(r"^host syncs +([\d.]+) a step")


def hints(runs: list[Run]) -> list[str]:
    """What the profiles advise, a line each."""
    lines = []
    for run in runs:
        if run.data_wait and float(run.data_wait) > WAITS_FOR_DATA:
            lines.append(
                f"{run.project}: {run.data_wait} % of a step waits for data: more --num_workers, or packed files"
            )
        if run.host_waits and float(run.host_waits) > SYNCS:
            what = run.profiled(r"^host syncs +[\d.]+ a step: (.*?)(?: \(reads|$)")
            lines.append(f"{run.project}: the host waits {run.host_waits} times a step: {what}")
        if heaviest := run.profiled(r"calls a step  operator\n(.*)$"):
            share, name = heaviest.split()[1], heaviest.split()[-1]
            lines.append(f"{run.project}: most time is in {name}, {share} %")
    return lines


def advice(runs: list[Run], doctor_failed: bool) -> str:
    """What to look at first, in the order in which causes lie behind one another."""
    bad = [run for run in runs if run.problem]
    if doctor_failed and bad:
        return "Start with the first line that the doctor calls wrong: what follows may come from it."
    if doctor_failed:
        return "Every run ended with the right losses; what the doctor calls wrong is left, its first line first."
    if not bad:
        return "Nothing is wrong: every run ended, and its losses are the stored ones within their limits."
    crashed = [run for run in bad if not run.losses]
    if crashed:
        run = crashed[0]
        return (
            f"Start with {run.project} in {run.precision}: {run.problem}. NPU_PRESET=debug names the line that failed."
        )
    names = {run.project for run in bad}
    if len(names) > 1 or any(run.precision == "fp32" for run in bad):
        run = next((run for run in bad if run.precision == "fp32"), bad[0])
        return (
            f"Start with {run.project} in {run.precision}: {run.problem}. Leave the device's patches out one by one "
            "(NPU_PATCHES_OFF=NAME), and let `--dump_precision` name the first layer that differs (docs/on_a_card.md)."
        )
    return (
        f"Only half precision differs, in {', '.join(sorted(names))}: compare fp16 with bf16; look at the loss scale."
    )


def page(device: str, head: str, doctor: str, doctor_failed: bool, runs: list[Run]) -> str:
    """The page; `head` says what was run."""
    lines = [f"# First run on {device}", "", "```", doctor.strip(), "```", "", f"{head}, deterministic.", ""]
    lines += [
        "| project | precision | first, last loss | away from the stored | samples/s | step, ms | MFU | memory, MiB "
        "| host waits a step | waits for data | problem |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|---|---|"]
    for run in runs:
        ends = f"{run.losses[0]:.4f}, {run.losses[-1]:.4f}" if run.losses else ""
        gap = "" if run.gap is None else f"{100 * run.gap:.3f} % ({run.reference})"
        data = f"{run.data_wait} %" if run.data_wait else ""
        mfu = f"{run.mfu} %" if run.mfu else ""
        cells = [run.project, run.precision, ends, gap, run.fps, run.step_ms, mfu, run.memory, run.host_waits, data]
        lines.append(f"| {' | '.join([*cells, run.problem or 'none'])} |")
    lines += ["", "Speed and memory are those of tiny models; the profiled rows have the profiler's cost in them.", ""]
    if peaks := {run.precision: run.peak for run in runs if run.peak}:  # measured ones differ a little between runs
        lines += [f"MFU: FLOPs of a step's matrix products, over {', '.join(peaks.values())}.", ""]
    lines += [f"- {hint}" for hint in hints(runs)]
    return "\n".join([*lines, "", f"**{advice(runs, doctor_failed)}**", ""])
