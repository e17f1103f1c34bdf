"""What each path answers, against the engine called directly."""

from __future__ import annotations

import json

import pytest


def test_score_one(served, wire):
    answer = served.post("/v1/score/fraud", wire.transaction(customer="s1", amount=2000))
    assert answer.status == 200
    assert answer.fields["content-type"] == "application/json"
    decision = answer.json
    assert decision["action"] == "decline"
    assert decision["reasons"] == ["too much"]
    assert decision["outcome"] == "applied"
    assert decision["arms"].keys() == {"challenger"}
    assert len(decision["id"]) == 26
    assert "features" not in decision
    again = served.post("/v1/score/fraud", wire.transaction(customer="s1", amount=1)).json
    assert again["action"] == "approve"
    assert again["id"] > decision["id"]


def test_score_many_in_order(served, wire):
    events = [wire.transaction(customer="s2", amount=i) for i in range(5)]
    answer = served.ask(wire.request("/v1/score/fraud?explain=true", events))
    counts = [d["features"]["spend.count_1d"] for d in answer.json]
    assert counts == [1, 2, 3, 4, 5]
    assert answer.json[4]["features"]["spend.mean_amount_1d"] == 2.0


def test_score_many_all_or_nothing(served, wire):
    before = served.footprint()
    events = [wire.transaction(customer="s3") for _ in range(20)]
    events[17]["amount"] = "12,50"
    answer = served.post("/v1/score/fraud", events)
    assert answer.status == 422
    assert answer.error["path"] == "$[17].amount"
    events[17]["amount"] = 12.5
    events[18]["customer"] = "k" * 5000
    answer = served.post("/v1/score/fraud", events)
    assert answer.status == 422
    assert answer.error["path"] == "$[18].customer"
    assert served.footprint() == before
    assert served.post("/v1/score/fraud", []).json == []


def test_score_without_ingest(served, wire):
    entities = served.engine.stats()["stores"]
    answer = served.ask(wire.request("/v1/score/fraud?ingest=false&explain=true", wire.transaction(customer="s4")))
    assert answer.json["outcome"] == "off"
    assert answer.json["features"]["spend.count_1d"] == 1
    assert served.engine.stats()["stores"] == entities


@pytest.mark.parametrize("query", ["explain=maybe", "inges=false", "explain", "a=b=c", "explain=true&x=1"])
def test_score_query_refused(served, wire, query):
    answer = served.ask(wire.request(f"/v1/score/fraud?{query}", wire.transaction()))
    assert answer.status == 400
    assert answer.error["code"] in ("unknown_parameter", "bad_parameter")


def test_events(served, wire):
    answer = served.post("/v1/events/Transaction", wire.transaction(customer="e1"))
    assert answer.json == {"accepted": 1, "outcomes": {"applied": 1}}
    late = wire.transaction(customer="e1", at="2001-01-01T00:00:00Z")
    ahead = wire.transaction(customer="e1", at="2999-01-01T00:00:00Z")
    answer = served.post("/v1/events/Transaction", [wire.transaction(customer="e1"), late, ahead])
    assert answer.json == {"accepted": 3, "outcomes": {"applied": 1, "late": 1, "quarantined": 1}}


def test_times_as_integers_of_their_unit(served, wire):
    import time

    ms = int(time.time() * 1000)
    answer = served.post("/v1/events/Login", {"customer": "e2", "tries": 3, "at_ms": ms})
    assert answer.json["outcomes"] == {"applied": 1}
    found = served.post("/v1/features/logins", {"keys": ["e2"]}).json
    assert found["features"] == [{"logins.sum_tries_1h": 3}]
    refused = served.post("/v1/events/Login", {"customer": "e2", "tries": 3, "at_ms": wire.now()})
    assert refused.status == 422
    assert refused.error["path"] == "$.at_ms"


def test_naive_time_is_utc(served, wire):
    served.post("/v1/events/Transaction", wire.transaction(customer="e3", at=wire.now().rstrip("Z")))
    found = served.post("/v1/features/spend", {"keys": ["e3"]}).json
    assert found["features"][0]["spend.count_1d"] == 1


def test_features(served, wire):
    at = wire.now()
    served.post("/v1/events/Transaction", [wire.transaction(customer="f1", amount=a, at=at) for a in (1, 2, 6)])
    found = served.post("/v1/features/spend", {"keys": ["f1", "nobody"], "as_of": at}).json
    direct = served.engine.features("spend", ["f1", "nobody"], at)
    assert found["features"] == direct.rows
    assert found["statuses"] == direct.statuses
    assert found["features"][0]["spend.mean_amount_1d"] == 3.0
    assert found["as_of"].startswith(at[:19])


