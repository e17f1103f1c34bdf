"""Timing of the in-process rows: interleaved rounds and medians, since absolute times on shared machines drift.

What must stay true: every contender runs once in every round, in turn, so that a slow minute hits all alike.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any


def interleaved(contenders: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each contender's call over `rounds` rounds, after `warmup` rounds that do not count.

    The garbage collector is off while a contender runs, as `timeit` does.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-warmup, rounds):
        for name, call in contenders.items():
            gc.collect()
            gc.disable()
            try:
                begin = time.perf_counter()
                kept = call()
                took = time.perf_counter() - begin
            finally:
                gc.enable()
            del kept
            if turn >= 0:
                seconds[name].append(took)
    return {name: statistics.median(values) for name, values in seconds.items()}


def note(text: str) -> None:
    """Progress, on stderr, so that stdout holds only tables."""
    print(f"  .. {text}", file=sys.stderr, flush=True)
