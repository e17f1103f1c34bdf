/* id_table.h (hot path): the event ids of one event type that a retry may still send; the C interface for the core.
 *
 * An entry says: the event with this id was seen, by this pipeline, its record stands at this position, and whether
 * that is a decision. What must stay true: an entry whose position is not below what was forgotten is found, unless the
 * limit was reached; no call takes longer because the table is large.
 *
 * Words. ring: entries of 23 bytes in the order they were put, in a stretch of addresses that is walked round: pages
 * ahead come as they are written, pages behind go back to the system. index: buckets of one cache line, twelve entries
 * by their number in the ring and one byte of hash each; linear hashing (Litwin 1980; one bucket more at a time) adds
 * and takes away buckets; spare: a line that a full bucket is continued in. Spares are numbered without a gap, so that
 * these pages go back too. hole: a place in the ring whose entry was put again. floor: positions below are forgotten.
 *
 * Forgetting raises the floor, at once; the hand then takes what lies below it from the ring's old end, a few entries
 * with each put. So puts come about in the order of positions: one out of order is out of sight in time, but its memory
 * waits for its neighbours in the ring.
 *
 * Memory: 23 bytes in the ring and 64 / 12 over the load in the index, which is held between 0.68 and 0.72: 30.5 bytes
 * an entry, everything counted, from 50,000 on; at 10,000, where a page more or less counts, up to 32.
 */
#ifndef PENSTOCK_ID_TABLE_H
#define PENSTOCK_ID_TABLE_H

#include "siphash.h"

#define PS_IDS_PIPELINES 32767           /* pipelines are 0..PS_IDS_PIPELINES - 1 */
#define PS_IDS_POSITIONS ((uint64_t)1 << 48) /* positions are below this */
#define PS_IDS_LEAST ((uint64_t)256 << 10)   /* the least limit */
#define PS_IDS_MOST ((uint64_t)64 << 30)     /* the largest, and what no limit means */

typedef struct ps_ids ps_ids;

typedef struct {
    uint64_t position;
    uint16_t pipeline;
    uint8_t has_decision;
} ps_id_entry;

typedef struct {
    uint64_t ids;             /* entries that take memory; what is forgotten counts until the hand has passed */
    uint64_t bytes;           /* of memory, all of it */
    uint64_t forgotten;       /* entries, as the hand passes */
    uint64_t forgotten_early; /* entries that went because of the limit */
    uint64_t limit;           /* bytes */
    uint64_t floor;           /* positions below are forgotten */
} ps_ids_stats;

enum ps_id_found { PS_ID_UNKNOWN = 0, PS_ID_SEEN = 1 /* but not decided by this pipeline */, PS_ID_DECIDED = 2 };

typedef struct {
    ps_hash128 (*hash_text)(const ps_ids *, const char *text, uint64_t n); /* UTF-8; any n */
    ps_hash128 (*hash_int)(const ps_ids *, int64_t);                       /* never equal to a text's */
    void (*prefetch)(const ps_ids *, const ps_hash128 *);
    /* enum ps_id_found. entry: the pipeline's decision, or (SEEN) its entry without one, or any other entry. */
    int (*find)(const ps_ids *, const ps_hash128 *, uint32_t pipeline, ps_id_entry *entry);
    /* How many entries the id has; the first n of them go to entries, in no particular order. */
    int (*find_all)(const ps_ids *, const ps_hash128 *, ps_id_entry *entries, int n);
    /* A new entry, or what the entry of the same id and pipeline says from now on. Never fails: at the limit the oldest
     * entries go. A position below the floor is forgotten already. */
    void (*put)(ps_ids *, const ps_hash128 *, uint32_t pipeline, uint64_t position, int has_decision);
    void (*forget_before)(ps_ids *, uint64_t position);
    /* At most n entries that are forgotten give their memory back; how many did. Each put does this with four. */
    uint32_t (*tend)(ps_ids *, uint32_t n);
    /* The record at `position`, the next that is put, leaves this watermark behind. What was put under a watermark w is
     * forgotten once the watermark is more than w + remember, and at the latest at w + remember * 17 / 16. A watermark
     * that is set back (an operator's command) is taken as that of everything before. */
    void (*advance)(ps_ids *, int64_t watermark, uint64_t position, int64_t remember);
    void (*stats)(const ps_ids *, ps_ids_stats *);
} ps_ids_api;

const ps_ids_api *ps_ids_get_api(void);

/* limit: bytes of memory, PS_IDS_LEAST to PS_IDS_MOST; 0: PS_IDS_MOST. NULL: the system gives no memory. */
ps_ids *ps_ids_create(const uint64_t seed[2], uint64_t limit);
void ps_ids_free(ps_ids *);
/* For tests: NULL, or what is wrong in it. Takes time in proportion to its size. */
const char *ps_ids_check(const ps_ids *);

/* First decisions where there is no log: the newest ones that fit into `limit` bytes. Each takes 8 bytes beside its
 * own, rounded up to a multiple of 8. Memory comes as it fills. */
typedef struct ps_keep ps_keep;

#define PS_KEEP_LEAST ((uint64_t)64 << 10)

typedef struct {
    uint64_t kept;   /* ever */
    uint64_t bytes;  /* of memory */
    uint64_t limit;  /* bytes */
    uint64_t oldest; /* positions below are gone; 0: none is */
} ps_keep_stats;

typedef struct {
    /* The bytes' position: above 0, larger each time, below PS_IDS_POSITIONS for 2 PiB. Bytes that do not fit at all,
     * or for which the system has no memory, get a position where nothing stands. */
    uint64_t (*put)(ps_keep *, const void *bytes, uint64_t n);
    const void *(*get)(const ps_keep *, uint64_t position, uint64_t *n); /* valid until the next put; NULL: gone */
    uint64_t (*next)(const ps_keep *); /* positions so far are below it, and those that come are not */
    void (*stats)(const ps_keep *, ps_keep_stats *);
} ps_keep_api;

const ps_keep_api *ps_keep_get_api(void);

/* limit: bytes, PS_KEEP_LEAST to PS_IDS_MOST. NULL: the system gives no memory. */
ps_keep *ps_keep_create(uint64_t limit);
void ps_keep_free(ps_keep *);

#endif
