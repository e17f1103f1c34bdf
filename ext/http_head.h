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
    int foreign;            /* a browser says that a page of another origin asks: 1 Origin, 2 Sec-Fetch-Site, added */
    int navigates;          /* Sec-Fetch-Mode: navigate: a link that was followed, no page that reads the answer */
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

typedef struct {
    const char *p; /* NULL: there is no such field */
    size_t n;
} ps_http_text;

/* Where the port of host[:port] begins, n where there is none; one of an IPv6 address stands behind its bracket. */
static inline size_t ps_http_port_at(ps_http_text t) {
    for (size_t i = t.n; i > 0; i--) {
        if (t.p[i - 1] == ':') return i - 1;
        if (t.p[i - 1] < '0' || t.p[i - 1] > '9') break;
    }
    return t.n;
}

/* Whether an Origin names the host that the request is for. The schemes may differ (TLS may end before us); a port that
 * is not said is the one of the origin's scheme. */
static inline int ps_http_same_origin(ps_http_text origin, ps_http_text host) {
    const char *port = NULL;
    if (ps_http_is(origin.p, origin.n < 7 ? origin.n : 7, "http://", 7)) {
        origin.p += 7;
        origin.n -= 7;
        port = ":80";
    } else if (ps_http_is(origin.p, origin.n < 8 ? origin.n : 8, "https://", 8)) {
        origin.p += 8;
        origin.n -= 8;
        port = ":443";
    } else {
        return 0; /* null, a file, an extension */
    }
    size_t a = ps_http_port_at(origin), b = ps_http_port_at(host);
    if (a == 0 || a != b || strncasecmp(origin.p, host.p, a) != 0) return 0;
    ps_http_text pa = {origin.p + a, origin.n - a}, pb = {host.p + b, host.n - b};
    if (pa.n <= 1) pa = (ps_http_text){port, strlen(port)};
    if (pb.n <= 1) pb = (ps_http_text){port, strlen(port)};
    return pa.n == pb.n && memcmp(pa.p, pb.p, pa.n) == 0;
}

/* head: the request line and header lines up to and including the blank line. */
static inline ps_http_fields ps_http_scan(const char *head, size_t n) {
    ps_http_fields f = {.content_length = -1, .upgrade = -1, .inference = -1};
    ps_http_text host = {NULL, 0}, origin = {NULL, 0};
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
                host = (ps_http_text){v, value};
            } else if (ps_http_is(line, name, "origin", 6)) {
                f.foreign |= origin.p != NULL; /* two of them: not both can be ours */
                origin = (ps_http_text){v, value};
            } else if (ps_http_is(line, name, "sec-fetch-site", 14)) {
                if (!ps_http_is(v, value, "same-origin", 11) && !ps_http_is(v, value, "none", 4)) f.foreign |= 2;
            } else if (ps_http_is(line, name, "sec-fetch-mode", 14)) {
                f.navigates = ps_http_is(v, value, "navigate", 8);
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
    if (origin.p != NULL && (host.p == NULL || !ps_http_same_origin(origin, host))) f.foreign |= 1;
    return f;
}

#endif
