"""The event log for Python (control path): opening and closing the writer, and looking at segments one record at a time.

The engine core appends through EventLog.api (event_log.h). What must stay true: nothing here reads a record that does
not check, and a scan says where it stopped and why.
"""

import os
from array import array
from collections import namedtuple

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EMSGSIZE
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy
from posix.unistd cimport usleep

from penstock.errors import LogError

from penstock._ext.steps cimport Source

from penstock._ext.events import TYPE_CODES

FORMAT = PS_LOG_FORMAT
HEAD = PS_SEGMENT_HEAD
KINDS = {PS_RECORD_SCHEMA: "schema", PS_RECORD_MARK: "mark", PS_RECORD_EVENT: "event", PS_RECORD_SCORE: "score"}

#: What a log is, in one word: every answer, /health/ready, /metrics and what is said on stderr go by it (event_log.h).
STATES = ("ok", "slow", "refusing", "gone")
LogStats = namedtuple(
    "LogStats",
    "position synced segments number syncs rolls waits longest_sync_us clock_steps last_step_us state error spare_error "
    "unsynced_us longest_unsynced_us late_syncs last_late_us",
)
SegmentHead = namedtuple("SegmentHead", "format log_id number first_sequence created capacity whole")
SegmentMark = namedtuple("SegmentMark", "synced end last_sequence")
#: What a scan of a segment's records found. stop: "end" (nothing was written behind `end`) or "damaged" (at `end`).
Scan = namedtuple("Scan", "end stop records events scores first_sequence last_sequence last_ingest_time")
Record = namedtuple("Record", "offset length kind schema outcome sequence ingest_time versions body")


cdef int bodies_of(list prelude, const char ***texts, uint32_t **sizes) except -1:
    """Pointers into the schemas' bodies; both arrays are the caller's to free, also where this raises."""
    cdef int i
    texts[0] = <const char **>calloc(len(prelude) + 1, sizeof(char *))
    sizes[0] = <uint32_t *>calloc(len(prelude) + 1, sizeof(uint32_t))
    if texts[0] == NULL or sizes[0] == NULL:
        raise MemoryError()
    for i in range(<int>len(prelude)):
        texts[0][i] = PyBytes_AS_STRING(<bytes>prelude[i])
        sizes[0][i] = <uint32_t>PyBytes_GET_SIZE(<bytes>prelude[i])
    return 0


