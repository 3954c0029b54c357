"""The way between the processes and the one Redis: latency, loss, outage, and what happens to a call on its way.

A call that has left a process arrives, whether the process still lives or not. Its reply may be lost after it took
effect. A process can be killed by a trap at a script: before the call arrives, or after its effect and before the
reply. Blocking XREAD (the doorbell) waits here, since nothing waits in the server.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from importlib.resources import files
from random import Random
from typing import Any, Literal, Protocol

import redis.exceptions as errors
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from simulation.loop import Loop, Process
from simulation.redis_server import Reply, Server

SOCKET_TIMEOUT = 5.0

Moment = Literal["lost", "sent", "done"]
"""lost: the call never arrives; sent: it is on its way; done: it took effect, the reply is lost."""


class Watcher(Protocol):
    """Who looks on."""

    def sends(self, process: Process, name: str, command: tuple[Any, ...]) -> None: ...
    def before(self, process: Process, name: str, command: tuple[Any, ...]) -> None: ...
    def after(self, process: Process, name: str, command: tuple[Any, ...], reply: Reply) -> None: ...
    def trouble(self, process: Process, name: str, error: Exception) -> None: ...
    def note(self, what: str, **facts: object) -> None: ...


class Trap:
    """Springs at the next call of a script by any process (or by one): kills it, or only loses the reply."""

    def __init__(self, script: str, moment: Moment, slot: int | None, kills: bool) -> None:
        self.script = script
        self.moment = moment
        self.slot = slot
        self.kills = kills


class Network:
    """One Redis, seen from many processes."""

    def __init__(self, loop: Loop, random: Random, server: Server, watcher: Watcher, latency: float) -> None:
        self.server = server
        self.traps: list[Trap] = []
        self.lossy = 0.0  # share of calls whose request or reply is lost
        self.watcher = watcher
        self._loop = loop
        self._random = random
        self._latency = latency
        self._down = False
        self._stalled_until = 0.0
        self._connections = 0  # all of them are cut when this changes
        self._waiting: dict[asyncio.Future[Reply], tuple[Process, tuple[Any, ...]]] = {}
        self._names = {_sha(path.read_bytes()): path.name.removesuffix(".lua") for path in _scripts()}

    # -- faults --------------------------------------------------------------------------------------

    def go_down(self) -> None:
        """Redis is away; every connection is cut."""
        self._down = True
        self.cut_all()

    def come_back(self) -> None:
        self._down = False

    def cut_all(self) -> None:
        """CLIENT KILL: what is under way has taken effect or not; nobody hears."""
        self._connections += 1
        for future, (process, command) in list(self._waiting.items()):
            self._refuse(process, command[0], future, errors.ConnectionError("Connection closed by server."))
        self._waiting.clear()

    def stall(self, seconds: float) -> None:
        """SIGSTOP of the server: calls wait, and take effect when it goes on, whoever has given up meanwhile."""
        self._stalled_until = self._loop.time() + seconds

    # -- a call --------------------------------------------------------------------------------------

    async def call(self, process: Process, command: tuple[Any, ...]) -> Reply:
        """One command of that process; raises what redis-py would."""
        future: asyncio.Future[Reply] = self._loop.create_future()
        if process.alive:
            name = self._names.get(_text(command[1]), "?") if command[0] == "EVALSHA" else str(command[0])
            self.watcher.sends(process, name, command)
            self._send(process, name, command, future)
        return await future

    def _send(
        self, process: Process, name: str, command: tuple[Any, ...], future: asyncio.Future[Reply]
    ) -> None:
        loop = self._loop
        if self._down:
            self._refuse(process, name, future, errors.ConnectionError("Error 111 connecting to redis."))
            return
        moment = self._sprung(process, name)
        if moment == "lost" or (self.lossy and self._random.random() < self.lossy / 2):
            self._refuse(process, name, future, errors.ConnectionError("Connection reset by peer"))
            return
        loop.in_world(
            self._delay(), self._arrive, process, name, command, future, self._connections, moment == "done"
        )

    def _sprung(self, process: Process, name: str) -> Moment | None:
        for trap in self.traps:
            if trap.script == name and trap.slot in (None, getattr(process, "slot", None)):
                self.traps.remove(trap)
                self.watcher.note("trap", script=name, moment=trap.moment, process=process, kills=trap.kills)
                if trap.kills:
                    if trap.moment == "done":
                        process.dies_at_reply = True  # type: ignore[attr-defined]
                    else:
                        process.kill()
                return trap.moment
        return None

    def _arrive(
        self,
        process: Process,
        name: str,
        command: tuple[Any, ...],
        future: asyncio.Future[Reply],
        connection: int,
        reply_lost: bool,
    ) -> None:
        if self._down or connection != self._connections:
            self._refuse(process, name, future, errors.ConnectionError("Connection closed by server."))
            return
        wait = self._stalled_until - self._loop.time()
        if wait > 0:
            if wait > SOCKET_TIMEOUT:
                timeout = errors.TimeoutError("Timeout reading from socket")
                self._loop.in_world(SOCKET_TIMEOUT, self._refuse_now, process, name, future, timeout)
            later = wait + self._delay()
            self._loop.in_world(later, self._arrive, process, name, command, future, connection, reply_lost)
            self.watcher.trouble(process, name, errors.TimeoutError("the server stalls"))
            return
        block, plain = _blocking(command)
        if block is None:
            self.watcher.before(process, name, command)
        try:
            reply = self.server.execute(*plain)
        except errors.RedisError as error:
            reply = error
        if block is not None and not reply:
            self._waiting[future] = (process, command)
            self._loop.in_world(block, self._answer, process, name, future, None, connection)
            return
        if block is None:
            self.watcher.after(process, name, command, reply)
        if reply_lost and getattr(process, "dies_at_reply", False):
            process.kill()
        if reply_lost or (self.lossy and self._random.random() < self.lossy / 2):
            self._refuse(process, name, future, errors.ConnectionError("Connection reset by peer"))
            return
        self._loop.in_world(self._delay(), self._answer, process, name, future, reply, connection)

    def added(self) -> None:
        """Something was added: whoever waits at the doorbell looks again."""
        for future, (process, command) in list(self._waiting.items()):
            reply = self.server.execute(*_blocking(command)[1])
            if reply:
                del self._waiting[future]
                self._loop.in_world(
                    self._delay(), self._answer, process, "XREAD", future, reply, self._connections
                )

    def _answer(
        self, process: Process, name: str, future: asyncio.Future[Reply], reply: Reply, connection: int
    ) -> None:
        self._waiting.pop(future, None)
        if future.done() or not process.alive:
            return
        if connection != self._connections:
            self._refuse_now(process, name, future, errors.ConnectionError("Connection closed by server."))
        elif isinstance(reply, Exception):
            future.set_exception(reply)
        else:
            future.set_result(reply)

    def _refuse(self, process: Process, name: str, future: asyncio.Future[Reply], error: Exception) -> None:
        self._loop.in_world(self._delay(), self._refuse_now, process, name, future, error)

    def _refuse_now(
        self, process: Process, name: str, future: asyncio.Future[Reply], error: Exception
    ) -> None:
        if not future.done() and process.alive:
            self.watcher.trouble(process, name, error)
            future.set_exception(error)

    def _delay(self) -> float:
        """Usually about the latency, now and then ten times as much."""
        drawn = self._random.random()
        return self._latency * (0.2 + drawn) * (10 if drawn > 0.97 else 1)


class Line(Redis):
    """redis-py's client of one process: its commands and its parsing, over the simulated network."""

    def __init__(self, network: Network, process: Process) -> None:
        super().__init__(protocol=2, retry=Retry(NoBackoff(), 0))
        self._network = network
        self._process = process

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        reply = await self._network.call(self._process, args)
        parse: Callable[..., Any] | None = self.response_callbacks.get(args[0])
        return reply if parse is None else parse(reply, **options)


def _blocking(command: tuple[Any, ...]) -> tuple[float | None, tuple[Any, ...]]:
    """For how many seconds the command blocks, and the command without that."""
    words = [word.upper() if isinstance(word, bytes | str) else word for word in command[:6]]
    for blocks in (b"BLOCK", "BLOCK"):
        if words[0] == "XREAD" and blocks in words:
            at = words.index(blocks)
            return int(command[at + 1]) / 1000, command[:at] + command[at + 2 :]
    return None, command


def _text(word: Any) -> str:
    return word.decode() if isinstance(word, bytes) else str(word)


def _sha(script: bytes) -> str:
    return hashlib.sha1(script).hexdigest()


def _scripts() -> list[Any]:
    return [path for path in files("common.scripts").iterdir() if path.name.endswith(".lua")]
