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
from .errors import (
    DefinitionError,
    EngineError,
    EventError,
    InProgress,
    LogError,
    PenstockError,
    ReplayNeeded,
    ScoringError,
)
from .timestamp import Timestamp

if TYPE_CHECKING:
    from ._ext.decision import Decision
    from .client import AsyncClient, Client
    from .engine import Engine, FeatureRows
    from .offline.asof import FeatureTable, asof_join, asof_join_files
    from .offline.options import LogOptions
    from .offline.parity import ParityReport, parity
    from .offline.replay import backfill
    from .offline.training import training_set

__version__ = "0.1.0"

__all__ = [
    "Aggregation",
    "AsyncClient",
    "ByArm",
    "Client",
    "Decision",
    "DefinitionError",
    "Engine",
    "EngineError",
    "Entity",
    "Event",
    "EventError",
    "Experiment",
    "FeatureRows",
    "FeatureTable",
    "FeatureView",
    "InProgress",
    "Lifetime",
    "LogError",
    "LogOptions",
    "Model",
    "OnDemandFeatureView",
    "ParityReport",
    "PenstockError",
    "Pipeline",
    "ReplayNeeded",
    "Rule",
    "ScoringError",
    "Timestamp",
    "asof_join",
    "asof_join_files",
    "backfill",
    "by_arm",
    "on_demand_feature_view",
    "parity",
    "training_set",
]

# Imported when first asked for: an app that only defines things does not wait for numpy, the kernels or sockets.
_LATER = {
    "AsyncClient": "client",
    "Client": "client",
    "Decision": "_ext.decision",
    "Engine": "engine",
    "FeatureRows": "engine",
    "FeatureTable": "offline.asof",
    "LogOptions": "offline.options",
    "ParityReport": "offline.parity",
    "asof_join": "offline.asof",
    "asof_join_files": "offline.asof",
    "backfill": "offline.replay",
    "parity": "offline.parity",
    "training_set": "offline.training",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        from importlib import import_module

        return getattr(import_module(f".{_LATER[name]}", __name__), name)
    raise AttributeError(f"module 'penstock' has no attribute {name!r}")
