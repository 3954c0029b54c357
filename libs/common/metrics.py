"""Every figure a service exports, on one page; the names and labels are API for ever (contract section 8).

A series whose labels do not depend on traffic exists from the start, at zero.
Only what concerns a service is exported by it; the other attributes still work, so no caller asks who it is.
No label value ever comes from a message: each is a constant of the code or the configuration.

The two histograms count by themselves and become series when they are scraped, so that timing an entry
costs a bisect, several times less than the library's own observation.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, Protocol, TypeVar

import msgspec
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Info,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.registry import Collector

from common.outcomes import Cause, Reason

OPENMETRICS = "application/openmetrics-text"
OPENMETRICS_1_0_0 = f"{OPENMETRICS}; version=1.0.0; charset=utf-8"

COMMAND_TYPES = ("refresh_public_keys", "health_check", "get_metrics", "unknown")
"""The commands of contract section 5; a type this release does not know is counted as `unknown`."""

COMMAND_OUTCOMES = ("succeeded", "failed", "refused")
"""`refused`: the token or the local configuration forbade it, so it never ran."""

# What `common.control_plane.gate` opens the breaker for.
BREAKER_CAUSES = ("timeout", "connection", "status", "unconfirmed")

REQUEST_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
DELIVERY_BOUNDS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200)

_SUFFIXES = {"counter": "_total", "info": "_info"}
"""What the exposition appends to a family's name, and users therefore know it by."""

_Value = TypeVar("_Value", bound=str)

# A `_created` beside every counter doubles the series and tells nobody anything.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Figures(Protocol):
    """What `common.figures` reads of a stream and the gauges show."""

    @property
    def backlog(self) -> int: ...
    @property
    def pending(self) -> int: ...
    @property
    def dead(self) -> Mapping[str, int]: ...
    @property
    def oldest_age_seconds(self) -> float | None: ...
    @property
    def imbalance(self) -> int: ...


