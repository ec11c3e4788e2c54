"""Where pairs come from: COCO in its three layouts, tables, tars; and every way they can be wrong."""

import json
import multiprocessing
import resource
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_sample import draw, write_coco_zips

from clip_pretraining.data import coco, picture_check, tables
from clip_pretraining.data.batches import GlobalBatchSampler
from clip_pretraining.data.crop_cache import CropCache
from clip_pretraining.data.images import ImageError, decode_image
from clip_pretraining.data.pairs import DecodedImages, ImageRef, Pairs
from clip_pretraining.data.picture_check import check_images, tell_unreadable
from common.errors import UsageError


def read_split(data_dir, split, cache_dir=None):
    return coco.read_captions(*coco.find_split(data_dir, split, cache_dir), split)


def message(error) -> str:
    return error.value.message


def test_pairs_that_share_a_picture_or_a_caption_are_kept_apart():
    captions = ["A bell", "a bell ", "bell off", "star", "heart", "moon", "sun", "sea"]
    pairs = Pairs("train", [ImageRef(str(i)) for i in range(7)], captions, [0, 1, 2, 3, 3, 4, 5, 6])
    keys = pairs.keys()
    for epoch in range(20):
        sampler = GlobalBatchSampler(8, 4, seed=1, rank=0, world=1, drop_last=True, keys=keys)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert sorted(sum(batches, [])) == list(range(8))
        assert not {0, 1} <= set(batches[0]) and not {3, 4} <= set(batches[0]), "the last takes what is left"
    same = GlobalBatchSampler(6, 3, seed=1, rank=0, world=1, drop_last=True, keys=np.zeros((6, 1), dtype=int))
    assert sorted(sum(same, [])) == list(range(6)), "where all are equal nothing is left out"


def test_the_zips_are_unpacked_once_beside_themselves(coco_zips):
    train = read_split(coco_zips, "train")
    assert (len(train.images), len(train)) == (24, 48)
    assert train.image_of_caption.tolist() == np.repeat(np.arange(24), 2).tolist()
    assert train.captions[0] == draw(0)[1] and train.images[0].read() == draw(0)[0]
    (coco_zips / "train2017.zip").write_bytes(b"not needed any more")
    assert len(read_split(coco_zips, "train")) == 48
    assert not [p for p in coco_zips.iterdir() if p.name.startswith(".")]


def test_a_read_only_folder_is_unpacked_to_the_cache(coco_zips, tmp_path):
    cache = tmp_path / "cache"
    pairs = read_split(coco_zips, "val", cache)
    assert pairs.images[0].path.startswith(str(cache)) and not (coco_zips / "val2017").exists()


@pytest.mark.parametrize("nested", [False, True])
def test_unpacked_folders_are_read_as_they_are(nested, tmp_path):
    write_coco_zips(tmp_path / "zips", {"train": 6, "val": 6})
    for name in ("train2017", "val2017", "annotations_trainval2017"):
        target = tmp_path / "data" / name if nested and name.startswith("annotations") else tmp_path / "data"
        zipfile.ZipFile(tmp_path / "zips" / f"{name}.zip").extractall(target)
    assert len(read_split(tmp_path / "data", "val")) == 12


def test_captions_in_any_order_and_pictures_without_any(tmp_path):
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in (7, 3, 5)],
        "annotations": [{"image_id": i, "caption": f"of {i}"} for i in (5, 7, 5)],
    }
    (tmp_path / "c.json").write_text(json.dumps(content))
    pairs = coco.read_captions(tmp_path / "c.json", tmp_path, "val")
    assert pairs.image_of_caption.tolist() == [2, 0, 2] and list(pairs.captions) == ["of 5", "of 7", "of 5"]


def test_coco_captions_that_say_nothing(tmp_path, capsys):
    annotations = [{"id": i, "image_id": i % 2, "caption": f"of {i}"} for i in range(200)]
    annotations[3]["caption"], annotations[8]["caption"] = None, " "
    content = {"images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(2)], "annotations": annotations}
    (tmp_path / "c.json").write_text(json.dumps(content))
    pairs = coco.read_captions(tmp_path / "c.json", tmp_path, "val")
    assert len(pairs) == 198 and pairs.captions[3] == "of 4" and pairs.image_of_caption[3] == 0
    assert "2 of 200 samples left out: 2 x caption empty or missing (first: 1.jpg)" in capsys.readouterr().out
    annotations[5]["caption"] = -1  # as the data set script has them for the test split
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="c.json: the caption of annotation 5 is not text but -1"):
        coco.read_captions(tmp_path / "c.json", tmp_path, "val")


