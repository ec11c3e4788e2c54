"""Pictures per CPU second of the input pipeline, by turns: the upstream transform, ours, ours with the crop cache.

    python -m ci.peers.clip_input [--rounds 7]

640 x 480 JPEGs of quality 94 (about 180 KB) to what the model is given, at 224 pixels, at one thread.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import clip_pretraining  # noqa: F401  mends torchvision

# isort: split
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, ConvertImageDtype, InterpolationMode, Normalize, Resize

from ci.peers.paired_timing import paired, write_result
from clip_pretraining.data.crop_cache import CropCache
from clip_pretraining.data.pairs import DecodedImages, ImageRef
from clip_pretraining.evaluation.encoder import normalise_pixels

PICTURES = 16
MEAN, STD = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])


def write_pictures(folder: Path) -> list[ImageRef]:
    """Smooth colour noise with fine grain: about the bytes a pixel of a COCO photograph."""
    draw = np.random.default_rng(0)
    refs = []
    for index in range(PICTURES):
        coarse = Image.fromarray(draw.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((640, 480), Image.BICUBIC)
        grain = draw.normal(0, 9, (480, 640, 1))
        pixels = np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)
        path = folder / f"{index}.jpg"
        Image.fromarray(pixels).save(path, quality=94)
        refs.append(ImageRef(str(path)))
    return refs


def upstream(refs: list[ImageRef]) -> torch.Tensor:
    """The transform of the upstream example, run as there on one picture at a time, and the collated batch.

    Its `read_image` needs torchvision's C++ library; Pillow decodes instead, as in the Ascend reference.
    """
    transform = torch.nn.Sequential(
        Resize([224], interpolation=InterpolationMode.BICUBIC, antialias=True),
        CenterCrop(224),
        ConvertImageDtype(torch.float),
        Normalize(MEAN.tolist(), STD.tolist()),
    )
    batch = []
    for ref in refs:
        pixels = torch.from_numpy(np.array(Image.open(ref.path).convert("RGB"))).permute(2, 0, 1)
        batch.append(transform(pixels))
    return torch.stack(batch)


def ours(images: DecodedImages | CropCache) -> torch.Tensor:
    return normalise_pixels(torch.stack([images[i] for i in range(len(images))]), MEAN, STD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        refs = write_pictures(Path(folder))
        decoded = DecodedImages(refs, 224)
        cached = CropCache(Path(folder) / "cache", "bench", decoded)
        ours(cached)  # fills it
        kilobytes = sum(Path(ref.path).stat().st_size for ref in refs) / len(refs) / 1000
        level = 1 / 255 / float(STD.min())
        assert (upstream(refs) - ours(decoded)).abs().mean() < level, "the two pipelines disagree"
        result = {"kilobytes_a_picture": round(kilobytes, 1)}
        for name, images in (("decoded", decoded), ("cached", cached)):
            ratio = paired(lambda images=images: ours(images), lambda: upstream(refs), options.rounds)
            result[name] = {
                "pictures_per_cpu_second": round(PICTURES / ratio.a_seconds, 1),
                "upstream_pictures_per_cpu_second": round(PICTURES / ratio.b_seconds, 1),
                "upstream_over_ours": {
                    "median": round(ratio.median, 2),
                    "range": [round(ratio.low, 2), round(ratio.high, 2)],
                },
            }
    write_result("clip_input", result)


if __name__ == "__main__":
    main()
