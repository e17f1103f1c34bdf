/* onnx_session.c (hot path): ONNX Runtime sessions through the wheel's C API; see onnx_session.h.
 *
 * A call's tensors (our buffers, wrapped once as OrtValues, the output included) are kept in a small lock-free pool, so
 * a single row costs a copy in, OrtApi.Run, and a copy out. MLAS may pick another kernel for a batch than for a row;
 * a row must not score differently in score() and score_batch(), so rows run one at a time unless the model asks for
 * batches.
 */
#include "onnx_session.h"

#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- The part of the C API that is used, by place in the table ---- */

typedef struct OrtStatus OrtStatus;
typedef struct OrtEnv OrtEnv;
typedef struct OrtSession OrtSession;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtRunOptions OrtRunOptions;
typedef struct OrtValue OrtValue;
typedef struct OrtTypeInfo OrtTypeInfo;
typedef struct OrtTensorInfo OrtTensorInfo;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtAllocator OrtAllocator;
typedef struct OrtModelMetadata OrtModelMetadata;

typedef struct {
    const void *(*get_api)(uint32_t version);
    const char *(*get_version)(void);
} ort_api_base;

enum {
    SLOT_ERROR_CODE = 1,
    SLOT_ERROR_MESSAGE = 2,
    SLOT_CREATE_ENV = 3,
    SLOT_CREATE_SESSION = 7,
    SLOT_CREATE_SESSION_FROM_ARRAY = 8,
    SLOT_RUN = 9,
    SLOT_CREATE_SESSION_OPTIONS = 10,
    SLOT_SET_EXECUTION_MODE = 13,
    SLOT_DISABLE_MEM_PATTERN = 17,
    SLOT_DISABLE_CPU_ARENA = 19,
    SLOT_SET_LOG_SEVERITY = 22,
    SLOT_SET_INTRA_OP_THREADS = 24,
    SLOT_SET_INTER_OP_THREADS = 25,
    SLOT_INPUT_COUNT = 30,
    SLOT_OUTPUT_COUNT = 31,
    SLOT_INPUT_TYPE = 33,
    SLOT_OUTPUT_TYPE = 34,
    SLOT_INPUT_NAME = 36,
    SLOT_OUTPUT_NAME = 37,
    SLOT_CREATE_TENSOR = 48,
    SLOT_CREATE_TENSOR_WITH_DATA = 49,
    SLOT_TENSOR_DATA = 51,
    SLOT_STRINGS_LENGTH = 53,
    SLOT_STRINGS_CONTENT = 54,
    SLOT_CAST_TO_TENSOR_INFO = 55,
    SLOT_ONNX_TYPE = 56,
    SLOT_ELEMENT_TYPE = 60,
    SLOT_DIMENSION_COUNT = 61,
    SLOT_DIMENSIONS = 62,
    SLOT_TENSOR_TYPE_AND_SHAPE = 65,
    SLOT_CREATE_CPU_MEMORY_INFO = 69,
    SLOT_ALLOCATOR_FREE = 76,
    SLOT_DEFAULT_ALLOCATOR = 78,
    SLOT_RELEASE_STATUS = 93,
    SLOT_RELEASE_SESSION = 95,
    SLOT_RELEASE_VALUE = 96,
    SLOT_RELEASE_TYPE_INFO = 98,
    SLOT_RELEASE_TENSOR_INFO = 99,
    SLOT_RELEASE_SESSION_OPTIONS = 100,
    SLOT_MODEL_METADATA = 111,
    SLOT_METADATA_LOOKUP = 116,
    SLOT_RELEASE_METADATA = 118,
    SLOT_ADD_CONFIG_ENTRY = 130,
    SLOT_STRING_BUFFER = 252, /* since 1.15 */
};

/* Process-wide and set once: ONNX Runtime wants one environment per process. */
static struct {
    void *const *table;
    const char *version;
    OrtEnv *env;
    OrtMemoryInfo *cpu;
    OrtAllocator *allocator;

    const char *(*error_message)(const OrtStatus *);
    void (*release_status)(OrtStatus *);
    void (*release_value)(OrtValue *);
    OrtStatus *(*run)(OrtSession *, const OrtRunOptions *, const char *const *, const OrtValue *const *, size_t,
                      const char *const *, size_t, OrtValue **);
    OrtStatus *(*create_tensor)(const OrtMemoryInfo *, void *, size_t, const int64_t *, size_t, int32_t, OrtValue **);
} ort;
static pthread_mutex_t ort_lock = PTHREAD_MUTEX_INITIALIZER;

#define ORT_CALL(slot, ...) ((OrtStatus * (*)(__VA_ARGS__)) ort.table[slot])
#define ORT_VOID(slot, ...) ((void (*)(__VA_ARGS__)) ort.table[slot])

/* Copies the status text and releases it; true where there was one. */
static int failed(OrtStatus *status, const char *doing, char *error) {
    if (status == NULL) return 0;
    snprintf(error, PS_ONNX_ERROR_BYTES, "%s: %s", doing, ort.error_message(status));
    ort.release_status(status);
    return 1;
}

