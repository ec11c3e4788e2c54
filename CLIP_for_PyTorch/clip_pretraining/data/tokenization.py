"""Captions to token ids: the folder's tokenizer, OpenAI's, a tiny trained one; tokenised once, packed, padded late."""

from __future__ import annotations

import gzip
import html
import itertools
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerBase, RobertaTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

# in the format of openai/CLIP's bpe_simple_vocab_16e6.txt.gz (MIT licence): the 48,894 merges that CLIP uses of it
OPENAI_BPE = Path(__file__).with_name("clip_merges.txt.gz")
# A batch is padded to the first of these that holds its longest caption: few shapes, so graph-compiling devices
# recompile rarely. COCO captions (mean 13 tokens) land on 16 and 24.
BUCKETS = (8, 16, 24, 32, 48, 64, 77, 96, 128)


def load_tokenizer(folder_or_name: str, **kwargs) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, written by transformers 4 (vocab.json, merges.txt) or 5 (tokenizer.json)."""
    return AutoTokenizer.from_pretrained(folder_or_name, **kwargs)


def openai_tokenizer(bpe_path: str | Path = OPENAI_BPE) -> CLIPTokenizer:
    """CLIP's 49,408-entry BPE, for a `CLIPModel` trained from scratch; `bpe_path` may be OpenAI's whole file, too.

    With `clean_caption` before it and `split_special_tokens=True` the ids are open_clip's, bit for bit.
    """
    with gzip.open(bpe_path, "rt", encoding="utf-8") as lines:
        merges = [tuple(line.split()) for line in lines.read().split("\n")[1 : 49152 - 256 - 2 + 1]]
    units = list(bytes_to_unicode().values())
    words = units + [u + "</w>" for u in units] + ["".join(m) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges, model_max_length=77)


def clean_caption(text: str) -> str:
    """OpenAI's caption cleaning: mend broken Unicode, undo HTML entities (twice), one space, lower case."""
    import ftfy  # only this function needs it

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip().lower()


def train_tokenizer(captions: Sequence[str], vocab_size: int = 1000, for_clip: bool = False) -> RobertaTokenizer:
    """A small byte-level BPE in RoBERTa's layout (<s> 0, <pad> 1, </s> 2, <unk> 3) from the given captions.

    `for_clip`: </s> is 3. A `CLIPModel` whose end is 2 pools not there but at the highest id, since OpenAI's first
    configurations said 2 of a tokenizer whose end is the last of all.
    """
    trainer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", *(("<unk>", "</s>") if for_clip else ("</s>", "<unk>")), "<mask>"]
    trainer.train_from_iterator(
        captions, vocab_size=vocab_size, min_frequency=2, special_tokens=special, show_progress=False
    )
    model = json.loads(trainer.to_str())["model"]
    return RobertaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])


class PackedCaptions:
    """Token ids of many captions in one array: 591,753 COCO captions take 16 MB instead of 300 MB padded."""

    def __init__(self, ids: np.ndarray, offsets: np.ndarray):
        self.ids = ids  # uint16, or int32 for more than 65,536 words; [sum of lengths]
        self.offsets = offsets  # int64 [captions + 1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    @classmethod
    def tokenise(cls, captions: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> PackedCaptions:
        """Every caption once, unpadded, truncated to max_length tokens (special tokens included)."""
        kind = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
        parts, lengths = [np.zeros(0, kind)], []
        last = time.monotonic()
        for start in range(0, len(captions), 4096):
            batch = tokenizer(captions[start : start + 4096], truncation=True, max_length=max_length)["input_ids"]
            parts.append(np.fromiter(itertools.chain.from_iterable(batch), dtype=kind))
            lengths += map(len, batch)
            if time.monotonic() - last > 30:
                last = time.monotonic()
                print(f"tokenising: {start:,} of {len(captions):,} captions", flush=True)
        offsets = np.zeros(len(captions) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return cls(np.concatenate(parts), offsets)


def pad_captions(rows: Sequence[np.ndarray], pad_token_id: int, max_length: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, int64 [B, L], L the smallest bucket that holds the longest row."""
    longest = max(len(row) for row in rows)
    length = min(next((b for b in BUCKETS if b >= longest), -(-longest // 64) * 64), max_length)
    ids = np.full((len(rows), length), pad_token_id, dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
