/* asof_join.c (hot path): point-in-time join over Arrow buffers; see asof_join.h for the contract and the words.
 *
 * Keys are hashed where they lie, PS_ASOF_BLOCK at a time: first words and hashes of the whole block, each asking for
 * its table line, then the comparisons, so that cache misses overlap. What must stay true: a key is found only if all
 * its bytes are equal; up to 11 bytes they stand in the table line itself, longer ones in the text of the ps_keys.
 */
#include "asof_join.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "row.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define LIKELY(x) __builtin_expect(!!(x), 1)
#define UNLIKELY(x) __builtin_expect(!!(x), 0)
#define PREFETCH(p) __builtin_prefetch(p)
#define BLOCK PS_ASOF_BLOCK
#define BUCKET 4         /* lines of keys: one cache line */
#define SHORT_BYTES 11   /* text that a line of keys holds */
#define LONG 0xffu
#define INTEGER 0xfeu
#define SMALL_SORT 2048  /* entries that are merged in a buffer of their own */
#define RUN 12           /* entries sorted by insertion */
#define LOOK_AHEAD 24    /* rows between asking for memory and using it */
#define HUGE_PAGE ((size_t)2 << 20)
#define MANY_KEYS 131072 /* beyond, the newest rows per key do not stay in the cache */

static int bit(const uint8_t *bits, int64_t i) { return bits[i >> 3] >> (i & 7) & 1; }

/* ---------------------------------------------------------------------------------------------------------- keys */

/* One key: of text up to 11 bytes, the bytes; of longer text 88 bits of hash; an integer. Equal lines are equal keys,
 * but for long text, whose bytes stand in ps_keys.text. */
typedef struct {
    uint64_t low;
    uint32_t rest; /* its last byte: 1 + the length of text, LONG, or INTEGER; 0 only in an empty line */
    uint32_t id;   /* PS_ASOF_NO_ID: an empty line */
} key_line;

struct ps_keys {
    key_line *lines; /* in buckets of BUCKET, filled from the first on; a full one runs over into the next */
    int shift;       /* 64 - log2 of the number of lines */
    int64_t count, most;
    int64_t *places; /* by id, where there is long text: where its length and bytes stand in `text` */
    int64_t places_room;
    uint8_t *text;
    int64_t text_bytes, text_room;
};

typedef struct {
    uint64_t low;
    uint32_t rest;   /* as in its line */
    uint32_t bucket; /* number of its bucket's first line */
} sought_key;

typedef struct {
    _Alignas(16) sought_key keys[BLOCK];
    const uint8_t *text[BLOCK]; /* of long text */
    uint32_t length[BLOCK];
    int any_long;
} key_block;

/* The mixing step of wyhash (Wang Yi): both halves of a 128-bit product. */
static inline uint64_t mix(uint64_t a, uint64_t b)
{
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

#define K0 0xa0761d6478bd642fULL
#define K1 0xe7037ed1a0b428dbULL
#define K2 0x8ebc6af09c88c6e3ULL
#define GOLDEN 0x9e3779b97f4a7c15ULL

/* The first line of a key's bucket. The second product undoes the rhythm that one product leaves in dense integers. */
static inline uint32_t bucket_of(const ps_keys *keys, uint64_t low, uint32_t rest)
{
    return (uint32_t)((mix(low ^ K0, rest ^ K1) * GOLDEN) >> keys->shift) & ~(uint32_t)(BUCKET - 1);
}

static inline uint64_t word(const uint8_t *p)
{
    uint64_t w;
    memcpy(&w, p, 8);
    return w;
}

/* Of 12 bytes or more. */
static uint64_t hash_long(const uint8_t *p, int64_t n, uint64_t seed)
{
    uint64_t h = seed ^ (uint64_t)n;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) h = mix(word(p + i) ^ K0, word(p + i + 8) ^ h);
    uint64_t head = word(n >= 16 ? p + n - 16 : p);
    return mix(h ^ K1, mix(head ^ K0, word(p + n - 8) ^ seed));
}

static const uint64_t FIRST_BYTES[9] = {
    0, 0xff, 0xffff, 0xffffff, 0xffffffff, 0xffffffffffULL, 0xffffffffffffULL, 0xffffffffffffffULL, ~0ULL,
};

static uint64_t few_bytes(const uint8_t *p, int64_t n)
{
    uint64_t w = 0;
    memcpy(&w, p, (size_t)n);
    return w;
}

