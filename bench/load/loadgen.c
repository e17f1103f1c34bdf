/* loadgen.c: the load generator of the benchmarks: HTTP/1.1 and RESP (one thread, epoll, connections that stay open).
 *
 * Closed loop: every connection sends its next request when the last one is answered; measures throughput.
 * Open loop (--rate): Poisson arrivals at intended times that do not depend on the server; a request that finds no
 * idle connection waits here, and its latency still counts from the intended time (no coordinated omission). With
 * --burst B arrivals come B at once and are sent together on one connection, as a pipelining client sends them.
 * What must stay true: every request that was due ends in exactly one of the counters, so that within the window
 * offered = good + late + refused + failed + unsent; and the histogram of all never understates: an unanswered request
 * is recorded at its age. The ok_* quantiles are of the requests answered 200 alone.
 *   good     answered 200 within --deadline-us of its due time (without a deadline: answered 200)
 *   late     answered 200 after it
 *   refused  answered 503 (RESP: -BUSY)
 *   failed   another status, lost, timed out, not understood
 *   unsent   found no idle connection within --patience-us of its due time and was given up
 *
 * Output: one JSON object on stdout. Body file: one request body per line, used in turn; with --framed, each body stands
 * behind its length (4 bytes, little endian) instead, so that it may be binary. --body-raw: the file is one body.
 * --request-raw: the file is one whole HTTP request, sent byte for byte (what another client sent, say); with --framed,
 * as many as there are.
 * Marks in a body become event times, of the k-th request --stamp-start + k * --stamp-step:
 *   20 '@'                          RFC 3339, UTC, seconds
 *   16 '#'                          a JSON integer in units of which --stamp-unit make a second, spaces behind it
 *   0xd3 or 0xcf, and then 8 '@'    a MessagePack integer of 8 bytes in the same units
 *
 * RESP: a request is --command (words between spaces) with one body as the last argument, or --command alone. An answer is
 * any RESP2 or RESP3 value, nested ones too; pushes are passed over. Statuses stand for answers: 200 a value, 404 a null,
 * 503 an error that begins with BUSY, 400 another error (also one inside an array).
 * cc -O2 loadgen.c -o loadgen -lm
 *
 * Checked once against wrk 4.1 (-t1 -c64; client on core 1, load/floor_server.py on core 0, five interleaved runs of
 * 4 s on a two-core VM, medians): 166.6k requests/s here, 168.6k with wrk; with a busy neighbour 60.6k and 54.7k; the
 * server's CPU per request 4.8 and 5.0 us. The mean latency here equals connections / throughput (Little's law); wrk's
 * p50 is lower (0.17 ms against 0.36) as it starts its clock when it writes, which here counts from the last answer.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define NANO 1000000000LL

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * NANO + t.tv_nsec;
}

static void die(const char *what, const char *detail) {
    fprintf(stderr, "loadgen: %s%s%s\n", what, detail ? ": " : "", detail ? detail : "");
    exit(2);
}

/* ---- histogram: log-linear, 128 steps per power of two, so a value is off by at most 1/256 of itself ---- */

#define SUB_BITS 7
#define SUB (1 << SUB_BITS)
#define BUCKETS ((64 - SUB_BITS + 1) * SUB)

typedef struct {
    uint64_t count[BUCKETS], total;
    int64_t max, min;
    double sum;
} histogram;

static int bucket_of(uint64_t v) {
    if (v < SUB) return (int)v;
    int shift = 63 - __builtin_clzll(v) - SUB_BITS;
    return (shift + 1) * SUB + (int)((v >> shift) - SUB);
}

static double bucket_middle(int b) {
    if (b < SUB) return b;
    int shift = b / SUB - 1;
    double low = ldexp((double)(b % SUB + SUB), shift);
    return low + (ldexp(1.0, shift) - 1) / 2;
}

static void record(histogram *h, int64_t v) {
    if (v < 0) v = 0;
    h->count[bucket_of((uint64_t)v)]++;
    if (!h->total || v > h->max) h->max = v;
    if (!h->total || v < h->min) h->min = v;
    h->total++;
    h->sum += (double)v;
}

/* The value at rank ceil(q * total), as the middle of its bucket. */
static double quantile(const histogram *h, double q) {
    if (!h->total) return NAN;
    uint64_t rank = (uint64_t)ceil(q * (double)h->total), seen = 0;
    if (rank < 1) rank = 1;
    for (int b = 0; b < BUCKETS; b++) {
        seen += h->count[b];
        if (seen >= rank) {
            double v = bucket_middle(b);
            return v > (double)h->max ? (double)h->max : v < (double)h->min ? (double)h->min : v;
        }
    }
    return (double)h->max;
}

static void print_number(const char *name, double v) {
    if (isfinite(v)) printf("\"%s\": %.3f, ", name, v);
    else printf("\"%s\": null, ", name);
}

static void print_histogram(const histogram *h, double unit) {
    print_number("mean_us", h->total ? h->sum / (double)h->total / unit : NAN);
    print_number("p50_us", quantile(h, 0.50) / unit);
    print_number("p90_us", quantile(h, 0.90) / unit);
    print_number("p99_us", quantile(h, 0.99) / unit);
    print_number("p999_us", quantile(h, 0.999) / unit);
    print_number("max_us", h->total ? (double)h->max / unit : NAN);
}

