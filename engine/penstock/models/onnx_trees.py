"""Tree ensembles in ONNX: TreeEnsembleRegressor and -Classifier, TreeEnsemble; ai.onnx.ml 1 to 5 (control path).

The reference is ONNX Runtime 1.32 on one thread, its oddities included: thresholds compare and weights add up in the
type of the input (float or double), trees in the order of their first node, base values last, outputs in float. A graph
that computes anything else between its input and its scores is left to ONNX Runtime.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .onnx_protobuf import DOUBLE, FLOAT, Graph, Node, read_graph
from .tree_ensemble import MOST_INPUTS, Aggregate, NotATreeModel, Transform, TreeEnsemble, TreeError, below, room_of

__all__ = ["parse_onnx"]

_OPS = ("TreeEnsembleClassifier", "TreeEnsembleRegressor", "TreeEnsemble")
_MODES = ("BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ", "BRANCH_MEMBER")
_LEAF = "LEAF"
_POSTS = {"NONE": 0, "SOFTMAX": 1, "LOGISTIC": 2, "SOFTMAX_ZERO": 3, "PROBIT": 4}
_NODES = (
    "nodes_falsenodeids nodes_featureids nodes_hitrates nodes_hitrates_as_tensor nodes_missing_value_tracks_true "
    "nodes_modes nodes_nodeids nodes_treeids nodes_truenodeids nodes_values nodes_values_as_tensor base_values "
    "base_values_as_tensor post_transform "
)
# Every attribute of ai.onnx.ml 1 to 5: a file with another is ONNX Runtime's to judge.
_ATTRIBUTES = {
    "TreeEnsembleClassifier": _NODES + "class_ids class_nodeids class_treeids class_weights class_weights_as_tensor "
    "classlabels_int64s classlabels_strings",
    "TreeEnsembleRegressor": _NODES + "aggregate_function n_targets target_ids target_nodeids target_treeids "
    "target_weights target_weights_as_tensor",
    "TreeEnsemble": "aggregate_function leaf_targetids leaf_weights membership_values n_targets nodes_falseleafs "
    "nodes_falsenodeids nodes_featureids nodes_hitrates nodes_missing_value_tracks_true nodes_modes nodes_splits "
    "nodes_trueleafs nodes_truenodeids post_transform tree_roots",
}
_AGGREGATES = {
    "AVERAGE": Aggregate.AVERAGE, "SUM": Aggregate.SUM, "MIN": Aggregate.MIN, "MAX": Aggregate.MAX,
}  # fmt: skip


def _points_steps(points: list[float], single: bool) -> tuple[list[float], bool]:
    """Steps of `x is one of points`, and whether numbers below the first step are."""
    steps: list[float] = []
    first = False
    for point in sorted(set(points)):
        if point == -math.inf:
            first = True
        elif steps and steps[-1] == below(point, single):
            steps.pop()
        else:
            steps.append(below(point, single))
        steps.append(point)
    return steps, first


def _member_steps(members: list[float], single: bool) -> tuple[list[float], bool]:
    """Steps of BRANCH_MEMBER. ONNX Runtime compares exactly while members lie in 0 to 30, else it truncates x."""
    if len(members) < 31 and all(0 <= member <= 30 for member in members):
        return _points_steps(members, single)
    steps: list[float] = []
    for k in sorted(set(members)):
        # x truncates to 0 from (-1, 1), to k > 0 from [k, k + 1), to k < 0 from (k - 1, k].
        first = -1.0 if k == 0 else below(k, single) if k > 0 else min(k - 1, below(k, single))
        last = k if k < 0 else max(k, below(k + 1, single))
        if steps and steps[-1] == first:
            steps.pop()
        else:
            steps.append(first)
        steps.append(last)
    return steps, False


def _add_branch(
    form: TreeEnsemble, feature: int, mode: str, values: list[float], true: int, false: int, tracks: bool, single: bool
) -> int:
    """A node of any mode. tracks: NaN takes the true branch; without it NaN takes it under BRANCH_NEQ only."""
    values = [value for value in values if not math.isnan(value)]
    if mode in ("BRANCH_EQ", "BRANCH_MEMBER"):
        steps, first = (_points_steps if mode == "BRANCH_EQ" else _member_steps)(values, single)
        return form.add_node(feature, 0.0, true, false, tracks, steps, first)
    if mode == "BRANCH_NEQ":
        steps, first = _points_steps(values, single)
        return form.add_node(feature, 0.0, false, true, False, steps, first)
    if not values:  # no number compares with NaN
        return form.add_node(feature, 0.0, true, false, tracks, [], False)
    threshold = values[0]
    if mode in ("BRANCH_LT", "BRANCH_GTE"):
        if threshold == -math.inf:
            yes, no, nan = (true, false, tracks) if mode == "BRANCH_LT" else (false, true, not tracks)
            return form.add_node(feature, 0.0, yes, no, nan, [], False)
        threshold = below(threshold, single)
    if mode in ("BRANCH_LEQ", "BRANCH_LT"):
        return form.add_node(feature, threshold, true, false, tracks)
    return form.add_node(feature, threshold, false, true, not tracks)


class _Attributes:
    """The attributes of the ensemble, checked for kind and size."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def has(self, name: str) -> bool:
        value = self.node.attributes.get(name)
        return value is not None and (not hasattr(value, "__len__") or len(value) > 0)

    def _fail(self, name: str, reason: str) -> TreeError:
        return TreeError(f"{self.node.op_type}.{name}: {reason}")

    def integer(self, name: str, default: int) -> int:
        value = self.node.attributes.get(name, default)
        if not isinstance(value, int):
            raise self._fail(name, "expected an integer")
        return value

    def text(self, name: str, default: str) -> str:
        value = self.node.attributes.get(name, default.encode())
        if not isinstance(value, bytes):
            raise self._fail(name, "expected a string")
        return value.decode(errors="replace")

    def integers(self, name: str, size: int | None = None) -> list[int]:
        value = self.node.attributes.get(name)
        if value is None:
            value = np.zeros(0, np.int64)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
            raise self._fail(name, "expected integers")
        if size is not None and len(value) != size:
            raise self._fail(name, f"{len(value)} values, expected {size}")
        numbers: list[int] = value.tolist()
        return numbers

    def reals(self, name: str, size: int | None, double: bool) -> list[float]:
        """name or name_as_tensor, in the ensemble's type."""
        tensor = f"{name}_as_tensor"
        if self.has(name) and self.has(tensor):
            raise self._fail(name, f"and {tensor} are both given")
        value: Any = self.node.attributes.get(tensor if self.has(tensor) else name)
        if value is None:
            value = np.zeros(0, np.float32)
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
            raise self._fail(name, "expected floats")
        if self.has(tensor) and value.dtype != (np.float64 if double else np.float32):
            raise NotATreeModel(f"{tensor} is {value.dtype.name}, the input is not")
        if size is not None and len(value) != size:
            raise self._fail(name, f"{len(value)} values, expected {size}")
        numbers: list[float] = value.astype(np.float64).tolist()
        return numbers

    def texts(self, name: str, size: int | None = None) -> list[str]:
        value = self.node.attributes.get(name)
        if value is None:
            value = []
        if not isinstance(value, list):
            raise self._fail(name, "expected strings")
        if size is not None and len(value) != size:
            raise self._fail(name, f"{len(value)} values, expected {size}")
        return [text.decode(errors="replace") for text in value]


