"""Training, evaluation and their results: the files of the reference, the result file, the picture of answers."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

from clip_pretraining.evaluation import retrieval_picture
from clip_pretraining.options.arguments import ClipTrainingArguments
from clip_pretraining.training.pipeline import Setup
from clip_pretraining.training.trainer import ClipTrainer
from common.distributed import World
from common.run import replay
from common.run_log import RunLog


def open_log(args: ClipTrainingArguments, world: World, total_steps: int | None, resumed: bool) -> RunLog:
    """The log of a training, or of an evaluation alone, which has a result file of its own beside the training's."""
    name = "CLIP_for_PyTorch_replay" if args.replay else f"CLIP_for_PyTorch{'' if args.do_train else '_eval'}"
    every = args.logging_steps if args.logging_steps >= 1 else args.logging_steps * (total_steps or 1)
    return RunLog(
        args.output_dir,
        world,
        name,
        args.micro_batch_size if args.do_train else args.per_device_eval_batch_size,
        args.case_kind,
        total_steps=total_steps,
        log_every=math.ceil(every),  # below 1 it is a share of all steps, as in `transformers`
        resume=resumed,
        evaluation=bool(args.replay) or not args.do_train,
        skip_steps=args.skip_steps,
        profile=args.profile,
        precision=args.precision,
    )


def train(trainer: ClipTrainer, log: RunLog, checkpoint: Path | None) -> None:
    """Trains to the end and saves the last model with its processor to the output folder."""
    done = 0
    if checkpoint is not None:
        done = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
        nothing_left = ": nothing is left to train" if done >= log.total_steps else ""
        log.info(f"resuming from {checkpoint}, {done} steps of {log.total_steps}{nothing_left}")
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.stopped_at is not None:
        raise log.stopped(trainer.stopped_at)
    with log.pause("save"):
        trainer.save_model()
        trainer.save_state()
        if result.global_step > done:
            trainer.log_metrics("train", result.metrics)
            trainer.save_metrics("train", result.metrics)


def replay_step(trainer: ClipTrainer, log: RunLog, checkpoint: Path | None) -> dict[str, Any]:
    """--replay: the recorded step once more on the weights of the checkpoint, or those a run begins with."""
    recorded = replay.read(trainer.args.replay, log.total_steps)
    log.info(f"weights: {checkpoint or 'those that a run begins with'}; {trainer.args.precision}")
    attempt = partial(trainer.gradients_of, recorded.step, checkpoint)
    return replay.run(recorded, log, trainer.model, trainer.create_optimizer().guard, attempt)


def evaluate(trainer: ClipTrainer, log: RunLog, setup: Setup) -> dict[str, float]:
    """Evaluates the last model; writes eval_results.json and, when asked for, retrieval.png."""
    metrics = trainer.evaluate()
    with log.pause("report"):
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        if trainer.args.retrieval_picture and log.world.is_main:
            path = Path(trainer.args.output_dir) / "retrieval.png"
            image, text = (features.cpu() for features in setup.validation_features)
            retrieval_picture.draw(image, text, setup.validation.pairs, setup.validation.images, path)
            log.info(f"queries and their best answers: {path}")
    return metrics


def finish(log: RunLog, metrics: dict[str, float]) -> dict[str, Any]:
    """Writes and prints the final result. TrainAccuracy is the mean of both directions' R@1, in percent."""
    if not metrics:
        return log.finish()
    recall = {key.removeprefix("eval_"): round(100 * value, 3) for key, value in metrics.items() if "_R@" in key}
    zero_shot = {key.removeprefix("eval_"): value for key, value in metrics.items() if "zero_shot" in key}
    accuracy = (recall["image_to_text_R@1"] + recall["text_to_image_R@1"]) / 2
    log.info(f"Final Eval Loss : {metrics['eval_loss']:.4f} (in-batch, batches of {metrics['eval_batch_size']})")
    return log.finish(
        accuracy=round(accuracy, 3),
        AccuracyIs="R@1 of held-out pairs, mean of both directions, %",
        loss=metrics["eval_loss"] if log.total_steps is None else None,  # None: the training's
        EvalLoss=round(metrics["eval_loss"], 6),
        EvalBatchSize=metrics["eval_batch_size"],
        **recall,
        **zero_shot,
    )
