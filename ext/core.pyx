"""The engine core (hot path): one event in, one decision out, in one native call.

What must stay true: scoring a table (batch.pyx) gives the same bits as scoring its rows one by one, because both run
the steps below, in the same order, on the same rows; and a refused event has changed nothing.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.long cimport PyLong_CheckExact
from cpython.object cimport PyObject
from cpython.pythread cimport PyThread_get_thread_ident
from cpython.unicode cimport PyUnicode_CheckExact, PyUnicode_DATA, PyUnicode_GET_LENGTH
from libc.math cimport NAN, isnan
from libc.stdint cimport int16_t, int64_t, int8_t, uint16_t, uint32_t, uint64_t, uint8_t
from libc.stdlib cimport free
from libc.string cimport memchr, memcpy, memset

import os
import weakref

from penstock.errors import EngineError, EventError, InProgress, LogError, ReplayNeeded, ScoringError

from penstock._ext.decision cimport (
    OUTCOME_APPLIED, OUTCOME_DUPLICATE, OUTCOME_LATE, OUTCOME_OFF, OUTCOME_QUARANTINED, N_OUTCOMES, slot_value,
)
from penstock._ext.event_record cimport (
    PS_RECORD_EVENT, PS_RECORD_SCORE, ps_pad8, ps_record, ps_record_fixed, ps_score,
)
from penstock._ext.log cimport EventLog
from penstock._ext.row cimport (
    PS_AGED, PS_BOOL, PS_FLOAT64, PS_INT64, PS_INVALID, PS_NULL_VALUE, PS_OUTSIDE_MAX_AGE, PS_PRESENT, PS_STR_LENGTH,
    PS_STR, PS_STR_OFFSET, PS_STRING, PS_WIDE,
)
from penstock._ext.events cimport EventReader, ps_arena_append
from penstock._ext.steps cimport (
    Function, KeyRef, LOG_REFUSED, MAX_ARGUMENTS, MAX_ARMS, MAX_COLUMNS, MAX_STORES, ModelRun, OUT_OF_MEMORY, Pipe, PipeC, Read,
    RowKeys, Rows, Source, SourceC, UNSCORED, Use, checked,
)
from penstock._ext.windows cimport WindowStore, ps_key, ps_store, ps_store_api, ps_store_stats

from penstock._ext.decision import OUTCOMES, STATUSES
from penstock._ext.events import TYPE_CODES

cdef extern from "Python.h":
    bint PyUnicode_IS_COMPACT_ASCII(PyObject *text)
    long long PyLong_AsLongLongAndOverflow(object value, int *overflow) except? -1

cdef extern from "pthread.h" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *, void *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_trylock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)

cdef extern from "time.h" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(int, timespec *)
    int CLOCK_REALTIME

cdef enum:
    AHEAD = 4                 # events of a block whose entities are on their way to the cache
    AHEAD_KEYS = 4            # keys of an event that are fetched ahead
    SWEEP_EVERY = 64          # applied events between two sweeps,
    SWEEP_CREATED = 16        # or new entities
    SWEEP_ENTITIES = 4        # released per sweep at the most, beside twice the new ones

_cores = weakref.WeakSet()
cdef dict _held = {}          # forking thread -> the engines that it holds; two threads may fork at once


def _before_fork():
    held = _held[PyThread_get_thread_ident()] = []
    for core in sorted(_cores, key=id):
        if core.hold():
            held.append(core)


def _after_fork_parent():
    for core in _held.pop(PyThread_get_thread_ident()):
        core.release()


def _after_fork_child():
    for core in _held.pop(PyThread_get_thread_ident()):
        core.release()
    _held.clear()
    for core in list(_cores):
        core.mark_forked()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_parent, after_in_child=_after_fork_child)


@cython.final
@cython.no_gc
cdef class Block:
    """Events of one pipeline between their start and their conclusion."""

    def __dealloc__(self):
        free(self.starts)
        free(self.which)
        if self.own_models:
            free(self.c.models)


cdef void run_models_of(Block block, Core core, Rows rows) noexcept nogil:
    core.run_models(&block.c, rows, block.which, block.n)


ctypedef void (*unheld_call)(void *block, void *core, void *rows) noexcept nogil
# A variable: called through a cast of its own name, the compiler may take the call for one that cannot be.
cdef unheld_call run_models_unheld = <unheld_call>run_models_of


cdef void run_block(void *arg) noexcept nogil:
    """The models of a block from begin_apart (its `parts`); any thread, and no object is counted on the way."""
    cdef BlockParts *parts = <BlockParts *>arg
    run_models_unheld(parts.block, parts.core, parts.rows)


cdef list by_time(list times):
    """The places of a call's events in order of time, equal times as they were given: what is sent together makes
    nothing of itself late."""
    cdef Py_ssize_t i
    cdef int64_t at, before = 0
    for i in range(len(times)):
        at = times[i]
        if i and at < before:
            return sorted(range(len(times)), key=times.__getitem__)
        before = at
    return list(range(len(times)))


cdef inline object id_under_way(Source source, object id):
    """How Core.under_way knows an event: two event types may use the same id."""
    if isinstance(id, tuple):
        id = id[0]                                     # of another pipeline's decision on it
    return id if source.index == 0 else (source.index, id)


cdef void fetch(Pipe pipe, int key, uint64_t hash, bint blob) noexcept nogil:
    """Fetch where a key's entity stands (or, when that is here, the entity) in every store that the pipeline uses."""
    cdef SourceC *source = &pipe.source.c
    cdef Read *read
    cdef int j
    for j in range(source.n_uses):
        if source.uses[j].key == key:
            if blob:
                source.uses[j].api.prefetch_blob(source.uses[j].store, hash)
            else:
                source.uses[j].api.prefetch(source.uses[j].store, hash)
    for j in range(pipe.c.n_reads):
        read = &pipe.c.reads[j]
        if read.use < 0 and read.key == key:
            if blob:
                read.api.prefetch_blob(read.store, hash)
            else:
                read.api.prefetch(read.store, hash)


cdef int look_ahead(Pipe pipe, list events, Py_ssize_t first, int n, uint64_t *hashes) noexcept:
    """Have the entities of some events fetched into the cache: to find one is to wait for memory twice, and these waits
    can be shared. hashes: AHEAD_KEYS for each event, 0 where nothing is known. Returns how many keys are looked at."""
    cdef EventReader reader = pipe.source.reader
    cdef SourceC *source = &pipe.source.c
    cdef int n_keys = min(pipe.c.n_keys, <int>AHEAD_KEYS)
    cdef int i, k
    cdef int overflow
    cdef PyObject *value
    cdef ps_key key
    cdef const ps_store_api *api
    cdef const ps_store *store
    if source.n_uses:
        api, store = source.uses[0].api, source.uses[0].store
    elif pipe.c.n_reads:
        api, store = pipe.c.reads[0].api, pipe.c.reads[0].store
    else:
        return 0
    for i in range(n):
        for k in range(n_keys):
            hashes[i * AHEAD_KEYS + k] = 0
        if type(events[first + i]) is not reader.wire_type:
            continue
        for k in range(n_keys):
            value = (<PyObject **>(<char *><PyObject *>events[first + i] + reader.wire_offsets[pipe.c.keys[k].slot]))[0]
            if value == NULL or pipe.c.keys[k].is_int != pipe.c.keys[k].to_int:
                continue
            if not pipe.c.keys[k].is_int:
                if not PyUnicode_CheckExact(<object>value) or not PyUnicode_IS_COMPACT_ASCII(value):
                    continue
                key.is_int = 0
                key.str = <const char *>PyUnicode_DATA(<object>value)
                key.len = <uint32_t>PyUnicode_GET_LENGTH(<object>value)
            else:
                if not PyLong_CheckExact(<object>value):
                    continue
                overflow = 0
                key.is_int = 1
                key.i = PyLong_AsLongLongAndOverflow(<object>value, &overflow)
                if overflow:
                    continue
            hashes[i * AHEAD_KEYS + k] = api.hash(store, &key) | <uint64_t>1 << 63     # the stores use the lower half
            fetch(pipe, k, hashes[i * AHEAD_KEYS + k], False)
    return n_keys


