"""Where and within what limits the server runs (control path): one typed struct.

Flags of the command line come first, then PENSTOCK_* variables, then the [server] table of penstock.toml, then the
defaults. What must stay true: a name that is not known is refused wherever it stands, so no setting is read in vain.
Variables that Kubernetes sets for a Service (named penstock, say) are no settings: left out, with a warning.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ..errors import PenstockError
from ..offline.options import check_place, parse_retention, parse_sync

__all__ = ["ConfigError", "Limits", "ServerConfig", "load_config", "parse_flags"]

# Variables with our prefix that are not settings of the server.
OTHER_VARIABLES = frozenset({"PENSTOCK_CACHE", "PENSTOCK_EXT"})

# What Kubernetes sets in every pod for a Service named penstock, or penstock-something: {NAME}_SERVICE_HOST,
# {NAME}_SERVICE_PORT[_PORTNAME], {NAME}_PORT, whose value is a URL, and {NAME}_PORT_{N}_{PROTOCOL}[_PROTO|_PORT|_ADDR].
OF_A_SERVICE = re.compile(
    r"PENSTOCK_(SERVICE_\w+|PORT_\w+|\w+_SERVICE_(HOST|PORT(_\w+)?)|\w+_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
URL_OF_A_SERVICE = re.compile(r"(tcp|udp|sctp)://", re.IGNORECASE)


class ConfigError(PenstockError, ValueError):
    """A setting that is unknown or out of range; the message names where it was given."""


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one pipeline, event type or model may queue, where it differs: a table [limits.NAME] of penstock.toml."""

    queue_rows: Annotated[int, Meta(ge=1)] | None = None
    deadline: Annotated[float, Meta(ge=0, le=3600)] | None = None
    max_deadline: Annotated[float, Meta(ge=0, le=3600)] | None = None


