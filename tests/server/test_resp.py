"""RESP: any Redis client is a client. Raw sockets, redis-py, redis-cli, redis-benchmark; redis-server as the oracle."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import re
import resource
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock import Engine
from penstock._ext.flow import Flow, Lane
from penstock.server.config import ServerConfig
from penstock.server.resp import COMMANDS, build_resp

APP = Path(__file__).with_name("fraud_app.py")
MAX_BODY = 65536
SLOW_NS = 10_000_000  # a lane that is taken to be so slow queues everything


class Error(Exception):
    pass


class Reader:
    """Reads replies strictly; independent of any client library."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def line(self) -> bytes:
        while b"\r\n" not in self.client.buffer:
            self.client.fill()
        line, _, self.client.buffer = self.client.buffer.partition(b"\r\n")
        return line

    def take(self, n: int) -> bytes:
        while len(self.client.buffer) < n + 2:
            self.client.fill()
        data, end, self.client.buffer = (
            self.client.buffer[:n],
            self.client.buffer[n : n + 2],
            self.client.buffer[n + 2 :],
        )
        assert end == b"\r\n"
        return data

    def reply(self) -> Any:
        line = self.line()
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest.decode()
        if kind == b"-":
            return Error(rest.decode())
        if kind == b":":
            return int(rest)
        if kind == b",":
            return float(rest)
        if kind == b"#":
            return {b"t": True, b"f": False}[rest]
        if kind == b"_":
            assert rest == b""
            return None
        if kind == b"$":
            return None if rest == b"-1" else self.take(int(rest))
        if kind == b"=":
            data = self.take(int(rest))
            assert data[:4] == b"txt:"
            return data[4:].decode()
        if kind in b"*~":
            return [self.reply() for _ in range(int(rest))]
        if kind == b"%":
            pairs = [(self.reply(), self.reply()) for _ in range(int(rest))]
            assert len(dict(pairs)) == len(pairs)
            return dict(pairs)
        raise AssertionError(f"not a reply: {line!r}")


class Closed(Exception):
    pass


class Client:
    def __init__(self, port: int, timeout: float = 10.0) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""
        self.reader = Reader(self)

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def fill(self) -> None:
        try:
            data = self.socket.recv(65536)
        except (ConnectionResetError, BrokenPipeError):
            data = b""
        if not data:
            raise Closed(self.buffer)
        self.buffer += data

    def read(self) -> Any:
        return self.reader.reply()

    def ask(self, *arguments: Any) -> Any:
        self.send(command(*arguments))
        return self.read()

    def rest(self) -> bytes:
        """Everything until the server closes."""
        with contextlib.suppress(Closed):
            while True:
                self.fill()
        data, self.buffer = self.buffer, b""
        return data

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def command(*arguments: Any) -> bytes:
    """The bytes of a command."""
    parts = [a if isinstance(a, bytes) else str(a).encode() for a in arguments]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(p), p) for p in parts)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def event(**changes: Any) -> dict[str, Any]:
    made = {"customer": "c1", "terminal": "t1", "amount": 12.5, "at": now(), **changes}
    return {name: value for name, value in made.items() if value is not ...}


def as_json(**changes: Any) -> bytes:
    return json.dumps(event(**changes)).encode()


def as_pack(**changes: Any) -> bytes:
    return msgspec.msgpack.encode(event(**changes))


class Served:
    """A RESP server of the fraud app in a thread.

    way: "inline", "queued" (every command waits in the loop's queue first) or "pooled" (models run on the pool).
    """

    def __init__(
        self, way: str = "inline", app: Any = APP, lanes: Any = None, find_model: Any = None, **limits: Any
    ) -> None:
        self.engine = Engine(app)
        self.config = ServerConfig(**{"max_body": MAX_BODY, **limits})
        self.find_model = find_model
        self.slow: list[Lane] = []
        self.event_lanes = None
        if way != "inline":
            pool = way == "pooled"
            lanes = {name: Lane(name, row_ns=SLOW_NS, may_pool=pool) for name in self.engine.plan.pipelines}
            self.event_lanes = {name: Lane(name, row_ns=SLOW_NS) for name in self.engine.plan.events}
            self.slow = [*lanes.values(), *self.event_lanes.values()]
        self.lanes = lanes
        self.started = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.stop = asyncio.Event()
        self.flow = Flow(1)
        self.flow.start(self.loop)
        self.server = build_resp(
            self.engine,
            self.config,
            flow=self.flow,
            lanes=self.lanes,
            event_lanes=self.event_lanes,
            find_model=self.find_model,
        )
        acceptor = await self.loop.create_server(self.server, "127.0.0.1", 0)
        self.port = acceptor.sockets[0].getsockname()[1]
        sweeper = asyncio.ensure_future(self._sweep())
        self.started.set()
        await self.stop.wait()
        sweeper.cancel()
        acceptor.close()
        self.server.close_idle(force=True)
        await asyncio.sleep(0.01)
        self.flow.stop()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(0.02)
            self.server.sweep()
            for lane in self.slow:
                lane.seed(SLOW_NS)

    def __enter__(self) -> Served:
        self.thread.start()
        assert self.started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join(10)
        assert not self.thread.is_alive()

    def client(self) -> Client:
        return Client(self.port)

    def exchange(self, data: bytes) -> bytes:
        """All that is answered to some bytes, which end the connection."""
        with self.client() as client:
            client.send(data)
            client.socket.shutdown(socket.SHUT_WR)
            return client.rest()


@pytest.fixture(scope="module", params=["inline", "queued", "pooled"])
def served(request: Any) -> Iterator[Served]:
    with Served(request.param) as running:
        yield running


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with served.client() as opened:
        yield opened


def told(data: bytes) -> Any:
    """A decision, from JSON or MessagePack."""
    return msgspec.json.decode(data) if data[:1] == b"{" else msgspec.msgpack.decode(data)


# Scoring.


def test_score_answers_in_the_format_of_the_payload(client):
    for payload in (as_json(customer="f"), as_pack(customer="f")):
        answer = client.ask("PENSTOCK.SCORE", "fraud", payload)
        assert (answer[:1] == b"{") == (payload[:1] == b"{")
        assert set(told(answer)) == {
            "id", "action", "score", "reasons", "model", "model_version", "arms", "outcome"
        }  # fmt: skip
        assert told(answer)["outcome"] == "applied"
    assert told(client.ask("penstock.score", "fraud", b" \r\n" + as_json(amount=2000)))["action"] == "decline"


def test_score_is_the_engines(client, served):
    """The same events one by one through the library and through the wire give the same decisions."""
    engine = Engine(APP)
    generator = random.Random(7)
    events = [event(customer=f"same{generator.randrange(5)}", amount=generator.random() * 2000) for _ in range(100)]
    client.send(b"".join(command("PENSTOCK.SCORE", "fraud", json.dumps(e).encode()) for e in events))
    for e in events:
        mine, its = engine.score(e).as_dict(), told(client.read())
        del mine["id"], its["id"]
        assert mine == its


def test_options(client):
    key = f"options{time.time_ns()}"
    for _ in range(3):
        answer = told(client.ask("PENSTOCK.SCORE", "fraud", "noingest", "EXPLAIN", as_json(customer=key)))
        assert answer["outcome"] == "off"
        assert answer["features"]["spend.count_1d"] == 1
    answer = told(
        client.ask("PENSTOCK.SCORE", "fraud", "EXPLAIN", "TIMEOUT", 5000000, "PRIORITY", 1, as_pack(customer=key))
    )
    assert answer["outcome"] == "applied"
    assert answer["statuses"]["spend.count_1d"] == "PRESENT"
    for wrong in (["TIMEOUT", "soon"], ["TIMEOUT"], ["PRIORITY", 8], ["PRIORITY", -1], ["WHAT"], ["TIMEOUT", 1]):
        answer = client.ask("PENSTOCK.SCORE", "fraud", *wrong)
        assert isinstance(answer, Error), wrong
        assert str(answer).startswith("ERR"), answer


