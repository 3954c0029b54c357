"""The wire contract and nothing else: what an entry may say, and what the ControlPlane is told.

Reading promises a value or `Invalid`, never anything else, whatever bytes arrive (contract section 1).
Writing promises the bodies of contract section 3: unknown fields are left out, timestamps go on as they came.

Where the contract leaves room:
- a count is written as an integer: `3` is one, `3.0` and `true` are not;
- an optional field that is null is absent; of a key that comes twice, only the last one is looked at;
- a timestamp is RFC 3339 to the letter (`T` or `t`, an offset with its colon, `Z` or `z`); second 60 exists
  at 23:59 UTC alone; two timestamps are compared to the microsecond;
- numbers in `metadata` and `final_usage_summary` fit a double, or the ControlPlane could not read them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from hashlib import sha256
from typing import Annotated, Any, TypeVar
from uuid import NAMESPACE_URL, uuid5

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType
from msgspec.structs import replace

from common.streams import MAX_ENTRY_BYTES

MAX_LEVELS = 32
"""JSON is at most this deep; the outermost object is level one."""

TOO_DEEP = f"data: expected at most {MAX_LEVELS} levels of nesting"

MAX_FAULT_CHARACTERS = 200
"""A fault is one line of at most this length: it ends up in logs and in the dead-letter view."""

MAX_ID_CHARACTERS = 128

SPEECH_TRANSCRIPTION = "speech_transcription"

ABSENT = Raw(b"null")
"""JSON that an event does not have; like a null, it is not forwarded."""

Id = Annotated[str, Meta(pattern=r"^(?!\.{1,2}\Z)[A-Za-z0-9._:~-]{1,128}\Z")]
CustomerId = Annotated[str, Meta(min_length=1, max_length=256)]
Seconds = Annotated[float, Meta(ge=0, le=10**9)]
Bytes = Annotated[int, Meta(ge=0, le=2**40)]
Requests = Annotated[int, Meta(ge=1, le=10**9)]


class Invalid(ValueError):
    """The entry breaks the contract: one line that names the field and never repeats the payload."""


class UsageRecord(Struct, frozen=True, gc=False, kw_only=True):
    """What one stretch of a session used. Its ids are checked by `usage_record`, at half of what a pattern costs."""

    api_session_id: str
    customer_id: CustomerId
    product_code: str = SPEECH_TRANSCRIPTION
    connection_duration_seconds: Seconds
    data_bytes_processed: Bytes
    audio_duration_seconds: Seconds
    request_count: Requests = 1
    request_timestamp: str
    response_timestamp: str
    transaction_id: str | None = None

    def figures(self) -> tuple[int, int, int, int]:
        """The ledger's sums: audio_ms, connection_ms, data_bytes, request_count, as bounded integers."""
        return (
            round(self.audio_duration_seconds * 1000),
            round(self.connection_duration_seconds * 1000),
            self.data_bytes_processed,
            self.request_count,
        )


class SessionEvent(Struct, frozen=True, gc=False):
    """A session began (`start`) or ended (`complete`); its last two fields are JSON, kept as it came."""

    api_session_id: Id
    customer_id: CustomerId
    event_type: str
    timestamp: str
    transaction_id: Id | None = None
    disconnect_reason: str | None = None
    final_usage_summary: Raw = ABSENT
    metadata: Raw = ABSENT


class QuotaRequest(Struct, frozen=True, gc=False):
    """A session's quota runs low."""

    api_session_id: Id
    customer_id: CustomerId
    timestamp: str
    product_code: str = SPEECH_TRANSCRIPTION
    transaction_id: Id | None = None


class QuotaResponse(Struct, frozen=True, gc=False):
    """The ControlPlane's grant, with the transaction id of the request it answers."""

    api_session_id: Id
    new_quota_amount: int | float
    final_quota: bool | int | float | None
    transaction_id: Id
    timestamp: str


