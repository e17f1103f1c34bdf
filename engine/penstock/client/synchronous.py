"""Client (control path): blocking calls from any number of threads over a bounded pool of connections.

What must stay true: a connection goes back to the pool only after a whole answer and nothing more; whatever else
happens to it, it is closed.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, overload

from ..definitions.event import Event
from .api import Asked, ClientSettings, batch_calls, batch_results
from .calls import Call, Deadline, Run, Window, result_of
from .errors import ClientError, ConnectionLost, DeadlineExceeded
from .results import Decision, FeatureRows, Ingested, ModelMetadata

__all__ = ["Batch", "Client"]

RECEIVE = 262144


class Connection:
    """One socket, used by one thread at a time."""

    def __init__(self, settings: ClientSettings, deadline: Deadline) -> None:
        address = settings.address
        sock: socket.socket | None = None
        try:
            if address.unix is not None:
                sock = socket.socket(socket.AF_UNIX)
                sock.settimeout(deadline.left())
                sock.connect(address.unix)
            else:
                sock = socket.create_connection((address.host, address.port), timeout=deadline.left())
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if address.tls:
                sock.settimeout(deadline.left())
                sock = settings.tls_context().wrap_socket(sock, server_hostname=address.host)
        except OSError as error:
            if sock is not None:
                sock.close()
            if isinstance(error, TimeoutError):
                deadline.left()
            raise ConnectionLost(f"no connection to {place(settings)}: {error}", sent=False) from error
        except BaseException:
            if sock is not None:
                sock.close()
            raise
        self.socket = sock
        self.used = time.monotonic()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        greeting = settings.protocol.greeting()
        if greeting:
            try:
                hello = Window(greeting, list(range(len(greeting))), settings.protocol.reader(len(greeting)))
                self.exchange(hello, deadline)
                for call, reply in zip(greeting, hello.reader.replies):
                    call.decode(reply)
            except BaseException as error:
                self.close()
                if isinstance(error, (ConnectionLost, DeadlineExceeded)):
                    error.sent = False  # nothing of the call itself
                raise

    def exchange(self, window: Window, deadline: Deadline) -> None:
        """Send a window and read its answers into its reader.

        Raises ConnectionLost, DeadlineExceeded or ServerError; the connection is then of no further use.
        """
        data = memoryview(window.render(deadline))
        sent = False
        try:
            while data:
                self.socket.settimeout(deadline.left())
                n = self.socket.send(data)
                sent = True
                data = data[n:]
            while True:
                self.socket.settimeout(deadline.left())
                received = self.socket.recv(RECEIVE)
                if not received:
                    if window.reader.end():
                        break
                    raise ConnectionLost("the connection ended before the answer", sent=True)
                if window.reader.feed(received):
                    break
        except DeadlineExceeded as error:
            error.sent = sent
            raise
        except OSError as error:
            if isinstance(error, ClientError):
                raise
            if isinstance(error, TimeoutError) and deadline.over():
                raise deadline.exceeded(sent) from None
            raise ConnectionLost(f"the connection broke: {error}", sent=sent) from error
        self.used = time.monotonic()

    def fresh(self, idle: float) -> bool:
        """Whether it may be used again: not idle for long, and neither an end nor anything unasked for has arrived."""
        return time.monotonic() - self.used < idle and not self._poll.poll(0)

    def close(self) -> None:
        self.socket.close()


class Pool:
    """At most `size` connections; those that are free wait here, the last used on top."""

    def __init__(self, settings: ClientSettings) -> None:
        self._settings = settings
        self.closed = False
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._slots = threading.Semaphore(self._settings.connections)
        self._free: list[Connection] = []
        self._lock = threading.Lock()

    def take(self, deadline: Deadline) -> Connection:
        """A connection for one exchange, then give() or drop(). Raises ConnectionLost, DeadlineExceeded."""
        if self._pid != os.getpid():  # after a fork: the sockets are the parent's
            for connection in self._free:
                connection.close()
            self._reset()
        slots = self._slots
        if not slots.acquire(timeout=deadline.left()):
            raise DeadlineExceeded(
                f"none of {self._settings.connections} connections came free within {deadline.timeout:g} s", code="pool"
            )
        try:
            while True:
                with self._lock:
                    if self.closed:
                        raise ClientError("the client is closed", code="closed")
                    free = self._free.pop() if self._free else None
                if free is None:
                    return Connection(self._settings, deadline)
                if free.fresh(self._settings.idle):
                    return free
                free.close()
        except BaseException:
            slots.release()
            raise

    def give(self, connection: Connection) -> None:
        with self._lock:
            kept = not self.closed
            if kept:
                self._free.append(connection)
        if not kept:
            connection.close()
        self._slots.release()

    def drop(self, connection: Connection) -> None:
        connection.close()
        self._slots.release()

    def close(self) -> None:
        with self._lock:
            self.closed = True
            free, self._free = self._free, []
        for connection in free:
            connection.close()


class Client:
    """A Penstock server over HTTP or RESP, for any number of threads.

    url: `http://host:8000`, `resp://:password@host:6380`, with TLS `https://`, `resps://`, over a Unix socket
    `http+unix:///path`, `resp+unix:///path`.
    timeout: seconds that a call may take with all its attempts, None for no end; what is left of it is sent along, so
    the server does not begin what nobody waits for. Each method takes its own.
    retry: "safe" (default) tries again after a connection that failed before anything was sent, after 503 or BUSY
    (when the server said, else after 50 ms, doubling, with jitter), and for calls that may be sent twice: reads,
    `ingest=False`, and events whose type has an event_id (S16; Event objects, a dict does not say). "always": also
    those that a lost connection may have left done. "never": one attempt.
    attempts: how often at most. connections: how many at most; a call that needs one more waits, within its timeout.
    idle: seconds after which a free connection is not used again (less than the server's idle timeout).
    headers: fields of every HTTP request. tls: an ssl.SSLContext.

    Calls raise ClientError: InvalidEvent and InvalidRequest (refused), NotFound, AccessDenied, Overloaded (with
    retry_after), DeadlineExceeded, ConnectionLost (with sent), ServerError.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float | None = 5.0,
        retry: str = "safe",
        attempts: int = 5,
        connections: int = 16,
        idle: float = 30.0,
        headers: Mapping[str, str] | None = None,
        tls: Any = None,
    ) -> None:
        self._settings = ClientSettings(
            url,
            timeout=timeout,
            retry=retry,
            attempts=attempts,
            connections=connections,
            idle=idle,
            headers=headers,
            tls=tls,
        )
        self._pool = Pool(self._settings)

    # SYNC-ASYNC: the methods below stand in asynchronous.py too, with await

    @overload
    def score(
        self,
        pipeline: str,
        event: Event | Mapping[str, Any],
        ingest: bool = True,
        *,
        explain: bool = False,
        timeout: float | None = None,
        priority: int | None = None,
        retry: str | None = None,
    ) -> Decision: ...

    @overload
    def score(
        self,
        pipeline: str,
        event: Sequence[Event | Mapping[str, Any]],
        ingest: bool = True,
        *,
        explain: bool = False,
        timeout: float | None = None,
        priority: int | None = None,
        retry: str | None = None,
    ) -> list[Decision]: ...

    def score(
        self,
        pipeline: str,
        event: Any,
        ingest: bool = True,
        *,
        explain: bool = False,
        timeout: float | None = None,
        priority: int | None = None,
        retry: str | None = None,
    ) -> Any:
        """Score an event, or a list of them in its order (all or nothing on bad input).

        event: an Event or a dict; times as datetime (naive: UTC), Timestamp or RFC 3339 text, or integers in the
        field's unit. A Timestamp is cut to that unit. ingest: False leaves no trace. explain: features and statuses
        too. priority: 1 (first) to 7.
        """
        if isinstance(event, (list, tuple)) and not event:
            return []
        return self._one(self._settings.score(pipeline, event, ingest, explain, priority), timeout, retry)

    def ingest(
        self,
        event_type: str | type[Event],
        event: Event | Mapping[str, Any] | Sequence[Event | Mapping[str, Any]],
        *,
        timeout: float | None = None,
        priority: int | None = None,
        retry: str | None = None,
    ) -> Ingested:
        """Apply an event, or a list of them (all or nothing on bad input), without scoring."""
        if isinstance(event, (list, tuple)) and not event:
            return Ingested(0, {})
        found: Ingested = self._one(self._settings.ingest(event_type, event, priority), timeout, retry)
        return found

    def features(
        self,
        view: str,
        keys: Sequence[str | int],
        as_of: Any = None,
        *,
        timeout: float | None = None,
        retry: str | None = None,
    ) -> FeatureRows:
        """A view's values for some keys, as of a time (a Timestamp, datetime, RFC 3339 text or integer microseconds;
        left out, the server's now).

        Raises InvalidRequest with code `replay_needed` where as_of is older than the server's state (S14).
        """
        found: FeatureRows = self._one(self._settings.features(view, keys, as_of), timeout, retry)
        return found

    def infer(
        self,
        model: str,
        inputs: Mapping[str, Any],
        version: str | int | None = None,
        *,
        outputs: Sequence[str] | Mapping[str, str] | None = None,
        timeout: float | None = None,
        priority: int | None = None,
        retry: str | None = None,
    ) -> dict[str, Any]:
        """Outputs of a model by name, as numpy arrays, for inputs by name: arrays, or lists.

        Over HTTP (Open Inference Protocol, binary): a list is converted to the type that the model's metadata says,
        one more request. outputs: the names wanted, all where left out.
        Over RESP: models of one input, which is an array of the model's type; outputs: every output with its type in
        the model's order, such as {"score": "FP32"}; arrays come as [rows, n].
        """
        deadline = self._settings.deadline(timeout)
        datatypes: dict[str, str] = {}
        if self._settings.needs_metadata(inputs):
            metadata = result_of(self._run(self._settings.metadata(model, version), deadline, retry))
            datatypes = {port.name: port.datatype for port in metadata.inputs}
        calls = self._settings.infer(model, version, inputs, outputs, priority, datatypes)
        found: dict[str, Any] = result_of(self._run(calls, deadline, retry))
        return found

    def metadata(
        self,
        model: str,
        version: str | int | None = None,
        *,
        timeout: float | None = None,
        retry: str | None = None,
    ) -> ModelMetadata:
        """What a model takes and gives. HTTP only."""
        found: ModelMetadata = self._one(self._settings.metadata(model, version), timeout, retry)
        return found

    def ready(self, *, timeout: float | None = None) -> bool:
        """Whether the server takes requests; False too where it cannot be reached. One attempt."""
        return self._asked(self._settings.protocol.ready(), timeout)

    def live(self, *, timeout: float | None = None) -> bool:
        """Whether the server answers. One attempt."""
        return self._asked(self._settings.protocol.live(), timeout)

    def pipeline(self) -> Batch:
        """Scores that are collected and sent together by execute()."""
        return Batch(self)

    def close(self) -> None:
        """Close the connections; calls under way end as they would."""
        self._pool.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # how they run

    def _one(self, calls: list[Call], timeout: float | None, retry: str | None) -> Any:
        return result_of(self._run(calls, self._settings.deadline(timeout), retry))

    def _asked(self, calls: list[Call], timeout: float | None) -> bool:
        try:
            return bool(self._one(calls, timeout, "never"))
        except ClientError as error:
            if error.code == "closed":
                raise
            return False

    def _run(self, calls: list[Call], deadline: Deadline, retry: str | None) -> list[Any]:
        """A result or a ClientError for each call."""
        settings = self._settings
        run = Run(settings.protocol, calls, deadline, settings.retry if retry is None else retry, settings.attempts)
        while (window := run.next()) is not None:
            if window.wait:
                time.sleep(window.wait)
            try:
                connection = self._pool.take(deadline)
            except ClientError as error:
                run.failed(window, error)
                continue
            try:
                connection.exchange(window, deadline)
            except ClientError as error:
                self._pool.drop(connection)
                run.failed(window, error)
                continue
            except BaseException:
                self._pool.drop(connection)
                raise
            if window.reader.reusable:
                self._pool.give(connection)
            else:
                self._pool.drop(connection)
            run.answered(window)
        return run.results


