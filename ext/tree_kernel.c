/* tree_kernel.c (hot path): scoring of tree ensembles; see tree_kernel.h for the contract.
 *
 * Three layouts give the same leaf for the same row, and one summation, in tree order, gives the same bits:
 *
 * MASKS  for trees of at most 64 leaves. QuickScorer's leaf masks (Lucchese et al., SIGIR 2015: a false node clears the
 *        leaves of its yes side, the exit leaf is the first bit left) made cumulative: a feature's cuts are sorted, and
 *        for every (feature, rank) one table row holds, for all trees at once, the AND of the masks of the nodes that
 *        are false there. A row of x costs one search among the cuts per feature, one vector AND per feature, one
 *        count of trailing zeros per tree. NaN is one more rank. Nodes that are not a threshold (sets, equality, zero
 *        as missing) are step functions of x like any other: they add cuts. When the table would outgrow the cache,
 *        only every K-th node of a feature gets a table row, and the nodes between that row and x are applied one by
 *        one.
 * WALK   for everything else: 16-byte nodes, children side by side, no branch per node. Every feature has two copies,
 *        NaN as it is (compares false, goes no) and NaN as -inf (goes yes); a node reads the copy that sends NaN its
 *        way; leaves point to themselves. Eight trees of one row, or eight rows of one tree, go down together.
 * PLAIN  one node after the other, from the form itself: the oracle of the other two, and what is left.
 *
 * The loader takes MASKS when its estimated cost per row (features x trees) is below that of WALK (expected depths):
 * few features and many small trees. Measured microseconds per row, one at a time / in batches of 256, of walk and
 * masks: 100 x 31 leaves on 30 features 2.4/1.7 and 0.7/0.4; 500 x 63 on 30 features 13/9.4 and 4.2/3.6; 300 x 16 on
 * 10 features 3.0/2.3 and 0.8/0.4; 100 x 31 on 300 features 1.6/1.3 and 4.0/3.5.
 *
 * Words: yes side, children taken when the node's condition holds; cut, value at which some node changes its answer;
 * rank, number of cuts below x; leaf, numbered tree by tree, yes side first.
 */
#include "tree_kernel.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define HAVE_AVX2 1
#endif

#define ROWS 4           /* rows summed side by side: hides the latency of addition */
#define WALK_ROWS 64     /* rows per block of the walk */
#define STACK_BYTES 24576
#define MAPPED_BYTES ((size_t)1 << 17) /* tables from this size on are mapped: freed, they go back to the system */
#define MOST_TABLES 40
#define GROUP 16           /* cuts compared at once */
#define PIVOTS_AT_MOST 128 /* beyond, a binary search is faster */

typedef struct {
    double threshold;
    uint32_t feature; /* into the doubled row: f as it is, n_inputs + f with NaN as -inf */
    uint32_t child;   /* index of the yes child; the no child stands next to it */
} walk_node;

typedef struct {
    uint32_t feature, n_cuts;
    const double *cuts;
    const double *pivots; /* the last cut of every group of GROUP, then the groups, +inf where there is none; or NULL */
    uint32_t n_pivots;    /* a multiple of GROUP */
    uint32_t rank0;       /* of its ranks: n_cuts + 1, and the last one for NaN */
    uint32_t row0;        /* its first table row: of a table that was not thinned, one per rank */
} mask_feature;

typedef struct {
    uint32_t row, begin, end; /* table row, and the nodes to apply on top of it */
} mask_rank;

struct ps_trees {
    uint32_t n_trees, n_nodes, n_leaves, n_inputs, n_raw, n_outputs;
    int layout, simd, mask_bits;
    uint8_t round_input, accumulate32, base_first, aggregate, transform;
    uint8_t onnx_post, onnx_binary, onnx_all_positive, onnx_output32;
    uint8_t single; /* one weight per leaf, all for one target; sum or average */
    uint8_t single_target; /* one weight per leaf and sum or average, but several raw scores: target by leaf */
    uint32_t only; /* the target of single */
    double slope, divisor;
    int32_t n_base;
    double *base;
    size_t bytes;
    struct {
        void *at;
        size_t bytes;
    } tables[MOST_TABLES]; /* all that grab() gave */
    uint32_t n_tables;

    /* Leaves in our numbering: of tree t from leaf0[t]. */
    uint32_t *leaf0;
    double *value;
    float *value32;
    int32_t *target;
    int32_t *weight_begin, *weight_target;
    double *weight;

    /* PLAIN: nodes as in the form, children in our leaf numbering. */
    int32_t *roots, *feature, *yes, *no, *steps_begin;
    double *threshold, *steps;
    uint8_t *nan_yes, *steps_first;

    /* WALK */
    walk_node *walk;
    int32_t *walk_leaf;
    uint32_t *walk_root, *walk_order; /* trees of similar depth go together */
    uint32_t n_walk;

    /* MASKS */
    uint32_t n_used;
    mask_feature *used;
    double *cuts, *pivots;
    mask_rank *ranks;
    uint8_t *table;
    size_t row_bytes;
    uint32_t *late_tree;
    void *late_mask;
    uint8_t sampled;
};

/* Zeroed memory that lives as long as the model, or until drop(). */
static void *grab(ps_trees *m, size_t count, size_t size) {
    if ((size && count > (SIZE_MAX - 4096) / size) || m->n_tables == MOST_TABLES)
        return NULL;
    size_t bytes = (count * size + 63) / 64 * 64;
    if (!bytes)
        bytes = 64;
    void *p;
    if (bytes >= MAPPED_BYTES) {
        p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED)
            return NULL;
    } else {
        p = aligned_alloc(64, bytes);
        if (!p)
            return NULL;
        memset(p, 0, bytes);
    }
    m->tables[m->n_tables].at = p;
    m->tables[m->n_tables++].bytes = bytes;
    m->bytes += bytes;
    return p;
}

static void let_go(void *at, size_t bytes) {
    if (bytes >= MAPPED_BYTES)
        munmap(at, bytes);
    else
        free(at);
}

static void drop(ps_trees *m, void *at) {
    for (uint32_t i = 0; at && i < m->n_tables; i++)
        if (m->tables[i].at == at) {
            let_go(at, m->tables[i].bytes);
            m->bytes -= m->tables[i].bytes;
            m->tables[i] = m->tables[--m->n_tables];
            return;
        }
}

/* What only building and the plain walk read. */
static void drop_nodes(ps_trees *m) {
    void *nodes[] = {m->roots, m->feature, m->yes, m->no, m->steps_begin, m->threshold, m->steps, m->nan_yes,
                     m->steps_first};
    for (size_t i = 0; i < sizeof nodes / sizeof nodes[0]; i++)
        drop(m, nodes[i]);
    m->roots = m->feature = m->yes = m->no = m->steps_begin = NULL;
    m->threshold = m->steps = NULL;
    m->nan_yes = m->steps_first = NULL;
}

void ps_trees_free(ps_trees *m) {
    if (!m)
        return;
    for (uint32_t i = 0; i < m->n_tables; i++)
        let_go(m->tables[i].at, m->tables[i].bytes);
    free(m);
}

int ps_trees_layout_of(const ps_trees *m) { return m->layout; }
int ps_trees_simd_of(const ps_trees *m) { return m->simd; }
int ps_trees_mask_bits(const ps_trees *m) { return m->layout == PS_LAYOUT_MASKS ? m->mask_bits : 0; }
size_t ps_trees_bytes(const ps_trees *m) { return m->bytes; }

#define MARGIN_EPS 1e-6f /* XGBoost's kRtEps */

float ps_trees_xgboost_margin(float base_score, int link) {
    if (link == 1)
        return -logf(1.0f / base_score - 1.0f);
    if (link == 2)
        return logf(base_score);
    if (link == 3) { /* of the step from one expectile to the next */
        float step = base_score - MARGIN_EPS > MARGIN_EPS ? base_score - MARGIN_EPS : MARGIN_EPS;
        return step + logf(-expm1f(-step));
    }
    return base_score;
}

/* ---- What a node says -------------------------------------------------------------------------------------------- */

static uint32_t count_below(const double *cuts, uint32_t n, double x) {
    const double *at = cuts;
    while (n > 1) {
        uint32_t half = n / 2;
        /* A product, lest the compiler make it a branch: which way x goes cannot be foretold. */
        at += half * (at[half - 1] < x);
        n -= half;
    }
    return (uint32_t)(at - cuts) + (n == 1 && *at < x);
}

