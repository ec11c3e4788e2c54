"""The paired speed gate: verdicts on simulated hosts, and real processes of a real project."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ci.gates import revisions
from ci.gates.paired import gate as perf_ab
from ci.gates.paired import report as perf_report
from ci.gates.paired.verdict import FAIL, INCONCLUSIVE, PASS, slowdown, verdict, why_untrusted
from ci.training_cases import Case
from common.errors import UsageError


class SimulatedHost:
    """Programs whose steps take a known time, on a host whose speed drifts, jumps and favours some processes."""

    def __init__(self, noise: float, favour: float = 0.004, seed: int = 0):
        self.generator = np.random.default_rng(seed)
        self.noise, self.favour, self.calls, self.started = noise, favour, 0, 0

    def start(self, cost: float) -> perf_ab.Stepper:
        host, bias = self, np.exp(self.generator.normal(0, self.favour))
        self.started += 1

        class Program:
            def run(self, steps: int) -> tuple[float, int]:
                host.calls += 1
                drift = 1 + 0.5 * np.sin(host.calls / 40) + 0.002 * host.calls  # other work comes and goes
                return steps * cost * bias * drift * np.exp(host.generator.normal(0, host.noise)), 4 * steps

            def close(self) -> None:
                host.started -= 1

        return Program()

    def judge(self, head_cost: float, end: float = np.inf):
        plan = perf_ab.Plan(block_s=0.5, end=end)
        pair = lambda *costs: lambda: tuple(self.start(0.1 * cost) for cost in costs)  # noqa: E731
        return perf_ab.judge(pair(1.0, 1.0), pair(1.0, head_cost), plan)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("cost", "expected"), [(1.0, PASS), (1.10, FAIL), (0.90, PASS)])
def test_verdicts_on_a_host_with_ordinary_noise(cost, expected, seed):
    host = SimulatedHost(noise=0.02, seed=seed)
    outcome, reason, itself, both = host.judge(cost)
    assert outcome == expected, reason
    assert why_untrusted(slowdown(itself.rounds), 3.0) is None
    interval = slowdown(both.rounds)
    assert abs(interval.median - 100 * (cost - 1)) < 2 and interval.low < interval.median < interval.high
    assert host.started == 0  # every process was ended
    base, head = (np.median(speeds) for speeds in both.speeds)
    assert base / head == pytest.approx(cost, rel=0.03)


def test_a_noisy_host_says_so_itself():
    for seed in range(2):
        outcome, reason, itself, both = SimulatedHost(noise=0.5, seed=seed).judge(1.10)
        assert outcome == INCONCLUSIVE and both is None and len(itself.rounds) == perf_ab.Plan.max_rounds
        assert "too noisy for 3 %" in reason
    outcome, reason, *_ = SimulatedHost(noise=0.001, favour=0.0).judge(1.03)  # at the threshold: no answer
    assert outcome == INCONCLUSIVE and "around 3 %" in reason


def test_it_ends_in_time(monkeypatch):
    """A second a call: a round of 2 + 4 x 6 calls has 26. What is known by then is a verdict, or it is not."""
    for end, rounds, expected in ((250, (4, 4), PASS), (150, (2, 3), PASS), (60, (1, 0), INCONCLUSIVE)):
        host = SimulatedHost(noise=0.001, favour=0.0)
        monkeypatch.setattr(perf_ab, "time", SimpleNamespace(monotonic=lambda host=host: float(host.calls)))
        outcome, reason, itself, both = host.judge(1.0, end)
        assert (outcome, len(itself.rounds), len(both.rounds) if both else 0) == (expected, *rounds), end
        assert host.calls <= end and host.started == 0
    assert "give more --minutes" in reason


def test_processes_that_are_favoured_are_noise_between_starts():
    """Many pairs of the same two processes repeat one bias; only several starts show how large it is."""
    generator = np.random.default_rng(3)
    biases = generator.normal(0, 0.03, 6)
    rounds = [list(generator.normal(bias, 0.001, 50)) for bias in biases]
    interval = slowdown(rounds)
    assert interval.high - interval.low > 3  # percent; the pairs alone would say 0.1
    with pytest.raises(ValueError, match="at least two rounds"):
        slowdown(rounds[:1])
    preferring = slowdown([[0.02, 0.021, 0.022]] * 4)
    assert "prefers one" in why_untrusted(preferring, 3.0) and verdict(preferring, 3.0) == PASS


RUN_LOG = """
import contextlib

