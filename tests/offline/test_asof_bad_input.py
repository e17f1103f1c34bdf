"""Wrong definitions, columns and buffers: every refusal says which column, which row, what it was and what is right."""

from datetime import timedelta

import numpy as np
import pyarrow as pa
import pytest

from penstock._ext import asof as native
from penstock.errors import DefinitionError, EventError
from penstock.offline.asof import FeatureTable, asof_join, asof_join_files

US = pa.timestamp("us", "UTC")
GOOD = {"k": ["a", "b", "c"], "t": pa.array([1, 2, 3], US), "x": [1.0, 2.0, 3.0]}
SPINE = {"k": ["a", "b"], "at": pa.array([5, 6], US), "y": [1, 2]}


def refused(match, spine=SPINE, error=EventError, time="at", **table):
    columns = {**GOOD, **table.pop("columns", {})}
    settings = {"table": columns, "key": "k", "time": "t", **table}
    with pytest.raises(error, match=match):
        asof_join(spine, FeatureTable(**settings), time=time)


def test_definitions():
    for key in ([], {}, "", ["k", ""], ["k", 7], {"k": 7}, 7, None):
        refused(
            r'FeatureTable.key: expected a column, a list of columns or \{"column": "spine column"\}, got ',
            error=DefinitionError,
            key=key,
        )
    refused(r"FeatureTable.key: the same column twice: \['k', 'k'\]", error=DefinitionError, key=["k", "k"])
    refused("features: 'c' is the key column", error=DefinitionError, key=["k", "c"], features=["c", "x"])
    refused("FeatureTable.time: 't' is named for something else", error=DefinitionError, key=["k", "t"])
    refused("FeatureTable 'f'.ttl: expected a length", error=DefinitionError, ttl="soon", name="f")
    refused("ttl: expected a length from 0", error=DefinitionError, ttl=timedelta(days=-1))
    refused("features: expected a list of columns, got 'x'", error=DefinitionError, features="x")
    refused("features: expected a list of columns, got \\[\\]", error=DefinitionError, features=[])
    refused("features: 't' is the time column", error=DefinitionError, features=["t", "x"])
    with pytest.raises(DefinitionError, match=r"FeatureTable.time: 'k' is named for something else too"):
        FeatureTable(GOOD, "k", "k")
    with pytest.raises(TypeError, match=r"tables\[1\]: expected a FeatureTable, got dict"):
        asof_join(SPINE, [FeatureTable(GOOD, "k", "t"), GOOD], time="at")
    with pytest.raises(ValueError, match="max_threads: expected at least 1, got 0"):
        asof_join(SPINE, FeatureTable(GOOD, "k", "t"), time="at", max_threads=0)


def test_columns_that_are_not_there():
    refused(r"spine.when: there is no such column \(the time\); have k, at, y", time="when")
    refused(r"tables\[0\].id: there is no such column \(the key\); have k, t, x", key={"id": "k"})
    refused(r"spine.id: there is no such column \(the key of f\); have k, at, y", key={"k": "id"}, name="f")
    refused(r"f.z: there is no such column \(a feature\); have k, t, x", features=["z"], name="f")
    refused(r"f.seen: there is no such column \(the ingest time\)", ingest_time="seen", name="f")
    refused(r"f.defaults.z: no such feature; have x", defaults={"z": 1}, name="f")
    refused(r"f.c: there is no such column \(the key\); have k, t, x", key={"k": "k", "c": "y"}, name="f")
    refused(r"spine.c: there is no such column \(the key of f\); have k, at, y", key=["k", "c"], name="f")
    twice = pa.Table.from_arrays([pa.array(["a"])] * 2 + [pa.array([0], US)], ["k", "k", "t"])
    refused(r"tables\[0\].k: 2 columns of this name \(the key\)", table=twice)


