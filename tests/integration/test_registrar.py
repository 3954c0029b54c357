"""Laws of the registrar as a process, with a real Redis and a ControlPlane over TLS."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from common.streams import PUBLIC_KEYS, presence_key, registrar_turn_key
from sandbox.control_plane import ControlPlane
from sandbox.keys import FORGERIES, Command
from tests.support import RedisServer, eventually

SERVER = "api-server-001"
VISIBILITY = 1.0

Start = Callable[..., "Registrar"]

pytestmark = pytest.mark.parametrize("redis_process", ["valkey"], indirect=True)


class Registrar:
    """One `python -m registrar`, its log in a file."""

    def __init__(self, log: Path, environ: dict[str, str]) -> None:
        self._log = log
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("DATAPLANE_")}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "registrar"], env=inherited | environ, stdout=output, stderr=output
            )

    def port(self, key: str) -> int:
        """The free port that a listener has found."""
        (port,) = [line["port"] for line in self.lines("service.listening") if line["key"].endswith(key)]
        return int(port)

    def lines(self, event: str | None = None) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")]
        return [line for line in found if event in (None, line["event"])]

    async def stop(self, within: float = 10) -> int:
        """The orderly end; the ControlPlane in this process goes on answering meanwhile."""
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(self.process.wait, within)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


@pytest.fixture
def start(redis_server: RedisServer, control_plane: ControlPlane, tmp_path: Path) -> Iterator[Start]:
    """Starts registrars of one server; all are gone at the end."""
    started: list[Registrar] = []
    environ = {
        "DATAPLANE_SERVER__ID": SERVER,
        "DATAPLANE_REDIS__HOST": "127.0.0.1",
        "DATAPLANE_REDIS__PORT": str(redis_server.port),
        "DATAPLANE_CONTROL_PLANE__BASE_URL": control_plane.url,
        "DATAPLANE_CONTROL_PLANE__API_KEY": control_plane.api_key,
        "DATAPLANE_CONTROL_PLANE__CA_FILE": str(control_plane.ca_file),
        "DATAPLANE_CONTROL_PLANE__TIMEOUT": "2",
        "DATAPLANE_STREAMS__VISIBILITY_TIMEOUT": str(VISIBILITY),
        "DATAPLANE_STREAMS__CLAIM_INTERVAL": "0.2",
        "DATAPLANE_MONITORING__HEARTBEAT_INTERVAL": "0.2",
        "DATAPLANE_MONITORING__COMMAND_POLL_INTERVAL": "0.2",
        "DATAPLANE_MONITORING__BIND": "127.0.0.1",
        "DATAPLANE_MONITORING__METRICS_PORT": "0",
        "DATAPLANE_MONITORING__HEALTH_CHECK_PORT": "0",
    }

    def start(**changes: str) -> Registrar:
        registrar = Registrar(tmp_path / f"registrar-{len(started)}.log", environ | changes)
        started.append(registrar)
        return registrar

    yield start
    for registrar in started:
        registrar.kill()


def server(control_plane: ControlPlane) -> dict[str, Any]:
    (found,) = [one for one in control_plane.ledger.servers() if one["server_id"] == SERVER] or [{}]
    return found


def results(control_plane: ControlPlane) -> dict[str, list[dict[str, Any]]]:
    return {
        command["command_id"]: [result["body"] for result in command["results"]]
        for command in control_plane.ledger.commands()
    }


async def beating(control_plane: ControlPlane, beats: int = 1) -> None:
    await control_plane.until(lambda: server(control_plane).get("heartbeats", 0) >= beats)


async def test_it_registers_beats_publishes_the_keys_and_says_goodbye(
    start: Start, control_plane: ControlPlane, redis: Redis
) -> None:
    registrar = start()
    await beating(control_plane, 2)
    await eventually(lambda: redis.exists(PUBLIC_KEYS))
    known = server(control_plane)
    assert known["registrations"] == 1
    assert known["registration"]["ip_address"] == "127.0.0.1"
    assert known["status"] == "degraded"  # the other three services are missing
    assert set(known["metrics"]) == {
        "usage_records_processed",
        "control_plane_requests",
        "redis_queue_depth",
        "failed_deliveries",
        "memory_usage_mb",
        "cpu_usage_percent",
    }
    assert await registrar.stop() == 0
    assert (server(control_plane)["status"], server(control_plane)["shutdown_reason"]) == (
        "offline",
        "graceful stop",
    )
    assert not await redis.exists(registrar_turn_key(SERVER))
    assert not await redis.hlen(presence_key(SERVER))


async def test_its_health_speaks_for_all_four(start: Start, control_plane: ControlPlane) -> None:
    registrar = start()
    await beating(control_plane)
    async with httpx.AsyncClient() as client:
        answer = await client.get(f"http://127.0.0.1:{registrar.port('health_check_port')}/health")
        metrics = await client.get(f"http://127.0.0.1:{registrar.port('metrics_port')}/metrics")
    assert answer.status_code == 200
    assert answer.json()["status"] == "degraded"
    assert answer.json()["services"] == {
        "registrar": "healthy",
        "usage_forwarder": "missing",
        "session_notifier": "missing",
        "quota_refresher": "missing",
    }
    assert re.search(r"^dataplane_registered\{.*\} 1\.0$", metrics.text, re.MULTILINE)


async def test_a_command_comes_back_with_its_result_and_every_forgery_is_refused(
    start: Start, control_plane: ControlPlane, redis: Redis
) -> None:
    for kind in ("refresh_public_keys", "health_check", "get_metrics"):
        for algorithm in ("ES256", "EdDSA", "RS256"):
            control_plane.enqueue(
                Command(SERVER, kind, algorithm=algorithm, command_id=f"{kind}-{algorithm}")
            )
    for forge in FORGERIES:
        control_plane.enqueue(Command(SERVER, "health_check", forge=forge, command_id=f"forged-{forge}"))
    registrar = start()
    await control_plane.until(lambda: all(results(control_plane).values()))
    await eventually(lambda: _empty(redis))
    got = results(control_plane)
    assert all(len(found) == 1 for found in got.values())
    assert {name for name, (result,) in got.items() if not result["success"]} == {
        f"forged-{f}" for f in FORGERIES
    }
    health = got["health_check-ES256"][0]["result"]
    assert health["services"]["usage_forwarder"] == "missing"
    metrics = got["get_metrics-RS256"][0]["result"]
    assert "usage_records_processed" in metrics["metrics"]
    assert set(metrics["streams"]) == {
        "queue:usage_records",
        "queue:session_lifecycle",
        "queue:quota_refresh",
        "queue:commands",
    }
    refused = [line for line in registrar.lines("command.refused") if line["logger"] == "audit"]
    assert len(refused) == len(FORGERIES)


async def _empty(redis: Redis) -> bool:
    return await redis.xlen("queue:commands") == 0


async def test_a_command_is_believed_after_the_keys_were_rotated(
    start: Start, control_plane: ControlPlane, redis: Redis
) -> None:
    start()
    await eventually(lambda: redis.exists(PUBLIC_KEYS))
    control_plane.keyring.rotate()
    control_plane.enqueue(Command(SERVER, "health_check", command_id="rotated"))
    await control_plane.until(lambda: bool(results(control_plane)["rotated"]))
    assert results(control_plane)["rotated"][0]["success"]


async def test_a_server_that_was_forgotten_registers_again(start: Start, control_plane: ControlPlane) -> None:
    start()
    await beating(control_plane)
    control_plane.ledger.forget_server(SERVER)
    await beating(control_plane)
    assert server(control_plane)["registrations"] == 1
    assert control_plane.requests["register"] == 2


def told_of_calls(registrar: Registrar) -> list[str]:
    """What the log says of calls that fail and succeed again."""
    ends = (".failing", ".recovered", ".unreachable")
    return [line["event"] for line in registrar.lines() if line["event"].endswith(ends)]


async def test_a_control_plane_that_is_away_at_the_start_is_waited_for(
    start: Start, control_plane: ControlPlane
) -> None:
    outage = control_plane.outage()
    registrar = start()
    await eventually(lambda: registrar.lines("control_plane.unreachable"))
    control_plane.clear_faults()
    await outage
    await beating(control_plane)
    assert told_of_calls(registrar) == ["control_plane.unreachable", "control_plane.recovered"]


async def test_an_outage_of_all_calls_is_two_lines(start: Start, control_plane: ControlPlane) -> None:
    registrar = start()
    await beating(control_plane)
    outage = control_plane.outage()
    await eventually(lambda: registrar.lines("control_plane.unreachable"))
    control_plane.clear_faults()
    await outage
    await eventually(lambda: registrar.lines("control_plane.recovered"))
    await control_plane.until_arrived(control_plane.requests["heartbeat"] + 2, "heartbeat")
    assert told_of_calls(registrar) == ["control_plane.unreachable", "control_plane.recovered"]


async def test_a_call_that_alone_is_not_answered_is_told_of(
    start: Start, control_plane: ControlPlane
) -> None:
    control_plane.fault("status", "heartbeat", status=503)
    registrar = start()
    await eventually(lambda: registrar.lines("heartbeat.failing"))
    control_plane.clear_faults()
    await eventually(lambda: registrar.lines("heartbeat.recovered"))
    assert told_of_calls(registrar) == ["heartbeat.failing", "heartbeat.recovered"]


async def test_a_fault_of_one_call_holds_up_no_other_and_logs_two_lines(
    start: Start, control_plane: ControlPlane
) -> None:
    control_plane.fault("status", "heartbeat", status=501)
    control_plane.enqueue(Command(SERVER, "health_check", command_id="meanwhile"))
    registrar = start()
    await control_plane.until(lambda: bool(results(control_plane)["meanwhile"]))
    await control_plane.until_arrived(3, "heartbeat")
    control_plane.clear_faults()
    await eventually(lambda: registrar.lines("heartbeat.recovered"))
    assert len(registrar.lines("heartbeat.failing")) == 1
    assert not registrar.lines("commands.failing")


async def test_a_killed_registrar_reports_after_its_restart_what_it_had_run(
    start: Start, control_plane: ControlPlane, redis: Redis
) -> None:
    control_plane.fault("hang", "command_results")
    control_plane.enqueue(Command(SERVER, "health_check", command_id="cmd"))
    registrar = start()
    await control_plane.until_arrived(1, "command_results")
    stored = await redis.get("dataplane:api-server-001:command:cmd")
    registrar.kill()
    control_plane.clear_faults()
    start()
    await control_plane.until(lambda: bool(results(control_plane)["cmd"]), timeout=15)
    assert results(control_plane)["cmd"] == [json.loads(stored)["report"]]


async def test_of_two_registrars_one_acts_and_the_other_takes_over_without_registering_again(
    start: Start, control_plane: ControlPlane, redis: Redis
) -> None:
    acting = start()
    await beating(control_plane)
    standby = start()
    await eventually(lambda: standby.lines("service.ready"))
    holder = await redis.get(registrar_turn_key(SERVER))
    beats = server(control_plane)["heartbeats"]
    await beating(control_plane, beats + 13)  # it has stood by for longer than a dead one's turn lasts
    assert await redis.get(registrar_turn_key(SERVER)) == holder
    acting.kill()
    await eventually(lambda: standby.lines("registration.taken_over"))
    await beating(control_plane, server(control_plane)["heartbeats"] + 1)
    assert control_plane.requests["register"] == 1


async def test_a_shutdown_notice_that_gets_no_answer_does_not_outlast_the_drain(
    start: Start, control_plane: ControlPlane
) -> None:
    registrar = start(DATAPLANE_SHUTDOWN__DRAIN_SECONDS="2", DATAPLANE_CONTROL_PLANE__TIMEOUT="30")
    await beating(control_plane)
    control_plane.fault("hang", "shutdown")
    assert await registrar.stop(within=4) == 0
    assert registrar.lines("shutdown.unannounced")
