"""Open Inference Protocol over HTTP (control path): every endpoint but the inference, which is answered natively.

What must stay true: an answer here tells of the repository as it is when asked, so a Route that was resolved once stays
right when models come and go; an extension that is advertised works; nothing here names a file that a client chose.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import Any

import msgspec

from .. import __version__
from .._ext.http import RequestError, Route
from ..errors import PenstockError
from ..models.folder import ModelError
from ..models.repository import UnknownModel
from .server_log import ServerLog
from .tracing import SettingError, Tracing

__all__ = ["EXTENSIONS", "OipRoutes", "model_config"]

JSON = b"application/json"
Answer = tuple[int, bytes, bytes]

EXTENSIONS = (
    "binary_tensor_data",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "statistics",
    "logging",
)
READ = ("GET", "HEAD")
WRITE = ("POST",)
BOTH = ("GET", "HEAD", "POST")


class IndexRequest(msgspec.Struct):
    """Body of POST v2/repository/index."""

    ready: bool = False


class LoadRequest(msgspec.Struct):
    """Body of POST v2/repository/models/{model}/load and /unload."""

    parameters: dict[str, str | int | float | bool] = {}


class OipRoutes:
    """The routes of the protocol under /v2, and what they tell, as plain values (gRPC answers with the same).

    fixed: path -> Route. `resolve(path)` gives the Route of a path that names a model, None where there is nothing. A
    model named "stats" is reached by its version only: v2/models/stats are the statistics of all, as in Triton.
    not_ready: why the server is not ready, or None.
    """

    def __init__(
        self,
        repository: Any,
        *,
        not_ready: Callable[[], str | None] = lambda: None,
        tracing: Tracing | None = None,
        log: ServerLog | None = None,
        instances: int = 1,
    ) -> None:
        self.repository = repository
        self.not_ready = not_ready
        self.tracing = Tracing() if tracing is None else tracing
        self.log = ServerLog() if log is None else log
        self.instances = instances
        self._counts: dict[str, Route] = {}
        self.fixed: dict[str, Route] = {}
        fixed: tuple[tuple[str, tuple[str, ...], Callable[[bytes], Any]], ...] = (
            ("/v2", READ, lambda body: self.server_metadata()),
            ("/v2/", READ, lambda body: self.server_metadata()),
            ("/v2/health/live", READ, lambda body: {"live": True, "ready": self.not_ready() is None}),
            ("/v2/health/ready", READ, lambda body: self._ready()),
            ("/v2/models", READ, lambda body: {"models": self.names()}),
            ("/v2/models/stats", READ, lambda body: self.statistics()),
            ("/v2/repository/index", WRITE, lambda body: self.repository.index(_read(body, IndexRequest).ready)),
            ("/v2/trace/setting", BOTH, self._trace_setting),
            ("/v2/logging", BOTH, self._logging),
        )
        for path, methods, answer in fixed:
            self.fixed[path] = self._route(path.strip("/"), methods, answer)
        for kind in ("systemsharedmemory", "cudasharedmemory"):
            self.fixed[f"/v2/{kind}/status"] = self._route(f"v2/{kind}/status", READ, lambda body: [])
            self.fixed[f"/v2/{kind}/unregister"] = self._route(f"v2/{kind}/unregister", WRITE, lambda body: {})

    def resolve(self, path: str) -> Route | None:
        """The Route of a path that names a model or a region. Names are those of the folder, decoded from percents."""
        version = ""
        match path.split("/"):
            case ["", "v2", "models", name, "versions", version, *rest] if version:
                pass
            case ["", "v2", "models", name, *rest]:
                pass
            case ["", "v2", "repository", "models", name, "load" | "unload" as verb] if name:
                change = self._load if verb == "load" else self._unload
                label = f"v2/repository/{verb}"
                return Route(
                    label, "async", WRITE, handler=_changes(change, name), errors="oip", counts=self._count(label)
                )
            case ["", "v2", "systemsharedmemory" | "cudasharedmemory" as kind, "region", region, verb] if region:
                return self._region(kind, region, verb)
            case _:
                return None
        if self.repository.table.target(name) is None:
            return None
        what = "/".join(rest) if rest != [""] else "/"
        if what == "infer":
            target = self.repository.table.target(name, version)
            if target is None:
                return None
            label = f"infer/{name}"
            return Route(label, "infer", WRITE, target=target, errors="oip", counts=self._count(label))
        if what == "trace/setting" and not version:
            return self._route("v2/models/trace", BOTH, lambda body: self._trace_setting(body, name))
        answers: dict[str, Callable[[str, str], Any]] = {
            "": self.model_metadata,
            "ready": self.model_ready,
            "config": self.model_config,
            "stats": self.statistics,
        }
        answer = answers.get(what)
        if answer is None:
            return None
        return self._route("/".join(["v2/model", *rest]), READ, lambda body: answer(name, version))

    def not_found(self, path: str) -> str:
        """What a 404 says about a path under /v2."""
        match path.split("/"):
            case ["", "v2", "models", name, *rest] if name:
                version = rest[1] if len(rest) > 1 and rest[0] == "versions" else ""
                return self._unknown(name, version) or f"path: nothing is served at {path[:100]!r}"
        return f"path: nothing is served at {path[:100]!r}"

    # What the protocol tells, as plain values. An unknown name raises RequestError 404, a model not loaded 503.

    def server_metadata(self) -> dict[str, Any]:
        extensions = [*EXTENSIONS, *(["trace"] if self.tracing.file is not None else [])]
        return {"name": "penstock", "version": __version__, "extensions": extensions}

    def names(self) -> list[str]:
        """Names of the models that are loaded, sorted."""
        return sorted({row["name"] for row in self.repository.index(True)})

    def model(self, name: str, version: str = "") -> Any:
        """The ServedModel."""
        model = self.repository.model(name, version)
        if model is not None:
            return model
        wanted = f"model {name[:100]!r}" + (f", version {version[:40]!r}," if version else "")
        for row in self.repository.index():
            if row["name"] == name and version in ("", row.get("version", "")):
                why = f"; it is {row['state']} {row.get('reason', '')}".rstrip()
                raise RequestError(503, "not_loaded", f"{wanted} is not loaded{why}")
        raise RequestError(404, "not_found", self._unknown(name, version) or f"{wanted} is not here")

    def model_metadata(self, name: str, version: str = "") -> dict[str, Any]:
        model = self.model(name, version)
        return {
            "name": name,
            "versions": self.repository.versions(name),
            "platform": model.platform,
            "inputs": [_tensor(port) for port in model.inputs],
            "outputs": [_tensor(port) for port in model.outputs],
        }

    def model_ready(self, name: str, version: str = "") -> dict[str, Any]:
        self.model(name, version)
        return {"name": name, "ready": True}

    def model_config(self, name: str, version: str = "") -> dict[str, Any]:
        """Triton's ModelConfig."""
        model = self.model(name, version)
        target = self.repository.table.target(name, version)
        lane = None if target is None else target.lane
        return model_config(model, lane, self.repository.version_policy(name), self.instances)

    def statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """Triton's cumulative counters: of one version, of a model's loaded versions, or of everything loaded."""
        if version:
            return {"model_stats": [self.model(name, version).stats()]}
        if name:
            self.model(name)
        found = (
            self.repository.model(row["name"], row.get("version", ""))
            for row in self.repository.index(True)
            if name in ("", row["name"])
        )
        return {"model_stats": [model.stats() for model in found if model is not None]}

    # Handlers.

    def _ready(self) -> dict[str, Any]:
        why = self.not_ready()
        if why is not None:
            raise RequestError(503, "not_ready", why)
        return {"live": True, "ready": True}

    def _trace_setting(self, body: bytes, name: str = "") -> dict[str, Any]:
        if name:
            self.model(name)
        return self.tracing.update(_settings(body), name) if body else self.tracing.settings(name)

    def _logging(self, body: bytes) -> dict[str, Any]:
        return self.log.update(_settings(body)) if body else self.log.settings()

    def _region(self, kind: str, region: str, verb: str) -> Route | None:
        """Shared memory of a client is not read: there is never a region, so only its end can be agreed to."""

        def refuse(body: bytes) -> Any:
            if verb == "status":
                raise RequestError(404, "not_found", f"region {region[:100]!r}: none is registered")
            raise RequestError(501, "unsupported", "shared memory is not supported; send tensors in the body")

        if verb == "unregister":
            return self._route(f"v2/{kind}/unregister", WRITE, lambda body: {})
        if verb in ("status", "register"):
            return self._route(f"v2/{kind}/{verb}", READ if verb == "status" else WRITE, refuse)
        return None

    def _may_change(self) -> None:
        if self.repository.control == "none":
            text = (
                "models are neither loaded nor unloaded here; start the server with --models-control explicit or poll"
            )
            raise RequestError(501, "unsupported", text)

    async def _load(self, name: str, parameters: dict[str, Any]) -> None:
        config, files = parameters.get("config"), {}
        for key, value in parameters.items():
            if key.startswith("file:"):
                try:
                    files[key.removeprefix("file:")] = base64.b64decode(value, validate=True)
                except (TypeError, binascii.Error, ValueError):
                    raise RequestError(400, "bad_request", f"parameters.{key[:100]}: expected base64 text") from None
        if config is not None and not isinstance(config, str):
            raise RequestError(400, "bad_request", "parameters.config: expected a model configuration as JSON text")
        if files and config is None:
            raise RequestError(400, "bad_request", "parameters: 'file:' needs 'config' beside it")
        self._may_change()
        await self.repository.load(name, config, files or None)
        self.log.say("info", f"model {name} is loaded")

    async def _unload(self, name: str, parameters: dict[str, Any]) -> None:
        if not isinstance(parameters.get("unload_dependents", False), bool):
            raise RequestError(400, "bad_request", "parameters.unload_dependents: expected true or false")
        self._may_change()
        await self.repository.unload(name)
        self.log.say("info", f"model {name} is unloaded")

    # What is there.

    def _route(self, label: str, methods: tuple[str, ...], answer: Callable[[bytes], Any]) -> Route:
        """A Route whose handler gives a plain value; a query is ignored, as Triton does."""

        def handler(query: str, body: bytes) -> Answer:
            try:
                return 200, JSON, msgspec.json.encode(answer(body))
            except SettingError as error:
                raise RequestError(501 if error.unsupported else 400, "bad_setting", str(error)) from None

        return Route(label, "handler", methods, handler=handler, errors="oip", counts=self._count(label))

    def _count(self, label: str) -> Route:
        """The Route that counts for every path with this label, so that the metrics hold one row of each."""
        return self._counts.setdefault(label, Route(label, "handler", (), errors="oip"))

    def _unknown(self, name: str, version: str = "") -> str:
        """Why there is no such model or version; "" when there is."""
        rows = self.repository.index()
        versions = [row.get("version", "") for row in rows if row["name"] == name]
        if not versions:
            names = sorted({row["name"] for row in rows})
            there = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "") or "none"
            return f"no model {name[:100]!r}; have {there}"
        if version and version not in versions:
            return f"model {name} has no version {version[:40]!r}; have {', '.join(filter(None, versions)) or 'none'}"
        return ""


