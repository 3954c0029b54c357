"""Quota requests: one POST each; the grant goes back to the AudioAPIServer in the step that settles the request."""

from __future__ import annotations

from common import schemas
from common.control_plane.client import EntryCall
from common.entries import Entry
from common.outcomes import Delivered, Outcome
from common.service import Running


class QuotaRefresher:
    """Asks for quota; a late or repeated answer is never a second grant, since only one can settle the request."""

    ordered = False
    batch = 1

    def __init__(self, running: Running) -> None:
        self._stream = running.config.streams.quota_refresh
        self._client = running.client
        self._sender = running.sender
        self._timestamp = running.timestamp

    def decode(self, entry: Entry) -> str:
        data = entry.data
        assert not isinstance(data, int)
        request = schemas.quota_request(data)
        assert data is not None
        entry.message = request
        entry.transaction_id = request.transaction_id or schemas.transaction_id(self._stream, entry.id, data)
        return request.api_session_id

    async def deliver(self, entries: list[Entry]) -> list[Outcome]:
        return [await self._deliver_one(entry) for entry in entries]

    async def _deliver_one(self, entry: Entry) -> Outcome:
        sender = self._sender
        body = schemas.refresh_body(
            entry.message,
            entry.transaction_id,
            sender.server_instance_id,
            sender.api_server_region,
            sender.agent_version,
        )
        call = EntryCall(
            entry.transaction_id, entry.correlation_id, entry.traceparent, refused_before=entry.refused_before
        )
        outcome = await self._client.refresh(entry.lane, body, call)
        if isinstance(outcome, Delivered):
            assert (
                outcome.answer is not None
            )  # the verdict is delivered only when the answer carries the grant
            entry.reply = schemas.quota_response_body(
                schemas.QuotaResponse(
                    entry.lane,
                    outcome.answer["new_quota_amount"],
                    outcome.answer.get("final_quota"),
                    entry.transaction_id,
                    self._timestamp(),
                )
            )
        return outcome
