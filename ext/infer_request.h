/* infer_request.h (hot path): the JSON header of an inference request, read in one pass into plain structs.
 *
 * Values of `data` go straight into native buffers. Every refusal says where and what would be right. The input is
 * hostile: no byte is read past the end, nothing is allocated that the header's own length does not bound, nesting is
 * bounded. A request that was read says nothing of the model's answers, so it may be remembered and shared by threads.
 *
 * Choices where the protocol is silent: `null` in FP32 and FP64 data is NaN (a missing value); a number in FP32 data is
 * rounded to the nearest float; unknown keys and parameters are passed over; a key of meaning given twice is refused.
 */
#ifndef PENSTOCK_INFER_REQUEST_H
#define PENSTOCK_INFER_REQUEST_H

#include <float.h>
#include <locale.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tensor.h"

#define PS_FAULT_BYTES 600
#define PS_JSON_DEPTH 64

typedef struct {
    int status;
    char text[PS_FAULT_BYTES];
} ps_fault;

typedef struct {
    const char *name; /* the model's Python object keeps both texts */
    size_t name_n;
    const char *json; /* the name as JSON, quotes included */
    size_t json_n;
    int64_t dims[PS_TENSOR_RANK]; /* -1: any */
    uint8_t dtype, rank;
    uint8_t any_shape;            /* the file does not say */
} ps_port;

typedef struct {
    ps_port *in, *out;
    int n_in, n_out;
    int any_number; /* inputs of any numeric datatype are taken */
    int batched;    /* the first dimension of every input is the row */
} ps_ports;

typedef struct {
    int64_t dims[PS_TENSOR_RANK];
    int64_t count;
    size_t bytes;
    size_t at;       /* where it begins: after the header, or in `values` */
    uint8_t dtype, rank;
    uint8_t given;
    uint8_t inside;  /* in `values` */
} ps_input;

typedef struct {
    int32_t port;
    int8_t binary;    /* -1: not said */
    int64_t classes;  /* 0: the tensor itself */
} ps_wanted;

typedef struct ps_request {
    ps_input *in;        /* one per input of the model, in the model's order */
    ps_wanted *out;
    int n_out;
    int any_binary;      /* an output is binary */
    int any_json;
    int any_classes;
    int look;            /* an input is BOOL or BYTES: its bytes must be looked at */
    size_t binary_bytes; /* raw bytes that follow the header */
    int64_t rows;
    int64_t timeout_us;
    int priority;
    const char *id;      /* JSON text between the quotes, in the header */
    size_t id_n;
    char *values;        /* of inputs given as JSON */
    size_t values_n, values_cap;
} ps_request;

static __attribute__((noinline, cold, format(printf, 3, 4))) int
ps_refuse(ps_fault *fault, int status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(fault->text, sizeof fault->text, format, arguments);
    va_end(arguments);
    fault->status = status;
    return -1;
}

/* [-1, 30] */
static inline const char *ps_shape_text(const int64_t *dims, int rank, char out[PS_TENSOR_RANK * 22 + 8]) {
    size_t n = 0;
    out[n++] = '[';
    for (int d = 0; d < rank; d++) n += (size_t)sprintf(out + n, d ? ", %lld" : "%lld", (long long)dims[d]);
    out[n++] = ']';
    out[n] = 0;
    return out;
}

static inline ps_request *ps_request_new(const ps_ports *ports) {
    ps_request *r = (ps_request *)calloc(1, sizeof *r + sizeof *r->in * (size_t)ports->n_in +
                                                sizeof *r->out * (size_t)ports->n_out);
    if (r == NULL) return NULL;
    r->in = (ps_input *)(r + 1);
    r->out = (ps_wanted *)(r->in + ports->n_in);
    r->rows = 1;
    return r;
}

static inline void ps_request_free(ps_request *r) {
    if (r == NULL) return;
    free(r->values);
    free(r);
}

/* ---- JSON ---- */

typedef struct {
    const char *p, *end, *begin;
    ps_fault *fault;
} ps_json;

typedef struct {
    const char *p; /* between the quotes */
    size_t n;
    int escaped;
} ps_text;

static __attribute__((noinline, cold)) int ps_json_bad(ps_json *j, const char *expected) {
    if (j->p >= j->end) return ps_refuse(j->fault, 400, "JSON header: ends where %s is expected", expected);
    unsigned char c = (unsigned char)*j->p;
    if (c >= 0x20 && c < 0x7F)
        return ps_refuse(j->fault, 400, "JSON header, byte %zu: expected %s, got '%c'", (size_t)(j->p - j->begin),
                         expected, c);
    return ps_refuse(j->fault, 400, "JSON header, byte %zu: expected %s, got byte 0x%02x", (size_t)(j->p - j->begin),
                     expected, c);
}

static inline void ps_json_space(ps_json *j) {
    while (j->p < j->end && (*j->p == ' ' || *j->p == '\n' || *j->p == '\t' || *j->p == '\r')) j->p++;
}

static inline int ps_json_take(ps_json *j, char c, const char *expected) {
    ps_json_space(j);
    if (j->p < j->end && *j->p == c) {
        j->p++;
        return 0;
    }
    return ps_json_bad(j, expected);
}

/* What comes next, or 0 at the end. */
static inline char ps_json_next(ps_json *j) {
    ps_json_space(j);
    return j->p < j->end ? *j->p : 0;
}

static inline int ps_hex4(const char *p, const char *end, unsigned *out) {
    unsigned v = 0;
    if (end - p < 4) return 0;
    for (int i = 0; i < 4; i++) {
        char c = p[i];
        unsigned d = c >= '0' && c <= '9' ? (unsigned)(c - '0')
                   : (c | 32) >= 'a' && (c | 32) <= 'f' ? (unsigned)((c | 32) - 'a' + 10) : 16u;
        if (d > 15) return 0;
        v = v << 4 | d;
    }
    *out = v;
    return 1;
}