class Metrics:
    """The collectors of one service, with every child bound once."""

    def __init__(
        self,
        service: str,
        server_id: str,
        region: str,
        queue_name: str | None,
        version: str,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._now = now
        self._carries_usage = service == "usage_forwarder"
        self.registry = CollectorRegistry()
        mine = {"server_id": server_id, "region": region}
        on_stream = mine | {"queue_name": queue_name or ""}
        process = _Shelf(self.registry, mine)
        stream = _Shelf(self.registry if queue_name else None, on_stream)
        forwarder = _Shelf(self.registry if service == "usage_forwarder" else None, on_stream)
        registrar = _Shelf(self.registry if service == "registrar" else None, mine)

        Info(
            "dataplane_build", "The service and the release that runs.", [*mine], registry=self.registry
        ).labels(**mine).info({"service": service, "version": version})

        # The two connections.
        self.redis_connected = process.gauge(
            "redis_connection_status", "1 while Redis answers, else 0: nothing can be read or settled."
        )
        self.control_plane_connected = process.gauge(
            "control_plane_connection_status",
            "1 while the ControlPlane answers, else 0: entries wait in their streams.",
        )

        # What became of the entries.
        entries = stream.counters(
            "dataplane_entries_total",
            "Entries by what became of them. Delivered and duplicate left the stream, dead wait for an "
            "operator, retried and unconfirmed (a 2xx nobody may believe) count tries that did not deliver.",
            "outcome",
            ("delivered", "duplicate", "dead", "retried", "unconfirmed"),
        )
        self.delivered = entries["delivered"]
        self.duplicate = entries["duplicate"]
        self.dead = entries["dead"]
        self.retried = entries["retried"]
        self.unconfirmed = entries["unconfirmed"]
        self.dead_by: dict[Reason, Counter] = stream.counters(
            "dataplane_dead_total",
            "Entries that became dead letters, by reason. See them with: dataplane dead list.",
            "reason",
            Reason,
        )
        self.claimed = stream.counter(
            "dataplane_claimed_total", "Entries taken over from consumers that died or stopped."
        )
        self.vanished = stream.counter(
            "dataplane_entries_vanished_total",
            "Entries that someone trimmed or deleted while they were pending. "
            "Each one is lost: find the trimmer.",
        )
        self.lost = stream.counter(
            "dataplane_entries_lost_total",
            "Entries that went with their stream: it was deleted or flushed, or Redis came back with less. "
            "An estimate as of the last look, a second before; the process that noticed counts.",
        )
        self.usage_processed = forwarder.counter(
            "usage_records_processed_total", "Usage records that the ControlPlane has confirmed."
        )
        self.delivery_seconds = stream.histogram(
            "dataplane_delivery_seconds",
            "Seconds from the producer's XADD until the entry was settled, by Redis's clock and ours.",
            DELIVERY_BOUNDS,
        ).series[()]
        self.last_success = stream.gauge(
            "dataplane_last_success_timestamp_seconds",
            "When an entry was last settled as delivered, in Unix seconds; 0 before the first.",
        )
        self.in_flight = stream.gauge("dataplane_in_flight", "Requests for entries that are under way.")
        self.in_flight_limit = stream.gauge(
            "dataplane_in_flight_limit",
            "How many requests for entries may be under way at once: the level found, at most max_in_flight.",
        )

        # The stream as Redis shows it.
        self._depth = stream.gauge(
            "dataplane_queue_depth", "Entries that no consumer has read yet. Growing: too slow, or holding."
        )
        self._pending = stream.gauge(
            "dataplane_queue_pending",
            "Entries that consumers have read and not settled: in flight or waiting.",
        )
        self._dead = stream.gauges(
            "dataplane_queue_dead",
            "Dead letters that wait for an operator, by reason. See them with: dataplane dead list.",
            "reason",
            Reason,
        )
        self._oldest_age = stream.gauge(
            "dataplane_queue_oldest_age_seconds",
            "Age of the oldest entry that is neither settled nor dead; 0 when there is none.",
        )
        self._imbalance = stream.gauge(
            "dataplane_ledger_imbalance",
            "Entries added that are neither in the ledger nor in the stream. "
            "Not 0 while nothing moves: someone trims or deletes entries.",
        )
        self._undelivered_audio = forwarder.gauge(
            "dataplane_undelivered_audio_seconds",
            "Estimate of the audio not delivered yet: mean of recent records times their number.",
        )
        self._undelivered_credits = forwarder.gauge(
            "dataplane_undelivered_credits",
            "Estimate of the credits not delivered yet: mean of recent records times their number.",
        )

        # The ControlPlane as its client sees it.
        self._requests = process.histogram(
            "dataplane_control_plane_request_seconds",
            "Seconds a request to the ControlPlane took, by call and HTTP status (error: no answer came).",
            REQUEST_BOUNDS,
            ("endpoint", "status"),
        )
        self._retries = process.family(
            "dataplane_control_plane_retries_total",
            "Quick retries of requests to the ControlPlane, by call and by what went wrong before.",
            "endpoint",
            "cause",
        )
        self._breaker = process.gauge(
            "dataplane_circuit_breaker_state",
            "Circuit breaker: 0 closed, 1 half-open (one request may probe), "
            "2 open (nothing is read or sent).",
        )
        self._opened = process.family(
            "dataplane_circuit_breaker_opened_total",
            "How often the circuit breaker opened, by the failure that was one too many.",
            "cause",
        )
        for cause in BREAKER_CAUSES:
            self._opened(cause)

        # The registrar's own.
        self.registered = registrar.gauge(
            "dataplane_registered", "1 while the ControlPlane knows this server, else 0."
        )
        self._commands = registrar.family(
            "dataplane_commands_total",
            "Commands from the ControlPlane, by type and outcome. Refused ones never ran: see the audit log.",
            "type",
            "outcome",
        )
        for kind in COMMAND_TYPES:
            for outcome in COMMAND_OUTCOMES:
                self._commands(kind, outcome)

    # Settlement and the consumer report here.

    def settled(self, delivered: int, duplicate: int, seconds: Sequence[float]) -> None:
        """Count a settled batch, with the time each entry took from its XADD."""
        self.delivered.inc(delivered)
        self.duplicate.inc(duplicate)
        if self._carries_usage:  # the heartbeat adds this up over all four services
            self.usage_processed.inc(delivered + duplicate)
        self.observe_deliveries(seconds)
        if delivered or duplicate:
            self.last_success.set(self._now())

    def buried(self, reason: Reason) -> None:
        self.dead.inc()
        self.dead_by[reason].inc()

    def retried_entries(self, cause: Cause) -> None:
        """Count a try that did not deliver; what is held was not tried."""
        match cause:
            case Cause.TRANSIENT | Cause.NOT_FOUND:
                self.retried.inc()
            case Cause.UNCONFIRMED:
                self.unconfirmed.inc()
            case Cause.HELD:
                pass

    def claimed_entries(self, n: int) -> None:
        self.claimed.inc(n)

    def vanished_entries(self, n: int) -> None:
        self.vanished.inc(n)

    def lost_entries(self, n: int) -> None:
        self.lost.inc(n)

    def observe_deliveries(self, seconds: Sequence[float]) -> None:
        """Count the delivery times of a settled batch."""
        self.delivery_seconds.observe_all(seconds)

    def figures(self, figures: Figures) -> None:
        """Show a stream as it was just read from Redis."""
        self._depth.set(figures.backlog)
        self._pending.set(figures.pending)
        for reason, gauge in self._dead.items():  # only ours: a foreign consumer name is no label value
            gauge.set(figures.dead.get(reason, 0))
        self._oldest_age.set(figures.oldest_age_seconds or 0)
        self._imbalance.set(figures.imbalance)

    def undelivered(self, audio_seconds: float, credits: float) -> None:
        """Show the forwarder's estimate of what is not delivered yet."""
        self._undelivered_audio.set(audio_seconds)
        self._undelivered_credits.set(credits)

    def commands(self, kind: str, outcome: str) -> Counter:
        """The counter of one command type and outcome; a type nobody knows is `unknown`."""
        return self._commands(kind if kind in COMMAND_TYPES else "unknown", outcome)

    # The ControlPlane's client reports here.

    def request(self, endpoint: str, status: str, seconds: float) -> None:
        """Time one request; `status` is the HTTP status as text, or `error`."""
        self._requests.series[endpoint, status].observe(seconds)

    def retry(self, endpoint: str, cause: str) -> None:
        self._retries(endpoint, cause).inc()

    def breaker_state(self, state: int) -> None:
        self._breaker.set(state)

    def breaker_opened(self, cause: str) -> None:
        self._opened(cause).inc()

    def connected(self, connected: bool) -> None:
        self.control_plane_connected.set(connected)

    # What leaves the process.

    def totals(self) -> dict[str, int]:
        """What this process adds to the heartbeat's sums; each counts from the start of the process."""
        return {
            "usage_records_processed": _value(self.usage_processed),
            "control_plane_requests": self._requests.count(),
            "failed_deliveries": _value(self.dead),
        }

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The exposition and its content type: OpenMetrics where it is preferred, else Prometheus text."""
        if _prefers_openmetrics(accept):
            return generate_openmetrics(self.registry), OPENMETRICS_1_0_0  # type: ignore[no-untyped-call]
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4

    def as_json(self) -> bytes:
        """The same figures: `{metric: {"type", "help", "values": [{"labels", "value"}]}}`.

        A histogram's values have `buckets` (upper bound to cumulative count), `count` and `sum` instead.
        """
        page: dict[str, dict[str, Any]] = {}
        for family in self.registry.collect():
            values: dict[tuple[str, ...], dict[str, Any]] = {}
            for sample in family.samples:
                labels = {label: value for label, value in sample.labels.items() if label != "le"}
                value = values.setdefault(tuple(labels.values()), {"labels": labels})
                match sample.name.removeprefix(family.name):
                    case "_bucket":
                        value.setdefault("buckets", {})[sample.labels["le"]] = sample.value
                    case "_count" | "_sum" as suffix:
                        value[suffix[1:]] = sample.value
                    case _:
                        value["value"] = sample.value
            name = family.name + _SUFFIXES.get(family.type, "")
            page[name] = {"type": family.type, "help": family.documentation, "values": [*values.values()]}
        return msgspec.json.encode(page)


class Buckets:
    """One series of a histogram: how many observations fell under which bound, and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # the last one: above every bound
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one; a negative duration (two clocks disagree) counts as none."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        if seconds > 0:
            self.sum += seconds

    def observe_all(self, seconds: Iterable[float]) -> None:
        """Count a batch."""
        bounds, counts, total = self.bounds, self.counts, 0.0
        for value in seconds:
            counts[bisect_left(bounds, value)] += 1
            if value > 0:
                total += value
        self.sum += total


class _Series(dict[tuple[str, ...], Buckets]):
    """The series of a histogram."""

    def __init__(self, bounds: Sequence[float]) -> None:
        super().__init__()
        self._bounds = bounds

    def __missing__(self, values: tuple[str, ...]) -> Buckets:
        self[values] = Buckets(self._bounds)
        return self[values]


class Histogram(Collector):
    """A histogram that becomes series when it is scraped, and costs a bisect until then."""

    def __init__(
        self,
        name: str,
        help: str,
        bounds: Sequence[float],
        constant: Mapping[str, str],
        labels: Sequence[str] = (),
    ) -> None:
        self._name, self._help = name, help
        self._constant, self._labels = tuple(constant.values()), (*constant, *labels)
        self._uppers = [*(str(float(bound)) for bound in bounds), "+Inf"]
        self.series = _Series(bounds)
        """By label values; one exists from when it is asked for."""

    def count(self) -> int:
        """Observations so far, in all series."""
        return sum(sum(series.counts) for series in self.series.values())

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._help, labels=self._labels)
        for values, series in self.series.items():
            cumulative = zip(self._uppers, map(float, accumulate(series.counts)), strict=True)
            family.add_metric((*self._constant, *values), [*cumulative], series.sum)
        yield family


