"""Service processes as a user starts them, and what has to add up when they have done their work."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol, Self, TypeVar, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from common import figures
from common.config import Streams
from common.figures import StreamFigures
from common.redis_border import Scripts
from common.streams import Stream
from sandbox.book import Row
from sandbox.ledger import ControlPlaneBook
from sandbox.reconciler import Reconciliation, reconcile
from sandbox.redis_book import read_grants, read_redis
from tests.support import eventually

T = TypeVar("T")

_NAMES = Streams()
STREAMS = {
    "usage_forwarder": Stream(_NAMES.usage_records, "usage_forwarder"),
    "session_notifier": Stream(_NAMES.session_lifecycle, "session_notifier"),
    "quota_refresher": Stream(_NAMES.quota_refresh, "quota_refresher"),
}
"""The services that carry entries, each with its stream."""


class Reachable(Protocol):
    """What a service has to know of its ControlPlane."""

    @property
    def url(self) -> str: ...
    @property
    def api_key(self) -> str: ...
    @property
    def ca_file(self) -> object: ...


class ServiceProcess:
    """One `python -m <name>`, configured by the environment alone, on free ports.

    `overrides` are keys of the configuration, its sections set off by two underscores
    (`streams__visibility_timeout=1`); None leaves a key to its default. `start` may be called again after an end;
    the log goes on.
    """

    def __init__(
        self, name: str, redis_port: int, control_plane: Reachable, **overrides: str | float | None
    ) -> None:
        self.name = name
        settings: dict[str, str | float | None] = {
            "redis__host": "127.0.0.1",
            "redis__port": redis_port,
            "control_plane__base_url": control_plane.url,
            "control_plane__api_key": control_plane.api_key,
            "control_plane__ca_file": str(control_plane.ca_file),
            "monitoring__bind": "127.0.0.1",
            "monitoring__metrics_port": 0,
            "monitoring__health_check_port": 0,
            **overrides,
        }
        self.environ = {
            name: value for name, value in os.environ.items() if not name.startswith("DATAPLANE_")
        }
        self.environ |= {
            f"DATAPLANE_{key.upper()}": str(value) for key, value in settings.items() if value is not None
        }
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as this does, and has no name
        self._begin = 0
        self._process: subprocess.Popen[bytes] | None = None

    # -- beginning and end -----------------------------------------------------------------------------

    def start(self) -> Self:
        """Return at once; `ready` waits."""
        assert not self.running
        self._begin = os.fstat(self._log.fileno()).st_size
        self._process = subprocess.Popen(
            [sys.executable, "-m", self.name], env=self.environ, stdout=self._log, stderr=self._log
        )
        return self

    async def ready(self, within: float = 15.0) -> Self:
        """Return when the line `service.ready` is there; fail when the process ends before."""

        def looked() -> bool:
            assert self.running, f"{self.name} ended with {self.process.returncode}:\n{self.tail()}"
            return bool(self._now("service.ready"))

        await eventually(looked, within=within)
        return self

    def kill(self) -> None:
        """The crash: SIGKILL."""
        if self.running:
            self.process.kill()
            self.process.wait(10)

    def restart(self) -> None:
        """The crash, and a new process in its place."""
        self.kill()
        self.start()

    async def stop(self, within: float = 15.0) -> int:
        """The orderly end: SIGTERM; returns the exit code. What is served in this process goes on meanwhile."""
        self.process.terminate()
        return await self.ended(within)

    async def ended(self, within: float = 15.0) -> int:
        """The exit code, as soon as there is one."""
        return await asyncio.to_thread(self.process.wait, within)

    def pause(self) -> None:
        """SIGSTOP: nothing runs in it until `resume`."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    # -- what it says ----------------------------------------------------------------------------------

    def lines(self, event: str | None = None) -> list[dict[str, Any]]:
        """The log's lines, all or those of one event, since the first start."""
        return [line for line in self._read(0) if event in (None, line["event"])]

    def tail(self, characters: int = 3000) -> str:
        """The end of the log as it is, tracebacks included."""
        return self._text(0)[-characters:]

    @property
    def consumer(self) -> str:
        """Its name in the group; there as soon as it is ready."""
        return str(self._now("service.ready")[-1]["consumer"])

    @property
    def health_url(self) -> str:
        return self._url("monitoring.health_check_port")

    @property
    def metrics_url(self) -> str:
        return self._url("monitoring.metrics_port")

    def _url(self, key: str) -> str:
        (line,) = (line for line in self._now("service.listening") if line["key"] == key)
        return f"http://127.0.0.1:{line['port']}"

    def _now(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self._read(self._begin) if line["event"] == event]

    def _read(self, begin: int) -> Iterable[dict[str, Any]]:
        for line in self._text(begin).splitlines(keepends=True):
            if line.startswith("{") and line.endswith("}\n"):
                with suppress(msgspec.DecodeError):  # a killed process may leave a line unfinished
                    yield msgspec.json.decode(line)

    def _text(self, begin: int) -> str:
        descriptor = self._log.fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size - begin, begin).decode(errors="replace")


class Services:
    """Starts processes that share a Redis, a ControlPlane and settings; none is left at the end of the block.

    What they logged last is printed then, which pytest shows where a test has failed.
    """

    def __init__(self, redis_port: int, control_plane: Reachable, **settings: str | float | None) -> None:
        self._redis_port, self._control_plane, self._settings = redis_port, control_plane, settings
        self.started: list[ServiceProcess] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for service in self.started:
            with suppress(ProcessLookupError):
                service.kill()
            print(f"-- {service.name} --", service.tail(), sep="\n")  # noqa: T201

    def start(self, name: str, **overrides: str | float | None) -> ServiceProcess:
        """One more process; `overrides` win over the common settings."""
        service = ServiceProcess(
            name, self._redis_port, self._control_plane, **{**self._settings, **overrides}
        )
        self.started.append(service)
        return service.start()


@asynccontextmanager
async def meanwhile(coroutine: Coroutine[Any, Any, T]) -> AsyncIterator[asyncio.Task[T]]:
    """Runs beside the block; where a test fails, it ends while what it talks to is still there."""
    task = asyncio.create_task(coroutine)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# -- what has to add up ------------------------------------------------------------------------------------


async def figures_of(redis: Redis, service: str) -> StreamFigures:
    return await figures.read(Scripts(redis), STREAMS[service])


async def drained(redis: Redis, *services: str) -> bool:
    """Whether nothing waits and nothing is under way any more, in the streams of these services or of all."""
    for service in services or STREAMS:
        found = await figures_of(redis, service)
        if found.backlog or found.pending:
            return False
    return True


async def reckon(redis: Redis, produced: Iterable[Row], book: ControlPlaneBook) -> Reconciliation:
    """Compares what was produced with what arrived and what Redis holds."""
    holdings = await read_redis(redis, STREAMS.values())
    return reconcile(produced, book, holdings, await read_grants(redis, _NAMES.quota_response))


async def where_is(redis: Redis, service: str, entry_id: bytes) -> str:
    """Where one entry is: `settled`, `dead: <reason>`, `pending`, or `waiting` to be read."""
    stream = STREAMS[service]
    if not await redis.xrange(stream.name, entry_id, entry_id):
        return "settled"
    with suppress(ResponseError):  # there is no group before the first service has started
        if dead := await redis.xpending_range(stream.name, stream.dead_group, entry_id, entry_id, 1):
            return f"dead: {cast(bytes, dead[0]['consumer']).decode()}"
        if await redis.xpending_range(stream.name, stream.group, entry_id, entry_id, 1):
            return "pending"
    return "waiting"