const char *ps_onnx_open_library(const char *path, uint32_t api_version, char *error) {
    const char *version = NULL;
    pthread_mutex_lock(&ort_lock);
    if (ort.env != NULL) {
        version = ort.version;
        goto done;
    }
    /* Local: the Python package links a second copy of the runtime, whose symbols must not meet these. */
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        snprintf(error, PS_ONNX_ERROR_BYTES, "%s", dlerror());
        goto done;
    }
    const ort_api_base *(*get_base)(void) = (const ort_api_base *(*)(void))dlsym(library, "OrtGetApiBase");
    if (get_base == NULL) {
        snprintf(error, PS_ONNX_ERROR_BYTES, "%s exports no OrtGetApiBase", path);
        goto done;
    }
    const ort_api_base *base = get_base();
    ort.table = (void *const *)base->get_api(api_version);
    if (ort.table == NULL) {
        snprintf(error, PS_ONNX_ERROR_BYTES, "ONNX Runtime %s has no C API version %u (1.%u or newer is needed)",
                 base->get_version(), api_version, api_version);
        goto done;
    }
    ort.error_message = (const char *(*)(const OrtStatus *))ort.table[SLOT_ERROR_MESSAGE];
    ort.release_status = (void (*)(OrtStatus *))ort.table[SLOT_RELEASE_STATUS];
    ort.release_value = (void (*)(OrtValue *))ort.table[SLOT_RELEASE_VALUE];
    ort.run = (OrtStatus * (*)(OrtSession *, const OrtRunOptions *, const char *const *, const OrtValue *const *, size_t,
                               const char *const *, size_t, OrtValue **)) ort.table[SLOT_RUN];
    ort.create_tensor = (OrtStatus * (*)(const OrtMemoryInfo *, void *, size_t, const int64_t *, size_t, int32_t,
                                         OrtValue **)) ort.table[SLOT_CREATE_TENSOR_WITH_DATA];
    OrtEnv *env = NULL;
    /* Severity 3 is ERROR: probing for devices prints warnings below that. */
    if (failed(ORT_CALL(SLOT_CREATE_ENV, int, const char *, OrtEnv **)(3, "penstock", &env), "environment", error) ||
        failed(ORT_CALL(SLOT_CREATE_CPU_MEMORY_INFO, int, int, OrtMemoryInfo **)(0, 0, &ort.cpu), "memory info", error) ||
        failed(ORT_CALL(SLOT_DEFAULT_ALLOCATOR, OrtAllocator **)(&ort.allocator), "allocator", error))
        goto done;
    ort.version = base->get_version();
    ort.env = env;
    version = ort.version;
done:
    pthread_mutex_unlock(&ort_lock);
    return version;
}

/* ---- A session ---- */

typedef struct {
    size_t rows, capacity;
    void **in_buffers; /* one per input */
    OrtValue **in;
    void *out_buffer;
    OrtValue *out;
} call;

#define POOL 16

struct ps_onnx {
    OrtSession *session;
    size_t n_in, n_out;
    ps_onnx_port *in, *out;
    const char **in_names;

    size_t n_inputs;  /* columns of x used */
    uint32_t *gather; /* tensor column -> column of x */
    int identity;     /* gather[c] == c */
    int batched;
    size_t chosen; /* output */
    size_t n_outputs;
    int own_output; /* the output goes into our buffer; not where its shape is another than the file declares */
    size_t out_rank;
    int64_t out_dims[PS_ONNX_MAX_RANK]; /* [0] is the row count, set per call */
    double row_seconds;

    _Atomic(call *) pool[POOL];
    pthread_mutex_t error_lock;
    char error[PS_ONNX_ERROR_BYTES];
};

static size_t element_bytes(int32_t type) {
    switch (type) {
    case PS_ONNX_FLOAT:
    case PS_ONNX_INT32: return 4;
    case PS_ONNX_INT64:
    case PS_ONNX_DOUBLE: return 8;
    case PS_ONNX_BOOL: return 1;
    default: return 0;
    }
}

static int read_port(ps_onnx *self, size_t index, int is_input, ps_onnx_port *port, char *error) {
    OrtTypeInfo *info = NULL;
    const OrtTensorInfo *tensor = NULL;
    char *name = NULL;
    int ok = 0;

    if (failed(ORT_CALL(is_input ? SLOT_INPUT_NAME : SLOT_OUTPUT_NAME, const OrtSession *, size_t, OrtAllocator *,
                        char **)(self->session, index, ort.allocator, &name), "name", error))
        return 0;
    port->name = strdup(name);
    OrtStatus *freed = ORT_CALL(SLOT_ALLOCATOR_FREE, OrtAllocator *, void *)(ort.allocator, name);
    if (freed != NULL) ort.release_status(freed);
    if (port->name == NULL) return 0;
    if (failed(ORT_CALL(is_input ? SLOT_INPUT_TYPE : SLOT_OUTPUT_TYPE, const OrtSession *, size_t,
                        OrtTypeInfo **)(self->session, index, &info), "type", error))
        return 0;
    if (failed(ORT_CALL(SLOT_ONNX_TYPE, const OrtTypeInfo *, int32_t *)(info, &port->kind), "kind", error)) goto done;
    port->type = PS_ONNX_NOT_TENSOR;
    if (port->kind == PS_ONNX_KIND_TENSOR) {
        if (failed(ORT_CALL(SLOT_CAST_TO_TENSOR_INFO, const OrtTypeInfo *, const OrtTensorInfo **)(info, &tensor),
                   "tensor", error) ||
            failed(ORT_CALL(SLOT_ELEMENT_TYPE, const OrtTensorInfo *, int32_t *)(tensor, &port->type), "element type",
                   error) ||
            failed(ORT_CALL(SLOT_DIMENSION_COUNT, const OrtTensorInfo *, size_t *)(tensor, &port->rank), "rank", error))
            goto done;
        if (port->rank <= PS_ONNX_MAX_RANK &&
            failed(ORT_CALL(SLOT_DIMENSIONS, const OrtTensorInfo *, int64_t *, size_t)(tensor, port->dims, port->rank),
                   "dimensions", error))
            goto done;
    }
    ok = 1;
done:
    ORT_VOID(SLOT_RELEASE_TYPE_INFO, OrtTypeInfo *)(info);
    return ok;
}