static int node_yes(const ps_trees *m, int32_t i, double x) {
    if (x != x)
        return m->nan_yes[i];
    int32_t begin = m->steps_begin[i], end = m->steps_begin[i + 1];
    if (begin < end)
        return (m->steps_first[i] ^ count_below(m->steps + begin, (uint32_t)(end - begin), x)) & 1;
    return x <= m->threshold[i];
}

/* ---- Building: check the form, number the leaves ----------------------------------------------------------------- */

#define FAIL(...)                              \
    do {                                       \
        snprintf(error, 160, __VA_ARGS__);     \
        goto fail;                             \
    } while (0)

/* Of every node, while building: its tree, its leaves [lo, hi), and where those of its no side begin. */
typedef struct {
    uint32_t tree, lo, mid, hi;
} node_place;

typedef struct {
    int32_t node;
    uint8_t state;
} visit;

static ps_trees *start(const ps_trees_form *form, node_place **places, char *error) {
    ps_trees *m = calloc(1, sizeof *m);
    int32_t *leaf_new = NULL;
    visit *stack = NULL;
    uint8_t *seen = NULL;
    *places = NULL;
    if (!m)
        FAIL("out of memory");
    m->n_trees = form->n_trees, m->n_nodes = form->n_nodes, m->n_leaves = form->n_leaves;
    m->n_inputs = form->n_inputs, m->n_raw = form->n_raw, m->n_outputs = form->n_outputs;
    m->round_input = form->round_input, m->accumulate32 = form->accumulate32, m->base_first = form->base_first;
    m->aggregate = form->aggregate, m->transform = form->transform, m->slope = form->slope;
    m->divisor = form->divisor, m->onnx_post = form->onnx_post, m->onnx_binary = form->onnx_binary;
    m->onnx_all_positive = form->onnx_all_positive, m->onnx_output32 = form->onnx_output32;
    m->n_base = form->n_base;
    if (!m->n_trees || !m->n_leaves || !m->n_inputs || !m->n_raw || !m->n_outputs)
        FAIL("expected at least one tree, leaf, input and output");
    if (m->n_nodes > 0x3fffffff || m->n_leaves > 0x3fffffff || form->n_weights > 0x3fffffff || m->n_inputs > 0x3fffffff)
        FAIL("too large: %u nodes, %u leaves, %u inputs", m->n_nodes, m->n_leaves, m->n_inputs);
    if (m->n_base < 0 || (uint32_t)m->n_base > m->n_raw)
        FAIL("%d base values for %u raw scores", m->n_base, m->n_raw);

    uint32_t n = m->n_nodes, leaves = m->n_leaves;
    int32_t n_steps = n ? form->steps_begin[n] : 0;
    m->base = grab(m, (size_t)m->n_base, sizeof(double));
    m->leaf0 = grab(m, (size_t)m->n_trees + 1, sizeof(uint32_t));
    m->value = grab(m, leaves, sizeof(double));
    m->value32 = grab(m, leaves, sizeof(float));
    m->target = grab(m, leaves, sizeof(int32_t));
    m->weight_begin = grab(m, (size_t)leaves + 1, sizeof(int32_t));
    m->weight_target = grab(m, form->n_weights, sizeof(int32_t));
    m->weight = grab(m, form->n_weights, sizeof(double));
    m->roots = grab(m, m->n_trees, sizeof(int32_t));
    m->feature = grab(m, n, sizeof(int32_t));
    m->yes = grab(m, n, sizeof(int32_t));
    m->no = grab(m, n, sizeof(int32_t));
    m->steps_begin = grab(m, (size_t)n + 1, sizeof(int32_t));
    m->threshold = grab(m, n, sizeof(double));
    m->steps = grab(m, (size_t)n_steps, sizeof(double));
    m->nan_yes = grab(m, n, 1);
    m->steps_first = grab(m, n, 1);
    *places = calloc((size_t)n + 1, sizeof(node_place));
    leaf_new = malloc(((size_t)leaves + 1) * sizeof(int32_t));
    stack = malloc(((size_t)n + 2) * sizeof(visit));
    seen = calloc((size_t)n + 1, 1);
    if (!m->base || !m->leaf0 || !m->value || !m->value32 || !m->target || !m->weight_begin || !m->weight_target ||
        !m->weight || !m->roots || !m->feature || !m->yes || !m->no || !m->steps_begin || !m->threshold || !m->steps ||
        !m->nan_yes || !m->steps_first || !*places || !leaf_new || !stack || !seen)
        FAIL("out of memory");
    if (m->n_base)
        memcpy(m->base, form->base, (size_t)m->n_base * sizeof(double));
    memset(leaf_new, 0xff, (size_t)leaves * sizeof(int32_t));

    if (n && form->steps_begin[0] != 0)
        FAIL("steps do not begin at 0");
    for (uint32_t i = 0; i < n; i++) {
        if (form->feature[i] < 0 || (uint32_t)form->feature[i] >= m->n_inputs)
            FAIL("node %u: feature %d, expected one of 0 to %u", i, form->feature[i], m->n_inputs - 1);
        if (form->steps_begin[i + 1] < form->steps_begin[i])
            FAIL("node %u: steps out of order", i);
        if (form->threshold[i] != form->threshold[i])
            FAIL("node %u: threshold is NaN", i);
        for (int32_t k = form->steps_begin[i]; k < form->steps_begin[i + 1]; k++)
            if (form->steps[k] != form->steps[k] ||
                (k > form->steps_begin[i] && !(form->steps[k - 1] < form->steps[k])))
                FAIL("node %u: steps out of order", i);
        m->feature[i] = form->feature[i];
        m->threshold[i] = form->threshold[i];
        m->nan_yes[i] = form->nan_yes[i] != 0;
        m->steps_first[i] = form->steps_first[i] != 0;
        m->steps_begin[i + 1] = form->steps_begin[i + 1];
    }
    if (n_steps)
        memcpy(m->steps, form->steps, (size_t)n_steps * sizeof(double));

    /* Leaves get their numbers in the order in which a walk that takes yes first meets them. */
    uint32_t next_leaf = 0;
    for (uint32_t t = 0; t < m->n_trees; t++) {
        m->leaf0[t] = next_leaf;
        int32_t root = form->roots[t];
        if (root >= (int32_t)n || (root < 0 && (uint32_t)~root >= leaves))
            FAIL("tree %u: root %d out of range", t, root);
        uint32_t top = 0;
        if (root < 0) {
            if (leaf_new[~root] >= 0)
                FAIL("tree %u: leaf %d is used twice", t, ~root);
            leaf_new[~root] = (int32_t)next_leaf++;
            m->roots[t] = ~leaf_new[~root];
            continue;
        }
        m->roots[t] = root;
        if (seen[root])
            FAIL("tree %u: node %d is used twice", t, root);
        seen[root] = 1;
        (*places)[root] = (node_place){t, next_leaf, 0, 0};
        stack[top++] = (visit){root, 0};
        while (top) {
            visit *v = &stack[top - 1];
            node_place *place = &(*places)[v->node];
            if (v->state == 2) {
                place->hi = next_leaf;
                top--;
                continue;
            }
            int32_t *to = v->state ? &m->no[v->node] : &m->yes[v->node];
            int32_t child = v->state ? form->no[v->node] : form->yes[v->node];
            if (v->state)
                place->mid = next_leaf;
            v->state++;
            if (child >= (int32_t)n || (child < 0 && (uint32_t)~child >= leaves))
                FAIL("tree %u, node %d: child %d out of range", t, v->node, child);
            if (child < 0) {
                if (leaf_new[~child] >= 0)
                    FAIL("tree %u: leaf %d is used twice", t, ~child);
                leaf_new[~child] = (int32_t)next_leaf++;
                *to = ~leaf_new[~child];
            } else {
                if (seen[child])
                    FAIL("tree %u: node %d is used twice", t, child);
                seen[child] = 1;
                (*places)[child] = (node_place){t, next_leaf, 0, 0};
                *to = child;
                stack[top++] = (visit){child, 0};
            }
        }
    }
    m->leaf0[m->n_trees] = next_leaf;
    if (next_leaf != leaves)
        FAIL("%u leaves belong to no tree", leaves - next_leaf);
    for (uint32_t i = 0; i < n; i++)
        if (!seen[i])
            FAIL("node %u belongs to no tree", i);

    m->single_target = m->aggregate == PS_TREES_SUM || m->aggregate == PS_TREES_AVERAGE;
    for (uint32_t l = 0; l < leaves; l++) {
        int32_t begin = form->weight_begin[l], end = form->weight_begin[l + 1];
        if (begin < 0 || end < begin || (uint32_t)end > form->n_weights)
            FAIL("leaf %u: weights out of order", l);
        m->weight_begin[leaf_new[l] + 1] = end - begin;
        if (end - begin != 1)
            m->single_target = 0;
    }
    for (uint32_t l = 0; l < leaves; l++)
        m->weight_begin[l + 1] += m->weight_begin[l];
    for (uint32_t l = 0; l < leaves; l++) {
        int32_t to = m->weight_begin[leaf_new[l]];
        for (int32_t k = form->weight_begin[l]; k < form->weight_begin[l + 1]; k++, to++) {
            if (form->weight_target[k] < 0 || (uint32_t)form->weight_target[k] >= m->n_raw)
                FAIL("leaf %u: target %d, expected one of 0 to %u", l, form->weight_target[k], m->n_raw - 1);
            m->weight_target[to] = form->weight_target[k];
            m->weight[to] = form->weight[k];
            m->value[leaf_new[l]] = form->weight[k];
            m->value32[leaf_new[l]] = (float)form->weight[k];
            m->target[leaf_new[l]] = form->weight_target[k];
        }
    }
    m->single = m->single_target;
    m->only = (uint32_t)m->target[0];
    for (uint32_t l = 0; l < leaves; l++)
        m->single &= (uint32_t)m->target[l] == m->only;
    free(leaf_new), free(stack), free(seen);
    return m;
fail:
    free(leaf_new), free(stack), free(seen), free(*places);
    *places = NULL;
    ps_trees_free(m);
    return NULL;
}

