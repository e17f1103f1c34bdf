"""Rows of a user's spine as of their own (T, K), from the event log (hot path): one store, one partition of its keys.

Records are taken in the order of the log and rows in the order of their bounds: a row is read when every event that it
may see is applied, and none beyond. A row that is one of the log's events is read as when that was scored: just before
it, and views with include_request_event just after it. What must stay true: events go through Core.advance as when they
were scored, with the watermark of all of the event type's events, so that a value does not depend on how keys are split
over partitions.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.math cimport NAN
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy

import numpy as np

from penstock.errors import EngineError, LogError

from penstock._ext.core cimport Core
from penstock._ext.decision cimport OUTCOME_APPLIED, OUTCOME_DUPLICATE, slot_value
from penstock._ext.event_record cimport PS_RECORD_EVENT, PS_RECORD_MISFIT, ps_record, ps_record_read
from penstock._ext.events cimport ColumnSet, EventReader, ps_arena_append
from penstock._ext.history cimport EventMapping
from penstock._ext.log cimport RecordSchemas
from penstock._ext.row cimport (
    PS_AGED, PS_FLOAT64, PS_INVALID, PS_NULL_VALUE, PS_OUTSIDE_MAX_AGE, PS_PRESENT, PS_STR, PS_STR_LENGTH, PS_STR_OFFSET, ps_slot,
)
from penstock._ext.steps cimport MAX_COLUMNS, Pipe, Source, SourceC, Use, checked
from penstock._ext.windows cimport WindowStore, ps_arena, ps_event, ps_handle

cdef enum:
    BY_SEQUENCE = 0           # a row sees what the log holds before its bound
    BACKFILL = 1              # every event before it, in the order S6: by event time, then as in the log, whose ingest clock
                              # never goes back (S14)
    AHEAD = 6                 # steps before an entity is needed that it is asked for
    TOO_LARGE = -3

MODES = {"sequence": BY_SEQUENCE, "backfill": BACKFILL}


cdef class SpineRun:
    """The rows of one partition of a spine through one store.

    core: of `source` alone, whose one store is `store`. reader, columns: the spine as events; key: (slot, is an integer,
    becomes an integer, may be null). part, parts: keys whose hash falls on `part` of `parts`. mode: see MODES. lateness:
    rows as of their time alone that are older than the watermark by more are set aside (`beyond`). budget: bytes that
    kept events may take.
    """

    def __cinit__(self, Core core, Source source, WindowStore store, EventReader reader, ColumnSet columns, tuple key,
                  int part, int parts, str mode, int64_t lateness, uint64_t budget, int width):
        self.core = core
        self.source = source
        self.store = store
        self.reader = reader
        self.columns = columns
        self.key.slot, self.key.is_int, self.key.to_int, self.keyed = key
        self.part = part
        self.parts = parts
        self.mode = MODES[mode]
        self.lateness = lateness
        self.budget = budget
        self.width = width
        self.slots = <ps_slot *>checked(width, sizeof(ps_slot))
        self.status = <uint8_t *>checked(width, 1)
        self.block_slots = <ps_slot *>checked(OPS * width, sizeof(ps_slot))
        self.block_status = <uint8_t *>checked(OPS * width, 1)
        self.watermark = source.c.watermark
        self.out = <ps_slot *>checked(len(store.outputs), sizeof(ps_slot))
        self.out_status = <uint8_t *>checked(len(store.outputs), 1)
        self.expected = -1

    def __dealloc__(self):
        cdef int i
        for i in range(self.n_groups):
            free(self.groups[i].outputs)
        if self.kept_texts != NULL:
            for i in range(self.n_outputs):
                free(self.kept_texts[i].data)
        free(self.kept_texts)
        free(self.groups)
        free(self.outputs)
        free(self.out)
        free(self.out_status)
        free(self.found.data)
        free(self.block_slots)
        free(self.block_status)
        free(self.block.data)
        free(self.slots)
        free(self.status)
        free(self.arena.data)
        free(self.hashes)
        free(self.kept_slots)
        free(self.kept_status)
        free(self.kept_time)
        free(self.kept_place)
        free(self.kept.data)

    cdef int partition_of(self, uint64_t partition) noexcept nogil:
        return <int>((partition >> 32) % <uint64_t>self.parts)

    cdef uint64_t key_hash(self) noexcept nogil:
        """Of the key in keys.key[0], for the state."""
        return self.store.api.hash(self.store.ptr, &self.keys.key[0])

    cdef uint64_t key_partition(self) noexcept nogil:
        """Of the key in keys.key[0]: the same in every process that works on the same rows."""
        return self.store.api.partition(&self.keys.key[0])

    cdef void note_key(self, uint64_t partition) noexcept nogil:
        if not self.any_key:
            self.one_key = partition
            self.any_key = True
        elif partition != self.one_key:
            self.many_keys = True

    cdef int large(self) noexcept nogil:
        """The state does not fit; with one key alone it never will."""
        self.hopeless = self.hopeless or not self.many_keys
        return TOO_LARGE

    def choose(self):
        """Numbers of the spine's rows that are this partition's, in order. A row without a key is in partition 0."""
        cdef int64_t i, n = self.columns.rows, count = 0
        cdef int64_t[::1] found
        cdef bint mine
        cdef int code = 0
        rows = np.empty(n, dtype=np.int64)
        found = rows
        with nogil:
            for i in range(n):
                self.arena.used = 0
                if self.reader.read_row(self.columns.columns, i, self.slots, self.status, &self.arena) != 0:
                    code = -1
                    break
                if self.keyed and self.status[self.key.slot] != PS_PRESENT:
                    mine = self.part == 0
                else:
                    self.core.prepare_keys(&self.key, 1, self.slots, &self.arena, &self.keys)
                    mine = self.partition_of(self.key_partition()) == self.part
                if mine:
                    found[count] = i
                    count += 1
        if code != 0:
            raise MemoryError()
        return rows[:count].copy()

    def begin(self, const int64_t[::1] rows, const int64_t[::1] places, const int64_t[::1] times,
              const uint8_t[::1] kinds, const int64_t[::1] bounds, const int64_t[::1] bound_times, list groups,
              list outputs, uint8_t[::1] beyond, uint8_t[::1] anything):
        """The rows to read, by bound: number in the spine, place in the partition, T, kind and bound (all by position);
        with backfill the bound is (time, sequence).

        groups: (group, the row's own event counts (S8), the row counts as an event where it is none of the log's, [output
        or -1 per output of the group]). outputs: (address of 8 bytes and of a status byte per place, is a string, counts,
        default: None, 8 bytes, or the text of a string). anything: set where a row has a value that is no count of 0.
        """
        cdef int i, j
        cdef SpineOutput *output
        self.keep = (rows, places, times, kinds, bounds, bound_times, outputs, beyond, anything)
        self.n_rows = rows.shape[0]
        self.next_row = 0
        self.n_beyond = 0
        if self.n_rows:
            self.rows = &rows[0]
            self.places = &places[0]
            self.times = &times[0]
            self.kinds = &kinds[0]
            self.bounds = &bounds[0]
            self.bound_times = &bound_times[0]
            self.beyond = &beyond[0]
            self.anything = &anything[0]
        self.hashes = <uint64_t *>checked(self.n_rows, sizeof(uint64_t))
        self.n_groups = len(groups)
        self.groups = <SpineGroup *>checked(len(groups), sizeof(SpineGroup))
        for i, (group, with_own, with_row, wanted) in enumerate(groups):
            self.groups[i].group = group
            self.groups[i].with_own = with_own
            self.groups[i].with_row = with_row
            self.any_own = self.any_own or with_own
            self.groups[i].n = len(wanted)
            self.groups[i].outputs = <int *>checked(len(wanted), sizeof(int))
            for j in range(len(wanted)):
                self.groups[i].outputs[j] = wanted[j]
        self.n_outputs = len(outputs)
        self.outputs = <SpineOutput *>checked(len(outputs), sizeof(SpineOutput))
        self.kept_texts = <ps_arena *>checked(len(outputs), sizeof(ps_arena))
        for i, (data, status, is_string, counts, default) in enumerate(outputs):
            output = &self.outputs[i]
            output.data = <ps_slot *><uintptr_t>data
            output.status = <uint8_t *><uintptr_t>status
            output.is_string = is_string
            output.counts = counts
            output.has_default = default is not None
            if default is not None and is_string:
                output.text = PyBytes_AS_STRING(default)
                output.value.u = <uint64_t>PyBytes_GET_SIZE(default)
            elif default is not None:
                memcpy(&output.value, PyBytes_AS_STRING(default), 8)
        with nogil:
            for i in range(self.n_rows):
                self.arena.used = 0
                if self.reader.read_row(self.columns.columns, self.rows[i], self.slots, self.status, &self.arena) != 0:
                    with gil:
                        raise MemoryError()
                if self.keyed and self.status[self.key.slot] != PS_PRESENT:
                    continue
                self.core.prepare_keys(&self.key, 1, self.slots, &self.arena, &self.keys)
                self.hashes[i] = self.key_hash()

    def feed(self, const uint8_t[::1] data, int64_t log_id, uint64_t number, uint64_t start, uint64_t end,
             RecordSchemas schemas, list mappings, int64_t last_sequence, int64_t most):
        """Take the records of a piece of the log from an offset on, `most` events of it. schemas: the piece's;
        mappings: per schema number an EventMapping, or None where it is not the source's.

        Raises LogError at a record that is not of its schema. Returns (offset reached, why): "end", "stopped" (a record
        does not check), "some" (there is more), "done" (no row waits), "large" (the budget is too small).
        """
        cdef uint64_t at = start
        cdef int64_t length = 0
        cdef const char *base = <const char *>&data[0] if data.shape[0] else NULL
        cdef const ps_record *r
        cdef void *kinds[256]
        cdef int n_mappings = len(mappings)
        cdef int i, code = 0
        cdef int64_t until = self.events + most, first
        cdef bint here
        if n_mappings != schemas.n:
            raise LogError(f"expected {schemas.n} mappings, one per schema, got {n_mappings}")
        if end > <uint64_t>data.shape[0]:
            end = data.shape[0]
        for i, mapping in enumerate(mappings):
            kinds[i] = NULL if mapping is None else <void *>mapping
        with nogil:
            while at < end and code == 0:
                if self.events >= until:
                    break
                length = ps_record_read(base, end, at, <uint64_t>log_id, number, &schemas.c)
                if length <= 0:
                    break
                r = <const ps_record *>(base + at)
                if r.kind == PS_RECORD_EVENT:
                    if r.sequence > last_sequence:
                        at = end
                        break
                    if self.expected >= 0 and r.sequence != self.expected:
                        with gil:
                            raise LogError(f"events {self.expected} to {r.sequence - 1} are missing before offset {at}")
                    self.expected = r.sequence + 1
                    self.events += 1
                    here = r.schema < n_mappings and kinds[r.schema] != NULL
                    first = self.next_row
                    if self.mode == BY_SEQUENCE:
                        code = self.read_until(r.sequence + 1, r.sequence if here else -1)
                    if self.next_row == self.n_rows and not self.waits(first, r.sequence, here):
                        break
                    if code == 0 and here and self.mode == BACKFILL:
                        code = self.keep_event(r, <EventMapping>kinds[r.schema])
                    elif code == 0 and here and r.outcome == OUTCOME_APPLIED:
                        code = self.take(r, <EventMapping>kinds[r.schema])
                    if code == 0 and self.mode == BY_SEQUENCE and self.waits(first, r.sequence, here):
                        code = self.read_behind(first, r, <EventMapping>kinds[r.schema])
                at += length
            if code == 0:
                code = self.run_queue()
        if code == TOO_LARGE:
            return at, "large"
        if code != 0:
            raise EngineError("out of memory while reading the log")
        if length == PS_RECORD_MISFIT:
            raise schemas.refusal(<const ps_record *>(base + at), at)
        if self.next_row == self.n_rows:
            return at, "done"
        if self.events >= until and at < end:
            return at, "some"
        return at, "stopped" if at < end else "end"

    def finish(self):
        """The log has ended: read the rows that still wait. False where memory was too small."""
        cdef int code = 0
        cdef int64_t[::1] order
        if self.mode == BACKFILL and self.next_row < self.n_rows:
            ordered = np.empty(0, dtype=np.int64)
            if self.n_kept:
                # Kept in the order of the log: the sort is stable.
                ordered = np.argsort(np.asarray(<int64_t[:self.n_kept]>self.kept_time), kind="stable").astype(np.int64)
            order = ordered
            with nogil:
                code = self.replay(&order[0] if self.n_kept else NULL)
        elif self.mode != BACKFILL:
            with nogil:
                code = self.read_until(<int64_t>((<uint64_t>1 << 63) - 1), -1)
                if code == 0:
                    code = self.run_queue()
        if code == TOO_LARGE:
            return False
        if code != 0:
            raise EngineError("out of memory while reading the rows of a spine")
        return True

    # steps

    cdef int take(self, const ps_record *r, EventMapping mapping) noexcept nogil:
        """An event of the source: its time counts for all partitions, the rest where its key is of this one."""
        cdef uint64_t erased, partition
        cdef int code
        cdef int64_t at
        cdef ps_slot *slots
        cdef uint8_t *status
        cdef uint32_t used
        if self.n_ops == OPS:
            code = self.run_queue()
            if code != 0:
                return code
        slots = self.block_slots + self.n_ops * self.width
        status = self.block_status + self.n_ops * self.width
        used = self.block.used
        if mapping.read(r, slots, status, &self.block, &erased) != 0:
            return -1
        at = slots[self.source.c.time].i
        self.core.prepare_keys(self.source.c.keys, 1, slots, &self.block, &self.keys)
        partition = self.key_partition()
        if self.partition_of(partition) == self.part:
            self.note_key(partition)
            code = self.queue(-1, WHOLE, self.key_hash(), slots, status, &self.block)
            if code != 0:
                return code
        else:
            self.block.used = used
        if at > self.watermark:
            self.watermark = at
        return 0

    cdef int queue(self, int64_t row, int part, uint64_t hash, ps_slot *slots, uint8_t *status,
                   ps_arena *arena) noexcept nogil:
        """A step more; the steps that wait are run where there are many."""
        cdef int code
        cdef SpineOp *op
        if self.n_ops == OPS:
            code = self.run_queue()
            if code != 0:
                return code
        op = &self.ops[self.n_ops]
        op.row = row
        op.part = part
        op.watermark = self.watermark
        op.hash = hash
        op.slots = slots
        op.status = status
        op.arena = arena
        self.n_ops += 1
        self.store.api.prefetch(self.store.ptr, hash)
        return 0

    cdef int run_queue(self) noexcept nogil:
        cdef int i, code, n = self.n_ops
        cdef SpineOp *op
        for i in range(min(n, AHEAD)):
            self.store.api.prefetch_blob(self.store.ptr, self.ops[i].hash)
        for i in range(n):
            if i + AHEAD < n:
                self.store.api.prefetch_blob(self.store.ptr, self.ops[i + AHEAD].hash)
            op = &self.ops[i]
            if op.watermark > self.source.c.watermark:
                self.source.c.watermark = op.watermark
            if op.row >= 0:
                code = self.read_row(op.row, op.part, op.slots, op.status, op.arena)
            else:
                code = self.apply(op.slots, op.status, op.arena, op.hash)
            if code != 0:
                return code
        self.n_ops = 0
        self.block.used = 0
        return 0

    cdef int apply(self, ps_slot *slots, uint8_t *status, ps_arena *arena, uint64_t hash) noexcept nogil:
        """An event, as the engine applies it."""
        # The store learns where the watermark of all partitions stands, and releases nothing yet.
        self.store.api.sweep(self.store.ptr, self.source.c.watermark, 0)
        self.core.prepare_keys(self.source.c.keys, 1, slots, arena, &self.keys)
        self.keys.hash[0] = hash
        self.verdict.outcome = OUTCOME_APPLIED
        if self.core.advance(&self.source.c, NULL, NULL, slots, status, arena, &self.keys, 2, &self.verdict) != 0:
            return self.large()
        self.core.sweep(&self.source.c)
        self.applied += 1
        return 0

    cdef int read_until(self, int64_t bound, int64_t own) noexcept nogil:
        """The rows whose bound is below are the next steps. own: the sequence of an event of this source that comes next:
        of rows that are it, views that count it wait."""
        cdef int code
        cdef int64_t i
        while self.next_row < self.n_rows and self.bounds[self.next_row] < bound:
            i = self.next_row
            code = self.queue(i, BEFORE if self.is_own(i, own) else WHOLE, self.hashes[i], NULL, NULL, NULL)
            if code != 0:
                return code
            self.next_row += 1
        return 0

    cdef bint is_own(self, int64_t i, int64_t sequence) noexcept nogil:
        """Whether a row is the event with this sequence, and some view counts it."""
        return self.any_own and self.kinds[i] == OWN and self.bounds[i] == sequence

    cdef bint waits(self, int64_t first, int64_t sequence, bint here) noexcept nogil:
        """Whether a row from `first` on is to be read behind the event with this sequence."""
        cdef int64_t i
        if here:
            for i in range(first, self.next_row):
                if self.is_own(i, sequence):
                    return True
        return False

    cdef int read_behind(self, int64_t first, const ps_record *r, EventMapping mapping) noexcept nogil:
        """The rows that are this event, through the views that count it. One that was not applied counts for them alone,
        as when it was scored."""
        cdef int64_t i
        cdef int code = 0
        cdef uint64_t erased
        cdef ps_slot *slots
        cdef uint8_t *status
        for i in range(first, self.next_row):
            if code != 0:
                return code
            if not self.is_own(i, r.sequence):
                continue
            if r.outcome == OUTCOME_APPLIED:
                code = self.queue(i, BEHIND, self.hashes[i], NULL, NULL, NULL)
                continue
            if self.n_ops == OPS:
                code = self.run_queue()
                if code != 0:
                    return code
            slots = self.block_slots + self.n_ops * self.width
            status = self.block_status + self.n_ops * self.width
            if mapping.read(r, slots, status, &self.block, &erased) != 0:
                return -1
            code = self.queue(i, BEHIND, self.hashes[i], slots, status, &self.block)
        return code

    cdef int read_row(self, int64_t index, int part, ps_slot *own_slots, uint8_t *own_status,
                      ps_arena *own_arena) noexcept nogil:
        """One row, through the views that the part says. own_slots: its own event, where that was not applied."""
        cdef int64_t place = self.places[index], at = self.times[index]
        cdef ps_slot values[MAX_COLUMNS]
        cdef uint8_t statuses[MAX_COLUMNS]
        cdef ps_event event
        cdef const ps_event *extra
        cdef ps_handle handle = 0
        cdef SpineGroup *group
        cdef SpineOutput *output
        cdef Use *use = &self.source.c.uses[0]
        cdef int g, j, k
        cdef uint8_t status, kind = self.kinds[index]
        cdef bint has_event = False
        if self.source.c.watermark - at > self.lateness and (kind == AS_OF or self.mode == BACKFILL):
            self.beyond[place] = 1
            self.n_beyond += 1
            return 0
        self.store.api.sweep(self.store.ptr, self.source.c.watermark, 0)
        self.arena.used = 0
        if self.reader.read_row(self.columns.columns, self.rows[index], self.slots, self.status, &self.arena) != 0:
            return -1
        if not self.keyed or self.status[self.key.slot] == PS_PRESENT:
            self.core.prepare_keys(&self.key, 1, self.slots, &self.arena, &self.keys)
            handle = self.store.api.find(self.store.ptr, &self.keys.key[0], self.hashes[index])
        self.found.used = 0
        for g in range(self.n_groups):
            group = &self.groups[g]
            if part != WHOLE and group.with_own != (part == BEHIND):
                continue
            extra = NULL
            if part == BEHIND and own_slots != NULL and own_slots[self.source.c.time].i <= at:
                if not has_event:
                    has_event = True
                    self.as_event(own_slots[self.source.c.time].i, own_slots, own_status, own_arena, values, statuses,
                                  &event)
                extra = &event
            elif group.with_row and (kind == AS_OF or kind == SERVED):
                if not has_event:
                    has_event = True
                    self.as_event(at, self.slots, self.status, &self.arena, values, statuses, &event)
                extra = &event
            if self.store.api.read(self.store.ptr, handle, group.group, at, extra, self.out, self.out_status,
                                   &self.found) != 0:
                return -1
            for j in range(group.n):
                k = group.outputs[j]
                if k < 0:
                    continue
                output = &self.outputs[k]
                status = self.out_status[j]
                if status & 7 == PS_PRESENT and not (output.counts and self.out[j].i == 0):
                    self.anything[place] = 1
                if output.is_string:
                    output.data[place].u = 0
                    if status & 7 == PS_PRESENT:
                        if ps_arena_append(&self.kept_texts[k], self.found.data + PS_STR_OFFSET(self.out[j].u),
                                           PS_STR_LENGTH(self.out[j].u), &output.data[place].u) != 0:
                            return TOO_LARGE
                    elif output.has_default and status & 7 != PS_INVALID:
                        if ps_arena_append(&self.kept_texts[k], output.text, output.value.u, &output.data[place].u) != 0:
                            return TOO_LARGE
                else:
                    output.data[place] = self.out[j]
                    if status & 7 != PS_PRESENT and status & 7 != PS_INVALID and output.has_default:
                        output.data[place] = output.value
                if status & 7 != PS_PRESENT and status & 7 != PS_INVALID and output.has_default:
                    status = PS_PRESENT | (PS_AGED if status & 7 == PS_OUTSIDE_MAX_AGE else 0)
                output.status[place] = status
        return 0

    cdef void as_event(self, int64_t at, ps_slot *slots, uint8_t *status, ps_arena *arena, ps_slot *values,
                       uint8_t *statuses, ps_event *event) noexcept nogil:
        """A row, or an event that was not applied, as the newest event of its time."""
        cdef Use *use = &self.source.c.uses[0]
        cdef int j
        for j in range(use.n_columns):
            values[j] = slots[use.fields[j]]
            statuses[j] = status[use.fields[j]]
        event.event_time = at
        event.ingest_time = at
        event.log_id = 0
        event.sequence = 0
        event.values = values
        event.status = statuses
        event.arena = arena.data
        event.where_mask = 0
        for j in range(use.n_where):
            if use.expressions.test(use.programs[j], slots, status, arena.data) == 1:
                event.where_mask |= <uint64_t>1 << j

    # backfill

    cdef int keep_event(self, const ps_record *r, EventMapping mapping) noexcept nogil:
        """An event that was applied; one that was not, where a row may be it and counts it."""
        cdef uint64_t erased, partition
        cdef int64_t at, room
        cdef void *memory
        if r.outcome != OUTCOME_APPLIED and (r.outcome == OUTCOME_DUPLICATE or not self.any_own):
            return 0
        self.arena.used = 0
        if mapping.read(r, self.slots, self.status, &self.arena, &erased) != 0:
            return -1
        at = self.slots[self.source.c.time].i
        self.core.prepare_keys(self.source.c.keys, 1, self.slots, &self.arena, &self.keys)
        partition = self.key_partition()
        if self.partition_of(partition) != self.part:
            return 0
        self.note_key(partition)
        if self.n_kept == self.room:
            room = self.room + self.room // 2 + 1024
            if <uint64_t>room * (9 * self.width + 16) + self.kept.capacity > self.budget:
                return self.large()
            memory = realloc(self.kept_slots, room * self.width * sizeof(ps_slot))
            if memory == NULL:
                return self.large()
            self.kept_slots = <ps_slot *>memory
            memory = realloc(self.kept_status, room * self.width)
            if memory == NULL:
                return self.large()
            self.kept_status = <uint8_t *>memory
            memory = realloc(self.kept_time, room * 8)
            if memory == NULL:
                return self.large()
            self.kept_time = <int64_t *>memory
            memory = realloc(self.kept_place, room * 8)
            if memory == NULL:
                return self.large()
            self.kept_place = <int64_t *>memory
            self.room = room
        if mapping.read(r, self.kept_slots + self.n_kept * self.width, self.kept_status + self.n_kept * self.width,
                        &self.kept, &erased) != 0:
            return self.large()
        self.kept_time[self.n_kept] = at
        self.kept_place[self.n_kept] = r.sequence if r.outcome == OUTCOME_APPLIED else ~r.sequence
        self.n_kept += 1
        return 0

    cdef bint stands_before(self, int64_t row, int64_t k, int64_t sequence) noexcept nogil:
        """Whether a row is read before a kept event is applied: the event is behind it in the order S6, or is it."""
        if self.bound_times[row] != self.kept_time[k]:
            return self.bound_times[row] < self.kept_time[k]
        return self.bounds[row] <= sequence

    cdef int replay(self, const int64_t *order) noexcept nogil:
        """The kept events in the order S6, and each row when all events that it sees are applied."""
        cdef int64_t i, j, k = 0, at = 0, first, sequence = -1
        cdef int code
        cdef bint applied = False
        cdef ps_slot *slots
        cdef uint8_t *status
        for i in range(self.n_kept + 1):
            if i < self.n_kept:
                k = order[i]
                at = self.kept_time[k]
                applied = self.kept_place[k] >= 0
                sequence = self.kept_place[k] if applied else ~self.kept_place[k]
            first = self.next_row
            while self.next_row < self.n_rows and (i == self.n_kept or self.stands_before(self.next_row, k, sequence)):
                j = self.next_row
                code = self.queue(j, BEFORE if i < self.n_kept and self.is_own(j, sequence) else WHOLE, self.hashes[j],
                                  NULL, NULL, NULL)
                if code != 0:
                    return code
                self.next_row += 1
            if i == self.n_kept or (self.next_row == self.n_rows and not self.waits(first, sequence, True)):
                return self.run_queue()
            slots = self.kept_slots + k * self.width
            status = self.kept_status + k * self.width
            if applied:
                self.core.prepare_keys(self.source.c.keys, 1, slots, &self.kept, &self.keys)
                code = self.queue(-1, WHOLE, self.key_hash(), slots, status, &self.kept)
                if code != 0:
                    return code
                self.watermark = max(self.watermark, at)
            for j in range(first, self.next_row):
                if not self.is_own(j, sequence):
                    continue
                code = self.queue(j, BEHIND, self.hashes[j], NULL if applied else slots, status, &self.kept)
                if code != 0:
                    return code
        return 0

    def text_column(self, int index, const uint64_t[::1] slots, const uint8_t[::1] status):
        """A string output's values in the order of places: (int64 offsets, bytes)."""
        cdef int64_t i, n = slots.shape[0], size = 0
        cdef int64_t[::1] out
        cdef const char *data = self.kept_texts[index].data
        cdef char *text
        offsets = np.zeros(n + 1, dtype=np.int64)
        out = offsets
        for i in range(n):
            if status[i] & 7 == PS_PRESENT:
                size += PS_STR_LENGTH(slots[i])
            out[i + 1] = size
        found = PyBytes_FromStringAndSize(NULL, size)
        text = PyBytes_AS_STRING(found)
        for i in range(n):
            if out[i + 1] > out[i]:
                memcpy(text + out[i], data + PS_STR_OFFSET(slots[i]), out[i + 1] - out[i])
        return offsets, found

    @property
    def never_fits(self):
        """Whether what did not fit would not fit with fewer keys either."""
        return self.hopeless

    @property
    def totals(self):
        """(events seen, events applied here, rows set aside)."""
        return self.events, self.applied, self.n_beyond


