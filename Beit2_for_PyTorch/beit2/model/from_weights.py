"""A model of the shape that its weights have: for what takes any checkpoint and asks for no options."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from beit2.model.vision_transformer import VisionTransformer
from common.errors import UsageError

SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
TABLE = "blocks.0.attn.relative_position_bias_table"


@dataclass(frozen=True)
class Shape:
    """What the tensors of a pretraining or fine-tuning model say of it.

    Attributes:
        side: patches along a picture's side.
        classes: of the classifier; 0 without one.
        vocabulary: of the masked image model's head; 0 without one.
        shared_bias, own_bias: one table of relative positions for all blocks; one in every block.
    """

    width: int
    depth: int
    heads: int
    patch: int
    side: int
    classes: int
    vocabulary: int
    layer_scale: bool
    absolute: bool
    shared_bias: bool
    own_bias: bool
    mean_pooling: bool

    @classmethod
    def of(cls, state: dict[str, Tensor], heads: int | None = None) -> Shape:
        """The shape of a state dict.

        Args:
            heads: attention heads, where no table of relative positions tells: by default the width over 64.

        Raises:
            UsageError: it is no such model's.
        """
        for name in ("cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"):
            if name not in state:
                raise UsageError(f"not the weights of a BEiT v2 model: there is no {name}")
        table = state.get(SHARED_TABLE, state.get(TABLE))
        if table is not None:
            heads, side = table.shape[1], (round((len(table) - 3) ** 0.5) + 1) // 2
        elif "pos_embed" in state:
            side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
        else:
            raise UsageError(
                "not the weights of a BEiT v2 model: neither relative_position_bias_table nor pos_embed is there"
            )
        width = state["cls_token"].shape[-1]
        return cls(
            width=width,
            depth=1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
            heads=heads or max(1, width // 64),
            patch=state["patch_embed.proj.weight"].shape[-1],
            side=side,
            classes=len(state["head.weight"]) if "head.weight" in state else 0,
            vocabulary=len(state["lm_head.weight"]) if "lm_head.weight" in state else 0,
            layer_scale="blocks.0.gamma_1" in state,
            absolute="pos_embed" in state,
            shared_bias=SHARED_TABLE in state,
            own_bias=TABLE in state,
            mean_pooling="fc_norm.weight" in state,
        )

    @property
    def pixels(self) -> int:
        """Side of the pictures."""
        return self.side * self.patch

    def encoder(self) -> VisionTransformer:
        """Of that shape, in evaluation mode, with the weights that it is drawn with."""
        return VisionTransformer(
            self.pixels, self.patch, num_classes=self.classes, use_mean_pooling=self.mean_pooling,
            use_abs_pos_emb=self.absolute, embed_dim=self.width, depth=self.depth, num_heads=self.heads,
            init_values=1.0 if self.layer_scale else None, use_rel_pos_bias=self.own_bias,
            use_shared_rel_pos_bias=self.shared_bias,
        ).eval()  # fmt: skip


def encoder_from_weights(state: dict[str, Tensor], heads: int | None = None) -> VisionTransformer:
    """The encoder in evaluation mode, with its classifier where it has one; a pretraining model's heads are left out.

    Raises:
        UsageError: the weights are no such model's, or one is missing.
    """
    encoder = Shape.of(state, heads).encoder()
    try:
        missing, _ = encoder.load_state_dict(state, strict=False)
    except RuntimeError as error:  # of shapes that contradict each other
        raise UsageError(f"not the weights of one BEiT v2 model: {str(error).splitlines()[-1].strip()}") from error
    missing = [name for name in missing if not name.endswith("relative_position_index")]
    if missing:
        raise UsageError(f"not the weights of a whole BEiT v2 model: {missing[0]} is missing")
    return encoder
