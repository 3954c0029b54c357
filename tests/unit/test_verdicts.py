"""Every row of the verdict table (contract section 3), and what is kept of an answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.control_plane import errors
from common.control_plane.verdicts import (
    EXCERPT_CHARS,
    SPLIT,
    SPLIT_ONE_BY_ONE,
    Answer,
    Judge,
    Mask,
    Split,
    hold_kind,
    of_status,
    retry_after,
)
from common.outcomes import DELIVERED, DUPLICATE, Cause, Dead, Delivered, Outcome, Reason, Retry

KEY = 's3cret/"key"&ü'
NOW = 1_800_000_000.0
JUDGE = Judge(Mask(KEY), lambda: NOW)

HTML = b"<html><body>Please log in</body></html>"
DEEP = b'{"a":' + b"[" * 20_000 + b"]" * 20_000 + b"}"
GRANT = {"new_quota_amount": 60, "final_quota": 90.5}


def wrapped(data: Any) -> bytes:
    return json.dumps({"success": True, "data": data, "timestamp": "2027-01-01T00:00:00Z"}).encode()


def summary(outcome: Outcome | Split) -> Any:
    """The part of an outcome that the table is about."""
    match outcome:
        case Retry():
            return outcome.cause
        case Dead():
            return outcome.reason
        case _:
            return outcome


REJECTED_STATUSES = (400, 402, 405, 406, 407, 411, 412, 413, 414, 415, 416, 418, 421, 422, 423, 426, 431, 451)
TRANSIENT_STATUSES = (408, 425, 429, 500, 502, 503, 504, 505, 507, 511, 520, 599)
CONFIGURATION_STATUSES = (300, 301, 302, 303, 304, 307, 308, 399, 501)
UNHEARD_OF_STATUSES = (100, 101, 199, 600, 999)

SAME_FOR_ALL = [
    *[(status, b"", Cause.NOT_FOUND) for status in (404, 410)],
    *[(status, b"", Cause.HELD) for status in (401, 403, *CONFIGURATION_STATUSES)],
    *[(status, b"", Cause.TRANSIENT) for status in (*TRANSIENT_STATUSES, *UNHEARD_OF_STATUSES)],
    (404, b'{"success": true}', Cause.NOT_FOUND),
    (503, b'{"success": true}', Cause.TRANSIENT),
]

CONFIRMATIONS = [
    (200, b"{}", DELIVERED),
    (200, b' {"success": true}\n', DELIVERED),
    (201, b'{"id": 1, "credits": [1, {"a": null}]}', DELIVERED),
    (202, wrapped({"id": 1}), DELIVERED),
    (204, b"", DELIVERED),
    (200, b'{"success": null}', DELIVERED),
    (200, b'{"success": false}', Cause.UNCONFIRMED),
    (200, b'{"success": true, "success": false}', Cause.UNCONFIRMED),
    (200, b'{"success": false, "data": {"success": true}}', Cause.UNCONFIRMED),
    (200, HTML, Cause.UNCONFIRMED),
    (200, b"", Cause.UNCONFIRMED),
    (205, b"", Cause.UNCONFIRMED),
    (200, b"[]", Cause.UNCONFIRMED),
    (200, b"null", Cause.UNCONFIRMED),
    (200, b'"ok"', Cause.UNCONFIRMED),
    (200, b"OK", Cause.UNCONFIRMED),
    (200, b'{"id": 1', Cause.UNCONFIRMED),
    (200, b'{"id": NaN}', Cause.UNCONFIRMED),
    (200, b"\xff\xfe{}", Cause.UNCONFIRMED),
    (200, DEEP, Cause.UNCONFIRMED),
]


@pytest.mark.parametrize(
    ("status", "body", "want"),
    [
        *CONFIRMATIONS,
        *SAME_FOR_ALL,
        (409, b"", DUPLICATE),
        (409, b"{}", DUPLICATE),
        (409, HTML, DUPLICATE),
        (409, b'{"error": "already recorded"}', DUPLICATE),
        (409, b'{"error": "conflict"}', Reason.CONFLICT),
        (409, wrapped({"error": "conflict"}), Reason.CONFLICT),
        (409, b'{"success": false, "data": {"error": "conflict"}}', Reason.CONFLICT),
        *[(status, b"", Reason.REJECTED) for status in REJECTED_STATUSES],
    ],
)
def test_delivery_follows_the_table(status: int, body: bytes, want: Any) -> None:
    assert summary(JUDGE.delivery(Answer(status, body))) == want


@pytest.mark.parametrize(
    ("status", "body", "want"),
    [
        *CONFIRMATIONS,
        *SAME_FOR_ALL,
        (409, b"", SPLIT_ONE_BY_ONE),
        (409, b'{"error": "conflict"}', SPLIT_ONE_BY_ONE),
        *[(status, b"", SPLIT) for status in REJECTED_STATUSES],
    ],
)
def test_a_batch_is_split_where_one_record_would_die(status: int, body: bytes, want: Any) -> None:
    assert summary(JUDGE.batch(Answer(status, body))) == want


@pytest.mark.parametrize(
    ("status", "body", "want"),
    [
        *SAME_FOR_ALL,
        (200, json.dumps(GRANT).encode(), Delivered(answer=GRANT)),
        (200, wrapped(GRANT), Delivered(answer=GRANT)),
        (200, b'{"new_quota_amount": 0}', Delivered(answer={"new_quota_amount": 0})),
        (200, b'{"new_quota_amount": 1.5}', Delivered(answer={"new_quota_amount": 1.5})),
        (204, b"", Cause.UNCONFIRMED),
        (200, b"{}", Cause.UNCONFIRMED),
        (200, wrapped({}), Cause.UNCONFIRMED),
        (200, b'{"success": false, "new_quota_amount": 1}', Cause.UNCONFIRMED),
        (200, b'{"success": false, "data": {"new_quota_amount": 1}}', Cause.UNCONFIRMED),
        (200, b'{"new_quota_amount": null}', Cause.UNCONFIRMED),
        (200, b'{"new_quota_amount": "60"}', Cause.UNCONFIRMED),
        (200, b'{"new_quota_amount": true}', Cause.UNCONFIRMED),
        (200, b'{"new_quota_amount": [60]}', Cause.UNCONFIRMED),
        (200, b'{"new_quota_amount": NaN}', Cause.UNCONFIRMED),
        (200, b'{"new_quota_amount": 1e400}', Cause.UNCONFIRMED),
        (200, HTML, Cause.UNCONFIRMED),
        (200, b"[]", Cause.UNCONFIRMED),
        (200, DEEP, Cause.UNCONFIRMED),
        (409, json.dumps(GRANT).encode(), Delivered(duplicate=True, answer=GRANT)),
        (409, wrapped(GRANT), Delivered(duplicate=True, answer=GRANT)),
        (409, json.dumps({"success": False, **GRANT}).encode(), Delivered(True, {"success": False, **GRANT})),
        (409, json.dumps({"success": False, "data": GRANT}).encode(), Delivered(True, GRANT)),
        (409, b"{}", Reason.REJECTED),
        (409, HTML, Reason.REJECTED),
        (409, b'{"new_quota_amount": null}', Reason.REJECTED),
        (409, b'{"error": "conflict"}', Reason.CONFLICT),
        (409, wrapped({"error": "conflict"}), Reason.CONFLICT),
        *[(status, b"", Reason.REJECTED) for status in REJECTED_STATUSES],
    ],
)
def test_refresh_delivers_only_a_grant(status: int, body: bytes, want: Any) -> None:
    assert summary(JUDGE.refresh(Answer(status, body))) == want


@pytest.mark.parametrize(
    ("status", "body", "want"),
    [
        (200, b'{"keys": []}', {"keys": []}),
        (200, wrapped({"keys": []}), {"keys": []}),
        (200, b'{"data": {"keys": []}}', {"data": {"keys": []}}),
        (204, b"", {}),
        (409, b"", {}),
        (409, b'{"error": "conflict"}', errors.Rejected),
        (200, b'{"success": false}', errors.Unconfirmed),
        (200, HTML, errors.Unconfirmed),
        (200, b"", errors.Unconfirmed),
        *[(status, b"", errors.AuthRefused) for status in (401, 403)],
        *[(status, b"", errors.NotFound) for status in (404, 410)],
        *[(status, b"", errors.ConfigurationFault) for status in CONFIGURATION_STATUSES],
        *[(status, b"", errors.Transient) for status in (*TRANSIENT_STATUSES, *UNHEARD_OF_STATUSES)],
        *[(status, b"", errors.Rejected) for status in REJECTED_STATUSES],
    ],
)
def test_a_reply_is_an_object_or_an_error(status: int, body: bytes, want: Any) -> None:
    answer = Answer(status, body)
    if isinstance(want, dict):
        assert JUDGE.reply(answer) == want
        return
    with pytest.raises(want) as raised:
        JUDGE.reply(answer)
    assert raised.value.status == status


@given(st.integers(-10, 2000), st.binary(max_size=40))
def test_every_answer_has_a_verdict(status: int, body: bytes) -> None:
    of_status(status)
    answer = Answer(status, body)
    assert isinstance(JUDGE.delivery(answer), Outcome)
    assert isinstance(JUDGE.batch(answer), Outcome | Split)
    assert isinstance(JUDGE.refresh(answer), Outcome)


def test_an_answer_cut_at_the_limit_confirms_nothing() -> None:
    assert summary(JUDGE.delivery(Answer(200, b"{}", truncated=True))) is Cause.UNCONFIRMED
    assert summary(JUDGE.refresh(Answer(200, b'{"new_quota_amount":1}', truncated=True))) is Cause.UNCONFIRMED
    assert summary(JUDGE.delivery(Answer(404, b"{}", truncated=True))) is Cause.NOT_FOUND


@pytest.mark.parametrize(
    ("error", "want"),
    [
        (errors.ConnectFailed("x"), Cause.TRANSIENT),
        (errors.TimedOut("x"), Cause.TRANSIENT),
        (errors.BrokenAnswer("x"), Cause.TRANSIENT),
        (errors.TlsFailed("x"), Cause.HELD),
        (errors.CannotSend("x"), Cause.HELD),
        (errors.NotARequest("x"), Reason.INVALID),
    ],
)
def test_no_answer_has_a_verdict_too(error: errors.TransportError, want: Any) -> None:
    assert summary(JUDGE.no_answer(error)) == want


@pytest.mark.parametrize(
    ("status", "want"), [(401, "auth"), (403, "auth"), (301, "configuration"), (501, "configuration")]
)
def test_a_refusal_says_which_hold_it_asks_for(status: int, want: str) -> None:
    held = JUDGE.delivery(Answer(status))
    assert isinstance(held, Retry)
    assert hold_kind(held) == want
    assert held.http_status == status


def test_a_redirect_says_where_it_leads() -> None:
    held = JUDGE.delivery(Answer(307, location="https://elsewhere.test/login"))
    assert isinstance(held, Retry)
    assert held.error == "answered 307 to https://elsewhere.test/login"


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("0", None),
        ("1", 1.0),
        (" 120 ", 120.0),
        ("900", 900.0),
        ("901", 900.0),
        ("9" * 5000, 900.0),
        ("-5", None),
        ("1.5", None),
        ("1e3", None),
        ("soon", None),
        ("", None),
        ("٣", None),
        ("Fri, 15 Jan 2027 08:00:30 GMT", 30.0),
        ("Friday, 15-Jan-27 08:00:30 GMT", 30.0),
        ("Fri, 15 Jan 2027 07:59:00 GMT", None),
        ("Fri, 15 Jan 2100 08:00:00 GMT", 900.0),
        ("Fri, 99 Jan 2027 08:00:00 GMT", None),
        ("Fri, 15 Jan 99999 08:00:00 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date_and_garbage_is_ignored(text: str, want: float | None) -> None:
    assert retry_after(text, NOW) == want


@given(st.text(max_size=40))
def test_retry_after_is_never_more_than_fifteen_minutes(text: str) -> None:
    seconds = retry_after(text, NOW)
    assert seconds is None or 0 < seconds <= 900


@pytest.mark.parametrize(("status", "want"), [(429, 7.0), (503, 7.0), (500, None), (408, None), (404, None)])
def test_retry_after_is_honoured_on_429_and_503(status: int, want: float | None) -> None:
    outcome = JUDGE.delivery(Answer(status, retry_after="7"))
    assert isinstance(outcome, Retry)
    assert outcome.after == want


@pytest.mark.parametrize(
    "echo",
    [
        KEY,
        json.dumps(KEY),
        json.dumps(KEY, ensure_ascii=False),
        json.dumps(KEY).replace("/", r"\/"),
        "s3cret/&quot;key&quot;&amp;ü",
        "s3cret%2F%22key%22%26%C3%BC",
    ],
)
def test_a_secret_that_an_answer_echoes_is_masked_in_every_spelling(echo: str) -> None:
    for answer in (Answer(422, f"no: {echo}!".encode()), Answer(403, f"no: {echo}!".encode())):
        outcome = JUDGE.delivery(answer)
        assert "s3cret" not in str(outcome)
        assert "***" in str(outcome)


def test_a_secret_cut_in_two_by_the_window_is_not_kept_either() -> None:
    mask = Mask("K" * 60)
    for prefix in range(0, 400, 7):
        body = b"x" * prefix + b"K" * 5_000_000
        assert "KK" not in mask.excerpt(body)


@pytest.mark.parametrize("status", [403, 404, 410])
def test_an_answer_that_may_be_the_last_one_keeps_an_excerpt_for_the_dead_letter(status: int) -> None:
    outcome = JUDGE.delivery(Answer(status, f"no session, {KEY}".encode()))
    assert isinstance(outcome, Retry)
    assert outcome.response_excerpt == "no session, ***"
    assert JUDGE.delivery(Answer(status)) == Retry(outcome.cause, f"answered {status}", status)


def test_an_excerpt_is_short_and_printable() -> None:
    dead = JUDGE.delivery(Answer(400, b"a\x00\x1b[31m\r\nb \xe2\x80\xae\xff" + b"c" * 100_000))
    assert isinstance(dead, Dead)
    assert dead.response_excerpt is not None
    assert dead.response_excerpt.isprintable()
    assert len(dead.response_excerpt) == EXCERPT_CHARS
    assert dead.response_excerpt.startswith("a [31m b �c")


@given(st.binary(max_size=3000))
def test_any_body_has_an_excerpt(body: bytes) -> None:
    excerpt = Mask(KEY, "").excerpt(body)
    assert len(excerpt) <= EXCERPT_CHARS
    assert excerpt == "" or excerpt.isprintable()
