"""Reading events into rows (hot path): user Structs, decoded JSON, dicts, and rows of Arrow tables.

What must stay true: a value that is refused is refused before anything has changed, and the error names its path.
"""

cimport cython
from cpython.datetime cimport (
    PyDateTime_CheckExact, PyDateTime_Check, PyDateTimeAPI, PyDateTime_DATE_GET_HOUR, PyDateTime_DATE_GET_MICROSECOND,
    PyDateTime_DATE_GET_MINUTE, PyDateTime_DATE_GET_SECOND, PyDateTime_GET_DAY, PyDateTime_GET_MONTH,
    PyDateTime_GET_YEAR, import_datetime,
)
from cpython.dict cimport PyDict_GetItemWithError
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from cpython.long cimport PyLong_Check, PyLong_CheckExact
from cpython.object cimport PyObject
from cpython.unicode cimport PyUnicode_CheckExact, PyUnicode_Check
from libc.math cimport INFINITY, NAN, isinf, isnan
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

import datetime as _datetime
import difflib
import typing as _typing
from collections.abc import Mapping
from operator import index as _index  # an int, whatever __index__ gives: a value cannot lead back to itself

import msgspec

from penstock.errors import EventError
from penstock.timestamp import Timestamp

import_datetime()

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL
    long long PyLong_AsLongLongAndOverflow(object value, int *overflow) except? -1
    ctypedef struct PyMemberDef:
        const char *name
        Py_ssize_t offset
    ctypedef struct PyMemberDescrObject:
        PyMemberDef *d_member
    PyObject *PyDateTime_TZ "PyDateTime_DATE_GET_TZINFO" (object value)  # borrowed

KEY_BYTES = 1024          # longest key or event id, in bytes
TEXT_BYTES = 65536        # longest other string
cdef int64_t FIRST_TIME = -62135596800000000   # 0001-01-01
cdef int64_t LAST_TIME = 253402300799999999    # 9999-12-31
cdef Py_ssize_t _KEY_BYTES = KEY_BYTES
cdef Py_ssize_t _TEXT_BYTES = TEXT_BYTES
cdef object UTC = _datetime.timezone.utc
cdef object EPOCH = _datetime.datetime(1970, 1, 1, tzinfo=_datetime.timezone.utc)
cdef object MICROSECOND = _datetime.timedelta(microseconds=1)

TYPE_CODES = {"float64": PS_FLOAT64, "int64": PS_INT64, "bool": PS_BOOL, "timestamp": PS_TIMESTAMP, "string": PS_STRING}
SCALES = {None: 1, "us": 1, "ms": 1000, "s": 1000000, "ns": -1000}
_EXPECTED = {PS_FLOAT64: "a number", PS_INT64: "an integer", PS_BOOL: "true or false", PS_STRING: "a string",
             PS_TIMESTAMP: "a time"}


cdef inline int64_t civil_us(object value):
    """Microseconds since 1970 of a datetime's own fields."""
    cdef int64_t days = days_from_civil(PyDateTime_GET_YEAR(value), PyDateTime_GET_MONTH(value), PyDateTime_GET_DAY(value))
    return ((days * 24 + PyDateTime_DATE_GET_HOUR(value)) * 60 + PyDateTime_DATE_GET_MINUTE(value)) * 60000000 \
        + <int64_t>PyDateTime_DATE_GET_SECOND(value) * 1000000 + PyDateTime_DATE_GET_MICROSECOND(value)


cdef int64_t datetime_us(object value) except? -1:
    cdef object tz = <object>PyDateTime_TZ(value)
    if tz is None or tz is UTC:
        return civil_us(value)
    return (value - EPOCH) // MICROSECOND


cdef str numpy_kind(object value):
    """The kind of a numpy scalar's type (i, u, f, b, M, U, ...); "-" for anything else."""
    cdef object dtype = getattr(value, "dtype", None)
    cdef object kind = None if dtype is None or getattr(value, "shape", ()) != () else getattr(dtype, "kind", None)
    return kind if type(kind) is str and len(kind) == 1 else "-"


cdef inline bint digits(const char *text, int n, int *out) noexcept nogil:
    cdef int i, value = 0
    for i in range(n):
        if not b"0" <= text[i] <= b"9":
            return False
        value = value * 10 + (text[i] - 48)
    out[0] = value
    return True