/* ---- Building: WALK ---------------------------------------------------------------------------------------------- */

/* Where a walk_node is still to be written, and what it stands for: form node, leaf, or part of a step node. */
typedef struct {
    uint32_t at;
    int32_t what;           /* node, or ~leaf */
    int32_t lo, hi;         /* steps [lo, hi) of a step node that x may still pass; -1 for the node itself */
    uint32_t depth;
} walk_task;

static int walk_grow(void **array, size_t *room, size_t need, size_t size) {
    if (need <= *room)
        return 1;
    size_t more = *room * 2 > need ? *room * 2 : need + 64;
    void *p = realloc(*array, more * size);
    if (!p)
        return 0;
    *array = p;
    *room = more;
    return 1;
}

typedef struct {
    uint32_t depth, tree;
} depth_of;

static int by_depth(const void *a, const void *b) {
    const depth_of *x = a, *y = b;
    return x->depth != y->depth ? (x->depth < y->depth ? -1 : 1) : (x->tree > y->tree) - (x->tree < y->tree);
}

static int build_walk(ps_trees *m) {
    size_t room = 2 * (size_t)m->n_nodes + m->n_trees + 64, task_room = 256, used = 0;
    walk_node *nodes = malloc(room * sizeof *nodes);
    walk_task *tasks = malloc(task_room * sizeof *tasks);
    int32_t *leaf = NULL, *seat = malloc(((size_t)m->n_nodes + 1) * sizeof *seat);
    depth_of *order = malloc(m->n_trees * sizeof *order);
    size_t leaf_room = 0;
    int ok = 0;
    m->walk_root = grab(m, m->n_trees, sizeof(uint32_t));
    m->walk_order = grab(m, m->n_trees, sizeof(uint32_t));
    if (!nodes || !tasks || !order || !seat || !m->walk_root || !m->walk_order)
        goto done;
    memset(seat, 0xff, (size_t)m->n_nodes * sizeof *seat);
    for (uint32_t t = 0; t < m->n_trees; t++) {
        size_t top = 0, head = 0;
        uint32_t deepest = 0;
        m->walk_root[t] = (uint32_t)used;
        tasks[top++] = (walk_task){(uint32_t)used++, m->roots[t], -1, -1, 0};
        /* Breadth first: the upper levels of a tree stand together. */
        while (head < top) {
            walk_task task = tasks[head++];
            if (!walk_grow((void **)&nodes, &room, used + 2, sizeof *nodes) ||
                !walk_grow((void **)&leaf, &leaf_room, used + 2, sizeof *leaf) ||
                !walk_grow((void **)&tasks, &task_room, top + 2, sizeof *tasks) || used > 0x7fffffff)
                goto done;
            if (task.depth > deepest)
                deepest = task.depth;
            leaf[task.at] = -1;
            if (task.what < 0) {
                /* NaN-free copy <= +inf always holds: a leaf leads to itself. */
                nodes[task.at] = (walk_node){INFINITY, m->n_inputs, task.at};
                leaf[task.at] = ~task.what;
                continue;
            }
            int32_t i = task.what, begin = m->steps_begin[i], end = m->steps_begin[i + 1];
            if (task.lo < 0) {
                /* A side of a step node is reached from several steps: later seats hold the first one's record, and so
                 * lead to the same children. */
                if (seat[i] >= 0) {
                    nodes[task.at] = nodes[seat[i]];
                    continue;
                }
                seat[i] = (int32_t)task.at;
            }
            uint32_t f = (uint32_t)m->feature[i], copy = f + (m->nan_yes[i] ? m->n_inputs : 0), child = (uint32_t)used;
            walk_task yes = {child, m->yes[i], -1, -1, task.depth + 1};
            walk_task no = {child + 1, m->no[i], -1, -1, task.depth + 1};
            double threshold = m->threshold[i];
            if (begin < end) {
                if (task.lo < 0) {
                    /* NaN first: every value is <= +inf, NaN is sent to the no slot, which holds NaN's own side. */
                    threshold = INFINITY;
                    copy = f;
                    yes = (walk_task){child, i, begin, end, task.depth + 1};
                    no = (walk_task){child + 1, m->nan_yes[i] ? m->yes[i] : m->no[i], -1, -1, task.depth + 1};
                } else {
                    /* x lies between steps lo - 1 and hi: halve. */
                    int32_t mid = (task.lo + task.hi) / 2;
                    threshold = m->steps[mid];
                    copy = f;
                    int below = (m->steps_first[i] ^ (mid - begin)) & 1, above = !below;
                    if (mid == task.lo)
                        yes.what = below ? m->yes[i] : m->no[i];
                    else
                        yes = (walk_task){child, i, task.lo, mid, task.depth + 1};
                    if (mid + 1 == task.hi)
                        no.what = above ? m->yes[i] : m->no[i];
                    else
                        no = (walk_task){child + 1, i, mid + 1, task.hi, task.depth + 1};
                }
            }
            used += 2;
            nodes[task.at] = (walk_node){threshold, copy, child};
            tasks[top++] = yes;
            tasks[top++] = no;
        }
        order[t] = (depth_of){deepest, t};
    }
    qsort(order, m->n_trees, sizeof *order, by_depth);
    for (uint32_t t = 0; t < m->n_trees; t++)
        m->walk_order[t] = order[t].tree;
    m->walk = grab(m, used, sizeof(walk_node));
    m->walk_leaf = grab(m, used, sizeof(int32_t));
    if (!m->walk || !m->walk_leaf)
        goto done;
    memcpy(m->walk, nodes, used * sizeof(walk_node));
    memcpy(m->walk_leaf, leaf, used * sizeof(int32_t));
    m->n_walk = (uint32_t)used;
    ok = 1;
done:
    free(nodes), free(tasks), free(leaf), free(order), free(seat);
    return ok;
}

/* ---- Building: MASKS --------------------------------------------------------------------------------------------- */

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

typedef struct {
    double threshold;
    uint32_t node;
} placed_node;

static int by_threshold(const void *a, const void *b) {
    const placed_node *x = a, *y = b;
    if (x->threshold != y->threshold)
        return x->threshold < y->threshold ? -1 : 1;
    return (x->node > y->node) - (x->node < y->node);
}

/* Bits of a node that is false: all but the leaves of its yes side. */
static uint64_t node_mask(const ps_trees *m, const node_place *p) {
    uint32_t lo = p->lo - m->leaf0[p->tree], n = p->mid - p->lo;
    uint64_t side = n >= 64 ? ~0ull : (1ull << n) - 1;
    return ~(side << lo);
}

static void apply(const ps_trees *m, uint8_t *row, uint32_t tree, uint64_t mask) {
    if (m->mask_bits == 32)
        ((uint32_t *)row)[tree] &= (uint32_t)mask;
    else
        ((uint64_t *)row)[tree] &= mask;
}

/* Ranks of a feature with a table row each; or, every `every` nodes one. */
static size_t rows_of(size_t n_cuts, size_t n_nodes, int plain, uint32_t every) {
    return (plain && every > 1 ? n_nodes / every + 1 : n_cuts + 1) + 1;
}

