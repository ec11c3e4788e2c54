"""What LoRA saves of memory: the bytes alive at the peak of a step, counted on tensors without storage."""

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vit
from common import device as devices
from vit.config.run_config import ModelConfig
from vit.preparation import freeze
from vit.training.optim import build_ema, build_optimizer, set_learning_rate

BATCH = 32


class LivingBytes(TorchDispatchMode):
    """Bytes of the tensors that were given or made under it and are still referred to."""

    def __init__(self, *known):
        super().__init__()
        self.seen = weakref.WeakSet()
        self.now = self.peak = 0
        self._note(known)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self._note(tree_leaves(result))
        return result

    def _note(self, tensors):
        for storage in [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor)]:
            if storage not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, size):
        self.now -= size


def peak(precision: str, **options) -> int:
    """MiB at the peak of ViT-B/16's second step with AdamW on 32 pictures of 224: weights, gradients, moments, all."""
    with torch.device("meta"):
        model = vit.create_model("vit_base_p16", 1000)
    freeze(model, ModelConfig(**options))
    model.set_grad_checkpointing(options.get("gradient_checkpointing", False))
    with FakeTensorMode():
        for module in model.modules():
            for name, old in module.named_parameters(recurse=False):
                new = torch.nn.Parameter(torch.empty(old.shape), requires_grad=old.requires_grad)
                module.register_parameter(name, new)
        optimizer = build_optimizer(model, weight_decay=0.05)
        set_learning_rate(optimizer, 1e-3)
        images = torch.empty(BATCH, 3, 224, 224)
        alive = LivingBytes(images, *model.parameters())
        with alive:
            for _ in range(2):  # the first makes AdamW's moments
                alive.peak = alive.now
                with devices.autocast(torch.device("cpu"), precision):
                    loss = model(images).logsumexp(1).mean()
                loss.backward()
                del loss
                optimizer.step()
                optimizer.zero_grad()
    return alive.peak >> 20


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peak_of_a_step_is_at_most_65_percent(precision):
    assert peak(precision, train="lora") <= 0.65 * peak(precision)


def test_the_average_of_frozen_weights_is_no_second_copy():
    model = vit.create_model("vit_demo", 5, img_size=16)
    freeze(model, ModelConfig(train="lora"))
    average = build_ema(model, 0.5)
    own, kept = dict(model.named_parameters()), dict(average.module.named_parameters())
    assert own.keys() == kept.keys()
    assert all((own[name] is kept[name]) == (not own[name].requires_grad) for name in own)
    before = {name: value.clone() for name, value in own.items()}
    with torch.no_grad():
        for value in own.values():
            value.add_(value.requires_grad)
    average.update(model)
    for name, value in average.module.named_parameters():
        torch.testing.assert_close(value, before[name] + 0.5 * value.requires_grad)
