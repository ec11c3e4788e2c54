"""The plain step that the benchmark compares with is the reference's: it equals the goldens."""

import contextlib

import numpy as np
import pytest
import torch

from ci.peers import data2vec_plain
from data2vec import build_model, cosine_lr, ema_decay_at


def part(data, prefix):
    return {key.removeprefix(prefix): torch.from_numpy(data[key]) for key in data.files if key.startswith(prefix)}


def test_plain_step_equals_goldens(golden, model_info):
    data, info = np.load(golden / "model_base.npz"), model_info["base"]
    model = build_model(info["cfg_model"], 169)
    model.load_state_dict(part(data, "init/"))
    optimizer = data2vec_plain.PlainAdam(model.parameters())
    for number, expected in enumerate(info["steps"][:3]):
        batch = part(data, f"batch{number}/")
        loss, norm = data2vec_plain.step(
            model.train(),
            optimizer,
            (batch["src_tokens"], batch["target_tokens"]),
            168,
            cosine_lr(number, 0.002, 20, 4),
            ema_decay_at(number, 0.999, 0.9999, 10),
            5.0,
            contextlib.nullcontext,
        )
        assert loss == pytest.approx(expected["loss_exact"], rel=1e-5)
        assert norm == pytest.approx(expected["gnorm"], rel=1e-4)
    for name, value in part(data, "after3/student/").items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