cdef int64_t days_from_civil(int64_t y, int m, int d) noexcept nogil:
    """Days since 1970 of a date, proleptic Gregorian (Howard Hinnant, "chrono-compatible low-level date algorithms")."""
    cdef int64_t era, yoe, doy, doe
    y -= m <= 2
    era = y // 400 if y >= 0 else (y - 399) // 400
    yoe = y - era * 400
    doy = (153 * (m + (-3 if m > 2 else 9)) + 2) // 5 + d - 1
    doe = yoe * 365 + yoe // 4 - yoe // 100 + doy
    return era * 146097 + doe - 719468


cdef bint rfc3339(const char *s, Py_ssize_t n, int64_t *us) noexcept nogil:
    """RFC 3339 to microseconds, digits beyond them floored (S1). False where Timestamp.parse is to say what is wrong."""
    cdef int year, month, day, hour, minute, second, offset_hours = 0, offset_minutes = 0, fraction = 0, width = 0
    cdef Py_ssize_t at = 19
    cdef bint leap
    cdef int last
    if n < 19 or s[4] != b"-" or s[7] != b"-" or s[13] != b":" or s[16] != b":":
        return False
    if s[10] != b"T" and s[10] != b"t" and s[10] != b" ":
        return False
    if not (digits(s, 4, &year) and digits(s + 5, 2, &month) and digits(s + 8, 2, &day) and digits(s + 11, 2, &hour)
            and digits(s + 14, 2, &minute) and digits(s + 17, 2, &second)):
        return False
    leap = (year % 4 == 0 and year % 100 != 0) or year % 400 == 0
    last = 30 + (month + (month > 7)) % 2 if month != 2 else 28 + leap
    if year < 1 or month < 1 or month > 12 or day < 1 or day > last or hour > 23 or minute > 59 or second > 60:
        return False
    if at < n and s[at] == b".":
        at += 1
        if at == n or not b"0" <= s[at] <= b"9":
            return False
        while at < n and b"0" <= s[at] <= b"9":
            if width < 6:
                fraction = fraction * 10 + (s[at] - 48)
                width += 1
            at += 1
        while width < 6:
            fraction *= 10
            width += 1
    us[0] = ((days_from_civil(year, month, day) * 24 + hour) * 60 + minute) * 60000000 \
        + <int64_t>second * 1000000 + fraction
    if at == n:
        return True
    if s[at] == b"Z" or s[at] == b"z":
        return at + 1 == n
    if (s[at] != b"+" and s[at] != b"-") or at + 6 != n or s[at + 3] != b":":
        return False
    if not (digits(s + at + 1, 2, &offset_hours) and digits(s + at + 4, 2, &offset_minutes)):
        return False
    if offset_hours > 23 or offset_minutes > 59:
        return False
    us[0] -= (offset_hours * 60 + offset_minutes) * <int64_t>60000000 * (1 if s[at] == b"+" else -1)
    return True


def _shown(value):
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


cdef class ColumnSet:
    """Columns of one table in the order of an event type's fields, by address; `keep` owns the memory."""

    def __cinit__(self, list columns, Py_ssize_t rows, list keep):
        cdef Py_ssize_t i
        self.n_columns = len(columns)
        self.rows = rows
        self.keep = keep
        self.columns = <Column *>calloc(max(1, self.n_columns), sizeof(Column))
        if self.columns == NULL:
            raise MemoryError()
        for i, (data, validity, validity_offset, offsets, wide, scale, bits) in enumerate(columns):
            self.columns[i].data = <const char *><size_t>data
            self.columns[i].validity = <const uint8_t *><size_t>validity
            self.columns[i].validity_offset = validity_offset
            self.columns[i].offsets = <const void *><size_t>offsets
            self.columns[i].wide_offsets = wide
            self.columns[i].scale = scale
            self.columns[i].bits = bits

    def __dealloc__(self):
        free(self.columns)


