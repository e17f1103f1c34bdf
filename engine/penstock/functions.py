"""On-demand features written in Python, made callable by the engine (control path).

`compile_function` gives the address of native code with one C signature for every function; Numba writes that code
(functions_numba.py) and its object file is kept in the user's cache folder, so that a later start loads it with LLVM
alone and never imports Numba. `python_function` is the same contract for mode="python". Both agree on nulls:

- a null float64 argument arrives as NaN; a null argument of any other type gives null, and the function is not called;
- a result that is None or NaN is null, and so is a division by zero; any other exception is a failure.

They differ where the machine's numbers differ from Python's: native integers are 64 bits and wrap (in Python a result
beyond 64 bits is null), math functions outside their domain give NaN or an infinity where Python raises, and int() of
a NaN is meaningless where Python raises: test a float for null with math.isnan first.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import platform
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from .errors import PenstockError
from .timestamp import Timestamp

__all__ = ["CompiledFunction", "FunctionError", "cache_folder", "compile_function", "mode_of", "python_function"]

NATIVE_TYPES = ("float64", "int64", "bool", "timestamp")
OK, NULL, RAISED = 0, 1, 2

# Raised when the generated code or the file's form changes.
_FORMAT = b"penstock function 1\n"


class FunctionError(PenstockError, ValueError):
    """A function that cannot be used as declared: its name, `file:line`, and the reason in one line."""


class CompiledFunction:
    """Native code of one function; the address is valid while this object lives.

    C signature: `uint8_t f(const double *args_f, const int64_t *args_i, double *out_f, int64_t *out_i)`. args_f and
    args_i are the same 8-byte slots seen as two types, and so are out_f and out_i. It may be called without the GIL
    from any thread. Returns OK (0), NULL (1) or RAISED (2); unless OK the out slot is NaN for float64, else 0.
    """

    def __init__(
        self, name: str, address: int, arg_types: Sequence[str], return_type: str, owner: object, cached: bool
    ) -> None:
        self.name = name
        self.address = address
        self.arg_types = tuple(arg_types)
        self.return_type = return_type
        self.cached = cached  # loaded from the cache folder
        self._owner = owner  # holds the memory of the code

    def __call__(self, *args: Any) -> Any:
        """The result as Python sees it, None for null; for tests and notebooks, not for the hot path."""
        import ctypes

        if len(args) != len(self.arg_types):
            raise TypeError(f"{self.name}: expected {len(self.arg_types)} arguments, got {len(args)}")
        floats = (ctypes.c_double * max(len(args), 1))()
        integers = ctypes.cast(floats, ctypes.POINTER(ctypes.c_int64))
        for i, (value, kind) in enumerate(zip(args, self.arg_types)):
            if value is None and kind != "float64":
                return None
            if kind == "float64":
                floats[i] = math.nan if value is None else value
            else:
                integers[i] = value
        result = ctypes.c_double()
        as_integer = ctypes.cast(ctypes.byref(result), ctypes.POINTER(ctypes.c_int64))
        call = ctypes.CFUNCTYPE(ctypes.c_uint8, *[ctypes.c_void_p] * 4)(self.address)
        address = ctypes.addressof(floats)
        code = call(address, address, ctypes.addressof(result), ctypes.addressof(result))
        if code == NULL:
            return None
        if code != OK:
            raise FunctionError(f"{self.name} raised an exception")
        if self.return_type == "float64":
            return result.value
        integer = as_integer[0]
        if self.return_type == "timestamp":
            return Timestamp(integer)
        return bool(integer) if self.return_type == "bool" else integer


def mode_of(declared: str | None) -> str:
    """ "native" or "python": as it was declared, else native where there is Numba to compile it."""
    return declared or ("python" if _numba_version() is None else "native")


def compile_function(
    fn: Callable[..., Any], arg_types: Sequence[str], return_type: str, *, name: str | None = None
) -> CompiledFunction:
    """Native code of fn(*arg_types) -> return_type, from the cache folder where it is there.

    Types are float64, int64, bool and timestamp; a timestamp is an int64 with the calendar fields of Timestamp.
    Raises FunctionError where Numba is missing, cannot compile the function, or infers another type.
    """
    fn = getattr(fn, "py_func", fn)  # already decorated with numba.njit
    name = str(name or getattr(fn, "__name__", repr(fn)))
    where = f"function {name} ({_place(fn)})"
    for kind in [*arg_types, return_type]:
        if kind == "string":
            raise FunctionError(f'{where}: native functions take no strings; declare it with mode="python"')
        if kind not in NATIVE_TYPES:
            raise FunctionError(f"{where}: unknown type {kind!r}; expected one of {', '.join(NATIVE_TYPES)}")
    if not isinstance(fn, FunctionType):
        raise FunctionError(f"{where}: expected a Python function, got {type(fn).__name__}")
    if fn.__code__.co_argcount != len(arg_types):
        raise FunctionError(f"{where}: takes {fn.__code__.co_argcount} arguments, {len(arg_types)} are given")
    if _numba_version() is None:
        extra = "native code needs numba: pip install 'penstock[functions]'"
        raise FunctionError(f'{where}: {extra}; or declare it with mode="python"')
    path = _cache_path(fn, arg_types, return_type)
    if path is not None:
        loaded = _load(path)
        if loaded is not None:
            address, owner = loaded
            return CompiledFunction(name, address, arg_types, return_type, owner, cached=True)
    try:
        from . import functions_numba
    except ImportError as error:
        # Numba is there, but not for this NumPy, this Python or this machine; it says which.
        raise FunctionError(f"{where}: numba cannot be imported: {error}") from error

    built = functions_numba.build(fn, arg_types, return_type, where)
    if path is not None and built.object_code is not None:
        _store(path, built.object_code, built.symbol)
    return CompiledFunction(name, built.address, arg_types, return_type, built.owner, cached=False)


def python_function(fn: Callable[..., Any], arg_types: Sequence[str], return_type: str) -> Callable[..., Any]:
    """fn for mode="python": takes slot values (float, int, bool, int microseconds, str; None for null), gives one.

    The result is a float, int, bool, int microseconds, str, or None for null. An exception other than an
    ArithmeticError is the caller's to handle; a result of another type raises TypeError.
    """
    fn = getattr(fn, "py_func", fn)
    name = getattr(fn, "__name__", repr(fn))
    kinds = tuple(arg_types)
    convert = _FROM_PYTHON.get(return_type)
    if convert is None:
        raise FunctionError(f"function {name} ({_place(fn)}): unknown type {return_type!r}")
    plain = all(kind in ("float64", "int64", "string") for kind in kinds)

    def call(*args: Any) -> Any:
        if None in args or not plain:
            values = []
            for value, kind in zip(args, kinds):
                if value is None:
                    if kind != "float64":
                        return None
                    value = math.nan
                elif kind == "timestamp":
                    value = Timestamp(value)
                elif kind == "bool":
                    value = bool(value)
                values.append(value)
            args = tuple(values)
        try:
            result = fn(*args)
            return None if result is None or result != result else convert(name, result)
        except ArithmeticError:
            return None

    return call


def _wrong(name: str, wanted: str, value: Any) -> TypeError:
    return TypeError(f"function {name}: expected {wanted}, it returned {value!r}")


def _to_float(name: str, value: Any) -> float:
    if isinstance(value, (int, float)) or _numpy_kind(value) in "fiub":
        return float(value)
    raise _wrong(name, "a float", value)


def _to_int(name: str, value: Any) -> int:
    if isinstance(value, int) or _numpy_kind(value) in "iub":
        value = int(value)
        if -(2**63) <= value < 2**63:
            return int(value)
        raise OverflowError
    raise _wrong(name, "an int", value)


def _to_bool(name: str, value: Any) -> bool:
    if isinstance(value, bool) or _numpy_kind(value) == "b":
        return bool(value)
    raise _wrong(name, "a bool", value)


def _to_string(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    raise _wrong(name, "a str", value)


def _numpy_kind(value: Any) -> str:
    """Kind of a numpy scalar, or '-' for anything else; numpy need not be imported."""
    kind = getattr(getattr(value, "dtype", None), "kind", "-")
    return kind if isinstance(kind, str) and getattr(value, "shape", None) == () else "-"


_FROM_PYTHON: dict[str, Callable[[str, Any], Any]] = {
    "float64": _to_float,
    "int64": _to_int,
    "bool": _to_bool,
    "timestamp": _to_int,
    "string": _to_string,
}


def _place(fn: Any) -> str:
    code = getattr(fn, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if isinstance(code, CodeType) else "no source"


# ---- The cache: one file of native code per function ----


def cache_folder() -> Path:
    """`PENSTOCK_CACHE`, or penstock in the user's cache folder; compiled functions are in `functions` below it."""
    chosen = os.environ.get("PENSTOCK_CACHE")
    if chosen:
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "penstock"


