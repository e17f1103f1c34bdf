"""The soak's test of drift: what grows is found, what is only noisy is not."""

from __future__ import annotations

import random

import numpy as np
import pytest
from load.soak import LATENCY_LIMIT, LIMITS, STEPS, Series, slope, trend


def series(name: str, limit: tuple[float, float], values) -> dict:
    return Series(name, limit, list(values)).verdict()


def test_the_slope_is_that_of_a_line_and_passes_over_outliers():
    line = [3.0 + 0.5 * i for i in range(20)]
    assert slope(line) == pytest.approx(0.5)
    line[7], line[15] = 900.0, -900.0
    assert slope(line) == pytest.approx(0.5, abs=0.05)


def test_the_trend_agrees_with_kendalls_tau():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(2)
    for rise in (0.0, 0.02, 0.1, 1.0):
        values = (rng.normal(size=25) + rise * np.arange(25)).round(1).tolist()
        theirs = stats.kendalltau(range(25), values, method="asymptotic").pvalue
        assert trend(values) == pytest.approx(theirs, rel=0.3, abs=0.02)
    assert trend([1.0] * 20) == 1.0


def test_a_leak_is_drift_and_a_warm_up_is_not():
    noise = random.Random(1)
    leak = [200 + 1.0 * i + noise.uniform(-1, 1) for i in range(STEPS)]
    assert series("memory_mb", LIMITS["memory_mb"], leak)["drifts"]
    warm = [200 + 40 * min(1.0, i / 8) + noise.uniform(-1, 1) for i in range(STEPS)]
    assert not series("memory_mb", LIMITS["memory_mb"], warm)["drifts"]
    assert series("descriptors", LIMITS["descriptors"], [90 + i // 3 for i in range(STEPS)])["drifts"]
    assert not series("descriptors", LIMITS["descriptors"], [90 + i % 3 for i in range(STEPS)])["drifts"]


def test_noise_is_not_drift():
    noise = random.Random(4)
    drifts = 0
    for _ in range(200):
        values = [2.0 * noise.lognormvariate(0, 0.8) for _ in range(STEPS)]
        drifts += series("http_p99_ms", LATENCY_LIMIT, values)["drifts"]
    assert drifts <= 6
    slower = [2.0 + 0.1 * i + noise.uniform(0, 0.5) for i in range(STEPS)]
    assert series("http_p99_ms", LATENCY_LIMIT, slower)["drifts"]


def test_too_few_samples_are_an_error():
    assert "only 0 samples" in series("x", (0.1, 1.0), [])["error"]
