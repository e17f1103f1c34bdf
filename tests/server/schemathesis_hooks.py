"""Hooks of schemathesis (SCHEMATHESIS_HOOKS), for what the document cannot say.

JSON Schema calls 3.0 an integer, the server reads only 3 as one. And with Inference-Header-Content-Length: 0 a body is
one raw tensor, whatever JSON it may look like.
"""

from __future__ import annotations

from typing import Any

import schemathesis


def _integers(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, list):
        return [_integers(item) for item in value]
    if isinstance(value, dict):
        return {name: _integers(item) for name, item in value.items()}
    return value


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    if isinstance(case.body, dict | list):
        case.body = _integers(case.body)
    if case.media_type == "application/json" and case.headers:
        for name in [name for name in case.headers if name.lower() == "inference-header-content-length"]:
            if str(case.headers[name]).strip() == "0":
                del case.headers[name]
