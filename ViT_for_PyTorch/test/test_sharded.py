"""--parallel fsdp: the numbers of DDP, checkpoints for any number of ranks, one plain file of them."""

import json
import pickle
import shutil
from enum import Enum
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.distributed.checkpoint.metadata import Metadata

import run_vit
from ci.gates.forked_ranks import run
from common import checkpoint_file, shards
from common.checkpoint import digests
from common.run import result_file
from common.shards.__main__ import main as one_file
from vit.training import checkpoint

SCRIPT = Path(run_vit.__file__)
TINY = ["model.name=vit_demo", "model.img_size=16", "--num_workers", "0", "--log_every", "1", "--save_every", "2"]
# the ranks' own draws are off, so that any number of ranks sees the same samples
TINY += ["data.mixup=0", "data.cutmix=0", "model.drop_path=0", "optimizer.warmup_epochs=0", "--device", "cpu"]
TINY += ["--epochs", "2", "optimizer.ema_decay=0.9", "optimizer.clip_grad=0.5"]
LAST = 6  # 24 pictures, 8 a step, 2 epochs


def losses(output: Path) -> dict[int, tuple[float, float]]:
    lines = [json.loads(text) for text in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "train"}


def assert_same_losses(ours: Path, theirs: Path, first_step: int = 1) -> None:
    first, second = losses(ours), losses(theirs)
    assert list(first) == list(range(first_step, LAST + 1)) and list(second) == list(range(1, LAST + 1))
    for step, values in first.items():
        assert values == pytest.approx(second[step], rel=1e-5), step


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """DDP and FSDP on two ranks; from their step 4 on, on other numbers of ranks and each in the other's way; bf16."""
    root = tmp_path_factory.mktemp("sharded")
    for split, count in (("train", 12), ("val", 2)):
        for index, name in enumerate(("blue", "red")):
            (root / split / name).mkdir(parents=True)
            for number in range(count + index * (split == "val")):  # 5 to evaluate: ranks have different numbers
                colour = (200 * index, 10 * number, 200 - 200 * index)
                Image.new("RGB", (20, 20), colour).save(root / split / name / f"{number:02}.png")

    def options(name: str, parallel: str, batch: int, *rest: str) -> list[str]:
        data = ["--train_dataset_dir", str(root / "train"), "--eval_dataset_dir", str(root / "val")]
        data += ["--output_dir", str(root / name), "--batch_size", str(batch), "--parallel", parallel]
        return [*data, *TINY, *rest]

    def from_step_4(name: str) -> list[str]:
        return ["--resume_training", str(root / name)]

    done = run(
        SCRIPT,
        ["vit.engine"],
        (2, options("ddp", "ddp", 4)),
        (2, options("fsdp", "fsdp", 2, "accumulate=2", "model.gradient_checkpointing=true")),
        (4, options("fsdp, 4 ranks", "fsdp", 2, *from_step_4("fsdp/checkpoints/checkpoint-4"))),
        (1, options("ddp, 1 rank", "ddp", 4, *from_step_4("ddp/checkpoints/checkpoint-4.pt"))),
        (2, options("fsdp, then ddp", "ddp", 4, *from_step_4("fsdp/checkpoints/checkpoint-4"))),
        (2, options("ddp, then fsdp", "fsdp", 4, *from_step_4("ddp/checkpoints/checkpoint-4.pt"))),
        (2, options("bf16", "fsdp", 4, "--precision", "bf16", "--max_steps", "2")),
        (2, options("fp8", "fsdp", 4, "--precision", "bf16", "--max_steps", "2", "model.fp8=true")),
    )
    assert done.returncode == 0, done.stdout
    return root


def test_the_loss_curve_is_that_of_ddp(runs):
    assert_same_losses(runs / "fsdp", runs / "ddp")
    ours, theirs = (result_file.read(next((runs / name).glob("*_2p_acc.log"))) for name in ("fsdp", "ddp"))
    assert ours["EvalCount"] == theirs["EvalCount"] == "5"
    assert ours["TrainAccuracy"] == theirs["TrainAccuracy"]


@pytest.mark.parametrize("name", ["fsdp, 4 ranks", "ddp, 1 rank", "fsdp, then ddp", "ddp, then fsdp"])
def test_a_checkpoint_goes_on_with_another_number_of_ranks_and_in_the_other_way(runs, name):
    assert_same_losses(runs / name, runs / "ddp", first_step=5)


def test_ranks_that_cannot_keep_the_global_batch_are_refused(runs):
    values = checkpoint.read_values(runs / "ddp" / "checkpoints" / "checkpoint-4.pt")
    path = runs / "ddp" / "checkpoints" / "checkpoint-4.pt"
    assert values["shape"]["global_batch"] == 8 and values["config"]["accumulate"] == 1
    # batch_size, accumulate, ranks -> accumulate that is taken; 8 / (batch_size x ranks), or what was asked for
    for given, taken in {(4, 1, 1): 2, (4, 3, 1): 2, (4, 1, 2): 1, (4, 2, 2): 2, (4, 1, 3): 1, (8, 1, 2): 1}.items():
        assert checkpoint.accumulate_on(path, *given) == taken, given


def test_bf16_computes_near_fp32_from_fp32_masters(runs):
    state = shards.read_shards(runs / "bf16" / "checkpoints" / "checkpoint-2")
    assert {value.dtype for value in state["model"].values()} == {torch.float32}
    for step, (loss, norm) in losses(runs / "bf16").items():
        exact = losses(runs / "ddp")[step]
        assert loss == pytest.approx(exact[0], rel=0.02) and norm != exact[1]


