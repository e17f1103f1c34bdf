"""The client over RESP: against a peer that answers as the contract says, a real server, and peers that fail."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import numpy as np
import pytest

from penstock import AsyncClient, Client, Engine, Event, EventError, Timestamp
from penstock.client import (
    AccessDenied,
    ClientError,
    ConnectionLost,
    DeadlineExceeded,
    Ingested,
    InvalidEvent,
    InvalidRequest,
    NotFound,
    Overloaded,
    ServerError,
)

NOW = datetime.now(UTC).replace(microsecond=123000)
numbers = itertools.count()
MARGIN = 0.3  # seconds that a busy machine may add to a deadline


class Paid(Event, event_id="payment"):
    payment: str
    customer: str
    shop: int
    amount: float
    at: Timestamp


def payment(**changes: Any) -> dict[str, Any]:
    event = {"payment": f"r{next(numbers)}", "customer": "c1", "shop": 7, "amount": 12.5, "at": NOW}
    return {**event, **changes}


def bulk(data: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(data), data)


def reply(value: Any) -> bytes:
    """A value as RESP3."""
    if value is None:
        return b"_\r\n"
    if isinstance(value, bool):
        return b"#t\r\n" if value else b"#f\r\n"
    if isinstance(value, int):
        return b":%d\r\n" % value
    if isinstance(value, float):
        return b",%r\r\n" % value
    if isinstance(value, dict):
        return b"%%%d\r\n" % len(value) + b"".join(reply(k) + reply(v) for k, v in value.items())
    if isinstance(value, list):
        return b"*%d\r\n" % len(value) + b"".join(map(reply, value))
    if isinstance(value, Timestamp):
        return reply(value.isoformat())
    return bulk(value if isinstance(value, bytes) else str(value).encode())


class Contract:
    """Answers commands from an engine, as the server does: slow and obvious."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.lock = threading.Lock()

    def __call__(self, number: int, command: list[bytes]) -> bytes:
        with self.lock:
            try:
                return self.answer(command)
            except EventError as error:
                return f"-ERR invalid_event ${error.path}: {error.message}\r\n".encode()

    def options(self, words: list[bytes], known: dict[bytes, int]) -> tuple[dict[bytes, bytes], list[bytes]]:
        found = {}
        while words[0] in known:
            found[words[0]] = words[1] if known[words[0]] else b""
            words = words[1 + known[words[0]] :]
        return found, words

    def answer(self, command: list[bytes]) -> bytes:
        if command == [b"PING"]:
            return b"+PONG\r\n"
        verb, name, rest = command[0].decode(), command[1].decode(), command[2:]
        timed = {b"TIMEOUT": 1, b"PRIORITY": 1}
        if verb == "PENSTOCK.SCORE":
            if name not in self.engine.plan.pipelines:
                return f"-ERR unknown_pipeline no pipeline {name!r}; have pay\r\n".encode()
            options, payloads = self.options(rest, {**timed, b"NOINGEST": 0, b"EXPLAIN": 0})
            explain, ingest = b"EXPLAIN" in options, b"NOINGEST" not in options
            events = [msgspec.msgpack.decode(p) for p in payloads]
            if len(events) > 1:  # all or nothing
                for i, event in enumerate(events):
                    try:
                        self.engine.score(event, False, pipeline=name)
                    except EventError as error:
                        raise EventError(f"[{i}]{error.path}", error.message) from None
            decisions = [self.engine.score(e, ingest, pipeline=name, explain=explain) for e in events]
            packed = [bulk(msgspec.msgpack.encode(json.loads(d.json(explain)))) for d in decisions]
            return packed[0] if len(packed) == 1 else b"*%d\r\n" % len(packed) + b"".join(packed)
        if verb == "PENSTOCK.INGEST":
            _, payloads = self.options(rest, timed)
            words = [b"+%b\r\n" % self.engine.ingest(msgspec.msgpack.decode(p), name).encode() for p in payloads]
            return words[0] if len(words) == 1 else b"*%d\r\n" % len(words) + b"".join(words)
        if verb == "PENSTOCK.FEATURES":
            if name not in self.engine.plan.views:
                return f"-ERR unknown_view no view {name!r}\r\n".encode()
            options, keys = self.options(rest, {b"ASOF": 1, b"INT": 0, b"WITHSTATUS": 0})
            keys = keys[keys[0] == b"KEYS" :]
            found = self.engine.features(
                name,
                [int(k) if b"INT" in options else k.decode() for k in keys],
                int(options[b"ASOF"]) if b"ASOF" in options else None,
            )
            return reply([[row, statuses] for row, statuses in zip(found.rows, found.statuses)])
        return f"-ERR unknown command '{verb}'\r\n".encode()


