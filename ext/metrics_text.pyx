"""The metrics text, written natively (control path that runs on the loop: it must hold it for microseconds only).

Prometheus exposition format 0.0.4. A page is a list of parts; each writes its families into one buffer that is used again.
Everything constant (HELP, TYPE, names and labels) is made once; a scrape puts numbers between. What grows with the
number of models is kept as finished text in which numbers are replaced in place, some models at a time, between scrapes:
those numbers may be a turn old (a turn is TURN models per tick of the loop's probe), never wrong.
What must stay true: every sample is a number that was counted, none is sampled or averaged.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset, strlen

from penstock._ext.flow cimport Lane, N_WAITS
from penstock._ext.http cimport N_BUCKETS, N_STATUSES, Route
from penstock._ext.infer cimport ServedModel, Target
from penstock._ext.loop_lag cimport LoopLag, N_LAGS
from penstock._ext.steps cimport MAX_ARMS, Pipe, Source

from penstock._ext.flow import WAITS
from penstock._ext.http import BUCKETS, STATUSES
from penstock._ext.loop_lag import LAGS

cdef extern from "Python.h":
    char *PyOS_double_to_string(double value, char code, int precision, int flags, int *kind) except NULL
    int Py_DTSF_ADD_DOT_0

cdef enum:
    TURN = 16                 # models refreshed per tick
    AT_ONCE = 64              # models whose numbers are always those of the scrape
    WIDTH = 20                # of a number that is replaced in place
    FAMILIES = 4              # of models
    MADE_AT_ONCE = 64         # lines of new models that one scrape or tick makes


def labels(**values):
    """The labels of a sample: `{name="value",...}`."""
    return "{" + ",".join([f'{name}="{escaped(str(value))}"' for name, value in values.items()]) + "}"


def escaped(str text):
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def bounds(values):
    """The `le` labels of a histogram."""
    return [f"{bound:.6g}" for bound in values] + ["+Inf"]


def head(str name, str kind, str about):
    return f"# HELP {name} {about}\n# TYPE {name} {kind}\n".encode()


def sample(str name, str text):
    return f"{name}{text} ".encode()


@cython.final
cdef class Text:
    def __dealloc__(self):
        free(self.p)

    cdef char *room(self, size_t n) except NULL:
        cdef size_t cap
        cdef char *grown
        if self.n + n > self.cap:
            cap = max(2 * self.cap, self.n + n, <size_t>16384)
            grown = <char *>realloc(self.p, cap)
            if grown == NULL:
                raise MemoryError()
            self.p = grown
            self.cap = cap
        return self.p + self.n

    cdef int put(self, bytes text) except -1:
        cdef size_t n = PyBytes_GET_SIZE(text)
        memcpy(self.room(n), PyBytes_AS_STRING(text), n)
        self.n += n
        return 0

    cdef int number(self, uint64_t value) except -1:
        cdef char *at = self.room(20)
        cdef int n = digits_of(value)
        write_digits(at + n, value)
        self.n += n
        return 0

    cdef int nanoseconds(self, int64_t value) except -1:
        """As seconds."""
        return self.value(value / 1e9)

    cdef int value(self, object value) except -1:
        """An int or a float, as repr writes it."""
        cdef char *shown
        cdef size_t n
        if isinstance(value, int):
            if 0 <= value < 2**63:
                return self.number(value)
            return self.put(str(value).encode())
        shown = PyOS_double_to_string(value, b"r", 0, Py_DTSF_ADD_DOT_0, NULL)
        n = strlen(shown)
        memcpy(self.room(n), shown, n)
        self.n += n
        PyMem_Free(shown)
        return 0

    cdef int line(self, bytes before, uint64_t value) except -1:
        self.put(before)
        self.number(value)
        self.room(1)[0] = b"\n"
        self.n += 1
        return 0


cdef int end_line(Text text) except -1:
    text.room(1)[0] = b"\n"
    text.n += 1
    return 0


cdef int digits_of(uint64_t value) noexcept nogil:
    cdef int n = 1
    while value >= 10:
        value //= 10
        n += 1
    return n


cdef void write_digits(char *end, uint64_t value) noexcept nogil:
    """The digits of a value, the last of them before `end`."""
    while True:
        end -= 1
        end[0] = <char>(48 + value % 10)
        value //= 10
        if value == 0:
            return


cdef class Part:
    """Something that writes whole families."""

    cdef int write(self, Text text) except -1:
        return 0


@cython.final
cdef class Page(Part):
    """All parts in order."""

    def __init__(self, parts):
        self.parts = list(parts)
        self.text = Text.__new__(Text)

    cdef int write(self, Text text) except -1:
        cdef Part part
        for part in self.parts:
            part.write(text)
        return 0

    def bytes(self):
        """The text."""
        self.text.n = 0
        self.write(self.text)
        return PyBytes_FromStringAndSize(self.text.p, self.text.n)


@cython.final
cdef class Numbers(Part):
    """Families of one sample: (name, kind, about, read), read() being an int or a float."""
    cdef list before, reads

    def __init__(self, entries):
        self.before = [head(name, kind, about) + sample(name, "") for name, kind, about, _ in entries]
        self.reads = [read for _, _, _, read in entries]

    cdef int write(self, Text text) except -1:
        cdef Py_ssize_t i
        for i in range(len(self.before)):
            text.put(<bytes>self.before[i])
            text.value(self.reads[i]())
            end_line(text)
        return 0


@cython.final
cdef class Summary(Part):
    """A sum and a count."""
    cdef bytes before_sum, before_count
    cdef object total, count

    def __init__(self, str name, str about, total, count):
        self.before_sum = head(name, "summary", about) + sample(name + "_sum", "")
        self.before_count = sample(name + "_count", "")
        self.total = total
        self.count = count

    cdef int write(self, Text text) except -1:
        text.put(self.before_sum)
        text.value(self.total())
        end_line(text)
        text.put(self.before_count)
        text.value(self.count())
        return end_line(text)


@cython.final
cdef class Family(Part):
    """One family whose labels come and go: read() gives (value or values of the labels, number), in order."""
    cdef bytes head
    cdef str name
    cdef tuple names
    cdef object read
    cdef dict before

    def __init__(self, str name, str kind, str about, tuple names, read):
        self.head = head(name, kind, about)
        self.name = name
        self.names = names
        self.read = read
        self.before = {}

    cdef int write(self, Text text) except -1:
        text.put(self.head)
        for key, number in self.read():
            before = self.before.get(key)
            if before is None:
                values = key if isinstance(key, tuple) else (key,)
                before = self.before[key] = sample(self.name, labels(**dict(zip(self.names, values))))
            text.put(<bytes>before)
            text.value(number)
            end_line(text)
        return 0


@cython.final
cdef class Table(Part):
    """Families that share their labels: read() gives a row of numbers per label text, a number per family."""
    cdef list heads, before
    cdef object read

    def __init__(self, families, texts, read):
        self.heads = [head(name, kind, about) for name, kind, about in families]
        self.before = [[sample(name, text) for text in texts] for name, _, _ in families]
        self.read = read

    cdef int write(self, Text text) except -1:
        cdef Py_ssize_t i, j
        cdef list rows = self.read()
        for i in range(len(self.heads)):
            text.put(<bytes>self.heads[i])
            for j in range(len(rows)):
                text.put(<bytes>self.before[i][j])
                text.value(rows[j][i])
                end_line(text)
        return 0


@cython.final
cdef class Routes(Part):
    """Requests by route and status, and how long they took. routes() -> the Routes there are."""
    cdef object routes
    cdef dict statuses, durations
    cdef bytes head_requests, head_durations

    def __init__(self, routes):
        self.routes = routes
        self.statuses = {}
        self.durations = {}
        self.head_requests = head("penstock_http_requests_total", "counter", "Requests answered, by route and status.")
        self.head_durations = head("penstock_http_request_duration_seconds", "histogram",
                                   "From the read of a request's last bytes to its answer being formed.")

    cdef int write(self, Text text) except -1:
        cdef list routes = self.routes(), before
        cdef Route route
        cdef int i
        cdef uint64_t total
        text.put(self.head_requests)
        for route in routes:
            before = self.statuses.get(route)
            if before is None:
                before = self.statuses[route] = [
                    sample("penstock_http_requests_total", labels(route=route.label, code=code or "other"))
                    for code in STATUSES
                ]
            for i in range(<int>len(before)):
                if route.statuses[i]:
                    text.line(<bytes>before[i], route.statuses[i])
        text.put(self.head_durations)
        name = "penstock_http_request_duration_seconds"
        for route in routes:
            if route.requests == 0 and route.kind == "handler":
                continue                               # an operator's path that nobody has asked for
            before = self.durations.get(route)
            if before is None:
                before = self.durations[route] = [
                    sample(name + "_bucket", labels(route=route.label, le=bound)) for bound in bounds(BUCKETS)
                ] + [sample(name + "_sum", labels(route=route.label)), sample(name + "_count", labels(route=route.label))]
            total = 0
            for i in range(N_BUCKETS):
                total += route.buckets[i]
                text.line(<bytes>before[i], total)
            text.put(<bytes>before[N_BUCKETS])
            text.nanoseconds(route.total_ns)
            end_line(text)
            text.line(<bytes>before[N_BUCKETS + 1], route.requests)
        return 0





@cython.final
cdef class Decisions(Part):
    """What the engine's core counts: decisions by action, arm and model; events by what became of them."""
    cdef object core
    cdef tuple outcomes
    cdef dict before
    cdef list heads

    def __init__(self, core, outcomes):
        self.core = core
        self.outcomes = tuple(outcomes)
        self.before = {}
        self.heads = [
            head("penstock_decisions_total", "counter", "Decisions, by pipeline and action."),
            head("penstock_arm_decisions_total", "counter",
                 "Decisions, by experiment and arm; an empty arm is a unit that is not in the experiment."),
            head("penstock_model_decisions_total", "counter", "Decisions, by the model that decided."),
            head("penstock_events_total", "counter", "Events, by what became of them."),
            head("penstock_late_dropped_total", "counter",
                 "Events not applied because they came later than the lateness allows."),
            head("penstock_degraded_decisions_total", "counter",
                 "Decisions on features that could not all be known, or on an event that was late or quarantined."),
            head("penstock_failed_decisions_total", "counter",
                 "Decisions whose function or model failed, or gave no score."),
        ]

    cdef tuple made(self, Pipe pipe):
        """The beginnings of a pipeline's lines; made anew when its words change, as with a new version of a model."""
        cdef tuple found = self.before.get(pipe)
        words = (pipe.texts.actions, pipe.texts.experiments, pipe.texts.arms, pipe.texts.models)
        if found is not None and found[0] is words[0] and found[1] is words[1] and found[2] is words[2] and found[3] is words[3]:
            return found
        name = pipe.name
        found = words + (
            [sample("penstock_decisions_total", labels(pipeline=name, action=action)) for action in words[0]],
            [
                [sample("penstock_arm_decisions_total", labels(pipeline=name, experiment=experiment, arm=arm))
                 for arm in (*arms, "")]
                for experiment, arms in zip(words[1], words[2])
            ],
            [sample("penstock_model_decisions_total", labels(pipeline=name, model=f"{model}@{version}"))
             for model, version in words[3]],
            sample("penstock_degraded_decisions_total", labels(pipeline=name)),
            sample("penstock_failed_decisions_total", labels(pipeline=name)),
        )
        self.before[pipe] = found
        return found

    cdef int write(self, Text text) except -1:
        cdef list pipes = self.core.pipes, sources = self.core.sources
        cdef list before, arms
        cdef Pipe pipe
        cdef Source source
        cdef int i, j, late = self.outcomes.index("late")
        text.put(<bytes>self.heads[0])
        for pipe in pipes:
            before = <list>self.made(pipe)[4]
            for i in range(<int>len(before)):
                text.line(<bytes>before[i], pipe.c.action_counts[i])
        text.put(<bytes>self.heads[1])
        for pipe in pipes:
            before = <list>self.made(pipe)[5]
            for j in range(<int>len(before)):
                arms = <list>before[j]
                for i in range(<int>len(arms) - 1):
                    text.line(<bytes>arms[i], pipe.c.arm_counts[j * (MAX_ARMS + 1) + i])
                text.line(<bytes>arms[len(arms) - 1], pipe.c.arm_counts[j * (MAX_ARMS + 1) + MAX_ARMS])
        text.put(<bytes>self.heads[2])
        for pipe in pipes:
            before = <list>self.made(pipe)[6]
            for i in range(<int>len(before)):
                text.line(<bytes>before[i], pipe.c.model_counts[i])
        text.put(<bytes>self.heads[3])
        for source in sources:
            before = self.before.get(source)
            if before is None:
                before = self.before[source] = [
                    sample("penstock_events_total", labels(event=source.name, outcome=outcome)) for outcome in self.outcomes
                ] + [sample("penstock_late_dropped_total", labels(event=source.name))]
            for i in range(<int>len(before) - 1):
                text.line(<bytes>before[i], source.c.outcomes[i])
        text.put(<bytes>self.heads[4])
        for source in sources:
            before = <list>self.before[source]
            text.line(<bytes>before[len(before) - 1], source.c.outcomes[late])
        text.put(<bytes>self.heads[5])
        for pipe in pipes:
            text.line(<bytes>self.made(pipe)[7], pipe.c.degraded_count)
        text.put(<bytes>self.heads[6])
        for pipe in pipes:
            text.line(<bytes>self.made(pipe)[8], pipe.c.failed_count)
        return 0


