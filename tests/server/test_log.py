"""A served log: what a killed server acknowledged is there again, and `always`, refusals and /status say what is so."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest

from penstock.offline.parity import parity

ENGINE = Path(__file__).resolve().parents[2] / "engine"
AT = "2026-11-20T10:00:00Z"


class Served:
    """`penstock serve` with a log, in a process of its own."""

    def __init__(self, app, *flags, cwd):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PENSTOCK_")}
        environment["PYTHONPATH"] = str(ENGINE)
        command = [sys.executable, "-m", "penstock", "serve", str(app), "--port", "0", "--log", "log", *flags]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=cwd
        )
        line = self.process.stdout.readline()
        found = re.search(r":(\d+)$", line.strip())
        assert found, line + self.process.stderr.read()
        self.port = int(found[1])

    def call(self, path, body=None):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body and json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read())

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=20)
        return self.process.returncode, err


@pytest.fixture
def serve(wire, tmp_path):
    running = []

    def begin(*flags):
        running.append(Served(wire.app, *flags, cwd=tmp_path))
        return running[-1]

    yield begin
    for one in running:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


def event(i):
    return {"customer": f"c{i % 5}", "terminal": "t", "amount": float(i), "at": AT}


@pytest.mark.parametrize("sync", ["10ms", "always", "never"])
def test_a_killed_server_has_what_it_acknowledged(serve, wire, tmp_path, sync):
    acknowledged = []
    server = serve("--log-sync", sync)
    stop = threading.Event()

    def load(k):
        while not stop.is_set():
            try:
                answer = server.call("/v1/score/fraud", event(k))
            except OSError:
                return
            acknowledged.append(answer["id"])

    threads = [threading.Thread(target=load, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    while len(acknowledged) < 200:
        pass
    server.process.kill()
    stop.set()
    for thread in threads:
        thread.join()
    server.process.communicate()
    server = serve("--log-sync", sync)
    features = server.call("/v1/features/spend", {"keys": [f"c{k}" for k in range(5)], "as_of": AT})
    counted = sum(row["spend.count_7d"] for row in features["features"])
    assert len(acknowledged) <= counted <= len(acknowledged) + 4
    status = server.call("/status")
    assert status["recovery"]["events"] == counted
    assert status["log"]["next_event"] == counted
    assert status["log"]["sync"] == {"10ms": "every 10 ms"}.get(sync, sync)
    code, err = server.end()
    assert code == 0
    assert f"{counted:,} events replayed" in err
    report = parity(str(wire.app), tmp_path / "log")
    assert report.ok
    assert len(acknowledged) <= report.pipelines[0].scores <= counted


def test_always_means_on_disk_before_the_answer(serve):
    server = serve("--log-sync", "always")
    for i in range(20):
        server.call("/v1/score/fraud", event(i))
        log = server.call("/status")["log"]
        assert log["synced"] == log["position"]
    assert log["syncs"] >= 20


def test_a_folder_has_one_server(serve, wire, tmp_path):
    first = serve()
    environment = {**os.environ, "PYTHONPATH": str(ENGINE)}
    second = subprocess.run(
        [sys.executable, "-m", "penstock", "serve", str(wire.app), "--port", "0", "--log", "log"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=20,
    )
    assert second.returncode == 1
    assert f"another process uses this log folder (process {first.process.pid})" in second.stderr
    assert first.call("/v1/score/fraud", event(1))["outcome"] == "applied"


def test_settings_of_a_log_need_a_log(wire, tmp_path):
    for flags, reason in (
        (["--log-sync", "always"], "--log-sync: there is no log; say --log DIR"),
        (["--start-cold"], "--start-cold: there is no log"),
        (["--log", "log", "--log-sync", "sometimes"], '--log-sync: sync: expected "always", "never" or a length'),
        (["--log", "log", "--log-scores", "2"], "--log-scores"),
    ):
        result = subprocess.run(
            [sys.executable, "-m", "penstock", "serve", str(wire.app), "--port", "0", *flags],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ENGINE)},
            timeout=20,
        )
        assert result.returncode == 1, result.stderr
        assert reason in result.stderr


def test_metrics_of_the_log(serve):
    server = serve()
    server.call("/v1/score/fraud", event(1))
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as answer:
        lines = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[:1] not in ("#", ""))
    assert float(lines["penstock_log_bytes_total"]) > 0
    assert lines["penstock_log_refusing"] == "0"
    assert lines["penstock_scores_not_logged_total"] == "0"
    assert lines["penstock_clock_steps_total"] == "0"
