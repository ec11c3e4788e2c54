"""--dump_precision: statistics of each module, a step of the same bits, and the first place where two runs part."""

import contextlib
import json

import pytest
import torch
from torch import nn

from common.distributed import World
from common.errors import UsageError
from common.profile import precision_compare
from common.profile.precision_dump import PrecisionDump
from common.run_log import RunLog


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.act(self.first(x)))


def train(folder, monkeypatch, dump=True, change=lambda net: None) -> list[float]:
    monkeypatch.setenv("DUMP_PRECISION", "1" if dump else "0")
    torch.manual_seed(0)
    net, x = Net(), torch.randn(6, 4)
    change(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with RunLog(folder, World(), "Net", batch_size=6, total_steps=3, log_every=1) as log:
        losses = []
        for step in range(1, 4):
            optimizer.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            optimizer.step()
            log.step(step, 6, loss.detach(), lr=0.1)
            losses.append(loss.item())
        log.finish()
    return losses


def test_what_is_written_of_the_first_step_alone(tmp_path, monkeypatch, capsys):
    assert train(tmp_path / "a", monkeypatch) == train(tmp_path / "b", monkeypatch, dump=False)
    assert "precision dump:" in capsys.readouterr().out and not (tmp_path / "b" / "dump_precision").exists()
    (path,) = (tmp_path / "a" / "dump_precision").rglob("dump.json")
    assert path.parts[-3:-1] == ("step1", "rank0")
    data = json.loads(path.read_text())["data"]
    ways = [name.split(".", 2)[2] for name in data]
    assert ways[:4] == ["first.Linear.forward.0", "act.GELU.forward.0", "last.Linear.forward.0", "Net.forward.0"]
    assert {"act.GELU.backward.0", "first.Linear.parameters_grad.0"} <= set(ways) and len(ways) == 4 + 4 + 2
    torch.manual_seed(0)
    net, x = Net(), torch.randn(6, 4)
    y = net.first(x)
    entry = data["Module.Net.first.Linear.forward.0"]["output"][0]
    assert entry["shape"] == [6, 8] and entry["dtype"] == "torch.float32"
    expected = [y.max(), y.min(), y.mean(), y.norm()]
    assert [entry[k] for k in ("Max", "Min", "Mean", "Norm")] == pytest.approx([v.item() for v in expected])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda net: setattr(net, "act", nn.GELU("tanh")), "Net.act** (GELU): the result differs by"),
        (lambda net: net.last.register_forward_pre_hook(lambda m, a: a[0].register_hook(lambda g: g * 2) and None),
         "Net.first** (Linear): the gradient of the result"),
        (lambda net: net.last.weight.register_hook(lambda g: g * 1.01), "Net.last.weight** (Linear): the gradient of"),
        (lambda net: net.first.weight.data[0].fill_(float("nan")), "Net.first** (Linear): the result differs by inf"),
    ],
)  # fmt: skip
def test_the_first_place_is_named(tmp_path, monkeypatch, capsys, change, words):
    train(tmp_path / "a", monkeypatch)
    with contextlib.suppress(FloatingPointError):
        train(tmp_path / "b", monkeypatch, change=change)
    page = tmp_path / "page.md"
    assert precision_compare.main([str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(page)]) == 1
    assert "They part first at **" + words in page.read_text()
    train(tmp_path / "c", monkeypatch)
    assert precision_compare.main([str(tmp_path / "a"), str(tmp_path / "c")]) == 0
    assert "The two agree in all" in capsys.readouterr().out


def test_nothing_to_compare_is_one_line(tmp_path, capsys):
    broken = tmp_path / "dump.json"
    broken.write_text("[]")
    for given, words in ((tmp_path, "run with --dump_precision"), (broken, "not a dump.json of --dump_precision")):
        with pytest.raises(SystemExit) as stop:
            precision_compare.main([str(given), str(tmp_path / "other")])
        assert stop.value.code == 2 and words in capsys.readouterr().err


NUMBERS = {"dtype": "torch.float32", "shape": [2], "Max": 1.0, "Min": 0.0, "Mean": 0.5, "Norm": 1.0}


@pytest.mark.parametrize(
    "data",
    [[], {"Module.Net.a.Linear.forward.0": "x"}]
    + [
        {"Module.Net.a.Linear.forward.0": {"output": tensors}}
        for tensors in (
            None,
            [{"Norm": 1.0}],
            [NUMBERS | {"Max": "x"}],
            [NUMBERS | {"shape": ["x"]}],
            [NUMBERS | {"shape": [0]}],
            [{key: NUMBERS[key] for key in ("dtype", "shape", "Norm")}],
        )
    ],
)
def test_an_edited_dump_is_refused_by_name(tmp_path, data):
    path = tmp_path / "dump.json"
    path.write_text(json.dumps({"data": {"Module.Net.a.Linear.forward.0": {"output": [NUMBERS]}}}))
    assert len(precision_compare.read(path)) == 1
    path.write_text(json.dumps({"data": data}))
    with pytest.raises(UsageError, match=r"dump\.json: not a dump\.json of"):
        precision_compare.read(path)


def test_what_could_say_nothing_is_refused(tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    for path in (a, b):
        path.write_text('{"data": {}}')
    for given, words in (
        ([a, a], "A and B are the same dump"),
        ([a, b, "--limit", "nan"], "--limit nan"),
        ([a, b, "--output", tmp_path], "name a file in a folder that exists"),
        ([a, tmp_path / "none"], "none: no such file or folder"),
        ([a, b], "no module is in both"),
    ):
        with pytest.raises(SystemExit) as stop:
            precision_compare.main(list(map(str, given)))
        assert stop.value.code == 2 and words in capsys.readouterr().err


def test_a_dump_outside_a_run_hooks_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("DUMP_PRECISION", "1")
    with PrecisionDump(tmp_path, World(), of_training=False) as dump:
        Net()(torch.zeros(1, 4))
        assert dump.finish(1) is None
    assert not list(tmp_path.iterdir())
