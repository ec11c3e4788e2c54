"""Files that somebody else wrote, or that a disk has changed: every parser of ours reads them or refuses them by name.

A whole example of each kind of file is edited at random places by hypothesis. What may come of it is a result or an
error of our own that names the file; no other exception, no memory for a number in the file.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import resource
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from ci.training_cases import CASES, ROOT, TEXT_CONFIG
from common import checkpoint_file, rank_table
from common.checkpoint_file import CheckpointError
from common.data import pictures
from common.errors import UsageError
from common.launch import flags, world
from common.launch.world import LaunchError
from common.run import metrics_file, replay, result_file

MEMORY = 6 << 30  # beyond what the process has: no example is larger than a few kilobytes
# what has broken parsers before: huge and negative numbers, nesting, quotes, other encodings, interpolations
FRAGMENTS = [
    b"", b"\0", b"\xff", b"\x7f" + b"\xff" * 7, b"\xff" * 8, b"\0" * 8, b"-1", b"0", b"9" * 30, b"1e999", b"NaN",
    b"0x1", b"null", b"true", b"[", b"]", b"{", b"}", b"[" * 3000, b'"', b"'", b"\n", b"\r", b",", b"\t", b":", b" ",
    b"=", b"-", b"../", b"/", b"~", b"${x}", b"${oc.env:HOME}", b"&a *a", b"!!python/name:os.system", b"\xef\xbb\xbf",
    b"\xd8\x00", "\u540d".encode(), "\u00b2".encode(), "\u2028".encode(), b"\xed\xa0\x80", b"5" * 5000, b"#", b"%",
    b"\\u0000", b"\\ud800",
]  # fmt: skip
_TOKEN = -1  # a whole word, number or quoted text
EDITS = st.lists(
    st.tuples(
        st.floats(0, 1),  # where
        st.sampled_from([_TOKEN, _TOKEN, 0, 0, 1, 2, 4, 8, 1 << 30]),  # how many bytes go
        st.one_of(st.sampled_from(FRAGMENTS), st.binary(max_size=8)),  # what comes in their place
    ),
    max_size=5,
)


@dataclass(frozen=True)
class Parser:
    """One of our readers.

    Attributes:
        file: the name of what it reads.
        good: a whole example, which it reads.
        own: the errors it may raise; empty: it always has an answer.
        names_it: whether they have to name the file; a word of a command line has none.
    """

    name: str
    file: str
    good: bytes
    read: Callable[[Path], Any]
    own: tuple[type[BaseException], ...] = (UsageError,)
    names_it: bool = True


def edited(good: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    for where, gone, new in edits:
        at = int(where * len(good))
        if gone == _TOKEN:
            tokens = list(re.finditer(rb'"[^"]*"|[\w.+-]+', good)) or [re.match(rb"", good)]
            token = tokens[min(int(where * len(tokens)), len(tokens) - 1)]
            at, gone = token.start(), len(token[0])
        good = good[:at] + new + good[at + gone :]
    return good


def problem_of(parser: Parser, folder: Path, content: bytes) -> str | None:
    """What the parser does wrong with a content, None where it reads or refuses it."""
    path = folder / parser.file
    path.write_bytes(content)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            parser.read(path)
    except parser.own as error:
        if parser.names_it and path.name not in str(error):
            return f"{type(error).__name__} without the file: {str(error)[:200]}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def fuzz(parser: Parser, cases: int, number: int = 0) -> str | None:
    """What a parser does not stand, with the content, out of so many; None where it stands all of them."""
    found: list[str] = []

    @seed(number)
    @settings(
        max_examples=cases,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(EDITS)
    def look(edits: list[tuple[float, int, bytes]]) -> None:
        content = edited(parser.good, edits)
        if problem := problem_of(parser, Path(folder), content):
            found.append(f"{problem}; with {content[:300]!r}")
            raise AssertionError

    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, limited_memory():
        if problem := problem_of(parser, Path(folder), parser.good):
            return f"the whole example: {problem}"
        with contextlib.suppress(AssertionError), contextlib.redirect_stdout(io.StringIO()):
            look()
    return found[-1] if found else None


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """An allocation for a number in a file fails here, instead of on a user's machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# -- the parsers -------------------------------------------------------------------------------------------------------


