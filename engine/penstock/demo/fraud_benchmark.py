"""The fraud app with the handbook's five models side by side: its replay gives every model's score of every row."""

from penstock import Model, Pipeline
from penstock.demo.fraud import INPUTS, FraudLabel, Transaction, night, spend, terminal_risk, weekend

__all__ = ["MODELS", "FraudLabel", "Transaction", "benchmark"]

MODELS = {key: f"fraud_{key}@1" for key in ("logistic", "tree2", "tree", "forest", "xgboost")}

benchmark = Pipeline(
    "benchmark",
    event=Transaction,
    features=["amount", weekend, night, spend, terminal_risk],
    models=[Model(ref, inputs=INPUTS) for ref in MODELS.values()],
)
