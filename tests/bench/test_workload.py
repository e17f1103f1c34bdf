"""The benchmark's own workload is what it says: windows, peers' answers, constant answers, answers' lengths."""

from __future__ import annotations

import numpy as np
import pytest
from app import stream
from load.floor_server import constant_answer


def test_streams_are_the_same_every_time_and_rise():
    a, b = stream.transactions(2_000), stream.transactions(2_000)
    assert all(np.array_equal(getattr(a, f), getattr(b, f)) for f in ("customer", "terminal", "amount", "fraud", "at"))
    assert (np.diff(a.at) > 0).all()
    assert np.diff(stream.transactions(9, scale=3).at).tolist() == [3_000_000] * 8
    at = stream.samples(5_000).column("at").cast("int64").to_numpy()
    assert (np.diff(at) > 0).all()


def test_features_equal_a_plain_loop():
    data = stream.transactions(300_000)
    rows = np.random.default_rng(1).integers(200_000, 300_000, size=40)
    features = stream.features(data)
    assert features.shape == (300_000, len(stream.FEATURES)) == (300_000, 15)
    label_at = data.at + stream.LABEL_DELAY * 1_000_000
    for i in rows:
        want = [data.amount[i]]
        day = data.at[i] // 86_400_000_000
        want += [float((day + 3) % 7 >= 5), float(data.at[i] // 3_600_000_000 % 24 <= 6)]
        for at, same, values in (
            (data.at, data.customer == data.customer[i], data.amount),
            (label_at, data.terminal == data.terminal[i], data.fraud),
        ):
            inside = [same & (at <= data.at[i]) & (at > data.at[i] - w) for w in stream.WINDOWS_US.values()]
            want += [float(m.sum()) for m in inside]
            want += [float(values[m].mean()) if m.any() else 0.0 for m in inside]
        assert features[i] == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("length", [70, 79, 80, 175, 179, 180, 300, 1_100, 70_000])
def test_the_floor_answers_in_exactly_so_many_bytes(length):
    answer = constant_answer(length)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert len(answer) == length
    assert int(head.rpartition(b":")[2]) == len(body)


def test_a_floor_answer_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="20 bytes"):
        constant_answer(20)


def test_the_peers_of_the_windows_row_agree_with_the_loop():
    duckdb, pl = pytest.importorskip("duckdb"), pytest.importorskip("polars")
    pytest.importorskip("numba")
    from micro import windows

    table = stream.samples(3_000, entities=40, days=2)
    keys = table.column("key").combine_chunks().dictionary_encode()
    loop = windows.numba_loop()
    want = windows.numba_columns(
        loop(
            keys.indices.to_numpy().astype(np.int64),
            table.column("at").cast("int64").to_numpy(),
            table.column("value").to_numpy(),
            len(keys.dictionary),
            np.array(list(windows.WINDOWS_US.values())),
        )
    )
    assert want["count_24h"].max() > want["count_1h"].max() > 1
    polars_result = windows.polars_columns(windows.polars_rolling(pl.from_arrow(table)))
    assert windows.disagreement(want, polars_result) is None
    assert windows.disagreement(want, windows.duckdb_columns(windows.duckdb_windows(duckdb.connect(), table))) is None
    frame = table.to_pandas().set_index("at")
    assert windows.disagreement(want, windows.pandas_columns(windows.pandas_rolling(frame))) is None
    polars_result["max_1h"] = polars_result["max_1h"] + 1.0
    assert "max_1h of row 0" in str(windows.disagreement(want, polars_result))
