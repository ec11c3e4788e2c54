"""What a run writes: the house's log and fairseq's lines, from the same sums."""

from __future__ import annotations

import math

import torch
from omegaconf import DictConfig

from common import device as devices
from common.run_log import RunLog
from data2vec.modality import is_vision
from data2vec.training import fairseq_log
from data2vec.training.fairseq_log import Meters
from data2vec.training.update import TrainState, UpdateResult, check_collapse, ema_decay, learning_rate


class Report:
    """Collects updates without waiting for the device, and reads them when a line is due.

    Args:
        log: entered `RunLog`.
        config: of the run.
        state: of a resumed run, whose lines are then those of one that was never stopped.

    Attributes:
        updates_per_epoch: of the epoch that is on, for the `update` field, a position in epochs.
    """

    def __init__(self, log: RunLog, config: DictConfig, state: TrainState | None = None):
        self.log = log
        self.config = config
        self.updates_per_epoch = 1
        self.vision = is_vision(config)
        self.inner, self.epoch = Meters(), Meters()
        for name, saved in (state.meters if state else {}).items():
            getattr(self, name).load_state_dict(saved)
        self.tokens = self.sentences = self.updates = 0.0
        self._pending: list[tuple[UpdateResult, float]] = []
        self._spread = torch.zeros(2)

    def update(self, state: TrainState, result: UpdateResult, seconds: float, samples: int, flops: float) -> None:
        """Takes note of one update, of `samples` over all ranks; a skipped one (fp16 overflow) is told at once."""
        if result.skipped:
            self.log.info(f"gradient overflow at update {state.num_updates}: loss scale now {state.scaler.scale:g}")
            return
        self._pending.append((result, seconds))
        step = state.num_updates
        spread = torch.stack((result.pred_std, result.target_std))
        # an update of fewer than two masked tokens has none: the one before stands in, since 0 would read as collapse
        self._spread = torch.where(spread.isnan(), self._spread.to(spread.device), spread)
        self.log.step(
            step,
            samples=samples,
            flops=flops,
            loss=result.loss_sum / result.sample_size.clamp(min=1),
            lr=result.lr,
            grad_norm=result.grad_norm,
            epoch=self._position(state),
            pred_std=self._spread[0],
            target_std=self._spread[1],
            ema_decay=result.ema_decay,
            masked_tokens=result.sample_size,
        )
        if step % self.config.common.log_interval == 0:
            self.read(state)
            line = {"epoch": state.epoch, "update": round(self._position(state), 3)}
            line |= self._training_values(self.inner, state)
            fairseq_log.write_line(self.log.info, "train_inner", line)
            self.inner = Meters()

    def end_of_epoch(self, state: TrainState, epoch: int) -> None:
        """The `train` line; also when a run stops within an epoch."""
        self.read(state)
        if self.epoch.updates:
            values = fairseq_log.prefixed(self._training_values(self.epoch, state), "train")
            fairseq_log.write_line(self.log.info, "train", {"epoch": epoch} | values)
        self.inner, self.epoch = Meters(), Meters()

    def validation(self, state: TrainState, epoch: int, name: str, sums: torch.Tensor, began: float) -> float:
        """The `valid` line; returns the loss."""
        meters = Meters()
        loss, sample_size, sentences, batches = sums.tolist()
        decay = ema_decay(self.config, max(state.num_updates - 1, 0))
        meters.add(loss, sample_size, sentences, decay)
        meters.updates, meters.ema_decay, meters.began = max(int(batches), 1), 1000 * decay * max(batches, 1), began
        values = meters.values(training=False) | {"num_updates": fairseq_log.number(state.num_updates)}
        if state.best_loss is not None:
            values["best_loss"] = fairseq_log.number(min(state.best_loss, meters.mean_loss), 3)
        fairseq_log.write_line(self.log.info, name, {"epoch": epoch} | fairseq_log.prefixed(values, name))
        self.log.record(state.num_updates, name, loss=meters.mean_loss)
        return meters.mean_loss

    def finish(self, state: TrainState) -> None:
        """The result file, and the speed under each of its true names."""
        known = {"NumUpdates": state.num_updates}
        if state.best_loss is not None:
            known["ValidBestLoss"] = round(state.best_loss, 6)
        values = self.log.finish(**known)
        if "ActualFPS" not in values:
            return
        per_second = 1000 / values["StepTimeMs"]
        if not self.config.dataset.batch_size:  # a batch counts tokens, and ModelZoo's key means samples
            values.pop("TrainingTime")
        speed = {
            "ImagesPerSecond" if self.vision else "SequencesPerSecond": values["ActualFPS"],
            "UpdatesPerSecond": round(per_second, 4),
            "TokensPerSecond": round(values["ActualFPS"] * self.tokens / max(self.sentences, 1), 1),
        }
        if self.log.world.is_main:
            self.log.result.write(values | speed)
            if not self.vision:
                print(
                    f"Final Performance images/sec : {speed['UpdatesPerSecond']} "
                    "(updates/sec, as the reference prints it)"
                )
            what = "patches" if self.vision else "real tokens, no padding"
            print(f"Final Performance tokens/sec : {speed['TokensPerSecond']} ({what})")
            if state.best_loss is not None:
                print(f"Final Valid Best Loss: {known['ValidBestLoss']}", flush=True)

    def meters(self) -> dict[str, dict[str, float]]:
        """What a checkpoint keeps of the lines in the making; call `read` before."""
        return {"inner": self.inner.state_dict(), "epoch": self.epoch.state_dict()}

    def read(self, state: TrainState) -> None:
        """Reads the updates noted since the last time: the one wait for the device.

        Raises:
            FloatingPointError: inf or nan, or collapse.
        """
        state.step.check()
        if not self._pending:
            return
        columns = ("loss_sum", "sample_size", "sentences", "tokens", "grad_norm", "pred_std", "target_std")
        rows = torch.stack([torch.stack([getattr(r, c) for c in columns]) for r, _ in self._pending]).tolist()
        spreads = []
        for (loss, size, sentences, tokens, norm, *spread), (result, seconds) in zip(rows, self._pending, strict=True):
            if not math.isnan(spread[0]):  # else no rank had two masked tokens
                spreads.append(spread)
            for meters in (self.inner, self.epoch):
                meters.add(loss, size, sentences, result.ema_decay)
                meters.add_step(norm, self.config.optimization.clip_norm, seconds)
                if not math.isnan(spread[0]):
                    meters.add_spread(*spread)
            self.tokens += tokens
            self.sentences += sentences
        self._pending = []
        if spreads:
            pred_std, target_std = (sum(column) / len(spreads) for column in zip(*spreads, strict=True))
            check_collapse(pred_std, target_std, state.num_updates, self.config.lr_scheduler.warmup_updates)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _position(self, state: TrainState) -> float:
        done = state.iterations / self.config.optimization.update_freq[0]
        return state.epoch - 1 + min(1.0, done / self.updates_per_epoch)

    def _training_values(self, meters: Meters, state: TrainState) -> dict[str, str]:
        scale = state.scaler.scale if state.scaler.enabled else None
        lr = learning_rate(self.config, state.num_updates)  # fairseq logs the next update's
        free = free_memory(self.log.world.device)
        return meters.training_values(state.num_updates, lr, scale, state.seconds(), self.vision, free)


def free_memory(device: torch.device) -> float | None:
    """GiB of the accelerator's memory that were never used so far; None on a CPU, as in fairseq."""
    if device.type == "cpu":
        return None
    _, total = torch.get_device_module(device).mem_get_info(device)
    return (total - devices.peak_memory_bytes(device)) / 2**30
