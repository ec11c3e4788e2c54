"""Pictures in tars: the run that the same pictures in a folder give, bit for bit, resumed in mid-epoch, too."""

import io
import json
import os
import re
import tarfile

import pytest
from small_models import OPTIONS

import run_beitv2_pretraining
from beit2.data import tars
from beit2.data.listing import list_pictures
from beit2.data.reading import read_image
from common.data.pictures import BrokenPicture
from common.errors import UsageError


def pack(tar, folder, names):
    with tarfile.open(tar, "w") as file:
        for name in names:
            file.add(folder / name, name)


@pytest.fixture
def packed(pictures, tmp_path):
    """The training pictures in three tars, in the order of their names; other files among them."""
    names = sorted(str(path.relative_to(pictures / "train")) for path in (pictures / "train").rglob("*.*"))
    folder = tmp_path / "tars"
    folder.mkdir()
    (tmp_path / "odd").mkdir()
    for name in ("a.txt", "._b.jpg"):
        (tmp_path / "odd" / name).write_bytes(b"no picture")
    for number, (first, last) in enumerate(((0, 5), (5, 11), (11, 16))):
        pack(folder / f"train-{number:04d}.tar", pictures / "train", names[first:last])
    with tarfile.open(folder / "train-0000.tar", "a") as file:
        file.add(tmp_path / "odd", "odd")
    return folder, names


def losses(folder):
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def test_a_run_on_tars_is_the_run_on_their_pictures(pictures, tokenizer_file, packed, tmp_path):
    def run(name, data, *extra):
        run_beitv2_pretraining.main([
            *OPTIONS, "--model", "beit_test", "--data_path", str(data), "--tokenizer_weight", str(tokenizer_file),
            "--epochs", "2", "--output_dir", str(tmp_path / name), *extra,
        ])  # fmt: skip

    run("of files", pictures / "train")
    run("of tars", packed[0], "--max_steps", "3")
    run("of tars", packed[0], "--num_workers", "2")
    assert losses(tmp_path / "of tars") == losses(tmp_path / "of files") and len(losses(tmp_path / "of files")) == 8


def test_what_tars_hold(pictures, packed, capsys):
    folder, names = packed
    paths = list_pictures(folder)
    assert [paths.name(i).partition("/")[2] for i in range(len(paths))] == names
    for index in (0, 4, 5, 10, 11, 15, -1):
        file = pictures / "train" / names[index]
        assert paths[index].read_bytes() == file.read_bytes() and paths.size(index % 16) == file.stat().st_size
        assert str(paths[index]).startswith(f"{folder}/train-000") and str(paths[index]).endswith(names[index])
        assert read_image(paths[index]).size == (64, 48)
    assert len(list_pictures(folder / "train-0001.tar")) == 6
    pack(folder / "train-val-0000.tar", pictures / "val", ["red/0.jpg"])  # never trained on without a word
    capsys.readouterr()
    assert len(list_pictures(folder)) == 16 and "not trained on: train-val-0000.tar" in capsys.readouterr().out
    assert len(list_pictures(folder, whole=True)) == 17 and len(list_pictures(folder / "train-val-0000.tar")) == 1
    (folder / "unpacked").mkdir()
    (folder / "unpacked/1.jpg").write_bytes(b"x")
    assert [str(path) for path in list_pictures(folder)] == [str(folder / "unpacked/1.jpg")]
    assert "train-0000.tar beside pictures or folders is not read" in capsys.readouterr().out


def test_the_list_is_kept_until_a_tar_changes(pictures, packed, monkeypatch):
    monkeypatch.setattr(tars, "CACHED_FROM", 2)
    folder, names = packed
    first = [str(path) for path in list_pictures(folder)]
    with monkeypatch.context() as patch:
        patch.setattr(tars, "_list_tar", None)  # the kept list is enough
        again = list_pictures(folder)
    assert [str(path) for path in again] == first
    assert again[7].read_bytes() == (pictures / "train" / names[7]).read_bytes()
    kept = folder / tars.CACHE
    kept.write_bytes(kept.read_bytes()[:-3])  # damaged: read anew
    assert [str(path) for path in list_pictures(folder)] == first
    pack(folder / "train-0002.tar", pictures / "val", ["red/0.jpg"])
    assert len(list_pictures(folder)) == 12


def test_tars_that_cannot_be_read(packed, tmp_path):
    folder, _ = packed
    whole = (folder / "train-0001.tar").read_bytes()
    paths = list_pictures(folder)
    (folder / "train-0001.tar").write_bytes(whole[:9000])
    with pytest.raises(BrokenPicture, match="train-0001.tar/.*: the tar ends before its picture"):
        read_image(paths[10])
    compressed = b"\x1f\x8b" + whole
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        third = tar.getmembers()[2].offset
    for content, message in (
        (whole[:9000], "it ends within|unexpected end"),
        (compressed, "uncompressed tar"),
        # at a header tarfile takes either for the end of the tar, and all behind it is lost without a word
        (whole[:third], f"cut short or damaged at byte {third:,}"),
        (whole[: third + 100], f"cut short or damaged at byte {third:,}"),
        (whole[:third] + b"x" * 512 + whole[third + 512 :], f"cut short or damaged at byte {third:,}"),
    ):
        (folder / "train-0001.tar").write_bytes(content)
        with pytest.raises(UsageError) as caught:
            list_pictures(folder)
        assert re.search(rf"--data_path {folder}/train-0001.tar: .*({message})", caught.value.message)
    with pytest.raises(UsageError, match="holds tars, and classes are read from folders only"):
        list_pictures(folder, labelled=True)
    (tmp_path / "empty").mkdir()
    pack(tmp_path / "empty/a.tar", tmp_path / "odd", ["a.txt"])
    with pytest.raises(UsageError, match="no pictures in it"):
        list_pictures(tmp_path / "empty")
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(UsageError, match="pipe.tar: no such folder"):
        list_pictures(tmp_path / "pipe.tar")
