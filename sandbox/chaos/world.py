"""What runs in a chaos run, and how a fault gets at it.

Redis that fsyncs every write, the ControlPlane over TLS as a process of its own, two replicas of each stream
service, the registrar, AudioAPIServers on all streams. Everything lies in one directory and is gone at the end.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any, Self

import aiohttp
import msgspec
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff
from redis.exceptions import RedisError

from common import figures
from common.config import Streams
from common.figures import StreamFigures
from common.redis_border import RedisFault, Scripts
from common.streams import Stream
from sandbox.chaos.redis_server import HOST, Kind, RedisServer, build_witness, connect, free_port
from sandbox.chaos.removals import Removals
from sandbox.chaos.replica import Replica
from sandbox.chaos.traffic import AudioAPIServers, GrantBook, Operator
from sandbox.process import ControlPlaneProcess

VISIBILITY = 2.0
CLAIM_EVERY = 0.5
DRAIN = 6.0
NOT_FOUND_HOLD = 10.0
MAX_DELIVERIES = 3
SERVER_ID = "chaos-1"
PATIENCE = 15.0
"""Seconds in which the ControlPlane can be told what to do, killed and started again as it may be."""

NAME = "control-plane.test"
"""The ControlPlane's host name, which only the services' own /etc/hosts knows."""

NAMES = Streams()
STREAMS = {
    "usage_forwarder": Stream(NAMES.usage_records, "usage_forwarder"),
    "session_notifier": Stream(NAMES.session_lifecycle, "session_notifier"),
    "quota_refresher": Stream(NAMES.quota_refresh, "quota_refresher"),
    "registrar": Stream(NAMES.commands, "registrar"),
}
PRODUCED = tuple(STREAMS)[:3]
"""The services whose streams AudioAPIServers write."""

REPLICAS = {"usage_forwarder": 2, "session_notifier": 2, "quota_refresher": 2, "registrar": 1}

NOISE: Sequence[dict[str, Any]] = (
    {"kind": "latency", "seconds": 0.01},
    {"kind": "drop_before", "share": 0.005},
    {"kind": "drop_after", "share": 0.005},
    {"kind": "status", "status": 503, "share": 0.01},
)
"""What the ControlPlane does wrong all along."""

_IN_OWN_HOSTS = (
    'mount --bind "$0/hosts" /etc/hosts && mount --bind "$0/resolv.conf" /etc/resolv.conf && exec "$@"'
)


class World:
    """Everything that runs, while the block lasts."""

    redis: RedisServer
    control_plane: ControlPlaneProcess
    traffic: AudioAPIServers
    grants: GrantBook
    operator: Operator

    def __init__(self, directory: Path, kind: Kind, rate: float, seed: int) -> None:
        self.directory, self.kind = directory, kind
        self.removals = Removals()
        self.replicas: list[Replica] = []
        self.died: list[str] = []
        """Processes that ended by themselves."""
        self.redriven: set[str] = set()
        """Sessions of which an event died by a fault and was brought back: their order is broken by that."""
        self.poisoned: set[str] = set()
        self.rate, self.names = rate, NAMES
        self.spare_port = free_port()
        self._seed = seed
        self._servers = 0
        self._rules: list[Sequence[dict[str, Any]]] = []
        self._poll: Redis | None = None
        self._key_file = directory / "api-key"
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self.witness = build_witness(self.directory)
            self.own_hosts = self._try_own_hosts()
            self.redis = self.new_redis()
            stack.callback(lambda: self.redis.kill())
            await self.redis.start()
            names = ["--name", NAME] if self.own_hosts else []
            self.control_plane = await stack.enter_async_context(
                ControlPlaneProcess(db=self.book_file, arguments=names)
            )
            await self._put_rules()
            self._key_file.touch(0o600)
            self._key_file.write_text(self.control_plane.api_key)
            stack.callback(self._kill_replicas)
            (self.directory / "logs").mkdir()
            for service, number in REPLICAS.items():
                for n in range(1, number + 1):
                    replica = Replica(service, n, self.directory / "logs", self._environ(), self._prefix())
                    self.replicas.append(replica)
                    replica.start()
            watch = asyncio.create_task(self._watch())
            stack.callback(watch.cancel)
            self.traffic = AudioAPIServers(
                self.redis.port, self.directory / "produced.jsonl", self.rate, self._seed
            )
            self.grants = GrantBook(self.redis.port, NAMES.quota_response)
            self.operator = Operator(self.control_plane, SERVER_ID, self._seed)
            await self.until(self.all_ready, 30)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._poll is not None:
            await self._poll.aclose()
        await self._stack.aclose()

    @property
    def book_file(self) -> Path:
        """The ControlPlane's book."""
        return self.directory / "ledger.sqlite"

    # -- the services ----------------------------------------------------------------------------------

    def _environ(self) -> dict[str, str]:
        settings = {
            "SERVER__ID": SERVER_ID,
            "REDIS__HOST": HOST,
            "REDIS__PORT": self.redis.port,
            "REDIS__SOCKET_TIMEOUT": 3,
            "CONTROL_PLANE__BASE_URL": f"https://{NAME if self.own_hosts else HOST}:{self.control_plane.port}",
            "CONTROL_PLANE__API_KEY_FILE": self._key_file,
            "CONTROL_PLANE__CA_FILE": self.control_plane.ca_file,
            "CONTROL_PLANE__TIMEOUT": 3,
            "CONTROL_PLANE__NOT_FOUND_HOLD_SECONDS": NOT_FOUND_HOLD,
            "STREAMS__VISIBILITY_TIMEOUT": VISIBILITY,
            "STREAMS__CLAIM_INTERVAL": CLAIM_EVERY,
            "STREAMS__MAX_DELIVERIES": MAX_DELIVERIES,
            "MONITORING__BIND": HOST,
            "MONITORING__METRICS_PORT": 0,
            "MONITORING__HEALTH_CHECK_PORT": 0,
            "MONITORING__HEARTBEAT_INTERVAL": 2,
            "MONITORING__COMMAND_POLL_INTERVAL": 1,
            "SHUTDOWN__DRAIN_SECONDS": DRAIN,
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith("DATAPLANE_")}
        return kept | {f"DATAPLANE_{key}": str(value) for key, value in settings.items()}

    def _try_own_hosts(self) -> bool:
        """Can a process here have an /etc/hosts of its own? Then a name can go without harm to anybody else."""
        self.keep_name(True)
        (self.directory / "resolv.conf").write_text(f"nameserver {HOST}\noptions timeout:1 attempts:1\n")
        try:
            command = [*self._own_hosts_prefix(), "true"]
            return subprocess.run(command, capture_output=True, check=False, timeout=10).returncode == 0
        except OSError:
            return False

    def _own_hosts_prefix(self) -> list[str]:
        return ["unshare", "--mount", "sh", "-c", _IN_OWN_HOSTS, str(self.directory)]

    def _prefix(self) -> list[str]:
        return self._own_hosts_prefix() if self.own_hosts else []

    def keep_name(self, known: bool) -> None:
        """Lets the services know the ControlPlane's name, or not."""
        hosts = f"{HOST} localhost\n" + (f"{HOST} {NAME}\n" if known else "")
        (self.directory / "hosts").write_text(hosts)

    def write_key(self, api_key: str) -> None:
        """The services' key file."""
        self._key_file.write_text(api_key)

    def of(self, service: str) -> list[Replica]:
        return [replica for replica in self.replicas if replica.service == service]

    def choose(self, random: Random, *services: str) -> Replica:
        """One replica that no fault is busy with."""
        names = services or tuple(REPLICAS)
        service = random.choice(names)
        free = [replica for replica in self.of(service) if not replica.busy]
        return random.choice(free or self.of(service))

    def all_ready(self) -> bool:
        return all(replica.ready for replica in self.replicas)

    def _kill_replicas(self) -> None:
        for replica in self.replicas:
            replica.busy = True
            replica.kill()

    async def _watch(self) -> None:
        """A process that ends without a fault having asked for it is noted, and started again."""
        while True:
            for replica in self.replicas:
                if not replica.busy and not replica.running:
                    self.died.append(f"{replica.name} ended by itself, exit code {replica.exit_code}")
                    replica.start()
            await asyncio.sleep(0.1)

    async def stop_services(self) -> list[str]:
        """The graceful end of all; names those whose exit code is not 0."""
        for replica in self.replicas:
            replica.busy = True
        codes = await asyncio.gather(*(replica.stop() for replica in self.replicas))
        return [
            f"{replica.name} stopped with exit code {code}"
            for replica, code in zip(self.replicas, codes, strict=True)
            if code != 0
        ]

    # -- Redis -----------------------------------------------------------------------------------------

    def new_redis(self) -> RedisServer:
        """A server that is not started yet, in a directory of its own."""
        self._servers += 1
        return RedisServer(self.kind, self.directory / f"redis-{self._servers}", self.witness, free_port())

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Redis]:
        """A connection of one's own to the Redis of the moment."""
        async with connect(self.redis.port, socket_timeout=10.0) as redis:
            yield redis

    async def figures(self) -> dict[str, StreamFigures] | None:
        """Every stream's figures, or None while Redis does not answer."""
        if self._poll is None:
            # Only reads: here, asking again is harmless.
            self._poll = Redis(
                host=HOST,
                port=self.redis.port,
                protocol=2,
                socket_timeout=2.0,
                retry=Retry(ConstantBackoff(0.01), 2),
            )
        scripts = Scripts(self._poll)
        try:
            return {service: await figures.read(scripts, stream) for service, stream in STREAMS.items()}
        except (RedisFault, RedisError, OSError):
            return None

    # -- the ControlPlane ------------------------------------------------------------------------------

    @asynccontextmanager
    async def faulty(self, *rules: dict[str, Any]) -> AsyncIterator[None]:
        """These rules are in force within the block, beside the noise and those of other blocks."""
        self._rules.append(rules)
        try:
            await self._put_rules()
            yield
        finally:
            self._rules.remove(rules)
            await self._put_rules()

    async def _put_rules(self) -> None:
        """Puts what holds now in force, also while another fault kills the ControlPlane and starts it again."""
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    return await self.control_plane.put_faults([*NOISE, *chain.from_iterable(self._rules)])
                except aiohttp.ClientConnectionError:
                    await asyncio.sleep(0.1)

    # -- waiting ---------------------------------------------------------------------------------------

    async def until(self, reached: Callable[[], bool], within: float) -> bool:
        """Whether it was reached in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within):
                while not reached():
                    await asyncio.sleep(0.05)
        return reached()

    def keep(self, name: str, content: Any) -> None:
        """A file in the run's directory."""
        (self.directory / name).write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2))
