"""Fine-tunes a pretrained BEiT v2 encoder on image classes.

python run_class_finetuning.py --finetune checkpoint-1599.pth --data_path DIR/train --eval_data_path DIR/val
python run_class_finetuning.py --eval --resume checkpoint-best.pth --eval_data_path DIR/val
"""

from __future__ import annotations

import common.requirements

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from beit2 import device_patches
from beit2 import finetuning_options as setup
from beit2.compiled_blocks import compile_blocks
from beit2.data.batches import run_batches, steps_per_epoch
from beit2.data.normalizer import Normalizer
from beit2.data.reading import check_images
from beit2.model.flops import classification_flops
from beit2.options import mean_and_std, pick_precision, schedules
from beit2.training.checkpoints import HELD_OUT, append_epoch_log, load_model, open_evaluation_log, plain_options
from beit2.training.identity import run_identity
from beit2.training.parallel import Replica
from beit2.training.run import Done, Run, new_run, replay_step, training_steps
from beit2.training.state import Scalars
from common import checkpoint_file, distributed
from common import device as devices
from common.distributed import World, process_group
from common.errors import print_usage_errors
from common.run.preemption import stop_if_asked, until_asked
from common.run_log import RunLog


@print_usage_errors
def main(argv: list[str] | None = None) -> dict:
    options = setup.read_options(argv)
    with process_group(options.device) as world:
        return evaluate_alone(options, world) if options.eval else train(options, world)


def train(options: argparse.Namespace, world: World) -> dict:
    precision = pick_precision(options, world.device)
    devices.seed_everything(options.seed)
    training, test, names = setup.build_datasets(options)
    check_images(training.paths, () if test is None else test.paths)
    model = setup.build_model(options, len(names)).to(world.device)
    device_patches.apply(model, None, world.device)
    average = setup.build_average(options, model)
    if options.compile:
        compile_blocks(model, world.device)
    mixup = setup.build_mixup(options, len(names))
    criterion = setup.build_criterion(options, mixup)
    normalizer = Normalizer(*mean_and_std(options), world.device)

    steps = steps_per_epoch(len(training), options.batch_size, world.size, options.update_freq)
    rates, decays = schedules(options, steps)
    replica, groups = Replica(model, world), setup.finetuning_groups(model, options)
    follow = functools.partial(setup.update_average, average, model, options.model_ema_decay) if average else None
    identity = run_identity(options, world, precision, training.paths, training.labels, names)
    run = new_run(options, world, precision, replica, groups, steps, rates, decays, after=follow, identity=identity)
    run.flops = classification_flops(model, len(names))
    if average is not None and run.source is not None:
        load_model(average, run.kept.get("model_ema", model.state_dict()), run.source)
    best = float(run.kept.get("best_acc1", -1.0))  # below any accuracy

    def kept() -> dict:
        averaged = {} if average is None else {"model_ema": average.state_dict()}
        return {"best_acc1": best, "classes": names, **averaged}

    loss_of = functools.partial(classification_loss, replica.wrapped, criterion, mixup, normalizer, precision)

    if options.replay is not None:
        return replay_step(run, training, loss_of)
    with run.open_log(len(training)) as log:
        batches, results = run_batches(training, options, world, steps, run.state.step, run.last), {}
        for done in training_steps(run, log, batches, loss_of):
            if done.epoch_ends or done.run_ends:
                results = end_epoch(run, log, done, average or model, test, normalizer, kept)
            if done.epoch_ends and results.get("acc1", -2.0) > best:
                best = results["acc1"]
                save_best(run, log, average or model, names, best)
            if done.saves and options.save_ckpt:
                run.save(log, done, **kept())
        if test is not None and not results:  # a run that was finished before
            with run.evaluating(log, None, kept):
                results = evaluate(average or model, test, options, normalizer, world)
        return finish(log, results, best)


def finish(log: RunLog, results: dict[str, float], best: float) -> dict:
    """The result file, with accuracies where there was a test set."""
    if "acc1" not in results:
        return log.finish()
    best = round(max(best, results["acc1"]), 3)
    return log.finish(accuracy=round(results["acc1"], 3), AccuracyIs=HELD_OUT, BestAccuracy=best)


def pictures_on_device(pictures: Tensor, normalizer: Normalizer) -> Tensor:
    """uint8 [B, H, W, 3] is normalised here; timm's augmentation has done it already, fp32 [B, 3, H, W]."""
    if pictures.dtype == torch.uint8:
        return normalizer(normalizer.unit(pictures))
    return pictures.to(normalizer.device, non_blocking=True)


