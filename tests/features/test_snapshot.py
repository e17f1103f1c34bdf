"""Snapshots of window state: chains of deltas equal the live store; damage, kills, full disks (control path).

What must stay true in every test: what is loaded is a state that was written, or nothing is.
"""

import errno
import hashlib
import os
import random
import resource
import struct
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock import PenstockError
from penstock._ext import snapshot as native
from penstock._ext.windows import Output, WindowStore
from penstock.features import snapshot
from penstock.features.snapshot import SnapshotPosition, load_snapshot, prune, write_snapshot

FIRST, SECOND = 0x0123456789ABCDEF, 7
SEED = bytes(range(16))  # all stores are one engine's
OUTPUTS = [
    Output("count", window=50),
    Output("sum", 0, window=1000),
    Output("var_samp", 0, window=50),
    Output("max", 0),
    Output("last", 1),
    Output("distinct_count", 1, window=1000),
]


def make(fingerprint=FIRST, **more):
    return WindowStore(["float64", "string"], OUTPUTS, lateness=20, fingerprint=fingerprint, seed=SEED, **more)


def apply(store, rng, t, keys=1000):
    row = [rng.choice([None, 0.1, rng.gauss(0, 1e10), 1e-300]), rng.choice([None, f"text {rng.randint(0, 3000)}"])]
    store.apply(rng.randint(0, keys), t - rng.choice([0, 0, 20]), row, log_id=3, sequence=t)


def filled(fingerprint=FIRST, entities=6000, seed=0):
    store, rng = make(fingerprint), random.Random(seed)
    for t in range(2 * entities):
        apply(store, rng, 100 + t // 50, entities)
    return store


def position(sequence, **more):
    return SnapshotPosition(
        log_id=3,
        sequence=sequence,
        ingest_time=sequence * 10,
        watermarks={"Transaction": sequence},
        created=5,
        **more,
    )


def same(loaded, live):
    """Bit for bit, and it goes on in the same way."""
    assert loaded.dump() == live.dump()
    assert sorted(loaded.keys()) == sorted(live.keys())
    assert loaded.stats() == live.stats()
    watermark = live.stats().watermark
    for key in [*live.keys()[:50], "unknown"]:
        for at in (watermark, watermark - 20, watermark + 40):
            assert repr(loaded.read(key, 0, at)) == repr(live.read(key, 0, at))
    one, other = random.Random(1), random.Random(1)
    for t in range(watermark, watermark + 50):
        apply(loaded, one, t)
        apply(live, other, t)
    assert loaded.dump() == live.dump()


@pytest.fixture
def no_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)


# what the extension does


def slow_crc32c(data, crc=0):
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_crc32c_is_castagnoli_and_chains():
    """RFC 3720 B.4 and the usual check value; long buffers go another way than short ones."""
    assert native.crc32c(b"123456789") == 0xE3069283
    assert native.crc32c(bytes(32)) == 0x8A9136AA
    assert native.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert native.crc32c(bytes(range(32))) == 0x46DD794E
    assert native.crc32c(b"") == 0
    data = random.Random(1).randbytes(150_000)
    for n in (0, 1, 7, 8, 9, 3071, 3072, 3073, 3 * 16384 - 1, 3 * 16384, 3 * 16384 + 3072 + 5):
        assert native.crc32c(data[:n]) == slow_crc32c(data[:n])
    whole = native.crc32c(data)
    for cut in (0, 1, 13, 4096, 100_000, 149_999, 150_000):
        assert native.crc32c(data[cut:], native.crc32c(data[:cut])) == whole