@cython.final
cdef class Lag(Part):
    """The histograms of the loop's lateness."""
    cdef LoopLag lag
    cdef list before

    def __init__(self, LoopLag lag):
        self.lag = lag
        self.before = []
        for name, about in (
            ("penstock_loop_lag_seconds", "How late the loop serves what is ready."),
            ("penstock_loop_held_seconds", "The same without the wait for a processor: what the loop itself was held."),
        ):
            lines = [sample(name + "_bucket", labels(le=bound)) for bound in bounds(LAGS)]
            lines[0] = head(name, "histogram", about) + lines[0]
            self.before += lines + [sample(name + "_sum", ""), sample(name + "_count", "")]

    cdef int write(self, Text text) except -1:
        self.histogram(text, 0, self.lag.buckets, self.lag.total_ns)
        return self.histogram(text, N_LAGS + 2, self.lag.held, self.lag.held_ns)

    cdef int histogram(self, Text text, int first, const uint64_t *buckets, int64_t sum_ns) except -1:
        cdef int i
        cdef uint64_t total = 0
        for i in range(N_LAGS):
            total += buckets[i]
            text.line(<bytes>self.before[first + i], total)
        text.put(<bytes>self.before[first + N_LAGS])
        text.nanoseconds(sum_ns)
        end_line(text)
        return text.line(<bytes>self.before[first + N_LAGS + 1], total)


