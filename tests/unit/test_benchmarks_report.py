"""The page that the benchmark writes, and what it counts from lengths alone."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import load
from benchmarks.report import bounds, drift, markdown, table
from benchmarks.sink import records_in
from common import schemas

META = {
    "command": "python -m benchmarks",
    "machine": "Linux x86_64, 2 cores",
    "python": "Python 3.11",
    "redis": "Valkey 9",
    "sink": "nginx",
    "date": "2026-01-01",
    "rounds": 2,
}


def race(**rates: float) -> dict[str, Any]:
    rows = {
        name: {"rate": rate, "cpu_us": 1e5 / rate, "pss_mb": 50.0, "sink_busy": 0.2, "redis_busy": 0.1}
        for name, rate in rates.items()
    }
    return {
        "titles": {name: f"the {name}" for name in rows},
        "medians": rows,
        "rounds": {name: [row, row] for name, row in rows.items()},
        "skipped": {},
    }


def test_a_table_has_a_head_a_rule_and_a_line_for_each_row() -> None:
    assert table(("a", "b"), [("x", 1)]) == ["| a | b |", "|---|---:|", "| x | 1 |"]


def test_the_page_says_how_to_repeat_it_and_leaves_out_what_was_not_measured() -> None:
    page = markdown({"meta": META, "throughput": race(bare=1000.0, ours=900.0)})
    assert "python -m benchmarks\n" in page
    assert "| the ours | 900 | 111 | 50 | 0.90 | 1.11 | 20 % | 10 % |" in page
    assert "Takeover" not in page


def test_a_bound_is_reached_or_said_not_to_be() -> None:
    found = {"meta": META, "throughput": race(bare=1000.0, ours=900.0, **{"ours-batch": 4000.0})}
    assert [(bound.figure, bound.reached) for bound in bounds(found)] == [
        ("0.90", True),
        ("1.11", True),
        ("4.4", False),
    ]
    assert "| 4.4 | **no** |" in markdown(found)


def test_a_contestant_that_was_not_installed_is_named() -> None:
    found = race(bare=1000.0)
    found["skipped"] = {"celery, 4 processes, requests": "celery"}
    assert "celery, 4 processes, requests: not measured, celery is not installed." in markdown(
        {"meta": META, "peers": found}
    )


def test_memory_that_grows_shows_as_drift_and_its_start_does_not() -> None:
    flat = [(float(n), 10.0 if n < 20 else 50.0) for n in range(100)]
    assert drift(flat) == 0.0
    assert drift([(float(n), float(n)) for n in range(100)]) == 40.0


@pytest.mark.parametrize("number", [1, 2, 3, 100])
def test_the_length_of_a_body_tells_how_many_records_it_carries(number: int) -> None:
    record = schemas.usage_record(load.record(1).encode())
    stamp = schemas.usage_stamp("benchmark", "local", "2026-01-01T00:00:00.000+00:00", "0.1.0")
    body = schemas.usage_body(record, stamp)
    assert len(body) == load.body_length("benchmark", "local", "0.1.0")
    sent = body if number == 1 else schemas.usage_batch_body([record] * number, stamp)
    assert records_in(len(sent), len(body)) == number


def test_a_length_that_no_number_of_records_has_is_an_error() -> None:
    with pytest.raises(ValueError, match="no whole number of records"):
        records_in(1000, 400)


def test_every_record_of_the_load_has_the_same_length_and_is_valid() -> None:
    assert {len(load.record(number)) for number in (0, 1, 99_999, 10**9)} == {len(load.record(7))}
    assert schemas.usage_record(load.record(42).encode()).transaction_id == load.record_key(42)
    assert json.loads(load.record(142))["api_session_id"] == "session-00042"
