"""Bad input: always a 4xx with a JSON error, nothing changed, never a 5xx, a hang or a leak. Raw sockets throughout."""

from __future__ import annotations

import json
import os
import random
import socket
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

DEEP = b"[" * 30000 + b"]" * 30000
NOW = "2026-01-01T00:00:00Z"


def _body(**changes):
    event = {"customer": "c", "terminal": "t", "amount": 1, "at": NOW, **changes}
    return json.dumps({k: v for k, v in event.items() if v is not ...}).encode()


BODIES = [
    # body, status, code, path
    (b"", 400, "malformed_json", "$"),
    (b"   ", 400, "malformed_json", "$"),
    (b"{", 400, "malformed_json", "$"),
    (b"[", 400, "malformed_json", "$"),
    (b"[{},]", 422, "invalid_event", "$[0]"),
    (b"nonsense", 400, "malformed_json", "$"),
    (_body() + b"x", 400, "malformed_json", "$"),
    (b"12", 422, "invalid_event", "$"),
    (b"null", 422, "invalid_event", "$"),
    (b'"text"', 422, "invalid_event", "$"),
    (b"{}", 422, "invalid_event", "$"),
    (b"[[]]", 422, "invalid_event", "$[0]"),
    (b"[1, 2]", 422, "invalid_event", "$[0]"),
    (_body(amount="12,50"), 422, "invalid_event", "$.amount"),
    (_body(amount=None), 422, "invalid_event", "$.amount"),
    (_body(amount=[1]), 422, "invalid_event", "$.amount"),
    (_body(amount=True), 422, "invalid_event", "$.amount"),
    (_body(customer=7), 422, "invalid_event", "$.customer"),
    (_body(customer=None), 422, "invalid_event", "$.customer"),
    (_body(customer=...), 422, "invalid_event", "$"),
    (_body(at=...), 422, "invalid_event", "$"),
    (_body(at="yesterday"), 422, "invalid_event", "$.at"),
    (_body(at="2026-13-01T00:00:00Z"), 422, "invalid_event", "$.at"),
    (_body(at="2026-02-30T00:00:00Z"), 422, "invalid_event", "$.at"),
    (_body(at=1767225600), 422, "invalid_event", "$.at"),
    (_body(at=None), 422, "invalid_event", "$.at"),
    (_body(extra=1), 422, "invalid_event", "$"),
    (_body(customer="k" * 1025), 422, "invalid_event", "$.customer"),
    (_body(customer="k" * 64000), 422, "invalid_event", "$.customer"),
    (_body(customer="\u20ac" * 400), 422, "invalid_event", "$.customer"),
    (_body(amount="A").replace(b'"A"', b"NaN"), 400, "malformed_json", "$"),
    (_body(amount="A").replace(b'"A"', b"Infinity"), 400, "malformed_json", "$"),
    (_body(amount="A").replace(b'"A"', b"-Infinity"), 400, "malformed_json", "$"),
    (_body(amount="A").replace(b'"A"', b"1e999"), 422, "invalid_event", "$.amount"),
    (_body(amount="A").replace(b'"A"', b"9" * 400), 422, "invalid_event", "$.amount"),
    (_body(amount="A").replace(b'"A"', b"01"), 400, "malformed_json", "$"),
    (_body(customer="A").replace(b'"A"', b'"\xff\xfe"'), 400, None, "$"),
    (_body(customer="A").replace(b'"A"', b'"\xed\xa0\x80"'), 400, None, "$"),
    (_body(customer="A").replace(b'"A"', b'"\\ud800"'), 400, None, "$"),
    (_body(customer="A").replace(b'"A"', b'"a\nb"'), 400, "malformed_json", "$"),
    (b"\xef\xbb\xbf" + _body(), 400, "malformed_json", "$"),
    (DEEP, 422, None, None),
    (_body(amount="A").replace(b'"A"', DEEP), 422, "invalid_event", "$.amount"),
    (_body(note="A").replace(b'"A"', b'{"a":' * 9000 + b"1" + b"}" * 9000), 422, "invalid_event", "$.note"),
    (bytes(range(256)), 400, "malformed_json", "$"),
]