#define TEXT_BLOCK(NAME, OFFSET)                                                                                     \
    static int NAME(const ps_keys *keys, const ps_key_column *c, int64_t start, int n, key_block *b, int64_t *at)    \
    {                                                                                                                \
        const OFFSET *offsets = (const OFFSET *)c->values + c->offset + start;                                       \
        const uint8_t *text = c->text;                                                                               \
        const int64_t size = c->text_bytes;                                                                          \
        int damaged = offsets[0] < 0 || offsets[n] > size;                                                           \
        for (int i = 0; i < n; i++) damaged |= offsets[i + 1] < offsets[i];                                          \
        for (int i = 0; damaged && i < n; i++) {                                                                     \
            *at = start + i;                                                                                         \
            if (offsets[i] < 0 || offsets[i + 1] < offsets[i] || offsets[i + 1] > size) return PS_ASOF_DAMAGED;      \
        }                                                                                                            \
        const int inside = offsets[n] + 8 <= size; /* 8 bytes can be read from wherever a key begins */              \
        b->any_long = 0;                                                                                             \
        for (int i = 0; i < n; i++) {                                                                                \
            int64_t length = offsets[i + 1] - offsets[i];                                                            \
            const uint8_t *p = text + offsets[i];                                                                    \
            uint64_t low;                                                                                            \
            uint32_t rest = (uint32_t)(length + 1) << 24;                                                            \
            if (LIKELY(length <= 8)) {                                                                               \
                low = LIKELY(inside) ? word(p) & FIRST_BYTES[length] : few_bytes(p, length);                         \
            } else if (LIKELY(length <= SHORT_BYTES)) {                                                              \
                low = word(p);                                                                                       \
                rest |= (uint32_t)(word(p + length - 8) >> (64 - 8 * (length - 8)));                                 \
            } else {                                                                                                 \
                if (UNLIKELY(length > INT32_MAX)) return PS_ASOF_MEMORY;                                             \
                low = hash_long(p, length, K2);                                                                      \
                rest = (uint32_t)(hash_long(p, length, GOLDEN) >> 40) | LONG << 24;                                  \
                b->text[i] = p;                                                                                      \
                b->length[i] = (uint32_t)length;                                                                     \
                b->any_long = 1;                                                                                     \
            }                                                                                                        \
            uint32_t bucket = bucket_of(keys, low, rest);                                                            \
            b->keys[i] = (sought_key){low, rest, bucket};                                                            \
            PREFETCH(&keys->lines[bucket]);                                                                          \
        }                                                                                                            \
        return PS_ASOF_OK;                                                                                           \
    }

TEXT_BLOCK(text_block_32, int32_t)
TEXT_BLOCK(text_block_64, int64_t)

static int integer_block(const ps_keys *keys, const ps_key_column *c, int64_t start, int n, key_block *b, int64_t *at)
{
    int64_t base = c->offset + start;
#define READ(KIND, TYPE)                                                                                             \
    case KIND:                                                                                                        \
        for (int i = 0; i < n; i++) {                                                                                 \
            uint64_t low = (uint64_t)(int64_t)((const TYPE *)c->values)[base + i];                                    \
            uint32_t bucket = bucket_of(keys, low, INTEGER << 24);                                                    \
            b->keys[i] = (sought_key){low, INTEGER << 24, bucket};                                                    \
            PREFETCH(&keys->lines[bucket]);                                                                           \
        }                                                                                                             \
        break
    switch (c->kind) {
        READ(PS_ASOF_INT8, int8_t);
        READ(PS_ASOF_INT16, int16_t);
        READ(PS_ASOF_INT32, int32_t);
        READ(PS_ASOF_INT64, int64_t);
        READ(PS_ASOF_UINT8, uint8_t);
        READ(PS_ASOF_UINT16, uint16_t);
        READ(PS_ASOF_UINT32, uint32_t);
        READ(PS_ASOF_UINT64, uint64_t);
    }
#undef READ
    b->any_long = 0;
    if (c->kind == PS_ASOF_UINT64)
        for (int i = 0; i < n; i++)
            if (UNLIKELY(b->keys[i].low > INT64_MAX) && (!c->validity || bit(c->validity, base + i))) {
                *at = start + i;
                return PS_ASOF_BEYOND_INT64;
            }
    return PS_ASOF_OK;
}

static int read_block(const ps_keys *keys, const ps_key_column *c, int64_t start, int n, key_block *b, int64_t *at)
{
    if (c->kind == PS_ASOF_TEXT32) return text_block_32(keys, c, start, n, b, at);
    if (c->kind == PS_ASOF_TEXT64) return text_block_64(keys, c, start, n, b, at);
    return integer_block(keys, c, start, n, b, at);
}

static inline int same_text(const ps_keys *keys, uint32_t id, const uint8_t *text, uint32_t length)
{
    const uint8_t *kept = keys->text + keys->places[id];
    uint32_t n;
    memcpy(&n, kept, sizeof n);
    return n == length && !memcmp(kept + sizeof n, text, length);
}

/* The line of key i of the block, or the empty one where it would stand. */
static key_line *line_of(const ps_keys *keys, const key_block *b, int i)
{
    uint32_t mask = (uint32_t)(((uint64_t)1 << (64 - keys->shift)) - 1);
    const sought_key *key = &b->keys[i];
    for (uint32_t at = key->bucket;; at = (at + 1) & mask) {
        key_line *line = &keys->lines[at];
        if (line->id == PS_ASOF_NO_ID) return line;
        if (line->low != key->low || line->rest != key->rest) continue;
        if (key->rest >> 24 != LONG || same_text(keys, line->id, b->text[i], b->length[i])) return line;
    }
}

/* As line_of()->id, all lines of the bucket compared without a branch; of long text only the hash. */
static inline uint32_t id_of(const ps_keys *keys, const key_block *b, int i)
{
    const sought_key *key = &b->keys[i];
    const key_line *line = &keys->lines[key->bucket];
    uint32_t found; /* bit 4 * k: line k */
#if defined(__SSE2__)
    const __m128i sought = _mm_load_si128((const __m128i *)key), *lines = (const __m128i *)line;
    __m128i equal01 = _mm_packs_epi32(_mm_cmpeq_epi32(lines[0], sought), _mm_cmpeq_epi32(lines[1], sought));
    __m128i equal23 = _mm_packs_epi32(_mm_cmpeq_epi32(lines[2], sought), _mm_cmpeq_epi32(lines[3], sought));
    uint32_t equal = (uint32_t)_mm_movemask_epi8(_mm_packs_epi16(equal01, equal23)); /* a bit for every 4 bytes */
    found = equal & equal >> 1 & equal >> 2 & 0x1111;
#else
    found = 0;
    for (int k = 0; k < BUCKET; k++) found |= (uint32_t)(line[k].low == key->low && line[k].rest == key->rest) << 4 * k;
#endif
    if (LIKELY(found)) return line[__builtin_ctz(found) / 4].id;
    return line[BUCKET - 1].id == PS_ASOF_NO_ID ? PS_ASOF_NO_ID : line_of(keys, b, i)->id;
}