cdef class EventLog:
    """The one writer of a log folder. Not safe for two threads at once; the engine holds its lock around each append.

    sync_us: 0 = every answer waits for its sync, -1 = never, else microseconds between syncs. max_age_us: a segment
    that has held an event for so long is sealed although it is not full (0: never). prelude: JSON of the schemas.
    watched: paths that must go on naming what they name now, else the log is gone. Raises LogError with the system's
    reason; not for a full disk: then appends are refused until there is room.
    """

    def __cinit__(self, str folder, int64_t log_id, uint64_t number, int64_t next_sequence, uint64_t segment_bytes,
                  int64_t sync_us, int64_t max_age_us, list prelude, list sources, list watched):
        cdef int error = 0
        cdef int i
        cdef int n = len(prelude)
        cdef bytes path = os.fsencode(folder)
        cdef list paths = [os.fsencode(os.path.abspath(p)) for p in watched]
        cdef const char **places = <const char **>calloc(len(paths) + 1, sizeof(char *))
        cdef Source source
        self.api = ps_log_get_api()
        self.log_id = log_id
        self.sync_us = sync_us
        self.folder = folder
        self.pid = os.getpid()
        self.sources = sources
        self.segment_bytes = segment_bytes
        cdef const char **texts = NULL
        cdef uint32_t *sizes = NULL
        cdef int64_t **marks = <int64_t **>calloc(len(sources) + 1, sizeof(void *))
        try:
            if marks == NULL or places == NULL:
                raise MemoryError()
            for i in range(<int>len(paths)):
                places[i] = PyBytes_AS_STRING(<bytes>paths[i])
            bodies_of(prelude, &texts, &sizes)
            for i, source in enumerate(sources):
                marks[i] = &source.c.watermark
            self.ptr = ps_log_open(PyBytes_AS_STRING(path), places, <int>len(paths), <uint64_t>log_id, number, next_sequence,
                                   segment_bytes, sync_us, max_age_us, texts, sizes, n, marks, len(sources), &error)
        finally:
            free(texts)
            free(sizes)
            free(marks)
            free(places)
        if self.ptr == NULL:
            why = os.strerror(error)
            if error == EMSGSIZE:
                why = f"a segment of {segment_bytes} bytes has no room for the schemas of the app and an event"
            raise LogError(f"{folder}: cannot write the event log: {why}")

    def __dealloc__(self):
        # Nobody is inside: whoever waits holds a reference.
        if self.ptr != NULL:
            if os.getpid() == self.pid:
                ps_log_stop(self.ptr)
                ps_log_free(self.ptr)
            else:
                ps_log_abandon(self.ptr)

    def close(self):
        """Sync, seal the segment, and end the log's thread. Raises LogError where the disk failed."""
        cdef ps_log *log = self.ptr
        cdef int error
        self.ptr = NULL
        if log == NULL:
            return
        if os.getpid() != self.pid:
            ps_log_abandon(log)
            return
        self.closing = True
        with nogil:
            ps_log_stop(log)
        while self.users:
            with nogil:
                usleep(100)
        with nogil:
            error = ps_log_free(log)
        self.failed = error
        self.closing = False
        if error:
            raise LogError(f"{self.folder}: closing the event log: {os.strerror(error)}")

    cdef int check_owner(self) except -1:
        if os.getpid() != self.pid:
            raise LogError(f"{self.folder}: the event log is written by process {self.pid}; this one was forked from it")
        return 0

    @property
    def closed(self):
        return self.ptr == NULL

    @property
    def position(self):
        """Bytes ever written."""
        return self.api.position(self.ptr) if self.ptr != NULL else 0

    def begin(self):
        """Begin a new segment now, unless the current one is new; within the engine's lock. Raises LogError."""
        cdef int error = ps_log_begin(self.ptr) if self.ptr != NULL else 0
        if error:
            raise LogError(f"{self.folder}: no new segment can be begun: {os.strerror(error)}")

    def set_prelude(self, list prelude):
        """Other schemas from now on; within the engine's lock. The next append begins a new segment. Raises LogError."""
        cdef const char **texts = NULL
        cdef uint32_t *sizes = NULL
        cdef int error = 0
        if self.ptr == NULL:
            return
        try:
            bodies_of(prelude, &texts, &sizes)
            error = ps_log_set_prelude(self.ptr, texts, sizes, <int>len(prelude))
        finally:
            free(texts)
            free(sizes)
        if error:
            why = os.strerror(error)
            if error == EMSGSIZE:
                why = f"a segment of {self.segment_bytes} bytes has no room for the schemas of the app and an event"
            raise LogError(f"{self.folder}: the event log cannot take other schemas: {why}")

    @property
    def has_spare(self):
        """Whether the next segment can be begun without waiting for its file."""
        return self.ptr == NULL or ps_log_has_spare(self.ptr) != 0

    def roll(self):
        """The next event begins a new segment."""
        if self.ptr != NULL:
            ps_log_roll(self.ptr)

    def wait(self, position=None):
        """Wait until everything up to a position (default: all) is on disk. Raises LogError where the disk failed."""
        cdef ps_log *log = self.ptr
        cdef uint64_t until
        cdef int error
        while self.closing:  # closing syncs: what was appended before is on disk when it is done
            with nogil:
                usleep(100)
        error = self.failed
        if log != NULL:
            self.check_owner()
            until = self.api.position(log) if position is None else position
            self.users += 1
            with nogil:
                error = ps_log_wait(log, until)
            self.users -= 1
        if error:
            raise LogError(f"{self.folder}: not synced: {self.why(error)}")

    @property
    def state(self):
        """One of STATES as of now; "refusing" once it is closed."""
        if self.ptr != NULL:
            ps_log_look(self.ptr)
        return STATES[ps_log_state(self.ptr)] if self.ptr != NULL else "refusing"

    @property
    def taking(self):
        """None, or why no event is taken now, in words."""
        if self.ptr == NULL:
            return f"{self.folder}: the event log is closed"
        ps_log_look(self.ptr)
        cdef int error = ps_log_error(self.ptr)
        return f"{self.folder}: the event log takes no events: {self.why(error)}" if error else None

    cdef str why(self, int error):
        if self.ptr != NULL and ps_log_state(self.ptr) == PS_LOG_GONE:
            return "the log folder was removed or replaced while it is written; put it back, or start anew"
        return os.strerror(error) if error else "unknown reason"

    def error_text(self):
        """Why the last append was refused."""
        cdef int error = ps_log_refused(self.ptr) if self.ptr != NULL else 0
        if error == EMSGSIZE:
            most = min(<uint64_t>PS_RECORD_MOST, self.segment_bytes)
            return f"{self.folder}: the event is too large for a segment of the event log (of at most {most} bytes)"
        return self.taking or f"{self.folder}: the event log takes no events: {self.why(error)}"

    def stats(self):
        """LogStats: counts since it was opened, and how it stands."""
        cdef ps_log_stats s
        if self.ptr == NULL:
            return LogStats(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, "refusing", self.failed, 0, 0, 0, 0, 0)
        self.check_owner()
        ps_log_look(self.ptr)
        ps_log_get_stats(self.ptr, &s)
        return LogStats(s.position, s.synced, s.segments, s.number, s.syncs, s.rolls, s.waits, s.longest_sync_us,
                        s.clock_steps, s.last_step_us, STATES[s.state], s.error, s.spare_error, s.unsynced_us,
                        s.longest_unsynced_us, s.late_syncs, s.last_late_us)


