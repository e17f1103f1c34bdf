"""Records of the event log as columns, and back (hot path): what compaction, reading back and erasure do per record.

A column holds what a reader of Parquet wants to see; beside it stand the status bytes. What must stay true: the records
built from columns are the records that the columns were made of, bit for bit. A record that columns alone would not
give back (bits behind a null, texts out of order) is kept whole beside its columns.
"""

import numpy as np

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free
from libc.string cimport memcmp, memcpy, memset

from penstock.errors import LogError

from penstock._ext.event_record cimport (
    PS_ERASED, PS_RECORD_EVENT, PS_RECORD_HEAD, PS_RECORD_MARK, PS_RECORD_MISFIT, PS_RECORD_MOST, PS_RECORD_SCHEMA,
    PS_RECORD_SCORE, ps_pad8, ps_record, ps_record_crc, ps_record_fixed, ps_record_misfit,
    ps_record_read, ps_record_seed, ps_record_slots, ps_record_status, ps_record_strings, ps_record_versions, ps_score,
)
from penstock._ext.row cimport (
    PS_BOOL, PS_FLOAT64, PS_INT64, PS_PRESENT, PS_STR, PS_STR_LENGTH, PS_STR_OFFSET, PS_STRING, PS_WIDE, ps_slot,
)
from penstock._ext.decision cimport N_OUTCOMES
from penstock._ext.log cimport RecordSchemas
from penstock._ext.steps cimport checked

from penstock._ext.events import TYPE_CODES

cdef enum:
    ID_BYTES = 26
    CODES = 14                # of a score: action, model, failed (int16 each), arms (int8 x 8)

cdef uint64_t NULL_FLOAT = 0x7ff8000000000000
cdef int64_t DAY = 86400000000
CODE_BYTES = CODES
SCORE_ID_BYTES = ID_BYTES


cdef bint is_zero(const char *p, int64_t n) noexcept nogil:
    cdef int64_t i
    for i in range(n):
        if p[i]:
            return False
    return True


cdef inline int64_t day_of(int64_t time) noexcept nogil:
    return (time - (DAY - 1)) // DAY if time < 0 else time // DAY


