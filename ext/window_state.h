/* window_state.h (hot path): exact window state per entity; the C interface that the engine core calls.
 *
 * A ps_store holds the state of one (source event type, entity): key -> blob, shared by all views of that source and
 * entity. Everything lives in one mapping and refers by offsets from its base, the hash table included, so the mapping
 * can be copied to another address and read on. What must stay true: a read at (T, K) depends only on the multiset of
 * events applied so far with event time <= T, and on their order S6 for first and last; never on arrival or history.
 *
 * Words. entity: one key. blob: its state: header, tails, cells, and a ring of chunks with its events in event-time
 * order (equal times in arrival order). cell: one (column, where) pair; holds what the events that match it add up to.
 * tail: one distinct left edge (length, closed); a cursor into the ring at the first event inside. pair: a (cell, tail)
 * that some output needs, or (cell, Lifetime). lane: exact sums of one cell: the total of everything ever applied, and
 * per tail what has left the window on the left; the window is total - evicted, rounded once on read.
 *
 * Costs. An in-order event adds to one total per cell, and each tail passes each event once. Min, max and first keep
 * their winner per pair with its event time and look again only when it leaves: over at most one chunk at each end and
 * one summary per chunk between. A read at a T before the newest event walks the events after T. A late event is
 * inserted into its chunk. Reads allocate nothing in the mapping and cannot fail half-way.
 *
 * Memory (tested): an entity costs 120 bytes of header with a key of up to 24 bytes, 24 per tail, 8 + 4 per tail for
 * each cell (8 for count() without where), 8 + 16 x (1 + tails) per sum lane (8 + 32 x (1 + tails) for squares), 16
 * per min, max or first pair and per cell with last; 16 to 32 bytes of table; and a first chunk of at least 2 events
 * and 80 bytes: 1m/1h/24h x count/sum/mean/max on one column is 352 + 80 + 16 to 32. An event costs 8 bytes plus 8 per
 * column, 8 more with any where=, 8 more with any integer, bool or timestamp column; chunks double up to 4 KiB. An
 * exact distinct_count keeps 16 + 4 per tail bytes per value at most 3/4 full; with Lifetime it keeps every value for
 * ever.
 */
#ifndef PENSTOCK_WINDOW_STATE_H
#define PENSTOCK_WINDOW_STATE_H

#include "row.h"

typedef struct ps_store ps_store;

typedef struct {
    const char *str; /* UTF-8, not terminated; unused when is_int */
    int64_t i;
    uint32_t len;
    uint8_t is_int;
} ps_key;

/* values[c] and status[c] (PS_PRESENT or PS_NULL_VALUE) per column of the layout; bit k of where_mask: predicate k is
 * TRUE. A float64 NaN is null; an infinity is refused. String slots refer into arena. */
typedef struct {
    int64_t event_time, ingest_time, log_id, sequence;
    const ps_slot *values;
    const uint8_t *status;
    uint64_t where_mask;
    const char *arena;
} ps_event;

/* Grows with realloc; the caller frees data. */
typedef struct {
    char *data;
    uint32_t used, capacity;
} ps_arena;

typedef uint64_t ps_handle; /* offset of a blob in the mapping; 0 = none; valid until sweep or erase releases it */

typedef struct {
    uint64_t entities;
    uint64_t events;      /* held in rings */
    uint64_t applied;     /* ever */
    uint64_t bytes_used;  /* allocated and not free */
    uint64_t bytes_mapped;/* of the mapping, ever touched */
    uint64_t strings;     /* interned */
    int64_t watermark;    /* largest event time applied or swept to; PS_TIME_MIN - 1 when none */
} ps_store_stats;

enum ps_function {
    PS_COUNT = 0,      /* events (column ignored, -1) */
    PS_COUNT_COLUMN,   /* non-null values */
    PS_SUM,
    PS_MEAN,
    PS_MIN,
    PS_MAX,
    PS_VAR_SAMP,
    PS_VAR_POP,
    PS_STDDEV_SAMP,
    PS_STDDEV_POP,
    PS_FIRST,          /* oldest non-null value */
    PS_LAST,           /* newest non-null value */
    PS_DISTINCT_COUNT, /* of non-null values; -0.0 equals 0.0 */
    PS_N_FUNCTIONS,
};