class Batch:
    """Scores that are sent together: over RESP a command each in one write, over HTTP an array request for scores that
    follow each other with the same options (all or nothing on bad input). Used by one thread."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._asked: list[Asked] = []

    def score(
        self,
        pipeline: str,
        event: Event | Mapping[str, Any],
        ingest: bool = True,
        *,
        explain: bool = False,
        priority: int | None = None,
    ) -> Batch:
        """Put one event into the batch."""
        self._asked.append((pipeline, event, ingest, explain, priority))
        return self

    def execute(
        self, *, timeout: float | None = None, retry: str | None = None, raise_errors: bool = True
    ) -> list[Decision]:
        """Send what was collected and forget it; the decisions in its order.

        Raises the first error after every answer is in; with `raise_errors=False` errors stand in their places.
        """
        asked, self._asked = self._asked, []
        deadline = self._client._settings.deadline(timeout)
        calls, sizes = batch_calls(self._client._settings, asked)
        results = batch_results(self._client._run(calls, deadline, retry), sizes)
        if raise_errors:
            for result in results:
                if isinstance(result, ClientError):
                    raise result
        return results

    def __len__(self) -> int:
        return len(self._asked)


def place(settings: ClientSettings) -> str:
    """The server, for messages."""
    address = settings.address
    return address.unix if address.unix is not None else f"{address.host}:{address.port}"
