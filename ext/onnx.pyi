from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

class OnnxError(RuntimeError): ...

class OnnxModel:
    source: str
    api: str
    version: str
    inputs: tuple[str, ...] | None
    output: str
    batched: bool
    def __init__(
        self,
        source: Any,
        inputs: Sequence[str] | None = None,
        output: str | None = None,
        *,
        batched: bool = False,
        api: str | None = None,
        arena: bool = ...,
        mem_pattern: bool = ...,
        external_folder: str | None = None,
        name: str | None = None,
    ) -> None: ...
    @property
    def n_inputs(self) -> int: ...
    @property
    def n_outputs(self) -> int: ...
    @property
    def abi(self) -> int: ...
    @property
    def error(self) -> str: ...
    def predict(self, x: npt.ArrayLike) -> npt.NDArray[np.float64]: ...
    def ports(self) -> dict[str, list[dict[str, Any]]]: ...

class OnnxTensors:
    source: str
    def __init__(
        self,
        source: Any,
        *,
        external_folder: str | None = None,
        name: str | None = None,
    ) -> None: ...
    def ports(self) -> dict[str, list[dict[str, Any]]]: ...

def choose_output(ports: list[dict[str, Any]], wanted: str | None) -> int: ...
def library_path() -> str | None: ...
def predict_abi(abi: int, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]: ...
