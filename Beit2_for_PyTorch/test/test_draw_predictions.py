"""draw_predictions.py: the figure, and its error for a file of another origin."""

import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from small_models import OPTIONS

import draw_predictions
import run_beitv2_pretraining
from beit2.prediction_figure import code_colours, code_patches
from beit2.token_accuracy import token_accuracy
from beit2.weights.files import read_checkpoint
from common.errors import UsageError


def test_figure_of_a_trained_model(pictures, tokenizer_file, tmp_path, capsys):
    data = ["--data_path", str(pictures / "train"), "--tokenizer_weight", str(tokenizer_file)]
    run = ["--model", "beit_test_cls_pt", "--epochs", "2", "--max_steps", "1", "--output_dir", str(tmp_path)]
    run_beitv2_pretraining.main([*OPTIONS, *data, *run])
    figure = tmp_path / "new folder/figure.png"
    checkpoint = ["--checkpoint", str(tmp_path / "checkpoint.pth")]
    draw_predictions.main([*checkpoint, *data, "--output", str(figure), "--count", "3"])
    width, height = Image.open(figure).size
    assert height > width > 200  # four rows of three
    said = capsys.readouterr().out
    right, commonest = map(float, re.search(r"right: ([\d.]+) %; their commonest token: ([\d.]+) %", said).groups())
    assert 0 <= right <= 100 and 0 < commonest <= 100
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


class BrightnessTokenizer:
    """Two patches side by side; a patch's token is 1 where it is bright, and there is a third that none has."""

    window_size, n_code = (1, 2), 3

    def get_codebook_indices(self, visual):
        return torch.stack([half.mean(dim=(1, 2, 3)) > 0.5 for half in visual.chunk(2, dim=-1)], dim=1).long()


def test_a_code_is_drawn_as_the_mean_of_its_patches():
    dark, bright, brighter = (torch.full((3, 4, 4), value) for value in (0.1, 0.6, 0.8))
    visual = torch.stack([torch.cat((dark, bright), dim=2), torch.cat((dark, brighter), dim=2)])
    patches = code_patches(BrightnessTokenizer(), visual)
    assert patches.shape == (3, 3, 4, 4)
    assert [round(float(patch.mean()), 6) for patch in patches] == [0.1, 0.7, 0.5]


def test_accuracy_is_of_masked_patches_alone(monkeypatch):
    """Pictures that are bright on the left; the model says bright everywhere; the left is masked in three of four."""
    picture = torch.cat((torch.ones(3, 4, 4), torch.zeros(3, 4, 4)), dim=2)
    masks = torch.tensor([[[1, 0]], [[1, 0]], [[1, 0]], [[0, 1]]], dtype=torch.bool)
    dataset = {(0, number): SimpleNamespace(picture=picture, mask=mask) for number, mask in enumerate(masks)}
    normalizer = SimpleNamespace(views=lambda batch: (batch.pictures, batch.pictures))

    def always_bright(images, mask):
        return torch.tensor([0.0, 1.0, 0.0]).repeat(int(mask.sum()), 1)

    monkeypatch.setattr("beit2.token_accuracy.collate", stacked)
    score = token_accuracy(always_bright, BrightnessTokenizer(), dataset, range(4), normalizer)
    assert score == (75.0, 75.0)


def stacked(samples):
    pictures, masks = ([getattr(sample, name) for sample in samples] for name in ("picture", "mask"))
    return SimpleNamespace(pictures=torch.stack(pictures), mask=torch.stack(masks))
