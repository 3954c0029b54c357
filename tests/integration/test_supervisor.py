"""`dataplane run` as a process with its children: who is started, who comes back, who stops last."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from common import presence
from common.presence import Presence
from dataplane_agent.memory import total_pss_mb
from dataplane_agent.supervisor import SERVICES
from sandbox.control_plane import ControlPlane
from tests.support import RedisServer, connect, eventually, free_port

SERVER = "supervised"


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer("valkey", tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    client = connect(redis_server.port)
    yield client
    await client.aclose()


class Run:
    """One `dataplane run`: its process, its log, its children."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path, redis: Redis) -> None:
        self.process = process
        self._log = log
        self._redis = redis

    def events(self, name: str, **facts: object) -> list[dict[str, Any]]:
        """The log's lines of that name that say so."""
        lines = [json.loads(line) for line in self._log.read_bytes().splitlines() if line.startswith(b"{")]
        return [line for line in lines if line["event"] == name and facts.items() <= line.items()]

    async def processes(self) -> list[Presence]:
        return await presence.read(self._redis, SERVER, time.time())

    async def ready(self, *names: str) -> dict[str, int]:
        """Waits until each of these is ready (a name twice: two of them); the pid of each service's last."""

        def all_ready() -> bool:
            return sorted(e["service"] for e in self.events("service.ready")) == sorted(names)

        await eventually(all_ready)
        return {event["name"]: event["pid"] for event in self.events("process.started")}

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return await asyncio.wait_for(self.process.wait(), 15)


Start = Callable[..., Awaitable[Run]]


@pytest.fixture
async def start(
    control_plane: ControlPlane, redis_server: RedisServer, redis: Redis, tmp_path: Path
) -> AsyncIterator[Start]:
    """`await start("--replicas", "usage_forwarder=2", health_check_port=0)`; what is left is killed at the end."""
    started: list[Run] = []

    async def start(*tokens: str, **monitoring: object) -> Run:
        config = {
            "server": {"id": SERVER, "ip_address": "127.0.0.1"},
            "redis": {"host": redis_server.host, "port": redis_server.port},
            "control_plane": {
                "base_url": control_plane.url,
                "ca_file": str(control_plane.ca_file),
                "api_key": control_plane.api_key,
            },
            "monitoring": {"bind": "127.0.0.1", "metrics_port": 0, "health_check_port": 0, **monitoring},
        }
        file, log = tmp_path / "run.yaml", tmp_path / "run.log"
        file.write_text(json.dumps(config))
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "dataplane_agent", "run", "--config", str(file), *tokens),
                stdout=output,
                stderr=output,
            )
        run = Run(process, log, redis)
        started.append(run)
        return run

    yield start
    for run in started:
        for event in run.events("process.started"):
            if is_alive(event["pid"]):
                os.kill(event["pid"], signal.SIGKILL)
        if run.process.returncode is None:
            run.process.kill()
            await run.process.wait()


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


async def test_the_four_run_share_their_memory_and_stop_with_the_registrar_last(
    start: Start, control_plane: ControlPlane
) -> None:
    run = await start()
    pids = await run.ready(*SERVICES)
    assert total_pss_mb(pids.values()) < 128
    assert all(event["seconds"] < 1 for event in run.events("service.ready"))
    await eventually(lambda: control_plane.requests["register"])
    assert await run.stop() == 0
    stopped = [event["name"] for event in run.events("process.stopped")]
    assert sorted(stopped) == sorted(SERVICES)
    assert stopped[-1] == "registrar"
    assert control_plane.requests["shutdown"] == 1
    assert not any(map(is_alive, pids.values()))


async def test_ctrl_c_is_a_graceful_stop_too(start: Start) -> None:
    run = await start("usage_forwarder")
    await run.ready("usage_forwarder")
    assert await run.stop(signal.SIGINT) == 0


async def test_a_killed_service_comes_back_and_its_neighbours_stay(start: Start) -> None:
    run = await start("usage_forwarder", "quota_refresher")
    before = await run.ready("usage_forwarder", "quota_refresher")
    os.kill(before["usage_forwarder"], signal.SIGKILL)
    after = await run.ready("usage_forwarder", "quota_refresher", "usage_forwarder")
    assert after["usage_forwarder"] != before["usage_forwarder"]
    assert after["quota_refresher"] == before["quota_refresher"]
    [died] = run.events("process.died")
    assert (died["name"], died["exit_code"], died["restart_after_seconds"]) == ("usage_forwarder", -9, 1.0)
    assert await run.stop() == 0


async def test_a_service_that_cannot_be_configured_stops_everything_with_2(start: Start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = await start(
            "registrar", "usage_forwarder", health_check_port=port
        )  # the registrar's, with k = 0
        assert await asyncio.wait_for(run.process.wait(), 15) == 2
    assert [event["name"] for event in run.events("process.misconfigured")] == ["registrar"]
    assert run.events("service.port_taken")
    assert not any(is_alive(event["pid"]) for event in run.events("process.started"))


async def test_the_second_process_of_a_service_listens_on_a_free_port(start: Start) -> None:
    port = free_port()
    run = await start("usage_forwarder", "--replicas", "usage_forwarder=2", health_check_port=port - 1)
    await run.ready("usage_forwarder", "usage_forwarder")
    ports = [event["port"] for event in run.events("service.listening", key="monitoring.health_check_port")]
    assert port in ports  # k = 1 for the forwarder
    assert len(set(ports)) == 2
    assert {process.service for process in await run.processes()} == {"usage_forwarder"}
    assert await run.stop() == 0


async def test_a_child_that_does_not_stop_in_time_is_killed(start: Start) -> None:
    run = await start("usage_forwarder")
    pids = await run.ready("usage_forwarder")
    os.kill(pids["usage_forwarder"], signal.SIGSTOP)  # it sees no signal until it is continued
    for asked in (1, 2):
        run.process.send_signal(signal.SIGTERM)
        await eventually(lambda: run.events("supervisor.stopping", signals=asked))  # noqa: B023 it is awaited
    assert await run.stop() == 1  # the third: nobody waits any longer
    assert run.events("process.killed")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
async def test_no_service_outlives_its_supervisor(start: Start) -> None:
    run = await start("registrar", "usage_forwarder")
    pids = await run.ready("registrar", "usage_forwarder")
    run.process.kill()
    await eventually(lambda: not any(map(is_alive, pids.values())))
