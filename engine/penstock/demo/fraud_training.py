"""The fraud app without models: its replay gives the training set (the same views and functions as fraud.py)."""

from penstock import Pipeline
from penstock.demo.fraud import Transaction, night, spend, terminal_risk, weekend

training = Pipeline(
    "training",
    event=Transaction,
    features=["amount", weekend, night, spend, terminal_risk],
)