@cython.final
cdef class Core:
    """Everything that runs per event. Built by `penstock.engine`; calls may come from any thread, one runs at a time."""

    def __cinit__(self, list sources, list pipes, list stores, bytes constants, bint event_clock):
        self.mutex = checked(1, sizeof(pthread_mutex_t))
        pthread_mutex_init(<pthread_mutex_t *>self.mutex, NULL)
        if len({(<WindowStore>store).seed for store in stores}) > 1:
            raise ValueError("stores: expected one seed: a key is hashed once for all of them")
        self.sources = sources
        self.pipes = pipes
        self.stores = stores
        self.store_api = (<WindowStore>stores[0]).api if stores else NULL
        self.constants = constants
        self.event_clock = event_clock
        self.ids = IdSource()
        self.last_now = 0
        width, inputs, outputs = self._widths()
        self.single = Rows(1, width, inputs, outputs, constants)
        _cores.add(self)

    def __dealloc__(self):
        free(self.mutex)
        free(self.spare.data)

    def _widths(self):
        cdef Source source
        cdef Pipe pipe
        width = inputs = outputs = 1
        for source in self.sources:
            width = max(width, source.c.n_fields)
        for pipe in self.pipes:
            width = max(width, pipe.c.n_slots)
            i, o = pipe.widths
            inputs, outputs = max(inputs, i), max(outputs, o)
        return width, inputs, outputs

    # one call at a time

    cdef int enter(self) except -1:
        cdef unsigned long me = PyThread_get_thread_ident()
        if self.forked:
            raise EngineError("this engine was made before a fork; call Engine.reopen() in the child process first")
        if self.owner == me:
            raise EngineError("the engine was called from inside one of its own functions")
        if pthread_mutex_trylock(<pthread_mutex_t *>self.mutex) != 0:
            with nogil:
                pthread_mutex_lock(<pthread_mutex_t *>self.mutex)
        self.owner = me
        return 0

    cdef int leave(self) except -1:
        self.owner = 0
        pthread_mutex_unlock(<pthread_mutex_t *>self.mutex)
        return 0

    def hold(self):
        """Before a fork: wait until no call is inside. False where the call inside is this thread's own."""
        if self.owner == PyThread_get_thread_ident():
            return False
        with nogil:
            pthread_mutex_lock(<pthread_mutex_t *>self.mutex)
        return True

    def release(self):
        pthread_mutex_unlock(<pthread_mutex_t *>self.mutex)

    def mark_forked(self):
        self.forked = True

    def reopen(self):
        """In a child process: go on with the state as it was at the fork, as a node of its own."""
        self.forked = False
        self.ids = IdSource()
        self.log = None
        self.log_ptr = NULL
        self.log_closed = False

    # the event log

    def attach_log(self, EventLog log, list event_schemas, list score_schemas, double share):
        """From now on every accepted event is appended to a log, and of `share` of the keys every score.

        event_schemas, score_schemas: the number of each source's and each pipeline's schema in the log. With None the
        engine logs no more.
        """
        cdef Source source
        cdef Pipe pipe
        self.enter()
        try:
            for source, number in zip(self.sources, event_schemas):
                source.c.log_schema = number
            for pipe, number in zip(self.pipes, score_schemas):
                pipe.c.log_schema = number
            self.log = log
            self.log_ptr = NULL if log is None else log.ptr
            self.log_api = NULL if log is None else log.api
            self.log_id = 0 if log is None else log.log_id
            self.score_share = <uint64_t>(share * 4294967296.0)
            self.wait_here = log is not None and log.sync_us == 0
        finally:
            self.leave()

    def close_log(self):
        """Sync and close the log. From now on events are refused, reads go on."""
        self.enter()
        try:
            log = self.log
            if log is None or self.log_closed:
                return
            self.log_closed = True
            self.log_ptr = NULL
        finally:
            self.leave()
        log.close()

    def erase(self, list stores, list keys):
        """Forget entities: keys[i] in stores[i]. With a log, what is logged so far is then in closed segments.

        Returns how many were there. Raises LogError where no new segment can be begun; then nothing has changed.
        """
        cdef int found = 0
        self.enter()
        try:
            self.check_open()
            if self.log_ptr != NULL:
                self.log.begin()
            for store, key in zip(stores, keys):
                found += store.erase(key)
        finally:
            self.leave()
        return found

    cdef int check_open(self) except -1:
        if self.log_closed:
            raise LogError(f"{self.log.folder}: the event log is closed; the event was not ingested")
        return 0

    def leave_waiting_to_caller(self):
        """With `fsync always`: calls return before the sync, and the caller waits for it (the server does)."""
        self.wait_here = False

    def go_on_from(self, int64_t sequence, int64_t ingest_time, list watermarks):
        """After recovery: the next event's sequence, the newest ingest time, and each source's watermark (None: none)."""
        cdef Source source
        self.sequence = sequence
        self.last_now = max(self.last_now, ingest_time)
        cdef int i
        for source, watermark in zip(self.sources, watermarks):
            if watermark is not None and watermark > source.c.watermark:
                source.c.watermark = watermark
                for i in range(source.c.n_uses):     # also of a store that starts empty
                    source.c.uses[i].api.sweep(source.c.uses[i].store, watermark, 0)

    def reset_counters(self):
        """Counts since start begin now: recovery counts no outcomes."""
        cdef Source source
        for source in self.sources:
            memset(source.c.outcomes, 0, sizeof(source.c.outcomes))

    def take_ids(self, Core other):
        """Remember the event ids that another core of the same event types remembers."""
        cdef Source mine, its
        for mine, its in zip(self.sources, other.sources):
            mine.seen, mine.seen_before, mine.turned = its.seen, its.seen_before, its.turned

    @property
    def next_sequence(self):
        return self.sequence

    @property
    def last_ingest_time(self):
        return self.last_now

    @property
    def scores_not_logged(self):
        """Decisions that were answered but found no room in the log."""
        return self.scores_lost

    cdef int append_event(self, SourceC *source, PipeC *pipe, ps_slot *slots, uint8_t *status, ps_arena *arena,
                          RowKeys *keys, int outcome, bint applied, ps_handle *handles) noexcept nogil:
        """The event as accepted, with the versions that it gives. Everything that can fail afterwards has been reserved."""
        cdef uint32_t strings = 0
        cdef uint32_t fixed, bytes, size
        cdef int i, slot
        cdef ps_record *r
        cdef uint64_t *version
        cdef ps_slot *out
        cdef char *text
        for i in range(source.n_strings):
            if status[source.strings[i]] & 7 == PS_PRESENT:
                strings += PS_STR_LENGTH(slots[source.strings[i]].u)
        fixed = ps_record_fixed(0, source.n_uses if applied else 0, source.n_fields)
        bytes = fixed + ps_pad8(strings)
        r = self.log_api.reserve(self.log_ptr, bytes, pipe.score_room if pipe != NULL else 0)
        if r == NULL:
            return LOG_REFUSED
        r.kind = PS_RECORD_EVENT
        r.outcome = <uint8_t>outcome
        r.schema = <uint16_t>source.log_schema
        r.n_fields = <uint16_t>source.n_fields
        r.n_versions = <uint8_t>(source.n_uses if applied else 0)
        r.flags = 0
        r.sequence = self.sequence
        r.ingest_time = keys.ingest_time
        version = <uint64_t *>(r + 1)
        for i in range(r.n_versions):
            version[i] = source.uses[i].api.version(source.uses[i].store, handles[i]) + 1
        out = <ps_slot *>(version + r.n_versions)
        memcpy(out, slots, source.n_fields * sizeof(ps_slot))
        memcpy(out + source.n_fields, status, source.n_fields)
        memset(<char *>(out + source.n_fields) + source.n_fields, 0, ps_pad8(source.n_fields) - source.n_fields)
        text = <char *>r + fixed
        size = 0
        for i in range(source.n_strings):
            slot = source.strings[i]
            if status[slot] & 7 == PS_PRESENT:
                memcpy(text + size, arena.data + PS_STR_OFFSET(slots[slot].u), PS_STR_LENGTH(slots[slot].u))
                out[slot].u = PS_STR(size, PS_STR_LENGTH(slots[slot].u))
                size += PS_STR_LENGTH(slots[slot].u)
            else:
                out[slot].u = 0
        memset(text + size, 0, bytes - fixed - size)
        self.log_api.commit(self.log_ptr, r, bytes)
        return 0

    cdef void append_score(self, PipeC *pipe, ps_slot *slots, uint8_t *status, ps_arena *arena, RowKeys *keys,
                           const Verdict *verdict, const char *id, int64_t as_of) noexcept nogil:
        """The decision on an event that is in the log. Without room for it the decision stands; it is counted."""
        cdef uint32_t strings = 0
        cdef uint32_t fixed, bytes, size
        cdef int i, slot
        cdef ps_record *r
        cdef ps_score *score
        cdef uint64_t *version
        cdef ps_slot *out
        cdef uint8_t *out_status
        cdef char *text
        if keys.sequence < 0:
            return
        if not self.score_share >> 32 and pipe.n_keys and self.store_api != NULL:
            self.prepare_keys(pipe.keys, 1, slots, arena, keys)    # the arena may have moved since
            if self.store_api.partition(&keys.key[0]) >> 32 >= self.score_share:
                return
        for i in range(pipe.n_logged):
            slot = pipe.logged[i]
            if pipe.logged_string[i] and status[slot] & 7 == PS_PRESENT:
                strings += PS_STR_LENGTH(slots[slot].u)
        fixed = ps_record_fixed(1, pipe.n_reads, pipe.n_logged)
        bytes = fixed + ps_pad8(strings)
        r = self.log_api.reserve(self.log_ptr, bytes, 0)
        if r == NULL:
            self.scores_lost += 1
            return
        r.kind = PS_RECORD_SCORE
        r.outcome = verdict.outcome
        r.schema = <uint16_t>pipe.log_schema
        r.n_fields = <uint16_t>pipe.n_logged
        r.n_versions = <uint8_t>pipe.n_reads
        r.flags = 0
        r.sequence = keys.sequence
        r.ingest_time = keys.ingest_time
        score = <ps_score *>(r + 1)
        memset(score, 0, sizeof(ps_score))
        memcpy(&score.id[0], id, 26)
        score.action = verdict.action
        score.model = verdict.model
        score.failed = verdict.failed
        score.score = verdict.score
        score.fired = verdict.fired
        score.as_of = as_of
        memcpy(&score.arms[0], &verdict.arms[0], pipe.n_assigns)
        score.has_score = verdict.has_score
        score.outcome = verdict.outcome
        version = <uint64_t *>(score + 1)
        memcpy(version, keys.version, pipe.n_reads * 8)
        out = <ps_slot *>(version + pipe.n_reads)
        out_status = <uint8_t *>(out + pipe.n_logged)
        text = <char *>r + fixed
        size = 0
        for i in range(pipe.n_logged):
            slot = pipe.logged[i]
            out[i] = slots[slot]
            out_status[i] = status[slot]
            if pipe.logged_string[i]:
                out[i].u = 0
                if status[slot] & 7 == PS_PRESENT:
                    memcpy(text + size, arena.data + PS_STR_OFFSET(slots[slot].u), PS_STR_LENGTH(slots[slot].u))
                    out[i].u = PS_STR(size, PS_STR_LENGTH(slots[slot].u))
                    size += PS_STR_LENGTH(slots[slot].u)
        memset(out_status + pipe.n_logged, 0, ps_pad8(pipe.n_logged) - pipe.n_logged)
        memset(text + size, 0, bytes - fixed - size)
        self.log_api.commit(self.log_ptr, r, bytes)

    cdef object not_ingested(self, int code, str what):
        """The error for a code of advance() that left nothing changed."""
        if code == LOG_REFUSED:
            return LogError(f"{self.log.error_text()} ({what})")
        return EngineError(f"out of memory: {what}")

    cdef int wait_for_log(self) except -1:
        """With `fsync always`: until what was appended is on disk. Outside enter(), so that threads share a sync."""
        if self.wait_here and self.log is not None:
            self.log.wait()
        return 0

    cdef int64_t now(self) noexcept nogil:
        """The ingest clock: wall time in microseconds that never goes back."""
        cdef timespec t
        cdef int64_t us
        clock_gettime(CLOCK_REALTIME, &t)
        us = <int64_t>t.tv_sec * 1000000 + t.tv_nsec // 1000
        if us > self.last_now:
            self.last_now = us
        return self.last_now

    # the steps

    cdef int prepare_keys(self, const KeyRef *refs, int n, ps_slot *slots, ps_arena *arena, RowKeys *keys) noexcept nogil:
        """Each key as its entity's type. The pointers stay valid while the arena does not grow."""
        cdef int i, size
        cdef ps_key *key
        cdef const char *text
        for i in range(n):
            key = &keys.key[i]
            if refs[i].is_int:
                if refs[i].to_int:
                    key.is_int = 1
                    key.i = slots[refs[i].slot].i
                    key.str = NULL
                    key.len = 0
                else:
                    key.is_int = 0
                    key.str = keys.text[i]
                    key.len = decimal(slots[refs[i].slot].i, keys.text[i])
            else:
                text = arena.data + PS_STR_OFFSET(slots[refs[i].slot].u)
                size = PS_STR_LENGTH(slots[refs[i].slot].u)
                key.is_int = refs[i].to_int and parse_decimal(text, size, &key.i)
                key.str = text
                key.len = size
        return 0

    cdef int advance(self, SourceC *source, PipeC *pipe, void *pipe_object, ps_slot *slots, uint8_t *status, ps_arena *arena,
                     RowKeys *keys, int ingest, Verdict *verdict) noexcept nogil:
        """Judge the event, log it, read, apply, read again, then functions and assignment: all but models and rules.

        ingest: 1 to apply, 0 to evaluate only, -1 for an event that was ingested before but never decided on (a repeated
        id), -2 for one that is not to be counted as a decision again; 2 for one out of the log, whose outcome stands in
        the verdict. keys.ingest_time is the event's.
        Returns 0; OUT_OF_MEMORY or LOG_REFUSED and nothing has changed; or UNSCORED: memory ended in a read after the
        event was applied.
        """
        cdef ps_handle handles[MAX_STORES]
        cdef ps_event events[MAX_STORES]
        cdef ps_slot values[MAX_STORES * MAX_COLUMNS]
        cdef uint8_t statuses[MAX_STORES * MAX_COLUMNS]
        cdef int64_t at = slots[source.time].i
        cdef int i, j, k, used = 0
        cdef Use *use
        cdef bint apply = False
        cdef ps_slot *value
        cdef Function *function
        cdef char *base = arena.data
        cdef int64_t ingest_time = keys.ingest_time
        cdef bint logged = self.log_ptr != NULL and (ingest == 1 or ingest == -1)

        keys.sequence = self.sequence if logged else -1
        if pipe != NULL:
            verdict.counted = ingest == 1 or ingest == -1
            verdict.fired = 0
            verdict.model = -1
            verdict.failed = -1
            verdict.has_score = 0
            verdict.degraded = 0
            verdict.score = NAN
            verdict.action = pipe.default_action
        if ingest == 2:
            apply = verdict.outcome == OUTCOME_APPLIED
        elif ingest == 0:
            verdict.outcome = OUTCOME_OFF
        elif ingest < 0:
            verdict.outcome = OUTCOME_DUPLICATE
        elif at > ingest_time + source.max_skew:
            verdict.outcome = OUTCOME_QUARANTINED
        elif source.watermark - at > source.lateness:
            verdict.outcome = OUTCOME_LATE
        else:
            verdict.outcome = OUTCOME_APPLIED
            apply = True

        # The event as each store sees it.
        for i in range(source.n_uses):
            use = &source.uses[i]
            value = values + used
            for j in range(use.n_columns):
                values[used + j] = slots[use.fields[j]]
                statuses[used + j] = status[use.fields[j]]
            events[i].event_time = at
            events[i].ingest_time = ingest_time
            events[i].log_id = self.log_id
            events[i].sequence = self.sequence
            events[i].values = values + used
            events[i].status = statuses + used
            events[i].where_mask = 0
            events[i].arena = arena.data
            for j in range(use.n_where):
                if use.expressions.test(use.programs[j], slots, status, arena.data) == 1:
                    events[i].where_mask |= <uint64_t>1 << j
            used += use.n_columns
            handles[i] = use.api.find(use.store, &keys.key[use.key], keys.hash[use.key])

        if pipe != NULL:
            verdict.degraded = verdict.outcome == OUTCOME_LATE or verdict.outcome == OUTCOME_QUARANTINED
            if self.read_views(pipe, keys, handles, events, False, False, at, slots, status, arena, verdict) != 0:
                return OUT_OF_MEMORY

        if arena.data != base:
            # The views read so far have appended strings: the keys' texts have moved with the arena.
            self.prepare_keys(pipe.keys, pipe.n_keys, slots, arena, keys)
        if apply:
            # All stores or none: before the first apply every blob exists, and memory for all that follow it.
            for i in range(source.n_uses):
                if handles[i] == 0:
                    use = &source.uses[i]
                    handles[i] = use.api.find_or_create(use.store, &keys.key[use.key], keys.hash[use.key])
                    source.created += 1
                    if handles[i] == 0:
                        for j in range(i):
                            source.uses[j].api.forget_unused(source.uses[j].store, handles[j])
                        return OUT_OF_MEMORY
            # With a log the first one too: what was logged must then be applied.
            for i in range(0 if logged else 1, source.n_uses):
                use = &source.uses[i]
                if use.api.reserve(use.store, handles[i], &events[i]) != 0:
                    for j in range(source.n_uses):
                        source.uses[j].api.forget_unused(source.uses[j].store, handles[j])
                    return OUT_OF_MEMORY
        if logged:
            j = self.append_event(source, pipe, slots, status, arena, keys, verdict.outcome, apply, handles)
            if j != 0:
                if apply:
                    for i in range(source.n_uses):
                        source.uses[i].api.forget_unused(source.uses[i].store, handles[i])
                return j
            self.sequence += 1
        if apply:
            for i in range(source.n_uses):
                use = &source.uses[i]
                # Strings may have moved: views read above append to the arena.
                events[i].arena = arena.data
                if use.api.apply(use.store, handles[i], &events[i]) != 0:
                    for j in range(i, source.n_uses):
                        source.uses[j].api.forget_unused(source.uses[j].store, handles[j])
                    return OUT_OF_MEMORY
            if not logged:
                self.sequence += 1
            if at > source.watermark:
                source.watermark = at
            source.applied += 1
        source.outcomes[verdict.outcome] += 1

        if pipe == NULL:
            return 0
        # An event whose id was seen before is in the state already, or was late.
        if self.read_views(pipe, keys, handles, events, apply or verdict.outcome == OUTCOME_DUPLICATE, True, at, slots, status, arena,
                           verdict) != 0:
            return UNSCORED

        for i in range(pipe.n_functions):
            function = &pipe.functions[i]
            if function.call != NULL:
                j = call_native(function, slots, status)
            else:
                j = call_python(pipe_object, i, function, slots, status, arena, verdict.failed < 0)
            if j != 0 and verdict.failed < 0:
                verdict.failed = <int16_t>i
        for i in range(pipe.n_assigns):
            k = -1
            if status[pipe.assigns[i].unit] == PS_PRESENT:
                if pipe.assigns[i].unit_is_int:
                    k = pipe.assigns[i].api.assign_int(pipe.assigns[i].experiment, slots[pipe.assigns[i].unit].i)
                else:
                    k = pipe.assigns[i].api.assign(
                        pipe.assigns[i].experiment, arena.data + PS_STR_OFFSET(slots[pipe.assigns[i].unit].u),
                        PS_STR_LENGTH(slots[pipe.assigns[i].unit].u))
            verdict.arms[i] = <int8_t>k
            slots[pipe.assigns[i].slot].u = pipe.assigns[i].arms[k] if k >= 0 else 0
            status[pipe.assigns[i].slot] = PS_PRESENT if k >= 0 else PS_NULL_VALUE
        return 0

    cdef int read_views(self, PipeC *pipe, RowKeys *keys, ps_handle *handles, const ps_event *events, int applied,
                        int with_event, int64_t as_of, ps_slot *slots, uint8_t *status, ps_arena *arena,
                        Verdict *verdict) noexcept nogil:
        cdef int i, j, slot
        cdef Read *read
        cdef ps_handle handle
        cdef const ps_event *extra
        cdef ps_event moved
        cdef uint64_t ignored
        cdef char *base = arena.data
        for i in range(pipe.n_reads):
            read = &pipe.reads[i]
            if read.with_event != with_event:
                continue
            if arena.data != base:
                base = arena.data
                self.prepare_keys(pipe.keys, pipe.n_keys, slots, arena, keys)
            extra = NULL
            if read.use >= 0:
                handle = handles[read.use]
                if with_event and not applied:
                    moved = events[read.use]
                    moved.arena = arena.data
                    if read.strings:
                        # The read appends to the arena, which may move under the event's own strings.
                        self.spare.used = 0
                        if ps_arena_append(&self.spare, arena.data, arena.used, &ignored) != 0:
                            return OUT_OF_MEMORY
                        moved.arena = self.spare.data
                    extra = &moved
            else:
                handle = read.api.find(read.store, &keys.key[read.key], keys.hash[read.key])
            keys.version[i] = read.api.version(read.store, handle)
            if read.api.read(read.store, handle, read.group, as_of, extra, slots + read.first, status + read.first,
                             arena) != 0:
                return OUT_OF_MEMORY
            if memchr(status + read.first, PS_INVALID, read.n_outputs) != NULL:
                verdict.degraded = 1
            for j in range(read.n_defaults):
                slot = read.defaults[j].slot
                if status[slot] & 7 != PS_PRESENT and status[slot] & 7 != PS_INVALID:
                    slots[slot] = read.defaults[j].value
                    status[slot] = PS_PRESENT | (PS_AGED if status[slot] & 7 == PS_OUTSIDE_MAX_AGE else 0)
        return 0

    cdef void run_models(self, PipeC *pipe, Rows rows, const int *which, int n) noexcept nogil:
        """Every model over the rows that need it, in one call where its results do not depend on the batch."""
        cdef int m, r, j, row, picked, code
        cdef ModelRun *run
        cdef ps_slot *slots
        cdef uint8_t *status
        cdef Verdict *verdict
        cdef double *x
        cdef double score
        cdef size_t outputs
        for m in range(pipe.n_models):
            for r in range(n):
                rows.slots[which[r] * rows.width + pipe.models[m].slot].f = NAN
                rows.status[which[r] * rows.width + pipe.models[m].slot] = PS_NULL_VALUE
        for m in range(pipe.n_models):
            run = &pipe.models[m]
            outputs = run.model.n_outputs
            if ((run.n_inputs > rows.n_inputs or <int>outputs > rows.n_outputs)
                    and rows.widen(run.n_inputs, <int>outputs) != 0):
                for r in range(n):
                    verdict = &rows.verdicts[which[r]]
                    if verdict.failed < 0 and (run.guard_experiment < 0
                                               or verdict.arms[run.guard_experiment] == run.guard_arm):
                        verdict.failed = <int16_t>(pipe.n_functions + m)
                continue
            picked = 0
            for r in range(n):
                row = which[r]
                verdict = &rows.verdicts[row]
                if run.guard_experiment >= 0 and verdict.arms[run.guard_experiment] != run.guard_arm:
                    continue
                slots = rows.slots + row * rows.width
                status = rows.status + row * rows.width
                x = rows.matrix + picked * run.n_inputs
                for j in range(run.n_inputs):
                    if run.types[j] == PS_FLOAT64:
                        x[j] = slots[run.inputs[j]].f if status[run.inputs[j]] & 7 == PS_PRESENT else NAN
                    elif status[run.inputs[j]] & PS_WIDE:
                        x[j] = slots[run.inputs[j]].f
                    elif status[run.inputs[j]] & 7 == PS_PRESENT:
                        x[j] = <double>slots[run.inputs[j]].i
                    else:
                        x[j] = NAN
                rows.picked[picked] = row
                picked += 1
            if picked == 0:
                continue
            code = 0
            if run.row_by_row and picked > 1:
                for r in range(picked):
                    code = run.model.predict(run.model, rows.matrix + r * run.n_inputs, 1, run.n_inputs,
                                             rows.scores + r * outputs)
                    self.take_score(pipe, run, m, rows, rows.picked[r], rows.scores + r * outputs, code)
                continue
            code = run.model.predict(run.model, rows.matrix, picked, run.n_inputs, rows.scores)
            for r in range(picked):
                self.take_score(pipe, run, m, rows, rows.picked[r], rows.scores + r * outputs, code)

    cdef void take_score(self, PipeC *pipe, ModelRun *run, int m, Rows rows, int row, const double *scores,
                         int code) noexcept nogil:
        cdef ps_slot *slots = rows.slots + row * rows.width
        cdef uint8_t *status = rows.status + row * rows.width
        cdef Verdict *verdict = &rows.verdicts[row]
        cdef double score = scores[run.output]
        if code != 0:
            score = NAN
            if verdict.failed < 0:
                verdict.failed = <int16_t>(pipe.n_functions + m)
        elif isnan(score) and verdict.failed < 0:
            verdict.failed = no_score(pipe, run, m, status)
        slots[run.slot].f = score
        status[run.slot] = PS_NULL_VALUE if isnan(score) else PS_PRESENT
        if run.decides:
            verdict.score = score
            verdict.has_score = not isnan(score)
            verdict.model = <int16_t>run.index

    cdef void decide(self, PipeC *pipe, ps_slot *slots, uint8_t *status, ps_arena *arena, Verdict *verdict) noexcept nogil:
        """The rules, in order: the first that fires gives the action; all that fire give reasons."""
        cdef int i
        cdef bint decided = False
        if pipe.score >= 0:
            slots[pipe.score].f = verdict.score
            status[pipe.score] = PS_PRESENT if verdict.has_score else PS_NULL_VALUE
        if pipe.degraded >= 0:
            slots[pipe.degraded].i = verdict.degraded
            status[pipe.degraded] = PS_PRESENT
        if verdict.failed >= 0:
            verdict.action = pipe.fallback if pipe.fallback >= 0 else pipe.default_action
            verdict.has_score = 0
            pipe.failed_count += verdict.counted
        elif verdict.degraded and pipe.degraded_action >= 0:
            verdict.action = pipe.degraded_action
            verdict.failed = pipe.degraded_failure
            verdict.has_score = 0
        else:
            for i in range(pipe.n_rules):
                if pipe.rules[i].api.test(pipe.rules[i].program, slots, status, arena.data) == 1:
                    verdict.fired |= <uint64_t>1 << i
                    if not decided:
                        verdict.action = pipe.rules[i].action
                        decided = True
        if not verdict.counted:
            return
        pipe.degraded_count += verdict.degraded
        for i in range(pipe.n_models):
            if (pipe.models[i].guard_experiment < 0
                    or verdict.arms[pipe.models[i].guard_experiment] == pipe.models[i].guard_arm):
                pipe.model_counts[pipe.models[i].index] += 1
        pipe.action_counts[verdict.action] += 1
        for i in range(pipe.n_assigns):
            pipe.arm_counts[i * (MAX_ARMS + 1) + (verdict.arms[i] if verdict.arms[i] >= 0 else MAX_ARMS)] += 1

    cdef void sweep(self, SourceC *source) noexcept nogil:
        cdef int i
        cdef uint32_t entities
        if source.applied >= SWEEP_EVERY or source.created >= SWEEP_CREATED:
            # Twice as many may go as came, so that a stream of new keys does not outrun the sweep.
            entities = SWEEP_ENTITIES + 2 * source.created
            source.applied = 0
            source.created = 0
            for i in range(source.n_uses):
                if <uint32_t>source.uses[i].api.sweep(source.uses[i].store, source.watermark, entities) >= entities:
                    # More wait to be released: go on soon.
                    source.applied = SWEEP_EVERY - 4

    # one event

    cdef Decision finish(self, Pipe pipe, Rows rows, int row, int64_t now, bint explain):
        cdef char id[26]
        cdef Decision decision
        cdef Verdict *verdict = &rows.verdicts[row]
        self.ids.next(now, id)
        decision = Decision.new(pipe.texts, id, verdict)
        if self.log_ptr != NULL and not undecided(&pipe.c, verdict):
            self.append_score(&pipe.c, rows.slots + row * rows.width, rows.status + row * rows.width, &rows.arena,
                              &rows.keys[row], verdict, id, rows.slots[row * rows.width + pipe.source.c.time].i)
        if explain:
            decision.row = (
                PyBytes_FromStringAndSize(<char *>(rows.slots + row * rows.width), pipe.c.n_slots * sizeof(ps_slot))
                + PyBytes_FromStringAndSize(<char *>(rows.status + row * rows.width), pipe.c.n_slots)
            )
            decision.strings = PyBytes_FromStringAndSize(rows.arena.data, rows.arena.used)
        return decision

    cdef object id_of(self, Source source, ps_slot *slots, ps_arena *arena):
        cdef ps_slot slot = slots[source.reader.id_field]
        if source.reader.types[source.reader.id_field] == PS_INT64:
            return slot.i
        return slot_value(slot, PS_PRESENT, "string", arena.data)

    cdef Decision start(self, Pipe pipe, Rows rows, int row, object event, bint ingest, Start *start):
        """Validate, look the id up, log, read, apply, read, functions, assignment (SEMANTICS, one step): all but the
        models and what follows them. Returns the first decision on an event that is repeated, else None."""
        cdef Source source = pipe.source
        cdef ps_slot *slots = rows.slots + row * rows.width
        cdef uint8_t *status = rows.status + row * rows.width
        cdef RowKeys *keys = rows.keys + row
        cdef int code
        cdef object id = None
        cdef dict home = None
        cdef Decision decision
        cdef Verdict verdict
        start.mode = ingest
        self.started_id = None
        if ingest:
            self.check_open()
        if row == 0:
            rows.arena.used = <uint32_t>PyBytes_GET_SIZE(self.constants)
        source.reader.read_object(event, slots, status, &rows.arena, "")
        if source.has_id:
            id = self.id_of(source, slots, &rows.arena)
            if self.under_way and id_under_way(source, id) in self.under_way:
                raise InProgress(f"the event with this {source.reader.names[source.reader.id_field]} is being scored; ask again")
            home = source.home_of(id)
            if home is not None:
                known = home[id]
                if known is not None and (<Decision>known).texts is not pipe.texts:
                    # Another pipeline decided on this event: what this one decided stands beside it.
                    id = (id, pipe.index)
                    known = home.get(id)
                if known is not None:
                    decision = <Decision>known
                    verdict = decision.verdict
                    verdict.outcome = OUTCOME_DUPLICATE
                    source.c.outcomes[<int>OUTCOME_DUPLICATE] += 1
                    answer = Decision.new(pipe.texts, decision._id, &verdict)
                    answer.row = decision.row
                    answer.strings = decision.strings
                    return answer
                start.mode = -1 if ingest else -2
            self.started_id = id
        start.now = self.now()
        keys.ingest_time = slots[source.c.time].i if self.event_clock else start.now
        self.prepare_keys(pipe.c.keys, pipe.c.n_keys, slots, &rows.arena, keys)
        self.hash_keys(pipe.c.n_keys, pipe.c.reads, pipe.c.n_reads, &source.c, keys)
        code = self.advance(&source.c, &pipe.c, <void *>pipe, slots, status, &rows.arena, keys, start.mode, rows.verdicts + row)
        if code != 0:
            if code == UNSCORED and id is not None and start.mode == 1:
                source.seen[id] = None
            if code == UNSCORED and start.mode == 1:
                raise EngineError("out of memory: the event was ingested, not scored")
            raise self.not_ingested(code, "the event was not ingested")
        return None

    cdef Decision conclude(self, Pipe pipe, Rows rows, int row, const Start *start, object id, object error, bint ingest,
                           bint explain):
        """Rules, the decision, its record, its id's memory: what follows the models. error: what a function raised."""
        cdef Source source = pipe.source
        cdef Verdict *verdict = rows.verdicts + row
        cdef Decision decision
        cdef dict home
        self.decide(&pipe.c, rows.slots + row * rows.width, rows.status + row * rows.width, &rows.arena, verdict)
        self.sweep(&source.c)
        decision = self.finish(pipe, rows, row, start.now, explain)
        failed = undecided(&pipe.c, verdict)
        if id is not None and ingest:
            home = source.home_of(id)
            if home is None:
                source.turn_over(source.c.watermark)
                home = source.seen
            # An error is no decision: asked again, the event is scored again, but not applied again.
            home[id] = None if failed else decision
        if failed:
            text = pipe.texts.failures[verdict.failed]
            if error is not None:
                text += f": {type(error).__name__}: {error}"
            raise ScoringError(text, verdict.outcome == OUTCOME_APPLIED or start.mode == -1) from error
        return decision

    cdef Decision score_one(self, Pipe pipe, object event, bint ingest, bint explain):
        """One event from start to conclusion. Called inside enter()."""
        cdef Rows rows = self.single
        cdef Start start
        cdef int which = 0
        cdef Decision known = self.start(pipe, rows, 0, event, ingest, &start)
        if known is not None:
            return known
        self.run_models(&pipe.c, rows, &which, 1)
        error = None
        if rows.verdicts.failed >= 0:
            error, pipe.error = pipe.error, None
        return self.conclude(pipe, rows, 0, &start, self.started_id, error, ingest, explain)

    # events that are scored together

    cdef Py_ssize_t start_block(self, Pipe pipe, Block block, list events, Py_ssize_t at) except -1:
        """Start events[at:] until the block is full, or one repeats the id of another in it. Returns where it stopped;
        block.answers holds for each a Decision, an exception, or None where the models are to run."""
        cdef Start start
        cdef Py_ssize_t n = len(events)
        cdef Decision known
        cdef uint64_t hashes[BLOCK_ROWS * AHEAD_KEYS]
        cdef int rows = 0, keys = 0, fetched = 0
        cdef int k
        block.n = 0
        block.answers = []
        block.ids = [] if pipe.source.has_id else None
        block.errors = None
        if n - at > 2:
            rows = <int>min(n - at, <Py_ssize_t>BLOCK_ROWS)
            keys = look_ahead(pipe, events, at, rows, hashes)
        while at < n and len(block.answers) < BLOCK_ROWS:
            while fetched < rows and fetched < len(block.answers) + AHEAD:
                for k in range(keys):
                    if hashes[fetched * AHEAD_KEYS + k]:
                        fetch(pipe, k, hashes[fetched * AHEAD_KEYS + k], True)
                fetched += 1
            try:
                known = self.start(pipe, block.rows, block.n, events[at], block.ingest, &start)
            except InProgress as error:
                if block.ids is not None and block.n:
                    return at                          # of an event of this block: first conclude it
                block.answers.append(error)
            except Exception as error:
                block.answers.append(error)
            else:
                block.answers.append(known)
                if known is None:
                    block.starts[block.n] = start
                    block.which[block.n] = block.n
                    if block.ids is not None:
                        id = self.started_id
                        block.ids.append(id)
                        if block.ingest:
                            if self.under_way is None:
                                self.under_way = set()
                            self.under_way.add(id_under_way(pipe.source, id))
                    if block.rows.verdicts[block.n].failed >= 0 and pipe.error is not None:
                        if block.errors is None:
                            block.errors = {}
                        block.errors[block.n] = pipe.error
                        pipe.error = None
                    block.n += 1
            at += 1
        return at

    cdef list conclude_block(self, Pipe pipe, Block block):
        """After the models: a Decision or an exception per event of the block."""
        cdef Py_ssize_t i
        cdef int row = 0
        cdef list answers = block.answers
        for i in range(len(answers)):
            if answers[i] is not None:
                continue
            id = None
            if block.ids is not None:
                id = block.ids[row]
                if block.ingest:
                    self.under_way.discard(id_under_way(pipe.source, id))
            try:
                answers[i] = self.conclude(pipe, block.rows, row, &block.starts[row], id,
                                           None if block.errors is None else block.errors.get(row),
                                           block.ingest, block.explain)
            except Exception as error:
                answers[i] = error
            row += 1
        return answers

    cdef Block new_block(self, Pipe pipe, int rows, bint ingest, bint explain):
        cdef Block block = Block.__new__(Block)
        inputs, outputs = pipe.widths
        block.rows = Rows(rows, max(pipe.c.n_slots, pipe.source.c.n_fields), inputs, outputs, self.constants)
        block.starts = <Start *>checked(rows, sizeof(Start))
        block.which = <int *>checked(rows, sizeof(int))
        block.pipe = pipe
        block.core = self
        block.ingest = ingest
        block.explain = explain
        return block

    cdef list score_together(self, Pipe pipe, list events, bint ingest, bint explain):
        """Score events that stand for themselves, in order, their models in one call: for each its Decision, or the
        exception that it raises alone. With `fsync always` the caller waits for the log."""
        cdef Py_ssize_t at = 0
        cdef list answers = []
        cdef Block block
        self.enter()
        try:
            if pipe.block is None:
                pipe.block = self.new_block(pipe, BLOCK_ROWS, ingest, explain)
            block = <Block>pipe.block
            block.ingest = ingest
            block.explain = explain
            while at < len(events):
                at = self.start_block(pipe, block, events, at)
                if block.n:
                    self.run_models(&pipe.c, block.rows, block.which, block.n)
                if at == len(events) and not answers:
                    answers = self.conclude_block(pipe, block)
                else:
                    answers.extend(self.conclude_block(pipe, block))
            block.answers = None
        finally:
            self.leave()
        return answers

    def score_apart(self, Py_ssize_t pipeline, list events, bint ingest=True, bint explain=False):
        """score_together for callers outside: a Decision or an exception per event."""
        answers = self.score_together(<Pipe>self.pipes[pipeline], events, ingest, explain)
        self.wait_for_log()
        return answers

    # events whose models run outside the engine

    cdef Block begin_apart(self, Pipe pipe, list events, bint ingest, bint explain):
        """Start events, at most BLOCK_ROWS, and leave their models to whoever calls run_block(), from any thread, once.
        Then end_apart() concludes them. Between the two other events may come. It ends before an event that repeats the
        id of another in it: len(block.answers) were taken."""
        cdef Block block
        cdef int i
        self.enter()
        try:
            block = self.new_block(pipe, max(1, len(events)), ingest, explain)
            self.start_block(pipe, block, events, 0)
            # The models of now: a swap meanwhile leaves them alone.
            block.keep = pipe.keep                     # a swap makes a new list
            block.c = pipe.c
            block.c.models = <ModelRun *>checked(max(1, pipe.c.n_models), sizeof(ModelRun))
            for i in range(pipe.c.n_models):
                block.c.models[i] = pipe.c.models[i]
            block.own_models = True
            block.parts.block = <void *>block
            block.parts.core = <void *>self
            block.parts.rows = <void *>block.rows
        finally:
            self.leave()
        return block

    cdef list end_apart(self, Block block):
        cdef int i
        self.enter()
        try:
            if block.keep is not block.pipe.keep and self.log_ptr != NULL:
                # The log says that other models run by now: a record of these would be taken for theirs.
                for i in range(block.n):
                    if block.rows.keys[i].sequence >= 0:
                        self.scores_lost += 1
                        block.rows.keys[i].sequence = -1
            return self.conclude_block(block.pipe, block)
        finally:
            self.leave()

    cdef void hash_keys(self, int n_keys, Read *reads, int n_reads, SourceC *source, RowKeys *keys) noexcept nogil:
        """One hash per key: every store has the same seed."""
        cdef int i
        cdef const ps_store_api *api = NULL
        cdef const ps_store *store = NULL
        if source.n_uses:
            api, store = source.uses[0].api, source.uses[0].store
        elif n_reads:
            api, store = reads[0].api, reads[0].store
        if api != NULL:
            for i in range(n_keys):
                keys.hash[i] = api.hash(store, &keys.key[i])

    cpdef Decision score(self, Py_ssize_t pipeline, object event, bint ingest=True, bint explain=False):
        """Score one event: an Event of the pipeline's type, a decoded wire Struct, or a dict.

        Raises EventError (nothing has changed), ScoringError (a function or model failed and there is no fallback) or
        EngineError.
        """
        cdef Pipe pipe = <Pipe>self.pipes[pipeline]
        self.enter()
        try:
            decision = self.score_one(pipe, event, ingest, explain)
        finally:
            self.leave()
        self.wait_for_log()
        return decision

    cpdef list score_many(self, Py_ssize_t pipeline, list events, bint ingest=True, bint explain=False):
        """Score several events in order, all or nothing: every one is validated before the first is ingested.

        EventError.path starts with the place in the list: `[17].amount`.
        """
        cdef Pipe pipe = <Pipe>self.pipes[pipeline]
        self.enter()
        try:
            self.validate(pipe.source, events, 0, len(events), None)
            decisions = [self.score_one(pipe, event, ingest, explain) for event in events]
        finally:
            self.leave()
        self.wait_for_log()
        return decisions

    cdef int check(self, Source source, list events, Py_ssize_t first, Py_ssize_t last, list times=None) except -1:
        """Raise for the first of events[first:last] that would be refused. times: gets the event time of each."""
        self.enter()
        try:
            return self.validate(source, events, first, last, times)
        finally:
            self.leave()

    cdef int validate(self, Source source, list events, Py_ssize_t first, Py_ssize_t last, list times) except -1:
        cdef Py_ssize_t i
        cdef Rows rows = self.single
        for i in range(first, last):
            rows.arena.used = <uint32_t>PyBytes_GET_SIZE(self.constants)
            source.reader.read_object(events[i], rows.slots, rows.status, &rows.arena, f"[{i}]")
            if times is not None:
                times.append(rows.slots[source.c.time].i)
        return 0

    cdef int ingest_one(self, Source source, object event) except -1:
        cdef Rows rows = self.single
        cdef int code
        cdef object id = None
        self.check_open()
        rows.arena.used = <uint32_t>PyBytes_GET_SIZE(self.constants)
        source.reader.read_object(event, rows.slots, rows.status, &rows.arena, "")
        if source.has_id:
            id = self.id_of(source, rows.slots, &rows.arena)
            # One whose models still run has been applied already (S16).
            if source.home_of(id) is not None or (self.under_way and id_under_way(source, id) in self.under_way):
                source.c.outcomes[<int>OUTCOME_DUPLICATE] += 1
                return OUTCOME_DUPLICATE
        rows.keys.ingest_time = rows.slots[source.c.time].i if self.event_clock else self.now()
        self.prepare_keys(source.c.keys, source.c.n_keys, rows.slots, &rows.arena, rows.keys)
        self.hash_keys(source.c.n_keys, NULL, 0, &source.c, rows.keys)
        code = self.advance(&source.c, NULL, NULL, rows.slots, rows.status, &rows.arena, rows.keys, True, rows.verdicts)
        if code != 0:
            raise self.not_ingested(code, "the event was not ingested")
        self.sweep(&source.c)
        if id is not None:
            source.turn_over(source.c.watermark)
            source.seen[id] = None
        return rows.verdicts.outcome

    def ingest(self, Py_ssize_t source, object event):
        """Apply one event to the state. Returns its outcome: applied, duplicate, late or quarantined."""
        self.enter()
        try:
            outcome = OUTCOMES[self.ingest_one(<Source>self.sources[source], event)]
        finally:
            self.leave()
        self.wait_for_log()
        return outcome

    def ingest_many(self, Py_ssize_t source, list events):
        """Apply several events by event time, all or nothing on bad input. Returns their outcomes, as they were given."""
        cdef list times = []
        cdef list outcomes = [None] * len(events)
        self.enter()
        try:
            self.validate(<Source>self.sources[source], events, 0, len(events), times)
            for i in by_time(times):
                outcomes[i] = OUTCOMES[self.ingest_one(<Source>self.sources[source], events[i])]
        finally:
            self.leave()
        self.wait_for_log()
        return outcomes

    def wire_type(self, Py_ssize_t source):
        """The Struct type that JSON or MessagePack of this event type decodes into."""
        return (<Source>self.sources[source]).reader.wire_type

    # reading

    def watermark(self, Py_ssize_t source):
        """Largest event time accepted from a source, microseconds; None before the first event."""
        return (<Source>self.sources[source]).watermark

    def read_view(self, WindowStore store, Py_ssize_t source, int group, list keys, int64_t as_of, list types, list defaults):
        """One view's outputs for several keys: a list of (values, statuses), one per key. Raises ReplayNeeded (S14)."""
        cdef Source s = <Source>self.sources[source]
        cdef int n = len(types)
        cdef ps_slot *slots = NULL
        cdef uint8_t *status = NULL
        cdef ps_key key
        cdef bytes text
        cdef ps_arena *arena = &self.single.arena
        cdef int i
        cdef ps_handle handle
        self.enter()
        try:
            slots = <ps_slot *>checked(n, sizeof(ps_slot))
            status = <uint8_t *>checked(n, 1)
            if as_of < s.c.watermark - s.c.lateness:
                raise ReplayNeeded(
                    f"as_of is before the watermark minus lateness of {s.name}: the online state no longer holds it; "
                    "use Engine.replay on history")
            found = []
            for value in keys:
                key.str = NULL
                key.len = 0
                key.i = 0
                key.is_int = isinstance(value, int)
                if key.is_int:
                    key.i = value
                else:
                    text = value.encode()
                    key.str = PyBytes_AS_STRING(text)
                    key.len = <uint32_t>PyBytes_GET_SIZE(text)
                arena.used = <uint32_t>PyBytes_GET_SIZE(self.constants)
                handle = store.api.find(store.ptr, &key, store.api.hash(store.ptr, &key))
                if store.api.read(store.ptr, handle, group, as_of, NULL, slots, status, arena) != 0:
                    raise EngineError("out of memory while reading")
                values = [slot_value(slots[i], status[i], types[i], arena.data) for i in range(n)]
                for i in range(n):
                    if values[i] is None and defaults[i] is not None and status[i] & 7 != PS_INVALID:
                        values[i] = defaults[i]
                        if status[i] & 7 != PS_OUTSIDE_MAX_AGE:
                            status[i] = PS_PRESENT
                found.append((values, [STATUSES[status[i] & 7] for i in range(n)]))
            return found
        finally:
            self.leave()
            free(slots)
            free(status)

    def prefer_latency(self):
        """Let the state grow in small steps, so that no single event waits for a large page (the server does)."""
        cdef WindowStore store
        self.enter()
        try:
            for store in self.stores:
                store.api.small_pages(store.ptr)
        finally:
            self.leave()

    def store_stats(self):
        """Per store: entities, events held, bytes used, bytes mapped."""
        cdef WindowStore store
        cdef ps_store_stats stats
        found = []
        self.enter()
        try:
            for store in self.stores:
                store.api.stats(store.ptr, &stats)
                found.append((stats.entities, stats.events, stats.bytes_used, stats.bytes_mapped))
        finally:
            self.leave()
        return found

    def counters(self):
        """Counts since start: {"outcomes": {event: {outcome: n}}, "actions": ..., "arms": ..., "models": ...,
        "degraded": {pipeline: n}, "failed": {pipeline: n}}; failed: a function or model failed or gave no score."""
        cdef Source source
        cdef Pipe pipe
        cdef int i, j
        outcomes = {}
        actions = {}
        arms = {}
        models = {}
        for source in self.sources:
            outcomes[source.name] = {OUTCOMES[i]: source.c.outcomes[i] for i in range(<int>N_OUTCOMES)}
        for pipe in self.pipes:
            actions[pipe.name] = {name: pipe.c.action_counts[i] for i, name in enumerate(pipe.texts.actions)}
            models[pipe.name] = {f"{name}@{version}": pipe.c.model_counts[i]
                                 for i, (name, version) in enumerate(pipe.texts.models)}
            arms[pipe.name] = {
                name: {arm: pipe.c.arm_counts[j * (MAX_ARMS + 1) + i] for i, arm in enumerate(pipe.texts.arms[j])}
                | {"": pipe.c.arm_counts[j * (MAX_ARMS + 1) + MAX_ARMS]}
                for j, name in enumerate(pipe.texts.experiments)
            }
        return {"outcomes": outcomes, "actions": actions, "arms": arms, "models": models,
                "degraded": {pipe.name: pipe.c.degraded_count for pipe in self.pipes},
                "failed": {pipe.name: pipe.c.failed_count for pipe in self.pipes}}

    def swap_models(self, list changes, list prelude=None):
        """Run other models from the next event on. changes: (pipeline, what Pipe.swap_models takes). prelude: the log's
        schemas from now on. Returns what held the old models; raises LogError, and nothing has changed, where the log
        cannot take the schemas."""
        cdef Pipe pipe
        cdef list old = []
        self.enter()
        try:
            if prelude is not None and self.log_ptr != NULL:
                self.log.set_prelude(prelude)
            for index, models in changes:
                pipe = <Pipe>self.pipes[<Py_ssize_t>index]
                old += pipe.swap_models(models)
        finally:
            self.leave()
        return old


