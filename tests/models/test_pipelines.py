"""Models of pipelines are swapped between two events, and the log says so; what does not fit stays out."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest
from models.folders import put, trained

from penstock import Engine, Event, Experiment, Model, Pipeline, Timestamp, by_arm
from penstock.models.folder import ModelError, set_alias
from penstock.models.repository import ModelRepository
from penstock.offline.options import LogOptions
from penstock.offline.parity import parity
from penstock.offline.schemas import ScoreSchema

T0 = 1_700_000_000 * 10**6
FIELDS = ["a", "b", "c", "d", "e", "f"]


class Txn(Event):
    who: str
    at: Timestamp
    a: float
    b: float
    c: float
    d: float
    e: float
    f: float


class Paid(Event, event_id="key"):
    key: str
    at: Timestamp
    a: float
    b: float
    c: float
    d: float
    e: float
    f: float


def named(seed, features=FIELDS, **options):
    text = trained(seed, n_inputs=len(features), **options)
    for i, name in enumerate(features):
        text = text.replace(f"Column_{i}", name)
    return text


def event(i, kind=Txn, **key):
    values = {name: ((i * 7 + k * 13) % 29 - 14) / 7 for k, name in enumerate(FIELDS)}
    return kind(at=T0 + i * 10**6, **values, **(key or {"who": f"u{i % 5}"}))


def app_of(ref="fraud@live", event=Txn, **more):
    return {event.__name__: event, "p": Pipeline("p", event=event, features=FIELDS, model=ref, **more)}


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "models"
    put(folder, "fraud", "1", named(1))
    put(folder, "fraud", "2", named(2, trees=12, leaves=9))
    set_alias(folder, "fraud", "live", "1")
    return folder


def serving(engine, root, test, **options):
    async def run():
        repository = ModelRepository(root, engine=engine, **{"control": "poll", **options})
        try:
            repository.start()
            await repository.look()
            return await test(repository)
        finally:
            await repository.close()

    return asyncio.run(run())


async def settled(repository):
    await repository.look()
    await repository.look()


def alone(root, ref, i):
    """The decision of an engine that never knew another model."""
    return Engine(app_of(ref), models=root, clock="event").score(event(i))


def test_an_alias_that_moves_swaps_the_model(root):
    engine = Engine(app_of(), models=root, clock="event")

    async def test(repository):
        first = engine.score(event(1))
        assert (first.score, first.model_version) == (alone(root, "fraud@1", 1).score, "1")
        version = repository.table.version
        set_alias(root, "fraud", "live", "2")
        await repository.look()
        second = engine.score(event(2))
        assert (second.model, second.model_version) == ("fraud", "2")
        assert second.score == alone(root, "fraud@2", 2).score
        assert repository.table.version == version + 1
        assert first.model_version == "1"
        assert b'"model_version":"1"' in first.json()
        set_alias(root, "fraud", "live", "1")
        await repository.look()
        assert engine.score(event(3)).score == alone(root, "fraud@1", 3).score
        counts = engine.stats()["models"]["p"]
        assert counts == {"fraud@1": 2, "fraud@2": 1}
        assert engine.models["fraud@live"]["version"] == "1"

    serving(engine, root, test)


def test_a_file_that_is_replaced_swaps_the_model(root):
    engine = Engine(app_of("fraud@1"), models=root, clock="event")

    async def test(repository):
        put(root, "fraud", "1", named(7, trees=20, leaves=16))
        await settled(repository)
        assert engine.score(event(1)).score == alone(root, "fraud@1", 1).score
        put(root, "fraud", "1", named(8))
        await repository.load("fraud")
        assert engine.score(event(2)).score == alone(root, "fraud@1", 2).score
        assert engine.stats()["models"]["p"] == {"fraud@1": 2}
        for _ in range(100):
            await asyncio.sleep(0.02)
            if repository.worker.freed >= 4:  # two of the pipeline, two that were served
                break
        assert repository.worker.freed >= 4

    serving(engine, root, test)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (named(3, [*FIELDS[:5], "other"]), "input 'other' is no feature"),
        (named(3, FIELDS[:5]), None),  # fewer inputs, all of them features: it fits
        (named(3, classes=3), "has 3 outputs"),
        (trained(3), "the file has no names"),
        (named(3)[:800], "model.txt"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_and_the_old_one_stays(root, text, why):
    engine = Engine(app_of(), models=root, clock="event")

    async def test(repository):
        before = engine.score(event(1), ingest=False).score
        put(root, "fraud", "3", text)
        set_alias(root, "fraud", "live", "3")
        if why is None:
            await repository.load("fraud")
            assert engine.score(event(1), ingest=False).model_version == "3"
            return
        with pytest.raises(ModelError, match=why) as caught:
            await repository.load("fraud")
        assert "3" in str(caught.value)
        decision = engine.score(event(1), ingest=False)
        assert (decision.score, decision.model_version) == (before, "1")
        set_alias(root, "fraud", "live", "2")
        await repository.load("fraud") if "model.txt" not in why else await settled(repository)
        assert engine.score(event(1), ingest=False).model_version == "2"

    serving(engine, root, test)


def test_an_alias_that_means_nothing(root):
    engine = Engine(app_of(), models=root, clock="event")

    async def test(repository):
        (root / "fraud" / "aliases.json").write_text('{"live": "9"}')
        with pytest.raises(ModelError, match="live means 9 now, and versions are 1, 2; the pipelines keep fraud@1"):
            await repository.load("fraud")
        (root / "fraud" / "aliases.json").write_text("{")
        await settled(repository)
        assert engine.score(event(1)).model_version == "1"
        assert any("aliases.json" in warning for warning in repository.warnings)

    serving(engine, root, test)


def test_arms_and_shadows_are_swapped_together(root):
    """A wider model than any before, in every place that names it, in tables too."""
    wide = [*FIELDS]
    put(root, "small", "1", named(4, FIELDS[:2]))
    set_alias(root, "small", "live", "1")
    experiment = Experiment("x", unit="who", arms={"a": 0.5, "b": 0.5})
    app = {
        "Txn": Txn,
        "p": Pipeline(
            "p",
            event=Txn,
            features=FIELDS,
            experiments=[experiment],
            model=by_arm("x", a="small@live", b=Model("small@live")),
            models=["small@live"],
        ),
    }
    engine = Engine(app, models=root, clock="event")

    async def test(repository):
        engine.score(event(0))
        put(root, "small", "2", named(5, wide, trees=40, leaves=31))
        set_alias(root, "small", "live", "2")
        await repository.load("small")
        fresh = Engine(app, models=root, clock="event")
        fresh.ingest(event(0))
        for i in range(1, 20):
            mine, theirs = engine.score(event(i)), fresh.score(event(i))
            assert (mine.score, mine.model_version, mine.arms) == (theirs.score, "2", theirs.arms)
        events = [event(i) for i in range(20, 40)]
        table = {name: [getattr(e, name) for e in events] for name in ("who", "at", *FIELDS)}
        columns = [engine.score_batch(table), fresh.score_batch(table)]
        for name in ("score", "model_version"):
            assert columns[0][name].to_pylist() == columns[1][name].to_pylist()

    try:
        serving(engine, root, test)
    finally:
        engine.close()


def test_swaps_beside_threads_that_score(root):
    """Every decision is one of the two models', whole: its score is that of the model that it names."""
    engine = Engine(app_of(), models=root, clock="event")
    right = {(v, i): alone(root, f"fraud@{v}", i).score for v in "12" for i in range(40)}
    stop, wrong, seen = threading.Event(), [], set()

    def score():
        i = 0
        while not stop.is_set():
            i = (i + 1) % 40
            decision = engine.score(event(i), ingest=False)
            seen.add(decision.model_version)
            if decision.score != right[decision.model_version, i]:
                wrong.append((decision.model_version, i))

    async def test(repository):
        threads = [threading.Thread(target=score) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for n in range(20):
                set_alias(root, "fraud", "live", "12"[(n + 1) % 2])
                await repository.load("fraud")
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    serving(engine, root, test)
    assert wrong == []
    assert seen == {"1", "2"}


# the log


def score_schemas(folder):
    from penstock.offline.log_folder import LogFolder

    found = []
    log = LogFolder(folder)
    for number in log.numbers():
        segment = log.segment(number)
        found += [schema for schema in segment.schemas() if isinstance(schema, ScoreSchema)]
        segment.close()
    return found


def test_the_log_names_the_model_that_scored(root, tmp_path):
    options = LogOptions(keeper=False, segment_bytes=1 << 20)
    app = app_of()
    log = tmp_path / "log"

    async def test(repository):
        for i in range(10):
            engine.score(event(i))
        set_alias(root, "fraud", "live", "2")
        await repository.look()
        set_alias(root, "fraud", "live", "1")  # two swaps with no event between them
        await repository.look()
        set_alias(root, "fraud", "live", "2")
        await repository.look()
        for i in range(10, 25):
            engine.score(event(i))
        engine.core.log.roll()
        for i in range(25, 30):
            engine.score(event(i))

    with Engine(app, models=root, clock="event", log=log, log_options=options) as engine:
        serving(engine, root, test)
    schemas = score_schemas(log)
    assert [[schema.models[i] for i in schema.running] for schema in schemas] == [
        [("fraud", "1")],
        [("fraud", "2")],
        [("fraud", "2")],
    ]
    assert [schema.models for schema in schemas] == [[("fraud", "1")], *[[("fraud", "1"), ("fraud", "2")]] * 2]
    assert schemas[0].deployment == 0
    assert schemas[1].deployment == schemas[2].deployment > 0
    assert all(len(digest) == 64 for schema in schemas for digest in schema.digests)

    report = parity(app, log, models=root)  # today's model is fraud@2
    (pipeline,) = report.pipelines
    assert report.ok
    assert pipeline.scores == 30
    assert pipeline.other_plans == 10
    assert (pipeline.decisions.compared, pipeline.decisions.equal) == (20, 20)
    put(root, "fraud", "2", named(9))  # the same name and version, another file
    (pipeline,) = parity(app, log, models=root).pipelines
    assert pipeline.decisions is None
    assert pipeline.other_plans == 30
    set_alias(root, "fraud", "live", "1")
    (pipeline,) = parity(app, log, models=root).pipelines
    assert (pipeline.decisions.compared, pipeline.decisions.equal, pipeline.other_plans) == (10, 10, 20)

    with Engine(app, models=root, clock="event", log=log, log_options=options) as engine:
        assert engine.recovery.events == 30
        assert engine.recovery.damages == []
        assert engine.score(event(31)).model_version == "1"
    from penstock.offline.compaction import compact

    compact(log, None)
    (pipeline,) = parity(app, log, models=root).pipelines
    assert pipeline.scores == 31
    assert pipeline.decisions.compared == pipeline.decisions.equal == 11


def test_a_repeated_event_keeps_the_decision_of_the_model_before_the_swap(root, tmp_path):
    """S16, over a swap and over a restart."""
    options = LogOptions(keeper=False)
    app = app_of(event=Paid)
    log = tmp_path / "log"

    async def test(repository):
        first = [engine.score(event(i, Paid, key=f"k{i}")) for i in range(5)]
        set_alias(root, "fraud", "live", "2")
        await repository.look()
        first += [engine.score(event(i, Paid, key=f"k{i}")) for i in range(5, 10)]
        for i, decision in enumerate(first):
            again = engine.score(event(i, Paid, key=f"k{i}"))
            assert (again.id, again.model_version, again.score) == (decision.id, decision.model_version, decision.score)
        return [(d.id, d.model_version, d.score, d.action) for d in first]

    with Engine(app, models=root, clock="event", log=log, log_options=options) as engine:
        first = serving(engine, root, test)
    assert [version for _, version, _, _ in first] == ["1"] * 5 + ["2"] * 5
    with Engine(app, models=root, clock="event", log=log, log_options=options) as engine:
        again = [engine.score(event(i, Paid, key=f"k{i}")) for i in range(10)]
        assert [(d.id, d.model_version, d.score, d.action) for d in again] == first
        assert b'"model_version":"1"' in again[0].json()


def test_a_log_that_has_no_room_for_the_schemas_refuses_the_swap(root, tmp_path):
    options = LogOptions(keeper=False, segment_bytes=64 << 10)
    with Engine(app_of(), models=root, clock="event", log=tmp_path / "log", log_options=options) as engine:

        async def test(repository):
            for n in range(3, 2000):
                engine.core.pipes[0].know_model("fraud", f"{n}.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0")
            set_alias(root, "fraud", "live", "2")
            with pytest.raises(ModelError, match=r"cannot take other schemas: a segment of .* has no room"):
                await repository.load("fraud")
            assert engine.score(event(1)).model_version == "1"

        serving(engine, root, test)


def test_nothing_but_the_folder_is_needed_to_embed(root):
    engine = Engine(app_of(), models=root, clock="event")
    assert engine.running(0).models[0][:2] == ("fraud", "1")
    assert os.listdir(root) == ["fraud"]


def test_an_alias_that_moved_before_the_repository_started(root):
    engine = Engine(app_of(), models=root, clock="event")
    set_alias(root, "fraud", "live", "2")

    async def test(repository):
        assert engine.score(event(1)).score == alone(root, "fraud@2", 1).score

    serving(engine, root, test)


def test_a_pipeline_keeps_its_model_when_it_is_unloaded_or_its_folder_goes(root):
    """A pipeline is not served under the model's name: it keeps what it runs until there is something else."""
    engine = Engine(app_of(), models=root, clock="event")

    async def test(repository):
        before = engine.score(event(1), ingest=False)
        await repository.unload("fraud")
        (root / "fraud").rename(root / ".fraud")
        await settled(repository)
        after = engine.score(event(1), ingest=False)
        assert (after.score, after.model_version) == (before.score, "1")
        (root / ".fraud").rename(root / "fraud")
        set_alias(root, "fraud", "live", "2")
        await settled(repository)
        assert engine.score(event(1), ingest=False).model_version == "2"

    serving(engine, root, test)


def test_models_that_are_swapped_while_the_log_rolls_and_is_read_again(root, tmp_path):
    """Many swaps, small segments: every score record names the model whose score it holds."""
    options = LogOptions(keeper=False, segment_bytes=256 << 10)
    log = tmp_path / "log"
    right = {(v, i): alone(root, f"fraud@{v}", i).score for v in "12" for i in range(20)}

    async def test(repository):
        for n in range(25):
            set_alias(root, "fraud", "live", "12"[(n + 1) % 2])
            await repository.load("fraud")
            for i in range(20 if n % 3 else 0):
                decision = engine.score(event(i))
                assert decision.score == right[decision.model_version, i]

    with Engine(app_of(), models=root, clock="event", log=log, log_options=options) as engine:
        serving(engine, root, test)
        written = engine.core.next_sequence
    for version in "12":
        set_alias(root, "fraud", "live", version)
        report = parity(app_of(), log, models=root)
        (pipeline,) = report.pipelines
        assert report.ok
        assert pipeline.scores == written
        assert pipeline.decisions.compared == pipeline.decisions.equal == written - pipeline.other_plans > 0
    with Engine(app_of(), models=root, clock="event", log=log, log_options=options) as engine:
        assert (engine.recovery.events, engine.recovery.damages) == (written, [])
