from __future__ import annotations

import json
import re
from typing import Any, get_args

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client import Histogram as Reference
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from common.control_plane import gate
from common.figures import StreamFigures
from common.metrics import BREAKER_CAUSES, COMMAND_OUTCOMES, COMMAND_TYPES, DELIVERY_BOUNDS, Metrics
from common.outcomes import Cause, Reason

QUEUES = {
    "usage_forwarder": "queue:usage_records",
    "session_notifier": "queue:session_lifecycle",
    "quota_refresher": "queue:quota_refresh",
    "registrar": "queue:commands",
}

OURS = {"server_id", "region"}
STREAM = OURS | {"queue_name"}

EVERYWHERE = {
    "dataplane_build_info": OURS | {"service", "version"},
    "redis_connection_status": OURS,
    "control_plane_connection_status": OURS,
    "dataplane_entries_total": STREAM | {"outcome"},
    "dataplane_dead_total": STREAM | {"reason"},
    "dataplane_claimed_total": STREAM,
    "dataplane_entries_vanished_total": STREAM,
    "dataplane_entries_lost_total": STREAM,
    "dataplane_delivery_seconds": STREAM,
    "dataplane_last_success_timestamp_seconds": STREAM,
    "dataplane_in_flight": STREAM,
    "dataplane_in_flight_limit": STREAM,
    "dataplane_queue_depth": STREAM,
    "dataplane_queue_pending": STREAM,
    "dataplane_queue_dead": STREAM | {"reason"},
    "dataplane_queue_oldest_age_seconds": STREAM,
    "dataplane_ledger_imbalance": STREAM,
    "dataplane_control_plane_request_seconds": OURS | {"endpoint", "status"},
    "dataplane_control_plane_retries_total": OURS | {"endpoint", "cause"},
    "dataplane_circuit_breaker_state": OURS,
    "dataplane_circuit_breaker_opened_total": OURS | {"cause"},
}
OF_ONE_SERVICE: dict[str, dict[str, set[str]]] = {
    "usage_forwarder": {
        "usage_records_processed_total": STREAM,
        "dataplane_undelivered_audio_seconds": STREAM,
        "dataplane_undelivered_credits": STREAM,
    },
    "registrar": {
        "dataplane_registered": OURS,
        "dataplane_commands_total": OURS | {"type", "outcome"},
    },
}


FIGURES = StreamFigures(
    backlog=7,
    pending=3,
    dead={"invalid": 2, "a foreign consumer name": 9},
    oldest_age_seconds=12.5,
    imbalance=-1,
)


@pytest.fixture
def metrics() -> Metrics:
    return of("usage_forwarder")


def of(service: str) -> Metrics:
    return Metrics(service, "api-1", "eu", QUEUES[service], "1.2.3", now=lambda: 1000.0)


