"""Erasure (control path): one entity is forgotten; its key becomes a random tombstone wherever history has it.

In closed segments, in Parquet and in snapshots. What must stay true: afterwards no file of the log holds the key, every
other value has the bits it had, and a kill at any point leaves files that are each whole, old or new; asked again it
finishes, under another tombstone. Flagged values (PS_ERASED beside the status) tell parity which rows to leave out.
"""

from __future__ import annotations

import mmap
import os
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec

from .._ext import log as native
from .._ext import log_columns
from ..errors import LogError
from ..features.layouts import plan_from_layouts
from ..features.snapshot import load_snapshot, prune, sync_folder, write_snapshot
from ..plan import Plan, suggestion
from .batches import Batch, BatchStore, Part, records_from_batch, write_batch
from .compaction import clear_leftovers, writing
from .history import History
from .keeper import one_round
from .log_folder import LogFolder, Segment, located
from .schemas import EventSchema, ScoreSchema, record_schemas

__all__ = ["ErasureReport", "erase", "erase_closed"]

SEALING = 10.0  # seconds that a segment may take to be sealed by a running engine

Schema = EventSchema | ScoreSchema


class ErasureReport(msgspec.Struct, kw_only=True):
    """What was found and written anew. tombstone: what the key is now, as text. warnings: what could not be done."""

    entity: str
    tombstone: str
    events: int = 0
    scores: int = 0
    segments: int = 0
    batches: int = 0
    states: int = 0
    snapshots: int = 0
    removed: list[str] = []
    warnings: list[str] = []

    def __str__(self) -> str:
        if not self.events and not self.scores and not self.states:
            return "\n".join(
                [f"no event of the log has this key of {self.entity}", *(f"removed {n}" for n in self.removed)]
            )
        lines = [
            f"erased one {self.entity}: {self.events:,} events and {self.scores:,} scores in {self.segments} segments "
            f"and {self.batches} batches have the key {self.tombstone} now; state removed from {self.states} stores, "
            f"{self.snapshots} snapshots written anew"
        ]
        lines += [f"removed {name}" for name in self.removed]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


class _Key:
    """The key to be erased and its tombstone, as text and as a number; None where no field of that type holds it."""

    def __init__(self, plan: Plan, schemas: list[Schema], entity: str, key: str | int) -> None:
        self.entity = entity
        self.fields: dict[str, set[str]] = {}
        kinds = set()
        views = [view for view in plan.views.values() if view.entity == entity]
        for view in views:
            self.fields.setdefault(view.event, set()).add(view.key_field)
            kinds |= {field.type for field in plan.events[view.event].fields if field.name == view.key_field}
        # What the log itself says: stores of views that the app has no more, events that only read the entity's views.
        entities = {view.entity for view in plan.views.values()}
        of_view = {view.name: view.entity for view in plan.views.values()}
        events: dict[str, EventSchema] = {}  # of the same segment: they stand before its scores
        for schema in schemas:
            if isinstance(schema, EventSchema):
                events[schema.name] = schema
                found = [(name, schema.fields[at]) for name, at in schema.stores]
                event = schema.name
            else:
                known = events.get(schema.event)
                found = [(of_view.get(view, ""), known.fields[at]) for view, at in schema.reads] if known else []
                event = schema.event
            for name, field in found:
                entities.add(name)
                if name == entity:
                    self.fields.setdefault(event, set()).add(field.name)
                    kinds.add(field.type)
        if not self.fields:
            raise LogError(f"no view has the entity {entity!r}{suggestion(entity, entities - {''})}")
        self.text: bytes | None = None
        self.integer: int | None = None
        self.in_state: str | int = key
        # 1 and "1" are different keys unless the entity's type says otherwise: then fields of both types have it.
        if entity in plan.typed_entities and _is_decimal(str(key)):
            self.in_state = int(key) if views and views[0].key_type == "int64" else str(key)
            self.text, self.integer = str(key).encode(), int(key)
        elif isinstance(key, str):
            self.text = key.encode()
        else:
            self.integer = key
        self.text = self.text if "string" in kinds else None
        self.integer = self.integer if "int64" in kinds else None
        if self.text is None and self.integer is None:
            what = "an integer" if "int64" in kinds else "a string"
            raise LogError(f"{entity}: its key is {what}, not {key!r}")
        self.new_integer = secrets.randbits(63)
        both = self.text is not None and self.integer is not None
        self.new_text = str(self.new_integer).encode() if both else secrets.token_hex(16).encode()

    @property
    def tombstone(self) -> str:
        return self.new_text.decode() if self.text is not None else str(self.new_integer)

    def holders(self, schemas: list[Schema], copies: dict[str, set[str]]) -> list[tuple[list[str], list[int]]]:
        """Schemas as log_columns.erase_key wants them: which fields may hold the key. copies: names of features that
        are values of such a field, per event type."""
        found = []
        for schema in schemas:
            if isinstance(schema, EventSchema):
                names, types = [f.name for f in schema.fields], [f.type for f in schema.fields]
                wanted = self.fields.get(schema.name, set())
            else:
                names, types = [name for name, _ in schema.values], [kind for _, kind in schema.values]
                wanted = self.fields.get(schema.event, set()).union(*copies.values())
            found.append((types, [i for i, n in enumerate(names) if n in wanted]))
        return found


