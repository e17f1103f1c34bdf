"""The shared form of a tree ensemble, which every loader makes and the kernel reads (control path).

Flat arrays, one kind of node: x <= threshold goes yes. What else a library can ask of a value (less than, equality, a
set of categories, zero as missing) is a step function of x, and stands as sorted steps. Nothing is rounded on the way:
a threshold or weight here is the number the library compares or adds.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

__all__ = [
    "MOST_INPUTS",
    "Aggregate",
    "NotATreeModel",
    "Transform",
    "TreeEnsemble",
    "TreeError",
    "TreePorts",
    "below",
    "room_of",
]


class TreeError(ValueError):
    """A damaged or unsupported model file; the text says where and why, without the file's name."""


class NotATreeModel(Exception):
    """A well-formed ONNX file that holds something else than one tree ensemble: it belongs to another runtime."""


class TreePorts(msgspec.Struct, frozen=True):
    """Inputs and outputs as the file has them: name, datatype of the Open Inference Protocol, columns.

    label: the output of an ONNX classifier that gives a class per row; labels: the classes, integers or texts.
    """

    input: tuple[str, str, int]
    output: tuple[str, str, int]
    label: str | None = None
    labels: list[int | str] | None = None


class Aggregate:
    """Numbers of enum ps_trees_aggregate."""

    SUM, AVERAGE, MIN, MAX = range(4)


class Transform:
    """Numbers of enum ps_trees_transform."""

    IDENTITY, SIGMOID, SOFTMAX, EXP, LOG1P_EXP, SIGNED_SQUARE = range(6)
    SIGMOID_F32, SOFTMAX_F32, EXP_F32, ARGMAX, HINGE, SORTED, ADDED_UP_F32 = range(6, 13)
    ONNX_REGRESSOR, ONNX_CLASSIFIER = range(13, 15)


def below(x: float, single: bool) -> float:
    """The next number below x: of float32 when single, else of float64. So that v < x is v <= below(x)."""
    if single:
        return float(np.nextafter(np.float32(x), np.float32(-np.inf)))
    return math.nextafter(x, -math.inf)


MOST_INPUTS = 1 << 20  # a row is kept twice, as doubles


@dataclass(slots=True)
class TreeEnsemble:
    """Nodes, leaves and weights of all trees, in tree order. Fields are those of ps_trees_form in ext/tree_kernel.h.

    A child is a node's index, or -1 - leaf. Lists are filled by add_node and add_leaf; the kernel checks that every
    tree is one, so a loader need not.
    """

    n_inputs: int
    n_raw: int
    n_outputs: int
    feature_names: list[str] | None = None
    room: int = field(
        default=1 << 62, compare=False
    )  # how many more steps and weights there may be: what a file of its size can say
    warning: str = ""  # what whoever loads it should know
    roots: list[int] = field(default_factory=list)
    feature: list[int] = field(default_factory=list)
    threshold: list[float] = field(default_factory=list)
    yes: list[int] = field(default_factory=list)
    no: list[int] = field(default_factory=list)
    nan_yes: list[bool] = field(default_factory=list)
    steps_begin: list[int] = field(default_factory=lambda: [0])
    steps: array[float] = field(default_factory=lambda: array("d"))
    steps_first: list[bool] = field(default_factory=list)
    weight_begin: list[int] = field(default_factory=lambda: [0])
    weight_target: list[int] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    base: list[float] = field(default_factory=list)
    round_input: bool = False  # compare in float32
    accumulate32: bool = False
    base_first: bool = False
    aggregate: int = Aggregate.SUM
    transform: int = Transform.IDENTITY
    onnx_post: int = 0
    onnx_binary: bool = False
    onnx_all_positive: bool = False
    onnx_output32: bool = False
    slope: float = 1.0
    divisor: float = 1.0

    def add_node(
        self,
        feature: int,
        threshold: float,
        yes: int,
        no: int,
        nan_yes: bool,
        steps: Sequence[float] | None = None,
        steps_first: bool = False,
    ) -> int:
        """A node that says yes to x <= threshold; or, given steps, whether steps_first flipped once per step < x."""
        if steps is not None and len(steps) == 1 and steps_first:
            threshold, steps = steps[0], None
        elif steps is not None and not steps:
            # The same answer for every number: yes below +inf, or a step that nothing is below.
            threshold = math.inf
            if not steps_first:
                yes, no, nan_yes = no, yes, not nan_yes
            steps = None
        self.feature.append(feature)
        self.threshold.append(threshold if steps is None else 0.0)
        self.yes.append(yes)
        self.no.append(no)
        self.nan_yes.append(nan_yes)
        if steps is not None:
            self.steps.extend(steps)
        self.steps_begin.append(len(self.steps))
        self.steps_first.append(steps_first)
        return len(self.feature) - 1

    def add_leaf(self, weights: list[tuple[int, float]]) -> int:
        """A leaf that adds each weight to its target. Returns the child value that stands for it."""
        for target, weight in weights:
            self.weight_target.append(target)
            self.weight.append(weight)
        self.weight_begin.append(len(self.weight))
        return 1 - len(self.weight_begin)

    def expect(self, count: int, where: str) -> None:
        """Makes sure that so many steps or weights more are what a file of its size can say. Numbers that stand in it
        once may be named by many nodes: a few bytes are not to become gigabytes. Raises TreeError."""
        self.room -= count
        if self.room < 0:
            raise TreeError(
                f"{where}: its categories, or its leaf's values, are those of many nodes; together they are more than "
                "a file of this size holds: write them once for every node"
            )


def room_of(size: int) -> int:
    """TreeEnsemble.room of a file: no format says more than three numbers in a byte (bits of sets of categories)."""
    return 4 * size + 1000