def busy(service: str) -> Metrics:
    """One with a series in every family, those included that wait for traffic."""
    metrics = of(service)
    metrics.request("heartbeat", "200", 0.02)
    metrics.retry("heartbeat", "timeout")
    metrics.observe_deliveries([0.01])
    return metrics


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    """The one sample of that name with these labels among others."""
    found = [
        sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert len(found) < 2, f"{name} {labels} is not one sample"
    return found[0] if found else None


def families(metrics: Metrics) -> dict[str, Metric]:
    """By the names users script against: the counters with their `_total`."""
    parsed = parse_text(metrics.render()[0].decode())
    return {f"{one.name}_total" if one.type == "counter" else one.name: one for one in parsed}


@pytest.mark.parametrize("service", QUEUES)
def test_names_and_labels_are_those_of_the_contract(service: str) -> None:
    want = EVERYWHERE | OF_ONE_SERVICE.get(service, {})
    got = {
        name: {label for sample in family.samples for label in sample.labels} - {"le"}
        for name, family in families(busy(service)).items()
    }
    assert got == want


@pytest.mark.parametrize("service", QUEUES)
def test_a_linter_finds_nothing(service: str) -> None:
    for name, family in families(busy(service)).items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
        assert family.documentation.strip(), f"{name} has no help"
        assert (family.type == "counter") == name.endswith("_total")
        assert family.type in ("counter", "gauge", "histogram")
        assert not re.search(r"_(count|sum|bucket|created|gauge|counter|histogram|ms|millis|min|mb)$", name)
        assert not re.search(r"gauge|counter|histogram|summary", name)
        for sample in family.samples:
            assert sample.name == name or (
                family.type == "histogram" and sample.name.removeprefix(name) in ("_bucket", "_sum", "_count")
            )


def test_every_family_is_one_block_and_no_series_comes_twice(metrics: Metrics) -> None:
    lines = busy("registrar").render()[0].decode().splitlines()
    series = [line.rpartition(" ")[0] for line in lines if not line.startswith("#")]
    assert len(series) == len(set(series))
    helps = [line.split()[2] for line in lines if line.startswith("# HELP")]
    assert len(helps) == len(set(helps))


def test_openmetrics_passes_the_strict_parser() -> None:
    text = busy("registrar").render("application/openmetrics-text")[0].decode()
    assert text.endswith("# EOF\n")
    names = {family.name for family in parse_openmetrics(text)}  # type: ignore[no-untyped-call]
    assert names >= {"dataplane_entries", "dataplane_build"}


def test_every_known_value_of_a_label_exists_from_the_start(metrics: Metrics) -> None:
    for outcome in ("delivered", "duplicate", "dead", "retried", "unconfirmed"):
        assert value(metrics, "dataplane_entries_total", outcome=outcome) == 0
    for reason in ("invalid", "rejected", "conflict", "poison"):
        assert value(metrics, "dataplane_dead_total", reason=reason) == 0
        assert value(metrics, "dataplane_queue_dead", reason=reason) == 0
    for cause in BREAKER_CAUSES:
        assert value(metrics, "dataplane_circuit_breaker_opened_total", cause=cause) == 0
    assert value(metrics, "dataplane_delivery_seconds_count") == 0
    registrar = of("registrar")
    for kind in COMMAND_TYPES:
        for outcome in COMMAND_OUTCOMES:
            assert value(registrar, "dataplane_commands_total", type=kind, outcome=outcome) == 0


def test_a_process_without_a_stream_shows_none() -> None:
    metrics = Metrics("registrar", "api-1", "eu", None, "1")
    metrics.figures(FIGURES)
    metrics.settled(1, 0, [0.1])
    assert not any("queue_name" in sample.labels for f in metrics.registry.collect() for sample in f.samples)


def test_what_does_not_concern_a_service_may_be_reported_and_is_not_shown() -> None:
    notifier = of("session_notifier")
    notifier.undelivered(1.0, 2.0)
    notifier.registered.set(1)
    notifier.usage_processed.inc()
    assert not {*OF_ONE_SERVICE["usage_forwarder"], *OF_ONE_SERVICE["registrar"]} & {*families(notifier)}


def test_a_settled_batch_is_counted_timed_and_dated(metrics: Metrics) -> None:
    metrics.settled(2, 1, [0.004, 0.02, 3.0])
    assert value(metrics, "dataplane_entries_total", outcome="delivered") == 2
    assert value(metrics, "dataplane_entries_total", outcome="duplicate") == 1
    assert value(metrics, "usage_records_processed_total") == 3
    assert value(metrics, "dataplane_delivery_seconds_count") == 3
    assert value(metrics, "dataplane_delivery_seconds_sum") == pytest.approx(3.024)
    assert value(metrics, "dataplane_last_success_timestamp_seconds") == 1000


def test_a_batch_of_which_nothing_was_ours_is_no_success(metrics: Metrics) -> None:
    metrics.settled(0, 0, [])
    assert value(metrics, "dataplane_last_success_timestamp_seconds") == 0


def test_a_dead_entry_counts_once_in_each_of_its_two_figures(metrics: Metrics) -> None:
    metrics.buried(Reason.CONFLICT)
    assert value(metrics, "dataplane_entries_total", outcome="dead") == 1
    assert value(metrics, "dataplane_dead_total", reason="conflict") == 1
    assert value(metrics, "dataplane_dead_total", reason="poison") == 0


def test_what_was_taken_over_or_vanished_or_lost_is_counted(metrics: Metrics) -> None:
    metrics.claimed_entries(3)
    metrics.vanished_entries(4)
    metrics.lost_entries(5)
    assert value(metrics, "dataplane_claimed_total") == 3
    assert value(metrics, "dataplane_entries_vanished_total") == 4
    assert value(metrics, "dataplane_entries_lost_total") == 5


@pytest.mark.parametrize(
    ("cause", "retried", "unconfirmed"),
    [(Cause.TRANSIENT, 1, 0), (Cause.NOT_FOUND, 1, 0), (Cause.UNCONFIRMED, 0, 1), (Cause.HELD, 0, 0)],
)
def test_a_try_counts_once_and_a_held_entry_was_not_tried(
    metrics: Metrics, cause: Cause, retried: int, unconfirmed: int
) -> None:
    metrics.retried_entries(cause)
    assert value(metrics, "dataplane_entries_total", outcome="retried") == retried
    assert value(metrics, "dataplane_entries_total", outcome="unconfirmed") == unconfirmed


def test_the_causes_of_an_open_breaker_are_the_gates() -> None:
    assert get_args(gate.Cause) == BREAKER_CAUSES


def test_figures_of_a_stream_become_gauges_and_foreign_names_no_labels(metrics: Metrics) -> None:
    metrics.figures(FIGURES)
    assert value(metrics, "dataplane_queue_depth") == 7
    assert value(metrics, "dataplane_queue_pending") == 3
    assert value(metrics, "dataplane_queue_oldest_age_seconds") == 12.5
    assert value(metrics, "dataplane_ledger_imbalance") == -1
    assert value(metrics, "dataplane_queue_dead", reason="invalid") == 2
    assert b"foreign" not in metrics.render()[0]


def test_an_empty_stream_has_no_age_and_no_dead_any_more(metrics: Metrics) -> None:
    metrics.figures(FIGURES)
    metrics.figures(StreamFigures())
    assert value(metrics, "dataplane_queue_oldest_age_seconds") == 0
    assert value(metrics, "dataplane_queue_dead", reason="invalid") == 0


def test_the_client_reports_requests_retries_breaker_and_connection(metrics: Metrics) -> None:
    metrics.request("usage_record", "200", 0.5)
    metrics.request("usage_record", "200", 0.5)
    metrics.request("usage_record", "error", 30.0)
    metrics.retry("usage_record", "timeout")
    metrics.breaker_state(2)
    metrics.breaker_opened("timeout")
    metrics.connected(True)
    name = "dataplane_control_plane_request_seconds"
    assert value(metrics, f"{name}_count", endpoint="usage_record", status="200") == 2
    assert value(metrics, f"{name}_bucket", status="200", le="0.25") == 0
    assert value(metrics, f"{name}_bucket", status="200", le="0.5") == 2
    assert value(metrics, f"{name}_count", status="error") == 1
    assert value(metrics, "dataplane_control_plane_retries_total", cause="timeout") == 1
    assert value(metrics, "dataplane_circuit_breaker_state") == 2
    assert value(metrics, "dataplane_circuit_breaker_opened_total", cause="timeout") == 1
    assert value(metrics, "control_plane_connection_status") == 1
    metrics.connected(False)
    assert value(metrics, "control_plane_connection_status") == 0


def test_a_command_type_nobody_knows_is_no_label_value() -> None:
    registrar = of("registrar")
    registrar.commands("get_metrics", "succeeded").inc()
    registrar.commands('x"} rm -rf', "refused").inc()
    assert value(registrar, "dataplane_commands_total", type="get_metrics", outcome="succeeded") == 1
    assert value(registrar, "dataplane_commands_total", type="unknown", outcome="refused") == 1
    assert b"rm -rf" not in registrar.render()[0]


def test_totals_are_what_the_heartbeat_sums(metrics: Metrics) -> None:
    metrics.settled(5, 1, [])
    metrics.buried(Reason.REJECTED)
    metrics.request("usage_record", "200", 0.1)
    metrics.request("public_keys", "error", 0.1)
    assert metrics.totals() == {
        "usage_records_processed": 6,
        "control_plane_requests": 2,
        "failed_deliveries": 1,
    }


@pytest.mark.parametrize("service", ["session_notifier", "quota_refresher", "registrar"])
def test_what_other_services_settle_is_no_usage_record(service: str) -> None:
    metrics = of(service)
    metrics.settled(5, 1, [])
    assert metrics.totals()["usage_records_processed"] == 0


def test_the_histogram_counts_as_the_librarys_own_does(metrics: Metrics) -> None:
    reference = Reference("reference_seconds", "x", buckets=DELIVERY_BOUNDS, registry=CollectorRegistry())
    observed = [0.0, 1e-9, *DELIVERY_BOUNDS, *(bound + 1e-6 for bound in DELIVERY_BOUNDS), 1e9]
    metrics.observe_deliveries(observed)
    for one in observed:
        reference.observe(one)
    (family,) = reference.collect()
    for sample in family.samples:
        name = sample.name.replace("reference_seconds", "dataplane_delivery_seconds")
        assert value(metrics, name, **sample.labels) == pytest.approx(sample.value)


def test_a_negative_duration_counts_as_none(metrics: Metrics) -> None:
    metrics.observe_deliveries([-5.0, 1.0])
    assert value(metrics, "dataplane_delivery_seconds_sum") == 1
    assert value(metrics, "dataplane_delivery_seconds_count") == 2
    assert value(metrics, "dataplane_delivery_seconds_bucket", le="0.0025") == 1


@pytest.mark.parametrize(
    ("accept", "openmetrics"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text; version=1.0.0; charset=utf-8", True),
        # Prometheus 2.4x, then 3.x
        ("application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
         "text/plain;version=0.0.4;q=0.5,*/*;q=0.1", True),
        ("application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
         "text/plain;version=0.0.4;q=0.3,*/*;q=0.2", True),
        ("application/openmetrics-text;q=0.3,text/plain;q=0.6", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=rubbish;version=abc", False),
        ("application/openmetrics-text;version=abc", True),
        (",;=,;;q=,\x00\xff", False),
    ],
)  # fmt: skip
def test_the_format_is_the_one_that_is_preferred(metrics: Metrics, accept: str, openmetrics: bool) -> None:
    body, content_type = metrics.render(accept)
    assert content_type.startswith(
        "application/openmetrics-text" if openmetrics else "text/plain; version=0.0.4"
    )
    assert body.endswith(b"# EOF\n") == openmetrics


def test_json_has_the_same_figures(metrics: Metrics) -> None:
    metrics.settled(3, 0, [0.004, 0.004, 1e6])
    page: dict[str, Any] = json.loads(metrics.as_json())
    assert {*page} == {*families(metrics)}
    delivered = [
        v for v in page["dataplane_entries_total"]["values"] if v["labels"]["outcome"] == "delivered"
    ]
    assert [v["value"] for v in delivered] == [3]
    (histogram,) = page["dataplane_delivery_seconds"]["values"]
    assert histogram["count"] == 3
    assert histogram["buckets"]["0.005"] == 2
    assert histogram["buckets"]["+Inf"] == 3
    assert page["dataplane_delivery_seconds"]["type"] == "histogram"
    assert page["dataplane_build_info"]["values"][0]["labels"]["version"] == "1.2.3"
