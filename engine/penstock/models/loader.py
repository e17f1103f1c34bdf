"""The loader (control path): a child process that finds, reads and parses model files for a server.

Parsing is slow Python, and one busy Python thread makes an event loop wake late by milliseconds; so the serving process
does none of it. The child hands back what it made in memory that both have mapped: of trees the flat arrays
(ext/tree_form.h), from which the kernel's tables are built with the GIL released; of other ONNX files their bytes, once
a child of its own has run them (trial.py). What must stay true: whatever a file holds, whoever kills the child, the
answer is a model or a ModelError; and the child ends with its parent.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ..children import parent_lives
from .folder import SUFFIXES, ModelError, aliases, is_name, model_file, versions
from .runtime import Runtime
from .tree_ensemble import TreePorts
from .trial import REFUSED, Trial, remember, try_file

__all__ = ["Compiled", "FoundModel", "FoundVersion", "Loader", "build", "main", "nicely"]

LOOK_EVERY = 2.0  # seconds between two looks whether the parent lives
NICE = 10  # of the child, and of threads that build; a thread that holds the GIL does not give way
_LENGTH = 4
_MOST = 1 << 30  # bytes of a message


class FoundVersion(msgspec.Struct, frozen=True):
    """A version in the folder: its file as it was seen, or why it has none. moving: it changed since the last look."""

    version: str
    path: str = ""
    size: int = 0
    mtime_ns: int = 0
    inode: int = 0
    sha256: str = ""
    problem: str = ""
    moving: bool = False


class FoundModel(msgspec.Struct, frozen=True):
    """A model in the folder. gone: it is not there, or has no version any more. unread: it could not be looked at, and
    what was known of it holds."""

    name: str
    versions: list[FoundVersion] = []
    aliases: dict[str, str] = {}
    problem: str = ""
    gone: bool = False
    unread: bool = False


class Compiled(msgspec.Struct, frozen=True, kw_only=True):
    """A file that was read, and what its memory holds. kind: trees | onnx | onnx_file (an ONNX file as it is).

    inputs: names in the order of the columns, or None; ports: of trees, as tree_ports() gives them; output, shown,
    folder: as OnnxSource. trial: of a file that is still to be tried. warning: what whoever loads it should know.
    """

    kind: str
    path: str
    sha256: str
    size: int
    mtime_ns: int = 0
    inode: int = 0
    inputs: list[str] | None = None
    ports: TreePorts | None = None
    output: str | None = None
    shown: str | None = None
    folder: str | None = None
    trial: Trial | None = None
    warning: str = ""


class Look(msgspec.Struct, frozen=True, kw_only=True, tag="look"):
    """One model of the folder as it is now."""

    root: str
    name: str


class Scan(msgspec.Struct, frozen=True, kw_only=True, tag="scan"):
    """What changed in the folder since the last scan; all of it where `whole`, or where this is a new child's first."""

    root: str
    whole: bool = False


class Compile(msgspec.Struct, frozen=True, kw_only=True, tag="compile"):
    """Read a file and compile it. given: the bytes come with the message, the path only names them. whole: an ONNX file
    that holds no trees stays as it is, with all its outputs. untried: the caller will try it.
    patience: as try_file(). refused: what trial.REFUSED holds."""

    path: str
    name: str
    inputs: list[str] | None = None
    output: str | None = None
    given: bool = False
    whole: bool = False
    untried: bool = False
    patience: float | None = None
    refused: dict[str, str] = {}


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the child answers; error: the text of a ModelError; refused: what trial.REFUSED holds."""

    error: str = ""
    refused: dict[str, str] = {}
    compiled: Compiled | None = None
    found: list[FoundModel] = []
    whole: bool = False


Request = Look | Scan | Compile
_encode = msgspec.msgpack.encode
_answers = msgspec.msgpack.Decoder(Answer)
_requests = msgspec.msgpack.Decoder(Request)


# messages: a length, then MessagePack; a descriptor may come with the length


def _send(channel: socket.socket, message: bytes, descriptor: int = -1) -> None:
    whole = len(message).to_bytes(_LENGTH, "little") + message
    sent = socket.send_fds(channel, [whole], [descriptor]) if descriptor >= 0 else 0
    channel.sendall(whole[sent:])


def _receive(channel: socket.socket) -> tuple[bytes, int]:
    """The next message and its descriptor or -1. Raises EOFError where the other side has ended."""
    head, descriptors, _, _ = socket.recv_fds(channel, _LENGTH, 4)
    descriptor = descriptors[0] if descriptors else -1
    for other in descriptors[1:]:
        os.close(other)
    try:
        head += _exactly(channel, _LENGTH - len(head)) if head else b""
        size = int.from_bytes(head, "little")
        if not head or size > _MOST:
            raise EOFError
        return _exactly(channel, size), descriptor
    except BaseException:
        if descriptor >= 0:
            os.close(descriptor)
        raise


def _exactly(channel: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        got = channel.recv_into(view[at:])
        if got == 0:
            raise EOFError
        at += got
    return bytes(data)


def _memory(name: str) -> int:
    """A file in memory that has no name in any folder: it goes when the last of us closes it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name, os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _write(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(descriptor, view[: 1 << 24]) :]


