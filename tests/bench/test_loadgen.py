"""The load generator counts right: requests, statuses, losses, timeouts, latency from intended times, quantiles.

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

import pytest
from load.generator import build, cpu_seconds, free_port, run_load

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")


class TinyServer:
    """Counts requests; answers by path: /ok, /404, /chunked, /close, /drop, /hang, /stall, /slow, /split."""

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
                if path == b"/404" and self.requests % 4 == 0:
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


@pytest.fixture
def server() -> Iterator[TinyServer]:
    tiny = TinyServer()
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
