"""The closed forms of a step's FLOPs are what torch counts."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import beit2
from beit2.model import flops

SMALL = {"img_size": 32, "patch_size": 8, "depth": 3, "num_heads": 4}
TEACHER = {"width": 24, "layers": 2, "heads": 4, "output_dim": 12, "patch": 8, "res": 32}
TOKENIZER = {"img_size": 32, "patch_size": 8, "dim": 32, "depth": 2, "heads": 4, "decoder_depth": 1, "n_code": 64}


def counted(step: Callable[[], Tensor]) -> float:
    """Of two pictures, forward and backward."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        step().sum().backward()
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("early_layers", [None, 2])
def test_pretraining(early_layers):
    model = beit2.build_pretraining_model(**SMALL, embed_dim=48, vocab_size=64, early_layers=early_layers)
    tokenizer = beit2.build_tokenizer(**TOKENIZER).for_encoding()
    images = torch.rand(2, 3, 32, 32)

    def step() -> Tensor:
        tokenizer.get_codebook_indices(images)
        # all patches are wanted: rows that ours may leave out of the last blocks count in the closed form
        out = model(images, torch.ones(2, 16, dtype=torch.bool), return_all_tokens=True)
        return torch.stack(out) if isinstance(out, list) else out

    assert flops.pretraining_flops(model, tokenizer, masked=16) == pytest.approx(counted(step), rel=0.01)


def test_fine_tuning_and_probe():
    model = beit2.build_classifier(**SMALL, embed_dim=48, num_classes=10)
    images = torch.rand(2, 3, 32, 32)
    assert flops.classification_flops(model, 10) == pytest.approx(counted(lambda: model(images)), rel=0.01)
    model.requires_grad_(False).head.requires_grad_(True)
    assert flops.probe_flops(model, 10) == pytest.approx(counted(lambda: model(images)), rel=0.01)


def test_tokenizer(monkeypatch):
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)  # which the counter does not know
    tokenizer = beit2.build_tokenizer(TEACHER, **TOKENIZER, decoder_out_dim=12)
    known = flops.tokenizer_flops(tokenizer)
    assert known == pytest.approx(counted(lambda: tokenizer(torch.rand(2, 3, 32, 32))[0]), rel=0.01)
