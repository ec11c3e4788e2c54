"""--deterministic in ViT, BEiT v2 and data2vec: a second run and a cut and resumed one have the bits of the first, and
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