/* Compares the bytes of long text, whose places and bytes are asked for before they are read. */
static void check_long(const ps_keys *keys, const key_block *b, int n, uint32_t *ids)
{
    if (!keys->places) return; /* no id is of long text */
#define IS_LONG(i) (b->keys[i].rest >> 24 == LONG && ids[i] != PS_ASOF_NO_ID)
    for (int i = 0; i < n; i++)
        if (IS_LONG(i)) PREFETCH(&keys->places[ids[i]]);
    for (int i = 0; i < n; i++)
        if (IS_LONG(i)) PREFETCH(&keys->text[keys->places[ids[i]]]);
    for (int i = 0; i < n; i++)
        if (IS_LONG(i) && UNLIKELY(!same_text(keys, ids[i], b->text[i], b->length[i])))
            ids[i] = line_of(keys, b, i)->id;
#undef IS_LONG
}

static key_line *empty_lines(int64_t n)
{
    size_t bytes = (size_t)n * sizeof(key_line);
    key_line *lines = aligned_alloc(bytes < HUGE_PAGE ? 64 : HUGE_PAGE, bytes);
    if (!lines) return NULL;
    if (bytes >= HUGE_PAGE) madvise(lines, bytes, MADV_HUGEPAGE); /* with small pages each line would cost two misses */
    for (int64_t i = 0; i < n; i++) lines[i] = (key_line){0, 0, PS_ASOF_NO_ID};
    return lines;
}

#define FIRST_LINES_LOG2 11

ps_keys *ps_keys_new(void)
{
    ps_keys *keys = calloc(1, sizeof *keys);
    if (!keys) return NULL;
    keys->shift = 64 - FIRST_LINES_LOG2;
    keys->most = 1 << (FIRST_LINES_LOG2 - 1);
    keys->lines = empty_lines(1 << FIRST_LINES_LOG2);
    if (!keys->lines) {
        free(keys);
        return NULL;
    }
    return keys;
}

void ps_keys_free(ps_keys *keys)
{
    if (!keys) return;
    free(keys->lines);
    free(keys->places);
    free(keys->text);
    free(keys);
}

int64_t ps_keys_count(const ps_keys *keys) { return keys->count; }

/* Room for one more block of keys, with half of the lines empty: fuller buckets run over more often. */
static int make_room(ps_keys *keys)
{
    if (keys->count + BLOCK <= keys->most) return PS_ASOF_OK;
    if (keys->shift == 32) return PS_ASOF_MEMORY;
    int64_t old = (int64_t)1 << (64 - keys->shift), n = 2 * old;
    key_line *before = keys->lines, *lines = empty_lines(n);
    if (!lines) return PS_ASOF_MEMORY;
    keys->lines = lines;
    keys->shift--;
    keys->most = n / 2;
    for (int64_t i = 0; i < old; i++) {
        if (before[i].id == PS_ASOF_NO_ID) continue;
        uint32_t at = bucket_of(keys, before[i].low, before[i].rest);
        while (lines[at].id != PS_ASOF_NO_ID) at = (at + 1) & (uint32_t)(n - 1);
        lines[at] = before[i];
    }
    free(before);
    return PS_ASOF_OK;
}

/* Memory for `need` bytes at least, which grows by half. */
static int grow(void **memory, int64_t *room, int64_t need)
{
    if (need <= *room) return PS_ASOF_OK;
    int64_t bytes = need + need / 2 + 4096;
    void *larger = realloc(*memory, (size_t)bytes);
    if (!larger) return PS_ASOF_MEMORY;
    *memory = larger;
    *room = bytes;
    return PS_ASOF_OK;
}

static int keep_text(ps_keys *keys, uint32_t id, const uint8_t *text, uint32_t length)
{
    int64_t end = keys->text_bytes + (int64_t)sizeof length + length;
    int64_t places = ((int64_t)id + 1) * (int64_t)sizeof *keys->places;
    if (grow((void **)&keys->places, &keys->places_room, places)) return PS_ASOF_MEMORY;
    if (grow((void **)&keys->text, &keys->text_room, end)) return PS_ASOF_MEMORY;
    keys->places[id] = keys->text_bytes;
    memcpy(keys->text + keys->text_bytes, &length, sizeof length);
    memcpy(keys->text + keys->text_bytes + sizeof length, text, length);
    keys->text_bytes = end;
    return PS_ASOF_OK;
}

static int add_line(ps_keys *keys, key_line *line, const key_block *b, int i)
{
    uint32_t id = (uint32_t)keys->count;
    const sought_key *key = &b->keys[i];
    if (key->rest >> 24 == LONG && keep_text(keys, id, b->text[i], b->length[i])) return PS_ASOF_MEMORY;
    *line = (key_line){key->low, key->rest, id};
    keys->count++;
    return PS_ASOF_OK;
}

/* The id of the dictionary value that row `at` points to; -1: the index is out of range. */
static inline int64_t dictionary_id(const ps_key_column *c, int64_t at)
{
    int64_t index;
    switch (c->kind & ~PS_ASOF_DICTIONARY) {
    case PS_ASOF_INT8: index = ((const int8_t *)c->values)[at]; break;
    case PS_ASOF_INT16: index = ((const int16_t *)c->values)[at]; break;
    case PS_ASOF_INT32: index = ((const int32_t *)c->values)[at]; break;
    case PS_ASOF_UINT8: index = ((const uint8_t *)c->values)[at]; break;
    case PS_ASOF_UINT16: index = ((const uint16_t *)c->values)[at]; break;
    case PS_ASOF_UINT32: index = ((const uint32_t *)c->values)[at]; break;
    default: index = ((const int64_t *)c->values)[at]; break;
    }
    return LIKELY((uint64_t)index < (uint64_t)c->n_ids) ? (int64_t)c->ids[index] : -1;
}

