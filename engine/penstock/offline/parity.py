"""Parity (control path): every logged score's features computed anew from the log at its own (T, K), and compared.

What must stay true: equal means the same bits and the same status; a report that says "equal" has compared every row it
counts; what could not be compared is counted apart, never as equal and never as a mismatch.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from .._ext.decision import STATUSES
from .._ext.history import HistoryRun
from .._ext.log import ingest_times
from ..app import App, load_plan
from ..engine import Engine
from ..errors import LogError, PenstockError
from ..terminal import table
from ..timestamp import Timestamp
from .history import History
from .log_folder import LogFolder
from .recovery import fed, mappings_of
from .schemas import SEMANTICS, ScoreSchema

__all__ = ["FeatureParity", "Mismatch", "ParityReport", "PipelineParity", "TimeParity", "parity"]

Done = Callable[[int, int], None]


class Mismatch(msgspec.Struct, frozen=True, kw_only=True):
    """One value that differs: which decision, as of when, what was served and what the log gives."""

    decision: str
    sequence: int
    as_of: str
    served: Any
    served_status: str
    computed: Any
    computed_status: str


class FeatureParity(msgspec.Struct, kw_only=True):
    """One feature over all logged scores. missing: rows logged without it, which the app has now; extra: rows logged
    with it, which the app has no more; erased: rows of an entity that was erased on request; before: rows whose window
    reaches back to what retention dropped."""

    name: str
    compared: int = 0
    equal: int = 0
    mismatched: int = 0
    missing: int = 0
    extra: int = 0
    erased: int = 0
    before: int = 0
    examples: list[Mismatch] = []


class TimeParity(msgspec.Struct, frozen=True, kw_only=True):
    """Scores against a training set that was asked for with T alone. in_flight: rows that differ, and between whose
    T and scoring events came in, which T alone leaves out, or that had come in by T themselves (S5): no mismatch."""

    compared: int
    equal: int
    in_flight: int
    mismatched: int
    features: list[str]  # that differ in a row that no event in flight explains


class PipelineParity(msgspec.Struct, kw_only=True):
    """One pipeline: its logged scores, its features, and its decisions where models were given."""

    name: str
    scores: int
    features: list[FeatureParity]
    decisions: FeatureParity | None
    other_plans: int = 0
    not_found: int = 0
    by_time: TimeParity | None = None
    sampled: int | None = None  # scores that were compared, where not all were
    older: int = 0  # scores that a Penstock of older rules logged: not compared


class ParityReport(msgspec.Struct, kw_only=True):
    """What was compared. ok: not one value differs."""

    log: str
    events: int
    pipelines: list[PipelineParity]
    history_begins: int = 0
    independent: bool = False

    @property
    def ok(self) -> bool:
        return not any(p.by_time is not None and p.by_time.mismatched for p in self.pipelines) and not any(
            f.mismatched for p in self.pipelines for f in [*p.features, *([p.decisions] if p.decisions else [])]
        )

    @property
    def compared(self) -> int:
        """Values that were compared."""
        return sum(f.compared for p in self.pipelines for f in p.features)

    def __str__(self) -> str:
        lines: list[str] = []
        for pipeline in self.pipelines:
            sampled = "" if pipeline.sampled is None else f", {pipeline.sampled:,} of them sampled"
            lines.append(
                f"pipeline {pipeline.name}: {pipeline.scores:,} logged scores{sampled}, {self.events:,} events"
            )
            rows = [*pipeline.features, *([pipeline.decisions] if pipeline.decisions else [])]
            header = ["feature", "compared", "equal", "mismatched", "missing", "extra", "erased", "before history"]
            lines.append(
                table(
                    header,
                    [
                        [
                            f.name,
                            *(
                                f"{n:,}"
                                for n in (f.compared, f.equal, f.mismatched, f.missing, f.extra, f.erased, f.before)
                            ),
                        ]
                        for f in rows
                    ],
                )
            )
            for feature in rows:
                for m in feature.examples[:3]:
                    lines.append(
                        f"  {feature.name}: decision {m.decision} as of {m.as_of}: served {m.served!r} "
                        f"({m.served_status}), the log gives {m.computed!r} ({m.computed_status})"
                    )
            if pipeline.older:
                lines.append(
                    f"  {pipeline.older:,} scores were logged by an older Penstock, whose windows could be wrong: they "
                    "are not compared"
                )
            if pipeline.other_plans:
                lines.append(
                    f"  {pipeline.other_plans:,} scores were made by another version of the pipeline or its models: "
                    "their features are compared by name, their decisions are not"
                )
            if self.independent:
                lines.append("  recomputed from raw events without the engine: features of views alone")
            elif pipeline.decisions is None and pipeline.scores:
                lines.append("  decisions were not compared: they need the same pipeline and its model folder")
            if (t := pipeline.by_time) is not None:
                lines.append(
                    f"  by time alone: {t.compared:,} rows, {t.equal:,} equal, {t.in_flight:,} differ by "
                    f"events in flight, {t.mismatched:,} mismatched{': ' + ', '.join(t.features) if t.features else ''}"
                )
            if pipeline.not_found:
                lines.append(
                    f"  {pipeline.not_found:,} scores of an event type that the app has not, or whose event is no "
                    "longer in history"
                )
            lines.append("")
        if self.history_begins:
            lines.append(
                f"history begins at event {self.history_begins:,}: windows that reach further back were not compared"
            )
        if not self.ok:
            lines.append("MISMATCH: training would not see what serving saw")
        elif not self.compared:
            lines.append("nothing was compared: the log has no score that this app could have given")
        else:
            lines.append("equal, bit for bit")
        return "\n".join(lines)


def parity(
    app: App,
    log: str | Path,
    *,
    models: str | Path | None = None,
    pipelines: list[str] | None = None,
    by_time: bool = False,
    independent: bool = False,
    sample: int | None = None,
    seed: int = 0,
    progress: Done | None = None,
) -> ParityReport:
    """Compute every logged score's features (with `models` also its decision) anew from the log, and compare.

    by_time: also compare a training set asked for with each score's T alone; rows that differ by events in flight are
    counted apart. The folder may be in use by a server.
    independent: from raw events by slow exact arithmetic, without the engine, of `sample` scores of each pipeline
    (default 1,000; a hash with the key `seed` chooses): features of views alone, no functions and no decisions.
    Raises LogError where history cannot be read, DefinitionError for a wrong app.
    """
    if independent:
        from .independent import SAMPLE, independent_parity

        if models is not None or by_time:
            raise PenstockError("independent parity compares the features of views: leave models and by_time away")
        size = SAMPLE if sample is None else sample
        return independent_parity(app, log, pipelines=pipelines, sample=size, seed=seed, progress=progress)
    if sample is not None or seed:
        raise PenstockError("sample and seed are for independent parity; without it every score is compared")
    history = History(LogFolder(log))
    history.check()
    begins = history.first_watermarks() if history.first_sequence > 0 else None
    found: list[PipelineParity] = []
    first = _engine(app, models)
    names = pipelines if pipelines is not None else list(first.plan.pipelines)
    events = 0
    for passes, name in enumerate(names):
        engine = first if not passes else _engine(app, models)
        if name not in engine.plan.pipelines:
            raise LogError(f"no pipeline {name!r} in the app")
        plan = engine.plan.pipelines[name]
        run = HistoryRun(
            engine.core,
            [],
            None,
            [],
            plan.index,
            True,
            None,
            None,
            rows="scores",
            next_sequence=max(0, history.first_sequence),
        )
        keep: list[Any] = []
        schemas: dict[int, ScoreSchema] = {}
        for piece in history.pieces(0, 1 << 62):
            mappings = _score_mappings(engine, piece.schemas, plan.name, schemas, begins)
            keep.append(mappings)
            for _ in fed(run, piece, mappings):
                pass  # nothing is put out, so nothing fills up
            if progress is not None:
                done = passes * (history.last_sequence + 1) + run.totals["events"]
                progress(done, len(names) * (history.last_sequence + 1))
        run.done()
        totals = run.totals
        events = totals["events"]
        tally = _tally(engine, plan, run, schemas, totals["orphans"])
        if by_time:
            tally.by_time = _by_time(engine, log, history, name)
        found.append(tally)
    return ParityReport(log=str(log), events=events, pipelines=found, history_begins=max(0, history.first_sequence))


def _engine(app: App, models: str | Path | None) -> Engine:
    """An engine for replay; without a model folder an app that has models is replayed for its features."""
    plan = load_plan(app)
    has_models = any(pipeline.models for pipeline in plan.pipelines.values())
    return Engine(plan, models=models, clock="event", features_only=has_models and models is None)


def _score_mappings(
    engine: Engine,
    schemas: list[Any],
    pipeline: str,
    seen: dict[int, ScoreSchema],
    begins: dict[str, int] | None,
) -> list[Any]:
    """Mappings of a piece; only one pipeline's scores are compared."""
    mappings = mappings_of(engine, schemas, begins)
    for i, schema in enumerate(schemas):
        if isinstance(schema, ScoreSchema):
            if schema.pipeline != pipeline:
                mappings[i] = None
            else:
                seen[id(mappings[i])] = schema
    return mappings


