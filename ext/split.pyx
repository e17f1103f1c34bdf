# split.pyx (hot path): the Python face of the splitter: unit id -> arm of one experiment.
# The ranges come ready-made from experiments/assignment.py; here they are only stored, checked for order, and applied.

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.long cimport PyLong_CheckExact
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.unicode cimport PyUnicode_CheckExact
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

import numpy as np

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL

ALGORITHMS = {
    "fnv1a-32": PS_FNV1A_32,
    "fnv1a-32-twice": PS_FNV1A_32_TWICE,
    "murmur3-32": PS_MURMUR3_32,
    "sha1-60": PS_SHA1_60,
    "md5-32": PS_MD5_32,
    "sha256-64": PS_SHA256_64,
}


cdef int init_key(ps_hash_key *key, str algorithm, int64_t seed, int64_t modulus, bytes prefix, bytes suffix) except -1:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {algorithm!r} (have {', '.join(ALGORITHMS)})")
    if not 0 <= seed < 2**32 or not 0 <= modulus < 2**32:
        raise ValueError("seed and modulus are 32-bit unsigned integers")
    if ps_hash_key_init(key, ALGORITHMS[algorithm], <uint32_t>seed, <uint32_t>modulus, PyBytes_AS_STRING(prefix),
                        PyBytes_GET_SIZE(prefix), PyBytes_AS_STRING(suffix), PyBytes_GET_SIZE(suffix)):
        raise MemoryError
    return 0


cdef object refuse_unit(object unit):
    return TypeError(f"a unit id is a string or an integer, got {type(unit).__name__}")