def rewrite(packed: Path, change) -> None:
    """The zip with its members passed through change(name, data) -> (name, data)."""
    with zipfile.ZipFile(packed) as archive:
        members = [change(m.filename, archive.read(m)) for m in archive.infolist()]
    with zipfile.ZipFile(packed, "w") as archive:
        for name, data in members:
            archive.writestr(name, data)


def test_broken_zips_leave_nothing_behind(coco_zips):
    packed = coco_zips / "train2017.zip"
    whole = packed.read_bytes()
    packed.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError) as error:
        read_split(coco_zips, "train")
    assert "train2017.zip: truncated or damaged" in message(error)

    middle = whole.index(b"JFIF") + 300
    packed.write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])  # one picture's CRC is wrong
    with pytest.raises(UsageError, match="truncated or damaged"):
        read_split(coco_zips, "train")

    annotations = coco_zips / "annotations_trainval2017.zip"  # compressed, as cocodataset.org's
    good_annotations = annotations.read_bytes()
    with zipfile.ZipFile(annotations, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("annotations/captions_train2017.json", "{}" * 1000)
    data = bytearray(annotations.read_bytes())
    data[30 + len("annotations/captions_train2017.json")] = 0xFF  # no block of deflate begins so
    annotations.write_bytes(data)
    with pytest.raises(UsageError, match="annotations_trainval2017.zip: truncated or damaged"):
        coco.locate(coco_zips, "annotations_trainval2017", "annotations", None)

    packed.write_bytes(whole)
    rewrite(packed, lambda name, data: (name.replace("000000000003", "../../escaped"), data))
    with pytest.raises(UsageError, match="written outside"):
        read_split(coco_zips, "train")
    assert not (coco_zips / "train2017").exists() and not list(coco_zips.parent.rglob("escaped*"))

    packed.write_bytes(whole)
    annotations.write_bytes(good_annotations)
    assert len(read_split(coco_zips, "train")) == 48


@pytest.mark.parametrize("missing", ["val2017.zip", "annotations_trainval2017.zip"])
def test_a_missing_zip_is_named(coco_zips, missing):
    (coco_zips / missing).unlink()
    with pytest.raises(UsageError) as error:
        read_split(coco_zips, "val")
    assert missing in message(error)


@pytest.mark.parametrize(
    "text, reason", [("{", "not valid JSON"), ('{"images": []}', "annotations"), ("[]", "captions")]
)
def test_a_bad_annotation_file_is_named(coco_zips, text, reason):
    read_split(coco_zips, "val")
    file = coco_zips / "annotations/captions_val2017.json"
    file.write_text(text)
    with pytest.raises(UsageError) as error:
        read_split(coco_zips, "val")
    assert str(file) in message(error) and reason in message(error)
    file.unlink()
    (coco_zips / "annotations_trainval2017.zip").rename(coco_zips / "elsewhere.zip")
    with pytest.raises(UsageError, match="missing"):
        read_split(coco_zips, "val")


def test_annotations_of_the_test_split_may_lie_there_first(coco_zips):
    """image_info_test2017.zip unpacks to annotations/, too."""
    (coco_zips / "annotations").mkdir()
    (coco_zips / "annotations/image_info_test2017.json").write_text("{}")
    assert len(read_split(coco_zips, "val")) == 16
    assert (coco_zips / "annotations/image_info_test2017.json").read_text() == "{}"
    assert len(read_split(coco_zips, "train")) == 48


def many_pictures(folder: Path, count: int) -> Pairs:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        (folder / f"{i}.jpg").write_bytes(draw(i)[0])
    owner = np.repeat(np.arange(count), 2)
    refs = [ImageRef(str(folder / f"{i}.jpg")) for i in range(count)]
    return Pairs("train", refs, [draw(i)[1] for i in owner], owner)


def test_unreadable_pictures_are_skipped_below_one_percent_and_stop_the_run_above(tmp_path, capsys):
    pairs = many_pictures(tmp_path / "pictures", 200)
    cut = tmp_path / "pictures/3.jpg"
    cut.write_bytes(cut.read_bytes()[:-100])  # its header is fine
    (tmp_path / "pictures/8.jpg").unlink()
    bad, _ = check_images(pairs, 0, tmp_path / "cache")
    assert sorted(bad) == [3, 8] and "8.jpg: No such file" in bad[8]
    tell_unreadable(pairs, bad)
    kept = pairs.without_images(sorted(bad))
    assert (len(kept.images), len(kept)) == (198, 396)
    assert kept.captions[6] == draw(4)[1] and kept.images[kept.image_of_caption[6]].path.endswith("/4.jpg")
    assert "2 of 200 samples left out: 2 x picture cannot be read" in capsys.readouterr().out

    (tmp_path / "pictures/9.jpg").unlink()
    with pytest.raises(UsageError, match="More than 1.000%"):
        tell_unreadable(pairs, check_images(pairs, 0, tmp_path / "cache")[0])


def test_the_check_goes_on_where_it_was_ended_and_is_kept_until_a_file_changes(tmp_path, monkeypatch):
    """Of 200 pictures in pieces of 64; ended by Ctrl-C in the third piece, its last line cut short."""
    pairs = many_pictures(tmp_path / "pictures", 200)
    (tmp_path / "pictures/70.jpg").write_bytes(draw(0)[0][:-100])
    seen: list[str] = []

    def decode(data: bytes, size: int, name: str):
        seen.append(name)
        if len(seen) == 150:
            raise KeyboardInterrupt
        return decode_image(data, size, name)

    monkeypatch.setattr(picture_check, "decode_image", decode)
    with pytest.raises(KeyboardInterrupt):
        check_images(pairs, 0, tmp_path / "cache")
    (ledger,) = (tmp_path / "cache").glob("checked_*.jsonl")
    ledger.write_text(ledger.read_text() + "[2, ")
    del seen[:]
    bad, state = check_images(pairs, 0, tmp_path / "cache")
    assert list(bad) == [70] and len(seen) == 200 - 128
    del seen[:]
    assert check_images(pairs, 0, tmp_path / "cache") == (bad, state) and not seen
    (tmp_path / "pictures/1.jpg").write_bytes(b"")
    bad, changed = check_images(pairs, 0, tmp_path / "cache")
    assert sorted(bad) == [1, 70] and len(seen) == 64 and changed != state
    del seen[:]
    (tmp_path / "pictures/200.jpg").write_bytes(draw(0)[0])
    refs = [*pairs.images, ImageRef(str(tmp_path / "pictures/200.jpg"))]
    more = Pairs("train", refs, [*pairs.captions, "one more"], [*pairs.image_of_caption, 200])
    assert sorted(check_images(more, 0, tmp_path / "cache")[0]) == [1, 70]
    assert len(seen) == 201 - 192  # the last piece, which has a picture more


TABLES = {
    "t.csv": 'image_path,caption\na.jpg,None\na.jpg,null\n"sub/b, c.jpg","NA, ""quoted"""\n',
    "t.tsv": 'image_path\tcaption\na.jpg\tNone\na.jpg\tnull\nsub/b, c.jpg\tNA, "quoted"\n',
    "t.txt": 'image_path|caption\na.jpg|None\na.jpg|null\nsub/b, c.jpg|NA, ""quoted""\n',
    "t.jsonl": "".join(
        json.dumps({"image_path": image, "caption": caption}) + "\n"
        for image, caption in [("a.jpg", "None"), ("a.jpg", "null"), ("sub/b, c.jpg", 'NA, "quoted"')]
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_words_that_look_like_nothing_are_captions(name, tmp_path):
    (tmp_path / name).write_text(TABLES[name])
    delimiter = "|" if name == "t.txt" else None
    pairs = tables.read_table(tmp_path / name, "image_path", "caption", delimiter=delimiter)
    assert pairs.captions[:2] == ["None", "null"] and pairs.captions[2].startswith("NA, ")
    assert pairs.image_of_caption.tolist() == [0, 0, 1]
    assert pairs.images[1].path == str(tmp_path / "sub/b, c.jpg")


@pytest.mark.parametrize(
    "name, text, reason",
    [
        ("t.csv", "image,caption\na.jpg,b\n", "t.csv:2: no column 'image_path' (there are: image, caption)"),
        ("t.csv", "image_path,caption\n", "no rows"),
        ("t.csv", "image_path,caption\na.jpg,\n", "1 of 1 samples left out: 1 x caption empty"),
        ("t.csv", "image_path,caption\n,text\n", "t.csv:2: column 'image_path' holds no file name"),
        (
            "t.csv",
            "image_path,caption\nhttps://h/a.jpg,b\n",
            "t.csv:2: https://h/a.jpg: a table's pictures must be files",
        ),
        (
            "t.jsonl",
            '{"image_path": "a.jpg", "caption": null}\n',
            "1 of 1 samples left out: 1 x caption empty or missing",
        ),
        ("t.jsonl", '{"image_path": "a.jpg", "caption": 3}\n', "the caption must be text, not 3"),
        ("t.jsonl", '{"image_path": "a.jpg"\n', "not valid JSON"),
        ("t.jsonl", '["a.jpg", "b"]\n', "t.jsonl:1: must be an object of columns, not"),
        ("t.json", '{"rows": []}', "neither a list of rows nor"),
        ("t.json", "3", "neither a list of rows nor"),
        ("t.parquet", "", "give a .csv, .tsv, .txt, .json or .jsonl"),
        ("t.csv", "image_path,caption\na.jpg,caf\xe9\n", "1 x caption not UTF-8 (first: a.jpg)"),
    ],
)
def test_a_bad_table_is_explained(name, text, reason, tmp_path):
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError) as error:
        tables.read_table(tmp_path / name, "image_path", "caption")
    assert reason in message(error)


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world, batch", [(1, 8), (2, 4), (4, 2)])
def test_the_global_batch_does_not_depend_on_the_ranks(world, batch, drop_last):
    def global_batches(world: int, batch: int, epoch: int) -> list[list[int]]:
        ranks = []
        for rank in range(world):
            sampler = GlobalBatchSampler(27, batch, seed=3, rank=rank, world=world, drop_last=drop_last)
            sampler.set_epoch(epoch)
            ranks.append(list(sampler))
            assert len(ranks[-1]) == len(sampler)
        return [sum(parts, []) for parts in zip(*ranks, strict=True)]

    mine, single = global_batches(world, batch, 1), global_batches(1, 8, 1)
    assert mine[:3] == single[:3] and mine != global_batches(world, batch, 0)
    seen = sum(mine, [])
    assert len(seen) == len(set(seen)) and len(seen) >= (24 if drop_last else 28 - world)


def test_the_crop_cache_returns_what_decoding_would(tmp_path, monkeypatch):
    pairs = many_pictures(tmp_path / "pictures", 6)
    source = DecodedImages(pairs.images, 32)
    want = [source[i] for i in range(6)]
    cache = CropCache(tmp_path / "cache", "train", source)
    assert all(torch.equal(cache[i], want[i]) for i in range(6))

    monkeypatch.setattr(DecodedImages, "__getitem__", lambda *a: pytest.fail("decoded again"))
    again = CropCache(tmp_path / "cache", "train", source)
    assert all(torch.equal(again[i], want[i]) for i in range(6))
    monkeypatch.undo()

    (crops,) = (tmp_path / "cache").glob("*.crops")  # a record half written by a process that died
    data = bytearray(crops.read_bytes())
    data[3 * 32 * 32 + 5 : 3 * 32 * 32 + 50] = bytes(45)
    crops.write_bytes(data)
    (tmp_path / "pictures/4.jpg").write_bytes(draw(1)[0])  # and a picture that changed
    third = CropCache(tmp_path / "cache", "train", source)
    assert torch.equal(third[1], want[1]) and torch.equal(third[4], want[1]) and torch.equal(third[5], want[5])


def read_again_and_again(folder: str, source: DecodedImages, seed: int) -> None:
    """A process that fills and reads a cache in an order of its own; exit code 1 when a picture is the wrong one."""
    want = [source[i] for i in range(len(source))]
    for repeat in range(20):
        cache = CropCache(Path(folder), "train", source)
        for i in np.random.default_rng((seed, repeat)).permutation(len(source)):
            cache._crops[i, :, 16:] = 0  # as one that is in the middle of writing another version of the picture
            if not (torch.equal(cache[i], want[i]) and torch.equal(cache[i], want[i])):
                sys.exit(1)


def test_processes_may_fill_one_crop_cache_together(tmp_path):
    source = DecodedImages(many_pictures(tmp_path / "pictures", 6).images, 32)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=read_again_and_again, args=(str(tmp_path / "c"), source, n)) for n in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    cache = CropCache(tmp_path / "c", "train", source)
    assert all(torch.equal(cache[i], source[i]) for i in range(6))


def test_a_full_disk_is_told_at_the_start(tmp_path):
    """The limit on a file's size stands for the disk: the system refuses the room in the same call."""
    source = DecodedImages(many_pictures(tmp_path / "pictures", 2).images, 32)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(UsageError, match="no room; 0 MiB are needed"):
            CropCache(tmp_path / "cache", "train", source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_picture_that_goes_away_during_the_run_is_named(tmp_path):
    pairs = many_pictures(tmp_path / "pictures", 1)
    shutil.rmtree(tmp_path / "pictures")
    with pytest.raises(ImageError, match="0.jpg: No such file"):
        DecodedImages(pairs.images, 32)[0]
