"""The repository (control path): a model folder as served models, kept up to date while they serve.

Every version's folder is served under its number, the newest also under no version. Finding, reading and parsing
happens in a child process (loader.py), building and freeing in a thread of low priority; the loop only swaps. What must
stay true: a load that fails changes nothing that serves, and says why in the index; loads of one model come one after
the other; and nothing is ever written into the folder.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from .deployment import Deployment, Worker
from .folder import SUFFIXES, ModelError, is_name, is_version, version_key
from .loader import Compiled, FoundModel, FoundVersion, Loader, build, nicely
from .trial import try_file

if TYPE_CHECKING:
    from .._ext.infer import ServedModel
    from ..engine import Engine
    from .pipelines import PipelineModels

__all__ = ["CONTROLS", "ModelRepository", "UnknownModel"]

CONTROLS = ("none", "explicit", "poll")
FEW = 8  # models at the start that are not worth another child
MOST_STARTERS = 4
PERIOD = 2.0  # seconds between two looks of a watch
SOON = 0.5  # seconds of a trial after which the index says that it takes long, and others do not wait for it
START_PATIENCE = 3.0  # seconds of a trial at the start, where a watch will try again
TRIALS = 2  # at a time
RETRY_FIRST, RETRY_MOST = 10.0, 640.0  # seconds until a version that failed is tried again by the watch


class UnknownModel(ModelError):
    """A model that the folder does not hold."""


class _Config(msgspec.Struct, forbid_unknown_fields=True):
    """What of Triton's model configuration can be said at a load."""

    name: str | None = None
    platform: str | None = None
    backend: str | None = None
    version_policy: dict[str, Any] | None = None


class _Version:
    """One version: what serves, what was last tried, and why that failed."""

    __slots__ = ("failed", "model", "reason", "sha256")

    def __init__(self) -> None:
        self.model: ServedModel | None = None
        self.sha256 = ""  # of what serves
        self.failed: FoundVersion | None = None  # the file that could not be loaded
        self.reason = ""


class _Model:
    """One model of the repository."""

    __slots__ = (
        "config", "given", "lock", "name", "retry_at", "retry_in", "rows", "slow", "state", "unloaded", "versions",
    )  # fmt: skip

    def __init__(self, name: str) -> None:
        self.name = name
        self.versions: dict[str, _Version] = {}
        self.lock = asyncio.Lock()
        self.state = ""  # LOADING, UNLOADING, or ''
        self.slow = ""  # why loading takes long, while it does
        self.unloaded = False  # on request: the watch leaves it alone
        self.given = False  # its files came with the load
        self.config = _Config()
        self.retry_at, self.retry_in = 0.0, RETRY_FIRST
        self.rows: list[dict[str, str]] | None = None  # of the index, until something changes


