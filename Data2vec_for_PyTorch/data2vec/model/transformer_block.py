"""What the blocks of all models have in common: each is compiled, sharded and run again in the backward pass as one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class TransformerBlock(nn.Module):
    """Base of a block, whose `forward` gives (states, the teacher's target)."""

    checkpoint_activations = False

    def run(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """The block on `inputs`; with `checkpoint_activations` its inner tensors are computed again when they are
        needed, with the same dropout: less memory, more time."""
        if self.training and self.checkpoint_activations:
            return checkpoint(self, *inputs, use_reentrant=False)
        return self(*inputs)


def blocks_of(model: nn.Module) -> list[TransformerBlock]:
    """All blocks of a model, or of a teacher."""
    return [module for module in model.modules() if isinstance(module, TransformerBlock)]