static int ps_json_string(ps_json *j, ps_text *t, const char *expected) {
    if (ps_json_take(j, '"', expected)) return -1;
    t->p = j->p;
    t->escaped = 0;
    while (j->p < j->end) {
        unsigned char c = (unsigned char)*j->p;
        if (c == '"') {
            t->n = (size_t)(j->p++ - t->p);
            return 0;
        }
        if (c == '\\') {
            t->escaped = 1;
            j->p++;
            if (j->p >= j->end) break;
            if (*j->p == 'u') {
                unsigned v, w;
                if (!ps_hex4(j->p + 1, j->end, &v)) return ps_json_bad(j, "four hexadecimal digits after \\u");
                if (v >= 0xDC00 && v < 0xE000) return ps_json_bad(j, "no second half of a surrogate pair");
                j->p += 5;
                if (v >= 0xD800 && v < 0xDC00) {
                    if (j->end - j->p < 6 || j->p[0] != '\\' || j->p[1] != 'u' || !ps_hex4(j->p + 2, j->end, &w) ||
                        w < 0xDC00 || w > 0xDFFF)
                        return ps_json_bad(j, "the second half of a surrogate pair");
                    j->p += 6;
                }
            } else if (*j->p != 0 && strchr("\"\\/bfnrt", *j->p) != NULL)
                j->p++;
            else
                return ps_json_bad(j, "an escape that JSON has");
        } else if (c < 0x20)
            return ps_json_bad(j, "no control character in a string");
        else if (c < 0x80)
            j->p++;
        else {
            int n = ps_utf8_length((const unsigned char *)j->p, (const unsigned char *)j->end);
            if (n == 0) return ps_json_bad(j, "UTF-8");
            j->p += n;
        }
    }
    return ps_json_bad(j, "the end of a string");
}

/* Decodes a text that ps_json_string took; out has room for t->n bytes. Returns the bytes written. */
static size_t ps_text_decode(const ps_text *t, char *out) {
    const char *p = t->p, *end = t->p + t->n;
    char *to = out;
    if (!t->escaped) {
        if (t->n) memcpy(out, t->p, t->n);
        return t->n;
    }
    while (p < end) {
        unsigned v = 0, w = 0;
        if (*p != '\\') {
            *to++ = *p++;
            continue;
        }
        p++;
        switch (*p++) {
        case 'b': *to++ = '\b'; break;
        case 'f': *to++ = '\f'; break;
        case 'n': *to++ = '\n'; break;
        case 'r': *to++ = '\r'; break;
        case 't': *to++ = '\t'; break;
        case 'u':
            ps_hex4(p, end, &v);
            p += 4;
            if (v >= 0xD800 && v < 0xDC00) {
                ps_hex4(p + 2, end, &w);
                p += 6;
                v = 0x10000 + ((v - 0xD800) << 10) + (w - 0xDC00);
            }
            if (v < 0x80) *to++ = (char)v;
            else {
                if (v < 0x800) *to++ = (char)(0xC0 | v >> 6);
                else {
                    if (v < 0x10000) *to++ = (char)(0xE0 | v >> 12);
                    else {
                        *to++ = (char)(0xF0 | v >> 18);
                        *to++ = (char)(0x80 | (v >> 12 & 63));
                    }
                    *to++ = (char)(0x80 | (v >> 6 & 63));
                }
                *to++ = (char)(0x80 | (v & 63));
            }
            break;
        default: *to++ = p[-1]; break; /* the quote, the slash, the backslash */
        }
    }
    return (size_t)(to - out);
}

static inline int ps_text_is(const ps_text *t, const char *name, size_t n) {
    char decoded[1024];
    if (!t->escaped) return t->n == n && memcmp(t->p, name, n) == 0;
    if (t->n > sizeof decoded) return 0;
    return ps_text_decode(t, decoded) == n && memcmp(decoded, name, n) == 0;
}

#define PS_IS(text, literal) ps_text_is(text, literal, sizeof(literal) - 1)
#define PS_SHOWN(text) (int)((text)->n < 100 ? (text)->n : 100), (text)->p

typedef struct {
    const char *p, *end; /* the token */
    uint64_t digits;     /* its first 19 digits */
    int64_t exponent;    /* value = digits * 10^exponent, where nothing was dropped */
    uint8_t negative;
    uint8_t whole;       /* no point and no exponent */
    uint8_t dropped;     /* digits beyond the 19 that are not shown in `digits` */
} ps_number;

/* The JSON grammar of numbers; -1 where the text is none. */
static inline int ps_json_number(ps_json *j, ps_number *out) {
    const char *p = j->p, *end = j->end;
    uint64_t digits = 0;
    int64_t exponent = 0;
    int n = 0;
    out->p = p;
    out->negative = 0;
    out->whole = 1;
    out->dropped = 0;
    if (p < end && *p == '-') {
        out->negative = 1;
        p++;
    }
    if (p >= end || (unsigned)(*p - '0') > 9) goto bad;
    if (*p == '0') {
        p++;
        if (p < end && (unsigned)(*p - '0') <= 9) goto bad;
    } else
        for (; p < end && (unsigned)(*p - '0') <= 9; p++) {
            if (n < 19) {
                digits = digits * 10 + (unsigned)(*p - '0');
                n++;
            } else {
                out->dropped = 1;
                exponent++;
            }
        }
    if (p < end && *p == '.') {
        const char *first = ++p;
        out->whole = 0;
        for (; p < end && (unsigned)(*p - '0') <= 9; p++) {
            if (n < 19) {
                digits = digits * 10 + (unsigned)(*p - '0');
                n += digits != 0;
                exponent--;
            } else
                out->dropped = 1;
        }
        if (p == first) goto bad;
    }
    if (p < end && (*p == 'e' || *p == 'E')) {
        int64_t e = 0;
        int minus = 0;
        out->whole = 0;
        p++;
        if (p < end && (*p == '-' || *p == '+')) minus = *p++ == '-';
        if (p >= end || (unsigned)(*p - '0') > 9) goto bad;
        for (; p < end && (unsigned)(*p - '0') <= 9; p++)
            if (e < 100000000) e = e * 10 + (*p - '0');
        exponent += minus ? -e : e;
    }
    out->digits = digits;
    out->exponent = exponent;
    out->end = j->p = p;
    return 0;
bad:
    j->p = p;
    return -1;
}

