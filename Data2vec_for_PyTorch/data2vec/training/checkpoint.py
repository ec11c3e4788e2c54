"""Checkpoints in fairseq's layout: fairseq's resume here, ours have the same keys and names."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from common import checkpoint_file
from common.checkpoint import digests
from common.checkpoint.background_write import BackgroundWriter
from common.checkpoint_file import CheckpointError
from common.distributed import World
from data2vec.training.update import TrainState
from data2vec.weights.pretrained import load_weights


def state_to_checkpoint(state: TrainState, config: DictConfig, val_loss: float | None) -> dict[str, Any]:
    """fairseq's `Trainer.state_dict` plus `extra_state`; plain values and tensors only."""
    extra = {
        "metrics": {},  # fairseq's own, which has another form
        "meters": state.meters,
        "previous_training_time": state.seconds(),
        "train_iterator": {
            "version": 2,
            "epoch": state.epoch,
            "iterations_in_epoch": state.iterations,
            "shuffle": True,
        },
        "val_loss": val_loss,
        "identity": state.identity,  # ours
        "evaluation_due": state.evaluation_due,
    }
    if state.best_loss is not None:
        extra["best"] = state.best_loss
    optimizer = _optimizer_to_fairseq(state)
    return {
        "args": None,
        "cfg": OmegaConf.to_container(config, throw_on_missing=False),
        "model": OrderedDict(state.model.state_dict()),
        "criterion": None,
        "optimizer_history": [
            {
                "criterion_name": "ModelCriterion",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {"best": state.best_loss},
                "num_updates": state.num_updates,
            }
        ],
        "task_state": {},
        "extra_state": extra,
        "last_optimizer_state": optimizer,
    }


def _optimizer_to_fairseq(state: TrainState) -> dict[str, Any]:
    ours = state.optimizer.state_dict()
    states = {i: {**entry, "step": int(entry["step"])} for i, entry in ours["state"].items()}
    names = ("lr", "betas", "eps", "weight_decay", "amsgrad", "params")
    groups = [{name: group[name] for name in names} for group in ours["param_groups"]]
    result: dict[str, Any] = {"state": states, "param_groups": groups}
    if state.scaler.enabled:
        result["loss_scale"] = state.scaler.scale
        result["loss_scaler"] = state.scaler.state_dict()
    return result


def load_training_state(state: TrainState, checkpoint: dict[str, Any], path: Path, config: DictConfig) -> str:
    """Continues from a checkpoint of ours or of fairseq's, within the epoch and to the update.

    On another number of ranks than before `optimization.update_freq` is changed so that an update has the same batches.
    Updates are counted on together with the optimizer's state: with `checkpoint.reset_optimizer`, or without such a
    state in the file, they begin at 0, as in fairseq.

    Returns:
        What was changed or not there, in words; "" for nothing.

    Raises:
        CheckpointError: not a pretraining checkpoint, of another model, damaged, or of updates that these ranks cannot
            make.
    """
    words = load_weights(state.model, checkpoint, path)
    words = f"; {words}" if words else ""
    options = config.checkpoint
    extra = checkpoint.get("extra_state") or {}
    state.previous_seconds = extra.get("previous_training_time", 0.0)
    if not options.reset_optimizer and checkpoint.get("last_optimizer_state") is not None:
        _load_optimizer(state, checkpoint["last_optimizer_state"], path)
        history = checkpoint.get("optimizer_history") or [{}]
        state.num_updates = int(history[-1].get("num_updates", 0))
        state.best_loss = extra.get("best")
    if not options.reset_dataloader and "train_iterator" in extra:
        state.epoch = extra["train_iterator"]["epoch"]
        state.iterations = extra["train_iterator"]["iterations_in_epoch"]
        state.meters = extra.get("meters", {})
        state.evaluation_due = bool(extra.get("evaluation_due"))
        return words + _keep_updates(state, checkpoint.get("cfg") or {}, config, path)
    return words


