"""An app for the tests of queues: the same event scored at once, slowly on the loop, and very slowly."""

import time

from penstock import Aggregation, Event, FeatureView, Pipeline, Timestamp, on_demand_feature_view


class Ask(Event):
    customer: str
    n: int
    at: Timestamp


def work(seconds: float) -> int:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
    return 1


@on_demand_feature_view(mode="python")
def slowly(n: int) -> int:
    return work(0.0004)


@on_demand_feature_view(mode="python")
def very_slowly(n: int) -> int:
    return work(0.004)


@on_demand_feature_view(mode="python")
def fragile(n: int) -> int:
    if n % 2:
        raise ValueError("odd")
    return work(0.0004)


asked = FeatureView(
    "asked",
    entity="customer",
    source=Ask,
    include_request_event=True,
    aggregations=[Aggregation("count", windows=["1d"])],
)

fast = Pipeline("fast", event=Ask, features=["n", asked])
slow = Pipeline("slow", event=Ask, features=["n", asked, slowly])
slower = Pipeline("slower", event=Ask, features=["n", asked, very_slowly])
broken = Pipeline("broken", event=Ask, features=["n", asked, fragile])
