"""The sets with something held out: nothing of it is trained on, and what may be known is known."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
from PIL import Image

from ci.sample_data import captioned_emoji, captioned_icons, emoji_table, icon_objects, icon_table


@pytest.fixture(scope="module")
def icons(sample_data: Path) -> list[icon_table.Icon]:
    return icon_table.read({p.name: sample_data / "downloads" / p.filename for p in icon_table.PACKAGES})


def read_tables(folder: Path) -> dict[str, list[dict]]:
    return {path.stem: [json.loads(line) for line in path.open(encoding="utf-8")] for path in folder.glob("*.jsonl")}


def test_an_icons_caption_concept_and_words():
    icon = icon_table.Icon("material", "arrow-left-bold-outline", Image.new("L", (1, 1)))
    assert (icon.caption, icon.concept, icon.slug) == (
        "arrow left bold outline",
        "arrow left",
        "material_arrow_left_bold_outline",
    )
    assert icon.words == {"left", "arrow"}
    assert icon_table.Icon("remix", "bold", icon.drawing).concept == "bold"


def test_every_family_is_drawn_whole_and_in_the_square(icons):
    count = defaultdict(int)
    for icon in icons:
        count[icon.family] += 1
        assert icon.drawing.size == (64, 64)
    assert set(count) == set(icon_table.FAMILIES)
    assert len(icons) > 16000 and min(count.values()) > 300
    at_the_edge = sum(min(i.drawing.crop(box).getextrema()[0] for box in edges()) < 128 for i in icons)
    assert at_the_edge < 0.01 * len(icons), "cut off"


def edges():
    return ((0, 0, 64, 1), (0, 63, 64, 64), (0, 0, 1, 64), (63, 0, 64, 64))


def test_icon_tables_hold_out_combinations_words_and_an_artist(icons):
    parts = captioned_icons.splits(icons)
    trained = {icon.words for icon in parts["train"]}
    trained_words = set().union(*trained)
    pictures = {icon.drawing.tobytes() for icon in parts["train"]}
    assert all(icon.family != icon_table.HELD_OUT_FAMILY for icon in parts["train"])
    for icon in parts["unseen_combination"]:
        assert icon.words not in trained and icon.words <= trained_words and len(icon.words) > 1
        assert sum(word in words for words in trained for word in icon.words) >= 3 * len(icon.words)
    assert all(icon.words - trained_words for icon in parts["unseen_concept"])
    assert {icon.family for icon in parts["unseen_artist"]} == {icon_table.HELD_OUT_FAMILY}
    assert {icon.concept for icon in parts["unseen_artist"]} <= {icon.concept for icon in parts["train"]}
    for name in ("unseen_combination", "unseen_concept", "unseen_artist"):
        captions = [icon.caption for icon in parts[name]]
        assert len(captions) > 200 and len(set(captions)) == len(captions), name
        assert not pictures & {icon.drawing.tobytes() for icon in parts[name]}, name


def test_emoji_tables_hold_out_combinations_and_families(sample_data):
    table = emoji_table.read({p.name: sample_data / "downloads" / p.filename for p in emoji_table.PACKAGES})
    parts = captioned_emoji.splits(table)
    figures, tones = defaultdict(set), defaultdict(set)
    for emoji in parts["train"]:
        figures[captioned_emoji.figure(emoji.name)].add(emoji.name)
        for tone in captioned_emoji.TONES:
            tones[tone] |= {emoji.name} if tone in emoji.name else set()
    assert len(parts["unseen_combination"]) > 250 and all(len(names) > 100 for names in tones.values())
    for emoji in parts["unseen_combination"]:
        known = figures[captioned_emoji.figure(emoji.name)]
        assert known and emoji.name not in known
    trained = {emoji.family for emoji in parts["train"]}
    assert len(parts["unseen_concept"]) > 300
    assert not trained & {emoji.family for emoji in parts["unseen_concept"]}


def test_chinese_tables_name_the_same_pictures_in_the_same_splits(sample_data):
    """By Unicode's Chinese names, none of them twice."""
    folder = sample_data / "captioned_emoji"
    english, chinese = read_tables(folder), read_tables(folder / "zh")
    assert set(english) == set(chinese)
    for split, rows in chinese.items():
        assert {row["image_path"] for row in rows} == {f"../{row['image_path']}" for row in english[split]}
    names = {row["image_path"]: row["caption"] for rows in chinese.values() for row in rows}
    assert names["../pictures/1f385-1f3fc.png"] == "圣诞老人，中等浅肤色"
    assert len(set(names.values())) == len(names) and not any("_" in name or ":" in name for name in names.values())


@pytest.mark.parametrize("name", ["captioned_emoji", "captioned_icons"])
def test_tables_name_pictures_that_exist_and_belong_to_one_split(sample_data, name):
    tables = read_tables(sample_data / name)
    owner = {}
    for split, rows in tables.items():
        for path in {row["image_path"] for row in rows}:
            assert owner.setdefault(path, split) == split
        for row in rows[::500]:
            with Image.open(sample_data / name / row["image_path"]) as picture:
                assert picture.mode == "RGB"
    assert set(owner) == {f"pictures/{path.name}" for path in (sample_data / name / "pictures").iterdir()}


def test_icon_objects_hold_out_the_artist(sample_data, icons):
    classes = icon_objects.objects(icons)
    for split in ("train", "val"):
        folders = {path.name: list(path.iterdir()) for path in (sample_data / "icon_objects" / split).iterdir()}
        assert set(folders) == set(classes)
        assert all((path.name.startswith("remix_")) == (split == "val") for f in folders.values() for path in f)
    assert len(classes) == 25
