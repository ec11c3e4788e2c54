"""VQ-KD training: learn the visual tokens from a frozen teacher's patch features.

python run_vqkd_training.py --data_path DIR/train --eval_data_path DIR/val --teacher_weight FILE [--model NAME ...]
python run_vqkd_training.py --eval --resume checkpoint.pth --eval_data_path DIR/val
"""

from __future__ import annotations

import common.requirements

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from beit2 import device_patches, parameter_groups
from beit2 import tokenizer_options as setup
from beit2.codebook_figure import draw_codebook_use
from beit2.compiled_blocks import compile_blocks
from beit2.data.batches import run_batches, steps_per_epoch
from beit2.data.labelled import LabelledImages
from beit2.data.normalizer import Normalizer
from beit2.model.flops import tokenizer_flops
from beit2.model.tokenizer import VQKD
from beit2.options import pick_precision, schedule
from beit2.training.checkpoints import append_epoch_log, load_model, open_evaluation_log
from beit2.training.identity import run_identity, tensors_digest
from beit2.training.parallel import Replica
from beit2.training.run import Done, Run, new_run, replay_step, training_steps
from beit2.training.state import Scalars
from common import device as devices
from common import distributed
from common.distributed import World, process_group
from common.errors import print_usage_errors
from common.run.preemption import stop_if_asked, until_asked
from common.run_log import RunLog

HALF = (0.5, 0.5, 0.5)


@print_usage_errors
def main(argv: list[str] | None = None) -> dict:
    options = setup.read_options(argv)
    with process_group(options.device) as world:
        only_evaluates = options.eval or options.calculate_codebook_usage
        return evaluate_alone(options, world) if only_evaluates else train(options, world)


def train(options: argparse.Namespace, world: World) -> dict:
    precision = pick_precision(options, world.device)
    devices.seed_everything(options.seed)
    dataset, test = setup.build_training_set(options), setup.build_test_set(options)
    teacher = setup.find_teacher(options)
    tokenizer = setup.build_tokenizer(options, teacher).to(world.device)
    device_patches.apply(tokenizer, None, world.device)
    if options.compile:
        compile_blocks(tokenizer, world.device)

    steps = steps_per_epoch(len(dataset), options.batch_size, world.size, options.update_freq)
    options.lr *= options.batch_size * options.update_freq * world.size / 128  # linear scaling, as in the reference
    replica, groups = Replica(tokenizer, world), parameter_groups(tokenizer, options.weight_decay)
    taught_by = tensors_digest(parameter.flatten()[:1024] for parameter in teacher.parameters())
    identity = run_identity(options, world, precision, dataset.paths, teacher=taught_by)
    run = new_run(options, world, precision, replica, groups, steps, schedule(options, steps), identity=identity)
    run.flops = tokenizer_flops(tokenizer)
    normalizer = Normalizer(HALF, HALF, world.device)
    loss_of = functools.partial(distillation_loss, replica.wrapped, normalizer, precision)

    def kept() -> dict:
        return {"teacher": teacher.config}

    if options.replay is not None:
        return replay_step(run, dataset, loss_of)
    with run.open_log(len(dataset)) as log:
        if run.state.step % steps == 0 and "unfinished" not in run.kept:
            begin_epoch(run, log, tokenizer)
        batches, results = run_batches(dataset, options, world, steps, run.state.step, run.last), {}
        for done in training_steps(run, log, batches, loss_of):
            if done.epoch_ends:
                results = end_epoch(run, log, done, tokenizer, test, kept)
            if done.saves:
                run.save(log, done, **kept())
            if done.epoch_ends:
                begin_epoch(run, log, tokenizer)
        if not results and test is not None:
            with run.evaluating(log, None, kept):
                results = evaluate(options, tokenizer, test, world)
            log.record(run.state.step, "eval", **results)
        draw_codebook_use(Path(options.output_dir), tokenizer.n_code, steps, world)
        return finish(log, results)


def begin_epoch(run: Run, log: RunLog, tokenizer: VQKD) -> None:
    """Counts the codes' use anew; with --revive_dead_codes those that the epoch before did not use come back."""
    if run.options.revive_dead_codes and 0 < run.state.step < run.last:
        count = tokenizer.quantize.revive_unused()
        log.info(f"{count} of {tokenizer.n_code} codes were not used in this epoch: they begin anew in the next batch")
    tokenizer.quantize.reset_usage()


