"""public_address_statement.md of each project: every address that its files name, as ModelZoo asks for it.

python -m ci.public_addresses           # exit 1 when a statement is out of date
python -m ci.public_addresses --write   # make them anew
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECTS = ("ViT_for_PyTorch", "Beit2_for_PyTorch", "CLIP_for_PyTorch", "Data2vec_for_PyTorch")
NAME = "public_address_statement.md"
_ADDRESS = re.compile(r"https?://[^\s\"'`<>()\[\]{}|\\，。、]+|\b[\w.+-]+@[\w-]+\.[\w.-]+\b")
_READ = {".py", ".sh", ".yaml", ".yml", ".json", ".txt", ".md", ".toml", ".ini"}
_NOT_READ = ("golden/", "test/test_", NAME)
# what an address is for, by the folder or kind of file that names it
_PURPOSES = (
    (".py", "权重下载或算法来源 / weights to download, or source of a method"),
    (".md", "文档引用 / reference in text"),
)


def addresses(project: str, root: Path = ROOT) -> list[tuple[str, str]]:
    """(file, address) of everything that git keeps of a project, each once, in order."""
    listed = subprocess.run(["git", "ls-files", project], cwd=root, capture_output=True, text=True, check=True).stdout
    found = set()
    for name in listed.splitlines():
        if Path(name).suffix not in _READ or any(part in name for part in _NOT_READ):
            continue
        text = (root / name).read_text(encoding="utf-8", errors="replace")
        found |= {(str(Path(name).relative_to(project)), match.rstrip(".,;:")) for match in _ADDRESS.findall(text)}
    return sorted(found)


def statement(project: str, root: Path = ROOT) -> str:
    """The content of a project's statement."""
    lines = [
        f"# {project} 公网地址声明 / public addresses",
        "",
        "由 `python -m ci.public_addresses --write` 生成。仅当命令给出权重名称或网址时才会下载。",
        "Made by that command. Nothing is fetched unless a command line names weights or an address.",
        "",
        "| 文件 / file | 地址 / address | 用途 / purpose |",
        "|---|---|---|",
    ]
    for name, address in addresses(project, root):
        purpose = next(
            (text for suffix, text in _PURPOSES if name.endswith(suffix)), "配置或脚本 / configuration or script"
        )
        lines.append(f"| {name} | {address} | {purpose} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the statements instead of comparing them")
    options = parser.parse_args(argv)
    stale = []
    for project in PROJECTS:
        path, text = ROOT / project / NAME, statement(project)
        if options.write:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(f"{project}/{NAME}")
    if stale:
        print(f"out of date: {', '.join(stale)}; run python -m ci.public_addresses --write", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
