"""What is installed on this host: read from files, package metadata and `npu-smi info`, without importing torch.

An Ascend host is most often broken in a way that makes `import torch` itself fail, so nothing here imports it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

# Packages that CANN's operator compiler imports. Where one is missing, the first operator fails with an ACL error
# (500001, E10001, ...) that does not name it.
CANN_PACKAGES = tuple("attrs cloudpickle decorator ml-dtypes numpy psutil pyyaml scipy sympy tornado".split())
VARIABLES = tuple(
    "ASCEND_HOME_PATH ASCEND_TOOLKIT_HOME ASCEND_RT_VISIBLE_DEVICES CUDA_VISIBLE_DEVICES LD_LIBRARY_PATH "
    "TORCH_DEVICE_BACKEND_AUTOLOAD".split()
)
REPOSITORY = Path(__file__).resolve().parents[2]
_BUS_ID = re.compile(r"[0-9A-Fa-f]{4}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.\d")


@dataclass(frozen=True)
class Card:
    """One NPU as `npu-smi info` shows it."""

    number: int
    name: str
    health: str


@dataclass(frozen=True)
class CardProcess:
    """A process that holds a card."""

    card: int
    pid: int
    name: str


@dataclass
class Facts:
    """Versions are None where the thing is absent."""

    python: str
    machine: str
    packages: dict[str, str | None]
    torch_required: dict[str, str] = field(default_factory=dict)  # the torch that torch_npu and torchvision ask for
    driver: str | None = None
    firmware: str | None = None
    cann: str | None = None
    cann_folder: str | None = None
    npu_smi: str | None = None  # version
    npu_smi_error: str | None = None
    cards: list[Card] = field(default_factory=list)
    processes: list[CardProcess] = field(default_factory=list)
    device_nodes: list[str] = field(default_factory=list)
    closed_nodes: list[str] = field(default_factory=list)  # device nodes that this user may not open
    environment: dict[str, str] = field(default_factory=dict)
    links: dict[int, str] = field(default_factory=dict)  # by card, of its network: UP, DOWN
    shm_bytes: int | None = None  # size of /dev/shm
    nvidia_smi: str | None = None  # what it prints
    torch_cuda: str | None = None  # the CUDA that torch is built for
    pinned: dict[str, str] = field(default_factory=dict)  # constraints.txt: version by package, for this Python
    installed: dict[str, str | None] = field(default_factory=dict)  # of these packages
    needed: dict[str, list[str]] = field(default_factory=dict)  # packages by project, of its requirements.txt

    @property
    def has_ascend(self) -> bool:
        """Whether this host has a driver, CANN or a card; a torch_npu alone does not make one."""
        return any((self.driver, self.cann, self.npu_smi, self.npu_smi_error, self.device_nodes))


def gather(
    root: Path = Path("/"),
    run: Callable[[list[str]], tuple[int, str]] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Facts:
    """Reads the host.

    Args:
        root: folder taken for `/`.
        run: runs a command, returns (exit code, output); raises FileNotFoundError where there is no such program.
        environment: the variables; by default this process's.
    """
    environment = dict(os.environ if environment is None else environment)
    facts = Facts(
        python=platform.python_version(),
        machine=platform.machine(),
        packages={name: package_version(name) for name in ("torch", "torchvision", "torch_npu", *CANN_PACKAGES)},
        torch_required={
            name: required for name in ("torchvision", "torch_npu") if (required := required_torch(name)) is not None
        },
        driver=_info_value(root / "usr/local/Ascend/driver/version.info", "version"),
        firmware=_info_value(root / "usr/local/Ascend/firmware/version.info", "version"),
        environment={name: environment[name] for name in VARIABLES if name in environment},
    )
    run = run or _run
    facts.torch_cuda = torch_cuda()
    facts.pinned = pins((REPOSITORY / "constraints.txt").read_text(encoding="utf-8"), facts.python)
    facts.installed = {name: package_version(name) for name in facts.pinned}
    facts.needed = {
        file.parent.name: [line for line in file.read_text(encoding="utf-8").splitlines() if line in facts.pinned]
        for file in sorted(REPOSITORY.glob("*_for_PyTorch/requirements.txt"))
    }
    with contextlib.suppress(OSError):
        facts.shm_bytes = shutil.disk_usage(root / "dev" / "shm").total
    with contextlib.suppress(FileNotFoundError):
        facts.nvidia_smi = run(["nvidia-smi"])[1]
    facts.cann, facts.cann_folder = _find_cann(root, environment)
    facts.device_nodes = sorted(str(p) for p in (root / "dev").glob("davinci*") if re.search(r"davinci\d+$", p.name))
    facts.closed_nodes = [node for node in facts.device_nodes if not os.access(node, os.R_OK | os.W_OK)]
    try:
        code, output = run(["npu-smi", "info"])
    except FileNotFoundError:
        return facts
    if code == 0:
        facts.npu_smi, facts.cards, facts.processes = read_npu_smi(output)
        facts.links = _links({card.number for card in facts.cards}, root, run)
    else:
        lines = output.strip().splitlines()
        facts.npu_smi_error = lines[-1] if lines else f"exit code {code}"
    return facts


def _links(cards: set[int], root: Path, run: Callable[[list[str]], tuple[int, str]]) -> dict[int, str]:
    """UP or DOWN by card, from the driver's hccn_tool; empty where there is none, or it does not say."""
    tool = root / "usr/local/Ascend/driver/tools/hccn_tool"
    found = {}
    for card in sorted(cards):
        try:
            _, output = run([str(tool), "-i", str(card), "-link", "-g"])
        except (FileNotFoundError, PermissionError):
            return {}
        if status := re.search(r"link status:\s*(\w+)", output):
            found[card] = status.group(1).upper()
    return found