cdef class SchemaColumns:
    """Columns of the records of one schema, in the order of the log."""

    def __cinit__(self, bint is_score, list types, int time_field, dict arrays=None):
        cdef int i
        self.is_score = is_score
        self.n = len(types)
        self.time_field = time_field
        self.types = <uint8_t *>checked(self.n, 1)
        self.texts = <int64_t *>checked(self.n, sizeof(int64_t))
        self.text = <int64_t *>checked(self.n, sizeof(int64_t))
        self.data = <void **>checked(self.n, sizeof(void *))
        self.valid = <uint8_t **>checked(self.n, sizeof(void *))
        self.text_at = <int64_t **>checked(self.n, sizeof(void *))
        for i in range(self.n):
            self.types[i] = TYPE_CODES[types[i]]
        if not is_score and not 0 <= time_field < self.n:
            raise LogError("a schema of the log names no event time")

    def __dealloc__(self):
        free(self.types)
        free(self.texts)
        free(self.text)
        free(self.data)
        free(self.valid)
        free(self.text_at)

    cdef bint text_of(self, const ps_record *r, int i, const char **text, int64_t *size) noexcept nogil:
        """The text of a string field that is present."""
        cdef uint64_t u = ps_record_slots(r)[i].u
        if ps_record_status(r)[i] & 7 != PS_PRESENT:
            return False
        text[0] = ps_record_strings(r) + PS_STR_OFFSET(u)
        size[0] = PS_STR_LENGTH(u)
        return True

    cdef bint canonical(self, const ps_record *r) noexcept nogil:
        """Whether the columns give the record back."""
        cdef const ps_slot *slots = ps_record_slots(r)
        cdef const uint8_t *status = ps_record_status(r)
        cdef const ps_score *score = <const ps_score *>(r + 1)
        cdef uint32_t fixed = ps_record_fixed(self.is_score, r.n_versions, r.n_fields)
        cdef const char *text
        cdef int64_t size
        cdef uint64_t bits
        cdef uint32_t used = 0
        cdef int i
        if r.flags or r.outcome >= N_OUTCOMES:
            return False
        for i in range(self.n):
            if status[i] & 7 != PS_PRESENT:
                if slots[i].u != (NULL_FLOAT if self.types[i] == PS_FLOAT64 else 0):
                    return False
            elif self.types[i] == PS_STRING:
                if not self.text_of(r, i, &text, &size) or PS_STR_OFFSET(slots[i].u) != used:
                    return False
                used += size
            elif self.types[i] == PS_BOOL:
                if slots[i].u > 1:
                    return False
        if r.length != fixed + ps_pad8(used):
            return False
        if not is_zero(<const char *>status + self.n, ps_pad8(self.n) - self.n):
            return False
        if not is_zero(ps_record_strings(r) + used, ps_pad8(used) - used):
            return False
        if self.is_score:
            memcpy(&bits, &score.score, 8)
            if score.outcome != r.outcome or score.has_score > 1 or not is_zero(<const char *>&score.pad[0], 6):
                return False
            if not score.has_score and bits != NULL_FLOAT:
                return False
            for i in range(ID_BYTES):
                if score.id[i] & 0x80:
                    return False
        return True

    cdef void count(self, const ps_record *r) noexcept nogil:
        """One more row, of a record of this schema (ps_record_read)."""
        cdef const char *text
        cdef int64_t size
        cdef int i
        self.rows += 1
        self.versions += r.n_versions
        for i in range(self.n):
            if self.types[i] == PS_STRING:
                if self.text_of(r, i, &text, &size):
                    self.texts[i] += size
            elif self.types[i] == PS_INT64 and ps_record_status(r)[i] & (7 | PS_WIDE) == PS_PRESENT | PS_WIDE:
                self.wides += 1
        if not self.canonical(r):
            self.raws += 1
            self.raw_bytes += r.length - 8

    cdef object array(self, str name, int64_t size, str dtype):
        made = self.arrays[name] = np.empty(size, dtype=dtype)
        return <object>made.ctypes.data

    cdef int allocate(self) except -1:
        cdef int64_t rows = self.rows
        cdef int i
        cdef uint8_t kind
        self.arrays = {}
        self.sequence = <int64_t *><uintptr_t>self.array("sequence", rows, "i8")
        self.ingest = <int64_t *><uintptr_t>self.array("ingest_time", rows, "i8")
        self.order = <int64_t *><uintptr_t>self.array("order", rows, "i8")
        self.day = <int32_t *><uintptr_t>self.array("day", rows, "i4")
        self.outcome = <uint8_t *><uintptr_t>self.array("outcome", rows, "u1")
        self.status = <uint8_t *><uintptr_t>self.array("status", rows * self.n, "u1")
        self.version_at = <int64_t *><uintptr_t>self.array("versions_at", rows + 1, "i8")
        self.version_data = <uint64_t *><uintptr_t>self.array("versions", self.versions, "u8")
        self.wide_at = <int64_t *><uintptr_t>self.array("wide_at", rows + 1, "i8")
        self.wide_data = <double *><uintptr_t>self.array("wide", self.wides, "f8")
        self.raw_at = <int64_t *><uintptr_t>self.array("record_at", rows + 1, "i8")
        self.raw_data = <uint8_t *><uintptr_t>self.array("record", self.raw_bytes, "u1")
        self.has_raw = <uint8_t *><uintptr_t>self.array("record_valid", rows, "u1")
        self.version_at[0] = self.wide_at[0] = self.raw_at[0] = 0
        for i in range(self.n):
            kind = self.types[i]
            self.valid[i] = <uint8_t *><uintptr_t>self.array(f"valid.{i}", rows, "u1")
            if kind == PS_STRING:
                self.text_at[i] = <int64_t *><uintptr_t>self.array(f"at.{i}", rows + 1, "i8")
                self.text_at[i][0] = 0
                self.data[i] = <void *><uintptr_t>self.array(f"data.{i}", self.texts[i], "u1")
            elif kind == PS_BOOL:
                self.data[i] = <void *><uintptr_t>self.array(f"data.{i}", rows, "u1")
            else:
                self.data[i] = <void *><uintptr_t>self.array(f"data.{i}", rows, "f8" if kind == PS_FLOAT64 else "i8")
        if self.is_score:
            self.id = <char *><uintptr_t>self.array("id", ID_BYTES * rows, "u1")
            self.has_id = <uint8_t *><uintptr_t>self.array("id_valid", rows, "u1")
            self.as_of = <int64_t *><uintptr_t>self.array("as_of", rows, "i8")
            self.score = <double *><uintptr_t>self.array("score", rows, "f8")
            self.has_score = <uint8_t *><uintptr_t>self.array("score_valid", rows, "u1")
            self.fired = <uint64_t *><uintptr_t>self.array("fired", rows, "u8")
            self.codes = <uint8_t *><uintptr_t>self.array("codes", CODES * rows, "u1")
        return 0

    cdef void take(self, const ps_record *r, int64_t order) noexcept nogil:
        """A record that was counted into the next row."""
        cdef const ps_slot *slots = ps_record_slots(r)
        cdef const uint8_t *status = ps_record_status(r)
        cdef const ps_score *score = <const ps_score *>(r + 1)
        cdef int64_t row = self.row
        cdef int64_t size
        cdef const char *text
        cdef bint present
        cdef int i
        self.row += 1
        self.sequence[row] = r.sequence
        self.ingest[row] = r.ingest_time
        self.order[row] = order
        self.outcome[row] = r.outcome
        memcpy(self.status + row * self.n, status, self.n)
        memcpy(self.version_data + self.version, ps_record_versions(r), 8 * r.n_versions)
        self.version += r.n_versions
        self.version_at[row + 1] = self.version
        for i in range(self.n):
            present = status[i] & 7 == PS_PRESENT
            if self.types[i] == PS_STRING:
                present = self.text_of(r, i, &text, &size)
                if present:
                    memcpy(<char *>self.data[i] + self.text[i], text, size)
                    self.text[i] += size
                self.text_at[i][row + 1] = self.text[i]
            elif self.types[i] == PS_BOOL:
                (<uint8_t *>self.data[i])[row] = present and slots[i].u != 0
            else:
                if self.types[i] == PS_INT64 and present and status[i] & PS_WIDE:
                    self.wide_data[self.wide] = slots[i].f
                    self.wide += 1
                    present = False
                (<uint64_t *>self.data[i])[row] = slots[i].u if present else 0
            self.valid[i][row] = present
        self.wide_at[row + 1] = self.wide
        if self.is_score:
            self.day[row] = <int32_t>day_of(score.as_of)
            self.has_id[row] = 1
            for i in range(ID_BYTES):
                if score.id[i] & 0x80:
                    self.has_id[row] = 0
            if self.has_id[row]:
                memcpy(self.id + ID_BYTES * row, &score.id[0], ID_BYTES)
            else:
                memset(self.id + ID_BYTES * row, 63, ID_BYTES)
            self.as_of[row] = score.as_of
            self.has_score[row] = score.has_score != 0
            self.score[row] = score.score
            self.fired[row] = score.fired
            memcpy(self.codes + CODES * row, &score.action, 6)
            memcpy(self.codes + CODES * row + 6, &score.arms[0], 8)
        else:
            self.day[row] = <int32_t>day_of(slots[self.time_field].i)
        self.has_raw[row] = not self.canonical(r)
        if self.has_raw[row]:
            memcpy(self.raw_data + self.raw, <const char *>r + 8, r.length - 8)
            self.raw += r.length - 8
        self.raw_at[row + 1] = self.raw

    @property
    def columns(self):
        """numpy arrays by name. `data.i`, `valid.i` and, for a string, `at.i` (offsets) of each field; `status` n bytes
        per row; `versions`, `wide` and `record` (with `_at`) of different length per row; `day` since 1970."""
        return self.arrays


