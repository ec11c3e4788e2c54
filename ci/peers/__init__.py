"""Benchmarks against what users would take instead.

`python -m ci.peers.X` runs at the repository's root: the packages of the projects become importable here, once for all.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(folder) for folder in sorted(ROOT.glob("*_for_PyTorch")) if str(folder) not in sys.path]
