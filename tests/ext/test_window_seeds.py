"""Hashes of window state under a secret seed: chosen keys do not collide, and no result depends on the seed.

What must stay true: who does not know the seed cannot make keys, texts or numbers that share a place in a table.
"""

import os
import random
import struct
import time

import numpy as np
import pytest

from penstock import Aggregation, Engine, Event, FeatureView, Timestamp
from penstock._ext.windows import Output, WindowStore
from penstock.features.snapshot import SnapshotPosition, load_snapshot, write_snapshot

M = (1 << 64) - 1
K0, K1, K2 = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F
WITHOUT_SEED = (K0, K1, K2, K0)  # the hash of before, which everybody knew
OUTPUTS = [
    Output("count", window=50),
    Output("sum", 0, window=1000),
    Output("last", 1),
    Output("distinct_count", 0, window=1000),
    Output("distinct_count", 1),
]


def mix(a, b):
    p = a * b
    return (p & M) ^ (p >> 64)


def secret(seed):
    """The four words that the kernel makes of a seed."""
    words = struct.unpack("<QQ", seed)
    found = []
    for i in range(4):
        x = words[i & 1] + K0 * (i + 1) & M
        for _ in range(2):
            x = (x ^ x >> 33) * 0xFF51AFD7ED558CCD & M
            x = (x ^ x >> 33) * 0xC4CEB9FE1A85EC53 & M
            x ^= x >> 33
            x = x + words[~i & 1] & M
        found.append(x)
    return found


