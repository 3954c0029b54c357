"""What is remembered of a command for a day, so that it runs at most once successfully and is reported once.

    dataplane:<server>:command:<id>            the command itself, once its token was believed
                                               running ──▶ failed ──▶ running … ──▶ ended, then reported
    dataplane:<server>:command:<id>/<digest>   one that was refused, whatever its id says: so a forgery does
                                               not stand in the way of the genuine one

A record is replaced by a script that checks that it is still the one that was read: two processes with the
same command cannot both begin, and one that was paused for long cannot end what another has begun anew.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from common.redis_border import Scripts, border
from common.streams import command_key

KEPT_SECONDS = 24 * 3600


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """How far a command has come.

    `entry` is the one it ran for, which tells a crash from another process; `began_at` is in Unix seconds.
    """

    digest: str
    state: Literal["running", "failed", "ended"]
    runs: int = 0
    entry: str = ""
    began_at: float = 0.0
    error: str = ""
    report: dict[str, Any] | None = None
    reported: bool = False


class Place(msgspec.Struct, frozen=True):
    """A key with what was read there."""

    key: str
    raw: bytes = b""
    record: Record | None = None

    @property
    def reported(self) -> bool:
        return self.record is not None and self.record.reported


class Memory:
    """Reads and replaces records; every method raises RedisFault."""

    def __init__(self, scripts: Scripts, server_id: str) -> None:
        self._scripts, self._server_id = scripts, server_id

    async def recall(self, command_id: str, digest: str) -> tuple[Place, Place]:
        """What is known of the command, and of this very order as a refused one."""
        # "/" is in no command id, so this key is no other command's.
        keys = [command_key(self._server_id, name) for name in (command_id, f"{command_id}/{digest}")]
        with border():
            pipeline = self._scripts.redis.pipeline(transaction=False)
            for key in keys:
                pipeline.get(key)
            own, refused = await pipeline.execute()
        return _place(keys[0], own), _place(keys[1], refused)

    async def remember(self, place: Place, record: Record) -> Place | None:
        """Replaces the record; None when somebody else has done so since it was read."""
        raw = msgspec.json.encode(record)
        written = await self._scripts.run("remember", [place.key], [place.raw, raw, KEPT_SECONDS])
        return Place(place.key, raw, record) if written else None


def _place(key: str, raw: bytes | None) -> Place:
    return Place(key, raw, msgspec.json.decode(raw, type=Record)) if raw else Place(key)
