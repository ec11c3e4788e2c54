"""Frozen teachers whose patch features the tokenizer learns to reconstruct: a CLIP vision tower, or a DINO ViT."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.layers import QuickGELU
from torch import Tensor, nn

from beit2.weights.files import read_state_dict


class ScalingLayer(nn.Module):
    """From the tokenizer's [-1, 1] to the teacher's normalisation."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.register_buffer("shift", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = ((x + 1.0) * 127.5).clamp(0, 255.0) / 255.0  # rounding as in the reference
        return (x - self.shift) / self.scale


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}  # OpenAI's models, and most that open_clip has trained


class ResidualAttentionBlock(nn.Module):
    """CLIP's transformer block, under OpenAI's names."""

    def __init__(self, width: int, heads: int, activation: str, norm_eps: float):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width, norm_eps)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, width * 4))
        self.mlp.add_module("gelu", ACTIVATIONS[activation]())
        self.mlp.add_module("c_proj", nn.Linear(width * 4, width))
        self.ln_2 = nn.LayerNorm(width, norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class CLIPVisionTower(nn.Module):
    """CLIP's ViT (Radford et al. 2021), returning the projected state of every patch."""

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        output_dim: int,
        patch: int,
        res: int,
        activation: str = "quick_gelu",
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.output_dim, self.grid = output_dim, res // patch
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(self.grid**2 + 1, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width, norm_eps)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(
            *(ResidualAttentionBlock(width, heads, activation, norm_eps) for _ in range(layers))
        )
        self.ln_post = nn.LayerNorm(width, norm_eps)
        self.proj = nn.Parameter(torch.randn(width, output_dim) * width**-0.5)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, res, res] -> [B, N, output_dim]."""
        x = self.conv1(images).flatten(2).transpose(1, 2)  # [B, N, width]
        x = torch.cat((self.class_embedding.expand(len(x), 1, -1), x), dim=1) + self.positional_embedding
        x = self.transformer.resblocks(self.ln_pre(x))
        return self.ln_post(x[:, 1:]) @ self.proj


class CLIPTeacher(nn.Module):
    """Holds the tower as `visual`, the name it has in OpenAI's and open_clip's state dicts."""

    mean, std = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    def __init__(self, **config):
        super().__init__()
        self.visual = CLIPVisionTower(**config)
        self.output_dim, self.pixels, self.patch = self.visual.output_dim, config["res"], config["patch"]
        self.num_patches = self.visual.grid**2

    def forward(self, images: Tensor) -> Tensor:
        return self.visual(images)


class DINOTeacher(nn.Module):
    """A timm ViT under DINO's (and timm's) parameter names; the target is the normalised patch tokens."""

    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    def __init__(self, width: int, layers: int, heads: int, patch: int, res: int, output_dim: int | None = None):
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer as TimmViT

        if output_dim not in (None, width):
            raise ValueError(f"output_dim {output_dim}: a DINO teacher's features have its width, {width}")
        vit = TimmViT(res, patch, num_classes=0, embed_dim=width, depth=layers, num_heads=heads)
        # under the reference's flat names: teacher_model.blocks... and not teacher_model.vit.blocks...
        for name, module in vit.named_children():
            self.add_module(name, module)
        self.cls_token, self.pos_embed = vit.cls_token, vit.pos_embed
        self.output_dim, self.pixels, self.patch = width, res, patch
        self.num_patches = (res // patch) ** 2

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, res, res] -> [B, N, width]."""
        x = self.patch_embed(images)  # [B, N, width]
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.pos_embed
        return self.norm(self.blocks(x))[:, 1:]


TEACHERS = {"clip": CLIPTeacher, "dino": DINOTeacher}


def build_teacher(config: dict) -> nn.Module:
    """A frozen teacher of a plain configuration {"type": "clip"|"dino", width, layers, heads, patch, res, output_dim},
    for clip also `activation` and `norm_eps`.

    Raises:
        ValueError: unknown type.
    """
    sizes = dict(config)
    kind = sizes.pop("type", "clip")
    if kind not in TEACHERS:
        raise ValueError(f"teacher type {kind!r}: choose one of {', '.join(TEACHERS)}")
    teacher = TEACHERS[kind](**sizes).requires_grad_(False).eval()
    teacher.config = dict(config)  # which a tokenizer's checkpoint keeps
    return teacher