class ModelRepository:
    """The models of one folder.

    control: "none" (what is there at the start, for good), "explicit" (`names` at the start, then load and unload),
    "poll" (everything, and what changes later: watch()). lane: called once per model for the Lane of its requests.
    engine: an app whose pipelines' models are swapped with the folder. serve: makes a ServedModel (tests).
    All methods but start() and close() belong to the loop's thread.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        control: str = "none",
        lane: Callable[[str], Any] | None = None,
        names: Iterable[str] | None = None,
        engine: Engine | None = None,
        serve: Callable[..., Any] | None = None,
    ) -> None:
        if control not in CONTROLS:
            raise ModelError(f"model control {control!r}: expected one of {', '.join(CONTROLS)}")
        self.root = str(Path(root).absolute())
        self.control = control
        self.table = Deployment(lane)
        self.loader = Loader()
        self.worker = Worker()
        self.names = None if names is None else list(names)
        self.longest_hold_ns = 0  # for which a swap held the loop
        self.warnings: list[str] = []  # what an operator should know since last asked; the newest hundred
        self.pipelines: PipelineModels | None = None
        if engine is not None:
            from .pipelines import PipelineModels

            self.pipelines = PipelineModels(engine, self.loader)
        self._serve = serve
        self._models: dict[str, _Model] = {}
        self._rows: dict[bool, list[dict[str, str]]] = {}
        self._names: list[str] | None = None
        self._closed = False
        self._trials: ThreadPoolExecutor | None = None
        self._ended = threading.Event()  # for trials that are under way
        self._tasks: set[asyncio.Task[None]] = set()  # changes that take long

    # what there is

    def index(self, ready: bool = False) -> list[dict[str, str]]:
        """A row per version: name, version, state (READY UNAVAILABLE LOADING UNLOADING), reason."""
        rows = self._rows.get(ready)
        if rows is None:
            if self._names is None:
                self._names = sorted(self._models)
            rows = []
            for name in self._names:
                model = self._models[name]
                rows += model.rows if model.rows is not None else self._rows_of(model)
            if ready:
                rows = [row for row in rows if row["state"] == "READY"]
            self._rows[ready] = rows
        return list(rows)

    def _rows_of(self, model: _Model) -> list[dict[str, str]]:
        rows = []
        for version in sorted(model.versions, key=version_key):
            entry = model.versions[version]
            if entry.model is not None:
                state = model.state if model.state == "UNLOADING" else "READY"
            else:
                state = "UNAVAILABLE" if model.slow else model.state or "UNAVAILABLE"
            reason = (
                entry.reason
                or model.slow
                or ("" if state != "UNAVAILABLE" else "unloaded" if model.unloaded else "not loaded")
            )
            rows.append({"name": model.name, "version": version, "state": state, "reason": reason})
        model.rows = rows
        return rows

    def _touch(self, model: _Model) -> None:
        """The index says something else of a model."""
        model.rows = None
        self._rows.clear()
        if self._names is not None and (len(self._names) != len(self._models) or model.name not in self._models):
            self._names = None

    def versions(self, name: str) -> list[str]:
        """Versions of a model that serve, oldest first."""
        return list(self.table.models(name))

    def model(self, name: str, version: str = "") -> ServedModel | None:
        """What serves under a name now."""
        target = self.table.target(name, version)
        return None if target is None else target.model

    def version_policy(self, name: str) -> dict[str, Any]:
        """Which versions serve, as Triton's configuration says it; what a load asked for, else all."""
        model = self._models.get(name)
        return (None if model is None else model.config.version_policy) or {"all": {}}

    # changing it

    def start(self) -> None:
        """Load what `control` says, in this thread, before anything serves. A model that fails is in the index; where
        the folder cannot be read, ModelError is raised."""
        found, _ = self.loader.scan(self.root, whole=True)
        for one in found:
            if one.problem:
                self._warn(one.problem)
        unread = {one.name: one.problem for one in found if one.unread}
        found = [one for one in found if not (one.gone or one.unread)]
        wanted = None if self.control != "explicit" else set(self.names or ())
        for missing in sorted((wanted or set()) - {model.name for model in found}):
            raise UnknownModel(unread.get(missing) or f"model {missing} is not in {self.root}; {_there_is(found)}")
        tasks: list[tuple[_Model, FoundModel, list[FoundVersion]]] = []
        for one in found:
            model = self._of(one.name)
            if wanted is not None and one.name not in wanted:
                self._note(model, one)
            else:
                tasks.append((model, one, self._wanted(model, one)))
        with _Starter(self.loader, sum(len(versions) for _, _, versions in tasks)) as starter:
            running = [
                [(v, starter.submit(self._make, model, v, None)) for v in versions] for model, _, versions in tasks
            ]
            for (model, one, _), results in zip(tasks, running):
                made: dict[str, tuple[Any, Compiled]] = {}
                problems: dict[str, tuple[FoundVersion, str]] = {}
                for version, result in results:
                    try:
                        made[version.version] = result.result()
                    except ModelError as error:
                        problems[version.version] = version, str(error)
                self._swap(model, [v.version for v in one.versions], made, problems)
        if self.pipelines is not None and self.control != "none":
            for one in found:
                self._bring_pipelines(self.pipelines, one)  # an alias may have moved since the engine was made
        self.index()  # the first takes a while

    def _bring_pipelines(self, pipelines: PipelineModels, found: FoundModel) -> None:
        """As _swap_pipelines(), before anything serves."""
        try:
            for change in pipelines.changes(found):
                self.table.version += 1
                pipelines.swap(pipelines.prepare(change), self.table.version)
                self._warn_of(pipelines)
        except ModelError as error:
            self._warn(str(error))

    async def load(self, name: str, config: str | None = None, files: Mapping[str, bytes] | None = None) -> None:
        """Load a model, or load it anew: versions whose files are the same stay as they are.

        config: JSON text, of which name, platform, backend and version_policy are understood. files: "<version>/<file>"
        -> content (with "file:" in front or not), served instead of what the folder holds.
        Raises ModelError with the versions that failed; the others serve, as does what served before.
        """
        self._may_change()
        settings = _read_config(name, config)
        given = None if not files else _read_files(name, files)
        if not is_name(name):
            raise UnknownModel(f"model {name[:100]!r}: names are letters, digits, '_', '-' and '.'")
        model = self._of(name)
        async with model.lock:
            if given is not None:
                found = FoundModel(name, given[0])
            else:
                found = await self._run(lambda: self.loader.look(self.root, name))
            if found.gone:
                if not model.versions:
                    self._models.pop(name, None)
                    self._touch(model)
                known = ", ".join(sorted(self._models)[:20])
                raise UnknownModel(f"model {name} is not in {self.root}; there are {known or 'none'}")
            self._models[name] = model
            self._touch(model)
            if config is not None:
                model.config = settings
            elif given is None:
                model.config = _Config()
            before = model.unloaded
            model.unloaded, model.given = False, given is not None
            problems = await self._bring(model, found, given[1] if given is not None else None)
            if given is None and self.pipelines is not None:
                problems += await self._swap_pipelines(found)
            if problems:
                model.unloaded = before and not self.table.models(name)
                raise ModelError("; ".join(problems))

    async def unload(self, name: str) -> None:
        """Serve a model no more. Calls in flight end as they began. Pipelines keep theirs."""
        self._may_change()
        model = self._models.get(name)
        if model is None:
            raise UnknownModel(f"model {name[:100]!r} is not here")
        async with model.lock:
            model.unloaded = True
            for entry in model.versions.values():
                entry.model, entry.sha256, entry.failed, entry.reason = None, "", None, ""
            self._put(model, {})

    async def watch(self, period: float = PERIOD) -> None:
        """Look at the folder again and again, and load, reload and unload what changed; until cancelled or closed.

        A file that changes is loaded once it has been the same for a whole period. Only with control "poll".
        """
        while not self._closed and self.control == "poll":
            await asyncio.sleep(period)
            await self.look()

    async def look(self) -> None:
        """One look at the folder, as watch() does it."""
        try:
            changed, whole = await self._run(lambda: self.loader.scan(self.root))
        except ModelError as error:
            self._warn(str(error))  # the folder is gone, or the child: what serves goes on
            return
        if whole:
            names = {one.name for one in changed}
            changed += [FoundModel(name, gone=True) for name in self._models if name not in names]
        now = time.monotonic()
        seen = {one.name for one in changed}
        for model in list(self._models.values()):
            failed = any(entry.failed is not None for entry in model.versions.values())
            busy = model.name in seen or model.unloaded or model.given or model.lock.locked()
            if failed and now >= model.retry_at and not busy:
                try:
                    changed.append(await self._run(lambda: self.loader.look(self.root, model.name)))  # noqa: B023
                except ModelError as error:
                    self._warn(str(error))
        for one in changed:
            if self._closed:
                return
            task = asyncio.create_task(self._look_at(one))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            try:
                while not task.done():
                    known = self._models.get(one.name)
                    if known is not None and known.slow:
                        break  # the next need not wait for it
                    await asyncio.wait({task}, timeout=0.1)
            except asyncio.CancelledError:
                task.cancel()
                raise

    async def _look_at(self, one: FoundModel) -> None:
        try:
            await self._changed(one)
        except Exception as error:  # a defect with one model does not end the watch of all
            if not self._closed:
                self._warn(f"model {one.name}: {type(error).__name__}: {error}")

    async def close(self) -> None:
        """End the child and the thread. What serves goes on serving."""
        self._closed = True
        self._ended.set()
        for task in list(self._tasks):
            task.cancel()
        if self._trials is not None:
            self._trials.shutdown(wait=False, cancel_futures=True)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self.loader.stop)
        await loop.run_in_executor(None, self.worker.close)

    # on the way

    def _run(self, job: Callable[[], Any]) -> asyncio.Future[Any]:
        return self.worker.run(asyncio.get_running_loop(), job)

    def _may_change(self) -> None:
        if self._closed:
            raise ModelError("the repository is closed")
        if self.control == "none":
            raise ModelError(
                'models stay as they were at the start; start with control "explicit" or "poll" to change them'
            )

    def _of(self, name: str) -> _Model:
        model = self._models.get(name)
        if model is None:
            model = self._models[name] = _Model(name)
            self._touch(model)
        return model

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings = [*self.warnings[-99:], text]

    def _warn_of(self, pipelines: PipelineModels) -> None:
        while pipelines.warnings:
            self._warn(pipelines.warnings.pop(0))

    def _note(self, model: _Model, found: FoundModel) -> None:
        """Versions of a model that is not to be loaded."""
        for one in found.versions:
            model.versions.setdefault(one.version, _Version())
        self.table.add(model.name, model.versions)
        self._touch(model)

    async def _changed(self, found: FoundModel) -> None:
        """What the watch saw of one model."""
        model = self._of(found.name)
        async with model.lock:
            if found.problem:
                self._warn(found.problem)
            if model.given or found.unread:
                pass  # what came with a load is not the folder's; what cannot be read stays as it is
            elif found.gone:
                self._swap(model, [], {}, {})
                self._models.pop(found.name, None)
                self._touch(model)
            elif not model.unloaded:
                for problem in await self._bring(model, found, None):
                    self._warn(problem)
            if self.pipelines is not None and not (found.gone or found.unread):
                for problem in await self._swap_pipelines(found):
                    self._warn(problem)

    async def _bring(self, model: _Model, found: FoundModel, content: dict[str, bytes] | None) -> list[str]:
        """Make what serves equal to what was found, as far as it loads. Returns the problems."""
        wanted = self._wanted(model, found)
        made: dict[str, tuple[Any, Compiled]] = {}
        problems: dict[str, tuple[FoundVersion, str]] = {}
        if wanted:
            model.state = "LOADING"
            for one in wanted:
                model.versions.setdefault(one.version, _Version())
            self.table.add(model.name, (one.version for one in wanted))
            self._touch(model)
        try:
            for one in wanted:
                try:
                    made[one.version] = await self._bring_one(
                        model, one, None if content is None else content[one.version]
                    )
                except ModelError as error:
                    problems[one.version] = one, str(error)
        finally:
            model.state = ""
            self._touch(model)
        self._swap(model, [one.version for one in found.versions], made, problems)
        return [text for _, text in problems.values()]

    def _wanted(self, model: _Model, found: FoundModel) -> list[FoundVersion]:
        """The versions to load: those that do not serve as they were found."""
        wanted = []
        allowed = _allowed(model.config, found)
        for one in found.versions:
            entry = model.versions.get(one.version)
            if one.moving or one.version not in allowed:
                continue
            if entry is not None and entry.model is not None and one.sha256 and entry.sha256 == one.sha256:
                entry.failed, entry.reason = None, ""
                continue
            wanted.append(one)
        return wanted

    async def _bring_one(self, model: _Model, one: FoundVersion, content: bytes | None) -> tuple[Any, Compiled]:
        """A ServedModel. While an ONNX file is on trial, the worker is free for other models."""
        compiled, memory = await self._run(lambda: self._compile(model, one, content, self.loader, untried=True))
        trial = compiled.trial
        if trial is not None:
            if self._trials is None:
                self._trials = ThreadPoolExecutor(TRIALS, thread_name_prefix="penstock-trial")
            loop = asyncio.get_running_loop()
            running = loop.run_in_executor(self._trials, lambda: try_file(trial, memory, stop=self._ended))
            try:
                if not (await asyncio.wait({running}, timeout=SOON))[0]:
                    model.slow = "its trial, a run on single rows in a process of its own, takes long"
                    self._touch(model)
                await running
            finally:
                model.slow = ""
                self._touch(model)
        return await self._run(lambda: self._open(model, one, compiled, memory)), compiled

    def _make(
        self, model: _Model, one: FoundVersion, content: bytes | None, loader: Loader | None = None
    ) -> tuple[Any, Compiled]:
        """A ServedModel, at the start, in one of several threads."""
        patience = START_PATIENCE if self.control == "poll" else None
        compiled, memory = self._compile(model, one, content, loader or self.loader, patience=patience)
        return self._open(model, one, compiled, memory), compiled

    def _compile(
        self, model: _Model, one: FoundVersion, content: bytes | None, loader: Loader, **how: Any
    ) -> tuple[Compiled, Any]:
        if one.problem:
            raise ModelError(one.problem)
        made = loader.compile(one.path, f"{model.name}@{one.version}", content=content, whole=True, **how)
        _give_way()
        return made

    def _open(self, model: _Model, one: FoundVersion, compiled: Compiled, memory: Any) -> Any:
        ref = f"{model.name}@{one.version}"
        try:
            _check_config(model.config, compiled, ref)
            served = (self._serve or _served)(model.name, one.version, compiled, memory)
        except ModelError:
            raise
        except Exception as error:  # a model that cannot be warmed, a shape that cannot be served
            text = str(error)
            raise ModelError(text if text.startswith("model ") else f"model {ref}: {text}") from None
        _give_way()
        return served

    def _swap(
        self,
        model: _Model,
        there: list[str],
        made: Mapping[str, tuple[Any, Compiled]],
        problems: Mapping[str, tuple[FoundVersion, str]],
    ) -> None:
        """Put what was made in the table; versions that are there no more, out of it."""
        began = time.perf_counter_ns()
        allowed = _allowed(model.config, FoundModel(model.name, [FoundVersion(v) for v in there]))
        for version in list(model.versions):
            if version not in there:
                del model.versions[version]
        for version in there:
            entry = model.versions.setdefault(version, _Version())
            if version in made:
                served, compiled = made[version]
                if compiled.warning:
                    self._warn(f"model {model.name}@{version}: {compiled.path}: {compiled.warning}")
                entry.model, entry.sha256, entry.failed, entry.reason = served, compiled.sha256, None, ""
            elif version in problems:
                entry.failed, entry.reason = problems[version]
            elif version not in allowed:
                entry.model, entry.sha256, entry.failed = None, "", None
                entry.reason = "left out by version_policy"
        if problems:
            model.retry_at, model.retry_in = time.monotonic() + model.retry_in, min(2 * model.retry_in, RETRY_MOST)
        else:
            model.retry_in = RETRY_FIRST
        self._put(model, {v: e.model for v, e in model.versions.items() if e.model is not None}, began)

    def _put(self, model: _Model, serving: dict[str, Any], began: int = 0) -> None:
        began = began or time.perf_counter_ns()
        self.table.add(model.name, model.versions)
        for old in self.table.put(model.name, serving):
            self.worker.retire(old, int(getattr(old, "nbytes", 0) or 0))
        self._touch(model)
        self.longest_hold_ns = max(self.longest_hold_ns, time.perf_counter_ns() - began)

    async def _swap_pipelines(self, found: FoundModel) -> list[str]:
        """Pipelines whose reference means another file now get it. Returns the problems."""
        pipelines = self.pipelines
        if pipelines is None:
            return []
        problems = []
        try:
            changes = pipelines.changes(found)
        except ModelError as error:
            return [str(error)]
        for change in changes:
            try:
                prepared = await self._run(lambda: pipelines.prepare(change))  # noqa: B023
                await pipelines.ready()
                began = time.perf_counter_ns()
                self.table.version += 1
                old, nbytes = pipelines.swap(prepared, self.table.version)
                self._warn_of(pipelines)
                self.longest_hold_ns = max(self.longest_hold_ns, time.perf_counter_ns() - began)
                self.worker.retire(old, nbytes)
                del old, prepared
            except ModelError as error:
                problems.append(str(error))
        return problems