cdef class RecordColumns:
    """The event and score records of some segments with the same schemas. First count() every segment, then take() it.

    layouts: per schema number (is it a score's, names of the fields' types, index of the event time). schemas: what the
    records must be like, the same schemas, without a prelude.
    """

    def __cinit__(self, list layouts, RecordSchemas schemas):
        cdef int i
        if len(layouts) != schemas.n:
            raise LogError(f"expected {schemas.n} layouts, one per schema, got {len(layouts)}")
        self.checked = schemas
        self.schemas = [SchemaColumns(*layout) for layout in layouts]
        self.n = len(layouts)
        for i in range(self.n):
            self.found[i] = <void *>self.schemas[i]

    def count(self, const uint8_t[::1] data, int64_t log_id, uint64_t number, uint64_t start, uint64_t end):
        """Count a segment's records; returns how many. Raises LogError at one that does not check."""
        return self.run(data, log_id, number, start, end, False)

    def take(self, const uint8_t[::1] data, int64_t log_id, uint64_t number, uint64_t start, uint64_t end):
        """A segment's records into the columns, once all are counted."""
        cdef SchemaColumns schema
        if not self.allocated:
            for schema in self.schemas:
                schema.allocate()
            self.allocated = True
            self.records = 0
        return self.run(data, log_id, number, start, end, True)

    cdef object run(self, const uint8_t[::1] data, int64_t log_id, uint64_t number, uint64_t start, uint64_t end,
                    bint take):
        cdef uint64_t at = start
        cdef int64_t length = 0
        cdef int64_t before = self.records
        cdef const char *base
        cdef const ps_record *r
        cdef SchemaColumns schema
        if end > <uint64_t>data.shape[0]:
            raise LogError(f"at offset {data.shape[0]}: cut short")
        if start >= end:
            return 0
        base = <const char *>&data[0]
        with nogil:
            while at < end:
                r = <const ps_record *>(base + at)
                if take:
                    length = r.length
                else:
                    length = ps_record_read(base, end, at, <uint64_t>log_id, number, &self.checked.c)
                    if length <= 0:
                        break
                if take:
                    (<SchemaColumns>self.found[r.schema]).take(r, self.records)
                else:
                    (<SchemaColumns>self.found[r.schema]).count(r)
                self.records += 1
                at += length
        if length == PS_RECORD_MISFIT:
            raise self.checked.refusal(<const ps_record *>(base + at), at)
        if at < end:
            raise LogError(f"at offset {at}: a record does not check")
        return self.records - before

    def __getitem__(self, int i):
        return self.schemas[i]