def slow_hash(key, page):
    """NH under the key and under the key two words further, each folded modulo 2^61 - 1 (ext/page_delta.h)."""
    k, m, p = struct.unpack("<520Q", key), struct.unpack("<512Q", page), 2**61 - 1
    found = []
    for which in range(2):
        nh = sum(
            (m[i] + k[i + 2 * which]) % 2**64 * ((m[i + 1] + k[i + 1 + 2 * which]) % 2**64) for i in range(0, 512, 2)
        )
        nh %= 2**128
        parts = nh % 2**61, (nh >> 61) % 2**61, nh >> 122
        # the fold takes 61 bits of every key word and of every part
        found.append(sum((k[514 + 3 * which + i] & p) * (part & p) for i, part in enumerate(parts)) % p)
    return found


def test_page_hashes_equal_the_slow_ones_and_only_changed_pages_are_found():
    store = filled(entities=300)
    key = hashlib.shake_256(b"seed").digest(native.KEY_BYTES)
    n = -(-native.state_bytes(store) // native.PAGE)
    hashes, changed = np.zeros((n, 2), np.uint64), np.zeros(n, np.uint32)
    assert native.scan(store, key, 0, n, 0, hashes, changed) == n
    image = bytes(native.pages(store, 0, n))
    for page in range(n):
        assert hashes[page].tolist() == slow_hash(key, image[page * 4096 : (page + 1) * 4096])
    assert native.scan(store, key, 0, n, n, hashes, changed) == 0
    rng = random.Random(2)
    for _ in range(200):
        flipped = bytearray(image)
        pages = sorted(rng.sample(range(1, n), 2))
        for page in pages:
            flipped[page * 4096 + rng.randrange(4096)] ^= 1 << rng.randrange(8)
        native.begin_load(store, native.state_bytes(store))[:] = flipped
        native.commit_load(store, native.state_bytes(store))
        before = hashes.copy()
        found = native.scan(store, key, 0, n, n, before, changed)
        assert changed[:found].tolist() == pages


def test_what_does_not_fit_is_refused_by_the_extension():
    store = filled(entities=100)
    with pytest.raises(ValueError, match="pages"):
        native.pages(store, 0, 10**9)
    with pytest.raises(ValueError, match="fit together"):
        native.scan(store, b"short", 0, 1, 0, np.zeros((1, 2), np.uint64), np.zeros(1, np.uint32))
    with pytest.raises(ValueError, match="no page"):
        native.gather(store, np.array([10**6], np.uint32), bytearray(4096))
    before = store.dump()
    memory = native.begin_load(store, len(before))
    with pytest.raises(ValueError, match="no page"):
        native.scatter(memory, np.array([10**6], np.uint32), bytes(4096))
    with pytest.raises(ValueError, match="not a dump"):
        native.commit_load(store, len(before))
    with pytest.raises(ValueError, match="cut short"):
        native.commit_load(store, len(before))
    with pytest.raises(ValueError, match="cut short"):
        native.begin_load(store, 8)
    with pytest.raises(MemoryError):
        native.begin_load(make(max_bytes=1 << 20), 2 << 20)
    assert store.dump() == before


# round trips


@pytest.mark.usefixtures("no_fsync")
def test_a_snapshot_is_read_back_bit_for_bit(tmp_path):
    live, other = filled(), filled(SECOND, 50)
    path = write_snapshot(tmp_path, {FIRST: live, SECOND: other}, position(17, extra={"name": ["ü", 1]}), None)
    assert path == tmp_path / "00000000000000000017"
    assert sorted(p.name for p in path.iterdir()) == [
        "0000000000000007.base",
        "0123456789abcdef.base",
        "manifest.json",
    ]
    assert native.state_bytes(live) > 3 << 20, "several blocks"
    stores = {FIRST: make(), SECOND: make(SECOND)}
    loaded = load_snapshot(tmp_path, stores)
    assert loaded.position == position(17, extra={"name": ["ü", 1]})
    assert (loaded.path, loaded.loaded, loaded.missing, loaded.skipped) == (path, [FIRST, SECOND], [], [])
    same(stores[FIRST], live)
    same(stores[SECOND], other)


@pytest.mark.usefixtures("no_fsync")
def test_stores_may_be_more_or_fewer_than_the_snapshot_holds(tmp_path):
    live, other = filled(), filled(SECOND, 50)
    write_snapshot(tmp_path, {FIRST: live, SECOND: other}, position(1), None)
    only = {SECOND: make(SECOND)}
    loaded = load_snapshot(tmp_path, only)
    assert (loaded.loaded, loaded.missing) == ([SECOND], [])
    assert only[SECOND].dump() == other.dump()
    more = {FIRST: make(), 99: make(99)}
    more[99].apply("kept", 5, [1.0, "a"])
    loaded = load_snapshot(tmp_path, more)
    assert (loaded.loaded, loaded.missing) == ([FIRST], [99])
    assert more[99].keys() == ["kept"]
    # the next snapshot is of these: one continued, one new, one gone
    path = write_snapshot(tmp_path, more, position(2), loaded)
    assert sorted(p.name for p in path.iterdir()) == ["0000000000000063.base", "manifest.json"]
    stores = {FIRST: make(), SECOND: make(SECOND), 99: make(99)}
    loaded = load_snapshot(tmp_path, stores)
    assert (loaded.loaded, loaded.missing) == ([FIRST, 99], [SECOND])
    same(stores[FIRST], live)


@pytest.mark.usefixtures("no_fsync")
def test_no_snapshot_and_no_store(tmp_path):
    assert load_snapshot(tmp_path / "none", {FIRST: make()}) is None
    assert load_snapshot(tmp_path, {FIRST: make()}) is None
    assert prune(tmp_path) == []
    write_snapshot(tmp_path / "new", {}, position(0), None)
    loaded = load_snapshot(tmp_path / "new", {FIRST: make()})
    assert (loaded.loaded, loaded.missing, loaded.position) == ([], [FIRST], position(0))
    with pytest.raises(PenstockError, match="sequence"):
        write_snapshot(tmp_path, {}, position(-1), None)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("events"), st.integers(0, 10**6), st.sampled_from([1, 5, 60, 700])),
        st.tuples(st.just("erase"), st.integers(0, 600), st.just(0)),
        st.tuples(st.just("sweep"), st.integers(0, 3000), st.just(0)),
        st.tuples(st.just("snapshot"), st.just(0), st.just(0)),
        st.tuples(st.just("snapshot"), st.just(0), st.just(0)),
        st.tuples(st.just("restart"), st.just(0), st.just(0)),
        st.tuples(st.just("prune"), st.integers(1, 3), st.just(0)),
    ),
    max_size=25,
)


