"""data2vec vision: the encoder against Hugging Face's, targets and teacher, masks, weights from elsewhere."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from data2vec import ema_step
from data2vec.data.block_masking import block_mask
from data2vec.model.vision_model import build_vision_model
from data2vec.weights.pretrained import load_weights
from data2vec.weights.vision_weights import export_huggingface_vision, load_huggingface_vision

PROJECT = Path(__file__).resolve().parents[1]
CONFIG = yaml.safe_load((PROJECT / "test" / "tiny_vision.yaml").read_text())["model"]


def make_model(**changes):
    """Random weights everywhere, so that nothing is hidden by zeros or small layer scales."""
    model = build_vision_model({**CONFIG, "drop_path": 0.0, "attention_dropout": 0.0, **changes})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def batch(count=3):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    mask = torch.rand(count, 16, generator=generator) < 0.5
    sample, patch = mask.nonzero(as_tuple=True)
    return images, mask, sample * 17 + patch + 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "model"
    export_huggingface_vision(make_model(), folder)
    return folder


@pytest.fixture(scope="module")
def huggingface(folder):
    from transformers import Data2VecVisionModel

    return Data2VecVisionModel.from_pretrained(folder, attn_implementation="eager").eval()


def test_encoder_equals_huggingface(huggingface):
    images, mask, rows = batch()
    model = make_model().eval()
    with torch.no_grad():
        expected = huggingface(images).last_hidden_state
        torch.testing.assert_close(model.encode(images), expected, rtol=1e-4, atol=1e-5)
        masked = huggingface(images, bool_masked_pos=mask).last_hidden_state.flatten(0, 1)[rows]
        pred = model(images, mask, rows)["pred"]
        torch.testing.assert_close(pred, model.final_proj(masked), rtol=1e-4, atol=1e-5)


def test_gradients_equal_huggingface(huggingface):
    from data2vec.weights.vision_weights import _block_to_huggingface

    images, mask, rows = batch()
    model = make_model(use_final_proj=False)
    target = model(images, mask, rows)["target"]
    model(images, mask, rows)["loss_sum"].backward()
    hidden = huggingface(images, bool_masked_pos=mask).last_hidden_state.flatten(0, 1)[rows]
    huggingface.zero_grad()
    (F.smooth_l1_loss(hidden, target, reduction="sum", beta=2.0) / 32**0.5).backward()
    expected = {name: parameter.grad for name, parameter in huggingface.named_parameters()}
    ours = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    for i in range(3):
        for name, gradient in _block_to_huggingface(ours, f"encoder.blocks.{i}.", f"encoder.layer.{i}.").items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    table = "encoder.relative_position_bias.relative_position_bias_table"
    torch.testing.assert_close(ours["encoder.rel_pos_bias.relative_position_bias_table"], expected[table])
    torch.testing.assert_close(ours["mask_emb"], expected["embeddings.mask_token"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("end_of_block", [True, False])
@pytest.mark.parametrize(
    "norms",
    [
        {},
        {"layer_norm_target_layer": False, "layer_norm_targets": False},
        {"instance_norm_target_layer": True, "layer_norm_target_layer": False},
        {"batch_norm_target_layer": True, "instance_norm_targets": True},
    ],
)
def test_targets_are_the_teachers_top_layers(huggingface, end_of_block, norms):
    """As fairseq's forward has them, written out over Hugging Face's hidden states."""
    images, mask, rows = batch()
    model = make_model(end_of_block_targets=end_of_block, **norms)
    options = {**CONFIG, **norms}
    with torch.no_grad():
        hidden = huggingface(images, output_hidden_states=True).hidden_states
    layers = [h[:, 1:] for h in hidden[-2:]]
    if not end_of_block:
        blocks = model.encoder.blocks[-2:]
        layers = []
        for block, x in zip(blocks, hidden[-3:-1], strict=True):
            bias = model.encoder.rel_pos_bias()
            x = x + block.gamma_1 * block.attn(block.norm1(x), bias)
            layers.append((block.gamma_2 * block.mlp(block.norm2(x)))[:, 1:].detach())
    if options.get("batch_norm_target_layer"):
        layers = [F.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2) for x in layers]
    if options.get("instance_norm_target_layer"):
        layers = [F.instance_norm(x.transpose(1, 2)).transpose(1, 2) for x in layers]
    if options["layer_norm_target_layer"]:
        layers = [F.layer_norm(x, x.shape[-1:]) for x in layers]
    expected = sum(layers) / 2
    if options["layer_norm_targets"]:
        expected = F.layer_norm(expected, expected.shape[-1:])
    if options.get("instance_norm_targets"):
        expected = F.instance_norm(expected.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(model(images, mask, rows)["target"], expected[mask], rtol=1e-3, atol=1e-4)


def test_loss_scales():
    """As fairseq: 1 / sqrt(C) without a scale, none at 0 or below."""
    images, mask, rows = batch()
    losses = [make_model(loss_scale=s)(images, mask, rows)["loss_sum"].item() for s in (None, -1, 0.5)]
    assert losses[1] == pytest.approx(losses[0] * 32**0.5, rel=1e-5) == pytest.approx(losses[2] * 2, rel=1e-5)


@pytest.mark.parametrize("transformer_only", [True, False])
def test_teacher_is_the_average_and_travels_in_the_state(transformer_only):
    model = make_model(ema_transformer_only=transformer_only)
    ema_step(model, 0.9)  # makes the teacher
    before = {name: value.clone() for name, value in model.teacher.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    ema_step(model, 0.9)
    names = set(model.teacher.state_dict())
    assert ("patch_embed.conv.weight" in names) == (not transformer_only)
    for name, value in model.teacher.state_dict().items():
        torch.testing.assert_close(value, before[name] + 0.1)
    assert not any(p.requires_grad for p in model.teacher.parameters())
    state = model.state_dict()
    assert set(state["_ema"]) == names and not any(name.startswith("teacher") for name in state)
    other = build_vision_model({**CONFIG, "ema_transformer_only": transformer_only})
    load_weights(other, {"model": state}, "state")
    for name, value in other.teacher.state_dict().items():
        assert torch.equal(value, model.teacher.state_dict()[name])


def test_last_block_on_some_rows_drops_whole_samples():
    """Stochastic depth drops a sample's branch for all its rows."""
    model = make_model(drop_path=0.5).train()
    block = model.encoder.blocks[-1]
    x, rows = torch.randn(8, 17, 32), torch.arange(8 * 17)
    torch.manual_seed(0)
    whole, branch = block(x)
    torch.manual_seed(0)
    some, _ = block(x, None, rows)
    torch.testing.assert_close(some, whole.flatten(0, 1))
    dropped = branch.abs().sum(dim=(1, 2)) == 0
    assert 0 < dropped.sum() < 8


