"""bf16 on CPUs without bf16 instructions (common/cpu.py): as near to fp32 as autocast, in both models."""

from pathlib import Path

import pytest
import torch
import yaml

from common import cpu
from data2vec import build_model, cpu_patches, mask_tokens
from data2vec.model import attention
from data2vec.model.vision_model import build_vision_model

TEXT, VISION = (
    yaml.safe_load(Path(__file__).with_name(name).read_text())["model"] for name in ("tiny.yaml", "tiny_vision.yaml")
)


def text_step():
    torch.manual_seed(0)
    model = build_model(TEXT, 169)
    tokens = torch.randint(4, 168, (4, 40), generator=torch.Generator().manual_seed(1))
    options = {"mask_idx": 168, "mask_prob": 0.35, "mask_multiple_length": 4}
    options |= {"leave_unmasked_prob": 0.0, "random_token_prob": 0.0}
    source, target = (
        torch.stack(c) for c in zip(*(mask_tokens(t, 1, 1, i, **options) for i, t in enumerate(tokens)), strict=True)
    )
    return model, lambda: model(source, target, 168)


def vision_step():
    torch.manual_seed(0)
    model = build_vision_model({**VISION, "drop_path": 0.0, "attention_dropout": 0.0})
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, 32, 32, generator=generator)
    mask = torch.rand(6, 16, generator=generator) < 0.5
    sample, patch = mask.nonzero(as_tuple=True)
    return model, lambda: model(images, mask, sample * 17 + patch + 1)


def loss_and_gradients(step, precision):
    model, forward = step()
    cpu_patches.apply_to_model(model, torch.device("cpu"))
    model.encoder.make_teacher() if step is text_step else model.make_teacher()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        out = forward()
    (out["loss_sum"] / out["sample_size"]).backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return out["loss_sum"].item(), torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("step", [text_step, vision_step])
def test_emulated_bf16_is_as_near_to_fp32_as_autocast(monkeypatch, step):
    monkeypatch.setattr(cpu, "has_bf16_instructions", lambda: False)
    exact, ours = (loss_and_gradients(step, precision) for precision in ("fp32", "bf16"))
    monkeypatch.setenv("CPU_PATCHES_OFF", "wide_products")
    autocast = loss_and_gradients(step, "bf16")
    norm = exact[1].norm()
    errors = [(gradients - exact[1]).norm() / norm for _, gradients in (ours, autocast)]
    assert 1e-4 < errors[0] <= 1.1 * errors[1] < 0.1 and errors[0] != errors[1]
    assert ours[0] == pytest.approx(exact[0], rel=1e-2)


@pytest.mark.parametrize("step", [text_step, vision_step])
def test_a_teacher_has_its_students_patches_and_none_of_its_weights(step):
    """A patched method that stayed bound to the student would compute the target with the student's weights."""
    model, forward = step()
    cpu_patches.apply_to_model(model, torch.device("cpu"))
    before = forward()
    with torch.no_grad():
        for parameter in model.teacher_holder.student.parameters():
            parameter.add_(torch.randn_like(parameter))
    after = forward()
    torch.testing.assert_close(after["target"], before["target"], rtol=0, atol=0)
    assert not torch.equal(after["pred"], before["pred"])


def test_without_cheap_dropout_torch_draws(monkeypatch):
    monkeypatch.setenv("CPU_PATCHES_OFF", "cheap_dropout")
    model, _ = text_step()
    cpu_patches.apply_to_model(model, torch.device("cpu"))
    layer = model.encoder.sentence_encoder.layers[0]
    assert layer.dropout_add is attention.dropout_add and layer.self_attn.attend is attention.attention
    monkeypatch.setenv("CPU_PATCHES_OFF", "cheap_droput")
    with pytest.raises(SystemExit, match="choose from this project's patches, cheap_dropout, wide_products"):
        cpu_patches.apply_to_model(model, torch.device("cpu"))
