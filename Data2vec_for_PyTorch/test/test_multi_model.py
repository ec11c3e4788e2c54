"""data2vec 2.0 against fairseq's own modules (golden/multi_*.npz), and against itself where it is padded.

The goldens are of fairseq's models/data2vec2.py at 3d262bb2, small, without dropout or noise, with masks given; student
and teacher differ. A script outside this repository wrote them, which loads those files with stand-ins for the
rest of fairseq (registries, tasks, audio): of `text` and `image` as the released base configurations have it, of
`text_prenorm` with the other values of most options, of `image_encoder_only` with a teacher of the blocks alone.
"""

import copy

import numpy as np
import pytest
import torch

COMMON = {
    "encoder_dropout": 0.0, "post_mlp_drop": 0.0, "attention_dropout": 0.0, "num_heads": 2, "embed_dim": 8, "depth": 2,
    "average_top_k_layers": 2,
}  # fmt: skip
TEXT_DECODER = {"input_dropout": 0.0, "decoder_dim": 8, "decoder_groups": 1, "decoder_kernel": 9, "decoder_layers": 2}
TEXT_DECODER |= {"decoder_residual": False, "projection_layers": 2}
TEXT = {"mask_noise_std": 0.0, "prenet_depth": 0, "dropout": 0.0, "max_source_positions": 16, "decoder": TEXT_DECODER}
OTHER_DECODER = {"decoder_kernel": 4, "decoder_groups": 2, "decoder_residual": True, "projection_layers": 1}
IMAGE = {"input_size": 16, "patch_size": 4, "mask_noise_std": 0.0, "prenet_depth": 1, "num_extra_tokens": 1}
IMAGE["decoder"] = {"decoder_dim": 8, "decoder_groups": 4, "decoder_kernel": 3, "decoder_layers": 3, "input_dropout": 0}
NORMS = {"instance_norm_target_layer": True, "layer_norm_targets": True, "norm_eps": 1e-6}
CONFIGS = {
    "text": COMMON
    | {"loss_scale": 1, "instance_norm_target_layer": True, "norm_eps": 1e-5, "modalities": {"text": TEXT}},
    "text_prenorm": COMMON
    | {"loss_beta": 1, "layer_norm_target_layer": True, "instance_norm_targets": True, "end_of_block_targets": True}
    | {"layer_norm_first": True, "average_top_k_layers": 1}
    | {"modalities": {"text": TEXT | {"prenet_depth": 1, "decoder": TEXT_DECODER | OTHER_DECODER}}},
    "image": COMMON
    | NORMS
    | {"ema_encoder_only": False, "cls_loss": 0.01, "modalities": {"image": IMAGE | {"ema_local_encoder": True}}},
    "image_encoder_only": COMMON | NORMS | {"modalities": {"image": IMAGE}},
}


def build(name, golden):
    from data2vec.model.multi.model import build_multi_model

    data = np.load(golden / f"multi_{name}.npz")
    model = build_multi_model(CONFIGS[name], 24 if name.startswith("text") else None)
    state = {key.removeprefix("init/"): torch.from_numpy(data[key]) for key in data.files if key.startswith("init/")}
    state["_ema"] = {key[5:]: torch.from_numpy(data[key]) for key in data.files if key.startswith("ema0/")}
    model.load_state_dict(state)
    return model.train(), data


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_gradients_and_features_are_fairseqs(golden, name):
    from data2vec.model.ema import ema_step
    from data2vec.model.multi.mask_plan import plan_masks

    model, data = build(name, golden)
    source, mask = torch.from_numpy(data["source"]), torch.from_numpy(data["mask"])
    plan = plan_masks(mask.view(len(source), -1, mask.shape[1]))
    out = model(source, plan)
    assert out["sample_size"] == int(data["sample_size"])
    torch.testing.assert_close(out["loss_sum"].detach(), torch.from_numpy(data["loss"]), rtol=1e-5, atol=1e-5)
    for key in ("pred", "target"):
        deviation = (out[key].detach().var(dim=0) + 1e-6).sqrt().mean()
        torch.testing.assert_close(deviation, torch.from_numpy(data[f"{key}_var"]), rtol=1e-4, atol=1e-6)
    out["loss_sum"].backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(gradients) == {key[5:] for key in data.files if key.startswith("grad/")}
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, torch.from_numpy(data[f"grad/{key}"]), rtol=2e-4, atol=2e-4, msg=key)
    with torch.no_grad():
        features = copy.deepcopy(model).eval().encode(source)
    torch.testing.assert_close(features, torch.from_numpy(data["features"]), rtol=1e-4, atol=1e-5)

    before = {key: value.clone() for key, value in model.teacher.named_parameters()}
    ema_step(model, 0.9)
    student = dict(model.student.named_parameters())
    for key, value in model.teacher.named_parameters():
        torch.testing.assert_close(value, 0.9 * before[key] + 0.1 * student[key], rtol=1e-5, atol=1e-6)


