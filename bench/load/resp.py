"""The RESP rows: the full fraud pipeline over PENSTOCK.SCORE, beside redis-server's GET of an answer of the same size.

Same method as load/serving.py: servers on core 0, the client on core 1, 50 connections, event and score log on, server
CPU per request in interleaved slices, medians. Payloads are MessagePack; JSON stands beside it. redis-server does less
than we do: it looks up a key and copies its value.
Run as a script: python bench/load/resp.py
"""

from __future__ import annotations

import shutil
import socket
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.path.remove(str(Path(__file__).resolve().parent))

from app import train
from load.generator import Server, free_port, run_load, said
from load.serving import SLICES, Ours, median, packed_bodies, sliced
from rows import error_row, row
from timing import note

COMMAND = "make bench ARGS='--only resp'"
CONNECTIONS, DEPTH = 50, 16
WARM_S = 6.0


def with_resp(app: str = "fraud_bench.py", models: Path | None = None, *arguments: str) -> Ours:
    """Our server, listening for Redis clients too."""
    port = free_port()
    ours = Ours(app, models, "--resp-port", str(port), *arguments)
    ours.resp_port = port
    packed_bodies()
    return ours


def redis_server(port: int) -> Server:
    program = shutil.which("redis-server")
    if not program:
        raise FileNotFoundError("redis-server is not on PATH (Debian: apt-get install redis-server)")
    return Server(
        [program, "--port", str(port), "--save", "", "--appendonly", "no", "--daemonize", "no"],
        port,
        ready=lambda: said(port, b"PING").startswith(b"+PONG"),
        name="redis",
    )


def set_value(port: int, answer_bytes: int) -> None:
    """SET k to a value whose GET is answered in so many bytes."""
    size = next(n for n in range(answer_bytes, 0, -1) if len(b"$%d\r\n" % n) + n + 2 <= answer_bytes)
    with socket.create_connection(("127.0.0.1", port), timeout=5) as s:
        s.sendall(b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$%d\r\n%s\r\n" % (size, b"x" * size))
        if s.recv(100) != b"+OK\r\n":
            raise RuntimeError("redis-server did not take the value")


def pipelined_rows(ours: Ours) -> list[dict[str, Any]]:
    """Throughput at depth 16, MessagePack and JSON in turn."""
    packed, text = [], []
    for _ in range(SLICES):
        packed.append(sliced(ours.server, lambda **o: ours.load_resp(pipeline=DEPTH, **o)))
        text.append(
            sliced(ours.server, lambda **o: ours.load_resp(pipeline=DEPTH, bodies=ours.bodies, framed=False, **o))
        )
        ours.ingest_labels()
    return [
        row("resp.score_per_s_pipelined", median([r for _, r in packed]), "events/s", COMMAND),
        row("resp.score_cpu_us_pipelined", median([c for c, _ in packed]), "us/event", COMMAND),
        row("resp.score_json_per_s_pipelined", median([r for _, r in text]), "events/s", COMMAND),
    ]


def redis_rows(ours: Ours, depth: int, length: int) -> list[dict[str, Any]]:
    port = free_port()
    mine, theirs = [], []

    def redis_load(**options: Any) -> dict[str, Any]:
        return run_load(
            port, protocol="resp", command="GET k", connections=CONNECTIONS, pipeline=depth, **options
        )  # fmt: skip

    with redis_server(port) as redis:
        set_value(port, length)
        got = redis_load(duration=1.0)["response_bytes_mean"]
        if abs(got - length) > 2:
            raise RuntimeError(f"redis-server answers {got:.0f} bytes, expected {length}")
        for _ in range(SLICES):
            mine.append(sliced(ours.server, lambda **o: ours.load_resp(pipeline=depth, **o)))
            theirs.append(sliced(redis, redis_load))
            ours.ingest_labels()
    cpu, redis_cpu = median([c for c, _ in mine]), median([c for c, _ in theirs])
    rate, redis_rate = median([r for _, r in mine]), median([r for _, r in theirs])
    return [
        row(f"resp.ratio_to_redis_d{depth}", redis_cpu / cpu, "redis/ours", COMMAND),
        row(f"resp.cpu_us_d{depth}", cpu, "us/event", COMMAND, redis_cpu, cpu / redis_cpu),
        row(f"resp.per_s_d{depth}", rate, "events/s", COMMAND, redis_rate, rate / redis_rate),
    ]


def run() -> list[dict[str, Any]]:
    train.folder()
    rows: list[dict[str, Any]] = []
    names = ("resp.score_per_s_pipelined", "resp.ratio_to_redis_d1", f"resp.ratio_to_redis_d{DEPTH}")
    try:
        with with_resp() as ours:
            note(f"warming up for {WARM_S:.0f} s")
            ours.load_resp(pipeline=DEPTH, duration=WARM_S)
            length = round(ours.load_resp(pipeline=DEPTH, duration=1.0)["response_bytes_mean"])
            ours.ingest_labels()
            for name, make in (
                (names[0], lambda: pipelined_rows(ours)),
                (names[1], lambda: redis_rows(ours, 1, length)),
                (names[2], lambda: redis_rows(ours, DEPTH, length)),
            ):
                note(f"{name}, answers of {length} bytes")
                try:
                    rows += make()
                except Exception as e:
                    rows.append(error_row(name, f"{type(e).__name__}: {e}", COMMAND))
            ours.check()
    except Exception as e:
        have = {r["name"] for r in rows}
        missing = [n for n in names if n not in have] or ["resp.check"]
        rows += [error_row(n, f"{type(e).__name__}: {e}", COMMAND) for n in missing]
    return rows


if __name__ == "__main__":
    from rows import table

    print(table(run()))
