"""Linear probe: one linear classifier on every block's features of a frozen, pretrained encoder.

python run_linear_eval.py --pretrained_weights checkpoint-1599.pth --data_path DIR/train --eval_data_path DIR/val
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from beit2 import create_model, npu_patches
from beit2.image_data import Normalizer, check_images, run_batches, steps_per_epoch
from beit2.labelled_data import CentreCrop, CropAndFlip, LabelledImages, find_classes
from beit2.model_names import FINETUNING_MODELS
from beit2.optimizers import create_optimizer, set_step
from beit2.options import (
    add_dead_options,
    add_optimizer_options,
    add_run_options,
    due,
    parse,
    pick_precision,
    truth,
)
from beit2.parallel import data_parallel
from beit2.pretraining_options import mean_and_std
from beit2.pretraining_step import TrainState, Watch, update
from beit2.training_files import append_epoch_log, find_checkpoint, load_training_state, open_log, save_whole
from beit2.vision_transformer import VisionTransformer
from beit2.weight_files import local_file, read_checkpoint, read_state_dict
from common import device as devices
from common import distributed
from common.distributed import World, process_group
from common.errors import UsageError, print_usage_errors


def read_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("run_linear_eval.py", description="linear probe of a BEiT v2 encoder")
    parser.add_argument("--batch_size", "--batch_size_per_gpu", type=int, default=128, help="per device")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--model", default="beit_base_patch16_224")
    parser.add_argument("--pretrained_weights", default="", help="pretraining checkpoint: file or URL")
    parser.add_argument("--checkpoint_key", default="model|module|teacher")
    parser.add_argument("--input_size", type=int, default=224)
    parser.add_argument("--layer_scale_init_value", type=float, default=0.1)
    parser.add_argument("--abs_pos_emb", action="store_true")
    parser.add_argument("--rel_pos_bias", action="store_true", default=True)
    parser.add_argument("--disable_rel_pos_bias", action="store_false", dest="rel_pos_bias")
    parser.add_argument("--data_path", default="", help="class folders of the training set, or train/ and val/ of them")
    parser.add_argument("--eval_data_path", default="", help="class folders of the test set; default: DATA_PATH/val")
    parser.add_argument("--num_labels", type=int, default=0, help="default: as many as the training set has")
    parser.add_argument(
        "--imagenet_default_mean_and_std", type=truth, nargs="?", const=True, default=False,
        help="default: mean and std 0.5",
    )  # fmt: skip
    parser.add_argument("--avgpool_patchtokens", type=truth, default=True, help="features beside CLS; must be True")
    parser.add_argument("--amp_forward", type=truth, default=True, help="False: the encoder in fp32")
    parser.add_argument("--base_lr", type=float, default=0.001, help="times batch / 256, when --lr is 0")
    parser.add_argument("--val_freq", type=int, default=1, help="epochs between two evaluations")
    add_optimizer_options(parser, lr=0.0, weight_decay=1e-4)  # the rate falls to 0 in a cosine, by epoch
    parser.add_argument("--optimizer", dest="opt", default=argparse.SUPPRESS, help="the same as --opt")
    add_run_options(parser)
    add_dead_options(parser, "patch_size")
    parser.set_defaults(update_freq=1)
    options = parse(parser, argv)
    if not options.avgpool_patchtokens:
        raise UsageError("--avgpool_patchtokens False: the probe's features are CLS and the mean patch")
    if options.val_freq < 1:
        raise UsageError(f"--val_freq {options.val_freq}: must be at least 1")
    return options


class LinearProbe(nn.Module):
    """A classifier a block: images -> logits [blocks, B, classes] from cat(CLS, mean patch), the encoder frozen."""

    def __init__(self, encoder: VisionTransformer, classes: int):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(2 * encoder.embed_dim, classes) for _ in encoder.blocks)
        for head in self.heads:
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)

    def forward(self, layers: list[Tensor]) -> Tensor:
        """layers: every block's output [B, 1 + N, C]."""
        features = [torch.cat((x[:, 0], x[:, 1:].mean(dim=1)), dim=-1).float() for x in layers]  # [B, 2 C]
        return torch.stack([head(x) for head, x in zip(self.heads, features, strict=True)])


