"""The HTTP server (control path): `serve(app)` loads an engine and answers until it is told to stop."""

from __future__ import annotations

from .lifecycle import serve

__all__ = ["serve"]
