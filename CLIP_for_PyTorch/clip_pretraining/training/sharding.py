"""--fsdp: the model spread over the ranks (FSDP2, common/shards/).

Each layer of the towers is gathered for its own computation, in fp32 under autocast as with DDP. Checkpoints and
folders are those of a model that is not sharded: rank 0 writes whole tensors, any number of ranks goes on from them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common import shards
from common.distributed import World
from common.errors import UsageError

_SCALARS = ("logit_scale", "logit_bias")


def shard(model: PreTrainedModel, world: World) -> None:
    """Spreads a model, which lies on the device, over all ranks. Scalars get a dimension, to have shards.

    Raises:
        UsageError: there is one rank only.
    """
    if world.size == 1:
        raise UsageError("--fsdp spreads the model over ranks: start with torchrun or --nproc, or leave it out")
    for name in _SCALARS:
        if (scalar := getattr(model, name, None)) is not None:
            setattr(model, name, nn.Parameter(scalar.detach().reshape(1), scalar.requires_grad))
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    shards.shard(model, [layer for layers in lists for layer in layers], world, "fp32")
    _tell_the_root(model)


@torch.no_grad()
def _tell_the_root(model: PreTrainedModel) -> None:
    """FSDP2 takes the module of the first forward pass for the outermost: an evaluation begins with a tower."""
    size, device = model.config.vision_config.image_size, model.device
    ids = torch.full((1, 2), model.config.text_config.eos_token_id, device=device)
    model(pixel_values=torch.zeros(1, 3, size, size, device=device), input_ids=ids, attention_mask=torch.ones_like(ids))
    model.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, on every rank."""
    return tensor.full_tensor() if shards.is_sharded(tensor) else tensor


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with whole tensors, on the host of rank 0; empty elsewhere. All ranks call it."""
    state = shards.whole_state(model)
    return state | {name: state[name].reshape(()) for name in _SCALARS if name in state}


def load_model(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads what `model_state` gave, which every rank has read. All ranks call it."""
    shards.load_whole_model(model, state | {name: state[name].reshape(1) for name in _SCALARS if name in state})


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()` with whole tensors on the host, as without sharding. All ranks call it."""
    state = optimizer.state_dict()

    def on_host(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = whole(value).cpu()
        return value.reshape(()) if value.numel() == 1 else value

    kept = {index: {name: on_host(value) for name, value in entry.items()} for index, entry in state["state"].items()}
    return {**state, "state": kept}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads what `optimizer_state` gave. All ranks call it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def shaped(index: int, name: str, value: Any) -> Any:
        is_moment = isinstance(value, Tensor) and name != "step" and value.numel() == 1
        return value.reshape(parameters[index].shape) if is_moment else value

    fitting = {i: {n: shaped(i, n, value) for n, value in entry.items()} for i, entry in state["state"].items()}
    shards.load_whole_optimizer(optimizer, {**state, "state": fitting})
