"""The GitHub workflows: valid, with commands that exist, on the Pythons and processors that the README names."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()


def load(path):
    """PyYAML reads the key `on` as True, as YAML 1.1 has it."""
    workflow = yaml.safe_load(path.read_text())
    return workflow | {"on": workflow.get(True)}


def commands(workflow):
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_is_complete(path):
    workflow = load(path)
    assert workflow["on"] and workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 240, name  # GitHub's own limit would be six hours
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step), step
            assert "uses" not in step or re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]), step
    assert commands(workflow)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_commands_are_make_targets_and_gates_that_exist(path):
    """A gate is called by its module where exit code 3, which make would turn into 2, has to be told from 1."""
    for job in load(path)["jobs"].values():
        installed = False
        for command in commands({"jobs": {"": job}}):
            if target := re.fullmatch(r"make ([a-z_-]+) PYTHON=python", command):
                assert re.search(rf"^{target[1]}:", MAKEFILE, re.M), command
                installed = True
                continue
            module = re.fullmatch(r"\.venv/bin/python -m ci\.gates\.(\w+) .+ \|\| test \$\? -eq 3", command)
            assert (
                module
                and installed
                and "3 " in (ROOT / "ci" / "gates" / module[1] / "gate.py").read_text().split("Exit code:")[1]
            )


def test_tests_run_on_all_supported_pythons_and_both_processors():
    jobs = load(ROOT / ".github/workflows/tests.yml")["jobs"]
    lowest, highest = re.search(r"assert \((3, \d+)\) <= v <= \((3, \d+)\)", MAKEFILE).groups()
    minors = range(int(lowest.split()[1]), int(highest.split()[1]) + 1)
    assert jobs["tests"]["strategy"]["matrix"]["python"] == [f"3.{minor}" for minor in minors]
    assert [("arm" in os) for os in jobs["tests"]["strategy"]["matrix"]["os"]] == [False, True]
    assert {"make lint PYTHON=python", "make counters PYTHON=python"} <= {*commands({"jobs": jobs})}


def test_nightly_runs_what_is_too_long_for_a_change():
    workflow = load(ROOT / ".github/workflows/nightly.yml")
    assert workflow["on"]["schedule"]
    everything = "\n".join(commands(workflow))
    for command in ("make peers", "make outcomes", "-m ci.gates.paired", "-m ci.gates.nightly"):
        assert command in everything
    jobs = workflow["jobs"]
    (checkout,) = (step for step in jobs["perf"]["steps"] if step.get("uses", "").startswith("actions/checkout"))
    assert checkout["with"]["fetch-depth"] == 0, "the base is an earlier commit"
    assert "make peers" not in (ROOT / ".ci/run").read_text()
