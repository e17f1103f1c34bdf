"""`penstock serve` (control path): settings, then the server."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str]) -> int:
    """Run `penstock serve` with these arguments; returns the exit code."""
    from .config import load_config, parse_flags
    from .lifecycle import run

    app, flags = parse_flags(arguments)
    config = load_config(flags)
    sys.path.insert(0, "")
    return run(app, config)
