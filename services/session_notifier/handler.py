"""Session events: one POST each, in order per session; the loop's lanes see to the order."""

from __future__ import annotations

from common import schemas
from common.control_plane.client import EntryCall
from common.entries import Entry
from common.outcomes import Outcome
from common.service import Running


class SessionNotifier:
    """Delivers session events, one at a time per session."""

    ordered = True
    batch = 1

    def __init__(self, running: Running) -> None:
        self._stream = running.config.streams.session_lifecycle
        self._client = running.client
        self._sender = running.sender
        self._timestamp = running.timestamp

    def decode(self, entry: Entry) -> str:
        data = entry.data
        assert not isinstance(data, int)
        event = schemas.session_event(data)
        assert data is not None
        entry.message = event
        entry.transaction_id = event.transaction_id or schemas.transaction_id(self._stream, entry.id, data)
        return event.api_session_id

    async def deliver(self, entries: list[Entry]) -> list[Outcome]:
        return [await self._deliver_one(entry) for entry in entries]

    async def _deliver_one(self, entry: Entry) -> Outcome:
        starts = entry.message.event_type == "start"
        encode = schemas.start_body if starts else schemas.complete_body
        post = self._client.start if starts else self._client.complete
        sender = self._sender
        body = encode(
            entry.message,
            entry.transaction_id,
            sender.server_instance_id,
            sender.api_server_region,
            self._timestamp(),
            sender.agent_version,
        )
        call = EntryCall(
            entry.transaction_id, entry.correlation_id, entry.traceparent, refused_before=entry.refused_before
        )
        return await post(entry.lane, body, call)
