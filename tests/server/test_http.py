"""HTTP/1.1 as the standard has it: connections, bodies, pieces, and heads that repeat."""

from __future__ import annotations

import contextlib
import socket
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

LIVE = b"GET /health/live HTTP/1.1\r\nHost: t\r\n\r\n"


def test_keep_alive_and_close(served):
    with served.client() as client:
        for _ in range(3):
            client.send(LIVE)
            answer = client.read()
            assert answer.status == 200
            assert "connection" not in answer.fields
        client.send(b"GET /health/live HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n")
        assert client.read().fields["connection"] == "close"
        assert client.closed()


def test_http_1_0(served):
    with served.client() as client:
        client.send(b"GET /health/live HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert client.read().fields["connection"] == "keep-alive"
        client.send(b"GET /health/live HTTP/1.0\r\n\r\n")
        assert client.read().fields["connection"] == "close"
        assert client.closed()


def test_date(served):
    from email.utils import parsedate_to_datetime

    date = parsedate_to_datetime(served.get("/health/live").fields["date"])
    assert abs(date.timestamp() - time.time()) < 3


def test_pipelined_requests_are_answered_in_order_in_one_write(served, wire):
    asks = [
        wire.request("/v1/score/fraud", wire.transaction(customer=f"p{i}", amount=2000 * (i % 2))) for i in range(40)
    ]
    with served.client() as client:
        client.send(b"".join(asks))
        for i in range(40):
            assert client.read().json["action"] == ("decline" if i % 2 else "approve")
        client.send(LIVE * 3)
        time.sleep(0.1)
        client.fill()  # one read has all three: they were written together
        assert client.buffer.count(b"HTTP/1.1 200") == 3


def test_after_close_nothing_is_answered(served):
    with served.client() as client:
        client.send(b"GET /health/live HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n" + LIVE)
        assert client.read().status == 200
        assert client.read() is None


@pytest.mark.parametrize("step", [1, 2, 3, 5, 17, 64])
def test_requests_in_pieces(served, wire, step):
    body = wire.transaction(customer=f"piece{step}")
    chunked = (
        b"POST /v1/score/fraud HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b'A;x="y"\r\n{"customer\r\n'
        + b'5\r\n":"c"\r\n'
        + b'9\r\n,"termina\r\n'
        + f"{len(rest := _rest(wire)):x}\r\n{rest}\r\n0\r\nTrailer: z\r\n\r\n".encode()
    )
    stream = wire.request("/v1/score/fraud", body) + chunked + b"\r\n" + LIVE + chunked + LIVE
    with served.client() as client:
        for at in range(0, len(stream), step):
            client.send(stream[at : at + step])
            if step < 3 and at % 50 == 0:
                time.sleep(0.001)
        assert [client.read().status for _ in range(5)] == [200] * 5


def _rest(wire):
    return f'l":"t","amount":3,"at":"{wire.now()}"}}'


def test_chunked_body_may_contain_blank_lines(served, wire):
    import json

    text = json.dumps(wire.transaction()).replace(",", "\r\n\r\n,\r\n\r\n").encode()
    data = b"POST /v1/score/fraud HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: Chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n"
    stream = data % (len(text), text) + LIVE
    for step in (7, 1000):
        with served.client() as client:
            for at in range(0, len(stream), step):
                client.send(stream[at : at + step])
            assert client.read().json["outcome"] == "applied"
            assert client.read().json == {"live": True}


def test_expect_continue(served, wire):
    whole = wire.request("/v1/score/fraud", wire.transaction(), "Expect: 100-continue")
    head, _, body = whole.partition(b"\r\n\r\n")
    with served.client() as client:
        for _ in range(2):
            client.send(head + b"\r\n\r\n")
            assert client.read().status == 100
            client.send(body)
            assert client.read().status == 200
        client.send(whole)  # the body is there already: it needs no permission
        assert client.read().status == 200
        client.send(
            b"POST /v1/score/fraud HTTP/1.1\r\nHost: t\r\nContent-Length: 99999999\r\nExpect: 100-continue\r\n\r\n"
        )
        assert client.read().status == 413


def test_an_offer_to_upgrade_is_ignored(served, wire):
    fields = (
        "Connection: Upgrade, HTTP2-Settings",
        "Upgrade: h2c",
        "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
    )
    ask = wire.request("/v1/score/fraud", wire.transaction(), *fields)
    with served.client() as client:
        client.send(ask + LIVE)
        assert client.read().json["outcome"] == "applied"
        assert client.read().json == {"live": True}
        for at in range(0, len(ask), 9):
            client.send(ask[at : at + 9])
        assert client.read().json["outcome"] == "applied"


def test_targets(served):
    for target in (
        "http://t/health/live",
        "HTTP://t:80/health/live",
        "/health/live?x=1",
        "/health/%6cive",
        "/health/live?",
    ):
        answer = served.ask(f"GET {target} HTTP/1.1\r\nHost: t\r\n\r\n".encode())
        assert answer.json == {"live": True}, target
    for target in ("/health/live/", "//health/live", "/health//live", "/HEALTH/LIVE", "/health/../health/live"):
        assert served.get(target).status == 404, target


def test_an_encoded_slash_is_no_separator(served, wire):
    """RFC 3986 2.2: it is data of a name, and no name here has one."""
    before = served.footprint()
    for path in (
        "/health%2Flive",
        "/health%2flive",
        "/%2Fhealth/live",
        "/health/live%2F",
        "%2Fhealth/live",
        "/v1/score%2Ffraud",
    ):
        answer = served.get(path)
        assert answer.status in (400, 404), path
        assert served.ask(f"GET http://t{path} HTTP/1.1\r\nHost: t\r\n\r\n".encode()).status in (400, 404), path
    assert served.post("/v1/score%2Ffraud", wire.transaction()).status == 404
    assert served.post("/v1%2Fscore%2Ffraud", wire.transaction()).status == 404
    assert served.post("/v1/events%2fTransaction", wire.transaction()).status == 404
    assert served.post("/v1/score/%66raud?explain=1", wire.transaction()).status == 200
    assert served.footprint() != before


BROWSERS = {  # what a browser says of a page: fields, whether it may change state, whether it may read
    "curl": ([], True, True),
    "curl of the README": (["Content-Type: application/x-www-form-urlencoded"], True, True),
    "own page": (["Origin: http://test", "Sec-Fetch-Site: same-origin", "Sec-Fetch-Mode: cors"], True, True),
    "own page, old browser": (["Origin: http://TEST:80"], True, True),
    "own page behind TLS": (["Origin: https://test"], True, True),
    "typed into the address bar": (["Sec-Fetch-Site: none", "Sec-Fetch-Mode: navigate"], True, True),
    "a link from elsewhere": (["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate"], False, True),
    "a form elsewhere": (
        ["Origin: http://evil.example", "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate"], False, False
    ),
    "a page elsewhere": (["Origin: http://evil.example", "Content-Type: text/plain"], False, False),
    "a page elsewhere, JSON": (["Origin: http://evil.example", "Content-Type: application/json"], False, False),
    "a page elsewhere that hides": (["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors"], False, False),
    "a sandboxed page": (["Origin: null"], False, False),
    "a file": (["Origin: file://"], False, False),
    "an extension": (["Origin: chrome-extension://abc"], False, False),
    "another port": (["Origin: http://test:8080", "Sec-Fetch-Site: same-site"], False, False),
    "a port of digits": (["Origin: http://test:"], True, True),
    "a subdomain": (["Origin: http://a.test", "Sec-Fetch-Site: same-site"], False, False),
    "a longer name": (["Origin: http://test.evil.example"], False, False),
    "a shorter name": (["Origin: http://tes"], False, False),
    "a user": (["Origin: http://test@evil.example"], False, False),
    "nothing": (["Origin:"], False, False),
    "two origins": (["Origin: http://test", "Origin: http://evil.example"], False, False),
    "two origins, the other way": (["Origin: http://evil.example", "Origin: http://test"], False, False),
    "odd capitals": (["oRiGiN: HTTP://EVIL.EXAMPLE"], False, False),
    "an unknown word": (["Sec-Fetch-Site: somewhere"], False, False),
}  # fmt: skip


@pytest.mark.parametrize("who", BROWSERS)
def test_pages_of_other_origins_are_refused(served, wire, who):
    """Whatever the content type, and for every path: what a page elsewhere makes a browser send changes nothing."""
    fields, writes, reads = BROWSERS[who]
    before = served.footprint()
    for path in ("/v1/score/fraud", "/v1/events/Transaction", "/v1/features/spend"):
        body = {"keys": ["c1"]} if "features" in path else wire.transaction()
        for _ in range(2):  # the second time the same head
            answer = served.ask(wire.request(path, body, *fields))
            assert answer.status == (200 if writes else 403), (path, answer)
            if not writes:
                assert answer.error["code"] == "foreign_origin"
    assert (served.footprint() != before) == writes
    for path in ("/status", "/metrics", "/health/ready"):
        answer = served.ask("\r\n".join([f"GET {path} HTTP/1.1", "Host: test", *fields, "", ""]).encode())
        assert answer.status == (200 if reads else 403), (path, answer)


def test_an_origin_is_compared_with_its_port(served, wire):
    for host, origin, same in (
        ("127.0.0.1:8000", "http://127.0.0.1:8000", True),
        ("127.0.0.1:8000", "http://127.0.0.1", False),
        ("127.0.0.1", "http://127.0.0.1:8000", False),
        ("[::1]:8000", "http://[::1]:8000", True),
        ("[::1]:8000", "http://[::2]:8000", False),
        ("[::1]", "http://[::1]", True),
        ("shop.example:443", "https://shop.example", True),
        ("shop.example:80", "https://shop.example", False),
        ("Shop.Example", "http://shop.example:80", True),
    ):
        data = wire.request("/v1/score/fraud", wire.transaction(), f"Origin: {origin}")
        answer = served.ask(data.replace(b"Host: test", f"Host: {host}".encode()))
        assert answer.status == (200 if same else 403), (host, origin)


@pytest.mark.parametrize("events", [8, 150])
def test_an_array_is_ingested_by_time(wire, events):
    """Few are done where they arrive, many wait in the queue; either way nothing of one post makes another late."""
    logins = [
        {"customer": f"l{i % 5}", "tries": 1, "at_ms": 1_700_000_000_000 + i * 7 % 11 * 86_400_000}
        for i in range(events)
    ]
    with wire.Served() as fresh:
        assert fresh.post("/v1/events/Login", logins).json == {"accepted": events, "outcomes": {"applied": events}}
        found = fresh.engine.features("logins", ["l0"], as_of=1_700_000_000_000_000 + 10 * 86_400_000_000).rows[0]
        newest = sum(e["customer"] == "l0" and e["at_ms"] == 1_700_000_000_000 + 10 * 86_400_000 for e in logins)
        assert found["logins.sum_tries_1h"] == (newest or None)
        again = fresh.post("/v1/events/Login", logins).json["outcomes"]
        assert again == {
            "late": sum(i * 7 % 11 < 10 for i in range(events)),
            "applied": sum(i * 7 % 11 == 10 for i in range(events)),
        }
        bad = [*logins, {"customer": "x", "tries": "one", "at_ms": 1}]
        before = fresh.footprint()
        assert fresh.post("/v1/events/Login", bad).status == 422
        assert fresh.footprint() == before


def test_repeated_heads_are_not_parsed_again(served, wire):
    ask = wire.request("/v1/score/fraud", wire.transaction(customer="h1"), "X-Test: repeated")
    with served.client() as client:
        client.send(ask)
        assert client.read().status == 200
        hits = served.server.head_hits
        for _ in range(5):
            client.send(ask)
            assert client.read().status == 200
        assert served.server.head_hits == hits + 5
    with served.client() as other:  # on any connection
        other.send(ask)
        assert other.read().status == 200
        assert served.server.head_hits == hits + 6
        other.send(ask[:-5])  # the head repeats, the body is not all there
        time.sleep(0.05)
        other.send(ask[-5:] + ask)
        assert other.read().json["outcome"] == "applied"
        assert other.read().json["outcome"] == "applied"


def test_repeated_heads_answer_as_parsed_ones(served, wire):
    import json

    asks = []
    for i in range(300):
        kind = i % 6
        event = wire.transaction(customer=f"r{i % 7}", amount=(i * 37) % 1500, terminal="t" * (i % 9))
        if kind == 0:
            asks.append(wire.request("/v1/score/fraud?explain=true", event))
        elif kind == 1:
            asks.append(wire.request("/v1/score/fraud?ingest=false", [event, event]))
        elif kind == 2:
            asks.append(wire.request("/v1/score/fraud", {**event, "amount": "x"}))
        elif kind == 3:
            asks.append(wire.request("/v1/events/Transaction", event))
        elif kind == 4:
            asks.append(wire.request("/v1/score/nothing", event))
        else:
            asks.append(LIVE)
    seen = []
    for reuse in (False, True):
        with wire.Served() as running:
            running.server.reuse_heads = reuse
            with running.client() as client:
                got = []
                for start in range(0, len(asks), 20):
                    client.send(b"".join(asks[start : start + 20]))
                    for _ in asks[start : start + 20]:
                        answer = client.read()
                        body = json.loads(answer.body)
                        for decision in body if isinstance(body, list) else [body]:
                            decision.pop("id", None)
                        got.append((answer.status, body))
            assert (running.server.head_hits > 100) == reuse
        seen.append(got)
    assert seen[0] == seen[1]


@pytest.fixture(scope="module")
def twins(wire):
    """Two servers alike, but one lets llhttp judge every head; both know the same heads."""
    with wire.Served() as reusing, wire.Served() as parsing:
        parsing.server.reuse_heads = False
        yield reusing, parsing


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 2), st.integers(-3, 3)), min_size=1, max_size=8),
    st.lists(st.integers(0, 2000), max_size=3),
)
def test_repeated_heads_frame_as_llhttp_does(twins, wire, parts, cuts):
    """Streams of whole, cut and overlong requests: the same statuses in the same order with and without llhttp."""
    stream = b""
    for kind, padding, error in parts:
        body = b'{"customer":"x"}' + b" " * padding
        head = b"POST /v1/score/fraud HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n" % (
            len(body) + (error if kind == 7 else 0)
        )
        if kind == 5:
            head += b"Connection: close\r\n"
        elif kind == 6:
            head = b"GET /health/live HTTP/1.1\r\nHost: t\r\n"
            body = b""
        stream += head + b"\r\n" + body
    cuts = sorted(min(cut, len(stream)) for cut in cuts)
    found = []
    for served in twins:
        statuses = []
        with served.client() as client:
            for a, b in zip([0, *cuts], [*cuts, len(stream)]):
                client.send(stream[a:b])
            with contextlib.suppress(OSError):  # closed already, after a Connection: close
                client.socket.shutdown(socket.SHUT_WR)
            while (answer := client.read()) is not None:
                statuses.append((answer.status, answer.body))
        found.append(statuses)
    assert found[0] == found[1]


