/* http_head.h (hot path): reading a request head that llhttp judges.
 *
 * Nothing here frames a message: llhttp accepts or refuses every head first, and says where a message ends. These
 * functions find the blank line, hash a head so that identical bytes need not be judged twice, and list the few
 * fields the server acts on. A scan is only used on a head that llhttp has accepted.
 */
#ifndef PENSTOCK_HTTP_HEAD_H
#define PENSTOCK_HTTP_HEAD_H

#include <stdint.h>
#include <string.h>
#include <strings.h>
#include <time.h>

static inline int64_t ps_http_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Bytes up to and including the first CR LF CR LF, or -1. */
static inline int64_t ps_http_blank_line(const char *p, size_t n) {
    const char *end = p + n, *at = p;
    while (at < end && (at = (const char *)memchr(at, '\n', (size_t)(end - at))) != NULL) {
        if (at - p >= 3 && at[-1] == '\r' && at[-2] == '\n' && at[-3] == '\r') return at + 1 - p;
        at++;
    }
    return -1;
}

static inline uint64_t ps_http_hash(const char *p, size_t n) {
    uint64_t h = n * 0x9E3779B97F4A7C15u, w;
    while (n >= 8) {
        memcpy(&w, p, 8);
        h = (h ^ w) * 0x9FB21C651E98DF25u;
        h ^= h >> 32;
        p += 8;
        n -= 8;
    }
    w = 0;
    memcpy(&w, p, n);
    h = (h ^ w) * 0x9FB21C651E98DF25u;
    return h ^ (h >> 29);
}

typedef struct {
    int64_t content_length; /* -1: none given */
    uint32_t fields;        /* header lines */
    uint32_t hosts;
    int chunked;            /* 0 no Transfer-Encoding, 1 exactly "chunked", 2 anything else */
    int expect;             /* 0 none, 1 "100-continue", 2 anything else */
    int encoding;           /* Content-Encoding: 0 none or identity, 1 gzip, 2 deflate, 3 anything else */
    int accepts;            /* Accept-Encoding: 1 gzip, 2 deflate, added */
    int64_t upgrade;        /* offset of the Upgrade field name, or -1 */
    int64_t inference;      /* Inference-Header-Content-Length: -1 none, -2 no number */
} ps_http_fields;

static inline int ps_http_is(const char *p, size_t n, const char *name, size_t name_n) {
    return n == name_n && strncasecmp(p, name, n) == 0;
}

/* Digits to a number; -2 where there is anything else, or nothing. */
static inline int64_t ps_http_number(const char *v, size_t n) {
    int64_t total = 0;
    if (n == 0 || n > 15) return -2;
    for (size_t i = 0; i < n; i++) {
        if (v[i] < '0' || v[i] > '9') return -2;
        total = total * 10 + (v[i] - '0');
    }
    return total;
}

/* Which of gzip (1) and deflate (2) an Accept-Encoding names with a weight that is not 0. */
static inline int ps_http_accepts(const char *v, size_t n) {
    const char *end = v + n;
    int found = 0;
    while (v < end) {
        const char *stop = (const char *)memchr(v, ',', (size_t)(end - v));
        if (stop == NULL) stop = end;
        while (v < stop && (*v == ' ' || *v == '\t')) v++;
        const char *name = v;
        while (v < stop && *v != ';' && *v != ' ' && *v != '\t') v++;
        size_t name_n = (size_t)(v - name);
        int bit = ps_http_is(name, name_n, "gzip", 4) ? 1 : ps_http_is(name, name_n, "deflate", 7) ? 2 : 0;
        int zero = 0;
        for (const char *q = v; q + 2 < stop; q++)
            if ((*q == 'q' || *q == 'Q') && q[1] == '=') {
                zero = q[2] == '0';
                for (q += 3; q < stop && (*q == '.' || (*q >= '0' && *q <= '9')); q++)
                    if (*q >= '1' && *q <= '9') zero = 0;
                break;
            }
        if (!zero) found |= bit;
        v = stop + 1;
    }
    return found;
}

/* head: the request line and header lines up to and including the blank line. */
static inline ps_http_fields ps_http_scan(const char *head, size_t n) {
    ps_http_fields f = {-1, 0, 0, 0, 0, 0, 0, -1, -1};
    const char *end = head + n, *line = (const char *)memchr(head, '\n', n);
    if (line != NULL) line++;
    while (line != NULL && line < end && *line != '\r') {
        const char *eol = (const char *)memchr(line, '\n', (size_t)(end - line));
        if (eol == NULL) break;
        const char *colon = (const char *)memchr(line, ':', (size_t)(eol - line));
        f.fields++;
        if (colon != NULL) {
            size_t name = (size_t)(colon - line);
            const char *v = colon + 1, *v_end = eol;
            while (v < v_end && (*v == ' ' || *v == '\t')) v++;
            while (v_end > v && (v_end[-1] == '\r' || v_end[-1] == ' ' || v_end[-1] == '\t')) v_end--;
            size_t value = (size_t)(v_end - v);
            if (ps_http_is(line, name, "host", 4)) {
                f.hosts++;
            } else if (ps_http_is(line, name, "content-length", 14)) {
                int64_t total = 0;
                for (size_t i = 0; i < value; i++) {
                    if (v[i] < '0' || v[i] > '9') break;
                    if (total > (INT64_MAX - 9) / 10) { total = INT64_MAX; break; }
                    total = total * 10 + (v[i] - '0');
                }
                f.content_length = total;
            } else if (ps_http_is(line, name, "transfer-encoding", 17)) {
                f.chunked = f.chunked == 0 && ps_http_is(v, value, "chunked", 7) ? 1 : 2;
            } else if (ps_http_is(line, name, "expect", 6)) {
                f.expect = f.expect == 0 && ps_http_is(v, value, "100-continue", 12) ? 1 : 2;
            } else if (ps_http_is(line, name, "content-encoding", 16)) {
                int gzip = ps_http_is(v, value, "gzip", 4) || ps_http_is(v, value, "x-gzip", 6);
                int coding = ps_http_is(v, value, "identity", 8) ? 0 : gzip ? 1 : ps_http_is(v, value, "deflate", 7) ? 2 : 3;
                if (coding) f.encoding = f.encoding ? 3 : coding;
            } else if (ps_http_is(line, name, "accept-encoding", 15)) {
                f.accepts |= ps_http_accepts(v, value);
            } else if (ps_http_is(line, name, "inference-header-content-length", 31)) {
                f.inference = f.inference == -1 ? ps_http_number(v, value) : -2;
            } else if (ps_http_is(line, name, "upgrade", 7)) {
                f.upgrade = line - head;
            }
        }
        line = eol + 1;
    }
    return f;
}

#endif
