#!/usr/bin/env python3
"""Trains and evaluates CLIP on image-caption pairs.

    python run_clip.py --model_name_or_path clip-roberta --data_dir /data/coco --dataset_config_name 2017 \\
        --do_train --do_eval --output_dir output --per_device_train_batch_size 64 --num_train_epochs 3 --fp16
    torchrun --nproc_per_node 8 run_clip.py ...   # the negatives then come from all eight ranks
"""

from __future__ import annotations

import common.requirements

import sys
from functools import partial

from clip_pretraining import cpu_patches, npu_patches, resume
from clip_pretraining.options import arguments, legacy
from clip_pretraining.training import identity, pipeline, reports
from clip_pretraining.training.log_callback import RunLogCallback
from clip_pretraining.training.trainer import ClipTrainer
from common import device, distributed
from common.errors import print_usage_errors


@print_usage_errors
def main(argv: list[str] | None = None) -> dict:
    """Runs what the command line asks for; returns what the result file says."""
    argv = sys.argv[1:] if argv is None else argv
    arguments.show_help(argv, __doc__)
    argv, notes = legacy.translate(arguments.spelled_out(argv))
    with distributed.process_group(arguments.device_of(argv), train_timeout_s=1800) as world:
        model_args, data_args, args = arguments.parse(argv, world)
        if world.is_main:
            print("".join(f"note: {note}\n" for note in notes), end="", flush=True)
        if args.torch_compile:
            device.require_eager(world.device, "--torch_compile")
        device.seed_everything(args.seed)

        setup = pipeline.build(model_args, data_args, args, world)
        cpu_patches.apply(setup.model, world.device)
        npu_patches.apply(setup.model, world.device)
        evaluator = partial(pipeline.evaluate, setup, args, world)

        total_steps = pipeline.total_steps(setup, args, world) if args.do_train else None
        facts = identity.facts(setup, data_args, args, world, total_steps or 0)
        checkpoint, changed = None, None
        if args.do_train:
            wanted, afresh = args.resume_from_checkpoint, args.overwrite_output_dir and not args.replay
            checkpoint, changed = resume.agree(args.output_dir, wanted, afresh, facts, args.accept_changes, world)

        with reports.open_log(args, world, total_steps, resumed=checkpoint is not None) as log:
            if world.is_main and not args.replay:
                resume.prepare_folder(args.output_dir, checkpoint, args.do_train)
            if changed:
                log.info(changed)
            log.info(pipeline.start_line(setup, args, world))
            callback = RunLogCallback()
            trainer = callback.trainer = ClipTrainer(
                world=world,
                run_log=log,
                settings=setup.settings,
                evaluator=evaluator if args.do_eval else None,
                run_facts=facts,
                model=setup.model,
                args=args,
                train_dataset=setup.train,
                eval_dataset=setup.validation,
                data_collator=setup.collate,
                processing_class=setup.processor,
                callbacks=[callback],
            )
            if args.replay:
                return reports.replay_step(trainer, log, checkpoint)
            if args.do_train:
                reports.train(trainer, log, checkpoint)
            metrics = reports.evaluate(trainer, log, setup) if args.do_eval else {}
            return reports.finish(log, metrics)


if __name__ == "__main__":
    main()
