"""The app of the log's tests: two event types, ids, a late-prone source, string and integer keys, rules, a split."""

from penstock import (
    Aggregation,
    Event,
    Experiment,
    FeatureView,
    Pipeline,
    Rule,
    Timestamp,
    on_demand_feature_view,
)


class Order(Event, event_id="id", lateness="10m"):
    id: str
    customer: str
    shop: int
    amount: float
    note: str | None
    at: Timestamp


class Login(Event):
    customer: str
    ok: bool
    at: Timestamp


spend = FeatureView(
    "spend",
    entity="customer",
    source=Order,
    include_request_event=True,
    aggregations=[
        Aggregation("count", windows=["1h", "1d"]),
        Aggregation("mean", "amount", windows=["1d"], default=-1.0),
        Aggregation("last", "note", windows=["1d"]),
    ],
)
shops = FeatureView(
    "shops",
    entity="shop",
    source=Order,
    aggregations=[
        Aggregation("count", windows=["1h"]),
        Aggregation("sum", "amount", windows=["1d"]),
        Aggregation("last", "amount", windows=["1d"]),
    ],
)
logins = FeatureView(
    "logins", entity="customer", source=Login, aggregations=[Aggregation("count", windows=["1d"], where="not ok")]
)


@on_demand_feature_view(mode="python")
def dear(amount: float, spend__mean_amount_1d: float) -> bool:
    return amount > 2 * spend__mean_amount_1d


orders = Pipeline(
    "orders",
    event=Order,
    features=["amount", dear, spend, shops, logins],
    experiments=[Experiment("limit", unit="customer", arms={"low": 0.5, "high": 0.5})],
    rules=[
        Rule("burst", when="spend.count_1h > 5", action="decline", reason="too many"),
        Rule("doubt", when="logins.count_1d > 2 and limit == 'low'", action="review"),
    ],
)
