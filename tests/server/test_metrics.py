"""GET /metrics: what prometheus_client's parser reads from it equals what was done."""

from __future__ import annotations

import gc

import pytest

parser = pytest.importorskip("prometheus_client.parser")


def _samples(served):
    answer = served.get("/metrics")
    assert answer.fields["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = list(parser.text_string_to_metric_families(answer.body.decode()))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    assert all(family.documentation and family.type != "unknown" for family in families)
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value for family in families for sample in family.samples
    }


def _value(samples, name, **labels):
    return samples[(name, *sorted(labels.items()))]


def test_counts(wire):
    with wire.Served() as served:
        for i in range(7):
            served.post("/v1/score/fraud", wire.transaction(customer=f"m{i}", amount=2000 if i < 3 else 1))
        served.post("/v1/score/fraud", wire.transaction(amount="x"))
        served.post("/v1/score/fraud", b"{")
        served.get("/nothing")
        served.post("/v1/events/Transaction", [wire.transaction(at="2001-01-01T00:00:00Z"), wire.transaction()])
        samples = _samples(served)
    assert _value(samples, "penstock_decisions_total", pipeline="fraud", action="decline") == 3
    assert _value(samples, "penstock_decisions_total", pipeline="fraud", action="approve") == 4
    arms = [
        _value(samples, "penstock_arm_decisions_total", pipeline="fraud", experiment="challenger", arm=a) for a in "ab"
    ]
    assert sum(arms) == 7
    assert _value(samples, "penstock_http_requests_total", route="score/fraud", code="200") == 7
    assert _value(samples, "penstock_http_requests_total", route="score/fraud", code="422") == 1
    assert _value(samples, "penstock_http_requests_total", route="score/fraud", code="400") == 1
    assert _value(samples, "penstock_http_requests_total", route="other", code="404") == 1
    assert _value(samples, "penstock_http_errors_total", code="invalid_event") == 1
    assert _value(samples, "penstock_http_errors_total", code="malformed_json") == 1
    assert _value(samples, "penstock_http_errors_total", code="not_found") == 1
    assert _value(samples, "penstock_events_total", event="Transaction", outcome="applied") == 8
    assert _value(samples, "penstock_late_dropped_total", event="Transaction") == 1
    assert _value(samples, "penstock_entities", event="Transaction", entity="customer") == 8
    assert _value(samples, "penstock_state_bytes", event="Transaction", entity="customer") > 0
    assert _value(samples, "penstock_http_connections_accepted_total") == 12
    assert _value(samples, "penstock_ready") == 1
    assert _value(samples, "process_resident_memory_bytes") > 1 << 20


def test_histogram(wire):
    with wire.Served() as served:
        for _ in range(20):
            served.post("/v1/score/fraud", wire.transaction())
        samples = _samples(served)
    name = "penstock_http_request_duration_seconds"
    buckets = [
        (float(dict(key[1:])["le"]), value)
        for key, value in samples.items()
        if key[0] == f"{name}_bucket" and ("route", "score/fraud") in key
    ]
    assert buckets == sorted(buckets)
    assert buckets[-1] == (float("inf"), 20)
    assert _value(samples, f"{name}_count", route="score/fraud") == 20
    total = _value(samples, f"{name}_sum", route="score/fraud")
    assert 20e-6 < total < 20.0
    # The buckets bound the sum on both sides.
    counts = [n - m for (_, n), (_, m) in zip(buckets, [(0, 0), *buckets])]
    low = sum(n * bound for n, (bound, _) in zip(counts, [(0.0, 0), *buckets]))
    assert low <= total * 1.0001


def test_garbage_collector_pauses(wire):
    with wire.Served() as served:
        before = _samples(served)
        gc.collect()
        after = _samples(served)
    assert _value(after, "penstock_gc_collections_total", generation="2") > _value(
        before, "penstock_gc_collections_total", generation="2"
    )
    assert _value(after, "penstock_gc_pause_seconds_sum") > _value(before, "penstock_gc_pause_seconds_sum")


def test_labels_are_escaped():
    from penstock.server.metrics import _labels

    text = "# TYPE x gauge\nx" + _labels(a='q"\\\n') + " 1\n"
    (family,) = parser.text_string_to_metric_families(text)
    assert family.samples[0].labels == {"a": 'q"\\\n'}
