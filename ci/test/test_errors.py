"""Every error that the projects raise on purpose says what, where and what to do; forgotten packages are one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ci import errors

ROOT = Path(__file__).resolve().parents[2]
PASSED_BY = {  # sentences that break a rule -> why they may
    "common/launch/launch.sh: python3 is not on PATH: activate the environment with the requirements first": "names it",
    "common/rank_table/__init__.py: nothing to merge; give at least one rank table": "there is no value to name",
}
SENTENCES = errors.sentences()


def test_the_list_is_whole():
    """Each kind and house is in it: a reader of the code that lost its way would pass everything."""
    assert len(SENTENCES) > 500
    assert {sentence.place.partition("/")[0] for sentence in SENTENCES} == set(errors.HOUSES)
    assert {sentence.kind for sentence in SENTENCES} == set(errors.FOR_USERS)


def test_every_error_says_what_where_and_what_to_do():
    weak = {sentence.key: f"{sentence.place} {sentence.faults()}" for sentence in SENTENCES if sentence.faults()}
    assert {key: where for key, where in weak.items() if key not in PASSED_BY} == {}
    assert set(PASSED_BY) <= set(weak), "an exception that is not needed any more"


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("", 1),
        ("{str(error)}", 0),  # said elsewhere
        ("something went wrong", 2),
        ("--batch_size {n}: wrong", 1),
        ("the pictures are bad; remove them", 1),
        ("--batch_size {n}: must be at least 1", 0),
        ("{path}: no such file", 0),
        ("{path}: not a table ({error})", 1),
        ("{path}: not a table ({error}); give a .csv", 0),
    ],
)
def test_the_rules_can_refuse(text, faults):
    assert len(errors.Sentence("UsageError", "common/x.py:1", text).faults()) == faults


SCRIPTS = sorted(path for path in ROOT.glob("*_for_PyTorch/*.py") if "__main__" in path.read_text(encoding="utf-8"))
BLOCKER = """
import sys

class Absent:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "timm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent)
"""


@pytest.mark.parametrize("project", sorted({path.parent.name for path in SCRIPTS}))
def test_without_the_packages_a_script_says_so_in_one_line(project):
    """`python -S` sees no installed package, as a fresh Python."""
    for script in (path for path in SCRIPTS if path.parent.name == project):
        done = subprocess.run([sys.executable, "-S", script], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, (script, done.stderr)
        assert done.stderr.startswith("error: ") and " has no torch, " in done.stderr
        assert done.stderr.rstrip().endswith(f"pip install -r {script.with_name('requirements.txt')}")


def test_the_one_package_that_is_missing_is_named(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    script = ROOT / "ViT_for_PyTorch" / "run_vit.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and " has no timm: activate" in done.stderr and "Traceback" not in done.stderr
