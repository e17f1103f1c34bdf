"""Views by DuckDB (tests only): SQL made from the Plan, over the list of visible events, one query per view.

Written from SEMANTICS alone; it shares no code with the kernel or with exact.py, whose answers it is compared with.
What must stay true: counts, integers, min, max, first, last and every status are exact; sums of floats are DuckDB's own
(compensated) ones, and near.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import duckdb
import pyarrow as pa

from penstock.plan import EventPlan, Output, Plan, StorePlan, ViewPlan
from stress.apps import App, View
from stress.stream import NEVER, Read, Seen, Stream, key_field, key_of

TYPES = {
    "string": pa.string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "timestamp": pa.int64(),
}
SMALL = 2**52  # squares of integers up to here, 2,000 of them, times 2,000 stay within HUGEINT


def condition_sql(tree: Any) -> str:
    match tree:
        case ("is true", column):
            return f"e.{column}"
        case ("null", column):
            return f"(e.{column} IS NULL)"
        case ("not null", column):
            return f"(e.{column} IS NOT NULL)"
        case ("not", inner):
            return f"(NOT {condition_sql(inner)})"
        case ("and" | "or" as word, a, b):
            return f"({condition_sql(a)} {word.upper()} {condition_sql(b)})"
        case ("in", column, values):
            return f"(e.{column} IN ({', '.join(literal(v) for v in values)}))"
        case (operator, column, value):
            return f"(e.{column} {'=' if operator == '==' else operator} {literal(value)})"
    raise ValueError(tree)


def literal(value: Any) -> str:
    if isinstance(value, tuple):
        value = value[1]
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, float):
        return f"CAST('{value!r}' AS DOUBLE)"
    if isinstance(value, int):
        return f"CAST('{value}' AS HUGEINT)"
    return "'" + value.replace("'", "''") + "'"


class SqlViews:
    """One stream's events in a database, and the queries of its Plan's views."""

    def __init__(self, plan: Plan, stream: Stream, connection: duckdb.DuckDBPyConnection) -> None:
        self.plan = plan
        self.stream = stream
        self.app: App = stream.app
        self.connection = connection
        self.keys: dict[tuple[str, Any], int] = {}

    def key(self, view: View, key: Any) -> int:
        return self.keys.setdefault((view.name, key), len(self.keys))

    def read(self, view: View, reads: list[Read]) -> Iterator[tuple[Read, str, Any, str, float]]:
        plan = self.plan.views[view.name]
        store = self.plan.stores[plan.store]
        event = self.plan.events[plan.event]
        seen = self.stream.seen[view.source]
        columns = {
            "number": pa.array([e.number for e in seen], pa.int64()),
            "at_": pa.array([e.at for e in seen], pa.int64()),
            "applied_": pa.array([e.applied for e in seen], pa.bool_()),
            "key_": pa.array(
                [self.key(view, key_of(self.app, view, e.row[key_field(view, view.source)])) for e in seen], pa.int64()
            ),
        }
        for f in event.fields:
            columns[f.name] = pa.array([e.row[f.name] for e in seen], TYPES[f.type], from_pandas=False)
        asked = {
            "read": pa.array(range(len(reads)), pa.int64()),
            "key_": pa.array([self.key(view, r.key) for r in reads], pa.int64()),
            "t": pa.array([r.at for r in reads], pa.int64()),
            "before": pa.array([r.before for r in reads], pa.int64()),
            "own": pa.array([-1 if r.own is None else r.own for r in reads], pa.int64()),
            "watermark": pa.array([None if r.watermark == NEVER else int(r.watermark) for r in reads], pa.int64()),
        }
        self.connection.register("events_", pa.table(columns))
        self.connection.register("reads_", pa.table(asked))
        rows = self.connection.execute(self.query(view, plan, store, seen)).fetchall()
        self.connection.unregister("events_")
        self.connection.unregister("reads_")
        if len(rows) != len(reads):
            raise AssertionError(f"{len(rows)} rows for {len(reads)} reads")
        slack = [self.slack(o, store, event, seen) for o in plan.outputs]
        for row in rows:
            for i, output in enumerate(plan.outputs):
                if slack[i] is not None:
                    yield reads[row[0]], output.name, row[1 + 2 * i], row[2 + 2 * i], slack[i]

    def slack(self, o: Output, store: StorePlan, event: EventPlan, seen: list[Seen]) -> float | None:
        """How far a float may be off by rounding at every step; None where squares leave the double range."""
        if o.function not in ("sum", "mean", "var_samp", "var_pop", "stddev_samp", "stddev_pop"):
            return 0.0
        assert o.column is not None
        field = event.fields[store.columns[o.column]]
        if field.type != "float64" and o.function in ("sum", "mean"):
            return 0.0
        largest = max((abs(e.row[field.name]) for e in seen if e.row[field.name] is not None), default=0)
        if largest > 1e150:
            return None
        off = 1e-13 * float(largest) * max(1, len(seen))
        return off * off + 1e-300 if o.function.startswith("var") else off + 1e-150

    def query(self, view: View, plan: ViewPlan, store: StorePlan, seen: Any) -> str:
        retention = getattr(plan, "retention", view.retention)
        longest = [o.window for o in plan.outputs]
        reach = retention if None in longest else max(longest)
        apart = None if retention is None else f"CAST({retention} AS HUGEINT) + {store.lateness}"
        restart = "FALSE" if apart is None else f"at_ > newest + {apart}"
        own_restart = "FALSE" if apart is None else f"r.own >= 0 AND r.t > n.newest + {apart}"
        reached = "TRUE" if reach is None else f"e.at_ >= CAST(r.t AS HUGEINT) - {reach}"
        event = self.plan.events[plan.event]
        wheres = self.conditions(view, store)
        huge = {
            f.name: any(e.row[f.name] is not None and abs(e.row[f.name]) > SMALL for e in seen)
            for f in event.fields
            if f.type in ("int64", "timestamp")
        }
        parts, finals = [], []
        for i, o in enumerate(plan.outputs):
            column = None if o.column is None else event.fields[store.columns[o.column]]
            made, value, status = output_sql(i, o, column, wheres, column is not None and huge.get(column.name, False))
            parts += made
            finals.append(self.final(i, o, value, status))
        made = "".join(f",\n  {part}" for part in parts)
        given = "".join(f",\n  {final}" for final in finals)
        fields = ", ".join(f"e.{f.name}" for f in event.fields)
        return f"""
