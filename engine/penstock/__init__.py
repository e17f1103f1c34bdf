"""Penstock: an event in, a decision out. `from penstock import ...` gives what an app is written with, and Engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .definitions import (
    Aggregation,
    ByArm,
    Entity,
    Event,
    Experiment,
    FeatureView,
    Lifetime,
    Model,
    OnDemandFeatureView,
    Pipeline,
    Rule,
    by_arm,
    on_demand_feature_view,
)
from .errors import DefinitionError, EngineError, EventError, PenstockError, ReplayNeeded, ScoringError
from .timestamp import Timestamp

if TYPE_CHECKING:
    from ._ext.decision import Decision
    from .engine import Engine, FeatureRows

__version__ = "0.1.0"

__all__ = [
    "Aggregation",
    "ByArm",
    "Decision",
    "DefinitionError",
    "Engine",
    "EngineError",
    "Entity",
    "Event",
    "EventError",
    "Experiment",
    "FeatureRows",
    "FeatureView",
    "Lifetime",
    "Model",
    "OnDemandFeatureView",
    "PenstockError",
    "Pipeline",
    "ReplayNeeded",
    "Rule",
    "ScoringError",
    "Timestamp",
    "by_arm",
    "on_demand_feature_view",
]


def __getattr__(name: str) -> Any:
    # The engine imports numpy and the kernels; an app that only defines things does not wait for them.
    if name in ("Engine", "FeatureRows"):
        from . import engine

        return getattr(engine, name)
    if name == "Decision":
        from ._ext.decision import Decision

        return Decision
    raise AttributeError(f"module 'penstock' has no attribute {name!r}")
