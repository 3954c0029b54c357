"""Faults on command: what the ControlPlane is to do wrong, to which requests, how often.

    latency      answer `seconds` late
    status       answer `status`, with `retry_after` and `body` when given
    drop_before  close the connection before the record is stored
    drop_after   close the connection after the record was stored
    html_200     200 and a proxy's HTML page
    hang         say nothing for `seconds` (for ever when absent), then close the connection
    redirect     307 to another place
    wrong_json   200 and JSON that is no object
    empty_200    200 and no body
    half_answer  200, and the connection closed in the middle of the body
    close        a good answer, and the connection closed soon after it, without a word
    outage       refuse connections for `seconds`: the port is closed, what was connected is cut off
    certificate  show another one for `seconds`: `expired`, of a `foreign` authority, or `renewed` for good;
                 what was connected is cut off, so that it is seen

`stored` says that the fault strikes after the record was stored; `drop_after` and `close` always do.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from sandbox.tls import Certificate

Kind = Literal[
    "latency",
    "status",
    "drop_before",
    "drop_after",
    "html_200",
    "hang",
    "redirect",
    "wrong_json",
    "empty_200",
    "half_answer",
    "close",
    "outage",
    "certificate",
]

PLACES = ("outage", "certificate")
"""These strike the place that is connected to, not one request or another."""


class Fault(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One rule. `count`: how many requests it still strikes; `sessions`: only these; both None: no bound."""

    kind: Kind
    endpoint: str = "*"
    share: Annotated[float, Meta(ge=0, le=1)] = 1.0
    seconds: Annotated[float, Meta(ge=0, le=86_400)] | None = None
    status: Annotated[int, Meta(ge=200, le=599)] = 503
    retry_after: int | str | None = None
    body: Any = None
    count: Annotated[int, Meta(ge=0)] | None = None
    sessions: list[str] | None = None
    stored: bool = False
    certificate: Certificate = "expired"

    def __post_init__(self) -> None:
        self.endpoint = self.endpoint.replace("-", "_")
        if self.kind in ("drop_after", "close"):
            self.stored = True


class Faults:
    """The rules in force. Randomness comes from outside, so that a run can be repeated."""

    def __init__(self, endpoints: Iterable[str], chance: random.Random) -> None:
        self.rules: list[Fault] = []
        self._lifted = asyncio.Event()
        self._endpoints = frozenset(endpoints)
        self._chance = chance

    def check(self, fault: Fault) -> None:
        """Raises ValueError for an endpoint that does not exist."""
        if fault.endpoint != "*" and fault.endpoint not in self._endpoints:
            known = ", ".join(sorted(self._endpoints))
            raise ValueError(f"endpoint: expected * or one of {known}, got {fault.endpoint}")

    def add(self, fault: Fault) -> None:
        """Put one more rule in force."""
        self.check(fault)
        self.rules.append(fault)

    @property
    def outage(self) -> Fault | None:
        """The outage in force, if there is one."""
        return next((rule for rule in self.rules if rule.kind == "outage"), None)

    def drop(self, fault: Fault) -> None:
        """Lift this very rule, if it is in force."""
        self.rules = [rule for rule in self.rules if rule is not fault]

    def clear(self) -> None:
        """Lift every rule, also for the requests that hang right now."""
        self.rules.clear()
        self._lifted.set()
        self._lifted = asyncio.Event()

    async def lifted(self, seconds: float | None) -> None:
        """Return when all rules are lifted, at the latest after `seconds`."""
        try:
            await asyncio.wait_for(self._lifted.wait(), seconds)
        except TimeoutError:
            pass

    def strike(self, endpoint: str, session_id: str | None) -> list[Fault]:
        """The rules that strike this request, in their order; each spends one of its `count`."""
        struck = [rule for rule in self.rules if self._strikes(rule, endpoint, session_id)]
        for rule in struck:
            if rule.count is not None:
                rule.count -= 1
                if rule.count == 0:
                    self.drop(rule)
        return struck

    def _strikes(self, rule: Fault, endpoint: str, session_id: str | None) -> bool:
        if rule.kind in PLACES or rule.count == 0 or rule.endpoint not in ("*", endpoint):
            return False
        if rule.sessions is not None and session_id not in rule.sessions:
            return False
        return rule.share >= 1 or self._chance.random() < rule.share
