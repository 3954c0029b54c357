"""The usage forwarder's estimate of what is not delivered yet."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from common.entries import Entry
from common.figures import StreamFigures
from usage_forwarder.handler import UsageForwarder


class Stage:
    """A forwarder that has read records, and what it tells the metrics."""

    def __init__(self) -> None:
        self.told: list[tuple[float, float]] = []
        running: Any = SimpleNamespace(
            config=SimpleNamespace(
                streams=SimpleNamespace(usage_records="records"),
                control_plane=SimpleNamespace(usage_batch_size=1),
            ),
            metrics=SimpleNamespace(undelivered=lambda audio, credits: self.told.append((audio, credits))),
            client=None,
            sender=None,
            timestamp=str,
        )
        self.forwarder = UsageForwarder(running)

    def reads(self, n: int, audio: float) -> None:
        record = {
            "api_session_id": "s-1",
            "customer_id": "c-1",
            "connection_duration_seconds": 10,
            "data_bytes_processed": 0,
            "audio_duration_seconds": audio,
            "request_timestamp": "2026-01-01T00:00:00Z",
            "response_timestamp": "2026-01-01T00:00:00Z",
        }
        for number in range(1, n + 1):
            data = json.dumps(record).encode()
            self.forwarder.decode(Entry(f"{number}-0".encode(), data, "", None, 1, 0.0), data)

    def estimates(self, backlog: int, pending: int) -> tuple[float, float]:
        self.forwarder.estimate(StreamFigures(backlog=backlog, pending=pending))
        return self.told[-1]


@pytest.mark.parametrize("seen", [1, 4, 1000])
def test_records_that_are_all_alike_are_estimated_as_what_they_are(seen: int) -> None:
    stage = Stage()
    stage.reads(seen, audio=720.0)
    assert stage.estimates(backlog=7, pending=3) == pytest.approx((7200.0, 20.0))


def test_the_mean_is_that_of_recent_records() -> None:
    stage = Stage()
    stage.reads(1000, audio=720.0)
    stage.reads(500, audio=10.0)
    assert stage.estimates(backlog=1, pending=0) == pytest.approx((10.0, 1.0), rel=0.01)


def test_before_a_record_was_read_nothing_is_estimated() -> None:
    assert Stage().estimates(backlog=7, pending=3) == (0.0, 0.0)
