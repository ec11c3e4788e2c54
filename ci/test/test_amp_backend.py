"""--amp_backend apex: used by BEiT v2 where it is installed (by ViT in its own test), refused where it cannot be."""

import importlib
import json

import pytest

from ci.training_cases import CASES, COUNTED
from common import checkpoint_file
from common.errors import UsageError
from common.test.apex_stand_in import PACKAGE

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


def test_beit2_trains_under_apex(train, tmp_path, install_apex):
    with pytest.raises(UsageError, match="no apex.amp is installed"):
        train("Beit2_for_PyTorch", "absent", "fp16", *ASKED)
    install_apex(PACKAGE)
    with pytest.raises(UsageError, match="without --fp16_opt_level: give --fp16_opt_level O1"):
        train("Beit2_for_PyTorch", "level", "fp16", *ASKED[:2])
    plain = train("Beit2_for_PyTorch", "plain", "fp32")
    kept = ["--loss_scale", "128", "--case_kind", "acc"]
    assert train("Beit2_for_PyTorch", "apex", "fp16", *ASKED, *kept) == plain  # the stand-in does not cast
    saved = checkpoint_file.load(tmp_path / "apex" / "checkpoint.pth")
    assert saved["scaler"] == {"loss_scaler0": {"loss_scale": 128.0, "unskipped": 0}}
    # with torch's own mixed precision the run goes on, and its scale begins anew
    train("Beit2_for_PyTorch", "apex", "fp16", "--auto_resume", "--max_steps", "3", "--case_kind", "acc")
    assert checkpoint_file.load(tmp_path / "apex" / "checkpoint.pth")["scaler"]["scale"] >= 1.0


@pytest.mark.parametrize(
    ("project", "reason"),
    [("CLIP_for_PyTorch", "transformers' Trainer has only torch's own"), ("Data2vec_for_PyTorch", "fairseq's rules")],
)
def test_apex_is_refused_where_the_loop_cannot_take_it(train, project, reason, install_apex):
    install_apex(PACKAGE)
    with pytest.raises(UsageError, match=f"--amp_backend apex: .*{reason}"):
        train(project, "run", "fp16", *ASKED)
