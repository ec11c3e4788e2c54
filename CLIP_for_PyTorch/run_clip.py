#!/usr/bin/env python3
"""Trains and evaluates CLIP on image-caption pairs.

    python run_clip.py --model_name_or_path clip-roberta --data_dir /data/coco --dataset_config_name 2017 \\
        --do_train --do_eval --output_dir output --per_device_train_batch_size 64 --num_train_epochs 3 --fp16
    torchrun --nproc_per_node 8 run_clip.py ...   # the negatives then come from all eight ranks
"""

from __future__ import annotations

import sys
from functools import partial

from clip_pretraining import arguments, legacy_options, npu_patches, pipeline, reports, resume
from clip_pretraining.trainer import ClipTrainer, RunLogCallback
from common import device, distributed
from common.errors import print_usage_errors
from common.run_log import RunLog


@print_usage_errors
def main(argv: list[str] | None = None) -> dict:
    """Runs what the command line asks for; returns what the result file says."""
    argv, notes = legacy_options.translate(arguments.spelled_out(sys.argv[1:] if argv is None else argv))
    with distributed.process_group(arguments.device_of(argv), train_timeout_s=1800) as world:
        model_args, data_args, args = arguments.parse(argv, world)
        if world.is_main:
            print("".join(f"note: {note}\n" for note in notes), end="", flush=True)
        device.seed_everything(args.seed)

        setup = pipeline.build(model_args, data_args, args, world)
        npu_patches.apply(setup.model, world.device)
        evaluator = partial(pipeline.evaluate, setup, args, world)

        facts = pipeline.run_facts(setup, args, world)
        total_steps = pipeline.total_steps(setup, args, world) if args.do_train else None
        checkpoint = None
        if args.do_train:
            checkpoint = resume.choose(args.output_dir, args.resume_from_checkpoint, args.overwrite_output_dir, facts)
        if checkpoint is None and world.is_main:
            resume.set_aside(args.output_dir, resume.OF_TRAINING if args.do_train else resume.OF_EVALUATION)
        distributed.barrier()

        with RunLog(
            args.output_dir,
            world,
            # an evaluation alone has a result file of its own beside that of the training
            "CLIP_for_PyTorch" if args.do_train else "CLIP_for_PyTorch_eval",
            args.micro_batch_size if args.do_train else args.per_device_eval_batch_size,
            args.case_kind,
            total_steps=total_steps,
            log_every=pipeline.steps_between_lines(args, total_steps),
            resume=checkpoint is not None or not args.do_train,
            skip_steps=args.skip_steps,
            profile=args.profile,
        ) as log:
            callback = RunLogCallback(args.clamp_logit_scale)
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
            if args.do_train:
                reports.train(trainer, log, checkpoint)
            metrics = reports.evaluate(trainer, log, setup) if args.do_eval else {}
            return reports.finish(log, metrics)


if __name__ == "__main__":
    main()
