# event_ids.pyx (control path): Python's view of event ids and of kept decisions, for their owner and for tests.
#
# The hot path does not come through here: the engine core calls ids.api with ids.ptr (event_ids.pxd). Neither class is
# safe to use from two threads at once; the engine holds its lock around every call.

import os
from collections import namedtuple

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

SEED_BYTES = 16
LEAST_LIMIT = PS_IDS_LEAST
LEAST_KEPT = PS_KEEP_LEAST
MOST_LIMIT = PS_IDS_MOST

Entry = namedtuple("Entry", "pipeline position has_decision")
Stats = namedtuple("Stats", "ids bytes forgotten forgotten_early limit floor")
KeptStats = namedtuple("KeptStats", "kept bytes limit oldest")

cdef enum:
    FEW = 16


cdef uint64_t _within(object value, uint64_t end, str what) except? 0:
    if not isinstance(value, int) or not 0 <= value < end:
        raise ValueError(f"{what}: expected an integer within 0..{end - 1}, got {value!r}")
    return value


cdef int64_t _time(object value, str what) except? -1:
    if not isinstance(value, int) or not -(1 << 61) <= value <= 1 << 61:
        raise ValueError(f"{what}: expected microseconds within -2^61..2^61, got {value!r}")
    return value


cdef uint64_t _limit(object value, uint64_t least) except 0:
    if not isinstance(value, int) or not least <= value <= PS_IDS_MOST:
        raise ValueError(f"limit: expected bytes within {least}..{PS_IDS_MOST}, got {value!r}")
    return value


