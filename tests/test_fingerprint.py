"""Fingerprints: what means the same has the same one, in every version of Penstock and of Python."""

import importlib.util
import math
import textwrap
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from penstock import (
    Aggregation,
    Entity,
    Event,
    Experiment,
    FeatureView,
    Pipeline,
    Rule,
    Timestamp,
    by_arm,
    on_demand_feature_view,
)
from penstock.fingerprint import described, described_function, digest
from penstock.plan import compile_plan

LIMIT = 250.0


class Order(Event):
    shop: str
    amount: float
    at: Timestamp


def spent(amount, orders__mean_amount_1h):
    if orders__mean_amount_1h is None:
        return 0.0
    return min(amount / orders__mean_amount_1h, LIMIT)


def _module(path, text: str) -> Any:
    path.write_text(textwrap.dedent(text))
    spec = importlib.util.spec_from_file_location(f"fingerprinted_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def does(tmp_path) -> Callable[..., str]:
    """The fingerprint of the function `f` of a piece of source."""
    made = iter(range(1_000))

    def of(text: str) -> str:
        return digest(described_function(_module(tmp_path / f"m{next(made)}.py", text).f))

    return of


PLAIN = """
    HIGH = 3
    def f(a: float, b: float) -> float:
        return HIGH * a + max(b, 1.5)
"""


@pytest.mark.parametrize(
    "same",
    [
        "HIGH = 3\ndef f(a,b):\n  return (HIGH*a\n   + max(b, 1.5))",
        "HIGH = 1 + 2\nLOW = 9\ndef f(a: int, b: int) -> int:\n    'Says what.'\n    # and why\n"
        "    return HIGH * a + max(b, 1.50)",
        "import functools\nHIGH = 3\ndef same(f): return f\n@same\ndef f(a, b): return HIGH * a + max(b, 1.5)",
        "HIGH = 3\ndef other(a, b):\n    return HIGH * a + max(b, 1.5)\nf = other",
    ],
)
def test_how_a_function_is_written_down_does_not_count(does, same):
    assert does(same) == does(PLAIN)


@pytest.mark.parametrize(
    "other",
    [
        PLAIN.replace("HIGH = 3", "HIGH = 4"),
        PLAIN.replace("HIGH = 3", "HIGH = 3.0"),
        PLAIN.replace("1.5", "1.25"),
        PLAIN.replace("HIGH * a", "a * HIGH"),
        PLAIN.replace("max", "min"),
        PLAIN.replace("a: float, b: float", "b: float, a: float"),
    ],
)
def test_what_a_function_does_counts(does, other):
    assert does(other) != does(PLAIN)


def test_helpers_and_captured_values_count(does):
    helped = "def g(a):\n    return a + {}\ndef f(a):\n    return g(a)"
    assert does(helped.format(1)) == does(helped.format("1  # one"))
    assert does(helped.format(1)) != does(helped.format(2))
    captured = "def make(n):\n    def f(a):\n        return a + n\n    return f\nf = make({})"
    assert does(captured.format(1)) != does(captured.format(2))
    again = "def f(a):\n    return 1 if a < 2 else a * f(a - 1)"
    assert does(again) == does(again)
    lambdas = "f, g = (lambda a: a + {}), (lambda a: a)"
    assert does(lambdas.format(1)) != does(lambdas.format(2))
    listed = "CODES = {{'b', 'a', {!r}}}\ndef f(a):\n    return a in CODES"
    assert does(listed.format("c")) == does("CODES = {'c', 'a', 'b'}\ndef f(a): return a in CODES")
    assert does(listed.format("c")) != does(listed.format("d"))


def test_a_function_without_source_has_none():
    assert described_function(math.sqrt) is None
    scope: dict[str, Any] = {}
    exec("def f(a):\n    return a", scope)
    assert described_function(scope["f"]) is None


def test_a_field_that_a_later_version_adds_changes_nothing():
    class Now(msgspec.Struct, frozen=True):
        name: str
        weights: dict[str, float]

    class Later(msgspec.Struct, frozen=True):
        name: str
        weights: dict[str, float]
        salt: str | None = None
        coverage: float = 1.0

    weights = {"b": 0.25, "a": 0.75}
    assert described(Later("x", weights)) == described(Now("x", weights))
    assert described(Later("x", weights, coverage=0.5)) == {**described(Now("x", weights)), "coverage": 0.5}
    # Arms are cut in their order.
    assert described(Now("x", dict(sorted(weights.items())))) != described(Now("x", weights))


def app(**changes: Any) -> dict[str, Any]:
    orders = FeatureView(
        "orders",
        entity=Entity("shop"),
        source=Order,
        aggregations=[Aggregation("mean", "amount", windows=["1h"]), Aggregation("count", windows=["1d"])],
    )
    given: dict[str, Any] = {
        "features": ["amount", orders, on_demand_feature_view(spent_much)],
        "experiments": [Experiment("arm", unit="shop", arms={"b": 0.25, "a": 0.75})],
        "model": by_arm("arm", a="m@1", b="m@2"),
        "rules": [Rule("much", when="amount > 100 and score > 0.5", action="review", reason="much")],
        "fallback": "review",
        **changes,
    }
    return {"orders": orders, "p": Pipeline("p", event=Order, **given)}


def spent_much(amount: float, orders__mean_amount_1h: float) -> float:
    return spent(amount, orders__mean_amount_1h)


def test_a_stored_one_still_holds():
    """Logs hold it: another one would make every pipeline in every log another pipeline."""
    plan = compile_plan(app())
    assert plan.pipelines["p"].fingerprint == "2fed32af45ebed51"
