"""BEiT v2 pretraining: predict the visual tokens of masked patches.

python run_beitv2_pretraining.py --data_path DIR --tokenizer_weight FILE --model beit_base_patch16_224_8k_vocab_cls_pt
torchrun --nproc_per_node 8 run_beitv2_pretraining.py ...
"""

from __future__ import annotations

import argparse
import functools

import torch

from beit2 import npu_patches, parameter_groups
from beit2 import pretraining_options as setup
from beit2.image_data import Normalizer, collate, run_batches, steps_per_epoch
from beit2.memory_plan import plan_memory
from beit2.optimizers import create_optimizer, lr_range, set_step
from beit2.options import due, pick_precision
from beit2.parallel import Replica
from beit2.pretraining_step import TrainState, Watch, gradient_step
from beit2.training_files import append_epoch_log, find_checkpoint, open_log
from common import device as devices
from common.apex_options import gradient_scaler
from common.distributed import World, process_group
from common.errors import print_usage_errors


@print_usage_errors
def main(argv: list[str] | None = None) -> dict | None:
    options = setup.read_options(argv)
    if options.plan_memory is not None:
        print(plan_memory(options, options.plan_memory))
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
    npu_patches.apply(model, tokenizer, world.device, options.npu_recompute_attention)

    steps = steps_per_epoch(len(dataset), options.batch_size, world.size, options.update_freq)
    rates, decays = setup.schedules(options, steps)
    replica = Replica(model, world, options, precision)
    groups = parameter_groups(replica.model, options.weight_decay)
    optimizer = create_optimizer(options.opt, groups, options.lr, options.opt_eps, options.opt_betas, options.momentum)
    scaler = gradient_scaler(options.amp_backend, model, optimizer, world.device, precision, options.loss_scale)
    sides = (replica.wrapped, tokenizer, Normalizer(*setup.mean_and_std(options), world.device))
    step_once = functools.partial(gradient_step, *sides, optimizer, scaler, precision, options.clip_grad)

    path = find_checkpoint(options.resume, options.auto_resume, options.output_dir, replica.sharded)
    progress = {"step": options.start_epoch * steps}
    if path is not None:
        progress |= replica.load(path, optimizer, scaler, steps)
    state = TrainState(**progress)
    last = min(options.epochs * steps, options.max_steps or options.epochs * steps)

    with open_log(options, world, last, path is not None) as log:
        log.info(f"{options.model}: {replica.parameter_count:,} parameters, {precision} on {world.device.type}")
        batch = f"{options.batch_size} x {options.update_freq} x {world.size} ranks"
        start = f"from step {state.step} ({path or 'new'})"
        log.info(f"{len(dataset)} pictures, {steps} steps an epoch of {batch}; {start}")
        batches = run_batches(dataset, options, world, steps, state.step, last, collate)
        watch, means = Watch(), {}
        for step in range(state.step, last):
            with log.data_wait():
                micro_batches = [next(batches) for _ in range(options.update_freq)]
            set_step(optimizer, rates[step], decays[step])
            devices.seeded(options.seed, step, world.rank)  # dropped paths are a function of the step
            scalars = step_once(micro_batches)
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
                means = state.means()
            if epoch_ends:
                end_epoch(options, state, means, steps, replica.parameter_count, world)
            if saves and options.case_kind == "acc":
                with log.pause("save"):
                    numbered = epoch_ends and due(state.step // steps, options.save_ckpt_freq)
                    replica.save(options, optimizer, scaler, state.plain(), steps, numbered)
        accuracy = means.get("mlm_acc", means.get("mlm_acc_1"))
        return log.finish(accuracy=None if accuracy is None else round(100 * accuracy, 3))


def end_epoch(options, state: TrainState, means: dict, steps: int, parameters: int, world: World) -> None:
    """Writes the epoch's line of log.txt under the reference's keys and begins the next."""
    state.begin_epoch()
    if world.is_main:
        line = {f"train_{name}": value for name, value in means.items()}
        append_epoch_log(options.output_dir, line | {"epoch": state.step // steps - 1, "n_parameters": parameters})


if __name__ == "__main__":
    main()
