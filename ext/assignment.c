/* assignment.c (hot path): unit id -> arm, see split.h. No allocation, no branch on the vendor: only on the hash and on
 * whether there is a coverage hash. One unit and a batch must give the same arm.
 */
#include "split.h"

static inline int arm_of(const ps_experiment *e, uint64_t hash) {
    uint32_t k = 0, n = e->n_bounds;
    if (n <= 16) {
        for (uint32_t i = 0; i < n; i++) k += e->bounds[i] <= hash;
    } else {
        uint32_t high = n;
        while (k < high) {
            uint32_t middle = (k + high) / 2;
            if (e->bounds[middle] <= hash)
                k = middle + 1;
            else
                high = middle;
        }
    }
    return e->arms[k];
}

static int assign(const ps_experiment *e, const char *unit, size_t len) {
    if (len == 0) return -1;
    if (e->has_cover && ps_hash(&e->cover, unit, len) >= e->cover_bound) return -1;
    return arm_of(e, ps_hash(&e->split, unit, len));
}

static int assign_int(const ps_experiment *e, int64_t unit) {
    char text[20];
    return assign(e, text, ps_decimal(unit, text));
}

static void assign_four(const ps_experiment *e, const char *const unit[4], const size_t len[4], int16_t out[4]) {
    uint64_t hash[4], cover[4];
    ps_hash_fnv_x4(&e->split, unit, len, hash);
    if (e->has_cover) ps_hash_fnv_x4(&e->cover, unit, len, cover);
    for (int k = 0; k < 4; k++) {
        int in = len[k] != 0 && (!e->has_cover || cover[k] < e->cover_bound);
        out[k] = (int16_t)(in ? arm_of(e, hash[k]) : -1);
    }
}

static inline int is_fnv(const ps_experiment *e) { return e->split.algorithm <= PS_FNV1A_32_TWICE; }

static void assign_batch(const ps_experiment *e, const char *data, const int32_t *offsets, size_t n, int16_t *out) {
    size_t i = 0;
    if (is_fnv(e)) {
        for (; i + 4 <= n; i += 4) {
            const char *unit[4];
            size_t len[4];
            for (int k = 0; k < 4; k++) {
                unit[k] = data + offsets[i + k];
                len[k] = (size_t)(offsets[i + k + 1] - offsets[i + k]);
            }
            assign_four(e, unit, len, out + i);
        }
    }
    for (; i < n; i++)
        out[i] = (int16_t)assign(e, data + offsets[i], (size_t)(offsets[i + 1] - offsets[i]));
}

static void assign_batch_int(const ps_experiment *e, const int64_t *units, size_t n, int16_t *out) {
    size_t i = 0;
    if (is_fnv(e)) {
        for (; i + 4 <= n; i += 4) {
            char text[4][20];
            const char *unit[4];
            size_t len[4];
            for (int k = 0; k < 4; k++) {
                unit[k] = text[k];
                len[k] = ps_decimal(units[i + k], text[k]);
            }
            assign_four(e, unit, len, out + i);
        }
    }
    for (; i < n; i++) out[i] = (int16_t)assign_int(e, units[i]);
}

const ps_split_api ps_split = {assign, assign_int, assign_batch, assign_batch_int};
