"""Expressions: the native program against the oracle on generated trees and rows, DuckDB's SQL, and every refusal."""

import math
import struct
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import expressions as oracle
from penstock._ext.expressions import MAX_REGISTERS, OPCODES, Program
from penstock.expressions import ExpressionError, compile_expression

PRESENT, WIDE = 1, 0x80
NULLS = (0, 2, 3, 4)
KINDS = {"f": "float64", "i": "int64", "b": "bool", "s": "string", "t": "timestamp"}
NAMES = [f"{letter}{n}" for letter in KINDS for n in (0, 1)]
SLOTS = {name: (index, KINDS[name[0]]) for index, name in enumerate(NAMES)}
SLOTS["view.count_1d"] = (len(NAMES), "int64")

FLOATS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.5, 0.1, 2.0**53, 2.0**53 + 2, 2.0**63, -(2.0**63), 1e308, 5e-324]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(-5, 5).map(float),
)
INTEGERS = st.one_of(
    st.sampled_from([0, 1, -1, 2**53, 2**53 + 1, 2**63 - 1, -(2**63), 2**62, 2**32]),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-5, 5),
)
STRINGS = st.one_of(
    st.sampled_from(["", "a", "ab", "b", "é", "￿", "😀", "a\0", "a\0b"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
)
TIMES = st.one_of(
    st.integers(-62_000_000_000_000_000, 250_000_000_000_000_000),
    st.sampled_from([0, -1, 1_532_476_800_000_000, 1_532_476_800_000_001]),
)


@st.composite
def rows(draw):
    """name -> (type, value), with nulls, infinities and wide integers."""
    values = {
        "f": st.one_of(FLOATS, st.sampled_from([math.inf, -math.inf])),
        "b": st.booleans(),
        "s": STRINGS,
        "t": TIMES,
    }
    values["i"] = st.one_of(INTEGERS, INTEGERS, st.floats(2.0**63, 1e300), st.floats(-1e300, -(2.0**63)))
    row = {
        name: (kind, draw(st.one_of(values[name[0]], values[name[0]], st.none())))
        for name, (_, kind) in SLOTS.items()
        if name in NAMES
    }
    row["view.count_1d"] = ("int64", draw(INTEGERS))
    return row


def slot(kind):
    return st.sampled_from([name for name, (_, k) in SLOTS.items() if k == kind]).map(lambda name: ("slot", name))


def literal(values):
    return values.map(lambda value: ("literal", value))


def trees(kind, depth):
    """Trees of a type, at most `depth` operations deep."""
    if kind == "string":
        return st.one_of(slot("string"), literal(STRINGS))
    if kind == "timestamp":
        return slot("timestamp")
    leaves = {
        "int64": st.one_of(slot("int64"), slot("int64"), literal(INTEGERS)),
        "float64": st.one_of(slot("float64"), slot("float64"), literal(FLOATS)),
        "bool": st.one_of(slot("bool"), slot("bool"), literal(st.booleans())),
    }[kind]
    if depth == 0:
        return leaves
    whole, real, truth = (trees(k, depth - 1) for k in ("int64", "float64", "bool"))
    number = st.one_of(whole, real)
    if kind == "int64":
        return st.one_of(
            leaves,
            st.tuples(st.sampled_from(["+", "-", "*", "//", "%", "min", "max", "coalesce"]), whole, whole),
            st.tuples(st.sampled_from(["neg", "abs", "floor"]), whole),
            st.tuples(st.sampled_from(oracle.PARTS), slot("timestamp")),
            st.tuples(st.just("-"), slot("timestamp"), slot("timestamp")),
        )
    if kind == "float64":
        mixed = st.one_of(st.tuples(real, number), st.tuples(number, real))
        names = ["+", "-", "*", "/", "//", "%", "min", "max", "coalesce"]
        return st.one_of(
            leaves,
            st.tuples(st.sampled_from(names), mixed).map(lambda t: (t[0], *t[1])),
            st.tuples(st.just("/"), number, number),
            st.tuples(st.sampled_from(["neg", "abs", "floor", "ceil"]), real),
            st.tuples(st.sampled_from(["log", "exp", "sqrt"]), number),
        )
    comparison = st.sampled_from(["==", "!=", "<", "<=", ">", ">="])
    null = st.just(("literal", None))
    lists = [
        (number, st.one_of(literal(INTEGERS), literal(FLOATS), number, null)),
        (slot("int64"), st.one_of(literal(st.integers(-5, 5)), null)),
        (slot("string"), st.one_of(trees("string", 0), null)),
        (slot("timestamp"), st.one_of(TIMES.map(lambda us: ("time", us)), slot("timestamp"), null)),
        (truth, st.one_of(literal(st.booleans()), truth, null)),
    ]
    members = [
        st.tuples(st.sampled_from(["in", "not in"]), value, st.lists(item, min_size=1, max_size=7)).map(
            lambda t: (t[0], t[1], *t[2])
        )
        for value, item in lists
    ]
    anything = st.one_of(number, truth, slot("string"), slot("timestamp"))
    return st.one_of(
        leaves,
        st.tuples(comparison, number, number),
        st.tuples(comparison, trees("string", 0), trees("string", 0)),
        st.tuples(comparison, slot("timestamp"), st.one_of(slot("timestamp"), TIMES.map(lambda us: ("time", us)))),
        st.tuples(comparison, TIMES.map(lambda us: ("time", us)), slot("timestamp")),
        st.tuples(st.sampled_from(["==", "!="]), truth, truth),
        st.tuples(st.just("chain"), number, comparison, number, comparison, number),
        st.tuples(st.sampled_from(["and", "or"]), truth, truth),
        st.tuples(st.sampled_from(["and", "or"]), truth, truth),
        st.tuples(st.just("not"), truth),
        st.tuples(st.just("coalesce"), truth, truth),
        st.tuples(st.sampled_from(["is null", "is not null"]), anything),
        *members,
    )


def pack(values, null_status=2):
    """A row as the engine stores it: slots, statuses, arena. A null slot holds rubbish, which nobody may read."""
    slots = np.full((1, len(SLOTS)), 0x5A5A5A5A00000001, np.uint64)
    status = np.full((1, len(SLOTS)), null_status, np.uint8)
    arena = b"rubbish"
    for name, (index, kind) in SLOTS.items():
        value = values.get(name, (kind, None))[1]
        if value is None:
            continue
        status[0, index] = PRESENT
        if kind == "string":
            data = value.encode()
            slots[0, index] = len(arena) | len(data) << 32
            arena += data
        elif isinstance(value, float):
            slots[0, index] = struct.unpack("<Q", struct.pack("<d", value))[0]
            status[0, index] |= WIDE if kind == "int64" else 0
        else:
            slots[0, index] = int(value) & 0xFFFFFFFFFFFFFFFF
    return slots, status, arena


def unpack(kind, slots, status):
    """The value that a program stored: None, or a Python value; floats as their bits."""
    status = int(status)
    if status & ~WIDE != PRESENT:
        assert status == 2
        assert math.isnan(slots.view(np.float64)) if kind == "float64" else slots == 0
        return None
    if kind == "float64" or status & WIDE:
        return float(slots.view(np.float64)).hex()
    return bool(slots) if kind == "bool" else int(slots.view(np.int64))


def run(source, values=None, null_status=2):
    compiled = compile_expression(source, SLOTS)
    slots, status, arena = pack({name: (SLOTS[name][1], value) for name, value in (values or {}).items()}, null_status)
    out, out_status = compiled.program.evaluate(slots, status, arena)
    if compiled.type == "bool":
        truth = {1: True, 0: False, -1: None}[int(compiled.program.test(slots, status, arena)[0])]
        assert truth == unpack("bool", out[0], out_status[0])
    return unpack(compiled.type, out[0], out_status[0])


def bits(value):
    return value.hex() if isinstance(value, float) else value


# ---- against the oracle ----


@pytest.mark.parametrize("kind", ["bool", "int64", "float64"])
def test_programs_equal_the_oracle(kind):
    @settings(max_examples=250, deadline=None)
    @given(tree=trees(kind, 3), some=st.lists(rows(), min_size=1, max_size=4), null_status=st.sampled_from(NULLS))
    def check(tree, some, null_status):
        source = oracle.text(tree)
        compiled = compile_expression(source, SLOTS)
        assert compiled.type == kind
        for values in some:
            slots, status, arena = pack(values, null_status)
            out, out_status = compiled.program.evaluate(slots, status, arena)
            want = oracle.evaluate(tree, values)[1]
            assert unpack(kind, out[0], out_status[0]) == bits(want), source
            if kind == "bool":
                assert compiled.program.test(slots, status, arena)[0] == (-1 if want is None else want)

    check()


TEXTS = [
    "1 + 2 * 3 - 4",
    "-2 * 3 + 10 // 3 % 2",
    "7 // -2 * 2 + 7 % -2",
    "1 < 2 == 2",
    "not 1 > 2 and 3 > 2 or 1 > 5",
    "1 > 2 or 2 > 1 and not 3 > 1",
    "not 1 == 2",
    "-3 % 5 - -3 // 5",
    "2 - 3 - 4",
    "2.5 / 0.5 / 2.0",
    "0.1 + 0.2 + 0.3",
    "3 in (1, 2, 3) and 4 not in [1, 2, 3, 4]",
    "0x10 + 1_000",
    "-5 // 2.0",
    "True and not False",
]


@pytest.mark.parametrize("source", TEXTS)
def test_precedence_is_pythons(source):
    assert run(source) == bits(eval(source))


def test_duckdb_agrees_on_three_valued_logic():
    duckdb = pytest.importorskip("duckdb")
    connection = duckdb.connect()
    connection.execute(
        "create table t(k int, i0 bigint, i1 bigint, f0 double, f1 double, b0 bool, b1 bool, s0 text, s1 text)"
    )
    table = []
    choices = {
        "i": [None, 0, 1, 3, -4],
        "f": [None, 0.5, -2.0, 3.0],
        "b": [None, True, False],
        "s": [None, "a", "B", "é"],
    }
    source = np.random.default_rng(5)
    for k in range(300):
        table.append(
            [
                k,
                *(
                    choices[name[0]][source.integers(len(choices[name[0]]))]
                    for name in NAMES[2:4] + NAMES[:2] + NAMES[4:8]
                ),
            ]
        )
    connection.executemany("insert into t values (?,?,?,?,?,?,?,?,?)", table)
    expressions = [
        "b0 and b1",
        "b0 or b1",
        "not b0 or b1 and not b1",
        "not (b0 and b1) or b0",
        "i0 > i1 and f0 < f1 or s0 == s1",
        "i0 in (1, 3) or b0",
        "i0 not in (1, 3, 4)",
        "i0 in (1, 3, null)",
        "i0 not in (1, 3, null)",
        "s0 in ('a', 'B', 'x')",
        "s0 not in ('a', s1)",
        "f0 in (0.5, i0, 7)",
        "i0 is null or i0 < 2",
        "s0 is not null and s0 < s1",
        "s0 >= 'a'",
        "f0 * 2 + i0 > f1 - 1",
        "i0 + i1 == 4 or i0 * i1 <= 0",
        "coalesce(f0, f1, 0.0) > 0",
        "abs(f0) >= abs(f1) and floor(f0) != ceil(f1)",
        "i0 > f0",
        "b0 == b1",
        "b0 != b1 or b0 is null",
        "-i0 < i1",
        "sqrt(abs(f0)) > exp(-1.0)",
    ]
    for text in expressions:
        want = [row[0] for row in connection.execute(f"select ({text}) from t order by k").fetchall()]
        got = [run(text, dict(zip(("i0", "i1", "f0", "f1", "b0", "b1", "s0", "s1"), row[1:]))) for row in table]
        assert got == want, text


# ---- single facts ----


@pytest.mark.parametrize(
    ("source", "values", "want"),
    [
        ("f0 > 0.9", {"f0": 0.95}, True),
        ("f0 > 0.9", {}, None),
        ("f0 > 0.9", {"f0": math.nan}, None),
        ("f0 / 0", {"f0": 1.0}, None),
        ("i0 / 0", {"i0": 1}, None),
        ("i0 // i1", {"i0": 1, "i1": 0}, None),
        ("i0 % i1", {"i0": 1, "i1": 0}, None),
        ("f0 % -0.0", {"f0": 1.0}, None),
        ("log(f0)", {"f0": 0.0}, None),
        ("sqrt(f0)", {"f0": -1.0}, None),
        ("sqrt(f0)", {"f0": -0.0}, (-0.0).hex()),
        ("f0 - f0", {"f0": math.inf}, None),
        ("f0 * 10", {"f0": 1e308}, math.inf.hex()),
        ("i0 + 1", {"i0": 2**63 - 1}, (2.0**63).hex()),
        ("-i0", {"i0": -(2**63)}, (2.0**63).hex()),
        ("abs(i0)", {"i0": -(2**63)}, (2.0**63).hex()),
        ("i0 // -1", {"i0": -(2**63)}, (2.0**63).hex()),
        ("i0 % -1", {"i0": -(2**63)}, 0),
        ("i0 * i0 - 1", {"i0": 2**40}, (2.0**80).hex()),
        ("i0 == f0", {"i0": 2**53 + 1, "f0": 2.0**53}, False),
        ("i0 > f0", {"i0": 2**53 + 1, "f0": 2.0**53}, True),
        ("f0 == 9007199254740993", {"f0": 2.0**53}, False),
        ("i0 == 9007199254740993.0", {"i0": 2**53}, True),
        ("i0 < f0", {"i0": 2**63 - 1, "f0": 2.0**63}, True),
        ("i0 < i1", {"i0": 2**63 - 1, "i1": 2.0**63}, True),
        ("i0 <= 2.5", {"i0": 3}, False),
        ("s0 < s1", {"s0": "￿", "s1": "😀"}, True),
        ("s0 == ''", {"s0": ""}, True),
        ("s0 == ''", {}, None),
        ("t0.hour <= 6", {"t0": 6 * 3_600_000_000 + 5}, True),
        ("t0.weekday", {"t0": 0}, 3),
        ("t0.hour", {"t0": -1}, 23),
        ("t0 >= '1970-01-01T01:00:00+01:00'", {"t0": 0}, True),
        ("'1970-01-01T00:00:00.000001999Z' > t0", {"t0": 1}, False),
        ("t0 in ('1970-01-01T00:00:00Z', '1971-01-01T00:00:00Z', null)", {"t0": 0}, True),
        ("t1 - t0 > 86400 * 1000000", {"t0": 0, "t1": 86_400_000_001}, True),
        ("view.count_1d + 1", {"view.count_1d": 4}, 5),
        ("i0 in (3)", {"i0": 3}, True),
        ("i0 in (-3)", {"i0": -3}, True),
        ("s0 in ('a')", {"s0": "a"}, True),
        ("i0 in (1, 2.5, 3)", {"i0": 3}, True),
        ("i0 in (1, 2, null)", {"i0": 3}, None),
        ("i0 not in (1, 2, null)", {"i0": 2}, False),
        ("b0 and f0 > 1", {"b0": False}, False),
        ("b0 or f0 > 1", {"b0": True}, True),
        ("b0 and null", {"b0": True}, None),
        ("not b0", {}, None),
        ("b0 is null", {}, True),
        ("b0 is not None", {}, False),
        ("b0 == true", {"b0": True}, True),
        ("coalesce(i0, 0) > 0", {}, False),
        ("min(i0, f0)", {"i0": 1}, None),
        ("max(1, i0, 3)", {"i0": 2}, 3),
        ("min(1, i0, 3.5)", {"i0": 2}, (1.0).hex()),
        ("min(f0, f1)", {"f0": 0.0, "f1": -0.0}, (0.0).hex()),
        ("max(f0, f1)", {"f0": -0.0, "f1": 0.0}, (-0.0).hex()),
        ("f0 % f1", {"f0": -0.0, "f1": 5.0}, (0.0).hex()),
        ("f0 // f1", {"f0": -0.5, "f1": math.inf}, (-1.0).hex()),
        ("floor(f0)", {"f0": -1.5}, (-2.0).hex()),
        ("ceil(i0)", {"i0": 3}, 3),
        ("\n f0 > 1\n and i0 > 2 ", {"f0": 2.0, "i0": 3}, True),
        ("s0\t==\n'a\tb'", {"s0": "a\tb"}, True),
        ("s0 == 'a\tb'", {"s0": "a b"}, False),
        ('s0 in ("\\"\t", "\x0c")', {"s0": '"\t'}, True),
        ('s0 in ("\\"\t", "\x0c")', {"s0": "\x0c"}, True),
        ("60 * 60 * 24", {}, 86400),
        ("1 / 0 is null", {}, True),
        ("9223372036854775807 + 1", {}, (2.0**63).hex()),
        ("-9223372036854775808", {}, -(2**63)),
    ],
)
def test_single_facts(source, values, want):
    for null_status in NULLS:
        got = run(source, values, null_status)
        assert got == want
        assert type(got) is type(want)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("1 + view.count_2d", r"unknown name view\.count_2d at column 5; did you mean view\.count_1d\?$"),
        ("nonsense > 1", r"unknown name nonsense at column 1$"),
        ("", r"the expression is empty"),
        ("  ", r"the expression is empty"),
        (None, r"expected an expression as text, got None"),
        ("f0 = 1", r"= does not compare: write == at column 4"),
        ("f0 > ", r"cannot be parsed: .* at column"),
        ("(f0 > 1", r"cannot be parsed: .* at column 1"),
        ("f0 > 1) or (b0", r"cannot be parsed: .* at column 7"),
        ("f0 > 1; b0", r"cannot be parsed: .* at column 7"),
        ("f0 > 1 # sure", r"# is not supported: an expression has no comments at column 8"),
        ("f0 > 1 \n # sure \n and b0", r"# is not supported"),
        ("f0\x00", r"cannot be parsed"),
        ("s0 == 'a\nb'", r"a line ends within a string: write \\n at column 9"),
        ("s0 == 1", r"cannot compare int64 1 with string at column 1|cannot compare string with int64 1 at column 1"),
        ("b0 and f0 > 'x'", r"cannot compare float64 with string 'x' at column 8"),
        ("  é > 1", r"unknown name é at column 3"),
        ("s0 == 'é' and f0 == 'x'", r"at column 15"),
        ("b0 > true", r"conditions are compared with == and !="),
        ("b0 == 1", r"cannot compare bool with int64 1"),
        ("t0 > 5", r"cannot compare timestamp with int64 5"),
        ("t0 > 'yesterday'", r"expected a time such as 2018-04-01T00:00:00Z, got 'yesterday' at column 6"),
        ("t0.century", r"a timestamp has no .century at column 1; it has .year"),
        ("f0.hour", r"f0 is float64 and has no .hour"),
        ("t0 + 1", r"\+ takes numbers, got timestamp at column 1"),
        ("s0 + 'a'", r"\+ takes numbers, got string at column 1"),
        ("b0 + 1", r"\+ takes numbers, got bool"),
        ("-s0", r"- takes numbers, got string at column 2"),
        ("not f0", r"`not` takes conditions, got float64 at column 5"),
        ("f0 and b0", r"`and` takes conditions, got float64 at column 1"),
        ("f0 == null", r"always unknown: write `is null` at column 1"),
        ("None != f0", r"always unknown: write `is null`"),
        ("f0 is 1", r"`is` is only for `is null` and `is not null` at column 7"),
        ("null", r"null alone has no type"),
        ("null is null", r"null alone has no type"),
        ("s0", r"the value is a string; expected a condition or a number"),
        ("f0 in ()", r"the list after `in` is empty at column 7"),
        ("f0 in f1", r"`in` takes a list, such as \(1, 2\) at column 7"),
        ("i0 in (1, 'a')", r"cannot compare int64 with string 'a'"),
        ("(1, 2)", r"a list stands only after `in`"),
        ("f0 ** 2", r"\*\* is not supported at column 1"),
        ("b0 & b1", r"& is not supported: write `and`"),
        ("~b0", r"~ is not supported: write `not`"),
        ("1 if b0 else 2", r"if/else is not supported"),
        ("lambda: 1", r"lambda is not supported"),
        ("[f0][0]", r"after a value is not supported"),
        ("f'{f0}'", r"f-strings are not supported"),
        ("[x for x in (1, 2)]", r"ListComp is not supported"),
        ("(f0 := 1)", r":= is not supported"),
        ("__import__('os')", r"unknown function __import__"),
        ("f0.real.imag", r"unknown name f0.real.imag"),
        ("(f0).__class__", r"f0 is float64 and has no .__class__"),
        ("abs(f0).x", r".x stands after a value"),
        ("flor(f0)", r"unknown function flor at column 1; did you mean floor\?"),
        ("abs(f0, f1)", r"abs takes one argument, got 2"),
        ("min(f0)", r"min takes two arguments or more, got 1"),
        ("abs(x=f0)", r"abs takes no named arguments"),
        ("abs(s0)", r"abs takes numbers, got string"),
        ("coalesce(f0, s0)", r"coalesce of float64 and string: the types differ"),
        ("coalesce(null)", r"coalesce takes two values or more"),
        ("1e999 > f0", r"does not fit in a float64 at column 1"),
        ("f0 > 18446744073709551616", r"does not fit in 64 bits at column 6"),
        ("b'x' == s0", r"a bytes literal is not supported"),
        ("1j", r"a complex literal is not supported"),
        ("...", r"a ellipsis literal is not supported"),
        ("s0 == '\\ud800'", r"not valid Unicode at column 7"),
        ("(" * 150 + "f0" + ")" * 150 + "(" * 60, r"cannot be parsed"),
        ("f0 + (" * 70 + "f0" + ")" * 70, r"too deeply nested"),
        ("not " * 5000 + "b0", r"too deeply nested|cannot be parsed"),
        ("-" * 20000 + "f0", r"too deeply nested|cannot be parsed"),
        ("f0 + " * 30000 + "f0", r"the expression has 150002 characters, at most 100000"),
    ],
)
def test_refusals_say_what_and_where(source, message):
    with pytest.raises(ExpressionError, match=message) as caught:
        compile_expression(source, SLOTS, where='rule "burst"')
    assert str(caught.value).startswith('rule "burst": ')