@pytest.mark.usefixtures("no_fsync")
def test_any_chain_of_snapshots_gives_the_live_state(tmp_path_factory):
    """Snapshots at random points, each over the last; a restart goes on from what it loads."""

    @settings(max_examples=80, deadline=None, database=None)
    @given(steps)
    def run(steps):
        folder = tmp_path_factory.mktemp("chain")
        live, previous, sequence, t = filled(entities=500), None, 0, 400
        written = {}
        for what, number, more in steps:
            if what == "events":
                rng = random.Random(number)
                for _ in range(more):
                    t += rng.choice([0, 1])
                    apply(live, rng, t, rng.choice([3, 600]))
            elif what == "erase":
                live.erase(number)
            elif what == "sweep":
                live.sweep(t, number)
            elif what == "snapshot":
                sequence += 1
                path = write_snapshot(folder, {FIRST: live}, position(sequence), previous)
                written[path.name] = live.dump()
                loaded = make()
                previous = load_snapshot(folder, {FIRST: loaded})
                assert previous.path == path
                assert loaded.dump() == live.dump()
            elif what == "restart" and previous is not None:
                live = make()
                previous = load_snapshot(folder, {FIRST: live})
                assert live.dump() == written[previous.path.name]
            elif what == "prune":
                prune(folder, number)
        for path in folder.iterdir():  # whatever prune has left can be read
            if path.name in written:
                loaded = make()
                load_snapshot(folder, {FIRST: loaded}, path=path)
                assert loaded.dump() == written[path.name]
        if previous is not None and previous.position.sequence == sequence:
            loaded = make()
            load_snapshot(folder, {FIRST: loaded})
            twin = make()
            twin.load(written[previous.path.name])
            same(loaded, twin)

    run()


