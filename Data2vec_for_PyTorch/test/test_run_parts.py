"""Batches as the model wants them, configurations, and the rules of stopping, each by itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

PROJECT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["base", "base_64"])
def test_published_configurations_load(name):
    from data2vec.config import load_config

    config, notes = load_config(PROJECT / "configs/text/pretraining", name, ["task.data=x"])
    assert config.task.tokens_per_sample == (512 if name == "base" else 64)
    assert any("ddp_backend" in note for note in notes)
    given = yaml.safe_load((PROJECT / "configs/text/pretraining" / f"{name}.yaml").read_text())
    assert config.model.transformer.encoder.layers == given["model"]["transformer"]["encoder"]["layers"]


def test_values_take_their_keys_type():
    from data2vec.config import load_config

    settings = ["task.data=2024", "optimization.max_update=1e3", "optimization.lr=1"]
    settings += ["lr_scheduler.warmup_init_lr=1e-7", "dataset.max_tokens_valid=${dataset.max_tokens}"]
    settings += ["model.ema_anneal_end_step=null"]
    config, _ = load_config(PROJECT / "test", "tiny", settings)
    assert config.task.data == "2024" and config.dataset.max_tokens_valid == 256
    values = config.optimization.max_update, config.model.ema_anneal_end_step, config.optimization.lr[0]
    assert values == (1000, 1000, 1.0) and [type(value) for value in values] == [int, int, float]
    assert config.lr_scheduler.warmup_init_lr == 1e-7


@pytest.mark.parametrize("text", ["/data/a #b", "2024_01", "0x1F", "a: b", "1e3", "[x]", "/data/a=b"])
def test_overrides_keep_a_text_as_the_user_wrote_it(text):
    from data2vec.config import load_config

    for spelled in (text, f'"{text}"', f"'{text}'"):
        config, _ = load_config(PROJECT / "test", "tiny", [f"task.data={spelled}"])
        assert config.task.data == text
    config, _ = load_config(PROJECT / "test", "tiny", ["task.data=x", "checkpoint.restore_file=null"])
    assert config.checkpoint.restore_file is None


@pytest.mark.parametrize(
    "text, columns",
    [
        ("[text #1]", ["text #1"]),
        ("[yes,no]", ["yes", "no"]),
        ("007", ["007"]),
        ("['a, b' , \"1e3\"]", ["a, b", "1e3"]),
    ],
)
def test_overrides_keep_a_list_of_texts(text, columns):
    from data2vec.config import load_config

    files = [f"task.{key}=x" for key in ("data", "encoder_json", "vocab_bpe", "dict")]
    config, _ = load_config(PROJECT / "configs/text/finetuning", "base", [*files, f"task.columns={text}"])
    assert list(config.task.columns) == columns


def test_a_group_without_keys_is_refused():
    from common.errors import UsageError
    from data2vec.config import load_config

    with pytest.raises(UsageError, match="task=masked_lm: is a group of keys; write task._name=masked_lm"):
        load_config(PROJECT / "test", "tiny", ["task=masked_lm"])


def test_configurations_are_found_from_any_folder(tmp_path, monkeypatch):
    from data2vec.config import load_config

    monkeypatch.chdir(tmp_path)
    assert load_config("configs/text/pretraining", "base", ["task.data=x"])[0].task.tokens_per_sample == 512


def test_max_positions_leaves_longer_samples_out(corpus):
    from data2vec.config import load_config
    from data2vec.data.pretraining_data import PretrainingData

    config, _ = load_config(PROJECT / "test", "tiny", [f"task.data={corpus}", "model.max_positions=40"])
    data = PretrainingData(config)
    samples, batches = data.split("train", training=True)
    assert samples.sizes.max() > 40 and max(samples.sizes[batch].max() for batch in batches) <= 40
    dropped = samples.sizes > 40
    share = 100 * samples.sizes[dropped].sum() / samples.sizes.sum()
    assert (
        f"{dropped.sum()} of {len(dropped)} samples are longer than 40 tokens and are left out, with" in data.notes[0]
    )
    assert f"with {share:.1f} % of the tokens" in data.notes[0] and share > 100 * dropped.mean()


def test_configuration_of_a_fairseq_checkpoint_is_understood(golden):
    """All groups that concern pretraining; the others (generation, bmuf, ...) belong to other programs."""
    from omegaconf import OmegaConf

    from data2vec.config import check_config

    cfg = torch.load(golden / "checkpoint_tiny.pt", weights_only=True)["cfg"]
    groups = ("task", "criterion", "optimizer", "lr_scheduler")
    accepted = {g: {k: v for k, v in cfg[g].items() if k not in ("lr", "max_update", "tpu")} for g in groups}
    accepted["optimization"] = {"max_update": 3}
    accepted["dataset"] = {"max_tokens": 3}
    config, _ = check_config(OmegaConf.create(accepted), "checkpoint")
    assert config.task.tokens_per_sample == 64


def test_collapse_is_explained():
    from data2vec.training.update import check_collapse, representation_std

    same = torch.ones(50, 8)
    std = representation_std(torch.randn(50, 8), same)
    with pytest.raises(FloatingPointError, match="collapse at update 7.*targets"):
        check_collapse(*std.tolist(), num_updates=7)


def test_loss_scaler_rules():
    from data2vec.training.loss_scaler import LossScaler

    scaler = LossScaler(True, scale=8, window=2)
    assert [scaler.update(True) or scaler.scale for _ in range(4)] == [8, 16, 16, 32]
    assert (scaler.update(False), scaler.scale) == (None, 16)
    floor = LossScaler(True, scale=8, threshold=4)
    assert [floor.update(False) or floor.scale for _ in range(3)] == [4, 4, 4]
    low = LossScaler(True, scale=2e-4)
    with pytest.raises(FloatingPointError, match="min_loss_scale"):
        low.update(False)


@pytest.mark.parametrize("norm", ["layer_norm_target_layer", "batch_norm_target_layer", "instance_norm_targets"])
def test_loader_plans_what_the_model_needs(corpus, golden, norm):
    """The same loss as with the plan the model makes itself, also for targets whose statistics include padding."""
    from omegaconf import OmegaConf

    from data2vec import build_model
    from data2vec.config import load_config
    from data2vec.data.pretraining_data import PretrainingData

    settings = [f"task.data={corpus}", "model.layer_norm_target_layer=false", f"model.{norm}=true"]
    config, _ = load_config(PROJECT / "test", "tiny", settings)
    data = PretrainingData(config)
    model = build_model(OmegaConf.to_container(config.model), len(data.vocab)).eval()
    batch = next(b for b in data.train_batches(1).loader(0) if b.plan.has_padding)
    planned = model(batch.src_tokens, batch.target_tokens, 168, batch.plan)
    torch.testing.assert_close(planned["loss_sum"], model(batch.src_tokens, batch.target_tokens, 168)["loss_sum"])


def test_length_buckets_change_no_result(corpus):
    from omegaconf import OmegaConf

    from data2vec import build_model, npu_patches
    from data2vec.config import load_config
    from data2vec.data.pretraining_data import PretrainingData

    config, _ = load_config(PROJECT / "test", "tiny", [f"task.data={corpus}"])
    plain = PretrainingData(config)
    assert npu_patches.apply_to_config(config, torch.device("cpu")) == []
    assert "64" in npu_patches.use_length_buckets(config)
    bucketed = PretrainingData(config)
    model = build_model(OmegaConf.to_container(config.model), len(plain.vocab)).eval()
    for a, b, _ in zip(plain.train_batches(1).loader(0), bucketed.train_batches(1).loader(0), range(4), strict=False):
        assert b.src_tokens.shape[1] == b.plan.teacher_tokens.shape[1] == b.plan.rows.width == 64
        first, second = (model(x.src_tokens, x.target_tokens, 168, x.plan)["loss_sum"] for x in (a, b))
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def test_collated_batch_equals_golden(corpus, golden):
    from data2vec.config import load_config
    from data2vec.data.pretraining_data import PretrainingData

    expected = np.load(golden / "collate.npz")
    config, _ = load_config(PROJECT / "test", "tiny", [f"task.data={corpus}"])
    samples, _ = PretrainingData(config).split("train", training=True)
    batch = samples.collate(expected["ids"], epoch=1)
    for key in ("src_tokens", "target_tokens", "src_lengths"):
        np.testing.assert_array_equal(getattr(batch, key).numpy(), expected[key])
    assert batch.num_tokens == expected["ntokens"]
