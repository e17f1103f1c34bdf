"""Snapshots of window state (control path): written by a child process, read when an engine starts.

A snapshot is a folder, named after the log sequence that its state has applied, which appears whole by one rename.
What must stay true: state is read back bit for bit or not at all. Every byte is under a checksum, damage is named by
file and offset and never read as data, and a kill or a full disk at any point leaves the snapshots before as they were.

    <folder>/<sequence, 20 digits>/manifest.json         position, and per store the files that make up its state
    <folder>/<sequence>/<fingerprint, 16 hex>.base       every page of a store
    <folder>/<sequence>/<fingerprint>.delta              the pages that differ from the file before it in the manifest
    <folder>/.tmp-*                                      what was being written or removed; the next write clears it

A store's state is its base with its deltas laid over it in order. A file is a header page; for a delta the numbers of
its pages; per page the hash by which the next snapshot finds what changed (ext/page_delta.h); the pages; and CRC32C
per 1 MiB of all that. Magic, format and the header's checksum stay where they are in every format, so that a newer
file is told from a damaged one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from .._ext import snapshot as native
from .._ext.windows import WindowStore
from ..errors import PenstockError

__all__ = ["LoadedSnapshot", "SnapshotPosition", "load_snapshot", "prune", "sync_folder", "write_snapshot"]

FORMAT = 1
PAGE = native.PAGE
BLOCK = 1 << 20  # bytes under one checksum, and the most that is moved at a time
WRITE_BACK = 8 << 20  # bytes that may wait for the disk
MAX_FILES = 16  # of one store; then one delta over the base takes the place of the others
MAGIC = b"PENSTOCK snapshot\0\0\0"
HEADER = struct.Struct("<20sIB7xQqQQ16s16s16s")
SEED_BYTES = 16
NAME = re.compile(r"\d{20}(-\d{3})?")
TEMPORARY = ".tmp-"

Progress = Callable[[int, int], None]


class SnapshotPosition(msgspec.Struct, frozen=True, kw_only=True):
    """Where in the log a snapshot stands.

    sequence: everything up to and including it is applied; ingest_time: the largest of those events; watermarks: per
    source; created: when the snapshot was made; all times in microseconds. extra: anything that JSON holds.
    """

    log_id: int
    sequence: int
    ingest_time: int
    watermarks: dict[str, int]
    created: int
    extra: dict[str, Any] = {}


class StoreFile(msgspec.Struct, frozen=True):
    """One file of a store's state: its path below the folder, its identity, and how many pages it holds."""

    path: str
    id: str
    pages: int


class StoreState(msgspec.Struct, frozen=True):
    """The state of one store in a snapshot: so many bytes, made of a base and the deltas over it."""

    size: int
    files: list[StoreFile]


class Manifest(msgspec.Struct, frozen=True):
    format: int
    position: SnapshotPosition
    stores: dict[str, StoreState]


class _Checked(msgspec.Struct):
    """manifest.json: the checksum is over the bytes of the manifest."""

    crc32c: str
    manifest: msgspec.Raw


class StorePages(msgspec.Struct, eq=False):
    """What a delta is made against: per page two words of hash, the key they were made with, and the base's pages that
    some delta has replaced."""

    state: StoreState
    seed: bytes
    hashes: np.ndarray[Any, Any]
    replaced: np.ndarray[Any, Any]


class LoadedSnapshot(msgspec.Struct, kw_only=True, eq=False):
    """A snapshot that was read into stores.

    loaded, missing: fingerprints of the given stores that were in it and were not. skipped: newer snapshots that could
    not be read, each as `file: reason`. pages: for the next write_snapshot; 20 bytes per 4 KiB of state.
    """

    path: Path
    position: SnapshotPosition
    loaded: list[int]
    missing: list[int]
    skipped: list[str]
    pages: dict[int, StorePages]


class _Damaged(Exception):
    """A snapshot that is not usable: `file: reason`."""


# ---- writing


