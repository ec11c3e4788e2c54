"""The checked-in extract of the wheels' APIs, and the comparison of this repository's uses with it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ci.npu.contract.signatures import problem
from ci.npu.contract.uses import Use

EXTRACT = Path(__file__).with_name("api.json")
VERSIONS = ("2.1.0.post17", "2.6.0", "2.9.0", "2.13.0", "2.14.0")
REQUIRED = ("2.13.0", "2.14.0")  # every use must exist in these; the others are reported
Api = dict[str, dict[str, str]]  # version -> dotted name -> signature


def read_extract() -> Api:
    """The APIs of all versions, from the checked-in file."""
    names = json.loads(EXTRACT.read_text(encoding="utf-8"))
    apis: Api = {version: {} for version in VERSIONS}
    for name, signatures in names.items():
        for signature, versions in signatures.items():
            for version in versions.split():
                apis[version][name] = signature
    return apis


def write_extract(apis: Api) -> None:
    """One line a name: its signatures, each with the versions that have it."""
    lines = []
    for name in sorted({name for api in apis.values() for name in api}):
        signatures: dict[str, list[str]] = {}
        for version, api in apis.items():
            if name in api:
                signatures.setdefault(api[name], []).append(version)
        lines.append(f"{json.dumps(name)}: {json.dumps({s: ' '.join(v) for s, v in signatures.items()})}")
    EXTRACT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def complaint(use: Use, api: dict[str, str]) -> str | None:
    """What is wrong with a use in one version, in words; None where it fits."""
    # torch_npu exports its operators under its own name, too
    alias = use.name.replace("torch_npu.", "torch.ops.npu.", 1) if use.name.count(".") == 1 else use.name
    signature = api.get(use.name, api.get(alias))
    if signature is None:
        is_package = any(name.startswith(f"{use.name}.") for name in api)
        return None if is_package else "does not exist"
    return problem(use, signature)


def complaints(uses: Iterable[Use], apis: Api, versions: Iterable[str] = REQUIRED) -> list[str]:
    """One sentence for each use that does not fit, with its place and the version."""
    found = []
    for use in uses:
        for version in versions:
            if trouble := complaint(use, apis[version]):
                found.append(f"{use.where}: {use.name} {trouble} (torch_npu {version})")
    return found


def table(uses: Iterable[Use], apis: Api) -> str:
    """Markdown: a row a name, a column a version, and what is wrong where it does not work."""
    rows = ["| name | " + " | ".join(VERSIONS) + " |", "|---|" + "---|" * len(VERSIONS)]
    uses = list(uses)
    for name in sorted({use.name for use in uses}):
        cells = []
        for version in VERSIONS:
            troubles = {complaint(use, apis[version]) for use in uses if use.name == name} - {None}
            cells.append("; ".join(sorted(troubles)) or "yes")
        rows.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"
