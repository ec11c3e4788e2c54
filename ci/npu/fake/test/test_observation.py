"""What the simulated device says that a card would wait or compile for."""

import pytest
import torch
import torch.nn.functional as F

NPU = torch.device("npu")
VALUES = [3.0, 0.0, 1.0]

WAITS = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "equal": lambda x: torch.equal(x, x),
    "from the host": lambda x: torch.tensor(VALUES, device=NPU),
    "pageable memory": lambda x: torch.ones(3).to(NPU, non_blocking=True),
    "index on the host": lambda x: x[torch.tensor([0, 2])],
    # masked_fill_ with value.item() (IndexPutKernelNpuOpApi.cpp), also of x[mask] = 0.0, which torch puts on the device
    "one value under a mask": lambda x: x.index_put_((x > 0,), torch.zeros((), device=NPU)),
    "a number under a mask": lambda x: x.__setitem__(x > 0, 0.0),
    "synchronize": lambda x: torch.npu.synchronize(),
}
SHAPES = {
    "boolean index": lambda x: x[x > 0],
    "boolean assignment": lambda x: x.index_put_((x > 0,), torch.zeros(2, device=NPU)),
    "nonzero": lambda x: x.nonzero(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
}
FREE = {
    "pinned, non-blocking": lambda x: torch.ones(3).pin_memory().to(NPU, non_blocking=True),
    "back, non-blocking": lambda x: x.to("cpu", non_blocking=True),
    "index": lambda x: x.index_select(0, x.argsort()),
    "mask": lambda x: x.masked_fill(x > 0, 0.0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "number": lambda x: x * 2.0 + torch.tensor(1.0),
    "loss": lambda x: F.mse_loss(x, x * 2),
    "zeros": lambda x: torch.zeros(5, device=NPU),
}


@pytest.mark.parametrize("name", WAITS)
def test_waits_of_the_host_are_seen(name, events):
    x = torch.tensor(VALUES, device=NPU)
    events.clear()
    WAITS[name](x)
    assert {kind for kind, _ in events} == {"host_wait"}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_depend_on_values_are_seen(name, events):
    x = torch.tensor(VALUES, device=NPU)
    events.clear()
    SHAPES[name](x)
    assert "dynamic_shape" in {kind for kind, _ in events}


@pytest.mark.parametrize("name", FREE)
def test_what_costs_nothing_is_not_counted(name, events):
    x = torch.tensor(VALUES, device=NPU)
    events.clear()
    FREE[name](x)
    assert events == []


def test_types_are_seen(events):
    torch.ones(3, device=NPU, dtype=torch.float64).add_(1)
    assert ("float64", "aten::add") in events
    wide = torch.ones(3, 3, device=NPU, dtype=torch.bfloat16)
    wide.gather(0, torch.zeros(1, 3, dtype=torch.int64, device=NPU))
    assert ("undocumented_type", "aten::gather bfloat16") in events
