"""What `ci/scaling.py` measures: a training step on one device, and all-reduces of real gloo ranks over slow cables.

The ranks of the validation are network namespaces whose links `tc` holds to a known bandwidth, far below what memory
and two CPU cores do. So four ranks on two cores still measure the network: computing is replaced by sleeping.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ci.namespace_servers import servers
from ci.training_cases import CASES, ROOT
from ci.training_steps import Observer, TrainingStopped, train, use_tree

WARM_UP, TIMED_STEPS = 3, 4
PORT = 29577
MEGABYTE = 1_000_000


class StepMeter(Observer):
    """Times steps without their wait for data, and in step 2 counts what backward needs.

    Seconds are CPU seconds of this one thread on a CPU, which other work on the machine does not change, and wall
    seconds of a synchronised device otherwise.
    """

    def __init__(self, device: str):
        self.device, self.clock = device, time.process_time if device == "cpu" else time.perf_counter
        self.seconds: list[float] = []
        self.result: dict[str, float] = {}
        self._parameters: list[Tensor] = []
        self._saved: dict[int, int] = {}
        self._began = self._waited = 0.0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)
        register_optimizer_step_post_hook(self._note_parameters)

    def data_begins(self) -> None:
        self._wait_began = self.clock()

    def data_ends(self) -> None:
        self._waited += self.clock() - self._wait_began

    def step_ended(self, step: int, samples: int) -> None:
        if self.device != "cpu":
            torch.accelerator.synchronize()
        now = self.clock()
        if step > WARM_UP:
            self.seconds.append(now - self._began - self._waited)
        if step == 1:
            self._hooks.__enter__()
        elif step == 2:
            self._hooks.__exit__(None, None, None)
            self._describe(samples)
        elif step == WARM_UP + TIMED_STEPS:
            raise TrainingStopped
        self._began, self._waited = self.clock(), 0.0

    def _note_parameters(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def _count(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            self._saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def _describe(self, samples: int) -> None:
        alive = [item for item in gc.get_objects() if isinstance(item, Tensor)]
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive if t.layout is torch.strided
        }
        lists = [item for item in gc.get_objects() if isinstance(item, nn.ModuleList | nn.Sequential)]
        own = {id(p) for p in self._parameters}
        units = [sum(p.nbytes for p in child.parameters() if id(p) in own) for blocks in lists for child in blocks]
        parameters = sum(p.nbytes for p in self._parameters)
        self.result = {
            "samples": samples,
            "gradient_bytes": parameters,
            "unit_bytes": max(units, default=parameters),
            "state_bytes": sum(storages.values()),  # weights, optimizer, teacher or average, the last batch
            "activation_bytes": sum(size for pointer, size in self._saved.items() if pointer not in storages),
        }


def measure_step(project: str, size: str, device: str, precision: str) -> dict[str, float]:
    """One device's step of a project's training case, in a process of its own."""
    command = [sys.executable, "-m", "ci.scaling_measure", "step", project, size, device, precision]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{project}: the measured run failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _step(project: str, size: str, device: str, precision: str) -> None:
    case, meter = CASES[project], StepMeter(device)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        case.prepare(data, size)
        use_tree(ROOT, project)
        if device == "cpu":
            torch.set_num_threads(1)
        train(case.entry, case.command(data, size, data / "output", device, precision), meter)
    seconds = sorted(meter.seconds)[len(meter.seconds) // 2]
    print(json.dumps({"project": project, "step_s": seconds, **meter.result}))


def measure_all_reduce(ranks: int, megabits: float, sizes: list[int], buckets: list[int], sleep_s: float) -> dict:
    """All-reduce of fp32 buffers between `ranks` namespaces whose links carry `megabits` a second.

    Args:
        sizes: bytes of the buffers that are timed one by one.
        buckets, sleep_s: a step whose backward pass (a sleep of `sleep_s`, in equal parts) hands out these buckets.

    Returns:
        {"sizes": seconds by bytes, "step": seconds of the whole step}, each the shortest of seven.

    Raises:
        NotPermitted: no namespaces here.
    """
    with servers(ranks) as made:
        for server in made:
            limit = f"tc -n {server.name} qdisc add dev eth0 root tbf rate {megabits}mbit burst 8kb latency 200ms"
            subprocess.run(limit.split(), check=True, capture_output=True)
        settings = json.dumps({"sizes": sizes, "buckets": buckets, "sleep_s": sleep_s})
        command = [sys.executable, "-m", "ci.scaling_measure", "all_reduce", made[0].address, str(ranks), settings]
        running = [
            server.start([*command, str(rank)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            for rank, server in enumerate(made)
        ]
        outputs = [process.communicate(timeout=600)[0] for process in running]
        if any(process.returncode for process in running):
            raise RuntimeError(f"a rank of the all-reduce failed: {outputs}")
    result = json.loads(outputs[0])
    return {"sizes": {int(size): seconds for size, seconds in result["sizes"].items()}, "step": result["step"]}


def _all_reduce(address: str, ranks: int, settings: dict, rank: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    dist.init_process_group("gloo", init_method=f"tcp://{address}:{PORT}", rank=rank, world_size=ranks)

    def timed(action, repeats: int = 7) -> float:
        best = float("inf")
        for _ in range(repeats):
            dist.all_reduce(torch.zeros(1))  # all begin together
            began = time.perf_counter()
            action()
            best = min(best, time.perf_counter() - began)
        return best

    def step() -> None:
        works = []
        for size in settings["buckets"]:
            time.sleep(settings["sleep_s"] / len(settings["buckets"]))
            works.append(dist.all_reduce(torch.zeros(size // 4), async_op=True))
        for work in works:
            work.wait()

    times = {size: timed(lambda size=size: dist.all_reduce(torch.zeros(size // 4))) for size in settings["sizes"]}
    whole = timed(step)
    if rank == 0:
        print(json.dumps({"sizes": times, "step": whole}), flush=True)
    dist.all_reduce(torch.zeros(1))
    dist.destroy_process_group()


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    if what == "step":
        _step(*words)
    else:
        _all_reduce(words[0], int(words[1]), json.loads(words[2]), int(words[3]))