class _NotCacheable(Exception):
    """The function depends on something whose change would not be noticed."""


def _cache_path(fn: FunctionType, arg_types: Sequence[str], return_type: str) -> Path | None:
    """Where the code of this function is kept, by everything that it depends on; None where that cannot be told."""
    if sys.platform != "linux" or struct.calcsize("P") != 8:
        return None  # the object file's symbols are read as 64-bit ELF
    try:
        described = _describe_function(fn, {})
        binding = _llvm()
    except _NotCacheable:
        return None
    except Exception:
        return None  # a broken llvmlite is for Numba to report
    settings = sorted((k, v) for k, v in os.environ.items() if k.startswith("NUMBA_"))
    own = [(Path(__file__).parent / part).read_bytes() for part in ("functions_numba.py", "timestamp.py")]
    key = repr(
        (
            described,
            tuple(arg_types),
            return_type,
            sys.version,
            platform.machine(),
            _numba_version(),
            binding.get_host_cpu_name(),
            binding.get_host_cpu_features().flatten(),
            settings,
            [hashlib.sha256(text).hexdigest() for text in own],
        )
    )
    digest = hashlib.sha256(_FORMAT + key.encode("utf-8", "surrogatepass")).hexdigest()
    return cache_folder() / "functions" / digest[:40]


