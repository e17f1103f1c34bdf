"""Tensors of the Open Inference Protocol (control path): arrays to bytes and back. numpy is imported when used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import InvalidRequest, ServerError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["as_array", "datatype_of", "from_bytes", "from_json", "to_bytes"]

# OIP datatype -> numpy's name. BYTES are arrays of objects (bytes); BF16 is given as float32.
DTYPES = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
}
_OF_DTYPE = {name: datatype for datatype, name in DTYPES.items()}


def as_array(value: Any, datatype: str | None, name: str) -> np.ndarray[Any, Any]:
    """An input as an array: one as it is, a list in `datatype`. Raises InvalidRequest."""
    import numpy as np

    if not isinstance(value, np.ndarray):
        if datatype is None:
            raise InvalidRequest(
                "expected a numpy array: what type a list is meant in is not known here", code="dtype", path=name
            )
        try:
            if datatype == "BYTES":
                return np.asarray(value, dtype=object)
            value = np.asarray(value, dtype="float32" if datatype == "BF16" else DTYPES[datatype])
        except (ValueError, TypeError, OverflowError, KeyError) as error:
            raise InvalidRequest(f"expected {datatype}: {error}", code="dtype", path=name) from None
    return value  # type: ignore[no-any-return]


def datatype_of(array: np.ndarray[Any, Any], name: str) -> str:
    """The OIP datatype of an array. Raises InvalidRequest."""
    if array.dtype.kind in "OSU":
        return "BYTES"
    found = "BF16" if array.dtype.name == "bfloat16" else _OF_DTYPE.get(array.dtype.name)
    if found is None:
        raise InvalidRequest(f"no tensor has the type {array.dtype}", code="dtype", path=name)
    return found


def to_bytes(array: np.ndarray[Any, Any]) -> bytes:
    """Little-endian, row-major; a string is its length as uint32 and its bytes (text as UTF-8)."""
    import numpy as np

    if array.dtype.kind in "OSU":
        parts = []
        for item in array.reshape(-1):
            data = item if isinstance(item, bytes) else str(item).encode()
            parts.append(len(data).to_bytes(4, "little") + data)
        return b"".join(parts)
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()


def from_bytes(data: bytes | memoryview, datatype: str, shape: list[int], name: str) -> np.ndarray[Any, Any]:
    """The array of a tensor's bytes. Raises ServerError where they do not fit its shape."""
    import numpy as np

    try:
        if datatype == "BYTES":
            items, at = [], 0
            while at < len(data):
                size = int.from_bytes(data[at : at + 4], "little")
                if at + 4 + size > len(data):
                    raise ValueError("a string goes beyond the tensor's end")
                items.append(bytes(data[at + 4 : at + 4 + size]))
                at += 4 + size
            return _objects(items).reshape(shape)
        if datatype == "BF16":
            wide = np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16
            return wide.view(np.float32).reshape(shape)
        # A copy: the caller may write to it, and the answer's bytes need not stay.
        return np.frombuffer(data, dtype=np.dtype(DTYPES[datatype]).newbyteorder("<")).reshape(shape).copy()
    except (ValueError, KeyError) as error:
        raise _unfit(datatype, shape, error, name) from None


def from_json(data: Any, datatype: str, shape: list[int], name: str) -> np.ndarray[Any, Any]:
    """The array of a tensor that came as JSON, nested or flat."""
    import numpy as np

    try:
        if datatype == "BYTES":
            flat = data
            while flat and isinstance(flat[0], list):
                flat = [item for part in flat for item in part]
            return _objects([item.encode() if isinstance(item, str) else item for item in flat]).reshape(shape)
        return np.asarray(data, dtype="float32" if datatype == "BF16" else DTYPES[datatype]).reshape(shape)
    except (ValueError, KeyError, TypeError) as error:
        raise _unfit(datatype, shape, error, name) from None


def _unfit(datatype: str, shape: list[int], error: Exception, name: str) -> ServerError:
    return ServerError(f"the answer's {datatype} tensor of shape {shape}: {error}", code="tensor", path=name)


def _objects(items: list[bytes]) -> np.ndarray[Any, Any]:
    import numpy as np

    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array
