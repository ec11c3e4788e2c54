"""Says what is wrong with this host, line by line, and the command that mends it: `make doctor`.

    python -m common.doctor [--device auto|npu|cuda|cpu]

Prints the versions of Python, torch, torchvision, torch_npu, CANN, driver and firmware and the cards with their
health, generation and links, the size of /dev/shm and NVIDIA's driver, compares them with known_good_sets.json,
multiplies two matrices on the device and lets two ranks meet.
Exit code: 0 all good, 1 something is wrong, 2 a wrong command line. It runs without torch, which only the tests import,
and on Python 3.8, of which it then says that it is too old.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.doctor import host
from common.doctor.facts import CANN_PACKAGES, Facts, gather
from common.doctor.report import GOOD, NOTE, WRONG, Line, install_torch, release

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("known_good_sets.json")


# What a failing import or operator prints -> its cause, and the remedy, with the reports it was taken from.
SYMPTOMS = (
    # vllm-project/vllm-ascend#117, Ascend/pytorch#99
    (r"undefined symbol.*(atb|Mki)|/(atb|nnal)/.*undefined symbol", "NNAL (ATB) is of another CANN than torch_npu",
     "install Ascend-cann-nnal in CANN's version, then source its set_env.sh"),
    (r"undefined symbol", "torch_npu was built for another torch or CANN", "{install_torch_npu}"),
    (r"lib(hccl|ascendcl|acl_op_compiler|ge_runner|graph)\.so: cannot open", "CANN's libraries are not found",
     "source {set_env}"),
    (r"libascend_hal\.so|drvErr|drvRetCode|dcmi", "the driver does not answer", "npu-smi info; reinstall the driver"),
    # hiyouga/LlamaFactory#3839
    (r"EJ0001|last training process is running", "another process still holds the card",
     "npu-smi info lists it; end it with kill PID"),
    # Ascend/pytorch#48: most often the consequence of another rank's end
    (r"EI000[26]|socket times out", "the ranks did not meet: one ended before, or the cards' network is down",
     "read the log of the rank that ended first; hccn_tool -i 0 -link -g"),
    # Ascend/pytorch#7, flagos-ai/FlagGems#5708: the compiler's own import error is swallowed
    (r"\b500001\b|AclSetCompileopt|E10001|E40021", "CANN's operator compiler did not start: often a missing package",
     "pip install {cann_packages}"),
    (r"Two accelerators cannot be used at the same time", "torch is built for another accelerator",
     "{install_torch_npu}"),
    # vllm-project/vllm-ascend#340
    (r"module 'torch(_npu|\.npu)?' has no attribute", "torch and torch_npu are not a pair", "{install_torch_npu}"),
    (r"operator torchvision::nms does not exist", "torchvision was built for another torch", "{install_torch}"),
)  # fmt: skip


def diagnose(
    facts: Facts, table: dict[str, Any], device: str, tests: list[Line], simulated: bool = False
) -> list[Line]:
    """The whole report.

    Args:
        facts: what is installed.
        table: content of known_good_sets.json.
        device: what was asked for: auto, npu, cuda or cpu.
        tests: lines of the tests that were run.
        simulated: an npu answered on a host without anything of Ascend.
    """
    wanted = next(entry for entry in table["sets"] if entry.get("supported"))
    lines = [*check_python(facts, wanted), *check_torch(facts, wanted, device), *host.check_packages(facts)]
    if simulated:
        lines.append(Line(NOTE, "the npu is a simulated one: this host has no driver, no CANN and no card"))
    elif facts.has_ascend or device == "npu":
        # in the order in which they have to be mended
        lines += [*check_driver(facts), *check_cards(facts), *check_cann(facts, wanted, table)]
        lines += [*check_torch_npu(facts, wanted), *check_cann_packages(facts)]
        lines += [*host.check_generation(facts), *host.check_links(facts)]
    else:
        lines += check_no_ascend(facts)
    lines += host.check_cuda(facts, wanted, device)
    lines += host.check_shared_memory(facts, has_card=facts.has_ascend or device == "cuda")
    return [*lines, *nearest_set(facts, table, wanted), *tests]


def check_python(facts: Facts, wanted: dict[str, Any]) -> Iterator[Line]:
    known = wanted["python"]
    if facts.python.rsplit(".", 1)[0] in known:
        yield Line(GOOD, f"Python {facts.python}, {facts.machine}")
    else:
        text = f"Python {facts.python}: torch {wanted['torch']} and the code here need {known[0]} to {known[-1]}"
        yield Line(WRONG, text, "make install PYTHON=python3.11")


def check_torch(facts: Facts, wanted: dict[str, Any], device: str) -> Iterator[Line]:
    install = install_torch(wanted, "npu" if facts.has_ascend else device)
    for name in ("torch", "torchvision"):
        have, need = facts.packages[name], wanted[name]
        required, torch = facts.torch_required.get(name), facts.packages["torch"]
        if have is None:
            yield Line(WRONG, f"{name} is not installed", install)
        elif have != need:
            yield Line(WRONG, f"{name} {have}: constraints.txt has {need}", install)
        elif required and torch and required != torch:
            yield Line(WRONG, f"{name} {have} is built for torch {required}, here is {torch}", install)
        else:
            yield Line(GOOD, f"{name} {have}")


def check_torch_npu(facts: Facts, wanted: dict[str, Any]) -> Iterator[Line]:
    have, known, required = facts.packages["torch_npu"], wanted["torch_npu"], facts.torch_required.get("torch_npu")
    if have is None:
        yield Line(WRONG, "torch_npu is not installed", install_torch_npu(wanted))
    elif required and facts.packages["torch"] and required != facts.packages["torch"]:
        text = f"torch_npu {have} is built for torch {required}, here is {facts.packages['torch']}"
        yield Line(WRONG, text, install_torch_npu(wanted))
    elif have not in known:
        yield Line(WRONG, f"torch_npu {have}: the code here is checked with {known[0]}", install_torch_npu(wanted))
    else:
        yield Line(GOOD, f"torch_npu {have}")


def check_cann(facts: Facts, wanted: dict[str, Any], table: dict[str, Any]) -> Iterator[Line]:
    torch_npu = facts.packages["torch_npu"]
    # a torch_npu that is to be replaced does not say which CANN is needed
    published = table["cann_of_torch_npu"].get(torch_npu) if torch_npu in wanted["torch_npu"] else None
    need = published or wanted["cann_at_least"]
    install = (
        f"bash Ascend-cann-toolkit_{need}_linux-{facts.machine}.run --install (from https://www.hiascend.com/cann)"
    )
    if facts.cann is None:
        yield Line(WRONG, f"CANN: none found in /usr/local/Ascend or {Path.home()}/Ascend", install)
        return
    if release(facts.cann) < release(need):
        yield Line(WRONG, f"CANN {facts.cann}: torch_npu {wanted['torch_npu'][0]} needs {need} or newer", install)
    else:
        yield Line(GOOD, f"CANN {facts.cann} in {facts.cann_folder}")
    if not {"ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"} & set(facts.environment):
        text = "CANN's environment is not set in this shell; test/*.sh and the tests below set it themselves"
        yield Line(NOTE, text, f"source {set_env(facts)}")


def check_driver(facts: Facts) -> Iterator[Line]:
    if facts.npu_smi_error:
        remedy = "as root: reload or reinstall the driver; in a container: start it with the driver and /dev/davinci*"
        yield Line(WRONG, f"npu-smi info fails: {facts.npu_smi_error}", remedy)
    if facts.driver or facts.npu_smi:
        yield Line(GOOD, f"driver {facts.driver or facts.npu_smi}, firmware {facts.firmware or 'unknown'}")
    else:
        driver = f"bash Ascend-hdk-CHIP-npu-driver_VERSION_linux-{facts.machine}.run --full"
        source = "from https://www.hiascend.com/hardware/firmware-drivers"
        yield Line(WRONG, "driver: none found (no /usr/local/Ascend/driver, no npu-smi)", f"{driver} ({source})")


def check_cards(facts: Facts) -> Iterator[Line]:
    if not facts.cards and not facts.device_nodes:
        yield Line(WRONG, "cards: none (no /dev/davinci*)", "in a container: docker run --device=/dev/davinci0 ...")
    for card in facts.cards:
        if card.health == "OK":
            yield Line(GOOD, f"card {card.number}: {card.name}, health OK")
        else:
            text = f"card {card.number}: {card.name}, health {card.health}"
            yield Line(WRONG, text, f"npu-smi info -t health -i {card.number}; train on the other cards until it is OK")
    for held in facts.processes:
        text = f"card {held.card} is held by process {held.pid} ({held.name}): training there may fail with EJ0001"
        yield Line(NOTE, text, f"kill {held.pid}, if it is a left-over of yours")
    if facts.closed_nodes:
        text = f"{', '.join(facts.closed_nodes)}: this user may not open them"
        yield Line(WRONG, text, "sudo usermod -a -G HwHiAiUser $USER, then log in again")
    yield from check_visible_devices(facts)


def check_visible_devices(facts: Facts) -> Iterator[Line]:
    """CANN drops wrong ids without a word (vllm-ascend#10227) and wants them ascending (Trinity-RFT#618)."""
    value = facts.environment.get("ASCEND_RT_VISIBLE_DEVICES")
    count = len(facts.cards) or len(facts.device_nodes)
    if value is None or count == 0:
        return
    remedy = f"export ASCEND_RT_VISIBLE_DEVICES={','.join(str(i) for i in range(count))}"
    words = value.split(",")
    ids = [int(word) for word in words if word.strip().isdigit()]
    if len(ids) != len(words):
        yield Line(WRONG, f"ASCEND_RT_VISIBLE_DEVICES={value}: not numbers separated by commas", remedy)
    elif max(ids) >= count:
        yield Line(WRONG, f"ASCEND_RT_VISIBLE_DEVICES={value}, but there are only {count} cards", remedy)
    elif ids != sorted(set(ids)):
        yield Line(WRONG, f"ASCEND_RT_VISIBLE_DEVICES={value}: ids must ascend", remedy)


def check_cann_packages(facts: Facts) -> Iterator[Line]:
    missing = [name for name in CANN_PACKAGES if facts.packages[name] is None]
    if missing:
        text = f"Python packages that CANN's operator compiler imports are missing: {', '.join(missing)}"
        yield Line(WRONG, text, f"pip install {' '.join(missing)}")
    else:
        yield Line(GOOD, "Python packages of CANN's operator compiler: all there")
    numpy = facts.packages["numpy"]
    if numpy and facts.cann and release(numpy) >= (2,) and release(facts.cann) < (8, 3):  # vllm-ascend#2210
        yield Line(WRONG, f"numpy {numpy}: CANN {facts.cann} fails with 500001 on numpy 2", 'pip install "numpy<2"')


def check_no_ascend(facts: Facts) -> Iterator[Line]:
    if facts.packages["torch_npu"] is None:
        yield Line(NOTE, "no Ascend driver, CANN or card on this host: the npu lines are left out")
    else:
        text = f"torch_npu {facts.packages['torch_npu']} on a host without Ascend driver and CANN: `import torch` fails"
        yield Line(WRONG, text, "pip uninstall -y torch_npu; on an Ascend host install the driver and CANN first")


def nearest_set(facts: Facts, table: dict[str, Any], wanted: dict[str, Any]) -> Iterator[Line]:
    """The published set this host was built from, when it is not the current one, and where it strays from it."""
    have = {
        "python": facts.python.rsplit(".", 1)[0],
        "cann": facts.cann,
        "driver": facts.driver,
        "firmware": facts.firmware,
        **{name: facts.packages[name] for name in ("torch", "torchvision", "torch_npu")},
    }
    for entry in table["sets"]:
        if entry is wanted or "torch" not in entry or not f"{have['torch']}.".startswith(f"{entry['torch']}."):
            continue
        strays = []
        for name, value in have.items():
            known = entry.get(name)
            known = [known] if isinstance(known, str) else known
            if known and name != "torch" and str(value).lower() not in [text.lower() for text in known]:
                strays.append(f"{name} {value} (there: {known[0]})")
        yield Line(
            NOTE, f"this is the published set '{entry['name']}'" + (", but " + ", ".join(strays) if strays else "")
        )


def install_torch_npu(wanted: dict[str, Any]) -> str:
    """torch without CUDA first: torch_npu refuses to stand beside another accelerator."""
    return f"{install_torch(wanted, 'npu')} && pip install torch_npu=={wanted['torch_npu'][0]}"


def set_env(facts: Facts) -> str:
    folder = facts.cann_folder or "/usr/local/Ascend/cann"
    return re.sub("/latest$", "", folder) + "/set_env.sh"


def explain(error: str, facts: Facts, wanted: dict[str, Any]) -> tuple[str, str]:
    """(the error's last line and its likely cause, what to do about it)."""
    lines = [line.strip() for line in error.strip().splitlines() if line.strip()]
    last = lines[-1] if lines else "no output"
    words = {
        "install_torch": install_torch(wanted),
        "install_torch_npu": install_torch_npu(wanted),
        "set_env": set_env(facts),
        "cann_packages": " ".join(CANN_PACKAGES),
    }
    for pattern, cause, remedy in SYMPTOMS:
        found = next((line for line in reversed(lines) if re.search(pattern, line)), None)
        if found:
            return f"{found} [{cause}]", remedy.format(**words)
    return last, ""


def run_tests(facts: Facts, wanted: dict[str, Any], device: str) -> tuple[list[Line], dict[str, Any]]:
    """The two tests' lines, and what the first found out about the device."""
    code, output, error = probe(facts, "product", device, [{}])[0]
    if code != 0:
        text, remedy = explain(error, facts, wanted)
        return [Line(WRONG, f"2x2 product on {device}: {text}", remedy)], {}
    found = json.loads(output.strip().splitlines()[-1])
    lines = [Line(GOOD, f"2x2 product on {found['device']} ({found['name']}, {found['count']} visible)")]
    where = found["device"] if found["count"] > 1 else "cpu"
    if where != found["device"]:
        lines.append(Line(NOTE, f"one {found['device']} is visible: the two ranks meet on the CPU"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [{**meeting, "RANK": str(r), "LOCAL_RANK": str(r), "LOCAL_WORLD_SIZE": "2"} for r in range(2)]
    failed = [done for done in probe(facts, "all_reduce", where, ranks) if done[0] != 0]
    if failed:
        text, remedy = explain(failed[0][2], facts, wanted)
        lines.append(Line(WRONG, f"all-reduce of 2 ranks on {where}: {text}", remedy))
    else:
        lines.append(Line(GOOD, f"all-reduce of 2 ranks on {where}"))
    return lines, found


def probe(facts: Facts, test: str, device: str, variables: list[dict[str, str]]) -> list[tuple[int, str, str]]:
    """Runs common/doctor/probe.py, one process for each set of variables, in the environment that test/*.sh have.

    Returns:
        (exit code, stdout, stderr) of each; 124 for one that did not end in three minutes.
    """
    command = [sys.executable, "-m", "common.doctor.probe", test, "--device", device]
    if facts.has_ascend and os.environ.get("etp_running_flag") != "true":
        command = ["bash", "-c", 'source common/launch/env_npu.sh && exec "$@"', "bash", *command]
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **own}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for own in variables
    ]
    results = []
    for rank in ranks:
        try:
            output, error = rank.communicate(timeout=180)
            results.append((rank.returncode, output, error))
        except subprocess.TimeoutExpired:
            rank.kill()
            results.append((124, "", f"{rank.communicate()[1]}\nno answer in 180 s"))
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "npu", "cuda", "cpu"), default="auto", help="what is to work")
    options = parser.parse_args(argv)
    table = json.loads(TABLE.read_text())
    wanted = next(entry for entry in table["sets"] if entry.get("supported"))
    facts = gather()
    tests, found = run_tests(facts, wanted, options.device)
    simulated = found.get("device") == "npu" and not facts.has_ascend
    lines = diagnose(facts, table, options.device, tests, simulated)
    print(*lines, sep="\n")
    wrong = sum(line.verdict == WRONG for line in lines)
    print("all good" if not wrong else f"{wrong} wrong: start with the first")
    return 1 if wrong else 0
