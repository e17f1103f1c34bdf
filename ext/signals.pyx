"""Signals that stop a server (control path): the first wakes its loop, the second ends the process where it stands.

The handler is native: the second signal ends a process whose loop is held up in native code, and one that is the first
of its container, whose default handlers do nothing. What must stay true: a forked child never stops its parent.
"""

from libc.errno cimport errno
from libc.signal cimport sighandler_t, signal
from posix.types cimport pid_t
from posix.unistd cimport _exit, getpid, write

cdef pid_t owner = 0
cdef int wake = -1
cdef int seen = 0


cdef void arrived(int number) noexcept nogil:
    global seen
    cdef char one = 1
    cdef int before = errno
    if seen or getpid() != owner:
        _exit(128 + number)
    seen = 1
    if wake < 0 or write(wake, &one, 1) != 1:
        _exit(128 + number)
    (&errno)[0] = before


def stop_on(numbers, int descriptor):
    """From now on the first of these signals writes a byte to a descriptor that does not block; one after it ends the
    process with 128 + its number. A descriptor of -1: the first one ends it."""
    global owner, wake, seen
    cdef int number
    owner = getpid()
    wake = descriptor
    seen = 0
    for number in numbers:
        signal(number, <sighandler_t>arrived)
