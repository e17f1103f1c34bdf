"""Event ids: the native table against dicts, its hash against SipHash written plainly, memory, pauses, kept decisions.

What must stay true: an entry that is not forgotten is found, nothing else is, and no call grows with the table.
"""

import gc
import os
import random
import struct
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock._ext.event_ids import LEAST_KEPT, LEAST_LIMIT, MOST_LIMIT, Entry, EventIds, KeptDecisions

M = (1 << 64) - 1
SEED = bytes(range(16))
FEW_PLACES = (1 << 128) - (1 << 32)  # every id in the first bucket
FEW_HASHES = 0b111 << 64 | 0b11  # 32 hashes in all
ONE_TAG = (1 << 120) - 1  # the byte that tells entries of a line apart is the same for all


# ---- the oracles ----


def siphash(key, data, c=1, d=3):
    """SipHash-c-d with 128 bits of output, from the paper."""
    k0, k1 = struct.unpack("<QQ", key)
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D ^ 0xEE, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573]

    def rotate(x, b):
        return (x << b | x >> (64 - b)) & M

    def rounds(n):
        for _ in range(n):
            v[0] = v[0] + v[1] & M
            v[2] = v[2] + v[3] & M
            v[1] = rotate(v[1], 13) ^ v[0]
            v[3] = rotate(v[3], 16) ^ v[2]
            v[0] = rotate(v[0], 32)
            v[2] = v[2] + v[1] & M
            v[0] = v[0] + v[3] & M
            v[1] = rotate(v[1], 17) ^ v[2]
            v[3] = rotate(v[3], 21) ^ v[0]
            v[2] = rotate(v[2], 32)

    padded = data + bytes(7 - len(data) % 8) + bytes([len(data) & 255])
    for (word,) in struct.iter_unpack("<Q", padded):
        v[3] ^= word
        rounds(c)
        v[0] ^= word
    v[2] ^= 0xEE
    rounds(d)
    low = v[0] ^ v[1] ^ v[2] ^ v[3]
    v[1] ^= 0xDD
    rounds(d)
    return low | (v[0] ^ v[1] ^ v[2] ^ v[3]) << 64


class Plain:
    """The table as a dict: (hash, pipeline) -> (position, has_decision); positions below floor are forgotten."""

    def __init__(self):
        self.entries, self.floor = {}, 0

    def put(self, key, pipeline, position, has_decision):
        self.entries[key, pipeline] = (position, has_decision)

    def find(self, key):
        return sorted(
            Entry(pipeline, *entry)
            for (k, pipeline), entry in self.entries.items()
            if k == key and entry[0] >= self.floor
        )


# ---- hash ----


def test_the_hash_is_siphash():
    published = "a3817f04ba25a8e66df67214c7550293"  # SipHash-2-4-128 of nothing under this key
    assert siphash(SEED, b"", 2, 4).to_bytes(16, "little").hex() == published
    ids = EventIds(SEED)
    source = random.Random(1)
    for size in [*range(40), 255, 256, 1000]:
        text = "".join(chr(source.randrange(1, 0x250)) for _ in range(size))
        assert ids.hash(text) == siphash(SEED, text.encode() + b"\0")
    for number in (0, 1, -1, 2**63 - 1, -(2**63)):
        assert ids.hash(number) == siphash(SEED, struct.pack("<q", number) + b"\1")


def test_a_seed_of_its_own_is_random():
    assert EventIds().hash("a") != EventIds().hash("a")


def test_ids_of_different_types_are_different():
    ids = EventIds()
    given = ["", "\0", "1", 1, 0, "0", -1, 2**63 - 1, -(2**63), "é", "e", "\0" * 7, "\0" * 8, "\0" * 9]
    given += ["x" * 1_000_000, "x" * 999_999]
    for at, id in enumerate(given):
        assert id not in ids
        ids.put(id, 0, at)
    for at, id in enumerate(given):
        assert ids.find(id) == [Entry(0, at, True)]


@pytest.mark.parametrize("wrong", [1.0, b"a", None, True, ("a", 1)])
def test_an_id_of_another_type_is_refused(wrong):
    with pytest.raises(TypeError, match="event id: expected a string or an integer"):
        EventIds().put(wrong, 0, 0)