def _by_time(engine: Engine, log: str | Path, history: History, pipeline: str) -> TimeParity:
    """Served features beside a training set of the same rows with K = ingest time <= T."""
    from .replay import backfill
    from .training import training_set

    plan = engine.plan.pipelines[pipeline]
    event = engine.plan.events[plan.event]
    served = backfill(engine.plan, log, pipeline=pipeline, spine="scores")
    spine = served.select([field.name for field in event.fields])
    time = event.fields[event.time].name
    trained = training_set(engine.plan, log, spine, pipeline=pipeline, time=time, own="never", summary=lambda _: None)
    at = np.asarray(spine.column(time).cast("int64"))
    times = np.concatenate(
        [
            np.frombuffer(ingest_times(p.data, p.log_id, p.number, p.start, p.end), dtype=np.int64).reshape(-1, 2)
            for p in history.pieces(0, 1 << 62)
        ]
    )
    # The first event that came in behind T: where it is not the scored one, T alone means another K, and events were in
    # flight, or the scored one itself had come in by its own time.
    behind = np.searchsorted(times[:, 1], at, side="right")
    first = np.append(times[:, 0], 1 << 62)[behind]
    in_flight = first != np.asarray(served.column("_sequence"))
    differs = np.zeros(len(at), dtype=bool)
    unexplained: list[str] = []
    for index in plan.features:
        name = plan.slots[index].name
        mine = served.column(name).combine_chunks()
        theirs = trained.column(name).combine_chunks().cast(mine.type)
        same = np.array([_bits(a) == _bits(b) for a, b in zip(mine.to_pylist(), theirs.to_pylist())], dtype=bool)
        differs |= ~same
        if (~same & ~in_flight).any():
            unexplained.append(name)
    return TimeParity(
        compared=len(at),
        equal=int((~differs).sum()),
        in_flight=int((differs & in_flight).sum()),
        mismatched=int((differs & ~in_flight).sum()),
        features=unexplained,
    )


