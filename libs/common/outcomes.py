"""What became of an entry: a closed set of values, so that one `match` can end every delivery.

    Delivered   the ControlPlane has it          -> settle: it leaves the stream
    Retry       not yet                          -> it stays pending and is tried again
    Dead        never, by a verdict on the entry -> the dead-letter view, until an operator decides

A handler returns one of these per entry. Nothing else ends a delivery.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec


class Reason(StrEnum):
    """Why an entry is in the dead-letter view; the consumer's name there (contract section 2)."""

    INVALID = "invalid"  # cannot be read, or breaks the schema
    REJECTED = "rejected"  # the ControlPlane's final no
    CONFLICT = "conflict"  # same transaction id, other content
    POISON = "poison"  # delivering it alone killed the process max_deliveries times


class Cause(StrEnum):
    """Why an entry is not delivered yet."""

    TRANSIENT = "transient"  # the ControlPlane or the network failed: parked, 1 s doubling to 60 s
    UNCONFIRMED = "unconfirmed"  # a 2xx that nobody may believe: like transient, counted apart
    NOT_FOUND = "not_found"  # 404/410, or a 403 that concerns this entry alone: held for a bounded time
    HELD = "held"  # not sent, or refused for the process's own fault: no attempt is counted


class Delivered(msgspec.Struct, frozen=True, gc=False):
    """The ControlPlane has it. `duplicate`: it said that it had it already. `answer`: its JSON object."""

    duplicate: bool = False
    answer: dict[str, Any] | None = None


class Retry(msgspec.Struct, frozen=True, gc=False):
    """Not delivered yet. `after`: seconds the ControlPlane asked for (Retry-After), if it did.

    `response_excerpt`: of an answer that may come to be the last one.
    """

    cause: Cause
    error: str
    http_status: int | None = None
    after: float | None = None
    response_excerpt: str | None = None


class Dead(msgspec.Struct, frozen=True, gc=False):
    """Never to be delivered as it is. `error` and `response_excerpt` carry no secret."""

    reason: Reason
    error: str
    http_status: int | None = None
    response_excerpt: str | None = None


Outcome = Delivered | Retry | Dead

DELIVERED = Delivered()  # the usual one, shared: it carries nothing
DUPLICATE = Delivered(duplicate=True)