def test_slots_of_other_types_are_refused():
    with pytest.raises(ExpressionError, match="f9 is list, which an expression cannot read at column 1"):
        compile_expression("f9 > 1", {"f9": (0, "list")})


def test_what_a_compiled_expression_says():
    compiled = compile_expression("view.count_1d > 3 and (f1 > 0.5 or view.count_1d > 9)", SLOTS)
    assert compiled.type == "bool"
    assert compiled.names == ("view.count_1d", "f1")
    assert compiled.program.n_slots == SLOTS["view.count_1d"][0] + 1
    assert compile_expression("f0 > 0.9", SLOTS).program.code[0].startswith("GT_F_SK")
    assert len(compile_expression("f0 > 60 * 60", SLOTS).program.code) == 2  # literals are folded


def test_long_expressions_run():
    source = " and ".join(["i0 > -1"] * 3000)
    assert run(source, {"i0": 0}) is True
    assert run(source) is None
    numbers = ", ".join(map(str, range(0, 9000, 3)))
    assert run(f"i0 in ({numbers})", {"i0": 8997}) is True
    assert run(f"i0 in ({numbers})", {"i0": 8998}) is False
    words = ", ".join(repr(f"w{n}") for n in range(500))
    assert run(f"s0 in ({words})", {"s0": "w499"}) is True
    assert run(f"s0 in ({words})", {"s0": "w5000"}) is False


