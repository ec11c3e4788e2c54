"""One device, chosen once: npu, cuda or cpu, with precision, seeding, memory and synchronisation on top of it.

The rest of the repo never asks which device it is on. What differs between devices is either behind `torch.accelerator`
and `torch.get_device_module`, or in this file.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import random
import resource
import sys
from pathlib import Path

import numpy as np
import torch

from common import npu
from common.errors import UsageError

DEVICES = ("auto", "npu", "cuda", "cpu")
PRECISIONS = ("fp32", "bf16", "fp16")
_AUTOCAST_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(name: str = "auto", index: int = 0) -> torch.device:
    """The device to run on, made current.

    Args:
        name: npu, cuda, cpu, or auto (the accelerator that is there, else the CPU).
        index: which of the visible devices, i.e. the local rank.

    Raises:
        UsageError: the device asked for is absent. It never becomes a CPU silently: a run meant for eight cards that
            crawls on the host for a night is worse than one that stops here.
    """
    if name not in DEVICES:
        raise UsageError(f"--device {name}: unknown device, choose one of {', '.join(DEVICES)}")
    if name in ("auto", "npu"):
        _import_torch_npu(required=name == "npu")
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        name = accelerator.type if accelerator is not None else "cpu"
    if name == "cpu":
        return torch.device("cpu")

    module = getattr(torch, name, None)
    if module is None or not module.is_available():
        raise UsageError(f"--device {name}: {_why_absent(name)}")
    count = module.device_count()
    if index >= count:
        raise UsageError(
            f"--device {name}: device {index} was asked for but only {count} are visible "
            f"({_visible_devices_variable(name)}={os.environ.get(_visible_devices_variable(name), 'not set')})"
        )
    device = torch.device(name, index)
    module.set_device(device)
    if name == "npu":
        npu.set_up()
    return device


def _import_torch_npu(required: bool) -> None:
    """torch_npu registers the `npu` device when imported; newer versions do it on `import torch` by entry point."""
    if hasattr(torch, "npu") or importlib.util.find_spec("torch_npu") is None:
        return
    try:
        import torch_npu  # noqa: F401
    except (ImportError, RuntimeError) as error:
        if required:
            raise UsageError(
                f"--device npu: torch_npu is installed but does not import: {error}. "
                "Source CANN's set_env.sh; make doctor says more"
            ) from error
        # auto: an Ascend host whose driver set-up is broken must be told so, not sent to the CPU
        if Path("/dev/davinci_manager").exists():
            raise UsageError(
                f"this host has Ascend cards but torch_npu does not import: {error}. Source CANN's set_env.sh, or ask "
                "for --device cpu"
            ) from error


def _why_absent(name: str) -> str:
    if name == "npu":
        if importlib.util.find_spec("torch_npu") is None and not hasattr(torch, "npu"):
            return "torch_npu is not installed (pip install torch_npu, in the version of your torch and CANN)"
        return "torch_npu is there but sees no card: check the driver (npu-smi info) and ASCEND_RT_VISIBLE_DEVICES"
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    return "no CUDA device is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES"


def _visible_devices_variable(name: str) -> str:
    return "ASCEND_RT_VISIBLE_DEVICES" if name == "npu" else "CUDA_VISIBLE_DEVICES"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Autocast with the dtype said aloud: torch's default is bf16 on a CPU and fp16 on npu and cuda."""
    _check_precision(precision)
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST_DTYPE[precision])


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Around what stays in the precision of its tensors, whatever the run's."""
    return torch.autocast(device.type, enabled=False)


def require_precision(device: torch.device, precision: str) -> None:
    """Refuses a precision that the device cannot train in.

    Raises:
        UsageError: unknown, or bf16 on a card of the Atlas training series (910A), where autocast would be turned off
            with a warning and the run train in fp32.
    """
    _check_precision(precision)
    if precision == "bf16" and device.type == "npu":
        if not npu.has_bf16(device):
            raise UsageError(f"--precision bf16: {describe(device)} has no bf16; give --precision fp16 or fp32")


def require_eager(device: torch.device, option: str) -> None:
    """Refuses torch.compile on an npu, where graph mode was never tried with this code.

    Raises:
        UsageError: naming `option`.
    """
    if device.type == "npu":
        raise UsageError(
            f"{option}: torch.compile on npu (torchair, npugraph_ex or inductor) was never tried with this code; leave "
            "it out"
        )


def fused_adamw(device: torch.device) -> bool:
    """Whether AdamW runs as one kernel on this device; `torch.optim.AdamW(..., fused=fused_adamw(device))`."""
    if device.type != "npu":
        return True
    return npu.has_fused_adamw(device)


def saturates(device: torch.device) -> bool:
    """Whether an overflow in fp16 leaves a finite number and a flag instead of inf."""
    if device.type != "npu":
        return False
    return not npu.has_bf16(device)


def deterministic(device: torch.device) -> None:
    """`--deterministic` of test/*.sh: every operator gives the same bits for the same input. Slower.

    Call it before the first product on the device. Sums over cards: HCCL_DETERMINISTIC, which CANN reads when it meets.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS, for use_deterministic_algorithms
    os.environ.setdefault("HCCL_DETERMINISTIC", "true")
    torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = False
    if device.type == "npu":
        npu.deterministic()


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r}: choose one of {', '.join(PRECISIONS)}")


def mix_seed(*ints: int) -> int:
    """A 63-bit seed from several integers, e.g. (seed, epoch, sample index).

    A hash and not a sum: (seed 0, epoch 1) and (seed 1, epoch 0) must not draw the same numbers.
    """
    digest = hashlib.blake2b(",".join(str(int(i)) for i in ints).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def step_generator(seed: int, *ints: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on (seed, ints) alone, so that a resumed run draws what the first would have drawn."""
    return torch.Generator(device=device).manual_seed(mix_seed(seed, *ints))


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch on every device. Model initialisation follows from it."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seeded(seed: int, *ints: int) -> None:
    """Seeds torch's global generators (CPU and accelerator) from (seed, ints): once a step, from (seed, step, rank).

    Dropout and drop path of library modules draw from the global generators; this makes them a function of the step.
    """
    torch.manual_seed(mix_seed(seed, *ints))


def pins_memory(device: torch.device) -> bool:
    """Whether a loader should put its batches in pinned memory: what `to_device` copies without waiting."""
    return device.type != "cpu"


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on the device, without waiting for what is queued there: only pinned memory is copied that way."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def synchronize(device: torch.device) -> None:
    """Waits until all work queued on the device is done; nothing to wait for on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on the accelerator, or resident set size of this process on a CPU."""
    if device.type != "cpu":
        return torch.get_device_module(device).max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


def describe(device: torch.device) -> str:
    """The hardware in words, for logs and result files."""
    if device.type != "cpu":
        return torch.get_device_module(device).get_device_name(device)
    return f"{platform.machine()} CPU, {available_cores()} cores"


def available_cores() -> int:
    """Cores this process may use, which in a container is fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
