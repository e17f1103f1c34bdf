"""Locust users that score transactions over HTTP, one event a request or a few at once.

locust -f bench/load/locustfile_http.py --host http://127.0.0.1:8000 [--headless -u 50 -r 50 -t 30s]
The app must have a pipeline "fraud" whose event has customer, terminal, amount, at: bench/app/fraud_bench.py.
"""

from __future__ import annotations

import random
from datetime import UTC, datetime
from typing import Any

from locust import FastHttpUser, constant_throughput, task


def transaction() -> dict[str, Any]:
    """A transaction of now."""
    return {
        "customer": f"C{random.randrange(15_000)}",
        "terminal": f"T{random.randrange(30_000)}",
        "amount": round(random.lognormvariate(3.5, 0.8), 2),
        "at": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
    }


class Scorer(FastHttpUser):
    """20 requests a second and user, as long as the server answers in time."""

    wait_time = constant_throughput(20)

    @task(20)
    def score(self) -> None:
        with self.rest("POST", "/v1/score/fraud", json=transaction()) as answer:
            if answer.js is not None and "action" not in answer.js:
                answer.failure(f"no decision: {answer.text[:200]}")

    @task(2)
    def score_several(self) -> None:
        with self.rest("POST", "/v1/score/fraud", json=[transaction() for _ in range(5)], name="several") as answer:
            if answer.js is not None and len(answer.js) != 5:
                answer.failure(f"expected 5 decisions: {answer.text[:200]}")

    @task(1)
    def ready(self) -> None:
        self.client.get("/health/ready")