cdef class Source(SchemaColumns):
    """Columns of one schema out of one file, for building records. arrays: as SchemaColumns.columns gives them."""

    def __cinit__(self, bint is_score, list types, int time_field, dict arrays):
        cdef int i
        self.arrays = arrays
        self.rows = arrays["sequence"].shape[0]
        self.sequence = <int64_t *>self.at("sequence", "i8", self.rows)
        self.ingest = <int64_t *>self.at("ingest_time", "i8", self.rows)
        self.order = <int64_t *>self.at("order", "i8", self.rows)
        self.outcome = <uint8_t *>self.at("outcome", "u1", self.rows)
        self.status = <uint8_t *>self.at("status", "u1", self.rows * self.n)
        self.version_at = <int64_t *>self.offsets("versions_at", "versions", self.rows)
        self.version_data = <uint64_t *>self.at("versions", "u8", 0)
        self.wide_at = <int64_t *>self.offsets("wide_at", "wide", self.rows)
        self.wide_data = <double *>self.at("wide", "f8", 0)
        self.raw_at = <int64_t *>self.offsets("record_at", "record", self.rows)
        self.raw_data = <uint8_t *>self.at("record", "u1", 0)
        self.has_raw = <uint8_t *>self.at("record_valid", "u1", self.rows)
        for i in range(self.n):
            if self.types[i] == PS_STRING:
                self.text_at[i] = <int64_t *>self.offsets(f"at.{i}", f"data.{i}", self.rows)
                self.data[i] = self.at(f"data.{i}", "u1", 0)
            elif self.types[i] == PS_BOOL:
                self.data[i] = self.at(f"data.{i}", "u1", self.rows)
            else:
                self.data[i] = self.at(f"data.{i}", "f8" if self.types[i] == PS_FLOAT64 else "i8", self.rows)
        if is_score:
            self.id = <char *>self.at("id", "u1", ID_BYTES * self.rows)
            self.as_of = <int64_t *>self.at("as_of", "i8", self.rows)
            self.score = <double *>self.at("score", "f8", self.rows)
            self.has_score = <uint8_t *>self.at("score_valid", "u1", self.rows)
            self.fired = <uint64_t *>self.at("fired", "u8", self.rows)
            self.codes = <uint8_t *>self.at("codes", "u1", CODES * self.rows)

    cdef void *at(self, str name, str dtype, int64_t least) except? NULL:
        """Memory of an array that has the type and the length it must have."""
        array = self.arrays[name]
        if array.dtype != np.dtype(dtype) or array.shape[0] < least or not array.flags.c_contiguous:
            raise LogError(f"column {name}: expected {least} values of {dtype}, got {array.shape[0]} of {array.dtype}")
        return <void *><uintptr_t>array.ctypes.data

    cdef void *offsets(self, str name, str data, int64_t rows) except? NULL:
        """Offsets that stay within the data and never go back."""
        cdef void *found = self.at(name, "i8", rows + 1)
        array = self.arrays[name]
        if array[0] < 0 or array[rows] > self.arrays[data].shape[0] or (np.diff(array[:rows + 1]) < 0).any():
            raise LogError(f"column {name}: the offsets do not fit the data")
        return found

    cdef int64_t length(self, int64_t row) noexcept nogil:
        """Bytes of the row's record; -1 where there is none so large."""
        cdef int64_t used = 0
        cdef int64_t found, n_versions = self.version_at[row + 1] - self.version_at[row]
        cdef int i
        if self.has_raw[row]:
            found = 8 + self.raw_at[row + 1] - self.raw_at[row]
            return -1 if found % 8 or found < PS_RECORD_HEAD or found > PS_RECORD_MOST else found
        for i in range(self.n):
            if self.types[i] == PS_STRING and self.status[row * self.n + i] & 7 == PS_PRESENT:
                used += self.text_at[i][row + 1] - self.text_at[i][row]
        if used > PS_RECORD_MOST or n_versions > 255:
            return -1
        found = ps_record_fixed(self.is_score, <uint32_t>n_versions, self.n) + ps_pad8(<uint32_t>used)
        return -1 if found > PS_RECORD_MOST else found

    cdef int build(self, int64_t row, uint16_t schema, ps_record *r, uint32_t length) noexcept nogil:
        """The row's record, all but crc and length, into zeroed memory. -1 where the columns contradict each other."""
        cdef int64_t n_versions = self.version_at[row + 1] - self.version_at[row]
        cdef int64_t wide = self.wide_at[row]
        cdef int64_t size
        cdef uint8_t *status
        cdef ps_slot *slots
        cdef ps_score *score
        cdef char *strings
        cdef uint32_t used = 0
        cdef int i
        if self.has_raw[row]:
            memcpy(<char *>r + 8, self.raw_data + self.raw_at[row], length - 8)
            return 0 if r.schema == schema else -1
        r.kind = PS_RECORD_SCORE if self.is_score else PS_RECORD_EVENT
        r.outcome = self.outcome[row]
        r.schema = schema
        r.n_fields = <uint16_t>self.n
        r.n_versions = <uint8_t>n_versions
        r.flags = 0
        r.sequence = self.sequence[row]
        r.ingest_time = self.ingest[row]
        memcpy(<void *>ps_record_versions(r), self.version_data + self.version_at[row], 8 * n_versions)
        slots = <ps_slot *>ps_record_slots(r)
        status = <uint8_t *>ps_record_status(r)
        strings = <char *>ps_record_strings(r)
        memcpy(status, self.status + row * self.n, self.n)
        for i in range(self.n):
            if status[i] & 7 != PS_PRESENT:
                slots[i].u = NULL_FLOAT if self.types[i] == PS_FLOAT64 else 0
            elif self.types[i] == PS_STRING:
                size = self.text_at[i][row + 1] - self.text_at[i][row]
                memcpy(strings + used, <char *>self.data[i] + self.text_at[i][row], size)
                slots[i].u = PS_STR(used, <uint32_t>size)
                used += <uint32_t>size
            elif self.types[i] == PS_BOOL:
                slots[i].u = (<uint8_t *>self.data[i])[row] != 0
            elif self.types[i] == PS_INT64 and status[i] & PS_WIDE:
                if wide >= self.wide_at[row + 1]:
                    return -1
                slots[i].f = self.wide_data[wide]
                wide += 1
            else:
                slots[i].u = (<uint64_t *>self.data[i])[row]
        if self.is_score:
            score = <ps_score *>(r + 1)
            memcpy(&score.id[0], self.id + ID_BYTES * row, ID_BYTES)
            memcpy(&score.action, self.codes + CODES * row, 6)
            memcpy(&score.arms[0], self.codes + CODES * row + 6, 8)
            score.as_of = self.as_of[row]
            score.fired = self.fired[row]
            score.has_score = self.has_score[row] != 0
            score.outcome = r.outcome
            if score.has_score:
                score.score = self.score[row]
            else:
                memcpy(&score.score, &NULL_FLOAT, 8)
        return 0