def segment_head(const uint8_t[::1] data):
    """The header of a segment, or None where it is none. `whole`: its checksum holds."""
    cdef ps_segment_head head
    if data.shape[0] < PS_SEGMENT_HEAD:
        return None
    memcpy(&head, &data[0], sizeof(head))
    if head.magic != PS_LOG_MAGIC:
        return None
    return SegmentHead(head.format, <int64_t>head.log_id, head.number, head.first_sequence, head.created, head.capacity,
                       head.crc == ps_segment_head_crc(&head))


def segment_mark(const uint8_t[::1] data):
    """The newest whole mark of a segment's header, or None: up to where it is on disk, and its end where it is sealed."""
    cdef ps_segment_mark mark
    if data.shape[0] < PS_SEGMENT_HEAD or not ps_segment_last_mark(<const char *>&data[0], &mark):
        return None
    return SegmentMark(mark.synced, mark.end, mark.last_sequence)


#: A schema as RecordSchemas wants it. fields: (name, type, 0; 1: cannot be null; 2: is the event's time); versions: of an event that was applied, or
#: of a score; actions, models, failures, reasons: how many words there are; arms: how many per experiment.
RecordLayout = namedtuple(
    "RecordLayout", "is_score fields versions actions models failures reasons arms", defaults=(0, 0, 0, 0, ())
)


