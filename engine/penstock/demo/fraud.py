"""The fraud app: what a user of Penstock writes, and what `penstock demo` serves at its end.

A transaction is scored by one of two models, split over customers; fraud labels arrive 7 days after the transaction.
"""

from penstock import (
    Aggregation,
    Event,
    Experiment,
    FeatureView,
    Model,
    Pipeline,
    Rule,
    Timestamp,
    by_arm,
    on_demand_feature_view,
)


class Transaction(Event):
    customer: str
    terminal: str
    amount: float
    at: Timestamp


class FraudLabel(Event):
    """What became of a transaction; `at` is when it is known, the transaction's time + 7 days."""

    terminal: str
    fraud: float
    at: Timestamp


WINDOWS = ["1d", "7d", "30d"]

spend = FeatureView(
    "spend",
    entity="customer",
    source=Transaction,
    include_request_event=True,
    aggregations=[
        Aggregation("count", windows=WINDOWS),
        Aggregation("mean", "amount", windows=WINDOWS),
    ],
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


# The models' inputs, in the order in which the demo trains them.
INPUTS = [
    "amount",
    "weekend",
    "night",
    *(f"spend.{name}_{w}" for w in WINDOWS for name in ("count", "mean_amount")),
    *(f"terminal_risk.{name}_{w}" for w in WINDOWS for name in ("count", "mean_fraud")),
]

fraud = Pipeline(
    "fraud",
    event=Transaction,
    features=["amount", weekend, night, spend, terminal_risk],
    experiments=[Experiment("challenger", unit="customer", arms={"xgboost": 0.5, "logistic": 0.5})],
    model=by_arm(
        "challenger",
        xgboost=Model("fraud_xgboost@1", inputs=INPUTS),
        logistic=Model("fraud_logistic@1", inputs=INPUTS),
    ),
    rules=[
        Rule("sure", when="score > 0.9", action="decline", reason="the model is sure"),
        Rule("likely", when="score > 0.3", action="review", reason="the model suspects fraud"),
        Rule("burst", when="spend.count_1d > 12", action="review", reason="unusual activity"),
    ],
)
