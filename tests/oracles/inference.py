"""The Open Inference Protocol over HTTP, slow and obvious: Python's json and numpy, one value after the other."""

import json
import math
import struct

import ml_dtypes
import numpy as np

DTYPES = {
    "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
    "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64, "FP16": np.float16,
    "FP32": np.float32, "FP64": np.float64, "BF16": ml_dtypes.bfloat16, "BYTES": np.object_,
}  # fmt: skip
SHARED = ("shared_memory_region", "shared_memory_offset", "shared_memory_byte_size")
MOST = (1 << 63) // 16


class Refused(Exception):
    """The request is not one."""


class Number:
    """A JSON number as it is written."""

    def __init__(self, text):
        self.text = text

    def whole(self, low, high):
        if any(c in self.text for c in ".eE") or not low <= int(self.text) <= high:
            raise Refused(f"{self.text}: expected an integer from {low} to {high}")
        return int(self.text)


class Pairs(list):
    """A JSON object with its keys in order, twice where they stand twice."""

    def get(self, key, default=None):
        found = [value for name, value in self if name == key]
        if len(found) > 1:
            raise Refused(f"{key}: given twice")
        return found[0] if found else default


def constant(text):
    raise Refused(f"{text} is no JSON")


def check(value, depth=0):
    """Bounded nesting, and no half surrogates."""
    if depth > 70:
        raise Refused("too deep")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Refused("half a surrogate pair") from None
    elif isinstance(value, Pairs):
        for name, each in value:
            check(name, depth)
            check(each, depth + 1)
    elif isinstance(value, list):
        for each in value:
            check(each, depth + 1)


def kind(value, expected):
    """Pairs is a list too: an object is no array."""
    if not isinstance(value, expected) or (expected is list and isinstance(value, Pairs)):
        raise Refused(f"expected {expected}")
    return value


def count(value):
    return kind(value, Number).whole(0, 2**63 - 1)


def element(value, datatype):
    if datatype in ("FP32", "FP64"):
        if value is None:
            return math.nan
        number = float(kind(value, Number).text)
        with np.errstate(over="ignore"):
            if math.isinf(number) or (datatype == "FP32" and math.isinf(np.float32(number))):
                raise Refused("out of range")
        return number
    if datatype == "BOOL":
        return kind(value, bool)
    if datatype == "BYTES":
        return kind(value, str).encode()
    if datatype in ("FP16", "BF16"):
        raise Refused("no JSON form")
    info = np.iinfo(DTYPES[datatype])
    return kind(value, Number).whole(info.min, info.max)


def flatten(data, shape, datatype):
    """The values of `data`, flat or nested exactly as the shape says."""
    total = math.prod(shape)
    kind(data, list)
    if len(shape) > 1 and data and isinstance(data[0], list) and not isinstance(data[0], Pairs):
        levels = [data]
        for dim in shape:
            if any(not isinstance(level, list) or isinstance(level, Pairs) or len(level) != dim for level in levels):
                raise Refused("not the shape")
            levels = [each for level in levels for each in level]
        values = levels
    else:
        values = data
    if len(values) != total:
        raise Refused(f"expected {total} values")
    return [element(value, datatype) for value in values]


def array(values, shape, datatype):
    out = np.empty(len(values), DTYPES[datatype])
    with np.errstate(over="ignore"):
        for i, value in enumerate(values):
            out[i] = value
    return out.reshape(shape)


def from_raw(raw, shape, datatype):
    if datatype == "BYTES":
        values, at = [], 0
        while at < len(raw):
            if len(raw) - at < 4:
                raise Refused("half a length")
            (n,) = struct.unpack_from("<I", raw, at)
            if n > len(raw) - at - 4:
                raise Refused("a length beyond the end")
            values.append(raw[at + 4 : at + 4 + n])
            at += 4 + n
        if len(values) != math.prod(shape):
            raise Refused("not the count")
        return array(values, shape, datatype)
    if datatype == "BOOL" and any(byte > 1 for byte in raw):
        raise Refused("neither 0 nor 1")
    if len(raw) != math.prod(shape) * np.dtype(DTYPES[datatype]).itemsize:
        raise Refused("not the size")
    return np.frombuffer(raw, DTYPES[datatype]).reshape(shape)


def to_raw(values, datatype):
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(v)) + v for v in map(as_bytes, values.ravel()))
    return np.ascontiguousarray(values, DTYPES[datatype]).tobytes()


def as_bytes(value):
    return value.encode() if isinstance(value, str) else bytes(value)


def shown(value, datatype):
    """A value as JSON decodes it."""
    if datatype == "BYTES":
        try:
            return as_bytes(value).decode()
        except UnicodeDecodeError:
            raise Refused("not UTF-8") from None
    if datatype == "BOOL":
        return bool(value)
    if datatype in ("FP32", "FP64"):
        return float(str(value)) if math.isfinite(value) else None
    return int(value)


def classes(values, k, batched):
    """Texts "value:index" of the k largest of each row, and their shape. Compared as doubles, NaN comes last."""
    batched = batched and values.ndim > 1
    columns = math.prod(values.shape[1:]) if batched else values.size
    rows = values.reshape(values.shape[0] if batched else 1, columns)
    texts = []
    for row in rows:
        order = sorted(
            range(columns), key=lambda i: (bool(np.isnan(row[i])), 0 if np.isnan(row[i]) else -float(row[i]), i)
        )
        texts.append([f"{word(row[i])}:{i}" for i in order[:k]])
    return texts, (len(rows), min(k, columns)) if batched else (min(k, columns),)