/* ---- requests ---- */

enum { NO_STAMP, STAMP_TEXT, STAMP_DIGITS, STAMP_BINARY };

typedef struct {
    char *bytes;
    uint32_t length;
    uint32_t stamp_at; /* offset of the event time in bytes */
    int stamp;
} request;

static request *requests;
static size_t n_requests, next_request;
static int64_t stamp_next = 1522540800, stamp_step = 1; /* 2018-04-01T00:00:00Z */
static int64_t stamp_unit = 1000000;
static const char MARK[] = "@@@@@@@@@@@@@@@@@@@@", DIGITS_MARK[] = "################";

/* RFC 3339 of a second since 1970, 20 characters; the date is the civil-from-days formula of the Gregorian calendar. */
static void write_stamp(char *out, int64_t seconds) {
    static int64_t cached_day = INT64_MIN;
    static char date[11];
    int64_t day = seconds / 86400, rest = seconds % 86400;
    if (rest < 0) rest += 86400, day--;
    if (day != cached_day) {
        int64_t z = day + 719468, era = (z >= 0 ? z : z - 146096) / 146097;
        unsigned doe = (unsigned)(z - era * 146097), yoe = (doe - doe / 1460 + doe / 36524 - doe / 146096) / 365;
        unsigned doy = doe - (365 * yoe + yoe / 4 - yoe / 100), mp = (5 * doy + 2) / 153;
        unsigned d = doy - (153 * mp + 2) / 5 + 1, m = mp < 10 ? mp + 3 : mp - 9;
        unsigned y = (unsigned)((int64_t)yoe + era * 400 + (m <= 2)) % 10000;
        char text[32];
        snprintf(text, sizeof text, "%04u-%02u-%02u", y, m % 100, d % 100);
        memcpy(date, text, 10);
        cached_day = day;
    }
    int h = (int)(rest / 3600), mi = (int)(rest / 60 % 60), s = (int)(rest % 60);
    memcpy(out, date, 10);
    out[10] = 'T', out[11] = (char)('0' + h / 10), out[12] = (char)('0' + h % 10);
    out[13] = ':', out[14] = (char)('0' + mi / 10), out[15] = (char)('0' + mi % 10);
    out[16] = ':', out[17] = (char)('0' + s / 10), out[18] = (char)('0' + s % 10), out[19] = 'Z';
}

static void stamp(char *request_bytes, const request *r) {
    char *at = request_bytes + r->stamp_at, digits[32];
    int64_t value = stamp_next * stamp_unit;
    if (r->stamp == STAMP_TEXT) {
        write_stamp(at, stamp_next);
    } else if (r->stamp == STAMP_DIGITS) {
        int n = snprintf(digits, sizeof digits, "%lld", (long long)value);
        if (n > 16) die("--stamp-start: more than 16 digits in these units", NULL);
        memset(at, ' ', 16);
        memcpy(at, digits, (size_t)n);
    } else {
        for (int i = 0; i < 8; i++) at[i] = (char)((uint64_t)value >> (56 - 8 * i));
    }
    stamp_next += stamp_step;
}

/* Finds the mark of an event time in the last `length` bytes of a request. */
static void find_stamp(request *r, size_t length) {
    char *body = r->bytes + r->length - length, *mark;
    if ((mark = memmem(body, length, MARK, 20))) {
        r->stamp = STAMP_TEXT;
    } else if ((mark = memmem(body, length, DIGITS_MARK, 16))) {
        r->stamp = STAMP_DIGITS;
    } else {
        const char *end = body + length;
        for (mark = body; (mark = memmem(mark, (size_t)(end - mark), MARK, 8)); mark++)
            if (mark > body && ((mark[-1] & 0xff) == 0xd3 || (mark[-1] & 0xff) == 0xcf)) break;
        if (!mark) return;
        r->stamp = STAMP_BINARY;
    }
    r->stamp_at = (uint32_t)(mark - r->bytes);
}

static char *read_file(const char *file, size_t *length) {
    FILE *f = fopen(file, "rb");
    if (!f) die(file, strerror(errno));
    size_t cap = 1 << 16, n = 0, got;
    char *data = malloc(cap);
    while (data && (got = fread(data + n, 1, cap - n, f)) > 0)
        if ((n += got) == cap) data = realloc(data, cap *= 2);
    if (!data) die("out of memory", NULL);
    if (ferror(f)) die(file, "could not be read");
    fclose(f);
    *length = n;
    return data;
}

/* What every request begins with: the head of HTTP without Content-Length's number, or the words of a command. */
static char lead[8192];
static int lead_words; /* RESP: words of the command; -1: HTTP, -2: requests are whole already */

static void lead_of_http(const char *method, const char *path, const char *host, int port, const char *extra) {
    const char *type = strcasestr(extra, "content-type:") ? "" : "Content-Type: application/json\r\n";
    int n = snprintf(lead, sizeof lead, "%s %s HTTP/1.1\r\nHost: %s:%d\r\n%s%sContent-Length: ", method, path, host, port,
                     type, extra);
    if (n >= (int)sizeof lead) die("the header does not fit in 8192 bytes", NULL);
    lead_words = -1;
}