def _is_decimal(text: str) -> bool:
    """Whether a text is how an int64 is written."""
    try:
        return str(int(text)) == text and -(1 << 63) <= int(text) < 1 << 63
    except ValueError:
        return False


def erase(path: str | Path, entity: str, key: str | int) -> ErasureReport:
    """Forget one entity in a log folder that no engine has open: its key becomes a tombstone in every event, in the log
    and in Parquet, and its state leaves the snapshots.

    Raises LogError where the folder is in use or cannot be read; PenstockError where a snapshot cannot be written.
    """
    LogFolder(path)  # it must be there
    folder = LogFolder(path, write=True)
    try:
        folder.remove_spares()
        history = History(folder)
        history.check()
        history.seal()
        with one_round(folder.path):
            return _erase(folder, entity, key, folder.numbers())
    finally:
        folder.close()


def erase_closed(folder: LogFolder, entity: str, key: str | int) -> ErasureReport:
    """The same for the folder of a running engine: in all but its newest segment.

    The engine has begun a new segment and has taken the entity out of its own state before. Waits until the segments
    are sealed, and for a round of the keeper to end.
    """
    with one_round(folder.path):
        return _erase(folder, entity, key, folder.numbers()[:-1])


def _erase(folder: LogFolder, entity: str, key: str | int, numbers: list[int]) -> ErasureReport:
    try:
        plan = plan_from_layouts((folder.path / "layouts.json").read_bytes())
    except FileNotFoundError:
        raise LogError(f"{folder.path}: no layouts.json: no engine has used this log yet") from None
    store = BatchStore.of(folder)
    schemas: list[Schema] = []
    for number in folder.numbers():
        segment = folder.segment(number)
        schemas += segment.schemas()
        segment.close()
    for batch in store.batches():
        schemas += batch.read_schemas()
    what = _Key(plan, schemas, entity, key)
    copies, copying = _copies(plan, what)
    report = ErasureReport(entity=entity, tombstone=what.tombstone)
    clear_leftovers(folder, store)
    # Segments first: a batch is made of segments that are the same as before or gone.
    for number in numbers:
        _erase_segment(folder, number, what, copies, report)
    for batch in store.batches():
        _erase_batch(folder, store, batch, what, copies, report)
    _erase_snapshots(folder, plan, what, copying, report)
    for path in sorted(folder.segments_path.glob("*.cut")):
        if _holds(path, what):
            path.unlink()
            report.removed.append(f"{path} (what could not be read of a damaged segment; it held the key)")
    return report


def _copies(plan: Plan, key: _Key) -> tuple[dict[str, set[str]], set[int]]:
    """Features whose value is a field that may hold the key (`shops.last_customer_1d`), per event type; and the stores
    (fingerprints) that keep such values under other entities' keys."""
    names: dict[str, set[str]] = {}
    stores: set[int] = set()
    for view in plan.views.values():
        layout = plan.stores[view.store]
        fields = plan.events[view.event].fields
        for output in view.outputs:
            column = None if output.column is None else fields[layout.columns[output.column]].name
            if column in key.fields.get(view.event, ()):
                names.setdefault(view.event, set()).add(output.name)
        if any(fields[column].name in key.fields.get(view.event, ()) for column in layout.columns):
            stores.add(layout.fingerprint)
    return names, stores


# ---- the log


