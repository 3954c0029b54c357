"""The wire contract: what is read, what is refused and why, what is written. Golden files beside this one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common import schemas
from common.schemas import Invalid
from common.streams import MAX_ENTRY_BYTES

GOLDEN = Path(__file__).parent / "golden"
SENT_AT = "2026-11-21T10:06:02+00:00"
SERVER = ("api-server-001", "us-east-1")

READERS: dict[str, Callable[[bytes | None], Any]] = {
    "usage_record": schemas.usage_record,
    "session_start": schemas.session_event,
    "session_complete": schemas.session_event,
    "quota_request": schemas.quota_request,
    "quota_response": schemas.quota_response,
    "command": schemas.command,
}


def golden(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text())
    return content


def data_of(name: str, **changes: Any) -> bytes:
    """A golden message with some members changed."""
    return json.dumps(golden(name) | changes).encode()


def with_member(name: str, member: bytes) -> bytes:
    """A golden message with one more member at its end, written as given."""
    return data_of(name)[:-1] + b"," + member + b"}"


def fault(read: Callable[[bytes | None], Any], data: bytes | None) -> str:
    with pytest.raises(Invalid) as caught:
        read(data)
    text = str(caught.value)
    assert text == text.strip()
    assert "\n" not in text
    assert len(text) <= schemas.MAX_FAULT_CHARACTERS
    return text


# What is written.


def written(name: str) -> bytes:
    usage = schemas.usage_record(data_of("usage_record"))
    start = schemas.session_event(data_of("session_start"))
    complete = schemas.session_event(data_of("session_complete"))
    quota = schemas.quota_request(data_of("quota_request"))
    transaction_id = {
        message: golden(message)["transaction_id"] for message in READERS if message != "command"
    }
    stamp = schemas.usage_stamp(*SERVER, SENT_AT, "0.1.0")
    match name:
        case "usage_body":
            return schemas.usage_body(usage, stamp)
        case "usage_batch_body":
            return schemas.usage_batch_body([usage, usage], stamp)
        case "start_body":
            return schemas.start_body(start, transaction_id["session_start"], *SERVER, SENT_AT, "0.1.0")
        case "complete_body":
            return schemas.complete_body(
                complete, transaction_id["session_complete"], *SERVER, SENT_AT, "0.1.0"
            )
        case "refresh_body":
            return schemas.refresh_body(quota, transaction_id["quota_request"], *SERVER, "0.1.0")
        case "quota_response":
            return schemas.quota_response_body(schemas.quota_response(data_of("quota_response")))
    raise AssertionError(name)


@pytest.mark.parametrize(
    "name",
    ["usage_body", "usage_batch_body", "start_body", "complete_body", "refresh_body", "quota_response"],
)
def test_a_body_is_what_the_golden_file_says(name: str) -> None:
    body = json.loads(written(name))
    assert body == golden(name)
    assert list(body) == list(golden(name))


def test_unknown_fields_are_tolerated_and_not_forwarded() -> None:
    record = schemas.usage_record(with_member("usage_record", b'"secret":{"deep":[1e400]}'))
    body = schemas.usage_body(record, schemas.usage_stamp(*SERVER, SENT_AT, "0.1.0"))
    assert "secret" not in json.loads(body)


def test_a_start_carries_no_reason_and_no_summary() -> None:
    event = schemas.session_event(data_of("session_complete", event_type="start", metadata=None))
    body = json.loads(schemas.start_body(event, "t", *SERVER, SENT_AT, "0.1.0"))
    assert body.keys().isdisjoint({"disconnect_reason", "final_usage_summary", "metadata"})


def test_what_a_complete_does_not_have_is_left_out() -> None:
    nothing = {"metadata": None, "final_usage_summary": None, "disconnect_reason": None}
    event = schemas.session_event(data_of("session_complete", **nothing))
    body = json.loads(schemas.complete_body(event, "t", *SERVER, SENT_AT, "0.1.0"))
    assert body.keys().isdisjoint(nothing)


def test_metadata_goes_on_as_it_came() -> None:
    event = schemas.session_event(with_member("session_start", rb'"metadata":{"b":1.50,"a":"\u00e9" }'))
    body = schemas.start_body(event, "t", *SERVER, SENT_AT, "0.1.0")
    assert rb'"metadata":{"b":1.50,"a":"\u00e9" }' in body


def test_the_figures_of_the_ledger_are_integers_in_milliseconds() -> None:
    record = schemas.usage_record(data_of("usage_record", connection_duration_seconds=0.0006))
    assert record.figures() == (358_700, 1, 11_534_336, 12)
    assert all(type(figure) is int for figure in record.figures())


def test_the_greatest_figures_fit_the_ledger() -> None:
    greatest = {
        "audio_duration_seconds": 10**9,
        "connection_duration_seconds": 1e9,
        "data_bytes_processed": 2**40,
        "request_count": 10**9,
    }
    record = schemas.usage_record(data_of("usage_record", **greatest))
    assert record.figures() == (10**12, 10**12, 2**40, 10**9)


# What is read.


@pytest.mark.parametrize("name", READERS)
def test_a_golden_message_is_read(name: str) -> None:
    message = READERS[name](data_of(name))
    for field, value in golden(name).items():
        kept = getattr(message, field)
        assert (json.loads(bytes(kept)) if isinstance(kept, schemas.Raw) else kept) == value


def test_what_a_usage_record_leaves_out_has_its_default() -> None:
    given = golden("usage_record")
    for field in ("request_count", "product_code", "transaction_id"):
        del given[field]
    record = schemas.usage_record(json.dumps(given).encode())
    assert (record.request_count, record.product_code) == (1, "speech_transcription")
    assert record.transaction_id is None


def test_an_optional_field_that_is_null_is_absent() -> None:
    nothing = {"request_count": None, "product_code": None, "transaction_id": None}
    record = schemas.usage_record(data_of("usage_record", **nothing))
    assert (record.request_count, record.product_code) == (1, "speech_transcription")
    assert record.transaction_id is None


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("start", "start"),
        ("session_started", "start"),
        ("complete", "complete"),
        ("session_completed", "complete"),
    ],
)
def test_event_types_are_normalised(given: str, want: str) -> None:
    assert schemas.session_event(data_of("session_start", event_type=given)).event_type == want


@pytest.mark.parametrize(
    "member",
    [b'"customer_id":"last"', b'"customer_id":7,"customer_id":"last"', rb'"customer\u005fid":"last"'],
)
def test_of_duplicate_keys_the_last_wins(member: bytes) -> None:
    assert schemas.usage_record(with_member("usage_record", member)).customer_id == "last"


def test_a_last_duplicate_that_is_invalid_is_not_saved_by_the_first() -> None:
    assert fault(schemas.usage_record, with_member("usage_record", b'"customer_id":7')).startswith(
        "customer_id:"
    )


IDS = ["a", "~", "A-z_0.9:~", "...", ".a", "x" * 128]
NO_IDS = [
    "",
    ".",
    "..",
    "x" * 129,
    "a/b",
    "a b",
    "ä",
    "a\n",
    "\n",
    "a\x00",
    "%2e%2e",
    "a?b",
    7,
    True,
    ["a"],
    {},
]


@pytest.mark.parametrize("field", ["api_session_id", "transaction_id"])
@pytest.mark.parametrize("value", IDS)
def test_an_id_that_keeps_to_its_alphabet_is_read(field: str, value: str) -> None:
    assert getattr(schemas.usage_record(data_of("usage_record", **{field: value})), field) == value


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("usage_record", "api_session_id"),
        ("usage_record", "transaction_id"),
        ("session_start", "api_session_id"),
        ("session_start", "transaction_id"),
        ("quota_request", "api_session_id"),
        ("quota_request", "transaction_id"),
        ("command", "command_id"),
    ],
)
@pytest.mark.parametrize("value", NO_IDS)
def test_an_id_that_could_bend_a_path_or_a_header_is_invalid(name: str, field: str, value: Any) -> None:
    assert fault(READERS[name], data_of(name, **{field: value})).startswith(f"{field}:")


@pytest.mark.parametrize("value", ["c", "x" * 256, "Kundin ß", "顧客 😀"])
def test_a_customer_is_anything_printable(value: str) -> None:
    assert schemas.usage_record(data_of("usage_record", customer_id=value)).customer_id == value


@pytest.mark.parametrize("name", ["usage_record", "session_start", "quota_request"])
@pytest.mark.parametrize("value", ["", "x" * 257, "a\nb", "\x00", "a\u2028b", "\x7f", None, 1])
def test_a_customer_that_cannot_be_printed_is_invalid(name: str, value: Any) -> None:
    assert fault(READERS[name], data_of(name, customer_id=value)).startswith("customer_id:")


FIGURES = [
    ("audio_duration_seconds", [0, -0.0, 0.5, 1e-9, 10**9]),
    ("connection_duration_seconds", [0, 10**9]),
    ("data_bytes_processed", [0, 2**40]),
    ("request_count", [1, 10**9]),
]
NO_FIGURES = [
    ("audio_duration_seconds", [-1, -1e-9, 1e9 + 1, 10**400, "1", True, None, [], {}]),
    ("connection_duration_seconds", [-1, 1e9 + 1, False, "0"]),
    ("data_bytes_processed", [-1, 2**40 + 1, 10**400, 1.5, 3.0, "1", True, None]),
    ("request_count", [0, -1, 10**9 + 1, 1.5, 3.0, "1", True]),
]


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, row in FIGURES for value in row])
def test_a_figure_within_its_limits_is_read(field: str, value: float) -> None:
    assert getattr(schemas.usage_record(data_of("usage_record", **{field: value})), field) == value


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, row in NO_FIGURES for value in row])
def test_a_figure_outside_its_limits_is_invalid(field: str, value: Any) -> None:
    assert fault(schemas.usage_record, data_of("usage_record", **{field: value})).startswith(f"{field}:")


@pytest.mark.parametrize("number", [b"1e400", b"-1e400", b"1" + b"0" * 5000, b"1" * 5000 + b".5"])
def test_a_number_beyond_all_bounds_is_invalid(number: bytes) -> None:
    for field in ("audio_duration_seconds", "data_bytes_processed"):
        member = b'"%s":%s' % (field.encode(), number)
        assert fault(schemas.usage_record, with_member("usage_record", member)).startswith(f"{field}:")


@pytest.mark.parametrize("field", ["metadata", "final_usage_summary"])
def test_a_number_that_no_receiver_could_read_is_not_forwarded(field: str) -> None:
    member = b'"%s":{"figures":[1,1e400]}' % field.encode()
    assert fault(schemas.session_event, with_member("session_complete", member)).startswith(f"{field}:")


@pytest.mark.parametrize("name", ["usage_record", "quota_request"])
@pytest.mark.parametrize("value", ["", "Speech_Transcription", "translation", 1])
def test_another_product_is_invalid(name: str, value: Any) -> None:
    assert fault(READERS[name], data_of(name, product_code=value)).startswith("product_code:")


@pytest.mark.parametrize("value", ["", "START", "pause", None, 1])
def test_another_event_type_is_invalid(value: Any) -> None:
    assert fault(schemas.session_event, data_of("session_start", event_type=value)).startswith("event_type:")


TIMESTAMPS = [
    "2026-11-21T10:00:00Z",
    "2026-11-21t10:00:00z",
    "2026-11-21T10:00:00+00:00",
    "2026-11-21T10:00:00-00:00",
    "2026-11-21T10:00:00.1+05:45",
    "2026-11-21T10:00:00.123456789012345Z",
    "2026-11-21T10:00:00-23:59",
    "2024-02-29T00:00:00Z",
    "2016-12-31T23:59:60Z",
    "2017-01-01T00:59:60.5+01:00",
    "0001-01-01T00:00:00+14:00",
    "9999-12-31T23:59:59-14:00",
]
NO_TIMESTAMPS = [
    "",
    "2026-11-21",
    "2026-11-21T10:00:00",
    "2026-11-21 10:00:00Z",
    "2026-11-21T10:00Z",
    "2026-11-21T10:00:00,5Z",
    "2026-11-21T10:00:00.Z",
    "2026-11-21T10:00:00+00",
    "2026-11-21T10:00:00+0000",
    "2026-11-21T10:00:00+24:00",
    "2026-11-21T10:00:00+00:60",
    "2026-11-21T10:00:00+00:00:30",
    "20261121T100000Z",
    "2026-W47-6T10:00:00Z",
    "2026-13-01T00:00:00Z",
    "2026-02-29T00:00:00Z",
    "2026-11-21T24:00:00Z",
    "2026-11-21T10:60:00Z",
    "2026-11-21T10:00:61Z",
    "2026-11-21T10:00:60Z",
    "2016-12-31T23:59:60+01:00",
    "9999-12-31T23:59:60Z",
    "0000-01-01T00:00:00Z",
    "02026-11-21T10:00:00Z",
    "2026-11-21T10:00:00Z\n",
    " 2026-11-21T10:00:00Z",
    "٢٠٢٦-11-21T10:00:00Z",
    1795255200,
    None,
]


@pytest.mark.parametrize("value", TIMESTAMPS)
def test_an_rfc_3339_timestamp_is_kept_as_it_came(value: str) -> None:
    assert schemas.quota_request(data_of("quota_request", timestamp=value)).timestamp == value


@pytest.mark.parametrize("value", NO_TIMESTAMPS)
def test_any_other_timestamp_is_invalid(value: Any) -> None:
    for name in ("quota_request", "session_start", "quota_response", "command"):
        assert fault(READERS[name], data_of(name, timestamp=value)).startswith("timestamp:")
    for field in ("request_timestamp", "response_timestamp"):
        assert fault(schemas.usage_record, data_of("usage_record", **{field: value})).startswith(f"{field}:")


@pytest.mark.parametrize(
    ("request_at", "response_at", "valid"),
    [
        ("2026-11-21T10:00:00Z", "2026-11-21T10:00:00Z", True),
        ("2026-11-21T10:00:00Z", "2026-11-21T11:00:00+01:00", True),
        ("2026-11-21T10:00:00Z", "2026-11-21T10:59:59+01:00", False),
        ("2026-11-21T10:00:00Z", "2026-11-21T09:00:00-01:30", True),
        ("2026-11-21T10:00:00.000002Z", "2026-11-21T10:00:00.000001Z", False),
        ("2016-12-31T23:59:59.9Z", "2016-12-31T23:59:60Z", True),
        ("2016-12-31T23:59:60Z", "2017-01-01T00:00:00Z", True),
        ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00+14:00", False),
        ("9999-12-31T23:59:59Z", "9999-12-31T23:59:59-14:00", True),
    ],
)
def test_a_response_is_no_earlier_than_its_request(request_at: str, response_at: str, valid: bool) -> None:
    given = data_of("usage_record", request_timestamp=request_at, response_timestamp=response_at)
    if valid:
        assert schemas.usage_record(given).response_timestamp == response_at
    else:
        assert fault(schemas.usage_record, given).startswith("response_timestamp:")


@pytest.mark.parametrize(
    "changes", [{"command_type": ""}, {"command_type": "x" * 129}, {"command_type": "a\n"}]
)
def test_a_command_type_is_a_printable_name(changes: dict[str, Any]) -> None:
    assert fault(schemas.command, data_of("command", **changes)).startswith("command_type:")


def test_a_command_of_an_unknown_type_is_read_so_that_it_can_be_refused() -> None:
    assert schemas.command(data_of("command", command_type="self_destruct")).command_type == "self_destruct"


@pytest.mark.parametrize("parameters", [[], "x", 1, True])
def test_parameters_of_a_command_are_an_object(parameters: Any) -> None:
    assert fault(schemas.command, data_of("command", parameters=parameters)).startswith("parameters:")


def test_a_grant_has_a_numeric_amount() -> None:
    assert schemas.quota_response(data_of("quota_response", new_quota_amount=0.5)).new_quota_amount == 0.5
    for value in (None, True, "3600"):
        data = data_of("quota_response", new_quota_amount=value)
        assert fault(schemas.quota_response, data).startswith("new_quota_amount:")


# Whatever arrives gets a verdict.


@pytest.mark.parametrize("name", READERS)
def test_a_missing_field_is_named(name: str) -> None:
    optional = {"product_code", "request_count", "transaction_id", "disconnect_reason"}
    optional |= {"final_usage_summary", "metadata", "parameters"}
    if name == "quota_response":
        optional.discard("transaction_id")
    for field in golden(name).keys() - optional:
        given = golden(name)
        del given[field]
        assert fault(READERS[name], json.dumps(given).encode()) == f"{field}: missing"


def nested(levels: int) -> bytes:
    """A usage record of that depth, the outermost object included."""
    return with_member("usage_record", b'"x":' + b"[" * (levels - 1) + b"]" * (levels - 1))


HOSTILE: list[tuple[str, bytes | None, str]] = [
    ("no data field", None, "data: missing"),
    ("nothing", b"", "data: expected JSON"),
    ("blanks", b" \n\t", "data: expected JSON"),
    ("null", b"null", "data: expected object"),
    ("an array", b"[]", "data: expected object"),
    ("a string", b'"x"', "data: expected object"),
    ("a number", b"1", "data: expected object"),
    ("an empty object", b"{}", "api_session_id: missing"),
    ("half an object", b'{"api_session_id":"a"', "data: expected JSON"),
    ("two objects", b"{}{}", ""),
    ("a byte order mark", b"\xef\xbb\xbf" + data_of("usage_record"), "data: expected JSON"),
    ("UTF-16", data_of("usage_record").decode().encode("utf-16"), "data: expected UTF-8"),
    ("NaN", with_member("usage_record", b'"audio_duration_seconds":NaN'), "data: expected JSON"),
    ("Infinity", with_member("usage_record", b'"x":Infinity'), "data: expected JSON"),
    ("a trailing comma", with_member("usage_record", b'"x":1,'), "data: expected JSON"),
    ("bad UTF-8 in a field", with_member("usage_record", b'"customer_id":"\xff"'), "data: expected UTF-8"),
    ("bad UTF-8 in an unknown field", with_member("usage_record", b'"x":"\xff"'), "data: expected UTF-8"),
    ("bad UTF-8 in an unknown key", with_member("usage_record", b'"\xc0\xaf":1'), "data: expected UTF-8"),
    ("a surrogate in UTF-8", with_member("usage_record", b'"x":"\xed\xa0\x80"'), "data: expected UTF-8"),
    ("a lone surrogate", with_member("usage_record", rb'"customer_id":"\ud800"'), "data: expected JSON"),
    ("a lone low surrogate", with_member("usage_record", rb'"x":"\udc00 and on"'), "data: expected JSON"),
    ("33 levels", nested(33), "data: expected at most 32 levels"),
    ("500 levels", nested(500), "data: expected at most 32 levels"),
    ("20,000 levels", nested(20_000), "data: expected at most 32 levels"),
    ("20,000 levels and no end", b'{"a":' * 20_000, "data: expected at most 32 levels"),
    ("20,000 brackets", b"[" * 20_000, "data: expected object"),
    ("20,000 ends", b"}" * 20_000, "data: expected JSON"),
    (
        "one byte too long",
        data_of("usage_record").ljust(MAX_ENTRY_BYTES + 1),
        "data: expected at most 262144",
    ),
    ("a megabyte", b"x" * 1_000_000, "data: expected at most 262144"),
]


@pytest.mark.parametrize(("data", "want"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_whatever_arrives_gets_a_verdict(data: bytes | None, want: str) -> None:
    assert fault(schemas.usage_record, data).startswith(want)
    for read in READERS.values():
        fault(read, data)


def test_an_entry_may_be_as_long_as_the_limit_and_as_deep() -> None:
    schemas.usage_record(data_of("usage_record").ljust(MAX_ENTRY_BYTES))
    schemas.usage_record(nested(32))


def test_brackets_in_strings_and_side_by_side_are_not_depth() -> None:
    schemas.usage_record(with_member("usage_record", rb'"x":"' + b"[{" * 5000 + rb'\"[[\\"'))
    schemas.usage_record(with_member("usage_record", b'"x":[' + b"[],{}," * 5000 + b"[]]"))


def test_depth_behind_brackets_in_strings_is_found() -> None:
    deep = b'"x":["' + b"]" * 5000 + rb'\"",' + b"[" * 32 + b"]" * 32 + b"]"
    assert fault(schemas.usage_record, with_member("usage_record", deep)) == schemas.TOO_DEEP


def test_metadata_is_bounded_in_depth_like_everything() -> None:
    deep = b'"metadata":' + b'{"a":' * 32 + b"1" + b"}" * 32
    assert fault(schemas.session_event, with_member("session_start", deep)) == schemas.TOO_DEEP


def test_a_fault_never_repeats_the_payload() -> None:
    secret = "hunter2" * 40
    for field in golden("usage_record"):
        assert "hunter2" not in fault(schemas.usage_record, data_of("usage_record", **{field: [secret]}))
    for field in ("product_code", "api_session_id", "request_timestamp"):
        assert "hunter2" not in fault(schemas.usage_record, data_of("usage_record", **{field: secret}))


# Headers that an entry brings.


@pytest.mark.parametrize("raw", [b"a", b"A-z_0.9:~", b"x" * 128])
def test_a_well_formed_correlation_id_is_kept(raw: bytes) -> None:
    assert schemas.correlation_id(raw) == raw.decode()


@pytest.mark.parametrize(
    "raw", [None, b"", b"x" * 129, b"a b", b"a\r\nX-Evil: 1", b"a\n", b"\xff", "é".encode()]
)
def test_any_other_correlation_id_is_none(raw: bytes | None) -> None:
    assert schemas.correlation_id(raw) is None


TRACE, PARENT = b"4bf92f3577b34da6a3ce929d0e0e4736", b"00f067aa0ba902b7"


@pytest.mark.parametrize(
    "raw",
    [
        b"00-%s-%s-01" % (TRACE, PARENT),
        b"00-%s-%s-ff" % (TRACE, PARENT),
        b"cc-%s-%s-01" % (TRACE, PARENT),
        b"01-%s-%s-01-what-the-future-brings" % (TRACE, PARENT),
        b"fe-%s-%s-00" % (TRACE, PARENT),
    ],
)
def test_a_well_formed_traceparent_is_kept(raw: bytes) -> None:
    assert schemas.traceparent(raw) == raw.decode()


@pytest.mark.parametrize(
    "raw",
    [
        None,
        b"",
        b"ff-%s-%s-01" % (TRACE, PARENT),
        b"00-%s-%s-01-more" % (TRACE, PARENT),
        b"01-%s-%s-01more" % (TRACE, PARENT),
        b"01-%s-%s-01-" % (TRACE, PARENT),
        b"01-%s-%s-01-a b" % (TRACE, PARENT),
        b"01-%s-%s-01-" % (TRACE, PARENT) + b"x" * 201,
        b"00-%s-%s-1" % (TRACE, PARENT),
        b"00-%s-%s-01" % (TRACE.upper(), PARENT),
        b"00-%s-%s-01" % (b"0" * 32, PARENT),
        b"00-%s-%s-01" % (TRACE, b"0" * 16),
        b"00-%s-%s-01\n" % (TRACE, PARENT),
        b"00-%s-%s-0g" % (TRACE, PARENT),
        b"\xff" * 55,
    ],
)
def test_any_other_traceparent_is_none(raw: bytes | None) -> None:
    assert schemas.traceparent(raw) is None


@pytest.mark.parametrize(
    ("text", "fits"),
    [("s", True), ("a.b:c~d-e_F9", True), ("x" * 128, True), ("x" * 129, False)]
    + [(text, False) for text in ("", ".", "..", "a/b", "a b", "a\n", "é", "a?b", "%2e")],
)
def test_only_an_id_fits_in_a_path_however_often_it_is_asked(text: str, fits: bool) -> None:
    assert [schemas.fits_in_path(text) for _ in range(2)] == [fits, fits]


def test_what_is_remembered_of_ids_is_bounded() -> None:
    for length in range(1, 5000):
        schemas.fits_in_path("x" * length)
    remembered = schemas._is_known_id.cache_info()
    assert (remembered.maxsize, remembered.currsize <= 1024) == (1024, True)


@pytest.mark.parametrize("ending", ["[" * 40 + "]" * 40, '{"a":' * 40 + "1" + "}" * 40])
def test_what_is_too_deep_is_seen_in_an_unknown_field_too(ending: str) -> None:
    data = data_of("usage_record")[:-1] + b',"more":' + ending.encode() + b"}"
    with pytest.raises(schemas.Invalid, match="levels of nesting"):
        schemas.usage_record(data)
