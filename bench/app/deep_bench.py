"""The app of the overload row: the fraud app's event and features, decided by a perceptron that takes over 200 us."""

from penstock import Aggregation, Event, FeatureView, Model, Pipeline, Rule, Timestamp, on_demand_feature_view


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


# The file names no features: they are told here, in the order of the columns.
INPUTS = [
    *("amount", "weekend", "night"),
    *(f"spend.{f}_{w}" for f in ("count", "mean_amount") for w in WINDOWS),
    *(f"terminal_risk.{f}_{w}" for f in ("count", "mean_fraud") for w in WINDOWS),
]

fraud = Pipeline(
    "fraud",
    event=Transaction,
    features=["amount", weekend, night, spend, terminal_risk],
    model=Model("fraud_deep@1", inputs=INPUTS),
    rules=[Rule("sure", when="score > 0.9", action="decline", reason="the model is sure")],
)
