"""Assignment: an Experiment checked and compiled to integer ranges over a named hash (control path).

Every vendor turns a hash into a number and compares that with weights in its own way, some in floats. Here the hash is
cut once, at load, by asking the vendor's own comparison about each boundary; because the vendor's number never falls as
the hash rises, the integer ranges are the same function (tests go over every bucket).

Formulas: the vendors' open SDKs, named in HASHES; a unit's text and the salts are hashed as UTF-8.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from itertools import accumulate, pairwise

import msgspec

from .._ext.split import Assigner
from ..definitions.experiment import Experiment

__all__ = ["ALIASES", "HASHES", "HashForm", "compile_experiment"]

SUM_TOLERANCE = 1e-9
LONG_SCALE = float(0xFFFFFFFFFFFFFFF)  # 2**60 once it is a float; what sha1's 15 digits are divided by

# A cut: (lower bound, arm index or -1) of each segment, ascending, the first at 0.
Cut = list[tuple[int, int]]


class HashForm(msgspec.Struct, frozen=True, kw_only=True):
    """One vendor's way from (salt, unit) to an arm.

    algorithm: of _ext.split.ALGORITHMS. source: whose code has the formula. number: the hash as the vendor compares it.
    before, after: what stands around the unit in the hashed text. modulus: hash % modulus is cut, or the hash itself.
    step: weights are whole multiples of 1/step, as in the vendor's own files; None: any weights.
    cut: (form, weights, coverage) -> segments. in_place: coverage shrinks each arm's range and needs no second hash.
    The cover_ fields say the same of the second hash, whose values below cover_cut(form, coverage) take part.
    """

    algorithm: str
    source: str
    number: str
    before: str
    cut: Callable[[HashForm, list[float], float], Cut]
    after: str = ""
    seed: int = 0
    modulus: int = 0
    step: int | None = None
    in_place: bool = False
    cover_cut: Callable[[HashForm, float], int] | None = None
    cover_before: str | None = None
    cover_after: str = ""
    cover_seed: int = 0
    cover_modulus: int = 0
    cover_step: int | None = None
    cover_shares_salt: bool = False


def _first(size: int, reached: Callable[[int], bool]) -> int:
    """The smallest value in [0, size] from which on `reached` is true; it never turns false again."""
    low, high = 0, size
    while low < high:
        middle = (low + high) // 2
        if reached(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _exact(weight: float) -> Fraction:
    """The simplest fraction that is this float: 0.1 is meant as 1/10, and 1/3 as 1/3."""
    simple = Fraction(weight).limit_denominator(1_000_000)
    return simple if float(simple) == weight else Fraction(weight)


def _segments(ranges: list[tuple[int, int]], size: int) -> Cut:
    """Ascending, disjoint [start, end) of each arm -> segments over [0, size), holes as -1, empty ones left out."""
    cut: Cut = []
    at = 0
    for arm, (start, end) in enumerate(ranges):
        if start >= end:
            continue
        if start > at:
            cut.append((at, -1))
        cut.append((start, arm))
        at = end
    if at < size or not cut:
        cut.append((at, -1))
    return cut


def _running(weights: list[float]) -> list[Fraction]:
    """Exact ends of the arms; the last is 1, whatever the floats sum to."""
    ends: list[Fraction] = []
    total = Fraction(0)
    for weight in weights:
        total += _exact(weight)
        ends.append(total)
    ends[-1] = Fraction(1)
    return ends


def _cut_growthbook(form: HashForm, weights: list[float], coverage: float) -> Cut:
    # getBucketRange and chooseVariation: n = bucket / modulus; start <= n < start + coverage * weight.
    size = form.modulus
    ranges = []
    start = 0.0
    taken = 0
    for weight in weights:
        end = start + coverage * weight
        first = _first(size, lambda b, at=start: b / size >= at)  # type: ignore[misc]
        last = _first(size, lambda b, at=end: b / size >= at)  # type: ignore[misc]
        # The first range that holds n wins, should rounding make two of them overlap.
        ranges.append((max(first, taken), last))
        taken = max(taken, last)
        start += weight
    return _segments(ranges, size)


def _cut_optimizely(form: HashForm, weights: list[float], coverage: float) -> Cut:
    # bucket = floor(h / 2**32 * 10000), the first endOfRange above it; coverage leaves a hole at the end of each range.
    ranges = []
    start = 0
    for end_fraction in _running(weights):
        end = int(end_fraction * 10000)
        shrunk = start + math.floor((end - start) * _exact(coverage))
        ranges.append((_ceil_div(start << 32, 10000), _ceil_div(shrunk << 32, 10000)))
        start = end
    return _segments(ranges, 2**32)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _cut_flagd(form: HashForm, weights: list[float], coverage: float) -> Cut:
    # bucket = (h * total) >> 32, below the running weight: h < weight / total * 2**32, whatever the total.
    ends = [0, *(math.ceil(end * 2**32) for end in _running(weights))]
    return _segments(list(pairwise(ends)), 2**32)


def _cut_steps(form: HashForm, weights: list[float], coverage: float) -> Cut:
    # bucket = hash % modulus, below the running weight in whole buckets.
    ends = [0, *(int(end * form.modulus) for end in _running(weights))]
    return _segments(list(pairwise(ends)), form.modulus)


def _cut_launchdarkly(form: HashForm, weights: list[float], coverage: float) -> Cut:
    # n = int60 / LONG_SCALE; total += weight / 100000.0; the first with n < total; beyond the end, the last variation.
    total = 0.0
    ends = [0]
    for weight in weights:
        total += int(_exact(weight) * 100000) / 100000.0
        ends.append(_first(2**60, lambda h, at=total: h / LONG_SCALE >= at))  # type: ignore[misc]
    ends[-1] = 2**60
    return _segments(list(pairwise(ends)), 2**60)


def _cut_planout(form: HashForm, weights: list[float], coverage: float) -> Cut:
    # WeightedChoice: stop = int60 / LONG_SCALE * sum; the first running weight with stop <= it.
    runnings = list(accumulate(weights, initial=0.0))
    total = runnings[-1]
    ends = [0]
    for running in runnings[1:]:
        ends.append(_first(2**60, lambda h, at=running: total * (h / LONG_SCALE) > at))  # type: ignore[misc]
    return _segments(list(pairwise(ends)), 2**60)


def _cut_uniform(form: HashForm, weights: list[float], coverage: float) -> Cut:
    return [(arm, arm) for arm in range(len(weights))]


def _cut_posthog(form: HashForm, weights: list[float], coverage: float) -> Cut:
    # value_min <= n < value_max, where value_max adds rollout_percentage / 100.
    end = 0.0
    ends = [0]
    for weight in weights:
        end += weight
        ends.append(_first(2**60, lambda h, at=end: h / LONG_SCALE >= at))  # type: ignore[misc]
    return _segments(list(pairwise(ends)), 2**60)


def _cover_fraction_32(form: HashForm, coverage: float) -> int:
    return math.ceil(_exact(coverage) * 2**32)


def _cover_fraction_60(form: HashForm, coverage: float) -> int:
    return _first(2**60, lambda h: h / LONG_SCALE >= coverage)


def _cover_posthog(form: HashForm, coverage: float) -> int:
    return _first(2**60, lambda h: h / LONG_SCALE > coverage)


def _cover_steps(form: HashForm, coverage: float) -> int:
    return int(_exact(coverage) * form.cover_modulus)


# {salt} is Experiment.salt, or coverage_salt for the second hash.
HASHES: Mapping[str, HashForm] = {
    "growthbook-v1": HashForm(
        algorithm="fnv1a-32",
        source="GrowthBook SDKs, hashVersion 1 (biased; only to keep old assignments)",
        number="fnv1a32(unit + salt) % 1000 / 1000",
        before="",
        after="{salt}",
        modulus=1000,
        cut=_cut_growthbook,
        in_place=True,
    ),
    "growthbook-v2": HashForm(
        algorithm="fnv1a-32-twice",
        source="GrowthBook SDKs, hashVersion 2",
        number="fnv1a32(decimal(fnv1a32(salt + unit))) % 10000 / 10000",
        before="{salt}",
        modulus=10000,
        cut=_cut_growthbook,
        in_place=True,
    ),
    "murmur3-32/optimizely": HashForm(
        algorithm="murmur3-32",
        source="Optimizely SDKs, Bucketer; salt is the experiment's id",
        number="floor(murmur3(unit + salt, seed 1) / 2**32 * 10000)",
        before="",
        after="{salt}",
        seed=1,
        step=10000,
        cut=_cut_optimizely,
        in_place=True,
    ),
    "murmur3-32/unleash": HashForm(
        algorithm="murmur3-32",
        source="Unleash SDKs, variants and gradual rollout; salt is the groupId",
        number="murmur3(salt:unit, seed 86028157) % 1000; coverage: murmur3(salt:unit, seed 0) % 100",
        before="{salt}:",
        seed=86028157,
        modulus=1000,
        step=1000,
        cut=_cut_steps,
        cover_before="{salt}:",
        cover_cut=_cover_steps,
        cover_modulus=100,
        cover_step=100,
        cover_shares_salt=True,
    ),
    "murmur3-32/flagd": HashForm(
        algorithm="murmur3-32",
        source="flagd fractional evaluation, v2; salt is the flag's key",
        number="(murmur3(salt + unit) * total weight) >> 32",
        before="{salt}",
        cut=_cut_flagd,
        cover_before="{salt}",
        cover_cut=_cover_fraction_32,
    ),
    "sha1-60/launchdarkly": HashForm(
        algorithm="sha1-60",
        source="LaunchDarkly SDKs, rollouts; salt is key.salt, or the rollout's seed",
        number="sha1(salt.unit)[:15] / 0xFFFFFFFFFFFFFFF",
        before="{salt}.",
        step=100000,
        cut=_cut_launchdarkly,
        cover_before="{salt}.",
        cover_cut=_cover_fraction_60,
    ),
    "sha1-60/planout": HashForm(
        algorithm="sha1-60",
        source="PlanOut, WeightedChoice; salt is experiment.variable",
        number="sha1(salt.unit)[:15] / 0xFFFFFFFFFFFFFFF",
        before="{salt}.",
        cut=_cut_planout,
        cover_before="{salt}.",
        cover_cut=_cover_fraction_60,
    ),
    "sha1-60/planout-uniform": HashForm(
        algorithm="sha1-60",
        source="PlanOut, UniformChoice; salt is experiment.variable; equal weights only",
        number="sha1(salt.unit)[:15] % number of arms",
        before="{salt}.",
        cut=_cut_uniform,
        cover_before="{salt}.",
        cover_cut=_cover_fraction_60,
    ),
    "sha1-60/posthog": HashForm(
        algorithm="sha1-60",
        source="PostHog SDKs, local evaluation; salt is the flag's key",
        number='sha1(salt.unit + "variant")[:15] / 0xFFFFFFFFFFFFFFF; coverage: sha1(salt.unit)[:15] / ...',
        before="{salt}.",
        after="variant",
        cut=_cut_posthog,
        cover_before="{salt}.",
        cover_cut=_cover_posthog,
        cover_shares_salt=True,
    ),
    "md5-32/eppo": HashForm(
        algorithm="md5-32",
        source="Eppo SDKs, shards; salts are those of the split and of the traffic shard",
        number="md5(salt-unit)[:8] % 10000",
        before="{salt}-",
        modulus=10000,
        step=10000,
        cut=_cut_steps,
        cover_before="{salt}-",
        cover_cut=_cover_steps,
        cover_modulus=10000,
        cover_step=10000,
    ),
    "sha256-64/statsig": HashForm(
        algorithm="sha256-64",
        source="Statsig SDKs, pass percentage; salt is configSalt.ruleSalt",
        number="big-endian u64 of sha256(salt.unit)[:8] % 10000",
        before="{salt}.",
        modulus=10000,
        step=10000,
        cut=_cut_steps,
        cover_before="{salt}.",
        cover_cut=_cover_steps,
        cover_modulus=10000,
        cover_step=10000,
    ),
}

# A family's plain name means its form with the least bias.
ALIASES: Mapping[str, str] = {
    "murmur3-32": "murmur3-32/flagd",
    "sha1-60": "sha1-60/launchdarkly",
    "md5-32": "md5-32/eppo",
    "sha256-64": "sha256-64/statsig",
}


def _whole(value: float, step: int) -> bool:
    return (_exact(value) * step).denominator == 1


def _check(experiment: Experiment) -> HashForm:
    """The experiment's form, or ValueError: every message starts with the experiment's name."""
    place = f'experiment "{experiment.name}"'
    name = ALIASES.get(experiment.hash, experiment.hash)
    if name not in HASHES:
        near = difflib.get_close_matches(experiment.hash, HASHES, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{place}: unknown hash {experiment.hash!r}{hint} (have {', '.join(HASHES)})")
    form = HASHES[name]
    for field, salt in (("salt", experiment.salt), ("coverage_salt", experiment.coverage_salt)):
        if salt is not None and not isinstance(salt, str):
            raise ValueError(f"{place}: {field}: expected a str, got {salt!r}")
    arms = experiment.arms
    if not isinstance(arms, Mapping) or not arms:
        raise ValueError(f'{place}: arms: expected name -> weight, such as {{"control": 0.5, "treatment": 0.5}}')
    for arm, weight in arms.items():
        if not isinstance(arm, str) or not arm:
            raise ValueError(f"{place}: arms: expected a name, got {arm!r}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"{place}: arm {arm!r}: expected a weight between 0 and 1, got {weight!r}")
        if weight < 0:
            raise ValueError(f"{place}: arm {arm!r}: weight {weight!r} is negative")
        if form.step and not _whole(weight, form.step):
            raise ValueError(f"{place}: arm {arm!r}: {name} has weights in whole 1/{form.step}, got {weight!r}")
    total = math.fsum(arms.values())
    if abs(total - 1) > SUM_TOLERANCE:
        raise ValueError(f"{place}: the arms' weights sum to {total:.12g}, expected 1")
    if form.cut is _cut_uniform and len(set(arms.values())) > 1:
        raise ValueError(f"{place}: {name} has equal weights, got {', '.join(map(repr, arms.values()))}")
    coverage = experiment.coverage
    if isinstance(coverage, bool) or not isinstance(coverage, int | float) or not 0 <= coverage <= 1:
        raise ValueError(f"{place}: coverage: expected a number from 0 to 1, got {coverage!r}")
    if form.cover_step and not _whole(coverage, form.cover_step):
        raise ValueError(f"{place}: coverage: {name} has whole 1/{form.cover_step}, got {coverage!r}")
    if form.in_place and experiment.coverage_salt is not None:
        raise ValueError(f"{place}: coverage_salt: {name} shrinks each arm's range and has no second hash")
    return form


def compile_experiment(experiment: Experiment) -> Assigner:
    """The native assigner of an experiment. Raises ValueError that says what is wrong and where."""
    form = _check(experiment)
    weights = [float(weight) for weight in experiment.arms.values()]
    coverage = float(experiment.coverage)
    salt = experiment.name if experiment.salt is None else experiment.salt
    cut = form.cut(form, weights, coverage)
    modulus = len(weights) if form.cut is _cut_uniform else form.modulus
    split = (form.seed, modulus, form.before.format(salt=salt).encode(), form.after.format(salt=salt).encode())
    cover = None
    cover_bound = 0
    if coverage < 1 and form.cover_cut is not None and form.cover_before is not None:
        cover_salt = experiment.coverage_salt
        if cover_salt is None:
            cover_salt = salt if form.cover_shares_salt else salt + ".coverage"
        texts = [text.format(salt=cover_salt).encode() for text in (form.cover_before, form.cover_after)]
        cover = (form.cover_seed, form.cover_modulus, texts[0], texts[1])
        cover_bound = form.cover_cut(form, coverage)
    return Assigner(
        experiment.name,
        tuple(experiment.arms),
        form.algorithm,
        split,
        [start for start, _ in cut[1:]],
        [arm for _, arm in cut],
        cover,
        cover_bound,
    )
