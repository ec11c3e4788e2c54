"""Tiny pictures with captions, and a COCO folder made of them."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 60),
    "blue": (30, 60, 220),
    "yellow": (230, 220, 40),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
}


def draw(index: int) -> tuple[bytes, str]:
    """A landscape JPEG of a coloured box on a coloured ground, and what it shows; all of 30 differ."""
    names = list(COLOURS)
    ground, box = names[index % 6], names[(index % 6 + 1 + index // 6 % 5) % 6]
    image = Image.new("RGB", (64, 48), COLOURS[ground])
    ImageDraw.Draw(image).rectangle((20, 12, 44, 36), fill=COLOURS[box])
    data = io.BytesIO()
    image.save(data, "JPEG", quality=95)
    return data.getvalue(), f"A {box} box on {ground} ground."


def write_coco_zips(folder: Path, pictures: dict[str, int], captions_each: int = 2) -> None:
    """train2017.zip, val2017.zip and annotations_trainval2017.zip as cocodataset.org packs them."""
    folder.mkdir(parents=True, exist_ok=True)
    annotations = {}
    for split, count in pictures.items():
        images, captions = [], []
        with zipfile.ZipFile(folder / f"{split}2017.zip", "w") as archive:
            for i in range(count):
                data, caption = draw(i)
                archive.writestr(f"{split}2017/{i:012d}.jpg", data)
                images.append({"id": 100 + i, "file_name": f"{i:012d}.jpg", "height": 48, "width": 64})
                for _ in range(captions_each):
                    captions.append({"id": len(captions), "image_id": 100 + i, "caption": caption})
        annotations[split] = {"info": {}, "licenses": [], "images": images, "annotations": captions}
    with zipfile.ZipFile(folder / "annotations_trainval2017.zip", "w") as archive:
        for split, content in annotations.items():
            archive.writestr(f"annotations/captions_{split}2017.json", json.dumps(content))


def write_shard(path: Path, samples: range, caption_of=lambda i: draw(i)[1]) -> None:
    """A WebDataset tar of the pictures of these numbers; without the caption's member where `caption_of` gives None."""
    with tarfile.open(path, "w") as tar:
        for i in samples:
            caption = caption_of(i)
            for suffix, data in (("jpg", draw(i)[0]), ("txt", caption and caption.encode()), ("json", b"{}")):
                if data is None:
                    continue
                member = tarfile.TarInfo(f"part.one/{i:05d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
