"""Decisions (hot path): what scoring an event answers, its id, and its JSON.

What must stay true: a Decision holds no container of its own, so the garbage collector never sees it.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.math cimport isfinite
from libc.string cimport memcpy

import os

import msgspec

from penstock.timestamp import Timestamp

from penstock._ext.row cimport (
    PS_AGED, PS_BOOL, PS_FLOAT64, PS_INT64, PS_PRESENT, PS_STRING, PS_STR_LENGTH, PS_STR_OFFSET, PS_TIMESTAMP, PS_WIDE,
)

cdef extern from "shortest.h" nogil:
    enum:
        PS_POWER_MIN
        PS_POWER_MAX
    void ps_shortest_set(int k, uint64_t high, uint64_t low)
    int ps_shortest(double value, char *out)

cdef extern from *:
    int popcount "__builtin_popcountll" (unsigned long long) nogil


def _make_powers():
    """10^k as shortest.h wants it: 128 bits, the highest one set, rounded up."""
    for k in range(PS_POWER_MIN, PS_POWER_MAX + 1):
        power = 10 ** abs(k)
        if k >= 0:
            shift = power.bit_length() - 128
            scaled = -(-power >> shift) if shift > 0 else power << -shift
        else:
            # 10^k is no power of two: the quotient is never whole, one more is the rounding up.
            scaled = (1 << (127 + power.bit_length())) // power + 1
        ps_shortest_set(k, scaled >> 64, scaled & 0xFFFFFFFFFFFFFFFF)


_make_powers()

OUTCOMES = ("off", "applied", "duplicate", "late", "quarantined")
STATUSES = ("INVALID", "PRESENT", "NULL_VALUE", "NOT_FOUND", "OUTSIDE_MAX_AGE")
cdef tuple _OUTCOMES = OUTCOMES
# By outcome, then the same of degraded decisions.
cdef tuple _JSON_OUTCOMES = tuple(
    f',"outcome":"{o}"{degraded}}}'.encode() for degraded in ("", ',"degraded":true') for o in OUTCOMES)
cdef tuple _PACK_OUTCOMES = tuple(
    b"\xa7outcome" + msgspec.msgpack.encode(o) + degraded for degraded in (b"", b"\xa8degraded\xc3") for o in OUTCOMES)
cdef int N_WORDS = len(OUTCOMES)
cdef const char *BASE32 = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ"


cdef class IdSource:
    """48 bits of milliseconds, 25 of a counter within the millisecond, 55 that name the node: Crockford base 32.

    The text has the form of a ULID. Ids of one node increase strictly; the node's bits are random at start.
    """

    def __cinit__(self):
        cdef int i
        cdef bytes seed = os.urandom(11)
        for i in range(11):
            self.node[i] = BASE32[seed[i] & 31]
        self.ms = -1
        self.sequence = 0
        memcpy(self.text + 15, self.node, 11)

    cdef void next(self, int64_t now_us, char *out) noexcept nogil:
        cdef int64_t ms = now_us // 1000
        cdef int64_t rest
        cdef uint64_t sequence
        cdef int i
        if ms <= self.ms:
            self.sequence += 1
            if self.sequence >> 25:
                self.ms += 1
                self.sequence = 0
                ms = self.ms
            else:
                ms = -1
        else:
            self.ms = ms
            self.sequence = 0
        if ms >= 0:
            rest = ms
            for i in range(10):
                self.text[9 - i] = BASE32[rest & 31]
                rest >>= 5
        sequence = self.sequence
        for i in range(5):
            self.text[14 - i] = BASE32[sequence & 31]
            sequence >>= 5
        memcpy(out, self.text, 26)

    def take(self, int64_t now_us):
        """The next id as of a time in microseconds."""
        cdef char out[26]
        self.next(now_us, out)
        return out[:26].decode()


def _room(actions, reasons, failures, models, arms):
    """Bytes that a decision of these words takes at the most."""
    longest = [max((len(word) for word in words), default=0) for words in (actions, failures, models, *arms)]
    return 180 + PS_SHORTEST_ROOM + sum(longest) + sum(len(r) for r in reasons) + len(reasons) + len(arms)


cdef class DecisionTexts:
    def __cinit__(self, *, pipeline, actions, reasons, models, experiments, arms, failures, features, fallback):
        self.pipeline = pipeline
        self.actions = tuple(actions)
        self.reasons = tuple(reasons)
        self.models = tuple(models)
        self.experiments = tuple(experiments)
        self.arms = tuple(tuple(a) for a in arms)
        self.failures = tuple(failures)
        self.features = tuple(features)
        self.fallback = fallback
        encode = msgspec.json.encode
        self.json_actions = tuple(b'","action":' + encode(a) + b',"score":' for a in self.actions)
        self.json_reasons = tuple(encode(r) for r in self.reasons)
        self.json_failures = tuple(encode(f) for f in self.failures)
        self.json_models = tuple(b',"model":' + encode(n) + b',"model_version":' + encode(v) for n, v in self.models) + (
            b',"model":null,"model_version":null',)
        self.json_arms = tuple(
            tuple(encode(name) + b":" + encode(arm) for arm in (*names, None))
            for name, names in zip(self.experiments, self.arms)
        )
        pack = msgspec.msgpack.encode
        self.pack_actions = tuple(b"\xa6action" + pack(a) + b"\xa5score" for a in self.actions)
        self.pack_reasons = tuple(pack(r) for r in self.reasons)
        self.pack_failures = tuple(pack(f) for f in self.failures)
        self.pack_models = tuple(
            b"\xa5model" + pack(n) + b"\xadmodel_version" + pack(v) for n, v in (*self.models, (None, None)))
        self.pack_arms = tuple(
            tuple(pack(name) + pack(arm) for arm in (*names, None)) for name, names in zip(self.experiments, self.arms))
        self.json_room = _room(self.json_actions, self.json_reasons, self.json_failures, self.json_models, self.json_arms)
        self.pack_room = _room(self.pack_actions, self.pack_reasons, self.pack_failures, self.pack_models, self.pack_arms)
        self.reasons_of = {0: ()}

    def add_model(self, str name, str version):
        """One more model, behind the others: decisions that were made keep their words. Between two events."""
        cdef DecisionTexts grown = DecisionTexts(
            pipeline=self.pipeline, actions=self.actions, reasons=self.reasons, models=(*self.models, (name, version)),
            experiments=self.experiments, arms=self.arms, failures=self.failures, features=self.features,
            fallback=self.fallback)
        self.json_models, self.pack_models = grown.json_models, grown.pack_models
        self.json_room, self.pack_room = grown.json_room, grown.pack_room
        self.models = grown.models

    def reasons_for(self, uint64_t fired, int failed=-1):
        """The reasons of the rules that fired, in the rules' order; then the failure's, where something failed."""
        if failed >= 0:
            return (*self.reasons_for(fired), self.failures[failed])
        known = self.reasons_of.get(fired)
        if known is None:
            known = tuple(reason for i, reason in enumerate(self.reasons) if fired >> i & 1)
            self.reasons_of[fired] = known
        return known


@cython.final
@cython.no_gc
@cython.freelist(256)
cdef class Decision:
    """What one event was answered: `id`, `action`, `score`, `reasons`, `model`, `model_version`, `arms`, `outcome`.

    id: 26 characters, unique over nodes and sortable by time; labels, outcomes and exposures join on it.
    score: the deciding model's score as float64, or None where no model decides or the score is null.
    outcome: applied, duplicate, late, quarantined or off (S14, S16).
    degraded: whether a feature of a view could not be known, or the event was late or quarantined (S17).
    features: name -> value, where scoring was asked to explain; statuses: name -> S17 status.
    """

    def __init__(self):
        raise TypeError("an Engine makes decisions")

    def __reduce__(self):
        raise TypeError("a Decision belongs to its engine; keep decision.json() or decision.as_dict()")

    @staticmethod
    cdef Decision new(DecisionTexts texts, const char *id, const Verdict *verdict):
        cdef Decision self = Decision.__new__(Decision)
        memcpy(self._id, id, 26)
        self.verdict = verdict[0]
        self.texts = texts
        return self

    @property
    def id(self):
        return self._id[:26].decode()

    @property
    def pipeline(self):
        return self.texts.pipeline

    @property
    def action(self):
        return self.texts.actions[self.verdict.action]

    @property
    def score(self):
        return self.verdict.score if self.verdict.has_score else None

    @property
    def reasons(self):
        return self.texts.reasons_for(self.verdict.fired, self.verdict.failed)

    @property
    def model(self):
        return self.texts.models[self.verdict.model][0] if self.verdict.model >= 0 else None

    @property
    def model_version(self):
        return self.texts.models[self.verdict.model][1] if self.verdict.model >= 0 else None

    @property
    def arms(self):
        """Experiment -> arm, or None for a unit that is not in the experiment."""
        return {
            name: (self.texts.arms[i][self.verdict.arms[i]] if self.verdict.arms[i] >= 0 else None)
            for i, name in enumerate(self.texts.experiments)
        }

    @property
    def outcome(self):
        return _OUTCOMES[self.verdict.outcome]

    @property
    def degraded(self):
        """Whether a view's value could not be known (INVALID), or the event was late or quarantined (S17)."""
        return self.verdict.degraded != 0

    @property
    def features(self):
        """Feature name -> value in the pipeline's order, or None where the decision was not explained."""
        return None if self.row is None else {n: v for n, v, _ in self.explained()}

    @property
    def statuses(self):
        return None if self.row is None else {n: s for n, _, s in self.explained()}

    def explained(self):
        cdef const ps_slot *slots = <const ps_slot *>PyBytes_AS_STRING(self.row)
        cdef Py_ssize_t n = PyBytes_GET_SIZE(self.row) // 9
        cdef const uint8_t *status = <const uint8_t *>PyBytes_AS_STRING(self.row) + 8 * n
        found = []
        for name, type, index in self.texts.features:
            found.append((name, slot_value(slots[<int>index], status[<int>index], type, PyBytes_AS_STRING(self.strings)),
                          "OUTSIDE_MAX_AGE" if status[<int>index] & PS_AGED else STATUSES[status[<int>index] & 7]))
        return found

    cdef Py_ssize_t write_json(self, char *out) noexcept:
        """The JSON form, not explained, into `texts.json_room` bytes. Returns how many it took."""
        cdef DecisionTexts t = self.texts
        cdef char *p = out
        cdef Py_ssize_t i
        cdef uint64_t fired = self.verdict.fired
        cdef tuple words
        memcpy(p, b'{"id":"', 7)
        memcpy(p + 7, self._id, 26)
        p = copied(p + 33, <bytes>t.json_actions[self.verdict.action])
        if self.verdict.has_score:
            p += ps_shortest(self.verdict.score, p)
        else:
            memcpy(p, b"null", 4)
            p += 4
        memcpy(p, b',"reasons":[', 12)
        p += 12
        i = 0
        while fired:
            if fired & 1:
                p = copied(p, <bytes>t.json_reasons[i])
                p[0] = b","
                p += 1
            fired >>= 1
            i += 1
        if self.verdict.failed >= 0:
            p = copied(p, <bytes>t.json_failures[self.verdict.failed])
        elif self.verdict.fired:
            p -= 1
        p[0] = b"]"
        p = copied(p + 1, <bytes>t.json_models[self.verdict.model if self.verdict.model >= 0 else len(t.models)])
        memcpy(p, b',"arms":{', 9)
        p += 9
        for i in range(len(t.json_arms)):
            if i:
                p[0] = b","
                p += 1
            words = <tuple>t.json_arms[i]
            p = copied(p, <bytes>words[self.verdict.arms[i] if self.verdict.arms[i] >= 0 else len(words) - 1])
        p[0] = b"}"
        p = copied(p + 1, <bytes>_JSON_OUTCOMES[self.verdict.outcome + N_WORDS * self.verdict.degraded])
        return p - out

    cdef Py_ssize_t write_msgpack(self, char *out) noexcept:
        """The MessagePack form, not explained, into `texts.pack_room` bytes. Returns how many it took."""
        cdef DecisionTexts t = self.texts
        cdef char *p = out
        cdef Py_ssize_t i, n
        cdef uint64_t fired = self.verdict.fired
        cdef tuple words
        memcpy(p, b"\x88\xa2id\xba", 5)
        p[0] = <char>(0x88 + self.verdict.degraded)
        memcpy(p + 5, self._id, 26)
        p = copied(p + 31, <bytes>t.pack_actions[self.verdict.action])
        p += pack_number(p, self.verdict.score, self.verdict.has_score)
        memcpy(p, b"\xa7reasons", 8)
        p += 8
        n = popcount(fired) + (self.verdict.failed >= 0)
        if n < 16:
            p[0] = <char>(0x90 | n)
            p += 1
        else:
            p[0] = <char>0xdc
            p[1] = 0
            p[2] = <char>n
            p += 3
        i = 0
        while fired:
            if fired & 1:
                p = copied(p, <bytes>t.pack_reasons[i])
            fired >>= 1
            i += 1
        if self.verdict.failed >= 0:
            p = copied(p, <bytes>t.pack_failures[self.verdict.failed])
        p = copied(p, <bytes>t.pack_models[self.verdict.model if self.verdict.model >= 0 else len(t.models)])
        memcpy(p, b"\xa4arms", 5)
        p[5] = <char>(0x80 | len(t.pack_arms))
        p += 6
        for i in range(len(t.pack_arms)):
            words = <tuple>t.pack_arms[i]
            p = copied(p, <bytes>words[self.verdict.arms[i] if self.verdict.arms[i] >= 0 else len(words) - 1])
        p = copied(p, <bytes>_PACK_OUTCOMES[self.verdict.outcome + N_WORDS * self.verdict.degraded])
        return p - out

    cpdef bytes json(self, bint explain=False):
        """The decision as a JSON object, UTF-8. With `explain`, the features too where they were kept."""
        return self._text(explain, False)

    cpdef bytes msgpack(self, bint explain=False):
        """The decision as a MessagePack map: the same keys and values as json()."""
        return self._text(explain, True)

    cdef bytes _text(self, bint explain, bint packed):
        cdef char small[1024]
        cdef char *out = small
        cdef Py_ssize_t room = self.texts.pack_room if packed else self.texts.json_room
        cdef bytes text
        if room > <Py_ssize_t>sizeof(small):
            out = <char *>PyMem_Malloc(room)
            if out == NULL:
                raise MemoryError()
        text = out[:self.write_msgpack(out) if packed else self.write_json(out)]
        if out != small:
            PyMem_Free(out)
        if not explain or self.row is None:
            return text
        outcome = <bytes>(_PACK_OUTCOMES if packed else _JSON_OUTCOMES)[self.verdict.outcome + N_WORDS * self.verdict.degraded]
        text = text[:len(text) - len(outcome)]
        features = {n: v.isoformat() if type(v) is Timestamp else v for n, v in self.features.items()}
        if not packed:
            encode = msgspec.json.encode
            return b"".join((text, b',"features":', encode(features), b',"statuses":', encode(self.statuses), outcome))
        encode = msgspec.msgpack.encode
        # JSON knows no infinities: there they are null, as here.
        features = {n: None if type(v) is float and not isfinite(v) else v for n, v in features.items()}
        return b"".join((b"\x8b" if self.verdict.degraded else b"\x8a", text[1:], b"\xa8features", encode(features), b"\xa8statuses", encode(self.statuses), outcome))

    def __repr__(self):
        shown = {k: getattr(self, k) for k in ("id", "action", "score", "reasons", "model", "model_version", "arms", "outcome")}
        if self.verdict.degraded:
            shown["degraded"] = True
        return "Decision(" + ", ".join(f"{k}={v!r}" for k, v in shown.items()) + ")"

    def as_dict(self):
        """The fields of the JSON form as a dict."""
        return msgspec.json.decode(self.json(self.row is not None))


