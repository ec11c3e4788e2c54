"""Scanning image folders, and reading pictures of every mode or naming those that are broken."""

import io

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder as TorchvisionImageFolder

from common.data import pictures
from common.data.pictures import to_rgb
from common.errors import UsageError
from vit import load_image
from vit.data.image_folder import BadFiles, BrokenImage, check_same_classes, read_image, scan, scan_both


def write_picture(path, mode="RGB", size=(20, 16), seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path):
    for name in ("b/2.png", "b/10.jpg", "a/deep/x.png", "a/z.JPEG", "ç d/1.png"):
        write_picture(tmp_path / name)
    (tmp_path / "a/notes.txt").write_text("not a picture")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def test_scan_gives_the_classes_and_order_of_torchvision(folder):
    ours = scan(folder)
    (folder / ".cache").rmdir()
    theirs = TorchvisionImageFolder(folder)
    assert ours.classes == theirs.classes
    assert list(zip(ours.paths, ours.targets, strict=True)) == theirs.samples


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda root: None, "no such folder"),
        (lambda root: root.write_text(""), "not a folder"),
        (lambda root: root.mkdir(), "is empty"),
        (lambda root: write_picture(root / "1.png"), "no class folders"),
        (lambda root: [write_picture(root / "a/1.png"), (root / "b").mkdir()], "b has no pictures"),
    ],
)
def test_scan_names_what_is_wrong(tmp_path, make, message):
    root = tmp_path / "data set"
    make(root)
    with pytest.raises(UsageError) as error:
        scan(root)
    assert message in str(error.value) and str(root) in str(error.value)


def test_different_class_lists_are_named(tmp_path):
    for name in ("train/a", "train/b", "val/a", "val/c"):
        write_picture(tmp_path / name / "1.png")
    train = scan(tmp_path / "train")
    check_same_classes(train, train)
    with pytest.raises(UsageError, match=r"train: b \(1\).*val: c \(1\)"):
        check_same_classes(train, scan(tmp_path / "val"))


def test_all_that_is_wrong_with_two_folders_is_one_error(tmp_path):
    for name in ("train/a", "val/a", "val/c"):
        write_picture(tmp_path / name / "1.png")
    for name in ("train/b", "train/d", "val/e"):
        (tmp_path / name).mkdir()
    with pytest.raises(UsageError) as error:
        scan_both(tmp_path / "train", tmp_path / "val")
    text = str(error.value)
    assert "train/b, " in text and "train/d has no pictures" in text and "val/e has no pictures" in text
    assert "train: b, d (2)" in text and "val: c, e (2)" in text and "\n" not in text
    with pytest.raises(UsageError, match="no such folder"):
        scan_both(tmp_path / "none", tmp_path / "train")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_is_read_as_pil_reads_it(tmp_path, mode):
    path = write_picture(tmp_path / "x.jpg", mode, size=(333, 251))
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(read_image(path), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    image = Image.new("L", (8, 4), 255).convert(mode) if mode != "I;16" else Image.new("I;16", (8, 4), 65535)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    pixels = read_image(path)
    assert pixels.shape == (4, 8, 3) and pixels.dtype == np.uint8 and (pixels == 255).all()


def test_sixteen_bit_grey_is_scaled():
    grey = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert np.asarray(to_rgb(grey))[0, :, 0].tolist() == [0, 128, 255]


def test_broken_pictures_are_named(tmp_path):
    whole = io.BytesIO()
    Image.new("RGB", (64, 64), (9, 80, 200)).save(whole, "JPEG")
    contents = {"cut.jpg": whole.getvalue()[:-200], "text.png": b"hello", "empty.jpg": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BrokenImage, match=name):
            read_image(tmp_path / name)
    with pytest.raises(BrokenImage, match="gone.png"):
        read_image(tmp_path / "gone.png")


def test_bad_files_warn_once_and_stop_above_one_percent(folder):
    many = scan(folder)
    many.paths.extend(f"{index}.png" for index in range(195))  # 200 in all: 2 are 1 %
    bad = BadFiles(many)
    with pytest.warns(UserWarning) as warned:
        bad.add((("one.png", "one.png: cut"), ("two.png", "two.png: cut"), ("one.png", "one.png: cut")))
    assert [str(warning.message) for warning in warned] == ["skipped one.png: cut", "skipped two.png: cut"]
    assert len(bad) == 2
    resumed = BadFiles(many)
    resumed.load_state_dict(bad.state_dict())
    with (
        pytest.warns(UserWarning, match="three"),
        pytest.raises(ValueError, match=r"3 of the 200 pictures .* three.png"),
    ):
        resumed.add((("three.png", "three.png: cut"),))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_a_picture_is_turned_as_its_camera_says(tmp_path, suffix):
    image = Image.fromarray(np.tile(np.arange(0, 200, 5, dtype=np.uint8)[None, :, None], (24, 1, 3)))  # dark to light
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    image.save(tmp_path / f"x.{suffix}", exif=exif)
    pixels = read_image(tmp_path / f"x.{suffix}")
    assert pixels.shape == (40, 24, 3) and pixels[0].mean() < 20 and pixels[-1].mean() > 170
    processed = load_image(Image.open(tmp_path / f"x.{suffix}"))
    np.testing.assert_array_equal(np.asarray(processed), np.asarray(load_image(tmp_path / f"x.{suffix}")))


def test_damaged_orientation_leaves_the_picture_as_it_is(tmp_path):
    image = Image.new("RGB", (8, 6))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.jpg", exif=exif)
    content = (tmp_path / "x.jpg").read_bytes()
    at = content.index(b"Exif\0\0") + 6
    (tmp_path / "x.jpg").write_bytes(content[:at] + b"\xff" * 8 + content[at + 8 :])
    assert read_image(tmp_path / "x.jpg").shape == (6, 8, 3)


def test_litter_and_links_in_circles_are_left_out(folder):
    (folder / "__MACOSX" / "a").mkdir(parents=True)
    (folder / "a" / "._z.JPEG").write_bytes(b"finder's")
    (folder / "a" / "deep" / "up").symlink_to(folder / "a")
    (folder / "b" / "__MACOSX").mkdir()
    (folder / "b" / "__MACOSX" / "2.png").write_bytes(b"")
    found = scan(folder)
    assert found.classes == ["a", "b", "ç d"] and len(found) == 5


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_picture_over_the_pixel_limit_is_broken(tmp_path, monkeypatch, suffix):
    path = write_picture(tmp_path / f"huge.{suffix}", size=(40, 30))
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1000)
    with pytest.raises(BrokenImage, match=f"huge.{suffix}: .*over PICTURE_MAX_PIXELS=1000"):
        read_image(path)