def _add_nodes(form: TreeEnsemble, a: _Attributes, prefix: str, double: bool) -> None:
    """Nodes and leaves of the two operators of ai.onnx.ml 1 to 3."""
    tree_ids = a.integers("nodes_treeids")
    n = len(tree_ids)
    node_ids, features, true_ids, false_ids = (
        a.integers(name, n) for name in ("nodes_nodeids", "nodes_featureids", "nodes_truenodeids", "nodes_falsenodeids")
    )
    modes = a.texts("nodes_modes", n)
    values = a.reals("nodes_values", n, double)
    tracks = a.integers("nodes_missing_value_tracks_true")
    tracks += [0] * (n - len(tracks))
    index: dict[tuple[int, int], int] = {}
    for i, key in enumerate(zip(tree_ids, node_ids)):
        if index.setdefault(key, i) != i:
            raise TreeError(f"tree {key[0]}: node {key[1]} stands twice")
    ids = a.integers(f"{prefix}_ids")
    weights = a.reals(f"{prefix}_weights", len(ids), double)
    leaves: dict[int, list[tuple[int, float]]] = {}
    owners = zip(a.integers(f"{prefix}_treeids", len(ids)), a.integers(f"{prefix}_nodeids", len(ids)))
    for key, target, weight in zip(owners, ids, weights):
        if key not in index:
            raise TreeError(f"tree {key[0]}: {prefix}_nodeids names node {key[1]}, which does not exist")
        leaves.setdefault(index[key], []).append((target, weight))

    # First what every node becomes, then the nodes: a child may stand anywhere in its tree.
    place: list[int] = []
    next_node = 0
    for i, mode in enumerate(modes):
        if mode == _LEAF:
            if i not in leaves:
                raise NotATreeModel(f"tree {tree_ids[i]}: leaf {node_ids[i]} has no weight")
            if form.n_raw == 1 and len(leaves[i]) > 1:
                raise NotATreeModel(f"tree {tree_ids[i]}: leaf {node_ids[i]} has several weights for one target")
            place.append(form.add_leaf(leaves[i]))
        elif mode in _MODES[:6]:
            place.append(next_node)
            next_node += 1
        else:
            raise TreeError(f"tree {tree_ids[i]}: node {node_ids[i]} has mode {mode[:40]!r}")
    met: set[int] = set()
    parents = [0] * n
    children: list[list[int]] = [[] for _ in range(n)]
    for i in range(n):
        if i == 0 or tree_ids[i] != tree_ids[i - 1]:
            if tree_ids[i] in met:
                raise NotATreeModel(f"the nodes of tree {tree_ids[i]} do not stand together")
            met.add(tree_ids[i])
            form.roots.append(place[i])
        if modes[i] == _LEAF:
            continue
        branches = []
        for ids_of in (true_ids, false_ids):
            child = index.get((tree_ids[i], ids_of[i]))
            if child is None:
                raise TreeError(
                    f"tree {tree_ids[i]}: node {node_ids[i]} leads to node {ids_of[i]}, which does not exist"
                )
            branches.append(place[child])
            parents[child] += 1
            children[i].append(child)
        true, false = branches
        _add_branch(form, features[i], modes[i], [values[i]], true, false, tracks[i] == 1, not double)
    shared = max(parents, default=0) > 1
    # What is left when nodes without a parent are taken away, again and again, leads back to itself: no runtime may
    # walk it, for it would not come back.
    free = [i for i in range(n) if parents[i] == 0]
    taken = 0
    while free:
        taken += 1
        for child in children[free.pop()]:
            parents[child] -= 1
            if parents[child] == 0:
                free.append(child)
    if taken < n:
        i = next(i for i in range(n) if parents[i] > 0)
        raise TreeError(f"tree {tree_ids[i]}: node {node_ids[i]} leads back to itself")
    if shared:
        raise NotATreeModel("branches meet again: the graph is no tree")