static int dictionary_ids(const ps_key_column *c, int64_t start, int64_t n, uint32_t missing, uint32_t *ids,
                          int64_t *at)
{
    int64_t base = c->offset + start;
    for (int64_t i = 0; i < n; i++) {
        if (c->validity && !bit(c->validity, base + i)) {
            ids[i] = missing;
            continue;
        }
        int64_t id = dictionary_id(c, base + i);
        if (UNLIKELY(id < 0)) {
            *at = start + i;
            return PS_ASOF_DAMAGED;
        }
        ids[i] = id == PS_ASOF_NO_ID ? missing : (uint32_t)id;
    }
    return PS_ASOF_OK;
}

int ps_keys_add(ps_keys *keys, const ps_key_column *c, uint32_t *ids, int64_t *at_row)
{
    key_block b;
    if (c->kind & PS_ASOF_DICTIONARY) /* its values were added before */
        return ids ? dictionary_ids(c, 0, c->length, PS_ASOF_NO_ID, ids, at_row) : PS_ASOF_OK;
    for (int64_t start = 0; start < c->length; start += BLOCK) {
        int n = c->length - start < BLOCK ? (int)(c->length - start) : BLOCK;
        int code = make_room(keys);
        if (!code) code = read_block(keys, c, start, n, &b, at_row);
        if (code) return code;
        for (int i = 0; i < n; i++) {
            uint32_t id = PS_ASOF_NO_ID;
            if (!c->validity || bit(c->validity, c->offset + start + i)) {
                if (b.keys[i].rest >> 24 != LONG) id = id_of(keys, &b, i);
                if (UNLIKELY(id == PS_ASOF_NO_ID)) {
                    key_line *line = line_of(keys, &b, i);
                    if (line->id == PS_ASOF_NO_ID && add_line(keys, line, &b, i)) return PS_ASOF_MEMORY;
                    id = line->id;
                }
            }
            if (ids) ids[start + i] = id;
        }
    }
    return PS_ASOF_OK;
}

int ps_keys_find(const ps_keys *keys, const ps_key_column *c, int64_t start, int n, uint32_t missing, uint32_t *ids,
                 int64_t *at_row)
{
    key_block b;
    if (c->kind & PS_ASOF_DICTIONARY) return dictionary_ids(c, start, n, missing, ids, at_row);
    int code = read_block(keys, c, start, n, &b, at_row);
    if (code) return code;
    for (int i = 0; i < n; i++) ids[i] = id_of(keys, &b, i);
    if (b.any_long) check_long(keys, &b, n, ids);
    for (int i = 0; i < n; i++) ids[i] = ids[i] == PS_ASOF_NO_ID ? missing : ids[i];
    if (c->validity)
        for (int i = 0; i < n; i++)
            if (!bit(c->validity, c->offset + start + i)) ids[i] = missing;
    return PS_ASOF_OK;
}

/* ---------------------------------------------------------------------------------------------------------- times */

int ps_times_ordered(const int64_t *times, int64_t n, int64_t *previous)
{
    if (n == 0) return 1;
    int64_t falls = times[0] < *previous;
    for (int64_t i = 1; i < n;) {
        int64_t end = i + 8192 < n ? i + 8192 : n;
        for (; i < end; i++) falls |= times[i] < times[i - 1];
        if (falls) return 0;
    }
    *previous = times[n - 1];
    return !falls;
}

int64_t ps_times_outside(const int64_t *times, int64_t n, int64_t low, int64_t high)
{
    int64_t any = 0;
    for (int64_t i = 0; i < n; i++) any |= (times[i] < low) | (times[i] > high);
    if (any)
        for (int64_t i = 0; i < n; i++)
            if (times[i] < low || times[i] > high) return i;
    return -1;
}

static inline int64_t later(int64_t a, int64_t b) { return a > b ? a : b; }

int ps_rows_ordered(const ps_feature_rows *rows)
{
    int64_t previous = INT64_MIN;
    for (int64_t s = 0; s < rows->n_segments; s++) {
        const ps_segment *segment = &rows->segments[s];
        if (!rows->cutoff) {
            if (!ps_times_ordered(segment->event, segment->key.length, &previous)) return 0;
            continue;
        }
        for (int64_t i = 0; i < segment->key.length; i++) {
            int64_t at = later(segment->event[i], segment->ingest[i]);
            if (at < previous) return 0;
            previous = at;
        }
    }
    return 1;
}

/* ----------------------------------------------------------------------------------------------------------- sort */

static inline int before(const ps_entry *a, const ps_entry *b)
{
    const __int128 step = (__int128)1 << 32;
    return a->at * step + a->row < b->at * step + b->row;
}

static int in_order(const ps_entry *e, int64_t n)
{
    for (int64_t i = 1; i < n; i++)
        if (before(&e[i], &e[i - 1])) return 0;
    return 1;
}

static void insertion_sort(ps_entry *e, int64_t n)
{
    for (int64_t i = 1; i < n; i++) {
        ps_entry x = e[i];
        int64_t j = i;
        for (; j > 0 && before(&x, &e[j - 1]); j--) e[j] = e[j - 1];
        e[j] = x;
    }
}