def model_config(model: Any, lane: Any, version_policy: dict[str, Any], instances: int = 1) -> dict[str, Any]:
    """Triton's ModelConfig of a ServedModel: dims are without the batch dimension, where the model has one."""
    ports = [*model.inputs, *model.outputs]
    batched = model.batched and all(port.shape[:1] == (-1,) for port in ports)
    queue: dict[str, Any] = {"timeout_action": "REJECT", "allow_timeout_override": True}
    rows = 0
    if lane is not None:
        rows = min(int(lane.max_rows), 2**31 - 1)
        queue["default_timeout_microseconds"] = lane.default_timeout // 1000
        queue["max_queue_size"] = rows
    config: dict[str, Any] = {
        "name": model.name,
        "platform": model.platform,
        "backend": model.platform.partition("_")[0],
        "version_policy": version_policy,
        "max_batch_size": (rows or 1) if batched else 0,
        "input": [_dims(port, batched) for port in model.inputs],
        "output": [_dims(port, batched) for port in model.outputs],
        "instance_group": [{"name": model.name, "kind": "KIND_CPU", "count": instances}],
    }
    if batched:
        config["dynamic_batching"] = {"max_queue_delay_microseconds": 0, "default_queue_policy": queue}
    return config


def _tensor(port: Any) -> dict[str, Any]:
    return {"name": port.name, "datatype": port.datatype, "shape": list(port.shape)}