static __attribute__((noinline, cold)) double ps_number_slow(const ps_number *x) {
    static locale_t plain; /* the application's locale may have another point; a race makes two, and leaks one */
    size_t n = (size_t)(x->end - x->p);
    char room[256], *text = n < sizeof room ? room : (char *)malloc(n + 1);
    double value;
    if (text == NULL) return INFINITY; /* refused as out of range */
    memcpy(text, x->p, n);
    text[n] = 0;
    if (plain == (locale_t)0) plain = newlocale(LC_ALL_MASK, "C", (locale_t)0);
    value = plain == (locale_t)0 ? strtod(text, NULL) : strtod_l(text, NULL, plain);
    if (text != room) free(text);
    return value;
}

/* The nearest double; an infinity where there is none. */
static inline double ps_number_double(const ps_number *x) {
    static const double tens[] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,  1e10, 1e11,
                                  1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};
    double value;
    if (x->dropped) return ps_number_slow(x);
    if (x->digits <= (UINT64_C(1) << 53) && x->exponent >= -22 && x->exponent <= 22) {
        /* Both factors are exact, so one rounding is all there is. */
        value = x->exponent < 0 ? (double)x->digits / tens[-x->exponent] : (double)x->digits * tens[x->exponent];
        return x->negative ? -value : value;
    }
#if LDBL_MANT_DIG == 64 && defined(__x86_64__)
    if (x->exponent >= -27 && x->exponent <= 27) {
        /* Exact factors, one rounding to 64 bits, one to 53: right unless the first ends on the second's midpoint. */
        static const long double more[] = {1e22L, 1e23L, 1e24L, 1e25L, 1e26L, 1e27L};
        int64_t e = x->exponent < 0 ? -x->exponent : x->exponent;
        long double ten = e <= 22 ? (long double)tens[e] : more[e - 22];
        long double wide = x->exponent < 0 ? (long double)x->digits / ten : (long double)x->digits * ten;
        uint64_t bits;
        memcpy(&bits, &wide, 8);
        if ((bits & 0x7FF) != 0x400) return x->negative ? -(double)wide : (double)wide;
    }
#endif
    return ps_number_slow(x);
}

static int ps_json_word(ps_json *j, const char *word, size_t n) {
    if ((size_t)(j->end - j->p) >= n && memcmp(j->p, word, n) == 0) {
        j->p += n;
        return 0;
    }
    return ps_json_bad(j, word);
}

/* Passes over one value of any kind. */
static int ps_json_skip(ps_json *j, int depth) {
    ps_text text;
    ps_number number;
    char c = ps_json_next(j);
    if (depth > PS_JSON_DEPTH)
        return ps_refuse(j->fault, 400, "JSON header, byte %zu: nested deeper than %d", (size_t)(j->p - j->begin),
                         PS_JSON_DEPTH);
    switch (c) {
    case '"': return ps_json_string(j, &text, "a string");
    case 't': return ps_json_word(j, "true", 4);
    case 'f': return ps_json_word(j, "false", 5);
    case 'n': return ps_json_word(j, "null", 4);
    case '{':
    case '[': {
        char close = c == '{' ? '}' : ']';
        j->p++;
        if (ps_json_next(j) == close) {
            j->p++;
            return 0;
        }
        for (;;) {
            if (c == '{' && (ps_json_string(j, &text, "a key") || ps_json_take(j, ':', "':'"))) return -1;
            if (ps_json_skip(j, depth + 1)) return -1;
            char next = ps_json_next(j);
            if (next != ',' && next != close) return ps_json_bad(j, c == '{' ? "',' or '}'" : "',' or ']'");
            j->p++;
            if (next == close) return 0;
        }
    }
    default:
        if (ps_json_number(j, &number)) return ps_json_bad(j, "a value");
        return 0;
    }
}

/* After one member of an object or array: 1 where another follows, 0 at its end. */
static inline int ps_json_more(ps_json *j, char close) {
    char c = ps_json_next(j);
    if (c == ',') {
        j->p++;
        return 1;
    }
    if (c == close) {
        j->p++;
        return 0;
    }
    return ps_json_bad(j, close == '}' ? "',' or '}'" : "',' or ']'");
}

/* Begins an object or array: 1 where it has a member, 0 where it is empty and done. */
static inline int ps_json_open(ps_json *j, char open, char close, const char *expected) {
    if (ps_json_take(j, open, expected)) return -1;
    if (ps_json_next(j) != close) return 1;
    j->p++;
    return 0;
}

/* ---- Values ---- */

static int ps_values_room(ps_request *r, size_t more, ps_fault *fault) {
    if (more <= r->values_cap - r->values_n) return 0;
    size_t cap = r->values_cap ? r->values_cap : 512;
    while (cap - r->values_n < more) {
        if (cap > (size_t)1 << 60) return ps_refuse(fault, 413, "the values need more memory than there is");
        cap *= 2;
    }
    char *values = (char *)realloc(r->values, cap);
    if (values == NULL) return ps_refuse(fault, 503, "out of memory for %zu bytes of values", cap);
    r->values = values;
    r->values_cap = cap;
    return 0;
}

typedef struct {
    ps_request *r;
    ps_input *in;
    char *to;      /* where the next element goes; BYTES: not used */
    int64_t done;
    int index;     /* of the input in the request */
} ps_filling;

static __attribute__((noinline, cold)) int ps_value_bad(ps_json *j, const ps_filling *f, const char *expected) {
    const char *p = j->p, *end = p;
    while (end < j->end && end - p < 40 && (unsigned char)*end >= 0x20 && (unsigned char)*end < 0x7F && *end != ',' &&
           *end != ']' && *end != '}')
        end++;
    return ps_refuse(j->fault, 400, "inputs[%d].data: element %lld (byte %zu of the JSON header): expected %s, got %.*s",
                     f->index, (long long)f->done, (size_t)(p - j->begin), expected, end > p ? (int)(end - p) : 4,
                     end > p ? p : "none");
}

static inline int ps_whole(ps_json *j, const ps_filling *f, int64_t low, uint64_t high, int64_t *out,
                           const char *expected) {
    ps_number x;
    const char *at = j->p;
    if (ps_json_number(j, &x) || !x.whole || x.dropped || (x.negative ? x.digits > (uint64_t)-(low + 1) + 1 : x.digits > high) ||
        (x.negative && low == 0 && x.digits != 0)) {
        j->p = at;
        return ps_value_bad(j, f, expected);
    }
    *out = (int64_t)(x.negative ? 0 - x.digits : x.digits);
    return 0;
}

