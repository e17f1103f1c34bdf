"""A checksum is no signature: records that check and are not what their schema says, in front of every reader.

What must hold: such a record is refused with file, offset and what is wrong, by whoever reads it, and nothing changes;
what is not refused is read within its bounds. Parquet and snapshots likewise, as far as their heads and columns go.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from offline.crafted import patched, records
from offline.shop_log import OPTIONS, SHOP, fill

from penstock import Aggregation, Engine, Event, FeatureView, Pipeline, Timestamp
from penstock._ext import log as native
from penstock._ext import log_columns
from penstock.errors import LogError
from penstock.offline.batches import BatchStore, schema_layouts
from penstock.offline.compaction import compact
from penstock.offline.erasure import erase
from penstock.offline.history import History
from penstock.offline.log_folder import LogFolder
from penstock.offline.parity import parity
from penstock.offline.schemas import record_schemas

pytest.importorskip("pyarrow", reason="compaction needs pyarrow")

HEAD = 32
SCORE = 72  # bytes of a score before its versions


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed segment with both event types and scores, and one behind it."""
    folder = tmp_path_factory.mktemp("crafted") / "log"
    for run, n in enumerate((12, 1)):
        with Engine(str(SHOP), log=folder, log_options=OPTIONS) as engine:
            fill(engine, n, seed=run, first=12 * run)
    return folder


def test_any_word_changed_in_front_of_every_reader(shop: Path, tmp_path: Path) -> None:
    """More of them: PENSTOCK_CRAFTED=500."""
    sample = int(os.environ.get("PENSTOCK_CRAFTED", "12"))
    here = Path(__file__).resolve().parent
    paths = [str(here.parent), str(here.parents[1] / "engine")]
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", str(here / "crafted.py"), str(shop), str(tmp_path), "1", str(sample)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"{lines[-1]}\n{done.stderr[-3000:]}"
    assert lines[0]["changes"] > 5000
    assert 500 < lines[0]["of_their_schema"] < lines[0]["changes"]
    results = [line for line in lines if "found" in line]
    assert len(results) == 2 * sample
    for line in results:
        found = line["found"]
        assert not [text for text in found.values() if text.startswith("raised")], line
        assert line["kept"], line
        record, _, at, _ = line["change"]
        # A sequence out of its turn is told in other words, and erasure does not count.
        if not line["fits"] and not 16 <= at - record < 24:
            said = f"000000000001.log at offset {line['change'][0]}: damaged: "
            silent = {reader: text for reader, text in found.items() if said not in text}
            assert silent == {}, line["change"]


def put(layout: str, *values: Any) -> bytes:
    return struct.pack(f"<{layout}", *values)