cdef class RecordSchemas:
    """What the records of a segment must be like: RecordLayouts by schema number. prelude: the offset at which its
    schemas and its mark end; 0: only events and scores may be read."""

    def __cinit__(self, list layouts, uint64_t prelude=0):
        cdef int i, k
        cdef ps_record_schema *s
        self.n = len(layouts)
        self.keep = []
        self.fields = []
        if self.n > 256:
            raise LogError("more than 256 schemas in one segment")
        self.all = <ps_record_schema *>calloc(self.n + 1, sizeof(ps_record_schema))
        if self.all == NULL:
            raise MemoryError()
        self.c.all = self.all
        self.c.n = self.n
        self.c.prelude = prelude
        for i, layout in enumerate(layouts):
            s = &self.all[i]
            types = bytes([TYPE_CODES[type] for _, type, _ in layout.fields] + [0])
            required = bytes([required for _, _, required in layout.fields] + [0])
            checked = [
                k for k, (_, type, needed) in enumerate(layout.fields)
                if type == "string" or not layout.is_score and (type == "bool" or needed == PS_REQUIRED_TIME)
            ]
            checked = array("H", checked + [0])
            self.keep.append((types, required, checked))
            self.fields.append([name for name, _, _ in layout.fields])
            s.is_score = layout.is_score
            s.n_versions = layout.versions
            s.n_fields = len(layout.fields)
            s.types = <const uint8_t *>PyBytes_AS_STRING(types)
            s.required = <const uint8_t *>PyBytes_AS_STRING(required)
            s.checked = <const uint16_t *><uintptr_t>checked.buffer_info()[0]
            s.n_checked = len(checked) - 1
            s.n_actions = layout.actions
            s.n_models = layout.models
            s.n_failures = layout.failures
            s.n_reasons = layout.reasons
            s.n_experiments = len(layout.arms)
            if s.n_experiments > PS_MOST_EXPERIMENTS:
                raise LogError(f"more than {PS_MOST_EXPERIMENTS} experiments in one schema")
            for k in range(s.n_experiments):
                s.n_arms[k] = layout.arms[k]

    def __dealloc__(self):
        free(self.all)

    cdef object refusal(self, const ps_record *r, uint64_t offset):
        """The error for a record that checks, and is not of its schema."""
        cdef int field = -1
        cdef const char *found = ps_record_misfit(r, offset, &self.c, &field)
        what = f"{KINDS[r.kind]} {r.sequence}" if r.kind in (PS_RECORD_EVENT, PS_RECORD_SCORE) else KINDS[r.kind]
        if field >= 0:
            what = f"{what}, field {self.fields[r.schema][field]}"
        why = (<bytes>found).decode() if found != NULL else "it is no record"
        return LogError(f"at offset {offset}: damaged: {what}: {why} (its checksum holds: it was changed, or written "
                        "wrongly). Nothing was changed; restore the file from a copy")


def scan(const uint8_t[::1] data, int64_t log_id, uint64_t number, uint64_t start=PS_SEGMENT_HEAD,
         RecordSchemas schemas=None):
    """Check every record from an offset on; stops at the first that was not finished or is damaged. With `schemas` it
    raises LogError at one that checks, and is not of its schema or is not the event that should follow."""
    cdef uint64_t at = start
    cdef uint64_t size = data.shape[0]
    cdef int64_t length = 0
    cdef int64_t records = 0, events = 0, scores = 0, first = -1, last = -1, ingest = -(<int64_t>1 << 62)
    cdef const char *base
    cdef const ps_record *r
    if size == 0:
        return Scan(start, "end", 0, 0, 0, None, None, None)
    base = <const char *>&data[0]
    with nogil:
        while True:
            if schemas is None:
                length = ps_record_check(base, size, at, <uint64_t>log_id, number)
            else:
                length = ps_record_read(base, size, at, <uint64_t>log_id, number, &schemas.c)
            if length <= 0:
                break
            r = <const ps_record *>(base + at)
            records += 1
            if r.kind == PS_RECORD_EVENT:
                if schemas is not None and events and r.sequence != last + 1:
                    with gil:
                        if r.sequence > last:
                            raise LogError(f"events {last + 1} to {r.sequence - 1} are missing before offset {at}")
                        raise LogError(f"at offset {at}: damaged: event {r.sequence} stands where event {last + 1} should. "
                                       "Nothing was changed; restore the file from a copy")
                events += 1
                if first < 0:
                    first = r.sequence
                last = r.sequence
                if r.ingest_time > ingest:
                    ingest = r.ingest_time
            elif r.kind == PS_RECORD_SCORE:
                scores += 1
            at += length
    if length == PS_RECORD_MISFIT:
        raise schemas.refusal(<const ps_record *>(base + at), at)
    return Scan(at, "damaged" if length < 0 else "end", records, events, scores, first if events else None,
                last if events else None, ingest if events else None)