#define PS_PUT(T, value)                                        \
    {                                                           \
        T v_ = (T)(value);                                      \
        memcpy(f->to, &v_, sizeof(T));                          \
        f->to += sizeof(T);                                     \
        f->done++;                                              \
        return 0;                                               \
    }

#define PS_WHOLE(T, low, high, text)                            \
    if (ps_whole(j, f, low, high, &whole, text)) return -1;     \
    PS_PUT(T, whole)

static inline int ps_value(ps_json *j, ps_filling *f) {
    int64_t whole = 0;
    ps_number x;
    ps_text text;
    double d;
    const char *at = j->p;
    switch (f->in->dtype) {
    case PS_DT_FP32:
    case PS_DT_FP64:
        if (at < j->end && *at == 'n' && (size_t)(j->end - at) >= 4 && memcmp(at, "null", 4) == 0) {
            j->p += 4;
            d = NAN;
        } else {
            if (ps_json_number(j, &x)) {
                j->p = at;
                return ps_value_bad(j, f, "a number or null");
            }
            d = ps_number_double(&x);
            if (isinf(d) || (f->in->dtype == PS_DT_FP32 && isinf((float)d))) {
                j->p = at;
                return ps_value_bad(j, f, f->in->dtype == PS_DT_FP32 ? "a number within FP32" : "a number within FP64");
            }
        }
        if (f->in->dtype == PS_DT_FP64) PS_PUT(double, d)
        else PS_PUT(float, d)
    case PS_DT_BOOL:
        if (ps_json_next(j) == 't' && (size_t)(j->end - j->p) >= 4 && memcmp(j->p, "true", 4) == 0) {
            j->p += 4;
            whole = 1;
        } else if ((size_t)(j->end - j->p) >= 5 && memcmp(j->p, "false", 5) == 0) {
            j->p += 5;
            whole = 0;
        } else
            return ps_value_bad(j, f, "true or false");
        PS_PUT(uint8_t, whole)
    case PS_DT_UINT8: PS_WHOLE(uint8_t, 0, UINT8_MAX, "an integer from 0 to 255")
    case PS_DT_UINT16: PS_WHOLE(uint16_t, 0, UINT16_MAX, "an integer from 0 to 65535")
    case PS_DT_UINT32: PS_WHOLE(uint32_t, 0, UINT32_MAX, "an integer from 0 to 4294967295")
    case PS_DT_UINT64:
        /* 20 digits reach beyond what ps_json_number keeps. */
        if (ps_json_number(j, &x) == 0 && x.whole && (!x.negative || x.digits == 0)) {
            uint64_t u = 0;
            const char *p = x.p + x.negative;
            for (; p < x.end; p++)
                if (__builtin_mul_overflow(u, 10u, &u) || __builtin_add_overflow(u, (uint64_t)(*p - '0'), &u)) break;
            if (p == x.end) PS_PUT(uint64_t, u)
        }
        j->p = at;
        return ps_value_bad(j, f, "an integer from 0 to 18446744073709551615");
    case PS_DT_INT8: PS_WHOLE(int8_t, INT8_MIN, INT8_MAX, "an integer from -128 to 127")
    case PS_DT_INT16: PS_WHOLE(int16_t, INT16_MIN, INT16_MAX, "an integer from -32768 to 32767")
    case PS_DT_INT32: PS_WHOLE(int32_t, INT32_MIN, INT32_MAX, "an integer from -2147483648 to 2147483647")
    case PS_DT_INT64: PS_WHOLE(int64_t, INT64_MIN, INT64_MAX, "an integer from -9223372036854775808 to 9223372036854775807")
    case PS_DT_BYTES: {
        uint32_t n;
        if (j->p >= j->end || *j->p != '"') return ps_value_bad(j, f, "a string");
        if (ps_json_string(j, &text, "a string")) return -1;
        if (text.n > UINT32_MAX || ps_values_room(f->r, text.n + 4, j->fault)) return -1;
        n = (uint32_t)ps_text_decode(&text, f->r->values + f->r->values_n + 4);
        memcpy(f->r->values + f->r->values_n, &n, 4);
        f->r->values_n += 4 + (size_t)n;
        f->done++;
        return 0;
    }
    default: return ps_value_bad(j, f, "a datatype that has a JSON form");
    }
}

static __attribute__((noinline, cold)) int ps_count_bad(ps_json *j, const ps_filling *f, int level, int64_t got, int more) {
    char shape[PS_TENSOR_RANK * 22 + 8];
    if (level < 0)
        return ps_refuse(j->fault, 400, "inputs[%d].data: expected %lld values for shape %s, got %s%lld", f->index,
                         (long long)f->in->count, ps_shape_text(f->in->dims, f->in->rank, shape),
                         more ? "more than " : "", (long long)got);
    return ps_refuse(j->fault, 400, "inputs[%d].data: expected %lld at depth %d for shape %s, got %s%lld", f->index,
                     (long long)f->in->dims[level], level + 1, ps_shape_text(f->in->dims, f->in->rank, shape),
                     more ? "more than " : "", (long long)got);
}

/* n values up to the bracket that closes them; level is the dimension they fill, -1 where they are all. */
static int ps_values_run(ps_json *j, ps_filling *f, int64_t n, int level) {
    for (int64_t i = 0;; i++) {
        char c = ps_json_next(j);
        if (i == 0 && c == ']') {
            j->p++;
            return n == 0 ? 0 : ps_count_bad(j, f, level, 0, 0);
        }
        if (i == n) return ps_count_bad(j, f, level, n, 1);
        if (ps_value(j, f)) return -1;
        int more = ps_json_more(j, ']');
        if (more < 0) return -1;
        if (!more) return i + 1 == n ? 0 : ps_count_bad(j, f, level, i + 1, 0);
    }
}

