"""What a measured speed depends on besides the code: the device, its driver, CANN and torch."""

from __future__ import annotations

import platform
import re
import subprocess

import torch

from common import device as devices
from common.doctor import facts as doctor_facts


def machine(device: str) -> str:
    """The name of the processor or accelerator, e.g. "AMD EPYC 7763" or "Ascend910B3"."""
    if device == "cpu":
        return torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    return devices.describe(devices.resolve(device))


def environment(device: str) -> dict[str, str | None]:
    """The part of a baseline's key that the host decides; None for what the device does not have."""
    facts = doctor_facts.gather() if device == "npu" else None
    cpu = f"{machine('cpu')}, {devices.available_cores()} cores" if device == "cpu" else machine(device)
    return {
        "device": cpu,
        "driver": facts.driver if facts else _cuda_driver() if device == "cuda" else None,
        "cann": facts.cann if facts else None,
        "torch": torch.__version__,
        "torch_npu": doctor_facts.package_version("torch_npu") if device == "npu" else None,
    }


def folder_name(device: str) -> str:
    """Of the baselines of a device: "cpu", or the accelerator's name, e.g. "nvidia-h200"."""
    return "cpu" if device == "cpu" else re.sub(r"[^a-z0-9]+", "-", machine(device).lower()).strip("-")


def _cuda_driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return None
    return lines[0] if lines else None