static void merge_runs(const ps_entry *a, const ps_entry *a_end, const ps_entry *b, const ps_entry *b_end,
                       ps_entry *out)
{
    while (a < a_end && b < b_end) {
        int64_t second = before(b, a);
        const ps_entry *from = second ? b : a;
        *out++ = *from;
        b += second;
        a += !second;
    }
    memcpy(out, a, (size_t)(a_end - a) * sizeof *a);
    memcpy(out + (a_end - a), b, (size_t)(b_end - b) * sizeof *b);
}

/* At most SMALL_SORT entries; `room` holds as many. */
static void merge_sort(ps_entry *e, int64_t n, ps_entry *room)
{
    for (int64_t i = 0; i < n; i += RUN) insertion_sort(e + i, n - i < RUN ? n - i : RUN);
    ps_entry *from = e, *to = room;
    for (int64_t run = RUN; run < n; run *= 2) {
        for (int64_t i = 0; i < n; i += 2 * run) {
            int64_t middle = i + run < n ? i + run : n, end = i + 2 * run < n ? i + 2 * run : n;
            merge_runs(from + i, from + middle, from + middle, from + end, to + i);
        }
        ps_entry *other = from;
        from = to;
        to = other;
    }
    if (from != e) memcpy(e, from, (size_t)n * sizeof *e);
}

/* In place, by the highest 8 bits in which entries differ (American flag sort: McIlroy, Bostic, McIlroy 1993), then
 * each part again. Every level takes 8 bits off the range, of the times first and then of the row numbers. */
static void flag_sort(ps_entry *e, int64_t n, ps_entry *room)
{
    if (in_order(e, n)) return;
    if (n <= SMALL_SORT) {
        merge_sort(e, n, room);
        return;
    }
    int by_row = 0;
    uint64_t low, high;
#define PLACE(x) (by_row ? (uint64_t)(x).row : (uint64_t)(x).at ^ (uint64_t)1 << 63)
    for (;; by_row = 1) { /* rows differ where times do not */
        low = UINT64_MAX;
        high = 0;
        for (int64_t i = 0; i < n; i++) {
            uint64_t place = PLACE(e[i]);
            low = place < low ? place : low;
            high = place > high ? place : high;
        }
        if (low != high) break;
    }
    int bits = 64 - __builtin_clzll(high - low), shift = bits > 8 ? bits - 8 : 0;
#define DIGIT(x) ((PLACE(x) - low) >> shift)
    int64_t next[256], end[256], begin = 0;
    memset(end, 0, sizeof end);
    for (int64_t i = 0; i < n; i++) end[DIGIT(e[i])]++;
    for (int d = 0; d < 256; d++) {
        next[d] = begin;
        begin = end[d] += begin;
    }
    for (int d = 0; d < 256; d++)
        while (next[d] < end[d]) {
            ps_entry x = e[next[d]];
            for (uint64_t to = DIGIT(x); to != (uint64_t)d; to = DIGIT(x)) {
                ps_entry y = e[next[to]];
                e[next[to]++] = x;
                x = y;
            }
            e[next[d]++] = x;
        }
#undef DIGIT
#undef PLACE
    begin = 0;
    for (int d = 0; d < 256; d++) {
        if (end[d] - begin > 1) flag_sort(e + begin, end[d] - begin, room);
        begin = end[d];
    }
}

void ps_sort_entries(ps_entry *entries, int64_t n)
{
    ps_entry room[SMALL_SORT];
    if (n > 1) flag_sort(entries, n, room);
}

/* ---------------------------------------------------------------------------------------------------------- merge */

typedef struct {
    int64_t event, ingest;
    uint32_t row;
} newest_row;

struct ps_merge {
    const ps_keys *keys;
    const ps_feature_rows *rows;
    int64_t n_keys;
    int64_t segment, next;    /* where the next block starts */
    int64_t seen;             /* the last T */
    uint32_t *last;           /* newest row per id, without ingest times; one more for rows of no id */
    newest_row *newest;       /* with them */
    int at, n;                /* next row of the block, and its rows */
    uint32_t first;           /* number of the block's first row */
    const int64_t *event, *ingest, *available;
    int64_t room[BLOCK];
    uint32_t ids[BLOCK];
};

ps_merge *ps_merge_new(const ps_keys *keys, const ps_feature_rows *rows)
{
    ps_merge *m = calloc(1, sizeof *m);
    if (!m) return NULL;
    m->keys = keys;
    m->rows = rows;
    m->n_keys = keys->count;
    m->seen = INT64_MIN;
    size_t n = (size_t)m->n_keys + 1;
    if (rows->has_ingest) {
        m->newest = malloc(n * sizeof *m->newest);
        if (m->newest)
            for (size_t i = 0; i < n; i++) m->newest[i] = (newest_row){INT64_MIN, INT64_MIN, PS_ASOF_NOT_FOUND};
    } else {
        m->last = malloc(n * sizeof *m->last);
        if (m->last) memset(m->last, 0xff, n * sizeof *m->last);
    }
    if (!m->newest && !m->last) {
        free(m);
        return NULL;
    }
    return m;
}

void ps_merge_free(ps_merge *m)
{
    if (!m) return;
    free(m->last);
    free(m->newest);
    free(m);
}