def colliding_texts(k, n):
    """Texts that one hash takes for the same: the second block's word is the running hash, so a factor is 0."""
    rng = random.Random(1)
    while True:
        first = bytes(rng.choice(b"abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(16))
        a, b = struct.unpack("<QQ", first)
        word = struct.pack("<Q", mix(a ^ k[1], b ^ k[0] ^ 33))
        if all(0x20 <= c < 0x7F for c in word):
            return [(first + b"%08d" % i + word + b"x").decode() for i in range(n)]


def cost(keys, seed=None, values=None):
    """CPU seconds to apply one event of every key, the least of three times."""
    times = []
    for _ in range(3):
        store = WindowStore(["float64", "string"], OUTPUTS[:4], seed=seed)
        began = time.process_time()
        for t, key in enumerate(keys):
            store.apply(key, t, [1.0, None] if values is None else values[t])
        times.append(time.process_time() - began)
    return min(times)


def ordinary_texts(n):
    rng = random.Random(2)
    return [f"{rng.getrandbits(128):033x}"[:33] for _ in range(n)]


def test_keys_that_collide_under_one_hash_cost_what_others_cost_under_a_secret_one():
    n, known = 6000, bytes(range(16))
    ordinary = cost(ordinary_texts(n))
    of_before = colliding_texts(WITHOUT_SEED, n)
    of_known = colliding_texts(secret(known), n)
    assert cost(of_known, known) > 8 * ordinary, "they do collide where the seed is known"
    for keys in (of_before, of_known):
        assert cost(keys) < 3 * ordinary


def test_texts_and_numbers_of_events_too():
    n, known = 5000, bytes(range(16))
    plain = [[float(i), None] for i in range(n)]
    one = ["busy"] * n
    ordinary = cost(one, values=[[1.0, text] for text in ordinary_texts(n)])
    texts = [[1.0, text] for text in colliding_texts(secret(known), n)]
    assert cost(one, known, texts) > 3 * ordinary
    assert cost(one, values=texts) < 3 * ordinary
    # Numbers whose hash under a known seed ends in the same 15 bits share one place in the table of distinct values.
    k = secret(known)
    rng = np.random.default_rng(4)
    numbers = []
    while len(numbers) < 1500:
        for v in (rng.integers(1, 1 << 51, 1 << 16) / 8).tolist():
            if mix(struct.unpack("<Q", struct.pack("<d", v))[0] ^ k[0], k[1]) & 4095 == 5:
                numbers.append(v)
    values = [[v, None] for v in numbers]
    ordinary = cost(one[: len(numbers)], values=plain)
    assert cost(one[: len(numbers)], known, values) > 2 * ordinary
    assert cost(one[: len(numbers)], values=values) < 2 * ordinary


def filled(seed=None):
    store, rng = WindowStore(["float64", "string"], OUTPUTS, lateness=20, seed=seed), random.Random(3)
    apply(store, rng, 0, 3000)
    return store


def apply(store, rng, start, n):
    for t in range(start, start + n):
        key = rng.choice([rng.randrange(60), f"key {rng.randrange(60)}", "a long key: " + "k" * rng.randrange(60)])
        row = [rng.choice([None, 0.0, -0.0, rng.gauss(0, 9)]), rng.choice([None, f"text {rng.randrange(99)}"])]
        store.apply(key, t - rng.choice([0, 20]), row, sequence=t)


def told(store):
    """Everything that a store says."""
    keys = sorted(store.keys(), key=repr)
    at = store.stats().watermark
    return keys, store.stats(), [store.read(key, 0, t) for key in [*keys, "unknown"] for t in (at, at - 20, at + 40)]


def goes_on(store):
    """What it says after more events, erasures and a sweep."""
    apply(store, random.Random(4), 3000, 500)
    for key in range(0, 60, 3):
        store.erase(key)
    store.erase("key 7")
    store.sweep(9000, 10_000)
    return told(store)


def test_no_result_depends_on_the_seed():
    one, other = filled(), filled()
    assert one.seed != other.seed
    assert told(one) == told(other)
    loaded = filled()
    loaded.load(one.dump())
    assert loaded.seed == one.seed
    assert loaded.dump() == one.dump()
    other.reseed(one.seed)
    assert told(other) == told(one)
    assert goes_on(other) == goes_on(one) == goes_on(loaded) == goes_on(filled())


def test_a_dump_that_is_older_than_seeds_is_hashed_anew():
    old = filled()
    expected = told(old)
    old.reseed(bytes(16))
    data = old.dump()
    store = WindowStore(["float64", "string"], OUTPUTS, lateness=20)
    seed = store.seed
    store.load(data)
    assert store.seed == seed
    assert told(store) == expected
    assert goes_on(store) == goes_on(filled())


@pytest.mark.parametrize("seed", [b"", b"short", bytes(17)])
def test_a_seed_of_another_size_is_refused(seed):
    with pytest.raises(ValueError, match="seed: expected 16 bytes, got"):
        WindowStore([], [Output("count", window=1)], seed=seed)
    store = filled()
    before = store.dump()
    with pytest.raises(ValueError, match="seed: expected 16 bytes, got"):
        store.reseed(seed)
    assert store.dump() == before


def test_a_store_beside_loaded_ones_takes_their_seed_and_only_the_owner_reads_it(tmp_path):
    first, second = filled(), filled()
    second.reseed(first.seed)
    position = SnapshotPosition(log_id=1, sequence=1, ingest_time=1, watermarks={}, created=1)
    path = write_snapshot(tmp_path, {1: first, 2: second}, position, None)
    assert first.seed in b"".join(file.read_bytes() for file in path.glob("*.base"))
    assert {os.stat(file).st_mode & 0o777 for file in path.iterdir()} == {0o600}
    stores = {3: filled(), 2: filled(), 1: filled()}
    expected = told(stores[3])
    assert load_snapshot(tmp_path, stores).missing == [3]
    assert {store.seed for store in stores.values()} == {first.seed}
    assert told(stores[3]) == expected
    again = write_snapshot(tmp_path, {1: stores[1], 2: stores[2]}, position, load_snapshot(tmp_path, stores))
    assert not list(again.glob("*.base")), "a load changes no page"


class Payment(Event, max_skew="36500d"):
    customer: str
    terminal: int
    at: Timestamp


VIEWS = {
    "by_customer": FeatureView(
        "by_customer", entity="customer", source=Payment, aggregations=[Aggregation("count", windows=["1d"])]
    ),
    "by_terminal": FeatureView(
        "by_terminal", entity="terminal", source=Payment, aggregations=[Aggregation("count", windows=["1d"])]
    ),
}


def test_an_engine_has_one_seed_and_every_engine_another():
    engines = [Engine({"Payment": Payment} | VIEWS) for _ in range(3)]
    seeds = [{store.seed for store in engine.stores} for engine in engines]
    assert [len(found) for found in seeds] == [1, 1, 1]
    assert len(set.union(*seeds)) == 3


def test_an_engine_takes_chosen_keys_as_quickly_as_others():
    def run(keys):
        engine = Engine({"Payment": Payment} | VIEWS)
        began = time.process_time()
        for i, key in enumerate(keys):
            engine.ingest({"customer": key, "terminal": i, "at": 1_790_000_000_000_000 + i}, "Payment")
        return time.process_time() - began

    chosen, ordinary = colliding_texts(WITHOUT_SEED, 12_000), ordinary_texts(12_000)
    assert min(run(chosen) for _ in range(3)) < 2 * min(run(ordinary) for _ in range(3))
