"""The retrieval protocol: several captions a picture, ties, chunks."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clip_pretraining import recall_at_k
from clip_pretraining.evaluation.retrieval import ranks

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "recall.json").read_text())
TENSORS = load_file(GOLDEN / "recall.safetensors")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk", [7, 1024])
def test_recall_is_exact(case, chunk):
    image, text, owner = (TENSORS[f"{case}.{n}"] for n in ("image", "text", "image_index_of_text"))
    assert recall_at_k(image, text, owner, chunk=chunk) == pytest.approx(CASES[case], rel=1e-12)
    i2t, t2i = ranks(image, text, owner, chunk)
    assert i2t.tolist() == TENSORS[f"{case}.i2t_rank"].tolist()
    assert t2i.tolist() == TENSORS[f"{case}.t2i_rank"].tolist()


def test_equal_scores_do_not_count_as_higher():
    same = torch.nn.functional.normalize(torch.ones(3, 4), dim=1)
    result = recall_at_k(same, same, torch.arange(3))
    assert result["image_to_text_R@1"] == result["text_to_image_R@1"] == 1.0


def test_with_ties_counted_half_a_collapsed_model_gets_what_guessing_gets():
    same = torch.nn.functional.normalize(torch.ones(40, 4), dim=1)
    owner = torch.arange(20).repeat_interleave(2)
    result = recall_at_k(same[:20], same, owner, tie_share=0.5)
    assert result["text_to_image_R@1"] == result["image_to_text_R@10"] == 0.0
    assert result["text_to_image_median_rank"] == result["text_to_image_mean_rank"] - 0.5 == 10.0
    assert result["image_to_text_mean_rank"] == 20.0  # half of the 38 captions of others


def test_a_picture_without_captions_is_a_distractor():
    image = torch.eye(3)
    result = recall_at_k(image, image[:2], torch.tensor([0, 1]))
    assert result["image_to_text_R@1"] == result["text_to_image_R@1"] == 1.0


@pytest.mark.parametrize("owner", [[0, 1], [0, 1, 9]])
def test_a_wrong_index_is_an_error(owner):
    with pytest.raises(ValueError, match="image_index_of_text"):
        recall_at_k(torch.eye(3), torch.eye(3), torch.tensor(owner))
