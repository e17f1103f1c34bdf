"""An app for the tests of the client: an event with an id and one without, keys of both types, every type of field."""

from penstock import Aggregation, Event, Experiment, FeatureView, Pipeline, Rule, Timestamp, on_demand_feature_view


class Payment(Event, event_id="payment", time="at"):
    payment: str
    customer: str
    shop: int
    amount: float
    at: Timestamp
    online: bool = False
    note: str | None = None


class Visit(Event):
    customer: str
    pages: int
    at: Timestamp(unit="ms")  # type: ignore[valid-type]


spend = FeatureView(
    "spend",
    entity="customer",
    source=Payment,
    include_request_event=True,
    aggregations=[Aggregation("count", windows=["1d"]), Aggregation("mean", "amount", windows=["1d"])],
)

shops = FeatureView("shops", entity="shop", source=Payment, aggregations=[Aggregation("sum", "amount", windows=["1d"])])


@on_demand_feature_view(mode="python")
def third(amount: float) -> float:
    return amount / 3


@on_demand_feature_view(mode="python")
def label(customer: str) -> str:
    return "label " + customer


pay = Pipeline(
    "pay",
    event=Payment,
    features=["amount", "note", "at", third, label, spend, shops],
    experiments=[Experiment("limit", unit="customer", arms={"low": 0.5, "high": 0.5})],
    rules=[Rule("big", when="amount > 1000", action="decline", reason="too much")],
)

visit = Pipeline("visit", event=Visit, features=["pages"], rules=[Rule("many", when="pages > 10", action="review")])
