"""The VQ-KD tokenizer against the reference: ids, losses, gradients, codebook updates, k-means, weight files."""

import json

import pytest
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import beit2
from beit2.model.quantizer import NormEMAQuantizer, kmeans
from beit2.model.teachers import ScalingLayer, build_teacher, load_teacher
from beit2.model.tokenizer import load_tokenizer_weights
from common.errors import UsageError


def build(g):
    tokenizer = beit2.build_tokenizer(g.json["teacher"], **g.json["config"])
    tokenizer.load_state_dict(g.state())
    return tokenizer.eval()


def test_ids_features_and_losses(golden):
    g = golden("vqkd_V1_clip")
    tokenizer = build(g)
    before = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
    assert torch.equal(tokenizer.get_codebook_indices(g["images"]), g["tokens"])
    patches = torch.tensor([[3, 1, 7]] * 4)
    assert torch.equal(tokenizer.get_codebook_indices(g["images"], patches), g["tokens"].gather(1, patches))
    for name, tensor in tokenizer.state_dict().items():  # the reference counts use here, and all-reduces it
        assert torch.equal(tensor, before[name]), name

    x = tokenizer.pre_process(g["images"])
    torch.testing.assert_close(tokenizer.get_target(x), g["target"], rtol=1e-4, atol=1e-5)
    codes, _, _ = tokenizer.encode(x)
    torch.testing.assert_close(codes.transpose(1, 2).unflatten(2, (4, 4)), g["z_q"], rtol=1e-4, atol=1e-5)
    _, logs = tokenizer(g["images"])
    assert logs["quant_loss"].item() == pytest.approx(g.json["emb_loss"], abs=1e-5)
    assert logs["rec_loss"].item() == pytest.approx(g.json["rec_loss"], abs=1e-5)


def test_three_training_steps(golden):
    g = golden("vqkd_V1_clip")
    tokenizer = build(g).train()
    optimizer = torch.optim.AdamW(beit2.parameter_groups(tokenizer, 1e-4), lr=1e-4, betas=(0.9, 0.99))
    assert sorted(tokenizer.no_weight_decay()) == g.json["no_weight_decay"]
    for step in range(3):
        loss, logs = tokenizer(g[f"train_x_{step}"])
        for name, value in logs.items():
            assert value.item() == pytest.approx(g.json["train_logs"][step][name], abs=1e-5), name
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for name, parameter in tokenizer.named_parameters():
                if parameter.requires_grad and g.json["grad_norms_step0"][name] > 1e-6:
                    expected = g.json["grad_norms_step0"][name]
                    assert parameter.grad.norm().item() == pytest.approx(expected, rel=1e-4), name
        optimizer.step()
        weight = tokenizer.quantize.embedding.weight
        torch.testing.assert_close(weight, g[f"codebook_after_{step + 1}"], rtol=0, atol=1e-5)
        torch.testing.assert_close(
            tokenizer.quantize.cluster_size, g[f"cluster_size_after_{step + 1}"], rtol=0, atol=1e-5
        )
    for name, parameter in tokenizer.named_parameters():
        if parameter.requires_grad:
            norm, total = g.json["after_3_steps_norm_sum"][name]
            assert parameter.norm().item() == pytest.approx(norm, rel=1e-5, abs=1e-4), name
            assert parameter.sum().item() == pytest.approx(total, abs=1e-3), name