def test_what_is_out_of_range_is_refused():
    ids = EventIds()
    for pipeline, position in ((-1, 0), (32767, 0), (0, -1), (0, 2**48), ("a", 0)):
        with pytest.raises(ValueError, match="expected an integer within"):
            ids.put("a", pipeline, position)
    with pytest.raises(OverflowError):
        ids.put(2**63, 0, 0)
    with pytest.raises(UnicodeEncodeError):
        ids.put("\ud800", 0, 0)
    with pytest.raises(ValueError, match="remember"):
        ids.advance(0, 0, -1)
    for limit in (0, LEAST_LIMIT - 1, MOST_LIMIT + 1):
        with pytest.raises(ValueError, match="limit: expected bytes"):
            EventIds(limit=limit)
    with pytest.raises(ValueError, match="seed: expected 16 bytes"):
        EventIds(b"short")
    ids.put("a", 32766, 2**48 - 1, False)
    assert ids.find("a") == [Entry(32766, 2**48 - 1, False)]
    assert ids.stats().ids == 1


# ---- find, put, forget ----


SOME = st.sampled_from(["", "1", 1])
IDS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(0, 30), st.text(max_size=20), SOME)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), IDS, st.integers(0, 3), st.booleans(), st.integers(0, 3)),
        st.tuples(st.just("find"), IDS, st.integers(0, 3)),
        st.tuples(st.just("forget"), st.integers(0, 60)),
        st.tuples(st.just("tend"), st.integers(0, 20)),
    ),
    max_size=120,
)


@settings(max_examples=150, deadline=None)
@given(STEPS, st.sampled_from([(1 << 128) - 1, FEW_PLACES, FEW_HASHES, ONE_TAG]))
def test_any_steps_against_a_dict(steps, mask):
    ids, plain, position = EventIds(SEED, hash_mask=mask), Plain(), 40
    for step in steps:
        match step:
            case ("put", id, pipeline, has_decision, back):
                position += 1
                ids.put(id, pipeline, position - back, has_decision)
                plain.put(ids.hash(id), pipeline, position - back, has_decision)
            case ("find", id, pipeline):
                found = plain.find(ids.hash(id))
                assert ids.find(id) == found
                assert (id in ids) == bool(found)
                decision = [e.position for e in found if e.pipeline == pipeline and e.has_decision]
                assert ids.decided(id, pipeline) == (decision[0] if decision else None)
            case ("forget", back):
                ids.forget_before(position - back if back < position else 0)
                plain.floor = max(plain.floor, position - back)
            case ("tend", n):
                assert ids.tend(n) <= n
        assert ids.check() is None
    for key, pipeline in list(plain.entries):
        assert [e for e in plain.find(key) if e.pipeline == pipeline] == [
            e for e in ids_by_hash(ids, steps, key) if e.pipeline == pipeline
        ]


def ids_by_hash(ids, steps, key):
    return next(ids.find(step[1]) for step in steps if step[0] == "put" and ids.hash(step[1]) == key)


@pytest.mark.parametrize("mask", [(1 << 128) - 1, ONE_TAG, FEW_PLACES + 63, FEW_PLACES])
def test_growing_and_shrinking_many_times_against_a_dict(mask):
    source = random.Random(mask)
    ids, plain, position, seen = EventIds(SEED, hash_mask=mask), Plain(), 0, []
    sizes = (3000, 200, 4000, 0, 2500) if mask == (1 << 128) - 1 or mask == ONE_TAG else (800, 50, 1000, 0)
    for size in sizes:
        while len(seen) < size:
            position += 1
            again = seen and source.random() < 0.2
            id = source.choice(seen)[0] if again else source.choice([position, f"id-{position}"])
            pipeline, decided = source.randrange(4), source.random() < 0.7
            seen.append((id, position))
            ids.put(id, pipeline, position, decided)
            plain.put(ids.hash(id), pipeline, position, decided)
        if len(seen) > size:
            floor = seen[len(seen) - size - 1][1] + 1
            seen = seen[len(seen) - size :]
            ids.forget_before(floor)
            plain.floor = floor
            plain.entries = {k: e for k, e in plain.entries.items() if e[0] >= floor}
            while ids.tend(17):
                assert ids.check() is None
        assert ids.check() is None
        by_key = {}
        for (key, pipeline), entry in plain.entries.items():
            by_key.setdefault(key, []).append(Entry(pipeline, *entry))
        for id, _ in seen:
            assert ids.find(id) == sorted(by_key[ids.hash(id)])
        assert not any(f"none-{i}" in ids for i in range(500))
    stats = ids.stats()
    assert stats.ids >= len(plain.entries)
    assert stats.forgotten_early == 0


