"""One device chosen once, and the torchvision repair, each in the process state a user would meet it in."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common import device

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str) -> str:
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_auto_takes_the_accelerator_that_is_there_else_the_cpu():
    expected = torch.accelerator.current_accelerator(check_available=True)
    assert device.resolve("auto").type == (expected.type if expected else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_an_absent_device_is_an_error_and_never_the_cpu():
    with pytest.raises(device.UsageError, match="--device cuda: .*CUDA"):
        device.resolve("cuda")


@pytest.mark.skipif(hasattr(torch, "npu"), reason="needs a machine without torch_npu")
def test_a_missing_torch_npu_is_named():
    with pytest.raises(device.UsageError, match="torch_npu is not installed"):
        device.resolve("npu")


def test_unknown_device_lists_the_known_ones():
    with pytest.raises(device.UsageError, match="auto, npu, cuda, cpu"):
        device.resolve("gpu")


def test_usage_error_is_one_line_and_exit_status_2():
    code = (
        "from common.errors import UsageError, print_usage_errors\n"
        "@print_usage_errors\n"
        "def main():\n    raise UsageError('the file is not there')\n"
        "main()"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (2, "error: the file is not there\n")


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_computes_in_the_dtype_asked_for(precision, dtype):
    layer = torch.nn.Linear(4, 4)
    with device.autocast(torch.device("cpu"), precision):
        assert layer(torch.ones(2, 4)).dtype == dtype


def test_deterministic_operators_are_asked_for(monkeypatch):
    asked: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    variables: dict[str, str] = {}
    monkeypatch.setattr(device.os, "environ", variables)
    device.deterministic(torch.device("cpu"))
    assert asked == [True] and variables == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "HCCL_DETERMINISTIC": "true"}


def test_seeds_are_mixed_not_added():
    assert device.mix_seed(0, 1) != device.mix_seed(1, 0)
    draws = {torch.rand(1, generator=device.step_generator(7, step, 0)).item() for step in range(50)}
    assert len(draws) == 50
    device.seeded(3, 5, 0)
    first = torch.rand(4)
    device.seeded(3, 5, 0)
    assert torch.equal(first, torch.rand(4))


def test_torchvision_and_timm_work_after_the_repair():
    code = (
        "from common.data.torchvision_repair import repair_torchvision\n"
        "repaired = repair_torchvision()\n"
        "import torch, torchvision, timm\n"
        "from torchvision.transforms import v2\n"
        "from PIL import Image\n"
        "picture = v2.functional.pil_to_tensor(Image.new('RGB', (40, 30), 'red'))\n"
        "print(repaired, tuple(v2.Resize(16)(picture).shape), timm.create_model('vit_tiny_patch16_224').num_classes)"
    )
    repaired, rest = run_python(code).split(" ", 1)
    assert rest == "(3, 16, 21) 1000\n"
    assert repaired in ("True", "False")


def test_a_torchvision_whose_ops_load_is_left_alone():
    code = (
        "import torch\n"
        "loaded = []\n"
        "torch.ops.load_library = loaded.append\n"  # as on a machine where the C++ ops do load
        "from common.data.torchvision_repair import repair_torchvision\n"
        "print(repair_torchvision(), len(loaded), hasattr(torch.ops.torchvision, 'nms'))"
    )
    assert run_python(code) == "False 1 False\n"


def test_graph_mode_is_refused_on_npu_alone():
    with pytest.raises(device.UsageError, match="--torch_compile: torch.compile on npu"):
        device.require_eager(SimpleNamespace(type="npu"), "--torch_compile")
    device.require_eager(torch.device("cpu"), "--torch_compile")
