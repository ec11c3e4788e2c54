"""Every project on eight ranks of a CPU. (ViT's is in its own test_shell.py, through its 8p script.)"""

import json
import math

import pytest

from ci.gates.forked_ranks import run
from ci.training_cases import CASES, COUNTED, ROOT
from common.run import result_file

STEPS = 2


@pytest.mark.parametrize("project", ["Beit2_for_PyTorch", "CLIP_for_PyTorch", "Data2vec_for_PyTorch"])
def test_eight_ranks_train_as_one_run(project, small_case, tmp_path):
    case = CASES[project]
    options = ["--log_every", "1", "--max_steps", str(STEPS)]
    arguments = case.command(small_case(project), COUNTED, tmp_path / "output", "cpu", "fp32", *options)
    done = run(ROOT / project / f"{case.entry}.py", [], (8, arguments))
    assert done.returncode == 0, done.stdout
    result = result_file.read(next((tmp_path / "output").glob("*_8p_perf.log")))
    assert result["Status"] == "OK" and result["RankSize"] == "8"
    lines = [json.loads(text) for text in (tmp_path / "output" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == STEPS and all(math.isfinite(loss) for loss in losses)
