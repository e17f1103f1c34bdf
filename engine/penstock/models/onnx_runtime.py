"""The ONNX Runtime runtime: any ONNX graph over numbers (control path; the calls are in ext/onnx.pyx).

One thread, sequential, no spinning. A row scores the same bits alone and in a batch: ONNX Runtime picks other kernels
for other batch sizes, so rows run one by one. The file is cut down to the output that is read before it is loaded. What
must stay true: a session is made of what has passed its trial (trial.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .folder import ModelError
from .onnx_graph import GraphError, TooDeep, only_output
from .trial import Trial, try_file

__all__ = ["OnnxRuntime", "OnnxSource", "has_external", "size_with_tensors"]

# Beyond this, copying the file to leave out a label is not worth its memory.
_CUT_BYTES = 64 << 20


# The first entry of a tensor's external_data: its key, whose length may be written longer than needed.
_ELSEWHERE = re.compile(rb"\x0a(\x08|\x88\x80*\x00)location")


def has_external(data: Any) -> bool:
    """Whether an ONNX file has tensors in other files."""
    return _ELSEWHERE.search(data) is not None


def size_with_tensors(path: Path, data: bytes | None) -> int:
    """Bytes of a file and of what may be its external tensors."""
    size = path.stat().st_size if data is None else len(data)
    if data is not None and not has_external(data):
        return size
    with contextlib.suppress(OSError):
        for entry in os.scandir(path.parent):
            if entry.is_file() and entry.name != path.name:
                size += entry.stat().st_size
    return size


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        except TooDeep as error:
            raise ModelError(f"model {name}: {path}: {error}") from None
        except GraphError:
            return cls(path, output, output, None)  # ONNX Runtime says what is wrong with it
        except ValueError as error:
            raise ModelError(f"model {name}: {error}") from None
        return cls(cut, None, shown, str(path.parent))

    @property
    def bytes(self) -> bytes | None:
        return self.data if isinstance(self.data, bytes) else None

    def trial(self, path: Path, sha256: str, inputs: Sequence[str] | None, name: str) -> Trial:
        """What a session of it is tried with; sha256: of the file."""
        return Trial(
            name=name,
            file=str(path),
            sha256=sha256,
            size=size_with_tensors(path, self.bytes),
            path=None if self.bytes is not None else str(self.data),
            inputs=None if inputs is None else list(inputs),
            output=self.output,
            shown=self.shown,
            folder=self.folder,
        )


class OnnxRuntime:
    """A model that ONNX Runtime runs, behind the ps_model interface."""

    kind = "onnx"

    def __init__(
        self, path: Path, inputs: Sequence[str] | None, output: str | None, name: str, api: str | None = None
    ) -> None:
        source = OnnxSource.of(path, None, output, name)
        try_file(source.trial(path, sha256_of(path), inputs, name), source.bytes)
        self._open(source, inputs, name, api)

    def _open(self, source: OnnxSource, inputs: Sequence[str] | None, name: str, api: str | None = None) -> None:
        from .._ext.onnx import OnnxModel
        from .runtime import output_names

        label = f"model {name}"
        try:
            self.model = OnnxModel(
                source.data, inputs, source.output, name=label, external_folder=source.folder, api=api
            )
        except ValueError as error:
            raise ModelError(str(error)) from None
        except RuntimeError as error:
            raise ModelError(f"{error}; what is right, onnx.checker.check_model says") from None
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
