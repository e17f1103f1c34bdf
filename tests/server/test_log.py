"""A served log: what a killed server acknowledged is there again, and `always`, refusals and /status say what is so."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from penstock.offline.parity import parity

ENGINE = Path(__file__).resolve().parents[2] / "engine"
AT = "2026-11-20T10:00:00Z"


class Served:
    """`penstock serve` with a log, in a process of its own."""

    def __init__(self, app, *flags, cwd, env=()):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PENSTOCK_")} | dict(env)
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

    def status(self, path, body=None):
        """Status and body, also of what is refused."""
        try:
            return 200, self.call(path, body)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def metrics(self):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if x[:1] not in ("#", ""))}

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=20)
        return self.process.returncode, err


@pytest.fixture
def serve(wire, tmp_path):
    running = []

    def begin(*flags, **options):
        running.append(Served(wire.app, *flags, cwd=tmp_path, **options))
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


def states(lines):
    return {name: lines[f'penstock_log_state{{state="{name}"}}'] for name in ("ok", "slow", "refusing", "gone")}


def test_metrics_of_the_log(serve):
    server = serve()
    server.call("/v1/score/fraud", event(1))
    lines = server.metrics()
    assert lines["penstock_log_bytes_total"] > 0
    assert lines["penstock_log_refusing"] == 0
    assert states(lines) == {"ok": 1, "slow": 0, "refusing": 0, "gone": 0}
    assert lines["penstock_log_late_syncs_total"] == 0
    assert lines["penstock_log_unsynced_age_seconds"] < 5
    assert lines["penstock_scores_not_logged_total"] == 0
    assert lines["penstock_clock_steps_total"] == 0
    assert 0 <= lines["penstock_recovery_seconds"] < 20
    assert abs(time.time() - lines["process_start_time_seconds"]) < 60
    build = [name for name in lines if name.startswith("penstock_build_info")]
    assert len(build) == 1
    assert f'plan="{server.call("/status")["plan"]}"' in build[0]


def test_metrics_of_the_keeper(serve, tmp_path):
    server = serve()
    server.call("/v1/score/fraud", event(1))
    # It runs only where nothing else does.
    until(lambda: server.metrics().get("penstock_snapshot_behind_bytes", 0) > 0, 120)
    lines = server.metrics()
    assert lines["penstock_log_free_bytes"] > 1 << 20
    assert lines["penstock_keeper_rounds_total"] == lines["penstock_keeper_failures_total"] == 0
    # There is no snapshot: no age and no size, rather than 0.
    assert "penstock_snapshot_age_seconds" not in lines
    assert "penstock_snapshot_bytes" not in lines
    keeper = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    for child in keeper:
        os.kill(int(child), signal.SIGSTOP)  # nor is what it told known of one that is gone
        os.kill(int(child), signal.SIGKILL)
    until(lambda: "penstock_snapshot_behind_bytes" not in server.metrics())
    until(lambda: "penstock_snapshot_behind_bytes" in server.metrics(), 120)


def until(holds, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_folder_that_is_removed(serve, tmp_path):
    """Answers, readiness, metrics and stderr say the same; reads go on."""
    server = serve()
    server.call("/v1/score/fraud", event(1))
    shutil.rmtree(tmp_path / "log")
    until(lambda: server.status("/health/ready")[0] == 503)
    assert server.status("/v1/score/fraud", event(2))[0] == 503
    status, answer = server.status("/v1/events/Transaction", event(2))
    assert (status, answer["error"]["code"]) == (503, "log_refused")
    assert "removed or replaced" in answer["error"]["message"]
    assert "removed or replaced" in server.status("/health/ready")[1]["error"]["message"]
    assert server.status("/health/live")[0] == 200
    assert server.status("/v1/features/spend", {"keys": ["c1"], "as_of": AT})[0] == 200
    lines = server.metrics()
    assert lines["penstock_log_refusing"] == 1
    assert states(lines) == {"ok": 0, "slow": 0, "refusing": 0, "gone": 1}
    time.sleep(1.2)
    code, err = server.end()
    assert code == 0
    assert err.count("the event log takes no events") == 1


@pytest.fixture
def failing_disk(tmp_path):
    """The environment of a server whose msync does as the file says."""
    library, rules = tmp_path / "failing_disk.so", tmp_path / "rules"
    source = Path(__file__).with_name("failing_disk.c")
    built = subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"no compiler: {built.stderr[-200:]}")
    return rules, {"LD_PRELOAD": str(library), "FAILING_DISK": str(rules)}


@pytest.mark.parametrize("sync", ["always", "10ms"])
def test_a_disk_that_fails(serve, failing_disk, sync):
    """With `always` the event whose sync fails is refused in words too; what carries no event is answered as before."""
    rules, env = failing_disk
    server = serve("--log-sync", sync, env=env)
    server.call("/v1/score/fraud", event(1))
    until(lambda: (log := server.call("/status")["log"])["synced"] == log["position"])
    rules.write_text("5 0")
    first = server.status("/v1/score/fraud", event(2))
    assert first[0] == (503 if sync == "always" else 200)
    until(lambda: server.status("/v1/score/fraud", event(3))[0] == 503, 2.0)
    for i in range(5):
        assert server.status("/v1/events/Transaction", event(i))[1]["error"]["code"] == "log_refused"
        assert server.status("/health/live")[0] == 200
        assert server.status("/v1/features/spend", {"keys": ["c1"], "as_of": AT})[0] == 200
        assert server.status("/v1/score/fraud?ingest=false", event(i))[0] == 200
        status, answer = server.status("/health/ready")
        assert status == 503
        assert "Input/output error" in answer["error"]["message"]
    assert states(server.metrics()) == {"ok": 0, "slow": 0, "refusing": 1, "gone": 0}
    rules.unlink()
    time.sleep(1.2)  # two looks of the sweeper
    assert server.status("/v1/score/fraud", event(4))[0] == 503  # what the disk lost once it may have lost for good
    code, err = server.end()
    assert code == 0
    assert "takes no events: Input/output error" in err


def test_a_disk_that_is_slow(serve, failing_disk):
    rules, env = failing_disk
    server = serve("--log-sync", "10ms", env=env)
    rules.write_text("0 900000")
    server.call("/v1/score/fraud", event(1))
    until(lambda: server.metrics()["penstock_log_unsynced_age_seconds"] > 0.6)
    until(lambda: server.call("/health/ready").get("log") == "slow")
    assert states(server.metrics())["slow"] == 1
    assert server.call("/v1/score/fraud", event(2))["outcome"] == "applied"
    until(lambda: server.metrics()["penstock_log_late_syncs_total"] >= 1)
    assert server.metrics()["penstock_log_unsynced_age_longest_seconds"] > 0.6
    rules.unlink()
    time.sleep(1.2)
    code, err = server.end()
    assert code == 0
    assert err.count("the event log is slow") == 1


SHELL = "exec {python} -m penstock serve {app} --port {port} --log log --head-timeout 1 {how}"


@pytest.mark.parametrize("how", [">&- 2>&-", ">/dev/full 2>/dev/full", "| true", "2>&1 | sleep 60"])
def test_who_reads_the_messages_is_no_matter(wire, tmp_path, how):
    """Closed, full, gone, or a reader that sleeps: the server starts, sweeps, restarts its keeper, and ends with 0."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    text = SHELL.format(python=sys.executable, app=wire.app, port=port, how="").removeprefix("exec ")
    command = f"{text} {how.split('|')[0]} & echo $! > pid; wait $!; echo $? > rc"
    if "|" in how:
        command = f"( {command} ) {how[how.index('|') - 5 if '2>&1' in how else how.index('|') :]}"
    shell = subprocess.Popen(
        ["bash", "-c", command], cwd=tmp_path, stdin=subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ENGINE)},
    )  # fmt: skip

    def answer(path):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
            return response.read().decode(), response.headers["Date"]

    def ready():
        try:
            return bool(answer("/health/ready"))
        except OSError:
            return False

    try:
        until(ready, 30.0)
        pid = int((tmp_path / "pid").read_text())
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), signal.SIGKILL)  # something to say
        until(lambda: str(pid) and "penstock_keeper_alive 1" in answer("/metrics")[0])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as half:
            half.sendall(b"GET / HT")
            assert half.recv(100).startswith(b"HTTP/1.1 408")
        first = answer("/health/live")[1]
        until(lambda: answer("/health/live")[1] != first)
        os.kill(pid, signal.SIGTERM)
        until((tmp_path / "rc").exists)
        until(lambda: (tmp_path / "rc").read_text() == "0\n", 2.0)
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
