"""Expressions of rules and `where=`: text -> typed tree -> native program (control path).

The text is parsed with Python's own grammar, then only what is listed here is accepted; everything else is refused by
name, with its column. Types are settled here once, so that the program has none to decide on. Unknown (null) is carried
as in SQL.

What it means:
    names         slots of the row, with dots: `spend.count_1d`; of a timestamp also .year .month .day .hour .minute
                  .second .weekday (Monday 0), UTC
    literals      1, 2.5, "text", true, false, null; a timestamp is compared with "2018-07-25T00:00:00Z"
    arithmetic    + - * / // %, unary -: null in, null out; / is float64; // and % floor as in Python; x / 0 is null;
                  int64 is exact, past it the exact result is rounded once to float64 (S13); timestamp - timestamp is
                  int64 microseconds
    comparisons   == != < <= > >=, chained; int64 with float64 exactly; strings by UTF-8 bytes; in, not in (a list);
                  is null, is not null
    conditions    and, or, not, Kleene's
    functions     abs, min, max, floor, ceil, log, exp, sqrt, coalesce
A NaN is null. min and max of anything null are null; log(x <= 0) and sqrt(x < 0) are null.
"""

from __future__ import annotations

import ast
import difflib
import io
import math
import re
import struct
import tokenize
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import msgspec
import numpy as np

from ._ext.expressions import MAX_REGISTERS, OPCODES, Program
from .timestamp import Timestamp

__all__ = ["CompiledExpression", "ExpressionError", "compile_expression"]

MAX_LENGTH = 100_000  # characters; Python's parser is not made for more