def _dims(port: Any, batched: bool) -> dict[str, Any]:
    kind = "TYPE_STRING" if port.datatype == "BYTES" else f"TYPE_{port.datatype}"
    return {"name": port.name, "data_type": kind, "dims": list(port.shape[1:] if batched else port.shape)}


def _changes(change: Callable[[str, dict[str, Any]], Any], name: str) -> Callable[[str, bytes], Any]:
    """The handler of a load or unload. As Triton answers, and KServe's server does not: an empty object."""

    async def handler(query: str, body: bytes) -> Answer:
        parameters = _read(body, LoadRequest).parameters
        try:
            await change(name, parameters)
        except UnknownModel as error:
            raise RequestError(404, "not_found", str(error)) from None
        except ModelError as error:
            raise RequestError(400, "bad_model", str(error)) from None
        except PenstockError as error:
            raise RequestError(503, "unavailable", str(error)) from None
        return 200, JSON, b"{}"

    return handler


def _read(body: bytes, kind: Any) -> Any:
    """The body as this struct; nothing is an empty object. Raises RequestError 400."""
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise RequestError(400, "bad_request", f"body: {error}") from None


def _settings(body: bytes) -> dict[str, Any]:
    settings: dict[str, Any] = _read(body, dict[str, str | int | float | bool | list[str] | None])
    return settings