@pytest.mark.parametrize(
    ("body", "status", "path"),
    [
        ({"keys": "f1"}, 422, "$.keys"),
        ({}, 422, "$"),
        ({"keys": ["a", 1.5]}, 422, "$.keys[1]"),
        ({"keys": ["a", 2**70]}, 422, None),
        ({"keys": ["a"], "as_of": "yesterday"}, 422, "$.as_of"),
        ({"keys": ["a"], "as_of": 2**63}, 422, "$.as_of"),
        ({"keys": ["a"], "as_of": "2001-01-01T00:00:00Z"}, 422, "$.as_of"),
        ({"keys": ["a" * 65536]}, 413, None),
        ({"keys": ["a" * 5000]}, 422, "$.keys[0]"),
        ({"keys": ["a"] * 10001}, 422, "$.keys"),
        ({"keys": [], "at": 1}, 422, "$"),
    ],
)
def test_features_refused(served, wire, body, status, path):
    served.post("/v1/events/Transaction", wire.transaction())
    answer = served.post("/v1/features/spend", body)
    assert answer.status == status, answer
    if path is not None:
        assert answer.error["path"] == path


def test_health_index_and_readiness(served):
    assert served.get("/health/live").json == {"live": True}
    assert served.get("/health/ready").json == {"ready": True}
    assert "POST /v1/score/fraud" in served.get("/").body.decode()
    served.state["ready"] = False
    try:
        answer = served.get("/health/ready")
        assert answer.status == 503
        assert answer.error["code"] == "not_ready"
        assert answer.fields["retry-after"] == "1"
        assert served.get("/health/live").status == 200
    finally:
        served.state["ready"] = True


def test_unknown_names_list_the_known(served, wire):
    for path, known in (
        ("/v1/score/frod", "fraud"),
        ("/v1/events/transaction", "Login, Transaction"),
        ("/v1/features/spent", "logins, spend"),
    ):
        answer = served.post(path, wire.transaction())
        assert answer.status == 404
        assert answer.error["message"].endswith(f"; have {known}")
    assert served.get("/nothing").status == 404
    assert served.get("/v1/score/%66raud").status == 405


def test_head(served):
    with served.client() as client:
        client.send(b"HEAD /health/live HTTP/1.1\r\nHost: t\r\n\r\n")
        answer = client.read(head_only=True)
        assert answer.fields["content-length"] == "13"
        client.send(b"GET /health/live HTTP/1.1\r\nHost: t\r\n\r\n")
        assert client.read().json == {"live": True}


def test_methods(served, wire):
    for raw, allow in (
        (b"GET /v1/score/fraud HTTP/1.1\r\nHost: t\r\n\r\n", "POST"),
        (b"DELETE /health/live HTTP/1.1\r\nHost: t\r\n\r\n", "GET, HEAD"),
        (wire.request("/metrics", {}), "GET, HEAD"),
    ):
        answer = served.ask(raw)
        assert answer.status == 405
        assert answer.fields["allow"] == allow


def test_openapi_describes_what_is_served(served, wire):
    document = served.get("/openapi.json").json
    assert document["openapi"] == "3.1.0"
    assert set(document["paths"]) == {
        "/v1/events/Transaction",
        "/v1/events/Login",
        "/v1/score/fraud",
        "/v1/features/spend",
        "/v1/features/logins",
        "/health/live",
        "/health/ready",
        "/metrics",
        "/status",
        "/openapi.json",
    }
    schemas = document["components"]["schemas"]
    for place in _references(document):
        assert place.removeprefix("#/components/schemas/") in schemas
    event = schemas["event.Transaction"]
    assert event["required"] == ["customer", "terminal", "amount", "at"]
    assert event["properties"]["note"]["type"] == ["string", "null"]
    assert schemas["event.Login"]["properties"]["at_ms"]["type"] == "integer"
    decision = served.ask(wire.request("/v1/score/fraud?explain=true", wire.transaction())).json
    assert set(decision) == set(schemas["decision.fraud"]["properties"]) - {"degraded"}, "said only where it is so"
    assert decision["action"] in schemas["decision.fraud"]["properties"]["action"]["enum"]
    assert set(decision["features"]) == set(schemas["decision.fraud"]["properties"]["features"]["properties"])
    found = served.post("/v1/features/spend", {"keys": ["x"]}).json
    values = schemas["features.spend"]["properties"]["features"]["items"]["properties"]
    assert set(found["features"][0]) == set(values)


def _references(value):
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "$ref":
                yield inner
            else:
                yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)


def test_decisions_equal_the_engine_called_directly(served, wire):
    from penstock import Engine

    at = "2026-01-05T10:00:00Z"
    events = [wire.transaction(customer=f"d{i % 3}", amount=i * 7.25, at=at) for i in range(60)]
    one_by_one, batch = wire.Served(), wire.Served()
    direct = Engine(wire.app)
    expected = [json.loads(direct.score(e, pipeline="fraud", explain=True).json(True)) for e in events]
    with one_by_one, batch:
        with one_by_one.client() as client:
            client.send(b"".join(wire.request("/v1/score/fraud?explain=true", e) for e in events))
            singles = [client.read().json for _ in events]
        together = batch.ask(wire.request("/v1/score/fraud?explain=true", events)).json
    for found in (singles, together):
        for decision, right in zip(found, expected, strict=True):
            assert {**decision, "id": ""} == {**right, "id": ""}
