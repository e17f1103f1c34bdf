"""The app of the engine and HTTP rows: 15 features of two entities, a split between two 100-tree models, rules.

The shape is the demo's fraud app; the models are LightGBM's, trained on a seeded stream by app/train.py.
"""

from penstock import (
    Aggregation,
    Event,
    Experiment,
    FeatureView,
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


fraud = Pipeline(
    "fraud",
    event=Transaction,
    features=["amount", weekend, night, spend, terminal_risk],
    experiments=[Experiment("challenger", unit="customer", arms={"champion": 0.5, "challenger": 0.5})],
    model=by_arm("challenger", champion="fraud_trees@1", challenger="fraud_trees@2"),
    rules=[
        Rule("sure", when="score > 0.9", action="decline", reason="the model is sure"),
        Rule("likely", when="score > 0.3", action="review", reason="the model suspects fraud"),
        Rule("burst", when="spend.count_1d > 12", action="review", reason="unusual activity"),
        Rule("large", when="amount > 250 and spend.mean_amount_30d < 50", action="review", reason="far above usual"),
    ],
)
