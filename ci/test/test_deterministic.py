"""--deterministic in all projects: a second run and a cut and resumed one have the bits of the first, and
all are held to the stored curves of a CPU (ci/baselines/losses/cpu)."""

import json

import pytest

from ci.first_run.__main__ import CURVES, DRAWS_DROPOUT, LIMITS
from ci.gates import forked_ranks
from ci.training_cases import CASES, COUNTED, ROOT

STEPS, STOP = 6, 3
# options that save at STOP, those that the case has against going on, and those that make it go on
RESUME = {
    "ViT_for_PyTorch": ([], [], ["--resume_training", "auto"]),
    "Beit2_for_PyTorch": ([], ["--no_auto_resume"], []),
    # its schedule is over max_steps; in six steps a constant rate is within the curve's limit
    "CLIP_for_PyTorch": (["--lr_scheduler_type", "constant"], ["--overwrite_output_dir"], ["--resume", "auto"]),
    "Data2vec_for_PyTorch": (["checkpoint.no_save=false"], ["--resume", "none"], []),
}


def losses(run) -> list[float]:
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("project", RESUME)
def test_runs_are_equal_to_the_last_bit(project, tmp_path):
    case, (more, without, goes_on) = CASES[project], RESUME[project]
    data = tmp_path / "data"
    data.mkdir()
    case.prepare(data, COUNTED)

    def words(name: str, steps: int, *extra: str) -> list[str]:
        command = case.command(data, COUNTED, tmp_path / name, "cpu", "fp32", "--log_every", "1", "--seed", "1")
        if without:
            at = command.index(without[0])
            del command[at : at + len(without)]
        return [*command, "--max_steps", str(steps), "--save_every", str(STOP), *more, *extra]

    runs = [words("a", STEPS), words("b", STEPS), words("c", STOP), words("c", STEPS, *goes_on)]
    done = forked_ranks.run(ROOT / project / f"{case.entry}.py", (), *((1, run) for run in runs), DETERMINISTIC="1")
    assert done.returncode == 0, done.stdout[-4000:]
    first = losses(tmp_path / "a")
    assert len(first) == STEPS and losses(tmp_path / "b") == first
    assert losses(tmp_path / "c") == first, "cut after three steps and gone on"
    stored = json.loads((CURVES / "cpu" / f"{project}.json").read_text())["losses"]["fp32"][:STEPS]
    assert first == pytest.approx(stored, rel=max(LIMITS["fp32"], DRAWS_DROPOUT.get(project, 0.0) / 10))


def test_data2vec_on_two_ranks_is_one_rank_with_two_micro_batches(tmp_path):
    """Batches are dealt out in turn, and the sum of two gradients has no order. Nothing may be drawn by rank (dropout),
    and the teacher must step once an update. docs/on_a_card.md says why others differ."""
    project = "Data2vec_for_PyTorch"
    case = CASES[project]
    data = tmp_path / "data"
    data.mkdir()
    case.prepare(data, COUNTED)
    rest = ["--log_every", "1", "--seed", "1", "--max_steps", str(STEPS), "model.ema_steps=per_update"]
    rest += ["model.transformer.dropout=0", "model.transformer.attention_dropout=0"]

    def words(name: str, *more: str) -> list[str]:
        return case.command(data, COUNTED, tmp_path / name, "cpu", "fp32", *rest, *more)

    runs = (2, words("two")), (1, words("one", "optimization.update_freq=[2]"))
    done = forked_ranks.run(ROOT / project / f"{case.entry}.py", (), *runs, DETERMINISTIC="1")
    assert done.returncode == 0, done.stdout[-4000:]
    assert len(losses(tmp_path / "two")) == STEPS and losses(tmp_path / "two") == losses(tmp_path / "one")
