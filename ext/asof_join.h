/* asof_join.h (hot path): for every row of a spine, the newest feature row of its key that it may see.
 *
 * What must stay true: whatever the order of the rows and the path taken, the row found is the greatest by (event time,
 * ingest time, row number) among those with event time <= T and, with a cut-off, ingest time <= T (S5, S6). Nothing is
 * read outside the buffers that the columns describe, whatever the buffers hold.
 *
 * Words: a feature row is available from max(event time, ingest time) with a cut-off, else from its event time. A key
 * has an id, its place in a ps_keys; keys are added before the join and only looked up in it. A segment is one chunk of
 * a table, its columns cut alike. Rows are numbered through all segments.
 *
 * Two paths:
 * merge  feature rows come in the order they become available, spine rows in order of T (or are visited in it): one
 *        pass over both, holding the newest row per id. It can be called again for later spine rows.
 * index  any order: feature rows grouped by id and sorted by when they become available, 12 bytes each; a spine row is
 *        a binary search. With ingest times each entry names the best row of those up to it.
 */
#ifndef PENSTOCK_ASOF_JOIN_H
#define PENSTOCK_ASOF_JOIN_H

#include <stddef.h>
#include <stdint.h>

#define PS_ASOF_NO_ID UINT32_MAX            /* a null key, or one that was never added */
#define PS_ASOF_NOT_FOUND UINT32_MAX        /* in place of a row number */
#define PS_ASOF_AGED (UINT32_MAX - 1)       /* a row was found, older than the ttl */
#define PS_ASOF_MOST_ROWS (UINT32_MAX - 2)  /* in one table */

/* Errors. PS_ASOF_DAMAGED: offsets or dictionary indices lie outside their buffers. */
enum { PS_ASOF_OK = 0, PS_ASOF_MEMORY = -1, PS_ASOF_DAMAGED = -2, PS_ASOF_BEYOND_INT64 = -3, PS_ASOF_ORDER = -4 };

/* Integers are named by their width and sign; text by the width of its offsets. DICTIONARY | integer: indices. */
enum ps_asof_kind {
    PS_ASOF_INT8 = 0, PS_ASOF_INT16, PS_ASOF_INT32, PS_ASOF_INT64,
    PS_ASOF_UINT8, PS_ASOF_UINT16, PS_ASOF_UINT32, PS_ASOF_UINT64,
    PS_ASOF_TEXT32, PS_ASOF_TEXT64,
    PS_ASOF_DICTIONARY = 16,
};

/* A column of keys, as in Arrow. Buffers hold at least offset + length values (one more for the offsets of text). */
typedef struct {
    int kind;
    int64_t length, offset;
    const uint8_t *validity; /* bits, or NULL: no nulls */
    const void *values;      /* integers, indices, or the offsets of text */
    const uint8_t *text;
    int64_t text_bytes;
    const uint32_t *ids;     /* DICTIONARY: the id of each of its values */
    int64_t n_ids;
} ps_key_column;

typedef struct ps_keys ps_keys;

ps_keys *ps_keys_new(void);
void ps_keys_free(ps_keys *keys);
int64_t ps_keys_count(const ps_keys *keys);
/* Adds the column's keys; ids, if not NULL, gets one id per row, PS_ASOF_NO_ID for null. All columns of one ps_keys are
 * integers, or all are text. `at_row` gets the row of an error. */
int ps_keys_add(ps_keys *keys, const ps_key_column *column, uint32_t *ids, int64_t *at_row);
/* Ids of n rows from `start`; `missing` for nulls and keys never added. n is at most PS_ASOF_BLOCK. */
#define PS_ASOF_BLOCK 256
int ps_keys_find(const ps_keys *keys, const ps_key_column *column, int64_t start, int n, uint32_t missing,
                 uint32_t *ids, int64_t *at_row);

typedef struct {
    ps_key_column key;
    const int64_t *event;  /* microseconds */
    const int64_t *ingest; /* or NULL */
    int64_t first;         /* number of its first row; key.length rows follow */
} ps_segment;

typedef struct {
    const ps_segment *segments;
    int64_t n_segments, rows;
    int has_ingest; /* all segments have ingest times */
    int cutoff;     /* they hide rows: a row is available from max(event, ingest) */
} ps_feature_rows;

/* Times of n rows: whether they never fall (going on from *previous), and the first outside [low, high], or -1. */
int ps_times_ordered(const int64_t *times, int64_t n, int64_t *previous);
int64_t ps_times_outside(const int64_t *times, int64_t n, int64_t low, int64_t high);
/* Whether rows come in the order in which they become available. */
int ps_rows_ordered(const ps_feature_rows *rows);

/* The order of n times, stable. 12 bytes each, sorted in place; the row of entry i is order[i].row. */
#pragma pack(push, 4)
typedef struct {
    int64_t at;
    uint32_t row;
} ps_entry;
#pragma pack(pop)
void ps_sort_entries(ps_entry *entries, int64_t n);

typedef struct ps_merge ps_merge;
ps_merge *ps_merge_new(const ps_keys *keys, const ps_feature_rows *rows);
void ps_merge_free(ps_merge *merge);
/* Goes on to n spine rows, visited as order[i].row if order is not NULL. found[i] gets a row number or
 * PS_ASOF_NOT_FOUND. PS_ASOF_ORDER where the first T is before one that was seen already; nothing has changed then. */
int ps_merge_next(ps_merge *merge, const uint32_t *ids, const int64_t *times, const ps_entry *order, int64_t n,
                  uint32_t *found, int64_t *at_row);

typedef struct ps_index ps_index;
/* NULL, with *error set, if memory ends or a column is damaged. */
ps_index *ps_index_new(const ps_keys *keys, const ps_feature_rows *rows, int *error, int64_t *at_row);
void ps_index_free(ps_index *index);
void ps_index_find(const ps_index *index, const uint32_t *ids, const int64_t *times, int64_t n, uint32_t *found);

/* PS_ASOF_AGED in place of rows whose event time is more than ttl before T (S9). */
void ps_apply_ttl(const ps_feature_rows *rows, const int64_t *times, int64_t n, int64_t ttl, uint32_t *found);

/* A chunk of a feature's values, as in Arrow. */
typedef struct {
    int64_t first, length, offset;
    const uint8_t *validity;
    const void *values; /* of fixed width; bits; or offsets of text */
    const uint8_t *text;
    int64_t text_bytes;
} ps_value_segment;

typedef struct {
    const ps_value_segment *segments;
    int64_t n_segments;
    int width; /* bytes, a power of two up to 16; 0: bits; -4, -8: text with offsets of that width */
    int nan;   /* 2, 4, 8: a float of that width, NaN is null (S11); 0: not */
} ps_values;

/* Values of found[0..n), into `out` (n * width bytes, or n bits), `validity` (bits) and `statuses` (n bytes, S17, or
 * NULL). Returns how many are null. Bits of out and validity start at a byte and are written up to its end. */
int64_t ps_gather(const ps_values *values, const uint32_t *found, int64_t n, void *out, uint8_t *validity,
                  int8_t *statuses);
/* Text: lengths first, then bytes. offsets: n + 1. Returns how many are null, or PS_ASOF_DAMAGED. */
int64_t ps_gather_offsets(const ps_values *values, const uint32_t *found, int64_t n, int64_t *offsets,
                          uint8_t *validity, int8_t *statuses);
void ps_gather_text(const ps_values *values, const uint32_t *found, int64_t n, const int64_t *offsets, uint8_t *out);

#endif