class Command(Struct, frozen=True):
    """A remote command as it was polled; nothing in it is believed before its token is verified."""

    command_id: Id
    command_type: Annotated[str, Meta(min_length=1, max_length=128)]
    timestamp: str
    token: Annotated[str, Meta(min_length=1)]
    parameters: dict[str, Any] | None = None


# Reading: bytes -> a value, or Invalid.


def usage_record(data: bytes | None) -> UsageRecord:
    """The usage record that an entry's `data` says. Raises Invalid, nothing else."""
    record = _decode(_USAGE_RECORD, data)
    if not fits_in_path(record.api_session_id):
        raise Invalid(f"api_session_id: {_EXPECTED_ID}")
    if record.transaction_id is not None and _ID(record.transaction_id) is None:
        raise Invalid(f"transaction_id: {_EXPECTED_ID}")
    if not record.customer_id.isprintable():
        raise Invalid(_EXPECTED_CUSTOMER)
    if record.product_code != SPEECH_TRANSCRIPTION:
        raise Invalid(_EXPECTED_PRODUCT)
    _check_order(record.request_timestamp, record.response_timestamp)
    return record


def session_event(data: bytes | None) -> SessionEvent:
    """The session event that an entry's `data` says, `start` or `complete`. Raises Invalid, nothing else."""
    event = _decode(_SESSION_EVENT, data)
    if not event.customer_id.isprintable():
        raise Invalid(_EXPECTED_CUSTOMER)
    _instant("timestamp", event.timestamp)
    _check_numbers("final_usage_summary", event.final_usage_summary)
    _check_numbers("metadata", event.metadata)
    event_type = _EVENT_TYPES.get(event.event_type)
    if event_type is None:
        raise Invalid("event_type: expected start or complete")
    return event if event_type == event.event_type else replace(event, event_type=event_type)


def quota_request(data: bytes | None) -> QuotaRequest:
    """The quota request that an entry's `data` says. Raises Invalid, nothing else."""
    request = _decode(_QUOTA_REQUEST, data)
    if not request.customer_id.isprintable():
        raise Invalid(_EXPECTED_CUSTOMER)
    if request.product_code != SPEECH_TRANSCRIPTION:
        raise Invalid(_EXPECTED_PRODUCT)
    _instant("timestamp", request.timestamp)
    return request


def quota_response(data: bytes | None) -> QuotaResponse:
    """The grant that an entry's `data` says. Raises Invalid, nothing else."""
    response = _decode(_QUOTA_RESPONSE, data)
    _instant("timestamp", response.timestamp)
    return response


def command(data: bytes | None) -> Command:
    """The command that an entry's `data` says, unverified. Raises Invalid, nothing else."""
    polled = _decode(_COMMAND, data)
    if not polled.command_type.isprintable():
        raise Invalid("command_type: expected printable characters")
    _instant("timestamp", polled.timestamp)
    return polled


# Ids: who is who, at every redelivery, in every release.


def fits_in_path(text: str) -> bool:
    """Whether it is an id, so that it needs no quoting in a path and climbs out of none."""
    return len(text) <= MAX_ID_CHARACTERS and _is_known_id(text)


@lru_cache(1024)
def _is_known_id(text: str) -> bool:
    """Remembered, since a session comes with many records: a quarter of the cost. Asked for short texts alone."""
    return _ID(text) is not None


def transaction_id(stream: str, entry_id: str | bytes, data: bytes) -> str:
    """The id of an entry that brought none: the same at every redelivery, another for other content."""
    entry = entry_id.decode("ascii") if isinstance(entry_id, bytes) else entry_id
    return str(uuid5(_TRANSACTIONS, f"{stream}\n{entry}\n{sha256(data).hexdigest()}"))


def batch_key(transaction_ids: Iterable[str]) -> str:
    """The key of a batch: one UUIDv5 over the transaction ids of its records, in their order."""
    return str(uuid5(_BATCHES, "\n".join(transaction_ids)))