def test_forgetting_is_at_once_and_memory_follows():
    ids = EventIds()
    ids.put_many(list(range(1000)), 0, 1)
    ids.forget_before(901)
    assert [i for i in range(1000) if i in ids] == list(range(900, 1000))
    assert ids.stats().ids == 1000
    assert ids.tend(100) == 100
    ids.put("new", 0, 2000)
    assert ids.stats().ids == 897
    assert ids.tend(10_000) == 796
    assert ids.tend(10_000) == 0
    assert ids.stats()[:1] + ids.stats()[2:4] == (101, 900, 0)
    ids.forget_before(5)  # never back
    assert 0 not in ids
    assert ids.stats().floor == 901
    ids.put("old", 0, 900)
    assert "old" not in ids
    ids.put("new", 0, 3)  # what is said last holds
    assert "new" not in ids


def test_an_old_entry_put_again_stays_and_does_not_hold_up_its_neighbours():
    ids = EventIds()
    ids.put_many(list(range(5000)), 0, 1)
    ids.put(0, 0, 6000)
    ids.put(1, 0, 6001, False)
    ids.forget_before(5001)
    ids.tend(1 << 20)
    assert ids.stats().ids == 2
    assert ids.find(0) == [Entry(0, 6000, True)]
    assert ids.find(1) == [Entry(0, 6001, False)]
    assert ids.check() is None


def test_more_pipelines_than_a_line_holds():
    ids = EventIds()
    for pipeline in range(300):
        ids.put("a", pipeline, 1000 + pipeline, pipeline % 3 == 0)
    assert ids.find("a") == [Entry(p, 1000 + p, p % 3 == 0) for p in range(300)]
    assert ids.decided("a", 299) is None
    assert ids.decided("a", 297) == 1297
    ids.forget_before(1299)
    assert ids.find("a") == [Entry(299, 1299, False)]