/* One array of a nested tensor; its '[' has been taken. */
static int ps_values_nested(ps_json *j, ps_filling *f, int level) {
    int64_t n = f->in->dims[level];
    if (level == f->in->rank - 1) return ps_values_run(j, f, n, level);
    for (int64_t i = 0;; i++) {
        char c = ps_json_next(j);
        if (i == 0 && c == ']') {
            j->p++;
            return n == 0 ? 0 : ps_count_bad(j, f, level, 0, 0);
        }
        if (i == n) return ps_count_bad(j, f, level, n, 1);
        if (c != '[') return ps_value_bad(j, f, "an array");
        j->p++;
        if (ps_values_nested(j, f, level + 1)) return -1;
        int more = ps_json_more(j, ']');
        if (more < 0) return -1;
        if (!more) return i + 1 == n ? 0 : ps_count_bad(j, f, level, i + 1, 0);
    }
}

/* The value of "data": flat, or nested as the shape says. Shape and datatype have been checked. */
static int ps_data(ps_json *j, ps_request *r, ps_input *in, int index) {
    ps_filling f = {r, in, NULL, 0, index};
    size_t size = ps_dtypes[in->dtype].size;
    if (ps_json_next(j) != '[') return ps_refuse(j->fault, 400, "inputs[%d].data: expected an array", index);
    if (in->dtype == PS_DT_FP16 || in->dtype == PS_DT_BF16)
        return ps_refuse(j->fault, 400, "inputs[%d].data: %s has no JSON form; send it as binary data", index,
                         ps_dtypes[in->dtype].name);
    if (in->count > (j->end - j->p) / 2 + 1) /* before room is made for what cannot be there */
        return ps_refuse(j->fault, 400, "inputs[%d].data: expected %lld values, the header is too short for them", index,
                         (long long)in->count);
    size_t pad = -r->values_n & 7;
    if (ps_values_room(r, pad + (size_t)in->count * size, j->fault)) return -1;
    r->values_n += pad;
    in->at = r->values_n;
    if (size) {
        f.to = r->values + r->values_n;
        r->values_n += (size_t)in->count * size;
    }
    j->p++;
    if (in->rank > 1 && ps_json_next(j) == '[') {
        if (ps_values_nested(j, &f, 0)) return -1;
    } else if (ps_values_run(j, &f, in->count, -1))
        return -1;
    in->bytes = r->values_n - in->at;
    in->inside = 1;
    return 0;
}

/* ---- The request ---- */

static int ps_check_shape(const ps_ports *ports, const ps_port *port, ps_input *in, int index, ps_fault *fault) {
    char want[PS_TENSOR_RANK * 22 + 8], got[PS_TENSOR_RANK * 22 + 8];
    int fits = port->any_shape || port->rank == in->rank;
    for (int d = 0; fits && !port->any_shape && d < port->rank; d++)
        fits = port->dims[d] < 0 || port->dims[d] == in->dims[d];
    if (!fits)
        return ps_refuse(fault, 400, "inputs[%d].shape: expected %s, got %s", index,
                         ps_shape_text(port->dims, port->rank, want), ps_shape_text(in->dims, in->rank, got));
    in->count = ps_shape_count(in->dims, in->rank, ps_dtypes[in->dtype].size);
    if (in->count < 0)
        return ps_refuse(fault, 400, "inputs[%d].shape: %s is more than memory holds", index,
                         ps_shape_text(in->dims, in->rank, got));
    (void)ports;
    return 0;
}

static int ps_check_dtype(const ps_ports *ports, const ps_port *port, int dtype, int index, ps_fault *fault) {
    if (dtype == port->dtype || (ports->any_number && dtype != PS_DT_BYTES)) return 0;
    return ps_refuse(fault, 400, "inputs[%d].datatype: expected %s%s, got %s", index, ps_dtypes[port->dtype].name,
                     ports->any_number ? " or another number" : "", ps_dtypes[dtype].name);
}

/* A non-negative integer. what: "parameters.timeout" and the like, after the place. */
static int ps_json_count(ps_json *j, const char *list, int index, const char *what, int64_t *out) {
    ps_number x;
    ps_json_space(j);
    if (ps_json_number(j, &x) || !x.whole || x.dropped || (x.negative && x.digits) || x.digits > INT64_MAX) {
        if (list == NULL) return ps_refuse(j->fault, 400, "parameters.%s: expected an integer of 0 or more", what);
        return ps_refuse(j->fault, 400, "%s[%d].%s: expected an integer of 0 or more", list, index, what);
    }
    *out = (int64_t)x.digits;
    return 0;
}

static int ps_json_truth(ps_json *j, const char *list, int index, const char *what, int8_t *out) {
    char c = ps_json_next(j);
    if (c == 't' || c == 'f') {
        *out = c == 't';
        return c == 't' ? ps_json_word(j, "true", 4) : ps_json_word(j, "false", 5);
    }
    if (list == NULL) return ps_refuse(j->fault, 400, "parameters.%s: expected true or false", what);
    return ps_refuse(j->fault, 400, "%s[%d].parameters.%s: expected true or false", list, index, what);
}

static __attribute__((noinline, cold)) int ps_no_shared_memory(ps_json *j, const char *list, int index) {
    return ps_refuse(j->fault, 400, "%s[%d].parameters: shared memory is not offered; send the tensor in the request%s",
                     list, index, list[0] == 'o' ? ", and take it from the answer" : "");
}

static inline int ps_is_shared_memory(const ps_text *key) {
    return PS_IS(key, "shared_memory_region") || PS_IS(key, "shared_memory_offset") ||
           PS_IS(key, "shared_memory_byte_size");
}

static __attribute__((noinline, cold)) int ps_twice(ps_json *j, const char *list, int index, const ps_text *key) {
    return ps_refuse(j->fault, 400, "%s[%d].%.*s: given twice", list, index, PS_SHOWN(key));
}