static OrtSessionOptions *session_options(const ps_onnx_options *options, char *error) {
    OrtSessionOptions *o = NULL;
    if (failed(ORT_CALL(SLOT_CREATE_SESSION_OPTIONS, OrtSessionOptions **)(&o), "options", error)) return NULL;
    static const char *const config[][2] = {
        {"session.intra_op.allow_spinning", "0"},
        {"session.inter_op.allow_spinning", "0"},
    };
    int bad = failed(ORT_CALL(SLOT_SET_INTRA_OP_THREADS, OrtSessionOptions *, int)(o, 1), "intra_op", error) ||
              failed(ORT_CALL(SLOT_SET_INTER_OP_THREADS, OrtSessionOptions *, int)(o, 1), "inter_op", error) ||
              failed(ORT_CALL(SLOT_SET_EXECUTION_MODE, OrtSessionOptions *, int)(o, 0), "sequential", error) ||
              failed(ORT_CALL(SLOT_SET_LOG_SEVERITY, OrtSessionOptions *, int)(o, 3), "log level", error);
    for (size_t i = 0; !bad && i < sizeof config / sizeof *config; i++)
        bad = failed(ORT_CALL(SLOT_ADD_CONFIG_ENTRY, OrtSessionOptions *, const char *, const char *)(
                         o, config[i][0], config[i][1]), config[i][0], error);
    if (!bad && options->external_folder != NULL)
        bad = failed(ORT_CALL(SLOT_ADD_CONFIG_ENTRY, OrtSessionOptions *, const char *, const char *)(
                         o, "session.model_external_initializers_file_folder_path", options->external_folder),
                     "external tensors", error);
    if (!bad && !options->arena)
        bad = failed(ORT_CALL(SLOT_DISABLE_CPU_ARENA, OrtSessionOptions *)(o), "arena", error);
    if (!bad && !options->mem_pattern)
        bad = failed(ORT_CALL(SLOT_DISABLE_MEM_PATTERN, OrtSessionOptions *)(o), "memory pattern", error);
    if (bad) {
        ORT_VOID(SLOT_RELEASE_SESSION_OPTIONS, OrtSessionOptions *)(o);
        return NULL;
    }
    return o;
}

ps_onnx *ps_onnx_create(const char *path, const void *bytes, size_t length, const ps_onnx_options *options,
                        char *error) {
    snprintf(error, PS_ONNX_ERROR_BYTES, "out of memory");
    ps_onnx *self = calloc(1, sizeof *self);
    if (self == NULL) return NULL;
    pthread_mutex_init(&self->error_lock, NULL);
    OrtSessionOptions *o = session_options(options, error);
    if (o == NULL) goto fail;
    int bad;
    if (bytes == NULL)
        bad = failed(ORT_CALL(SLOT_CREATE_SESSION, const OrtEnv *, const char *, const OrtSessionOptions *,
                              OrtSession **)(ort.env, path, o, &self->session), "ONNX Runtime", error);
    else
        bad = failed(ORT_CALL(SLOT_CREATE_SESSION_FROM_ARRAY, const OrtEnv *, const void *, size_t,
                              const OrtSessionOptions *, OrtSession **)(ort.env, bytes, length, o, &self->session),
                     "ONNX Runtime", error);
    ORT_VOID(SLOT_RELEASE_SESSION_OPTIONS, OrtSessionOptions *)(o);
    if (bad) goto fail;
    size_t n_in = 0, n_out = 0;
    if (failed(ORT_CALL(SLOT_INPUT_COUNT, const OrtSession *, size_t *)(self->session, &n_in), "inputs", error) ||
        failed(ORT_CALL(SLOT_OUTPUT_COUNT, const OrtSession *, size_t *)(self->session, &n_out), "outputs", error))
        goto fail;
    self->in = calloc(n_in + 1, sizeof *self->in);
    self->out = calloc(n_out + 1, sizeof *self->out);
    self->in_names = calloc(n_in + 1, sizeof *self->in_names);
    if (self->in == NULL || self->out == NULL || self->in_names == NULL) goto fail;
    self->n_in = n_in;
    self->n_out = n_out;
    for (size_t i = 0; i < n_in; i++) {
        if (!read_port(self, i, 1, &self->in[i], error)) goto fail;
        self->in_names[i] = self->in[i].name;
    }
    for (size_t i = 0; i < n_out; i++)
        if (!read_port(self, i, 0, &self->out[i], error)) goto fail;
    return self;
fail:
    ps_onnx_destroy(self);
    return NULL;
}

