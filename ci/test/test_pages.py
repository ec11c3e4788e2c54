"""Commands on pages that belong to no project; and that every page with commands has a test which runs them."""

import re
import subprocess
from pathlib import Path

import pytest

from ci.test import pages
from ci.training_cases import ROOT

MAKE_TARGETS = set(re.findall(r"^([a-z_-]+):", (ROOT / "Makefile").read_text(), re.M))
HERE = "ci/test/test_pages.py"
PROJECTS = {
    f"{project}_for_PyTorch/README.md": f"{project}_for_PyTorch/test/test_readme_commands.py"
    for project in ("ViT", "Beit2", "CLIP", "Data2vec")
}
TESTED_BY = {
    "README.md": HERE,
    "docs/many_servers.md": HERE,
    "docs/on_a_card.md": HERE,
    **dict.fromkeys(("docs/own_data.md", "docs/weights.md"), HERE),  # the projects' tests run what is below `cd`
    "examples/README.md": "ci/test/test_examples.py",
    "ci/sample_data/README.md": "ci/test/test_sample_data.py",
    "ci/npu/fake/README.md": "ci/test/test_npu_device.py",
    **PROJECTS,
}
ELSEWHERE = {  # a line of one of these pages -> why it is not run here
    "pip install .*": "installing is `make install`",
    "python -m common.profile.precision_compare .*": "common/test/test_precision_dump.py runs it",
    "python -m common.launch.cluster .*": "common/test/test_launch_cluster.py runs it",
}
STAND_INS = {
    "/data/imageNet-1k": "pictures",
    "--data_path=DATA": "--data_path=pictures",
    "--data_path=...": "--data_path=pictures",
    "--device=npu": "--device=cpu",
}


def written() -> list[Path]:
    """English pages that git knows, or would take."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [ROOT / name for name in names if not name.endswith(".zh-CN.md") and "/common/" not in name]


def test_every_page_with_commands_has_a_test_that_runs_them():
    with_commands = {str(page.relative_to(ROOT)) for page in written() if pages.commands(page)}
    assert with_commands == set(TESTED_BY)
    assert all((ROOT / test).is_file() for test in TESTED_BY.values())


def of_projects() -> set[str]:
    """What the projects' own tests run."""
    return {line for test in PROJECTS.values() for line in pages.of_project(ROOT / test.split("/")[0])}


@pytest.fixture
def reader(tmp_path, monkeypatch) -> Path:
    """A folder like ViT's, with pictures and two servers."""
    folder = pages.reader_folder(ROOT / "ViT_for_PyTorch", tmp_path)
    (folder / "pictures").mkdir()
    from common import rank_table

    two = [rank_table.generate(f"10.0.0.{n}", {i: f"192.168.{n}.{i + 1}" for i in range(8)}) for n in (1, 2)]
    rank_table.write(rank_table.merge(two), folder / "hccl_2s_16p.json")
    (folder / "hosts").write_text("10.0.0.1 slots=8\n10.0.0.2 slots=8\n")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("page", [page for page, test in TESTED_BY.items() if test == HERE])
def test_commands_run(page, reader):
    found = [line for line in pages.commands(ROOT / page) if line not in of_projects()]
    skipped = {pattern: why for pattern, why in ELSEWHERE.items() if any(re.fullmatch(pattern, line) for line in found)}
    stand_ins = {name: new for name, new in STAND_INS.items() if any(name in line for line in found)}
    for words in pages.lines_to_run(found, skipped, stand_ins):
        if words[0] == "make":
            assert words[1] in MAKE_TARGETS, words
        elif words[0] == "cd":
            assert (ROOT / words[1]).is_dir()  # what `reader` looks like, or a project whose own test runs what follows
        else:
            assert words[0] == "bash", words
            assert all(script == "run_vit.py" for script, *_ in pages.dry_run(words, reader))
