"""Every error that the projects raise on purpose, as its sentence stands in the code, and what each has to say.

python -m ci.errors          # the list: kind | place | sentence
python -m ci.errors --weak   # those that break a rule, which a test refuses

A sentence for the user says what is wrong, where (an option, a file, a value) and what to do, or what would be right.
Values stand in braces. What only forwards another error, `{str(error)}`, is judged where that one is raised.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOUSES = ("common", "ViT_for_PyTorch", "Beit2_for_PyTorch", "CLIP_for_PyTorch", "Data2vec_for_PyTorch")
# ends a program, or a call of the API, with its text before a user
FOR_USERS = (
    "UsageError CheckpointError LaunchError RankTableError RanksLost NonFiniteStep FloatingPointError BrokenPicture "
    "BrokenImage BrokenSample ImageError DownloadError ArgumentTypeError FileExistsError error die"
).split()
# what to do, as an order to the reader ...
_REMEDY = re.compile(
    r"\b(give|choose|use|set|unset|start|add|remove|delete|leave|omit|name|fetch|copy|make|run|write|lower|raise|repair|"
    r"rename|move|fill|train|fine-tune|install|activate|source|say|resume|go on|put|correct|generate|re-save|take|try|"
    r"switch|decompress|report|lengthen|split|end that run|merge)\b",
    re.IGNORECASE,
)
# ... or what would be right, which the reader then does
_RIGHT = re.compile(
    r"\b(must|has to|have to|should|needs?|needed|expected|known|only|at least|there (is|are)|looked for|is for|is of|"
    r"takes|it has|such as|not overwritten|did you mean|required|O0, O1, O2 or O3|neither .* nor|here (it is|are|one)|"
    r"damaged|another|lists? (all|them))\b",
    re.IGNORECASE,
)
# ... or that a thing is not there, or holds nothing of what is looked for: the first part says which
_ABSENT = re.compile(
    r"\b(no such|not there|not a file|does not exist|is missing|are missing|lacks?|is empty|holds no|has no|exists|"
    r"no (pictures|rows|pairs|captions|lines|teacher|tensors|column|sub-folder)|cannot be (read|written)|"
    r"names no|not (valid|readable|UTF-8|JSON|a readable|a whole))\b"
)
# ... or ends in another error's words, which is judged where that one is raised
_TAIL = re.compile(
    r"(: |[^({]*)\{[^{}]*(error|message|reason|problem|advice|remedy|hint|USAGE|absent|nearest|lost)[^{}]*\}\.?$"
)
# a value, an option, a key, a file of ours
_WHERE = re.compile(r"<>|--\w|\b\w+[._][a-z_]+\b")


@dataclass(frozen=True)
class Sentence:
    """An error: its kind (the exception's name, or error and die), file:line, and its text with values in braces."""

    kind: str
    place: str
    text: str

    @property
    def key(self) -> str:
        """Where it stands, without the line: what a list of exceptions may name."""
        return f"{self.place.rpartition(':')[0]}: {self.text}"

    def faults(self) -> list[str]:
        """The rules that it breaks."""
        if not self.text.strip():
            return ["is empty"]
        words, count = self.text, 1
        while count:  # a value may hold others
            words, count = re.subn(r"\{[^{}]*\}", "<>", words)
        if not re.search(r"\w", words):
            return []
        found = [] if _WHERE.search(words) else ["names no option, file or value"]
        if not any(rule.search(words) for rule in (_REMEDY, _RIGHT, _ABSENT)) and not _TAIL.search(self.text):
            found.append("does not say what to do, or what would be right")
        return found


def text_of(node: ast.expr) -> str:
    """A message as it is written, its values as {expression}."""
    if isinstance(node, ast.Constant):
        return str(node.value) if isinstance(node.value, str) else f"{{{node.value!r}}}"
    if isinstance(node, ast.JoinedStr):
        return "".join(
            f"{{{ast.unparse(part.value)}}}" if isinstance(part, ast.FormattedValue) else text_of(part)
            for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    if isinstance(node, ast.List) and len(node.elts) == 1:  # RankTableError takes a list of problems
        return text_of(node.elts[0])
    return f"{{{ast.unparse(node)}}}"


def of_python(path: Path) -> Iterator[tuple[str, int, str]]:
    """(kind, line, text) of the errors that a module raises."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call) or not call.args:
            continue
        kind = ast.unparse(call.func).rpartition(".")[2]
        if kind in FOR_USERS and (isinstance(node, ast.Raise) or kind == "error"):
            yield kind, node.lineno, text_of(call.args[0])


def of_shell(path: Path) -> Iterator[tuple[str, int, str]]:
    """The same of a script's `die "..."`, values as the shell writes them."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        for text in re.findall(r'\bdie "((?:[^"\\]|\\.)*)"', line):
            yield "die", number, re.sub(r"\$\{?(\w+)[^}\s]*\}?", r"{\1}", text)


def sentences(root: Path = ROOT) -> list[Sentence]:
    """All of them, by file and line."""
    found = []
    for house in HOUSES:
        for path in sorted((root / house).rglob("*")):
            name = path.relative_to(root)
            linked = house != "common" and name.parts[1] == "common"
            if linked or "golden" in name.parts or name.name.startswith(("test_", "demo_", "conftest")):
                continue
            reader = {".py": of_python, ".sh": of_shell}.get(path.suffix)
            if reader is not None:
                found += [Sentence(kind, f"{name}:{line}", text) for kind, line, text in reader(path)]
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weak", action="store_true", help="only those that break a rule, with the rule")
    options = parser.parse_args(argv)
    for sentence in sentences():
        if not options.weak or sentence.faults():
            print(sentence.kind, sentence.place, sentence.text, *sentence.faults(), sep=" | ")


if __name__ == "__main__":
    main()
