"""A classifier or regressor of sentences: the pretrained encoder and RoBERTa's head on the first token (<s>).

Parameter names are those of fairseq's `data2vec_text_classification`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from data2vec.model.encoder import EncoderConfig, Rows, SentenceEncoder, init_bert_weights
from data2vec.model.text_model import encoder_config

HEAD = "sentence_classification_head"


class ClassificationHead(nn.Module):
    """dropout, dense, tanh, dropout, projection (fairseq RobertaClassificationHead)."""

    def __init__(self, dim: int, outputs: int, pooler_dropout: float):
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(pooler_dropout)
        self.out_proj = nn.Linear(dim, outputs)

    def forward(self, first: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.dense(self.dropout(first)))  # [B, C]
        return self.out_proj(self.dropout(x))  # [B, outputs]


class SentenceModel(nn.Module):
    """tokens -> logits.

    Args:
        outputs: classes, or 1 for a regression.
    """

    def __init__(self, encoder: EncoderConfig, outputs: int, pooler_dropout: float = 0.0, init_std: float = 0.02):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.sentence_encoder = SentenceEncoder(encoder)
        head = ClassificationHead(encoder.embed_dim, outputs, pooler_dropout)
        self.classification_heads = nn.ModuleDict({HEAD: head})
        self.apply(partial(init_bert_weights, std=init_std))

    def forward(self, tokens: torch.Tensor, first: Rows, has_padding: bool = True) -> torch.Tensor:
        """fp32 [B, outputs].

        Args:
            tokens: int64 [B, T], <s> first.
            first: places of the first tokens; the last layer works on them alone.
        """
        x = self.encoder.sentence_encoder(tokens, has_padding, first)  # [B, C]
        return self.classification_heads[HEAD](x).float()


def sentence_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Sum over the batch: cross-entropy to class numbers int64 [B], or squared distance to numbers fp32 [B]."""
    if target.is_floating_point():
        return F.mse_loss(logits.squeeze(1), target, reduction="sum")
    return F.cross_entropy(logits, target, reduction="sum")


def build_sentence_model(model_config: Mapping[str, Any], vocab_size: int, outputs: int) -> SentenceModel:
    """The model of a `model` configuration. ValueError: options that do not fit together."""
    return SentenceModel(
        encoder_config(model_config, vocab_size), outputs, model_config["pooler_dropout"], model_config["init_std"]
    )