@print_usage_errors
def main(argv: list[str] | None = None) -> dict:
    options = read_options(argv)
    with process_group(options.device) as world:
        return train(options, world)


def load_encoder(options: argparse.Namespace) -> VisionTransformer:
    """The frozen encoder with the shared bias it was pretrained with.

    Raises:
        UsageError: no weights, or weights of another encoder.
    """
    if options.model not in FINETUNING_MODELS:
        raise UsageError(f"--model {options.model}: unknown. Known: {', '.join(FINETUNING_MODELS)}")
    if not options.pretrained_weights:
        raise UsageError("--pretrained_weights is missing: a pretraining checkpoint")
    encoder = create_model(
        options.model, img_size=options.input_size, num_classes=0, use_rel_pos_bias=False, use_mean_pooling=False,
        use_shared_rel_pos_bias=options.rel_pos_bias, use_abs_pos_emb=options.abs_pos_emb,
        init_values=options.layer_scale_init_value,
    )  # fmt: skip
    path = local_file(options.pretrained_weights)
    state = read_state_dict(path, keys=tuple(options.checkpoint_key.split("|")))
    try:
        missing, _ = encoder.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UsageError(f"{path}: {str(error).splitlines()[-1].strip()}") from error
    if missing:
        raise UsageError(f"{path}: not a checkpoint for --model {options.model}, it has no {missing[0]}")
    return encoder.requires_grad_(False).eval()


def build_datasets(options: argparse.Namespace) -> tuple[LabelledImages, LabelledImages, list[str]]:
    """Training set, test set, class names.

    Raises:
        UsageError: a folder that is missing, or an unreadable picture.
    """
    if not options.data_path:
        raise UsageError("--data_path is missing: a folder with train/ and val/, or the training set's class folders")
    folder, eval_folder = Path(options.data_path), options.eval_data_path
    if not eval_folder:
        folder, eval_folder = folder / "train", folder / "val"
    paths, labels, names = find_classes(folder)
    if options.num_labels not in (0, len(names)):
        raise UsageError(f"--num_labels {options.num_labels}: {folder} has {len(names)} class folders")
    test_paths, test_labels, _ = find_classes(eval_folder, names)
    check_images(paths + test_paths)
    training = LabelledImages(paths, labels, CropAndFlip(options.input_size, 0.08, "bilinear"), options.seed)
    return training, LabelledImages(test_paths, test_labels, CentreCrop(options.input_size)), names


