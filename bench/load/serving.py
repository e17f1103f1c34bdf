"""The HTTP rows: our server beside a constant-answer floor and FastAPI, and the cold start.

The server stands on core 0 and the client on core 1; 64 keep-alive connections, no pipelining, the full fraud
pipeline with its state in use and its event and score log on: event times rise by 3 s per request, labels are ingested
between the slices.
CPU per request is user + system time of the server over a slice divided by the answers of that slice.
Run as a script: python bench/load/serving.py
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.path.remove(str(Path(__file__).resolve().parent))

import msgspec
from app import stream, train
from load.generator import CACHE, Server, answer_of, busy_seconds, frame, free_port, run_load
from rows import error_row, row
from timing import note

COMMAND = "make bench ARGS='--only http'"
BENCH = Path(__file__).resolve().parents[1]
RESULTS = BENCH / "results"
SCALE = 3  # 15,000 customers, 30,000 terminals, one event every 3 s
PATH = "/v1/score/fraud"
CONNECTIONS = 64
SLICES, SLICE_S = 7, 5.0
TAIL_RUNS, TAIL_S, TAIL_WARM_S = 5, 4.0, 1.0
WARM_S = 12.0


def time_text(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def bodies() -> Path:
    """200,000 transactions, one JSON object per line, with a place for loadgen to write the event time."""
    path = CACHE / "transactions.jsonl"
    data = stream.transactions(200_000, seed=19, scale=SCALE)
    CACHE.mkdir(parents=True, exist_ok=True)
    with path.open("w") as f:
        for customer, terminal, amount in zip(data.customer.tolist(), data.terminal.tolist(), data.amount.tolist()):
            f.write(f'{{"customer":"C{customer}","terminal":"T{terminal}","amount":{amount},"at":"{"@" * 20}"}}\n')
    return path


def feature_bodies() -> Path:
    """The FastAPI peer's requests: the 15 features as a list, 20,000 lines."""
    path = CACHE / "features.jsonl"
    data = stream.transactions(60_000, seed=19)
    with path.open("w") as f:
        for values in stream.features(data)[-20_000:].round(6).tolist():
            f.write(json.dumps({"features": values}) + "\n")
    return path


def packed_bodies() -> Path:
    """The same transactions as MessagePack, framed."""
    path = CACHE / "transactions.msgpack"
    data = stream.transactions(200_000, seed=19, scale=SCALE)
    encode = msgspec.msgpack.Encoder().encode
    CACHE.mkdir(parents=True, exist_ok=True)
    rows = zip(data.customer.tolist(), data.terminal.tolist(), data.amount.tolist())
    path.write_bytes(
        frame([encode({"customer": f"C{c}", "terminal": f"T{t}", "amount": a, "at": "@" * 20}) for c, t, a in rows])
    )
    return path


class Ours:
    """Our server under load: keeps the event time moving and the labels flowing.

    app: a file of bench/app with an app like fraud_bench.py. arguments: of `penstock serve`, beside the usual ones.
    """

    def __init__(self, app: str = "fraud_bench.py", models: Path | None = None, *arguments: str) -> None:
        self.port, self.resp_port = free_port(), free_port()
        self.stamp = stream.START + 30 * 86_400
        self.bodies = bodies()
        RESULTS.mkdir(exist_ok=True)
        self.folder = tempfile.mkdtemp(dir=RESULTS, prefix="served-")
        self.server = our_server(self.port, self.stamp - 30 * 86_400, self.folder, app, models, *arguments)

    def __enter__(self) -> Ours:
        try:
            self.server.__enter__()
            self.label_until = self.stamp - 12 * 86_400
            self.ingest_labels()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.server.__exit__()
        shutil.rmtree(self.folder, ignore_errors=True)

    def ingest_labels(self) -> None:
        """One label for every terminal, spread evenly over the event time since the last call."""
        count = SCALE * stream.TERMINALS
        begin, end = self.label_until, self.stamp
        for first in range(0, count, 5_000):
            part = [
                {
                    "terminal": f"T{(i * 7919) % count}",
                    "fraud": float(i % 97 == 0),
                    "at": time_text(begin + 1 + (end - begin - 1) * i // count),
                }
                for i in range(first, first + 5_000)
            ]
            status, answer = answer_of(self.port, "POST", "/v1/events/FraudLabel", json.dumps(part).encode(), 30.0)
            if status != 200:
                raise RuntimeError(f"labels were refused: {status} {answer[:300]!r}")
        self.label_until = end

    def check(self) -> None:
        """What was timed must be right: nearly all events in time order and applied, both arms and models in use."""
        _, text = answer_of(self.port, "GET", "/metrics", None)
        counts = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if line and line[0] != "#")
        outcome = 'penstock_events_total{{event="Transaction",outcome="{}"}}'.format
        applied = float(counts[outcome("applied")])
        others = sum(float(counts[outcome(o)]) for o in ("late", "duplicate", "quarantined"))
        if others > 0.01 * applied:
            raise RuntimeError(f"{others:.0f} of {applied + others:.0f} events were not applied")
        for version in (1, 2):
            used = float(counts[f'penstock_model_decisions_total{{pipeline="fraud",model="fraud_trees@{version}"}}'])
            if used < 0.3 * applied:
                raise RuntimeError(f"fraud_trees@{version} decided {used:.0f} of {applied:.0f} events, expected half")

    def load(self, **options: Any) -> dict[str, Any]:
        given = {
            "path": PATH,
            "bodies": self.bodies,
            "connections": CONNECTIONS,
            "stamp_start": self.stamp,
            "stamp_step": stream.STEP // SCALE,
        }
        result = run_load(self.port, **(given | options))
        self.stamp = result["next_stamp"]
        return result

    def load_resp(self, **options: Any) -> dict[str, Any]:
        """The same over RESP, MessagePack payloads; needs "--resp-port", str(ours.resp_port) among the arguments."""
        given = {
            "protocol": "resp",
            "command": "PENSTOCK.SCORE fraud",
            "bodies": CACHE / "transactions.msgpack",
            "framed": True,
            "connections": 50,
            "stamp_start": self.stamp,
            "stamp_step": stream.STEP // SCALE,
        }
        result = run_load(self.resp_port, **(given | options))
        self.stamp = result["next_stamp"]
        return result


