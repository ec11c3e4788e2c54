"""AutoConfig and AutoModel: models by name or from a checkpoint file, as in MindFormers' README."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from common import checkpoint_file
from common.shards import PROGRESS
from vit import download
from vit.checkpoint import folder_of, newest
from vit.conv_stem import patch_size_of
from vit.model import PRESETS, create_model
from vit.weights import load_weights, read_state_dict

MLP_RATIO, CHANNELS, RECIPE_BATCH_SIZE, IMAGENET_CLASSES = 4, 3, 32, 1000


@dataclass
class ViTConfig:
    """What a model is built from; prints as a dictionary and can be read like one."""

    patch_size: int = 16
    in_chans: int = CHANNELS
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: int = MLP_RATIO
    global_pool: str = "avg"
    stem: str = "patch"
    drop_path_rate: float = 0.1
    batch_size: int = RECIPE_BATCH_SIZE  # of the training recipe, per device
    image_size: int = 224
    num_classes: int = IMAGENET_CLASSES

    def __post_init__(self):
        for name, only in (("in_chans", CHANNELS), ("mlp_ratio", MLP_RATIO)):
            if getattr(self, name) != only:
                raise ValueError(f"{name}={getattr(self, name)}: only {only} is supported")

    def __getitem__(self, name: str) -> Any:
        return asdict(self)[name]

    def __str__(self) -> str:
        return str(asdict(self))

    __repr__ = __str__


class AutoConfig:
    """Configurations by name or of a checkpoint."""

    @staticmethod
    def from_pretrained(name_or_path: str | Path, **changes: Any) -> ViTConfig:
        """The configuration of a known model ("vit_base_p16", "mindspore/vit_base_p16") or of a checkpoint file.

        Args:
            changes: fields of `ViTConfig` to replace.

        Raises:
            ValueError: neither a known name nor a file, an unknown field, or a file that does not tell its sizes.
            CheckpointError: not a checkpoint.
        """
        unknown = changes.keys() - {field.name for field in fields(ViTConfig)}
        if unknown:
            raise ValueError(f"unknown configuration field {', '.join(sorted(unknown))}")
        if Path(name_or_path).exists():
            return _config_of_file(checkpoint_of(name_or_path), changes)
        name = str(name_or_path).removeprefix("mindspore/")
        preset = download.PUBLISHED[name].model if name in download.PUBLISHED else name
        if preset not in PRESETS:
            known = ", ".join(dict.fromkeys([*PRESETS, *download.PUBLISHED]))
            raise ValueError(f"{name_or_path}: neither a file or folder nor a known model name ({known})")
        return ViTConfig(**{**_preset_fields(preset), **changes})


class AutoModel:
    """Models by name, of a checkpoint, or from a configuration. All give logits [B, num_classes]."""

    @staticmethod
    def from_config(config: ViTConfig) -> VisionTransformer:
        """A model with fresh weights."""
        return create_model(
            "vit_base_p16",  # every size of the preset is replaced
            config.num_classes,
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            global_pool=config.global_pool,
            drop_path=config.drop_path_rate,
            stem=config.stem,
        )

    @staticmethod
    def from_pretrained(name_or_path: str | Path, config: ViTConfig | None = None) -> VisionTransformer:
        """A model with its weights, in evaluation mode.

        Args:
            name_or_path: a published name (downloaded at its first use), a checkpoint file (.pth, .pt, MindSpore
                .ckpt), or the output folder of a training run (its best checkpoint).
            config: the sizes, where a file does not tell them.

        Raises:
            ValueError, CheckpointError, DownloadError: each says what is wrong and what to do.
        """
        config = config or AutoConfig.from_pretrained(name_or_path)
        model = AutoModel.from_config(config)
        load_weights(model, weights_of(name_or_path))
        return model.eval()


def weights_of(name_or_path: str | Path) -> Path:
    """The local file with the weights of a published name (downloaded when needed), a file, or a run's folder."""
    if Path(name_or_path).exists():
        return checkpoint_of(name_or_path)
    return download.fetch(str(name_or_path))


def checkpoint_of(path: str | Path) -> Path:
    """The checkpoint itself, or the best (else the newest) of the output folder of a run."""
    path = Path(path)
    if path.is_file() or (path / PROGRESS).is_file():
        return path
    for folder in (path, folder_of(path)):
        if (folder / "best.pt").is_file():
            return folder / "best.pt"
        if folder.is_dir() and (found := newest(folder)):
            return found
    raise ValueError(f"{path}: no best.pt or checkpoint-* in it or in {folder_of(path)}")


def _preset_fields(name: str) -> dict[str, Any]:
    sizes = dict(PRESETS[name])
    return {"image_size": sizes.pop("img_size"), **sizes}


def _config_of_file(path: Path, changes: dict[str, Any]) -> ViTConfig:
    """The sizes of a checkpoint: as recorded in ours, else from the tensors' shapes and the preset they agree with."""
    state = read_state_dict(path)
    shapes: dict[str, Any] = {
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else IMAGENET_CLASSES,
        "global_pool": "token" if "norm.weight" in state and "head.weight" in state else "avg",
    }
    try:
        shapes["embed_dim"] = state["pos_embed"].shape[-1]
        shapes["stem"] = "patch" if "patch_embed.proj.weight" in state else "conv"
        is_plain = shapes["stem"] == "patch"
        shapes["patch_size"] = state["patch_embed.proj.weight"].shape[-1] if is_plain else patch_size_of(state)
        shapes["image_size"] = round((state["pos_embed"].shape[1] - 1) ** 0.5) * shapes["patch_size"]
        shapes["depth"] = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    except (KeyError, ValueError, IndexError):
        raise checkpoint_file.CheckpointError(f"{path}: holds no weights of a Vision Transformer") from None
    if "num_heads" not in changes:
        shapes["num_heads"] = _num_heads(path, shapes)
    return ViTConfig(**{**shapes, **changes})


def _num_heads(path: Path, shapes: dict[str, Any]) -> int:
    """No tensor shows the number of heads."""
    sizes = ("patch_size", "embed_dim", "depth")
    for preset in PRESETS.values():
        if all(preset[name] == shapes[name] for name in sizes):
            return preset["num_heads"]
    raise ValueError(
        f"{path}: no known model has {', '.join(f'{name} {shapes[name]}' for name in sizes)}, so its number of "
        "attention heads is not known: give a configuration, e.g. AutoConfig.from_pretrained(path, num_heads=...)"
    )
