"""The load generator counts right: requests, statuses, losses, timeouts, latency from intended times, quantiles, RESP.

The server is a few lines of asyncio in a thread whose own counts are the oracle.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import ClassVar

import pytest
from load.generator import build, cpu_seconds, free_port, run_load

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")


class TinyServer:
    """Counts requests; answers by path, as `client` says."""

    def __init__(self) -> None:
        self.port = free_port()
        self.requests = 0
        self.bodies: list[bytes] = []
        self.heads: list[bytes] = []
        self.stall_until = 0.0
        self.ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.main()), daemon=True)
        self.thread.start()
        assert self.ready.wait(5)

    async def main(self) -> None:
        self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
        async with await asyncio.start_server(self.client, "127.0.0.1", self.port, backlog=256):
            self.ready.set()
            await self.stop.wait()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join(5)

    async def client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"Content-Length: (\d+)", head)
                body = await reader.readexactly(int(length[1])) if length else b""
                self.requests += 1
                self.bodies.append(body)
                self.heads.append(head)
                path = head.split(b" ")[1]
                if path == b"/drop" and self.requests % 10 == 0:
                    return
                if path == b"/hang" and self.requests % 50 == 0:
                    await asyncio.sleep(3)
                if path == b"/stall":
                    time.sleep(max(0.0, self.stall_until - time.monotonic()))  # the whole server stops
                if path == b"/slow":
                    await asyncio.sleep(0.02)
                if path == b"/late" and self.requests % 5 == 0:
                    await asyncio.sleep(0.08)
                if path == b"/refuse" and self.requests % 3 == 0:
                    writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\nRetry-After: 1\r\n\r\nno")
                elif path == b"/404" and self.requests % 4 == 0:
                    writer.write(b'HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\n{"no": 1}')
                elif path == b"/chunked":
                    writer.write(
                        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n"
                    )
                elif path == b"/close":
                    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok")
                    return
                elif path == b"/split":
                    for part in (b"HTTP/1.1 200 OK\r\nContent-", b"Length: 4\r\n\r", b"\nab", b"cd"):
                        writer.write(part)
                        await writer.drain()
                        await asyncio.sleep(0.001)
                elif path == b"/garbage":
                    writer.write(b"SSH-2.0-no\r\n\r\n")
                else:
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


class TinyRedis(TinyServer):
    """Counts commands; answers by name, pieces of an answer in writes of their own where it is a list."""

    ANSWERS: ClassVar[dict[bytes, list[bytes]]] = {
        b"PING": [b"+PONG\r\n"],
        b"GET": [b"$5\r\nab\r\nc\r\n"],
        b"NOTHING": [b"$-1\r\n"],
        b"NULL3": [b"_\r\n"],
        b"NUMBER": [b":-12\r\n"],
        b"EMPTY": [b"*0\r\n"],
        b"ERROR": [b"-ERR no such thing\r\n"],
        b"BUSY": [b"-BUSY overloaded, retry in 3 ms\r\n"],
        b"BULKBUSY": [b"!10\r\nBU", b"SY later\r", b"\n"],
        b"INSIDE": [b"*2\r\n:1\r\n-ERR half of it\r\n"],
        b"NESTED": [
            b"*3\r\n*2\r\n$3\r\na\r",
            b"\n\r\n:1\r\n%2\r\n+k\r\n,1.5\r\n+m\r\n~1\r\n#t\r\n=7\r\ntxt",
            b":ab\x00\r",
            b"\n",
        ],
        b"ATTRIBUTE": [b"|1\r\n+ttl\r\n:3600\r\n*1\r\n(123\r\n"],
        b"PUSH": [b">2\r\n+message\r\n$3\r\nabc\r\n+OK\r\n>1\r\n-x\r\n"],
        b"GARBAGE": [b"HTTP/1.1 400 Bad Request\r\n\r\n"],
        b"BADLENGTH": [b"$abc\r\n"],
    }

    async def client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                count = int((await reader.readuntil(b"\r\n"))[1:])
                words = []
                for _ in range(count):
                    length = int((await reader.readuntil(b"\r\n"))[1:])
                    words.append((await reader.readexactly(length + 2))[:-2])
                self.requests += 1
                self.bodies.append(words[-1])
                self.heads.append(b" ".join(words[:-1]))
                if words[0] == b"TURNS":  # a value, a refusal, an error, a late value
                    turn = self.requests % 4
                    if turn == 3:
                        await asyncio.sleep(0.06)
                    writer.write([b"+OK\r\n", b"-BUSY wait\r\n", b"-ERR\r\n", b"$2\r\nok\r\n"][turn])
                    continue
                for piece in self.ANSWERS[words[0]]:
                    writer.write(piece)
                    if len(self.ANSWERS[words[0]]) > 1:
                        await writer.drain()
                        await asyncio.sleep(0.001)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@pytest.fixture
def server() -> Iterator[TinyServer]:
    tiny = TinyServer()
    yield tiny
    tiny.close()


@pytest.fixture
def redis() -> Iterator[TinyRedis]:
    tiny = TinyRedis()
    yield tiny
    tiny.close()


def load(server: TinyServer, path: str, **options: object) -> dict:
    options = {"connections": 4, "duration": 0.5, "cpu": None, "path": path} | options
    return run_load(server.port, allow_errors=True, **options)


def test_build_is_cached_and_reports_a_broken_compiler(tmp_path, monkeypatch):
    program = build(tmp_path)
    made = program.stat().st_mtime_ns
    assert build(tmp_path).stat().st_mtime_ns == made
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(RuntimeError, match="no-such-compiler"):
        build(tmp_path / "other")


@pytest.mark.parametrize("path", ["/ok", "/chunked", "/split", "/close"])
def test_closed_loop_counts_what_the_server_counts(server, path):
    result = load(server, path)
    assert result["mode"] == "closed"
    assert result["total_requests"] == server.requests > 20
    assert result["status"] == {"200": server.requests}
    assert result["requests"] <= server.requests <= result["requests"] + 4  # those answered after the end
    assert not any(result["errors"].values())
    assert result["requests_per_s"] == pytest.approx(result["requests"] / 0.5, rel=1e-6)
    assert result["p50_us"] <= result["p90_us"] <= result["p99_us"] <= result["p999_us"] <= result["max_us"]


def test_closed_loop_latency_obeys_littles_law(server):
    result = load(server, "/slow", connections=8)
    assert result["p50_us"] >= 20_000
    assert result["mean_us"] * 1e-6 * result["requests_per_s"] == pytest.approx(8, rel=0.15)


def test_pipelining_keeps_depth_requests_in_flight(server):
    result = load(server, "/ok", connections=2, pipeline=8)
    assert result["total_requests"] == server.requests
    assert not any(result["errors"].values())


def test_other_statuses_are_counted_and_not_as_requests(server):
    result = load(server, "/404")
    assert result["errors"]["status"] == server.requests // 4 == result["status"]["404"]
    assert result["status"]["200"] + result["status"]["404"] == server.requests
    assert result["requests"] <= result["status"]["200"]
    assert "404 Not Found" in result["first_error"]
    with pytest.raises(RuntimeError, match="404 Not Found"):
        run_load(server.port, path="/404", duration=0.2, cpu=None)


def test_lost_connections_are_counted_and_opened_again(server):
    result = load(server, "/drop")
    assert result["errors"]["lost"] == server.requests // 10
    assert result["errors"]["lost"] + result["total_requests"] == server.requests


def test_answers_that_are_not_http_are_counted(server):
    result = load(server, "/garbage")
    assert result["errors"]["format"] == server.requests > 0
    assert result["total_requests"] == 0


def test_silence_is_a_timeout(server):
    result = load(server, "/hang", timeout=0.3, duration=1.0)
    assert result["errors"]["timeout"] == server.requests // 50 > 0
    assert result["errors"]["timeout"] + result["total_requests"] == server.requests


def test_nobody_listening_is_a_connect_error():
    result = run_load(free_port(), allow_errors=True, duration=0.2, connections=2, cpu=None)
    assert result["errors"]["connect"] > 0
    assert result["total_requests"] == 0


def test_open_loop_keeps_its_rate(server):
    result = load(server, "/ok", rate=400, duration=1.0, connections=16, seed=7)
    assert result["mode"] == "open"
    assert result["total_requests"] == result["requests"] == server.requests
    # 400 arrivals expected, standard deviation sqrt(400) = 20.
    assert 300 < result["requests"] < 500


def test_arrivals_are_poisson():
    done = subprocess.run(
        [build(), "--gaps", "20000", "--rate", "50", "--seed", "5"], capture_output=True, text=True, check=True
    )
    gaps = sorted(float(line) for line in done.stdout.split())
    assert len(gaps) == 20_000
    # Kolmogorov-Smirnov distance from the exponential distribution; 1.95 / sqrt(n) is passed once in a thousand seeds.
    distance = max(abs(1 - math.exp(-50 * g) - (i + 0.5) / len(gaps)) for i, g in enumerate(gaps))
    assert distance < 1.95 / math.sqrt(len(gaps))


def test_open_loop_counts_latency_from_the_intended_time(server):
    """The server stops for 0.4 s. A closed loop would record as many slow answers as it has connections; here every
    request that was due meanwhile is slow: 0.4 s of 1.5, with ages spread evenly from 0 to 0.4 s."""
    server.stall_until = time.monotonic() + 0.4
    result = load(server, "/stall", rate=500, duration=1.5, connections=2)
    assert result["max_us"] > 350_000
    assert result["p90_us"] > 150_000
    assert result["send_lag_p99_us"] > 150_000  # and it says that they waited here
    assert not any(result["errors"].values())


def test_warmup_is_left_out(server):
    server.stall_until = time.monotonic() + 0.4
    result = load(server, "/stall", rate=60, warmup=0.8, duration=0.5, connections=4)
    assert result["p90_us"] < 150_000
    assert result["total_requests"] > result["requests"] > 0


def test_bodies_are_used_in_turn_and_times_are_stamped(server, tmp_path):
    bodies = tmp_path / "bodies"
    bodies.write_text('{"k": 1, "at": "' + "@" * 20 + '"}\n{"k": 2}\n')
    result = load(
        server, "/ok", bodies=bodies, connections=1, stamp_start=951782399, stamp_step=86400, header="X-Test: yes"
    )
    assert server.bodies[:4] == [
        b'{"k": 1, "at": "2000-02-28T23:59:59Z"}',
        b'{"k": 2}',
        b'{"k": 1, "at": "2000-02-29T23:59:59Z"}',
        b'{"k": 2}',
    ]
    assert b'"2000-03-01T23:59:59Z"' in server.bodies[4]
    assert result["next_stamp"] == 951782399 + 86400 * -(-server.requests // 2)
    assert server.heads[0].startswith(b"POST /ok HTTP/1.1\r\n")
    assert b"\r\nX-Test: yes\r\n" in server.heads[0]


@pytest.mark.parametrize(
    "arguments", [["--port", "x"], ["--port", "80", "--rate", "nan"], ["--nonsense", "1"], [], ["--port"]]
)
def test_wrong_arguments_are_refused(arguments):
    done = subprocess.run([build(), *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr


@pytest.mark.parametrize("spread", ["exponential", "uniform", "small", "huge"])
def test_histogram_quantiles_are_within_one_part_in_256(spread):
    pick = random.Random(3)
    draw = {
        "exponential": lambda: int(pick.expovariate(1 / 50_000)),
        "uniform": lambda: pick.randrange(10**6),
        "small": lambda: pick.randrange(100),
        "huge": lambda: pick.randrange(2**40, 2**62),
    }[spread]
    values = sorted(draw() for _ in range(20_000))
    done = subprocess.run(
        [build(), "--histogram"], input="\n".join(map(str, values)), capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    assert result["count"] == len(values)
    for name, q in (("p50_us", 0.5), ("p90_us", 0.9), ("p99_us", 0.99), ("p999_us", 0.999)):
        exact = values[math.ceil(q * len(values)) - 1]
        assert result[name] == pytest.approx(exact, rel=1 / 256, abs=0.01)
    assert result["max_us"] == pytest.approx(values[-1], rel=1e-12)
    assert result["mean_us"] == pytest.approx(sum(values) / len(values), rel=1e-9, abs=0.001)


def add_up(result: dict) -> None:
    """Every request of the window stands in exactly one counter."""
    assert result["offered"] == sum(result[k] for k in ("good", "late", "refused", "failed", "unsent"))
    assert result["good"] + result["late"] == result["requests"]
    assert result["good_per_s"] == pytest.approx(result["good"] / result["seconds"], rel=1e-3)


def test_refusals_are_counted(server):
    result = load(server, "/refuse", rate=300, duration=1.0, connections=32)
    add_up(result)
    assert result["refused"] == result["status"]["503"] == server.requests // 3
    assert result["good"] == result["status"]["200"]
    assert result["late"] == result["failed"] == result["unsent"] == 0


def test_late_answers_are_not_good(server):
    result = load(server, "/late", rate=200, duration=1.0, connections=64, deadline_us=40_000)
    add_up(result)
    assert result["late"] >= server.requests // 5 > 10  # on a busy machine a few more
    assert result["good"] + result["late"] == server.requests == result["offered"]
    assert result["ok_p50_us"] < 40_000 < 80_000 <= result["ok_p99_us"] <= result["ok_p999_us"]


def test_what_cannot_be_sent_in_time_is_given_up(server):
    """8 connections x 20 ms an answer: 400 a second at most, 1,200 offered."""
    result = load(server, "/slow", rate=1200, duration=1.0, connections=8, patience_us=30_000, deadline_us=200_000)
    add_up(result)
    assert result["unsent"] > 600
    assert result["unsent"] + server.requests == result["offered"]
    assert result["late"] == result["failed"] == 0  # nobody waited longer than 30 ms + 20 ms + noise
    assert result["ok_p99_us"] < 150_000
    assert result["errors"]["timeout"] == 0


def test_without_patience_nothing_is_given_up(server):
    result = load(server, "/slow", rate=600, duration=0.5, connections=8, timeout=5)
    add_up(result)
    assert result["unsent"] == 0
    assert result["good"] == result["offered"] == server.requests


@pytest.mark.parametrize("path", ["/drop", "/hang"])
def test_lost_and_silent_requests_are_failed(server, path):
    result = load(server, path, rate=300, duration=0.8, connections=32, timeout=0.4)
    add_up(result)
    assert result["failed"] == result["errors"]["lost"] + result["errors"]["timeout"] > 0


def test_the_end_comes_after_so_many_requests(server):
    result = load(server, "/ok", requests=7_770, duration=30, connections=5, pipeline=3)
    assert result["total_requests"] == server.requests == 7_770
    assert result["requests"] == 7_770
    assert result["seconds"] < 30
    assert result["requests_per_s"] == pytest.approx(7_770 / result["seconds"], rel=0.05)


def test_bodies_may_be_framed_and_raw(server, tmp_path):
    framed = tmp_path / "framed"
    bodies = [b"\x82\xa1k\x01\n", b"", b"a" * 300]
    framed.write_bytes(b"".join(len(b).to_bytes(4, "little") + b for b in bodies))
    load(server, "/ok", bodies=framed, framed=True, connections=1, requests=4)
    assert server.bodies == [*bodies, bodies[0]]
    whole = tmp_path / "whole"
    whole.write_bytes(b"{}\n\x00\xff\n")
    options = {"header": "Content-Type: application/octet-stream", "connections": 1, "requests": 1}
    load(server, "/ok", body_raw=whole, **options)
    assert server.bodies[-1] == b"{}\n\x00\xff\n"
    assert server.heads[-1].count(b"Content-Type") == 1
    request = b"POST /ok HTTP/1.1\r\nhost: x\r\nContent-Length: 3\r\n\r\n\x01\r\n"
    whole.write_bytes(request)
    load(server, "/ok", request_raw=whole, connections=1, requests=2)
    assert server.heads[-1] + server.bodies[-1] == request


def test_a_framed_file_that_is_cut_short_is_refused(server, tmp_path):
    framed = tmp_path / "framed"
    framed.write_bytes(b"\x05\x00\x00\x00abc")
    with pytest.raises(RuntimeError, match="ends inside a body"):
        load(server, "/ok", bodies=framed, framed=True)


def test_stamps_are_written_as_numbers(server, tmp_path):
    msgpack = pytest.importorskip("msgpack")
    framed = tmp_path / "framed"
    binary = msgpack.packb({"k": "@" * 8, "at": int.from_bytes(b"@" * 8, "big")})
    text = msgpack.packb({"at": "@" * 20})
    lines = [binary, text, b'{"at": ' + b"#" * 16 + b"}"]
    framed.write_bytes(b"".join(len(b).to_bytes(4, "little") + b for b in lines))
    options = {"bodies": framed, "framed": True, "connections": 1, "requests": 3, "stamp_step": 1}
    load(server, "/ok", stamp_start=1_600_000_000, **options)
    assert msgpack.unpackb(server.bodies[1]) == {"at": "2020-09-13T12:26:41Z"}
    assert json.loads(server.bodies[2]) == {"at": 1_600_000_002_000_000}
    framed.write_bytes(
        len(binary).to_bytes(4, "little") + msgpack.packb({"at": int.from_bytes(b"@" * 8, "big")}) + bytes(11)
    )
    load(server, "/ok", stamp_start=1_600_000_000, stamp_unit=1000, **(options | {"requests": 1}))
    assert msgpack.unpackb(server.bodies[3][:13]) == {"at": 1_600_000_000_000}


def resp(server: TinyRedis, command: str, **options: object) -> dict:
    return load(server, "/", protocol="resp", command=command, **({"requests": 40, "duration": 20} | options))


@pytest.mark.parametrize(
    ("command", "status"),
    [
        *((c, "200") for c in ("PING", "GET k", "NUMBER", "EMPTY", "NESTED", "ATTRIBUTE", "PUSH")),
        *((c, "404") for c in ("NOTHING", "NULL3")),
        *((c, "400") for c in ("ERROR", "INSIDE")),
        *((c, "503") for c in ("BUSY", "BULKBUSY")),
    ],
)
@pytest.mark.parametrize("depth", [1, 5])
def test_every_kind_of_value_is_one_answer(redis, command, status, depth):
    result = resp(redis, command, pipeline=depth)
    assert result["status"] == {status: 40}
    assert redis.requests == result["total_requests"] == 40
    assert result["refused"] == (40 if status == "503" else 0)
    assert result["failed"] == (40 if status in ("404", "400") else 0)
    assert not any(v for k, v in result["errors"].items() if k != "status")


def test_values_that_are_no_resp_are_counted(redis):
    for command in ("GARBAGE", "BADLENGTH"):
        result = resp(redis, command, requests=4, connections=1, duration=0.5)
        assert result["errors"]["format"] == 4
        assert result["total_requests"] == 0


def test_commands_carry_bodies_with_stamps(redis, tmp_path):
    bodies = tmp_path / "bodies"
    bodies.write_text('{"at": "' + "@" * 20 + '"}\n{"k": 2}\n')
    resp(redis, "PING  SCORE fraud", bodies=bodies, connections=1, requests=3, stamp_start=0)
    assert redis.heads == [b"PING SCORE fraud"] * 3
    assert redis.bodies == [b'{"at": "1970-01-01T00:00:00Z"}', b'{"k": 2}', b'{"at": "1970-01-01T00:00:01Z"}']


def test_resp_open_loop_in_bursts_adds_up(redis):
    result = load(
        redis, "/", protocol="resp", command="TURNS x", rate=400, duration=1.0, connections=16, pipeline=8, burst=8,
        deadline_us=50_000,
    )  # fmt: skip
    add_up(result)
    assert result["offered"] == redis.requests
    assert result["offered"] % 8 == 0
    assert result["refused"] == result["status"]["503"] > 20
    assert result["failed"] == result["status"]["400"] > 20
    assert result["late"] > 20


def test_resp_needs_a_command(redis):
    with pytest.raises(RuntimeError, match="--command"):
        load(redis, "/", protocol="resp")


def test_a_real_redis_answers():
    program = shutil.which("redis-server")
    if not program:
        pytest.skip("redis-server is not on PATH")
    port = free_port()
    process = subprocess.Popen(
        [program, "--port", str(port), "--save", "", "--daemonize", "no"], stdout=subprocess.DEVNULL
    )
    try:
        for command, status in (("SET k v", "200"), ("GET k", "200"), ("GET other", "404"), ("LPUSH k 1", "400")):
            deadline = time.monotonic() + 10
            while True:
                result = run_load(
                    port, cpu=None, allow_errors=True, protocol="resp", command=command, requests=1000, connections=4,
                    pipeline=16,
                )  # fmt: skip
                if result["total_requests"] or time.monotonic() > deadline:
                    break
            assert result["status"] == {status: 1000}
    finally:
        process.terminate()
        process.wait()


def test_cpu_seconds_sees_work():
    busy = subprocess.Popen(["sh", "-c", "while :; do :; done"])
    try:
        before, limit = cpu_seconds(busy.pid), time.monotonic() + 10
        begin = time.monotonic()
        while cpu_seconds(busy.pid) - before < 0.1:
            assert time.monotonic() < limit
            time.sleep(0.02)
        assert time.monotonic() - begin > 0.08  # one process cannot use more than the time that passes
    finally:
        busy.kill()
        busy.wait()
