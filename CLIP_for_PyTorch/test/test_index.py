"""The index of the pairs: what it holds, when it is built anew, that there is never half of one; texts in arrays."""

import csv
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import psutil
import pytest
from clip_sample import draw, write_shard

import run_clip
from ci.gates import forked_ranks
from clip_pretraining.data import tables, texts
from clip_pretraining.data.batches import GlobalBatchSampler
from clip_pretraining.data.pairs import ImageRef, Pairs
from clip_pretraining.data.tokenization import load_tokenizer
from clip_pretraining.options.arguments import DataArguments
from clip_pretraining.training import sources
from common.distributed import World

PROJECT = Path(__file__).parents[1]


def test_texts_in_arrays_are_the_texts():
    wanted = ["a dog", "", "caf\udce9, not UTF-8", "äöü", "a dog", "犬" * 5000]
    packed = texts.Texts.of(wanted)
    assert list(packed) == wanted == [packed[i] for i in range(6)] and packed[-1] == wanted[-1]
    assert packed[1:3] == wanted[1:3] and list(packed.take(np.array([0, 3, 5]))) == [wanted[i] for i in (0, 3, 5)]
    assert texts.first_equal(packed, 6).tolist() == [0, 1, 2, 3, 0, 5]
    with pytest.raises(IndexError):
        packed[6]
    many = texts.Texts.of(str(i) for i in range(10_000))
    assert list(many.take(np.arange(1, 10_000, 2))) == [str(i) for i in range(1, 10_000, 2)]


def test_order_and_identity_are_those_of_earlier_versions(tmp_path):
    """Recorded with the version that kept pairs in Python lists: its checkpoints go on."""
    captions = [f"a {('red', 'blue')[i % 2]} box no {i % 37}" for i in range(1000)]
    pairs = Pairs("t", [ImageRef(f"/nowhere/{i}.jpg") for i in range(400)], captions, np.arange(1000) * 7 % 400)
    assert pairs.identity() == {"pairs": 1000, "captions": "db77710b93ab054c", "pictures": "b71c97499613ef58"}

    def digest(world: int, batch: int, drop_last: bool, keys) -> str:
        found = hashlib.blake2b(digest_size=8)
        for rank in range(world):
            for epoch in (0, 3):
                sampler = GlobalBatchSampler(1000, batch, 5, rank, world, drop_last, keys)
                sampler.set_epoch(epoch)
                found.update(json.dumps(list(sampler)).encode())
        return found.hexdigest()

    assert digest(1, 8, True, None) == "978e204368ccae74"
    assert digest(3, 11, False, None) == "21391ccb5e78d4d9"
    assert digest(3, 11, False, pairs.keys()) == "f5eb863f428756d4"

    rows = [f"{i * 13 % 90}.jpg,{'' if i == 7 else f'caption é {i}'}" for i in range(300)]
    (tmp_path / "t.csv").write_text("\n".join(["image_path,caption", *rows]))
    for i in range(90):
        (tmp_path / f"{i}.jpg").write_bytes(b"x" * i)
    table = tables.read_table(tmp_path / "t.csv", "image_path", "caption")
    assert table.identity() == {"pairs": 299, "captions": "3fb60660c5eaf403", "pictures": "cc3ca045cbb1aee1"}
    assert table.head(50).identity()["captions"] == "79b868ad350de7f1"
    bad = table.without_images([3, 5, 80])
    assert bad.identity() == {"pairs": 288, "captions": "3e80cd6f651c93fe", "pictures": "7bb3e561d5cb54a3"}
    assert Pairs.of_columns("t", bad.columns()).identity() == bad.identity()


