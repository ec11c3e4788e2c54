"""What the text probes look at: states, predictions and targets at masked tokens; and counting, on the same tokens."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from common import device as devices
from common.errors import UsageError
from common.run.progress import bar
from data2vec.count_table import NOT_VISIBLE, CountTable, guess_of_four
from data2vec.data.dictionary import MASK
from data2vec.data.epochs import EpochBatches
from data2vec.data.multi.batch import MultiBatch
from data2vec.data.pretraining_data import PretrainingData, TextBatch
from data2vec.model.encoder import Rows, SentenceEncoder
from data2vec.model.multi.model import Data2VecMulti
from data2vec.model.text_model import Data2VecText

TOP_LAYERS = 3  # whose states stand side by side
OFFSETS = (-2, -1, 1, 2)  # of the neighbours that counting looks at
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
        token: int64 [N], the original id.
        around: int64 [N, 4], the ids at OFFSETS in the batch, NOT_VISIBLE where hidden.

    UsageError where fewer than two are masked: nothing can be fitted to them, or found among them.
    """
    rows: dict[str, list[torch.Tensor]] = {}
    count, mask_idx = 0, data.vocab.index(MASK)
    for batch in bar(batches.loader(num_workers=0), "probe"):
        with devices.autocast(device, precision):
            found, masked, places = look(model, batch.to(device), mask_idx)
        hidden = (mask_idx, data.vocab.bos_index, data.vocab.pad_index)
        found["around"] = _neighbours(masked, hidden)[places]
        kept = found["token"] >= data.vocab.nspecial
        for name, value in found.items():
            value = value[kept].cpu()
            rows.setdefault(name, []).append(value.float() if value.is_floating_point() else value)
        count += int(kept.sum())
        if count >= limit:
            break
    if count < 2:
        raise UsageError(
            f"task.data={data.config.task.data}: a split has {count} masked tokens to ask for (special and "
            "unknown ones left out): give it more text, whose tokens dict.txt has"
        )
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


def _neighbours(source: torch.Tensor, hidden: tuple[int, ...]) -> torch.Tensor:
    """int64 [B * T, 4]: the ids at OFFSETS of every position, NOT_VISIBLE beyond edges and for the `hidden` ids."""
    shown = source.masked_fill(torch.isin(source, source.new_tensor(hidden)), NOT_VISIBLE)
    reach = max(OFFSETS)
    wide = F.pad(shown, (reach, reach), value=NOT_VISIBLE)  # [B, reach + T + reach]
    length = source.shape[1]
    return torch.stack([wide[:, reach + o : reach + o + length] for o in OFFSETS], dim=2).flatten(0, 1)


def counting_accuracy(corpus: np.ndarray, common: torch.Tensor, asked: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Percent of the asked tokens among `common` that tables of the visible neighbours' counts get right.

    One of a neighbour on each side, and one of two on each side where it has seen them.
    """
    common = common.numpy()
    kept = np.isin(asked["token"].numpy(), common)
    token, around = asked["token"].numpy()[kept], asked["around"].numpy()[kept]
    if not len(token):
        return 0.0, 0.0
    table = CountTable(corpus, common)
    of_two = np.array([table.guess(left, right) for left, right in around[:, 1:3].tolist()])
    of_four = guess_of_four(corpus, common, around)
    of_four = np.where(of_four < 0, of_two, of_four)
    return tuple(100 * float((common[guesses] == token).mean()) for guesses in (of_two, of_four))