# the serving process's side


class Loader:
    """The child as its parent sees it. A call holds up its thread until the child has answered; another may stop it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._lock = threading.Lock()
        self._stopped = self._started = False
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        """Of the child, while it runs."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> None:
        """Start the child, unless it runs. Raises ModelError where the system does not give one."""
        if self._stopped:
            raise ModelError("the loader of models is stopped")
        if self.pid is not None:
            return
        self.restarts += self._started
        self._started = True
        self._end()
        mine, its = socket.socketpair()
        source = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            with its:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "penstock.models.loader", str(os.getpid())],
                    stdin=its.fileno(),
                    stdout=subprocess.DEVNULL,
                    process_group=0,  # a Ctrl-C at the terminal is the parent's to handle
                    env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                )
        except OSError as error:
            mine.close()
            raise ModelError(f"the loader of models cannot be started: {error.strerror}") from None
        self._channel = mine

    def stop(self, timeout: float = 2.0) -> None:
        """End the child; what it is asked for then fails."""
        self._stopped = True
        self._end(timeout)

    def _end(self, timeout: float = 2.0) -> None:
        channel, process = self._channel, self._process
        if channel is not None:
            self._channel = None
            with contextlib.suppress(OSError):
                channel.shutdown(socket.SHUT_RDWR)  # whoever waits for an answer wakes
            channel.close()
        if process is not None:
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGKILL)
                process.wait()
            self._process = None

    def _ask(self, request: Request, descriptor: int = -1) -> tuple[Answer, int]:
        """A child that ended is started again, and asked once more."""
        message = _encode(request)
        with self._lock:
            for attempt in range(2):
                self.start()
                channel = self._channel
                try:
                    if channel is None:
                        raise EOFError
                    _send(channel, message, descriptor)
                    body, got = _receive(channel)
                    break
                except (EOFError, OSError):
                    if self._stopped:
                        raise ModelError("the loader of models is stopped") from None
                    status = self._process.wait() if self._process is not None else 0
                    self._end()
                    if attempt:
                        why = f"signal {-status}" if status < 0 else f"status {status}"
                        what = request.name if isinstance(request, (Look, Compile)) else request.root
                        raise ModelError(f"model {what}: the loader ended while reading it ({why})") from None
        answer = _answers.decode(body)
        for key, why in answer.refused.items():
            remember(key, why)
        if answer.error:
            if got >= 0:
                os.close(got)
            raise ModelError(answer.error)
        return answer, got

    def look(self, root: str, name: str) -> FoundModel:
        """A model of the folder, its files' digests with it. Raises ModelError."""
        answer, _ = self._ask(Look(root=root, name=name))
        return answer.found[0]

    def scan(self, root: str, whole: bool = False) -> tuple[list[FoundModel], bool]:
        """Models that changed since the last scan, and whether that is all of the folder. Raises ModelError."""
        answer, _ = self._ask(Scan(root=root, whole=whole))
        return answer.found, answer.whole

    def compile(
        self,
        path: str,
        name: str,
        inputs: Sequence[str] | None = None,
        output: str | None = None,
        *,
        content: bytes | None = None,
        whole: bool = False,
        untried: bool = False,
        patience: float | None = None,
    ) -> tuple[Compiled, Any]:
        """A file (or its content) compiled, and the memory that holds it, mapped; None for an onnx_file that is opened
        from its path. Raises ModelError."""
        given = -1
        try:
            if content is not None:
                given = _memory("penstock-given")
                _write(given, content)
            answer, descriptor = self._ask(
                Compile(
                    path=path,
                    name=name,
                    inputs=None if inputs is None else list(inputs),
                    output=output,
                    given=content is not None,
                    whole=whole,
                    untried=untried,
                    patience=patience,
                    refused=dict(REFUSED),
                ),
                given,
            )
        except OSError as error:
            raise ModelError(f"model {name}: {error.strerror}") from None
        finally:
            if given >= 0:
                os.close(given)
        if answer.compiled is not None and answer.compiled.kind == "onnx_file" and descriptor < 0:
            return answer.compiled, None
        if answer.compiled is None or descriptor < 0:
            raise ModelError(f"model {name}: the loader gave nothing")
        try:
            return answer.compiled, mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
        except OSError as error:
            raise ModelError(f"model {name}: cannot map what the loader made: {error.strerror}") from None
        finally:
            os.close(descriptor)


