"""`make soak`: half an hour of load on one server, and whether memory, descriptors or latency drift meanwhile.

The fraud app with its log, snapshots every few MB of it and compaction, a model folder beside it. All the while:
open-loop load over HTTP (scoring), RESP (scoring, MessagePack, 16 at once) and OIP (binary inferences), a scrape every
second, a model reloaded under load, labels ingested. The time is cut into STEPS steps; each gives one sample of
  memory       anonymous and shared resident memory of the server less what the metrics say is state
  descriptors  of the server
  p99          of each protocol, from the requests' due times
The first third is warming up. Of the rest each series is tested: it drifts when the trend is significant (Mann-Kendall,
p < 0.01) and the growth over the whole run that Theil-Sen's slope (the median of all pairwise slopes) gives is beyond
LIMITS. Any request that fails fails the soak. Writes bench/results/soak.png and soak.json, prints a table; exit code 1
where something drifts.
Run as a script: python bench/load/soak.py [--seconds 1800] [--rate 2000]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.path.remove(str(Path(__file__).resolve().parent))

from app import train
from load.generator import answer_of, run_load
from load.oip import requests
from load.resp import with_resp
from load.serving import RESULTS, Ours
from rows import number_text
from timing import note

STEPS = 30
# name -> (share of the median, absolute) that a series may grow by over the run: what is larger counts.
LIMITS = {"memory_mb": (0.02, 8.0), "descriptors": (0.0, 4.0)}
LATENCY_LIMIT = (0.5, 0.5)  # of any p99, in ms


def slope(values: Sequence[float]) -> float:
    """Theil-Sen: the median of the slopes between all pairs, per step."""
    n = len(values)
    return statistics.median((values[j] - values[i]) / (j - i) for i in range(n) for j in range(i + 1, n))


def trend(values: Sequence[float]) -> float:
    """Mann-Kendall: the two-sided probability of so much order in a series without a trend (normal approximation)."""
    n = len(values)
    s = sum((values[j] > values[i]) - (values[j] < values[i]) for i in range(n) for j in range(i + 1, n))
    ties = [values.count(v) for v in set(values)]
    variance = (n * (n - 1) * (2 * n + 5) - sum(t * (t - 1) * (2 * t + 5) for t in ties)) / 18
    if variance <= 0 or s == 0:
        return 1.0
    z = (abs(s) - 1) / math.sqrt(variance)
    return math.erfc(z / math.sqrt(2))


@dataclass
class Series:
    name: str
    limit: tuple[float, float]
    values: list[float] = field(default_factory=list)

    def verdict(self) -> dict[str, Any]:
        """Growth over the run as the slope of the last two thirds says, its significance, and whether that is drift."""
        tail = [v for v in self.values[len(self.values) // 3 :] if math.isfinite(v)]
        if len(tail) < 6:
            return {"name": self.name, "error": f"only {len(tail)} samples"}
        middle = statistics.median(tail)
        growth = slope(tail) * (len(self.values) - 1)
        p = trend(tail)
        allowed = max(self.limit[0] * middle, self.limit[1])
        return {
            "name": self.name,
            "median": middle,
            "first": tail[0],
            "last": tail[-1],
            "growth": growth,
            "allowed": allowed,
            "p": p,
            "drifts": growth > allowed and p < 0.01,
        }


def metrics_of(port: int) -> dict[str, float]:
    _, text = answer_of(port, "GET", "/metrics", None)
    lines = [line.rsplit(" ", 1) for line in text.decode().splitlines() if line.strip() and line[0] != "#"]
    return {name.strip(): float(value) for name, value in lines}


def resident_mb(pid: int) -> float:
    """Anonymous and shared resident memory: not the pages of files such as the log's."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) / 1024


def server_pid(ours: Ours) -> int:
    """The server itself: taskset becomes it."""
    pid: int = ours.server.process.pid
    return pid


