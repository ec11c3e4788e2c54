"""run_beitv2_pretraining.py: the reference's trajectory, exact resume, ranks, files, and errors before training."""

import argparse
import functools
import json
import re
from pathlib import Path

import pytest
import torch
from small_models import OPTIONS

import beit2
import run_beitv2_pretraining
from beit2.image_data import Batch, EpochBatches
from beit2.training.optimizers import create_optimizer, set_step
from beit2.training.pretraining_loss import token_loss
from beit2.training.run import gradient_step
from beit2.training.state import TrainState
from beit2.weights.files import read_checkpoint
from common import device as devices
from common.distributed import World
from common.update import GuardedStep, LossScale

HERE = Path(__file__).resolve().parent


def run(pictures, tokenizer_file, output_dir, *extra, model="beit_test_cls_pt"):
    return run_beitv2_pretraining.main([
        *OPTIONS, "--model", model, "--data_path", str(pictures / "train"), "--tokenizer_weight", str(tokenizer_file),
        "--epochs", "2", "--save_ckpt_freq", "1", "--output_dir", str(output_dir), *extra,
    ])  # fmt: skip


def metrics(output_dir):
    """Of each step what must not depend on anything but the step."""
    lines = [json.loads(text) for text in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["grad_norm"], line["lr"]) for line in lines if line["kind"] == "train"}


class GoldenBatches:
    """Stands in for the normaliser: the golden's pictures are normalised already."""

    def __init__(self, g):
        self.device, self.g = torch.device("cpu"), g

    def views(self, batch):
        return self.g["samples"][batch.views], self.g["images"][batch.views]


def test_eight_steps_of_the_reference(golden):
    g = golden("trajectory")
    model = beit2.build_pretraining_model(**g.json["config"])
    model.load_state_dict(g.state())
    tokenizer = beit2.build_tokenizer(**g.json["tokenizer"])
    tokenizer.load_state_dict(g.state("tok_sd."), strict=False)
    tokenizer.for_encoding()
    groups = beit2.parameter_groups(model, 0.05)
    optimizer = create_optimizer("adamw", groups, lr=1.5e-3, eps=1e-8, betas=g.json["betas"])
    guarded = GuardedStep(optimizer, model.parameters(), LossScale(False), clip_norm=g.json["clip_grad"])
    loss_of = functools.partial(token_loss, model, tokenizer, GoldenBatches(g), "fp32")
    state = TrainState()
    for step in range(8):
        if step == 4:
            state.begin_epoch()
        set_step(optimizer, g.json["lr"][step], g.json["wd"][step])
        batch = Batch(torch.tensor(step), None, g["masks"][step].bool())
        scalars = gradient_step(model, guarded, loss_of, [batch], step + 1)
        scalars |= {"lr": g.json["lr"][step]}
        state.add(scalars)
        for name, values in g.json["records"].items():
            value = values[step]
            key = name.split("/")[1]
            if key in scalars and key != "loss_scale":  # the reference scales in fp32, too
                tolerance = {"abs": 1e-4} if name.startswith("loss") else {"rel": 1e-4}
                assert float(scalars[key]) == pytest.approx(value, **tolerance), (step, name)
    for name, value in state.means().items():
        if name != "loss_scale":
            assert value == pytest.approx(g.json["last_epoch_stats"][name], rel=1e-4, abs=1e-5), name
    for name, parameter in model.named_parameters():
        norm, total = g.json["final_norm_sum"][name]
        assert parameter.norm().item() == pytest.approx(norm, rel=1e-4), name
        assert parameter.sum().item() == pytest.approx(total, abs=2e-3), name


