"""Numba's side of native functions: Timestamp as a Numba type, and the build of one function (control path).

Imported only when a function is not in the cache: Numba takes half a second to import. What must stay true: the native
function and plain Python agree, Timestamp fields because they are the same code, division by zero because it is null.
"""

# Numba has no types that mypy could see.
# mypy: disable-error-code="misc,attr-defined,no-untyped-call,untyped-decorator,no-any-return"

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from types import CellType, FunctionType
from typing import Any, NamedTuple

import numba
from llvmlite import ir
from numba.core import callconv, cgutils, compiler, errors, types
from numba.core.compiler_lock import global_compiler_lock
from numba.core.dispatcher import Dispatcher
from numba.core.imputils import lower_constant
from numba.core.registry import cpu_target
from numba.core.typeconv import Conversion
from numba.extending import (
    intrinsic,
    lower_builtin,
    lower_cast,
    models,
    overload,
    overload_attribute,
    register_jitable,
    register_model,
    type_callable,
    typeof_impl,
)

from . import functions, timestamp

# ---- Timestamp ----


class TimestampType(types.Type):
    """int64 microseconds with calendar fields; anything else it does as an int64."""

    bitwidth = 64

    def __init__(self) -> None:
        super().__init__(name="Timestamp")

    def can_convert_to(self, typing_context: Any, other: Any) -> Any:
        if other == types.int64:
            return Conversion.promote
        return Conversion.safe if other == types.float64 else None


TIMESTAMP = TimestampType()
register_model(TimestampType)(models.IntegerModel)


@lower_cast(TimestampType, types.int64)
def _to_int64(context: Any, builder: Any, fromty: Any, toty: Any, value: Any) -> Any:
    return value


@lower_cast(TimestampType, types.float64)
def _to_float64(context: Any, builder: Any, fromty: Any, toty: Any, value: Any) -> Any:
    return context.cast(builder, value, types.int64, types.float64)


@intrinsic
def _as_int(typing_context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0]

    return types.int64(TIMESTAMP), generate


@intrinsic
def _as_timestamp(typing_context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0]

    return TIMESTAMP(types.int64), generate


def _add_field(name: str, formula: Callable[[int], int]) -> None:
    compute = register_jitable(formula)

    def field(at: Any) -> Any:
        def get(at: Any) -> Any:
            return compute(_as_int(at))

        return get

    overload_attribute(TimestampType, name)(field)


for _name, _formula in timestamp.FIELDS.items():
    _add_field(_name, _formula)


@type_callable(int)
def _type_int(context: Any) -> Any:
    def typer(value: Any) -> Any:
        return types.int64 if isinstance(value, TimestampType) else None

    return typer


