"""The text of GET /metrics (control path): Prometheus exposition format 0.0.4.

The counts are kept natively, in the routes and in the core; only a scrape formats them. What must stay true: every
sample is a number that was counted, none is sampled or averaged.
"""

from __future__ import annotations

import gc
import os
import resource
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .._ext.http import BUCKETS, HttpServer

if TYPE_CHECKING:
    from ..engine import Engine

__all__ = ["CONTENT_TYPE", "GcPauses", "Metrics"]

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
BOUNDS = [f"{bound:.6g}" for bound in BUCKETS] + ["+Inf"]
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
    """Formats the counters of one engine and one server."""

    def __init__(self, engine: Engine, server: HttpServer, state: dict[str, bool]) -> None:
        self.engine = engine
        self.server = server
        self.state = state
        self.pauses = GcPauses()
        self.pauses.watch()
        # The engine's fingerprint-like labels never change; those of the histogram are made once.
        self._histogram_lines = {
            route.label: [_labels(route=route.label, le=bound)[1:-1] for bound in BOUNDS]
            for route in server.all_routes()
        }

    def answer(self, query: str, body: bytes) -> tuple[int, bytes, bytes]:
        return 200, CONTENT_TYPE, self.text().encode()

    def text(self) -> str:
        """All metrics."""
        lines: list[str] = []
        self._http(lines)
        self._engine(lines)
        self._log(lines)
        self._process(lines)
        lines.append("")
        return "\n".join(lines)

    def _http(self, lines: list[str]) -> None:
        server = self.server
        routes = [(route.label, route.counters()) for route in server.all_routes()]
        _family(
            lines,
            "penstock_http_requests_total",
            "counter",
            "Requests answered, by route and status.",
            (
                (_labels(route=label, code=code or "other"), n)
                for label, counts in routes
                for code, n in counts["statuses"].items()
            ),
        )
        name = "penstock_http_request_duration_seconds"
        _head(lines, name, "histogram", "From the read of a request's last bytes to its answer being formed.")
        for label, counts in routes:
            total = 0
            for labels, n in zip(self._histogram_lines.setdefault(label, []), counts["buckets"]):
                total += n
                lines.append(f"{name}_bucket{{{labels}}} {total}")
            lines.append(f"{name}_sum{_labels(route=label)} {counts['seconds']!r}")
            lines.append(f"{name}_count{_labels(route=label)} {counts['count']}")
        _family(
            lines,
            "penstock_http_errors_total",
            "counter",
            "Requests refused, by the code of the error.",
            ((_labels(code=code), n) for code, n in sorted(server.error_counts.items())),
        )
        _one(lines, "penstock_http_connections", "gauge", "Connections open now.", server.open_connections)
        _one(lines, "penstock_http_connections_accepted_total", "counter", "Connections accepted.", server.accepted)
        _one(
            lines,
            "penstock_http_connections_refused_total",
            "counter",
            "Connections answered 503 because too many were open.",
            server.refused,
        )
        _family(
            lines,
            "penstock_http_heads_total",
            "counter",
            "Request heads: repeated byte for byte, or parsed.",
            (('{kind="repeated"}', server.head_hits), ('{kind="parsed"}', server.head_misses)),
        )
        ready = int(self.state["ready"] and not server.draining)
        _one(lines, "penstock_ready", "gauge", "1 when ready to answer, 0 while starting or stopping.", ready)

    def _engine(self, lines: list[str]) -> None:
        stats: dict[str, Any] = self.engine.stats()
        _family(
            lines,
            "penstock_decisions_total",
            "counter",
            "Decisions, by pipeline and action.",
            (
                (_labels(pipeline=pipeline, action=action), n)
                for pipeline, actions in stats["actions"].items()
                for action, n in actions.items()
            ),
        )
        _family(
            lines,
            "penstock_arm_decisions_total",
            "counter",
            "Decisions, by experiment and arm; an empty arm is a unit that is not in the experiment.",
            (
                (_labels(pipeline=pipeline, experiment=experiment, arm=arm), n)
                for pipeline, experiments in stats["arms"].items()
                for experiment, arms in experiments.items()
                for arm, n in arms.items()
            ),
        )
        _family(
            lines,
            "penstock_model_decisions_total",
            "counter",
            "Decisions, by the model that decided.",
            (
                (_labels(pipeline=pipeline, model=model), n)
                for pipeline, models in stats["models"].items()
                for model, n in models.items()
            ),
        )
        _family(
            lines,
            "penstock_events_total",
            "counter",
            "Events, by what became of them.",
            (
                (_labels(event=event, outcome=outcome), n)
                for event, outcomes in stats["outcomes"].items()
                for outcome, n in outcomes.items()
            ),
        )
        _family(
            lines,
            "penstock_late_dropped_total",
            "counter",
            "Events not applied because they came later than the lateness allows.",
            ((_labels(event=event), outcomes["late"]) for event, outcomes in stats["outcomes"].items()),
        )
        for name, key, about in (
            ("penstock_entities", "entities", "Entities with state."),
            ("penstock_window_events", "events", "Events held in windows."),
            ("penstock_state_bytes", "bytes", "Bytes of state in use."),
            ("penstock_state_mapped_bytes", "mapped", "Bytes of state mapped."),
        ):
            _family(
                lines,
                name,
                "gauge",
                about,
                ((_labels(event=s["source"], entity=s["entity"]), s[key]) for s in stats["stores"]),
            )

    def _log(self, lines: list[str]) -> None:
        log = self.engine.core.log
        if log is None:
            return
        stats = log.stats()
        refused = int(bool(stats.error) or log.closed)
        for name, kind, about, value in (
            ("penstock_log_bytes_total", "counter", "Bytes written to the event log since start.", stats.position),
            ("penstock_log_synced_bytes_total", "counter", "Bytes of them that are on disk.", stats.synced),
            ("penstock_log_syncs_total", "counter", "Syncs of the event log.", stats.syncs),
            ("penstock_log_sync_longest_seconds", "gauge", "Longest sync.", stats.longest_sync_us / 1e6),
            ("penstock_log_segments_total", "counter", "Segments begun since start.", stats.segments),
            ("penstock_log_refusing", "gauge", "1 while the disk takes no events, else 0.", refused),
            (
                "penstock_scores_not_logged_total",
                "counter",
                "Decisions that found no room in the log.",
                self.engine.core.scores_not_logged,
            ),
            (
                "penstock_keeper_alive",
                "gauge",
                "1 while a child process takes snapshots.",
                int(self.engine.keeper_alive),
            ),
            (
                "penstock_clock_steps_total",
                "counter",
                "Times that the clock was set by over a second.",
                stats.clock_steps,
            ),
        ):
            _one(lines, name, kind, about, value)

    def _process(self, lines: list[str]) -> None:
        pauses = self.pauses
        _family(
            lines,
            "penstock_gc_collections_total",
            "counter",
            "Collections of the garbage collector, by generation.",
            ((_labels(generation=str(i)), n) for i, n in enumerate(pauses.count)),
        )
        _head(lines, "penstock_gc_pause_seconds", "summary", "Pauses of the garbage collector.")
        lines.append(f"penstock_gc_pause_seconds_sum {pauses.seconds!r}")
        lines.append(f"penstock_gc_pause_seconds_count {sum(pauses.count)}")
        _one(lines, "penstock_gc_pause_longest_seconds", "gauge", "Longest pause since start.", pauses.longest)
        used = os.times()
        _one(lines, "process_cpu_seconds_total", "counter", "User and system time used.", used.user + used.system)
        try:
            with open("/proc/self/statm", "rb") as stream:
                resident = int(stream.read().split()[1]) * PAGE
        except OSError:
            resident = 0
        _one(lines, "process_resident_memory_bytes", "gauge", "Resident memory.", resident)


def _labels(**labels: object) -> str:
    return "{" + ",".join(f'{name}="{_escaped(str(value))}"' for name, value in labels.items()) + "}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _head(lines: list[str], name: str, kind: str, about: str) -> None:
    lines.append(f"# HELP {name} {about}")
    lines.append(f"# TYPE {name} {kind}")


def _one(lines: list[str], name: str, kind: str, about: str, value: float) -> None:
    _head(lines, name, kind, about)
    lines.append(f"{name} {value!r}")


def _family(lines: list[str], name: str, kind: str, about: str, samples: Iterable[tuple[str, float]]) -> None:
    _head(lines, name, kind, about)
    lines.extend(f"{name}{labels} {value!r}" for labels, value in samples)