def test_types():
    refused(r"tables\[0\].k: string keys, but spine.k has integer keys", spine={**SPINE, "k": [1, 2]})
    refused(r"f.k: integer keys, but spine.k has string keys", columns={"k": [1, 2, 3]}, name="f")
    refused(
        r"f.k: expected keys that are strings or integers, got double; pandas", columns={"k": [1.0, 2, 3]}, name="f"
    )
    refused(r"spine.k: expected keys that are strings or integers, got bool", spine={**SPINE, "k": [True, False]})
    two = {"key": {"k": "k", "c": "y"}, "name": "f"}
    refused(r"f.c: string keys, but spine.y has integer keys", columns={"c": ["1", "2", "3"]}, **two)
    refused(r"f.c: expected keys that are strings or integers, got double", columns={"c": [1.0, 2.0, 3.0]}, **two)
    refused(
        r"f\[0\].t: expected a time such as 2018-04-01T00:00:00Z, got '1'", columns={"t": ["1", "2", "3"]}, name="f"
    )
    refused(r"spine\[1\].at: expected a time such as", spine={**SPINE, "at": ["2018-04-01T00:00:00Z", "yesterday"]})
    refused(r"spine.at: expected a column of timestamp, got double", spine={**SPINE, "at": [0.5, 1.5]})
    refused(r"f.defaults.x: does not fit double", defaults={"x": "much"}, name="f")
    refused("spine.k: the values do not make a column", spine={**SPINE, "k": [1, "a"]})
    refused("spine: cannot be read as a table", spine={**SPINE, "k": ["a"]})
    with pytest.raises(TypeError, match="expected an Arrow table"):
        asof_join(SPINE, FeatureTable(7, "k", "t"), time="at")


def test_times():
    refused(r"spine\[1\].at: the time is missing \(null\)", spine={**SPINE, "at": pa.array([5, None], US)})
    refused(r"f\[2\].t: the time is missing \(null\)", columns={"t": pa.array([1, 2, None], US)}, name="f")
    chunks = pa.chunked_array([pa.array([1, 2], US), pa.array([None], US)])
    refused(r"f\[2\].t: the time is missing \(null\)", columns={"t": chunks}, name="f")
    seen = {"seen": pa.array([None, 2, 3], US)}
    refused(r"f\[0\].seen: the time is missing \(null\)", columns=seen, ingest_time="seen", name="f")
    far = 2**62
    refused(r"spine\[0\].at: expected a time between the years 1 and 9999", spine={**SPINE, "at": [far, 1]})
    refused(r"f\[2\].t: expected a time between the years 1 and 9999", columns={"t": [1, 2, far]}, name="f")
    refused(r"f\[1\].t: expected a time between the years 1 and 9999", columns={"t": [1, -far, 2]}, name="f")
    refused(r"f\[1\].seen: expected a time", columns={"seen": [1, far, 2]}, ingest_time="seen", name="f")
    refused(
        r"f.t: the column does not fit timestamp", columns={"t": pa.array([1, 2, far], pa.timestamp("s"))}, name="f"
    )


def test_names_that_clash():
    with pytest.raises(EventError, match=r"two columns would be called 'x': spine.x and tables\[0\].x; give a table"):
        asof_join({**SPINE, "x": [1, 2]}, FeatureTable(GOOD, "k", "t"), time="at")
    with pytest.raises(EventError, match=r"'x': tables\[0\].x and tables\[1\].x"):
        asof_join(SPINE, [FeatureTable(GOOD, "k", "t")] * 2, time="at")
    with pytest.raises(EventError, match=r"'x__status': spine.x__status and tables\[0\].x"):
        asof_join({**SPINE, "x__status": [1, 2]}, FeatureTable(GOOD, "k", "t"), time="at", statuses=True)


def test_integers_beyond_64_bits():
    keys = pa.array([1, 2**63 + 1, 3], pa.uint64())
    spine = {**SPINE, "k": [1, 2]}
    refused(r"f\[1\].k: the key is beyond 64 bits with a sign", spine=spine, columns={"k": keys}, name="f")
    refused(r"spine\[1\].k: the key is beyond", spine={**SPINE, "k": keys[:2]}, columns={"k": [1, 2, 3]})
    both = {"key": ["k", "n"], "name": "f"}
    spine_of_two = {**spine, "n": [1, 2]}
    refused(r"f\[1\].n: the key is beyond 64 bits", spine=spine_of_two, columns={"k": [1, 2, 3], "n": keys}, **both)
    refused(
        r"spine\[1\].n: the key is beyond",
        spine={**spine, "n": keys[:2]},
        columns={"k": [1, 2, 3], "n": [1, 2, 3]},
        **both,
    )
    # Under a null it is nobody's value.
    buffers = [pa.py_buffer(b"\x05"), keys.buffers()[1]]
    hidden = pa.Array.from_buffers(pa.uint64(), 3, buffers)
    out = asof_join(spine, FeatureTable({**GOOD, "k": hidden}, "k", "t"), time="at")
    assert out["x"].to_pylist() == [1.0, None]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("offsets", [[0, 1, 2, 9], [0, 2, 1, 3], [-1, 1, 2, 3], [0, 1, 2**31 - 1, 3]])
