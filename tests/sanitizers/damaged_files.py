"""Damaged files of every kind that Penstock reads, made by a seed, through every reader (control path).

Bytes flipped, cut, filled, moved; and words and numbers changed with every checksum made right again, so that the
readers themselves must notice. What must stay true: a reader gives something, or refuses with an error of Penstock's
own; nothing is read or written out of bounds (`make asan` runs this under the sanitizers), and nothing hangs.
Not changed under a right checksum: pages of window state, which are the kernel's own memory. What would tell that they
are wrong is to build them anew from the log.

    damaged_files.py [--seed S] [--times N] [--only log,batch,snapshot,state,model] [--at I]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from offline.shop_log import SHOP, fill

from penstock import Engine
from penstock._ext import log as native
from penstock._ext import snapshot as native_snapshot
from penstock._ext.windows import Output, WindowStore
from penstock.errors import PenstockError
from penstock.features.snapshot import SnapshotPosition, load_snapshot, write_snapshot
from penstock.models.onnx_graph import only_output
from penstock.models.trees import NotATreeModel, load_trees
from penstock.offline.batches import Batch, BatchStore, records_from_batch
from penstock.offline.compaction import compact
from penstock.offline.history import History
from penstock.offline.keeper import take_snapshot
from penstock.offline.log_folder import LogFolder
from penstock.offline.options import LogOptions
from penstock.offline.parity import parity

PAGE = native_snapshot.PAGE
OPTIONS = LogOptions(segment_bytes=1 << 16, keeper=False)
SECONDS = 100  # that one variant may take
WORDS = (0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 65535, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32)
WORDS += ((1 << 61) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 16)


class Hung(BaseException):
    """A reader did not end."""


@contextlib.contextmanager
def refusing(*also: type[Exception]) -> Iterator[None]:
    """What a reader may raise; anything else is a fault."""
    with contextlib.suppress(PenstockError, *also):
        yield


# ---- damage


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flips, cuts, blocks filled or moved: what disks and copies do."""
    out = bytearray(data)
    kind = rng.choice(["flip", "flip", "flip", "cut", "fill", "move", "grow", "empty"])
    at = rng.randrange(len(out)) if out else 0
    if kind == "flip" and out:
        for _ in range(rng.choice([1, 1, 2, 8])):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del out[at:]
    elif kind == "fill":
        size = min(rng.choice([1, 4, 8, 512]), len(out) - at)
        out[at : at + size] = bytes([rng.choice([0, 255])]) * size
    elif kind == "move":
        size = rng.choice([8, 64, 512])
        part = out[at : at + size]
        to = rng.randrange(len(out)) if out else 0
        out[to : to + len(part)] = part
    elif kind == "grow":
        out[at:at] = rng.randbytes(rng.choice([1, 8, 100]))
    else:
        del out[:]
    return bytes(out)


def changed_word(rng: random.Random, data: bytearray, start: int, end: int) -> None:
    """One number anywhere in data[start:end] becomes another."""
    size = rng.choice([1, 2, 4, 4, 8])
    if end - start < size:
        return
    at = rng.randrange(start, end - size + 1)
    if rng.random() < 0.7:
        at -= (at - start) % size
    old = int.from_bytes(data[at : at + size], "little")
    new = rng.choice([rng.choice(WORDS), old + 1, old - 1, old ^ 1 << rng.randrange(8 * size), rng.getrandbits(64)])
    data[at : at + size] = (new % (1 << 8 * size)).to_bytes(size, "little")


def changed_json(rng: random.Random, value: Any) -> Any:
    """One leaf of a JSON value becomes another number or text, or is gone."""
    places: list[tuple[Any, Any]] = []

    def look(node: Any) -> None:
        for key, inner in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            if isinstance(inner, dict | list):
                look(inner)

    look(value)
    node, key = rng.choice(places)
    old = node[key]
    kind = rng.randrange(6)
    if kind == 0:
        del node[key]
    elif kind == 1:
        node[key] = rng.choice([None, "", "x" * 300, [], {}, True, 1.5, "../../x"])
    elif isinstance(old, int):
        node[key] = rng.choice([*WORDS[:-4], -1, -2, old + 1, old - 1, -old])
    elif isinstance(old, str) and old:
        node[key] = damaged_bytes(rng, old.encode()).decode("utf-8", "replace")
    elif isinstance(old, list) and old:
        node[key] = rng.choice([old * 2, old[:-1], old[::-1]])
    return value


