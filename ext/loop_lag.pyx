"""How late the loop serves what is ready (hot path, a few hundred times a second).

A kernel timer expires every few milliseconds at times that do not depend on the loop; the loop reads it like a socket.
Lateness is what a request would have waited that arrived at that moment. The loop's own timers would not do: they count
in milliseconds. Two histograms: the lateness, and what is left of it without the time that the thread could have run and
found no processor since the last tick (the kernel's run_delay): the least that the loop itself was held. What must stay
true: every expiry is counted once, also those that one long hold swallowed, each with its own lateness; a tick leaves no
Python object behind.
"""

from libc.errno cimport EAGAIN, errno
from libc.stdint cimport int64_t, uint64_t

import os

cdef extern from "http_head.h" nogil:
    int64_t ps_http_now()

cdef extern from "time.h" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    struct itimerspec:
        timespec it_interval
        timespec it_value
    int CLOCK_MONOTONIC

cdef extern from "sys/timerfd.h" nogil:
    int timerfd_create(int clock, int flags)
    int timerfd_settime(int fd, int flags, const itimerspec *new, itimerspec *old)
    int TFD_NONBLOCK
    int TFD_CLOEXEC
    int TFD_TIMER_ABSTIME

cdef extern from "fcntl.h" nogil:
    int open(const char *path, int flags)
    int O_RDONLY
    int O_CLOEXEC

cdef extern from "unistd.h" nogil:
    ssize_t read(int fd, void *buffer, size_t n)
    ssize_t pread(int fd, void *buffer, size_t n, long offset)
    int close(int fd)

LAGS = (50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 100e-3)
cdef int64_t BOUNDS[N_LAGS]
for _i, _b in enumerate(LAGS):
    BOUNDS[_i] = <int64_t>round(_b * 1e9)


cdef class LoopLag:
    """period: seconds between expiries."""

    def __init__(self, double period=0.005):
        if not 1e-4 <= period <= 10:
            raise ValueError(f"period: expected 0.0001 to 10 seconds, got {period!r}")
        self.period_ns = <int64_t>round(period * 1e9)
        self.fd = -1
        self.schedstat = -1

    def __cinit__(self):
        self.fd = -1
        self.schedstat = -1

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)
        if self.schedstat >= 0:
            close(self.schedstat)

    def start(self, loop, also=None):
        """Tick on this loop, whose thread this is, from now on. `also()` runs after each tick and must be short."""
        cdef itimerspec when
        if self.fd >= 0:
            raise RuntimeError("LoopLag.start: runs already")
        self.fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)
        if self.fd < 0:
            raise OSError(errno, os.strerror(errno))
        self.due = ps_http_now() + self.period_ns
        when.it_value.tv_sec = self.due // 1000000000
        when.it_value.tv_nsec = self.due % 1000000000
        when.it_interval.tv_sec = self.period_ns // 1000000000
        when.it_interval.tv_nsec = self.period_ns % 1000000000
        if timerfd_settime(self.fd, TFD_TIMER_ABSTIME, &when, NULL) != 0:
            raise OSError(errno, os.strerror(errno))
        self.schedstat = open(b"/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC)
        self.waited = self.processor_wait()
        self.loop = loop
        self.also = also
        loop.add_reader(self.fd, self.tick)

    def stop(self):
        """Tick no more; the counts stay."""
        if self.fd >= 0:
            self.loop.remove_reader(self.fd)
            close(self.fd)
            self.fd = -1
        if self.schedstat >= 0:
            close(self.schedstat)
            self.schedstat = -1
        self.loop = None
        self.also = None

    cdef int64_t processor_wait(self) noexcept nogil:
        """ns that this thread could have run and did not, since it began; 0 where the kernel does not say."""
        cdef char text[96]
        cdef int64_t value = 0
        cdef ssize_t n, i = 0
        if self.schedstat < 0:
            return 0
        n = pread(self.schedstat, text, sizeof(text), 0)
        while i < n and text[i] != 32:
            i += 1
        i += 1
        while i < n and 48 <= text[i] <= 57:
            value = 10 * value + text[i] - 48
            i += 1
        return value

    def tick(self):
        """Count the expiries since the last call (the loop calls it)."""
        cdef uint64_t expired = 0
        cdef int64_t now, late, held, waited
        cdef int i
        if read(self.fd, &expired, sizeof(expired)) != sizeof(expired):
            if errno == EAGAIN:
                return
            raise OSError(errno, os.strerror(errno))
        now = ps_http_now()
        waited = self.processor_wait()
        while expired:
            expired -= 1
            late = max(0, now - self.due)
            self.due += self.period_ns
            i = 0
            while i < N_LAGS - 1 and late > BOUNDS[i]:
                i += 1
            self.buckets[i] += 1
            self.ticks += 1
            self.total_ns += late
            if late > self.longest_ns:
                self.longest_ns = late
            held = max(0, late - (waited - self.waited))
            i = 0
            while i < N_LAGS - 1 and held > BOUNDS[i]:
                i += 1
            self.held[i] += 1
            self.held_ns += held
        self.waited = waited
        if self.also is not None:
            self.also()

    def counters(self):
        """Counts per bound of LAGS and above."""
        return [self.buckets[i] for i in range(N_LAGS)]

    def held_counters(self):
        """The same of the lateness less the wait for a processor."""
        return [self.held[i] for i in range(N_LAGS)]
