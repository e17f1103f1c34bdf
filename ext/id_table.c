/* id_table.c (hot path): see id_table.h. */
#define _GNU_SOURCE
#include "id_table.h"

#include <emmintrin.h>
#include <stdlib.h>
#include <sys/mman.h>

#define LIKELY(x) __builtin_expect(!!(x), 1)
#define UNLIKELY(x) __builtin_expect(!!(x), 0)

enum {
    PAGE = 4096,
    BLOCK = 2 << 20,   /* of addresses that are opened and closed together: what one page of page tables maps */
    ENTRY = 23,
    SLOTS = 12,        /* of a line */
    FIRST_BUCKETS = PAGE / 64,
    HAND = 4,          /* entries that a put takes from the old end at most */
    AHEAD = 8,         /* entries before it is taken, an entry's bucket is fetched */
    MARKS = 64,        /* slices are at least 1/32 of what is remembered, in the mean: 34 are ever needed */
    PIECE = 64 << 10,  /* bytes that go back to the system at once */
};

/* Entries per 100 slots: above the first a bucket is split, below the second two are joined. */
#define SPLIT_AT 72
#define JOIN_AT 68

#define HOLE UINT64_MAX
#define NO_WATERMARK INT64_MIN
#define POSITION(word) ((word) & (PS_IDS_POSITIONS - 1))
#define PIPELINE(word) ((uint32_t)((word) >> 48) & 0x7fff)
#define DECIDED(word) ((uint8_t)((word) >> 63))
#define HIGH_56 (((uint64_t)1 << 56) - 1)

typedef struct { /* filled from the front; only the last line of a bucket is not full */
    uint8_t tag[SLOTS];
    uint32_t next;          /* number of a spare, from 1; 0: the last line */
    uint32_t entry[SLOTS];  /* place in the ring, from 1; 0: free, as all behind it */
} line_t;

/* Memory that grows and shrinks at its end. */
typedef struct {
    char *base;
    uint64_t reserved;
    uint64_t open; /* bytes that may be touched */
    uint64_t top;  /* bytes that may have been touched, whole pages */
} stretch_t;

typedef struct { /* entries below the position were put under a watermark of at most this */
    int64_t watermark;
    uint64_t position;
} mark_t;

struct ps_ids {
    uint64_t seed[2];
    char *mapping;
    uint64_t mapped;

    char *ring;
    uint64_t ring_bytes;
    uint32_t places;      /* of the ring */
    uint32_t head, tail;  /* the next place to fill, the oldest one filled */
    uint64_t held;        /* places from tail to head, holes included */
    uint64_t opened;      /* block that head's entry ends in: it and those back to tail's may be touched */
    uint64_t back;        /* bytes of the ring before this one, back to head, hold no memory; whole pages */

    stretch_t lines, spares;
    uint64_t buckets, low; /* low: the power of two with low <= buckets < 2 low */
    uint64_t n_spares;
    uint64_t entries;

    uint64_t floor; /* positions below are forgotten */
    uint64_t forgotten, forgotten_early, limit;

    mark_t marks[MARKS]; /* oldest first */
    int n_marks;
    int64_t watermark;
};

static inline uint64_t pages(uint64_t bytes) { return (bytes + PAGE - 1) & ~(uint64_t)(PAGE - 1); }

/* ---- addresses ------------------------------------------------------------------------------------------------- */

static char *reserve(uint64_t bytes) {
    char *at = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return NULL;
#ifdef MADV_NOHUGEPAGE
    madvise(at, bytes, MADV_NOHUGEPAGE); /* to find and clear a large page takes the system milliseconds */
#endif
    return at;
}

static inline int open_block(char *at, uint64_t bytes) { return mprotect(at, bytes, PROT_READ | PROT_WRITE) == 0; }