static int ps_read_input(ps_json *j, const ps_ports *ports, ps_request *r, int index) {
    ps_text key, name = {NULL, 0, 0}, text;
    ps_input got;
    const char *data = NULL; /* where "data" stands, when it comes before what it needs */
    int64_t binary = -1;
    int port = -1, dtype = -1, shaped = 0, checked = 0, filled = 0, parameters = 0, has_data = 0;
    memset(&got, 0, sizeof got);
    int more = ps_json_open(j, '{', '}', "an object in inputs");
    while (more == 1) {
        if (ps_json_string(j, &key, "a key") || ps_json_take(j, ':', "':'")) return -1;
        if (PS_IS(&key, "name")) {
            if (name.p) return ps_twice(j, "inputs", index, &key);
            if (ps_json_next(j) != '"') return ps_refuse(j->fault, 400, "inputs[%d].name: expected a string", index);
            if (ps_json_string(j, &name, "a string")) return -1;
            for (port = 0; port < ports->n_in; port++)
                if (ps_text_is(&name, ports->in[port].name, ports->in[port].name_n)) break;
            if (port == ports->n_in)
                return ps_refuse(j->fault, 400, "inputs[%d].name: no input is called \"%.*s\"; expected \"%.200s\"%s",
                                 index, PS_SHOWN(&name), ports->n_in ? ports->in[0].name : "none",
                                 ports->n_in > 1 ? " or another of the model's" : "");
            if (r->in[port].given)
                return ps_refuse(j->fault, 400, "inputs[%d].name: \"%.*s\" is given twice", index, PS_SHOWN(&name));
        } else if (PS_IS(&key, "datatype")) {
            if (dtype >= 0) return ps_twice(j, "inputs", index, &key);
            if (ps_json_next(j) != '"') return ps_refuse(j->fault, 400, "inputs[%d].datatype: expected a string", index);
            if (ps_json_string(j, &text, "a string")) return -1;
            dtype = text.escaped ? -1 : ps_dtype_of_name(text.p, text.n);
            if (dtype < 0)
                return ps_refuse(j->fault, 400, "inputs[%d].datatype: there is no \"%.*s\"", index, PS_SHOWN(&text));
            got.dtype = (uint8_t)dtype;
        } else if (PS_IS(&key, "shape")) {
            if (shaped) return ps_twice(j, "inputs", index, &key);
            shaped = 1;
            int dims = ps_json_next(j) == '[' ? ps_json_open(j, '[', ']', "an array")
                                              : ps_refuse(j->fault, 400, "inputs[%d].shape: expected an array", index);
            while (dims == 1) {
                if (got.rank == PS_TENSOR_RANK)
                    return ps_refuse(j->fault, 400, "inputs[%d].shape: more than %d dimensions", index, PS_TENSOR_RANK);
                if (ps_json_count(j, "inputs", index, "shape", &got.dims[got.rank++])) return -1;
                dims = ps_json_more(j, ']');
            }
            if (dims < 0) return -1;
        } else if (PS_IS(&key, "data")) {
            if (has_data) return ps_twice(j, "inputs", index, &key);
            has_data = 1;
            if (port >= 0 && dtype >= 0 && shaped) {
                if (ps_check_dtype(ports, &ports->in[port], dtype, index, j->fault) ||
                    ps_check_shape(ports, &ports->in[port], &got, index, j->fault) || ps_data(j, r, &got, index))
                    return -1;
                checked = filled = 1;
            } else {
                ps_json_space(j);
                data = j->p;
                if (ps_json_skip(j, 0)) return -1;
            }
        } else if (PS_IS(&key, "parameters")) {
            if (parameters) return ps_twice(j, "inputs", index, &key);
            parameters = 1;
            int inner = ps_json_open(j, '{', '}', "an object");
            while (inner == 1) {
                if (ps_json_string(j, &key, "a key") || ps_json_take(j, ':', "':'")) return -1;
                if (PS_IS(&key, "binary_data_size")) {
                    if (binary >= 0) return ps_twice(j, "inputs", index, &key);
                    if (ps_json_count(j, "inputs", index, "parameters.binary_data_size", &binary)) return -1;
                } else if (ps_is_shared_memory(&key))
                    return ps_no_shared_memory(j, "inputs", index);
                else if (ps_json_skip(j, 0))
                    return -1;
                inner = ps_json_more(j, '}');
            }
            if (inner < 0) return -1;
        } else if (ps_json_skip(j, 0))
            return -1;
        more = ps_json_more(j, '}');
    }
    if (more < 0) return -1;
    if (name.p == NULL) return ps_refuse(j->fault, 400, "inputs[%d].name: missing", index);
    if (dtype < 0) return ps_refuse(j->fault, 400, "inputs[%d].datatype: missing", index);
    if (!shaped) return ps_refuse(j->fault, 400, "inputs[%d].shape: missing", index);
    if (!checked && (ps_check_dtype(ports, &ports->in[port], dtype, index, j->fault) ||
                     ps_check_shape(ports, &ports->in[port], &got, index, j->fault)))
        return -1;
    if (binary >= 0) {
        size_t size = ps_dtypes[dtype].size;
        if (has_data) return ps_refuse(j->fault, 400, "inputs[%d]: both data and binary_data_size", index);
        if (size ? (uint64_t)binary != (uint64_t)got.count * size : binary / 4 < got.count) {
            char shape[PS_TENSOR_RANK * 22 + 8];
            return ps_refuse(j->fault, 400, "inputs[%d].parameters.binary_data_size: expected %s%lld for %s %s, got %lld",
                             index, size ? "" : "at least ", (long long)(got.count * (int64_t)(size ? size : 4)),
                             ps_dtypes[dtype].name, ps_shape_text(got.dims, got.rank, shape), (long long)binary);
        }
        got.bytes = (size_t)binary;
        got.at = r->binary_bytes;
        if (__builtin_add_overflow(r->binary_bytes, got.bytes, &r->binary_bytes) || r->binary_bytes > INT64_MAX)
            return ps_refuse(j->fault, 400, "inputs[%d].parameters.binary_data_size: more than memory holds", index);
        if (dtype == PS_DT_BOOL || dtype == PS_DT_BYTES) r->look = 1;
    } else if (!has_data)
        return ps_refuse(j->fault, 400, "inputs[%d].data: missing (or parameters.binary_data_size)", index);
    else if (!filled) {
        ps_json again = *j;
        again.p = data;
        if (ps_data(&again, r, &got, index)) return -1;
    }
    got.given = 1;
    r->in[port] = got;
    return 0;
}

