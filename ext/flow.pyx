"""Admission and queues (hot path): what is done at once, what waits, what is refused, what runs on native threads.

A request whose cost is small runs at once, on the loop. One that costs more waits in the loop's queue, which is worked
off in slices, so that reading, refusing and health checks go on meanwhile; one beyond POOL_NS waits for a thread of the
pool. Nothing waits for a timer. What must stay true: a request that was admitted is begun or refused exactly once; a
deadline is looked at when a request comes and when it is taken; a queue holds at most its rows.
"""

cimport cython
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport errno
from libc.stdint cimport int64_t
from libc.string cimport memset

import os
import traceback

cdef extern from "http_head.h" nogil:
    int64_t ps_http_now()

cdef enum:
    MEAN_SHIFT = 3            # the running means move by an eighth

cdef int64_t INLINE_NS = 50000        # a request that costs less is done at once
cdef int64_t POOL_NS = 1000000        # a request that costs more goes to the pool, where its models may
cdef int64_t FIRST_NS = 20000         # what a row is taken to cost before one was seen
cdef int64_t FAR = 4611686018427387904

WAITS = (50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 100e-3, 200e-3, 500e-3, 1.0, 5.0)
cdef int64_t BOUNDS[N_WAITS]
for _i, _b in enumerate(WAITS):
    BOUNDS[_i] = <int64_t>round(_b * 1e9)
BOUNDS[N_WAITS - 1] = FAR


@cython.final
cdef class Lane:
    """Limits and counters of one pipeline, event type or model.

    max_rows: rows that may wait. default_timeout: seconds a request may take where it says nothing (0: no limit);
    max_timeout: the most it may ask for (0: no limit). row_ns: what a row is taken to cost at first.
    """

    def __init__(self, str name, *, int64_t max_rows=4096, double default_timeout=0.0, double max_timeout=0.0,
                 int64_t row_ns=0, bint may_pool=False):
        self.name = name
        self.max_rows = max_rows
        self.default_timeout = <int64_t>(default_timeout * 1e9)
        self.max_timeout = <int64_t>(max_timeout * 1e9)
        self.row_ns = row_ns if row_ns > 0 else FIRST_NS
        self.least_ns = 0
        self.row_bytes = 128
        self.may_pool = may_pool

    def seed(self, int64_t row_ns):
        """Begin the running mean anew: another model answers from now on."""
        self.row_ns = max(1, row_ns)
        self.least_ns = self.row_ns

    cdef void observe(self, int64_t rows, int64_t ns) noexcept:
        """What some rows cost. One that the machine held up moves the mean to no more than its triple."""
        cdef int64_t each
        if rows <= 0:
            return
        each = ns // rows
        if each > 16 * self.row_ns + 8000:
            each = 16 * self.row_ns + 8000
        self.row_ns += (each - self.row_ns) >> MEAN_SHIFT
        if self.row_ns < 1:
            self.row_ns = 1

    cdef int64_t cost(self, int64_t rows) noexcept:
        cdef int64_t all = self.row_ns * rows
        return all if all > self.least_ns else self.least_ns

    cdef bint on_pool(self, int64_t rows, bint whole) noexcept:
        """Whether a request goes to the pool: a row of it takes long, or all of it where it is one call."""
        return self.may_pool and self.cost(rows if whole else 1) > POOL_NS

    def counters(self):
        """The lane's counts as a dict; "waits" are the counts per bound of WAITS and above."""
        cdef int i
        return {
            "admitted": self.admitted, "queued": self.queued, "refused_full": self.refused_full,
            "refused_late": self.refused_late, "dropped_late": self.dropped_late, "waiting": self.waiting,
            "row_seconds": self.row_ns / 1e9, "waited_seconds": self.waited_ns / 1e9,
            "waits": [self.waits[i] for i in range(<int>N_WAITS)],
        }


@cython.no_gc
cdef class Work:
    cdef int begin(self) except -1:
        raise NotImplementedError

    cdef int finish(self) except -1:
        raise NotImplementedError

    cdef int refuse(self, int why) except -1:
        raise NotImplementedError

    cdef int fault(self) except -1:
        """It raised where nothing should: give up its connection."""
        return 0


@cython.final
cdef class Queue:
    """Linked by Work.next: what waits is no garbage collector's business."""

    def __cinit__(self):
        self.heads = [None] * N_PRIORITIES
        self.tails = [None] * N_PRIORITIES
        memset(&self.sums, 0, sizeof(Sums))

    cdef int push(self, Work work) except -1:
        cdef object tail = self.tails[work.priority]
        if tail is None:
            self.heads[work.priority] = work
        else:
            (<Work>tail).next = work
        self.tails[work.priority] = work
        work.next = None
        self.sums.cost[work.priority] += work.cost
        return 0

    cdef int push_front(self, Work work) except -1:
        work.next = <Work>self.heads[work.priority]
        self.heads[work.priority] = work
        if work.next is None:
            self.tails[work.priority] = work
        self.sums.cost[work.priority] += work.cost
        return 0

    cdef Work pop(self):
        """The next by priority, then arrival; None where nothing waits."""
        cdef int i
        cdef Work work
        for i in range(<int>N_PRIORITIES):
            if self.heads[i] is not None:
                work = <Work>self.heads[i]
                self.heads[i] = work.next
                if work.next is None:
                    self.tails[i] = None
                work.next = None
                self.sums.cost[i] -= work.cost
                return work
        return None

    cdef int64_t before(self, int priority) noexcept:
        """What is served before a newcomer of this priority, ns."""
        cdef int i
        cdef int64_t sum = 0
        for i in range(priority + 1):
            sum += self.sums.cost[i]
        return sum


