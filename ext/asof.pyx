# asof.pyx (hot path): the Python face of the point-in-time join: Arrow arrays in, row numbers and gathered buffers out.
# What must stay true: before the kernel reads a buffer its size is checked here, and it is kept alive while it is read.

from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdint cimport uintptr_t
from libc.stdlib cimport calloc, free, malloc

import numpy as np

KINDS = {
    "int8": 0, "int16": 1, "int32": 2, "int64": 3, "uint8": 4, "uint16": 5, "uint32": 6, "uint64": 7,
    "string": 8, "large_string": 9,
}
NOT_FOUND = PS_ASOF_NOT_FOUND
OUTSIDE_MAX_AGE = PS_ASOF_AGED
MOST_ROWS = PS_ASOF_MOST_ROWS
DEF TEXT32 = 8
DEF TEXT64 = 9
cdef tuple INT_BYTES = (1, 2, 4, 8, 1, 2, 4, 8)


class ColumnError(ValueError):
    """A column that cannot be read. row: its place in the column, or None."""

    def __init__(self, message, row=None):
        self.row = row
        super().__init__(message)


cdef int fail(int code, int64_t row) except -1:
    if code == PS_ASOF_MEMORY:
        raise MemoryError
    if code == PS_ASOF_BEYOND_INT64:
        raise ColumnError("the key is beyond 64 bits with a sign", row)
    raise ColumnError("the column is damaged: its offsets or indices lie outside its buffers", row)


cdef const void *address(buffer, int64_t least) except? NULL:
    # NULL only where nothing will be read.
    if least == 0:
        return NULL
    if buffer is None or buffer.size < least:
        raise ColumnError("the column is damaged: a buffer is too short")
    return <const void *><uintptr_t>buffer.address


cdef const int64_t *times_of(array, list keep) except? NULL:
    buffers = array.buffers()
    cdef int64_t offset = array.offset, n = len(array)
    if array.type.bit_width != 64:
        raise TypeError(f"times are 64-bit integers, got {array.type}")
    keep.append(buffers)
    return <const int64_t *>address(buffers[1], 8 * (offset + n) if n else 0) + offset


