"""run_clip.py end to end: the README's options as typed, resume, ranks, chunks, both families, evaluation alone."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from clip_sample import draw, write_shard
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPModel, HfArgumentParser, VisionTextDualEncoderModel

import run_clip
from clip_pretraining.options import arguments, legacy
from common.run.result_file import read as read_result

# the options of test/train_clip_full_1p.sh in the reference, as typed there
README = (
    "--num_train_epochs 2 --dataset_name ydshieh/coco_dataset_script --dataset_config_name=2017 "
    "--dataloader_num_workers 1 --image_column image_path --caption_column caption --remove_unused_columns=False "
    "--do_train --do_eval --fp16 --dataloader_drop_last --fp16_opt_level O2 --loss_scale 12800000 "
    "--optim adamw_apex_fused_npu --use_combine_grad --per_device_train_batch_size=8 --per_device_eval_batch_size=8 "
    "--learning_rate 5e-5 --warmup_steps 0 --weight_decay 0.1 --save_steps 150000 --skip_steps 4 "
    "--overwrite_output_dir --local_rank 0 --device_id=0"
).split()


def run(output: Path, model: Path, *options: str) -> dict:
    quick = ["--log_every", "1", "--skip_steps", "1", "--retrieval_picture", "False", "--device", "cpu"]
    return run_clip.main(["--output_dir", str(output), "--model_name_or_path", str(model), *quick, *options])


def train_options(table: Path, *more: str) -> list[str]:
    batch = ["--per_device_train_batch_size", "8", "--learning_rate", "1e-3", "--save_every", "0"]
    return ["--do_train", "--train_file", str(table), *batch, *more]


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_the_readme_command_runs_as_typed_on_zips(coco_zips, tiny_model, tmp_path, capsys, monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "0")
    output = tmp_path / "clip-roberta-finetuned-npu-1p"
    paths = ["--output_dir", str(output), "--model_name_or_path", str(tiny_model), "--data_dir", str(coco_zips)]
    result = run_clip.main([*paths, *README])
    printed = capsys.readouterr().out
    for changed in ("fp16_opt_level", "loss_scale", "optim", "use_combine_grad"):
        assert f"note: --{changed}" in printed
    assert result["Status"] == "OK" and result["EvalBatchSize"] == 8
    stored = read_result(output / "CLIP_for_PyTorch_bs8_1p_acc.log")
    assert float(stored["EvalLoss"]) == pytest.approx(math.log(8), abs=0.5)
    assert len((output / "train_CLIP_for_PyTorch_bs8_1p_acc_loss.txt").read_text().split()) == 2  # 12 steps, every 10
    for name in ("retrieval.png", "loss.png", "eval_results.json", "train_results.json", "all_results.json"):
        assert (output / name).stat().st_size > 0
    assert list((output / "tensorboard").glob("events*"))
    evaluated = json.loads((output / "eval_results.json").read_text())
    assert evaluated["eval_samples"] == 16 and evaluated["eval_images"] == 8  # a picture is encoded once, not twice
    model = VisionTextDualEncoderModel.from_pretrained(output)  # and transformers loads the folder
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert model.get_text_features(**tokenizer(["a red box"], return_tensors="pt")).pooler_output.shape == (1, 64)


def test_a_loss_scale_of_apex_stays_and_one_beyond_fp16_adapts(pairs_table, tiny_model, tmp_path):
    for scale, expected in (("128", {128.0}), ("12800000", {6400000.0, 3200000.0})):
        output = tmp_path / scale
        options = ["--fp16", "--fp16_opt_level", "O2", "--loss_scale", scale, "--max_steps", "2"]
        run(output, tiny_model, *train_options(pairs_table, *options))
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        assert {line["loss_scale"] for line in lines if line["kind"] == "train"} == expected


def test_options_from_a_json_file(pairs_table, tiny_model, tmp_path, capsys):
    """Old options and our spellings as on the command line; lines of the log at half and at the end of the run."""
    options = {"output_dir": str(tmp_path / "out"), "model_name_or_path": str(tiny_model), "device": "cpu"}
    options |= {"do_train": True, "train_file": str(pairs_table), "max_steps": 4, "save_every": 0, "batch_size": 8}
    options |= {"logging_steps": 0.5, "use_combine_grad": True, "optim": "adamw_apex_fused_npu", "seed": None}
    (tmp_path / "options.json").write_text(json.dumps(options))
    assert run_clip.main([str(tmp_path / "options.json")])["BatchSize"] == 8
    assert "note: --use_combine_grad" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [2, 4]
    (tmp_path / "cut.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    for name, reason in (("cut", "not valid JSON"), ("list", "must hold one object"), ("absent", "No such file")):
        with pytest.raises(SystemExit):
            run_clip.main([str(tmp_path / f"{name}.json")])
        assert reason in capsys.readouterr().err


def test_accumulated_chunks_train_as_the_large_batch(pairs_table, model_without_dropout, tmp_path):
    small = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4", "--max_steps", "4"]
    result = run(
        tmp_path, model_without_dropout, *train_options(pairs_table, *small, "--lr_scheduler_type", "constant")
    )
    large = tmp_path / "large"
    more = ["--max_steps", "4", "--lr_scheduler_type", "constant"]
    run(large, model_without_dropout, *train_options(pairs_table, *more))
    assert losses(tmp_path) == pytest.approx(losses(large), abs=1e-5)
    assert result["BatchSize"] == 2


def test_equal_captions_are_masked_when_asked_to(pairs_table, tiny_model, tmp_path):
    """Every pair twice in a batch of eight: seven answers are left of eight, ln 8/7 for what knows nothing."""
    rows = pairs_table.read_text().splitlines()
    twice = pairs_table.with_name("twice.csv")
    twice.write_text("\n".join([rows[0], *(row for row in rows[1:5] for _ in range(2))]))
    for name, options in (("masked", ["--mask_equal_captions", "True"]), ("not", [])):
        more = train_options(twice, "--max_steps", "1", "--learning_rate", "1e-9", *options)
        run(tmp_path / name, tiny_model, *more)
    assert losses(tmp_path / "not")[0] - losses(tmp_path / "masked")[0] == pytest.approx(math.log(8 / 7), abs=0.1)


def test_checkpointed_activations_change_nothing(pairs_table, tiny_model, tmp_path):
    """With dropout, which the second forward pass of a layer repeats."""
    for checkpointing in ("False", "True"):
        options = train_options(pairs_table, "--max_steps", "3", "--gradient_checkpointing", checkpointing)
        run(tmp_path / checkpointing, tiny_model, *options)
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), abs=1e-6)


def test_clip_model_with_the_sigmoid_loss_learns_and_keeps_its_bias(pairs_table, tiny_clip, tmp_path, check_profile):
    options = train_options(pairs_table, "--loss", "siglip", "--max_steps", "12", "--profile")
    run(tmp_path / "a", tiny_clip, *options)
    check_profile(tmp_path / "a", "10 to 12", "aten::embedding_dense_backward")
    assert losses(tmp_path / "a")[-1] < losses(tmp_path / "a")[0]
    weights = load_file(tmp_path / "a/model.safetensors")
    assert weights["logit_bias"].item() != -10.0
    CLIPModel.from_pretrained(tmp_path / "a")
    again = ["--do_eval", "--validation_file", str(pairs_table), "--loss", "siglip"]
    result = run(tmp_path / "b", tmp_path / "a", *again)
    assert result["EvalLoss"] == pytest.approx(losses(tmp_path / "a")[-1], rel=0.3)


def test_tars_json_lines_crop_cache_and_zero_shot_in_one_run(tiny_clip, tmp_path):
    write_shard(tmp_path / "a.tar", range(12))
    write_shard(tmp_path / "b.tar", range(12, 24))
    rows = []
    for i in range(8):
        picture = tmp_path / "classes" / f"class_{i % 2}" / f"{i}.jpg"
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(draw(i)[0])
        rows.append(json.dumps({"picture": str(picture), "text": draw(i)[1] + " &amp; <b>"}))
    (tmp_path / "val.jsonl").write_text("\n".join(rows))
    options = ["--do_train", "--train_shards", f"{tmp_path}/a.tar::{tmp_path}/b.tar", "--max_steps", "2"]
    options += ["--do_eval", "--validation_file", str(tmp_path / "val.jsonl"), "--save_every", "0"]
    options += ["--image_column", "picture", "--caption_column", "text", "--crop_cache", str(tmp_path / "crops")]
    options += ["--zero_shot_dir", str(tmp_path / "classes")]
    result = run(tmp_path / "out", tiny_clip, *options, "--clean_captions", "True", "--num_workers", "1")
    assert result["zero_shot_images"] == 8 and 0 <= result["zero_shot_top1"] <= 1
    assert len(list((tmp_path / "crops").glob("*.crops"))) == 2


@pytest.mark.parametrize("family", ["tiny_clip", "tiny_model"])
def test_training_from_a_configuration_alone(family, pairs_table, tmp_path, request):
    folder = request.getfixturevalue(family)
    options = ["--config_name", str(folder), "--output_dir", str(tmp_path), "--device", "cpu"]
    run_clip.main([*options, *train_options(pairs_table, "--max_steps", "1", "--seed", "7")])  # the folder's is 42
    trained, start = load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors")
    # further from the folder's weights than a step goes
    difference = (trained["text_projection.weight"] - start["text_projection.weight"]).abs().max()
    assert difference > 10e-3


def test_frozen_means_unchanged(pairs_table, tiny_model, tmp_path):
    run(tmp_path, tiny_model, *train_options(pairs_table, "--max_steps", "2", "--freeze_vision_model", "True"))
    trained, start = load_file(tmp_path / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    for key in start:
        if key.startswith("vision_model"):
            assert torch.equal(trained[key], start[key]), key
    assert not torch.equal(trained["visual_projection.weight"], start["visual_projection.weight"])


def test_evaluation_does_not_depend_on_batches_and_keeps_the_best(pairs_table, tiny_model, tmp_path):
    evaluation = ["--do_eval", "--validation_file", str(pairs_table), "--eval_strategy", "steps", "--eval_steps", "2"]
    run(tmp_path, tiny_model, *train_options(pairs_table, "--max_steps", "4", *evaluation))
    best = json.loads((tmp_path / "best/best.json").read_text())
    alone = ["--do_eval", "--validation_file", str(pairs_table), "--per_device_eval_batch_size", "8"]
    again = run(tmp_path / "again", tmp_path / "best", *alone)
    assert again["EvalLoss"] == pytest.approx(best["eval_loss"], abs=1e-5)

    trained = (tmp_path / "CLIP_for_PyTorch_bs8_1p_acc.log").read_text()
    in_place = run(tmp_path, tmp_path / "best", *alone[:-1], "4")  # beside the training, whose results stay
    assert in_place["BatchSize"] == 4 and in_place["ActualLoss"] == in_place["EvalLoss"]
    assert (tmp_path / "CLIP_for_PyTorch_bs8_1p_acc.log").read_text() == trained
    assert (tmp_path / "CLIP_for_PyTorch_eval_bs4_1p_acc.log").is_file()
    assert [path.name for path in tmp_path.glob("earlier/*/*")] == ["eval_results.json"]


def test_logit_scale_is_kept_below_ln_100_unless_told_otherwise(pairs_table, tiny_model, tmp_path):
    folder = tmp_path / "hot"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["logit_scale"] = torch.tensor(5.0)
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for clamp, high in (("True", False), ("False", True)):
        options = train_options(pairs_table, "--max_steps", "1", "--clamp_logit_scale", clamp)
        run(tmp_path / clamp, folder, *options)
        scale = load_file(tmp_path / clamp / "model.safetensors")["logit_scale"].item()
        assert (scale > math.log(100) + 1e-6) == high


def test_a_loss_that_is_not_finite_stops_the_run(pairs_table, tiny_model, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["text_projection.weight"][0, 0] = float("nan")
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=r"step 1 on rank 0 \(samples \d+.jpg 'A "):
        run(tmp_path / "out", folder, *train_options(pairs_table, "--max_steps", "2"))
    stored = read_result(tmp_path / "out/CLIP_for_PyTorch_bs8_1p_acc.log")
    assert stored["Status"] == "FAILED" and "ActualFPS" not in stored
    replay = json.loads((tmp_path / "out/replay.json").read_text())
    assert replay["step"] == 1 and len(replay["ranks"]["0"]) == 8
    again = ["--replay", str(tmp_path / "out/replay.json")]
    found = run(tmp_path / "out", folder, *train_options(pairs_table, "--max_steps", "2"), *again)["Replay"]
    assert "not finite again" in found and "first output that is not finite: text_projection on rank 0" in found
    found = run(tmp_path / "out", tiny_model, *train_options(pairs_table, "--max_steps", "2"), *again)["Replay"]
    assert found.startswith("finite, the loss is ") and not list((tmp_path / "out").glob("*.safetensors"))


def test_mixed_precision_is_really_mixed(pairs_table, model_without_dropout, tmp_path):
    first = {}
    for precision in ("fp32", "bf16", "fp16"):
        options = train_options(pairs_table, "--max_steps", "1", "--precision", precision)
        run(tmp_path / precision, model_without_dropout, *options)
        first[precision] = losses(tmp_path / precision)[0]
    assert len(set(first.values())) == 3
    assert list(first.values()) == pytest.approx([first["fp32"]] * 3, rel=2e-2)


def test_every_option_of_the_readme_is_one_of_a_script():
    """Options that the README names are options of the script or flag of the shell scripts that stand beside them."""
    project = Path(__file__).parents[1]
    parser = HfArgumentParser((arguments.ModelArguments, arguments.DataArguments, arguments.ClipTrainingArguments))
    known = {word for action in parser._actions for word in action.option_strings}
    known |= {f"--{name}" for names in (legacy.HOUSE, legacy._SPECIAL) for name in names}
    for script in ("save_clip_roberta.py", "convert_model.py"):
        known |= set(re.findall(r'"(--\w+)"', (project / script).read_text()))
    flags = (project / "test/clip_options.sh").read_text() + (project.parent / "common/launch/launch.sh").read_text()
    named = set(re.findall(r"(?<![\w-])--(\w+)", (project / "README.md").read_text()))
    unknown = {name for name in named if f"--{name}" not in known and not re.search(rf"\b{name}\b", flags)}
    assert len(named) > 40 and unknown - {"case", "extra"} == set()  # of the benchmark; of pip