def _add_nodes_v5(form: TreeEnsemble, a: _Attributes, double: bool) -> None:
    """TreeEnsemble of ai.onnx.ml 5: nodes and leaves are numbered over all trees, leaves have one target each."""
    features = a.integers("nodes_featureids")
    n = len(features)
    modes = a.integers("nodes_modes", n)
    splits = a.reals("nodes_splits", n, double)
    true_ids, false_ids, true_leaf, false_leaf = (
        a.integers(name, n)
        for name in ("nodes_truenodeids", "nodes_falsenodeids", "nodes_trueleafs", "nodes_falseleafs")
    )
    tracks = a.integers("nodes_missing_value_tracks_true")
    tracks += [0] * (n - len(tracks))
    targets = a.integers("leaf_targetids")
    weights = a.reals("leaf_weights", len(targets), double)
    members: dict[int, list[float]] = {}
    pool = a.reals("membership_values", None, double)
    at = 0
    for i, mode in enumerate(modes):
        if not 0 <= mode < len(_MODES):
            raise TreeError(f"TreeEnsemble.nodes_modes[{i}]: {mode}")
        if _MODES[mode] == "BRANCH_MEMBER":
            end = at
            while end < len(pool) and not math.isnan(pool[end]):
                end += 1
            if end == at:
                raise TreeError(f"TreeEnsemble.membership_values: node {i} has no members")
            members[i], at = pool[at:end], end + 1
            if not all(abs(member) < 1 << 31 and member == int(member) for member in members[i]):
                raise NotATreeModel(f"node {i} has members that are no integers")

    def leaf(k: int) -> int:
        if not 0 <= k < len(targets):
            raise TreeError(f"TreeEnsemble: leaf {k}, there are {len(targets)}")
        return form.add_leaf([(targets[k], weights[k])])

    seen = [False] * n
    for tree, root in enumerate(a.integers("tree_roots")):
        if not 0 <= root < n:
            raise TreeError(f"TreeEnsemble.tree_roots[{tree}]: {root}, there are {n} nodes")
        if true_leaf[root] and false_leaf[root] and true_ids[root] == false_ids[root]:
            raise NotATreeModel(f"tree {tree} is a single leaf")
        form.roots.append(len(form.feature))
        # Depth first, with children filled in when they get their place.
        stack = [(root, -1, False)]
        while stack:
            i, parent, side = stack.pop()
            if not 0 <= i < n or seen[i]:
                raise TreeError(f"TreeEnsemble: node {i} {'is used twice' if 0 <= i < n else 'does not exist'}")
            seen[i] = True
            # Children are set below: 0 stands for true, 1 for false, to learn on which side each ended up.
            values = members.get(i, [splits[i]])
            me = _add_branch(form, features[i], _MODES[modes[i]], values, 0, 1, tracks[i] == 1, not double)
            if parent >= 0:
                _set_child(form, parent, side, me)
            swapped = form.yes[me] == 1
            for value, is_leaf, child in ((0, true_leaf[i], true_ids[i]), (1, false_leaf[i], false_ids[i])):
                side = bool(value) != swapped
                if is_leaf:
                    _set_child(form, me, side, leaf(child))
                else:
                    stack.append((child, me, side))


