"""The demo on a small data set: replay parity, the whole command, its JSON, its exit code and its errors."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")
pytest.importorskip("onnxruntime")
pytest.importorskip("pandas")
pytest.importorskip("pyarrow")
pytest.importorskip("skl2onnx")
pytest.importorskip("sklearn")
pytest.importorskip("xgboost")

from penstock.demo import dataset, pandas_features, replays, run, slow_features
from penstock.demo.generator import Transactions, generate

MODELS = ("logistic", "tree2", "tree", "forest", "xgboost")


def test_replayed_features_equal_pandas_and_the_slow_ones() -> None:
    data = generate(45, 60, 800)
    features, seconds = replays.all_features(data)
    assert seconds > 0
    assert set(features) == set(pandas_features.FEATURES)
    for name, theirs in pandas_features.features(data).items():
        assert np.abs(features[name] - theirs).max() <= 1e-9, name
    for row in np.random.RandomState(2).choice(len(data), 200, replace=False).tolist():
        assert slow_features.features_of(data, row) == {name: features[name][row] for name in features}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The demo with a fifth of the customers and few samples, in a cache of its own."""

    def fewer(days: int, progress: object = None) -> Transactions:
        return generate(days, 1_000, 2_000)

    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dataset, "generate", fewer)
    monkeypatch.setattr(run, "ORACLE_ROWS", 100)
    monkeypatch.setattr(run, "ONE_BY_ONE_ROWS", 1_000)
    return tmp_path


def test_the_command(small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    served = []
    monkeypatch.setattr("penstock.server.serve", lambda engine, **where: served.append((engine, where)))
    file = small / "out" / "figures.json"
    assert run.main(["--days", "40", "--port", "0", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert all(list(row) == ["name", "value", "unit", "floor", "ratio", "command"] for row in rows)
    figures = {row["name"]: row["value"] for row in rows}
    assert len(figures) == len(rows)
    assert figures["demo.transactions"] == len(generate(40, 1_000, 2_000))
    assert figures["demo.parity_mismatches"] == 0
    assert figures["demo.acknowledged_lost"] == 0
    assert figures["demo.log_mismatches"] == 0
    assert 0 < figures["demo.us_per_event"] < figures["demo.pandas_us_per_event"]
    for model in MODELS:
        assert 0.5 < figures[f"demo.{model}.auc"] < 1
        assert 0 < figures[f"demo.{model}.ap"] < 1
        assert 0 <= figures[f"demo.{model}.cp100"] < 1
    assert rows[0]["command"] == f"penstock demo --days 40 --port 0 --json {file}"
    out, err = capsys.readouterr()
    assert "not applicable" in out
    assert "WRONG" not in out
    assert "customers in both arms: 0   ok" in out
    assert [line.strip().split("  ")[0] for line in out.splitlines() if " onnx " in line] == ["Logistic regression"]
    assert all(c.isprintable() or c == "\n" for c in out + err)
    assert "Warning" not in err

    # What is served answers the curl lines: the odd transaction is flagged, the usual one is not.
    ((engine, where),) = served
    assert where["port"] > 0
    assert f"http://127.0.0.1:{where['port']}/v1/features/spend" in out
    usual, odd = (json.loads(body) for body in re.findall(r"/v1/score/fraud\S* -d '(.*)'", out))
    assert engine.score(usual, ingest=False).action == "approve"
    decision = engine.score(odd, ingest=False, explain=True)
    assert decision.action != "approve"
    assert decision.features["spend.count_30d"] > 1
    assert decision.features["terminal_risk.mean_fraud_7d"] > 0


def test_a_wrong_feature_is_found_and_fails(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = small / "figures.json"

    def off(data: Transactions, progress: object = None) -> dict[str, np.ndarray]:
        theirs = {name: values.copy() for name, values in replays.all_features(data)[0].items()}
        theirs["spend.mean_amount_7d"][[5, 9]] += [2e-9, np.nan]
        return theirs

    monkeypatch.setattr(pandas_features, "features", off)
    monkeypatch.setattr(run, "show_training", lambda *_: None)
    monkeypatch.setattr(run, "show_table", lambda *_: {})
    monkeypatch.setattr(run, "show_split", lambda *_: None)
    monkeypatch.setattr(run, "show_survival", lambda *_: 0)
    monkeypatch.setattr(replays, "one_by_one", lambda *_: (0, 0))
    assert run.main(["--days", "30", "--no-serve", "--json", str(file)]) == 1
    figures = {row["name"]: row["value"] for row in json.loads(file.read_text())}
    assert figures["demo.parity_mismatches"] == 2
    assert "WRONG" in capsys.readouterr().out


def test_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        run.main(["--days", "12"])
    assert exit.value.code == 2
    assert "--days: expected 30 to 183, got 12" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run, "find_spec", lambda name: None if name == "skl2onnx" else object())
    with pytest.raises(SystemExit):
        run.main(["--no-serve"])
    assert "the demo needs skl2onnx: pip install 'penstock[demo]'" in capsys.readouterr().err