def damage_file(rng: random.Random, path: Path) -> None:
    path.write_bytes(damaged_bytes(rng, path.read_bytes()))


# ---- logs


def read_folder(folder: Path) -> None:
    """What `log verify`, a start, parity, a snapshot and compaction read."""
    with refusing():
        log = LogFolder(folder)
        for segment in log.segments():
            with refusing():
                log.check(segment)
    with refusing():
        history = History(LogFolder(folder))
        history.check()
        for batch in history.batches:
            records_from_batch(history.store, batch)
    with refusing():
        parity(str(SHOP), folder)
    with refusing(), Engine(str(SHOP), log=folder, log_options=OPTIONS) as engine:
        fill(engine, 5, seed=3, first=2000)
    with refusing():
        take_snapshot(folder)
    with refusing():
        compact(folder)


class Log:
    """Segments: damaged as they are, or one record changed under a right checksum."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "log"
        for run in range(2):
            with Engine(str(SHOP), log=self.folder, log_options=OPTIONS) as engine:
                fill(engine, 40, seed=run, first=run * 40)
        log = LogFolder(self.folder)
        self.log_id = log.log_id
        self.records: list[tuple[int, int, int]] = []  # segment, offset, length
        for number in log.numbers():
            segment = log.segment(number)
            at = segment.start
            while (record := native.record_at(segment.data, self.log_id, number, at)) is not None:
                self.records.append((number, at, record.length))
                at += record.length
            segment.close()

    def damage(self, rng: random.Random, folder: Path) -> None:
        shutil.copytree(self.folder, folder)
        if rng.random() < 0.2:
            damage_file(rng, rng.choice(sorted(p for p in folder.rglob("*") if p.is_file())))
            return
        number, at, length = rng.choice(self.records[:12] if rng.random() < 0.3 else self.records)
        path = folder / "segments" / f"{number:012d}.log"
        data = bytearray(path.read_bytes())
        for _ in range(rng.choice([1, 1, 2])):
            # The words in front say how the others are read: they are hit as often as all the others.
            end = rng.choice([at + 16, at + 32, at + length])
            changed_word(rng, data, at + 8, min(end, at + length))
        native.put_record(data, self.log_id, number, at, length)
        path.write_bytes(data)

    def read(self, folder: Path) -> None:
        read_folder(folder)


class Compacted:
    """Parquet: the files and manifests damaged as they are, or columns changed under right checksums."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "compacted"
        for run in range(2):
            with Engine(str(SHOP), log=self.folder, log_options=OPTIONS) as engine:
                fill(engine, 40, seed=run, first=run * 40)
        take_snapshot(self.folder)
        compact(self.folder)
        assert BatchStore.of(LogFolder(self.folder)).batches()

    def damage(self, rng: random.Random, folder: Path) -> None:
        shutil.copytree(self.folder, folder)
        if rng.random() < 0.5:
            shutil.rmtree(folder / "snapshots")
        store = BatchStore.of(LogFolder(folder))
        batch = rng.choice(store.batches())
        kind = rng.randrange(4)
        if kind == 0:
            damage_file(rng, rng.choice(sorted(p for p in (folder / "parquet").rglob("*") if p.is_file())))
        elif kind == 1:
            changed = changed_json(rng, json.loads(msgspec.json.encode(batch)))
            with contextlib.suppress(msgspec.ValidationError):
                store.put_batch(msgspec.structs.replace(msgspec.convert(changed, Batch), name=batch.name))
        else:
            self.change_column(rng, folder / "parquet" / rng.choice(batch.files).path)
            with refusing():
                built = records_from_batch(store, batch, check=False)
                store.put_batch(msgspec.structs.replace(batch, crc32c=native_snapshot.crc32c(built.data)))

    def change_column(self, rng: random.Random, path: Path) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        table = parquet.read_table(path, partitioning=None)
        at = rng.randrange(table.num_columns)
        name, kind = table.column_names[at], table.schema.types[at]
        values = table.column(at).to_pylist()
        row = rng.randrange(len(values))
        old = values[row]
        if rng.random() < 0.1:
            parquet.write_table(table.drop_columns([name]), path)
            return
        if rng.random() < 0.15:
            values[row] = None
        elif isinstance(old, bytes):
            data = bytearray(old or b"\0")
            changed_word(rng, data, 0, len(data))
            values[row] = bytes(data) if rng.random() < 0.7 else damaged_bytes(rng, bytes(data))
            if pa.types.is_fixed_size_binary(kind):
                values[row] = values[row][: kind.byte_width].ljust(kind.byte_width, b"\xff")
        elif isinstance(old, str):
            values[row] = rng.choice(["", old * 2, old[:-1], "\0", "x" * 70_000])
        elif isinstance(old, list):
            values[row] = rng.choice([[], old * 2, old[:-1], [3] * 300])
        elif isinstance(old, bool):
            values[row] = not old
        elif isinstance(old, float):
            values[row] = rng.choice([float("nan"), float("inf"), -0.0, 1e308])
        else:
            values[row] = rng.choice([0, 1, -1, (1 << 31) - 1, (1 << 62), -(1 << 62), values[row - 1]])
        try:
            array = pa.array(values, type=kind)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            return
        parquet.write_table(table.set_column(at, table.schema.field(at).with_nullable(True), array), path)

    def read(self, folder: Path) -> None:
        read_folder(folder)