def test_several_payloads(client, served):
    answers = client.ask(
        "PENSTOCK.SCORE", "fraud", *[as_json(customer=f"s{i}") if i % 2 else as_pack() for i in range(40)]
    )
    assert [a[:1] == b"{" for a in answers] == [bool(i % 2) for i in range(40)]
    before = served.engine.stats()["outcomes"]
    for bad, path in (
        (as_json(amount="x"), "$[2].amount"),
        (as_json(customer="c" * 2000), "$[2].customer"),
        (b"[", "$[2]"),
    ):
        error = client.ask("PENSTOCK.SCORE", "fraud", as_json(), as_pack(), bad)
        assert isinstance(error, Error)
        assert path in str(error), error
    assert served.engine.stats()["outcomes"] == before


@pytest.mark.parametrize(
    ("payload", "start"),
    [
        (b"", "ERR malformed_payload $: expected a JSON object or a MessagePack map, got nothing"),
        (b"{", "ERR malformed_payload $: "),
        (b"[]", "ERR malformed_payload $: expected a JSON object or a MessagePack map"),
        (b"\x81", "ERR malformed_payload $: "),
        (b"\xdf\xff\xff\xff\xff", "ERR malformed_payload $: "),
        (b"{}", "ERR invalid_event $: Object missing required field `customer`"),
        (as_json(amount="12"), "ERR invalid_event $.amount: Expected `float`, got `str`"),
        (as_pack(amount="12"), "ERR invalid_event $.amount: Expected `float`, got `str`"),
        (as_json(at="yesterday"), "ERR invalid_event $.at: "),
        (as_json(bad=1), "ERR invalid_event $: Object contains unknown field `bad`"),
        (b'{"customer":"\xff"}', "ERR "),
        (b"[" * 60000, "ERR "),
        (b'{"customer":' + b"[" * 50000, "ERR "),
    ],
)
def test_bad_payloads(client, served, payload, start):
    before = served.engine.stats()["outcomes"]
    client.send(command("PENSTOCK.SCORE", "fraud", payload) + command("PING"))
    error = client.read()
    assert isinstance(error, Error)
    assert str(error).startswith(start)
    assert client.read() == "PONG"
    assert served.engine.stats()["outcomes"] == before


def test_errors_are_their_commands_alone_and_in_order(client):
    commands = []
    wrong = as_json(amount="x")
    for i in range(200):
        commands.append(
            [
                ("PENSTOCK.SCORE", "fraud", as_json(customer=f"o{i}")),
                ("PENSTOCK.SCORE", "fraud", wrong),
                ("PENSTOCK.SCORE", "nothing", as_json()),
                ("ECHO", f"echo {i}"),
                ("PENSTOCK.INGEST", "Transaction", as_pack()),
                ("PENSTOCK.SCORE", "fraud", "NOINGEST", as_pack()),
                ("PENSTOCK.SCORE",),
                ("NOSUCH", "thing"),
                ("PENSTOCK.SCORE", "fraud", as_json(), as_json()),
            ][random.Random(i).randrange(9)]
        )
    client.send(b"".join(command(*c) for c in commands))
    for c in commands:
        answer = client.read()
        if c[0] == "ECHO":
            assert answer == c[1].encode()
        elif c[0] == "PENSTOCK.INGEST":
            assert answer == "applied"
        elif c[0] == "NOSUCH":
            assert str(answer) == "ERR unknown command 'NOSUCH', with args beginning with: 'thing' "
        elif len(c) == 1:
            assert str(answer) == "ERR wrong number of arguments for 'penstock.score' command"
        elif c[1] == "nothing":
            assert str(answer) == "ERR unknown_pipeline no pipeline 'nothing'; have fraud"
        elif c[2] is wrong:
            assert "invalid_event" in str(answer)
        elif c[2] == "NOINGEST":
            assert told(answer)["outcome"] == "off"
        elif len(c) == 4:
            assert len(answer) == 2
        else:
            assert told(answer)["outcome"] == "applied"


def test_events_that_arrive_together_are_scored_together(client, served):
    client.ask("PING")
    before = served.server.batches, served.server.batched
    client.send(b"".join(command("PENSTOCK.SCORE", "fraud", as_json(customer=f"t{i}")) for i in range(16)))
    for _ in range(16):
        assert told(client.read())["outcome"] == "applied"
    assert served.server.batched - before[1] == 16
    assert served.server.batches - before[0] <= 4


def test_everyone_gets_his_own_answers(served):
    """Events of many connections are scored together; what each says of itself comes back to it, in order."""
    generator = random.Random(5)
    clients = [served.client() for _ in range(40)]
    for round in range(25):
        expected: list[list[Any]] = [[] for _ in clients]
        for i, client in enumerate(clients):
            stream = b""
            for j in range(generator.choice([1, 1, 1, 2, 20])):
                amount = float(i * 1000 + round * 30 + j)
                match generator.randrange(6):
                    case 0:
                        stream += command("ECHO", amount)
                        expected[i].append(str(amount).encode())
                    case 1:
                        stream += command("PENSTOCK.SCORE", "fraud", as_json(amount=str(amount)))
                        expected[i].append(Error)
                    case 2:
                        stream += command(
                            "PENSTOCK.SCORE", "fraud", "NOINGEST", "EXPLAIN", *[as_pack(amount=amount)] * 2
                        )
                        expected[i].append([amount] * 2)
                    case _:
                        stream += command("PENSTOCK.SCORE", "fraud", "NOINGEST", "EXPLAIN", as_json(amount=amount))
                        expected[i].append(amount)
            client.send(stream)
        for client, answers in zip(clients, expected):
            for answer in answers:
                got = client.read()
                if answer is Error:
                    assert isinstance(got, Error)
                elif isinstance(answer, bytes):
                    assert got == answer
                elif isinstance(answer, list):
                    assert [told(g)["features"]["amount"] for g in got] == answer
                else:
                    assert told(got)["features"]["amount"] == answer
    for client in clients:
        client.socket.close()


def test_ingest(client, served):
    assert client.ask("PENSTOCK.INGEST", "Login", json.dumps({"customer": "i", "tries": 1, "at_ms": 1}).encode()) in (
        "applied", "late",
    )  # fmt: skip
    answers = client.ask("PENSTOCK.INGEST", "Transaction", as_json(), as_pack(), as_json(at="2001-01-01T00:00:00Z"))
    assert answers == ["applied", "applied", "late"]
    before = served.engine.stats()["outcomes"]
    assert "$.amount" in str(client.ask("PENSTOCK.INGEST", "Transaction", as_json(amount="x")))
    assert "$.customer" in str(client.ask("PENSTOCK.INGEST", "Transaction", as_json(customer="x" * 3000)))
    assert "$[1].customer" in str(client.ask("PENSTOCK.INGEST", "Transaction", as_json(), as_json(customer="x" * 3000)))
    assert "unknown_event" in str(client.ask("PENSTOCK.INGEST", "Nothing", as_json()))
    assert served.engine.stats()["outcomes"] == before