static int ps_read_output(ps_json *j, const ps_ports *ports, ps_request *r, int index) {
    ps_text key, name = {NULL, 0, 0};
    ps_wanted wanted = {-1, -1, 0};
    int parameters = 0, classified = 0;
    int more = ps_json_open(j, '{', '}', "an object in outputs");
    while (more == 1) {
        if (ps_json_string(j, &key, "a key") || ps_json_take(j, ':', "':'")) return -1;
        if (PS_IS(&key, "name")) {
            if (name.p) return ps_twice(j, "outputs", index, &key);
            if (ps_json_next(j) != '"') return ps_refuse(j->fault, 400, "outputs[%d].name: expected a string", index);
            if (ps_json_string(j, &name, "a string")) return -1;
        } else if (PS_IS(&key, "parameters")) {
            if (parameters) return ps_twice(j, "outputs", index, &key);
            parameters = 1;
            int inner = ps_json_open(j, '{', '}', "an object");
            while (inner == 1) {
                if (ps_json_string(j, &key, "a key") || ps_json_take(j, ':', "':'")) return -1;
                if (PS_IS(&key, "binary_data")) {
                    if (wanted.binary >= 0) return ps_twice(j, "outputs", index, &key);
                    if (ps_json_truth(j, "outputs", index, "binary_data", &wanted.binary)) return -1;
                } else if (PS_IS(&key, "classification")) {
                    if (classified++) return ps_twice(j, "outputs", index, &key);
                    if (ps_json_count(j, "outputs", index, "parameters.classification", &wanted.classes)) return -1;
                } else if (ps_is_shared_memory(&key))
                    return ps_no_shared_memory(j, "outputs", index);
                else if (ps_json_skip(j, 0))
                    return -1;
                inner = ps_json_more(j, '}');
            }
            if (inner < 0) return -1;
        } else if (ps_json_skip(j, 0))
            return -1;
        more = ps_json_more(j, '}');
    }
    if (more < 0) return -1;
    if (name.p == NULL) return ps_refuse(j->fault, 400, "outputs[%d].name: missing", index);
    for (int o = 0; o < ports->n_out; o++)
        if (ps_text_is(&name, ports->out[o].name, ports->out[o].name_n)) wanted.port = o;
    if (wanted.port < 0)
        return ps_refuse(j->fault, 400, "outputs[%d].name: no output is called \"%.*s\"; expected \"%.200s\"%s", index,
                         PS_SHOWN(&name), ports->n_out ? ports->out[0].name : "none",
                         ports->n_out > 1 ? " or another of the model's" : "");
    for (int o = 0; o < r->n_out; o++)
        if (r->out[o].port == wanted.port)
            return ps_refuse(j->fault, 400, "outputs[%d].name: \"%.*s\" is asked for twice", index, PS_SHOWN(&name));
    r->out[r->n_out++] = wanted; /* no name twice: at most n_out */
    return 0;
}

/* What is left once inputs and outputs stand: all inputs given, all outputs where none was named, rows. */
static int ps_request_settle(const ps_ports *ports, ps_request *r, int binary_default, ps_fault *fault) {
    for (int i = 0; i < ports->n_in; i++)
        if (!r->in[i].given) return ps_refuse(fault, 400, "inputs: \"%.200s\" is missing", ports->in[i].name);
    if (r->n_out == 0)
        for (; r->n_out < ports->n_out; r->n_out++) r->out[r->n_out] = (ps_wanted){r->n_out, -1, 0};
    for (int o = 0; o < r->n_out; o++) {
        ps_wanted *w = &r->out[o];
        const ps_port *port = &ports->out[w->port];
        if (w->binary < 0) w->binary = (int8_t)binary_default;
        if (w->classes && port->dtype == PS_DT_BYTES)
            return ps_refuse(fault, 400, "outputs[%d].parameters.classification: \"%.200s\" holds no numbers", o, port->name);
        if (!w->binary && !w->classes && (port->dtype == PS_DT_FP16 || port->dtype == PS_DT_BF16))
            return ps_refuse(fault, 400, "outputs[%d]: \"%.200s\" is %s, which has no JSON form; ask for it with binary_data",
                             o, port->name, ps_dtypes[port->dtype].name);
        if (w->binary) r->any_binary = 1;
        else r->any_json = 1;
        if (w->classes) r->any_classes = 1;
    }
    r->rows = ports->batched && ports->n_in ? r->in[0].dims[0] : 1;
    return 0;
}

/* Reads a whole header. begin: the document, for places in errors; p: where reading begins; opened: the brace, an id and
 * the comma behind it have been taken. Returns 0, or -1 with the reason in fault. */
