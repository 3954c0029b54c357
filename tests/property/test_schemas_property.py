"""Any bytes are a value or Invalid, never anything else; what is read can be written."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from common import schemas
from common.schemas import Invalid

READERS: list[Callable[[bytes | None], Any]] = [
    schemas.usage_record,
    schemas.session_event,
    schemas.quota_request,
    schemas.quota_response,
    schemas.command,
]

VALID: dict[str, Any] = {
    "api_session_id": "session-1",
    "customer_id": "customer",
    "connection_duration_seconds": 2.5,
    "data_bytes_processed": 3,
    "audio_duration_seconds": 1,
    "request_timestamp": "2026-11-21T10:00:00Z",
    "response_timestamp": "2026-11-21T10:00:01Z",
    "event_type": "complete",
    "timestamp": "2026-11-21T10:00:01Z",
    "transaction_id": "transaction-1",
    "new_quota_amount": 1,
    "final_quota": False,
    "command_id": "command-1",
    "command_type": "health_check",
    "token": "a.b.c",
}
FIELDS = [*VALID, "product_code", "request_count", "metadata", "final_usage_summary", "parameters", "other"]

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
near_misses = st.dictionaries(st.sampled_from(FIELDS), values, max_size=3).map(
    lambda changes: VALID | changes
)
splices = st.tuples(st.integers(min_value=0), st.integers(min_value=0, max_value=5), st.binary(max_size=8))


def verdict(read: Callable[[bytes | None], Any], data: bytes | None) -> Any:
    """The value, or None for Invalid; anything else that is raised fails the test."""
    try:
        return read(data)
    except Invalid as error:
        text = str(error)
        assert ":" in text
        assert len(text) <= schemas.MAX_FAULT_CHARACTERS
        text.encode()
        return None


@given(st.none() | st.binary(max_size=200))
@example(b'{"' + b"\\ud800" * 9)
@example(b'{"a":' * 5000)
def test_any_bytes_get_a_verdict(data: bytes | None) -> None:
    for read in READERS:
        verdict(read, data)


@given(near_misses)
def test_any_json_near_a_message_gets_a_verdict(message: dict[str, Any]) -> None:
    for read in READERS:
        verdict(read, json.dumps(message).encode())


@given(splices)
def test_a_message_damaged_anywhere_gets_a_verdict(splice: tuple[int, int, bytes]) -> None:
    at, cut, inserted = splice
    data = json.dumps(VALID).encode()
    at %= len(data)
    for read in READERS:
        verdict(read, data[:at] + inserted + data[at + cut :])


@given(near_misses)
def test_what_is_read_can_be_written_and_is_utf8_json(message: dict[str, Any]) -> None:
    data = json.dumps(message).encode()
    server = ("server", "region", "2026-11-21T10:00:01Z", "0.1.0")
    bodies = []
    if record := verdict(schemas.usage_record, data):
        bodies.append(schemas.usage_body(record, schemas.usage_stamp(*server)))
        audio_ms, connection_ms, data_bytes, requests = record.figures()
        assert 0 <= audio_ms <= 10**12
        assert 0 <= connection_ms <= 10**12
        assert 0 <= data_bytes <= 2**40
        assert 1 <= requests <= 10**9
    if event := verdict(schemas.session_event, data):
        bodies += [schemas.start_body(event, "t", *server), schemas.complete_body(event, "t", *server)]
    if request := verdict(schemas.quota_request, data):
        bodies.append(schemas.refresh_body(request, "t", "server", "region", "0.1.0"))
    if response := verdict(schemas.quota_response, data):
        bodies.append(schemas.quota_response_body(response))
        assert schemas.quota_response(bodies[-1]) == response
    for body in bodies:
        assert isinstance(json.loads(body.decode()), dict)


stamps = st.sampled_from(["2026-01-01T12:00:00.123Z", "2026-01-01T12:00:00.123456Z", "2026-01-01T12:00:00Z"])
scraps = st.text("0123456789-:.,+ TtZzWa\u0663", max_size=4)


@given(stamps, st.integers(min_value=0, max_value=27), st.integers(min_value=0, max_value=3), scraps)
@example("2026-01-01T12:00:00.123456Z", 26, 0, "abc")
@example("2026-01-01T12:00:00.123Z", 20, 3, "")
def test_the_timestamps_of_a_record_are_judged_as_all_others(stamp: str, at: int, cut: int, put: str) -> None:
    """A record's are read in another way, since there are so many of them."""
    written = stamp[:at] + put + stamp[at + cut :]
    request = verdict(schemas.quota_request, json.dumps(VALID | {"timestamp": written}).encode())
    both = {"request_timestamp": written, "response_timestamp": written}
    record = verdict(schemas.usage_record, json.dumps(VALID | both).encode())
    assert (record is None) == (request is None)


def depth(value: object) -> int:
    """As contract section 1 counts: the outermost object is level one."""
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


@given(
    st.integers(min_value=0, max_value=40),
    st.lists(st.sampled_from(['"[[[["', '"}}"', '"\\"[{"', "[]", "{}", "[[{}]]", "1"]), max_size=40),
)
def test_depth_is_counted_by_brackets_outside_of_strings(levels: int, neighbours: list[str]) -> None:
    inner = "[" * levels + ",".join(neighbours) + "]" * levels if levels else "0"
    data = json.dumps(VALID)[:-1] + ',"other":' + inner + "}"
    accepted = verdict(schemas.usage_record, data.encode()) is not None
    assert accepted == (depth(json.loads(data)) <= schemas.MAX_LEVELS)


@given(st.binary(max_size=80))
def test_headers_are_well_formed_or_none(raw: bytes) -> None:
    for check in (schemas.correlation_id, schemas.traceparent):
        kept = check(raw)
        assert kept is None or kept.encode() == raw


@given(st.text(max_size=40), st.binary(max_size=200))
def test_a_transaction_id_is_an_id(stream: str, data: bytes) -> None:
    derived = schemas.transaction_id(stream, b"1-0", data)
    assert schemas.correlation_id(derived.encode()) == derived
    assert derived == schemas.transaction_id(stream, "1-0", data)
    assert derived != schemas.transaction_id(stream, "1-1", data)