def word(value):
    if isinstance(value, np.integer):
        return str(int(value))
    if isinstance(value, np.bool_):
        return "true" if value else "false"
    if not isinstance(value, np.float64):
        value = np.float32(value)
    return repr(float(str(value))) if math.isfinite(value) else str(float(value))


class Model:
    """inputs, outputs: [(name, datatype, shape)]; run: {name: array} -> {name: array}."""

    def __init__(self, name, version, inputs, outputs, run, any_number=False):
        self.name, self.version, self.run, self.any_number = name, version, run, any_number
        self.inputs = {port: (datatype, shape) for port, datatype, shape in inputs}
        self.outputs = {port: (datatype, shape) for port, datatype, shape in outputs}
        self.batched = all(shape and shape[0] == -1 for _, shape in self.inputs.values())

    def answer(self, body, header_length=-1):
        """(the JSON of the answer, decoded; the raw tensors behind it). Raises Refused."""
        size = len(body) if header_length < 0 else header_length
        if header_length == 0 or size > len(body):
            raise Refused("header length")
        try:
            text = body[:size].decode()
        except UnicodeDecodeError:
            raise Refused("not UTF-8") from None
        try:
            request = json.loads(
                text, object_pairs_hook=Pairs, parse_int=Number, parse_float=Number, parse_constant=constant
            )
        except (json.JSONDecodeError, RecursionError) as error:
            raise Refused(str(error)) from None
        check(request)
        kind(request, Pairs)
        head = {}
        request_id = request.get("id")
        if any(name == "id" for name, _ in request):
            head["id"] = kind(request_id, str)
        parameters = kind(request.get("parameters", Pairs()), Pairs)
        binary_default = kind(parameters.get("binary_data_output", False), bool)
        for name in ("timeout", "priority"):
            if any(key == name for key, _ in parameters):
                count(parameters.get(name))
        feed = self.read_inputs(kind(request.get("inputs"), list), body[size:])
        wanted = self.read_outputs(kind(request.get("outputs", []), list), binary_default)
        results = self.run(feed)
        head |= {"model_name": self.name, "model_version": self.version, "outputs": []}
        parts = []
        for name, binary, k in wanted:
            datatype, values = self.outputs[name][0], results[name]
            shape = values.shape
            if k:
                texts, shape = classes(values, k, self.batched)
                values = np.array([t.encode() for row in texts for t in row], object).reshape(shape)
                datatype = "BYTES"
            entry = {"name": name, "datatype": datatype, "shape": list(shape)}
            if binary:
                parts.append(to_raw(values, datatype))
                entry["parameters"] = {"binary_data_size": len(parts[-1])}
            else:
                entry["data"] = [shown(value, datatype) for value in values.ravel()]
            head["outputs"].append(entry)
        return head, parts

    def read_inputs(self, inputs, raw):
        feed, at = {}, 0
        for entry in inputs:
            kind(entry, Pairs)
            name, datatype = kind(entry.get("name"), str), kind(entry.get("datatype"), str)
            if name not in self.inputs or name in feed or datatype not in DTYPES:
                raise Refused("name or datatype")
            own, expected = self.inputs[name]
            if datatype != own and not (self.any_number and datatype != "BYTES"):
                raise Refused("datatype")
            shape = [count(dim) for dim in kind(entry.get("shape"), list)]
            if len(shape) != len(expected) or any(e not in (-1, d) for e, d in zip(expected, shape, strict=True)):
                raise Refused("shape")
            size = 4 if datatype == "BYTES" else np.dtype(DTYPES[datatype]).itemsize
            if size * math.prod(d for d in shape if d) > MOST:
                raise Refused("overflow")
            parameters = kind(entry.get("parameters", Pairs()), Pairs)
            if any(
                key.startswith("shared_memory_") and key[14:] in ("region", "offset", "byte_size")
                for key, _ in parameters
            ):
                raise Refused("shared memory")
            has_data = any(key == "data" for key, _ in entry)
            if any(key == "binary_data_size" for key, _ in parameters):
                size = count(parameters.get("binary_data_size"))
                if has_data or size > len(raw) - at:
                    raise Refused("binary data")
                feed[name] = from_raw(raw[at : at + size], shape, datatype)
                at += size
            else:
                feed[name] = array(flatten(entry.get("data"), shape, datatype), shape, datatype)
        if at != len(raw) or len(feed) != len(self.inputs):
            raise Refused("surplus bytes or a missing input")
        return feed

    def read_outputs(self, outputs, binary_default):
        wanted = []
        for entry in outputs:
            kind(entry, Pairs)
            name = kind(entry.get("name"), str)
            parameters = kind(entry.get("parameters", Pairs()), Pairs)
            if any(
                key.startswith("shared_memory_") and key[14:] in ("region", "offset", "byte_size")
                for key, _ in parameters
            ):
                raise Refused("shared memory")
            binary = kind(parameters.get("binary_data", binary_default), bool)
            k = count(parameters.get("classification")) if any(key == "classification" for key, _ in parameters) else 0
            if name not in self.outputs or any(name == other for other, _, _ in wanted):
                raise Refused("unknown, or twice")
            if k and self.outputs[name][0] == "BYTES":
                raise Refused("no numbers")
            wanted.append((name, binary, k))
        wanted = wanted or [(name, binary_default, 0) for name in self.outputs]
        if any(not binary and not k and self.outputs[name][0] in ("FP16", "BF16") for name, binary, k in wanted):
            raise Refused("no JSON form")
        return wanted
