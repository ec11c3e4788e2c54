"""BEiT v2 pretraining: predict the visual tokens of masked patches.

python run_beitv2_pretraining.py --data_path DIR --tokenizer_weight FILE --model beit_base_patch16_224_8k_vocab_cls_pt
torchrun --nproc_per_node 8 run_beitv2_pretraining.py ...
"""

from __future__ import annotations

import common.requirements

import argparse
import functools

import torch

from beit2 import device_patches, parameter_groups
from beit2 import pretraining_options as setup
from beit2.compiled_blocks import compile_blocks
from beit2.data.batches import run_batches, steps_per_epoch
from beit2.data.images import collate
from beit2.data.normalizer import Normalizer
from beit2.model.blocks import use_fp8_in_blocks
from beit2.model.flops import pretraining_flops
from beit2.options import mean_and_std, pick_precision, schedules
from beit2.training.checkpoints import append_epoch_log
from beit2.training.identity import run_identity, tensors_digest
from beit2.training.memory_plan import plan_memory
from beit2.training.monitor import Monitor
from beit2.training.parallel import new_replica
from beit2.training.pretraining_loss import token_loss
from beit2.training.run import Run, new_run, replay_step, training_steps
from common import device as devices
from common.distributed import World, process_group
from common.errors import print_usage_errors


@print_usage_errors
def main(argv: list[str] | None = None) -> dict | None:
    options = setup.read_options(argv)
    if options.plan_memory is not None:
        with torch.device("meta"):
            model = setup.build_model(options)
        print(plan_memory(model, options, options.plan_memory))
        return None
    with process_group(options.device) as world:
        return train(options, world)


def train(options: argparse.Namespace, world: World) -> dict:
    precision = pick_precision(options, world.device)
    devices.seed_everything(options.seed)
    with torch.device("meta"):
        model = setup.build_model(options)
    dataset = setup.build_dataset(options, model.window_size)
    tokenizer = setup.load_tokenizer(options, precision, model.window_size).to(world.device)
    device_patches.apply(model, tokenizer, world.device, options.npu_recompute_attention)
    if options.fp8:
        use_fp8_in_blocks(model, world.device, precision)
    if options.compile:
        compile_blocks(model, world.device)

    steps = steps_per_epoch(len(dataset), options.batch_size, world.size, options.update_freq)
    rates, decays = schedules(options, steps)
    replica = new_replica(model, world, options, precision)
    groups = parameter_groups(replica.model, options.weight_decay)
    codes = tensors_digest([tokenizer.quantize.embedding.weight, *tokenizer.encode_task_layer.parameters()])
    kind = f"{precision}{' with fp8' if options.fp8 else ''}"
    identity = run_identity(options, world, kind, dataset.paths, tokenizer=codes)
    run = new_run(options, world, precision, replica, groups, steps, rates, decays, identity=identity)
    run.flops = pretraining_flops(replica.model, tokenizer, options.num_mask_patches)
    normalizer = Normalizer(*mean_and_std(options), world.device)
    monitor = Monitor(options, normalizer, precision) if options.monitor_every else None
    loss_of = functools.partial(token_loss, replica.wrapped, tokenizer, normalizer, precision)

    if options.replay is not None:
        return replay_step(run, dataset, loss_of, collate)
    with run.open_log(len(dataset)) as log:
        batches, means = run_batches(dataset, options, world, steps, run.state.step, run.last, collate), {}
        scores = monitor.report(run, log, None) if monitor and run.source is None else {}
        for done in training_steps(run, log, batches, loss_of):
            if monitor and monitor.is_due(run, done):
                scores = monitor.report(run, log, done)
            if done.epoch_ends or done.run_ends:
                means = run.state.means()
            if done.epoch_ends:
                end_epoch(run, means)
            if done.saves:
                run.save(log, done)
        if monitor and not scores:  # a run that was finished before
            scores = monitor.report(run, log, None)
        accuracy = means.get("mlm_acc", means.get("mlm_acc_1"))
        if accuracy is not None:
            of = "masked tokens told right in training, %"
            scores = scores | {"accuracy": round(100 * accuracy, 3), "AccuracyIs": of}
        return log.finish(**scores)


def end_epoch(run: Run, means: dict) -> None:
    """Writes the epoch's line of log.txt under the reference's keys and begins the next."""
    run.state.begin_epoch()
    if run.world.is_main:
        line = {f"train_{name}": value for name, value in means.items()}
        line |= {"epoch": run.epoch, "n_parameters": run.replica.parameter_count}
        append_epoch_log(run.options.output_dir, line)


if __name__ == "__main__":
    main()
