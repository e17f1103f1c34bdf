"""Training sets for the user's own spine (control path): what each feature was at each row's time, from the event log.

What must stay true: one output row per spine row, in its order (S10); a row sees what scoring at its (T, K) would have
seen (S5), through the same kernels, bit for bit; and nothing depends on how the work was split.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from .._ext.decision import STATUSES
from .._ext.spine import FunctionRun
from ..app import App, load_plan
from ..engine import Engine
from ..errors import PenstockError
from ..plan import Plan
from ..tables import _constant, _default, arrow_table, one_array, pyarrow
from .history import History
from .spine import MOST_PARTS, PRESENT, Asked, Feature, Job, Task, Times, history_events, open_history

__all__ = ["TrainingSummary", "training_set"]

Done = Callable[[int, int], None]

CHUNK = 1 << 18  # rows that are joined at once
LEAST_STATE = 4 << 20  # bytes: the state of one partition gets no less
AGED, WIDE = 0x40, 0x80  # flags of a status (ext/row.h)
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


class TrainingSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What a training set's rows were. own: rows that are one of the log's own events; as_of_time: the others that have
    a value which is no count of 0; nothing: those that have none. warnings: what should be heard, a sentence each."""

    rows: int
    own: int
    as_of_time: int
    nothing: int
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (
            f"{self.rows:,} rows: {self.own:,} found their own event in the log, {self.as_of_time:,} are as of their "
            f"time, {self.nothing:,} found nothing"
        )