static void lead_of_resp(const char *command) {
    size_t used = 0;
    for (const char *p = command; *(p += strspn(p, " ")); p += strcspn(p, " ")) {
        int n = (int)strcspn(p, " ");
        used += (size_t)snprintf(lead + used, sizeof lead - used, "$%d\r\n%.*s\r\n", n, n, p);
        if (used >= sizeof lead) die("--command: more than 8192 bytes", NULL);
        lead_words++;
    }
    if (!lead_words) die("--protocol resp needs --command, such as --command 'PENSTOCK.SCORE fraud'", NULL);
}

/* body NULL: a request without one. */
static void add_request(const char *body, size_t length) {
    static size_t room;
    char head[sizeof lead + 64];
    int n = 0;
    if (n_requests == room) {
        room = room ? 2 * room : 1024;
        if (!(requests = realloc(requests, room * sizeof *requests))) die("out of memory", NULL);
    }
    if (lead_words == -1) n = snprintf(head, sizeof head, "%s%zu\r\n\r\n", lead, length);
    else if (lead_words > 0 && body) n = snprintf(head, sizeof head, "*%d\r\n%s$%zu\r\n", lead_words + 1, lead, length);
    else if (lead_words > 0) n = snprintf(head, sizeof head, "*%d\r\n%s", lead_words, lead);
    const char *tail = lead_words > 0 && body ? "\r\n" : "";
    request *r = &requests[n_requests++];
    size_t total = (size_t)n + length;
    if (total + 2 > UINT32_MAX) die("a request is larger than 4 GB", NULL);
    if (!(r->bytes = malloc(total + 3))) die("out of memory", NULL);
    memcpy(r->bytes, head, (size_t)n);
    if (length) memcpy(r->bytes + n, body, length);
    r->length = (uint32_t)total;
    r->stamp = NO_STAMP;
    if (length) find_stamp(r, length);
    memcpy(r->bytes + total, tail, strlen(tail) + 1);
    r->length += (uint32_t)strlen(tail);
}

static void load_requests(const char *file, int framed) {
    size_t n;
    if (!file) {
        add_request(NULL, 0);
        return;
    }
    char *data = read_file(file, &n), *p = data, *end = data + n;
    while (p < end) {
        if (framed) {
            uint32_t length;
            if (end - p < 4) die(file, "ends inside a length");
            memcpy(&length, p, 4);
            if ((size_t)(end - p - 4) < length) die(file, "ends inside a body");
            add_request(p + 4, length);
            p += 4 + length;
        } else {
            char *stop = memchr(p, '\n', (size_t)(end - p));
            char *last = stop ? stop : end;
            size_t length = (size_t)(last - p);
            while (length && p[length - 1] == '\r') length--;
            add_request(p, length);
            p = last + 1;
        }
    }
    free(data);
    if (!n_requests) die("the body file holds nothing", file);
}

/* ---- connections ---- */

enum { HEAD, BODY, CHUNK_SIZE, CHUNK_DATA, CHUNK_TRAILER };
enum { OK = 200, FAILED = 400, NOT_THERE = 404, REFUSED = 503 };

typedef struct {
    int fd; /* -1: down, to be connected again at retry_at */
    int64_t retry_at;
    char *in, *out;
    size_t in_used, in_cap, out_used, out_sent, out_cap;
    int64_t *due; /* ring of the times from which each request in flight is timed */
    uint32_t head, in_flight;
    int64_t sent_at; /* of the oldest request in flight */
    int state, status, chunked, closing, waits_for_out;
    int64_t left; /* HTTP: bytes to come of the body or chunk; RESP: of the string */
    int64_t values; /* RESP: values to come until the answer is whole */
    int push;
} connection;

static struct sockaddr_storage address;
static socklen_t address_length;
static int epoll_fd;
static uint32_t depth = 1, burst = 1;
static int is_resp;
static connection *connections;
static uint32_t n_connections = 64;

static histogram latency, ok_latency, send_lag;
static uint64_t ok_total, bytes_in, err_status, err_connect, err_lost, err_timeout, err_format;
static uint64_t offered, good, late, refused, failed, unsent; /* of requests in the window */
static int64_t deadline = INT64_MAX, patience = INT64_MAX;
static uint64_t to_send = UINT64_MAX; /* --requests: how many may still be sent */
static uint64_t status_count[600];
static char first_error[400];
static int64_t window_start, window_end; /* open loop: of due times; closed loop: of answer times */
static int is_open;
static uint64_t waiting_for_answer; /* over all connections */

static void note_error(const char *data, size_t n) {
    if (first_error[0] || !n) return;
    if (n > sizeof first_error - 1) n = sizeof first_error - 1;
    memcpy(first_error, data, n);
    first_error[n] = 0;
}