def classification_loss(
    model: nn.Module,
    criterion: nn.Module,
    mixup: Callable | None,
    normalizer: Normalizer,
    precision: str,
    batch: tuple[Tensor, Tensor],
) -> tuple[Tensor, Scalars]:
    """The loss of a micro-batch of pictures and class numbers int64 [B], and what is logged."""
    images = pictures_on_device(batch[0], normalizer)
    labels = batch[1].to(normalizer.device, non_blocking=True)
    targets = labels
    if mixup is not None:
        images, targets = mixup(images, labels)  # targets [B, classes]
    with devices.autocast(normalizer.device, precision):
        logits = model(images)  # [B, classes]
    loss = criterion(logits.float(), targets)
    scalars: Scalars = {"loss": loss.detach()}
    if mixup is None:
        scalars["class_acc"] = (logits.argmax(dim=-1) == labels).float().mean()
    return loss, scalars


@torch.no_grad()
def evaluate(model: nn.Module, test: Dataset, options, normalizer: Normalizer, world: World) -> dict[str, float]:
    """Loss, top-1 and top-5 in percent, every picture of the test set once, over all ranks."""
    share = Subset(test, range(world.rank, len(test), world.size))
    loader = DataLoader(share, int(1.5 * options.batch_size), num_workers=options.num_workers)
    model.eval()
    device = next(model.parameters()).device
    totals = torch.zeros(4, dtype=torch.float64)
    for pictures, labels in until_asked(loader):
        with devices.autocast(device, pick_precision(options, device)):
            logits = model(pictures_on_device(pictures, normalizer).to(device)).float().cpu()
        hits = logits.topk(min(5, logits.shape[1])).indices == labels.unsqueeze(1)  # [B, 5]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        totals += torch.stack((loss, hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels)))).double()
    stop_if_asked()
    loss, top1, top5, count = distributed.all_reduce_sum(totals).tolist()
    return {"loss": loss / count, "acc1": 100 * top1 / count, "acc5": 100 * top5 / count}


def evaluate_alone(options: argparse.Namespace, world: World) -> dict:
    """`--eval`: the accuracy of a checkpoint, of which nothing but its weights and what shapes its model is read."""
    path, checkpoint = setup.checkpoint_to_evaluate(options)
    state = setup.weights_to_evaluate(options, checkpoint, path)
    test, names = setup.build_test_set(options, checkpoint.get("classes"), len(state["head.weight"]))
    check_images(test.paths)
    model = setup.build_model(options, len(names))
    load_model(model, state, path)
    model = model.to(world.device)
    device_patches.apply(model, None, world.device)
    normalizer = Normalizer(*mean_and_std(options), world.device)
    with open_evaluation_log(options, world) as log:
        which = "the weight average" if options.model_ema else "the weights"
        log.info(f"{which} of {path} on {len(test)} pictures of {len(names)} classes")
        results = evaluate(model, test, options, normalizer, world)
        log.record(0, "eval", **results)
        return log.finish(accuracy=round(results["acc1"], 3), loss=results["loss"], AccuracyIs=HELD_OUT)


def end_epoch(
    run: Run,
    log: RunLog,
    done: Done,
    model: nn.Module,
    test: Dataset | None,
    normalizer: Normalizer,
    kept: Callable[[], dict],
) -> dict[str, float]:
    """Evaluates and, at a whole epoch, writes its line of log.txt under the reference's keys."""
    options, state, results = run.options, run.state, {}
    wanted = not options.disable_eval_during_finetuning or state.step == options.epochs * run.steps
    if test is not None and wanted:
        with run.evaluating(log, done if options.save_ckpt else None, kept):
            results = evaluate(model, test, options, normalizer, run.world)
        log.record(state.step, "eval", **results)
    if done.epoch_ends:
        means = state.means()
        state.begin_epoch()
        if run.world.is_main:
            line = {f"train_{k}": v for k, v in means.items()} | {f"test_{k}": v for k, v in results.items()}
            count = sum(p.numel() for p in model.parameters())
            append_epoch_log(options.output_dir, line | {"epoch": run.epoch, "n_parameters": count})
    return results


def save_best(run: Run, log: RunLog, model: nn.Module, names: list[str], best: float) -> None:
    """checkpoint-best.pth: the weights that were evaluated, which are the average's where there is one."""
    options = run.options
    if run.world.is_main and options.save_ckpt and options.case_kind == "acc":
        content = {"model": model.state_dict(), "averaged": options.model_ema, "epoch": run.epoch, "best_acc1": best}
        content |= {"classes": names, "args": plain_options(options)}
        path = Path(options.output_dir) / "checkpoint-best.pth"
        log.writer.submit(content, lambda kept: checkpoint_file.save(kept, path))


if __name__ == "__main__":
    main()
