"""Rows that ask the most of a tree ensemble, damage for its files, and distance in units of the last place."""

import numpy as np


def rows_at(thresholds, n_inputs, single, rng, n=300, missing=True):
    """Rows of thresholds, their two neighbours in the precision, zeros, the huge and the tiny, infinities, NaN."""
    kind = np.float32 if single else np.float64
    base = np.array([*rng.permutation(list(thresholds))[:400], 0.0, -0.0, 1e-36, -1e-36, 1e-30, 1e30, -1e30], kind)
    extra = [np.inf, -np.inf] + [np.nan] * (30 if missing else 0)
    pool = np.concatenate([base, np.nextafter(base, kind(np.inf)), np.nextafter(base, kind(-np.inf)), extra])
    return rng.choice(pool.astype(np.float64), (n, n_inputs))


def every_variant(form, model_type):
    """The ensemble in every layout and SIMD variant that can hold it, thinned masks included."""
    variants = [("plain", "portable", 0), ("walk", "portable", 0), ("auto", "auto", 0)]
    leaves = max_leaves(form)
    if leaves <= 64:
        variants += [("masks", simd, size) for simd in ("portable", "auto") for size in (0, 1, 1 << 28)]
    return [model_type(form, layout, simd, size) for layout, simd, size in variants]


def max_leaves(form):
    """Leaves of the largest tree."""
    most = 0
    for root in form.roots:
        todo, count = [root], 0
        while todo:
            at = todo.pop()
            if at < 0:
                count += 1
            else:
                todo += [form.yes[at], form.no[at]]
        most = max(most, count)
    return most


def ulps(got, want, single=False):
    """The largest distance, in units of the last place of `want`."""
    kind = np.float32 if single else np.float64
    got, want = np.asarray(got, kind), np.asarray(want, kind)
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    with np.errstate(invalid="ignore"):
        return float(np.max(np.where(same, 0, np.abs(got - want) / np.spacing(np.abs(want)))))


def damaged(data, rng, n):
    """Copies of a file's bytes: cut short, with bits flipped, with bytes replaced or a piece doubled."""
    for i in range(n):
        copy = bytearray(data)
        if i % 4 == 0:
            copy = copy[: int(rng.integers(len(copy)))]
        elif i % 4 == 1:
            for _ in range(int(rng.integers(1, 4))):
                copy[int(rng.integers(len(copy)))] ^= 1 << int(rng.integers(8))
        elif i % 4 == 2:
            copy[int(rng.integers(len(copy)))] = int(rng.choice([0, 9, 32, 45, 48, 57, 127, 255]))
        else:
            at = int(rng.integers(len(copy)))
            copy[at:at] = copy[at : at + int(rng.integers(1, 40))]
        yield bytes(copy)
