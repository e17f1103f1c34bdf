"""Where a server's messages go (control path): stdout and stderr that never raise and never wait.

The reader of a pipe may be gone or asleep, and the disk behind a file full; print, tracebacks and logging all end here.
What must stay true: whatever the descriptor does, writing returns at once and without an error; what cannot be written
now is lost, and the next line that can be says how much was.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["Outlet", "never_in_the_way"]

PIECE = 4096  # PIPE_BUF: a pipe that takes anything takes so much at once


class Outlet(io.TextIOBase):
    """Text for a descriptor. A terminal, file, pipe or socket; lost: lines that could not be written."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.lost = 0
        self._told = 0

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        with contextlib.suppress(OSError):
            return os.isatty(self._descriptor)
        return False

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.lost > self._told and self._put(f"penstock: warning: {self.lost - self._told} lines were lost here\n"):
            self._told = self.lost
        if not self._put(text):
            self.lost += max(1, text.count("\n")) if text.strip() else 0
        return len(text)

    def _put(self, text: str) -> bool:
        data = memoryview(text.encode("utf-8", "backslashreplace"))
        try:
            ready = select.poll()
            ready.register(self._descriptor, select.POLLOUT)
            while data:
                if not ready.poll(0):
                    return False
                data = data[os.write(self._descriptor, data[:PIECE]) :]
        except (OSError, ValueError):
            return False
        return True


@contextlib.contextmanager
def never_in_the_way() -> Iterator[None]:
    """Within it, what this process prints cannot hold it up or end it. Only streams that are the process's own are
    replaced, not those of a test or a notebook."""
    # A descriptor that was closed before the start would be the next file's, and a message would end up in that.
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            else:
                os.set_inheritable(descriptor, True)
    before = sys.stdout, sys.stderr
    try:
        if _is_own(sys.stdout, 1):
            sys.stdout = Outlet(1)
        if _is_own(sys.stderr, 2):
            sys.stderr = Outlet(2)
        yield
    finally:
        sys.stdout, sys.stderr = before


def _is_own(stream: Any, descriptor: int) -> bool:
    if stream is None:
        return True
    if all(stream is not own for own in (sys.__stdout__, sys.__stderr__)):
        return False
    try:
        with contextlib.suppress(OSError):
            stream.flush()
        return bool(stream.fileno() == descriptor)
    except (OSError, ValueError):
        return False