cdef class EventReader:
    """Reads events of one type into the first slots of a row, one slot per field."""

    def __cinit__(self, plan, set keys, set aggregated):
        cdef int i
        fields = plan.fields
        self.n = len(fields)
        self.event_name = plan.name
        self.time_field = plan.time
        self.id_field = -1 if plan.event_id is None else plan.event_id
        self.types = <uint8_t *>calloc(self.n, 1)
        self.optional = <uint8_t *>calloc(self.n, 1)
        self.finite = <uint8_t *>calloc(self.n, 1)
        self.key = <uint8_t *>calloc(self.n, 1)
        self.scale = <int64_t *>calloc(self.n, sizeof(int64_t))
        self.user_offsets = <Py_ssize_t *>calloc(self.n, sizeof(Py_ssize_t))
        self.wire_offsets = <Py_ssize_t *>calloc(self.n, sizeof(Py_ssize_t))
        if not (self.types and self.optional and self.finite and self.key and self.scale and self.user_offsets
                and self.wire_offsets):
            raise MemoryError()
        self.names = tuple(f.name for f in fields)
        self.defaults = tuple(f.default for f in fields)
        self.required = tuple(f.required for f in fields)
        self.user_type = plan.type
        self.wire_type = _wire_type(plan)
        for i, f in enumerate(fields):
            self.types[i] = TYPE_CODES[f.type]
            self.optional[i] = f.optional
            self.finite[i] = i in aggregated
            self.key[i] = i in keys
            self.scale[i] = SCALES[f.unit]
            self.user_offsets[i] = _offset(self.user_type, f.name)
            self.wire_offsets[i] = _offset(self.wire_type, f.name)

    def __dealloc__(self):
        free(self.types)
        free(self.optional)
        free(self.finite)
        free(self.key)
        free(self.scale)
        free(self.user_offsets)
        free(self.wire_offsets)

    cdef int read_object(self, object event, ps_slot *slots, uint8_t *status, ps_arena *arena, str prefix) except -1:
        """Read a user's Event, a decoded wire Struct, or a dict. Raises EventError; the row is then undefined."""
        cdef object kind = type(event)
        if kind is self.user_type:
            return self.read_fields(<char *><PyObject *>event, self.user_offsets, slots, status, arena, prefix)
        if kind is self.wire_type:
            return self.read_fields(<char *><PyObject *>event, self.wire_offsets, slots, status, arena, prefix)
        if kind is dict:
            return self.read_dict(event, slots, status, arena, prefix)
        if isinstance(event, Mapping):
            return self.read_dict(dict(event), slots, status, arena, prefix)
        if isinstance(event, self.user_type):
            return self.read_dict({name: getattr(event, name) for name in self.names}, slots, status, arena, prefix)
        raise EventError(prefix, f"expected {self.event_name} or a dict of its fields, got {type(event).__name__}")

    cdef int read_fields(self, char *base, Py_ssize_t *offsets, ps_slot *slots, uint8_t *status, ps_arena *arena,
                         str prefix) except -1:
        cdef int i
        cdef PyObject *value
        cdef double number
        for i in range(self.n):
            value = (<PyObject **>(base + offsets[i]))[0]
            if value == NULL:
                raise EventError(f"{prefix}.{self.names[i]}", "missing")
            if self.types[i] == PS_FLOAT64 and PyFloat_CheckExact(<object>value):
                number = PyFloat_AS_DOUBLE(<object>value)
                if number - number == 0.0:
                    slots[i].f = number
                    status[i] = PS_PRESENT
                    continue
            self.put(i, <object>value, slots, status, arena, prefix)
        return 0

    cdef int read_dict(self, dict event, ps_slot *slots, uint8_t *status, ps_arena *arena, str prefix) except -1:
        cdef int i
        cdef Py_ssize_t found = 0
        cdef PyObject *value
        for i in range(self.n):
            value = PyDict_GetItemWithError(event, self.names[i])
            if value != NULL:
                found += 1
                self.put(i, <object>value, slots, status, arena, prefix)
            elif self.required[i]:
                raise EventError(f"{prefix}.{self.names[i]}", f"missing; {self.event_name} needs it")
            else:
                self.put(i, self.defaults[i], slots, status, arena, prefix)
        if found != len(event):
            for name in event:
                if name not in self.names:
                    close = difflib.get_close_matches(str(name), self.names, n=1)
                    hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(self.names)}"
                    raise EventError(f"{prefix}.{name}", f"unknown field of {self.event_name}; {hint}")
        return 0

    cdef int put(self, int i, object value, ps_slot *slots, uint8_t *status, ps_arena *arena, str prefix) except -1:
        cdef int kind = self.types[i]
        cdef int overflow = 0
        cdef double number
        cdef Py_ssize_t size = 0
        cdef const char *text
        if value is None:
            return self.put_null(i, "null", slots, status, prefix)
        status[i] = PS_PRESENT
        if kind == PS_STRING:
            if PyUnicode_Check(value):
                try:
                    text = PyUnicode_AsUTF8AndSize(value, &size)
                except UnicodeEncodeError:
                    raise EventError(f"{prefix}.{self.names[i]}", "expected text that is valid Unicode, got a lone surrogate") from None
                if size > (_KEY_BYTES if self.key[i] else _TEXT_BYTES):
                    limit = KEY_BYTES if self.key[i] else TEXT_BYTES
                    raise EventError(f"{prefix}.{self.names[i]}", f"expected at most {limit} bytes, got {size}")
                if ps_arena_append(arena, text, size, &slots[i].u) != 0:
                    raise MemoryError()
                return 0
        elif kind == PS_FLOAT64:
            if PyFloat_CheckExact(value):
                number = PyFloat_AS_DOUBLE(value)
            elif isinstance(value, bool):
                raise EventError(f"{prefix}.{self.names[i]}", f"expected a number, got {value}")
            elif PyLong_Check(value) or isinstance(value, float) or numpy_kind(value) in "iuf":
                try:
                    number = float(value)
                except (OverflowError, TypeError, ValueError):
                    raise EventError(f"{prefix}.{self.names[i]}", f"expected a number that fits a float64, got {_shown(value)}") from None
            else:
                raise EventError(f"{prefix}.{self.names[i]}", f"expected a number, got {_shown(value)}")
            if isnan(number):
                return self.put_null(i, "NaN", slots, status, prefix)
            if isinf(number) and self.finite[i]:
                raise EventError(f"{prefix}.{self.names[i]}", "expected a finite number (the field is aggregated), got an infinity")
            slots[i].f = number
            return 0
        elif kind == PS_INT64:
            if PyLong_Check(value) and not isinstance(value, bool):
                slots[i].i = PyLong_AsLongLongAndOverflow(value, &overflow)
                if overflow:
                    raise EventError(f"{prefix}.{self.names[i]}", "expected an integer of at most 64 bits")
                return 0
            if numpy_kind(value) in "iu":
                return self.put(i, _index(value), slots, status, arena, prefix)
        elif kind == PS_BOOL:
            if value is True or value is False:
                slots[i].i = value is True
                return 0
            if numpy_kind(value) == "b":
                slots[i].i = bool(value)
                return 0
        else:
            return self.put_time(i, value, slots, status, prefix)
        raise EventError(f"{prefix}.{self.names[i]}", f"expected {_EXPECTED[kind]}, got {_shown(value)}")

    def put_null_error(self, int i, str what, str prefix):
        name = self.names[i]
        if i == self.time_field:
            raise EventError(f"{prefix}.{name}", f"the event time is missing ({what})")
        raise EventError(f"{prefix}.{name}", f"expected {_EXPECTED[self.types[i]]}, got {what}; declare it `| None` where it may be missing")

    cdef int put_null(self, int i, str what, ps_slot *slots, uint8_t *status, str prefix) except -1:
        if not self.optional[i]:
            self.put_null_error(i, what, prefix)
        slots[i].f = NAN
        if self.types[i] != PS_FLOAT64:
            slots[i].i = 0
        status[i] = PS_NULL_VALUE
        return 0

    cdef int put_time(self, int i, object value, ps_slot *slots, uint8_t *status, str prefix) except -1:
        cdef int64_t us
        cdef int64_t number
        cdef int overflow = 0
        cdef Py_ssize_t size = 0
        cdef const char *text
        if PyUnicode_CheckExact(value):
            try:
                text = PyUnicode_AsUTF8AndSize(value, &size)
            except UnicodeEncodeError:
                size = 0
                text = b""
            if not rfc3339(text, size, &us):
                try:
                    us = Timestamp.parse(value)
                except (ValueError, OverflowError) as error:
                    raise EventError(f"{prefix}.{self.names[i]}", str(error)) from None
        elif PyDateTime_Check(value):
            if not PyDateTime_CheckExact(value) and value != value:
                return self.put_null(i, "NaT", slots, status, prefix)   # pandas: a datetime that is none
            us = datetime_us(value)
        elif isinstance(value, Timestamp):
            us = value
        elif PyLong_Check(value) and not isinstance(value, bool):
            number = PyLong_AsLongLongAndOverflow(value, &overflow)
            if overflow:
                raise EventError(f"{prefix}.{self.names[i]}", "expected a time of at most 64 bits")
            if not scaled(number, self.scale[i], &us):
                raise EventError(f"{prefix}.{self.names[i]}", f"expected a time between the years 1 and 9999, got {number}")
        elif numpy_kind(value) in "iu":
            return self.put_time(i, _index(value), slots, status, prefix)
        elif numpy_kind(value) == "M" and value != value:
            return self.put_null(i, "NaT", slots, status, prefix)
        elif isinstance(value, str) or numpy_kind(value) == "M":
            try:
                us = Timestamp.parse(value) if isinstance(value, str) else Timestamp.of(value)
            except (ValueError, TypeError, OverflowError) as error:
                raise EventError(f"{prefix}.{self.names[i]}", str(error)) from None
        else:
            raise EventError(f"{prefix}.{self.names[i]}",
                             f"expected a time (a datetime, an RFC 3339 string or an integer), got {_shown(value)}")
        if us < FIRST_TIME or us > LAST_TIME:
            raise EventError(f"{prefix}.{self.names[i]}", "expected a time between the years 1 and 9999")
        slots[i].i = us
        return 0

    cdef int read_row(self, const Column *columns, Py_ssize_t row, ps_slot *slots, uint8_t *status,
                      ps_arena *arena) noexcept nogil:
        """Read one row of a table that was checked before. Returns 0, or -1 where memory ran out."""
        cdef int i
        cdef const Column *c
        cdef int64_t at, start, end, number
        for i in range(self.n):
            c = &columns[i]
            if c.validity != NULL:
                at = row + c.validity_offset
                if not (c.validity[at >> 3] >> (at & 7)) & 1:
                    slots[i].f = NAN
                    if self.types[i] != PS_FLOAT64:
                        slots[i].i = 0
                    status[i] = PS_NULL_VALUE
                    continue
            status[i] = PS_PRESENT
            if self.types[i] == PS_FLOAT64:
                slots[i].f = (<const double *>c.data)[row]
                if slots[i].f != slots[i].f:
                    status[i] = PS_NULL_VALUE
            elif self.types[i] == PS_STRING:
                if c.wide_offsets:
                    start = (<const int64_t *>c.offsets)[row]
                    end = (<const int64_t *>c.offsets)[row + 1]
                else:
                    start = (<const int32_t *>c.offsets)[row]
                    end = (<const int32_t *>c.offsets)[row + 1]
                if ps_arena_append(arena, c.data + start, end - start, &slots[i].u) != 0:
                    return -1
            elif self.types[i] == PS_BOOL:
                at = row + c.scale
                slots[i].i = ((<const uint8_t *>c.data)[at >> 3] >> (at & 7)) & 1
            else:
                slots[i].i = (<const int64_t *>c.data)[row]
        return 0


