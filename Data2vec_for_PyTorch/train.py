"""data2vec pretraining, on a binarized corpus or on pictures.

    python train.py --config-dir configs/text/pretraining --config-name base task.data=DIR \
        distributed_training.distributed_world_size=1 optimization.max_update=1000

    python train.py --config-dir configs/vision/pretraining --config-name base_imagenet task.data=DIR

Options are those of fairseq-hydra-train: a YAML file and dotted overrides. The run goes on from
`checkpoint.restore_file` (checkpoint_last.pt) when there is one.
"""

from __future__ import annotations

import common.requirements

import time
from pathlib import Path

from omegaconf import DictConfig

from common import device as devices
from common import distributed
from common.checkpoint_file import CheckpointError, load
from common.errors import UsageError, print_usage_errors
from data2vec import device_patches
from data2vec.command_line import choose_precision, is_sharded, parse, start_ranks
from data2vec.data.epochs import SplitBatches
from data2vec.modality import build, forward_of, fps_unit, is_vision, load_checkpoint, open_data
from data2vec.training.loop import Training, begin, open_log, replay_update, train, update_limit
from data2vec.training.report import Report
from data2vec.training.resume import go_on_or_begin
from data2vec.training.update import Run, TrainState, make_state, validate
from data2vec.weights.huggingface import load_huggingface
from data2vec.weights.vision_weights import load_huggingface_vision

NETWORK = "Data2vec_for_PyTorch"


@print_usage_errors
def main(argv: list[str] | None = None) -> None:
    options, config, notes = parse(argv, __doc__.splitlines()[0])
    start_ranks(config, options.device)
    with distributed.process_group(options.device) as world:
        sharded = is_sharded(config) and not options.replay  # one update again: whole, as the checkpoint is
        if sharded and not distributed.is_distributed():
            raise UsageError(
                "--parallel fsdp (distributed_training.ddp_backend=fully_sharded) shards over ranks: "
                "distributed_training.distributed_world_size=8, or start with torchrun"
            )
        precision, note = choose_precision(options, config, world.device)
        devices.seed_everything(config.common.seed)
        notes += [note, *device_patches.apply_to_config(config, world.device, options.compile)]
        data = open_data(config, world.rank, world.size)
        data.open_splits()
        model = build(config, data)
        if not sharded:
            model.to(world.device)
        device_patches.apply_to_model(model, world.device, options.compile)
        state = make_state(model, config, precision, world)
        save_dir, goes_on, resumed = go_on_or_begin(state, config, data, precision, world, options)
        notes += [resumed or weights_to_begin_with(state, config, data), *data.notes]
        if options.replay:
            run = Run(config, world, precision, forward_of(config, data, world.device), state)
            return replay_update(NETWORK, run, data, options, notes)
        if sharded:
            from data2vec.training.sharding import shard  # half a second to import

            shard(state, world)
        with open_log(NETWORK, options, config, world, fps_unit(config), goes_on, precision) as log:
            begin(log, save_dir, notes)
            report = Report(log, config, state)
            forward = forward_of(config, data, world.device)
            limit = update_limit(config, options)
            run = Training(config, world, precision, forward, state, data, report, save_dir, limit, validation_loss)
            run.compiles, run.filler = options.compile, data.any_training_batch
            train(run)
            report.finish(state)


def weights_to_begin_with(state: TrainState, config: DictConfig, data: SplitBatches) -> str | None:
    """Loads checkpoint.finetune_from_model, if it is given; returns what happened, in words."""
    if not config.checkpoint.finetune_from_model:
        return None
    weights = Path(config.checkpoint.finetune_from_model)
    load_folder = load_huggingface_vision if is_vision(config) else load_huggingface
    try:
        saved = load_folder(weights) if weights.is_dir() else load(weights)
    except CheckpointError as error:
        raise UsageError(str(error)) from None
    words = load_checkpoint(state.model, saved, weights, config, data)
    return f"weights of {weights}{words and ': '}{words}"


def validation_loss(run: Training, epoch: int, name: str) -> float | None:
    """Of a split; None where the run was asked to stop meanwhile."""
    with run.report.log.pause("validate"):
        began = time.perf_counter()
        sums = validate(run, run.data.valid_batches(name).loader(run.config.dataset.num_workers))
    return None if sums is None else run.report.validation(run.state, epoch, name, sums, began)


if __name__ == "__main__":
    main()
