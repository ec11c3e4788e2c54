"""extract_features.py: the same numbers however texts are put into batches and dealt to ranks."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from common import checkpoint_file


@pytest.fixture(scope="module")
def text_checkpoint(bpe, tmp_path_factory):
    from data2vec import Dictionary, build_model

    torch.manual_seed(0)
    encoder = {"embed_dim": 16, "ffn_embed_dim": 32, "layers": 2, "attention_heads": 2, "learned_pos": True}
    transformer = {"encoder": encoder, "max_source_positions": 24, "layernorm_embedding": True}
    config = {"_name": "data2vec_text", "average_top_k_layers": 2, "init_std": 0.2, "transformer": transformer}
    model = build_model(config, len(Dictionary.load(bpe / "dict.txt")) + 1)
    path = tmp_path_factory.mktemp("model") / "text.pt"
    vocab = Dictionary.load(bpe / "dict.txt")
    vocab.add_symbol("<mask>")
    extra = {"identity": {"data": {"vocabulary": vocab.digest()}}}
    checkpoint_file.save({"cfg": {"model": config}, "model": model.state_dict(), "extra_state": extra}, path)
    return path, model.encoder.sentence_encoder.eval()


def test_texts(project, golden, bpe, text_checkpoint, tmp_path, capsys):
    import extract_features
    from data2vec.data.bpe import TextEncoding

    path, encoder = text_checkpoint
    texts = ["Out, damned spot!", "What", "When shall we three meet again in thunder, lightning, or in rain, and " * 3]
    (tmp_path / "lines.txt").write_text("\n".join(texts) + "\n")
    files = ["--encoder-json", f"{bpe}/encoder.json", "--vocab-bpe", f"{bpe}/vocab.bpe", "--dict", f"{bpe}/dict.txt"]
    command = [str(path), f"{tmp_path}/lines.txt"]
    more = [*files, "--device", "cpu", "--batch_size"]
    extract_features.main([*command, f"{tmp_path}/tokens.npz", "--pool", "tokens", *more, "3"])
    assert "3 of" in (words := capsys.readouterr().out) and "1 cut at 24 tokens" in words
    extract_features.main([*command, f"{tmp_path}/mean.npz", *more, "1"])
    tokens, mean = np.load(tmp_path / "tokens.npz"), np.load(tmp_path / "mean.npz")
    assert mean["names"].tolist() == ["lines.txt:1", "lines.txt:2", "lines.txt:3"]
    for i, ids in enumerate(TextEncoding(*files[1::2]).encode(texts)):
        expected = torch.tensor([0, *ids[:22], 2])
        start, stop = tokens["offsets"][i : i + 2]
        assert tokens["ids"][start:stop].tolist() == expected.tolist()
        states = encoder(expected[None], has_padding=False)[0].detach().numpy()
        np.testing.assert_allclose(tokens["states"][start:stop], states, atol=1e-5)
        np.testing.assert_allclose(mean["features"][i], states[1:-1].mean(axis=0), atol=1e-5)

    table = str(golden / "questions" / "valid.csv")  # two ranks, one of which has one batch more
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [str(path), table, f"{tmp_path}/two.safetensors", *more, "20"]
    done = subprocess.run(
        [*launcher, "extract_features.py", *arguments], cwd=project, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    extract_features.main([str(path), table, f"{tmp_path}/one.npz", *more, "7"])
    from safetensors import safe_open

    with safe_open(tmp_path / "two.safetensors", "np") as file:
        one = np.load(tmp_path / "one.npz")
        assert json.loads(file.metadata()["names"]) == one["names"].tolist()
        np.testing.assert_allclose(file.get_tensor("features"), one["features"], atol=1e-5)


def test_another_vocabulary_of_the_same_length_is_refused(
    project, bpe, other_dict, text_checkpoint, golden, tmp_path, capsys
):
    """By all programs that take a dict.txt and a checkpoint; an old checkpoint, which says no digest, is taken."""
    import convert_checkpoint
    import extract_features
    import finetune

    path, _ = text_checkpoint
    (tmp_path / "lines.txt").write_text("Out, damned spot!\n")
    flags = ["--encoder-json", f"{bpe}/encoder.json", "--vocab-bpe", f"{bpe}/vocab.bpe", "--dict", str(other_dict)]
    keys = [f"task.encoder_json={bpe}/encoder.json", f"task.vocab_bpe={bpe}/vocab.bpe", f"task.dict={other_dict}"]
    tune = ["--config-name", "demo", f"task.data={golden}/questions", "task.label_column=kind", "--device", "cpu"]
    extract = [str(path), f"{tmp_path}/lines.txt", f"{tmp_path}/out.npz", *flags, "--device", "cpu"]
    for main, argv in (
        (extract_features.main, extract),
        (convert_checkpoint.main, [str(path), f"{tmp_path}/folder", *flags]),
        (finetune.main, [*tune, "--output_dir", f"{tmp_path}/run", f"checkpoint.finetune_from_model={path}", *keys]),
    ):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and f"are not those of {path}: it was trained with another dict.txt" in error
    saved = checkpoint_file.load(path)
    checkpoint_file.save({"cfg": saved["cfg"], "model": saved["model"]}, tmp_path / "old.pt")
    extract_features.main([f"{tmp_path}/old.pt", *extract[1:]])
    assert (tmp_path / "out.npz").is_file()


@pytest.mark.parametrize(
    "content, words", [(b"a\n\nb\n", "line 2: is empty"), (b"", "no lines"), (b"a\n\xff\n", "not UTF-8")]
)
def test_a_bad_text_is_one_sentence(project, bpe, text_checkpoint, tmp_path, content, words, capsys):
    import extract_features

    (tmp_path / "lines.txt").write_bytes(content)
    files = ["--encoder-json", f"{bpe}/encoder.json", "--vocab-bpe", f"{bpe}/vocab.bpe", "--dict", f"{bpe}/dict.txt"]
    with pytest.raises(SystemExit) as stop:
        extract_features.main([str(text_checkpoint[0]), f"{tmp_path}/lines.txt", f"{tmp_path}/out.npz", *files])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and words in error and "lines.txt" in error and "\n" not in error
    assert not (tmp_path / "out.npz").exists()


def test_pictures(project, tmp_path, capsys):
    import extract_features
    from data2vec.config import load_config
    from data2vec.model.vision_model import build_vision_model

    (tmp_path / "pictures" / "a").mkdir(parents=True)
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / "a" / f"{i}.png")
    config, _ = load_config(project / "test", "tiny_vision", [f"task.data={tmp_path}"])
    from omegaconf import OmegaConf

    options = OmegaConf.to_container(config)
    model = build_vision_model(options["model"])
    checkpoint_file.save({"cfg": options, "model": model.state_dict()}, tmp_path / "model.pt")
    command = [f"{tmp_path}/model.pt", f"{tmp_path}/pictures"]
    extract_features.main([*command, f"{tmp_path}/mean.npz", "--batch_size", "2", "--device", "cpu"])
    extract_features.main([*command, f"{tmp_path}/all.npz", "--pool", "tokens", "--device", "cpu"])
    mean, tokens = np.load(tmp_path / "mean.npz"), np.load(tmp_path / "all.npz")
    assert mean["names"].tolist() == ["a/0.png", "a/1.png", "a/2.png"]
    patches = (options["model"]["image_size"] // options["model"]["patch_size"]) ** 2
    assert tokens["states"].shape == (3, patches, options["model"]["embed_dim"])
    np.testing.assert_allclose(mean["features"], tokens["states"].mean(axis=1), atol=1e-5)
    assert np.abs(mean["features"][0] - mean["features"][1]).max() > 1e-4
    (tmp_path / "pictures" / "a" / "1.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit):
        extract_features.main([*command, f"{tmp_path}/bad.npz", "--device", "cpu"])
    assert "a/1.png" in capsys.readouterr().err