@pytest.mark.usefixtures("no_fsync")
def test_deltas_hold_what_changed_and_add_up_to_half_a_base_at_the_most(tmp_path):
    live, rng = filled(), random.Random(4)
    previous, kinds, most = None, [], 0
    for sequence in range(60):
        for _ in range(4):
            apply(live, rng, 400 + sequence, 10)
        path = write_snapshot(tmp_path, {FIRST: live}, position(sequence), previous)
        loaded = make()
        previous = load_snapshot(tmp_path, {FIRST: loaded})
        assert loaded.dump() == live.dump()
        files = previous.pages[FIRST].state.files
        kinds.append(f"{FIRST:016x}.base" in [p.name for p in path.iterdir()])
        most = max(most, len(files))
        assert 2 * sum(f.pages for f in files[1:]) <= files[0].pages
        if not kinds[-1] and len(files) > 2:
            assert files[-1].pages < 150, "ten entities and what they share"
        prune(tmp_path, 1)
        named = {f.path.split("/")[0] for f in files} | {path.name}
        assert {p.name for p in tmp_path.iterdir()} == named, "no more is kept than is needed"
    assert kinds[0]
    assert 1 <= sum(kinds) < 10
    assert most == snapshot.MAX_FILES
    # one that touches everything is a base of its own
    for key in list(live.keys()):
        live.apply(key, 2000, [1.0, "all"])
    path = write_snapshot(tmp_path, {FIRST: live}, position(100), previous)
    assert (path / f"{FIRST:016x}.base").exists()


@pytest.mark.usefixtures("no_fsync")
def test_a_store_that_did_not_change_adds_no_file_and_one_sequence_may_be_written_twice(tmp_path):
    live, other = filled(entities=500), filled(SECOND, 500)
    stores = {FIRST: live, SECOND: other}
    write_snapshot(tmp_path, stores, position(5), None)
    previous = load_snapshot(tmp_path, {FIRST: make(), SECOND: make(SECOND)})
    other.apply("k", 2000, [1.0, "b"])
    path = write_snapshot(tmp_path, stores, position(5, extra={"again": True}), previous)
    assert path.name == "00000000000000000005-001"
    assert sorted(p.name for p in path.iterdir()) == ["0000000000000007.delta", "manifest.json"]
    loaded = load_snapshot(tmp_path, stores := {FIRST: make(), SECOND: make(SECOND)})
    assert loaded.position.extra == {"again": True}
    assert (stores[FIRST].dump(), stores[SECOND].dump()) == (live.dump(), other.dump())


@pytest.mark.usefixtures("no_fsync")
def test_a_chain_is_not_continued_over_files_that_are_gone_or_lie_elsewhere(tmp_path):
    live = filled(entities=500)
    write_snapshot(tmp_path / "a", {FIRST: live}, position(1), None)
    previous = load_snapshot(tmp_path / "a", {FIRST: make()})
    assert (write_snapshot(tmp_path / "b", {FIRST: live}, position(2), previous) / f"{FIRST:016x}.base").exists()
    (tmp_path / "a" / previous.pages[FIRST].state.files[0].path).unlink()
    assert (write_snapshot(tmp_path / "a", {FIRST: live}, position(2), previous) / f"{FIRST:016x}.base").exists()