def finish(log: RunLog, results: dict[str, float], loss: float | None = None) -> dict:
    """The result file; its accuracy is the mean cosine similarity of reconstruction and teacher, in percent."""
    known: dict = dict(results)
    if "rec_loss" in results:
        known["accuracy"] = round(100 * (1 - results["rec_loss"]), 3)
        known["AccuracyIs"] = "cosine of rebuilt and teacher's features, held-out pictures, %"
    return log.finish(loss=loss, **known)


def distillation_loss(
    model: nn.Module, normalizer: Normalizer, precision: str, batch: tuple[Tensor, Tensor]
) -> tuple[Tensor, Scalars]:
    """The loss of a micro-batch, uint8 [B, H, W, 3] (and class numbers that mean nothing), and what is logged."""
    with devices.autocast(normalizer.device, precision):
        loss, scalars = model(normalizer.unit(batch[0]), unit_range=True)
    scalars["loss"] = scalars.pop("total_loss")
    return loss, scalars


def end_epoch(
    run: Run, log: RunLog, done: Done, tokenizer: VQKD, test: LabelledImages | None, kept: Callable[[], dict]
) -> dict:
    """Counts the unused codes, evaluates, writes the epoch's line of log.txt. Returns the evaluation's results."""
    with run.evaluating(log, done, kept):
        results = evaluate(run.options, tokenizer, test, run.world)
    means = run.state.means() | {"Unused_code": tokenizer.quantize.unused_codes()}
    run.state.begin_epoch()
    line = {f"train_{name}": value for name, value in means.items()}
    line |= {f"test_{name}": value for name, value in results.items()}
    line["train_total_loss"] = line["train_loss"]  # the reference logs the sum under both names
    if results:
        line["test_loss"] = line["test_total_loss"]
    perplexity = tokenizer.quantize.perplexity()
    log.record(run.state.step, "eval", **results, train_unused_codes=means["Unused_code"], train_perplexity=perplexity)
    if run.world.is_main:
        line |= {"epoch": run.epoch, "n_parameters": run.replica.parameter_count}
        append_epoch_log(run.options.output_dir, line)
    return results


def evaluate_alone(options: argparse.Namespace, world: World) -> dict:
    """`--eval`, `--calculate_codebook_usage`: a checkpoint on the evaluation's pictures alone."""
    path, checkpoint = setup.checkpoint_to_evaluate(options)
    test = setup.build_test_set(options)
    tokenizer = setup.build_tokenizer(options, setup.find_teacher(options, checkpoint, path))
    load_model(tokenizer, checkpoint.get("model", checkpoint), path)
    tokenizer = tokenizer.to(world.device)
    device_patches.apply(tokenizer, None, world.device)
    with open_evaluation_log(options, world) as log:
        results = evaluate(options, tokenizer, test, world)
        log.record(0, "eval", **results)
        return finish(log, results, results["total_loss"])


@torch.no_grad()
def evaluate(
    options: argparse.Namespace, tokenizer: VQKD, test: LabelledImages | None, world: World
) -> dict[str, float]:
    """Losses and unused codes over the evaluation pictures, in fp32; nothing when there are none.

    Every rank takes its share, each picture once. The codebook does not move, and the training's count of used codes
    is put back.
    """
    if test is None:
        return {}
    share = Subset(test, range(world.rank, len(test), world.size))
    loader = DataLoader(share, options.batch_size, num_workers=options.num_workers)
    normalizer, quantize = Normalizer(HALF, HALF, world.device), tokenizer.quantize
    counted = quantize.cluster_size.clone()
    quantize.reset_usage()
    tokenizer.eval()
    totals = torch.zeros(4, dtype=torch.float64)
    for pictures, _ in until_asked(loader):
        _, logs = tokenizer(normalizer.unit(pictures), unit_range=True)
        values = [float(value) for value in logs.values()]
        totals += len(pictures) * torch.tensor([*values, 1.0], dtype=torch.float64)
    unused = quantize.unused_codes()
    quantize.cluster_size.copy_(counted)
    stop_if_asked()
    totals = distributed.all_reduce_sum(totals)
    results = dict(zip(("quant_loss", "rec_loss", "total_loss"), (totals[:3] / totals[3]).tolist(), strict=True))
    results["unused_code"] = unused
    return results


if __name__ == "__main__":
    main()