@cython.final
cdef class Flow:
    """The queues of one loop. threads: of the pool. slice_s: how long the queue is worked off before the loop reads again."""

    def __init__(self, int threads=2, double slice_s=1e-3):
        self.short = Queue()
        self.long = Queue()
        self.slice_ns = <int64_t>(slice_s * 1e9)
        self.n_threads = max(1, threads)

    def start(self, loop):
        """Begin to work on this loop. Raises OSError where no thread can be had."""
        self.loop = loop
        self.call_soon = loop.call_soon
        if self.pool == NULL:
            self.pool = ps_pool_open(self.n_threads)
            if self.pool == NULL:
                raise OSError(errno, f"no threads for the pool: {os.strerror(errno)}")
            loop.add_reader(ps_pool_descriptor(self.pool), self.collect)

    def stop(self):
        """Wait for the pool's threads and give back what they finished."""
        if self.pool == NULL:
            return
        self.loop.remove_reader(ps_pool_descriptor(self.pool))
        while self.running:
            self.collect()
            if self.running:
                with nogil:
                    ps_flow_pause()
        ps_pool_close(self.pool)
        self.pool = NULL
        while self.long.pop() is not None or self.short.pop() is not None:
            pass                                       # one by one: a chain of them would be let go recursively

    def __dealloc__(self):
        if self.pool != NULL:
            with nogil:
                ps_pool_close(self.pool)

    @property
    def idle(self):
        """Whether nothing waits and nothing runs."""
        return not self.running and self.short.before(N_PRIORITIES - 1) == 0 and self.long.before(N_PRIORITIES - 1) == 0

    @property
    def queued_seconds(self):
        """Estimated work that waits: (on the loop, for the pool)."""
        return self.short.before(N_PRIORITIES - 1) / 1e9, self.long.before(N_PRIORITIES - 1) / 1e9

    cdef int admit(self, Lane lane, int64_t rows, int64_t now, int64_t arrival, int64_t timeout_us, int priority,
                   int64_t *deadline, bint whole) except -1:
        """INLINE, QUEUE, FULL or LATE for a request of some rows; deadline is the time it must be answered by.

        timeout_us: what the request asks for, 0: nothing, and then the lane's default holds. It may only shorten the
        lane's maximum (where there is none, the default). whole: it is one native call that cannot be cut.
        """
        cdef int64_t cost = lane.cost(rows)
        cdef int64_t timeout = lane.default_timeout
        cdef int64_t most = lane.max_timeout if lane.max_timeout else lane.default_timeout
        cdef int64_t wait
        cdef bint pool
        if timeout_us > 0:
            timeout = timeout_us * 1000 if timeout_us < FAR // 1000 else FAR // 2
        if most and (timeout == 0 or timeout > most):
            timeout = most
        deadline[0] = arrival + timeout if timeout else FAR
        if cost <= INLINE_NS and lane.waiting == 0:
            if now > deadline[0]:
                lane.refused_late += 1
                return LATE
            lane.admitted += 1
            return INLINE
        if self.call_soon is None:
            lane.admitted += 1
            return INLINE                              # no loop: an engine in a test
        if lane.waiting + rows > lane.max_rows and lane.waiting:
            lane.refused_full += 1
            return FULL
        pool = lane.on_pool(rows, whole)
        if timeout:
            priority = DEFAULT_PRIORITY if priority <= 0 else min(priority, N_PRIORITIES - 1)
            if pool:
                wait = self.long.before(priority) // self.n_threads
                if self.running >= self.n_threads:
                    wait += cost // 2
            else:
                wait = self.short.before(priority)
            # A quarter is left for what the estimate does not see: its own error, the kernel, the way back.
            if now + wait + cost > deadline[0] - timeout // 4:
                if wait == 0 and lane.pooled == 0:
                    # Only the estimate speaks against it, and it learns nothing from what is refused: it fades, until
                    # one is let through that shows what a row costs now.
                    lane.row_ns -= (lane.row_ns >> 6) + (lane.row_ns > 1)
                lane.refused_late += 1
                return LATE
        lane.admitted += 1
        return QUEUE

    cdef int submit(self, Work work) except -1:
        """Queue an admitted request; lane, rows, arrival, deadline and priority are set."""
        work.priority = DEFAULT_PRIORITY if work.priority <= 0 else min(work.priority, N_PRIORITIES - 1)
        work.cost = max(<int64_t>1, work.lane.cost(work.rows))   # never 0: the sums say whether anything waits
        work.lane.waiting += work.rows
        work.lane.queued += 1
        work.pooled = work.lane.on_pool(work.rows, work.whole)
        if work.pooled:
            self.long.push(work)
            self.fill_pool()
        else:
            self.short.push(work)
            self.call_slice()
        return 0

    cdef bint taken(self, Work work, int64_t now) except -1:
        """A request's wait is over: count it. False where its time has run out; then it has been refused."""
        cdef int i = 0
        cdef int64_t waited = now - work.arrival
        work.begun = True
        work.lane.waiting -= work.rows
        while waited > BOUNDS[i]:
            i += 1
        work.lane.waits[i] += 1
        work.lane.waited_ns += waited
        # A tenth is left for what is not seen here: how long it lay unread, and its way back.
        if now + min(work.lane.cost(work.rows), POOL_NS) > work.deadline - (work.deadline - work.arrival) // 10:
            work.lane.dropped_late += 1
            work.refuse(LATE)
            return False
        return True

    cdef int take(self, Work work, int64_t now) except -1:
        """Begin a request, or drop it where its time has run out. Returns its progress."""
        cdef int got
        if not work.begun and not self.taken(work, now):
            return DONE
        got = work.begin()
        if got == NATIVE:
            if self.pool == NULL:
                work.job.call(work.job.arg)
                work.finish()
                return DONE
            self.to_pool(work)
        return got

    cdef Work next_like(self, Work first, int64_t now):
        """What stands next in the loop's queue, where it may be done together with `first`; else None."""
        cdef Work work
        while first.like and self.short.heads[first.priority] is not None:
            work = <Work>self.short.heads[first.priority]
            if work.lane is not first.lane or work.like != first.like or work.begun:
                return None
            work = self.short.pop()
            if self.taken(work, now):
                return work
        return None

    def run_slice(self):
        """Work the loop's queue off for one slice, then let the loop read."""
        cdef int64_t now = ps_http_now()
        cdef int64_t until = now + self.slice_ns
        cdef int64_t began
        cdef Work work
        cdef int got
        self.scheduled = False
        self.slices += 1
        try:
            while True:
                work = self.short.pop()
                if work is None:
                    return
                began = now
                got = self.guarded(work, now)
                now = ps_http_now()
                if got == MORE:
                    work.cost = max(1, work.cost - (now - began))
                    self.short.push_front(work)
                if now >= until:
                    return
        finally:
            if not self.scheduled and self.short.before(N_PRIORITIES - 1) > 0:
                self.scheduled = True
                self.call_soon(self.run_slice)

    cdef int to_pool(self, Work work) except -1:
        self.running += 1
        work.lane.pooled += 1
        Py_INCREF(work)
        work.job.owner = <void *>work
        ps_pool_submit(self.pool, &work.job)
        return 0

    cdef int fill_pool(self) except -1:
        """Begin what waits for the pool while it has a free thread."""
        cdef Work work
        cdef int got
        if self.filling:
            return 0                                   # whoever is at it below finds what was added
        self.filling = True
        while self.running < self.n_threads:
            work = self.long.pop()
            if work is None:
                break
            got = self.guarded(work, ps_http_now())
            if got == MORE:                            # the loop's own part of it, in slices; then run_slice hands it on
                self.short.push(work)
                self.call_slice()
        self.filling = False
        return 0

    cdef int guarded(self, Work work, int64_t now) noexcept:
        """take(), whose faults are the work's own: the others go on."""
        try:
            return self.take(work, now)
        except Exception:
            traceback.print_exc()
        try:
            work.fault()
        except Exception:
            traceback.print_exc()
        return DONE

    cdef int again(self, Work work) except -1:
        """A request that the pool has run a part of: its next part, behind what waits there."""
        work.cost = max(<int64_t>1, work.lane.cost(work.rows))
        self.long.push(work)
        return 0

    cdef int call_slice(self) except -1:
        if not self.scheduled:
            self.scheduled = True
            self.call_soon(self.run_slice)
        return 0

    def collect(self):
        """What the pool has finished (the loop calls it)."""
        cdef ps_job *job
        cdef ps_job *next
        cdef Work work
        if self.pool == NULL:
            return
        job = ps_pool_collect(self.pool)
        while job != NULL:
            next = job.next
            work = <Work>job.owner
            Py_DECREF(work)
            self.running -= 1
            work.lane.pooled -= 1
            work.lane.observe(work.rows, job.took_ns)
            try:
                work.finish()
            except Exception:
                traceback.print_exc()
                work.fault()
            job = next
        self.fill_pool()


cdef extern from "time.h" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int nanosleep(const timespec *, timespec *)

cdef void ps_flow_pause() noexcept nogil:
    cdef timespec t
    t.tv_sec = 0
    t.tv_nsec = 200000
    nanosleep(&t, NULL)
