"""The contract that every project keeps: its files, its scripts and their flags, and its independence of the others."""

import ast
import contextlib
import os
import re
import runpy
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ci import public_addresses
from ci.gates.outcomes import gate as outcomes

ROOT = Path(__file__).resolve().parents[2]
PROJECTS = {
    "ViT_for_PyTorch": "vit",
    "Beit2_for_PyTorch": "beit2",
    "CLIP_for_PyTorch": "clip_pretraining",
    "Data2vec_for_PyTorch": "data2vec",
}
SCRIPTS = ("train_full_1p", "train_full_8p", "train_performance_1p", "train_performance_8p", "train_eval_1p")

# section headings of a project's README, one of each line
SECTIONS = (
    "Before you start|Prepare the environment|Software",
    "Training|Start training|Pretraining",
    "Results|Demonst",
)
DOCUMENTS = sorted(path for path in ROOT.rglob("*.md") if not {".venv", ".sample_data", "output"} & {*path.parts})
MAKE_TARGETS = set(re.findall(r"^([a-z][a-z_-]*):", (ROOT / "Makefile").read_text(), re.M))

each_project = pytest.mark.parametrize("project", PROJECTS)


@each_project
def test_has_the_files_that_users_look_for(project):
    names = [
        "README.md",
        "UPSTREAM.md",
        "LICENSE",
        "modelzoo_level.txt",
        "requirements.txt",
        "test/env_npu.sh",
        "test/demo.sh",
    ]
    names += [f"test/{script}.sh" for script in SCRIPTS]
    names += [f"{PROJECTS[project]}/__init__.py", f"{PROJECTS[project]}/npu_patches.py"]
    assert [name for name in names if not (ROOT / project / name).is_file()] == []


def test_public_addresses_are_stated():
    assert public_addresses.main([]) == 0, "python -m ci.public_addresses --write"


@each_project
def test_requirements_use_the_one_version_table(project):
    lines = (ROOT / project / "requirements.txt").read_text().split("\n")
    assert lines[0] == "-c ../constraints.txt"
    constrained = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    required = {line.strip().lower() for line in lines[1:] if line.strip() and not line.startswith("#")}
    assert required <= constrained, "every requirement is pinned in constraints.txt, and pinned only there"
    assert "apex" not in required  # PyPI's apex is an unrelated package


def test_every_pin_can_be_installed_on_every_supported_python():
    """What each installed package says of the Pythons that it is for, against the markers of its pin."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = [Requirement(line) for line in lines]
    for python in ("3.10", "3.11", "3.12"):
        held = [pin for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": python})]
        assert {pin.name for pin in held} == {pin.name for pin in pins}, f"a package has no pin for {python}"
        for pin in held:
            with contextlib.suppress(metadata.PackageNotFoundError):
                found = metadata.distribution(pin.name)
                if pin.specifier.contains(found.version):
                    assert SpecifierSet(found.metadata["Requires-Python"] or "").contains(python), f"{pin} on {python}"


@each_project
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_share_the_launcher_and_its_flags(project, script):
    path = ROOT / project / "test" / f"{script}.sh"
    usage = subprocess.run(["bash", path, "--help"], capture_output=True, text=True)
    assert usage.returncode == 0 and "Usage: bash test/" in usage.stdout, usage.stderr
    for flag in ("data_path", "batch_size", "epochs", "max_steps", "device", "nproc", "precision", "output_dir"):
        assert f"--{flag}=" in usage.stdout
    assert "--profile" in usage.stdout
    wrong = subprocess.run(["bash", path, "--data_pth=x"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "did you mean --data_path?" in wrong.stderr


@each_project
@pytest.mark.parametrize("script", [script for script in SCRIPTS if "1p" in script])  # those for 8 devices run these
def test_a_checkpoint_that_is_given_is_used(project, script, tmp_path):
    checkpoint = tmp_path / "a checkpoint.pt"
    checkpoint.touch()
    flags = [f"--data_path={tmp_path}", f"--ckpt_path={checkpoint}", f"--output_dir={tmp_path / 'out'}", "--dry_run"]
    if project == "CLIP_for_PyTorch" and script != "train_eval_1p":
        flags.append(f"--model_path={tmp_path}")
    command = ["bash", str(ROOT / project / "test" / f"{script}.sh"), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "a\\ checkpoint.pt " in done.stdout, done.stderr


@each_project
def test_every_launch_script_explains_itself(project):
    for path in sorted((ROOT / project / "test").glob("*.sh")):
        if path.name.startswith("train_"):
            usage = subprocess.run(["bash", path, "--help"], capture_output=True, text=True)
            assert usage.returncode == 0 and "Usage: bash " in usage.stdout, f"{path}: {usage.stderr}"


@each_project
def test_every_entry_script_explains_itself(project, monkeypatch, capsys):
    """`python <script> --help`, run in this process: starting an interpreter for each costs a minute."""
    monkeypatch.syspath_prepend(str(ROOT / project))
    scripts = [path for path in sorted((ROOT / project).glob("*.py")) if "__main__" in path.read_text()]
    assert scripts
    for path in scripts:
        monkeypatch.setattr(sys, "argv", [str(path), "--help"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(path), run_name="__main__")
        usage = capsys.readouterr().out
        assert ended.value.code in (0, None) and "usage" in usage.lower(), path
        if path.name == "run_clip.py":  # of the Trainer's options, which are 130 more, only the usual ones
            assert usage.count("\n") < 120


def test_help_ends_quietly_with_the_pipe_it_is_written_to():
    """`--help | head`: what every entry script imports first, and a text longer than any buffer."""
    reader, writer = os.pipe()
    os.close(reader)
    program = "import common.requirements; print('usage\\n' * 100_000)"
    done = subprocess.run(
        [sys.executable, "-c", program, "--help"], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert done.returncode == -signal.SIGPIPE and not done.stderr


def test_a_line_is_written_when_it_is_said():
    """Through a pipe, as every launcher's: a killed run has left its last words."""
    program = "import common.requirements, os, signal; print('step 1'); os.kill(os.getpid(), signal.SIGKILL)"
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env=plain)
    assert done.returncode == -signal.SIGKILL and done.stdout == "step 1\n"