def parsers() -> list[Parser]:
    sys.path += [str(ROOT / project) for project in CASES if str(ROOT / project) not in sys.path]
    return [*of_common(), *of_vit(), *of_clip(), *of_data2vec()]


def bytes_of(write: Callable[[Path], Any], name: str) -> bytes:
    """What a writer of ours makes of its example."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / name)
        return (Path(folder) / name).read_bytes()


def as_json(content: Any) -> bytes:
    return json.dumps(content).encode()


def of_common() -> list[Parser]:
    table = rank_table.merge(
        [rank_table.generate(f"10.0.0.{n}", {0: f"192.168.{n}.1", 1: f"192.168.{n}.2"}) for n in (1, 2)]
    )
    weights = bytes_of(partial(checkpoint_file.save, {"model": {"w": torch.ones(3)}, "epoch": 1}), "a.pt")
    unsealed = weights[: weights.rindex(b"\nsha256:")]  # without our digest every byte reaches torch's reader
    record = as_json({"step": 2, "ranks": {"0": ["a.png"]}, "world_size": 1, "place": {"epoch": 1}})
    known = {"nproc": "", "hostfile": "", "data_path": "", "batch_size": "32", "dry_run": "", "epochs": ""}
    line = as_json({"kind": "train", "step": 1, "loss": 0.5}) + b"\n"

    def shell_words(path: Path) -> None:
        parsed = flags.parse(path.read_bytes().decode("utf-8", "surrogateescape").split("\n"), known, path.parent)
        flags.check(parsed, {})

    return [
        Parser("checkpoint with digest", "a.pt", weights, checkpoint_file.load, (CheckpointError,)),
        Parser("checkpoint without", "a.pt", unsealed, checkpoint_file.load, (CheckpointError,)),
        Parser("rank table", "t.json", as_json(table), lambda path: world.nodes_of_table(str(path)), (LaunchError,)),
        Parser(
            "host file",
            "hosts",
            b"10.0.0.1 slots=2\nnode-b slots=2 # rack 2\n",
            lambda path: world.nodes_of_hostfile(str(path), None, 1),
            (LaunchError,),
        ),
        Parser(
            "shell flags",
            "words",
            b"--nproc=2\n--data_path\n/data\n--dry_run\n--\n--lr=1",
            shell_words,
            (LaunchError,),
            False,
        ),
        Parser("replay.json", "replay.json", record, partial(replay.read, total_steps=10, place=["epoch"])),
        Parser("result file", "r_acc.log", b"Status = OK\nActualLoss = 0.5\n", result_file.read, ()),
        Parser("metrics.jsonl", "metrics.jsonl", line * 2, metrics_file.read_losses, ()),
        Parser("picture", "a.png", bytes_of(picture, "a.png"), pictures.read, (pictures.BrokenPicture,)),
        Parser(
            "picture", "a.jpg", bytes_of(picture, "a.jpg"), partial(pictures.read, turn=True), (pictures.BrokenPicture,)
        ),
    ]


def picture(path: Path) -> None:
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)).save(path)


def of_vit() -> list[Parser]:
    from vit import mindspore_checkpoint
    from vit.config import run_config as config

    weights = {"a.weight": torch.ones(2, 3), "b": torch.arange(4)}
    recipe = b"epochs: 3\nbatch_size: 8\nmodel: {name: vit_demo, drop_path: 0.1}\noptimizer:\n  base_lr: 1.0e-3\n"
    return [
        Parser(
            "MindSpore checkpoint",
            "m.ckpt",
            bytes_of(partial(mindspore_checkpoint.write, params=weights), "m.ckpt"),
            mindspore_checkpoint.read,
            (CheckpointError,),
        ),
        Parser("ViT's YAML", "c.yaml", recipe, config.load),
        Parser(
            "ViT's overrides",
            "words",
            b"optimizer.base_lr=1e-3",
            lambda path: config.load(None, [path.read_bytes().decode("utf-8", "replace")]),
            names_it=False,
        ),
    ]


def of_clip() -> list[Parser]:
    from clip_pretraining.data import coco, shards, tables

    captions = {
        "images": [{"id": 1, "file_name": "1.jpg"}],
        "annotations": [{"image_id": 1, "id": 7, "caption": "a cat"}],
    }
    rows = [{"image_path": "1.jpg", "caption": "a cat"}, {"image_path": "2.jpg", "caption": "a dog, red"}]
    csv, tsv = (
        b'image_path,caption\n1.jpg,a cat\n2.jpg,"a dog, red"\n',
        b"image_path\tcaption\n1.jpg\ta cat\n2.jpg\ta dog\n",
    )
    tables_of = partial(tables.read_table, image_column="image_path", caption_column="caption", limit=0.5)
    as_lines = b"".join(as_json(row) + b"\n" for row in rows)
    return [
        Parser(
            "captions JSON",
            "captions.json",
            as_json(captions),
            lambda path: coco.read_captions(path, path.parent, "train"),
        ),
        *(
            Parser(f"table {n[1:]}", n, text, tables_of)
            for n, text in (("t.csv", csv), ("t.tsv", tsv), ("t.json", as_json(rows)), ("t.jsonl", as_lines))
        ),
        Parser("tar", "s.tar", bytes_of(pairs_in_tar, "s.tar"), lambda path: shards.read_shards(str(path), limit=1.0)),
        Parser(
            "list of tars",
            "s.txt",
            b"/no/a-{0..3}.tar\n# more\n",
            lambda path: shards.expand_shards(f"@{path}"),
            names_it=False,
        ),
    ]


def pairs_in_tar(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in (
            ("1.jpg", b"\xff\xd8 no picture"),
            ("1.txt", b"a cat"),
            ("2.jpg", b"x"),
            ("2.txt", b"a dog"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def of_data2vec() -> list[Parser]:
    from data2vec.config import load_config
    from data2vec.data.dictionary import Dictionary
    from data2vec.data.indexed_dataset import IndexedDataset, write_corpus

    corpus = [np.arange(5), np.arange(3)]
    recipe = TEXT_CONFIG.format(tokens=32, batch=128, width=32, inner=128, layers=3, heads=4)
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder) / "c", corpus, np.uint16)
        idx, tokens = ((Path(folder) / f"c.{suffix}").read_bytes() for suffix in ("idx", "bin"))

    def read_corpus(path: Path, other: bytes) -> None:
        path.with_suffix({".idx": ".bin", ".bin": ".idx"}[path.suffix]).write_bytes(other)
        dataset = IndexedDataset(path.with_suffix(""))
        [dataset[i] for i in range(min(len(dataset), 10))]

    def overrides(path: Path) -> None:
        (path.parent / "c.yaml").write_text(recipe)
        load_config(path.parent, "c", [path.read_bytes().decode("utf-8", "replace")])

    return [
        Parser("corpus .idx", "c.idx", idx, partial(read_corpus, other=tokens), (ValueError,)),
        Parser("corpus .bin", "c.bin", tokens, partial(read_corpus, other=idx), (ValueError,)),
        Parser("dict.txt", "dict.txt", b"the 12\na 7\ncat 3\n", Dictionary.load, (UsageError, ValueError)),
        Parser("data2vec's YAML", "c.yaml", recipe.encode(), lambda path: load_config(path.parent, "c", [])),
        Parser("data2vec's overrides", "words", b"optimization.lr=[0.001]", overrides, names_it=False),
    ]
