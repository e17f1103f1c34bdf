"""Damaged logs: every byte of a segment flipped, cuts, zeroed, doubled and swapped blocks and files, and power cuts.

What must hold: everything before the damage is read, nothing damaged is read as data, and where records follow that
can be read, opening refuses and says file, offset and how many; a power cut loses only what was not synced.
"""

import itertools
import json
import mmap
import random
import shutil
import struct
from pathlib import Path

import pytest

from oracles.log_app import APP, T0, open_engine, payment, segment_files, visit
from oracles.log_files import HEAD, crc32c, events_of, read_log
from penstock import Engine
from penstock._ext import log as native
from penstock.errors import LogError
from penstock.offline.log_folder import LogFolder

PAGE = 4096


def fill(engine, n, start=0, size=40):
    """Scores and ingests: ids, strings, nulls, two types."""
    for i in range(start, start + n):
        if i % 5 == 4:
            engine.ingest(visit(at=i, customer=f"c{i % 3}"), event="Visit")
        else:
            event = payment(f"e{i}", at=i, customer=f"c{i % 3}", amount=i / 7, note=None if i % 4 else "n" * (i % size))
            engine.score(event, pipeline="pay")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders with the same events: three segments, the last `open` as a killed process leaves it, or `closed`."""
    folder = tmp_path_factory.mktemp("log")
    engine = open_engine(folder / "closed", sync="60s")
    i = 0
    while engine.core.log.stats().number < 3:
        fill(engine, 1, i)
        i += 1
    fill(engine, 60, i)
    while not all(native.segment_mark(p.read_bytes()).end for p in segment_files(folder / "closed")[:2]):
        pass
    engine.sync()
    fill(engine, 40, i + 60)
    # What a killed process leaves: nothing but the mapped pages, which are in the page cache.
    shutil.copytree(folder / "closed", folder / "open", ignore=lambda _, names: [n for n in names if "spare" in n])
    engine.close()
    return folder


def state(engine):
    """Everything a feature says about every customer, and the watermarks."""
    views = {view: engine.features(view, ["c0", "c1", "c2"], as_of=T0 + 10**12).rows for view in ("spend", "visits")}
    return views, [engine.core.watermark(i) for i in range(2)], engine.core.next_sequence


class Expected:
    """The state after the first n events, computed anew by an engine without a log."""

    def __init__(self, folder):
        self.events = events_of(folder)
        self.states = {}

    def state(self, n):
        if n not in self.states:
            engine = open_engine_without_log()
            for event in self.events[:n]:
                engine.ingest(event.values, event=event.schema["name"])
            views, marks, _ = state(engine)
            self.states[n] = views, marks, n
        return self.states[n]


def open_engine_without_log():

    return Engine(APP)


@pytest.fixture(scope="module")
def expected(made):
    return Expected(made / "closed")


def attempt(folder, expected, at_least=0):
    """Open: the number of events that are there, with the right state; or the refusal's text."""
    try:
        engine = open_engine(folder)
    except LogError as error:
        return str(error)
    with engine:
        n = engine.core.next_sequence
        assert n >= at_least
        assert state(engine) == expected.state(n)
        if n < len(expected.events):
            assert engine.recovery.damages, f"{len(expected.events) - n} events are missing and nothing is said"
        assert engine.ingest(payment("new", at=10**6), "Payment") == "applied"
    return n


def copied(made, which, tmp_path, name="log"):
    return Path(shutil.copytree(made / which, tmp_path / name))


def test_the_undamaged_log(made, expected, tmp_path):
    assert attempt(copied(made, "closed", tmp_path, "a"), expected) == len(expected.events)
    assert attempt(copied(made, "open", tmp_path, "b"), expected) == len(expected.events)


