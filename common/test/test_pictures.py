"""One policy for picture files: which are pictures, what is read of them, and what is refused by name."""

import io
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common.data import pictures
from common.errors import UsageError


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def photograph(side: tuple[int, int] = (40, 24)) -> Image.Image:
    rows = np.random.default_rng(0).integers(0, 256, (side[1] // 4, side[0] // 4, 3), np.uint8)
    return Image.fromarray(rows).resize(side, Image.Resampling.BICUBIC)


def test_listing_is_sorted_without_litter_and_links_in_circles_end(tmp_path):
    for name in (
        "b/2.jpg",
        "b/10.PNG",
        "b/._2.jpg",
        "__MACOSX/b/2.jpg",
        ".cache/1.jpg",
        "a.webp",
        "notes.txt",
        "a/x/1.gif",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "b" / "again").symlink_to(tmp_path)  # a circle
    (tmp_path / "c").symlink_to(tmp_path / "a")  # another name for a folder: read as such
    found = [os.path.relpath(path, tmp_path) for path in pictures.find(tmp_path)]
    assert found == ["a.webp", "a/x/1.gif", "b/10.PNG", "b/2.jpg", "c/x/1.gif"]


@pytest.mark.parametrize("options", [{}, {"subsampling": 2}, {"subsampling": 1, "progressive": True}])
def test_jpegs_have_pillow_s_pixels(options):
    data = encoded(photograph(), "JPEG", quality=80, **options)
    assert np.array_equal(pictures.decode(data, "x.jpg"), Image.open(io.BytesIO(data)).convert("RGB"))


def test_modes_and_exif(tmp_path):
    turned = Image.new("RGB", (40, 24)).getexif()
    turned[0x0112] = 6
    data = encoded(photograph(), "JPEG", exif=turned)
    assert pictures.decode(data, "x").size == (40, 24) and pictures.decode(data, "x", turn=True).size == (24, 40)

    grey = Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    assert np.asarray(pictures.decode(encoded(grey, "PNG"), "x"))[0, :, 0].tolist() == [0, 100, 255]

    clear = Image.new("RGBA", (2, 2), (200, 0, 0, 0))
    assert pictures.decode(encoded(clear, "PNG"), "x").getpixel((0, 0)) == (200, 0, 0)
    assert pictures.decode(encoded(clear, "PNG"), "x", on_white=True).getpixel((0, 0)) == (255, 255, 255)

    cmyk = encoded(photograph().convert("CMYK"), "JPEG")
    assert pictures.decode(cmyk, "x").mode == "RGB"


def test_broken_and_huge_ones_are_refused_by_name(tmp_path, monkeypatch):
    good = encoded(photograph(), "JPEG")
    for name, data in {"cut.jpg": good[:-200], "page.jpg": b"<html>", "empty.png": b"", "good.jpg": good}.items():
        (tmp_path / name).write_bytes(data)
    for name in ("cut.jpg", "page.jpg", "empty.png", "gone.jpg"):
        with pytest.raises(pictures.BrokenPicture, match=name):
            pictures.read(tmp_path / name)
    with pytest.raises(UsageError, match="3 broken pictures, remove or fetch again: .*cut.jpg(.|\n)*page.jpg"):
        pictures.check(sorted(tmp_path.iterdir()))
    with pytest.raises(UsageError, match="^1 broken picture, remove or fetch again: .*cut.jpg: [^\n]*$"):
        pictures.check([tmp_path / "good.jpg", tmp_path / "cut.jpg"])
    with pytest.raises(UsageError, match="2 broken pictures, .*cut.jpg(.|\n)*page.jpg"):
        pictures.check([tmp_path / "cut.jpg"], [tmp_path / "page.jpg"])  # training and test set: one error
    monkeypatch.setattr(pictures, "MAX_PIXELS", 40 * 24 - 1)
    for data in (good, encoded(photograph(), "PNG")):
        with pytest.raises(pictures.BrokenPicture, match="40 x 24 pixels, over PICTURE_MAX_PIXELS"):
            pictures.decode(data, "large")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_bytes_give_a_picture_or_our_error(data):
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"]))
    content = bytearray(encoded(photograph(), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert pictures.decode(bytes(content), "some.file", turn=True).mode == "RGB"
    except pictures.BrokenPicture as error:
        assert str(error).startswith("some.file: ")


def test_named_pipes_are_no_pictures_and_links_to_nothing_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink(tmp_path / "pipe.png", tmp_path / "to_pipe.png")
    os.symlink(tmp_path / "gone.png", tmp_path / "dangling.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    assert [os.path.basename(path) for path in pictures.find(tmp_path)] == ["a.png", "dangling.png"]
