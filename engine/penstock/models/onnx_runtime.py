"""The ONNX Runtime runtime: any ONNX graph over numbers (control path; the calls are in ext/onnx.pyx).

One thread, sequential, no spinning. A row scores the same bits alone and in a batch: ONNX Runtime picks other kernels
for other batch sizes, so rows run one by one. The file is cut down to the output that is read before it is loaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .folder import ModelError
from .onnx_graph import GraphError, only_output

__all__ = ["OnnxRuntime"]

# Beyond this, copying the file to leave out a label is not worth its memory.
_CUT_BYTES = 64 << 20


class OnnxRuntime:
    """A model that ONNX Runtime runs, behind the ps_model interface."""

    kind = "onnx"

    def __init__(
        self, path: Path, inputs: Sequence[str] | None, output: str | None, name: str, api: str | None = None
    ) -> None:
        from .._ext.onnx import OnnxModel, choose_output
        from .runtime import output_names

        source: Path | bytes = path
        shown, folder = output, None
        if path.stat().st_size <= _CUT_BYTES:
            try:
                source, shown = only_output(path.read_bytes(), output, choose_output)
                output, folder = None, str(path.parent)
            except GraphError:
                source = path  # ONNX Runtime says what is wrong with it
            except ValueError as error:
                raise ModelError(f"model {name}: {error}") from None
        label = f"model {name}"
        try:
            self.model = OnnxModel(source, inputs, output, name=label, external_folder=folder, api=api)
        except (ValueError, RuntimeError) as error:
            raise ModelError(str(error)) from None
        except ImportError:
            raise ModelError(f"{label} needs onnxruntime: pip install 'penstock[onnx]'") from None
        self.inputs = self.model.inputs
        self.n_inputs = self.model.n_inputs
        self.n_outputs = self.model.n_outputs
        self.output_names = output_names(shown or self.model.output, self.n_outputs)
        # Rows run one by one anyway; given singly, one that fails does not fail its neighbours.
        self.row_exact = False

    @classmethod
    def load(cls, path: Path, inputs: Sequence[str] | None, output: str | None, name: str) -> OnnxRuntime:
        if importlib.util.find_spec("onnxruntime") is None:
            raise ModelError(f"model {name} needs onnxruntime: pip install 'penstock[onnx]'")
        return cls(path, inputs, output, name)

    @property
    def abi(self) -> int:
        return self.model.abi

    @property
    def error(self) -> str:
        return self.model.error

    def warm(self) -> None:
        self.model.predict(np.zeros((1, self.n_inputs)))

    def predict(self, x: npt.ArrayLike) -> npt.NDArray[np.float64]:
        return self.model.predict(x)
