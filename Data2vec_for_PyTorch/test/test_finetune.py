"""finetune.py and predict.py on sentences of Macbeth and Twelfth Night (golden/questions).

Of 4 to 9 words, by turns one that ends with a question mark and one that does not, which is the label.
"""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import last, lines

from common import checkpoint_file

TABLES = Path(__file__).parent / "golden" / "questions"
SIZES = {"embed_dim": 32, "ffn_embed_dim": 64, "layers": 2, "attention_heads": 4}


@pytest.fixture
def options(bpe):
    def of(output, *more, data=TABLES):
        files = [
            f"task.encoder_json={bpe}/encoder.json",
            f"task.vocab_bpe={bpe}/vocab.bpe",
            f"task.dict={bpe}/dict.txt",
        ]
        small = [f"model.transformer.encoder.{key}={value}" for key, value in SIZES.items()]
        small += ["model.init_std=0.1", "task.max_positions=32", "dataset.num_workers=0", "optimization.lr=[0.003]"]
        base = ["--config-name", "demo", "--device", "cpu", "--output_dir", str(output), f"task.data={data}"]
        return [*base, "task.label_column=kind", *files, *small, *more]

    return of


def test_it_learns_and_predicts_what_it_measured(project, options, other_dict, tmp_path, capsys):
    import finetune
    import predict

    still = ["model.transformer.dropout=0", "model.transformer.attention_dropout=0"]
    finetune.main(options(tmp_path / "run", "optimization.max_epoch=3", *still))
    results = lines(tmp_path / "run", "valid")
    assert len(results) == 3 and results[-1]["accuracy"] > 0.85  # guessing: 0.5
    result = next((tmp_path / "run").glob("*_acc.log")).read_text()
    assert "Status = OK" in result and f"ValidBestAccuracy = {max(r['accuracy'] for r in results):.6}" in result

    path = f"common_eval.path={tmp_path}/run/checkpoints/checkpoint_last.pt"
    command = ["--config-name", "demo", "--device", "cpu", "--output_dir", str(tmp_path / "out"), path]
    predict.main([*command, f"task.data={TABLES}/valid.csv"])
    with open(tmp_path / "out/predictions.csv", newline="") as file:
        predictions = list(csv.DictReader(file))
    with open(TABLES / "valid.csv", newline="") as file:
        truth = [row["kind"] for row in csv.DictReader(file)]
    right = np.mean([row["prediction"] == label for row, label in zip(predictions, truth, strict=True)])
    assert right == pytest.approx(results[-1]["accuracy"]) and predictions[0]["line"] == "2"
    (tmp_path / "new.jsonl").write_text(json.dumps({"sentence": "Out, damned spot!"}) + "\n")
    with pytest.raises(SystemExit):
        predict.main([*command, f"task.data={tmp_path}/new.jsonl", f"task.dict={other_dict}"])
    assert "its words, or their order, are not those of" in capsys.readouterr().err
    predict.main([*command, f"task.data={tmp_path}/new.jsonl"])  # no labels, no metrics
    assert "TrainAccuracy" not in next((tmp_path / "out").glob("*predict*_acc.log")).read_text()


