"""draw_predictions.py: the figure, and its error for a file of another origin."""

import pytest
import torch
from PIL import Image
from small_models import OPTIONS

import draw_predictions
import run_beitv2_pretraining
from beit2.prediction_figure import code_colours
from beit2.weights.files import read_checkpoint
from common.errors import UsageError


def test_figure_of_a_trained_model(pictures, tokenizer_file, tmp_path):
    data = ["--data_path", str(pictures / "train"), "--tokenizer_weight", str(tokenizer_file)]
    run = ["--model", "beit_test_cls_pt", "--epochs", "2", "--max_steps", "1", "--output_dir", str(tmp_path)]
    run_beitv2_pretraining.main([*OPTIONS, *data, *run])
    figure = tmp_path / "new folder/figure.png"
    checkpoint = ["--checkpoint", str(tmp_path / "checkpoint.pth")]
    draw_predictions.main([*checkpoint, *data, "--output", str(figure), "--count", "3"])
    width, height = Image.open(figure).size
    assert height > width > 200  # four rows of three
    kept = read_checkpoint(tmp_path / "checkpoint.pth")
    for ours in ("init_cls_pt_layers", "random_tokenizer", "precision"):  # options that the reference does not know
        delattr(kept["args"], ours)
    torch.save(kept, tmp_path / "theirs.pth")
    draw_predictions.main(["--checkpoint", str(tmp_path / "theirs.pth"), *data, "--output", str(figure)])
    assert Image.open(figure).size[0] > width
    with pytest.raises(UsageError) as caught:
        draw_predictions.main(["--checkpoint", str(tokenizer_file), *data])
    assert "no args in it" in caught.value.message


def test_near_codes_get_near_colours():
    torch.manual_seed(0)
    codes = torch.nn.functional.normalize(torch.randn(64, 8), dim=1)
    codes = torch.cat((codes, codes[:1] + 1e-4))
    colours = code_colours(codes)
    assert colours.shape == (65, 3) and 0 <= colours.min() and colours.max() <= 1
    assert (colours[0] - colours[-1]).abs().max() < 0.01
    assert colours.std(dim=0).min() > 0.1
