/* split.h (hot path): an experiment compiled to integer ranges over a hash, and how other extensions assign with it.
 *
 * A unit is in the experiment if its coverage hash is below cover_bound (no coverage hash: always), and then has the
 * arm of the segment that its split hash falls in. A segment may have arm -1: a hole, not in the experiment. All
 * comparisons are of integers; that they equal the vendor's own formula is settled when the segments are cut
 * (experiments/assignment.py).
 */
#ifndef PENSTOCK_SPLIT_H
#define PENSTOCK_SPLIT_H

#include "hashes.h"

typedef struct {
    ps_hash_key split;
    ps_hash_key cover;
    int has_cover;
    uint64_t cover_bound;
    uint32_t n_bounds;  /* segments - 1 */
    uint64_t *bounds;   /* ascending: segment k holds bounds[k-1] <= hash < bounds[k] */
    int16_t *arms;      /* arm of each segment, -1 for a hole */
} ps_experiment;

typedef struct {
    /* The arm's index, or -1: not in the experiment. An empty unit is never in. Pure, any thread, no GIL. */
    int (*assign)(const ps_experiment *, const char *unit, size_t len);
    /* An integer unit hashes as its decimal text. */
    int (*assign_int)(const ps_experiment *, int64_t unit);
    /* n units, unit k in data[offsets[k]:offsets[k+1]] (Arrow's string layout); out gets n arms. */
    void (*assign_batch)(const ps_experiment *, const char *data, const int32_t *offsets, size_t n, int16_t *out);
    void (*assign_batch_int)(const ps_experiment *, const int64_t *units, size_t n, int16_t *out);
} ps_split_api;

extern const ps_split_api ps_split;

#endif
