"""Two ranks: DDP, FSDP2 and one process train the same model; sharded checkpoints; the shared codebook."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from small_models import OPTIONS

import draw_predictions
import export_weights
import run_class_finetuning
import run_linear_eval
from beit2.model.quantizer import NormEMAQuantizer
from beit2.training.checkpoints import fit_progress
from beit2.weights.files import read_checkpoint
from common import checkpoint_file
from common.errors import UsageError

HERE = Path(__file__).resolve().parent


def torchrun(ranks, *runs):
    """Starts small_models.py once for all runs, each (script, argument, ...)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [str(HERE / "small_models.py"), *runs[0]]
    for run in runs[1:]:
        command += ["--then", *run]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def train_lines(folder):
    """Of each step what must not depend on how the work is shared out."""
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if line["kind"] == "train"}


def epoch_lines(folder):
    """The lines of log.txt, whose means are over all ranks."""
    return [json.loads(text) for text in (folder / "log.txt").read_text().splitlines()]


def assert_same_curve(folder, other, tolerance, names=("loss", "grad_norm", "lr")):
    ours, theirs = train_lines(folder), train_lines(other)
    assert list(ours) == list(theirs)
    for step in ours:
        for name in names:
            assert ours[step][name] == pytest.approx(theirs[step][name], rel=tolerance), (step, name)


# Four updates of a codebook on every rank, from k-means with other draws; rank 0 writes all ranks' codes.
CODEBOOK = """
import sys
import torch
from torch.nn.functional import normalize
import draw_predictions
import export_weights
import run_class_finetuning
import run_linear_eval
from beit2.model.quantizer import NormEMAQuantizer
from common import distributed

torch.manual_seed(distributed.rank())
quantizer = NormEMAQuantizer(12, 4, decay=0.9, kmeans_init=True).train()
batches = normalize(torch.randn(4, 2, 24, 4, generator=torch.Generator().manual_seed(5)), dim=-1)
books = []
for batch in batches:
    quantizer(batch[distributed.rank()].unsqueeze(0))
    books.append(distributed.gather_objects(quantizer.embedding.weight.clone()))
usage = quantizer.cluster_size.clone()
quantizer.cluster_size[3:7] = 0
assert quantizer.revive_unused() == 4
quantizer(batches[0, distributed.rank()].unsqueeze(0))
revived = distributed.gather_objects(quantizer.embedding.weight.clone())
if distributed.rank() == 0:
    torch.save({"batches": batches, "books": books, "usage": usage, "revived": revived}, sys.argv[1])
"""


# Under bf16 shards and a layer scale of 1e-5: the share of entries that a block changes, and the stream's precision.
STREAM = """
import sys
import torch
import beit2
from beit2.training.parallel import ShardedReplica
from common import device as devices
from common import distributed

with torch.device("meta"):
    model = beit2.build_pretraining_model(
        img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=2, vocab_size=32, early_layers=2, head_layers=1,
        use_shared_rel_pos_bias=True, init_values=1e-5,
    )
world = distributed.World(rank=distributed.rank(), size=2, local_rank=distributed.rank(), local_size=2)
replica = ShardedReplica(model, world, "bf16", 0)
seen = []
model.blocks[1].register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
images, mask = torch.randn(2, 3, 32, 32), torch.arange(16).expand(2, 16) % 3 == 0
with devices.autocast(world.device, "bf16"):
    outputs = replica.wrapped(images, mask)
sum(out.float().square().mean() for out in outputs).backward()
before, after = seen[0]
if distributed.rank() == 0:
    torch.save({"changed": float((before != after).float().mean()), "dtype": str(after.dtype)}, sys.argv[1])
"""


