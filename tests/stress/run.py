"""`make stress`: random apps against two implementations that share no rule with the kernel, for as long as is said.

Every seed is a whole app and a stream (apps.py), checked through every way in (check.py) in a child process, so that a
crash or a hang is a finding like any other. A difference is shrunk and printed as Python that can be pasted.
Run as a script: python tests/stress/run.py [--minutes 10] [--seed N] [--apps N] [--jobs N]; with --seed and --apps 1
it repeats one. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.path.remove(str(Path(__file__).resolve().parent))

from penstock.terminal import Progress
from stress.apps import Case, draw, shown, source_of
from stress.check import WAYS, Checker
from stress.shrink import shrink

PATIENCE = 600  # seconds for one case: then it hangs


# What a difference is told as -> the ways in that must be gone again to see it.
WAYS_OF = {
    "score": ("score",),
    "features": ("score",),
    "outcomes": ("score",),
    "the oracles differ": (),
    "score_batch": ("batch",),
    "replay": ("replay",),
    "with a log": ("log",),
    "features with a log": ("log",),
    "backfill": ("log",),
    "training set": ("log",),
    "parity": ("log",),
}
MOST_SHOWN = 60  # events of a reproduction that is printed whole


def check_case(case: Case, ways: tuple[str, ...], most_reads: int, most_cells: int) -> tuple[int, int, list[str]]:
    """(values compared, values compared with SQL, differences)."""
    try:
        found = Checker(case, most_reads, most_cells).run(ways)
    except Exception:
        return 0, 0, [traceback.format_exc()]
    return found.values, found.sql_values, found.differences


def child(pipe: Connection) -> None:
    while True:
        try:
            what = pipe.recv()
        except EOFError:
            return
        case, most_events, *rest = what
        if isinstance(case, int):
            case = draw(case, most_events)
        pipe.send(check_case(case, *rest))


@dataclass
class Worker:
    """A child process and what it is at."""

    pipe: Connection
    process: Any
    seed: int = -1
    since: float = 0.0


def start() -> Worker:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return Worker(mine, process)


def answer(worker: Worker) -> tuple[int, int, list[str]] | None:
    """What the child found; a crash and a hang are differences. None: it is still at it."""
    if worker.pipe.poll():
        try:
            return worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            return 0, 0, [f"crashed: the process ended with {worker.process.exitcode}"]
    if time.monotonic() - worker.since > PATIENCE:
        worker.process.kill()
        return 0, 0, [f"hangs: nothing after {PATIENCE} s"]
    return None


def kind_of(difference: str) -> str:
    """What a smaller case must share with it: the way in, and what is told."""
    first = difference.split(",")[0].split(":")[0]
    return first if len(first) < 40 else difference.splitlines()[-1][:40]


class Stress:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.passed = self.failed = self.values = self.sql_values = 0

    def task(self, case: int | Case, ways: tuple[str, ...] = WAYS) -> tuple[Any, ...]:
        return case, self.arguments.events, ways, self.arguments.reads, self.arguments.cells

    def run(self) -> int:
        arguments = self.arguments
        seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**9)
        end = time.monotonic() + arguments.minutes * 60
        started, total, told = time.monotonic(), arguments.minutes * 60, 0.0
        print(f"seeds from {seed}", flush=True)
        workers = [start() for _ in range(arguments.jobs)]
        left = arguments.apps if arguments.apps is not None else 1 << 62
        with Progress("random apps") as progress:
            while True:
                for worker in workers:
                    if worker.seed < 0 and left and (time.monotonic() < end or arguments.apps is not None):
                        worker.seed, worker.since = seed, time.monotonic()
                        worker.pipe.send(self.task(seed))
                        seed, left = seed + 1, left - 1
                busy = [w for w in workers if w.seed >= 0]
                if not busy:
                    break
                wait([w.pipe for w in busy], timeout=1.0)
                for i, worker in enumerate(workers):
                    found = answer(worker) if worker.seed >= 0 else None
                    if found is None:
                        continue
                    self.count(worker.seed, found)
                    if found[2] and found[2][0].startswith(("crashed", "hangs")):
                        workers[i] = start()
                    worker.seed = -1
                spent = time.monotonic() - started
                progress(int(1000 * min(1.0, spent / total)), 1000)
                if not progress.live and spent > told + 60:
                    told = spent
                    print(f"   {spent:.0f} s: {self.passed} passed, {self.failed} failed", flush=True)
        for worker in workers:
            worker.pipe.close()
        print(
            f"{self.passed + self.failed:,} apps, {self.values:,} values compared with exact fractions, "
            f"{self.sql_values:,} of the fractions with SQL"
        )
        print(f"{self.passed} passed, {self.failed} failed")
        return 1 if self.failed or not self.passed else 0

    def count(self, seed: int, found: tuple[int, int, list[str]]) -> None:
        values, sql_values, differences = found
        self.values += values
        self.sql_values += sql_values
        if not differences:
            self.passed += 1
            return
        self.failed += 1
        print(f"\nFAILED seed {seed}: {len(differences)} differences", flush=True)
        for difference in differences[:5]:
            print(f"  {difference}")
        print(
            f"  again: make stress ARGS='--seed {seed} --apps 1 --events {self.arguments.events} "
            f"--reads {self.arguments.reads} --cells {self.arguments.cells}'",
            flush=True,
        )
        if self.failed <= self.arguments.shrink:
            self.shrunk(seed, differences[0])

    def shrunk(self, seed: int, difference: str) -> None:
        kind, worker, last = kind_of(difference), start(), [difference]
        ways = WAYS_OF.get(kind.split(" after ")[0], WAYS)

        def differs(case: Case) -> bool:
            nonlocal worker
            worker.since = time.monotonic()
            worker.pipe.send(self.task(case, ways))
            while (found := answer(worker)) is None:
                wait([worker.pipe], timeout=1.0)
            if found[2] and found[2][0].startswith(("crashed", "hangs")):
                worker = start()
            same = [d for d in found[2] if kind_of(d) == kind]
            last[:] = same or last
            return bool(same)

        case = shrink(draw(seed, self.arguments.events), differs, self.arguments.shrink_seconds)
        worker.pipe.close()
        print(f"  smallest found: {len(case.ops)} events\n  {last[0]}")
        text = shown(case) if len(case.ops) <= MOST_SHOWN else source_of(case.app) + "# not small: see its seed\n"
        print("".join(f"    {line}\n" for line in text.splitlines()), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, help="of the first app; left out, any")
    parser.add_argument("--apps", type=int, help="how many; left out, as many as the time allows")
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 1))
    parser.add_argument("--events", type=int, default=2000, help="of one app at most")
    parser.add_argument("--reads", type=int, default=150, help="scored events of one app whose values are compared")
    parser.add_argument("--cells", type=int, default=8_000, help="values of one app that are compared, about")
    parser.add_argument("--shrink", type=int, default=3, help="how many failures are made small")
    parser.add_argument("--shrink-seconds", type=float, default=60.0)
    return Stress(parser.parse_args()).run()


if __name__ == "__main__":
    raise SystemExit(main())
