"""The event log through the engine core (hot path): recorded events in blocks, as they were judged, at their own (T, K).

What must stay true: a recorded outcome is obeyed, never judged again, so that recovery, backfill and parity see at each
event what scoring saw; and records are taken in order without a gap, or an error says which sequence is missing.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.math cimport NAN
from libc.stdint cimport int8_t, int16_t, int64_t, uint16_t, uint32_t, uint64_t, uint8_t, uintptr_t
from libc.stdlib cimport free
from libc.string cimport memchr, memcmp, memcpy

from penstock.errors import EngineError, LogError

from penstock._ext.batch cimport BatchRun
from penstock._ext.core cimport Core
from penstock._ext.decision cimport (
    Decision, OUTCOME_DUPLICATE, OUTCOME_LATE, OUTCOME_QUARANTINED, Verdict, slot_value,
)
from penstock._ext.event_record cimport (
    PS_ERASED, PS_RECORD_EVENT, PS_RECORD_HEAD, PS_RECORD_MISFIT, PS_RECORD_SCORE, ps_record, ps_record_read,
    ps_record_slots, ps_record_status, ps_record_strings, ps_record_versions, ps_score,
)
from penstock._ext.events cimport ps_arena_append
from penstock._ext.log cimport RecordSchemas
from penstock._ext.windows cimport ps_arena
from penstock._ext.row cimport (
    PS_AGED, PS_INVALID, PS_NULL_VALUE, PS_PRESENT, PS_STR, PS_STR_LENGTH, PS_STR_OFFSET, PS_STRING, PS_WIDE, ps_slot,
)
from penstock._ext.steps cimport BLOCK, PipeC, Pipe, RowKeys, Rows, Source, SourceC, checked

from penstock._ext.events import TYPE_CODES

cdef enum:
    EXAMPLES = 5              # mismatches kept per feature
    LAST_ERASED = 63          # bit of the mask of erased fields that stands for this field and all behind it


cdef class EventMapping:
    """How an event schema of a segment is read as an event type of the app: a record's field for each of the app's.

    fields: per field of the app the index in the record, or -1; types: names of the app's types; defaults: for each -1
    the value (None: null).
    """

    def __cinit__(self, int source, list fields, list types, list defaults, int record_fields):
        cdef int i
        self.source = source
        self.n = len(fields)
        self.fields = <int *>checked(self.n, sizeof(int))
        self.types = <uint8_t *>checked(self.n, 1)
        self.values = <ps_slot *>checked(self.n, sizeof(ps_slot))
        self.status = <uint8_t *>checked(self.n, 1)
        self.text_of = <const char **>checked(self.n, sizeof(void *))
        self.texts = []
        self.same = record_fields == self.n
        for i in range(self.n):
            self.fields[i] = fields[i]
            self.types[i] = TYPE_CODES[types[i]]
            self.same = self.same and fields[i] == i
            text = b""
            self.status[i] = PS_PRESENT
            if fields[i] < 0:
                value = defaults[i]
                if value is None:
                    self.status[i] = PS_NULL_VALUE
                    if self.types[i] == 0:
                        self.values[i].f = NAN
                elif types[i] == "float64":
                    self.values[i].f = value
                elif types[i] == "string":
                    text = value.encode()
                else:
                    self.values[i].i = int(value)
            self.texts.append(text)
            self.text_of[i] = PyBytes_AS_STRING(text)
            if self.types[i] == PS_STRING:
                self.values[i].u = len(text)

    def __dealloc__(self):
        free(self.fields)
        free(self.types)
        free(self.values)
        free(self.status)
        free(self.text_of)

    cdef int read(self, const ps_record *r, ps_slot *slots, uint8_t *status, ps_arena *arena,
                  uint64_t *erased) noexcept nogil:
        """The values of a record of this schema (ps_record_read) into a row. Returns 0, or -1 without memory.

        erased: bit per field whose value was erased; the fields from LAST_ERASED on share one.
        """
        cdef const ps_slot *from_slots = ps_record_slots(r)
        cdef const uint8_t *from_status = ps_record_status(r)
        cdef const char *strings = ps_record_strings(r)
        cdef int i, field
        erased[0] = 0
        if self.same:
            memcpy(slots, from_slots, self.n * sizeof(ps_slot))
            memcpy(status, from_status, self.n)
        for i in range(self.n):
            field = self.fields[i]
            if not self.same:
                if field < 0:
                    slots[i] = self.values[i]
                    status[i] = self.status[i]
                    if self.types[i] == PS_STRING and status[i] == PS_PRESENT:
                        if ps_arena_append(arena, self.text_of[i], self.values[i].u, &slots[i].u) != 0:
                            return -1
                    continue
                slots[i] = from_slots[field]
                status[i] = from_status[field]
            if status[i] & PS_ERASED:
                status[i] &= ~PS_ERASED
                erased[0] |= <uint64_t>1 << min(i, LAST_ERASED)
            if self.types[i] == PS_STRING:
                if status[i] & 7 != PS_PRESENT:
                    slots[i].u = 0  # never an offset into another row's texts
                elif ps_arena_append(arena, strings + PS_STR_OFFSET(slots[i].u), PS_STR_LENGTH(slots[i].u),
                                   &slots[i].u) != 0:
                    return -1
        return 0


cdef class ScoreMapping:
    """How a score schema of a segment is compared with a pipeline of the app.

    pipe: the pipeline's index, or -1. slots: per logged slot the pipeline's slot, or -1; keys: per logged slot the field
    that its view is keyed by, or -1. since: per logged slot the first T that history reaches back for. models: per model
    of the schema its number in the pipeline's decisions, or -1. same_words: indices of actions, reasons and arms mean the
    same. same_plan: and the models that ran are those that run now.
    """

    def __cinit__(self, int pipe, list slots, list strings, list keys, bint same_plan, list since=None,
                  list models=None, bint same_words=False):
        cdef int i
        self.pipe = pipe
        self.n = len(slots)
        self.same_plan = same_plan
        self.same_words = same_words
        self.n_models = len(models) if models is not None else 0
        self.models = <int *>checked(self.n_models, sizeof(int))
        for i in range(self.n_models):
            self.models[i] = models[i]
        self.slots = <int *>checked(self.n, sizeof(int))
        self.strings = <uint8_t *>checked(self.n, 1)
        self.keys = <int *>checked(self.n, sizeof(int))
        self.since = <int64_t *>checked(self.n, sizeof(int64_t))
        for i in range(self.n):
            self.since[i] = since[i] if since is not None else -(<int64_t>1 << 62)
            self.slots[i] = slots[i]
            self.strings[i] = strings[i]
            self.keys[i] = keys[i]

    def __dealloc__(self):
        free(self.slots)
        free(self.strings)
        free(self.keys)
        free(self.since)
        free(self.models)

    cdef int model_of(self, int number) noexcept nogil:
        """The pipeline's number of a record's model; -1 where it has none."""
        return self.models[number] if 0 <= number < self.n_models else -1


cdef class HistoryRun(BatchRun):
    """Feeds recorded events to an engine core. What comes out depends on `rows`:

    "none": state only, and the ids that the app remembers (recovery). "events": one output row per event of the
    pipeline's type. "scores": one output row per score record of the pipeline, and every logged value is compared.
    """

    def __cinit__(self, Core core, list tables, order, list out, Py_ssize_t pipeline, bint ingest, verdicts_out, progress,
                  str rows="none", int64_t next_sequence=-1, bint ids=False, Py_ssize_t capacity=0, places=None):
        cdef int i
        cdef Source source
        cdef Rows block
        self.want = {"none": 0, "events": 1, "scores": 2}[rows]
        self.expected = next_sequence
        self.restore_ids = ids
        self.capacity = capacity
        self.n_tables = len(core.sources)
        if self.n_tables > 32:
            raise EngineError("at most 32 event types in one log")
        self.tables = list(core.sources)
        for i, source in enumerate(core.sources):
            self.sources[i] = &source.c
            self.scored[i] = self.pipe is not None and source is self.pipe.source
        width, inputs, outputs = core._widths()
        self.blocks = [Rows(BLOCK, width, inputs, outputs, core.constants) for _ in range(2)]
        for i, rows_of in enumerate(self.blocks):
            block = <Rows>rows_of
            self.slots_of[i] = block.slots
            self.status_of[i] = block.status
            self.arena_of[i] = &block.arena
            self.keys_of[i] = block.keys
            self.verdicts_of[i] = block.verdicts
            self.width = block.width
        self.current = 0
        self.counts[0] = self.counts[1] = 0
        self.order_table = self.block_table[0]
        self.compared_slots = {}
        self.set_output(out, verdicts_out, places)
        self.begin_block()

    def set_output(self, list out, verdicts_out=None, places=None):
        """Where the next rows go (as for run_table). places: int64 sequences, int64 ingest times, uint8 outcomes, or None."""
        self.use_output(out)
        self.keep = out
        self.verdicts = verdicts_out
        self.places = places
        if places is not None:
            self.out_sequence = <int64_t *><uintptr_t>places[0].ctypes.data
            self.out_ingest = <int64_t *><uintptr_t>places[1].ctypes.data
            self.out_outcome = <uint8_t *><uintptr_t>places[2].ctypes.data
        self.written = 0
        self.ids_out = []

    # one segment

    def feed(self, const uint8_t[::1] data, int64_t log_id, uint64_t number, uint64_t start, uint64_t end,
             RecordSchemas schemas, list mappings, int64_t first_sequence=-(1 << 62), int64_t last_sequence=(1 << 62)):
        """Take the records of a segment from an offset on: to `end`, to the first that does not check, or until the output
        is full. schemas: the segment's; mappings: per schema number an EventMapping, a ScoreMapping or None (left out).
        first_sequence, last_sequence: events and scores outside are passed over.
        Raises LogError at a record that is not of its schema. Returns (offset reached, why: "end", "stopped" (a record does not check) or "full").
        """
        cdef uint64_t at = start
        cdef int64_t length = 0
        cdef const char *base = <const char *>&data[0] if data.shape[0] else NULL
        cdef const ps_record *r
        cdef void *kinds[256]
        cdef uint8_t is_event[256]
        cdef int sources[256]
        cdef uint64_t erased
        cdef int n_mappings = len(mappings)
        cdef int i
        cdef bint full = False
        if n_mappings != schemas.n:
            raise LogError(f"expected {schemas.n} mappings, one per schema, got {n_mappings}")
        if end > <uint64_t>data.shape[0]:
            end = data.shape[0]
        for i, mapping in enumerate(mappings):
            kinds[i] = NULL if mapping is None else <void *>mapping
            is_event[i] = isinstance(mapping, EventMapping)
            sources[i] = (<EventMapping>mapping).source if is_event[i] else -1
        self.core.enter()
        try:
            with nogil:
                while at < end:
                    length = ps_record_read(base, end, at, <uint64_t>log_id, number, &schemas.c)
                    if length <= 0:
                        break
                    r = <const ps_record *>(base + at)
                    if r.kind == PS_RECORD_EVENT and r.sequence >= first_sequence and r.sequence <= last_sequence:
                        if self.expected >= 0 and r.sequence != self.expected:
                            with gil:
                                raise LogError(f"events {self.expected} to {r.sequence - 1} are missing before offset {at}")
                        if self.expected >= 0:
                            self.expected += 1
                        if self.want == 1 and self.written + self.counts[self.current] - self.ran >= self.capacity:
                            full = True
                            if self.expected >= 0:
                                self.expected -= 1
                            break
                        self.events += 1
                        if kinds[r.schema] != NULL and is_event[r.schema]:
                            i = self.counts[self.current]
                            if (<EventMapping>kinds[r.schema]).read(
                                    r, self.slots_of[self.current] + i * self.width,
                                    self.status_of[self.current] + i * self.width, self.arena_of[self.current], &erased) != 0:
                                with gil:
                                    raise EngineError("out of memory while reading the log")
                            self.place(r, sources[r.schema], erased)
                            if self.counts[self.current] == BLOCK:
                                with gil:
                                    self.flush()
                    elif r.kind == PS_RECORD_SCORE and r.sequence >= first_sequence and r.sequence <= last_sequence:
                        self.scores += 1
                        if (kinds[r.schema] != NULL and not is_event[r.schema]
                                and (self.want == 2 or self.restore_ids)):
                            if self.want == 2 and self.capacity and self.written + self.n_pending >= self.capacity:
                                full = True
                                self.scores -= 1
                                break
                            if self.n_pending == PENDING:
                                with gil:
                                    self.flush()
                            self.pending[self.n_pending] = r
                            self.pending_mapping[self.n_pending] = kinds[r.schema]
                            self.n_pending += 1
                    at += length
            if self.counts[self.current] > self.ran or self.n_pending:
                self.flush()
        finally:
            self.core.leave()
        if length == PS_RECORD_MISFIT:
            raise schemas.refusal(<const ps_record *>(base + at), at)
        return at, "full" if full else "stopped" if at < end else "end"

    cdef void place(self, const ps_record *r, int source, uint64_t erased) noexcept nogil:
        """The row that a record was read into is the block's next one."""
        cdef int block = self.current
        cdef int n = self.counts[block]
        self.erased[block][n] = erased
        self.block_table[block][n] = <uint8_t>source
        self.verdicts_of[block][n].outcome = r.outcome
        self.keys_of[block][n].ingest_time = r.ingest_time
        self.sequence[block][n] = r.sequence
        self.counts[block] = n + 1
        if r.ingest_time > self.newest_ingest:
            self.newest_ingest = r.ingest_time

    cdef int begin_block(self) except -1:
        self.arena_of[self.current].used = <uint32_t>PyBytes_GET_SIZE(self.core.constants)
        self.counts[self.current] = self.ran = 0
        self.order_table = self.block_table[self.current]
        return 0

    cdef void shift(self, Rows rows, int by) noexcept nogil:
        """Let a block begin `by` rows further on, for what runs over its rows."""
        rows.slots += by * rows.width
        rows.status += by * rows.width
        rows.keys += by
        rows.verdicts += by
        self.order_table += by

    cdef int flush(self) except -1:
        """Run the block's events that have not run, settle the scores that wait. Called inside enter().

        A full block stays to be looked up by scores that follow, and the older one is given up; one that is not full
        goes on: scores follow their events within one block's length, over any number of segments.
        """
        cdef int start = self.ran
        cdef int n = self.counts[self.current] - start
        cdef Rows rows = <Rows>self.blocks[self.current]
        cdef int which[BLOCK]
        cdef int modes[BLOCK]
        cdef int i, scored = 0
        for i in range(n):
            modes[i] = 2
        if n:
            self.shift(rows, start)
            try:
                with nogil:
                    self.prepare(rows, 0, n)
                    scored = self.step(rows, 0, n, modes, True, which)
                if scored < 0:
                    at = self.sequence[self.current][start + self.advanced]
                    raise EngineError(f"out of memory at event {at} of the log")
                if self.restore_ids:
                    self.remember_ids(rows, n)
                if self.want == 1 and scored:
                    self.write(rows, which, scored, self.written)
                    if self.places is not None:
                        for i in range(scored):
                            self.out_sequence[self.written + i] = self.sequence[self.current][start + which[i]]
                            self.out_ingest[self.written + i] = rows.keys[which[i]].ingest_time
                            self.out_outcome[self.written + i] = rows.verdicts[which[i]].outcome
                    self.written += scored
            finally:
                self.shift(rows, -start)
            self.ran = start + n
        for i in range(self.n_pending):
            self.settle(self.pending[i], <ScoreMapping>self.pending_mapping[i])
        self.n_pending = 0
        if self.pipe is not None:
            self.pipe.error = None
        if self.progress is not None and self.events - self.reported >= 16384:
            self.progress(self.events - self.reported)
            self.reported = self.events
        if self.ran == BLOCK:
            self.current = 1 - self.current
            self.begin_block()
        return 0

    def done(self):
        """Tell the progress what it was not told."""
        if self.progress is not None and self.events > self.reported:
            self.progress(self.events - self.reported)
            self.reported = self.events

    cdef int find(self, int64_t sequence, int *block, int *row) noexcept nogil:
        """Where the event with a sequence stands: in this block or the one before. 0, or -1."""
        cdef int b, i, low, high, middle
        for i in range(2):
            b = self.current if i == 0 else 1 - self.current
            low = 0
            high = self.counts[b]
            while low < high:
                middle = (low + high) // 2
                if self.sequence[b][middle] < sequence:
                    low = middle + 1
                else:
                    high = middle
            if low < self.counts[b] and self.sequence[b][low] == sequence:
                block[0] = b
                row[0] = low
                return 0
        return -1

    # ids

    cdef int remember_ids(self, Rows rows, int n) except -1:
        cdef int i
        cdef Source source
        for i in range(n):
            source = <Source>self.tables[self.table_of(i)]
            if source.has_id and rows.verdicts[i].outcome != OUTCOME_DUPLICATE:
                source.turn_over(source.c.watermark)
                source.seen[self.core.id_of(source, rows.slots + i * rows.width, &rows.arena)] = None
        return 0

    cdef int settle(self, const ps_record *r, ScoreMapping mapping) except -1:
        """A score record whose event has been run: restore its decision, or compare it and give it its output row."""
        cdef int block, row
        cdef int where[1]
        cdef Rows rows
        cdef const ps_score *score = <const ps_score *>(r + 1)
        cdef Pipe pipe
        if self.find(r.sequence, &block, &row) != 0:
            self.orphans += 1
            return 0
        rows = <Rows>self.blocks[block]
        if self.restore_ids and mapping.pipe >= 0 and mapping.same_words:
            self.restore_decision(<Pipe>self.core.pipes[mapping.pipe], rows, row, self.block_table[block][row], r,
                                  mapping)
        if self.want != 2 or mapping.pipe != self.pipe.index:
            return 0
        pipe = self.pipe
        self.compare(r, score, mapping, rows, row, block)
        where[0] = row
        if self.capacity:
            self.write(rows, where, 1, self.written)
            if self.places is not None:
                self.out_sequence[self.written] = r.sequence
                self.out_ingest[self.written] = r.ingest_time
                self.out_outcome[self.written] = r.outcome
            self.ids_out.append(score.id[:26].decode())
            self.written += 1
        return 0

    cdef int restore_decision(self, Pipe pipe, Rows rows, int row, int table, const ps_record *r,
                              ScoreMapping mapping) except -1:
        cdef const ps_score *score = <const ps_score *>(r + 1)
        cdef Source source = <Source>self.tables[table]
        cdef Verdict verdict
        cdef dict home
        cdef int i
        if not source.has_id:
            return 0
        id = self.core.id_of(source, rows.slots + row * rows.width, &rows.arena)
        home = source.home_of(id)
        if home is None:
            return 0
        known = home[id]
        if known is not None and (<Decision>known).texts is not pipe.texts:
            id = (id, pipe.index)
        verdict.score = score.score
        verdict.fired = score.fired
        verdict.action = score.action
        verdict.model = <int16_t>mapping.model_of(score.model)
        verdict.failed = score.failed
        for i in range(8):
            verdict.arms[i] = score.arms[i]
        verdict.has_score = score.has_score
        verdict.counted = 0
        verdict.outcome = score.outcome
        # Not in the record: what was logged says it, but for values that no feature shows.
        verdict.degraded = (score.outcome == OUTCOME_LATE or score.outcome == OUTCOME_QUARANTINED
                            or memchr(ps_record_status(r), PS_INVALID, r.n_fields) != NULL)
        home[id] = Decision.new(pipe.texts, score.id, &verdict)
        return 0

    # parity

    cdef int compare(self, const ps_record *r, const ps_score *score, ScoreMapping mapping, Rows rows, int row,
                     int block) except -1:
        """Every logged value against the one computed anew: bit for bit, status included."""
        cdef const ps_slot *was = ps_record_slots(r)
        cdef const uint8_t *was_status = ps_record_status(r)
        cdef const char *was_strings = ps_record_strings(r)
        cdef ps_slot *slots = rows.slots + row * rows.width
        cdef uint8_t *status = rows.status + row * rows.width
        cdef Verdict *verdict = &rows.verdicts[row]
        cdef uint64_t erased = self.erased[block][row]
        cdef int i, slot, key
        cdef bint same
        cdef bint covered = True
        cdef uint8_t mask = 7 | PS_AGED | PS_WIDE
        cdef int64_t *counts
        tally = self.compared_slots.get(id(mapping))
        if tally is None:
            tally = self.compared_slots[id(mapping)] = Tally(mapping)
        counts = (<Tally>tally).counts
        (<Tally>tally).rows += 1
        if erased:
            (<Tally>tally).erased_rows += 1
        for i in range(mapping.n):
            slot = mapping.slots[i]
            if slot < 0:
                continue
            if score.as_of < mapping.since[i]:
                counts[5 * i + 4] += 1
                covered = False
                continue
            counts[5 * i] += 1
            key = mapping.keys[i]
            if key >= 0 and erased >> min(key, LAST_ERASED) & 1:
                counts[5 * i + 3] += 1
                continue
            same = was_status[i] & mask == status[slot] & mask
            if same and was_status[i] & 7 == PS_PRESENT:
                if mapping.strings[i]:
                    same = (PS_STR_LENGTH(was[i].u) == PS_STR_LENGTH(slots[slot].u)
                            and memcmp(was_strings + PS_STR_OFFSET(was[i].u), rows.arena.data + PS_STR_OFFSET(slots[slot].u),
                                       PS_STR_LENGTH(was[i].u)) == 0)
                else:
                    same = was[i].u == slots[slot].u
            if same:
                counts[5 * i + 1] += 1
            elif erased:
                counts[5 * i + 3] += 1
            else:
                counts[5 * i + 2] += 1
                if counts[5 * i + 2] <= EXAMPLES:
                    type = self.pipe.slot_types[slot]
                    (<Tally>tally).examples.append((
                        i, r.sequence, score.id[:26].decode(), score.as_of,
                        slot_value(was[i], was_status[i], type, was_strings), was_status[i] & 7,
                        slot_value(slots[slot], status[slot], type, rows.arena.data), status[slot] & 7))
        if mapping.same_plan and (<Tally>tally).decisions and covered:
            # score, action, fired rules and arms: the decision itself
            same = (verdict.action == score.action and verdict.fired == score.fired
                    and verdict.model == mapping.model_of(score.model)
                    and verdict.failed == score.failed and verdict.has_score == score.has_score
                    and (not score.has_score or memcmp(&verdict.score, &score.score, 8) == 0))
            for i in range(self.pipe.c.n_assigns):
                same = same and verdict.arms[i] == score.arms[i]
            (<Tally>tally).decision_counts[0] += 1
            if same:
                (<Tally>tally).decision_counts[1] += 1
            elif erased:
                (<Tally>tally).decision_counts[3] += 1
            else:
                (<Tally>tally).decision_counts[2] += 1
                if (<Tally>tally).decision_counts[2] <= EXAMPLES:
                    (<Tally>tally).examples.append((
                        -1, r.sequence, score.id[:26].decode(), score.as_of,
                        (score.action, score.score if score.has_score else None), 0,
                        (verdict.action, verdict.score if verdict.has_score else None), 0))
        return 0

    @property
    def tallies(self):
        """Per ScoreMapping seen: (mapping, rows, erased rows, counts per logged slot: compared, equal, mismatched,
        erased, before history; the first four for decisions; examples)."""
        cdef Tally tally
        return [tally.result() for tally in self.compared_slots.values()]

    @property
    def totals(self):
        """Events and scores taken, scores whose event was not found, newest ingest time, and rows written."""
        return {"events": self.events, "scores": self.scores, "orphans": self.orphans, "written": self.written,
                "ingest_time": self.newest_ingest, "next_sequence": self.expected}

    @property
    def output(self):
        """Rows written since set_output, the texts of string columns, and the ids of scores."""
        return self.written, self.texts, self.ids_out


cdef class Tally:
    """Counts of one score schema's comparison."""

    def __cinit__(self, ScoreMapping mapping):
        self.mapping = mapping
        self.counts = <int64_t *>checked(5 * mapping.n, sizeof(int64_t))
        self.examples = []
        self.decisions = mapping.same_plan

    def __dealloc__(self):
        free(self.counts)

    def result(self):
        cdef int i
        counts = [tuple(self.counts[5 * i + j] for j in range(5)) for i in range(self.mapping.n)]
        return self.mapping, self.rows, self.erased_rows, counts, tuple(self.decision_counts[i] for i in range(4)), self.examples