@pytest.mark.usefixtures("no_fsync")
def test_progress_goes_up_to_the_total(tmp_path):
    live = filled()
    for call in (
        lambda progress: write_snapshot(
            tmp_path, {FIRST: live, SECOND: filled(SECOND, 50)}, position(1), None, progress
        ),
        lambda progress: load_snapshot(tmp_path, {FIRST: make(), SECOND: make(SECOND)}, progress),
        lambda progress: write_snapshot(
            tmp_path, {FIRST: live}, position(2), load_snapshot(tmp_path, {FIRST: make()}), progress
        ),
    ):
        seen = []
        call(lambda done, total, seen=seen: seen.append((done, total)))
        assert seen == sorted(seen)
        assert seen[-1][0] == seen[-1][1] == seen[0][1]
        assert max(b[0] - a[0] for a, b in pairwise(seen)) <= max(1 << 20, seen[-1][1] // 2)


def mapping_flags(at):
    """VmFlags of the process's mapping that holds an address."""
    inside = False
    with open("/proc/self/smaps") as file:
        for line in file:
            if "-" in line.split()[0] and not line.split()[0].endswith(":"):
                low, high = (int(x, 16) for x in line.split()[0].split("-"))
                inside = low <= at < high
            elif inside and line.startswith("VmFlags:"):
                return line.split()[1:]
    return []


@pytest.mark.usefixtures("no_fsync")
def test_small_pages_stay_in_force_when_state_is_loaded(tmp_path):
    """Asked for before a load or after it."""
    live = filled()
    write_snapshot(tmp_path, {FIRST: live}, position(1), None)
    for before in (True, False):
        store = make()
        if before:
            store.small_pages()
        load_snapshot(tmp_path, {FIRST: store})
        if not before:
            store.small_pages()
        assert "nh" in mapping_flags(np.frombuffer(native.pages(store, 0, 1), np.uint8).ctypes.data)
        assert store.dump() == live.dump()


# damage


def three_snapshots(folder):
    """Two bases of their own and a delta over the second; the state of each."""
    live, rng = filled(entities=1500), random.Random(8)
    states = []
    previous = None
    for sequence in (1, 2, 3):
        for _ in range(20):
            apply(live, rng, 400 + sequence, 10)
        write_snapshot(folder, {FIRST: live}, position(sequence), previous if sequence == 3 else None)
        states.append(live.dump())
        previous = load_snapshot(folder, {FIRST: make()})
    return states


@pytest.mark.usefixtures("no_fsync")
def test_every_damaged_byte_is_noticed_and_the_snapshot_before_is_read(tmp_path):
    states = three_snapshots(tmp_path)
    rng = random.Random(5)
    one, two, three = (tmp_path / f"{n:020d}" for n in (1, 2, 3))
    for path, used in (
        (three / f"{FIRST:016x}.delta", two),
        (three / "manifest.json", two),
        (two / f"{FIRST:016x}.base", one),
    ):
        good = path.read_bytes()
        places = {0, 16, 20, 24, 100, 4092, len(good) - 1, len(good) - 5, len(good) // 2}
        places |= {rng.randrange(len(good)) for _ in range(40)} | {
            rng.randrange(min(len(good), 9000)) for _ in range(40)
        }
        for at in sorted(p for p in places if p < len(good)):
            bad = bytearray(good)
            bad[at] ^= 1 << rng.randrange(8)
            path.write_bytes(bad)
            loaded = load_snapshot(tmp_path, {FIRST: (store := make())})
            assert loaded.path == used, at
            assert store.dump() == states[int(used.name) - 1]
            assert len(loaded.skipped) == (2 if used == one else 1)
            for reason in loaded.skipped:
                assert str(path) in reason
            numbers = [int(word.strip(":;,")) for word in loaded.skipped[0].split() if word.strip(":;,").isdigit()]
            if path.suffix != ".json" and "between" in loaded.skipped[0]:
                assert numbers[0] <= at < numbers[1]
                assert numbers[1] - numbers[0] <= 1 << 20
        for size in (0, 1, 100, 4095, 4096, 5000, len(good) // 2, len(good) - 1):
            if size < len(good):
                path.write_bytes(good[:size])
                assert load_snapshot(tmp_path, {FIRST: make()}).path == used
        path.write_bytes(good + b"\0")
        assert load_snapshot(tmp_path, {FIRST: make()}).path == used
        path.unlink()
        loaded = load_snapshot(tmp_path, {FIRST: make()})
        assert loaded.path == used
        assert "missing" in loaded.skipped[0]
        path.write_bytes(good)
    assert load_snapshot(tmp_path, {FIRST: make()}).path == three


@pytest.mark.usefixtures("no_fsync")
def test_nothing_usable_changes_no_store_and_says_why(tmp_path):
    three_snapshots(tmp_path)
    for path in tmp_path.glob("*/*.base"):
        with open(path, "r+b") as file:
            file.seek(1 << 20)
            file.write(b"\xff" * 64)
    store, reasons = filled(entities=50), []
    before = store.dump()
    assert load_snapshot(tmp_path, {FIRST: store}, skipped=reasons) is None
    assert len(reasons) == 3
    assert all("damaged between offsets 4096 and 1052672" in reason for reason in reasons)
    assert store.dump() == before
    with pytest.raises(PenstockError, match=r"00000000000000000001/.*damaged"):
        load_snapshot(tmp_path, {FIRST: store}, path=tmp_path / f"{1:020d}")


@pytest.mark.usefixtures("no_fsync")
def test_files_of_another_snapshot_are_not_taken_for_ones_own(tmp_path):
    three_snapshots(tmp_path)
    one, two = (tmp_path / f"{n:020d}" / f"{FIRST:016x}.base" for n in (1, 2))
    two.write_bytes(one.read_bytes())
    loaded = load_snapshot(tmp_path, {FIRST: make()})
    assert loaded.position.sequence == 1
    assert all("not the file" in reason for reason in loaded.skipped)


@pytest.mark.usefixtures("no_fsync")
def test_prune_counts_whole_snapshots_only(tmp_path):
    three_snapshots(tmp_path)
    delta = tmp_path / f"{3:020d}" / f"{FIRST:016x}.delta"
    delta.write_bytes(delta.read_bytes()[:-1])
    assert prune(tmp_path, 2) == [f"{3:020d}"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{n:020d}" for n in (1, 2)]
    for path in tmp_path.glob("*/manifest.json"):
        path.write_bytes(b"{}")
    assert prune(tmp_path, 1) == [], "none is whole: none is removed"
    with pytest.raises(PenstockError, match="at least 1"):
        prune(tmp_path, 0)


@pytest.mark.usefixtures("no_fsync")
def test_a_newer_format_is_an_error_and_is_not_pruned(tmp_path, monkeypatch):
    live = filled(entities=50)
    monkeypatch.setattr(snapshot, "FORMAT", 2)
    write_snapshot(tmp_path, {FIRST: live}, position(3), None)
    monkeypatch.setattr(snapshot, "FORMAT", 1)
    write_snapshot(tmp_path, {FIRST: live}, position(2), None)
    for call in (lambda: load_snapshot(tmp_path, {FIRST: make()}), lambda: prune(tmp_path, 1)):
        with pytest.raises(PenstockError, match=r"manifest.json: format 2; .*up to 1"):
            call()
    path = tmp_path / f"{2:020d}" / f"{FIRST:016x}.base"
    page = bytearray(path.read_bytes()[:4096])
    page[20] = 2
    page[-4:] = native.crc32c(bytes(page[:-4])).to_bytes(4, "little")
    path.write_bytes(bytes(page) + path.read_bytes()[4096:])
    with pytest.raises(PenstockError, match=r"0123456789abcdef.base: format 2; .*up to 1"):
        load_snapshot(tmp_path, {FIRST: make()}, path=path.parent)


# kills and full disks

CALLS = ("mkdir", "open", "pwrite", "fsync", "close", "rename")


def at_step(monkeypatch, step, do):
    """Let `do` happen instead of the given step among all system calls of a write; returns the counter."""
    count = [0]

    def wrap(call):
        def counted(*args, **kwargs):
            count[0] += 1
            if count[0] == step:
                do()
            return call(*args, **kwargs)

        return counted

    for name in CALLS:
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))
    return count


def test_a_kill_at_any_step_leaves_the_snapshot_before(tmp_path):
    live, rng = filled(entities=1500), random.Random(6)
    write_snapshot(tmp_path, {FIRST: live}, position(1), None)
    previous = load_snapshot(tmp_path, {FIRST: make()})
    old = live.dump()
    apply(live, rng, 500)
    other = filled(SECOND, 1000)
    step, finished = 0, False
    while not finished:
        step += 1
        child = os.fork()
        if child == 0:
            with pytest.MonkeyPatch.context() as patch:
                at_step(patch, step, lambda: os._exit(9))
                try:
                    write_snapshot(tmp_path, {FIRST: live, SECOND: other}, position(2), previous)
                    os._exit(0)
                finally:
                    os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9)
        finished = code == 0
        store = make()
        loaded = load_snapshot(tmp_path, {FIRST: store, SECOND: make(SECOND)})
        assert loaded.skipped == []
        if loaded.position.sequence == 1:
            assert store.dump() == old
        else:
            assert store.dump() == live.dump()
            assert loaded.missing == []
            if not finished:  # killed behind the rename: it is there
                for path in (tmp_path / f"{2:020d}").iterdir():
                    path.unlink()
                (tmp_path / f"{2:020d}").rmdir()
    assert step > 15
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == [], "the next write clears up"
    assert loaded.position.sequence == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_an_error_at_any_step_is_told_and_leaves_the_snapshots_before(tmp_path, number):
    live, rng = filled(entities=500), random.Random(6)
    write_snapshot(tmp_path, {FIRST: live}, position(1), None)
    previous = load_snapshot(tmp_path, {FIRST: make()})
    old = live.dump()
    apply(live, rng, 500)

    def fail():
        raise OSError(number, os.strerror(number))

    for step in range(1, 100):
        with pytest.MonkeyPatch.context() as patch:
            count = at_step(patch, step, fail)
            if step == 1:
                continue  # makes sure of the folder
            told = None
            try:
                path = write_snapshot(tmp_path, {FIRST: live}, position(2), previous)
            except PenstockError as error:
                told = str(error)
        if told is None:
            assert count[0] < step
            break
        assert str(tmp_path / f"{2:020d}") in told
        assert os.strerror(number) in told
        assert "intact" in told
        assert ("it needs " in told) == (number != errno.EIO)
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
        store = make()
        loaded = load_snapshot(tmp_path, {FIRST: store})
        if loaded.position.sequence == 1:
            assert store.dump() == old
        else:  # the folder's own fsync failed after the rename
            assert store.dump() == live.dump()
            for file in loaded.path.iterdir():
                file.unlink()
            loaded.path.rmdir()
    assert path.name == f"{2:020d}"
    assert step > 12


def test_a_disk_that_is_too_small_is_not_filled(tmp_path, monkeypatch):
    live = filled(entities=500)
    real = os.statvfs(tmp_path)

    class Small:
        f_blocks, f_bavail, f_frsize = real.f_blocks, 10, 4096

    monkeypatch.setattr(os, "statvfs", lambda path: Small)
    with pytest.raises(PenstockError, match=r"needs [\d,]+ bytes: 40,960 are free; .*intact"):
        write_snapshot(tmp_path, {FIRST: live}, position(1), None)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_the_system_cuts_off_is_an_error(tmp_path):
    """RLIMIT_FSIZE, as a real limit in a process of its own."""
    live = filled(entities=1500)
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
            with pytest.raises(PenstockError, match=r"needs [\d,]+ bytes: File too large; .*intact"):
                write_snapshot(tmp_path, {FIRST: live}, position(1), None)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert list(tmp_path.iterdir()) == []
