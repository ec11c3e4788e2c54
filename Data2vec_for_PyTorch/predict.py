"""What a fine-tuned checkpoint says of a table: predictions.csv, and the metrics where the table has labels.

    python predict.py --config-name base common_eval.path=checkpoint_best.pt task.data=test.csv --output_dir DIR

Task and model are the checkpoint's own; `task.data` is a table, or a folder with `dataset.valid_subset` in it.
"""

from __future__ import annotations

import common.requirements

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from common import distributed
from common.checkpoint_file import CheckpointError
from common.errors import UsageError, print_usage_errors
from common.run_log import RunLog
from data2vec import device_patches, npu_patches
from data2vec.command_line import FINE_TUNING, FINE_TUNING_CONFIGS, choose_precision, parse_evaluation, start_ranks
from data2vec.data.sentence_data import SentenceData, Sentences
from data2vec.data.tables import find_table, has_column
from data2vec.model.sentence_model import build_sentence_model
from data2vec.training.loop import batch_size
from data2vec.training.sentences import main_metric, metrics_of, predict
from data2vec.weights.pretrained import load_weights
from data2vec.weights.vocabulary import check_vocabulary


@print_usage_errors
def main(argv: list[str] | None = None) -> None:
    options, config, notes, checkpoint = parse_evaluation(argv, __doc__.splitlines()[0], FINE_TUNING_CONFIGS)
    path, name = config.common_eval.path, config.dataset.valid_subset.split(",")[0]
    try:
        if config.task._name != FINE_TUNING:
            raise TypeError
        classes = checkpoint["extra_state"]["identity"]["data"]["classes"]
    except (KeyError, TypeError):
        raise UsageError(f"{path}: no checkpoint of finetune.py, as is needed") from None
    config.distributed_training.distributed_world_size = 1  # torchrun may say more
    start_ranks(config, options.device)
    with distributed.process_group(options.device) as world:
        precision, _ = choose_precision(options, config, world.device)
        npu_patches.apply_to_config(config, world.device)
        place = Path(config.task.data)
        table = find_table(place, name) if place.is_dir() else place
        if not table.is_file():
            raise UsageError(f"task.data={table}: no such table")
        labelled = has_column(table, config.task.label_column)
        data = SentenceData(config, world.rank, world.size, classes, labelled)
        check_vocabulary(data.vocab, config.task.dict, checkpoint, path)
        batches = data.valid_batches(name)
        try:
            model = build_sentence_model(OmegaConf.to_container(config.model), len(data.vocab), data.outputs)
            load_weights(model, checkpoint, path)
        except (CheckpointError, ValueError) as error:
            raise UsageError(str(error)) from None
        model = model.to(world.device)
        device_patches.apply_to_model(model, world.device)
        log = RunLog(
            options.output_dir, world, "Data2vec_for_PyTorch_predict", batch_size(config), options.case_kind,
            evaluation=True, fps_unit="sequences/sec",
        )  # fmt: skip
        with log:
            if not labelled:
                notes.append(f"{table}: no column {config.task.label_column!r}: predictions without metrics")
            for text in notes + data.notes:
                log.info(text)
            rows, logits = predict(model, batches, config.dataset.num_workers, world, precision)
            values = {}
            if labelled:
                values = metrics_of(logits, batches.data.targets[rows], data.outputs if data.classes else None)
                log.record(0, "predict", **values)
            if world.is_main:
                output = Path(options.output_dir) / "predictions.csv"
                write(output, batches.data, rows, logits)
                log.info(f"{len(rows)} predictions: {output}")
            known: dict[str, Any] = {"loss": values.get("loss"), "Predictions": len(rows)}
            if main := main_metric(config) if values else None:
                known |= {"accuracy": round(100 * values[main], 3), "AccuracyIs": f"{main} of the table's rows, x 100"}
            log.finish(**known)


def write(path: Path, data: Sentences, rows: np.ndarray, logits: torch.Tensor) -> None:
    """`line,prediction`, and of classes their probabilities; at once, in place of what was there."""
    partial = path.with_name(f".{path.name}.writing")
    with open(partial, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["line", "prediction", *(f"p({name})" for name in data.classes or ())])
        shares = logits.double().softmax(dim=1).tolist()
        for row, values, share in zip(rows.tolist(), logits.tolist(), shares, strict=True):
            if data.classes is None:
                table.writerow([data.rows[row].line, f"{values[0]:.6g}"])
            else:
                best = data.classes[int(np.argmax(values))]
                table.writerow([data.rows[row].line, best, *(f"{p:.6f}" for p in share)])
    os.replace(partial, path)


if __name__ == "__main__":
    main()
