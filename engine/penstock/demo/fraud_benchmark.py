"""The fraud app with one of the handbook's five models in place of the experiment (the same views and functions)."""

from typing import Any

from penstock import Model, Pipeline
from penstock.demo.fraud import INPUTS, Transaction, night, spend, terminal_risk, weekend


def app(key: str) -> dict[str, Any]:
    """An app whose pipeline "benchmark" scores with the model `fraud_<key>@1`."""
    pipeline = Pipeline(
        "benchmark",
        event=Transaction,
        features=["amount", weekend, night, spend, terminal_risk],
        model=Model(f"fraud_{key}@1", inputs=INPUTS),
    )
    return {"benchmark": pipeline}
