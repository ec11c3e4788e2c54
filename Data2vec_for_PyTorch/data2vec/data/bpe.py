"""Byte-level BPE in GPT-2's two files, and texts as the ids of a vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.errors import UsageError
from data2vec.data.dictionary import MASK, Dictionary

_tokenizers: dict[tuple[str, str], object] = {}  # one a process


def load_tokenizer(encoder_json: str, vocab_bpe: str):
    """The tokenizer of the two files, loaded once a process. ValueError when they are something else."""
    key = (encoder_json, vocab_bpe)
    if key not in _tokenizers:
        from tokenizers import ByteLevelBPETokenizer

        try:
            _tokenizers[key] = ByteLevelBPETokenizer.from_file(encoder_json, vocab_bpe)
        except Exception as error:  # the library has no class of its own
            raise ValueError(f"{encoder_json} and {vocab_bpe} are not GPT-2's two files ({error})") from None
    return _tokenizers[key]


class TextEncoding:
    """Texts to ids as bpe_encode.py and preprocess.py make them, without <s> and </s>.

    Attributes:
        vocab: of dict.txt, with <mask>.

    Raises:
        UsageError: a file that is missing, or something else.
    """

    def __init__(self, encoder_json: str, vocab_bpe: str, dict_path: str):
        for path in (encoder_json, vocab_bpe, dict_path):
            if not Path(path).is_file():
                raise UsageError(f"{path}: no such file")
        try:
            self._tokenizer = load_tokenizer(str(encoder_json), str(vocab_bpe))
            self.vocab = Dictionary.load(dict_path)
        except (OSError, ValueError) as error:
            raise UsageError(str(error)) from None
        self.vocab.add_symbol(MASK)
        self.files = f"{encoder_json}, {vocab_bpe} and {dict_path}"

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; its line ends count as spaces.

        Raises:
            UsageError: most pieces are not in dict.txt: the files belong to different corpora.
        """
        lines = [" ".join(text.split("\n")).strip() for text in texts]
        found = [[self.vocab.index(str(i)) for i in e.ids] for e in self._tokenizer.encode_batch(lines)]
        total = sum(map(len, found))
        unknown = sum(ids.count(self.vocab.unk_index) for ids in found)
        if 2 * unknown > total:
            raise UsageError(
                f"{self.files}: {unknown} of {total} pieces of the text are not in the last of them: give those with "
                "which the pretraining corpus was made"
            )
        return found