def build_records(int64_t log_id, uint64_t number, int64_t first_sequence, uint64_t start, list prelude, marks,
                  int64_t records, list sources, RecordSchemas schemas):
    """Columns as checked records again, as they would lie in segment `number` from offset `start` on.

    prelude: bodies of the schema records; marks: int64 watermarks; sources: (schema number, Source), each record's
    order is 0 to records - 1. schemas: what the records must be like, without a prelude.
    Returns (bytes as a uint8 array, offsets of the records, one more than there are).
    Raises LogError where columns are missing or contradict each other, or a record is not of its schema.
    """
    cdef int64_t i, order, length, row
    cdef uint64_t at
    cdef int k
    cdef uint32_t size
    cdef uint16_t schema
    cdef Source source
    cdef ps_record *r
    cdef int n_sources = len(sources), field = -1
    there = sum((<Source>one).rows for _, one in sources)
    if there != records:
        raise LogError(f"there are {there} records, expected {records}")
    offsets_of = np.zeros(records + 1, dtype=np.int64)
    which_of = np.zeros(max(records, 1), dtype=np.int32)
    row_of = np.zeros(max(records, 1), dtype=np.int64)
    cdef int64_t[::1] offsets = offsets_of
    cdef int32_t[::1] which = which_of
    cdef int64_t[::1] rows = row_of
    cdef int wrong = 0
    cdef int64_t found = 0
    for k in range(n_sources):
        source = <Source>sources[k][1]
        with nogil:
            for row in range(source.rows):
                order = source.order[row]
                length = source.length(row)
                if order < 0 or order >= records or offsets[order + 1] or length < 0:
                    wrong = 1
                    break
                offsets[order + 1] = length
                which[order] = k
                rows[order] = row
                found += 1
        if wrong:
            raise LogError(f"row {row} of the columns is no record of its batch")
    if found != records:
        raise LogError(f"{records - found} of {records} records are missing")
    at = start + PS_RECORD_HEAD + 8 * len(marks)
    for body in prelude:
        at += PS_RECORD_HEAD + ps_pad8(<uint32_t>len(body))
    offsets[0] = at
    for i in range(records):
        offsets[i + 1] += offsets[i]
    data_of = np.zeros(offsets[records], dtype=np.uint8)
    cdef uint8_t[::1] data = data_of
    cdef char *base = <char *>&data[0]
    cdef const uint8_t[::1] text
    at = start
    for k, body in enumerate(prelude):
        size = PS_RECORD_HEAD + ps_pad8(<uint32_t>len(body))
        r = <ps_record *>(base + at)
        r.kind = PS_RECORD_SCHEMA
        r.schema = <uint16_t>k
        r.sequence = first_sequence
        text = body
        memset(r + 1, 32, size - PS_RECORD_HEAD)
        memcpy(r + 1, &text[0], text.shape[0])
        close(r, size, log_id, number, at)
        at += size
    r = <ps_record *>(base + at)
    r.kind = PS_RECORD_MARK
    r.sequence = first_sequence
    for i in range(len(marks)):
        (<int64_t *>(r + 1))[i] = marks[i]
    close(r, PS_RECORD_HEAD + 8 * <uint32_t>len(marks), log_id, number, at)
    cdef void *pointers[4096]
    cdef uint16_t numbers[4096]
    if n_sources > 4096:
        raise LogError("a batch of more than 4096 files")
    for k in range(n_sources):
        pointers[k] = <void *>sources[k][1]
        numbers[k] = sources[k][0]
    with nogil:
        for i in range(records):
            r = <ps_record *>(base + offsets[i])
            size = <uint32_t>(offsets[i + 1] - offsets[i])
            schema = numbers[which[i]]
            if (<Source>pointers[which[i]]).build(rows[i], schema, r, size) != 0:
                wrong = 1
                break
            close(r, size, log_id, number, offsets[i])
            if ps_record_misfit(r, offsets[i], &schemas.c, &field) != NULL:
                wrong = 2
                break
    if wrong == 2:
        raise LogError(f"record {i} of the batch, {schemas.refusal(r, offsets[i])}")
    if wrong:
        raise LogError(f"record {i} of the batch: its columns contradict each other")
    return data_of, offsets_of