cdef int16_t no_score(PipeC *pipe, const ModelRun *run, int m, const uint8_t *status) noexcept nogil:
    """The number of the text that says which null input left a model without a score: a failed model (S17)."""
    cdef int j
    cdef int which = pipe.n_slots
    cdef int number
    for j in range(run.n_inputs):
        if status[run.inputs[j]] & 7 != PS_PRESENT:
            which = run.inputs[j]
            break
    number = pipe.degraded_failure + 1 + m * (pipe.n_slots + 1) + which
    return <int16_t>(number if number < 32768 else pipe.n_functions + m)


cdef int call_native(Function *function, ps_slot *slots, uint8_t *status) noexcept nogil:
    """0, or 1 where the function failed. A null argument that is no float makes the result null."""
    cdef ps_slot args[MAX_ARGUMENTS]
    cdef ps_slot out
    cdef int j
    cdef uint8_t code
    for j in range(function.n_args):
        args[j] = slots[function.args[j]]
        if status[function.args[j]] & ~PS_AGED != PS_PRESENT:
            if function.arg_types[j] != PS_FLOAT64:
                slots[function.slot].f = NAN
                if function.type != PS_FLOAT64:
                    slots[function.slot].i = 0
                status[function.slot] = PS_NULL_VALUE
                return 0
            args[j].f = NAN
    out.i = 0
    code = function.call(&args[0].f, &args[0].i, &out.f, &out.i)
    status[function.slot] = PS_PRESENT
    if code != 0 or (function.type == PS_FLOAT64 and isnan(out.f)):
        status[function.slot] = PS_NULL_VALUE
        out.i = 0
        if function.type == PS_FLOAT64:
            out.f = NAN
    slots[function.slot] = out
    return code > 1