# ---- time ----


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 400), min_size=1, max_size=200), st.sampled_from([0, 1, 7, 100, 160, 1000]))
def test_an_id_is_remembered_as_long_as_said_and_a_sixteenth_longer_at_most(steps, remember):
    ids, watermark, put = EventIds(SEED), 10, []
    for position, step in enumerate(steps, 1):
        watermark += step // 8 if step < 390 else step
        ids.advance(watermark, position, remember)
        ids.put(position, 0, position)
        put.append((position, watermark))
        for id, under in put:
            if watermark - under <= remember:
                assert id in ids
            if watermark - under > remember + max(remember // 16, 1):
                assert id not in ids


def test_a_watermark_that_is_set_back_is_that_of_all_before():
    ids = EventIds()
    for position in range(1, 101):
        ids.advance(1000 * position, position, 10_000)
        ids.put(position, 0, position)
    ids.advance(5_000, 101, 10_000)
    assert 90 in ids
    for position in range(101, 120):
        ids.advance(5_000 + 1_000 * (position - 100), position, 10_000)
        ids.put(position, 0, position)
        assert (90 in ids) == (100 in ids) == (position <= 110)


def test_time_slices_do_not_run_out():
    ids = EventIds()
    source = random.Random(3)
    watermark = 0
    for position in range(1, 20_000):
        watermark += source.choice([1, 1, 5, 9, 10, 11, 300])
        ids.advance(watermark, position, 160 + position // 100)
        ids.put(position, 0, position)
    assert ids.stats().ids < 400
    assert ids.check() is None


# ---- memory ----


OTHERS = 8 << 20  # what other threads of the process may take meanwhile


def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_at_most_32_bytes_an_id_growing_and_shrinking_and_memory_goes_back():
    ids, n, block, sizes = EventIds(SEED), 1_000_000, 5000, {}
    blocks = [list(range(at, at + block)) for at in range(0, n, block)]
    gc.collect()
    before = resident()
    for numbers in blocks:
        ids.put_many(numbers, 1, numbers[0])
        stats = ids.stats()
        sizes[stats.ids] = stats.bytes / stats.ids
    assert list(sizes)[-1] == n
    assert max(bytes for size, bytes in sizes.items() if size >= 10_000) <= 32
    assert max(sizes[size] for size in (50_000, 200_000, 1_000_000)) <= 31
    full = resident() - before
    assert full <= 33 * n + OTHERS, f"{full / n:.1f} bytes an id are resident"
    for floor in range(block, n + 1, block):
        ids.forget_before(floor)
        while ids.tend(1000):
            pass
        stats = ids.stats()
        assert stats.ids == n - floor
        assert stats.bytes <= 32 * stats.ids or stats.ids < 50_000, stats
    assert stats.bytes < 50_000
    assert resident() - before < 2_000_000 + OTHERS
    assert ids.check() is None


def test_a_window_that_slides_holds_what_it_needs_for_ever():
    ids = EventIds(SEED, limit=4 << 20)  # twelve times round the ring's addresses
    before = resident()
    for at in range(0, 3_000_000, 1000):
        ids.put_many(list(range(at, at + 1000)), 0, at)
        ids.forget_before(max(0, at - 49_000))
    stats = ids.stats()
    assert stats.ids <= 52_000
    assert stats.bytes <= 32 * stats.ids
    assert stats.forgotten + stats.ids == 3_000_000
    assert stats.forgotten_early == 0
    assert resident() - before < 3_000_000 + OTHERS
    assert all(i in ids for i in range(2_951_000, 3_000_000))
    assert ids.check() is None


@pytest.mark.parametrize("limit", [LEAST_LIMIT, 1 << 20, 5_000_000])
def test_at_the_limit_the_oldest_go(limit):
    ids, n = EventIds(SEED, limit=limit), 3 * limit // 20
    for at in range(0, n, 100):
        ids.put_many(list(range(at, at + 100)), 0, at)
        assert ids.stats().bytes <= limit
    stats = ids.stats()
    assert stats.limit == limit
    assert stats.forgotten == 0
    assert stats.ids + stats.forgotten_early == -(-n // 100) * 100
    assert stats.ids >= 0.85 * limit / 32
    last = stats.ids + stats.forgotten_early
    known = [i for i in range(last) if i in ids]
    assert known == list(range(last - stats.ids, last))
    assert ids.check() is None


def test_at_the_limit_ids_of_one_bucket_cost_no_more_memory():
    ids = EventIds(SEED, limit=LEAST_LIMIT, hash_mask=FEW_PLACES)
    for at in range(9000):
        ids.put(at, 0, at)
    assert ids.stats().bytes <= LEAST_LIMIT
    assert ids.stats().forgotten_early > 0
    assert ids.check() is None


def longest(call, arguments):
    """The longest CPU time of this thread that one call took, in seconds."""
    now, worst = time.thread_time_ns, 0
    for argument in arguments:
        began = now()
        call(argument)
        took = now() - began
        if took > worst:
            worst = took
    return worst / 1e9


def pauses(n):
    """The longest call of each kind while a table of n ids grows, slides and is emptied, in seconds."""
    ids = EventIds(SEED)
    gc.collect()
    gc.disable()
    try:
        ids.put_many(list(range(n // 2)), 0, 0)
        growing = longest(lambda i: ids.put(i, 0, i), range(n // 2, n))
        forgetting = longest(ids.forget_before, [n * 3 // 4])
        sliding = longest(lambda i: ids.put(i, 0, i), range(n, n + n // 4))
        ids.forget_before(2 * n)
        emptying = longest(ids.tend, [100] * (n // 100))
    finally:
        gc.enable()
    assert ids.stats().ids == 0
    return growing, forgetting, sliding, emptying


def test_no_call_takes_long():
    # What another process does to this one's caches and clock comes once; what a call does comes each time.
    least = pauses(1_000_000)
    for _ in range(2):
        if max(least) >= 0.001:
            least = tuple(map(min, least, pauses(1_000_000)))
    assert max(least) < 0.003, least


# ---- kept decisions ----


def test_decisions_against_a_list():
    source = random.Random(5)
    limit = LEAST_KEPT
    keep, given, last = KeptDecisions(limit), [], 0
    for _ in range(3000):
        packed = source.randbytes(source.choice([0, 1, 7, 8, 9, 200, source.randrange(2000)]))
        assert keep.next > last
        position = keep.put(packed)
        assert position >= keep.next - 1 - len(packed) // 8 - 1
        assert position > last
        last = position
        given.append((position, packed))
        assert keep.stats().bytes <= limit
    found = [keep.get(position) for position, _ in given]
    gone = found.count(None)
    assert found[:gone] == [None] * gone
    assert found[gone:] == [packed for _, packed in given[gone:]]
    held = sum(8 + -(-len(packed) // 8) * 8 for _, packed in given[gone:])
    assert held >= 0.9 * limit
    stats = keep.stats()
    assert (stats.kept, stats.limit) == (3000, limit)
    assert given[gone - 1][0] < stats.oldest <= given[gone][0]


def test_a_position_that_was_never_given_holds_nothing():
    keep = KeptDecisions(LEAST_KEPT)
    assert [keep.get(p) for p in (0, 1, 2, 2**48 - 1)] == [None] * 4
    position = keep.put(b"a" * 100)
    assert keep.get(position) == b"a" * 100
    assert [keep.get(p) for p in (0, position + 1, position + 14, 2**48 - 1)] == [None] * 4


def test_what_is_larger_than_the_ring_gets_a_position_and_is_not_kept():
    keep = KeptDecisions(LEAST_KEPT)
    first = keep.put(b"first")
    large = keep.put(bytes(LEAST_KEPT))
    second = keep.put(b"second")
    assert first < large < second
    assert [keep.get(p) for p in (first, large, second)] == [b"first", None, b"second"]


def test_memory_of_decisions_comes_as_they_do():
    before = resident()
    keep = KeptDecisions(64 << 20)
    assert keep.stats().bytes < 10_000
    for _ in range(100):
        keep.put(bytes(10_000))
    assert 1_000_000 < keep.stats().bytes < 1_100_000
    assert resident() - before < 2_000_000 + OTHERS
    for limit in (0, LEAST_KEPT - 1, MOST_LIMIT + 1, None):
        with pytest.raises(ValueError, match="limit: expected bytes"):
            KeptDecisions(limit)


WITHOUT_MEMORY = """
import resource
from penstock._ext.event_ids import EventIds, KeptDecisions

ids, keep = EventIds(bytes(16)), KeptDecisions(64 << 20)
numbers = list(range(600_000))
packed = [b"%d" % i * 100_000 for i in range(1000, 1100)]
positions = [0] * 100
with open("/proc/self/status") as f:
    data = next(int(line.split()[1]) << 10 for line in f if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (data + (10 << 20), resource.RLIM_INFINITY))
for i in range(100):
    positions[i] = keep.put(packed[i])
resource.setrlimit(resource.RLIMIT_DATA, (data + (20 << 20), resource.RLIM_INFINITY))
ids.put_many(numbers, 0, 1)
resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
stats = ids.stats()
assert ids.check() is None, ids.check()
assert stats.forgotten_early > 0 and stats.ids > 100_000, stats
assert stats.ids + stats.forgotten_early == 600_000, stats
assert ids.count_known(numbers) == stats.ids
found = [keep.get(position) for position in positions]
gone = found.count(None)
assert 60 < gone < 90 and found[gone:] == packed[gone:], gone
ids.put_many(numbers, 0, 600_000)
assert ids.count_known(numbers) == 600_000
ids.forget_before(1_200_000)
ids.tend(1_000_000)
assert ids.check() is None and ids.stats().ids == 0
"""


def test_where_the_system_gives_no_memory_the_oldest_go_and_nothing_fails():
    done = subprocess.run([sys.executable, "-c", WITHOUT_MEMORY], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