def test_it_goes_on_bit_for_bit(project, options, tmp_path):
    import finetune

    settings = ["optimization.max_epoch=2", "checkpoint.save_interval_updates=10"]
    finetune.main(options(tmp_path / "whole", *settings))
    finetune.main(options(tmp_path / "parts", *settings, "--max_steps", "34"))
    finetune.main(options(tmp_path / "parts", *settings))
    whole, parts = last(tmp_path / "whole"), last(tmp_path / "parts")
    assert whole["optimizer_history"] == parts["optimizer_history"]
    for name, value in whole["model"].items():
        assert torch.equal(value, parts["model"][name]), name
    assert lines(tmp_path / "whole", "valid")[-1]["loss"] == lines(tmp_path / "parts", "valid")[-1]["loss"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions_train(project, options, tmp_path, precision):
    import finetune

    finetune.main(options(tmp_path, "--precision", precision, "--max_steps", "12", "common.log_interval=12"))
    assert 0 < lines(tmp_path, "train")[-1]["loss"] < 2


def test_two_ranks_equal_one(project, options, tmp_path):
    """The same batches an update: the weights to rounding, and an evaluation in which each row counts once."""
    import finetune

    same = ["model.transformer.dropout=0", "model.transformer.attention_dropout=0", "optimization.max_update=20"]
    finetune.main(options(tmp_path / "one", *same, "optimization.update_freq=[2]", "dataset.batch_size_valid=24"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [
        sys.executable,
        *launcher,
        "finetune.py",
        *options(tmp_path / "two", *same, "dataset.batch_size_valid=24"),
    ]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, value in last(tmp_path / "one")["model"].items():
        torch.testing.assert_close(value, last(tmp_path / "two")["model"][name], rtol=1e-4, atol=1e-5)
    one, two = (lines(tmp_path / name, "valid")[-1] for name in ("one", "two"))
    assert one["accuracy"] == two["accuracy"] and one["loss"] == pytest.approx(two["loss"], rel=1e-4)


def test_regression_of_pairs_from_a_pretrained_checkpoint(project, golden, bpe, options, tmp_path):
    """How many of two sentences are questions; sizes and weights are the checkpoint's."""
    import finetune
    from data2vec import Dictionary, build_model

    sentences = [line.rsplit(",", 1)[0].strip('"') for line in (TABLES / "train.csv").read_text().splitlines()[1:]]
    for split, part in (("train", sentences[:240]), ("valid", sentences[240:300])):
        rows = []
        for i, text in enumerate(part):
            other = part[(5 * i + i // 2) % len(part)]
            rows.append({"first": text, "second": other, "questions": (text + other).count("?")})
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    transformer = {
        "encoder": {**SIZES, "layers": 3, "ffn_embed_dim": 48, "learned_pos": True},
        "max_source_positions": 64,
    }
    transformer |= {"layernorm_embedding": True, "no_scale_embedding": True}
    config = {"_name": "data2vec_text", "transformer": transformer, "average_top_k_layers": 2, "init_std": 0.1}
    model = build_model(config, len(Dictionary.load(bpe / "dict.txt")) + 1)
    checkpoint_file.save({"cfg": {"model": config}, "model": model.state_dict()}, tmp_path / "pretrained.pt")
    pair = [
        "task.columns=[first,second]",
        "task.label_column=questions",
        "criterion.regression_target=true",  # as fairseq's sts_b has it
        "task.num_classes=1",
        "checkpoint.best_checkpoint_metric=pearson_and_spearman",
        "task.max_positions=64",
    ]
    settings = [o for o in options(tmp_path / "run", *pair, data=tmp_path) if not o.startswith("model.transformer.enc")]
    start = [*settings, f"checkpoint.finetune_from_model={tmp_path}/pretrained.pt"]
    finetune.main([*start, "--max_steps", "1", "optimization.max_epoch=4"])  # the first learning rate is 0
    saved = last(tmp_path / "run")
    for name, value in model.encoder.sentence_encoder.state_dict().items():
        assert torch.equal(saved["model"][f"encoder.sentence_encoder.{name}"], value), name
    assert saved["cfg"]["model"]["transformer"]["encoder"]["layers"] == 3
    finetune.main([*start, "optimization.max_epoch=4"])
    result = lines(tmp_path / "run", "valid")[-1]
    assert result["pearson"] > 0.5 and -1 <= result["spearman"] <= 1


@pytest.mark.parametrize(
    "content, words",
    [
        ("sentence,kind\nOut spot,question\nOut\n", "train.csv, line 3: 1 cells, but the first line names 2 columns"),
        (
            "sentence,kinds\nOut spot,question\n",
            "train.csv, line 2: no column 'kind', there are 'sentence', 'kinds'; did",
        ),
        ('sentence,kind\nOut spot,question\n"What\n,question\n', "train.csv, line 4: unexpected end of data"),
        ("sentence,kind\nOut spot,question\n,question\n", "train.csv, line 3: column 'sentence' is empty"),
        ("sentence,kind\nOut spot,question\nOut,question\n", "train.csv: all labels are 'question'"),
        ("sentence,kind\n", "train.csv: no rows"),
        (b"sentence,kind\n\xff,a\n", "train.csv: not UTF-8"),
        ("sentence,kind,kind\nOut spot,a,b\n", "train.csv: column 'kind' is named twice: rename one"),
    ],
)
def test_a_bad_table_is_one_sentence(project, options, tmp_path, content, words, capsys):
    import finetune

    (tmp_path / "train.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    shutil.copy(TABLES / "valid.csv", tmp_path)
    with pytest.raises(SystemExit) as stop:
        finetune.main(options(tmp_path / "run", data=tmp_path))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and error.startswith("error: ") and words in error and "\n" not in error


def test_labels_that_training_does_not_know(project, options, tmp_path, capsys):
    import finetune

    shutil.copy(TABLES / "train.csv", tmp_path)
    (tmp_path / "valid.tsv").write_text("sentence\tkind\nOut spot\tquestion\nNow\torder\n")
    with pytest.raises(SystemExit):
        finetune.main(options(tmp_path / "run", data=tmp_path))
    assert "valid.tsv, line 3: label 'order' must be one of the training table's" in capsys.readouterr().err


def test_metrics_are_gluess():
    from data2vec.training.metrics import classification_metrics, regression_metrics

    found = classification_metrics(np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1]), 2)
    assert found == pytest.approx({"accuracy": 0.6, "f1": 2 / 3, "mcc": 1 / 6, "acc_and_f1": (0.6 + 2 / 3) / 2})
    found = regression_metrics(np.array([1.0, 2, 3, 10]), np.array([1.0, 2, 4, 3]))
    assert found["spearman"] == pytest.approx(0.8)
    assert found["pearson"] == pytest.approx(np.corrcoef([1, 2, 3, 10], [1, 2, 4, 3])[0, 1])
    assert found["pearson_and_spearman"] == (found["pearson"] + found["spearman"]) / 2
    assert set(regression_metrics(np.ones(3), np.arange(3.0)).values()) == {0.0}


@pytest.mark.parametrize("evaluation", [1, 2])
def test_a_signal_in_an_evaluation_loses_no_number(project, options, tmp_path, monkeypatch, evaluation):
    """TERM in the first or the last one: the run is not over, and the same command begins with that evaluation."""
    import finetune
    from data2vec.training import sentences

    begun = []

    def predict(model, *rest):
        begun.append(model)
        if len(begun) == evaluation:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(model, *rest)

    settings = ["optimization.max_epoch=2", "checkpoint.best_checkpoint_metric=loss"]
    finetune.main(options(tmp_path / "whole", *settings))
    whole = sentences.predict
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stop:
        patched.setattr(sentences, "predict", predict)
        finetune.main(options(tmp_path / "parts", *settings))
    assert stop.value.code == 75
    assert "Status = PREEMPTED" in next((tmp_path / "parts").glob("*_acc.log")).read_text()
    finetune.main(options(tmp_path / "parts", *settings))

    def told(folder):
        return [
            (line["step"], line["epoch"], line["loss"], line["accuracy"]) for line in lines(tmp_path / folder, "valid")
        ]

    assert told("parts") == told("whole") and len(told("whole")) == 2
    best = [checkpoint_file.load(tmp_path / f / "checkpoints/checkpoint_best.pt") for f in ("whole", "parts")]
    assert best[0]["optimizer_history"] == best[1]["optimizer_history"]


def test_a_run_that_ended_by_epochs_is_not_trained_on(project, options, tmp_path):
    import finetune

    settings = ["optimization.max_epoch=1", "optimization.max_update=90"]
    for _ in range(2):
        finetune.main(options(tmp_path, *settings))
        assert last(tmp_path)["optimizer_history"][-1]["num_updates"] == 25


def refused(main, argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_half_a_character_is_one_sentence(project, options, tmp_path, capsys):
    import finetune

    (tmp_path / "train.jsonl").write_text('{"sentence": "\\ud800 go", "kind": "a"}\n')
    error = refused(finetune.main, options(tmp_path / "run", data=tmp_path), capsys)
    assert error.startswith("error: ") and "train.jsonl, line 1: column 'sentence' holds half a character" in error


def test_a_checkpoint_of_something_else(project, options, golden, tmp_path, capsys):
    """Parts of an encoder, no weights, and one of pretraining for predict.py."""
    import finetune
    import predict

    tokens = "encoder.sentence_encoder.embed_tokens.weight"
    path = tmp_path / "x.pt"
    for model, words in (
        ({tokens: torch.zeros(3, 2)}, "embed_positions.weight is missing"),
        ([1], "holds no data2vec"),
    ):
        torch.save({"model": model}, path)
        start = options(tmp_path / "run", f"checkpoint.finetune_from_model={path}")
        error = refused(finetune.main, start, capsys)
        assert error.startswith("error: ") and f"{path}: " in error and words in error
    command = ["--config-name", "demo", "--device", "cpu", f"task.data={TABLES}/valid.csv"]
    pretrained = f"common_eval.path={golden}/checkpoint_tiny.pt"
    assert "checkpoint_tiny.pt: no checkpoint of finetune.py" in refused(predict.main, [*command, pretrained], capsys)
    assert "--replay x: is of a training" in refused(predict.main, [*command, pretrained, "--replay", "x"], capsys)
