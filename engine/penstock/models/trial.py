"""The trial of an ONNX file (control path): its session is made and run in a process that may die of it.

ONNX Runtime ends the process on some files, never comes back from others, and takes what memory a graph asks for. What
must stay true: no process that serves makes a session of a file that has not passed; what the trial may take is bounded
in time and memory; and a file that failed is known by its digest, so that this process does not try it again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from .folder import ModelError

__all__ = ["REFUSED", "Trial", "main", "remember", "try_file"]

SECONDS, BYTES_A_SECOND = 2, 4 << 20  # of CPU: for any file, and how much of a file is worth another second
PATIENCE = 10  # times the CPU time, until the trial of a file that waits for something is ended
ROOM, FACTOR = 2 << 30, 8  # bytes of memory beyond what the process has: for any file, and per byte of it
MOST_REFUSED = 1000
NICE = 10
_PR_SET_PDEATHSIG = 1
# What a row is filled with; zeros come first, and must give scores.
_ROWS = (0.0, float("nan"), 1e30, -1e30, 2147483647.0, 1.0)

REFUSED: dict[str, str] = {}  # Trial.key -> why, of this process


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """What is tried. path or data: the graph; size: its bytes, external tensors counted; inputs, output, folder: as
    OnnxSource; whole: all outputs, as ServedModel runs it; sha256: of the file."""

    name: str
    file: str  # as errors call it
    sha256: str
    size: int
    path: str | None = None
    given: int = -1  # descriptor of the data
    inputs: list[str] | None = None
    output: str | None = None
    shown: str | None = None
    folder: str | None = None
    whole: bool = False

    @property
    def key(self) -> str:
        return f"{self.sha256} {'whole' if self.whole else self.shown or self.output or ''}"


def remember(key: str, why: str) -> None:
    if len(REFUSED) >= MOST_REFUSED:
        REFUSED.clear()
    REFUSED[key] = why


def try_file(
    trial: Trial,
    data: Any = None,
    *,
    fork: bool = False,
    patience: float | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Raises ModelError where the process that tried the file died of it, and for what ONNX Runtime says against it.

    data: of the graph, where path is None. fork: the caller has one thread, and its child is that of a fork; else a new
    interpreter is started. patience: seconds after which it is given up, and not held against the file. stop: ends it.
    """
    why = REFUSED.get(trial.key)
    if why is None:
        seconds = SECONDS + trial.size // BYTES_A_SECOND
        longest = float(PATIENCE * (seconds + 1))
        until = time.monotonic() + min(longest, patience or longest)
        try:
            text, status = _forked(trial, data, seconds, until) if fork else _started(trial, data, seconds, until, stop)
        except OSError as error:
            raise ModelError(
                f"model {trial.name}: {trial.file}: no process can be started to try it: {error.strerror}"
            ) from None
        if text == "ok":
            return
        if text and not text.startswith("memory:"):
            raise ModelError(text)
        if stop is not None and stop.is_set():
            raise ModelError(f"model {trial.name}: {trial.file}: its trial was ended with the server")
        if text is None and patience is not None and patience < longest:
            raise ModelError(
                f"model {trial.name}: {trial.file}: its trial is not over after {patience:g} s; tried again"
            )
        if text == "" and status == -signal.SIGKILL:  # not by us: no fault that is known to be the file's
            raise ModelError(
                f"model {trial.name}: {trial.file}: the process that tried it was killed; is memory short?"
            )
        why = _why(text, status, seconds, ROOM + FACTOR * trial.size)
        remember(trial.key, why)
    raise ModelError(
        f"model {trial.name}: {trial.file}: {why}, when it was tried on single rows in a process of its own; this file "
        "is not tried again until the server starts anew: mend its graph, and give it as a new file"
    )


def _why(text: str | None, status: int, seconds: int, room: int) -> str:
    if text is None:
        return f"it took longer than {PATIENCE * (seconds + 1)} s"
    if text:
        return f"it needs more than {room >> 20} MB of memory ({text.removeprefix('memory:').strip()[:200]})"
    if status == -signal.SIGXCPU:
        return f"it took longer than {seconds} s of CPU time"
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        return f"ONNX Runtime ended the process ({name})"
    return f"the process ended with status {status}"


def _forked(trial: Trial, data: Any, seconds: int, until: float) -> tuple[str | None, int]:
    import penstock._ext.infer
    import penstock._ext.onnx  # noqa: F401  once here, not once in every child

    mine, its = os.pipe()
    me = os.getpid()
    pid = os.fork()
    if not pid:
        try:
            os.close(mine)
            with open(os.devnull, "r+b") as nothing:
                for descriptor in (0, 1, 2):
                    os.dup2(nothing.fileno(), descriptor)
            _run(trial, data, its, me, seconds)
        finally:
            os._exit(70)
    os.close(its)
    try:
        text = _wait(mine, until, os.getppid(), None)
        if text is None:
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(mine)
        _, status = os.waitpid(pid, 0)
    return text, os.waitstatus_to_exitcode(status)


