/* tensor.h (hot path): tensors as the Open Inference Protocol names them, and what their elements are worth.
 *
 * A tensor is row-major, little-endian, without padding; BOOL is a byte 0 or 1; BYTES is a uint32 length and that many
 * bytes per element. Nothing here trusts a length that it has not checked, and no data pointer need be aligned.
 * What must stay true: an element becomes a double exactly or not at all.
 */
#ifndef PENSTOCK_TENSOR_H
#define PENSTOCK_TENSOR_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__x86_64__)
#include <x86intrin.h>
#endif

#include "shortest.h"

#define PS_TENSOR_RANK 8

typedef enum {
    PS_DT_BOOL, PS_DT_UINT8, PS_DT_UINT16, PS_DT_UINT32, PS_DT_UINT64, PS_DT_INT8, PS_DT_INT16, PS_DT_INT32,
    PS_DT_INT64, PS_DT_FP16, PS_DT_FP32, PS_DT_FP64, PS_DT_BF16, PS_DT_BYTES, PS_DT_COUNT
} ps_dtype;

/* Name, bytes per element (0: not fixed), and the number of ONNX's TensorProto.DataType. */
static const struct { const char *name; uint8_t n, size, onnx; } ps_dtypes[PS_DT_COUNT] = {
    {"BOOL", 4, 1, 9},    {"UINT8", 5, 1, 2},  {"UINT16", 6, 2, 4}, {"UINT32", 6, 4, 12}, {"UINT64", 6, 8, 13},
    {"INT8", 4, 1, 3},    {"INT16", 5, 2, 5},  {"INT32", 5, 4, 6},  {"INT64", 5, 8, 7},   {"FP16", 4, 2, 10},
    {"FP32", 4, 4, 1},    {"FP64", 4, 8, 11},  {"BF16", 4, 2, 16},  {"BYTES", 5, 0, 8},
};

static inline int ps_dtype_of_name(const char *p, size_t n) {
    for (int i = 0; i < PS_DT_COUNT; i++)
        if (ps_dtypes[i].n == n && memcmp(ps_dtypes[i].name, p, n) == 0) return i;
    return -1;
}

static inline int ps_dtype_of_onnx(int32_t type) {
    for (int i = 0; i < PS_DT_COUNT; i++)
        if (ps_dtypes[i].onnx == type) return i;
    return -1;
}

typedef struct {
    const char *data;
    size_t bytes;
    int64_t count;
    int64_t dims[PS_TENSOR_RANK];
    uint8_t dtype, rank;
} ps_tensor;

/* Elements of a shape, or -1 where they or their bytes are beyond all memory. A zero hides no overflow. */
static inline int64_t ps_shape_count(const int64_t *dims, int rank, size_t size) {
    int64_t count = 1, bytes = (int64_t)(size ? size : 4);
    int zero = 0;
    for (int d = 0; d < rank; d++) {
        if (dims[d] < 0) return -1;
        if (dims[d] == 0) zero = 1;
        else if (__builtin_mul_overflow(bytes, dims[d], &bytes) || bytes > INT64_MAX / 16) return -1;
        else count *= dims[d];
    }
    return zero ? 0 : count;
}

/* Ticks of a clock that costs a few ns to read; ps_tick_ns (with the base taken at start) says what they are worth. */
static inline int64_t ps_ticks(void) {
#if defined(__x86_64__)
    return (int64_t)__rdtsc();
#else
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
#endif
}

/* ---- Elements as doubles ---- */

static inline double ps_half_value(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023, bits;
    float f;
    if (exponent == 0) {
        f = (float)fraction * 0x1p-24f; /* exact, zero and subnormals */
        memcpy(&bits, &f, 4);
        bits |= sign;
    } else
        bits = sign | (exponent == 31 ? 255u << 23 : (exponent + 112) << 23) | fraction << 13;
    memcpy(&f, &bits, 4);
    return f;
}