def training_set(
    app: App | Plan,
    log: str | Path,
    spine: Any,
    *,
    features: Sequence[str] | None = None,
    pipeline: str | None = None,
    time: str | None = None,
    sequence: str | None = None,
    backfill: bool = False,
    statuses: bool = False,
    workers: int | None = None,
    memory: str | int = "1GiB",
    out: str | Path | None = None,
    progress: Done | None = None,
    on: str = "threads",
    own: str = "auto",
    summary: Callable[[TrainingSummary], None] | None = None,
) -> Any:
    """The spine with features as of each row's time T, computed from an event log.

    spine: a table (pyarrow, polars, pandas, a dict of columns). It holds the keys, named as the views' key field or
    entity, a time column, and whatever else; all columns are kept. A row without a key reads as an unknown entity.
    features: names of views ("spend") and of features ("spend.mean_amount_7d"). pipeline: instead, all features of a
    pipeline: the spine is read as its events, its request fields are columns of the spine, and its on-demand functions
    are computed on the joined row. With neither, the app's only pipeline.
    time: the column with T; left out, the event type's time field, or the spine's only timestamp column.

    A row that is one of the log's own events gets what scoring that event gave: what had been applied before it, and
    INVALID where the online state had given up its T (S14). It is that event if the event id is the same; without one,
    if the key, the time and every field of the event that the spine has are equal; of several equal events each row
    takes the next, in log order, and rows beyond them the last. own="never" looks for none.
    Any other row sees events with event time <= T and ingest time <= T (S5) that were applied; late and quarantined
    ones were not; it is read from all of history, however old T is.
    sequence: a column with the sequence before which events count, in place of both: K as a score was logged with it.
    backfill: every event with event time <= T counts, whenever it came, in the order S6; of a row that is one of the
    log's own events those before it in that order.
    A view with include_request_event counts the row itself as the newest event at T (S8): its own event, and of another
    row, without `backfill`, the row: the spine then needs the columns that the view aggregates.
    A function that fails gives null. statuses: beside each feature a column `{feature}__status` (S17).
    summary: told what the rows were; without it, what should not be passed over is a UserWarning.

    workers: threads (default: one per core); on="ray": tasks of a Ray cluster that reaches the log folder. memory: what
    the state of all workers may take together; keys are split over as many passes as that needs.
    out: a path or URI of one Parquet file, which appears when it is whole; the number of rows is returned.
    progress: told (events done, events in all) over all passes.
    Raises PenstockError or EventError where the spine does not fit, LogError where history cannot be read.
    """
    if on not in ("threads", "ray"):
        raise ValueError(f'on: expected "threads" or "ray", got {on!r}')
    if own not in ("auto", "never"):
        raise ValueError(f'own: expected "auto" or "never", got {own!r}')
    asked = Asked(
        features=None if features is None else tuple([features] if isinstance(features, str) else features),
        pipeline=pipeline,
        time=time,
        sequence=sequence,
        backfill=backfill,
        own=own,
    )
    plan = app if isinstance(app, Plan) else load_plan(app)
    names = {name for event in plan.events.values() for name in event.slots} | {time or "", sequence or ""}
    job = Job(plan, arrow_table(spine, names), asked)
    history = open_history(log)
    if workers is None:
        workers = len(os.sched_getaffinity(0))
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    budget = max(LEAST_STATE, _bytes(memory) // workers)
    folder = None if out is None else tempfile.mkdtemp(prefix="penstock-training-")
    try:
        portable = portable_app(app) if on == "ray" else ""
        tasks = job.tasks(history, workers, budget)
        events = history_events(history)
        tally = Tally(events * (1 + len(tasks)), progress)
        told = 0

        def tell(n: int) -> None:
            nonlocal told
            told += n
            tally.add(n)

        job.find(history, tell)
        tally.add(max(0, events - told))
        if on == "ray":
            from .ray_job import run_tasks

            results = run_tasks(portable, log, history, job, tasks, budget, folder, tally)
        else:
            results = _run_threads(job, history, tasks, workers, budget, folder, tally)
        told_rows = _summary(job, results, max(0, history.first_sequence))
        if summary is not None:
            summary(told_rows)
        else:
            for sentence in told_rows.warnings:
                warnings.warn(sentence, stacklevel=2)
        if out is None:
            tables = list(_joined(job, results, statuses))
            return pyarrow().concat_tables(tables)
        return _write(_joined(job, results, statuses), out)
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _summary(job: Job, results: dict[int, list[Any]], begins: int) -> TrainingSummary:
    """What the rows were, and what is wrong with them all. begins: the first event that history still has."""
    anything = np.zeros(job.spine.num_rows, dtype=bool)
    for tables in results.values():
        for table in tables:
            anything[np.asarray(table.column("row"))] |= np.asarray(table.column("any")) != 0
    reads = job.reads
    others = int((~anything & (reads.own < 0)).sum())
    rows = job.spine.num_rows
    said = []
    if reads.blind and not anything.any():
        said.append(
            "every feature of every row is null or 0: history was ingested after its time, and a row sees what had been"
            f" ingested by its own ({reads.blind:,} rows before anything was); backfill=True (--backfill) counts it"
        )
    elif 2 * reads.blind > rows:
        said.append(
            f"{reads.blind:,} rows see nothing, for nothing had been ingested by their time; history that was ingested "
            "later counts with backfill=True (--backfill)"
        )
    if 2 * reads.loaded > reads.found and not job.asked.backfill and job.sequences is None:
        said.append(
            f"history was loaded after its time: the events of {reads.loaded:,} rows came in later than they happened,"
            " by more than their lateness, and these rows see what was loaded before them; with backfill=True"
            " (--backfill) they see what happened before them"
        )
    if 100 * reads.near >= max(1, rows):
        said.append(
            f"{reads.near:,} rows have the key and time of a logged event but are none, for they differ in "
            f"{', '.join(reads.differs)}; they are read as of their time, and such an event counts in it"
        )
    if begins:
        said.append(
            f"history begins at event {begins:,}: features whose windows reach further back are null and INVALID"
        )
    if reads.moved:
        said.append(
            f"{reads.moved:,} rows have the id of a logged event and another time: they see nothing that came in behind"
            ' that event; own="never" reads them as of their time'
        )
    return TrainingSummary(
        rows=rows,
        own=reads.found,
        as_of_time=rows - reads.found - others,
        nothing=others,
        warnings=tuple(said),
    )


def _joined(job: Job, results: dict[int, list[Any]], statuses: bool) -> Iterator[Any]:
    """The output in chunks: the spine's columns, then the features, by row number."""
    wide = {
        (u, c)
        for u, tables in results.items()
        for c, output in enumerate(job.units[u].outputs)
        if output.type == "int64"
        and any((np.asarray(table.column(f"s{c}")) & WIDE).any() for table in tables if table.num_rows)
    }
    rows = {u: [np.asarray(table.column("row")) for table in tables] for u, tables in results.items()}
    functions = _Functions(job) if any(f.kind == "function" for f in job.features) else None
    for low in range(0, max(1, job.spine.num_rows), CHUNK):
        high = min(low + CHUNK, job.spine.num_rows)
        parts: dict[tuple[int, int], _Values] = {}
        for u, tables in results.items():
            for c, output in enumerate(job.units[u].outputs):
                parts[u, c] = _Values.gathered(output.type, tables, rows[u], c, low, high)
        computed = functions.run(parts, low, high) if functions is not None else {}
        table = job.spine.slice(low, high - low)
        for feature in job.features:
            if feature.kind == "field":
                array, codes = _field(job, feature, low, high)
                if feature.name not in table.column_names:
                    table = table.append_column(feature.name, array)
            else:
                is_view = feature.kind == "view"
                values = parts[feature.unit, feature.index] if is_view else computed[feature.index]
                is_wide = is_view and (feature.unit, feature.index) in wide
                table = table.append_column(feature.name, values.array(is_wide))
                codes = values.codes()
            if statuses:
                table = table.append_column(f"{feature.name}__status", _words(codes))
        yield table


def _field(job: Job, feature: Feature, low: int, high: int) -> tuple[Any, Any]:
    """A request field as a column, and its statuses."""
    assert job.pipeline is not None
    pa = pyarrow()
    event = job.plan.events[job.pipeline.event]
    field = event.fields[feature.index]
    if feature.index == event.time:
        array = pa.array(job.times[low:high]).cast(pa.timestamp("us", "UTC"))
    elif feature.name in job.spine.column_names:
        array = job.spine.column(feature.name).slice(low, high - low)
    else:
        array = _constant(_default(field), field.type, high - low)
    null = np.asarray(array.is_null(nan_is_null=True))
    return array, np.where(null, STATUSES.index("NULL_VALUE"), PRESENT).astype(np.uint8)


class _Values(msgspec.Struct):
    """A feature over a chunk of rows: 8 bytes and a status per row, or strings."""

    type: str
    data: npt.NDArray[np.int64]
    status: npt.NDArray[np.uint8]
    text: Any = None

    @classmethod
    def gathered(cls, kind: str, tables: list[Any], rows: list[Times], column: int, low: int, high: int) -> _Values:
        """Rows low..high of one output, out of the partitions' results."""
        pa = pyarrow()
        n = high - low
        values = cls(kind, np.zeros(0 if kind == "string" else n, dtype=np.int64), np.zeros(n, dtype=np.uint8))
        texts, places = [], []
        for table, numbers in zip(tables, rows):
            first, last = np.searchsorted(numbers, [low, high]).tolist()
            if first == last:
                continue
            place = numbers[first:last] - low
            values.status[place] = np.asarray(table.column(f"s{column}").slice(first, last - first))
            part = table.column(f"v{column}").slice(first, last - first)
            if kind == "string":
                texts.append(one_array(part))
                places.append(place)
            else:
                values.data[place] = np.asarray(part)
        if kind == "string":
            inverse = np.empty(n, dtype=np.int64)
            if texts:
                inverse[np.concatenate(places)] = np.arange(n)
            together = pa.concat_arrays(texts) if texts else pa.array([], type=pa.large_string())
            values.text = together.take(pa.array(inverse))
        return values

    def array(self, wide: bool = False) -> Any:
        """As an Arrow array. wide: some value of the column, in whatever chunk, is beyond int64 (S13)."""
        pa = pyarrow()
        if self.type == "string":
            return self.text.cast(pa.string())
        absent = (self.status & 7) != PRESENT
        mask = absent if absent.any() else None
        if self.type == "float64":
            return pa.array(self.data.view(np.float64), mask=mask)
        if self.type == "bool":
            return pa.array(self.data != 0, mask=mask)
        if self.type == "timestamp":
            return pa.array(self.data, mask=mask).cast(pa.timestamp("us", "UTC"))
        if wide:
            is_wide = (self.status & WIDE) != 0
            return pa.array(np.where(is_wide, self.data.view(np.float64), self.data.astype(np.float64)), mask=mask)
        return pa.array(self.data, mask=mask)

    def codes(self) -> npt.NDArray[np.uint8]:
        """Statuses (S17); a default in place of a value that was too old has that value's."""
        aged = (self.status & AGED) != 0
        return np.where(aged, STATUSES.index("OUTSIDE_MAX_AGE"), self.status & 7).astype(np.uint8)


class _Functions:
    """The pipeline's on-demand functions over joined rows, by the engine's own step."""

    def __init__(self, job: Job) -> None:
        assert job.pipeline is not None
        assert job.event_columns is not None
        self.job = job
        pipeline = job.pipeline
        self.steps = job.functions()
        asked_event, self.reader, self.columns = job.event_columns
        event = msgspec.structs.replace(asked_event, index=0, stores=[])
        nothing: dict[str, Any] = {"reads": [], "experiments": [], "models": [], "rules": []}
        bare = msgspec.structs.replace(pipeline, index=0, functions=self.steps, score=None, fallback=None, **nothing)
        plan = msgspec.structs.replace(
            job.plan, events={event.name: event}, stores=[], views={}, pipelines={pipeline.name: bare}
        )
        self.engine = Engine(plan)
        self.run_ = FunctionRun(self.engine.core, self.reader, self.columns, len(pipeline.slots))
        self.slot_of = pipeline.slot_types

    def run(self, parts: dict[tuple[int, int], _Values], low: int, high: int) -> dict[int, _Values]:
        """Slot -> values, for rows low..high; parts: the views' features of these rows."""
        pa = pyarrow()
        n = high - low
        fixed, texts, keep = [], [], []
        for (u, c), values in parts.items():
            slot = self.slot_of[self.job.units[u].outputs[c].name][0]
            status = values.status.ctypes.data
            if values.type == "string":
                text = values.text if values.text.offset == 0 else pa.concat_arrays([values.text])
                buffers = text.buffers()
                keep.append(text)
                texts.append((slot, buffers[1].address, buffers[2].address if buffers[2] is not None else 0, status))
            else:
                fixed.append((slot, values.data.ctypes.data, status))
        found: dict[int, _Values] = {}
        out = []
        for step in self.steps:
            values = _Values(step.type, np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.uint8))
            found[step.slot] = values
            out.append((step.slot, step.type == "string", values.data.ctypes.data, values.status.ctypes.data))
        strings, _, _ = self.run_.run(low, n, fixed, texts, out)
        for step, text in zip(self.steps, strings):
            if text is not None:
                found[step.slot].text = pa.array(text, type=pa.large_string())
        return found


