"""The RESP listener (control path): what it serves, and the commands that clients and tools ask once.

Scoring, ingesting and inference are answered in ext/resp.pyx; here are the connection's own commands (HELLO, AUTH,
CLIENT), INFO, the tables behind COMMAND, and feature reads. What must stay true: what stands here never runs per event.
"""

from __future__ import annotations

import hmac
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .._ext.flow import Flow, Lane
from .._ext.resp import CommandError, RespConnection, RespServer, Status, Subject, Verbatim
from ..errors import EventError, PenstockError, ReplayNeeded
from ..timestamp import Timestamp
from .config import ServerConfig

if TYPE_CHECKING:
    from .._ext.infer import Target
    from ..engine import Engine

__all__ = ["build_resp"]

OK = Status("OK")
MAX_KEYS = 1000
NAME_MAX = 1024
TRANSACTIONS = ("MULTI", "EXEC", "DISCARD", "WATCH")


def build_resp(
    engine: Engine | None,
    config: ServerConfig,
    *,
    flow: Flow,
    lanes: Mapping[str, Lane] | None = None,
    event_lanes: Mapping[str, Lane] | None = None,
    find_model: Callable[[str, str], Target | None] | None = None,
    log: Callable[[Exception], None] | None = None,
) -> RespServer:
    """A RespServer of an engine's pipelines, events and views, and of the models that find_model(name, version) gives.

    lanes, event_lanes: by pipeline and by event, shared with the other protocols; left out, lanes of its own.
    """
    from .routes import lane_of

    pipelines: list[Subject] = []
    events: list[Subject] = []
    if engine is not None:
        for pipeline in engine.plan.pipelines.values():
            lane = (lanes or {}).get(pipeline.name) or lane_of(config, pipeline.name, may_pool=bool(pipeline.models))
            pipelines.append(Subject(pipeline.name, lane, engine.core, pipeline.index, True))
        for event in engine.plan.events.values():
            lane = (event_lanes or {}).get(event.name) or lane_of(config, event.name, row_ns=3000)
            events.append(Subject(event.name, lane, engine.core, event.index, False))
    control = Control(engine, config.password)
    server = RespServer(
        flow,
        pipelines=pipelines,
        events=events,
        find_model=find_model or (lambda name, version: None),
        features=control.features,
        control=control,
        password=config.password,
        log=log,
        max_body=config.max_body,
        max_connections=config.max_connections,
        body_timeout=config.body_timeout,
        idle_timeout=config.idle_timeout,
        write_timeout=config.write_timeout,
    )
    control.server = server
    return server


