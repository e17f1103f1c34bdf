"""The client over HTTP: against a real server, and against peers that fail in every way."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import itertools
import json
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import numpy as np
import pytest

import penstock
from penstock import AsyncClient, Client, Engine, Timestamp
from penstock.client import (
    AccessDenied,
    ClientError,
    ConnectionLost,
    DeadlineExceeded,
    Decision,
    Ingested,
    InvalidEvent,
    InvalidRequest,
    NotFound,
    Overloaded,
    ServerError,
)
from penstock.client.calls import Deadline

NOW = datetime.now(UTC).replace(microsecond=123000)
DECISION = (
    b'{"id":"01J","action":"approve","score":0.25,"reasons":[],"model":"m","model_version":"1","arms":{"e":null},'
    b'"outcome":"applied"}'
)
numbers = itertools.count()
MARGIN = 0.3  # seconds that a busy machine may add to a deadline


def payment(**changes: Any) -> dict[str, Any]:
    event = {"payment": f"p{next(numbers)}", "customer": "c1", "shop": 7, "amount": 12.5, "at": NOW}
    return {**event, **changes}


@pytest.fixture(scope="module")
def app(peers: Any) -> Any:
    spec = importlib.util.spec_from_file_location("shop_app", peers.shop)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["shop_app"] = module  # annotations are evaluated there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def client(shop: Any) -> Any:
    with Client(f"http://127.0.0.1:{shop.port}") as client:
        yield client


def fields(decision: Any, explain: bool = True) -> dict[str, Any]:
    """What two decisions on equal events share, times as the client has them."""
    names = ["action", "score", "reasons", "model", "model_version", "arms", "outcome"]
    found = {name: getattr(decision, name) for name in names}
    if explain:
        found["features"] = {
            name: value.isoformat() if isinstance(value, Timestamp) else value
            for name, value in decision.features.items()
        }
        found["statuses"] = decision.statuses
    return found


# results


def test_decisions_equal_the_engines(shop: Any, client: Client, peers: Any, app: Any) -> None:
    engine = Engine(peers.shop)
    events = [
        payment(customer="same", amount=amount, note=note, at=NOW + timedelta(seconds=i))
        for i, (amount, note) in enumerate([(1 / 3, None), (0.1, "naïve \u2603"), (2000.0, ""), (1e-300, "x" * 1000)])
    ]
    for event in events:
        ours = client.score("pay", event, explain=True)
        assert isinstance(ours, Decision)
        assert fields(ours) == fields(engine.score(event, pipeline="pay", explain=True))
    more = [{**event, "payment": f"more {i}", "amount": event["amount"] / 7} for i, event in enumerate(events)]
    ours_list = client.score("pay", more, explain=True)
    theirs = [engine.score(event, pipeline="pay", explain=True) for event in more]
    assert [fields(d) for d in ours_list] == [fields(d) for d in theirs]
    found, expected = client.features("spend", ["same", "none"]), engine.features("spend", ["same", "none"])
    assert (found.view, found.rows, found.statuses) == (expected.view, expected.rows, expected.statuses)
    assert abs(found.as_of - expected.as_of) < 5_000_000
    as_of = NOW + timedelta(seconds=2)
    assert client.features("spend", ["same"], as_of).rows == engine.features("spend", ["same"], as_of).rows
    assert client.features("shops", [7, 8], as_of).as_of == Timestamp.of(as_of)


def test_without_explain_and_without_ingest(client: Client) -> None:
    before = client.features("spend", ["quiet"]).rows
    decision = client.score("pay", payment(customer="quiet"), ingest=False)
    assert decision.outcome == "off"
    assert decision.features is None
    assert decision.statuses is None
    assert client.features("spend", ["quiet"]).rows == before


def test_event_objects_and_times(shop: Any, client: Client, app: Any) -> None:
    """S1: naive time is UTC; a Timestamp, a datetime and an integer in the field's unit mean the same."""
    aware = NOW.astimezone(timezone(timedelta(hours=5, minutes=30)))
    for at in (NOW, aware, NOW.replace(tzinfo=None), Timestamp.of(NOW), np.datetime64(NOW.replace(tzinfo=None), "us")):
        decision = client.score("pay", payment(at=at), explain=True)
        assert decision.features is not None
        assert decision.features["at"] == Timestamp.of(NOW).isoformat()
        event = app.Payment(**payment(at=at))
        decision = client.score("pay", event, explain=True)
        assert decision.features is not None
        assert decision.features["at"] == Timestamp.of(NOW).isoformat()
    event = app.Payment(**payment(at=int(Timestamp.of(NOW))))  # microseconds where the field has no unit
    assert client.score("pay", event, explain=True).features["at"] == Timestamp.of(NOW).isoformat()  # type: ignore[index]
    for at in (int(NOW.timestamp() * 1000), NOW, Timestamp.of(NOW)):
        assert client.ingest(app.Visit, app.Visit(customer="v", pages=1, at=at)) == Ingested(1, {"applied": 1})
    outcomes = shop.engine.stats()["outcomes"]["Visit"]
    assert outcomes["applied"] >= 3
    assert outcomes["quarantined"] == 0