def test_half_closed_connection_gets_its_answers(served):
    with served.client() as client:
        client.send(LIVE * 2)
        client.socket.shutdown(socket.SHUT_WR)
        assert client.read().status == 200
        assert client.read().status == 200
        assert client.closed()


def test_answers_larger_than_the_socket_buffer(served, wire):
    events = [wire.transaction(customer=f"large{i}", amount=1) for i in range(600)]
    with served.client() as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.send(wire.request("/v1/score/fraud?explain=true", events) + LIVE)
        time.sleep(0.2)
        answer = client.read()
        assert len(answer.json) == 600
        assert client.read().json == {"live": True}


def test_an_error_in_a_handler_is_a_500_and_the_server_goes_on(served, monkeypatch, capfd):
    def broken(*_):
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(served.engine, "features", broken)
    answer = served.post("/v1/features/spend", {"keys": ["a"]})
    assert answer.status == 500
    assert answer.error["code"] == "internal"
    assert "on purpose" not in answer.error["message"]
    assert "on purpose" in capfd.readouterr().err
    monkeypatch.undo()
    assert served.post("/v1/features/spend", {"keys": ["a"]}).status == 200


def test_draining_answers_and_closes(wire):
    with wire.Served() as running, running.client() as client, running.client() as idle:
        client.send(LIVE)
        assert client.read().status == 200
        running.server.draining = True
        client.send(LIVE + b"GET /health/ready HTTP/1.1\r\nHost: t\r\n\r\n")
        assert client.read().status == 200
        answer = client.read()
        assert answer.status == 503
        assert answer.fields["connection"] == "close"
        assert client.closed()
        running.loop.call_soon_threadsafe(running.server.close_idle)
        assert idle.closed()


