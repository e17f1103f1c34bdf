"""The engine core (hot path): one event in, one decision out, in one native call; and the same over tables.

What must stay true: scoring a table gives the same bits as scoring its rows one by one, because both run the steps
below, in the same order, on the same rows; and a refused event has changed nothing.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from cpython.pythread cimport PyThread_get_thread_ident
from libc.math cimport NAN, isnan
from libc.stdint cimport uintptr_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

import os
import weakref

from penstock.errors import EngineError, EventError, ReplayNeeded, ScoringError

from penstock._ext.decision cimport (
    MAX_EXPERIMENTS, OUTCOME_APPLIED, OUTCOME_DUPLICATE, OUTCOME_LATE, OUTCOME_OFF, OUTCOME_QUARANTINED, N_OUTCOMES,
    slot_value,
)
from penstock._ext.row cimport (
    PS_BOOL, PS_FLOAT64, PS_INT64, PS_INVALID, PS_NOT_FOUND, PS_NULL_VALUE, PS_OUTSIDE_MAX_AGE, PS_PRESENT, PS_STR,
    PS_STR_LENGTH, PS_STR_OFFSET, PS_STRING, PS_TIMESTAMP, PS_WIDE,
)
from penstock._ext.events cimport ps_arena_append
from penstock._ext.expressions cimport Program
from penstock._ext.split cimport Assigner
from penstock._ext.windows cimport WindowStore, ps_store_stats

from penstock._ext.decision import OUTCOMES, STATUSES
from penstock._ext.events import TYPE_CODES

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
    MAX_ARMS = 64
    SWEEP_EVERY = 64          # applied events between two sweeps,
    SWEEP_CREATED = 16        # or new entities
    SWEEP_ENTITIES = 4        # released per sweep at the most, beside twice the new ones
    OUT_OF_MEMORY = -1

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


cdef void *checked(size_t count, size_t size) except NULL:
    cdef void *memory = calloc(count if count else 1, size)
    if memory == NULL:
        raise MemoryError()
    return memory


cdef class Source:
    """One event type in a running engine: its reader, the stores it updates, its watermark, its remembered ids."""

    def __cinit__(self, plan, EventReader reader):
        memset(&self.c, 0, sizeof(SourceC))
        self.reader = reader
        self.name = plan.name
        self.index = plan.index
        self.c.n_fields = len(plan.fields)
        self.c.time = plan.time
        self.c.watermark = -(<int64_t>1 << 61)
        self.c.lateness = plan.options.lateness
        self.c.max_skew = plan.options.max_skew
        self.has_id = plan.event_id is not None
        self.remember = plan.options.lateness + plan.options.retry_window
        self.turned = self.c.watermark
        self.seen = {}
        self.seen_before = {}
        self.keep = []

    def __dealloc__(self):
        cdef int i
        if self.c.uses != NULL:
            for i in range(self.c.n_uses):
                free(self.c.uses[i].fields)
                free(self.c.uses[i].programs)
        free(self.c.uses)

    cdef int add_key(self, int slot, bint is_int, bint to_int) except -1:
        return add_key(self.c.keys, &self.c.n_keys, slot, is_int, to_int)

    def add_stores(self, list stores):
        """stores: (WindowStore, key slot, key is int, key becomes int, [field of each column], [Program])."""
        cdef int i, j
        cdef Use *use
        cdef WindowStore store
        cdef Program program
        if len(stores) > MAX_STORES:
            raise EngineError(f"event {self.name}: more than {MAX_STORES} entities")
        self.c.uses = <Use *>checked(len(stores), sizeof(Use))
        self.c.n_uses = len(stores)
        for i, (store, slot, is_int, to_int, fields, programs) in enumerate(stores):
            use = &self.c.uses[i]
            use.api = store.api
            use.store = store.ptr
            use.key = self.add_key(slot, is_int, to_int)
            use.n_columns = len(fields)
            if use.n_columns > MAX_COLUMNS:
                raise EngineError(f"event {self.name}: more than {MAX_COLUMNS} columns are aggregated for one entity")
            use.fields = <int *>checked(len(fields), sizeof(int))
            for j in range(use.n_columns):
                use.fields[j] = fields[j]
            use.n_where = len(programs)
            use.programs = <const ps_program **>checked(len(programs), sizeof(void *))
            for j, program in enumerate(programs):
                use.programs[j] = program.ptr
                use.expressions = program.api
            self.keep.append((store, programs))

    cdef dict home_of(self, object id):
        """Which generation remembers an event id, or None."""
        if id in self.seen:
            return self.seen
        return self.seen_before if id in self.seen_before else None

    cdef void turn_over(self, int64_t watermark):
        """Forget event ids older than lateness + retry_window behind the watermark; some are kept twice as long."""
        if watermark - self.turned > self.remember:
            self.seen_before = self.seen if watermark - self.turned <= 2 * self.remember else {}
            self.seen = {}
            self.turned = watermark

    cdef void judge(self, int64_t at, int64_t ingest_time, int64_t *watermark) noexcept nogil:
        """The watermark that an event will leave behind, as Core.advance will decide (S14)."""
        if at <= ingest_time + self.c.max_skew and watermark[0] - at <= self.c.lateness and at > watermark[0]:
            watermark[0] = at

    @property
    def watermark(self):
        """Largest event time accepted so far, microseconds; None before the first."""
        return self.c.watermark if self.c.watermark > -(<int64_t>1 << 61) else None


cdef int add_key(KeyRef *keys, int *n, int slot, bint is_int, bint to_int) except -1:
    cdef int i
    for i in range(n[0]):
        if keys[i].slot == slot and keys[i].to_int == to_int:
            return i
    if n[0] == MAX_KEYS:
        raise EngineError(f"more than {MAX_KEYS} different keys in one event")
    keys[n[0]].slot = slot
    keys[n[0]].is_int = is_int
    keys[n[0]].to_int = to_int
    n[0] += 1
    return n[0] - 1


cdef class Pipe:
    """One pipeline in a running engine: its steps as flat arrays."""

    def __cinit__(self, plan, Source source, DecisionTexts texts):
        cdef int i
        memset(&self.c, 0, sizeof(PipeC))
        self.source = source
        self.name = plan.name
        self.index = plan.index
        self.texts = texts
        self.keep = []
        self.slot_types = tuple(slot.type for slot in plan.slots)
        self.c.n_slots = len(plan.slots)
        self.c.n_keys = source.c.n_keys
        for i in range(source.c.n_keys):
            self.c.keys[i] = source.c.keys[i]
        self.c.score = -1 if plan.score is None else plan.score
        self.c.default_action = texts.actions.index(plan.default_action)
        self.c.fallback = -1 if plan.fallback is None else texts.actions.index(plan.fallback)
        self.c.action_counts = <uint64_t *>checked(len(texts.actions), sizeof(uint64_t))
        self.c.model_counts = <uint64_t *>checked(len(texts.models), sizeof(uint64_t))
        self.c.arm_counts = <uint64_t *>checked(MAX_EXPERIMENTS * (MAX_ARMS + 1), sizeof(uint64_t))

    def __dealloc__(self):
        cdef int i
        for i in range(self.c.n_reads):
            free(self.c.reads[i].defaults)
        for i in range(self.c.n_functions):
            free(self.c.functions[i].args)
            free(self.c.functions[i].arg_types)
        for i in range(self.c.n_assigns):
            free(self.c.assigns[i].arms)
        for i in range(self.c.n_models):
            free(self.c.models[i].inputs)
            free(self.c.models[i].types)
        free(self.c.reads)
        free(self.c.functions)
        free(self.c.assigns)
        free(self.c.models)
        free(self.c.rules)
        free(self.c.action_counts)
        free(self.c.model_counts)
        free(self.c.arm_counts)

    def add_reads(self, list reads):
        """reads: (WindowStore, group, key slot, key is int, key becomes int, first slot, n outputs, include, defaults);
        defaults: (slot, 8 bytes)."""
        cdef int i, j
        cdef Read *read
        cdef WindowStore store
        self.c.reads = <Read *>checked(len(reads), sizeof(Read))
        self.c.n_reads = len(reads)
        for i, (store, group, slot, is_int, to_int, first, n_outputs, with_event, defaults) in enumerate(reads):
            read = &self.c.reads[i]
            read.api = store.api
            read.store = store.ptr
            read.group = group
            read.key = add_key(self.c.keys, &self.c.n_keys, slot, is_int, to_int)
            read.first = first
            read.n_outputs = n_outputs
            read.with_event = with_event
            read.strings = "string" in self.slot_types[first:first + n_outputs]
            read.use = -1
            for j in range(self.source.c.n_uses):
                if self.source.c.uses[j].store == store.ptr and self.source.c.uses[j].key == read.key:
                    read.use = j
            read.n_defaults = len(defaults)
            read.defaults = <Default *>checked(len(defaults), sizeof(Default))
            for j, (slot, value) in enumerate(defaults):
                read.defaults[j].slot = slot
                memcpy(&read.defaults[j].value, PyBytes_AS_STRING(value), 8)
            self.keep.append(store)

    def add_functions(self, list functions):
        """functions: (address or None, Python callable or None, [argument slots], [argument types], slot, type)."""
        cdef int i, j
        cdef Function *function
        self.c.functions = <Function *>checked(len(functions), sizeof(Function))
        self.c.n_functions = len(functions)
        calls = []
        for i, (address, call, args, arg_types, slot, type) in enumerate(functions):
            function = &self.c.functions[i]
            function.call = <native_function><uintptr_t>(address or 0)
            calls.append(call)
            function.n_args = len(args)
            if len(args) > MAX_ARGUMENTS:
                raise EngineError(f"pipeline {self.name}: a function takes at most {MAX_ARGUMENTS} features")
            function.args = <int *>checked(len(args), sizeof(int))
            function.arg_types = <uint8_t *>checked(len(args), 1)
            for j in range(len(args)):
                function.args[j] = args[j]
                function.arg_types[j] = TYPE_CODES[arg_types[j]]
            function.slot = slot
            function.type = TYPE_CODES[type]
        self.python_functions = tuple(calls)

    def add_experiments(self, list experiments):
        """experiments: (Assigner, unit slot, unit is int, slot, [PS_STR of each arm])."""
        cdef int i, j
        cdef Assign *assign
        cdef Assigner assigner
        self.c.assigns = <Assign *>checked(len(experiments), sizeof(Assign))
        self.c.n_assigns = len(experiments)
        for i, (assigner, unit, is_int, slot, arms) in enumerate(experiments):
            assign = &self.c.assigns[i]
            assign.experiment = assigner.ptr
            assign.api = assigner.api
            assign.unit = unit
            assign.unit_is_int = is_int
            assign.slot = slot
            if len(arms) > MAX_ARMS:
                raise EngineError(f"pipeline {self.name}: an experiment has at most {MAX_ARMS} arms")
            assign.arms = <uint64_t *>checked(len(arms), sizeof(uint64_t))
            for j in range(len(arms)):
                assign.arms[j] = arms[j]
            self.keep.append(assigner)

    def add_models(self, list models):
        """models: (runtime, address of its ps_model, [input slots], [types], output, slot, index, guard, decides,
        row by row)."""
        cdef int i, j
        cdef ModelRun *run
        self.c.models = <ModelRun *>checked(len(models), sizeof(ModelRun))
        self.c.n_models = len(models)
        for i, (runtime, address, inputs, types, output, slot, index, guard, decides, row_by_row) in enumerate(models):
            run = &self.c.models[i]
            run.model = <const ps_model *><uintptr_t>address
            run.n_inputs = len(inputs)
            run.inputs = <int *>checked(len(inputs), sizeof(int))
            run.types = <uint8_t *>checked(len(inputs), 1)
            for j in range(len(inputs)):
                run.inputs[j] = inputs[j]
                run.types[j] = TYPE_CODES[types[j]]
            run.output = output
            run.slot = slot
            run.index = index
            run.guard_experiment = -1 if guard is None else guard[0]
            run.guard_arm = -1 if guard is None else guard[1]
            run.decides = decides
            run.row_by_row = row_by_row
            self.keep.append(runtime)

    def add_rules(self, list rules):
        """rules: (Program, index of its action)."""
        cdef int i
        cdef Program program
        self.c.rules = <RuleRun *>checked(len(rules), sizeof(RuleRun))
        self.c.n_rules = len(rules)
        for i, (program, action) in enumerate(rules):
            self.c.rules[i].program = program.ptr
            self.c.rules[i].api = program.api
            self.c.rules[i].action = action
            self.keep.append(program)

    @property
    def decision_texts(self):
        return self.texts

    @property
    def widths(self):
        """(inputs, outputs) of the widest model."""
        cdef int i, widest = 1, outputs = 1
        for i in range(self.c.n_models):
            widest = max(widest, self.c.models[i].n_inputs)
            outputs = max(outputs, <int>self.c.models[i].model.n_outputs)
        return widest, outputs


cdef class Rows:
    def __cinit__(self, int capacity, int width, int inputs, int outputs, bytes constants):
        cdef uint64_t ignored
        self.capacity = capacity
        self.width = max(1, width)
        self.slots = <ps_slot *>checked(capacity * self.width, sizeof(ps_slot))
        self.status = <uint8_t *>checked(capacity * self.width, 1)
        self.keys = <RowKeys *>checked(capacity, sizeof(RowKeys))
        self.verdicts = <Verdict *>checked(capacity, sizeof(Verdict))
        self.matrix = <double *>checked(capacity * inputs, sizeof(double))
        self.scores = <double *>checked(capacity * outputs, sizeof(double))
        self.picked = <int *>checked(capacity, sizeof(int))
        self.ingest_times = <int64_t *>checked(capacity, sizeof(int64_t))
        if ps_arena_append(&self.arena, PyBytes_AS_STRING(constants), PyBytes_GET_SIZE(constants), &ignored) != 0:
            raise MemoryError()

    def __dealloc__(self):
        free(self.slots)
        free(self.status)
        free(self.keys)
        free(self.verdicts)
        free(self.matrix)
        free(self.scores)
        free(self.picked)
        free(self.ingest_times)
        free(self.arena.data)


cdef class Core:
    """Everything that runs per event. Built by `penstock.engine`; calls may come from any thread, one runs at a time."""

    def __cinit__(self, list sources, list pipes, list stores, bytes constants, bint event_clock):
        cdef Source source
        cdef Pipe pipe
        self.mutex = checked(1, sizeof(pthread_mutex_t))
        pthread_mutex_init(<pthread_mutex_t *>self.mutex, NULL)
        self.sources = sources
        self.pipes = pipes
        self.stores = stores
        self.constants = constants
        self.event_clock = event_clock
        self.ids = IdSource()
        self.last_now = 0
        self.source_of = {}
        for source in sources:
            self.source_of[source.reader.user_type] = source
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
        cdef int i, j, size
        cdef int64_t number
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
                     RowKeys *keys, int64_t ingest_time, int ingest, Verdict *verdict) noexcept nogil:
        """Judge the event, read, apply, read again, then functions and assignment: all but models and rules.

        ingest: 1 to apply, 0 to evaluate only, -1 for an event that was ingested before but never decided on (a repeated
        id), -2 for one that is not to be counted as a decision again.
        Returns 0, or OUT_OF_MEMORY and nothing has changed.
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

        if pipe != NULL:
            verdict.counted = ingest == 1 or ingest == -1
            verdict.fired = 0
            verdict.model = -1
            verdict.failed = -1
            verdict.has_score = 0
            verdict.score = NAN
            verdict.action = pipe.default_action
        if ingest == 0:
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
            events[i].log_id = 0
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

        if pipe != NULL and self.read_views(pipe, keys, handles, events, False, False, at, slots, status, arena) != 0:
            return OUT_OF_MEMORY

        if arena.data != base:
            # The views read so far have appended strings: the keys' texts have moved with the arena.
            self.prepare_keys(pipe.keys, pipe.n_keys, slots, arena, keys)
        if apply:
            # All stores or none: every blob exists before the first event is applied.
            for i in range(source.n_uses):
                if handles[i] == 0:
                    use = &source.uses[i]
                    handles[i] = use.api.find_or_create(use.store, &keys.key[use.key], keys.hash[use.key])
                    source.created += 1
                    if handles[i] == 0:
                        for j in range(i):
                            source.uses[j].api.forget_unused(source.uses[j].store, handles[j])
                        return OUT_OF_MEMORY
            for i in range(source.n_uses):
                use = &source.uses[i]
                # Strings may have moved: views read above append to the arena.
                events[i].arena = arena.data
                if use.api.apply(use.store, handles[i], &events[i]) != 0:
                    for j in range(i, source.n_uses):
                        source.uses[j].api.forget_unused(source.uses[j].store, handles[j])
                    return OUT_OF_MEMORY
            self.sequence += 1
            if at > source.watermark:
                source.watermark = at
            source.applied += 1
        source.outcomes[verdict.outcome] += 1

        if pipe == NULL:
            return 0
        # An event whose id was seen before is in the state already, or was late.
        if self.read_views(pipe, keys, handles, events, apply or ingest < 0, True, at, slots, status, arena) != 0:
            return OUT_OF_MEMORY

        for i in range(pipe.n_functions):
            function = &pipe.functions[i]
            if function.call != NULL:
                j = call_native(function, slots, status)
            else:
                j = call_python(pipe_object, i, function, slots, status, arena)
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
                        int with_event, int64_t as_of, ps_slot *slots, uint8_t *status, ps_arena *arena) noexcept nogil:
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
            if read.api.read(read.store, handle, read.group, as_of, extra, slots + read.first, status + read.first,
                             arena) != 0:
                return OUT_OF_MEMORY
            for j in range(read.n_defaults):
                slot = read.defaults[j].slot
                if status[slot] & 7 != PS_PRESENT:
                    slots[slot] = read.defaults[j].value
                    status[slot] = PS_PRESENT
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
                        x[j] = slots[run.inputs[j]].f if status[run.inputs[j]] == PS_PRESENT else NAN
                    elif status[run.inputs[j]] == PS_PRESENT:
                        x[j] = <double>slots[run.inputs[j]].i
                    elif status[run.inputs[j]] & PS_WIDE:
                        x[j] = slots[run.inputs[j]].f
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
        if verdict.counted:
            pipe.model_counts[run.index] += 1
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
        if verdict.failed >= 0:
            verdict.action = pipe.fallback if pipe.fallback >= 0 else pipe.default_action
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
                source.uses[i].api.sweep(source.uses[i].store, source.watermark, entities)

    # one event

    cdef Decision finish(self, Pipe pipe, Rows rows, int row, int64_t now, bint explain):
        cdef char id[26]
        cdef Decision decision
        cdef Verdict *verdict = &rows.verdicts[row]
        self.ids.next(now, id)
        decision = Decision.new(pipe.texts, id, verdict)
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
        return arena.data[PS_STR_OFFSET(slot.u):PS_STR_OFFSET(slot.u) + PS_STR_LENGTH(slot.u)].decode()

    cdef Decision score_one(self, Pipe pipe, object event, bint ingest, bint explain):
        """Validate, look the id up, read, apply, read, compute, decide (SEMANTICS, one step). Called inside enter()."""
        cdef Rows rows = self.single
        cdef Source source = pipe.source
        cdef int mode = ingest
        cdef int which = 0
        cdef int64_t now, ingest_time
        cdef object id = None
        cdef dict home = None
        cdef Decision decision
        cdef Verdict verdict
        rows.arena.used = <uint32_t>PyBytes_GET_SIZE(self.constants)
        source.reader.read_object(event, rows.slots, rows.status, &rows.arena, "")
        if source.has_id:
            id = self.id_of(source, rows.slots, &rows.arena)
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
                mode = -1 if ingest else -2
        now = self.now()
        ingest_time = rows.slots[source.c.time].i if self.event_clock else now
        self.prepare_keys(pipe.c.keys, pipe.c.n_keys, rows.slots, &rows.arena, rows.keys)
        self.hash_keys(pipe.c.n_keys, pipe.c.reads, pipe.c.n_reads, &source.c, rows.keys)
        if self.advance(&source.c, &pipe.c, <void *>pipe, rows.slots, rows.status, &rows.arena, rows.keys, ingest_time,
                        mode, rows.verdicts) != 0:
            raise EngineError("out of memory: the event was not ingested")
        self.run_models(&pipe.c, rows, &which, 1)
        self.decide(&pipe.c, rows.slots, rows.status, &rows.arena, rows.verdicts)
        self.sweep(&source.c)
        decision = self.finish(pipe, rows, 0, now, explain)
        failed = rows.verdicts.failed >= 0 and pipe.c.fallback < 0
        if id is not None and ingest:
            if home is None:
                source.turn_over(source.c.watermark)
                home = source.seen
            # An error is no decision: asked again, the event is scored again, but not applied again.
            home[id] = None if failed else decision
        if failed:
            error, pipe.error = pipe.error, None
            text = pipe.texts.failures[rows.verdicts.failed]
            if error is not None:
                text += f": {type(error).__name__}: {error}"
            raise ScoringError(text, mode == 1) from error
        return decision

    cdef void hash_keys(self, int n_keys, Read *reads, int n_reads, SourceC *source, RowKeys *keys) noexcept nogil:
        """One hash per key: every store uses the same function."""
        cdef int i
        cdef const ps_store_api *api = NULL
        if source.n_uses:
            api = source.uses[0].api
        elif n_reads:
            api = reads[0].api
        if api != NULL:
            for i in range(n_keys):
                keys.hash[i] = api.hash(&keys.key[i])

    cpdef Decision score(self, Py_ssize_t pipeline, object event, bint ingest=True, bint explain=False):
        """Score one event: an Event of the pipeline's type, a decoded wire Struct, or a dict.

        Raises EventError (nothing has changed), ScoringError (a function or model failed and there is no fallback) or
        EngineError.
        """
        cdef Pipe pipe = <Pipe>self.pipes[pipeline]
        self.enter()
        try:
            return self.score_one(pipe, event, ingest, explain)
        finally:
            self.leave()

    cpdef list score_many(self, Py_ssize_t pipeline, list events, bint ingest=True, bint explain=False):
        """Score several events in order, all or nothing: every one is validated before the first is ingested.

        EventError.path starts with the place in the list: `[17].amount`.
        """
        cdef Pipe pipe = <Pipe>self.pipes[pipeline]
        self.enter()
        try:
            self.validate(pipe.source, events)
            return [self.score_one(pipe, event, ingest, explain) for event in events]
        finally:
            self.leave()

    cdef int validate(self, Source source, list events) except -1:
        cdef Py_ssize_t i
        cdef Rows rows = self.single
        for i in range(len(events)):
            rows.arena.used = <uint32_t>PyBytes_GET_SIZE(self.constants)
            source.reader.read_object(events[i], rows.slots, rows.status, &rows.arena, f"[{i}]")
        return 0

    cdef int ingest_one(self, Source source, object event) except -1:
        cdef Rows rows = self.single
        cdef int mode = 1
        cdef int64_t ingest_time
        cdef object id = None
        rows.arena.used = <uint32_t>PyBytes_GET_SIZE(self.constants)
        source.reader.read_object(event, rows.slots, rows.status, &rows.arena, "")
        if source.has_id:
            id = self.id_of(source, rows.slots, &rows.arena)
            if source.home_of(id) is not None:
                source.c.outcomes[<int>OUTCOME_DUPLICATE] += 1
                return OUTCOME_DUPLICATE
        ingest_time = rows.slots[source.c.time].i if self.event_clock else self.now()
        self.prepare_keys(source.c.keys, source.c.n_keys, rows.slots, &rows.arena, rows.keys)
        self.hash_keys(source.c.n_keys, NULL, 0, &source.c, rows.keys)
        if self.advance(&source.c, NULL, NULL, rows.slots, rows.status, &rows.arena, rows.keys, ingest_time, mode,
                        rows.verdicts) != 0:
            raise EngineError("out of memory: the event was not ingested")
        self.sweep(&source.c)
        if id is not None:
            source.turn_over(source.c.watermark)
            source.seen[id] = None
        return rows.verdicts.outcome

    def ingest(self, Py_ssize_t source, object event):
        """Apply one event to the state. Returns its outcome: applied, duplicate, late or quarantined."""
        self.enter()
        try:
            return OUTCOMES[self.ingest_one(<Source>self.sources[source], event)]
        finally:
            self.leave()

    def ingest_many(self, Py_ssize_t source, list events):
        """Apply several events in order, all or nothing on bad input. Returns their outcomes."""
        self.enter()
        try:
            self.validate(<Source>self.sources[source], events)
            return [OUTCOMES[self.ingest_one(<Source>self.sources[source], event)] for event in events]
        finally:
            self.leave()

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
                handle = store.api.find(store.ptr, &key, store.api.hash(&key))
                if store.api.read(store.ptr, handle, group, as_of, NULL, slots, status, arena) != 0:
                    raise EngineError("out of memory while reading")
                values = [slot_value(slots[i], status[i], types[i], arena.data) for i in range(n)]
                for i in range(n):
                    if values[i] is None and defaults[i] is not None:
                        values[i] = defaults[i]
                        if status[i] & 7 != PS_OUTSIDE_MAX_AGE:
                            status[i] = PS_PRESENT
                found.append((values, [STATUSES[status[i] & 7] for i in range(n)]))
            return found
        finally:
            self.leave()
            free(slots)
            free(status)

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
        """Counts since start: {"outcomes": {event: {outcome: n}}, "actions": ..., "arms": ..., "models": ...}."""
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
        return {"outcomes": outcomes, "actions": actions, "arms": arms, "models": models}

    # tables

    def run_table(self, list tables, order, list out, Py_ssize_t pipeline, bint ingest, verdicts_out, progress):
        """Score or ingest the rows of tables, in order, in slices of at most 256 rows with the GIL released.

        tables: (source index, ColumnSet, is scored) per table. order: None for the rows of the one table, or
        (uint8 table of each row, int64 row in its table). out: per output column (slot, kind, data address, address of
        one byte of validity per row: 0 null, 1 value, 2 a wide integer held as a double); kind 0 copies 8 bytes,
        1 one byte, 2 appends to a list of bytes. verdicts_out: None or a VerdictColumns. progress: None or a callable
        that is told how many rows are done.
        """
        return BatchRun(self, tables, order, out, pipeline, ingest, verdicts_out, progress).run()


