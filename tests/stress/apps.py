"""Random apps and streams, and the Python text that defines them (tests only).

What must stay true: a Case is plain data that a seed gives and a shrinker can cut; the engine is built from the text
that `source_of` writes, so that a reproduction is what ran. Times are integers of microseconds, null is None.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

BASE = 1_000_000_000_000_000  # 2001: a stream lasts 20 years at most, and the wall clock is behind none of it
FAR = 4_200_000_000_000_000  # 2103: ahead of every clock, so quarantined whatever max_skew is
SECOND, HOUR, DAY = 10**6, 3600 * 10**6, 86400 * 10**6
FIRST = -62_135_596_800_000_000  # year 1
LONGEST = 200 * 366 * DAY
NUMERIC = ("sum", "mean", "min", "max", "var_samp", "var_pop", "stddev_samp", "stddev_pop")
ANY_TYPE = ("count", "first", "last", "distinct_count")
ANNOTATION = {"float64": "float", "int64": "int", "bool": "bool", "string": "str", "timestamp": "Timestamp"}


@dataclass(frozen=True)
class Field:
    name: str
    type: str
    optional: bool = False


@dataclass(frozen=True)
class Source:
    name: str
    fields: tuple[Field, ...]
    lateness: int
    max_skew: int
    event_id: str | None

    def type_of(self, name: str) -> str:
        return next(f.type for f in self.fields if f.name == name)


@dataclass(frozen=True)
class Aggregate:
    function: str
    column: str | None
    windows: tuple[int | None, ...]  # None: Lifetime
    where: Any = None  # a tree of conditions.py
    default: Any = None
    closed: str = "right"
    ttl: int | None = None
    name: str | None = None


@dataclass(frozen=True)
class View:
    name: str
    source: str
    entity: str
    key: str | None  # the source's field; None: the entity's own
    aggregates: tuple[Aggregate, ...]
    include: bool
    retention: int | None = None


@dataclass(frozen=True)
class App:
    sources: tuple[Source, ...]
    entities: tuple[tuple[str, str | None], ...]  # name -> "str", "int" or None, its field's own
    views: tuple[View, ...]
    pipelines: tuple[str, ...]  # the source each scores; pipeline p_<source> has every view

    def source(self, name: str) -> Source:
        return next(s for s in self.sources if s.name == name)


@dataclass(frozen=True)
class Op:
    kind: str  # score, try, ingest
    source: str
    row: dict[str, Any]


@dataclass(frozen=True)
class Case:
    app: App
    ops: tuple[Op, ...]
    seed: int = 0


# conditions of where=: (head, ...) trees with three readings: Penstock's text, Python's value, SQL's text


def condition_text(tree: Any) -> str:
    match tree:
        case ("is true", column):
            return column
        case ("null", column):
            return f"{column} is null"
        case ("not null", column):
            return f"{column} is not null"
        case ("not", inner):
            return f"(not {condition_text(inner)})"
        case ("and" | "or" as word, a, b):
            return f"({condition_text(a)} {word} {condition_text(b)})"
        case ("in", column, values):
            return f"({column} in ({', '.join(_literal(v) for v in values)}))"
        case (operator, column, value):
            return f"({column} {operator} {_literal(value)})"
    raise ValueError(tree)


def _literal(value: Any) -> str:
    if isinstance(value, tuple):
        return f'"{(datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=value[1])).isoformat()}"'
    if isinstance(value, bool):
        return "true" if value else "false"
    return '"' + value + '"' if isinstance(value, str) else repr(value)


def duration(us: int | None) -> str:
    """As a user writes it; Lifetime for None."""
    if us is None:
        return "Lifetime"
    for unit, length in (("d", DAY), ("h", HOUR), ("m", 60 * SECOND), ("s", SECOND), ("ms", 1000)):
        if us and us % length == 0:
            return f'"{us // length}{unit}"'
    return f'"{us}us"'


def source_of(app: App) -> str:
    """The app as Python text."""
    lines = ["from penstock import Aggregation, Entity, Event, FeatureView, Lifetime, Pipeline, Timestamp", ""]
    for s in app.sources:
        event_id = f", event_id={s.event_id!r}" if s.event_id else ""
        lines.append(
            f'class {s.name}(Event, kw_only=True, time="at", lateness={duration(s.lateness)}, '
            f'max_skew={duration(s.max_skew)}, retry_window="36500d"{event_id}):'
        )
        for f in s.fields:
            lines.append(f"    {f.name}: {ANNOTATION[f.type]}{' | None = None' if f.optional else ''}")
        lines.append("")
    for name, kind in app.entities:
        lines.append(f"{name} = Entity({name!r}{f', type={kind}' if kind else ''})")
    for v in app.views:
        lines.append(f"{v.name} = FeatureView(")
        lines.append(f"    {v.name!r}, entity={v.entity}, source={v.source},")
        if v.key is not None:
            lines.append(f"    key={v.key!r},")
        if v.include:
            lines.append("    include_request_event=True,")
        if v.retention is not None:
            lines.append(f"    retention={duration(v.retention)},")
        lines.append("    aggregations=[")
        for a in v.aggregates:
            words = [repr(a.function)] + ([repr(a.column)] if a.column else [])
            words.append(f"windows=[{', '.join(duration(w) for w in a.windows)}]")
            if a.where is not None:
                words.append(f"where={condition_text(a.where)!r}")
            for name in ("default", "closed", "name"):
                if getattr(a, name) != Aggregate.__dataclass_fields__[name].default:
                    words.append(f"{name}={getattr(a, name)!r}")
            if a.ttl is not None:
                words.append(f"ttl={duration(a.ttl)}")
            lines.append(f"        Aggregation({', '.join(words)}),")
        lines.append("    ],")
        lines.append(")")
    views = ", ".join(v.name for v in app.views)
    for source in app.pipelines:
        lines.append(f'p_{source} = Pipeline("p_{source}", event={source}, features=[{views}])')
    return "\n".join(lines) + "\n"


def definitions(app: App) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "stress_app"}
    exec(compile(source_of(app), "stress_app", "exec", dont_inherit=True), namespace)
    return {name: value for name, value in namespace.items() if name != "__builtins__"}


def output_type(source: Source, aggregate: Aggregate) -> str:
    kind = source.type_of(aggregate.column) if aggregate.column else None
    if aggregate.function in ("count", "distinct_count"):
        return "int64"
    if aggregate.function == "sum":
        return "float64" if kind == "float64" else "int64"
    return str(kind) if aggregate.function in ("min", "max", "first", "last") else "float64"


# drawing


class Draw:
    """Everything that one seed decides."""

    def __init__(self, seed: int, most_events: int) -> None:
        self.rng = random.Random(seed)
        self.seed = seed
        self.most = most_events
        self.flavours: dict[tuple[str, str], Any] = {}

    def case(self) -> Case:
        rng = self.rng
        self.step = rng.choice((1, 3, 1000, SECOND, SECOND, 7 * SECOND, 60 * SECOND, HOUR, DAY))
        self.n = min(self.most, rng.choice((60, 100, 200, 400, 700, 1200, 2000)))
        names = ("A", "B", "C")[: rng.choice((1, 1, 2, 2, 3))]
        kinds = {"card": rng.choice(("string", "int64")), "shop": rng.choice(("string", "int64"))}
        entities = {name: rng.choice((None, None, "str", "int")) for name in kinds}
        sources = tuple(self.source(name, kinds, entities) for name in names)
        views = tuple(self.view(f"v{i}", rng.choice(sources)) for i in range(rng.randint(1, 4)))
        pipelines = names if rng.random() < 0.4 else names[:1]
        used = tuple((n, k) for n, k in entities.items())
        app = App(sources, used, views, pipelines)
        return Case(app, tuple(self.ops(app)), self.seed)

    def source(self, name: str, kinds: dict[str, str], entities: dict[str, str | None]) -> Source:
        rng = self.rng
        fields = []
        if event_id := ("eid" if rng.random() < 0.4 else None):
            fields.append(Field("eid", rng.choice(("int64", "string"))))
        for key, kind in kinds.items():
            # A typed entity's keys are one and the same whatever type the field has.
            fields.append(Field(key, rng.choice(("string", "int64")) if entities[key] else kind))
        fields.append(Field("card2", fields[-2].type))
        wide = rng.random()
        count = 60 if wide < 0.04 else rng.randint(20, 40) if wide < 0.3 else rng.randint(1, 20)
        mostly = rng.choice((None, None, *ANNOTATION))
        for i in range(count):
            kind = mostly if mostly and rng.random() < 0.8 else rng.choice(tuple(ANNOTATION))
            fields.append(Field(f"c{i}", kind, rng.random() < 0.5))
        fields.append(Field("at", "timestamp"))
        if rng.random() < 0.3:
            rng.shuffle(fields)
        s = self.step
        lateness = rng.choice((0, 0, 1, s, 5 * s, 20 * s, 20 * s, 100 * s, HOUR, 365 * DAY))
        return Source(name, tuple(fields), min(lateness, LONGEST), rng.choice((0, 1, SECOND, HOUR, DAY)), event_id)

    def window(self) -> int | None:
        rng, s = self.rng, self.step
        kind = rng.random()
        if kind < 0.15:
            return None
        if kind < 0.25:
            return rng.choice((1, 2, 365 * DAY, 30 * DAY, DAY, HOUR, LONGEST))
        if kind < 0.6:
            return min(LONGEST, s * rng.choice((1, 2, 3, 5, 7, 10, 20, 60, 300, 1000)))
        return min(LONGEST, max(1, int(s * math.exp(rng.uniform(-0.7, 7)))))

    def view(self, name: str, source: Source) -> View:
        rng = self.rng
        columns = [f for f in source.fields if f.name != "eid"]
        fields = rng.sample(columns, rng.randint(1, len(columns)))
        focus = rng.choice((None, None, None, "min", "max", "last", "sum", "var_pop"))
        mains = [self.window() for _ in range(rng.randint(1, 4))]
        wheres = [self.condition(source) for _ in range(rng.choice((0, 1, 1, 2, 3, 8, 30)))]
        aggregates: list[Aggregate] = []
        if rng.random() < 0.4:
            fields += [None]  # type: ignore[list-item]
        for i, field in enumerate(fields):
            allowed = ("count",) if field is None else self.functions(field.type)
            many = rng.choice((1, 1, 1, 2, 3)) if len(fields) < 25 else 1
            for function in rng.sample(allowed, min(many, len(allowed))):
                if focus in allowed and rng.random() < 0.5:
                    function = focus
                windows = dict.fromkeys(
                    self.window() if rng.random() < 0.2 else rng.choice(mains) for _ in range(rng.choice((1, 1, 2, 3)))
                )
                made = Aggregate(
                    function,
                    field.name if field is not None else None,
                    tuple(windows),
                    rng.choice(wheres) if wheres and rng.random() < 0.4 else None,
                    None,
                    rng.choice(("right", "right", "right", "both", "left")),
                    None,
                    f"f{i}_{function}_{len(aggregates)}",
                )
                if function in ("first", "last") and rng.random() < 0.5:
                    made = replace(made, ttl=rng.choice((0, self.step, 20 * self.step, self.window() or HOUR)))
                if rng.random() < 0.03:
                    made = replace(made, windows=(0,), closed="both")
                if rng.random() < 0.2:
                    made = replace(made, default=self.default(output_type(source, made)))
                if rng.random() < 0.3:
                    made = replace(made, name=None)
                aggregates.append(made)
        aggregates = _named_apart(aggregates)
        entity = rng.choice(("card", "card", "shop"))
        retention = None
        longest = max((w for a in aggregates for w in a.windows if w is not None), default=1)
        if any(None in a.windows for a in aggregates) and rng.random() < 0.4:
            retention = min(LONGEST, max(1, longest) * rng.choice((1, 1, 2, 5)))
        key = "card2" if entity == "card" and rng.random() < 0.2 else None
        return View(name, source.name, entity, key, tuple(aggregates), rng.random() < 0.4, retention)

    def functions(self, kind: str) -> tuple[str, ...]:
        if kind in ("float64", "int64", "bool"):
            return NUMERIC + ANY_TYPE
        return ANY_TYPE + (("min", "max") if kind == "timestamp" else ())

    def default(self, kind: str) -> Any:
        choices = {
            "float64": (-1.5, 0.0, 7),
            "int64": (0, -7),
            "bool": (True, False),
            "string": ("none", ""),
            "timestamp": (5,),
        }
        return self.rng.choice(choices[kind])

    def condition(self, source: Source, depth: int = 0) -> Any:
        rng = self.rng
        kind = rng.random()
        if depth < 2 and kind < 0.25:
            return (rng.choice(("and", "or")), self.condition(source, depth + 1), self.condition(source, depth + 1))
        if depth < 2 and kind < 0.35:
            return ("not", self.condition(source, depth + 1))
        field = rng.choice([f for f in source.fields if f.name != "eid"])
        if field.optional and rng.random() < 0.2:
            return (rng.choice(("null", "not null")), field.name)
        if field.type == "bool":
            return ("is true", field.name)
        values = [self.value(source.name, field) for _ in range(3)]
        values = [v for v in values if v is not None] or [
            {"float64": 1.0, "int64": 1, "string": "x", "timestamp": BASE}[field.type]
        ]
        if field.type == "timestamp":
            return (rng.choice(("<", ">=", "==")), field.name, ("time", values[0]))
        if field.type == "string":
            values = [v for v in values if len(v) < 40 and '"' not in v] or ["x"]
        if field.type in ("string", "int64") and rng.random() < 0.4:
            return ("in", field.name, tuple(values))
        return (rng.choice(("<", "<=", ">", ">=", "==", "!=")), field.name, values[0])

    # values: each column has a flavour of its own

    def value(self, source: str, field: Field) -> Any:
        rng = self.rng
        if (source, field.name) not in self.flavours:
            kinds = {
                "float64": (
                    "cents",
                    "cents",
                    "constant",
                    "wide",
                    "whole",
                    "zeros",
                    "tiny",
                    "huge",
                ),
                "int64": ("small", "small", "constant", "wide", "edge"),
                "string": ("few", "many", "long", "odd"),
                "timestamp": ("near", "far"),
                "bool": ("even", "rare"),
            }
            nulls = rng.choice((0.0, 0.05, 0.3, 0.9, 1.0)) if field.optional else 0.0
            self.flavours[source, field.name] = (rng.choice(kinds[field.type]), nulls, rng.uniform(-1000, 1000))
        flavour, nulls, own = self.flavours[source, field.name]
        if field.optional and rng.random() < nulls:
            return None
        match flavour:
            case "cents":
                return round(rng.lognormvariate(3, 1.5), 2)
            case "constant":
                return own if field.type == "float64" else int(own)
            case "whole":
                return float(rng.randint(-5, 5))
            case "zeros":
                return rng.choice((0.0, -0.0, 0.1, -0.1))
            case "tiny":
                return rng.choice((5e-324, -5e-324, 1e-310, 2.2250738585072014e-308, 1e-160, 0.0))
            case "huge":
                return rng.choice((1.7e308, -1.7e308, 1e300, 1e160, -1e155, 1.0))
            case "small":
                return rng.randint(-3, 20)
            case "edge":
                return rng.choice((2**63 - 1, -(2**63), 0, -1, 2**62))
            case "wide":
                if field.type == "int64":
                    return rng.choice((-1, 1)) * rng.getrandbits(rng.randint(1, 62))
                return rng.choice((-1, 1)) * rng.random() * 10.0 ** rng.randint(-30, 30)
            case "few":
                return rng.choice(("x", "y", "", "é", "zebra"))
            case "many":
                return f"text {rng.randint(0, 500)}"
            case "long":
                return rng.choice("abcdef") * rng.randint(0, 200)
            case "odd":
                return rng.choice(("a\tb", "ß" * 20, "\u0001", "日本", "'; --", "x", "X"))
            case "near":
                return BASE + rng.randint(-5, 50) * self.step
            case "far":
                return rng.choice((0, -1, BASE, -62135596800000000, 253402300799999999))
            case "even":
                return rng.random() < 0.5
            case "rare":
                return rng.random() < 0.03
        raise ValueError(flavour)

    def ops(self, app: App) -> list[Op]:
        rng, s = self.rng, self.step
        shape = rng.choice(("constant", "constant", "random", "bursts", "ties"))
        keys = rng.choice((1, 1, 2, 3, 20))
        hot = rng.choice((0.5, 0.9, 1.0))
        late = rng.choice((0.0, 0.0, 0.02, 0.2))
        quarantined = rng.choice((0.0, 0.0, 0.02))
        repeated = rng.choice((0.0, 0.05))
        ingested = rng.choice((0.0, 0.1, 0.5))
        tried = rng.choice((0.0, 0.03))
        shares = [rng.random() + 0.05 for _ in app.sources]
        apart = [0 if rng.random() < 0.6 else rng.randint(-30, 30) * s for _ in app.sources]
        base = BASE if rng.random() < 0.85 else rng.choice((-5 * s, FIRST + 4 * 365 * DAY))
        now, found = base, []
        for i in range(self.n):
            match shape:
                case "constant":
                    now += s
                case "random":
                    now += int(rng.expovariate(1 / s))
                case "bursts":
                    now += rng.choice((0, 0, 1, s, 50 * s)) if rng.random() < 0.9 else 200 * s
                case "ties":
                    now += s if rng.random() < 0.2 else 0
            if rng.random() < 0.004:
                now += rng.choice((DAY, 50 * s, 2000 * s))
            now = min(now, base + 20 * 365 * DAY)
            number = rng.choices(range(len(app.sources)), shares)[0]
            source = app.sources[number]
            if found and rng.random() < repeated:
                found.append(self.again(rng.choice(found), app))
                continue
            at = now + apart[number]
            if rng.random() < late:
                lateness = source.lateness
                at -= rng.choice((1, s, lateness // 2, lateness, lateness + 1, 2 * lateness + s, 20 * s))
            if rng.random() < quarantined:
                at = FAR + rng.randint(0, 9)
            row = {f.name: self.value(source.name, f) for f in source.fields}
            for name in ("card", "card2", "shop"):
                which = 0 if rng.random() < hot else rng.randrange(keys)
                row[name] = self.key(which, source.type_of(name))
            row["at"] = at
            if source.event_id:
                row["eid"] = i if source.type_of("eid") == "int64" else f"id {i}"
            kind = "ingest" if source.name not in app.pipelines or rng.random() < ingested else "score"
            found.append(Op("try" if kind == "score" and rng.random() < tried else kind, source.name, row))
        return found

    def again(self, op: Op, app: App) -> Op:
        """The same event once more, or another one with its id."""
        row = dict(op.row)
        if row["at"] < FAR and self.rng.random() < 0.3:
            row["at"] += self.rng.randint(-2, 2) * self.step
        kind = self.rng.choice(("score", "ingest")) if op.source in app.pipelines else "ingest"
        return Op(kind, op.source, row)

    def key(self, which: int, kind: str) -> Any:
        texts = ("7", "1", "k" * 30, "é", "-5", "007", "")
        if kind == "int64":
            return (7, 1, -(2**63), 2**63 - 1, -5)[which] if which < 5 else which
        return texts[which] if which < len(texts) else str(which)


def _named_apart(aggregates: list[Aggregate]) -> list[Aggregate]:
    """Those without a name whose names would clash get one."""
    taken: set[str] = set()
    kept = []
    for i, a in enumerate(aggregates):
        base = a.name or (f"{a.function}_{a.column}" if a.column else a.function)
        names = {f"{base}_{duration(w)}" for w in a.windows}
        if a.name is None and names & taken:
            a = replace(a, name=f"g{i}")
            names = {f"g{i}_{duration(w)}" for w in a.windows}
        taken |= names
        kept.append(a)
    return kept


def draw(seed: int, most_events: int = 2000) -> Case:
    return Draw(seed, most_events).case()


def shown(case: Case) -> str:
    """The case as Python that can be pasted: it scores the events one by one and prints what the engine gives."""
    lines = [source_of(case.app)]
    lines.append("import penstock\n")
    names = [s.name for s in case.app.sources] + [v.name for v in case.app.views]
    names += [f"p_{s}" for s in case.app.pipelines]
    lines.append(f"app = {{{', '.join(f'{n!r}: {n}' for n in names)}}}")
    lines.append("engine = penstock.Engine(app)")
    for op in case.ops:
        if op.kind == "ingest":
            lines.append(f"print(engine.ingest({op.row!r}, event={op.source!r}))")
        else:
            more = ", ingest=False" if op.kind == "try" else ""
            lines.append(f"d = engine.score({op.row!r}{more}, pipeline='p_{op.source}', explain=True)")
            lines.append("print(d.outcome, d.features, d.statuses)")
    return "\n".join(lines) + "\n"
