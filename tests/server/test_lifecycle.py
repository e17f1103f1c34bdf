"""Start and stop of a real process: the port, the lines it prints, and signals while it is busy."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ENGINE = Path(__file__).resolve().parents[2] / "engine"


class Process:
    """`penstock serve` in a process of its own."""

    def __init__(self, app, *flags, cwd):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PENSTOCK_")}
        environment["PYTHONPATH"] = str(ENGINE)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "penstock", "serve", str(app), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=cwd,
        )

    def url(self):
        """Wait for the first lines; returns the port."""
        self.first = self.process.stdout.readline()
        self.curl = self.process.stdout.readline()
        return int(re.search(r"http://[^ ]*:(\d+)$", self.first.strip())[1])

    def end(self, number=signal.SIGTERM, seconds=10):
        self.process.send_signal(number)
        return self.wait(seconds)

    def wait(self, seconds=10):
        try:
            out, err = self.process.communicate(timeout=seconds)
        finally:
            self.process.kill()
        return self.process.returncode, out, err


@pytest.fixture
def start(wire, tmp_path):
    running = []

    def begin(*flags, app=wire.app):
        running.append(Process(app, *flags, cwd=tmp_path))
        return running[-1]

    yield begin
    for one in running:
        if one.process.poll() is None:
            one.process.kill()
        one.process.communicate()


def test_start_and_the_line_to_copy(start, tmp_path):
    server = start("--port", "0")
    server.url()
    assert server.first.startswith("penstock: serving fraud_app on http://127.0.0.1:")
    answer = subprocess.run(server.curl.strip(), shell=True, capture_output=True, text=True, timeout=10)
    if answer.returncode == 127:
        pytest.skip("no curl on this machine")
    assert '"outcome":"applied"' in answer.stdout
    code, _, err = server.end(signal.SIGINT)
    assert (code, err) == (0, "")


def test_port_in_use(start):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = start("--port", str(taken.getsockname()[1])).wait()
    assert code == 1
    assert err.count("\n") == 1
    assert "cannot listen on 127.0.0.1:" in err
    assert "in use" in err


def test_wrong_app_and_wrong_setting(start, tmp_path):
    code, _, err = start("--port", "0", app="nothing.py").wait()
    assert code == 1
    assert "nothing.py" in err
    (tmp_path / "penstock.toml").write_text("[server]\nprot = 1\n")
    code, _, err = start("--port", "0").wait()
    assert code == 1
    assert "server.prot: no such setting" in err


def test_a_wider_address_warns(start):
    server = start("--port", "0", "--host", "0.0.0.0")
    server.url()
    assert "curl http://127.0.0.1:" in server.curl
    code, _, err = server.end()
    assert code == 0
    assert "warning: 0.0.0.0 can be reached by others" in err


def test_sigterm_under_load_answers_what_was_accepted(start, wire):
    server = start("--port", "0")
    port = server.url()
    stopped = threading.Event()
    answered, lost = [0] * 8, []

    def load(k):
        """Keep asking; after the signal a refused connection or the end of an idle one is all right."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            while True:
                body = wire.request("", wire.transaction(customer=f"u{k}")).partition(b"\r\n\r\n")[2]
                try:
                    connection.request("POST", "/v1/score/fraud", body=body)
                    answer = connection.getresponse()
                    answer.read()
                except ConnectionRefusedError:
                    return
                except (OSError, http.client.HTTPException) as error:
                    lost.append(repr(error))
                    return
                if answer.status != 200:
                    lost.append(answer.status)
                answered[k] += 1
                if answer.getheader("connection") == "close":
                    assert stopped.is_set()
                    return
        finally:
            connection.close()

    threads = [threading.Thread(target=load, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.6)
    idle = socket.create_connection(("127.0.0.1", port))
    half = socket.create_connection(("127.0.0.1", port))
    whole = wire.request("/v1/score/fraud", wire.transaction(customer="half"))
    half.sendall(whole[:-5])
    time.sleep(0.05)
    stopped.set()
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    half.sendall(whole[-5:])
    half.settimeout(5)
    text = b""
    while part := half.recv(65536):
        text += part
    assert text.startswith(b"HTTP/1.1 200 OK")
    assert b"Connection: close" in text
    for thread in threads:
        thread.join(10)
    code, _, err = server.wait()
    assert (code, err) == (0, "")
    assert lost == []
    assert min(answered) > 10
    assert idle.recv(10) == b""
    idle.close()
    half.close()


def test_a_request_that_never_ends_does_not_hold_the_exit(start, wire):
    server = start("--port", "0", "--drain-timeout", "0.5")
    port = server.url()
    with socket.create_connection(("127.0.0.1", port)) as half:
        half.sendall(b"POST /v1/score/fraud HTTP/1.1\r\n")
        time.sleep(0.1)
        began = time.monotonic()
        code, _, _ = server.end()
        assert code == 0
        assert time.monotonic() - began < 3


def test_a_second_signal_ends_at_once(start):
    server = start("--port", "0")
    port = server.url()
    with socket.create_connection(("127.0.0.1", port)) as half:
        half.sendall(b"POST /v1/score/fraud HTTP/1.1\r\n")
        time.sleep(0.1)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        assert server.process.poll() is None  # it drains
        code, _, _ = server.end()
        assert code == 128 + signal.SIGTERM
        assert time.monotonic() - began < 3


HELD_UP = """
import time
from penstock import Event, Pipeline, Timestamp, on_demand_feature_view

class Order(Event):
    customer: str
    amount: float
    at: Timestamp

@on_demand_feature_view(mode="python")
def slow(amount: float) -> float:
    time.sleep(amount)
    return amount

orders = Pipeline("orders", event=Order, features=[slow])
"""


def test_a_second_signal_ends_a_server_whose_loop_is_held_up(start, tmp_path):
    (tmp_path / "app.py").write_text(HELD_UP)
    server = start("--port", "0", app=tmp_path / "app.py")
    port = server.url()
    body = b'{"customer": "c", "amount": 60, "at": "2026-01-01T00:00:00Z"}'
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"POST /v1/score/orders HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        time.sleep(0.5)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert server.process.poll() is None
        began = time.monotonic()
        code, _, _ = server.end()
        assert code == 128 + signal.SIGTERM
        assert time.monotonic() - began < 3


def test_a_terminal_that_closes_does_not_end_it(start, wire):
    server = start("--port", "0")
    port = server.url()
    server.process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(wire.request("/v1/score/fraud", wire.transaction(customer="c")))
        assert client.recv(65536).startswith(b"HTTP/1.1 200 OK")
    code, _, err = server.end()
    assert (code, err) == (0, "")


def test_signals_mean_what_they_meant_once_it_has_ended(tmp_path):
    """penstock.serve in a program that goes on: Ctrl-C raises KeyboardInterrupt again, SIGTERM ends it."""
    code = (
        "import os, signal, threading\n"
        "from penstock.server import serve\n"
        "names = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)\n"
        "before = [signal.getsignal(n) for n in names]\n"  # of SIGHUP whatever started the tests says, nohup for one
        "def stop():\n"
        "    import time\n"
        "    while signal.getsignal(signal.SIGTERM) != signal.SIG_IGN: time.sleep(0.01)\n"
        "    time.sleep(0.2); os.kill(os.getpid(), signal.SIGTERM)\n"
        "threading.Thread(target=stop, daemon=True).start()\n"
        "print(serve(None, models='.', port=0))\n"
        "print([signal.getsignal(n) for n in names] == before)\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(1)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PENSTOCK_")} | {"PYTHONPATH": str(ENGINE)}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60
    )
    assert found.stdout.splitlines()[-3:] == ["0", "True", "interrupted"], found.stderr
