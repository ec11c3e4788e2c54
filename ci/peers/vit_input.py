"""Input pipeline of ViT_for_PyTorch against timm's and torchvision v2's transforms: CPU seconds a picture, one thread.

    python -m ci.peers.vit_input

Same recipe on all sides (MAE's fine-tuning: random resized crop, flip, RandAugment, normalise, random erasing), from
the same JPEG files of 500 x 375 and of 640 x 480 to float batches of 32. Ours ends twice: with uint8 batches, which is
what a loader worker does when an accelerator normalises, and with normalised and erased float batches, all on the CPU.
torchvision v2 works on uint8 tensors as its documentation advises (decoded by Pillow: its own decoder is not in every
build); its RandAugment has other operations than timm's.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

import vit  # noqa: F401  # isort: skip  (repairs torchvision, before timm imports it)
from PIL import Image
from timm.data import create_transform
from torchvision.datasets import ImageFolder as TorchvisionImageFolder
from torchvision.transforms import functional as tv
from torchvision.transforms import v2

from ci.peers.paired_timing import Ratio, paired, write_result
from vit.data.augment import CROP_RATIO, MEAN, STD, TrainTransform, normalise, random_crop, resize
from vit.data.image_folder import read_image, scan
from vit.data.loader import TrainLoader, to_model_input

SIZES, QUALITY = ((500, 375), (640, 480)), 90  # width, height
COUNT, BATCH = 64, 32
CPU = torch.device("cpu")


def make_pictures(folder: Path, width: int, height: int) -> None:
    """Pictures with the spectrum of photographs (amplitude 1 / frequency), so that JPEG has photograph-like work."""
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    amplitude = 1 / np.maximum(np.hypot(fy, fx), 1 / width)
    for index in range(COUNT):
        rng = np.random.default_rng(index)
        grey, *tint = (
            np.fft.irfft2(amplitude * np.exp(2j * np.pi * rng.random(amplitude.shape)), (height, width))
            for _ in range(4)
        )
        planes = [128 + 50 * grey / grey.std() + 15 * plane / plane.std() for plane in tint]
        path = folder / f"class{index % 2}" / f"{index:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.stack(planes, axis=2).clip(0, 255).astype(np.uint8)).save(path, quality=QUALITY)


def timm_batches(folder: Path) -> Callable[[], None]:
    """One pass over the pictures as a timm training script makes its batches."""
    transform = create_transform(
        224,
        is_training=True,
        color_jitter=None,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
        mean=MEAN,
        std=STD,
    )
    dataset = TorchvisionImageFolder(str(folder), transform)

    def run() -> None:
        for first in range(0, COUNT, BATCH):
            batch: list[torch.Tensor] = []
            while len(batch) < BATCH:
                try:
                    batch.append(dataset[first + len(batch)][0])
                except ValueError:  # timm's posterize to 0 bits, which this Pillow refuses: draw again
                    continue
            torch.stack(batch)

    return run


def torchvision_batches(folder: Path) -> Callable[[], None]:
    """One pass as torchvision's documentation makes batches: uint8 tensors, floats at the end."""
    transform = v2.Compose([
        v2.RandomResizedCrop(224, scale=(0.08, 1.0), interpolation=tv.InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandAugment(num_ops=2, magnitude=9, interpolation=tv.InterpolationMode.BILINEAR),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
        v2.RandomErasing(0.25),
    ])  # fmt: skip
    paths = scan(folder).paths

    def run() -> None:
        for first in range(0, COUNT, BATCH):
            torch.stack(
                [transform(tv.pil_to_tensor(Image.open(path).convert("RGB"))) for path in paths[first : first + BATCH]]
            )

    return run


def our_batches(folder: Path, to_float: bool) -> Callable[[], None]:
    loader = TrainLoader(scan(folder), TrainTransform(224), batch_size=BATCH, seed=0)
    epochs = iter(range(1_000_000))

    def run() -> None:
        for batch in loader.epoch(next(epochs)):
            if to_float:
                to_model_input(batch, CPU)

    return run


def stages(folder: Path) -> dict[str, tuple[Callable[[], None], Callable[[], None]]]:
    """Each step alone on the same inputs: timm's way, ours."""
    paths = scan(folder).paths
    pictures = [Image.open(path).convert("RGB") for path in paths]
    arrays = [read_image(path) for path in paths]
    random.seed(0)
    boxes = [random_crop(*array.shape[:2], (0.08, 1.0), CROP_RATIO) for array in arrays]
    small = np.stack([resize(array, 224) for array in arrays])  # [COUNT, 224, 224, 3]

    def their_decode() -> None:
        for path in paths:
            with open(path, "rb") as file:
                Image.open(file).convert("RGB")

    def our_decode() -> None:
        for path in paths:
            read_image(path)

    def their_crop() -> None:
        for picture, box in zip(pictures, boxes, strict=True):
            tv.resized_crop(picture, *box, [224, 224], tv.InterpolationMode.BICUBIC)

    def our_crop() -> None:
        for array, (top, left, height, width) in zip(arrays, boxes, strict=True):
            resize(array[top : top + height, left : left + width], 224)

    def their_floats() -> None:
        for first in range(0, COUNT, BATCH):
            tensors = [tv.to_tensor(Image.fromarray(pixels)) for pixels in small[first : first + BATCH]]
            torch.stack([tv.normalize(tensor, MEAN, STD) for tensor in tensors])

    def our_floats() -> None:
        for first in range(0, COUNT, BATCH):
            normalise(torch.from_numpy(np.stack(list(small[first : first + BATCH]))).permute(0, 3, 1, 2))

    return {
        "timm, decode": (their_decode, our_decode),
        "timm, crop and resize": (their_crop, our_crop),
        "timm, to normalised floats": (their_floats, our_floats),
    }


def report(name: str, ratio: Ratio) -> dict[str, float]:
    """Prints and returns one comparison of ours (a) with a peer's (b); above 1 means that ours is faster."""
    ours, theirs = (1e3 * seconds / COUNT for seconds in (ratio.a_seconds, ratio.b_seconds))
    print(
        f"{name:32s} peer {theirs:6.3f} ms, ours {ours:6.3f} ms per picture: "
        f"{ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})",
        flush=True,
    )
    return {"peer_ms": theirs, "ours_ms": ours, "ratio": ratio.median, "low": ratio.low, "high": ratio.high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    compare, results = partial(paired, rounds=options.rounds), {}
    with tempfile.TemporaryDirectory() as name:
        for width, height in SIZES:
            size, folder = f"{width}x{height}", Path(name) / str(width)
            make_pictures(folder, width, height)
            results[f"bytes of a {size}"] = sum(path.stat().st_size for path in folder.rglob("*.jpg")) // COUNT
            works = {
                "timm, to uint8 batches": (timm_batches(folder), our_batches(folder, False)),
                "timm, to float batches": (timm_batches(folder), our_batches(folder, True)),
                "torchvision v2, to float batches": (torchvision_batches(folder), our_batches(folder, True)),
                **(stages(folder) if (width, height) == SIZES[0] else {}),
            }
            for work, (their_way, our_way) in works.items():
                results[f"{size}, {work}"] = report(f"{size}, {work}", compare(our_way, their_way))
    write_result("vit_input", {"pictures": COUNT, **results})


if __name__ == "__main__":
    main()
