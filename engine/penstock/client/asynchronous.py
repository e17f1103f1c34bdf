"""AsyncClient (control path): the same calls for one event loop, over a bounded pool of connections.

What must stay true: a connection goes back to the pool only after a whole answer and nothing more; a call that is
cancelled closes its connection and gives its place back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any, overload

from ..definitions.event import Event
from .api import Asked, ClientSettings, batch_calls, batch_results
from .calls import Call, Deadline, Reader, Run, Window, result_of
from .errors import ClientError, ConnectionLost, DeadlineExceeded, ServerError
from .results import Decision, FeatureRows, Ingested, ModelMetadata
from .synchronous import place

__all__ = ["AsyncBatch", "AsyncClient"]


class AsyncConnection(asyncio.Protocol):
    """One connection: what arrives goes straight into the reader of the window under way."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.used = time.monotonic()
        self.sent = False
        self._reader: Reader | None = None
        self._done: asyncio.Future[None] | None = None
        self._dead = False

    async def exchange(self, window: Window, deadline: Deadline) -> None:
        """Send a window and read its answers into its reader.

        Raises ConnectionLost, DeadlineExceeded or ServerError; the connection is then, and when the call is cancelled,
        of no further use.
        """
        data = window.render(deadline)
        assert self.transport is not None
        if self._dead:
            raise ConnectionLost("the connection ended", sent=False)
        self.sent = False
        self._reader = window.reader
        done = self._done = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(deadline.left()) as limit:
                self.sent = True
                self.transport.write(data)
                await done
        except TimeoutError as error:
            if limit.expired():
                raise deadline.exceeded(self.sent) from None
            raise ConnectionLost(f"the connection broke: {error}", sent=True) from error
        finally:
            self._reader = self._done = None
        self.used = time.monotonic()

    def fresh(self, idle: float) -> bool:
        """Whether it may be used again."""
        return not self._dead and time.monotonic() - self.used < idle

    def close(self) -> None:
        self._dead = True
        if self.transport is not None:
            self.transport.abort()

    # what the loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        if self._reader is None or self._done is None or self._done.done():
            self._dead = True  # nobody asked
            return
        try:
            if self._reader.feed(data):
                self._done.set_result(None)
        except ServerError as error:
            self._done.set_exception(error)

    def eof_received(self) -> bool:
        self._ended(None)
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._ended(error)

    def _ended(self, error: Exception | None) -> None:
        self._dead = True
        if self._reader is None or self._done is None or self._done.done():
            return
        if error is None and self._reader.end():
            self._done.set_result(None)
            return
        text = "the connection ended before the answer" if error is None else f"the connection broke: {error}"
        self._done.set_exception(ConnectionLost(text, sent=True))


class AsyncPool:
    """At most `size` connections of one loop; those that are free wait here, the last used on top."""

    def __init__(self, settings: ClientSettings) -> None:
        self._settings = settings
        self._slots = asyncio.Semaphore(settings.connections)
        self._free: list[AsyncConnection] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self.closed = False

    async def take(self, deadline: Deadline) -> AsyncConnection:
        """A connection for one exchange, then give() or drop(). Raises ConnectionLost, DeadlineExceeded."""
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise RuntimeError("AsyncClient: used in another event loop than before; make one for each loop")
        try:
            async with asyncio.timeout(deadline.left()) as limit:
                await self._slots.acquire()
        except TimeoutError as error:
            if isinstance(error, DeadlineExceeded):
                raise
            assert limit.expired()
            raise DeadlineExceeded(
                f"none of {self._settings.connections} connections came free within {deadline.timeout:g} s", code="pool"
            ) from None
        try:
            if self.closed:
                raise ClientError("the client is closed", code="closed")
            while self._free:
                connection = self._free.pop()
                if connection.fresh(self._settings.idle):
                    return connection
                connection.close()
            return await self._connect(deadline)
        except BaseException:
            self._slots.release()
            raise

    async def _connect(self, deadline: Deadline) -> AsyncConnection:
        settings, address = self._settings, self._settings.address
        loop = asyncio.get_running_loop()
        connection = AsyncConnection()
        try:
            async with asyncio.timeout(deadline.left()) as limit:
                if address.unix is not None:
                    await loop.create_unix_connection(lambda: connection, address.unix)
                else:
                    tls = settings.tls_context()
                    await loop.create_connection(lambda: connection, address.host, address.port, ssl=tls)
        except OSError as error:
            connection.close()
            if isinstance(error, DeadlineExceeded):
                raise
            if isinstance(error, TimeoutError) and limit.expired():
                raise deadline.exceeded() from None
            raise ConnectionLost(f"no connection to {place(settings)}: {error}", sent=False) from error
        except BaseException:
            connection.close()
            raise
        greeting = settings.protocol.greeting()
        if greeting:
            try:
                hello = Window(greeting, list(range(len(greeting))), settings.protocol.reader(len(greeting)))
                await connection.exchange(hello, deadline)
                for call, reply in zip(greeting, hello.reader.replies):
                    call.decode(reply)
            except BaseException as error:
                connection.close()
                if isinstance(error, (ConnectionLost, DeadlineExceeded)):
                    error.sent = False  # nothing of the call itself
                raise
        return connection

    def give(self, connection: AsyncConnection) -> None:
        if self.closed:
            connection.close()
        else:
            self._free.append(connection)
        self._slots.release()

    def drop(self, connection: AsyncConnection) -> None:
        connection.close()
        self._slots.release()

    def close(self) -> None:
        self.closed = True
        while self._free:
            self._free.pop().close()


