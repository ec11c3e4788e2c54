"""train.py, validate.py and probe.py on pictures: a run, resume, ranks' shares, refusals."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import TEST, assert_same, last, lines, words

PROJECT = Path(__file__).resolve().parents[1]


def run(main, pictures, output, *arguments):
    return main(words(TEST, "tiny_vision", pictures, output, *arguments))


@pytest.fixture(scope="module")
def whole(train_main, pictures, tmp_path_factory):
    """The folder of a run of 9 updates, one and a half epochs of 6."""
    folder = tmp_path_factory.mktemp("whole")
    run(train_main, pictures, folder, "--log_every", "1")
    return folder


def test_a_run_and_what_it_leaves(whole):
    train = lines(whole, "train")
    assert [line["step"] for line in train] == list(range(1, 10))
    assert train[-1]["loss"] < train[0]["loss"] and all(line["target_std"] > 0.1 for line in train)
    assert lines(whole, "val")
    results = (whole / "Data2vec_for_PyTorch_bs4_1p_acc.log").read_text()
    for key in ("Status = OK", "ImagesPerSecond", "UpdatesPerSecond", "ValidBestLoss", "\nTrainingTime"):
        assert key in results
    checkpoint = last(whole)
    assert checkpoint["cfg"]["model"]["_name"] == "data2vec_vision" and "_ema" in checkpoint["model"]
    assert checkpoint["extra_state"]["train_iterator"] == {
        "version": 2,
        "epoch": 2,
        "iterations_in_epoch": 3,
        "shuffle": True,
    }


@pytest.mark.parametrize("stop", [4, 7])
def test_resume_equals_continuation(train_main, pictures, tmp_path, whole, stop, capsys):
    """Bit for bit, with drop path and attention dropout, whatever number of workers; and the same log lines."""
    run(train_main, pictures, tmp_path, "--log_every", "1", "--max_steps", str(stop))
    capsys.readouterr()
    run(train_main, pictures, tmp_path, "--log_every", "1", "--num_workers", "1")
    parts, expected = last(tmp_path), last(whole)
    for key in ("model", "last_optimizer_state", "optimizer_history"):
        assert_same(expected[key], parts[key])
    meters = [checkpoint["extra_state"]["meters"]["epoch"] for checkpoint in (expected, parts)]
    for key in ("updates", "loss", "sample_size", "gnorm", "clipped", "ema_decay"):
        assert meters[0][key] == pytest.approx(meters[1][key], rel=1e-12), key
    out = capsys.readouterr().out
    assert re.search(rf"epoch {1 + stop // 6}, update {stop}", out)
    assert '"target_var"' in out and '"pred_var"' in out


def test_validation_and_probe_of_the_checkpoint(pictures, tmp_path, whole, capsys):
    import probe
    import validate

    path = f"common_eval.path={whole / 'checkpoints' / 'checkpoint_last.pt'}"
    saved = last(whole)["extra_state"]["val_loss"]
    run(validate.main, pictures, tmp_path, path)
    line = json.loads(re.search(r"\[val\]\[INFO\] - (\{.*\})", capsys.readouterr().out)[1])
    assert float(line["val_loss"]) == pytest.approx(saved, abs=1e-3)
    results = run(probe.main, pictures, tmp_path, path)
    assert results["checkpoint"]["largest class"] == pytest.approx(100 / 3)
    assert results["checkpoint"]["chance"] == pytest.approx(100 / (9 * 9), rel=0.2)  # 9 pictures, 9 patches at most
    assert 0 <= results["checkpoint"]["cloze retrieval"] <= 100
    assert results["checkpoint"]["nearest, pixels"] == results["untrained"]["nearest, pixels"]
    assert 0 <= results["checkpoint"]["nearest neighbour"] <= 100
    assert "on held-out images" in capsys.readouterr().out


def make_data(pictures, *settings, **ranks):
    from data2vec.config import load_config
    from data2vec.data.image_data import ImagePretrainingData

    config, _ = load_config(PROJECT / "test", "tiny_vision", [f"task.data={pictures}", *settings])
    return ImagePretrainingData(config, **ranks)


def test_views_follow_from_seed_epoch_and_index(pictures):
    data = make_data(pictures)
    samples, _ = data.split("train", training=True)
    state = torch.get_rng_state()
    first, again, later = (samples.collate(np.array([3, 5]), epoch) for epoch in (1, 1, 2))
    alone = samples.collate(np.array([5]), 1)
    assert torch.equal(state, torch.get_rng_state())
    assert first.images.dtype == torch.uint8 and first.images.shape == (2, 3, 32, 32)
    assert torch.equal(first.images, again.images) and torch.equal(first.mask, again.mask)
    assert torch.equal(first.images[1:], alone.images) and torch.equal(first.mask[1:], alone.mask)
    assert not torch.equal(first.images, later.images) and not torch.equal(first.mask, later.mask)
    other, _ = make_data(pictures, "common.seed=2").split("train", training=True)
    assert not torch.equal(first.images, other.collate(np.array([3, 5]), 1).images)
    sample, place = first.rows // 17, first.rows % 17 - 1
    expected = torch.zeros(2, 16, dtype=torch.bool)
    expected[sample, place] = True
    assert torch.equal(expected, first.mask)


def test_ranks_share_an_epoch(pictures):
    seen = []
    for rank in range(2):
        epoch = make_data(pictures, rank=rank, world_size=2).train_batches(1)
        assert len(epoch) == 3 and sum(epoch.rows) == 21
        seen += [int(i) for batch in epoch.batches for i in batch]
    assert sorted(seen) == list(range(21))


def test_a_flat_folder_of_any_pictures(tmp_path, train_main):
    """Grey, palette with transparency, 16 bits; no class folders, no train/."""
    (tmp_path / "flat").mkdir()
    values = np.random.default_rng(0).integers(0, 255, (40, 50), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "flat" / "grey.png")
    Image.fromarray(values).convert("P").save(tmp_path / "flat" / "palette.gif.png", transparency=0)
    Image.fromarray(np.stack([values] * 3, axis=2)).save(tmp_path / "flat" / "colour.JPG")
    (tmp_path / "flat" / "notes.txt").write_text("no picture")
    run(train_main, tmp_path / "flat", tmp_path / "out", "--max_steps", "2", "dataset.disable_validation=true")
    assert last(tmp_path / "out")["optimizer_history"][-1]["num_updates"] == 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits(train_main, pictures, tmp_path, precision):
    settings = ["--max_steps", "2", "dataset.disable_validation=true", "model.ema_transformer_only=false"]
    run(train_main, pictures, tmp_path, "--precision", precision, *settings)
    assert all(torch.isfinite(v).all() for k, v in last(tmp_path)["model"].items() if k != "_ema")


def test_training_starts_from_a_huggingface_folder(train_main, pictures, tmp_path, whole):
    import convert_checkpoint

    source = whole / "checkpoints" / "checkpoint_last.pt"
    convert_checkpoint.main([str(source), str(tmp_path / "hf"), "--teacher"])
    settings = ["optimization.lr=[0.0]", "dataset.disable_validation=true", "--max_steps", "1"]
    run(train_main, pictures, tmp_path / "out", f"checkpoint.finetune_from_model={tmp_path / 'hf'}", *settings)
    name = "encoder.blocks.1.mlp.0.weight"
    assert torch.equal(
        last(tmp_path / "out")["model"][name], last(whole)["model"]["_ema"][name.removeprefix("encoder.")]
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("dataset.valid_subset=test", ["test", "does not exist", "disable_validation"]),
        ("task.data=/does/not/exist", ["/does/not/exist"]),
        ("task.input_size=48", ["48", "image_size=32"]),
        ("model.patch_size=7", ["image_size=32", "patch_size=7"]),
        ("model.num_mask_patches=16", ["num_mask_patches=16", "1 to 15"]),
        ("model.average_top_k_layers=4", ["average_top_k_layers=4"]),
        ("model.layer_scale_init=1", ["model.layer_scale_init", "did you mean"]),
        ("model._name=data2vec_text", ["image_pretraining", "data2vec_text"]),
        ("dataset.batch_size=null", ["dataset.batch_size"]),
        ("dataset.batch_size=64 dataset.required_batch_size_multiple=32", ["21 pictures make no batch"]),
    ],
)
def test_refusals(train_main, pictures, tmp_path, capsys, overrides, words):
    with pytest.raises(SystemExit) as error:
        run(train_main, pictures, tmp_path / "out", *overrides.split())
    assert error.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and all(word in text for word in words), text
    assert not (tmp_path / "out").exists()


def test_broken_pictures_are_listed_before_training(train_main, tmp_path, capsys):
    for name in ("a.png", "b.jpg", "._c.png"):
        (tmp_path / name).write_bytes(b"\x89PNG cut")
    with pytest.raises(SystemExit):
        run(train_main, tmp_path, tmp_path / "out", "dataset.disable_validation=true")
    text = capsys.readouterr().err
    assert "2 broken pictures" in text and "a.png" in text and "b.jpg" in text and not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_stops_the_run_and_is_named(train_main, tmp_path, workers, capsys, monkeypatch):
    """One that the look before training, at 200 of them, has missed."""
    from common.data import pictures

    monkeypatch.setattr(pictures, "check", lambda paths: None)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG cut")
    settings = ["dataset.disable_validation=true", "--num_workers", str(workers)]
    with pytest.raises(SystemExit) as error:
        run(train_main, tmp_path, tmp_path / "out", *settings)
    text = capsys.readouterr().err
    assert error.value.code == 2 and text.count("\n") == 1
    assert text.startswith(f"error: {tmp_path / 'broken.png'}: not a readable picture")
    assert "Status = FAILED" in (tmp_path / "out" / "Data2vec_for_PyTorch_bs4_1p_acc.log").read_text()


@pytest.mark.parametrize("stray", ["train/stray.png", "train/flags/broken.png"])
def test_probe_refuses_pictures_without_class_and_broken_ones(pictures, tmp_path, whole, stray, capsys):
    import probe

    shutil.copytree(pictures, tmp_path / "data")
    (tmp_path / "data" / stray).write_bytes(b"\x89PNG cut")
    with pytest.raises(SystemExit):
        run(probe.main, tmp_path / "data", tmp_path, f"common_eval.path={whole / 'checkpoints' / 'checkpoint_last.pt'}")
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and stray in text and ("class folders" in text) == ("stray" in stray)


def test_published_configurations_are_the_base_model():
    from data2vec.config import load_config

    for name, patches, rate in (("base_imagenet", 120, 0.002), ("base_imagenet_d2v1", 75, 0.0005)):
        config, _ = load_config(PROJECT / "configs/vision/pretraining", name, ["task.data=x"])
        assert (config.model.embed_dim, config.model.depth, config.model.num_heads) == (768, 12, 12)
        assert config.model.num_mask_patches == patches and config.optimization.lr == [rate]
        assert config.dataset.batch_size * config.distributed_training.distributed_world_size == 2048


def test_cloze_figure_fills_masked_patches_alone(pictures, tmp_path, whole):
    import draw_cloze
    from data2vec.cloze_figure import cut, paste

    images = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8)
    assert torch.equal(paste(cut(images, 4)), images) and torch.equal(cut(images, 4)[1, 1], images[1, :, :4, 4:])
    run(draw_cloze.main, pictures, tmp_path, f"common_eval.path={whole / 'checkpoints' / 'checkpoint_last.pt'}")
    with Image.open(tmp_path / "cloze.png") as figure:
        assert figure.width > 500