cdef class FunctionRun:
    """On-demand functions over joined rows: the engine's own step, on rows whose views are filled in already.

    core: of a pipeline without views, models, experiments and rules. reader, columns: the event's fields.
    """

    def __cinit__(self, Core core, EventReader reader, ColumnSet columns, int width):
        self.core = core
        self.pipe = <Pipe>core.pipes[0]
        self.reader = reader
        self.columns = columns
        self.width = width
        self.slots = <ps_slot *>checked(width, sizeof(ps_slot))
        self.status = <uint8_t *>checked(width, 1)

    def __dealloc__(self):
        free(self.slots)
        free(self.status)
        free(self.arena.data)

    def run(self, int64_t first, int64_t n, list fixed, list texts, list out):
        """Rows `first` to `first + n` of the columns. fixed: (slot, address of 8 bytes, of a status byte per row) of each
        view's feature; texts: (slot, address of int64 offsets, of bytes, of a status byte per row).
        out: (slot, is a string, address of 8 bytes, of a status byte per row).
        Returns (per entry of out the list of its strings or None, rows of which a function failed, the first error).
        """
        cdef int64_t i
        cdef int j, slot, n_fixed = len(fixed), n_texts = len(texts), n_out = len(out)
        cdef int *fixed_slot = <int *>checked(n_fixed, sizeof(int))
        cdef ps_slot **fixed_data = <ps_slot **>checked(n_fixed, sizeof(void *))
        cdef uint8_t **fixed_status = <uint8_t **>checked(n_fixed, sizeof(void *))
        cdef int *text_slot = <int *>checked(n_texts, sizeof(int))
        cdef int64_t **text_offsets = <int64_t **>checked(n_texts, sizeof(void *))
        cdef char **text_bytes = <char **>checked(n_texts, sizeof(void *))
        cdef uint8_t **text_status = <uint8_t **>checked(n_texts, sizeof(void *))
        cdef int *out_slot = <int *>checked(n_out, sizeof(int))
        cdef ps_slot **out_data = <ps_slot **>checked(n_out, sizeof(void *))
        cdef uint8_t **out_status = <uint8_t **>checked(n_out, sizeof(void *))
        cdef uint8_t *out_text = <uint8_t *>checked(n_out, 1)
        cdef int64_t failed = 0
        cdef list strings = []
        cdef object error = None
        try:
            for j, (slot, data, status) in enumerate(fixed):
                fixed_slot[j] = slot
                fixed_data[j] = <ps_slot *><uintptr_t>data
                fixed_status[j] = <uint8_t *><uintptr_t>status
            for j, (slot, offsets, data, status) in enumerate(texts):
                text_slot[j] = slot
                text_offsets[j] = <int64_t *><uintptr_t>offsets
                text_bytes[j] = <char *><uintptr_t>data
                text_status[j] = <uint8_t *><uintptr_t>status
            for j, (slot, is_string, data, status) in enumerate(out):
                out_slot[j] = slot
                out_text[j] = is_string
                out_data[j] = <ps_slot *><uintptr_t>data
                out_status[j] = <uint8_t *><uintptr_t>status
                strings.append([] if is_string else None)
            with nogil:
                for i in range(n):
                    self.arena.used = 0
                    if self.reader.read_row(self.columns.columns, first + i, self.slots, self.status, &self.arena) != 0:
                        with gil:
                            raise MemoryError()
                    for j in range(n_fixed):
                        self.slots[fixed_slot[j]] = fixed_data[j][i]
                        self.status[fixed_slot[j]] = fixed_status[j][i]
                    for j in range(n_texts):
                        slot = text_slot[j]
                        self.slots[slot].u = 0
                        self.status[slot] = text_status[j][i]
                        if self.status[slot] & 7 == PS_PRESENT:
                            if ps_arena_append(&self.arena, text_bytes[j] + text_offsets[j][i],
                                               text_offsets[j][i + 1] - text_offsets[j][i], &self.slots[slot].u) != 0:
                                with gil:
                                    raise MemoryError()
                    if self.run_row(i) != 0:
                        with gil:
                            raise MemoryError()
                    if self.verdict.failed >= 0:
                        failed += 1
                        if failed == 1:
                            with gil:
                                error = self.pipe.error
                    for j in range(n_out):
                        slot = out_slot[j]
                        out_status[j][i] = self.status[slot]
                        if out_text[j]:
                            with gil:
                                (<list>strings[j]).append(slot_value(self.slots[slot], self.status[slot], "string",
                                                                     self.arena.data))
                        else:
                            out_data[j][i] = self.slots[slot]
            return strings, failed, error
        finally:
            self.pipe.error = None
            free(fixed_slot)
            free(fixed_data)
            free(fixed_status)
            free(text_slot)
            free(text_offsets)
            free(text_bytes)
            free(text_status)
            free(out_slot)
            free(out_data)
            free(out_status)
            free(out_text)

    cdef int run_row(self, int64_t row) noexcept nogil:
        self.keys.ingest_time = self.slots[self.pipe.source.c.time].i
        return self.core.advance(&self.pipe.source.c, &self.pipe.c, <void *>self.pipe, self.slots, self.status, &self.arena,
                                 &self.keys, 0, &self.verdict)