def test_damaged_text(kind, offsets):
    """Offsets outside the buffer, damaged after Arrow looked at them, are refused before anything is read there."""
    kept = np.zeros(4, np.int64 if kind == pa.large_string() else np.int32)
    column = pa.Array.from_buffers(kind, 3, [None, pa.py_buffer(kept), pa.py_buffer(b"abc")])
    keys = pa.table({**GOOD, "k": column})
    values = pa.table({**GOOD, "x": column})
    spine = pa.table({"k": column, "at": pa.array([5, 5, 5], US)})
    kept[:] = offsets
    refused(r"f\[\d\].k: the column is damaged", table=keys, name="f")
    refused(r"spine\[\d\].k: the column is damaged", spine=spine)
    refused(r"f.x: the column is damaged", spine={"k": ["a", "b", "c"], "at": [9, 9, 9]}, table=values, name="f")


def test_damaged_dictionary():
    index = pa.array([0, 1, 7], pa.int32())
    wrong = pa.DictionaryArray.from_arrays(index, pa.array(["a", "b"]), safe=False)
    refused(r"f\[2\].k: the column is damaged", columns={"k": wrong}, name="f")
    refused(r"f.x: the column is damaged", columns={"x": wrong}, name="f", spine={"k": ["c"], "at": [9]})


class Short:
    """What pyarrow would not build: an array whose buffers are shorter than it is long."""

    def __init__(self, kind, length, *buffers):
        self.type, self.length, self.offset = kind, length, 2
        self.parts = [None if b is None else pa.py_buffer(b) for b in buffers]

    def __len__(self):
        return self.length

    def buffers(self):
        return self.parts


def test_buffers_that_are_too_short():
    """The kernel's own face checks every size before it reads."""
    keys, ids = native.KeyIndex(), np.empty(3, np.uint32)
    for short in (
        Short(pa.int64(), 3, None, b"\0" * 39),
        Short(pa.int8(), 3, b"", b"\0" * 5),
        Short(pa.string(), 3, None, b"\0" * 23, b""),
        Short(pa.large_string(), 3, None, None, b""),
    ):
        with pytest.raises(native.ColumnError, match="a buffer is too short"):
            keys.encode([short], ids, True)
    for width, short in (
        (8, Short(None, 3, None, b"\0" * 39)),
        (0, Short(None, 7, None, b"\0")),
        (-4, Short(None, 1, None, b"\0" * 15, b"")),
    ):
        with pytest.raises(native.ColumnError, match="a buffer is too short"):
            native.Values([short], width, False)
    with pytest.raises(ValueError, match="one id per row"):
        keys.encode([pa.array([1, 2])], ids, True)
    values = native.Values([pa.array([1, 2, 3])], 8, False)
    room = np.empty(24, np.uint8)
    with pytest.raises(ValueError, match="a row that the column does not have"):
        values.gather(np.array([0, 3], np.uint32), room, room[:1])
    with pytest.raises(ValueError, match="no room for the values"):
        values.gather(np.array([0, 1, 2], np.uint32), room[:23], room[:1])


def test_files(tmp_path):
    table = FeatureTable(GOOD, "k", "t")
    with pytest.raises(EventError, match=r"spine: expected Parquet at .*nothing"):
        asof_join_files(tmp_path / "nothing", table, tmp_path / "out", time="at")
    (tmp_path / "text").write_text("no parquet")
    with pytest.raises(EventError, match=r"f: expected Parquet at .*text"):
        asof_join(SPINE, FeatureTable(tmp_path / "text", "k", "t", name="f"), time="at")
    with pytest.raises(TypeError, match="expected a path or a pyarrow dataset as the spine, got dict"):
        asof_join_files(SPINE, table, tmp_path / "out", time="at")