def build(compiled: Compiled, memory: Any, name: str) -> Runtime:
    """A runtime from what the child made; all but microseconds of it without the GIL. Raises ModelError."""
    if compiled.kind == "onnx_file":
        raise ValueError("a whole ONNX file is opened from its path")
    if compiled.kind == "trees":
        from .._ext.trees import TreeModel
        from .runtime import TreeRuntime

        try:
            model = TreeModel(memory, nice=NICE)
        except (ValueError, OverflowError) as error:
            raise ModelError(f"model {name}: {compiled.path}: {error}") from None
        trees = TreeRuntime(model, None if compiled.inputs is None else tuple(compiled.inputs))
        trees.ports = compiled.ports
        return trees
    from .onnx_runtime import OnnxRuntime, OnnxSource

    source = OnnxSource(memory, compiled.output, compiled.shown, compiled.folder)
    runtime: Runtime = nicely(lambda: OnnxRuntime.compiled(source, compiled.inputs, name))
    return runtime


def nicely(job: Callable[[], Any]) -> Any:
    """Run a job in a thread of low priority and wait: for work that is long, and mostly without the GIL."""
    result: list[Any] = []
    failed: list[BaseException] = []

    def work() -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        try:
            result.append(job())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, name="penstock-build", daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return result[0]


# the child's side


