"""A small app for the tests of the server: no model, so that it needs nothing beside the core."""

from penstock import (
    Aggregation,
    Event,
    Experiment,
    FeatureView,
    Pipeline,
    Rule,
    Timestamp,
)


class Transaction(Event):
    customer: str
    terminal: str
    amount: float
    at: Timestamp
    note: str | None = None


class Login(Event):
    customer: str
    tries: int
    at_ms: Timestamp(unit="ms")  # type: ignore[valid-type]


spend = FeatureView(
    "spend",
    entity="customer",
    source=Transaction,
    include_request_event=True,
    aggregations=[
        Aggregation("count", windows=["1d", "7d"]),
        Aggregation("mean", "amount", windows=["1d", "7d"]),
    ],
)

logins = FeatureView(
    "logins", entity="customer", source=Login, aggregations=[Aggregation("sum", "tries", windows=["1h"])]
)

fraud = Pipeline(
    "fraud",
    event=Transaction,
    features=["amount", spend],
    experiments=[Experiment("challenger", unit="customer", arms={"a": 0.5, "b": 0.5})],
    rules=[
        Rule("big", when="amount > 1000", action="decline", reason="too much"),
        Rule("burst", when="spend.count_1d > 30", action="review", reason="unusual activity"),
    ],
)