def _started(
    trial: Trial, data: Any, seconds: int, until: float, stop: threading.Event | None
) -> tuple[str | None, int]:
    from .loader import _memory, _write

    given = -1
    mine, its = os.pipe()
    try:
        if data is not None:
            given = _memory("penstock-trial")
            _write(given, data)
            trial = msgspec.structs.replace(trial, given=given)
        source = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.Popen(
            [sys.executable, "-m", "penstock.models.trial", str(its), str(os.getpid()), str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[its] if given < 0 else [its, given],
            process_group=0,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        os.close(its)
        its = -1
        try:
            with contextlib.suppress(BrokenPipeError):
                if process.stdin is not None:
                    process.stdin.write(msgspec.json.encode(trial))
                    process.stdin.close()
            text = _wait(mine, until, None, stop)
        finally:
            if process.poll() is None:
                process.kill()
            status = process.wait()
    finally:
        for descriptor in (mine, its, given):
            if descriptor >= 0:
                os.close(descriptor)
    return text, status


def _wait(pipe: int, until: float, parent: int | None, stop: threading.Event | None) -> str | None:
    """What the child says; '' where it died, None where it says nothing for too long, our own parent is gone, or stop
    is set."""
    said = b""
    while True:
        left = until - time.monotonic()
        if left <= 0 or (parent is not None and os.getppid() != parent) or (stop is not None and stop.is_set()):
            return None
        if select.select([pipe], [], [], min(left, 0.2))[0]:
            piece = os.read(pipe, 1 << 16)
            if not piece:
                return said.decode(errors="replace")
            said += piece


# the child's side


def _run(trial: Trial, data: bytes | None, pipe: int, parent: int, seconds: int) -> None:
    """Try the file within limits, say how it went, and end."""
    _limit(trial, parent, seconds)
    try:
        text = _attempt(trial, data)
    except MemoryError as error:
        text = f"memory: {error or 'memory is short'}"
    except Exception as error:  # what ONNX Runtime says, or how the model does not fit
        text = str(error) or type(error).__name__
        if "bad_alloc" in text or "Failed to allocate" in text or "out of memory" in text:
            text = f"memory: {text}"
        elif not text.startswith("model "):
            text = f"model {trial.name}: {text}"
    os.write(pipe, text.encode()[:4000])
    os._exit(0)


def _limit(trial: Trial, parent: int, seconds: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(71)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = int(time.process_time()) + 1  # since the process began
    _lower(resource.RLIMIT_CPU, used + seconds, used + seconds + 5)
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    room = mapped + ROOM + FACTOR * trial.size
    _lower(resource.RLIMIT_AS, room, room)


def _lower(what: int, soft: int, hard: int) -> None:
    most = resource.getrlimit(what)[1]
    if most != resource.RLIM_INFINITY:
        soft, hard = min(soft, most), min(hard, most)
    resource.setrlimit(what, (soft, hard))


def _attempt(trial: Trial, data: bytes | None) -> str:
    if trial.whole:
        from .._ext.infer import ServedModel

        served = ServedModel(trial.name, "", None, path=trial.path, data=data, folder=trial.folder)
        for value in _ROWS:
            _infer(served, value, value == 0.0)
        return "ok"
    import numpy as np

    from .onnx_runtime import OnnxRuntime, OnnxSource

    source = OnnxSource(trial.path if data is None else data, trial.output, trial.shown, trial.folder)
    runtime = OnnxRuntime.compiled(source, trial.inputs, trial.name)
    for value in _ROWS[1:]:
        with contextlib.suppress(RuntimeError):  # a row may be refused
            runtime.predict(np.full((1, runtime.n_inputs), value))
    return "ok"


def _infer(served: Any, value: float, zeros: bool) -> None:
    """One row of a value, in every input, as far as its type has it."""
    import numpy as np

    from .._ext.infer import InferError

    names = {"FP32": "f4", "FP64": "f8", "FP16": "f2", "INT8": "i1", "INT16": "i2", "INT32": "i4", "INT64": "i8"}
    names |= {"UINT8": "u1", "UINT16": "u2", "UINT32": "u4", "UINT64": "u8", "BOOL": "?"}
    inputs = []
    for port in served.inputs:
        shape = [1 if d < 0 else d for d in port.shape]
        count = int(np.prod(shape, dtype=object)) if shape else 1
        if count > 1 << 26:
            return  # as ServedModel.warm()
        if port.datatype == "BYTES":
            text = b"" if zeros else b"9" * 100
            content = (len(text).to_bytes(4, "little") + text) * count
        elif port.datatype in names:
            kind = np.dtype(names[port.datatype])
            number: Any = value
            if kind.kind in "iu":
                most = np.iinfo(kind)
                number = 0 if value != value else int(min(max(value, int(most.min)), int(most.max)))
            elif kind.kind == "b":
                number = value == 1.0
            with np.errstate(all="ignore"):
                content = np.full(count, number, kind).tobytes()
        else:
            content = bytes(2 * count)  # BF16
        inputs.append((port.name, port.datatype, shape, content))
    try:
        served.infer(inputs)
    except InferError as error:
        if zeros and ("alloc" in str(error)):
            raise MemoryError(str(error)) from None


def main() -> int:
    """Run as `python -m penstock.models.trial PIPE PARENT SECONDS`, a Trial on standard input."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
    pipe, parent, seconds = (int(word) for word in sys.argv[1:4])
    trial = msgspec.json.decode(sys.stdin.buffer.read(), type=Trial)
    data = None
    if trial.given >= 0:
        with open(trial.given, "rb") as file:
            file.seek(0)
            data = file.read()
    _run(trial, data, pipe, parent, seconds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