class _Plan(msgspec.Struct, eq=False):
    """What will be written of one store; numbers None: a base; no file: nothing changed."""

    fingerprint: int
    store: WindowStore
    size: int
    seed: bytes
    hashes: np.ndarray[Any, Any]
    numbers: np.ndarray[Any, Any] | None
    before: list[StoreFile]
    file: StoreFile | None

    @property
    def file_bytes(self) -> int:
        if self.file is None:
            return 0
        payload = _payload_bytes(self.file.pages, self.numbers is not None)
        return PAGE + payload + 4 * _blocks(payload) + 4


def write_snapshot(
    folder: Path,
    stores: Mapping[int, WindowStore],
    position: SnapshotPosition,
    previous: LoadedSnapshot | None,
    progress: Progress | None = None,
) -> Path:
    """Write the stores (by fingerprint) as of a position in the log; returns the new snapshot's folder.

    With `previous`, a snapshot in the same folder, stores that it holds are written as the pages that differ from it,
    unless a store's deltas would come to more than half its base. The stores must stand still, and only one process may
    write to the folder. progress(done, total) is called after every 1 MiB or so, looked at or written.

    Raises PenstockError where the disk is full or a file cannot be written; the snapshots before stay as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    if not 0 <= position.sequence < 10**20:
        raise PenstockError(f"snapshot: expected a sequence from 0 on, got {position.sequence}")
    name = _free_name(folder, position.sequence)
    sizes = {fingerprint: native.state_bytes(store) for fingerprint, store in stores.items()}
    report = _Report(progress, 2 * PAGE * sum(-(-size // PAGE) for size in sizes.values()))
    plans = [
        _scan(folder, name, fingerprint, store, sizes[fingerprint], previous, report)
        for fingerprint, store in stores.items()
    ]
    needed = sum(plan.file_bytes for plan in plans)
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and free < needed:
        raise PenstockError(_full(folder / name, needed, f"{free:,} are free"))
    temporary = folder / (TEMPORARY + name)
    try:
        temporary.mkdir()
        for plan in plans:
            if plan.file is not None:
                _write_store(temporary, plan, position.sequence, report)
            report.add(PAGE * (len(plan.hashes) - (plan.file.pages if plan.file is not None else 0)))
        states = {
            f"{p.fingerprint:016x}": StoreState(p.size, [*p.before, *([p.file] if p.file else [])]) for p in plans
        }
        _write_manifest(temporary / "manifest.json", Manifest(FORMAT, position, states))
        sync_folder(temporary)
        os.rename(temporary, folder / name)
        sync_folder(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise PenstockError(_full(folder / name, needed, os.strerror(error.errno))) from error
        raise PenstockError(f"snapshot {folder / name}: {error}; the snapshots before it are intact") from error
    return folder / name


def _full(path: Path, needed: int, reason: str) -> str:
    return f"snapshot {path}: it needs {needed:,} bytes: {reason}; the snapshots before it are intact"


class _Report:
    """Counts bytes for the caller's progress."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress = progress
        self.total = total
        self.done = 0

    def add(self, n: int) -> None:
        self.done = min(self.done + n, self.total)
        if self.progress is not None:
            self.progress(self.done, self.total)


