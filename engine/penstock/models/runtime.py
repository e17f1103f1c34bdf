"""Runtimes: what runs a model file, chosen by what the file holds (control path).

Tree ensembles run in our own kernel, every other ONNX graph in ONNX Runtime. A new runtime is one class with load, warm
and predict, and a line in RUNTIMES. A row of x has one meaning: the features named in `inputs`, in that order.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .folder import ModelError
from .tree_ensemble import TreePorts

__all__ = ["RUNTIMES", "NotForThisRuntime", "Runtime", "TreeRuntime", "bind_inputs", "load"]


class NotForThisRuntime(Exception):
    """The file is well-formed but holds another kind of model: the next runtime is asked."""


class Runtime(Protocol):
    """A loaded model. It is immutable, and predict and the ps_model at `abi` may be called from any thread."""

    kind: str  # "trees" or "onnx"
    inputs: tuple[str, ...] | None  # feature names in the order of x; None where the file has none and none were given
    n_inputs: int
    n_outputs: int
    output_names: tuple[str, ...]
    row_exact: bool  # in a batch a row gets the bits, or the failure, that it would get alone

    @classmethod
    def load(cls, path: Path, inputs: Sequence[str] | None, output: str | None, name: str) -> Runtime:
        """Raises NotForThisRuntime, or ModelError where the file is damaged or the inputs do not match."""
        ...

    @property
    def abi(self) -> int:
        """Address of the ps_model (ext/model.h); valid while this object lives."""
        ...

    @property
    def error(self) -> str:
        """Why predict last failed, or ''."""
        ...

    def warm(self) -> None:
        """Run once, so that the first request does not pay for what is made lazily."""
        ...

    def predict(self, x: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """x: (rows, n_inputs) numbers, NaN for null. Returns (rows, n_outputs) float64."""
        ...


class TreeRuntime:
    """A tree ensemble in our own kernel."""

    kind = "trees"
    ports: TreePorts | None = None  # trees.tree_ports(), where they are known

    def __init__(self, model: Any, inputs: tuple[str, ...] | None) -> None:
        self.model = model
        self.inputs = inputs
        self.n_inputs: int = model.n_inputs
        self.n_outputs: int = model.n_outputs
        self.output_names = output_names("score", self.n_outputs)
        self.row_exact: bool = getattr(model, "row_exact", True)

    @classmethod
    def load(cls, path: Path, inputs: Sequence[str] | None, output: str | None, name: str) -> TreeRuntime:
        from .trees import NotATreeModel, load_trees

        if output is not None:
            raise NotForThisRuntime("the kernel gives the scores of a tree ensemble, not a named output")
        try:
            model = load_trees(path)
        except NotATreeModel as error:
            raise NotForThisRuntime(str(error)) from None
        except ValueError as error:
            raise ModelError(f"model {name}: {error}") from None
        names = getattr(model, "feature_names", None)
        return cls(model, bind_inputs(names, inputs, model.n_inputs, name))

    @property
    def abi(self) -> int:
        address: int = self.model.abi
        return address

    @property
    def error(self) -> str:
        return ""  # the kernel does not fail on a row

    def warm(self) -> None:
        self.model.predict(np.zeros((1, self.n_inputs)))

    def predict(self, x: npt.ArrayLike) -> npt.NDArray[np.float64]:
        out: npt.NDArray[np.float64] = self.model.predict(np.ascontiguousarray(x, dtype=np.float64))
        return out


# Names that a library makes up when it is given none: LightGBM, XGBoost, pandas.
_MADE_UP = re.compile(r"(Column_|column_|f|x|)\d+")


def bind_inputs(
    own: Sequence[str] | None, given: Sequence[str] | None, n_inputs: int, name: str
) -> tuple[str, ...] | None:
    """Feature names in the order of the model's columns, from its own names and those that the app gives.

    Where the model has names, the app's must be the same set, and the model's order holds. Where it has none, or only
    made-up ones (Column_0, f0), the app's are taken in order. Raises ModelError with what is missing or surplus.
    """
    made_up = own is None or len(own) != n_inputs or all(_MADE_UP.fullmatch(feature) for feature in own)
    if given is None:
        return None if own is None or made_up else tuple(own)
    if made_up and (own is None or set(own) != set(given)):
        own = None
    twice = sorted({feature for feature in given if list(given).count(feature) > 1})
    if twice:
        raise ModelError(f"model {name}: inputs names {', '.join(twice)} twice")
    if own is None:
        if len(given) != n_inputs:
            raise ModelError(f"model {name}: takes {n_inputs} inputs, {len(given)} are named: {', '.join(given)}")
        return tuple(given)
    missing = [feature for feature in own if feature not in given]
    surplus = [feature for feature in given if feature not in own]
    if missing or surplus:
        parts = [f"missing: {', '.join(missing)}"] if missing else []
        parts += [f"surplus: {', '.join(surplus)}"] if surplus else []
        raise ModelError(f"model {name}: inputs do not match the model's; {'; '.join(parts)}")
    return tuple(own)


def output_names(output: str, count: int) -> tuple[str, ...]:
    """One name per score: the output's, with the column where there are several."""
    return (output,) if count == 1 else tuple(f"{output}[{k}]" for k in range(count))