cdef int read_key(ps_key_column *c, array, KeyIndex keys, bint add, list keep) except -1:
    """The key column of one chunk. A dictionary's values are encoded at once, its rows when they are read."""
    cdef const uint32_t[::1] ids
    type = array.type
    c.length = len(array)
    c.offset = array.offset
    rows = array
    if hasattr(array, "dictionary"):
        values = array.dictionary
        encoded = np.empty(len(values), dtype=np.uint32)
        keys.encode([values], encoded, add)
        keep.append(encoded)
        ids = encoded
        c.n_ids = len(encoded)
        c.ids = &ids[0] if c.n_ids else NULL
        type = type.index_type
        c.kind = PS_ASOF_DICTIONARY
    buffers = rows.buffers()
    keep.append(buffers)
    kind = KINDS.get(str(type))
    if kind is None:
        raise TypeError(f"keys are strings or integers, got {array.type}")
    c.kind |= kind
    cdef int64_t n = c.offset + c.length if c.length else 0
    c.validity = <const uint8_t *>address(buffers[0], (n + 7) // 8 if buffers[0] is not None else 0)
    if kind in (TEXT32, TEXT64):
        c.values = address(buffers[1], (n + 1) * (4 if kind == TEXT32 else 8) if n else 0)
        if buffers[2] is not None:
            c.text_bytes = buffers[2].size
            c.text = <const uint8_t *><uintptr_t>buffers[2].address
        else:
            c.text = <const uint8_t *>PyBytes_AS_STRING(b"")
    else:
        c.values = address(buffers[1], n * <int>INT_BYTES[kind])
    return 0


cdef class KeyIndex:
    """Ids of the distinct keys of some columns: all text, or all integers."""

    def __cinit__(self):
        self.ptr = ps_keys_new()
        if self.ptr == NULL:
            raise MemoryError

    def __dealloc__(self):
        ps_keys_free(self.ptr)

    def __len__(self):
        return ps_keys_count(self.ptr)

    def encode(self, list chunks, uint32_t[::1] ids, bint add):
        """The id of every row of the column into `ids`, adding keys that are new, or only looking them up.
        `ids` None: only add."""
        cdef ps_key_column c
        cdef int64_t at = 0, start, row = -1, first = 0
        cdef uint32_t *out = NULL
        cdef int code = 0, n
        cdef list keep = []
        if add and self.fixed:
            raise ValueError("the keys are in use by a join")
        if ids is not None and sum(map(len, chunks)) != ids.shape[0]:
            raise ValueError("one id per row")
        for chunk in chunks:
            c = ps_key_column(0, 0, 0, NULL, NULL, NULL, 0, NULL, 0)
            read_key(&c, chunk, self, add, keep)
            if c.length == 0:
                continue
            if ids is not None:
                out = &ids[first]
            with nogil:
                if add:
                    code = ps_keys_add(self.ptr, &c, out, &row)
                else:
                    start = 0
                    while start < c.length and code == 0:
                        n = PS_ASOF_BLOCK if c.length - start > PS_ASOF_BLOCK else <int>(c.length - start)
                        code = ps_keys_find(self.ptr, &c, start, n, PS_ASOF_NO_ID, out + start, &row)
                        start += n
            if code:
                fail(code, first + row)
            first += c.length


def ordered(const int64_t[::1] times):
    """Whether times never fall."""
    cdef int result
    cdef int64_t previous
    if times.shape[0] == 0:
        return True
    previous = times[0]
    with nogil:
        result = ps_times_ordered(&times[0], times.shape[0], &previous)
    return bool(result)


def first_outside(const int64_t[::1] times, int64_t low, int64_t high):
    """The first row whose time is not within [low, high], or -1."""
    cdef int64_t row = -1
    if times.shape[0]:
        with nogil:
            row = ps_times_outside(&times[0], times.shape[0], low, high)
    return row


cdef class SpineOrder:
    """The order of spine rows by time, equal times by row: 12 bytes per row."""

    def __cinit__(self, const int64_t[::1] times):
        cdef int64_t i
        self.n = times.shape[0]
        if self.n > PS_ASOF_MOST_ROWS:
            raise ValueError(f"at most {PS_ASOF_MOST_ROWS} rows")
        self.entries = <ps_entry *>malloc(self.n * sizeof(ps_entry) + 1)
        if self.entries == NULL:
            raise MemoryError
        with nogil:
            for i in range(self.n):
                self.entries[i].at = times[i]
                self.entries[i].row = <uint32_t>i
            ps_sort_entries(self.entries, self.n)

    def __dealloc__(self):
        free(self.entries)


cdef void find_in_order(const ps_index *index, const uint32_t[::1] ids, const int64_t[::1] times, uint32_t[::1] found,
                        const ps_entry *entries, int64_t n) noexcept nogil:
    cdef int64_t i
    cdef uint32_t row
    for i in range(n):
        row = entries[i].row
        ps_index_find(index, &ids[row], &times[row], 1, &found[row])


cdef class FeatureRows:
    """The keys and times of one feature table, ready to be joined.

    segments: [(key array, event times, ingest times or None)], one per chunk; times as int64 arrays of microseconds.
    cutoff: a row is not visible before its ingest time. The keys must not grow afterwards.
    """

    def __cinit__(self, KeyIndex keys, list segments, bint cutoff):
        cdef ps_segment *s
        cdef int64_t first = 0
        cdef bint known
        self.keys = keys
        self.keep = []
        self.segments = <ps_segment *>calloc(len(segments) + 1, sizeof(ps_segment))
        if self.segments == NULL:
            raise MemoryError
        self.c.segments = self.segments
        for i, (key, event, ingest) in enumerate(segments):
            if not len(key) == len(event) == (len(event) if ingest is None else len(ingest)):
                raise ValueError("columns of one segment have one length")
            known = ingest is not None
            if i and known != self.c.has_ingest:
                raise ValueError("all segments have ingest times, or none")
            self.c.has_ingest = known
            s = &self.segments[i]
            read_key(&s.key, key, keys, False, self.keep)
            s.event = times_of(event, self.keep)
            s.ingest = times_of(ingest, self.keep) if known else NULL
            s.first = first
            first += s.key.length
            self.c.n_segments += 1
        if first > PS_ASOF_MOST_ROWS:
            raise ColumnError(f"expected at most {PS_ASOF_MOST_ROWS} rows, got {first}")
        self.c.rows = first
        self.c.cutoff = cutoff and self.c.has_ingest
        keys.fixed = True
        with nogil:
            self.ordered = ps_rows_ordered(&self.c)

    def __dealloc__(self):
        ps_merge_free(self.merge)
        ps_index_free(self.index)
        free(self.segments)

    def find(self, const uint32_t[::1] ids, const int64_t[::1] times, uint32_t[::1] found, SpineOrder order=None,
             int64_t start=0, stop=None):
        """The visible row of spine rows [start, stop) into `found`: a row number, or NOT_FOUND.

        With `order` rows are visited in it, and [start, stop) counts in it: for feature rows that are ordered.
        Times that go back to before the last call's build an index, which all later calls use.
        """
        cdef int64_t end = times.shape[0] if stop is None else stop
        cdef int64_t row = -1, n = end - start
        cdef int code = 0
        cdef const ps_entry *entries = NULL
        if not ids.shape[0] == found.shape[0] == times.shape[0] or not 0 <= start <= end <= times.shape[0]:
            raise ValueError("ids, times and found have one entry per spine row")
        if order is not None and order.n != times.shape[0]:
            raise ValueError("the order is of other times")
        if n == 0:
            return
        if order is not None:
            entries = order.entries + start
        with nogil:
            if self.index == NULL and self.ordered:
                if self.merge == NULL:
                    self.merge = ps_merge_new(self.keys.ptr, &self.c)
                if self.merge == NULL:
                    code = PS_ASOF_MEMORY
                elif entries != NULL:
                    code = ps_merge_next(self.merge, &ids[0], &times[0], entries, n, &found[0], &row)
                else:
                    code = ps_merge_next(self.merge, &ids[start], &times[start], NULL, n, &found[start], &row)
            else:
                code = PS_ASOF_ORDER
            if code == PS_ASOF_ORDER:
                code = 0
                if self.index == NULL:
                    ps_merge_free(self.merge)
                    self.merge = NULL
                    self.index = ps_index_new(self.keys.ptr, &self.c, &code, &row)
                if self.index != NULL and entries != NULL:
                    find_in_order(self.index, ids, times, found, entries, n)
                elif self.index != NULL:
                    ps_index_find(self.index, &ids[start], &times[start], n, &found[start])
        if code:
            fail(code, row)

    def apply_ttl(self, const int64_t[::1] times, uint32_t[::1] found, int64_t ttl):
        """OUTSIDE_MAX_AGE in place of rows older than `ttl` microseconds (S9)."""
        if times.shape[0] != found.shape[0]:
            raise ValueError("one time per spine row")
        if times.shape[0]:
            with nogil:
                ps_apply_ttl(&self.c, &times[0], times.shape[0], ttl, &found[0])


cdef class Values:
    """One feature column, to be gathered: arrays of one type.

    width: bytes of a value (1, 2, 4, 8 or 16), 0 for bits, -4 and -8 for text with offsets of that width.
    nan: whether NaN is null (floats only).
    """
    cdef:
        ps_values c
        ps_value_segment *segments
        int64_t rows
        list keep

    def __cinit__(self, list chunks, int width, bint nan):
        cdef ps_value_segment *s
        cdef int64_t n
        if width not in (0, 1, 2, 4, 8, 16, -4, -8) or (nan and width not in (2, 4, 8)):
            raise ValueError(f"no values of width {width}")
        self.keep = []
        self.segments = <ps_value_segment *>calloc(len(chunks) + 1, sizeof(ps_value_segment))
        if self.segments == NULL:
            raise MemoryError
        self.c.segments = self.segments
        self.c.width = width
        self.c.nan = width if nan else 0
        for chunk in chunks:
            s = &self.segments[self.c.n_segments]
            s.first = self.rows
            s.length = len(chunk)
            if s.length == 0:
                continue
            s.offset = chunk.offset
            buffers = chunk.buffers()
            self.keep.append(buffers)
            n = s.offset + s.length
            s.validity = <const uint8_t *>address(buffers[0], (n + 7) // 8 if buffers[0] is not None else 0)
            if width < 0:
                s.values = address(buffers[1], (n + 1) * -width)
                if buffers[2] is not None:
                    s.text_bytes = buffers[2].size
                    s.text = <const uint8_t *><uintptr_t>buffers[2].address
            else:
                s.values = address(buffers[1], n * width if width else (n + 7) // 8)
            self.rows += s.length
            self.c.n_segments += 1

    def __dealloc__(self):
        free(self.segments)

    cdef int check(self, const uint32_t[::1] found, const uint8_t[::1] validity, const int8_t[::1] statuses) except -1:
        cdef int64_t i, n = found.shape[0], past = 0
        with nogil:
            for i in range(n):
                past |= (found[i] >= self.rows) & (found[i] < PS_ASOF_AGED)
        if past:
            raise ValueError("a row that the column does not have")
        if validity.shape[0] < (n + 7) // 8 or (statuses is not None and statuses.shape[0] != n):
            raise ValueError("one entry per spine row")
        return 0

    def gather(self, const uint32_t[::1] found, uint8_t[::1] out, uint8_t[::1] validity, int8_t[::1] statuses=None):
        """Values of the found rows into `out`, validity bits beside them, statuses (S17) if asked. Returns how many
        are null."""
        cdef int64_t n = found.shape[0], nulls = 0
        self.check(found, validity, statuses)
        if self.c.width < 0 or out.shape[0] < (n * self.c.width if self.c.width else (n + 7) // 8):
            raise ValueError("no room for the values")
        if n:
            with nogil:
                nulls = ps_gather(&self.c, &found[0], n, &out[0], &validity[0],
                                  &statuses[0] if statuses is not None else NULL)
        return nulls

    def gather_offsets(self, const uint32_t[::1] found, int64_t[::1] offsets, uint8_t[::1] validity,
                       int8_t[::1] statuses=None):
        """Of text: offsets (n + 1), as gather() otherwise."""
        cdef int64_t n = found.shape[0], nulls = 0
        self.check(found, validity, statuses)
        if self.c.width >= 0 or offsets.shape[0] != n + 1:
            raise ValueError("no room for the offsets")
        offsets[0] = 0
        if n:
            with nogil:
                nulls = ps_gather_offsets(&self.c, &found[0], n, &offsets[0], &validity[0],
                                          &statuses[0] if statuses is not None else NULL)
        if nulls < 0:
            fail(<int>nulls, 0)
        return nulls

    def gather_text(self, const uint32_t[::1] found, const int64_t[::1] offsets, uint8_t[::1] out):
        """Of text: the bytes that `offsets` has places for."""
        cdef int64_t n = found.shape[0]
        if self.c.width >= 0 or offsets.shape[0] != n + 1 or out.shape[0] < offsets[n]:
            raise ValueError("no room for the text")
        if n and offsets[n]:
            with nogil:
                ps_gather_text(&self.c, &found[0], n, &offsets[0], &out[0])
