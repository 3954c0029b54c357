"""What the ledger of a stream says, and the sum it has to come to.

The hash `{stream}:ledger` counts in the same atomic step that settles, so it never lags behind the stream.
Whenever nothing is moving,

    entries-added − base  =  delivered + duplicate + discarded + vanished + XLEN

and what is missing was lost: trimmed before it was read, or deleted by somebody else.
What went with a whole stream (deleted, flushed, forgotten by Redis) is `lost`, and no part of the sum: the books of
another stream begin anew, and those that Redis has rolled back never knew it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from common.outcomes import Reason
from common.streams import Stream

if TYPE_CHECKING:
    from redis.asyncio import Redis

BASE = "base"  # entries-added when the group was made: what came before was never ours
DELIVERED = "delivered"
DUPLICATE = "duplicate"  # the ControlPlane had it already
DISCARDED = "discarded"  # an operator's decision
VANISHED = "vanished"  # trimmed or deleted by somebody while it was pending
REDRIVEN = "redriven"  # went back into the live group; says nothing about the balance
LOST = "lost"  # went with the stream itself, as far as the sentinel saw; says nothing about the balance
DEAD = {reason: f"dead:{reason}" for reason in Reason}  # ever buried; redriven ones are not subtracted

GONE = (DELIVERED, DUPLICATE, DISCARDED, VANISHED)
"""The four ways out of a stream."""

SUMS = ("audio_ms", "connection_ms", "data_bytes", "request_count")
"""Usage only: what the delivered records add up to, in integers, so that nothing drifts."""


async def read(redis: Redis, stream: Stream) -> dict[str, int]:
    """The ledger as it stands; empty for a stream that never had a group."""
    return parse(cast(Mapping[bytes, bytes], await redis.hgetall(stream.ledger_key)))


def parse(raw: Mapping[bytes, bytes]) -> dict[str, int]:
    """HGETALL's reply as figures, in the order of their names."""
    return {field.decode(): int(figure) for field, figure in sorted(raw.items())}


def imbalance(entries_added: int, length: int, ledger: Mapping[str, int]) -> int:
    """How many entries left the stream without being counted; 0 when all adds up."""
    return entries_added - ledger.get(BASE, 0) - sum(ledger.get(field, 0) for field in GONE) - length
