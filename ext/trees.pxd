# trees.pxd (hot path): a tree ensemble laid out for scoring; the scorer itself is tree_kernel.c.

from libc.stdint cimport int32_t, uint8_t, uint32_t

from penstock._ext.model cimport ps_model


cdef extern from "tree_kernel.h" nogil:
    ctypedef struct ps_trees:
        pass

    ctypedef struct ps_trees_form:
        uint32_t n_trees, n_nodes, n_leaves, n_inputs, n_raw, n_outputs, n_weights
        const int32_t *roots
        const int32_t *feature
        const double *threshold
        const int32_t *yes
        const int32_t *no
        const uint8_t *nan_yes
        const int32_t *steps_begin
        const double *steps
        const uint8_t *steps_first
        const int32_t *weight_begin
        const int32_t *weight_target
        const double *weight
        const double *base
        int32_t n_base
        uint8_t round_input, accumulate32, base_first, aggregate, transform
        uint8_t onnx_post, onnx_binary, onnx_all_positive, onnx_output32
        double slope, divisor

    ps_trees *ps_trees_build(const ps_trees_form *form, int layout, int simd, size_t table_bytes, char *error)
    void ps_trees_free(ps_trees *trees)
    int ps_trees_predict(const ps_trees *trees, const double *x, size_t rows, size_t stride, double *out, int raw)
    int ps_trees_labels(const ps_trees *trees, const double *x, size_t rows, size_t stride, double *out, int32_t *labels)
    int ps_trees_literal_labels(const ps_trees *trees)
    int ps_trees_model_predict(const ps_model *self, const double *x, size_t rows, size_t stride, double *out)
    int ps_trees_layout_of(const ps_trees *trees)
    int ps_trees_simd_of(const ps_trees *trees)
    int ps_trees_mask_bits(const ps_trees *trees)
    size_t ps_trees_bytes(const ps_trees *trees)
    float ps_trees_xgboost_margin(float base_score, int link)

cdef extern from "tree_form.h" nogil:
    size_t ps_trees_form_size(const ps_trees_form *form, size_t names)
    void ps_trees_form_write(const ps_trees_form *form, const char *names, size_t n_names, void *to)
    int ps_trees_form_read(const void *block, size_t bytes, ps_trees_form *form, const char **names, size_t *n_names,
                           char *error)
    ps_trees *ps_trees_build_block(const void *block, size_t bytes, int layout, int simd, size_t table_bytes, int nice,
                                   ps_trees_form *form, const char **names, size_t *n_names, char *error)


cdef class TreeModel:
    cdef:
        ps_model model
        ps_trees *trees
        uint32_t n_raw_scores
        readonly tuple feature_names

    cdef object score(self, object x, bint raw)


# For a ps_model that a TreeModel made: scores and classes of an ONNX classifier; see ps_trees_labels.
cdef int tree_labels(const ps_model *model, const double *x, size_t rows, size_t stride, double *out,
                     int32_t *labels) noexcept nogil
cdef bint tree_labels_literal(const ps_model *model) noexcept nogil