# (kind of record, offset in it, bytes, what is said). An order has its versions, 6 slots, 6 status bytes padded to 8.
ORDER_SLOTS = HEAD + 8 * 2
CHANGES = [
    ("Order", 9, b"\x05", "event .*: there is no such outcome"),
    ("Order", 9, b"\x00", "event .*: there is no such outcome"),
    ("Order", 9, b"\x03", "event .*: it has not as many versions as its schema"),
    ("Order", 8, b"\x04", "score .*: its schema is an event's"),
    ("Order", 8, b"\x01", "schema: a schema or a mark stands behind the beginning of the segment"),
    ("Order", 10, put("H", 3), "event .*: the segment has no schema of its number"),
    ("Order", 10, put("H", 2), "event .*: its schema is a score's"),
    ("Order", 10, put("H", 1), "event .*: it has not as many fields as its schema"),
    ("Order", 12, put("H", 60000), "event .*: it has not as many fields as its schema"),
    ("Order", 14, b"\xff", "event .*: it has not as many versions as its schema"),
    ("Order", 16, put("q", -1), "event -1: its sequence is negative"),
    ("Order", ORDER_SLOTS + 8, put("II", 2**31 - 1, 8), "event .*, field customer: its text does not lie within"),
    ("Order", ORDER_SLOTS + 8, put("II", 0, 2**32 - 1), "event .*, field customer: its text does not lie within"),
    ("Order", ORDER_SLOTS + 8, put("II", 2**32 - 1, 2), "event .*, field customer: its text does not lie within"),
    (
        "Order",
        ORDER_SLOTS,
        put("II", 0, 8) + put("II", 0, 8),
        "event .*, field customer: the texts up to it are longer",
    ),
    ("Order", ORDER_SLOTS + 56, b"\xed\xa0", "event .*, field id: its text is no UTF-8"),
    ("Order", ORDER_SLOTS + 56, b"\xc0\x80", "event .*, field id: its text is no UTF-8"),
    ("Order", ORDER_SLOTS + 56, b"o\xff", "event .*, field id: its text is no UTF-8"),
    ("Order", ORDER_SLOTS + 8 * 5, put("q", -(2**63)), "event .*, field at: its time lies outside"),
    ("Order", ORDER_SLOTS + 48, b"\x06", "event .*, field id: there is no such status"),
    ("Order", ORDER_SLOTS + 48, b"\x11", "event .*, field id: there is no such status"),
    ("Order", ORDER_SLOTS + 50, b"\x81", "event .*, field shop: only an integer of a score can be wide"),
    ("Order", ORDER_SLOTS + 49, b"\x02", "event .*, field customer: it cannot be without a value"),
    ("Order", ORDER_SLOTS + 53, b"\x02", "event .*, field at: it cannot be without a value"),
    ("Order", ORDER_SLOTS + 52, b"\x03", "event .*, field note: it cannot be without a value"),
    ("Login", HEAD + 8 + 8, put("Q", 2), "event .*, field ok: it is neither true nor false"),
    ("orders", HEAD, b"\xff", "score .*: its id is none"),
    ("orders", HEAD + 26, put("h", 3), "score .*: its action is none of the schema's"),
    ("orders", HEAD + 26, put("h", -1), "score .*: its action is none of the schema's"),
    ("orders", HEAD + 28, put("h", 0), "score .*: its model is none of the schema's"),
    ("orders", HEAD + 30, put("h", 99), "score .*: what failed is none of the schema's failures"),
    ("orders", HEAD + 40, put("Q", 4), "score .*: a rule fired that the schema does not have"),
    ("orders", HEAD + 56, b"\x02", "score .*: an arm is none of the schema's"),
    ("orders", HEAD + 64, b"\x02", "score .*: whether it has a score is neither yes nor no"),
    ("orders", HEAD + 65, b"\x02", "score .*: it has two outcomes"),
]


@pytest.mark.parametrize(("what", "at", "bytes_", "said"), CHANGES)
def test_what_is_wrong_is_said(shop: Path, tmp_path: Path, what: str, at: int, bytes_: bytes, said: str) -> None:
    folder = LogFolder(Path(shutil.copytree(shop, tmp_path / "log")))
    path = folder.segment_path(1)
    data = path.read_bytes()
    names = [schema.pipeline if hasattr(schema, "pipeline") else schema.name for schema in folder.segment(1).schemas()]
    offset, record = next(
        (offset, record)
        for offset, record in records(data, folder.log_id)
        if record.kind in ("event", "score") and names[record.schema] == what and record.outcome == 1
    )
    path.write_bytes(patched(data, folder.log_id, offset, record.length, offset + at, bytes_))
    expected = rf"000000000001\.log at offset {offset}: damaged: {said}.*restore the file from a copy"
    for read in (
        lambda: Engine(str(SHOP), log=folder.path, log_options=OPTIONS),
        lambda: parity(str(SHOP), folder.path),
        lambda: compact(folder.path),
        lambda: erase(folder.path, "customer", "c1"),
    ):
        with pytest.raises(LogError, match=expected):
            read()