def test_padding_changes_nothing(golden):
    """A row alone, and beside a longer one: the same predictions and targets, to rounding."""
    from data2vec.model.multi.mask_plan import plan_masks

    model, data = build("text", golden)
    tokens, mask = torch.from_numpy(data["source"]), torch.from_numpy(data["mask"]).view(2, 2, -1)
    short, hidden = tokens[:1, :8].clone(), mask[:1, :, :8]
    alone = model(short, plan_masks(hidden))
    padded = torch.cat((torch.nn.functional.pad(short, (0, 4), value=1), tokens[1:]))
    both = torch.cat((torch.nn.functional.pad(hidden, (0, 4)), mask[1:]))
    together = model(padded, plan_masks(both, padded.ne(1)), has_padding=True)
    count = alone["sample_size"]
    torch.testing.assert_close(together["pred"][:count], alone["pred"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together["target"][:count], alone["target"], rtol=1e-4, atol=1e-5)
    assert together["sample_size"] == count + int(mask[1].sum())


@pytest.mark.parametrize("name", ["text", "image", "first version"])
def test_activation_checkpointing_changes_memory_and_no_number(golden, name):
    """With dropout and dropped paths, by the CPU's kernels: the same loss and gradients, fewer bytes kept."""
    from data2vec import cpu_patches
    from data2vec.model.multi.mask_plan import plan_masks
    from data2vec.model.multi.model import build_multi_model
    from data2vec.model.vision_model import build_vision_model

    torch.manual_seed(2)
    source, mask = torch.randint(5, 24, (4, 16)), torch.rand(4, 2, 16) < 0.4
    images, hidden = torch.rand(4, 3, 16, 16), mask[:, 0]
    rows = (torch.arange(4 * 17).view(4, 17)[:, 1:])[hidden]
    drops = {"encoder_dropout": 0.1, "attention_dropout": 0.1, "post_mlp_drop": 0.1, "end_drop_path_rate": 0.3}
    sizes = {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
    sizes |= {"average_top_k_layers": 2, "drop_path": 0.3, "attention_dropout": 0.1}
    found = {}
    for on in (False, True):
        torch.manual_seed(0)
        if name == "first version":
            model = build_vision_model({**sizes, "checkpoint_activations": on})
        else:
            options = {**CONFIGS[name], **drops, "depth": 4, "checkpoint_activations": on}
            model = build_multi_model(options, 24 if name == "text" else None)
        cpu_patches.apply_to_model(model, torch.device("cpu"))
        model.make_teacher()
        model.train()
        kept = []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.nbytes) or t, lambda t: t):
            if name == "first version":
                out = model(images, hidden, rows)
            else:
                out = model(source if name == "text" else images, plan_masks(mask if name == "text" else _even(mask)))
        out["loss_sum"].backward()
        found[on] = out["loss_sum"], [p.grad for p in model.parameters()], sum(kept)
    assert torch.equal(found[True][0], found[False][0])
    for a, b in zip(found[True][1], found[False][1], strict=True):
        assert a is b is None or torch.equal(a, b)
    assert found[True][2] < 0.7 * found[False][2]


def _even(mask: torch.Tensor) -> torch.Tensor:
    """As many hidden patches in every row: 6 of 16."""
    order = torch.rand(mask.shape).argsort(dim=-1)
    return order < 6
