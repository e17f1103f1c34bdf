"""Errors that Penstock raises (control path). Every message says what was wrong, where, and what would be right."""

from __future__ import annotations

__all__ = [
    "DefinitionError",
    "EngineError",
    "EventError",
    "InProgress",
    "LogError",
    "PenstockError",
    "ReplayNeeded",
    "ScoringError",
]


class PenstockError(Exception):
    """Base of every error that Penstock raises on purpose."""


class DefinitionError(PenstockError, ValueError):
    """A wrong app: found when the app is loaded, never on a request. `problems` lists every one as `place: reason`."""

    def __init__(self, problems: list[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class EventError(PenstockError, ValueError):
    """An event that was refused; nothing has changed. `path` is its place in the input, for example `[17].amount`."""

    def __init__(self, path: str, message: str) -> None:
        self.path = path
        self.message = message
        super().__init__(f"{path.lstrip('.')}: {message}" if path else message)


class ReplayNeeded(PenstockError, ValueError):
    """A read as of a time that the online state no longer holds (S14): use `Engine.replay` on history."""


class ScoringError(PenstockError, RuntimeError):
    """A function or model failed and the pipeline has no fallback. `ingested`: whether the event is in the state."""

    def __init__(self, message: str, ingested: bool) -> None:
        self.ingested = ingested
        super().__init__(message + (" (the event was ingested)" if ingested else " (the event was not ingested)"))


class EngineError(PenstockError, RuntimeError):
    """The engine cannot be used as asked: after a fork, from inside its own functions, or out of memory."""


class InProgress(EngineError):
    """An event with this id is being scored just now; asked again a moment later, its decision is there (S16)."""


class LogError(PenstockError, RuntimeError):
    """The event log cannot be opened, read or written: in use, damaged, of a newer version, or the disk is full."""
