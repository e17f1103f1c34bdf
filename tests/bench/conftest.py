"""Puts bench/ on the import path, as `python bench/run.py` does."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))
