"""data2vec text on a task of sentences: classification or regression of tables, from a pretrained checkpoint.

    python finetune.py --config-name base task.data=DIR checkpoint.finetune_from_model=checkpoint_best.pt \
        task.encoder_json=encoder.json task.vocab_bpe=vocab.bpe task.dict=dict.txt

DIR holds train.csv and valid.csv (.tsv, .jsonl) with the columns `task.columns` and `task.label_column`. Options are
those of train.py; the defaults are RoBERTa's recipe for GLUE, which data2vec's paper uses (section 4.3).
"""

from __future__ import annotations

import common.requirements

from typing import Any

from omegaconf import DictConfig, OmegaConf

from common import device as devices
from common import distributed
from common.errors import UsageError, print_usage_errors
from data2vec import device_patches
from data2vec.command_line import choose_precision, parse_finetuning, start_ranks
from data2vec.data.sentence_data import SentenceData
from data2vec.model.sentence_model import SentenceModel, build_sentence_model
from data2vec.training.loop import Training, begin, open_log, replay_update, train, update_limit
from data2vec.training.resume import go_on_or_begin
from data2vec.training.sentences import FineTuningReport, evaluate, forward
from data2vec.training.update import Run, make_state
from data2vec.weights.vocabulary import check_vocabulary

NETWORK = "Data2vec_for_PyTorch_finetune"


@print_usage_errors
def main(argv: list[str] | None = None) -> None:
    options, config, notes, pretrained = parse_finetuning(argv, __doc__.splitlines()[0])
    start_ranks(config, options.device)
    with distributed.process_group(options.device) as world:
        precision, note = choose_precision(options, config, world.device)
        devices.seed_everything(config.common.seed)
        notes += [note, *device_patches.apply_to_config(config, world.device, options.compile)]
        data = SentenceData(config, world.rank, world.size)
        data.open_splits()
        notes.append(set_length(config, data))
        model = build(config, data, pretrained).to(world.device)
        device_patches.apply_to_model(model, world.device, options.compile)
        state = make_state(model, config, precision, world)
        save_dir, goes_on, resumed = go_on_or_begin(state, config, data, precision, world, options)
        source = config.checkpoint.finetune_from_model
        begins = f"weights of {source}" if pretrained else "no pretrained weights: the encoder is untrained"
        notes += [resumed or begins, *data.notes]
        if options.replay:
            return replay_update(NETWORK, Run(config, world, precision, forward, state), data, options, notes)
        with open_log(NETWORK, options, config, world, "sequences/sec", goes_on, precision) as log:
            begin(log, save_dir, notes)
            report, limit = FineTuningReport(log, config), update_limit(config, options)
            run = Training(config, world, precision, forward, state, data, report, save_dir, limit, evaluate)
            run.compiles = options.compile
            train(run)
            report.finish(state)


def build(config: DictConfig, data: SentenceData, pretrained: dict[str, Any] | None) -> SentenceModel:
    """The model, with a checkpoint's encoder where there is one. UsageError where it does not fit."""
    if pretrained:
        check_vocabulary(data.vocab, config.task.dict, pretrained, config.checkpoint.finetune_from_model)
    try:
        model = build_sentence_model(OmegaConf.to_container(config.model), len(data.vocab), data.outputs)
        if pretrained:
            missing, unexpected = model.load_state_dict(pretrained["model"], strict=False)
            wrong = [
                *unexpected,
                *(n for n in missing if not n.startswith("classification_heads.") and "version" not in n),
            ]
            if wrong:
                raise ValueError(f"{', '.join(wrong[:3])}: in one of model and checkpoint only")
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:400]
        raise UsageError(f"checkpoint.finetune_from_model={config.checkpoint.finetune_from_model}: {reason}") from None
    return model


def set_length(config: DictConfig, data: SentenceData) -> str:
    """Fills in the number of updates, of max_epoch epochs, and of the warm-up; returns it in words."""
    options, schedule = config.optimization, config.lr_scheduler
    if options.max_update == 0:
        options.max_update = options.max_epoch * -(-data.batches_per_epoch(1) // options.update_freq[0])
    if schedule.warmup_updates is None:
        schedule.warmup_updates = round(schedule.warmup_ratio * options.max_update)
    if schedule.warmup_updates >= options.max_update > 1:
        raise UsageError(
            f"lr_scheduler.warmup_updates={schedule.warmup_updates}: the run has {options.max_update} updates in all"
        )
    return f"{options.max_update} updates, the first {schedule.warmup_updates} of them warm-up"


if __name__ == "__main__":
    main()