def test_features(client):
    key = f"read{time.time_ns()}"
    for amount in (10, 20):
        client.ask("PENSTOCK.SCORE", "fraud", as_json(customer=key, amount=amount))
    flat = client.ask("PENSTOCK.FEATURES", "spend", key, "nobody")
    assert len(flat) == 2
    found = dict(zip(flat[0][::2], flat[0][1::2]))
    assert found == {
        b"spend.count_1d": 2,
        b"spend.count_7d": 2,
        b"spend.mean_amount_1d": b"15.0",
        b"spend.mean_amount_7d": b"15.0",
    }
    client.ask("HELLO", 3)
    found, nobody = client.ask("PENSTOCK.FEATURES", "spend", "KEYS", key, "nobody")
    assert found == {
        b"spend.count_1d": 2,
        b"spend.count_7d": 2,
        b"spend.mean_amount_1d": 15.0,
        b"spend.mean_amount_7d": 15.0,
    }
    assert nobody[b"spend.mean_amount_1d"] is None
    ((values, statuses),) = client.ask("PENSTOCK.FEATURES", "spend", "WITHSTATUS", key)
    assert values == found
    assert statuses[b"spend.count_1d"] == b"PRESENT"
    later = client.ask("PENSTOCK.FEATURES", "spend", "ASOF", "2990-01-01T00:00:00Z", key)
    assert later[0][b"spend.count_1d"] == 0
    for wrong in (
        ["nothing", key],
        ["spend", "ASOF", "x", key],
        ["spend", "INT", "x"],
        ["spend", b"\xff"],
        ["spend", "INT"],
    ):
        assert isinstance(client.ask("PENSTOCK.FEATURES", *wrong), Error), wrong
    assert "replay_needed" in str(client.ask("PENSTOCK.FEATURES", "spend", "ASOF", "2001-01-01T00:00:00Z", key))


# The connection.


def test_hello(client):
    assert client.ask("HELLO")[:2] == [b"server", b"penstock"]
    assert client.ask("HELLO", "3", "SETNAME", "me")[b"proto"] == 3
    assert client.ask("CLIENT", "GETNAME") == b"me"
    assert client.ask("HELLO", "2")[4:6] == [b"proto", 2]
    assert str(client.ask("HELLO", "4")) == "NOPROTO unsupported protocol version"
    assert str(client.ask("HELLO", "x")) == "ERR Protocol version is not an integer or out of range"
    assert client.ask("RESET") == "RESET"
    assert client.ask("CLIENT", "GETNAME") is None


def test_client_commands(client, served):
    mine = client.ask("CLIENT", "ID")
    with served.client() as other:
        assert other.ask("CLIENT", "ID") > mine
        assert client.ask("CLIENT", "SETNAME", "one") == "OK"
        assert client.ask("CLIENT", "SETINFO", "LIB-NAME", "test") == "OK"
        assert f"id={mine} addr=127.0.0.1:".encode() in client.ask("CLIENT", "INFO")
        assert b"name=one" in other.ask("CLIENT", "LIST")
    assert "Client names" in str(client.ask("CLIENT", "SETNAME", "a b"))
    assert isinstance(client.ask("CLIENT", "REPLY", "OFF"), Error)
    assert client.ask("SELECT", 0) == "OK"
    assert str(client.ask("SELECT", 1)) == "ERR DB index is out of range"


def test_a_refused_multi_takes_all_up_to_its_end_with_it(served):
    """What a client means to be done together is not done one by one; after EXEC or DISCARD the connection goes on."""
    ingest = ("PENSTOCK.INGEST", "Transaction", as_json())
    between = [
        ingest,
        ("PENSTOCK.SCORE", "fraud", as_json()),
        ("PENSTOCK.SCORE", "fraud", as_json(), as_json()),
        ("PENSTOCK.SCORE", "fraud", "NOINGEST", as_json()),
        ("PENSTOCK.FEATURES", "spend", "c1"),
        ("PENSTOCK.INFER", "none", "x"),
        ("PING",), ("ECHO", "x"), ("SELECT", "0"), ("HELLO", "3"), ("MULTI",), ("WATCH", "k"), ("NOSUCH",),
        ("DISCARD", "x"),
    ]  # fmt: skip
    before = served.engine.stats()["outcomes"]
    ends = ((("EXEC",), "EXECABORT"), (("EXEC", "x"), "EXECABORT"), (("DISCARD",), "OK"), (("RESET",), "RESET"))
    for end, reply in ends:
        for start in (("MULTI",), ("multi",), ("MULTI", "x")):
            with served.client() as client:
                assert "no transactions" in str(client.ask(*start))
                for asked in between:  # each alone, then all in one write
                    assert isinstance(client.ask(*asked), Error), asked
                client.send(
                    b"".join(command(*asked) for asked in between) + b"PENSTOCK.SCORE fraud {}\r\n" + command(*end)
                )
                answers = [client.read() for _ in range(len(between) + 2)]
                assert all(isinstance(answer, Error) for answer in answers[:-1])
                assert all(
                    "MULTI before it was refused" in str(a) for a in answers[:-1] if "wrong number" not in str(a)
                )
                assert str(answers[-1]).split()[0] == reply
                assert client.ask("PING") == "PONG"
    assert served.engine.stats()["outcomes"] == before
    with served.client() as client:
        # Also where what went before it waits in a queue.
        client.send(
            command("PENSTOCK.SCORE", "fraud", as_json()) + command("MULTI") + command(*ingest) + command("EXEC")
        )
        assert told(client.read())["outcome"] == "applied"
        assert [str(client.read()).split()[0] for _ in range(3)] == ["ERR", "ERR", "EXECABORT"]
        assert told(client.ask("PENSTOCK.SCORE", "fraud", as_json()))["outcome"] == "applied"


def test_redis_pys_default_pipeline_raises_and_changes_nothing(served):
    redis = pytest.importorskip("redis")
    before = served.engine.stats()["outcomes"]
    with redis.Redis(port=served.port) as r:
        for raising in (True, False):
            pipeline = r.pipeline()
            for _ in range(3):
                pipeline.execute_command("PENSTOCK.INGEST", "Transaction", as_json())
            with pytest.raises(redis.ResponseError, match="no transactions"):
                pipeline.execute(raise_on_error=raising)
        assert served.engine.stats()["outcomes"] == before
        assert r.execute_command("PENSTOCK.INGEST", "Transaction", as_json()) in (b"applied", "applied")


def test_events_of_one_command_are_ingested_by_time_and_answered_as_they_were_given(client, served):
    many = [as_json(customer=f"bulk{i % 7}", at=f"2001-01-{1 + (i * 11) % 27:02d}T00:00:00Z") for i in range(150)]
    at = int(datetime.now(UTC).timestamp()) * 1000
    logins = [{"customer": "bulk", "tries": 1, "at_ms": at - 1000 * back} for back in (0, 7200, 0, 90000, -90000, 3)]
    with Served() as fresh, fresh.client() as alone:
        assert alone.ask("PENSTOCK.INGEST", "Transaction", *many) == ["applied"] * 150
        assert alone.ask("PENSTOCK.INGEST", "Login", *[json.dumps(e).encode() for e in logins]) == [
            "applied", "applied", "applied", "applied", "quarantined", "applied",
        ]  # fmt: skip
    client.ask("PENSTOCK.INGEST", "Login", json.dumps(logins[0]).encode())
    answers = client.ask("PENSTOCK.INGEST", "Login", *[json.dumps(e).encode() for e in logins])
    assert answers[4] == "quarantined"
    assert [answers[i] for i in (0, 2)] == ["applied"] * 2
    assert answers[3] == "late"


