"""Parity: what was served equals what the log gives; and a planted skew of every kind is caught and named.

What must stay true: a report says "equal" only of rows that it compared.
"""

import msgspec
import pytest
from offline.shop_log import OPTIONS, SHOP, START, fill, raw_records, rewritten

from penstock import Engine
from penstock.cli import main
from penstock.errors import LogError
from penstock.offline.log_folder import LogFolder
from penstock.offline.parity import parity

BY_NAME = ["spend.count_1h", "spend.count_1d", "spend.mean_amount_1d", "spend.last_note_1d"]


def of(report, name):
    (pipeline,) = report.pipelines
    return next(
        f for f in [*pipeline.features, *([pipeline.decisions] if pipeline.decisions else [])] if f.name == name
    )


def wrong(report):
    return {f.name for p in report.pipelines for f in p.features if f.mismatched}


def changed(tmp_path, old, new, name="changed.py"):
    text = SHOP.read_text()
    assert text.count(old) == 1, old
    path = tmp_path / name
    path.write_text(text.replace(old, new))
    return str(path)


def test_what_was_served_is_what_the_log_gives(folder):
    report = parity(str(SHOP), folder)
    assert report.ok
    (pipeline,) = report.pipelines
    assert pipeline.scores == 400
    assert report.events > 400
    for feature in pipeline.features:
        assert (feature.compared, feature.equal, feature.mismatched) == (400, 400, 0), feature
        assert (feature.missing, feature.extra, feature.erased) == (0, 0, 0)
    assert pipeline.decisions is not None
    assert pipeline.decisions.equal == 400
    assert "equal, bit for bit" in str(report)