cdef class Assigner:
    """One experiment, compiled: unit id -> arm.

    name: the experiment. arms: their names, in order. algorithm: a key of ALGORITHMS, for both hashes.
    split, cover: (seed, modulus, prefix, suffix) of each hash; cover None: every unit is covered.
    bounds: ascending ints; segment k holds bounds[k-1] <= hash < bounds[k] and has the arm segments[k] (-1: a hole).
    cover_bound: units whose coverage hash is below it are in the experiment.

    A unit is a str (hashed as UTF-8) or an int within int64 (hashed as its decimal text). The empty string and None are
    never in an experiment.
    """

    def __cinit__(self, str name, arms, str algorithm, split, bounds, segments, cover=None, cover_bound=0):
        cdef Py_ssize_t i
        self.api = &ps_split
        self.name = name
        self.arms = tuple(arms)
        self._answers = (*self.arms, None)
        if len(self.arms) > 32767:
            raise ValueError("an experiment has at most 32767 arms")
        if len(segments) != len(bounds) + 1:
            raise ValueError("there is one segment more than bounds")
        if any(b <= a for a, b in zip(bounds, bounds[1:])):
            raise ValueError("bounds must ascend")
        if any(not -1 <= arm < len(self.arms) for arm in segments):
            raise ValueError("a segment's arm is an index of arms, or -1")
        self.ptr = <ps_experiment *>calloc(1, sizeof(ps_experiment))
        if self.ptr == NULL:
            raise MemoryError
        self.ptr.bounds = <uint64_t *>calloc(len(bounds) + 1, sizeof(uint64_t))
        self.ptr.arms = <int16_t *>calloc(len(segments), sizeof(int16_t))
        if self.ptr.bounds == NULL or self.ptr.arms == NULL:
            raise MemoryError
        for i, bound in enumerate(bounds):
            self.ptr.bounds[i] = bound
        for i, arm in enumerate(segments):
            self.ptr.arms[i] = arm
        self.ptr.n_bounds = len(bounds)
        init_key(&self.ptr.split, algorithm, split[0], split[1], split[2], split[3])
        if cover is not None:
            init_key(&self.ptr.cover, algorithm, cover[0], cover[1], cover[2], cover[3])
            self.ptr.has_cover = 1
            self.ptr.cover_bound = cover_bound

    def __dealloc__(self):
        if self.ptr != NULL:
            ps_hash_key_clear(&self.ptr.split)
            ps_hash_key_clear(&self.ptr.cover)
            free(self.ptr.bounds)
            free(self.ptr.arms)
            free(self.ptr)

    def assign(self, unit):
        """The name of the unit's arm, or None: not in the experiment.

        Raises TypeError for a unit that is neither str, int nor None, OverflowError for an int beyond int64.
        """
        cdef Py_ssize_t size
        cdef const char *text
        cdef int arm
        if PyUnicode_CheckExact(unit):
            text = PyUnicode_AsUTF8AndSize(unit, &size)
            arm = self.api.assign(self.ptr, text, size)
        elif PyLong_CheckExact(unit):
            arm = self.api.assign_int(self.ptr, <int64_t>unit)
        elif unit is None:
            return None
        else:
            raise refuse_unit(unit)
        return self._answers[arm if arm >= 0 else len(self.arms)]

    def assign_many(self, units):
        """The arms of many units, as indices into `arms`; -1: not in the experiment. Returns int16, shape (n,).

        units: a list of str, int or None; an int64 array, shape (n,); or a pair (data, offsets) in Arrow's string
        layout: data bytes-like, offsets int32 of shape (n + 1,). Raises ValueError for offsets that leave data.
        """
        if isinstance(units, tuple) and len(units) == 2 and isinstance(units[1], np.ndarray):
            return self._assign_arrow(units[0], units[1])
        if isinstance(units, np.ndarray) and units.dtype == np.int64:
            return self._assign_ints(np.ascontiguousarray(units))
        return self._assign_list(list(units))

    cdef _assign_arrow(self, data, offsets):
        cdef const uint8_t[::1] view = np.frombuffer(data, np.uint8) if len(data) else np.zeros(1, np.uint8)
        cdef const int32_t[::1] starts = offsets
        cdef Py_ssize_t i, n = starts.shape[0] - 1
        cdef int16_t[::1] arms
        cdef bint ordered = n >= 0 and starts[0] >= 0 and starts[n] <= <Py_ssize_t>len(data)
        for i in range(n):
            ordered &= starts[i] <= starts[i + 1]
        if not ordered:
            raise ValueError("offsets must ascend from 0 to at most the length of data")
        out = np.empty(n, np.int16)
        if n:
            arms = out
            with nogil:
                self.api.assign_batch(self.ptr, <const char *>&view[0], &starts[0], n, &arms[0])
        return out

    cdef _assign_ints(self, units):
        cdef const int64_t[::1] view = units
        cdef Py_ssize_t n = view.shape[0]
        cdef int16_t[::1] arms
        out = np.empty(n, np.int16)
        if n:
            arms = out
            with nogil:
                self.api.assign_batch_int(self.ptr, &view[0], n, &arms[0])
        return out

    cdef _assign_list(self, list units):
        # Texts are gathered into Arrow's layout, so that a list gets the batch's speed.
        cdef Py_ssize_t i, size, n = len(units), used = 0, room
        cdef const char *text
        cdef char number[20]
        cdef int16_t[::1] arms
        cdef int32_t *offsets
        cdef char *data
        out = np.empty(n, np.int16)
        if n == 0:
            return out
        arms = out
        room = 64
        for unit in units:
            if PyUnicode_CheckExact(unit):
                PyUnicode_AsUTF8AndSize(unit, &size)
                room += size
            else:
                room += 20
        if room > 2**31 - 1:
            raise ValueError("too many bytes of unit ids for one call: split the list")
        offsets = <int32_t *>PyMem_Malloc((n + 1) * sizeof(int32_t))
        data = <char *>PyMem_Malloc(room)
        try:
            if offsets == NULL or data == NULL:
                raise MemoryError
            for i in range(n):
                unit = units[i]
                offsets[i] = <int32_t>used
                if PyUnicode_CheckExact(unit):
                    text = PyUnicode_AsUTF8AndSize(unit, &size)
                    memcpy(data + used, text, size)
                elif PyLong_CheckExact(unit):
                    size = ps_decimal(<int64_t>unit, number)
                    memcpy(data + used, number, size)
                elif unit is None:
                    size = 0
                else:
                    raise refuse_unit(unit)
                used += size
            offsets[n] = <int32_t>used
            with nogil:
                self.api.assign_batch(self.ptr, data, offsets, n, &arms[0])
        finally:
            PyMem_Free(offsets)
            PyMem_Free(data)
        return out

    def hash_value(self, unit):
        """The integer that the segments cut: the split hash of the unit, reduced by the modulus where there is one."""
        cdef bytes text = (str(unit) if PyLong_CheckExact(unit) else unit).encode()
        return ps_hash(&self.ptr.split, PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text))

    def cover_value(self, unit):
        """The coverage hash of the unit, or None where the experiment has none."""
        cdef bytes text = (str(unit) if PyLong_CheckExact(unit) else unit).encode()
        if not self.ptr.has_cover:
            return None
        return ps_hash(&self.ptr.cover, PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text))

    @property
    def cover_bound(self):
        """Units whose coverage hash is below it are in; None where the experiment has no coverage hash."""
        return self.ptr.cover_bound if self.ptr.has_cover else None

    @property
    def segments(self):
        """The compiled ranges as a list of (first hash, arm index or -1), ascending."""
        starts = [0, *(self.ptr.bounds[i] for i in range(self.ptr.n_bounds))]
        return [(start, self.ptr.arms[i]) for i, start in enumerate(starts)]

    def __repr__(self):
        return f"Assigner({self.name!r}, arms={self.arms!r})"


def hash_bytes(str algorithm, bytes text, int64_t seed=0, Py_ssize_t prefix=0, Py_ssize_t suffix=0):
    """The named hash of text, an int. The first `prefix` bytes are fed as a salt, the last `suffix` bytes as a suffix:
    the value must not depend on either (tests)."""
    cdef ps_hash_key key
    cdef uint64_t value
    cdef Py_ssize_t n = PyBytes_GET_SIZE(text)
    if prefix < 0 or suffix < 0 or prefix + suffix > n:
        raise ValueError("prefix and suffix must fit into text")
    init_key(&key, algorithm, seed, 0, text[:prefix], text[n - suffix:])
    value = ps_hash(&key, PyBytes_AS_STRING(text) + prefix, n - prefix - suffix)
    ps_hash_key_clear(&key)
    return value