def ingest_times(const uint8_t[::1] data, int64_t log_id, uint64_t number, uint64_t start, uint64_t end):
    """Sequence and ingest time of every event between two offsets, as 16 bytes each (int64, int64)."""
    cdef uint64_t at = start
    cdef int64_t length
    cdef int64_t n = 0
    cdef const char *base = <const char *>&data[0] if data.shape[0] else NULL
    cdef const ps_record *r
    cdef int64_t *out
    cdef uint64_t size = min(end, <uint64_t>data.shape[0])
    cdef bytes found = PyBytes_FromStringAndSize(NULL, 16 * ((size - start) // PS_RECORD_HEAD + 1) if size > start else 16)
    out = <int64_t *>PyBytes_AS_STRING(found)
    with nogil:
        while at < size:
            length = ps_record_check(base, size, at, <uint64_t>log_id, number)
            if length <= 0:
                break
            r = <const ps_record *>(base + at)
            if r.kind == PS_RECORD_EVENT:
                out[2 * n] = r.sequence
                out[2 * n + 1] = r.ingest_time
                n += 1
            at += length
    return found[:16 * n]


def resync(const uint8_t[::1] data, int64_t log_id, uint64_t number, uint64_t start):
    """The offset of the next record that checks, at or behind `start`; the size of the data where there is none."""
    cdef uint64_t at = start
    cdef uint64_t size = data.shape[0]
    if size == 0:
        return 0
    with nogil:
        at = ps_record_resync(<const char *>&data[0], size, start, <uint64_t>log_id, number)
    return at


def record_at(const uint8_t[::1] data, int64_t log_id, uint64_t number, uint64_t offset):
    """The record at an offset, or None where none checks. body: the bytes behind its head; versions: those that it has
    room for."""
    cdef uint64_t size = data.shape[0]
    cdef const char *base
    cdef const ps_record *r
    cdef int64_t length
    cdef int i
    if size == 0:
        return None
    base = <const char *>&data[0]
    length = ps_record_check(base, size, offset, <uint64_t>log_id, number)
    if length <= 0:
        return None
    r = <const ps_record *>(base + offset)
    versions = ()
    if ps_record_fixed(r.kind == PS_RECORD_SCORE, r.n_versions, 0) <= r.length:
        versions = tuple(ps_record_versions(r)[i] for i in range(r.n_versions))
    body = <const char *>(r + 1)
    return Record(offset, length, KINDS[r.kind], r.schema, r.outcome, r.sequence, r.ingest_time, versions,
                  PyBytes_FromStringAndSize(body, length - PS_RECORD_HEAD))


def put_record(unsigned char[::1] data, int64_t log_id, uint64_t number, uint64_t offset, uint32_t length):
    """Give the record filled in at an offset its length and checksum (for tools that write segments anew)."""
    cdef ps_record *r
    if offset % 8 or length % 8 or offset + length > <uint64_t>data.shape[0] or length < PS_RECORD_HEAD:
        raise ValueError("a record lies on a multiple of 8 bytes, within the segment")
    r = <ps_record *>&data[offset]
    r.length = length
    r.crc = ps_record_crc(r, length, ps_record_seed(<uint64_t>log_id, number, offset))


def put_sealed(unsigned char[::1] data, uint64_t end, int64_t last_sequence):
    """Mark a segment as complete: its records end at an offset."""
    cdef ps_segment_mark last
    if data.shape[0] < PS_SEGMENT_HEAD:
        raise ValueError("a segment begins with a header of one page")
    if not ps_segment_last_mark(<const char *>&data[0], &last):
        last.turn = 0
    ps_segment_put_mark(<char *>&data[0], last.turn + 1, end, end, last_sequence)


def put_head(unsigned char[::1] data, int64_t log_id, uint64_t number, int64_t first_sequence, int64_t created):
    """Write a segment's header (for tools that write segments anew)."""
    cdef ps_segment_head *head
    if data.shape[0] < PS_SEGMENT_HEAD:
        raise ValueError("a segment begins with a header of one page")
    head = <ps_segment_head *>&data[0]
    head.magic = PS_LOG_MAGIC
    head.format = PS_LOG_FORMAT
    head.log_id = <uint64_t>log_id
    head.number = number
    head.first_sequence = first_sequence
    head.created = created
    head.capacity = data.shape[0]
    head.crc = ps_segment_head_crc(head)