def _describe_function(fn: FunctionType, seen: dict[int, int]) -> Any:
    """What the compiled code depends on: bytecode, constants, and the values of every global and captured name.

    Numba freezes globals into the code, so a changed constant must give another key.
    """
    if id(fn) in seen:
        return ("again", seen[id(fn)])
    seen[id(fn)] = len(seen)
    captured = []
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or ()):
        try:
            captured.append((name, _describe_value(cell.cell_contents, fn.__code__, seen)))
        except ValueError:
            raise _NotCacheable(name) from None
    names = sorted(global_names(fn.__code__))
    values = [(n, _describe_value(fn.__globals__[n], fn.__code__, seen)) for n in names if n in fn.__globals__]
    return (
        _describe_code(fn.__code__),
        captured,
        values,
        [_describe_value(d, fn.__code__, seen) for d in fn.__defaults__ or ()],
    )


def _describe_code(code: CodeType) -> Any:
    constants = [_describe_code(c) if isinstance(c, CodeType) else (type(c).__name__, repr(c)) for c in code.co_consts]
    # Names of the file and lines are left out: moving a function does not change it.
    return (code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_flags,
            code.co_exceptiontable)  # fmt: skip


def global_names(code: CodeType) -> set[str]:
    """Names that the code, and the functions inside it, may look up in its globals (and in modules)."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= global_names(constant)
    return names


def _describe_value(value: Any, code: CodeType, seen: dict[int, int]) -> Any:
    if value is None or type(value) in (int, float, complex, bool, str, bytes, Timestamp):
        return (type(value).__name__, value.hex() if type(value) is float else repr(value))
    if type(value) in (tuple, frozenset):
        parts = [_describe_value(part, code, seen) for part in value]
        return (type(value).__name__, sorted(parts, key=repr) if type(value) is frozenset else parts)
    if isinstance(value, ModuleType):
        if value.__name__ in ("math", "numpy", "cmath", "operator"):
            return ("module", value.__name__, getattr(value, "__version__", None))
        return (
            "module",
            value.__name__,
            [
                (n, _describe_value(getattr(value, n), code, seen))
                for n in sorted(global_names(code))
                if hasattr(value, n)
            ],
        )
    if value is Timestamp or (isinstance(value, type) and value.__module__ == "builtins"):
        return ("type", value.__name__)
    inner = getattr(value, "py_func", value)
    if isinstance(inner, FunctionType):
        return ("function", _describe_function(inner, seen))
    module = getattr(value, "__module__", None)
    if callable(value) and module in ("builtins", "math", "cmath", "_operator", "numpy"):
        return ("callable", module, getattr(value, "__name__", ""))
    raise _NotCacheable(repr(value))


def _numba_version() -> str | None:
    """Versions of numba and llvmlite as their files say, without importing either; None where one is missing."""
    texts = []
    for package in ("numba", "llvmlite"):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            return None
        try:
            texts.append(hashlib.sha256(Path(spec.origin).with_name("_version.py").read_bytes()).hexdigest())
        except OSError:
            texts.append(str(os.stat(spec.origin).st_mtime_ns))
    return " ".join(texts)


def _llvm() -> Any:
    import llvmlite.binding as binding

    return binding


def _undefined_symbols(elf: bytes) -> list[str]:
    """Names that a 64-bit little-endian ELF object file needs from elsewhere (ELF-64 object file format 1.5)."""
    if elf[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit ELF object file")
    (sections_at,) = struct.unpack_from("<Q", elf, 40)
    section_bytes, n_sections = struct.unpack_from("<HH", elf, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, sections_at + i * section_bytes) for i in range(n_sections)]
    found = []
    for section in sections:
        if section[1] != 2:  # SHT_SYMTAB
            continue
        strings_at = sections[section[6]][4]
        for at in range(section[4], section[4] + section[5], 24):
            name_at, _, _, shndx = struct.unpack_from("<IBBH", elf, at)
            if shndx == 0 and name_at != 0:
                start = strings_at + name_at
                found.append(elf[start : elf.index(b"\0", start)].decode())
    return [name for name in found if name != "_GLOBAL_OFFSET_TABLE_"]


def _load(path: Path) -> tuple[int, object] | None:
    """Address of the cached code and what keeps it, or None where the file is missing, damaged or not to be trusted."""
    try:
        with open(path, "rb") as file:
            # Native code is run as it is: only a file that nobody else could have written.
            status = os.fstat(file.fileno())
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                return None
            data = file.read()
        head = len(_FORMAT)
        if data[:head] != _FORMAT or hashlib.sha256(data[head + 32 :]).digest() != data[head : head + 32]:
            return None
        (length,) = struct.unpack_from("<I", data, head + 32)
        start = head + 36
        symbol = json.loads(data[start : start + length])["symbol"]
        return _link(data[start + length :], symbol)
    except Exception:
        return None  # whatever is wrong with it, Numba writes it anew


def _link(elf: bytes, symbol: str) -> tuple[int, object] | None:
    binding = _llvm()
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(jit=True)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
    # LLVM ends the process when a symbol is missing: look first.
    if any(not binding.address_of_symbol(name) for name in _undefined_symbols(elf)):
        return None
    engine.add_object_file(binding.ObjectFileRef.from_data(elf))
    engine.finalize_object()
    address = engine.get_function_address(symbol)
    return (address, engine) if address else None


def _store(path: Path, elf: bytes, symbol: str) -> None:
    """Writes the file whole or not at all; a folder that cannot be written is no error."""
    meta = json.dumps({"symbol": symbol}).encode()
    body = struct.pack("<I", len(meta)) + meta + elf
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent)  # readable and writable by the user alone
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_FORMAT + hashlib.sha256(body).digest() + body)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