# ---- window state

FINGERPRINT = 0x0123456789ABCDEF
OUTPUTS = [
    Output("count", window=50),
    Output("sum", 0, window=1000),
    Output("var_samp", 0, window=50),
    Output("max", 0),
    Output("min", 0, window=400),
    Output("first", 1, window=1000),
    Output("last", 1),
    Output("distinct_count", 1, window=1000),
]


def make_store() -> WindowStore:
    return WindowStore(["float64", "string"], OUTPUTS, lateness=20, fingerprint=FINGERPRINT, max_bytes=1 << 28)


def apply(store: WindowStore, rng: random.Random, n: int, start: int) -> None:
    for t in range(start, start + n):
        key = rng.choice([rng.randrange(40), f"key {rng.randrange(40)}", "a long key: " + "k" * rng.randrange(40)])
        row = [rng.choice([None, 0.1, rng.gauss(0, 1e10), 1e-300]), rng.choice([None, f"text {rng.randint(0, 60)}"])]
        store.apply("busy" if rng.random() < 0.4 else key, t - rng.choice([0, 0, 20]), row, sequence=t)


def use_store(store: WindowStore) -> None:
    """Everything that walks the state."""
    keys = store.keys()
    at = min(max(store.stats().watermark, -1000), 1 << 60)
    for key in [*keys, "unknown"]:
        for as_of in (at, at - 20, at + 40):
            store.read(key, 0, as_of)
    apply(store, random.Random(1), 300, at)
    for key in keys[::7]:
        store.erase(key)
    for _ in range(20):
        store.sweep(at + 10_000, 64)
    store.dump()