class Control:
    """Commands answered in Python: control(connection, name, arguments) gives the reply or raises CommandError."""

    server: RespServer

    def __init__(self, engine: Engine | None, password: str | None) -> None:
        self.engine = engine
        self.password = None if password is None else password.encode()
        self.started = time.time()
        self.commands: dict[str, Callable[[RespConnection, list[bytes]], Any]] = {
            "AUTH": self.auth,
            "CLIENT": self.client,
            "COMMAND": self.command,
            "CONFIG": self.config,
            "ECHO": self.echo,
            "HELLO": self.hello,
            "INFO": self.info,
            "PING": self.ping,
            "QUIT": self.quit,
            "RESET": self.reset,
            "SELECT": self.select,
        }

    def __call__(self, connection: RespConnection, name: bytes, arguments: list[bytes]) -> Any:
        word = name.decode("utf-8", "backslashreplace")
        upper = word.upper()
        if upper in ("POST", "HOST:"):
            # A web page that makes a browser send commands: nothing of it may be taken for one.
            connection.close_after_reply()
            raise CommandError("ERR this port speaks RESP, not HTTP")
        command = self.commands.get(upper)
        if command is None:
            if upper in TRANSACTIONS:
                return self.transaction(connection, upper, arguments)
            given = "".join(f"'{a[:128].decode('utf-8', 'backslashreplace')}' " for a in arguments[:16])
            raise CommandError(f"ERR unknown command '{word[:128]}', with args beginning with: {given}")
        least, most = ARITY[upper]
        if not least <= len(arguments) <= most:
            raise CommandError(f"ERR wrong number of arguments for '{word.lower()}' command")
        return command(connection, arguments)

    def transaction(self, connection: RespConnection, name: str, arguments: list[bytes]) -> Any:
        """MULTI is refused, and with it what its sender meant to be done only together: all up to EXEC or DISCARD."""
        refusing = connection.refusing
        if arguments and name == "DISCARD":
            raise CommandError("ERR wrong number of arguments for 'discard' command")
        connection.refusing = name == "MULTI"
        if arguments and name == "EXEC":
            why = "wrong number of arguments for 'exec' command"
            raise CommandError(f"EXECABORT Transaction discarded because of: {why}")
        if name == "EXEC" and refusing:
            raise CommandError("EXECABORT Transaction discarded because of previous errors.")
        if name == "DISCARD" and refusing:
            return OK
        if name in ("EXEC", "DISCARD"):
            raise CommandError(f"ERR {name} without MULTI")
        raise CommandError(f"ERR {name} is not served: there are no transactions; pipeline without one")

    # The connection.

    def authenticate(self, connection: RespConnection, user: bytes, password: bytes) -> None:
        right = self.password is None or hmac.compare_digest(password, self.password)
        if not (right and user == b"default"):
            raise CommandError("WRONGPASS invalid username-password pair or user is disabled.")
        connection.authenticated = True

    def auth(self, connection: RespConnection, arguments: list[bytes]) -> Any:
        if len(arguments) == 1 and self.password is None:
            raise CommandError("ERR AUTH <password> called without any password configured for the default user.")
        user = arguments[0] if len(arguments) == 2 else b"default"
        self.authenticate(connection, user, arguments[-1])
        return OK

    def hello(self, connection: RespConnection, arguments: list[bytes]) -> Any:
        protocol = connection.protocol
        name: bytes | None = None
        if arguments:
            if not arguments[0].isdigit():
                raise CommandError("ERR Protocol version is not an integer or out of range")
            if arguments[0] not in (b"2", b"3"):
                raise CommandError("NOPROTO unsupported protocol version")
            protocol = int(arguments[0])
        rest = arguments[1:]
        while rest:
            option = rest[0].upper()
            if option == b"AUTH" and len(rest) >= 3:
                self.authenticate(connection, rest[1], rest[2])
                rest = rest[3:]
            elif option == b"SETNAME" and len(rest) >= 2:
                name = _name(rest[1])
                rest = rest[2:]
            else:
                raise CommandError(f"ERR Syntax error in HELLO option '{_text(rest[0])}'")
        if not connection.authenticated:
            raise CommandError(
                "NOAUTH HELLO must be called with the client already authenticated, otherwise the HELLO <proto> AUTH "
                "<user> <pass> option can be used to authenticate the client and select the RESP protocol version at "
                "the same time"
            )
        connection.protocol = protocol
        if name is not None:
            connection.name = name
        return {
            b"server": b"penstock",
            b"version": _version().encode(),
            b"proto": protocol,
            b"id": connection.id,
            b"mode": b"standalone",
            b"role": b"master",
            b"modules": [],
        }

    def ping(self, connection: RespConnection, arguments: list[bytes]) -> Any:
        return arguments[0] if arguments else Status("PONG")

    def echo(self, connection: RespConnection, arguments: list[bytes]) -> Any:
        return arguments[0]

    def quit(self, connection: RespConnection, arguments: list[bytes]) -> Any:
        connection.close_after_reply()
        return OK

    def reset(self, connection: RespConnection, arguments: list[bytes]) -> Any:
        connection.protocol = 2
        connection.name = b""
        connection.authenticated = self.password is None
        connection.refusing = False
        return Status("RESET")

    def select(self, connection: RespConnection, arguments: list[bytes]) -> Any:
        if _integer(arguments[0]) != 0:
            raise CommandError("ERR DB index is out of range")
        return OK

    def client(self, connection: RespConnection, arguments: list[bytes]) -> Any:
        word, rest = arguments[0].upper(), arguments[1:]
        if word == b"SETNAME" and len(rest) == 1:
            connection.name = _name(rest[0])
            return OK
        if word == b"GETNAME" and not rest:
            return connection.name or None
        if word == b"SETINFO" and len(rest) == 2:
            fact = rest[0].lower()
            if fact not in (b"lib-name", b"lib-ver"):
                raise CommandError(f"ERR Unrecognized option '{_text(rest[0])}'")
            connection.facts = {**(connection.facts or {}), fact.decode(): _name(rest[1]).decode("utf-8", "replace")}
            return OK
        if word == b"ID" and not rest:
            return connection.id
        if word == b"INFO" and not rest:
            return Verbatim(_client_line(connection))
        if word == b"LIST":
            return Verbatim("".join(map(_client_line, self.server.clients)))
        if word in (b"NO-EVICT", b"NO-TOUCH") and len(rest) == 1:
            return OK
        raise CommandError(f"ERR unknown subcommand or wrong number of arguments for '{_text(arguments[0])}'.")

    # About the server.

    def config(self, connection: RespConnection, arguments: list[bytes]) -> Any:
        """CONFIG GET, as tools ask it: there is nothing to configure here, and nothing is persisted as Redis does."""
        if arguments[0].upper() != b"GET" or len(arguments) < 2:
            raise CommandError(f"ERR unknown subcommand '{_text(arguments[0])}': settings are given at start")
        known = {b"save": b"", b"appendonly": b"no", b"databases": b"1"}
        return {name: known[name] for name in (a.lower() for a in arguments[1:]) if name in known}

    def info(self, connection: RespConnection, arguments: list[bytes]) -> Any:
        wanted = {a.decode("utf-8", "replace").lower() for a in arguments}
        everything = not wanted or wanted & {"all", "default", "everything"}
        sections = self.sections()
        found = [
            f"# {name}\r\n" + "".join(f"{key}:{value}\r\n" for key, value in facts.items())
            for name, facts in sections.items()
            if everything or name.lower() in wanted
        ]
        return Verbatim("\r\n".join(found))

    def sections(self) -> dict[str, dict[str, Any]]:
        """INFO by section. Names that tools of Redis know keep their meaning; ours are under Penstock."""
        server = self.server
        counts = server.command_counts
        up = int(time.time() - self.started)
        sections: dict[str, dict[str, Any]] = {
            "Server": {
                # Client libraries compare it with what they need: RESP3 and CLIENT SETINFO are there since this one.
                "redis_version": "7.2.0",
                "penstock_version": _version(),
                "redis_mode": "standalone",
                "process_id": os.getpid(),
                "uptime_in_seconds": up,
                "uptime_in_days": up // 86400,
            },
            "Clients": {"connected_clients": server.open_connections, "maxclients": server.max_connections},
            "Memory": {"used_memory_rss": _resident()},
            "Persistence": {"loading": 0},
            "Stats": {
                "total_connections_received": server.accepted,
                "rejected_connections": server.refused,
                "total_commands_processed": sum(counts.values()),
                "total_error_replies": sum(server.error_counts.values()),
            },
            "Replication": {"role": "master", "connected_slaves": 0},
            "Errorstats": {f"errorstat_{name}": f"count={n}" for name, n in sorted(server.error_counts.items())},
            "Cluster": {"cluster_enabled": 0},
            "Penstock": {
                **{f"commands_{kind}": n for kind, n in counts.items()},
                "scored_together_calls": server.batches,
                "scored_together_events": server.batched,
            },
        }
        if self.engine is not None:
            plan = self.engine.plan
            sections["Penstock"] |= {
                "app": plan.app,
                "plan": plan.fingerprint,
                "pipelines": ",".join(plan.pipelines),
                "events": ",".join(plan.events),
                "views": ",".join(plan.views),
            }
            log = self.engine.core.log
            sections["Persistence"]["penstock_log"] = "none" if log is None else log.folder
        return sections

    def command(self, connection: RespConnection, arguments: list[bytes]) -> Any:
        word = arguments[0].upper() if arguments else b""
        names = [a.decode("utf-8", "replace").upper() for a in arguments[1:]]
        if word == b"COUNT" and not names:
            return len(COMMANDS)
        if word == b"LIST":
            return [name.lower().encode() for name in COMMANDS]
        if word == b"DOCS":
            return {name.lower().encode(): _docs(COMMANDS[name]) for name in (names or COMMANDS) if name in COMMANDS}
        if word in (b"INFO", b""):
            chosen = names if word and names else list(COMMANDS)
            return [_command_info(name) if name in COMMANDS else None for name in chosen]
        if word == b"GETKEYS":
            raise CommandError("ERR The command has no key arguments")
        raise CommandError(f"ERR unknown subcommand '{_text(arguments[0])}'. Try COMMAND DOCS.")

    # PENSTOCK.FEATURES

    def features(self, view: bytes, as_of: bytes | None, ints: bool, statuses: bool, keys: list[bytes]) -> Any:
        """One map per key; with `statuses` a pair of maps, values and statuses."""
        name = _text(view)
        if self.engine is None or name not in self.engine.plan.views:
            known = ", ".join(sorted(self.engine.plan.views)) if self.engine is not None else ""
            return CommandError(f"ERR unknown_view no view {name[:100]!r}; have {known or 'none'}")
        if len(keys) > MAX_KEYS:
            return CommandError(f"ERR too_many_keys {len(keys)} keys, at most {MAX_KEYS}")
        ints = ints or self.engine.plan.views[name].key_type == "int64"
        wanted: list[str | int] = []
        for i, key in enumerate(keys):
            try:
                if len(key) > 1024:
                    raise ValueError("expected a key of at most 1024 bytes")
                wanted.append(int(key) if ints else key.decode())
            except ValueError as error:
                why = "not UTF-8" if isinstance(error, UnicodeError) else str(error)
                why = "expected an integer" if ints and not isinstance(error, UnicodeError) else why
                return CommandError(f"ERR invalid_key key {i}: {why}")
        at: Timestamp | None = None
        if as_of is not None:
            text = _text(as_of)
            try:
                at = Timestamp.of(int(text) if text.lstrip("-").isdigit() else text)
            except (ValueError, TypeError, OverflowError) as error:
                return CommandError(f"ERR invalid_time ASOF: {error}")
        try:
            found = self.engine.features(name, wanted, at)
        except ReplayNeeded as error:
            return CommandError(f"ERR replay_needed {error}")
        except EventError as error:
            return CommandError(f"ERR invalid_key {error}")
        except PenstockError as error:
            return CommandError(f"ERR {error}")
        rows = [{key: _plain(value) for key, value in row.items()} for row in found.rows]
        if not statuses:
            return rows
        return [[row, dict(status)] for row, status in zip(rows, found.statuses)]


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, Timestamp) else value


