"""What a user writes in an app: typed values without behaviour. `penstock.plan` checks them and compiles them."""

from .durations import Lifetime
from .event import Event
from .experiment import ByArm, Experiment, by_arm
from .feature_view import Aggregation, Entity, FeatureView
from .pipeline import Model, OnDemandFeatureView, Pipeline, Rule, on_demand_feature_view

__all__ = [
    "Aggregation",
    "ByArm",
    "Entity",
    "Event",
    "Experiment",
    "FeatureView",
    "Lifetime",
    "Model",
    "OnDemandFeatureView",
    "Pipeline",
    "Rule",
    "by_arm",
    "on_demand_feature_view",
]