def test_numpy_scalars_and_nulls(client: Client) -> None:
    """S11: NaN in typed input is null."""
    event = payment(amount=np.float32(2.5), shop=np.int64(9), online=np.bool_(True), note=float("nan"))
    decision = client.score("pay", event, explain=True)
    assert decision.features is not None
    assert decision.features["amount"] == 2.5
    assert decision.features["note"] is None


def test_lists_and_ingest(client: Client) -> None:
    same = payment()
    assert client.score("pay", []) == []
    assert client.ingest("Payment", []) == Ingested(0, {})
    assert client.ingest("Payment", [same, payment(), same]) == Ingested(3, {"applied": 2, "duplicate": 1})
    first, second = client.score("pay", (payment(payment="twice"), payment(payment="twice")))
    assert first.id == second.id
    assert second.outcome == "duplicate"


def test_batches(client: Client) -> None:
    batch = client.pipeline()
    batch.score("pay", payment(amount=2000.0)).score("pay", payment())
    batch.score("visit", {"customer": "v", "pages": 11, "at": int(NOW.timestamp() * 1000)})
    batch.score("pay", payment(), explain=True)
    assert len(batch) == 4
    decisions = batch.execute()
    assert [d.action for d in decisions] == ["decline", "approve", "review", "approve"]
    assert decisions[0].features is None
    assert decisions[3].features is not None
    assert len(batch) == 0
    assert batch.execute() == []
    batch.score("pay", payment()).score("pay", payment(amount="x")).score("visit", {"customer": "v"})
    with pytest.raises(InvalidEvent) as caught:
        batch.execute()
    assert caught.value.path == "$[1].amount"


def test_a_batch_of_one_group_is_one_request(peers: Any) -> None:
    body = b"[" + b",".join([DECISION] * 100) + b"]"
    with peers.Peer(lambda n, request: peers.http_answer(body)) as peer, Client(peer.url) as client:
        batch = client.pipeline()
        for _ in range(100):
            batch.score("pay", payment())
        assert len(batch.execute()) == 100
        assert len(peer.requests) == 1


# errors


def test_refusals_keep_code_path_and_status(client: Client, app: Any) -> None:
    cases: list[tuple[Any, type[ClientError], str, str | None, int | None]] = [
        (lambda: client.score("nope", payment()), NotFound, "not_found", None, 404),
        (lambda: client.score("a/b ?", payment()), NotFound, "not_found", None, 404),
        (lambda: client.ingest("Nope", payment()), NotFound, "not_found", None, 404),
        (lambda: client.features("nope", ["a"]), NotFound, "not_found", None, 404),
        (lambda: client.score("pay", payment(amount="x")), InvalidEvent, "invalid_event", "$.amount", 422),
        (lambda: client.score("pay", [payment(), payment(at="x")]), InvalidEvent, "invalid_event", "$[1].at", 422),
        (lambda: client.features("spend", ["a"], 0), InvalidRequest, "replay_needed", "$.as_of", 422),
        (lambda: client.features("spend", ["a"] * 10001), InvalidRequest, "too_many_keys", "$.keys", 422),
        (lambda: client.score("pay", [payment(note="x" * 60000)] * 40), InvalidRequest, "body_too_large", None, 413),
        # refused before anything is sent
        (lambda: client.score("pay", payment(amount=float("inf"))), InvalidEvent, "invalid_event", "$.amount", None),
        (lambda: client.score("pay", [payment(note="\ud800")]), InvalidEvent, "invalid_event", "$[0].note", None),
        (lambda: client.score("pay", payment(note=object())), InvalidEvent, "invalid_event", "$.note", None),
        (
            lambda: client.score("pay", payment(at=np.datetime64(2**62, "s"))),
            InvalidEvent,
            "invalid_event",
            "$.at",
            None,
        ),
        (lambda: client.score("pay", 3), InvalidEvent, "invalid_event", "$", None),
        (lambda: client.score("pay", [3]), InvalidEvent, "invalid_event", "$[0]", None),
        (lambda: client.features("spend", "a"), InvalidRequest, "", "$.keys", None),
        (lambda: client.features("spend", [True]), InvalidRequest, "", "$.keys[0]", None),
        (lambda: client.features("spend", ["a"], "soon"), InvalidRequest, "invalid_time", "$.as_of", None),
    ]
    client.score("pay", payment())  # so that there is a watermark
    for call, kind, code, path, status in cases:
        with pytest.raises(kind) as caught:
            call()
        error = caught.value
        assert type(error) is kind
        assert (error.code, error.path, error.status) == (code, path, status), error
        assert isinstance(error, penstock.PenstockError)
    assert client.score("pay", payment()).outcome == "applied"