cdef void add_lane(LaneSums *sums, Lane lane) noexcept:
    cdef int i
    sums.admitted += lane.admitted
    sums.queued += lane.queued
    sums.full += lane.refused_full
    sums.late += lane.refused_late
    sums.dropped += lane.dropped_late
    sums.waiting += lane.waiting
    sums.pooled += lane.pooled
    sums.waited_ns += lane.waited_ns
    for i in range(N_WAITS):
        sums.waits[i] += lane.waits[i]


LANE_FAMILIES = (
    ("penstock_lane_admitted_total", "counter", "Requests that were taken, at once or into the queue."),
    ("penstock_lane_queued_total", "counter", "Requests that waited in the queue."),
    ("penstock_lane_refused_total", "counter",
     "Requests refused: the queue was full, it was too late when they came, or when their turn came."),
    ("penstock_lane_waiting_rows", "gauge", "Rows that wait now."),
    ("penstock_lane_pooled", "gauge", "Requests on the native pool now."),
    ("penstock_lane_queue_seconds", "histogram", "How long queued requests waited."),
    ("penstock_lane_row_seconds", "gauge", "What a row of a pipeline or an event type is taken to cost when it comes."),
)


@cython.final
cdef class Lanes(Part):
    """Queues and refusals by lane. lanes() -> the lanes of pipelines and events; those of models are summed by `models`."""
    cdef object lanes
    cdef Models models
    cdef dict before
    cdef list heads

    def __init__(self, lanes, Models models=None):
        self.lanes = lanes
        self.models = models
        self.before = {}
        self.heads = [head(*family) for family in LANE_FAMILIES]

    cdef list made(self, str name):
        cdef list found = self.before.get(name)
        if found is None:
            names = [family[0] for family in LANE_FAMILIES]
            one = labels(lane=name)
            found = self.before[name] = [
                sample(names[0], one), sample(names[1], one),
                *(sample(names[2], labels(lane=name, reason=reason)) for reason in ("full", "late", "dropped")),
                sample(names[3], one), sample(names[4], one),
                *(sample(names[5] + "_bucket", labels(lane=name, le=bound)) for bound in bounds(WAITS)),
                sample(names[5] + "_sum", one), sample(names[5] + "_count", one), sample(names[6], one),
            ]
        return found

    cdef int write(self, Text text) except -1:
        cdef list lanes = list(self.lanes()), before
        cdef list lines = [self.made((<Lane>lane).name) for lane in lanes]
        cdef LaneSums sums[64]
        cdef Py_ssize_t i, j, n = min(<Py_ssize_t>len(lanes), <Py_ssize_t>63)
        cdef uint64_t total
        memset(sums, 0, sizeof(sums))
        for i in range(n):
            add_lane(&sums[i], <Lane>lanes[i])
        for i in range(63, <Py_ssize_t>len(lanes)):    # a plan with more lanes: the rest stand together
            add_lane(&sums[63], <Lane>lanes[i])
        if len(lanes) > 63:
            lines[63] = self.made("others")
            n = 64
        if self.models is not None:
            if n == 64:
                n = 63
            lines = lines[:n] + [self.made("models")]
            sums[n] = self.models.sums
            n += 1
        text.put(<bytes>self.heads[0])
        for i in range(n):
            text.line(<bytes>(<list>lines[i])[0], sums[i].admitted)
        text.put(<bytes>self.heads[1])
        for i in range(n):
            text.line(<bytes>(<list>lines[i])[1], sums[i].queued)
        text.put(<bytes>self.heads[2])
        for i in range(n):
            before = <list>lines[i]
            text.line(<bytes>before[2], sums[i].full)
            text.line(<bytes>before[3], sums[i].late)
            text.line(<bytes>before[4], sums[i].dropped)
        text.put(<bytes>self.heads[3])
        for i in range(n):
            text.line(<bytes>(<list>lines[i])[5], sums[i].waiting)
        text.put(<bytes>self.heads[4])
        for i in range(n):
            text.line(<bytes>(<list>lines[i])[6], sums[i].pooled)
        text.put(<bytes>self.heads[5])
        for i in range(n):
            before = <list>lines[i]
            total = 0
            for j in range(N_WAITS):
                total += sums[i].waits[j]
                text.line(<bytes>before[7 + j], total)
            text.put(<bytes>before[7 + N_WAITS])
            text.nanoseconds(sums[i].waited_ns)
            end_line(text)
            text.line(<bytes>before[8 + N_WAITS], total)
        text.put(<bytes>self.heads[6])
        for i in range(min(<Py_ssize_t>len(lanes), <Py_ssize_t>63)):
            text.put(<bytes>(<list>lines[i])[9 + N_WAITS])
            text.nanoseconds((<Lane>lanes[i]).row_ns)
            end_line(text)
        return 0


