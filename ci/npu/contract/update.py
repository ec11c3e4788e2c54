"""Fetches the torch_npu wheels, renews api.json and the table in README.md, and checks every use: `make npu-contract`.

The wheels (25 to 45 MB each) are downloaded one by one into a temporary folder, read as closed files and deleted. They
are never installed: with torch_npu beside it, a torch without CANN cannot be imported any more. With --offline only the
table is renewed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from ci.npu.contract import contract
from ci.npu.contract.uses import repository_uses
from ci.npu.contract.wheel_api import WheelApi

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- table: make npu-contract -->\n", "<!-- end of table -->\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--offline", action="store_true", help="fetch nothing, go by the api.json that is here")
    if not parser.parse_args().offline:
        contract.write_extract({version: fetch_api(version) for version in contract.VERSIONS})
    apis = contract.read_extract()
    uses = repository_uses()
    README.write_text(with_table(README.read_text(encoding="utf-8"), contract.table(uses, apis)), encoding="utf-8")
    troubles = contract.complaints(uses, apis)
    for trouble in troubles:
        print(f"error: {trouble}", file=sys.stderr)
    names = len({use.name for use in uses})
    print(f"{len(uses)} uses of {names} names; {len(troubles)} do not fit torch_npu {' and '.join(contract.REQUIRED)}")
    return 1 if troubles else 0


def fetch_api(version: str) -> dict[str, str]:
    """Name and signature of everything kept of one wheel."""
    with tempfile.TemporaryDirectory() as folder:
        print(f"torch_npu {version}", flush=True)
        # the .py and .yaml files are the same for every Python and processor
        wheel = ["--only-binary=:all:", "--python-version=3.11", "--platform=manylinux_2_28_x86_64"]
        wheel += ["--platform=manylinux_2_17_x86_64", "--platform=manylinux2014_x86_64"]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--no-cache-dir", *wheel, "--dest", folder, f"torch_npu=={version}"], check=True)
        return WheelApi(next(Path(folder).glob("*.whl"))).signatures()


def with_table(text: str, table: str) -> str:
    """The README's text with a new table between the two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table}{END}{after}"


if __name__ == "__main__":
    sys.exit(main())