def test_answers_that_are_none(peers: Any) -> None:
    answers = [
        (b"SSH-2.0-OpenSSH_9\r\n", ServerError, "protocol"),
        (peers.http_answer(b"<html>"), ServerError, "protocol"),
        (peers.http_answer(b'{"id":3}'), ServerError, "protocol"),
        (peers.http_answer(b"<html>Bad Gateway", 502), ServerError, ""),
        (peers.http_answer(b'{"error":"so"}', 400), InvalidRequest, ""),
        (peers.http_answer(b"", 401), AccessDenied, "denied"),
        (peers.http_answer(b'{"error":{"code":"internal","message":"m","path":null}}', 500), ServerError, "internal"),
        (peers.http_answer(b'{"error":{"code":"deadline","message":"m"}}', 503), DeadlineExceeded, "deadline"),
        (peers.http_answer(b"", 504), DeadlineExceeded, "deadline"),
    ]
    with peers.Peer(lambda n, request: answers[n][0]) as peer, Client(peer.url) as client:
        for _, kind, code in answers:
            with pytest.raises(kind) as caught:
                client.score("pay", payment())
            assert type(caught.value) is kind
            assert caught.value.code == code
        assert len(peer.requests) == len(answers)  # none was tried again


def test_answers_in_other_framings(peers: Any) -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    for i in range(0, len(DECISION), 50):
        part = DECISION[i : i + 50]
        chunked += b"%x\r\n%b\r\n" % (len(part), part)
    chunked += b"0\r\n\r\n"
    early = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + peers.http_answer(DECISION)
    to_end = b"HTTP/1.0 200 OK\r\nServer: old\r\n\r\n" + DECISION

    def answer(number: int, request: bytes) -> bytes:
        if number == 2:
            raise Close(to_end)
        return [chunked, early, b"", peers.http_answer(DECISION, 200, "Connection: close")][number]

    class Close(peers.Cut):  # type: ignore[misc,name-defined]
        pass

    with peers.Peer(answer) as peer, Client(peer.url, attempts=1) as client:
        assert client.score("pay", payment()).score == 0.25
        assert client.score("pay", payment()).score == 0.25
        assert peer.accepted == 1
        with pytest.raises(ConnectionLost):  # a reset is no end of an answer
            client.score("pay", payment())
        assert client.score("pay", payment()).score == 0.25
        assert client._pool._free == []


@pytest.mark.parametrize("url", ["ftp://h", "http://", "h:80", "http://h:x", "resp://h/1", "http://u:p@h", "https+unix:///x",
                                 "http+unix://h/x", "http://h?x=1"])  # fmt: skip
def test_wrong_urls(url: str) -> None:
    with pytest.raises(ValueError, match="url: "):
        Client(url)


def test_wrong_settings() -> None:
    for settings in ({"retry": "often"}, {"timeout": 0}, {"timeout": -1.0}, {"attempts": 0}, {"connections": 0},
                     {"tls": object()}, {"headers": {"a b": "c"}}, {"headers": {"a": "c\r\nd: e"}}):  # fmt: skip
        with pytest.raises(ValueError):
            Client("http://h", **settings)  # type: ignore[arg-type]
    with Client("http://127.0.0.1:9") as client:
        with pytest.raises(ValueError, match="priority"):
            client.score("pay", payment(), priority=9)
        with pytest.raises(ValueError, match="retry"):
            client.score("pay", payment(), retry="often")
        with pytest.raises(ValueError, match="timeout"):
            client.score("pay", payment(), timeout=-1)


# retries


def test_overloaded_is_tried_again(peers: Any) -> None:
    refusal = peers.http_answer(b'{"error":{"code":"overloaded","message":"m","path":null}}', 503)

    def answer(number: int, request: bytes) -> bytes:
        return refusal if number < 3 else peers.http_answer(DECISION)

    with peers.Peer(answer) as peer, Client(peer.url) as client:
        started = time.monotonic()
        assert client.score("pay", payment()).score == 0.25
        assert 0.05 < time.monotonic() - started < 2  # 25 to 50, 50 to 100, 100 to 200 ms
        assert len(peer.requests) == 4
        assert peer.accepted == 1
    with peers.Peer(lambda n, request: refusal) as peer, Client(peer.url, attempts=3) as client:
        with pytest.raises(Overloaded) as caught:
            client.score("pay", payment())
        assert (caught.value.code, caught.value.status, caught.value.retry_after) == ("overloaded", 503, None)
        assert len(peer.requests) == 3
        with pytest.raises(Overloaded):
            client.score("pay", payment(), retry="never")
        assert len(peer.requests) == 4


