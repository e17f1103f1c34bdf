"""The point-in-time rows: 1M spine rows x 10M feature rows of 100k entities, 2 float64 features, Arrow to Arrow.

Ours is asof_join with keys as strings ("e123"), one thread; int_keys is ours with dense int64 keys. Those are what the
peers get, which all join integers faster, one thread each: pandas merge_asof, polars join_asof, DuckDB ASOF; the ratio
to the best peer is of integers on both sides. Floor: a Numba merge pass over the integers. With unsorted rows pandas,
polars and the Numba merge sort first; DuckDB sorts by itself. Results are compared: a peer that disagrees is an error
row. Memory: peak of a new process over what its tables hold, both beyond the imports.
Run as a script: python bench/micro/pit.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

for _name in ("POLARS_MAX_THREADS", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
from rows import error_row, row  # noqa: E402
from timing import interleaved, note  # noqa: E402

COMMAND = "make bench ARGS='--only pit'"
SPINE, FEATURES, ENTITIES = 1_000_000, 10_000_000, 100_000
SPAN_US = 30 * 86_400_000_000
COLUMNS = ("a", "b")


class Data:
    """Arrays of both sides, in order of time or shuffled. Feature times are distinct; spine times fall between them."""

    def __init__(self, in_order: bool, seed: int = 5) -> None:
        rng = np.random.default_rng(seed)
        step = SPAN_US // FEATURES // 2 * 2
        self.entity = rng.integers(0, ENTITIES, FEATURES)
        self.at = np.arange(FEATURES, dtype=np.int64) * step
        self.values = [rng.random(FEATURES) for _ in COLUMNS]
        self.spine_entity = rng.integers(0, ENTITIES, SPINE)
        self.spine_at = np.sort(rng.integers(0, FEATURES, SPINE)) * step + 1
        if not in_order:
            order = rng.permutation(FEATURES)
            self.entity, self.at = self.entity[order], self.at[order]
            self.values = [v[order] for v in self.values]
            order = rng.permutation(SPINE)
            self.spine_entity, self.spine_at = self.spine_entity[order], self.spine_at[order]

    def tables(self) -> tuple[Any, Any]:
        """(spine, features) as Arrow, keys as strings."""
        import pyarrow as pa

        names = pa.array([f"e{i}" for i in range(ENTITIES)])
        us = pa.timestamp("us")
        spine = {"key": names.take(pa.array(self.spine_entity)), "at": pa.array(self.spine_at).cast(us)}
        features = {"key": names.take(pa.array(self.entity)), "at": pa.array(self.at).cast(us)}
        return pa.table(spine), pa.table(features | dict(zip(COLUMNS, self.values)))


def ours(spine: Any, features: Any) -> Any:
    from penstock.offline.asof import FeatureTable, asof_join

    return asof_join(spine, FeatureTable(features, "key", "at"), time="at")


def polars_asof(spine: Any, features: Any, in_order: bool) -> Any:
    if in_order:
        return spine.join_asof(features, on="at", by="key", check_sortedness=False)
    spine = spine.with_row_index("row").sort("at")
    return spine.join_asof(features.sort("at"), on="at", by="key", check_sortedness=False).sort("row")


def duckdb_asof(connection: Any, spine: Any, features: Any) -> Any:
    connection.register("spine", spine)
    connection.register("features", features)
    return connection.sql(
        'SELECT row, a, b FROM spine ASOF LEFT JOIN (SELECT "key" AS entity, "at" AS since, a, b FROM features) f '
        'ON spine."key" = f.entity AND spine."at" >= f.since'
    ).to_arrow_table()


def pandas_asof(spine: Any, features: Any, in_order: bool) -> Any:
    import pandas as pd

    if in_order:
        return pd.merge_asof(spine, features, on="at", by="key")
    spine = spine.reset_index(names="row").sort_values("at", kind="stable")
    joined = pd.merge_asof(spine, features.sort_values("at", kind="stable"), on="at", by="key")
    return joined.sort_values("row", kind="stable")


def numba_merge() -> Any:
    """f(entity, at, spine_entity, spine_at, a, b) -> (a, b): keys are ids and both sides in order."""
    import numba

    @numba.njit(cache=False)
    def run(entity, at, spine_entity, spine_at, a, b):  # type: ignore[no-untyped-def]
        n, m = len(spine_at), len(at)
        last = np.full(ENTITIES, -1, np.int64)
        out_a, out_b = np.empty(n), np.empty(n)
        j = 0
        for i in range(n):
            while j < m and at[j] <= spine_at[i]:
                last[entity[j]] = j
                j += 1
            k = last[spine_entity[i]]
            out_a[i], out_b[i] = (a[k], b[k]) if k >= 0 else (np.nan, np.nan)
        return out_a, out_b

    return run


def sorted_merge(loop: Any, d: Data) -> Any:
    """The loop on rows that are not in order: sorts indices, and puts the results back."""
    order = np.argsort(d.at, kind="stable")
    spine_order = np.argsort(d.spine_at, kind="stable")
    a, b = loop(
        d.entity[order],
        d.at[order],
        d.spine_entity[spine_order],
        d.spine_at[spine_order],
        *(v[order] for v in d.values),
    )
    out = np.empty((2, SPINE))
    out[0, spine_order], out[1, spine_order] = a, b
    return out


def disagreement(got: Any, want: Any) -> str | None:
    """The first value in which two results, each of two arrays with NaN for null, differ."""
    for name, left, right in zip(COLUMNS, got, want):
        if len(left) != len(right):
            return f"{len(left)} rows and {len(right)}"
        wrong = ~((left == right) | (np.isnan(left) & np.isnan(right)))
        if wrong.any():
            i = int(np.argmax(wrong))
            return f"{name} of row {i}: {left[i]!r} and {right[i]!r} ({int(wrong.sum())} rows differ)"
    return None


def arrays(table: Any) -> list[np.ndarray]:
    return [table[name].to_numpy() for name in COLUMNS]


def duckdb_arrays(out: Any) -> list[np.ndarray]:
    order = np.argsort(out["row"].to_numpy())
    return [out[name].to_numpy()[order] for name in COLUMNS]


def race(in_order: bool, rounds: int) -> tuple[dict[str, float], dict[str, str | None]]:
    """Median seconds of every contender, and what is wrong with its result, by name."""
    import duckdb
    import pandas as pd
    import polars as pl
    import pyarrow as pa

    d = Data(in_order)
    spine, features = d.tables()
    plain_spine = spine.set_column(0, "key", pa.array(d.spine_entity))
    plain_features = features.set_column(0, "key", pa.array(d.entity))
    numbered = plain_spine.append_column("row", pa.array(np.arange(SPINE)))
    frames = pl.from_arrow(plain_spine), pl.from_arrow(plain_features)
    times = d.at.view("M8[us]"), d.spine_at.view("M8[us]")
    pandas_features = pd.DataFrame({"key": d.entity, "at": times[0]} | dict(zip(COLUMNS, d.values)), copy=False)
    pandas_spine = pd.DataFrame({"key": d.spine_entity, "at": times[1]}, copy=False)
    connection = duckdb.connect(config={"threads": 1})
    loop = numba_merge()
    loop(d.entity[:9], d.at[:9], d.spine_entity[:9], d.spine_at[:9], *(v[:9] for v in d.values))
    contenders: dict[str, Any] = {
        "ours": lambda: ours(spine, features),
        "int_keys": lambda: ours(plain_spine, plain_features),
        "numba": (lambda: loop(d.entity, d.at, d.spine_entity, d.spine_at, *d.values))
        if in_order
        else (lambda: sorted_merge(loop, d)),
        "pandas": lambda: pandas_asof(pandas_spine, pandas_features, in_order),
        "polars": lambda: polars_asof(*frames, in_order),
        "duckdb": lambda: duckdb_asof(connection, numbered, plain_features),
    }
    want = contenders["numba"]()
    read: dict[str, Any] = {"ours": arrays, "duckdb": duckdb_arrays, "numba": lambda out: out}
    wrong: dict[str, str | None] = {}
    for name, call in list(contenders.items()):
        try:
            wrong[name] = disagreement(read.get(name, arrays)(call()), want)
        except Exception as e:
            wrong[name] = f"{type(e).__name__}: {e}"
            del contenders[name]
    slow = {name: contenders.pop(name) for name in ("polars", "duckdb") if name in contenders}
    seconds = interleaved(contenders, rounds, warmup=0)
    return seconds | interleaved(slow, 1, warmup=0), wrong


def memory_here(in_order: bool) -> float:
    """In a process of its own: peak beyond the imports over what the tables hold."""
    import pyarrow as pa

    from penstock.offline import asof  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/tables.arrow"
        # Made elsewhere, so that making them is not part of this process's peak.
        subprocess.run([sys.executable, __file__, "--write", path, str(int(in_order))], check=True)
        before = status_bytes("VmRSS")
        tables = []
        for part in ("spine", "features"):
            with pa.OSFile(f"{path}.{part}") as source:
                tables.append(pa.ipc.open_file(source).read_all())
        loaded = status_bytes("VmRSS") - before
        held = sum(t.nbytes for t in tables)
        if not 0.9 * held < loaded < 1.1 * held:
            raise RuntimeError(f"the tables hold {held} bytes, but the process grew by {loaded}")
        out = ours(*tables)
        del out
    return (status_bytes("VmHWM") - before) / loaded


def status_bytes(field: str) -> int:
    """VmRSS or VmHWM, its peak, of this process; getrusage's peak would begin with that of the parent."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(field))) * 1024