def test_shards_multiply_in_fp8(runs):
    ours, theirs = losses(runs / "fp8"), losses(runs / "bf16")
    assert ours != theirs
    for step, (loss, norm) in ours.items():
        assert loss == pytest.approx(theirs[step][0], rel=0.005) and norm == pytest.approx(theirs[step][1], rel=0.1)


def test_one_plain_file_is_the_checkpoint_of_ddp(runs, tmp_path, capsys):
    folder = runs / "fsdp" / "checkpoints" / f"checkpoint-{LAST}"
    one_file([str(folder), str(tmp_path / "model.pt")])
    whole = checkpoint_file.load(tmp_path / "model.pt")
    ddp = checkpoint_file.load(runs / "ddp" / "checkpoints" / f"checkpoint-{LAST}.pt")
    best = checkpoint_file.load(runs / "fsdp" / "checkpoints" / "best.pt")
    for part in ("model", "ema"):
        assert whole[part].keys() == ddp[part].keys() == best[part].keys()
        for key, value in ddp[part].items():
            # rows of the key bias have no true gradient: AdamW turns their rounding noise into steps
            if not key.endswith("qkv.bias"):
                torch.testing.assert_close(whole[part][key], value, rtol=1e-4, atol=2e-5)
    with pytest.raises(SystemExit):
        one_file([str(folder), str(tmp_path / "model.pt")])
    assert "exists: name a new file" in capsys.readouterr().err


def test_a_sharded_checkpoint_is_evaluated_and_loaded_as_it_is(runs, tmp_path):
    folder = runs / "fsdp" / "checkpoints" / f"checkpoint-{LAST}"
    options = ["--run_mode", "eval", "--load_checkpoint", str(folder), "--eval_dataset_dir", str(runs / "val")]
    run_vit.main([*options, *TINY, "--output_dir", str(tmp_path)])
    result = result_file.read(next(tmp_path.glob("*.log")))
    lines = [json.loads(text) for text in (runs / "fsdp" / "metrics.jsonl").read_text().splitlines()]
    scored = [line for line in lines if line["kind"] == "eval"][-1]
    assert result["Count"] == "5" and float(result["TrainAccuracy"]) == scored["top1"]
    assert float(result["ActualLoss"]) == pytest.approx(scored["loss"], abs=2e-6)


def test_only_whole_checkpoints_are_found_and_old_ones_are_dropped(runs, tmp_path):
    source = runs / "fsdp" / "checkpoints"
    assert {path.name for path in source.iterdir() if path.is_dir()} == {"checkpoint-4", "checkpoint-6"}
    shutil.copytree(source, tmp_path / "checkpoints")
    assert checkpoint.find("auto", str(tmp_path)) == tmp_path / "checkpoints" / "checkpoint-6"
    (tmp_path / "checkpoints" / "checkpoint-6" / shards.PROGRESS).unlink()
    with pytest.warns(UserWarning, match="not a whole sharded checkpoint .it has no progress.pt"):
        assert checkpoint.find("auto", str(tmp_path)) == tmp_path / "checkpoints" / "checkpoint-4"


class RunsCode:
    def __reduce__(self):
        return (print, ("the code has run",))


def test_a_folder_with_foreign_code_is_refused_and_does_not_run_it(runs, tmp_path, capsys):
    folder = tmp_path / "checkpoint-6"
    shutil.copytree(runs / "fsdp" / "checkpoints" / "checkpoint-6", folder)
    (folder / ".metadata").write_bytes(pickle.dumps(RunsCode()))
    with pytest.raises(checkpoint_file.CheckpointError, match=".metadata"):
        shards.read_shards(folder)
    (folder / digests.SEAL).unlink()  # as of an earlier version, or by someone who can seal
    (folder / ".metadata").write_bytes(pickle.dumps(RunsCode()))
    with pytest.raises(checkpoint_file.CheckpointError, match="wants to run builtins.print"):
        shards.read_shards(folder)
    for path in folder.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:100])
    shutil.copy(runs / "fsdp" / "checkpoints" / "checkpoint-6" / ".metadata", folder)
    with pytest.raises(checkpoint_file.CheckpointError, match="not a readable sharded checkpoint"):
        shards.read_shards(folder)
    assert "the code has run" not in capsys.readouterr().out


class EnumsByName(pickle.Pickler):
    """Writes the members of enums as Python 3.11.2 does."""

    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


class TakesAttribute:
    def __reduce__(self):
        return (getattr, (Metadata, "__init__"))


def test_an_index_of_an_early_python_3_11_is_read_and_no_attribute_but_of_enums(runs, tmp_path):
    folder = tmp_path / "checkpoint-6"
    shutil.copytree(runs / "fsdp" / "checkpoints" / "checkpoint-6", folder)
    want = shards.read_shards(folder)["model"]
    (folder / digests.SEAL).unlink()
    index = pickle.loads((folder / ".metadata").read_bytes())
    with open(folder / ".metadata", "wb") as file:
        EnumsByName(file).dump(index)
    assert b"getattr" in (folder / ".metadata").read_bytes()
    torch.testing.assert_close(shards.read_shards(folder)["model"], want, rtol=0, atol=0)
    (folder / ".metadata").write_bytes(pickle.dumps(TakesAttribute()))
    with pytest.raises(checkpoint_file.CheckpointError, match="its index wants '__init__' of"):
        shards.read_shards(folder)
