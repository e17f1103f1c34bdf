"""What the connections of every protocol share."""

from asyncio import Protocol

from .flow import Flow
from .log import EventLog

class WireServer:
    """Output buffer, connections and limits of one listener."""

    event_log: EventLog | None
    flow: Flow
    max_connections: int
    draining: bool
    accepted: int
    refused: int
    def __call__(self) -> WireConnection: ...
    @property
    def open_connections(self) -> int: ...
    def sweep(self) -> None: ...
    def close_idle(self, force: bool = False) -> int: ...
    def send_waiting(self) -> None: ...

class WireConnection(Protocol): ...
