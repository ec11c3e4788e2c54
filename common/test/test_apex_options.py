"""apex's options in torch's words; a stand-in of apex's interface, and PyPI's apex, which is something else."""

import sys

import pytest
import torch

from common.apex_options import ApexScaler, find_apex, gradient_scaler, restore_scale, translate
from common.errors import UsageError
from common.test.apex_stand_in import PACKAGE


@pytest.mark.parametrize(
    ("level", "precision", "expected"),
    [(None, None, None), (None, "bf16", "bf16"), ("O0", None, "fp32"), ("O1", None, "fp16"), ("O2", "fp16", "fp16")],
)
def test_levels_are_precisions(level, precision, expected):
    assert translate(level, precision).precision == expected
    assert bool(translate(level, precision).notes) == (level is not None)


def test_what_means_nothing_is_said_and_what_contradicts_is_refused():
    assert "DDP's buckets" in translate(None, None, combine_grad=True).notes[0]
    assert "parameters stay fp32" in translate("O2", None).notes[0]
    with pytest.raises(UsageError, match="O0, O1, O2 or O3"):
        translate("O4", None)
    with pytest.raises(UsageError, match="O2 is fp16, --precision is bf16"):
        translate("O2", "bf16")


def parameter_and_optimizer():
    weight = torch.nn.Parameter(torch.ones(2))
    return weight, torch.optim.SGD([weight], lr=1.0)


def test_the_unrelated_apex_of_pypi_is_neither_run_nor_used(install_apex):
    install_apex({"__init__.py": "raise SystemExit('foreign code ran')", "lib.py": ""})
    assert find_apex() is None
    with pytest.raises(UsageError, match="no apex.amp is installed"):
        ApexScaler(torch.nn.Linear(1, 1), parameter_and_optimizer()[1])
    with pytest.raises(UsageError, match="no apex.amp is installed"):
        translate("O1", None, backend="apex")
    assert "apex" not in sys.modules


def test_apex_scales_unscales_skips_and_is_saved(install_apex):
    install_apex(PACKAGE)
    assert find_apex().name == "amp"
    weight, optimizer = parameter_and_optimizer()
    scaler = gradient_scaler("apex", torch.nn.Linear(1, 1), optimizer, torch.device("cpu"), "fp32", "128.0")
    assert sys.modules["apex.amp.frontend"].calls == [("O1", 128.0)]

    def step(factor: float) -> None:
        optimizer.zero_grad()
        scaler.scale(weight.sum() * factor).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([weight], 1e6)
        scaler.step(optimizer)
        scaler.update()

    step(float("inf"))
    assert weight.tolist() == [1.0, 1.0]
    step(0.25)
    assert weight.tolist() == [0.75, 0.75]
    assert scaler.is_enabled() and scaler.get_scale() == 128.0
    saved = scaler.state_dict()
    saved["loss_scaler0"]["loss_scale"] = 64.0
    scaler.load_state_dict(saved)
    assert scaler.get_scale() == 64.0


def test_apex_is_for_level_o1_and_casts_alone(install_apex):
    install_apex(PACKAGE)
    mixed = translate("O1", "fp16", backend="apex")
    assert mixed.precision == "fp32" and "apex.amp at O1" in mixed.notes[-1]
    for level, said in ((None, "without --fp16_opt_level"), ("O0", "O0"), ("O2", "O2"), ("O3", "O3")):
        with pytest.raises(UsageError, match=f"{said}: give --fp16_opt_level O1; native does the other levels"):
            translate(level, None, backend="apex")
    with pytest.raises(UsageError, match="O1 is fp16, --precision is bf16"):
        translate("O1", "bf16", backend="apex")


def test_apex_knows_no_shards(install_apex):
    install_apex(PACKAGE)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = torch.nn.Linear(1, 1)
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model.weight = torch.nn.Parameter(torch.distributed.tensor.distribute_tensor(model.weight.data, mesh))
        with pytest.raises(UsageError, match="give --parallel ddp"):
            ApexScaler(model, torch.optim.SGD(model.parameters()))
    finally:
        torch.distributed.destroy_process_group()


def test_the_state_of_the_other_backend_is_left_out(install_apex):
    install_apex(PACKAGE)
    model, (_, optimizer) = torch.nn.Linear(1, 1), parameter_and_optimizer()
    apex, native = (
        gradient_scaler(backend, model, optimizer, torch.device("cpu"), "fp16", "64") for backend in ("apex", "native")
    )
    for scaler, other in ((apex, native), (native, apex)):
        restore_scale(scaler, other.state_dict())
        assert scaler.get_scale() == 64.0
    dynamic = gradient_scaler("native", model, optimizer, torch.device("cpu"), "fp16")
    restore_scale(dynamic, dynamic.state_dict() | {"scale": 32.0})
    assert dynamic.get_scale() == 32.0