def test_info_and_command(client):
    info = client.ask("INFO").decode()
    assert "penstock_version:" in info
    assert "loading:0\r\n" in info
    assert client.ask("INFO", "clients").decode().startswith("# Clients\r\nconnected_clients:")
    names = {name.decode().upper() for name in client.ask("COMMAND", "LIST")}
    assert names == set(COMMANDS)
    assert client.ask("COMMAND", "COUNT") == len(names)
    flat = client.ask("COMMAND", "DOCS", "penstock.score")
    assert flat[0] == b"penstock.score"
    assert [entry[0] for entry in client.ask("COMMAND")] == [name.lower().encode() for name in COMMANDS]
    assert client.ask("COMMAND", "INFO", "ping", "nothing")[1] is None
    client.ask("HELLO", 3)
    docs = client.ask("COMMAND", "DOCS")
    assert docs[b"ping"][b"summary"]
    assert client.ask("INFO").startswith("# Server\r\n")


def test_quit_answers_what_came_before(client):
    client.send(command("PENSTOCK.SCORE", "fraud", as_json()) + command("QUIT") + command("PING"))
    assert told(client.read())["outcome"] == "applied"
    assert client.read() == "OK"
    assert client.rest() == b""


def test_half_closed_connections_are_answered(served):
    answers = served.exchange(b"".join(command("PENSTOCK.SCORE", "fraud", as_json()) for _ in range(50)))
    assert answers.count(b'"outcome":"applied"') == 50


def test_password():
    with Served(password="opén sesame") as served, served.client() as client:
        for asked in (["PING"], ["PENSTOCK.SCORE", "fraud", as_json()], ["PENSTOCK.INGEST", "Login", "{}"], ["NOSUCH"]):
            assert str(client.ask(*asked)) == "NOAUTH Authentication required."
        assert str(client.ask("HELLO", 3)).startswith("NOAUTH HELLO must be called")
        assert str(client.ask("AUTH", "wrong")).startswith("WRONGPASS")
        assert str(client.ask("AUTH", "other", "opén sesame")).startswith("WRONGPASS")
        assert str(client.ask("HELLO", 3, "AUTH", "default", "wrong")).startswith("WRONGPASS")
        assert client.ask("AUTH", "opén sesame") == "OK"
        assert client.ask("PING") == "PONG"
        assert client.ask("RESET") == "RESET"
        assert str(client.ask("PING")).startswith("NOAUTH")
        assert client.ask("HELLO", 3, "AUTH", "default", "opén sesame")[b"proto"] == 3
        assert told(client.ask("PENSTOCK.SCORE", "fraud", as_json()))["outcome"] == "applied"
        with served.client() as stranger:
            stranger.send(b"*11\r\n")
            assert stranger.rest() == b"-ERR Protocol error: unauthenticated multibulk length\r\n"
        with served.client() as stranger:
            stranger.send(b"*1\r\n$16385\r\n")
            assert stranger.rest() == b"-ERR Protocol error: unauthenticated bulk length\r\n"
    with Served() as served, served.client() as client:
        assert str(client.ask("AUTH", "x")).startswith("ERR AUTH <password> called without any password")
        assert client.ask("AUTH", "default", "x") == "OK"


# What is wrong on the wire.

WRONG_FRAMES = [
    (b"*x\r\n", b"invalid multibulk length"),
    (b"*3000000000\r\n", b"invalid multibulk length"),
    (b"*99999999999999999999999\r\n", b"invalid multibulk length"),
    (b"*1 \r\n", b"invalid multibulk length"),
    (b"*+1\r\n", b"invalid multibulk length"),
    (b"*01\r\n", b"invalid multibulk length"),
    (b"*-0\r\n", b"invalid multibulk length"),
    (b"*\r\n", b"invalid multibulk length"),
    (b"*1\r\n+PING\r\n", b"expected '$', got '+'"),
    (b"*1\r\n*1\r\n", b"expected '$', got '*'"),
    (b"*1\r\n$-1\r\n", b"invalid bulk length"),
    (b"*1\r\n$x\r\n", b"invalid bulk length"),
    (b"*1\r\n$\r\n", b"invalid bulk length"),
    (b"*1\r\n$99999999999999999999\r\n", b"invalid bulk length"),
    (b"*2\r\n$4\r\nPING\r\n$-5\r\n", b"invalid bulk length"),
    (b'"unbalanced\r\n', b"unbalanced quotes in request"),
    (b"'a'b\r\n", b"unbalanced quotes in request"),
    (b"a" * 65537 + b"a" * 100, b"too big inline request"),
]
OURS = [
    (b"*1\r\n$%d\r\n" % (MAX_BODY + 1), b"invalid bulk length"),
    (b"*16385\r\n", b"invalid multibulk length"),
    (b"*1\r\n$4\r\nPINGxx", b"expected CR LF after a bulk"),
    (b"*1\rx", b"invalid multibulk length"),
    (b"*10\r\n" + b"$65536\r\n%s\r\n" % (b"a" * 65536) * 6, b"too big command, at most 327680 bytes"),
]


@pytest.mark.parametrize(("frame", "message"), WRONG_FRAMES + OURS)
def test_protocol_errors(served, frame, message):
    with served.client() as client:
        client.send(command("ECHO", "before") + command("PENSTOCK.SCORE", "fraud", as_json()))
        with contextlib.suppress(ConnectionError):
            client.send(frame)
        assert client.read() == b"before"
        assert told(client.read())["outcome"] == "applied"
        assert client.rest() == b"-ERR Protocol error: " + message + b"\r\n"


def test_empty_commands_are_skipped_and_a_flood_is_cheap(served, client):
    assert client.ask("PING") == "PONG"
    client.send(b"*0\r\n*-1\r\n*-7\r\n\r\n  \r\n\n" + command("ECHO", "x"))
    assert client.read() == b"x"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    client.send(b"*0\r\n" * 1_000_000 + command("PING"))
    assert client.read() == "PONG"
    assert time.perf_counter() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_inline(client):
    assert client.ask("PING") == "PONG"
    client.send(b"PING\r\nping\n  echo   'a b'\r\nECHO \"\\x41\\n\\\"\"\r\nECHO 'it\\'s'\r\nECHO \"\"\r\n")
    assert [client.read() for _ in range(6)] == ["PONG", "PONG", b"a b", b'A\n"', b"it's", b""]
    client.send(b"PENSTOCK.SCORE fraud '" + as_json(customer="inline") + b"'\r\n" * 1)
    assert told(client.read())["outcome"] == "applied"
    line = b"PENSTOCK.SCORE fraud '" + as_json(customer="inline") + b"'\r\n"
    client.send((line + command("PENSTOCK.SCORE", "fraud", as_pack())) * 20)
    answers = [client.read() for _ in range(40)]
    assert [a[:1] == b"{" for a in answers] == [True, False] * 20


def test_http_is_turned_away(served):
    with served.client() as client:
        client.send(b"POST /v1/score/fraud HTTP/1.1\r\nHost: x\r\n\r\nPENSTOCK.SCORE fraud {}\r\n")
        assert client.rest() == b"-ERR this port speaks RESP, not HTTP\r\n"


@pytest.mark.parametrize("way", ["inline", "queued"])
def test_half_a_command_is_closed_in_time(way):
    with Served(way, body_timeout=0.5) as served:
        _half_commands(served)


def _half_commands(served):
    for half in (
        b"*",
        b"*2\r\n$4\r\nEC",
        b"PIN",
        b"*1\r\n$4\r\nPING\r",
        b"*3\r\n$14\r\nPENSTOCK.SCORE\r\n$5\r\nfraud\r\n",
    ):
        with served.client() as client:
            client.send(half)
            began = time.perf_counter()
            assert client.rest() == b"-ERR timeout the rest of the command did not arrive in time\r\n"
            assert 0.3 < time.perf_counter() - began < 3
    with served.client() as client:  # a byte now and then does not help
        began = time.perf_counter()
        with contextlib.suppress(ConnectionError):
            for _ in range(40):
                client.send(b"P")
                time.sleep(0.05)
        assert b"timeout" in client.rest()


