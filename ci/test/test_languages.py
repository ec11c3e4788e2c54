"""The Chinese pages beside the English ones: the same commands, tables and numbers, and flags and links that exist."""

import re
from pathlib import Path

import pytest

from ci.test import pages

ROOT = Path(__file__).resolve().parents[2]
PAIRS = sorted(
    path for path in ROOT.rglob("*.zh-CN.md") if ".venv" not in path.parts and "common" not in path.parts[:-2]
)
SECTIONS = ("概述", "准备训练环境", "开始训练", "训练结果展示", "版本说明", "FAQ")
READMES = [path for path in PAIRS if path.name == "README.zh-CN.md"]
each_page = pytest.mark.parametrize("page", PAIRS, ids=lambda path: str(path.relative_to(ROOT)))


def english(page: Path) -> Path:
    return page.with_name(page.name.replace(".zh-CN", ""))


def rows(page: Path) -> list[list[str]]:
    """Cells of a page's tables, line by line; the rule below a head is a row of its own."""
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def shape(page: Path) -> list[int]:
    """How many rows each table of a page has, in any order: sections differ."""
    text = re.sub(r"<!--.*?-->\n", "", page.read_text(encoding="utf-8"))
    return sorted(len(table.splitlines()) for table in re.findall(r"(?:^\|.*\n)+", text + "\n", re.M))


def terms(cells: list[str]) -> set[str]:
    """What a translation leaves as it is: code, and numbers with a point."""
    code = {word for cell in cells for word in re.findall(r"`([^`]+)`", cell) if word.isascii() and "<" not in word}
    return code | {number for cell in cells for number in re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])", cell)}


@each_page
def test_both_languages_have_the_same_commands(page):
    assert set(pages.commands(page)) == set(pages.commands(english(page)))


@each_page
def test_both_languages_have_the_same_tables(page):
    """As many, as long, with the same first columns (options, old commands, names) and the same numbers."""
    ours, theirs = rows(page), rows(english(page))
    assert shape(page) == shape(english(page))
    first = [terms([row[0] for row in table]) for table in (ours, theirs)]
    assert first[0] == first[1]
    numbers = [{term for row in table for term in terms(row) if term[0].isdigit()} for table in (ours, theirs)]
    assert numbers[0] == numbers[1]


@each_page
def test_a_chinese_page_has_no_flag_of_its_own(page):
    chinese, other = (path.read_text(encoding="utf-8") for path in (page, english(page)))
    known = set(re.findall(r"--[a-z][\w-]*", other))
    assert set(re.findall(r"--[a-z][\w-]*", chinese)) - known == set()


@pytest.mark.parametrize("page", READMES, ids=lambda path: path.parent.name)
def test_a_chinese_readme_has_the_sections_that_its_readers_know_and_every_training_script(page):
    chinese = page.read_text(encoding="utf-8")
    found = [name for name in re.findall(r"^## (.+)$", chinese, re.M)]
    assert found == list(SECTIONS)
    scripts = {
        name for line in pages.commands(english(page)) for name in re.findall(r"train_(?:clip_)?full_[18]p\.sh", line)
    }
    assert all(name in chinese for name in scripts)


@each_page
def test_links_stay_in_the_readers_language(page):
    """That they lead somewhere is test_contract.py's."""
    for target in re.findall(r"\]\((?!https?:)([^)#]+\.md)", page.read_text(encoding="utf-8")):
        other = (page.parent / target).resolve()
        assert other == english(page) or other.with_suffix(".zh-CN.md") not in PAIRS, f"{target} is there in Chinese"