def test_huggingface_folder_there_and_back(folder):
    import convert_checkpoint

    state = load_huggingface_vision(folder)["model"]
    assert state.keys() == {name for name in make_model().state_dict() if not name.startswith("final_proj")}
    for name, value in make_model().state_dict().items():
        if name in state:
            assert torch.equal(value, state[name]), name
    assert convert_checkpoint.load_folder(folder)["model"].keys() == state.keys()


def test_weights_of_the_papers_code_and_of_fairseq_load():
    """BEiT's names (cls_token, lm_head, mlp.fc1, the index that is saved) and fairseq's."""
    model = make_model()
    paper = {"rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.int64)}
    fairseq = {"encoder.rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.int64)}
    for name, value in model.state_dict().items():
        fairseq[name] = value
        for ours, theirs in (
            ("cls_emb", "cls_token"),
            ("mask_emb", "mask_token"),
            ("patch_embed.conv", "patch_embed.proj"),
            ("final_proj", "lm_head"),
            ("encoder.", ""),
            (".mlp.0.", ".mlp.fc1."),
            (".mlp.2.", ".mlp.fc2."),
        ):
            name = name.replace(ours, theirs)
        paper[name] = value
    for state in (paper, fairseq):
        other = build_vision_model(CONFIG)
        load_weights(other, {"model": state}, "x")
        for name, value in other.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name


def reference_mask(height, width, num_masks, min_masks, max_masks):
    """BEiT's algorithm 1 cell by cell, in the order of draws of fairseq's make_mask (module `random`)."""
    mask = np.zeros((height, width), dtype=int)
    count = 0
    while count < num_masks:
        most = min(num_masks - count, max_masks)
        delta = 0
        for _ in range(10):
            area = random.uniform(min_masks, most)
            ratio = np.exp(random.uniform(np.log(0.3), np.log(1 / 0.3)))
            h, w = int(round((area * ratio) ** 0.5)), int(round((area / ratio) ** 0.5))
            if w < width and h < height:
                top, left = random.randint(0, height - h), random.randint(0, width - w)
                new = h * w - mask[top : top + h, left : left + w].sum()
                if 0 < new <= most:
                    for i in range(top, top + h):
                        for j in range(left, left + w):
                            delta += mask[i, j] == 0
                            mask[i, j] = 1
                if delta > 0:
                    break
        if delta == 0:
            break
        count += delta
    return mask.astype(bool)


def test_block_masks_draw_as_the_reference():
    shares = []
    for seed in range(60):
        random.seed(seed)
        expected = reference_mask(14, 14, 120, 16, 196)
        mask = block_mask((14, 14), 120, 16, 196, random.Random(seed))
        np.testing.assert_array_equal(mask, expected)
        shares.append(mask.sum())
    assert max(shares) <= 120 and 112 < np.mean(shares) <= 120
