"""Laws of commands that need nobody else: what an order is, what is queued, what a report ends in."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from common import schemas
from common.control_plane import errors
from common.outcomes import Cause, Dead, Reason, Retry
from common.streams import MAX_ENTRY_BYTES
from registrar.commands import Order, entry_data, read, unreported

POLLED: dict[str, Any] = {
    "command_id": "cmd-1",
    "command_type": "health_check",
    "parameters": {"a": 1},
    "timestamp": "2026-01-31T08:00:00Z",
    "token": "a.b.c",
}


def order(**changes: Any) -> Order:
    return read(
        json.dumps({name: value for name, value in (POLLED | changes).items() if value is not ...}).encode()
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"token": "a.b.d"},
        {"parameters": {"a": 2}},
        {"parameters": {"a": True}},
        {"command_type": "get_metrics"},
    ],
)
def test_another_token_type_or_other_parameters_make_another_order(changes: dict[str, Any]) -> None:
    assert order(**changes).digest != order().digest


def test_the_same_order_is_the_same_at_every_poll() -> None:
    assert order(timestamp="2026-01-31T08:01:00Z").digest == order().digest


@pytest.mark.parametrize(
    "changes",
    [
        {"token": ...},
        {"token": 7},
        {"command_type": ...},
        {"parameters": [1]},
        {"timestamp": "now"},
        {"token": ""},
    ],
)
def test_a_command_that_breaks_the_schema_but_has_an_id_can_be_answered(changes: dict[str, Any]) -> None:
    broken = order(**changes)
    assert (broken.command_id, broken.command) == ("cmd-1", None)
    assert broken.fault.startswith(next(iter(changes)))


@pytest.mark.parametrize(
    "data",
    [None, b"", b"{}", b"[]", b"\xff", b'{"command_id": "../x"}', b'{"command_id": ".."}', b"[" * 20_000],
)
def test_a_command_without_a_usable_id_is_invalid(data: bytes | None) -> None:
    with pytest.raises(schemas.Invalid):
        read(data)


def test_what_is_queued_is_the_command_and_nothing_else() -> None:
    queued = entry_data(POLLED | {"note": "hello"})
    assert queued is not None
    assert (json.loads(queued[0]), queued[1]) == (POLLED, "cmd-1")
    assert read(queued[0]).command == msgspec.convert(POLLED, schemas.Command)


@pytest.mark.parametrize(
    "polled", [{}, {"command_id": 7}, {"command_id": "a/b"}, {"command_id": "x" * 129}, "cmd", None]
)
def test_a_polled_command_without_a_usable_id_is_not_queued(polled: Any) -> None:
    assert entry_data(polled) is None


def test_a_command_that_is_too_long_for_an_entry_is_queued_to_be_refused() -> None:
    queued = entry_data(POLLED | {"parameters": {"a": "x" * MAX_ENTRY_BYTES}})
    assert queued is not None
    assert (read(queued[0]).command_id, read(queued[0]).command) == ("cmd-1", None)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (errors.TimedOut("t"), Retry(Cause.TRANSIENT, "t")),
        (errors.Transient("t", status=503, retry_after=7), Retry(Cause.TRANSIENT, "t", 503, 7)),
        (errors.Unconfirmed("u", status=200), Retry(Cause.UNCONFIRMED, "u", 200)),
        (errors.NotFound("n", status=404), Retry(Cause.NOT_FOUND, "n", 404)),
        (errors.BreakerOpen("b", retry_after=3), Retry(Cause.HELD, "b", None, 3)),
        (errors.AuthRefused("a", status=401), Retry(Cause.TRANSIENT, "a", 401)),
        (errors.TlsFailed("a"), Retry(Cause.TRANSIENT, "a")),
        (errors.ConfigurationFault("c", status=501), Retry(Cause.TRANSIENT, "c", 501)),
        (errors.Rejected("r", status=422), Dead(Reason.REJECTED, "the report was refused: r", 422)),
    ],
)
def test_a_report_that_did_not_get_through_is_tried_again_unless_it_was_refused(
    error: errors.ControlPlaneError, outcome: Any
) -> None:
    assert unreported(error) == outcome
