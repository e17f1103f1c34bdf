"""Tree ensembles from files: LightGBM text, XGBoost JSON and UBJSON, ONNX (control path).

Whatever bytes the file holds, loading ends with a model, a ValueError that says where it is wrong, or NotATreeModel.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Literal

from penstock._ext.trees import TreeModel, compile_form

from .tree_ensemble import NotATreeModel, TreeEnsemble, TreeError, TreePorts

__all__ = [
    "NotATreeModel",
    "TreeEnsemble",
    "TreeModel",
    "compile_form",
    "load_trees",
    "parse_ensemble",
    "read_ensemble",
    "tree_ports",
]


def read_ensemble(path: str | os.PathLike[str]) -> TreeEnsemble:
    """The shared form of a model file, by its suffix: .txt, .json, .ubj or .onnx. Raises as load_trees does."""
    path = Path(path)
    return parse_ensemble(path.read_bytes(), path)


def parse_ensemble(data: bytes, path: Path) -> TreeEnsemble:
    """The shared form of a model file's bytes; the path says what they are, and names them in errors."""
    try:
        if path.suffix == ".txt":
            from .lightgbm_text import parse_lightgbm

            try:
                text = data.decode()
            except UnicodeDecodeError as error:
                raise TreeError(f"byte {error.start}: not UTF-8 text") from None
            return parse_lightgbm(text)
        if path.suffix in (".json", ".ubj"):
            from .xgboost_model import parse_xgboost_json, parse_xgboost_ubj

            return parse_xgboost_json(data) if path.suffix == ".json" else parse_xgboost_ubj(data)
        if path.suffix == ".onnx":
            from .onnx_trees import parse_onnx

            return parse_onnx(data)
    except TreeError as error:
        raise ValueError(f"{path}: {error}") from None
    raise ValueError(f"{path}: expected a name that ends in .txt, .json, .ubj or .onnx")


def tree_ports(
    path: str | os.PathLike[str] | None, n_inputs: int, n_outputs: int, file: str | os.PathLike[str] | None = None
) -> TreePorts:
    """What a tree ensemble takes and gives, by its file.

    file: where the bytes are, where that is another place than the path that names them.
    """
    suffix = "" if path is None else os.path.splitext(path)[1]
    if suffix == ".onnx" and path is not None:
        from .onnx_protobuf import graph_ports

        inputs, outputs, label, labels = graph_ports(path if file is None else file)
        # The label stands beside the scores as an integer or a text; a ZipMap's scores are no tensor in the file.
        scores = [port for port in outputs if port.element in (1, 11)] or [p for p in outputs if p.element < 0]
        if len(inputs) == 1 and scores:
            kinds = {1: "FP32", 11: "FP64"}
            return TreePorts(
                (inputs[0].name, kinds.get(inputs[0].element, "FP32"), n_inputs),
                (scores[0].name, kinds.get(scores[0].element, "FP32"), n_outputs),
                label,
                labels,
            )
    kind = "FP32" if suffix in (".json", ".ubj", ".onnx") else "FP64"
    return TreePorts(("input", kind, n_inputs), ("score", kind, n_outputs))


def load_trees(
    path: str | os.PathLike[str],
    layout: Literal["auto", "plain", "walk", "masks"] = "auto",
    simd: Literal["auto", "portable", "avx2"] = "auto",
) -> TreeModel:
    """A scorer for a model file. Inputs are float64, NaN is missing; scores equal the training library's.

    layout and simd force a variant of the kernel; every one gives the same bits. Raises ValueError naming the file and
    the place where it is damaged or not supported, OSError, and NotATreeModel for an ONNX graph that is something else;
    warns of a file by a newer version of its library than those whose scores were compared.
    """
    ensemble = read_ensemble(path)
    if ensemble.warning:
        warnings.warn(f"{path}: {ensemble.warning}", stacklevel=2)
    try:
        return TreeModel(ensemble, layout, simd)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from None
