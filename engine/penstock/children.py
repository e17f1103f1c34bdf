"""Child processes of a server (control path): a child ends with its parent, however the parent ends.

The kernel ends it (PR_SET_PDEATHSIG) where the thread that starts it lives as long as its process, which only the main
thread does; every child also looks for its parent now and then. What must stay true: a parent that died before the
child could ask the kernel is noticed at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading

__all__ = ["end_with_parent", "parent_arguments", "parent_lives"]

PR_SET_PDEATHSIG = 1


def parent_arguments() -> list[str]:
    """What to tell a child on its command line: who its parent is, and whether the kernel may end it with the thread
    that starts it."""
    found = ["--parent", str(os.getpid())]
    return [*found, "--parent-thread-lasts"] if threading.current_thread() is threading.main_thread() else found


def end_with_parent(parent: int, thread_lasts: bool) -> None:
    """In the child, first of all: it is killed when its parent ends. Raises SystemExit where that has happened."""
    if thread_lasts:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if not parent_lives(parent):
        raise SystemExit(1)


def parent_lives(parent: int) -> bool:
    """Whether the parent that a child was told of is still its parent."""
    return os.getppid() == parent
