from libc.stdint cimport int8_t, int16_t, int64_t, uint8_t, uint64_t

from penstock._ext.row cimport ps_slot

cdef enum:
    MAX_EXPERIMENTS = 8

cdef enum Outcome:
    OUTCOME_OFF = 0
    OUTCOME_APPLIED = 1
    OUTCOME_DUPLICATE = 2
    OUTCOME_LATE = 3
    OUTCOME_QUARANTINED = 4
    N_OUTCOMES = 5


# What scoring one event leaves behind, before anything of it is a Python object.
ctypedef struct Verdict:
    double score
    uint64_t fired            # one bit per rule
    int16_t action
    int16_t model             # -1: none decided
    int16_t failed            # -1: nothing failed; else the index of the failure's text
    int8_t arms[MAX_EXPERIMENTS]
    uint8_t has_score
    uint8_t counted           # in actions, arms and models since start
    uint8_t degraded          # a view's value is INVALID, or the event was late or quarantined (S17)
    uint8_t outcome


cdef class DecisionTexts:
    """The words of one pipeline's decisions, as Python strings and as JSON."""
    cdef:
        readonly str pipeline
        readonly tuple actions
        readonly tuple reasons
        readonly tuple models          # (name, version)
        readonly tuple experiments
        readonly tuple arms            # one tuple per experiment
        readonly tuple failures
        readonly tuple features        # (name, type, slot)
        readonly object fallback
        tuple json_actions
        tuple json_reasons
        tuple json_models
        tuple json_arms                # one tuple per experiment: `"challenger":"tree"`, and null last
        tuple json_failures
        tuple pack_actions             # the same as MessagePack
        tuple pack_reasons
        tuple pack_models
        tuple pack_arms
        tuple pack_failures
        Py_ssize_t json_room           # bytes that write_json, write_msgpack take at the most
        Py_ssize_t pack_room
        dict reasons_of                # mask -> tuple


cdef class Decision:
    cdef:
        char _id[26]
        Verdict verdict
        DecisionTexts texts
        bytes row                      # slots, then statuses, of an explained decision; else None
        bytes strings                  # the row's arena

    @staticmethod
    cdef Decision new(DecisionTexts texts, const char *id, const Verdict *verdict)
    cdef Py_ssize_t write_json(self, char *out) noexcept
    cdef Py_ssize_t write_msgpack(self, char *out) noexcept
    cdef bytes _text(self, bint explain, bint packed)
    cpdef bytes json(self, bint explain=*)
    cpdef bytes msgpack(self, bint explain=*)


cdef class IdSource:
    """Ids of decisions: 26 characters, unique over nodes, sortable by time."""
    cdef:
        char node[11]
        char text[26]
        int64_t ms
        uint64_t sequence

    cdef void next(self, int64_t now_us, char *out) noexcept nogil


cdef object slot_value(ps_slot slot, uint8_t status, str type, const char *strings)


cdef enum:
    PS_SHORTEST_ROOM = 32

cdef int number_text(double value, char *out) noexcept