cdef void close(ps_record *r, uint32_t length, int64_t log_id, uint64_t number, uint64_t offset) noexcept nogil:
    r.length = length
    r.crc = ps_record_crc(r, length, ps_record_seed(<uint64_t>log_id, number, offset))


def same_records(const uint8_t[::1] a, uint64_t a_at, const uint8_t[::1] b, uint64_t b_at, uint64_t b_end):
    """Up to where records of b, from b_at to b_end, are those of a from a_at on but for their checksums, which depend
    on the place. Returns (offset reached in a, offset reached in b): the first record that differs, or b_end."""
    cdef const ps_record *x
    cdef const ps_record *y
    cdef uint64_t size = a.shape[0]
    if b_end > <uint64_t>b.shape[0]:
        b_end = b.shape[0]
    with nogil:
        while b_at + PS_RECORD_HEAD <= b_end and a_at + PS_RECORD_HEAD <= size:
            x = <const ps_record *>(&a[a_at])
            y = <const ps_record *>(&b[b_at])
            if x.length != y.length or not x.length or a_at + x.length > size or b_at + y.length > b_end:
                break
            if memcmp(<const char *>x + 8, <const char *>y + 8, x.length - 8) != 0:
                break
            a_at += x.length
            b_at += y.length
    return a_at, b_at