def _set_child(form: TreeEnsemble, node: int, no: bool, child: int) -> None:
    (form.no if no else form.yes)[node] = child


def _find(graph: Graph) -> tuple[Node, int, bool]:
    """The ensemble's node, how many inputs its graph takes, and whether they are float on the way (else double)."""
    found = [node for node in graph.nodes if node.domain == "ai.onnx.ml" and node.op_type in _OPS]
    if len(found) != 1:
        raise NotATreeModel(f"{len(found)} tree ensembles in the graph")
    node = found[0]
    unknown = sorted(node.attributes.keys() - set(_ATTRIBUTES[node.op_type].split()))
    if unknown:
        raise NotATreeModel(f"{node.op_type} has an attribute that the kernel does not know: {unknown[0][:40]!r}")
    if len(node.inputs) != 1 or not node.outputs:
        raise TreeError(f"{node.op_type}: {len(node.inputs)} inputs")
    if any(not 1 <= version <= 5 for domain, version in graph.opsets.items() if domain == "ai.onnx.ml"):
        raise NotATreeModel("ai.onnx.ml is newer than 5")
    makers = {name: other for other in graph.nodes for name in other.outputs if name}
    inputs = {port.name: port for port in graph.inputs if port.name not in graph.initializers}

    # From the ensemble back to the graph's input, through casts.
    name, types, steps = node.inputs[0], [], 0
    while name not in inputs:
        maker = makers.get(name)
        steps += 1
        if maker is None or maker.op_type not in ("Cast", "Identity") or len(maker.inputs) != 1 or steps > 16:
            raise NotATreeModel("the ensemble's input is computed from the graph's")
        if maker.op_type == "Cast":
            types.append(maker.attributes.get("to"))
        name = maker.inputs[0]
    port = inputs[name]
    if len(inputs) != 1:
        raise NotATreeModel(f"the graph takes {len(inputs)} inputs")
    types.append(port.element)
    if any(kind not in (FLOAT, DOUBLE) for kind in types):
        raise NotATreeModel("inputs are neither float nor double")
    if len(port.dims) != 2 or port.dims[1] is None or not 0 < port.dims[1] <= MOST_INPUTS:
        raise NotATreeModel(f"the graph does not say how many inputs it takes, 1 to {MOST_INPUTS}")

    # From the ensemble on: scores may only be passed on; what follows from the label alone is not read.
    classifier = node.op_type == "TreeEnsembleClassifier"
    scores = {node.outputs[-1]} if not classifier or len(node.outputs) > 1 else set()
    labels = {node.outputs[0]} if classifier else set()
    for other in graph.nodes:
        read = set(other.inputs)
        if read & scores:
            others = [graph.initializers.get(name) for name in other.inputs if name not in scores]
            passes = (
                other.op_type in ("Identity", "ZipMap")
                or (other.op_type == "Cast" and other.attributes.get("to") == FLOAT)
                or (other.op_type == "Mul" and others == [1])  # onnxmltools puts this under LightGBM's probabilities
            )
            if not passes or len(other.inputs) - len(others) != 1:
                raise NotATreeModel(f"{other.op_type} changes the scores")
            scores |= set(other.outputs)
        elif read & labels:
            labels |= set(other.outputs)
    outputs = {port.name for port in graph.outputs}
    if not outputs & scores:
        raise NotATreeModel("the graph does not give the scores")
    if outputs - scores - labels:
        raise NotATreeModel("the graph gives more than labels and scores")
    if types[0] == DOUBLE and node.op_type == "TreeEnsemble" and len(scores) > 1:
        raise NotATreeModel("scores are cast")
    node.attributes["ps:rounded"] = FLOAT in types
    return node, port.dims[1], types[0] == DOUBLE