def test_resume_in_mid_epoch_is_the_same_run(pictures, tokenizer_file, tmp_path):
    result = run(pictures, tokenizer_file, tmp_path / "whole")
    assert result["Status"] == "OK" and 0 <= result["TrainAccuracy"] <= 100
    run(pictures, tokenizer_file, tmp_path / "cut", "--max_steps", "3")
    assert read_checkpoint(tmp_path / "cut/checkpoint.pth")["epoch"] == -1  # an epoch has 4 steps
    run(pictures, tokenizer_file, tmp_path / "cut", "--num_workers", "2")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    a, b = (read_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("whole", "cut"))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert (tmp_path / "whole/log.txt").read_text() == (tmp_path / "cut/log.txt").read_text()
    log = [json.loads(text) for text in (tmp_path / "cut/log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [0, 1]
    assert {p.name for p in (tmp_path / "cut").glob("*.pth")} == {
        "checkpoint.pth",
        "checkpoint-0.pth",
        "checkpoint-1.pth",
    }

    # a damaged newest file is passed over for the epoch's
    (tmp_path / "cut/checkpoint.pth").write_bytes(b"cut short")
    with pytest.warns(UserWarning, match="damaged"):
        run(pictures, tokenizer_file, tmp_path / "cut")


def test_log_has_the_reference_s_keys(golden, pictures, tokenizer_file, tmp_path, check_profile):
    run(pictures, tokenizer_file, tmp_path, "--max_steps", "4", "--profile")
    check_profile(tmp_path, "2 to 4", "aten::_fused_adamw_")
    ours = json.loads((tmp_path / "log.txt").read_text())
    theirs = json.loads((HERE / "golden/run_example_log.txt").read_text().splitlines()[0])
    assert set(ours) == set(theirs)


def test_reference_checkpoint_resumes_here():
    """And what we write has its keys, so that it loads there."""
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "vocab_size": 32}
    model = beit2.build_pretraining_model(
        use_shared_rel_pos_bias=True, init_values=0.1, early_layers=1, head_layers=1, **options
    )
    path = HERE / "golden/run_example_checkpoint.pth"
    optimizer = create_optimizer("adamw", beit2.parameter_groups(model, 0.05), lr=1e-3)
    scale = LossScale(False)
    from beit2.training.checkpoints import load_training_state, training_state

    progress, _ = load_training_state(path, model, optimizer, scale, steps_per_epoch=4)
    theirs = read_checkpoint(path)
    assert progress["step"] == 12  # three epochs of four steps
    state = optimizer.state_dict()
    assert len(state["state"]) == len(theirs["optimizer"]["state"])
    for number, moments in theirs["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(state["state"][number][name], value)
    assert all(group["fused"] for group in optimizer.param_groups)
    ours = training_state(model, optimizer, scale, argparse.Namespace(path=path), {"step": 12}, epoch=2)
    assert set(theirs) <= set(ours) and ours["epoch"] == 2 and set(ours["scaler"]) == set(theirs["scaler"])
    assert {k: (v.shape, v.dtype) for k, v in ours["model"].items()} == {
        k: (v.shape, v.dtype) for k, v in theirs["model"].items()
    }
    assert set(theirs["optimizer"]["param_groups"][0]) <= set(ours["optimizer"]["param_groups"][0])


def test_a_checkpoint_of_another_optimizer_or_without_one(pictures, tokenizer_file, tmp_path):
    run(pictures, tokenizer_file, tmp_path / "adamw", "--max_steps", "1")
    whole = tmp_path / "adamw/checkpoint.pth"
    for name in ("sgd", "momentum"):
        with pytest.raises(devices.UsageError) as caught:
            run(pictures, tokenizer_file, tmp_path / name, "--opt", name, "--resume", str(whole))
        assert "it is another optimizer's (betas, momentum" in caught.value.message
    weights = tmp_path / "weights.pth"
    torch.save({"model": read_checkpoint(whole)["model"]}, weights)
    run(pictures, tokenizer_file, tmp_path / "late", "--resume", str(weights), "--start_epoch", "1")
    assert list(metrics(tmp_path / "late")) == [5, 6, 7, 8]  # an epoch has four steps


def test_tokenizer_sees_pictures_as_it_was_trained(tokenizer_file, tmp_path):
    from beit2.pretraining_options import load_tokenizer, read_options

    options = read_options([*OPTIONS, "--tokenizer_weight", str(tmp_path / "trained.pth")])
    weights = read_checkpoint(tokenizer_file)
    torch.save(weights | {"args": argparse.Namespace(process_type="imagenet_norm")}, options.tokenizer_weight)
    assert load_tokenizer(options, "fp32", (4, 4)).process_type == "imagenet_norm"
    options.tokenizer_weight = str(tokenizer_file)
    assert load_tokenizer(options, "fp32", (4, 4)).process_type == "default"


def test_accumulation_is_a_larger_batch(pictures, tokenizer_file, tmp_path):
    extra = ("--drop_path", "0", "--max_steps", "2")
    run(pictures, tokenizer_file, tmp_path / "two", "--update_freq", "2", *extra)
    run(pictures, tokenizer_file, tmp_path / "one", "--batch_size", "8", *extra)
    two, one = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-4)


@pytest.mark.parametrize(("options", "scale"), [("--precision bf16", 1), ("--fp16_opt_level O2 --loss_scale 64", 64)])
def test_half_precision_and_no_cls_head(pictures, tokenizer_file, tmp_path, options, scale):
    extra = (*options.split(), "--max_steps", "2")
    result = run(pictures, tokenizer_file, tmp_path, *extra, model="beit_test")
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {line["loss_scale"] for line in lines if line["kind"] == "train"} == {scale}
    assert result["Status"] == "OK" and result["ActualLoss"] == pytest.approx(3.47, abs=0.6)  # about ln 32
    assert "train_mlm_acc" not in read_checkpoint(tmp_path / "checkpoint.pth")


def test_fp8_beside_bf16(pictures, tokenizer_file, tmp_path):
    runs = {}
    for name, options in (("bf16", []), ("fp8", ["--fp8"])):
        run(pictures, tokenizer_file, tmp_path / name, "--precision", "bf16", "--max_steps", "3", *options)
        runs[name] = [loss for loss, *_ in metrics(tmp_path / name).values()]
    assert runs["fp8"] != runs["bf16"] and runs["fp8"] == pytest.approx(runs["bf16"], rel=0.005)
    with pytest.raises(SystemExit):
        run(pictures, tokenizer_file, tmp_path / "fp8", "--precision", "bf16", "--resume", "auto")
    with pytest.raises(SystemExit):
        run(pictures, tokenizer_file, tmp_path / "fp32", "--fp8")
    with pytest.raises(SystemExit):
        run(pictures, tokenizer_file, tmp_path / "compiled", "--fp8", "--precision", "bf16", "--compile")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_pictures(
    pictures, tokenizer_file, tmp_path, monkeypatch
):
    """And the weights that were saved before stay what they were."""
    import beit2.training.pretraining_loss as losses

    run(pictures, tokenizer_file, tmp_path, "--max_steps", "1")
    before = (tmp_path / "checkpoint.pth").read_bytes()
    real = losses.F.cross_entropy
    calls = []

    def broken(logits, labels):
        calls.append(1)
        return real(logits, labels) * (float("nan") if 2 < len(calls) < 7 else 1.0)  # two heads a step

    monkeypatch.setattr(losses.F, "cross_entropy", broken)
    with pytest.raises(SystemExit, match=r"loss became inf or nan at step 3 on rank 0 \(samples .*\.(jpg|png)"):
        run(pictures, tokenizer_file, tmp_path)
    replay = json.loads((tmp_path / "replay.json").read_text())
    assert replay["step"] == 3 and len(replay["ranks"]["0"]) == 4
    findings = [
        run(pictures, tokenizer_file, tmp_path, "--replay", str(tmp_path / "replay.json"))["Replay"] for _ in "12"
    ]
    assert "not finite again" in findings[0] and "gradient of an output that is not finite: lm_head" in findings[0]
    assert findings[1].startswith("finite, the loss is ")
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


@pytest.mark.parametrize("name", ["sgd", "lamb", "lookahead_radam"])
def test_other_optimizers_go_through_the_same_step(pictures, tokenizer_file, tmp_path, name):
    run(pictures, tokenizer_file, tmp_path, "--opt", name, "--max_steps", "2")
    assert list(metrics(tmp_path)) == [1, 2]


def test_epochs_never_overrun_and_ranks_share_them():
    """len = W * B * k - 1 gave the reference's last epoch one batch more than its schedule has."""
    ranks = [EpochBatches(15, 4, World(rank=r, size=2), 1, seed=0, start=0, stop=3) for r in range(2)]
    batches = [list(sampler) for sampler in ranks]
    assert [len(b) for b in batches] == [3, 3]
    for a, b in zip(*batches, strict=True):
        assert not set(a) & set(b) and len({epoch for epoch, _ in a + b}) == 1
    assert batches[0][0] != [(0, i) for _, i in batches[0][1]]  # another order every epoch, in one process, too


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--codebook_size", "64"], "its codebook is 32 x 8.*--codebook_size 32"),
        (["--second_input_size", "48"], r"\(6, 6\) patches.*give --second_input_size 32"),
        (["--num_mask_patches", "17"], "17 patches to mask.*has 16"),
        (["--early_layers", "9"], "early_layers 9: must be between 1 and the model's depth, 4"),
        (["--batch_size", "64"], "16 pictures are fewer than one step takes"),
        (["--warmup_epochs", "9"], "warm-up of 36 steps.*longer"),
        (["--data_path", "nowhere"], "--data_path nowhere: no such folder"),
        (["--tokenizer_weight", "nowhere.pth"], "nowhere.pth: no such weight file"),
        (["--model", "beit_test_classifier"], "is for fine-tuning"),
        (["--opt_betas", "0.9"], "--opt_betas.*two numbers"),
        (["--opt_betas", "0.9", "1.5"], "--opt adamw: Invalid beta"),
        (["--drop_path", "-0.1"], "--drop_path -0.1: must be"),
        (["--clip_grad", "0"], "--clip_grad 0.0: must be above 0"),
        (["--start_epoch", "-1"], "--start_epoch -1: must not be negative"),
        (["--random_tokenizer"], "give one of the two"),
        (["--plan_memory", "0"], "--plan_memory 0"),
        (["--fsdp"], "start with torchrun"),
        (["--resume", str(HERE / "golden/run_example_checkpoint.pth")], "the checkpoint of another model"),
    ],
)
def test_bad_input_is_one_clear_error(pictures, tokenizer_file, tmp_path, extra, message):
    with pytest.raises(devices.UsageError) as caught:
        run(pictures, tokenizer_file, tmp_path, *extra)
    assert re.search(message, caught.value.message), caught.value.message
    assert caught.value.code == 2 and not (tmp_path / "metrics.jsonl").exists()