# ---- erasure


cdef bint is_key(const ps_record *r, int i, uint8_t type, const uint8_t[::1] text, bint has_integer,
                 int64_t integer) noexcept nogil:
    cdef const ps_slot *slots = ps_record_slots(r)
    cdef uint8_t status = ps_record_status(r)[i]
    if status & 7 != PS_PRESENT or status & PS_WIDE:
        return False
    if type == PS_STRING:
        return (text is not None and PS_STR_LENGTH(slots[i].u) == <uint32_t>text.shape[0]
                and (not text.shape[0]
                     or memcmp(ps_record_strings(r) + PS_STR_OFFSET(slots[i].u), &text[0], text.shape[0]) == 0))
    return type == PS_INT64 and has_integer and slots[i].i == integer


def erase_key(const uint8_t[::1] data, int64_t log_id, uint64_t number, uint64_t start, uint64_t end,
              RecordSchemas schemas, list holders, text, integer, bytes new_text, int64_t new_integer):
    """Records from `start` to `end` with one key replaced by another and flagged.

    schemas: what the records must be like; holders: per schema number (names of the fields' types, indices of fields
    that may hold the key).
    text, integer: the key as a string field and as an integer field has it; None: no field of that type can hold it.
    Returns (the records as bytes that begin at offset `start`, events changed, scores changed); (None, 0, 0) where no
    record has the key. Every record gets a checksum for its new place. Raises LogError at one that does not check or is not of its schema.
    """
    cdef uint64_t at = start, to
    cdef int64_t length = 0, events = 0, scores = 0, more = 0
    cdef int i, k, n, hits, n_schemas = len(holders)
    cdef const ps_record *r
    cdef ps_record *w
    cdef const uint8_t *types
    cdef uint32_t fixed, used, size, field_size
    cdef const ps_slot *slots
    cdef ps_slot *out
    cdef uint8_t *status
    cdef char *strings
    cdef const char *field_text
    cdef bint has_integer = integer is not None
    cdef bint hit
    cdef int64_t key = integer if has_integer else 0
    cdef const uint8_t[::1] key_text = text
    cdef const uint8_t[::1] put_text = new_text
    cdef uint32_t put_size = <uint32_t>len(new_text)
    if n_schemas != schemas.n:
        raise LogError(f"expected {schemas.n} schemas, got {n_schemas}")
    cdef const uint8_t *types_of[256]
    cdef const uint8_t *marked_of[256]
    keep = []
    for k in range(n_schemas):
        names, fields = holders[k]
        codes = bytes(TYPE_CODES[name] for name in names) + b"\0"
        marked = bytes(i in fields for i in range(len(names))) + b"\0"
        keep += [codes, marked]
        types_of[k] = <const uint8_t *><const char *>codes
        marked_of[k] = <const uint8_t *><const char *>marked
    if end > <uint64_t>data.shape[0]:
        end = data.shape[0]
    if start >= end:
        return None, 0, 0
    cdef const char *base = <const char *>&data[0]
    cdef int wrong = 0
    with nogil:
        while at < end:
            length = ps_record_read(base, end, at, <uint64_t>log_id, number, &schemas.c)
            if length <= 0:
                break
            r = <const ps_record *>(base + at)
            if r.kind == PS_RECORD_EVENT or r.kind == PS_RECORD_SCORE:
                hits = 0
                for i in range(r.n_fields):
                    if marked_of[r.schema][i] and is_key(r, i, types_of[r.schema][i], key_text, has_integer, key):
                        hits += 1
                if hits:
                    more += 8 + hits * ps_pad8(put_size)
                    if r.kind == PS_RECORD_EVENT:
                        events += 1
                    else:
                        scores += 1
            at += length
    if length == PS_RECORD_MISFIT:
        raise schemas.refusal(<const ps_record *>(base + at), at)
    if at < end:
        raise LogError(f"at offset {at}: a record does not check")
    if not events and not scores:
        return None, 0, 0
    made = np.zeros(end - start + more, dtype=np.uint8)
    cdef uint8_t[::1] target = made
    cdef char *put = <char *>&target[0]
    at = start
    to = 0
    with nogil:
        while at < end:
            r = <const ps_record *>(base + at)
            w = <ps_record *>(put + to)
            size = r.length
            hits = 0
            if r.kind == PS_RECORD_EVENT or r.kind == PS_RECORD_SCORE:
                for i in range(r.n_fields):
                    if marked_of[r.schema][i] and is_key(r, i, types_of[r.schema][i], key_text, has_integer, key):
                        hits += 1
            if not hits:
                memcpy(w, r, size)
            else:
                types = types_of[r.schema]
                n = r.n_fields
                fixed = ps_record_fixed(r.kind == PS_RECORD_SCORE, r.n_versions, n)
                memcpy(w, r, fixed)
                slots = ps_record_slots(r)
                out = <ps_slot *>ps_record_slots(w)
                status = <uint8_t *>ps_record_status(w)
                strings = <char *>w + fixed
                used = 0
                for i in range(n):
                    hit = marked_of[r.schema][i] and is_key(r, i, types[i], key_text, has_integer, key)
                    if hit:
                        status[i] |= PS_ERASED
                    if types[i] == PS_STRING and status[i] & 7 == PS_PRESENT:
                        if hit:
                            field_text = <const char *>&put_text[0]
                            field_size = put_size
                        else:
                            field_text = ps_record_strings(r) + PS_STR_OFFSET(slots[i].u)
                            field_size = PS_STR_LENGTH(slots[i].u)
                        memcpy(strings + used, field_text, field_size)
                        out[i].u = PS_STR(used, field_size)
                        used += field_size
                    elif hit:
                        out[i].i = new_integer
                size = fixed + ps_pad8(used)
                if size > PS_RECORD_MOST:
                    wrong = 1
                    break
            close(w, size, log_id, number, start + to)
            at += r.length
            to += size
    if wrong:
        raise LogError(f"at offset {at}: the record would be larger than a record may be")
    return made[:to], events, scores