static void open_connection(connection *c, int64_t now) {
    c->in_used = c->out_used = c->out_sent = 0;
    c->head = c->in_flight = 0;
    c->state = HEAD;
    c->values = 1;
    c->closing = c->waits_for_out = c->push = 0;
    c->status = OK;
    c->fd = socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (c->fd < 0) die("socket", strerror(errno));
    if (connect(c->fd, (struct sockaddr *)&address, address_length)) {
        note_error(strerror(errno), strlen(strerror(errno)));
        err_connect++;
        close(c->fd);
        c->fd = -1;
        c->retry_at = now + 20 * 1000000LL;
        return;
    }
    int one = 1;
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    fcntl(c->fd, F_SETFL, fcntl(c->fd, F_GETFL) | O_NONBLOCK);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &e)) die("epoll_ctl", strerror(errno));
}

static int in_window(int64_t when) {
    return when >= window_start && when < window_end;
}

/* The requests in flight of a connection will not be answered. */
static void give_up(connection *c, int64_t now) {
    for (uint32_t i = 0; i < c->in_flight; i++) {
        int64_t due = c->due[(c->head + i) % depth];
        if (!in_window(is_open ? due : now)) continue;
        failed++;
        if (is_open) record(&latency, now - due);
    }
}

/* Closes a connection and opens it again; what was in flight is counted into *counter. */
static void reopen(connection *c, int64_t now, uint64_t *counter) {
    *counter += c->in_flight;
    waiting_for_answer -= c->in_flight;
    give_up(c, now);
    close(c->fd);
    open_connection(c, now);
}

static void watch_out(connection *c, int on) {
    if (c->waits_for_out == on) return;
    struct epoll_event e = {.events = EPOLLIN | (on ? EPOLLOUT : 0), .data.ptr = c};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &e);
    c->waits_for_out = on;
}

static void queue_request(connection *c, int64_t due, int64_t now) {
    request *r = &requests[next_request];
    if (++next_request == n_requests) next_request = 0;
    if (c->out_used + r->length > c->out_cap) {
        c->out_cap = 2 * (c->out_used + r->length);
        if (!(c->out = realloc(c->out, c->out_cap))) die("out of memory", NULL);
    }
    char *at = c->out + c->out_used;
    memcpy(at, r->bytes, r->length);
    if (r->stamp) stamp(at, r);
    to_send--;
    c->out_used += r->length;
    if (!c->in_flight) c->sent_at = now;
    c->due[(c->head + c->in_flight++) % depth] = due;
    waiting_for_answer++;
}

/* Returns 0 when the connection was lost. */
static int flush_out(connection *c, int64_t now) {
    while (c->out_sent < c->out_used) {
        ssize_t n = send(c->fd, c->out + c->out_sent, c->out_used - c->out_sent, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno == EINTR) continue;
            if (errno == EAGAIN) {
                watch_out(c, 1);
                return 1;
            }
            note_error(strerror(errno), strlen(strerror(errno)));
            reopen(c, now, &err_lost);
            return 0;
        }
        c->out_sent += (size_t)n;
    }
    c->out_used = c->out_sent = 0;
    watch_out(c, 0);
    return 1;
}

static void answered(connection *c, int64_t now) {
    int64_t due = c->due[c->head];
    c->head = (c->head + 1) % depth;
    c->in_flight--;
    waiting_for_answer--;
    c->sent_at = now;
    status_count[c->status >= 0 && c->status < 600 ? c->status : 0]++;
    if (c->status == OK) ok_total++;
    else err_status++;
    if (!in_window(is_open ? due : now)) return;
    record(&latency, now - due);
    if (c->status == OK) {
        record(&ok_latency, now - due);
        if (now - due <= deadline) good++;
        else late++;
    } else if (c->status == REFUSED) {
        refused++;
    } else {
        failed++;
    }
}

/* Reads a status line and the headers that frame the body. Returns 0 if this is not HTTP. */
static int read_head(connection *c, const char *p, const char *end) {
    if (end - p < 12 || memcmp(p, "HTTP/1.", 7)) return 0;
    c->status = atoi(p + 9);
    c->closing |= p[7] == '0';
    c->chunked = 0;
    c->left = -1;
    for (p = memchr(p, '\n', (size_t)(end - p)); p && ++p < end; p = memchr(p, '\n', (size_t)(end - p))) {
        char first = (char)(*p | 0x20);
        if (first == 'c' && !strncasecmp(p, "content-length:", 15)) c->left = atoll(p + 15);
        else if (first == 't' && !strncasecmp(p, "transfer-encoding: chunked", 26)) c->chunked = 1;
        else if (first == 'c' && !strncasecmp(p, "connection: close", 17)) c->closing = 1;
    }
    if (c->status == 204 || c->status == 304) c->left = 0;
    return c->chunked || c->left >= 0;
}

