/* window_state.c (hot path): the window state kernel; window_state.h says what it is and defines the words.
 *
 * Order of this file: heap, hash table, strings, layout, ring, evicting, applying, reading, sweeping, life of a store.
 * What must stay true: apply does everything that can fail before it changes anything that a read can see; every
 * reference inside the mapping is an offset (ref: in units of 16 bytes).
 */
#include "window_state.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "arena.h"
#include "exact_sum.h"

#define LIKELY(x) __builtin_expect(!!(x), 1)
#define UNLIKELY(x) __builtin_expect(!!(x), 0)
#define OFF_PATH __attribute__((noinline)) /* rare: kept out of the callers' registers */

enum { UNIT = 16, FORMAT = 2, N_CLASSES = 136, FIRST_BUCKETS = 256, MAX_SEGMENTS = 24, CHUNK_BYTES = 4096 };
enum { KEY_INLINE = 24, SWEEP_EVENTS = 4096, HUGE_AFTER = 2 << 20 };
#define MAGIC 0x31535749544e4550ULL /* "PENTIWS1" */
#define NO_TIME INT64_MIN           /* before every time and every left edge */
#define FOR_EVER ((int64_t)1 << 62)  /* longer than between any two times */
#define AT_END INT64_MAX            /* next_time of a tail behind the newest event */
#define STRING_ELSEWHERE 0xffffffffu /* a string of a request event that no stored event has */

typedef uint32_t ref_t;

/* ---- what lies in the mapping ---------------------------------------------------------------------------------- */

typedef struct { /* every hashed object starts so */
    ref_t next;
    uint32_t hash;
} node_t;

typedef struct { /* linear hashing: grows by one bucket at a time */
    ref_t segment[MAX_SEGMENTS];
    uint64_t buckets, low; /* low: largest power of two <= buckets */
    uint64_t count;
} table_t;

typedef struct {
    uint64_t magic, fingerprint;
    uint32_t format, blob_bytes;
    uint64_t bump, free_units; /* units */
    int64_t watermark;
    uint64_t applied, events, sweep_bucket;
    ref_t empty; /* the blob that unknown entities are read from */
    ref_t free_list[N_CLASSES];
    table_t entities, strings;
    uint64_t missing; /* 0; or events before this time (less PS_TIME_MIN - 1) may be missing, though not dropped here */
    uint64_t seed[2]; /* of every hash here; secret: whoever knows it makes keys that collide. 0: before there was one */
} map_t; /* format 1 ended before `missing`, with zeros behind it */

typedef struct {
    node_t node;
    uint32_t references, length;
    char bytes[];
} string_t;

typedef struct {
    ref_t next, prev;
    uint16_t count, capacity;
    uint16_t head;   /* bytes before the first record */
    uint8_t sealed;  /* the summary behind this header is valid; the last chunk never is */
    uint8_t class;   /* size class */
} chunk_t;

/* Behind the header of a full chunk: per summary a winner_t over it (once sealed), then per summary a rest_t. */

typedef struct { /* a winner of min, max (bits: ordered key), first or last (bits: the value) */
    uint64_t bits;
    int64_t time;
} winner_t;

typedef struct { /* the winner over the sealed chunks behind this one, up to and including `until`; 0: none yet */
    winner_t winner;
    ref_t until;
    uint32_t stamp; /* valid while it equals the blob's late_stamp */
} rest_t;

typedef struct {
    ref_t chunk;
    uint32_t index;
    int64_t next_time; /* of the event under the cursor */
    uint32_t passed;   /* events before the window: what count() without where subtracts */
    uint32_t pad;
} tail_t;

typedef struct {
    node_t node;
    uint64_t version;
    int64_t newest;   /* largest event time; NO_TIME: none */
    int64_t cursor;   /* the T that the tails stand at */
    ref_t first, last;
    uint32_t events;
    uint16_t format;
    uint8_t key_is_int, pad;
    uint64_t fingerprint;
    uint64_t gone; /* newest event time that has left the ring, less PS_TIME_MIN - 1; 0: none (in format 1: unknown) */
    int64_t log_id, sequence;
    uint32_t late_stamp, pad2; /* counts events put into sealed chunks */
    uint32_t key_len;
    ref_t key_ref;
    union {
        char key[KEY_INLINE];
        int64_t key_i;
    };
} blob_t;

typedef struct { /* distinct values of one cell: open addressing */
    ref_t ref;
    uint32_t used, capacity, pad;
} values_t;

typedef struct { /* free when ring and forgotten are both 0 */
    uint64_t key;
    uint32_t ring;      /* events in the ring with this value */
    uint32_t forgotten; /* 1: an event with it has left the ring (kept only for Lifetime) */
    uint32_t inside[];  /* events per distinct tail */
} value_t;

/* ---- what the process keeps: the layout, compiled -------------------------------------------------------------- */

typedef struct {
    int column, type, where;
    int slot;                         /* word of the value in a record */
    uint64_t where_mask, null_mask;   /* 0: always, never */
    uint8_t is_float, is_string, is_sum, is_squares, is_distinct, is_last, keeps_last, distinct_lifetime;
    uint32_t off_n;                   /* uint64 total, then uint32 evicted per tail */
    uint32_t off_sum, off_squares, off_last, off_old_last, off_values;
    int n_sums, n_squares;            /* accumulators, the total included */
    int n_inside, value_bytes;        /* distinct tails, bytes per value_t */
    int min_summary, max_summary;     /* index among a chunk's summaries, or -1 */
    int first_pair, n_pairs;          /* into cell_pairs */
    uint8_t plain;                    /* events, or a float64 column with count, sum, mean, min and max only */
    int first_plain, n_max, n_min;    /* into plain_winners: places of the max winners, then of the min winners */
} cell_t;

typedef struct {
    int cell, tail; /* tail -1: Lifetime */
    uint32_t off_n; /* uint32 evicted; 0 for Lifetime */
    uint8_t is_sum, is_squares, is_distinct, is_first;
    uint8_t is_passed; /* count() without where: off_n is the tail's */
    int j_sum, j_squares, j_inside;
    uint32_t off_min, off_max, off_first, off_distinct;
    uint32_t off_old_min, off_old_max; /* Lifetime: over what has left the ring */
} pair_t;

typedef struct {
    uint8_t function;
    uint8_t type;
    uint32_t out;
    int64_t ttl;
} result_t;

typedef struct { /* one (pair, right edge) of a group and the results made from it */
    int pair, right; /* right: 0 for t <= T, 1 for t < T */
    uint32_t first_result, n_results;
    uint8_t only_counts;                /* read in one go with the others of the group when everything is plain */
    uint8_t plain;                      /* the results are the following, each at most once */
    int count, sum, mean, min, max;     /* places in the output; -1: not wanted */
    uint32_t off_total, off_n, off_sum; /* of the pair, to save the way through pair and cell */
    int j_sum;
    uint32_t off_min, off_max;
    int64_t edge; /* left edge = T - edge */
} step_t;

typedef struct {
    uint32_t off_total, off_n, out;
} count_t;

typedef struct { /* what evicting does for one pair of a tail */
    uint64_t where_mask;
    uint32_t off_n, off_sum;
    int slot, j_sum, pair;
    uint8_t plain;
} evict_t;

typedef struct {
    uint64_t n;
    uint64_t sum[PS_MAX_LIMBS], squares[PS_MAX_LIMBS];
} after_t; /* what of one cell lies after the right edge */

struct ps_store {
    char *base;
    map_t *map;
    uint64_t secret[4]; /* out of the map's seed */
    uint64_t reserved, committed;
    int huge;
    uint8_t small_pages; /* asked for: holds for what is loaded later too */
    uint8_t wipe;        /* what is freed is overwritten */
    char *loading;       /* begin_load's mapping, until commit_load or cancel_load */
    uint64_t loading_reserved, loading_committed;
    int loading_huge;

    uint32_t n_columns, n_where, n_groups, n_cells, n_tails, n_pairs;
    uint8_t *columns;
    int where_word, null_word, first_value, stride; /* of a record, in words; 0: absent */
    uint64_t *null_bit;                             /* per column; 0: null is in the value */
    int64_t lateness, longest;  /* longest: of the finite windows */
    int64_t retention;          /* of Lifetime; PS_NO_RETENTION */
    int64_t release_before;     /* an entity whose newest event is so far before the watermark may be released */
    int64_t anew_after;         /* an event so long after the entity's newest starts it anew */
    uint8_t releasable, event_work, has_strings, any_left_closed;
    uint8_t format_1_unfit;     /* a store of format 1 may hold what is wrong */
    int64_t *reach;             /* per group: an entity is known at T if it has an event in T - reach .. T */
    uint64_t fingerprint;
    int64_t *edge; /* per tail: left edge = T - edge */
    int64_t least_edge;
    uint32_t blob_units, off_tails;
    int n_summaries;
    uint32_t first_chunk_units, full_chunk_units;
    uint64_t most_apply; /* bytes that one apply may take, beside strings and distinct values */
    char *blob_image;

    cell_t *cells;
    pair_t *pairs;
    int *cell_pairs;                /* pairs ordered by cell */
    evict_t *evicts;                /* pairs ordered by tail; tail k: tail_start[k]..tail_start[k + 1] */
    int *tail_start;
    uint32_t *plain_winners;
    step_t *steps;
    uint32_t *group_start;          /* steps */
    count_t *counts;                /* the steps of a group that only count */
    uint32_t *count_start;
    result_t *results;

    uint64_t *record, *extra;       /* scratch */
    after_t *after[2];
};

#define AT(S, type, ref) ((type *)((S)->base + (uint64_t)(ref) * UNIT))
#define IN(B, type, off) ((type *)((char *)(B) + (off)))

/* ---- heap: one mapping, size classes, free lists --------------------------------------------------------------- */

static inline int size_class(uint32_t units, uint32_t *size) {
    if (units <= 32) {
        *size = units;
        return (int)units - 1;
    }
    uint32_t u = units - 1;
    int k = 31 - __builtin_clz(u), sub = (int)(u >> (k - 2)) & 3;
    *size = (uint32_t)(5 + sub) << (k - 2);
    return 32 + (k - 5) * 4 + sub;
}

static inline uint32_t class_size(int c) {
    return c < 32 ? (uint32_t)c + 1 : (uint32_t)(5 + ((c - 32) & 3)) << ((c - 32) / 4 + 3);
}

static int commit_to(ps_store *S, uint64_t bytes) {
    if (bytes <= S->committed) return 1;
    if (bytes > S->reserved) return 0;
    uint64_t step = S->committed >> 3;
    if (step > (64u << 20)) step = 64u << 20;
    uint64_t to = bytes + step, grain = to > HUGE_AFTER ? HUGE_AFTER : 1 << 16; /* never half of a large page */
    to = (to + grain - 1) & ~(grain - 1);
    if (to > S->reserved) to = S->reserved;
    if (mprotect(S->base + S->committed, to - S->committed, PROT_READ | PROT_WRITE)) return 0;
    S->committed = to;
#ifdef MADV_HUGEPAGE
    /* A large store is read at random: large pages save a page walk per cache miss. A small one keeps small pages. */
    if (to > HUGE_AFTER && !S->huge) {
        madvise(S->base + HUGE_AFTER, S->reserved - HUGE_AFTER, MADV_HUGEPAGE);
        S->huge = 1;
    }
#endif
    return 1;
}

/* From here on the store grows by small pages: to find and clear a large one takes the system milliseconds, which one
 * event would wait for. What is there already stays in large pages. */
static void store_small_pages(ps_store *S) {
#ifdef MADV_NOHUGEPAGE
    madvise(S->base, S->reserved, MADV_NOHUGEPAGE);
#endif
    S->huge = 1; /* do not ask for them again */
    S->small_pages = 1;
}

/* Fresh memory, all zeros. */
static ref_t heap_bump(ps_store *S, uint32_t units) {
    uint64_t at = S->map->bump;
    if (UNLIKELY(!commit_to(S, (at + units) * UNIT))) return 0;
    S->map->bump = at + units;
    return (ref_t)at;
}

static ref_t heap_alloc(ps_store *S, uint32_t units) {
    uint32_t size;
    int c = size_class(units, &size);
    ref_t ref = S->map->free_list[c];
    if (ref) {
        S->map->free_list[c] = *AT(S, ref_t, ref);
        S->map->free_units -= size;
        return ref;
    }
    return heap_bump(S, size);
}

static void heap_free_class(ps_store *S, ref_t ref, int c) {
    if (UNLIKELY(S->wipe)) memset(AT(S, char, ref), 0, (uint64_t)class_size(c) * UNIT);
    *AT(S, ref_t, ref) = S->map->free_list[c];
    S->map->free_list[c] = ref;
    S->map->free_units += class_size(c);
}

static void heap_free(ps_store *S, ref_t ref, uint32_t units) {
    uint32_t size;
    heap_free_class(S, ref, size_class(units, &size));
}

static inline uint32_t units_of(uint64_t bytes) { return (uint32_t)((bytes + UNIT - 1) / UNIT); }

/* ---- hash table: linear hashing, so that growth never stops the caller ----------------------------------------- */

static inline node_t *bucket_at(const ps_store *S, const table_t *t, uint64_t b) {
    if (b < FIRST_BUCKETS) return AT(S, node_t, t->segment[0]) + b;
    int k = 63 - __builtin_clzll(b); /* buckets 2^k .. 2^(k+1)-1 */
    return AT(S, node_t, t->segment[k - 7]) + (b - ((uint64_t)1 << k));
}

static inline node_t *bucket_of(const ps_store *S, const table_t *t, uint32_t hash) {
    uint64_t b = hash & (2 * t->low - 1);
    if (b >= t->buckets) b = hash & (t->low - 1);
    return bucket_at(S, t, b);
}

static int table_init(ps_store *S, table_t *t) {
    memset(t, 0, sizeof *t);
    t->segment[0] = heap_bump(S, FIRST_BUCKETS * sizeof(node_t) / UNIT);
    t->buckets = t->low = FIRST_BUCKETS;
    return t->segment[0] != 0;
}

/* One more bucket; without memory the chains just get longer. */
OFF_PATH static void table_split(ps_store *S, table_t *t) {
    uint64_t fresh = t->buckets;
    if (fresh == t->low) {
        int k = 63 - __builtin_clzll(fresh);
        if (k - 7 >= MAX_SEGMENTS) return;
        if (!t->segment[k - 7]) {
            ref_t ref = heap_bump(S, (uint32_t)(fresh * sizeof(node_t) / UNIT));
            if (!ref) return;
            t->segment[k - 7] = ref;
        }
    }
    node_t *from = bucket_at(S, t, fresh - t->low), *to = bucket_at(S, t, fresh);
    ref_t ref = from->next, stay = 0, go = 0;
    while (ref) {
        node_t *n = AT(S, node_t, ref);
        ref_t next = n->next;
        if ((n->hash & (2 * t->low - 1)) == fresh) {
            n->next = go;
            go = ref;
        } else {
            n->next = stay;
            stay = ref;
        }
        ref = next;
    }
    from->next = stay;
    from->hash = stay ? AT(S, node_t, stay)->hash : 0;
    to->next = go;
    to->hash = go ? AT(S, node_t, go)->hash : 0;
    t->buckets++;
    if (t->buckets == 2 * t->low) t->low = t->buckets;
}

static void table_insert(ps_store *S, table_t *t, ref_t ref, uint32_t hash) {
    node_t *b = bucket_of(S, t, hash), *n = AT(S, node_t, ref);
    n->next = b->next;
    n->hash = hash;
    b->next = ref;
    b->hash = hash;
    t->count++;
    for (int i = 0; i < 2 && t->buckets < 2 * t->count; i++) table_split(S, t);
}

static void table_remove(ps_store *S, table_t *t, ref_t ref) {
    node_t *n = AT(S, node_t, ref), *b = bucket_of(S, t, n->hash);
    ref_t *link = &b->next;
    while (*link != ref) link = &AT(S, node_t, *link)->next;
    *link = n->next;
    b->hash = b->next ? AT(S, node_t, b->next)->hash : 0;
    t->count--;
}

static inline uint64_t mix(uint64_t a, uint64_t b) {
    ps_u128 p = (ps_u128)a * b;
    return (uint64_t)p ^ (uint64_t)(p >> 64);
}

static inline uint64_t load8(const char *p) { uint64_t v; memcpy(&v, p, 8); return v; }
static inline uint64_t load4(const char *p) { uint32_t v; memcpy(&v, p, 4); return v; }

#define K0 0x9e3779b97f4a7c15ULL
#define K1 0xd6e8feb86659fd93ULL
#define K2 0xa0761d6478bd642fULL

/* Folded multiplication in the manner of wyhash, both factors of every step under a word of k. With a secret k nobody can
 * choose a factor that is 0, which would forget all that came before it, nor keys that collide. */
