"""Whether a dict.txt is the one that a checkpoint was trained with: another of the same length works silently wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UsageError
from data2vec.data.dictionary import Dictionary


def check_vocabulary(vocab: Dictionary, place: str | Path, checkpoint: Mapping[str, Any], source: str | Path) -> None:
    """Compares length, and where the checkpoint tells the words' digest (ours do), that.

    Args:
        vocab: of `place`, with <mask>.
        checkpoint: what the file or folder `source` holds, of text.

    Raises:
        UsageError: it is another vocabulary.
    """
    weights = checkpoint.get("model", checkpoint)
    words = next((len(v) for name, v in weights.items() if name.endswith("embed_tokens.weight")), len(vocab))
    digest = saved_digest(checkpoint)
    if words != len(vocab):
        reason = f"{len(vocab)} words with <mask>, but {source} has {words}"
    elif digest not in (None, vocab.digest()):
        reason = f"its words, or their order, are not those of {source}"
    else:
        return
    raise UsageError(f"{place}: {reason}: it was trained with another dict.txt; give that one")


def saved_digest(checkpoint: Mapping[str, Any]) -> str | None:
    """`Dictionary.digest` of the run that wrote the checkpoint; None where it does not say."""
    identity = (checkpoint.get("extra_state") or {}).get("identity") or {}
    data = identity.get("data") or {}
    return data.get("vocabulary") or data.get("folder 0", {}).get("vocabulary")
