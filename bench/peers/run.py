"""`make bench-peers`: other systems with the same 100-tree model, each in a virtual environment of its own.

Control path; no time limit. Says what did not install or start, and goes on. Servers stand on core 0 with all their
processes, the client on core 1; 64 connections, closed loop, features in the request (they keep no windows, split
nothing and apply no rules). `peers.best_ratio` sets our server with the same ONNX file, asked as tritonclient asks,
against the best of them. Writes bench/results/peers.json. Options: --only litserve,bentoml   --clean
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from app import stream, train  # noqa: E402
from load.generator import CACHE, Server, free_port, run_load  # noqa: E402
from rows import error_row, row, table, write  # noqa: E402

COMMAND = "make bench-peers"
FOLDER = CACHE / "peers"


def features_json(values: list[float]) -> dict[str, Any]:
    return {"features": values}


def instances_json(values: list[float]) -> dict[str, Any]:
    return {"instances": [values]}


def tensor_json(values: list[float]) -> dict[str, Any]:
    return {"inputs": [{"name": "input", "shape": [1, len(values)], "datatype": "FP32", "data": values}]}


@dataclass(frozen=True)
class Peer:
    """Requirements, how its server is started ({python}, {bin}, {port}), and how it is asked."""

    requirements: tuple[str, ...]
    command: tuple[str, ...]
    path: str
    body: Callable[[list[float]], dict[str, Any]] = features_json
    env: dict[str, str] = field(default_factory=dict)
    python: str | None = None  # another interpreter than ours, where it exists


PEERS = {
    "fastapi": Peer(
        ("fastapi", "uvicorn[standard]", "onnxruntime", "numpy"),
        (
            *("{bin}/uvicorn", "app.fastapi_server:app", "--app-dir", str(HERE.parent), "--port", "{port}"),
            *("--log-level", "warning", "--no-access-log"),
        ),
        "/score",
    ),
    "litserve": Peer(
        ("litserve", "onnxruntime", "numpy"),
        ("{python}", str(HERE / "litserve_server.py"), "--port", "{port}"),
        "/predict",
    ),
    "bentoml": Peer(
        ("bentoml", "onnxruntime", "numpy"),
        ("{bin}/bentoml", "serve", "bentoml_server:Fraud", "--host", "127.0.0.1", "--port", "{port}"),
        "/score",
        env={"BENTOML_DO_NOT_TRACK": "True"},
    ),
    # Its default of one parallel worker does not start with uvloop 0.22 and later.
    "mlserver": Peer(
        ("mlserver", "onnxruntime", "uvloop<0.22"),
        ("{bin}/mlserver", "start", str(FOLDER / "mlserver-models")),
        "/v2/models/fraud/infer",
        tensor_json,
    ),
    "kserve": Peer(
        ("kserve", "onnxruntime"),
        ("{python}", str(HERE / "kserve_server.py"), "--http_port", "{port}"),
        "/v1/models/fraud:predict",
        instances_json,
    ),
    "ray": Peer(
        ("ray[serve]", "onnxruntime", "numpy"),
        ("{python}", str(HERE / "ray_server.py"), "--port", "{port}"),
        "/score",
        env={"RAY_USAGE_STATS_ENABLED": "0"},
    ),
    # Its Python backend embeds an older 3.11 and fails under 3.11.7 and later of other builds; the system's works.
    "pytriton": Peer(
        ("nvidia-pytriton", "onnxruntime", "numpy"),
        ("{python}", str(HERE / "pytriton_server.py"), "--port", "{port}"),
        "/v2/models/fraud/infer",
        tensor_json,
        python="/usr/bin/python3.11",
    ),
}
# Newer llvmlite dropped the pass manager that lleaves uses.
LLEAVES = ("lleaves", "llvmlite<0.45", "lightgbm", "numpy")


def environment(name: str, requirements: tuple[str, ...], python: str | None = None) -> Path:
    """The bin folder of a peer's virtual environment, made and installed if need be; RuntimeError with pip's reason."""
    place = FOLDER / name
    stamp = place / "installed"
    if stamp.exists() and stamp.read_text() == " ".join(requirements):
        return place / "bin"
    interpreter = python if python and Path(python).exists() else sys.executable
    print(f"  .. installing {' '.join(requirements)}", file=sys.stderr, flush=True)
    begin = time.perf_counter()
    shutil.rmtree(place, ignore_errors=True)
    for command in (
        [interpreter, "-m", "venv", str(place)],
        [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", *requirements],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
            shutil.rmtree(place, ignore_errors=True)
            raise RuntimeError(f"did not install: {lines[-1]}")
    stamp.write_text(" ".join(requirements))
    print(f"  .. {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    return place / "bin"


def versions(bin_folder: Path, requirements: tuple[str, ...]) -> str:
    """Name and version of the peer itself, as installed."""
    name = requirements[0].partition("[")[0]
    code = f"import importlib.metadata as m; print(m.version({name!r}))"
    done = subprocess.run([str(bin_folder / "python"), "-c", code], capture_output=True, text=True)
    return f"{name} {done.stdout.strip()}"


def mlserver_models(port: int) -> None:
    """The model folder that `mlserver start` reads; its port is set there too."""
    place = FOLDER / "mlserver-models"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    shutil.copy(HERE / "mlserver_server.py", place / "fraud_runtime.py")
    settings = {"http_port": port, "grpc_port": free_port(), "metrics_port": free_port(), "parallel_workers": 0}
    (place / "settings.json").write_text(json.dumps(settings))
    model = {"name": "fraud", "implementation": "fraud_runtime.Fraud"}
    (place / "model-settings.json").write_text(json.dumps(model))


def measure(name: str, peer: Peer, seconds: float) -> list[dict[str, Any]]:
    """Installs, starts and loads one peer: requests per second and p99 at 64 connections, medians of 3."""
    bin_folder = environment(name, peer.requirements, peer.python)
    values = stream.features(stream.transactions(60_000, seed=19))[-5_000:].round(6).tolist()
    lines = FOLDER / f"{name}.jsonl"
    lines.write_text("".join(json.dumps(peer.body(v)) + "\n" for v in values))
    port = free_port()
    if name == "mlserver":
        mlserver_models(port)
    command = [c.format(python=bin_folder / "python", bin=bin_folder, port=port) for c in peer.command]
    probe = json.dumps(peer.body(values[0])).encode()
    server = Server(
        command,
        port,
        probe=("POST", peer.path, probe),
        ready_within=120,
        env={
            "FRAUD_MODEL": str(train.folder() / "fraud_trees.onnx"),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            **peer.env,
        },
        cwd=HERE,
        name=f"peer-{name}",
    )
    with server:
        print(f"  .. {versions(bin_folder, peer.requirements)} answers", file=sys.stderr, flush=True)
        options = {"path": peer.path, "bodies": lines, "connections": 64, "allow_errors": True, "timeout": 10}
        run_load(port, duration=2.0, **options)
        runs = [run_load(port, duration=seconds, **options) for _ in range(3)]
    middle = {key: statistics.median([r[key] for r in runs]) for key in ("requests_per_s", "p50_us", "p99_us")}
    rows = [
        row(f"peers.{name}.requests_per_s", middle["requests_per_s"], "requests/s", COMMAND),
        row(f"peers.{name}.p50_ms", middle["p50_us"] / 1000, "ms", COMMAND),
        row(f"peers.{name}.p99_ms", middle["p99_us"] / 1000, "ms", COMMAND),
        row(f"peers.{name}.cold_start_s", server.started_s, "s", COMMAND),
    ]
    if failed := sum(sum(r["errors"].values()) for r in runs):
        rows.append(row(f"peers.{name}.errors", failed, "requests", COMMAND))
    return rows


def lleaves_rows() -> list[dict[str, Any]]:
    bin_folder = environment("lleaves", LLEAVES)
    done = subprocess.run(
        [str(bin_folder / "python"), str(HERE / "lleaves_rows.py"), str(FOLDER)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return [row(name, value, unit, COMMAND) for name, value, unit in json.loads(done.stdout.splitlines()[-1])]


def ours_rows(seconds: float) -> list[dict[str, Any]]:
    """Our server under the same load, with its whole pipeline, for the side by side."""
    from load.serving import Ours

    with Ours() as ours:
        ours.load(duration=2.0)
        runs = [ours.load(duration=seconds) for _ in range(3)]
        started = ours.server.started_s
    middle = {key: statistics.median([r[key] for r in runs]) for key in ("requests_per_s", "p50_us", "p99_us")}
    return [
        row("peers.penstock.requests_per_s", middle["requests_per_s"], "requests/s", COMMAND),
        row("peers.penstock.p50_ms", middle["p50_us"] / 1000, "ms", COMMAND),
        row("peers.penstock.p99_ms", middle["p99_us"] / 1000, "ms", COMMAND),
        row("peers.penstock.cold_start_s", started, "s", COMMAND),
    ]


def ours_oip_rows(seconds: float) -> list[dict[str, Any]]:
    """Our server with the peers' own model and nothing else: binary inferences shaped as tritonclient's."""
    from load.oip import check, models_server, requests

    path = requests("fraud", "probabilities", 15)
    port = free_port()
    options = {"request_raw": path, "framed": True, "connections": 64}
    with models_server(port, train.folder() / "served", ready="fraud") as server:
        check(port, "fraud", "probabilities", path)
        run_load(port, duration=2.0, **options)
        runs = [run_load(port, duration=seconds, **options) for _ in range(3)]
        started = server.started_s
    middle = {key: statistics.median([r[key] for r in runs]) for key in ("requests_per_s", "p50_us", "p99_us")}
    return [
        row("peers.penstock_oip.requests_per_s", middle["requests_per_s"], "requests/s", COMMAND),
        row("peers.penstock_oip.p50_ms", middle["p50_us"] / 1000, "ms", COMMAND),
        row("peers.penstock_oip.p99_ms", middle["p99_us"] / 1000, "ms", COMMAND),
        row("peers.penstock_oip.cold_start_s", started, "s", COMMAND),
    ]


def best_row(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Our requests per second with the same model over those of the best peer that ran."""
    rate = {r["name"].split(".")[1]: r["value"] for r in rows if r["name"].endswith(".requests_per_s")}
    ours = rate.get("penstock_oip")
    peers = {name: value for name, value in rate.items() if name in PEERS and value}
    if ours is None or not peers:
        if ours is None and not any(r["name"] == "peers.penstock_oip" for r in rows):
            return []  # not asked for
        return [error_row("peers.best_ratio", "no figure of ours" if ours is None else "no peer ran", COMMAND)]
    best = max(peers, key=lambda name: peers[name])
    print(f"  .. best peer: {best}, {peers[best]:,.0f} requests/s", file=sys.stderr, flush=True)
    return [row("peers.best_ratio", ours / peers[best], f"ours/{best}", COMMAND)]


