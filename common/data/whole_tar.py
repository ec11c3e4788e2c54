"""Tars that are damaged between two members: tarfile ends their listing there, as if it were their end."""

from __future__ import annotations

import tarfile


class Member(tarfile.TarInfo):
    """`tarfile.open(..., tarinfo=Member)`: a ReadError where neither a header nor the mark of the end follows."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Member:
        begin = tar.offset
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # typeshed leaves it out
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"cut short or damaged at byte {begin:,}: {error}") from error
