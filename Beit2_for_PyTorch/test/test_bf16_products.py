"""bf16 on a CPU without bf16 instructions: as near to fp32 as autocast's own bf16, in every model."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

import beit2
from beit2 import cpu_patches
from common import cpu as cpu_kernels

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4, "init_values": 0.5}


def pretraining_loss():
    """Dropped samples, rows of the last blocks and recomputed blocks at once."""
    model = beit2.build_pretraining_model(
        **SHAPE, vocab_size=32, early_layers=2, use_shared_rel_pos_bias=True, drop_path_rate=0.3
    )
    model.activation_checkpointing = True
    images, mask = torch.randn(4, 3, 32, 32), torch.arange(16).expand(4, 16) % 3 == 0
    labels = torch.randint(0, 32, (int(mask.sum()),))
    return model, lambda: sum(F.cross_entropy(logits.float(), labels) for logits in model(images, mask))


def classifier_loss():
    model = beit2.build_classifier(**SHAPE, num_classes=5, use_rel_pos_bias=True, init_scale=1.0)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    return model, lambda: F.cross_entropy(model(images).float(), labels)


def tokenizer_loss():
    """The reconstruction of given codes: which codes are nearest is decided in fp32 and may jump."""
    model = beit2.build_tokenizer(
        img_size=32, patch_size=8, dim=64, depth=2, heads=4, decoder_depth=1, n_code=8, code_dim=8, decoder_out_dim=16
    )
    images, target = torch.rand(4, 3, 32, 32), torch.randn(4, 16, 16)

    def loss():
        codes = F.normalize(model.encode_features(model.pre_process(images, unit_range=True)), dim=-1)
        return (1 - F.cosine_similarity(model.decode(codes).float(), target, dim=-1)).mean()

    return model, loss


@pytest.mark.parametrize("build", [pretraining_loss, classifier_loss, tokenizer_loss])
def test_emulated_bf16_is_as_near_to_fp32_as_autocast(monkeypatch, build):
    monkeypatch.setattr(cpu_kernels, "has_bf16_instructions", lambda: False)
    torch.manual_seed(0)
    model, loss_of = build()
    cpu_patches.apply(model, None, torch.device("cpu"))

    def run(precision):
        torch.manual_seed(1)  # of the dropped samples
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of()
        loss.backward()
        return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    exact, ours = run("fp32"), run("bf16")
    with monkeypatch.context() as patch:
        patch.setattr(cpu_kernels, "cpu_kernels", contextlib.nullcontext)
        autocast = run("bf16")

    def distance(result):
        pairs = zip(result[1], exact[1], strict=True)
        return sum((ours - theirs).square().sum() for ours, theirs in pairs).sqrt().item()

    norm = sum(gradient.square().sum() for gradient in exact[1]).sqrt().item()
    assert ours[0] == pytest.approx(exact[0], rel=1e-2) and autocast[0] == pytest.approx(exact[0], rel=1e-2)
    assert 1e-4 * norm < distance(ours) <= 1.1 * distance(autocast) < 4e-2 * norm