def test_idle_connections_are_closed():
    with Served(idle_timeout=0.3) as served, served.client() as client:
        assert client.ask("PING") == "PONG"
        assert client.rest() == b""


def test_connection_limit():
    with Served(max_connections=2) as served, served.client() as one, served.client() as two:
        assert one.ask("PING") == two.ask("PING") == "PONG"
        with served.client() as three:
            assert three.rest() == b"-ERR max_clients max number of clients reached\r\n"
        assert one.ask("PING") == "PONG"


def test_a_reader_that_does_not_read_costs_only_itself(served):
    with served.client() as slow, served.client() as other:
        slow.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        payload = b"x" * 60000
        slow.socket.settimeout(0.5)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sent = 0
        with contextlib.suppress(TimeoutError):
            for _ in range(2000):
                slow.send(command("ECHO", payload))
                sent += 1
        assert sent < 2000
        assert other.ask("PING") == "PONG"
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_deep_pipelines_give_others_their_turn(served):
    """60,000 commands on one connection while another asks one at a time."""
    with served.client() as deep, served.client() as other:
        data = command("PENSTOCK.SCORE", "fraud", as_json(customer="deep"))
        n = 60000
        sender = threading.Thread(target=deep.send, args=(data * n,))
        sender.start()
        taken = []

        def read() -> None:
            for _ in range(n):
                taken.append(deep.read())

        reader = threading.Thread(target=read)
        reader.start()
        waits = []
        while reader.is_alive():
            began = time.perf_counter()
            assert other.ask("PING") == "PONG"
            waits.append(time.perf_counter() - began)
        sender.join()
        reader.join()
        assert len(taken) == n
        assert len(waits) > 10


# How the bytes are split changes nothing.

STREAM_COMMANDS = st.lists(
    st.one_of(
        st.binary(max_size=20).map(lambda b: command("ECHO", b)),
        st.just(command("PING")),
        st.just(b"PING\r\n"),
        st.just(b"*0\r\n"),
        st.just(b"\r\n"),
        st.just(b'echo "a b"\r\n'),
        st.sampled_from(["a", "b"]).map(
            lambda c: command("PENSTOCK.SCORE", "fraud", "NOINGEST", as_json(customer=c, at="2026-01-01T00:00:00Z"))
        ),
        st.just(command("PENSTOCK.SCORE", "fraud", "NOINGEST", as_pack(customer="c", at="2026-01-01T00:00:00Z"))),
        st.just(command("PENSTOCK.SCORE", "fraud", "NOINGEST", b"{}")),
        st.just(command("PENSTOCK.SCORE", "fraud", "NOINGEST", b"{}", b"{}")),
        st.just(command("PENSTOCK.SCORE", "nothing", b"{}")),
        st.just(command("NOSUCH", "a")),
        st.sampled_from([frame for frame, _ in WRONG_FRAMES if len(frame) < 100]),
    ),
    max_size=12,
)


def _without_ids(answers: bytes) -> bytes:
    return re.sub(rb"(\xa2id\xba|\"id\":\")[0-9A-Z]{26}", rb"\1", answers)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(commands=STREAM_COMMANDS, data=st.data())
def test_splits_change_no_answer(served, commands, data):
    stream = b"".join(commands)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=12), label="cuts"))
    whole = served.exchange(stream)
    with served.client() as client:
        for begin, end in zip([0, *cuts], [*cuts, len(stream)]):
            with contextlib.suppress(ConnectionError):
                client.send(stream[begin:end])
            time.sleep(0.0005)
        with contextlib.suppress(OSError):
            client.socket.shutdown(socket.SHUT_WR)
        assert _without_ids(client.rest()) == _without_ids(whole)


def test_every_split_at_every_byte(served):
    stream = (
        command("ECHO", "a\r\n")
        + b"PING\r\n"
        + command("PENSTOCK.SCORE", "fraud", "NOINGEST", as_json(at="2026-01-01T00:00:00Z"))
        + command("PING")
    )
    whole = _without_ids(served.exchange(stream))
    with served.client() as client:
        for cut in range(1, len(stream)):
            client.send(stream[:cut])
            time.sleep(0.0003)
            client.send(stream[cut:])
            got = [client.read() for _ in range(4)]
            assert got[0] == b"a\r\n"
            assert got[1] == got[3] == "PONG"
            assert got[2] is not None
        for i in range(len(stream)):
            client.send(stream[i : i + 1])
            time.sleep(0.0003)
        for _ in range(4):
            client.read()
    assert whole.count(b"PONG") == 2


def test_large_payloads_in_small_pieces(served):
    with served.client() as client:
        note = "x" * 60000
        data = command("PENSTOCK.SCORE", "fraud", as_json(note=note)) * 3
        for i in range(0, len(data), 1000):
            client.send(data[i : i + 1000])
        for _ in range(3):
            assert told(client.read())["outcome"] == "applied"
        many = command("PENSTOCK.SCORE", "fraud", *[as_json(customer=f"m{i}") for i in range(2000)])
        for i in range(0, len(many), 4001):
            client.send(many[i : i + 4001])
        assert len(client.read()) == 2000


def test_mutated_frames_never_hurt(served):
    generator = random.Random(3)
    base = [
        command("PENSTOCK.SCORE", "fraud", as_json()),
        command("PENSTOCK.SCORE", "fraud", as_pack(), as_json()),
        command("PENSTOCK.INGEST", "Transaction", as_json()),
        command("PENSTOCK.FEATURES", "spend", "WITHSTATUS", "a"),
        command("PENSTOCK.INFER", "none", b"\0" * 12),
        command("HELLO", 3),
        command("CLIENT", "SETINFO", "lib-name", "x"),
        command("COMMAND", "DOCS"),
        command("CONFIG", "GET", "save"),
        b"PING 'a'\r\n",
    ]
    with served.client() as other:
        before = None
        for round in range(600):
            stream = bytearray(b"".join(generator.choice(base) for _ in range(generator.randrange(1, 6))))
            for _ in range(generator.randrange(1, 8)):
                at = generator.randrange(len(stream))
                match generator.randrange(4):
                    case 0:
                        stream[at] = generator.randrange(256)
                    case 1:
                        del stream[at : at + generator.randrange(1, 5)]
                    case 2:
                        stream[at:at] = generator.choice([b"\r\n", b"*", b"$", b"9" * 12, b"-", b"\0", b"*0\r\n"])
                    case _:
                        stream[at:at] = stream[: generator.randrange(20)]
                if not stream:
                    stream += b"*"
            with served.client() as client:
                with contextlib.suppress(ConnectionError, OSError):
                    client.send(bytes(stream))
                    client.socket.shutdown(socket.SHUT_WR)
                client.rest()
            assert other.ask("PING") == "PONG"
            if round == 100:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


# Overload.


def test_a_full_queue_answers_busy():
    lanes = {"fraud": Lane("fraud", max_rows=4, row_ns=SLOW_NS)}
    with Served(lanes=lanes) as served:
        clients = [served.client() for _ in range(30)]
        for _ in range(20):
            for client in clients:
                client.send(command("PENSTOCK.SCORE", "fraud", as_json()) * 4)
        answers = [client.read() for client in clients for _ in range(80)]
        busy = [a for a in answers if isinstance(a, Error)]
        assert all(str(a).startswith("BUSY overloaded: the queue is full, retry in ") for a in busy)
        assert all(told(a)["outcome"] == "applied" for a in answers if not isinstance(a, Error))
        for client in clients:
            client.socket.close()
    assert lanes["fraud"].counters()["refused_full"] > 0 or not busy