cdef inline bint scaled(int64_t number, int64_t scale, int64_t *us) noexcept nogil:
    """Integer in a field's unit to microseconds; nanoseconds are floored. False beyond the years 1 to 9999."""
    if scale < 0:
        us[0] = number // -scale
        if number % -scale != 0 and number < 0:
            us[0] -= 1
        return True
    if number > LAST_TIME // scale or number < FIRST_TIME // scale:
        return False
    us[0] = number * scale
    return True


cdef Py_ssize_t _offset(object cls, str name) except -1:
    """Where a Struct keeps a field: the offset in the member descriptor that msgspec made for it."""
    for base in cls.__mro__:
        descriptor = base.__dict__.get(name)
        if descriptor is not None:
            if type(descriptor).__name__ != "member_descriptor":
                break
            return (<PyMemberDescrObject *><PyObject *>descriptor).d_member.offset
    raise TypeError(f"{cls.__name__}.{name} is not a field that can be read in place")


def _wire_type(plan):
    """The Struct that JSON decodes into: plain types, times as text (a decoder's datetime would round nanoseconds up,
    and S1 floors them) or as integers in their unit."""
    kinds = {"float64": float, "int64": int, "bool": bool, "string": str}
    fields = []
    for f in plan.fields:
        kind = kinds.get(f.type) or (int if f.unit else str)
        if f.optional:
            kind = _typing.Optional[kind]
        fields.append((f.name, kind) if f.required else (f.name, kind, f.default))
    return msgspec.defstruct(plan.name, fields, forbid_unknown_fields=True, gc=False, kw_only=True)
