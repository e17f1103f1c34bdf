# expressions.pyx (hot path): owns the native program of one expression, and runs it on rows given from Python.
# The compiler is expressions.py; every operand is checked here, so that a program cannot read outside its own memory.

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

import numpy as np

TYPES = {"float64": 0, "int64": 1, "bool": 2, "timestamp": 3}
OPCODES = {ps_opcode_names[i].decode(): i for i in range(PS_OP_COUNT)}
MAX_REGISTERS = PS_MAX_REGISTERS

cdef set LOADS = {code for name, code in OPCODES.items() if name.startswith("LOAD_") or name.endswith("_SK")}
cdef set JUMPS = {OPCODES["JUMP_FALSE"], OPCODES["JUMP_TRUE"]}
cdef set TEXTS = {code for name, code in OPCODES.items() if name == "CONST_S" or name.endswith(("_S_RK", "_S_SK"))}
cdef set TAGS = {OPCODES["CONST_I"], OPCODES["CONST_S"]}
cdef dict POOLS = {OPCODES["IN_F"]: 0, OPCODES["IN_I"]: 1, OPCODES["IN_S"]: 2}


cdef class Program:
    """A compiled expression.

    code: [(opcode, dst, a, b, k)], k the 8 bytes of the constant as an unsigned int; the last is RETURN.
    type: of the result, a key of TYPES. text: the bytes of the string constants.
    floats, ints, strings: the pools of `in`, each list sorted; strings as (offset, length) into text.
    Raises ValueError for operands that are out of range.
    """

    def __cinit__(self, list code, str type, bytes text=b"", floats=(), ints=(), strings=()):
        cdef Py_ssize_t i, n = len(code)
        cdef uint64_t bits
        self.api = &ps_expression
        self.type = type
        self.ptr = <ps_program *>calloc(1, sizeof(ps_program))
        if self.ptr == NULL:
            raise MemoryError
        self.ptr.type = TYPES[type]
        self.ptr.n_code = n
        self.ptr.code = <ps_instruction *>calloc(n + 1, sizeof(ps_instruction))
        self.ptr.text = <char *>calloc(len(text) + 1, 1)
        self.ptr.floats = <double *>calloc(len(floats) + 1, sizeof(double))
        self.ptr.ints = <int64_t *>calloc(len(ints) + 1, sizeof(int64_t))
        self.ptr.strings = <uint64_t *>calloc(len(strings) + 1, sizeof(uint64_t))
        if (self.ptr.code == NULL or self.ptr.text == NULL or self.ptr.floats == NULL or self.ptr.ints == NULL
                or self.ptr.strings == NULL):
            raise MemoryError
        memcpy(self.ptr.text, PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text))
        for i, number in enumerate(floats):
            self.ptr.floats[i] = number
        self.ptr.floats[len(floats)] = float("nan")
        for i, whole in enumerate(ints):
            self.ptr.ints[i] = whole
        for i, (offset, length) in enumerate(strings):
            if offset < 0 or length < 0 or offset + length > len(text):
                raise ValueError("a string constant leaves the text")
            self.ptr.strings[i] = <uint64_t>offset | (<uint64_t>length << 32)
        if n == 0 or code[n - 1][0] != OPCODES["RETURN"]:
            raise ValueError("the last instruction must be RETURN")
        sizes = (len(floats), len(ints), len(strings))
        for i, (op, dst, a, b, k) in enumerate(code):
            bits = k
            low, high = k & 0xFFFFFFFF, k >> 32
            if not 0 <= op < PS_OP_COUNT or not 0 <= dst < PS_MAX_REGISTERS or not 0 <= b < PS_MAX_REGISTERS:
                raise ValueError(f"instruction {i}: operand out of range")
            if not 0 <= a < (65536 if op in LOADS else 3 if op in TAGS else PS_MAX_REGISTERS):
                raise ValueError(f"instruction {i}: operand out of range")
            if op in JUMPS and not i < k < n:
                raise ValueError(f"instruction {i}: a jump goes forward, inside the program")
            if op in TEXTS and low + high > len(text):
                raise ValueError(f"instruction {i}: a string constant leaves the text")
            if op in POOLS and low + high > sizes[POOLS[op]]:
                raise ValueError(f"instruction {i}: a list leaves its pool")
            if op in LOADS:
                self.n_slots = max(self.n_slots, a + 1)
            self.ptr.code[i].op = op
            self.ptr.code[i].dst = dst
            self.ptr.code[i].a = a
            self.ptr.code[i].b = b
            self.ptr.code[i].k.u = bits

    def __dealloc__(self):
        if self.ptr != NULL:
            free(self.ptr.code)
            free(self.ptr.text)
            free(self.ptr.floats)
            free(self.ptr.ints)
            free(self.ptr.strings)
            free(self.ptr)

    def evaluate(self, slots, status, bytes arena=b""):
        """The value for each row: (slots, status) as the engine would store it.

        slots: uint64, shape (rows, n), the 8 bytes of each slot; status: uint8, same shape; arena: where string slots
        point (not checked: rows come from the engine or from tests). Returns uint64 and uint8, shape (rows,).
        Raises ValueError when the shapes differ or rows are too short.
        """
        slots, status = self._rows(slots, status)
        cdef const uint64_t[:, ::1] rows = slots
        cdef const uint8_t[:, ::1] flags = status
        cdef Py_ssize_t i, n = rows.shape[0]
        values = np.empty(n, np.uint64)
        statuses = np.empty(n, np.uint8)
        cdef uint64_t[::1] out = values
        cdef uint8_t[::1] out_status = statuses
        cdef const char *strings = PyBytes_AS_STRING(arena)
        with nogil:
            for i in range(n):
                self.api.value(self.ptr, <const ps_slot *>&rows[i, 0], &flags[i, 0], strings, <ps_slot *>&out[i],
                               &out_status[i])
        return values, statuses

    def test(self, slots, status, bytes arena=b""):
        """For a condition: int8 per row, 1 true, 0 false, -1 unknown. Arguments as for `evaluate`."""
        slots, status = self._rows(slots, status)
        cdef const uint64_t[:, ::1] rows = slots
        cdef const uint8_t[:, ::1] flags = status
        cdef Py_ssize_t i, n = rows.shape[0]
        if self.type != "bool":
            raise ValueError(f"expected a condition, this expression is {self.type}")
        truths = np.empty(n, np.int8)
        cdef signed char[::1] out = truths
        cdef const char *strings = PyBytes_AS_STRING(arena)
        with nogil:
            for i in range(n):
                out[i] = self.api.test(self.ptr, <const ps_slot *>&rows[i, 0], &flags[i, 0], strings)
        return truths

    cdef tuple _rows(self, slots, status):
        if slots.ndim != 2 or slots.shape != status.shape:
            raise ValueError(f"slots and status: expected the same shape (rows, n), got {slots.shape}, {status.shape}")
        if slots.shape[1] < self.n_slots:
            raise ValueError(f"rows have {slots.shape[1]} slots, the expression reads {self.n_slots}")
        if slots.shape[1] == 0:  # an address is needed, even where nothing is read
            return np.zeros((len(slots), 1), np.uint64), np.zeros((len(slots), 1), np.uint8)
        return slots, status

    @property
    def code(self):
        """The instructions as text, one a line: what `penstock check` could show."""
        names = {value: name for name, value in OPCODES.items()}
        return [f"{names[self.ptr.code[i].op]} r{self.ptr.code[i].dst} {self.ptr.code[i].a} {self.ptr.code[i].b} "
                f"{self.ptr.code[i].k.u:#x}" for i in range(self.ptr.n_code)]