@pytest.mark.parametrize("route", ["/v1/score/fraud", "/v1/events/Transaction", "/v1/score/fraud?ingest=false"])
def test_bodies(served, wire, route):
    for body, status, code, path in BODIES:
        before = served.footprint()
        answer = served.post(route, body)
        what = (body[:80], answer)
        assert answer.status == status, what
        assert code is None or answer.error["code"] == code, what
        assert path is None or answer.error["path"] == path, what
        assert answer.error["message"], what
        assert served.footprint() == before, what


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 2**64, 10**30])
@pytest.mark.parametrize("field", ["tries", "at_ms"])
def test_integers_beyond_64_bits(served, wire, field, value):
    before = served.footprint()
    event = {"customer": "c", "tries": 1, "at_ms": int(time.time() * 1000), field: value}
    answer = served.post("/v1/events/Login", event)
    assert answer.status == 422
    assert answer.error["path"] == f"$.{field}"
    assert served.footprint() == before


def _lines(*lines, body=b""):
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


POST = "POST /v1/score/fraud HTTP/1.1"
BODY = _body()
LENGTH = f"Content-Length: {len(BODY)}"

RAW = {
    "garbage": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64 + b"\r\n\r\n", 400),
    "garbage text": (b"hello there\r\n\r\n", 400),
    "zeros": (b"\x00" * 4000, 400),
    "bare line feeds": (b"POST /v1/score/fraud HTTP/1.1\nHost: t\nContent-Length: 2\n\n{}", 400),
    "http/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "http/0.9": (b"GET /\r\n\r\n", 400),
    "http/3.1": (_lines("GET / HTTP/3.1", "Host: t"), 400),
    "unknown method": (_lines("BREW / HTTP/1.1", "Host: t"), 400),
    "lower-case method": (_lines("get / HTTP/1.1", "Host: t"), 400),
    "space in target": (_lines("GET /a b HTTP/1.1", "Host: t"), 400),
    "no host": (_lines(POST, LENGTH, body=BODY), 400),
    "two hosts": (_lines(POST, "Host: a", "Host: b", LENGTH, body=BODY), 400),
    "negative length": (_lines(POST, "Host: t", "Content-Length: -5", body=BODY), 400),
    "plus length": (_lines(POST, "Host: t", "Content-Length: +5", body=BODY), 400),
    "hex length": (_lines(POST, "Host: t", "Content-Length: 0x10", body=BODY), 400),
    "text length": (_lines(POST, "Host: t", "Content-Length: many", body=BODY), 400),
    "empty length": (_lines(POST, "Host: t", "Content-Length:", body=BODY), 400),
    "two lengths in one": (_lines(POST, "Host: t", "Content-Length: 5, 5", body=BODY), 400),
    "duplicate equal length": (_lines(POST, "Host: t", LENGTH, LENGTH, body=BODY), 400),
    "duplicate other length": (_lines(POST, "Host: t", LENGTH, "Content-Length: 3", body=BODY), 400),
    "length beyond 64 bits": (_lines(POST, "Host: t", "Content-Length: " + "9" * 30, body=BODY), 400),
    "length and chunks": (_lines(POST, "Host: t", LENGTH, "Transfer-Encoding: chunked", body=b"0\r\n\r\n"), 400),
    "chunks and length": (_lines(POST, "Host: t", "Transfer-Encoding: chunked", LENGTH, body=b"0\r\n\r\n"), 400),
    "space before colon": (_lines(POST, "Host: t", f"Content-Length : {len(BODY)}", body=BODY), 400),
    "chunked twice": (_lines(POST, "Host: t", "Transfer-Encoding: chunked, chunked", body=b"0\r\n\r\n"), 400),
    "gzip coding": (_lines(POST, "Host: t", "Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"), 400),
    "identity coding": (_lines(POST, "Host: t", "Transfer-Encoding: identity", body=BODY), 400),
    "vertical tab coding": (_lines(POST, "Host: t", "Transfer-Encoding: \x0bchunked", body=b"0\r\n\r\n"), 400),
    "bad chunk size": (_lines(POST, "Host: t", "Transfer-Encoding: chunked", body=b"xyz\r\n{}\r\n0\r\n\r\n"), 400),
    "negative chunk": (_lines(POST, "Host: t", "Transfer-Encoding: chunked", body=b"-2\r\n{}\r\n0\r\n\r\n"), 400),
    "huge chunk": (_lines(POST, "Host: t", "Transfer-Encoding: chunked", body=b"f" * 40 + b"\r\n{}"), 400),
    "chunk longer than said": (
        _lines(POST, "Host: t", "Transfer-Encoding: chunked", body=b"1\r\n{}\r\n0\r\n\r\n"),
        400,
    ),
    "body over the limit": (_lines(POST, "Host: t", "Content-Length: 65537"), 413),
    "body far over": (_lines(POST, "Host: t", "Content-Length: 99999999999"), 413),
    "chunks over the limit": (
        _lines(POST, "Host: t", "Transfer-Encoding: chunked", body=(b"8000\r\n" + b" " * 0x8000 + b"\r\n") * 3),
        413,
    ),
    "endless chunk extension": (
        _lines(POST, "Host: t", "Transfer-Encoding: chunked", body=b"1;" + b"x" * 400000),
        413,
    ),
    "endless trailers": (
        _lines(POST, "Host: t", "Transfer-Encoding: chunked", body=b"0\r\n" + b"A: b\r\n" * 60000),
        413,
    ),
    "10,000 headers": (_lines(POST, "Host: t", *[f"X-{i}: y" for i in range(10000)], LENGTH, body=BODY), 431),
    "200 short headers": (_lines(POST, "Host: t", *["a: b"] * 200, LENGTH, body=BODY), 431),
    "a long header": (_lines(POST, "Host: t", "X: " + "y" * 20000, LENGTH, body=BODY), 431),
    "a header without end": (b"POST / HTTP/1.1\r\nX: " + b"y" * 300000, 431),
    "a long target": (_lines("POST /" + "a" * 20000 + " HTTP/1.1", "Host: t"), 431),
    "null in a header": (_lines(POST, "Host: t", "X: a\x00b", LENGTH, body=BODY), 400),
    "carriage return in a header": (_lines(POST, "Host: t", "X: a\rb", LENGTH, body=BODY), 400),
    "folded length": (_lines(POST, "Host: t", "Content-Length:", f" {len(BODY)}", body=BODY), 400),
    "no colon": (_lines(POST, "Host: t", "nonsense", LENGTH, body=BODY), 400),
    "unknown expectation": (_lines(POST, "Host: t", "Expect: 200-ok", LENGTH, body=BODY), 417),
    "unknown path, expectation": (_lines("POST /x HTTP/1.1", "Host: t", "Expect: 100-continue", LENGTH), 404),
    "compressed body": (_lines(POST, "Host: t", "Content-Encoding: gzip", LENGTH, body=BODY), 400),
    "unknown compression": (_lines(POST, "Host: t", "Content-Encoding: br", LENGTH, body=BODY), 415),
    "connect": (_lines("CONNECT example.org:443 HTTP/1.1", "Host: example.org:443"), 405),
    "proxy target": (_lines("GET ftp://example.org/ HTTP/1.1", "Host: t"), 400),
    "options star": (_lines("OPTIONS * HTTP/1.1", "Host: t"), 400),
    "bad percent utf-8": (_lines("GET /%ff HTTP/1.1", "Host: t"), 400),
    "no length, no body": (_lines(POST, "Host: t"), 400),
    "chunks in http/1.0": (
        _lines("POST /v1/score/fraud HTTP/1.0", "Transfer-Encoding: chunked", body=b"2\r\n{}\r\n0\r\n\r\n"),
        400,
    ),
}