class _Starter:
    """Several loaders at the start, while nothing serves: a thread and a child each."""

    def __init__(self, first: Loader, tasks: int) -> None:
        n = max(1, min(tasks // FEW, os.cpu_count() or 1, MOST_STARTERS))
        self._others = [Loader() for _ in range(n - 1)]
        self._free: queue.SimpleQueue[Loader] = queue.SimpleQueue()
        for loader in [first, *self._others]:
            self._free.put(loader)
        self._pool = ThreadPoolExecutor(n)

    def submit(self, make: Callable[..., Any], *given: Any) -> Future[Any]:
        def run() -> Any:
            loader = self._free.get()
            try:
                return make(*given, loader)
            finally:
                self._free.put(loader)

        return self._pool.submit(run)

    def __enter__(self) -> _Starter:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        for loader in self._others:
            loader.stop()


def _give_way() -> None:
    """Let the loop's thread have the GIL: no stretch of Python here is long."""
    time.sleep(0)


def _served(name: str, version: str, compiled: Compiled, memory: Any) -> Any:
    """A ServedModel from what the loader made."""
    from .._ext.infer import ServedModel

    if compiled.kind != "onnx_file":
        runtime = build(compiled, memory, f"{name}@{version}")
        _give_way()
        return ServedModel(name, version, runtime, path=compiled.path)
    if memory is not None:
        folder = compiled.folder
        return nicely(lambda: ServedModel(name, version, None, data=memory, folder=folder))
    _check_unchanged(compiled, f"{name}@{version}")  # what was tried is what is opened
    served = nicely(lambda: ServedModel(name, version, None, path=compiled.path))
    _check_unchanged(compiled, f"{name}@{version}")
    return served


def _check_unchanged(compiled: Compiled, ref: str) -> None:
    status = os.stat(compiled.path)
    if (status.st_mtime_ns, status.st_ino, status.st_size) != (compiled.mtime_ns, compiled.inode, compiled.size):
        raise ModelError(f"model {ref}: {compiled.path} was written while it was read; load it again")


def _there_is(found: list[FoundModel]) -> str:
    names = ", ".join(sorted(model.name for model in found)[:20])
    return f"models there are {names}" if names else "it holds no models"


def _read_config(name: str, config: str | None) -> _Config:
    """Raises ModelError for what cannot be asked for."""
    if config is None or not config.strip():
        return _Config()
    try:
        settings = msgspec.json.decode(config, type=_Config)
    except msgspec.DecodeError as error:
        raise ModelError(
            f"model {name}: config: {error}; it can hold name, platform, backend and version_policy"
        ) from None
    if settings.name not in (None, "", name):
        raise ModelError(f"model {name}: config: name: expected {name!r}, got {settings.name!r}")
    policy = settings.version_policy
    if policy is not None:
        kind = next(iter(policy), "")
        said = policy.get(kind)
        good = len(policy) == 1 and isinstance(said, dict)
        inner: dict[str, Any] = said if isinstance(said, dict) else {}
        if good and kind == "latest":
            count = inner.get("num_versions", 1)
            good = isinstance(count, int) and not isinstance(count, bool) and count >= 1
            good = good and set(inner) <= {"num_versions"}
        elif good and kind == "specific":
            chosen: Any = inner.get("versions")
            good = isinstance(chosen, list) and bool(chosen) and set(inner) <= {"versions"}
            good = good and all(isinstance(v, (int, str)) and is_version(str(v)) for v in chosen)
        else:
            good = good and kind == "all" and not inner
        if not good:
            raise ModelError(
                f"model {name}: config: version_policy: expected one of "
                '{"all": {}}, {"latest": {"num_versions": 1}}, {"specific": {"versions": [1, 3]}}'
            )
    return settings


def _check_config(config: _Config, compiled: Compiled, ref: str) -> None:
    trees = compiled.kind == "trees"
    platform = "penstock_trees" if trees else "onnxruntime_onnx"
    backend = "penstock" if trees else "onnxruntime"
    if config.platform not in (None, "", platform):
        raise ModelError(f"model {ref}: config: platform: the file is run by {platform}, not by {config.platform!r}")
    if config.backend not in (None, "", backend):
        raise ModelError(f"model {ref}: config: backend: the file is run by {backend}, not by {config.backend!r}")


def _allowed(config: _Config, found: FoundModel) -> set[str]:
    """Versions that the policy lets serve."""
    numbers = [one.version for one in found.versions]
    policy: dict[str, Any] = config.version_policy or {"all": {}}
    if "latest" in policy:
        return set(sorted(numbers, key=version_key)[-policy["latest"].get("num_versions", 1) :])
    if "specific" in policy:
        return {str(v) for v in policy["specific"]["versions"]} & set(numbers)
    return set(numbers)


def _read_files(name: str, files: Mapping[str, bytes]) -> tuple[list[FoundVersion], dict[str, bytes]]:
    """Versions out of files that came with a load. Raises ModelError for names that are none of a model's files."""
    found: list[FoundVersion] = []
    content: dict[str, bytes] = {}
    for key, data in files.items():
        version, slash, file = key.removeprefix("file:").partition("/")
        suffix = file.removeprefix("model")
        if not slash or not is_version(version) or not file.startswith("model") or suffix not in SUFFIXES:
            raise ModelError(
                f"model {name}: file {key[:100]!r}: expected a version and a file name, as 1/model.onnx; "
                f"file names are model{', model'.join(SUFFIXES)}"
            )
        if version in content:
            raise ModelError(f"model {name}: version {version} was given two files")
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise ModelError(f"model {name}: file {key[:100]!r}: expected bytes, got {type(data).__name__}")
        content[version] = bytes(data)
        found.append(FoundVersion(version, f"given/{name}/{version}/{file}", size=len(data)))
    return sorted(found, key=lambda one: version_key(one.version)), content
