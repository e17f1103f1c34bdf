"""A server of the shop app, and a peer that answers as a test says: for the tests of the client."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import hiredis
import pytest
from server import conftest as served_app

SHOP = Path(__file__).with_name("shop_app.py")


class Cut(Exception):
    """Raised by an answer: the connection is reset, after `sent` has gone out."""

    def __init__(self, sent: bytes = b"") -> None:
        self.sent = sent


class Peer:
    """Accepts connections and answers each request with `answer(number, request)`, numbered from 0 over all.

    HTTP requests are bytes; RESP commands lists of bytes. `accept(number)` False resets a connection before it is read.
    """

    def __init__(self, answer: Callable[[int, Any], bytes], *, resp: bool = False, unix: str | None = None) -> None:
        self.answer = answer
        self.accept: Callable[[int], bool] = lambda number: True
        self.resp = resp
        self.requests: list[Any] = []
        self.greetings = 0
        self.accepted = 0
        self.lock = threading.Lock()
        self.listener = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind(unix if unix else ("127.0.0.1", 0))
        self.listener.listen(200)
        scheme = "resp" if resp else "http"
        if unix:
            self.url = f"{scheme}+unix://{unix}"
        else:
            self.port = self.listener.getsockname()[1]
            self.url = f"{scheme}://127.0.0.1:{self.port}"
        self.open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                number, self.accepted = self.accepted, self.accepted + 1
                if not self.accept(number):
                    reset(connection)
                    continue
                with self.lock:
                    self.open.add(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            try:
                for request in (resp_commands if self.resp else http_requests)(connection):
                    if self.resp and request[0] == b"HELLO":
                        self.greetings += 1
                        connection.sendall(b"%1\r\n$6\r\nserver\r\n$8\r\npenstock\r\n")
                        continue
                    with self.lock:
                        number = len(self.requests)
                        self.requests.append(request)
                    connection.sendall(self.answer(number, request))
            except Cut as cut:
                connection.sendall(cut.sent)
                reset(connection)
            finally:
                with self.lock:
                    self.open.discard(connection)
                connection.close()

    def cut_all(self) -> None:
        """End every open connection, as a restart would."""
        with self.lock:
            for connection in self.open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.cut_all()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def reset(connection: socket.socket) -> None:
    if connection.family == socket.AF_INET:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def http_requests(connection: socket.socket) -> Iterator[bytes]:
    buffer = b""
    while True:
        while b"\r\n\r\n" not in buffer:
            data = connection.recv(65536)
            if not data:
                return
            buffer += data
        head, _, rest = buffer.partition(b"\r\n\r\n")
        length = 0
        for line in head.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        while len(rest) < length:
            data = connection.recv(65536)
            if not data:
                return
            rest += data
        yield head + b"\r\n\r\n" + rest[:length]
        buffer = rest[length:]


def resp_commands(connection: socket.socket) -> Iterator[list[bytes]]:
    nothing = object()
    reader = hiredis.Reader(notEnoughData=nothing)
    while True:
        while (command := reader.gets()) is nothing:
            data = connection.recv(65536)
            if not data:
                return
            reader.feed(data)
        yield command


def http_answer(body: bytes, status: int = 200, *fields: str) -> bytes:
    lines = [f"HTTP/1.1 {status} Some", "Content-Type: application/json", f"Content-Length: {len(body)}", *fields]
    return "\r\n".join([*lines, "", ""]).encode() + body


def forward(port: int, request: bytes) -> bytes:
    """The answer of the server at a port to one HTTP request."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request)
        return next(http_requests(connection))  # an answer is framed as a request is


@pytest.fixture(scope="session")
def shop() -> Iterator[Any]:
    """The shop app served over HTTP."""
    with mock.patch.object(served_app, "APP", SHOP):
        running = served_app.Served()
    with running:
        yield running


class RespServed(served_app.Served):
    """The shop app over RESP too."""

    def __init__(self, password: str | None = None) -> None:
        from penstock.server.config import ServerConfig
        from penstock.server.resp import build_resp

        super().__init__()
        self.resp = build_resp(self.engine, ServerConfig(password=password), flow=self.flow)

    async def _serve(self) -> None:
        acceptor = await asyncio.get_running_loop().create_server(self.resp, "127.0.0.1", 0)
        self.resp_port = acceptor.sockets[0].getsockname()[1]
        try:
            await super()._serve()
        finally:
            acceptor.close()
            self.resp.close_idle(force=True)
            await asyncio.sleep(0.01)


@contextlib.contextmanager
def resp_server(password: str | None = None) -> Iterator[str]:
    """The URL of the shop app served over RESP, without its password."""
    with mock.patch.object(served_app, "APP", SHOP):
        running = RespServed(password)
    with running:
        yield f"resp://127.0.0.1:{running.resp_port}"


@pytest.fixture(scope="session")
def peers() -> Any:
    """What tests make servers with: Peer, Cut, http_answer, forward, SHOP."""
    from types import SimpleNamespace

    return SimpleNamespace(
        Peer=Peer, Cut=Cut, http_answer=http_answer, forward=forward, shop=SHOP, resp_server=resp_server
    )