def test_retry_after_is_waited_for_within_the_deadline(peers: Any) -> None:
    refusal = peers.http_answer(b'{"error":{"code":"overloaded","message":"m"}}', 503, "Retry-After: 1")

    def answer(number: int, request: bytes) -> bytes:
        return refusal if number == 0 else peers.http_answer(DECISION)

    with peers.Peer(answer) as peer, Client(peer.url, timeout=3) as client:
        started = time.monotonic()
        client.score("pay", payment())
        assert 1 <= time.monotonic() - started < 2.5
        peer.requests.clear()
        started = time.monotonic()
        with pytest.raises(Overloaded) as caught:
            client.score("pay", payment(), timeout=0.8)
        assert time.monotonic() - started < 0.5  # the wait would end after the deadline: told at once
        assert caught.value.retry_after == 1


def test_a_refused_connection_is_tried_again(peers: Any) -> None:
    with peers.Peer(lambda n, request: peers.http_answer(DECISION)) as peer:
        port = peer.port
    with Client(f"http://127.0.0.1:{port}", attempts=3) as client:
        with pytest.raises(ConnectionLost) as caught:
            client.score("pay", payment())
        assert not caught.value.sent
        assert isinstance(caught.value, ConnectionError)
        assert not client.ready()
        assert not client.live()

    async def again() -> None:
        async with AsyncClient(f"http://127.0.0.1:{port}", attempts=3) as client:
            with pytest.raises(ConnectionLost) as caught:
                await client.score("pay", payment())
            assert not caught.value.sent
            assert not await client.ready()

    asyncio.run(again())