#define TABLE_BYTES ((size_t)3 << 19) /* what a row of x may draw from, and still find in a second-level cache */

static int build_masks(ps_trees *m, const node_place *places, size_t table_bytes) {
    uint32_t most = 0, n = m->n_nodes;
    for (uint32_t t = 0; t < m->n_trees; t++)
        if (m->leaf0[t + 1] - m->leaf0[t] > most)
            most = m->leaf0[t + 1] - m->leaf0[t];
    if (most > 64)
        return 0;
    m->mask_bits = most <= 32 ? 32 : 64;
    m->row_bytes = ((size_t)m->n_trees * (size_t)m->mask_bits / 8 + 31) / 32 * 32;
    if (m->row_bytes % 1024 == 0)
        m->row_bytes += 64; /* rows that are a power of two apart would fight for the same cache sets */

    int ok = 0;
    uint32_t *count = calloc((size_t)m->n_inputs + 1, sizeof *count);
    uint32_t *steps = calloc((size_t)m->n_inputs + 1, sizeof *steps);
    placed_node *nodes = malloc(((size_t)n + 1) * sizeof *nodes);
    double *cuts = NULL;
    size_t n_rows = 0, n_ranks = 0, n_cuts = 0;
    if (!count || !steps || !nodes)
        goto done;
    for (uint32_t i = 0; i < n; i++) {
        count[m->feature[i]]++;
        steps[m->feature[i]] += (uint32_t)(m->steps_begin[i + 1] - m->steps_begin[i]);
    }
    size_t total = 0;
    for (uint32_t f = 0; f < m->n_inputs; f++) {
        m->n_used += count[f] > 0;
        total += (size_t)count[f] + steps[f];
    }
    m->used = grab(m, m->n_used, sizeof *m->used);
    cuts = malloc((total + 1) * sizeof *cuts);
    if (!m->used || !cuts)
        goto done;

    uint32_t u = 0;
    /* Nodes grouped by feature, those of a feature by threshold. */
    size_t *first = calloc((size_t)m->n_used + 1, sizeof *first);
    size_t *slot = calloc((size_t)m->n_inputs + 1, sizeof *slot);
    if (!first || !slot) {
        free(first), free(slot);
        goto done;
    }
    size_t at = 0;
    for (uint32_t f = 0; f < m->n_inputs; f++) {
        slot[f] = at;
        if (count[f]) {
            m->used[u].feature = f;
            first[u++] = at;
        }
        at += count[f];
    }
    first[u] = at;
    for (uint32_t i = 0; i < n; i++)
        nodes[slot[m->feature[i]]++] = (placed_node){m->threshold[i], i};
    free(slot);
    for (u = 0; u < m->n_used; u++) {
        qsort(nodes + first[u], first[u + 1] - first[u], sizeof *nodes, by_threshold);
        double *own = cuts + n_cuts;
        size_t k = 0, unique = 0;
        for (size_t j = first[u]; j < first[u + 1]; j++) {
            uint32_t i = nodes[j].node;
            if (m->steps_begin[i] < m->steps_begin[i + 1])
                for (int32_t s = m->steps_begin[i]; s < m->steps_begin[i + 1]; s++)
                    own[k++] = m->steps[s];
            else
                own[k++] = m->threshold[i];
        }
        qsort(own, k, sizeof *own, by_value);
        for (size_t j = 0; j < k; j++)
            if (!unique || own[unique - 1] != own[j])
                own[unique++] = own[j];
        m->used[u].n_cuts = (uint32_t)unique;
        m->used[u].rank0 = (uint32_t)n_ranks;
        n_cuts += unique;
        n_ranks += unique + 2;
    }
    m->cuts = grab(m, n_cuts, sizeof(double));
    m->ranks = grab(m, n_ranks, sizeof(mask_rank));
    if (!m->cuts || !m->ranks) {
        free(first);
        goto done;
    }
    memcpy(m->cuts, cuts, n_cuts * sizeof(double));
    at = 0;
    for (u = 0; u < m->n_used; u++) {
        m->used[u].cuts = m->cuts + at;
        at += m->used[u].n_cuts;
    }

    at = 0;
    for (u = 0; u < m->n_used; u++) {
        uint32_t groups = m->used[u].n_cuts / GROUP + 1;
        if (groups <= PIVOTS_AT_MOST)
            at += (groups + GROUP - 1) / GROUP * GROUP + (size_t)groups * GROUP;
    }
    m->pivots = grab(m, at, sizeof(double));
    if (!m->pivots) {
        free(first);
        goto done;
    }
    for (size_t k = 0; k < at; k++)
        m->pivots[k] = INFINITY;
    at = 0;
    for (u = 0; u < m->n_used; u++) {
        mask_feature *use = &m->used[u];
        uint32_t groups = use->n_cuts / GROUP + 1;
        if (groups > PIVOTS_AT_MOST)
            continue;
        use->n_pivots = (groups + GROUP - 1) / GROUP * GROUP;
        double *to = m->pivots + at;
        use->pivots = to;
        for (uint32_t k = 0; k < use->n_cuts; k++) {
            to[use->n_pivots + k] = use->cuts[k];
            if (k % GROUP == GROUP - 1)
                to[k / GROUP] = use->cuts[k];
        }
        at += use->n_pivots + (size_t)groups * GROUP;
    }

    /* One table row per rank while that fits the cache, else one every so many nodes. */
    size_t target = table_bytes ? table_bytes : TABLE_BYTES;
    uint32_t every = 1;
    for (;; every *= 2) {
        n_rows = 0;
        for (u = 0; u < m->n_used; u++) {
            uint32_t f = m->used[u].feature;
            n_rows += rows_of(m->used[u].n_cuts, count[f], !steps[f], every);
        }
        if (n_rows * m->row_bytes <= target || every >= 64)
            break;
    }
    if (n_rows * m->row_bytes > ((size_t)256 << 20)) {
        free(first);
        goto done;
    }
    m->sampled = every > 1;
    m->table = grab(m, n_rows + 1, m->row_bytes);
    if (m->sampled) {
        m->late_tree = grab(m, n, sizeof(uint32_t));
        m->late_mask = grab(m, n, (size_t)m->mask_bits / 8);
    }
    if (!m->table || (m->sampled && (!m->late_tree || !m->late_mask))) {
        free(first);
        goto done;
    }
    memset(m->table, 0xff, (n_rows + 1) * m->row_bytes);
    uint32_t row = 0;
    for (u = 0; u < m->n_used; u++) {
        mask_feature *use = &m->used[u];
        use->row0 = row;
        mask_rank *ranks = m->ranks + use->rank0;
        size_t begin = first[u], end = first[u + 1];
        if (!steps[use->feature]) {
            /* Thresholds only: the nodes that are false at a rank are the first so many. */
            size_t j = begin;
            uint8_t *out = m->table + (size_t)row * m->row_bytes;
            for (uint32_t r = 0; r <= use->n_cuts; r++) {
                if (r && every == 1) {
                    memcpy(out + m->row_bytes, out, m->row_bytes);
                    out += m->row_bytes;
                    row++;
                }
                for (; r && j < end && nodes[j].threshold <= use->cuts[r - 1]; j++) {
                    const node_place *p = &places[nodes[j].node];
                    if (m->sampled) {
                        m->late_tree[j] = p->tree;
                        if (m->mask_bits == 32)
                            ((uint32_t *)m->late_mask)[j] = (uint32_t)node_mask(m, p);
                        else
                            ((uint64_t *)m->late_mask)[j] = node_mask(m, p);
                        if ((j - begin + 1) % every == 0) {
                            /* This node completes the next table row. */
                            memcpy(out + m->row_bytes, out, m->row_bytes);
                            size_t k = j + 1 - every;
                            out += m->row_bytes;
                            row++;
                            for (; k <= j; k++)
                                apply(m, out, places[nodes[k].node].tree, node_mask(m, &places[nodes[k].node]));
                        }
                    } else
                        apply(m, out, p->tree, node_mask(m, p));
                }
                size_t late = m->sampled ? (j - begin) % every : 0;
                ranks[r] = (mask_rank){row, (uint32_t)(j - late), (uint32_t)j};
            }
            row++;
        } else {
            for (uint32_t r = 0; r <= use->n_cuts; r++, row++) {
                double x = r < use->n_cuts ? use->cuts[r] : INFINITY;
                for (size_t j = begin; j < end; j++)
                    if (!node_yes(m, (int32_t)nodes[j].node, x))
                        apply(m, m->table + (size_t)row * m->row_bytes, places[nodes[j].node].tree,
                              node_mask(m, &places[nodes[j].node]));
                ranks[r] = (mask_rank){row, 0, 0};
            }
        }
        for (size_t j = begin; j < end; j++)
            if (!m->nan_yes[nodes[j].node])
                apply(m, m->table + (size_t)row * m->row_bytes, places[nodes[j].node].tree,
                      node_mask(m, &places[nodes[j].node]));
        ranks[use->n_cuts + 1] = (mask_rank){row, 0, 0};
        row++;
    }
    free(first);
    ok = 1;
done:
    free(count), free(steps), free(nodes), free(cuts);
    return ok;
}