def _text(word: bytes) -> str:
    return word[:128].decode("utf-8", "backslashreplace")


def _integer(word: bytes) -> int:
    try:
        return int(word)
    except ValueError:
        raise CommandError("ERR value is not an integer or out of range") from None


def _name(word: bytes) -> bytes:
    if len(word) > NAME_MAX or any(c <= 32 or c == 127 for c in word):
        raise CommandError("ERR Client names cannot contain spaces, newlines or special characters.")
    return word


def _version() -> str:
    from .. import __version__

    return __version__


def _resident() -> int:
    """Bytes of this process in memory."""
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _client_line(connection: RespConnection) -> str:
    facts = connection.facts or {}
    name = connection.name.decode("utf-8", "backslashreplace")
    return (
        f"id={connection.id} addr={connection.address} name={name} idle={connection.idle_seconds} flags=N db=0 "
        f"resp={connection.protocol} lib-name={facts.get('lib-name', '')} lib-ver={facts.get('lib-ver', '')}\n"
    )


# The tables behind COMMAND. Each: summary, group, complexity, arity as Redis counts it, flags, arguments.

Argument = dict[str, Any]


def _argument(name: str, kind: str, *flags: str, token: str | None = None) -> Argument:
    argument: Argument = {"name": name, "type": kind}
    if token is not None:
        argument["token"] = token
    if flags:
        argument["flags"] = frozenset(flags)
    return argument


