"""The border to Redis: how the agent connects, runs its scripts, and what an error of redis-py means.

    RedisFault
    ├── Away          unreachable, loading, disk full: back off, nothing is lost
    │   └── Demoted   it is a replica now: drop the connections, so that the new primary is found
    ├── GroupGone     the stream or a group has vanished: make the groups again
    ├── Full          out of memory: what adds is refused, draining goes on
    └── Denied        wrong password, no permission: fatal, the operator has to act

No other module looks at redis-py's exceptions, and no other file reads the words of an error reply.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import redis.exceptions as errors
from redis.asyncio import Redis, SSLConnection
from redis.asyncio.connection import Connection, ConnectionPool
from redis.asyncio.retry import Retry as RedisRetry
from redis.backoff import NoBackoff

if TYPE_CHECKING:
    from redis.commands.core import AsyncScript

    from common import config


class RedisFault(Exception):
    """Redis did not do what was asked; the class says what follows."""


class Away(RedisFault):
    """Redis is unreachable, loading or refuses writes for now."""


class Demoted(Away):
    """This server is a replica now."""


class GroupGone(RedisFault):
    """The stream or one of its groups does not exist (DEL, FLUSHALL, XGROUP DESTROY, another Redis)."""


class Full(RedisFault):
    """Redis is at its memory limit and refuses what adds."""


class Denied(RedisFault):
    """Redis refuses this user; `str` names the remedy."""


# Looked up along an exception's classes, so the nearest entry decides.
VERDICTS: dict[type[BaseException], type[RedisFault]] = {
    errors.AuthenticationError: Denied,
    errors.AuthenticationWrongNumberOfArgsError: Denied,
    errors.AuthorizationError: Denied,
    errors.ChildDeadlockedError: Away,
    errors.ExternalAuthProviderError: Denied,
    errors.IncorrectPolicyType: Away,
    errors.NoPermissionError: Denied,
    errors.OutOfMemoryError: Full,
    errors.ReadOnlyError: Demoted,
    errors.RedisError: Away,
    errors.RedisClusterException: Away,
    OSError: Away,
    asyncio.TimeoutError: Away,
}

# Replies for which redis-py has no class: the first word of the text is all that Redis gives.
WORDS: dict[str, type[RedisFault]] = {
    "NOGROUP": GroupGone,
    "NOAUTH": Denied,
    "WRONGPASS": Denied,
    "NOPERM": Denied,
    "READONLY": Demoted,
    "OOM": Full,
}

REMEDIES: dict[type[RedisFault], str] = {
    Denied: "check redis.username and redis.password, and that the ACL of this user covers the agent's keys",
}


def fault(error: BaseException) -> RedisFault:
    """The fact behind an exception of redis-py or of the socket below it."""
    text = str(error).split("\n", 1)[0][:300]
    kind: type[RedisFault] | None = None
    if isinstance(error, errors.ResponseError):
        if text.startswith("UNBLOCKED the stream key") or " NOGROUP " in f" {text}":
            kind = GroupGone
        elif text.startswith("UNBLOCKED force"):
            kind = Demoted
        else:
            kind = WORDS.get(text.split(" ", 1)[0].rstrip(":"))
    if kind is None:
        kind = next((VERDICTS[base] for base in type(error).__mro__ if base in VERDICTS), Away)
    remedy = REMEDIES.get(kind)
    return kind(f"{type(error).__name__}: {text}" + (f" ({remedy})" if remedy else ""))


@contextmanager
def border() -> Iterator[None]:
    """Everything that crosses from redis-py becomes a RedisFault."""
    try:
        yield
    except tuple(VERDICTS) as error:
        raise fault(error) from error


class _Timed(Connection):
    """Sends within `socket_timeout` without `asyncio.wait_for`.

    In Python 3.11 that loses a cancellation now and then (measured: 19 of 300 while sending), and it makes a task
    of every command.
    """

    async def send_packed_command(
        self, command: bytes | str | Iterable[bytes], check_health: bool = True
    ) -> None:
        seconds, self.socket_timeout = self.socket_timeout, None
        try:
            async with asyncio.timeout(seconds):
                await super().send_packed_command(command, check_health)
        except TimeoutError:
            await self.disconnect(nowait=True)
            raise errors.TimeoutError("Timeout writing to socket") from None
        finally:
            self.socket_timeout = seconds


class _TimedTls(_Timed, SSLConnection):
    """The same over TLS."""


def connect(settings: config.Redis) -> Redis:
    """A client that never retries by itself: repeating is the caller's decision, and scripts are guarded for it.

    It connects on first use. Replies are bytes.
    """
    options: dict[str, Any] = {
        "host": settings.host,
        "port": settings.port,
        "db": settings.db,
        "username": settings.username or None,
        "password": settings.password.reveal() or None,
        "socket_timeout": settings.socket_timeout,
        "socket_connect_timeout": min(5.0, settings.socket_timeout),
        "socket_keepalive": True,
        "retry": RedisRetry(NoBackoff(), 0),
        "protocol": 2,
        "connection_class": _Timed,
    }
    if settings.tls:
        options |= {
            "connection_class": _TimedTls,
            "ssl_ca_certs": settings.ca_file,
            "ssl_certfile": settings.cert_file,
            "ssl_keyfile": settings.key_file,
        }
    return Redis(connection_pool=ConnectionPool(**options))


class Scripts:
    """The guarded Lua scripts of `common.scripts`, loaded once; EVALSHA, with EVAL where the server forgot them."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self._loaded: dict[str, AsyncScript] = {}

    async def run(self, name: str, keys: Sequence[str], args: Sequence[str | bytes | int]) -> Any:
        """Runs `scripts/<name>.lua`; raises RedisFault. Every script may be repeated: it changes nothing twice."""
        script = self._loaded.get(name)
        if script is None:
            text = files("common.scripts").joinpath(f"{name}.lua").read_text()
            script = self._loaded[name] = self.redis.register_script(text)
        with border():
            return await script(keys=list(keys), args=list(args))