def fields(decision: Any) -> dict[str, Any]:
    names = ["action", "score", "reasons", "model", "model_version", "arms", "outcome", "statuses"]
    found = {name: getattr(decision, name) for name in names}
    found["features"] = {
        name: value.isoformat() if isinstance(value, Timestamp) else value for name, value in decision.features.items()
    }
    return found


@pytest.fixture(scope="module", params=["contract", "server"])
def url(request: Any, peers: Any) -> Any:
    """A RESP server of the shop app: one of the contract, and the real one."""
    if request.param == "contract":
        with peers.Peer(Contract(Engine(peers.shop)), resp=True) as peer:
            yield peer.url
    else:
        with peers.resp_server() as url:
            yield url


@pytest.fixture
def client(url: str) -> Any:
    with Client(url) as client:
        yield client


def test_decisions_equal_the_engines(client: Client, peers: Any) -> None:
    engine = Engine(peers.shop)
    events = [
        payment(customer="same", amount=amount, note=note, at=NOW + timedelta(seconds=i))
        for i, (amount, note) in enumerate([(1 / 3, None), (0.1, "naïve \u2603"), (2000.0, ""), (1e-300, "x" * 1000)])
    ]
    for event in events:
        ours = client.score("pay", event, explain=True)
        assert fields(ours) == fields(engine.score(event, pipeline="pay", explain=True))
    more = [{**event, "payment": f"rmore {i}", "amount": event["amount"] / 7} for i, event in enumerate(events)]
    found = client.score("pay", more, explain=True)
    theirs = [engine.score(event, pipeline="pay", explain=True) for event in more]
    assert [fields(d) for d in found] == [fields(d) for d in theirs]
    as_of = NOW + timedelta(seconds=2)
    for view, keys in (("spend", ["same", "none"]), ("spend", ["same"]), ("shops", [7, 8]), ("shops", [7])):
        rows, expected = client.features(view, keys, as_of), engine.features(view, keys, as_of)
        assert rows.view == view
        assert rows.as_of == expected.as_of
        if view == "spend":
            assert rows.rows == expected.rows
            assert rows.statuses == expected.statuses
    assert client.features("spend", ["same"]).as_of is None
    assert client.features("spend", ["KEYS", "INT", "ASOF"]).rows[1]["spend.count_1d"] == 0


def test_lists_ingest_and_health(client: Client) -> None:
    assert client.ready()
    assert client.live()
    assert client.score("pay", []) == []
    assert [d.outcome for d in client.score("pay", [payment()])] == ["applied"]
    assert client.score("pay", payment(), ingest=False).outcome == "off"
    same = payment()
    assert client.ingest("Payment", same) == Ingested(1, {"applied": 1})
    assert client.ingest("Payment", [same]) == Ingested(1, {"duplicate": 1})
    assert client.ingest("Payment", [same, payment(), payment()]) == Ingested(3, {"duplicate": 1, "applied": 2})


def test_typed_input_keeps_what_json_cannot(client: Client) -> None:
    """S11: NaN is null in MessagePack; an infinity travels, and is refused where the field is aggregated."""
    with pytest.raises(InvalidEvent) as caught:
        client.score("pay", payment(amount=float("inf")))
    assert caught.value.path == "$.amount"
    decision = client.score("pay", payment(note=float("nan"), shop=np.int64(3), amount=np.float32(0.5)), explain=True)
    assert decision.features is not None
    assert decision.features["note"] is None
    assert decision.features["amount"] == 0.5


