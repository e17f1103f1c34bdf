"""The engine (control path): Plan + kernels -> score, score_batch, replay, ingest, features.

This file only puts the native parts together and turns tables into addresses; what runs per event is in ext/core.pyx.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from ._ext.batch import VerdictColumns, run_table
from ._ext.core import Core
from ._ext.decision import OUTCOMES, Decision, DecisionTexts
from ._ext.events import EventReader
from ._ext.steps import Pipe, Source
from ._ext.windows import SEED_BYTES, WindowStore
from ._ext.windows import Output as NativeOutput
from .app import App, load_plan
from .definitions.event import Event
from .errors import DefinitionError, EventError, LogError, PenstockError
from .experiments.assignment import compile_experiment
from .models.folder import resolve
from .models.runtime import Runtime, load
from .plan import EventPlan, ModelStep, PipelinePlan, Plan, StorePlan, suggestion
from .tables import FIRST_TIME, LAST_TIME, OutColumns, arrow_table, column_set, event_times, is_column, pyarrow
from .timestamp import Timestamp

if TYPE_CHECKING:
    from .offline.erasure import ErasureReport
    from .offline.keeper import KeeperStatus
    from .offline.log_folder import LogFolder
    from .offline.options import LogOptions
    from .offline.recovery import RecoveryReport
    from .offline.schemas import Running

__all__ = ["Engine", "FeatureRows"]

Progress = Callable[[int], None]
Done = Callable[[int, int], None]


class FeatureRows(msgspec.Struct, frozen=True):
    """Online feature values: per key one dict of values and one of statuses (S17), and the T they were read as of."""

    view: str
    as_of: Timestamp
    rows: list[dict[str, Any]]
    statuses: list[dict[str, str]]


class Engine:
    """One app in this process: its state, its models, and every way to use them. Calls may come from any thread.

    app: a path to a Python file, a module or its name, a mapping of names to definitions, or a Plan.
    models: the model folder, `DIR/<name>/<version>/model.{onnx,txt,json,ubj}`; needed where a pipeline has models.
    clock: "wall" (ingest time is wall time) or "event" (it is the event's own time: replay of history).
    log: a folder for the event log: what it holds is recovered first, then every accepted event is in it before it is
    acknowledged. log_options: how it is kept. progress: told (done, of how many) events while recovering.

    features_only: without models and rules, and so without a model folder (history is replayed for its features).

    Raises DefinitionError, with every problem and its place, where the app or a model does not fit.
    """

    def __init__(
        self,
        app: App | Plan,
        *,
        models: str | Path | None = None,
        clock: str = "wall",
        log: str | Path | None = None,
        log_options: LogOptions | None = None,
        progress: Done | None = None,
        features_only: bool = False,
    ) -> None:
        if clock not in ("wall", "event"):
            raise ValueError(f'clock: expected "wall" or "event", got {clock!r}')
        self.plan: Plan = app if isinstance(app, Plan) else load_plan(app)
        self.clock = clock
        self.features_only = features_only
        self.models_folder = None if models is None else Path(models)
        self._runtimes: dict[tuple[Any, ...], tuple[Runtime, str, str, str]] = {}
        self._deployments = [0] * len(self.plan.pipelines)
        self.schemas: list[bytes] = []  # of the log's segments, by number
        self._keys: dict[str, set[int]] = {name: set() for name in self.plan.events}
        self._aggregated: dict[str, set[int]] = {name: set() for name in self.plan.events}
        for store in self.plan.stores:
            self._keys[store.event].add(store.key)
            self._aggregated[store.event].update(store.columns)
        for event in self.plan.events.values():
            if event.event_id is not None:
                self._keys[event.name].add(event.event_id)
        for pipeline in self.plan.pipelines.values():
            self._keys[pipeline.event].update(read.key for read in pipeline.reads)
            self._keys[pipeline.event].update(step.unit for step in pipeline.experiments)
        seed = os.urandom(SEED_BYTES)  # nobody who sends keys may know how they are hashed
        self.stores = [_window_store(store, self.plan.events[store.event], seed) for store in self.plan.stores]
        self._constants = b""
        sources = [self._source(event) for event in self.plan.events.values()]
        pipes = [self._pipe(pipeline, sources) for pipeline in self.plan.pipelines.values()]
        self.core = Core(sources, pipes, self.stores, self._constants, clock == "event")
        self._pipeline_of: dict[type, int | None] = {}
        for pipeline in self.plan.pipelines.values():
            event_type = self.plan.events[pipeline.event].type
            # None where several pipelines score this event: score() then needs the pipeline's name.
            self._pipeline_of[event_type] = None if event_type in self._pipeline_of else pipeline.index
        self.recovery: RecoveryReport | None = None
        self._folder: LogFolder | None = None
        self._keeper: Any = None
        self._keeper_said = ""
        self._keeper_again, self._keeper_wait = 0.0, 0.5  # not before this time (monotonic); seconds
        self._told: Any = None  # LogStats that check_log() saw last
        if log is not None:
            self._open_log(log, log_options, progress)
        elif log_options is not None:
            raise ValueError("log_options: there is no log; say log=...")

    # the event log

    def _open_log(self, log: str | Path, options: LogOptions | None, progress: Done | None) -> None:
        from .offline.log_folder import LogFolder
        from .offline.options import LogOptions
        from .offline.recovery import open_log

        if not str(log):
            raise LogError("log: expected a folder, got an empty text")
        options = options if options is not None else LogOptions()
        if not isinstance(options, LogOptions):
            raise TypeError(f"log_options: expected LogOptions, got {type(options).__name__}")
        folder = LogFolder(log, write=True)
        try:
            self.recovery = open_log(self, folder, options, progress)
        except BaseException:
            folder.close()
            raise
        self._folder = folder
        self._log_options = options
        self._look_after_keeper()

    def check_log(self) -> list[str]:
        """What an operator should know now and was not told before: the log's state is another, it was late, the clock
        was set, the keeper had ended.

        The server asks twice a second; an embedded engine may ask when it likes.
        """
        if self._folder is None or self.core.log is None:
            return []
        found = []
        log, told = self.core.log, self._told
        stats = self._told = log.stats()
        if told is None or (stats.state, stats.error) != (told.state, told.error):
            if stats.state == "slow":
                age = max(stats.unsynced_us, stats.last_late_us) / 1e6
                policy = self._log_options.sync
                found.append(
                    f"the event log is slow: it took {age:.1f} s to get to the disk, and the policy is {policy}"
                )
            elif stats.state != "ok":
                found.append(log.taking or f"{log.folder}: the event log takes no events")
            elif told is not None:
                found.append("the event log is " + ("in time" if told.state == "slow" else "taking events") + " again")
        if stats.clock_steps != (told.clock_steps if told is not None else 0):
            found.append(f"the clock was set by {stats.last_step_us / 1e6:+.1f} s")
        return found if stats.state == "gone" else found + self._look_after_keeper()

    def _look_after_keeper(self) -> list[str]:
        """Start it where it has ended; one that cannot live is not tried all the time."""
        now = time.monotonic()
        if self._folder is None or self._log_options is None or not self._log_options.keeper or self.keeper_alive:
            return []
        if now < self._keeper_again:
            return []
        from .offline.keeper import start_keeper
        from .offline.recovery import put_layouts

        ended = self._keeper is not None
        try:
            if not put_layouts(self._folder, self.plan):
                return []  # the disk is full: the state of the log says so
            self._keeper = start_keeper(self._folder, self._log_options)
        except (OSError, subprocess.SubprocessError) as error:
            text = f"no snapshots are taken until the keeper can be started: {error}"
            said, self._keeper_said = self._keeper_said, text
            return [] if said == text else [text]
        self._keeper_said = ""
        if not ended:
            return ["the keeper is started"]
        self._keeper_wait = 1.0 if now - self._keeper_again > 60 else min(60.0, 2 * self._keeper_wait)
        self._keeper_again = now + self._keeper_wait
        return ["the keeper had ended; it is started again"]

    @property
    def keeper_alive(self) -> bool:
        """Whether a child process takes snapshots."""
        return self._keeper is not None and bool(self._keeper.alive)

    @property
    def keeper_status(self) -> KeeperStatus | None:
        """What the process that takes snapshots told last; None where there is none, or it has told nothing yet."""
        return None if self._keeper is None else self._keeper.status()

    def sync(self) -> None:
        """Wait until everything that was acknowledged is on disk. Raises LogError where the disk failed."""
        if self.core.log is not None:
            self.core.log.wait()

    def close(self) -> None:
        """Sync and close the event log and let its folder go. Reads go on, events are refused."""
        if self._keeper is not None:
            self._keeper.stop()
            self._keeper = None
        self.core.close_log()
        if self._folder is not None:
            self._folder.close()
            self._folder = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def core_of(self, fingerprints: set[int]) -> Core:
        """A core that applies events to these layouts alone, on the engine's own state (recovery)."""
        sources = [self._source(event, fingerprints) for event in self.plan.events.values()]
        return Core(sources, self.core.pipes, self.stores, self._constants, True)

    # scoring

    def score(
        self,
        event: Event | Mapping[str, Any],
        ingest: bool = True,
        *,
        pipeline: str | None = None,
        explain: bool = False,
    ) -> Decision:
        """Score one event and, unless `ingest` is False, apply it to the state (SEMANTICS, one step).

        explain: keep the feature values in the decision (`decision.features`, `decision.statuses`).
        Raises EventError (refused, nothing changed), ScoringError (a function or model failed, no fallback).
        """
        if pipeline is None:
            index = self._pipeline_of.get(type(event))
            if index is None:
                index = self._pipeline(event)
        else:
            index = self._named(pipeline).index
        return self.core.score(index, event, ingest, explain)

    def score_batch(
        self, table: Any, ingest: bool = True, *, pipeline: str | None = None, explain: bool = False
    ) -> Any:
        """Score the rows of an Arrow table in table order: the same bits as score() on each row.

        The order of the rows is the order in which they happen: a row further behind the newest before it than the
        lateness is late, as it would be one by one. Where many are (every tenth), a warning says how many;
        replay(out=...) scores history by time, and answers in the table's order.
        table: pyarrow, polars, pandas or a dict of columns, one column per field of the event. All or nothing on bad
        input: the whole table is checked first.
        Returns a pyarrow.Table with one row per input row: id, action, score, reasons, model, model_version, one
        `arm.<experiment>` column each, outcome, degraded, and one `score.<model>` for each model that scores beside;
        with `explain` the pipeline's features too. A repeated event's row holds the first decision (S16); its features
        are read anew, where score() gives those of the first decision, if that was explained.
        """
        plan = self._named(pipeline) if pipeline is not None else self._only_pipeline()
        event = self.plan.events[plan.event]
        data = arrow_table(table, event.slots)
        columns = column_set(data, event, self._keys[event.name], self._aggregated[event.name])
        before = self.core.counters()["outcomes"][event.name]["late"]
        result = self._run([(event.index, columns, True)], None, data.num_rows, plan, ingest, True, explain, None)
        late = self.core.counters()["outcomes"][event.name]["late"] - before
        _warn_of_late(
            late, data.num_rows, "a table is scored in its own order: sort it by time, or use replay(out=...)"
        )
        return result

    def replay(
        self,
        tables: Mapping[str, Any],
        out: str | None = None,
        *,
        decisions: bool | None = None,
        progress: Progress | None = None,
    ) -> Any:
        """Ingest history: rows of all tables merged by event time, equal times in the order of `tables`, then of rows.

        tables: event type's name -> Arrow table. out: the pipeline whose event's rows are scored on the way.
        Raises PenstockError where a row is older than what the engine has had before, less its lateness.
        Returns a pyarrow.Table with one row per row of out's event table, in that table's order: the pipeline's
        features, then, where it has models, rules or experiments (or `decisions` says so), the decision columns of
        score_batch. Without `out`: None. progress: told how many more rows are done, a few times a second.
        """
        plan = self._named(out) if out is not None else None
        sets: list[tuple[int, Any, bool]] = []
        times: list[Any] = []
        scored_rows = 0
        for position, (name, table) in enumerate(tables.items()):
            event = self._event_named(name)
            data = arrow_table(table, event.slots)
            columns = column_set(data, event, self._keys[name], self._aggregated[name])
            scored = plan is not None and plan.event == name
            sets.append((event.index, columns, scored))
            times.append(event_times(data, event))
            if scored:
                scored_rows, scored_at = data.num_rows, position
        self._check_replayed(dict(zip(tables, times)), plan)
        if plan is not None and not any(s for _, _, s in sets):
            raise PenstockError(f"replay: out={out!r} scores {plan.event}, but no table of {plan.event} was given")
        order = _merge_order(times)
        if decisions is None:
            decisions = plan is not None and bool(plan.models or plan.rules or plan.experiments)
        result = self._run(sets, order, scored_rows, plan, True, bool(decisions), True, progress)
        if plan is None:
            return None
        if order is not None:
            rows = order[1][order[0] == scored_at]
            if not np.array_equal(rows, np.arange(scored_rows)):
                inverse = np.empty(scored_rows, dtype=np.int64)
                inverse[rows] = np.arange(scored_rows)
                result = result.take(pyarrow().array(inverse))
        return result

    def _check_replayed(self, times: Mapping[str, Any], plan: PipelinePlan | None) -> None:
        """Refuse rows that are older than what the engine has seen: they would be late, or see none of their views."""
        reads = {self.plan.views[read.view].event for read in plan.reads} if plan is not None else set()
        for name, column in times.items():
            if not len(column):
                continue
            first = int(column.min())
            seen = {name, *reads} if plan is not None and plan.event == name else {name}
            for source in sorted(seen):
                watermark = self.core.watermark(self.plan.events[source].index)
                if watermark is None or first >= watermark - self.plan.events[source].options.lateness:
                    continue
                raise PenstockError(
                    f"replay: the first {name} is of {Timestamp(first).isoformat()}, but this engine has had {source} "
                    f"of {Timestamp(watermark).isoformat()} already, and keeps state for the lateness of {source} back "
                    "from there. Give all of history to one replay, which merges it by time, or take a new engine"
                )

    # ingesting and reading

    def ingest(self, data: Any, event: str | None = None) -> Any:
        """Apply an event, or every row of an Arrow table, without scoring.

        event: the event type's name; needed for dicts and tables where the app has several. A table's rows may be in
        any order: they are applied by event time, equal times as they stand, so that only what was ingested before
        makes a row late. Where many are (every tenth), a warning says how many.
        Returns the outcome (applied, duplicate, late, quarantined), or for a table the count of each.
        """
        if isinstance(data, Event):
            plan = self.plan.events.get(type(data).__name__)
            if plan is None or not isinstance(data, plan.type):
                raise EventError("", f"{type(data).__name__} is no event of this app{self._known_events()}")
            return self.core.ingest(plan.index, data)
        plan = self._event_named(event) if event is not None else self._only_event()
        if isinstance(data, Mapping) and not any(is_column(value) for value in data.values()):
            return self.core.ingest(plan.index, data)
        table = arrow_table(data, plan.slots)
        columns = column_set(table, plan, self._keys[plan.name], self._aggregated[plan.name])
        order = _merge_order([event_times(table, plan)])
        before = self.core.counters()["outcomes"][plan.name]
        run_table(self.core, [(plan.index, columns, False)], order, [], -1, True, None, None)
        after = self.core.counters()["outcomes"][plan.name]
        counts = {name: after[name] - before[name] for name in OUTCOMES if name != "off"}
        why = "newer ones were ingested before; history goes in first, or by replay, which merges all of it by time"
        _warn_of_late(counts["late"], table.num_rows, why)
        return counts

    def features(self, view: str, keys: Sequence[str | int], as_of: Any = None) -> FeatureRows:
        """A view's values for some keys, as of T (default: the ingest clock now).

        as_of: a Timestamp, datetime, RFC 3339 text or integer microseconds.
        Raises ReplayNeeded where as_of is older than the online state reaches (S14).
        """
        plan = self.plan.views.get(view)
        if plan is None:
            raise PenstockError(f"no view {view!r}{suggestion(view, self.plan.views)}")
        event = self.plan.events[plan.event]
        if as_of is None:
            watermark = self.core.watermark(event.index)
            at = Timestamp.now() if self.clock == "wall" else Timestamp(watermark or 0)
        else:
            try:
                at = as_of if isinstance(as_of, Timestamp) else Timestamp.of(as_of)
            except (ValueError, TypeError, OverflowError) as error:
                raise EventError(".as_of", str(error)) from None
            if not FIRST_TIME <= at <= LAST_TIME:
                raise EventError(".as_of", "expected a time between the years 1 and 9999")
        if isinstance(keys, (str, int)):
            raise EventError(".keys", f"expected a list of keys, got {keys!r}; say [{keys!r}]")
        keys = list(keys)
        for i, key in enumerate(keys):
            if isinstance(key, bool) or not isinstance(key, (str, int)):
                raise EventError(f".keys[{i}]", f"expected a string or an integer, got {type(key).__name__}")
            if isinstance(key, int) and not -(2**63) <= key < 2**63:
                raise EventError(f".keys[{i}]", "expected an integer of at most 64 bits")
            if isinstance(key, str) and not _is_unicode(key):
                raise EventError(f".keys[{i}]", "expected text that is valid Unicode, got a lone surrogate")
        found = self.core.read_view(
            self.stores[plan.store],
            event.index,
            plan.group,
            [_as_key(key, plan.key_type, self._typed_entity(plan.entity)) for key in keys],
            at,
            [o.type for o in plan.outputs],
            [_as_value(o.default, o.type) for o in plan.outputs],
        )
        names = [o.name for o in plan.outputs]
        return FeatureRows(
            view,
            at,
            [dict(zip(names, values)) for values, _ in found],
            [dict(zip(names, statuses)) for _, statuses in found],
        )

    def erase(self, entity: str, key: str | int) -> ErasureReport | None:
        """Forget one entity (a privacy request): its state goes, and in the log, its Parquet and its snapshots its key
        becomes a random one. Other entities' windows stay as they are. Files are written anew: it may take a while.

        Returns what was found in the log; None where the engine has none. Raises PenstockError for an unknown entity.
        """
        stores = [store for store in self.plan.stores if store.entity == entity]
        if not stores and self._folder is None:
            entities = {store.entity for store in self.plan.stores}
            raise PenstockError(f"no view has the entity {entity!r}{suggestion(entity, entities)}")
        keys = [_as_key(key, store.key_type, self._typed_entity(entity)) for store in stores]
        self.core.erase([self.stores[store.index] for store in stores], keys)
        if self._folder is None:
            return None
        from .offline.erasure import erase_closed

        return erase_closed(self._folder, entity, key)

    # the engine itself

    def stats(self) -> dict[str, Any]:
        """Entities, events held and bytes per (source, entity), and the counters since start."""
        stores = [
            {"source": s.event, "entity": s.entity, "entities": n, "events": events, "bytes": used, "mapped": mapped}
            for s, (n, events, used, mapped) in zip(self.plan.stores, self.core.store_stats())
        ]
        return {"stores": stores, **self.core.counters()}

    def reopen(self) -> Engine:
        """In a child process after a fork: go on with the state as it was, as an engine of its own."""
        self.core.reopen()
        # The log folder and its keeper are the parent's.
        self._keeper = self._folder = None
        return self

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        """Models in use: reference -> name, version, kind, inputs, outputs."""
        return {
            key[0]: {
                "name": name,
                "version": version,
                "kind": runtime.kind,
                "inputs": runtime.inputs,
                "outputs": runtime.n_outputs,
            }
            for key, (runtime, name, version, _) in self._runtimes.items()
        }

    # putting the native parts together

    def _source(self, event: EventPlan, fingerprints: set[int] | None = None) -> Source:
        reader = EventReader(event, self._keys[event.name], self._aggregated[event.name])
        source = Source(event, reader)
        stores = []
        for index in event.stores:
            store = self.plan.stores[index]
            if fingerprints is not None and store.fingerprint not in fingerprints:
                continue
            stores.append(
                (
                    self.stores[index],
                    store.key,
                    event.fields[store.key].type == "int64",
                    store.key_type == "int64",
                    store.columns,
                    [predicate.program for predicate in store.predicates],
                )
            )
        source.add_stores(stores)
        return source

    def _pipe(self, plan: PipelinePlan, sources: list[Source]) -> Pipe:
        event = self.plan.events[plan.event]
        actions = [plan.default_action]
        for action in [*(step.rule.action for step in plan.rules), plan.fallback, plan.degraded_action]:
            if action is not None and action not in actions:
                actions.append(action)
        problems: list[str] = []
        bound = []
        for step in [] if self.features_only else plan.models:
            try:
                bound.append(self._bind(plan, step))
            except (DefinitionError, ValueError, PenstockError) as error:
                text, ref = str(error), f"model {step.model.ref}: "
                problems.append(f'pipeline "{plan.name}": {ref}{text.removeprefix(ref)}')
        if problems:
            raise DefinitionError(problems)
        models: list[tuple[str, str]] = []
        for _, _, _, name, version in bound:
            if (name, version) not in models:
                models.append((name, version))
        failures = [f"function {f.name} failed" for f in plan.functions]
        failures += [f"model {step.model.ref} failed" for step in plan.models]
        # Then why a decision is degraded, and per model which null input left it without a score; the last: none did.
        failures.append("degraded: a feature cannot be known as of the event's time, or the event was not applied")
        for step in plan.models:
            what = f"model {step.model.ref} gave no score"
            failures += [*(f"{what}: {slot.name} is null" for slot in plan.slots), what]
        texts = DecisionTexts(
            pipeline=plan.name,
            actions=actions,
            reasons=[step.rule.reason or step.rule.name for step in plan.rules],
            models=models,
            experiments=[step.experiment.name for step in plan.experiments],
            arms=[list(step.experiment.arms) for step in plan.experiments],
            failures=failures,
            features=[(plan.slots[i].name, plan.slots[i].type, i) for i in plan.features],
            fallback=plan.fallback,
        )
        pipe = Pipe(plan, sources[event.index], texts)
        reads = []
        for read in plan.reads:
            view = self.plan.views[read.view]
            defaults = [
                (read.first_slot + i, self._default(o.default, o.type))
                for i, o in enumerate(view.outputs)
                if o.default is not None
            ]
            reads.append(
                (
                    self.stores[view.store],
                    view.group,
                    read.key,
                    event.fields[read.key].type == "int64",
                    view.key_type == "int64",
                    read.first_slot,
                    len(view.outputs),
                    view.include_request_event,
                    defaults,
                )
            )
        pipe.add_reads(reads)
        pipe.add_functions([self._function(step) for step in plan.functions])
        experiments = []
        for assign in plan.experiments:
            arms = [self._constant(arm) for arm in assign.experiment.arms]
            is_int = event.fields[assign.unit].type == "int64"
            experiments.append((compile_experiment(assign.experiment), assign.unit, is_int, assign.slot, arms))
        pipe.add_experiments(experiments)
        pipe.add_models(
            [
                (
                    runtime,
                    runtime.abi,
                    inputs,
                    [plan.slots[i].type for i in inputs],
                    output,
                    step.slot,
                    models.index((name, version)),
                    step.guard,
                    step.decides,
                    not getattr(runtime, "row_exact", runtime.kind == "trees"),
                )
                for step, (runtime, inputs, output, name, version) in zip(plan.models if bound else [], bound)
            ]
        )
        rules = [] if self.features_only else plan.rules
        pipe.add_rules([(step.expression.program, actions.index(step.rule.action)) for step in rules])
        return pipe

    def _function(self, step: Any) -> tuple[Any, ...]:
        from .functions import FunctionError, compile_function, mode_of, python_function

        try:
            if mode_of(step.definition.mode) == "python":
                call = python_function(step.definition.function, step.argument_types, step.type)
                return (None, call, step.arguments, step.argument_types, step.slot, step.type)
            compiled = compile_function(step.definition.function, step.argument_types, step.type, name=step.name)
        except FunctionError as error:
            raise DefinitionError(str(error)) from None
        return (compiled.address, compiled, step.arguments, step.argument_types, step.slot, step.type)

    def _bind(self, plan: PipelinePlan, step: ModelStep) -> tuple[Runtime, list[int], int, str, str]:
        """A model and where its inputs stand in the row. A missing or surplus input is an error."""
        runtime, name, version, _ = self._runtime(step)
        inputs, output = fit(plan, step, runtime)
        return runtime, inputs, output, name, version

    def _runtime(self, step: ModelStep) -> tuple[Runtime, str, str, str]:
        model = step.model
        key = _runtime_key(step)
        if key not in self._runtimes:
            if self.models_folder is None:
                raise DefinitionError('no model folder was given; say Engine(app, models="DIR") or --models DIR')
            found = resolve(self.models_folder, model.ref)
            inputs = list(model.inputs) if model.inputs is not None else None
            runtime = load(found.path, inputs, name=found.ref)
            self._runtimes[key] = (runtime, found.name, found.version, found.sha256)
        return self._runtimes[key]

    # models that are swapped while the engine runs

    @property
    def loaded_models(self) -> Mapping[tuple[Any, ...], tuple[Runtime, str, str, str]]:
        """(reference, inputs it is given or None) -> (runtime, name, version, sha256), of all pipelines."""
        return self._runtimes

    def running(self, pipeline: int) -> Running:
        """What a pipeline runs now, by the pipeline's index."""
        from .offline.schemas import Running

        plan = list(self.plan.pipelines.values())[pipeline]
        steps = [] if self.features_only else plan.models
        return Running([self._runtimes[_runtime_key(step)][1:] for step in steps], self._deployments[pipeline])

    def swap_models(
        self, runtimes: Mapping[tuple[Any, ...], tuple[Runtime, str, str, str]], deployment: int = 0
    ) -> list[Any]:
        """Run other models from the next event on, all of them between the same two events. runtimes: a key of
        loaded_models -> (runtime, name, version, sha256); their inputs are bound by the features' names.

        With a log, score records then name the new models, with the deployment's number. Returns what held the old
        ones: large, and best dropped in another thread. Raises DefinitionError where a model does not fit, LogError
        where the log cannot say so; then nothing has changed.
        """
        from .offline.schemas import Running, score_schema

        changes = []
        schemas = list(self.schemas)
        after = {**self._runtimes, **runtimes}
        for plan in self.plan.pipelines.values():
            swapped = []
            for position, step in enumerate(plan.models):
                key = _runtime_key(step)
                if key in runtimes:
                    runtime, name, version, _ = runtimes[key]
                    inputs, output = fit(plan, step, runtime)
                    types = [plan.slots[i].type for i in inputs]
                    exact = getattr(runtime, "row_exact", runtime.kind == "trees")
                    swapped.append((position, runtime, runtime.abi, inputs, types, output, name, version, not exact))
            if not swapped:
                continue
            changes.append((plan.index, swapped))
            if schemas:
                words = self.core.pipes[plan.index].decision_texts
                known = list(words.models)
                known += [m for m in dict.fromkeys((s[6], s[7]) for s in swapped) if m not in known]
                now = Running([after[_runtime_key(step)][1:] for step in plan.models], deployment)
                number = len(self.plan.events) + plan.index
                schemas[number] = msgspec.json.encode(score_schema(plan, words, known, now))
        old = self.core.swap_models(changes, schemas if schemas else None)
        self.schemas = schemas
        self._runtimes = after
        for index, _ in changes:
            self._deployments[index] = deployment
        return old

    def _constant(self, text: str) -> int:
        """A string kept at the start of every arena: offset in the low 32 bits, length in the high 32."""
        data = text.encode()
        place = len(self._constants) | len(data) << 32
        self._constants += data
        return place

    def _default(self, value: Any, slot_type: str) -> bytes:
        if slot_type == "float64":
            return struct.pack("<d", value)
        if slot_type == "string":
            return struct.pack("<Q", self._constant(value))
        return struct.pack("<q", int(value))

    # running tables

    def _run(
        self,
        sets: list[tuple[int, Any, bool]],
        order: Any,
        rows: int,
        plan: PipelinePlan | None,
        ingest: bool,
        decisions: bool,
        features: bool,
        progress: Progress | None,
    ) -> Any:
        if plan is None:
            run_table(self.core, sets, order, [], -1, ingest, None, progress)
            return None
        slots = [plan.slots[i] for i in plan.features] if features else []
        if decisions:
            # Models that score beside the deciding one: each its own column.
            beside = sorted({step.slot for step in plan.models if not step.decides})
            slots += [plan.slots[i] for i in beside]
        columns = OutColumns(slots, rows)
        verdicts = None
        arrays: dict[str, Any] = {}
        if decisions:
            n_arms = len(plan.experiments)
            arrays = {
                "ids": np.empty(rows * 26, dtype=np.uint8),
                "action": np.empty(rows, dtype=np.int16),
                "model": np.empty(rows, dtype=np.int16),
                "failed": np.empty(rows, dtype=np.int16),
                "score": np.empty(rows, dtype=np.float64),
                "fired": np.empty(rows, dtype=np.uint64),
                "arms": np.empty(rows * max(1, n_arms), dtype=np.int8),
                "outcome": np.empty(rows, dtype=np.uint8),
                "degraded": np.empty(rows, dtype=np.uint8),
            }
            verdicts = VerdictColumns(**arrays)
        texts = run_table(self.core, sets, order, columns.native, plan.index, ingest, verdicts, progress)
        pa = pyarrow()
        names = [slot.name for slot in columns.slots]
        out = dict(zip(names, columns.arrays(texts)))
        if decisions:
            out.update(self._decision_columns(plan, arrays, rows))
        return pa.table(out) if out else pa.table({"rows": pa.nulls(rows)}).select([])

    def _decision_columns(self, plan: PipelinePlan, arrays: dict[str, Any], rows: int) -> dict[str, Any]:
        pa = pyarrow()
        texts: DecisionTexts = self.core.pipes[plan.index].decision_texts
        offsets = np.arange(0, 26 * (rows + 1), 26, dtype=np.int64)
        ids = pa.Array.from_buffers(pa.large_string(), rows, [None, pa.py_buffer(offsets), pa.py_buffer(arrays["ids"])])
        failed = arrays["failed"]
        # The first failure without a fallback is an error in score(); in a table its row has no action.
        action = arrays["action"].copy()
        if plan.fallback is None:
            action[(failed >= 0) & (failed != plan.degraded_failure)] = -1
        # Few rows give reasons, and few different lists of them: code 0 is the empty list.
        codes = np.zeros(rows, dtype=np.int32)
        kinds: list[list[str]] = [[]]
        known: dict[tuple[int, int], int] = {}
        for row in np.flatnonzero((arrays["fired"] != 0) | (failed >= 0)).tolist():
            what = (int(arrays["fired"][row]), int(failed[row]))
            if what not in known:
                known[what] = len(kinds)
                kinds.append(list(texts.reasons_for(*what)))
            codes[row] = known[what]
        reasons = pa.array(kinds, type=pa.list_(pa.string())).take(pa.array(codes))
        score = arrays["score"]
        models = texts.models
        columns = {
            "id": ids.cast(pa.string()),
            "action": _words(action, texts.actions),
            "score": pa.array(score, mask=np.isnan(score)),
            "reasons": reasons,
            "model": _words(arrays["model"], [name for name, _ in models]),
            "model_version": _words(arrays["model"], [version for _, version in models]),
        }
        arms = arrays["arms"].reshape(rows, max(1, len(plan.experiments)))
        for i, step in enumerate(plan.experiments):
            columns[f"arm.{step.experiment.name}"] = _words(arms[:, i], list(step.experiment.arms))
        columns["outcome"] = _words(arrays["outcome"], list(OUTCOMES))
        columns["degraded"] = pa.array(arrays["degraded"].astype(bool))
        return columns

    # names

    def _pipeline(self, event: Any) -> int:
        if isinstance(event, Event) and type(event) not in self._pipeline_of:
            raise EventError("", f"no pipeline scores {type(event).__name__}{suggestion('', self.plan.pipelines)}")
        return self._only_pipeline().index

    def _only_pipeline(self) -> PipelinePlan:
        if len(self.plan.pipelines) != 1:
            raise PenstockError(f"say which pipeline: pipeline=...{suggestion('', self.plan.pipelines)}")
        return next(iter(self.plan.pipelines.values()))

    def _named(self, pipeline: str) -> PipelinePlan:
        plan = self.plan.pipelines.get(pipeline)
        if plan is None:
            raise PenstockError(f"no pipeline {pipeline!r}{suggestion(pipeline, self.plan.pipelines)}")
        return plan

    def _event_named(self, name: str) -> EventPlan:
        plan = self.plan.events.get(name)
        if plan is None:
            raise PenstockError(f"no event {name!r}{suggestion(name, self.plan.events)}")
        return plan

    def _only_event(self) -> EventPlan:
        if len(self.plan.events) != 1:
            raise PenstockError(f"say which event: event=...{self._known_events()}")
        return next(iter(self.plan.events.values()))

    def _known_events(self) -> str:
        return suggestion("", self.plan.events)

    def _typed_entity(self, entity: str) -> bool:
        """Whether the entity's type says that 1 and "1" are the same key."""
        return entity in self.plan.typed_entities


def _runtime_key(step: ModelStep) -> tuple[Any, ...]:
    """What a model of a pipeline is loaded once for: its reference, and the inputs it is given."""
    return step.model.ref, tuple(step.model.inputs) if step.model.inputs is not None else None


def fit(plan: PipelinePlan, step: ModelStep, runtime: Runtime) -> tuple[list[int], int]:
    """Slots of a model's inputs, by the features' names, and its output. Raises DefinitionError."""
    slots = plan.slot_types
    inputs = runtime.inputs
    if inputs is None:
        raise DefinitionError(
            f"the file has no names; say Model({step.model.ref!r}, inputs=[...]), its {runtime.n_inputs} features"
        )
    if len(inputs) != runtime.n_inputs:
        raise DefinitionError(f"takes {runtime.n_inputs} inputs, {len(inputs)} are named: {', '.join(inputs)}")
    found = []
    for feature in inputs:
        name_in_row = feature if feature in slots else feature.replace("__", ".", 1)
        if name_in_row not in slots:
            raise DefinitionError(f"input {feature!r} is no feature{suggestion(feature, slots)}")
        index, slot_type = slots[name_in_row]
        if slot_type == "string":
            raise DefinitionError(f"input {feature!r} is a string; models take numbers")
        found.append(index)
    output = step.model.output
    if output is None:
        if runtime.n_outputs > 2:
            raise DefinitionError(f"has {runtime.n_outputs} outputs; say which is the score: output=...")
        output = runtime.n_outputs - 1
    if not 0 <= output < runtime.n_outputs:
        raise DefinitionError(f"output={output}: it has outputs 0 to {runtime.n_outputs - 1}")
    return found, output


def _as_key(key: str | int, key_type: str, typed: bool) -> str | int:
    """A key as its entity's type reads it."""
    if typed and key_type == "string":
        return str(key)
    if typed and isinstance(key, str) and re.fullmatch(r"0|-?[1-9][0-9]{0,18}", key) and -(2**63) <= int(key) < 2**63:
        return int(key)
    return key


def _as_value(default: Any, slot_type: str) -> Any:
    """A default as the value that reading the feature gives."""
    if default is None:
        return None
    return {"float64": float, "timestamp": Timestamp}.get(slot_type, lambda value: value)(default)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _window_store(store: StorePlan, event: EventPlan, seed: bytes) -> WindowStore:
    return WindowStore(
        columns=[event.fields[c].type for c in store.columns],
        outputs=[
            NativeOutput(
                function=o.function, column=o.column, where=o.where, window=o.window, closed=o.closed, ttl=o.ttl
            )
            for o in store.outputs
        ],
        groups=store.groups,
        lateness=store.lateness,
        n_where=len(store.wheres),
        fingerprint=store.fingerprint,
        seed=seed,
        retention=store.lifetime,
    )


def _merge_order(times: list[Any]) -> Any:
    """(table of each row, row in its table) by event time, then table, then row; None for one table in order."""
    if len(times) == 1 and (len(times[0]) < 2 or bool((times[0][1:] >= times[0][:-1]).all())):
        return None
    every = np.concatenate(times) if times else np.empty(0, dtype=np.int64)
    order = np.argsort(every, kind="stable")
    starts = np.cumsum([0, *(len(t) for t in times)])
    table = (np.searchsorted(starts, order, side="right") - 1).astype(np.uint8)
    return table, (order - starts[table]).astype(np.int64)


def _warn_of_late(late: int, rows: int, why: str) -> None:
    """Every tenth row or more, and not a handful, is a mistake about order; fewer are what lateness is for."""
    if late >= 10 and 10 * late >= rows:
        warnings.warn(f"{late} of {rows} rows were late and are not in the windows: {why}", stacklevel=3)


def _words(codes: Any, words: Sequence[str]) -> Any:
    """Codes as strings; a negative code is null."""
    pa = pyarrow()
    indices = pa.array(codes.astype(np.int32), mask=codes < 0)
    return pa.DictionaryArray.from_arrays(indices, pa.array(list(words), type=pa.string())).cast(pa.string())