class _Child:
    """What the child remembers between two requests: digests of files, and what the last scan saw."""

    def __init__(self) -> None:
        self.digests: dict[tuple[str, int, int, int], str] = {}
        self.seen: dict[str, dict[str, FoundModel]] = {}  # per root

    def answer(self, request: Request, given: int) -> tuple[Answer, int]:
        if isinstance(request, Look):
            return Answer(found=[self.look(request.root, request.name, None)]), -1
        if isinstance(request, Scan):
            return self.scan(request), -1
        return self.compile(request, given)

    def look(self, root: str, name: str, before: FoundModel | None, settle: bool = False) -> FoundModel:
        """A model as it is in the folder. settle: a file that differs from the one `before` is not read yet: it may
        still be written."""
        if not is_name(name):
            raise ModelError(f"model {name!r}: names are letters, digits, '_', '-' and '.'")
        known = {version.version: version for version in before.versions} if before is not None else {}
        try:
            numbers = versions(root, name)
        except OSError as error:
            raise ModelError(f"model {name}: cannot read its folder: {error.strerror}") from None
        if not numbers:
            return FoundModel(name, gone=True)
        table: dict[str, str] = {}
        problem = ""
        try:
            table = aliases(root, name)
        except ModelError as error:
            problem = str(error)
        found = [self.version(Path(root) / name / v, f"{name}@{v}", v, known.get(v), settle) for v in numbers]
        return FoundModel(name, found, table, problem)

    def version(self, folder: Path, ref: str, version: str, before: FoundVersion | None, settle: bool) -> FoundVersion:
        try:
            path = model_file(folder, ref)
            status = path.stat()
        except ModelError as error:
            return FoundVersion(version, problem=str(error))
        except OSError as error:
            return FoundVersion(version, problem=f"model {ref}: cannot read {folder}: {error.strerror}")
        found = FoundVersion(version, str(path), status.st_size, status.st_mtime_ns, status.st_ino)
        if settle and (before is None or _stamp(before) != _stamp(found)):
            return msgspec.structs.replace(found, moving=True)
        try:
            return msgspec.structs.replace(found, sha256=self.digest(found))
        except OSError as error:
            return msgspec.structs.replace(found, problem=f"model {ref}: cannot read {path}: {error.strerror}")

    def digest(self, found: FoundVersion) -> str:
        key = _stamp(found)
        if key not in self.digests:
            if len(self.digests) > 100_000:
                self.digests.clear()
            with open(found.path, "rb") as file:
                self.digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return self.digests[key]

    def scan(self, request: Scan) -> Answer:
        root = request.root
        before = self.seen.get(root)
        whole = request.whole or before is None
        before = before or {}
        if not os.path.isdir(root):
            raise ModelError(f"{root}: the model folder is not there")
        try:
            names = sorted(os.listdir(root))
        except OSError as error:
            raise ModelError(f"{root}: cannot read the model folder: {error.strerror}") from None
        now = {}
        for name in names:
            found = self.find(root, name, before.get(name), not whole)
            if not found.gone or found.problem:
                now[name] = found
        self.seen[root] = now
        changed = [model for name, model in now.items() if whole or model != before.get(name)]
        changed += [FoundModel(name, gone=True) for name in before if name not in now]
        return Answer(found=changed, whole=whole)

    def find(self, root: str, name: str, before: FoundModel | None, settle: bool) -> FoundModel:
        """As look(), for whatever the folder holds: what cannot be read stays as it was, and is no other's problem."""
        try:
            found = self.look(root, name, before, settle) if is_name(name) else FoundModel(name, gone=True)
        except ModelError as error:
            known = before or FoundModel(name)
            return msgspec.structs.replace(known, problem=str(error), gone=False, unread=True)
        if found.gone and name.isprintable() and not name.startswith("."):
            found = msgspec.structs.replace(found, problem=_misplaced(Path(root) / name))
        return found

    def compile(self, request: Compile, given: int) -> tuple[Answer, int]:
        path = Path(request.path)
        if path.suffix not in SUFFIXES:
            raise ModelError(f"model {request.name}: {path} is no model file; expected one of {', '.join(SUFFIXES)}")
        data, status = self.read(request, path, given)
        digest = hashlib.sha256(data).hexdigest()
        for key, why in request.refused.items():
            remember(key, why)
        file = Path(f"/proc/self/fd/{given}") if request.given else path
        compiled, made = _compile(request, path, data, file, digest)
        descriptor = -1
        try:
            descriptor = -1 if made is None else _memory("penstock-model")
            try:
                if made is not None:
                    _write(descriptor, made)
            except BaseException:
                os.close(descriptor)
                raise
        except OSError as error:
            raise ModelError(
                f"model {request.name}: no room for its {len(made or b''):,} bytes in memory: {error.strerror}"
            ) from None
        place: dict[str, int] = {}
        if status is not None:
            place = {"mtime_ns": status.st_mtime_ns, "inode": status.st_ino}
        compiled = msgspec.structs.replace(compiled, sha256=digest, size=len(data), **place)
        return Answer(compiled=compiled), descriptor

    def read(self, request: Compile, path: Path, given: int) -> tuple[bytes, os.stat_result | None]:
        """The file's bytes, all from one moment: a file that changes meanwhile is refused."""
        try:
            if request.given:
                if given < 0:
                    raise ModelError(f"model {request.name}: its content did not come with it")
                with open(os.dup(given), "rb") as file:
                    file.seek(0)
                    return file.read(), None
            with path.open("rb") as file:
                before = os.fstat(file.fileno())
                data = file.read()
                after = os.fstat(file.fileno())
        except (OSError, MemoryError) as error:
            why = error.strerror if isinstance(error, OSError) else "memory is short"
            raise ModelError(f"model {request.name}: cannot read {path}: {why}") from None
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns) or len(data) != after.st_size:
            raise ModelError(f"model {request.name}: {path} was written while it was read; load it again")
        return data, after


def _misplaced(folder: Path) -> str:
    """What an operator should know of a folder that is no model: '' unless a model file lies in it."""
    for below in ("", "1/"):
        for suffix in SUFFIXES:
            if os.path.exists(folder / f"{below}model{suffix}"):  # which, other than Path.exists(), never raises
                if not is_name(folder.name):
                    return f"{folder}: not served: names are letters, digits, '_', '-' and '.'"
                return (
                    f"{folder}: not served: model{suffix} belongs in a version's folder, {folder.name}/1/model{suffix}"
                )
    return ""


def _stamp(found: FoundVersion) -> tuple[str, int, int, int]:
    return found.path, found.size, found.mtime_ns, found.inode