@pytest.mark.parametrize("name", RAW)
def test_raw_requests(served, name):
    data, status = RAW[name]
    before = served.footprint()
    with served.client() as client:
        client.send(data)
        answer = client.read()
        assert answer is not None
        assert answer.status == status, answer
        assert answer.error["message"]
        if answer.fields.get("connection") == "close":
            assert client.closed()
        else:  # refused, but understood to its end: the connection goes on
            client.send(b"GET /health/live HTTP/1.1\r\nHost: t\r\n\r\n")
            assert client.read().status == 200
    assert served.footprint() == before


@pytest.mark.parametrize("name", [n for n in RAW if RAW[n][1] in (400, 431) and "percent" not in n])
def test_raw_requests_byte_by_byte(served, name):
    """The same refusal however the bytes are cut; pieces of random length."""
    data = RAW[name][0]
    chance = random.Random(name)
    with served.client() as client:
        at = 0
        while at < min(len(data), 25000):
            step = chance.choice([1, 2, 3, 7, 40, 5000])
            client.send(data[at : at + step])
            at += step
        answer = client.read()
        assert answer is not None
        assert 400 <= answer.status < 500


def test_smuggled_request_is_not_answered(served, wire):
    """After a refusal nothing more on the connection is taken for a request."""
    inner = wire.request("/v1/events/Transaction", wire.transaction(customer="smuggled"))
    before = served.footprint()
    for data in (
        _lines(POST, "Host: t", "Content-Length: 4", "Transfer-Encoding: chunked", body=b"0\r\n\r\n" + inner),
        _lines(POST, "Host: t", "Content-Length: 0", "Content-Length: 4", body=inner),
        _lines(POST, "Host: t", "Transfer-Encoding: x", "Content-Length: 0", body=inner),
        _lines(POST, "Host: t", "Transfer-Encoding: chunked", body=b"0;\n\r\n\r\n" + inner),
    ):
        with served.client() as client:
            client.send(data)
            assert client.read().status == 400
            assert client.read() is None
    assert served.footprint() == before


