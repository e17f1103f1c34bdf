# flow.pxd: admission, the loop's queue, and the native pool. See flow.pyx.

from libc.stdint cimport int64_t, uint32_t, uint64_t


cdef enum Admission:
    INLINE = 0                # do it now, on the loop
    QUEUE = 1                 # make a Work and submit it
    FULL = 2                  # refuse: the lane's queue is full
    LATE = 3                  # refuse: it could not be done by its deadline

cdef enum Progress:
    DONE = 0
    MORE = 1                  # call begin() again, after others have had their turn
    NATIVE = 2                # native(arg) is to run on the pool, then finish() on the loop

cdef enum:
    N_PRIORITIES = 8          # 0 is served first; clients say 1 (highest) to 7, and 0 for the default
    DEFAULT_PRIORITY = 4
    N_WAITS = 16

ctypedef void (*native_call)(void *arg) noexcept nogil


cdef class Lane:
    """One pipeline, event type or model: what its rows cost, what it may queue, what became of its requests."""
    cdef:
        readonly str name
        readonly int64_t row_ns           # running mean of what a row costs on the loop
        readonly int64_t native_ns        # of it, or instead of it, what may run on the pool; 0: nothing may
        readonly int64_t max_rows         # rows that may wait
        readonly int64_t default_timeout  # ns
        readonly int64_t max_timeout
        readonly int64_t waiting          # rows that wait now
        readonly int64_t pooled           # rows on the pool or waiting for it
        readonly uint64_t admitted        # rows, since start
        readonly uint64_t queued
        readonly uint64_t refused_full    # requests
        readonly uint64_t refused_late    # when they came
        readonly uint64_t dropped_late    # when they were taken
        uint64_t waits[N_WAITS]           # histogram of the time in the queue
        int64_t waited_ns

    cdef void observe(self, int64_t rows, int64_t ns) noexcept


cdef class Work:
    """One request that waits, or runs on the pool. http.pyx and resp.pyx say what it does."""
    cdef:
        Lane lane
        Work next
        int64_t rows
        int64_t arrival           # ns, monotonic
        int64_t deadline
        int64_t cost              # estimate that stands in the flow's sum
        int priority
        native_call native
        void *arg

    cdef int begin(self) except -1
    cdef int finish(self) except -1
    cdef int refuse(self, int why) except -1


cdef class Flow:
    cdef:
        Work heads[N_PRIORITIES]
        Work tails[N_PRIORITIES]
        int64_t queued_ns[N_PRIORITIES]   # estimated cost of what waits
        readonly int64_t slice_ns
        readonly int n_threads
        void *pool
        dict running                      # what is on the pool, by address: keeps it alive
        object loop
        object call_soon
        bint scheduled
        readonly uint64_t slices
        readonly int64_t longest_slice

    cdef int admit(self, Lane lane, int64_t rows, int64_t now, int64_t timeout_us, int priority,
                   int64_t *deadline) except -1
    cdef int submit(self, Work work) except -1
    cdef int run_slice(self) except -1
    cdef int to_pool(self, Work work) except -1