def test_unreadable_pictures_are_named(tokenizer_file, tmp_path):
    folder = tmp_path / "data/train/a"
    folder.mkdir(parents=True)
    (folder / "bad.jpg").write_bytes(b"not a picture")
    with pytest.raises(devices.UsageError) as caught:
        run(tmp_path / "data", tokenizer_file, tmp_path / "out")
    assert "bad.jpg: not a readable picture" in caught.value.message


def test_missing_tokenizer_weights_name_the_command(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(devices.UsageError) as caught:
        run_beitv2_pretraining.main(
            ["--data_path", str(pictures / "train"), "--device", "cpu", "--output_dir", str(tmp_path / "out"),
             "--batch_size", "4", "--model", "beit_test_cls_pt", "--early_layers", "2", "--num_mask_patches", "70",
             "--codebook_size", "8192"]
        )  # fmt: skip
    assert "wget -O vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth 'https://" in caught.value.message


def test_memory_plan_of_the_5b_model_fits_60_gb(capsys):
    run_beitv2_pretraining.main("--plan_memory 8 --model beit_huge_5B_cls_pt --early_layers 6 --batch_size 120".split())
    text = capsys.readouterr().out
    total = float(text.splitlines()[2].split()[-1])
    assert "4,668," in text and 15 < total < 60


def test_coco_folder_without_classes(tmp_path, pictures):
    from beit2.image_data import find_images

    for name in ("train2017", "val2017"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jpg").write_bytes((pictures / "train/red/0.jpg").read_bytes())
    assert [p.name for p in find_images(tmp_path)] == ["0.jpg"]
    assert find_images(tmp_path)[0].parent.name == "train2017"
    assert len(find_images(pictures / "train")) == 16


def test_dead_options_are_accepted_with_a_warning():
    from beit2.pretraining_options import read_options

    with pytest.warns(UserWarning) as caught:
        options = read_options("--warmup_lr 1e-6 --decoupling_aug --dist_on_itp --lr 0.1".split())
    named = [str(warning.message).split()[0] for warning in caught]
    assert named == ["--warmup_lr", "--decoupling_aug", "--dist_on_itp"]
    assert options.lr == 0.1