def test_an_event_out_of_its_turn_is_refused(shop: Path, tmp_path: Path) -> None:
    folder = LogFolder(Path(shutil.copytree(shop, tmp_path / "log")))
    path = folder.segment_path(1)
    data = path.read_bytes()
    offset, record = [(o, r) for o, r in records(data, folder.log_id) if r.kind == "event"][3]
    path.write_bytes(patched(data, folder.log_id, offset, record.length, offset + 16, put("q", 99)))
    for read in (
        lambda: folder.segment(1).scan(),
        lambda: compact(folder.path),
        lambda: Engine(str(SHOP), log=folder.path, log_options=OPTIONS),
        lambda: parity(str(SHOP), folder.path),
    ):
        with pytest.raises(LogError, match=rf"000000000001.log: events 3 to 98 are missing before offset {offset}"):
            read()
    path.write_bytes(patched(data, folder.log_id, offset, record.length, offset + 16, put("q", 1)))
    with pytest.raises(LogError, match=rf"at offset {offset}: damaged: event 1 stands where event 3 should"):
        folder.segment(1).scan()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.replace('"time":5', '"time":4'), "its time is field 4, which is no timestamp"),
        (lambda s: s.replace('"time":5', '"time":9'), "its time is field 9, which is no timestamp"),
        (lambda s: s.replace('"event_id":0', '"event_id":7'), "its event id is field 7, of 6"),
        (lambda s: s.replace('["customer",1]', '["customer",8]'), "the key of customer is field 8, which is no string"),
        (lambda s: s.replace('"type":"int64"', '"type":"int32"'), "there is no type 'int32'"),
        (lambda s: s.replace('"name":"id"', '"name":5   '), "Expected `str`, got `int`"),
        (lambda s: "x" + s[1:], "a schema of the log cannot be read"),
    ],
)
def test_a_schema_that_contradicts_itself_is_refused(shop: Path, tmp_path: Path, change: Any, said: str) -> None:
    folder = LogFolder(Path(shutil.copytree(shop, tmp_path / "log")))
    path = folder.segment_path(1)
    data = path.read_bytes()
    offset, record = next(records(data, folder.log_id))
    text = record.body.decode()
    assert change(text) != text
    path.write_bytes(patched(data, folder.log_id, offset, record.length, offset + HEAD, change(text).encode()))
    for read in (
        lambda: Engine(str(SHOP), log=folder.path, log_options=OPTIONS),
        lambda: parity(str(SHOP), folder.path),
        lambda: compact(folder.path),
        lambda: folder.segment(1).scan(),
    ):
        with pytest.raises(LogError, match=rf"000000000001\.log at offset {offset}: damaged: .*{said}"):
            read()


def test_columns_that_give_no_record_of_the_schema_are_refused(shop: Path) -> None:
    """What build_records is given comes out of files: any value in it is refused, or gives a record of its schema."""
    folder = LogFolder(shop)
    segment = folder.segment(1)
    prelude = segment.prelude()
    layouts, known = schema_layouts(prelude.schemas), record_schemas(prelude.schemas)
    columns = log_columns.RecordColumns(layouts, known)
    end = segment.sealed_end or 0
    n = columns.count(segment.data, segment.log_id, 1, prelude.end, end)
    columns.take(segment.data, segment.log_id, 1, prelude.end, end)
    texts = prelude.texts
    rng = np.random.default_rng(1)

    def built(changed: dict[int, dict[str, Any]]) -> Any:
        sources = [
            (i, log_columns.Source(*layout, {**columns[i].columns, **changed.get(i, {})}))
            for i, layout in enumerate(layouts)
        ]
        return log_columns.build_records(segment.log_id, 1, 0, native.HEAD, texts, prelude.marks, n, sources, known)

    whole, offsets = built({})
    assert native.scan(whole, segment.log_id, 1).records == n + len(texts) + 1
    refused = 0
    for _ in range(1500):
        which = int(rng.integers(len(layouts)))
        name, array = list(columns[which].columns.items())[int(rng.integers(len(columns[which].columns)))]
        if not array.size or name == "day":
            continue
        other = array.copy()
        at = int(rng.integers(other.size))
        raw = other[at : at + 1].view(np.uint8)
        raw[int(rng.integers(raw.size))] ^= 1 << int(rng.integers(8))
        try:
            data, offsets = built({which: {name: other}})
            schemas = record_schemas(prelude.schemas, int(offsets[0]))
            found = native.scan(data, segment.log_id, 1, native.HEAD, schemas)
        except LogError:
            refused += 1
            continue
        assert found.records == n + len(texts) + 1
    assert refused > 100
    with pytest.raises(LogError, match="there are 0 records, expected 1"):
        log_columns.build_records(segment.log_id, 1, 0, native.HEAD, texts, prelude.marks, 1, [], known)
    segment.close()


