"""Calls and their retries, without a socket (control path): shared by the client of threads and that of asyncio.

A Run holds the calls of one method call until each has a result or an error; it says what to send next, and how long to
wait before. What must stay true: what may have changed something is sent again only if that is safe or asked for.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from .errors import ClientError, ConnectionLost, DeadlineExceeded, Overloaded

__all__ = ["RETRIES", "Call", "Deadline", "Protocol_", "Reader", "Run", "Window", "result_of"]

RETRIES = ("safe", "always", "never")
FIRST_WAIT = 0.05  # seconds before the second attempt; it doubles, and is taken times 0.5 to 1
LONGEST_WAIT = 2.0


class Deadline:
    """The time by which a call must be over; timeout: seconds from now, None for no end."""

    __slots__ = ("at", "timeout")

    def __init__(self, timeout: float | None) -> None:
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout: expected seconds above 0 or None, got {timeout!r}")
        self.timeout = timeout
        self.at = None if timeout is None else time.monotonic() + timeout

    def left(self) -> float | None:
        """Seconds left; None without end. Raises DeadlineExceeded where there are none."""
        if self.at is None:
            return None
        left = self.at - time.monotonic()
        if left <= 0:
            raise self.exceeded()
        return left

    def over(self) -> bool:
        return self.at is not None and time.monotonic() >= self.at

    def exceeded(self, sent: bool = False) -> DeadlineExceeded:
        return DeadlineExceeded(f"no answer within {self.timeout:g} s", sent=sent)

    def server_us(self) -> int | None:
        """What is left in microseconds, for the server, rounded down to two digits.

        So the heads of requests repeat, which the server knows by their bytes; and the answer has time to travel.
        """
        left = self.left()
        if left is None:
            return None
        us = max(1, int(left * 1e6))
        step: int = 10 ** max(0, len(str(us)) - 2)
        return us // step * step


class Call(msgspec.Struct, frozen=True):
    """One request: render(deadline) gives its bytes, decode(reply) its result or raises ClientError.

    safe: sending it twice does no harm.
    """

    safe: bool
    render: Callable[[Deadline], bytes]
    decode: Callable[[Any], Any]


class Reader(Protocol):
    """Takes the bytes of the answers to a window."""

    replies: list[Any]
    reusable: bool  # after the last answer: whether the connection may serve another window

    def feed(self, data: bytes) -> bool:
        """Whether every answer is there. Raises ServerError for what is no answer."""

    def end(self) -> bool:
        """The connection ended: whether every answer is there."""


class Protocol_(Protocol):
    """What the two protocols have in common for connections."""

    width: int  # calls that may be sent before the first answer is read

    def reader(self, n: int) -> Reader: ...
    def greeting(self) -> list[Call]: ...


class Window:
    """Calls that are sent together, after `wait` seconds."""

    def __init__(self, calls: list[Call], indexes: list[int], reader: Reader, wait: float = 0.0) -> None:
        self.calls = calls
        self.indexes = indexes
        self.reader = reader
        self.wait = wait

    def render(self, deadline: Deadline) -> bytes:
        return b"".join([call.render(deadline) for call in self.calls])


class Run:
    """Calls on their way. Loop: `window = run.next()` until None; wait, exchange it, then answered() or failed()."""

    def __init__(self, protocol: Protocol_, calls: list[Call], deadline: Deadline, retry: str, attempts: int) -> None:
        if retry not in RETRIES:
            raise ValueError(f'retry: expected "safe", "always" or "never", got {retry!r}')
        self.protocol = protocol
        self.calls = calls
        self.deadline = deadline
        self.retry = retry
        self.attempts = attempts
        self.attempt = 1
        self.results: list[Any] = [None] * len(calls)
        self._now = list(range(len(calls)))  # to be sent in this round
        self._again: list[int] = []  # in the next
        self._wait = 0.0

    def next(self) -> Window | None:
        if not self._now:
            self._now, self._again = sorted(self._again), []
            self.attempt += 1
        indexes, self._now = self._now[: self.protocol.width], self._now[self.protocol.width :]
        if not indexes:
            return None
        wait, self._wait = self._wait, 0.0
        return Window([self.calls[i] for i in indexes], indexes, self.protocol.reader(len(indexes)), wait)

    def answered(self, window: Window) -> None:
        """Take the answers that are there."""
        for i, reply in zip(window.indexes, window.reader.replies):
            try:
                self.results[i] = self.calls[i].decode(reply)
            except ClientError as error:
                self._judge(i, error)

    def failed(self, window: Window, error: ClientError) -> None:
        """The window was not, or only in part, answered."""
        self.answered(window)
        for i in window.indexes[len(window.reader.replies) :]:
            self._judge(i, error)

    def _judge(self, index: int, error: ClientError) -> None:
        self.results[index] = error
        wait = self._wait_after(error, self.calls[index].safe)
        if wait is not None:
            self._again.append(index)
            self._wait = max(self._wait, wait)

    def _wait_after(self, error: ClientError, safe: bool) -> float | None:
        """Seconds until the call may be sent again, None where it may not or where the deadline comes first."""
        if self.retry == "never" or self.attempt >= self.attempts:
            return None
        wait = min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** (self.attempt - 1)) * random.uniform(0.5, 1.0)
        if isinstance(error, Overloaded):
            # A log that is full may have taken the first events of an array.
            if error.code == "log_refused" and not safe and self.retry != "always":
                return None
            if error.retry_after is not None:
                wait = error.retry_after + wait * 0.5
        elif not isinstance(error, ConnectionLost) or (error.sent and not safe and self.retry != "always"):
            return None
        try:
            left = self.deadline.left()
        except DeadlineExceeded:
            return None
        return wait if left is None or wait < left else None


def result_of(results: list[Any]) -> Any:
    """The one result of a run of one call; raises where it is an error."""
    if isinstance(results[0], ClientError):
        raise results[0]
    return results[0]
