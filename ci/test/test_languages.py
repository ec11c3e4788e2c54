"""The Chinese pages beside the English ones: the same commands, flags that exist, links that lead somewhere."""

import re
from pathlib import Path

import pytest

from ci import pages

ROOT = Path(__file__).resolve().parents[2]
PAIRS = sorted(
    path for path in ROOT.rglob("*.zh-CN.md") if ".venv" not in path.parts and "common" not in path.parts[:-2]
)
SECTIONS = ("概述", "准备训练环境", "开始训练", "训练结果展示", "版本说明", "FAQ")
READMES = [path for path in PAIRS if path.name == "README.zh-CN.md"]
each_page = pytest.mark.parametrize("page", PAIRS, ids=lambda path: str(path.relative_to(ROOT)))


def english(page: Path) -> Path:
    return page.with_name(page.name.replace(".zh-CN", ""))


@each_page
def test_a_chinese_page_has_no_command_or_flag_of_its_own(page):
    assert set(pages.commands(page)) - set(pages.commands(english(page))) == set()
    chinese, other = (path.read_text(encoding="utf-8") for path in (page, english(page)))
    known = set(re.findall(r"--[a-z][\w-]*", other))
    left = re.sub(r"^\|[^|]*\|", "|", chinese, flags=re.M)  # the first column of a table may hold old commands
    assert set(re.findall(r"--[a-z][\w-]*", left)) - known == set()


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
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