def our_server(
    port: int, probe_at: int, log: str, app: str = "fraud_bench.py", models: Path | None = None, *arguments: str
) -> Server:
    """Our server, event and score log on, a sync every 10 ms."""
    probe = {"customer": "probe", "terminal": "probe", "amount": 1.0, "at": time_text(probe_at)}
    return Server(
        [
            *(sys.executable, "-m", "penstock", "serve", str(BENCH / "app" / app)),
            *("--port", str(port), "--models", str(models or train.folder() / "models"), "--log", log, *arguments),
        ],
        port,
        probe=("POST", PATH, json.dumps(probe).encode()),
        name="penstock",
    )


def floor_server(port: int, length: int) -> Server:
    command = [sys.executable, str(BENCH / "load" / "floor_server.py"), "--port", str(port), "--length", str(length)]
    return Server(command, port, name="floor")


def fastapi_server(port: int) -> Server:
    return Server(
        [
            *(sys.executable, "-m", "uvicorn", "app.fastapi_server:app", "--port", str(port)),
            *("--log-level", "warning", "--no-access-log"),
        ],
        port,
        probe=("GET", "/health", None),
        env={"FRAUD_MODEL": str(train.folder() / "fraud_trees.onnx"), "OMP_NUM_THREADS": "1"},
        cwd=BENCH,
        name="fastapi",
    )


def sliced(server: Server, load: Any) -> tuple[float, float]:
    """CPU microseconds of the server per answer, and answers per second, of one closed-loop slice."""
    before = server.cpu_seconds()
    result = load(duration=SLICE_S)
    return 1e6 * (server.cpu_seconds() - before) / result["total_requests"], result["requests_per_s"]


def median(values: list[float]) -> float:
    return statistics.median(values)


def score_rows(ours: Ours, floor: Server, floor_load: Any) -> list[dict[str, Any]]:
    """Throughput: CPU per request against the floor's, in interleaved slices."""
    mine, bare = [], []
    for _ in range(SLICES):
        mine.append(sliced(ours.server, ours.load))
        bare.append(sliced(floor, floor_load))
        ours.ingest_labels()
    cpu, floor_cpu = median([c for c, _ in mine]), median([c for c, _ in bare])
    rate, floor_rate = median([r for _, r in mine]), median([r for _, r in bare])
    return [
        row("http.score_ratio_to_floor", floor_cpu / cpu, "floor/ours", COMMAND),
        row("http.score_cpu_us", cpu, "us/request", COMMAND, floor_cpu, cpu / floor_cpu),
        row("http.score_requests_per_s", rate, "requests/s", COMMAND, floor_rate, rate / floor_rate),
    ]