def write_tables(path: str, in_order: bool) -> None:
    import pyarrow as pa

    for part, table in zip(("spine", "features"), Data(in_order).tables()):
        with pa.OSFile(f"{path}.{part}", "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)


def memory(in_order: bool) -> float:
    command = [sys.executable, __file__, "--memory", str(int(in_order))]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def parquet_rate() -> tuple[float, float]:
    """(input MB/s, seconds) of asof_join_files over both sides as Parquet; the median of three."""
    import pyarrow.parquet as pq

    from penstock.offline.asof import FeatureTable, asof_join_files

    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{name}.parquet" for name in ("spine", "features")]
        for path, table in zip(paths, Data(True).tables()):
            pq.write_table(table, path)
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            asof_join_files(paths[0], FeatureTable(paths[1], "key", "at"), f"{folder}/out.parquet", time="at")
            seconds.append(time.perf_counter() - begin)
        size = sum(os.path.getsize(path) for path in paths)
    return size / 1e6 / float(np.median(seconds)), float(np.median(seconds))


def run() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for in_order, prefix, rounds in ((True, "pit.", 5), (False, "pit.unsorted_", 2)):
        note(f"{SPINE:,} x {FEATURES:,} rows, {'in order' if in_order else 'shuffled'}: {rounds} interleaved rounds")
        seconds, wrong = race(in_order, rounds)
        speed = {name: SPINE / s for name, s in seconds.items()}
        floor = speed.get("numba")
        for name in ("ours", "int_keys", "numba", "pandas", "polars", "duckdb"):
            label = f"{prefix}rows_per_s" if name == "ours" else f"{prefix}{name}_rows_per_s"
            if wrong[name]:
                rows.append(error_row(label, str(wrong[name]), COMMAND))
            else:
                ratio = speed[name] / floor if floor else None
                rows.append(row(label, speed[name], "rows/s", COMMAND, floor, ratio))
        peers = [speed[name] for name in ("pandas", "polars", "duckdb") if name in speed and not wrong[name]]
        if not wrong["int_keys"] and peers:
            rows.append(row(f"{prefix}ratio_to_best_peer", speed["int_keys"] / max(peers), "x", COMMAND))
        note("peak memory, in a new process")
        rows.append(row(f"{prefix}peak_memory_ratio", memory(in_order), "x", COMMAND))
    note("Parquet to Parquet")
    rate, _ = parquet_rate()
    rows.append(row("pit.mb_per_s_per_core", rate, "MB/s", COMMAND))
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write_tables(sys.argv[2], sys.argv[3] == "1")
    elif sys.argv[1:2] == ["--memory"]:
        print(json.dumps(memory_here(sys.argv[2] == "1")))
    else:
        from rows import table as show

        print(show(run()))
