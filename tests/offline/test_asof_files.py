"""Point-in-time joins from Parquet to Parquet: the same rows as in memory, by batches, from folders and by URI."""

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from penstock.errors import EventError
from penstock.offline.asof import FeatureTable, asof_join, asof_join_files

US = pa.timestamp("us", "UTC")


def tables(spine_rows=5_000, rows=20_000, entities=300, seed=3):
    rng = np.random.default_rng(seed)
    names = pa.array([f"customer-{i:05d}" for i in range(entities + 20)])
    features = pa.table(
        {
            "k": names.take(pa.array(rng.integers(0, entities, rows))),
            "t": pa.array(np.sort(rng.integers(0, 10**6, rows))).cast(US),
            "x": rng.random(rows),
            "word": pa.array([None if i % 5 == 0 else f"w{i}" for i in range(rows)]),
        }
    )
    spine = pa.table(
        {
            "k": names.take(pa.array(rng.integers(0, entities + 20, spine_rows))),
            "at": pa.array(np.sort(rng.integers(0, 10**6, spine_rows))).cast(US),
            "label": rng.random(spine_rows) < 0.1,
        }
    )
    return spine, features


def shuffled(table, seed=1):
    return table.take(pa.array(np.random.default_rng(seed).permutation(table.num_rows)))


@pytest.mark.parametrize("order", ["both", "features", "none"])
@pytest.mark.parametrize("batch_rows", [100, 1_234, 10**6])
def test_same_as_in_memory(tmp_path, order, batch_rows):
    spine, features = tables()
    if order != "both":
        spine = shuffled(spine)
    if order == "none":
        features = shuffled(features)
    pq.write_table(spine, tmp_path / "spine.parquet", row_group_size=900)
    pq.write_table(features, tmp_path / "features.parquet", row_group_size=3_000)
    settings = {"ttl": "100ms", "defaults": {"word": "none"}, "name": "f"}
    told = []
    rows = asof_join_files(
        tmp_path / "spine.parquet",
        FeatureTable(tmp_path / "features.parquet", "k", "t", **settings),
        tmp_path / "out.parquet",
        time="at",
        statuses=True,
        batch_rows=batch_rows,
        progress=told.append,
    )
    want = asof_join(spine, FeatureTable(features, "k", "t", **settings), time="at", statuses=True)
    out = pq.read_table(tmp_path / "out.parquet")
    assert rows == sum(told) == 5_000
    assert len(told) == -(-5_000 // batch_rows)
    assert out.column_names == want.column_names
    for name in want.column_names:
        assert out[name].to_pylist() == want[name].to_pylist(), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["features.parquet", "out.parquet", "spine.parquet"]


def test_batches_that_follow_in_time_need_no_index(tmp_path):
    """Unsorted within a batch, but each batch after the one before: still one pass over the features."""
    spine, features = tables()
    parts = [shuffled(spine.slice(i, 500), i) for i in range(0, 5_000, 500)]
    mixed = pa.concat_tables(parts)
    pq.write_table(mixed, tmp_path / "spine.parquet")
    asof_join_files(
        tmp_path / "spine.parquet", FeatureTable(features, "k", "t"), tmp_path / "out", time="at", batch_rows=500
    )
    want = asof_join(mixed, FeatureTable(features, "k", "t"), time="at")
    assert pq.read_table(tmp_path / "out").equals(want.combine_chunks())


def test_folders_lists_uris_and_datasets(tmp_path):
    spine, features = tables(500, 2_000)
    (tmp_path / "in").mkdir()
    for i in range(5):
        pq.write_table(spine.slice(i * 100, 100), tmp_path / "in" / f"{i}.parquet")
    pq.write_table(features, tmp_path / "features.parquet")
    want = asof_join(spine, FeatureTable(features, "k", "t"), time="at")
    files = [tmp_path / "in" / f"{i}.parquet" for i in range(5)]
    spines = [tmp_path / "in", str(tmp_path / "in"), f"file://{tmp_path}/in", files, ds.dataset(files)]
    for source in spines:
        for table in (tmp_path / "features.parquet", f"file://{tmp_path}/features.parquet", ds.dataset(features)):
            asof_join_files(source, FeatureTable(table, "k", "t"), f"file://{tmp_path}/out.parquet", time="at")
            assert pq.read_table(tmp_path / "out.parquet").equals(want.combine_chunks())
    assert asof_join(files, FeatureTable(features, "k", "t"), time="at").combine_chunks().equals(want.combine_chunks())


def test_another_filesystem(tmp_path, monkeypatch):
    """What is not a local path goes through pyarrow.fs alone."""
    spine, features = tables(100, 300)
    store = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr("penstock.offline.asof._place", lambda path: (store, str(path).removeprefix("mem://")))
    pq.write_table(spine, "spine.parquet", filesystem=store)
    pq.write_table(features, "features.parquet", filesystem=store)
    table = FeatureTable("mem://features.parquet", "k", "t")
    assert asof_join_files("mem://spine.parquet", table, "mem://out.parquet", time="at", max_threads=2) == 100
    want = asof_join(spine, FeatureTable(features, "k", "t"), time="at")
    assert pq.read_table("out.parquet", filesystem=store).equals(want.combine_chunks())


def test_keys_that_the_features_lack(tmp_path):
    """In a stream ids come from the feature tables; other keys of the spine match nothing, in every batch."""
    spine = pa.table({"k": ["a", "new", None, "b", "a"], "at": pa.array([1, 2, 3, 4, 5], US)})
    pq.write_table(spine, tmp_path / "spine")
    one = {"k": ["a", "b"], "t": pa.array([0, 9], US), "x": [1, 2]}
    two = {"k": pa.array(["b", "z"]).dictionary_encode(), "t": pa.array([0, 0], US), "y": ["p", "q"]}
    tables_ = [FeatureTable(one, "k", "t"), FeatureTable(two, "k", "t")]
    asof_join_files(tmp_path / "spine", tables_, tmp_path / "out", time="at", batch_rows=2)
    out = pq.read_table(tmp_path / "out")
    assert out["x"].to_pylist() == [1, None, None, None, 1]
    assert out["y"].to_pylist() == [None, None, None, "p", None]


def test_empty_spine(tmp_path):
    spine, features = tables(10, 10)
    pq.write_table(spine.slice(0, 0), tmp_path / "spine")
    assert asof_join_files(tmp_path / "spine", FeatureTable(features, "k", "t"), tmp_path / "out", time="at") == 0
    assert pq.read_table(tmp_path / "out").column_names == ["k", "at", "label", "x", "word"]


def test_a_failure_leaves_nothing(tmp_path):
    """A null time in a late batch is named by its row in the file; what was written is gone, what was there stays."""
    spine = pa.table({"k": ["a"] * 10, "at": pa.array([*range(7), None, 8, 9], US)})
    pq.write_table(spine, tmp_path / "spine")
    (tmp_path / "out").write_text("before")
    table = FeatureTable({"k": ["a"], "t": pa.array([0], US), "x": [1]}, "k", "t")
    with pytest.raises(ValueError, match=r"spine\[7\].at: the time is missing"):
        asof_join_files(tmp_path / "spine", table, tmp_path / "out", time="at", batch_rows=3)
    assert (tmp_path / "out").read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "spine"]