WITH runs AS (
  SELECT *, CASE WHEN NOT applied_ THEN 0 WHEN {restart} THEN 1 ELSE 0 END AS anew FROM (
    SELECT *, max(at_) FILTER (applied_) OVER (PARTITION BY key_ ORDER BY number
      ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS newest FROM events_)
), lives AS (
  SELECT *, sum(anew) OVER (PARTITION BY key_ ORDER BY number) AS life,
    row_number() OVER (ORDER BY at_, number) AS place FROM runs
), now AS (
  SELECT r.*, n.life, coalesce({own_restart}, FALSE) AS own_anew FROM reads_ r LEFT JOIN (
    SELECT r.read, max(l.life) AS life, max(l.at_) AS newest FROM reads_ r
    JOIN lives l ON l.key_ = r.key_ AND l.applied_ AND l.number < r.before GROUP BY r.read) n ON n.read = r.read
), e AS (
  SELECT r.read, e.at_, e.place, CAST(r.t AS HUGEINT) - e.at_ AS age, {reached} AS reached, {fields}
  FROM now r JOIN lives e ON e.key_ = r.key_ AND e.at_ <= r.t
    AND ((e.applied_ AND e.number < r.before AND e.life = r.life AND NOT r.own_anew) OR e.number = r.own)
), known AS (
  SELECT * FROM e WHERE e.read IN (SELECT read FROM e WHERE reached)
), groups AS (
  SELECT e.read{made}
  FROM known e GROUP BY e.read
), given AS (
  SELECT r.read, r.t, coalesce(r.t < r.watermark - CAST({store.lateness} AS HUGEINT), FALSE) AS gone,
    g.read IS NOT NULL AS known, g.* EXCLUDE (read)
  FROM reads_ r LEFT JOIN groups g ON g.read = r.read
)
SELECT read{given}
FROM given ORDER BY read"""

    def conditions(self, view: View, store: StorePlan) -> list[str]:
        """SQL of the store's where= texts, by the trees that they were written from."""
        from stress.apps import condition_text

        trees = {
            condition_text(a.where): a.where
            for v in self.app.views
            if v.source == view.source
            for a in v.aggregates
            if a.where is not None
        }
        return [condition_sql(trees[text]) for text in store.wheres]

    def final(self, i: int, o: Output, value: str, status: str) -> str:
        """Value and status: INVALID before everything, then what was found, then the default."""
        v, s = f"v{i}", f"s{i}"
        if o.default is None:
            return (
                f"CASE WHEN gone THEN NULL ELSE {value} END AS {v},\n"
                f"  CASE WHEN gone THEN 'INVALID' ELSE {status} END AS {s}"
            )
        stands = literal(o.default)
        return (
            f"CASE WHEN gone OR {status} = 'INVALID' THEN NULL ELSE coalesce({value}, {stands}) END AS {v},\n"
            f"  CASE WHEN gone THEN 'INVALID' WHEN {status} IN ('NULL_VALUE', 'NOT_FOUND') THEN 'PRESENT' "
            f"ELSE {status} END AS {s}"
        )


def output_sql(i: int, o: Output, column: Any, wheres: list[str], huge: bool) -> tuple[list[str], str, str]:
    """(aggregates of the group, value, status) of one output."""
    tests = []
    if o.window is not None:
        tests.append(f"e.age < {o.window}" if o.closed == "right" else f"e.age <= {o.window}")
    if o.closed == "left":
        tests.append("e.age > 0")
    if o.where is not None:
        tests.append(f"coalesce({wheres[o.where]}, FALSE)")
    x = None if column is None else f"e.{column.name}"
    if x is not None:
        tests.append(f"{x} IS NOT NULL")
    rows = f"FILTER (WHERE {' AND '.join(tests)})" if tests else ""
    n = f"coalesce(n{i}, 0)"
    counted = [f"count(*) {rows} AS n{i}"]
    nothing = "CASE WHEN known THEN 'NULL_VALUE' ELSE 'NOT_FOUND' END"
    plain = f"CASE WHEN {n} = 0 THEN {nothing} ELSE 'PRESENT' END"
    function = o.function
    if function in ("count", "count_col"):
        return counted, n, "'PRESENT'"
    assert column is not None
    if function == "distinct_count":
        return [f"count(DISTINCT {x}) {rows} AS n{i}"], n, "'PRESENT'"
    if function in ("min", "max"):
        return [*counted, f"{function}({x}) {rows} AS x{i}"], f"x{i}", plain
    if function in ("first", "last"):
        pick = "arg_min" if function == "first" else "arg_max"
        made = [*counted, f"{pick}({x}, e.place) {rows} AS x{i}", f"{pick}(e.age, e.place) {rows} AS a{i}"]
        if o.ttl is None:
            return made, f"x{i}", plain
        old = f"a{i} > {o.ttl}"
        return (
            made,
            f"CASE WHEN {old} THEN NULL ELSE x{i} END",
            f"CASE WHEN {n} = 0 THEN {nothing} WHEN {old} THEN 'OUTSIDE_MAX_AGE' ELSE 'PRESENT' END",
        )
    integers = column.type != "float64"
    if integers:
        made = [*counted, f"sum(CAST({x} AS HUGEINT)) {rows} AS sx{i}"]
    else:
        made = [*counted, f"fsum({x}) {rows} AS sx{i}"]
    if function == "sum":
        return made, f"sx{i}", plain
    if function == "mean":
        return made, f"sx{i} / CAST(n{i} AS DOUBLE)", plain
    few = 2 if function.endswith("samp") else 1
    status = f"CASE WHEN {n} = 0 THEN {nothing} WHEN {n} < {few} THEN 'NULL_VALUE' ELSE 'PRESENT' END"
    divisor = f"(CAST(n{i} AS DOUBLE) * {f'(n{i} - 1)' if few == 2 else f'n{i}'})"
    if integers and not huge:
        made.append(f"sum(CAST({x} AS HUGEINT) * CAST({x} AS HUGEINT)) {rows} AS sxx{i}")
        variance = f"(CAST(n{i} * sxx{i} - sx{i} * sx{i} AS DOUBLE) / {divisor})"
    else:
        # Two passes, about the mean: what is left of large numbers of little spread is the exact oracle's business.
        made = [*counted, f"list(CAST({x} AS DOUBLE)) {rows} AS l{i}"]
        mean = f"list_sum(l{i}) / n{i}"
        variance = (
            f"(list_sum(list_transform(l{i}, lambda x: (x - {mean}) * (x - {mean}))) / "
            f"{f'(n{i} - 1)' if few == 2 else f'n{i}'})"
        )
    value = variance if function.startswith("var") else f"sqrt(greatest({variance}, 0))"
    return made, f"CASE WHEN {n} < {few} THEN NULL ELSE {value} END", status


def read_all(plan: Plan, stream: Stream, reads: list[Read]) -> Iterator[tuple[Read, str, Any, str, float]]:
    """(read, feature, value, status, how far a float may be off) of every output of every read."""
    with duckdb.connect(config={"threads": 1}) as connection:
        connection.execute("SET enable_progress_bar = false")
        views = SqlViews(plan, stream, connection)
        for view in stream.app.views:
            mine = [r for r in reads if r.view == view.name]
            if mine:
                yield from views.read(view, mine)


def close(mine: Any, other: Any, slack: float = 0.0) -> bool:
    """Equal; floats that were computed, nearly."""
    if mine is None or other is None:
        return mine is None and other is None
    if isinstance(mine, float) or isinstance(other, float):
        return math.isclose(float(mine), float(other), rel_tol=1e-9, abs_tol=slack)
    return bool(mine == other)
