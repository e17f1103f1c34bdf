/* infer_reader.c: reads requests from standard input with ext/infer_request.h, under the sanitizers (test_infer.py).
 *
 * A record is two uint32, header length and body length, and the body. Each is copied into memory of exactly its size,
 * so that a byte read past the end is seen. Answers to standard output: one line per record, the status or 0.
 */
#include "infer_request.h"

static ps_port port(const char *name, int dtype, int rank, const int64_t *dims) {
    ps_port p = {name, strlen(name), name, strlen(name), {0}, (uint8_t)dtype, (uint8_t)rank, 0};
    memcpy(p.dims, dims, (size_t)rank * 8);
    return p;
}

int main(void) {
    const int64_t rows3[] = {-1, 3}, free1[] = {-1}, two[] = {2, -1}, column[] = {-1, 1};
    ps_port in[4] = {port("x", PS_DT_FP32, 2, rows3), port("n", PS_DT_INT64, 1, free1), port("flag", PS_DT_BOOL, 2, two),
                     port("word \"\xc3\xa9\"", PS_DT_BYTES, 2, column)};
    ps_port out[4] = {in[0], in[1], in[2], in[3]};
    out[0].name = "x_out", out[0].name_n = 5;
    out[1].name = "n_out", out[1].name_n = 5;
    out[2].name = "flag_out", out[2].name_n = 8;
    out[3].name = "word \"\xc3\xa9\"_out", out[3].name_n = 13;
    ps_ports ports = {in, out, 4, 4, 0, 0}, one = {in + 3, out, 1, 1, 0, 1};
    uint32_t sizes[2];
    while (fread(sizes, 4, 2, stdin) == 2) {
        char *body = malloc(sizes[1] ? sizes[1] : 1);
        if (body == NULL || fread(body, 1, sizes[1], stdin) != sizes[1]) return 1;
        body = realloc(body, sizes[1] ? sizes[1] : 1);
        size_t header = sizes[0] < sizes[1] ? sizes[0] : sizes[1];
        /* The header alone in its own memory, then the tail in its own. */
        char *head = malloc(header ? header : 1), *tail = malloc(sizes[1] - header ? sizes[1] - header : 1);
        memcpy(head, body, header);
        memcpy(tail, body + header, sizes[1] - header);
        ps_fault fault = {0, ""};
        ps_request *r = ps_request_new(&ports);
        int bad = ps_request_read(&ports, r, head, head, head + header, 0, &fault);
        if (!bad && r->binary_bytes != sizes[1] - header) {
            bad = 1;
            fault.status = 400;
        }
        if (!bad) {
            const char *data[4];
            ps_writer w = {NULL, 0, 0};
            for (int i = 0; i < 4; i++) data[i] = r->in[i].inside ? r->values + r->in[i].at : tail + r->in[i].at;
            bad = ps_request_look(&ports, r, data, &fault);
            for (int i = 0; i < 4 && !bad; i++) {
                ps_tensor t = {data[i], r->in[i].bytes, r->in[i].count, {0}, r->in[i].dtype, r->in[i].rank};
                memcpy(t.dims, r->in[i].dims, sizeof t.dims);
                ps_write_values(&w, &t);
                if (t.dtype != PS_DT_BYTES) {
                    ps_tensor made;
                    double *x = malloc((size_t)t.count * 8 + 1);
                    ps_to_doubles(t.dtype, t.data, t.count, x);
                    ps_to_floats(x, t.count);
                    free(x);
                    if (ps_classify(&t, t.rank > 1 ? t.dims[0] : 1, 2, t.rank > 1, &made) == 0) free((void *)made.data);
                }
            }
            free(w.p);
        }
        printf("%d\n", bad ? fault.status : 0);
        ps_request_free(r);
        r = ps_request_new(&one);
        bad = ps_request_raw(&one, r, body, sizes[1], &fault);
        ps_request_free(r);
        free(head);
        free(tail);
        free(body);
    }
    return 0;
}
