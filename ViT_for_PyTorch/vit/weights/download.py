"""Known published weights: where they are, how they are checked, where they are kept.

The weights are facebookresearch/mae's, licence CC-BY-NC 4.0. MAE publishes the first six digits of each file's MD5 and
no SHA-256, so the first download is checked against those and its SHA-256 is recorded beside the file; every later use
is checked against the record.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import torch

_MAE = "https://dl.fbaipublicfiles.com/mae/"


@dataclass(frozen=True)
class Published:
    """A file on the web, the first digits of its MD5 as published, and the model it belongs to."""

    url: str
    md5_prefix: str
    model: str
    num_classes: int  # 0: an encoder without a head

    @property
    def file_name(self) -> str:
        return self.url.rsplit("/", 1)[1]


# name -> file; the digests are in the README.md and FINETUNE.md of facebookresearch/mae
PUBLISHED = {
    "vit_base_p16": Published(_MAE + "finetune/mae_finetuned_vit_base.pth", "1b25e9", "vit_base_p16", 1000),
    "vit_large_p16": Published(_MAE + "finetune/mae_finetuned_vit_large.pth", "51f550", "vit_large_p16", 1000),
    "vit_huge_p14": Published(_MAE + "finetune/mae_finetuned_vit_huge.pth", "2541f2", "vit_huge_p14", 1000),
    "mae_vit_base_p16": Published(_MAE + "pretrain/mae_pretrain_vit_base.pth", "8cad7c", "vit_base_p16", 0),
    "mae_vit_large_p16": Published(_MAE + "pretrain/mae_pretrain_vit_large.pth", "b8b06e", "vit_large_p16", 0),
    "mae_vit_huge_p14": Published(_MAE + "pretrain/mae_pretrain_vit_huge.pth", "9bdbb0", "vit_huge_p14", 0),
}


class DownloadError(RuntimeError):
    """The weights could not be fetched, or are not the published ones."""


def weights_folder() -> Path:
    """Where published weights are kept: torch.hub's checkpoint folder (moves with TORCH_HOME)."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def _digest(path: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch(name: str) -> Path:
    """The local file of a known name ("mindspore/" before it is accepted), downloaded at its first use.

    ValueError for an unknown name. `DownloadError` when it cannot be fetched, saying what to download and where to put
    it, or when the file is not the published one; a file that fails the check is not used and not deleted.
    """
    name = name.removeprefix("mindspore/")
    if name not in PUBLISHED:
        raise ValueError(f"no published weights are called {name!r}; known: {', '.join(PUBLISHED)}; or give a file")
    published = PUBLISHED[name]
    path = weights_folder() / published.file_name
    if not path.exists():
        _download(published, path)
    _check(published, path)
    return path


def _download(published: Published, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(published.url, str(path))  # under a temporary name, renamed when whole
    except (URLError, OSError) as error:
        raise DownloadError(
            f"cannot download {published.url} ({error}); download it on a machine with internet access and put it at "
            f"{path} (or set TORCH_HOME to where hub/checkpoints/{published.file_name} is)"
        ) from error


def _check(published: Published, path: Path) -> None:
    record = path.with_name(path.name + ".sha256")
    advice = f"move it away and download {published.url} again"
    if record.exists():
        if _digest(path, "sha256") != record.read_text().split()[0]:
            raise DownloadError(f"{path} is not the file whose SHA-256 is in {record.name}: {advice}")
        return
    md5 = _digest(path, "md5")
    if not md5.startswith(published.md5_prefix):
        raise DownloadError(f"{path} has MD5 {md5}, the published one starts with {published.md5_prefix}: {advice}")
    record.write_text(f"{_digest(path, 'sha256')}  {path.name}\n")
