# windows.pyx (control path): Python's view of window state, for tests, tools, snapshots and the engine's set-up.
#
# The hot path does not come through here: the engine core calls store.api with store.ptr (windows.pxd). A WindowStore
# is not safe to use from two threads at once; the engine holds its lock around every call.

import os
from collections import namedtuple

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

TYPES = ("float64", "int64", "bool", "timestamp", "string")
FUNCTIONS = ("count", "count_col", "sum", "mean", "min", "max", "var_samp", "var_pop", "stddev_samp", "stddev_pop",
             "first", "last", "distinct_count")
CLOSED = ("right", "both", "left")
SEED_BYTES = 16

INVALID = 0
PRESENT = 1
NULL_VALUE = 2
NOT_FOUND = 3
OUTSIDE_MAX_AGE = 4

Output = namedtuple("Output", "function column where window closed ttl", defaults=(None, None, None, "right", None))
Stats = namedtuple("Stats", "entities events applied bytes_used bytes_mapped strings watermark")


cdef int _number(object value, str what) except? -1:
    if value is None:
        return -1
    if not isinstance(value, int) or not 0 <= value < 32768:
        raise ValueError(f"{what}: expected an index, got {value!r}")
    return value


cdef int64_t _microseconds(object value, str what) except? -1:
    if not isinstance(value, int) or not 0 <= value < 1 << 59:
        raise ValueError(f"{what}: expected microseconds within 0..2^59, got {value!r}")
    return value