cdef class EventIds:
    """The event ids of one event type that a retry may still send; see id_table.h."""

    def __cinit__(self, seed=None, limit=None, hash_mask=(1 << 128) - 1):
        cdef uint64_t words[2]
        self.api = ps_ids_get_api()
        if seed is None:
            seed = os.urandom(SEED_BYTES)
        if not isinstance(seed, bytes) or len(seed) != SEED_BYTES:
            raise ValueError(f"seed: expected {SEED_BYTES} bytes, got {seed!r}")
        memcpy(words, PyBytes_AS_STRING(seed), SEED_BYTES)
        self._mask[0] = hash_mask & ((1 << 64) - 1)
        self._mask[1] = hash_mask >> 64
        self.ptr = ps_ids_create(words, PS_IDS_MOST if limit is None else _limit(limit, PS_IDS_LEAST))
        if self.ptr == NULL:
            raise MemoryError("no memory for a table of event ids")

    def __dealloc__(self):
        ps_ids_free(self.ptr)

    cdef int hash_of(self, object id, ps_hash128 *hash) except -1:
        cdef Py_ssize_t n = 0
        cdef const char *text
        if type(id) is str:
            text = PyUnicode_AsUTF8AndSize(id, &n)
            hash[0] = self.api.hash_text(self.ptr, text, n)
        elif type(id) is int:
            hash[0] = self.api.hash_int(self.ptr, id)
        else:
            raise TypeError(f"event id: expected a string or an integer, got {id!r}")
        hash.lo &= self._mask[0]
        hash.hi &= self._mask[1]
        return 0

    def hash(self, id):
        """The keyed hash of an id, 128 bits."""
        cdef ps_hash128 h
        self.hash_of(id, &h)
        return h.hi << <object>64 | h.lo

    def put(self, id, pipeline, position, has_decision=True):
        """The record of this id and pipeline stands at this position from now on."""
        cdef ps_hash128 h
        cdef uint32_t p = <uint32_t>_within(pipeline, PS_IDS_PIPELINES, "pipeline")
        cdef uint64_t at = _within(position, PS_IDS_POSITIONS, "position")
        self.hash_of(id, &h)
        self.api.put(self.ptr, &h, p, at, bool(has_decision))

    def put_many(self, list ids, pipeline, position, has_decision=True):
        """put() for each id, at positions that rise by one."""
        cdef ps_hash128 h
        cdef uint32_t p = <uint32_t>_within(pipeline, PS_IDS_PIPELINES, "pipeline")
        cdef uint64_t at = _within(position, PS_IDS_POSITIONS - len(ids), "position")
        cdef int decided = bool(has_decision)
        for id in ids:
            self.hash_of(id, &h)
            self.api.put(self.ptr, &h, p, at, decided)
            at += 1

    def find(self, id):
        """The entries of an id, by pipeline; empty: it is not known."""
        cdef ps_hash128 h
        cdef ps_id_entry few[FEW]
        cdef ps_id_entry *entries = few
        cdef int i, n
        self.hash_of(id, &h)
        n = self.api.find_all(self.ptr, &h, few, FEW)
        if n > FEW:
            entries = <ps_id_entry *>malloc(n * sizeof(ps_id_entry))
            if entries == NULL:
                raise MemoryError
            self.api.find_all(self.ptr, &h, entries, n)
        try:
            return sorted([Entry(entries[i].pipeline, entries[i].position, bool(entries[i].has_decision))
                           for i in range(n)])
        finally:
            if entries != few:
                free(entries)

    def decided(self, id, pipeline):
        """The position of this pipeline's decision; None: it made none. Whether the id is known says `in`."""
        cdef ps_hash128 h
        cdef ps_id_entry entry
        cdef uint32_t p = <uint32_t>_within(pipeline, PS_IDS_PIPELINES, "pipeline")
        self.hash_of(id, &h)
        return entry.position if self.api.find(self.ptr, &h, p, &entry) == PS_ID_DECIDED else None

    def __contains__(self, id):
        cdef ps_hash128 h
        cdef ps_id_entry entry
        self.hash_of(id, &h)
        return self.api.find(self.ptr, &h, 0, &entry) != PS_ID_UNKNOWN

    def count_known(self, list ids):
        """How many of the ids are known."""
        cdef ps_hash128 h
        cdef ps_id_entry entry
        cdef Py_ssize_t n = 0
        for id in ids:
            self.hash_of(id, &h)
            n += self.api.find(self.ptr, &h, 0, &entry) != PS_ID_UNKNOWN
        return n

    def forget_before(self, position):
        """Forgets, at once, every entry whose position is smaller."""
        self.api.forget_before(self.ptr, _within(position, PS_IDS_POSITIONS + 1, "position"))

    def tend(self, n):
        """Gives back the memory of at most n forgotten entries; how many there were."""
        return self.api.tend(self.ptr, <uint32_t>_within(n, 1 << 32, "n"))

    def advance(self, watermark, position, remember):
        """The record at `position`, the next to be put, leaves this watermark behind; forgets what it may (id_table.h).

        watermark and remember in microseconds.
        """
        cdef int64_t kept = _time(remember, "remember")
        if kept < 0:
            raise ValueError(f"remember: expected microseconds from 0 on, got {remember!r}")
        self.api.advance(self.ptr, _time(watermark, "watermark"), _within(position, PS_IDS_POSITIONS, "position"), kept)

    def stats(self):
        cdef ps_ids_stats s
        self.api.stats(self.ptr, &s)
        return Stats(s.ids, s.bytes, s.forgotten, s.forgotten_early, s.limit, s.floor)

    def check(self):
        """For tests: None, or what is wrong inside. Takes time in proportion to the size."""
        cdef const char *wrong = ps_ids_check(self.ptr)
        return None if wrong == NULL else wrong.decode()


cdef class KeptDecisions:
    """First decisions where there is no log: the newest that fit into `limit` bytes; see id_table.h."""

    def __cinit__(self, limit):
        self.api = ps_keep_get_api()
        self.ptr = ps_keep_create(_limit(limit, PS_KEEP_LEAST))
        if self.ptr == NULL:
            raise MemoryError("no memory to keep decisions in")

    def __dealloc__(self):
        ps_keep_free(self.ptr)

    @property
    def next(self):
        """Positions given so far are below it, and those that come are not."""
        return self.api.next(self.ptr)

    def put(self, bytes packed not None):
        """The position of these bytes: above 0, larger each time."""
        return self.api.put(self.ptr, PyBytes_AS_STRING(packed), PyBytes_GET_SIZE(packed))

    def get(self, position):
        """The bytes, or None: written over since, or larger than all there is room for."""
        cdef uint64_t n = 0
        cdef const void *at = self.api.get(self.ptr, _within(position, PS_IDS_POSITIONS, "position"), &n)
        return None if at == NULL else PyBytes_FromStringAndSize(<const char *>at, n)

    def stats(self):
        cdef ps_keep_stats s
        self.api.stats(self.ptr, &s)
        return KeptStats(s.kept, s.bytes, s.limit, s.oldest)
