"""What a command acts on: the configuration, and the streams in the Redis it names."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from redis.asyncio import Redis

from common import config, redis_border
from common.config import Config
from common.streams import Stream

Files = Annotated[
    tuple[Path, ...],
    Parameter(
        name="--config",
        negative="",
        help="Configuration file; repeatable, later ones override earlier ones (else $DATAPLANE_CONFIG).",
    ),
]
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON.")]

SERVICES = ("registrar", "usage_forwarder", "session_notifier", "quota_refresher")


class Failure(Exception):
    """An expected end of a command: what to tell the operator, and the exit code."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def load(files: tuple[Path, ...]) -> Config:
    """The configuration, its warnings told; raises ConfigError with every fault."""
    settings = config.load(files)
    for warning in settings.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return settings


@asynccontextmanager
async def connected(settings: Config) -> AsyncIterator[Redis]:
    """Redis, as the configuration names it; raises RedisFault when it does not answer."""
    redis = redis_border.connect(settings.redis)
    try:
        with redis_border.border():
            await redis.ping()
        yield redis
    finally:
        await redis.aclose()


def streams(settings: Config) -> dict[str, Stream]:
    """The four streams that have dead letters, by the key the configuration knows them under."""
    names = settings.streams
    return {
        "usage_records": Stream(names.usage_records, "usage_forwarder"),
        "session_lifecycle": Stream(names.session_lifecycle, "session_notifier"),
        "quota_refresh": Stream(names.quota_refresh, "quota_refresher"),
        "commands": Stream(names.commands, "registrar"),
    }


def chosen(settings: Config, named: str | None) -> list[Stream]:
    """The stream of that name, of that key in the configuration, or of that service; all without a name."""
    known = streams(settings)
    if named is None:
        return list(known.values())
    for key, stream in known.items():
        if named in (key, stream.name, stream.group):
            return [stream]
    raise Failure(f"--stream: expected one of {', '.join(s.name for s in known.values())}, got {named}", 2)
