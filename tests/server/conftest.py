"""A server of the small fraud app in a thread of its own, and a raw-socket client, for the tests of the server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

APP = Path(__file__).with_name("fraud_app.py")


class Answer:
    """One HTTP response."""

    def __init__(self, status: int, fields: dict[str, str], body: bytes) -> None:
        self.status, self.fields, self.body = status, fields, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error = self.json["error"]
        assert set(error) == {"code", "message", "path"}
        return error

    def __repr__(self) -> str:
        return f"Answer({self.status}, {self.fields}, {self.body[:300]!r})"


class Client:
    """One connection; sends bytes as they are, reads answers by Content-Length."""

    def __init__(self, port: int, timeout: float = 5.0) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=timeout)
        self.buffer = b""

    def send(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(data)

    def fill(self) -> bool:
        try:
            data = self.socket.recv(65536)
        except ConnectionResetError:
            return False
        self.buffer += data
        return bool(data)

    def read(self, head_only: bool = False) -> Answer | None:
        """The next answer, None when the connection ends first; a timeout raises."""
        while b"\r\n\r\n" not in self.buffer:
            if not self.fill():
                assert not self.buffer, self.buffer
                return None
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        version, status, _ = lines[0].split(" ", 2)
        assert version == "HTTP/1.1"
        fields = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines[1:])}
        assert len(fields) == len(lines) - 1
        if status == "100":
            return Answer(100, fields, b"")
        length = 0 if head_only else int(fields["content-length"])
        while len(self.buffer) < length:
            assert self.fill(), "the answer was cut short"
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        return Answer(int(status), fields, body)

    def closed(self) -> bool:
        """Whether the server ends the connection, without another byte."""
        return not self.buffer and not self.fill()

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Served:
    """A running server: its engine, its HttpServer, its port."""

    def __init__(self, lanes: Any = None, **limits: Any) -> None:
        from penstock import Engine
        from penstock._ext.flow import Flow
        from penstock.server.config import ServerConfig
        from penstock.server.routes import build_server

        self.engine = Engine(APP)
        self.state = {"ready": True}
        self.flow = Flow(1)
        self.server = build_server(self.engine, ServerConfig(**limits), self.state, flow=self.flow, lanes=lanes)
        self.period = min(0.5, ServerConfig(**limits).head_timeout / 4)
        self.started = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.stop = asyncio.Event()
        self.flow.start(self.loop)
        acceptor = await self.loop.create_server(self.server, "127.0.0.1", 0)
        self.port = acceptor.sockets[0].getsockname()[1]
        sweeper = asyncio.ensure_future(self._sweep())
        self.started.set()
        await self.stop.wait()
        sweeper.cancel()
        acceptor.close()
        self.server.close_idle(force=True)
        await asyncio.sleep(0.01)
        self.flow.stop()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self.period)
            self.server.sweep()

    def __enter__(self) -> Served:
        self.thread.start()
        assert self.started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join(10)
        assert not self.thread.is_alive()

    def client(self, timeout: float = 5.0) -> Client:
        return Client(self.port, timeout)

    def ask(self, data: bytes) -> Answer:
        """The first answer to these bytes on a new connection."""
        with self.client() as client:
            client.send(data)
            answer = client.read()
            assert answer is not None, "the connection ended without an answer"
            return answer

    def post(self, path: str, body: Any) -> Answer:
        return self.ask(request(path, body))

    def get(self, path: str) -> Answer:
        return self.ask(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())

    def footprint(self) -> Any:
        """All that a refused request may not change."""
        stats = self.engine.stats()
        return stats["stores"], stats["outcomes"], stats["actions"], stats["arms"], stats["models"]


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def transaction(**changes: Any) -> dict[str, Any]:
    event = {"customer": "c1", "terminal": "t1", "amount": 12.5, "at": now(), **changes}
    return {name: value for name, value in event.items() if value is not ...}


def request(path: str, body: Any, *fields: str, method: str = "POST", version: str = "1.1") -> bytes:
    """The bytes of a request; a body that is not bytes is written as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/{version}", "Host: test", f"Content-Length: {len(data)}", *fields, "", ""]
    return "\r\n".join(lines).encode() + data


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Served(head_timeout=0.5, body_timeout=0.5, max_body=65536) as running:
        yield running


@pytest.fixture(scope="session")
def wire() -> Any:
    """What the tests write requests with: request, transaction, now, Served, Client."""
    from types import SimpleNamespace

    return SimpleNamespace(
        request=request, transaction=transaction, now=now, Served=Served, Client=Client, Answer=Answer, app=APP
    )
