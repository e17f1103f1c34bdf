/* model.h (hot path): what every model runtime offers to the engine.
 *
 * A runtime fills in one ps_model. predict() may be called from any thread, without the GIL, many calls at once; it
 * must not touch Python objects unless it takes the GIL itself.
 */
#ifndef PENSTOCK_MODEL_H
#define PENSTOCK_MODEL_H

#include <stdint.h>
#include <stddef.h>

typedef struct ps_model ps_model;
struct ps_model {
    /* x: rows x n_inputs doubles, row-major, stride doubles apart; NaN is missing.
     * out: rows x n_outputs doubles, row-major, contiguous; the transformed scores.
     * Returns 0, or a non-zero code whose text the runtime's Python object gives. */
    int (*predict)(const ps_model *self, const double *x, size_t rows, size_t stride, double *out);
    void *state;
    uint32_t n_inputs;
    uint32_t n_outputs;
};

#endif
