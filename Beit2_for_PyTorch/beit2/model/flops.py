"""What a training step on one picture computes, in closed form; test_flops.py holds it to torch's counter.

FLOPs of matrix products as the reference's modules have them: rows that ours leaves out of the last blocks count.
"""

from __future__ import annotations

from torch import nn

from beit2.model.encoder import Encoder
from beit2.model.masked_image_model import MaskedImageModel
from beit2.model.teachers import CLIPTeacher, DINOTeacher
from beit2.model.tokenizer import VQKD
from beit2.model.vision_transformer import VisionTransformer
from common.run.utilisation import transformer_flops


def embedding_flops(encoder: Encoder) -> float:
    """Of the patch embedding, forward."""
    return 2.0 * _patches(encoder) * encoder.patch_embed.proj.weight.numel()


def blocks_flops(encoder: Encoder, more: int = 0) -> float:
    """Of all blocks forward, and of `more` like them."""
    hidden = encoder.blocks[0].mlp.fc1.out_features
    return transformer_flops(1 + _patches(encoder), encoder.embed_dim, hidden, len(encoder.blocks) + more)


def pretraining_flops(model: MaskedImageModel, tokenizer: VQKD, masked: int) -> float:
    """Of the masked image model, forward and backward with `masked` patches, and of the tokenizer forward."""
    heads = 2 if model.cls_pt else 1
    output = 2.0 * model.embed_dim * model.vocab_size * masked * heads
    body = blocks_flops(model, len(model.cls_pt_layers) if model.cls_pt else 0)
    return 2 * embedding_flops(model) + 3 * (body + output) + _encoding_flops(tokenizer)


def classification_flops(model: VisionTransformer, classes: int) -> float:
    """Of fine-tuning."""
    return 2 * embedding_flops(model) + 3 * (blocks_flops(model) + 2.0 * model.embed_dim * classes)


def tokenizer_flops(model: VQKD) -> float:
    """Of VQ-KD: encoder and decoder forward and backward, the codebook once, the teacher forward."""
    encoder, decoder, patches = model.encoder, model.decoder, _patches(model.encoder)
    trained = blocks_flops(encoder) + blocks_flops(decoder) + embedding_flops(decoder)
    trained += 2.0 * patches * (_linears(model.encode_task_layer) + _linears(model.decode_task_layer))
    return 2 * embedding_flops(encoder) + 3 * trained + _codebook_flops(model) + _teacher_flops(model.teacher_model)


def probe_flops(model: VisionTransformer, classes: int) -> float:
    """Of a linear probe on features that are not trained."""
    return embedding_flops(model) + blocks_flops(model) + 3 * 2.0 * model.embed_dim * classes


def _encoding_flops(tokenizer: VQKD) -> float:
    encoder = tokenizer.encoder
    project = 2.0 * _patches(encoder) * _linears(tokenizer.encode_task_layer)
    return embedding_flops(encoder) + blocks_flops(encoder) + project + _codebook_flops(tokenizer)


def _teacher_flops(teacher: CLIPTeacher | DINOTeacher) -> float:
    if isinstance(teacher, CLIPTeacher):
        tower = teacher.visual
        ends, width = tower.conv1.weight.numel() + tower.proj.numel(), tower.conv1.out_channels
        depth = len(tower.transformer.resblocks)
    else:
        ends, width, depth = teacher.patch_embed.proj.weight.numel(), teacher.output_dim, len(teacher.blocks)
    return 2.0 * teacher.num_patches * ends + transformer_flops(1 + teacher.num_patches, width, 4 * width, depth)


def _codebook_flops(tokenizer: VQKD) -> float:
    return 2.0 * _patches(tokenizer.encoder) * tokenizer.quantize.embedding.weight.numel()


def _patches(encoder: Encoder) -> int:
    height, width = encoder.window_size
    return height * width


def _linears(module: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))
