"""Checks of the hardware around torch: the generation of the cards, their links, shared memory, and NVIDIA's driver."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from common.doctor.facts import Facts
from common.doctor.report import GOOD, NOTE, WRONG, Line, install_torch, release

TORCH = ("torch", "torchvision")  # which have lines of their own
SHM_LEAST = 1 << 30  # a docker container has 64 MiB unless told otherwise; a batch of 64 pictures is 38 MB in fp32


def check_generation(facts: Facts) -> Iterator[Line]:
    """What a card cannot do, by its name in npu-smi: 910A, 910B, 910ProB came first, then 910B1 to B4 and others."""
    for name in sorted({card.name.removeprefix("Ascend") for card in facts.cards}):
        if name.startswith("310"):
            text = f"{name} is an inference card: torch_npu does not train on it"
            yield Line(WRONG, text, "train on an Atlas A2, A3 or 950 card")
        elif re.fullmatch(r"910(A|B|ProA|ProB|PremiumA)", name):
            text = f"{name} is of the Atlas training series: no bf16, no fused AdamW, fp16 is cut at 65504"
            yield Line(NOTE, text, "bash test/... --precision=fp16 (docs/on_a_card.md, 'Which card can what')")


def check_links(facts: Facts) -> Iterator[Line]:
    """The cards' own network, which servers need among each other; cards of one server have other ways."""
    down = [number for number, status in facts.links.items() if status != "UP"]
    if down:
        text = f"network link of card {', '.join(map(str, down))} is down: a run over several servers will time out"
        yield Line(NOTE, text, f"hccn_tool -i {down[0]} -net_health -g; then look at its cable and switch port")
    elif facts.links:
        yield Line(GOOD, f"network links of {len(facts.links)} cards: up")


def check_shared_memory(facts: Facts, has_card: bool) -> Iterator[Line]:
    """Loader workers hand batches over in /dev/shm; where it is full they die of a bus error."""
    if facts.shm_bytes is None:
        return
    if facts.shm_bytes < SHM_LEAST:
        text = f"/dev/shm has {facts.shm_bytes >> 20} MiB: loader workers die of a bus error when it is full"
        yield Line(
            WRONG if has_card else NOTE, text, "docker run --shm-size=16g ..., or mount -o remount,size=16g /dev/shm"
        )
    else:
        yield Line(GOOD, f"/dev/shm: {facts.shm_bytes / 2**30:.0f} GiB")


def check_packages(facts: Facts) -> Iterator[Line]:
    """Python packages beside constraints.txt: other versions than those that the tests ran with, and absent ones."""
    have = {name: version for name, version in facts.installed.items() if version and name not in TORCH}
    others = [f"{name} {version} (pinned: {facts.pinned[name]})" for name, version in have.items()
              if version != facts.pinned[name]]  # fmt: skip
    if others:
        to_change = " ".join(name for name, version in have.items() if version != facts.pinned[name])
        remedy = f"pip install -c constraints.txt {to_change}"
        yield Line(NOTE, f"other versions than the tests ran with: {', '.join(others)}", remedy)
    elif have:
        yield Line(GOOD, f"{len(have)} Python packages: in the versions of constraints.txt")
    for project, names in facts.needed.items():
        absent = [name for name in names if facts.installed[name] is None and name not in TORCH]
        if absent:
            yield Line(NOTE, f"{project} lacks {', '.join(absent)}", f"pip install -r {project}/requirements.txt")


def check_cuda(facts: Facts, wanted: dict[str, Any], device: str) -> Iterator[Line]:
    """NVIDIA's driver, and whether this torch is built for it. Nothing where nobody asks and there is none."""
    if facts.nvidia_smi is None:
        if device == "cuda":
            remedy = "sudo apt-get install nvidia-driver (and reboot); in a container: docker run --gpus all ..."
            yield Line(WRONG, "NVIDIA driver: no nvidia-smi", remedy)
        return
    driver = re.search(r"Driver Version:\s*(\S+)", facts.nvidia_smi)
    newest = re.search(r"CUDA Version:\s*([\d.]+)", facts.nvidia_smi)
    if driver is None:
        lines = facts.nvidia_smi.strip().splitlines() or ["no output"]
        remedy = "reboot (a new driver's kernel module is not loaded yet); in a container: docker run --gpus all ..."
        yield Line(WRONG if device == "cuda" else NOTE, f"nvidia-smi fails: {lines[-1]}", remedy)
        return
    yield Line(GOOD, f"NVIDIA driver {driver[1]}" + (f", for CUDA {newest[1]} and older" if newest else ""))
    if device not in ("auto", "cuda") or facts.packages["torch"] is None:
        return
    if facts.torch_cuda is None:
        text = f"torch {facts.packages['torch']} is built without CUDA"
        yield Line(WRONG if device == "cuda" else NOTE, text, f"{install_torch(wanted, 'cuda')} --force-reinstall")
    elif newest and release(facts.torch_cuda)[0] > release(newest[1])[0]:
        text = f"torch is built for CUDA {facts.torch_cuda}, the driver knows CUDA {newest[1]}"
        index = f"--index-url https://download.pytorch.org/whl/cu{newest[1].split('.')[0]}6"
        yield Line(WRONG, text, f"a newer driver, or where that index has it: {install_torch(wanted, 'cuda')} {index}")
