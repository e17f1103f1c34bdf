"""Cutting an ONNX model down to the output that is read (control path).

A classifier converted by skl2onnx also makes a label, and a list of dictionaries (ZipMap): ONNX Runtime computes both
on every call even when nobody asks. The cut works on the protobuf's bytes: fields are copied as they are, only whole
nodes and outputs are left out, so that no number can change. A list of dictionaries is no tensor, and cannot be served:
the tensor of which ZipMap makes it stands in its place, under its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["GraphError", "TooDeep", "only_output", "with_tensors"]

# Field numbers of onnx.proto3.
_MODEL_GRAPH, _MODEL_OPSET = 7, 8
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2
_GRAPH_NODE, _GRAPH_OUTPUT = 1, 12
_NODE_INPUT, _NODE_OUTPUT, _NODE_OP_TYPE, _NODE_ATTRIBUTE = 1, 2, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_GRAPH, _ATTRIBUTE_INTS, _ATTRIBUTE_STRINGS, _ATTRIBUTE_GRAPHS = 1, 6, 8, 9, 11
_VALUE_NAME, _VALUE_TYPE = 1, 2
_TYPE_TENSOR, _TENSOR_ELEMENT, _TENSOR_SHAPE, _SHAPE_DIM = 1, 1, 2, 1
_FLOAT = 1
MOST_NESTED = 33  # graphs in one another: protocol buffers are read up to 100 messages deep, three for a graph


class GraphError(ValueError):
    """The bytes are not an ONNX model."""


class TooDeep(GraphError):
    """Graphs in one another, more than any runtime reads."""


class _Field:
    """One field of a message: its number, its whole bytes, and its content (bytes, or an integer)."""

    __slots__ = ("content", "number", "whole")

    def __init__(self, number: int, whole: memoryview, content: memoryview | int) -> None:
        self.number, self.whole, self.content = number, whole, content


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise GraphError("not an ONNX model: a number runs past its end")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: memoryview) -> Iterator[_Field]:
    """Protocol buffers encoding: https://protobuf.dev/programming-guides/encoding/"""
    at = 0
    while at < len(data):
        start = at
        key, at = _varint(data, at)
        wire = key & 7
        content: memoryview | int
        if wire == 0:
            content, at = _varint(data, at)
        else:
            if wire == 2:
                length, at = _varint(data, at)
            elif wire in (1, 5):
                length = 8 if wire == 1 else 4
            else:
                raise GraphError(f"not an ONNX model: wire type {wire} at byte {start}")
            if length > len(data) - at:
                raise GraphError(f"not an ONNX model: {length} bytes at byte {at}, {len(data) - at} are left")
            content = data[at : at + length]
            at += length
        yield _Field(key >> 3, data[start:at], content)


def _messages(data: Any, number: int) -> list[memoryview]:
    return [f.content for f in _fields(data) if f.number == number and isinstance(f.content, memoryview)]


def _text(data: memoryview) -> str:
    return bytes(data).decode(errors="replace")


def _strings(data: memoryview, number: int) -> list[str]:
    return [_text(content) for content in _messages(data, number)]