@pytest.mark.parametrize(("which", "number"), [("closed", 2), ("open", 3)])
def test_every_byte_flipped(made, tmp_path, which, number):
    """64 KiB, byte by byte: sealed, and as a killed process leaves it."""
    path = copied(made, which, tmp_path) / "segments" / f"{number:012d}.log"
    original = path.read_bytes()
    assert len(original) > 60_000
    records = [r for r in read_log(tmp_path / "log") if r.segment == number]
    ends = [r.offset + r.length for r in records]
    folder = LogFolder(tmp_path / "log")
    folder.write = True  # nobody writes it: mapped, not copied
    synced = native.segment_mark(original).synced
    rng = random.Random(1)
    hit = 0  # records that end at or before the flipped byte
    with path.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as data:
        for at in range(len(original)):
            while hit < len(records) and ends[hit] <= at:
                hit += 1
            data[at] = original[at] ^ rng.randrange(1, 256)
            refused = None
            segment = None
            try:
                segment = folder.segment(number)
                end, damages, scan = folder.check(segment)
                assert segment.data[HEAD:end] == original[HEAD:end]
            except LogError as error:
                refused = str(error)
            finally:
                if segment is not None:
                    segment.close()
            in_record = hit < len(records) and records[hit].offset <= at
            if refused is not None:
                # A record that was hit, with others behind it: said exactly.
                assert in_record
                assert hit < len(records) - 1
                assert f"{path} at offset {records[hit].offset}: damaged" in refused
                assert f"; {len(records) - 1 - hit} readable records follow" in refused
            elif in_record:
                assert hit == len(records) - 1
                assert (end, scan.records) == (records[hit].offset, hit)
                assert damages[-1].kind == ("damaged" if end < synced else "tail")
            else:
                # The header, a mark, or behind the last record: all is read; what can be known is said.
                assert (end, scan.records) == (ends[-1], len(records))
                kinds = [d.kind for d in damages]
                if at < 56:
                    assert kinds == ["header"]
                elif at >= ends[-1]:
                    assert kinds == ["tail"]
                else:
                    assert kinds in ([], ["short"])
                    assert kinds == [] or at // 1024 in (1, 2)
            data[at] = original[at]


@pytest.mark.parametrize("which", ["closed", "open"])
def test_flips_of_whole_logs(made, expected, tmp_path, which):
    """Random bytes of any segment, through a whole start of the engine."""
    rng = random.Random(which)
    log = copied(made, which, tmp_path)
    records = read_log(log)
    files = segment_files(log)
    refusals = 0
    for i in range(60):
        work = Path(shutil.copytree(log, tmp_path / f"flip{i}"))
        number = rng.randrange(len(files))
        path = work / "segments" / files[number].name
        data = bytearray(path.read_bytes())
        at = rng.randrange(len(data)) if i % 4 else rng.randrange(HEAD)
        data[at] ^= rng.randrange(1, 256)
        path.write_bytes(data)
        before = sum(r.kind == "event" for r in records if (r.segment, r.offset + r.length) <= (number + 1, at))
        found = attempt(work, expected, before)
        if isinstance(found, str):
            refusals += 1
            assert path.name in found
            assert "at offset" in found
            assert "readable records follow" in found
            assert (work / "segments" / files[number].name).read_bytes() == data, "a refusal changes nothing"
        shutil.rmtree(work)
    assert refusals


@pytest.mark.parametrize(("which", "number"), [("closed", 2), ("closed", 3), ("open", 3)])
def test_truncations(made, expected, tmp_path, which, number):
    rng = random.Random(number)
    log = copied(made, which, tmp_path)
    records = read_log(log)
    name = f"{number:012d}.log"
    size = (log / "segments" / name).stat().st_size
    lengths = [0, 1, 63, 64, 1000, 4095, 4096, 4097, size - 1, *(rng.randrange(HEAD, size) for _ in range(12))]
    lengths += [r.offset for r in records[-60::10] if r.segment == number]
    last = max(r.offset + r.length for r in records if r.segment == number)
    for length in lengths:
        work = Path(shutil.copytree(log, tmp_path / "work"))
        with (work / "segments" / name).open("r+b") as stream:
            stream.truncate(length)
        before = sum(r.kind == "event" for r in records if (r.segment, r.offset + r.length) <= (number, length))
        found = attempt(work, expected, before)
        if number == 2 or isinstance(found, str):
            assert isinstance(found, str), f"{length}: a segment that lost its end, and another one behind it"
            assert name in found or "are missing" in found
        elif length < last:
            assert found == before
        shutil.rmtree(work)


def damaged_blocks(rng, data, other):
    """A block zeroed, doubled, filled, or taken from another segment."""
    at = rng.randrange(HEAD, len(data) - 512) // 512 * 512
    size = rng.choice([512, 512, PAGE])
    kind = rng.choice(["zero", "double", "noise", "other", "same place of another"])
    if kind == "zero":
        block = bytes(size)
    elif kind == "noise":
        block = rng.randbytes(size)
    else:
        source = other if kind.endswith("other") or "another" in kind else data
        place = at if kind.startswith("same") else rng.randrange(HEAD, len(source) - size) // 8 * 8
        block = bytes(source[place : place + size])
    block = block[: len(data) - at]
    changed = data[at : at + len(block)] != block
    data[at : at + len(block)] = block
    return at, changed


