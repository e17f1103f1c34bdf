"""The app of the overload row: the fraud app's event and features, decided by a perceptron that takes over 200 us."""

from penstock import Aggregation, Event, FeatureView, Pipeline, Rule, Timestamp, on_demand_feature_view


class Transaction(Event):
    customer: str
    terminal: str
    amount: float
    at: Timestamp


class FraudLabel(Event):
    """What became of a transaction, known a week after it."""

    terminal: str
    fraud: float
    at: Timestamp


WINDOWS = ["1d", "7d", "30d"]

spend = FeatureView(
    "spend",
    entity="customer",
    source=Transaction,
    include_request_event=True,
    aggregations=[Aggregation("count", windows=WINDOWS), Aggregation("mean", "amount", windows=WINDOWS)],
)

terminal_risk = FeatureView(
    "terminal_risk",
    entity="terminal",
    source=FraudLabel,
    aggregations=[
        Aggregation("count", windows=WINDOWS),
        Aggregation("mean", "fraud", windows=WINDOWS, default=0.0),
    ],
)


@on_demand_feature_view
def weekend(at: Timestamp) -> bool:
    return at.weekday >= 5


@on_demand_feature_view
def night(at: Timestamp) -> bool:
    return at.hour <= 6


fraud = Pipeline(
    "fraud",
    event=Transaction,
    features=["amount", weekend, night, spend, terminal_risk],
    model="fraud_deep@1",
    rules=[Rule("sure", when="score > 0.9", action="decline", reason="the model is sure")],
)