def _compile(request: Compile, path: Path, data: bytes, file: Path, digest: str) -> tuple[Compiled, bytes | None]:
    """What a file's bytes hold; `file`: where they are."""
    from .onnx_runtime import OnnxSource, has_external
    from .runtime import bind_inputs
    from .trees import NotATreeModel, compile_form, parse_ensemble, tree_ports

    name = request.name
    common: dict[str, Any] = {"path": str(path), "sha256": "", "size": len(data)}
    reason = "the kernel gives the scores of a tree ensemble, not a named output"
    if request.output is None:
        try:
            form = parse_ensemble(data, path)
            inputs = bind_inputs(form.feature_names, request.inputs, form.n_inputs, name)
            bound = None if inputs is None else list(inputs)
            ports = tree_ports(path, form.n_inputs, form.n_outputs, file)
            made = Compiled(kind="trees", inputs=bound, ports=ports, warning=form.warning, **common)
            return made, compile_form(form)
        except NotATreeModel as error:
            reason = str(error)
        except ModelError:
            raise
        except (ValueError, OverflowError, RecursionError, MemoryError) as error:
            raise ModelError(f"model {name}: {error or 'memory is short'}") from None
    if path.suffix != ".onnx":
        raise ModelError(f"model {name}: {path}: {reason}")
    if request.given and has_external(data):
        raise ModelError(f"model {name}: {path} has tensors in other files; such a model is loaded from the folder")
    if request.whole:
        return _compile_whole(request, path, data, digest, common)
    source = OnnxSource.of(path, data, request.output, name)
    try_file(source.trial(path, digest, request.inputs, name), source.bytes, fork=True, patience=request.patience)
    compiled = Compiled(
        kind="onnx",
        inputs=request.inputs,
        output=source.output,
        shown=source.shown,
        folder=source.folder or str(path.parent),
        **common,
    )
    return compiled, data if source.bytes is None else source.bytes


def _compile_whole(
    request: Compile, path: Path, data: bytes, digest: str, common: dict[str, Any]
) -> tuple[Compiled, bytes | None]:
    """An ONNX file with all its outputs: as it is, or with tensors in the place of lists of maps."""
    from .onnx_graph import GraphError, with_tensors
    from .onnx_runtime import size_with_tensors

    try:
        made = with_tensors(data)
    except GraphError:
        made = None  # ONNX Runtime says what is wrong with it
    if made is None and request.given:
        made = data
    folder = None if made is None or request.given else str(path.parent)
    trial = Trial(
        name=request.name,
        file=str(path),
        sha256=digest,
        size=len(data) if request.given else size_with_tensors(path, data),
        path=None if made is not None else str(path),
        folder=folder,
        whole=True,
    )
    if not request.untried:
        try_file(trial, made, fork=True, patience=request.patience)
    return Compiled(kind="onnx_file", folder=folder, trial=trial if request.untried else None, **common), made


def _printable(text: str) -> str:
    """A file may hold half a surrogate pair, and an error may quote it."""
    return text.encode(errors="backslashreplace").decode()


def _serve(channel: socket.socket, parent: int) -> None:
    """Answer until the parent ends."""
    child = _Child()
    while True:
        ready, _, _ = select.select([channel], [], [], LOOK_EVERY)
        if not parent_lives(parent):  # a forked child of the parent may still hold the other end
            return
        if not ready:
            continue
        try:
            body, given = _receive(channel)
        except (EOFError, OSError):
            return
        made = -1
        try:
            answer, made = child.answer(_requests.decode(body), given)
        except ModelError as error:
            answer = Answer(error=_printable(str(error)))
        except Exception as error:  # a defect of a parser is no reason to stop serving the others
            answer = Answer(error=_printable(f"{type(error).__name__}: {error}"))
        try:
            if REFUSED:
                answer = msgspec.structs.replace(answer, refused=dict(REFUSED))
            _send(channel, _encode(answer), made)
        except OSError:
            return
        finally:
            for descriptor in (given, made):
                if descriptor >= 0:
                    os.close(descriptor)


def main() -> int:
    """Run as `python -m penstock.models.loader PARENT`, its standard input a socket."""
    with contextlib.suppress(OSError):
        # Behind a server that shares the core; but not only where it is idle, as the keeper: who asks for a model on a
        # busy machine, to get rid of a slow one, is not to wait for ever.
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    with contextlib.suppress(ValueError, OSError):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    channel = socket.socket(fileno=os.dup(0))
    _serve(channel, int(sys.argv[1]) if len(sys.argv) > 1 else os.getppid())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