static void free_values(const ps_onnx *self, call *c) {
    for (size_t i = 0; i < self->n_in; i++) {
        if (c->in != NULL && c->in[i] != NULL) ort.release_value(c->in[i]);
        if (c->in != NULL) c->in[i] = NULL;
    }
    if (c->out != NULL) ort.release_value(c->out);
    c->out = NULL;
    c->rows = 0;
}

static void free_call(const ps_onnx *self, call *c) {
    if (c == NULL) return;
    free_values(self, c);
    for (size_t i = 0; c->in_buffers != NULL && i < self->n_in; i++) free(c->in_buffers[i]);
    free(c->in_buffers);
    free(c->in);
    free(c->out_buffer);
    free(c);
}

void ps_onnx_destroy(ps_onnx *self) {
    if (self == NULL) return;
    for (size_t i = 0; i < POOL; i++) free_call(self, atomic_exchange(&self->pool[i], NULL));
    if (self->session != NULL) ORT_VOID(SLOT_RELEASE_SESSION, OrtSession *)(self->session);
    for (size_t i = 0; i < self->n_in; i++) free(self->in[i].name);
    for (size_t i = 0; i < self->n_out; i++) free(self->out[i].name);
    free(self->in);
    free(self->out);
    free(self->in_names);
    free(self->gather);
    pthread_mutex_destroy(&self->error_lock);
    free(self);
}

size_t ps_onnx_input_count(const ps_onnx *self) { return self->n_in; }
size_t ps_onnx_output_count(const ps_onnx *self) { return self->n_out; }
const ps_onnx_port *ps_onnx_input(const ps_onnx *self, size_t index) { return &self->in[index]; }
const ps_onnx_port *ps_onnx_output(const ps_onnx *self, size_t index) { return &self->out[index]; }
size_t ps_onnx_n_outputs(const ps_onnx *self) { return self->n_outputs; }
double ps_onnx_row_seconds(const ps_onnx *self) { return self->row_seconds; }

char *ps_onnx_metadata(const ps_onnx *self, const char *key) {
    OrtModelMetadata *metadata = NULL;
    char *value = NULL, *copy = NULL, error[PS_ONNX_ERROR_BYTES];
    if (failed(ORT_CALL(SLOT_MODEL_METADATA, const OrtSession *, OrtModelMetadata **)(self->session, &metadata),
               "metadata", error))
        return NULL;
    if (!failed(ORT_CALL(SLOT_METADATA_LOOKUP, const OrtModelMetadata *, OrtAllocator *, const char *,
                         char **)(metadata, ort.allocator, key, &value), "metadata", error) && value != NULL) {
        copy = strdup(value);
        OrtStatus *freed = ORT_CALL(SLOT_ALLOCATOR_FREE, OrtAllocator *, void *)(ort.allocator, value);
        if (freed != NULL) ort.release_status(freed);
    }
    ORT_VOID(SLOT_RELEASE_METADATA, OrtModelMetadata *)(metadata);
    return copy;
}

/* ---- Calls ---- */

/* Makes c fit for this many rows. with_output: also wrap our own output buffer (its shape must be known). */
static int fit(const ps_onnx *self, call *c, size_t rows, int with_output, char *error) {
    if (c->rows == rows) return 1;
    free_values(self, c);
    if (rows > c->capacity) {
        c->capacity = 0;
        for (size_t i = 0; i < self->n_in; i++) {
            size_t bytes = rows * self->in[i].columns * element_bytes(self->in[i].type);
            free(c->in_buffers[i]);
            c->in_buffers[i] = aligned_alloc(64, (bytes + 63) / 64 * 64 + 64);
            if (c->in_buffers[i] == NULL) return 0;
        }
        size_t bytes = rows * self->n_outputs * 8;
        free(c->out_buffer);
        c->out_buffer = aligned_alloc(64, (bytes + 63) / 64 * 64 + 64);
        if (c->out_buffer == NULL) return 0;
        c->capacity = rows;
    }
    for (size_t i = 0; i < self->n_in; i++) {
        const ps_onnx_port *port = &self->in[i];
        int64_t dims[2] = {(int64_t)rows, (int64_t)port->columns};
        if (failed(ort.create_tensor(ort.cpu, c->in_buffers[i], rows * port->columns * element_bytes(port->type), dims,
                                     port->rank, port->type, &c->in[i]), "input tensor", error))
            return 0;
    }
    if (with_output && self->own_output) {
        const ps_onnx_port *port = &self->out[self->chosen];
        int64_t dims[PS_ONNX_MAX_RANK];
        memcpy(dims, self->out_dims, sizeof dims);
        dims[0] = (int64_t)rows;
        if (failed(ort.create_tensor(ort.cpu, c->out_buffer, rows * self->n_outputs * element_bytes(port->type), dims,
                                     self->out_rank, port->type, &c->out), "output tensor", error))
            return 0;
    }
    c->rows = rows;
    return 1;
}

static call *new_call(const ps_onnx *self) {
    call *c = calloc(1, sizeof *c);
    if (c == NULL) return NULL;
    c->in_buffers = calloc(self->n_in + 1, sizeof *c->in_buffers);
    c->in = calloc(self->n_in + 1, sizeof *c->in);
    if (c->in_buffers == NULL || c->in == NULL) {
        free_call(self, c);
        return NULL;
    }
    return c;
}