def main(arguments: list[str] | None = None) -> int:
    names = ["penstock", "penstock_oip", *PEERS, "lleaves"]
    parser = argparse.ArgumentParser(prog="bench/peers/run.py", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAMES", help=f"a comma-separated part of {','.join(names)}")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each of the 3 runs")
    parser.add_argument("--clean", action="store_true", help="remove the virtual environments first")
    options = parser.parse_args(arguments)
    chosen = options.only.split(",") if options.only else names
    if unknown := [n for n in chosen if n not in names]:
        parser.error(f"--only: no such peer: {', '.join(unknown)} (have {', '.join(names)})")
    if options.clean:
        shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for i, name in enumerate(chosen, 1):
        print(f"[{i}/{len(chosen)}] {name}", file=sys.stderr, flush=True)
        try:
            if name == "penstock":
                rows += ours_rows(options.seconds)
            elif name == "penstock_oip":
                rows += ours_oip_rows(options.seconds)
            elif name == "lleaves":
                rows += lleaves_rows()
            else:
                rows += measure(name, PEERS[name], options.seconds)
        except Exception as e:
            rows.append(error_row(f"peers.{name}", f"{type(e).__name__}: {e}", COMMAND))
        write(rows, HERE.parent / "results" / "peers.json")
    rows += best_row(rows)
    write(rows, HERE.parent / "results" / "peers.json")
    print(table(rows))
    failed = [r["name"] for r in rows if r["value"] is None]
    if failed:
        print(f"did not run: {', '.join(failed)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
