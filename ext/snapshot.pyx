# snapshot.pyx (control path): a store's memory by pages, for features/snapshot.py, which knows the files.
#
# Every call that moves or hashes memory releases the GIL and takes a bounded piece. What must stay true: a store's
# contents change only in commit_load. The caller holds the store still (a WindowStore is not safe for two threads).

from cpython.buffer cimport PyBUF_READ, PyBUF_WRITE
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from penstock._ext.windows cimport WindowStore

cdef extern from "crc32c.h" nogil:
    uint32_t ps_crc32c(uint32_t, const void *, size_t)

cdef extern from "page_delta.h" nogil:
    enum:
        PS_PAGE

    ctypedef struct ps_page_key:
        pass

    uint64_t ps_pages_scan(const ps_page_key *, const char *, uint64_t, uint64_t, uint64_t, uint64_t *, uint32_t *)
    void ps_pages_gather(const char *, const uint32_t *, uint64_t, char *)
    void ps_pages_scatter(char *, const uint32_t *, uint64_t, const char *)
    void ps_write_back(int, uint64_t, uint64_t)

PAGE = PS_PAGE
KEY_BYTES = sizeof(ps_page_key)


cdef inline uint64_t pages_of(uint64_t size) noexcept nogil:
    return (size + PS_PAGE - 1) // PS_PAGE


def crc32c(const unsigned char[::1] data not None, uint32_t start=0):
    """CRC32C of the bytes; start: the value of those before them."""
    cdef size_t n = data.shape[0]
    cdef uint32_t found = start
    if n:
        with nogil:
            found = ps_crc32c(start, &data[0], n)
    return found


def state_bytes(WindowStore store not None):
    """How many bytes of the store's mapping are its state."""
    cdef uint64_t size
    store.api.bytes(store.ptr, &size)
    return size


def pages(WindowStore store not None, uint64_t first, uint64_t n):
    """n pages of the state as a memoryview, good until the store is touched."""
    cdef uint64_t size
    cdef const char *base = <const char *>store.api.bytes(store.ptr, &size)
    if first + n > pages_of(size):
        raise ValueError(f"expected pages within 0..{pages_of(size)}, got {first}..{first + n}")
    return PyMemoryView_FromMemory(<char *>base + first * PS_PAGE, n * PS_PAGE, PyBUF_READ)


def scan(WindowStore store not None, const unsigned char[::1] key not None, uint64_t first, uint64_t n, uint64_t n_old,
         uint64_t[:, ::1] hashes not None, uint32_t[::1] changed not None):
    """Hash pages first..first + n; see page_delta.h. Returns how many numbers are in changed (room for n)."""
    cdef uint64_t size, found
    cdef ps_page_key page_key
    cdef const char *base = <const char *>store.api.bytes(store.ptr, &size)
    if (<size_t>key.shape[0] != sizeof(page_key) or first + n > pages_of(size) or hashes.shape[1] != 2
            or <uint64_t>hashes.shape[0] < first + n or <uint64_t>changed.shape[0] < n):
        raise ValueError("scan: key, pages, hashes and changed do not fit together")
    if n == 0:
        return 0
    memcpy(&page_key, &key[0], sizeof(page_key))
    with nogil:
        found = ps_pages_scan(&page_key, base, first, n, n_old, &hashes[0, 0], &changed[0])
    return found


def gather(WindowStore store not None, const uint32_t[::1] numbers not None, unsigned char[::1] to not None):
    """Copy the pages with these numbers one behind the other."""
    cdef uint64_t size, n = numbers.shape[0], i
    cdef const char *base = <const char *>store.api.bytes(store.ptr, &size)
    if <uint64_t>to.shape[0] < n * PS_PAGE:
        raise ValueError("gather: no room")
    for i in range(n):
        if numbers[i] >= pages_of(size):
            raise ValueError(f"no page {numbers[i]}")
    if n:
        with nogil:
            ps_pages_gather(base, &numbers[0], n, <char *>&to[0])


def scatter(unsigned char[::1] memory not None, const uint32_t[::1] numbers not None,
            const unsigned char[::1] source not None):
    """Copy pages that lie one behind the other to their places in memory."""
    cdef uint64_t n = numbers.shape[0], i, limit = memory.shape[0] // PS_PAGE
    if <uint64_t>source.shape[0] < n * PS_PAGE:
        raise ValueError("scatter: pages are missing")
    for i in range(n):
        if numbers[i] >= limit:
            raise ValueError(f"no page {numbers[i]}")
    if n:
        with nogil:
            ps_pages_scatter(<char *>&memory[0], &numbers[0], n, <const char *>&source[0])


def begin_load(WindowStore store not None, uint64_t size):
    """Fresh zeroed memory for a state of that size, in whole pages, good until commit_load or cancel_load."""
    cdef void *at = NULL
    cdef int code = store.api.begin_load(store.ptr, size, &at)
    if code:
        store._raise(code)
    return PyMemoryView_FromMemory(<char *>at, pages_of(size) * PS_PAGE, PyBUF_WRITE)


def commit_load(WindowStore store not None, uint64_t size):
    """Make what was loaded the store's contents. Raises ValueError, and then they are as before."""
    cdef int code = store.api.commit_load(store.ptr, size)
    if code:
        store._raise(code)


def load_is_unfit(WindowStore store not None):
    """Whether what begin_load's memory now holds is of a format that could damage state of this layout."""
    return store.api.load_is_unfit(store.ptr) != 0


def cancel_load(WindowStore store not None):
    store.api.cancel_load(store.ptr)


def write_back(int fd, uint64_t offset, uint64_t n):
    """Start writing n bytes from offset to disk, once the n before them are there."""
    with nogil:
        ps_write_back(fd, offset, n)
