"""RESP2 and RESP3 (hot path): any Redis client scores events, ingests them, reads features and runs models.

Commands are parsed where they were received: an argument is a place in the read's bytes, and only what msgspec decodes
becomes an object. Single events of one pipeline that arrived together are scored together, and all answers of a read
leave in one write. Limits are checked as lengths are announced, before anything is kept.
What must stay true: answers come in the order of commands; a command that waits holds back those after it on its
connection; how the bytes were split into reads changes no answer.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.memoryview cimport PyMemoryView_FromMemory
from cpython.buffer cimport PyBUF_READ
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memchr, memcmp, memcpy, memmove

import math
import sys
import traceback

import msgspec

from penstock.errors import EventError, InProgress, LogError, ScoringError

from penstock._ext.core cimport by_time, run_block
from penstock._ext.decision cimport Decision, PS_SHORTEST_ROOM, number_text
from penstock._ext.flow cimport DONE, FULL, Flow, INLINE, LATE, MORE, NATIVE, N_PRIORITIES, QUEUE
from penstock._ext.steps cimport Source
from penstock._ext.wire cimport OUT_SOFT

from penstock._ext.infer import InferError

cdef extern from "http_head.h" nogil:
    int64_t ps_http_now()

cdef enum Kind:
    OTHER = 0
    SCORE = 1
    INGEST = 2
    FEATURES = 3
    INFER = 4
    SEVERAL = 5                # of RespWork: SCORE with several payloads

cdef enum Stage:
    DECODING = 0
    CHECKING = 1
    WORKING = 2

cdef enum Parsed:
    WRONG = -1                 # refused; the connection closes
    PARTIAL = 0
    COMMAND = 1
    NOTHING = 2                # an empty array or line

cdef enum:
    APART = 32                 # events between two looks at the clock, and on the pool at once (core.pxd: BLOCK_ROWS)
    MAX_DIGITS = 20
    MAX_LINE = 65536           # an inline command
    MAX_NAME = 32              # longest name of a command that is looked at
    STRANGER_ARGUMENTS = 10    # before AUTH
    STRANGER_BYTES = 16384
    VIEW_BYTES = 4096          # a longer payload is decoded where it lies
    KEEP_PART = 4096           # an empty buffer beyond this is given back
    FEW = 8                    # so many single events are scored at once; fewer wait for those of other connections
    PARTS = 268435456          # what half commands may take, of all connections
    STEPS = 64                 # commands between two looks at the clock
    TEXT_MAX = 512             # characters of an error

cdef int64_t INLINE_NS = 50000           # flow.pyx does what costs less at once
cdef int64_t TURN_NS = 500000            # one connection's reads are worked on for so long, then others have their turn

cdef bytes BUSY_FULL = b"-BUSY overloaded: the queue is full, retry in "
cdef bytes BUSY_LATE = b"-BUSY deadline: it cannot be answered in time, retry in "
KINDS = ("other", "score", "ingest", "features", "infer")
cdef object DecodeError = msgspec.DecodeError
cdef object ValidationError = msgspec.ValidationError


class Status(str):
    """A reply such as +OK."""


class Verbatim(str):
    """Text that RESP3 marks as text."""


class CommandError(Exception):
    """A command that is refused: the whole line after the dash, for example `ERR syntax error`."""


@cython.final
cdef class Subject:
    """A pipeline or event type as commands name it. index: the engine's."""

    def __init__(self, str name, Lane lane, Core core, Py_ssize_t index, bint pipeline):
        self.name = name.encode()
        self.lane = lane
        self.core = core
        self.index = index
        self.pipe = <Pipe>core.pipes[index] if pipeline else None
        kind = self.pipe.source.reader.wire_type if pipeline else core.wire_type(index)
        self.decode_json = msgspec.json.Decoder(kind).decode
        self.decode_pack = msgspec.msgpack.Decoder(kind).decode
        self.ingest_many = core.ingest_many


cdef bint is_pack(const char *p, size_t n) noexcept nogil:
    """Whether a payload begins as a MessagePack map does."""
    cdef unsigned char c = <unsigned char>p[0] if n else 0
    return (c & 0xf0) == 0x80 or c == 0xde or c == 0xdf


cdef int number(const char *p, size_t n, int64_t *value, size_t *used) noexcept nogil:
    """A decimal and its CR LF: 1 and how long it is, 0 where more must come, -1 where it is none. No plus, no zero first."""
    cdef size_t i = 0
    cdef size_t negative = 0
    cdef int64_t v = 0
    cdef unsigned char c
    if n == 0:
        return 0
    if p[0] == b"-":
        negative = i = 1
    while i < n:
        c = <unsigned char>p[i] - 48
        if c > 9:
            break
        if i >= 18 or (v == 0 and i > negative):
            return -1                                  # too long for any length, or a zero first
        v = v * 10 + c
        i += 1
    if i == n:
        return 0
    if p[i] != b"\r" or i == negative or (negative and v == 0):
        return -1
    if i + 1 == n:
        return 0
    if p[i + 1] != b"\n":
        return -1
    value[0] = -v if negative else v
    used[0] = i + 2
    return 1


cdef bint is_word(const char *p, size_t n, const char *upper, size_t length) noexcept nogil:
    """Whether a word is this one, in any case. `upper` holds A-Z, dots and underlines."""
    cdef size_t i
    cdef char c
    if n != length:
        return False
    for i in range(n):
        c = p[i]
        if b"a" <= c <= b"z":
            c -= 32
        if c != upper[i]:
            return False
    return True


cdef inline bint is_letter(char c) noexcept nogil:
    return b"a" <= c <= b"z" or b"A" <= c <= b"Z"


cdef int whole(const char *p, size_t n, int64_t *value) noexcept nogil:
    """A non-negative decimal that is all of an argument; -1 where it is none."""
    cdef size_t i
    cdef int64_t v = 0
    if n == 0 or n > 18:
        return -1
    for i in range(n):
        if not b"0" <= p[i] <= b"9":
            return -1
        v = v * 10 + (p[i] - 48)
    value[0] = v
    return 0


cdef str shown(const char *p, size_t n):
    """An argument as an error may quote it."""
    return p[:min(n, 100)].decode("utf-8", "backslashreplace") + ("..." if n > 100 else "")


def one_line(str text):
    """What an error may say: no line ends (they would end the reply), and no more than TEXT_MAX characters."""
    text = text.replace("\r", " ").replace("\n", " ")
    return text if len(text) <= TEXT_MAX else text[:TEXT_MAX] + "..."


