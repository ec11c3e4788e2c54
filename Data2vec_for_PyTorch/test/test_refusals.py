"""What train.py refuses: one line that names the value and the remedy, before anything is written."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import last, words

PROJECT = Path(__file__).resolve().parents[1]


def run(train_main, tiny, corpus, output, *arguments):
    train_main(words(tiny, "tiny", corpus, output, *arguments))


def refusal(train_main, tiny, corpus, tmp_path, capsys, *arguments):
    with pytest.raises(SystemExit) as error:
        run(train_main, tiny, corpus, tmp_path / "out", *arguments)
    assert error.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    return text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimization.max_updates=3", ["optimization.max_updates", "optimization.max_update?"]),
        ("task.tokens_per_sample=128", ["128", "max_source_positions=64"]),
        ("model._name=wav2vec2", ["wav2vec2", "another task"]),
        ("task._name=audio_finetuning", ["audio_finetuning"]),
        ("dataset.curriculum=2", ["curriculum", "only 0"]),
        ("optimizer.adam_betas=0.9", ["adam_betas", "(0.9,0.98)"]),
        ("nonsense", ["group.key=value"]),
        ("dataset.valid_subset=valid2", ["valid2.idx", "no such file"]),
        ("dataset.train_subset=nothing", ["nothing.idx"]),
        ("dataset.train_subset=nothing dataset.valid_subset=valid2", ["nothing.idx", "; split 'valid2'"]),
        ("task.data=/does/not/exist", ["/does/not/exist", "no such folder"]),
        ("task.data=/usr", ["/usr/dict.txt: no such file", "preprocess.py"]),
        ("task.mask_whole_words=true", ["mask_whole_words"]),
        ("model.average_top_k_layers=7", ["average_top_k_layers=7"]),
        ("optimization.lr=[0.1,0.2]", ["one value"]),
        ("checkpoint.finetune_from_model=/none.pt", ["/none.pt"]),
        ("common.fp16=true common.bf16=true", ["choose one"]),
        ("dataset.max_tokens=40", ["dataset.max_tokens=40"]),
        ("model.max_positions=65", ["model.max_positions=65", "max_source_positions=64"]),
        ("optimization.max_update=soon", ["optimization.max_update=soon", "a whole number"]),
        ("optimization.max_update=2.5", ["a whole number"]),
        ("optimization.lr=[fast]", ["optimization.lr=fast", "a number"]),
        ("optimization.update_freq=[0]", ["optimization.update_freq=0", "at least 1"]),
        ("dataset.max_tokens=8k", ["dataset.max_tokens=8k"]),
        ("task.mask_prob=1.5", ["task.mask_prob=1.5", "0 to 1"]),
        ("task.mask_multiple_length=0", ["at least 1"]),
        ("model.transformer.dropout=.nan", ["0 to 1"]),
        ("model.transformer.layernorm_embedding=1", ["true or false"]),
        ("model.average_top_k_layers=0", ["at least 1"]),
        ("optimizer.adam_betas=(0.9,1)", ["adam_betas", "below 1"]),
        ("optimizer.adam_eps=null", ["optimizer.adam_eps=None", "a number"]),
        ("dataset.max_tokens=${dataset.rows}", ["dataset.rows"]),
        ("hydra.run.dir=out", ["--output_dir DIR"]),
        ("hydra/launcher=submitit_slurm", ["Hydra is not used"]),
        ("~task.mask_prob", ["leave it out"]),
        ("--config-dir=examples/data2vec/config/text/pretraining", ["--config-dir configs/text/pretraining"]),
        ("task.mask_prob=0", ["nothing would become <mask>"]),
        ("task.leave_unmasked_prob=0.5 task.random_token_prob=0.5", ["nothing would become <mask>"]),
        ("task.mask_multiple_length=100000", ["no token is masked in the", "samples looked at"]),
        ("optimization.lr=[.inf]", ["optimization.lr=inf", "at least 0"]),
        ("optimization.clip_norm=-1", ["optimization.clip_norm=-1", "at least 0"]),
        ("model.loss_scale=.nan", ["model.loss_scale=nan", "a finite number"]),
        ("--log_every 0", ["common.log_interval=0", "at least 1"]),
        ("--seed -1", ["common.seed=-1"]),
        ("--resume none.pt", ["none.pt", "no such file"]),
    ],
)
def test_refusals(train_main, tiny, corpus, tmp_path, capsys, override, words):
    text = refusal(train_main, tiny, corpus, tmp_path, capsys, *override.split())
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("text", "words"), [("- task\n", "groups of keys"), ("task: [\n", "line 2"), ("5", "object type")]
)
def test_a_file_that_is_no_configuration_is_refused(train_main, tiny, corpus, tmp_path, capsys, text, words):
    (tiny / "tiny.yaml").write_text(text)
    assert words in refusal(train_main, tiny, corpus, tmp_path, capsys)


def test_small_dictionary_is_refused(train_main, tiny, corpus, tmp_path, capsys):
    lines = (corpus / "dict.txt").read_text().splitlines()
    (corpus / "dict.txt").write_text("\n".join(lines[:40]) + "\n")
    text = refusal(train_main, tiny, corpus, tmp_path, capsys)
    assert "another vocabulary" in text and "train" in text


def test_empty_corpus_is_refused(train_main, tiny, corpus, tmp_path, capsys):
    from data2vec import IndexedDatasetBuilder

    for file in corpus.glob("train.*"):
        file.unlink()
    IndexedDatasetBuilder(corpus / "train", np.uint16).finalize()
    assert "empty" in refusal(train_main, tiny, corpus, tmp_path, capsys)


def test_damaged_checkpoint_is_refused(train_main, tiny, corpus, tmp_path, capsys):
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    (tmp_path / "out" / "checkpoints" / "checkpoint_last.pt").write_bytes(b"PK\x03\x04 cut")
    assert "checkpoint_last.pt" in refusal(train_main, tiny, corpus, tmp_path, capsys)


def test_weights_of_nothing_are_refused(train_main, tiny, corpus, tmp_path, capsys):
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    for option in (["--resume", str(tmp_path / "list.pt")], [f"checkpoint.finetune_from_model={tmp_path / 'list.pt'}"]):
        assert "list.pt: holds no model's weights" in refusal(train_main, tiny, corpus, tmp_path, capsys, *option)


def test_checkpoint_of_another_model_is_refused(train_main, tiny, corpus, tmp_path, capsys, golden):
    layers = "model.transformer.encoder.layers"
    options = [f"{layers}=3", "--resume", str(golden / "checkpoint_tiny.pt")]
    text = refusal(train_main, tiny, corpus, tmp_path, capsys, *options)
    assert f"settings.{layers} was 4, is now 3" in text
    accepted = ["--accept_changes", f"settings.{layers}"]
    assert "does not fit this model" in refusal(train_main, tiny, corpus, tmp_path, capsys, *options, *accepted)


def test_resuming_beyond_the_end_of_an_epoch(train_main, tiny, corpus, tmp_path, golden, capsys):
    """After 7 batches of an epoch that has 3 with larger ones."""
    options = ["--resume", str(golden / "checkpoint_tiny.pt"), "dataset.max_tokens=2048"]
    text = refusal(train_main, tiny, corpus, tmp_path, capsys, *options)
    assert "settings.dataset.max_tokens was 256, is now 2048" in text
    accepted = ["--accept_changes", "settings.dataset.max_tokens"]
    text = refusal(train_main, tiny, corpus, tmp_path, capsys, *options, *accepted)
    assert "after 7 batches of an epoch, which has 3 here" in text and "reset_dataloader" in text
    run(train_main, tiny, corpus, tmp_path, *options, "checkpoint.reset_dataloader=true", "--max_steps", "7")
    assert last(tmp_path)["extra_state"]["train_iterator"]["iterations_in_epoch"] == 1