def test_kmeans_and_quantizer_gradient(golden):
    g = golden("quantizer_kmeans")
    torch.manual_seed(3)
    means, counts = kmeans(g["samples"], 24)
    torch.testing.assert_close(means, g["kmeans_means"], rtol=0, atol=1e-6)
    assert torch.equal(counts, g["kmeans_bins"])

    quantizer = NormEMAQuantizer(24, 8, decay=0.9, kmeans_init=True).train()

    def rows(z):
        return z.flatten(2).transpose(1, 2)  # [B, C, h, w] -> [B, N, C]

    torch.manual_seed(4)
    codes, loss, ids = quantizer(rows(g["z1"]))
    torch.testing.assert_close(codes, rows(g["zq1"]))
    assert torch.equal(ids.flatten(), g["idx1"]) and loss.item() == pytest.approx(g["loss1"].item(), abs=1e-6)
    z = g["z2"].clone().requires_grad_()
    codes, loss, ids = quantizer(rows(z))
    assert torch.equal(ids.flatten(), g["idx2"]) and loss.item() == pytest.approx(g["loss2"].item(), abs=1e-6)
    codes = codes.transpose(1, 2).unflatten(2, (10, 5))
    (loss + (codes * (torch.arange(codes.numel()).view(codes.shape) % 7)).mean()).backward()
    torch.testing.assert_close(z.grad, g["z2_grad"], rtol=1e-4, atol=1e-8)
    for name, tensor in quantizer.state_dict().items():
        torch.testing.assert_close(tensor, g[f"sd_after.{name}"], rtol=0, atol=1e-5, msg=name)


def test_pre_processing(golden):
    g = golden("vqkd_preprocess")
    shape = {"img_size": 4, "patch_size": 4, "dim": 8, "depth": 1, "heads": 1, "n_code": 4, "code_dim": 2}
    for process_type in ("default", "imagenet_norm", "dall-e"):
        tokenizer = beit2.build_tokenizer(process_type=process_type, decoder_depth=1, **shape)
        torch.testing.assert_close(tokenizer.pre_process(g["x"]), g[f"{process_type}_unit"])
        torch.testing.assert_close(tokenizer.pre_process(g["x"] * 255), g[f"{process_type}_255"])
    x = tokenizer.pre_process(g["x"])
    x = beit2.build_tokenizer(decoder_depth=1, **shape).pre_process(g["x"])
    torch.testing.assert_close(ScalingLayer(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)(x), g["scale_clip"])
    torch.testing.assert_close(ScalingLayer(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)(x), g["scale_im"])
    with pytest.raises(ValueError, match="process_type 'wrong'"):
        beit2.build_tokenizer(process_type="wrong", **shape)


def test_base_tokenizer_names_and_groups(golden):
    tokenizer = beit2.create_tokenizer("vqkd_encoder_base_decoder_3x768x12_clip")
    names = golden("state_dict_keys").json["vqkd_encoder_base_decoder_3x768x12_clip as_tokenzer"]
    found = {name: [list(tensor.shape), str(tensor.dtype)] for name, tensor in tokenizer.state_dict().items()}
    assert list(found.items()) == list(names.items())
    by_id = {id(parameter): name for name, parameter in tokenizer.named_parameters()}
    (expected,) = (v for k, v in golden("param_groups").json.items() if k.startswith("vqkd"))
    groups = beit2.parameter_groups(tokenizer, 0.05)
    assert [[by_id[id(p)] for p in group["params"]] for group in groups] == [group["params"] for group in expected]


