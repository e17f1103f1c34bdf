"""Oracle of assignment: every vendor's formula as its SDK writes it, in floats, one unit at a time.

`choose` is the vendor's walk over the arms, given the hash; `assign` is the whole way from a unit's text. Hashes are
pure Python, or hashlib. Nothing here is compiled to ranges: that is what is tested.
"""

import hashlib
import math

LONG_SCALE = float(0xFFFFFFFFFFFFFFF)
MASK = 0xFFFFFFFF


def fnv1a32(data):
    h = 2166136261
    for byte in data:
        h = ((h ^ byte) * 16777619) & MASK
    return h


def murmur3(data, seed):
    def rotl(x, r):
        return ((x << r) | (x >> (32 - r))) & MASK

    h = seed
    n = len(data) // 4 * 4
    for i in range(0, n, 4):
        k = int.from_bytes(data[i : i + 4], "little")
        k = rotl(k * 0xCC9E2D51 & MASK, 15) * 0x1B873593 & MASK
        h = (rotl(h ^ k, 13) * 5 + 0xE6546B64) & MASK
    k = int.from_bytes(data[n:], "little")
    if k:
        h ^= rotl(k * 0xCC9E2D51 & MASK, 15) * 0x1B873593 & MASK
    h ^= len(data)
    h = (h ^ (h >> 16)) * 0x85EBCA6B & MASK
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & MASK
    return h ^ (h >> 16)


def sha1_60(data):
    return int(hashlib.sha1(data).hexdigest()[:15], 16)


def md5_32(data):
    return int(hashlib.md5(data).hexdigest()[:8], 16)


def sha256_64(data):
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def split_hash(name, salt, unit, arms):
    """The number that the arms are cut from, before it becomes a float."""
    text = unit if isinstance(unit, str) else str(unit)
    match name:
        case "growthbook-v1":
            return fnv1a32((text + salt).encode()) % 1000
        case "growthbook-v2":
            return fnv1a32(str(fnv1a32((salt + text).encode())).encode()) % 10000
        case "murmur3-32/optimizely":
            return murmur3((text + salt).encode(), 1)
        case "murmur3-32/unleash":
            return murmur3(f"{salt}:{text}".encode(), 86028157) % 1000
        case "murmur3-32/flagd":
            return murmur3((salt + text).encode(), 0)
        case "sha1-60/launchdarkly" | "sha1-60/planout":
            return sha1_60(f"{salt}.{text}".encode())
        case "sha1-60/planout-uniform":
            return sha1_60(f"{salt}.{text}".encode()) % arms
        case "sha1-60/posthog":
            return sha1_60(f"{salt}.{text}variant".encode())
        case "md5-32/eppo":
            return md5_32(f"{salt}-{text}".encode()) % 10000
        case "sha256-64/statsig":
            return sha256_64(f"{salt}.{text}".encode()) % 10000
    raise KeyError(name)


def bucket_ranges(weights, coverage):
    """GrowthBook getBucketRange."""
    ranges = []
    cumulative = 0.0
    for weight in weights:
        start = cumulative
        cumulative += weight
        ranges.append((start, start + coverage * weight))
    return ranges


def choose(name, weights, coverage, h):
    """Index of the arm that a split hash h falls in, or -1. Coverage matters only where it shrinks ranges in place."""
    match name:
        case "growthbook-v1" | "growthbook-v2":
            n = h / (1000 if name.endswith("v1") else 10000)
            for arm, (start, end) in enumerate(bucket_ranges(weights, coverage)):
                if start <= n < end:
                    return arm
            return -1
        case "murmur3-32/optimizely":
            bucket = math.floor(float(h) / 2**32 * 10000)
            allocation = []
            end = 0
            for arm, weight in enumerate(weights):
                size = round(weight * 10000)
                allocation.append((arm, end + math.floor(round(size * coverage, 6))))
                end += size
                allocation.append((-1, end))
            return next((arm for arm, end_of_range in allocation if bucket < end_of_range), -1)
        case "murmur3-32/unleash":
            target, counter = h + 1, 0
            for arm, weight in enumerate(weights):
                counter += round(weight * 1000)
                if counter >= target:
                    return arm
            return -1
        case "murmur3-32/flagd":
            total = 10**6
            bucket, end = (h * total) >> 32, 0
            for arm, weight in enumerate(weights):
                end += round(weight * total)
                if bucket < end:
                    return arm
            return -1
        case "sha1-60/launchdarkly":
            total = 0.0
            for arm, weight in enumerate(weights):
                total += round(weight * 100000) / 100000.0
                if h / LONG_SCALE < total:
                    return arm
            return len(weights) - 1
        case "sha1-60/planout":
            cumulative, total = [], 0.0
            for weight in weights:
                total += weight
                cumulative.append(total)
            stop = 0.0 + (total - 0.0) * (h / LONG_SCALE)
            return next((arm for arm, end in enumerate(cumulative) if stop <= end), -1)
        case "sha1-60/planout-uniform":
            return h
        case "sha1-60/posthog":
            low = 0.0
            for arm, weight in enumerate(weights):
                high = low + weight
                if low <= h / LONG_SCALE < high:
                    return arm
                low = high
            return -1
        case "md5-32/eppo" | "sha256-64/statsig":
            end = 0
            for arm, weight in enumerate(weights):
                end += round(weight * 10000)
                if h < end:
                    return arm
            return -1
    raise KeyError(name)


def covered(name, salt, coverage_salt, coverage, unit):
    """Whether a unit takes part, for the forms with a second hash."""
    text = unit if isinstance(unit, str) else str(unit)
    if coverage >= 1:
        return True
    own = coverage_salt if coverage_salt is not None else salt + ".coverage"
    vendor = coverage_salt if coverage_salt is not None else salt
    match name:
        case "growthbook-v1" | "growthbook-v2" | "murmur3-32/optimizely":
            return True
        case "murmur3-32/unleash":
            return murmur3(f"{vendor}:{text}".encode(), 0) % 100 + 1 <= round(coverage * 100)
        case "murmur3-32/flagd":
            return murmur3((own + text).encode(), 0) / 2**32 < coverage
        case "sha1-60/launchdarkly" | "sha1-60/planout" | "sha1-60/planout-uniform":
            return sha1_60(f"{own}.{text}".encode()) / LONG_SCALE < coverage
        case "sha1-60/posthog":
            return not sha1_60(f"{vendor}.{text}".encode()) / LONG_SCALE > coverage
        case "md5-32/eppo":
            return md5_32(f"{own}-{text}".encode()) % 10000 < round(coverage * 10000)
        case "sha256-64/statsig":
            return sha256_64(f"{own}.{text}".encode()) % 10000 < round(coverage * 10000)
    raise KeyError(name)


def assign(name, arms, unit, salt, coverage=1.0, coverage_salt=None):
    """The name of the unit's arm, or None."""
    if unit == "" or unit is None or not covered(name, salt, coverage_salt, coverage, unit):
        return None
    arm = choose(name, list(arms.values()), coverage, split_hash(name, salt, unit, len(arms)))
    return None if arm < 0 else list(arms)[arm]