def correlation_id(raw: bytes | None) -> str | None:
    """The correlation id if it is well formed, else None: it goes into headers and logs."""
    return raw.decode("ascii") if raw is not None and _CORRELATION_ID(raw) else None


def traceparent(raw: bytes | None) -> str | None:
    """The trace context if it is well formed (W3C Trace Context, section 3.2), else None."""
    return raw.decode("ascii") if raw is not None and _TRACEPARENT(raw) else None


# Writing: the bodies of contract section 3.


def usage_stamp(
    server_instance_id: str, api_server_region: str, processing_timestamp: str, agent_version: str
) -> bytes:
    """What `usage_body` puts behind a record: who sends it, and when."""
    return _encode(
        _UsageStamp(server_instance_id, api_server_region, processing_timestamp, agent_version)
    ).replace(b"{", b",", 1)


def usage_body(record: UsageRecord, stamp: bytes) -> bytes:
    """The body of POST …/usage-records for one record, which has its transaction id.

    Encoded as it was read, with the stamp put behind: half of what it costs to copy the record into a body first.
    """
    return _encode(record)[:-1] + stamp


def usage_batch_body(records: Iterable[UsageRecord], stamp: bytes) -> bytes:
    """The body of POST …/usage-records for several records of one session, each as `usage_body` has it.

    Each loses its closing brace, which the stamp ends with: so the stamp joins them.
    """
    opened = [_encode(record)[:-1] for record in records]
    return b'{"usage_records":[' + (stamp + b",").join(opened) + stamp + b"]}"


def start_body(
    event: SessionEvent,
    transaction_id: str,
    server_instance_id: str,
    api_server_region: str,
    timestamp: str,
    agent_version: str,
) -> bytes:
    """The body of POST …/start; `timestamp` is when it is sent."""
    return _encode(
        _StartBody(
            transaction_id=transaction_id,
            customer_id=event.customer_id,
            started_at=event.timestamp,
            timestamp=timestamp,
            server_instance_id=server_instance_id,
            api_server_region=api_server_region,
            agent_version=agent_version,
            metadata=_present(event.metadata),
        )
    )


def complete_body(
    event: SessionEvent,
    transaction_id: str,
    server_instance_id: str,
    api_server_region: str,
    timestamp: str,
    agent_version: str,
) -> bytes:
    """The body of POST …/complete; `timestamp` is when it is sent."""
    return _encode(
        _CompleteBody(
            transaction_id=transaction_id,
            customer_id=event.customer_id,
            completed_at=event.timestamp,
            timestamp=timestamp,
            server_instance_id=server_instance_id,
            api_server_region=api_server_region,
            agent_version=agent_version,
            disconnect_reason=event.disconnect_reason,
            final_usage_summary=_present(event.final_usage_summary),
            metadata=_present(event.metadata),
        )
    )


def refresh_body(
    request: QuotaRequest,
    transaction_id: str,
    server_instance_id: str,
    api_server_region: str,
    agent_version: str,
) -> bytes:
    """The body of POST …/refresh; its `timestamp` is the request's own, the same at every repetition."""
    return _encode(
        _RefreshBody(
            transaction_id=transaction_id,
            api_session_id=request.api_session_id,
            customer_id=request.customer_id,
            product_code=request.product_code,
            timestamp=request.timestamp,
            server_instance_id=server_instance_id,
            api_server_region=api_server_region,
            agent_version=agent_version,
        )
    )


def quota_response_body(response: QuotaResponse) -> bytes:
    """The `data` of one entry of the quota response stream."""
    return _encode(response)


def _present(value: Raw) -> Raw | UnsetType:
    return UNSET if value == ABSENT else value


class _UsageStamp(Struct, frozen=True, gc=False):
    server_instance_id: str
    api_server_region: str
    processing_timestamp: str
    agent_version: str