def test_sources_are_drawn_by_their_weights_with_replacement():
    """30 pairs of one source and 70 of another at 3 to 1; the same on any number of ranks, another each epoch."""

    def order(world: int, epoch: int, first: int = 0) -> list[int]:
        ranks = []
        for rank in range(world):
            sampler = GlobalBatchSampler(100, 20 // world, 7, rank, world, True, weights=[3, 1], starts=[0, 30])
            sampler.set_epoch(epoch)
            ranks.append(list(sampler)[first:])
        return [pair for step in zip(*ranks, strict=True) for share in step for pair in share]

    draws = [pair for epoch in range(100) for pair in order(1, epoch)]
    counts = np.bincount(draws, minlength=100)
    assert counts[:30].sum() == pytest.approx(7500, abs=200) and len(draws) == 10_000
    assert counts[:30].mean() == pytest.approx(250, rel=0.05) and counts[30:].mean() == pytest.approx(
        2500 / 70, rel=0.1
    )
    assert len(set(order(1, 0))) < 100  # some come twice
    assert order(1, 3) == order(2, 3) != order(1, 4)
    assert order(2, 3, first=2) == order(2, 3)[40:]  # what a resumed run goes on with


def test_drawn_sources_resume_as_if_never_stopped(pairs_table, tiny_model, tmp_path, capsys):
    rows = pairs_table.read_text().splitlines()
    parts = [pairs_table.with_name(f"part{i}.csv") for i in range(2)]
    for i, part in enumerate(parts):
        part.write_text("\n".join([rows[0], *rows[1 + i :: 2]]))

    def losses(name: str, weights: str, *more: str) -> list[float]:
        options = ["--do_train", "--train_file", "::".join(map(str, parts)), "--source_weights", weights]
        options += ["--per_device_train_batch_size", "8", "--log_every", "1", "--device", "cpu", "--skip_steps", "1"]
        output = ["--model_name_or_path", str(tiny_model), "--output_dir", str(tmp_path / name)]
        run_clip.main([*options, *output, "--max_steps", "5", *more])
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if line["kind"] == "train"]

    whole = losses("whole", "1::3", "--save_every", "0")
    losses("part", "1::3", "--save_every", "2")
    newer = [path for path in (tmp_path / "part").glob("checkpoint-*") if path.name != "checkpoint-2"]
    for path in newer:
        shutil.rmtree(path)
    capsys.readouterr()
    assert losses("part", "1::3", "--save_every", "2") == whole and "2 steps of 5" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        losses("part", "1::1", "--max_steps", "6")
    assert "source_weights was [1.0, 3.0], is now [1.0, 1.0]" in capsys.readouterr().err


def test_several_tables_are_one_set_of_several_sources(tmp_path, capsys):
    for folder, captions in {"a": ["dog", ""] * 2, "b/c": ["cat", "cow", "hen"]}.items():
        (tmp_path / folder).mkdir(parents=True)
        rows = [f"{i % 2}.jpg,{caption}" for i, caption in enumerate(captions)]
        (tmp_path / folder / "t.csv").write_text("\n".join(["image_path,caption", *rows]))
    both = f"{tmp_path}/a/t.csv::{tmp_path}/b/c/t.csv"
    pairs = tables.read_table(both, "image_path", "caption", limit=0.5)
    assert list(pairs.captions) == ["dog", "dog", "cat", "cow", "hen"] and pairs.source_sizes() == [2, 3]
    assert [ref.path for ref in pairs.images] == [
        f"{tmp_path}/{name}" for name in ("a/0.jpg", "b/c/0.jpg", "b/c/1.jpg")
    ]
    assert pairs.image_of_caption.tolist() == [0, 0, 1, 2, 1]
    parts = [pairs.held_out(0.5, keep) for keep in (True, False)]
    assert sorted(ref.path for part in parts for ref in part.images) == sorted(ref.path for ref in pairs.images)


@pytest.fixture
def prepare(tmp_path, tiny_model):
    """A start with a table of 80 pictures, the last of them cut: (split, how often the table was read)."""
    pictures = tmp_path / "data"
    pictures.mkdir()
    table = pictures / "pairs [é].csv"  # no pattern for other files
    with open(table, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image_path", "caption"])
        for i in range(80):
            (pictures / f"{i}.jpg").write_bytes(draw(i)[0][: -100 if i == 79 else None])
            rows.writerow([f"{i}.jpg", draw(i)[1]])

    def start(*, longest: int = 77, cache: str | None = None, **options) -> tuple[sources.Split, int]:
        data = DataArguments(train_file=str(table), max_bad_share=0.03, **options)
        source, reads = sources.find("train", data, cache), []
        read = source.read
        source.read = lambda **k: (reads.append(1), read(**k))[1]
        tokenizer = load_tokenizer(str(tiny_model))
        return sources.prepare(source, data, tokenizer, longest, 0, World()), len(reads)

    start.folder, start.table = pictures, table
    return start


def test_the_index_is_built_once_and_anew_when_something_changes(prepare, capsys):
    split, reads = prepare()
    assert reads == 1 and len(split.pairs) == len(split.tokens) == 79 and len(split.pairs.images) == 79
    told = "1 of 80 samples left out: 1 x picture cannot be read"
    assert told in capsys.readouterr().out
    cache = prepare.folder / ".clip_cache"
    kept = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}

    again, reads = prepare()
    assert reads == 0 and told in capsys.readouterr().out
    assert [path.name for path in cache.iterdir() if kept.get(path.name) != path.stat().st_mtime_ns] == [
        "left_out_pairs [é].tsv"
    ]
    assert list(again.pairs.captions) == [draw(i)[1] for i in range(79)]
    assert [ids.tolist() for ids in again.tokens] == [ids.tolist() for ids in split.tokens]
    assert again.identity() == split.identity() == split.pairs.identity()
    assert not again.tokens.ids.flags.writeable and not again.tokens.ids.flags.owndata  # mapped

    shorter, reads = prepare(longest=4)
    assert reads == 0 and max(len(ids) for ids in shorter.tokens) == 4
    assert len(prepare(max_train_samples=5)[0].pairs) == 5

    (prepare.folder / "79.jpg").write_bytes(draw(79)[0])  # mended
    assert len(prepare()[0].pairs) == 80
    table = prepare.table
    table.write_text(table.read_text().replace("box", "square"))
    capsys.readouterr()
    changed, reads = prepare()
    assert reads == 1 and "square" in changed.pairs.captions[0]
    assert f"note: {table} has changed: its index is built anew" in capsys.readouterr().out
    assert len(list(cache.glob("pairs_*"))) == len(list(cache.glob("tokens_*"))) == 1  # the stale ones are gone


