"""Fine-tunes a pretrained BEiT v2 encoder on image classes.

python run_class_finetuning.py --finetune checkpoint-1599.pth --data_path DIR/train --eval_data_path DIR/val
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from beit2 import finetuning_options as setup
from beit2 import npu_patches
from beit2.image_data import Normalizer, check_images, run_batches, steps_per_epoch
from beit2.optimizers import create_optimizer, lr_range, set_step
from beit2.options import due, pick_precision
from beit2.parallel import data_parallel
from beit2.pretraining_options import mean_and_std, schedules
from beit2.pretraining_step import TrainState, Watch, gradients_stay_local, update
from beit2.training_files import (
    append_epoch_log,
    find_checkpoint,
    load_model,
    load_training_state,
    open_log,
    save_whole,
)
from beit2.weight_files import read_checkpoint
from common import checkpoint_file, distributed
from common import device as devices
from common.apex_options import gradient_scaler
from common.device import mix_seed
from common.distributed import World, process_group
from common.errors import UsageError, print_usage_errors
from common.run_log import RunLog


@print_usage_errors
def main(argv: list[str] | None = None) -> dict:
    options = setup.read_options(argv)
    with process_group(options.device) as world:
        return train(options, world)


def train(options: argparse.Namespace, world: World) -> dict:
    precision = pick_precision(options, world.device)
    devices.seed_everything(options.seed)
    training, test, names = setup.build_datasets(options)
    check_images(training.paths + (test.paths if test else []))
    model = setup.build_model(options, len(names)).to(world.device)
    npu_patches.apply(model, None, world.device)
    average = setup.build_average(options, model)
    mixup = setup.build_mixup(options, len(names))
    criterion = setup.build_criterion(options, mixup)
    normalizer = Normalizer(*mean_and_std(options), world.device)

    steps = steps_per_epoch(len(training), options.batch_size, world.size, options.update_freq)
    rates, decays = schedules(options, steps)
    wrapped = data_parallel(model, world)
    groups = setup.finetuning_groups(model, options)
    optimizer = create_optimizer(options.opt, groups, options.lr, options.opt_eps, options.opt_betas, options.momentum)
    scaler = gradient_scaler(options.amp_backend, model, optimizer, world.device, precision, options.loss_scale)

    path = find_checkpoint(options.resume, options.auto_resume and not options.eval, options.output_dir)
    progress, best = {"step": options.start_epoch * steps}, -1.0  # below any accuracy
    if path is not None:
        restored, best = resume(path, model, average, optimizer, scaler, steps)
        progress |= restored
    state = TrainState(**progress)
    if options.eval:
        return evaluate_only(options, model, test, normalizer, world, path)
    last = min(options.epochs * steps, options.max_steps or options.epochs * steps)

    with open_log(options, world, last, path is not None) as log:
        batches = run_batches(training, options, world, steps, state.step, last)
        watch, results = Watch(), {}
        for step in range(state.step, last):
            with log.data_wait():
                micro_batches = [next(batches) for _ in range(options.update_freq)]
            set_step(optimizer, rates[step], decays[step])
            seed_step(options.seed, step, world.rank)
            scalars = classifier_step(
                wrapped, criterion, mixup, normalizer, optimizer, scaler, precision, options.clip_grad, micro_batches
            )
            if average is not None:
                setup.update_average(average, model, options.model_ema_decay)
            watch.add(scalars, skips_allowed=scaler.is_enabled())
            lr, min_lr = lr_range(optimizer)
            scalars |= {"lr": lr, "min_lr": min_lr, "weight_decay": float(decays[step])}
            state.add(scalars)

            epoch_ends = state.step % steps == 0
            saves = epoch_ends or state.step == last or due(state.step, options.save_every)
            if saves or due(state.step, options.log_every):
                watch.check(state.step)
            samples = options.batch_size * options.update_freq * world.size
            log.step(state.step, samples, epoch=state.step / steps, **scalars)
            if epoch_ends or state.step == last:
                results = end_epoch(options, log, average or model, test, normalizer, world, state, steps)
                if epoch_ends and results.get("acc1", -2.0) > best:
                    best = results["acc1"]
                    save_best(options, world, model, average, state.step // steps - 1, best)
            if saves and options.save_ckpt and options.case_kind == "acc":
                with log.pause("save"):
                    numbered = epoch_ends and due(state.step // steps, options.save_ckpt_freq)
                    extra = {"best_acc1": best} | ({"model_ema": average.state_dict()} if average is not None else {})
                    save_whole(world, options, model, optimizer, scaler, state.plain(), steps, numbered, **extra)
        if test is not None and not results:  # a run that was finished before
            results = evaluate(average or model, test, options, normalizer, world)
        return finish(log, results, best)


def finish(log: RunLog, results: dict[str, float], best: float) -> dict:
    """The result file, with accuracies where there was a test set."""
    if "acc1" not in results:
        return log.finish()
    return log.finish(accuracy=round(results["acc1"], 3), BestAccuracy=round(max(best, results["acc1"]), 3))


def resume(path: Path, model, average, optimizer, scaler, steps: int) -> tuple[dict, float]:
    """Progress and best accuracy of a checkpoint; its weights are restored."""
    progress = load_training_state(path, model, optimizer, scaler, steps)
    checkpoint = read_checkpoint(path)
    if average is not None:
        load_model(average, checkpoint.get("model_ema", checkpoint["model"]), path)
    return progress, float(checkpoint.get("best_acc1", -1.0))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Mixup draws from NumPy's and Python's global generators, dropped paths from torch's."""
    devices.seeded(seed, step, rank)
    np.random.seed(mix_seed(seed, step, rank) % 2**32)
    random.seed(mix_seed(seed, step, rank))