/* Consumes the RESP values in c->in: a count of values to come stands for all nesting. Returns 0 when it is no RESP. */
static int read_values(connection *c, int64_t now) {
    char *p = c->in, *end = c->in + c->in_used;
    for (;;) {
        if (c->state == BODY) {
            int64_t n = end - p < c->left ? end - p : c->left;
            p += n;
            c->left -= n;
            if (c->left) break;
            if (p[-1] != '\n') return 0;
            c->state = HEAD;
            c->values--;
        } else {
            char *stop = memchr(p, '\n', (size_t)(end - p));
            if (!stop) break;
            if (stop - p < 2 || stop[-1] != '\r') return 0;
            int top = c->values == 1 && !c->push && c->status == OK;
            char kind = *p, *rest;
            int64_t n = 0;
            if (kind == '>') c->push = 1;
            else if (!c->in_flight) return 0;
            if (kind == '$' || kind == '!' || kind == '=' || kind == '*' || kind == '~' || kind == '%' || kind == '|' ||
                kind == '>') {
                n = strtoll(p + 1, &rest, 10);
                if (rest == p + 1 || rest != stop - 1 || n < -1 || n > (1LL << 40)) return 0;
                if (kind == '!' && end - stop - 1 < n + 2) break; /* its code is wanted: all of it must be there */
            }
            switch (kind) {
            case '-':
            case '!':
                if (!c->push) {
                    note_error(p, (size_t)(end - p));
                    const char *code = kind == '-' ? p + 1 : stop + 1;
                    c->status = end - code >= 4 && !memcmp(code, "BUSY", 4) ? REFUSED : FAILED;
                }
                if (kind == '-') {
                    c->values--;
                    break;
                } /* fall through */
            case '$':
            case '=':
                if (n < 0) {
                    if (top) c->status = NOT_THERE;
                    c->values--;
                } else {
                    c->left = n + 2;
                    c->state = BODY;
                }
                break;
            case '_':
                if (top) c->status = NOT_THERE;
                c->values--;
                break;
            case '+':
            case ':':
            case ',':
            case '#':
            case '(':
                c->values--;
                break;
            case '*':
            case '~':
            case '>':
                if (n < 0 && top) c->status = NOT_THERE;
                c->values += (n < 0 ? 0 : n) - 1;
                break;
            case '%':
                c->values += 2 * n - 1;
                break;
            case '|': /* an attribute: it and then the value that it belongs to */
                c->values += 2 * n;
                break;
            default:
                return 0;
            }
            p = stop + 1;
        }
        if (c->state == HEAD && c->values == 0) {
            c->values = 1;
            if (c->push) c->push = 0;
            else answered(c, now);
            c->status = OK;
        }
    }
    c->in_used = (size_t)(end - p);
    if (c->in_used && p != c->in) memmove(c->in, p, c->in_used);
    return 1;
}

/* Consumes what is in c->in. Returns 0 when the answer cannot be understood. */
static int read_answers(connection *c, int64_t now) {
    if (is_resp) return read_values(c, now);
    char *p = c->in, *end = c->in + c->in_used;
    for (;;) {
        if (c->state == HEAD) {
            char *stop = end - p >= 4 ? memmem(p, (size_t)(end - p), "\r\n\r\n", 4) : NULL;
            if (!stop) break;
            if (!c->in_flight || !read_head(c, p, stop + 2)) return 0;
            if (c->status != OK) note_error(p, (size_t)(end - p));
            p = stop + 4;
            c->state = c->chunked ? CHUNK_SIZE : BODY;
        } else if (c->state == BODY || c->state == CHUNK_DATA) {
            int64_t n = end - p < c->left ? end - p : c->left;
            p += n;
            c->left -= n;
            if (c->left) break;
            if (c->state == CHUNK_DATA) {
                c->state = CHUNK_SIZE;
            } else {
                answered(c, now);
                c->state = HEAD;
                if (c->closing) break;
            }
        } else {
            char *stop = memchr(p, '\n', (size_t)(end - p));
            if (!stop) break;
            if (c->state == CHUNK_SIZE) {
                c->left = strtoll(p, NULL, 16);
                if (c->left < 0 || !isxdigit((unsigned char)*p)) return 0;
                c->state = c->left ? CHUNK_DATA : CHUNK_TRAILER;
                c->left += 2;
            } else if (stop - p <= 1) {
                c->left = 0;
                c->state = BODY; /* nothing left: the next turn counts the answer */
            }
            p = stop + 1;
        }
    }
    c->in_used = (size_t)(end - p);
    if (c->in_used && p != c->in) memmove(c->in, p, c->in_used);
    return 1;
}

/* Returns 0 when the connection was lost or replaced. */
static int receive(connection *c, int64_t now) {
    if (c->in_cap - c->in_used < 16384) {
        c->in_cap = c->in_cap ? 2 * c->in_cap : 65536;
        if (!(c->in = realloc(c->in, c->in_cap))) die("out of memory", NULL);
    }
    ssize_t n = recv(c->fd, c->in + c->in_used, c->in_cap - c->in_used, 0);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return 1;
    if (n <= 0) {
        if (c->in_flight) note_error("connection lost", 15);
        reopen(c, now, &err_lost);
        return 0;
    }
    bytes_in += (uint64_t)n;
    c->in_used += (size_t)n;
    if (!read_answers(c, now)) {
        note_error(c->in, c->in_used);
        reopen(c, now, &err_format);
        return 0;
    }
    if (c->closing && c->state == HEAD) {
        reopen(c, now, &err_lost);
        return 0;
    }
    return 1;
}

/* ---- open loop: arrivals that no connection could take yet, oldest first ---- */

static int64_t *backlog;
static size_t backlog_head, backlog_count, backlog_cap;

