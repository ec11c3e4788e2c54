"""Loss of a checkpoint on a split: the pretraining loss, as fairseq's hydra_validate prints it.

    python validate.py --config-dir configs/text/pretraining --config-name base task.data=DIR \
        common_eval.path=checkpoint_best.pt dataset.valid_subset=valid
"""

from __future__ import annotations

import common.requirements

import time

from common import distributed
from common.errors import print_usage_errors
from common.run_log import RunLog
from data2vec import device_patches, npu_patches
from data2vec.command_line import choose_precision, parse_evaluation, start_ranks
from data2vec.modality import build, forward_of, load_checkpoint, open_data
from data2vec.training.report import Report
from data2vec.training.update import Run, make_state, validate


@print_usage_errors
def main(argv: list[str] | None = None) -> None:
    options, config, notes, checkpoint = parse_evaluation(argv, __doc__.splitlines()[0])
    config.distributed_training.distributed_world_size = 1  # torchrun may say more
    start_ranks(config, options.device)
    with distributed.process_group(options.device) as world:
        precision, _ = choose_precision(options, config, world.device)
        npu_patches.apply_to_config(config, world.device)
        data = open_data(config, world.rank, world.size)
        model = build(config, data).to(world.device)
        device_patches.apply_to_model(model, world.device)
        state = make_state(model, config, precision, world)
        load_checkpoint(model, checkpoint, config.common_eval.path, config, data)
        state.num_updates = int((checkpoint.get("optimizer_history") or [{}])[-1].get("num_updates", 0))
        names = config.dataset.valid_subset.split(",")
        batches = {name: data.valid_batches(name) for name in names}  # a missing split stops here
        size = config.dataset.batch_size or config.dataset.max_tokens
        # resume: an evaluation adds to a folder and moves nothing of a training run aside
        with RunLog(
            options.output_dir, world, "Data2vec_for_PyTorch_eval", size, options.case_kind, evaluation=True,
            profile=options.profile,
        ) as log:  # fmt: skip
            for text in notes:
                log.info(text)
            report = Report(log, config)
            run = Run(config, world, precision, forward_of(config, data, world.device), state)
            for name in names:
                began = time.perf_counter()
                sums = validate(run, batches[name].loader(config.dataset.num_workers))
                loss = report.validation(state, 1, name, sums, began)
            log.finish(loss=loss)


if __name__ == "__main__":
    main()