def _erase_segment(
    folder: LogFolder, number: int, key: _Key, copies: dict[str, set[str]], report: ErasureReport
) -> None:
    """A closed segment: written to a new file where it has the key, which takes its place by one rename."""
    segment = _sealed(folder, number)
    try:
        end = segment.sealed_end or 0
        prelude = segment.prelude()
        made, events, scores = log_columns.erase_key(
            segment.data,
            segment.log_id,
            number,
            segment.start,
            end,
            record_schemas(prelude.schemas, prelude.end),
            key.holders(prelude.schemas, copies),
            key.text,
            key.integer,
            key.new_text,
            key.new_integer,
        )
        if made is None:
            return
        assert segment.mark is not None
        out = bytearray(segment.start + len(made))
        out[: segment.start] = segment.data[: segment.start]
        out[segment.start :] = memoryview(made)
        native.put_sealed(out, len(out), segment.mark.last_sequence)
    except LogError as error:
        raise located(segment.path, error) from None
    finally:
        segment.close()
    temporary = folder.segments_path / f"spare-erase-{number}"  # removed at the next start if this is killed
    with temporary.open("wb") as stream:
        stream.write(out)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(folder.segment_path(number))
    sync_folder(folder.segments_path)
    report.segments += 1
    report.events += events
    report.scores += scores


def _sealed(folder: LogFolder, number: int) -> Segment:
    """A segment, once it is sealed: a running engine's log does that in its own time."""
    until = time.monotonic() + SEALING
    while True:
        segment = folder.segment(number)
        if segment.sealed_end is not None and segment.head is not None and segment.size >= segment.sealed_end:
            return segment
        segment.close()
        if time.monotonic() > until:
            raise LogError(f"{segment.path}: still open, or damaged; nothing of it was changed")
        time.sleep(0.01)


def _erase_batch(
    folder: LogFolder, store: BatchStore, batch: Batch, key: _Key, copies: dict[str, set[str]], report: ErasureReport
) -> None:
    """A batch: its files are written anew under other names, then the manifest names them, then the old ones go."""
    records = records_from_batch(store, batch)
    start = int(records.offsets[0])
    schemas = batch.read_schemas()
    made, events, scores = log_columns.erase_key(
        records.data,
        batch.log_id,
        batch.number,
        start,
        records.end,
        record_schemas(schemas),
        key.holders(schemas, copies),
        key.text,
        key.integer,
        key.new_text,
        key.new_integer,
    )
    if made is None:
        return
    del records
    data = bytearray(start + len(made))
    data[start:] = memoryview(made)
    draft = msgspec.structs.replace(batch, generation=batch.generation + 1)
    with writing(folder):
        part = Part(f"{store}: batch {batch.name}", data, batch.log_id, batch.number, start, len(data))
        write_batch(store, draft, [part])
        store.remove(file.path for file in batch.files)
    report.batches += 1
    if not any(folder.segment_path(segment.number).exists() for segment in batch.segments):
        report.events += events
        report.scores += scores


# ---- state


def _erase_snapshots(folder: LogFolder, plan: Plan, key: _Key, copying: set[int], report: ErasureReport) -> None:
    """The newest snapshot without the entity, as a new one; the older ones go.

    A store that keeps the key as a value under other entities' keys is left out: it is rebuilt from the log.
    """
    path = folder.snapshots_path
    if not path.is_dir() or not any(path.iterdir()):
        return
    engine = _engine(plan)
    stores = {store.fingerprint: engine.stores[store.index] for store in plan.stores}
    loaded = load_snapshot(path, stores)
    if loaded is None:
        shutil.rmtree(path)
        report.removed.append(f"{path} (no snapshot could be read; the next start rebuilds the state from the log)")
        return
    for store in plan.stores:
        if store.entity == key.entity and store.fingerprint in loaded.loaded:
            report.states += bool(stores[store.fingerprint].erase(key.in_state))
    kept = {f: s for f, s in stores.items() if f in loaded.loaded and f not in copying}
    write_snapshot(path, kept, loaded.position, None)
    prune(path, keep=1)
    report.snapshots += 1
    if copying & set(loaded.loaded):
        names = [f"{s.event} by {s.entity}" for s in plan.stores if s.fingerprint in copying]
        history = History(folder)
        history.check()
        lost = f", which begins with event {history.first_sequence}" if history.first_sequence > 0 else ""
        report.warnings.append(
            f"the state of {', '.join(names)} held the key as a value and left the snapshot; the next start rebuilds "
            f"it from the log{lost}. An engine that runs still holds it"
        )


def _engine(plan: Plan) -> Any:
    from ..engine import Engine

    return Engine(plan, clock="event")


def _holds(path: Path, key: _Key) -> bool:
    """Whether a file has the key's bytes."""
    if not path.stat().st_size:
        return False
    patterns = [key.text] if key.text else []
    patterns += [key.integer.to_bytes(8, "little", signed=True)] if key.integer is not None else []
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return any(data.find(pattern) >= 0 for pattern in patterns)
