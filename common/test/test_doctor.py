"""The doctor on this machine, and on hosts that are broken in the ways that users report."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ci.npu import fake as fake_npu
from common import doctor
from common.doctor.facts import CANN_PACKAGES, Card, CardProcess, Facts, gather, read_npu_smi

ROOT = Path(__file__).resolve().parents[2]
TABLE = json.loads(doctor.TABLE.read_text())
WANTED = TABLE["sets"][0]
HEAD = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 25.5.2                   Version: 25.5.2                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
"""
TWO_CARDS = (
    HEAD
    + """\
| 0     910B2               | OK            | 99.0        36                0    / 0             |
| 0                         | 0000:C2:00.0  | 0           0    / 0          3454 / 65536         |
+===========================+===============+====================================================+
| 1     910B2               | Alarm         | 86.9        36                0    / 0             |
| 0                         | 0000:81:00.0  | 0           0    / 0          3447 / 65536         |
+===========================+===============+====================================================+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| 0       0                 | 632268        | python3.1                | 197                     |
| No running processes found in NPU 1                                                            |
"""
)
TWO_CHIPS = (
    HEAD
    + """\
| 6     Ascend910           | OK            | 192.1       37                0    / 0             |
| 0     12                  | 0000:85:00.0  | 0           0    / 0          3410 / 65536         |
+------------------------------------------------------------------------------------------------+
| 6     Ascend910           | Warning       | -           36                0    / 0             |
| 1     13                  | 0000:87:00.0  | 0           0    / 0          3203 / 65536         |
"""
)


def host(**changes) -> Facts:
    """A sound Ascend host, with changes."""
    sound = {
        "python": "3.11.9",
        "machine": "aarch64",
        "packages": dict.fromkeys(CANN_PACKAGES, "1.0") | {"torch": "2.13.0", "torchvision": "0.28.0"},
        "driver": "25.5.2",
        "firmware": "7.8.0.7.220",
        "cann": "9.1.0",
        "cann_folder": "/usr/local/Ascend/cann",
        "npu_smi": "25.5.2",
        "cards": [Card(0, "910B2", "OK"), Card(1, "910B2", "OK")],
        "environment": {"ASCEND_HOME_PATH": "/usr/local/Ascend/cann"},
    }
    packages = sound["packages"] | {"torch_npu": "2.13.0"} | changes.pop("packages", {})
    return Facts(**sound | changes | {"packages": packages})


def wrong(facts: Facts, device: str = "auto") -> list[doctor.Line]:
    return [line for line in doctor.diagnose(facts, TABLE, device, []) if line.verdict == doctor.WRONG]


def test_a_sound_ascend_host_is_good():
    assert wrong(host()) == []


@pytest.mark.parametrize(
    ("changes", "text", "remedy"),
    [
        ({"python": "3.8.18"}, "Python 3.8.18", "make install PYTHON=python3.11"),
        ({"packages": {"torch": None}}, "torch is not installed", "torch==2.13.0"),
        ({"packages": {"torchvision": "0.24.0"}}, "torchvision 0.24.0", "torchvision==0.28.0"),
        ({"packages": {"torch_npu": None}}, "torch_npu is not installed", "torch_npu==2.13.0"),
        # vllm-project/vllm-ascend#340: torch_npu of another release
        ({"packages": {"torch_npu": "2.5.1"}}, "torch_npu 2.5.1", "torch_npu==2.13.0"),
        ({"torch_required": {"torch_npu": "2.12.0"}}, "built for torch 2.12.0, here is 2.13.0", "pip install"),
        # vllm-project/vllm-ascend#11928, Ascend/pytorch#99: CANN older than torch_npu
        ({"cann": "8.3.RC1"}, "CANN 8.3.RC1: torch_npu 2.13.0 needs 9.1.0", "Ascend-cann-toolkit_9.1.0_linux-aarch64"),
        ({"cann": None, "cann_folder": None}, "CANN: none found", "--install"),
        ({"driver": None, "npu_smi": None}, "driver: none found", "--full"),
        ({"npu_smi_error": "dcmi model initialized failed, ret is -8005"}, "-8005", "driver"),
        ({"cards": []}, "cards: none", "--device=/dev/davinci0"),
        ({"cards": [Card(1, "910B2", "Alarm")]}, "card 1: 910B2, health Alarm", "npu-smi info -t health -i 1"),
        ({"closed_nodes": ["/dev/davinci0"]}, "/dev/davinci0", "HwHiAiUser"),
        # Ascend/pytorch#7, flagos-ai/FlagGems#5708
        ({"packages": {"attrs": None, "scipy": None}}, "missing: attrs, scipy", "pip install attrs scipy"),
        # vllm-project/vllm-ascend#10227, agentscope-ai/Trinity-RFT#618
        ({"environment": {"ASCEND_RT_VISIBLE_DEVICES": "0,2"}}, "only 2 cards", "=0,1"),
        ({"environment": {"ASCEND_RT_VISIBLE_DEVICES": "1,0"}}, "must ascend", "=0,1"),
        ({"environment": {"ASCEND_RT_VISIBLE_DEVICES": "all"}}, "not numbers", "=0,1"),
        ({"shm_bytes": 64 << 20}, "/dev/shm has 64 MiB", "docker run --shm-size=16g"),
        ({"cards": [Card(0, "310P3", "OK")]}, "310P3 is an inference card", "Atlas A2"),
    ],
)
def test_the_wrong_line_is_named_with_its_remedy(changes, text, remedy):
    lines = wrong(host(**changes))
    assert any(text in line.text and remedy in line.remedy for line in lines), lines
    assert len(lines) <= 2, "one broken thing does not make everything wrong"


