/* tree_kernel.h (hot path): scoring of tree ensembles, bit for bit as the library that trained them.
 *
 * A form (ps_trees_form) is the neutral description that every loader produces; ps_trees_build checks it and lays it
 * out for speed; ps_trees_predict scores rows from any thread, without the GIL and without allocating for usual sizes.
 * The one thing that must stay true: layout and SIMD variant never change a bit of a score.
 */
#ifndef PENSTOCK_TREE_KERNEL_H
#define PENSTOCK_TREE_KERNEL_H

#include <stddef.h>
#include <stdint.h>

#include "model.h"

/* How leaf weights become scores. Accumulation runs over trees in order, in float when accumulate32 is set. */
enum ps_trees_aggregate { PS_TREES_SUM = 0, PS_TREES_AVERAGE = 1, PS_TREES_MIN = 2, PS_TREES_MAX = 3 };

/* What turns raw scores into outputs. The F32 ones compute in float, as XGBoost and ONNX Runtime do. */
enum ps_trees_transform {
    PS_TREES_IDENTITY = 0,
    PS_TREES_SIGMOID = 1,       /* 1 / (1 + exp(-slope * raw)), double */
    PS_TREES_SOFTMAX = 2,       /* double */
    PS_TREES_EXP = 3,           /* double */
    PS_TREES_LOG1P_EXP = 4,     /* log(1 + exp(raw)), double */
    PS_TREES_SIGNED_SQUARE = 5, /* sign(raw) * raw * raw, double */
    PS_TREES_SIGMOID_F32 = 6,
    PS_TREES_SOFTMAX_F32 = 7,
    PS_TREES_EXP_F32 = 8,
    PS_TREES_ARGMAX = 9, /* one output: the first class with the largest raw score */
    PS_TREES_HINGE = 10, /* 1 when raw > 0, else 0 */
    PS_TREES_SORTED = 11,      /* a row's scores in ascending order: quantiles that do not cross */
    PS_TREES_ADDED_UP_F32 = 12, /* the first score, then each the one before + 1e-6 + softplus(raw): expectiles */
    PS_TREES_ONNX_REGRESSOR = 13,
    PS_TREES_ONNX_CLASSIFIER = 14
};

/* post_transform of the two ONNX operators. */
enum ps_trees_onnx_post {
    PS_ONNX_NONE = 0,
    PS_ONNX_SOFTMAX = 1,
    PS_ONNX_LOGISTIC = 2,
    PS_ONNX_SOFTMAX_ZERO = 3,
    PS_ONNX_PROBIT = 4
};

enum ps_trees_layout {
    PS_LAYOUT_AUTO = 0,
    PS_LAYOUT_PLAIN = 1, /* one node after the other: the slow walk that the others are compared with */
    PS_LAYOUT_WALK = 2,  /* branch-free, eight trees (or rows) side by side */
    PS_LAYOUT_MASKS = 3  /* cumulative leaf masks */
};

enum ps_trees_simd { PS_SIMD_AUTO = 0, PS_SIMD_PORTABLE = 1, PS_SIMD_AVX2 = 2 };

/* A child is a node index, or ~leaf. Node i says yes when x <= threshold[i]; when steps_begin[i] < steps_begin[i+1] it
 * says instead whether steps_first[i] has been flipped an even number of times by the sorted steps s < x (this covers
 * equality, sets of categories, and zero as missing). NaN says nan_yes[i]. Thresholds are never NaN. */
typedef struct {
    uint32_t n_trees, n_nodes, n_leaves, n_inputs, n_raw, n_outputs, n_weights;
    const int32_t *roots;       /* n_trees */
    const int32_t *feature;     /* n_nodes */
    const double *threshold;    /* n_nodes */
    const int32_t *yes, *no;    /* n_nodes */
    const uint8_t *nan_yes;     /* n_nodes */
    const int32_t *steps_begin; /* n_nodes + 1 */
    const double *steps;
    const uint8_t *steps_first;  /* n_nodes */
    const int32_t *weight_begin; /* n_leaves + 1, into the next two */
    const int32_t *weight_target;
    const double *weight;
    const double *base;  /* n_raw, or NULL; added first when base_first, else last */
    int32_t n_base;      /* 0, or how many base values there are (ONNX classifiers: 0, 1 or n_raw) */
    uint8_t round_input; /* compare in float: inputs are rounded to float first */
    uint8_t accumulate32;
    uint8_t base_first;
    uint8_t aggregate;
    uint8_t transform;
    uint8_t onnx_post;
    uint8_t onnx_binary;       /* two classes, weights for one of them only */
    uint8_t onnx_all_positive; /* no weight is negative */
    uint8_t onnx_output32;     /* scores leave as float */
    double slope;              /* of PS_TREES_SIGMOID */
    double divisor;            /* of PS_TREES_AVERAGE */
} ps_trees_form;

typedef struct ps_trees ps_trees;

/* NULL when the form is wrong or memory is short: error (at least 160 bytes) then says why and where. table_bytes: size
 * from which the table of masks is thinned; 0 is the default. */
ps_trees *ps_trees_build(const ps_trees_form *form, int layout, int simd, size_t table_bytes, char *error);
void ps_trees_free(ps_trees *trees);

/* Same contract as ps_model.predict; raw scores go to out when raw is set (rows x n_raw), else outputs. Returns 0, or
 * -1 when memory for a very wide row is short. */
int ps_trees_predict(const ps_trees *trees, const double *x, size_t rows, size_t stride, double *out, int raw);
/* Outputs as ps_trees_predict, and the class of each row of an ONNX classifier: its place among the labels; where
 * ps_trees_literal_labels, integer labels are 0 and 1 whatever the file calls them. */
int ps_trees_labels(const ps_trees *trees, const double *x, size_t rows, size_t stride, double *out, int32_t *labels);
int ps_trees_literal_labels(const ps_trees *trees);
int ps_trees_model_predict(const ps_model *self, const double *x, size_t rows, size_t stride, double *out);

int ps_trees_layout_of(const ps_trees *trees);
int ps_trees_simd_of(const ps_trees *trees);
int ps_trees_mask_bits(const ps_trees *trees);
size_t ps_trees_bytes(const ps_trees *trees);

/* XGBoost's base_score is stored in output space: its margin, in float as there. link: 0 none, 1 logit, 2 log. */
float ps_trees_xgboost_margin(float base_score, int link);

#endif