/* The next block of feature rows: 1, or 0 at the end, or an error. */
static int next_block(ps_merge *m, int64_t *at_row)
{
    const ps_feature_rows *rows = m->rows;
    while (m->segment < rows->n_segments && m->next >= rows->segments[m->segment].key.length) {
        m->segment++;
        m->next = 0;
    }
    m->at = m->n = 0;
    if (m->segment >= rows->n_segments) return 0;
    const ps_segment *s = &rows->segments[m->segment];
    int n = s->key.length - m->next < BLOCK ? (int)(s->key.length - m->next) : BLOCK;
    int code = ps_keys_find(m->keys, &s->key, m->next, n, (uint32_t)m->n_keys, m->ids, at_row);
    if (code) {
        *at_row += s->first;
        return code;
    }
    m->first = (uint32_t)(s->first + m->next);
    m->event = m->available = s->event + m->next;
    if (rows->has_ingest) {
        m->ingest = s->ingest + m->next;
        if (rows->cutoff) {
            for (int i = 0; i < n; i++) m->room[i] = later(m->event[i], m->ingest[i]);
            m->available = m->room;
        }
        for (int i = 0; i < n; i++) __builtin_prefetch(&m->newest[m->ids[i]], 1);
    } else if (m->n_keys > MANY_KEYS) {
        for (int i = 0; i < n; i++) __builtin_prefetch(&m->last[m->ids[i]], 1);
    }
    m->next += n;
    m->n = n;
    return 1;
}

/* Rows of the block that are available at T. They come in row order, so the last of equals stays. */
static inline void take_rows(ps_merge *m, int64_t at_time)
{
    int i = m->at;
    const int n = m->n;
    const int64_t *available = m->available;
    if (m->last) {
        uint32_t *last = m->last;
        const uint32_t *ids = m->ids, first = m->first;
        for (; i < n && available[i] <= at_time; i++) last[ids[i]] = first + (uint32_t)i;
    } else {
        for (; i < n && available[i] <= at_time; i++) {
            newest_row *newest = &m->newest[m->ids[i]];
            int64_t event = m->event[i], ingest = m->ingest[i];
            if (event > newest->event || (event == newest->event && ingest >= newest->ingest))
                *newest = (newest_row){event, ingest, m->first + (uint32_t)i};
        }
    }
    m->at = i;
}

int ps_merge_next(ps_merge *m, const uint32_t *ids, const int64_t *times, const ps_entry *order, int64_t n,
                  uint32_t *found, int64_t *at_row)
{
    if (n == 0) return PS_ASOF_OK;
    if ((order ? order[0].at : times[0]) < m->seen) return PS_ASOF_ORDER;
    int more = 1;
    for (int64_t i = 0; i < n; i++) {
        int64_t spine = order ? (int64_t)order[i].row : i;
        int64_t at_time = order ? order[i].at : times[i];
        take_rows(m, at_time);
        while (UNLIKELY(m->at >= m->n) && more) {
            int code = next_block(m, at_row);
            if (code < 0) return code;
            more = code;
            take_rows(m, at_time);
        }
        uint32_t id = ids[spine];
        uint32_t row = PS_ASOF_NOT_FOUND;
        if (LIKELY(id != PS_ASOF_NO_ID)) row = m->last ? m->last[id] : m->newest[id].row;
        found[spine] = row;
        m->seen = at_time;
    }
    return PS_ASOF_OK;
}

/* ---------------------------------------------------------------------------------------------------------- index */

struct ps_index {
    int64_t n_keys;
    uint32_t *end; /* of each id's entries; they begin where those of the id before end */
    ps_entry *entries;
};

void ps_index_free(ps_index *index)
{
    if (!index) return;
    free(index->end);
    free(index->entries);
    free(index);
}

/* The segment of a row, which is often that of the row before. */
#define LOCATE(SEGMENTS, N, ROW, HINT)                                                                               \
    do {                                                                                                              \
        int64_t row_ = (int64_t)(ROW), into_ = row_ - (SEGMENTS)[HINT].first;                                         \
        if (UNLIKELY((uint64_t)into_ >= (uint64_t)SEGMENT_ROWS((SEGMENTS)[HINT]))) {                                  \
            int64_t low_ = 0, high_ = (N);                                                                            \
            while (high_ - low_ > 1) {                                                                                \
                int64_t middle_ = (low_ + high_) / 2;                                                                 \
                if ((SEGMENTS)[middle_].first <= row_) low_ = middle_;                                                \
                else high_ = middle_;                                                                                 \
            }                                                                                                         \
            HINT = low_;                                                                                              \
        }                                                                                                             \
    } while (0)

/* Every entry of one key gets the best row of those up to it, by (event, ingest, row). */
static void best_so_far(const ps_feature_rows *rows, ps_entry *e, int64_t n)
{
#define SEGMENT_ROWS(s) ((s).key.length)
    newest_row best = {INT64_MIN, INT64_MIN, 0};
    int64_t hint = 0, ahead = 0;
    for (int64_t i = 0; i < n; i++) {
        if (i + LOOK_AHEAD < n) {
            uint32_t row = e[i + LOOK_AHEAD].row;
            LOCATE(rows->segments, rows->n_segments, row, ahead);
            PREFETCH(&rows->segments[ahead].event[row - rows->segments[ahead].first]);
            PREFETCH(&rows->segments[ahead].ingest[row - rows->segments[ahead].first]);
        }
        uint32_t row = e[i].row;
        LOCATE(rows->segments, rows->n_segments, row, hint);
        const ps_segment *s = &rows->segments[hint];
        int64_t event = s->event[row - s->first], ingest = s->ingest[row - s->first];
        int later_row = ingest > best.ingest || (ingest == best.ingest && row >= best.row);
        if (event > best.event || (event == best.event && later_row)) best = (newest_row){event, ingest, row};
        e[i].row = best.row;
    }
#undef SEGMENT_ROWS
}