/* The first slot serves single rows, so that batches do not make its tensors anew. */
static call *take(ps_onnx *self, size_t rows) {
    for (size_t i = rows == 1 ? 0 : 1; i < POOL; i++) {
        if (atomic_load_explicit(&self->pool[i], memory_order_relaxed) == NULL) continue;
        call *c = atomic_exchange_explicit(&self->pool[i], NULL, memory_order_acquire);
        if (c != NULL) return c;
    }
    return new_call(self);
}

static void give(ps_onnx *self, call *c) {
    for (size_t i = c->rows == 1 ? 0 : 1; i < POOL; i++) {
        call *empty = NULL;
        if (atomic_compare_exchange_strong_explicit(&self->pool[i], &empty, c, memory_order_release,
                                                    memory_order_relaxed))
            return;
    }
    free_call(self, c);
}

/* One column of one input. Integers beyond the type's range and nulls have no value there: 0. */
#define COPY_IN(T, CHECK)                                                     \
    {                                                                         \
        T *to = (T *)c->in_buffers[i];                                        \
        for (size_t r = 0; r < rows; r++) {                                   \
            const double *from = x + r * stride;                              \
            for (size_t k = 0; k < width; k++) {                              \
                double v = from[columns[k]];                                  \
                if (!(CHECK)) { *bad = (uint32_t)i; return 0; }               \
                *to++ = (T)v;                                                 \
            }                                                                 \
        }                                                                     \
    }

static int copy_in(const ps_onnx *self, call *c, const double *x, size_t rows, size_t stride, uint32_t *bad) {
    const uint32_t *columns = self->gather;
    for (size_t i = 0; i < self->n_in; i++) {
        size_t width = self->in[i].columns;
        switch (self->in[i].type) {
        case PS_ONNX_FLOAT:
            if (self->identity) {
                float *to = (float *)c->in_buffers[i];
                const double *from = x + (columns - self->gather);
                for (size_t r = 0; r < rows; r++, from += stride, to += width)
                    for (size_t k = 0; k < width; k++) to[k] = (float)from[k];
            } else
                COPY_IN(float, 1)
            break;
        case PS_ONNX_DOUBLE: COPY_IN(double, 1) break;
        case PS_ONNX_INT64: COPY_IN(int64_t, v >= -9223372036854775808.0 && v < 9223372036854775808.0) break;
        case PS_ONNX_INT32: COPY_IN(int32_t, v >= -2147483648.0 && v <= 2147483647.0) break;
        case PS_ONNX_BOOL: COPY_IN(uint8_t, v == 0.0 || v == 1.0) break;
        default: *bad = (uint32_t)i; return 0;
        }
        columns += width;
    }
    return 1;
}

#define COPY_OUT(T) for (size_t k = 0; k < n; k++) out[k] = (double)((const T *)from)[k]

static void copy_out(int32_t type, const void *from, size_t n, double *out) {
    switch (type) {
    case PS_ONNX_FLOAT: COPY_OUT(float); break;
    case PS_ONNX_DOUBLE: COPY_OUT(double); break;
    case PS_ONNX_INT64: COPY_OUT(int64_t); break;
    case PS_ONNX_INT32: COPY_OUT(int32_t); break;
    case PS_ONNX_BOOL: COPY_OUT(uint8_t); break;
    }
}

static void set_error(ps_onnx *self, const char *text) {
    pthread_mutex_lock(&self->error_lock);
    snprintf(self->error, sizeof self->error, "%s", text);
    pthread_mutex_unlock(&self->error_lock);
}

void ps_onnx_last_error(ps_onnx *self, char *error) {
    pthread_mutex_lock(&self->error_lock);
    memcpy(error, self->error, sizeof self->error);
    pthread_mutex_unlock(&self->error_lock);
}

/* An OrtStatus is rare: keep its text (and the room for it) out of the hot function. */
static __attribute__((noinline, cold)) int run_failed(ps_onnx *self, OrtStatus *status) {
    char error[PS_ONNX_ERROR_BYTES];
    failed(status, "ONNX Runtime", error);
    set_error(self, error);
    return 2;
}

static __attribute__((noinline, cold)) int null_in_integer(ps_onnx *self, uint32_t input) {
    char error[PS_ONNX_ERROR_BYTES];
    const ps_onnx_port *port = &self->in[input];
    const char *type = port->type == PS_ONNX_INT64 ? "int64" : port->type == PS_ONNX_INT32 ? "int32" : "bool";
    snprintf(error, sizeof error, "input %s is %s: a null, or a value out of its range, cannot be given to it",
             port->name, type);
    set_error(self, error);
    return 1;
}

static __attribute__((noinline, cold)) int fit_slow(ps_onnx *self, call *c, size_t rows) {
    char error[PS_ONNX_ERROR_BYTES] = "out of memory";
    if (fit(self, c, rows, 1, error)) return 1;
    set_error(self, error);
    return 0;
}