cdef class WindowStore:
    """Exact window state of one (source, entity); see window_state.h."""

    def __cinit__(self, columns, outputs, groups=None, lateness=0, n_where=0, fingerprint=0, max_bytes=0,
                  retention=None, seed=None):
        cdef ps_layout layout
        cdef int error = 0
        cdef uint32_t at = 0
        cdef ps_output *o
        cdef int i
        self.api = ps_store_get_api()
        memset(&self._arena, 0, sizeof(ps_arena))
        self.columns = tuple(columns)
        self.outputs = tuple(outputs)
        self.groups = tuple(groups) if groups is not None else (len(self.outputs),)
        if not isinstance(n_where, int) or not 0 <= n_where <= 63:
            raise ValueError(f"n_where: expected 0..63, got {n_where!r}")
        self.lateness = _microseconds(lateness, "lateness")
        self.retention = retention
        self.n_where = n_where
        self.fingerprint = fingerprint
        for c, name in enumerate(self.columns):
            if name not in TYPES:
                raise ValueError(f"columns[{c}]: expected one of {', '.join(TYPES)}, got {name!r}")
        for g, size in enumerate(self.groups):
            if not isinstance(size, int) or not 0 <= size <= len(self.outputs):
                raise ValueError(f"groups[{g}]: expected a number of outputs, got {size!r}")
        column_types = bytes([TYPES.index(name) for name in self.columns])
        cdef ps_output *c_outputs = <ps_output *>calloc(len(self.outputs) + 1, sizeof(ps_output))
        cdef uint32_t *c_groups = <uint32_t *>calloc(len(self.groups) + 1, sizeof(uint32_t))
        try:
            if c_outputs == NULL or c_groups == NULL:
                raise MemoryError
            for i, output in enumerate(self.outputs):
                o = &c_outputs[i]
                if output.function not in FUNCTIONS:
                    raise ValueError(f"outputs[{i}].function: expected one of {', '.join(FUNCTIONS)}, "
                                     f"got {output.function!r}")
                if output.closed not in CLOSED:
                    raise ValueError(f"outputs[{i}].closed: expected one of {', '.join(CLOSED)}, got {output.closed!r}")
                o.function = FUNCTIONS.index(output.function)
                o.closed = CLOSED.index(output.closed)
                o.column = _number(output.column, f"outputs[{i}].column")
                o.where = _number(output.where, f"outputs[{i}].where")
                o.length = PS_LIFETIME
                if output.window is not None:
                    o.length = _microseconds(output.window, f"outputs[{i}].window")
                    if o.length == 0 and output.closed != "both":
                        raise ValueError(f"outputs[{i}].window: a window must be longer than 0 (None is Lifetime)")
                o.ttl = PS_NO_TTL if output.ttl is None else _microseconds(output.ttl, f"outputs[{i}].ttl")
            for i, size in enumerate(self.groups):
                c_groups[i] = size
            layout.columns = <const uint8_t *>PyBytes_AS_STRING(column_types)
            layout.n_columns = len(self.columns)
            layout.outputs = c_outputs
            layout.n_outputs = len(self.outputs)
            layout.groups = c_groups
            layout.n_groups = len(self.groups)
            layout.n_where = self.n_where
            layout.lateness = self.lateness
            layout.retention = PS_NO_RETENTION if retention is None else _microseconds(retention, "retention")
            layout.fingerprint = self.fingerprint
            layout.max_bytes = max_bytes
            _fill_seed(layout.seed, os.urandom(SEED_BYTES) if seed is None else seed)
            self.ptr = ps_store_create(&layout, &error, &at)
            if self.ptr == NULL:
                if error == PS_STORE_MEMORY:
                    raise MemoryError(self.error_text(error))
                if PS_STORE_LAYOUT_COLUMN <= error < PS_STORE_LAYOUT_SIZE and at < <uint32_t>len(self.outputs):
                    raise ValueError(f"outputs[{at}] ({self.outputs[at].function}): {self.error_text(error)}")
                raise ValueError(self.error_text(error))
            self.output_types = tuple([TYPES[ps_output_type(&layout, i)] for i in range(len(self.outputs))])
        finally:
            free(c_outputs)
            free(c_groups)
        self._starts = [sum(self.groups[:g]) for g in range(len(self.groups))]
        self._values = <ps_slot *>calloc(len(self.columns) + 1, sizeof(ps_slot))
        self._status = <uint8_t *>calloc(len(self.columns) + 1, 1)
        self._out = <ps_slot *>calloc(len(self.outputs) + 1, sizeof(ps_slot))
        self._out_status = <uint8_t *>calloc(len(self.outputs) + 1, 1)
        if self._values == NULL or self._status == NULL or self._out == NULL or self._out_status == NULL:
            raise MemoryError

    def __dealloc__(self):
        ps_store_free(self.ptr)
        free(self._values)
        free(self._status)
        free(self._out)
        free(self._out_status)
        free(self._arena.data)

    @staticmethod
    def error_text(int code):
        """The text of an error code of apply or read."""
        return ps_store_error_text(code).decode()

    cdef int _fill_event(self, ps_event *e, bytearray arena, object event_time, object values, object where_mask,
                         object ingest_time, object log_id, object sequence) except -1:
        cdef Py_ssize_t c
        if len(values) != len(self.columns):
            raise ValueError(f"expected {len(self.columns)} values, got {len(values)}")
        for c in range(len(self.columns)):
            value = values[c]
            name = self.columns[c]
            self._values[c].u = 0
            if value is None:
                self._status[c] = PS_NULL_VALUE
                continue
            self._status[c] = PS_PRESENT
            if name == "float64":
                self._values[c].f = value
            elif name == "string":
                text = value.encode()
                self._values[c].u = PS_STR(len(arena), len(text))
                arena += text
            else:
                self._values[c].i = value
        e.event_time = event_time
        e.ingest_time = ingest_time
        e.log_id = log_id
        e.sequence = sequence
        e.values = self._values
        e.status = self._status
        e.where_mask = where_mask
        e.arena = <const char *>arena
        return 0

    cdef object _raise(self, int code):
        if code == PS_STORE_MEMORY:
            raise MemoryError(self.error_text(code))
        raise ValueError(self.error_text(code))

    def apply(self, key, event_time, values=(), where_mask=0, ingest_time=0, log_id=0, sequence=0):
        """Apply one event; returns the entity's version. Raises ValueError or MemoryError, and then changes nothing."""
        cdef ps_key k
        cdef ps_event e
        cdef int code
        cdef ps_handle h
        cdef bytes text
        arena = bytearray()
        self._fill_event(&e, arena, event_time, values, where_mask, ingest_time, log_id, sequence)
        text = _fill_key(&k, key)
        h = self.api.find_or_create(self.ptr, &k, self.api.hash(self.ptr, &k))
        if h == 0:
            self._raise(PS_STORE_MEMORY)
        code = self.api.apply(self.ptr, h, &e)
        if code:
            self.api.forget_unused(self.ptr, h)
            self._raise(code)
        return self.api.version(self.ptr, h)

    def read(self, key, group=0, as_of=0, extra=None):
        """The group's outputs as (value, status); extra, (event_time, values[, where_mask]), counts as applied.

        A sum beyond int64 comes back as a float; a null as None."""
        cdef ps_key k
        cdef ps_event e
        cdef ps_event *pe = NULL
        cdef int code, i
        cdef ps_handle h
        cdef bytes text
        arena = bytearray()
        if not 0 <= group < len(self.groups):
            raise ValueError(f"group: expected 0..{len(self.groups) - 1}, got {group}")
        if extra is not None:
            mask = extra[2] if len(extra) > 2 else 0
            self._fill_event(&e, arena, extra[0], extra[1], mask, 0, 0, 0)
            pe = &e
        text = _fill_key(&k, key)
        h = self.api.find(self.ptr, &k, self.api.hash(self.ptr, &k))
        self._arena.used = 0
        code = self.api.read(self.ptr, h, group, as_of, pe, self._out, self._out_status, &self._arena)
        if code:
            self._raise(code)
        result = []
        start = self._starts[group]
        for i in range(self.groups[group]):
            status = self._out_status[i]
            name = self.output_types[start + i]
            if status & 0x7f != PS_PRESENT:
                value = None
            elif name == "float64" or status & PS_WIDE:
                value = self._out[i].f
            elif name == "bool":
                value = self._out[i].i != 0
            elif name == "string":
                value = self._arena.data[PS_STR_OFFSET(self._out[i].u):
                                         PS_STR_OFFSET(self._out[i].u) + PS_STR_LENGTH(self._out[i].u)].decode()
            else:
                value = self._out[i].i
            result.append((value, status & 0x7f))
        return result

    def version(self, key):
        """Events ever applied to the entity; 0 if unknown."""
        cdef ps_key k
        cdef bytes text = _fill_key(&k, key)
        return self.api.version(self.ptr, self.api.find(self.ptr, &k, self.api.hash(self.ptr, &k)))

    def log_position(self, key):
        """(log id, sequence) of the entity's last applied event; (0, 0) if unknown."""
        cdef ps_key k
        cdef int64_t log_id, sequence
        cdef bytes text = _fill_key(&k, key)
        self.api.log_position(self.ptr, self.api.find(self.ptr, &k, self.api.hash(self.ptr, &k)), &log_id, &sequence)
        return log_id, sequence

    def miss_before(self, int64_t time):
        """Events before this time may never have come here: what would need them is INVALID from now on."""
        self.api.miss_before(self.ptr, time)

    def sweep(self, watermark, max_entities=64):
        """Release up to max_entities idle entities, looking at a bounded number; returns how many were released."""
        return self.api.sweep(self.ptr, watermark, max_entities)

    def erase(self, key):
        """Forget one entity altogether, its strings with it; whether it was known. No other entity changes."""
        cdef ps_key k
        cdef bytes text = _fill_key(&k, key)
        return self.api.erase(self.ptr, &k, self.api.hash(self.ptr, &k)) != 0

    def keys(self):
        """The keys of all entities, in no particular order; for tests and tools: the list is as long as the state."""
        cdef ps_key k
        cdef ps_handle h = self.api.next(self.ptr, 0)
        found = []
        while h:
            self.api.key(self.ptr, h, &k)
            found.append(k.i if k.is_int else k.str[:k.len].decode())
            h = self.api.next(self.ptr, h)
        return found

    @property
    def seed(self):
        """The secret seed of its hashes, 16 bytes: who knows it can make keys that collide."""
        cdef uint64_t seed[2]
        self.api.seed(self.ptr, seed)
        return PyBytes_FromStringAndSize(<const char *>seed, sizeof(seed))

    def reseed(self, bytes seed not None):
        """Hash everything anew with another seed. Raises MemoryError, and then nothing has changed."""
        cdef uint64_t words[2]
        _fill_seed(words, seed)
        cdef int code = self.api.reseed(self.ptr, words)
        if code:
            self._raise(code)

    def small_pages(self):
        """Grow by small pages from now on, also after a load: steadier, a little slower."""
        self.api.small_pages(self.ptr)

    def stats(self):
        cdef ps_store_stats s
        self.api.stats(self.ptr, &s)
        return Stats(s.entities, s.events, s.applied, s.bytes_used, s.bytes_mapped, s.strings, s.watermark)

    def dump(self):
        """The whole state as bytes, for load() into a store of the same layout."""
        cdef uint64_t size = 0
        cdef const void *data = ps_store_bytes(self.ptr, &size)
        return PyBytes_FromStringAndSize(<const char *>data, size)

    def load(self, const unsigned char[::1] data not None):
        """Replace the contents by what dump() of a store of the same layout gave. Raises ValueError or MemoryError."""
        cdef int code = ps_store_load(self.ptr, &data[0], data.shape[0]) if data.shape[0] else PS_STORE_DUMP_SIZE
        if code:
            self._raise(code)


