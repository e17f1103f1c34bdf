# steps.pxd: the arrays that a running engine walks over. See steps.pyx.

from libc.stdint cimport int8_t, int16_t, int64_t, uint8_t, uint32_t, uint64_t, uintptr_t

from penstock._ext.decision cimport DecisionTexts, Verdict
from penstock._ext.events cimport EventReader
from penstock._ext.expressions cimport ps_expression_api, ps_program
from penstock._ext.model cimport ps_model
from penstock._ext.row cimport ps_slot
from penstock._ext.split cimport ps_experiment, ps_split_api
from penstock._ext.windows cimport ps_arena, ps_key, ps_store, ps_store_api

cdef enum:
    MAX_KEYS = 16             # different keys of one event
    MAX_STORES = 16           # stores that one event updates
    MAX_COLUMNS = 64          # used columns of one store
    MAX_ARGUMENTS = 32        # of one function
    MAX_READS = 64            # views that one pipeline reads
    BLOCK = 256               # rows per slice of a batch
    MAX_ARMS = 64             # of one experiment
    OUT_OF_MEMORY = -1
    UNSCORED = -2
    LOG_REFUSED = -3


ctypedef uint8_t (*native_function)(const double *args_f, const int64_t *args_i, double *out_f,
                                    int64_t *out_i) noexcept nogil

# Where a key stands in the row, and how its text or integer is turned into the entity's type.
ctypedef struct KeyRef:
    int slot
    uint8_t is_int            # the slot's type
    uint8_t to_int            # the key's type

# A store that an event updates.
ctypedef struct Use:
    const ps_store_api *api
    ps_store *store
    int key
    int n_columns
    int *fields
    int n_where
    const ps_program **programs
    const ps_expression_api *expressions

ctypedef struct Default:
    int slot
    ps_slot value

# A view that a pipeline reads.
ctypedef struct Read:
    const ps_store_api *api
    ps_store *store
    uint32_t group
    int key
    int first
    int use                   # index of the event's own use of the same store and key, or -1
    uint8_t with_event        # include_request_event (S8)
    uint8_t strings           # some output is a string
    int n_outputs
    int n_defaults
    Default *defaults

ctypedef struct Function:
    native_function call      # NULL: a Python function
    int n_args
    int *args
    uint8_t *arg_types
    int slot
    uint8_t type

ctypedef struct Assign:
    const ps_experiment *experiment
    const ps_split_api *api
    int unit
    uint8_t unit_is_int
    int slot
    uint64_t *arms            # PS_STR of each arm's name in the arena's constants

ctypedef struct ModelRun:
    const ps_model *model
    int n_inputs
    int *inputs
    uint8_t *types
    int output
    int slot
    int index                 # in DecisionTexts.models
    int guard_experiment      # -1: always runs
    int guard_arm
    uint8_t decides
    uint8_t row_by_row        # a batch may round differently: one row at a time

ctypedef struct RuleRun:
    const ps_program *program
    const ps_expression_api *api
    int16_t action

ctypedef struct SourceC:
    int n_fields
    int time
    int n_uses
    Use *uses
    int n_keys
    KeyRef keys[MAX_KEYS]
    int64_t watermark
    int64_t lateness
    int64_t max_skew
    uint64_t outcomes[8]
    uint32_t applied          # since the last sweep
    uint32_t created          # entities, since the last sweep
    int n_strings             # fields that are strings, for the event log
    int *strings
    int log_schema            # number of the event's schema in the log

ctypedef struct PipeC:
    int n_slots
    int n_keys
    KeyRef keys[MAX_KEYS]
    int n_reads
    Read *reads
    int n_functions
    Function *functions
    int n_assigns
    Assign *assigns
    int n_models
    ModelRun *models
    int n_rules
    RuleRun *rules
    int score
    int16_t default_action
    int16_t fallback          # -1: a failure is an error
    int16_t degraded_action   # -1: models and rules decide a degraded event as any other
    int16_t degraded_failure  # its number among the failures' texts; behind it, per model, one for each null input
    int degraded              # slot that rules ask, or -1
    uint64_t degraded_count
    uint64_t failed_count
    uint64_t *action_counts
    uint64_t *model_counts
    uint64_t *arm_counts      # MAX_EXPERIMENTS x (64 arms + 1)
    int n_logged              # slots that a score record holds: features, and scores of models
    int *logged
    uint8_t *logged_string
    int log_schema
    uint32_t score_room       # bytes of a score record with short strings

# One row's keys, hashes and places: in time, in the log, and the versions of what it read.
ctypedef struct RowKeys:
    ps_key key[MAX_KEYS]
    uint64_t hash[MAX_KEYS]
    char text[MAX_KEYS][24]
    int64_t ingest_time
    int64_t sequence          # of its event in the log; -1: not logged
    uint64_t version[MAX_READS]


cdef class Source:
    cdef:
        SourceC c
        readonly EventReader reader
        readonly str name
        readonly int index
        bint has_id
        int64_t remember      # lateness + retry_window
        int64_t turned        # watermark at which the ids were last turned over
        dict seen             # event id -> Decision, or None where it was only ingested
        dict seen_before
        list keep

    cdef int add_key(self, int slot, bint is_int, bint to_int) except -1
    cdef dict home_of(self, object id)
    cdef void turn_over(self, int64_t watermark)
    cdef void judge(self, int64_t at, int64_t ingest_time, int64_t *watermark) noexcept nogil


cdef class ModelHold:
    cdef:
        int position              # in PipeC.models
        readonly object runtime
        int n_inputs
        int *inputs
        uint8_t *types

    cdef void put(self, ModelRun *run, uintptr_t address, int output, int index, bint row_by_row) noexcept


cdef class Pipe:
    cdef:
        PipeC c
        readonly Source source
        readonly str name
        readonly int index
        DecisionTexts texts
        tuple python_functions
        tuple slot_types
        object error              # what a Python function raised last
        object block              # of core.pyx: memory for events that are scored together
        list keep                 # replaced, never changed, once it runs

    cdef list swap_models(self, list models)


cdef class Rows:
    """Memory for a block of rows of one width: slots, statuses, strings, keys, verdicts."""
    cdef:
        int capacity
        int width
        ps_slot *slots
        uint8_t *status
        ps_arena arena
        char *keys_base       # where the arena stood when the keys were made
        RowKeys *keys
        Verdict *verdicts
        int n_inputs          # columns that matrix and scores have room for
        int n_outputs
        double *matrix
        double *scores
        int *picked

    cdef int widen(self, int inputs, int outputs) noexcept nogil


cdef void *checked(size_t count, size_t size) except NULL
