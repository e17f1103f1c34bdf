from collections.abc import Sequence
from os import PathLike
from typing import Any

from penstock.errors import PenstockError

def nanoseconds_per_tick() -> float: ...

class InferError(PenstockError):
    """A request that is refused, or a model that failed: an HTTP status, and a text that says where and why."""

    status: int
    message: str
    def __init__(self, status: int, message: str) -> None: ...

class Port:
    name: str
    datatype: str
    shape: tuple[int, ...]
    def __init__(self, name: str, datatype: str, shape: tuple[int, ...]) -> None: ...
    def as_dict(self) -> dict[str, Any]: ...

class ServedModel:
    """A model that answers inference requests."""

    name: str
    version: str
    platform: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    row_ns: int
    nbytes: int
    batched: bool
    def __init__(
        self,
        name: str,
        version: str,
        runtime: Any,
        *,
        path: str | PathLike[str] | None = None,
        data: Any = None,
        folder: str | None = None,
    ) -> None: ...
    def infer(
        self, inputs: Sequence[tuple[str, str, Sequence[int], Any]], outputs: Sequence[str] | None = None
    ) -> list[tuple[str, str, tuple[int, ...], bytes]]: ...
    def infer_http(self, body: bytes, header_length: int = -1) -> tuple[bytes, list[bytes]]: ...
    def infer_raw(self, data: bytes) -> list[tuple[str, str, tuple[int, ...], bytes]]: ...
    def stats(self) -> dict[str, Any]: ...
    def _repeat(self, bodies: list[bytes], header_length: int) -> None: ...
    def _repeat_trees(self, rows: list[bytes]) -> None: ...

class Target:
    """A model as clients name it."""

    name: str
    version: str
    model: ServedModel | None
    lane: Any
    def __init__(self, name: str, version: str = "", lane: Any = None) -> None: ...
