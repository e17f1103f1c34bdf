"""Trace and log settings: what is accepted, refused, cleared, and what the trace file holds."""

from __future__ import annotations

import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.server.server_log import ServerLog
from penstock.server.tracing import SettingError, Tracing

TIMES = [("REQUEST_START", 10), ("COMPUTE_START", 12), ("COMPUTE_END", 17), ("REQUEST_END", 20)]
ON = {"trace_level": ["TIMESTAMPS"], "trace_rate": 1}


def test_off_costs_nothing_and_says_so(tmp_path):
    tracing = Tracing(tmp_path / "t.json")
    hooks = []
    tracing.on_change = hooks.append
    assert tracing.hook is None
    tracing.update(ON, "m")
    tracing.update({"trace_level": "OFF"}, "m")
    assert hooks[0] is not None
    assert hooks[1] is None
    tracing.close()
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_a_json_array_after_every_write(tmp_path):
    tracing = Tracing(tmp_path / "t.json")
    tracing.update(ON)
    for i in range(5):
        tracing.record("m", "1", f"r{i}", TIMES)
        tracing.close()  # waits for the writer; the next record starts it again
        entries = json.loads((tmp_path / "t.json").read_bytes())
        assert len(entries) == 2 * (i + 1)
    assert entries[0] == {"id": 1, "model_name": "m", "model_version": "1", "request_id": "r0"}
    assert entries[9]["timestamps"] == [{"name": name, "ns": ns} for name, ns in TIMES]


def test_log_frequency_begins_new_files(tmp_path):
    tracing = Tracing(tmp_path / "t")
    tracing.update({**ON, "log_frequency": "2"})
    for _ in range(5):
        tracing.record("m", "1", "", TIMES)
    tracing.close()
    sizes = [len(json.loads((tmp_path / f"t.{i}").read_bytes())) // 2 for i in range(3)]
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize(("rate", "count", "of", "kept"), [(1, -1, 7, 7), (3, -1, 7, 3), (2, 2, 100, 2), (1, 0, 5, 0)])
def test_rate_and_count(tmp_path, rate, count, of, kept):
    tracing = Tracing(tmp_path / "t")
    tracing.update({"trace_level": "TIMESTAMPS", "trace_rate": rate, "trace_count": count}, "m")
    for _ in range(of):
        tracing.record("m", "1", "", TIMES)
        tracing.record("other", "1", "", TIMES)
    left = int(tracing.settings("m")["trace_count"])
    tracing.close()
    assert tracing.written == kept
    assert left == (count - kept if count >= 0 else -1)


def test_a_model_has_its_own_settings_until_they_are_cleared():
    tracing = Tracing("unused")
    tracing.update({"trace_rate": "7"})
    assert tracing.settings("m")["trace_rate"] == "7"
    tracing.update({"trace_rate": 3}, "m")
    assert tracing.settings("m")["trace_rate"] == "3"
    assert tracing.settings("n")["trace_rate"] == "7"
    tracing.update({"trace_rate": None}, "m")
    tracing.update({"trace_rate": None})
    assert tracing.settings("m")["trace_rate"] == "1000"


def test_without_a_file_traces_are_refused():
    tracing = Tracing()
    with pytest.raises(SettingError, match="trace file") as refused:
        tracing.update(ON)
    assert refused.value.unsupported
    assert tracing.settings()["trace_level"] == ["OFF"]
    tracing.update({"trace_level": ["OFF"]})


@given(
    st.dictionaries(
        st.sampled_from(["trace_level", "trace_rate", "trace_count", "log_frequency", "trace_file", "x", "log_info"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.lists(st.text(max_size=3)),
    )
)
def test_changes_are_whole_or_refused(changes):
    tracing, log = Tracing("unused"), ServerLog()
    for settings in (tracing, log):
        before = settings.settings()
        try:
            after = settings.update(changes)
        except SettingError:
            after = settings.settings()
            assert after == before
        assert set(after) == set(before)
        json.dumps(after)


def test_a_file_that_cannot_be_written_drops_traces(tmp_path):
    tracing = Tracing(tmp_path / "absent" / "t")
    tracing.update(ON)
    tracing.record("m", "1", "", TIMES)
    tracing.close()
    assert (tracing.written, tracing.dropped) == (0, 1)
    assert threading.active_count() < 50


def test_levels_of_the_log(capsys):
    log = ServerLog()
    log.say("info", "one")
    log.update({"log_info": False, "log_format": "ISO8601"})
    log.say("info", "two")
    log.say("warning", "three")
    log.update({"log_error": False, "log_format": None, "log_verbose_level": 0, "log_file": ""})
    log.fault(ValueError("four"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "penstock: one"
    assert lines[1].endswith(" penstock: warning: three")
    assert lines[1].startswith("2")
    assert len(lines) == 2
