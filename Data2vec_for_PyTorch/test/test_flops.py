"""The closed forms of a step's FLOPs are what torch counts."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data2vec.model.flops import multi_flops, text_flops, vision_flops
from data2vec.model.multi.mask_plan import plan_masks
from data2vec.model.multi.model import build_multi_model
from data2vec.model.text_model import build_model
from data2vec.model.vision_model import build_vision_model


def counted(step) -> float:
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        step()["loss_sum"].backward()
    return counter.get_total_flops()


def test_text():
    sizes = {"embed_dim": 16, "ffn_embed_dim": 32, "layers": 2, "attention_heads": 2}
    model = build_model({"transformer": {"encoder": sizes}, "average_top_k_layers": 2, "head_layers": 2}, 24)
    tokens = torch.full((2, 6), 4)  # all hidden: rows that ours leaves out of the last block count in the closed form
    known = text_flops(model, 2, 6, masked=12)
    assert known == pytest.approx(counted(lambda: model(tokens * 0 + 23, tokens, 23)), rel=0.01)


@pytest.mark.parametrize("whole_teacher", [False, True])
def test_pictures(whole_teacher):
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "image_size": 16, "patch_size": 4, "average_top_k_layers": 2}
    model = build_vision_model(sizes | {"ema_transformer_only": not whole_teacher})
    mask = torch.ones(2, 16, dtype=torch.bool)
    rows = torch.arange(34).view(2, 17)[:, 1:].flatten()
    known = vision_flops(model, 2, masked=32)
    assert known == pytest.approx(counted(lambda: model(torch.randn(2, 3, 16, 16), mask, rows)), rel=0.02)  # CLS's row


@pytest.mark.parametrize("kind", ["text", "image", "image, a whole teacher"])
def test_data2vec_2(kind):
    block = {"embed_dim": 16, "depth": 2, "num_heads": 2, "average_top_k_layers": 2}
    # one group: of more torch counts the gradient of a convolution's weights as if there were one
    decoder = {"decoder_dim": 8, "decoder_groups": 1, "decoder_kernel": 3, "decoder_layers": 2, "projection_layers": 2}
    if kind == "text":
        options = block | {"modalities": {"text": {"max_source_positions": 16, "decoder": decoder}}}
        model, source = build_multi_model(options, 24), torch.full((2, 16), 5)
    else:
        image = {"input_size": 16, "patch_size": 4, "prenet_depth": 1, "num_extra_tokens": 1, "decoder": decoder}
        whole = "whole" in kind
        image["ema_local_encoder"] = whole
        options = block | {"ema_encoder_only": not whole, "modalities": {"image": image}}
        model, source = build_multi_model(options, None), torch.randn(2, 3, 16, 16)
    plan = plan_masks((torch.arange(16) % 4 > 0).repeat(2, 3, 1))  # three masks a sample, each hides twelve of sixteen
    known = multi_flops(model, 2, 16, plan.masks, plan.visible.width, len(plan.hidden))
    assert known == pytest.approx(counted(lambda: model(source, plan)), rel=0.01)
