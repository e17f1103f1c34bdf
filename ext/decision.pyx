"""Decisions (hot path): what scoring an event answers, its id, and its JSON.

What must stay true: a Decision holds no container of its own, so the garbage collector never sees it.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free
from libc.math cimport isfinite
from libc.string cimport memcpy

import os

import msgspec

from penstock.timestamp import Timestamp

from penstock._ext.row cimport (
    PS_AGED, PS_BOOL, PS_FLOAT64, PS_INT64, PS_PRESENT, PS_STRING, PS_STR_LENGTH, PS_STR_OFFSET, PS_TIMESTAMP, PS_WIDE,
)

cdef extern from "Python.h":
    char *PyOS_double_to_string(double value, char format, int precision, int flags, int *kind) except NULL

OUTCOMES = ("off", "applied", "duplicate", "late", "quarantined")
STATUSES = ("INVALID", "PRESENT", "NULL_VALUE", "NOT_FOUND", "OUTSIDE_MAX_AGE")
cdef tuple _OUTCOMES = OUTCOMES
cdef tuple _JSON_OUTCOMES = tuple(f',"outcome":"{o}"}}'.encode() for o in OUTCOMES)
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
        self.reasons_of = {0: ()}

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

    cpdef bytes json(self, bint explain=False):
        """The decision as a JSON object, UTF-8. With `explain`, the features too where they were kept."""
        cdef char buffer[1024]
        cdef bytes part
        cdef Py_ssize_t used = 0
        cdef DecisionTexts t = self.texts
        cdef int i, kind
        cdef char *number
        cdef uint64_t fired = self.verdict.fired
        cdef Py_ssize_t size
        if (fired or self.verdict.failed >= 0 or explain or len(t.experiments) > 2):
            return self._json_slowly(explain)
        memcpy(buffer, b'{"id":"', 7)
        memcpy(buffer + 7, self._id, 26)
        used = 33
        part = <bytes>t.json_actions[self.verdict.action]
        if PyBytes_GET_SIZE(part) > 256:
            return self._json_slowly(explain)
        memcpy(buffer + used, PyBytes_AS_STRING(part), PyBytes_GET_SIZE(part))
        used += PyBytes_GET_SIZE(part)
        used += write_number(buffer + used, self.verdict.score, self.verdict.has_score)
        memcpy(buffer + used, b',"reasons":[]', 13)
        used += 13
        part = <bytes>t.json_models[self.verdict.model if self.verdict.model >= 0 else len(t.models)]
        if PyBytes_GET_SIZE(part) > 256:
            return self._json_slowly(explain)
        memcpy(buffer + used, PyBytes_AS_STRING(part), PyBytes_GET_SIZE(part))
        used += PyBytes_GET_SIZE(part)
        memcpy(buffer + used, b',"arms":{', 9)
        used += 9
        for i in range(len(t.experiments)):
            if i:
                buffer[used] = b","
                used += 1
            arms = <tuple>t.json_arms[i]
            part = <bytes>arms[self.verdict.arms[i] if self.verdict.arms[i] >= 0 else len(arms) - 1]
            if PyBytes_GET_SIZE(part) > 128:
                return self._json_slowly(explain)
            memcpy(buffer + used, PyBytes_AS_STRING(part), PyBytes_GET_SIZE(part))
            used += PyBytes_GET_SIZE(part)
        buffer[used] = b"}"
        used += 1
        part = <bytes>_JSON_OUTCOMES[self.verdict.outcome]
        memcpy(buffer + used, PyBytes_AS_STRING(part), PyBytes_GET_SIZE(part))
        used += PyBytes_GET_SIZE(part)
        return buffer[:used]

    def _json_slowly(self, explain):
        cdef DecisionTexts t = self.texts
        cdef int i
        cdef char number[40]
        cdef int size = write_number(number, self.verdict.score, self.verdict.has_score)
        reasons = [r for i, r in enumerate(t.json_reasons) if self.verdict.fired >> i & 1]
        if self.verdict.failed >= 0:
            reasons.append(t.json_failures[self.verdict.failed])
        arms = [a[self.verdict.arms[i]] if self.verdict.arms[i] >= 0 else a[len(a) - 1] for i, a in enumerate(t.json_arms)]
        parts = [
            b'{"id":"', self._id[:26], t.json_actions[self.verdict.action], number[:size], b',"reasons":[',
            b",".join(reasons), b"]", t.json_models[self.verdict.model if self.verdict.model >= 0 else len(t.models)],
            b',"arms":{', b",".join(arms), b"}",
        ]
        if explain and self.row is not None:
            features = {n: v.isoformat() if type(v) is Timestamp else v for n, v in self.features.items()}
            parts += [b',"features":', msgspec.json.encode(features), b',"statuses":', msgspec.json.encode(self.statuses)]
        parts.append(_JSON_OUTCOMES[self.verdict.outcome])
        return b"".join(parts)

    def __repr__(self):
        shown = {k: getattr(self, k) for k in ("id", "action", "score", "reasons", "model", "model_version", "arms", "outcome")}
        return "Decision(" + ", ".join(f"{k}={v!r}" for k, v in shown.items()) + ")"

    def as_dict(self):
        """The fields of the JSON form as a dict."""
        return msgspec.json.decode(self.json(self.row is not None))


cdef int write_number(char *out, double value, bint present) except -1:
    """The shortest decimal that reads back as the same double; null where there is none."""
    cdef char *text
    cdef int size = 0
    if not present or not isfinite(value):
        memcpy(out, b"null", 4)
        return 4
    text = PyOS_double_to_string(value, b"r", 0, 2, NULL)
    while text[size]:
        out[size] = text[size]
        size += 1
    PyMem_Free(text)
    return size


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