class _StartBody(
    Struct, frozen=True, gc=False, kw_only=True, omit_defaults=True, tag_field="event_type", tag="start"
):
    transaction_id: str
    customer_id: str
    started_at: str
    timestamp: str
    metadata: Raw | UnsetType = UNSET
    server_instance_id: str
    api_server_region: str
    agent_version: str


class _CompleteBody(
    Struct, frozen=True, gc=False, kw_only=True, omit_defaults=True, tag_field="event_type", tag="complete"
):
    transaction_id: str
    customer_id: str
    completed_at: str
    timestamp: str
    disconnect_reason: str | None = None
    final_usage_summary: Raw | UnsetType = UNSET
    metadata: Raw | UnsetType = UNSET
    server_instance_id: str
    api_server_region: str
    agent_version: str


class _RefreshBody(Struct, frozen=True, gc=False):
    transaction_id: str
    api_session_id: str
    customer_id: str
    product_code: str
    timestamp: str
    server_instance_id: str
    api_server_region: str
    agent_version: str


_Message = TypeVar("_Message", bound=Struct)

_USAGE_RECORD = msgspec.json.Decoder(UsageRecord)
_SESSION_EVENT = msgspec.json.Decoder(SessionEvent)
_QUOTA_REQUEST = msgspec.json.Decoder(QuotaRequest)
_QUOTA_RESPONSE = msgspec.json.Decoder(QuotaResponse)
_COMMAND = msgspec.json.Decoder(Command)
_MEMBERS = msgspec.json.Decoder(dict[str, Raw])
_ANY = msgspec.json.Decoder()
_encode = msgspec.json.Encoder().encode

_EVENT_TYPES = {
    "start": "start",
    "session_started": "start",
    "complete": "complete",
    "session_completed": "complete",
}

_TRANSACTIONS = uuid5(NAMESPACE_URL, "dataplane-agent/transaction")
_BATCHES = uuid5(NAMESPACE_URL, "dataplane-agent/batch")

_ID = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._:~-]{1,128}").fullmatch
_EXPECTED_ID = "expected 1 to 128 of A-Z a-z 0-9 . _ : ~ - (and not . or ..)"
_EXPECTED_CUSTOMER = "customer_id: expected printable characters"
_EXPECTED_PRODUCT = f"product_code: expected {SPEECH_TRANSCRIPTION}"
_CORRELATION_ID = re.compile(rb"[A-Za-z0-9._:~-]{1,128}").fullmatch
_PARENT = rb"-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
_TRACEPARENT = re.compile(
    # Version ff is forbidden; versions after 00 may append fields that nobody here needs to understand.
    rb"00" + _PARENT + rb"|(?!00|ff)[0-9a-f]{2}" + _PARENT + rb"(?:-[!-~]{1,200})?"
).fullmatch
_RFC_3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]+)?"
    r"(?:[Zz]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
).fullmatch
_DECIMALS_1 = len("2026-01-01T12:00:00.0Z")
_DECIMALS_6 = len("2026-01-01T12:00:00.000000Z")
_SECOND = slice(17, 19)
_ONE_SECOND = timedelta(seconds=1)

_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_BRACKETS = bytes.maketrans(b"{}", b"[]")
_OPENING_BRACKET = ord("[")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))

_WHERE = re.compile(r"(?P<what>.*) - at `\$\.?(?P<field>[^`]*)`", re.DOTALL).fullmatch
_MISSING = re.compile(r"Object missing required field `([^`]*)`.*", re.DOTALL).fullmatch