_TIMEOUT = _argument("microseconds", "integer", "optional", token="TIMEOUT")
_PRIORITY = _argument("priority", "integer", "optional", token="PRIORITY")

COMMANDS: dict[str, dict[str, Any]] = {
    "PENSTOCK.SCORE": {
        "summary": "Scores events of a pipeline, JSON or MessagePack, and answers decisions in the same format.",
        "group": "penstock",
        "complexity": "O(N) for N payloads",
        "arity": -3,
        "flags": ("write", "denyoom"),
        "arguments": [
            _argument("pipeline", "string"),
            _TIMEOUT,
            _PRIORITY,
            _argument("noingest", "pure-token", "optional", token="NOINGEST"),
            _argument("explain", "pure-token", "optional", token="EXPLAIN"),
            _argument("payload", "string", "multiple"),
        ],
    },
    "PENSTOCK.INGEST": {
        "summary": "Applies events to the state without scoring them.",
        "group": "penstock",
        "complexity": "O(N) for N payloads",
        "arity": -3,
        "flags": ("write", "denyoom"),
        "arguments": [_argument("event", "string"), _TIMEOUT, _PRIORITY, _argument("payload", "string", "multiple")],
    },
    "PENSTOCK.FEATURES": {
        "summary": "Reads a view's features, one map per key.",
        "group": "penstock",
        "complexity": "O(N) for N keys",
        "arity": -3,
        "flags": ("readonly",),
        "arguments": [
            _argument("view", "string"),
            _argument("time", "string", "optional", token="ASOF"),
            _argument("int", "pure-token", "optional", token="INT"),
            _argument("withstatus", "pure-token", "optional", token="WITHSTATUS"),
            _argument("keys", "pure-token", "optional", token="KEYS"),
            _argument("key", "string", "multiple"),
        ],
    },
    "PENSTOCK.INFER": {
        "summary": "Runs a model on the raw bytes of its input and answers the raw bytes of its outputs.",
        "group": "penstock",
        "complexity": "O(N) for N rows",
        "arity": -3,
        "flags": ("readonly",),
        "arguments": [_argument("model", "string"), _TIMEOUT, _PRIORITY, _argument("tensor", "string")],
    },
    "AUTH": {
        "summary": "Authenticates the connection.",
        "group": "connection",
        "arity": -2,
        "flags": ("noscript", "loading", "stale", "fast", "no_auth"),
        "arguments": [_argument("username", "string", "optional"), _argument("password", "string")],
    },
    "CLIENT": {
        "summary": "SETNAME, GETNAME, SETINFO, ID, INFO, LIST: what is known of connections.",
        "group": "connection",
        "arity": -2,
        "flags": ("noscript", "loading", "stale"),
        "arguments": [_argument("subcommand", "string"), _argument("argument", "string", "optional", "multiple")],
    },
    "COMMAND": {
        "summary": "DOCS, COUNT, LIST, INFO: the commands that are served.",
        "group": "server",
        "arity": -1,
        "flags": ("loading", "stale"),
        "arguments": [
            _argument("subcommand", "string", "optional"),
            _argument("name", "string", "optional", "multiple"),
        ],
    },
    "CONFIG": {
        "summary": "GET only, for tools that ask it; settings are given at start.",
        "group": "server",
        "arity": -3,
        "flags": ("admin", "loading", "stale"),
        "arguments": [_argument("subcommand", "string"), _argument("parameter", "string", "multiple")],
    },
    "ECHO": {
        "summary": "Answers its argument.",
        "group": "connection",
        "arity": 2,
        "flags": ("loading", "stale", "fast"),
        "arguments": [_argument("message", "string")],
    },
    "HELLO": {
        "summary": "Chooses RESP2 or RESP3, authenticates, names the connection.",
        "group": "connection",
        "arity": -1,
        "flags": ("noscript", "loading", "stale", "fast", "no_auth"),
        "arguments": [
            _argument("protover", "integer", "optional"),
            _argument("username password", "string", "optional", token="AUTH"),
            _argument("clientname", "string", "optional", token="SETNAME"),
        ],
    },
    "INFO": {
        "summary": "Facts and counters of the server by section.",
        "group": "server",
        "arity": -1,
        "flags": ("loading", "stale"),
        "arguments": [_argument("section", "string", "optional", "multiple")],
    },
    "PING": {
        "summary": "Answers PONG, or its argument.",
        "group": "connection",
        "arity": -1,
        "flags": ("fast",),
        "arguments": [_argument("message", "string", "optional")],
    },
    "QUIT": {
        "summary": "Closes the connection after the answer.",
        "group": "connection",
        "arity": -1,
        "flags": ("noscript", "loading", "stale", "fast", "no_auth"),
        "arguments": [],
    },
    "RESET": {
        "summary": "Makes the connection as it was when it was opened.",
        "group": "connection",
        "arity": 1,
        "flags": ("noscript", "loading", "stale", "fast", "no_auth"),
        "arguments": [],
    },
    "SELECT": {
        "summary": "Takes database 0, the only one.",
        "group": "connection",
        "arity": 2,
        "flags": ("loading", "stale", "fast"),
        "arguments": [_argument("index", "integer")],
    },
}

# Arguments after the name: least and most.
ARITY = {
    name: (abs(facts["arity"]) - 1, facts["arity"] - 1 if facts["arity"] > 0 else 1 << 20)
    for name, facts in COMMANDS.items()
} | {"AUTH": (1, 2), "PING": (0, 1)}


def _docs(facts: dict[str, Any]) -> dict[str, Any]:
    docs = {"summary": facts["summary"], "since": "0.1.0", "group": facts["group"]}
    if "complexity" in facts:
        docs["complexity"] = facts["complexity"]
    return {**docs, "arguments": facts["arguments"]}


def _command_info(name: str) -> list[Any]:
    """Name, arity, flags, first key, last key, step (there are no keys), categories, tips, key places, subcommands."""
    facts = COMMANDS[name]
    categories = frozenset({f"@{facts['group']}", "@slow"})
    return [name.lower().encode(), facts["arity"], frozenset(facts["flags"]), 0, 0, 0, categories, [], [], []]