def _varint_of(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _encode(number: int, content: bytes) -> bytes:
    return _varint_of(number << 3 | 2) + _varint_of(len(content)) + content


def _needs(node: memoryview, depth: int = 1) -> set[str]:
    """Names a node reads, those that its subgraphs read from outside included (inner names do no harm)."""
    if depth > MOST_NESTED:
        kind = "".join(_strings(node, _NODE_OP_TYPE))[:40]
        raise TooDeep(f"a node {kind}: more than {MOST_NESTED} graphs in one another, deeper than any runtime reads")
    names = set(_strings(node, _NODE_INPUT))
    for attribute in _messages(node, _NODE_ATTRIBUTE):
        for number in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
            for graph in _messages(attribute, number):
                for inner in _messages(graph, _GRAPH_NODE):
                    names |= _needs(inner, depth + 1)
                for value in _messages(graph, _GRAPH_OUTPUT):
                    names |= set(_strings(value, _VALUE_NAME))
    return names


def _port(value: memoryview) -> dict[str, Any]:
    element = -1
    for kind in _messages(value, _VALUE_TYPE):
        for tensor in _messages(kind, _TYPE_TENSOR):
            element = 0
            for field in _fields(tensor):
                if field.number == _TENSOR_ELEMENT and isinstance(field.content, int):
                    element = field.content
    name = "".join(_strings(value, _VALUE_NAME))
    return {"name": name, "tensor": element >= 0, "kind": 1 if element >= 0 else 2, "type": element, "dims": []}


def only_output(
    model: bytes, output: str | None, choose: Callable[[list[dict[str, Any]], str | None], int]
) -> tuple[bytes, str]:
    """The model with one output and the nodes it needs, and that output's name as the file's author knows it.

    output: its name, or None for the one that `choose` picks among the descriptions of all. An output that a ZipMap
    makes becomes the tensor of probabilities under it. Raises GraphError where the bytes are not a model.
    """
    parts = list(_fields(memoryview(model)))
    graphs = [part for part in parts if part.number == _MODEL_GRAPH]
    if len(graphs) != 1 or not isinstance(graphs[0].content, memoryview):
        raise GraphError("not an ONNX model: it has no graph")
    graph = list(_fields(graphs[0].content))
    nodes = [part.content for part in graph if part.number == _GRAPH_NODE and isinstance(part.content, memoryview)]
    values = [part.content for part in graph if part.number == _GRAPH_OUTPUT and isinstance(part.content, memoryview)]

    makers = {name: node for node in nodes for name in _strings(node, _NODE_OUTPUT) if name}
    under = {}  # output of a ZipMap -> the tensor it takes
    for name, node in makers.items():
        if _strings(node, _NODE_OP_TYPE) == ["ZipMap"]:
            under[name] = _zipped(node)
    ports = [_port(value) for value in values]
    for port in ports:
        if port["name"] in under:
            port.update(tensor=True, kind=1, type=_FLOAT)
    chosen = ports[choose(ports, output)]["name"]

    target = under.get(chosen, chosen)
    if target == chosen:
        kept_output = next(bytes(value) for value, port in zip(values, ports) if port["name"] == chosen)
    else:
        unknown = _encode(_SHAPE_DIM, b"")
        tensor = bytes([_TENSOR_ELEMENT << 3, _FLOAT]) + _encode(_TENSOR_SHAPE, unknown + unknown)
        kept_output = _encode(_VALUE_NAME, target.encode()) + _encode(_VALUE_TYPE, _encode(_TYPE_TENSOR, tensor))
    kept: set[int] = set()
    wanted = [target]
    while wanted:
        maker = makers.get(wanted.pop())  # None: an input or an initializer
        if maker is not None and id(maker) not in kept:
            kept.add(id(maker))
            wanted += _needs(maker)
    body = b"".join(
        bytes(part.whole)
        for part in graph
        if part.number != _GRAPH_OUTPUT and (part.number != _GRAPH_NODE or id(part.content) in kept)
    )
    body += _encode(_GRAPH_OUTPUT, kept_output)
    whole = b"".join(
        _encode(_MODEL_GRAPH, body) if part.number == _MODEL_GRAPH else bytes(part.whole) for part in parts
    )
    return whole, chosen


def _zipped(node: memoryview) -> str:
    """The tensor that a ZipMap takes."""
    names = _strings(node, _NODE_INPUT)
    if len(names) != 1:
        raise GraphError(f"not an ONNX model: ZipMap has {len(names)} inputs, expected 1")
    return names[0]


def _classes(node: memoryview) -> int:
    """How many classes a ZipMap names; 0 where it does not say."""
    count = 0
    for attribute in _messages(node, _NODE_ATTRIBUTE):
        name = _strings(attribute, _ATTRIBUTE_NAME)
        if name == ["classlabels_strings"]:
            count += len(_messages(attribute, _ATTRIBUTE_STRINGS))
        elif name == ["classlabels_int64s"]:
            for field in _fields(attribute):
                if field.number != _ATTRIBUTE_INTS:
                    continue
                packed = field.content
                count += 1 if isinstance(packed, int) else sum(byte < 0x80 for byte in packed)
    return count


def with_tensors(model: bytes) -> bytes | None:
    """The model with the tensor under every ZipMap whose list of maps is an output, as that output; None where there is
    no such output. Raises GraphError where the bytes are not a model."""
    if b"ZipMap" not in model:
        return None
    parts = list(_fields(memoryview(model)))
    graphs = [part for part in parts if part.number == _MODEL_GRAPH]
    if len(graphs) != 1 or not isinstance(graphs[0].content, memoryview):
        raise GraphError("not an ONNX model: it has no graph")
    graph = list(_fields(graphs[0].content))
    outputs = {
        name
        for part in graph
        if part.number == _GRAPH_OUTPUT and isinstance(part.content, memoryview)
        for name in _strings(part.content, _VALUE_NAME)
    }
    made: dict[str, memoryview] = {}  # such an output -> its ZipMap
    body = []
    for part in graph:
        whole = bytes(part.whole)
        if part.number == _GRAPH_NODE and isinstance(part.content, memoryview):
            names = _strings(part.content, _NODE_OUTPUT)
            if _strings(part.content, _NODE_OP_TYPE) == ["ZipMap"] and len(names) == 1 and names[0] in outputs:
                made[names[0]] = part.content
                node = _encode(_NODE_INPUT, _zipped(part.content).encode())
                node += _encode(_NODE_OUTPUT, names[0].encode()) + _encode(_NODE_OP_TYPE, b"Identity")
                whole = _encode(_GRAPH_NODE, node)
        body.append(whole)
    if not made:
        return None
    for i, part in enumerate(graph):
        if part.number != _GRAPH_OUTPUT or not isinstance(part.content, memoryview):
            continue
        name = "".join(_strings(part.content, _VALUE_NAME))
        if name in made:
            classes = _classes(made[name])
            columns = bytes([1 << 3]) + _varint_of(classes) if classes else b""
            shape = _encode(_SHAPE_DIM, b"") + _encode(_SHAPE_DIM, columns)
            tensor = bytes([_TENSOR_ELEMENT << 3, _FLOAT]) + _encode(_TENSOR_SHAPE, shape)
            value = _encode(_VALUE_NAME, name.encode()) + _encode(_VALUE_TYPE, _encode(_TYPE_TENSOR, tensor))
            body[i] = _encode(_GRAPH_OUTPUT, value)
    new = [
        _encode(_MODEL_GRAPH, b"".join(body)) if part.number == _MODEL_GRAPH else bytes(part.whole) for part in parts
    ]
    domains = [_strings(opset, _OPSET_DOMAIN) for opset in _messages(memoryview(model), _MODEL_OPSET)]
    if not any(domain in ([], [""], ["ai.onnx"]) for domain in domains):  # Identity is of the operators that all have
        new.append(_encode(_MODEL_OPSET, bytes([_OPSET_VERSION << 3, 13])))
    return b"".join(new)
