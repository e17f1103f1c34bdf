"""The native writer of the metrics text."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from .flow import Lane
from .http import Route
from .infer import Target
from .loop_lag import LoopLag

MODEL_FAMILIES: Final[tuple[tuple[str, str, str], ...]]
LANE_FAMILIES: Final[tuple[tuple[str, str, str], ...]]

def labels(**values: object) -> str: ...
def escaped(text: str) -> str: ...

class Part:
    """Something that writes whole families."""

class Page(Part):
    """All parts in order."""

    def __init__(self, parts: Iterable[Part]) -> None: ...
    def bytes(self) -> bytes: ...

class Numbers(Part):
    """Families of one sample: (name, kind, about, read)."""

    def __init__(self, entries: Iterable[tuple[str, str, str, Callable[[], float]]]) -> None: ...

class Summary(Part):
    """A sum and a count."""

    def __init__(self, name: str, about: str, total: Callable[[], float], count: Callable[[], int]) -> None: ...

class Family(Part):
    """One family whose labels come and go: read() gives (value or values of the labels, number)."""

    def __init__(
        self, name: str, kind: str, about: str, names: tuple[str, ...], read: Callable[[], Iterable[tuple[Any, float]]]
    ) -> None: ...

class Table(Part):
    """Families that share their labels: read() gives a row of numbers per label text."""

    def __init__(
        self,
        families: Sequence[tuple[str, str, str]],
        texts: Sequence[str],
        read: Callable[[], Sequence[Sequence[float]]],
    ) -> None: ...

class Routes(Part):
    """Requests by route and status, and how long they took."""

    def __init__(self, routes: Callable[[], list[Route]]) -> None: ...

class Decisions(Part):
    """What the engine's core counts."""

    def __init__(self, core: Any, outcomes: Sequence[str]) -> None: ...

class Lag(Part):
    """The histogram of the loop's lateness."""

    def __init__(self, lag: LoopLag) -> None: ...

class Models(Part):
    """Inferences by model, kept as finished text."""

    ns_per_tick: float
    models_loaded: int
    models_bytes: int
    def __init__(
        self, targets: Callable[[], Iterable[Target]], version: Callable[[], int], ns_per_tick: float = 1.0
    ) -> None: ...
    def tick(self) -> None: ...
    def prepare(self) -> None: ...

class Lanes(Part):
    """Queues and refusals by lane; those of models are summed."""

    def __init__(self, lanes: Callable[[], Iterable[Lane]], models: Models | None = None) -> None: ...