static int avx2_here(void) {
#ifdef HAVE_AVX2
    return __builtin_cpu_supports("avx2") != 0;
#else
    return 0;
#endif
}

ps_trees *ps_trees_build(const ps_trees_form *form, int layout, int simd, size_t table_bytes, char *error) {
    node_place *places;
    error[0] = 0;
    ps_trees *m = start(form, &places, error);
    if (!m)
        return NULL;
    m->simd = avx2_here() ? PS_SIMD_AVX2 : PS_SIMD_PORTABLE;
    if (simd == PS_SIMD_AVX2 && !avx2_here())
        FAIL("this processor has no AVX2");
    if (simd == PS_SIMD_PORTABLE)
        m->simd = simd;
    m->layout = layout;
    if (layout == PS_LAYOUT_AUTO) {
        /* What one row touches: with masks every feature of every tree, in vectors; walking, the depth of every tree.
         * The weights are nanoseconds measured per 32 bytes of masks and per node of a walk. */
        double mask_cost = 0, walk_cost = 0;
        uint32_t most = 0, used = 0;
        uint8_t *touched = calloc((size_t)m->n_inputs + 1, 1);
        if (!touched)
            FAIL("out of memory");
        for (uint32_t i = 0; i < m->n_nodes; i++) {
            used += !touched[m->feature[i]];
            touched[m->feature[i]] = 1;
            /* A node is met by the rows of its leaves; leaves are taken as equally likely. */
            walk_cost += 1.4 * (places[i].hi - places[i].lo) /
                         (double)(m->leaf0[places[i].tree + 1] - m->leaf0[places[i].tree]);
        }
        free(touched);
        for (uint32_t t = 0; t < m->n_trees; t++)
            if (m->leaf0[t + 1] - m->leaf0[t] > most)
                most = m->leaf0[t + 1] - m->leaf0[t];
        mask_cost = used * (8.0 + 0.6 * m->n_trees * (most <= 32 ? 4 : 8) / 32.0);
        m->layout = most <= 64 && mask_cost < walk_cost ? PS_LAYOUT_MASKS : PS_LAYOUT_WALK;
    }
    if (m->layout == PS_LAYOUT_MASKS && !build_masks(m, places, table_bytes)) {
        if (layout == PS_LAYOUT_MASKS)
            FAIL("masks hold trees of at most 64 leaves, and 256 MiB");
        m->layout = PS_LAYOUT_WALK;
    }
    if (m->layout == PS_LAYOUT_WALK && !build_walk(m)) {
        if (layout == PS_LAYOUT_WALK)
            FAIL("the walk grows too large, or memory is short");
        m->layout = PS_LAYOUT_PLAIN;
    }
    if (m->layout < PS_LAYOUT_PLAIN || m->layout > PS_LAYOUT_MASKS)
        FAIL("no layout %d", m->layout);
    if (m->layout != PS_LAYOUT_PLAIN)
        drop_nodes(m);
    free(places);
    return m;
fail:
    free(places);
    ps_trees_free(m);
    return NULL;
}

/* ---- Raw scores to outputs --------------------------------------------------------------------------------------- */

static float onnx_logistic(float x) {
    float v = 1 / (1 + expf(-fabsf(x)));
    return x < 0 ? 1 - v : v;
}

/* ONNX Runtime's approximation of the inverse error function (Winitzki), which defines what PROBIT gives. */
static float onnx_probit(float x) {
    float y = 2 * x - 1, sign = y < 0 ? -1.0f : 1.0f;
    y = (1 - y) * (1 + y);
    float log = logf(y), v = 2 / (3.14159265f * 0.147f) + 0.5f * log, v2 = 1 / 0.147f * log;
    float v3 = -v + sqrtf(v * v - v2);
    return 1.41421356f * (sign * sqrtf(v3));
}

static void onnx_post(const ps_trees *m, double *z, uint32_t n) {
    int post = m->onnx_post;
    if (post == PS_ONNX_PROBIT) {
        for (uint32_t k = 0; k < n; k++)
            z[k] = onnx_probit((float)z[k]);
    } else if (post == PS_ONNX_LOGISTIC) {
        for (uint32_t k = 0; k < n; k++)
            z[k] = onnx_logistic((float)z[k]);
    } else if (post == PS_ONNX_SOFTMAX || post == PS_ONNX_SOFTMAX_ZERO) {
        float most = -3.40282346638528859812e+38f, sum = 0;
        for (uint32_t k = 0; k < n; k++)
            if ((float)z[k] > most)
                most = (float)z[k];
        float zero = expf(-most);
        for (uint32_t k = 0; k < n; k++) {
            float v = (float)z[k];
            if (post == PS_ONNX_SOFTMAX_ZERO && !(v > 0.0000001f || v < -0.0000001f)) {
                z[k] = m->accumulate32 ? (double)(v * zero) : z[k] * zero;
                continue;
            }
            z[k] = expf(v - most);
            sum += (float)z[k];
        }
        for (uint32_t k = 0; k < n; k++)
            z[k] = post == PS_ONNX_SOFTMAX_ZERO && !m->accumulate32 ? z[k] / sum : (double)((float)z[k] / sum);
    }
}

static double add(const ps_trees *m, double a, double b) {
    return m->accumulate32 ? (double)((float)a + (float)b) : a + b;
}

/* The two ONNX operators' last step, as ONNX Runtime does it: a target that no leaf of the row named has no score and
 * stays 0 even under base values (has is 0), except where a class needs one to win. */
static void onnx_finish(const ps_trees *m, double *acc, uint8_t *has, double *out, int raw, int32_t *label) {
    uint32_t n = m->n_raw;
    const double *base = m->base;
    if (m->transform == PS_TREES_ONNX_REGRESSOR) {
        if (n == 1) {
            double v = acc[0];
            if (m->n_base == 1)
                v = add(m, v, base[0]);
            out[0] = v;
        } else {
            for (uint32_t k = 0; k < n; k++) {
                double v = acc[k];
                if ((uint32_t)m->n_base == n)
                    v = add(m, v, base[k]);
                out[k] = has[k] ? v : 0;
            }
        }
        if (!raw && (n > 1 || m->onnx_post == PS_ONNX_PROBIT))
            onnx_post(m, out, n);
    } else if (n > 2) {
        for (uint32_t k = 0; k < n; k++)
            out[k] = (uint32_t)m->n_base == n ? (has[k] ? add(m, acc[k], base[k]) : base[k]) : (has[k] ? acc[k] : 0);
        if (label) {
            int32_t best = -1; /* of the classes that have a score */
            for (uint32_t k = 0; k < n; k++)
                if ((has[k] || (uint32_t)m->n_base == n) && (best < 0 || out[k] > out[best]))
                    best = (int32_t)k;
            *label = best < 0 ? 0 : best;
        }
        if (!raw)
            onnx_post(m, out, n);
    } else {
        int two = 1, second = m->n_base ? -1 : 3;
        if (m->n_base == 2) {
            if (has[1]) {
                acc[1] = add(m, base[1], acc[0]);
                acc[0] = -acc[1];
            } else {
                acc[1] = add(m, acc[1], base[1]);
                acc[0] = add(m, acc[0], base[0]);
            }
        } else {
            if (m->n_base == 1)
                acc[0] = add(m, acc[0], base[0]);
            two = has[1];
        }
        double score = has[1] ? acc[1] : has[0] ? acc[0] : 0;
        if (m->onnx_binary)
            second = m->onnx_all_positive ? (score > 0.5 ? 0 : 1) : score > 0 ? 2 : 3;
        if (label)
            *label = score > (m->onnx_binary && m->onnx_all_positive ? 0.5 : 0);
        if (two) {
            out[0] = has[0] ? acc[0] : 0;
            out[1] = has[1] ? acc[1] : 0;
            if (!raw)
                onnx_post(m, out, 2);
        } else {
            double v = has[0] ? acc[0] : 0;
            out[0] = v;
            out[1] = 0;
            if (raw || second < 0) {
                if (!raw && m->onnx_post == PS_ONNX_PROBIT)
                    out[0] = onnx_probit((float)v);
            } else if (m->onnx_post == PS_ONNX_PROBIT) {
                out[0] = onnx_probit((float)v);
            } else if (m->onnx_post == PS_ONNX_LOGISTIC) {
                out[1] = onnx_logistic((float)v);
                out[0] = onnx_logistic((float)-v);
            } else if (second <= 1) {
                out[1] = v;
                out[0] = add(m, 1, -v);
            } else {
                out[1] = v;
                out[0] = -v;
            }
        }
    }
    if (m->onnx_output32 && !raw)
        for (uint32_t k = 0; k < m->n_outputs; k++)
            out[k] = (float)out[k];
}