def load_teacher(path: str | Path, kind: str, heads: int | None = None) -> nn.Module:
    """A teacher from a weight file; its sizes are read off the tensors.

    Args:
        path: for clip: a transformers CLIP folder or file, or an OpenAI / open_clip state dict; a folder says in its
            config.json which activation, norm epsilon and how many heads it has, else they are as in OpenAI's models.
            For dino: a DINO or timm ViT state dict, or a classifier of run_class_finetuning.py that is such a ViT
            (--use_cls --abs_pos_emb --disable_rel_pos_bias --layer_scale_init_value 0).
        kind: "clip" or "dino".
        heads: attention heads; by default the width over 64, as in the published CLIP and DINO models of these sizes.

    Raises:
        ValueError: the file is no such model.
    """
    path = Path(path)
    shape = _vision_config(path) if kind == "clip" else {}
    heads = heads or shape.get("num_attention_heads")
    state = read_state_dict(path)
    state = _clip_state(state, path) if kind == "clip" else _dino_state(state, path)
    if kind == "clip":
        conv, position = state["visual.conv1.weight"], state["visual.positional_embedding"]
        layers = _count(state, "visual.transformer.resblocks.")
        output_dim = state["visual.proj"].shape[1]
    else:
        conv, position = state["patch_embed.proj.weight"], state["pos_embed"][0]
        layers, output_dim = _count(state, "blocks."), conv.shape[0]
    width, patch = conv.shape[0], conv.shape[-1]
    side = round((position.shape[0] - 1) ** 0.5)
    config = {"type": kind, "width": width, "layers": layers, "heads": heads or max(1, width // 64), "patch": patch}
    if "hidden_act" in shape:
        if shape["hidden_act"] not in ACTIVATIONS:
            raise ValueError(f"{path}: its activation {shape['hidden_act']} is none of {', '.join(ACTIVATIONS)}")
        config["activation"] = shape["hidden_act"]
    if "layer_norm_eps" in shape:
        config["norm_eps"] = shape["layer_norm_eps"]
    teacher = build_teacher(config | {"res": side * patch, "output_dim": output_dim})
    missing, _ = teacher.load_state_dict(state, strict=False)
    if missing:
        raise ValueError(f"{path}: not a {kind} vision model, {len(missing)} weights are missing, e.g. {missing[0]}")
    return teacher


def _count(state: dict[str, Tensor], prefix: str) -> int:
    numbers = {int(name[len(prefix) :].split(".")[0]) for name in state if name.startswith(prefix)}
    return max(numbers, default=-1) + 1


def _vision_config(folder: Path) -> dict:
    """What a transformers folder says of its vision tower; nothing for any other path."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) if file.exists() else {}
    return config.get("vision_config", config)


def _dino_state(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    state = {name.removeprefix("module.").removeprefix("backbone."): tensor for name, tensor in state.items()}
    if "patch_embed.proj.weight" not in state or "pos_embed" not in state:
        raise ValueError(f"{path}: not a DINO or timm ViT state dict (no patch_embed.proj.weight or pos_embed)")
    for number in range(_count(state, "blocks.")):  # our own classifier (--use_cls): timm has one bias for q, k and v
        q, v = (state.pop(f"blocks.{number}.attn.{name}_bias", None) for name in "qv")
        if q is not None:
            state[f"blocks.{number}.attn.qkv.bias"] = torch.cat((q, torch.zeros_like(q), v))
    return state


def _clip_state(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """OpenAI's names, from OpenAI, open_clip or transformers ones."""
    if "vision_model.embeddings.patch_embedding.weight" in state:
        if "visual_projection.weight" not in state:
            raise ValueError(f"{path}: has no visual_projection.weight: take the folder of the whole CLIP model")
        return _from_transformers(state)
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if "visual.conv1.weight" not in state:
        raise ValueError(f"{path}: no CLIP vision tower (neither visual.conv1.weight nor vision_model.embeddings...)")
    return {name: tensor.float() for name, tensor in state.items() if name.startswith("visual.")}


def _from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "vision_model."
    out = {
        "visual.conv1.weight": state[prefix + "embeddings.patch_embedding.weight"],
        "visual.class_embedding": state[prefix + "embeddings.class_embedding"],
        "visual.positional_embedding": state[prefix + "embeddings.position_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T,
    }
    for ours, theirs in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        for end in ("weight", "bias"):
            out[f"visual.{ours}.{end}"] = state[f"{prefix}{theirs}.{end}"]
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    names["attn.out_proj"] = "self_attn.out_proj"
    for layer in range(_count(state, prefix + "encoder.layers.")):
        block, source = f"visual.transformer.resblocks.{layer}.", f"{prefix}encoder.layers.{layer}."
        for end in ("weight", "bias"):
            qkv = [state[f"{source}self_attn.{part}_proj.{end}"] for part in "qkv"]
            out[f"{block}attn.in_proj_{end}"] = torch.cat(qkv)
            for ours, theirs in names.items():
                out[f"{block}{ours}.{end}"] = state[f"{source}{theirs}.{end}"]
    return {name: tensor.float() for name, tensor in out.items()}