def _keep_updates(state: TrainState, before: dict[str, Any], config: DictConfig, path: Path) -> str:
    """Fits update_freq, and the position in the epoch, to another number of ranks than in the configuration `before`.

    Batches are dealt out to the ranks in turn, so that ranks x micro-batches is the position on any number of ranks.
    """
    try:
        ranks_before = before["distributed_training"]["distributed_world_size"]
        freq_before = before["optimization"]["update_freq"][0]
    except (KeyError, IndexError, TypeError):  # no such record
        return ""
    ranks, freq = config.distributed_training.distributed_world_size, config.optimization.update_freq[0]
    total = ranks_before * freq_before
    if ranks == ranks_before and freq == freq_before:
        return ""
    wanted = total // ranks if total % ranks == 0 else 0
    teacher_counts = wanted != freq_before and config.model.get("ema_steps") == "per_micro_batch"
    if freq not in (freq_before, wanted) or not wanted or teacher_counts:
        why = "the teacher steps with every micro-batch (model.ema_steps=per_micro_batch)" if teacher_counts else ""
        raise CheckpointError(
            f"{path}: its updates were of {ranks_before} ranks x update_freq {freq_before}, these would be {ranks} x "
            f"{freq}{': ' + why if why else ''}. Go on with the same, or begin its epoch anew with "
            "checkpoint.reset_dataloader=true"
        )
    state.iterations = state.iterations * ranks_before // ranks
    config.optimization.update_freq = [wanted]
    if not config.common.fp16_scale_window:
        state.scaler.window = max(1, int(2**14 / total))
    return f"; optimization.update_freq is {wanted} on {ranks} ranks: {total} batches an update, as before"


def _load_optimizer(state: TrainState, saved: dict[str, Any], path: Path) -> None:
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    entries = dict(saved["state"])
    sizes = [p.numel() for p in parameters]
    if len(entries) == 1 and len(parameters) > 1:  # fairseq's fp16 run: one flat buffer for all parameters
        (flat,) = entries.values()
        if flat["exp_avg"].numel() != sum(sizes):
            raise CheckpointError(f"{path}: its flat optimizer state has another number of parameters than the model")
        parts = {name: flat[name].float().split(sizes) for name in ("exp_avg", "exp_avg_sq")}
        entries = {
            i: {"step": flat["step"], **{name: part[i].view_as(p) for name, part in parts.items()}}
            for i, p in enumerate(parameters)
        }
    if entries and len(entries) != len(parameters):
        raise CheckpointError(
            f"{path}: optimizer state of {len(entries)} parameters, the model has {len(parameters)}: "
            "give the configuration that it was made with"
        )
    group = state.optimizer.state_dict()["param_groups"][0]
    steps = int(next(iter(entries.values()))["step"]) if entries else 0
    tensors = {
        i: {**entry, "step": torch.tensor(float(entry["step"]), dtype=torch.float32)} for i, entry in entries.items()
    }
    # rates and betas come from the configuration, which a resumed run may have changed
    state.optimizer.load_state_dict({"state": tensors, "param_groups": [{**group, "steps": steps}]})
    if "loss_scale" in saved:
        state.scaler.load_state_dict(saved.get("loss_scaler") or {"scale": saved["loss_scale"]})


def save_checkpoints(
    folder: Path,
    state: TrainState,
    config: DictConfig,
    val_loss: float | None,
    end_of_epoch: bool,
    writer: BackgroundWriter,
    world: World,
) -> None:
    """checkpoint_last.pt always; checkpoint_best.pt, checkpoint_<epoch>_<updates>.pt, checkpoint<epoch>.pt when due.

    All ranks call it; the main one writes.
    `keep_interval_updates` limits the numbered ones within epochs.
    """
    options = config.checkpoint
    if val_loss is not None and (state.best_loss is None or val_loss < state.best_loss):
        state.best_loss = val_loss
        best = True
    else:
        best = False
    if not (world.is_main or state.is_sharded):
        return
    content = state_to_checkpoint(state, config, val_loss)
    if state.is_sharded:
        from data2vec.training.sharding import whole  # half a second to import

        content = whole(content, world)
    if not world.is_main:
        return
    done_epoch = state.epoch - 1 if end_of_epoch else state.epoch
    names = ["checkpoint_last.pt"]
    if best:
        names.append("checkpoint_best.pt")
    if not end_of_epoch and options.save_interval_updates and state.num_updates % options.save_interval_updates == 0:
        names.append(f"checkpoint_{state.epoch}_{state.num_updates}.pt")
    if end_of_epoch and not options.no_epoch_checkpoints and done_epoch % options.save_interval == 0:
        names.append(f"checkpoint{done_epoch}.pt")

    def write(kept: dict[str, Any]) -> None:
        for name in names:
            checkpoint_file.save(kept, folder / name)
        if options.keep_interval_updates > 0:
            _keep_newest_intervals(folder, options.keep_interval_updates)

    writer.submit(content, write)


def _keep_newest_intervals(folder: Path, count: int) -> None:
    numbered = {
        int(m[1]): p
        for p in folder.glob("checkpoint_*.pt")
        if (m := re.fullmatch(r".*_\d+_(\d+)\.pt", p.name)) and digests.damage(p) is None
    }
    for updates in sorted(numbered)[:-count]:
        numbered[updates].unlink(missing_ok=True)
