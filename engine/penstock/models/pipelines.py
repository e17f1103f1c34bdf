"""Models of an app's pipelines, kept up to date with the folder (control path).

A pipeline names `model@version` or `model@alias`. When the alias comes to mean another version, or a version's file is
replaced, every pipeline that names it runs the new file from one event on. What must stay true: a model whose inputs or
outputs do not fit is refused and the old one stays; and old models are handed out to be dropped off the loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import PenstockError
from .folder import ModelError
from .loader import FoundModel, FoundVersion, Loader, build

if TYPE_CHECKING:
    from ..engine import Engine

__all__ = ["PipelineChange", "PipelineModels"]

SPARE_WAIT = 2.0  # seconds at the most until the log has a file ready for its next segment


class PipelineChange(NamedTuple):
    """A file that a reference of the app means now, and the keys under which the engine has loaded the reference."""

    ref: str
    keys: list[tuple[Any, ...]]
    name: str
    found: FoundVersion


class PipelineModels:
    """The models that an engine's pipelines run."""

    def __init__(self, engine: Engine, loader: Loader) -> None:
        self.engine = engine
        self.loader = loader
        self.warnings: list[str] = []  # of files that were loaded, until the repository has said them

    def changes(self, found: FoundModel) -> list[PipelineChange]:
        """References of the app that mean another file of this model than they run. Raises ModelError for an alias
        that means nothing."""
        known = {version.version: version for version in found.versions}
        changed: dict[str, PipelineChange] = {}
        for key, (_, name, version, sha256) in self.engine.loaded_models.items():
            if name != found.name:
                continue
            wanted = key[0].partition("@")[2]
            means = wanted if wanted in known else found.aliases.get(wanted)
            if means is None and found.problem:
                continue  # aliases.json is damaged, which is said elsewhere
            if means is None or means not in known:
                there = ", ".join(known) or "none"
                raise ModelError(
                    f"model {key[0]}: {wanted} means {means or 'nothing'} now, and versions are {there}; "
                    f"the pipelines keep {name}@{version}"
                )
            now = known[means]
            if now.moving or (means == version and (not now.sha256 or now.sha256 == sha256)):
                continue
            if now.problem:
                raise ModelError(f"{now.problem}; the pipelines keep {name}@{version}")
            change = changed.setdefault(key[0], PipelineChange(key[0], [], name, now))
            change.keys.append(key)
        return list(changed.values())

    def prepare(self, change: PipelineChange) -> dict[tuple[Any, ...], tuple[Any, str, str, str]]:
        """The change's runtimes, as Engine.swap_models() takes them; in the worker's thread. Raises ModelError."""
        runtimes = {}
        ref = f"{change.name}@{change.found.version}"
        for key in change.keys:
            try:
                compiled, memory = self.loader.compile(change.found.path, ref, key[1])
                time.sleep(0)
                if compiled.warning:
                    self.warnings.append(f"model {ref}: {compiled.path}: {compiled.warning}")
                runtime = build(compiled, memory, ref)
                time.sleep(0)
                runtime.warm()
            except ModelError:
                raise
            except Exception as error:  # a model that cannot be run
                raise ModelError(f"model {ref}: {error}") from None
            runtimes[key] = (runtime, change.name, change.found.version, compiled.sha256)
        return runtimes

    async def ready(self) -> None:
        """Until a log can begin the segment that a swap asks for without waiting for its file, or for a while."""
        log = self.engine.core.log
        until = time.monotonic() + SPARE_WAIT
        while log is not None and not log.has_spare and time.monotonic() < until:
            await asyncio.sleep(0.01)

    def swap(
        self, runtimes: Mapping[tuple[Any, ...], tuple[Any, str, str, str]], deployment: int
    ) -> tuple[list[Any], int]:
        """Run them from the next event on. Returns what held the old ones, and its bytes. Raises ModelError."""
        loaded = self.engine.loaded_models
        before = [loaded[key][0] for key in runtimes]
        try:
            old = self.engine.swap_models(runtimes, deployment)
        except PenstockError as error:
            names = ", ".join(sorted({f"{name}@{version}" for _, name, version, _ in runtimes.values()}))
            raise ModelError(f"model {names} does not fit the pipelines, which keep what they run: {error}") from None
        size = sum(int(getattr(getattr(runtime, "model", None), "nbytes", 0) or 0) for runtime in before)
        return [old, before], size