def train(options: argparse.Namespace, world: World) -> dict:
    precision = pick_precision(options, world.device) if options.amp_forward else "fp32"
    devices.seed_everything(options.seed)
    dataset, test, names = build_datasets(options)
    encoder = load_encoder(options).to(world.device)
    npu_patches.apply(encoder, None, world.device)
    probe = LinearProbe(encoder, len(names)).to(world.device)
    wrapped = data_parallel(probe, world)
    normalizer = Normalizer(*mean_and_std(options), world.device)

    steps = steps_per_epoch(len(dataset), options.batch_size, world.size)
    peak = options.lr or options.base_lr * options.batch_size * world.size / 256
    name, decay = ("momentum", 0.0) if options.opt.lower() == "sgd" else (options.opt, options.weight_decay)
    groups = [{"params": list(probe.parameters()), "weight_decay": decay}]
    optimizer = create_optimizer(name, groups, peak, options.opt_eps, options.opt_betas, options.momentum)
    scaler = devices.grad_scaler(world.device, "fp32")  # the probe itself is fp32
    path = find_checkpoint(options.resume, options.auto_resume, options.output_dir)
    progress, best = {"step": options.start_epoch * steps}, 0.0
    if path is not None:
        progress |= load_training_state(path, probe, optimizer, scaler, steps)
        best = float(read_checkpoint(path).get("best_acc1", 0.0))
    state = TrainState(**progress)
    last = min(options.epochs * steps, options.max_steps or options.epochs * steps)

    with open_log(options, world, last, path is not None) as log:
        batches = run_batches(dataset, options, world, steps, state.step, last)
        watch, results = Watch(), {}
        for step in range(state.step, last):
            with log.data_wait():
                pictures, targets = next(batches)
            lr = peak * 0.5 * (1 + math.cos(math.pi * (step // steps) / options.epochs))  # by epoch
            set_step(optimizer, lr, None)
            logits = wrapped(frozen_layers(encoder, normalizer, pictures, precision))  # [blocks, B, classes]
            targets = devices.to_device(targets, world.device)
            loss = sum(F.cross_entropy(layer, targets) for layer in logits)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            scalars = {"loss": loss.detach(), "grad_norm": update(probe, optimizer, scaler, options.clip_grad)}
            watch.add(scalars, skips_allowed=False)
            state.add(scalars | {"lr": lr})
            epoch_ends = state.step % steps == 0
            saves = epoch_ends or state.step == last or due(state.step, options.save_every)
            if saves or due(state.step, options.log_every):
                watch.check(state.step)
            log.step(state.step, options.batch_size * world.size, lr=lr, epoch=state.step / steps, **scalars)
            results = {}
            if state.step == last or (epoch_ends and (state.step // steps - 1) % options.val_freq == 0):
                with log.pause("evaluate"):
                    results = evaluate(encoder, probe, test, options, normalizer, world, precision)
                log.record(state.step, "eval", **results)
            if epoch_ends:
                best = max(best, results.get("acc1", 0.0))
                end_epoch(options, state, results, steps, world)
            if saves and options.case_kind == "acc":
                with log.pause("save"):
                    save_whole(world, options, probe, optimizer, scaler, state.plain(), steps, False, best_acc1=best)
        if not results:
            results = evaluate(encoder, probe, test, options, normalizer, world, precision)
        best = max(best, results["acc1"])  # of a run that was stopped inside an epoch
        return log.finish(accuracy=round(best, 3), **results)


@torch.no_grad()
def frozen_layers(encoder: VisionTransformer, normalizer: Normalizer, pictures: Tensor, precision: str) -> list[Tensor]:
    """Every block's output for uint8 pictures [B, S, S, 3]."""
    with devices.autocast(normalizer.device, precision):
        return encoder.get_intermediate_layers(normalizer(normalizer.unit(pictures)))


def end_epoch(options, state: TrainState, results: dict, steps: int, world: World) -> None:
    means = state.means()
    state.begin_epoch()
    if world.is_main:
        line = {f"train_{k}": v for k, v in means.items()} | {f"test_{k}": v for k, v in results.items()}
        append_epoch_log(options.output_dir, line | {"epoch": state.step // steps - 1})


@torch.no_grad()
def evaluate(encoder, probe, test, options, normalizer, world: World, precision: str) -> dict[str, float]:
    """Top-1 in percent of the best block and of every block, every test picture once over all ranks."""
    share = Subset(test, range(world.rank, len(test), world.size))
    hits = torch.zeros(len(probe.heads) + 1, dtype=torch.float64)
    for pictures, labels in DataLoader(share, options.batch_size, num_workers=options.num_workers):
        logits = probe(frozen_layers(encoder, normalizer, pictures, precision)).cpu()
        hits[:-1] += (logits.argmax(dim=-1) == labels).sum(dim=1)
        hits[-1] += len(labels)
    *correct, count = distributed.all_reduce_sum(hits).tolist()
    accuracies = [100 * value / count for value in correct]
    return {"acc1": max(accuracies)} | {f"acc1_block{i}": round(a, 3) for i, a in enumerate(accuracies, 1)}


if __name__ == "__main__":
    main()