ps_index *ps_index_new(const ps_keys *keys, const ps_feature_rows *rows, int *error, int64_t *at_row)
{
    int64_t n_keys = keys->count;
    ps_index *index = calloc(1, sizeof *index);
    uint32_t *ids = malloc((size_t)rows->rows * sizeof *ids + 1);
    *error = PS_ASOF_MEMORY;
    if (!index || !ids) goto failed;
    index->n_keys = n_keys;
    index->end = calloc((size_t)n_keys + 1, sizeof *index->end); /* the last counts rows of no id */
    if (!index->end) goto failed;
    for (int64_t s = 0; s < rows->n_segments; s++) {
        const ps_segment *segment = &rows->segments[s];
        for (int64_t start = 0; start < segment->key.length; start += BLOCK) {
            int n = segment->key.length - start < BLOCK ? (int)(segment->key.length - start) : BLOCK;
            uint32_t *block = ids + segment->first + start;
            int code = ps_keys_find(keys, &segment->key, start, n, (uint32_t)n_keys, block, at_row);
            if (code) {
                *error = code;
                *at_row += segment->first;
                goto failed;
            }
            for (int i = 0; i < n; i++) index->end[block[i]]++;
        }
    }
    int64_t kept = rows->rows - index->end[n_keys];
    index->entries = malloc((size_t)kept * sizeof *index->entries + 1);
    if (!index->entries) goto failed;
    uint32_t begin = 0;
    for (int64_t k = 0; k < n_keys; k++) { /* `end` holds where the next row goes, and comes to be the end */
        uint32_t n = index->end[k];
        index->end[k] = begin;
        begin += n;
    }
    for (int64_t s = 0; s < rows->n_segments; s++) {
        const ps_segment *segment = &rows->segments[s];
        const uint32_t *of = ids + segment->first;
        const int64_t n = segment->key.length;
        for (int64_t i = 0; i < n; i++) {
            if (i + LOOK_AHEAD < n && of[i + LOOK_AHEAD] < n_keys)
                __builtin_prefetch(&index->entries[index->end[of[i + LOOK_AHEAD]]], 1);
            if (of[i] >= n_keys) continue;
            int64_t at = rows->cutoff ? later(segment->event[i], segment->ingest[i]) : segment->event[i];
            index->entries[index->end[of[i]]++] = (ps_entry){at, (uint32_t)(segment->first + i)};
        }
    }
    free(ids);
    ps_entry room[SMALL_SORT];
    for (int64_t k = 0; k < n_keys; k++) {
        uint32_t from = k ? index->end[k - 1] : 0;
        int64_t n = index->end[k] - from;
        if (n > 1) flag_sort(index->entries + from, n, room);
        if (n > 1 && rows->has_ingest) best_so_far(rows, index->entries + from, n);
    }
    *error = PS_ASOF_OK;
    return index;
failed:
    free(ids);
    ps_index_free(index);
    return NULL;
}

void ps_index_find(const ps_index *index, const uint32_t *ids, const int64_t *times, int64_t n, uint32_t *found)
{
    const ps_entry *entries = index->entries;
    for (int64_t i = 0; i < n; i++) {
        /* Far ahead the bounds of a key's entries are asked for, nearer the entries that a search reads first. */
        if (i + 2 * LOOK_AHEAD < n && ids[i + 2 * LOOK_AHEAD] != PS_ASOF_NO_ID)
            PREFETCH(&index->end[ids[i + 2 * LOOK_AHEAD]]);
        if (i + LOOK_AHEAD < n && ids[i + LOOK_AHEAD] != PS_ASOF_NO_ID) {
            uint32_t id = ids[i + LOOK_AHEAD], from = id ? index->end[id - 1] : 0, to = index->end[id];
            PREFETCH(&entries[from + (to - from) / 2]);
            PREFETCH(&entries[from + (to - from) / 4]);
            PREFETCH(&entries[from + (to - from) / 4 * 3]);
        }
        uint32_t id = ids[i];
        if (id == PS_ASOF_NO_ID) {
            found[i] = PS_ASOF_NOT_FOUND;
            continue;
        }
        uint32_t from = id ? index->end[id - 1] : 0;
        const ps_entry *base = entries + from;
        int64_t left = index->end[id] - from;
        const int64_t at = times[i];
        while (left > 1) { /* the answer stands in base[-1 .. left - 1) or is base[left - 1] */
            int64_t half = left / 2;
            base = base[half - 1].at <= at ? base + half : base;
            left -= half;
        }
        if (left == 1 && base->at <= at) base++;
        found[i] = base > entries + from ? base[-1].row : PS_ASOF_NOT_FOUND;
    }
}

void ps_apply_ttl(const ps_feature_rows *rows, const int64_t *times, int64_t n, int64_t ttl, uint32_t *found)
{
#define SEGMENT_ROWS(s) ((s).key.length)
    int64_t hint = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t row = found[i];
        if (row >= PS_ASOF_AGED) continue;
        LOCATE(rows->segments, rows->n_segments, row, hint);
        const ps_segment *s = &rows->segments[hint];
        /* T is not before the event time: the difference fits in 64 bits without a sign. */
        if ((uint64_t)times[i] - (uint64_t)s->event[row - s->first] > (uint64_t)ttl) found[i] = PS_ASOF_AGED;
    }
#undef SEGMENT_ROWS
}

/* --------------------------------------------------------------------------------------------------------- gather */

#define SEGMENT_ROWS(s) ((s).length)

static inline int8_t absent_status(uint32_t row) { return row == PS_ASOF_AGED ? PS_OUTSIDE_MAX_AGE : PS_NOT_FOUND; }

static inline int is_nan(uint64_t v, int width)
{
    if (width == 8) return (v & ~((uint64_t)1 << 63)) > 0x7ff0000000000000ULL;
    if (width == 4) return ((uint32_t)v & 0x7fffffffu) > 0x7f800000u;
    return ((uint32_t)v & 0x7fffu) > 0x7c00u;
}

typedef struct {
    uint64_t low, high;
} wide;

