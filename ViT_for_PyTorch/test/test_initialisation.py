"""Starting weights for narrow models: signals keep their size, attention starts local, and only where asked for."""

import pytest
import torch

import vit
from vit.model.vision_transformer import build_model

SIZES = dict(img_size=36, patch_size=6, embed_dim=64, depth=6, num_heads=4, num_classes=9)


def branch_share(model) -> float:
    """Size of what the last block adds to the residual stream, relative to the stream."""
    seen = {}
    block = model.blocks[-1]
    block.register_forward_hook(lambda _, inputs, output: seen.update(before=inputs[0], after=output))
    model.eval()(torch.randn(8, 3, 36, 36))
    return ((seen["after"] - seen["before"]).std() / seen["before"].std()).item()


def test_branches_of_a_narrow_model_speak_from_the_start():
    torch.manual_seed(0)
    quiet, loud = (branch_share(build_model(**SIZES, init=init)) for init in ("timm", "width"))
    assert quiet < 0.07 and 0.15 < loud < 1


def test_mimetic_attention_starts_near_and_with_identities():
    torch.manual_seed(0)
    model = build_model(**SIZES, init="mimetic")
    attention = model.blocks[0].attn
    query, key, value = attention.qkv.weight.detach().chunk(3)
    product = attention.proj.weight.detach() @ value
    assert product.diagonal().mean() == pytest.approx(-0.4, abs=0.1)
    head = query[:16].T @ key[:16]
    assert head.diagonal().mean() > 5 * head.mean().abs()
    positions = torch.nn.functional.normalize(model.pos_embed.detach()[0, 1:], dim=1)  # [36, C], a grid of 6 x 6
    near, far = positions[14] @ positions[15], positions[0] @ positions[35]
    assert near > far + 0.2 and not model.pos_embed[0, 0].any()


def test_the_classifier_and_the_default_stay_as_they_were():
    torch.manual_seed(0)
    before = vit.create_model("vit_demo", 9).state_dict()
    torch.manual_seed(0)
    after = vit.create_model("vit_demo", 9, init="timm").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert build_model(**SIZES, init="mimetic").head.weight.std() < 1e-4
    with pytest.raises(ValueError, match="init must be one of timm, width, mimetic, not 'xavier'"):
        build_model(**SIZES, init="xavier")


def test_a_convolutional_stem_gives_the_same_tokens_and_its_checkpoint_is_read_back(tmp_path):
    torch.manual_seed(0)
    model = build_model(48, 8, 64, 4, 4, num_classes=9, init="mimetic", stem="conv")
    images = torch.randn(16, 3, 48, 48)
    assert model.patch_embed(images).shape == (16, 36, 64)
    names = [name for name, _ in model.named_parameters() if not name.startswith("patch_embed.")]
    plain = build_model(48, 8, 64, 4, 4, num_classes=9)
    assert names == [name for name, _ in plain.named_parameters() if not name.startswith("patch_embed.")]
    torch.save({"model": model.state_dict()}, tmp_path / "model.pt")
    config = vit.AutoConfig.from_pretrained(tmp_path / "model.pt", num_heads=4)
    assert (config.stem, config.patch_size, config.image_size) == ("conv", 8, 48)
    again = vit.AutoModel.from_pretrained(tmp_path / "model.pt", config)
    assert torch.equal(again(images), model.eval()(images))
    with pytest.raises(ValueError, match="patch size of 2, 4, 8, ..., not 6"):
        build_model(**SIZES, stem="conv")
