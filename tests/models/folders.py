"""Model folders for the tests of serving: small LightGBM files, trained once, and versions of them."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import pytest

N_INPUTS = 6


@functools.cache
def trained(seed: int, trees: int = 5, leaves: int = 4, n_inputs: int = N_INPUTS, classes: int = 1) -> str:
    """LightGBM text."""
    lightgbm = pytest.importorskip("lightgbm")
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(600, n_inputs))
    y = (x[:, seed % n_inputs] + rng.normal(size=600) > 0).astype(int)
    parameters = {"objective": "binary", "num_leaves": leaves, "verbose": -1, "num_threads": 1, "min_data_in_leaf": 2}
    if classes > 1:
        y = rng.integers(0, classes, 600)
        parameters |= {"objective": "multiclass", "num_class": classes}
    model = lightgbm.train(parameters, lightgbm.Dataset(x, y), trees)
    text: str = model.model_to_string()
    return text


@functools.cache
def expected(text: str, n_inputs: int = N_INPUTS) -> tuple[bytes, bytes]:
    """One row, and its score by LightGBM itself."""
    lightgbm = pytest.importorskip("lightgbm")
    row = np.random.default_rng(99).normal(size=(1, n_inputs))
    score = lightgbm.Booster(model_str=text).predict(row)
    return row.tobytes(), np.asarray(score, dtype=np.float64).tobytes()


def put(root: Path, name: str, version: str, content: str | bytes, file: str = "model.txt") -> Path:
    """A version's file, put there in one step."""
    folder = root / name / version
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".new"
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, folder / file)
    return folder / file