def test_what_cannot_be_in_time_is_refused_early():
    lanes = {"fraud": Lane("fraud", row_ns=SLOW_NS)}
    with Served(lanes=lanes) as served, served.client() as client:
        before = served.engine.stats()["outcomes"]
        answer = client.ask("PENSTOCK.SCORE", "fraud", "TIMEOUT", 100, as_json())
        assert str(answer).startswith("BUSY deadline: it cannot be answered in time, retry in "), answer
        assert served.engine.stats()["outcomes"] == before


# Models.


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: Any) -> tuple[Path, Any]:
    """An XGBoost model of three inputs, and what made it."""
    xgboost = pytest.importorskip("xgboost")
    rng = np.random.default_rng(7)
    x = rng.normal(size=(300, 3)).astype(np.float32)
    booster = xgboost.train(
        {"objective": "binary:logistic", "max_depth": 3, "nthread": 1}, xgboost.DMatrix(x, x[:, 0] > 0), 5
    )
    path = tmp_path_factory.mktemp("models") / "model.json"
    booster.save_model(path)
    return path, booster


@pytest.mark.parametrize("way", ["inline", "queued", "pooled"])
def test_infer(way, model_file):
    import xgboost

    from penstock._ext.infer import ServedModel, Target
    from penstock.models.runtime import load

    path, booster = model_file
    lane = Lane("tree", row_ns=1000 if way == "inline" else SLOW_NS, may_pool=way == "pooled")
    newest, first, empty = Target("tree", "", lane), Target("tree", "1", lane), Target("gone", "", lane)
    newest.model = first.model = ServedModel("tree", "1", load(path), path=path)
    targets = {("tree", ""): newest, ("tree", "1"): first, ("gone", ""): empty}
    with Served(find_model=lambda name, version: targets.get((name, version))) as served, served.client() as client:
        if way != "inline":
            served.slow.append(lane)
        rows = np.random.default_rng(1).normal(size=(50, 3)).astype(np.float32)
        wanted = booster.predict(xgboost.DMatrix(rows))
        for name in ("tree", "tree@1"):
            raw = client.ask("PENSTOCK.INFER", name, rows.tobytes())
            found = np.frombuffer(raw, np.float32 if len(raw) == 200 else np.float64)
            np.testing.assert_allclose(found, wanted, rtol=1e-5)
        one = [command("PENSTOCK.INFER", "tree", "TIMEOUT", 10**7, "PRIORITY", 2, row.tobytes()) for row in rows]
        client.send(b"".join(one) + command("PING"))
        each = [client.read() for _ in rows]
        assert client.read() == "PONG"
        assert b"".join(each) == raw
        for arguments, error in (
            (["tree", b"123"], "ERR invalid_input "),
            (["none", b"123"], "ERR unknown_model no model 'none' is loaded"),
            (["tree@2", b"123"], "ERR unknown_model "),
            (["gone", b"123"], "ERR unknown_model "),
            (["tree"], "ERR wrong number of arguments for 'penstock.infer' command"),
            (["tree", "WHAT", b"123"], "ERR syntax error"),
            (["tree", "TIMEOUT", "1"], "ERR TIMEOUT: expected a whole number after it"),
            (["tree", rows[0].tobytes(), rows[0].tobytes()], "ERR "),
            ([b"\xff@\xff", b"123"], "ERR unknown_model "),
        ):
            answer = client.ask("PENSTOCK.INFER", *arguments)
            assert isinstance(answer, Error), arguments
            assert str(answer).startswith(error), answer
        newest.model = None
        assert "unknown_model" in str(client.ask("PENSTOCK.INFER", "tree", rows.tobytes()))


# Other people's clients.


@pytest.mark.parametrize("protocol", [2, 3])
def test_redis_py(served, protocol):
    redis = pytest.importorskip("redis")
    with redis.Redis(port=served.port, protocol=protocol, client_name="redis-py") as r:
        assert r.ping()
        assert r.echo("x") == b"x"
        assert r.client_getname() in (b"redis-py", "redis-py")
        assert r.info()["redis_mode"] == "standalone"
        assert r.client_id() > 0
        assert "penstock.score" in r.command()
        assert told(r.execute_command("PENSTOCK.SCORE", "fraud", as_json()))["outcome"] == "applied"
        assert told(r.execute_command("PENSTOCK.SCORE", "fraud", as_pack()))["outcome"] == "applied"
        with pytest.raises(redis.ResponseError, match=r"invalid_event \$\.amount"):
            r.execute_command("PENSTOCK.SCORE", "fraud", as_json(amount="x"))
        pipeline = r.pipeline(transaction=False)
        for i in range(100):
            pipeline.execute_command("PENSTOCK.SCORE", "fraud", as_json(customer=f"p{i}") if i != 50 else b"{}")
        answers = pipeline.execute(raise_on_error=False)
        assert isinstance(answers[50], redis.ResponseError)
        assert all(told(a)["outcome"] == "applied" for i, a in enumerate(answers) if i != 50)
        (features,) = r.execute_command("PENSTOCK.FEATURES", "spend", "c1")
        assert isinstance(features, dict if protocol == 3 else list)


@pytest.mark.parametrize("protocol", [2, 3])
def test_redis_py_async(served, protocol):
    redis = pytest.importorskip("redis.asyncio")

    async def main() -> None:
        async with redis.Redis(port=served.port, protocol=protocol) as r:
            assert await r.ping()
            answers = await asyncio.gather(
                *[r.execute_command("PENSTOCK.SCORE", "fraud", as_json(customer=f"a{i}")) for i in range(50)]
            )
            assert all(told(a)["outcome"] == "applied" for a in answers)
            pipeline = r.pipeline(transaction=False)
            for _ in range(20):
                pipeline.execute_command("PENSTOCK.SCORE", "fraud", as_pack())
            assert len(await pipeline.execute()) == 20

    asyncio.run(main())


@pytest.mark.skipif(
    shutil.which("redis-cli") is None, reason="redis-cli is not installed (apt-get install redis-tools)"
)
def test_redis_cli(served):
    def cli(*arguments: str, data: bytes | None = None) -> str:
        done = subprocess.run(
            ["redis-cli", "-p", str(served.port), *arguments], input=data, capture_output=True, timeout=20, check=True
        )
        return done.stdout.decode()

    assert cli("PING") == "PONG\n"
    assert '"outcome":"applied"' in cli("PENSTOCK.SCORE", "fraud", as_json().decode())
    assert '"outcome":"applied"' in cli("-x", "PENSTOCK.SCORE", "fraud", data=as_json())
    assert "mean_amount_1d" in cli("-3", "PENSTOCK.FEATURES", "spend", "c1")
    assert "penstock_version" in cli("INFO")
    assert "invalid_event" in cli("PENSTOCK.SCORE", "fraud", "{}")
    piped = cli("--pipe", data=b"".join(command("PENSTOCK.INGEST", "Transaction", as_json()) for _ in range(500)))
    assert "errors: 0, replies: 500" in piped


