"""Parity by another route: equal on logs that are right, and faults seen that the kernel shares with its own parity."""

import random
import struct

import msgspec
import pytest
from offline.compacting import shop_log
from offline.shop_log import OPTIONS, SHOP, START, fill, rewritten

from penstock import (
    Aggregation,
    Engine,
    Entity,
    Event,
    FeatureView,
    Lifetime,
    PenstockError,
    Pipeline,
    Timestamp,
    engine,
)
from penstock.app import load_plan
from penstock.cli import main
from penstock.offline import independent
from penstock.offline.compaction import compact
from penstock.offline.erasure import erase
from penstock.offline.history import History
from penstock.offline.independent import _Walks
from penstock.offline.log_folder import LogFolder
from penstock.offline.parity import parity

VIEWS = {
    *("spend.count_1h", "spend.count_1d", "spend.mean_amount_1d", "spend.last_note_1d"),
    *("shops.count_1h", "shops.sum_amount_1d", "shops.last_amount_1d", "logins.count_1d"),
}


def by_name(report):
    (pipeline,) = report.pipelines
    return {feature.name: feature for feature in pipeline.features}


def wrong(report):
    return {name for name, feature in by_name(report).items() if feature.mismatched}


def test_what_was_served_is_what_the_raw_events_give(folder):
    """Late events, repeated ones, ties, two sources, strings, defaults; no function, no arm."""
    report = parity(str(SHOP), folder, independent=True)
    assert report.ok, str(report)
    assert set(by_name(report)) == VIEWS
    for feature in by_name(report).values():
        assert (feature.compared, feature.equal, feature.missing, feature.extra) == (400, 400, 0, 0)
    assert "from raw events without the engine" in str(report)
    assert "equal, bit for bit" in str(report)