def test_weight_files(golden, tmp_path):
    g = golden("vqkd_V1_clip")
    trained = build(g)
    torch.save({"model": trained.state_dict()}, tmp_path / "training.pth")  # with teacher and scaling layer
    plain = beit2.build_tokenizer(**g.json["config"]).eval()
    load_tokenizer_weights(plain, tmp_path / "training.pth")
    assert torch.equal(plain.get_codebook_indices(g["images"]), g["tokens"])

    other = beit2.build_tokenizer(**(g.json["config"] | {"n_code": 32}))
    with pytest.raises(UsageError, match="codebook is 64 x 16.*--codebook_size 64"):
        load_tokenizer_weights(other, tmp_path / "training.pth")
    wider = beit2.build_tokenizer(**(g.json["config"] | {"depth": 3}))
    with pytest.raises(UsageError, match="encoder.blocks.2.*absent"):
        load_tokenizer_weights(wider, tmp_path / "training.pth")
    torch.save({"model": {"head.weight": torch.zeros(2)}}, tmp_path / "other.pth")
    with pytest.raises(UsageError, match="not a VQ-KD tokenizer"):
        load_tokenizer_weights(plain, tmp_path / "other.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "training.pth").read_bytes()[:5000])
    with pytest.raises(UsageError, match="cut.pth"):
        load_tokenizer_weights(plain, tmp_path / "cut.pth")


def test_dead_codes_get_places_among_the_next_vectors():
    torch.manual_seed(0)
    quantizer = NormEMAQuantizer(16, 4).train()
    near = F.normalize(torch.tensor([1.0, 0.1, 0, 0]) + 0.05 * torch.randn(2, 30, 4), dim=-1)  # few codes are near
    quantizer(near)
    dead = quantizer.cluster_size == 0
    before = quantizer.embedding.weight.clone()
    assert quantizer.revive_unused() == int(dead.sum()) > 10
    quantizer.reset_usage()
    assert torch.equal(quantizer.embedding.weight, before)  # until the next batch
    with torch.no_grad():
        quantizer.eval()(near)
        assert torch.equal(quantizer.embedding.weight, before)  # and an evaluation is none
    quantizer.train()(near)
    after = quantizer.embedding.weight
    assert torch.equal(after.norm(dim=1).round(decimals=5), torch.ones(16))
    likeness = (after[dead] @ near.flatten(0, 1).T).amax(dim=1)
    assert likeness.min() > 0.99 and quantizer.unused_codes() < int(dead.sum())
    few = NormEMAQuantizer(16, 4).train()
    few.revive_unused()
    few(near[:1, :5])  # more dead codes than vectors
    assert few.embedding.weight.isfinite().all()


def test_perplexity_counts_codes_in_equal_use():
    quantizer = NormEMAQuantizer(8, 4)
    quantizer.count_usage(torch.tensor([0, 1, 2, 3]))
    assert quantizer.perplexity() == pytest.approx(4)
    quantizer.count_usage(torch.tensor([0] * 1000))
    assert 1 < quantizer.perplexity() < 1.1
    quantizer.reset_usage()
    assert quantizer.perplexity() == pytest.approx(1)


def test_codebook_use_is_counted():
    torch.manual_seed(0)
    quantizer = NormEMAQuantizer(8, 4)
    quantizer.reset_usage()
    assert quantizer.unused_codes() == 8
    quantizer.count_usage(torch.tensor([[0, 1], [1, 7]]))
    assert quantizer.unused_codes() == 5


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_teacher_from_a_transformers_folder(tmp_path, activation):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=128, projection_dim=12, num_hidden_layers=2, num_attention_heads=4,
        image_size=32, patch_size=8, hidden_act=activation, layer_norm_eps=1e-5 if activation == "gelu" else 0.03,
    )  # fmt: skip
    theirs = CLIPVisionModelWithProjection(config).eval()
    for name, parameter in theirs.named_parameters():  # large enough for the activations to differ
        if "fc1" in name:
            torch.nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path)
    ours = load_teacher(tmp_path, "clip")
    assert build_teacher(ours.config).visual.ln_post.eps == config.layer_norm_eps  # also from a tokenizer's checkpoint
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        states = theirs.vision_model(images).last_hidden_state[:, 1:]
        expected = theirs.visual_projection(theirs.vision_model.post_layernorm(states))
        torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-5)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | {"hidden_act": "silu"}))
    with pytest.raises(ValueError, match="its activation silu is none of"):
        load_teacher(tmp_path, "clip")


