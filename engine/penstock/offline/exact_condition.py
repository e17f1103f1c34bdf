"""`where=` conditions, evaluated slowly (control path): a walk over Python's own syntax tree, None for unknown.

The grammar and what it means are told at the head of penstock/expressions.py; a text that comes here has been compiled
there, so that it is known to be right. What must stay true: nothing of the compiler or its program is used here.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from datetime import date, timedelta
from typing import Any

from ..timestamp import Timestamp

__all__ = ["condition", "evaluate"]

Typed = tuple[str, Any]  # the static type and the value; an int64 past 64 bits is a float

DAY = 86400 * 10**6
CYCLE = 146097  # days in which the calendar repeats itself: 400 years
OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%"}
ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
}
COMPARISON: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def condition(text: str, types: Mapping[str, str]) -> Callable[[Mapping[str, Any]], bool | None]:
    """A function of a row (field -> value) that tells whether the condition holds, None where that is unknown."""
    tree = parsed(text)

    def holds(row: Mapping[str, Any]) -> bool | None:
        value: bool | None = walk(tree, types, row)[1]
        return value

    return holds


def evaluate(text: str, types: Mapping[str, str], row: Mapping[str, Any]) -> Any:
    """The value of any expression over one row."""
    return walk(parsed(text), types, row)[1]


def parsed(text: str) -> ast.expr:
    # One expression may stand on several lines: in brackets they may end anywhere.
    return ast.parse(f"({text.strip()})", mode="eval").body


def settled(kind: str, value: Any) -> Typed:
    """A value as its type holds it: NaN is null, and an integer past 64 bits is rounded once."""
    if isinstance(value, float) and math.isnan(value):
        return kind, None
    if kind == "int64" and isinstance(value, int) and not -(2**63) <= value < 2**63:
        return kind, float(value)
    return kind, value


def walk(node: ast.expr, types: Mapping[str, str], row: Mapping[str, Any]) -> Typed:
    def typed(part: ast.expr) -> Typed:
        return walk(part, types, row)

    match node:
        case ast.Constant(value=value):
            names = {type(None): "null", bool: "bool", int: "int64", float: "float64", str: "string"}
            return names[type(value)], value
        case ast.Name() | ast.Attribute():
            return named(dotted(node), types, row)
        case ast.UnaryOp(op=ast.Not()):
            value = typed(node.operand)[1]
            return "bool", None if value is None else not value
        case ast.UnaryOp(op=ast.UAdd()):
            return typed(node.operand)
        case ast.UnaryOp(op=ast.USub()):
            kind, value = typed(node.operand)
            return settled(kind, None if value is None else -value)
        case ast.BinOp():
            return arithmetic(OPERATORS[type(node.op)], typed(node.left), typed(node.right))
        case ast.BoolOp():
            values = [typed(part)[1] for part in node.values]
            return "bool", all_of(values) if isinstance(node.op, ast.And) else any_of(values)
        case ast.Compare():
            found = []
            left = node.left
            for op, right in zip(node.ops, node.comparators):
                found.append(compared(op, left, right, typed))
                left = right
            return "bool", all_of(found)
        case ast.Call(func=ast.Name(id=name)):
            return called(name, [typed(part) for part in node.args])
    raise AssertionError(f"not an expression of where=: {ast.dump(node)}")


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    assert isinstance(node, ast.Name)
    return node.id


def named(name: str, types: Mapping[str, str], row: Mapping[str, Any]) -> Typed:
    if name in types:
        return settled(types[name], row[name])
    if name in ("true", "false", "null"):
        return ("null", None) if name == "null" else ("bool", name == "true")
    base, _, part = name.rpartition(".")
    value = row[base]
    return "int64", None if value is None else calendar(part, value)


def calendar(part: str, time: int) -> int:
    """A part of a moment in UTC, of any year."""
    days, within = divmod(time, DAY)
    cycles, days = divmod(days, CYCLE)
    day = date(1970, 1, 1) + timedelta(days=days)
    seconds = within // 10**6
    parts = {
        "year": day.year + 400 * cycles,
        "month": day.month,
        "day": day.day,
        "hour": seconds // 3600,
        "minute": seconds // 60 % 60,
        "second": seconds % 60,
        "weekday": day.weekday(),  # a cycle has 20,871 whole weeks
    }
    return parts[part]


def all_of(values: list[bool | None]) -> bool | None:
    return False if False in values else None if None in values else True


def any_of(values: list[bool | None]) -> bool | None:
    return True if True in values else None if None in values else False


def arithmetic(symbol: str, left: Typed, right: Typed) -> Typed:
    (a_kind, a), (b_kind, b) = left, right
    whole = symbol != "/" and {a_kind, b_kind} <= {"int64", "timestamp"}
    kind = "int64" if whole else "float64"
    if a is None or b is None:
        return kind, None
    if not whole or isinstance(a, float) or isinstance(b, float):
        a, b = float(a), float(b)
    if symbol in ("/", "//", "%") and b == 0:
        return kind, None
    return settled(kind, ARITHMETIC[symbol](a, b))


def compared(op: ast.cmpop, left: ast.expr, right: ast.expr, typed: Callable[[ast.expr], Typed]) -> bool | None:
    value = typed(left)
    if isinstance(op, ast.Is | ast.IsNot):
        return (value[1] is None) == isinstance(op, ast.Is)
    if isinstance(op, ast.In | ast.NotIn):
        items = right.elts if isinstance(right, ast.Tuple | ast.List) else [right]
        found = any_of([holds(ast.Eq, value, typed(item)) for item in items])
        return found if isinstance(op, ast.In) or found is None else not found
    return holds(type(op), value, typed(right))


def holds(op: type[ast.cmpop], left: Typed, right: Typed) -> bool | None:
    """A comparison; Python compares an integer with a float exactly."""
    (a_kind, a), (b_kind, b) = left, right
    if a is None or b is None:
        return None
    if a_kind == "timestamp" and isinstance(b, str):
        b = int(Timestamp.parse(b))
    elif b_kind == "timestamp" and isinstance(a, str):
        a = int(Timestamp.parse(a))
    if isinstance(a, str) and isinstance(b, str):
        return COMPARISON[op](a.encode(), b.encode())
    return COMPARISON[op](a, b)


def called(name: str, arguments: list[Typed]) -> Typed:
    if name in ("min", "max", "coalesce"):
        arguments = [argument for argument in arguments if argument[0] != "null"]
        kinds = [kind for kind, _ in arguments]
        kind = "float64" if "float64" in kinds else kinds[0]
        values = [float(v) if v is not None and kind == "float64" else v for _, v in arguments]
        if name == "coalesce":
            return kind, next((v for v in values if v is not None), None)
        if None in values:
            return kind, None
        return kind, (min if name == "min" else max)(values)
    ((kind, x),) = arguments
    if name in ("log", "exp", "sqrt"):
        return "float64", None if x is None else transcendental(name, float(x))
    if x is None or (name != "abs" and kind == "int64"):
        return kind, x
    if name == "abs":
        return settled(kind, abs(x))
    if math.isinf(x):
        return kind, x
    return kind, math.copysign(float(math.floor(x) if name == "floor" else math.ceil(x)), x)


def transcendental(name: str, x: float) -> float | None:
    if name == "exp":
        try:
            return math.exp(x)
        except OverflowError:
            return math.inf
    if name == "log":
        return math.log(x) if x > 0 else None
    return math.sqrt(x) if x >= 0 else None
