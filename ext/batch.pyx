"""Tables through the engine core (hot path): rows in slices of at most 256, the GIL released, columns out.

What must stay true: a row of a table goes through the same steps as a single event, in table order, so its decision has
the same bits.
"""

cimport cython
from cpython.bytes cimport PyBytes_GET_SIZE
from libc.math cimport NAN
from libc.stdint cimport int8_t, int16_t, int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free
from libc.string cimport memcpy

from penstock.errors import EngineError

from penstock._ext.core cimport Core, undecided
from penstock._ext.decision cimport Decision, OUTCOME_DUPLICATE, Verdict, slot_value
from penstock._ext.events cimport Column, ColumnSet, EventReader
from penstock._ext.row cimport PS_AGED, PS_PRESENT, ps_slot
from penstock._ext.steps cimport BLOCK, OUT_OF_MEMORY, PipeC, Pipe, RowKeys, Rows, Source, SourceC, UNSCORED, checked


cdef class VerdictColumns:
    """Where a table run leaves its decisions: arrays by address, one entry per scored row.

    ids: 26 bytes each; action, model, failed: int16; score: float64; fired: uint64; arms: int8 x experiments; outcome, degraded: uint8.
    """

    def __cinit__(self, ids, action, model, failed, score, fired, arms, outcome, degraded):
        self.keep = (ids, action, model, failed, score, fired, arms, outcome, degraded)
        self.ids = <char *><uintptr_t>(ids.ctypes.data if ids is not None else 0)
        self.action = <int16_t *><uintptr_t>action.ctypes.data
        self.model = <int16_t *><uintptr_t>model.ctypes.data
        self.failed = <int16_t *><uintptr_t>failed.ctypes.data
        self.score = <double *><uintptr_t>score.ctypes.data
        self.fired = <uint64_t *><uintptr_t>fired.ctypes.data
        self.arms = <int8_t *><uintptr_t>arms.ctypes.data
        self.outcome = <uint8_t *><uintptr_t>outcome.ctypes.data
        self.degraded = <uint8_t *><uintptr_t>degraded.ctypes.data


