# flow.pxd: admission, the loop's queue, and the native pool. See flow.pyx.

from libc.stdint cimport int64_t, uint64_t


cdef extern from "pool.h" nogil:
    ctypedef struct ps_job:
        void (*call)(void *arg) noexcept
        void *arg
        void *owner
        int64_t took_ns
        ps_job *next
    ctypedef struct ps_pool:
        pass
    ps_pool *ps_pool_open(int threads)
    void ps_pool_close(ps_pool *pool)
    int ps_pool_descriptor(const ps_pool *pool)
    void ps_pool_submit(ps_pool *pool, ps_job *job)
    ps_job *ps_pool_collect(ps_pool *pool)

cdef enum Admission:
    INLINE = 0                # do it now, on the loop
    QUEUE = 1                 # make a Work and submit it
    FULL = 2                  # refuse: the lane's queue is full
    LATE = 3                  # refuse: it could not be done by its deadline

cdef enum Progress:
    DONE = 0
    MORE = 1                  # call begin() again, after others have had their turn
    NATIVE = 2                # job.call(job.arg) is to run on the pool, then finish() on the loop

cdef enum:
    N_PRIORITIES = 8          # 1 is served first, 7 last; 0 in a request is the default
    DEFAULT_PRIORITY = 4
    N_WAITS = 16              # buckets of the queue time

ctypedef void (*native_call)(void *arg) noexcept nogil


cdef class Lane:
    """One pipeline, event type or model: what its rows cost, what it may queue, what became of its requests."""
    cdef:
        readonly str name
        readonly int64_t row_ns           # running mean of what a row costs
        readonly int64_t least_ns         # what a request costs at the least, however many rows share it
        readonly int64_t row_bytes        # running mean of a row's bytes in a body
        public bint may_pool              # its models may run on the pool
        readonly int64_t max_rows         # rows that may wait
        readonly int64_t default_timeout  # ns
        readonly int64_t max_timeout
        readonly int64_t waiting          # rows that wait now
        readonly int64_t pooled           # requests on the pool now
        readonly uint64_t admitted        # requests, done at once or queued
        readonly uint64_t queued          # requests that waited
        readonly uint64_t refused_full    # requests
        readonly uint64_t refused_late    # when they came
        readonly uint64_t dropped_late    # when they were taken
        uint64_t waits[N_WAITS]           # histogram of the time in the queue
        readonly int64_t waited_ns

    cdef void observe(self, int64_t rows, int64_t ns) noexcept
    cdef int64_t cost(self, int64_t rows) noexcept
    cdef bint on_pool(self, int64_t rows, bint whole) noexcept


cdef class Work:
    """One request that waits, or runs on the pool. http.pyx and resp.pyx say what it does."""
    cdef:
        Lane lane
        Work next
        ps_job job                # NATIVE: call and arg
        int64_t rows
        int64_t arrival           # ns, monotonic
        int64_t deadline
        int64_t cost              # estimate that stands in the flow's sum
        int64_t like              # those with the same number may be done together; 0: none
        int priority
        bint begun
        bint pooled
        bint whole                # one native call that cannot be cut: all its rows count at once

    cdef int begin(self) except -1
    cdef int finish(self) except -1
    cdef int refuse(self, int why) except -1
    cdef int fault(self) except -1


# What waits, by priority; within one, in order of arrival.
ctypedef struct Sums:
    int64_t cost[8]
    int64_t total


cdef class Queue:
    cdef:
        list heads
        list tails
        Sums sums

    cdef int push(self, Work work) except -1
    cdef int push_front(self, Work work) except -1
    cdef Work pop(self)
    cdef int64_t before(self, int priority) noexcept


cdef class Flow:
    cdef:
        Queue short               # done in slices on the loop
        Queue long                # waits for a thread of the pool
        readonly int64_t slice_ns
        readonly int n_threads
        readonly int running      # threads of the pool that work
        ps_pool *pool
        object loop
        object call_soon
        bint scheduled
        bint filling
        readonly uint64_t slices

    cdef int admit(self, Lane lane, int64_t rows, int64_t now, int64_t arrival, int64_t timeout_us, int priority,
                   int64_t *deadline, bint whole) except -1
    cdef int submit(self, Work work) except -1
    cdef int fill_pool(self) except -1
    cdef int guarded(self, Work work, int64_t now) noexcept
    cdef int again(self, Work work) except -1
    cdef int call_slice(self) except -1
    cdef bint taken(self, Work work, int64_t now) except -1
    cdef int take(self, Work work, int64_t now) except -1
    cdef Work next_like(self, Work first, int64_t now)
    cdef int to_pool(self, Work work) except -1