static inline double ps_bfloat_value(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

#define PS_EACH(T, BODY)                                            \
    for (int64_t i = 0; i < n; i++) {                               \
        T v;                                                        \
        memcpy(&v, from + i * (int64_t)sizeof(T), sizeof(T));       \
        BODY                                                        \
    }                                                               \
    return -1;

/* Returns -1, or the first element that no double equals (BOOL: that is neither 0 nor 1). */
static int64_t ps_to_doubles(int dtype, const char *from, int64_t n, double *to) {
    switch (dtype) {
    case PS_DT_FP32: PS_EACH(float, to[i] = v;)
    case PS_DT_FP64: if (n) memcpy(to, from, (size_t)n * 8); return -1;
    case PS_DT_BOOL: PS_EACH(uint8_t, if (v > 1) return i; to[i] = v;)
    case PS_DT_UINT8: PS_EACH(uint8_t, to[i] = v;)
    case PS_DT_UINT16: PS_EACH(uint16_t, to[i] = v;)
    case PS_DT_UINT32: PS_EACH(uint32_t, to[i] = v;)
    case PS_DT_UINT64: PS_EACH(uint64_t, double d = (double)v; if (d >= 0x1p64 || (uint64_t)d != v) return i; to[i] = d;)
    case PS_DT_INT8: PS_EACH(int8_t, to[i] = v;)
    case PS_DT_INT16: PS_EACH(int16_t, to[i] = v;)
    case PS_DT_INT32: PS_EACH(int32_t, to[i] = v;)
    case PS_DT_INT64: PS_EACH(int64_t, double d = (double)v; if (d >= 0x1p63 || (int64_t)d != v) return i; to[i] = d;)
    case PS_DT_FP16: PS_EACH(uint16_t, to[i] = ps_half_value(v);)
    case PS_DT_BF16: PS_EACH(uint16_t, to[i] = ps_bfloat_value(v);)
    default: return 0;
    }
}

/* Doubles become floats in the same place. */
static void ps_to_floats(double *x, int64_t n) {
    char *at = (char *)x;
    for (int64_t i = 0; i < n; i++) {
        double d;
        memcpy(&d, at + i * 8, 8);
        float f = (float)d;
        memcpy(at + i * 4, &f, 4);
    }
}

/* ---- Elements whose bytes must be looked at ---- */

/* BYTES: elements of a raw tensor, or -1 where a length goes beyond it. */
static inline int64_t ps_bytes_count(const char *from, size_t bytes) {
    int64_t count = 0;
    size_t at = 0;
    while (at < bytes) {
        uint32_t length;
        if (bytes - at < 4) return -1;
        memcpy(&length, from + at, 4);
        at += 4;
        if (length > bytes - at) return -1;
        at += length;
        count++;
    }
    return count;
}

/* BOOL: the first byte that is neither 0 nor 1, or -1. */
static inline int64_t ps_bool_bad(const char *from, size_t bytes) {
    unsigned char any = 0;
    for (size_t i = 0; i < bytes; i++) any |= (unsigned char)from[i];
    if (any <= 1) return -1;
    for (size_t i = 0; i < bytes; i++)
        if ((unsigned char)from[i] > 1) return (int64_t)i;
    return -1;
}

/* Length of the UTF-8 sequence that begins at p with a byte of 128 or more, or 0 where it is none. */
static inline int ps_utf8_length(const unsigned char *p, const unsigned char *end) {
    unsigned char c = *p, low = 0x80, high = 0xBF;
    int n = c >= 0xC2 && c < 0xE0 ? 2 : c >= 0xE0 && c < 0xF0 ? 3 : c >= 0xF0 && c < 0xF5 ? 4 : 0;
    if (n == 0 || end - p < n) return 0;
    if (c == 0xE0) low = 0xA0;
    if (c == 0xED) high = 0x9F; /* no surrogates */
    if (c == 0xF0) low = 0x90;
    if (c == 0xF4) high = 0x8F;
    if (p[1] < low || p[1] > high) return 0;
    for (int i = 2; i < n; i++)
        if ((p[i] & 0xC0) != 0x80) return 0;
    return n;
}

/* ---- Elements as JSON ---- */

/* Text that grows. Between answers its memory is kept, up to a bound. */
typedef struct {
    char *p;
    size_t n, cap;
} ps_writer;

static inline int ps_write_room(ps_writer *w, size_t more) {
    if (w->cap - w->n >= more) return 0;
    size_t cap = w->cap ? w->cap : 4096;
    while (cap - w->n < more) {
        if (cap > (size_t)1 << 60) return -1;
        cap *= 2;
    }
    char *p = (char *)realloc(w->p, cap);
    if (p == NULL) return -1;
    w->p = p;
    w->cap = cap;
    return 0;
}

static inline int ps_write(ps_writer *w, const char *p, size_t n) {
    if (ps_write_room(w, n)) return -1;
    if (n) memcpy(w->p + w->n, p, n);
    w->n += n;
    return 0;
}

static inline int ps_integer_text(uint64_t value, int negative, char *out) {
    char text[20];
    int n = 0, at = 0;
    if (negative) out[at++] = '-';
    do text[n++] = (char)('0' + value % 10); while (value /= 10);
    while (n) out[at++] = text[--n];
    return at;
}

static inline int64_t ps_write_int(ps_writer *w, int64_t value) {
    if (ps_write_room(w, 24)) return -1;
    w->n += (size_t)ps_integer_text(value < 0 ? 0 - (uint64_t)value : (uint64_t)value, value < 0, w->p + w->n);
    return 0;
}

/* One element that is no text, PS_SHORTEST_ROOM characters at the most. Not finite: null. FP16 and BF16, which have no
 * JSON form as tensors, are written as floats. */
static inline int ps_element_text(int dtype, const char *at, char *out) {
    uint64_t u = 0;
    float f;
    double d;
    switch (dtype) {
    case PS_DT_BOOL:
        memcpy(out, *at ? "true" : "false", 5);
        return *at ? 4 : 5;
    case PS_DT_UINT8: case PS_DT_UINT16: case PS_DT_UINT32: case PS_DT_UINT64:
        memcpy(&u, at, ps_dtypes[dtype].size);
        return ps_integer_text(u, 0, out);
    case PS_DT_INT8: case PS_DT_INT16: case PS_DT_INT32: case PS_DT_INT64: {
        int shift = 64 - 8 * ps_dtypes[dtype].size;
        memcpy(&u, at, ps_dtypes[dtype].size);
        int64_t v = (int64_t)(u << shift) >> shift;
        return ps_integer_text(v < 0 ? 0 - (uint64_t)v : (uint64_t)v, v < 0, out);
    }
    case PS_DT_FP16: case PS_DT_BF16:
        ps_to_doubles(dtype, at, 1, &d);
        return ps_shortest32((float)d, out);
    case PS_DT_FP32:
        memcpy(&f, at, 4);
        return ps_shortest32(f, out);
    default:
        memcpy(&d, at, 8);
        return ps_shortest(d, out);
    }
}

/* A text as a JSON string. Returns 0, -1 without memory, -2 where it is not UTF-8. */
static int ps_write_string(ps_writer *w, const char *p, size_t n) {
    static const char hex[] = "0123456789abcdef";
    const unsigned char *at = (const unsigned char *)p, *end = at + n;
    if (n > (size_t)1 << 59 || ps_write_room(w, 6 * n + 2)) return -1;
    char *to = w->p + w->n;
    *to++ = '"';
    while (at < end) {
        unsigned char c = *at;
        if (c >= 0x80) {
            int length = ps_utf8_length(at, end);
            if (length == 0) return -2;
            memcpy(to, at, (size_t)length);
            to += length;
            at += length;
            continue;
        }
        at++;
        if (c >= 0x20 && c != '"' && c != '\\') {
            *to++ = (char)c;
            continue;
        }
        *to++ = '\\';
        if (c == '"' || c == '\\') *to++ = (char)c;
        else if (c == '\n') *to++ = 'n';
        else if (c == '\t') *to++ = 't';
        else if (c == '\r') *to++ = 'r';
        else {
            memcpy(to, "u00", 3);
            to[3] = hex[c >> 4];
            to[4] = hex[c & 15];
            to += 5;
        }
    }
    *to++ = '"';
    w->n = (size_t)(to - w->p);
    return 0;
}

/* All elements as a flat JSON array. Returns as ps_write_string does. */
static int ps_write_values(ps_writer *w, const ps_tensor *t) {
    size_t size = ps_dtypes[t->dtype].size, at = 0;
    if (ps_write(w, "[", 1)) return -1;
    for (int64_t i = 0; i < t->count; i++) {
        if (i && ps_write(w, ",", 1)) return -1;
        if (size) {
            if (ps_write_room(w, PS_SHORTEST_ROOM)) return -1;
            w->n += (size_t)ps_element_text(t->dtype, t->data + (size_t)i * size, w->p + w->n);
        } else {
            uint32_t n;
            memcpy(&n, t->data + at, 4);
            int code = ps_write_string(w, t->data + at + 4, n);
            if (code) return code;
            at += 4 + (size_t)n;
        }
    }
    return ps_write(w, "]", 1);
}

/* ---- Classification: the k largest of each row, as texts "value:index" ---- */

typedef struct {
    double value;
    int64_t index;
} ps_class;

static int ps_class_order(const void *left, const void *right) {
    const ps_class *a = (const ps_class *)left, *b = (const ps_class *)right;
    int a_nan = a->value != a->value, b_nan = b->value != b->value;
    if (a_nan != b_nan) return a_nan - b_nan;
    if (!a_nan && a->value != b->value) return a->value > b->value ? -1 : 1;
    return a->index < b->index ? -1 : 1;
}

/* to: a BYTES tensor of rows x k, in memory of its own (to->data, free it). 0, or -1 without memory. */
static int ps_classify(const ps_tensor *from, int64_t rows, int64_t k, int batched, ps_tensor *to) {
    int64_t columns = 1; /* no overflow: the shape has been counted */
    size_t size = ps_dtypes[from->dtype].size;
    ps_writer w = {NULL, 0, 0};
    double value;
    for (int d = batched; d < from->rank; d++) columns = from->dims[d] && columns ? columns * from->dims[d] : 0;
    if (k > columns) k = columns;
    ps_class *order = (ps_class *)malloc(sizeof *order * (size_t)(columns + 1));
    if (order == NULL || ps_write_room(&w, 64)) goto fail;
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < columns; c++) {
            if (ps_to_doubles(from->dtype, from->data + (size_t)(r * columns + c) * size, 1, &value) >= 0)
                value = 0; /* an integer beyond 2^53: compared by what follows */
            if (from->dtype == PS_DT_INT64 || from->dtype == PS_DT_UINT64) {
                int64_t v;
                memcpy(&v, from->data + (size_t)(r * columns + c) * 8, 8);
                value = from->dtype == PS_DT_INT64 ? (double)v : (double)(uint64_t)v;
            }
            order[c].value = value;
            order[c].index = c;
        }
        qsort(order, (size_t)columns, sizeof *order, ps_class_order);
        for (int64_t c = 0; c < k; c++) {
            if (ps_write_room(&w, 4 + PS_SHORTEST_ROOM + 24)) goto fail;
            char *text = w.p + w.n + 4;
            uint32_t n = (uint32_t)ps_element_text(from->dtype, from->data + (size_t)(r * columns + order[c].index) * size, text);
            if (order[c].value != order[c].value) n = (uint32_t)(memcpy(text, "nan", 3), 3);
            else if (order[c].value - order[c].value != 0) n = order[c].value > 0 ? (uint32_t)(memcpy(text, "inf", 3), 3)
                                                                                 : (uint32_t)(memcpy(text, "-inf", 4), 4);
            text[n++] = ':';
            n += (uint32_t)ps_integer_text((uint64_t)order[c].index, 0, text + n);
            memcpy(w.p + w.n, &n, 4);
            w.n += 4 + (size_t)n;
        }
    }
    free(order);
    memset(to, 0, sizeof *to);
    to->data = w.p;
    to->bytes = w.n;
    to->count = rows * k;
    to->dtype = PS_DT_BYTES;
    to->rank = batched ? 2 : 1;
    to->dims[0] = batched ? rows : k;
    if (batched) to->dims[1] = k;
    return 0;
fail:
    free(order);
    free(w.p);
    return -1;
}

#endif
