"""A figure of what a text model expects at hidden tokens, and of which tokens it holds to be alike."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers.decoders import ByteLevel

from common.run import figures
from data2vec.classifiers import LogisticRegression
from data2vec.data.dictionary import MASK
from data2vec.data.pretraining_data import PretrainingData
from data2vec.text_probe import collect, look

TRAIN_TOKENS, LEAST_SEEN, CLASSES = 30_000, 10, 100
BLOCKS, WORDS, NEIGHBOURS = 8, 12, 4
SPACE = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"  # byte-level BPE's sign for a space in front


def spellings(data: PretrainingData, encoder_json: Path) -> list[str]:
    """How every id of the vocabulary is written; dict.txt holds the numbers that encoder.json gives to tokens."""
    written = {str(number): as_written(token) for token, number in json.loads(encoder_json.read_text()).items()}
    return [written.get(symbol, symbol) for symbol in data.vocab.symbols]


def as_written(token: str) -> str:
    """A piece of byte-level BPE as people write it, "_" for a space in front; parts of a character stay as they are."""
    marked = token.replace(SPACE, "_")
    text = ByteLevel().decode([marked])
    return marked if "\N{REPLACEMENT CHARACTER}" in text else text


class Expectations:
    """What the student's states say of hidden tokens, by a linear probe; and every token's mean target."""

    def __init__(self, model: torch.nn.Module, data: PretrainingData):
        found = collect(model, data.train_batches(epoch=1), TRAIN_TOKENS, data, torch.device("cpu"), "fp32")
        self.probe = LogisticRegression(found["student"], found["token"], CLASSES)
        counts = torch.bincount(found["token"])
        sums = torch.zeros(len(counts), found["target"].shape[1]).index_add(0, found["token"], found["target"])
        often = counts >= LEAST_SEEN
        self.ids = often.nonzero().squeeze(1)[counts[often].argsort(descending=True)]  # the commonest first
        means = sums[self.ids] / counts[self.ids, None]
        self.directions = F.normalize(means - means.mean(dim=0), dim=1)  # [K, C]

    def alike(self, spelled: list[str]) -> list[tuple[str, list[str]]]:
        """The commonest whole words of three letters or more (or tokens, where none is), and the nearest to each."""
        ids = self.ids.tolist()
        words = [i for i, token in enumerate(ids) if len(spelled[token]) > 3 and spelled[token][0] == "_"]
        words = words or list(range(len(ids)))
        near = (self.directions @ self.directions.T).argsort(dim=1, descending=True)[:, 1 : NEIGHBOURS + 1]
        return [(spelled[self.ids[i]], [spelled[self.ids[k]] for k in near[i].tolist()]) for i in words[:WORDS]]


@torch.no_grad()
def filled_blocks(model, data: PretrainingData, known: Expectations, spelled: list[str]) -> list[list[tuple[str, str]]]:
    """Of some held-out blocks every token as it is written and what the model expects, "" where it was not hidden."""
    batch = data.valid_batches(data.config.dataset.valid_subset)[0]
    found, masked, places = look(model, batch, data.vocab.index(MASK))
    expected = torch.full(masked.shape, -1).flatten()
    expected[places] = known.probe.predict(found["student"])
    expected = expected.view_as(masked)
    tokens = masked.flatten().index_copy(0, places, found["token"]).view_as(masked)
    expected = torch.where(tokens < data.vocab.nspecial, -1, expected)  # a hidden <s> is no question
    pad = data.vocab.pad_index
    masks = len(tokens) // len(batch.id)  # of a sample: the first is drawn
    full = [i for i in range(0, len(tokens), masks) if not (tokens[i] == pad).any()][:BLOCKS]
    return [
        [
            (spelled[t], spelled[e] if e >= 0 else "")
            for t, e in zip(tokens[i].tolist(), expected[i].tolist(), strict=True)
        ]
        for i in full
    ]


def draw(blocks: list[list[tuple[str, str]]], alike: list[tuple[str, list[str]]], path: Path) -> None:
    """Blocks of text with hidden tokens in colour (expected over true), and below the words with their neighbours."""
    words = [word for block in blocks for pair in block for word in pair]
    words += [word for first, others in alike for word in (first, *others)]
    with figures.fonts_for(words, "monospace"):
        _draw(blocks, alike, path)


def _draw(blocks: list[list[tuple[str, str]]], alike: list[tuple[str, list[str]]], path: Path) -> None:
    rows = 2 * len(blocks) + len(alike) + 4
    columns = max(map(len, blocks)) if blocks else 1
    longest = max((len(true) for block in blocks for true, _ in block if not true.startswith("<")), default=1)
    figure, axis = figures.new((min(13, max(9, 0.1 * longest * columns)), 0.27 * rows), layout=None)  # inches
    axis.set(xlim=(0, columns), ylim=(rows, 0))
    axis.axis("off")
    font, title = {"fontsize": 9}, {"fontsize": 10, "weight": "bold", "family": "sans-serif"}
    axis.text(0, 0.6, "hidden tokens: expected, of the 100 commonest (green: right), over true; _ is a space", **title)
    for y, block in enumerate(blocks):
        for x, (true, expected) in enumerate(block):
            if expected:
                axis.text(
                    x, 2 * y + 1.7, expected, color="green" if expected == true else "firebrick", weight="bold", **font
                )
            size = {"fontsize": 6} if true in ("<s>", "</s>") else font
            axis.text(x, 2 * y + 2.5, true, color="0.6" if expected else "black", **size)
    top = 2 * len(blocks) + 2.6
    axis.text(0, top, "the commonest words (or tokens), and those whose targets are nearest to theirs", **title)
    for y, (word, neighbours) in enumerate(alike):
        axis.text(0, top + 1 + y, f"{word:<10} {'  '.join(neighbours)}", **font)
    figures.save(figure, path, bbox_inches="tight")
