"""The closed form of a step's FLOPs is what torch counts."""

import pytest
import torch
from test_models import NAMES, read_json
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from clip_pretraining.model import lora
from clip_pretraining.model.flops import step_flops
from clip_pretraining.model.loading import FAMILIES, freeze
from clip_pretraining.model.patch_dropout import keep_patches


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("locked, share, rank", [(False, 1, 0), (True, 1, 0), (False, 0.5, 0), (False, 1, 2)])
def test_both_towers(name, locked, share, rank):
    config = AutoConfig.for_model(**read_json(f"{name}_config.json"))
    model = FAMILIES[config.model_type]._from_config(config, attn_implementation="sdpa")
    freeze(model, vision=locked, text=False)
    if rank:
        lora.add(model, rank, alpha=2 * rank)
    keep_patches(model.train(), share)
    size, length = config.vision_config.image_size, 8
    ids = torch.full((2, length), 5)
    ids[:, -1] = config.text_config.eos_token_id
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        output = model(pixel_values=torch.zeros(2, 3, size, size), input_ids=ids, attention_mask=torch.ones_like(ids))
        (output.image_embeds.sum() + output.text_embeds.sum()).backward()
    logits = 2 * 2 * 2 * model.config.projection_dim  # which the models compute as well
    assert step_flops(model, 2, length) == pytest.approx(counter.get_total_flops() - logits, rel=0.01)
