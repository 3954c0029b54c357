"""`dataplane send`: puts one entry on a stream, validated and written as an AudioAPIServer does it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter

from common.producer import Message, Producer, ProducerError
from common.schemas import ABSENT, Invalid, QuotaRequest, SessionEvent, UsageRecord
from dataplane_agent import printing
from dataplane_agent.target import Failure, Files, Json, connected, load

WAIT_SECONDS = 5.0
"""Somebody sits in front of it: a Redis that is away for longer is an answer too."""

Session = Annotated[str, Parameter(name="--session", help="The session (api_session_id).")]
Customer = Annotated[str, Parameter(name="--customer", help="The customer (customer_id).")]
Transaction = Annotated[
    str | None, Parameter(name="--transaction", help="The transaction id; a new one without it.")
]
Text = Annotated[str | None, Parameter(help="JSON that goes with the event.")]


async def usage(
    *,
    session: Session,
    customer: Customer,
    connection_seconds: float = 60.0,
    audio_seconds: float | None = None,
    data_bytes: int = 0,
    requests: int = 1,
    transaction: Transaction = None,
    config: Files = (),
    json: Json = False,
) -> None:
    """Sends a usage record that ends now; the audio lasts as long as the connection, unless given."""
    now = datetime.now(UTC)
    record = UsageRecord(
        api_session_id=session,
        customer_id=customer,
        connection_duration_seconds=connection_seconds,
        data_bytes_processed=data_bytes,
        audio_duration_seconds=connection_seconds if audio_seconds is None else audio_seconds,
        request_timestamp=_began(now, connection_seconds).isoformat(),
        response_timestamp=now.isoformat(),
        request_count=requests,
        transaction_id=transaction,
    )
    await _send(record, config, json)


async def start(
    *,
    session: Session,
    customer: Customer,
    metadata: Text = None,
    transaction: Transaction = None,
    config: Files = (),
    json: Json = False,
) -> None:
    """Sends the start of a session."""
    event = SessionEvent(
        session, customer, "start", _now(), transaction, metadata=_raw("--metadata", metadata)
    )
    await _send(event, config, json)


async def complete(
    *,
    session: Session,
    customer: Customer,
    reason: str | None = None,
    summary: Text = None,
    metadata: Text = None,
    transaction: Transaction = None,
    config: Files = (),
    json: Json = False,
) -> None:
    """Sends the end of a session."""
    event = SessionEvent(
        session,
        customer,
        "complete",
        _now(),
        transaction,
        disconnect_reason=reason,
        final_usage_summary=_raw("--summary", summary),
        metadata=_raw("--metadata", metadata),
    )
    await _send(event, config, json)


async def quota(
    *,
    session: Session,
    customer: Customer,
    transaction: Transaction = None,
    config: Files = (),
    json: Json = False,
) -> None:
    """Asks for more quota for a session; the grant comes on the quota response stream."""
    await _send(QuotaRequest(session, customer, _now(), transaction_id=transaction), config, json)


async def _send(message: Message, config: tuple[Path, ...], json: bool) -> None:
    settings = load(config)
    async with connected(settings) as redis:
        try:
            written = await Producer(redis, settings.streams, wait_seconds=WAIT_SECONDS).add(message)
        except Invalid as fault:
            raise Failure(str(fault), 2) from None
        except ProducerError as error:
            raise Failure(str(error), 3) from None
    if json:
        told = {"stream": written.stream, "id": written.entry_id, "transaction_id": written.transaction_id}
        printing.json(told)
    else:
        print(f"{written.stream} {written.entry_id} {written.transaction_id}")


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _began(now: datetime, seconds: float) -> datetime:
    try:
        return now - timedelta(seconds=seconds)
    except (OverflowError, ValueError):
        return now  # the duration itself is out of bounds, and is refused for that


def _raw(option: str, text: str | None) -> msgspec.Raw:
    if text is None:
        return ABSENT
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise Failure(f"{option}: expected JSON, got {text!r} ({error})", 2) from None
    return msgspec.Raw(text.encode())