enum ps_closed { PS_CLOSED_RIGHT = 0 /* T-W < t <= T */, PS_CLOSED_BOTH = 1, PS_CLOSED_LEFT = 2 /* T-W <= t < T */ };

#define PS_LIFETIME (-1) /* length of a window without a left edge */
#define PS_NO_TTL (-1)
#define PS_NO_RETENTION (-1)

/* Bounds of event times and as_of; lengths, lateness and ttl lie within PS_TIME_MAX / 4: differences never overflow. */
#define PS_TIME_MAX ((int64_t)1 << 61)
#define PS_TIME_MIN (-PS_TIME_MAX)

typedef struct {
    uint8_t function; /* enum ps_function */
    uint8_t closed;   /* enum ps_closed */
    int16_t column;   /* -1: none */
    int16_t where;    /* -1: none */
    int64_t length;   /* microseconds, 0 only if closed is both: [T, T]; PS_LIFETIME */
    int64_t ttl;      /* microseconds; PS_NO_TTL; first and last only: how old a value may be. It releases nothing */
} ps_output;

typedef struct {
    const uint8_t *columns; /* enum ps_type */
    uint32_t n_columns;
    const ps_output *outputs;
    uint32_t n_outputs;
    const uint32_t *groups; /* outputs per group, in order; they add up to n_outputs */
    uint32_t n_groups;
    uint32_t n_where;
    int64_t lateness;
    int64_t retention;   /* of Lifetime, microseconds, not shorter than any window; PS_NO_RETENTION */
    uint64_t fingerprint;
    uint64_t max_bytes; /* of the mapping; 0: 64 GiB, the most that fits */
} ps_layout;

enum ps_store_error {
    PS_STORE_OK = 0,
    PS_STORE_MEMORY,   /* max_bytes reached, or the system gives no more */
    PS_STORE_TIME,     /* event time or as_of outside PS_TIME_MIN..PS_TIME_MAX */
    PS_STORE_INFINITY, /* an infinity in a float64 column */
    PS_STORE_FULL,     /* 2^40 events applied to one entity */
    PS_STORE_GROUP,    /* no such group */
    PS_STORE_HANDLE,   /* apply to handle 0 */
    PS_STORE_LAYOUT_COLUMN,
    PS_STORE_LAYOUT_TYPE,
    PS_STORE_LAYOUT_FUNCTION,
    PS_STORE_LAYOUT_WHERE,
    PS_STORE_LAYOUT_WINDOW,
    PS_STORE_LAYOUT_TTL,
    PS_STORE_LAYOUT_GROUPS,
    PS_STORE_LAYOUT_LATENESS,
    PS_STORE_LAYOUT_RETENTION,
    PS_STORE_LAYOUT_SIZE,
    PS_STORE_DUMP_FORMAT,
    PS_STORE_DUMP_UNFIT,
    PS_STORE_DUMP_FINGERPRINT,
    PS_STORE_DUMP_SIZE,
    PS_STORE_DUMP_HEAD,
};

