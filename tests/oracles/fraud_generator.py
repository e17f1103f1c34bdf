"""The fraud simulator, slow and obvious: global seeds, one dict per row, pandas' own sampling, whole-list scans."""

import random

import numpy as np
import pandas as pd


def customer_profiles(n: int) -> list[dict]:
    np.random.seed(0)
    profiles = []
    for customer in range(n):
        x = np.random.uniform(0, 100)
        y = np.random.uniform(0, 100)
        mean_amount = np.random.uniform(5, 100)
        per_day = np.random.uniform(0, 4)
        profiles.append({"customer": customer, "x": x, "y": y, "mean": mean_amount, "per_day": per_day})
    return profiles


def terminal_profiles(n: int) -> list[dict]:
    np.random.seed(1)
    return [{"terminal": t, "x": np.random.uniform(0, 100), "y": np.random.uniform(0, 100)} for t in range(n)]


def customer_transactions(profile: dict, terminals: list[dict], days: int, radius: float = 5.0) -> list[dict]:
    near = [
        t["terminal"]
        for t in terminals
        if np.sqrt((t["x"] - profile["x"]) ** 2 + (t["y"] - profile["y"]) ** 2) < radius
    ]
    random.seed(profile["customer"])
    np.random.seed(profile["customer"])
    rows = []
    for day in range(days):
        for _ in range(np.random.poisson(profile["per_day"])):
            second = int(np.random.normal(86400 / 2, 20000))
            if not 0 < second < 86400:
                continue
            amount = np.random.normal(profile["mean"], profile["mean"] / 2)
            if amount < 0:
                amount = np.random.uniform(0, profile["mean"] * 2)
            if near:
                rows.append(
                    {
                        "second": day * 86400 + second,
                        "day": day,
                        "customer": profile["customer"],
                        "terminal": random.choice(near),
                        "amount": float(np.round(amount, 2)),
                        "fraud": 0,
                        "scenario": 0,
                    }
                )
    return rows


def transactions(days: int, customers: int, terminals: int) -> list[dict]:
    places = terminal_profiles(terminals)
    rows = [r for p in customer_profiles(customers) for r in customer_transactions(p, places, days)]
    rows.sort(key=lambda r: r["second"])  # stable
    for row in rows:
        if row["amount"] > 220:
            row.update(fraud=1, scenario=1)
    last_day = max(r["day"] for r in rows)
    for day in range(last_day):
        hit = set(pd.Series(range(terminals)).sample(n=2, random_state=day))
        for row in rows:
            if day <= row["day"] < day + 28 and row["terminal"] in hit:
                row.update(fraud=1, scenario=2)
    for day in range(last_day):
        hit = set(pd.Series(range(customers)).sample(n=3, random_state=day))
        candidates = [i for i, r in enumerate(rows) if day <= r["day"] < day + 14 and r["customer"] in hit]
        random.seed(day)
        for i in random.sample(candidates, k=int(len(candidates) / 3)):
            rows[i].update(fraud=1, scenario=3, amount=rows[i]["amount"] * 5)
    return rows