def proxied(peers: Any, shop: Any, faults: dict[int, str]) -> Any:
    """A peer that forwards to the shop but for some requests: cut "before" it is forwarded, or "after", or "half"way
    through the answer."""

    def answer(number: int, request: bytes) -> bytes:
        fault = faults.get(number)
        if fault == "before":
            raise peers.Cut()
        found: bytes = peers.forward(shop.port, request)
        if fault == "after":
            raise peers.Cut()
        if fault == "half":
            raise peers.Cut(found[: len(found) // 2])
        return found

    return peers.Peer(answer)


@pytest.mark.parametrize("fault", ["before", "after", "half"])
def test_what_was_sent_is_sent_again_only_if_safe(shop: Any, peers: Any, app: Any, fault: str) -> None:
    """S16: an event with an event_id that is sent twice counts once, and gets the first decision."""

    def count(customer: str) -> int:
        return int(shop.engine.features("spend", [customer]).rows[0]["spend.count_1d"])

    with proxied(peers, shop, {0: fault, 2: fault, 4: fault, 6: fault, 8: fault}) as peer, Client(peer.url) as client:
        customer = f"safe {fault}"
        decision = client.score("pay", app.Payment(**payment(customer=customer)))  # 0, 1
        assert decision.outcome == ("applied" if fault == "before" else "duplicate")
        assert count(customer) == 1
        assert len(peer.requests) == 2
        client.score("pay", [app.Payment(**payment(customer=customer)) for _ in range(3)])  # 2, 3
        assert count(customer) == 4
        assert len(peer.requests) == 4

        customer = f"unsafe {fault}"
        with pytest.raises(ConnectionLost) as caught:  # 4: a dict does not say that its type has an event_id
            client.score("pay", payment(customer=customer))
        assert caught.value.sent
        assert len(peer.requests) == 5
        assert count(customer) == (0 if fault == "before" else 1)
        client.score("pay", payment())  # 5
        client.score("pay", payment(customer=customer), retry="always")  # 6, 7
        assert len(peer.requests) == 8
        with pytest.raises(ConnectionLost):  # 8
            client.score("pay", app.Payment(**payment(customer=customer)), retry="never")
        assert len(peer.requests) == 9


@pytest.mark.parametrize("fault", ["before", "after", "half"])
def test_reads_are_sent_again(shop: Any, peers: Any, app: Any, fault: str) -> None:
    with proxied(peers, shop, {0: fault, 2: fault, 4: fault}) as peer, Client(peer.url) as client:
        assert client.features("spend", ["x"]).rows[0]["spend.count_1d"] == 0
        assert client.score("pay", payment(), ingest=False).outcome == "off"
        with pytest.raises(ConnectionLost):  # an event type without an event_id
            client.ingest(app.Visit, app.Visit(customer="v", pages=1, at=int(NOW.timestamp() * 1000)))
        assert len(peer.requests) == 5


def test_connections_cut_before_they_are_read(shop: Any, peers: Any) -> None:
    """A reset that finds the request already sent is a loss after sending: not tried again for a dict."""
    with proxied(peers, shop, {}) as peer, Client(peer.url) as client:
        peer.accept = lambda number: number % 2 == 1
        assert client.features("spend", ["x"]).rows[0]["spend.count_1d"] == 0


def test_a_restart_between_calls_is_not_noticed(shop: Any, peers: Any) -> None:
    with proxied(peers, shop, {}) as peer, Client(peer.url, retry="never") as client:
        for i in range(5):
            client.score("pay", payment())
            peer.cut_all()
            time.sleep(0.05)
            assert peer.accepted == i + 1

    async def again() -> None:
        with proxied(peers, shop, {}) as peer:
            async with AsyncClient(peer.url, retry="never") as client:
                for i in range(5):
                    await client.score("pay", payment())
                    peer.cut_all()
                    await asyncio.sleep(0.05)
                    assert peer.accepted == i + 1

    asyncio.run(again())


def test_idle_connections_are_not_used_again(peers: Any) -> None:
    with peers.Peer(lambda n, request: peers.http_answer(DECISION)) as peer, Client(peer.url, idle=0.1) as client:
        client.score("pay", payment())
        client.score("pay", payment())
        assert peer.accepted == 1
        time.sleep(0.15)
        client.score("pay", payment())
        assert peer.accepted == 2


# deadlines


def slow(peers: Any, seconds: float) -> Any:
    def answer(number: int, request: bytes) -> bytes:
        time.sleep(seconds)
        return peers.http_answer(DECISION)  # type: ignore[no-any-return]

    return answer


def test_deadlines_hold(peers: Any, app: Any) -> None:
    with peers.Peer(slow(peers, 0.5)) as peer, Client(peer.url, timeout=0.2) as client:
        for _ in range(3):
            started = time.monotonic()
            with pytest.raises(DeadlineExceeded) as caught:
                client.score("pay", app.Payment(**payment()))
            assert 0.15 < time.monotonic() - started < 0.2 + MARGIN
            assert caught.value.sent
            assert isinstance(caught.value, TimeoutError)
        assert client.score("pay", payment(), timeout=5).score == 0.25
        assert len(peer.requests) == 4
        assert peer.accepted == 4

    async def again() -> None:
        with peers.Peer(slow(peers, 0.5)) as peer:
            async with AsyncClient(peer.url, timeout=0.2) as client:
                started = time.monotonic()
                with pytest.raises(DeadlineExceeded) as caught:
                    await client.score("pay", app.Payment(**payment()))
                assert 0.15 < time.monotonic() - started < 0.2 + MARGIN
                assert caught.value.sent
                assert (await client.score("pay", payment(), timeout=5)).score == 0.25

    asyncio.run(again())


def test_a_trickle_does_not_stretch_the_deadline(peers: Any) -> None:
    """Each byte comes in time; the whole answer does not."""
    import socket as sockets

    listener = sockets.create_server(("127.0.0.1", 0))

    def trickle() -> None:
        connection, _ = listener.accept()
        connection.recv(65536)
        try:
            for byte in peers.http_answer(DECISION):
                connection.send(bytes([byte]))
                time.sleep(0.01)
        except OSError:
            pass

    threading.Thread(target=trickle, daemon=True).start()
    with Client(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.3) as client:
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            client.score("pay", payment())
        assert time.monotonic() - started < 0.3 + MARGIN
    listener.close()


def test_one_deadline_covers_all_attempts(peers: Any, app: Any) -> None:
    def answer(number: int, request: bytes) -> bytes:
        time.sleep(0.08)
        raise peers.Cut()

    with peers.Peer(answer) as peer, Client(peer.url, timeout=0.4, attempts=100) as client:
        started = time.monotonic()
        with pytest.raises((ConnectionLost, DeadlineExceeded)):
            client.score("pay", app.Payment(**payment()))
        assert time.monotonic() - started < 0.4 + MARGIN
        assert 2 <= len(peer.requests) <= 5


def test_a_peer_that_does_not_read(peers: Any) -> None:
    import socket as sockets

    listener = sockets.create_server(("127.0.0.1", 0))
    big = [payment(note="x" * 60000) for _ in range(300)]
    with Client(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.3) as client:
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            client.score("pay", big)
        assert time.monotonic() - started < 3  # writing 18 MB of JSON is not in it

    async def again() -> None:
        async with AsyncClient(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.3) as client:
            with pytest.raises(DeadlineExceeded):
                await client.score("pay", big)

    asyncio.run(again())
    listener.close()


def test_what_is_left_is_sent_along(peers: Any) -> None:
    refusal = peers.http_answer(b"", 503)

    def answer(number: int, request: bytes) -> bytes:
        return refusal if number % 2 == 0 else peers.http_answer(DECISION)

    with peers.Peer(answer) as peer, Client(peer.url, timeout=2) as client:
        client.score("pay", payment(), priority=3, ingest=False, explain=True)
        first, second = peer.requests
        line = re.compile(rb"POST /v1/score/pay\?timeout=(\d+)&priority=3&ingest=false&explain=true HTTP/1.1\r\n")
        left = [int(match[1]) for match in (line.match(first), line.match(second)) if match is not None]
        assert len(left) == 2
        assert left[1] <= left[0] < 2_000_000


def test_server_deadlines_repeat() -> None:
    """Rounded down to two digits: never more than what is left, and at least nine tenths of it."""
    for timeout in (0.0202, 0.25, 1.0, 5.0, 99.0, 1e6):
        deadline = Deadline(timeout)
        before = deadline.left()
        us = deadline.server_us()
        after = deadline.left()
        assert before is not None
        assert after is not None
        assert us is not None
        assert after * 0.9e6 - 2 <= us <= before * 1e6
        assert us == us // 10 ** (len(str(us)) - 2) * 10 ** (len(str(us)) - 2)
    assert Deadline(None).server_us() is None


# pools


def test_a_pool_is_bounded_under_threads(peers: Any) -> None:
    open_now, most = 0, 0
    lock = threading.Lock()

    def answer(number: int, request: bytes) -> bytes:
        nonlocal open_now, most
        with lock:
            open_now += 1
            most = max(most, open_now)
        time.sleep(0.005)
        with lock:
            open_now -= 1
        return peers.http_answer(DECISION)  # type: ignore[no-any-return]

    with peers.Peer(answer) as peer, Client(peer.url, connections=4) as client, ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda i: client.score("pay", payment()).score, range(200)))
        assert found == [0.25] * 200
        assert peer.accepted <= 4
        assert most <= 4