@lower_builtin(int, TimestampType)
def _lower_int(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return args[0]


@type_callable(float)
def _type_float(context: Any) -> Any:
    def typer(value: Any) -> Any:
        return types.float64 if isinstance(value, TimestampType) else None

    return typer


@lower_builtin(float, TimestampType)
def _lower_float(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return context.cast(builder, args[0], types.int64, types.float64)


@typeof_impl.register(timestamp.Timestamp)
def _typeof(value: Any, context: Any) -> Any:
    return TIMESTAMP


@lower_constant(TimestampType)
def _constant(context: Any, builder: Any, type_: Any, value: Any) -> Any:
    return context.get_constant(types.int64, int(value))


@overload(bool)
def _bool(value: Any) -> Any:
    if not isinstance(value, TimestampType):
        return None

    def not_zero(value: Any) -> Any:
        return _as_int(value) != 0

    return not_zero


@type_callable(timestamp.Timestamp)
def _type_timestamp(context: Any) -> Any:
    def typer(value: Any) -> Any:
        return TIMESTAMP if isinstance(value, (types.Integer, TimestampType)) else None

    return typer


@lower_builtin(timestamp.Timestamp, types.Integer)
def _lower_timestamp(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return context.cast(builder, args[0], signature.args[0], types.int64)


@lower_builtin(timestamp.Timestamp, TimestampType)
def _lower_same(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return args[0]


@intrinsic
def _present(typing_context: Any, value: Any) -> Any:
    """The value of an optional that is not None."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.cast(builder, args[0], value, value.type)

    return value.type(value), generate


# ---- Division by zero ----

_ZERO_DIVISION = 2  # Numba's own codes are 0, below 0, and 1 for every exception


class _NullOnZeroDivision(callconv.ErrorModel):
    """As Numba's Python model, but the status says which exception it was: division by zero is null, not a failure."""

    raise_on_fp_zero_division = True

    def fp_zero_division(self, builder: Any, exc_args: Any = None, loc: Any = None) -> bool:
        convention = self.call_conv
        if getattr(builder, "_in_try_block", False):
            convention.return_user_exc(builder, ZeroDivisionError, exc_args, loc)
        else:
            convention.set_static_user_exc(builder, ZeroDivisionError, exc_args=exc_args, loc=loc)
            convention._return_errcode_raw(builder, ir.Constant(ir.IntType(32), _ZERO_DIVISION))
        return True


callconv.error_models["penstock"] = _NullOnZeroDivision


# ---- Building ----


_SERIAL = itertools.count()


class Built(NamedTuple):
    """Native code of one function, and its object file where that can stand without Numba."""

    address: int
    symbol: str
    object_code: bytes | None
    owner: object


_NUMBA_TYPES = {"float64": types.float64, "int64": types.int64, "bool": types.boolean, "timestamp": TIMESTAMP}
_SOURCES = {"float64": "f[{0}]", "int64": "i[{0}]", "bool": "i[{0}] != 0", "timestamp": "as_timestamp(i[{0}])"}
_STORES = {
    "float64": "    v = float(r)\n    of[0] = v\n    return 1 if v != v else 0\n",
    "int64": "    oi[0] = r\n    return 0\n",
    "bool": "    oi[0] = 1 if r else 0\n    return 0\n",
    "timestamp": "    oi[0] = r\n    return 0\n",
}
_ALLOWED: dict[str, tuple[type, ...]] = {
    "float64": (types.Float, types.Integer, types.Boolean),
    "int64": (types.Integer, types.Boolean),
    "bool": (types.Boolean,),
    "timestamp": (TimestampType, types.Integer),
}


def build(fn: Callable[..., Any], arg_types: Sequence[str], return_type: str, where: str) -> Built:
    """Compile fn and a C entry around it. Raises FunctionError with Numba's reason."""
    with global_compiler_lock:
        return _build(fn, arg_types, return_type, where)


def _build(fn: Callable[..., Any], arg_types: Sequence[str], return_type: str, where: str) -> Built:
    inner = _native(fn, {})
    signature = tuple(_NUMBA_TYPES[kind] for kind in arg_types)
    try:
        inner.compile(signature)
    except errors.NumbaError as error:
        raise functions.FunctionError(f'{where}: {_reason(error, fn)}; or declare it with mode="python"') from None
    except Exception as error:
        reason = f"Numba cannot compile it: {type(error).__name__}: {error}"
        raise functions.FunctionError(f'{where}: {reason}; or declare it with mode="python"') from None
    returned = inner.overloads[signature].signature.return_type
    plain = returned.type if isinstance(returned, types.Optional) else returned
    if not isinstance(plain, _ALLOWED[return_type]):
        raise functions.FunctionError(f"{where}: returns {_shown(returned)}, but is annotated {return_type}")

    source = "def entry(f, i, of, oi):\n"
    source += f"    r0 = fn({', '.join(_SOURCES[kind].format(n) for n, kind in enumerate(arg_types))})\n"
    if isinstance(returned, types.Optional):
        source += "    if r0 is None:\n        return 1\n    r = present(r0)\n"
    else:
        source += "    r = r0\n"
    source += _STORES[return_type]
    namespace: dict[str, Any] = {"fn": inner, "as_timestamp": _as_timestamp, "present": _present, "__name__": __name__}
    exec(source, namespace)

    context = cpu_target.target_context
    flags = compiler.Flags()
    flags.nrt = True
    flags.no_cpython_wrapper = True
    flags.no_cfunc_wrapper = True
    flags.error_model = "penstock"
    slots = (types.CPointer(types.float64), types.CPointer(types.int64)) * 2
    compiled = compiler.compile_extra(
        cpu_target.typing_context, context, namespace["entry"], slots, types.uint8, flags, {}
    )
    return _with_c_entry(context, compiled, slots, return_type == "float64")


def _native(fn: Any, made: dict[Any, Any]) -> Any:
    """Numba's dispatcher for fn, and for the functions of the user's that it calls: they need no decorator.

    A helper that is decorated already is compiled anew, so that a division by zero in it is null as well.
    """
    fn = getattr(fn, "py_func", fn)
    if fn in made:
        return made[fn]
    names = dict(fn.__globals__)
    cells = tuple(CellType() for _ in fn.__code__.co_freevars)
    copy = FunctionType(fn.__code__, names, fn.__name__, fn.__defaults__, cells)
    copy.__kwdefaults__ = fn.__kwdefaults__
    copy.__qualname__, copy.__module__ = fn.__qualname__, fn.__module__
    dispatcher = made[fn] = numba.njit(copy, error_model="penstock")
    for name in functions.global_names(fn.__code__):
        if _is_helper(names.get(name)):
            names[name] = _native(names[name], made)
    for cell, own in zip(cells, fn.__closure__ or ()):
        value = own.cell_contents
        cell.cell_contents = _native(value, made) if _is_helper(value) else value
    return dispatcher


def _is_helper(value: Any) -> bool:
    if isinstance(value, Dispatcher):
        return True
    # Numba has its own versions of numpy's.
    return isinstance(value, FunctionType) and value.__module__.partition(".")[0] not in ("numpy", "numba")


def _with_c_entry(context: Any, compiled: Any, slots: Any, float_result: bool) -> Built:
    """A function with the C signature around one with Numba's calling convention, in a library of its own."""
    symbol = f"penstock_function_{next(_SERIAL)}"  # Numba links every library into one engine
    library = context.codegen().create_library("penstock_function")
    library.enable_object_caching()
    module = library.create_ir_module("penstock_function")
    pointer_f, pointer_i = ir.DoubleType().as_pointer(), ir.IntType(64).as_pointer()
    byte = ir.IntType(8)
    entry = ir.Function(module, ir.FunctionType(byte, [pointer_f, pointer_i, pointer_f, pointer_i]), symbol)
    builder = ir.IRBuilder(entry.append_basic_block())
    callee = context.declare_function(module, compiled.fndesc)
    status, code = context.call_conv.call_function(builder, callee, types.uint8, slots, list(entry.args))
    result = cgutils.alloca_once_value(builder, code)
    with cgutils.if_unlikely(builder, status.is_error):
        zero = builder.icmp_signed("==", status.code, ir.Constant(status.code.type, _ZERO_DIVISION))
        null, raised = ir.Constant(byte, functions.NULL), ir.Constant(byte, functions.RAISED)
        builder.store(builder.select(zero, null, raised), result)
    code = builder.load(result)
    with cgutils.if_unlikely(builder, cgutils.is_true(builder, code)):
        if float_result:
            builder.store(ir.Constant(ir.DoubleType(), float("nan")), entry.args[2])
        else:
            builder.store(ir.Constant(ir.IntType(64), 0), entry.args[3])
    builder.ret(code)
    library.add_ir_module(module)
    library.add_linking_library(compiled.library)
    library.finalize()
    address = library.get_pointer_to_function(symbol)
    try:
        object_code: bytes | None = library._get_compiled_object()
    except Exception:
        object_code = None
    return Built(address, symbol, object_code, (library, compiled))


def _shown(returned: Any) -> str:
    return "nothing" if returned == types.none else str(returned)


_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def _reason(error: Any, fn: Any) -> str:
    """One line out of Numba's many: what it could not do, and at which line of the function."""
    text = _ANSI.sub("", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("Failed in nopython mode")]
    reason = lines[0] if lines else type(error).__name__
    if reason.endswith(":") and len(lines) > 1:
        reason += " " + lines[1]
    file = fn.__code__.co_filename
    found = re.findall(r'File "([^"]*)", line (\d+)', text)
    at = [int(line) for path, line in found if path == file or file.endswith(path.lstrip("./"))]
    place = f"line {max(at)}: " if at else ""
    return f"{place}Numba cannot compile it: {reason}"