class AsyncClient:
    """A Penstock server over HTTP or RESP, for one event loop.

    The arguments, the rules of timeouts and retries, and the errors are those of penstock.Client. A call that is
    cancelled closes its connection; the server may have done what was asked.
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
        self._pool = AsyncPool(self._settings)

    @overload
    async def score(
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
    async def score(
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

    async def score(
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
        return await self._one(self._settings.score(pipeline, event, ingest, explain, priority), timeout, retry)

    async def ingest(
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
        found: Ingested = await self._one(self._settings.ingest(event_type, event, priority), timeout, retry)
        return found

    async def features(
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
        found: FeatureRows = await self._one(self._settings.features(view, keys, as_of), timeout, retry)
        return found

    async def infer(
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
            metadata = result_of(await self._run(self._settings.metadata(model, version), deadline, retry))
            datatypes = {port.name: port.datatype for port in metadata.inputs}
        calls = self._settings.infer(model, version, inputs, outputs, priority, datatypes)
        found: dict[str, Any] = result_of(await self._run(calls, deadline, retry))
        return found

    async def metadata(
        self,
        model: str,
        version: str | int | None = None,
        *,
        timeout: float | None = None,
        retry: str | None = None,
    ) -> ModelMetadata:
        """What a model takes and gives. HTTP only."""
        found: ModelMetadata = await self._one(self._settings.metadata(model, version), timeout, retry)
        return found

    async def ready(self, *, timeout: float | None = None) -> bool:
        """Whether the server takes requests; False too where it cannot be reached. One attempt."""
        return await self._asked(self._settings.protocol.ready(), timeout)

    async def live(self, *, timeout: float | None = None) -> bool:
        """Whether the server answers. One attempt."""
        return await self._asked(self._settings.protocol.live(), timeout)

    def pipeline(self) -> AsyncBatch:
        """Scores that are collected and sent together by execute()."""
        return AsyncBatch(self)

    async def close(self) -> None:
        """Close the connections; calls under way end as they would."""
        self._pool.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # how they run

    async def _one(self, calls: list[Call], timeout: float | None, retry: str | None) -> Any:
        return result_of(await self._run(calls, self._settings.deadline(timeout), retry))

    async def _asked(self, calls: list[Call], timeout: float | None) -> bool:
        try:
            return bool(await self._one(calls, timeout, "never"))
        except ClientError as error:
            if error.code == "closed":
                raise
            return False

    async def _run(self, calls: list[Call], deadline: Deadline, retry: str | None) -> list[Any]:
        """A result or a ClientError for each call."""
        settings = self._settings
        run = Run(settings.protocol, calls, deadline, settings.retry if retry is None else retry, settings.attempts)
        while (window := run.next()) is not None:
            if window.wait:
                await asyncio.sleep(window.wait)
            try:
                connection = await self._pool.take(deadline)
            except ClientError as error:
                run.failed(window, error)
                continue
            try:
                await connection.exchange(window, deadline)
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


class AsyncBatch:
    """Scores that are sent together: over RESP a command each in one write, over HTTP an array request for scores that
    follow each other with the same options (all or nothing on bad input). Used by one task."""

    def __init__(self, client: AsyncClient) -> None:
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
    ) -> AsyncBatch:
        """Put one event into the batch."""
        self._asked.append((pipeline, event, ingest, explain, priority))
        return self

    async def execute(
        self, *, timeout: float | None = None, retry: str | None = None, raise_errors: bool = True
    ) -> list[Decision]:
        """Send what was collected and forget it; the decisions in its order.

        Raises the first error after every answer is in; with `raise_errors=False` errors stand in their places.
        """
        asked, self._asked = self._asked, []
        deadline = self._client._settings.deadline(timeout)
        calls, sizes = batch_calls(self._client._settings, asked)
        results = batch_results(await self._client._run(calls, deadline, retry), sizes)
        if raise_errors:
            for result in results:
                if isinstance(result, ClientError):
                    raise result
        return results

    def __len__(self) -> int:
        return len(self._asked)
