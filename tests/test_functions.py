"""On-demand functions: native against plain Python, refusals, nulls, and the cache on disk."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import textwrap
import threading

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import penstock
from penstock import functions
from penstock.functions import FunctionError, compile_function, python_function
from penstock.timestamp import FIELDS, Timestamp

pytest.importorskip("numba")

LIMIT = 6
OPENING = Timestamp.parse("2018-04-01T08:00:00Z")
MICROS = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(allow_nan=False, width=64)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path_factory.mktemp("cache")))


def night(at: Timestamp) -> bool:
    return at.hour <= LIMIT


def ratio(a, b):
    return a / b


def _field(name):
    namespace = {}
    exec(f"def field(at):\n    return at.{name}", namespace)
    return namespace["field"]


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_timestamp_fields_are_those_of_the_python_class(name):
    native = compile_function(_field(name), ["timestamp"], "int64")

    @given(MICROS)
    @example(-1)
    @example(0)
    @example(-(2**63))
    @example(2**63 - 1)
    @example(951_782_400_000_000)  # 2000-02-29
    @settings(max_examples=300)
    def check(us):
        assert native(us) == getattr(Timestamp(us), name)

    check()


@pytest.mark.parametrize(
    ("fn", "returns"),
    [
        (lambda a, b: a - b, "int64"),
        (lambda a, b: a < b, "bool"),
        (lambda a, b: a >= OPENING, "bool"),
        (lambda a, b: a == b, "bool"),
        (lambda a, b: a % 7 + b // 3, "int64"),
        (lambda a, b: (a - OPENING) / 3_600_000_000, "float64"),
        (lambda a, b: float(a) + int(b), "float64"),
        (lambda a, b: Timestamp(a // 2), "timestamp"),
        (lambda a, b: a if a.hour < b.hour else b, "timestamp"),
        (lambda a, b: math.sin(2 * math.pi * a.hour / 24), "float64"),
        (lambda a, b: 1 if a else 0, "int64"),
        (lambda a, b: a.weekday >= 5 or b.hour in (0, 1, 2), "bool"),
    ],
)
def test_timestamp_arithmetic(fn, returns):
    native = compile_function(fn, ["timestamp", "timestamp"], returns)
    python = python_function(fn, ["timestamp", "timestamp"], returns)
    near = st.integers(-(2**61), 2**61)

    @given(near, near)
    @example(0, 0)
    @settings(max_examples=100)
    def check(a, b):
        assert native(a, b) == python(a, b)

    check()


@pytest.mark.parametrize(
    ("fn", "returns"),
    [
        (ratio, "float64"),
        (lambda a, b: a // b, "float64"),
        (lambda a, b: a % b, "float64"),
        (lambda a, b: a * b + a, "float64"),
        (lambda a, b: a > b, "bool"),
        (lambda a, b: math.isnan(a), "bool"),
        (lambda a, b: abs(a) if b else -a, "float64"),
        (lambda a, b: None if a > b else a, "float64"),
    ],
)
def test_float_arithmetic_has_the_bits_of_python(fn, returns):
    native = compile_function(fn, ["float64", "float64"], returns)
    python = python_function(fn, ["float64", "float64"], returns)

    @given(FLOATS | st.none(), FLOATS | st.none())
    @example(1.0, 0.0)
    @example(0.0, 0.0)
    @example(None, 1.0)
    @example(1.7976931348623157e308, 10.0)
    @settings(max_examples=200)
    def check(a, b):
        x, y = native(a, b), python(a, b)
        assert repr(x) == repr(y)

    check()


@pytest.mark.parametrize("fn", [lambda a, b: a // b, lambda a, b: a % b, lambda a, b: a - b, lambda a, b: a * 3 + b])
def test_integer_arithmetic(fn):
    native = compile_function(fn, ["int64", "int64"], "int64")
    python = python_function(fn, ["int64", "int64"], "int64")

    @given(st.integers(-(2**60), 2**60), st.integers(-(2**60), 2**60))
    @example(-7, 2)
    @example(7, 0)
    @settings(max_examples=200)
    def check(a, b):
        assert native(a, b) == python(a, b)

    check()


def test_the_smallest_integer_over_minus_one_does_not_crash():
    native = compile_function(lambda a, b: a // b, ["int64", "int64"], "int64")
    assert isinstance(native(-(2**63), -1), int)


def test_nulls_and_failures():
    def picky(a):
        if a > 10:
            raise ValueError("too much")
        if a > 5:
            return None
        return a

    native = compile_function(picky, ["float64"], "float64")
    assert native(1.0) == 1.0
    assert native(6.0) is None
    assert native(None) is None  # NaN in, NaN out
    with pytest.raises(FunctionError, match="picky raised"):
        native(11.0)
    python = python_function(picky, ["float64"], "float64")
    assert [python(1.0), python(6.0), python(None)] == [1.0, None, None]
    with pytest.raises(ValueError, match="too much"):
        python(11.0)
    # Division by zero is null however deep, and can be caught.
    assert compile_function(ratio, ["float64", "float64"], "float64")(1.0, 0.0) is None

    def caught(a, b):
        try:
            return a / b
        except Exception:
            return -1.0

    assert compile_function(caught, ["float64", "float64"], "float64")(1.0, 0.0) == -1.0
    assert compile_function(night, ["timestamp"], "bool")(None) is None
    assert python_function(night, ["timestamp"], "bool")(None) is None


def plain_share(a, b):
    return a / b


def test_helpers_need_no_decorator():
    import numba

    @numba.njit
    def decorated(a, b):
        return plain_share(a, b) + 1

    def fn(a, b):
        return decorated(a, b) * 2

    native = compile_function(fn, ["float64", "float64"], "float64")
    assert native(1.0, 4.0) == 2.5
    assert native(1.0, 0.0) is None  # null through two helpers, not a failure
    assert plain_share(1.0, 4.0) == 0.25

    def unknown(a):
        return textwrap.dedent(a)

    with pytest.raises(FunctionError, match="function unknown"):
        compile_function(unknown, ["float64"], "float64")


def test_the_c_signature_and_what_a_null_leaves_behind():
    import ctypes

    native = compile_function(ratio, ["float64", "float64"], "float64")
    call = ctypes.CFUNCTYPE(ctypes.c_uint8, *[ctypes.c_void_p] * 4)(native.address)
    args = (ctypes.c_double * 2)(1.0, 4.0)
    out = ctypes.c_double(7.0)
    there = ctypes.addressof(args), ctypes.addressof(args), ctypes.addressof(out), ctypes.addressof(out)
    assert call(*there) == functions.OK
    assert out.value == 0.25
    args[1] = 0.0
    assert call(*there) == functions.NULL
    assert math.isnan(out.value)


def test_many_threads():
    native = compile_function(ratio, ["float64", "float64"], "float64")
    wrong = []

    def work(k):
        for i in range(1, 500):
            if native(float(k), float(i)) != k / i:
                wrong.append((k, i))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_types_and_results_in_python_mode():
    seen = []

    def look(at, flag, text, number):
        seen.append((at, flag, text, number))
        return text + "!"

    call = python_function(look, ["timestamp", "bool", "string", "int64"], "string")
    assert call(5, 1, "a", 3) == "a!"
    assert [type(v) for v in seen[0]] == [Timestamp, bool, str, int]
    assert call(None, 1, "a", 3) is None
    assert python_function(lambda: Timestamp(5), [], "timestamp")() == 5
    assert python_function(lambda: 2**63, [], "int64")() is None
    assert python_function(lambda: math.nan, [], "float64")() is None
    np = pytest.importorskip("numpy")
    assert type(python_function(lambda: np.float32(0.5), [], "float64")()) is float
    assert type(python_function(lambda: np.int16(5), [], "int64")()) is int
    assert python_function(lambda: np.bool_(True), [], "bool")() is True
    for returns, value in [("float64", "x"), ("int64", 1.5), ("bool", 1), ("string", 1), ("timestamp", "x")]:
        with pytest.raises(TypeError, match="it returned"):
            python_function(lambda value=value: value, [], returns)()
    with pytest.raises(FunctionError, match="unknown type"):
        python_function(night, ["timestamp"], "object")


def test_refusals_name_the_function_the_line_and_the_way_out():
    def calls_nothing(a):
        return no_such_name(a)  # noqa: F821

    def attribute(at):
        hour = at.hour
        return hour + at.hours

    line = attribute.__code__.co_firstlineno
    with pytest.raises(FunctionError) as error:
        compile_function(attribute, ["timestamp"], "int64")
    text = str(error.value)
    assert f"function attribute ({__file__}:{line})" in text
    assert f"line {line + 2}: " in text
    assert "Unknown attribute 'hours' of type Timestamp" in text
    assert 'mode="python"' in text
    assert "\n" not in text
    with pytest.raises(FunctionError, match="no_such_name"):
        compile_function(calls_nothing, ["float64"], "float64")
    with pytest.raises(FunctionError, match='no strings; declare it with mode="python"'):
        compile_function(lambda a: a, ["string"], "float64")
    with pytest.raises(FunctionError, match="returns float64, but is annotated int64"):
        compile_function(ratio, ["float64", "float64"], "int64")
    with pytest.raises(FunctionError, match="returns int64, but is annotated bool"):
        compile_function(lambda a: a, ["int64"], "bool")
    with pytest.raises(FunctionError, match="returns nothing"):
        compile_function(lambda a: None, ["int64"], "bool")
    with pytest.raises(FunctionError, match="takes 2 arguments, 1 are given"):
        compile_function(ratio, ["float64"], "float64")
    with pytest.raises(FunctionError, match="unknown type 'float'"):
        compile_function(ratio, ["float", "float64"], "float64")
    with pytest.raises(FunctionError, match="expected a Python function"):
        compile_function(math.sin, ["float64"], "float64")


def test_without_numba_the_extra_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba" else find(name))
    with pytest.raises(FunctionError, match=r"pip install 'penstock\[functions\]'"):
        compile_function(ratio, ["float64", "float64"], "float64")


# ---- The cache ----


def _cached_files():
    folder = functions.cache_folder() / "functions"
    return sorted(folder.iterdir()) if folder.exists() else []


def test_a_second_start_imports_no_numba(tmp_path):
    script = tmp_path / "app.py"
    script.write_text(
        textwrap.dedent(
            """
            import json, math, sys
            from penstock.functions import compile_function
            from penstock.timestamp import Timestamp
            BASE = 2.5
            def f(at, x): return math.exp(x) * at.hour + BASE
            native = compile_function(f, ["timestamp", "float64"], "float64")
            print(json.dumps([native.cached, "numba" in sys.modules, native(Timestamp(7_200_000_000), 0.5)]))
            """
        )
    )
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(penstock.__file__))}

    def start():
        done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    value = math.exp(0.5) * 2 + 2.5
    assert start() == [False, True, value]
    assert start() == [True, False, value]
    script.write_text(script.read_text().replace("BASE = 2.5", "BASE = 3.5"))
    assert start() == [False, True, value + 1]


def test_the_key_holds_what_the_code_depends_on():
    def make(constant):
        def fn(a):
            return a + constant

        return fn

    assert not compile_function(make(1.0), ["float64"], "float64").cached
    assert compile_function(make(1.0), ["float64"], "float64").cached
    other = compile_function(make(2.0), ["float64"], "float64")
    assert not other.cached
    assert other(1.0) == 3.0
    assert not compile_function(make(1.0), ["int64"], "float64").cached
    assert not compile_function(make(1), ["float64"], "float64").cached
    assert not compile_function(make(True), ["float64"], "float64").cached


def test_a_changed_helper_is_noticed():
    import numba

    def make(constant):
        @numba.njit
        def helper(a):
            return a * constant

        def fn(a):
            return helper(a)

        return fn

    assert compile_function(make(2.0), ["float64"], "float64")(3.0) == 6.0
    assert compile_function(make(2.0), ["float64"], "float64").cached
    assert compile_function(make(4.0), ["float64"], "float64")(3.0) == 12.0


def test_what_cannot_be_described_is_not_cached():
    np = pytest.importorskip("numpy")
    table = np.array([1.0, 2.0])

    def look_up(i):
        return table[i]

    assert compile_function(look_up, ["int64"], "float64")(1) == 2.0
    assert not _cached_files()


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "writable", "other"])
def test_a_damaged_file_is_ignored_and_replaced(damage):
    assert not compile_function(ratio, ["float64", "float64"], "float64").cached
    (path,) = _cached_files()
    whole = path.read_bytes()
    assert path.stat().st_mode & 0o077 == 0
    if damage == "truncate":
        path.write_bytes(whole[:-100])
    elif damage == "flip":
        path.write_bytes(whole[:300] + bytes([whole[300] ^ 1]) + whole[301:])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "writable":
        path.chmod(0o666)
    else:
        path.write_bytes(b"something else entirely" * 20)
    again = compile_function(ratio, ["float64", "float64"], "float64")
    assert not again.cached
    assert again(1.0, 2.0) == 0.5
    assert compile_function(ratio, ["float64", "float64"], "float64").cached
    assert len(_cached_files()) == 1


def test_code_that_needs_numbas_runtime_is_not_loaded_without_it():
    def grows(a):
        values = [a, a + 1]
        values.append(3.0)
        return values[-1]

    compile_function(grows, ["float64"], "float64")
    (path,) = _cached_files()
    data = path.read_bytes()
    elf = data[data.index(b"\x7fELF") :]
    assert any(name.startswith("NRT_") for name in functions._undefined_symbols(elf))
    program = (
        "import sys; from pathlib import Path; from penstock import functions;"
        "print(functions._load(Path(sys.argv[1])), 'numba' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(penstock.__file__))}
    done = subprocess.run(
        [sys.executable, "-c", program, path], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["None", "False"]


def test_a_cache_folder_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("PENSTOCK_CACHE", str(blocked))
    assert compile_function(ratio, ["float64", "float64"], "float64")(1.0, 2.0) == 0.5


def test_without_numba_a_function_is_called_in_python_unless_it_says_native(monkeypatch):
    import penstock
    from penstock import functions

    class Tap(penstock.Event):
        who: str
        amount: float
        at: penstock.Timestamp

    def night(at: penstock.Timestamp) -> bool:
        return at.hour <= 6

    def ratio(amount: float) -> float:
        return 1 / amount

    def scored(**mode):
        made = [penstock.on_demand_feature_view(**mode)(fn) for fn in (night, ratio)]
        app = {"p": penstock.Pipeline("p", event=Tap, features=["amount", *made])}
        engine = penstock.Engine(app, clock="event")
        rows = [(0.0, "2026-01-01T03:00:00Z"), (4.0, "2026-01-01T13:00:00Z")]
        return [engine.score({"who": "a", "amount": a, "at": at}, explain=True).features for a, at in rows]

    native = scored()
    assert functions.mode_of(None) == "native"
    monkeypatch.setattr(functions, "_numba_version", lambda: None)
    assert [functions.mode_of(mode) for mode in (None, "native", "python")] == ["python", "native", "python"]
    assert scored() == native == scored(mode="python")
    assert native[0] == {"amount": 0.0, "night": True, "ratio": None}
    with pytest.raises(penstock.DefinitionError, match="native code needs numba"):
        scored(mode="native")
