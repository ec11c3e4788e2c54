"""Checkpoints of other settings and of other programs: evaluated as what they are, and loaded."""

import shutil

import pytest
import torch

from common import checkpoint_file


@pytest.fixture
def tiny(project, golden):
    def options(output, *more):
        base = ["--config-dir", str(project / "test"), "--config-name", "tiny", f"task.data={golden / 'bin'}"]
        return [*base, "--device", "cpu", "--output_dir", str(output), *more]

    return options


def valid_loss(folder):
    import json

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "valid"][-1]


def test_evaluation_and_probe_take_the_checkpoints_configuration(tiny, golden, tmp_path, capsys):
    import probe
    import train
    import validate

    settings = ["model.average_top_k_layers=1", "model.teacher_input=full", "task.mask_prob=0.15", "--seed", "3"]
    settings += ["model.transformer.encoder.layers=2", "optimization.max_update=3", "dataset.max_tokens=128"]
    train.main(tiny(tmp_path / "run", *settings))
    path = f"common_eval.path={tmp_path}/run/checkpoints/checkpoint_last.pt"
    capsys.readouterr()
    validate.main(tiny(tmp_path / "eval", path))
    assert valid_loss(tmp_path / "eval") == pytest.approx(valid_loss(tmp_path / "run"), rel=1e-6)
    words = capsys.readouterr().out
    assert "the checkpoint's own configuration counts; it differs from tiny.yaml in" in words
    assert all(word in words for word in ("task.mask_prob=0.15 (0.35)", "model.teacher_input=full", "common.seed=3"))
    validate.main(tiny(tmp_path / "over", path, "task.mask_prob=0.5"))  # overrides come on top
    assert valid_loss(tmp_path / "over") != pytest.approx(valid_loss(tmp_path / "run"), rel=1e-4)
    probe.main(tiny(tmp_path / "probe", path))
    assert "task.mask_prob=0.15 (0.35)" in capsys.readouterr().out

    shutil.copytree(golden / "bin", tmp_path / "other")
    first, second, *words = (golden / "bin/dict.txt").read_text().splitlines()
    (tmp_path / "other/dict.txt").write_text("\n".join([second, first, *words]) + "\n")
    start = path.replace("common_eval.path", "checkpoint.finetune_from_model")
    for main, key in ((validate.main, path), (probe.main, path), (train.main, start)):
        with pytest.raises(SystemExit):
            main(tiny(tmp_path / "another", key, f"task.data={tmp_path}/other", *settings))
        assert "checkpoint_last.pt: it was trained with another dict.txt" in capsys.readouterr().err


def published(checkpoint):
    """The form that Meta published: RoBERTa's head and no regression head, names of older releases."""
    model = {}
    for name, value in checkpoint["model"].items():
        if "regression_head" in name or name == "encoder._ema" or name.endswith("version"):
            continue
        name = name.replace("encoder.sentence", "decoder.sentence").replace("layernorm_embedding", "emb_layer_norm")
        name = name.replace("self_attn_layer_norm", "layer_norms.0").replace("final_layer_norm", "layer_norms.1")
        module, _, kind = name.rpartition("q_proj.")
        if module:
            parts = [checkpoint["model"][f"{module}{x}_proj.{kind}".replace("decoder", "encoder")] for x in "qkv"]
            model[f"{module}in_proj_{kind}"] = torch.cat(parts)
        elif "k_proj." not in name and "v_proj." not in name:
            model[name] = value
    words, dim = checkpoint["model"]["encoder.sentence_encoder.embed_tokens.weight"].shape
    head = {"weight": torch.zeros(words, dim), "bias": torch.zeros(words), "dense.weight": torch.zeros(dim, dim)}
    return model | {f"decoder.lm_head.{name}": value for name, value in head.items()}


def test_published_checkpoints_load(golden, tiny, tmp_path, capsys):
    import train

    reference = checkpoint_file.load(golden / "checkpoint_tiny.pt")
    torch.save({"args": None, "model": published(reference)}, tmp_path / "published.pt")
    settings = ["--max_steps", "1", "checkpoint.restore_file=none"]  # the first update has a learning rate of 0
    train.main(tiny(tmp_path / "run", *settings, f"checkpoint.finetune_from_model={tmp_path}/published.pt"))
    words = capsys.readouterr().out
    assert "encoder.lm_head not used; encoder.regression_head as initialised" in words
    model = checkpoint_file.load(tmp_path / "run/checkpoints/checkpoint_last.pt")["model"]
    for name, value in reference["model"].items():
        if name != "encoder._ema" and "regression_head" not in name:
            assert torch.equal(model[name], value), name


def test_a_published_checkpoint_becomes_a_huggingface_folder(golden, tmp_path):
    import convert_checkpoint

    reference = checkpoint_file.load(golden / "checkpoint_tiny.pt")
    torch.save({"cfg": reference["cfg"], "model": published(reference)}, tmp_path / "published.pt")
    convert_checkpoint.main([str(tmp_path / "published.pt"), str(tmp_path / "folder")])
    assert (tmp_path / "folder" / "model.safetensors").is_file()
