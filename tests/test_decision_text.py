"""A decision's text: the shortest decimal is repr's, MessagePack says what JSON says."""

from __future__ import annotations

import math
import struct

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock import Aggregation, Engine, Event, Experiment, FeatureView, Pipeline, Rule, Timestamp
from penstock._ext.decision import shortest


@settings(max_examples=2000)
@given(st.floats())
def test_shortest_is_repr(value):
    expected = repr(value).encode() if math.isfinite(value) else b"null"
    assert shortest(value) == expected


@settings(max_examples=2000)
@given(st.integers(0, 2**64 - 1))
def test_shortest_is_repr_for_any_bits(bits):
    (value,) = struct.unpack("<d", struct.pack("<Q", bits))
    assert shortest(value) == (repr(value).encode() if math.isfinite(value) else b"null")


def test_shortest_at_the_edges_of_binades():
    for exponent in range(-1074, 1024):
        for value in (2.0**exponent, math.nextafter(2.0**exponent, 0), math.nextafter(2.0**exponent, math.inf)):
            assert shortest(value) == repr(value).encode()
    for exponent in range(-323, 309):
        assert shortest(float(f"1e{exponent}")) == repr(float(f"1e{exponent}")).encode()


class Order(Event):
    customer: str
    amount: float
    at: Timestamp


spend = FeatureView(
    "spend",
    entity="customer",
    source=Order,
    include_request_event=True,
    aggregations=[Aggregation("count", windows=["1h"]), Aggregation("mean", "amount", windows=["1h"])],
)
shop = Pipeline(
    "shop",
    event=Order,
    features=["amount", "at", spend],
    experiments=[
        Experiment("größe", unit="customer", arms={"ä": 0.4, "b": 0.6}),
        Experiment("x", unit="customer", arms={"y": 1.0}),
    ],
    rules=[
        Rule(f"r{i}", when=f"amount > {10 * i}", action=f"a{i}", reason='ü "quoted"\n' * i + str(i)) for i in range(20)
    ],
)


@given(
    st.lists(
        st.tuples(
            st.text(min_size=1, max_size=5).filter(lambda t: t.isascii()),
            st.floats(allow_nan=False, allow_infinity=False),
        ),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=100, deadline=None)
def test_msgpack_says_what_json_says(orders):
    engine = Engine({"shop": shop, "spend": spend})
    for customer, amount in orders:
        decision = engine.score({"customer": customer, "amount": amount, "at": Timestamp.now()}, explain=True)
        for explain in (False, True):
            text = msgspec.json.decode(decision.json(explain))
            assert msgspec.msgpack.decode(decision.msgpack(explain)) == text
            assert list(msgspec.msgpack.decode(decision.msgpack(explain))) == list(text)
        assert text["action"] == decision.action
        assert text["reasons"] == list(decision.reasons)
        assert text["arms"] == decision.arms
        assert text["score"] == decision.score
        assert ("features" in text) == (decision.features is not None)
