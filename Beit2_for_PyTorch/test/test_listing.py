"""Which pictures a folder has: held-out sets, hidden files, links, classes; one look at the disk, kept beside it."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit2.data import listing
from beit2.data.labelled import find_classes
from beit2.data.listing import list_pictures
from beit2.data.picture_list import PictureList
from beit2.data.reading import check_images, read_image
from common.errors import UsageError


def tree(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def listed(root, **more):
    return [str(path.relative_to(root)) for path in list_pictures(root, **more)]


@pytest.mark.parametrize("train", ["train", "training", "Train", "train2017"])
@pytest.mark.parametrize("held_out", ["val", "valid", "validation", "test", "val2017"])
def test_a_held_out_set_beside_the_training_set_is_left_out_aloud(tmp_path, capsys, train, held_out):
    tree(tmp_path, f"{train}/a/1.jpg", f"{train}/a/2.GIF", f"{held_out}/a/3.jpg", "readme.txt")
    assert listed(tmp_path) == [f"{train}/a/1.jpg", f"{train}/a/2.GIF"]
    assert f"not trained on: {held_out}/" in capsys.readouterr().out
    assert listed(tmp_path / held_out) == ["a/3.jpg"]
    for options in ({"option": "--eval_data_path"}, {"labelled": True}):
        with pytest.raises(UsageError, match=f"holds {train}/ and {held_out}/, not classes"):
            list_pictures(tmp_path, **options)


def test_held_out_sets_further_down_and_without_a_training_folder(tmp_path, capsys):
    tree(tmp_path, "in/train/1.jpg", "in/val/2.jpg", "b.jpg", "coco/val2017/3.jpg", "coco/4.jpg")
    assert listed(tmp_path) == ["b.jpg", "coco/4.jpg", "in/train/1.jpg"]
    assert "not trained on: coco/val2017/, in/val/" in capsys.readouterr().out


def test_what_is_no_picture(tmp_path, capsys):
    tree(tmp_path, "a/._1.jpg", "a/1.jpg", "__MACOSX/a/1.jpg", ".cache/2.jpg", "a/notes.txt", "a/b/c/3.webp")
    (tmp_path / "a/b/loop").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "link").symlink_to(tmp_path / "a/b/c", target_is_directory=True)
    assert listed(tmp_path) == ["a/1.jpg", "a/b/c/3.webp", "link/3.webp"]
    assert not capsys.readouterr().out
    with pytest.raises(UsageError, match="no pictures in it"):
        list_pictures(tree(tmp_path / "empty", "a.txt"))


def test_classes(tmp_path):
    tree(tmp_path, "cat/1.jpg", "cat/x/2.png", "dog/1.jpg", "ape/9.jpg")
    paths, labels, names = find_classes(tmp_path)
    assert names == ["ape", "cat", "dog"] and labels.tolist() == [0, 1, 1, 2]
    assert [names[label] for label in labels] == [p.relative_to(tmp_path).parts[0] for p in paths]
    assert find_classes(tmp_path, ["zoo", *names])[1].tolist() == [1, 2, 2, 3]
    tree(tmp_path, "loose.jpg")
    with pytest.raises(UsageError, match="loose.jpg lies beside the class folders"):
        find_classes(tmp_path)


def test_the_list_is_kept_beside_the_data_until_a_folder_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "CACHED_FROM", 2)
    tree(tmp_path, "a/1.jpg", "b/2.jpg")
    assert listed(tmp_path) == ["a/1.jpg", "b/2.jpg"]
    assert not (tmp_path / listing.CACHE).exists()  # too fresh: it could change within its time stamp

    def age():
        for folder in (tmp_path, tmp_path / "a", tmp_path / "b"):
            os.utime(folder, ns=(0, time.time_ns() - 10**11))

    age()
    assert listed(tmp_path) == ["a/1.jpg", "b/2.jpg"] and (tmp_path / listing.CACHE).stat().st_size > 0
    with monkeypatch.context() as patch:
        patch.setattr(listing, "_walk", None)  # the kept list is enough
        assert listed(tmp_path) == ["a/1.jpg", "b/2.jpg"]
    tree(tmp_path, "b/3.jpg")
    assert listed(tmp_path) == ["a/1.jpg", "b/2.jpg", "b/3.jpg"]
    age()
    listed(tmp_path)
    for damage in (b"", b"{}", (tmp_path / listing.CACHE).read_bytes()[:-3], b"\xff\xfe" * 50):
        (tmp_path / listing.CACHE).write_bytes(damage)
        assert listed(tmp_path) == ["a/1.jpg", "b/2.jpg", "b/3.jpg"]


def test_only_the_main_rank_looks_at_the_disk(tmp_path, monkeypatch):
    """Whatever another rank asked it, it would fail."""
    tree(tmp_path, "a/1.jpg", "b/2.jpg")
    sent = []
    monkeypatch.setattr(listing, "broadcast_object", lambda found: sent.append(found) or found)
    expected = listed(tmp_path)
    monkeypatch.setattr(listing, "rank", lambda: 1)
    monkeypatch.setattr(listing, "broadcast_object", lambda found: sent[0])
    monkeypatch.setattr("common.data.pictures.rank", lambda: 1)

    def touched(*_, **__):
        raise AssertionError("the disk was touched")

    with monkeypatch.context() as patch:
        for name in ("stat", "scandir", "open", "listdir"):
            patch.setattr(os, name, touched)
        patch.setattr("builtins.open", touched)
        paths = list_pictures(tmp_path)
        check_images(paths)
    assert [str(path.relative_to(tmp_path)) for path in paths] == expected


def test_a_million_names_take_little_time_and_one_block_of_memory():
    names = b"".join(b"n%08d/%08d_%d.JPEG\0" % (i // 1300, i, i) for i in range(1_000_000))
    began = time.process_time()
    paths = PictureList(Path("/data"), names)
    assert len(paths) == 1_000_000 and paths[-1] == Path("/data/n00000769/00999999_999999.JPEG")
    assert sum(paths.counts_by_folder().values()) == 1_000_000
    assert time.process_time() - began < 3


def test_broken_pictures_are_listed_together(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(b"no picture" * (number > 0))
    frames = [Image.fromarray(np.full((8, 8), grey, dtype=np.uint8)) for grey in (10, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "moving.gif").getpixel((0, 0)) == (10, 10, 10)  # its first frame
    with pytest.raises(UsageError) as caught:
        check_images(list_pictures(tmp_path))
    assert all(f"{number}.jpg: not a readable picture" in caught.value.message for number in range(3))
