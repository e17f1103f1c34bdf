/* onnx_session.h (hot path): one ONNX Runtime session, reached through the C API of the installed wheel.
 *
 * The wheel brings no header, and we want none at build time: the few functions used are taken by their place in the
 * API table, which ONNX Runtime only ever appends to. What must stay true: ps_onnx_predict touches no Python object,
 * may run in many threads at once, and gives a row the same bits alone and in a batch (unless batched is set).
 */
#ifndef PENSTOCK_ONNX_SESSION_H
#define PENSTOCK_ONNX_SESSION_H

#include <stddef.h>
#include <stdint.h>

#include "model.h"
#include "tensor.h"

#define PS_ONNX_ERROR_BYTES 2048
#define PS_ONNX_MAX_RANK PS_TENSOR_RANK
#define PS_ONNX_CHUNK 1024 /* rows per run when batched: bounds the scratch memory */

/* Element types, with the numbers of ONNX TensorProto.DataType that ONNX Runtime uses too. */
enum { PS_ONNX_NOT_TENSOR = -1, PS_ONNX_FLOAT = 1, PS_ONNX_INT32 = 6, PS_ONNX_INT64 = 7, PS_ONNX_STRING = 8,
       PS_ONNX_BOOL = 9, PS_ONNX_DOUBLE = 11 };

/* ONNX kinds of value (TypeProto), as ONNX Runtime numbers them. */
enum { PS_ONNX_KIND_TENSOR = 1, PS_ONNX_KIND_SEQUENCE = 2, PS_ONNX_KIND_MAP = 3 };

typedef struct {
    char *name;
    int32_t kind;                   /* PS_ONNX_KIND_* */
    int32_t type;                   /* element type; PS_ONNX_NOT_TENSOR for sequences and maps */
    size_t rank;
    int64_t dims[PS_ONNX_MAX_RANK]; /* -1: not fixed in the file */
    size_t columns;                 /* inputs only, set by ps_onnx_bind: features per row */
} ps_onnx_port;

typedef struct {
    int arena;       /* 0: plain malloc instead of ONNX Runtime's arena */
    int mem_pattern; /* 0: no traced allocation pattern */
    const char *external_folder; /* where a model given as bytes finds its external tensors, or NULL */
} ps_onnx_options;

typedef struct ps_onnx ps_onnx;
typedef struct ps_onnx_result ps_onnx_result; /* what a run's outputs lie in */

/* Loads the library once per process. Returns its version text, or NULL with the reason in error. */
const char *ps_onnx_open_library(const char *path, uint32_t api_version, char *error);

/* Opens a session from a file (bytes NULL) or from bytes. NULL with the reason in error. */
ps_onnx *ps_onnx_create(const char *path, const void *bytes, size_t length, const ps_onnx_options *options,
                        char *error);
void ps_onnx_destroy(ps_onnx *self);

size_t ps_onnx_input_count(const ps_onnx *self);
size_t ps_onnx_output_count(const ps_onnx *self);
const ps_onnx_port *ps_onnx_input(const ps_onnx *self, size_t index);
const ps_onnx_port *ps_onnx_output(const ps_onnx *self, size_t index);

/* Text of a custom metadata entry (free() it), or NULL. */
char *ps_onnx_metadata(const ps_onnx *self, const char *key);

/* Fixes the columns of every input, where they stand in a row of x (gather[c] for tensor column c, counted over all
 * inputs), and the output; then runs one row, and two where the batch is free, to learn the output's shape. */
int ps_onnx_bind(ps_onnx *self, const size_t *columns, const uint32_t *gather, size_t output, int batched, char *error);
size_t ps_onnx_n_outputs(const ps_onnx *self);
double ps_onnx_row_seconds(const ps_onnx *self); /* fastest single row seen while binding */

/* model->state is the ps_onnx. Returns 0, 1 (a null in an integer input) or 2 (ONNX Runtime failed). */
int ps_onnx_predict(const ps_model *model, const double *x, size_t rows, size_t stride, double *out);
void ps_onnx_last_error(ps_onnx *self, char *error);

/* Runs tensors of any datatype as they are. in: one per input, BYTES in their raw form; the data is read where it lies
 * and must be aligned to its elements. outputs: the places of the wanted ones; out: as many, which lie in *result until
 * ps_onnx_result_free. Returns 0, or an HTTP status with the reason in error (the request's fault: 400). */
int ps_onnx_run(const ps_onnx *self, const ps_tensor *in, const int32_t *outputs, size_t n_out, ps_tensor *out,
                ps_onnx_result **result, char *error);
void ps_onnx_result_free(ps_onnx_result *result);

#endif