@pytest.mark.parametrize("which", ["closed", "open"])
def test_blocks(made, expected, tmp_path, which):
    rng = random.Random(which)
    log = copied(made, which, tmp_path)
    records = read_log(log)
    files = [p.name for p in segment_files(log)]
    texts = set()
    for _ in range(60):
        work = Path(shutil.copytree(log, tmp_path / "work"))
        number = rng.randrange(len(files))
        path = work / "segments" / files[number]
        data = bytearray(path.read_bytes())
        at, _ = damaged_blocks(rng, data, (work / "segments" / files[(number + 1) % 3]).read_bytes())
        path.write_bytes(data)
        before = sum(r.kind == "event" for r in records if (r.segment, r.offset + r.length) <= (number + 1, at))
        found = attempt(work, expected, before)
        texts.add(isinstance(found, str))
        if isinstance(found, str):
            assert path.name in found
        shutil.rmtree(work)
    assert texts == {True, False} or which == "closed"


def test_files_in_each_others_place(made, expected, tmp_path):
    log = copied(made, "closed", tmp_path)
    one, two, three = segment_files(log)

    def fresh():
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
        return Path(shutil.copytree(log, tmp_path / "work")) / "segments"

    work = fresh()
    (work / one.name).rename(work / "x")
    (work / two.name).rename(work / one.name)
    (work / "x").rename(work / two.name)
    assert "under another's name" in attempt(work.parent, expected)
    work = fresh()
    shutil.copy(work / two.name, work / three.name)
    assert "under another's name" in attempt(work.parent, expected)
    work = fresh()
    shutil.copy(work / three.name, work / "000000000004.log")
    assert "under another's name" in attempt(work.parent, expected)
    work = fresh()
    (work / two.name).unlink()
    assert two.name in attempt(work.parent, expected)
    assert "missing" in attempt(work.parent, expected)
    work = fresh()
    (work / one.name).unlink()
    assert "missing" in attempt(work.parent, expected)
    for name in (one.name, two.name, three.name):
        work = fresh()
        (work / name).unlink()
        (work / name).mkdir()
        found = attempt(work.parent, expected)
        assert name in found
        assert "directory" in found
    for name in (one.name, two.name):
        work = fresh()
        (work / name).write_bytes(b"")
        assert isinstance(attempt(work.parent, expected), str)
    # A segment of another log.
    with open_engine(tmp_path / "other") as engine:
        fill(engine, 300)
    work = fresh()
    shutil.copy(segment_files(tmp_path / "other")[1], work / two.name)
    assert "of another log" in attempt(work.parent, expected)


def test_an_empty_file_at_the_end(made, expected, tmp_path):
    """What a power cut leaves of a segment that was just begun; the log goes on, and opens again and again."""
    for content in (b"", bytes(100), bytes(1 << 16)):
        log = copied(made, "closed", tmp_path)
        (log / "segments" / "000000000004.log").write_bytes(content)
        for round in range(3):
            with open_engine(log) as engine:
                assert engine.core.next_sequence == len(expected.events) + round
                engine.ingest(payment(f"more{round}", at=10**6 + round), "Payment")
        shutil.rmtree(log)