/* A block without memory, and without page tables: those stay behind where only the memory is given back. */
static void close_block(char *at, uint64_t bytes) {
    if (mmap(at, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED) {
        madvise(at, bytes, MADV_DONTNEED);
        return;
    }
#ifdef MADV_NOHUGEPAGE
    madvise(at, bytes, MADV_NOHUGEPAGE);
#endif
}

/* Whether the first `bytes` may be touched. */
static int stretch_reach(stretch_t *s, uint64_t bytes) {
    if (LIKELY(bytes <= s->top)) return 1;
    if (UNLIKELY(bytes > s->open)) {
        uint64_t to = (bytes + BLOCK - 1) & ~(uint64_t)(BLOCK - 1);
        if (to > s->reserved) to = s->reserved;
        if (bytes > to || !open_block(s->base + s->open, to - s->open)) return 0;
        s->open = to;
    }
    s->top = pages(bytes);
    return 1;
}

/* Gives back some of what lies behind the first `bytes`, once it is worth it. */
static void stretch_ease(stretch_t *s, uint64_t bytes, uint64_t slack) {
    uint64_t from = pages(bytes);
    if (LIKELY(s->top < from + slack)) return;
    if (s->top - from > PIECE) from = s->top - PIECE;
    madvise(s->base + from, s->top - from, MADV_DONTNEED);
    s->top = from;
}

/* How much freed memory is kept at an end: a 128th of the ring, in whole pages. */
static inline uint64_t slack_of(const ps_ids *T) {
    uint64_t slack = (T->held * ENTRY / 128) & ~(uint64_t)(PAGE - 1);
    return slack < PAGE ? PAGE : slack > PIECE ? PIECE : slack;
}

/* ---- ring ------------------------------------------------------------------------------------------------------ */

static inline char *place_at(const ps_ids *T, uint32_t place) { return T->ring + (uint64_t)place * ENTRY; }

static inline uint64_t load8(const char *p) {
    uint64_t v;
    memcpy(&v, p, 8);
    return v;
}

static inline void store8(char *p, uint64_t v) { memcpy(p, &v, 8); }
static inline uint64_t low_of(const char *e) { return load8(e); }
static inline uint64_t word_of(const char *e) { return load8(e + 15); }
static inline void set_word(char *e, uint64_t word) { store8(e + 15, word); }
static inline uint8_t tag_of(const ps_hash128 *h) { return (uint8_t)(h->hi >> 56); }

static inline int same_hash(const char *e, const ps_hash128 *h) {
    return load8(e) == h->lo && ((load8(e + 8) ^ h->hi) & HIGH_56) == 0;
}

/* Makes the place at head one that may be written; 0: no memory. */
static int ring_reach(ps_ids *T) {
    uint64_t first = (uint64_t)T->head * ENTRY / BLOCK, last = ((uint64_t)T->head * ENTRY + ENTRY - 1) / BLOCK;
    if (LIKELY(last == T->opened)) return 1;
    /* Never the block that the old end still lies in: the ring is two blocks longer than the limit. */
    for (uint64_t b = first == T->opened ? first + 1 : first; b <= last; b++) {
        if (!open_block(T->ring + b * BLOCK, BLOCK)) return 0;
        T->opened = b;
    }
    return 1;
}

/* The oldest place is free. */
static void ring_pass(ps_ids *T) {
    uint64_t block = T->back / BLOCK;
    T->held--;
    if (UNLIKELY(++T->tail == T->places)) {
        T->tail = 0;
        close_block(T->ring + block * BLOCK, T->ring_bytes - block * BLOCK);
        T->back = 0;
        return;
    }
    uint64_t at = (uint64_t)T->tail * ENTRY & ~(uint64_t)(PAGE - 1);
    if (UNLIKELY(at / BLOCK != block)) {
        close_block(T->ring + block * BLOCK, BLOCK);
        T->back = at;
    } else if (UNLIKELY(at - T->back >= slack_of(T))) {
        madvise(T->ring + T->back, at - T->back, MADV_DONTNEED);
        T->back = at;
    }
}

/* The place of a new entry, from 1. ring_reach has been called. */
static uint32_t ring_add(ps_ids *T, const ps_hash128 *h, uint64_t word) {
    uint32_t place = T->head;
    char *e = place_at(T, place);
    store8(e, h->lo);
    store8(e + 8, h->hi);
    set_word(e, word);
    if (UNLIKELY(++T->head == T->places)) T->head = 0;
    T->held++;
    return place + 1;
}

static inline uint64_t ring_used(const ps_ids *T) {
    uint64_t end = pages((uint64_t)T->head * ENTRY);
    return T->head >= T->tail ? end - T->back : T->ring_bytes - T->back + end;
}

/* What it takes, page tables (8 bytes a page) included. */
static inline uint64_t bytes_of(const ps_ids *T) {
    uint64_t memory = ring_used(T) + T->lines.top + T->spares.top;
    return memory + memory / (PAGE / 8) + sizeof *T;
}

/* ---- index: linear hashing ------------------------------------------------------------------------------------- */

static inline uint64_t bucket_of(const ps_ids *T, uint64_t hash) {
    uint64_t b = hash & (2 * T->low - 1);
    return b < T->buckets ? b : hash & (T->low - 1);
}

static inline line_t *line_at(const ps_ids *T, uint64_t bucket) { return (line_t *)T->lines.base + bucket; }
static inline line_t *spare_at(const ps_ids *T, uint32_t number) { return (line_t *)T->spares.base + (number - 1); }
static inline line_t *next_line(const ps_ids *T, const line_t *l) { return l->next ? spare_at(T, l->next) : NULL; }

/* Bit i: tag i is this one. What is free may match: its entry is 0. */
static inline unsigned matches(const line_t *l, uint8_t tag) {
    __m128i found = _mm_cmpeq_epi8(_mm_loadu_si128((const __m128i *)l), _mm_set1_epi8((char)tag));
    return (unsigned)_mm_movemask_epi8(found) & ((1u << SLOTS) - 1);
}

static inline int filled(const line_t *l) {
    int n = SLOTS;
    while (n && !l->entry[n - 1]) n--;
    return n;
}

static inline char *entry_of(const ps_ids *T, const line_t *l, int i) { return place_at(T, l->entry[i] - 1); }

/* Memory for n spares more. */
static inline int reach_spares(ps_ids *T, uint64_t n) {
    return stretch_reach(&T->spares, (T->n_spares + n) * sizeof(line_t));
}

/* To the end of a bucket that begins at `l`. reach_spares(1) has been called. */
static void line_add(ps_ids *T, line_t *l, uint8_t tag, uint32_t place) {
    while (l->next) l = spare_at(T, l->next);
    int n = filled(l);
    if (UNLIKELY(n == SLOTS)) {
        l->next = (uint32_t)++T->n_spares;
        l = spare_at(T, l->next);
        memset(l, 0, sizeof *l);
        n = 0;
    }
    l->tag[n] = tag;
    l->entry[n] = place;
}

/* The last line of this bucket is a spare that holds nothing: it goes, and the last spare of all takes its number. */
static void drop_last(ps_ids *T, uint64_t bucket) {
    line_t *l = line_at(T, bucket);
    while (spare_at(T, l->next)->next) l = spare_at(T, l->next);
    uint32_t free = l->next, last = (uint32_t)T->n_spares;
    l->next = 0;
    if (free != last) {
        const line_t *moved = spare_at(T, last);
        /* Only this bucket has lines that hold nothing: they are on their way out. */
        l = line_at(T, moved->entry[0] ? bucket_of(T, low_of(entry_of(T, moved, 0))) : bucket);
        while (l->next != last) l = spare_at(T, l->next);
        *spare_at(T, free) = *moved;
        l->next = free;
    }
    T->n_spares--;
    stretch_ease(&T->spares, T->n_spares * sizeof(line_t), slack_of(T));
}

/* Drops the spares at the end of a bucket that hold nothing. */
static void trim(ps_ids *T, uint64_t bucket) {
    for (;;) {
        line_t *l = line_at(T, bucket);
        if (!l->next) return;
        while (l->next) l = spare_at(T, l->next);
        if (l->entry[0]) return;
        drop_last(T, bucket);
    }
}

static inline void prefetch_entries(const ps_ids *T, const line_t *l) {
    for (int i = 0; i < SLOTS && l->entry[i]; i++) __builtin_prefetch(entry_of(T, l, i));
}

/* One bucket more; without memory the buckets just get longer. */
static void split(ps_ids *T) {
    uint64_t fresh = T->buckets, from = fresh - T->low, spares = 0;
    line_t *to = line_at(T, fresh), *l;
    for (l = line_at(T, from); l; l = next_line(T, l)) {
        spares++;
        if (l->next) prefetch_entries(T, spare_at(T, l->next)); /* those of the first line are here */
    }
    if (!stretch_reach(&T->lines, (fresh + 1) * sizeof *to) || !reach_spares(T, spares)) return;
    memset(to, 0, sizeof *to);
    line_t *keep = line_at(T, from); /* what stays is packed to the front */
    int kept = 0;
    for (l = keep; l; l = next_line(T, l)) {
        for (int i = 0; i < SLOTS && l->entry[i]; i++) {
            uint8_t tag = l->tag[i];
            uint32_t place = l->entry[i];
            l->entry[i] = 0;
            if (low_of(place_at(T, place - 1)) & T->low) {
                line_add(T, to, tag, place);
                continue;
            }
            if (kept == SLOTS) {
                keep = next_line(T, keep);
                kept = 0;
            }
            keep->tag[kept] = tag;
            keep->entry[kept++] = place;
        }
    }
    T->buckets++;
    if (T->buckets == 2 * T->low) T->low = T->buckets;
    trim(T, from);
    l = line_at(T, T->buckets - T->low); /* the next to be split, some puts from now */
    prefetch_entries(T, l);
    if (l->next) __builtin_prefetch(spare_at(T, l->next));
}

/* One bucket less. */
static void join(ps_ids *T) {
    uint64_t low = T->buckets == T->low ? T->low / 2 : T->low, gone = T->buckets - 1, to = gone - low, lines = 0;
    line_t *l;
    for (l = line_at(T, gone); l; l = next_line(T, l)) lines++;
    if (!reach_spares(T, lines)) return;
    for (l = line_at(T, gone); l; l = next_line(T, l)) {
        for (int i = 0; i < SLOTS && l->entry[i]; i++) {
            line_add(T, line_at(T, to), l->tag[i], l->entry[i]);
            l->entry[i] = 0;
        }
    }
    T->buckets = gone;
    T->low = low;
    trim(T, gone);
    stretch_ease(&T->lines, gone * sizeof *l, slack_of(T));
}

static inline void even_out(ps_ids *T) {
    uint64_t slots = (T->buckets + T->n_spares) * SLOTS;
    if (UNLIKELY(T->entries * 100 > slots * SPLIT_AT)) split(T);
    else if (UNLIKELY(T->entries * 100 < slots * JOIN_AT && T->buckets > FIRST_BUCKETS)) join(T);
}

/* Takes the entry at the ring's old end out of its bucket. */
static void unlink_oldest(ps_ids *T) {
    uint32_t place = T->tail + 1;
    uint64_t bucket = bucket_of(T, low_of(place_at(T, T->tail)));
    line_t *l = line_at(T, bucket), *last;
    int i;
    for (;; l = spare_at(T, l->next)) {
        for (i = 0; i < SLOTS && l->entry[i] != place;) i++;
        if (i < SLOTS) break;
    }
    for (last = l; last->next;) last = spare_at(T, last->next);
    int n = filled(last) - 1;
    l->tag[i] = last->tag[n];
    l->entry[i] = last->entry[n];
    last->entry[n] = 0;
    if (n == 0) trim(T, bucket);
    T->entries--;
}

static void forget_oldest(ps_ids *T) {
    uint64_t word = word_of(place_at(T, T->tail));
    if (word != HOLE) {
        unlink_oldest(T);
        if (POSITION(word) < T->floor) T->forgotten++;
        else T->forgotten_early++;
    }
    ring_pass(T);
    even_out(T);
    if (LIKELY(T->held > AHEAD && T->tail < T->places - AHEAD))
        __builtin_prefetch(line_at(T, bucket_of(T, low_of(place_at(T, T->tail + AHEAD)))));
}

static uint32_t ids_tend(ps_ids *T, uint32_t n) {
    uint32_t done = 0;
    while (done < n && T->held) {
        uint64_t word = word_of(place_at(T, T->tail));
        if (word != HOLE && POSITION(word) >= T->floor) break;
        forget_oldest(T);
        done++;
    }
    return done;
}

/* ---- operations ------------------------------------------------------------------------------------------------ */

enum { KIND_TEXT = 0, KIND_INT = 1 };

static ps_hash128 ids_hash_text(const ps_ids *T, const char *text, uint64_t n) {
    return ps_siphash(T->seed, text, n, KIND_TEXT);
}

static ps_hash128 ids_hash_int(const ps_ids *T, int64_t i) { return ps_siphash(T->seed, &i, sizeof i, KIND_INT); }

static void ids_prefetch(const ps_ids *T, const ps_hash128 *h) { __builtin_prefetch(line_at(T, bucket_of(T, h->lo))); }

static inline void entry_from(ps_id_entry *to, uint64_t word) {
    to->position = POSITION(word);
    to->pipeline = (uint16_t)PIPELINE(word);
    to->has_decision = DECIDED(word);
}

static int ids_find(const ps_ids *T, const ps_hash128 *h, uint32_t pipeline, ps_id_entry *entry) {
    int found = PS_ID_UNKNOWN;
    for (const line_t *l = line_at(T, bucket_of(T, h->lo)); l; l = next_line(T, l)) {
        for (unsigned m = matches(l, tag_of(h)); m; m &= m - 1) {
            int i = __builtin_ctz(m);
            if (!l->entry[i]) break;
            const char *e = entry_of(T, l, i);
            if (!same_hash(e, h)) continue;
            uint64_t word = word_of(e);
            if (POSITION(word) < T->floor) continue;
            if (found == PS_ID_UNKNOWN || PIPELINE(word) == pipeline) entry_from(entry, word);
            found = PS_ID_SEEN;
            if (PIPELINE(word) == pipeline) return DECIDED(word) ? PS_ID_DECIDED : PS_ID_SEEN;
        }
    }
    return found;
}

static int ids_find_all(const ps_ids *T, const ps_hash128 *h, ps_id_entry *entries, int n) {
    int found = 0;
    for (const line_t *l = line_at(T, bucket_of(T, h->lo)); l; l = next_line(T, l)) {
        for (unsigned m = matches(l, tag_of(h)); m; m &= m - 1) {
            int i = __builtin_ctz(m);
            if (!l->entry[i]) break;
            const char *e = entry_of(T, l, i);
            uint64_t word = word_of(e);
            if (!same_hash(e, h) || POSITION(word) < T->floor) continue;
            if (found < n) entry_from(&entries[found], word);
            found++;
        }
    }
    return found;
}

/* Where the entry of this id and pipeline stands in the index, forgotten or not; or NULL. */
static uint32_t *locate(const ps_ids *T, const ps_hash128 *h, uint32_t pipeline) {
    for (line_t *l = line_at(T, bucket_of(T, h->lo)); l; l = next_line(T, l)) {
        for (unsigned m = matches(l, tag_of(h)); m; m &= m - 1) {
            int i = __builtin_ctz(m);
            if (!l->entry[i]) break;
            const char *e = entry_of(T, l, i);
            if (same_hash(e, h) && PIPELINE(word_of(e)) == pipeline) return &l->entry[i];
        }
    }
    return NULL;
}

/* Room for one entry below the limit: what comes when it is near takes older ones away, a few more than it adds. The
 * distance covers what is freed and not given back yet, at each of the three ends. */
static void make_room(ps_ids *T) {
    if (LIKELY(bytes_of(T) + 3 * slack_of(T) + 4 * PAGE <= T->limit)) return;
    for (int i = 0; i < HAND && T->held; i++) forget_oldest(T);
}

static void ids_put(ps_ids *T, const ps_hash128 *h, uint32_t pipeline, uint64_t position, int has_decision) {
    uint64_t word = POSITION(position) | (uint64_t)(pipeline & 0x7fff) << 48 | (uint64_t)(has_decision != 0) << 63;
    ids_tend(T, HAND);
    make_room(T);
    int reached = ring_reach(T) && reach_spares(T, 1);
    uint32_t *at = locate(T, h, pipeline);
    if (at) {
        char *e = place_at(T, *at - 1);
        uint64_t age = (T->head + (uint64_t)T->places - (*at - 1)) % T->places;
        /* An old place would keep the hand from its neighbours for as long as the new position is remembered. */
        if (reached && age > 256 && age > T->held / 64 && position >= T->floor) {
            set_word(e, HOLE);
            *at = ring_add(T, h, word);
        } else {
            set_word(e, word);
        }
        return;
    }
    if (UNLIKELY(position < T->floor)) return;
    if (UNLIKELY(!reached)) { /* the system gives no memory: this one is forgotten at once, and old ones make room */
        T->forgotten_early++;
        for (int i = 0; i < HAND && T->held; i++) forget_oldest(T);
        return;
    }
    line_add(T, line_at(T, bucket_of(T, h->lo)), tag_of(h), ring_add(T, h, word));
    T->entries++;
    even_out(T);
}

static void ids_forget_before(ps_ids *T, uint64_t position) {
    if (position > T->floor) T->floor = position < PS_IDS_POSITIONS ? position : PS_IDS_POSITIONS;
}

static void ids_advance(ps_ids *T, int64_t watermark, uint64_t position, int64_t remember) {
    if (UNLIKELY(watermark < T->watermark)) { /* set back */
        for (int i = 0; i < T->n_marks; i++)
            if (T->marks[i].watermark > watermark) T->marks[i].watermark = watermark;
        T->watermark = watermark;
    }
    if (watermark == T->watermark) return;
    if (T->watermark == NO_WATERMARK) {
        T->watermark = watermark;
        return;
    }
    /* Everything below `position` was put under a watermark of at most T->watermark. */
    mark_t *newest = T->n_marks ? &T->marks[T->n_marks - 1] : NULL;
    int64_t step = remember / 16 ? remember / 16 : 1;
    if (!newest || watermark - newest->watermark >= step) {
        if (newest && (newest->watermark == T->watermark || T->n_marks == MARKS)) {
            newest->watermark = T->watermark;
            newest->position = position;
        } else {
            T->marks[T->n_marks].watermark = T->watermark;
            T->marks[T->n_marks++].position = position;
        }
    }
    T->watermark = watermark;
    int old = 0;
    while (old < T->n_marks && watermark - T->marks[old].watermark > remember) old++;
    if (old) {
        ids_forget_before(T, T->marks[old - 1].position);
        T->n_marks -= old;
        memmove(T->marks, T->marks + old, (size_t)T->n_marks * sizeof(mark_t));
    }
}

static void ids_stats(const ps_ids *T, ps_ids_stats *to) {
    to->ids = T->entries;
    to->bytes = bytes_of(T);
    to->forgotten = T->forgotten;
    to->forgotten_early = T->forgotten_early;
    to->limit = T->limit;
    to->floor = T->floor;
}

ps_ids *ps_ids_create(const uint64_t seed[2], uint64_t limit) {
    if (!limit) limit = PS_IDS_MOST;
    ps_ids *T = calloc(1, sizeof *T);
    if (!T) return NULL;
    memcpy(T->seed, seed, sizeof T->seed);
    T->limit = limit;
    uint64_t part = (limit + BLOCK - 1) & ~(uint64_t)(BLOCK - 1);
    T->ring_bytes = part + 2 * (uint64_t)BLOCK;
    T->mapped = T->ring_bytes + 2 * part + BLOCK;
    T->mapping = reserve(T->mapped);
    if (!T->mapping) {
        free(T);
        return NULL;
    }
    T->ring = (char *)(((uintptr_t)T->mapping + BLOCK - 1) & ~(uintptr_t)(BLOCK - 1));
    T->places = (uint32_t)(T->ring_bytes / ENTRY);
    T->lines.base = T->ring + T->ring_bytes;
    T->spares.base = T->lines.base + part;
    T->lines.reserved = T->spares.reserved = part;
    T->buckets = T->low = FIRST_BUCKETS;
    T->watermark = NO_WATERMARK;
    if (!open_block(T->ring, BLOCK) || !stretch_reach(&T->lines, FIRST_BUCKETS * sizeof(line_t))) {
        ps_ids_free(T);
        return NULL;
    }
    return T;
}

void ps_ids_free(ps_ids *T) {
    if (!T) return;
    munmap(T->mapping, T->mapped);
    free(T);
}

const char *ps_ids_check(const ps_ids *T) {
    uint64_t entries = 0, spares = 0, holes = 0;
    if (T->buckets < T->low || T->buckets >= 2 * T->low) return "buckets and low do not fit";
    for (uint64_t b = 0; b < T->buckets; b++) {
        for (const line_t *l = line_at(T, b); l; l = next_line(T, l)) {
            int n = filled(l);
            if (l->next > T->n_spares) return "a spare that is none";
            if (l->next && n < SLOTS) return "a line that is not full has a next one";
            if (l != line_at(T, b)) {
                spares++;
                if (!n) return "a spare that holds nothing";
            }
            for (int i = 0; i < n; i++) {
                if (!l->entry[i]) return "a gap in a line";
                uint64_t age = (l->entry[i] - 1 + (uint64_t)T->places - T->tail) % T->places;
                if (age >= T->held) return "an entry outside the ring";
                const char *e = entry_of(T, l, i);
                if (bucket_of(T, low_of(e)) != b) return "an entry in another bucket";
                if (word_of(e) == HOLE) return "a hole in a bucket";
            }
            entries += (uint64_t)n;
        }
    }
    if (entries != T->entries) return "the buckets hold another number of entries";
    if (spares != T->n_spares) return "a spare in no bucket";
    for (uint64_t i = 0; i < T->held; i++)
        holes += word_of(place_at(T, (uint32_t)((T->tail + i) % T->places))) == HOLE;
    if (entries + holes != T->held) return "the ring holds another number of entries";
    return NULL;
}

/* ---- first decisions without a log ----------------------------------------------------------------------------- */

/* The ring is addressed by how many units were ever written: unit u stands at u modulo its size, and has been written
 * over once `head` is a whole ring beyond it. A record does not go round the end: what is left there is skipped. */

enum { UNIT = 8 };

typedef struct {
    uint32_t bytes; /* NOTHING: only a position */
    uint32_t check; /* the low half of its unit */
} kept_t;

#define NOTHING UINT32_MAX

struct ps_keep {
    stretch_t ring;
    uint64_t units; /* of the ring */
    uint64_t head;  /* units ever written, or skipped */
    uint64_t kept, limit;
};

/* The unit that a record of n units begins at, and head behind it. */
static uint64_t keep_take(ps_keep *K, uint64_t n) {
    uint64_t at = K->head % K->units;
    if (at + n > K->units) K->head += K->units - at;
    uint64_t unit = K->head;
    K->head += n;
    return unit;
}

static uint64_t keep_put(ps_keep *K, const void *bytes, uint64_t n) {
    for (;;) {
        uint64_t units = 1 + (n + UNIT - 1) / UNIT, head = K->head;
        int fits = n < NOTHING && units <= K->units;
        if (!fits) units = 1;
        uint64_t unit = keep_take(K, units), at = unit % K->units;
        if (LIKELY(stretch_reach(&K->ring, (at + units) * UNIT))) {
            kept_t *kept = (kept_t *)(K->ring.base + at * UNIT);
            kept->bytes = fits ? (uint32_t)n : NOTHING;
            kept->check = (uint32_t)unit;
            if (fits && n) memcpy(kept + 1, bytes, n);
            K->kept++;
            return unit + 1;
        }
        if (!K->ring.open) return unit + 1;
        /* The system gives no more memory, so this is the first time round: the ring stays at the size it has. */
        K->units = K->ring.open / UNIT;
        K->head = head;
    }
}

static const void *keep_get(const ps_keep *K, uint64_t position, uint64_t *n) {
    uint64_t unit = position - 1; /* position 0: beyond head */
    if (unit >= K->head || K->head - unit > K->units) return NULL;
    uint64_t at = unit % K->units * UNIT;
    if (at + UNIT > K->ring.open) return NULL;
    const kept_t *kept = (const kept_t *)(K->ring.base + at);
    if (kept->check != (uint32_t)unit || kept->bytes == NOTHING) return NULL;
    if (kept->bytes > (K->head - unit - 1) * UNIT) return NULL;
    *n = kept->bytes;
    return kept + 1;
}

static uint64_t keep_next(const ps_keep *K) { return K->head + 1; }

static void keep_stats(const ps_keep *K, ps_keep_stats *to) {
    to->kept = K->kept;
    to->bytes = K->ring.top + K->ring.top / (PAGE / 8) + sizeof *K;
    to->limit = K->limit;
    to->oldest = K->head > K->units ? K->head - K->units + 1 : 0;
}

ps_keep *ps_keep_create(uint64_t limit) {
    ps_keep *K = calloc(1, sizeof *K);
    if (!K) return NULL;
    K->limit = limit;
    K->ring.reserved = (limit - limit / (PAGE / 8) - sizeof *K) & ~(uint64_t)(PAGE - 1);
    K->units = K->ring.reserved / UNIT;
    K->ring.base = reserve(K->ring.reserved);
    if (!K->ring.base) {
        free(K);
        return NULL;
    }
    return K;
}

void ps_keep_free(ps_keep *K) {
    if (!K) return;
    munmap(K->ring.base, K->ring.reserved);
    free(K);
}

static const ps_ids_api ids_api = {
    .hash_text = ids_hash_text,
    .hash_int = ids_hash_int,
    .prefetch = ids_prefetch,
    .find = ids_find,
    .find_all = ids_find_all,
    .put = ids_put,
    .forget_before = ids_forget_before,
    .tend = ids_tend,
    .advance = ids_advance,
    .stats = ids_stats,
};

const ps_ids_api *ps_ids_get_api(void) { return &ids_api; }

static const ps_keep_api keep_api = {.put = keep_put, .get = keep_get, .next = keep_next, .stats = keep_stats};

const ps_keep_api *ps_keep_get_api(void) { return &keep_api; }