def test_programs_are_checked():
    ret = (OPCODES["RETURN"], 0, 0, 0, 0)
    for code in (
        [],
        [(OPCODES["LOAD_F"], 0, 0, 0, 0)],
        [(len(OPCODES), 0, 0, 0, 0), ret],
        [(OPCODES["ADD_F"], 0, MAX_REGISTERS, 0, 0), ret],
        [(OPCODES["ADD_F"], 0, 0, MAX_REGISTERS, 0), ret],
        [(OPCODES["ADD_F"], MAX_REGISTERS, 0, 0, 0), ret],
        [(OPCODES["JUMP_TRUE"], 0, 0, 0, 2), ret],
        [(OPCODES["JUMP_TRUE"], 0, 0, 0, 0), ret],
        [(OPCODES["CONST_S"], 0, 0, 0, 5 << 32), ret],
        [(OPCODES["IN_I"], 0, 0, 0, 1 << 32), ret],
    ):
        with pytest.raises(ValueError, match="instruction"):
            Program(code, "bool")
    program = compile_expression("i1 > 0", SLOTS).program
    with pytest.raises(ValueError, match="rows have 1 slots, the expression reads 4"):
        program.test(np.zeros((2, 1), np.uint64), np.zeros((2, 1), np.uint8))
    with pytest.raises(ValueError, match="same shape"):
        program.test(np.zeros((2, 4), np.uint64), np.zeros((1, 4), np.uint8))
    with pytest.raises(ValueError, match="expected a condition"):
        compile_expression("i1 + 1", SLOTS).program.test(np.zeros((1, 9), np.uint64), np.zeros((1, 9), np.uint8))


def test_one_program_on_many_threads():
    compiled = compile_expression("f0 > 0.5 and i0 in (1, 2, 3, 4) or s0 == 'x'", SLOTS)
    slots = np.zeros((50_000, len(SLOTS)), np.uint64)
    slots[:, SLOTS["f0"][0]] = np.linspace(0, 1, 50_000).view(np.uint64)
    slots[:, SLOTS["i0"][0]] = np.arange(50_000) % 7
    status = np.ones(slots.shape, np.uint8)
    want = compiled.program.test(slots, status)
    results = []
    threads = [threading.Thread(target=lambda: results.append(compiled.program.test(slots, status))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert want.sum() > 0
    assert all(np.array_equal(result, want) for result in results)
    assert len(results) == 4
