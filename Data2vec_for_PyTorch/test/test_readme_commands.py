"""Every command of the README and of docs/ for this project, as typed, on small stand-ins."""

import importlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ci.test import pages
from common import checkpoint_file
from data2vec import command_line

PROJECT = Path(__file__).resolve().parents[1]
BEST = Path("checkpoints/checkpoint_best.pt")
ELSEWHERE = {"pip install .*": "installing is `make install`"}  # a line -> why it is not run here
STAND_INS = {
    "$data_path": "corpus",
    "$checkpoint_path": str(BEST),
    "$tables": "tables",
    "$corpus": ".",
    "--workers 8": "--workers 1",
}
ENCODER = "{embed_dim: 32, ffn_embed_dim: 64, layers: 2, attention_heads: 2}"
ONE_UPDATE = [f"model.transformer.encoder={ENCODER}", "model.average_top_k_layers=2", "lr_scheduler.warmup_updates=1"]
ONE_UPDATE += ["optimization.max_update=1", "dataset.batch_size=4"]
SMALL = {  # what is added to a line: a small model, one update, the CPU
    "train.py": [*ONE_UPDATE, "dataset.num_workers=0", "--device", "cpu"],
    "finetune.py": ["optimization.max_epoch=1", "dataset.num_workers=0", "task.max_positions=32", "--device", "cpu"],
    "predict.py": ["--device", "cpu"],
    "probe.py": ["dataset.num_workers=0", "--device", "cpu"],
    "extract_features.py": ["--device", "cpu"],
}
PARSERS = {
    "train.py": command_line.parse,
    "validate.py": command_line.parse_evaluation,
    "finetune.py": command_line.parse_finetuning,
}


@pytest.fixture
def reader(bpe, golden, tmp_path, monkeypatch) -> Path:
    """The folder in which the README's lines are typed, with what they name."""
    folder = pages.reader_folder(PROJECT, tmp_path)
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(bpe / name, folder)
    sentences = (golden / "questions" / "train.csv").read_text()
    for split in ("train", "valid", "test"):
        (folder / f"{split}.raw").write_text(sentences)
    (folder / "lines.txt").write_text("When shall we three meet again?\nOut, damned spot!\n")
    (folder / "tables").mkdir()
    for split in ("train", "valid"):
        rows = (golden / "questions" / f"{split}.csv").read_text().splitlines()
        (folder / "tables" / f"{split}.csv").write_text("\n".join(["sentence,label", *rows[1:40]]) + "\n")
    shutil.copy(folder / "tables" / "valid.csv", folder / "test.csv")
    shutil.copytree(golden / "bin", folder / "corpus")
    (folder / "pictures").mkdir()
    Image.fromarray(np.zeros((40, 50, 3), dtype=np.uint8)).save(folder / "pictures" / "0.png")
    (folder / BEST).parent.mkdir()
    shutil.copy(golden / "checkpoint_tiny.pt", folder / BEST)
    shutil.copy(golden / "checkpoint_tiny.pt", folder / "checkpoint_best.pt")
    monkeypatch.chdir(folder)
    return folder


def vision_checkpoint(folder: Path) -> Path:
    """A small image model's."""
    from omegaconf import OmegaConf

    from data2vec.config import load_config
    from data2vec.model.vision_model import build_vision_model

    torch.manual_seed(0)
    options = OmegaConf.to_container(load_config(PROJECT / "test", "tiny_vision", [f"task.data={folder}"])[0])
    path = folder / "pictures.pt"
    checkpoint_file.save({"cfg": options, "model": build_vision_model(options["model"]).state_dict()}, path)
    return path


def prepare(script: str, words: list[str], reader: Path) -> None:
    """The page calls every checkpoint checkpoint_best.pt: puts the one that a line means there."""
    if script == "train.py":  # from here on, what preprocess.py has made
        shutil.rmtree("corpus")
        Path("corpus").symlink_to("data-bin")
    if script == "finetune.py":
        shutil.copy(reader / "data-bin" / "dict.txt", reader)
        shutil.copy(reader / "out train.py" / BEST, "checkpoint_best.pt")
    if script == "predict.py":
        shutil.copy(reader / "out finetune.py" / BEST, BEST)
    if script == "extract_features.py":
        text = "lines.txt" in words
        shutil.copy(reader / "out train.py" / BEST if text else vision_checkpoint(reader), "checkpoint_best.pt")
    if script == "convert_checkpoint.py" and words[1:] == ["my_model/"]:
        shutil.rmtree("my_model")
        shutil.copy(vision_checkpoint(reader), BEST)
    elif script == "convert_checkpoint.py" and words[0] == "checkpoint_best.pt":
        shutil.copy(reader / "out train.py" / BEST, "checkpoint_best.pt")
    elif script in ("convert_checkpoint.py", "probe.py"):
        shutil.copy(reader / "out train.py" / BEST, BEST)


def test_every_command_of_the_pages_runs(reader):
    for words in pages.lines_to_run(pages.of_project(PROJECT), ELSEWHERE, STAND_INS):
        if words[0] == "bash":
            for script, *options in pages.dry_run(words, reader):
                PARSERS[script](options, "")
            continue
        assert words[0] == "python", words
        script, *options = words[1:]
        prepare(script, options, reader)
        if script in ("train.py", "finetune.py"):
            output = reader / f"out {script}"
            options += ["--output_dir", str(output.with_name(f"{output.name} 2") if output.exists() else output)]
        importlib.import_module(Path(script).stem).main([*options, *SMALL.get(script, [])])
    made = ("data-bin/test.bin", "my_model/model.safetensors", "out/predictions.csv", "features.npz")
    assert all((reader / name).is_file() for name in (*made, "features.safetensors"))
