"""The VQ-KD tokenizer: an encoder whose discrete codes let a decoder reconstruct a teacher's features (BEiT v2 section
2.2, reference `modeling_vqkd.py`)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from beit2.model.blocks import init_linear_and_norm
from beit2.model.quantizer import NormEMAQuantizer
from beit2.model.teachers import ScalingLayer, build_teacher
from beit2.model.vision_transformer import VisionTransformer
from beit2.weights.files import read_state_dict
from common.device import no_autocast
from common.errors import UsageError

PROCESS_TYPES = ("default", "dall-e", "imagenet_norm")
# What training checkpoints hold besides the tokenizer.
NOT_TOKENIZER = ("loss", "teacher", "scaling")


class VQKD(nn.Module):
    """Tokenizer: encoder, codebook, decoder; with a teacher it can be trained.

    Args:
        dim, depth, heads: of the encoder; the decoder has `decoder_depth` blocks of `decoder_dim` (default: as the
            encoder) with `decoder_heads`.
        n_code, code_dim: size of the codebook.
        decay, beta, kmeans_init: of the quantizer.
        decoder_out_dim: length of the teacher's features.
        process_type: how images are normalised: "default" to [-1, 1], "imagenet_norm", or "dall-e" (not at all).
        teacher: a frozen module images -> [B, N, decoder_out_dim] with `mean`, `std`, `pixels` and `patch`, or None.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        decoder_depth: int = 3,
        decoder_dim: int | None = None,
        decoder_heads: int | None = None,
        n_code: int = 8192,
        code_dim: int = 32,
        decay: float = 0.99,
        beta: float = 1.0,
        kmeans_init: bool = False,
        decoder_out_dim: int = 512,
        process_type: str = "default",
        drop_path_rate: float = 0.0,
        teacher: nn.Module | None = None,
    ):
        super().__init__()
        if process_type not in PROCESS_TYPES:
            raise ValueError(f"process_type {process_type!r}: choose one of {', '.join(PROCESS_TYPES)}")
        self.process_type = process_type
        shape = {"num_classes": 0, "use_mean_pooling": True, "init_scale": 0.0, "drop_path_rate": drop_path_rate}
        self.encoder = VisionTransformer(img_size, patch_size, embed_dim=dim, depth=depth, num_heads=heads, **shape)
        self.window_size = self.encoder.window_size
        shape |= {"in_chans": code_dim, "depth": decoder_depth, "num_heads": decoder_heads or heads}
        decoder_dim = decoder_dim or dim
        self.decoder = VisionTransformer(self.window_size, 1, embed_dim=decoder_dim, **shape)
        self.quantize = NormEMAQuantizer(n_code, code_dim, beta, decay, kmeans_init)
        if teacher is not None:
            self.scaling_layer = ScalingLayer(teacher.mean, teacher.std)
            self._check_teacher(teacher, decoder_out_dim)
        self.teacher_model = teacher
        self.encode_task_layer = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, code_dim))
        self.decode_task_layer = nn.Sequential(
            nn.Linear(decoder_dim, decoder_dim), nn.Tanh(), nn.Linear(decoder_dim, decoder_out_dim)
        )
        for layer in (*self.encode_task_layer, *self.decode_task_layer):
            init_linear_and_norm(layer, std=0.02, bound=2.0, convolutions=False)

    def _check_teacher(self, teacher: nn.Module, decoder_out_dim: int) -> None:
        ours = self.encoder.patch_embed.img_size[0], self.encoder.patch_size[0]
        theirs = teacher.pixels, teacher.patch
        if ours != theirs:
            raise ValueError(
                f"the teacher sees {theirs[0]} pixels in patches of {theirs[1]}, the tokenizer {ours[0]} in patches of "
                f"{ours[1]}: give --input_size {theirs[0]} --patch_size {theirs[1]}"
            )
        if teacher.output_dim != decoder_out_dim:
            raise ValueError(f"the teacher's features have {teacher.output_dim} values, decoder_out_dim is not that")

    @property
    def n_code(self) -> int:
        return len(self.quantize.embedding.weight)

    def train(self, mode: bool = True) -> VQKD:
        """As every module's; the teacher stays in evaluation mode."""
        super().train(mode)
        if self.teacher_model is not None:
            self.teacher_model.eval()
        return self

    def for_encoding(self, dtype: torch.dtype | None = None) -> VQKD:
        """Leaves what pretraining needs: no decoder, no teacher, frozen; optionally the encoder's large weights in the
        dtype autocast would cast them to at every call, which changes no result."""
        self.decoder = self.decode_task_layer = self.teacher_model = None
        if dtype is not None:
            for module in self.encoder.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    module.weight.data = module.weight.data.to(dtype)
        return self.requires_grad_(False).eval()

    def no_weight_decay(self) -> set[str]:
        tokens = {f"{part}.{name}" for part in ("encoder", "decoder") for name in ("cls_token", "pos_embed")}
        return tokens | {"quantize.embedding.weight"}

    def pre_process(self, images: Tensor, unit_range: bool | None = None) -> Tensor:
        """Normalises images [B, 3, H, W].

        Args:
            unit_range: for "default", whether values are in [0, 1] (else [0, 255]). None asks the batch as the
                reference does: a maximum above 1 means [0, 255]. "imagenet_norm" takes [0, 1] alone.
        """
        if self.process_type == "dall-e":
            return images
        if self.process_type == "imagenet_norm":
            mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
            return (images - mean) / std
        if unit_range is None:
            unit_range = bool(images.max() <= 1)
        return (images * 255.0 if unit_range else images) / 127.5 - 1.0

    def encode_features(self, x: Tensor, patches: Tensor | None = None) -> Tensor:
        """Normalised images [B, 3, H, W] -> what is quantized, [B, N, code_dim], in fp32.

        patches int64 [B, K]: only those, [B, K, code_dim].
        """
        features = self.encoder.forward_features(x, return_patch_tokens=True, patches=patches)  # [B, N or K, dim]
        with no_autocast(x.device):
            return self.encode_task_layer(features.type_as(self.encode_task_layer[-1].weight))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised images -> codes [B, N, code_dim], ids int64 [B, N], commitment loss."""
        codes, loss, ids = self.quantize(self.encode_features(x))
        return codes, ids, loss

    def decode(self, codes: Tensor) -> Tensor:
        """codes [B, N, code_dim] -> reconstructed features [B, N, decoder_out_dim]."""
        code_map = codes.transpose(1, 2).unflatten(2, self.window_size)  # [B, code_dim, h, w]
        features = self.decoder.forward_features(code_map, return_patch_tokens=True)
        return self.decode_task_layer(features)

    @torch.no_grad()
    def get_codebook_indices(self, images: Tensor, patches: Tensor | None = None) -> Tensor:
        """Visual tokens of images in [0, 1]: [B, 3, H, W] -> int64 [B, N].

        Changes no state and talks to no other rank. patches int64 [B, K]: tokens of those alone, int64 [B, K]; the
        last block, the task layer and the search then do no other work.
        """
        x = self.pre_process(images, unit_range=True)
        return self.quantize.nearest(self.encode_features(x, patches))

    @torch.no_grad()
    def get_target(self, x: Tensor) -> Tensor:
        """The teacher's patch features of normalised images, [B, N, decoder_out_dim]."""
        return self.teacher_model(self.scaling_layer(x))

    def forward(self, images: Tensor, unit_range: bool | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss: commitment + mean over patches of 1 - cos(reconstruction, teacher).

        Returns:
            The loss, and {"quant_loss", "rec_loss", "total_loss"} without gradient.

        Raises:
            ValueError: there is no teacher.
        """
        if self.teacher_model is None:
            raise ValueError("this tokenizer was built without a teacher: it can encode, not train")
        x = self.pre_process(images, unit_range)
        target = self.get_target(x)
        codes, ids, quant_loss = self.encode(x)
        if not self.training:
            self.quantize.count_usage(ids)
        rec_loss = (1 - F.cosine_similarity(self.decode(codes).float(), target.float(), dim=-1)).mean()
        loss = quant_loss + rec_loss
        logs = {"quant_loss": quant_loss, "rec_loss": rec_loss, "total_loss": loss}
        return loss, {name: value.detach() for name, value in logs.items()}


def build_tokenizer(teacher: dict | nn.Module | None = None, **config) -> VQKD:
    """A tokenizer of a plain configuration (the arguments of `VQKD`), with a teacher's configuration or module."""
    return VQKD(teacher=build_teacher(teacher) if isinstance(teacher, dict) else teacher, **config)


def load_tokenizer_weights(tokenizer: VQKD, path: str | Path) -> None:
    """Loads a published or own tokenizer file; what belongs to its training (teacher, scaling, loss) is left out, and
    the decoder where the tokenizer has none (`for_encoding`).

    Raises:
        UsageError: another model's weights, or another codebook size; the message says which.
    """
    state = read_state_dict(path, keys=("model", "state_dict", "module"))
    left_out = NOT_TOKENIZER if tokenizer.decoder is not None else (*NOT_TOKENIZER, "decode")
    state = {name: tensor for name, tensor in state.items() if not name.startswith(left_out)}
    codes = state.get("quantize.embedding.weight")
    if codes is None:
        raise UsageError(
            f"{path}: not a VQ-KD tokenizer (no quantize.embedding.weight in it); give one of run_vqkd_training.py"
        )
    own = tokenizer.quantize.embedding.weight
    if codes.shape != own.shape:
        raise UsageError(
            f"{path}: its codebook is {codes.shape[0]} x {codes.shape[1]}, the tokenizer asked for has "
            f"{own.shape[0]} x {own.shape[1]}: give --codebook_size {codes.shape[0]} --codebook_dim {codes.shape[1]} "
            f"(--codebook_n_emd, --codebook_emd_dim in run_vqkd_training.py)"
        )
    expected = {n: t.shape for n, t in tokenizer.state_dict().items() if not n.startswith(NOT_TOKENIZER)}
    for name, shape in expected.items():
        if name not in state or state[name].shape != shape:
            found = tuple(state[name].shape) if name in state else "absent"
            raise UsageError(
                f"{path}: {name} is {found}, this tokenizer needs {tuple(shape)}: weights of another model"
            )
    unknown = sorted(set(state) - set(expected))
    if unknown:
        raise UsageError(f"{path}: {unknown[0]} (and {len(unknown) - 1} more) is unknown: another model's weights")
    tokenizer.load_state_dict(state, strict=False)