# ------------------------------------------------------------------------------------------------------------- workers


class Tally:
    """Events done and to do over all passes, told to whoever asked."""

    def __init__(self, total: int, progress: Done | None) -> None:
        self.total = total
        self.done = 0
        self.progress = progress
        self._lock = threading.Lock()

    def add(self, done: int, more: int = 0) -> None:
        """So many events more are done, and so many more are to do."""
        if self.progress is None:
            return
        with self._lock:
            self.done += done
            self.total += more
            self.progress(min(self.done, self.total), self.total)


def _run_threads(
    job: Job, history: History, tasks: list[Task], workers: int, budget: int, folder: str | None, tally: Tally
) -> dict[int, list[Any]]:
    """Every task on a thread (a pass runs without the GIL); tables by unit, kept in `folder` where there is one."""
    events = history_events(history)
    stopped = threading.Event()

    def work(task: Task) -> tuple[Task, Any]:
        told = 0

        def tell(n: int) -> None:
            nonlocal told
            if stopped.is_set():
                raise _Stopped
            told += n
            tally.add(n)

        table = job.run(task, history, budget, tell)
        tally.add(max(0, events - told))
        return task, kept(table, folder, task)

    results: dict[int, list[Any]] = {u: [] for u in range(len(job.units))}
    with ThreadPoolExecutor(workers, thread_name_prefix="penstock-training") as pool:
        waiting: set[Future[tuple[Task, Any]]] = {pool.submit(work, task) for task in tasks}
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    task, table = future.result()
                    if table is None:
                        check_split(task, budget)
                        tally.add(0, 2 * events)
                        waiting |= {pool.submit(work, half) for half in task.halves()}
                    else:
                        results[task.unit].append(table)
        except BaseException:
            stopped.set()
            for future in waiting:
                future.cancel()
            raise
    return results


