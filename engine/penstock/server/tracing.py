"""Traces of single requests, as Triton's clients set and read them (control path; off, it costs one comparison).

With trace_level TIMESTAMPS one inference in trace_rate leaves its times in the trace file, a JSON array that is whole
after every write. What must stay true: the loop never waits for the file, and only the operator says where it is.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any

__all__ = ["SettingError", "Tracing"]

DEFAULTS = {"trace_level": "OFF", "trace_rate": 1000, "trace_count": -1, "log_frequency": 0}
LEAST = {"trace_rate": 1, "trace_count": -1, "log_frequency": 0}
WAITING = 10_000  # traces that wait for the writer; more are dropped


class SettingError(ValueError):
    """A setting that is wrong, or right and not supported."""

    def __init__(self, message: str, unsupported: bool = False) -> None:
        super().__init__(message)
        self.unsupported = unsupported


class Tracing:
    """Settings of the server and of single models, and the writer of the file.

    `hook` is None while nothing is traced; else the server calls it with (model, version, request id, times) where
    times are (name, ns) pairs in order. on_change(hook) is called when it changes.
    """

    def __init__(self, file: str | os.PathLike[str] | None = None) -> None:
        self.file = None if file is None else os.fspath(file)
        self.on_change: Callable[[Any], object] = lambda hook: None
        self.written = 0
        self.dropped = 0
        self._own: dict[str, dict[str, Any]] = {"": dict(DEFAULTS)}  # by model; "": the server's
        self._seen: dict[str, int] = {}
        self._ids = 0
        self._queue: SimpleQueue[tuple[int, list[dict[str, Any]]] | None] = SimpleQueue()
        self._writer: threading.Thread | None = None

    def settings(self, model: str = "") -> dict[str, Any]:
        """As Triton writes them: the level in a list, numbers as text."""
        found = self._of(model)
        return {
            "trace_level": [found["trace_level"]],
            **{name: str(found[name]) for name in LEAST},
            "trace_file": self.file or "",
            "trace_mode": "triton",
        }

    def update(self, changes: Mapping[str, Any], model: str = "") -> dict[str, Any]:
        """Change what is named; None clears a setting. All or nothing. Raises SettingError."""
        checked = {name: self._checked(name, value) for name, value in changes.items()}
        own = self._own.setdefault(model, {})
        for name, value in checked.items():
            if value is not None:
                own[name] = value
            elif model:
                own.pop(name, None)
            else:
                own[name] = DEFAULTS[name]
        self._seen.clear()
        self.on_change(self.hook)
        return self.settings(model)

    @property
    def hook(self) -> Any:
        return self.record if any(own.get("trace_level") == "TIMESTAMPS" for own in self._own.values()) else None

    def record(self, model: str, version: str, request: str, times: list[tuple[str, int]]) -> None:
        """Called for every inference while something is traced; one in trace_rate is kept."""
        found = self._of(model)
        if found["trace_level"] == "OFF" or found["trace_count"] == 0:
            return
        seen = self._seen.get(model, 0)
        self._seen[model] = seen + 1
        if seen % found["trace_rate"]:
            return
        if self._queue.qsize() >= WAITING:
            self.dropped += 1
            return
        if found["trace_count"] > 0:
            owner = self._own[model if "trace_count" in self._own.get(model, {}) else ""]
            owner["trace_count"] -= 1
        self._ids += 1
        head: dict[str, Any] = {"id": self._ids, "model_name": model, "model_version": version}
        if request:
            head["request_id"] = request
        stamps = [{"name": name, "ns": ns} for name, ns in times]
        if self._writer is None:
            self._writer = threading.Thread(target=self._write, name="penstock-trace", daemon=True)
            self._writer.start()
        self._queue.put((found["log_frequency"], [head, {"id": self._ids, "timestamps": stamps}]))

    def close(self) -> None:
        """Write what waits, and end the writer."""
        if self._writer is not None:
            self._queue.put(None)
            self._writer.join()
            self._writer = None

    def _of(self, model: str) -> dict[str, Any]:
        return self._own[""] | self._own.get(model, {})

    def _checked(self, name: str, value: Any) -> Any:
        if name == "trace_level":
            level = value[0] if isinstance(value, list) and len(value) == 1 else value
            if level is None or level == "OFF":
                return level
            if level == "TIMESTAMPS":
                if self.file is None:
                    raise SettingError("trace_level: the server was started without a trace file", unsupported=True)
                return level
            if level in ("TENSORS", "MIN", "MAX") or isinstance(level, list):
                raise SettingError(f"trace_level: only OFF or TIMESTAMPS, got {value!r:.100}", unsupported=True)
            raise SettingError(f"trace_level: expected OFF or TIMESTAMPS, got {value!r:.100}")
        if name in LEAST:
            if value is None:
                return None
            number = value
            if (isinstance(value, float) and value.is_integer()) or (
                isinstance(value, str) and re.fullmatch("-?[0-9]{1,19}", value)
            ):
                number = int(value)
            if isinstance(number, bool) or not isinstance(number, int) or not LEAST[name] <= number < 2**63:
                raise SettingError(f"{name}: expected an integer from {LEAST[name]}, got {value!r:.100}")
            return number
        if name in ("trace_file", "trace_mode"):
            raise SettingError(f"{name}: only who starts the server sets it", unsupported=True)
        raise SettingError(f"{name[:100]!r}: no such trace setting (known: trace_level, {', '.join(LEAST)})")

    def _write(self) -> None:
        """The writer's thread: appends inside the closing bracket. log_frequency N begins a new file every N traces."""
        assert self.file is not None
        while (item := self._queue.get()) is not None:
            frequency, entries = item
            path = f"{self.file}.{self.written // frequency}" if frequency else self.file
            try:
                with open(path, "r+b" if os.path.exists(path) else "w+b") as stream:
                    end = stream.seek(0, os.SEEK_END)
                    text = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in entries).encode()
                    if end:
                        stream.seek(end - 1)
                    stream.write((b",\n" if end else b"[") + text + b"]")
            except OSError:
                self.dropped += 1
                continue
            self.written += 1
