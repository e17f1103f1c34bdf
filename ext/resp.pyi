"""The RESP listener and its connections."""

from collections.abc import Callable
from typing import Any

from .core import Core
from .flow import Flow, Lane
from .infer import Target
from .wire import WireConnection, WireServer

KINDS: tuple[str, ...]

class Status(str):
    """A reply such as +OK."""

class Verbatim(str):
    """Text that RESP3 marks as text."""

class CommandError(Exception):
    """A command that is refused: the whole line after the dash."""

def one_line(text: str) -> str: ...

class Subject:
    """A pipeline or event type as commands name it."""

    name: bytes
    lane: Lane
    def __init__(self, name: str, lane: Lane, core: Core, index: int, pipeline: bool) -> None: ...

class RespServer(WireServer):
    """What the connections of one RESP listener share."""

    password: bytes | None
    max_body: int
    max_command: int
    max_arguments: int
    max_parts: int
    part_bytes: int
    batches: int
    batched: int
    def __init__(
        self,
        flow: Flow,
        *,
        pipelines: list[Subject],
        events: list[Subject],
        find_model: Callable[[str, str], Target | None],
        features: Callable[[bytes, bytes | None, bool, bool, list[bytes]], Any],
        control: Callable[[RespConnection, bytes, list[bytes]], Any],
        password: str | bytes | None = None,
        log: Callable[[Exception], None] | None = None,
        max_body: int = 1048576,
        max_arguments: int = 16384,
        max_connections: int = 10000,
        max_parts: int | None = None,
        body_timeout: float = 10.0,
        idle_timeout: float = 75.0,
        write_timeout: float = 30.0,
    ) -> None: ...
    def __call__(self) -> RespConnection: ...
    @property
    def error_counts(self) -> dict[str, int]: ...
    @property
    def command_counts(self) -> dict[str, int]: ...
    @property
    def clients(self) -> list[RespConnection]: ...

class RespConnection(WireConnection):
    """One client."""

    protocol: int
    authenticated: bool
    refusing: bool
    id: int
    name: bytes
    facts: dict[str, str] | None
    @property
    def address(self) -> str: ...
    @property
    def idle_seconds(self) -> int: ...
    def close_after_reply(self) -> None: ...