def test_idle_connections_are_closed(wire):
    with wire.Served(idle_timeout=0.3, head_timeout=0.4) as running, running.client() as client:
        client.send(LIVE)
        assert client.read().status == 200
        began = time.monotonic()
        assert client.closed()
        assert time.monotonic() - began < 2


def test_every_connection_gets_its_own_answers(served, wire):
    """All connections share one output buffer: answers, refusals and ends of connections at the same time."""
    clients = [served.client() for _ in range(60)]
    for turn in range(4):
        for k, client in enumerate(clients):
            for i in range(5):
                event = wire.transaction(customer=f"own{k}", amount=1000 * k + 10 * turn + i)
                client.send(wire.request("/v1/score/fraud?explain=true&ingest=false", event))
            if k % 7 == turn:
                client.send(
                    b"GET /own%d HTTP/1.1\r\nHost: t\r\n%s\r\n" % (k, b"" if k % 2 else b"Connection: close\r\n")
                )
        for k, client in enumerate(clients):
            for i in range(5):
                assert client.read().json["features"]["amount"] == 1000 * k + 10 * turn + i
            if k % 7 == turn:
                assert f"'/own{k}'" in client.read().error["message"]
                if k % 2 == 0:
                    assert client.closed()
                    clients[k] = served.client()
    for client in clients:
        client.close()