typedef struct {
    uint64_t (*hash)(const ps_key *);
    void (*prefetch)(const ps_store *, uint64_t hash);      /* the bucket */
    void (*prefetch_blob)(const ps_store *, uint64_t hash); /* the first blob of the bucket; after prefetch */
    ps_handle (*find)(ps_store *, const ps_key *, uint64_t hash);
    ps_handle (*find_or_create)(ps_store *, const ps_key *, uint64_t hash); /* 0: out of memory */
    /* 0, or an error code and nothing has changed. Lateness and duplicates are the caller's to judge. */
    int (*apply)(ps_store *, ps_handle, const ps_event *);
    /* The outputs of one group, in order, as of as_of. Before watermark - lateness state no longer holds what they need:
     * then, and where a window begins before what miss_before said, they are null and INVALID. A sum, mean or variance
     * beyond the double range is INVALID too. An entity is known by an own event within the group's reach (its longest
     * window, or the retention of Lifetime) before as_of: an empty window is then NULL_VALUE, else NOT_FOUND.
     * extra: NULL, or one event that counts as applied now, and leaves no trace. handle 0: an unknown entity.
     * Returns 0 or an error code (then out and status are undefined). */
    int (*read)(ps_store *, ps_handle, uint32_t group, int64_t as_of, const ps_event *extra, ps_slot *out,
                uint8_t *status, ps_arena *strings);
    uint64_t (*version)(const ps_store *, ps_handle); /* events ever applied; 0 for handle 0 */
    int (*sweep)(ps_store *, int64_t watermark, uint32_t max_entities); /* entities released */
    void (*stats)(const ps_store *, ps_store_stats *);
    /* The last applied event's place in the log. */
    void (*log_position)(const ps_store *, ps_handle, int64_t *log_id, int64_t *sequence);
    /* Takes back find_or_create of an entity that no event was applied to; does nothing otherwise. */
    void (*forget_unused)(ps_store *, ps_handle);
    /* Events before this time may never have come here (history that nobody has any more). */
    void (*miss_before)(ps_store *, int64_t time);
    /* Memory for one apply of this event: after 0 it does not fail for want of memory. Or an error code, as apply. */
    int (*reserve)(ps_store *, ps_handle, const ps_event *);
    /* Grow by small pages from now on: steadier, a little slower; large ones suit replay. A load leaves it in force. */
    void (*small_pages)(ps_store *);
    /* Forgets one entity altogether: everything it holds is given back and overwritten with zeros. 0: unknown key.
     * (Memory that it gave back before, as its ring grew or slid, is overwritten only as it is used again.) */
    int (*erase)(ps_store *, const ps_key *, uint64_t hash);
    /* The entity after this one, 0 at the end; 0 gives the first. In no particular order. */
    ps_handle (*next)(const ps_store *, ps_handle);
    /* The entity's key; its text is valid until the next apply, find_or_create, sweep or erase. */
    void (*key)(const ps_store *, ps_handle, ps_key *);
    /* As ps_store_bytes; behind the size up to the next multiple of 4,096 lie zeros that may be read. */
    const void *(*bytes)(const ps_store *, uint64_t *size);
    /* Loading without a second copy: begin gives size bytes of fresh memory, all zeros (readable and writable up to the
     * next multiple of 4,096); the caller fills it with what bytes gave for the same layout; commit checks its header
     * and makes it the contents. The contents stay as they are until commit returns 0; any error ends the load. */
    int (*begin_load)(ps_store *, uint64_t size, void **at);
    int (*commit_load)(ps_store *, uint64_t size);
    void (*cancel_load)(ps_store *);
    /* Whether what the caller has filled in is of format 1 and of a layout that format 1 could damage, or whose ttl
     * released entities: commit would refuse it, and it is to be built anew. */
    int (*load_is_unfit)(const ps_store *);
} ps_store_api;

const ps_store_api *ps_store_get_api(void);
/* NULL and *error (and *at: the output or column it is about) on a wrong layout or without memory. */
ps_store *ps_store_create(const ps_layout *layout, int *error, uint32_t *at);
void ps_store_free(ps_store *);
/* The mapping's used bytes; valid until the next apply, find_or_create or sweep. */
const void *ps_store_bytes(const ps_store *, uint64_t *size);
/* Replaces the contents with bytes that ps_store_bytes gave for the same layout. */
int ps_store_load(ps_store *, const void *bytes, uint64_t size);
const char *ps_store_error_text(int code);
/* The sizes that an entity's only chunk grows through, the first to the full one, for records of `stride` words and so
 * many min and max of cells: a pure function, for tests. Returns how many there are; writes `most` at the most. */
typedef struct {
    uint32_t bytes, head, capacity, full;
} ps_chunk_size;
uint32_t ps_chunk_growth(uint32_t stride, uint32_t summaries, ps_chunk_size *out, uint32_t most);
/* Whether stores of format 1 with such records may hold overwritten memory: then they must be built anew. */
int ps_format_1_damaged(uint32_t stride, uint32_t summaries);
/* The type of an output's slot (enum ps_type). */
int ps_output_type(const ps_layout *, uint32_t output);

#endif