class _Stopped(Exception):
    """Another worker failed: what this one does is not needed any more."""


def check_split(task: Task, budget: int) -> None:
    """Raises PenstockError where halving the keys of a task again would not help."""
    if task.parts >= MOST_PARTS:
        raise PenstockError(
            f"the state of 1 in {task.parts} keys does not fit into {budget / 2**20:,.1f} MiB, a worker's share; "
            "give more memory= or fewer workers="
        )


def kept(table: Any, folder: str | None, task: Task) -> Any:
    """A result as a file of the folder, mapped; without a folder as it is."""
    if table is None or folder is None:
        return table
    pa = pyarrow()
    path = f"{folder}/{task.unit}-{task.part}-{task.parts}.arrow"
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return pa.ipc.open_file(pa.memory_map(path)).read_all()


def _write(tables: Iterator[Any], out: str | Path) -> int:
    """One Parquet file, which appears when it is whole. Returns its rows."""
    import pyarrow.parquet as pq

    from .asof import _discard, _place

    files, path = _place(out)
    draft = path + ".part"
    written = 0
    writer: Any = None
    try:
        with files.open_output_stream(draft) as sink:
            for table in tables:
                if writer is None:
                    writer = pq.ParquetWriter(sink, table.schema, compression="zstd")
                writer.write_table(table)
                written += table.num_rows
            writer.close()
        files.move(draft, path)
    except BaseException:
        _discard(files, draft)
        raise
    return written


