"""Locust users that score transactions over RESP with redis-py, one at a time or in a pipeline.

locust -f bench/load/locustfile_resp.py --host 127.0.0.1:6380 [--headless -u 50 -r 50 -t 30s]
The app must have a pipeline "fraud" whose event has customer, terminal, amount, at: bench/app/fraud_bench.py.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
import redis
from locust import User, constant_throughput, task

pack, unpack, unjson = msgspec.msgpack.encode, msgspec.msgpack.decode, msgspec.json.decode


def transaction() -> dict[str, Any]:
    """A transaction of now."""
    return {
        "customer": f"C{random.randrange(15_000)}",
        "terminal": f"T{random.randrange(30_000)}",
        "amount": round(random.lognormvariate(3.5, 0.8), 2),
        "at": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
    }


class Scorer(User):
    """20 calls a second and user; each is told to locust's statistics under the command's name."""

    wait_time = constant_throughput(20)

    def on_start(self) -> None:
        host, _, port = (self.host or "127.0.0.1:6380").rpartition("//")[2].partition(":")
        self.redis = redis.Redis(host, int(port or 6380), socket_timeout=5)

    def on_stop(self) -> None:
        self.redis.close()

    def timed(self, name: str, call: Callable[[], int]) -> None:
        """call() returns the length of what was answered; what it raises is a failure."""
        error, length = None, 0
        begin = time.perf_counter()
        try:
            length = call()
        except (redis.RedisError, ValueError, KeyError, TypeError) as e:
            error = e
        self.environment.events.request.fire(
            request_type="RESP",
            name=name,
            response_time=1000 * (time.perf_counter() - begin),
            response_length=length,
            exception=error,
            context={},
        )

    @task(10)
    def score_msgpack(self) -> None:
        def call() -> int:
            answer = self.redis.execute_command("PENSTOCK.SCORE", "fraud", pack(transaction()))
            unpack(answer)["action"]
            return len(answer)

        self.timed("SCORE msgpack", call)

    @task(5)
    def score_json(self) -> None:
        def call() -> int:
            answer = self.redis.execute_command("PENSTOCK.SCORE", "fraud", msgspec.json.encode(transaction()))
            unjson(answer)["action"]
            return len(answer)

        self.timed("SCORE json", call)

    @task(5)
    def score_pipelined(self) -> None:
        def call() -> int:
            with self.redis.pipeline(transaction=False) as several:
                for _ in range(16):
                    several.execute_command("PENSTOCK.SCORE", "fraud", pack(transaction()))
                answers = several.execute()
            for answer in answers:
                unpack(answer)["action"]
            return sum(map(len, answers))

        self.timed("SCORE x 16", call)

    @task(1)
    def ping(self) -> None:
        self.timed("PING", lambda: int(self.redis.ping()))
