"""Oracle of expressions: trees, their text, and the text's value by the package's slow evaluator, None for null.

A tree is ("slot", name), ("literal", value), or (operator, operand, ...); `text` writes it as an expression, `evaluate`
gives (type, value) by penstock/offline/exact_condition.py, which shares nothing with the compiler and its program. An
int64 past 64 bits is a Python float ("wide").
"""

import functools
from datetime import UTC, datetime, timedelta

from penstock.offline import exact_condition

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


@functools.lru_cache(10_000)
def parsed(source):
    return exact_condition.parsed(source)


def evaluate(tree, row):
    """(type, value) of tree; row: name -> (type, value)."""
    kinds = {name: kind for name, (kind, _) in row.items()}
    return exact_condition.walk(parsed(text(tree)), kinds, {name: value for name, (_, value) in row.items()})