MODEL_FAMILIES = (
    ("penstock_model_requests_total", "counter", "Inference requests answered, by model and version."),
    ("penstock_model_rows_total", "counter", "Rows of them."),
    ("penstock_model_request_nanoseconds_total", "counter", "Time from a request's arrival to its answer, summed."),
    ("penstock_model_failures_total", "counter", "Inference requests that failed; a model without one is left out."),
)
cdef enum:
    FAILURES = 3


@cython.final
cdef class Slot:
    pass


@cython.final
cdef class Models(Part):
    """Inferences by model, kept as finished text. targets() -> Target of every version; version() changes with what is
    served. ns_per_tick: of the times that ServedModel sums. No model is held: one that is swapped out is free to go."""
    def __init__(self, targets, version, double ns_per_tick=1.0):
        self.targets = targets
        self.version = version
        self.ns_per_tick = ns_per_tick
        self.seen = -1
        self.slots = []
        self.by_key = {}
        self.text = []
        self.gaps = [[] for _ in MODEL_FAMILIES]
        for family in MODEL_FAMILIES:
            one = Text.__new__(Text)
            (<Text>one).put(head(*family))
            self.text.append(one)

    @property
    def models_loaded(self):
        return self.loaded

    @property
    def models_bytes(self):
        return self.nbytes

    cdef int add_line(self, Slot slot, int family) except -1:
        """A line with the number 0: in the place of one that is gone where it fits, else at the end."""
        cdef Text text = <Text>self.text[family]
        cdef bytes before = MODEL_FAMILIES[family][0].encode() + slot.labels + b" "
        cdef size_t n = PyBytes_GET_SIZE(before), begin = text.n, end = begin + n + WIDTH
        cdef list gaps = <list>self.gaps[family]
        for i in range(len(gaps)):
            if gaps[i][1] - gaps[i][0] >= n + WIDTH:
                begin, end = gaps.pop(i)
                break
        else:
            text.room(n + WIDTH + 1)[n + WIDTH] = b"\n"
            text.n += n + WIDTH + 1
        memset(text.p + begin, b" ", end - begin)
        memcpy(text.p + begin, PyBytes_AS_STRING(before), n)
        text.p[end - 1] = b"0"
        slot.at[family] = end
        slot.shown[family] = 0
        return 0

    cdef int blank(self, Slot slot) except -1:
        """A model that is gone: its lines become blanks, which readers pass over."""
        cdef Text text
        cdef int family
        cdef size_t end, begin
        for family in range(FAMILIES):
            if slot.at[family]:
                text = <Text>self.text[family]
                end = slot.at[family]
                begin = end
                while text.p[begin - 1] != b"\n":
                    begin -= 1
                memset(text.p + begin, b" ", end - begin)
                (<list>self.gaps[family]).append((begin, end))
        return 0

    cdef int sync(self) except -1:
        """Lines for models that came, none for those that went. A few at a time: the rest follow at the next call."""
        cdef int64_t version = self.version()
        cdef Target target
        cdef Slot slot
        cdef int made = 0, i
        cdef int64_t loaded = 0, nbytes = 0
        if version == self.seen:
            return 0
        here = {}
        for target in self.targets():
            if target.model is not None:
                here[target.name, target.version] = target
        gone = [key for key in self.by_key if key not in here]
        for key in gone:
            self.blank(<Slot>self.by_key.pop(key))
        lanes = set()
        for key, target in here.items():
            loaded += 1
            nbytes += target.model.nbytes
            slot = self.by_key.get(key)
            if slot is None:
                if made == MADE_AT_ONCE:
                    continue
                made += 1
                slot = Slot.__new__(Slot)
                slot.labels = labels(model=key[0], version=key[1]).encode()
                for i in range(FAMILIES):
                    slot.at[i] = 0
                for i in range(FAILURES):
                    self.add_line(slot, i)
                self.by_key[key] = slot
            slot.target = target
            slot.lane = None if target.lane in lanes else target.lane
            lanes.add(target.lane)
        if gone or made:
            self.slots = list(self.by_key.values())
        self.turn = 0
        memset(&self.running, 0, sizeof(self.running))
        self.loaded = loaded
        self.nbytes = nbytes
        if made < MADE_AT_ONCE:
            self.seen = version
        return 0

    cdef int refresh_some(self, Py_ssize_t n) except -1:
        """Replace the numbers of the next n models; after the last of them the sums of their lanes are a turn's."""
        cdef Slot slot
        cdef ServedModel model
        cdef Text text
        cdef uint64_t now[FAMILIES]
        cdef int family, digits
        cdef Py_ssize_t count = len(self.slots)
        while n > 0 and self.turn < count:
            n -= 1
            slot = <Slot>self.slots[self.turn]
            self.turn += 1
            model = slot.target.model
            if model is None:
                continue
            now[0] = model.n_success
            now[1] = model.n_rows
            now[2] = <uint64_t>(model.t_success * self.ns_per_tick)
            now[FAILURES] = model.n_fail
            if now[FAILURES] and not slot.at[FAILURES]:
                self.add_line(slot, FAILURES)
            for family in range(FAMILIES):
                if slot.at[family] and now[family] != slot.shown[family]:
                    text = <Text>self.text[family]
                    digits = digits_of(now[family])
                    if now[family] < slot.shown[family]:
                        memset(text.p + slot.at[family] - WIDTH, b" ", WIDTH)
                    write_digits(text.p + slot.at[family], now[family])
                    slot.shown[family] = now[family]
            if slot.lane is not None:
                add_lane(&self.running, slot.lane)
        if self.turn >= count:
            self.turn = 0
            self.sums = self.running
            memset(&self.running, 0, sizeof(self.running))
        return 0

    def tick(self):
        """Refresh some of them: called by the loop's probe."""
        self.sync()
        if len(self.slots) > AT_ONCE:
            self.refresh_some(TURN)

    def prepare(self):
        """What a scrape begins with: all numbers where the models are few."""
        self.sync()
        if len(self.slots) <= AT_ONCE:
            self.turn = 0
            memset(&self.running, 0, sizeof(self.running))
            self.refresh_some(AT_ONCE)

    cdef int write(self, Text text) except -1:
        cdef Text one
        for one in self.text:
            memcpy(text.room(one.n), one.p, one.n)
            text.n += one.n
        return 0
