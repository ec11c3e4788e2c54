"""On the PYTHONPATH of a run: the loss of rank FAULT_RANK is nan in its backward pass number FAULT_PASS."""

import os

if os.environ.get("RANK") == os.environ.get("FAULT_RANK", "none"):
    import torch

    _backward, _passes = torch.Tensor.backward, [0]

    def backward(loss, *arguments, **options):
        _passes[0] += 1
        if _passes[0] == int(os.environ["FAULT_PASS"]):
            loss.data.fill_(float("nan"))
            loss = loss * float("nan")
        return _backward(loss, *arguments, **options)

    torch.Tensor.backward = backward