static float sigmoid32(float x) {
    /* XGBoost keeps expf from overflowing: no probability is exactly 0. */
    float y = -x < 88.7f ? -x : 88.7f;
    return 1.0f / (expf(y) + 1.0f);
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void finish(const ps_trees *m, double *acc, uint8_t *has, double *out, int raw, int32_t *label) {
    uint32_t n = m->n_raw;
    /* LightGBM's raw scores of a random forest are sums: it averages with the transform. */
    if (m->aggregate == PS_TREES_AVERAGE && !(raw && m->transform < PS_TREES_ONNX_REGRESSOR))
        for (uint32_t k = 0; k < n; k++)
            acc[k] = m->accumulate32 ? (double)((float)acc[k] / (float)m->divisor) : acc[k] / m->divisor;
    if (m->transform >= PS_TREES_ONNX_REGRESSOR) {
        onnx_finish(m, acc, has, out, raw, label);
        return;
    }
    if (!m->base_first)
        for (uint32_t k = 0; k < (uint32_t)m->n_base; k++)
            acc[k] = add(m, acc[k], m->base[k]);
    if (raw) {
        memcpy(out, acc, n * sizeof *out);
        return;
    }
    double most = acc[0], sum = 0;
    uint32_t best = 0;
    switch (m->transform) {
    case PS_TREES_SIGMOID:
        for (uint32_t k = 0; k < n; k++)
            out[k] = 1.0 / (1.0 + exp(-m->slope * acc[k]));
        break;
    case PS_TREES_SOFTMAX:
        for (uint32_t k = 1; k < n; k++)
            most = acc[k] > most ? acc[k] : most;
        for (uint32_t k = 0; k < n; k++)
            sum += out[k] = exp(acc[k] - most);
        for (uint32_t k = 0; k < n; k++)
            out[k] /= sum;
        break;
    case PS_TREES_EXP:
        for (uint32_t k = 0; k < n; k++)
            out[k] = exp(acc[k]);
        break;
    case PS_TREES_LOG1P_EXP:
        for (uint32_t k = 0; k < n; k++)
            out[k] = log1p(exp(acc[k]));
        break;
    case PS_TREES_SIGNED_SQUARE:
        for (uint32_t k = 0; k < n; k++)
            out[k] = (acc[k] > 0) - (acc[k] < 0) >= 0 ? acc[k] * acc[k] : -(acc[k] * acc[k]);
        break;
    case PS_TREES_SIGMOID_F32:
        for (uint32_t k = 0; k < n; k++)
            out[k] = sigmoid32((float)acc[k]);
        break;
    case PS_TREES_SOFTMAX_F32:
        for (uint32_t k = 1; k < n; k++)
            most = acc[k] > most ? acc[k] : most;
        for (uint32_t k = 0; k < n; k++)
            sum += out[k] = expf((float)acc[k] - (float)most);
        for (uint32_t k = 0; k < n; k++)
            out[k] = (float)out[k] / (float)sum;
        break;
    case PS_TREES_EXP_F32:
        for (uint32_t k = 0; k < n; k++)
            out[k] = expf((float)acc[k]);
        break;
    case PS_TREES_ARGMAX:
        for (uint32_t k = 1; k < n; k++)
            best = acc[k] > acc[best] ? k : best;
        out[0] = best;
        break;
    case PS_TREES_HINGE:
        for (uint32_t k = 0; k < n; k++)
            out[k] = acc[k] > 0;
        break;
    case PS_TREES_SORTED:
        memcpy(out, acc, n * sizeof *out);
        if (n > 16) {
            qsort(out, n, sizeof *out, ascending);
            break;
        }
        for (uint32_t k = 1; k < n; k++) {
            uint32_t at = k;
            for (double v = acc[k]; at > 0 && out[at - 1] > v; at--)
                out[at] = out[at - 1];
            out[at] = acc[k];
        }
        break;
    case PS_TREES_ADDED_UP_F32:
        out[0] = acc[0];
        for (uint32_t k = 1; k < n; k++) {
            float x = (float)acc[k], step = (x > 0 ? x : 0) + log1pf(expf(-fabsf(x)));
            out[k] = (float)out[k - 1] + (MARGIN_EPS + step);
        }
        break;
    default:
        memcpy(out, acc, n * sizeof *out);
    }
}

/* ---- Adding up --------------------------------------------------------------------------------------------------- */

static void clear(const ps_trees *m, double *acc, uint8_t *has) {
    for (uint32_t k = 0; k < m->n_raw; k++) {
        acc[k] = m->base_first && k < (uint32_t)m->n_base ? m->base[k] : 0;
        has[k] = 0;
    }
}

/* One leaf's weights into a row's scores; in float when the library adds in float. */
static inline void add_leaf(const ps_trees *m, uint32_t leaf, double *acc, uint8_t *has) {
    if (m->single_target) {
        int32_t k = m->target[leaf];
        acc[k] = m->accumulate32 ? (double)((float)acc[k] + m->value32[leaf]) : acc[k] + m->value[leaf];
        has[k] = 1;
        return;
    }
    for (int32_t w = m->weight_begin[leaf]; w < m->weight_begin[leaf + 1]; w++) {
        int32_t k = m->weight_target[w];
        double v = m->weight[w];
        if (m->aggregate == PS_TREES_MIN)
            acc[k] = !has[k] || v < acc[k] ? v : acc[k];
        else if (m->aggregate == PS_TREES_MAX)
            acc[k] = !has[k] || v > acc[k] ? v : acc[k];
        else
            acc[k] = m->accumulate32 ? (double)((float)acc[k] + (float)v) : acc[k] + v;
        has[k] = 1;
    }
}

/* ---- PLAIN ------------------------------------------------------------------------------------------------------- */

static void predict_plain(const ps_trees *m, const double *x, double *acc, uint8_t *has) {
    for (uint32_t t = 0; t < m->n_trees; t++) {
        int32_t at = m->roots[t];
        while (at >= 0) {
            double v = x[m->feature[at]];
            if (m->round_input)
                v = (float)v;
            at = node_yes(m, at, v) ? m->yes[at] : m->no[at];
        }
        add_leaf(m, (uint32_t)~at, acc, has);
    }
}

/* ---- WALK -------------------------------------------------------------------------------------------------------- */

static void double_row(const ps_trees *m, const double *x, double *pair) {
    uint32_t n = m->n_inputs;
    for (uint32_t f = 0; f < n; f++) {
        double v = m->round_input ? (double)(float)x[f] : x[f];
        pair[f] = v;
        pair[n + f] = v != v ? -INFINITY : v;
    }
}

#define STEP(k) at##k = walk[at##k].child + !(x##k[walk[at##k].feature] <= walk[at##k].threshold)
#define STEP8 STEP(0), STEP(1), STEP(2), STEP(3), STEP(4), STEP(5), STEP(6), STEP(7)

/* Eight walks side by side, each from its root over its own row. A leaf leads to itself, so that a round that moves
 * nobody ends it. */
static void walk8(const walk_node *walk, const uint32_t *root, const double *const *x, uint32_t *leaf) {
    uint32_t at0 = root[0], at1 = root[1], at2 = root[2], at3 = root[3];
    uint32_t at4 = root[4], at5 = root[5], at6 = root[6], at7 = root[7];
    const double *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3], *x4 = x[4], *x5 = x[5], *x6 = x[6], *x7 = x[7];
    for (;;) {
        STEP8;
        STEP8;
        STEP8;
        uint32_t was0 = at0, was1 = at1, was2 = at2, was3 = at3, was4 = at4, was5 = at5, was6 = at6, was7 = at7;
        STEP8;
        if (!((was0 ^ at0) | (was1 ^ at1) | (was2 ^ at2) | (was3 ^ at3) | (was4 ^ at4) | (was5 ^ at5) | (was6 ^ at6) |
              (was7 ^ at7)))
            break;
    }
    leaf[0] = at0, leaf[1] = at1, leaf[2] = at2, leaf[3] = at3;
    leaf[4] = at4, leaf[5] = at5, leaf[6] = at6, leaf[7] = at7;
}

