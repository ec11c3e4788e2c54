"""data2vec 2.0 as users start it: train.py on text and pictures, and what reads its checkpoints."""

import functools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from small_runs import TEST, assert_same, last, lines, words

STILL = [f"model.{name}=0" for name in ("encoder_dropout", "attention_dropout", "post_mlp_drop")]
STILL += [f"model.modalities.text.{name}=0" for name in ("dropout", "mask_noise_std", "decoder.input_dropout")]


@pytest.fixture
def text(golden):
    return functools.partial(words, TEST, "tiny_multi", golden / "bin")


@pytest.fixture
def vision(pictures):
    return functools.partial(words, TEST, "tiny_multi_vision", pictures)


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_it_learns_and_goes_on_bit_for_bit(project, request, tmp_path, kind):
    """With dropout, noise and, of pictures, stochastic depth and the [CLS] loss."""
    import train
    import validate

    options = request.getfixturevalue(kind)
    train.main(options(tmp_path / "whole"))
    train.main(options(tmp_path / "parts", "--max_steps", "5"))
    train.main(options(tmp_path / "parts"))
    whole, parts = last(tmp_path / "whole"), last(tmp_path / "parts")
    for key in ("model", "last_optimizer_state", "optimizer_history"):
        assert_same(whole[key], parts[key], key)
    losses = [line["loss"] for line in lines(tmp_path / "whole", "train")]
    assert losses[-1] < 0.9 * losses[0]
    path = f"common_eval.path={tmp_path}/whole/checkpoints/checkpoint_last.pt"
    validate.main(options(tmp_path / "eval", path))
    valid = [lines(tmp_path / folder, "val", "valid")[-1]["loss"] for folder in ("whole", "eval")]
    assert valid[0] == pytest.approx(valid[1], rel=1e-6)