@each_project
def test_demo_takes_an_output_folder_and_a_seed(project):
    """What `make outcomes` relies on."""
    text = (ROOT / project / "test" / "demo.sh").read_text()
    assert "demo.sh SAMPLE_DATA_DIR [OUTPUT_DIR [SEED]]" in text and "demo.json" in text
    assert project in outcomes.METRICS


@each_project
def test_readme_has_the_sections_that_users_look_for(project):
    text = (ROOT / project / "README.md").read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    for section in SECTIONS:
        assert any(re.match(section, heading) for heading in headings), f"no section {section}: {headings}"
    for script in re.findall(r"(?<!/)\btest/(\w+\.(?:sh|py))", text):
        assert (ROOT / project / "test" / script).is_file(), f"README names test/{script}"


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
@pytest.mark.parametrize("project", ["", *PROJECTS])
def test_readme_begins_with_what_a_picture_a_command_and_own_data(project, name):
    text = (ROOT / project / name).read_text(encoding="utf-8")
    places = [text.index(part) for part in ("![", "```bash", "docs/own_data", "\n| ")]
    assert places == sorted(places)


@each_project
def test_entry_scripts_explain_missing_packages(project):
    for path in (ROOT / project).glob("*.py"):
        imports = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        ours = [ast.unparse(node) for node in imports if ast.unparse(node) != "from __future__ import annotations"]
        assert ours[0] == "import common.requirements", path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_resolve(document):
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (document.parent / name).resolve() if name else document
        assert file.exists(), f"{document.name}: ({target}) is not there"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, f"{document.name}: ({target}) names no heading"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_named_in_documents_exist(document):
    text = document.read_text()
    code = re.findall(r"`([^`\n]+)`", text) + re.findall(r"```.*?```", text, re.S)
    named = {target for part in code for target in re.findall(r"(?:^|[\s`])make ([a-z][a-z_-]*)", part)}
    assert named <= MAKE_TARGETS, f"{document.name} names make {named - MAKE_TARGETS}"


@each_project
def test_goldens_stay_small(project):
    golden = ROOT / project / "test" / "golden"
    assert sum(path.stat().st_size for path in golden.rglob("*") if path.is_file()) < 3 << 20  # bytes


def test_torch_is_never_loaded_with_full_pickle():
    for folder in ("common", "ci", *PROJECTS):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    assert options.get("weights_only") == "True", f"{path}:{node.lineno}"
