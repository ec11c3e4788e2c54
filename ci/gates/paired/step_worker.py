"""A process that trains one project of one checkout and waits at the end of a step until it is told to go on.

Started by the gate of the newer revision, also for an older checkout, of which it uses everything but this file and
training_steps.py. Lines of JSON: on stdin `{"steps": n}`, on the reply descriptor `{"seconds": ..., "samples": ...}`
once those steps are done, and one without steps when the warm-up is over. An empty stdin ends the run.

Seconds are CPU seconds of this process on a CPU (wait for data left out), and wall seconds on an accelerator, which is
synchronised at both ends.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import training_steps  # noqa: E402

sys.path.pop(0)  # nothing else of this checkout

WARM_STEPS = 3


class Gate(training_steps.Observer):
    """Holds the run at the end of a step; measures the steps it lets through.

    Args:
        device: type of the device that trains.
        plant: share of a step's time to add to every step, to see whether the measurement finds it.
    """

    def __init__(self, device: str, plant: float, reply):
        self._device, self._plant, self._reply = device, plant, reply
        self._left = self._samples = 0
        self._data_seconds = self._began = self._step_began = self._data_began = 0.0

    def step_ended(self, step: int, samples: int) -> None:
        if step < WARM_STEPS:
            return
        if step > WARM_STEPS:
            self._samples += samples
            self._left -= 1
            self._burn()
        if self._left <= 0:
            seconds = self._now() - self._began - self._data_seconds
            self._answer({"seconds": seconds, "samples": self._samples} if step > WARM_STEPS else {})
            self._left, self._samples, self._data_seconds = self._wait_for_steps(), 0, 0.0
            self._began = self._now()
        self._step_began = self._now()

    def data_begins(self) -> None:
        self._data_began = time.process_time()

    def data_ends(self) -> None:
        if self._device == "cpu":  # elsewhere the device works on while the host fetches
            seconds = time.process_time() - self._data_began
            self._data_seconds += seconds
            self._step_began += seconds

    def _now(self) -> float:
        if self._device == "cpu":
            return time.process_time()
        import torch

        torch.accelerator.synchronize()
        return time.perf_counter()

    def _burn(self) -> None:
        if self._plant > 0:
            now = self._now()
            end = now + self._plant * (now - self._step_began)
            while self._now() < end:
                pass

    def _wait_for_steps(self) -> int:
        line = sys.stdin.readline()
        if not line:
            raise training_steps.TrainingStopped
        return int(json.loads(line)["steps"])

    def _answer(self, message: dict) -> None:
        self._reply.write(json.dumps(message) + "\n")
        self._reply.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, required=True, help="checkout to train in")
    parser.add_argument("--project", required=True)
    parser.add_argument("--entry", required=True, help="module of the entry script")
    parser.add_argument("--device", required=True)
    parser.add_argument("--plant", type=float, default=0.0, help="share of a step to add to each step")
    parser.add_argument("--reply_fd", type=int, required=True)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="after --: the entry script's")
    options = parser.parse_args()
    training_steps.use_tree(options.tree, options.project)
    with os.fdopen(options.reply_fd, "w") as reply:
        training_steps.train(options.entry, options.arguments[1:], Gate(options.device, options.plant, reply))


if __name__ == "__main__":
    main()