def load(
    path: str | os.PathLike[str],
    inputs: Sequence[str] | None = None,
    output: str | None = None,
    *,
    name: str | None = None,
) -> Runtime:
    """Load a model file in the runtime that fits it, ready to score.

    inputs: the features it takes (see bind_inputs). output: name of an ONNX output; left out, the probabilities or the
    only scores. name: what errors call the model; left out, from the path. Raises ModelError, whatever the file holds.
    """
    try:
        path = Path(path)
        if name is None:
            # DIR/<name>/<version>/model.onnx
            in_folder = path.stem == "model" and len(path.parts) > 2
            name = f"{path.parts[-3]}@{path.parts[-2]}" if in_folder else path.name
        return _load(path, inputs, output, name)
    except ModelError as error:
        text = str(error)
        if str(path) in text or "pip install" in text:
            raise
        raise ModelError(f"{text} ({path})") from None
    except Exception as error:
        text = str(error)
        if isinstance(error, OSError):
            text = f"cannot read it: {error.strerror or error}"
        elif isinstance(error, MemoryError):
            text = "memory is short: it asks for more than there is"
        elif isinstance(error, RecursionError):
            text = "it is nested deeper than any model"
        elif not isinstance(error, ValueError):
            text = f"{type(error).__name__}: {text}"
        raise ModelError(f"model {name or path}: {path}: {text}") from None


def _load(path: Path, inputs: Sequence[str] | None, output: str | None, name: str) -> Runtime:
    if isinstance(inputs, str) or not all(isinstance(feature, str) for feature in inputs or ()):
        raise ModelError(f"model {name}: inputs: expected a list of names, got {inputs!r}")
    runtimes = RUNTIMES.get(path.suffix)
    if runtimes is None:
        raise ModelError(f"model {name}: {path} is no model file; expected one of {', '.join(RUNTIMES)}")
    if not path.is_file():
        raise ModelError(f"model {name}: there is no file {path}")
    reasons = []
    for runtime in runtimes:
        try:
            return runtime.load(path, inputs, output, name)
        except NotForThisRuntime as error:
            reasons.append(str(error))
    raise ModelError(f"model {name}: {path}: {'; '.join(reasons)}")


def _runtimes() -> dict[str, tuple[type[Runtime], ...]]:
    from .onnx_runtime import OnnxRuntime

    return {
        ".onnx": (TreeRuntime, OnnxRuntime),
        ".txt": (TreeRuntime,),
        ".json": (TreeRuntime,),
        ".ubj": (TreeRuntime,),
    }


RUNTIMES: dict[str, tuple[type[Runtime], ...]] = _runtimes()