Port = Annotated[int, Meta(ge=0, le=65535)]


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of `penstock serve`. Sizes are in bytes, times in seconds."""

    host: Annotated[str, Meta(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="port to listen on; 0 takes a free one")] = 8000
    models: Annotated[str | None, Meta(description="model folder: DIR/<name>/<version>/model.*")] = None
    models_control: Annotated[
        Literal["none", "explicit", "poll"],
        Meta(
            description="poll: the folder is watched; explicit: models load on request; none: they stay as at the start"
        ),
    ] = "poll"
    load: Annotated[str | None, Meta(description="with explicit: models to load at start, separated by commas")] = None
    poll_interval: Annotated[float, Meta(gt=0, le=86400, description="between two looks at the model folder, s")] = 1.0
    trace_file: Annotated[str | None, Meta(description="where traces go that a client of /v2 asks for")] = None
    resp_port: Annotated[Port | None, Meta(description="port for Redis clients; 0 takes a free one")] = None
    grpc_port: Annotated[Port | None, Meta(description="port for gRPC; 0 takes a free one")] = None
    password: Annotated[str | None, Meta(description="what Redis clients must say with AUTH")] = None
    queue_rows: Annotated[int, Meta(ge=1, description="rows that may wait per pipeline or model")] = 4096
    deadline: Annotated[float, Meta(ge=0, le=3600, description="of a request that names none, s; 0: none")] = 5.0
    max_deadline: Annotated[float, Meta(ge=0, le=3600, description="longest that a request may ask for, s")] = 60.0
    pool_threads: Annotated[int, Meta(ge=1, le=64, description="native threads for models over 1 ms")] = 2
    log: Annotated[str | None, Meta(description="folder of the event log; without one a restart starts empty")] = None
    log_sync: Annotated[
        str, Meta(description="always: an answer waits for its sync; 10ms: a power cut loses at most that; never")
    ] = "10ms"
    log_scores: Annotated[float, Meta(ge=0, le=1, description="share of the keys whose scores are logged")] = 1.0
    log_parquet: Annotated[str | None, Meta(description="where history is kept as Parquet: a folder or s3://...")] = (
        None
    )
    log_retention: Annotated[str | None, Meta(description="how long history is kept, for example 90d; for ever")] = None
    snapshot_bytes: Annotated[int, Meta(ge=1 << 20, description="of log between two snapshots of state")] = 1 << 30
    start_cold: Annotated[bool, Meta(description="start layouts that changed empty, not rebuilt from the log")] = False
    start_partial: Annotated[
        bool, Meta(description="rebuild layouts although history was dropped: INVALID until windows have refilled")
    ] = False
    max_body: Annotated[int, Meta(ge=1, le=1 << 30, description="largest request body, bytes")] = 1 << 20
    max_tensors: Annotated[
        int, Meta(ge=1, le=1 << 30, description="largest body of binary tensors, and gRPC message, bytes")
    ] = 1 << 26
    max_head: Annotated[int, Meta(ge=256, le=1 << 20, description="largest request head, bytes")] = 16384
    max_connections: Annotated[int, Meta(ge=1, description="open connections; more are answered 503")] = 10000
    head_timeout: Annotated[float, Meta(gt=0, le=86400, description="for a request's head to arrive, s")] = 10.0
    body_timeout: Annotated[float, Meta(gt=0, le=86400, description="for a request's body to arrive, s")] = 10.0
    idle_timeout: Annotated[float, Meta(gt=0, le=86400, description="for a connection without a request, s")] = 75.0
    write_timeout: Annotated[float, Meta(gt=0, le=86400, description="for a client that does not read, s")] = 30.0
    drain_timeout: Annotated[float, Meta(gt=0, le=86400, description="for requests under way when stopping, s")] = 10.0
    limits: dict[str, Limits] = {}

    def limits_of(self, name: str) -> Limits:
        """The limits of one pipeline, event type or model, none of them None."""
        own = self.limits.get(name, Limits())
        return Limits(
            queue_rows=self.queue_rows if own.queue_rows is None else own.queue_rows,
            deadline=self.deadline if own.deadline is None else own.deadline,
            max_deadline=self.max_deadline if own.max_deadline is None else own.max_deadline,
        )


def load_config(
    flags: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    file: str | Path = "penstock.toml",
) -> ServerConfig:
    """The settings from flags, then variables, then the file. Raises ConfigError with the place of what is wrong."""
    known = tuple(name for name in ServerConfig.__struct_fields__ if name != "limits")
    merged: dict[str, Any] = {}
    place: dict[str, str] = {}
    table, limits = _from_file(Path(file))
    for name, value in table.items():
        if name not in known:
            raise ConfigError(f"{file}: server.{name}: no such setting (known: {', '.join(known)})")
        merged[name], place[name] = value, f"{file}: server.{name}"
    variables = os.environ if environment is None else environment
    left_out = [variable for variable in variables if _is_of_a_service(variable, variables[variable])]
    if left_out:
        print(
            f"penstock: warning: left out, as Kubernetes sets them for a Service: {', '.join(sorted(left_out))}; "
            "enableServiceLinks: false in the pod's spec keeps them away",
            file=sys.stderr,
        )
    for variable, value in variables.items():
        if not variable.startswith("PENSTOCK_") or variable in OTHER_VARIABLES or variable in left_out:
            continue
        name = variable.removeprefix("PENSTOCK_").lower()
        if name not in known or not variable.isupper():
            names = ", ".join("PENSTOCK_" + n.upper() for n in known)
            raise ConfigError(f"{variable}: no such setting (known: {names})")
        merged[name], place[name] = value, variable
    for name, value in (flags or {}).items():
        if name not in known:
            raise ConfigError(f"{name}: no such setting (known: {', '.join(known)})")
        merged[name], place[name] = value, "--" + name.replace("_", "-")
    for name, value in merged.items():
        try:
            msgspec.convert({name: value}, ServerConfig, strict=not isinstance(value, str))
        except msgspec.ValidationError as error:
            message = str(error).partition(" - at `")[0].partition(", got ")[0]
            raise ConfigError(f"{place[name]}: {message}, got {value!r}") from None
    config = msgspec.convert(merged, ServerConfig, strict=False)
    own: dict[str, Limits] = {}
    for name, table in limits.items():
        try:
            own[name] = msgspec.convert(table, Limits)
        except msgspec.ValidationError as error:
            message, _, at = str(error).partition(" - at `$.")
            raise ConfigError(f"{file}: limits.{name}{'.' + at.rstrip('`') if at else ''}: {message}") from None
    config = msgspec.structs.replace(config, limits=own)
    for name, check in (("log_sync", parse_sync), ("log_retention", parse_retention), ("log_parquet", check_place)):
        try:
            check(getattr(config, name))
        except ValueError as error:
            raise ConfigError(f"{place[name]}: {error}") from None
    for name in ("log", "models", "password"):
        if getattr(config, name) == "":
            what = "a password" if name == "password" else "a folder"
            raise ConfigError(f"{place[name]}: expected {what}, got ''")
    if config.grpc_port is not None and config.models is None:
        raise ConfigError(f"{place['grpc_port']}: gRPC serves models; name their folder with --models DIR")
    if config.password is not None and config.resp_port is None:
        raise ConfigError(
            f"{place['password']}: it is for Redis clients, and there is no port for them; say --resp-port"
        )
    if config.load is not None and config.models_control != "explicit":
        raise ConfigError(f"{place['load']}: every model is loaded at the start; say --models-control explicit")
    if config.log is None:
        for name in merged:
            if name.startswith("log_") or name in ("start_cold", "start_partial", "snapshot_bytes"):
                raise ConfigError(f"{place[name]}: there is no log; say --log DIR")
    return config


def _is_of_a_service(variable: str, value: str) -> bool:
    if OF_A_SERVICE.fullmatch(variable):
        return True
    return variable.startswith("PENSTOCK_") and variable.endswith("PORT") and bool(URL_OF_A_SERVICE.match(value))


def parse_flags(arguments: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """(app or None, settings given as flags) of `penstock serve`; argparse prints help and errors itself."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="penstock serve",
        description="Serve an app, a folder of models, or both. Settings come from flags, then PENSTOCK_* variables, "
        "then penstock.toml.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "app",
        nargs="?",
        help="a Python file or module with the app's definitions; without one, only --models",
    )
    for field, hint in zip(
        msgspec.structs.fields(ServerConfig), typing.get_type_hints(ServerConfig, include_extras=True).values()
    ):
        if field.name == "limits":
            continue
        meta = next(m for m in hint.__metadata__ if isinstance(m, Meta))
        kind = typing.get_args(hint)[0]
        while typing.get_origin(kind) in (types.UnionType, typing.Union, Annotated):
            kind = typing.get_args(kind)[0]
        default = "" if field.default is None else f" (default {field.default})"
        if kind is bool:
            flag = "--" + field.name.replace("_", "-")
            parser.add_argument(flag, dest=field.name, action="store_const", const="true", help=meta.description)
            continue
        if typing.get_origin(kind) is Literal:
            parser.add_argument(
                "--" + field.name.replace("_", "-"),
                dest=field.name,
                choices=typing.get_args(kind),
                help=f"{meta.description}{default}",
            )
            continue
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            dest=field.name,
            metavar={"int": "N", "float": "S", "str": "TEXT"}[kind.__name__],
            help=f"{meta.description}{default}",
        )
    options = vars(parser.parse_args(list(arguments)))
    app = options.pop("app")
    named = options["models"] is not None or "PENSTOCK_MODELS" in os.environ
    if app is None and not named and "models" not in _from_file(Path("penstock.toml"))[0]:
        parser.error("nothing to serve: name an app, or a model folder with --models DIR")
    return app, {name: value for name, value in options.items() if value is not None}


def _from_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tables [server] and [limits] of a settings file."""
    try:
        with path.open("rb") as stream:
            tables = tomllib.load(stream)
    except FileNotFoundError:
        return {}, {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    for name, table in tables.items():
        if name not in ("server", "limits"):
            raise ConfigError(f"{path}: {name}: no such table (known: [server], [limits.NAME])")
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {name}: expected a table, got {table!r}")
    return tables.get("server", {}), tables.get("limits", {})