class RunLog:
    def step(self, step, samples):
        pass

    @contextlib.contextmanager
    def data_wait(self):
        yield
"""
ENTRY = """
from common.run_log import RunLog

def main(argv):
    log = RunLog()
    if BROKEN:
        raise ValueError("planted")
    for step in range(1, 10**9):
        with log.data_wait():
            sum(range(2_000))  # not part of a step, however long it takes
        sum(range(WORK))
        log.step(step, samples=2)
"""


@pytest.fixture
def made_up_project(tmp_path, monkeypatch):
    """make(name, work, broken) writes a checkout whose project does nothing but cost time: real processes, no torch."""

    def make(name: str, work: int, broken: bool = False) -> Path:
        tree = tmp_path / name
        for path, text in (("common/run_log.py", RUN_LOG), ("Made_up/made_up.py", ENTRY)):
            (tree / path).parent.mkdir(parents=True)
            (tree / path).write_text(text.replace("WORK", str(work)).replace("BROKEN", str(broken)))
        return tree

    case = Case("Made_up", "made_up", lambda folder, size: None, lambda folder, size: [])
    monkeypatch.setitem(perf_ab.CASES, "Made_up", case)
    return make


# wide: a busy machine is not to decide over this test
PLAN = perf_ab.Plan(pairs=4, rounds=2, max_rounds=8, block_s=0.02, threshold=40.0)


def test_processes_are_measured_by_turns(made_up_project):
    same, slower = made_up_project("same", 20_000), made_up_project("slower", 60_000)
    row = perf_ab.compare_project("Made_up", (same, same), PLAN, "counted", "cpu", "fp32", plant=0.0)
    assert row.verdict == PASS, row.reason
    row = perf_ab.compare_project("Made_up", (same, slower), PLAN, "counted", "cpu", "fp32", plant=0.0)
    assert row.verdict == FAIL and row.slowdown.median > 100, row.reason
    assert row.base_speed / row.head_speed == pytest.approx(1 + row.slowdown.median / 100, rel=0.3)


def test_a_side_that_cannot_train_is_named(made_up_project):
    """A head that breaks is a FAIL with its last lines; a base that cannot run the case cannot be compared with."""
    good, broken = made_up_project("good", 1000), made_up_project("broken", 1000, broken=True)
    row = perf_ab.compare_project("Made_up", (broken, good), PLAN, "counted", "cpu", "fp32", 0.0)
    assert row.verdict == INCONCLUSIVE and row.reason.startswith("base") and "ValueError: planted" in row.reason
    row = perf_ab.compare_project("Made_up", (good, broken), PLAN, "counted", "cpu", "fp32", 0.0)
    assert row.verdict == FAIL and row.reason.startswith("head") and "ValueError: planted" in row.reason
    assert perf_ab.worst([PASS, INCONCLUSIVE]) == INCONCLUSIVE and perf_ab.worst([INCONCLUSIVE, FAIL]) == FAIL


def test_a_real_project_steps_when_it_is_told(tmp_path):
    """ViT, once as it is and once with each step made three times as long."""
    case = perf_ab.CASES["ViT_for_PyTorch"]
    case.prepare(tmp_path, "counted")
    workers = []
    for name, plant in (("a", 0.0), ("b", 2.0)):
        command = case.command(tmp_path, "counted", tmp_path / name, "cpu", "fp32")
        workers.append(perf_ab.Worker(revisions.ROOT, case, command, "cpu", tmp_path / f"{name}.log", plant))
    for worker in workers:
        worker.wait_until_warm()
    comparison = perf_ab.Comparison()
    perf_ab.measure_round(*workers, perf_ab.Plan(pairs=3, block_s=0.1), comparison)
    assert np.median(comparison.rounds[0]) > np.log(1.5)
    _, samples = workers[0].run(3)
    assert samples == 3 * 4
    for worker in workers:
        worker.close()
    assert "Error" not in (tmp_path / "a.log").read_text()


def test_the_command_reports(made_up_project, tmp_path, monkeypatch, capsys):
    tree = made_up_project("tree", 20_000)
    monkeypatch.setattr(revisions, "checkout", lambda revision: contextlib.nullcontext(tree))
    monkeypatch.setattr(perf_ab, "short_names", lambda names: names)
    arguments = ["HEAD", "HEAD", "--project", "Made_up", "--rounds", "2", "--pairs", "4", "--block_s", "0.02"]
    arguments += ["--threshold", "40", "--reports", str(tmp_path)]
    assert perf_ab.main([*arguments, "--plant", "200"]) == perf_ab.EXIT_CODES[FAIL]
    said = capsys.readouterr().out
    assert said.startswith("Made_up: PASS, FAIL or INCONCLUSIVE within 10 minutes\nFAIL Made_up: a step takes +")
    assert perf_ab.main(arguments) == perf_ab.EXIT_CODES[PASS]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["verdict"] == PASS and report["rows"][0]["rounds"] >= 2
    assert "| Made_up (timed, fp32) | PASS |" in (tmp_path / "report.md").read_text()
    assert report["rows"][0]["head_speed"] > 0


def test_changed_files_name_their_projects():
    assert revisions.projects_of(["CLIP_for_PyTorch/run_clip.py", "ViT_for_PyTorch/README.md"]) == ["CLIP_for_PyTorch"]
    assert revisions.projects_of(["ViT_for_PyTorch/test/test_model.py", "ci/gates/counters/gate.py", "README.md"]) == []
    assert len(revisions.projects_of(["common/device.py"])) == 4
    with pytest.raises(UsageError, match="no-such-revision"):
        revisions.commit_of("no-such-revision")
    with pytest.raises(UsageError, match="unknown project"):
        perf_ab.main(["HEAD", "HEAD", "--project", "nothing"])
    with pytest.raises(UsageError, match="--rounds"):
        perf_ab.main(["HEAD", "HEAD", "--rounds", "1"])


def test_a_revision_s_folder_goes_when_the_command_is_ended():
    with pytest.raises(SystemExit):
        with revisions.checkout("HEAD") as tree:
            assert (tree / "common" / "run_log.py").is_file() and (tree / ".git").is_file()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    assert not tree.exists() and str(tree) not in revisions.git("worktree", "list")
    with revisions.checkout(".") as tree:
        assert tree == revisions.ROOT


def test_report_of_several_projects(tmp_path):
    run = perf_report.Run("a" * 40, "b" * 40 + "+", "cpu", 3.0, 0.0, FAIL)
    generator = np.random.default_rng(0)
    rows = []
    for project, outcome, centre in (("ViT", PASS, 0.0), ("CLIP", FAIL, 0.1), ("Beit2", INCONCLUSIVE, 0.03)):
        both, itself = perf_ab.Comparison(), perf_ab.Comparison()
        both.rounds = [list(generator.normal(centre, 0.01, 6)) for _ in range(4)]
        itself.rounds = [list(generator.normal(0, 0.01, 6)) for _ in range(4)]
        both.speeds = itself.speeds = ([10.0], [9.0])
        row = perf_report.Row(f"{project}_for_PyTorch", "timed", "fp32", outcome, "why\nand <how>")
        row.record(itself, both)
        rows.append(row)
    text = perf_report.write(run, rows, tmp_path).read_text()
    assert text.startswith("# Speed of a training step: FAIL") and "- **FAIL** CLIP_for_PyTorch: why and <how>" in text
    assert Path(tmp_path / "ratios.png").stat().st_size > 10_000