def parse_onnx(data: bytes) -> TreeEnsemble:
    """The one tree ensemble of an ONNX model. Raises TreeError where the file is damaged, NotATreeModel where the graph
    holds something else."""
    node, n_inputs, double = _find(read_graph(data))
    a = _Attributes(node)
    form = TreeEnsemble(n_inputs, 1, 1, room=room_of(len(data)))
    form.round_input = bool(node.attributes["ps:rounded"])
    form.accumulate32 = not double
    form.transform = Transform.ONNX_REGRESSOR
    form.onnx_output32 = node.op_type != "TreeEnsemble" or not double
    if node.op_type == "TreeEnsemble":
        form.n_raw = form.n_outputs = a.integer("n_targets", 0)
        aggregates = (Aggregate.AVERAGE, Aggregate.SUM, Aggregate.MIN, Aggregate.MAX)
        aggregate, post = a.integer("aggregate_function", 1), a.integer("post_transform", 0)
        if not (0 <= aggregate < 4 and 0 <= post < 5):
            raise TreeError(f"TreeEnsemble: aggregate_function {aggregate}, post_transform {post}")
        # ONNX Runtime numbers LOGISTIC 1 and SOFTMAX 2, the specification the reverse: scores follow the former.
        form.aggregate, form.onnx_post = aggregates[aggregate], (0, 2, 1, 3, 4)[post]
    else:
        post_name = a.text("post_transform", "NONE")
        if post_name not in _POSTS:
            raise TreeError(f"{node.op_type}.post_transform: {post_name[:40]!r}")
        form.onnx_post = _POSTS[post_name]
        if node.op_type == "TreeEnsembleRegressor":
            form.n_raw = form.n_outputs = a.integer("n_targets", 0)
            aggregate_name = a.text("aggregate_function", "SUM")
            if aggregate_name not in _AGGREGATES:
                raise TreeError(f"{node.op_type}.aggregate_function: {aggregate_name[:40]!r}")
            form.aggregate = _AGGREGATES[aggregate_name]
        else:
            labels = a.texts("classlabels_strings") or a.integers("classlabels_int64s")
            form.n_raw = form.n_outputs = len(labels)
            if len(labels) < 2:
                raise NotATreeModel(f"a classifier of {len(labels)} classes")
            form.transform = Transform.ONNX_CLASSIFIER
            form.onnx_binary = len(labels) == 2 and len(set(a.integers("class_ids"))) == 1
    if not 0 < form.n_raw < 1 << 20:
        raise TreeError(f"{node.op_type}: {form.n_raw} targets")
    if node.op_type == "TreeEnsemble":
        _add_nodes_v5(form, a, double)
    else:
        classifier = form.transform == Transform.ONNX_CLASSIFIER
        form.base = a.reals("base_values", None, double)
        few = classifier and form.n_raw == 2
        if len(form.base) not in ((0, 1, 2) if few else (0, form.n_raw)):
            raise TreeError(f"{node.op_type}.base_values: {len(form.base)} values for {form.n_raw} targets")
        _add_nodes(form, a, "class" if classifier else "target", double)
        form.onnx_all_positive = classifier and not any(weight < 0 for weight in form.weight)
    if not form.roots:
        raise TreeError(f"{node.op_type}: there are no trees")
    form.divisor = float(len(form.roots))
    return form