def test_a_call_waits_for_a_connection_within_its_timeout(peers: Any) -> None:
    with peers.Peer(slow(peers, 0.5)) as peer, Client(peer.url, connections=1, timeout=2) as client:
        other = threading.Thread(target=lambda: client.score("pay", payment()))
        other.start()
        time.sleep(0.1)
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded) as caught:
            client.score("pay", payment(), timeout=0.1)
        assert caught.value.code == "pool"
        assert not caught.value.sent
        assert time.monotonic() - started < 0.1 + MARGIN
        assert client.score("pay", payment()).score == 0.25  # waits for the other
        other.join()
        assert peer.accepted == 1


def test_answers_reach_their_callers(shop: Any) -> None:
    """Threads on few connections: nobody gets another's decision."""
    with Client(f"http://127.0.0.1:{shop.port}", connections=3) as client, ThreadPoolExecutor(12) as threads:

        def ask(i: int) -> bool:
            decision = client.score("pay", payment(amount=float(i)), explain=True)
            return decision.features is not None and decision.features["amount"] == float(i)

        assert all(threads.map(ask, range(600)))

    async def again() -> None:
        async with AsyncClient(f"http://127.0.0.1:{shop.port}", connections=3) as client:

            async def ask(i: int) -> bool:
                decision = await client.score("pay", payment(amount=float(i)), explain=True)
                return decision.features is not None and decision.features["amount"] == float(i)

            assert all(await asyncio.gather(*[ask(i) for i in range(600)]))

    asyncio.run(again())


def test_async_pool_is_bounded(peers: Any) -> None:
    async def run() -> None:
        with peers.Peer(slow(peers, 0.01)) as peer:
            async with AsyncClient(peer.url, connections=4) as client:
                found = await asyncio.gather(*[client.score("pay", payment()) for _ in range(100)])
                assert len(found) == 100
                assert peer.accepted <= 4
            async with AsyncClient(peer.url, connections=1) as client:
                other = asyncio.ensure_future(client.score("pay", payment()))
                await asyncio.sleep(0)
                with pytest.raises(DeadlineExceeded) as caught:
                    await client.score("pay", payment(), timeout=0.001)
                assert caught.value.code == "pool"
                await other

    asyncio.run(run())


@pytest.mark.parametrize("uvloop", [False, True])
def test_cancelled_calls_leave_no_broken_connection(shop: Any, uvloop: bool) -> None:
    async def run() -> None:
        async with AsyncClient(f"http://127.0.0.1:{shop.port}", connections=4) as client:

            async def ask(i: int) -> bool:
                decision = await client.score("pay", payment(amount=float(i)), explain=True)
                return decision.features is not None and decision.features["amount"] == float(i)

            for round_ in range(30):
                tasks = [asyncio.ensure_future(ask(i)) for i in range(20)]
                await asyncio.sleep(round_ * 0.0002)
                for task in tasks[::2]:
                    task.cancel()
                found = await asyncio.gather(*tasks, return_exceptions=True)
                assert all(f is True or isinstance(f, asyncio.CancelledError) for f in found), found
                assert all(f is True for f in found[1::2])
            assert client._pool._slots._value == 4
            assert len(client._pool._free) <= 4

    if uvloop:
        import uvloop as loops

        with asyncio.Runner(loop_factory=loops.new_event_loop) as runner:
            runner.run(run())
    else:
        asyncio.run(run())