static inline uint64_t hash_bytes(const uint64_t k[4], const char *p, uint32_t len) {
    uint64_t h = k[0] ^ len, a, b;
    uint32_t left = len;
    while (left > 16) {
        h = mix(load8(p) ^ k[1], load8(p + 8) ^ h);
        p += 16;
        left -= 16;
    }
    if (left >= 8) {
        a = load8(p);
        b = load8(p + left - 8);
    } else if (left >= 4) {
        a = load4(p);
        b = load4(p + left - 4);
    } else if (left) {
        a = (uint64_t)(uint8_t)p[0] << 16 | (uint64_t)(uint8_t)p[left >> 1] << 8 | (uint8_t)p[left - 1];
        b = 0;
    } else {
        a = b = 0;
    }
    return mix(mix(a ^ k[1], b ^ h) ^ k[2], k[3] ^ len);
}

static inline uint64_t hash_word(const ps_store *S, uint64_t v) { return mix(v ^ S->secret[0], S->secret[1]); }

static inline uint64_t hash_key(const uint64_t k[4], const ps_key *key) {
    return key->is_int ? mix(mix((uint64_t)key->i ^ k[0], k[1]) ^ k[2], k[3]) : hash_bytes(k, key->str, key->len);
}

static uint64_t key_hash(const ps_store *S, const ps_key *key) { return hash_key(S->secret, key); }

static uint64_t key_partition(const ps_key *key) {
    static const uint64_t k[4] = {K0, K1, K2, K0};
    return hash_key(k, key);
}

/* The seed's two words, stirred into four (the finalizer of MurmurHash3). */
static void take_seed(ps_store *S) {
    for (int i = 0; i < 4; i++) {
        uint64_t x = S->map->seed[i & 1] + K0 * (uint64_t)(i + 1);
        for (int turn = 0; turn < 2; turn++) {
            x = (x ^ x >> 33) * 0xff51afd7ed558ccdULL;
            x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53ULL;
            x ^= x >> 33;
            x += S->map->seed[~i & 1];
        }
        S->secret[i] = x;
    }
}

/* ---- strings: interned, counted -------------------------------------------------------------------------------- */

static ref_t string_find(const ps_store *S, const char *p, uint32_t len, uint32_t hash) {
    for (ref_t ref = bucket_of(S, &S->map->strings, hash)->next; ref;) {
        const string_t *s = AT(S, string_t, ref);
        if (s->node.hash == hash && s->length == len && !memcmp(s->bytes, p, len)) return ref;
        ref = s->node.next;
    }
    return 0;
}

static ref_t string_hold(ps_store *S, const char *p, uint32_t len) {
    uint32_t hash = (uint32_t)hash_bytes(S->secret, p, len);
    ref_t ref = string_find(S, p, len, hash);
    if (!ref) {
        ref = heap_alloc(S, units_of(sizeof(string_t) + len));
        if (!ref) return 0;
        string_t *s = AT(S, string_t, ref);
        s->references = 0;
        s->length = len;
        memcpy(s->bytes, p, len);
        table_insert(S, &S->map->strings, ref, hash);
    }
    AT(S, string_t, ref)->references++;
    return ref;
}

static void string_drop(ps_store *S, ref_t ref) {
    string_t *s = AT(S, string_t, ref);
    if (--s->references) return;
    table_remove(S, &S->map->strings, ref);
    heap_free(S, ref, units_of(sizeof(string_t) + s->length));
}

/* A winner that outlives its event holds its string. */
static inline void winner_set(ps_store *S, winner_t *w, uint64_t bits, int64_t time, int is_string) {
    if (is_string) {
        AT(S, string_t, (ref_t)bits)->references++;
        if (w->time != NO_TIME) string_drop(S, (ref_t)w->bits);
    }
    w->bits = bits;
    w->time = time;
}

/* ---- records --------------------------------------------------------------------------------------------------- */

static inline uint64_t *record_at(const ps_store *S, chunk_t *c, uint32_t i) {
    return (uint64_t *)((char *)c + c->head) + (uint64_t)i * (uint32_t)S->stride;
}

static inline int64_t record_time(const ps_store *S, chunk_t *c, uint32_t i) { return (int64_t)*record_at(S, c, i); }

static inline int is_nan(uint64_t bits) { return bits << 1 > 0xffe0000000000000ULL; }

/* True if the event counts in this cell: its predicate is TRUE and its value is not null. */
static inline int matches(const ps_store *S, const cell_t *cell, const uint64_t *rec) {
    if (cell->where_mask && !(rec[S->where_word] & cell->where_mask)) return 0;
    if (cell->column < 0) return 1;
    if (cell->is_float) return !is_nan(rec[cell->slot]);
    if (cell->is_string) return rec[cell->slot] != 0;
    return !(rec[S->null_word] & cell->null_mask);
}

static inline ps_term term_of(const cell_t *cell, uint64_t bits) {
    return cell->is_float ? ps_term_of_double(bits) : ps_term_of_int((int64_t)bits);
}

/* Order-preserving: greater key, greater value; -0.0 before 0.0. Its own inverse on doubles. */
static inline int64_t ordered(const cell_t *cell, uint64_t bits) {
    return cell->is_float ? (int64_t)(bits ^ ((uint64_t)((int64_t)bits >> 63) >> 1)) : (int64_t)bits;
}

static inline uint64_t value_key(const cell_t *cell, uint64_t bits) {
    return cell->is_float && bits == 0x8000000000000000ULL ? 0 : bits;
}

/* min is the max of the complement. */
static inline void improve(winner_t *w, int64_t key, int64_t time) {
    int64_t held = (int64_t)w->bits;
    if (key > held || (key == held && time > w->time)) {
        w->bits = (uint64_t)key;
        w->time = time;
    }
}

/* Fills rec; strings are interned (intern) or only looked up. */
static int make_record(ps_store *S, const ps_event *e, uint64_t *rec, int intern) {
    if (e->event_time < PS_TIME_MIN || e->event_time > PS_TIME_MAX) return PS_STORE_TIME;
    rec[0] = (uint64_t)e->event_time;
    if (S->where_word) rec[S->where_word] = e->where_mask;
    uint64_t nulls = 0, *value = rec + S->first_value;
    for (uint32_t c = 0; c < S->n_columns; c++) {
        int present = (e->status[c] & 0x7f) == PS_PRESENT;
        uint64_t bits = e->values[c].u;
        if (S->columns[c] == PS_FLOAT64) {
            if (!present) bits = 0x7ff8000000000000ULL;
            if ((bits & 0x7ff0000000000000ULL) == 0x7ff0000000000000ULL) {
                if (!(bits & 0xfffffffffffffULL)) return PS_STORE_INFINITY;
                bits = 0x7ff8000000000000ULL;
            }
        } else if (S->columns[c] == PS_STRING) {
            bits = 0; /* interned below, once nothing else can be refused */
        } else if (!present) {
            nulls |= S->null_bit[c];
            bits = 0;
        }
        value[c] = bits;
    }
    if (S->null_word) rec[S->null_word] = nulls;
    if (S->has_strings)
        for (uint32_t c = 0; c < S->n_columns; c++) {
            if (S->columns[c] != PS_STRING || (e->status[c] & 0x7f) != PS_PRESENT) continue;
            const char *p = e->arena + PS_STR_OFFSET(e->values[c].u);
            uint32_t len = PS_STR_LENGTH(e->values[c].u);
            if (intern) {
                value[c] = string_hold(S, p, len);
                if (!value[c]) {
                    for (uint32_t d = 0; d < c; d++)
                        if (S->columns[d] == PS_STRING && value[d]) string_drop(S, (ref_t)value[d]);
                    return PS_STORE_MEMORY;
                }
            } else {
                ref_t ref = string_find(S, p, len, (uint32_t)hash_bytes(S->secret, p, len));
                value[c] = ref ? ref : STRING_ELSEWHERE;
            }
        }
    return PS_STORE_OK;
}

static void drop_record_strings(ps_store *S, const uint64_t *rec) {
    for (uint32_t c = 0; c < S->n_columns; c++)
        if (S->columns[c] == PS_STRING && rec[S->first_value + c]) string_drop(S, (ref_t)rec[S->first_value + c]);
}

/* ---- lanes: exact sums ----------------------------------------------------------------------------------------- */

static inline uint64_t *lane_data(const ps_store *S, ps_lane *lane) {
    return lane->ref ? AT(S, uint64_t, lane->ref) : (uint64_t *)(lane + 1);
}

static inline void lane_add(const ps_store *S, ps_lane *lane, int j, ps_term t, int subtract) {
    if (!lane->limbs) return; /* the term is zero */
    ps_limbs_add(lane_data(S, lane) + j * lane->limbs, lane->limbs, lane->base, t, subtract);
}

/* The same for a double that fits the lane, adding. */
static inline void lane_add_double(const ps_store *S, ps_lane *lane, int j, uint64_t bits) {
    ps_term t = ps_term_of_double(bits);
    int shift = t.exponent - lane->base;
    if (UNLIKELY(lane->limbs != 2 || shift < 0)) {
        lane_add(S, lane, j, t, 0);
        return;
    }
    uint64_t *at = (uint64_t *)(lane + 1) + 2 * j, sign = (uint64_t)((int64_t)bits >> 63);
    ps_u128 sum, v = (t.magnitude << shift) ^ (ps_u128)(ps_i128)(int64_t)sign;
    memcpy(&sum, at, 16);
    sum += v + (sign & 1);
    memcpy(at, &sum, 16);
}

/* Quick and sufficient: a double that a narrow lane takes as it is. */
static inline int lane_takes(const ps_lane *lane, uint64_t bits) {
    return lane->limbs == 2
        && (unsigned)(((int)(bits >> 52) & 0x7ff) - 1075 - lane->base) <= (unsigned)(128 - 1 - PS_NARROW_HEADROOM - 53)
        && lane->ref == 0;
}

/* Makes room for the term (or, with `wide`, for 2^40 terms). 0 without memory; sums keep their values either way. */
OFF_PATH static int lane_make_room(ps_store *S, ps_lane *lane, int accumulators, int square, ps_term t, int wide) {
    int base, narrow = lane->ref == 0, is_narrow;
    if (t.magnitude == 0 && !(wide && lane->limbs)) return 1;
    if (t.magnitude == 0 || (wide && ps_lane_fits(lane->base, lane->limbs, 0, t)))
        t = (ps_term){1, lane->base, 0};
    int limbs = ps_lane_form(lane, narrow, square, t, &base, &is_narrow);
    if (is_narrow) {
        lane->base = (int16_t)base;
        lane->limbs = (uint16_t)limbs;
        return !wide || lane_make_room(S, lane, accumulators, square, t, 1);
    }
    ref_t ref = heap_alloc(S, units_of((uint64_t)accumulators * limbs * 8));
    if (!ref) return 0;
    uint64_t *to = AT(S, uint64_t, ref), *from = lane_data(S, lane);
    for (int j = 0; j < accumulators; j++)
        ps_limbs_widen(to + j * limbs, limbs, from + j * lane->limbs, lane->limbs, lane->base - base);
    if (lane->ref) heap_free(S, lane->ref, units_of((uint64_t)accumulators * lane->limbs * 8));
    lane->ref = ref;
    lane->base = (int16_t)base;
    lane->limbs = (uint16_t)limbs;
    return 1;
}

static inline int lane_prepare(ps_store *S, ps_lane *lane, int accumulators, int square, ps_term t, int many) {
    int narrow = lane->ref == 0;
    if (LIKELY(ps_lane_fits(lane->base, lane->limbs, narrow, t) && !(many && narrow))) return 1;
    return lane_make_room(S, lane, accumulators, square, t, many && narrow);
}

/* ---- distinct values ------------------------------------------------------------------------------------------- */

static inline value_t *value_at(const ps_store *S, const cell_t *cell, const values_t *v, uint32_t i) {
    return (value_t *)(AT(S, char, v->ref) + (uint64_t)i * (uint32_t)cell->value_bytes);
}

static inline int value_free(const value_t *v) { return !(v->ring | v->forgotten); }

static value_t *value_find(const ps_store *S, const cell_t *cell, const values_t *v, uint64_t key) {
    if (!v->capacity) return NULL;
    for (uint32_t i = (uint32_t)hash_word(S, key) & (v->capacity - 1);; i = (i + 1) & (v->capacity - 1)) {
        value_t *e = value_at(S, cell, v, i);
        if (value_free(e)) return NULL;
        if (e->key == key) return e;
    }
}

/* Room for one more value. */
static int values_prepare(ps_store *S, const cell_t *cell, values_t *v) {
    if ((v->used + 1) * (uint64_t)4 <= v->capacity * (uint64_t)3) return 1;
    uint32_t capacity = v->capacity ? v->capacity * 2 : 4;
    ref_t ref = heap_alloc(S, units_of((uint64_t)capacity * cell->value_bytes));
    if (!ref) return 0;
    memset(AT(S, char, ref), 0, (uint64_t)capacity * cell->value_bytes);
    values_t grown = {ref, v->used, capacity, 0};
    for (uint32_t i = 0; i < v->capacity; i++) {
        value_t *e = value_at(S, cell, v, i);
        if (value_free(e)) continue;
        uint32_t k = (uint32_t)hash_word(S, e->key) & (capacity - 1);
        while (!value_free(value_at(S, cell, &grown, k))) k = (k + 1) & (capacity - 1);
        memcpy(value_at(S, cell, &grown, k), e, cell->value_bytes);
    }
    if (v->ref) heap_free(S, v->ref, units_of((uint64_t)v->capacity * cell->value_bytes));
    *v = grown;
    return 1;
}

static value_t *value_add(ps_store *S, const cell_t *cell, values_t *v, uint64_t key) {
    uint32_t i = (uint32_t)hash_word(S, key) & (v->capacity - 1);
    for (;; i = (i + 1) & (v->capacity - 1)) {
        value_t *e = value_at(S, cell, v, i);
        if (value_free(e)) {
            memset(e, 0, cell->value_bytes);
            e->key = key;
            v->used++;
            if (cell->is_string) AT(S, string_t, (ref_t)key)->references++;
            return e;
        }
        if (e->key == key) return e;
    }
}

/* e has just become free: closes the gap in its probe sequence. */
static void value_remove(ps_store *S, const cell_t *cell, values_t *v, value_t *e) {
    uint32_t mask = v->capacity - 1;
    uint32_t gap = (uint32_t)(((char *)e - AT(S, char, v->ref)) / cell->value_bytes);
    if (cell->is_string) string_drop(S, (ref_t)e->key);
    v->used--;
    for (uint32_t i = (gap + 1) & mask;; i = (i + 1) & mask) {
        value_t *f = value_at(S, cell, v, i);
        if (value_free(f)) break;
        uint32_t home = (uint32_t)hash_word(S, f->key) & mask;
        if (((i - home) & mask) < ((i - gap) & mask)) continue; /* f's home lies behind the gap */
        memcpy(value_at(S, cell, v, gap), f, cell->value_bytes);
        f->ring = f->forgotten = 0;
        gap = i;
    }
}

/* ---- tails: what leaves and re-enters on the left -------------------------------------------------------------- */

static inline tail_t *tails_of(const ps_store *S, blob_t *B) { return IN(B, tail_t, S->off_tails); }

OFF_PATH static void evict_pair(ps_store *S, blob_t *B, const pair_t *pair, const uint64_t *rec) {
    const cell_t *cell = &S->cells[pair->cell];
    if (!matches(S, cell, rec)) return;
    ++*IN(B, uint32_t, pair->off_n);
    if (pair->is_sum || pair->is_squares) {
        ps_term t = term_of(cell, rec[cell->slot]);
        if (pair->is_sum) lane_add(S, IN(B, ps_lane, cell->off_sum), pair->j_sum, t, 0);
        if (pair->is_squares) lane_add(S, IN(B, ps_lane, cell->off_squares), pair->j_squares, ps_term_squared(t), 0);
    }
    if (pair->is_distinct) {
        value_t *v = value_find(S, cell, IN(B, values_t, cell->off_values), value_key(cell, rec[cell->slot]));
        if (!--v->inside[pair->j_inside]) --*IN(B, uint32_t, pair->off_distinct);
    }
}

static inline void evict(ps_store *S, blob_t *B, const evict_t *e, const evict_t *end, const uint64_t *rec) {
    for (; e < end; e++) {
        if (UNLIKELY(!e->plain)) {
            evict_pair(S, B, &S->pairs[e->pair], rec);
            continue;
        }
        if (UNLIKELY(e->where_mask) && !(rec[S->where_word] & e->where_mask)) continue;
        uint64_t bits = rec[e->slot];
        if (UNLIKELY(e->slot && is_nan(bits))) continue;
        ++*IN(B, uint32_t, e->off_n);
        if (e->off_sum) lane_add_double(S, IN(B, ps_lane, e->off_sum), e->j_sum, bits);
    }
}