static void backlog_push(int64_t due) {
    if (backlog_count == backlog_cap) {
        size_t cap = backlog_cap ? 2 * backlog_cap : 4096;
        int64_t *grown = malloc(cap * sizeof *grown);
        if (!grown) die("out of memory", NULL);
        for (size_t i = 0; i < backlog_count; i++) grown[i] = backlog[(backlog_head + i) % backlog_cap];
        free(backlog);
        backlog = grown, backlog_cap = cap, backlog_head = 0;
    }
    backlog[(backlog_head + backlog_count++) % backlog_cap] = due;
}

static uint64_t random_state = 42;

static double exponential(void) { /* splitmix64, then inversion */
    uint64_t z = (random_state += 0x9e3779b97f4a7c15ULL);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    z ^= z >> 31;
    return -log(((double)(z >> 11) + 0.5) * 0x1p-53);
}

static int64_t backlog_pop(void) {
    int64_t due = backlog[backlog_head];
    backlog_head = (backlog_head + 1) % backlog_cap;
    backlog_count--;
    return due;
}

static void dispatch(int64_t now) {
    static uint32_t turn;
    for (uint32_t tried = 0; backlog_count && tried < n_connections; tried++) {
        connection *c = &connections[turn];
        turn = turn + 1 == n_connections ? 0 : turn + 1;
        if (c->fd < 0 || c->in_flight + burst > depth) continue;
        for (uint32_t i = 0; i < burst && backlog_count; i++) {
            int64_t due = backlog_pop();
            if (in_window(due)) record(&send_lag, now - due);
            queue_request(c, due, now);
        }
        flush_out(c, now);
    }
    /* Only what found no connection is given up: that this program itself came late is not the server's. */
    while (backlog_count && now - backlog[backlog_head] > patience) {
        int64_t due = backlog_pop();
        if (!in_window(due)) continue;
        unsent++;
        record(&latency, now - due);
    }
}

static void fill(connection *c, int64_t now) {
    if (c->fd < 0) return;
    while (c->in_flight < depth && to_send) queue_request(c, now, now);
    flush_out(c, now);
}

static void json_text(const char *s) {
    putchar('"');
    for (; *s; s++) {
        unsigned char ch = (unsigned char)*s;
        if (ch == '"' || ch == '\\') printf("\\%c", ch);
        else if (ch == '\n') printf("\\n");
        else if (ch < 32 || ch > 126) printf("\\u%04x", ch);
        else putchar(ch);
    }
    putchar('"');
}

/* --histogram: numbers on stdin, quantiles on stdout, so that a test can compare them with exact ones. */
static int histogram_main(void) {
    long long v;
    while (scanf("%lld", &v) == 1) record(&latency, v);
    printf("{");
    print_histogram(&latency, 1.0);
    printf("\"count\": %llu}\n", (unsigned long long)latency.total);
    return 0;
}

/* --gaps N: N gaps between arrivals in seconds at --rate and --seed, one per line, for the same reason. */
static int gaps_main(long n, double rate) {
    for (long i = 0; i < n; i++) printf("%.9g\n", exponential() / rate);
    return 0;
}

static double number(const char *name, const char *text, double low) {
    char *end;
    double v = strtod(text, &end);
    if (*end || end == text || !isfinite(v) || v < low) {
        fprintf(stderr, "loadgen: %s: expected a number of at least %g, got \"%s\"\n", name, low, text);
        exit(2);
    }
    return v;
}

static const char USAGE[] =
    "usage: loadgen --port P [--host 127.0.0.1] [--path /] [--method POST] [--bodies FILE] [--header 'Name: value']\n"
    "               [--connections 64] [--pipeline 1] [--duration 5] [--warmup 0] [--timeout 5] [--cpu N] [--seed 42]\n"
    "               [--requests N]        closed loop: end after N requests, if --duration does not end first\n"
    "               [--framed]            bodies stand behind their lengths (4 bytes, little endian), not on lines\n"
    "               [--body-raw FILE]     the file is one body\n"
    "               [--request-raw FILE]  the file is one whole request, sent as it is; with --framed, several\n"
    "               [--protocol resp --command 'WORD ...']   Redis protocol: the command, a body as its last argument\n"
    "               [--rate R]            open loop: R Poisson arrivals per second (default: closed loop)\n"
    "               [--burst 1]           open loop: so many arrive at once, on one connection (at most --pipeline)\n"
    "               [--deadline-us D]     an answer is good within D of its due time\n"
    "               [--patience-us P]     open loop: what could not be sent within P of its due time is given up\n"
    "               [--sleep]             open loop: sleep between arrivals (default: spin, for exact send times)\n"
    "               [--stamp-start S] [--stamp-step S] [--stamp-unit 1000000]   event times in marks, unix seconds\n"
    "       loadgen --histogram < numbers\n"
    "       loadgen --gaps N --rate R [--seed 42]\n";

