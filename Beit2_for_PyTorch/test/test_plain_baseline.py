"""The plain baseline that speed is measured against is the reference, and ours equals it with dropped paths, too."""

import pytest
import torch
import torch.nn.functional as F

import beit2
from beit2.model.masked_image_model import masked_rows
from ci.peers import beit2_plain
from common import device as devices


@pytest.mark.parametrize("variant", ["A_cls_shared_relshared", "D_nocls_relperlayer_abs", "E_cls_unshared_abs_nols"])
def test_plain_logits_are_the_reference_s(golden, variant):
    g = golden(f"pretrain_{variant}")
    model = beit2.build_pretraining_model(**g.json["config"])
    model.load_state_dict(g.state())
    outputs = beit2_plain.logits(model, g["images"], g["mask"])
    loss = sum(F.cross_entropy(values, g["labels"]) for values in outputs)
    assert loss.item() == pytest.approx(g.json["loss"], abs=1e-5)


def test_plain_tokens_are_the_reference_s(golden):
    g = golden("vqkd_V1_clip")
    tokenizer = beit2.build_tokenizer(**g.json["config"])
    tokenizer.load_state_dict(g.state(), strict=False)
    tokenizer.eval()
    for _ in range(2):
        assert torch.equal(beit2_plain.tokens(tokenizer, g["images"]), g["tokens"])
    expected = g["eval_cluster_size_after_2_forwards"]  # the state that the reference's evaluation changes
    torch.testing.assert_close(tokenizer.quantize.cluster_size, expected, rtol=1e-4, atol=1e-4)


def test_work_left_out_changes_no_gradient():
    """Needed rows and dropped samples together: gradients equal the plain step's to 1e-6 of their norm."""
    torch.manual_seed(0)
    model = beit2.build_pretraining_model(
        img_size=64, patch_size=8, embed_dim=48, depth=4, num_heads=3, vocab_size=64, init_values=0.5,
        use_shared_rel_pos_bias=True, early_layers=2, head_layers=2, drop_path_rate=0.5,
    ).train()  # fmt: skip
    images = torch.randn(6, 3, 64, 64)
    mask = torch.stack([torch.randperm(64) < 24 for _ in range(6)])
    labels = torch.randint(0, 64, (6 * 24,))

    def gradients(forward):
        devices.seeded(0, 1)
        model.zero_grad()
        loss = sum(F.cross_entropy(values, labels) for values in forward())
        loss.backward()
        return loss.item(), [p.grad.clone() for p in model.parameters()]

    plain_loss, plain = gradients(lambda: beit2_plain.logits(model, images, mask))
    lean_loss, lean = gradients(lambda: model(images, mask, masked_patches=masked_rows(mask, 24)))
    assert lean_loss == pytest.approx(plain_loss, abs=1e-6)
    for a, b in zip(lean, plain, strict=True):
        assert (a - b).norm().item() <= 1e-6 * max(1.0, b.norm().item())
