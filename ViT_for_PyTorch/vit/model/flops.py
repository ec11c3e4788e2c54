"""What a training step computes, in closed form; test_model.py holds it to torch's counter."""

from __future__ import annotations

from torch import nn

from common.run.utilisation import transformer_flops
from vit.model.vision_transformer import ClassifyingViT


def flops_per_image(model: ClassifyingViT, head_only: bool = False, frozen: bool = False) -> float:
    """FLOPs of the matrix products and convolutions of one training step on one image.

    Args:
        head_only: the body is frozen: nothing but the head has a backward pass.
        frozen: the body's weights are (LoRA): gradients pass through it, and reach none of its weights, but those of
            the stem where it is trained.
    """
    width, tokens = model.embed_dim, model.patch_embed.num_patches + model.num_prefix_tokens
    body = transformer_flops(tokens, width, model.blocks[0].mlp.fc1.out_features, len(model.blocks))
    convolutions, side = [], model.config.image_size
    for layer in model.patch_embed.proj.modules():
        if isinstance(layer, nn.Conv2d):
            side = side // layer.stride[0]
            convolutions.append(2.0 * side**2 * layer.weight.numel())
    stem, head = sum(convolutions), 2.0 * width * model.num_classes
    if head_only:
        return stem + body + 3 * head
    if frozen:
        learns = all(parameter.requires_grad for parameter in model.patch_embed.parameters())
        attention = 4.0 * tokens**2 * width * len(model.blocks)  # products of which both factors have a gradient
        return (3 * stem - convolutions[0] if learns else stem) + 2 * body + attention + 3 * head
    return 3 * (stem + body + head) - convolutions[0]  # nothing asks for the gradient of the pictures
