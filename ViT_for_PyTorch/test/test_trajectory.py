"""Three optimizer steps of MAE fine-tuning, replayed from the parts of this project: the same losses and norms."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import vit
from vit.data.mixup import Mix, apply_mix
from vit.training import optim
from vit.training.metrics import soft_target_cross_entropy

GOLDEN = Path(__file__).parent / "golden"


def test_fine_tuning_follows_mae():
    data, run = np.load(GOLDEN / "train_traj.npz"), json.loads((GOLDEN / "train_traj.json").read_text())
    model = vit.build_model(img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=4, num_classes=10)
    vit.load_weights(model, GOLDEN / "mf_gap.ckpt", head="required")
    optimizer = optim.build_optimizer(model.train(), weight_decay=run["weight_decay"], layer_decay=run["layer_decay"])
    for step, expected in enumerate(run["log"]):
        epoch = step / run["iters_per_epoch"]
        update_due = (step + 1) % run["accum_iter"] == 0
        if step % run["accum_iter"] == 0:
            settings = {key: run[key] for key in ("lr", "min_lr", "warmup_epochs", "epochs")}
            optim.set_learning_rate(optimizer, vit.learning_rate_at(epoch, **settings))
        rates = [group["lr"] for group in optimizer.param_groups]
        assert (max(rates), min(rates)) == pytest.approx((expected["lr"], expected["min_lr"]), rel=1e-12)
        images, labels = torch.from_numpy(data["x"][step]), torch.from_numpy(data["y"][step]).long()
        images, target = apply_mix(images, labels, Mix(float(data["lam"][step])), 10, run["smoothing"])
        loss = soft_target_cross_entropy(model(images), target)
        (loss / run["accum_iter"]).backward()
        assert loss.item() == pytest.approx(expected["loss"], abs=2e-5)
        if update_due:
            norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
            assert norm.item() == pytest.approx(expected["grad_norm"], rel=1e-4)
            optimizer.step()
            optimizer.zero_grad()
