"""What a client raises (control path). Every error keeps the server's code, the place in the input, and the status."""

from __future__ import annotations

from ..errors import PenstockError

__all__ = [
    "AccessDenied",
    "ClientError",
    "ConnectionLost",
    "DeadlineExceeded",
    "InvalidEvent",
    "InvalidRequest",
    "NotFound",
    "Overloaded",
    "ServerError",
]


class ClientError(PenstockError):
    """Base of what a client raises.

    code: the server's word for it (`invalid_event`, `overloaded`, ...) or the client's own. path: the place in the
    input, such as `$[17].amount`. status: the HTTP status, None over RESP or where there was no answer.
    """

    def __init__(self, message: str, *, code: str = "", path: str | None = None, status: int | None = None) -> None:
        self.message = message
        self.code = code
        self.path = path
        self.status = status
        super().__init__(f"{path}: {message}" if path else message)


class InvalidRequest(ClientError, ValueError):
    """The server refuses the request as it stands; sending it again would not help."""


class InvalidEvent(InvalidRequest):
    """An event that was refused, by the server or before it was sent; nothing has changed. `path` is its place."""


class NotFound(ClientError, LookupError):
    """The server has no such pipeline, event type, view, model or version."""


class AccessDenied(ClientError):
    """The password is missing or wrong."""


class Overloaded(ClientError):
    """The server refused for now and did nothing (503, BUSY), and the retries that the deadline allows are used up.

    retry_after: seconds that the server asked to wait, None where it did not say.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        path: str | None = None,
        status: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, code=code, path=path, status=status)
        self.retry_after = retry_after


class DeadlineExceeded(ClientError, TimeoutError):
    """The call's `timeout` is over. sent: whether the server may have done what was asked."""

    def __init__(
        self,
        message: str,
        *,
        code: str = "deadline",
        path: str | None = None,
        status: int | None = None,
        sent: bool = False,
    ) -> None:
        super().__init__(message, code=code, path=path, status=status)
        self.sent = sent


class ConnectionLost(ClientError, ConnectionError):
    """No connection, or it ended before the answer. sent: whether the server may have done what was asked."""

    def __init__(self, message: str, *, code: str = "connection", sent: bool) -> None:
        super().__init__(message, code=code)
        self.sent = sent


class ServerError(ClientError):
    """The server failed, or answered what this client does not understand."""