@pytest.mark.parametrize("order", ["both", "none"])
def test_keys_of_several_columns(tmp_path, order):
    """Batch after batch, the keys taken from the tables: as in memory; an error names the row in all of the file."""
    spine, features = tables()
    rng = np.random.default_rng(3)
    spine = spine.append_column("c", pa.array(rng.integers(0, 3, len(spine)), mask=rng.random(len(spine)) < 0.1))
    features = features.append_column("c", pa.array(rng.integers(0, 3, len(features))))
    if order == "none":
        spine, features = shuffled(spine), shuffled(features)
    pq.write_table(spine, tmp_path / "spine")
    table = FeatureTable(features, ["k", "c"], "t", name="f")
    asof_join_files(tmp_path / "spine", table, tmp_path / "out", time="at", batch_rows=700, statuses=True)
    want = asof_join(spine, table, time="at", statuses=True)
    out = pq.read_table(tmp_path / "out")
    for name in want.column_names:
        assert out[name].to_pylist() == want[name].to_pylist(), name
    assert {"PRESENT", "NOT_FOUND"} <= set(want["f.word__status"].to_pylist())
    beyond = pa.array([2**64 - 1 if i == 900 else 1 for i in range(len(spine))], pa.uint64())
    pq.write_table(spine.set_column(spine.column_names.index("c"), "c", beyond), tmp_path / "spine")
    with pytest.raises(EventError, match=r"spine\[900\].c: the key is beyond 64 bits"):
        asof_join_files(tmp_path / "spine", table, tmp_path / "out2", time="at", batch_rows=700)
