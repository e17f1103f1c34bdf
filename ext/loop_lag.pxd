# loop_lag.pxd: how late the loop serves what is ready. See loop_lag.pyx.

from libc.stdint cimport int64_t, uint64_t

cdef enum:
    N_LAGS = 12


cdef class LoopLag:
    cdef:
        readonly int64_t period_ns
        int64_t due               # of the next expiry of the timer
        int fd
        object loop
        object also
        uint64_t buckets[N_LAGS]
        uint64_t held[N_LAGS]     # the same less the wait for a processor
        readonly int64_t held_ns
        int schedstat
        int64_t waited            # for a processor, up to the last tick
        readonly uint64_t ticks
        readonly int64_t total_ns
        readonly int64_t longest_ns

    cdef int64_t processor_wait(self) noexcept nogil