/* A run whose output ONNX Runtime allocates: given ours, it would refuse any shape that the file does not declare. */
static __attribute__((noinline)) int run_allocating(ps_onnx *self, call *c, size_t rows, double *out) {
    const ps_onnx_port *port = &self->out[self->chosen];
    OrtValue *value = NULL;
    OrtTensorInfo *info = NULL;
    void *data = NULL;
    size_t rank = 0, count = 1;
    int64_t dims[PS_ONNX_MAX_RANK] = {0};
    OrtStatus *status = ort.run(self->session, NULL, self->in_names, (const OrtValue *const *)c->in, self->n_in,
                                (const char *const *)&port->name, 1, &value);
    if (status == NULL)
        status = ORT_CALL(SLOT_TENSOR_TYPE_AND_SHAPE, const OrtValue *, OrtTensorInfo **)(value, &info);
    if (status == NULL) status = ORT_CALL(SLOT_DIMENSION_COUNT, const OrtTensorInfo *, size_t *)(info, &rank);
    if (status == NULL && rank <= PS_ONNX_MAX_RANK)
        status = ORT_CALL(SLOT_DIMENSIONS, const OrtTensorInfo *, int64_t *, size_t)(info, dims, rank);
    if (status == NULL) status = ORT_CALL(SLOT_TENSOR_DATA, OrtValue *, void **)(value, &data);
    for (size_t d = 0; d < rank && d < PS_ONNX_MAX_RANK; d++) count *= (size_t)dims[d];
    int code = status == NULL ? 0 : run_failed(self, status);
    if (code == 0 && (rank > PS_ONNX_MAX_RANK || count != rows * self->n_outputs)) {
        char error[PS_ONNX_ERROR_BYTES];
        snprintf(error, sizeof error, "output %s has %zu values for %zu rows, %zu were expected", port->name, count, rows,
                 rows * self->n_outputs);
        set_error(self, error);
        code = 2;
    }
    if (code == 0) copy_out(port->type, data, rows * self->n_outputs, out);
    if (info != NULL) ORT_VOID(SLOT_RELEASE_TENSOR_INFO, OrtTensorInfo *)(info);
    if (value != NULL) ort.release_value(value);
    return code;
}

static int run_rows(ps_onnx *self, call *c, const double *x, size_t rows, size_t stride, double *out) {
    uint32_t bad = 0;
    if (c->rows != rows && !fit_slow(self, c, rows)) return 2;
    if (!copy_in(self, c, x, rows, stride, &bad)) return null_in_integer(self, bad);
    const ps_onnx_port *port = &self->out[self->chosen];
    if (!self->own_output) return run_allocating(self, c, rows, out);
    OrtStatus *status = ort.run(self->session, NULL, self->in_names, (const OrtValue *const *)c->in, self->n_in,
                                (const char *const *)&port->name, 1, &c->out);
    if (status != NULL) return run_failed(self, status);
    copy_out(port->type, c->out_buffer, rows * self->n_outputs, out);
    return 0;
}

int ps_onnx_predict(const ps_model *model, const double *x, size_t rows, size_t stride, double *out) {
    ps_onnx *self = (ps_onnx *)model->state;
    if (rows == 0) return 0;
    size_t step = !self->batched ? 1 : rows < PS_ONNX_CHUNK ? rows : PS_ONNX_CHUNK;
    call *c = take(self, step);
    if (c == NULL) {
        set_error(self, "out of memory");
        return 2;
    }
    int code = 0;
    for (size_t r = 0; r < rows && code == 0; r += step) {
        size_t n = rows - r < step ? rows - r : step;
        code = run_rows(self, c, x + r * stride, n, stride, out + r * self->n_outputs);
    }
    if (code == 0) give(self, c);
    else free_call(self, c); /* after a failure nothing is assumed about its tensors */
    return code;
}