@pytest.mark.skipif(
    shutil.which("redis-benchmark") is None, reason="redis-benchmark is not installed (apt-get install redis-tools)"
)
def test_redis_benchmark(served):
    done = subprocess.run(
        ["redis-benchmark", "-p", str(served.port), "-n", "5000", "-c", "20", "-P", "16", "-q",
         "PENSTOCK.SCORE", "fraud", as_json().decode()],
        capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    assert b"requests per second" in done.stdout
    done = subprocess.run(
        ["redis-benchmark", "-p", str(served.port), "-n", "2000", "-q", "-t", "ping"],
        capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.count(b"requests per second") == 2


@pytest.fixture(scope="module")
def redis_port(tmp_path_factory: Any) -> Iterator[int]:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed (apt-get install redis-server)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("redis")
    server = subprocess.Popen(
        ["redis-server", "--port", str(port), "--save", "", "--dir", str(folder)], stdout=subprocess.DEVNULL
    )
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), Client(port) as client:
                if client.ask("PING") == "PONG":
                    break
            time.sleep(0.05)
        yield port
    finally:
        server.terminate()
        server.wait(10)


def _exchange(port: int, data: bytes) -> bytes:
    with Client(port) as client:
        with contextlib.suppress(ConnectionError):
            client.send(data)
            client.socket.shutdown(socket.SHUT_WR)
        return client.rest()


@pytest.mark.parametrize(
    "frame",
    [frame for frame, _ in WRONG_FRAMES]
    + [
        b"*0\r\n*-1\r\n\r\n   \r\n*1\r\n$4\r\nPING\r\n",
        b"PING\r\nPING x\r\nECHO\r\nPING a b\r\nECHO 'a'\"b\"\r\n",
        b"ECHO \"\\x00\\xff\\t\\a\\b\\q\\\\\"\r\nECHO '\\n'\r\nECHO a\\nb\r\n",
        b"nosuch a 'b c'\r\n",
        command("ECHO", b"\0\r\n\xff"),
        command("SELECT", "x") + command("SELECT", "0"),
        command("HELLO", "4") + command("HELLO", "x") + command("HELLO", "3", "WHAT"),
        command("CLIENT", "SETNAME", "a b") + command("CLIENT", "GETNAME"),
        command("AUTH", "default", "x"),
        command("ping") + command("PiNg"),
        b"PING\nPING\n",
        command("RESET") + command("QUIT") + command("PING"),
        command("EXEC") + command("DISCARD") + command("EXEC", "x") + command("DISCARD", "x"),
        command("COMMAND", "COUNT", "x")[:0] + command("ECHO", ""),
    ],
)
def test_agrees_with_redis(served, redis_port, frame):
    assert _exchange(served.port, frame) == _exchange(redis_port, frame)


@pytest.mark.parametrize("end", [("EXEC",), ("EXEC", "x"), ("DISCARD",), ("RESET",), ("DISCARD", "x")])
def test_a_transaction_that_failed_ends_as_redis_ends_it(served, redis_port, end):
    """There the refusal is of a command inside, here of MULTI itself: from the end on both say the same."""
    frame = command("MULTI") + command("NOSUCH", "x") + command(*end) + command("EXEC") + command("ECHO", "x")
    ours, theirs = _exchange(served.port, frame).split(b"\r\n"), _exchange(redis_port, frame).split(b"\r\n")
    assert theirs[0] == b"+OK"
    assert ours[0].startswith(b"-ERR MULTI is not served")
    assert ours[1].startswith(b"-ERR ")
    assert theirs[1].startswith(b"-ERR ")
    assert ours[2:] == theirs[2:]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    line=st.lists(
        st.one_of(
            st.sampled_from([b'"', b"'", b"\\", b" ", b"\t", b"\\x4", b"\\x41", b"a", b"n"]), st.binary(max_size=3)
        ),
        max_size=12,
    )
)
def test_inline_quoting_agrees_with_redis(served, redis_port, line):
    text = b"ECHO " + b"".join(line).replace(b"\n", b"").replace(b"\r", b"").replace(b"\0", b"")
    assert _exchange(served.port, text + b"\r\n") == _exchange(redis_port, text + b"\r\n")


def test_floats_in_resp3_read_back(client):
    client.ask("HELLO", 3)
    key = f"float{time.time_ns()}"
    client.ask("PENSTOCK.INGEST", "Transaction", as_json(customer=key, amount=0.1))
    client.ask("PENSTOCK.INGEST", "Transaction", as_json(customer=key, amount=0.2))
    (found,) = client.ask("PENSTOCK.FEATURES", "spend", key)
    assert math.isclose(found[b"spend.mean_amount_1d"], 0.15)


# One loop, step by step: what arrives when is said here, not by the kernel.


