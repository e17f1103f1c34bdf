"""Builds and drives load/loadgen.c, and holds server processes: start, pin, wait until ready, CPU used, stop.

Control path of the benchmarks. The client runs on the last core and every server on core 0, so that neither can take
the other's time; on one core they share it and the rows say less.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
CACHE = REPO / "build" / "bench"
SOURCE = Path(__file__).with_name("loadgen.c")
CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, CLIENT_CORE = CORES[0], CORES[-1]


def build(folder: Path = CACHE) -> Path:
    """Compiles loadgen.c when it is newer than the program in `folder`; RuntimeError with the compiler's words."""
    program = folder / "loadgen"
    if program.exists() and program.stat().st_mtime >= SOURCE.stat().st_mtime:
        return program
    compiler = os.environ.get("CC") or "cc"
    if not shutil.which(compiler.split()[0]):
        raise RuntimeError(f"loadgen: no C compiler: {compiler!r} (set CC=...)")
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"loadgen.{os.getpid()}"
    done = subprocess.run(
        [*compiler.split(), "-O2", "-Wall", "-Wextra", str(SOURCE), "-o", str(draft), "-lm"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"loadgen: {compiler} failed:\n{done.stderr}")
    os.replace(draft, program)
    return program


def run_load(port: int, *, cpu: int | None = CLIENT_CORE, allow_errors: bool = False, **options: Any) -> dict[str, Any]:
    """One run of loadgen: its JSON as a dict. `options` are its flags with _ for - (see `loadgen --help`).

    RuntimeError when loadgen fails, or when any request was not answered 200 and `allow_errors` is false.
    """
    command = [str(build()), "--port", str(port)]
    if cpu is not None:
        command += ["--cpu", str(cpu)]
    for name, value in options.items():
        if value is None or value is False:
            continue
        command.append("--" + name.replace("_", "-"))
        if value is not True:
            command.append(str(value))
    limit = float(options.get("duration", 5)) + float(options.get("warmup", 0)) + float(options.get("timeout", 5)) + 30
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    if done.returncode:
        raise RuntimeError(f"loadgen: {done.stderr.strip()}")
    result: dict[str, Any] = json.loads(done.stdout)
    if not allow_errors and any(result["errors"].values()):
        raise RuntimeError(f"requests failed: {result['errors']}, first: {result['first_error']}")
    return result


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def cpu_seconds(pid: int) -> float:
    """User plus system time of a process and its descendants, ended ones included, in seconds (10 ms steps)."""
    ticks = os.sysconf("SC_CLK_TCK")
    own: dict[int, tuple[int, float]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            own[int(entry.name)] = (int(fields[1]), sum(map(int, fields[11:15])) / ticks)
    total, open_pids = 0.0, [pid]
    while open_pids:
        parent = open_pids.pop()
        total += own.get(parent, (0, 0.0))[1]
        open_pids += [p for p, (of, _) in own.items() if of == parent]
    return total


def busy_seconds() -> float:
    """CPU seconds that all processes of this machine have used since it started, stolen time included."""
    fields = [int(v) for v in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def answer_of(port: int, method: str, path: str, body: bytes | None, timeout: float = 5.0) -> tuple[int, bytes]:
    """Status and body of one request on a new connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, body=body, headers={"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def said(port: int, command: bytes, timeout: float = 5.0) -> bytes:
    """The beginning of what a RESP server says to one inline command on a new connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as s:
        s.sendall(command + b"\r\n")
        return s.recv(65536)


class Server:
    """A server process pinned to one core. Use as a context manager; it is ready when `probe` is answered 200, or when
    `ready()` is true, where that is given.

    `started_s` is the time from process start to that first answer.
    """

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        *,
        probe: tuple[str, str, bytes | None] = ("GET", "/", None),
        ready: Callable[[], bool] | None = None,
        ready_within: float = 60.0,
        core: int | None = SERVER_CORE,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        name: str = "server",
    ) -> None:
        self.command, self.port, self.probe, self.name = list(command), port, probe, name
        self.ready, self.ready_within, self.core, self.cwd = ready, ready_within, core, cwd
        self.env = {**os.environ, **(env or {})}
        self.log = CACHE / f"{name}.log"
        self.started_s = 0.0

    def __enter__(self) -> Server:
        CACHE.mkdir(parents=True, exist_ok=True)
        pin = [] if self.core is None or not shutil.which("taskset") else ["taskset", "-c", str(self.core)]
        begin = time.perf_counter()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*pin, *self.command], stdout=log, stderr=log, env=self.env, cwd=self.cwd, start_new_session=True
            )
        last: object = "no answer"
        while time.perf_counter() - begin < self.ready_within:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.name} ended with code {self.process.returncode}: {self.tail()}")
            try:
                if self.ready is not None:
                    status, body = (200 if self.ready() else 0), b""
                else:
                    status, body = answer_of(self.port, *self.probe)
                if status == 200:
                    self.started_s = time.perf_counter() - begin
                    return self
                last = f"{status} {body[:200]!r}"
            except (OSError, http.client.HTTPException) as e:
                last = e
            time.sleep(0.005)
        self.__exit__()
        raise RuntimeError(f"{self.name} was not ready within {self.ready_within:.0f} s ({last}): {self.tail()}")

    def __exit__(self, *_: object) -> None:
        if not hasattr(self, "process"):
            return
        # The whole session, as some peers leave workers behind when only their parent is told.
        for sign, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            try:
                os.killpg(self.process.pid, sign)
            except ProcessLookupError:
                break
            try:
                self.process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
        self.process.wait(5.0)

    def tail(self) -> str:
        """The last lines that the process wrote."""
        return " | ".join(self.log.read_text(errors="replace").strip().splitlines()[-5:])

    def cpu_seconds(self) -> float:
        return cpu_seconds(self.process.pid)

    def resident_bytes(self) -> int:
        """Resident memory of the process itself."""
        fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def frame(bodies: Sequence[bytes]) -> bytes:
    """Bodies as `loadgen --framed` reads them."""
    return b"".join(len(body).to_bytes(4, "little") + body for body in bodies)