def tail_rows(ours: Ours, floor: Server, floor_load: Any, rate: float) -> list[dict[str, Any]]:
    """Latency at half of our maximum rate, timed from the intended send time, the floor at the same rate.

    Says how much of the machine others used meanwhile: beyond a few per cent the tails are theirs, not a server's.
    """
    mine, bare = [], []
    others = 0.0
    for seed in range(TAIL_RUNS):
        options = {"rate": round(rate), "duration": TAIL_S, "warmup": TAIL_WARM_S, "seed": seed}
        before = busy_seconds() - ours.server.cpu_seconds() - floor.cpu_seconds()
        mine.append(ours.load(**options))
        bare.append(floor_load(**options))
        others += busy_seconds() - ours.server.cpu_seconds() - floor.cpu_seconds() - before
        others -= mine[-1]["client_cpu_s"] + bare[-1]["client_cpu_s"]
        ours.ingest_labels()
    share = 100 * max(0.0, others) / (TAIL_RUNS * 2 * (TAIL_S + TAIL_WARM_S) * (os.cpu_count() or 1))
    note(f"other processes used {share:.0f} % of the machine during the open loop")
    rows = []
    for name, key in (("p50", "p50_us"), ("p99", "p99_us"), ("p999", "p999_us")):
        value, floor = (median([r[key] for r in runs]) / 1000 for runs in (mine, bare))
        if name != "p50":
            rows.append(row(f"http.{name}_ratio_to_floor", value / floor, "ours/floor", COMMAND))
        rows.append(row(f"http.{name}_ms", value, "ms", COMMAND, floor, value / floor))
    lag = median([r["send_lag_p99_us"] for r in mine]) / 1000
    rows.append(row("http.p99_rate", round(rate), "requests/s", COMMAND))
    rows.append(row("http.p99_cpu_of_others", share, "% of machine", COMMAND))
    rows.append(row("http.p99_wait_for_connection_ms", lag, "ms", COMMAND))
    return rows


def fastapi_rows(ours: Ours) -> list[dict[str, Any]]:
    """The same model behind FastAPI + ONNX Runtime, features in the request, against our full pipeline."""
    port, lines = free_port(), feature_bodies()
    mine, theirs = [], []
    with fastapi_server(port):
        for _ in range(3):
            mine.append(ours.load(duration=3.0)["requests_per_s"])
            theirs.append(
                run_load(port, path="/score", bodies=lines, connections=CONNECTIONS, duration=4.0, warmup=1.0)[
                    "requests_per_s"
                ]
            )
    value, peer = median(mine), median(theirs)
    return [
        row("http.fastapi_ratio", value / peer, "ours/fastapi", COMMAND),
        row("http.fastapi_requests_per_s", peer, "requests/s", COMMAND),
    ]


def cold_start_rows() -> list[dict[str, Any]]:
    """Process start to the first scored event, second start onward (compiled functions and files are cached)."""
    RESULTS.mkdir(exist_ok=True)
    starts: list[float] = []
    for _ in range(4):
        port = free_port()
        with (
            tempfile.TemporaryDirectory(dir=RESULTS, prefix="cold-") as log,
            our_server(port, stream.START, log) as server,
        ):
            starts.append(server.started_s)
    port = free_port()
    with floor_server(port, 300) as server:
        floor = server.started_s
    value = median(starts[1:])
    return [row("cold_start_s", value, "s", COMMAND, floor, value / floor)]


def run() -> list[dict[str, Any]]:
    if (os.cpu_count() or 1) < 2:
        note("one core: client and server share it, the HTTP rows say less")
    note("models and requests")
    train.folder()
    rows: list[dict[str, Any]] = []

    def piece(names: tuple[str, ...], make: Any, *arguments: Any) -> list[dict[str, Any]]:
        try:
            made: list[dict[str, Any]] = make(*arguments)
        except Exception as e:
            made = [error_row(name, f"{type(e).__name__}: {e}", COMMAND) for name in names]
        rows.extend(made)
        return made

    note("cold start, 4 times")
    piece(("cold_start_s",), cold_start_rows)
    names = (
        "http.score_ratio_to_floor",
        "http.p99_ratio_to_floor",
        "http.p999_ratio_to_floor",
        "http.fastapi_ratio",
    )
    try:
        with Ours() as ours:
            note(f"warming up for {WARM_S:.0f} s")
            length = round(ours.load(duration=WARM_S)["response_bytes_mean"])
            ours.check()
            ours.ingest_labels()
            port = free_port()
            with floor_server(port, length) as floor:

                def floor_load(**options: Any) -> dict[str, Any]:
                    return run_load(port, path=PATH, bodies=ours.bodies, connections=CONNECTIONS, **options)

                floor_load(duration=1.0)
                note(f"{SLICES} interleaved slices of {SLICE_S:.0f} s against a floor of {length} bytes")
                made = piece(names[:1], score_rows, ours, floor, floor_load)
                if made[0]["value"] is not None:
                    rate = made[2]["value"] / 2
                    note(f"open loop at {rate:,.0f} requests/s, {TAIL_RUNS} interleaved runs")
                    piece(names[1:3], tail_rows, ours, floor, floor_load, rate)
                else:
                    unknown = "the maximum rate is not known"
                    piece(names[1:3], lambda: [error_row(n, unknown, COMMAND) for n in names[1:3]])
            note("FastAPI + ONNX Runtime")
            piece(names[3:], fastapi_rows, ours)
            ours.check()
    except Exception as e:
        have = {r["name"] for r in rows}
        missing = [n for n in names if n not in have] or ["http.check"]
        rows += [error_row(n, f"{type(e).__name__}: {e}", COMMAND) for n in missing]
    return rows


if __name__ == "__main__":
    from rows import table

    print(table(run()))