def test_generation_and_links_are_told():
    def notes(**changes) -> list[str]:
        lines = doctor.diagnose(host(**changes), TABLE, "auto", [])
        return [f"{line.text} {line.remedy}" for line in lines if line.verdict == doctor.NOTE]

    for name, first in (
        ("910A", 1),
        ("Ascend910ProB", 1),
        ("910B", 1),
        ("910B2", 0),
        ("Ascend910", 0),
        ("910_9392", 0),
    ):
        told = [text for text in notes(cards=[Card(0, name, "OK")]) if "Atlas training series: no bf16" in text]
        assert len(told) == first and all("--precision=fp16" in text for text in told), name
    assert any("card 1 is down" in text and "hccn_tool -i 1" in text for text in notes(links={0: "UP", 1: "DOWN"}))
    assert not any("network link" in text for text in notes(links={0: "UP", 1: "UP"}))


NVIDIA = "| NVIDIA-SMI 580.65.06    Driver Version: 580.65.06      CUDA Version: 13.0     |\n"


@pytest.mark.parametrize(
    ("changes", "text", "remedy"),
    [
        ({"nvidia_smi": None}, "no nvidia-smi", "docker run --gpus all"),
        ({"nvidia_smi": "Failed to initialize NVML: Driver/library version mismatch\n"}, "version mismatch", "reboot"),
        ({"nvidia_smi": NVIDIA, "torch_cuda": None}, "torch 2.13.0 is built without CUDA",
         "pip install torch==2.13.0 torchvision==0.28.0 --force-reinstall"),
        ({"nvidia_smi": NVIDIA.replace("13.0", "12.4"), "torch_cuda": "13.0"}, "the driver knows CUDA 12.4", "cu126"),
        ({"nvidia_smi": NVIDIA, "torch_cuda": "13.0", "shm_bytes": 1 << 20}, "/dev/shm has 1 MiB", "--shm-size"),
        ({"nvidia_smi": NVIDIA, "torch_cuda": "13.0"}, None, None),
    ],
)  # fmt: skip
def test_a_cuda_host_gets_the_command_that_mends_it(changes, text, remedy):
    plain = {"driver": None, "cann": None, "cann_folder": None, "npu_smi": None, "cards": [], "environment": {}}
    lines = wrong(host(**plain, packages={"torch_npu": None}, **changes), "cuda")
    assert [(text in line.text, remedy in line.remedy) for line in lines] == ([(True, True)] if text else [])


def test_versions_beside_the_pinned_ones_and_absent_packages_are_told():
    pinned = {"torch": "2.13.0", "timm": "1.0.31", "numpy": "2.4.6", "tqdm": "4.70.1"}
    needed = {"ViT_for_PyTorch": ["torch", "timm", "tqdm"], "CLIP_for_PyTorch": ["numpy"]}
    installed = {"torch": None, "timm": "1.0.30", "numpy": "2.4.6", "tqdm": None}
    lines = doctor.diagnose(host(pinned=pinned, needed=needed, installed=installed), TABLE, "npu", [])
    text = "\n".join(map(str, lines))
    assert "timm 1.0.30 (pinned: 1.0.31)\n         -> pip install -c constraints.txt timm\n" in text
    assert "ViT_for_PyTorch lacks tqdm\n         -> pip install -r ViT_for_PyTorch/requirements.txt\n" in text
    assert "CLIP_for_PyTorch" not in text and wrong(host(pinned=pinned, needed=needed, installed=installed)) == []