def test_closed_clients(peers: Any) -> None:
    with peers.Peer(lambda n, request: peers.http_answer(DECISION)) as peer:
        with Client(peer.url) as client:
            client.score("pay", payment())
        with pytest.raises(ClientError, match="closed"):
            client.score("pay", payment())
        with pytest.raises(ClientError, match="closed"):
            client.ready()

        async def run() -> None:
            async with AsyncClient(peer.url) as client:
                await client.score("pay", payment())
            with pytest.raises(ClientError, match="closed"):
                await client.score("pay", payment())

        asyncio.run(run())
        for _ in range(100):
            if not peer.open:
                break
            time.sleep(0.01)
        assert not peer.open


def test_an_async_client_belongs_to_one_loop(peers: Any) -> None:
    with peers.Peer(lambda n, request: peers.http_answer(DECISION)) as peer:
        client = AsyncClient(peer.url)
        asyncio.run(client.score("pay", payment()))  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="another event loop"):
            asyncio.run(client.score("pay", payment()))  # type: ignore[arg-type]


def test_after_a_fork_the_parents_connections_stay_its_own(shop: Any) -> None:
    code = f"""
import os
from penstock import Client
client = Client("http://127.0.0.1:{shop.port}")
ask = lambda: client.features("spend", ["x"]).rows[0]["spend.count_1d"]
assert ask() == 0
child = os.fork()
if child == 0:
    ok = all(ask() == 0 for _ in range(20))
    os._exit(0 if ok else 1)
assert all(ask() == 0 for _ in range(20))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_unix_sockets(peers: Any, tmp_path: Any) -> None:
    path = str(tmp_path / "s")
    with peers.Peer(lambda n, request: peers.http_answer(DECISION), unix=path) as peer:
        with Client(peer.url) as client:
            assert client.score("pay", payment()).score == 0.25

        async def run() -> None:
            async with AsyncClient(peer.url) as client:
                assert (await client.score("pay", payment())).score == 0.25

        asyncio.run(run())


def test_headers_and_prefix(peers: Any) -> None:
    with peers.Peer(lambda n, request: peers.http_answer(DECISION)) as peer:
        with Client(peer.url + "/behind/a/proxy/", headers={"Authorization": "Bearer x"}) as client:
            client.score("pay", payment(), timeout=None)
        assert peer.requests[0].startswith(b"POST /behind/a/proxy/v1/score/pay")
        assert b"\r\nAuthorization: Bearer x\r\n" in peer.requests[0]


# the two clients, and what they cost


def test_both_clients_say_the_same() -> None:
    from penstock.client import AsyncBatch, Batch

    for sync, other in ((Client, AsyncClient), (Batch, AsyncBatch)):
        names = [n for n in vars(sync) if not n.startswith("__") and callable(getattr(sync, n))]
        assert names == [n for n in vars(other) if not n.startswith("__") and callable(getattr(other, n))]
        for name in names:
            ours, theirs = inspect.getsource(getattr(sync, name)), inspect.getsource(getattr(other, name))
            for word, plain in (("async def", "def"), ("await ", ""), ("asyncio.sleep", "time.sleep"), ("Async", "")):
                theirs = theirs.replace(word, plain)
            squeeze = re.compile(r"[\s,]+")
            assert squeeze.sub("", ours) == squeeze.sub("", theirs), name


def test_the_client_is_light() -> None:
    code = (
        "import sys; from penstock import Client; Client('http://h'); Client('resp://h')\n"
        "heavy = [m for m in sys.modules if m.split('.')[0] in ('numpy', 'pyarrow') or m.startswith('penstock._ext')]\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


# inference: the protocol's binary form, against a peer


def oip(peers: Any, seen: list[Any]) -> Any:
    """A model "double": x [-1, 2] FP32 and, where given, names BYTES; answers twice x, as binary or as JSON."""

    def answer(number: int, request: bytes) -> bytes:
        head, _, body = request.partition(b"\r\n\r\n")
        if head.startswith(b"GET "):
            document = {
                "name": "double",
                "versions": ["1", "2"],
                "platform": "p",
                "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
                "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
            }
            return peers.http_answer(json.dumps(document).encode())  # type: ignore[no-any-return]
        fields = {k.lower(): v for k, v in (line.split(": ", 1) for line in head.decode().split("\r\n")[1:])}
        size = int(fields["inference-header-content-length"])
        asked = json.loads(body[:size])
        seen.append((head.split(b"\r\n")[0], asked))
        at, given = size, {}
        for port in asked["inputs"]:
            n = port["parameters"]["binary_data_size"]
            given[port["name"]] = body[at : at + n]
            at += n
        assert at == len(body)
        shape = asked["inputs"][0]["shape"]
        y = np.frombuffer(given["x"], "<f4") * 2
        if shape[0] == 3:
            outputs = [{"name": "y", "datatype": "FP32", "shape": shape, "data": y.reshape(shape).tolist()}]
            return peers.http_answer(json.dumps({"model_name": "double", "outputs": outputs}).encode())  # type: ignore[no-any-return]
        names = b"".join(len(s).to_bytes(4, "little") + s for s in (b"", b"ab"))
        parts = [y.tobytes(), names, np.array([0x3F80, 0xC000], "<u2").tobytes()]
        described = [("y", "FP32", shape), ("names", "BYTES", [2]), ("b", "BF16", [2])]
        document = {
            "model_name": "double",
            "outputs": [
                {"name": name, "datatype": kind, "shape": shape, "parameters": {"binary_data_size": len(part)}}
                for (name, kind, shape), part in zip(described, parts)
            ],
        }
        text = json.dumps(document).encode()
        return peers.http_answer(  # type: ignore[no-any-return]
            text + b"".join(parts), 200, f"Inference-Header-Content-Length: {len(text)}"
        )

    return answer


def test_inference(peers: Any) -> None:
    seen: list[Any] = []
    with peers.Peer(oip(peers, seen)) as peer, Client(peer.url) as client:
        x = np.array([[1, 2], [3, 4]], dtype=np.float32)
        found = client.infer("double", {"x": x}, version=2, outputs=["y"], priority=1)
        assert found["y"].dtype == np.float32
        assert (found["y"] == 2 * x).all()
        assert found["names"].tolist() == [b"", b"ab"]
        assert found["b"].tolist() == [1.0, -2.0]
        line, asked = seen[0]
        assert line == b"POST /v2/models/double/versions/2/infer HTTP/1.1"
        assert asked["parameters"]["priority"] == 1
        assert asked["outputs"] == [{"name": "y", "parameters": {"binary_data": True}}]
        found["y"][0, 0] = 5  # the caller's own
        # Big-endian and strided arrays arrive as values; a list as the model's type; a JSON answer as arrays.
        assert (client.infer("double", {"x": x.astype(">f4")[:, ::-1]})["y"] == 2 * x[:, ::-1]).all()
        assert (
            client.infer("double", {"x": [[0.1, 0.2]] * 3})["y"].tolist() == (np.float32([[0.1, 0.2]] * 3) * 2).tolist()
        )
        assert seen[-1][1]["inputs"][0]["datatype"] == "FP32"
        client.infer("double", {"x": x, "names": np.array([b"a", b""], object), "text": np.array(["ö"])})
        ports = seen[-1][1]["inputs"]
        assert [p["datatype"] for p in ports] == ["FP32", "BYTES", "BYTES"]
        assert [p["parameters"]["binary_data_size"] for p in ports] == [16, 9, 6]
        assert client.metadata("double").inputs[0].shape == [-1, 2]
        for inputs, path in (
            ({}, "inputs"),
            ({"x": np.zeros(2, complex)}, "x"),
            ({"x": ["a"]}, "x"),
            ({"z": [1]}, "z"),
        ):
            with pytest.raises(InvalidRequest) as caught:
                client.infer("double", inputs)
            assert caught.value.path == path


def test_broken_tensors(peers: Any) -> None:
    def document(size: int, shape: list[int], kind: str = "FP32") -> bytes:
        port = {"name": "y", "datatype": kind, "shape": shape, "parameters": {"binary_data_size": size}}
        return json.dumps({"outputs": [port]}).encode()

    cases = [
        (document(8, [2]), b"\0" * 7, 0),
        (document(8, [3]), b"\0" * 8, 0),
        (document(-8, [2]), b"\0" * 8, 0),
        (document(8, [2], "FP31"), b"\0" * 8, 0),
        (document(8, [1], "BYTES"), b"\xff" * 8, 0),
        (document(8, [2]), b"\0" * 8, 10**6),
        (json.dumps({"outputs": [{"name": "y", "datatype": "FP32", "shape": [2], "data": ["a", 1]}]}).encode(), b"", 0),
        (json.dumps({"outputs": [{"name": "y", "datatype": "BYTES", "shape": [2], "data": "a"}]}).encode(), b"", 0),
    ]

    def answer(number: int, request: bytes) -> bytes:
        head, tail, more = cases[number]
        return peers.http_answer(head + tail, 200, f"Inference-Header-Content-Length: {len(head) + more}")  # type: ignore[no-any-return]

    with peers.Peer(answer) as peer, Client(peer.url) as client:
        for _ in cases:
            with pytest.raises(ServerError):
                client.infer("m", {"x": np.zeros(2, np.float32)})
        assert len(peer.requests) == len(cases)