def _decode(decoder: msgspec.json.Decoder[_Message], data: bytes | None) -> _Message:
    """The message that `data` says, its fields within their limits. Raises Invalid, nothing else."""
    if data is None:
        raise Invalid("data: missing from the entry")
    if len(data) > MAX_ENTRY_BYTES:
        raise Invalid(f"data: expected at most {MAX_ENTRY_BYTES} bytes, got {len(data)}")
    try:
        if not data.isascii():
            data.decode()  # msgspec does not look into what it skips
        try:
            message = decoder.decode(data)
        except msgspec.ValidationError:
            message = decoder.decode(_last_members(data))
    except UnicodeDecodeError:
        raise Invalid("data: expected UTF-8") from None
    except RecursionError:
        raise Invalid(TOO_DEEP) from None
    except msgspec.MsgspecError as error:
        raise Invalid(_fault(error)) from None
    # Counting is slow; a flat object, which is what almost all of them are, shows itself at a fifth of the cost.
    if (_OPENING_BRACKET in data or data.rfind(b"{") > 0) and _deeper_than(MAX_LEVELS, data):
        raise Invalid(TOO_DEEP)
    return message


def _last_members(data: bytes) -> bytes:
    """The same object with the last of duplicate keys alone and without nulls: a null field is absent."""
    return _encode({key: value for key, value in _MEMBERS.decode(data).items() if bytes(value) != b"null"})


def _deeper_than(levels: int, data: bytes) -> bool:
    """Whether well-formed JSON is nested deeper than `levels`; every pass takes the innermost level off."""
    if data.count(b"[") + data.count(b"{") <= levels:
        return False
    brackets = _STRINGS.sub(b"", data).translate(_BRACKETS, _NO_BRACKETS)
    for _ in range(levels):
        brackets = brackets.replace(b"[]", b"")
    return bool(brackets)


def _fault(error: msgspec.MsgspecError) -> str:
    """msgspec's complaint as `field: what`, without any of the payload (this library gives only text)."""
    text = str(error)
    if not isinstance(error, msgspec.ValidationError):
        return f"data: expected JSON: {text}"[:MAX_FAULT_CHARACTERS]
    if missing := _MISSING(text):
        return f"{missing[1]}: missing"
    where = _WHERE(text)
    field, what = (where["field"] or "data", where["what"]) if where else ("data", text)
    if "matching regex" in what:
        what = _EXPECTED_ID
    return f"{field}: {what[:1].lower()}{what[1:]}".replace("`", "")[:MAX_FAULT_CHARACTERS]


def _check_numbers(field: str, value: Raw) -> None:
    """What is forwarded as it came must be readable by whoever gets it: 1e400 is no number for a double."""
    try:
        _ANY.decode(value)
    except msgspec.MsgspecError:
        raise Invalid(f"{field}: expected numbers that a double can hold") from None


def _check_order(request: str, response: str) -> None:
    """Both are timestamps, and the response comes at the instant of its request or later."""
    try:
        # Almost all are in UTC with three or six decimals, and what Python reads of such text is RFC 3339: a third of
        # the cost. (Behind the sixth decimal it reads over anything.)
        if (
            request[7] == response[7] == "-"
            and request[10] == response[10] == "T"
            and request[19] == response[19] == "."
            and request[-1] == response[-1] == "Z"
            and _DECIMALS_1 <= len(request) <= _DECIMALS_6 >= len(response) >= _DECIMALS_1
            and datetime.fromisoformat(request) <= datetime.fromisoformat(response)
        ):
            return
    except (ValueError, IndexError):
        pass
    begun = _instant("request_timestamp", request)
    if _instant("response_timestamp", response) < begun:
        raise Invalid("response_timestamp: expected request_timestamp or later, got an earlier instant")


def _instant(field: str, text: str) -> datetime:
    """The instant that an RFC 3339 timestamp names."""
    if _RFC_3339(text) is None:
        raise Invalid(f"{field}: expected an RFC 3339 timestamp with an offset")
    try:
        return _leap_second(text) if text[_SECOND] == "60" else datetime.fromisoformat(text.upper())
    except (ValueError, OverflowError):
        raise Invalid(f"{field}: expected a date and time that exist") from None


def _leap_second(text: str) -> datetime:
    instant = datetime.fromisoformat(f"{text[:17]}59{text[19:]}".upper())
    if instant.astimezone(UTC).strftime("%H:%M") != "23:59":
        raise ValueError
    return instant + _ONE_SECOND
