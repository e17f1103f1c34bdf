"""The ids rows: memory of 5M event ids, the longest pause, and what one id costs, with a dict of the same ids as peer.

Ids are 36-character strings, looked up as new objects (a retry's id comes in a new request), in random order, one by
one from Python for both. `ids.bytes_per_id` is the worst from 10,000 ids on; its floor is the dict's, ids included, at
the end. `ids.longest_pause_ms` is the longest thread CPU time of one put or tend(100) while the table grows to 5M,
slides, and is emptied: the least of three equal passes for each call, so that interrupts do not count; its floor is the
dict's longest put (of one pass, the collector off). Run as a script: python bench/micro/ids.py
"""

from __future__ import annotations

import gc
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from rows import row, table
from timing import note

COMMAND = "make bench ARGS='--only ids'"
IDS, SLICE, ROUNDS, PASSES = 5_000_000, 250_000, 5, 3
SEED = bytes(range(16))


def texts(numbers: Iterable[int]) -> list[str]:
    return [f"order-{i * 0x9E3779B97F4A7C15 % 2**64:016x}-{i:013d}" for i in numbers]


def growth() -> tuple[Any, dict[str, int], float, float]:
    """The full table, a dict of the same ids, and the bytes per id of each."""
    from penstock._ext.event_ids import EventIds

    ids, worst = EventIds(SEED), 0.0
    peer: dict[str, int] = {}
    entry_bytes = 0
    for at in range(0, IDS, 1000):
        part = texts(range(at, at + 1000))
        ids.put_many(part, 0, at)
        stats = ids.stats()
        if stats.ids >= 10_000:
            worst = max(worst, stats.bytes / stats.ids)
        for i, text in enumerate(part, at):
            peer[text] = i
        entry_bytes += sum(map(sys.getsizeof, part)) + 32 * len(part)  # and an int each
    return ids, peer, worst, (sys.getsizeof(peer) + entry_bytes) / IDS


def each(call: Callable[[Any], Any], arguments: Sequence[Any]) -> np.ndarray:
    """Nanoseconds of CPU time of this thread that each call took."""
    took, now = np.empty(len(arguments), np.uint32), time.thread_time_ns
    for i, argument in enumerate(arguments):
        began = now()
        call(argument)
        took[i] = min(now() - began, 2**32 - 1)
    return took


def one_life() -> np.ndarray:
    """Every call of a table that grows to IDS, slides by a quarter of them, and is emptied."""
    from penstock._ext.event_ids import EventIds

    ids = EventIds(SEED)

    def put(i: int) -> None:
        ids.put(i, 0, i)

    parts = [each(put, range(IDS))]
    for at in range(IDS, IDS + IDS // 4, IDS // 16):
        parts.append(each(ids.forget_before, [at - IDS + IDS // 16]))
        parts.append(each(put, range(at, at + IDS // 16)))
    parts.append(each(ids.forget_before, [2 * IDS]))
    parts.append(each(ids.tend, [100] * (IDS // 100 + 1)))
    if ids.stats().ids:
        raise AssertionError(f"{ids.stats()}: expected an empty table")
    return np.concatenate(parts)


def dict_growth() -> np.ndarray:
    peer: dict[int, int] = {}

    def put(i: int) -> None:
        peer[i] = i

    return each(put, range(IDS))


def longest(life: Callable[[], np.ndarray], passes: int) -> float:
    """Milliseconds of the call that took longest, each call by the least of its passes."""
    least = life()
    for _ in range(passes - 1):
        np.minimum(least, life(), out=least)
    return float(least.max()) / 1e6


def per_call(calls: dict[str, Callable[[str], Any]], numbers: Callable[[], Iterable[int]]) -> dict[str, float]:
    """Nanoseconds of each call on a slice of ids nobody has hashed yet, the least of ROUNDS."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        chosen = list(numbers())
        for name, call in calls.items():
            fresh = texts(chosen)
            began = time.perf_counter()
            deque(map(call, fresh), maxlen=0)
            best[name] = min(best[name], 1e9 * (time.perf_counter() - began) / len(fresh))
    return best


def puts(ids: Any, peer: dict[str, int]) -> dict[str, Callable[[str], Any]]:
    def ours(text: str) -> None:
        ids.put(text, 0, IDS)

    def theirs(text: str) -> None:
        peer[text] = IDS

    return {"ours": ours, "dict": theirs}


def run() -> list[dict[str, Any]]:
    gc.disable()
    source = random.Random(1)
    note("growing to 5M")
    ids, peer, bytes_per_id, peer_bytes = growth()
    if ids.count_known(texts(range(0, IDS, 1000))) != IDS // 1000:
        raise AssertionError("an id was forgotten")
    note("looking up")
    hit = per_call({"ours": ids.__contains__, "dict": peer.__contains__}, lambda: source.sample(range(IDS), SLICE))
    miss = per_call(
        {"ours": ids.__contains__, "dict": peer.__contains__},
        lambda: source.sample(range(2 * IDS, 3 * IDS), SLICE),
    )
    starts = iter(range(IDS, 2 * IDS, SLICE))
    put = per_call(puts(ids, peer), lambda: range(start := next(starts), start + SLICE))
    del ids, peer
    note("pauses")
    pause, dict_pause = longest(one_life, PASSES), longest(dict_growth, 1)
    gc.enable()
    return [
        row("ids.bytes_per_id", bytes_per_id, "bytes", COMMAND, peer_bytes, bytes_per_id / peer_bytes),
        row("ids.longest_pause_ms", pause, "ms", COMMAND, dict_pause, pause / dict_pause),
        row("ids.put_ns", put["ours"], "ns", COMMAND, put["dict"], put["ours"] / put["dict"]),
        row("ids.find_hit_ns", hit["ours"], "ns", COMMAND, hit["dict"], hit["ours"] / hit["dict"]),
        row("ids.find_miss_ns", miss["ours"], "ns", COMMAND, miss["dict"], miss["ours"] / miss["dict"]),
    ]


if __name__ == "__main__":
    print(table(run()))