class State:
    """Dumps of window state: cut, or of another size, layout or format by their head."""

    HEAD = 40  # bytes that say what the dump is; it has no checksum

    def __init__(self, folder: Path) -> None:
        store = make_store()
        apply(store, random.Random(5), 2000, 100)
        self.dump = store.dump()

    def damage(self, rng: random.Random, folder: Path) -> None:
        folder.mkdir()
        data = bytearray(self.dump)
        kind = rng.randrange(3)
        if kind == 0:
            del data[rng.randrange(len(data)) :]
        elif kind == 1:
            data += bytes(rng.choice([1, 15, 16, 4096]))
        else:
            changed_word(rng, data, 0, self.HEAD)
        (folder / "dump").write_bytes(data)

    def read(self, folder: Path) -> None:
        store = make_store()
        apply(store, random.Random(6), 50, 100)
        before = store.dump()
        try:
            store.load((folder / "dump").read_bytes())
        except (ValueError, MemoryError):
            assert store.dump() == before, "a dump that is refused changes nothing"
        use_store(store)


class Snapshot:
    """A base and a delta: damaged as they are, or their headers or the manifest changed under right checksums."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "snapshots"
        store, rng = make_store(), random.Random(5)
        apply(store, rng, 2000, 100)
        self.write(store, 1, None)
        apply(store, rng, 3, 2100)
        self.write(store, 2, load_snapshot(self.folder, {FINGERPRINT: make_store()}))
        assert list(self.folder.rglob("*.delta"))

    def write(self, store: WindowStore, sequence: int, previous: Any) -> None:
        position = SnapshotPosition(log_id=1, sequence=sequence, ingest_time=1, watermarks={"A": 1}, created=1)
        write_snapshot(self.folder, {FINGERPRINT: store}, position, previous)

    def damage(self, rng: random.Random, folder: Path) -> None:
        shutil.copytree(self.folder, folder)
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        path = rng.choice(files)
        data = bytearray(path.read_bytes())
        if rng.random() < 0.2:
            data = bytearray(damaged_bytes(rng, bytes(data)))
        elif path.suffix == ".json":
            manifest = changed_json(rng, json.loads(data)["manifest"])
            body = json.dumps(manifest, separators=(",", ":"))
            data = bytearray(f'{{"crc32c":"{native_snapshot.crc32c(body.encode()):08x}","manifest":{body}}}'.encode())
        else:
            for _ in range(rng.choice([1, 1, 3])):
                changed_word(rng, data, 0, 128)
            data[PAGE - 4 : PAGE] = native_snapshot.crc32c(bytes(data[: PAGE - 4])).to_bytes(4, "little")
        path.write_bytes(data)

    def read(self, folder: Path) -> None:
        store = make_store()
        with refusing(MemoryError):
            if load_snapshot(folder, {FINGERPRINT: store}) is not None:
                use_store(store)


# ---- models


@functools.cache
def model_files() -> dict[str, bytes]:
    """A small file of each format, from the libraries that are there."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(300, 5))
    x[::7, 2] = np.nan
    x[:, 4] = rng.integers(0, 6, 300)
    y = (x[:, 0] + x[:, 1] > 0).astype(int)
    found: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as name, contextlib.suppress(ImportError):
        import xgboost

        folder = Path(name)
        for objective in ("binary:logistic", "multi:softprob"):
            label = y if objective.startswith("b") else rng.integers(0, 3, 300)
            data = xgboost.DMatrix(x, label)
            parameters = {"objective": objective, "max_depth": 3, "nthread": 1}
            parameters |= {"num_class": 3} if objective.startswith("m") else {}
            booster = xgboost.train(parameters, data, 3)
            for suffix in ("json", "ubj"):
                booster.save_model(folder / f"m.{suffix}")
                found[f"{objective[:5]}.{suffix}"] = (folder / f"m.{suffix}").read_bytes()
    with contextlib.suppress(ImportError):
        import lightgbm

        parameters = {"objective": "binary", "num_leaves": 6, "verbose": -1, "num_threads": 1, "min_data_in_leaf": 2}
        trained = lightgbm.train(parameters, lightgbm.Dataset(x, y, categorical_feature=[4]), 4)
        found["binary.txt"] = trained.model_to_string().encode()
    with contextlib.suppress(ImportError):
        from skl2onnx import to_onnx
        from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier

        whole = np.nan_to_num(x)
        for kind in (GradientBoostingClassifier, RandomForestClassifier):
            model = kind(n_estimators=3, max_depth=3, random_state=1).fit(whole, y)
            found[f"{kind.__name__}.onnx"] = to_onnx(model, whole[:1].astype(np.float32)).SerializeToString()
    return found