def test_clip_teacher_from_an_openai_file(golden, tmp_path):
    g = golden("vqkd_V1_clip")
    torch.save(g.state("sd.teacher_model."), tmp_path / "openai.pt")
    teacher = load_teacher(tmp_path / "openai.pt", "clip", heads=1)
    tokenizer = build(g)
    x = tokenizer.scaling_layer(tokenizer.pre_process(g["images"]))
    torch.testing.assert_close(teacher(x), g["target"], rtol=1e-4, atol=1e-5)

    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "ViT-B-16.pt")
    with pytest.raises(UsageError) as caught:
        load_teacher(tmp_path / "ViT-B-16.pt", "clip")
    assert "a TorchScript archive, which is code" in caught.value.message
    torch.save({"vision_model.embeddings.patch_embedding.weight": torch.zeros(4, 3, 8, 8)}, tmp_path / "tower.bin")
    with pytest.raises(ValueError, match="has no visual_projection.weight"):
        load_teacher(tmp_path / "tower.bin", "clip")


def test_dino_teacher_is_timm_s_vit(tmp_path):
    import timm

    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0).eval()
    torch.save({"teacher": {f"module.backbone.{k}": v for k, v in vit.state_dict().items()}}, tmp_path / "dino.pth")
    teacher = load_teacher(tmp_path / "dino.pth", "dino")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), vit.forward_features(images)[:, 1:], rtol=1e-4, atol=1e-5)
    tokenizer = beit2.build_tokenizer(
        teacher, img_size=32, patch_size=16, dim=16, depth=1, heads=1, decoder_depth=1, decoder_out_dim=192, n_code=8
    )
    loss, _ = tokenizer.train()(torch.rand(2, 3, 32, 32))
    loss.backward()
    assert all(p.grad is None for p in tokenizer.teacher_model.parameters())
    assert not tokenizer.teacher_model.training
    with pytest.raises(
        ValueError, match="32 pixels in patches of 16, the tokenizer 32 in patches of 8: give .* --patch_size 16"
    ):
        beit2.build_tokenizer(teacher, img_size=32, patch_size=8, decoder_out_dim=192, dim=16, depth=1, heads=1)


def test_own_classifier_is_a_teacher(tmp_path):
    """A classifier without relative positions and layer scale is a ViT as timm has it."""
    torch.manual_seed(0)
    classifier = beit2.build_classifier(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1, num_classes=3, use_mean_pooling=False
    ).eval()
    for name, parameter in classifier.named_parameters():
        if name.endswith("_bias"):
            torch.nn.init.normal_(parameter)
    torch.save({"model": classifier.state_dict()}, tmp_path / "classifier.pth")
    teacher = load_teacher(tmp_path / "classifier.pth", "dino")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = classifier.forward_features(images, return_patch_tokens=True)
        torch.testing.assert_close(teacher(images), expected, rtol=1e-4, atol=1e-5)


def test_the_pixel_teacher_knows_the_pixels_and_nothing_else(tmp_path):
    """The demo's teacher: it was trained on nothing, so no label can reach the tokenizer."""
    from pixel_teacher import pixel_teacher

    torch.save(pixel_teacher(8, 48), tmp_path / "teacher.pth")
    teacher = load_teacher(tmp_path / "teacher.pth", "dino")
    images = torch.rand(2, 3, 48, 48)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (teacher.mean, teacher.std))
    features = teacher((images - mean) / std)  # [2, 36, 96]
    small = F.avg_pool2d(images[1, :, 8:16, 40:48], 2).flatten()  # second row, last column
    expected = F.layer_norm(torch.cat((small, 1 - small)), (96,))
    torch.testing.assert_close(features[1, 11], expected, rtol=0, atol=1e-3)
    white, black, blue = (
        (torch.tensor(c).view(1, 3, 1, 1) - mean) / std for c in ((1.0,) * 3, (0.0,) * 3, (0, 0, 1.0))
    )
    kinds = torch.stack([teacher(colour.expand(1, 3, 48, 48))[0, 0] for colour in (white, black, blue)])
    alike = F.cosine_similarity(kinds[:, None], kinds[None], dim=2)
    torch.testing.assert_close(
        alike, torch.tensor([[1, -1, -1 / 3], [-1, 1, 1 / 3], [-1 / 3, 1 / 3, 1]]), atol=1e-3, rtol=0
    )
