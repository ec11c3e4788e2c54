"""The commands and snippets of a markdown page, which tests run as a reader types them.

A test stands in a folder that looks like a project's (`reader_folder`), with small stand-ins under the names that the
page uses. Scripts of `test/`, which would start eight devices or two servers, are run with `--dry_run`; what they would
start is returned, for the test to parse or to run.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
_STARTS = ("python", "bash ", "make ", "torchrun ", "pip ", "cd ", "wget ", "docker ", "PYTHONPATH=")


def blocks(page: Path, language: str) -> list[str]:
    """Contents of a page's fenced blocks of a language ("" for those that name none)."""
    return [code for kind, code in _FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def commands(page: Path) -> list[str]:
    """Lines of a page's bash blocks, and those after "$ " of its transcripts; without comments, continued lines as one.

    Raises:
        ValueError: a block without a language holds what looks like a command: it would be run by no test.
    """
    lines = _whole_lines("".join(blocks(page, "bash")))
    for line in _whole_lines("".join(blocks(page, ""))):
        if line.startswith("$ "):
            lines.append(line.removeprefix("$ "))
        elif line.startswith(_STARTS):
            raise ValueError(f"{page}: {line!r}: the block's first line has to be ```bash")
    return lines


def of_project(project: Path) -> list[str]:
    """The commands of a project's README, and those of docs/*.md that stand below a line `cd <project>`; each once."""
    found = commands(project / "README.md")
    for page in sorted((project.parent / "docs").glob("*.md")):
        for block in blocks(page, "bash"):
            place, *rest = _whole_lines(block) or [""]
            found += rest if place == f"cd {project.name}" else []
    return list(dict.fromkeys(found))


def _whole_lines(text: str) -> list[str]:
    lines = (" ".join(re.sub(r"(^|\s)#.*", "", line).split()) for line in text.replace("\\\n", " ").splitlines())
    return [line for line in lines if line]


def lines_to_run(
    found: Sequence[str], elsewhere: Mapping[str, str], stand_ins: Mapping[str, str]
) -> Iterator[list[str]]:
    """Words of commands, but of those that a key of `elsewhere`, a pattern of the whole line, is for.

    Its value is the reason. In a line the keys of `stand_ins` (such as /data/coco) are replaced; "..." is left out.

    Raises:
        ValueError: a key of `elsewhere` or `stand_ins` that fits no line: it is out of date.
    """
    for pattern in elsewhere:
        if not any(re.fullmatch(pattern, line) for line in found):
            raise ValueError(f"no command is {pattern!r}")
    for name in stand_ins:
        if not any(name in line for line in found):
            raise ValueError(f"no command names {name!r}")
    for line in found:
        if any(re.fullmatch(pattern, line) for pattern in elsewhere):
            continue
        for name, stand_in in stand_ins.items():
            line = line.replace(name, stand_in)
        yield [word for word in shlex.split(line) if word not in ("...", "[...]")]


def reader_folder(project: Path, folder: Path) -> Path:
    """`folder` with links to all that a project's folder has, so that its scripts run there as in the project's own."""
    for path in project.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def dry_run(words: list[str], folder: Path) -> list[list[str]]:
    """[script, its arguments] of every Python script that a line `bash test/...` typed in `folder` would start.

    Raises:
        RuntimeError: it fails, or would start nothing.
    """
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    end = words.index("--") if "--" in words else len(words)
    device = [] if any(word.startswith("--device=") for word in words) else ["--device=cpu"]
    command = [*words[:end], *device, "--dry_run", *words[end:]]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    started = [line.split(" && ", 1)[1] for line in done.stdout.splitlines() if " && " in line]
    if done.returncode or not started:
        raise RuntimeError(f"{shlex.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return [_script(shlex.split(line)) for line in started]


def _script(words: list[str]) -> list[str]:
    at = next(index for index, word in enumerate(words) if word.endswith(".py"))
    return words[at:]