# ---------------------------------------------------------------------------------------------------------------- parts


def portable_app(app: App | Plan) -> str:
    """An app as another process can load it: the path of its file, or the name of its module."""
    if isinstance(app, ModuleType):
        path = getattr(app, "__file__", None)
        return str(Path(path).resolve()) if path else app.__name__
    if isinstance(app, str | Path):
        text = str(app)
        return str(Path(text).resolve()) if text.endswith(".py") or "/" in text else text
    raise PenstockError(
        "an app that other processes load is a path to a Python file or a module, not a mapping or a Plan"
    )


def _words(codes: npt.NDArray[np.uint8]) -> Any:
    pa = pyarrow()
    words = pa.array(list(STATUSES), type=pa.string())
    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), words).cast(pa.string())


def _bytes(memory: str | int) -> int:
    """Bytes of "1GiB", "512MB", or a number."""
    if isinstance(memory, int):
        size = memory
    else:
        digits = memory.strip().rstrip("BKMGi")
        unit = memory.strip()[len(digits) :].strip() or "B"
        try:
            size = int(float(digits) * UNITS[unit])
        except (KeyError, ValueError):
            raise ValueError(f'memory: expected a size such as "1GiB", got {memory!r}') from None
    if size < 1:
        raise ValueError(f"memory: expected a size above 0, got {memory!r}")
    return size
