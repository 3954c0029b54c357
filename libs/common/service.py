"""Running a process: configuration, signals, the task group of named children, and the stop.

A service is a stream and its handler; all else is here, the same for the four.
Children never raise: what is fatal sets the stop flag, with its reason and the exit code (law 17).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version as installed_version
from random import Random

import msgspec
import uvloop
from redis.asyncio import Redis

from common import logs, redis_border
from common.config import Config, ConfigError, load
from common.consumer import Consumer
from common.control_plane import client
from common.control_plane.client import ControlPlaneClient
from common.control_plane.errors import ControlPlaneError
from common.delivery import Handler, Limits
from common.endpoints import Access, PortTaken, Server
from common.figures import StreamFigures
from common.health import health_routes, metrics_routes, port_of
from common.metrics import Metrics
from common.observer import Observer
from common.one_core import OneCore
from common.redis_border import Scripts
from common.redis_state import RedisState
from common.streams import Stream

CONTACT_EVERY = 5.0
"""Seconds between two attempts to hear from a ControlPlane of which nothing has been heard yet."""

STOPPED, FAILED, MISCONFIGURED, UNREACHABLE = 0, 1, 2, 3
"""Exit codes (contract section 9)."""


class Sender(msgspec.Struct, frozen=True):
    """The server fields of every body (contract section 3)."""

    server_instance_id: str
    api_server_region: str
    agent_version: str


class Service(msgspec.Struct):
    """What makes a service this one and no other."""

    stream: Stream
    handler: Handler
    response_stream: str | None = None
    children: dict[str, Callable[[], Awaitable[None]]] = {}
    on_figures: Callable[[StreamFigures], None] | None = None
    last_words: Callable[[float], Awaitable[None]] | None = (
        None  # after the drain; given what is left of it, seconds
    )
    services_status: Callable[[], Mapping[str, str]] | None = (
        None  # the registrar's /health speaks for all four
    )


class Running:
    """A process of one service while it runs: what its parts need, made once."""

    def __init__(self, name: str, config: Config) -> None:
        loop = asyncio.get_running_loop()
        self.name = name
        self.config = config
        self.version = installed_version("dataplane-agent")
        self.consumer_name = f"{name}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self.clock: Callable[[], float] = loop.time
        self.random = Random()
        self.stopping = asyncio.Event()
        self.stop_reason = ""
        self.exit_code = STOPPED
        self.log = logs.get("service")
        self._second = 0
        self._timestamp_from = 0.0  # the millisecond that it names, in Unix seconds
        self._to_the_second = self._timestamp = ""
        self.sender = Sender(config.server.id, config.server.region, self.version)
        self.metrics = Metrics(
            name, config.server.id, config.server.region, stream_name(name, config), self.version
        )
        self.redis: Redis = redis_border.connect(config.redis)
        self.scripts = Scripts(self.redis)
        self.redis_state = RedisState(
            self.redis,
            self.clock,
            lambda why: self.stop(f"Redis: {why}", UNREACHABLE),
            lambda yes: self.metrics.redis_connected.set(yes),
        )
        self.client: ControlPlaneClient = client.build(
            config.control_plane,
            config.server.id,
            self.version,
            clock=self.clock,
            random=self.random,
            logger=logs.get("control_plane"),
            observer=self.metrics,
        )
        self.gate = self.client.gate

    @property
    def redis_connected(self) -> bool:
        return self.redis_state.connected

    def timestamp(self) -> str:
        """Now, as the wire has it: RFC 3339, UTC, milliseconds."""
        now = time.time()
        if not self._timestamp_from <= now < self._timestamp_from + 0.001:  # under load ten records share one
            millisecond = int(now * 1000)
            self._timestamp_from = millisecond / 1000
            second, milliseconds = divmod(millisecond, 1000)
            if second != self._second:  # formatting a datetime costs ten times what the rest does
                self._second = second
                self._to_the_second = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
            self._timestamp = f"{self._to_the_second}.{milliseconds:03d}+00:00"
        return self._timestamp

    def stop(self, reason: str, exit_code: int = STOPPED) -> None:
        """Begins the stop; the first reason and the worst exit code are kept."""
        if not self.stopping.is_set():
            self.stop_reason = reason
            self.stopping.set()
        self.exit_code = max(self.exit_code, exit_code)


Build = Callable[[Running], Service]


def stream_name(service: str, config: Config) -> str:
    """The stream a service reads, as configured."""
    streams = config.streams
    return {
        "registrar": streams.commands,
        "usage_forwarder": streams.usage_records,
        "session_notifier": streams.session_lifecycle,
        "quota_refresher": streams.quota_refresh,
    }[service]


# -- the command line --------------------------------------------------------------------------------


def run(name: str, build: Build, argv: Sequence[str] | None = None) -> int:
    """The whole life of a process: returns its exit code."""
    parser = argparse.ArgumentParser(prog=name.replace("_", "-"), description=f"DataPlaneAgent: {name}.")
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML; repeatable, later files override (else $DATAPLANE_CONFIG)",
    )
    parser.add_argument(
        "--check-config", action="store_true", help="say every fault of the configuration, then exit"
    )
    parser.add_argument("--version", action="version", version=installed_version("dataplane-agent"))
    options = parser.parse_args(argv)
    try:
        config = load(options.config)
    except ConfigError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return MISCONFIGURED
    for warning in config.warnings if options.check_config else ():
        print(f"warning: {warning}", file=sys.stderr)  # noqa: T201
    return STOPPED if options.check_config else serve(name, build, config)


def serve(name: str, build: Build, config: Config) -> int:
    """Runs one service until it is told to stop; returns the exit code."""
    logs.setup(name, config.monitoring, config.server.id, version=installed_version("dataplane-agent"))
    for secret in config.secrets:
        logs.mask(secret)
    for warning in config.warnings:
        logs.get("config").warning("config.warning", text=warning)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_live(name, build, config))


# -- the life ----------------------------------------------------------------------------------------


async def _live(name: str, build: Build, config: Config) -> int:
    running = Running(name, config)
    service = build(running)
    consumer = _consumer(running, service)
    observer = Observer(running, service, consumer)
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, running.stop, signal.Signals(signum).name)
    try:
        servers = await _listen(running, service, observer)
    except PortTaken as taken:
        running.log.critical("service.port_taken", error=str(taken))
        return MISCONFIGURED
    children = {
        **consumer.children(),
        "observer": observer.run,
        "one_core": OneCore(running.clock).run,
        "contact": lambda: _contact(running),
        "probe": running.client.run_probe,
        **service.children,
    }
    async with asyncio.TaskGroup() as group:
        loop = group.create_task(_child(running, "consumer", consumer.run), name="consumer")
        tasks = [
            group.create_task(_child(running, child, run), name=child) for child, run in children.items()
        ]
        await running.stopping.wait()
        await _stop(running, service, consumer, observer, loop)
        await _end([loop, *tasks])
    for server in servers:
        await server.close()
    await running.redis.aclose()
    running.log.info("service.stopped", exit_code=running.exit_code)
    return running.exit_code


async def _stop(
    running: Running, service: Service, consumer: Consumer, observer: Observer, loop: asyncio.Task[None]
) -> None:
    """Stop reading → end what is in hand → say goodbye → close; all within `drain_seconds`."""
    until = running.clock() + running.config.shutdown.drain_seconds
    running.log.info("service.stopping", reason=running.stop_reason, in_hand=len(consumer.hand))
    consumer.stop()
    running.client.stop()
    await asyncio.wait([loop], timeout=max(0.1, (until - running.clock()) / 2))
    await consumer.drain(until - (1.0 if service.last_words else 0.2))
    if service.last_words is not None:
        await service.last_words(max(0.0, until - 0.2 - running.clock()))
    await observer.withdraw(until)
    await running.client.close(max(0.0, until - running.clock()))


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    """Cancels until all have ended: `asyncio.wait_for` of Python 3.11, inside redis-py, can swallow a cancellation."""
    while waiting := [task for task in tasks if not task.done()]:
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting, timeout=0.2)


async def _child(running: Running, name: str, run: Callable[[], Awaitable[None]]) -> None:
    try:
        await run()
    except Exception:  # fatal: the process stops in order, hands over, and exits with 1
        running.log.exception("child.failed", child=name)
        running.stop(f"{name} failed", FAILED)


async def _contact(running: Running) -> None:
    """Hears once from the ControlPlane before there is an entry to send, so that health tells the truth."""
    while not (running.gate.connected or running.stopping.is_set()):
        try:
            await running.client.public_keys()
        except ControlPlaneError as error:
            running.log.debug("control_plane.not_yet", error=str(error))
            await asyncio.sleep(CONTACT_EVERY)


async def _listen(running: Running, service: Service, observer: Observer) -> list[Server]:
    monitoring = running.config.monitoring
    access = Access(monitoring.metrics_auth.api_key, monitoring.metrics_auth.allow)
    health = health_routes(observer.state, access, services=service.services_status, clock=running.clock)
    servers = []
    for key, base, routes in (
        ("monitoring.health_check_port", monitoring.health_check_port, health),
        ("monitoring.metrics_port", monitoring.metrics_port, metrics_routes(running.metrics, access)),
    ):
        server = Server(monitoring.bind, port_of(base, running.name), routes, key=key)
        port = await server.start()
        servers.append(server)
        running.log.info("service.listening", key=key, port=port)
    return servers


def _consumer(running: Running, service: Service) -> Consumer:
    streams, control_plane = running.config.streams, running.config.control_plane
    limits = Limits(
        read_count=streams.read_count,
        max_in_flight=control_plane.max_in_flight,
        batch=service.handler.batch,
        visibility_timeout=streams.visibility_timeout,
        claim_interval=streams.claim_interval,
        max_deliveries=streams.max_deliveries,
        not_found_hold=control_plane.not_found_hold_seconds,
        doorbell=min(2.0, running.config.redis.socket_timeout / 2),
        dead_retention=None if streams.dead_retention_days is None else streams.dead_retention_days * 86400,
    )
    return Consumer(
        running.consumer_name,
        running.name,
        service.stream,
        service.handler,
        limits,
        scripts=running.scripts,
        gate=running.gate,
        redis_state=running.redis_state,
        tally=running.metrics,
        clock=running.clock,
        random=running.random,
        response_stream=service.response_stream,
    )
