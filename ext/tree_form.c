/* tree_form.c (control path): a form of trees as one block of bytes; see tree_form.h. */
#define _GNU_SOURCE
#include "tree_form.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "crc32c.h"

typedef struct {
    uint64_t magic, bytes;
    uint32_t crc; /* of everything behind the head, chained behind that of the head with 0 here */
    uint32_t n_trees, n_nodes, n_leaves, n_inputs, n_raw, n_outputs, n_weights, n_steps;
    int32_t n_base;
    uint64_t n_names;
    uint8_t round_input, accumulate32, base_first, aggregate, transform;
    uint8_t onnx_post, onnx_binary, onnx_all_positive, onnx_output32;
    uint8_t blank[7];
    double slope, divisor;
} head;

/* The arrays in their order: member of the form, how many, bytes of one. */
#define ARRAYS(X)                            \
    X(threshold, (uint64_t)h->n_nodes, 8)    \
    X(steps, (uint64_t)h->n_steps, 8)        \
    X(weight, (uint64_t)h->n_weights, 8)     \
    X(base, (uint64_t)h->n_base, 8)          \
    X(roots, (uint64_t)h->n_trees, 4)        \
    X(feature, (uint64_t)h->n_nodes, 4)      \
    X(yes, (uint64_t)h->n_nodes, 4)          \
    X(no, (uint64_t)h->n_nodes, 4)           \
    X(steps_begin, (uint64_t)h->n_nodes + 1, 4) \
    X(weight_begin, (uint64_t)h->n_leaves + 1, 4) \
    X(weight_target, (uint64_t)h->n_weights, 4) \
    X(nan_yes, (uint64_t)h->n_nodes, 1)      \
    X(steps_first, (uint64_t)h->n_nodes, 1)

static head head_of(const ps_trees_form *f, size_t names) {
    head h;
    memset(&h, 0, sizeof h);
    h.magic = PS_TREES_FORM_MAGIC;
    h.n_trees = f->n_trees, h.n_nodes = f->n_nodes, h.n_leaves = f->n_leaves, h.n_inputs = f->n_inputs;
    h.n_raw = f->n_raw, h.n_outputs = f->n_outputs, h.n_weights = f->n_weights;
    h.n_steps = f->n_nodes ? (uint32_t)f->steps_begin[f->n_nodes] : 0;
    h.n_base = f->n_base;
    h.n_names = names;
    h.round_input = f->round_input, h.accumulate32 = f->accumulate32, h.base_first = f->base_first;
    h.aggregate = f->aggregate, h.transform = f->transform, h.onnx_post = f->onnx_post;
    h.onnx_binary = f->onnx_binary, h.onnx_all_positive = f->onnx_all_positive, h.onnx_output32 = f->onnx_output32;
    h.slope = f->slope, h.divisor = f->divisor;
    return h;
}

/* Counts are of 32 bits: the sum cannot overflow. */
static uint64_t size_of(const head *h) {
    uint64_t bytes = sizeof *h;
#define ADD(name, count, size) bytes += (count) * (size);
    ARRAYS(ADD)
#undef ADD
    return bytes + h->n_names;
}

static uint32_t crc_of(const head *h, const char *rest, uint64_t bytes) {
    head plain = *h;
    plain.crc = 0;
    return ps_crc32c(ps_crc32c(0, &plain, sizeof plain), rest, bytes);
}

size_t ps_trees_form_size(const ps_trees_form *form, size_t names) {
    head h = head_of(form, names);
    return size_of(&h);
}

void ps_trees_form_write(const ps_trees_form *form, const char *names, size_t n_names, void *to) {
    head made = head_of(form, n_names), *h = &made;
    char *at = (char *)to + sizeof *h;
    static const int32_t zero = 0;
    const int32_t *steps_begin = form->n_nodes ? form->steps_begin : &zero;
#define PUT(name, count, size)                                                                                   \
    {                                                                                                            \
        const void *from = form->name;                                                                           \
        if ((const void *)form->steps_begin == from) from = steps_begin;                                         \
        size_t n = (count) * (size);                                                                             \
        if (n) memcpy(at, from, n);                                                                              \
        at += n;                                                                                                 \
    }
    ARRAYS(PUT)
#undef PUT
    if (n_names) memcpy(at, names, n_names);
    h->bytes = size_of(h);
    h->crc = crc_of(h, (char *)to + sizeof *h, h->bytes - sizeof *h);
    memcpy(to, h, sizeof *h);
}