class Model:
    """Model files: bytes, or the numbers in them."""

    def __init__(self, folder: Path) -> None:
        self.files = model_files()
        print(f"model files: {', '.join(sorted(self.files))}")

    def damage(self, rng: random.Random, folder: Path) -> None:
        folder.mkdir()
        name = rng.choice(sorted(self.files))
        data = self.files[name]
        if rng.random() < 0.3:
            data = damaged_bytes(rng, data)
        elif name.endswith((".txt", ".json")):
            numbers = list(re.finditer(rb"-?\d+(\.\d+)?([eE][-+]?\d+)?", data))
            for at in sorted(rng.sample(numbers, rng.choice([1, 1, 2])), key=lambda m: -m.start()):
                new = rng.choice([b"-1", b"0", b"1", b"2", b"7", b"255", b"65536", b"2147483647", b"4294967296"])
                new = rng.choice([new, b"-2147483648", b"18446744073709551615", b"1e999", b"1e-320", b"0.5", b""])
                data = data[: at.start()] + new + data[at.end() :]
        else:
            changed = bytearray(data)
            for _ in range(rng.choice([1, 2])):
                changed_word(rng, changed, 0, len(changed))
            data = bytes(changed)
        (folder / name).write_bytes(data)

    def read(self, folder: Path) -> None:
        (path,) = folder.iterdir()
        if path.suffix == ".onnx":
            with refusing(ValueError):
                only_output(path.read_bytes(), None, lambda ports, name: 0)
        try:
            model = load_trees(path)
        except (ValueError, NotATreeModel, MemoryError):
            return
        rows = np.random.default_rng(1).normal(size=(9, min(model.n_inputs, 100_000)))
        rows[0], rows[1], rows[2] = np.nan, np.inf, -1e300
        if rows.shape[1] == model.n_inputs:
            model.predict(rows)


KINDS: dict[str, Callable[[Path], Any]] = {
    "state": State,
    "snapshot": Snapshot,
    "model": Model,
    "log": Log,
    "batch": Compacted,
}
VARIANTS = {"state": 200, "snapshot": 400, "model": 500, "log": 120, "batch": 80}


def run(kind: str, seed: int, wanted: range, folder: Path) -> list[str]:
    """The variants that failed, as lines to repeat them by."""
    made = KINDS[kind](folder)
    failed = []

    def hung(*_: Any) -> None:
        raise Hung(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hung)
    try:
        for i in wanted:
            where = f"--seed {seed} --only {kind} --at {i}"
            print(where, flush=True)  # the last line of a run that dies
            work = folder / f"{kind}-{i}"
            signal.alarm(SECONDS)
            try:
                made.damage(random.Random(f"{seed} {kind} {i}"), work)
                made.read(work)
            except (Exception, Hung):
                traceback.print_exc()
                failed.append(where)
            finally:
                signal.alarm(0)
            shutil.rmtree(work, ignore_errors=True)
    finally:
        signal.signal(signal.SIGALRM, before)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument("--times", type=int, default=1, help="so many times what `make asan` runs")
    parser.add_argument("--only", default=",".join(KINDS))
    parser.add_argument("--at", type=int, help="run this variant alone")
    given = parser.parse_args()
    seed = given.seed or int.from_bytes(os.urandom(4), "little")
    failed = []
    counts = []
    began = time.monotonic()
    for kind in given.only.split(","):
        wanted = range(given.times * VARIANTS[kind]) if given.at is None else range(given.at, given.at + 1)
        with tempfile.TemporaryDirectory() as folder:
            failed += run(kind, seed, wanted, Path(folder))
        counts.append(f"{len(wanted)} of {kind} ({time.monotonic() - began:.0f} s)")
    for where in failed:
        print(f"failed: {where}")
    print(f"damaged files: {', '.join(counts)}, seed {seed}, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