class Chores:
    """What an operator's tools do meanwhile, in a thread: scrapes every second, reloads of a model."""

    def __init__(self, port: int, models: Path, reload_every: float) -> None:
        self.port, self.models, self.every = port, models, reload_every
        self.stop = threading.Event()
        self.scrapes = self.reloads = 0
        self.failures: list[str] = []
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        due = time.monotonic() + self.every
        while not self.stop.wait(1.0):
            try:
                status, _ = answer_of(self.port, "GET", "/metrics", None)
                self.scrapes += 1
                if status != 200:
                    self.failures.append(f"scrape: {status}")
                if time.monotonic() >= due:
                    due += self.every
                    self.reload()
            except OSError as e:
                self.failures.append(f"{type(e).__name__}: {e}")

    def reload(self) -> None:
        """Another file under the same version, then load."""
        self.reloads += 1
        source = train.folder() / "models" / "fraud_trees" / str(1 + self.reloads % 2) / "model.txt"
        target = self.models / "turning" / "1" / "model.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target.with_suffix(".new"))
        os.replace(target.with_suffix(".new"), target)
        status, answer = answer_of(self.port, "POST", "/v2/repository/models/turning/load", b"{}", 30.0)
        if status != 200:
            self.failures.append(f"reload: {status} {answer[:200]!r}")

    def __enter__(self) -> Chores:
        self.reload()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def soak(seconds: float, rate: float) -> tuple[list[Series], list[str], str]:
    step_s = seconds / STEPS
    series = [Series(name, limit) for name, limit in LIMITS.items()]
    series += [Series(f"{p}_p99_ms", LATENCY_LIMIT) for p in ("http", "resp", "oip")]
    failures: list[str] = []
    oip_requests = requests("fraud", "probabilities", 15)
    with tempfile.TemporaryDirectory(dir=RESULTS, prefix="soak-") as place:
        models = Path(place) / "models"
        for source in (train.folder() / "models", train.folder() / "served"):
            shutil.copytree(source, models, dirs_exist_ok=True)
        arguments = ("--models-control", "explicit", "--load", "fraud", "--snapshot-bytes", str(4 << 20))
        parquet = ("--log-parquet", str(Path(place) / "parquet"), "--log-retention", "90d")
        with with_resp("fraud_bench.py", models, *arguments, *parquet) as ours:
            pid = server_pid(ours)
            every = max(2.0, seconds / 180)
            with Chores(ours.port, models, every) as chores:
                note(f"{STEPS} steps of {step_s:.0f} s, {rate:.0f} requests/s a protocol, a reload every {every:.0f} s")
                options = {"rate": rate, "duration": step_s, "cpu": None, "sleep": True, "allow_errors": True}
                for step in range(STEPS):
                    results: dict[str, dict[str, Any]] = {}
                    errors: dict[str, BaseException] = {}

                    def work(name: str, call: Any, into: Any = results, wrong: Any = errors, **more: Any) -> None:
                        try:
                            into[name] = call(**(options | more))
                        except Exception as e:
                            wrong[name] = e

                    # Only HTTP's events are ingested: two streams of event times would be late to each other.
                    threads = [
                        threading.Thread(target=work, args=("http", ours.load), kwargs={"seed": step}),
                        threading.Thread(
                            target=work,
                            args=("resp", ours.load_resp),
                            kwargs={
                                "seed": step,
                                "command": "PENSTOCK.SCORE fraud NOINGEST",
                                "pipeline": 16,
                                "burst": 16,
                                "stamp_step": 0,
                            },
                        ),
                        threading.Thread(
                            target=work,
                            args=("oip", lambda **o: run_load(ours.port, **o)),
                            kwargs={"seed": step, "request_raw": oip_requests, "framed": True, "connections": 32},
                        ),
                    ]
                    stamp = ours.stamp
                    for thread in threads:
                        thread.start()
                    for thread in threads:
                        thread.join()
                    ours.stamp = max(stamp, results.get("http", {}).get("next_stamp", stamp))
                    ours.ingest_labels()
                    counts = metrics_of(ours.port)
                    state = sum(v for k, v in counts.items() if k.startswith("penstock_state_bytes")) / (1 << 20)
                    series[0].values.append(resident_mb(pid) - state)
                    series[1].values.append(len(os.listdir(f"/proc/{pid}/fd")))
                    for s, name in zip(series[2:], ("http", "resp", "oip")):
                        if name in errors:
                            failures.append(f"step {step}: {name}: {errors[name]}")
                            s.values.append(math.nan)
                            continue
                        result = results[name]
                        s.values.append(result["p99_us"] / 1000)
                        if wrong := sum(result["errors"].values()):
                            failures.append(f"step {step}: {name}: {wrong} failed: {result['first_error']}")
                failures += chores.failures
                about = f"{chores.scrapes} scrapes, {chores.reloads} reloads; {facts(metrics_of(ours.port))}"
    return series, failures, about


