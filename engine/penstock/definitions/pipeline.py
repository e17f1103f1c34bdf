"""On-demand features, models, rules and pipelines (control path): typed values that say how an event is scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import msgspec

from .event import Event
from .experiment import ByArm, Experiment
from .feature_view import FeatureView

__all__ = ["Model", "OnDemandFeatureView", "Pipeline", "Rule", "on_demand_feature_view"]


class OnDemandFeatureView(msgspec.Struct, frozen=True):
    """A Python function of other features, computed when an event is scored.

    Parameters are named after the features they take, with `__` for the dot: `spend__mean_amount_7d`. Their
    annotations, and the return annotation, are float, int, bool or Timestamp (and str with mode="python").
    """

    name: str
    function: Callable[..., Any]
    mode: Literal["native", "python"] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The plain Python function, for tests and notebooks."""
        return self.function(*args, **kwargs)


@overload
def on_demand_feature_view(function: Callable[..., Any], /) -> OnDemandFeatureView: ...
@overload
def on_demand_feature_view(
    *, name: str | None = None, mode: Literal["native", "python"] | None = None
) -> Callable[[Callable[..., Any]], OnDemandFeatureView]: ...


def on_demand_feature_view(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    mode: Literal["native", "python"] | None = None,
) -> Any:
    """Declare a function as an on-demand feature; its name is the function's unless `name` is given.

    mode="native" compiles it when the app is loaded, and refuses what cannot be compiled; mode="python" calls Python.
    Left out, it is compiled where Numba is installed (extra `functions`), and called in Python where it is not: slower,
    with the same results but where a 64-bit integer overflows or a math function is outside its domain.
    """

    def declare(fn: Callable[..., Any]) -> OnDemandFeatureView:
        return OnDemandFeatureView(name or fn.__name__, fn, mode)

    return declare if function is None else declare(function)


class _ModelFields(msgspec.Struct, frozen=True):
    ref: str


class Model(_ModelFields, frozen=True, kw_only=True):
    """A model in the model folder: `name@version` or `name@alias`.

    inputs: the features it takes, in its order; left out, the names stored in the model file.
    output: which of its outputs is the score (index); left out, the only one, or class 1 of two.
    """

    inputs: Sequence[str] | None = None
    output: int | None = None


class Rule(msgspec.Struct, frozen=True):
    """An action that is taken where an expression over features, arms and scores is true; unknown does not fire."""

    name: str
    when: str
    action: str
    reason: str | None = None


class _PipelineFields(msgspec.Struct, frozen=True):
    name: str


class Pipeline(_PipelineFields, frozen=True, kw_only=True):
    """How an event of one type becomes a decision.

    features: names of event fields, feature views, single features ("spend.count_1d"), on-demand features;
        in this order they are the columns of a training set.
    model: the model whose score decides, or `by_arm(...)`; models: others that score beside it, each its own slot.
    rules: the first that fires gives the action; the reasons of all that fire are in the decision.
    default_action: the action where no rule fires.
    fallback: the action where a function or model fails; left out, scoring such an event is an error. A model that
        gives no score (NaN) has failed.
    on_degraded: what a decision is whose features cannot all be known (status INVALID: the event is older than state
        reaches back, or a value is beyond the double range), or whose event was late or quarantined: "fallback",
        "score" (models and rules decide as ever; a rule may ask `degraded`), or an action. Left out, the fallback if
        there is one, else as "score" (S17).
    """

    event: type[Event]
    features: Sequence[str | FeatureView | OnDemandFeatureView] = ()
    experiments: Sequence[Experiment] = ()
    model: str | Model | ByArm | None = None
    models: Sequence[str | Model] = ()
    rules: Sequence[Rule] = ()
    default_action: str = "approve"
    fallback: str | None = None
    on_degraded: str | None = None
