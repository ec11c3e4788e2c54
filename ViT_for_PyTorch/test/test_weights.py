"""Weights from every kind of file the project reads, and what it says about files it cannot use."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import vit
from common.checkpoint_file import CheckpointError
from vit.weights import download, labels
from vit.weights import loading as weights

GOLDEN = Path(__file__).parent / "golden"
TINY = dict(img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=4)


def tiny(num_classes: int = 10, **overrides):
    return vit.build_model(**{**TINY, **overrides}, num_classes=num_classes)


@pytest.fixture
def gap_state():
    return weights.read_state_dict(GOLDEN / "mf_gap.ckpt")


@pytest.fixture
def pretrain_file(tmp_path):
    """A file with the keys of mae_pretrain_*.pth: the encoder with `norm`, no head, and a decoder."""
    state = weights.read_state_dict(GOLDEN / "mf_cls.ckpt")
    state = {name: value for name, value in state.items() if not name.startswith("head.")}
    state["mask_token"] = torch.zeros(1, 1, 32)
    state["decoder_pos_embed"] = torch.zeros(1, 17, 32)
    state["decoder_embed.weight"], state["decoder_embed.bias"] = torch.zeros(32, 64), torch.zeros(32)
    torch.save({"model": state}, tmp_path / "mae_pretrain.pth")
    return tmp_path / "mae_pretrain.pth"


def test_pretrained_encoder_reports_the_keys_mae_reports(pretrain_file):
    model = tiny()
    missing, unexpected = vit.load_weights(model, pretrain_file)
    expected = json.loads((GOLDEN / "pretrain_load_keys.json").read_text())
    assert (missing, unexpected) == (sorted(expected["missing"]), sorted(expected["unexpected"]))
    stored = torch.load(pretrain_file, weights_only=True)["model"]
    assert torch.equal(model.blocks[1].attn.qkv.weight, stored["blocks.1.attn.qkv.weight"])
    assert model.head.weight.abs().max() < 1e-3  # a fresh head


def test_pretrained_encoder_cannot_be_evaluated(pretrain_file):
    with pytest.raises(CheckpointError, match="mae_pretrain.pth: has no classification head"):
        vit.load_weights(tiny(), pretrain_file, head="required")


@pytest.mark.parametrize("wrap", [lambda s: {"model": s}, lambda s: {"state_dict": s}, lambda s: s])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_torch_files_load_however_they_are_wrapped(tmp_path, gap_state, wrap, prefix):
    torch.save(wrap({prefix + name: value for name, value in gap_state.items()}), tmp_path / "w.pth")
    model = tiny()
    assert vit.load_weights(model, tmp_path / "w.pth", head="required") == ([], [])
    assert all(torch.equal(value, gap_state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("img_size", "key"), [(64, "up2x"), (24, "minus1")])
def test_positional_embedding_is_resampled_as_mae_does(tmp_path, gap_state, img_size, key):
    golden = np.load(GOLDEN / "pos_embed_interp.npz")
    gap_state["pos_embed"] = torch.from_numpy(golden["src"])
    torch.save({"model": gap_state}, tmp_path / "w.pth")
    model = tiny(img_size=img_size)
    assert vit.load_weights(model, tmp_path / "w.pth") == ([], [])
    torch.testing.assert_close(model.pos_embed.data, torch.from_numpy(golden[key]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("head", ["optional", "required"])
def test_another_number_of_classes_is_an_error(head):
    with pytest.raises(CheckpointError, match=r"mf_gap.ckpt: its head has 10 classes, the model has 7"):
        vit.load_weights(tiny(7), GOLDEN / "mf_gap.ckpt", head=head)


def test_fine_tuning_replaces_a_head_with_another_number_of_classes(gap_state):
    model = tiny(7)
    missing, unexpected = vit.load_weights(model, GOLDEN / "mf_gap.ckpt", head="new")
    assert (missing, unexpected) == (["head.bias", "head.weight"], [])
    assert torch.equal(model.fc_norm.weight, gap_state["fc_norm.weight"])
    assert model.head.weight.abs().max() < 1e-3


def test_fine_tuning_keeps_a_head_that_fits(gap_state):
    model = tiny()
    assert vit.load_weights(model, GOLDEN / "mf_gap.ckpt", head="new") == ([], [])
    assert torch.equal(model.head.weight, gap_state["head.weight"])


def test_file_of_another_pooling_is_an_error_and_changes_nothing():
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"mf_cls.ckpt.*lacks fc_norm.bias, fc_norm.weight.*global_pool"):
        vit.load_weights(model, GOLDEN / "mf_cls.ckpt")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.2.mlp.fc1.bias"), "lacks blocks.2.mlp.fc1.bias"),
        (lambda s: s.update({"blocks.3.norm1.bias": torch.zeros(64)}), "blocks.3.norm1.bias, which the model does not"),
        (lambda s: s.update({"patch_embed.proj.weight": torch.zeros(64, 3, 4, 4)}), r"is \(64, 3, 4, 4\)"),
        (lambda s: s.update({"pos_embed": torch.zeros(1, 19, 64)}), r"pos_embed is \(1, 19, 64\)"),
    ],
)
def test_files_that_do_not_fit_name_file_and_keys(tmp_path, gap_state, change, message):
    change(gap_state)
    torch.save({"model": gap_state}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=f"odd.pth.*{message}"):
        vit.load_weights(tiny(), tmp_path / "odd.pth")


class Exploit:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_unusable_files_are_named(tmp_path, capsys):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Exploit()))
    torch.save({"epoch": 3}, tmp_path / "no_weights.pth")
    for name, message in [("evil.pth", "evil.pth"), ("no_weights.pth", "holds no model weights"), ("no.pth", "no.pth")]:
        with pytest.raises(CheckpointError, match=message):
            vit.load_weights(tiny(), tmp_path / name)
    assert "must never run" not in capsys.readouterr().out


def test_imagenet_labels_only_for_a_thousand_classes():
    names = labels.labels_for(1000)
    assert len(names) == 1000 and names[0] == "tench" and names.count("crane") == 2
    assert labels.labels_for(3) == ["class_0", "class_1", "class_2"]
    with pytest.raises(ValueError, match="2 class names for a head of 3 classes"):
        labels.labels_for(3, ["a", "b"])


def test_class_names_travel_with_the_checkpoint(tmp_path):
    assert labels.load_class_names(tmp_path / "best.pt") is None
    labels.save_class_names(tmp_path, ["hérisson", "cat"])
    assert labels.load_class_names(tmp_path / "best.pt") == ["hérisson", "cat"]
    (tmp_path / labels.CLASS_NAMES_FILE).write_text("{")
    with pytest.raises(ValueError, match="class_names.json"):
        labels.load_class_names(tmp_path)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Published weights whose 'web server' is a folder, kept under a private TORCH_HOME."""
    source = tmp_path / "mae_tiny.pth"
    source.write_bytes(b"weights")
    entry = download.Published(source.as_uri(), "63f4f1", "vit_base_p16", 0)  # md5 of b"weights" starts so
    monkeypatch.setitem(download.PUBLISHED, "tiny", entry)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return source


def test_published_weights_are_fetched_once_and_checked_every_time(published):
    path = download.fetch("mindspore/tiny")
    assert path.read_bytes() == b"weights"
    published.unlink()
    assert download.fetch("tiny") == path  # no second download
    path.write_bytes(b"changed")
    with pytest.raises(download.DownloadError, match="SHA-256"):
        download.fetch("tiny")


def test_wrong_file_is_refused_and_kept(published):
    published.write_bytes(b"other")
    with pytest.raises(download.DownloadError, match="MD5"):
        download.fetch("tiny")
    assert (download.weights_folder() / "mae_tiny.pth").read_bytes() == b"other"


def test_offline_says_what_to_download_and_where_to_put_it(published):
    published.unlink()
    with pytest.raises(download.DownloadError) as caught:
        download.fetch("tiny")
    assert published.as_uri() in str(caught.value)
    assert str(download.weights_folder() / "mae_tiny.pth") in str(caught.value)
    with pytest.raises(ValueError, match="mae_vit_base_p16"):
        download.fetch("vit_unknown")
