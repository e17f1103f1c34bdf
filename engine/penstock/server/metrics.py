"""The text of GET /metrics (control path that runs on the loop): Prometheus exposition format 0.0.4.

The counts are kept natively, in the routes, lanes, models and the core; ext/metrics_text.pyx formats them. Here stands
which families there are. What must stay true: every sample is a number that was counted, none is sampled or averaged.
"""

from __future__ import annotations

import gc
import os
import platform
import resource
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from .. import __version__
from .._ext.decision import OUTCOMES
from .._ext.http import HttpServer
from .._ext.log import STATES
from .._ext.loop_lag import LoopLag
from .._ext.metrics_text import (
    Decisions,
    Family,
    Lag,
    Lanes,
    Models,
    Numbers,
    Page,
    Part,
    Routes,
    Summary,
    Table,
    labels,
)

if TYPE_CHECKING:
    from .._ext.flow import Flow, Lane
    from ..engine import Engine

__all__ = ["CONTENT_TYPE", "GcPauses", "Metrics"]

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
PAGE = resource.getpagesize()


class GcPauses:
    """Counts and times the garbage collector's pauses, through gc.callbacks."""

    def __init__(self) -> None:
        self.count = [0, 0, 0]
        self.seconds = 0.0
        self.longest = 0.0
        self._began = 0.0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.perf_counter()
        elif self._began:
            pause = time.perf_counter() - self._began
            self._began = 0.0
            self.count[info["generation"]] += 1
            self.seconds += pause
            self.longest = max(self.longest, pause)

    def watch(self) -> None:
        gc.callbacks.append(self)

    def unwatch(self) -> None:
        if self in gc.callbacks:
            gc.callbacks.remove(self)


class Metrics:
    """Formats the counters of one server and of what it serves; what is None is not there.

    lanes: the lanes of pipelines and events. table: the Deployment of served models (`targets()`, `version`).
    resp: the RESP listener. lag: the loop's probe; `tick` should run after each
    of its ticks where there is a table.
    """

    def __init__(
        self,
        engine: Engine | None,
        server: HttpServer,
        state: dict[str, bool],
        *,
        lanes: Callable[[], Iterable[Lane]] = tuple,
        flow: Flow | None = None,
        table: Any = None,
        ns_per_tick: float = 1.0,
        resp: Any = None,
        lag: LoopLag | None = None,
    ) -> None:
        self.engine = engine
        self.server = server
        self.state = state
        self.pauses = GcPauses()
        self.pauses.watch()
        self.models = None if table is None else Models(table.targets, lambda: int(table.version), ns_per_tick)
        try:
            self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._statm = -1
        parts: list[Part] = [*self._http()]
        if engine is not None:
            parts += self._engine(engine)
        if flow is not None:
            parts.append(Lanes(lanes, self.models))
            parts.append(_pool(flow))
        if self.models is not None:
            parts.append(_deployment(table, self.models))
            parts.append(self.models)
        if resp is not None:
            parts += _resp(resp)
        if engine is not None and engine.core.log is not None:
            parts += _log(engine)
        if lag is not None:
            parts.append(Lag(lag))
            parts.append(
                Numbers(
                    [
                        (
                            "penstock_loop_lag_longest_seconds",
                            "gauge",
                            "Longest lateness since start.",
                            lambda: lag.longest_ns / 1e9,
                        )
                    ]
                )
            )
        parts += self._process()
        parts.append(_build(engine))
        self.page = Page(parts)

    def answer(self, query: str, body: bytes) -> tuple[int, bytes, bytes]:
        return 200, CONTENT_TYPE, self.content()

    def tick(self) -> None:
        """Keep the text of many models fresh between scrapes."""
        if self.models is not None:
            self.models.tick()

    def content(self) -> bytes:
        """All metrics."""
        if self.models is not None:
            self.models.prepare()
        return self.page.bytes()

    def text(self) -> str:
        return self.content().decode()

    def _http(self) -> list[Part]:
        server, state = self.server, self.state
        return [
            Routes(server.all_routes),
            Family(
                "penstock_http_errors_total",
                "counter",
                "Requests refused, by the code of the error.",
                ("code",),
                lambda: sorted(server.error_counts.items()),
            ),
            Numbers(
                [
                    (
                        "penstock_http_connections",
                        "gauge",
                        "Connections open now.",
                        lambda: server.open_connections,
                    ),
                    (
                        "penstock_http_connections_accepted_total",
                        "counter",
                        "Connections accepted.",
                        lambda: server.accepted,
                    ),
                    (
                        "penstock_http_connections_refused_total",
                        "counter",
                        "Connections answered 503 because too many were open.",
                        lambda: server.refused,
                    ),
                ]
            ),
            Table(
                [("penstock_http_heads_total", "counter", "Request heads: repeated byte for byte, or parsed.")],
                ['{kind="repeated"}', '{kind="parsed"}'],
                lambda: [(server.head_hits,), (server.head_misses,)],
            ),
            Numbers(
                [
                    (
                        "penstock_ready",
                        "gauge",
                        "1 when ready to answer, 0 while starting or stopping.",
                        lambda: int(state["ready"] and not server.draining),
                    )
                ]
            ),
        ]

    def _engine(self, engine: Engine) -> list[Part]:
        return [
            Decisions(engine.core, OUTCOMES),
            Table(
                [
                    ("penstock_entities", "gauge", "Entities with state."),
                    ("penstock_window_events", "gauge", "Events held in windows."),
                    ("penstock_state_bytes", "gauge", "Bytes of state in use."),
                    ("penstock_state_mapped_bytes", "gauge", "Bytes of state mapped."),
                ],
                [labels(event=store.event, entity=store.entity) for store in engine.plan.stores],
                engine.core.store_stats,
            ),
        ]

    def _process(self) -> list[Part]:
        pauses, began = self.pauses, _start_time()
        return [
            Family(
                "penstock_gc_collections_total",
                "counter",
                "Collections of the garbage collector, by generation.",
                ("generation",),
                lambda: enumerate(pauses.count),
            ),
            Summary(
                "penstock_gc_pause_seconds",
                "Pauses of the garbage collector.",
                lambda: pauses.seconds,
                lambda: sum(pauses.count),
            ),
            Numbers(
                [
                    (
                        "penstock_gc_pause_longest_seconds",
                        "gauge",
                        "Longest pause since start.",
                        lambda: pauses.longest,
                    ),
                    ("process_cpu_seconds_total", "counter", "User and system time used.", time.process_time),
                    ("process_start_time_seconds", "gauge", "When the process began, Unix time.", lambda: began),
                    ("process_resident_memory_bytes", "gauge", "Resident memory.", self._resident),
                ]
            ),
        ]

    def _resident(self) -> int:
        if self._statm < 0:
            return 0
        return int(os.pread(self._statm, 128, 0).split(b" ", 2)[1]) * PAGE


