"""The vocabulary file `dict.txt`: token <-> id, in fairseq's format (fairseq/data/dictionary.py)."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np

OVERWRITE_FLAG = "#fairseq:overwrite"
MASK = "<mask>"


class Dictionary:
    """Ids 0..3 are <s> <pad> </s> <unk>, which `dict.txt` does not list; then its lines in order."""

    def __init__(self):
        self.symbols: list[str] = []
        self.count: list[int] = []
        self.indices: dict[str, int] = {}
        self.bos_index = self.add_symbol("<s>")
        self.pad_index = self.add_symbol("<pad>")
        self.eos_index = self.add_symbol("</s>")
        self.unk_index = self.add_symbol("<unk>")
        self.nspecial = len(self.symbols)

    def __len__(self) -> int:
        return len(self.symbols)

    def __contains__(self, symbol: str) -> bool:
        return symbol in self.indices

    def __getitem__(self, index: int) -> str:
        return self.symbols[index] if index < len(self.symbols) else "<unk>"

    def index(self, symbol: str) -> int:
        """The id of a token, <unk>'s for one that is not listed."""
        return self.indices.get(symbol, self.unk_index)

    def bos(self) -> int:
        return self.bos_index

    def pad(self) -> int:
        return self.pad_index

    def eos(self) -> int:
        return self.eos_index

    def unk(self) -> int:
        return self.unk_index

    def digest(self) -> str:
        """Of all tokens in their order; counts do not matter."""
        return hashlib.sha256("\n".join(self.symbols).encode()).hexdigest()[:16]

    def add_symbol(self, word: str, n: int = 1, overwrite: bool = False) -> int:
        """Adds a token, or `n` to the count of one that is there (`overwrite` gives it a new id). Returns its id."""
        if word in self.indices and not overwrite:
            index = self.indices[word]
            self.count[index] += n
            return index
        index = len(self.symbols)
        self.indices[word] = index
        self.symbols.append(word)
        self.count.append(n)
        return index

    def encode_line(self, line: str, append_eos: bool = True) -> np.ndarray:
        """int64 ids of the whitespace-separated tokens of a line, with </s> at the end."""
        unknown = self.unk_index
        ids = [self.indices.get(word, unknown) for word in line.split()]
        return np.array([*ids, self.eos_index] if append_eos else ids, dtype=np.int64)

    # -- files -------------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> Dictionary:
        """Reads `dict.txt`. `<mask>` is not in it: training adds it last (`add_symbol("<mask>")`).

        Raises:
            ValueError: a line that is not `token count`, or a token listed twice; names the file and line.
            FileNotFoundError: no such file.
        """
        dictionary = cls()
        try:
            with open(path, encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    dictionary._add_line(line.rstrip(), f"{path}, line {number}")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a dictionary in UTF-8 ({error})") from None
        return dictionary

    def _add_line(self, line: str, where: str) -> None:
        text, _, field = line.rpartition(" ")
        overwrite = field == OVERWRITE_FLAG
        if overwrite:
            text, _, field = text.rpartition(" ")
        if not text or not field.isdecimal():
            raise ValueError(f"{where}: {line!r} is not of the form '<token> <count>'")
        if text in self.indices and not overwrite:
            raise ValueError(
                f"{where}: token {text!r} is listed twice; if that is meant, end the line with {OVERWRITE_FLAG}"
            )
        self.add_symbol(text, int(field), overwrite=overwrite)

    def save(self, path: str | Path) -> None:
        """Writes `dict.txt`, without the four special tokens."""
        with open(path, "x", encoding="utf-8") as file:
            for symbol, count in zip(self.symbols[self.nspecial :], self.count[self.nspecial :], strict=True):
                file.write(f"{symbol} {count}\n")

    @classmethod
    def from_counts(cls, counts: Counter, threshold: int = -1, nwords: int = -1, padding_factor: int = 8) -> Dictionary:
        """A vocabulary of counted words: most frequent first, equal ones in code point order (`Dictionary.finalize`).

        Args:
            counts: occurrences by word; </s> may be among them.
            threshold: words seen less often are left out.
            nwords: at most this many entries, the four specials counted; -1 for all.
            padding_factor: filled up with `madeupwordNNNN` to a multiple of it.
        """
        dictionary = cls()
        for special in dictionary.symbols:
            dictionary.add_symbol(special, counts.get(special, 0))
        words = [(word, n) for word, n in counts.items() if word not in dictionary.indices]
        words.sort(key=lambda item: (-item[1], item[0]))
        if nwords > 0:
            words = words[: max(0, nwords - dictionary.nspecial)]
        for word, n in words:
            if n < threshold:
                break
            dictionary.add_symbol(word, n)
        filler = 0
        while padding_factor > 1 and len(dictionary) % padding_factor:
            dictionary.add_symbol(f"madeupword{filler:04d}", 0)
            filler += 1
        return dictionary