int ps_trees_form_read(const void *block, size_t bytes, ps_trees_form *form, const char **names, size_t *n_names,
                       char *error) {
    head copy;
    const head *h = &copy;
    if (bytes < sizeof copy) {
        snprintf(error, 160, "the compiled form is cut off: %zu bytes", bytes);
        return 1;
    }
    memcpy(&copy, block, sizeof copy);
    if (h->magic != PS_TREES_FORM_MAGIC) {
        snprintf(error, 160, "not a compiled form of trees");
        return 1;
    }
    if (h->n_base < 0 || h->n_names > bytes || h->bytes != bytes || size_of(h) != bytes) {
        snprintf(error, 160, "the compiled form is cut off: it has %zu bytes and should have %llu", bytes,
                 (unsigned long long)(h->n_base < 0 ? h->bytes : size_of(h)));
        return 1;
    }
    if (crc_of(h, (const char *)block + sizeof copy, bytes - sizeof copy) != h->crc) {
        snprintf(error, 160, "the compiled form is damaged: its checksum does not hold");
        return 1;
    }
    memset(form, 0, sizeof *form);
    const char *at = (const char *)block + sizeof copy;
#define TAKE(name, count, size)     \
    form->name = (const void *)at;  \
    at += (count) * (size);
    ARRAYS(TAKE)
#undef TAKE
    *names = at;
    *n_names = h->n_names;
    form->n_trees = h->n_trees, form->n_nodes = h->n_nodes, form->n_leaves = h->n_leaves, form->n_inputs = h->n_inputs;
    form->n_raw = h->n_raw, form->n_outputs = h->n_outputs, form->n_weights = h->n_weights, form->n_base = h->n_base;
    form->round_input = h->round_input, form->accumulate32 = h->accumulate32, form->base_first = h->base_first;
    form->aggregate = h->aggregate, form->transform = h->transform, form->onnx_post = h->onnx_post;
    form->onnx_binary = h->onnx_binary, form->onnx_all_positive = h->onnx_all_positive;
    form->onnx_output32 = h->onnx_output32, form->slope = h->slope, form->divisor = h->divisor;
    /* What ps_trees_build follows before it has checked it: where steps stand. */
    int32_t before = 0;
    for (uint32_t i = 0; i <= h->n_nodes; i++) {
        if (form->steps_begin[i] < before || (uint32_t)form->steps_begin[i] > h->n_steps) {
            snprintf(error, 160, "node %u: steps out of order", i);
            return 1;
        }
        before = form->steps_begin[i];
    }
    if (h->n_nodes && (uint32_t)form->steps_begin[h->n_nodes] != h->n_steps) {
        snprintf(error, 160, "%u steps, of which the nodes have %d", h->n_steps, form->steps_begin[h->n_nodes]);
        return 1;
    }
    return 0;
}

typedef struct {
    const void *block;
    size_t bytes;
    int layout, simd, nice;
    size_t table_bytes;
    ps_trees_form *form;
    const char **names;
    size_t *n_names;
    char *error;
    ps_trees *made;
} build_task;

static void build_now(build_task *t) {
    t->made = NULL;
    if (!ps_trees_form_read(t->block, t->bytes, t->form, t->names, t->n_names, t->error))
        t->made = ps_trees_build(t->form, t->layout, t->simd, t->table_bytes, t->error);
}

static void *build_nicely(void *argument) {
    build_task *t = argument;
    setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), t->nice);
    build_now(t);
    return NULL;
}

ps_trees *ps_trees_build_block(const void *block, size_t bytes, int layout, int simd, size_t table_bytes, int nice,
                               ps_trees_form *form, const char **names, size_t *n_names, char *error) {
    build_task task = {block, bytes, layout, simd, nice, table_bytes, form, names, n_names, error, NULL};
    pthread_t thread;
    int failed = 1;
    if (nice) {
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the process's own threads */
        failed = pthread_create(&thread, NULL, build_nicely, &task);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    if (failed)
        build_now(&task);
    else
        pthread_join(thread, NULL);
    return task.made;
}