def test_the_packages_here_are_the_pinned_ones():
    """What the tests say, they say of these versions."""
    facts = gather()
    assert (
        len(facts.pinned) > 30 and all("torch" in names for names in facts.needed.values()) and len(facts.needed) == 4
    )
    other = {name: have for name, have in facts.installed.items() if have not in (None, facts.pinned[name])}
    assert other == {}, "pip install -c constraints.txt with their names"


def test_numpy_2_is_refused_by_an_old_cann_only():
    assert any("numpy 2.0.2" in line.text for line in wrong(host(cann="8.2.RC1", packages={"numpy": "2.0.2"})))
    assert wrong(host(packages={"numpy": "2.4.6"})) == []


def test_the_published_set_of_a_host_is_recognised():
    packages = {"torch": "2.1.0", "torchvision": "0.16.0", "torch_npu": "2.1.0.post20231115"}
    versions = {"python": "3.8.18", "driver": "23.0.RC3.1", "firmware": "6.4.0.5.220", "packages": packages}
    lines = doctor.diagnose(host(**versions, cann="7.0.0.alpha002"), TABLE, "auto", [])
    assert any(line.text == "this is the published set 'BEiT v2 in Ascend ModelZoo (November 2023)'" for line in lines)
    assert {"Python", "torch", "torchvision", "torch_npu", "CANN"} <= {
        line.text.split()[0] for line in lines if line.verdict == doctor.WRONG
    }
    old = doctor.diagnose(host(packages={"torch": "1.8.1"}), TABLE, "auto", [])
    assert any("PyTorch 1.8'" in line.text for line in old)
    strayed = doctor.diagnose(host(**versions, cann="8.0.0"), TABLE, "auto", [])
    assert any("but cann 8.0.0 (there: 7.0.0.alpha002)" in line.text for line in strayed)


