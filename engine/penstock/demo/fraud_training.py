"""The fraud app without models: its replay gives the training set (the same views and functions as fraud.py)."""

from penstock import Pipeline
from penstock.demo.fraud import INPUTS, FraudLabel, Transaction, night, spend, terminal_risk, weekend

__all__ = ["INPUTS", "FraudLabel", "Transaction", "training"]

training = Pipeline(
    "training",
    event=Transaction,
    features=["amount", weekend, night, spend, terminal_risk],
)