cdef class BatchRun:
    """One pass over tables; see run_table. HistoryRun (history.pyx) feeds the same steps from the event log."""

    def __cinit__(self, Core core, list tables, order, list out, Py_ssize_t pipeline, bint ingest, verdicts_out, progress,
                  **of_history):
        cdef int i
        cdef Source source
        cdef ColumnSet columns
        self.core = core
        self.n_tables = len(tables)
        if self.n_tables > 32:
            raise EngineError("at most 32 tables in one replay")
        self.pipe = <Pipe>core.pipes[pipeline] if pipeline >= 0 else None
        self.keep = (tables, order, out)
        self.tables = []
        self.sets = []
        self.any_id = False
        for i, (index, columns, scored) in enumerate(tables):
            source = <Source>core.sources[index]
            self.tables.append(source)
            self.sets.append(columns)
            self.sources[i] = &source.c
            self.readers[i] = <void *>source.reader
            self.columns[i] = columns.columns
            self.scored[i] = scored
            self.any_id |= source.has_id
        if not tables:
            self.total = 0
        elif order is None:
            self.total = (<ColumnSet>self.sets[0]).rows
        else:
            self.order_table = <uint8_t *><uintptr_t>order[0].ctypes.data
            self.order_row = <int64_t *><uintptr_t>order[1].ctypes.data
            self.total = len(order[1])
        self.use_output(out)
        self.ingest = ingest
        self.verdicts = verdicts_out
        self.progress = progress

    cdef int use_output(self, list out) except -1:
        cdef int i
        free(self.out)
        self.n_out = len(out)
        self.out = <OutColumn *>checked(len(out), sizeof(OutColumn))
        self.texts = []
        for i, (slot, kind, data, absent) in enumerate(out):
            self.out[i].slot = slot
            self.out[i].kind = kind
            self.out[i].data = <char *><uintptr_t>data
            self.out[i].absent = <uint8_t *><uintptr_t>absent
            self.texts.append([] if kind == 2 else None)
        return 0

    def __dealloc__(self):
        free(self.out)

    def run(self):
        cdef Core core = self.core
        cdef Py_ssize_t start = 0, written = 0, reported = 0
        cdef int n, scored, code
        cdef int64_t now = 0
        width, inputs, outputs = core._widths()
        cdef Rows rows = Rows(BLOCK, width, inputs, outputs, core.constants)
        cdef int which[BLOCK]
        cdef int modes[BLOCK]
        cdef list ids = None
        while start < self.total:
            n = BLOCK if self.total - start > BLOCK else <int>(self.total - start)
            self.advanced = 0
            core.enter()
            try:
                if self.ingest:
                    core.check_open()
                rows.arena.used = <uint32_t>PyBytes_GET_SIZE(core.constants)
                if not core.event_clock:
                    now = core.now()
                with nogil:
                    code = self.decode(rows, start, n, now)
                if code == 0:
                    ids = self.look_up(rows, start, n, now, modes) if self.any_id else None
                    with nogil:
                        scored = self.step(rows, start, n, modes, ids is not None, which)
                    if scored < 0:
                        code = scored
                        self.forget(ids, modes, n)
                if code == 0 and scored:
                    self.write(rows, which, scored, written)
                    if ids is not None:
                        self.remember(rows, start, which, scored, written, ids)
                    written += scored
            finally:
                core.leave()
            if self.pipe is not None:
                self.pipe.error = None
            if code != 0:
                core.wait_for_log()
                raise core.not_ingested(code, f"the first {start + self.advanced} of {self.total} rows were ingested")
            core.wait_for_log()
            start += n
            if self.progress is not None and start - reported >= 16384:
                self.progress(start - reported)
                reported = start
        if self.progress is not None and start > reported:
            self.progress(start - reported)
        return self.texts

    cdef int table_of(self, Py_ssize_t i) noexcept nogil:
        return self.order_table[i] if self.order_table != NULL else 0

    cdef Py_ssize_t row_of(self, Py_ssize_t i) noexcept nogil:
        return self.order_row[i] if self.order_row != NULL else i

    cdef int decode(self, Rows rows, Py_ssize_t start, int n, int64_t now) noexcept nogil:
        """Rows of the slice into the block, then their keys and hashes."""
        cdef int i, table
        cdef ps_slot *slots
        for i in range(n):
            table = self.table_of(start + i)
            slots = rows.slots + i * rows.width
            if (<EventReader>self.readers[table]).read_row(self.columns[table], self.row_of(start + i), slots,
                                                           rows.status + i * rows.width, &rows.arena) != 0:
                return OUT_OF_MEMORY
            rows.keys[i].ingest_time = slots[self.sources[table].time].i if self.core.event_clock else now
        self.prepare(rows, start, n)
        return 0

    cdef void prepare(self, Rows rows, Py_ssize_t start, int n) noexcept nogil:
        """Keys and hashes of the block's rows; the buckets are on their way meanwhile."""
        cdef int i, j, table
        cdef SourceC *source
        cdef ps_slot *slots
        cdef RowKeys *keys
        cdef PipeC *pipe = &self.pipe.c if self.pipe is not None else NULL
        rows.keys_base = rows.arena.data
        for i in range(n):
            table = self.table_of(start + i)
            source = self.sources[table]
            slots = rows.slots + i * rows.width
            keys = &rows.keys[i]
            if self.scored[table]:
                self.core.prepare_keys(pipe.keys, pipe.n_keys, slots, &rows.arena, keys)
                self.core.hash_keys(pipe.n_keys, pipe.reads, pipe.n_reads, source, keys)
                for j in range(pipe.n_reads):
                    pipe.reads[j].api.prefetch(pipe.reads[j].store, keys.hash[pipe.reads[j].key])
            else:
                self.core.prepare_keys(source.keys, source.n_keys, slots, &rows.arena, keys)
                self.core.hash_keys(source.n_keys, NULL, 0, source, keys)
            for j in range(source.n_uses):
                source.uses[j].api.prefetch(source.uses[j].store, keys.hash[source.uses[j].key])

    cdef list look_up(self, Rows rows, Py_ssize_t start, int n, int64_t now, int *modes):
        """For rows with an event id: which were seen before. Returns per row (its key, the generation that holds it),
        or None where the type has no ids."""
        cdef int i, table
        cdef int64_t at
        cdef Source source
        cdef dict home
        cdef list ids = []
        cdef set deciding = set()
        cdef int64_t watermarks[32]
        for i in range(self.n_tables):
            watermarks[i] = self.sources[i].watermark
        for i in range(n):
            table = self.table_of(start + i)
            source = <Source>self.tables[table]
            modes[i] = self.ingest
            if not source.has_id:
                ids.append(None)
                continue
            id = self.core.id_of(source, rows.slots + i * rows.width, &rows.arena)
            home = source.home_of(id)
            if home is not None:
                modes[i] = -1
                if self.scored[table]:
                    known = home[id]
                    if known is not None and (<Decision>known).texts is not self.pipe.texts:
                        id = (id, self.pipe.index)
                        known = home.get(id)
                    if not self.ingest or known is not None or (table, id) in deciding:
                        modes[i] = -2
                    deciding.add((table, id))
            elif self.ingest:
                # Ids are forgotten as each row moves the watermark, so that a table forgets what its rows would.
                at = rows.slots[i * rows.width + source.c.time].i
                source.judge(at, at if self.core.event_clock else now, &watermarks[table])
                source.turn_over(watermarks[table])
                home = source.seen
                home[id] = None
                if self.scored[table]:
                    deciding.add((table, id))
            ids.append((id, home))
        return ids

    cdef int forget(self, list ids, const int *modes, int n) except -1:
        """A slice that ended early: rows that were not ingested are not known either, so they may come again."""
        cdef int i
        if ids is not None:
            for i in range(self.advanced, n):
                if ids[i] is not None and modes[i] == 1:
                    (<dict>(<tuple>ids[i])[1]).pop((<tuple>ids[i])[0], None)
        return 0

    cdef int step(self, Rows rows, Py_ssize_t start, int n, const int *modes, bint have_modes, int *which) noexcept nogil:
        """Advance every row in order, then models, then rules. Returns how many rows were scored, or advance()'s code."""
        cdef int i, j, code, ahead, table, scored = 0
        cdef SourceC *source
        cdef ps_slot *slots
        cdef PipeC *pipe = &self.pipe.c if self.pipe is not None else NULL
        cdef PipeC *this
        cdef RowKeys *keys
        cdef char *base = rows.keys_base
        self.advanced = 0
        for i in range(n):
            ahead = i + 6
            if ahead < n:
                source = self.sources[self.table_of(start + ahead)]
                keys = &rows.keys[ahead]
                for j in range(source.n_uses):
                    source.uses[j].api.prefetch_blob(source.uses[j].store, keys.hash[source.uses[j].key])
                if self.scored[self.table_of(start + ahead)]:
                    for j in range(pipe.n_reads):
                        if pipe.reads[j].use < 0:
                            pipe.reads[j].api.prefetch_blob(pipe.reads[j].store, keys.hash[pipe.reads[j].key])
            table = self.table_of(start + i)
            source = self.sources[table]
            slots = rows.slots + i * rows.width
            this = pipe if self.scored[table] else NULL
            # Views of strings append to the arena; where it has moved, keys that point into it are made again.
            if rows.arena.data == base:
                pass
            elif this != NULL:
                self.core.prepare_keys(this.keys, this.n_keys, slots, &rows.arena, &rows.keys[i])
            else:
                self.core.prepare_keys(source.keys, source.n_keys, slots, &rows.arena, &rows.keys[i])
            code = self.core.advance(source, this, <void *>self.pipe, slots, rows.status + i * rows.width, &rows.arena,
                                     &rows.keys[i], modes[i] if have_modes else self.ingest, &rows.verdicts[i])
            if code != 0:
                return code
            self.advanced += 1
            self.core.sweep(source)
            if this != NULL:
                which[scored] = i
                scored += 1
        if scored:
            self.core.run_models(pipe, rows, which, scored)
            for i in range(scored):
                self.core.decide(pipe, rows.slots + which[i] * rows.width, rows.status + which[i] * rows.width, &rows.arena,
                                 &rows.verdicts[which[i]])
        return scored

    cdef int write(self, Rows rows, const int *which, int scored, Py_ssize_t written) except -1:
        cdef int i, c, row, k
        cdef OutColumn *out
        cdef Verdict *verdict
        cdef VerdictColumns v = self.verdicts
        cdef int n_arms
        cdef int64_t now
        for c in range(self.n_out):
            out = &self.out[c]
            if out.kind == 2:
                texts = <list>self.texts[c]
                for i in range(scored):
                    row = which[i] * rows.width + out.slot
                    texts.append(slot_value(rows.slots[row], rows.status[row], "string", rows.arena.data))
                continue
            for i in range(scored):
                row = which[i] * rows.width + out.slot
                if rows.status[row] & ~PS_AGED != PS_PRESENT:
                    # Only a value that is missing or wide is noted: pages of absent that are never written cost nothing.
                    out.absent[written + i] = 2 if rows.status[row] & 7 == PS_PRESENT else 1
                if out.kind == 0:
                    (<ps_slot *>out.data)[written + i] = rows.slots[row]
                else:
                    out.data[written + i] = <char>rows.slots[row].i
        if v is not None:
            n_arms = len(self.pipe.texts.experiments)
            now = self.core.now()
            for i in range(scored):
                verdict = &rows.verdicts[which[i]]
                if v.ids != NULL:
                    self.core.ids.next(now, v.ids + 26 * (written + i))
                    if self.core.log_ptr != NULL and not undecided(&self.pipe.c, verdict):
                        row = which[i]
                        self.core.append_score(
                            &self.pipe.c, rows.slots + row * rows.width, rows.status + row * rows.width, &rows.arena,
                            &rows.keys[row], verdict, v.ids + 26 * (written + i),
                            rows.slots[row * rows.width + self.pipe.source.c.time].i)
                v.action[written + i] = verdict.action
                v.model[written + i] = verdict.model
                v.failed[written + i] = verdict.failed
                v.score[written + i] = verdict.score if verdict.has_score else NAN
                v.fired[written + i] = verdict.fired
                v.outcome[written + i] = verdict.outcome
                v.degraded[written + i] = verdict.degraded
                for k in range(n_arms):
                    v.arms[(written + i) * n_arms + k] = verdict.arms[k]
        return 0

    cdef int remember(self, Rows rows, Py_ssize_t start, const int *which, int scored, Py_ssize_t written, list ids) except -1:
        """Keep the decision of each new id, and give a repeated one its first decision."""
        cdef int i, row, k
        cdef dict home
        cdef Decision decision
        cdef VerdictColumns v = self.verdicts
        cdef int n_arms = len(self.pipe.texts.experiments)
        if v is None or v.ids == NULL:
            return 0
        for i in range(scored):
            row = which[i]
            if ids[row] is None:
                continue
            id, home = ids[row]
            if home is None:
                continue
            known = home.get(id)
            if known is None:
                if self.ingest and not undecided(&self.pipe.c, &rows.verdicts[row]):
                    home[id] = Decision.new(self.pipe.texts, v.ids + 26 * (written + i), &rows.verdicts[row])
                continue
            decision = <Decision>known
            memcpy(v.ids + 26 * (written + i), decision._id, 26)
            v.action[written + i] = decision.verdict.action
            v.model[written + i] = decision.verdict.model
            v.failed[written + i] = decision.verdict.failed
            v.score[written + i] = decision.verdict.score if decision.verdict.has_score else NAN
            v.fired[written + i] = decision.verdict.fired
            v.outcome[written + i] = OUTCOME_DUPLICATE
            v.degraded[written + i] = decision.verdict.degraded
            for k in range(n_arms):
                v.arms[(written + i) * n_arms + k] = decision.verdict.arms[k]
        return 0


def run_table(Core core, list tables, order, list out, Py_ssize_t pipeline, bint ingest, verdicts_out, progress):
    """Score or ingest the rows of tables, in order, in slices of at most 256 rows with the GIL released.

    tables: (source index, ColumnSet, is scored) per table. order: None for the rows of the one table, or
    (uint8 table of each row, int64 row in its table). out: per output column (slot, kind, data address, address of
    one byte per row, zero before: 1 for a null, 2 for a wide integer held as a double); kind 0 copies 8 bytes,
    1 one byte, 2 appends to a list of bytes. verdicts_out: None or a VerdictColumns. progress: None or a callable
    that is told how many rows are done.
    """
    return BatchRun(core, tables, order, out, pipeline, ingest, verdicts_out, progress).run()
