"""Which rows of a spine are the log's own events, and the first event that each other row may not see (hot path).

One walk over the log, before the work is split. A Look holds the rows by what is compared with one event type; an event
goes to the first of the rows equal to it that has none yet (S5). What must stay true: this is decided over the whole log
and the whole spine at once, so that no partition, pass or process decides whose event is whose.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcmp, memcpy

import numpy as np

from penstock.errors import LogError

from penstock._ext.decision cimport OUTCOME_DUPLICATE
from penstock._ext.event_record cimport (
    PS_RECORD_EVENT, PS_RECORD_MISFIT, ps_record, ps_record_read, ps_record_slots, ps_record_status, ps_record_strings,
)
from penstock._ext.history cimport EventMapping
from penstock._ext.log cimport RecordSchemas
from penstock._ext.row cimport PS_FLOAT64, PS_PRESENT, PS_STR_LENGTH, PS_STR_OFFSET, PS_STRING, ps_slot
from penstock._ext.steps cimport checked

from penstock._ext.events import TYPE_CODES

cdef enum:
    NULL_CELL = 0
    A_CELL = 1
    NO_CELL = 2               # a cell that no event can hold: its row equals none

cdef uint64_t STEP = 0x9e3779b97f4a7c15
cdef int64_t NEVER = <int64_t>1 << 62


cdef inline uint64_t mixed(uint64_t h, uint64_t value) noexcept nogil:
    h = (h ^ value) * STEP
    return h ^ h >> 29


cdef uint64_t text_hash(const char *text, uint64_t length) noexcept nogil:
    cdef uint64_t h = length, word
    while length >= 8:
        memcpy(&word, text, 8)
        h = mixed(h, word)
        text += 8
        length -= 8
    word = 0
    memcpy(&word, text, length)
    return mixed(h, word)


cdef class Look:
    """The rows of a spine beside one event type.

    source: the event type's index; compared: (field, type, is a key or the time, 8 bytes per row or int64 offsets, bytes
    of texts or None, a state per row); skip: 1 for rows that this look is not for. has_near: rows that share key and time
    with an event, and are none, are counted. time: the field whose values are the rows' times, or -1.
    """

    def __cinit__(self, int source, list compared, const uint8_t[::1] skip, bint has_near, int time):
        cdef int i
        cdef int64_t row, n = skip.shape[0]
        cdef uint64_t size = 16, at
        cdef Compared *one
        cdef Equal *equal
        cdef const int64_t[::1] data
        cdef const uint8_t[::1] states
        cdef const uint8_t[::1] text
        cdef bint holds
        self.source = source
        self.rows = n
        self.n = len(compared)
        self.has_near = has_near
        self.time = -1
        self.keep = (compared, skip)
        self.skip = &skip[0] if n else NULL
        self.compared = <Compared *>checked(self.n, sizeof(Compared))
        self.values = <Value *>checked(self.n, sizeof(Value))
        for i, (field, type, near, numbers, texts, state) in enumerate(compared):
            one = &self.compared[i]
            one.field = field
            one.type = TYPE_CODES[type]
            one.near = near
            one.bytes = b""
            if n:
                data = numbers
                states = state
                one.data = &data[0]
                one.state = &states[0]
                if texts is not None and len(texts):
                    text = texts
                    one.bytes = <const char *>&text[0]
            if field == time:
                self.time = i
        while size < <uint64_t>n + <uint64_t>n // 2:
            size *= 2
        self.mask = size - 1
        self.table = <Equal *>checked(size, sizeof(Equal))
        self.link = <int32_t *>checked(n + 1, sizeof(int32_t))
        for at in range(size):
            self.table[at].row = -1
        if has_near:
            self.near_table = <Near *>checked(size, sizeof(Near))
            for at in range(size):
                self.near_table[at].row = -1
        if self.time >= 0:
            self.time_mask = 8 * size - 1
            self.time_bits = <uint8_t *>checked(size, 1)
        with nogil:
            for row in range(n):
                self.link[row] = -1
                holds = True
                for i in range(self.n):
                    holds = holds and self.compared[i].state[row] != NO_CELL
                if self.skip[row]:
                    continue
                if self.time >= 0:
                    at = mixed(0, <uint64_t>self.compared[self.time].data[row]) & self.time_mask
                    self.time_bits[at >> 3] |= <uint8_t>(1 << (at & 7))
                if has_near:
                    self.put_near(row)
                if not holds:
                    continue
                at = self.row_hash(row, False) & self.mask
                while self.table[at].row >= 0 and not self.is_equal(self.table[at].row, row, False):
                    at = (at + 1) & self.mask
                equal = &self.table[at]
                if equal.row < 0:
                    equal.row = equal.turn = <int32_t>row
                else:
                    self.link[equal.last] = <int32_t>row
                equal.last = <int32_t>row  # while the chain is made: its end
            for at in range(size):
                self.table[at].last = -1

    def __dealloc__(self):
        free(self.compared)
        free(self.values)
        free(self.table)
        free(self.link)
        free(self.near_table)
        free(self.time_bits)

    cdef void put_near(self, int64_t row) noexcept nogil:
        cdef int i
        cdef uint64_t at
        for i in range(self.n):
            if self.compared[i].near and self.compared[i].state[row] != A_CELL:
                return
        at = self.row_hash(row, True) & self.mask
        while self.near_table[at].row >= 0 and not self.is_equal(self.near_table[at].row, row, True):
            at = (at + 1) & self.mask
        if self.near_table[at].row < 0:
            self.near_table[at].row = <int32_t>row

    cdef uint64_t row_hash(self, int64_t row, bint near) noexcept nogil:
        cdef uint64_t h = 1
        cdef int i
        cdef Compared *one
        for i in range(self.n):
            one = &self.compared[i]
            if near and not one.near:
                continue
            if one.state[row] != A_CELL:
                h = mixed(h, STEP)
            elif one.type == PS_STRING:
                h = mixed(h, text_hash(one.bytes + one.data[row], one.data[row + 1] - one.data[row]))
            else:
                h = mixed(h, <uint64_t>one.data[row])
        return h

    cdef uint64_t event_hash(self, bint near) noexcept nogil:
        cdef uint64_t h = 1
        cdef int i
        cdef Value *value
        for i in range(self.n):
            if near and not self.compared[i].near:
                continue
            value = &self.values[i]
            if not value.present:
                h = mixed(h, STEP)
            elif self.compared[i].type == PS_STRING:
                h = mixed(h, text_hash(value.text, value.length))
            else:
                h = mixed(h, value.slot.u)
        return h

    cdef bint is_equal(self, int64_t a, int64_t b, bint near) noexcept nogil:
        """Whether two rows are the same in all that is compared; near: in key and time."""
        cdef int i
        cdef Compared *one
        cdef int64_t length
        for i in range(self.n):
            one = &self.compared[i]
            if near and not one.near:
                continue
            if one.state[a] != one.state[b]:
                return False
            if one.state[a] != A_CELL:
                continue
            if one.type != PS_STRING:
                if one.data[a] != one.data[b]:
                    return False
                continue
            length = one.data[a + 1] - one.data[a]
            if length != one.data[b + 1] - one.data[b] or memcmp(one.bytes + one.data[a], one.bytes + one.data[b],
                                                                 length) != 0:
                return False
        return True

    cdef uint64_t differing(self, int64_t row, bint near) noexcept nogil:
        """Bit per compared column in which the event that is looked at is not the row; bit 63 for all from there on."""
        cdef int i
        cdef Compared *one
        cdef Value *value
        cdef uint64_t found = 0
        cdef bint same
        for i in range(self.n):
            one = &self.compared[i]
            if near and not one.near:
                continue
            value = &self.values[i]
            same = one.state[row] == (A_CELL if value.present else NULL_CELL)
            if same and value.present:
                if one.type == PS_STRING:
                    same = (<uint64_t>(one.data[row + 1] - one.data[row]) == value.length
                            and memcmp(one.bytes + one.data[row], value.text, value.length) == 0)
                else:
                    same = one.data[row] == value.slot.i
            if not same:
                found |= <uint64_t>1 << min(i, 63)
        return found

    cdef void read(self, const ps_record *r, EventMapping mapping, int i) noexcept nogil:
        """The event's value of a compared column."""
        cdef int field = self.compared[i].field
        cdef int at = mapping.fields[field]
        cdef Value *value = &self.values[i]
        if at < 0:
            value.slot = mapping.values[field]
            value.present = mapping.status[field] & 7 == PS_PRESENT
            value.text = mapping.text_of[field]
            value.length = value.slot.u
        else:
            value.slot = ps_record_slots(r)[at]
            value.present = ps_record_status(r)[at] & 7 == PS_PRESENT
            value.text = ps_record_strings(r) + PS_STR_OFFSET(value.slot.u)
            value.length = PS_STR_LENGTH(value.slot.u)
        if self.compared[i].type == PS_FLOAT64 and value.present:
            if value.slot.f != value.slot.f:
                value.present = False
            elif value.slot.f == 0.0:
                value.slot.u = 0  # -0.0 equals 0.0

    cdef int64_t find(self, const ps_record *r, EventMapping mapping, const uint8_t *taken, int64_t by_id) noexcept nogil:
        """The row that this event is, or -1. by_id: a row that is this event by its id, or -1: then no other gets it, as
        long as there are others."""
        cdef int i
        cdef uint64_t at
        cdef Equal *equal
        cdef Near *near
        cdef int32_t row
        if self.time >= 0:
            self.read(r, mapping, self.time)
            at = mixed(0, self.values[self.time].slot.u) & self.time_mask
            if not self.time_bits[at >> 3] >> (at & 7) & 1:
                return -1
        for i in range(self.n):
            if i != self.time:
                self.read(r, mapping, i)
        at = self.event_hash(False) & self.mask
        while self.table[at].row >= 0 and self.differing(self.table[at].row, False) != 0:
            at = (at + 1) & self.mask
        equal = &self.table[at]
        if equal.row >= 0:
            if by_id >= 0:
                equal.last = <int32_t>by_id
                return -1
            row = equal.turn
            while row >= 0 and taken[row]:
                row = self.link[row]
            equal.turn = row
            if row < 0:
                return -1
            equal.turn = self.link[row]
            equal.last = row
            return row
        if self.has_near:
            at = self.event_hash(True) & self.mask
            while self.near_table[at].row >= 0 and self.differing(self.near_table[at].row, True) != 0:
                at = (at + 1) & self.mask
            near = &self.near_table[at]
            if near.row >= 0:
                near.met = 1
                near.differs |= self.differing(near.row, False)
        return -1

    def near(self, const uint8_t[::1] taken):
        """(rows that have the key and time of an event and are none, bits of the compared columns that differ)."""
        cdef int64_t row, count = 0
        cdef uint64_t at, differs = 0
        cdef int i
        cdef bint keyed
        if not self.has_near:
            return 0, 0
        for row in range(self.rows):
            if taken[row] or self.skip[row]:
                continue
            keyed = True
            for i in range(self.n):
                keyed = keyed and not (self.compared[i].near and self.compared[i].state[row] != A_CELL)
            if not keyed:
                continue
            at = self.row_hash(row, True) & self.mask
            while self.near_table[at].row >= 0 and not self.is_equal(self.near_table[at].row, row, True):
                at = (at + 1) & self.mask
            if self.near_table[at].row >= 0 and self.near_table[at].met:
                count += 1
                differs |= self.near_table[at].differs
        return count, differs


