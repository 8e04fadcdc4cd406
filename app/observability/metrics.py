"""Metrics in the Prometheus text format.

The hot path only adds to plain integers, which become samples at a scrape. No label ever holds
a value that a client sent.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from app import __version__
from app.observability.logs import dropped_lines
from app.store.contract import Totals

REQUEST_BUCKETS_SECS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
SWEEP_BUCKETS_SECS = (0.001, 0.01, 0.1, 1.0, 10.0)
LAG_BUCKETS_SECS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


class Histogram:
    """Counts of durations in seconds, by inclusive upper bound."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, duration_secs: float) -> None:
        """Count one duration."""
        self.counts[bisect_left(self.bounds, duration_secs)] += 1
        self.total += duration_secs

    def add(self, counts: list[int], total: float) -> None:
        """Add the counts of another histogram with the same bounds."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, counts, strict=True)]
        self.total += total

    def cumulative(self) -> list[tuple[str, float]]:
        """Return (upper bound, cumulative count) pairs, as Prometheus expects them."""
        pairs, seen = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            seen += count
            pairs.append((bound, float(seen)))
        return pairs


class Counts(msgspec.Struct):
    """The counts of one process, in a form that others can add to their own."""

    version: str

    decisions: list[tuple[str, str, int]]
    created: int
    ended: dict[str, int]
    changes: dict[str, int]
    requests: list[tuple[str, str, int, list[int], float]]
    sweeps: tuple[list[int], float]
    refused: dict[str, int]
    loop_lag: tuple[list[int], float]
    audit_dropped: int
    log_dropped: int
    connections: int
    requests_in_flight: int


class Metrics:
    """The metrics of one process."""

    def __init__(self) -> None:
        self.decisions: defaultdict[tuple[str, str], int] = defaultdict(int)
        self.created = 0
        self.ended: dict[str, int] = {"closed": 0, "agent_closed": 0, "expired": 0}
        self.changes: dict[str, int] = dict.fromkeys(
            ("amend", "pause", "resume", "freeze", "unfreeze"), 0
        )
        self.requests: dict[tuple[str, str, int], Histogram] = {}
        self.sweeps = Histogram(SWEEP_BUCKETS_SECS)
        self.refused: defaultdict[str, int] = defaultdict(int)
        self.loop_lag = Histogram(LAG_BUCKETS_SECS)
        self.audit_dropped = 0
        self.log_dropped = 0
        self.connections = 0
        self.requests_in_flight = 0

    def request(self, method: str, route: str, status: int) -> Histogram:
        """Return the durations of requests to `route`, a path template, that got `status`."""
        key = (method, route, status)
        known = self.requests.get(key)
        if known is None:
            known = self.requests[key] = Histogram(REQUEST_BUCKETS_SECS)
        return known

    def observe_request(
        self, method: str, route: str, status: int, duration_secs: float
    ) -> None:
        """Count one request to `route`, a path template."""
        self.request(method, route, status).observe(duration_secs)

    def counts(self) -> Counts:
        """Return the counts in the form that `add` takes."""
        return Counts(
            __version__,
            [(*labels, count) for labels, count in self.decisions.items()],
            self.created,
            self.ended,
            self.changes,
            [(*labels, each.counts, each.total) for labels, each in self.requests.items()],
            (self.sweeps.counts, self.sweeps.total),
            self.refused,
            (self.loop_lag.counts, self.loop_lag.total),
            self.audit_dropped,
            self.log_dropped + dropped_lines(),
            self.connections,
            self.requests_in_flight,
        )

    def add(self, counts: Counts) -> None:
        """Add the counts of another process of the same version."""
        for operation, outcome, count in counts.decisions:
            self.decisions[operation, outcome] += count
        self.created += counts.created
        for reason, count in counts.ended.items():
            self.ended[reason] += count
        for kind, count in counts.changes.items():
            self.changes[kind] += count
        for method, route, status, buckets, total in counts.requests:
            self.request(method, route, status).add(buckets, total)
        self.sweeps.add(*counts.sweeps)
        for reason, count in counts.refused.items():
            self.refused[reason] += count
        self.loop_lag.add(*counts.loop_lag)
        self.audit_dropped += counts.audit_dropped
        self.log_dropped += counts.log_dropped
        self.connections += counts.connections
        self.requests_in_flight += counts.requests_in_flight

    def render(self, totals: Totals | None) -> bytes:
        """Return the text of a scrape; `totals` is `None` if the store is down."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Snapshot(self._families(totals)))
        return generate_latest(registry)

    def _families(self, totals: Totals | None) -> Iterator[Metric]:
        decisions = CounterMetricFamily(
            "arbiter_decisions",
            "Decisions by operation and outcome: admitted, replayed or a denial code. Changes "
            "are here only if they are denied.",
            labels=("operation", "outcome"),
        )
        for labels, count in self.decisions.items():
            decisions.add_metric(labels, count)
        yield decisions
        yield GaugeMetricFamily(
            "arbiter_store_up", "Whether the store responds.", int(totals is not None)
        )
        if totals is not None:
            yield GaugeMetricFamily(
                "arbiter_sessions_active", "Active sessions.", totals.active
            )
            yield GaugeMetricFamily(
                "arbiter_sessions_paused", "Paused sessions.", totals.paused
            )
            yield GaugeMetricFamily(
                "arbiter_agents_frozen", "Frozen agents.", totals.frozen_agents
            )
        if totals is not None and totals.log_bytes is not None:
            yield GaugeMetricFamily(
                "arbiter_store_log_bytes",
                "Size of the store's write-ahead log.",
                totals.log_bytes,
            )
        yield CounterMetricFamily(
            "arbiter_sessions_created", "Sessions created.", value=self.created
        )
        ended = CounterMetricFamily(
            "arbiter_sessions_ended",
            "Sessions ended, by reason. Expired sessions are counted when they are swept.",
            labels=("reason",),
        )
        for reason, count in self.ended.items():
            ended.add_metric((reason,), count)
        yield ended
        changes = CounterMetricFamily(
            "arbiter_changes",
            "Changes of running sessions and of agents, by kind.",
            labels=("kind",),
        )
        for kind, count in self.changes.items():
            changes.add_metric((kind,), count)
        yield changes
        sweeps = HistogramMetricFamily(
            "arbiter_sweep_duration_seconds", "Duration of sweeps of ended sessions."
        )
        sweeps.add_metric((), self.sweeps.cumulative(), self.sweeps.total)
        yield sweeps
        requests = HistogramMetricFamily(
            "arbiter_http_request_duration_seconds",
            "Duration of requests by method, route and status.",
            labels=("method", "route", "status"),
        )
        for (method, route, status), durations in self.requests.items():
            requests.add_metric(
                (method, route, str(status)), durations.cumulative(), durations.total
            )
        yield requests
        refused = CounterMetricFamily(
            "arbiter_http_refused",
            "Requests refused before they reached a route, by problem code.",
            labels=("code",),
        )
        for code, count in self.refused.items():
            refused.add_metric((code,), count)
        yield refused
        yield CounterMetricFamily(
            "arbiter_audit_dropped",
            "Audit log lines lost because they could not be written in time.",
            value=self.audit_dropped,
        )
        yield CounterMetricFamily(
            "arbiter_log_dropped",
            "Log lines lost because standard error took no more.",
            value=self.log_dropped,
        )
        yield GaugeMetricFamily(
            "arbiter_http_connections", "Open connections.", self.connections
        )
        yield GaugeMetricFamily(
            "arbiter_http_requests_in_flight",
            "Requests in flight.",
            self.requests_in_flight,
        )
        lag = HistogramMetricFamily(
            "arbiter_event_loop_lag_seconds",
            "How late the event loop wakes up, sampled four times a second.",
        )
        lag.add_metric((), self.loop_lag.cumulative(), self.loop_lag.total)
        yield lag
        build = GaugeMetricFamily(
            "arbiter_build_info", "Version of the service.", labels=("version",)
        )
        build.add_metric((__version__,), 1)
        yield build


class _Snapshot(Collector):
    def __init__(self, families: Iterator[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