def test_a_repeated_head_with_another_length_is_parsed_again(served, wire):
    """Heads are remembered by all their bytes: one that differs in anything is llhttp's to judge."""
    good = wire.request("/v1/score/fraud", wire.transaction())
    head, _, body = good.partition(b"\r\n\r\n")
    with served.client() as client:
        for _ in range(3):
            client.send(good)
            assert client.read().status == 200
        bad = head.replace(b"Content-Length: ", b"Content-Length:  -") + b"\r\n\r\n" + body
        client.send(bad)
        assert client.read().status == 400
    with served.client() as client:
        client.send(head + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
        assert client.read().status == 400


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"POST /v1/sc", "head"),
        (_lines(POST, "Host: t", LENGTH)[:-2], "head"),
        (_lines(POST, "Host: t", LENGTH, body=BODY[:10]), "body"),
        (_lines(POST, "Host: t", "Transfer-Encoding: chunked", body=b"5\r\nab"), "body"),
    ],
)
def test_half_a_request_then_silence(served, data, part):
    before = served.footprint()
    with served.client() as client:
        began = time.monotonic()
        client.send(data)
        answer = client.read()
        assert answer.status == 408
        assert answer.error["message"].startswith(part)
        assert 0.4 < time.monotonic() - began < 2.5
        assert client.closed()
    assert served.footprint() == before


def test_a_slow_drip_does_not_extend_the_time(served):
    with served.client() as client:
        began = time.monotonic()
        client.send(b"POST /v1/score/fraud HTTP/1.1\r\n")
        client.socket.settimeout(0.1)
        while time.monotonic() - began < 5:
            client.send(b"X: y\r\n")
            try:
                if client.fill():
                    break
            except TimeoutError:
                continue
        client.socket.settimeout(5)
        assert client.read().status == 408


def test_half_a_request_then_the_end(served):
    for data in (b"POST /v1/sc", _lines(POST, "Host: t", LENGTH, body=BODY[:10])):
        with served.client() as client:
            client.send(data)
            client.socket.shutdown(socket.SHUT_WR)
            answer = client.read()
            assert answer.status == 400
            assert answer.error["code"] == "incomplete_request"


def test_the_answer_to_a_large_body_arrives(served):
    """A body far over the limit is refused before it is read, and the refusal is not lost in a reset."""
    with served.client() as client:
        client.send(_lines(POST, "Host: t", "Content-Length: 3000000", body=b" " * 3000000))
        answer = client.read()
        assert answer.status == 413
        assert answer.fields["connection"] == "close"
        assert "65536" in answer.error["message"]


