"""Git revisions as folders, the base of a change, and the projects it touches."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ci.training_cases import CASES
from common.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
WORKING_TREE = "."
SHARED = ("common/", "constraints.txt")  # what every project runs on


def git(*arguments: str) -> str:
    """The output of a git command in this repo.

    Raises:
        UsageError: git failed; with its last line.
    """
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise UsageError(f"git {' '.join(arguments)}: {(result.stderr.strip().splitlines() or ['failed'])[-1]}")
    return result.stdout.strip()


def commit_of(revision: str) -> str:
    """The full name of a commit; the working tree's is that of HEAD, with a + when files of it have changed."""
    if revision == WORKING_TREE:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    return git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")


def is_revision(text: str) -> bool:
    with contextlib.suppress(UsageError):
        return bool(commit_of(text))
    return False


def base_of_change() -> str:
    """Where the work began: the merge base with the main branch; on it, HEAD for changed files, else HEAD's parent."""
    head = commit_of("HEAD")
    for branch in ("origin/main", "main"):
        if is_revision(branch) and (base := git("merge-base", "HEAD", branch)) != head:
            return base
    return head if commit_of(WORKING_TREE).endswith("+") else commit_of("HEAD^")


@contextlib.contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A folder with the files of a revision: a git worktree for the time of the block, or the working tree itself."""
    if revision == WORKING_TREE:
        yield ROOT
        return
    commit = commit_of(revision)
    # an exception, so that what follows is undone
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with tempfile.TemporaryDirectory(prefix="revision-") as folder:
            path = Path(folder) / commit[:12]
            git("worktree", "add", "--detach", "--force", str(path), commit)
            try:
                yield path
            finally:
                git("worktree", "remove", "--force", str(path))
    finally:
        signal.signal(signal.SIGTERM, previous)


def touched_projects(base: str, head: str) -> list[str]:
    """Projects whose training code differs between two revisions; tests and texts do not count."""
    revisions = [base] if head == WORKING_TREE else [base, head]
    return projects_of(git("diff", "--name-only", *revisions).splitlines())


def projects_of(paths: list[str]) -> list[str]:
    """The projects that changed files concern."""
    code = [p for p in paths if not p.endswith(".md") and "/test/" not in p]
    if any(path.startswith(SHARED) for path in code):
        return list(CASES)
    return [project for project in CASES if any(path.startswith(f"{project}/") for path in code)]