def test_refusals(client: Client) -> None:
    client.score("pay", payment())
    cases: list[tuple[Any, type[ClientError], str, str | None]] = [
        (lambda: client.score("nope", payment()), NotFound, "unknown_pipeline", None),
        (lambda: client.features("nope", ["a"]), NotFound, "unknown_view", None),
        (lambda: client.score("pay", payment(amount="x")), InvalidEvent, "invalid_event", "$.amount"),
        (lambda: client.score("pay", [payment(), payment(at="x")]), InvalidEvent, "invalid_event", "$[1].at"),
        (lambda: client.score("pay", payment(note="\ud800")), InvalidEvent, "invalid_event", "$.note"),
        (lambda: client.score("pay", [payment(), payment(note=object())]), InvalidEvent, "invalid_event", "$[1].note"),
        (lambda: client.features("spend", ["a", 1]), InvalidRequest, "", "$.keys"),
        (lambda: client.metadata("m"), InvalidRequest, "unsupported", None),
        (lambda: client.infer("m", {"x": np.zeros(2)}), InvalidRequest, "", "outputs"),
        (lambda: client.infer("m", {"x": [1.0]}, outputs={"y": "FP32"}), InvalidRequest, "dtype", "x"),
        (lambda: client.infer("m", {"x": np.zeros(2), "y": np.zeros(2)}, outputs={"y": "FP32"}), InvalidRequest, "",
         "inputs"),
        (lambda: client.infer("m", {"x": np.zeros(2)}, outputs={"y": "FP31"}), InvalidRequest, "", "outputs.y"),
    ]  # fmt: skip
    for call, kind, code, path in cases:
        with pytest.raises(kind) as caught:
            call()
        error = caught.value
        assert type(error) is kind
        assert (error.code, error.path, error.status) == (code, path, None), error
    assert client.score("pay", payment()).outcome == "applied"


def test_batches(client: Client) -> None:
    batch = client.pipeline()
    for i in range(200):
        batch.score("pay", payment(customer="batch", amount=float(i), at=NOW + timedelta(milliseconds=i)), explain=True)
    decisions = batch.execute()
    assert [d.features["spend.count_1d"] for d in decisions] == list(range(1, 201))  # type: ignore[index]
    batch.score("pay", payment()).score("pay", payment(amount="x")).score("nope", payment()).score("pay", payment())
    found: list[Any] = batch.execute(raise_errors=False)
    assert [type(f).__name__ for f in found] == ["Decision", "InvalidEvent", "NotFound", "Decision"]
    batch.score("pay", payment()).score("pay", payment(amount="x"))
    with pytest.raises(InvalidEvent):
        batch.execute()


def test_asynchronous(url: str) -> None:
    async def run() -> None:
        async with AsyncClient(url, connections=3) as client:

            async def ask(i: int) -> bool:
                decision = await client.score("pay", payment(amount=float(i)), explain=True)
                return decision.features is not None and decision.features["amount"] == float(i)

            assert all(await asyncio.gather(*[ask(i) for i in range(300)]))
            batch = client.pipeline()
            for i in range(150):
                batch.score("pay", payment(amount=float(i)), explain=True)
            decisions = await batch.execute()
            assert [d.features["amount"] for d in decisions] == [float(i) for i in range(150)]  # type: ignore[index]
            for round_ in range(20):
                tasks = [asyncio.ensure_future(ask(i)) for i in range(20)]
                await asyncio.sleep(round_ * 0.0003)
                for task in tasks[::2]:
                    task.cancel()
                found = await asyncio.gather(*tasks, return_exceptions=True)
                assert all(f is True or isinstance(f, asyncio.CancelledError) for f in found), found
            assert client._pool._slots._value == 3

    asyncio.run(run())


def test_threads(url: str) -> None:
    with Client(url, connections=3) as client, ThreadPoolExecutor(12) as threads:

        def ask(i: int) -> bool:
            decision = client.score("pay", payment(amount=float(i)), explain=True)
            return decision.features is not None and decision.features["amount"] == float(i)

        assert all(threads.map(ask, range(600)))


# against peers that fail

DECISION = bulk(
    msgspec.msgpack.encode(
        {
            "id": "01J",
            "action": "approve",
            "score": 0.25,
            "reasons": [],
            "model": None,
            "model_version": None,
            "arms": {},
            "outcome": "applied",
        }
    )
)


