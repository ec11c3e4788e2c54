"""--replay: files that are none are refused in a sentence; the first layer of any rank that is not finite is named."""

import json
import re

import pytest
import torch
from torch import nn

from common.distributed import World
from common.errors import UsageError
from common.run import replay
from common.run_log import RunLog
from common.update import GuardedStep, LossScale

GOOD = {"step": 2, "ranks": {"0": ["a", "b"]}, "world_size": 1, "place": {"epoch": 1}}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"step": 0}, "not the replay.json of a run"),
        ({"place": {"epoch": 2**40}}, "out of range"),
        ({"step": "2"}, "not the replay.json of a run"),
        ({"ranks": ["a"]}, "not the replay.json of a run"),
        ({"ranks": {"0": [1]}}, "a sample's name is no text"),
        ({"place": {}}, "'epoch'"),
        ({"world_size": 2}, "of a run on 2 ranks, this one has 1"),
        ({"step": 6}, "of step 6, this run ends after 5"),
    ],
)
def test_another_file_is_refused_by_name(tmp_path, change, words):
    path = tmp_path / "replay.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(UsageError, match=f"--replay {path}: .*{words}"):
        replay.read(path, 5, place=["epoch"])
    with pytest.raises(UsageError, match="No such file"):
        replay.read(tmp_path / "other.json", 5)


@pytest.mark.parametrize(
    "bias, words",
    [
        (0.0, "finite, the loss is "),
        (float("inf"), "not finite again, .*first output that is not finite: 1.1 on rank 0"),
    ],
)
def test_the_innermost_first_layer_is_named_and_nothing_is_updated(tmp_path, bias, words):
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 1)))
    model[1][1].bias.data.fill_(bias)
    before = [p.detach().clone() for p in model.parameters()]
    (tmp_path / "replay.json").write_text(json.dumps(GOOD))
    step = GuardedStep(torch.optim.SGD(model.parameters(), 1.0), model.parameters(), LossScale(False))

    def attempt():
        step.remember(2, ["a", "b"])
        loss = model(torch.ones(4, 2)).square().mean()
        loss.backward()
        return loss

    with RunLog(tmp_path, World(), "Net_replay", 2, evaluation=True) as log:
        found = replay.run(replay.read(tmp_path / "replay.json", 5), log, model, step, attempt)["Replay"]
    assert re.match(words, found) and f"Replay = {found}" in (tmp_path / "Net_replay_bs2_1p_acc.log").read_text()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