class _Shelf:
    """Where collectors that share their constant labels are put; without a registry they are not exported."""

    def __init__(self, registry: CollectorRegistry | None, constant: Mapping[str, str]) -> None:
        self._registry, self._constant = registry, constant

    def counter(self, name: str, help: str) -> Counter:
        return Counter(name, help, [*self._constant], registry=self._registry).labels(
            *self._constant.values()
        )

    def counters(self, name: str, help: str, label: str, values: Iterable[_Value]) -> dict[_Value, Counter]:
        """One counter for each value of a label whose values are all known."""
        labels = self.family(name, help, label)
        return {value: labels(value) for value in values}

    def family(self, name: str, help: str, *labels: str) -> Callable[..., Counter]:
        """The counters of labels whose values are not all known: called with them, it gives the one."""
        counter = Counter(name, help, [*self._constant, *labels], registry=self._registry)
        return partial(counter.labels, *self._constant.values())

    def gauge(self, name: str, help: str) -> Gauge:
        return Gauge(name, help, [*self._constant], registry=self._registry).labels(*self._constant.values())

    def gauges(self, name: str, help: str, label: str, values: Iterable[_Value]) -> dict[_Value, Gauge]:
        gauge = Gauge(name, help, [*self._constant, label], registry=self._registry)
        return {value: gauge.labels(*self._constant.values(), value) for value in values}

    def histogram(
        self, name: str, help: str, bounds: Sequence[float], labels: Sequence[str] = ()
    ) -> Histogram:
        histogram = Histogram(name, help, bounds, self._constant, labels)
        if self._registry is not None:
            self._registry.register(histogram)
        return histogram


def _value(counter: Counter) -> int:
    return sum(int(sample.value) for family in counter.collect() for sample in family.samples)


def _prefers_openmetrics(accept: str) -> bool:
    """Whether an Accept header names OpenMetrics and does not rank it below text/plain."""
    quality = {OPENMETRICS: 0.0, "text/plain": 0.0}
    for part in accept.lower().split(","):
        kind, *parameters = (word.strip() for word in part.split(";"))
        if kind in quality:
            quality[kind] = max(quality[kind], _quality(parameters))
    return quality[OPENMETRICS] > 0 and quality[OPENMETRICS] >= quality["text/plain"]


def _quality(parameters: Iterable[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0