@pytest.mark.parametrize(
    ("text", "kind", "code", "path"),
    [
        ("ERR invalid_event $.amount: expected a number", InvalidEvent, "invalid_event", "$.amount"),
        ("ERR invalid_event $.a b: unknown field: x", InvalidEvent, "invalid_event", "$.a b"),
        ("ERR malformed_payload $: expected a JSON object", InvalidEvent, "malformed_payload", "$"),
        ("ERR unknown_model no model 'm' is loaded", NotFound, "unknown_model", None),
        ("ERR wrong number of arguments for 'penstock.score' command", InvalidRequest, "err", None),
        ("ERR internal the server failed; its log has the reason", ServerError, "internal", None),
        ("WRONGPASS invalid password", AccessDenied, "wrongpass", None),
        ("NOAUTH Authentication required.", AccessDenied, "noauth", None),
        ("BUSY deadline: no answer in time, retry in 3 ms", DeadlineExceeded, "deadline", None),
        ("BUSY overloaded: the queue is full, retry in 12 ms", Overloaded, "overloaded", None),
        ("ERR log_refused the disk is full", Overloaded, "log_refused", None),
        ("what", ServerError, "protocol", None),
    ],
)
def test_error_replies(peers: Any, text: str, kind: type[ClientError], code: str, path: str | None) -> None:
    with peers.Peer(lambda n, command: f"-{text}\r\n".encode(), resp=True) as peer:
        with Client(peer.url, retry="never") as client, pytest.raises(kind) as caught:
            client.score("pay", payment())
        assert type(caught.value) is kind
        assert (caught.value.code, caught.value.path) == (code, path)
        if isinstance(caught.value, Overloaded) and code == "overloaded":
            assert caught.value.retry_after == 0.012


def test_greeting(peers: Any) -> None:
    seen: list[list[bytes]] = []

    class Guarded(peers.Peer):  # type: ignore[misc,name-defined]
        pass

    def answer(number: int, command: list[bytes]) -> bytes:
        seen.append(command)
        return DECISION

    with Guarded(answer, resp=True) as peer, Client(peer.url.replace("//", "//:pass@")) as client:
        client.score("pay", payment())
        client.score("pay", payment())
        assert peer.greetings == 1
        assert peer.accepted == 1
    from penstock.client.address import parse_url
    from penstock.client.calls import Deadline
    from penstock.client.resp import RespProtocol

    hello = RespProtocol(parse_url("resp://ann:p%40ss@h")).greeting()[0].render(Deadline(1))
    assert hello.startswith(
        b"*7\r\n$5\r\nHELLO\r\n$1\r\n3\r\n$4\r\nAUTH\r\n$3\r\nann\r\n$4\r\np@ss\r\n$7\r\nSETNAME\r\n"
    )


def test_passwords(peers: Any) -> None:
    with peers.resp_server("pass word") as url:
        with Client(url.replace("//", "//:pass%20word@")) as client:
            assert client.score("pay", payment()).outcome == "applied"
        for wrong in (url, url.replace("//", "//:pass@"), url.replace("//", "//bob:pass%20word@")):
            with Client(wrong) as client:
                with pytest.raises(AccessDenied):
                    client.score("pay", payment())
                assert not client.ready()


def test_busy_is_tried_again_when_the_server_said(peers: Any) -> None:
    def answer(number: int, command: list[bytes]) -> bytes:
        return b"-BUSY overloaded: the queue is full, retry in 150 ms\r\n" if number == 0 else DECISION

    with peers.Peer(answer, resp=True) as peer, Client(peer.url) as client:
        started = time.monotonic()
        assert client.score("pay", payment()).score == 0.25
        assert 0.15 <= time.monotonic() - started < 0.6
        assert peer.accepted == 1
        assert len(peer.requests) == 2
    with peers.Peer(lambda n, c: b"-BUSY overloaded: the queue is full, retry in 150 ms\r\n", resp=True) as peer:
        with Client(peer.url) as client, pytest.raises(Overloaded):
            client.score("pay", payment(), timeout=0.1)
        assert len(peer.requests) == 1


def test_a_batch_tries_again_only_what_was_refused_for_now(peers: Any) -> None:
    def answer(number: int, command: list[bytes]) -> bytes:
        return b"-BUSY overloaded: the queue is full, retry in 5 ms\r\n" if number in (1, 3) else DECISION

    with peers.Peer(answer, resp=True) as peer, Client(peer.url) as client:
        batch = client.pipeline()
        for _ in range(5):
            batch.score("pay", payment())
        assert len(batch.execute()) == 5
        payloads = [command[-1] for command in peer.requests]
        assert len(payloads) == 7
        assert payloads[5:] == [payloads[1], payloads[3]]


