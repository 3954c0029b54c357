"""Usage records: one POST a record, or one per session and batch, split when refused so that only the guilty dies."""

from __future__ import annotations

from collections import deque

from msgspec.structs import replace

from common import schemas
from common.control_plane.client import BatchCall, Delivering
from common.control_plane.verdicts import Split
from common.entries import Entry
from common.figures import StreamFigures
from common.handler import EntryHandler
from common.outcomes import Outcome
from common.service import Running

MAX_BATCH_BYTES = 1024 * 1024
"""A request body is at most this long (contract section 3)."""

RECENT = 50
"""The undelivered estimate is made of the means of so many records, the last that were read."""

CREDIT_SECONDS = 360
"""One credit a started 360 s of audio or connection, whichever is longer; the ControlPlane computes the real ones."""


class UsageForwarder(EntryHandler):
    """Delivers usage records; keeps no order, since each is complete in itself."""

    figures = staticmethod(schemas.UsageRecord.figures)

    def __init__(self, running: Running) -> None:
        super().__init__(running, running.config.streams.usage_records, schemas.usage_record)
        self.batch = running.config.control_plane.usage_batch_size
        self._metrics = running.metrics
        self._recent: deque[schemas.UsageRecord] = deque(maxlen=RECENT)
        self._stamp_of = ""  # the moment that is in the stamp
        self._stamp = b""

    def decode(self, entry: Entry, data: bytes | None) -> str:
        # Not by way of the class it is made of: with 100 records a request that costs 7 % of the rate, measured.
        record = schemas.usage_record(data)
        key = record.transaction_id
        if key is None:
            assert data is not None  # or it would have been invalid
            key = schemas.transaction_id(self._stream, entry.id, data)
            record = replace(record, transaction_id=key)
        entry.message, entry.transaction_id = record, key
        self._recent.append(record)
        return record.api_session_id

    def deliver(self, entry: Entry) -> Delivering:  # no coroutine of its own, like those it returns
        body = schemas.usage_body(entry.message, self._stamped())
        return self._client.usage_record(entry.lane, body, entry)

    async def deliver_batch(self, entries: list[Entry]) -> list[Outcome]:
        """One request for all; in halves when it is refused or too long, one by one when it repeats something."""
        if len(entries) == 1:
            return [await self.deliver(entries[0])]
        if any(
            entry.refused_before for entry in entries
        ):  # one of them is not wanted: not on account of the others
            return [await self.deliver(entry) for entry in entries]
        body = schemas.usage_batch_body([entry.message for entry in entries], self._stamped())
        answer: Outcome | Split = Split(one_by_one=False)
        if len(body) <= MAX_BATCH_BYTES:
            key = schemas.batch_key([entry.transaction_id for entry in entries])
            answer = await self._client.usage_batch(entries[0].lane, body, BatchCall(key, key))
        match answer:
            case Split(one_by_one=True):
                return [await self.deliver(entry) for entry in entries]
            case Split():
                middle = len(entries) // 2
                return [
                    *await self.deliver_batch(entries[:middle]),
                    *await self.deliver_batch(entries[middle:]),
                ]
            case outcome:
                return [outcome] * len(entries)

    def _stamped(self) -> bytes:
        """Who sends it, and that it is now."""
        now = self._timestamp()
        if now != self._stamp_of:  # under load several records share a millisecond
            who = self._sender
            self._stamp_of = now
            self._stamp = schemas.usage_stamp(
                who.server_instance_id, who.api_server_region, now, who.agent_version
            )
        return self._stamp

    def estimate(self, figures: StreamFigures) -> None:
        """Tells the metrics what the undelivered records are probably worth."""
        undelivered = (figures.backlog + figures.pending) / max(1, len(self._recent))
        audio = sum(record.audio_duration_seconds for record in self._recent)
        credits = sum(_credits(record) for record in self._recent)
        self._metrics.undelivered(undelivered * audio, undelivered * credits)


def _credits(record: schemas.UsageRecord) -> float:
    longest = max(record.audio_duration_seconds, record.connection_duration_seconds)
    return -(-longest // CREDIT_SECONDS)
