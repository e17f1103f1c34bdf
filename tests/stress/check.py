"""One case through every way in (tests only): score, features, score_batch, replay, a log (restart, backfill, parity).

What must stay true: a value is equal to the bit and in its type (exact.py), its status and the outcome too; what SQL
gives may differ in the last bits of float sums alone. A difference is told, never counted as something else.
"""

from __future__ import annotations

import random
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa

from penstock import Engine, LogOptions, PenstockError, backfill, parity, training_set
from penstock.offline.compaction import compact
from penstock.offline.independent import independent_parity
from penstock.offline.keeper import take_snapshot
from penstock.plan import Plan, compile_plan
from stress import exact, sql, stream
from stress.apps import Case, Op, Source, definitions

ARROW = {
    "string": pa.string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "timestamp": pa.int64(),
}
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
WAYS = ("score", "batch", "replay", "log")


@dataclass
class Found:
    """What one case gave: how much was compared, and the differences."""

    values: int = 0
    sql_values: int = 0
    differences: list[str] = field(default_factory=list)


class Checker:
    def __init__(self, case: Case, most_reads: int = 150, most_cells: int = 8_000) -> None:
        self.case = case
        self.app = case.app
        self.definitions = definitions(case.app)
        self.plan: Plan = compile_plan(self.definitions)
        self.found = Found()
        self.rng = random.Random(case.seed + 1)
        # A first decision that a restart read from the log has no features yet, whoever asks again (S16 says it has).
        self.restarted = False
        outputs = sum(len(v.outputs) for v in self.plan.views.values())
        self.most = max(20, min(most_reads, most_cells // max(1, outputs)))
        self.types = {o.name: o.type for v in self.plan.views.values() for o in v.outputs}

    def run(self, ways: tuple[str, ...] = WAYS) -> Found:
        self.prepare()
        for way in ways:
            try:
                getattr(self, way)()
            except PenstockError as error:  # the engine takes every event and every read of a case
                self.tell(f"{way}: {type(error).__name__}: {error}")
        return self.found

    def tell(self, text: str) -> None:
        self.found.differences.append(text)

    # what is expected

    def expect(self, streamed: stream.Stream, reads: list[stream.Read]) -> dict[stream.Read, dict[str, exact.Value]]:
        """Values by exact fractions, and some of them by SQL too, compared."""
        expected = exact.read_all(streamed, reads)
        some = self.rng.sample(reads, min(len(reads), max(20, self.most // 4)))
        for read, name, value, status, slack in sql.read_all(self.plan, streamed, some):
            mine, my_status = expected[read][name]
            self.found.sql_values += 1
            if status != my_status or not sql.close(mine, value, slack):
                self.tell(f"the oracles differ: {name} at {read}: exact {mine!r} {my_status}, SQL {value!r} {status}")
        return expected

    def sample(self, numbers: list[int]) -> list[int]:
        """Some of them: the last ones, and others at random."""
        if len(numbers) <= self.most:
            return numbers
        last = self.most // 4
        return sorted(self.rng.sample(numbers[:-last], self.most - last)) + numbers[-last:]

    def same(self, where: str, name: str, got: Any, got_status: str | None, expected: exact.Value) -> None:
        value, status = expected
        self.found.values += 1
        if got_status is not None and got_status != status:
            self.tell(f"{where}: {name}: status {got_status} with {got!r}, right: {status} with {value!r}")
            return
        if bits(got, self.types[name]) != bits(value, self.types[name]):
            self.tell(f"{where}: {name}: {got!r}, right: {value!r} {status}")

    # ways in

    def event(self, op: Op, number: int) -> Any:
        """As a Struct or as a dict: the same."""
        return self.plan.events[op.source].type(**op.row) if number % 2 else op.row

    def steps(self, engine: Engine) -> Iterator[tuple[int, Op, Any]]:
        for number, op in enumerate(self.case.ops):
            if op.kind == "ingest":
                yield number, op, engine.ingest(self.event(op, number), event=op.source)
            else:
                yield number, op, self.scored(engine, number, op)

    def scored(self, engine: Engine, number: int, op: Op) -> Any:
        return engine.score(self.event(op, number), op.kind != "try", pipeline=f"p_{op.source}", explain=True)

    def prepare(self) -> None:
        """What the stream must give: a sample of its events, scored or not, and reads as of random admissible T."""
        self.straight = stream.run(self.case)
        sources = self.app.pipelines
        self.chosen = set(self.sample([n for n, op in enumerate(self.case.ops) if op.source in sources]))
        reads = dict.fromkeys(r for n in self.chosen for r in self.answers(n))
        self.asked = self.asked_between()
        reads.update(dict.fromkeys(r for some in self.asked.values() for r in some))
        self.expected = self.expect(self.straight, list(reads))

    def answers(self, number: int) -> list[stream.Read]:
        """Reads of an event: its own, and where it was scored before, those of its first decision."""
        verdict = self.straight.verdicts[number]
        first = [] if verdict.first is None else self.straight.verdicts[verdict.first].reads.values()
        return [*verdict.reads.values(), *first]

    def score(self) -> None:
        """One by one, as Structs and dicts."""
        engine = Engine(self.plan)
        for number, op, got in self.steps(engine):
            self.same_step(f"score, event {number}", self.straight, self.expected, number, op, got)
            self.same_features("features", engine, number)
        counted = engine.core.counters()["outcomes"]
        if counted != self.straight.outcomes:
            self.tell(f"outcomes: {counted}, right: {self.straight.outcomes}")

    def same_step(
        self,
        where: str,
        streamed: stream.Stream,
        expected: dict[stream.Read, dict[str, exact.Value]],
        number: int,
        op: Op,
        got: Any,
    ) -> None:
        verdict = streamed.verdicts[number]
        outcome = got if op.kind == "ingest" else got.outcome
        if outcome != verdict.outcome:
            self.tell(f"{where}: outcome {outcome}, right: {verdict.outcome}")
        if op.kind == "ingest" or number not in self.chosen:
            return
        answered = verdict if verdict.first is None else streamed.verdicts[verdict.first]
        features, statuses = got.features, got.statuses
        if features is None:
            if verdict.first is None or not self.restarted:
                self.tell(f"{where}: no features; a repeated event has those of its first decision")
            return
        for read in answered.reads.values():
            for name, value in expected[read].items():
                self.same(where, name, features[name], statuses[name], value)
        if got.degraded is not self.degraded(number):
            self.tell(f"{where}: degraded {got.degraded!r}, right: {self.degraded(number)}")

    def degraded(self, number: int) -> bool:
        """Whether a scored event's decision is: it read an INVALID value, or the event was not applied as it should."""
        verdict = self.straight.verdicts[number]
        answered = verdict if verdict.first is None else self.straight.verdicts[verdict.first]
        invalid = (s == "INVALID" for r in answered.reads.values() for _, s in self.expected[r].values())
        return answered.outcome in ("late", "quarantined") or any(invalid)

    def asked_between(self) -> dict[int, list[stream.Read]]:
        """Reads by features(): number of an event -> reads after it; a few in the stream, more at its end."""
        last = len(self.case.ops) - 1
        share = max(4, self.most // 8)
        found: dict[int, list[stream.Read]] = {}
        for number in [*(self.rng.randint(0, last) for _ in range(share)), *[last] * share]:
            view = self.rng.choice(self.app.views)
            newest = self.straight.verdicts[number].watermarks[view.source]
            if newest == stream.NEVER:
                continue
            event = self.rng.choice(self.straight.seen[view.source])
            key = stream.key_of(self.app, view, event.row[stream.key_field(view, view.source)])
            key = (str, "never seen") if self.rng.random() < 0.05 else key
            at = self.time(int(newest), self.app.source(view.source))
            found.setdefault(number, []).append(stream.Read(view.name, key, at, number + 1, None, newest))
        return found

    def same_features(self, where: str, engine: Engine, number: int) -> None:
        for read in self.asked.get(number, ()):
            found = engine.features(read.view, [read.key[1]], as_of=read.at)
            for name, value in self.expected[read].items():
                self.same(
                    f"{where} after event {number}, {read}", name, found.rows[0][name], found.statuses[0][name], value
                )

    def time(self, newest: int, source: Source) -> int:
        """A T that state must still reach."""
        oldest = newest - source.lateness
        ahead = self.rng.choice((0, 1, 10**6, 86400 * 10**6, 400 * 86400 * 10**6))
        return self.rng.choice((newest, oldest, self.rng.randint(oldest, newest), newest + ahead))

    def batch(self) -> None:
        """Runs of scored events as tables; a repeated event's features are read anew there."""
        engine = Engine(self.plan)
        operations = self.case.ops
        number = 0
        while number < len(operations):
            op = operations[number]
            end = number + 1
            while end < len(operations) and (operations[end].kind, operations[end].source) == (op.kind, op.source):
                if op.kind == "ingest" and operations[end].row["at"] < operations[end - 1].row["at"]:
                    break  # ingest() puts the rows of a table in the order of time
                end += 1
            rows = [o.row for o in operations[number:end]]
            table = as_table(rows, self.app.source(op.source))
            if op.kind == "ingest":
                self.same_outcomes(engine.ingest(table, event=op.source), number, end)
                number = end
                continue
            result = engine.score_batch(table, op.kind != "try", pipeline=f"p_{op.source}", explain=True)
            outcomes = result.column("outcome").to_pylist()
            columns = {name: result.column(name).to_pylist() for name in self.types}
            degraded = result.column("degraded").to_pylist()
            for i in range(number, end):
                verdict = self.straight.verdicts[i]
                if outcomes[i - number] != verdict.outcome:
                    self.tell(f"score_batch, event {i}: outcome {outcomes[i - number]}, right: {verdict.outcome}")
                if i in self.chosen:
                    if degraded[i - number] is not self.degraded(i):
                        self.tell(f"score_batch, event {i}: degraded {degraded[i - number]}, right: {self.degraded(i)}")
                    for read in verdict.reads.values():
                        for name, value in self.expected[read].items():
                            value = as_column(value, result.schema.field(name).type)
                            self.same(f"score_batch, event {i}", name, columns[name][i - number], None, value)
            number = end

    def same_outcomes(self, counts: dict[str, int], start: int, end: int) -> None:
        found = [v.outcome for v in self.straight.verdicts[start:end]]
        right = {word: found.count(word) for word in found}
        if {word: n for word, n in counts.items() if n} != right:
            self.tell(f"ingest of a table, events {start} to {end}: {counts}, right: {right}")

    def replay(self) -> None:
        """Every event as history: merged by time, equal times in the order of the tables, then of the rows."""
        pipeline = self.app.pipelines[0]
        names = [s.name for s in self.app.sources]
        ops = [o for o in self.case.ops if o.kind != "try"]
        ordered = sorted(ops, key=lambda o: (o.row["at"], names.index(o.source)))
        ordered = [Op("score" if o.source == pipeline else "ingest", o.source, o.row) for o in ordered]
        streamed = stream.run(self.case, ordered, event_clock=True)
        places = [n for n, o in enumerate(ordered) if o.source == pipeline]
        if not places:
            return
        chosen = set(self.sample(places)[-self.most // 2 :])
        reads = dict.fromkeys(r for n in chosen for r in streamed.verdicts[n].reads.values())
        expected = self.expect(streamed, list(reads))
        tables = {s.name: as_table([o.row for o in ordered if o.source == s.name], s) for s in self.app.sources}
        result = Engine(self.plan, clock="event").replay(tables, out=f"p_{pipeline}", decisions=True)
        outcomes = result.column("outcome").to_pylist()
        columns = {name: result.column(name).to_pylist() for name in self.types}
        for i, number in enumerate(places):
            verdict = streamed.verdicts[number]
            if outcomes[i] != verdict.outcome:
                self.tell(f"replay, row {i}: outcome {outcomes[i]}, right: {verdict.outcome}")
            if number in chosen:
                for read in verdict.reads.values():
                    for name, value in expected[read].items():
                        value = as_column(value, result.schema.field(name).type)
                        self.same(f"replay, row {i}", name, columns[name][i], None, value)

    def log(self) -> None:
        """With a log: the same answers over restarts, from a snapshot or without, then backfill and parity over it."""
        with tempfile.TemporaryDirectory(prefix="penstock-stress-") as folder:
            for number, op, got in self.steps_with_restarts(folder):
                self.same_step(f"with a log, event {number}", self.straight, self.expected, number, op, got)
            for name in self.app.pipelines:
                self.same_backfill(folder, name)
                self.same_training(folder, name)
            report = parity(self.definitions, folder)
            scores = {p.name: p.scores for p in report.pipelines}
            for p in report.pipelines:
                logged = [
                    n
                    for n, (op, v) in enumerate(zip(self.case.ops, self.straight.verdicts))
                    if op.kind == "score" and f"p_{op.source}" == p.name and v.first is None
                ]
                if scores[p.name] != len(logged):
                    self.tell(f"parity: {p.name} has {scores[p.name]} scores, right: {len(logged)}")
            for said in (report, independent_parity(self.definitions, folder, sample=20, seed=self.case.seed)):
                if not said.ok:
                    self.tell(f"parity: {said}")

    def steps_with_restarts(self, folder: str) -> Iterator[tuple[int, Op, Any]]:
        options = LogOptions(sync="never", keeper=False)
        restarts = {self.rng.randrange(len(self.case.ops)) for _ in range(self.rng.randint(1, 3))}
        engine = Engine(self.plan, log=folder, log_options=options)
        try:
            for number, op in enumerate(self.case.ops):
                if number in restarts:
                    self.restarted = True
                    engine.close()
                    if self.rng.random() < 0.6:
                        take_snapshot(folder)
                    if self.rng.random() < 0.3:
                        compact(folder)
                    engine = Engine(self.plan, log=folder, log_options=options)
                if op.kind == "ingest":
                    yield number, op, engine.ingest(self.event(op, number), event=op.source)
                else:
                    yield number, op, self.scored(engine, number, op)
                self.same_features("features with a log", engine, number)
        finally:
            engine.close()

    def same_backfill(self, folder: str, source: str) -> None:
        # A repeated event that was not scored before is in the log once more, before its score.
        numbers = [
            n
            for n, (op, v) in enumerate(zip(self.case.ops, self.straight.verdicts))
            if op.source == source
            and op.kind != "try"
            and (v.outcome != "duplicate" or (op.kind == "score" and v.first is None))
        ]
        result = backfill(self.definitions, folder, pipeline=f"p_{source}", spine="events")
        if result.num_rows != len(numbers):
            self.tell(f"backfill: {result.num_rows} rows, right: {len(numbers)}")
            return
        columns = {name: result.column(name).to_pylist() for name in self.types} if numbers else {}
        outcomes = result.column("_outcome").to_pylist()
        for i, number in enumerate(numbers):
            verdict = self.straight.verdicts[number]
            if outcomes[i] != verdict.outcome:
                self.tell(f"backfill, event {number}: outcome {outcomes[i]}, right: {verdict.outcome}")
            for read in verdict.reads.values() if number in self.chosen else ():
                for name, value in self.expected[read].items():
                    value = as_column(value, result.schema.field(name).type)
                    self.same(f"backfill, event {number}", name, columns[name][i], None, value)

    def same_training(self, folder: str, source: str) -> None:
        """A training set over some of the log's own events gives what scoring them gave, INVALID too (S5)."""
        event = self.app.source(source)
        twice = {o.row.get(event.event_id) for o, v in self.logged(source) if v.outcome == "duplicate"}
        numbers = [
            n
            for n in sorted(self.chosen)
            if self.case.ops[n].source == source
            and self.case.ops[n].kind != "try"
            and self.straight.verdicts[n].outcome != "duplicate"
            and (event.event_id is None or self.case.ops[n].row[event.event_id] not in twice)
        ]
        if event.event_id is None:
            # Of equal events the rows take one after the other, so all of them must be there.
            seen = {n: self.case.ops[n].row for n in range(len(self.case.ops)) if self.case.ops[n].kind != "try"}
            numbers = [n for n in numbers if not any(seen[m] == seen[n] for m in seen if m != n)]
        if not numbers:
            return
        spine = as_table([self.case.ops[n].row for n in numbers], event)
        times = spine.schema.get_field_index("at")
        spine = spine.set_column(times, "at", spine.column("at").cast(pa.timestamp("us", "UTC")))
        result = training_set(
            self.definitions, folder, spine, pipeline=f"p_{source}", time="at", statuses=True, workers=1, summary=str
        )
        for name in self.types:
            values = result.column(name).to_pylist()
            statuses = result.column(f"{name}__status").to_pylist()
            kind = result.schema.field(name).type
            view = name.split(".")[0]
            for i, number in enumerate(numbers):
                value = as_column(self.expected[self.straight.verdicts[number].reads[view]][name], kind)
                self.same(f"training set, event {number}", name, values[i], statuses[i], value)

    def logged(self, source: str) -> list[tuple[Op, stream.Verdict]]:
        """Operations that the log has an event of: a repeated one too, where it was not scored before."""
        return [
            (o, v)
            for o, v in zip(self.case.ops, self.straight.verdicts)
            if o.source == source
            and o.kind != "try"
            and (v.outcome != "duplicate" or (o.kind == "score" and v.first is None))
        ]


def bits(value: Any, kind: str) -> Any:
    """A value as what it must equal to the bit. A feature of floats is a float, whatever its default was written as."""
    if value is None:
        return None
    if isinstance(value, datetime):
        return int((value - EPOCH) // timedelta(microseconds=1))
    if kind == "float64":
        return struct.pack("<d", value)
    if isinstance(value, float):
        return ("float", struct.pack("<d", value))
    return (bool, value) if isinstance(value, bool) else int(value) if isinstance(value, int) else value


def as_column(value: exact.Value, kind: pa.DataType) -> exact.Value:
    """A column of integers with one beyond 64 bits is float64 (S13)."""
    if pa.types.is_floating(kind) and isinstance(value[0], int) and not isinstance(value[0], bool):
        return float(value[0]), value[1]
    return value


def as_table(rows: list[dict[str, Any]], source: Source) -> pa.Table:
    return pa.table(
        {f.name: pa.array([r[f.name] for r in rows], type=ARROW[f.type], from_pandas=False) for f in source.fields}
    )