cdef class SpineSearch:
    """The walk. looks: a Look per way to tell a row's event. times: T per row; order: rows by T.

    bounds: filled with the first sequence that came in behind each row's T; None where rows are not bound by ingest time.
    sequence, event_time, ingest_time: filled with those of each row's own event; sequence is -1 where it has none.
    """

    def __cinit__(self, list looks, const int64_t[::1] times, const int64_t[::1] order, bounds, int64_t[::1] sequence,
                  int64_t[::1] event_time, int64_t[::1] ingest_time, uint8_t[::1] taken):
        cdef int64_t[::1] bound
        cdef int64_t row
        self.looks = looks
        self.keep = (times, order, bounds, sequence, event_time, ingest_time, taken)
        self.rows = times.shape[0]
        self.n_waiting = self.rows if looks else 0
        self.expected = -1
        self.newest_ingest = -NEVER
        self.earliest = NEVER
        if self.rows:
            self.times = &times[0]
            self.order = &order[0]
            self.sequence = &sequence[0]
            self.event_time = &event_time[0]
            self.ingest_time = &ingest_time[0]
            self.taken = &taken[0]
            if bounds is not None:
                bound = bounds
                self.bounds = &bound[0]
            for row in range(self.rows):
                sequence[row] = -1
        if self.bounds == NULL:
            self.n_bounded = self.rows

    def feed(self, const uint8_t[::1] data, int64_t log_id, uint64_t number, uint64_t start, uint64_t end,
             RecordSchemas schemas, list mappings, list times, int64_t last_sequence, int64_t most):
        """Take the records of a piece of the log, as SpineRun.feed. times: per schema number the field with the event time.

        Raises LogError at a record that is not of its schema. Returns (offset reached, why): "end", "stopped" (a record does not check), "some" (there is more), "done" (nothing
        is open any more).
        """
        cdef uint64_t at = start
        cdef int64_t length = 0, row, mine
        cdef const char *base = <const char *>&data[0] if data.shape[0] else NULL
        cdef const ps_record *r
        cdef void *kinds[256]
        cdef void *looks[256]
        cdef int time_of[256]
        cdef int n_mappings = len(mappings), n_looks = len(self.looks)
        cdef int i
        cdef int64_t until = self.seen + most, when
        cdef EventMapping mapping
        cdef bint done = False
        if n_mappings != schemas.n:
            raise LogError(f"expected {schemas.n} mappings, one per schema, got {n_mappings}")
        if n_looks > 256:
            raise LogError("more than 256 ways to tell a row's event")
        if end > <uint64_t>data.shape[0]:
            end = data.shape[0]
        for i, one in enumerate(mappings):
            kinds[i] = NULL if one is None else <void *>one
            time_of[i] = -1 if one is None else (<EventMapping>one).fields[<int>times[i]]
        for i, look in enumerate(self.looks):
            looks[i] = <void *>look
        with nogil:
            while at < end and self.seen < until:
                if self.n_waiting == 0 and self.n_bounded == self.rows:
                    done = True
                    break
                length = ps_record_read(base, end, at, <uint64_t>log_id, number, &schemas.c)
                if length <= 0:
                    break
                r = <const ps_record *>(base + at)
                at += length
                if r.kind != PS_RECORD_EVENT:
                    continue
                if r.sequence > last_sequence:
                    at = end
                    break
                if self.expected >= 0 and r.sequence != self.expected:
                    with gil:
                        raise LogError(
                            f"events {self.expected} to {r.sequence - 1} are missing before offset {at - length}")
                self.expected = r.sequence + 1
                self.seen += 1
                if r.ingest_time > self.newest_ingest:
                    self.newest_ingest = r.ingest_time
                while self.n_bounded < self.rows and self.times[self.order[self.n_bounded]] < self.newest_ingest:
                    self.bounds[self.order[self.n_bounded]] = r.sequence
                    self.n_bounded += 1
                if kinds[r.schema] == NULL:
                    continue
                when = ps_record_slots(r)[time_of[r.schema]].i if time_of[r.schema] >= 0 else NEVER
                if when < self.earliest:
                    self.earliest = when
                if r.outcome == OUTCOME_DUPLICATE:
                    continue  # the event that it repeats is in the log, and stands for both
                mine = -1
                for i in range(n_looks):
                    if (<Look>looks[i]).source != (<EventMapping>kinds[r.schema]).source:
                        continue
                    row = (<Look>looks[i]).find(r, <EventMapping>kinds[r.schema], self.taken, mine)
                    if row >= 0:
                        mine = row
                        self.taken[row] = 1
                        self.sequence[row] = r.sequence
                        self.event_time[row] = when
                        self.ingest_time[row] = r.ingest_time
                        self.n_waiting -= 1
        if length == PS_RECORD_MISFIT:
            raise schemas.refusal(<const ps_record *>(base + at), at)
        if done:
            return at, "done"
        if self.seen >= until and at < end:
            return at, "some"
        return at, "stopped" if at < end else "end"

    def finish(self):
        """The log has ended: rows without a bound see all of it, and a row beyond the events that are equal to it is the
        last of them once more."""
        cdef Look look
        cdef int64_t at
        cdef int32_t row
        while self.n_bounded < self.rows:
            self.bounds[self.order[self.n_bounded]] = NEVER
            self.n_bounded += 1
        for look in self.looks:
            for at in range(<int64_t>look.mask + 1):
                if look.table[at].last < 0:
                    continue
                row = look.table[at].turn
                while row >= 0:
                    if not self.taken[row]:
                        self.taken[row] = 1
                        self.sequence[row] = self.sequence[look.table[at].last]
                        self.event_time[row] = self.event_time[look.table[at].last]
                        self.ingest_time[row] = self.ingest_time[look.table[at].last]
                        self.n_waiting -= 1
                    row = look.link[row]

    @property
    def totals(self):
        """(events seen, the earliest event time among those of the asked types, or None)."""
        return self.seen, None if self.earliest == NEVER else self.earliest
