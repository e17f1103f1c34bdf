# metrics_text.pxd: the native writer of the metrics text. See metrics_text.pyx.

from libc.stdint cimport int64_t, uint64_t

from penstock._ext.flow cimport Lane, N_WAITS
from penstock._ext.infer cimport Target


cdef class Text:
    """Bytes that grow and are used again."""
    cdef:
        char *p
        size_t n
        size_t cap

    cdef char *room(self, size_t n) except NULL
    cdef int put(self, bytes text) except -1
    cdef int number(self, uint64_t value) except -1
    cdef int nanoseconds(self, int64_t value) except -1
    cdef int value(self, object value) except -1
    cdef int line(self, bytes before, uint64_t value) except -1


cdef class Part:
    cdef int write(self, Text text) except -1


cdef class Page(Part):
    cdef:
        Text text
        list parts


# Counters of several lanes together.
ctypedef struct LaneSums:
    uint64_t admitted
    uint64_t queued
    uint64_t full
    uint64_t late
    uint64_t dropped
    int64_t waiting
    int64_t pooled
    int64_t waited_ns
    uint64_t waits[N_WAITS]


cdef class Models(Part):
    cdef:
        object targets            # () -> list of Target
        object version            # () -> int: changes when that list, or a model of it, does
        readonly double ns_per_tick
        int64_t seen              # the version that `slots` shows
        list slots                # of Slot
        dict by_key               # (name, version) -> Slot
        list text                 # a Text per family, filled in place
        list gaps                 # per family: (begin, end) of lines that are gone
        LaneSums sums             # of the lanes of all models, as of the last whole turn
        LaneSums running          # of the turn under way
        int64_t loaded
        int64_t nbytes
        Py_ssize_t turn           # slot that is refreshed next

    cdef int add_line(self, Slot slot, int family) except -1
    cdef int blank(self, Slot slot) except -1
    cdef int sync(self) except -1
    cdef int refresh_some(self, Py_ssize_t n) except -1


cdef class Slot:
    """A model's place in the text of each family."""
    cdef:
        Target target
        Lane lane                 # None: another slot counts it
        bytes labels
        size_t at[4]              # where its number ends in each family; 0: it has no line there
        uint64_t shown[4]
