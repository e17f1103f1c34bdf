"""As much of the ONNX file format as tree ensembles need: protocol buffers, graphs, attributes, tensors (control path).

The onnx package is not a dependency, and forests hold millions of numbers: runs of numbers are decoded by numpy. Field
numbers are those of onnx.proto; encoding: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .tree_ensemble import TreeError

__all__ = ["DOUBLE", "FLOAT", "Graph", "Node", "Port", "graph_ports", "read_graph"]

FLOAT, UINT8, INT64, DOUBLE = 1, 2, 7, 11
_TENSOR_DTYPES = {
    FLOAT: "<f4",
    UINT8: "u1",
    3: "i1",
    6: "<i4",
    INT64: "<i8",
    9: "u1",
    DOUBLE: "<f8",
    12: "<u4",
    13: "<u8",
}


@dataclass(slots=True)
class Node:
    """One operator: attributes by name, as arrays, lists of bytes, integers or floats."""

    op_type: str = ""
    domain: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Port:
    """A graph's input or output. element: a TensorProto.DataType, -1 for what is no tensor; a free dim is None."""

    name: str = ""
    element: int = -1
    dims: list[int | None] = field(default_factory=list)


@dataclass(slots=True)
class Graph:
    nodes: list[Node] = field(default_factory=list)
    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)
    initializers: dict[str, Any] = field(default_factory=dict)  # the value of single numbers, None for others
    opsets: dict[str, int] = field(default_factory=dict)


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= end or shift > 63:
            raise TreeError(f"byte {at}: a number that does not end")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _varints(data: bytes, begin: int, end: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """All varints of data[begin:end], and the position after each; an unfinished last one is left out."""
    raw = np.frombuffer(data, np.uint8, end - begin, begin)
    stops = np.flatnonzero(raw < 0x80)
    if not len(stops):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    raw = raw[: stops[-1] + 1]
    starts = np.concatenate([[0], stops[:-1] + 1])
    lengths = stops - starts + 1
    if lengths.max() > 10:
        # Past here the bytes are no varints: what comes before still may be.
        keep = int(np.argmax(lengths > 10))
        if keep == 0:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        starts, stops, lengths = starts[:keep], stops[:keep], lengths[:keep]
        raw = raw[: stops[-1] + 1]
    place = np.arange(len(raw)) - np.repeat(starts, lengths)
    parts = (raw & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64)
    values = np.bitwise_or.reduceat(parts, starts).view(np.int64)
    return values, begin + stops + 1


class _Message:
    """The fields of data[begin:end], by number: lists of (wire type, value or span)."""

    __slots__ = ("data", "fields")

    def __init__(self, data: bytes, begin: int, end: int) -> None:
        self.data = data
        self.fields: dict[int, list[Any]] = {}
        at = begin
        while at < end:
            start = at
            key, at = _varint(data, at, end)
            number, wire = key >> 3, key & 7
            into = self.fields.setdefault(number, [])
            if wire == 0:
                run = _number_run(data, start, end) if at - start == 1 and end - at > 64 else None
                if run is not None and len(run[0]) > 1:
                    into.append(run[0])
                    at = run[1]
                    continue
                value, at = _varint(data, at, end)
                into.append(_signed(value))
            elif wire == 2:
                length, at = _varint(data, at, end)
                if length > end - at:
                    raise TreeError(f"byte {at}: {length} bytes expected, {end - at} are left")
                into.append((at, at + length))
                at += length
            elif wire in (1, 5):
                width = 8 if wire == 1 else 4
                count = _tag_run(data, start, end, width + 1) if at - start == 1 else 0
                kind = "<f8" if wire == 1 else "<f4"
                if count:
                    dtype = np.dtype([("tag", "u1"), ("value", kind)])
                    into.append(np.frombuffer(data, dtype, count, start)["value"])
                    at = start + count * (width + 1)
                else:
                    if width > end - at:
                        raise TreeError(f"byte {at}: {width} bytes expected, {end - at} are left")
                    into.append(np.frombuffer(data, kind, 1, at))
                    at += width
            else:
                raise TreeError(f"byte {start}: wire type {wire}; this is no ONNX file")

    def _spans(self, number: int) -> list[tuple[int, int]]:
        spans = self.fields.get(number, [])
        for span in spans:
            if not isinstance(span, tuple):
                raise TreeError(f"field {number}: a number where bytes are expected")
        return spans

    def messages(self, number: int) -> list[_Message]:
        return [_Message(self.data, *span) for span in self._spans(number)]

    def bytes_list(self, number: int) -> list[bytes]:
        return [self.data[begin:end] for begin, end in self._spans(number)]

    def text(self, number: int) -> str:
        found = self.bytes_list(number)
        try:
            return found[-1].decode() if found else ""
        except UnicodeDecodeError:
            raise TreeError(f"field {number}: a name that is not UTF-8") from None

    def integer(self, number: int, default: int) -> int:
        found = self.integers(number)
        return int(found[-1]) if len(found) else default

    def integers(self, number: int) -> npt.NDArray[np.int64]:
        """A repeated integer, packed or not."""
        parts: list[npt.NDArray[np.int64]] = []
        for value in self.fields.get(number, []):
            if isinstance(value, tuple):
                values, stops = _varints(self.data, *value)
                if value[0] != value[1] and (not len(stops) or stops[-1] != value[1]):
                    raise TreeError(f"byte {value[0]}: numbers that do not end")
                parts.append(values)
            elif isinstance(value, int):
                parts.append(np.array([value], np.int64))
            elif value.dtype == np.int64:
                parts.append(value)
            else:
                raise TreeError(f"field {number}: a float where an integer is expected")
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def floats(self, number: int, dtype: str) -> npt.NDArray[Any]:
        """A repeated float or double, packed or not."""
        kind = np.dtype(dtype)
        parts = []
        for value in self.fields.get(number, []):
            if isinstance(value, tuple):
                if (value[1] - value[0]) % kind.itemsize:
                    raise TreeError(f"byte {value[0]}: {value[1] - value[0]} bytes of {kind.itemsize}-byte numbers")
                parts.append(np.frombuffer(self.data, kind, (value[1] - value[0]) // kind.itemsize, value[0]))
            elif isinstance(value, np.ndarray) and value.dtype == kind:
                parts.append(value)
            else:
                raise TreeError(f"field {number}: no {kind.name}")
        return np.concatenate(parts) if parts else np.zeros(0, kind)


def _number_run(data: bytes, begin: int, end: int) -> tuple[npt.NDArray[np.int64], int]:
    """The values of a run of tag, varint, tag, varint from `begin` on (the tag is one byte), and where it ends."""
    # The window grows with the run, so that the work stays in proportion to it whatever the bytes are.
    window = 256
    while True:
        stop = min(begin + window, end)
        values, stops = _varints(data, begin, stop)
        pairs = len(values) // 2
        other = np.flatnonzero(values[: 2 * pairs : 2] != data[begin])
        if stop == end or len(other):
            break
        window *= 8
    # A tag of one byte: the varint before it ended right there.
    count = int(other[0]) if len(other) else pairs
    return values[1 : 2 * count : 2], int(stops[2 * count - 1]) if count else begin


def _tag_run(data: bytes, begin: int, end: int, step: int) -> int:
    """How many times in a row, `step` bytes apart, the tag at `begin` stands with a whole number behind it."""
    most = (end - begin) // step
    window = 64
    while True:
        tags = np.frombuffer(data, np.uint8, min(window, most) * step, begin)[::step]
        other = np.flatnonzero(tags != data[begin])
        if len(other):
            return int(other[0])
        if window >= most:
            return most
        window *= 8


def _tensor(message: _Message) -> npt.NDArray[Any]:
    kind = message.integer(2, 0)
    if kind not in _TENSOR_DTYPES:
        raise TreeError(f"a tensor of element type {kind}")
    if message.integer(14, 0):
        raise TreeError("a tensor stored outside the file")
    dtype = np.dtype(_TENSOR_DTYPES[kind])
    raw = message.bytes_list(9)
    if raw:
        if len(raw[-1]) % dtype.itemsize:
            raise TreeError(f"a tensor of {len(raw[-1])} bytes, {dtype.itemsize} a value")
        return np.frombuffer(raw[-1], dtype)
    if kind == FLOAT:
        return message.floats(4, "<f4")
    if kind == DOUBLE:
        return message.floats(10, "<f8")
    return message.integers(7 if kind == INT64 else 11 if kind in (12, 13) else 5).astype(dtype)


def _single(message: _Message) -> Any:
    """The only number of a small tensor."""
    if message.integer(2, 0) not in _TENSOR_DTYPES or message.integers(1).tolist() not in ([], [1]):
        return None
    values = _tensor(message)
    return values[0] if len(values) == 1 else None


def _attribute(message: _Message) -> Any:
    kind = message.integer(20, 0)
    if kind == 1:
        found = message.floats(2, "<f4")
        return float(found[-1]) if len(found) else 0.0
    if kind == 2:
        return message.integer(3, 0)
    if kind == 3:
        return (message.bytes_list(4) or [b""])[-1]
    if kind == 4:
        tensors = message.messages(5)
        if not tensors:
            raise TreeError("an attribute without its tensor")
        return _tensor(tensors[-1])
    if kind == 6:
        return message.floats(7, "<f4")
    if kind == 7:
        return message.integers(8)
    if kind == 8:
        return message.bytes_list(9)
    return None


def _port(message: _Message) -> Port:
    port = Port(message.text(1))
    for kind in message.messages(2):
        for tensor in kind.messages(1):
            port.element = tensor.integer(1, 0)
            for shape in tensor.messages(2):
                for dim in shape.messages(1):
                    port.dims.append(dim.integer(1, 0) if 1 in dim.fields else None)
    return port


def _texts(message: _Message, number: int) -> list[str]:
    return [name.decode(errors="replace") for name in message.bytes_list(number)]


def read_graph(data: bytes) -> Graph:
    """The main graph of an ONNX file. Attributes are read for operators of ai.onnx.ml and Cast only.

    Raises TreeError saying at which byte the file is damaged.
    """
    model = _Message(data, 0, len(data))
    graphs = model.messages(7)
    if len(graphs) != 1:
        raise TreeError("this is no ONNX file: it has no graph")
    graph = Graph()
    for opset in model.messages(8):
        graph.opsets[opset.text(1)] = opset.integer(2, 0)
    for message in graphs[0].messages(1):
        node = Node(message.text(4), message.text(7), _texts(message, 1), _texts(message, 2))
        if node.domain == "ai.onnx.ml" or node.op_type == "Cast":
            for attribute in message.messages(5):
                name = attribute.text(1)
                try:
                    node.attributes[name] = _attribute(attribute)
                except TreeError as error:
                    raise TreeError(f"{node.op_type}.{name}: {error}") from None
        graph.nodes.append(node)
    graph.inputs = [_port(message) for message in graphs[0].messages(11)]
    graph.outputs = [_port(message) for message in graphs[0].messages(12)]
    for message in graphs[0].messages(5):
        graph.initializers[message.text(8)] = _single(message)
    return graph


def graph_ports(path: str | os.PathLike[str]) -> tuple[list[Port], list[Port], str | None, list[int | str] | None]:
    """Inputs (without initializers) and outputs of an ONNX file's graph; and where a tree classifier's label is an
    output as it is, its name and the classes. Of the nodes little more is read than their names. Raises TreeError.
    """
    data = Path(path).read_bytes()
    graphs = _Message(data, 0, len(data)).messages(7)
    if len(graphs) != 1:
        raise TreeError("this is no ONNX file: it has no graph")
    known = {message.text(8) for message in graphs[0].messages(5)}
    inputs = [port for port in map(_port, graphs[0].messages(11)) if port.name not in known]
    outputs = [_port(message) for message in graphs[0].messages(12)]
    names: set[str] = set()
    labels: list[int | str] = []
    nodes = graphs[0].messages(1)
    for node in nodes:
        if node.text(4) == "TreeEnsembleClassifier" and node.text(7) == "ai.onnx.ml":
            names = set(_texts(node, 2)[:1])
            for attribute in node.messages(5):
                if attribute.text(1) == "classlabels_int64s":
                    labels += attribute.integers(8).tolist()
                elif attribute.text(1) == "classlabels_strings":
                    labels += [text.decode(errors="replace") for text in attribute.bytes_list(9)]
    element = 8 if labels and isinstance(labels[0], str) else INT64
    for node in nodes:  # what passes the label on as it is
        if names & set(_texts(node, 1)):
            to = [attribute.integer(3, 0) for attribute in node.messages(5) if attribute.text(1) == "to"]
            if node.text(4) == "Identity" or (node.text(4) == "Cast" and to == [element]):
                names |= set(_texts(node, 2))
    found = [port.name for port in outputs if port.name in names and port.element == element]
    return (inputs, outputs, found[0], labels) if found and labels else (inputs, outputs, None, None)
