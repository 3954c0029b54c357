"""The turn: one active holder among many processes, by a token with a time to live.

A stream that promises order is read by the holder alone, and the acting registrar is the holder of its turn.
The token fences: scripts that read, settle or bury check it, so a holder that was paused for longer than the
time to live changes nothing any more (law 14).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from common.logs import get
from common.redis_border import RedisFault, Scripts

ASK_EVERY = 1.0
"""Seconds between two attempts of those who wait: a handed-over turn is taken up within this time."""

RENEWED, TAKEN = 1, 2
"""The script's answers when it was ours, and when nobody had it."""


class Turn:
    """Takes the turn when it is free, renews it every third of its time to live, gives it up on stop."""

    def __init__(
        self,
        scripts: Scripts,
        key: str,
        token: str,
        ttl: float,
        *,
        clock: Callable[[], float],
    ) -> None:
        self.key = key
        self.token = token
        self.taken = asyncio.Event()
        self.era = 0  # how often the turn was taken: between two eras somebody else may have held it
        self._scripts = scripts
        self._ttl = ttl
        self._clock = clock
        self._name = token
        self._replaced = 0  # how many tokens there were before this one
        self._next: str | None = None  # the token that replaces it, until Redis has said so
        self._renewed_at = float("-inf")
        self._given_up = False
        self._missed = asyncio.Event()  # lost, so asked for again at once
        self._asking = asyncio.Lock()  # an answer that is under way must not take back what is given up
        self._log = get("turn")

    @property
    def held(self) -> bool:
        return self.taken.is_set()

    @property
    def fresh(self) -> bool:
        """Whether a request may start: the last renewal is younger than half the time to live."""
        return self.taken.is_set() and self._clock() - self._renewed_at < self._ttl / 2

    async def run(self, on_fault: Callable[[RedisFault], float], answered: Callable[[], None]) -> None:
        """Asks and renews until given up; `on_fault` is told what Redis said and answers how long to wait."""
        while not self._given_up:
            try:
                await self.ask()
                answered()
                pause = self._ttl / 3 if self.held else min(ASK_EVERY, self._ttl / 3)
            except RedisFault as fault:
                self._expire()
                pause = min(on_fault(fault), self._ttl / 3)
            try:
                async with asyncio.timeout(pause):
                    await self._missed.wait()
            except TimeoutError:
                pass
            self._missed.clear()

    async def ask(self) -> bool:
        """One attempt; raises RedisFault. The time of a renewal is the time before the call."""
        async with self._asking:
            if self._given_up:
                return False
            asked_at = self._clock()
            ours = await self._take(self.token, self._next or "")
            if ours:
                self._renewed_at = asked_at
        if ours == TAKEN:
            self.lose()  # should we have thought it ours: it had run out, and somebody else may have had it
        if ours and not self.held and not self._given_up:
            self.era += 1
            self.taken.set()
            self._log.info("turn.taken", key=self.key)
        elif not ours:
            self.lose()
        return self.held

    async def replace_token(self) -> bool:
        """Renews under a new token: a call that was given up and may yet arrive changes nothing. Raises RedisFault."""
        async with self._asking:
            if self._given_up:
                return False
            if self._next is None:
                self._replaced += 1
                self._next = f"{self._name}/{self._replaced}"
            asked_at = self._clock()
            ours = await self._take(self._next, self.token)
            if ours:
                self._renewed_at = asked_at
                self.token, self._next = self._next, None
        if ours != RENEWED:
            self.lose()
        return self.held

    async def _take(self, token: str, replaces: str) -> int:
        ours: int = await self._scripts.run("turn_take", [self.key], [token, int(self._ttl * 1000), replaces])
        return ours

    async def give_up(self) -> None:
        """Frees the turn for the next, for good; raises RedisFault."""
        self._given_up = True
        self.taken.clear()
        async with self._asking:
            for token in (self.token, self._next):
                if token is not None:
                    await self._scripts.run("turn_give_up", [self.key], [token])

    def lose(self) -> None:
        """Somebody found that the turn is no longer ours."""
        if self.held:
            self.taken.clear()
            self._missed.set()
            self._log.warning("turn.lost", key=self.key)

    def _expire(self) -> None:
        if self.held and self._clock() - self._renewed_at >= self._ttl:
            self.lose()