def _scan(
    folder: Path,
    name: str,
    fingerprint: int,
    store: WindowStore,
    size: int,
    previous: LoadedSnapshot | None,
    report: _Report,
) -> _Plan:
    """Hash every page, and choose between a base, a delta over the file before, and one delta over the base."""
    n = -(-size // PAGE)
    held = None
    if previous is not None and previous.path.parent == folder.resolve():
        held = previous.pages.get(fingerprint)
    if held is not None and (held.state.size > size or not all((folder / f.path).exists() for f in held.state.files)):
        held = None
    seed = held.seed if held is not None else os.urandom(SEED_BYTES)
    hashes = np.zeros((n, 2), dtype=np.uint64)
    n_old = 0
    if held is not None:
        n_old = len(held.hashes)
        hashes[:n_old] = held.hashes
    key = hashlib.shake_256(seed).digest(native.KEY_BYTES)
    changed = np.empty(BLOCK // PAGE, dtype=np.uint32)
    parts = []
    for first in range(0, n, len(changed)):
        count = min(len(changed), n - first)
        found = native.scan(store, key, first, count, n_old, hashes, changed)
        parts.append(changed[:found].copy())
        report.add(count * PAGE)
    numbers = np.concatenate(parts)
    path = f"{name}/{fingerprint:016x}"
    id = os.urandom(16).hex()
    if held is not None:
        files = held.state.files
        if not len(numbers) and held.state.size == size:
            return _Plan(fingerprint, store, size, seed, hashes, None, files, None)
        if len(files) >= MAX_FILES:
            files = files[:1]
            numbers = np.union1d(np.flatnonzero(held.replaced).astype(np.uint32), numbers)
        if 2 * (sum(f.pages for f in files[1:]) + len(numbers)) <= files[0].pages:
            file = StoreFile(path + ".delta", id, len(numbers))
            return _Plan(fingerprint, store, size, seed, hashes, numbers, files, file)
    return _Plan(fingerprint, store, size, seed, hashes, None, [], StoreFile(path + ".base", id, n))


def _write_store(temporary: Path, plan: _Plan, sequence: int, report: _Report) -> None:
    file, numbers = plan.file, plan.numbers
    assert file is not None
    parent = plan.before[-1].id if plan.before else "0" * 32
    header = _header(plan, file, sequence, parent)
    fd = os.open(temporary / Path(file.path).name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        _write_all(fd, memoryview(header), 0)
        blocks = _BlockWriter(fd, PAGE)
        if numbers is not None:
            blocks.write_padded(numbers.astype("<u4").tobytes())
            blocks.write_padded(plan.hashes[numbers].astype("<u8").tobytes())
        else:
            blocks.write_padded(plan.hashes.astype("<u8").tobytes())
        buffer = bytearray(BLOCK if numbers is not None else 0)
        at = 0
        while at < file.pages:
            n = min(blocks.room // PAGE, file.pages - at)
            if numbers is None:
                blocks.write(native.pages(plan.store, at, n))
            else:
                native.gather(plan.store, numbers[at : at + n], buffer)
                blocks.write(memoryview(buffer)[: n * PAGE])
            at += n
            report.add(n * PAGE)
        blocks.finish()
        os.fsync(fd)
    finally:
        os.close(fd)


def _header(plan: _Plan, file: StoreFile, sequence: int, parent: str) -> bytes:
    page = bytearray(PAGE)
    HEADER.pack_into(
        page,
        0,
        MAGIC,
        FORMAT,
        plan.numbers is not None,
        plan.fingerprint,
        sequence,
        plan.size,
        file.pages,
        bytes.fromhex(file.id),
        bytes.fromhex(parent),
        plan.seed,
    )
    page[-4:] = native.crc32c(bytes(page[:-4])).to_bytes(4, "little")
    return bytes(page)


def _write_all(fd: int, data: memoryview, at: int) -> None:
    while len(data):
        written = os.pwrite(fd, data, at)
        data = data[written:]
        at += written


class _BlockWriter:
    """Writes the payload of a file, keeps the checksum of every block, and writes those behind it."""

    def __init__(self, fd: int, at: int) -> None:
        self.fd = fd
        self.start = at
        self.at = at
        self.crc = 0
        self.checks: list[int] = []

    @property
    def room(self) -> int:
        return BLOCK - (self.at - self.start) % BLOCK

    def write(self, data: memoryview) -> None:
        while len(data):
            room = self.room
            part = data[:room]
            self.crc = native.crc32c(part, self.crc)
            _write_all(self.fd, part, self.at)
            self.at += len(part)
            if len(part) == room:
                self._end_block()
            data = data[room:]

    def write_padded(self, data: bytes) -> None:
        """To a whole number of pages."""
        self.write(memoryview(data))
        self.write(memoryview(bytes(-len(data) % PAGE)))

    def _end_block(self) -> None:
        self.checks.append(self.crc)
        self.crc = 0
        written = self.at - self.start
        if written % WRITE_BACK == 0:
            native.write_back(self.fd, self.at - WRITE_BACK, WRITE_BACK)

    def finish(self) -> None:
        if self.room < BLOCK:
            self._end_block()
        table = np.array(self.checks, dtype="<u4").tobytes()
        table += native.crc32c(table).to_bytes(4, "little")
        _write_all(self.fd, memoryview(table), self.at)


def _write_manifest(path: Path, manifest: Manifest) -> None:
    body = msgspec.json.encode(manifest)
    data = msgspec.json.encode(_Checked(f"{native.crc32c(body):08x}", msgspec.Raw(body)))
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        _write_all(fd, memoryview(data), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _clear(folder: Path) -> None:
    for path in folder.glob(TEMPORARY + "*"):
        shutil.rmtree(path, ignore_errors=True)


def _free_name(folder: Path, sequence: int) -> str:
    """The sequence's name; a later snapshot of the same sequence gets a number behind it."""
    name = f"{sequence:020d}"
    for again in range(1, 1000):
        if not (folder / name).exists():
            return name
        name = f"{sequence:020d}-{again:03d}"
    raise PenstockError(f"snapshot {folder / name}: a thousand snapshots of one sequence")


def _payload_bytes(pages: int, is_delta: bool) -> int:
    """Of a file, between the header and the checksums."""
    numbers = -(-4 * pages // PAGE) * PAGE if is_delta else 0
    return numbers + -(-16 * pages // PAGE) * PAGE + pages * PAGE


def _blocks(payload: int) -> int:
    return -(-payload // BLOCK)


# ---- reading


def load_snapshot(
    folder: Path,
    stores: Mapping[int, WindowStore],
    progress: Progress | None = None,
    path: Path | None = None,
    skipped: list[str] | None = None,
) -> LoadedSnapshot | None:
    """Read the newest usable snapshot into the stores (by fingerprint); None where there is none.

    Newest is the highest sequence. Stores that a snapshot does not hold are left as they are and listed in `missing`.
    A snapshot that is damaged or incomplete is passed over, and `skipped` (the result's, and the list if one is given,
    which also says why None was returned) has the reason. Nothing changes in any store until all of a snapshot has been
    read and checked. path: read this one, and raise PenstockError if it cannot be used.

    Raises PenstockError for a snapshot of a newer format, and MemoryError where a store may not grow so large.
    """
    reasons: list[str] = [] if skipped is None else skipped
    tried: set[str] = set()
    while True:
        # Looked for anew each time: another process may have written a newer one and removed those seen before.
        name = path.name if path is not None else next((n for n in _names(folder) if n not in tried), None)
        if name is None:
            return None
        tried.add(name)
        try:
            manifest = _read_manifest((path or folder / name) / "manifest.json")
            return _load(folder if path is None else path.parent, name, manifest, stores, reasons, progress)
        except (_Damaged, OSError) as error:
            if path is not None:
                raise PenstockError(f"snapshot {error}") from error
            if (folder / name).exists():
                reasons.append(str(error))


def _names(folder: Path) -> Iterator[str]:
    """Snapshots, newest first."""
    if folder.is_dir():
        yield from sorted((p.name for p in folder.iterdir() if NAME.fullmatch(p.name)), reverse=True)


def _read_manifest(path: Path) -> Manifest:
    try:
        checked = msgspec.json.decode(path.read_bytes(), type=_Checked)
        body = bytes(checked.manifest)
    except FileNotFoundError:
        raise _Damaged(f"{path}: missing") from None
    except msgspec.MsgspecError as error:
        raise _Damaged(f"{path}: damaged: {error}") from None
    if f"{native.crc32c(body):08x}" != checked.crc32c:
        raise _Damaged(f"{path}: damaged: checksum mismatch at offset 0")
    _check_format(path, msgspec.json.decode(body)["format"])
    return msgspec.json.decode(body, type=Manifest)


def _check_format(path: Path, format: int) -> None:
    if format > FORMAT:
        raise PenstockError(
            f"snapshot {path}: format {format}; this version of Penstock reads formats up to {FORMAT}: "
            "use the version that wrote it, or move the snapshot away"
        )


def _load(
    folder: Path,
    name: str,
    manifest: Manifest,
    stores: Mapping[int, WindowStore],
    skipped: list[str],
    progress: Progress | None,
) -> LoadedSnapshot:
    wanted = {f: manifest.stores[f"{f:016x}"] for f in stores if f"{f:016x}" in manifest.stores}
    report = _Report(progress, sum(PAGE * file.pages for state in wanted.values() for file in state.files))
    pages: dict[int, StorePages] = {}
    committed: list[int] = []
    try:
        for fingerprint, state in list(wanted.items()):
            pages[fingerprint] = _load_store(folder, fingerprint, stores[fingerprint], state, report)
            if native.load_is_unfit(stores[fingerprint]):
                del wanted[fingerprint], pages[fingerprint]
                native.cancel_load(stores[fingerprint])
                skipped.append(
                    f"{folder / name}: state {fingerprint:016x} is of an older format, which could damage it; it is "
                    "built anew from history"
                )
        for fingerprint, state in wanted.items():
            native.commit_load(stores[fingerprint], state.size)
            committed.append(fingerprint)
    except ValueError as error:
        raise (PenstockError if committed else _Damaged)(f"{folder / name}: {error}") from None
    finally:
        for fingerprint in wanted:
            native.cancel_load(stores[fingerprint])
    return LoadedSnapshot(
        path=folder.resolve() / name,
        position=manifest.position,
        loaded=list(wanted),
        missing=[fingerprint for fingerprint in stores if fingerprint not in wanted],
        skipped=skipped,
        pages=pages,
    )


def _load_store(folder: Path, fingerprint: int, store: WindowStore, state: StoreState, report: _Report) -> StorePages:
    memory = native.begin_load(store, state.size)
    n = len(memory) // PAGE
    hashes = np.zeros((n, 2), dtype=np.uint64)
    replaced = np.zeros(n, dtype=bool)
    seed, parent = b"", bytes(16)
    for file in state.files:
        path = folder / file.path
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise _Damaged(f"{path}: missing") from None
        try:
            is_delta, seed = _read_header(fd, path, fingerprint, file, parent)
            blocks = _BlockReader(fd, path, file.pages, is_delta)
            numbers = np.arange(0, dtype=np.uint32)
            if is_delta:
                numbers = np.frombuffer(blocks.read_padded(4 * file.pages), dtype="<u4").astype(np.uint32)
                if len(numbers) and int(numbers.max()) >= n:
                    raise _Damaged(f"{path}: damaged between offsets {PAGE} and {PAGE + 4 * file.pages}: page numbers")
            elif file.pages > n:
                raise _Damaged(f"{path}: {file.pages} pages, the manifest says at most {n}")
            found = np.frombuffer(blocks.read_padded(16 * file.pages), dtype="<u8").reshape(-1, 2)
            if is_delta:
                hashes[numbers] = found
                replaced[numbers] = True
            else:
                hashes[: file.pages] = found
            buffer = bytearray(BLOCK if is_delta else 0)
            at = 0
            while at < file.pages:
                count = min(blocks.room // PAGE, file.pages - at)
                if is_delta:
                    blocks.read(memoryview(buffer)[: count * PAGE])
                    native.scatter(memory, numbers[at : at + count], buffer)
                else:
                    blocks.read(memory[at * PAGE : (at + count) * PAGE])
                at += count
                report.add(count * PAGE)
            blocks.finish()
        finally:
            os.close(fd)
        parent = bytes.fromhex(file.id)
    return StorePages(state, seed, hashes, replaced)


def _read_header(fd: int, path: Path, fingerprint: int, file: StoreFile, parent: bytes) -> tuple[bool, bytes]:
    page = os.pread(fd, PAGE, 0)
    if len(page) < PAGE:
        raise _Damaged(f"{path}: cut short at offset {len(page)}")
    if page[: len(MAGIC)] != MAGIC or native.crc32c(page[:-4]) != int.from_bytes(page[-4:], "little"):
        raise _Damaged(f"{path}: damaged between offsets 0 and {PAGE}: checksum mismatch")
    values = HEADER.unpack_from(page)
    _check_format(path, values[1])
    _, _, is_delta, held, _, _, pages, id, before, seed = values
    if (held, pages, id, before) != (fingerprint, file.pages, bytes.fromhex(file.id), parent):
        raise _Damaged(f"{path}: not the file that the manifest names, or not made over the one before it")
    return bool(is_delta), seed


class _BlockReader:
    """Reads the payload of a file in order and compares the checksum at the end of every block."""

    def __init__(self, fd: int, path: Path, pages: int, is_delta: bool) -> None:
        self.fd = fd
        self.path = path
        self.at = PAGE
        self.crc = 0
        self.end = PAGE + _payload_bytes(pages, is_delta)
        n = _blocks(self.end - PAGE)
        size = os.fstat(fd).st_size
        if size != self.end + 4 * n + 4:
            what = "cut short" if size < self.end + 4 * n + 4 else "too long"
            raise _Damaged(f"{path}: {what} at offset {min(size, self.end + 4 * n + 4)}")
        table = os.pread(fd, 4 * n + 4, self.end)
        if len(table) != 4 * n + 4 or native.crc32c(table[:-4]) != int.from_bytes(table[-4:], "little"):
            raise _Damaged(f"{path}: damaged between offsets {self.end} and {size}: checksum mismatch")
        self.checks = np.frombuffer(table[:-4], dtype="<u4")

    @property
    def room(self) -> int:
        return BLOCK - (self.at - PAGE) % BLOCK

    def read(self, to: memoryview) -> None:
        while len(to):
            part = to[: self.room]
            done = 0
            while done < len(part):
                n = os.preadv(self.fd, [part[done:]], self.at + done)
                if n == 0:
                    raise _Damaged(f"{self.path}: cut short at offset {self.at + done}")
                done += n
            self.crc = native.crc32c(part, self.crc)
            self.at += len(part)
            if self.room == BLOCK:
                self._end_block(self.at - BLOCK)
            to = to[len(part) :]

    def read_padded(self, n: int) -> memoryview:
        """n bytes, and those up to a whole number of pages."""
        data = bytearray(-(-n // PAGE) * PAGE)
        self.read(memoryview(data))
        return memoryview(data)[:n]

    def _end_block(self, start: int) -> None:
        if self.crc != int(self.checks[(start - PAGE) // BLOCK]):
            raise _Damaged(f"{self.path}: damaged between offsets {start} and {self.at}: checksum mismatch")
        self.crc = 0

    def finish(self) -> None:
        if self.room < BLOCK:
            self._end_block(self.at - (self.at - PAGE) % BLOCK)


# ---- removing


def prune(folder: Path, keep: int = 2) -> list[str]:
    """Remove the snapshots that the newest `keep` complete ones do not need; returns their names.

    Complete: the manifest holds, and every file it names is there in its full size. Where none is complete, nothing
    is removed. Raises PenstockError for a snapshot of a newer format.
    """
    if keep < 1:
        raise PenstockError(f"prune: expected to keep at least 1 snapshot, got {keep}")
    needed: set[str] = set()
    complete = 0
    names = list(_names(folder))
    for name in names:
        if complete == keep:
            break
        with contextlib.suppress(_Damaged, OSError):
            manifest = _read_manifest(folder / name / "manifest.json")
            files = [(f, i > 0) for state in manifest.stores.values() for i, f in enumerate(state.files)]
            if all(_is_whole(folder / f.path, f.pages, is_delta) for f, is_delta in files):
                needed |= {name, *(f.path.split("/")[0] for f, _ in files)}
                complete += 1
    removed = [name for name in names if complete and name not in needed]
    going = [folder / f"{TEMPORARY}removed-{name}" for name in removed]
    for name, path in zip(removed, going):
        os.rename(folder / name, path)
    if removed:
        sync_folder(folder)
    for path in going:
        shutil.rmtree(path, ignore_errors=True)
    return removed


def _is_whole(path: Path, pages: int, is_delta: bool) -> bool:
    payload = _payload_bytes(pages, is_delta)
    return path.stat().st_size == PAGE + payload + 4 * _blocks(payload) + 4