def test_the_table_agrees_with_the_pinned_versions():
    pinned = dict(
        line.split(";")[0].split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    assert (WANTED["torch"], WANTED["torchvision"]) == (pinned["torch"], pinned["torchvision"])
    assert all(entry["name"] and entry["source"] for entry in TABLE["sets"])


@pytest.mark.parametrize(
    ("error", "cause", "remedy"),
    [
        ("ImportError: libhccl.so: cannot open shared object file: No such file", "not found", "source /usr/local"),
        (
            "OSError: /home/a/Ascend/nnal/atb/latest/atb/cxx_abi_1/lib/libtbe_adapter.so: undefined symbol: _ZN3Mki2",
            "NNAL",
            "Ascend-cann-nnal",
        ),
        ("ImportError: /a/torch_npu/lib/libtorch_npu.so: undefined symbol: _ZN3c10", "another torch or CANN", "pip"),
        ("RuntimeError: NPU function error: AclSetCompileopt(), error code is 500001\n[ERROR] x", "missing", "attrs"),
        ("EJ0001: Failed to initialize HCCP: last training process is running", "holds the card", "kill PID"),
        (
            "RuntimeError: EI0006: Getting socket times out. Reason: Remote Rank did not send",
            "did not meet",
            "hccn_tool",
        ),
        ("AttributeError: module 'torch_npu' has no attribute '_npu_flash_attention'", "not a pair", "torch_npu=="),
        ("RuntimeError: Two accelerators cannot be used at the same time in PyTorch: npu and cuda", "another", "cpu"),
    ],
)
def test_errors_that_users_report_are_explained(error, cause, remedy):
    text, advice = doctor.explain(f"Traceback\n{error}\n", host(), WANTED)
    assert cause in text and remedy in advice
    assert error.splitlines()[0][:40] in text


def test_npu_smi_is_read_for_one_and_two_chip_cards():
    version, cards, processes = read_npu_smi(TWO_CARDS)
    assert (version, cards) == ("25.5.2", [Card(0, "910B2", "OK"), Card(1, "910B2", "Alarm")])
    assert processes == [CardProcess(0, 632268, "python3.1")]
    assert [(card.number, card.health) for card in read_npu_smi(TWO_CHIPS)[1]] == [(6, "OK"), (6, "Warning")]


def test_the_files_of_driver_and_cann_are_read(tmp_path):
    files = {
        "usr/local/Ascend/driver/version.info": "Version=25.5.2\nascendhal_version=7.35.23\n",
        "usr/local/Ascend/firmware/version.info": "Version=7.8.0.7.220\nfirmware_version=1.0\n",
        "usr/local/Ascend/ascend-toolkit/latest/aarch64-linux/ascend_toolkit_install.info": (
            "package_name=Ascend-cann-toolkit\nversion=8.3.RC1\ninnerversion=V100R001C23\narch=aarch64\n"
        ),
        "dev/davinci0": "",
        "dev/davinci_manager": "",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    facts = gather(tmp_path, lambda command: (0, TWO_CARDS), environment={})
    assert (facts.driver, facts.firmware, facts.cann) == ("25.5.2", "7.8.0.7.220", "8.3.RC1")
    assert facts.device_nodes == [str(tmp_path / "dev/davinci0")] and len(facts.cards) == 2
    assert doctor.set_env(facts) == str(tmp_path / "usr/local/Ascend/ascend-toolkit/set_env.sh")
    assert gather(tmp_path, lambda command: (255, "dcmi failed\n"), environment={}).npu_smi_error == "dcmi failed"


def test_it_runs_on_the_python_of_old_hosts():
    for name in ("__init__.py", "facts.py"):
        source = (ROOT / "common" / "doctor" / name).read_text()
        tree = ast.parse(source, feature_version=(3, 8))
        assert "from __future__ import annotations" in source  # list[str] is evaluated otherwise
        assert "removesuffix" not in source and "removeprefix" not in source
        merges = [n for n in ast.walk(tree) if isinstance(n, ast.BinOp) and isinstance(n.op, ast.BitOr)]
        assert not any(isinstance(side, ast.Dict) for n in merges for side in (n.left, n.right))


def run_doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "common.doctor", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def test_this_machine_is_good_by_matrix_product_and_all_reduce():
    done = run_doctor("--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "good   2x2 product on cpu" in done.stdout and "good   all-reduce of 2 ranks on cpu" in done.stdout


def test_torch_npu_without_cann_breaks_torch_and_is_named(tmp_path):
    (tmp_path / "torch_npu").mkdir()
    missing = "libhccl.so: cannot open shared object file: No such file or directory"
    (tmp_path / "torch_npu" / "__init__.py").write_text(f"raise ImportError({missing!r})\n")
    metadata = tmp_path / "torch_npu-2.9.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.9.0\n")
    (metadata / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    (tmp_path / "npu-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{TWO_CARDS}END\n")
    (tmp_path / "npu-smi").chmod(0o755)
    without_cards = run_doctor(PYTHONPATH=str(tmp_path))
    assert without_cards.returncode == 1
    assert "torch_npu 2.9.0 on a host without Ascend driver" in without_cards.stdout
    assert "pip uninstall -y torch_npu" in without_cards.stdout

    with_cards = run_doctor(PYTHONPATH=str(tmp_path), PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert with_cards.returncode == 1
    for text in (
        missing,
        "CANN's libraries are not found",
        "health Alarm",
        "held by process 632268",
        "torch_npu 2.9.0",
    ):
        assert text in with_cards.stdout


def test_a_failing_all_reduce_is_wrong(monkeypatch):
    found = '{"device": "npu", "name": "Ascend910B2", "count": 2}'
    error = "RuntimeError: EI0006: Getting socket times out\n"

    def probe(facts, test, device, ranks):
        return [(0, f"CANN environment: x\n{found}\n", "")] if test == "product" else [(0, "{}", ""), (1, "", error)]

    monkeypatch.setattr(doctor, "probe", probe)
    lines, device = doctor.run_tests(host(), WANTED, "npu")
    assert device["count"] == 2 and [line.verdict for line in lines] == [doctor.GOOD, doctor.WRONG]
    assert "all-reduce of 2 ranks on npu: RuntimeError: EI0006" in lines[1].text


@pytest.mark.skipif(fake_npu.why_missing() is not None, reason=str(fake_npu.why_missing()))
def test_a_simulated_npu_is_good_and_called_so():
    done = run_doctor("--device", "npu", **fake_npu.environment())
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("the npu is a simulated one", "2x2 product on npu (", "2 visible)", "all-reduce of 2 ranks on npu"):
        assert text in done.stdout