def test_connection_limit(wire):
    with wire.Served(max_connections=3) as small:
        clients = [small.client() for _ in range(3)]
        for client in clients:
            client.send(b"GET /health/live HTTP/1.1\r\nHost: t\r\n\r\n")
            assert client.read().status == 200
        with small.client() as fourth:
            answer = fourth.read()
            assert answer.status == 503
            assert answer.fields["retry-after"] == "1"
            assert answer.error["code"] == "too_many_connections"
        clients.pop().close()
        _until(lambda: small.server.open_connections < 3)
        with small.client() as fourth:
            fourth.send(b"GET /health/live HTTP/1.1\r\nHost: t\r\n\r\n")
            assert fourth.read().status == 200
        for client in clients:
            client.close()


def test_a_client_that_does_not_read(served):
    """Its requests wait in its own socket: the server holds little for it and others are served meanwhile."""
    ask = b"GET /metrics HTTP/1.1\r\nHost: t\r\n\r\n"
    resident = _resident()
    with served.client() as slow:
        slow.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        slow.socket.setblocking(False)
        sent = 0
        for _ in range(200):
            try:
                sent += slow.socket.send(ask * 1000)
            except BlockingIOError:
                time.sleep(0.005)
        assert sent > 100_000
        assert served.get("/health/live").status == 200
        assert _resident() - resident < 64 << 20
        slow.socket.setblocking(True)
        slow.socket.settimeout(5)
        for _ in range(min(100, sent // len(ask))):
            assert slow.read().status == 200


def test_nothing_leaks(served, wire):
    def round_of_everything():
        for name, (data, _) in RAW.items():
            if len(data) < 40000:
                with served.client() as client:
                    client.send(data)
                    assert client.read() is not None, name
        for body, *_ in BODIES[:40]:
            served.post("/v1/score/fraud", body)
        for data in (b"POST /v1/sc", b"", _lines(POST, "Host: t", LENGTH, body=BODY[:10])):
            with served.client() as client:
                client.send(data)

    round_of_everything()
    assert _until(lambda: served.server.open_connections == 0)
    files, resident = _open_files(), _resident()
    for _ in range(8):
        round_of_everything()
    assert _until(lambda: served.server.open_connections == 0)
    assert _until(lambda: _open_files() <= files + 1)
    assert _resident() - resident < 8 << 20


PIECES = [
    b"POST ",
    b"/v1/score/fraud",
    b"/v1/events/Transaction",
    b" HTTP/1.1\r\n",
    b" HTTP/1.0\r\n",
    b"Host: t\r\n",
    b"Content-Length: 5\r\n",
    b"Content-Length: 0\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Connection: close\r\n",
    b"Connection: Upgrade\r\nUpgrade: h2c\r\n",
    b"Expect: 100-continue\r\n",
    b"\r\n",
    b"\r\n\r\n",
    b"\n",
    b"\r",
    b"0\r\n\r\n",
    b"5\r\nabcde\r\n",
    b"{}",
    b'{"customer":1}',
    b"\x00",
    b" ",
    b"GET / HTTP/1.1\r\nHost: t\r\n\r\n",
]


@st.composite
def _streams(draw):
    if draw(st.booleans()):
        data = b"".join(draw(st.lists(st.sampled_from(PIECES), max_size=25)))
    else:
        data = bytearray(_lines(POST, "Host: t", LENGTH, body=_body(amount="x")))
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, len(data) - 1))
            kind = draw(st.sampled_from(["set", "cut", "insert", "copy"]))
            if kind == "set":
                data[at] = draw(st.integers(0, 255))
            elif kind == "cut":
                del data[at : at + draw(st.integers(1, 8))]
            elif kind == "insert":
                data[at:at] = draw(st.sampled_from(PIECES))
            else:
                data[at:at] = data[at : at + draw(st.integers(1, 30))]
            if not data:
                data = bytearray(b"x")
        data = bytes(data)
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=4)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)])]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_streams())
def test_mutated_requests(served, pieces):
    """Whatever arrives: answers that parse, none of them 5xx, the end of the connection, and nothing applied."""
    before = served.footprint()[0]
    with served.client(timeout=4.0) as client:
        for piece in pieces:
            client.send(piece)
        client.socket.shutdown(socket.SHUT_WR)
        while (answer := client.read()) is not None:
            assert answer.status < 500, answer
            if answer.status != 200 and answer.status != 100:
                assert answer.error["code"]
    assert served.footprint()[0] == before


def _until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def _open_files():
    return len(os.listdir("/proc/self/fd"))


def _resident():
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
