"""--amp_backend apex: native with a note in BEiT v2, refused where the loop cannot take it (ViT has its own test)."""

import importlib
import json

import pytest

from ci.training_cases import CASES, COUNTED
from common.errors import UsageError

ASKED = ["--amp_backend", "apex", "--fp16_opt_level", "O1"]


@pytest.fixture
def train(small_case, tmp_path):
    """Function (project, name of the run, precision, options) -> the losses of two steps."""

    def run(project: str, name: str, precision: str, *options: str) -> list[float]:
        case, output = CASES[project], tmp_path / name
        common = ["--log_every", "1", "--max_steps", "2"]
        arguments = case.command(small_case(project), COUNTED, output, "cpu", precision, *common, *options)
        importlib.import_module(case.entry).main(arguments)
        lines = [json.loads(text) for text in (output / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if line["kind"] == "train"]

    return run


def test_beit2_trains_natively_with_a_note(train):
    """There is no apex for this torch, so the flag means what native does."""
    plain = train("Beit2_for_PyTorch", "plain", "fp16", "--loss_scale", "128")
    with pytest.warns(UserWarning, match="--amp_backend apex: there is no apex for this torch"):
        assert train("Beit2_for_PyTorch", "apex", "fp16", "--loss_scale", "128", *ASKED) == plain


@pytest.mark.parametrize(
    ("project", "reason"),
    [("CLIP_for_PyTorch", "transformers' Trainer has only torch's own"), ("Data2vec_for_PyTorch", "fairseq's rules")],
)
def test_apex_is_refused_where_the_loop_cannot_take_it(train, project, reason):
    with pytest.raises(UsageError, match=f"--amp_backend apex: .*{reason}"):
        train(project, "run", "fp16", *ASKED)