cdef inline char *copied(char *p, bytes part) noexcept:
    memcpy(p, PyBytes_AS_STRING(part), PyBytes_GET_SIZE(part))
    return p + PyBytes_GET_SIZE(part)


cdef inline int pack_number(char *out, double value, bint present) noexcept:
    cdef uint64_t bits
    cdef int i
    if not present or not isfinite(value):
        out[0] = <char>0xc0
        return 1
    memcpy(&bits, &value, 8)
    out[0] = <char>0xcb
    for i in range(8):
        out[1 + i] = <char>(bits >> (56 - 8 * i) & 255)
    return 9


cdef int number_text(double value, char *out) noexcept:
    """The shortest decimal of a number into PS_SHORTEST_ROOM bytes; `null` for what is not finite."""
    return ps_shortest(value, out)


def shortest(double value):
    """repr(value) as bytes, `null` for what is not finite: for the tests of shortest.h."""
    cdef char text[PS_SHORTEST_ROOM]
    return text[:ps_shortest(value, text)]


cdef object slot_value(ps_slot slot, uint8_t status, str type, const char *strings):
    """A slot as a Python value; None where it holds none."""
    if status & 7 != PS_PRESENT:
        return None
    if type == "float64" or status & PS_WIDE:
        return slot.f
    if type == "bool":
        return slot.i != 0
    if type == "timestamp":
        return Timestamp(slot.i)
    if type == "string":
        return strings[PS_STR_OFFSET(slot.u):PS_STR_OFFSET(slot.u) + PS_STR_LENGTH(slot.u)].decode()
    return slot.i


def value_of(bytes slot, int status, str type, bytes strings=b""):
    """One slot's 8 bytes as a Python value; None where the status says there is none."""
    return slot_value((<const ps_slot *>PyBytes_AS_STRING(slot))[0], <uint8_t>status, type, PyBytes_AS_STRING(strings))
