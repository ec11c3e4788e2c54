"""CPU seconds of preparing one 640 x 480 JPEG for pretraining, against the reference's pipeline, at one thread.

    python -m ci.peers.beit2_data [--rounds 7]

Decode, colour jitter, flip, crop, two views of 224 pixels (bicubic both, the published recipe), mask. The plain side is
the reference's `DataAugmentationForBEiT` in torchvision's and PIL's own operations; from a tar webdataset reads for it.
"""

from __future__ import annotations

import argparse
import random
import tarfile
import tempfile
from pathlib import Path

import beit2  # repairs torchvision

# isort: split
import numpy as np
import torch
import webdataset
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as tf

from beit2.data.tars import list_tars
from beit2.data.transforms import TwoViewTransform, random_crop
from beit2.image_data import PretrainingImages
from ci.peers.paired_timing import paired, write_result

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COUNT = 40


def pictures(folder: Path) -> list[Path]:
    """Smooth colour fields with noise, as JPEG of about 100 KB."""
    rng, paths = np.random.default_rng(0), []
    for number in range(COUNT):
        field = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480), Image.BICUBIC)
        noisy = np.clip(np.asarray(field, dtype=np.int16) + rng.integers(-16, 17, (480, 640, 3)), 0, 255)
        paths.append(folder / f"{number}.jpg")
        Image.fromarray(noisy.astype(np.uint8)).save(paths[-1], quality=90)
    return paths


class Plain:
    """The reference's pipeline."""

    def __init__(self):
        self.jitter = transforms.ColorJitter(0.4, 0.4, 0.4)
        self.to_patches = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
        self.masking = beit2.MaskingGenerator((14, 14), 75)

    def __call__(self, path: Path):
        with open(path, "rb") as file:
            return self.prepared(Image.open(file).convert("RGB"))

    def prepared(self, image: Image.Image):
        image = self.jitter(image)
        if random.random() < 0.5:
            image = tf.hflip(image)
        box = random_crop(image.size, (0.2, 1.0), random)
        views = [tf.resized_crop(image, *box, (224, 224), transforms.InterpolationMode.BICUBIC) for _ in range(2)]
        return self.to_patches(views[0]), transforms.ToTensor()(views[1]), self.masking()


def compare_tars(folder: Path, paths: list[Path], transform: TwoViewTransform, plain: Plain, rounds: int) -> dict:
    """The same from one tar of the pictures: ours by offset, webdataset one after the other."""
    (folder / "tars").mkdir()
    with tarfile.open(folder / "tars" / "0.tar", "w") as tar:
        for path in paths:
            tar.add(path, path.name)
    listed = list_tars(folder / "tars", ["0.tar"], "--data_path").pictures()
    dataset = PretrainingImages(listed, transform, beit2.MaskingGenerator((14, 14), 75), seed=0)
    web = webdataset.WebDataset(str(folder / "tars" / "0.tar"), shardshuffle=False).decode("pil").to_tuple("jpg")
    epoch = iter(range(1000))

    def ours() -> None:
        number = next(epoch)
        for index in range(COUNT):
            dataset[(number, index)]

    def theirs() -> None:
        for (image,) in web:
            plain.prepared(image)

    ratio = paired(ours, theirs, rounds)
    found = {"median": ratio.median, "low": ratio.low, "high": ratio.high}
    return found | {"ours_images_per_cpu_s": COUNT / ratio.a_seconds, "plain_images_per_cpu_s": COUNT / ratio.b_seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = pictures(Path(folder))
        transform = TwoViewTransform(224, 224, "bicubic", "bicubic", 0.2)
        dataset = PretrainingImages(paths, transform, beit2.MaskingGenerator((14, 14), 75), seed=0)
        plain, epoch = Plain(), iter(range(1000))

        def ours() -> None:
            number = next(epoch)
            for index in range(COUNT):
                dataset[(number, index)]

        def reference() -> None:
            for path in paths:
                plain(path)

        ratio = paired(ours, reference, options.rounds)
        tar = compare_tars(Path(folder), paths, transform, plain, options.rounds)
        size = sum(path.stat().st_size for path in paths) / COUNT / 1000
    write_result(
        "beit2_data",
        {
            "what": "plain reference pipeline over ours, one 640 x 480 JPEG, two equal views of 224 pixels",
            "ratio": ratio.median,
            "ratio_low": ratio.low,
            "ratio_high": ratio.high,
            "ours_images_per_cpu_s": COUNT / ratio.a_seconds,
            "plain_images_per_cpu_s": COUNT / ratio.b_seconds,
            "mean_file_kb": size,
            "webdataset, from a tar": tar,
        },
    )


if __name__ == "__main__":
    main()
