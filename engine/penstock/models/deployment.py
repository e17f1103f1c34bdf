"""What is served under which name (control path; the requests' path only reads Target.model).

A Target is what clients name: a model, or one version of it. It stays the same object as long as the process lives, so
whoever has looked it up keeps it; assigning its `model` is the swap. What must stay true: all on the loop's thread, so
that a request sees the old model or the new one; and who takes a model out of the table hands it to the worker, which
lets go of it last and off the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .folder import version_key

if TYPE_CHECKING:
    from .._ext.infer import ServedModel, Target

__all__ = ["Deployment", "Worker"]

TRIM_BYTES = 32 << 20  # freed since the last trim
UNKNOWN_ROW_NS = 2_000_000
LOOK_EVERY = 0.02  # seconds between two looks whether a retired model is in use


class Deployment:
    """The table of what is served. `version` counts swaps."""

    def __init__(self, lane: Callable[[str], Any] | None = None) -> None:
        self.version = 0
        self._lane = lane
        self._targets: dict[str, dict[str, Target]] = {}

    def target(self, name: str, version: str = "") -> Target | None:
        """The target of a model (its newest version), or of one version; None where there never was one."""
        targets = self._targets.get(name)
        return None if targets is None else targets.get(version)

    def targets(self) -> list[Target]:
        """Every version's target, whether a model stands under it or not."""
        return [target for targets in self._targets.values() for version, target in targets.items() if version]

    def models(self, name: str) -> dict[str, ServedModel]:
        """Version -> model, of what is served now, oldest version first."""
        targets = self._targets.get(name, {})
        found = {version: target.model for version, target in targets.items() if version and target.model is not None}
        return {version: found[version] for version in sorted(found, key=version_key)}

    def add(self, name: str, versions: Iterable[str]) -> None:
        """Targets for a model and versions of it, before anything is loaded under them."""
        from .._ext.infer import Target

        targets = self._targets.setdefault(name, {})
        lane = next(iter(targets.values())).lane if targets else None
        if not targets and self._lane is not None:
            lane = self._lane(name)
        for version in ["", *versions]:
            if version not in targets:
                targets[version] = Target(name, version, lane)

    def put(self, name: str, models: Mapping[str, ServedModel]) -> list[ServedModel]:
        """Serve these versions of a model and no others, the newest without a version too. Returns what is out."""
        self.add(name, models)
        targets = self._targets[name]
        newest = models[max(models, key=version_key)] if models else None
        out = []
        changed = False
        for version, target in targets.items():
            model = models.get(version) if version else newest
            old = target.model
            if old is not model:
                changed = True
                target.model = model
                if version and old is not None:
                    out.append(old)
        if changed:
            self.version += 1
            if newest is not None and targets[""].lane is not None:
                # One that could not be warmed is taken to be slow until it was seen: the pool runs it first.
                targets[""].lane.seed(newest.row_ns or UNKNOWN_ROW_NS)
        return out


class Worker:
    """One thread for what would hold up the loop: waiting for the loader, building, freeing.

    It has the loop's own priority, or the loop would wait for a GIL whose holder gives way to other processes; what is
    long runs in threads of less.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Callable[[Any, BaseException | None], None]] | None] = (
            queue.SimpleQueue()
        )
        self._retired: list[Any] = []
        self._retiring: queue.SimpleQueue[tuple[Any, int]] = queue.SimpleQueue()
        self._bytes: list[int] = []
        self._thread: threading.Thread | None = None
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._untrimmed = 0
        self._closed = False
        self.freed = 0  # models let go

    def run(self, loop: asyncio.AbstractEventLoop, job: Callable[[], Any]) -> asyncio.Future[Any]:
        """The job's result, on the loop; jobs run one after the other."""
        future: asyncio.Future[Any] = loop.create_future()
        if self._closed:
            raise RuntimeError("the repository is closed")

        def done(result: Any, error: BaseException | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(_settle, future, result, error)

        self._start()
        self._jobs.put((job, done))
        return future

    def retire(self, thing: Any, nbytes: int = 0) -> None:
        """Let go of a model when nobody else holds it, in this thread. The caller drops its own reference."""
        self._retiring.put((thing, nbytes))
        if not self._closed:
            self._start()
            self._jobs.put((_nothing, _ignore))

    def close(self) -> None:
        """Finish what is queued and end the thread; waits for it."""
        self._closed = True
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="penstock-models", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=LOOK_EVERY if self._retired else None)
            except queue.Empty:
                self._bury()
                continue
            if job is None:
                return
            work, done = job
            job = None
            result, error = None, None
            try:
                result = work()
            except BaseException as caught:
                error = caught.with_traceback(None)
            done(result, error)
            del work, done, result, error
            self._bury()

    def _bury(self) -> None:
        """Drop the retired models that nothing else refers to."""
        with contextlib.suppress(queue.Empty):
            while True:
                thing, nbytes = self._retiring.get_nowait()
                self._retired.append(thing)
                self._bytes.append(nbytes)
                del thing
        i = 0
        while i < len(self._retired):
            # The list's own reference, and the call's.
            if sys.getrefcount(self._retired[i]) > 2:
                i += 1
                continue
            del self._retired[i]
            self._untrimmed += self._bytes.pop(i)
            self.freed += 1
        if self._untrimmed >= TRIM_BYTES and self._trim is not None:
            self._untrimmed = 0
            self._trim(0)


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():  # cancelled
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


def _nothing() -> None:
    return


def _ignore(result: Any, error: BaseException | None) -> None:
    return