static void unevict(ps_store *S, blob_t *B, int k, const uint64_t *rec) {
    for (int p = S->tail_start[k]; p < S->tail_start[k + 1]; p++) {
        const pair_t *pair = &S->pairs[S->evicts[p].pair];
        const cell_t *cell = &S->cells[pair->cell];
        if (!matches(S, cell, rec)) continue;
        uint64_t bits = cell->column < 0 ? 0 : rec[cell->slot];
        --*IN(B, uint32_t, pair->off_n);
        if (pair->is_sum || pair->is_squares) {
            ps_term t = term_of(cell, bits);
            if (pair->is_sum) lane_add(S, IN(B, ps_lane, cell->off_sum), pair->j_sum, t, 1);
            if (pair->is_squares)
                lane_add(S, IN(B, ps_lane, cell->off_squares), pair->j_squares, ps_term_squared(t), 1);
        }
        if (pair->off_min) improve(IN(B, winner_t, pair->off_min), ~ordered(cell, bits), (int64_t)rec[0]);
        if (pair->off_max) improve(IN(B, winner_t, pair->off_max), ordered(cell, bits), (int64_t)rec[0]);
        if (pair->off_first) *IN(B, winner_t, pair->off_first) = (winner_t){bits, (int64_t)rec[0]};
        if (pair->is_distinct) {
            value_t *v = value_find(S, cell, IN(B, values_t, cell->off_values), value_key(cell, bits));
            if (!v->inside[pair->j_inside]++) ++*IN(B, uint32_t, pair->off_distinct);
        }
    }
}

static void seek_forward(ps_store *S, blob_t *B, int k, int64_t left) {
    tail_t *tail = tails_of(S, B) + k;
    chunk_t *c = AT(S, chunk_t, tail->chunk);
    uint32_t i = tail->index, count = c->count, stride = (uint32_t)S->stride, passed = 0;
    const uint64_t *rec = record_at(S, c, i);
    const evict_t *first = S->evicts + S->tail_start[k], *end = S->evicts + S->tail_start[k + 1];
    int64_t next_time = AT_END;
    for (;;) {
        if (UNLIKELY(i == count)) {
            if (!c->next) break;
            tail->chunk = c->next;
            c = AT(S, chunk_t, c->next);
            i = 0;
            count = c->count;
            rec = record_at(S, c, 0);
            continue;
        }
        if ((int64_t)rec[0] >= left) {
            next_time = (int64_t)rec[0];
            break;
        }
        evict(S, B, first, end, rec);
        passed++;
        i++;
        rec += stride;
    }
    tail->index = i;
    tail->next_time = next_time;
    tail->passed += passed;
}

OFF_PATH static void seek_backward(ps_store *S, blob_t *B, int k, int64_t left) {
    tail_t *tail = tails_of(S, B) + k;
    if (!tail->chunk) return;
    chunk_t *c = AT(S, chunk_t, tail->chunk);
    uint32_t i = tail->index;
    for (;;) {
        if (i == 0) {
            if (!c->prev) break;
            tail->chunk = c->prev;
            c = AT(S, chunk_t, c->prev);
            i = c->count;
            continue;
        }
        const uint64_t *rec = record_at(S, c, i - 1);
        if ((int64_t)rec[0] < left) break;
        unevict(S, B, k, rec);
        tail->next_time = (int64_t)rec[0];
        tail->passed--;
        i--;
    }
    tail->index = i;
}

static inline void seek(ps_store *S, blob_t *B, int64_t T) {
    if (T == B->cursor) return;
    tail_t *tail = tails_of(S, B);
    if (LIKELY(T > B->cursor)) {
        for (uint32_t k = 0; k < S->n_tails; k++)
            if (tail[k].next_time < T - S->edge[k]) seek_forward(S, B, (int)k, T - S->edge[k]);
    } else {
        for (uint32_t k = 0; k < S->n_tails; k++) seek_backward(S, B, (int)k, T - S->edge[k]);
    }
    B->cursor = T;
}

/* ---- ring: chunks in event-time order -------------------------------------------------------------------------- */

static inline winner_t *summary_of(chunk_t *c) { return (winner_t *)(c + 1); }

static inline rest_t *rest_of(const ps_store *S, chunk_t *c) { return (rest_t *)(summary_of(c) + S->n_summaries); }

static inline uint32_t summary_bytes(const ps_store *S) {
    return ((uint32_t)S->n_summaries * (uint32_t)(sizeof(winner_t) + sizeof(rest_t)) + 15) & ~15u;
}

/* What a chunk of some size is: the one place that knows. full: it has room for summaries, and is the largest. */
typedef struct {
    uint32_t size; /* units, of its class */
    uint8_t class, full;
    uint16_t head, capacity;
} chunk_form_t;

static chunk_form_t chunk_form(const ps_store *S, uint32_t units) {
    chunk_form_t form = {0};
    form.class = (uint8_t)size_class(units, &form.size);
    form.full = form.size >= S->full_chunk_units;
    form.head = (uint16_t)(sizeof(chunk_t) + (form.full ? summary_bytes(S) : 0));
    form.capacity = (uint16_t)((form.size * UNIT - form.head) / ((uint32_t)S->stride * 8));
    return form;
}

/* What an only chunk of this class grows into: of twice the size, and full where that would hold as much or more. */
static chunk_form_t chunk_form_after(const ps_store *S, int class) {
    chunk_form_t full = chunk_form(S, S->full_chunk_units), next = chunk_form(S, class_size(class) * 2 - 1);
    return next.full || next.capacity >= full.capacity ? full : next;
}

/* Of a chunk that lies in the mapping, also one of an older version; NULL, or what is wrong with it. */
static const char *chunk_fault(const ps_store *S, const chunk_t *c) {
    uint32_t bytes = class_size(c->class) * UNIT, record = (uint32_t)S->stride * 8;
    int summarized = c->head >= sizeof(chunk_t) + summary_bytes(S);
    if (c->head < sizeof(chunk_t) || c->head + c->capacity * record > bytes) return "its capacity is beyond its bytes";
    if (c->count > c->capacity) return "it holds more than its capacity";
    if ((c->sealed || c->next) && !summarized) return "it has no room for the summaries that it needs";
    return NULL;
}