def test_late_and_repeated_events_and_tables_are_in_it(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    with Engine(str(SHOP), log=tmp_path / "log", log_options=OPTIONS) as engine:
        decisions = fill(engine, 200)
        late = [d for d in decisions if d.outcome == "late"]
        rows = [
            {
                "id": f"t{i % 40}",
                "customer": f"c{i % 7}",
                "shop": i % 3,
                "amount": 1.5 * i,
                "note": None,
                "at": START + i,
            }
            for i in range(60)
        ]
        engine.score_batch(pyarrow.Table.from_pylist(rows), pipeline="orders")
        engine.ingest({**rows[0], "id": "only-ingested"}, "Order")
        again = engine.score({**rows[0], "id": "only-ingested"}, pipeline="orders")
        assert again.outcome == "duplicate"
    assert late
    report = parity(str(SHOP), tmp_path / "log")
    assert report.ok, str(report)
    assert report.pipelines[0].scores == 200 + 40 + 1


def test_a_changed_definition_is_named(folder, tmp_path):
    report = parity(
        changed(
            tmp_path,
            '    entity="customer",\n    source=Order,\n    include_request_event=True',
            '    entity="customer",\n    source=Order,\n    include_request_event=False',
        ),
        folder,
    )
    assert not report.ok
    assert set(BY_NAME[:3]) <= wrong(report)
    assert not wrong(report) & {"shops.count_1h", "shops.sum_amount_1d", "shops.last_amount_1d", "logins.count_1d"}
    example = of(report, "spend.count_1h").examples[0]
    assert example.served == 1
    assert example.computed == 0
    assert example.decision in str(report)
    assert report.pipelines[0].other_plans == 400
    assert "MISMATCH" in str(report)


def test_another_default_is_named(folder, tmp_path):
    # The mean has a value wherever the request event counts: only where it does not is the default served.
    app = changed(tmp_path, "    include_request_event=True,\n", "")
    with Engine(app, log=tmp_path / "other", log_options=OPTIONS) as engine:
        fill(engine, 50)
    again = tmp_path / "default.py"
    again.write_text((tmp_path / "changed.py").read_text().replace("default=-1.0", "default=0.0"))
    report = parity(str(again), tmp_path / "other")
    assert "spend.mean_amount_1d" in wrong(report)
    assert wrong(report) <= {"spend.mean_amount_1d", "dear"}
    example = of(report, "spend.mean_amount_1d").examples[0]
    assert (example.served, example.computed) == (-1.0, 0.0)


def test_a_late_event_shown_too_early_is_caught(tmp_path):
    with Engine(str(SHOP), log=tmp_path / "log", log_options=OPTIONS) as engine:

        def score(i, at):
            event = {"id": f"o{i}", "customer": "c", "shop": 1, "amount": 2.0, "note": None, "at": START + at}
            return engine.score(event, pipeline="orders", explain=True)

        score(0, 60_000_000)
        second = score(1, 120_000_000)
        score(2, 90_000_000)  # arrives behind the second, though it happened before
    assert second.features["spend.count_1h"] == 2
    assert parity(str(SHOP), tmp_path / "log").ok

    def too_early(records):
        events = [r for r in records if r[1] in (0, 1, 2) and r[0] in ("event", "score")]
        order = {0: 0, 1: 2, 2: 1}
        moved = sorted(((k, order[s], d) for k, s, d in events), key=lambda r: r[1])
        return [r for r in records if r not in events] + moved

    rewritten(tmp_path / "log", too_early)
    report = parity(str(SHOP), tmp_path / "log")
    assert {"spend.count_1h", "spend.count_1d"} <= wrong(report)
    example = of(report, "spend.count_1h").examples[0]
    assert {example.served, example.computed} == {2, 3}


def test_a_flipped_tie_is_caught(tmp_path):
    with Engine(str(SHOP), log=tmp_path / "log", log_options=OPTIONS) as engine:
        for i, amount in enumerate((1.0, 2.0)):
            engine.ingest(
                {"id": f"o{i}", "customer": "c", "shop": 1, "amount": amount, "note": None, "at": START}, "Order"
            )
        event = {"id": "o2", "customer": "c", "shop": 1, "amount": 3.0, "note": None, "at": START + 1}
        assert engine.score(event, pipeline="orders", explain=True).features["shops.last_amount_1d"] == 2.0

    def flipped(records):
        swap = {0: 1, 1: 0}
        return sorted(
            ((k, swap.get(s, s) if k == "event" else s, d) for k, s, d in records),
            key=lambda r: r[1] if r[0] in ("event", "score") else -1,
        )

    rewritten(tmp_path / "log", flipped)
    report = parity(str(SHOP), tmp_path / "log")
    assert wrong(report) == {"shops.last_amount_1d"}
    example = of(report, "shops.last_amount_1d").examples[0]
    assert (example.served, example.computed) == (2.0, 1.0)


def test_one_wrong_bit_is_a_mismatch(folder):
    import struct

    def nudged(records):
        found = []
        done = False
        for kind, sequence, data in records:
            if kind == "score" and not done:
                # The first logged value behind head, score and versions that is the mean.
                at = 32 + 72 + 8 * 3 + 8 * 3
                (value,) = struct.unpack_from("<Q", data, at)
                data = data[:at] + struct.pack("<Q", value ^ 1) + data[at + 8 :]
                done = True
            found.append((kind, sequence, data))
        return found

    rewritten(folder, nudged)
    report = parity(str(SHOP), folder)
    assert wrong(report) == {"spend.mean_amount_1d"}
    assert of(report, "spend.mean_amount_1d").mismatched == 1


def test_features_that_came_and_went_are_counted_apart(folder, tmp_path):
    app = changed(tmp_path, 'Aggregation("count", windows=["1h", "1d"])', 'Aggregation("count", windows=["1h", "2d"])')
    report = parity(app, folder)
    assert report.ok
    assert of(report, "spend.count_2d").missing == 400
    assert of(report, "spend.count_1d").extra == 400
    assert of(report, "spend.count_1d").compared == 0


def test_only_sampled_scores_are_compared(tmp_path):
    options = msgspec.structs.replace(OPTIONS, scores=0.4)
    sampled = []
    for name in ("log", "again"):
        with Engine(str(SHOP), log=tmp_path / name, log_options=options) as engine:
            fill(engine, 300)
        report = parity(str(SHOP), tmp_path / name)
        assert report.ok
        sampled.append([sequence for kind, sequence, _ in raw_records(tmp_path / name) if kind == "score"])
    assert 0 < len(sampled[0]) < 300
    assert sampled[0] == sampled[1], "which entities are sampled does not depend on the engine's seed"
    assert report.pipelines[0].scores == len(sampled[0])


def test_the_command_says_so_by_its_exit_code(folder, tmp_path, capsys):
    assert main(["parity", str(SHOP), "--log", str(folder)]) == 0
    assert "equal, bit for bit" in capsys.readouterr().out
    app = changed(tmp_path, 'windows=["1d"], where="not ok"', 'windows=["1d"], where="ok"')
    assert main(["parity", app, "--log", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "logins.count_1d: decision" in out
    assert main(["parity", str(SHOP), "--log", str(tmp_path / "nothing")]) == 1
    assert "no event log here" in capsys.readouterr().err


def test_parity_of_a_log_in_use(tmp_path):
    with Engine(str(SHOP), log=tmp_path / "log", log_options=OPTIONS) as engine:
        fill(engine, 100)
        report = parity(str(SHOP), tmp_path / "log")
        assert report.ok
        assert report.pipelines[0].scores == 100
        fill(engine, 50, seed=2, first=1000)
        assert parity(str(SHOP), tmp_path / "log").pipelines[0].scores == 150


def test_a_training_set_of_the_time_alone_differs_only_by_events_in_flight(tmp_path):
    import time

    with Engine(str(SHOP), log=tmp_path / "log", log_options=OPTIONS) as engine:
        for i in range(60):
            now = time.time_ns() // 1000
            event = {"id": f"o{i}", "customer": f"c{i % 3}", "shop": 1, "amount": 2.0 + i, "note": None, "at": now}
            if i % 10 == 5:
                # An order that another one overtook: it happened before, and comes in behind it.
                other = {**event, "id": f"p{i}", "at": now - 2000}
                engine.ingest(other, "Order")
                event["at"] = now - 1000
            engine.score(event, pipeline="orders")
    report = parity(str(SHOP), tmp_path / "log", by_time=True)
    assert report.ok, str(report)
    by_time = report.pipelines[0].by_time
    assert by_time.compared == 60
    assert by_time.mismatched == 0
    assert by_time.in_flight >= 6
    assert by_time.equal >= 40
    assert by_time.equal + by_time.in_flight == 60
    assert "differ by events in flight" in str(report)


def test_after_retention_only_whole_windows_are_compared(tmp_path):
    options = msgspec.structs.replace(OPTIONS, segment_bytes=1 << 16)
    with Engine(str(SHOP), log=tmp_path / "log", log_options=options) as engine:
        fill(engine, 3000)
    whole = parity(str(SHOP), tmp_path / "log")
    assert whole.ok
    folder = LogFolder(tmp_path / "log")
    first, *rest = folder.numbers()
    assert len(rest) > 8
    for number in (first, *rest[:3]):
        segment = folder.segment(number)
        last = segment.mark.last_sequence
        segment.close()
        folder.begin_at(last + 1)
        folder.segment_path(number).unlink()
    report = parity(str(SHOP), tmp_path / "log")
    assert report.ok, str(report)
    assert report.history_begins == last + 1
    short, long = of(report, "shops.count_1h"), of(report, "shops.sum_amount_1d")
    assert 0 < short.before < long.before
    assert short.compared + short.before == report.pipelines[0].scores == long.compared + long.before
    assert of(report, "dear").before == long.before
    assert "were not compared" in str(report)
    # What needs dropped events and is in no snapshot is not built in silence.
    with pytest.raises(LogError, match=r"dropped by retention.*Order by customer.*--start-partial.*--start-cold"):
        Engine(str(SHOP), log=tmp_path / "log", log_options=options)
    partial = msgspec.structs.replace(options, start_partial=True)
    with Engine(str(SHOP), log=tmp_path / "log", log_options=partial) as engine:
        assert engine.recovery.events == whole.events - report.history_begins
        assert engine.core.next_sequence == whole.events
        assert "Order by customer" in engine.recovery.partial
        assert any("INVALID until they have refilled" in line for line in engine.recovery.lines())


def test_nothing_compared_is_not_equal(tmp_path, capsys):
    options = msgspec.structs.replace(OPTIONS, scores=0.0)
    with Engine(str(SHOP), log=tmp_path / "log", log_options=options) as engine:
        fill(engine, 20)
    report = parity(str(SHOP), tmp_path / "log")
    assert report.compared == 0
    assert "nothing was compared" in str(report)
    assert "equal, bit for bit" not in str(report)
    assert main(["parity", str(SHOP), "--log", str(tmp_path / "log")]) == 2
    capsys.readouterr()
