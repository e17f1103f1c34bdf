"""The Open Inference Protocol's part of the OpenAPI document (control path), made from what is loaded now.

The paths hold for any model; each of the first models has its own infer path beside them, with an example that works.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .oip import OipRoutes

__all__ = ["oip_paths", "oip_schemas"]

Schema = dict[str, Any]

MANY = 50  # models beyond this are not listed one by one
DATATYPES = [
    *("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"),
    *("FP16", "BF16", "FP32", "FP64", "BYTES"),
]
PHRASES = {
    "400": "The request is not as it should be; the text says where.",
    "404": "There is no such model, version or region.",
    "501": "Well formed, and not supported here.",
    "503": "Not loaded, too much to do, or too late; retry later.",
}
COUNTER = {
    "type": "object",
    "required": ["count", "ns"],
    "properties": {"count": {"type": "integer"}, "ns": {"type": "integer"}},
}
TEXT: Schema = {"type": "string"}
# Parameters that are not known are passed over, whatever they hold.
PARAMETERS: Schema = {"type": "object"}
SHAPE: Schema = {"type": "array", "items": {"type": "integer"}}


def oip_paths(oip: OipRoutes) -> dict[str, Schema]:
    """path -> operations."""
    loaded = [(row["name"], row.get("version", "")) for row in oip.repository.index(True)]
    names, versions = sorted({name for name, _ in loaded}), sorted({version for _, version in loaded if version})
    name = _parameter("model_name", "name of the model", names)
    version = _parameter("model_version", "version of the model, a number or dotted numbers", versions)
    region = _parameter("region", "name of a shared memory region", [])
    paths: dict[str, Schema] = {
        "/v2": {"get": _read("server", "Name, version and extensions.", "oip.ServerMetadata")},
        "/v2/": {"get": _read("server.slash", "The same as /v2.", "oip.ServerMetadata")},
        "/v2/health/live": {"get": _read("live", "The process answers.", "oip.Health")},
        "/v2/health/ready": {"get": _read("ready", "Ready to infer.", "oip.Health", "503")},
        "/v2/models": {"get": _read("models", "Names of the models that are loaded.", "oip.Models")},
        "/v2/models/stats": {"get": _read("stats", "Statistics of all that is loaded.", "oip.Statistics")},
        "/v2/repository/index": {
            "post": _write(
                "index", "What the model folder holds, and its state.", "oip.IndexRequest", "oip.Index", False
            )
        },
        "/v2/logging": {
            "get": _read("logging", "Settings of the log.", "oip.LogSettings"),
            "post": _write(
                "logging.set", "Change settings of the log.", "oip.LogChanges", "oip.LogSettings", False, "501"
            ),
        },
    }
    trace = {"get": "trace", "post": "trace.set"}
    paths["/v2/trace/setting"] = _trace(trace, "the server", [])
    paths["/v2/models/{model_name}/trace/setting"] = _trace(
        {verb: f"model.{label}" for verb, label in trace.items()}, "a model", [name]
    )
    for verb, about in (("load", "Load a model, or load it anew."), ("unload", "Unload a model.")):
        operation = _write(
            f"repository.{verb}", about, f"oip.{verb.title()}Request", "oip.Done", False, "404", "501", "503"
        )
        operation["parameters"] = [_parameter("model_name", "name of the model", [])]
        paths[f"/v2/repository/models/{{model_name}}/{verb}"] = {"post": operation}
    for kind in ("system", "cuda"):
        base = f"/v2/{kind}sharedmemory"
        paths[f"{base}/status"] = {"get": _read(f"{kind}.status", "Regions: none, ever.", "oip.Regions")}
        paths[f"{base}/unregister"] = {"post": _write(f"{kind}.unregister", "Forget all.", None, "oip.Done", False)}
        one = f"{base}/region/{{region}}"
        paths[f"{one}/status"] = {
            "get": _read(f"{kind}.region.status", "There is no region.", "oip.Regions", "404")
            | {"parameters": [region]}
        }
        paths[f"{one}/register"] = {
            "post": _write(f"{kind}.region.register", "Refused.", None, "oip.Done", False, "501")
            | {"parameters": [region]}
        }
        paths[f"{one}/unregister"] = {
            "post": _write(f"{kind}.region.unregister", "Forget it.", None, "oip.Done", False)
            | {"parameters": [region]}
        }
    for label, part, given in (("model", "", [name]), ("version", "/versions/{model_version}", [name, version])):
        base = "/v2/models/{model_name}" + part
        for what, about, answer in (
            ("", "Inputs, outputs and versions.", "oip.ModelMetadata"),
            ("/ready", "Whether it can infer.", "oip.ModelReady"),
            ("/config", "Triton's model configuration.", "oip.ModelConfig"),
            ("/stats", "Cumulative statistics.", "oip.Statistics"),
        ):
            operation = _read(f"{label}{what.replace('/', '.')}", about, answer, "404", "503")
            paths[base + what] = {"get": operation | {"parameters": given}}
        paths[f"{base}/infer"] = {"post": _infer(f"{label}.infer", "Infer.", given)}
    for found in names[:MANY]:
        model = oip.repository.model(found, "")
        if model is None:
            continue
        operation = _infer(f"infer.{found}", f"Infer with {found}.", [])
        example = _example(model)
        if example is not None:
            operation["requestBody"]["content"]["application/json"]["example"] = example
        paths[f"/v2/models/{found}/infer"] = {"post": operation}
    return paths


def oip_schemas() -> dict[str, Schema]:
    """Name -> schema, for components.schemas."""
    tensor = _object({"name": TEXT, "datatype": {"enum": DATATYPES}, "shape": SHAPE})
    value: Schema = {"type": ["number", "boolean", "string", "array"]}
    ports = {"type": "array", "items": tensor}
    dims = _object({"name": TEXT, "data_type": TEXT, "dims": SHAPE})
    counters = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
    switches: dict[str, Schema] = {name: {"type": "boolean"} for name in ("log_info", "log_warning", "log_error")}
    log: dict[str, Schema] = {
        "log_format": {"enum": ["default", "ISO8601"]},
        "log_verbose_level": {"const": 0},
        "log_file": {"const": ""},
    }
    return {
        "oip.Error": _object({"error": TEXT}),
        "oip.Health": _object({"live": {"type": "boolean"}, "ready": {"type": "boolean"}}),
        "oip.ServerMetadata": _object({"name": TEXT, "version": TEXT, "extensions": {"type": "array", "items": TEXT}}),
        "oip.Models": _object({"models": {"type": "array", "items": TEXT}}),
        "oip.ModelReady": _object({"name": TEXT, "ready": {"type": "boolean"}}),
        "oip.ModelMetadata": _object(
            {
                "name": TEXT,
                "versions": {"type": "array", "items": TEXT},
                "platform": TEXT,
                "inputs": ports,
                "outputs": ports,
            }
        ),
        "oip.ModelConfig": _object(
            {
                "name": TEXT,
                "platform": TEXT,
                "backend": TEXT,
                "version_policy": {"type": "object"},
                "max_batch_size": {"type": "integer", "minimum": 0},
                "input": {"type": "array", "items": dims},
                "output": {"type": "array", "items": dims},
                "instance_group": {"type": "array", "items": {"type": "object"}},
            },
            {"dynamic_batching": {"type": "object"}},
        ),
        "oip.Statistics": _object(
            {
                "model_stats": {
                    "type": "array",
                    "items": _object(
                        {
                            "name": TEXT,
                            "version": TEXT,
                            "last_inference": {"type": "integer", "description": "ms since 1970; 0: none yet"},
                            "inference_count": {"type": "integer"},
                            "execution_count": {"type": "integer"},
                            "inference_stats": _object(dict.fromkeys(counters, COUNTER)),
                        }
                    ),
                }
            }
        ),
        "oip.IndexRequest": _object({}, {"ready": {"type": "boolean", "description": "only what is ready"}}),
        "oip.Index": {
            "type": "array",
            "items": _object(
                {
                    "name": TEXT,
                    "state": {"enum": ["UNKNOWN", "READY", "UNAVAILABLE", "LOADING", "UNLOADING"]},
                },
                {"version": TEXT, "reason": TEXT},
            ),
        },
        "oip.LoadRequest": _object(
            {},
            {
                "parameters": {
                    "type": "object",
                    "description": "config: a model configuration as JSON text; file:<version>/<name>: base64",
                    "properties": {"config": TEXT},
                    "additionalProperties": {"type": ["string", "number", "boolean"]},
                }
            },
        ),
        "oip.UnloadRequest": _object(
            {},
            {
                "parameters": {
                    "type": "object",
                    "properties": {"unload_dependents": {"type": "boolean"}},
                    "additionalProperties": {"type": ["string", "number", "boolean"]},
                }
            },
        ),
        "oip.Done": {"type": "object", "maxProperties": 0},
        "oip.Regions": {"type": "array", "maxItems": 0},
        "oip.TraceSettings": _object(
            {
                "trace_level": {"type": "array", "items": {"enum": ["OFF", "TIMESTAMPS"]}},
                **dict.fromkeys(("trace_rate", "trace_count", "log_frequency", "trace_file", "trace_mode"), TEXT),
            }
        ),
        "oip.TraceChanges": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "trace_level": {
                    "oneOf": [
                        {"enum": ["OFF", "TIMESTAMPS", None]},
                        {"type": "array", "minItems": 1, "maxItems": 1, "items": {"enum": ["OFF", "TIMESTAMPS"]}},
                    ]
                },
                **{
                    name: {
                        "oneOf": [
                            {"type": ["integer", "null"], "minimum": least, "maximum": 2**63 - 1},
                            {"type": "string", "pattern": "^[1-9][0-9]{0,17}$"},
                        ]
                    }
                    for name, least in (("trace_rate", 1), ("trace_count", -1), ("log_frequency", 0))
                },
            },
        },
        "oip.LogSettings": _object(switches | log),
        "oip.LogChanges": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                **{name: {"type": ["boolean", "null"]} for name in switches},
                **{name: {"oneOf": [schema, {"type": "null"}]} for name, schema in log.items()},
            },
        },
        "oip.InferRequest": _object(
            {
                "inputs": {
                    "type": "array",
                    "minItems": 1,
                    "items": _object(
                        {
                            "name": TEXT,
                            "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                            "datatype": {"enum": DATATYPES},
                        },
                        {
                            "parameters": PARAMETERS,
                            "data": {
                                "type": "array",
                                "items": value,
                                "description": "row by row, nested or flat; absent with parameters.binary_data_size",
                            },
                        },
                    ),
                },
            },
            {
                "id": {"type": "string", "description": "comes back in the answer"},
                "parameters": {
                    **PARAMETERS,
                    "properties": {
                        "timeout": {
                            "type": "integer",
                            "minimum": 0,
                            "description": "microseconds it may wait; it can only shorten the server's; 0: not given",
                        },
                        "priority": {
                            "type": "integer",
                            "minimum": 0,
                            "description": "1 is served first; 0: the default",
                        },
                        "binary_data_output": {"type": "boolean", "description": "all outputs as raw bytes"},
                    },
                },
                "outputs": {
                    "type": "array",
                    "description": "left out: all of them",
                    "items": _object({"name": TEXT}, {"parameters": PARAMETERS}),
                },
            },
        ),
        "oip.InferResponse": _object(
            {
                "model_name": TEXT,
                "model_version": TEXT,
                "outputs": {
                    "type": "array",
                    "items": _object(
                        {"name": TEXT, "datatype": {"enum": DATATYPES}, "shape": SHAPE},
                        {
                            "parameters": PARAMETERS,
                            "data": {"type": "array", "items": value | {"type": [*value["type"], "null"]}},
                        },
                    ),
                },
            },
            {"id": TEXT, "parameters": PARAMETERS},
        ),
    }


def _object(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    schema: Schema = {"type": "object", "properties": {**required, **(optional or {})}}
    return schema | ({"required": list(required)} if required else {})


def _parameter(name: str, about: str, known: list[str]) -> Schema:
    schema: Schema = {"type": "string", "minLength": 1}
    if 0 < len(known) <= MANY:
        schema["enum"] = known
    return {"name": name, "in": "path", "required": True, "description": about, "schema": schema}


def _json(name: str) -> Schema:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _answers(answer: str, *refusals: str) -> Schema:
    answers: Schema = {"200": {"description": "Done.", "content": _json(answer)}}
    for status in refusals:
        answers[status] = {"description": PHRASES[status], "content": _json("oip.Error")}
        if status == "503":
            answers[status]["headers"] = {
                "Retry-After": {"description": "seconds", "schema": {"type": "integer", "minimum": 0}}
            }
    return answers


def _read(label: str, about: str, answer: str, *refusals: str) -> Schema:
    return {"summary": about, "operationId": f"oip.{label}", "tags": ["oip"], "responses": _answers(answer, *refusals)}


def _write(label: str, about: str, body: str | None, answer: str, required: bool, *refusals: str) -> Schema:
    operation = _read(label, about, answer, "400", *refusals)
    for status, about in (
        ("403", "A browser asks for a page of another origin."),
        ("413", "The body is too large."),
        ("415", "An unknown Content-Encoding."),
    ):
        operation["responses"][status] = {"description": about, "content": _json("oip.Error")}
    if body is not None:
        operation["requestBody"] = {"required": required, "content": _json(body)}
    return operation


def _trace(labels: dict[str, str], whose: str, given: list[Schema]) -> Schema:
    refusals = ("404", "503") if given else ()
    get = _read(labels["get"], f"Trace settings of {whose}.", "oip.TraceSettings", *refusals)
    post = _write(
        labels["post"],
        f"Change trace settings of {whose}.",
        "oip.TraceChanges",
        "oip.TraceSettings",
        False,
        "501",
        *refusals,
    )
    return {"get": get | {"parameters": given}, "post": post | {"parameters": given}}


def _infer(label: str, about: str, given: list[Schema]) -> Schema:
    binary: Schema = {"application/octet-stream": {}}
    length = {
        "name": "Inference-Header-Content-Length",
        "in": "header",
        "description": "bytes of JSON before raw tensors; 0: the body is one raw tensor",
        "schema": {"type": "integer", "minimum": 0},
    }
    operation = _write(label, about, "oip.InferRequest", "oip.InferResponse", True, "404", "503")
    operation["parameters"] = [*given, length]
    operation["requestBody"]["content"] |= binary
    operation["responses"]["200"]["content"] |= binary
    operation["responses"]["200"]["headers"] = {
        "Inference-Header-Content-Length": {
            "description": "where raw tensors follow the JSON",
            "schema": {"type": "integer", "minimum": 1},
        }
    }
    return operation


def _example(model: Any) -> Schema | None:
    """A request with one row of zeros; None where an input has no form in JSON."""
    inputs: list[Schema] = []
    for port in model.inputs:
        if port.datatype in ("FP16", "BF16"):
            return None
        shape = [size if size >= 0 else 1 for size in port.shape]
        zero: Any = {"BYTES": "", "BOOL": False}.get(port.datatype, 0)
        data = [zero] * math.prod(shape)
        inputs.append({"name": port.name, "shape": shape, "datatype": port.datatype, "data": data})
    return {"inputs": inputs}
