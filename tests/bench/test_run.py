"""The assembly turns every missing, failing, crashing or endless group into error rows and a non-zero exit code."""

from __future__ import annotations

import json
import sys
import types

import pytest
import run
from rows import FIELDS, row


def group(monkeypatch, call, name="sample"):
    """A group whose module is made of one function."""
    module = types.ModuleType("bench_sample")
    module.run = call
    monkeypatch.setitem(sys.modules, "bench_sample", module)
    monkeypatch.setitem(run.GROUPS, name, run.Group("bench_sample", False, 5))


def rows_of(monkeypatch, tmp_path, call):
    group(monkeypatch, call)
    run.run_here("sample", tmp_path / "rows.json")
    return json.loads((tmp_path / "rows.json").read_text())


def test_rows_of_a_group_are_checked_and_stored(monkeypatch, tmp_path):
    good = [row("a", 1.0, "us", "make bench")]
    assert rows_of(monkeypatch, tmp_path, lambda: good) == good


def fail():
    raise OSError("no such library")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (fail, "OSError: no such library"),
        (list, "gave no rows"),
        (lambda: [{"name": "a"}], "a: missing value"),
        (lambda: [row("a", float("nan"), "us", "")], "a.value: expected a finite number"),
    ],
)
def test_what_fails_is_an_error_row(monkeypatch, tmp_path, call, says):
    (only,) = rows_of(monkeypatch, tmp_path, call)
    assert only["value"] is None
    assert says in only["error"]


def test_a_missing_module_is_an_error_row(monkeypatch, tmp_path):
    monkeypatch.setitem(run.GROUPS, "gone", run.Group("micro.no_such_module", False, 5))
    run.run_here("gone", tmp_path / "rows.json")
    (only,) = json.loads((tmp_path / "rows.json").read_text())
    assert "no_such_module" in only["error"]


@pytest.mark.parametrize(
    ("script", "limit", "says"),
    [("raise SystemExit(3)", 10, "ended with code 3"), ("import time; time.sleep(60)", 0.3, "took more than 0 s")],
)
def test_a_crash_and_an_endless_run_are_error_rows(monkeypatch, tmp_path, script, limit, says):
    path = tmp_path / "script.py"
    path.write_text(script)
    monkeypatch.setattr(run, "SCRIPT", path)
    monkeypatch.setitem(run.GROUPS, "sample", run.Group("x", False, limit))
    (only,) = run.run_group("sample")
    assert says in only["error"]


def test_the_exit_code_tells_errors_but_not_missed_bars(monkeypatch, tmp_path, capsys):
    out = tmp_path / "results" / "latest.json"
    missed = row("split.assign_ns", 9e9, "ns", "make bench")
    monkeypatch.setattr(run, "run_group", lambda name: [missed])
    assert run.main(["--only", "split,trees", "--out", str(out)]) == 0
    assert [list(r) for r in json.loads(out.read_text())] == [list(FIELDS)] * 2
    assert "NO" in capsys.readouterr().out
    monkeypatch.setattr(run, "run_group", lambda name: [run.error_row(name, "why", "")])
    assert run.main(["--only", "split", "--out", str(out)]) == 1
    assert "errors: split" in capsys.readouterr().out


def test_an_unknown_group_is_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["--only", "speed"])
    assert "no such group: speed" in capsys.readouterr().err