static void walk_row(const ps_trees *m, const double *pair, uint32_t *leaves) {
    const double *x[8] = {pair, pair, pair, pair, pair, pair, pair, pair};
    for (uint32_t g = 0; g < m->n_trees; g += 8) {
        uint32_t root[8], end[8], n = m->n_trees - g < 8 ? m->n_trees - g : 8;
        for (uint32_t k = 0; k < 8; k++)
            root[k] = m->walk_root[m->walk_order[g + (k < n ? k : 0)]];
        walk8(m->walk, root, x, end);
        for (uint32_t k = 0; k < n; k++)
            leaves[m->walk_order[g + k]] = (uint32_t)m->walk_leaf[end[k]];
    }
}

static void add_leaves(const ps_trees *m, const uint32_t *leaves, double *acc, uint8_t *has) {
    if (m->single && !m->accumulate32) {
        double s = acc[m->only];
        for (uint32_t t = 0; t < m->n_trees; t++)
            s += m->value[leaves[t]];
        acc[m->only] = s;
        has[m->only] = 1;
    } else if (m->single) {
        float s = (float)acc[m->only];
        for (uint32_t t = 0; t < m->n_trees; t++)
            s += m->value32[leaves[t]];
        acc[m->only] = s;
        has[m->only] = 1;
    } else {
        for (uint32_t t = 0; t < m->n_trees; t++)
            add_leaf(m, leaves[t], acc, has);
    }
}

/* rows of a block: pairs are their doubled rows, acc and has theirs. Trees in order, eight rows at a time. */
static void walk_block(const ps_trees *m, const double *pairs, uint32_t rows, double *acc, uint8_t *has) {
    size_t wide = 2 * (size_t)m->n_inputs;
    for (uint32_t t = 0; t < m->n_trees; t++) {
        uint32_t root[8], end[8];
        for (uint32_t k = 0; k < 8; k++)
            root[k] = m->walk_root[t];
        for (uint32_t r = 0; r < rows; r += 8) {
            const double *x[8];
            uint32_t n = rows - r < 8 ? rows - r : 8;
            for (uint32_t k = 0; k < 8; k++)
                x[k] = pairs + (r + (k < n ? k : 0)) * wide;
            walk8(m->walk, root, x, end);
            for (uint32_t k = 0; k < n; k++)
                add_leaf(m, (uint32_t)m->walk_leaf[end[k]], acc + (size_t)(r + k) * m->n_raw,
                         has + (size_t)(r + k) * m->n_raw);
        }
    }
}

/* ---- MASKS ------------------------------------------------------------------------------------------------------- */

static void and_rows_portable(const uint8_t *const *rows, uint32_t n, uint8_t *out, size_t bytes) {
    for (size_t b = 0; b < bytes; b += 32) {
        uint64_t a0 = ~0ull, a1 = ~0ull, a2 = ~0ull, a3 = ~0ull;
        for (uint32_t k = 0; k < n; k++) {
            const uint64_t *row = (const uint64_t *)(rows[k] + b);
            a0 &= row[0], a1 &= row[1], a2 &= row[2], a3 &= row[3];
        }
        uint64_t *to = (uint64_t *)(out + b);
        to[0] = a0, to[1] = a1, to[2] = a2, to[3] = a3;
    }
}

#ifdef HAVE_AVX2
#define LOAD(p) _mm256_load_si256((const __m256i *)(p))
#define AND(a, b) _mm256_and_si256(a, b)

__attribute__((target("avx2"))) static void and_rows_avx2(const uint8_t *const *rows, uint32_t n, uint8_t *out,
                                                          size_t bytes) {
    const __m256i ones = _mm256_set1_epi8(-1);
    size_t b = 0;
    for (; b + 256 <= bytes; b += 256) {
        __m256i a0 = ones, a1 = ones, a2 = ones, a3 = ones, a4 = ones, a5 = ones, a6 = ones, a7 = ones;
        for (uint32_t k = 0; k < n; k++) {
            const uint8_t *row = rows[k] + b;
            a0 = AND(a0, LOAD(row)), a1 = AND(a1, LOAD(row + 32)), a2 = AND(a2, LOAD(row + 64));
            a3 = AND(a3, LOAD(row + 96)), a4 = AND(a4, LOAD(row + 128)), a5 = AND(a5, LOAD(row + 160));
            a6 = AND(a6, LOAD(row + 192)), a7 = AND(a7, LOAD(row + 224));
        }
        __m256i *to = (__m256i *)(out + b);
        to[0] = a0, to[1] = a1, to[2] = a2, to[3] = a3, to[4] = a4, to[5] = a5, to[6] = a6, to[7] = a7;
    }
    for (; b + 128 <= bytes; b += 128) {
        __m256i a0 = ones, a1 = ones, a2 = ones, a3 = ones;
        for (uint32_t k = 0; k < n; k++) {
            const uint8_t *row = rows[k] + b;
            a0 = AND(a0, LOAD(row)), a1 = AND(a1, LOAD(row + 32)), a2 = AND(a2, LOAD(row + 64));
            a3 = AND(a3, LOAD(row + 96));
        }
        __m256i *to = (__m256i *)(out + b);
        to[0] = a0, to[1] = a1, to[2] = a2, to[3] = a3;
    }
    for (; b + 32 <= bytes; b += 32) {
        __m256i a0 = ones, a1 = ones;
        uint32_t k = 0;
        for (; k + 2 <= n; k += 2)
            a0 = AND(a0, LOAD(rows[k] + b)), a1 = AND(a1, LOAD(rows[k + 1] + b));
        if (k < n)
            a0 = AND(a0, LOAD(rows[k] + b));
        *(__m256i *)(out + b) = AND(a0, a1);
    }
}
#endif

static inline double input(const ps_trees *m, const double *x, uint32_t f) {
    return m->round_input ? (double)(float)x[f] : x[f];
}

/* Rank of every used feature in a row of x; the last rank is NaN's. */
static void ranks_portable(const ps_trees *m, const double *x, uint32_t *rank) {
    for (uint32_t u = 0; u < m->n_used; u++) {
        const mask_feature *use = &m->used[u];
        double v = input(m, x, use->feature);
        uint32_t below = count_below(use->cuts, use->n_cuts, v);
        rank[u] = v != v ? use->n_cuts + 1 : below;
    }
}

#ifdef HAVE_AVX2
/* How many of GROUP numbers are below v. */
__attribute__((target("avx2"))) static inline uint32_t count_group(const double *at, __m256d v) {
    __m256i a = _mm256_castpd_si256(_mm256_cmp_pd(_mm256_load_pd(at), v, _CMP_LT_OQ));
    __m256i b = _mm256_castpd_si256(_mm256_cmp_pd(_mm256_load_pd(at + 4), v, _CMP_LT_OQ));
    __m256i c = _mm256_castpd_si256(_mm256_cmp_pd(_mm256_load_pd(at + 8), v, _CMP_LT_OQ));
    __m256i d = _mm256_castpd_si256(_mm256_cmp_pd(_mm256_load_pd(at + 12), v, _CMP_LT_OQ));
    __m256i all = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    return (uint32_t)__builtin_popcount((uint32_t)_mm256_movemask_epi8(all)) / 2; /* two bytes are left of each */
}

__attribute__((target("avx2"))) static void ranks_avx2(const ps_trees *m, const double *x, uint32_t *rank) {
    for (uint32_t u = 0; u < m->n_used; u++) {
        const mask_feature *use = &m->used[u];
        double v = input(m, x, use->feature);
        uint32_t below = 0;
        if (use->pivots) {
            __m256d all = _mm256_set1_pd(v);
            for (uint32_t k = 0; k < use->n_pivots; k += GROUP)
                below += count_group(use->pivots + k, all);
            below = GROUP * below + count_group(use->pivots + use->n_pivots + GROUP * below, all);
        } else
            below = count_below(use->cuts, use->n_cuts, v);
        rank[u] = v != v ? use->n_cuts + 1 : below;
    }
}
#endif