cdef int call_python(void *pipe_object, int index, Function *function, ps_slot *slots, uint8_t *status,
                     ps_arena *arena, bint is_first) noexcept with gil:
    # is_first: nothing has failed for this event yet; the decision names the first failure, so its error is kept.
    cdef Pipe pipe = <Pipe>pipe_object
    cdef int j
    cdef bytes text
    status[function.slot] = PS_NULL_VALUE
    slots[function.slot].f = NAN
    if function.type != PS_FLOAT64:
        slots[function.slot].i = 0
    try:
        args = []
        for j in range(function.n_args):
            value = slot_value(slots[function.args[j]], status[function.args[j]], TYPE_NAMES[function.arg_types[j]], arena.data)
            if value is None:
                if function.arg_types[j] != PS_FLOAT64:
                    return 0
                value = NAN
            args.append(value)
        result = pipe.python_functions[index](*args)
        if result is None:
            return 0
        if function.type == PS_FLOAT64:
            slots[function.slot].f = float(result)
            if isnan(slots[function.slot].f):
                return 0
        elif function.type == PS_STRING:
            text = str(result).encode()
            if ps_arena_append(arena, PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text), &slots[function.slot].u) != 0:
                return 1
        elif function.type == PS_BOOL:
            slots[function.slot].i = bool(result)
        else:
            slots[function.slot].i = int(result)
        status[function.slot] = PS_PRESENT
        return 0
    except Exception as error:
        if is_first:
            pipe.error = error
        return 1


