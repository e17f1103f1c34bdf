"""What the server says on stderr beside its start and stop, and Triton's settings of it (control path)."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from .tracing import SettingError

__all__ = ["ServerLog"]

SWITCHES = ("log_info", "log_warning", "log_error")
FORMATS = ("default", "ISO8601")


class ServerLog:
    """Lines of three levels, each of which can be switched off; formats "default" and "ISO8601" (with the time)."""

    def __init__(self) -> None:
        self._set: dict[str, Any] = {**dict.fromkeys(SWITCHES, True), "log_format": "default"}

    def say(self, level: str, text: str) -> None:
        """level: "info", "warning" or "error"."""
        if not self._set["log_" + level]:
            return
        line = f"penstock: {text}" if level == "info" else f"penstock: {level}: {text}"
        if self._set["log_format"] == "ISO8601":
            line = f"{datetime.now(UTC).isoformat(timespec='milliseconds')} {line}"
        print(line, file=sys.stderr, flush=True)

    def fault(self, error: BaseException) -> None:
        """A fault of ours, with where it happened."""
        self.say("error", "".join(traceback.format_exception(error)).rstrip())

    def settings(self) -> dict[str, Any]:
        return {"log_file": "", **self._set, "log_verbose_level": 0}

    def update(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Change what is named; None leaves a setting. All or nothing. Raises SettingError."""
        for name, value in changes.items():
            if name in SWITCHES:
                if not isinstance(value, bool | None):
                    raise SettingError(f"{name}: expected true or false, got {value!r:.100}")
            elif name == "log_format":
                if value is not None and value not in FORMATS:
                    raise SettingError(f"log_format: expected {' or '.join(FORMATS)}, got {value!r:.100}")
            elif name == "log_verbose_level":
                if value not in (0, None) or isinstance(value, bool):
                    raise SettingError(f"log_verbose_level: only 0, got {value!r:.100}", unsupported=True)
            elif name == "log_file":
                if value not in ("", None):
                    raise SettingError("log_file: only who starts the server says where its stderr goes", True)
            else:
                known = ", ".join(self.settings())
                raise SettingError(f"{name[:100]!r}: no such log setting (known: {known})")
        self._set.update((name, value) for name, value in changes.items() if name in self._set and value is not None)
        return self.settings()
