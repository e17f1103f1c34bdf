"""LightGBM's text model format (control path).

Follows LightGBM 4.7: every comparison is in double, NaN becomes 0 unless the node tells missing values apart, values
within 1e-35 of zero are zero, and scores add up in double, tree by tree. Linear trees are refused. What must stay true:
a key that no LightGBM so far has written is refused, for scores may depend on it.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Callable
from typing import Any, TypeVar

from .tree_ensemble import MOST_INPUTS, Aggregate, Transform, TreeEnsemble, TreeError, below, room_of

__all__ = ["parse_lightgbm"]

# kZeroThreshold is a float literal; rows and thresholds within it count as zero.
_ZERO = 1.0000000180025095e-35
_CATEGORICAL, _DEFAULT_LEFT = 1, 2
_MISSING_NONE, _MISSING_ZERO, _MISSING_NAN = 0, 1, 2

NEWEST = 4  # of `version=v4`: the newest whose files were compared with it, bit for bit
# Every key that LightGBM 2.0 to 4.7 writes.
_KNOWN_HEADER = (
    "version num_class num_tree_per_iteration label_index max_feature_idx objective average_output feature_names "
    "feature_infos monotone_constraints tree_sizes"
)
_KNOWN_TREE = (
    "num_leaves num_cat has_categorical split_feature split_gain threshold decision_type left_child right_child "
    "leaf_value leaf_weight leaf_count leaf_parent leaf_depth internal_value internal_weight internal_count "
    "cat_boundaries cat_threshold is_linear leaf_const num_features leaf_features leaf_coeff shrinkage"
)
_HEADER, _TREE = frozenset(_KNOWN_HEADER.split()), frozenset(_KNOWN_TREE.split())

_T = TypeVar("_T", int, float)


def _numbers(block: dict[str, str], key: str, kind: Callable[[str], _T], count: int, where: str) -> list[_T]:
    if key not in block:
        raise TreeError(f"{where}: {key} is missing")
    try:
        values = [kind(word) for word in block[key].split()]
    except ValueError:
        raise TreeError(f"{where}: {key} holds something that is no {kind.__name__}") from None
    if len(values) != count:
        raise TreeError(f"{where}: {key} has {len(values)} values, expected {count}")
    return values


def _number(block: dict[str, str], key: str, where: str, default: int | None = None) -> int:
    if key not in block and default is not None:
        return default
    return _numbers(block, key, int, 1, where)[0]


def _category_steps(words: list[int]) -> array[float]:
    """Steps of a set of categories given as bits: x belongs to category int(x), truncated; negative ones to none."""
    steps = array("d")
    for k in range(32 * len(words)):
        if not words[k // 32] >> k % 32 & 1:
            continue
        # (-1, 1) truncates to 0, [k, k + 1) to k.
        first = -1.0 if k == 0 else below(float(k), False)
        if steps and steps[-1] == first:
            steps.pop()
        else:
            steps.append(first)
        steps.append(below(float(k + 1), False))
    return steps


def _count_steps(words: list[int]) -> int:
    """How many steps a set has: two for every run of categories."""
    count = before = 0
    for word in words:
        count += (word & ~(word << 1 | before)).bit_count()
        before = word >> 31
    return 2 * count


def _add_numeric(form: TreeEnsemble, feature: int, threshold: float, kind: int, left: bool, yes: int, no: int) -> None:
    if math.isnan(threshold):
        raise TreeError("threshold is NaN")
    # Rows carry an exact 0 for everything within _ZERO of it, so a threshold inside that range moves to its edge.
    zero_yes = threshold >= 0
    if -_ZERO <= threshold < _ZERO:
        threshold = _ZERO if zero_yes else below(-_ZERO, False)
    if kind == _MISSING_NAN:
        form.add_node(feature, threshold, yes, no, left)
    elif kind == _MISSING_NONE or left == zero_yes:
        form.add_node(feature, threshold, yes, no, zero_yes)
    else:
        # Zero goes another way than its neighbours.
        edge = below(-_ZERO, False)
        if zero_yes:  # yes up to the threshold, but for the zeros
            steps = [edge, _ZERO, threshold] if threshold > _ZERO else [edge]
        else:
            steps = [threshold, edge, _ZERO] if threshold < edge else [_ZERO]
        form.add_node(feature, 0.0, yes, no, left, steps, True)


def _add_tree(form: TreeEnsemble, block: dict[str, str], target: int, where: str) -> None:
    leaves = _number(block, "num_leaves", where)
    if leaves < 1 or leaves > len(block.get("leaf_value", "")):
        raise TreeError(f"{where}: num_leaves is {leaves}")
    if _number(block, "is_linear", where, 0):
        raise TreeError(f"{where}: linear trees are not supported; train with linear_tree=false")
    first_leaf, first_node = len(form.weight_begin) - 1, len(form.feature)
    for value in _numbers(block, "leaf_value", float, leaves, where):
        form.add_leaf([(target, value)])
    if leaves == 1:
        form.roots.append(-1 - first_leaf)
        return
    n = leaves - 1
    features = _numbers(block, "split_feature", int, n, where)
    thresholds = _numbers(block, "threshold", float, n, where)
    decisions = _numbers(block, "decision_type", int, n, where)
    left, right = (_numbers(block, key, int, n, where) for key in ("left_child", "right_child"))
    n_sets = _number(block, "num_cat", where, 0)
    bounds: list[int] = []
    words: list[int] = []
    if n_sets:
        bounds = _numbers(block, "cat_boundaries", int, n_sets + 1, where)
        words = _numbers(block, "cat_threshold", int, max(bounds[-1], 0), where)
        if bounds[0] != 0 or any(a > b for a, b in itertools.pairwise(bounds)):
            raise TreeError(f"{where}: cat_boundaries out of order")
        if any(not 0 <= word < 1 << 32 for word in words):
            raise TreeError(f"{where}: cat_threshold holds something that is no 32-bit word")

    def child(k: int) -> int:
        if not -leaves <= k < n:
            raise TreeError(f"{where}: child {k} of a tree with {leaves} leaves")
        return k + first_node if k >= 0 else k - first_leaf

    # Before anything is made of them: a set that all nodes share is a few bytes for each.
    sets: dict[float, int] = {}
    for i in range(n):
        k = thresholds[i]
        if decisions[i] & _CATEGORICAL and 0 <= k < n_sets and k == int(k):
            if k not in sets:
                sets[k] = _count_steps(words[bounds[int(k)] : bounds[int(k) + 1]])
            form.expect(sets[k], f"{where}: node {i}")
    form.roots.append(first_node)
    for i in range(n):
        yes, no = child(left[i]), child(right[i])
        if not 0 <= features[i] < form.n_inputs:
            raise TreeError(f"{where}: split_feature {features[i]}, expected 0 to {form.n_inputs - 1}")
        if decisions[i] & _CATEGORICAL:
            k = thresholds[i]
            if not (0 <= k < n_sets and k == int(k)):
                raise TreeError(f"{where}: category set {k}, there are {n_sets}")
            # NaN is in no set.
            steps = _category_steps(words[bounds[int(k)] : bounds[int(k) + 1]])
            form.add_node(features[i], 0.0, yes, no, False, steps, False)
            continue
        kind = decisions[i] >> 2 & 3
        if kind > _MISSING_NAN:
            raise TreeError(f"{where}: decision_type {decisions[i]}")
        try:
            _add_numeric(form, features[i], thresholds[i], kind, bool(decisions[i] & _DEFAULT_LEFT), yes, no)
        except TreeError as error:
            raise TreeError(f"{where}: {error}") from None


_IDENTITY = {
    "regression", "regression_l1", "l2", "l1", "huber", "fair", "quantile", "mape", "lambdarank", "rank_xendcg",
    "custom",
}  # fmt: skip
_EXP = {"poisson", "gamma", "tweedie"}


def _set_objective(form: TreeEnsemble, objective: str) -> None:
    """`name key:value ...`; the transform of ObjectiveFunction::ConvertOutput."""
    words = objective.split()
    name = words[0] if words else "custom"
    given: dict[str, Any] = dict(word.split(":", 1) for word in words[1:] if ":" in word)
    try:
        slope = float(given.get("sigmoid", 1.0))
    except ValueError:
        raise TreeError(f"header: objective={objective}") from None
    if name in ("binary", "multiclassova"):
        form.transform, form.slope = Transform.SIGMOID, slope
    elif name == "cross_entropy":
        form.transform = Transform.SIGMOID
    elif name == "cross_entropy_lambda":
        form.transform = Transform.LOG1P_EXP
    elif name == "multiclass":
        form.transform = Transform.SOFTMAX
    elif name in _EXP:
        form.transform = Transform.EXP
    elif name not in _IDENTITY:
        raise TreeError(f"header: objective {name} is not supported")
    elif "sqrt" in words[1:]:
        form.transform = Transform.SIGNED_SQUARE


def _blocks(text: str) -> tuple[dict[str, str], list[dict[str, str]]]:
    """The header, and a block per tree. Lines end as LightGBM ends them: names may hold any other blank."""
    header: dict[str, str] = {}
    blocks: list[dict[str, str]] = []
    block, known = header, _HEADER
    ended = False
    for line in itertools.islice(text.split("\n"), 1, None):
        line = line.removesuffix("\r")
        # LightGBM 2.1 and older say nothing behind the last tree but the importances.
        if line == "end of trees" or (blocks and line in ("feature importances:", "feature_importances:")):
            ended = True
            break
        where = f"Tree={len(blocks) - 1}" if blocks else "header"
        key, equals, value = line.partition("=")
        if key == "Tree" and equals:
            if value != str(len(blocks)):
                raise TreeError(f"Tree={value[:40]}: expected Tree={len(blocks)}")
            block, known = {}, _TREE
            blocks.append(block)
        elif equals:
            if key not in known:
                raise TreeError(
                    f"{where}: {key[:40]!r} is not known to Penstock, which knows the files of LightGBM up to "
                    f"v{NEWEST}; scores may depend on it: save the model with one of these"
                )
            if key in block:
                raise TreeError(f"{where}: {key} stands twice")
            block[key] = value
        elif line == "average_output":
            block[line] = ""
        elif line:
            raise TreeError(f"{where}: unexpected line {line[:40]!r}")
    if not ended:
        raise TreeError(f"Tree={len(blocks) - 1}: the file ends before `end of trees`")
    if not blocks:
        raise TreeError("there are no trees")
    return header, blocks


def parse_lightgbm(text: str) -> TreeEnsemble:
    """The model that Booster.save_model or model_to_string wrote. Raises TreeError naming the tree and the field."""
    if not text.startswith("tree\n") and not text.startswith("tree\r\n"):
        raise TreeError("line 1: expected `tree`, the first line of a LightGBM model")
    header, blocks = _blocks(text)
    n_inputs = _number(header, "max_feature_idx", "header") + 1
    per_iteration = _number(header, "num_tree_per_iteration", "header", 1)
    if n_inputs > MOST_INPUTS:
        raise TreeError(f"header: max_feature_idx is {n_inputs - 1}, expected at most {MOST_INPUTS - 1}")
    names = [name for name in header.get("feature_names", "").split(" ") if name]
    if n_inputs < 1 or len(names) != n_inputs:
        raise TreeError(f"header: {len(names)} feature_names, max_feature_idx {n_inputs - 1}")
    if per_iteration < 1 or len(blocks) % per_iteration:
        raise TreeError(f"header: num_tree_per_iteration is {per_iteration}, there are {len(blocks)} trees")
    form = TreeEnsemble(n_inputs, per_iteration, per_iteration, names, room_of(len(text)))
    version = header.get("version", "").removeprefix("v")
    if version.isdecimal() and len(version) < 10 and int(version) > NEWEST:
        form.warning = f"version=v{version}; Penstock's scores were compared with those of LightGBM up to v{NEWEST}"
    _set_objective(form, header.get("objective", ""))
    if "average_output" in header:
        form.aggregate, form.divisor = Aggregate.AVERAGE, float(len(blocks) // per_iteration)
    for i, tree in enumerate(blocks):
        _add_tree(form, tree, i % per_iteration, f"Tree={i}")
    return form
