"""Fingerprints (control path): one number for all that a decision depends on, the same for what means the same.

What must stay true: values are hashed by their names, and only where they differ from what they are without being
said, so that a field that a later version adds changes nothing; a function by what it does, not by how it is written
down: layout, comments, docstrings, annotations and its place in a file do not count, the constants and helpers that it
uses do.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from types import FunctionType, ModuleType
from typing import Any

import msgspec

__all__ = ["described", "described_function", "digest"]


def digest(value: Any) -> str:
    """16 hex digits of a value that JSON can hold; the order of a mapping's keys does not count."""
    return hashlib.blake2b(msgspec.json.encode(value, order="deterministic"), digest_size=8).hexdigest()


def described(value: Any) -> Any:
    """A definition as JSON holds it: a Struct as its fields that have not their default's value. The order of a mapping
    counts (arms are cut in it), so it is a list of pairs."""
    if isinstance(value, msgspec.Struct):
        return {
            field.name: described(getattr(value, field.name))
            for field in msgspec.structs.fields(value)
            if field.required or getattr(value, field.name) != field.default
        }
    if isinstance(value, Mapping):
        return [[key, described(item)] for key, item in value.items()]
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [described(item) for item in value]
    return value


def described_function(function: Any) -> Any:
    """What a Python function does: its syntax tree, and the values of the global and captured names that it reads;
    None where its source cannot be had."""
    return _function(function, {})


def _function(function: Any, seen: dict[int, int]) -> Any:
    function = getattr(function, "py_func", function)  # decorated with numba.njit
    if not isinstance(function, FunctionType):
        return None
    if id(function) in seen:
        return ["again", seen[id(function)]]
    seen[id(function)] = len(seen)
    try:
        tree = _definition(ast.parse(textwrap.dedent(inspect.getsource(function))))
    except (OSError, TypeError, SyntaxError):
        tree = None
    if tree is None:
        return None
    captured = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
    read = {}
    for name in sorted({node.id for part in tree for node in ast.walk(part) if isinstance(node, ast.Name)}):
        try:
            if name in captured:
                read[name] = _value(captured[name].cell_contents, seen)
            elif name in function.__globals__:
                read[name] = _value(function.__globals__[name], seen)
        except ValueError:  # a cell that is empty yet
            continue
    return {"does": [_syntax(part) for part in tree], "reads": read}


def _definition(module: ast.Module) -> list[ast.AST] | None:
    """The parts of a function's source that do something: arguments, then statements; of several lambdas in one
    statement all of it."""
    first = module.body[0] if module.body else None
    if isinstance(first, ast.FunctionDef):
        body = first.body[1:] if ast.get_docstring(first, clean=False) is not None else first.body
        return [first.args, *body]
    lambdas = [node for node in ast.walk(module) if isinstance(node, ast.Lambda)]
    if len(lambdas) == 1:
        return [lambdas[0].args, lambdas[0].body]
    return list(module.body) or None


def _syntax(node: Any) -> Any:
    """A syntax tree without places, annotations, and what is empty (of which each version of Python has more)."""
    if isinstance(node, ast.AST):
        skipped = ("annotation", "returns", "type_comment", "kind", "ctx", "decorator_list")
        fields = {name: _syntax(item) for name, item in ast.iter_fields(node) if name not in skipped}
        return [type(node).__name__, {name: item for name, item in fields.items() if item not in (None, [])}]
    if isinstance(node, list):
        return [_syntax(item) for item in node]
    return _value(node, {})


def _value(value: Any, seen: dict[int, int]) -> Any:
    """A constant by type and value, a function by what it does, anything else by its name."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (tuple, list, set, frozenset)):
        items = [_value(item, seen) for item in value]
        return [type(value).__name__, items if isinstance(value, (tuple, list)) else sorted(items, key=repr)]
    if isinstance(value, dict):
        return ["dict", [[_value(key, seen), _value(item, seen)] for key, item in value.items()]]
    if isinstance(getattr(value, "py_func", value), FunctionType):
        return _function(value, seen) or f"function {value.__name__}"
    if isinstance(value, ModuleType):
        return f"module {value.__name__}"
    if isinstance(value, float):
        return ["float", value.hex()]
    if isinstance(value, (int, complex, bytes)):
        return [type(value).__name__, repr(value)]
    if value is Ellipsis:
        return "..."
    kind = value if isinstance(value, type) else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"
