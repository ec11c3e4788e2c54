"""fairseq's memory-mapped corpus: `X.bin` holds the token ids back to back, `X.idx` the sizes (MMapIndexedDataset).

X.idx, little endian: magic `MMIDIDX\\0\\0`, u64 version 1, u8 dtype code, u64 N, int32 sizes[N], int64 pointers[N]
(byte offsets into X.bin). There is no document index: that is Megatron's variant.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
HEADER_BYTES = len(MAGIC) + 8 + 1 + 8
# fairseq's codes; 7 is read as float64, which is written as 6.
DTYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float64,
    8: np.uint16,
    9: np.uint32,
    10: np.uint64,
}


def best_fitting_int_dtype(vocab_size: int) -> type[np.integer]:
    """The dtype fairseq-preprocess stores ids of a vocabulary in."""
    if vocab_size < 65500:
        return np.uint16
    return np.uint32 if vocab_size < 2**32 - 1 else np.int64


def prefix_of(path: str | Path) -> Path:
    """`corpus/train` for `corpus/train`, `corpus/train.bin` and `corpus/train.idx`."""
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def files_of(path: str | Path) -> tuple[Path, Path]:
    """The `.bin` and `.idx` of a prefix (whose name may have dots of its own)."""
    prefix = prefix_of(path)
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


class IndexedDataset(torch.utils.data.Dataset):
    """Reads a `.bin/.idx` pair; item i is an int64 tensor (floats are cut off, as in fairseq).

    Opening reads the sizes only; tokens are paged in when used. Each process maps the file anew (pickling carries the
    path), so loader workers share the page cache and nothing else.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: not an index of this format, cut short, or index and data that do not belong together.
    """

    def __init__(self, path: str | Path):
        super().__init__()
        self.path = prefix_of(path)
        bin_path, idx_path = files_of(path)
        for file in (idx_path, bin_path):
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file}: no such file (a corpus needs both {idx_path.name} and {bin_path.name})"
                )
        self.dtype, self.sizes, self._pointers = _read_index(idx_path)
        self._check_pair(bin_path, idx_path)
        empty = bin_path.stat().st_size == 0  # an empty file cannot be mapped
        self._tokens = np.zeros(0, self.dtype) if empty else np.memmap(bin_path, mode="r", dtype=self.dtype)

    def _check_pair(self, bin_path: Path, idx_path: Path) -> None:
        itemsize = np.dtype(self.dtype).itemsize
        needed = int(self.sizes.sum(dtype=np.int64)) * itemsize
        actual = bin_path.stat().st_size
        if needed != actual:
            what = "cut short" if actual < needed else "longer than its index says"
            raise ValueError(
                f"{bin_path}: {actual} bytes, but {idx_path} describes {needed} ({len(self.sizes)} items of "
                f"{np.dtype(self.dtype).name}): the data is {what}, or the two files are of different runs; run "
                "preprocess.py again"
            )

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> torch.Tensor:
        start = int(self._pointers[index]) // np.dtype(self.dtype).itemsize
        return torch.from_numpy(self.token_range(start, start + int(self.sizes[index])))

    def token_range(self, start: int, stop: int) -> np.ndarray:
        """int64 tokens [start, stop) of the whole corpus seen as one row."""
        return self._tokens[start:stop].astype(np.int64)

    def __getstate__(self) -> dict:
        return {"path": self.path}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["path"])


class JoinedCorpus:
    """Several corpora as one row of sentences, such as train, train1, ... of one split.

    Raises:
        FileNotFoundError, ValueError: as `IndexedDataset`.
    """

    def __init__(self, paths: Sequence[Path]):
        self.parts = [IndexedDataset(path) for path in paths]
        self.path = self.parts[0].path
        self.sizes = np.concatenate([part.sizes for part in self.parts])
        tokens = [int(part.sizes.sum(dtype=np.int64)) for part in self.parts]
        self._starts = np.concatenate([[0], np.cumsum(tokens)])

    def __len__(self) -> int:
        return len(self.sizes)

    def token_range(self, start: int, stop: int) -> np.ndarray:
        """int64 tokens [start, stop) of all corpora seen as one row."""
        pieces = [np.zeros(0, np.int64)]
        for part, begin, end in zip(self.parts, self._starts[:-1], self._starts[1:], strict=True):
            if start < end and stop > begin:
                pieces.append(part.token_range(max(start, begin) - begin, min(stop, end) - begin))
        return np.concatenate(pieces)


def parts_of(prefix: Path) -> list[Path]:
    """train, train1, train2, ... as far as they are there: what fairseq reads as one split."""
    parts = [prefix]
    while files_of(following := prefix.with_name(f"{prefix.name}{len(parts)}"))[1].is_file():
        parts.append(following)
    return parts


def _read_index(path: Path) -> tuple[type, np.ndarray, np.ndarray]:
    with open(path, "rb") as file:
        header = file.read(HEADER_BYTES)
    if header.startswith(LEGACY_MAGIC):
        raise ValueError(
            f"{path}: fairseq's old 'cached/lazy' format (TNTIDX); only 'mmap' is read here. Make it again with "
            "preprocess.py, or with fairseq-preprocess --dataset-impl mmap"
        )
    if not header.startswith(MAGIC):
        raise ValueError(f"{path}: not a fairseq mmap index (its first bytes are {header[:9]!r}, not {MAGIC!r})")
    if len(header) < HEADER_BYTES:
        raise ValueError(f"{path}: cut short inside its header ({len(header)} of {HEADER_BYTES} bytes)")
    version, code, count = struct.unpack("<QBQ", header[len(MAGIC) :])
    if version != 1:
        raise ValueError(f"{path}: index version {version}, only 1 is known")
    if code not in DTYPES:
        raise ValueError(f"{path}: unknown dtype code {code}; known are {sorted(DTYPES)}")
    needed, actual = HEADER_BYTES + 12 * count, path.stat().st_size
    if needed != actual:
        # Megatron's index goes on with a document list, which the message should not call damage.
        hint = "is it Megatron's variant with a document list?" if actual > needed else "it is cut short"
        raise ValueError(f"{path}: {actual} bytes where {count} items need {needed}: {hint}")
    sizes = np.fromfile(path, dtype="<i4", count=count, offset=HEADER_BYTES)
    pointers = np.memmap(path, mode="r", dtype="u1")[HEADER_BYTES + 4 * count :].view("<i8")
    return DTYPES[code], sizes, pointers


class IndexedDatasetBuilder:
    """Writes a `.bin/.idx` pair, item by item or in bulk; the index is written by `finalize`.

    Args:
        path: prefix of the two files. Neither may exist.
        dtype: of the stored ids.
    """

    def __init__(self, path: str | Path, dtype: type = np.int32):
        self.dtype = np.dtype(dtype)
        self._bin_path, self._idx_path = files_of(path)
        for file in (self._bin_path, self._idx_path):
            if file.exists():
                raise FileExistsError(f"{file} exists and is not overwritten")
        self._file = open(self._bin_path, "xb")
        self._sizes: list[np.ndarray] = []

    def add_item(self, item: torch.Tensor | np.ndarray) -> None:
        """Appends one sentence."""
        self.add_items(np.asarray(item), np.array([len(item)]))

    def add_items(self, tokens: np.ndarray, sizes: np.ndarray) -> None:
        """Appends many sentences at once: their tokens in one row, and their sizes."""
        self._file.write(np.asarray(tokens).astype(self.dtype).tobytes())
        self._sizes.append(np.asarray(sizes, dtype=np.int32))

    def merge_file(self, path: str | Path) -> None:
        """Appends a whole other corpus of the same dtype."""
        other = IndexedDataset(path)
        if np.dtype(other.dtype) != self.dtype:
            raise ValueError(f"{path}: stores {np.dtype(other.dtype).name}, this corpus {self.dtype.name}")
        self._sizes.append(other.sizes)
        with open(files_of(path)[0], "rb") as source:
            while chunk := source.read(1 << 20):
                self._file.write(chunk)

    def finalize(self) -> None:
        """Closes the data file and writes the index."""
        self._file.close()
        sizes = np.concatenate([np.zeros(0, np.int32), *self._sizes])
        pointers = np.zeros(len(sizes), dtype="<i8")
        np.cumsum(sizes[:-1].astype(np.int64) * self.dtype.itemsize, out=pointers[1:])
        code = next(code for code, dtype in DTYPES.items() if np.dtype(dtype) == self.dtype)
        with open(self._idx_path, "xb") as file:
            file.write(MAGIC + struct.pack("<QBQ", 1, code, len(sizes)))
            file.write(sizes.astype("<i4").tobytes())
            file.write(pointers.tobytes())


def write_corpus(path: str | Path, items: Iterable[np.ndarray], dtype: type) -> None:
    """Writes a corpus in one call."""
    builder = IndexedDatasetBuilder(path, dtype)
    for item in items:
        builder.add_item(item)
    builder.finalize()