def test_two_ranks_equal_update_freq_two(project, text, tmp_path):
    import train

    train.main(text(tmp_path / "one", *STILL, "optimization.update_freq=[2]", "optimization.max_update=4"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    command = [sys.executable, *launcher, *text(tmp_path / "two", *STILL, "optimization.max_update=4")]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, value in last(tmp_path / "one")["model"].items():
        if name != "_ema":
            torch.testing.assert_close(value, last(tmp_path / "two")["model"][name], rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("kind, precision", [("text", "bf16"), ("text", "fp16"), ("vision", "bf16")])
def test_sixteen_bits(project, request, tmp_path, kind, precision):
    import train

    options = request.getfixturevalue(kind)
    for name, more in (("fp32", []), (precision, ["--precision", precision])):
        train.main(options(tmp_path / name, *more, "optimization.max_update=4", *(STILL if kind == "text" else [])))
    full, half = (last(tmp_path / name)["extra_state"]["val_loss"] for name in ("fp32", precision))
    assert half == pytest.approx(full, rel=0.03)


def test_the_objective_is_part_of_a_checkpoints_identity(project, text, golden, tmp_path, capsys):
    import train

    own = ["--device", "cpu", "--output_dir", str(tmp_path), f"task.data={golden}/bin", "--max_steps", "1"]
    train.main(["--config-dir", str(TEST), "--config-name", "tiny", *own])
    with pytest.raises(SystemExit) as stop:
        train.main(text(tmp_path))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "settings.model._name was 'data2vec_text', is now 'data2vec_multi'" in error


def test_text_goes_to_huggingface_features_and_fine_tuning(project, bpe, golden, tmp_path, capsys):
    """By way of the first version's encoder, which computes the same on whole texts."""
    from transformers import Data2VecTextModel

    import convert_checkpoint
    import extract_features
    import finetune
    import train
    from data2vec.weights.pretrained import load_pretrained

    base = ["--config-dir", str(TEST), "--config-name", "tiny_multi", f"task.data={bpe}/bin", "--device", "cpu"]
    base += ["dataset.disable_validation=true", "optimization.max_update=3", "task.sample_break_mode=none"]
    train.main([*base, "--output_dir", f"{tmp_path}/run"])
    path = tmp_path / "run/checkpoints/checkpoint_last.pt"
    files = ["--encoder-json", f"{bpe}/encoder.json", "--vocab-bpe", f"{bpe}/vocab.bpe", "--dict", f"{bpe}/dict.txt"]
    model = load_pretrained(path).eval()
    ids = torch.tensor([[0, 5, 9, 44, 30, 2], [0, 7, 8, 2, 1, 1]])
    real = ids.ne(1)
    states = model.encode(ids, has_padding=True)
    for teacher in ([], ["--teacher"]):
        folder = tmp_path / f"hf{len(teacher)}"
        convert_checkpoint.main([str(path), str(folder), *files, *teacher])
        theirs = Data2VecTextModel.from_pretrained(folder, add_pooling_layer=False).eval()
        found = theirs(ids, attention_mask=real).last_hidden_state
        if not teacher:
            torch.testing.assert_close(found[real], states[real], rtol=1e-4, atol=1e-5)
        else:
            assert (found[real] - states[real]).abs().max() > 1e-4
    (tmp_path / "lines.txt").write_text("Out, damned spot!\n")
    extract_features.main([str(path), f"{tmp_path}/lines.txt", f"{tmp_path}/out.npz", *files, "--device", "cpu"])
    assert np.load(tmp_path / "out.npz")["features"].shape == (1, 32)
    keys = [f"task.encoder_json={bpe}/encoder.json", f"task.vocab_bpe={bpe}/vocab.bpe", f"task.dict={bpe}/dict.txt"]
    tune = ["--config-name", "demo", f"task.data={golden}/questions", "task.label_column=kind", "--device", "cpu"]
    tune += ["--output_dir", f"{tmp_path}/tuned", f"checkpoint.finetune_from_model={path}", "--max_steps", "2", *keys]
    finetune.main(tune)
    tuned = last(tmp_path / "tuned")["cfg"]["model"]["transformer"]
    assert tuned["encoder"]["layers"] == 2 and tuned["encoder"]["attention_heads"] == 4
    assert f"weights of {path}" in capsys.readouterr().out


def test_probe_figure_and_features_of_pictures(project, vision, pictures, tmp_path, capsys):
    import convert_checkpoint
    import draw_cloze
    import extract_features
    import probe
    import train

    train.main(vision(tmp_path / "run", "--max_steps", "2"))
    path = tmp_path / "run/checkpoints/checkpoint_last.pt"
    results = probe.main(vision(tmp_path / "probe", f"common_eval.path={path}"))
    assert results["checkpoint"]["linear probe"] > 0
    assert draw_cloze.main(vision(tmp_path / "figure", f"common_eval.path={path}")).stat().st_size > 10_000
    extract_features.main([str(path), f"{pictures}/val", f"{tmp_path}/out.npz", "--pool", "tokens", "--device", "cpu"])
    assert np.load(tmp_path / "out.npz")["states"].shape == (9, 16, 32)
    with pytest.raises(SystemExit) as stop:
        convert_checkpoint.main([str(path), f"{tmp_path}/hf"])
    assert stop.value.code == 2 and "is no model of Hugging Face's" in capsys.readouterr().err


def test_probe_and_figure_of_text(project, text, golden, tmp_path):
    import draw_cloze
    import probe
    import train

    train.main(text(tmp_path / "run", "--max_steps", "2"))
    path = f"common_eval.path={tmp_path}/run/checkpoints/checkpoint_last.pt"
    results = probe.main(text(tmp_path / "probe", path))
    assert results["checkpoint"]["cloze retrieval"] >= 0 and "teacher's probe" not in results["checkpoint"]
    (tmp_path / "encoder.json").write_text(json.dumps({str(i): i for i in range(300)}))
    drawn = draw_cloze.main(text(tmp_path / "figure", path, "--encoder-json", f"{tmp_path}/encoder.json"))
    assert drawn.stat().st_size > 5_000


def test_masks():
    from data2vec.data.multi.masks import block_masks, random_masks

    hidden = random_masks(50, 4, 0.48, np.random.default_rng(0))
    assert (~hidden).sum(axis=1).tolist() == [int(50 * (1 - 0.48))] * 4
    assert len({mask.tobytes() for mask in hidden}) == 4
    # the released setting of pictures: 39 of 196 patches stay visible, most of them in squares of 3 x 3
    hidden = block_masks(14, 200, 0.8, 3, np.random.default_rng(0), inverse=True, adjust=0.07)
    visible = ~hidden.reshape(200, 14, 14)
    assert (visible.sum(axis=(1, 2)) == 39).all()
    beside = (visible[:, :, 1:] & visible[:, :, :-1]).sum() / visible.sum()
    assert beside > 0.55  # of single patches it would be 0.18
    assert block_masks(14, 3, 0.6, 3, np.random.default_rng(0)).sum(axis=1).tolist() == [int(196 * 0.6)] * 3


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("tiny_multi", ["model.supported_modality=AUDIO"], "AUDIO: audio is not trained here, only text and"),
        ("tiny_multi", ["model.modalities.text.mask_prob=0.999"], "0 of 64 tokens (task.tokens_per_sample) would be"),
        ("tiny_multi", ["model.modalities.text.mask_length=4"], "mask_length=4: choose one of 1"),
        ("tiny_multi", ["model.recon_loss=1"], "model.recon_loss=1 is not supported, only 0"),
        ("tiny", ["task._name=mae_image_pretraining"], "that model is trained by masked_lm"),
        ("tiny_multi", ["optimizer.groups.decoder.lr_float=1"], "only the group 'default' is supported"),
        ("tiny_multi", ["task.tokens_per_sample=80"], "above model.modalities.text.max_source_positions=64"),
        ("tiny_multi_vision", ["task.input_size=64"], "give both the same value"),
        ("tiny_multi_vision", ["model.modalities.image.transformer_decoder=true"], "_decoder=True is not supported"),
    ],
)
def test_what_there_is_not_is_one_sentence(name, changes, words):
    from common.errors import UsageError
    from data2vec.config import load_config

    with pytest.raises(UsageError) as refusal:
        load_config(TEST, name, ["task.data=x", *changes])
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_composite_optimizer_is_the_one_it_holds():
    from data2vec.config import load_config

    config, _ = load_config(TEST, "tiny_multi", ["task.data=x"])
    assert (config.optimizer._name, config.optimizer.adam_eps, list(config.optimization.lr)) == ("adam", 1e-6, [0.01])
    assert config.lr_scheduler.warmup_updates == 4
    config, _ = load_config(TEST, "tiny_multi", ["task.data=x", "optimization.lr=[0.03]"])
    assert list(config.optimization.lr) == [0.03]
    groups = [f"optimizer.groups.default.{end}" for end in ("lr_float=0.02", "optimizer.weight_decay=0.3")]
    config, _ = load_config(TEST, "tiny_multi", ["task.data=x", *groups])
    assert (list(config.optimization.lr), config.optimizer.weight_decay) == ([0.02], 0.3)
    assert (config.optimizer.adam_eps, config.optimizer.adam_betas) == (1e-6, "(0.9,0.98)")


@pytest.mark.parametrize("name", ["base_text_only_task", "base_images_only_task", "demo_text", "demo_images"])
def test_the_settings_here_make_a_model(project, name):
    """Of the published size, where they are published: ViT-B's and BERT base's 12 blocks, the decoder beside them."""
    from omegaconf import OmegaConf

    from data2vec.config import load_config
    from data2vec.model.multi.model import build_multi_model

    config, _ = load_config(project / "configs/v2", name, ["task.data=x"])
    with torch.device("meta"):
        model = build_multi_model(OmegaConf.to_container(config.model), None if "images" in name else 50_265)
    blocks = [*model.blocks, *model.modality.context_encoder.blocks]
    if name.startswith("base"):
        assert len(blocks) == 12 and sum(p.numel() for b in blocks for p in b.parameters()) == 12 * 7_087_872
    assert sum(p.numel() for p in model.modality.decoder.parameters()) > 0