def chunk_growth(uint32_t stride, uint32_t summaries):
    """The sizes that an entity's only chunk grows through, up to the full one: (bytes, head, capacity, is full)."""
    cdef ps_chunk_size sizes[64]
    cdef uint32_t i, n = ps_chunk_growth(stride, summaries, sizes, 64)
    return [(sizes[i].bytes, sizes[i].head, sizes[i].capacity, sizes[i].full != 0) for i in range(n)]


def format_1_damaged(uint32_t stride, uint32_t summaries):
    """Whether stores of format 1 with such records may hold overwritten memory."""
    return ps_format_1_damaged(stride, summaries) != 0


cdef int _fill_seed(uint64_t *words, bytes seed) except -1:
    if len(seed) != SEED_BYTES:
        raise ValueError(f"seed: expected {SEED_BYTES} bytes, got {len(seed)}")
    memcpy(words, PyBytes_AS_STRING(seed), SEED_BYTES)
    return 0


cdef bytes _fill_key(ps_key *k, object key):
    cdef bytes text = b""
    memset(k, 0, sizeof(ps_key))
    if isinstance(key, str):
        text = key.encode()
        k.str = PyBytes_AS_STRING(text)
        k.len = PyBytes_GET_SIZE(text)
    elif isinstance(key, int) and not isinstance(key, bool):
        k.is_int = 1
        k.i = key
    else:
        raise TypeError(f"key: expected str or int, got {key!r}")
    return text
