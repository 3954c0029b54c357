"""Quota requests: one POST each; the grant goes back to the AudioAPIServer in the step that settles the request."""

from __future__ import annotations

from common import schemas
from common.entries import Entry
from common.handler import EntryHandler
from common.outcomes import Delivered, Outcome
from common.service import Running


class QuotaRefresher(EntryHandler):
    """Asks for quota; a late or repeated answer is never a second grant, since only one can settle the request."""

    def __init__(self, running: Running) -> None:
        super().__init__(running, running.config.streams.quota_refresh, schemas.quota_request)

    async def deliver(self, entry: Entry) -> Outcome:
        sender = self._sender
        body = schemas.refresh_body(
            entry.message,
            entry.transaction_id,
            sender.server_instance_id,
            sender.api_server_region,
            sender.agent_version,
        )
        outcome = await self._client.refresh(entry.lane, body, entry)
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