def pictures_on_device(pictures: torch.Tensor, normalizer: Normalizer) -> torch.Tensor:
    """uint8 [B, H, W, 3] is normalised here; timm's augmentation has done it already, fp32 [B, 3, H, W]."""
    if pictures.dtype == torch.uint8:
        return normalizer(normalizer.unit(pictures))
    return pictures.to(normalizer.device, non_blocking=True)


def classifier_step(
    model, criterion, mixup, normalizer: Normalizer, optimizer, scaler, precision: str, clip_grad, batches: list
) -> dict:
    """One update over the micro-batches. Returns the logged scalars, on the device."""
    model.train()
    means: dict = {}
    optimizer.zero_grad(set_to_none=True)
    for number, (pictures, labels) in enumerate(batches, 1):
        images = pictures_on_device(pictures, normalizer)
        labels = labels.to(normalizer.device, non_blocking=True)
        targets = labels
        if mixup is not None:
            images, targets = mixup(images, labels)
        with gradients_stay_local(model, number < len(batches)):
            with devices.autocast(normalizer.device, precision):
                logits = model(images)
            loss = criterion(logits.float(), targets)
            scaler.scale(loss / len(batches)).backward()
        scalars = {"loss": loss.detach()}
        if mixup is None:
            scalars["class_acc"] = (logits.argmax(dim=-1) == labels).float().mean()
        for name, value in scalars.items():
            means[name] = means.get(name, 0.0) + value / len(batches)
    return means | {"grad_norm": update(model, optimizer, scaler, clip_grad), "loss_scale": float(scaler.get_scale())}


@torch.no_grad()
def evaluate(model: nn.Module, test: Dataset, options, normalizer: Normalizer, world: World) -> dict[str, float]:
    """Loss, top-1 and top-5 in percent, every picture of the test set once, over all ranks."""
    share = Subset(test, range(world.rank, len(test), world.size))
    loader = DataLoader(share, int(1.5 * options.batch_size), num_workers=options.num_workers)
    model.eval()
    device = next(model.parameters()).device
    totals = torch.zeros(4, dtype=torch.float64)
    for pictures, labels in loader:
        with devices.autocast(device, pick_precision(options, device)):
            logits = model(pictures_on_device(pictures, normalizer).to(device)).float().cpu()
        hits = logits.topk(min(5, logits.shape[1])).indices == labels.unsqueeze(1)  # [B, 5]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        totals += torch.stack((loss, hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels)))).double()
    loss, top1, top5, count = distributed.all_reduce_sum(totals).tolist()
    return {"loss": loss / count, "acc1": 100 * top1 / count, "acc5": 100 * top5 / count}


def evaluate_only(options, model, test, normalizer, world: World, path: Path | None) -> dict:
    if test is None or path is None:
        raise UsageError("--eval needs --eval_data_path DIR and --resume CHECKPOINT")
    in_its_folder = path.resolve().parent == Path(options.output_dir).resolve()  # which then stays that run's
    with open_log(options, world, 0, in_its_folder) as log:
        results = evaluate(model, test, options, normalizer, world)
        log.record(0, "eval", **results)
        return log.finish(accuracy=round(results["acc1"], 3), loss=results["loss"])


def end_epoch(options, log: RunLog, model, test, normalizer, world: World, state: TrainState, steps: int) -> dict:
    """Evaluates and, at a whole epoch, writes its line of log.txt under the reference's keys."""
    results = {}
    whole = state.step % steps == 0
    wanted = not options.disable_eval_during_finetuning or state.step == options.epochs * steps
    if test is not None and wanted:
        with log.pause("evaluate"):
            results = evaluate(model, test, options, normalizer, world)
        log.record(state.step, "eval", **results)
    if whole:
        means = state.means()
        state.begin_epoch()
        if world.is_main:
            line = {f"train_{k}": v for k, v in means.items()} | {f"test_{k}": v for k, v in results.items()}
            count = sum(p.numel() for p in model.parameters())
            append_epoch_log(options.output_dir, line | {"epoch": state.step // steps - 1, "n_parameters": count})
    return results


def save_best(options, world: World, model, average, epoch: int, best: float) -> None:
    """checkpoint-best.pth: the weights that were evaluated."""
    if world.is_main and options.save_ckpt and options.case_kind == "acc":
        weights = (model if average is None else average).state_dict()
        path = Path(options.output_dir) / "checkpoint-best.pth"
        checkpoint_file.save({"model": weights, "epoch": epoch, "best_acc1": best}, path)


if __name__ == "__main__":
    main()