_TYPES = ("float64", "int64", "bool", "timestamp", "string")
_LETTER = {"float64": "F", "int64": "I", "timestamp": "I", "bool": "B", "string": "S"}
_PARTS = ("year", "month", "day", "hour", "minute", "second", "weekday")
_ARITHMETIC = {
    ast.Add: "ADD",
    ast.Sub: "SUB",
    ast.Mult: "MUL",
    ast.Div: "DIV",
    ast.FloorDiv: "FLOORDIV",
    ast.Mod: "MOD",
}
_SYMBOL = {"ADD": "+", "SUB": "-", "MUL": "*", "DIV": "/", "FLOORDIV": "//", "MOD": "%"}
_COMPARISON = {ast.Eq: "EQ", ast.NotEq: "NE", ast.Lt: "LT", ast.LtE: "LE", ast.Gt: "GT", ast.GtE: "GE"}
_MIRRORED = {"EQ": "EQ", "NE": "NE", "LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}
_FUNCTIONS = ("abs", "ceil", "coalesce", "exp", "floor", "log", "max", "min", "sqrt")
_REFUSED = {
    ast.Pow: "** is not supported",
    ast.BitAnd: "& is not supported: write `and`",
    ast.BitOr: "| is not supported: write `or`",
    ast.BitXor: "^ is not supported",
    ast.Invert: "~ is not supported: write `not`",
    ast.MatMult: "@ is not supported",
    ast.LShift: "<< is not supported",
    ast.RShift: ">> is not supported",
    ast.IfExp: "if/else is not supported",
    ast.Lambda: "lambda is not supported",
    ast.NamedExpr: ":= is not supported: compare with ==",
    ast.Subscript: "[...] after a value is not supported",
    ast.JoinedStr: "f-strings are not supported",
    ast.Dict: "{...} is not supported",
    ast.Set: "{...} is not supported: a list is written (1, 2)",
    ast.Starred: "* before a value is not supported",
    ast.Tuple: "a list stands only after `in`",
    ast.List: "a list stands only after `in`",
    ast.Await: "await is not supported",
}


# Line ends keep their place as blanks: one expression may stand on several lines.
_BLANKS = {10: " ", 13: " ", 9: " ", 12: " "}
_STRING = re.compile(r""" "(?:[^"\\]|\\.)*" | '(?:[^'\\]|\\.)*' """, re.VERBOSE | re.DOTALL)


class ExpressionError(ValueError):
    """A wrong expression: `{where}: what is wrong at column N`. `column` counts characters from 1; None: no place."""

    def __init__(self, where: str, problem: str, column: int | None = None, hint: str = "") -> None:
        self.column = column
        at = f" at column {column}" if column is not None else ""
        super().__init__(f"{where}: {problem}{at}{hint}")


class CompiledExpression(msgspec.Struct, frozen=True):
    """An expression ready to run: its native program, the type of its value, and the slots it reads, in order."""

    text: str
    program: Program
    type: str
    names: tuple[str, ...]


class _Node(msgspec.Struct):
    """A typed tree. op: const, slot, an opcode without its suffix, or and/or/not/in. type "null": the bare literal."""

    op: str
    type: str
    column: int
    args: tuple[_Node, ...] = ()
    value: Any = None  # const: None is null; a float where the type is int64 is a wide integer. slot: its index


def compile_expression(
    text: str, slots: Mapping[str, tuple[int, str]], where: str = "expression"
) -> CompiledExpression:
    """Compile text over named slots: name -> (index in the row, type).

    where: what the text belongs to (`rule "burst"`), the start of every error. Raises ExpressionError.
    """
    return _Compiler(text, slots, where).compile()


class _Compiler:
    def __init__(self, text: str, slots: Mapping[str, tuple[int, str]], where: str) -> None:
        self.text = text
        self.slots = slots
        self.where = where
        self.names: dict[str, None] = {}

    def error(self, problem: str, column: int | None = None, hint: str = "") -> NoReturn:
        raise ExpressionError(self.where, problem, column, hint)

    def compile(self) -> CompiledExpression:
        if not isinstance(self.text, str):
            self.error(f"expected an expression as text, got {self.text!r}")
        if not self.text.strip():
            self.error("the expression is empty")
        if len(self.text) > MAX_LENGTH:
            self.error(f"the expression has {len(self.text)} characters, at most {MAX_LENGTH}")
        try:
            node = self.value(self.parse())
            if node.type == "null":
                self.error("null alone has no type", node.column)
            if node.type == "string":
                self.error("the value is a string; expected a condition or a number", node.column)
            program = _emit(self, node)
        except RecursionError:
            self.error("too deeply nested")
        return CompiledExpression(self.text, program, node.type, tuple(self.names))

    # ---- text -> ast ----

    def parse(self) -> ast.expr:
        line = _STRING.sub(self.string, self.text.translate(_BLANKS))
        start = len(line) - len(line.lstrip())
        self.line, self.start = line[start:], start
        try:
            tree = ast.parse(self.line, mode="eval")
            for token in tokenize.generate_tokens(io.StringIO(self.line).readline):
                if token.type == tokenize.COMMENT:
                    self.error("# is not supported: an expression has no comments", start + token.start[1] + 1)
        except SyntaxError as error:
            end = len(self.line.rstrip()) + 1
            self.error(self.syntax_problem(error), start + (error.offset or end))
        except (ValueError, MemoryError, tokenize.TokenError) as error:
            if isinstance(error, ExpressionError):
                raise
            self.error("too deeply nested" if isinstance(error, MemoryError) else f"cannot be parsed: {error}")
        return tree.body

    def string(self, match: re.Match[str]) -> str:
        """A string as it was written: what is a blank between words is itself in a string."""
        written = self.text[match.start() : match.end()]
        for end in "\n\r":
            if end in written:
                self.error("a line ends within a string: write \\n", match.start() + written.index(end) + 1)
        return written

    def syntax_problem(self, error: SyntaxError) -> str:
        message = error.msg or ""
        at = (error.offset or 0) - 1
        if "==" in message or self.line[at : at + 1] == "=":
            return "= does not compare: write =="
        return f"cannot be parsed: {message.removeprefix('invalid syntax. ')}"

    def column(self, node: ast.AST) -> int:
        # ast counts UTF-8 bytes.
        offset: int = getattr(node, "col_offset", 0)
        return self.start + len(self.line.encode()[:offset].decode(errors="ignore")) + 1

    # ---- ast -> typed tree ----

    def value(self, node: ast.expr) -> _Node:
        return _fold(self, self.typed(node))

    def typed(self, node: ast.expr) -> _Node:
        column = self.column(node)
        match node:
            case ast.Constant():
                return self.literal(node.value, column)
            case ast.Name() | ast.Attribute():
                return self.name(node, column)
            case ast.UnaryOp(op=ast.Not()):
                return _Node("NOT", "bool", column, (self.condition(node.operand, "not"),))
            case ast.UnaryOp(op=ast.USub()):
                return self.negative(node, column)
            case ast.UnaryOp(op=ast.UAdd()):
                return self.number(self.value(node.operand), "+")
            case ast.BinOp(op=op) if type(op) in _ARITHMETIC:
                return self.arithmetic(_ARITHMETIC[type(op)], self.value(node.left), self.value(node.right), column)
            case ast.BoolOp():
                word = "and" if isinstance(node.op, ast.And) else "or"
                return _Node(word, "bool", column, tuple(self.condition(part, word) for part in node.values))
            case ast.Compare():
                return self.comparisons(node, column)
            case ast.Call():
                return self.call(node, column)
            case ast.UnaryOp() | ast.BinOp():
                self.error(_REFUSED.get(type(node.op), f"{type(node.op).__name__} is not supported"), column)
        self.error(_REFUSED.get(type(node), f"{type(node).__name__} is not supported"), column)

    def literal(self, value: Any, column: int) -> _Node:
        if value is None:
            return _Node("const", "null", column)
        if isinstance(value, bool):
            return _Node("const", "bool", column, value=value)
        if isinstance(value, int):
            if not -(2**63) <= value < 2**63:
                self.error(f"{value} does not fit in 64 bits", column)
            return _Node("const", "int64", column, value=value)
        if isinstance(value, float):
            if not math.isfinite(value):
                self.error("the number does not fit in a float64", column)
            return _Node("const", "float64", column, value=value)
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                self.error("the text is not valid Unicode", column)
            return _Node("const", "string", column, value=value)
        self.error(f"a {type(value).__name__} literal is not supported", column)

    def negative(self, node: ast.UnaryOp, column: int) -> _Node:
        operand = node.operand
        if isinstance(operand, ast.Constant) and type(operand.value) is int:
            return self.literal(-operand.value, column)  # -9223372036854775808 is one literal
        value = self.number(self.value(operand), "-")
        return _Node("NEG", value.type, column, (value,))

    def name(self, node: ast.Name | ast.Attribute, column: int) -> _Node:
        parts: list[str] = []
        inner: ast.expr = node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if not isinstance(inner, ast.Name):
            self.error(f".{parts[-1]} stands after a value, not after a name", column)
        parts.append(inner.id)
        name = ".".join(reversed(parts))
        if name in self.slots:
            return self.slot(name, column)
        if name in ("true", "false", "null"):
            return _Node(
                "const", "null" if name == "null" else "bool", column, value={"true": True, "false": False}.get(name)
            )
        base = name.rpartition(".")[0]
        if base in self.slots:
            if self.slots[base][1] != "timestamp":
                self.error(f"{base} is {self.slots[base][1]} and has no .{parts[0]}", column)
            if parts[0] not in _PARTS:
                self.error(f"a timestamp has no .{parts[0]}", column, f"; it has {', '.join('.' + p for p in _PARTS)}")
            return _Node(parts[0].upper(), "int64", column, (self.slot(base, column),))
        near = difflib.get_close_matches(name, self.slots, 1)
        self.error(f"unknown name {name}", column, f"; did you mean {near[0]}?" if near else "")

    def slot(self, name: str, column: int) -> _Node:
        index, kind = self.slots[name]
        if kind not in _TYPES:
            self.error(f"{name} is {kind}, which an expression cannot read", column)
        self.names[name] = None
        return _Node("slot", kind, column, value=index)

    def condition(self, node: ast.expr, word: str) -> _Node:
        value = self.value(node)
        if value.type == "null":
            return _Node("const", "bool", value.column)
        if value.type != "bool":
            self.error(f"`{word}` takes conditions, got {_described(value)}", value.column)
        return value

    def number(self, value: _Node, symbol: str) -> _Node:
        if value.type not in ("int64", "float64"):
            self.error(f"{symbol} takes numbers, got {_described(value)}", value.column)
        return value

    def arithmetic(self, op: str, left: _Node, right: _Node, column: int) -> _Node:
        if op == "SUB" and left.type == right.type == "timestamp":
            return _Node("SUB", "int64", column, (left, right))
        self.number(left, _SYMBOL[op])
        self.number(right, _SYMBOL[op])
        if op != "DIV" and left.type == right.type == "int64":
            return _Node(op, "int64", column, (left, right))
        return _Node(op, "float64", column, (_as_float(left), _as_float(right)))

    def comparisons(self, node: ast.Compare, column: int) -> _Node:
        parts: list[_Node] = []
        left = node.left
        for op, right in zip(node.ops, node.comparators):
            parts.append(_fold(self, self.comparison(op, left, right)))
            left = right
        return parts[0] if len(parts) == 1 else _Node("and", "bool", column, tuple(parts))

    def comparison(self, op: ast.cmpop, left: ast.expr, right: ast.expr) -> _Node:
        column = self.column(left)
        if isinstance(op, ast.Is | ast.IsNot):
            if not _is_null(right):
                self.error("`is` is only for `is null` and `is not null`", self.column(right))
            value = self.value(left)
            if value.type == "null":
                self.error("null alone has no type", column)
            node = _Node("IS_NULL", "bool", column, (value,))
            return node if isinstance(op, ast.Is) else _Node("NOT", "bool", column, (_fold(self, node),))
        if isinstance(op, ast.In | ast.NotIn):
            node = _fold(self, self.membership(left, right))
            return node if isinstance(op, ast.In) else _Node("NOT", "bool", column, (node,))
        if _is_null(left) or _is_null(right):
            self.error("a comparison with null is always unknown: write `is null`", column)
        return self.compare(_COMPARISON[type(op)], self.value(left), self.value(right), column)

    def compare(self, op: str, left: _Node, right: _Node, column: int) -> _Node:
        left, right = self.timestamps(left, right)
        types = {left.type, right.type}
        if "null" in types:  # an element of a list
            return _Node("const", "bool", column)
        if types <= {"int64", "float64"}:
            if len(types) == 2:
                return _mixed(op, left, right, column)
        elif len(types) == 2:
            self.error(f"cannot compare {_described(left)} with {_described(right)}", column)
        elif types == {"bool"} and op not in ("EQ", "NE"):
            self.error("conditions are compared with == and !=", column)
        if left.op == "const" and right.op != "const":
            left, right, op = right, left, _MIRRORED[op]
        return _Node(op, "bool", column, (left, right))

    def timestamps(self, left: _Node, right: _Node) -> tuple[_Node, _Node]:
        """A text literal beside a timestamp becomes one."""
        if left.type == "timestamp" and right.type == "string" and right.op == "const":
            return left, self.timestamp(right)
        if right.type == "timestamp" and left.type == "string" and left.op == "const":
            return self.timestamp(left), right
        return left, right

    def timestamp(self, node: _Node) -> _Node:
        try:
            return _Node("const", "timestamp", node.column, value=int(Timestamp.parse(node.value)))
        except (ValueError, OverflowError) as error:
            self.error(str(error), node.column)

    def membership(self, left: ast.expr, right: ast.expr) -> _Node:
        column = self.column(left)
        if isinstance(right, ast.Tuple | ast.List):
            elements = right.elts
        elif isinstance(right, ast.Constant) or (isinstance(right, ast.UnaryOp) and isinstance(right.op, ast.USub)):
            elements = [right]  # `x in (1)`: the parentheses leave no trace
        else:
            self.error("`in` takes a list, such as (1, 2)", self.column(right))
        if not elements:
            self.error("the list after `in` is empty", self.column(right))
        value = self.value(left)
        if value.type == "null":
            self.error("null alone has no type", column)
        nulls, literals, others = False, [], []
        for element in elements:
            item = self.timestamps(value, self.value(element))[1]
            if value.type == "float64" and item.type == "int64" and item.op == "const" and _is_float(item.value):
                item = _as_float(item)
            if item.type == "null" or (item.op == "const" and item.value is None):
                nulls = True
            elif (
                item.op == "const"
                and item.type == value.type
                and not (value.type == "int64" and type(item.value) is float)
            ):
                literals.append(item)
            else:
                others.append(self.compare("EQ", value, item, item.column))
        # As in SQL: true if one is equal; else unknown if one is null.
        parts = [_fold(self, part) for part in others]
        if len(literals) > 2 and value.type != "bool":
            parts.insert(0, _Node("in", "bool", column, (value, *literals)))
        else:
            parts[:0] = [self.compare("EQ", value, item, item.column) for item in literals]
        if nulls:
            parts.append(_Node("const", "bool", column))
        return parts[0] if len(parts) == 1 else _Node("or", "bool", column, tuple(parts))

    def call(self, node: ast.Call, column: int) -> _Node:
        name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
        if name not in _FUNCTIONS:
            near = difflib.get_close_matches(name, _FUNCTIONS, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(_FUNCTIONS)}"
            self.error(f"unknown function {name}", column, hint)
        if node.keywords:
            self.error(f"{name} takes no named arguments", column)
        args = [self.value(arg) for arg in node.args]
        if name == "coalesce":
            return self.coalesce(args, column)
        if name in ("min", "max"):
            return self.extreme(name, args, column)
        if len(args) != 1:
            self.error(f"{name} takes one argument, got {len(args)}", column)
        value = self.number(args[0], name)
        if name in ("log", "exp", "sqrt"):
            return _Node(name.upper(), "float64", column, (_as_float(value),))
        if value.type == "int64" and name in ("floor", "ceil"):
            return value
        return _Node(name.upper(), value.type, column, (value,))

    def extreme(self, name: str, args: list[_Node], column: int) -> _Node:
        if len(args) < 2:
            self.error(f"{name} takes two arguments or more, got {len(args)}", column)
        for arg in args:
            self.number(arg, name)
        if any(arg.type == "float64" for arg in args):
            args = [_as_float(arg) for arg in args]
        node = args[0]
        for arg in args[1:]:
            node = _Node(name.upper(), node.type, column, (node, arg))
        return node

    def coalesce(self, args: list[_Node], column: int) -> _Node:
        args = [arg for arg in args if arg.type != "null"] if len(args) > 1 else args
        if not args or any(arg.type == "null" for arg in args):
            self.error("coalesce takes two values or more, the first that is not null is taken", column)
        kinds = {arg.type for arg in args}
        if kinds == {"int64", "float64"}:
            args = [_as_float(arg) for arg in args]
        elif len(kinds) > 1:
            self.error(f"coalesce of {' and '.join(sorted(kinds))}: the types differ", column)
        node = args[0]
        for arg in args[1:]:
            node = _Node("COALESCE", node.type, column, (node, arg))
        return node


def _is_null(node: ast.expr) -> bool:
    return (isinstance(node, ast.Constant) and node.value is None) or (isinstance(node, ast.Name) and node.id == "null")


def _described(node: _Node) -> str:
    if node.op == "const" and node.value is not None:
        shown = {True: "true", False: "false"}[node.value] if node.type == "bool" else repr(node.value)
        return f"{node.type} {shown}"
    return "null" if node.type == "null" else f"{node.type}"


def _is_float(value: int | float | None) -> bool:
    """Whether a literal of type int64 is a float64 too, exactly."""
    return value is None or float(value) == value


def _as_float(node: _Node) -> _Node:
    if node.type == "float64":
        return node
    if node.op == "const":
        return _Node("const", "float64", node.column, value=None if node.value is None else float(node.value))
    return _Node("I_TO_F", "float64", node.column, (node,))


def _mixed(op: str, left: _Node, right: _Node, column: int) -> _Node:
    """int64 with float64, compared exactly: as floats where the integer is a literal that is one."""
    if left.type == "float64":
        left, right, op = right, left, _MIRRORED[op]
    if left.op == "const" and _is_float(left.value):
        return _Node(_MIRRORED[op], "bool", column, (right, _as_float(left)))
    return _Node(op + "_IF", "bool", column, (left, right))


def _fold(compiler: _Compiler, node: _Node) -> _Node:
    """A tree of literals becomes the literal that the native program gives for it: one arithmetic, not two."""
    if node.op in ("const", "slot") or node.type == "string" or any(arg.op != "const" for arg in node.args):
        return node
    slots, status = _emit(compiler, node).evaluate(np.zeros((1, 0), np.uint64), np.zeros((1, 0), np.uint8))
    value: Any
    if status[0] & 0x7F != 1:
        value = None
    elif node.type == "float64" or status[0] & 0x80:
        value = float(slots.view(np.float64)[0])
    elif node.type == "bool":
        value = bool(slots[0])
    else:
        value = int(slots.view(np.int64)[0])
    return _Node("const", node.type, node.column, value=value)


# ---- typed tree -> program ----


def _bits(value: float | int) -> int:
    packed = struct.pack("<d", value) if isinstance(value, float) else struct.pack("<q", value)
    return int.from_bytes(packed, "little")


class _Emitter:
    """Instructions in evaluation order. A node's value goes to register `at`; its operands use `at` and above."""

    def __init__(self, compiler: _Compiler) -> None:
        self.compiler = compiler
        self.code: list[tuple[int, int, int, int, int]] = []
        self.text = bytearray()
        self.floats: list[float] = []
        self.ints: list[int] = []
        self.strings: list[tuple[int, int]] = []

    def add(self, op: str, dst: int, a: int = 0, b: int = 0, k: int = 0) -> None:
        self.code.append((OPCODES[op], dst, a, b, k))

    def string(self, value: str) -> tuple[int, int]:
        data = value.encode()
        at = len(self.text)
        self.text += data
        return at, len(data)

    def emit(self, node: _Node, at: int) -> None:
        if at >= MAX_REGISTERS:
            self.compiler.error("too deeply nested", node.column)
        special: Callable[[_Node, int], None] | None = {
            "const": self.constant,
            "slot": self.load,
            "and": self.logic,
            "or": self.logic,
            "in": self.member,
        }.get(node.op)
        if special is not None:
            special(node, at)
        elif node.op in _MIRRORED:
            self.compare(node, at)
        elif node.op == "COALESCE":
            self.binary(f"COALESCE_{_LETTER[node.type]}", node, at)
        elif node.op == "IS_NULL":
            self.unary(f"IS_NULL_{_LETTER[node.args[0].type]}", node, at)
        elif node.op.endswith("_IF"):
            self.binary(f"{node.op}_RR", node, at)
        elif len(node.args) == 2:
            self.binary(f"{node.op}_{_LETTER[node.type]}", node, at)
        elif node.op in ("NOT", "I_TO_F") or node.op.lower() in _PARTS:
            self.unary(node.op, node, at)
        else:
            self.unary(f"{node.op}_{_LETTER[node.type]}", node, at)

    def unary(self, op: str, node: _Node, at: int) -> None:
        self.emit(node.args[0], at)
        self.add(op, at, at)

    def binary(self, op: str, node: _Node, at: int) -> None:
        self.emit(node.args[0], at)
        self.emit(node.args[1], at + 1)
        self.add(op, at, at, at + 1)

    def load(self, node: _Node, at: int) -> None:
        self.add(f"LOAD_{_LETTER[node.type]}", at, node.value)

    def constant(self, node: _Node, at: int) -> None:
        value = node.value
        if node.type == "float64":
            self.add("CONST_F", at, k=_bits(math.nan if value is None else value))
        elif node.type == "bool":
            self.add("CONST_B", at, k=1 if value is None else 2 * value)
        elif node.type == "string":
            offset, length = self.string(value)
            self.add("CONST_S", at, k=offset | length << 32)
        elif value is None:
            self.add("CONST_I", at, 2)
        else:
            self.add("CONST_I", at, 1 if isinstance(value, float) else 0, k=_bits(value))

    def compare(self, node: _Node, at: int) -> None:
        left, right = node.args
        letter = _LETTER[left.type]
        fusable = right.op == "const" and right.value is not None and letter != "B"
        if not fusable or (letter == "I" and isinstance(right.value, float)):
            self.binary(f"{node.op}_B" if letter == "B" else f"{node.op}_{letter}_RR", node, at)
            return
        if letter == "S":
            offset, length = self.string(right.value)
            k = offset | length << 32
        else:
            k = _bits(right.value)
        if left.op == "slot":
            self.add(f"{node.op}_{letter}_SK", at, left.value, k=k)
        else:
            self.emit(left, at)
            self.add(f"{node.op}_{letter}_RK", at, at, k=k)

    def logic(self, node: _Node, at: int) -> None:
        jump, combine = ("JUMP_FALSE", "AND") if node.op == "and" else ("JUMP_TRUE", "OR")
        jumps = []
        self.emit(node.args[0], at)
        for part in node.args[1:]:
            jumps.append(len(self.code))
            self.add(jump, at, at)
            self.emit(part, at + 1)
            self.add(combine, at, at, at + 1)
        for index in jumps:
            op, dst, a, b, _ = self.code[index]
            self.code[index] = (op, dst, a, b, len(self.code))

    def member(self, node: _Node, at: int) -> None:
        value, *items = node.args
        self.emit(value, at)
        letter = _LETTER[value.type]
        if letter == "S":
            texts = sorted({item.value for item in items}, key=str.encode)
            first = len(self.strings)
            self.strings += [self.string(text) for text in texts]
            count = len(texts)
        elif letter == "F":
            first, floats = len(self.floats), sorted({item.value for item in items})
            # A NaN ends each list: the search may look one past it.
            self.floats += [*floats, math.nan]
            count = len(floats)
        else:
            first, ints = len(self.ints), sorted({item.value for item in items})
            self.ints += ints
            count = len(ints)
        self.add(f"IN_{letter}", at, at, k=first | count << 32)


def _emit(compiler: _Compiler, node: _Node) -> Program:
    emitter = _Emitter(compiler)
    emitter.emit(node, 0)
    emitter.add("RETURN", 0)
    return Program(emitter.code, node.type, bytes(emitter.text), emitter.floats, emitter.ints, emitter.strings)