/* Masks of all trees for one row of x. `from` and `rank` are room for n_used each. */
static void mask_row(const ps_trees *m, const double *x, const uint8_t **from, uint32_t *rank, uint8_t *out) {
    uint32_t n = m->n_used;
#ifdef HAVE_AVX2
    if (m->simd == PS_SIMD_AVX2)
        ranks_avx2(m, x, rank);
    else
#endif
        ranks_portable(m, x, rank);
    if (m->sampled)
        for (uint32_t u = 0; u < n; u++)
            from[u] = m->table + (size_t)m->ranks[m->used[u].rank0 + rank[u]].row * m->row_bytes;
    else
        for (uint32_t u = 0; u < n; u++)
            from[u] = m->table + (size_t)(m->used[u].row0 + rank[u]) * m->row_bytes;
#ifdef HAVE_AVX2
    if (m->simd == PS_SIMD_AVX2)
        and_rows_avx2(from, n, out, m->row_bytes);
    else
#endif
        and_rows_portable(from, n, out, m->row_bytes);
    if (!m->sampled)
        return;
    for (uint32_t u = 0; u < n; u++) {
        const mask_rank *at = &m->ranks[m->used[u].rank0 + rank[u]];
        if (m->mask_bits == 32)
            for (uint32_t j = at->begin; j < at->end; j++)
                ((uint32_t *)out)[m->late_tree[j]] &= ((const uint32_t *)m->late_mask)[j];
        else
            for (uint32_t j = at->begin; j < at->end; j++)
                ((uint64_t *)out)[m->late_tree[j]] &= ((const uint64_t *)m->late_mask)[j];
    }
}

/* The sums of the only raw score (acc begins there) over `rows` rows whose masks stand row_bytes apart: in tree order,
 * ROWS rows side by side. */
#define SUM_MASKS(name, MASK, CTZ, REAL, VALUE)                                                                        \
    static void name(const ps_trees *m, const uint8_t *masks, uint32_t rows, double *acc) {                            \
        const uint32_t *leaf0 = m->leaf0;                                                                              \
        const REAL *value = m->VALUE;                                                                                  \
        uint32_t trees = m->n_trees;                                                                                   \
        if (rows == ROWS) {                                                                                            \
            const MASK *a = (const MASK *)masks, *b = (const MASK *)(masks + m->row_bytes);                            \
            const MASK *c = (const MASK *)(masks + 2 * m->row_bytes), *d = (const MASK *)(masks + 3 * m->row_bytes);   \
            size_t n = m->n_raw;                                                                                       \
            REAL sa = (REAL)acc[0], sb = (REAL)acc[n], sc = (REAL)acc[2 * n], sd = (REAL)acc[3 * n];                   \
            for (uint32_t t = 0; t < trees; t++) {                                                                     \
                const REAL *v = value + leaf0[t];                                                                      \
                sa += v[CTZ(a[t])], sb += v[CTZ(b[t])], sc += v[CTZ(c[t])], sd += v[CTZ(d[t])];                        \
            }                                                                                                          \
            acc[0] = sa, acc[n] = sb, acc[2 * n] = sc, acc[3 * n] = sd;                                                \
            return;                                                                                                    \
        }                                                                                                              \
        for (uint32_t r = 0; r < rows; r++) {                                                                          \
            const MASK *a = (const MASK *)(masks + r * m->row_bytes);                                                  \
            REAL s = (REAL)acc[r * m->n_raw];                                                                          \
            for (uint32_t t = 0; t < trees; t++)                                                                       \
                s += value[leaf0[t] + (uint32_t)CTZ(a[t])];                                                            \
            acc[r * m->n_raw] = s;                                                                                     \
        }                                                                                                              \
    }

SUM_MASKS(sum_masks_32_f64, uint32_t, __builtin_ctz, double, value)
SUM_MASKS(sum_masks_64_f64, uint64_t, __builtin_ctzll, double, value)
SUM_MASKS(sum_masks_32_f32, uint32_t, __builtin_ctz, float, value32)
SUM_MASKS(sum_masks_64_f32, uint64_t, __builtin_ctzll, float, value32)

static void add_masks(const ps_trees *m, const uint8_t *masks, double *acc, uint8_t *has) {
    for (uint32_t t = 0; t < m->n_trees; t++) {
        uint32_t bit = m->mask_bits == 32 ? (uint32_t)__builtin_ctz(((const uint32_t *)masks)[t])
                                          : (uint32_t)__builtin_ctzll(((const uint64_t *)masks)[t]);
        add_leaf(m, m->leaf0[t] + bit, acc, has);
    }
}

/* ---- Scoring ----------------------------------------------------------------------------------------------------- */

static int predict(const ps_trees *m, const double *x, size_t rows, size_t stride, double *out, int raw,
                   int32_t *labels) {
    _Alignas(64) uint8_t stack[STACK_BYTES];
    uint32_t wide = raw ? m->n_raw : m->n_outputs, n_raw = m->n_raw;
    uint32_t block = 1;
    size_t need, first, second = 0;
    if (m->layout == PS_LAYOUT_MASKS) {
        block = m->single && rows >= ROWS ? ROWS : 1;
        first = m->row_bytes * block;
        second = m->n_used * (sizeof(uint8_t *) + sizeof(uint32_t));
    } else if (m->layout == PS_LAYOUT_WALK) {
        block = rows < 8 ? 1 : rows < WALK_ROWS ? (uint32_t)rows : WALK_ROWS;
        first = (size_t)block * 2 * m->n_inputs * sizeof(double);
        second = (size_t)m->n_trees * sizeof(uint32_t);
    } else
        first = 0;
    first = (first + 63) / 64 * 64;
    second = (second + 63) / 64 * 64;
    size_t third = (size_t)block * n_raw * sizeof(double);
    need = first + second + third + (size_t)block * n_raw;
    uint8_t *room = stack;
    if (need > STACK_BYTES && !(room = aligned_alloc(64, (need + 63) / 64 * 64)))
        return -1;
    double *acc = (double *)(room + first + second);
    uint8_t *has = room + first + second + third;

    for (size_t r = 0; r < rows; r += block) {
        uint32_t n = rows - r < block ? (uint32_t)(rows - r) : block;
        for (uint32_t k = 0; k < n; k++)
            clear(m, acc + (size_t)k * n_raw, has + (size_t)k * n_raw);
        const double *from = x + r * stride;
        if (m->layout == PS_LAYOUT_MASKS) {
            for (uint32_t k = 0; k < n; k++)
                mask_row(m, from + k * stride, (const uint8_t **)(room + first),
                         (uint32_t *)(room + first + m->n_used * sizeof(uint8_t *)), room + k * m->row_bytes);
            if (m->single) {
                if (m->accumulate32)
                    (m->mask_bits == 32 ? sum_masks_32_f32 : sum_masks_64_f32)(m, room, n, acc + m->only);
                else
                    (m->mask_bits == 32 ? sum_masks_32_f64 : sum_masks_64_f64)(m, room, n, acc + m->only);
                for (uint32_t k = 0; k < n; k++)
                    has[(size_t)k * n_raw + m->only] = 1;
            } else
                add_masks(m, room, acc, has);
        } else if (m->layout == PS_LAYOUT_WALK) {
            for (uint32_t k = 0; k < n; k++)
                double_row(m, from + k * stride, (double *)room + (size_t)k * 2 * m->n_inputs);
            if (block == 1) {
                walk_row(m, (double *)room, (uint32_t *)(room + first));
                add_leaves(m, (uint32_t *)(room + first), acc, has);
            } else
                walk_block(m, (double *)room, n, acc, has);
        } else
            predict_plain(m, from, acc, has);
        for (uint32_t k = 0; k < n; k++)
            finish(m, acc + (size_t)k * n_raw, has + (size_t)k * n_raw, out + (r + k) * wide, raw,
                   labels ? labels + r + k : NULL);
    }
    if (room != stack)
        free(room);
    return 0;
}

int ps_trees_predict(const ps_trees *m, const double *x, size_t rows, size_t stride, double *out, int raw) {
    return predict(m, x, rows, stride, out, raw, NULL);
}

int ps_trees_labels(const ps_trees *m, const double *x, size_t rows, size_t stride, double *out, int32_t *labels) {
    return predict(m, x, rows, stride, out, 0, labels);
}

int ps_trees_literal_labels(const ps_trees *m) { return m->n_raw == 2 && !m->onnx_binary; }

int ps_trees_model_predict(const ps_model *self, const double *x, size_t rows, size_t stride, double *out) {
    return ps_trees_predict(self->state, x, rows, stride, out, 0);
}
