"""What the text probes look at: states, predictions and targets at masked tokens; and counting, on the same tokens."""

from __future__ import annotations

import numpy as np
import torch

from common import device as devices
from common.run.progress import bar
from data2vec.count_table import CountTable
from data2vec.data.dictionary import MASK
from data2vec.data.epochs import EpochBatches
from data2vec.data.multi.batch import MultiBatch
from data2vec.data.pretraining_data import PretrainingData, TextBatch
from data2vec.model.encoder import Rows, SentenceEncoder
from data2vec.model.multi.model import Data2VecMulti
from data2vec.model.text_model import Data2VecText

TOP_LAYERS = 3  # whose states stand side by side
NOT_VISIBLE = -1
# (by name what is known of masked tokens [N, ...], the masked text int64 [B, T], their places in it int64 [N])
Found = tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]


@torch.no_grad()
def collect(
    model: torch.nn.Module, batches: EpochBatches, limit: int, data: PretrainingData, device, precision: str
) -> dict[str, torch.Tensor]:
    """Of the first `limit` masked tokens, special ones (<s>, </s>) left out.

    Returns:
        student, teacher: fp32 [N, TOP_LAYERS * C], their states; the teacher is given the masked text, too. Of data2vec
            2.0 the decoder's, and none of a teacher, which knows whole texts alone.
        pred, target: fp32 [N, C].
        token, left, right: int64 [N], the original id and the neighbours' in the batch, NOT_VISIBLE where hidden.
    """
    rows: dict[str, list[torch.Tensor]] = {}
    count, mask_idx = 0, data.vocab.index(MASK)
    for batch in bar(batches.loader(num_workers=0), "probe"):
        with devices.autocast(device, precision):
            found, masked, places = look(model, batch.to(device), mask_idx)
        hidden = (mask_idx, data.vocab.bos_index, data.vocab.pad_index)
        found |= {name: _neighbours(masked, side, hidden)[places] for name, side in (("left", -1), ("right", 1))}
        kept = found["token"] >= data.vocab.nspecial
        for name, value in found.items():
            value = value[kept].cpu()
            rows.setdefault(name, []).append(value.float() if value.is_floating_point() else value)
        count += int(kept.sum())
        if count >= limit:
            break
    return {name: torch.cat(values)[:limit] for name, values in rows.items()}


def look(model: torch.nn.Module, batch: TextBatch | MultiBatch, mask_idx: int) -> Found:
    """Of either version's model."""
    return (_look_at_visible if isinstance(model, Data2VecMulti) else _look_at_masked)(model, batch, mask_idx)


def _look_at_masked(model: Data2VecText, batch: TextBatch, mask_idx: int) -> Found:
    out, plan = model(batch.src_tokens, batch.target_tokens, mask_idx, batch.plan), batch.plan
    found = {"pred": out["pred"], "target": out["target"]}
    for name, encoder in (("student", model.encoder.student), ("teacher", model.encoder.teacher)):
        found[name] = top_states(encoder, batch.src_tokens, plan.has_padding, plan.rows)
    found["token"] = batch.target_tokens.flatten()[plan.rows.flat]
    return found, batch.src_tokens, plan.rows.flat


def _look_at_visible(model: Data2VecMulti, batch: MultiBatch, mask_idx: int) -> Found:
    """The same of data2vec 2.0, whose encoder never sees a place that is hidden: the states are the decoder's."""
    out, plan = model(batch.source, batch.plan, batch.has_padding), batch.plan
    states = model.decoder_states(batch.source, plan, batch.has_padding)[-TOP_LAYERS:]  # [N, D] each
    found = {"pred": out["pred"], "target": out["target"], "student": torch.cat(states, dim=1)}
    found["token"] = batch.source.flatten()[plan.target]
    masked = batch.source.repeat_interleave(plan.masks, dim=0)  # [B * M, T]
    return found, masked.flatten().index_fill(0, plan.hidden, mask_idx).view_as(masked), plan.hidden


def top_states(encoder: SentenceEncoder, tokens: torch.Tensor, has_padding: bool, rows: Rows) -> torch.Tensor:
    """The last TOP_LAYERS layers' states of `rows`, side by side: [N, layers * C]."""
    x, key_mask = encoder.embed(tokens, has_padding)
    states = []
    for layer in encoder.layers:
        x, _ = layer(x, key_mask)  # [B, T, C]
        states.append(x.flatten(0, 1).index_select(0, rows.flat))
    return torch.cat(states[-TOP_LAYERS:], dim=1)


def _neighbours(source: torch.Tensor, side: int, hidden: tuple[int, ...]) -> torch.Tensor:
    """int64 [B * T]: the id on that side (-1 or 1) of every position, NOT_VISIBLE at edges and for the `hidden` ids."""
    beside = source.roll(-side, dims=1)  # [B, T]
    beside[:, -1 if side == 1 else 0] = NOT_VISIBLE
    return beside.masked_fill(torch.isin(beside, beside.new_tensor(hidden)), NOT_VISIBLE).flatten()


def counting_accuracy(corpus: np.ndarray, common: torch.Tensor, asked: dict[str, torch.Tensor]) -> float:
    """Percent of the asked tokens among `common` that a table of both visible neighbours' counts gets right."""
    table = CountTable(corpus, common.numpy())
    place = {int(token): i for i, token in enumerate(common)}
    right = total = 0
    for token, before, after in zip(*(asked[name].tolist() for name in ("token", "left", "right")), strict=True):
        if token in place:
            neighbours = (None if n == NOT_VISIBLE else n for n in (before, after))
            right, total = right + (table.guess(*neighbours) == place[token]), total + 1
    return 100 * right / max(1, total)
