"""The locust files run without a browser against a server of ours, with no failure."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from load.generator import REPO, Server, free_port

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("locust"), reason="locust is not installed (extra ci)")


@pytest.mark.parametrize("protocol", ["http", "resp"])
def test_users_are_answered(protocol, tmp_path):
    port, resp_port = free_port(), free_port()
    app = REPO / "tests" / "server" / "fraud_app.py"
    command = [sys.executable, "-m", "penstock", "serve", str(app), "--port", str(port), "--resp-port", str(resp_port)]
    host = f"http://127.0.0.1:{port}" if protocol == "http" else f"127.0.0.1:{resp_port}"
    with Server(command, port, core=None, name=f"locust-{protocol}"):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "locust", "-f", str(REPO / "bench" / "load" / f"locustfile_{protocol}.py")),
                *("--headless", "-u", "8", "-r", "8", "-t", "3s", "--host", host),
                *("--csv", str(tmp_path / "run"), "--exit-code-on-error", "1", "--only-summary"),
            ],
            capture_output=True,
            text=True,
            timeout=90,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    with Path(tmp_path / "run_stats.csv").open() as f:
        rows = {r["Name"]: r for r in csv.DictReader(f)}
    assert int(rows["Aggregated"]["Request Count"]) > 100
    assert int(rows["Aggregated"]["Failure Count"]) == 0
    assert len(rows) == {"http": 4, "resp": 5}[protocol]
