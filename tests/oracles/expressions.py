"""Oracle of expressions: a tree-walking evaluator over Python values, None for null.

A tree is ("slot", name), ("literal", value), or (operator, operand, ...); `text` writes it as an expression, `evaluate`
gives (type, value) by the rules of penstock/expressions.py. An int64 past 64 bits is a Python float ("wide").
"""

import math
from datetime import UTC, datetime, timedelta

import numpy as np

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
PARTS = ("year", "month", "day", "hour", "minute", "second", "weekday")


def text(tree):
    """The expression's text, every operation in parentheses."""
    head, *rest = tree
    match head:
        case "slot":
            return rest[0]
        case "literal":
            return "null" if rest[0] is None else repr(rest[0])
        case "time":
            return repr((EPOCH + timedelta(microseconds=rest[0])).isoformat())
        case "neg":
            return f"(-({text(rest[0])}))"
        case "not":
            return f"(not {text(rest[0])})"
        case "is null" | "is not null":
            return f"({text(rest[0])} {head})"
        case "in" | "not in":
            return f"({text(rest[0])} {head} ({''.join(text(item) + ', ' for item in rest[1:])}))"
        case "abs" | "floor" | "ceil" | "log" | "exp" | "sqrt" | "min" | "max" | "coalesce":
            return f"{head}({', '.join(map(text, rest))})"
        case "chain":
            return f"({text(rest[0])} {rest[1]} {text(rest[2])} {rest[3]} {text(rest[4])})"
        case _ if head in PARTS:
            return f"{text(rest[0])}.{head}"
    return f"({text(rest[0])} {head} {text(rest[1])})"


def settle(kind, value):
    """A value as its type can hold it: NaN is null, an integer past int64 is rounded once."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return kind, None
    if kind == "int64" and isinstance(value, int) and not -(2**63) <= value < 2**63:
        return kind, float(value)
    return kind, value


def arithmetic(op, a, b):
    (a_kind, x), (b_kind, y) = a, b
    kind = "int64" if {a_kind, b_kind} <= {"int64", "timestamp"} and op != "/" else "float64"
    if x is None or y is None:
        return kind, None
    if kind == "float64" or isinstance(x, float) or isinstance(y, float):
        x, y = float(x), float(y)
    if op in ("/", "//", "%") and y == 0:
        return kind, None
    with np.errstate(all="ignore"):
        match op:
            case "+":
                return settle(kind, x + y)
            case "-":
                return settle(kind, x - y)
            case "*":
                return settle(kind, x * y)
            case "/":
                return settle(kind, x / y)
            case "//":
                return settle(kind, x // y)
    return settle(kind, x % y)


def compare(op, a, b):
    x, y = a[1], b[1]
    if x is None or y is None:
        return None
    if isinstance(x, str):
        x, y = x.encode(), y.encode()
    # Python compares int with float exactly.
    return {"==": x == y, "!=": x != y, "<": x < y, "<=": x <= y, ">": x > y, ">=": x >= y}[op]


def both(a, b):
    return False if a is False or b is False else None if a is None or b is None else True


def either(a, b):
    return True if a is True or b is True else None if a is None or b is None else False


def invert(a):
    return None if a is None else not a


def promoted(values):
    kinds = {kind for kind, _ in values}
    kind = "float64" if "float64" in kinds else values[0][0]
    return kind, [None if v is None else float(v) if kind == "float64" else v for _, v in values]


def evaluate(tree, row):
    """(type, value) of tree; row: name -> (type, value)."""
    head, *rest = tree
    if head == "slot":
        return settle(*row[rest[0]])
    if head == "literal":
        names = {bool: "bool", int: "int64", float: "float64", str: "string", type(None): "null"}
        return names[type(rest[0])], rest[0]
    if head == "time":
        return "timestamp", rest[0]
    if head == "chain":
        a, op, b, other, c = rest
        x, y, z = (evaluate(part, row) for part in (a, b, c))
        return "bool", both(compare(op, x, y), compare(other, y, z))
    values = [evaluate(part, row) for part in rest]
    (kind, x), *more = values
    match head:
        case "+" | "-" | "*" | "/" | "//" | "%":
            return arithmetic(head, *values)
        case "neg":
            return settle(kind, None if x is None else -x)
        case "abs":
            return settle(kind, None if x is None else abs(x))
        case "floor" | "ceil":
            if kind == "int64" or x is None:
                return kind, x
            return kind, float(np.floor(x) if head == "floor" else np.ceil(x))
        case "log":
            x = None if x is None else float(x)
            return "float64", None if x is None or x <= 0 else math.log(x)
        case "sqrt":
            x = None if x is None else float(x)
            return "float64", None if x is None or x < 0 else math.sqrt(x)
        case "exp":
            try:
                return "float64", None if x is None else math.exp(float(x))
            except OverflowError:
                return "float64", math.inf
        case "min" | "max":
            kind, numbers = promoted(values)
            if None in numbers:
                return kind, None
            best = numbers[0]
            for number in numbers[1:]:
                if (number < best) if head == "min" else (number > best):
                    best = number
            return kind, best
        case "coalesce":
            kind, numbers = promoted(values)
            return kind, next((number for number in numbers if number is not None), None)
        case "and":
            return "bool", both(x, more[0][1])
        case "or":
            return "bool", either(x, more[0][1])
        case "not":
            return "bool", invert(x)
        case "is null":
            return "bool", x is None
        case "is not null":
            return "bool", x is not None
        case "in" | "not in":
            found = False
            for other in more:
                found = either(found, compare("==", (kind, x), other))
            return "bool", found if head == "in" else invert(found)
        case _ if head in PARTS:
            if x is None:
                return "int64", None
            moment = EPOCH + timedelta(microseconds=x)
            return "int64", moment.weekday() if head == "weekday" else getattr(moment, head)
    return "bool", compare(head, *values)