TYPE_NAMES = {code: name for name, code in TYPE_CODES.items()}


cdef int decimal(int64_t value, char *out) noexcept nogil:
    cdef char digits[24]
    cdef int n = 0, size = 0
    cdef uint64_t rest = <uint64_t>value
    if value < 0:
        out[0] = b"-"
        size = 1
        rest = 0 - rest
    while True:
        digits[n] = <char>(48 + rest % 10)
        n += 1
        rest //= 10
        if rest == 0:
            break
    while n:
        n -= 1
        out[size] = digits[n]
        size += 1
    return size


cdef bint parse_decimal(const char *text, int size, int64_t *out) noexcept nogil:
    """The integer that a text spells in its shortest form; False for anything else."""
    cdef int i = 0
    cdef uint64_t value = 0
    cdef uint64_t digit
    cdef bint negative = size > 0 and text[0] == b"-"
    if negative:
        i = 1
    if size - i < 1 or size - i > 19 or (text[i] == b"0" and size > 1):
        return False
    while i < size:
        digit = <uint64_t>(<int>text[i] - 48)
        if digit > 9:
            return False
        value = value * 10 + digit
        i += 1
    if value > (<uint64_t>1 << 63) - (0 if negative else 1):
        return False
    out[0] = <int64_t>(0 - value) if negative else <int64_t>value
    return True