def facts(counts: dict[str, float]) -> str:
    """What the server itself says of the run."""
    collections = sum(v for k, v in counts.items() if k.startswith("penstock_gc_collections_total"))
    said = f"{collections:.0f} garbage collections since start"
    lags = {k.split('le="')[1][:-2]: v for k, v in counts.items() if k.startswith("penstock_loop_lag_seconds_bucket")}
    if total := lags.get("+Inf"):
        said += f"; loop lag over 1 ms at {100 * (1 - lags['0.001'] / total):.2f} % of {total:.0f} ticks"
    return said


def plot(series: list[Series], seconds: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 1, figsize=(9, 8), sharex=True, layout="constrained")
    minutes = [(i + 1) * seconds / STEPS / 60 for i in range(STEPS)]
    panels = ((series[:1], "memory less state, MB"), (series[1:2], "descriptors"), (series[2:], "p99, ms"))
    for axis, (shown, label) in zip(axes, panels):
        for s in shown:
            axis.plot(minutes[: len(s.values)], s.values, marker=".", label=s.name)
        axis.axvspan(0, minutes[len(minutes) // 3 - 1], color="0.93", zorder=0)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        # From zero: a drift should look as large as it is.
        axis.set_ylim(0, 1.15 * max((v for s in shown for v in s.values if math.isfinite(v)), default=1.0))
    axes[2].legend()
    axes[2].set_xlabel("minutes (grey: warming up, not tested)")
    figure.suptitle("soak: HTTP, RESP and OIP load with reloads, scrapes, snapshots and compaction")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/load/soak.py", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1800.0, help="length of the run")
    parser.add_argument("--rate", type=float, default=2000.0, help="requests per second of each protocol")
    options = parser.parse_args(arguments)
    if options.seconds < STEPS:
        parser.error(f"--seconds: expected at least {STEPS}")
    train.folder()
    RESULTS.mkdir(exist_ok=True)
    series, failures, about = soak(options.seconds, options.rate)
    verdicts = [s.verdict() for s in series]
    document = {"seconds": options.seconds, "rate": options.rate, "about": about, "failures": failures}
    document |= {"verdicts": verdicts, "series": {s.name: s.values for s in series}}
    (RESULTS / "soak.json").write_text(json.dumps(document, indent=1) + "\n")
    plot(series, options.seconds, RESULTS / "soak.png")
    print(f"{'series':<16}{'median':>10}{'first':>10}{'last':>10}{'growth':>10}{'allowed':>10}{'p':>8}  drifts")
    for v in verdicts:
        if "error" in v:
            print(f"{v['name']:<16}{v['error']}")
            continue
        cells = "".join(f"{number_text(v[k]):>10}" for k in ("median", "first", "last", "growth", "allowed"))
        print(f"{v['name']:<16}{cells}{v['p']:>8.3f}  {'YES' if v['drifts'] else 'no'}")
    print(about)
    for text in failures[:20]:
        print(f"failed: {text}")
    print(f"written to {os.path.relpath(RESULTS / 'soak.png')} and soak.json")
    return 1 if failures or any(v.get("drifts") or "error" in v for v in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