@cython.final
cdef class RespServer(WireServer):
    """What the connections of one RESP listener share.

    pipelines, events: lists of Subject. find_model(name, version) -> Target or None.
    features(view, as_of, ints, statuses, keys) and control(connection, name, arguments) give replies of the control path,
    see `reply`. Timeouts are in seconds, sizes in bytes. max_parts: of all commands whose rest has not come (None: 256 MiB,
    or two of the longest commands where these are more).
    """

    def __init__(self, Flow flow, *, pipelines, events, find_model, features, control, password=None, log=None,
                 max_body=1 << 20, max_arguments=16384, max_connections=10000, max_parts=None, body_timeout=10.0,
                 idle_timeout=75.0, write_timeout=30.0):
        WireServer.__init__(self, flow, max_connections=max_connections, write_timeout=write_timeout)
        cdef Subject s
        self.pipelines = {s.name: s for s in pipelines}
        self.events = {s.name: s for s in events}
        self.models = {}
        self.find_model = find_model
        self.features = features
        self.control = control
        self.password = password.encode() if isinstance(password, str) else password
        self.log = log
        self.max_body = max_body
        self.max_command = 4 * max_body + MAX_LINE
        self.max_parts = max(<size_t>PARTS, 2 * self.max_command) if max_parts is None else max_parts
        self.max_arguments = max_arguments
        self.body_timeout = <int64_t>(body_timeout * 1e9)
        self.idle_timeout = <int64_t>(idle_timeout * 1e9)
        self.errors = {}
        self.decoded = []
        self.batch_connections = []
        self.batch_data = []
        self.grow_arguments(64)

    def __dealloc__(self):
        free(self.arguments)
        free(self.line)

    def __call__(self):
        """A protocol for one connection (the factory that `loop.create_server` wants)."""
        return RespConnection(self)

    @property
    def error_counts(self):
        return dict(self.errors)

    @property
    def command_counts(self):
        """Commands since start by kind (KINDS)."""
        return {name: self.kinds[i] for i, name in enumerate(KINDS)}

    @property
    def clients(self):
        return sorted(self.connections, key=_id_of)

    cdef int send_all(self) except -1:
        """What is sent is answered first."""
        if self.batch_n:
            self.flush()
        return WireServer.send_all(self)

    cdef int flush(self) except -1:
        """Score the single events that were gathered, of every connection. Where they are queued, these are busy."""
        # Submitting may answer others, who then gather events of theirs: by then nothing of the batch may be needed any
        # more. So all of it is copied first.
        cdef list connections = self.batch_connections
        cdef list data = self.batch_data
        cdef list works = []
        cdef Options options = self.batch_options
        cdef RespConnection c
        cdef Subject subject = self.batch_subject
        cdef Lane lane
        cdef RespWork work
        cdef int n = self.batch_n
        cdef int i, first, why
        cdef int64_t now, deadline = 0
        if n == 0:
            return 0
        self.batch_n = 0
        self.batch_number += 1
        self.batch_connections = []
        self.batch_data = []
        self.own_answers()
        lane = subject.lane
        now = ps_http_now()
        c = <RespConnection>connections[0]
        why = self.flow.admit(lane, n, now, c.started, options.timeout_us, options.priority, &deadline, False)
        try:
            if why == INLINE:
                self.score_batch(subject, &options, self.batch_p, self.batch_sizes, n, connections)
                lane.observe(n, ps_http_now() - now)
                return 0
            first = 0
            for i in range(n):
                c = <RespConnection>connections[i]
                if i + 1 < n and connections[i + 1] is c:
                    continue
                if c.transport is not None and not c.closed:
                    if why == QUEUE:
                        work = RespWork.__new__(RespWork)
                        work.kind = SCORE
                        work.connection = c
                        work.subject = subject
                        work.lane = lane
                        work.options = options
                        work.deadline = deadline
                        work.gather(self.batch_p + first, self.batch_sizes + first, i + 1 - first)
                        c.busy = True
                        works.append(work)
                    else:
                        for first in range(first, i + 1):
                            self.busy(lane, why, lane.on_pool(n, False))
                        self.queue(c)
                first = i + 1
            data.clear()
            for work in works:
                work.connection.wait_for(work)
        except BaseException:
            for c in connections:
                c.fault()
            raise
        return 0

    cdef int own_answers(self) except -1:
        """Before the answers of others are formed: those of the connection that is being read are its own."""
        if self.current is not None and self.out_n > self.out_from:
            self.queue(self.current)
        return 0

    cdef int grow_arguments(self, int64_t n) except -1:
        cdef Slice *grown = <Slice *>realloc(self.arguments, n * sizeof(Slice))
        if grown == NULL:
            raise MemoryError()
        self.arguments = grown
        self.room_arguments = n
        return 0

    # Replies.

    cdef int head(self, char kind, int64_t n) except -1:
        """The first line of a bulk or a collection."""
        self.put(&kind, 1)
        self.put_number(n)
        return self.put(b"\r\n", 2)

    cdef int bulk(self, const char *p, size_t n) except -1:
        self.head(b"$", n)
        self.put(p, n)
        return self.put(b"\r\n", 2)

    cdef int error(self, str kind, str code, str message) except -1:
        name = code or kind
        self.errors[name] = self.errors.get(name, 0) + 1
        text = f"{kind} {code} {message}" if code else f"{kind} {message}"
        self.put(b"-", 1)
        self.put_bytes(one_line(text).encode("utf-8", "replace"))
        return self.put(b"\r\n", 2)

    cdef int busy(self, Lane lane, int why, bint pooled) except -1:
        """The refusal of one command, that the pool would have run or the loop; nothing of it was decoded."""
        cdef int64_t ns = self.flow.short.before(N_PRIORITIES - 1)
        cdef str code = "overloaded" if why == FULL else "deadline"
        if pooled:
            ns = self.flow.long.before(N_PRIORITIES - 1) // self.flow.n_threads
        self.errors[code] = self.errors.get(code, 0) + 1
        self.put_bytes(BUSY_FULL if why == FULL else BUSY_LATE)
        self.put_number(1 + ns // 1000000)
        return self.put(b" ms\r\n", 5)

    cdef int fail(self, object error, Py_ssize_t place) except -1:
        """The reply to an exception. place: which of several payloads, -1: the only one."""
        cdef str at = "$" if place < 0 else f"$[{place}]"
        if isinstance(error, CommandError):
            text = str(error)
            kind, _, rest = text.partition(" ")
            return self.error(kind, "", rest)
        if isinstance(error, EventError):
            return self.error("ERR", "invalid_event", f"${error.path}: {error.message}")
        if isinstance(error, ValidationError):
            message = str(error)
            cut = message.rfind(" - at `$")
            if cut >= 0 and message.endswith("`"):
                at += message[cut + 8:len(message) - 1]
                message = message[:cut]
            return self.error("ERR", "invalid_event", f"{at}: {message}")
        if isinstance(error, DecodeError):
            return self.error("ERR", "malformed_payload", f"{at}: {error}")
        if isinstance(error, UnicodeError):
            return self.error("ERR", "invalid_utf8", f"{at}: not UTF-8: {getattr(error, 'reason', error)}")
        if isinstance(error, RecursionError):
            return self.error("ERR", "too_deep", f"{at}: nested too deeply")
        if isinstance(error, InProgress):
            return self.error("BUSY", "in_progress:", f"{error}, retry in 1 ms")
        if isinstance(error, LogError):
            return self.error("ERR", "log_refused", str(error))
        if isinstance(error, InferError):
            return self.error("ERR", {400: "invalid_input", 404: "unknown_model"}.get(error.status, "internal"), error.message)
        if self.log is not None:
            self.log(error)
        else:
            traceback.print_exception(error, file=sys.stderr)
        if isinstance(error, ScoringError):
            return self.error("ERR", "internal", str(error))
        return self.error("ERR", "internal", "the server failed; its log has the reason")

    cdef int reply(self, object value, int protocol) except -1:
        """None, bool, int, float, bytes, str, Status, Verbatim, dict, list or tuple, frozenset, and CommandError."""
        cdef char text[PS_SHORTEST_ROOM]
        cdef bytes data
        cdef int n
        if value is None:
            return self.put(b"_\r\n", 3) if protocol == 3 else self.put(b"$-1\r\n", 5)
        if value is True or value is False:
            if protocol == 3:
                return self.put(b"#t\r\n" if value is True else b"#f\r\n", 4)
            return self.put(b":1\r\n" if value is True else b":0\r\n", 4)
        if isinstance(value, int):
            data = b"%d" % value
            return self.put_bytes((b":%s\r\n" if -(2**63) <= value < 2**63 else b"(%s\r\n") % data)
        if isinstance(value, float):
            if math.isfinite(value):
                data = text[:number_text(value, text)]
            else:
                data = b"nan" if value != value else b"inf" if value > 0 else b"-inf"
            return self.put_bytes(b",%s\r\n" % data) if protocol == 3 else self.bulk(PyBytes_AS_STRING(data), len(data))
        if isinstance(value, bytes):
            return self.bulk(PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value))
        if isinstance(value, Status):
            return self.put_bytes(b"+%s\r\n" % value.encode())
        if isinstance(value, str):
            data = value.encode("utf-8", "replace")
            if protocol == 3 and isinstance(value, Verbatim):
                self.head(b"=", len(data) + 4)
                self.put(b"txt:", 4)
                self.put_bytes(data)
                return self.put(b"\r\n", 2)
            return self.bulk(PyBytes_AS_STRING(data), len(data))
        if isinstance(value, dict):
            if protocol == 3:
                self.head(b"%", len(value))
            else:
                self.head(b"*", 2 * len(value))
            for key, item in value.items():
                self.reply(key, protocol)
                self.reply(item, protocol)
            return 0
        if isinstance(value, frozenset):
            self.head(b"~" if protocol == 3 else b"*", len(value))
            for item in sorted(value):
                self.reply(Status(item), protocol)
            return 0
        if isinstance(value, Exception):
            return self.fail(value, -1)
        self.head(b"*", len(value))
        for item in value:
            self.reply(item, protocol)
        return 0

    cdef int decision(self, object answer, bint packed, bint explain) except -1:
        """A decision as a bulk in its payload's format, or the error in its place."""
        cdef Decision d
        cdef bytes data
        cdef char *out
        cdef Py_ssize_t n
        if not isinstance(answer, Decision):
            return self.fail(answer, -1)
        d = <Decision>answer
        if explain:
            data = d.msgpack(True) if packed else d.json(True)
            return self.bulk(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
        out = self.room(16 + (d.texts.pack_room if packed else d.texts.json_room))
        # Nearly every decision takes three digits of bytes: it is written where it belongs then.
        n = d.write_msgpack(out + 6) if packed else d.write_json(out + 6)
        if 100 <= n <= 999:
            out[0] = b"$"
            out[1] = <char>(48 + n // 100)
            out[2] = <char>(48 + n // 10 % 10)
            out[3] = <char>(48 + n % 10)
            out[4] = b"\r"
            out[5] = b"\n"
            out[6 + n] = b"\r"
            out[7 + n] = b"\n"
            self.out_n += 8 + n
            return 0
        data = out[6:6 + n]
        return self.bulk(PyBytes_AS_STRING(data), n)

    # What commands do.

    cdef object decoded_event(self, Subject subject, const char *p, size_t n):
        """A payload as a wire Struct. Raises what msgspec raises."""
        cdef object decode
        cdef object view
        cdef char c = p[0] if n else 0
        if c == b"{":
            decode = subject.decode_json
        elif is_pack(p, n):
            decode = subject.decode_pack
        elif c == b" " or c == b"\n" or c == b"\r" or c == b"\t":
            decode = subject.decode_json
        else:
            raise DecodeError("expected a JSON object or a MessagePack map" + ("" if n else ", got nothing"))
        if n <= VIEW_BYTES:
            return decode(PyBytes_FromStringAndSize(p, n))
        view = PyMemoryView_FromMemory(<char *>p, n, PyBUF_READ)
        try:
            return decode(view)
        finally:
            view.release()

    cdef list decode_several(self, Subject subject, const char *base, const Slice *payloads, Py_ssize_t n):
        """The events of one command; None after answering the first that cannot be decoded."""
        cdef Py_ssize_t i
        cdef list events = []
        for i in range(n):
            try:
                events.append(self.decoded_event(subject, base + payloads[i].at, payloads[i].n))
            except Exception as error:
                self.fail(error, i if n > 1 else -1)
                return None
        return events

    cdef int score_batch(self, Subject subject, const Options *options, const char **p, const size_t *sizes, int n,
                         list connections) except -1:
        """Score single events together and answer each, in order; an error is that event's alone. connections: whose each
        is; None: all of the one that is being read."""
        cdef list events = self.decoded
        cdef list answers
        cdef list errors = None
        cdef bint failed[BATCH]
        cdef int i
        cdef Py_ssize_t a = 0, e = 0
        cdef RespConnection c = None
        events.clear()
        for i in range(n):
            failed[i] = False
            try:
                events.append(self.decoded_event(subject, p[i], sizes[i]))
            except Exception as error:
                failed[i] = True
                if errors is None:
                    errors = []
                errors.append(error)
        try:
            answers = subject.core.score_together(subject.pipe, events, options.ingest, options.explain)
        except Exception as error:
            answers = [error] * len(events)
        events.clear()
        self.batches += 1
        self.batched += n
        for i in range(n):
            if connections is not None:
                c = <RespConnection>connections[i]
                if c.transport is None or c.closed:
                    a += not failed[i]
                    e += failed[i]
                    continue
            if failed[i]:
                self.fail(errors[e], -1)
                e += 1
            else:
                self.decision(answers[a], is_pack(p[i], sizes[i]), options.explain)
                self.appended |= options.ingest and isinstance(answers[a], Decision)
                a += 1
            if connections is not None and (i + 1 == n or connections[i + 1] is not c):
                self.queue(c)
        return 0

    cdef int score_several(self, Subject subject, const Options *options, const char *base, const Slice *payloads,
                           Py_ssize_t n) except -1:
        """All or nothing on bad input; then one answer each, also where a model failed."""
        cdef list events = self.decode_several(subject, base, payloads, n)
        cdef list answers
        cdef Py_ssize_t i
        if events is None:
            return 0
        try:
            subject.core.check(subject.pipe.source, events, 0, len(events))
            answers = subject.core.score_together(subject.pipe, events, options.ingest, options.explain)
        except Exception as error:
            return self.fail(error, -1)
        self.head(b"*", n)
        for i in range(n):
            self.decision(answers[i], is_pack(base + payloads[i].at, payloads[i].n), options.explain)
            self.appended |= options.ingest and isinstance(answers[i], Decision)
        return 0

    cdef int ingest(self, Subject subject, const char *base, const Slice *payloads, Py_ssize_t n) except -1:
        cdef list events = self.decode_several(subject, base, payloads, n)
        cdef list outcomes
        if events is None:
            return 0
        try:
            outcomes = subject.ingest_many(subject.index, events)
        except EventError as error:
            if n == 1 and error.path.startswith("[0]"):
                error = EventError(error.path[3:], error.message)
            return self.fail(error, -1)
        except Exception as error:
            return self.fail(error, -1)
        if n > 1:
            self.head(b"*", n)
        for outcome in outcomes:
            self.outcome(outcome)
        return 0

    cdef int outcome(self, str outcome) except -1:
        self.appended = True
        self.put(b"+", 1)
        self.put_bytes(outcome.encode())
        return self.put(b"\r\n", 2)

    cdef int tensors(self, InferCall call) except -1:
        """The outputs of a call that has run, raw."""
        cdef int i
        cdef const char *p
        cdef size_t n = 0
        try:
            call.finish()
        except Exception as error:
            return self.fail(error, -1)
        if call.n_parts != 1:
            self.head(b"*", call.n_parts)
        for i in range(call.n_parts):
            p = call.part(i, &n)
            self.bulk(p, n)
        return 0

    cdef Target model(self, const char *p, size_t n):
        """The model that a client names, `name` or `name@version`; None where there is none."""
        cdef bytes key = PyBytes_FromStringAndSize(p, n)
        cdef Target target = self.models.get(key)
        if target is not None and target.model is not None:
            return target
        try:
            name, at, version = key.decode().rpartition("@")
        except UnicodeDecodeError:
            return None
        target = self.find_model(name, version) if at else self.find_model(version, "")
        if target is None and at:
            target = self.find_model(key.decode(), "")
        if target is not None:
            if len(self.models) > 4096:
                self.models.clear()
            self.models[key] = target
        return target


def _id_of(RespConnection connection):
    return connection.id


@cython.final
@cython.no_gc_clear
cdef class RespConnection(WireConnection):
    """One client. `protocol` is 2 or 3; `name` and `facts` are what it told of itself."""

    def __cinit__(self, RespServer server):
        self.wire = server
        self.server = server
        self.fd = -1
        self.want = -1
        self.protocol = 2
        self.authenticated = server.password is None
        self.name = b""
        self.facts = None
        server.last_id += 1
        self.id = server.last_id

    def __dealloc__(self):
        self.give_back(0, 0)

    @property
    def address(self):
        """`host:port` of the peer."""
        peer = None if self.transport is None else self.transport.get_extra_info("peername")
        if not isinstance(peer, tuple):
            return "?"
        return f"[{peer[0]}]:{peer[1]}" if ":" in peer[0] else f"{peer[0]}:{peer[1]}"

    @property
    def idle_seconds(self):
        return (ps_http_now() - self.since) // 1000000000

    def close_after_reply(self):
        """QUIT: answer, then close."""
        self.closing = True

    # Reading commands.

    cdef int consume(self, bytes data) except -1:
        # A command that is submitted may be answered before submit() returns: what follows it is then done here, not
        # by its done(). No other connection is read meanwhile.
        cdef RespServer server = self.server
        server.current = self
        try:
            self.do_all(data)
        except BaseException:
            # What was gathered lies in `data`; nothing of this connection's is answered any more.
            server.forget()
            self.closed = True
            server.flush()
            raise
        finally:
            server.current = None
        return 0

    cdef int do_all(self, bytes data) except -1:
        """Do every command that is complete; keep what is not."""
        cdef RespServer server = self.server
        cdef const char *p = PyBytes_AS_STRING(data)
        cdef size_t n = PyBytes_GET_SIZE(data)
        cdef size_t pos = 0
        cdef size_t used = 0
        cdef bint progress = self.part_n == 0
        cdef int got
        cdef int steps = 0
        cdef int64_t began = ps_http_now()
        cdef bint own = False      # the arguments are in `marks`: they came in parts
        cdef bint kept = self.part_n > 0
        if kept:
            if self.append(p, n):
                self.too_much()
                if self.busy:
                    data = PyBytes_FromStringAndSize(self.part, self.part_n) + data
                    return self.park(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
                return self.finish()
            if self.part_n < self.part_need:
                return 0
            p = self.part
            n = self.part_n
        while pos < n:
            if server.out_n > OUT_SOFT:
                self.flush()
                if self.busy:
                    return self.park(p + pos, n - pos)
                server.queue(self)
                server.send_all()
                if self.paused or self.closed:
                    return self.park(p + pos, n - pos)
            own = self.want >= 0
            got = self.parse(p + pos, n - pos, &used)
            if got == PARTIAL:
                break
            if got == WRONG:
                progress = True
                if self.busy:
                    return self.park(p + pos, n - pos)
                break
            if got == COMMAND and self.execute(self.marks if own else server.arguments, self.have):
                return self.park(p + pos, n - pos)
            self.want = -1
            pos += used
            progress = True
            if self.closing:
                break
            if self.closed:
                return self.flush()                    # what was gathered lies in `data`
            if self.busy:
                return self.park(p + pos, n - pos)
            steps += 1
            if steps % STEPS == 0 and pos < n and ps_http_now() - began > TURN_NS:
                self.flush()
                if not self.busy:
                    self.busy = True
                    server.call_soon(self.go_on)
                return self.park(p + pos, n - pos)
        if server.batch_n:
            if kept or self.closing or self.half_closed or server.batch_n >= FEW:
                self.flush()                           # while their bytes, or this connection, are here
            else:
                server.batch_data.append(data)         # with those that others sent meanwhile
                if not server.called:
                    server.called = True
                    server.call_soon(server.send_waiting)
        if self.busy:
            return self.park(p + pos, n - pos)
        if self.closed:
            return 0
        if self.closing:
            self.linger = self.linger or pos < n
            return self.finish()
        if self.keep(p + pos, n - pos, own):
            self.too_much()
            return self.park(p + pos, n - pos) if self.busy else self.finish()
        if progress:
            self.since = self.started
        server.queue(self)
        return 0

    def eof_received(self):
        self.server.flush()
        return WireConnection.eof_received(self)

    def go_on(self):
        """After others had their turn (the loop calls it)."""
        self.busy = False
        if not self.paused:
            self.read_on()

    cdef int park(self, const char *p, size_t n) except -1:
        """Leave what is not done yet until this connection may go on."""
        self.pending = PyBytes_FromStringAndSize(p, n) if n and not self.closed else None
        self.part_n = 0
        self.want = -1
        self.give_back(KEEP_PART, 64)
        self.since = self.started
        self.server.queue(self)
        return 0

    # What half a command keeps. All connections together keep no more than max_parts, but a little each.

    cdef bint may_grow(self, size_t size, size_t more) noexcept:
        """Whether a buffer may grow by `more`, to `size` bytes."""
        return size <= KEEP_PART or self.server.part_bytes + more <= self.server.max_parts

    cdef int give_back(self, size_t part, int64_t marks) except -1:
        """Give back buffers that are larger than this; nothing of theirs is used any more."""
        if self.part_cap > part:
            free(self.part)
            self.part = NULL
            self.server.part_bytes -= self.part_cap
            self.part_cap = 0
        if self.marks_cap > marks:
            free(self.marks)
            self.marks = NULL
            self.server.part_bytes -= self.marks_cap * sizeof(Slice)
            self.marks_cap = 0
        return 0

    cdef int append(self, const char *p, size_t n) except -1:
        """Returns 1, and does nothing, where half commands take too much."""
        cdef size_t need = self.part_n + n
        cdef size_t cap
        cdef char *grown
        if need > self.part_cap:
            cap = max(2 * self.part_cap, need, <size_t>512)
            if not self.may_grow(cap, cap - self.part_cap):
                cap = need
                if not self.may_grow(cap, cap - self.part_cap):
                    return 1
            grown = <char *>realloc(self.part, cap)
            if grown == NULL:
                raise MemoryError()
            self.part = grown
            self.server.part_bytes += cap - self.part_cap
            self.part_cap = cap
        memcpy(self.part + self.part_n, p, n)
        self.part_n = need
        return 0

    cdef int grow_marks(self, int64_t n) except -1:
        """Room for n arguments. Returns 1, and does nothing, where half commands take too much."""
        cdef Slice *grown
        cdef size_t size = n * sizeof(Slice)
        if not self.may_grow(size, size - self.marks_cap * sizeof(Slice)):
            return 1
        grown = <Slice *>realloc(self.marks, size)
        if grown == NULL:
            raise MemoryError()
        self.marks = grown
        self.server.part_bytes += size - self.marks_cap * sizeof(Slice)
        self.marks_cap = n
        return 0

    cdef int keep(self, const char *p, size_t n, bint own) except -1:
        """Keep the beginning of a command, and where its arguments are as far as they came (`own`: in marks already).
        Returns 1 where half commands take too much."""
        if n == 0:
            self.part_n = 0
            self.want = -1
            return self.give_back(KEEP_PART, 64)
        if self.part_n and p >= self.part and p < self.part + self.part_cap:
            if p != self.part:
                memmove(self.part, p, n)
            self.part_n = n
        else:
            self.part_n = 0
            if self.append(p, n):
                return 1
        if self.want >= 0 and not own:
            if (self.have > self.marks_cap or self.marks == NULL) and self.grow_marks(self.have + 16):
                return 1
            memcpy(self.marks, self.server.arguments, self.have * sizeof(Slice))
        return 0

    cdef int parse(self, const char *p, size_t n, size_t *used) except -2:
        """One command from its first byte on. COMMAND: `have` arguments are in server.arguments, or in marks where it came
        in parts."""
        cdef RespServer server = self.server
        cdef int64_t value = 0
        cdef size_t length = 0
        cdef int got
        if self.want >= 0:
            return self.parse_bulks(p, n, used, self.marks)
        self.part_need = n + 1
        if p[0] != b"*":
            return self.parse_inline(p, n, used)
        got = number(p + 1, n - 1, &value, &length)
        if got == 0:
            return PARTIAL
        if got < 0 or value > server.max_arguments:
            return self.protocol_error("invalid multibulk length")
        if value <= 0:
            used[0] = 1 + length
            return NOTHING
        if value > STRANGER_ARGUMENTS and not self.authenticated:
            return self.protocol_error("unauthenticated multibulk length")
        self.want = value
        self.have = 0
        self.at = 1 + length
        got = self.parse_bulks(p, n, used, server.arguments)
        if got == WRONG:
            self.want = -1
        return got

    cdef int parse_bulks(self, const char *p, size_t n, size_t *used, Slice *slices) except -2:
        cdef RespServer server = self.server
        cdef bint own = slices == self.marks and slices != NULL
        cdef int64_t room = self.marks_cap if own else server.room_arguments
        cdef int64_t have = self.have
        cdef int64_t value = 0
        cdef size_t at = self.at
        cdef size_t length = 0
        cdef size_t start, end
        cdef int got
        while have < self.want:
            if at >= n:
                self.part_need = at + 1
                break
            if p[at] != b"$":
                got = <unsigned char>p[at]
                return self.protocol_error(f"expected '$', got '{chr(got) if 32 <= got < 127 else '?'}'")
            got = number(p + at + 1, n - at - 1, &value, &length)
            if got == 0:
                self.part_need = n + 1
                break
            if got < 0 or value < 0 or <size_t>value > server.max_body:
                return self.protocol_error("invalid bulk length")
            if value > STRANGER_BYTES and not self.authenticated:
                return self.protocol_error("unauthenticated bulk length")
            start = at + 1 + length
            end = start + <size_t>value
            if end > server.max_command:
                return self.protocol_error(f"too big command, at most {server.max_command} bytes")
            if end + 2 > n:
                self.part_need = end + 2
                break
            if p[end] != b"\r" or p[end + 1] != b"\n":
                return self.protocol_error("expected CR LF after a bulk")
            if have == room:
                room = min(2 * room + 16, self.want)
                if own:
                    if self.grow_marks(room):
                        return self.too_much()
                    slices = self.marks
                else:
                    server.grow_arguments(room)
                    slices = server.arguments
            slices[have].at = start
            slices[have].n = <size_t>value
            have += 1
            at = end + 2
        self.have = have
        self.at = at
        if have < self.want:
            return PARTIAL
        self.base = p
        used[0] = at
        return COMMAND

    cdef int parse_inline(self, const char *p, size_t n, size_t *used) except -2:
        """A line of words, with quoting as in a shell: "..." with escapes, '...' with \\' only."""
        cdef RespServer server = self.server
        cdef const char *newline = <const char *>memchr(p, b"\n", <size_t>min(n, <size_t>(MAX_LINE + 1)))
        cdef size_t end, i = 0, out = 0, start
        cdef char *grown
        cdef char c, quote
        cdef int64_t have = 0
        if newline == NULL:
            if n > MAX_LINE:
                return self.protocol_error("too big inline request")
            return PARTIAL
        end = newline - p
        used[0] = end + 1
        if end and p[end - 1] == b"\r":
            end -= 1
        if end > server.line_cap:
            grown = <char *>realloc(server.line, end)
            if grown == NULL:
                raise MemoryError()
            server.line = grown
            server.line_cap = end
        while True:
            while i < end and is_space(p[i]):
                i += 1
            if i == end:
                break
            start = out
            quote = 0
            while i < end:
                c = p[i]
                if quote == 0:
                    if is_space(c) and c != b"\v" and c != b"\f":
                        break
                    if c == b'"' or c == b"'":
                        quote = c
                        i += 1
                        continue
                elif c == quote:
                    if i + 1 < end and not is_space(p[i + 1]):
                        return self.protocol_error("unbalanced quotes in request")
                    quote = 0
                    i += 1
                    break
                elif c == b"\\" and i + 1 < end:
                    if quote == b"'":
                        if p[i + 1] == b"'":
                            c = b"'"
                            i += 1
                    elif p[i + 1] == b"x" and i + 3 < end and hex_of(p[i + 2]) >= 0 and hex_of(p[i + 3]) >= 0:
                        c = <char>(16 * hex_of(p[i + 2]) + hex_of(p[i + 3]))
                        i += 3
                    else:
                        i += 1
                        c = escaped(p[i])
                server.line[out] = c
                out += 1
                i += 1
            if quote:
                return self.protocol_error("unbalanced quotes in request")
            if have == server.room_arguments:
                server.grow_arguments(2 * have)
            server.arguments[have].at = start
            server.arguments[have].n = out - start
            have += 1
        if have == 0:
            return NOTHING
        if not self.authenticated and out > STRANGER_BYTES:
            return self.protocol_error("unauthenticated request is too long")
        self.have = have
        self.base = server.line
        return COMMAND

    cdef int protocol_error(self, str message) except -2:
        """Answer, and close: where the next command begins cannot be known."""
        self.flush()
        if not self.busy:
            self.server.error("ERR", "", f"Protocol error: {message}")
            self.closing = True
            self.linger = True
        return WRONG

    cdef int too_much(self) except -2:
        """Answer, and close: the rest of the command cannot be kept."""
        self.flush()
        if not self.busy:
            self.server.error("ERR", "too_much", f"commands whose rest has not come take {self.server.part_bytes} bytes of "
                              f"at most {self.server.max_parts}, of all connections: send this one again later")
            self.closing = True
            self.linger = True
        return WRONG

    # Doing them.

    cdef int execute(self, const Slice *a, int64_t n) except -1:
        """Do one command. Returns 1 where it must be read again later: single events before it wait in a queue."""
        cdef RespServer server = self.server
        cdef const char *name = self.base + a[0].at
        cdef size_t length = a[0].n
        cdef int kind = OTHER
        if length == 14:
            if is_word(name, length, b"PENSTOCK.SCORE", 14):
                kind = SCORE
            elif is_word(name, length, b"PENSTOCK.INFER", 14):
                kind = INFER
        elif length == 15:
            if is_word(name, length, b"PENSTOCK.INGEST", 15):
                kind = INGEST
        elif length == 17:
            if is_word(name, length, b"PENSTOCK.FEATURES", 17):
                kind = FEATURES
        if kind == SCORE and self.authenticated and not self.refusing:
            return self.score(a, n)
        if server.batch_n:
            self.flush()
            if self.busy:
                return 1
        server.kinds[kind] += 1
        if not self.authenticated:
            if not (is_word(name, length, b"AUTH", 4) or is_word(name, length, b"HELLO", 5)
                    or is_word(name, length, b"QUIT", 4) or is_word(name, length, b"RESET", 5)):
                server.error("NOAUTH", "", "Authentication required.")
                return 0
        if self.refusing and not (is_word(name, length, b"EXEC", 4) or is_word(name, length, b"DISCARD", 7)
                                  or is_word(name, length, b"RESET", 5) or is_word(name, length, b"QUIT", 4)):
            server.error("ERR", "in_transaction", "it was not done: MULTI before it was refused; EXEC or DISCARD ends this")
            return 0
        if kind == INGEST:
            return self.ingest(a, n)
        if kind == INFER:
            return self.infer(a, n)
        if kind == FEATURES:
            return self.features(a, n)
        if n == 1 and is_word(name, length, b"PING", 4):
            server.put(b"+PONG\r\n", 7)
            return 0
        return self.ask_control(a, n)

    cdef int ask_control(self, const Slice *a, int64_t n) except -1:
        """The commands of the control path."""
        cdef RespServer server = self.server
        cdef int64_t i
        cdef object reply
        cdef list arguments = []
        cdef const char *name = self.base + a[0].at
        for i in range(1, n):
            arguments.append(PyBytes_FromStringAndSize(self.base + a[i].at, a[i].n))
        try:
            reply = server.control(self, PyBytes_FromStringAndSize(name, a[0].n), arguments)
        except Exception as error:
            server.fail(error, -1)
            return 0
        server.reply(reply, self.protocol)
        return 0

    cdef int options(self, const Slice *a, int64_t *i, int64_t n, bint scoring, Options *options) except -1:
        """Read options from argument i[0] on, to before n. Returns 1 after answering a wrong one."""
        cdef RespServer server = self.server
        cdef const char *p
        cdef size_t length
        cdef int64_t value = 0
        options.timeout_us = 0
        options.priority = 0
        options.ingest = True
        options.explain = False
        while i[0] < n:
            p = self.base + a[i[0]].at
            length = a[i[0]].n
            if length == 0 or not is_letter(p[0]):
                return 0
            if is_word(p, length, b"TIMEOUT", 7) or is_word(p, length, b"PRIORITY", 8):
                if i[0] + 1 >= n or whole(self.base + a[i[0] + 1].at, a[i[0] + 1].n, &value) != 0:
                    server.error("ERR", "", f"{shown(p, length).upper()}: expected a whole number after it")
                    return 1
                if length == 7:
                    options.timeout_us = value
                elif value >= N_PRIORITIES:
                    server.error("ERR", "", f"PRIORITY: expected 1 (first) to {N_PRIORITIES - 1} (last), got {value}")
                    return 1
                else:
                    options.priority = <int>value
                i[0] += 2
            elif scoring and is_word(p, length, b"NOINGEST", 8):
                options.ingest = False
                i[0] += 1
            elif scoring and is_word(p, length, b"EXPLAIN", 7):
                options.explain = True
                i[0] += 1
            else:
                known = "TIMEOUT us, PRIORITY n" + (", NOINGEST, EXPLAIN" if scoring else "")
                server.error("ERR", "", f"syntax error: no option {shown(p, length)!r} here (known: {known})")
                return 1
        return 0

    cdef int score(self, const Slice *a, int64_t n) except -1:
        """PENSTOCK.SCORE pipeline [options] payload [payload ...]"""
        cdef RespServer server = self.server
        cdef const char *p
        cdef Subject subject = server.last_pipeline
        cdef Options options
        cdef int64_t i = 2
        cdef int64_t now, deadline = 0
        cdef int limit, why
        cdef RespWork work
        if n < 3:
            return self.refused("ERR", "wrong number of arguments for 'penstock.score' command")
        p = self.base + a[1].at
        if subject is None or <size_t>PyBytes_GET_SIZE(subject.name) != a[1].n or memcmp(PyBytes_AS_STRING(subject.name), p, a[1].n):
            subject = <Subject>server.pipelines.get(PyBytes_FromStringAndSize(p, a[1].n))
            if subject is None:
                return self.refused("ERR", f"no pipeline {shown(p, a[1].n)!r}; have {names_of(server.pipelines)}", "unknown_pipeline")
            server.last_pipeline = subject
        options.timeout_us = 0
        options.priority = 0
        options.ingest = True
        options.explain = False
        if a[2].n and is_letter(self.base[a[2].at]):
            if server.batch_n:
                self.flush()                           # an error must come after their answers
                if self.busy:
                    return 1
            if self.options(a, &i, n, True, &options):
                server.kinds[<int>SCORE] += 1
                return 0
            if i == n:
                return self.refused("ERR", "wrong number of arguments for 'penstock.score' command")
        if i + 1 == n and self.base != server.line:
            # A connection has one piece of a batch: two would be two works, and one connection waits for one.
            if server.batch_n and (server.batch_subject is not subject or not same(&server.batch_options, &options)
                                   or (self.batch == server.batch_number
                                       and server.batch_connections[server.batch_n - 1] is not self)):
                self.flush()
                if self.busy:
                    return 1
            server.batch_subject = subject
            server.batch_options = options
            self.batch = server.batch_number
            server.batch_connections.append(self)
            server.batch_p[server.batch_n] = self.base + a[i].at
            server.batch_sizes[server.batch_n] = a[i].n
            server.batch_n += 1
            server.kinds[<int>SCORE] += 1
            limit = BATCH
            if subject.lane.row_ns * (BATCH // 2) < INLINE_NS:
                limit = <int>min(<int64_t>BATCH, INLINE_NS // subject.lane.row_ns)
            if server.batch_n >= limit:
                self.flush()
            return 0
        if server.batch_n:
            self.flush()
            if self.busy:
                return 1
        server.kinds[<int>SCORE] += 1
        now = ps_http_now()
        why = server.flow.admit(subject.lane, n - i, now, self.started, options.timeout_us, options.priority, &deadline,
                                False)
        if why == INLINE:
            server.score_several(subject, &options, self.base, a + i, n - i) if n - i > 1 else \
                self.score_line(subject, &options, a + i)
            subject.lane.observe(n - i, ps_http_now() - now)
        elif why == QUEUE:
            work = RespWork.__new__(RespWork)
            work.kind = SEVERAL if n - i > 1 else SCORE
            work.subject = subject
            work.lane = subject.lane
            work.options = options
            work.deadline = deadline
            work.copy(self.base, a + i, n - i)
            self.wait_for(work)
        else:
            server.busy(subject.lane, why, subject.lane.on_pool(n - i, False))
        return 0

    cdef int score_line(self, Subject subject, const Options *options, const Slice *payload) except -1:
        """One event of an inline command: its bytes are the line's, so it is scored at once."""
        cdef const char *p = self.base + payload.at
        return self.server.score_batch(subject, options, &p, &payload.n, 1, None)

    cdef int refused(self, str kind, str message, str code="") except -1:
        """Answer an error in its place. Returns 1 where the events before it must be answered first."""
        cdef RespServer server = self.server
        if server.batch_n:
            self.flush()
            if self.busy:
                return 1
        server.error(kind, code, message)
        return 0

    cdef int flush(self) except -1:
        """Score what was gathered. Where events of this connection are queued, it is busy."""
        return self.server.flush()

    cdef int wait_for(self, RespWork work) except -1:
        work.connection = self
        work.arrival = self.started
        work.priority = work.options.priority
        self.busy = True
        self.server.own_answers()                      # submitting may answer others
        self.server.flow.submit(work)
        return 0

    cdef int ingest(self, const Slice *a, int64_t n) except -1:
        """PENSTOCK.INGEST Event payload [payload ...]"""
        cdef RespServer server = self.server
        cdef Subject subject
        cdef RespWork work
        cdef Options options
        cdef int64_t now, deadline = 0
        cdef int64_t i = 2
        cdef int why
        if n < 3:
            return server.error("ERR", "", "wrong number of arguments for 'penstock.ingest' command")
        subject = <Subject>server.events.get(PyBytes_FromStringAndSize(self.base + a[1].at, a[1].n))
        if subject is None:
            return server.error("ERR", "unknown_event",
                                f"no event {shown(self.base + a[1].at, a[1].n)!r}; have {names_of(server.events)}")
        if self.options(a, &i, n, False, &options):
            return 0
        if i == n:
            return server.error("ERR", "", "wrong number of arguments for 'penstock.ingest' command")
        now = ps_http_now()
        why = server.flow.admit(subject.lane, n - i, now, self.started, options.timeout_us, options.priority, &deadline,
                                False)
        if why == INLINE:
            server.ingest(subject, self.base, a + i, n - i)
            subject.lane.observe(n - i, ps_http_now() - now)
        elif why == QUEUE:
            work = RespWork.__new__(RespWork)
            work.kind = INGEST
            work.subject = subject
            work.lane = subject.lane
            work.options = options
            work.deadline = deadline
            work.copy(self.base, a + i, n - i)
            self.wait_for(work)
        else:
            server.busy(subject.lane, why, subject.lane.on_pool(n - i, False))
        return 0

    cdef int infer(self, const Slice *a, int64_t n) except -1:
        """PENSTOCK.INFER model[@version] [TIMEOUT us] [PRIORITY n] tensor"""
        cdef RespServer server = self.server
        cdef Target target
        cdef InferCall call
        cdef Options options
        cdef RespWork work
        cdef int64_t i = 2
        cdef int64_t now, deadline = 0
        cdef int why
        if n < 3:
            return server.error("ERR", "", "wrong number of arguments for 'penstock.infer' command")
        target = server.model(self.base + a[1].at, a[1].n)
        if target is None or target.model is None:
            return server.error("ERR", "unknown_model", f"no model {shown(self.base + a[1].at, a[1].n)!r} is loaded")
        if self.options(a, &i, n - 1, False, &options):
            return 0
        if i != n - 1:
            return server.error("ERR", "", f"expected one tensor after the model and its options, got {n - i}")
        now = ps_http_now()
        try:
            call = InferCall.of_raw(target.model, self.base + a[i].at, a[i].n)
        except Exception as error:
            return server.fail(error, -1)
        why = server.flow.admit(target.lane, call.rows, now, self.started, options.timeout_us, options.priority, &deadline,
                                True)
        if why == INLINE:
            call.run()
            server.tensors(call)
            target.lane.observe(call.rows, ps_http_now() - now)
        elif why == QUEUE:
            work = RespWork.__new__(RespWork)
            work.kind = INFER
            work.whole = True
            work.lane = target.lane
            work.options = options
            work.deadline = deadline
            work.copy(self.base, a + i, 1)
            work.call = InferCall.of_raw(target.model, PyBytes_AS_STRING(work.payload), a[i].n)
            work.rows = call.rows
            self.wait_for(work)
        else:
            target.model.refused(ps_http_now() - now)
            server.busy(target.lane, why, target.lane.on_pool(call.rows, True))
        return 0

    cdef int features(self, const Slice *a, int64_t n) except -1:
        """PENSTOCK.FEATURES view [ASOF t] [INT] [WITHSTATUS] key [key ...]; KEYS ends the options."""
        cdef RespServer server = self.server
        cdef int64_t i = 2
        cdef const char *p
        cdef bytes as_of = None
        cdef bint ints = False
        cdef bint statuses = False
        cdef list keys = []
        cdef object reply
        while i < n:
            p = self.base + a[i].at
            if is_word(p, a[i].n, b"ASOF", 4) and i + 1 < n:
                as_of = PyBytes_FromStringAndSize(self.base + a[i + 1].at, a[i + 1].n)
                i += 2
            elif is_word(p, a[i].n, b"INT", 3):
                ints = True
                i += 1
            elif is_word(p, a[i].n, b"WITHSTATUS", 10):
                statuses = True
                i += 1
            else:
                if is_word(p, a[i].n, b"KEYS", 4) and i + 1 < n:
                    i += 1
                break
        while i < n:
            keys.append(PyBytes_FromStringAndSize(self.base + a[i].at, a[i].n))
            i += 1
        if not keys:
            return server.error("ERR", "", "wrong number of arguments for 'penstock.features' command")
        try:
            reply = server.features(PyBytes_FromStringAndSize(self.base + a[1].at, a[1].n), as_of, ints, statuses, keys)
        except Exception as error:
            return server.fail(error, -1)
        return server.reply(reply, self.protocol)

    # What the wire asks.

    cdef int too_many(self) except -1:
        self.server.error("ERR", "max_clients", "max number of clients reached")
        self.closing = True
        self.linger = True
        return self.finish()

    cdef int gone(self) except -1:
        self.give_back(0, 0)
        self.part_n = 0
        self.want = -1
        return 0

    cdef bint idle(self) noexcept:
        return self.part_n == 0

    cdef int expire(self, int64_t now) except -1:
        if self.part_n == 0:
            if now - self.since > self.server.idle_timeout:
                self.transport.close()
        elif now - self.since > self.server.body_timeout:
            self.server.error("ERR", "timeout", "the rest of the command did not arrive in time")
            self.closing = True
            self.linger = True
            self.finish()
        return 0


cdef bint same(const Options *a, const Options *b) noexcept nogil:
    return (a.timeout_us == b.timeout_us and a.priority == b.priority and a.ingest == b.ingest
            and a.explain == b.explain)


cdef inline bint is_space(char c) noexcept nogil:
    """What Redis skips between words (inside one, \v and \f end nothing)."""
    return c == b" " or b"\t" <= c <= b"\r" or c == 0


cdef int hex_of(char c) noexcept nogil:
    if b"0" <= c <= b"9":
        return c - 48
    if b"a" <= c <= b"f":
        return c - 87
    if b"A" <= c <= b"F":
        return c - 55
    return -1


cdef char escaped(char c) noexcept nogil:
    if c == b"n":
        return b"\n"
    if c == b"r":
        return b"\r"
    if c == b"t":
        return b"\t"
    if c == b"b":
        return b"\b"
    if c == b"a":
        return b"\a"
    return c


cdef str names_of(dict subjects):
    return ", ".join(sorted(name.decode() for name in subjects)[:20]) or "none"


ctypedef void (*unheld_call)(void *call) noexcept nogil


cdef void run_infer_of(InferCall call) noexcept nogil:
    call.run()


cdef void run_infer(void *arg) noexcept nogil:
    cdef unheld_call call = <unheld_call>run_infer_of    # through a variable: a cast that is called at once is a trap
    call(arg)


@cython.final
@cython.no_gc
cdef class RespWork(Work):
    def __dealloc__(self):
        free(self.slices)

    cdef int copy(self, const char *base, const Slice *slices, Py_ssize_t n) except -1:
        """Keep some arguments: what was received is gone when they are used."""
        cdef Py_ssize_t i
        cdef size_t total = 0
        cdef char *to
        for i in range(n):
            total += slices[i].n
        self.payload = PyBytes_FromStringAndSize(NULL, total)
        self.slices = <Slice *>malloc(n * sizeof(Slice))
        if self.slices == NULL:
            raise MemoryError()
        to = PyBytes_AS_STRING(self.payload)
        total = 0
        for i in range(n):
            memcpy(to + total, base + slices[i].at, slices[i].n)
            self.slices[i].at = total
            self.slices[i].n = slices[i].n
            total += slices[i].n
        self.n = n
        self.rows = n
        return 0

    cdef int gather(self, const char **p, const size_t *sizes, int n) except -1:
        """copy() for events that were read one by one."""
        cdef Slice slices[BATCH]
        cdef int i
        for i in range(n):
            slices[i].at = <size_t>(p[i] - p[0])
            slices[i].n = sizes[i]
        return self.copy(p[0], slices, n)

    cdef int begin(self) except -1:
        """Go on for no more than a slice, or hand the models to the pool. Who is gone before anything was done asked for
        nothing: it was not acknowledged."""
        cdef RespConnection connection = self.connection
        cdef int got
        if connection.transport is None and self.stage == DECODING and self.at == 0:
            return self.done()
        try:
            if self.kind == INFER:
                got = self.begin_infer()
            else:
                got = self.go_on()
        except Exception as error:
            return self.fail(error)
        except BaseException:
            connection.busy = False
            connection.fault()
            raise
        return self.done() if got == DONE else got

    cdef int begin_infer(self) except -1:
        cdef int64_t began
        if self.pooled:
            self.job.call = run_infer
            self.job.arg = <void *>self.call
            return NATIVE
        began = ps_http_now()
        self.call.run()
        self.connection.server.tensors(self.call)
        self.lane.observe(self.rows, ps_http_now() - began)
        return DONE

    cdef int go_on(self) except -1:
        """Decode; check all of it where it is all or nothing; then score or ingest, a part at a time."""
        cdef RespServer server = self.connection.server
        cdef Core core = self.subject.core
        cdef const char *base = PyBytes_AS_STRING(self.payload)
        cdef int64_t began = ps_http_now()
        cdef int64_t until = began + server.flow.slice_ns
        cdef Py_ssize_t first, most
        cdef object event
        if self.stage == DECODING:
            if self.events is None:
                self.events = []
                self.answers = []
            while self.at < self.n:
                event = None
                try:
                    event = server.decoded_event(self.subject, base + self.slices[self.at].at, self.slices[self.at].n)
                except Exception as error:
                    if self.kind != SCORE:
                        self.fail_at(error, self.at if self.n > 1 else -1)
                        return DONE
                    if self.failed is None:
                        self.failed = {}
                    self.failed[self.at] = error
                else:
                    self.events.append(event)
                self.at += 1
                if self.at % APART == 0 and ps_http_now() >= until:
                    return MORE
            self.at = 0
            self.stage = CHECKING if self.kind != SCORE else WORKING
        while self.stage == CHECKING:
            first = self.at
            self.at = min(len(self.events), first + APART)
            if first == 0 and self.kind == INGEST:
                self.times = []
            core.check(self.source(), self.events, first, self.at, self.times)
            if self.at == len(self.events):
                if self.kind == INGEST:
                    self.order = by_time(self.times)
                    self.events = [self.events[i] for i in self.order]
                self.at = 0
                self.stage = WORKING
            elif ps_http_now() >= until:
                return MORE
        if self.pooled and self.kind != INGEST:
            return self.apart()
        while self.at < len(self.events):
            first = self.at
            most = APART if self.kind == INGEST else max(<int64_t>1, min(<int64_t>APART, server.flow.slice_ns // self.lane.row_ns))
            self.at = min(len(self.events), first + most)
            if self.kind == INGEST:
                self.answers.extend(self.subject.ingest_many(self.subject.index, self.events[first:self.at]))
            else:
                self.answers.extend(core.score_together(
                    self.subject.pipe, self.events[first:self.at], self.options.ingest, self.options.explain))
            self.lane.observe(self.at - first, ps_http_now() - began)
            began = ps_http_now()
            if began >= until and self.at < len(self.events):
                return MORE
        return self.answer()

    cdef Source source(self):
        return self.subject.pipe.source if self.subject.pipe is not None else <Source>self.subject.core.sources[self.subject.index]

    cdef int apart(self) except -1:
        """Begin the next events whose models run on the pool, about ten milliseconds of them. DONE where none is left."""
        cdef Py_ssize_t most = max(<int64_t>1, min(<int64_t>APART, 10000000 // max(<int64_t>1, self.lane.row_ns)))
        while self.at < len(self.events):
            self.block = self.subject.core.begin_apart(
                self.subject.pipe, self.events[self.at:self.at + most], self.options.ingest, self.options.explain)
            self.at += len(self.block.answers)         # an id that comes again begins the next part
            if self.block.n:
                self.rows = self.block.n
                self.job.call = run_block
                self.job.arg = &self.block.parts
                return NATIVE
            self.answers.extend(self.subject.core.end_apart(self.block))
        return self.answer()

    cdef int finish(self) except -1:
        """The pool has run it."""
        cdef RespConnection connection = self.connection
        try:
            if self.kind == INFER:
                if connection.transport is not None:
                    connection.server.tensors(self.call)
                else:
                    self.call.finish()
                return self.done()
            self.answers.extend(self.subject.core.end_apart(self.block))
            self.block = None
            if self.at < len(self.events):
                self.rows = min(<int64_t>len(self.events) - self.at, <int64_t>APART)
                return connection.server.flow.again(self)      # behind what waits for the pool
            self.answer()
        except Exception as error:
            return self.fail(error)
        except BaseException:
            connection.busy = False
            connection.fault()
            raise
        return self.done()

    cdef int answer(self) except -1:
        """All replies, in the order of the payloads."""
        cdef RespServer server = self.connection.server
        cdef const char *base = PyBytes_AS_STRING(self.payload)
        cdef Py_ssize_t i, at = 0
        if self.connection.transport is None:
            return DONE
        if self.kind == SCORE:
            server.batches += 1
            server.batched += self.n
        elif self.n > 1:
            server.head(b"*", self.n)
        if self.order is not None:
            self.answers = [answer for _, answer in sorted(zip(self.order, self.answers))]
        for i in range(self.n):
            if self.failed is not None and i in self.failed:
                server.fail(self.failed[i], -1)
                continue
            if self.kind == INGEST:
                server.outcome(self.answers[at])
            else:
                server.decision(self.answers[at], is_pack(base + self.slices[i].at, self.slices[i].n), self.options.explain)
                server.appended |= self.options.ingest and isinstance(self.answers[at], Decision)
            at += 1
        return DONE

    cdef int fail(self, object error) except -1:
        """The whole command failed; of several single events each."""
        cdef Py_ssize_t i
        for i in range(self.n if self.kind == SCORE else 1):
            self.fail_at(error, -1)
        return self.done()

    cdef int fail_at(self, object error, Py_ssize_t place) except -1:
        if isinstance(error, EventError) and self.n == 1 and error.path.startswith("[0]"):
            error = EventError(error.path[3:], error.message)
        if self.connection.transport is not None:
            self.connection.server.fail(error, place)
        return 0

    cdef int refuse(self, int why) except -1:
        cdef RespConnection connection = self.connection
        cdef RespServer server = connection.server
        cdef Py_ssize_t i
        if connection.transport is not None:
            if self.kind == INFER:
                self.call.model.refused(ps_http_now() - self.arrival)
            for i in range(self.n if self.kind == SCORE else 1):
                server.busy(self.lane, why, self.pooled)
        return self.done()

    cdef int fault(self) except -1:
        if self.connection is not None:
            self.connection.busy = False
            self.connection.fault()
        return 0

    cdef int done(self) except -1:
        """Answered: the connection goes on."""
        cdef RespConnection connection = self.connection
        cdef RespServer server
        self.block = None
        self.call = None
        server = connection.server
        if connection.transport is None:
            connection.busy = False
            return DONE
        server.queue(connection)
        connection.started = ps_http_now()
        if server.current is None or server.current is connection:
            connection.busy = False
            if server.current is None and not connection.paused:
                connection.read_on()
        else:
            server.call_soon(connection.go_on)         # another connection is being read
        return DONE