class Pipe:
    """A transport of one end of a socket pair; the loop is not asked."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.theirs.setblocking(False)
        self.closing = False

    def get_extra_info(self, name: str) -> Any:
        return self.ours if name == "socket" else None

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def write(self, data: bytes) -> None:
        self.ours.sendall(data)

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.close()

    def close(self) -> None:
        self.closing = True

    abort = close

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading


class Stepped:
    """A connection that is told what it receives; read() gives what was answered so far."""

    def __init__(self, server: Any) -> None:
        self.pipe = Pipe()
        self.connection = server()
        self.connection.connection_made(self.pipe)
        self.buffer = b""
        self.reader = Reader(self)  # type: ignore[arg-type]

    def get(self, *commands: bytes) -> None:
        self.connection.data_received(b"".join(commands))

    def fill(self) -> None:
        try:
            data = self.pipe.theirs.recv(1 << 20)
        except BlockingIOError:
            data = b""
        if not data:
            raise Closed(self.buffer)
        self.buffer += data

    def answers(self) -> list[Any]:
        """All answers that are there: a decision as its amount, the error to a marked() event as its number."""
        found = []
        with contextlib.suppress(Closed):
            while True:
                answer = self.reader.reply()
                if isinstance(answer, bytes):
                    answer = told(answer)["features"]["amount"]
                elif isinstance(answer, Error) and (number := re.search(r"field `n(\d+)`", str(answer))):
                    answer = int(number[1])
                found.append(answer)
        return found


def amount(value: float, *more: float) -> bytes:
    return command("PENSTOCK.SCORE", "fraud", "NOINGEST", "EXPLAIN", *[as_json(amount=v) for v in (value, *more)])


def marked(number: int) -> bytes:
    """An event that is gathered (no options), and whose answer says which it was: it has a field too many."""
    return command("PENSTOCK.SCORE", "fraud", as_json(**{f"n{number}": 1}))


def stepped(test: Any, *, way: str = "queued", app: Any = APP, **options: Any) -> None:
    """Run `test(server, flow)`, which may await, on a loop of its own."""
    import uvloop

    async def main() -> None:
        flow = Flow(1)
        flow.start(asyncio.get_running_loop())
        engine = Engine(app)
        row_ns = SLOW_NS if way != "inline" else 1000
        lanes = {name: Lane(name, row_ns=row_ns, may_pool=way == "pooled") for name in engine.plan.pipelines}
        server = build_resp(engine, ServerConfig(max_body=MAX_BODY), flow=flow, lanes=lanes, **options)
        try:
            await asyncio.wait_for(test(server, flow), 20)
        finally:
            server.close_idle(force=True)
            flow.stop()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


@pytest.mark.parametrize("way", ["inline", "queued", "pooled"])
def test_one_connection_twice_in_a_batch_is_answered_in_order(way):
    async def test(server: Any, flow: Any) -> None:
        a, b = Stepped(server), Stepped(server)
        a.get(marked(1))
        b.get(marked(2))
        a.get(marked(3), marked(4))
        a.get(command("PING"))
        b.get(marked(5))
        found: list[Any] = []
        theirs: list[Any] = []
        while len(found) < 4 or len(theirs) < 2:
            await asyncio.sleep(0.001)
            found += a.answers()
            theirs += b.answers()
        assert found == [1, 3, 4, "PONG"]
        assert theirs == [2, 5]

    stepped(test, way=way)


def test_events_that_come_while_a_batch_is_queued_do_not_change_it():
    """The pool finishes x; its answer is the 16th that waits, so what was gathered is queued; then d, which waited for
    the pool, is answered at once, and reads on: its next events are gathered while the batch is still being queued."""

    async def test(server: Any, flow: Any) -> None:
        x, d, b, c = (Stepped(server) for _ in range(4))
        others = [Stepped(server) for _ in range(15)]
        x.get(amount(1))
        server.send_waiting()
        d.get(marked(99))
        server.send_waiting()
        d.get(*[marked(100 + i) for i in range(6)])
        time.sleep(0.05)
        for other in others:
            other.get(command("PING"))
        b.get(marked(2))
        c.get(marked(3))
        flow.collect()
        found: list[list[Any]] = [[], [], [], []]
        for _ in range(2000):
            await asyncio.sleep(0.001)
            for got, client in zip(found, (x, d, b, c)):
                got += client.answers()
            if sum(map(len, found)) >= 10:
                break
        assert found == [[1], [99 + i for i in range(7)], [2], [3]]
        assert all(other.answers() == ["PONG"] for other in others)

    stepped(test, way="pooled")


def test_a_long_command_does_not_keep_its_thread():
    async def test(server: Any, flow: Any) -> None:
        long, short = Stepped(server), Stepped(server)
        long.get(amount(*range(300)))
        short.get(amount(5))
        server.send_waiting()
        found: list[Any] = []
        for _ in range(3):  # a part of the long one, the short one, and no more
            time.sleep(0.02)
            flow.collect()
            server.send_waiting()
            found += short.answers()
        assert found == [5]
        answers = []
        while not answers:
            await asyncio.sleep(0.001)
            with contextlib.suppress(Closed):
                answers.append(long.reader.reply())
        assert [told(a)["features"]["amount"] for a in answers[0]] == list(range(300))

    stepped(test, way="pooled")


def test_an_id_that_comes_again_in_a_command_is_answered(tmp_path):
    """S16: it is told the decision on the first, also where the models run on the pool."""
    app = tmp_path / "again_app.py"
    text = APP.read_text()
    for old, new in (
        ("class Transaction(Event)", 'class Transaction(Event, event_id="note")'),
        ("str | None = None", "str"),
    ):
        assert old in text
        text = text.replace(old, new)
    app.write_text(text)

    async def test(server: Any, flow: Any) -> None:
        a = Stepped(server)
        ids = ["a", "b", "a", "c", "b", "b", *[f"n{i % 40}" for i in range(80)]]
        a.get(command("PENSTOCK.SCORE", "fraud", *[as_json(note=id) for id in ids]))
        answers: list[Any] = []
        while not answers:
            await asyncio.sleep(0.001)
            with contextlib.suppress(Closed):
                answers.append(a.reader.reply())
        decided: dict[str, str] = {}
        assert len(answers[0]) == len(ids)
        for id, answer in zip(ids, answers[0]):
            assert not isinstance(answer, Error), answer
            got = told(answer)
            assert got["outcome"] == ("duplicate" if id in decided else "applied")
            assert decided.setdefault(id, got["id"]) == got["id"]

    stepped(test, way="pooled", app=app)


def test_half_commands_of_all_connections_together_have_a_limit():
    async def test(server: Any, flow: Any) -> None:
        server.max_parts = 200_000
        half = b"*2\r\n$4\r\nECHO\r\n$60000\r\n" + b"x" * 30000
        clients = [Stepped(server) for _ in range(6)]
        for client in clients:
            client.get(half)
        kept = [client for client in clients if not client.pipe.closing]
        assert len(kept) == 6
        for client in clients:
            client.get(b"x" * 25000)
        assert server.part_bytes <= 200_000
        closed = [client for client in clients if client.pipe.closing]
        kept = [client for client in clients if not client.pipe.closing]
        assert len(kept) == 3
        for client in closed:
            (error,) = client.answers()
            assert str(error).startswith("ERR too_much commands whose rest has not come take ")
            client.connection.connection_lost(None)
        small = Stepped(server)  # a little may always wait
        small.get(half[:1000])
        for client in kept:
            client.get(b"x" * 5000 + b"\r\n")
            server.send_waiting()
            assert client.reader.reply() == b"x" * 60000
        assert not small.pipe.closing
        # Their arguments count too; what was answered before is not lost; those that go give theirs back.
        few = Stepped(server)
        few.get(amount(1), half)
        few.get(b"x" * 1000)
        many = Stepped(server)
        many.get(command("PING"), b"*16384\r\n", b"$0\r\n\r\n" * 2000)
        assert not many.pipe.closing
        many.get(b"$0\r\n\r\n" * 14000)
        assert many.pipe.closing
        assert [str(a)[:12] for a in many.answers()] == ["PONG", "ERR too_much"]
        assert few.answers() == [1]
        last = Stepped(server)
        last.get(amount(2), half)
        server.max_parts = 1
        last.get(b"x" * 20000)
        assert [str(a)[:12] for a in last.answers()] == ["2.0", "ERR too_much"]
        for client in (*kept, small, few, many, last):
            client.connection.connection_lost(None)
        assert server.part_bytes == 0

    stepped(test, way="inline")


def test_half_a_command_too_many_behind_an_event_that_waits():
    """The event is answered first."""

    async def test(server: Any, flow: Any) -> None:
        server.max_parts = 50_000
        a = Stepped(server)
        a.get(amount(1), b"*2\r\n$4\r\nECHO\r\n$60000\r\n" + b"x" * 30000)
        a.get(b"x" * 29000)
        b = Stepped(server)
        b.get(amount(2), b"*2\r\n$4\r\nECHO\r\n$60000\r\n" + b"x" * 59000)
        for client, value in ((a, "1.0"), (b, "2.0")):
            found: list[Any] = []
            while len(found) < 2:
                await asyncio.sleep(0.001)
                found += client.answers()
            assert [str(f)[:12] for f in found] == [value, "ERR too_much"]
            assert client.pipe.closing

    stepped(test)


def test_text_errors_without_a_reason():
    from penstock._ext.resp import RespServer

    def fails(*_: Any) -> None:
        raise UnicodeError("label too long")

    async def test(server: Any, flow: Any) -> None:
        own = RespServer(flow, pipelines=[], events=[], find_model=fails, features=fails, control=fails)
        client = Stepped(own)
        client.get(command("PENSTOCK.FEATURES", "spend", "a"))
        own.send_waiting()
        assert [str(a) for a in client.answers()] == ["ERR invalid_utf8 $: not UTF-8: label too long"]

    stepped(test)


def test_many_rows_of_a_quick_model_run_on_the_pool(model_file):
    """An inference cannot be cut: all its rows say where it runs."""
    from penstock._ext.infer import ServedModel, Target
    from penstock.models.runtime import load

    path, _ = model_file
    lane = Lane("tree", row_ns=1000, may_pool=True)
    target = Target("tree", "", lane)
    target.model = ServedModel("tree", "1", load(path), path=path)

    async def test(server: Any, flow: Any) -> None:
        client = Stepped(server)
        rows = np.random.default_rng(1).normal(size=(5000, 3)).astype(np.float32)
        client.get(command("PENSTOCK.INFER", "tree", rows.tobytes()))
        assert lane.pooled == 1
        raw: list[Any] = []
        while not raw:
            await asyncio.sleep(0.001)
            with contextlib.suppress(Closed):
                raw.append(client.reader.reply())
        found = np.frombuffer(raw[0], np.float32 if len(raw[0]) == 20000 else np.float64)
        ((_, _, _, wanted),) = target.model.infer([("input", "FP32", [5000, 3], rows.tobytes())])
        assert found.tobytes() == bytes(wanted)

    stepped(test, find_model=lambda name, version: target)