def test_a_batch_that_is_cut_keeps_its_answers(peers: Any) -> None:
    def answer(number: int, command: list[bytes]) -> bytes:
        if number == 3:
            raise peers.Cut()
        return DECISION

    def paid() -> Paid:
        return Paid(**payment())

    with peers.Peer(answer, resp=True) as peer, Client(peer.url) as client:
        batch = client.pipeline()
        for make in (payment, payment, paid, paid, payment, paid):
            batch.score("pay", make())
        found = batch.execute(raise_errors=False)
        # Reset or not, what had arrived counts; the fifth is not safe to send again.
        kinds = [type(f).__name__ for f in found]
        assert kinds[3] == kinds[5] == "Decision"
        assert kinds[4] == "ConnectionLost"
        assert kinds[0] in ("Decision", "ConnectionLost")


@pytest.mark.parametrize("when", ["before", "half"])
def test_what_was_sent_is_sent_again_only_if_safe(peers: Any, when: str) -> None:
    def answer(number: int, command: list[bytes]) -> bytes:
        if number in (0, 2):
            raise peers.Cut(DECISION[:40] if when == "half" else b"")
        return DECISION

    with peers.Peer(answer, resp=True) as peer, Client(peer.url) as client:
        assert client.score("pay", Paid(**payment())).score == 0.25
        assert len(peer.requests) == 2
        with pytest.raises(ConnectionLost) as caught:
            client.score("pay", payment())
        assert caught.value.sent
        assert len(peer.requests) == 3
        assert client.score("pay", payment()).score == 0.25


def test_deadlines_hold(peers: Any) -> None:
    def answer(number: int, command: list[bytes]) -> bytes:
        time.sleep(0.5)
        return DECISION

    with peers.Peer(answer, resp=True) as peer, Client(peer.url, timeout=0.2) as client:
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded) as caught:
            client.score("pay", Paid(**payment()))
        assert 0.15 < time.monotonic() - started < 0.2 + MARGIN
        assert caught.value.sent
        assert client.score("pay", payment(), timeout=5).score == 0.25
        timeouts = [int(command[command.index(b"TIMEOUT") + 1]) for command in peer.requests if b"TIMEOUT" in command]
        assert all(0 < us <= 200_000 for us in timeouts[:1])
        assert all(us <= 5_000_000 for us in timeouts)


def test_no_answer_to_the_greeting(peers: Any) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = Client(f"resp://127.0.0.1:{listener.getsockname()[1]}", timeout=0.2)
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded) as caught:
            client.score("pay", payment())
        assert time.monotonic() - started < 0.2 + MARGIN
        assert not caught.value.sent


def test_answers_that_are_none(peers: Any) -> None:
    answers = [b"?what\r\n", reply(3), reply([1]), reply(None), b"#f\r\n", bulk(b"\xc1"), bulk(b"{}")]
    with peers.Peer(lambda n, command: answers[n], resp=True) as peer, Client(peer.url) as client:
        for _ in answers:
            with pytest.raises(ServerError):
                client.score("pay", payment())
        assert len(peer.requests) == len(answers)


def test_pushes_are_no_answers(peers: Any) -> None:
    push = b">2\r\n+note\r\n+x\r\n"
    with peers.Peer(lambda n, command: push + DECISION, resp=True) as peer, Client(peer.url) as client:
        assert client.score("pay", payment()).score == 0.25
        assert client.score("pay", payment()).score == 0.25


def test_inference(peers: Any) -> None:
    def answer(number: int, command: list[bytes]) -> bytes:
        x = np.frombuffer(command[-1], "<f4")
        y = bulk((x * 2).tobytes())
        return y if number == 0 else b"*2\r\n" + y + bulk(np.arange(2, dtype="<i8").tobytes())

    with peers.Peer(answer, resp=True) as peer, Client(peer.url) as client:
        x = np.array([[1, 2], [3, 4]], dtype=np.float32)
        found = client.infer("m", {"x": x}, version=3, outputs={"y": "FP32"}, priority=2)
        assert (found["y"] == 2 * x).all()
        assert peer.requests[0][:2] == [b"PENSTOCK.INFER", b"m@3"]
        assert b"PRIORITY" in peer.requests[0]
        found = client.infer("m", {"x": x}, outputs={"y": "FP32", "n": "INT64"})
        assert found["n"].tolist() == [[0], [1]]
        with pytest.raises(ServerError):
            client.infer("m", {"x": x}, outputs={"y": "FP32"})
