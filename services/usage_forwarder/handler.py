"""Usage records: one POST a record, or one per session and batch, split when refused so that only the guilty dies."""

from __future__ import annotations

from common import schemas
from common.control_plane.client import Delivering, EntryCall
from common.control_plane.verdicts import Split
from common.entries import Entry
from common.figures import StreamFigures
from common.handler import EntryHandler
from common.outcomes import Outcome
from common.service import Running

MAX_BATCH_BYTES = 1024 * 1024
"""A request body is at most this long (contract section 3)."""

RECENT = 0.02
"""Weight of the newest record in the means behind the undelivered estimate: about the last fifty count."""

CREDIT_SECONDS = 360
"""One credit a started 360 s of audio or connection, whichever is longer; the ControlPlane computes the real ones."""


class UsageForwarder(EntryHandler):
    """Delivers usage records; keeps no order, since each is complete in itself."""

    def __init__(self, running: Running) -> None:
        super().__init__(running, running.config.streams.usage_records, schemas.usage_record)
        self.batch = running.config.control_plane.usage_batch_size
        self._metrics = running.metrics
        self._seen = 0
        self._mean_audio = 0.0  # begin at nothing, which weighs less with every record seen
        self._mean_credits = 0.0

    def decode(self, entry: Entry) -> str:
        lane = super().decode(entry)
        record: schemas.UsageRecord = entry.message
        entry.figures = record.figures()
        audio, connection = record.audio_duration_seconds, record.connection_duration_seconds
        self._seen += 1
        self._mean_audio += RECENT * (audio - self._mean_audio)
        self._mean_credits += RECENT * (-(-max(audio, connection) // CREDIT_SECONDS) - self._mean_credits)
        return lane

    async def deliver(self, entries: list[Entry]) -> list[Outcome]:
        if len(entries) == 1:
            return [await self.deliver_one(entries[0])]
        return await self._deliver_batch(entries)

    def deliver_one(self, entry: Entry) -> Delivering:  # no coroutine of its own, like those it returns
        return self._client.usage_record(entry.lane, self._body(entry), self.call(entry))

    async def _deliver_batch(self, entries: list[Entry]) -> list[Outcome]:
        """One request for all; in halves when it is refused or too long, one by one when it repeats something."""
        if len(entries) == 1:
            return [await self.deliver_one(entries[0])]
        if any(
            entry.refused_before for entry in entries
        ):  # one of them is not wanted: not on account of the others
            return [await self.deliver_one(entry) for entry in entries]
        body = schemas.usage_batch_body([self._body(entry) for entry in entries])
        answer: Outcome | Split = Split(one_by_one=False)
        if len(body) <= MAX_BATCH_BYTES:
            key = schemas.batch_key([entry.transaction_id for entry in entries])
            call = EntryCall(key, key)
            answer = await self._client.usage_batch(entries[0].lane, body, call)
        match answer:
            case Split(one_by_one=True):
                return [await self.deliver_one(entry) for entry in entries]
            case Split():
                middle = len(entries) // 2
                return [
                    *await self._deliver_batch(entries[:middle]),
                    *await self._deliver_batch(entries[middle:]),
                ]
            case outcome:
                return [outcome] * len(entries)

    def _body(self, entry: Entry) -> bytes:
        sender = self._sender
        return schemas.usage_body(
            entry.message,
            entry.transaction_id,
            sender.server_instance_id,
            sender.api_server_region,
            self._timestamp(),
            sender.agent_version,
        )

    def estimate(self, figures: StreamFigures) -> None:
        """Tells the metrics what the undelivered records are probably worth."""
        seen_share = 1 - (1 - RECENT) ** self._seen
        undelivered = (figures.backlog + figures.pending) / (seen_share or 1)
        self._metrics.undelivered(undelivered * self._mean_audio, undelivered * self._mean_credits)
