"""--parallel fsdp on forked ranks: the numbers of ranks that have all, and checkpoints that either goes on from."""

from pathlib import Path

import pytest
import torch
from small_runs import TEST, last, lines, words

import train
from ci.gates.forked_ranks import run

LAST = 4
DROPS = ["model.transformer.dropout=0.1", "model.transformer.attention_dropout=0.1"]
WHOLE, SHARDED = [], ["--parallel", "fsdp"]
STILL = [f"model.{name}=0" for name in ("encoder_dropout", "attention_dropout", "post_mlp_drop")]
STILL += [f"model.modalities.text.{name}=0" for name in ("dropout", "mask_noise_std", "decoder.input_dropout")]
# configuration, more options; batches of an epoch that are no multiple of the ranks, so that one has none now and then
KINDS = {
    "text": ("tiny", [*DROPS, "dataset.max_tokens=1024", "optimization.update_freq=[2]"]),
    "pictures": ("tiny_vision", ["dataset.batch_size=7", "model.checkpoint_activations=true"]),
    "2.0, text": ("tiny_multi", ["dataset.max_tokens=512", *STILL]),
    "2.0, pictures": ("tiny_multi_vision", ["dataset.batch_size=7", "--precision", "bf16"]),
}
THEN = {  # ranks and options after a checkpoint of 2.0 on text
    "ddp then fsdp": ("ddp", 2, SHARDED),
    "fsdp then one rank": ("fsdp", 1, ["optimization.update_freq=[2]"]),
}


@pytest.fixture(scope="module")
def runs(golden, sample_data, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sharded")
    pictures = root / "pictures"
    for split, count in (("train", 5), ("val", 1)):
        for name in ("flags", "objects", "symbols"):
            (pictures / split / name).mkdir(parents=True)
            for file in sorted((sample_data / "images" / split / name).iterdir())[:count]:
                (pictures / split / name / file.name).symlink_to(file)

    def command(kind: str, output: str, *more: str) -> list[str]:
        config, own = KINDS[kind]
        data = golden / "bin" if "text" in kind else pictures
        every = ["--log_every", "1", "--save_every", "2", "dataset.num_workers=0", f"optimization.max_update={LAST}"]
        return words(TEST, config, data, root / output, *every, *own, *more)

    commands = [
        (2, command(kind, f"{kind}, {name}", *options))
        for kind in KINDS
        for name, options in (("ddp", WHOLE), ("fsdp", SHARDED))
    ]
    for name, (source, ranks, options) in THEN.items():
        (saved,) = [f"--resume={root}/2.0, text, {source}/checkpoints/checkpoint_1_2.pt"]
        commands.append((ranks, command("2.0, text", f"2.0, text, {name}", *options, saved)))
    done = run(Path(train.__file__), ["data2vec.training.sharding", "data2vec.data.multi.images"], *commands)
    assert done.returncode == 0, done.stdout
    return root


def by_step(folder: Path, kind: str) -> dict[int, dict]:
    return {line["step"]: line for line in lines(folder, kind)}


@pytest.mark.parametrize(
    "ours, theirs, first",
    [(f"{kind}, fsdp", f"{kind}, ddp", 1) for kind in KINDS]
    + [(f"2.0, text, {name}", "2.0, text, ddp", 3) for name in THEN],
)
def test_losses_validation_and_checkpoints_are_those_of_whole_ranks(runs, ours, theirs, first):
    close = 1e-2 if "2.0, pictures" in ours else 1e-5  # in bf16 a last bit of a sum may round a weight otherwise
    mine, other = by_step(runs / ours, "train"), by_step(runs / theirs, "train")
    assert list(mine) == list(range(first, LAST + 1)) and list(other) == list(range(1, LAST + 1))
    for step, line in mine.items():
        for key in ("loss", "grad_norm", "lr", "masked_tokens"):
            assert line[key] == pytest.approx(other[step][key], rel=close), (step, key)
    split = "val" if "pictures" in ours else "valid"
    valid = [by_step(runs / folder, split)[LAST]["loss"] for folder in (ours, theirs)]
    assert valid[0] == pytest.approx(valid[1], rel=close)
    compare(last(runs / ours), last(runs / theirs), rtol=10 * close, atol=20 * close)


def compare(ours: dict, theirs: dict, **limits: float) -> None:
    """Student, teacher and moments, whole in both."""
    teacher = next(name for name in theirs["model"] if name.endswith("_ema"))
    for mine, other in (
        (ours["model"], theirs["model"]),
        (ours["model"][teacher], theirs["model"][teacher]),
        *zip(
            ours["last_optimizer_state"]["state"].values(),
            theirs["last_optimizer_state"]["state"].values(),
            strict=True,
        ),
    ):
        assert list(mine) == list(other)
        for name, value in other.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(mine[name], value, **limits, msg=lambda text, name=name: f"{name}: {text}")


def test_where_it_cannot_work(golden, tmp_path, capsys):
    import finetune

    base = ["--config-dir", str(TEST), f"task.data={golden}/bin", "--device", "cpu", "--output_dir", str(tmp_path)]
    for option in (SHARDED, ["distributed_training.ddp_backend=fully_sharded"]):
        with pytest.raises(SystemExit) as stop:
            train.main([*base, "--config-name", "tiny", *option])
        assert stop.value.code == 2 and "shards over ranks: " in capsys.readouterr().err
    tune = ["--config-name", "demo", f"task.data={golden}/questions", *SHARDED]
    tune += [f"task.{key}=x" for key in ("encoder_json", "vocab_bpe", "dict")]
    with pytest.raises(SystemExit) as stop:
        finetune.main(tune)
    assert stop.value.code == 2 and "is for train.py" in capsys.readouterr().err
