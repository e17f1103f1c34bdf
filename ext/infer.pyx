# infer.pyx (hot path): one inference of the Open Inference Protocol, bytes in, bytes out.
"""Models behind the Open Inference Protocol."""

from penstock.errors import PenstockError


class InferError(PenstockError):
    """A request that is refused, or a model that failed: an HTTP status, and a text that says where and why."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status
        self.message = message


cdef class Port:
    pass


cdef class Request:
    pass


cdef class ServedModel:
    def __init__(self, str name, str version, runtime, *, path=None):
        self.name = name
        self.version = version
        self.runtime = runtime

    cdef int refused(self, int64_t ns) except -1:
        return 0

    cpdef dict stats(self):
        return {}


cdef class Target:
    def __init__(self, str name, str version="", Lane lane=None):
        self.name = name
        self.version = version
        self.lane = lane


cdef class InferCall:
    @staticmethod
    cdef InferCall of_http(ServedModel model, const char *body, size_t n, int64_t header_length):
        raise NotImplementedError

    @staticmethod
    cdef InferCall of_raw(ServedModel model, const char *data, size_t n):
        raise NotImplementedError

    @staticmethod
    cdef InferCall of_parts(ServedModel model, list inputs, list outputs):
        raise NotImplementedError

    cdef void run(self) noexcept nogil:
        pass

    cdef int finish(self) except -1:
        return 0

    cdef const char *part(self, int i, size_t *n) noexcept nogil:
        n[0] = 0
        return NULL

    cdef list parts_list(self):
        return []