def _start_time() -> float:
    """When this process began, Unix time in seconds: its age by /proc, taken from now; where there is none, now."""
    try:
        with open("/proc/self/stat", "rb") as file:
            ticks = int(file.read().rsplit(b")", 1)[1].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        age = 0.0
    return round(time.time() - age, 2)


def _build(engine: Engine | None) -> Part:
    values = (
        __version__,
        platform.python_version(),
        "" if engine is None else engine.plan.app,
        "" if engine is None else engine.plan.fingerprint,
    )
    about = "1; the labels say what runs: Penstock, Python, the app and the fingerprint of its plan."
    return Family("penstock_build_info", "gauge", about, ("version", "python", "app", "plan"), lambda: [(values, 1)])


def _pool(flow: Flow) -> Part:
    return Numbers(
        [
            ("penstock_pool_threads", "gauge", "Threads of the native pool.", lambda: flow.n_threads),
            ("penstock_pool_running", "gauge", "Threads of the native pool that work now.", lambda: flow.running),
            (
                "penstock_queue_slices_total",
                "counter",
                "Slices in which the loop worked off its queue.",
                lambda: flow.slices,
            ),
        ]
    )


def _deployment(table: Any, models: Models) -> Part:
    return Numbers(
        [
            (
                "penstock_deployment_version",
                "gauge",
                "Counts the changes of which model answers to which name.",
                lambda: int(table.version),
            ),
            ("penstock_models_loaded", "gauge", "Models that answer.", lambda: models.models_loaded),
            (
                "penstock_models_bytes",
                "gauge",
                "Bytes of their tables, as far as known.",
                lambda: models.models_bytes,
            ),
        ]
    )


def _resp(resp: Any) -> list[Part]:
    return [
        Family(
            "penstock_resp_commands_total",
            "counter",
            "Commands, by what they do.",
            ("kind",),
            lambda: sorted(resp.command_counts.items()),
        ),
        Family(
            "penstock_resp_errors_total",
            "counter",
            "Commands refused, by the code of the error.",
            ("code",),
            lambda: sorted(resp.error_counts.items()),
        ),
        Numbers(
            [
                ("penstock_resp_connections", "gauge", "Connections open now.", lambda: resp.open_connections),
                (
                    "penstock_resp_connections_accepted_total",
                    "counter",
                    "Connections accepted.",
                    lambda: resp.accepted,
                ),
                (
                    "penstock_resp_connections_refused_total",
                    "counter",
                    "Connections refused because too many were open.",
                    lambda: resp.refused,
                ),
            ]
        ),
    ]


def _log(engine: Engine) -> list[Part]:
    log = engine.core.log
    assert log is not None
    columns = [
        ("penstock_log_bytes_total", "counter", "Bytes written to the event log since start."),
        ("penstock_log_synced_bytes_total", "counter", "Bytes of them that are on disk."),
        ("penstock_log_syncs_total", "counter", "Syncs of the event log."),
        ("penstock_log_sync_longest_seconds", "gauge", "Longest sync."),
        ("penstock_log_segments_total", "counter", "Segments begun since start."),
        ("penstock_log_refusing", "gauge", "1 while no events are taken, else 0."),
        (
            "penstock_log_unsynced_age_seconds",
            "gauge",
            "Age, at most, of the oldest byte that is not on disk; 0: there is none.",
        ),
        ("penstock_log_unsynced_age_longest_seconds", "gauge", "The longest it was."),
        (
            "penstock_log_late_syncs_total",
            "counter",
            "Syncs that came half a second later than the policy says, or more.",
        ),
        ("penstock_scores_not_logged_total", "counter", "Decisions that found no room in the log."),
        ("penstock_keeper_alive", "gauge", "1 while a child process takes snapshots."),
        ("penstock_clock_steps_total", "counter", "Times that the clock was set by over a second."),
    ]

    def read() -> list[tuple[float, ...]]:
        stats = log.stats()
        return [
            (
                stats.position,
                stats.synced,
                stats.syncs,
                stats.longest_sync_us / 1e6,
                stats.segments,
                int(stats.state in ("refusing", "gone")),
                stats.unsynced_us / 1e6,
                stats.longest_unsynced_us / 1e6,
                stats.late_syncs,
                engine.core.scores_not_logged,
                int(engine.keeper_alive),
                stats.clock_steps,
            )
        ]

    def states() -> list[tuple[float, ...]]:
        now = log.state
        return [(float(state == now),) for state in STATES]

    state = ("penstock_log_state", "gauge", "1 for the state that the log is in.")
    return [
        Table(columns, [""], read),
        Table([state], [labels(state=name) for name in STATES], states),
        *_keeper(engine),
    ]


def _keeper(engine: Engine) -> list[Part]:
    """What the keeper told; a family has no sample where it is not known."""
    told = [
        ("penstock_snapshot_behind_bytes", "gauge", "Bytes of the log on disk that a start would replay behind it."),
        ("penstock_keeper_rounds_total", "counter", "Rounds of the keeper."),
        ("penstock_keeper_failures_total", "counter", "Rounds that failed."),
        ("penstock_log_free_bytes", "gauge", "Bytes left on the log's disk."),
    ]
    newest = [
        ("penstock_snapshot_age_seconds", "gauge", "Age of the newest snapshot."),
        ("penstock_snapshot_bytes", "gauge", "Bytes of its files."),
    ]

    def snapshot() -> list[tuple[float, ...]]:
        status = engine.keeper_status
        if status is None or status.snapshot_created is None or status.snapshot_bytes is None:
            return []
        return [(max(0.0, time.time() - status.snapshot_created / 1e6), status.snapshot_bytes)]

    def keeper() -> list[tuple[float, ...]]:
        status = engine.keeper_status
        return [] if status is None else [(status.behind, status.rounds, status.failures, status.free)]

    parts: list[Part] = [Table(newest, [""], snapshot), Table(told, [""], keeper)]
    recovery = engine.recovery
    if recovery is not None:
        seconds = recovery.seconds
        about = "How long the start took to bring the state up to the log."
        parts.append(Numbers([("penstock_recovery_seconds", "gauge", about, lambda: seconds)]))
    return parts