def test_log_json(made, expected, tmp_path):
    """Every byte of it flipped, cut, empty, missing, a folder, of a newer version."""
    log = copied(made, "closed", tmp_path)
    path = log / "log.json"
    original = path.read_bytes()
    rng = random.Random(3)
    for at in range(len(original)):
        data = bytearray(original)
        data[at] ^= rng.randrange(1, 256)
        path.write_bytes(data)
        try:
            found = LogFolder(log).log_id
        except LogError as error:
            found = str(error)
        # Refused, or nothing that counts was touched.
        assert found == json.loads(original)["log_id"] or "log.json" in str(found)
    for data in (b"", original[:-1], original[: len(original) // 2], b"null", b"[]", b"\xff" * 40):
        path.write_bytes(data)
        assert "log.json" in attempt(log, expected)
    path.write_bytes(original.replace(b'"format":1', b'"format":9'))
    assert "log.json" in attempt(log, expected)
    identity = json.loads(original)
    path.write_text(json.dumps({"format": 9, "log_id": identity["log_id"], "created": 1}))
    assert "newer version" in attempt(log, expected)
    # Another log's identity: nothing is read as that log's, nothing is lost.
    path.write_text(json.dumps({"format": 1, "log_id": 12345, "created": 1}))
    assert "of another log" in attempt(log, expected)
    path.unlink()
    assert "missing" in attempt(log, expected)
    path.mkdir()
    assert "log.json" in attempt(log, expected)
    path.rmdir()
    path.write_bytes(original)
    assert attempt(log, expected) == len(expected.events)


def test_a_newer_version(made, expected, tmp_path):
    log = copied(made, "closed", tmp_path)
    path = segment_files(log)[1]
    data = bytearray(path.read_bytes())
    head = native.segment_head(data)
    struct.pack_into("<I", data, 8, head.format + 1)
    # The checksum is of magic, format and the fields behind it.
    struct.pack_into("<I", data, 12, crc32c(bytes(data[16:56]), crc32c(bytes(data[:12]))))
    path.write_bytes(data)
    found = attempt(log, expected)
    assert "newer version" in found
    assert path.name in found


def test_damage_that_is_behind_a_sync_is_kept(made, expected, tmp_path):
    """The end of what was on disk is lost: said, and the file as it was is kept beside."""
    log = copied(made, "closed", tmp_path)
    path = segment_files(log)[-1]
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with open_engine(log) as engine:
        assert [d.kind for d in engine.recovery.damages] == ["damaged"]
        assert any("damaged" in line for line in engine.recovery.lines())
        engine.ingest(payment("new", at=10**6), "Payment")
    assert path.with_suffix(".log.cut").read_bytes() == data
    with open_engine(log) as engine:
        assert engine.recovery.damages == []


# Power cuts


def cut_power(rng, path, versions, synced, block):
    """A file as the disk may hold it: each block behind the last sync as in any version since. Returns the bytes."""
    newest = versions[-1]
    data = bytearray(len(newest))
    for at in range(0, len(newest), block):
        if at + block <= synced and at >= HEAD:  # a block that was synced in part has that part in every version
            data[at : at + block] = newest[at : at + block]
        else:
            version = rng.choice(versions) if rng.random() < 0.6 else newest
            data[at : at + block] = version[at : at + block]
    path.write_bytes(data)
    return data


@pytest.mark.parametrize("block", [PAGE, 512])
def test_a_power_cut_loses_only_what_was_not_synced(tmp_path, block):
    rng = random.Random(block)
    log = tmp_path / "log"
    engine = open_engine(log, sync="60s", segment_bytes=1 << 17)
    fill(engine, 100)
    engine.sync()
    path = segment_files(log)[-1]
    synced = engine.core.log.stats().synced  # of the first segment: an offset
    on_disk = engine.core.next_sequence
    versions = [path.read_bytes()]
    for i in range(6):
        fill(engine, 40, 100 + 40 * i)
        versions.append(path.read_bytes())
    assert len(segment_files(log)) == 1
    shutil.copytree(log, tmp_path / "base", ignore=lambda _, names: [n for n in names if "spare" in n])
    engine.close()
    expected = Expected(log)
    holes = 0
    for _ in range(80):
        work = Path(shutil.copytree(tmp_path / "base", tmp_path / "work"))
        data = cut_power(rng, segment_files(work)[-1], versions, synced, block)
        with open_engine(work) as engine:
            n = engine.core.next_sequence
            kinds = {d.kind for d in engine.recovery.damages}
            assert n >= on_disk
            assert state(engine) == expected.state(n)
            assert kinds <= {"unsynced", "tail", "header"}
            if "unsynced" in kinds:
                holes += 1
                assert segment_files(work)[0].with_suffix(".log.cut").read_bytes() == data
            engine.ingest(payment("new", at=10**6), "Payment")
        with open_engine(work) as engine:
            assert engine.core.next_sequence == n + 1
            assert engine.recovery.damages == []
        shutil.rmtree(work)
    assert holes > 10


def test_a_power_cut_loses_nothing_acknowledged_under_always(tmp_path):
    """At each answer: what was acknowledged is on disk, whatever becomes of what was written since."""
    rng = random.Random(5)
    log = tmp_path / "log"
    engine = open_engine(log, sync="always", segment_bytes=1 << 17)
    path = segment_files(log)[-1]
    answers = []
    for i in range(200):
        fill(engine, 1, i)
        if i % 10 == 9:
            answers.append((path.read_bytes(), engine.core.log.stats().synced, engine.core.next_sequence))
    shutil.copytree(log, tmp_path / "base", ignore=lambda _, names: [n for n in names if "spare" in n])
    engine.close()
    expected = Expected(log)
    for now, later in itertools.pairwise(answers):
        _, synced, sequence = now
        for _ in range(3):
            work = Path(shutil.copytree(tmp_path / "base", tmp_path / "work"))
            # The later marks are put when what they speak of is on disk.
            written = now[0][:HEAD] + later[0][HEAD:]
            cut_power(rng, segment_files(work)[-1], [now[0], written], synced, 512)
            with open_engine(work) as engine:
                assert engine.core.next_sequence >= sequence
                assert state(engine) == expected.state(engine.core.next_sequence)
            shutil.rmtree(work)


@pytest.fixture(scope="module")
def rolled(tmp_path_factory):
    """A folder as it is between a roll and the sync after it: segment 1 full but not sealed, segment 2 begun."""
    log = tmp_path_factory.mktemp("rolled") / "log"
    engine = open_engine(log, sync="60s")
    fill(engine, 50)
    engine.sync()
    synced, on_disk = engine.core.log.stats().synced, engine.core.next_sequence
    i = 50
    while engine.core.log.stats().number == 1:
        full = segment_files(log)[0].read_bytes()
        fill(engine, 1, i)
        i += 1
    fill(engine, 30, i)
    folder = log.with_name("base")
    shutil.copytree(log, folder, ignore=lambda _, names: [n for n in names if "spare" in n])
    first = segment_files(folder)[0]
    # `full` lacks what went into the segment in the call that rolled (its event may be there, its score not).
    sealed = first.read_bytes()
    whole = bytearray(full)
    whole[HEAD : len(sealed)] = sealed[HEAD:]
    first.write_bytes(whole)
    engine.close()
    return folder, Expected(log), synced, on_disk


def test_a_crash_after_a_roll(rolled, tmp_path):
    folder, expected, _, _ = rolled
    work = Path(shutil.copytree(folder, tmp_path / "work"))
    assert attempt(work, expected) == len(expected.events)


def test_a_power_cut_after_a_roll(rolled, tmp_path):
    """A hole in the full segment, which nothing has synced: what follows it, in the next file too, goes."""
    folder, expected, synced, on_disk = rolled
    rng = random.Random(7)
    for _ in range(30):
        work = Path(shutil.copytree(folder, tmp_path / "work"))
        first, second = segment_files(work)
        data = bytearray(first.read_bytes())
        at = rng.randrange((synced + PAGE) // PAGE, len(data) // PAGE - 2) * PAGE
        data[at : at + PAGE] = bytes(PAGE)
        first.write_bytes(data)
        if rng.random() < 0.5:
            begun = bytearray(second.read_bytes())
            begun[:PAGE] = bytes(PAGE)
            second.write_bytes(begun)
        with open_engine(work) as engine:
            n = engine.core.next_sequence
            assert on_disk <= n < len(expected.events)
            assert state(engine) == expected.state(n)
            assert "unsynced" in {d.kind for d in engine.recovery.damages}
            engine.ingest(payment("new", at=10**6), "Payment")
        with open_engine(work) as engine:
            assert engine.core.next_sequence == n + 1
        shutil.rmtree(work)


def test_a_hole_before_a_synced_segment_is_damage(rolled, tmp_path):
    """A segment is synced only when the one before it is sealed: a hole there is no power cut."""
    folder, expected, synced, _ = rolled
    work = Path(shutil.copytree(folder, tmp_path / "work"))
    first, second = segment_files(work)
    data = bytearray(first.read_bytes())
    at = (synced + 2 * PAGE) // PAGE * PAGE
    data[at : at + PAGE] = bytes(PAGE)
    first.write_bytes(data)
    begun = bytearray(second.read_bytes())
    head = native.segment_head(begun)
    end = native.scan(begun, head.log_id, head.number).end
    native.put_sealed(begun, end, len(expected.events) - 1)
    second.write_bytes(begun[:end])
    found = attempt(work, expected)
    assert isinstance(found, str)
    assert first.name in found
