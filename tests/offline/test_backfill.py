"""Backfill: features over history are what scoring gave, bit for bit; new ones are what it would have given."""

import pytest
from offline.shop_log import OPTIONS, SHOP, fill

from penstock import Engine, PenstockError
from penstock.cli import main
from penstock.offline.replay import backfill

pyarrow = pytest.importorskip("pyarrow")


def plain(value):
    return int(value) if type(value).__name__ == "Timestamp" else value


def test_rows_are_what_scoring_gave(tmp_path):
    with Engine(str(SHOP), log=tmp_path / "log", log_options=OPTIONS) as engine:
        decisions = fill(engine, 300)
    table = backfill(str(SHOP), tmp_path / "log")
    assert table.num_rows == 300
    assert table.column("_outcome").to_pylist() == [d.outcome for d in decisions]
    sequences = table.column("_sequence").to_pylist()
    assert sequences == sorted(set(sequences))
    for name in decisions[0].features:
        assert table.column(name).to_pylist() == [plain(d.features[name]) for d in decisions], name
    by_score = backfill(str(SHOP), tmp_path / "log", spine="scores")
    assert by_score.column("id").to_pylist() == [d.id for d in decisions] or set(by_score.column_names) >= {"id"}
    assert by_score.select(["spend.count_1h", "dear"]).equals(table.select(["spend.count_1h", "dear"]))


def test_a_new_feature_is_computed_over_history(folder, tmp_path):
    app = tmp_path / "new.py"
    app.write_text(
        SHOP.read_text().replace('Aggregation("count", windows=["1h"]),', 'Aggregation("count", windows=["1h", "2h"]),')
    )
    new = backfill(str(app), folder, features=["shops.count_2h"])
    assert [n for n in new.column_names if "." in n] == ["shops.count_2h"]
    old = backfill(str(SHOP), folder)
    # Of a late order neither can be known.
    assert all(
        (a is None) == (b is None) and (a is None or b >= a)
        for a, b in zip(old.column("shops.count_1h").to_pylist(), new.column("shops.count_2h").to_pylist())
    )
    # What an engine with the new feature would have served from the same log.
    with Engine(str(app), log=folder, log_options=OPTIONS) as engine:
        assert engine.recovery.rebuilt == []  # no snapshot: everything is replayed
        probe = engine.features("shops", [0, 1], as_of=int(old.column("at").to_numpy().astype("int64").max()))
    assert probe.rows[0]["shops.count_2h"] is not None


def test_into_a_file_in_pieces(folder, tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    from penstock.offline import replay

    whole = backfill(str(SHOP), folder)
    monkeypatch.setattr(replay, "CHUNK", 64)
    in_pieces = backfill(str(SHOP), folder)
    assert in_pieces.combine_chunks().equals(whole.combine_chunks())
    assert main(["backfill", str(SHOP), "--log", str(folder), "--out", str(tmp_path / "f.parquet")]) == 0
    assert pq.read_table(tmp_path / "f.parquet").to_pylist() == whole.to_pylist()


def test_scores_in_pieces(folder, monkeypatch):
    from penstock.offline import replay

    whole = backfill(str(SHOP), folder, spine="scores")
    monkeypatch.setattr(replay, "CHUNK", 37)
    assert backfill(str(SHOP), folder, spine="scores").combine_chunks().equals(whole.combine_chunks())


def test_what_is_asked_for_must_be_there(folder):
    with pytest.raises(PenstockError, match=r"no feature 'spend\.cuont_1h'; did you mean spend\.count_1h"):
        backfill(str(SHOP), folder, features=["spend.cuont_1h"])
    with pytest.raises(PenstockError, match='expected "events" or "scores"'):
        backfill(str(SHOP), folder, spine="rows")
    with pytest.raises(PenstockError, match="say which pipeline, not 'fraud'"):
        backfill(str(SHOP), folder, pipeline="fraud")


def test_a_file_is_whole_or_not_there(folder, tmp_path, capsys):
    out = tmp_path / "f.parquet"
    out.write_bytes(b"what was there before")
    segment = next((folder / "segments").glob("*.log"))
    data = bytearray(segment.read_bytes())
    data[-500] ^= 1
    segment.write_bytes(data)
    assert main(["backfill", str(SHOP), "--log", str(folder), "--out", str(out)]) == 1
    assert out.read_bytes() == b"what was there before"
    assert list(tmp_path.glob("*.part")) == []
    assert main(["backfill", str(SHOP), "--log", str(folder), "--out", str(tmp_path / "no" / "f.parquet")]) == 1
    assert "there is no folder" in capsys.readouterr().err