#ifdef PENSTOCK_DEBUG
#define CHECK_CHUNK(S, c)                                                                                              \
    do {                                                                                                               \
        const char *fault = chunk_fault(S, c);                                                                         \
        if (fault) {                                                                                                   \
            fprintf(stderr, "window state: a chunk is damaged: %s\n", fault);                                          \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)
#else
#define CHECK_CHUNK(S, c) ((void)0)
#endif

static ref_t chunk_new(ps_store *S, chunk_form_t form) {
    ref_t ref = heap_alloc(S, form.size);
    if (!ref) return 0;
    chunk_t *c = AT(S, chunk_t, ref);
    memset(c + 1, 0, form.head - sizeof(chunk_t));
    *c = (chunk_t){0, 0, 0, form.capacity, form.head, 0, form.class};
    return ref;
}

static void chunk_free(ps_store *S, ref_t ref) { heap_free_class(S, ref, AT(S, chunk_t, ref)->class); }

static void summarize(const ps_store *S, const uint64_t *rec, winner_t *w) {
    for (uint32_t i = 0; i < S->n_cells; i++) {
        const cell_t *cell = &S->cells[i];
        if ((cell->min_summary < 0 && cell->max_summary < 0) || !matches(S, cell, rec)) continue;
        int64_t key = ordered(cell, rec[cell->slot]);
        if (cell->min_summary >= 0) improve(&w[cell->min_summary], ~key, (int64_t)rec[0]);
        if (cell->max_summary >= 0) improve(&w[cell->max_summary], key, (int64_t)rec[0]);
    }
}

OFF_PATH static void seal(const ps_store *S, chunk_t *c) {
    if (!S->n_summaries) return;
    for (int i = 0; i < S->n_summaries; i++) summary_of(c)[i] = (winner_t){(uint64_t)INT64_MIN, NO_TIME};
    for (uint32_t i = 0; i < c->count; i++) summarize(S, record_at(S, c, i), summary_of(c));
    c->sealed = 1;
    CHECK_CHUNK(S, c);
}

/* The event leaves the ring: every tail has passed it and no admissible read looks that far back. */
static void forget(ps_store *S, blob_t *B, const uint64_t *rec) {
    for (uint32_t i = 0; i < S->n_cells; i++) {
        const cell_t *cell = &S->cells[i];
        if (!(cell->is_distinct | cell->keeps_last) || !matches(S, cell, rec)) continue;
        uint64_t bits = rec[cell->slot];
        if (cell->keeps_last) {
            winner_t *w = IN(B, winner_t, cell->off_old_last);
            if ((int64_t)rec[0] >= w->time) winner_set(S, w, bits, (int64_t)rec[0], cell->is_string);
        }
        if (cell->is_distinct) {
            values_t *v = IN(B, values_t, cell->off_values);
            value_t *e = value_find(S, cell, v, value_key(cell, bits));
            e->ring--;
            e->forgotten |= cell->distinct_lifetime;
            if (value_free(e)) value_remove(S, cell, v, e);
        }
    }
    for (uint32_t p = 0; p < S->n_pairs; p++) {
        const pair_t *pair = &S->pairs[p];
        if (!(pair->off_old_min | pair->off_old_max)) continue;
        const cell_t *cell = &S->cells[pair->cell];
        if (!matches(S, cell, rec)) continue;
        int64_t key = ordered(cell, rec[cell->slot]);
        if (pair->off_old_min) improve(IN(B, winner_t, pair->off_old_min), ~key, (int64_t)rec[0]);
        if (pair->off_old_max) improve(IN(B, winner_t, pair->off_old_max), key, (int64_t)rec[0]);
    }
    if (S->has_strings) drop_record_strings(S, rec);
}

static void forget_front(ps_store *S, blob_t *B, chunk_t *c, uint32_t n) {
    if (S->event_work)
        for (uint32_t i = 0; i < n; i++) forget(S, B, record_at(S, c, i));
    if (n) B->gone = (uint64_t)record_time(S, c, n - 1) - (uint64_t)(PS_TIME_MIN - 1);
    B->events -= n;
    S->map->events -= n;
}

/* Frees the first chunk; every tail has passed it. */
static void drop_first_chunk(ps_store *S, blob_t *B) {
    ref_t ref = B->first;
    chunk_t *c = AT(S, chunk_t, ref);
    forget_front(S, B, c, c->count);
    tail_t *tail = tails_of(S, B);
    for (uint32_t k = 0; k < S->n_tails; k++)
        if (tail[k].chunk == ref) {
            tail[k].chunk = c->next;
            tail[k].index = 0;
        }
    B->first = c->next;
    if (c->next) AT(S, chunk_t, c->next)->prev = 0;
    else B->last = 0;
    chunk_free(S, ref);
}

/* Drops what no admissible read can reach any more: whole chunks, or the front of an only chunk. */
OFF_PATH static void drop_old(ps_store *S, blob_t *B, int64_t watermark) {
    if (!B->first || watermark < PS_TIME_MIN) return;
    int64_t oldest_T = watermark - S->lateness, reach = oldest_T - S->longest;
    chunk_t *c = AT(S, chunk_t, B->first);
    if (!c->count || record_time(S, c, 0) >= reach) return;
    if (B->cursor < oldest_T) seek(S, B, oldest_T);
    while (c->next && record_time(S, c, c->count - 1) < reach) {
        drop_first_chunk(S, B);
        c = AT(S, chunk_t, B->first);
    }
    if (c->next) return;
    uint32_t n = 0;
    while (n < c->count && record_time(S, c, n) < reach) n++;
    if (2 * n < c->count) return;
    forget_front(S, B, c, n);
    memmove(record_at(S, c, 0), record_at(S, c, n), (uint64_t)(c->count - n) * (uint32_t)S->stride * 8);
    c->count = (uint16_t)(c->count - n);
    tail_t *tail = tails_of(S, B);
    for (uint32_t k = 0; k < S->n_tails; k++) tail[k].index -= n;
}

/* Replaces the only chunk by one of twice the size. */
OFF_PATH static int chunk_grow(ps_store *S, blob_t *B) {
    ref_t old = B->first;
    ref_t ref = chunk_new(S, chunk_form_after(S, AT(S, chunk_t, old)->class));
    if (!ref) return 0;
    chunk_t *c = AT(S, chunk_t, ref), *from = AT(S, chunk_t, old);
    c->count = from->count;
    CHECK_CHUNK(S, c);
    memcpy(record_at(S, c, 0), record_at(S, from, 0), (uint64_t)from->count * (uint32_t)S->stride * 8);
    tail_t *tail = tails_of(S, B);
    for (uint32_t k = 0; k < S->n_tails; k++) tail[k].chunk = ref;
    B->first = B->last = ref;
    chunk_free(S, old);
    return 1;
}

static inline int chunk_is_small(const ps_store *S, const chunk_t *c) {
    return class_size(c->class) < S->full_chunk_units;
}

/* Finds the place of a new event at time t: after every event with time <= t. Makes room there. 0 without memory. */
OFF_PATH static int place(ps_store *S, blob_t *B, int64_t t, ref_t *chunk, uint32_t *index) {
    if (UNLIKELY(!B->first)) {
        ref_t ref = chunk_new(S, chunk_form(S, S->first_chunk_units));
        if (!ref) return 0;
        B->first = B->last = ref;
        tail_t *tail = tails_of(S, B);
        for (uint32_t k = 0; k < S->n_tails; k++) {
            tail[k].chunk = ref;
            tail[k].index = 0;
            tail[k].next_time = AT_END;
        }
    }
    chunk_t *c = AT(S, chunk_t, B->last);
    if (UNLIKELY(c->count == c->capacity)) {
        drop_old(S, B, S->map->watermark);
        c = AT(S, chunk_t, B->last);
        if (c->count == c->capacity && B->first == B->last && chunk_is_small(S, c)) {
            if (!chunk_grow(S, B)) return 0;
            c = AT(S, chunk_t, B->last);
        }
    }
    if (LIKELY(t >= B->newest || c->count == 0)) {
        if (UNLIKELY(c->count == c->capacity)) {
            ref_t ref = chunk_new(S, chunk_form(S, S->full_chunk_units));
            if (!ref) return 0;
            seal(S, c);
            c->next = ref;
            AT(S, chunk_t, ref)->prev = B->last;
            B->last = ref;
            c = AT(S, chunk_t, ref);
        }
        *chunk = B->last;
        *index = c->count;
        return 1;
    }
    ref_t ref = B->last;
    while (c->prev && record_time(S, c, 0) > t) {
        ref = c->prev;
        c = AT(S, chunk_t, ref);
    }
    if (c->count == c->capacity) { /* split */
        ref_t fresh = chunk_new(S, chunk_form(S, S->full_chunk_units));
        if (!fresh) return 0;
        chunk_t *d = AT(S, chunk_t, fresh);
        uint32_t half = c->count / 2u;
        d->count = (uint16_t)(c->count - half);
        memcpy(record_at(S, d, 0), record_at(S, c, half), (uint64_t)d->count * (uint32_t)S->stride * 8);
        c->count = (uint16_t)half;
        d->next = c->next;
        d->prev = ref;
        if (c->next) {
            AT(S, chunk_t, c->next)->prev = fresh;
            seal(S, d);
        } else {
            B->last = fresh;
        }
        c->next = fresh;
        seal(S, c);
        for (int i = 0; i < S->n_summaries; i++) rest_of(S, c)[i].until = 0; /* what was split off is behind it now */
        tail_t *tail = tails_of(S, B);
        for (uint32_t k = 0; k < S->n_tails; k++)
            if (tail[k].chunk == ref && tail[k].index >= half) {
                tail[k].chunk = fresh;
                tail[k].index -= half;
            }
        if (record_time(S, d, 0) <= t) {
            ref = fresh;
            c = d;
        }
    }
    uint32_t lo = 0, hi = c->count;
    while (lo < hi) {
        uint32_t mid = (lo + hi) / 2;
        if (record_time(S, c, mid) <= t) lo = mid + 1;
        else hi = mid;
    }
    *chunk = ref;
    *index = lo;
    return 1;
}

/* An event has come into a sealed chunk: rests that it lies behind take it in, and those under a tail stay valid. */
OFF_PATH static void update_rests(ps_store *S, blob_t *B, ref_t chunk, const uint64_t *rec) {
    uint32_t old = B->late_stamp++;
    const tail_t *tail = tails_of(S, B);
    for (uint32_t k = 0; k < S->n_tails; k++) {
        chunk_t *c = AT(S, chunk_t, tail[k].chunk);
        if (!c->next) continue;
        int behind = tail[k].chunk != chunk && record_time(S, c, 0) <= (int64_t)rec[0];
        rest_t *rest = rest_of(S, c);
        for (uint32_t i = 0; i < S->n_cells; i++) {
            const cell_t *cell = &S->cells[i];
            if (cell->min_summary < 0 && cell->max_summary < 0) continue;
            int counts = behind && matches(S, cell, rec);
            int64_t key = counts ? ordered(cell, rec[cell->slot]) : 0;
            for (int is_min = 0; is_min < 2; is_min++) {
                int summary = is_min ? cell->min_summary : cell->max_summary;
                if (summary < 0 || !rest[summary].until || rest[summary].stamp != old) continue;
                if (counts) improve(&rest[summary].winner, is_min ? ~key : key, (int64_t)rec[0]);
                rest[summary].stamp = B->late_stamp;
            }
        }
    }
}

/* Writes the record at its place and keeps every tail at the first event inside its window. */
static void insert(ps_store *S, blob_t *B, ref_t chunk, uint32_t index, const uint64_t *rec) {
    chunk_t *c = AT(S, chunk_t, chunk);
    uint64_t *at = record_at(S, c, index);
    int64_t t = (int64_t)rec[0];
    tail_t *tail = tails_of(S, B);
    uint32_t before = c->count;
    if (index < before) memmove(at + S->stride, at, (uint64_t)(before - index) * (uint32_t)S->stride * 8);
    for (int i = 0; i < S->stride; i++) at[i] = rec[i];
    c->count++;
    CHECK_CHUNK(S, c);
    if (UNLIKELY(c->sealed)) {
        summarize(S, rec, summary_of(c));
        update_rests(S, B, chunk, rec);
    }
    for (uint32_t k = 0; k < S->n_tails; k++) {
        if (t >= B->cursor - S->edge[k]) {
            /* all before the cursor is older than the window: a time earlier than the next event's is the new next */
            if (t < tail[k].next_time) {
                tail[k].chunk = chunk;
                tail[k].index = index;
                tail[k].next_time = t;
            }
        } else {
            tail[k].passed++;
            if (tail[k].next_time == AT_END) {
                tail[k].chunk = B->last;
                tail[k].index = AT(S, chunk_t, B->last)->count;
            } else if (tail[k].chunk == chunk && tail[k].index >= index) {
                tail[k].index++;
            }
        }
    }
}

/* ---- apply ----------------------------------------------------------------------------------------------------- */

/* Gives back all that the entity holds beside its blob and key; its ring is empty or worthless. */
static void give_back(ps_store *S, blob_t *B) {
    while (B->first) drop_first_chunk(S, B);
    for (uint32_t i = 0; i < S->n_cells; i++) {
        const cell_t *cell = &S->cells[i];
        ps_lane *lane = IN(B, ps_lane, cell->off_sum);
        if (cell->is_sum && lane->ref) heap_free(S, lane->ref, units_of((uint64_t)cell->n_sums * lane->limbs * 8));
        lane = IN(B, ps_lane, cell->off_squares);
        if (cell->is_squares && lane->ref)
            heap_free(S, lane->ref, units_of((uint64_t)cell->n_squares * lane->limbs * 8));
        values_t *values = IN(B, values_t, cell->off_values);
        if (cell->is_distinct && cell->is_string)
            for (uint32_t v = 0; v < values->capacity; v++) { /* those that Lifetime kept */
                const value_t *value = value_at(S, cell, values, v);
                if (!value_free(value)) string_drop(S, (ref_t)value->key);
            }
        if (cell->is_distinct && values->ref)
            heap_free(S, values->ref, units_of((uint64_t)values->capacity * cell->value_bytes));
        if (!cell->is_string) continue;
        winner_t *w = IN(B, winner_t, cell->off_last);
        if (cell->is_last && w->time != NO_TIME) string_drop(S, (ref_t)w->bits);
        w = IN(B, winner_t, cell->off_old_last);
        if (cell->keeps_last && w->time != NO_TIME) string_drop(S, (ref_t)w->bits);
        for (int p = cell->first_pair; p < cell->first_pair + cell->n_pairs; p++) {
            const pair_t *pair = &S->pairs[S->cell_pairs[p]];
            w = IN(B, winner_t, pair->off_first);
            if (pair->tail < 0 && pair->is_first && w->time != NO_TIME) string_drop(S, (ref_t)w->bits);
        }
    }
}

/* Lifetime with retention: whether an event comes so long after the entity's newest that it starts it anew. Sweep waits
 * until every event that can still come would, so that nothing depends on whether it has been there. */
static inline int starts_anew(const ps_store *S, const blob_t *B, int64_t t) {
    return B->newest != NO_TIME && t - S->anew_after > B->newest;
}

/* The entity as if it had been released. Its version goes on. */
OFF_PATH static void start_anew(ps_store *S, blob_t *B) {
    blob_t had = *B;
    give_back(S, B);
    memcpy(B, S->blob_image, (uint64_t)S->blob_units * UNIT);
    B->node = had.node;
    B->version = had.version;
    B->log_id = had.log_id;
    B->sequence = had.sequence;
    B->key_is_int = had.key_is_int;
    B->key_len = had.key_len;
    B->key_ref = had.key_ref;
    memcpy(B->key, had.key, KEY_INLINE);
}

static int store_apply(ps_store *S, ps_handle h, const ps_event *e) {
    if (UNLIKELY(!h)) return PS_STORE_HANDLE;
    blob_t *B = (blob_t *)(S->base + h);
    uint64_t *rec = S->record;
    if (UNLIKELY(B->version >> 40)) return PS_STORE_FULL;
    int error = make_record(S, e, rec, 1);
    if (UNLIKELY(error)) return error;
    if (UNLIKELY(starts_anew(S, B, e->event_time))) start_anew(S, B);
    int many = B->version + 1 >= (1u << PS_NARROW_HEADROOM);
    ref_t chunk;
    uint32_t index;
    for (uint32_t i = 0; i < S->n_cells; i++) {
        const cell_t *cell = &S->cells[i];
        if (!(cell->is_sum | cell->is_squares | cell->is_distinct)) continue;
        if (LIKELY(cell->plain && !many && lane_takes(IN(B, ps_lane, cell->off_sum), rec[cell->slot]))) continue;
        if (!matches(S, cell, rec)) continue;
        ps_term t = term_of(cell, rec[cell->slot]);
        if (cell->is_sum && UNLIKELY(!lane_prepare(S, IN(B, ps_lane, cell->off_sum), cell->n_sums, 0, t, many)))
            goto no_memory;
        ps_lane *squares = IN(B, ps_lane, cell->off_squares);
        if (cell->is_squares && UNLIKELY(!lane_prepare(S, squares, cell->n_squares, 1, ps_term_squared(t), many)))
            goto no_memory;
        if (cell->is_distinct && UNLIKELY(!values_prepare(S, cell, IN(B, values_t, cell->off_values)))) goto no_memory;
    }
    int64_t t = e->event_time;
    chunk_t *newest = AT(S, chunk_t, B->last);
    chunk = B->last;
    index = newest->count;
    if (UNLIKELY(!chunk || t < B->newest || index == newest->capacity))
        if (!place(S, B, t, &chunk, &index)) goto no_memory;

    /* from here on nothing fails */
    insert(S, B, chunk, index, rec);
    int all_inside = t >= B->cursor - S->least_edge;
    for (uint32_t i = 0; i < S->n_cells; i++) {
        const cell_t *cell = &S->cells[i];
        if (!matches(S, cell, rec)) continue;
        uint64_t bits = cell->column < 0 ? 0 : rec[cell->slot];
        uint64_t had = (*IN(B, uint64_t, cell->off_n))++;
        if (LIKELY(cell->plain && all_inside)) {
            if (cell->is_sum) lane_add_double(S, IN(B, ps_lane, cell->off_sum), 0, bits);
            const uint32_t *winner = S->plain_winners + cell->first_plain;
            int64_t key = ordered(cell, bits);
            for (int w = 0; w < cell->n_max; w++) improve(IN(B, winner_t, *winner++), key, t);
            for (int w = 0; w < cell->n_min; w++) improve(IN(B, winner_t, *winner++), ~key, t);
            continue;
        }
        if (cell->is_sum | cell->is_squares) {
            ps_term x = term_of(cell, bits);
            if (cell->is_sum) lane_add(S, IN(B, ps_lane, cell->off_sum), 0, x, 0);
            if (cell->is_squares) lane_add(S, IN(B, ps_lane, cell->off_squares), 0, ps_term_squared(x), 0);
        }
        if (cell->is_last) {
            winner_t *w = IN(B, winner_t, cell->off_last);
            if (t >= w->time) winner_set(S, w, bits, t, cell->is_string);
        }
        value_t *value = NULL;
        if (cell->is_distinct) {
            value = value_add(S, cell, IN(B, values_t, cell->off_values), value_key(cell, bits));
            value->ring++;
        }
        for (int p = cell->first_pair; p < cell->first_pair + cell->n_pairs; p++) {
            const pair_t *pair = &S->pairs[S->cell_pairs[p]];
            if (!all_inside && pair->tail >= 0 && t < B->cursor - S->edge[pair->tail]) {
                ps_term x = term_of(cell, bits);
                if (!pair->is_passed) ++*IN(B, uint32_t, pair->off_n);
                if (pair->is_sum) lane_add(S, IN(B, ps_lane, cell->off_sum), pair->j_sum, x, 0);
                if (pair->is_squares)
                    lane_add(S, IN(B, ps_lane, cell->off_squares), pair->j_squares, ps_term_squared(x), 0);
                continue;
            }
            if (pair->off_max) improve(IN(B, winner_t, pair->off_max), ordered(cell, bits), t);
            if (pair->off_min) improve(IN(B, winner_t, pair->off_min), ~ordered(cell, bits), t);
            if (pair->is_first) {
                winner_t *w = IN(B, winner_t, pair->off_first);
                if (pair->tail < 0) {
                    if (w->time == NO_TIME || t < w->time) winner_set(S, w, bits, t, cell->is_string);
                } else if ((uint32_t)had == *IN(B, uint32_t, pair->off_n) || t < w->time) {
                    *w = (winner_t){bits, t};
                }
            }
            if (pair->is_distinct) {
                if (pair->tail < 0) {
                    if (value->ring == 1 && !value->forgotten) ++*IN(B, uint32_t, pair->off_distinct);
                } else if (!value->inside[pair->j_inside]++) {
                    ++*IN(B, uint32_t, pair->off_distinct);
                }
            }
        }
    }
    B->version++;
    B->events++;
    B->log_id = e->log_id;
    B->sequence = e->sequence;
    if (t > B->newest) B->newest = t;
    S->map->applied++;
    S->map->events++;
    if (t > S->map->watermark) S->map->watermark = t;
    return PS_STORE_OK;

no_memory:
    if (S->has_strings) drop_record_strings(S, rec);
    return PS_STORE_MEMORY;
}

/* More than the next apply of this event can take: a bound, so that what apply takes need not be worked out twice. */
static int store_reserve(ps_store *S, ps_handle h, const ps_event *e) {
    if (UNLIKELY(!h)) return PS_STORE_HANDLE;
    uint64_t bytes = S->most_apply;
    if (S->has_strings) {
        const table_t *t = &S->map->strings;
        for (uint32_t c = 0; c < S->n_columns; c++)
            if (S->columns[c] == PS_STRING) bytes += (uint64_t)PS_STR_LENGTH(e->values[c].u) * 2 + 4 * UNIT;
        if (t->buckets == t->low || t->buckets + S->n_columns >= 2 * t->low) bytes += t->buckets * 2 * sizeof(node_t);
    }
    if (S->event_work)
        for (uint32_t i = 0; i < S->n_cells; i++) {
            const cell_t *cell = &S->cells[i];
            if (cell->is_distinct)
                bytes += ((uint64_t)IN((blob_t *)(S->base + h), values_t, cell->off_values)->capacity + 4) * 3
                         * (uint32_t)cell->value_bytes;
        }
    return commit_to(S, S->map->bump * UNIT + bytes) ? PS_STORE_OK : PS_STORE_MEMORY;
}

/* ---- read ------------------------------------------------------------------------------------------------------ */

/* The winner over the matching events from a place on, up to time right. */
OFF_PATH static winner_t scan_winner(const ps_store *S, const cell_t *cell, int is_min, ref_t chunk, uint32_t index,
                            int64_t right) {
    winner_t best = {(uint64_t)INT64_MIN, NO_TIME};
    int summary = is_min ? cell->min_summary : cell->max_summary;
    while (chunk) {
        chunk_t *c = AT(S, chunk_t, chunk);
        if (index == 0 && c->sealed && c->count && record_time(S, c, c->count - 1) <= right) {
            winner_t *w = &summary_of(c)[summary];
            if (w->time != NO_TIME) improve(&best, (int64_t)w->bits, w->time);
        } else {
            for (; index < c->count; index++) {
                const uint64_t *rec = record_at(S, c, index);
                if ((int64_t)rec[0] > right) return best;
                if (!matches(S, cell, rec)) continue;
                int64_t key = ordered(cell, rec[cell->slot]);
                improve(&best, is_min ? ~key : key, (int64_t)rec[0]);
            }
        }
        chunk = c->next;
        index = 0;
    }
    return best;
}

/* The same from a tail to the end, with the way over full chunks remembered in the tail's chunk. */
OFF_PATH static winner_t scan_tail(ps_store *S, const blob_t *B, const cell_t *cell, int is_min, const tail_t *tail) {
    winner_t best = {(uint64_t)INT64_MIN, NO_TIME};
    int summary = is_min ? cell->min_summary : cell->max_summary;
    ref_t chunk = tail->chunk;
    uint32_t index = tail->index;
    if (!chunk) return best;
    chunk_t *c = AT(S, chunk_t, chunk);
    if (!c->next) return scan_winner(S, cell, is_min, chunk, index, INT64_MAX);
    for (; index < c->count; index++) {
        const uint64_t *rec = record_at(S, c, index);
        if (!matches(S, cell, rec)) continue;
        int64_t key = ordered(cell, rec[cell->slot]);
        improve(&best, is_min ? ~key : key, (int64_t)rec[0]);
    }
    rest_t *rest = &rest_of(S, c)[summary];
    if (!rest->until || rest->stamp != B->late_stamp)
        *rest = (rest_t){{(uint64_t)INT64_MIN, NO_TIME}, 0, B->late_stamp};
    for (;;) {
        ref_t next = AT(S, chunk_t, rest->until ? rest->until : chunk)->next;
        chunk_t *d = AT(S, chunk_t, next);
        if (!next || !d->sealed) break;
        const winner_t *w = &summary_of(d)[summary];
        if (w->time != NO_TIME) improve(&rest->winner, (int64_t)w->bits, w->time);
        rest->until = next;
    }
    if (rest->winner.time != NO_TIME) improve(&best, (int64_t)rest->winner.bits, rest->winner.time);
    winner_t tip = scan_winner(S, cell, is_min, AT(S, chunk_t, rest->until ? rest->until : chunk)->next, 0, INT64_MAX);
    if (tip.time != NO_TIME) improve(&best, (int64_t)tip.bits, tip.time);
    return best;
}

OFF_PATH static winner_t extreme(ps_store *S, blob_t *B, const pair_t *pair, int is_min, int64_t left, int64_t right) {
    const cell_t *cell = &S->cells[pair->cell];
    winner_t *w = IN(B, winner_t, is_min ? pair->off_min : pair->off_max);
    tail_t *tail = tails_of(S, B) + (pair->tail < 0 ? 0 : pair->tail);
    if (UNLIKELY(w->time < left)) { /* it has left the window; only finite windows come here */
        chunk_t *c = AT(S, chunk_t, tail->chunk);
        if (LIKELY(cell->is_float && !cell->where_mask && !c->next)) { /* few events, or the newest ones */
            winner_t best = {(uint64_t)INT64_MIN, NO_TIME};
            const uint64_t *rec = record_at(S, c, tail->index);
            for (uint32_t i = tail->index; i < c->count; i++, rec += S->stride) {
                uint64_t bits = rec[cell->slot];
                if (is_nan(bits)) continue;
                int64_t key = (int64_t)(bits ^ ((uint64_t)((int64_t)bits >> 63) >> 1));
                improve(&best, is_min ? ~key : key, (int64_t)rec[0]);
            }
            *w = best;
        } else {
            *w = scan_tail(S, B, cell, is_min, tail);
        }
    }
    if (LIKELY(w->time <= right)) return *w;
    if (pair->tail >= 0) return scan_winner(S, cell, is_min, tail->chunk, tail->index, right);
    winner_t best = scan_winner(S, cell, is_min, B->first, 0, right);
    const winner_t *old = IN(B, winner_t, is_min ? pair->off_old_min : pair->off_old_max);
    if (old->time != NO_TIME) improve(&best, (int64_t)old->bits, old->time);
    return best;
}

/* There is a matching event in the window. */
OFF_PATH static winner_t first_in(ps_store *S, blob_t *B, const pair_t *pair, int64_t left) {
    winner_t *w = IN(B, winner_t, pair->off_first);
    if (LIKELY(w->time >= left)) return *w;
    const cell_t *cell = &S->cells[pair->cell];
    const tail_t *tail = tails_of(S, B) + pair->tail;
    uint32_t i = tail->index;
    for (ref_t ref = tail->chunk; ref; i = 0) {
        chunk_t *c = AT(S, chunk_t, ref);
        for (; i < c->count; i++) {
            const uint64_t *rec = record_at(S, c, i);
            if (!matches(S, cell, rec)) continue;
            *w = (winner_t){rec[cell->slot], (int64_t)rec[0]};
            return *w;
        }
        ref = c->next;
    }
    return *w;
}

OFF_PATH static winner_t last_in(ps_store *S, blob_t *B, const cell_t *cell, int64_t right) {
    winner_t *w = IN(B, winner_t, cell->off_last);
    if (LIKELY(w->time <= right)) return *w;
    for (ref_t ref = B->last; ref;) {
        chunk_t *c = AT(S, chunk_t, ref);
        for (uint32_t i = c->count; i-- > 0;) {
            const uint64_t *rec = record_at(S, c, i);
            if ((int64_t)rec[0] <= right && matches(S, cell, rec)) return (winner_t){rec[cell->slot], (int64_t)rec[0]};
        }
        ref = c->prev;
    }
    return cell->keeps_last ? *IN(B, winner_t, cell->off_old_last) : (winner_t){0, NO_TIME};
}

/* Adds up, per cell, what lies after the right edge. */
OFF_PATH static void gather_after(ps_store *S, blob_t *B, int64_t right, after_t *after) {
    for (uint32_t i = 0; i < S->n_cells; i++) {
        const cell_t *cell = &S->cells[i];
        after[i].n = 0;
        if (cell->is_sum) memset(after[i].sum, 0, 8u * IN(B, ps_lane, cell->off_sum)->limbs);
        if (cell->is_squares) memset(after[i].squares, 0, 8u * IN(B, ps_lane, cell->off_squares)->limbs);
    }
    for (ref_t ref = B->last; ref;) {
        chunk_t *c = AT(S, chunk_t, ref);
        for (uint32_t r = c->count; r-- > 0;) {
            const uint64_t *rec = record_at(S, c, r);
            if ((int64_t)rec[0] <= right) return;
            for (uint32_t i = 0; i < S->n_cells; i++) {
                const cell_t *cell = &S->cells[i];
                if (!matches(S, cell, rec)) continue;
                after[i].n++;
                if (!(cell->is_sum | cell->is_squares)) continue;
                ps_term t = term_of(cell, rec[cell->slot]);
                ps_lane *lane = IN(B, ps_lane, cell->off_sum);
                if (cell->is_sum && lane->limbs) ps_limbs_add(after[i].sum, lane->limbs, lane->base, t, 0);
                lane = IN(B, ps_lane, cell->off_squares);
                if (cell->is_squares && lane->limbs)
                    ps_limbs_add(after[i].squares, lane->limbs, lane->base, ps_term_squared(t), 0);
            }
        }
        ref = c->prev;
    }
}

/* Number of distinct values with the events after `right` taken out and the extra value put in; leaves no trace. */
OFF_PATH static uint32_t distinct_at(ps_store *S, blob_t *B, const pair_t *pair, int64_t right, int has_extra,
                                     uint64_t extra) {
    const cell_t *cell = &S->cells[pair->cell];
    values_t *values = IN(B, values_t, cell->off_values);
    uint32_t distinct = *IN(B, uint32_t, pair->off_distinct);
    for (int undo = 0; undo < 2; undo++) {
        for (ref_t ref = B->newest > right ? B->last : 0; ref;) {
            chunk_t *c = AT(S, chunk_t, ref);
            for (uint32_t i = c->count; i-- > 0;) {
                const uint64_t *rec = record_at(S, c, i);
                if ((int64_t)rec[0] <= right) goto walked;
                if (!matches(S, cell, rec)) continue;
                value_t *v = value_find(S, cell, values, value_key(cell, rec[cell->slot]));
                if (pair->tail >= 0) {
                    if (undo) v->inside[pair->j_inside]++;
                    else if (!--v->inside[pair->j_inside]) distinct--;
                } else if (undo) {
                    v->ring += v->ring == UINT32_MAX ? 2 : 1;
                } else if (v->ring == 1) {
                    v->ring = UINT32_MAX; /* none left, and yet not a free place */
                    distinct -= !v->forgotten;
                } else {
                    v->ring--;
                }
            }
            ref = c->prev;
        }
    walked:
        if (!undo && has_extra) {
            value_t *v = extra == STRING_ELSEWHERE && cell->is_string ? NULL : value_find(S, cell, values, extra);
            int inside = 0;
            if (v) inside = pair->tail >= 0 ? v->inside[pair->j_inside] != 0 : v->ring != UINT32_MAX || v->forgotten;
            distinct += !inside;
        }
    }
    return distinct;
}

/* total - evicted - after + extra, exactly. */
OFF_PATH static void window_sum(ps_store *S, ps_lane *lane, int j, int square, const uint64_t *after,
                                const ps_term *extra, ps_big *out) {
    int limbs = lane->limbs;
    if (extra && !extra->magnitude) extra = NULL;
    if (!limbs) {
        out->base = 0;
        out->limbs = 3;
        memset(out->limb, 0, 24);
        if (extra) {
            out->base = extra->exponent;
            ps_limbs_add(out->limb, 3, out->base, *extra, 0);
        }
        ps_big_normalize(out);
        return;
    }
    const uint64_t *data = lane_data(S, lane);
    memcpy(out->limb, data, 8u * (unsigned)limbs);
    if (j) ps_limbs_combine(out->limb, data + j * limbs, limbs, 1);
    if (after) ps_limbs_combine(out->limb, after, limbs, 1);
    out->base = lane->base;
    out->limbs = limbs;
    if (extra) {
        if (!ps_lane_fits(lane->base, limbs, lane->ref == 0, *extra)) {
            uint64_t narrow[PS_MAX_LIMBS];
            int base, is_narrow, wide = ps_lane_form(lane, lane->ref == 0, square, *extra, &base, &is_narrow);
            memcpy(narrow, out->limb, 8u * (unsigned)limbs);
            ps_limbs_widen(out->limb, wide, narrow, limbs, lane->base - base);
            out->base = base;
            out->limbs = wide;
        }
        ps_limbs_add(out->limb, out->limbs, out->base, *extra, 0);
    }
    ps_big_normalize(out);
}

/* Newest event time of the entity at or before T; NO_TIME: none. */
OFF_PATH static int64_t newest_at(const ps_store *S, const blob_t *B, int64_t T) {
    for (ref_t ref = B->last; ref;) {
        chunk_t *c = AT(S, chunk_t, ref);
        for (uint32_t i = c->count; i-- > 0;)
            if (record_time(S, c, i) <= T) return record_time(S, c, i);
        ref = c->prev;
    }
    if (B->gone) return (int64_t)(B->gone + (uint64_t)(PS_TIME_MIN - 1));
    return B->version > B->events ? PS_TIME_MIN : NO_TIME; /* of format 1, where only Lifetime looks so far back */
}

/* The status of a null of an empty window (S9): by the entity's own events and T. */
OFF_PATH static int status_of_nothing(const ps_store *S, const blob_t *B, uint32_t group, int64_t T, const ps_event *extra) {
    int64_t since = T - S->reach[group], newest = B->newest;
    if (extra && extra->event_time <= T && extra->event_time >= since) return PS_NULL_VALUE;
    if (UNLIKELY(newest > T)) newest = newest_at(S, B, T);
    return newest >= since && newest != NO_TIME ? PS_NULL_VALUE : PS_NOT_FOUND;
}

static inline void put_null(ps_slot *slot, uint8_t *status, int type, int why) {
    slot->u = type == PS_FLOAT64 ? 0x7ff8000000000000ULL : 0;
    *status = (uint8_t)why;
}

OFF_PATH static double wide_sum(ps_store *S, ps_lane *lane, int j) {
    ps_big big;
    uint64_t kept;
    int dropped;
    window_sum(S, lane, j, 0, NULL, NULL, &big);
    return ps_big_round(&big, 0, &kept, &dropped);
}

/* A step of count, sum, mean, min and max over a float64 column (or events), with nothing after the right edge. */
static inline void read_plain(ps_store *S, blob_t *B, uint32_t group, const step_t *step, int64_t T, ps_slot *out,
                              uint8_t *status) {
    uint64_t n = *IN(B, uint64_t, step->off_total);
    if (LIKELY(step->off_n)) n = (uint32_t)n - *IN(B, uint32_t, step->off_n);
    if (step->count >= 0) {
        out[step->count].i = (int64_t)n;
        status[step->count] = PS_PRESENT;
    }
    if (!step->off_sum && step->max < 0 && step->min < 0) return;
    int status_now = LIKELY(n != 0) ? PS_PRESENT : status_of_nothing(S, B, group, T, NULL);
    if (step->off_sum) {
        double sum = ps_bits_double(0x7ff8000000000000ULL), mean = sum;
        int status_sum = status_now;
        if (LIKELY(n != 0)) {
            ps_lane *lane = IN(B, ps_lane, step->off_sum);
            if (LIKELY(lane->limbs == 2)) {
                const uint64_t *data = (const uint64_t *)(lane + 1);
                ps_i128 v, w;
                memcpy(&v, data, 16);
                if (step->j_sum) {
                    memcpy(&w, data + 2 * step->j_sum, 16);
                    v -= w;
                }
                sum = ps_i128_round(v, lane->base);
            } else {
                sum = wide_sum(S, lane, step->j_sum);
            }
            if (UNLIKELY(!isfinite(sum))) {
                sum = ps_bits_double(0x7ff8000000000000ULL);
                status_sum = PS_INVALID;
            }
            mean = sum / (double)(int64_t)n;
        }
        if (step->sum >= 0) {
            out[step->sum].f = sum;
            status[step->sum] = (uint8_t)status_sum;
        }
        if (step->mean >= 0) {
            out[step->mean].f = mean;
            status[step->mean] = (uint8_t)status_sum;
        }
    }
    if (step->max < 0 && step->min < 0) return;
    int64_t left = T - step->edge;
    if (step->max >= 0) {
        const winner_t *w = IN(B, winner_t, step->off_max);
        int64_t key = (int64_t)w->bits;
        if (UNLIKELY(w->time < left) && n) key = (int64_t)extreme(S, B, &S->pairs[step->pair], 0, left, T).bits;
        out[step->max].u = n ? (uint64_t)key ^ ((uint64_t)(key >> 63) >> 1) : 0x7ff8000000000000ULL;
        status[step->max] = (uint8_t)status_now;
    }
    if (step->min >= 0) {
        const winner_t *w = IN(B, winner_t, step->off_min);
        int64_t key = (int64_t)w->bits;
        if (UNLIKELY(w->time < left) && n) key = (int64_t)extreme(S, B, &S->pairs[step->pair], 1, left, T).bits;
        key = ~key;
        out[step->min].u = n ? (uint64_t)key ^ ((uint64_t)(key >> 63) >> 1) : 0x7ff8000000000000ULL;
        status[step->min] = (uint8_t)status_now;
    }
}

/* Any step, at any T, with or without a request event. */
OFF_PATH static int read_step(ps_store *S, blob_t *B, uint32_t group, const step_t *step, int64_t T, const ps_event *extra,
                              int *gathered, ps_slot *out, uint8_t *status, ps_arena *strings) {
    const pair_t *pair = &S->pairs[step->pair];
    const cell_t *cell = &S->cells[pair->cell];
    int64_t right = T - step->right, left = pair->tail < 0 ? NO_TIME : T - S->edge[pair->tail];
    uint64_t n = *IN(B, uint64_t, cell->off_n);
    if (pair->tail >= 0) n = (uint32_t)n - *IN(B, uint32_t, pair->off_n);
    const after_t *after = NULL;
    if (UNLIKELY(B->newest > right)) {
        if (!(*gathered & (1 << step->right))) {
            gather_after(S, B, right, S->after[step->right]);
            *gathered |= 1 << step->right;
        }
        after = &S->after[step->right][pair->cell];
        n = pair->tail >= 0 ? (uint32_t)(n - after->n) : n - after->n;
    }
    uint64_t stored = n;
    int has_extra = UNLIKELY(extra != NULL) && extra->event_time >= left && extra->event_time <= right
                 && matches(S, cell, S->extra);
    n += (uint64_t)has_extra;
    ps_term term = {0, 0, 0};
    if (has_extra && cell->column >= 0) term = term_of(cell, S->extra[cell->slot]);

    int have_sum = 0, have_var = 0;
    int sum_is_exact = 1; /* an int64 */
    int64_t int_sum = 0;
    double sum = 0.0, var = 0.0;
    for (uint32_t r = step->first_result; r < step->first_result + step->n_results; r++) {
        const result_t *res = &S->results[r];
        ps_slot *slot = &out[res->out];
        uint8_t *st = &status[res->out];
        if (res->function <= PS_COUNT_COLUMN) {
            slot->i = (int64_t)n;
            *st = PS_PRESENT;
            continue;
        }
        if (res->function == PS_DISTINCT_COUNT) {
            if (n == 0) slot->i = 0;
            else if (LIKELY(!has_extra && !after)) slot->i = *IN(B, uint32_t, pair->off_distinct);
            else
                slot->i = distinct_at(S, B, pair, right, has_extra,
                                      has_extra ? value_key(cell, S->extra[cell->slot]) : 0);
            *st = PS_PRESENT;
            continue;
        }
        if (n == 0) {
            put_null(slot, st, res->type, status_of_nothing(S, B, group, T, extra));
            continue;
        }
        *st = PS_PRESENT;
        switch (res->function) {
        case PS_SUM:
        case PS_MEAN:
            if (!have_sum) {
                ps_lane *lane = IN(B, ps_lane, cell->off_sum);
                have_sum = 1;
                if (LIKELY(lane->limbs == 2 && !has_extra)) {
                    const uint64_t *data = (const uint64_t *)(lane + 1);
                    ps_i128 v, w;
                    memcpy(&v, data, 16);
                    if (pair->j_sum) {
                        memcpy(&w, data + 2 * pair->j_sum, 16);
                        v -= w;
                    }
                    if (after) {
                        memcpy(&w, after->sum, 16);
                        v -= w;
                    }
                    if (!cell->is_float) {
                        int_sum = (int64_t)v;
                        sum_is_exact = v == int_sum;
                    }
                    sum = ps_i128_round(v, lane->base);
                } else {
                    ps_big big;
                    uint64_t kept;
                    int dropped;
                    window_sum(S, lane, pair->j_sum, 0, after ? after->sum : NULL, has_extra ? &term : NULL, &big);
                    if (!cell->is_float && big.top >= 0) {
                        uint64_t m = ps_big_bits(&big, -big.base); /* base <= 0 */
                        int top = big.top + big.base;
                        sum_is_exact = top < 63 || (top == 63 && big.negative && m == (uint64_t)1 << 63);
                        int_sum = (int64_t)(big.negative ? 0 - m : m);
                    }
                    sum = ps_big_round(&big, 0, &kept, &dropped);
                }
            }
            if (UNLIKELY(!isfinite(sum))) {
                put_null(slot, st, res->type, PS_INVALID);
            } else if (res->function == PS_MEAN) {
                slot->f = sum / (double)n;
            } else if (cell->is_float) {
                slot->f = sum;
            } else if (sum_is_exact) {
                slot->i = int_sum;
            } else {
                slot->f = sum;
                *st = PS_PRESENT | PS_WIDE;
            }
            break;
        case PS_MIN:
        case PS_MAX: {
            int is_min = res->function == PS_MIN;
            winner_t w = {(uint64_t)INT64_MIN, NO_TIME};
            if (stored) w = extreme(S, B, pair, is_min, left, right);
            if (has_extra) {
                int64_t key = ordered(cell, S->extra[cell->slot]);
                improve(&w, is_min ? ~key : key, extra->event_time);
            }
            int64_t key = is_min ? ~(int64_t)w.bits : (int64_t)w.bits;
            slot->u = (uint64_t)ordered(cell, (uint64_t)key);
            break;
        }
        case PS_VAR_SAMP:
        case PS_VAR_POP:
        case PS_STDDEV_SAMP:
        case PS_STDDEV_POP: {
            int samp = res->function == PS_VAR_SAMP || res->function == PS_STDDEV_SAMP;
            if (samp && n < 2) {
                put_null(slot, st, res->type, PS_NULL_VALUE);
                break;
            }
            if (!(have_var & (1 << samp))) {
                ps_big sx, sxx;
                ps_term square = ps_term_squared(term);
                window_sum(S, IN(B, ps_lane, cell->off_sum), pair->j_sum, 0, after ? after->sum : NULL,
                           has_extra ? &term : NULL, &sx);
                window_sum(S, IN(B, ps_lane, cell->off_squares), pair->j_squares, 1, after ? after->squares : NULL,
                           has_extra ? &square : NULL, &sxx);
                var = ps_variance(&sx, &sxx, n, (uint64_t)samp);
                have_var = 1 << samp;
            }
            if (UNLIKELY(!isfinite(var))) put_null(slot, st, res->type, PS_INVALID);
            else slot->f = res->function >= PS_STDDEV_SAMP ? sqrt(var) : var;
            break;
        }
        case PS_FIRST:
        case PS_LAST: {
            winner_t w = {0, NO_TIME};
            int from_extra = has_extra;
            if (stored) {
                w = res->function == PS_FIRST ? first_in(S, B, pair, left) : last_in(S, B, cell, right);
                if (has_extra)
                    from_extra = (res->function == PS_FIRST) == (extra->event_time < w.time);
            }
            if (from_extra) w = (winner_t){S->extra[cell->slot], extra->event_time};
            if (res->ttl >= 0 && T - w.time > res->ttl) {
                put_null(slot, st, res->type, PS_OUTSIDE_MAX_AGE);
            } else if (!cell->is_string) {
                slot->u = w.bits;
            } else {
                const char *p;
                uint32_t len;
                if (from_extra) {
                    p = extra->arena + PS_STR_OFFSET(extra->values[cell->column].u);
                    len = PS_STR_LENGTH(extra->values[cell->column].u);
                } else {
                    const string_t *str = AT(S, string_t, (ref_t)w.bits);
                    p = str->bytes;
                    len = str->length;
                }
                if (!strings || ps_arena_append(strings, p, len, &slot->u)) return PS_STORE_MEMORY;
            }
            break;
        }
        }
    }
    return PS_STORE_OK;
}

/* Values of the group that cannot be known: those of windows that begin before `missing`; with NO_TIME, all. */
OFF_PATH static void put_invalid(const ps_store *S, uint32_t group, int64_t missing, int64_t T, ps_slot *out,
                                 uint8_t *status) {
    for (uint32_t s = S->group_start[group]; s < S->group_start[group + 1]; s++) {
        const step_t *step = &S->steps[s];
        if (missing != NO_TIME && T - step->edge >= missing) continue;
        for (uint32_t r = step->first_result; r < step->first_result + step->n_results; r++)
            put_null(&out[S->results[r].out], &status[S->results[r].out], S->results[r].type, PS_INVALID);
    }
}

static int store_read(ps_store *S, ps_handle h, uint32_t group, int64_t T, const ps_event *extra, ps_slot *out,
                      uint8_t *status, ps_arena *strings) {
    if (UNLIKELY(group >= S->n_groups)) return PS_STORE_GROUP;
    if (UNLIKELY(T < PS_TIME_MIN || T > PS_TIME_MAX)) return PS_STORE_TIME;
    if (UNLIKELY(T < S->map->watermark - S->lateness)) {
        put_invalid(S, group, NO_TIME, T, out, status);
        return PS_STORE_OK;
    }
    blob_t *B = h ? (blob_t *)(S->base + h) : AT(S, blob_t, S->map->empty);
    if (UNLIKELY(extra != NULL)) {
        if (starts_anew(S, B, extra->event_time)) B = AT(S, blob_t, S->map->empty);
        int error = make_record(S, extra, S->extra, 0);
        if (error) return error;
    }
    if (UNLIKELY(S->retention != PS_NO_RETENTION) && status_of_nothing(S, B, group, T, extra) == PS_NOT_FOUND)
        B = AT(S, blob_t, S->map->empty);
    seek(S, B, T);
    int gathered = 0, plain = extra == NULL && B->newest < T + (S->any_left_closed ^ 1);
    if (LIKELY(plain))
        for (uint32_t i = S->count_start[group]; i < S->count_start[group + 1]; i++) {
            const count_t *c = &S->counts[i];
            uint64_t n = *IN(B, uint64_t, c->off_total);
            if (LIKELY(c->off_n)) n = (uint32_t)n - *IN(B, uint32_t, c->off_n);
            out[c->out].i = (int64_t)n;
            status[c->out] = PS_PRESENT;
        }
    for (uint32_t s = S->group_start[group]; s < S->group_start[group + 1]; s++) {
        const step_t *step = &S->steps[s];
        if (LIKELY(step->plain & plain)) {
            if (!step->only_counts) read_plain(S, B, group, step, T, out, status);
            continue;
        }
        int error = read_step(S, B, group, step, T, extra, &gathered, out, status, strings);
        if (error) return error;
    }
    if (UNLIKELY(S->map->missing))
        put_invalid(S, group, (int64_t)(S->map->missing + (uint64_t)(PS_TIME_MIN - 1)), T, out, status);
    return PS_STORE_OK;
}

/* ---- entities -------------------------------------------------------------------------------------------------- */

static inline int key_equal(const ps_store *S, const blob_t *B, const ps_key *key) {
    if (B->key_is_int != (key->is_int != 0)) return 0;
    if (key->is_int) return B->key_i == key->i;
    if (B->key_len != key->len) return 0;
    if (UNLIKELY(B->key_ref)) return !memcmp(AT(S, char, B->key_ref), key->str, key->len);
    uint32_t n = key->len; /* overlapping words */
    const char *a = B->key, *b = key->str;
    if (n >= 8) {
        uint64_t differ = (load8(a) ^ load8(b)) | (load8(a + n - 8) ^ load8(b + n - 8));
        if (n > 16) differ |= load8(a + 8) ^ load8(b + 8);
        return !differ;
    }
    if (n >= 4) return !((load4(a) ^ load4(b)) | (load4(a + n - 4) ^ load4(b + n - 4)));
    while (n--)
        if (a[n] != b[n]) return 0;
    return 1;
}

static ps_handle store_find(ps_store *S, const ps_key *key, uint64_t hash) {
    const node_t *bucket = bucket_of(S, &S->map->entities, (uint32_t)hash);
    ref_t ref = bucket->next;
    if (!ref) return 0;
    uint32_t held = bucket->hash;
    for (;;) {
        const blob_t *B = AT(S, blob_t, ref);
        if (held == (uint32_t)hash && key_equal(S, B, key)) {
            const char *tip = AT(S, char, B->last); /* the next event goes here, or not far */
            __builtin_prefetch(tip);
            __builtin_prefetch(tip + 64);
            return (ps_handle)ref * UNIT;
        }
        ref = B->node.next;
        if (!ref) return 0;
        held = AT(S, node_t, ref)->hash;
    }
}

static ps_handle store_find_or_create(ps_store *S, const ps_key *key, uint64_t hash) {
    ps_handle h = store_find(S, key, hash);
    if (h) return h;
    ref_t key_ref = 0;
    if (!key->is_int && key->len > KEY_INLINE) {
        key_ref = heap_alloc(S, units_of(key->len));
        if (!key_ref) return 0;
        memcpy(AT(S, char, key_ref), key->str, key->len);
    }
    ref_t ref = heap_alloc(S, S->blob_units);
    if (!ref) {
        if (key_ref) heap_free(S, key_ref, units_of(key->len));
        return 0;
    }
    blob_t *B = AT(S, blob_t, ref);
    memcpy(B, S->blob_image, (uint64_t)S->blob_units * UNIT);
    B->key_is_int = key->is_int != 0;
    B->key_ref = key_ref;
    if (key->is_int) B->key_i = key->i;
    else {
        B->key_len = key->len;
        if (!key_ref && key->len) memcpy(B->key, key->str, key->len);
    }
    table_insert(S, &S->map->entities, ref, (uint32_t)hash);
    return (ps_handle)ref * UNIT;
}

static void release(ps_store *S, ref_t ref) {
    blob_t *B = AT(S, blob_t, ref);
    give_back(S, B);
    if (B->key_ref) heap_free(S, B->key_ref, units_of(B->key_len));
    table_remove(S, &S->map->entities, ref);
    heap_free(S, ref, S->blob_units);
}

static int store_sweep(ps_store *S, int64_t watermark, uint32_t max_entities) {
    if (watermark > PS_TIME_MAX) watermark = PS_TIME_MAX;
    if (watermark > S->map->watermark) S->map->watermark = watermark;
    if (!S->releasable || S->map->watermark < PS_TIME_MIN) return 0;
    table_t *t = &S->map->entities;
    uint32_t released = 0, visited = 0;
    int64_t work = SWEEP_EVENTS;
    for (uint64_t n = 0; n < 4u * (uint64_t)max_entities && n < t->buckets && visited < max_entities; n++) {
        if (S->map->sweep_bucket >= t->buckets) S->map->sweep_bucket = 0;
        if (S->map->sweep_bucket + 8 < t->buckets) {
            ref_t ahead = bucket_at(S, t, S->map->sweep_bucket + 8)->next;
            if (ahead) __builtin_prefetch(&AT(S, blob_t, ahead)->newest);
        }
        ref_t ref = bucket_at(S, t, S->map->sweep_bucket)->next;
        while (ref) {
            blob_t *B = AT(S, blob_t, ref);
            ref_t next = B->node.next;
            visited++;
            if (B->newest < S->map->watermark - S->release_before) {
                if (released == max_entities) return (int)released;
                seek(S, B, S->map->watermark > B->cursor ? S->map->watermark : B->cursor);
                while (B->first && work > 0) {
                    work -= S->event_work ? AT(S, chunk_t, B->first)->count : 8;
                    drop_first_chunk(S, B);
                }
                if (B->first) return (int)released; /* goes on here next time */
                release(S, ref);
                released++;
            }
            ref = next;
        }
        S->map->sweep_bucket++;
    }
    return (int)released;
}

static void store_prefetch(const ps_store *S, uint64_t hash) {
    __builtin_prefetch(bucket_of(S, &S->map->entities, (uint32_t)hash));
}

static void store_prefetch_blob(const ps_store *S, uint64_t hash) {
    ref_t ref = bucket_of(S, &S->map->entities, (uint32_t)hash)->next;
    if (!ref) return;
    const char *p = AT(S, char, ref);
    for (uint32_t at = 0; at < S->blob_units * UNIT && at < 8 * 64; at += 64) __builtin_prefetch(p + at);
}

static uint64_t store_version(const ps_store *S, ps_handle h) {
    return h ? ((const blob_t *)(S->base + h))->version : 0;
}

static void store_miss_before(ps_store *S, int64_t time) {
    S->map->missing = (uint64_t)time - (uint64_t)(PS_TIME_MIN - 1);
}

static void store_log_position(const ps_store *S, ps_handle h, int64_t *log_id, int64_t *sequence) {
    const blob_t *B = h ? (const blob_t *)(S->base + h) : AT(S, blob_t, S->map->empty);
    *log_id = B->log_id;
    *sequence = B->sequence;
}

static void store_forget_unused(ps_store *S, ps_handle h) {
    if (h && !((blob_t *)(S->base + h))->version) release(S, (ref_t)(h / UNIT));
}

/* Forgets the entity altogether, and overwrites what it held. */
static int store_erase(ps_store *S, const ps_key *key, uint64_t hash) {
    ps_handle h = store_find(S, key, hash);
    if (!h) return 0;
    S->wipe = 1;
    release(S, (ref_t)(h / UNIT));
    S->wipe = 0;
    return 1;
}

static ps_handle store_next(const ps_store *S, ps_handle h) {
    const table_t *t = &S->map->entities;
    uint64_t b = 0;
    if (h) {
        const node_t *n = (const node_t *)(S->base + h);
        if (n->next) return (ps_handle)n->next * UNIT;
        b = n->hash & (2 * t->low - 1);
        if (b >= t->buckets) b = n->hash & (t->low - 1);
        b++;
    }
    for (; b < t->buckets; b++) {
        ref_t ref = bucket_at(S, t, b)->next;
        if (ref) return (ps_handle)ref * UNIT;
    }
    return 0;
}

static void store_key(const ps_store *S, ps_handle h, ps_key *key) {
    const blob_t *B = (const blob_t *)(S->base + h);
    *key = (ps_key){B->key_ref ? AT(S, char, B->key_ref) : B->key, B->key_i, B->key_len, B->key_is_int};
}

/* Every node of a table into the bucket that its hash of now gives. */
static void table_rehash(ps_store *S, table_t *t, uint32_t (*hash_of)(const ps_store *, ref_t)) {
    ref_t all = 0;
    for (uint64_t b = 0; b < t->buckets; b++) {
        node_t *bucket = bucket_at(S, t, b);
        for (ref_t ref = bucket->next, next; ref; ref = next) {
            next = AT(S, node_t, ref)->next;
            AT(S, node_t, ref)->next = all;
            all = ref;
        }
        *bucket = (node_t){0, 0};
    }
    for (ref_t ref = all, next; ref; ref = next) {
        node_t *n = AT(S, node_t, ref);
        next = n->next;
        n->hash = hash_of(S, ref);
        node_t *bucket = bucket_of(S, t, n->hash);
        n->next = bucket->next;
        *bucket = (node_t){ref, n->hash};
    }
}

static uint32_t entity_hash(const ps_store *S, ref_t ref) {
    ps_key key;
    store_key(S, (ps_handle)ref * UNIT, &key);
    return (uint32_t)key_hash(S, &key);
}

static uint32_t string_hash(const ps_store *S, ref_t ref) {
    const string_t *s = AT(S, string_t, ref);
    return (uint32_t)hash_bytes(S->secret, s->bytes, s->length);
}

static void values_rehash(ps_store *S, const cell_t *cell, values_t *v, char *old) {
    uint64_t bytes = (uint64_t)v->capacity * (uint32_t)cell->value_bytes;
    memcpy(old, AT(S, char, v->ref), bytes);
    memset(AT(S, char, v->ref), 0, bytes);
    for (uint32_t i = 0; i < v->capacity; i++) {
        const value_t *e = (const value_t *)(old + (uint64_t)i * (uint32_t)cell->value_bytes);
        if (value_free(e)) continue;
        uint32_t k = (uint32_t)hash_word(S, e->key) & (v->capacity - 1);
        while (!value_free(value_at(S, cell, v, k))) k = (k + 1) & (v->capacity - 1);
        memcpy(value_at(S, cell, v, k), e, (size_t)cell->value_bytes);
    }
}

static void store_seed(const ps_store *S, uint64_t seed[2]) { memcpy(seed, S->map->seed, sizeof S->map->seed); }

/* Everything that is hashed moves to where the new seed puts it. Takes time and memory for the largest set of values. */
static int store_reseed(ps_store *S, const uint64_t seed[2]) {
    if (!memcmp(seed, S->map->seed, sizeof S->map->seed)) return PS_STORE_OK;
    uint64_t most = 0;
    char *old = NULL;
    for (int move = 0; move < 2; move++) {
        if (move) {
            if (most && !(old = malloc(most))) return PS_STORE_MEMORY;
            memcpy(S->map->seed, seed, sizeof S->map->seed);
            take_seed(S);
        }
        for (ps_handle h = store_next(S, 0); h; h = store_next(S, h))
            for (uint32_t c = 0; c < S->n_cells; c++) {
                const cell_t *cell = &S->cells[c];
                if (!cell->is_distinct) continue;
                values_t *v = IN(S->base + h, values_t, cell->off_values);
                uint64_t bytes = (uint64_t)v->capacity * (uint32_t)cell->value_bytes;
                if (move && v->capacity) values_rehash(S, cell, v, old);
                else if (bytes > most) most = bytes;
            }
    }
    free(old);
    table_rehash(S, &S->map->strings, string_hash);
    table_rehash(S, &S->map->entities, entity_hash);
    return PS_STORE_OK;
}

static void store_stats(const ps_store *S, ps_store_stats *out) {
    const map_t *m = S->map;
    *out = (ps_store_stats){m->entities.count, m->events, m->applied, (m->bump - m->free_units) * UNIT, m->bump * UNIT,
                            m->strings.count, m->watermark};
}

/* ---- layout ---------------------------------------------------------------------------------------------------- */

int ps_output_type(const ps_layout *L, uint32_t i) {
    const ps_output *o = &L->outputs[i];
    switch (o->function) {
    case PS_COUNT:
    case PS_COUNT_COLUMN:
    case PS_DISTINCT_COUNT: return PS_INT64;
    case PS_SUM: return L->columns[o->column] == PS_FLOAT64 ? PS_FLOAT64 : PS_INT64;
    case PS_MIN:
    case PS_MAX:
    case PS_FIRST:
    case PS_LAST: return L->columns[o->column];
    default: return PS_FLOAT64;
    }
}

static int check_layout(const ps_layout *L, uint32_t *at) {
    uint64_t total = 0;
    for (uint32_t c = 0; c < L->n_columns; c++) {
        *at = c;
        if (L->columns[c] > PS_STRING) return PS_STORE_LAYOUT_COLUMN;
    }
    *at = 0;
    if (L->lateness < 0 || L->lateness > PS_TIME_MAX / 4) return PS_STORE_LAYOUT_LATENESS;
    if (L->retention != PS_NO_RETENTION && (L->retention <= 0 || L->retention > PS_TIME_MAX / 4))
        return PS_STORE_LAYOUT_RETENTION;
    if (L->n_where > 63) return PS_STORE_LAYOUT_WHERE;
    if (L->n_columns > 1024 || L->n_outputs > 16384) return PS_STORE_LAYOUT_SIZE;
    for (uint32_t g = 0; g < L->n_groups; g++) total += L->groups[g];
    if (total != L->n_outputs) return PS_STORE_LAYOUT_GROUPS;
    for (uint32_t i = 0; i < L->n_outputs; i++) {
        const ps_output *o = &L->outputs[i];
        *at = i;
        if (o->function >= PS_N_FUNCTIONS) return PS_STORE_LAYOUT_FUNCTION;
        if (o->function == PS_COUNT ? o->column != -1 : o->column < 0 || (uint32_t)o->column >= L->n_columns)
            return PS_STORE_LAYOUT_COLUMN;
        if (o->where < -1 || o->where >= (int)L->n_where) return PS_STORE_LAYOUT_WHERE;
        if (o->closed > PS_CLOSED_LEFT || o->length > PS_TIME_MAX / 4
            || (o->length != PS_LIFETIME && o->length < (o->closed != PS_CLOSED_BOTH)))
            return PS_STORE_LAYOUT_WINDOW;
        if (L->retention != PS_NO_RETENTION && o->length > L->retention) return PS_STORE_LAYOUT_RETENTION;
        if (o->ttl != PS_NO_TTL
            && (o->ttl < 0 || o->ttl > PS_TIME_MAX / 4 || (o->function != PS_FIRST && o->function != PS_LAST)))
            return PS_STORE_LAYOUT_TTL;
        if (o->function == PS_COUNT) continue;
        int type = L->columns[o->column];
        int arithmetic = o->function == PS_SUM || o->function == PS_MEAN
                      || (o->function >= PS_VAR_SAMP && o->function <= PS_STDDEV_POP);
        if (arithmetic && (type == PS_STRING || type == PS_TIMESTAMP)) return PS_STORE_LAYOUT_TYPE;
        if ((o->function == PS_MIN || o->function == PS_MAX) && type == PS_STRING) return PS_STORE_LAYOUT_TYPE;
    }
    return PS_STORE_OK;
}

/* The first chunk of an entity and a full one, from the record's words and the number of summaries. */
static void size_chunks(ps_store *S) {
    uint64_t record = (uint64_t)S->stride * 8, first = sizeof(chunk_t) + 2 * record;
    uint64_t full = sizeof(chunk_t) + summary_bytes(S) + record * 16;
    S->first_chunk_units = units_of(first < 80 ? 80 : first);
    size_class(units_of(full > CHUNK_BYTES ? full : CHUNK_BYTES), &S->full_chunk_units);
}

uint32_t ps_chunk_growth(uint32_t stride, uint32_t summaries, ps_chunk_size *out, uint32_t most) {
    ps_store of = {.stride = (int)stride, .n_summaries = (int)summaries};
    size_chunks(&of);
    chunk_form_t form = chunk_form(&of, of.first_chunk_units);
    uint32_t n = 0;
    for (;;) {
        if (n < most) out[n] = (ps_chunk_size){form.size * UNIT, form.head, form.capacity, form.full};
        n++;
        if (form.full) return n;
        form = chunk_form_after(&of, form.class);
    }
}

/* Format 1 chose the head of a chunk by the size that was asked for, and its capacity by the size that was given: some
 * records got full chunks without room for summaries, or a full chunk smaller than the one whose events it took over. */
int ps_format_1_damaged(uint32_t stride, uint32_t summaries) {
    ps_store of = {.stride = (int)stride, .n_summaries = (int)summaries};
    size_chunks(&of);
    uint64_t record = (uint64_t)stride * 8, bytes = sizeof(chunk_t) + summary_bytes(&of) + record * 16;
    uint32_t full = units_of(bytes > CHUNK_BYTES ? bytes : CHUNK_BYTES), asked = of.first_chunk_units, capacity = 0;
    for (;;) {
        uint32_t size, had = capacity;
        size_class(asked, &size);
        int headed = asked >= full;
        capacity = (uint32_t)((size * UNIT - sizeof(chunk_t) - (headed ? summary_bytes(&of) : 0)) / record);
        if (capacity < had) return 1;
        if (size >= full) return summaries && !headed;
        asked = size * 2 - 1 < full ? size * 2 - 1 : full;
    }
}

static inline int has_squares(int function) { return function >= PS_VAR_SAMP && function <= PS_STDDEV_POP; }

/* Marks what the plain paths of evict, apply and read can do, and lays out what they need. */
static void specialize(ps_store *S, uint32_t n_steps) {
    uint32_t filled = 0;
    for (uint32_t c = 0; c < S->n_cells; c++) {
        cell_t *cell = &S->cells[c];
        cell->plain = (cell->is_float || cell->column < 0) && !cell->is_squares && !cell->is_distinct && !cell->is_last;
        cell->first_plain = (int)filled;
        for (int is_min = 0; is_min < 2; is_min++)
            for (int q = 0; q < cell->n_pairs; q++) {
                const pair_t *pair = &S->pairs[S->cell_pairs[cell->first_pair + q]];
                cell->plain &= !pair->is_first;
                uint32_t off = is_min ? pair->off_min : pair->off_max;
                if (!off) continue;
                S->plain_winners[filled++] = off;
                if (is_min) cell->n_min++;
                else cell->n_max++;
            }
    }
    for (int e = 0; e < S->tail_start[S->n_tails]; e++) {
        evict_t *evict = &S->evicts[e];
        const pair_t *pair = &S->pairs[evict->pair];
        const cell_t *cell = &S->cells[pair->cell];
        *evict = (evict_t){cell->where_mask, pair->off_n,   pair->is_sum ? cell->off_sum : 0,
                           cell->slot,       pair->j_sum,   evict->pair,
                           (cell->is_float || cell->column < 0) && !pair->is_squares && !pair->is_distinct};
    }
    for (uint32_t s = 0; s < n_steps; s++) {
        step_t *step = &S->steps[s];
        const pair_t *pair = &S->pairs[step->pair];
        const cell_t *cell = &S->cells[pair->cell];
        step->count = step->sum = step->mean = step->min = step->max = -1;
        step->plain = cell->is_float || cell->column < 0;
        step->off_total = cell->off_n;
        step->off_n = pair->off_n;
        step->j_sum = pair->j_sum;
        step->off_min = pair->off_min;
        step->off_max = pair->off_max;
        step->edge = pair->tail < 0 ? FOR_EVER : S->edge[pair->tail];
        for (uint32_t r = step->first_result; r < step->first_result + step->n_results; r++) {
            const result_t *res = &S->results[r];
            int *place = NULL;
            switch (res->function) {
            case PS_COUNT:
            case PS_COUNT_COLUMN: place = &step->count; break;
            case PS_SUM: place = &step->sum; break;
            case PS_MEAN: place = &step->mean; break;
            case PS_MIN: place = &step->min; break;
            case PS_MAX: place = &step->max; break;
            }
            if (!place || *place >= 0) step->plain = 0;
            else *place = (int)res->out;
        }
        if (step->sum >= 0 || step->mean >= 0) step->off_sum = cell->off_sum;
        step->only_counts = step->plain && step->count >= 0 && step->n_results == 1;
    }
}

/* How far before T an event makes its entity known to a group: its longest window, or the retention of Lifetime. */
static int64_t group_reach(const ps_layout *L, uint32_t begin, uint32_t end) {
    int64_t reach = L->retention != PS_NO_RETENTION ? L->retention : 0;
    for (uint32_t i = begin; i < end; i++) {
        if (L->outputs[i].length == PS_LIFETIME && L->retention == PS_NO_RETENTION) return FOR_EVER;
        if (L->outputs[i].length > reach) reach = L->outputs[i].length;
    }
    return reach;
}

/* Cells, tails, pairs and steps, each found once; then their places in the blob. */
static int compile(ps_store *S, const ps_layout *L) {
    uint32_t n = L->n_outputs, n_cols = L->n_columns;
    S->columns = malloc(n_cols + 1);
    S->null_bit = calloc(n_cols + 1, 8);
    S->edge = calloc(n + 1, 8);
    S->cells = calloc(n + 1, sizeof(cell_t));
    S->pairs = calloc(n + 1, sizeof(pair_t));
    S->cell_pairs = calloc(n + 1, sizeof(int));
    S->evicts = calloc(n + 1, sizeof(evict_t));
    S->plain_winners = calloc(2 * n + 1, sizeof(uint32_t));
    S->tail_start = calloc(n + 2, sizeof(int));
    S->steps = calloc(n + 1, sizeof(step_t));
    S->group_start = calloc(L->n_groups + 1, sizeof(uint32_t));
    S->reach = calloc(L->n_groups + 1, 8);
    S->counts = calloc(n + 1, sizeof(count_t));
    S->count_start = calloc(L->n_groups + 1, sizeof(uint32_t));
    S->results = calloc(n + 1, sizeof(result_t));
    int *pair_of = calloc(n + 1, sizeof(int));
    if (!S->columns || !S->null_bit || !S->edge || !S->cells || !S->pairs || !S->cell_pairs || !S->evicts
        || !S->counts || !S->count_start || !S->plain_winners || !S->tail_start || !S->steps || !S->group_start
        || !S->reach || !S->results || !pair_of) {
        free(pair_of);
        return PS_STORE_MEMORY;
    }
    if (n_cols) memcpy(S->columns, L->columns, n_cols);
    S->n_columns = n_cols;
    S->n_where = L->n_where;
    S->n_groups = L->n_groups;
    S->lateness = L->lateness;
    S->retention = L->retention;
    S->fingerprint = L->fingerprint;

    int word = 1, n_null = 0;
    if (L->n_where) S->where_word = word++;
    for (uint32_t c = 0; c < n_cols; c++)
        if (S->columns[c] != PS_FLOAT64 && S->columns[c] != PS_STRING) {
            if (n_null == 64) {
                free(pair_of);
                return PS_STORE_LAYOUT_SIZE;
            }
            S->null_bit[c] = (uint64_t)1 << n_null++;
        } else {
            S->has_strings |= S->columns[c] == PS_STRING;
        }
    if (n_null) S->null_word = word++;
    S->first_value = word;
    S->stride = word + (int)n_cols;

    for (uint32_t i = 0; i < n; i++) {
        const ps_output *o = &L->outputs[i];
        uint32_t c = 0;
        while (c < S->n_cells && (S->cells[c].column != o->column || S->cells[c].where != o->where)) c++;
        cell_t *cell = &S->cells[c];
        if (c == S->n_cells) {
            S->n_cells++;
            cell->column = o->column;
            cell->where = o->where;
            cell->where_mask = o->where < 0 ? 0 : (uint64_t)1 << o->where;
            cell->min_summary = cell->max_summary = -1;
            if (o->column >= 0) {
                cell->type = S->columns[o->column];
                cell->slot = S->first_value + o->column;
                cell->is_float = cell->type == PS_FLOAT64;
                cell->is_string = cell->type == PS_STRING;
                cell->null_mask = S->null_bit[o->column];
            }
        }
        int tail = -1;
        if (o->length != PS_LIFETIME) {
            int64_t edge = o->closed == PS_CLOSED_RIGHT ? o->length - 1 : o->length;
            for (tail = 0; tail < (int)S->n_tails && S->edge[tail] != edge; tail++) {}
            if (tail == (int)S->n_tails) S->edge[S->n_tails++] = edge;
            if (o->length > S->longest) S->longest = o->length;
        }
        S->format_1_unfit |= tail < 0 && o->ttl >= 0; /* its ttl released the entity */
        uint32_t p = 0;
        while (p < S->n_pairs && (S->pairs[p].cell != (int)c || S->pairs[p].tail != tail)) p++;
        pair_t *pair = &S->pairs[p];
        if (p == S->n_pairs) {
            S->n_pairs++;
            pair->cell = (int)c;
            pair->tail = tail;
            pair->is_passed = tail >= 0 && o->column < 0 && o->where < 0;
        }
        pair_of[i] = (int)p;
        int sums = o->function == PS_SUM || o->function == PS_MEAN || has_squares(o->function);
        pair->is_sum |= (uint8_t)sums;
        pair->is_squares |= (uint8_t)has_squares(o->function);
        pair->is_distinct |= o->function == PS_DISTINCT_COUNT;
        pair->is_first |= o->function == PS_FIRST;
        cell->is_sum |= (uint8_t)sums;
        cell->is_squares |= (uint8_t)has_squares(o->function);
        if (o->function == PS_MIN) {
            pair->off_min = 1;
            if (cell->min_summary < 0) cell->min_summary = S->n_summaries++;
        }
        if (o->function == PS_MAX) {
            pair->off_max = 1;
            if (cell->max_summary < 0) cell->max_summary = S->n_summaries++;
        }
        if (o->function == PS_LAST) {
            cell->is_last = 1;
            cell->keeps_last |= o->length == PS_LIFETIME;
        }
        if (o->function == PS_DISTINCT_COUNT) {
            cell->is_distinct = 1;
            cell->distinct_lifetime |= o->length == PS_LIFETIME;
        }
    }
    S->least_edge = INT64_MAX;
    for (uint32_t k = 0; k < S->n_tails; k++)
        if (S->edge[k] < S->least_edge) S->least_edge = S->edge[k];
    if (!S->n_tails) S->least_edge = 0;

    int filled = 0;
    for (uint32_t c = 0; c < S->n_cells; c++) {
        S->cells[c].first_pair = filled;
        for (uint32_t p = 0; p < S->n_pairs; p++)
            if (S->pairs[p].cell == (int)c) S->cell_pairs[filled++] = (int)p;
        S->cells[c].n_pairs = filled - S->cells[c].first_pair;
    }
    filled = 0;
    for (uint32_t k = 0; k < S->n_tails; k++) {
        S->tail_start[k] = filled;
        for (uint32_t p = 0; p < S->n_pairs; p++)
            if (S->pairs[p].tail == (int)k && !S->pairs[p].is_passed) S->evicts[filled++].pair = (int)p;
    }
    S->tail_start[S->n_tails] = filled;

    uint32_t i = 0, n_steps = 0, n_results = 0;
    int64_t farthest = 0;
    for (uint32_t g = 0; g < L->n_groups; g++) {
        uint32_t begin = i, end = i + L->groups[g];
        S->group_start[g] = n_steps;
        S->reach[g] = group_reach(L, begin, end);
        if (S->reach[g] > farthest) farthest = S->reach[g];
        for (; i < end; i++) {
            int right = L->outputs[i].closed == PS_CLOSED_LEFT;
            uint32_t s = S->group_start[g];
            while (s < n_steps && (S->steps[s].pair != pair_of[i] || S->steps[s].right != right)) s++;
            if (s < n_steps) continue;
            step_t *step = &S->steps[n_steps++];
            *step = (step_t){.pair = pair_of[i], .right = right, .first_result = n_results};
            S->any_left_closed |= (uint8_t)right;
            for (uint32_t j = i; j < end; j++) {
                if (pair_of[j] != step->pair || (L->outputs[j].closed == PS_CLOSED_LEFT) != right) continue;
                S->results[n_results++] = (result_t){L->outputs[j].function, (uint8_t)ps_output_type(L, j), j - begin,
                                                     L->outputs[j].ttl};
                step->n_results++;
            }
        }
    }
    S->group_start[L->n_groups] = n_steps;
    free(pair_of);

    uint64_t off = sizeof(blob_t);
#define TAKE(field, bytes) do { (field) = (uint32_t)off; off += ((uint64_t)(bytes) + 7) & ~(uint64_t)7; } while (0)
    TAKE(S->off_tails, S->n_tails * sizeof(tail_t));
    for (uint32_t c = 0; c < S->n_cells; c++) {
        cell_t *cell = &S->cells[c];
        uint32_t finite = 0;
        cell->n_sums = cell->n_squares = 1;
        for (int q = 0; q < cell->n_pairs; q++) {
            pair_t *pair = &S->pairs[S->cell_pairs[cell->first_pair + q]];
            if (pair->tail < 0) continue;
            finite += !pair->is_passed;
            if (pair->is_sum) pair->j_sum = cell->n_sums++;
            if (pair->is_squares) pair->j_squares = cell->n_squares++;
            if (pair->is_distinct) pair->j_inside = cell->n_inside++;
        }
        TAKE(cell->off_n, 8 + 4 * finite);
        uint32_t next_n = cell->off_n + 8;
        if (cell->is_sum) TAKE(cell->off_sum, 8 + cell->n_sums * 8 * PS_SUM_INLINE);
        for (int q = 0; q < cell->n_pairs; q++) {
            pair_t *pair = &S->pairs[S->cell_pairs[cell->first_pair + q]];
            if (pair->is_passed) {
                pair->off_n = S->off_tails + (uint32_t)pair->tail * sizeof(tail_t) + offsetof(tail_t, passed);
            } else if (pair->tail >= 0) {
                pair->off_n = next_n;
                next_n += 4;
            }
            int lifetime = pair->tail < 0;
            if (pair->off_min) {
                TAKE(pair->off_min, sizeof(winner_t));
                if (lifetime) TAKE(pair->off_old_min, sizeof(winner_t));
            }
            if (pair->off_max) {
                TAKE(pair->off_max, sizeof(winner_t));
                if (lifetime) TAKE(pair->off_old_max, sizeof(winner_t));
            }
            if (pair->is_first) TAKE(pair->off_first, sizeof(winner_t));
            if (pair->is_distinct) TAKE(pair->off_distinct, 8);
            S->event_work |= pair->off_old_min || pair->off_old_max;
        }
        if (cell->is_squares) TAKE(cell->off_squares, 8 + cell->n_squares * 8 * PS_SQUARE_INLINE);
        if (cell->is_last) TAKE(cell->off_last, sizeof(winner_t));
        if (cell->keeps_last) TAKE(cell->off_old_last, sizeof(winner_t));
        if (cell->is_distinct) TAKE(cell->off_values, sizeof(values_t));
        cell->value_bytes = (int)((sizeof(value_t) + 4u * (unsigned)cell->n_inside + 7) & ~7u);
        S->event_work |= cell->is_distinct | cell->keeps_last;
    }
#undef TAKE
    S->event_work |= S->has_strings;
    S->releasable = farthest < FOR_EVER;
    S->anew_after = FOR_EVER;
    S->release_before = farthest + S->lateness;
    if (S->retention != PS_NO_RETENTION) {
        S->anew_after = S->retention + S->lateness;
        S->release_before += S->lateness; /* the oldest event that may still come starts it anew */
    }
    S->format_1_unfit |= (uint8_t)ps_format_1_damaged((uint32_t)S->stride, (uint32_t)S->n_summaries);
    specialize(S, n_steps);
    filled = 0;
    for (uint32_t g = 0; g < S->n_groups; g++) {
        S->count_start[g] = (uint32_t)filled;
        for (uint32_t s = S->group_start[g]; s < S->group_start[g + 1]; s++)
            if (S->steps[s].only_counts)
                S->counts[filled++] = (count_t){S->steps[s].off_total, S->steps[s].off_n, (uint32_t)S->steps[s].count};
    }
    S->count_start[S->n_groups] = (uint32_t)filled;
    if (off > (1u << 24) || S->n_summaries > 1024) return PS_STORE_LAYOUT_SIZE;
    S->blob_units = units_of(off);
    size_class(S->blob_units, &S->blob_units);

    S->blob_image = calloc(1, (uint64_t)S->blob_units * UNIT);
    S->record = calloc((size_t)S->stride, 8);
    S->extra = calloc((size_t)S->stride, 8);
    S->after[0] = calloc(S->n_cells + 1, sizeof(after_t));
    S->after[1] = calloc(S->n_cells + 1, sizeof(after_t));
    if (!S->blob_image || !S->record || !S->extra || !S->after[0] || !S->after[1]) return PS_STORE_MEMORY;
    blob_t *B = (blob_t *)S->blob_image;
    B->newest = NO_TIME;
    B->cursor = PS_TIME_MIN;
    B->format = FORMAT;
    B->fingerprint = S->fingerprint;
    for (uint32_t k = 0; k < S->n_tails; k++) tails_of(S, B)[k].next_time = AT_END;
    winner_t none = {(uint64_t)INT64_MIN, NO_TIME};
    for (uint32_t c = 0; c < S->n_cells; c++) {
        cell_t *cell = &S->cells[c];
        if (cell->is_last) *IN(B, winner_t, cell->off_last) = none;
        if (cell->keeps_last) *IN(B, winner_t, cell->off_old_last) = none;
        if (cell->is_float || cell->column < 0) continue;
        /* integers have one form for life: weight 1 */
        if (cell->is_sum) *IN(B, ps_lane, cell->off_sum) = (ps_lane){0, PS_SUM_INLINE, 0};
        if (cell->is_squares) *IN(B, ps_lane, cell->off_squares) = (ps_lane){0, PS_SQUARE_INLINE, 0};
    }
    for (uint32_t p = 0; p < S->n_pairs; p++) {
        pair_t *pair = &S->pairs[p];
        if (pair->off_min) *IN(B, winner_t, pair->off_min) = none;
        if (pair->off_max) *IN(B, winner_t, pair->off_max) = none;
        if (pair->off_old_min) *IN(B, winner_t, pair->off_old_min) = none;
        if (pair->off_old_max) *IN(B, winner_t, pair->off_old_max) = none;
        if (pair->off_first) *IN(B, winner_t, pair->off_first) = none;
    }
    size_chunks(S);
    uint64_t limbs = 0;
    for (uint32_t c = 0; c < S->n_cells; c++)
        limbs += (uint64_t)(S->cells[c].n_sums + S->cells[c].n_squares) * PS_MAX_LIMBS;
    /* Lanes may widen twice, and there are at most two new chunks; a size class rounds up by a quarter at the most. */
    S->most_apply = (limbs * 16 + (uint64_t)S->full_chunk_units * 2 * UNIT) * 5 / 4 + 64 * UNIT;
    return PS_STORE_OK;
}

/* ---- life of a store ------------------------------------------------------------------------------------------- */

static int map_fresh(uint64_t max_bytes, char **base, uint64_t *reserved) {
    uint64_t most = (uint64_t)UINT32_MAX * UNIT, size = max_bytes && max_bytes < most ? max_bytes : most;
    size &= ~(uint64_t)0xffff;
    if (size < 0x10000) size = 0x10000;
    for (;; size /= 2) {
        char *p = mmap(NULL, size + HUGE_AFTER, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p != MAP_FAILED) {
            char *aligned = (char *)(((uintptr_t)p + HUGE_AFTER - 1) & ~(uintptr_t)(HUGE_AFTER - 1));
            if (aligned > p) munmap(p, (size_t)(aligned - p));
            munmap(aligned + size, (size_t)(HUGE_AFTER - (aligned - p)));
            *base = aligned;
            *reserved = size;
            return 1;
        }
        if (size < (64u << 20)) return 0;
    }
}

static void store_cancel_load(ps_store *S) {
    if (S->loading) munmap(S->loading, S->loading_reserved);
    S->loading = NULL;
}

/* Commits memory in the mapping that is being loaded, with commit_to, which knows only the store's own. */
static int commit_loading(ps_store *S, uint64_t size) {
    ps_store as = *S;
    as.base = S->loading;
    as.reserved = S->loading_reserved;
    as.committed = S->loading_committed;
    as.huge = S->loading_huge;
    if (!commit_to(&as, size)) return 0;
    S->loading_committed = as.committed;
    S->loading_huge = as.huge;
    return 1;
}

_Static_assert(sizeof(map_t) <= 896, "what older dumps hold begins there, and the bytes before were zeros");

static int store_begin_load(ps_store *S, uint64_t size, void **at) {
    store_cancel_load(S);
    if (size < sizeof(map_t)) return PS_STORE_DUMP_SIZE;
    if (size > S->reserved || !map_fresh(S->reserved, &S->loading, &S->loading_reserved)) return PS_STORE_MEMORY;
    S->loading_committed = 0;
    S->loading_huge = 0;
    if (!commit_loading(S, size)) {
        store_cancel_load(S);
        return PS_STORE_MEMORY;
    }
    *at = S->loading;
    return PS_STORE_OK;
}

static int within(const map_t *m, uint64_t ref, uint64_t units) { return ref && ref <= m->bump && units <= m->bump - ref; }

static int table_within(const map_t *m, const table_t *t) {
    if (t->low < FIRST_BUCKETS || t->low & (t->low - 1) || t->buckets < t->low || t->buckets >= 2 * t->low) return 0;
    for (int s = 0; s < MAX_SEGMENTS; s++) {
        uint64_t first = s ? (uint64_t)FIRST_BUCKETS << (s - 1) : 0, n = s ? first : FIRST_BUCKETS;
        if (!t->segment[s] && first >= t->buckets) continue;
        if (!within(m, t->segment[s], n * sizeof(node_t) / UNIT)) return 0;
    }
    return t->buckets <= (uint64_t)FIRST_BUCKETS << (MAX_SEGMENTS - 1);
}

/* Whether what the head of a state leads to lies within it. A checksum is no signature; but what is found there in turn
 * (chains, blobs, chunks) is believed. */
static int head_within(const ps_store *S, const map_t *m) {
    if (!within(m, m->empty, S->blob_units) || m->free_units > m->bump) return 0;
    for (int c = 0; c < N_CLASSES; c++)
        if (m->free_list[c] && !within(m, m->free_list[c], class_size(c))) return 0;
    return table_within(m, &m->entities) && table_within(m, &m->strings);
}

static int store_load_is_unfit(const ps_store *S) {
    const map_t *head = (const map_t *)S->loading;
    return head && head->magic == MAGIC && head->format == 1 && S->format_1_unfit;
}

static int store_commit_load(ps_store *S, uint64_t size) {
    const map_t *head = (const map_t *)S->loading;
    int error = PS_STORE_OK;
    if (!head || size > S->loading_committed) error = PS_STORE_DUMP_SIZE;
    else if (head->magic != MAGIC || head->format < 1 || head->format > FORMAT) error = PS_STORE_DUMP_FORMAT;
    else if (store_load_is_unfit(S)) error = PS_STORE_DUMP_UNFIT;
    else if (head->fingerprint != S->fingerprint || head->blob_bytes != S->blob_units * UNIT)
        error = PS_STORE_DUMP_FINGERPRINT;
    else if (size % UNIT || head->bump != size / UNIT) error = PS_STORE_DUMP_SIZE;
    else if (!head_within(S, head)) error = PS_STORE_DUMP_HEAD;
    if (error) {
        store_cancel_load(S);
        return error;
    }
    ps_store before = *S;
    S->base = S->loading;
    S->map = (map_t *)S->base;
    S->map->format = FORMAT;
    S->reserved = S->loading_reserved;
    S->committed = S->loading_committed;
    S->huge = S->loading_huge;
    S->loading = NULL;
    if (S->small_pages) store_small_pages(S);
    int is_older = !(S->map->seed[0] | S->map->seed[1]);
    take_seed(S);
    if (is_older) error = store_reseed(S, before.map->seed);
    if (error) {
        *S = before;
        store_cancel_load(S);
        return error;
    }
    munmap(before.base, before.reserved);
    return PS_STORE_OK;
}

void ps_store_free(ps_store *S) {
    if (!S) return;
    if (S->base) munmap(S->base, S->reserved);
    store_cancel_load(S);
    free(S->columns);
    free(S->null_bit);
    free(S->edge);
    free(S->cells);
    free(S->pairs);
    free(S->cell_pairs);
    free(S->evicts);
    free(S->plain_winners);
    free(S->counts);
    free(S->count_start);
    free(S->tail_start);
    free(S->steps);
    free(S->group_start);
    free(S->reach);
    free(S->results);
    free(S->blob_image);
    free(S->record);
    free(S->extra);
    free(S->after[0]);
    free(S->after[1]);
    free(S);
}

ps_store *ps_store_create(const ps_layout *L, int *error, uint32_t *at) {
    *at = 0;
    *error = check_layout(L, at);
    if (*error) return NULL;
    ps_store *S = calloc(1, sizeof *S);
    *error = S ? compile(S, L) : PS_STORE_MEMORY;
    if (!*error && !map_fresh(L->max_bytes, &S->base, &S->reserved)) *error = PS_STORE_MEMORY;
    if (!*error && !commit_to(S, sizeof(map_t))) *error = PS_STORE_MEMORY;
    if (!*error) {
        map_t *m = S->map = (map_t *)S->base;
        m->magic = MAGIC;
        m->format = FORMAT;
        m->fingerprint = S->fingerprint;
        m->blob_bytes = S->blob_units * UNIT;
        memcpy(m->seed, L->seed, sizeof m->seed);
        take_seed(S);
        m->watermark = PS_TIME_MIN - 1;
        m->bump = (units_of(sizeof(map_t)) + 3) & ~(uint64_t)3;
        if (!table_init(S, &m->entities) || !table_init(S, &m->strings) || !(m->empty = heap_alloc(S, S->blob_units)))
            *error = PS_STORE_MEMORY;
        else memcpy(AT(S, char, m->empty), S->blob_image, (uint64_t)S->blob_units * UNIT);
    }
    if (*error) {
        ps_store_free(S);
        return NULL;
    }
    return S;
}

const void *ps_store_bytes(const ps_store *S, uint64_t *size) {
    *size = S->map->bump * UNIT;
    return S->base;
}

int ps_store_load(ps_store *S, const void *bytes, uint64_t size) {
    void *at;
    int error = store_begin_load(S, size, &at);
    if (error) return error;
    memcpy(at, bytes, size);
    return store_commit_load(S, size);
}

const char *ps_store_error_text(int code) {
    switch (code) {
    case PS_STORE_OK: return "no error";
    case PS_STORE_MEMORY: return "window state: out of memory (max_bytes reached, or the system gives no more)";
    case PS_STORE_TIME: return "time outside -2^61..2^61 microseconds";
    case PS_STORE_INFINITY: return "an infinity in an aggregated column";
    case PS_STORE_FULL: return "more than 2^40 events for one entity";
    case PS_STORE_GROUP: return "no such group of outputs";
    case PS_STORE_HANDLE: return "apply needs an entity made by find_or_create";
    case PS_STORE_LAYOUT_COLUMN: return "column: unknown type or index (count takes none, every other function one)";
    case PS_STORE_LAYOUT_TYPE: return "the function does not take a column of this type";
    case PS_STORE_LAYOUT_FUNCTION: return "unknown function";
    case PS_STORE_LAYOUT_WHERE: return "where: no such predicate (at most 63)";
    case PS_STORE_LAYOUT_WINDOW: return "window: length must be positive (0 too if closed is both) and below 2^59 us";
    case PS_STORE_LAYOUT_TTL: return "ttl: must not be negative, and only first and last take one";
    case PS_STORE_LAYOUT_GROUPS: return "groups must add up to the number of outputs";
    case PS_STORE_LAYOUT_RETENTION: return "retention must be within 1..2^59 us, and not shorter than a window";
    case PS_STORE_LAYOUT_LATENESS: return "lateness must be within 0..2^59 us";
    case PS_STORE_LAYOUT_SIZE:
        return "layout too large (1,024 columns, 64 of them integer, bool or timestamp, 16,384 outputs)";
    case PS_STORE_DUMP_FORMAT: return "not a dump of window state, or of another format version";
    case PS_STORE_DUMP_UNFIT: return "the dump is of format 1, which could damage state of this layout; build it anew";
    case PS_STORE_DUMP_FINGERPRINT: return "the dump was made with another layout";
    case PS_STORE_DUMP_HEAD: return "the dump is damaged: its head points outside of it";
    case PS_STORE_DUMP_SIZE: return "the dump is cut short or too long";
    default: return "unknown error";
    }
}

static const ps_store_api api = {
    key_hash,    store_prefetch, store_prefetch_blob, store_find,         store_find_or_create, store_apply,
    store_read,  store_version,  store_sweep,         store_stats,        store_log_position,   store_forget_unused,
    store_miss_before, store_reserve, store_small_pages, store_erase, store_next, store_key,
    ps_store_bytes, store_begin_load, store_commit_load, store_cancel_load,
    store_load_is_unfit, key_partition, store_seed, store_reseed,
};

const ps_store_api *ps_store_get_api(void) { return &api; }
