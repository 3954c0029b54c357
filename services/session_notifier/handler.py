"""Session events: one POST each, in order per session; the loop's lanes see to the order."""

from __future__ import annotations

from common import schemas
from common.entries import Entry
from common.handler import EntryHandler
from common.outcomes import Outcome
from common.service import Running


class SessionNotifier(EntryHandler):
    """Delivers session events, one at a time per session."""

    ordered = True

    def __init__(self, running: Running) -> None:
        super().__init__(running, running.config.streams.session_lifecycle, schemas.session_event)

    async def deliver(self, entry: Entry) -> Outcome:
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
        return await post(entry.lane, body, entry)