def test_a_build_that_was_cut_off_is_never_used(prepare, capsys, monkeypatch):
    split, _ = prepare()
    cache = prepare.folder / ".clip_cache"
    (pairs,) = cache.glob("pairs_*")
    file = pairs / "captions.npy"
    file.write_bytes(file.read_bytes()[:-1])
    capsys.readouterr()
    again, reads = prepare()
    assert reads == 1 and list(again.pairs.captions) == list(split.pairs.captions)
    assert f"note: {pairs} is damaged (captions.npy has " in capsys.readouterr().out

    shutil.rmtree(pairs)
    save = np.save

    def killed(path: Path, values: np.ndarray) -> None:
        save(path, values)
        if path.stem == "keys":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "save", killed)
        prepare()
    (left,) = cache.glob(".pairs_*")
    gone = next(pid for pid in range(1 << 20, 1, -1) if not psutil.pid_exists(pid))
    left.rename(left.with_name(left.name.replace(f".{os.getpid()}", f".{gone}")))  # its process is no more
    assert prepare()[1] == 1 and not list(cache.glob(".*"))


def test_what_a_disk_has_changed_is_built_anew(prepare, capsys):
    """A bit in the head of a file, in captions, in tokens; what the pairs are by content, cut or of nothing."""
    split, _ = prepare()
    captions, ids = list(split.pairs.captions), split.tokens.ids.tolist()
    cache = prepare.folder / ".clip_cache"
    for pattern, place in (("pairs_*/captions_ends.npy", 3), ("pairs_*/captions.npy", -9), ("tokens_*/ids.npy", -1)):
        (file,) = cache.glob(pattern)
        content = bytearray(file.read_bytes())
        content[place] ^= 4
        file.write_bytes(content)
        capsys.readouterr()
        again, _ = prepare()
        assert f"{file.name} is damaged: its content" in capsys.readouterr().out
        assert list(again.pairs.captions) == captions and again.tokens.ids.tolist() == ids
    identity = again.identity()
    whole = again.identity_file.read_text()
    for damaged in (whole[:30], whole.replace('"pairs": 79', '"pairs": 78'), "[]", "\0"):
        again.identity_file.write_text(damaged)
        assert again.identity() == identity and again.identity_file.read_text() == whole


def test_which_end_of_a_long_caption_is_cut_off_is_another_index(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model))
    before = sources.described(tokenizer)
    tokenizer.truncation_side = "left"
    assert sources.described(tokenizer) != before


def test_a_cache_that_cannot_be_written_is_said_and_done_without(prepare, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    split, _ = prepare(cache=str(tmp_path / "file/cache"))
    assert len(split.pairs) == 79 and split.pairs.captions[78] == draw(78)[1]
    printed = capsys.readouterr().out
    assert "cannot be written (Not a directory): the index of the pairs is in" in printed
    assert prepare(cache=str(tmp_path / "file/cache"))[1] == 1


def test_two_ranks_build_one_index_and_learn_of_a_fault_together(tiny_model, tmp_path):
    write_shard(tmp_path / "a.tar", range(100))
    write_shard(tmp_path / "bad.tar", range(24), caption_of=lambda i: " " if i < 4 else f"of {i}")
    common = ["--do_train", "--max_steps", "1", "--per_device_train_batch_size", "4", "--save_every", "0"]
    common += ["--device", "cpu", "--model_name_or_path", str(tiny_model), "--output_dir", str(tmp_path / "out")]
    runs = [(2, [*common, "--train_shards", str(tmp_path / name)]) for name in ("a.tar", "bad.tar")]
    done = forked_ranks.run(PROJECT / "run_clip.py", ["clip_pretraining.training.pipeline"], *runs)
    assert done.returncode == 2 and (tmp_path / "out/model.safetensors").is_file()
    assert "error: " in done.stdout and "More than 1.000%" in done.stdout and "Traceback" not in done.stdout
    cache = tmp_path / ".clip_cache"
    assert len(list(cache.glob("pairs_*"))) == 1
    # the check of pictures was shared out
    assert [len(path.read_text().split("\n")) for path in sorted(cache.glob("checked_shards.*.jsonl"))] == [3, 3]
