"""Experiment and by_arm: how units are split over arms, and what is chosen by arm (control path).

Values without behaviour; `penstock.experiments.assignment` checks and compiles them. Hash, salt and weights of an
experiment are the assignment: editing one of them while it runs moves units between arms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

__all__ = ["ByArm", "Experiment", "by_arm"]


class _ExperimentFields(msgspec.Struct, frozen=True):
    name: str


class Experiment(_ExperimentFields, frozen=True, kw_only=True):
    """Units split over arms by a hash, the same arm for the same unit for ever, on every node.

    unit: the event field whose value is hashed, a str (its UTF-8 bytes) or an int (its decimal text).
    arms: name -> weight; the weights sum to 1. Their order counts: the ranges are cut in it.
    hash: whose assignment this is; `penstock.experiments.assignment.HASHES` lists the names with their formulas.
    coverage: the share of the units that takes part at all; the others have no arm (null).
    salt: what is hashed with the unit; the name, if left out. It is what the vendor hashes there: GrowthBook's seed or
        key, Optimizely's experiment id, LaunchDarkly's "key.salt" or seed, PlanOut's "experiment.variable", ...
    coverage_salt: the salt of the coverage hash; left out, the vendor's own form, or salt + ".coverage".
    """

    unit: str
    arms: Mapping[str, float]
    hash: str = "growthbook-v2"
    coverage: float = 1.0
    salt: str | None = None
    coverage_salt: str | None = None


class ByArm(msgspec.Struct, frozen=True):
    """One value per arm of an experiment, and one for units outside it: models, or parameters. Made by `by_arm`."""

    experiment: str
    values: Mapping[str, Any]
    otherwise: Any = None


def by_arm(experiment: str | Experiment, /, *, otherwise: Any = None, **values: Any) -> ByArm:
    """`by_arm("challenger", tree="fraud@1", xgb="fraud@2")`: the value of the arm that the unit has.

    otherwise: for units that are not in the experiment; needed where its coverage is below 1 or the unit may be None.
    """
    return ByArm(experiment if isinstance(experiment, str) else experiment.name, values, otherwise)
