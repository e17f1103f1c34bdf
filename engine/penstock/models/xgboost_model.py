"""XGBoost's model formats: JSON, and the same document as Universal Binary JSON (control path).

Follows XGBoost 3.2: features, thresholds and leaves are float32, x < threshold goes left, the intercept comes first and
the trees add to it in order, in float32; a dart tree adds its leaf times its weight.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from penstock._ext.trees import xgboost_margin

from .tree_ensemble import Transform, TreeEnsemble, TreeError, below

__all__ = ["parse_xgboost_json", "parse_xgboost_ubj"]

_NO_LINK, _LOGIT, _LOG = range(3)
# Objective -> how base_score becomes a margin (ProbToMargin), and a margin the output (PredTransform).
_OBJECTIVES = {
    "reg:squarederror": (_NO_LINK, Transform.IDENTITY),
    "reg:linear": (_NO_LINK, Transform.IDENTITY),
    "reg:squaredlogerror": (_NO_LINK, Transform.IDENTITY),
    "reg:pseudohubererror": (_NO_LINK, Transform.IDENTITY),
    "reg:absoluteerror": (_NO_LINK, Transform.IDENTITY),
    "reg:quantileerror": (_NO_LINK, Transform.IDENTITY),
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
_CATEGORICAL = 1
_LARGEST_CATEGORY = 16777215


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


def _integer(node: Any, path: str, default: int | None = None) -> int:
    """XGBoost writes its parameters as strings."""
    if default is not None and path.rsplit(".", 1)[-1] not in _get(node, path.rsplit(".", 1)[0], dict):
        return default
    text = _get(node, path, (str, int))
    try:
        return int(text)
    except ValueError:
        raise TreeError(f"$.{path}: {text!r} is no integer") from None


def _list(tree: dict[str, Any], key: str, kind: type, where: str, size: int | None = None) -> list[Any]:
    values = tree.get(key)
    if not isinstance(values, list) or (size is not None and len(values) != size):
        found = f"{len(values)} values" if isinstance(values, list) else type(values).__name__
        raise TreeError(f"{where}.{key}: expected {'a list' if size is None else f'{size} values'}, got {found}")
    for value in values:
        if not isinstance(value, kind if kind is int else (int, float)):
            raise TreeError(f"{where}.{key}: {value!r} is no {kind.__name__}")
    return values


def _f32(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def _category_steps(categories: Sequence[int], where: str) -> list[float]:
    """Steps at which x enters or leaves the categories that go right: category k holds the x of [k, k + 1)."""
    steps: list[float] = []
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
            sets[node] = categories[begin : begin + size]

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
            raise TreeError(f"{where}.split_conditions: NaN")
        if threshold == -math.inf:
            form.add_node(features[i], 0.0, yes, no, missing, [], False)
        else:
            form.add_node(features[i], below(threshold, True), yes, no, missing)


def _base_scores(text: Any, n_raw: int, link: int) -> list[float]:
    """`5E-1`, or since 3.1 `[5E-1,...]`: one per output, or one for all."""
    try:
        scores = [np.float32(word) for word in str(text).strip("[]").split(",")]
    except ValueError:
        raise TreeError(f"$.learner.learner_model_param.base_score: {text!r}") from None
    if len(scores) == 1:
        scores *= n_raw
    if len(scores) != n_raw:
        raise TreeError(f"$.learner.learner_model_param.base_score: {len(scores)} values for {n_raw} outputs")
    return [float(xgboost_margin(float(score), link)) for score in scores]


def _build(document: Any) -> TreeEnsemble:
    learner = _get(document, "learner", dict)
    objective = _get(document, "learner.objective.name", str)
    if objective not in _OBJECTIVES:
        raise TreeError(f"$.learner.objective.name: {objective} is not supported")
    link, transform = _OBJECTIVES[objective]
    booster = _get(document, "learner.gradient_booster", dict)
    name = _get(document, "learner.gradient_booster.name", str)
    if name == "gblinear":
        raise TreeError("$.learner.gradient_booster.name: gblinear has no trees")
    at = "learner.gradient_booster" + (".gbtree" if name == "dart" else "") + ".model"
    trees = _get(document, f"{at}.trees", list)
    groups = _get(document, f"{at}.tree_info", list)
    parameters = "learner.learner_model_param"
    n_inputs = _integer(document, f"{parameters}.num_feature")
    n_raw = max(_integer(document, f"{parameters}.num_class"), _integer(document, f"{parameters}.num_target", 1), 1)
    if len(groups) != len(trees):
        raise TreeError(f"$.{at}.tree_info: {len(groups)} values for {len(trees)} trees")
    scales: Any = [1.0] * len(trees)
    if name == "dart":
        scales = _list(booster, "weight_drop", float, "$.learner.gradient_booster", len(trees))
    if not 0 < n_inputs < 1 << 24:
        raise TreeError(f"$.{parameters}.num_feature: {n_inputs}")
    if n_raw > max(len(trees), 1) and n_raw > 1 << 16:
        raise TreeError(f"$.{parameters}.num_class: {n_raw} outputs of {len(trees)} trees")
    names = learner.get("feature_names") or None
    if names is not None and (
        not isinstance(names, list) or len(names) != n_inputs or not all(isinstance(text, str) for text in names)
    ):
        raise TreeError(f"$.learner.feature_names: expected {n_inputs} names")
    form = TreeEnsemble(n_inputs, n_raw, 1 if transform == Transform.ARGMAX else n_raw, names)
    form.round_input = form.accumulate32 = form.base_first = True
    form.transform = transform
    form.base = _base_scores(_get(document, f"{parameters}.base_score", (str, float)), n_raw, link)

    kept = len(trees)
    attributes = learner.get("attributes")
    if isinstance(attributes, dict) and "best_iteration" in attributes:
        rounds = _integer(document, "learner.attributes.best_iteration") + 1
        bounds = _get(document, at, dict).get("iteration_indptr")
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
    return _build(document)


def parse_xgboost_ubj(data: bytes) -> TreeEnsemble:
    """What Booster.save_model wrote to a .ubj file; see parse_xgboost_json."""
    reader = _UBJ(data)
    if reader.marker() != "{":
        raise TreeError("byte 0: expected an object")
    return _build(reader.value("{"))