def faint_classes(folder):
    """Noise with a faint tint, 13 and 7 pictures a class: what features tell apart only now and then."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 13), ("val", 7)):
        for tint in range(3):
            (folder / split / str(tint)).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 240, (32, 32, 3), dtype=np.uint8)
                pixels[..., tint] += 4
                Image.fromarray(pixels).save(folder / split / str(tint) / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def runs(pictures, tokenizer_file, tmp_path_factory):
    """The folder of all runs on two ranks. An epoch has two steps; "cut" runs stop after the first epoch or in it."""
    folder = tmp_path_factory.mktemp("ranks")

    def run(name, *extra):
        options = ["--model", "beit_test_cls_pt", "--epochs", "2", "--save_ckpt_freq", "1", "--drop_path", "0", *extra]
        data = ["--data_path", str(pictures / "train"), "--tokenizer_weight", str(tokenizer_file)]
        return ("run_beitv2_pretraining.py", *OPTIONS, *data, "--output_dir", str(folder / name), *options)

    (folder / "codebook.py").write_text(CODEBOOK)
    (folder / "stream.py").write_text(STREAM)
    watched = ("--monitor_every", "1", "--monitor_data_path", str(faint_classes(folder / "faint")))
    sharded = ("--parallel", "fsdp", "--activation_checkpointing", *watched)
    half = ("--fsdp", "--precision", "fp16")
    features = ("--data_path", str(pictures), "--device", "cpu", "--num_workers", "0", "--checkpoint")
    features += (str(folder / "fsdp/checkpoint-sharded"),)
    torchrun(
        2,
        run("ddp", *watched),
        run("fsdp", *sharded, "--max_steps", "3"),
        run("fsdp", *sharded),
        run("fp16", *half),
        run("fp16_cut", *half, "--max_steps", "3"),
        run("fp16_cut", *half),
        run("moved", *sharded, "--max_steps", "2"),
        run("to_ddp", "--fsdp", "--max_steps", "3"),
        run("to_ddp"),
        run("to_fsdp", "--max_steps", "3"),
        run("to_fsdp", "--fsdp"),
        ("extract_features.py", *features, "--output", str(folder / "two.safetensors"), "--batch_size", "5"),
        (str(folder / "codebook.py"), str(folder / "codebook.pt")),
        (str(folder / "stream.py"), str(folder / "stream.pt")),
    )
    torchrun(
        1,
        ("extract_features.py", *features, "--output", str(folder / "one.npy")),
        run("moved", *sharded, "--batch_size", "8"),  # the same global batches on one rank
    )
    return folder


def test_fsdp_with_recomputed_blocks_equals_ddp(runs):
    """From the same initial weights, drawn whole or as shards, and resumed in mid-epoch from the shards."""
    assert len(train_lines(runs / "ddp")) == 4
    assert_same_curve(runs / "fsdp", runs / "ddp", 1e-4)
    a, b = (read_checkpoint(runs / name / "checkpoint-1.pth")["model"] for name in ("ddp", "fsdp"))
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5, msg=name)
    for line, other in zip(epoch_lines(runs / "fsdp"), epoch_lines(runs / "ddp"), strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_the_residual_stream_of_bf16_shards_is_fp32(runs):
    """In bf16 a block with a layer scale of 1e-5 changed nothing at all; under DDP it changes nine entries of ten."""
    stream = torch.load(runs / "stream.pt", weights_only=True)
    assert stream["dtype"] == "torch.float32" and stream["changed"] > 0.9


def test_a_sharded_checkpoint_goes_on_with_another_number_of_ranks(runs):
    assert_same_curve(runs / "moved", runs / "ddp", 1e-4, ("grad_norm", "lr"))  # the loss there is rank 0's
    moved, stayed = (epoch_lines(runs / name) for name in ("moved", "ddp"))
    assert moved[1] == pytest.approx(stayed[1], rel=1e-4, abs=1e-6)


def test_a_run_goes_on_in_shards_or_out_of_them(runs):
    for name in ("to_ddp", "to_fsdp"):
        assert_same_curve(runs / name, runs / "ddp", 1e-4)
        assert epoch_lines(runs / name)[1] == pytest.approx(epoch_lines(runs / "ddp")[1], rel=1e-4, abs=1e-6)


def test_the_shards_folder_is_taken_wherever_a_checkpoint_file_is(runs, pictures, tokenizer_file, tmp_path):
    """Beside extract_features.py (below) and --resume (above)."""
    folder, whole = str(runs / "fsdp/checkpoint-sharded"), str(runs / "fsdp/checkpoint-1.pth")
    data = ["--data_path", str(pictures / "train"), "--eval_data_path", str(pictures / "val")]
    for number, checkpoint in enumerate((folder, whole)):
        out = tmp_path / str(number)
        common = [
            "--input_size",
            "32",
            "--num_workers",
            "0",
            "--device",
            "cpu",
            "--max_steps",
            "1",
            "--batch_size",
            "8",
        ]
        common += ["--model", "beit_test_classifier", *data]
        tuned = ["--finetune", checkpoint, "--output_dir", str(out / "tuned"), "--warmup_epochs", "0", "--aa", "none"]
        run_class_finetuning.main([*common, *tuned, "--reprob", "0"])
        run_linear_eval.main([*common, "--pretrained_weights", checkpoint, "--output_dir", str(out / "probe")])
        figure = ["--tokenizer_weight", str(tokenizer_file), *data[:2], "--output", str(out / "figure.png")]
        draw_predictions.main(["--checkpoint", checkpoint, *figure])
        export_weights.main(["--checkpoint", checkpoint, "--to", "safetensors", "--output", str(out / "export")])
    for name in ("tuned/metrics.jsonl", "probe/metrics.jsonl"):
        ours, theirs = (train_lines((tmp_path / number / name).parent)[1]["loss"] for number in "01")
        assert ours == theirs
    for name in ("figure.png", "export/model.safetensors"):
        ours, theirs = ((tmp_path / number / name).read_bytes() for number in "01")
        assert len(ours) == len(theirs) and (name != "figure.png" or ours == theirs)


def test_fp16_scaling_survives_a_sharded_resume(runs):
    """The first gradient overflows in some shard: all ranks skip it, and the lower scale is in the checkpoint."""
    assert_same_curve(runs / "fp16_cut", runs / "fp16", 0, ("loss", "loss_scale", "lr"))
    assert_same_curve(runs / "fp16", runs / "ddp", 2e-2, ("loss", "lr"))
    whole, cut = (checkpoint_file.load(runs / n / "checkpoint-sharded/progress.pt") for n in ("fp16", "fp16_cut"))
    assert whole["scaler"] == cut["scaler"] and whole["scaler"]["scale"] < 65536
    ours, theirs = (read_checkpoint(runs / name / "checkpoint-1.pth")["model"] for name in ("fp16", "fp16_cut"))
    for name in ours:
        assert torch.equal(ours[name], theirs[name]) and ours[name].isfinite().all(), name


def test_a_monitor_s_scores_do_not_depend_on_the_ranks(runs):
    """Of two ranks under DDP, two with shards, and one with the shards of two; odd counts, so one fills up."""

    def scores(name):
        lines = [json.loads(text) for text in (runs / name / "metrics.jsonl").read_text().splitlines()]
        found = {line["step"]: line for line in lines if line["kind"] == "monitor"}
        return {step: (line["knn_top1"], line["linear_top1"]) for step, line in found.items()}

    ddp = scores("ddp")
    assert list(ddp) == [0, 2, 4] and len(set(ddp.values())) > 1
    for name in ("fsdp", "moved"):
        assert scores(name)[4] == pytest.approx(ddp[4], abs=5), name  # one picture of 21
        assert scores(name)[0] == ddp[0]


def test_features_of_a_sharded_checkpoint_on_two_ranks_are_those_on_one(runs):
    with safe_open(runs / "two.safetensors", framework="np") as file:
        np.testing.assert_allclose(file.get_tensor("features"), np.load(runs / "one.npy"), atol=1e-5)
        names = json.loads(file.metadata()["names"])
    assert names == (runs / "one.names.txt").read_text().splitlines() and len(names) == 24
    assert not list(runs.glob(".*.writing*"))


def test_other_ranks_go_on_with_the_same_global_batch_only():
    kept = {"step": 4, "sums": {}, "identity": {"seed": 0}}
    notes = {"steps_per_epoch": 4, "ranks": 8}
    assert fit_progress(kept | notes, 4, Path("checkpoint.pth")) == kept
    with pytest.raises(UsageError, match="made on 8 ranks.*so that their product with the ranks stays"):
        fit_progress(kept | notes, 8, Path("checkpoint.pth"))
    assert fit_progress(kept | notes | {"ranks": 1}, 8, Path("checkpoint.pth")) == {
        "step": 8,
        "identity": {"seed": 0},  # which a sharded checkpoint keeps here: it says that the run is another one
    }  # other data, as upstream


def test_ranks_share_one_codebook(runs):
    """k-means starts all ranks from rank 0's codes, and every update is that of one process with the whole batch."""
    result = torch.load(runs / "codebook.pt", weights_only=True)
    torch.manual_seed(0)
    alone = NormEMAQuantizer(12, 4, decay=0.9, kmeans_init=True).train()
    alone._init_by_kmeans(result["batches"][0, 0])
    for batch, (first, second) in zip(result["batches"], result["books"], strict=True):
        alone(batch)
        assert torch.equal(first, second)
        torch.testing.assert_close(first, alone.embedding.weight)
    torch.testing.assert_close(result["usage"], alone.cluster_size)
    first, second = result["revived"]
    assert torch.equal(first, second) and not torch.allclose(first[3:7], result["books"][-1][0][3:7], atol=0.1)