int main(int argc, char **argv) {
    const char *host = "127.0.0.1", *path = "/", *method = NULL, *bodies = NULL, *raw = NULL, *command = "";
    char extra[2048] = "";
    int port = 0, cpu = -1, spin = 1, framed = 0, whole = 0;
    double duration = 5, warmup = 0, rate = 0, timeout = 5;
    long gaps = 0;
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i];
        if (!strcmp(name, "--histogram")) return histogram_main();
        if (!strcmp(name, "--help")) return fputs(USAGE, stdout), 0;
        if (!strcmp(name, "--sleep")) {
            spin = 0;
            continue;
        }
        if (!strcmp(name, "--framed")) {
            framed = 1;
            continue;
        }
        if (++i == argc) die(USAGE, NULL);
        const char *v = argv[i];
        if (!strcmp(name, "--host")) host = v;
        else if (!strcmp(name, "--path")) path = v;
        else if (!strcmp(name, "--method")) method = v;
        else if (!strcmp(name, "--bodies")) bodies = v;
        else if (!strcmp(name, "--body-raw")) raw = v;
        else if (!strcmp(name, "--request-raw")) raw = v, whole = 1;
        else if (!strcmp(name, "--command")) command = v;
        else if (!strcmp(name, "--protocol")) {
            is_resp = !strcmp(v, "resp");
            if (!is_resp && strcmp(v, "http")) die("--protocol: expected http or resp, got", v);
        }
        else if (!strcmp(name, "--header")) {
            if (strlen(extra) + strlen(v) + 3 > sizeof extra) die("--header: more than 2047 bytes", NULL);
            strcat(strcat(extra, v), "\r\n");
        } else if (!strcmp(name, "--port")) port = (int)number(name, v, 1);
        else if (!strcmp(name, "--connections")) n_connections = (uint32_t)number(name, v, 1);
        else if (!strcmp(name, "--pipeline")) depth = (uint32_t)number(name, v, 1);
        else if (!strcmp(name, "--duration")) duration = number(name, v, 0);
        else if (!strcmp(name, "--warmup")) warmup = number(name, v, 0);
        else if (!strcmp(name, "--timeout")) timeout = number(name, v, 0.001);
        else if (!strcmp(name, "--rate")) rate = number(name, v, 0.001);
        else if (!strcmp(name, "--cpu")) cpu = (int)number(name, v, 0);
        else if (!strcmp(name, "--seed")) random_state = (uint64_t)number(name, v, 0);
        else if (!strcmp(name, "--stamp-start")) stamp_next = (int64_t)number(name, v, 0);
        else if (!strcmp(name, "--gaps")) gaps = (long)number(name, v, 1);
        else if (!strcmp(name, "--stamp-step")) stamp_step = (int64_t)number(name, v, 0);
        else if (!strcmp(name, "--stamp-unit")) stamp_unit = (int64_t)number(name, v, 1);
        else if (!strcmp(name, "--burst")) burst = (uint32_t)number(name, v, 1);
        else if (!strcmp(name, "--requests")) to_send = (uint64_t)number(name, v, 1);
        else if (!strcmp(name, "--deadline-us")) deadline = (int64_t)(1000 * number(name, v, 1));
        else if (!strcmp(name, "--patience-us")) patience = (int64_t)(1000 * number(name, v, 1));
        else {
            fprintf(stderr, "loadgen: no such option: %s\n%s", name, USAGE);
            return 2;
        }
    }
    if (gaps && rate > 0) return gaps_main(gaps, rate);
    if (!port) die(USAGE, NULL);
    if (cpu >= 0) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(cpu, &set);
        if (sched_setaffinity(0, sizeof set, &set)) die("--cpu", strerror(errno));
    }
    is_open = rate > 0;
    if (burst > depth) die("--burst: expected at most --pipeline", NULL);
    if (bodies && raw) die("--bodies and --body-raw or --request-raw: give one", NULL);
    if (whole) lead_words = -2;
    else if (is_resp) lead_of_resp(command);
    else lead_of_http(method ? method : bodies || raw ? "POST" : "GET", path, host, port, extra);
    if (raw && framed) {
        load_requests(raw, framed);
    } else if (raw) {
        size_t n;
        char *body = read_file(raw, &n);
        add_request(body, n);
        free(body);
    } else {
        load_requests(bodies, framed);
    }

    char service[16];
    snprintf(service, sizeof service, "%d", port);
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;
    int rc = getaddrinfo(host, service, &hints, &found);
    if (rc) die(host, gai_strerror(rc));
    memcpy(&address, found->ai_addr, found->ai_addrlen);
    address_length = found->ai_addrlen;
    freeaddrinfo(found);

    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    connections = calloc(n_connections, sizeof *connections);
    struct epoll_event *events = calloc(n_connections, sizeof *events);
    if (epoll_fd < 0 || !connections || !events) die("out of memory or descriptors", NULL);
    for (uint32_t i = 0; i < n_connections; i++) {
        if (!(connections[i].due = calloc(depth, sizeof(int64_t)))) die("out of memory", NULL);
        open_connection(&connections[i], now_ns());
    }

    int64_t begin = now_ns(), now = begin, next_check = begin;
    int64_t limit = (int64_t)(timeout * (double)NANO);
    window_start = begin + (int64_t)(warmup * (double)NANO);
    window_end = window_start + (int64_t)(duration * (double)NANO);
    double gap = is_open ? (double)NANO * burst / rate : 0, arrival = (double)begin;
    if (is_open) arrival += exponential() * gap;
    else
        for (uint32_t i = 0; i < n_connections; i++) fill(&connections[i], begin);

    for (;;) {
        now = now_ns();
        int sending = now < window_end && to_send;
        if (!sending && ((!waiting_for_answer && !backlog_count) || now > window_end + limit)) break;
        if (is_open) {
            while ((int64_t)arrival <= now && (int64_t)arrival < window_end) {
                for (uint32_t i = 0; i < burst; i++) backlog_push((int64_t)arrival);
                if (in_window((int64_t)arrival)) offered += burst;
                arrival += exponential() * gap;
            }
            if (backlog_count) dispatch(now);
        }
        int wait_ms = 10;
        if (is_open && sending) {
            int64_t ahead = (int64_t)arrival - now_ns();
            wait_ms = spin || ahead <= 0 ? 0 : ahead > 10000000 ? 10 : (int)((ahead + 999999) / 1000000);
        }
        int n = epoll_wait(epoll_fd, events, (int)n_connections, wait_ms);
        for (int i = 0; i < n; i++) {
            connection *c = events[i].data.ptr;
            now = now_ns();
            int alive = 1;
            if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) alive = receive(c, now);
            if (alive && (events[i].events & EPOLLOUT)) alive = flush_out(c, now);
            if (!is_open && now < window_end) fill(c, now);
        }
        if (now >= next_check) {
            next_check = now + 20 * 1000000LL;
            sending = now < window_end && to_send;
            for (uint32_t i = 0; i < n_connections; i++) {
                connection *c = &connections[i];
                if (c->fd < 0 && now >= c->retry_at) {
                    open_connection(c, now);
                    if (!is_open && sending) fill(c, now);
                } else if (c->fd >= 0 && !c->in_flight && !is_open && sending) {
                    fill(c, now); /* was lost while it was being written to */
                } else if (c->fd >= 0 && c->in_flight && now - c->sent_at > limit) {
                    note_error("no answer within --timeout", 26);
                    reopen(c, now, &err_timeout);
                    if (!is_open && sending) fill(c, now);
                }
            }
        }
    }
    /* What is still unanswered counts as timed out, at its age; what was not sent, as --patience-us says. */
    int64_t ended = now_ns();
    err_timeout += waiting_for_answer;
    for (uint32_t i = 0; i < n_connections; i++)
        if (connections[i].fd >= 0) give_up(&connections[i], now);
    if (patience == INT64_MAX) err_timeout += backlog_count;
    while (backlog_count) {
        int64_t due = backlog_pop();
        if (!in_window(due)) continue;
        record(&latency, now - due);
        if (patience == INT64_MAX) failed++;
        else unsent++;
    }
    if (!to_send && ended < window_end) duration = fmax(1e-9, (double)(ended - window_start) / (double)NANO);

    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    double cpu_s = (double)usage.ru_utime.tv_sec + (double)usage.ru_stime.tv_sec +
                   (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e-6;
    uint64_t answers = ok_total + err_status;
    printf("{\"mode\": \"%s\", \"rate\": ", is_open ? "open" : "closed");
    if (is_open) printf("%.3f, ", rate);
    else printf("null, ");
    printf("\"connections\": %u, \"pipeline\": %u, \"requests\": %llu, \"seconds\": %.3f, \"requests_per_s\": %.3f, ",
           n_connections, depth, (unsigned long long)(good + late), duration,
           duration > 0 ? (double)(good + late) / duration : 0.0);
    print_histogram(&latency, 1000.0);
    print_number("send_lag_p99_us", quantile(&send_lag, 0.99) / 1000.0);
    print_number("ok_p50_us", quantile(&ok_latency, 0.50) / 1000.0);
    print_number("ok_p99_us", quantile(&ok_latency, 0.99) / 1000.0);
    print_number("ok_p999_us", quantile(&ok_latency, 0.999) / 1000.0);
    printf("\"offered\": %llu, \"good\": %llu, \"good_per_s\": %.3f, \"late\": %llu, \"refused\": %llu, \"failed\": %llu, "
           "\"unsent\": %llu, ",
           (unsigned long long)(is_open ? offered : good + late + refused + failed), (unsigned long long)good,
           duration > 0 ? (double)good / duration : 0.0, (unsigned long long)late, (unsigned long long)refused,
           (unsigned long long)failed, (unsigned long long)unsent);
    printf("\"total_requests\": %llu, \"response_bytes_mean\": %.2f, \"client_cpu_s\": %.3f, \"next_stamp\": %lld, ",
           (unsigned long long)answers, answers ? (double)bytes_in / (double)answers : 0.0, cpu_s,
           (long long)stamp_next);
    printf("\"errors\": {\"status\": %llu, \"connect\": %llu, \"lost\": %llu, \"timeout\": %llu, \"format\": %llu}, ",
           (unsigned long long)err_status, (unsigned long long)err_connect, (unsigned long long)err_lost,
           (unsigned long long)err_timeout, (unsigned long long)err_format);
    printf("\"status\": {");
    for (int s = 0, some = 0; s < 600; s++)
        if (status_count[s]) printf("%s\"%d\": %llu", some++ ? ", " : "", s, (unsigned long long)status_count[s]);
    printf("}, \"first_error\": ");
    if (first_error[0]) json_text(first_error);
    else printf("null");
    printf("}\n");
    return 0;
}
