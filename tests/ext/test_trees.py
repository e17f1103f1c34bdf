"""The tree kernel: every layout and variant against the slow walk, on generated ensembles; threads; wrong forms."""

import ctypes
import math
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles.tree_rows import every_variant, rows_at
from oracles.trees import score_form
from penstock._ext.trees import TreeModel
from penstock.models.tree_ensemble import Aggregate, Transform, TreeEnsemble


def random_form(rng, n_inputs, n_trees, leaves, cuts, steps_share=0.0, n_raw=1, weights_per_leaf=1, single=False):
    """Trees that split a random leaf until there are enough; thresholds from a few shared values."""
    form = TreeEnsemble(n_inputs, n_raw, n_raw, round_input=single, accumulate32=single)
    for t in range(n_trees):
        slots = [(None, False)]
        root = None
        for _ in range(int(rng.integers(1, leaves + 1)) - 1):
            parent, no = slots.pop(int(rng.integers(len(slots))))
            steps = None
            if rng.random() < steps_share:
                steps = sorted({float(v) for v in rng.choice(cuts, int(rng.integers(1, 5)))})
            node = form.add_node(
                int(rng.integers(n_inputs)), float(rng.choice(cuts)), 0, 0, bool(rng.random() < 0.5), steps,
                bool(rng.random() < 0.5),
            )  # fmt: skip
            if parent is None:
                root = node
            else:
                (form.no if no else form.yes)[parent] = node
            slots += [(node, False), (node, True)]
        for parent, no in slots:
            targets = rng.permutation(n_raw)[:weights_per_leaf] if weights_per_leaf > 1 else [t % n_raw]
            leaf = form.add_leaf([(int(k), float(np.float32(rng.normal()))) for k in targets])
            if parent is None:
                root = leaf
            else:
                (form.no if no else form.yes)[parent] = leaf
        form.roots.append(root)
    return form


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31), leaves=st.sampled_from([1, 2, 7, 32, 33, 64, 65, 200]), n_trees=st.integers(1, 40),
    steps=st.sampled_from([0.0, 0.0, 0.3]), n_raw=st.integers(1, 3), many=st.booleans(), single=st.booleans(),
)  # fmt: skip
def test_every_layout_equals_the_slow_walk(seed, leaves, n_trees, steps, n_raw, many, single):
    rng = np.random.default_rng(seed)
    n_inputs = int(rng.integers(1, 7))
    kind = np.float32 if single else np.float64
    cuts = np.append(rng.normal(size=int(rng.integers(1, 60))).astype(kind), [0.0, np.inf, -np.inf]).astype(float)
    form = random_form(rng, n_inputs, n_trees, leaves, cuts, steps, n_raw, 2 if many and n_raw > 1 else 1, single)
    # Rows in double around float cuts: the kernel has to round before it compares.
    x = np.vstack([rows_at(cuts[:-2], n_inputs, one, rng, 30) for one in (single, False)])
    want = [score_form(form, row) for row in x]
    for model in every_variant(form, TreeModel):
        np.testing.assert_array_equal(model.predict_raw(x), want, err_msg=f"{model.layout} {model.simd}")
        for n in (1, 2, 5, 9):
            np.testing.assert_array_equal(model.predict(x[:n]), want[:n])


@pytest.mark.parametrize("aggregate", [Aggregate.AVERAGE, Aggregate.MIN, Aggregate.MAX])
def test_aggregates_of_leaves(aggregate):
    rng = np.random.default_rng(3)
    form = random_form(rng, 2, 5, 4, np.array([0.0, 1.0]))
    form.aggregate, form.divisor = aggregate, 5.0
    x = rng.normal(size=(20, 2))
    parts = []
    for t in range(5):
        form_t = TreeEnsemble(**{**{f: getattr(form, f) for f in form.__slots__}, "roots": [form.roots[t]]})
        parts.append([score_form(form_t, row)[0] for row in x])
    want = {Aggregate.MIN: np.min, Aggregate.MAX: np.max, Aggregate.AVERAGE: lambda p, axis: sum(p) / 5.0}[aggregate]
    for model in every_variant(form, TreeModel):
        np.testing.assert_array_equal(model.predict(x)[:, 0], want(np.array(parts), axis=0))


def test_a_forest_of_deep_trees_walks_and_a_small_one_uses_masks():
    rng = np.random.default_rng(0)
    cuts = rng.normal(size=200)
    assert TreeModel(random_form(rng, 30, 100, 31, cuts)).layout == "masks32"
    assert TreeModel(random_form(rng, 30, 100, 63, cuts)).layout == "masks64"
    deep = random_form(rng, 5, 10, 800, cuts)
    assert TreeModel(deep).layout == "walk"
    with pytest.raises(ValueError, match="64 leaves"):
        TreeModel(deep, "masks")


def test_a_chain_as_deep_as_it_has_nodes():
    form = TreeEnsemble(1, 1, 1)
    n = 20000
    for i in range(n):
        form.add_node(0, float(n - i), i + 1 if i + 1 < n else ~n, form.add_leaf([(0, float(i))]), False)
    form.add_leaf([(0, -1.0)])
    form.roots.append(0)
    x = np.array([[float(n + 1)], [1.5], [0.0], [np.nan]])
    for layout in ("plain", "walk"):
        assert TreeModel(form, layout).predict(x)[:, 0].tolist() == [0.0, n - 1.0, -1.0, 0.0]


@pytest.fixture(scope="module")
def small():
    rng = np.random.default_rng(5)
    return TreeModel(random_form(rng, 4, 20, 16, rng.normal(size=30))), rng.normal(size=(300, 4))