cdef int call_native(Function *function, ps_slot *slots, uint8_t *status) noexcept nogil:
    """0, or 1 where the function failed. A null argument that is no float makes the result null."""
    cdef ps_slot args[MAX_ARGUMENTS]
    cdef ps_slot out
    cdef int j
    cdef uint8_t code
    for j in range(function.n_args):
        args[j] = slots[function.args[j]]
        if status[function.args[j]] != PS_PRESENT:
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
                     ps_arena *arena) noexcept with gil:
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


# One output column of a table run.
ctypedef struct OutColumn:
    int slot
    int kind
    char *data
    uint8_t *valid


cdef class VerdictColumns:
    """Where a table run leaves its decisions: arrays by address, one entry per scored row.

    ids: 26 bytes each; action, model, failed: int16; score: float64; fired: uint64; arms: int8 x experiments; outcome: uint8.
    """
    cdef:
        char *ids
        int16_t *action
        int16_t *model
        int16_t *failed
        double *score
        uint64_t *fired
        int8_t *arms
        uint8_t *outcome
        object keep

    def __cinit__(self, ids, action, model, failed, score, fired, arms, outcome):
        self.keep = (ids, action, model, failed, score, fired, arms, outcome)
        self.ids = <char *><uintptr_t>(ids.ctypes.data if ids is not None else 0)
        self.action = <int16_t *><uintptr_t>action.ctypes.data
        self.model = <int16_t *><uintptr_t>model.ctypes.data
        self.failed = <int16_t *><uintptr_t>failed.ctypes.data
        self.score = <double *><uintptr_t>score.ctypes.data
        self.fired = <uint64_t *><uintptr_t>fired.ctypes.data
        self.arms = <int8_t *><uintptr_t>arms.ctypes.data
        self.outcome = <uint8_t *><uintptr_t>outcome.ctypes.data