def _bits(value: Any) -> Any:
    return struct.pack("<d", value) if isinstance(value, float) else value


def _tally(engine: Engine, plan: Any, run: HistoryRun, schemas: dict[int, ScoreSchema], orphans: int) -> PipelineParity:
    """Counts of every schema added up by feature name."""
    # Fields of the event are read from its own record, in serving and here: there is nothing to compare.
    features = [plan.slots[i].name for i in plan.features if plan.slots[i].kind != "field"]
    by_name: dict[str, FeatureParity] = {name: FeatureParity(name=name, examples=[]) for name in features}
    decisions = FeatureParity(name="(decision)", examples=[])
    scores = other = older = 0
    for mapping, rows, _, counts, decision_counts, examples in run.tallies:
        schema = schemas[id(mapping)]
        scores += rows
        if schema.semantics < SEMANTICS:
            older += rows
            continue
        if schema.fingerprint != plan.fingerprint or (not mapping.same_plan and not engine.features_only):
            other += rows
        if mapping.same_plan:
            decisions.compared += decision_counts[0]
            decisions.equal += decision_counts[1]
            decisions.mismatched += decision_counts[2]
            decisions.erased += decision_counts[3]
        logged = [name for name, _ in schema.values]
        for (name, _), (compared, equal, mismatched, erased, before) in zip(schema.values, counts):
            if name.startswith("score.") and compared + before == 0:
                continue
            feature = by_name.setdefault(name, FeatureParity(name=name, examples=[]))
            feature.compared += compared
            feature.equal += equal
            feature.mismatched += mismatched
            feature.erased += erased
            feature.before += before
            if compared + before == 0:
                feature.extra += rows
        for name in features:
            if name not in logged:
                by_name[name].missing += rows
        for index, sequence, decision, as_of, served, served_status, computed, computed_status in examples:
            feature = decisions if index < 0 else by_name[logged[index]]
            feature.examples.append(
                Mismatch(
                    decision=decision,
                    sequence=sequence,
                    as_of=Timestamp(as_of).isoformat(),
                    served=served,
                    served_status=STATUSES[served_status] if index >= 0 else "decision",
                    computed=computed,
                    computed_status=STATUSES[computed_status] if index >= 0 else "decision",
                )
            )
    return PipelineParity(
        name=plan.name,
        scores=scores,
        features=list(by_name.values()),
        decisions=decisions if decisions.compared else None,
        other_plans=other,
        not_found=orphans,
    )