/* Runs rows of zeros with ONNX Runtime's own output, to learn the output's shape. */
static int output_shape(ps_onnx *self, size_t rows, size_t *rank, int64_t *dims, char *error) {
    int ok = 0;
    OrtValue *value = NULL;
    OrtTensorInfo *info = NULL;
    call *c = new_call(self);
    if (c == NULL || !fit(self, c, rows, 0, error)) goto done;
    for (size_t i = 0; i < self->n_in; i++)
        memset(c->in_buffers[i], 0, rows * self->in[i].columns * element_bytes(self->in[i].type));
    if (failed(ort.run(self->session, NULL, self->in_names, (const OrtValue *const *)c->in, self->n_in,
                       (const char *const *)&self->out[self->chosen].name, 1, &value), "a row of zeros", error))
        goto done;
    if (failed(ORT_CALL(SLOT_TENSOR_TYPE_AND_SHAPE, const OrtValue *, OrtTensorInfo **)(value, &info), "shape", error) ||
        failed(ORT_CALL(SLOT_DIMENSION_COUNT, const OrtTensorInfo *, size_t *)(info, rank), "rank", error))
        goto done;
    if (*rank == 0 || *rank > PS_ONNX_MAX_RANK) {
        snprintf(error, PS_ONNX_ERROR_BYTES, "output %s has %zu dimensions; expected rows x scores",
                 self->out[self->chosen].name, *rank);
        goto done;
    }
    if (failed(ORT_CALL(SLOT_DIMENSIONS, const OrtTensorInfo *, int64_t *, size_t)(info, dims, *rank), "dims", error))
        goto done;
    if (dims[0] != (int64_t)rows) {
        snprintf(error, PS_ONNX_ERROR_BYTES, "output %s has %lld rows for %zu rows in; expected one row each",
                 self->out[self->chosen].name, (long long)dims[0], rows);
        goto done;
    }
    ok = 1;
done:
    if (info != NULL) ORT_VOID(SLOT_RELEASE_TENSOR_INFO, OrtTensorInfo *)(info);
    if (value != NULL) ort.release_value(value);
    free_call(self, c);
    return ok;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

int ps_onnx_bind(ps_onnx *self, const size_t *columns, const uint32_t *gather, size_t output, int batched, char *error) {
    snprintf(error, PS_ONNX_ERROR_BYTES, "out of memory");
    self->n_inputs = 0;
    for (size_t i = 0; i < self->n_in; i++) {
        self->in[i].columns = columns[i];
        self->n_inputs += columns[i];
        if (self->in[i].dims[0] > 0) batched = 0; /* a fixed batch of 1 */
    }
    self->gather = calloc(self->n_inputs + 1, sizeof *self->gather);
    if (self->gather == NULL) return 0;
    self->identity = 1;
    for (size_t c = 0; c < self->n_inputs; c++) {
        self->gather[c] = gather[c];
        if (gather[c] != c) self->identity = 0;
    }
    self->chosen = output;
    self->batched = batched;
    if (!output_shape(self, 1, &self->out_rank, self->out_dims, error)) return 0;
    self->n_outputs = 1;
    for (size_t d = 1; d < self->out_rank; d++) self->n_outputs *= (size_t)self->out_dims[d];
    const ps_onnx_port *port = &self->out[output];
    self->own_output = port->rank == 0 || port->rank == self->out_rank; /* 0: it declares none */
    for (size_t d = 1; d < port->rank && self->own_output; d++)
        if (port->dims[d] >= 0 && port->dims[d] != self->out_dims[d]) self->own_output = 0;
    if (batched) {
        size_t rank = 0;
        int64_t dims[PS_ONNX_MAX_RANK];
        if (!output_shape(self, 2, &rank, dims, error)) return 0;
        if (rank != self->out_rank || memcmp(dims + 1, self->out_dims + 1, (rank - 1) * sizeof *dims) != 0) {
            snprintf(error, PS_ONNX_ERROR_BYTES, "output %s changes its shape with the number of rows",
                     self->out[output].name);
            return 0;
        }
    }

    /* Warm: the first runs allocate. The time of a row says whether the caller should release the GIL for it. */
    double *x = calloc(self->n_inputs + 1, sizeof *x), *out = calloc(self->n_outputs + 1, sizeof *out);
    ps_model model = {ps_onnx_predict, self, (uint32_t)self->n_inputs, (uint32_t)self->n_outputs};
    int code = x == NULL || out == NULL ? 2 : 0;
    self->row_seconds = 1e9;
    for (int i = 0; i < 3 && code == 0; i++) {
        double start = now();
        code = ps_onnx_predict(&model, x, 1, self->n_inputs, out);
        double took = now() - start;
        if (took < self->row_seconds) self->row_seconds = took;
    }
    free(x);
    free(out);
    if (code != 0) ps_onnx_last_error(self, error);
    return code == 0;
}

/* ---- Tensors as they are ---- */

struct ps_onnx_result {
    size_t n_in, n_out;
    OrtValue **in, **out;
    char **texts; /* BYTES outputs in their raw form */
};

void ps_onnx_result_free(ps_onnx_result *r) {
    if (r == NULL) return;
    for (size_t i = 0; i < r->n_in; i++)
        if (r->in[i] != NULL) ort.release_value(r->in[i]);
    for (size_t i = 0; i < r->n_out; i++) {
        if (r->out[i] != NULL) ort.release_value(r->out[i]);
        free(r->texts[i]);
    }
    free(r);
}

/* The status is released. INVALID_ARGUMENT is what ONNX Runtime says of a shape or a value that the graph cannot take. */
static __attribute__((noinline, cold)) int status_of(OrtStatus *status, const char *doing, char *error) {
    int code = ((int (*)(const OrtStatus *))ort.table[SLOT_ERROR_CODE])(status);
    failed(status, doing, error);
    return code == 2 ? 400 : 500;
}

/* A tensor of strings; its raw form has been checked against its count. */
static OrtStatus *string_tensor(const ps_tensor *t, OrtValue **value) {
    OrtStatus *status = ORT_CALL(SLOT_CREATE_TENSOR, OrtAllocator *, const int64_t *, size_t, int32_t, OrtValue **)(
        ort.allocator, t->dims, t->rank, PS_ONNX_STRING, value);
    const char *at = t->data;
    for (int64_t i = 0; status == NULL && i < t->count; i++) {
        uint32_t n;
        char *to = NULL;
        memcpy(&n, at, 4);
        status = ORT_CALL(SLOT_STRING_BUFFER, OrtValue *, size_t, size_t, char **)(*value, (size_t)i, n, &to);
        if (status == NULL && n) memcpy(to, at + 4, n);
        at += 4 + (size_t)n;
    }
    return status;
}

/* The raw form of an output of strings. */
static int string_output(const OrtValue *value, ps_tensor *t, char **text, char *error) {
    size_t total = 0, n = (size_t)t->count;
    OrtStatus *status = ORT_CALL(SLOT_STRINGS_LENGTH, const OrtValue *, size_t *)(value, &total);
    if (status != NULL) return status_of(status, "output strings", error);
    /* Read behind the room that the lengths will need, then moved together. */
    size_t *offsets = malloc(sizeof *offsets * (n + 1));
    char *content = malloc(total + 1), *to = malloc(total + 4 * n + 1);
    int code = 0;
    if (offsets == NULL || content == NULL || to == NULL) {
        snprintf(error, PS_ONNX_ERROR_BYTES, "out of memory");
        code = 503;
    } else if ((status = ORT_CALL(SLOT_STRINGS_CONTENT, const OrtValue *, void *, size_t, size_t *, size_t)(
                    value, content, total, offsets, n)) != NULL)
        code = status_of(status, "output strings", error);
    char *at = to;
    for (size_t i = 0; code == 0 && i < n; i++) {
        size_t length = (i + 1 < n ? offsets[i + 1] : total) - offsets[i];
        uint32_t short_length = (uint32_t)length;
        if (length > UINT32_MAX) {
            snprintf(error, PS_ONNX_ERROR_BYTES, "an output string of %zu bytes", length);
            code = 500;
            break;
        }
        memcpy(at, &short_length, 4);
        memcpy(at + 4, content + offsets[i], length);
        at += 4 + length;
    }
    free(offsets);
    free(content);
    if (code) {
        free(to);
        return code;
    }
    *text = to;
    t->data = to;
    t->bytes = (size_t)(at - to);
    return 0;
}

static int read_output(OrtValue *value, ps_tensor *t, char **text, const char *name, char *error) {
    OrtTensorInfo *info = NULL;
    size_t rank = 0;
    int32_t type = 0;
    void *data = NULL;
    if (value == NULL) {
        snprintf(error, PS_ONNX_ERROR_BYTES, "output %s has no value", name);
        return 500;
    }
    OrtStatus *status = ORT_CALL(SLOT_TENSOR_TYPE_AND_SHAPE, const OrtValue *, OrtTensorInfo **)(value, &info);
    if (status == NULL) status = ORT_CALL(SLOT_ELEMENT_TYPE, const OrtTensorInfo *, int32_t *)(info, &type);
    if (status == NULL) status = ORT_CALL(SLOT_DIMENSION_COUNT, const OrtTensorInfo *, size_t *)(info, &rank);
    if (status == NULL && rank <= PS_TENSOR_RANK)
        status = ORT_CALL(SLOT_DIMENSIONS, const OrtTensorInfo *, int64_t *, size_t)(info, t->dims, rank);
    if (info != NULL) ORT_VOID(SLOT_RELEASE_TENSOR_INFO, OrtTensorInfo *)(info);
    if (status != NULL) return status_of(status, "output", error);
    int dtype = ps_dtype_of_onnx(type);
    if (rank > PS_TENSOR_RANK || dtype < 0) {
        snprintf(error, PS_ONNX_ERROR_BYTES, "output %s has %zu dimensions of element type %d", name, rank, type);
        return 500;
    }
    t->rank = (uint8_t)rank;
    t->dtype = (uint8_t)dtype;
    t->count = ps_shape_count(t->dims, (int)rank, ps_dtypes[dtype].size);
    if (t->count < 0) {
        snprintf(error, PS_ONNX_ERROR_BYTES, "output %s has a shape beyond memory", name);
        return 500;
    }
    if (dtype == PS_DT_BYTES) return string_output(value, t, text, error);
    t->bytes = (size_t)t->count * ps_dtypes[dtype].size;
    status = ORT_CALL(SLOT_TENSOR_DATA, OrtValue *, void **)(value, &data);
    if (status != NULL) return status_of(status, "output data", error);
    t->data = data;
    return 0;
}

int ps_onnx_run(const ps_onnx *self, const ps_tensor *in, const int32_t *outputs, size_t n_out, ps_tensor *out,
                ps_onnx_result **result, char *error) {
    static const char nothing[8]; /* where an empty tensor points */
    size_t n_in = self->n_in;
    OrtStatus *status = NULL;
    int code = 0;
    ps_onnx_result *r = calloc(1, sizeof *r + sizeof(void *) * (n_in + 3 * n_out + 1));
    if (r == NULL) {
        snprintf(error, PS_ONNX_ERROR_BYTES, "out of memory");
        return 503;
    }
    r->n_in = n_in;
    r->n_out = n_out;
    r->in = (OrtValue **)(r + 1);
    r->out = r->in + n_in;
    r->texts = (char **)(r->out + n_out);
    const char **names = (const char **)(r->texts + n_out);
    for (size_t i = 0; i < n_in; i++) {
        const ps_tensor *t = &in[i];
        if (t->dtype == PS_DT_BYTES) status = string_tensor(t, &r->in[i]);
        else
            status = ort.create_tensor(ort.cpu, (void *)(uintptr_t)(t->bytes ? t->data : nothing), t->bytes, t->dims,
                                       t->rank, ps_dtypes[t->dtype].onnx, &r->in[i]);
        if (status != NULL) {
            code = status_of(status, self->in[i].name, error);
            goto fail;
        }
    }
    for (size_t i = 0; i < n_out; i++) names[i] = self->out[outputs[i]].name;
    status = ort.run(self->session, NULL, self->in_names, (const OrtValue *const *)r->in, n_in, names, n_out, r->out);
    if (status != NULL) {
        code = status_of(status, "ONNX Runtime", error);
        goto fail;
    }
    for (size_t i = 0; i < n_out && code == 0; i++) code = read_output(r->out[i], &out[i], &r->texts[i], names[i], error);
    if (code == 0) {
        *result = r;
        return 0;
    }
fail:
    ps_onnx_result_free(r);
    return code;
}
