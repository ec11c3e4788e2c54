"""Initial weights of a model that was built on the meta device: the same values whole or sharded, on any device."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from beit2.model.encoder import Encoder
from common.device import mix_seed


@torch.no_grad()
def materialize(model: Encoder, device: torch.device, seed: int) -> None:
    """Gives a model on the meta device its storage on `device` and its initial weights.

    One module at a time is drawn whole, on the host, from (seed, its name); of a sharded parameter a rank keeps its
    shard. So no rank ever holds more than its shards and one module (the largest of the 5B model: 256 MiB), nothing is
    sent, and the values depend neither on the number of ranks nor on the device.
    """
    model.to_empty(device=device)
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        buffers = dict(module.named_buffers(recurse=False))
        if not own and not buffers:
            continue
        torch.manual_seed(mix_seed(seed, zlib.crc32(name.encode())))
        for key, parameter in own.items():
            module._parameters[key] = nn.Parameter(torch.empty(parameter.shape))
        try:
            model.init_module(name, module)
            for key, parameter in own.items():
                _keep_share(parameter, module._parameters[key])
        finally:
            module._parameters.update(own)


def _keep_share(parameter: Tensor, whole: Tensor) -> None:
    """Copies the values of `whole`, of which this rank's shard where the parameter is sharded."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        whole = distribute_tensor(whole.data, mesh, placements, src_data_rank=None).to_local()
        parameter = parameter.to_local()
    parameter.copy_(whole)