def test_a_record_kept_whole_in_parquet_is_checked_too(shop: Path, tmp_path: Path) -> None:
    """A record with a flag that no column shows stands whole beside its columns; there it could be anything."""
    folder = LogFolder(Path(shutil.copytree(shop, tmp_path / "log")))
    path = folder.segment_path(1)
    data = path.read_bytes()
    offset, record = next((o, r) for o, r in records(data, folder.log_id) if r.kind == "event" and r.schema == 0)
    path.write_bytes(patched(data, folder.log_id, offset, record.length, offset + 15, b"\x01"))
    compact(folder.path)
    store = BatchStore.of(folder)
    (batch,) = store.batches()
    assert batch.whole == 1
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = next(f.path for f in batch.files if (Path(store.uri) / f.path).exists() and f.schema == 0)
    table = pq.ParquetFile(Path(store.uri) / file).read()
    kept = [None if r is None else r[:4] + b"\x60\xea" + r[6:] for r in table.column("_record").to_pylist()]
    column = pa.array(kept, type=table.schema.field("_record").type)
    table = table.set_column(table.schema.get_field_index("_record"), "_record", column)
    pq.write_table(table, Path(store.uri) / file)
    history = History(folder)
    history.check()
    ((name, wrong),) = history.check_batches()
    assert name == batch.name
    assert "it has not as many fields as its schema" in str(wrong)
    with pytest.raises(LogError, match=rf"batch {batch.name}: record \d+ of the batch, .*: it has not as many fields"):
        parity(str(SHOP), folder.path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: b["files"][0].update(schema=9), "a file is of no schema"),
        (lambda b: b["files"][0].update(schema=-1), "a file is of no schema"),
        (lambda b: b.update(records=1 << 60), "its files do not have"),
        (lambda b: b["segments"][0].update(first_record=5), "does not stand behind the one before it"),
        (lambda b: b["segments"][0].update(records=10**9), "its segments do not have"),
        (lambda b: b["segments"][0].update(marks=[1]), "1 watermarks"),
        (lambda b: b.update(segments=[]), "it has no segments"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(shop: Path, tmp_path: Path, change: Any, said: str) -> None:
    import zlib

    folder = Path(shutil.copytree(shop, tmp_path / "log"))
    compact(folder)
    (path,) = (folder / "parquet" / "batches").glob("*.json")
    batch = json.loads(path.read_bytes())["batch"]
    change(batch)
    body = json.dumps(batch, separators=(",", ":"))
    path.write_text(f'{{"crc32":{zlib.crc32(body.encode())},"batch":{body}}}')
    for read in (lambda: parity(str(SHOP), folder), lambda: Engine(str(SHOP), log=folder, log_options=OPTIONS)):
        with pytest.raises(LogError, match=rf"{path.name}: .*{said}"):
            read()


def test_the_head_of_a_state_is_checked(shop: Path, tmp_path: Path) -> None:
    """Every word of the head set to what points outside: refused, or of no consequence; the state stays as it was."""
    engine = Engine(str(SHOP))
    fill(engine, 200)
    (store, *_) = engine.stores.values() if isinstance(engine.stores, dict) else engine.stores
    whole = bytearray(store.dump())
    refused = []
    for at in range(0, 48 + 8 * 3 + 4 + 4 * 136 + 2 * (4 * 24 + 24), 4):
        for word in (0xFFFF_FFFF, 0x7FFF_FFFF, len(whole) // 16, len(whole) // 16 - 1):
            changed = bytearray(whole)
            changed[at : at + 4] = word.to_bytes(4, "little")
            if changed == whole:
                continue
            try:
                store.load(changed)
            except ValueError:
                refused.append(at)
                assert store.dump() == bytes(whole)
            else:
                store.load(bytes(whole))
    assert len(set(refused)) > 160  # of both tables, every free list and the empty entity
    engine.close()


def wide_app() -> dict[str, Any]:
    """Keys behind 70 fields: the mask of erased fields has 64 bits."""
    names = {"at": Timestamp, **{f"f{i}": float for i in range(70)}, "customer": str, "shop": str}
    event = type(Event)("Wide", (Event,), {"__annotations__": names, "__module__": __name__})
    view = FeatureView("spend", entity="customer", source=event, aggregations=[Aggregation("count", windows=["1d"])])
    other = FeatureView("shops", entity="shop", source=event, aggregations=[Aggregation("count", windows=["1d"])])
    return {"Wide": event, "spend": view, "shops": other, "p": Pipeline("p", event=event, features=[view, other])}


def test_an_erased_field_behind_the_64th_is_known_to_parity(tmp_path: Path) -> None:
    app = wide_app()
    with Engine(app, log=tmp_path / "log", log_options=OPTIONS) as engine:
        for i in range(40):
            values = {f"f{j}": float(j) for j in range(70)}
            engine.score({"at": 1_790_000_000 + i, "customer": f"c{i % 2}", "shop": "s", **values}, pipeline="p")
    erase(tmp_path / "log", "customer", "c1")
    (found,) = parity(app, tmp_path / "log").pipelines
    assert found.scores == 40
    (spend,) = [f for f in found.features if f.name == "spend.count_1d"]
    assert (spend.mismatched, spend.erased) == (0, 20)
