"""Loads weights into a ViT: MAE pretrain and fine-tuned .pth, this project's checkpoints, MindSpore .ckpt."""

import math
from pathlib import Path
from typing import Literal

from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from common import checkpoint_file, shards
from vit import mindspore_checkpoint
from vit.model import reset_head

_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
HeadPolicy = Literal["optional", "required", "new"]


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The model weights of a checkpoint file by MAE name; `CheckpointError` naming the file when it is none.

    *.ckpt is MindSpore's format, a folder a sharded checkpoint of ours; everything else a torch file with the weights
    at the top or under "model" or "state_dict". Nothing is unpickled but tensors and plain values.
    """
    if Path(path).suffix == ".ckpt":
        try:
            return mindspore_checkpoint.from_mindspore(mindspore_checkpoint.read(path))
        except ValueError as error:
            raise checkpoint_file.CheckpointError(f"{path}: {error}") from error
    content = shards.read_shards(path) if Path(path).is_dir() else checkpoint_file.load(path)
    if isinstance(content, dict):
        # a run with a weight average was scored with it: evaluation and prediction must use the same weights
        content = content.get("ema") or content.get("model", content.get("state_dict", content))
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise checkpoint_file.CheckpointError(
            f"{path}: holds no model weights: expected names -> tensors, at the top or under 'model' or 'state_dict'"
        )
    state = {}
    for name, tensor in content.items():
        for wrapper in _WRAPPERS:
            name = name.removeprefix(wrapper)
        state[name] = tensor
    return state


def _fit_pos_embed(state: dict[str, Tensor], model: VisionTransformer) -> None:
    """Resamples pos_embed [1, 1 + N, C] to the model's grid as MAE's pos_embed.py: plain bicubic, class row kept."""
    source = state.get("pos_embed")
    if source is None or source.ndim != 3 or source.shape == model.pos_embed.shape:
        return
    if source.shape[-1] != model.pos_embed.shape[-1] or math.isqrt(source.shape[1] - 1) ** 2 != source.shape[1] - 1:
        return  # not this model's embedding: reported with the other shapes
    state["pos_embed"] = resample_abs_pos_embed(source, list(model.patch_embed.grid_size), antialias=False)


def _shape_problems(state: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    return [
        f"{name} is {tuple(state[name].shape)}, the model has {tuple(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]


def _key_problems(missing: set[str], unexpected: set[str], *, pooled: bool, headless: bool) -> list[str]:
    """What is missing or unexpected beyond what fine-tuning a pretrained encoder has to tolerate."""
    may_miss, may_exceed = ("head.",), ("decoder_", "mask_token")
    if pooled:
        may_miss, may_exceed = (*may_miss, "fc_norm."), (*may_exceed, "norm.")
    if not headless:
        may_miss = ()
    problems = []
    if lacking := sorted(name for name in missing if not name.startswith(may_miss)):
        problems.append(f"it lacks {_listed(lacking)}")
    if extra := sorted(name for name in unexpected if not name.startswith(may_exceed)):
        problems.append(f"it has {_listed(extra)}, which the model does not")
    return problems


def _listed(names: list[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def load_weights(
    model: VisionTransformer, path: str | Path, head: HeadPolicy = "optional"
) -> tuple[list[str], list[str]]:
    """Copies the weights of a checkpoint into `model`; returns the (missing, unexpected) names, sorted.

    Positional embeddings of another picture size are interpolated. Tolerated: a pretrained encoder lacks `head.*` (and
    `fc_norm.*` with average pooling) and brings `norm.*`, `mask_token` and `decoder_*`. Anything else raises
    `CheckpointError` with the file, the keys and what to do, and leaves the model as it was.

    head: "optional"  the file may lack a head, but one with another number of classes is an error
          "required"  evaluation and prediction: the file must have a head with the model's number of classes
          "new"       fine-tuning: a head with another number of classes is replaced by a fresh one (named as missing)
    """
    state, own = read_state_dict(path), model.state_dict()
    classes = state["head.weight"].shape[0] if "head.weight" in state else None
    if head == "required" and classes is None:
        raise checkpoint_file.CheckpointError(
            f"{path}: has no classification head (a pretrained encoder?); fine-tune it first, or give a fine-tuned file"
        )
    if classes is not None and classes != model.num_classes:
        if head != "new":
            raise checkpoint_file.CheckpointError(
                f"{path}: its head has {classes} classes, the model has {model.num_classes}; build the model with "
                f"num_classes={classes}, or fine-tune from this file, which starts a new head"
            )
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
        classes = None
    _fit_pos_embed(state, model)
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    pooled = model.global_pool == "avg"
    problems = _key_problems(missing, unexpected, pooled=pooled, headless=classes is None)
    problems += _shape_problems(state, own)
    if problems:
        raise checkpoint_file.CheckpointError(
            f"{path}: does not fit this model: {'; '.join(problems)}. Choose the model name, picture size and "
            f"global_pool (now {model.global_pool!r}) that the file was made with"
        )
    model.load_state_dict(state, strict=False)
    if "head.weight" in missing:
        reset_head(model)
    return sorted(missing), sorted(unexpected)
