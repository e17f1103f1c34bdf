"""What a Plan is while it runs (hot path): event types, pipelines and rows as flat C arrays, built once at load.

What must stay true: everything here is fixed after load but counters, watermarks, remembered ids, and the models, which
are swapped between two events; the steps that run over it are in core.pyx.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uintptr_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memset

from penstock.errors import EngineError

from penstock._ext.decision cimport MAX_EXPERIMENTS
from penstock._ext.events cimport ps_arena_append
from penstock._ext.expressions cimport Program
from penstock._ext.event_record cimport ps_record_fixed
from penstock._ext.split cimport Assigner
from penstock._ext.windows cimport WindowStore

from penstock._ext.events import TYPE_CODES


cdef enum:
    SCORE_STRINGS = 1024      # bytes of strings in a score record that room is kept for when its event is logged

cdef int64_t NO_WATERMARK = -(<int64_t>1 << 61)   # before the first event


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
        strings = [i for i, field in enumerate(plan.fields) if field.type == "string"]
        self.c.n_strings = len(strings)
        self.c.strings = <int *>checked(len(strings), sizeof(int))
        for at, slot in enumerate(strings):
            self.c.strings[<int>at] = slot
        self.c.watermark = NO_WATERMARK
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
        free(self.c.strings)

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
        if self.turned == NO_WATERMARK:
            self.turned = watermark
        elif watermark - self.turned > self.remember:
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
        return self.c.watermark if self.c.watermark != NO_WATERMARK else None


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


@cython.no_gc
cdef class ModelHold:
    """What a run of a model points at: the runtime, and where its inputs stand in the row."""

    def __cinit__(self, int position, runtime, list inputs, list types):
        cdef int j
        self.position = position
        self.runtime = runtime
        self.n_inputs = len(inputs)
        self.inputs = <int *>checked(len(inputs), sizeof(int))
        self.types = <uint8_t *>checked(len(inputs), 1)
        for j in range(self.n_inputs):
            self.inputs[j] = inputs[j]
            self.types[j] = TYPE_CODES[types[j]]

    def __dealloc__(self):
        free(self.inputs)
        free(self.types)

    cdef void put(self, ModelRun *run, uintptr_t address, int output, int index, bint row_by_row) noexcept:
        run.model = <const ps_model *>address
        run.n_inputs = self.n_inputs
        run.inputs = self.inputs
        run.types = self.types
        run.output = output
        run.index = index
        run.row_by_row = row_by_row


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
        self.c.degraded_action = -1 if plan.degraded_action is None else texts.actions.index(plan.degraded_action)
        self.c.degraded_failure = plan.degraded_failure
        self.c.degraded = -1 if plan.degraded is None else plan.degraded
        self.c.action_counts = <uint64_t *>checked(len(texts.actions), sizeof(uint64_t))
        self.c.model_counts = <uint64_t *>checked(len(texts.models), sizeof(uint64_t))
        self.c.arm_counts = <uint64_t *>checked(MAX_EXPERIMENTS * (MAX_ARMS + 1), sizeof(uint64_t))
        logged = plan.logged
        self.c.n_logged = len(logged)
        self.c.logged = <int *>checked(len(logged), sizeof(int))
        self.c.logged_string = <uint8_t *>checked(len(logged), 1)
        for i, slot in enumerate(logged):
            self.c.logged[i] = slot
            self.c.logged_string[i] = plan.slots[slot].type == "string"

    def __dealloc__(self):
        cdef int i
        for i in range(self.c.n_reads):
            free(self.c.reads[i].defaults)
        for i in range(self.c.n_functions):
            free(self.c.functions[i].args)
            free(self.c.functions[i].arg_types)
        for i in range(self.c.n_assigns):
            free(self.c.assigns[i].arms)
        free(self.c.reads)
        free(self.c.functions)
        free(self.c.assigns)
        free(self.c.models)
        free(self.c.rules)
        free(self.c.action_counts)
        free(self.c.model_counts)
        free(self.c.arm_counts)
        free(self.c.logged)
        free(self.c.logged_string)

    def add_reads(self, list reads):
        """reads: (WindowStore, group, key slot, key is int, key becomes int, first slot, n outputs, include, defaults);
        defaults: (slot, 8 bytes)."""
        cdef int i, j
        cdef Read *read
        cdef WindowStore store
        if len(reads) > MAX_READS:
            raise EngineError(f"pipeline {self.name}: reads at most {MAX_READS} views")
        self.c.reads = <Read *>checked(len(reads), sizeof(Read))
        self.c.n_reads = len(reads)
        self.c.score_room = ps_record_fixed(1, len(reads), self.c.n_logged) + SCORE_STRINGS
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
        cdef int i
        cdef ModelRun *run
        cdef ModelHold hold
        self.c.models = <ModelRun *>checked(len(models), sizeof(ModelRun))
        self.c.n_models = len(models)
        for i, (runtime, address, inputs, types, output, slot, index, guard, decides, row_by_row) in enumerate(models):
            run = &self.c.models[i]
            hold = ModelHold(i, runtime, inputs, types)
            hold.put(run, <uintptr_t>address, output, index, row_by_row)
            run.slot = slot
            run.guard_experiment = -1 if guard is None else guard[0]
            run.guard_arm = -1 if guard is None else guard[1]
            run.decides = decides
            self.keep.append(hold)

    def know_model(self, str name, str version):
        """Room for decisions of one more model, unless it is known. Between two events."""
        cdef uint64_t *counts
        cdef Py_ssize_t n = len(self.texts.models)
        if (name, version) in self.texts.models:
            return
        counts = <uint64_t *>realloc(self.c.model_counts, (n + 1) * sizeof(uint64_t))
        if counts == NULL:
            raise MemoryError()
        counts[n] = 0
        self.c.model_counts = counts
        self.texts.add_model(name, version)

    cdef list swap_models(self, list models):
        """models: (position, runtime, address, [input slots], [types], output, name, version, row by row). Between two
        events. Returns what held the old ones: runs that were taken before the swap go on with them."""
        cdef ModelHold hold, new
        cdef Py_ssize_t index
        cdef list keep = list(self.keep)
        cdef list old = []
        for position, runtime, address, inputs, types, output, name, version, row_by_row in models:
            new = ModelHold(position, runtime, inputs, types)
            self.know_model(name, version)
            index = self.texts.models.index((name, version))
            for i, held in enumerate(keep):
                if isinstance(held, ModelHold) and (<ModelHold>held).position == position:
                    old.append(held)
                    keep[i] = new
            new.put(&self.c.models[<int>position], <uintptr_t>address, output, index, row_by_row)
        # A new list: whoever took the old one keeps the old models.
        self.keep = keep
        return old

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
        self.n_inputs = max(1, inputs)
        self.n_outputs = max(1, outputs)
        self.matrix = <double *>checked(capacity * self.n_inputs, sizeof(double))
        self.scores = <double *>checked(capacity * self.n_outputs, sizeof(double))
        self.picked = <int *>checked(capacity, sizeof(int))
        # One byte first: an empty string is then no null pointer.
        if ps_arena_append(&self.arena, b"", 1, &ignored) != 0:
            raise MemoryError()
        self.arena.used = 0
        if ps_arena_append(&self.arena, PyBytes_AS_STRING(constants), PyBytes_GET_SIZE(constants), &ignored) != 0:
            raise MemoryError()

    cdef int widen(self, int inputs, int outputs) noexcept nogil:
        """Room for a model that is wider than those that were there when the rows were made. 0, or -1: no memory."""
        cdef double *grown
        if inputs > self.n_inputs:
            grown = <double *>realloc(self.matrix, <size_t>self.capacity * inputs * sizeof(double))
            if grown == NULL:
                return -1
            self.matrix = grown
            self.n_inputs = inputs
        if outputs > self.n_outputs:
            grown = <double *>realloc(self.scores, <size_t>self.capacity * outputs * sizeof(double))
            if grown == NULL:
                return -1
            self.scores = grown
            self.n_outputs = outputs
        return 0

    def __dealloc__(self):
        free(self.slots)
        free(self.status)
        free(self.keys)
        free(self.verdicts)
        free(self.matrix)
        free(self.scores)
        free(self.picked)
        free(self.arena.data)
