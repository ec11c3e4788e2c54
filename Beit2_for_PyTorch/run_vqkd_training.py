"""VQ-KD training: learn the visual tokens from a frozen teacher's patch features.

python run_vqkd_training.py --data_path DIR/train --eval_data_path DIR/val --teacher_weight FILE [--model NAME ...]
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.data import DataLoader, Subset

from beit2 import npu_patches, parameter_groups
from beit2.image_data import Normalizer, check_images, find_images, run_batches, steps_per_epoch
from beit2.labelled_data import CentreCrop, CropAndFlip, LabelledImages
from beit2.optimizers import create_optimizer, lr_range, set_step
from beit2.options import due, pick_precision, schedule
from beit2.parallel import data_parallel
from beit2.pretraining_step import TrainState, Watch, gradients_stay_local, update
from beit2.tokenizer import VQKD
from beit2.tokenizer_options import build_tokenizer, read_options
from beit2.training_files import append_epoch_log, find_checkpoint, load_training_state, open_log, save_whole
from common import device as devices
from common import distributed
from common.apex_options import gradient_scaler
from common.distributed import World, process_group
from common.errors import UsageError, print_usage_errors
from common.run_log import RunLog

HALF = (0.5, 0.5, 0.5)


@print_usage_errors
def main(argv: list[str] | None = None) -> dict:
    options = read_options(argv)
    with process_group(options.device) as world:
        return train(options, world)


def build_datasets(options: argparse.Namespace) -> tuple[LabelledImages, LabelledImages | None]:
    """Training pictures and those of the evaluation, None without one; their class numbers mean nothing.

    Raises:
        UsageError: a folder that is missing or an unreadable picture.
    """
    paths = find_images(options.data_path)
    check_images(paths)
    crop = CropAndFlip(options.input_size, options.min_crop_scale, options.train_interpolation, options.color_jitter)
    training = LabelledImages(paths, [0] * len(paths), crop, options.seed)
    only_evaluates = options.eval or options.calculate_codebook_usage
    if not only_evaluates and (options.disable_eval or not options.eval_data_path):
        return training, None
    if options.eval_data_path:
        paths = find_images(options.eval_data_path, "--eval_data_path")
        check_images(paths)
    return training, LabelledImages(
        paths, [0] * len(paths), CentreCrop(options.input_size, None, options.train_interpolation)
    )


def train(options: argparse.Namespace, world: World) -> dict:
    precision = pick_precision(options, world.device)
    devices.seed_everything(options.seed)
    dataset, test = build_datasets(options)
    tokenizer = build_tokenizer(options).to(world.device)
    npu_patches.apply(tokenizer, tokenizer, world.device)

    steps = steps_per_epoch(len(dataset), options.batch_size, world.size, options.update_freq)
    samples = options.batch_size * options.update_freq * world.size
    options.lr *= samples / 128  # linear scaling, as in the reference
    rates = schedule(options, steps)
    wrapped = data_parallel(tokenizer, world)
    groups = parameter_groups(tokenizer, options.weight_decay)
    optimizer = create_optimizer(options.opt, groups, options.lr, options.opt_eps, options.opt_betas, options.momentum)
    scaler = gradient_scaler(options.amp_backend, tokenizer, optimizer, world.device, precision, options.loss_scale)

    path = find_checkpoint(options.resume, options.auto_resume, options.output_dir)
    progress = {"step": options.start_epoch * steps}
    if path is not None:
        progress |= load_training_state(path, tokenizer, optimizer, scaler, steps)
    state = TrainState(**progress)
    last = min(options.epochs * steps, options.max_steps or options.epochs * steps)
    if options.eval or options.calculate_codebook_usage:
        if path is None:
            raise UsageError("--eval and --calculate_codebook_usage need --resume FILE")
        last = state.step

    with open_log(options, world, last, path is not None) as log:
        batches = run_batches(dataset, options, world, steps, state.step, last)
        watch, results, normalizer = Watch(), {}, Normalizer(HALF, HALF, world.device)
        for step in range(state.step, last):
            with log.data_wait():
                micro_batches = [next(batches)[0] for _ in range(options.update_freq)]
            if step % steps == 0:
                tokenizer.quantize.reset_usage()
            set_step(optimizer, rates[step], None)
            devices.seeded(options.seed, step, world.rank)
            scalars = tokenizer_step(
                wrapped, normalizer, optimizer, scaler, precision, options.clip_grad, micro_batches
            )
            watch.add(scalars, skips_allowed=scaler.is_enabled())
            lr, min_lr = lr_range(optimizer)
            state.add(scalars | {"lr": lr, "min_lr": min_lr, "weight_decay": options.weight_decay})

            epoch_ends = state.step % steps == 0
            saves = epoch_ends or state.step == last or due(state.step, options.save_every)
            if saves or due(state.step, options.log_every):
                watch.check(state.step)
            log.step(state.step, samples, lr=lr, epoch=state.step / steps, **scalars)
            if epoch_ends:
                results = end_epoch(options, log, tokenizer, test, state, world, steps)
            if saves and options.case_kind == "acc":
                with log.pause("save"):
                    numbered = epoch_ends and due(state.step // steps, options.save_ckpt_freq)
                    save_whole(world, options, tokenizer, optimizer, scaler, state.plain(), steps, numbered)
        if not results and test is not None:
            results = evaluate(options, tokenizer, test, world)
            log.record(state.step, "eval", **results)
        # the mean cosine similarity of reconstruction and teacher, in percent
        similarity = 100 * (1 - results["rec_loss"]) if "rec_loss" in results else None
        return log.finish(accuracy=None if similarity is None else round(similarity, 3), **results)


def tokenizer_step(
    model, normalizer: Normalizer, optimizer, scaler, precision, clip_grad, batches: list[torch.Tensor]
) -> dict:
    """One update over the micro-batches, uint8 [B, H, W, 3] each. Returns the logged scalars, on the device."""
    model.train()
    means: dict = {}
    optimizer.zero_grad(set_to_none=True)
    for number, pictures in enumerate(batches, 1):
        with gradients_stay_local(model, number < len(batches)):
            with devices.autocast(normalizer.device, precision):
                loss, logs = model(normalizer.unit(pictures), unit_range=True)
            scaler.scale(loss / len(batches)).backward()
        for name, value in logs.items():
            means[name] = means.get(name, 0.0) + value / len(batches)
    means["loss"] = means.pop("total_loss")
    return means | {"grad_norm": update(model, optimizer, scaler, clip_grad)}


def end_epoch(options, log: RunLog, tokenizer: VQKD, test, state: TrainState, world: World, steps: int) -> dict:
    """Counts the unused codes, evaluates, writes the epoch's line of log.txt. Returns the evaluation's results."""
    means = state.means() | {"Unused_code": tokenizer.quantize.unused_codes()}
    state.begin_epoch()
    with log.pause("evaluate"):
        results = evaluate(options, tokenizer, test, world)
    line = {f"train_{name}": value for name, value in means.items()}
    line |= {f"test_{name}": value for name, value in results.items()}
    line["train_total_loss"] = line["train_loss"]  # the reference logs the sum under both names
    if results:
        line["test_loss"] = line["test_total_loss"]
    log.record(state.step, "eval", **results, train_unused_codes=means["Unused_code"])
    if world.is_main:
        parameters = sum(p.numel() for p in tokenizer.parameters() if p.requires_grad)
        append_epoch_log(options.output_dir, line | {"epoch": state.step // steps - 1, "n_parameters": parameters})
    return results


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
    for pictures, _ in loader:
        _, logs = tokenizer(normalizer.unit(pictures), unit_range=True)
        values = [float(value) for value in logs.values()]
        totals += len(pictures) * torch.tensor([*values, 1.0], dtype=torch.float64)
    totals = distributed.all_reduce_sum(totals)
    results = dict(zip(("quant_loss", "rec_loss", "total_loss"), (totals[:3] / totals[3]).tolist(), strict=True))
    results["unused_code"] = quantize.unused_codes()
    quantize.cluster_size.copy_(counted)
    return results


if __name__ == "__main__":
    main()
