"""The ONNX Runtime runtime: any ONNX graph over numbers (control path; the calls are in ext/onnx.pyx).

One thread, sequential, no spinning. A row scores the same bits alone and in a batch: ONNX Runtime picks other kernels
for other batch sizes, so rows run one by one. The file is cut down to the output that is read before it is loaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .folder import ModelError
from .onnx_graph import GraphError, only_output

__all__ = ["OnnxRuntime", "OnnxSource"]

# Beyond this, copying the file to leave out a label is not worth its memory.
_CUT_BYTES = 64 << 20


class OnnxSource(NamedTuple):
    """What a session is made of. data: path or bytes; output: its name there, None where one is left; shown: its name
    in the file; folder: of external tensors, for bytes."""

    data: Any
    output: str | None
    shown: str | None
    folder: str | None

    @classmethod
    def of(cls, path: Path, data: bytes | None, output: str | None, name: str) -> OnnxSource:
        """A file (its bytes, where they were read) cut down to one output. Raises ModelError for a wrong output."""
        from .._ext.onnx import choose_output

        if (data is None and path.stat().st_size > _CUT_BYTES) or (data is not None and len(data) > _CUT_BYTES):
            return cls(path, output, output, None)
        try:
            cut, shown = only_output(path.read_bytes() if data is None else data, output, choose_output)
        except GraphError:
            return cls(path, output, output, None)  # ONNX Runtime says what is wrong with it
        except ValueError as error:
            raise ModelError(f"model {name}: {error}") from None
        return cls(cut, None, shown, str(path.parent))


class OnnxRuntime:
    """A model that ONNX Runtime runs, behind the ps_model interface."""

    kind = "onnx"

    def __init__(
        self, path: Path, inputs: Sequence[str] | None, output: str | None, name: str, api: str | None = None
    ) -> None:
        self._open(OnnxSource.of(path, None, output, name), inputs, name, api)

    def _open(self, source: OnnxSource, inputs: Sequence[str] | None, name: str, api: str | None = None) -> None:
        from .._ext.onnx import OnnxModel
        from .runtime import output_names

        label = f"model {name}"
        try:
            self.model = OnnxModel(
                source.data, inputs, source.output, name=label, external_folder=source.folder, api=api
            )
        except (ValueError, RuntimeError) as error:
            raise ModelError(str(error)) from None
        except ImportError:
            raise ModelError(f"{label} needs onnxruntime: pip install 'penstock[onnx]'") from None
        self.inputs = self.model.inputs
        self.n_inputs = self.model.n_inputs
        self.n_outputs = self.model.n_outputs
        self.output_names = output_names(source.shown or self.model.output, self.n_outputs)
        # Rows run one by one anyway; given singly, one that fails does not fail its neighbours.
        self.row_exact = False

    @classmethod
    def compiled(cls, source: OnnxSource, inputs: Sequence[str] | None, name: str) -> OnnxRuntime:
        """From what another process has cut down; the GIL is held for microseconds."""
        self = cls.__new__(cls)
        self._open(source, inputs, name)
        return self

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
