"""The shell scripts: the reference's names, the command they build, and one real two-rank run through them."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from clip_sample import draw, write_coco_zips, write_shard

import run_clip
from ci.test import pages
from clip_pretraining.options import arguments, legacy
from common.distributed import World
from common.errors import UsageError
from common.run.result_file import read as read_result

TEST = Path(__file__).parent


def bash(script: str, *flags: str, cwd: Path = TEST.parent) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(TEST / script), *flags]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.parametrize(
    "front, target, kind",
    [
        ("train_clip_full_1p.sh", "train_full_1p.sh", "acc"),
        ("train_clip_full_8p.sh", "train_full_8p.sh", "acc"),
        ("train_clip_performance_1p.sh", "train_performance_1p.sh", "perf"),
        ("train_clip_performance_8p.sh", "train_performance_8p.sh", "perf"),
    ],
)
def test_the_readme_names_start_the_same_command(front, target, kind, tmp_path):
    flags = [f"--data_path={tmp_path}", f"--model_path={tmp_path}", "--dry_run", f"--output_dir={tmp_path / 'out'}"]
    done = bash(front, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout == bash(target, *flags).stdout
    assert "run_clip.py" in done.stdout and f"--case_kind {kind}" in done.stdout
    assert ("--nproc_per_node 8" in done.stdout) == ("8p" in front)
    assert ("--max_steps 1000" in done.stdout) == (kind == "perf")
    for option in ("--learning_rate 5e-5", "--weight_decay 0.1", "--warmup_steps 0", "--precision fp16"):
        assert option in done.stdout


def test_the_cluster_script_meets_at_node_0(tmp_path):
    flags = [f"--data_path={tmp_path}", f"--model_path={tmp_path}", "--dry_run", f"--output_dir={tmp_path / 'out'}"]
    nodes = ["--nnodes=2", "--node_rank=1", "--master_addr=10.0.0.1", "--master_port=29512"]
    done = bash("train_clip_cluster.sh", *flags, *nodes)
    assert done.returncode == 0, done.stderr
    for option in (
        "--nnodes 2",
        "--node_rank 1",
        "--master_addr 10.0.0.1",
        "--master_port 29512",
        "--nproc_per_node 8",
    ):
        assert option in done.stdout
    assert bash("train_clip_cluster.sh", *flags, "--nnodes=2").returncode == 2


def test_missing_and_misspelt_flags_are_named(tmp_path):
    done = bash("train_full_1p.sh", f"--data_path={tmp_path}")
    assert done.returncode == 2 and "--model_path is required" in done.stderr
    done = bash("train_full_1p.sh", "--modle_path=x")
    assert done.returncode == 2 and "did you mean --model_path" in done.stderr


@pytest.mark.parametrize(
    "script, flags, sentence",
    [
        ("train_full_1p.sh", "", "--data_path is required"),
        ("train_full_1p.sh", "--validation_share=0.1", "--train_file or --train_shards is required"),
        ("train_eval_1p.sh", "--train_file=a.csv", "need --validation_share here"),
        ("train_eval_1p.sh", "--validation_file=a.csv --source_weights=1", "--source_weights does nothing"),
        ("train_full_1p.sh", "--train_file=a.csv --image_column=picture", "no column 'picture' (there are:"),
    ],
)
def test_flags_of_the_data_that_cannot_be_meant(script, flags, sentence, tmp_path, tiny_model):
    (tmp_path / "a.csv").write_text("image_path,caption\na.jpg,a dog\n")
    common = [f"--model_path={tiny_model}", "--device=cpu", f"--output_dir={tmp_path / 'out'}"]
    done = bash(script, *common, *flags.split(), cwd=tmp_path)
    assert done.returncode == 2 and sentence in done.stderr, done.stdout + done.stderr


def test_every_flag_of_the_data_reaches_run_clip_from_where_it_was_typed(tmp_path, tiny_model):
    """What run_clip.py refuses of them (the second half) is one sentence before anything is read."""
    (tmp_path / "a.csv").write_text("image_path,caption\na.jpg,a dog\n")

    def parsed(*flags: str):
        common = [f"--model_path={tiny_model}", "--device=cpu", "--precision=fp32", f"--output_dir={tmp_path / 'out'}"]
        ((_, *words),) = pages.dry_run(["bash", str(TEST / "train_full_1p.sh"), *common, *flags], tmp_path)
        return arguments.parse(legacy.translate(words)[0], World())

    columns = ["--image_column=p", "--caption_column=c", "--delimiter=|", "--max_bad_share=0.5", "--cache_dir=kept"]
    model, data, training = parsed("--train_file=a.csv::./a.csv", *columns, "--source_weights=1::3", "--data_path=.")
    assert data.train_file == f"{tmp_path}/a.csv::{tmp_path}/./a.csv" and training.source_weights == [1, 3]
    assert (data.image_column, data.caption_column, data.delimiter, data.max_bad_share) == ("p", "c", "|", 0.5)
    assert data.data_dir == str(tmp_path) and model.cache_dir == "kept" and not training.do_eval
    tars = ["--train_shards=a-{0..3}.tar::@list::https://h/b.tar", "--caption_key=json:c", "--validation_shards=v.tar"]
    _, data, training = parsed(*tars)
    assert data.train_shards == f"{tmp_path}/a-{{0..3}}.tar::@{tmp_path}/list::https://h/b.tar"
    assert data.validation_shards == f"{tmp_path}/v.tar" and data.caption_key == "json:c" and training.do_eval
    assert training.eval_strategy == "epoch" and data.dataset_name is None

    table = "--train_file=a.csv"
    for flags, sentence in (
        ([table, "--train_shards=a.tar"], "--train_file and --train_shards: give one"),
        (["--train_file=a.csv::absent.csv"], "absent.csv: no such file"),
        ([table, "--delimiter=ab"], "--delimiter 'ab': must be one character"),
        ([table, "--max_bad_share=2"], "--max_bad_share 2.0: must be"),
        ([table, "--source_weights=1::2"], "2 weights for 1 parts"),
        ([table, "--source_weights=x"], "give numbers with :: between"),
        ([table, "--source_weights=-1"], "each must be at least 0"),
        (["--train_file=a.csv::a.csv", "--source_weights=1e308::1e308"], "each must be at least 0"),
        (["--train_file=a.csv::"], "nothing on one side of a ::"),
        (["--train_shards=a.tar::::b.tar"], "nothing on one side of a ::"),
        ([table, "--validation_share=0.95"], "--validation_share 0.95: must be"),
        ([table, "--validation_share=0.1", table.replace("train", "validation")], "give one of them"),
    ):
        with pytest.raises(UsageError) as error:
            parsed(*flags)
        assert sentence in error.value.message


def test_tars_and_tables_go_through_the_scripts(tiny_model, tmp_path):
    """Tars of two sources by relative names; a table with its own delimiter and columns, evaluated on a part of it."""
    rows = ["picture|text"]
    for i in range(30):
        (tmp_path / f"{i}.jpg").write_bytes(draw(i)[0])
        rows.append(f"{i}.jpg|{draw(i)[1]}")
    (tmp_path / "pairs.txt").write_text("\n".join(rows))
    for number in range(3):
        write_shard(tmp_path / f"w-{number}.tar", range(10 * number, 10 * number + 10))
    common = ["--device=cpu", "--precision=fp32", "--workers=0", "--batch_size=8"]
    output = [f"--model_path={tiny_model}", f"--output_dir={tmp_path / 'tars'}"]
    tars = ["--train_shards=w-{0..1}.tar::w-2.tar", "--source_weights=1::3", "--max_steps=2"]
    done = bash("train_performance_1p.sh", *common, *tars, *output, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert read_result(tmp_path / "tars/CLIP_for_PyTorch_bs8_1p_perf.log")["Status"] == "OK"
    assert done.stdout.count("starting: ") == 1 and "Warning" not in done.stdout + done.stderr  # one line; and quiet

    table = ["--train_file=pairs.txt", "--delimiter=|", "--image_column=picture", "--caption_column=text"]
    output = [f"--ckpt_path={tmp_path / 'tars'}", f"--output_dir={tmp_path / 'eval'}", "--validation_share=0.4"]
    done = bash("train_eval_1p.sh", *common, *table, *output, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert 6 <= json.loads((tmp_path / "eval/eval_results.json").read_text())["eval_samples"] <= 18


def test_sixty_lines_of_the_readme_bring_a_csv_to_a_model_and_its_retrieval_picture(pairs_table, tmp_path):
    """Its commands as typed, but pip's, in a copy of the project with a csv of 90 pictures."""
    project = tmp_path / "CLIP_for_PyTorch"
    leave_out = shutil.ignore_patterns("output", "golden", "__pycache__")
    shutil.copytree(TEST.parent, project, symlinks=True, ignore=leave_out)
    (tmp_path / "common").symlink_to((TEST.parent / "common").resolve())
    rows = [f"pictures/{i}.jpg,{draw(i)[1]}" for i in range(90)]
    (project / "captions.csv").write_text("\n".join(["image_path,caption", *rows]))
    (project / "pictures").mkdir()
    for i in range(90):
        (project / f"pictures/{i}.jpg").write_bytes(draw(i)[0])
    page = tmp_path / "page.md"
    page.write_text("\n".join((project / "README.md").read_text().splitlines()[:60]))
    lines = [line for line in pages.commands(page) if "captions.csv" in line]
    assert len(lines) == 2
    done = subprocess.run(
        ["bash", "-euc", "\n".join(lines)], cwd=project, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    output = project / "test/output/0"
    assert (output / "model.safetensors").is_file() and (output / "retrieval.png").stat().st_size > 10_000
    assert read_result(output / "CLIP_for_PyTorch_bs64_1p_acc.log")["Status"] == "OK"


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_two_ranks_train_as_one_and_evaluate_as_one(coco_zips, model_without_dropout, tmp_path):
    """20 steps of the same global batch through the 8p script on two processes and in this one."""
    output = tmp_path / "out put"
    data, model = f"--data_path={coco_zips}", f"--model_path={model_without_dropout}"
    flags = [data, model, "--device=cpu", "--precision=fp32", "--workers", "0", "--batch_size=4"]
    steps = ["--nproc=2", "--max_steps=20", f"--output_dir={output}"]
    done = bash("train_clip_performance_8p.sh", *flags, *steps, "--", "--log_every", "1", cwd=TEST)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    stored = read_result(output / "CLIP_for_PyTorch_bs4_2p_perf.log")
    assert stored["Status"] == "OK" and stored["RankSize"] == "2" and float(stored["ActualFPS"]) > 0
    assert (output / "train_0.log").exists() and (output / "train_1.log").exists()
    assert "------------------ Final result ------------------" in done.stdout

    alone = ["--output_dir", str(tmp_path / "one"), "--device", "cpu", "--max_steps", "20", "--log_every", "1"]
    alone += [
        "--model_name_or_path",
        str(model_without_dropout),
        "--data_dir",
        str(coco_zips),
        "--do_train",
        "--do_eval",
    ]
    alone += ["--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "4", "--save_every", "0"]
    alone += ["--learning_rate", "5e-5", "--weight_decay", "0.1", "--dataloader_drop_last"]
    one = run_clip.main(alone)
    assert losses(output) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert float(stored["EvalLoss"]) == pytest.approx(one["EvalLoss"], abs=1e-5)


def test_the_readme_commands_train_on_zips_and_evaluate_what_they_trained(tiny_model, tmp_path):
    """As the README has them: the recipe of the published table, fp16, batch 64, 3 epochs; only results go aside."""
    write_coco_zips(tmp_path / "coco", {"train": 16, "val": 8}, captions_each=8)
    data, trained = f"--data_path={tmp_path / 'coco'}", tmp_path / "trained"
    done = bash("train_clip_full_1p.sh", data, f"--model_path={tiny_model}", f"--output_dir={trained}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    stored = read_result(trained / "CLIP_for_PyTorch_bs64_1p_acc.log")
    assert stored["Status"] == "OK" and len(losses(trained)) >= 1
    assert json.loads((trained / "trainer_state.json").read_text())["global_step"] == 6

    done = bash("train_eval_1p.sh", data, f"--ckpt_path={trained}", f"--output_dir={tmp_path / 'eval'}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert read_result(tmp_path / "eval/CLIP_for_PyTorch_eval_bs64_1p_acc.log")["BatchSize"] == "64"
    evaluated = json.loads((tmp_path / "eval/eval_results.json").read_text())
    assert evaluated["eval_samples"] == 64
    assert evaluated["eval_loss"] == pytest.approx(float(stored["EvalLoss"]), abs=1e-3)
