"""ViTImageProcessor against MindFormers' output, on every form and mode of picture."""

import http.server
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vit import ViTImageProcessor, load_image
from vit.data.image_folder import BrokenImage

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("picture, size, tolerance", [(0, 224, 2e-3), (0, 96, 1e-5), (1, 96, 1e-5)])
def test_output_is_mindformers(picture, size, tolerance):
    expected = np.load(GOLDEN / "mf_image_processor.npz")[f"mf_img{picture}_size{size}"].astype(np.float32)
    result = ViTImageProcessor(size=size)(Image.open(GOLDEN / f"img{picture}.png"))
    assert result.shape == (1, 3, size, size) and result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, atol=tolerance)


def test_every_form_gives_the_same():
    path = GOLDEN / "img0.png"
    pixels = np.array(Image.open(path).convert("RGB"))  # [H, W, 3]
    processor = ViTImageProcessor(32)
    expected = processor(path)
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    forms = [str(path), Image.open(path), pixels, planes, torch.from_numpy(planes), torch.from_numpy(planes) / 255]
    for form in forms:
        assert torch.equal(processor(form), expected), type(form)
    for batch in (forms[:2], np.stack([planes] * 2), torch.from_numpy(np.stack([pixels] * 2))):
        assert torch.equal(processor(batch), expected.repeat(2, 1, 1, 1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_pil_mode_is_accepted(mode):
    picture = Image.new("L", (40, 30), 255).convert(mode) if mode != "I;16" else Image.new(mode, (40, 30), 65535)
    white = ViTImageProcessor(16)(Image.new("RGB", (40, 30), (255, 255, 255)))
    torch.testing.assert_close(ViTImageProcessor(16)(picture), white, atol=0.02, rtol=0)


def test_a_grey_array_is_a_picture():
    grey = np.full((30, 40), 200, np.uint8)
    assert torch.equal(ViTImageProcessor(16)(grey), ViTImageProcessor(16)(np.stack([grey] * 3, axis=2)))


@pytest.mark.parametrize(
    "images, message",
    [
        ([], "list is empty"),
        (np.zeros((5, 7, 9), np.uint8), r"shape \(5, 7, 9\)"),
        (np.full((8, 8, 3), 200.0), "from 200.0 to 200.0"),
        (np.zeros((8, 8, 3), np.int32), "int32"),
    ],
)
def test_what_is_no_picture_is_refused(images, message):
    with pytest.raises(ValueError, match=message):
        ViTImageProcessor(16)(images)


def test_other_objects_are_refused_by_type():
    with pytest.raises(TypeError, match="from int"):
        ViTImageProcessor(16)(3)


def test_broken_files_are_named(tmp_path):
    (tmp_path / "cut.png").write_bytes((GOLDEN / "img0.png").read_bytes()[:5000])
    for source in (tmp_path / "cut.png", Image.open(tmp_path / "cut.png"), tmp_path / "none.png"):
        with pytest.raises(BrokenImage, match="cut.png|none.png"):
            ViTImageProcessor(16)([GOLDEN / "img0.png", source])


def test_load_image_reads_a_url(tmp_path, monkeypatch):
    monkeypatch.chdir(GOLDEN)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        picture = load_image(f"{url}/img1.png")
        with pytest.raises(BrokenImage, match="none.png.*404"):
            load_image(f"{url}/none.png")
        server.shutdown()
    assert picture.mode == "RGB" and picture.tobytes() == Image.open("img1.png").convert("RGB").tobytes()