def pins(constraints: str, python: str) -> dict[str, str]:
    """{package: version} of the lines `name==version; python_version < "3.11"` that are for this Python."""
    line = re.compile(r'^([\w.-]+)==([^\s;]+)(?:; python_version (>=|<) "3\.(\d+)")?$', re.M)
    minor = int(python.split(".")[1])
    return {
        name: version
        for name, version, order, border in line.findall(constraints)
        if not order or (minor >= int(border)) == (order == ">=")
    }


def torch_cuda() -> str | None:
    """The CUDA version in torch's own version.py; None without torch, or of one without CUDA."""
    try:
        files = metadata.distribution("torch").locate_file("torch/version.py")
        found = re.search(r"^cuda\b.*=\s*'([\d.]+)'", Path(str(files)).read_text(), re.M)
    except (metadata.PackageNotFoundError, OSError):
        return None
    return found.group(1) if found else None


def package_version(name: str) -> str | None:
    """The version in the package's metadata, without a local part such as +cpu; None where it is not installed."""
    try:
        return metadata.version(name).split("+")[0]
    except metadata.PackageNotFoundError:
        return None


def required_torch(name: str) -> str | None:
    """The version of torch in an installed package's requirements, e.g. "2.13.0"; None where it names none."""
    try:
        requirements = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return None
    for requirement in requirements:
        found = re.match(r"torch\s*\(?==\s*(\d+(?:\.\d+)*)", requirement)
        if found:
            return found.group(1)
    return None


def read_npu_smi(output: str) -> tuple[str | None, list[Card], list[CardProcess]]:
    """(version, cards, processes on them) from what `npu-smi info` prints.

    A card has two lines: number, name and health; then chip, bus address and memory. A card of two chips is shown
    twice, with a health each.
    """
    version = re.search(r"npu-smi\s+(\S+)", output)
    cards, processes = [], []
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        words = cells[0].split()
        if not words or not words[0].isdigit():
            continue
        if len(cells) == 3 and len(words) == 2 and not _BUS_ID.fullmatch(cells[1]):
            cards.append(Card(int(words[0]), words[1], cells[1]))
        elif len(cells) >= 4 and cells[1].isdigit():
            processes.append(CardProcess(int(words[0]), int(cells[1]), cells[2]))
    return (version.group(1) if version else None), cards, processes


def _run(command: list[str]) -> tuple[int, str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return 124, f"{command[0]} gave no answer in 60 s"
    return done.returncode, done.stdout + done.stderr


def _info_value(path: Path, key: str) -> str | None:
    """The value of `key=value` in an Ascend info file; keys differ in case between releases."""
    if not path.is_file():
        return None
    for line in path.read_text(errors="replace").splitlines():
        name, equals, value = line.partition("=")
        if equals and name.strip().lower() == key:
            return value.strip().strip("[]\"'")
    return None


def _find_cann(root: Path, environment: Mapping[str, str]) -> tuple[str | None, str | None]:
    """(version, folder) of the CANN whose environment is set, else of the one in the usual places."""
    named = [environment[name] for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME") if name in environment]
    usual = [
        str(root / folder.lstrip("/"))
        for base in ("/usr/local/Ascend", f"{Path.home()}/Ascend")
        for folder in (f"{base}/cann", f"{base}/ascend-toolkit/latest", f"{base}/nnae/latest")
    ]
    for folder in [*named, *usual]:
        # <folder>/<arch>-linux/ascend_toolkit_install.info, or without the middle folder in nnae
        for pattern in ("*-linux/ascend_toolkit_install.info", "ascend_*_install.info"):
            for path in sorted(Path(folder).glob(pattern)):
                if version := _info_value(path, "version"):
                    return version, folder
    return None, None