static int ps_request_read(const ps_ports *ports, ps_request *r, const char *begin, const char *p, const char *end,
                           int opened, ps_fault *fault) {
    ps_json j = {p, end, begin, fault};
    ps_text key, text;
    int inputs = -1, outputs = -1, parameters = 0, has_id = opened, more = 1, seen = 0;
    int8_t binary = 0;
    if (!opened) more = ps_json_open(&j, '{', '}', "an object");
    while (more == 1) {
        if (ps_json_string(&j, &key, "a key") || ps_json_take(&j, ':', "':'")) return -1;
        if (PS_IS(&key, "id")) {
            if (has_id) return ps_refuse(fault, 400, "id: given twice");
            has_id = 1;
            if (ps_json_next(&j) != '"') return ps_refuse(fault, 400, "id: expected a string");
            if (ps_json_string(&j, &text, "a string")) return -1;
            r->id = text.p;
            r->id_n = text.n;
        } else if (PS_IS(&key, "inputs")) {
            if (inputs >= 0) return ps_refuse(fault, 400, "inputs: given twice");
            if (ps_json_next(&j) != '[') return ps_refuse(fault, 400, "inputs: expected an array");
            inputs = 0;
            int each = ps_json_open(&j, '[', ']', "an array");
            while (each == 1) {
                if (ps_json_next(&j) != '{') return ps_refuse(fault, 400, "inputs[%d]: expected an object", inputs);
                if (ps_read_input(&j, ports, r, inputs++)) return -1;
                each = ps_json_more(&j, ']');
            }
            if (each < 0) return -1;
        } else if (PS_IS(&key, "outputs")) {
            if (outputs >= 0) return ps_refuse(fault, 400, "outputs: given twice");
            if (ps_json_next(&j) != '[') return ps_refuse(fault, 400, "outputs: expected an array");
            outputs = 0;
            int each = ps_json_open(&j, '[', ']', "an array");
            while (each == 1) {
                if (ps_json_next(&j) != '{') return ps_refuse(fault, 400, "outputs[%d]: expected an object", outputs);
                if (ps_read_output(&j, ports, r, outputs++)) return -1;
                each = ps_json_more(&j, ']');
            }
            if (each < 0) return -1;
        } else if (PS_IS(&key, "parameters")) {
            if (parameters) return ps_refuse(fault, 400, "parameters: given twice");
            parameters = 1;
            if (ps_json_next(&j) != '{') return ps_refuse(fault, 400, "parameters: expected an object");
            int each = ps_json_open(&j, '{', '}', "an object");
            while (each == 1) {
                if (ps_json_string(&j, &key, "a key") || ps_json_take(&j, ':', "':'")) return -1;
                if (PS_IS(&key, "binary_data_output")) {
                    if (seen & 1) return ps_refuse(fault, 400, "parameters.binary_data_output: given twice");
                    seen |= 1;
                    if (ps_json_truth(&j, NULL, 0, "binary_data_output", &binary)) return -1;
                } else if (PS_IS(&key, "timeout")) {
                    if (seen & 2) return ps_refuse(fault, 400, "parameters.timeout: given twice");
                    seen |= 2;
                    if (ps_json_count(&j, NULL, 0, "timeout", &r->timeout_us)) return -1;
                } else if (PS_IS(&key, "priority")) {
                    int64_t priority;
                    if (seen & 4) return ps_refuse(fault, 400, "parameters.priority: given twice");
                    seen |= 4;
                    if (ps_json_count(&j, NULL, 0, "priority", &priority)) return -1;
                    r->priority = priority > INT32_MAX ? INT32_MAX : (int)priority;
                } else if (ps_json_skip(&j, 0))
                    return -1;
                each = ps_json_more(&j, '}');
            }
            if (each < 0) return -1;
        } else if (ps_json_skip(&j, 0))
            return -1;
        more = ps_json_more(&j, '}');
    }
    if (more < 0) return -1;
    ps_json_space(&j);
    if (j.p != j.end) return ps_json_bad(&j, "the end of the header");
    if (inputs < 0) return ps_refuse(fault, 400, "inputs: missing");
    return ps_request_settle(ports, r, binary, fault);
}

/* A body that is one tensor and nothing else: the model's only input, with its one free dimension by the length. */
static int ps_request_raw(const ps_ports *ports, ps_request *r, const char *data, size_t n, ps_fault *fault) {
    char shape[PS_TENSOR_RANK * 22 + 8];
    if (ports->n_in != 1)
        return ps_refuse(fault, 400, "raw binary request: the model has %d inputs; name them in a JSON header", ports->n_in);
    const ps_port *port = &ports->in[0];
    ps_input *in = &r->in[0];
    int64_t each = 1, elements;
    int open = -1;
    in->dtype = port->dtype;
    in->rank = port->rank;
    if (port->any_shape)
        return ps_refuse(fault, 400, "raw binary request: the model does not say its input's shape; give it in a JSON header");
    int unknown = 0;
    for (int d = 0; d < port->rank; d++) unknown += port->dims[d] < 0;
    for (int d = 0; d < port->rank; d++) {
        in->dims[d] = port->dims[d];
        if (port->dims[d] < 0 && unknown == 2 && d == 0) in->dims[d] = 1; /* the batch, where another is open */
        if (in->dims[d] < 0) {
            if (open >= 0)
                return ps_refuse(fault, 400, "raw binary request: shape %s is not fixed by a length; give it in a JSON header",
                                 ps_shape_text(port->dims, port->rank, shape));
            open = d;
        } else if (__builtin_mul_overflow(each, in->dims[d], &each))
            return ps_refuse(fault, 400, "raw binary request: the input's shape is beyond memory");
    }
    size_t size = ps_dtypes[port->dtype].size;
    if (size == 0) {
        elements = ps_bytes_count(data, n);
        if (elements < 0) return ps_refuse(fault, 400, "raw binary request: a length reaches beyond the %zu bytes", n);
    } else {
        elements = (int64_t)(n / size);
        if (n % size) elements = -1;
    }
    if (open >= 0 && elements >= 0 && each > 0 && elements % each == 0) in->dims[open] = elements / each;
    else if (open >= 0 || elements != each)
        return ps_refuse(fault, 400, "raw binary request: %zu bytes are no %s tensor of shape %s", n,
                         ps_dtypes[port->dtype].name, ps_shape_text(port->dims, port->rank, shape));
    in->count = elements;
    in->bytes = n;
    in->given = 1;
    r->binary_bytes = n;
    r->look = port->dtype == PS_DT_BOOL || port->dtype == PS_DT_BYTES;
    return ps_request_settle(ports, r, 1, fault);
}

/* Inputs whose bytes must be looked at, each time. */
static int ps_request_look(const ps_ports *ports, const ps_request *r, const char *const *data, ps_fault *fault) {
    for (int i = 0; i < ports->n_in; i++) {
        const ps_input *in = &r->in[i];
        if (in->inside) continue;
        if (in->dtype == PS_DT_BOOL) {
            int64_t bad = ps_bool_bad(data[i], in->bytes);
            if (bad >= 0)
                return ps_refuse(fault, 400, "input \"%.200s\": element %lld: expected 0 or 1, got %d", ports->in[i].name,
                                 (long long)bad, (unsigned char)data[i][bad]);
        } else if (in->dtype == PS_DT_BYTES) {
            int64_t count = ps_bytes_count(data[i], in->bytes);
            if (count < 0)
                return ps_refuse(fault, 400, "input \"%.200s\": a length reaches beyond its %zu bytes", ports->in[i].name,
                                 in->bytes);
            if (count != in->count)
                return ps_refuse(fault, 400, "input \"%.200s\": expected %lld elements, got %lld", ports->in[i].name,
                                 (long long)in->count, (long long)count);
        }
    }
    return 0;
}

#endif
