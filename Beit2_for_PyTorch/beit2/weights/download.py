"""Weights by address or published name, downloaded once for all ranks of a host."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from beit2.weights import published
from common.errors import UsageError

_FOLDER = "tokenizer_model"  # where the Ascend page puts tokenizers


def local_file(location: str) -> Path:
    """A path as it is; an http(s) address or the name of published weights as a file in torch's hub cache.

    A name ending in `-<hash>.pth` (8 or more hex digits, as the reference's tokenizers) must match the file's SHA-256.

    Raises:
        UsageError: no such file, unreachable, or the hash differs. The message has the command to fetch it by hand.
    """
    if location.startswith(("http://", "https://")):
        known = published.addresses(Path(urllib.parse.urlparse(location).path).name)
        return fetch((location, *(address for address in known if address != location)))
    path = Path(location)
    if path.exists():
        return path
    found = published.addresses(location)
    if found:
        return fetch(found)
    hint = ""
    if path.suffix in ("", ".pth") and path.parent == Path("."):
        hint = f"; published are {', '.join((*published.TOKENIZERS, *published.MODELS))}"
    raise UsageError(f"{location}: no such weight file{hint}")


def find_tokenizer(name: str, folders: Sequence[Path]) -> Path | None:
    """A tokenizer's file in `tokenizer_model/` below one of the folders: `<name>.pth` or `<name>-<hash>.pth`."""
    pattern = re.compile(re.escape(name) + r"(-[0-9a-f]{8,64})?\.pth")
    for folder in folders:
        files = sorted((folder / _FOLDER).glob(f"{name}*.pth"))
        for path in files:
            if pattern.fullmatch(path.name):
                return path
    return None


def fetch(addresses: Sequence[str]) -> Path:
    """The file of the first address that answers. One process of a host downloads, the others wait for it.

    Raises:
        UsageError: none does, with the command to fetch it by hand.
    """
    name = Path(urllib.parse.urlparse(addresses[0]).path).name
    target = Path(torch.hub.get_dir()) / "checkpoints" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    problems = []
    with _alone(target.with_name(f".{name}.lock")):
        for address in addresses:
            if target.exists():
                return target
            if problems:
                print(f"note: {problems[-1]}; trying {address}", flush=True)
            try:
                _download(address, target, name)
            except (urllib.error.URLError, OSError) as error:
                problems.append(f"{address}: {error}{_hint(address)}")
    if target.exists():
        return target
    raise UsageError(
        f"cannot download {name}: {'; '.join(problems)}. Fetch it by hand:  wget -O {name} '{addresses[0]}'"
    )


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """One process at a time; the lock goes with a process that dies."""
    with open(file, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _download(address: str, target: Path, name: str) -> None:
    partial = target.with_name(f"{name}.part")
    try:
        with urllib.request.urlopen(address, timeout=60) as response, open(partial, "wb") as file:
            shutil.copyfileobj(response, file)
        with open(partial, "rb") as file:
            if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
                raise OSError("the server answered with a page and not with weights")
        check_hash(partial, name)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _hint(address: str) -> str:
    """For an address with a signed query of which the shell has kept the part before the first &."""
    query = urllib.parse.urlparse(address).query
    if query and "&" not in query and "sig=" not in query:
        return " (its query ends after the first part: the shell cuts an address at &, so put it in quotes)"
    return ""


def check_hash(path: Path, name: str) -> None:
    """Compares a file with the hash in its name; nothing to do when there is none.

    Raises:
        UsageError: they differ.
    """
    stated = re.search(r"-([0-9a-f]{8,64})\.\w+$", name)
    if stated is None:
        return
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if not digest.hexdigest().startswith(stated.group(1)):
        raise UsageError(
            f"{name}: its SHA-256 starts with {digest.hexdigest()[:8]}, its name says {stated.group(1)}: "
            "the download is damaged or not the published file"
        )
