"""docker/*.Dockerfile: no engine builds them here, so what they say is read: syntax, commands, versions.

By hand, on 2026-11-29: hadolint 2.15.1 finds nothing but what they tell it to leave (DL3008).
"""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from ci.training_cases import ROOT

FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
INSTRUCTIONS = {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "CMD"}
MAKEFILE = (ROOT / "Makefile").read_text()
TORCH = re.search(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, the rest) of a Dockerfile, continued lines as one."""
    lines = path.read_text().replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip() and not line.startswith("#")]


def of(path: Path, kind: str) -> list[str]:
    return [rest for name, rest in instructions(path) if name == kind]


def test_there_is_one_a_device():
    assert {path.stem for path in FILES} == {"cpu", "cuda", "npu"}


@each_file
def test_every_line_is_an_instruction_and_the_shell_can_read_it(path):
    names = [name for name, _ in instructions(path)]
    assert set(names) <= INSTRUCTIONS and names.count("FROM") == 1
    assert names[0] in ("ARG", "FROM") and names[-1] == "CMD" and names.index("WORKDIR") < names.index("COPY")
    for command in of(path, "RUN"):
        assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0, command
    for value in of(path, "ENV"):
        assert all(re.fullmatch(r"[A-Z_]+=\S+", word) for word in shlex.split(value)), value
    assert f"docker build -f docker/{path.name} " in path.read_text(), "the head says how it is built"


@each_file
def test_it_installs_by_make_and_ends_in_a_target(path):
    runs = " && ".join(of(path, "RUN"))
    assert "make install PYTHON=" in runs, "the pins are constraints.txt's, as everywhere"
    assert not re.search(r"pip install (?!\"torch_npu)", runs), "no version of its own"
    (command,) = of(path, "CMD")
    words = json.loads(command)
    assert words[0] == "make" and re.search(rf"^{words[1]}:", MAKEFILE, re.M)


@each_file
def test_what_it_copies_and_calls_is_there(path):
    for value in of(path, "COPY"):
        *sources, target = value.split()
        assert sources and all((ROOT / source).exists() for source in sources) and not target.startswith("..")
    commands = [shlex.split(part)[0] for line in of(path, "RUN") for part in line.split("&&")]
    assert set(commands) <= {"apt-get", "rm", "make", ".venv/bin/pip"}, commands
    installed = {word for line in of(path, "RUN") if "apt-get" in line for word in line.split()}
    needed = {"bash", "make", "git", "procps"}  # the scripts; pytest's contract test asks git; pgrep in the tests
    assert needed <= installed


@each_file
def test_the_python_is_supported(path):
    lowest, highest = (int(v) for v in re.search(r"\(3, (\d+)\) <= v <= \(3, (\d+)\)", MAKEFILE).groups())
    image = " ".join([*of(path, "ARG"), *of(path, "FROM")])
    assert lowest <= int(re.search(r"(?:python:|-py)3\.(\d+)", image)[1]) <= highest


def test_the_npu_image_has_the_torch_npu_and_cann_of_our_torch():
    path = ROOT / "docker" / "npu.Dockerfile"
    pin = re.search(r'pip install "torch_npu==\$\((.+?)\)"', " ".join(of(path, "RUN")))[1]
    found = subprocess.run(["bash", "-c", pin], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert found == TORCH
    cann = re.search(r"/cann:([\d.]+)-", of(path, "ARG")[0])[1]
    sets = json.loads((ROOT / "common" / "doctor" / "known_good_sets.json").read_text())
    (least,) = {known["cann_at_least"] for known in sets["sets"] if known.get("torch") == TORCH}
    assert cann == least, "the image's tag is one that is published for that CANN"


def test_what_is_built_here_stays_out_of_the_image():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {".venv", ".git", ".sample_data"} <= {line.strip("/") for line in ignored}
