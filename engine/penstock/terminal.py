"""How the command line speaks: headings and aligned tables on stdout, progress on stderr (control path).

What must stay true: without a terminal the output is plain text without control characters.
"""

import os
import sys
import time
from collections.abc import Sequence
from typing import TextIO

BAR = 32


def _styled(stream: TextIO) -> bool:
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def heading(number: int, text: str) -> None:
    """A step's title, with a line of space before it."""
    title = f"{number}  {text}"
    print(f"\n\033[1m{title}\033[0m" if _styled(sys.stdout) else f"\n{title}", flush=True)


def say(text: str = "") -> None:
    """Text under a heading, indented; lines stay lines."""
    for line in text.split("\n"):
        print(f"   {line}".rstrip(), flush=True)


def fact(what: str, value: str, note: str = "") -> None:
    """One figure per line: what it is, its value, and how to judge it."""
    say(f"{what:<40} {value:>12}   {note}")


def verdict(ok: bool, good: str = "ok", bad: str = "WRONG") -> str:
    """A short judgement, green or red on a terminal."""
    if not _styled(sys.stdout):
        return good if ok else bad
    return f"\033[32m{good}\033[0m" if ok else f"\033[1;31m{bad}\033[0m"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right; a rule under the header."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *rest]).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


class Progress:
    """A bar on stderr, called with (done, total); a plain line at the start and the end where it is no terminal.

    Used as a context manager; `seconds` is the time spent inside, afterwards.
    """

    def __init__(self, what: str, stream: TextIO | None = None) -> None:
        self.what = what
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.started = time.perf_counter()
        self.seconds = 0.0
        self._drawn = 0.0

    def __enter__(self) -> "Progress":
        self.started = time.perf_counter()
        if self.live:
            self._draw(f"   {self.what} ...")
        else:
            print(f"   {self.what} ...", file=self.stream, flush=True)
        return self

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if not self.live or (done < total and now - self._drawn < 0.1):
            return
        self._drawn = now
        share = done / total if total else 1.0
        full = int(share * BAR)
        left = (now - self.started) * (1 - share) / share if share > 0 else 0.0
        self._draw(f"   {self.what}  [{'#' * full}{'.' * (BAR - full)}] {share:4.0%}  {left:3.0f} s left")

    def note(self, text: str) -> None:
        """What is being done now, where there is no share to show."""
        if self.live:
            self._draw(f"   {self.what}: {text} ...")

    def _draw(self, text: str) -> None:
        self.stream.write("\r\033[K" + text)
        self.stream.flush()

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.started
        if self.live:
            self._draw("")
        else:
            print(f"   {self.what}: {self.seconds:.1f} s", file=self.stream, flush=True)
