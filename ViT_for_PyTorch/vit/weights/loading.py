"""Loads weights into a ViT: MAE pretrain and fine-tuned .pth, this project's checkpoints, MindSpore .ckpt."""

import math
import sys
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from common import checkpoint_file, shards
from common.distributed import rank
from common.model import adapters
from vit import mindspore_checkpoint
from vit.model import lora
from vit.model.vision_transformer import PRESETS, reset_head
from vit.weights import hub_files
from vit.weights.hub_files import MODEL_FILES

_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
HeadPolicy = Literal["optional", "required", "new"]


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The model weights of a checkpoint by MAE name; see `read_checkpoint`."""
    return read_checkpoint(path)[0]


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The model weights of a checkpoint by MAE name, and what it records of its model: fields of `ViTConfig`.

    *.ckpt is MindSpore's format, *.safetensors or a folder with MODEL_FILES timm's or Hugging Face's, any other folder
    a sharded checkpoint of ours; everything else a torch file with the weights at the top or under "model" or
    "state_dict". Nothing is unpickled but tensors and plain values.

    Raises:
        CheckpointError: naming a file that is none of these.
    """
    path = Path(path)
    if path.is_dir():
        inside = next((path / name for name in MODEL_FILES if (path / name).is_file()), None)
        if inside is not None:
            return _read_file(inside), hub_files.recorded(path)
    if path.suffix == ".safetensors":
        return _read_file(path), hub_files.recorded(path.parent)
    if path.suffix == ".ckpt":
        try:
            return mindspore_checkpoint.from_mindspore(mindspore_checkpoint.read(path)), {}
        except ValueError as error:
            raise checkpoint_file.CheckpointError(f"{path}: {error}") from error
    if path.is_dir():
        progress = shards.load_progress(path)
        return _plain(_by_our_names(path, shards.read_shards(path)), progress), _recorded_by_us(progress)
    content = checkpoint_file.load(path)
    return _plain(_by_our_names(path, content), content), _recorded_by_us(content)


def _read_file(path: Path) -> dict[str, Tensor]:
    """The weights of a *.safetensors or pytorch_model.bin file."""
    if not path.is_file():
        raise checkpoint_file.CheckpointError(f"{path}: no such checkpoint file")
    if path.suffix != ".safetensors":
        return _by_our_names(path, checkpoint_file.load(path))
    try:
        return _by_our_names(path, safetensors.torch.load_file(path))
    except (safetensors.SafetensorError, OSError) as error:
        raise checkpoint_file.CheckpointError(f"{path}: not a whole safetensors file ({error})") from None


def _by_our_names(path: Path, content: Any) -> dict[str, Tensor]:
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
    try:
        return hub_files.from_hugging_face(state) if hub_files.is_hugging_face(state) else state
    except KeyError as error:
        raise checkpoint_file.CheckpointError(f"{path}: lacks {error} of an attention") from None


def _plain(state: dict[str, Tensor], content: Any) -> dict[str, Tensor]:
    """Of a run with LoRA the merged weights."""
    return adapters.merged(state, lora.scale_of(content["config"]["model"])) if adapters.has_adapters(state) else state


def _recorded_by_us(content: Any) -> dict[str, Any]:
    """The description in a checkpoint of ours; of one from before it was kept, the sizes of the model it names."""
    if not isinstance(content, dict):
        return {}
    if isinstance(content.get("vit_config"), dict):
        return content["vit_config"]
    options = content.get("config")
    model = options.get("model") if isinstance(options, dict) else None
    if not isinstance(model, dict) or model.get("name") not in PRESETS:
        return {}
    recorded = {**PRESETS[model["name"]], "global_pool": model.get("global_pool", "avg")}
    return recorded | ({"image_size": model["img_size"]} if model.get("img_size") else {})


def _fit_pos_embed(state: dict[str, Tensor], model: VisionTransformer) -> None:
    """Resamples pos_embed [1, 1 + N, C] to the model's grid as MAE's pos_embed.py: plain bicubic, prefix rows kept."""
    source = state.get("pos_embed")
    if source is None or source.ndim != 3 or source.shape == model.pos_embed.shape:
        return
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    patches = source.shape[1] - prefix
    if source.shape[-1] != model.pos_embed.shape[-1] or patches < 1 or math.isqrt(patches) ** 2 != patches:
        return  # not this model's embedding: reported with the other shapes
    grid = list(model.patch_embed.grid_size)
    if rank() == 0:
        side = math.isqrt(patches)
        print(f"note: positions of {side} x {side} patches are interpolated to {grid[0]} x {grid[1]}", file=sys.stderr)
    state["pos_embed"] = resample_abs_pos_embed(source, grid, num_prefix_tokens=prefix, antialias=False)


def _shape_problems(state: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    differing = [
        f"{name} is {tuple(state[name].shape)}, the model has {tuple(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    return [_listed(differing)] if differing else []


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
