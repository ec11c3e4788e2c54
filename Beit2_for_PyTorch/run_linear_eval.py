"""Linear probe: one linear classifier on every block's features of a frozen, pretrained encoder.

python run_linear_eval.py --pretrained_weights checkpoint-1599.pth --data_path DIR/train --eval_data_path DIR/val
python run_linear_eval.py --eval --resume checkpoint.pth --eval_data_path DIR/val
"""

from __future__ import annotations

import common.requirements

import argparse
import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from beit2 import device_patches
from beit2 import probe_options as setup
from beit2.data.batches import run_batches, steps_per_epoch
from beit2.data.normalizer import Normalizer
from beit2.model.flops import probe_flops
from beit2.model.vision_transformer import VisionTransformer
from beit2.options import mean_and_std, pick_precision
from beit2.training.checkpoints import HELD_OUT, append_epoch_log, load_model, open_evaluation_log
from beit2.training.identity import run_identity, tensors_digest
from beit2.training.parallel import Replica
from beit2.training.run import Run, due, new_run, replay_step, training_steps
from beit2.training.state import Scalars
from common import device as devices
from common import distributed
from common.distributed import World, process_group
from common.errors import print_usage_errors
from common.run.preemption import stop_if_asked, until_asked


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
    options = setup.read_options(argv)
    with process_group(options.device) as world:
        return evaluate_alone(options, world) if options.eval else train(options, world)


def train(options: argparse.Namespace, world: World) -> dict:
    precision = pick_precision(options, world.device) if options.amp_forward else "fp32"
    devices.seed_everything(options.seed)
    dataset, test, names = setup.build_datasets(options)
    encoder = setup.load_encoder(options).to(world.device)
    device_patches.apply(encoder, None, world.device)
    probe = LinearProbe(encoder, len(names)).to(world.device)
    normalizer = Normalizer(*mean_and_std(options), world.device)

    steps = steps_per_epoch(len(dataset), options.batch_size, world.size)
    options.lr = options.lr or options.base_lr * options.batch_size * world.size / 256
    if options.opt.lower() == "sgd":
        options.opt, options.weight_decay = "momentum", 0.0
    epochs = options.epochs  # the rate falls by epoch
    rates = [options.lr * 0.5 * (1 + math.cos(math.pi * (step // steps) / epochs)) for step in range(epochs * steps)]
    groups = [{"params": list(probe.parameters()), "weight_decay": options.weight_decay}]
    probed = tensors_digest(parameter.flatten()[:1024] for parameter in encoder.parameters())
    identity = run_identity(options, world, precision, dataset.paths, dataset.labels, names, encoder=probed)
    # the probe itself is fp32
    run = new_run(options, world, "fp32", Replica(probe, world), groups, steps, rates, identity=identity)
    run.flops = probe_flops(encoder, len(names))
    best = float(run.kept.get("best_acc1", 0.0))
    loss_of = functools.partial(probe_loss, run.replica.wrapped, encoder, normalizer, precision)

    def kept() -> dict:
        return {"best_acc1": best, "classes": names}

    if options.replay is not None:
        return replay_step(run, dataset, loss_of)
    with run.open_log(len(dataset)) as log:
        batches, results = run_batches(dataset, options, world, steps, run.state.step, run.last), {}
        for done in training_steps(run, log, batches, loss_of):
            results = {}
            if done.run_ends or (done.epoch_ends and due(run.epoch, options.val_freq)):
                with run.evaluating(log, done, kept):
                    results = evaluate(encoder, probe, test, options, normalizer, world, precision)
                log.record(run.state.step, "eval", **results)
            if done.epoch_ends:
                best = max(best, results.get("acc1", 0.0))
                end_epoch(run, results)
            if done.saves:
                run.save(log, done, **kept())
        if not results:
            with run.evaluating(log, None, kept):
                results = evaluate(encoder, probe, test, options, normalizer, world, precision)
        best = max(best, results["acc1"])  # of a run that was stopped inside an epoch
        return log.finish(accuracy=round(best, 3), AccuracyIs=f"{HELD_OUT}, of the best epoch", **results)


def probe_loss(
    model: nn.Module, encoder: VisionTransformer, normalizer: Normalizer, precision: str, batch: tuple[Tensor, Tensor]
) -> tuple[Tensor, Scalars]:
    """The sum of all blocks' classifiers' cross-entropies, for pictures uint8 [B, S, S, 3] and classes int64 [B]."""
    logits = model(frozen_layers(encoder, normalizer, batch[0], precision))  # [blocks, B, classes]
    targets = devices.to_device(batch[1], normalizer.device)
    loss = sum(F.cross_entropy(layer, targets) for layer in logits)
    return loss, {"loss": loss.detach()}


@torch.no_grad()
def frozen_layers(encoder: VisionTransformer, normalizer: Normalizer, pictures: Tensor, precision: str) -> list[Tensor]:
    """Every block's output for uint8 pictures [B, S, S, 3]."""
    with devices.autocast(normalizer.device, precision):
        return encoder.get_intermediate_layers(normalizer(normalizer.unit(pictures)))


def end_epoch(run: Run, results: dict) -> None:
    """Writes the epoch's line of log.txt and begins the next."""
    means = run.state.means()
    run.state.begin_epoch()
    if run.world.is_main:
        line = {f"train_{k}": v for k, v in means.items()} | {f"test_{k}": v for k, v in results.items()}
        append_epoch_log(run.options.output_dir, line | {"epoch": run.epoch})


def evaluate_alone(options: argparse.Namespace, world: World) -> dict:
    """`--eval`: the accuracies of a probe's checkpoint, and nothing of its training."""
    path, checkpoint = setup.checkpoint_to_evaluate(options)
    test, names = setup.build_test_set(options, checkpoint.get("classes"))
    encoder = setup.load_encoder(options).to(world.device)
    device_patches.apply(encoder, None, world.device)
    probe = LinearProbe(encoder, len(names))
    load_model(probe, checkpoint.get("model", checkpoint), path)
    probe = probe.to(world.device)
    normalizer = Normalizer(*mean_and_std(options), world.device)
    precision = pick_precision(options, world.device) if options.amp_forward else "fp32"
    with open_evaluation_log(options, world) as log:
        results = evaluate(encoder, probe, test, options, normalizer, world, precision)
        log.record(0, "eval", **results)
        return log.finish(accuracy=round(results["acc1"], 3), AccuracyIs=HELD_OUT, **results)


@torch.no_grad()
def evaluate(encoder, probe, test, options, normalizer, world: World, precision: str) -> dict[str, float]:
    """Top-1 in percent of the best block and of every block, every test picture once over all ranks."""
    share = Subset(test, range(world.rank, len(test), world.size))
    hits = torch.zeros(len(probe.heads) + 1, dtype=torch.float64)
    for pictures, labels in until_asked(DataLoader(share, options.batch_size, num_workers=options.num_workers)):
        logits = probe(frozen_layers(encoder, normalizer, pictures, precision)).cpu()
        hits[:-1] += (logits.argmax(dim=-1) == labels).sum(dim=1)
        hits[-1] += len(labels)
    stop_if_asked()
    *correct, count = distributed.all_reduce_sum(hits).tolist()
    accuracies = [100 * value / count for value in correct]
    return {"acc1": max(accuracies)} | {f"acc1_block{i}": round(a, 3) for i, a in enumerate(accuracies, 1)}


if __name__ == "__main__":
    main()