def test_tables_repeated_events_and_logs_in_use(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    with Engine(str(SHOP), log=tmp_path / "log", log_options=OPTIONS) as one:
        fill(one, 100)
        rows = [
            {
                "id": f"t{i % 40}",
                "customer": f"c{i % 7}",
                "shop": i % 3,
                "amount": 1.5 * i,
                "note": None,
                "at": START + i,
            }
            for i in range(600)
        ]
        one.score_batch(pyarrow.Table.from_pylist(rows), pipeline="orders")
        one.ingest({**rows[0], "id": "only-ingested"}, "Order")
        assert one.score({**rows[0], "id": "only-ingested"}, pipeline="orders").outcome == "duplicate"
        report = parity(str(SHOP), tmp_path / "log", independent=True)
    assert report.ok, str(report)
    assert report.pipelines[0].sampled == report.pipelines[0].scores == 100 + 40 + 1


class Pay(Event, lateness="20s"):
    who: str
    code: str
    amount: float | None
    qty: int
    at: Timestamp


class Visit(Event, lateness="5s"):
    number: int
    length: float
    at: Timestamp


NUMERIC = ("sum", "mean", "var_samp", "var_pop", "stddev_samp", "stddev_pop", "min", "max")
NUMBER = Entity("number", type=int)
WIDE = {
    "pays": FeatureView(
        "pays",
        entity="who",
        source=Pay,
        include_request_event=True,
        aggregations=[
            *(Aggregation(f, c, windows=["3s", "1m", Lifetime]) for f in NUMERIC for c in ("amount", "qty")),
            Aggregation("count", windows=["10s"], where="amount > 1 or qty in (1, 2)", name="some"),
            Aggregation("first", "amount", windows=["1m", Lifetime], ttl="20s", default=-1.0, closed="both"),
            Aggregation("last", "code", windows=["1m"], ttl="2s", closed="left"),
            Aggregation("distinct_count", "code", windows=["1m"]),
        ],
    ),
    "visits": FeatureView(
        "visits",
        entity=NUMBER,
        source=Visit,
        aggregations=[Aggregation("mean", "length", windows=["1m"]), Aggregation("count", windows=["5s"])],
    ),
    "codes": FeatureView(
        "codes", entity=NUMBER, source=Pay, key="code", aggregations=[Aggregation("sum", "amount", windows=["30s"])]
    ),
    "kept": FeatureView(
        "kept",
        entity="code",
        source=Pay,
        retention="40s",
        include_request_event=True,
        aggregations=[
            Aggregation("count", windows=["0s", "10s"], closed="both"),
            Aggregation("sum", "amount", windows=[Lifetime]),
            Aggregation("first", "qty", windows=[Lifetime], ttl="30s"),
        ],
    ),
    "of_visits": Pipeline("of_visits", event=Visit, features=["visits", "codes"]),
    "of_pays": Pipeline("of_pays", event=Pay, features=["pays", "codes", "kept"]),
}


def fill_wide(one, n, seed=3):
    rng = random.Random(seed)
    at = START
    for i in range(n):
        at += rng.choice([0, 0, 1, 1_000_000, 7_000_000])
        when = at - rng.choice([0, 0, 0, 4_000_000, 15_000_000, 60_000_000])
        if rng.random() < 0.3:
            one.score({"number": rng.randrange(3), "length": 0.1 * i, "at": when}, pipeline="of_visits")
            continue
        amount = rng.choice([None, 0.1, -0.0, 1e16, 1e308, -1e308, round(rng.expovariate(0.1), 2)])
        pay = {
            "who": rng.choice("abc"),
            "code": rng.choice(["1", "2", "01", f"seldom {rng.randrange(20)}"]),
            "amount": amount,
            "qty": rng.choice([1, 2, 3, 2**63 - 1]),
            "at": when,
        }
        one.score(pay, pipeline="of_pays")


def test_every_function_window_and_key(tmp_path):
    with Engine(WIDE, clock="event", log=tmp_path / "log", log_options=OPTIONS) as one:
        fill_wide(one, 500)
    report = parity(WIDE, tmp_path / "log", independent=True)
    assert report.ok, str(report)
    assert sum(p.sampled for p in report.pipelines) == 500
    assert report.compared > 10_000
    assert parity(WIDE, tmp_path / "log").ok


@pytest.mark.parametrize("edge", ["both", "left"])
def test_a_fault_of_the_kernel_is_seen_where_the_kernels_own_parity_is_blind(tmp_path, monkeypatch, edge):
    right = engine.NativeOutput

    def faulty(**given):
        return right(**{**given, "closed": edge, "where": None})

    monkeypatch.setattr(engine, "NativeOutput", faulty)
    app = {"pays": WIDE["pays"], "p": Pipeline("p", event=Pay, features=["pays"])}
    with Engine(app, clock="event", log=tmp_path / "log", log_options=OPTIONS) as one:
        for i in range(60):
            one.score({"who": "a", "code": "1", "amount": 0.5 * i, "qty": 7, "at": START + i * 1_000_000})
    assert parity(app, tmp_path / "log").ok, "what serving and parity share, parity cannot see"
    report = parity(app, tmp_path / "log", independent=True)
    assert not report.ok
    assert {"pays.some", "pays.sum_amount_3s", "pays.sum_qty_1m"} - wrong(report) <= {"pays.sum_qty_1m"}
    example = by_name(report)["pays.some"].examples[0]
    assert example.served != example.computed
    assert example.decision in str(report)
    assert "MISMATCH" in str(report)


def test_one_wrong_bit_in_the_log_is_a_mismatch(folder):
    def nudged(records):
        found, done = [], False
        for kind, sequence, data in records:
            if kind == "score" and not done:
                at = 32 + 72 + 8 * 3 + 8 * 3  # behind head, score and versions: the mean
                (value,) = struct.unpack_from("<Q", data, at)
                data, done = data[:at] + struct.pack("<Q", value ^ 1) + data[at + 8 :], True
            found.append((kind, sequence, data))
        return found

    rewritten(folder, nudged)
    report = parity(str(SHOP), folder, independent=True)
    assert wrong(report) == {"spend.mean_amount_1d"}
    assert by_name(report)["spend.mean_amount_1d"].mismatched == 1


def test_a_status_alone_is_a_mismatch(folder):
    def nudged(records):
        found, done = [], False
        for kind, sequence, data in records:
            n = int.from_bytes(data[12:14], "little")
            at = 32 + 72 + 8 * data[14] + 8 * n  # the status bytes
            if kind == "score" and not done and data[at + 6] == 3:
                data, done = data[: at + 6] + b"\x02" + data[at + 7 :], True
            found.append((kind, sequence, data))
        assert done
        return found

    rewritten(folder, nudged)
    report = parity(str(SHOP), folder, independent=True)
    assert wrong(report) == {"shops.sum_amount_1d"}
    (example,) = by_name(report)["shops.sum_amount_1d"].examples
    assert (example.served_status, example.computed_status) == ("NULL_VALUE", "NOT_FOUND")


def test_the_sample_is_the_same_for_the_same_seed_and_bounded(folder):
    def sampled(seed, n=50):
        report = parity(str(SHOP), folder, independent=True, sample=n, seed=seed)
        assert report.pipelines[0].sampled == min(n, 400)
        assert report.pipelines[0].scores == 400
        assert report.ok, str(report)

    def chosen(seed):
        history = History(LogFolder(folder))
        history.check()
        scores = _Walks(load_plan(str(SHOP)), history, None).choose(["orders"], 50, seed)[0]["orders"]
        return {score.sequence for _, _, score in scores}

    sampled(0)
    sampled(1, 1000)
    assert chosen(0) == chosen(0)
    assert len(chosen(0)) == 50
    assert len(chosen(0) & chosen(1)) < 25


def test_either_form_of_history_and_an_erased_entity(tmp_path):
    pytest.importorskip("pyarrow")
    folder = shop_log(tmp_path / "log")
    compact(folder)
    report = parity(str(SHOP), folder, independent=True)
    assert report.ok, str(report)
    assert report.pipelines[0].sampled == 450
    erase(folder, "customer", "c3")
    report = parity(str(SHOP), folder, independent=True)
    assert report.ok, str(report)
    kernel = {f.name: f for f in parity(str(SHOP), folder).pipelines[0].features}
    for name, feature in by_name(report).items():
        assert (feature.compared, feature.equal, feature.erased) == (
            kernel[name].compared,
            kernel[name].equal,
            kernel[name].erased,
        ), name
    assert by_name(report)["spend.count_1h"].erased > 0


def test_history_that_was_dropped_is_not_judged(tmp_path):
    options = msgspec.structs.replace(OPTIONS, segment_bytes=1 << 16)
    with Engine(str(SHOP), log=tmp_path / "log", log_options=options) as one:
        fill(one, 3000)
    folder = LogFolder(tmp_path / "log")
    first, *rest = folder.numbers()
    for number in (first, *rest[:3]):
        segment = folder.segment(number)
        last = segment.mark.last_sequence
        segment.close()
        folder.begin_at(last + 1)
        folder.segment_path(number).unlink()
    report = parity(str(SHOP), tmp_path / "log", independent=True, sample=10_000)
    assert report.ok, str(report)
    assert report.history_begins == last + 1
    found = by_name(report)
    assert 0 < found["shops.count_1h"].before < found["shops.sum_amount_1d"].before
    for feature in found.values():
        assert feature.compared + feature.before == report.pipelines[0].sampled
    assert "were not compared" in str(report)


def test_scores_of_older_rules_are_counted_apart(folder, monkeypatch):
    monkeypatch.setattr(independent, "SEMANTICS", independent.SEMANTICS + 1)
    report = parity(str(SHOP), folder, independent=True)
    assert (report.pipelines[0].scores, report.pipelines[0].older, report.pipelines[0].sampled) == (400, 400, 0)
    assert report.compared == 0
    assert "400 scores were logged by an older Penstock" in str(report)


def test_features_that_came_and_went_are_counted_apart(folder, tmp_path):
    text = SHOP.read_text()
    app = tmp_path / "changed.py"
    app.write_text(
        text.replace('Aggregation("count", windows=["1h", "1d"])', 'Aggregation("count", windows=["1h", "2d"])')
    )
    report = parity(str(app), folder, independent=True)
    assert report.ok
    found = by_name(report)
    assert found["spend.count_2d"].missing == 400
    assert found["spend.count_1d"].extra == 400
    assert found["spend.count_1d"].compared == 0
    assert report.pipelines[0].other_plans == 400


def test_an_event_type_with_other_fields(folder, tmp_path):
    """A field that records lack has its default; one that the app lacks is passed over; one that changed is refused."""
    text = SHOP.read_text()
    app = tmp_path / "more.py"
    app.write_text(
        text.replace(
            "note: str | None\n    at: Timestamp", 'note: str | None\n    at: Timestamp\n    coupon: str | None = "no"'
        )
    )
    assert "coupon" in app.read_text()
    report = parity(str(app), folder, independent=True)
    assert report.ok, str(report)
    assert report.compared == 8 * 400
    app.write_text(
        text.replace("    amount: float\n", "    amount: int\n").replace(
            "def dear(amount: float", "def dear(amount: int"
        )
    )
    with pytest.raises(PenstockError, match="amount was float64 and is int64 now"):
        parity(str(app), folder, independent=True)


def test_the_command(folder, tmp_path, capsys):
    assert main(["parity", str(SHOP), "--log", str(folder), "--independent", "--sample", "30"]) == 0
    out = capsys.readouterr().out
    assert "30 of them sampled" in out
    assert "equal, bit for bit" in out
    app = tmp_path / "changed.py"
    app.write_text(SHOP.read_text().replace('windows=["1d"], where="not ok"', 'windows=["1d"], where="ok"'))
    assert main(["parity", str(app), "--log", str(folder), "--independent", "--json"]) == 1
    report = msgspec.json.decode(capsys.readouterr().out)
    assert report["independent"] is True
    assert main(["parity", str(SHOP), "--log", str(folder), "--independent", "--by-time"]) == 1
    assert "leave models and by_time away" in capsys.readouterr().err
    assert main(["parity", str(SHOP), "--log", str(folder), "--sample", "3"]) == 1
    assert "for independent parity" in capsys.readouterr().err
    assert main(["parity", str(SHOP), "--log", str(folder), "--independent", "--sample", "0"]) == 1
    assert "at least 1" in capsys.readouterr().err
    options = msgspec.structs.replace(OPTIONS, scores=0.0)
    with Engine(str(SHOP), log=tmp_path / "none", log_options=options) as one:
        fill(one, 5)
    assert main(["parity", str(SHOP), "--log", str(tmp_path / "none"), "--independent"]) == 2


def test_damage_is_named(folder):
    logs = LogFolder(folder)
    path = logs.segment_path(logs.numbers()[0])
    data = bytearray(path.read_bytes())
    data[20_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(PenstockError, match="damaged"):
        parity(str(SHOP), folder, independent=True)
