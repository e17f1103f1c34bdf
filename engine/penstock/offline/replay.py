"""History through a whole engine (control path): features of every logged event or score, each at its own (T, K).

`backfill` computes a pipeline's features of today over history; `parity` (parity.py) compares them with what was
served.
What must stay true: events are applied as they were judged, in log order, by the kernel that scores, so that a row has
the bits that scoring at that moment would have given it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .._ext.decision import OUTCOMES
from .._ext.history import HistoryRun
from ..app import App
from ..engine import Engine
from ..errors import PenstockError
from ..plan import PipelinePlan, Plan, Slot, suggestion
from ..tables import OutColumns, pyarrow
from .history import History
from .log_folder import LogFolder
from .recovery import fed, mappings_of

__all__ = ["backfill", "run_history"]

Done = Callable[[int, int], None]

CHUNK = 65_536  # rows of one piece of the output


def the_pipeline(engine: Engine, name: str | None) -> PipelinePlan:
    """The pipeline of a name, or the only one."""
    pipelines = engine.plan.pipelines
    if name is None and len(pipelines) == 1:
        return next(iter(pipelines.values()))
    if name is None or name not in pipelines:
        raise PenstockError(
            f"say which pipeline{'' if name is None else f', not {name!r}'}{suggestion(name or '', pipelines)}"
        )
    return pipelines[name]


def run_history(
    engine: Engine, history: History, run: HistoryRun, progress: Done | None = None
) -> Iterator[tuple[int, list[Any], list[str]]]:
    """Feed all of history to a run; gives (rows, texts, ids) whenever its output is full, and once at the end."""
    total = max(1, history.last_sequence + 1 - max(0, history.first_sequence))

    def tell() -> None:
        if progress is not None:
            progress(run.totals["events"], total)

    for piece in history.pieces(0, 1 << 62):
        for _ in fed(run, piece, mappings_of(engine, piece.schemas)):
            tell()
            yield run.output
        tell()
    run.done()
    yield run.output


def backfill(
    app: App | Plan,
    log: str | Path,
    *,
    pipeline: str | None = None,
    features: list[str] | None = None,
    spine: str = "events",
    out: str | Path | None = None,
    progress: Done | None = None,
) -> Any:
    """A pipeline's features over all of history, as scoring would have computed them at each event.

    spine: "events" gives a row per logged event of the pipeline's type, "scores" a row per logged score. features:
    names to keep (default all). out: a Parquet file, which appears when it is whole; else the table is returned.
    Columns: `_sequence`, `_ingest_time`, `_outcome` (and `id`, the decision's, for scores), the event's fields, then
    the features. Memory is bounded by the state and a piece of the output, where `out` is given.
    Raises LogError where history cannot be read.
    """
    if spine not in ("events", "scores"):
        raise PenstockError(f'spine: expected "events" or "scores", got {spine!r}')
    pa = pyarrow()
    engine = Engine(app, clock="event", features_only=True)
    plan = the_pipeline(engine, pipeline)
    event = engine.plan.events[plan.event]
    slots = _columns(plan, len(event.fields), features)
    history = History(LogFolder(log))
    history.check()
    parts: list[Any] = []
    writer: Any = None
    draft = None if out is None else Path(f"{out}.part")
    columns, places = OutColumns(slots, CHUNK), _places(CHUNK)
    run = HistoryRun(
        engine.core,
        [],
        None,
        columns.native,
        plan.index,
        True,
        None,
        None,
        rows=spine,
        next_sequence=max(0, history.first_sequence),
        capacity=CHUNK,
        places=places,
    )
    try:
        for rows, texts, ids in run_history(engine, history, run, progress):
            arrays = [
                array if text is not None else array.slice(0, rows) for array, text in zip(columns.arrays(texts), texts)
            ]
            names = [slot.name for slot in slots]
            leading = {
                "_sequence": pa.array(places[0][:rows]),
                "_ingest_time": pa.array(places[1][:rows]).cast(pa.timestamp("us", "UTC")),
                "_outcome": pa.array([OUTCOMES[code] for code in places[2][:rows].tolist()], type=pa.string()),
            }
            if spine == "scores":
                leading["id"] = pa.array(ids, type=pa.string())
            table = pa.table({**leading, **dict(zip(names, arrays))})
            if out is None:
                parts.append(table)
            else:
                if writer is None:
                    import pyarrow.parquet as pq

                    writer = pq.ParquetWriter(draft, table.schema, compression="zstd")
                if table.schema != writer.schema:
                    changed = [f.name for f, g in zip(table.schema, writer.schema) if f.type != g.type]
                    raise PenstockError(
                        f"{out}: {', '.join(changed)} has integers beyond 64 bits in a part of history; "
                        "leave `out` away, and the column becomes float64"
                    )
                writer.write_table(table)
            columns, places = OutColumns(slots, CHUNK), _places(CHUNK)
            run.set_output(columns.native, None, places)
        if draft is not None:
            writer.close()
            draft.replace(str(out))
            return None
    except BaseException:
        if draft is not None:
            draft.unlink(missing_ok=True)
        raise
    widest = {f.name: f.type for part in parts for f in part.schema if f.type == pa.float64()}
    return pa.concat_tables(
        [part.cast(pa.schema([pa.field(f.name, widest.get(f.name, f.type)) for f in part.schema])) for part in parts]
    )


def _places(rows: int) -> tuple[Any, Any, Any]:
    return np.empty(rows, dtype=np.int64), np.empty(rows, dtype=np.int64), np.empty(rows, dtype=np.uint8)


def _columns(plan: PipelinePlan, n_fields: int, features: list[str] | None) -> list[Slot]:
    """The event's fields, then the features asked for that are no fields."""
    names = [plan.slots[i].name for i in plan.features]
    for name in features or []:
        if name not in names:
            raise PenstockError(f"pipeline {plan.name}: no feature {name!r}{suggestion(name, names)}")
    wanted = [i for i in plan.features if features is None or plan.slots[i].name in features]
    return plan.slots[:n_fields] + [plan.slots[i] for i in wanted if i >= n_fields]