/* Rows are read eight at a time, so that validity is written as bytes. READ takes value `at` of segment `s`. */
#define GATHER_ROWS(AHEAD, READ, WRITE, IS_NULL)                                                                     \
    for (int64_t i = 0; i < n; i += 8) {                                                                              \
        int m = n - i < 8 ? (int)(n - i) : 8;                                                                         \
        unsigned valid = 0;                                                                                           \
        AHEAD;                                                                                                        \
        for (int j = 0; j < m; j++) {                                                                                 \
            uint32_t row = found[i + j];                                                                              \
            int8_t status = absent_status(row);                                                                       \
            int present = 0;                                                                                          \
            if (LIKELY(row < PS_ASOF_AGED)) {                                                                         \
                LOCATE(v->segments, v->n_segments, row, hint);                                                        \
                const ps_value_segment *s = &v->segments[hint];                                                       \
                int64_t at = (int64_t)row - s->first + s->offset;                                                     \
                READ;                                                                                                 \
                present = (!s->validity || bit(s->validity, at)) && !(IS_NULL);                                       \
                status = present ? PS_PRESENT : PS_NULL_VALUE;                                                        \
            }                                                                                                         \
            WRITE;                                                                                                    \
            valid |= (unsigned)present << j;                                                                          \
            if (statuses) statuses[i + j] = status;                                                                   \
        }                                                                                                             \
        validity[i >> 3] = (uint8_t)valid;                                                                            \
        nulls += m - __builtin_popcount(valid);                                                                       \
    }

/* Asks for the values of eight rows further on, of which a few may lie in another segment. */
#define ASK_AHEAD(TYPE)                                                                                              \
    for (int64_t k = i + LOOK_AHEAD; k < i + LOOK_AHEAD + 8 && i + LOOK_AHEAD + 8 <= n; k++)                          \
    PREFETCH((const TYPE *)v->segments[hint].values + (found[k] - v->segments[hint].first + v->segments[hint].offset))

#define GATHER(NAME, TYPE, IS_NULL)                                                                                  \
    static int64_t NAME(const ps_values *v, const uint32_t *found, int64_t n, TYPE *out, uint8_t *validity,           \
                        int8_t *statuses)                                                                             \
    {                                                                                                                 \
        static const TYPE nothing;                                                                                    \
        int64_t nulls = 0, hint = 0;                                                                                  \
        TYPE x = nothing;                                                                                             \
        GATHER_ROWS(ASK_AHEAD(TYPE), x = ((const TYPE *)s->values)[at], out[i + j] = present ? x : nothing, IS_NULL)  \
        return nulls;                                                                                                 \
    }

GATHER(gather_1, uint8_t, 0)
GATHER(gather_2, uint16_t, v->nan && is_nan(x, 2))
GATHER(gather_4, uint32_t, v->nan && is_nan(x, 4))
GATHER(gather_8, uint64_t, v->nan && is_nan(x, 8))
GATHER(gather_16, wide, 0)

static int64_t gather_bits(const ps_values *v, const uint32_t *found, int64_t n, uint8_t *out, uint8_t *validity,
                           int8_t *statuses)
{
    int64_t nulls = 0, hint = 0;
    memset(out, 0, (size_t)((n + 7) / 8));
    int x = 0;
    GATHER_ROWS(, x = bit(s->values, at), if (present) out[i >> 3] |= (uint8_t)(x << j), 0)
    return nulls;
}

int64_t ps_gather(const ps_values *values, const uint32_t *found, int64_t n, void *out, uint8_t *validity,
                  int8_t *statuses)
{
    switch (values->width) {
    case 0: return gather_bits(values, found, n, out, validity, statuses);
    case 1: return gather_1(values, found, n, out, validity, statuses);
    case 2: return gather_2(values, found, n, out, validity, statuses);
    case 4: return gather_4(values, found, n, out, validity, statuses);
    case 8: return gather_8(values, found, n, out, validity, statuses);
    default: return gather_16(values, found, n, out, validity, statuses);
    }
}

/* Where value `at` of a text column lies; 0 if that is outside its buffer. */
static inline int text_range(const ps_value_segment *s, int width, int64_t at, int64_t *from, int64_t *to)
{
    if (width == -4) {
        *from = ((const int32_t *)s->values)[at];
        *to = ((const int32_t *)s->values)[at + 1];
    } else {
        *from = ((const int64_t *)s->values)[at];
        *to = ((const int64_t *)s->values)[at + 1];
    }
    return *from >= 0 && *from <= *to && *to <= s->text_bytes;
}

int64_t ps_gather_offsets(const ps_values *v, const uint32_t *found, int64_t n, int64_t *offsets, uint8_t *validity,
                          int8_t *statuses)
{
    int64_t nulls = 0, hint = 0, total = 0, from = 0, to = 0;
    int damaged = 0;
    offsets[0] = 0;
    GATHER_ROWS(, damaged |= !text_range(s, v->width, at, &from, &to), total += present ? to - from : 0;
                offsets[i + j + 1] = total, 0)
    return damaged ? PS_ASOF_DAMAGED : nulls;
}

void ps_gather_text(const ps_values *v, const uint32_t *found, int64_t n, const int64_t *offsets, uint8_t *out)
{
    int64_t hint = 0, from = 0, to = 0;
    for (int64_t i = 0; i < n; i++) {
        if (offsets[i] == offsets[i + 1]) continue;
        uint32_t row = found[i];
        LOCATE(v->segments, v->n_segments, row, hint);
        const ps_value_segment *s = &v->segments[hint];
        text_range(s, v->width, (int64_t)row - s->first + s->offset, &from, &to);
        memcpy(out + offsets[i], s->text + from, (size_t)(to - from));
    }
}
