"""Rows have one form, bars point the right way, tables are aligned, and the file holds exactly the six fields."""

from __future__ import annotations

import json

import pytest
from rows import BARS, FIELDS, Bar, check_row, error_row, number_text, row, table, write


def test_a_row_has_the_six_fields():
    r = check_row(row("a.b_us", 1.5, "us", "make bench", floor=0.5, ratio=3.0))
    assert tuple(r) == FIELDS
    assert check_row(row("a", 1, "us", ""))["floor"] is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"value": None}, "a.value: expected a finite number"),
        ({"value": float("nan")}, "a.value"),
        ({"value": True}, "a.value"),
        ({"ratio": "2"}, "a.ratio"),
        ({"floor": float("inf")}, "a.floor"),
        ({"unit": 3}, "a.unit"),
        ({"extra": 1}, "a: surplus extra"),
        ({"name": ""}, "row.name"),
        ({"unit": "error", "value": None}, "a.error"),
    ],
)
def test_a_wrong_row_is_refused_with_its_place(change, says):
    with pytest.raises(ValueError, match=says):
        check_row(row("a", 1.0, "us", "") | change)


def test_a_missing_field_is_named():
    r = row("a", 1.0, "us", "")
    del r["command"]
    with pytest.raises(ValueError, match="a: missing command"):
        check_row(r)


def test_bars_point_the_right_way():
    times = Bar(8.0, 5.0)
    assert [times.met(v, None) for v in (9.0, 8.0, 5.0)] == ["NO", "yes", "goal"]
    rate = Bar(2.0, 4.0, least=True, also_ratio=3.0)
    assert [rate.met(*v) for v in ((1.9, 9.0), (2.0, 3.0), (4.0, 2.9), (4.0, None), (5.0, 3.0))] == [
        "NO",
        "yes",
        "NO",
        "NO",
        "goal",
    ]
    for name, bar in BARS.items():
        if bar.goal is not None:
            assert bar.met(bar.goal, None) == "goal", name
            assert bar.goal > bar.bar if bar.least else bar.goal < bar.bar, name


def test_the_table_is_aligned_and_tells_errors():
    text = table(
        [
            row("engine.score_single_us", 6.25, "us", "", floor=0.05, ratio=125.0),
            row("windows.events_per_s", 1_500_000.0, "events/s", ""),
            row("unknown", 0.001, "s", ""),
            error_row("trees", "no module", ""),
        ]
    )
    lines = text.splitlines()
    assert lines[0].split() == ["name", "value", "unit", "bar", "goal", "met", "floor", "ratio"]
    column = lines[0].index("unit")
    assert [line[column:].split()[0] for line in lines[2:6]] == ["us", "events/s", "s", "error"]
    assert "yes" in lines[2]
    assert "NO" in lines[3]
    assert "ERROR" in lines[5]
    assert lines[6] == "  trees: no module"


def test_numbers_are_short():
    assert [number_text(v) for v in (None, 1234567.8, 123.4, 12.34, 1.234, 0.00123, 2.0, -5000)] == [
        "-",
        "1,234,568",
        "123",
        "12.3",
        "1.23",
        "0.00123",
        "2",
        "-5,000",
    ]


def test_the_file_holds_a_list_of_rows(tmp_path):
    path = tmp_path / "results" / "latest.json"
    write([row("a", 1.0, "us", "make bench"), error_row("b", "why", "make bench")], path)
    stored = json.loads(path.read_text())
    assert [list(r) for r in stored] == [list(FIELDS)] * 2
    assert stored[1]["value"] is None
    assert stored[1]["unit"] == "error"
    with pytest.raises(ValueError):
        write([{"name": "a"}], path)
    assert json.loads(path.read_text()) == stored


def test_the_best_peer_is_found():
    from peers.run import best_row

    rows = [
        row("peers.penstock_oip.requests_per_s", 60_000.0, "requests/s", ""),
        row("peers.penstock.requests_per_s", 90_000.0, "requests/s", ""),
        row("peers.fastapi.requests_per_s", 2_500.0, "requests/s", ""),
        row("peers.litserve.requests_per_s", 500.0, "requests/s", ""),
        error_row("peers.ray", "no", ""),
    ]
    (best,) = best_row(rows)
    assert (best["value"], best["unit"]) == (24.0, "ours/fastapi")
    assert best_row(rows[2:]) == []
    assert best_row(rows[:2])[0]["unit"] == "error"
    assert best_row([*rows[1:], error_row("peers.penstock_oip", "no", "")])[0]["unit"] == "error"
