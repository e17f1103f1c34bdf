"""XGBoost's model formats: JSON, and the same document as Universal Binary JSON (control path).

Follows XGBoost 3.4: features, thresholds and leaves are float32, x < threshold goes left, the intercept comes first and
the trees add to it in order, in float32; a dart tree adds its leaf times its weight. What must stay true: a key that is
not in _KNOWN is refused, for a newer XGBoost may have put there what scores depend on.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from penstock._ext.trees import xgboost_margin

from .tree_ensemble import MOST_INPUTS, Transform, TreeEnsemble, TreeError, below, room_of

__all__ = ["parse_xgboost_json", "parse_xgboost_ubj"]

NEWEST = (3, 4)  # the newest version whose files were compared with it, bit for bit
_SORTED_SINCE = (3, 4)  # several quantiles of a row come in order
_NO_LINK, _LOGIT, _LOG, _SOFTPLUS = range(4)
# Objective -> how base_score becomes a margin (ProbToMargin), and a margin the output (PredTransform).
_OBJECTIVES = {
    "reg:squarederror": (_NO_LINK, Transform.IDENTITY),
    "reg:linear": (_NO_LINK, Transform.IDENTITY),
    "reg:squaredlogerror": (_NO_LINK, Transform.IDENTITY),
    "reg:pseudohubererror": (_NO_LINK, Transform.IDENTITY),
    "reg:absoluteerror": (_NO_LINK, Transform.IDENTITY),
    "reg:quantileerror": (_NO_LINK, Transform.IDENTITY),
    "reg:expectileerror": (_SOFTPLUS, Transform.ADDED_UP_F32),
    "reg:logistic": (_LOGIT, Transform.SIGMOID_F32),
    "binary:logistic": (_LOGIT, Transform.SIGMOID_F32),
    "binary:logitraw": (_NO_LINK, Transform.IDENTITY),
    "binary:hinge": (_NO_LINK, Transform.HINGE),
    "count:poisson": (_LOG, Transform.EXP_F32),
    "reg:gamma": (_LOG, Transform.EXP_F32),
    "reg:tweedie": (_LOG, Transform.EXP_F32),
    "survival:cox": (_LOG, Transform.EXP_F32),
    "survival:aft": (_LOG, Transform.EXP_F32),
    "multi:softprob": (_NO_LINK, Transform.SOFTMAX_F32),
    "multi:softmax": (_NO_LINK, Transform.ARGMAX),
    "rank:pairwise": (_NO_LINK, Transform.IDENTITY),
    "rank:ndcg": (_NO_LINK, Transform.IDENTITY),
    "rank:map": (_NO_LINK, Transform.IDENTITY),
}
# Every key of a file, by where it stands; of XGBoost 1.0 to 3.4. What users add (attributes) is theirs.
_KNOWN = {
    "": "learner version",
    "learner": "attributes feature_names feature_types gradient_booster learner_model_param objective",
    "learner.learner_model_param": "base_score boost_from_average num_class num_feature num_target",
    "learner.objective": "name reg_loss_param aft_loss_param expectile_loss_param lambda_rank_param lambdarank_param "
    "poisson_regression_param pseudo_huber_param quantile_loss_param softmax_multiclass_param "
    "tweedie_regression_param ti+ tj-",
    "booster": "gbtree model name weight_drop",
    "gbtree": "model name",
    "model": "cats gbtree_model_param iteration_indptr tree_info trees weight_drop",
    "gbtree_model_param": "num_parallel_tree num_trees size_leaf_vector",
    "tree": "base_weights categories categories_nodes categories_segments categories_sizes default_left id "
    "leaf_child_counts leaf_weights left_children loss_changes parents right_children split_conditions split_indices "
    "split_type sum_hessian tree_param",
    "tree_param": "num_deleted num_feature num_nodes size_leaf_vector",
    # Of what follows from the margin, the objectives that have a transform.
    "reg_loss_param": "scale_pos_weight",
    "aft_loss_param": "aft_loss_distribution aft_loss_distribution_scale",
    "expectile_loss_param": "expectile_alpha",
    "poisson_regression_param": "max_delta_step",
    "pseudo_huber_param": "huber_slope",
    "quantile_loss_param": "quantile_alpha",
    "softmax_multiclass_param": "num_class",
    "tweedie_regression_param": "tweedie_variance_power",
}
_KEYS = {where: frozenset(keys.split()) for where, keys in _KNOWN.items()}
_CATEGORICAL = 1
_LARGEST_CATEGORY = 16777215
_LARGEST = 1 << 63


# Number types of Universal Binary JSON, all big-endian: as a single value, and as an element of an array.
_SCALARS = {"i": ">b", "U": ">B", "I": ">h", "l": ">i", "L": ">q", "d": ">f", "D": ">d"}
_ELEMENTS = {"i": ">i1", "U": ">u1", "I": ">i2", "l": ">i4", "L": ">i8", "d": ">f4", "D": ">f8"}


class _UBJ:
    """A reader of Universal Binary JSON (https://ubjson.org, draft 12), as far as XGBoost writes it."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, n: int) -> bytes:
        if n < 0 or n > len(self.data) - self.at:
            raise TreeError(f"byte {self.at}: {n} bytes expected, {len(self.data) - self.at} are left")
        self.at += n
        return self.data[self.at - n : self.at]

    def marker(self) -> str:
        return self.take(1).decode("latin-1")

    def number(self, kind: str) -> Any:
        code = _SCALARS.get(kind)
        if code is None:
            raise TreeError(f"byte {self.at - 1}: {kind!r} is no number type")
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def length(self) -> int:
        n = self.number(self.marker())
        if not isinstance(n, int) or n < 0 or n > len(self.data):
            raise TreeError(f"byte {self.at}: length {n}")
        return n

    def string(self) -> str:
        n = self.length()
        where = self.at
        try:
            return self.take(n).decode()
        except UnicodeDecodeError:
            raise TreeError(f"byte {where}: a string that is not UTF-8") from None

    def header(self) -> tuple[str | None, int | None]:
        """The optional type and count of a container."""
        kind = count = None
        if self.data[self.at : self.at + 1] == b"$":
            self.at += 1
            kind = self.marker()
            if self.data[self.at : self.at + 1] != b"#":
                raise TreeError(f"byte {self.at}: a typed array without a count")
        if self.data[self.at : self.at + 1] == b"#":
            self.at += 1
            count = self.length()
        return kind, count

    def value(self, kind: str, depth: int = 0) -> Any:
        if depth > 32:
            raise TreeError(f"byte {self.at}: nested deeper than any model")
        if kind in _SCALARS:
            return self.number(kind)
        if kind == "S":
            return self.string()
        if kind == "C":
            return self.marker()
        if kind in "TFZN":
            return {"T": True, "F": False, "Z": None, "N": None}[kind]
        if kind == "[":
            inner, count = self.header()
            if inner is not None and count is not None:
                if inner not in _ELEMENTS:
                    raise TreeError(f"byte {self.at}: an array of {inner!r}")
                dtype = np.dtype(_ELEMENTS[inner])
                return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
            values: list[Any] = []
            while count is None or len(values) < count:
                mark = self.marker()
                if count is None and mark == "]":
                    break
                values.append(self.value(mark, depth + 1))
            return values
        if kind == "{":
            _, count = self.header()
            document: dict[str, Any] = {}
            while count is None or len(document) < count:
                if count is None and self.data[self.at : self.at + 1] == b"}":
                    self.at += 1
                    break
                key = self.string()
                if key in document:
                    raise TreeError(f"byte {self.at}: {key!r} stands twice")
                document[key] = self.value(self.marker(), depth + 1)
            return document
        raise TreeError(f"byte {self.at - 1}: {kind!r} is no type of UBJSON")


def _get(node: Any, path: str, kind: type | tuple[type, ...]) -> Any:
    """The value at a dotted path, of the given kind."""
    walked = []
    for key in path.split("."):
        walked.append(key)
        if not isinstance(node, dict) or key not in node:
            raise TreeError(f"$.{'.'.join(walked)}: missing")
        node = node[key]
    if not isinstance(node, kind) or isinstance(node, bool):
        raise TreeError(f"$.{path}: unexpected {type(node).__name__}")
    return node


def _known(node: Any, what: str, where: str) -> None:
    """Refuses keys of an object that no XGBoost so far has written."""
    if isinstance(node, dict) and not node.keys() <= _KEYS[what]:
        new = ", ".join(sorted(map(repr, node.keys() - _KEYS[what]))[:5])[:200]
        raise TreeError(
            f"{where}: {new} is not known to Penstock, which knows the files of XGBoost up to "
            f"{NEWEST[0]}.{NEWEST[1]}; scores may depend on it: save the model with one of these"
        )


def _integer(node: Any, path: str, default: int | None = None) -> int:
    """XGBoost writes its parameters as strings."""
    if default is not None and path.rsplit(".", 1)[-1] not in _get(node, path.rsplit(".", 1)[0], dict):
        return default
    text = _get(node, path, (str, int))
    try:
        return int(text)
    except ValueError:
        raise TreeError(f"$.{path}: {str(text)[:40]!r} is no integer") from None


def _list(tree: dict[str, Any], key: str, kind: type, where: str, size: int | None = None) -> list[Any]:
    values = tree.get(key)
    if not isinstance(values, list) or (size is not None and len(values) != size):
        found = f"{len(values)} values" if isinstance(values, list) else type(values).__name__
        raise TreeError(f"{where}.{key}: expected {'a list' if size is None else f'{size} values'}, got {found}")
    for i, value in enumerate(values):
        if not isinstance(value, kind if kind is int else (int, float)):
            raise TreeError(f"{where}.{key}[{i}]: {str(value)[:40]!r} is no {kind.__name__}")
        if isinstance(value, int) and not -_LARGEST < value < _LARGEST:
            raise TreeError(f"{where}.{key}[{i}]: an integer of {value.bit_length()} bits, expected at most 63")
    return values


def _f32(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def _category_steps(categories: Sequence[int], where: str) -> array[float]:
    """Steps at which x enters or leaves the categories that go right: category k holds the x of [k, k + 1)."""
    steps = array("d")
    for k in sorted(set(categories)):
        if not 0 <= k <= _LARGEST_CATEGORY:
            raise TreeError(f"{where}.categories: category {k}")
        first = below(float(k), True)
        if steps and steps[-1] == first:
            steps.pop()
        else:
            steps.append(first)
        steps.append(below(float(k + 1), True))
    return steps


def _add_tree(form: TreeEnsemble, tree: Any, target: int, scale: float, where: str) -> None:
    if not isinstance(tree, dict):
        raise TreeError(f"{where}: expected an object, got {type(tree).__name__}")
    _known(tree, "tree", where)
    _known(tree.get("tree_param"), "tree_param", f"{where}.tree_param")
    left = _list(tree, "left_children", int, where)
    n = len(left)
    if not n:
        raise TreeError(f"{where}: a tree without nodes")
    right = _list(tree, "right_children", int, where, n)
    features = _list(tree, "split_indices", int, where, n)
    conditions = _list(tree, "split_conditions", float, where, n)
    default_left = _list(tree, "default_left", int, where, n)
    kinds = _list(tree, "split_type", int, where, n) if "split_type" in tree else [0] * n
    width = 1
    if isinstance(tree.get("tree_param"), dict) and "size_leaf_vector" in tree["tree_param"]:
        width = max(_integer(tree, "tree_param.size_leaf_vector"), 1)
    vectors: list[float] = []
    if width > 1:
        if width != form.n_raw:
            raise TreeError(f"{where}: leaves of {width} values, the model has {form.n_raw} outputs")
        vectors = _list(tree, "leaf_weights" if "leaf_weights" in tree else "base_weights", float, where)
    sets: dict[int, list[int]] = {}
    if "categories_nodes" in tree:
        nodes = _list(tree, "categories_nodes", int, where)
        categories = _list(tree, "categories", int, where)
        begins = _list(tree, "categories_segments", int, where, len(nodes))
        sizes = _list(tree, "categories_sizes", int, where, len(nodes))
        for node, begin, size in zip(nodes, begins, sizes):
            if begin < 0 or size < 0 or begin + size > len(categories):
                raise TreeError(f"{where}.categories_segments: {begin} + {size} of {len(categories)}")
            form.expect(2 * size, f"{where}.categories_segments")
            sets[node] = categories[begin : begin + size]

    if width > 1:
        form.expect(width * sum(child < 0 for child in left), where)
    weight = np.float32(scale)
    seen = [False] * n
    # Nodes that a walk from the root meets, in the order met; pruned ones stay behind.
    met: list[int] = []
    stack = [0]
    place = [0] * n
    next_node = len(form.feature)
    while stack:
        i = stack.pop()
        if not 0 <= i < n or seen[i]:
            raise TreeError(f"{where}: node {i} {'is used twice' if 0 <= i < n else 'does not exist'}")
        seen[i] = True
        if left[i] >= 0:
            met.append(i)
            place[i] = next_node
            next_node += 1
            stack += [right[i], left[i]]
            continue
        if width == 1:
            place[i] = form.add_leaf([(target, float(np.float32(conditions[i]) * weight))])
            continue
        # Since 3.2 a leaf of several values says in right_children which one it is; before, leaves stood at their node.
        at = (right[i] if "leaf_weights" in tree else i) * width
        if at < 0 or at + width > len(vectors):
            raise TreeError(f"{where}: leaf {i} has no values")
        place[i] = form.add_leaf([(k, float(np.float32(vectors[at + k]) * weight)) for k in range(width)])
    form.roots.append(place[0])
    for i in met:
        if not 0 <= features[i] < form.n_inputs:
            raise TreeError(f"{where}.split_indices: feature {features[i]}, expected 0 to {form.n_inputs - 1}")
        yes, no, missing = place[left[i]], place[right[i]], default_left[i] == 1
        if kinds[i] == _CATEGORICAL:
            form.add_node(features[i], 0.0, yes, no, missing, _category_steps(sets.get(i, []), where), True)
            continue
        threshold = _f32(conditions[i])
        if math.isnan(threshold):
            raise TreeError(f"{where}.split_conditions[{i}]: NaN, expected a number")
        if threshold == -math.inf:
            form.add_node(features[i], 0.0, yes, no, missing, [], False)
        else:
            form.add_node(features[i], below(threshold, True), yes, no, missing)


def _base_scores(text: Any, n_raw: int, link: int) -> list[float]:
    """`5E-1`, or since 3.1 `[5E-1,...]`: one per output, or one for all."""
    try:
        scores = [np.float32(word) for word in str(text).strip("[]").split(",")]
    except ValueError:
        raise TreeError(f"$.learner.learner_model_param.base_score: {str(text)[:60]!r}") from None
    if len(scores) == 1:
        scores *= n_raw
    if len(scores) != n_raw:
        raise TreeError(f"$.learner.learner_model_param.base_score: {len(scores)} values for {n_raw} outputs")
    if link == _SOFTPLUS:  # every expectile but the first is a step from the one before
        with np.errstate(all="ignore"):
            steps = [float(above - score) for score, above in itertools.pairwise(scores)]
        return [float(scores[0]), *(float(xgboost_margin(step, link)) for step in steps)]
    return [float(xgboost_margin(float(score), link)) for score in scores]


def _version(document: dict[str, Any]) -> tuple[int, ...]:
    """The XGBoost that wrote the file; () where it does not say."""
    version = document.get("version", [])
    if not isinstance(version, list) or not all(isinstance(part, int) and 0 <= part < 1 << 31 for part in version):
        raise TreeError(f"$.version: expected a list such as [3, 2, 0], got {str(version)[:40]!r}")
    return tuple(version)


def _levels(document: Any, name: str, n_raw: int) -> None:
    """An objective of several levels has one output for each."""
    block, key = (
        ("quantile_loss_param", "quantile_alpha")
        if name == "reg:quantileerror"
        else ("expectile_loss_param", "expectile_alpha")
    )
    text = _get(document, f"learner.objective.{block}.{key}", (str, list, float, int))
    count = len(text) if isinstance(text, list) else len(str(text).strip("[]() ").split(","))
    if count != n_raw:
        raise TreeError(f"$.learner.objective.{block}.{key}: {count} levels for {n_raw} outputs")


def _weights(booster: dict[str, Any], model: dict[str, Any], n_trees: int, where: str) -> list[float]:
    """What dart multiplies each tree with: up to 3.3 beside the booster's model, since then within it; trees beyond
    the list's end have weight 1."""
    at = "$.learner.gradient_booster"
    if "weight_drop" in booster and "weight_drop" in model:
        raise TreeError(f"{at}.weight_drop: it stands in $.{where} too; which one holds?")
    if "weight_drop" in model:
        booster, at = model, f"$.{where}"
    if "weight_drop" not in booster:
        return [1.0] * n_trees
    weights = _list(booster, "weight_drop", float, at)
    if len(weights) > n_trees:
        raise TreeError(f"{at}.weight_drop: {len(weights)} values for {n_trees} trees")
    return [*weights, *[1.0] * (n_trees - len(weights))]


def _build(document: Any, size: int) -> TreeEnsemble:
    learner = _get(document, "learner", dict)
    version = _version(document)
    _known(document, "", "$")
    _known(learner, "learner", "$.learner")
    objective = _get(document, "learner.objective.name", str)
    if objective not in _OBJECTIVES:
        raise TreeError(f"$.learner.objective.name: {objective[:60]} is not supported")
    link, transform = _OBJECTIVES[objective]
    booster = _get(document, "learner.gradient_booster", dict)
    name = _get(document, "learner.gradient_booster.name", str)
    if name == "gblinear":
        raise TreeError("$.learner.gradient_booster.name: gblinear has no trees")
    if name not in ("gbtree", "dart"):
        raise TreeError(f"$.learner.gradient_booster.name: {name[:40]!r}, expected 'gbtree' or 'dart'")
    at = "learner.gradient_booster" + (".gbtree" if name == "dart" else "") + ".model"
    model = _get(document, at, dict)
    for node, what, where in (
        (learner.get("learner_model_param"), "learner.learner_model_param", "$.learner.learner_model_param"),
        (learner["objective"], "learner.objective", "$.learner.objective"),
        (booster, "booster", "$.learner.gradient_booster"),
        (booster.get("gbtree"), "gbtree", "$.learner.gradient_booster.gbtree"),
        (model, "model", f"$.{at}"),
        (model.get("gbtree_model_param"), "gbtree_model_param", f"$.{at}.gbtree_model_param"),
        *((v, k, f"$.learner.objective.{k}") for k, v in learner["objective"].items() if k in _KEYS),
    ):
        _known(node, what, where)
    trees = _get(document, f"{at}.trees", list)
    groups = _get(document, f"{at}.tree_info", list)
    parameters = "learner.learner_model_param"
    n_inputs = _integer(document, f"{parameters}.num_feature")
    n_raw = max(_integer(document, f"{parameters}.num_class"), _integer(document, f"{parameters}.num_target", 1), 1)
    if len(groups) != len(trees):
        raise TreeError(f"$.{at}.tree_info: {len(groups)} values for {len(trees)} trees")
    if name == "dart":
        _get(document, "learner.gradient_booster.weight_drop", list)
    scales = _weights(booster, model, len(trees), at)
    if not 0 < n_inputs <= MOST_INPUTS:
        raise TreeError(f"$.{parameters}.num_feature: {str(n_inputs)[:20]}, expected 1 to {MOST_INPUTS}")
    if n_raw > max(len(trees), 1) and n_raw > 1 << 16:
        raise TreeError(f"$.{parameters}.num_class: {n_raw} outputs of {len(trees)} trees")
    if objective == "reg:expectileerror" or (objective == "reg:quantileerror" and version >= _SORTED_SINCE):
        _levels(document, objective, n_raw)
        if objective == "reg:quantileerror":
            transform = Transform.SORTED
    names = learner.get("feature_names") or None
    if names is not None and (
        not isinstance(names, list) or len(names) != n_inputs or not all(isinstance(text, str) for text in names)
    ):
        raise TreeError(f"$.learner.feature_names: expected {n_inputs} names")
    for i, text in enumerate(names or ()):
        if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
            raise TreeError(f"$.learner.feature_names[{i}]: {ascii(text)[:60]} is no text")
    form = TreeEnsemble(n_inputs, n_raw, 1 if transform == Transform.ARGMAX else n_raw, names, room_of(size))
    form.round_input = form.accumulate32 = form.base_first = True
    form.transform = transform
    if version[:2] > NEWEST:
        form.warning = (
            f"saved by XGBoost {'.'.join(map(str, version))}; Penstock's scores were compared with those of XGBoost up "
            f"to {NEWEST[0]}.{NEWEST[1]}"
        )
    form.base = _base_scores(_get(document, f"{parameters}.base_score", (str, float)), n_raw, link)

    kept = len(trees)
    attributes = learner.get("attributes")
    if isinstance(attributes, dict) and "best_iteration" in attributes:
        rounds = _integer(document, "learner.attributes.best_iteration") + 1
        bounds = model.get("iteration_indptr")
        if isinstance(bounds, list) and all(isinstance(b, int) for b in bounds) and 0 < rounds < len(bounds):
            kept = bounds[rounds]
        else:
            parallel = max(_integer(document, f"{at}.gbtree_model_param.num_parallel_tree", 1), 1)
            kept = rounds * parallel * (n_raw if any(groups) else 1)
        if not 0 < kept <= len(trees):
            raise TreeError(f"$.learner.attributes.best_iteration: {rounds - 1} of {len(trees)} trees")
    if not kept:
        raise TreeError(f"$.{at}.trees: there are no trees")
    for i in range(kept):
        if not isinstance(groups[i], int) or not 0 <= groups[i] < n_raw:
            raise TreeError(f"$.{at}.tree_info[{i}]: {groups[i]!r} of {n_raw} outputs")
        _add_tree(form, trees[i], groups[i], scales[i], f"$.{at}.trees[{i}]")
    return form


def parse_xgboost_json(data: bytes) -> TreeEnsemble:
    """What Booster.save_model wrote to a .json file. Trees after the best iteration of early stopping, where the file
    knows one, are left out, as XGBoost's own estimators do. Raises TreeError with the path of the damage."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TreeError(f"not a JSON document: {error}") from None
    return _build(document, len(data))


def parse_xgboost_ubj(data: bytes) -> TreeEnsemble:
    """What Booster.save_model wrote to a .ubj file; see parse_xgboost_json."""
    reader = _UBJ(data)
    if reader.marker() != "{":
        raise TreeError("byte 0: expected an object")
    return _build(reader.value("{"), len(data))
