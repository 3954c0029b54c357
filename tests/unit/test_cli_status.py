"""What `dataplane status` makes of figures and presences."""

from __future__ import annotations

import msgspec
import pytest

from common.figures import ConsumerFigures, StreamFigures
from common.presence import Counters, Hold, Presence
from common.streams import Stream
from dataplane_agent import printing, status
from dataplane_agent.status import Snapshot

STREAM = Stream("queue:usage_records", "usage_forwarder")

FIGURES = StreamFigures(
    backlog=7,
    pending=2,
    dead={"invalid": 3},
    oldest_age_seconds=61.5,
    consumers=[ConsumerFigures("usage_forwarder-host-1-abcdef", 2, 0.25)],
    ledger={"base": 0, "delivered": 5, "duplicate": 1},
    entries_added=18,
    length=12,
)

PROCESS = Presence(
    at=1000.0,
    service="usage_forwarder",
    consumer="usage_forwarder-host-1-abcdef",
    pid=1,
    version="0.1.0",
    status="degraded",
    uptime_seconds=90.0,
    breaker="closed",
    hold=Hold("auth", "HTTP 401"),
    in_flight=4,
    redis_connected=True,
    control_plane_connected=False,
    counters=Counters(),
    queue_depth=7,
    memory_usage_mb=24.5,
    cpu_usage_percent=1.0,
    last_success=980.0,
    last_error=None,
    stream=FIGURES,
)

SNAPSHOT = Snapshot(at=1000.0, streams=[(STREAM, FIGURES)], processes=[PROCESS])


def test_the_document_says_each_thing_once_and_names_every_service() -> None:
    document = msgspec.to_builtins(status.document(SNAPSHOT))
    assert document["streams"] == {
        "queue:usage_records": {
            "group": "usage_forwarder",
            "backlog": 7,
            "pending": 2,
            "dead": {"invalid": 3},
            "oldest_age_seconds": 61.5,
            "consumers": [{"name": "usage_forwarder-host-1-abcdef", "pending": 2, "idle_seconds": 0.25}],
            "ledger": {"base": 0, "delivered": 5, "duplicate": 1},
            "losses": {"missing": 0, "vanished": 0, "lost": 0},
        }
    }
    forwarder = document["services"]["usage_forwarder"]
    assert forwarder["status"] == "degraded"
    [process] = forwarder["processes"]
    assert (process["pid"], process["hold"]) == (1, {"kind": "auth", "detail": "HTTP 401"})
    assert not {"stream", "service"} & process.keys()
    assert document["services"]["registrar"] == {"status": "missing", "processes": []}


def test_the_tables_tell_it_to_people() -> None:
    streams, losses, services, consumers = (
        "\n".join(printing.plain(headings, rows)) for headings, rows in status.tables(SNAPSHOT)
    )
    for told in ("queue:usage_records", "invalid 3", "1m"):
        assert told in streams
    assert len(losses.splitlines()) == 1, "nothing was lost: nothing but headings, which are not printed"
    for told in ("degraded: HTTP 401", "20s ago", "registrar", "missing"):
        assert told in services
    assert "250ms ago" in consumers


@pytest.mark.parametrize(
    ("imbalance", "ledger", "told"),
    [
        (0, {}, []),
        (3, {}, [("missing", 3)]),
        (-2, {}, [("missing", -2)]),
        (0, {"vanished": 4}, [("vanished", 4)]),
        (1, {"vanished": 4, "lost": 5}, [("missing", 1), ("vanished", 4), ("lost", 5)]),
    ],
)
def test_each_kind_of_loss_has_a_row_and_without_any_all_is_well(
    imbalance: int, ledger: dict[str, int], told: list[tuple[str, int]]
) -> None:
    figures = msgspec.structs.replace(FIGURES, imbalance=imbalance, ledger=ledger)
    snapshot = Snapshot(at=1000.0, streams=[(STREAM, figures)], processes=[])
    headings, rows = status.tables(snapshot)[1]
    assert headings[0] == "loss"
    assert [(row[0], row[2]) for row in rows] == told
    assert snapshot.well is (not told)