def test_rows_may_come_in_any_memory_order(small):
    model, x = small
    want = model.predict(x)
    wide = np.zeros((300, 9))
    wide[:, 2:6] = x
    for same in (
        np.asfortranarray(x),
        wide[:, 2:6],
        x[::-1][::-1],
        x.tolist(),
        x.astype(">f8"),
        np.repeat(x, 2, 0)[::2],
    ):
        np.testing.assert_array_equal(model.predict(same), want)
    np.testing.assert_array_equal(model.predict(x[::-1]), want[::-1])
    np.testing.assert_array_equal(model.predict(x[:, ::-1][:, ::-1]), want)
    np.testing.assert_array_equal(
        model.predict(x.astype(np.float32)), model.predict(x.astype(np.float32).astype(float))
    )
    frozen = x.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(model.predict(frozen), want)
    assert model.predict(x[:0]).shape == (0, 1)


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 5), (1, 2, 4), ()])
def test_another_shape_is_refused(small, shape):
    with pytest.raises(ValueError, match=r"expected shape \(rows, 4\)"):
        small[0].predict(np.zeros(shape))


def test_things_that_are_no_rows_are_refused(small):
    for x in (None, "text", object(), [["a", "b", "c", "d"]]):
        with pytest.raises((TypeError, ValueError)):
            small[0].predict(x)


def test_the_abi_scores_without_python(small):
    model, x = small

    class Model(ctypes.Structure):
        pass

    call = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.POINTER(Model), ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p
    )
    Model._fields_ = [
        ("predict", call), ("state", ctypes.c_void_p), ("n_inputs", ctypes.c_uint32), ("n_outputs", ctypes.c_uint32)
    ]  # fmt: skip
    abi = Model.from_address(model.abi)
    assert (abi.n_inputs, abi.n_outputs) == (4, 1)
    wide = np.zeros((len(x), 7))
    wide[:, :4] = x
    out = np.empty((len(x), 1))
    assert abi.predict(ctypes.byref(abi), wide.ctypes.data, len(x), 7, out.ctypes.data) == 0
    np.testing.assert_array_equal(out, model.predict(x))


def test_threads_share_a_model(small):
    model, x = small
    want, wrong = model.predict(x), []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(200):
            a, b = sorted(rng.integers(0, len(x), 2))
            if not np.array_equal(model.predict(x[a:b]), want[a:b]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_very_wide_rows_leave_the_stack():
    rng = np.random.default_rng(1)
    form = random_form(rng, 20000, 30, 16, rng.normal(size=50))
    x = rng.normal(size=(70, 20000))
    want = [score_form(form, row) for row in x]
    for model in every_variant(form, TreeModel):
        np.testing.assert_array_equal(model.predict(x), want)


def stump():
    form = TreeEnsemble(2, 1, 1)
    form.add_node(0, 1.0, form.add_leaf([(0, 1.0)]), form.add_leaf([(0, 2.0)]), False)
    form.roots.append(0)
    return form


def set_at(field, index, value):
    return lambda form: getattr(form, field).__setitem__(index, value)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (set_at("feature", 0, 2), "node 0: feature 2"),
        (set_at("feature", 0, -1), "node 0: feature -1"),
        (set_at("threshold", 0, math.nan), "NaN"),
        (set_at("yes", 0, 5), "child 5 out of range"),
        (set_at("yes", 0, -9), "child -9 out of range"),
        (set_at("yes", 0, 0), "node 0 is used twice"),
        (set_at("yes", 0, -2), "leaf 1 is used twice"),
        (set_at("roots", 0, 3), "root 3 out of range"),
        (set_at("roots", 0, -1), "1 leaves belong to no tree"),
        (set_at("weight_target", 0, 1), "target 1"),
        (set_at("weight_begin", 1, 7), "weights out of order"),
        (set_at("steps_begin", 1, -3), "steps"),
        (lambda form: form.roots.append(0), "node 0 is used twice"),
        (lambda form: form.roots.clear(), "at least one tree"),
        (lambda form: form.base.extend([1.0, 2.0]), "2 base values"),
        (lambda form: form.weight.append(1.0), "weight: expected"),
        (lambda form: form.nan_yes.append(True), "nan_yes: expected 1 values"),
    ],
)
def test_a_wrong_form_is_refused(spoil, says):
    form = stump()
    spoil(form)
    with pytest.raises(ValueError, match=says):
        TreeModel(form)


def test_unordered_steps_are_refused():
    form = stump()
    form.steps, form.steps_begin = [2.0, 1.0], [0, 2]
    with pytest.raises(ValueError, match="node 0: steps out of order"):
        TreeModel(form)
    form.steps = [1.0, math.nan]
    with pytest.raises(ValueError, match="node 0: steps out of order"):
        TreeModel(form)


def test_unknown_layouts_are_refused():
    with pytest.raises(ValueError, match="expected auto, plain, walk, masks"):
        TreeModel(stump(), "fast")


def test_transforms_in_double():
    form = stump()
    x = np.array([[0.0, 0.0], [2.0, 0.0]])
    raw = np.array([1.0, 2.0])
    cases = {
        Transform.SIGMOID: 1 / (1 + np.exp(-3 * raw)), Transform.EXP: np.exp(raw), Transform.SIGNED_SQUARE: raw * raw,
        Transform.LOG1P_EXP: np.log1p(np.exp(raw)), Transform.HINGE: raw > 0,
    }  # fmt: skip
    form.slope = 3.0
    for transform, want in cases.items():
        form.transform = transform
        np.testing.assert_allclose(TreeModel(form).predict(x)[:, 0], want, rtol=1e-15)