cdef class BatchRun:
    """One pass over tables; see Core.run_table."""
    cdef:
        Core core
        list tables
        list sets
        Pipe pipe
        int n_tables
        SourceC *sources[32]
        const Column *columns[32]
        void *readers[32]
        uint8_t scored[32]
        uint8_t *order_table
        int64_t *order_row
        Py_ssize_t total
        OutColumn *out
        int n_out
        list texts
        bint ingest
        VerdictColumns verdicts
        object progress
        object keep
        bint any_id

    def __cinit__(self, Core core, list tables, order, list out, Py_ssize_t pipeline, bint ingest, verdicts_out, progress):
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
        if order is None:
            self.total = (<ColumnSet>self.sets[0]).rows
        else:
            self.order_table = <uint8_t *><uintptr_t>order[0].ctypes.data
            self.order_row = <int64_t *><uintptr_t>order[1].ctypes.data
            self.total = len(order[1])
        self.n_out = len(out)
        self.out = <OutColumn *>checked(len(out), sizeof(OutColumn))
        self.texts = []
        for i, (slot, kind, data, valid) in enumerate(out):
            self.out[i].slot = slot
            self.out[i].kind = kind
            self.out[i].data = <char *><uintptr_t>data
            self.out[i].valid = <uint8_t *><uintptr_t>valid
            self.texts.append([] if kind == 2 else None)
        self.ingest = ingest
        self.verdicts = verdicts_out
        self.progress = progress

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
            core.enter()
            try:
                rows.arena.used = <uint32_t>PyBytes_GET_SIZE(core.constants)
                with nogil:
                    code = self.decode(rows, start, n)
                if code == 0:
                    if not core.event_clock:
                        now = core.now()
                    ids = self.look_up(rows, start, n, now, modes) if self.any_id else None
                    with nogil:
                        scored = self.step(rows, start, n, now, modes, ids is not None, which)
                    if scored < 0:
                        code = scored
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
                raise EngineError(f"out of memory after {start} rows; the rows before were ingested")
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

    cdef int decode(self, Rows rows, Py_ssize_t start, int n) noexcept nogil:
        """Rows of the slice into the block, then their keys and hashes; the buckets are on their way meanwhile."""
        cdef int i, j, table
        cdef SourceC *source
        cdef ps_slot *slots
        cdef RowKeys *keys
        cdef PipeC *pipe = &self.pipe.c if self.pipe is not None else NULL
        for i in range(n):
            table = self.table_of(start + i)
            slots = rows.slots + i * rows.width
            if (<EventReader>self.readers[table]).read_row(self.columns[table], self.row_of(start + i), slots,
                                                           rows.status + i * rows.width, &rows.arena) != 0:
                return OUT_OF_MEMORY
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
        return 0

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

    cdef int step(self, Rows rows, Py_ssize_t start, int n, int64_t now, const int *modes, bint have_modes,
                  int *which) noexcept nogil:
        """Advance every row in order, then models, then rules. Returns how many rows were scored, or OUT_OF_MEMORY."""
        cdef int i, j, ahead, table, scored = 0
        cdef SourceC *source
        cdef ps_slot *slots
        cdef PipeC *pipe = &self.pipe.c if self.pipe is not None else NULL
        cdef PipeC *this
        cdef RowKeys *keys
        cdef char *base = rows.keys_base
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
            rows.ingest_times[i] = slots[source.time].i if self.core.event_clock else now
            if self.core.advance(source, this, <void *>self.pipe, slots, rows.status + i * rows.width, &rows.arena,
                                 &rows.keys[i], rows.ingest_times[i], modes[i] if have_modes else self.ingest,
                                 &rows.verdicts[i]) != 0:
                return OUT_OF_MEMORY
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
        cdef uint8_t status
        cdef ps_slot slot
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
                    slot = rows.slots[row]
                    texts.append(rows.arena.data[PS_STR_OFFSET(slot.u):PS_STR_OFFSET(slot.u) + PS_STR_LENGTH(slot.u)].decode()
                                 if rows.status[row] & 7 == PS_PRESENT else None)
                continue
            for i in range(scored):
                row = which[i] * rows.width + out.slot
                status = rows.status[row]
                out.valid[written + i] = (2 if status & PS_WIDE else 1) if status & 7 == PS_PRESENT else 0
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
                v.action[written + i] = verdict.action
                v.model[written + i] = verdict.model
                v.failed[written + i] = verdict.failed
                v.score[written + i] = verdict.score if verdict.has_score else NAN
                v.fired[written + i] = verdict.fired
                v.outcome[written + i] = verdict.outcome
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
                if self.ingest and (rows.verdicts[row].failed < 0 or self.pipe.c.fallback >= 0):
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
            for k in range(n_arms):
                v.arms[(written + i) * n_arms + k] = decision.verdict.arms[k]
        return 0
