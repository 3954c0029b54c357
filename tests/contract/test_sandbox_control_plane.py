"""The sandbox's ControlPlane over real sockets: what the other tests believe it to be."""

from __future__ import annotations

import asyncio
import random
import re
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from joserfc import jwt
from joserfc.jwk import KeySet

from sandbox.control_plane import ControlPlane, Settings
from sandbox.keys import FORGERIES, Command
from sandbox.ledger import Verdict, credits_of
from sandbox.process import ControlPlaneProcess

SERVER_FIELDS = {"server_instance_id": "api-1", "api_server_region": "us-east-1", "agent_version": "0.1.0"}
INSTANT = "2026-01-01T00:00:00Z"
METRICS = (
    "usage_records_processed",
    "control_plane_requests",
    "redis_queue_depth",
    "failed_deliveries",
    "memory_usage_mb",
    "cpu_usage_percent",
)


def usage(session: str = "s1", **fields: Any) -> dict[str, Any]:
    return {
        "transaction_id": str(uuid4()),
        "api_session_id": session,
        "customer_id": "customer",
        "product_code": "speech_transcription",
        "connection_duration_seconds": 12.5,
        "data_bytes_processed": 1000,
        "audio_duration_seconds": 10,
        "request_count": 1,
        "request_timestamp": INSTANT,
        "response_timestamp": INSTANT,
        "processing_timestamp": INSTANT,
        **SERVER_FIELDS,
        **fields,
    }


def event(kind: str, **fields: Any) -> dict[str, Any]:
    own_time = {"start": "started_at", "complete": "completed_at"}[kind]
    return {
        "transaction_id": str(uuid4()),
        "customer_id": "customer",
        "event_type": kind,
        own_time: INSTANT,
        "timestamp": INSTANT,
        **SERVER_FIELDS,
        **fields,
    }


def refresh(session: str = "s1", **fields: Any) -> dict[str, Any]:
    return {
        "transaction_id": str(uuid4()),
        "api_session_id": session,
        "customer_id": "customer",
        "product_code": "speech_transcription",
        "timestamp": INSTANT,
        **SERVER_FIELDS,
        **fields,
    }


class Agent:
    """Sends as an agent does, with httpx."""

    def __init__(self, control_plane: ControlPlane | ControlPlaneProcess) -> None:
        context = ssl.create_default_context(cafile=str(control_plane.ca_file))
        headers = {"X-API-Key": control_plane.api_key, "X-Correlation-ID": "c-1"}
        self.http = httpx.AsyncClient(base_url=control_plane.url, verify=context, headers=headers)

    async def post(
        self, call: str, body: dict[str, Any], session: str = "s1", key: str | None = None
    ) -> httpx.Response:
        headers = {"Idempotency-Key": key or body.get("transaction_id", "batch")}
        return await self.http.post(f"/api/v1/sessions/{session}/{call}", json=body, headers=headers)

    async def usage(self, body: dict[str, Any], session: str = "s1") -> httpx.Response:
        return await self.post("usage-records", body, session)

    async def heartbeat(self, server: str = "api-1") -> httpx.Response:
        body = {"status": "online", "metrics": dict.fromkeys(METRICS, 1)}
        return await self.http.put(f"/api/v1/servers/{server}/heartbeat", json=body)

    async def register(self, server: str = "api-1") -> httpx.Response:
        body = {
            "server_id": server,
            "region": "us-east-1",
            "ip_address": "127.0.0.1",
            "port": 8000,
            "version": "0.1.0",
            "capabilities": {
                "max_concurrent_sessions": 100,
                "supported_products": "speech_transcription",
                "supported_languages": "en-US",
            },
        }
        return await self.http.post("/api/v1/servers/register", json=body)

    async def commands(self, server: str = "api-1") -> list[dict[str, Any]]:
        answer = await self.http.get(f"/api/v1/servers/{server}/commands")
        commands: list[dict[str, Any]] = answer.json()["data"]["commands"]
        return commands

    async def report(self, command_id: str, **fields: Any) -> httpx.Response:
        body = {"command_id": command_id, "success": True, "execution_timestamp": INSTANT, **fields}
        return await self.http.post("/api/v1/servers/api-1/command-results", json=body)


@pytest.fixture
async def agent(control_plane: ControlPlane) -> AsyncIterator[Agent]:
    agent = Agent(control_plane)
    yield agent
    await agent.http.aclose()


# The ledger


async def test_a_second_delivery_of_a_transaction_is_a_duplicate_and_bills_nothing(
    control_plane: ControlPlane, agent: Agent
) -> None:
    record = usage()
    first, second = await agent.usage(record), await agent.usage(record)
    assert (first.status_code, second.status_code) == (200, 409)
    assert second.json()["error"] == "duplicate"
    stats = control_plane.stats()
    assert (stats.recorded["usage"], stats.duplicates, stats.credits) == (1, 1, 1)


async def test_the_same_id_with_other_content_is_a_conflict(
    control_plane: ControlPlane, agent: Agent
) -> None:
    record = usage()
    await agent.usage(record)
    answer = await agent.usage({**record, "request_count": 2})
    assert (answer.status_code, answer.json()["error"]) == (409, "conflict")
    other_session = await agent.usage({**record, "api_session_id": "s2"}, "s2")
    assert other_session.json()["error"] == "conflict"
    assert control_plane.stats().conflicts == 2


async def test_sameness_is_judged_without_the_fields_that_may_differ(agent: Agent) -> None:
    other = {"server_instance_id": "api-2", "api_server_region": "eu", "agent_version": "9"}
    later = "2026-01-01T00:00:09Z"
    record, start, quota = usage(), event("start"), refresh()
    await agent.usage(record)
    await agent.post("start", start)
    await agent.post("refresh", quota)
    again = [
        await agent.usage({**record, **other, "processing_timestamp": later}),
        await agent.post("start", {**start, **other, "timestamp": later}),
        await agent.post("refresh", {**quota, **other, "timestamp": later}),
    ]
    assert [answer.json()["error"] for answer in again] == ["duplicate"] * 3
    moved = await agent.post("start", {**start, "started_at": later})
    assert moved.json()["error"] == "conflict"


async def test_duplicates_answer_200_when_so_set(control_plane: ControlPlane, agent: Agent) -> None:
    control_plane.settings = Settings(duplicate_status=200)
    record = usage()
    await agent.usage(record)
    assert (await agent.usage(record)).status_code == 200
    assert control_plane.stats().duplicates == 1


async def test_of_a_batch_with_a_known_record_nothing_is_recorded(
    control_plane: ControlPlane, agent: Agent
) -> None:
    known, new = usage(), usage()
    await agent.usage(known)
    answer = await agent.usage({"usage_records": [new, known]})
    assert answer.status_code == 409
    assert answer.json()["data"]["already_recorded"] == [known["transaction_id"]]
    assert control_plane.stats().recorded["usage"] == 1
    assert [arrival.verdict for arrival in control_plane.book().arrivals[1:]] == ["not_recorded", "duplicate"]
    assert (await agent.usage(new)).status_code == 200


async def test_a_batch_records_each_of_its_records_under_its_own_id(
    control_plane: ControlPlane, agent: Agent
) -> None:
    records = [usage() for _ in range(3)]
    assert (await agent.usage({"usage_records": records})).json()["data"] == {"recorded": 3}
    recorded = [one.transaction_id for one in control_plane.book().transactions]
    assert recorded == [record["transaction_id"] for record in records]


async def test_a_bad_record_refuses_its_whole_batch(control_plane: ControlPlane, agent: Agent) -> None:
    answer = await agent.usage({"usage_records": [usage(), usage(request_count=0)]})
    assert answer.status_code == 422
    assert control_plane.stats().recorded["usage"] == 0


@pytest.mark.parametrize(
    ("audio", "connection", "credits"), [(0, 0, 0), (1, 0, 1), (360, 0, 1), (360.001, 1, 2), (5, 721, 3)]
)
def test_credits_are_whole_and_rounded_up_from_the_greater_measure(
    audio: float, connection: float, credits: int
) -> None:
    assert credits_of(audio, connection) == credits


async def test_complete_before_start_is_recorded_and_noted_as_an_order_violation(
    control_plane: ControlPlane, agent: Agent
) -> None:
    await agent.post("complete", event("complete"), "early")
    await agent.post("start", event("start"), "good")
    await agent.post("complete", event("complete"), "good")
    assert [one.session_id for one in control_plane.book().order_violations] == ["early"]
    assert control_plane.stats().sessions == {"completed": 2}


async def test_a_repeated_refresh_gets_the_same_grant(control_plane: ControlPlane, agent: Agent) -> None:
    control_plane.settings = Settings(quota_amount=700, grants_per_session=2)
    request = refresh()
    first, second = await agent.post("refresh", request), await agent.post("refresh", request)
    assert second.status_code == 409
    grant = first.json()["data"]
    assert second.json()["data"] == grant
    assert (grant["new_quota_amount"], grant["final_quota"]) == (700, False)
    assert (await agent.post("refresh", refresh())).json()["data"]["final_quota"] is True
    stats = control_plane.stats()
    assert (stats.grants, stats.grants_repeated) == (2, 1)


async def test_usage_of_an_unknown_session_is_not_found_only_when_sessions_are_strict(
    control_plane: ControlPlane, agent: Agent
) -> None:
    record = usage("new")
    control_plane.settings = Settings(strict_sessions=True)
    assert (await agent.usage(record, "new")).status_code == 404
    await agent.post("start", event("start"), "new")
    assert (await agent.usage(record, "new")).status_code == 200
    control_plane.settings = Settings()
    assert (await agent.usage(usage("other"), "other")).status_code == 200


# What is refused


async def test_an_entry_without_its_key_is_refused(control_plane: ControlPlane, agent: Agent) -> None:
    record = usage()
    without = await agent.http.post("/api/v1/sessions/s1/usage-records", json=record)
    wrong = await agent.post("usage-records", record, key="another")
    assert (without.status_code, wrong.status_code) == (400, 400)
    assert control_plane.stats().refused == 2


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (usage(extra=1), 422),
        (usage(request_count=0), 422),
        (usage(api_session_id="another"), 400),
        (usage(request_timestamp="2026-01-01T00:00:00"), 422),
        (event("start"), 422),
    ],
)
async def test_what_the_contract_does_not_say_is_refused(
    agent: Agent, body: dict[str, Any], status: int
) -> None:
    assert (await agent.usage(body)).status_code == status


async def test_bytes_that_are_no_json_object_are_refused(agent: Agent) -> None:
    json = {"Idempotency-Key": "k", "Content-Type": "application/json"}
    for body in (b"", b"{", b"[]", b"\xff", b"[" * 20_000, b'{"a":' * 2000):
        answer = await agent.http.post("/api/v1/sessions/s1/start", content=body, headers=json)
        assert answer.status_code == 400, body[:10]
    text = {"Idempotency-Key": "k", "Content-Type": "text/plain"}
    assert (
        await agent.http.post("/api/v1/sessions/s1/start", content=b"{}", headers=text)
    ).status_code == 415


async def test_a_body_above_one_mebibyte_is_refused(agent: Agent) -> None:
    start = event("start", metadata={"filler": "x" * 1024 * 1024})
    assert (await agent.post("start", start)).status_code == 413


async def test_ids_that_bend_a_path_are_refused(agent: Agent) -> None:
    for session in ("a%2Fb", "a%20b", "x" * 129):
        assert (await agent.usage(usage(), session)).status_code == 400


async def test_a_revoked_key_is_unauthorized_until_it_is_renewed(
    control_plane: ControlPlane, agent: Agent
) -> None:
    control_plane.api_keys = {"another"}
    assert (await agent.usage(usage())).status_code == 401
    agent.http.headers["X-API-Key"] = "another"
    assert (await agent.usage(usage())).status_code == 200


# Servers and commands


async def test_a_heartbeat_of_an_unregistered_server_is_not_found(
    control_plane: ControlPlane, agent: Agent
) -> None:
    assert (await agent.heartbeat()).status_code == 404
    await agent.register()
    assert (await agent.heartbeat()).status_code == 200
    control_plane.ledger.forget_server("api-1")
    assert (await agent.heartbeat()).status_code == 404


async def test_a_shut_down_server_is_offline_until_it_registers_again(
    control_plane: ControlPlane, agent: Agent
) -> None:
    await agent.register()
    notice = {"reason": "stopped", "timestamp": INSTANT}
    await agent.http.post("/api/v1/servers/api-1/shutdown", json=notice)
    assert control_plane.stats().servers == {"offline": 1}
    await agent.register()
    assert control_plane.stats().servers == {"online": 1}
    assert control_plane.ledger.servers()[0]["registrations"] == 2


# EdDSA is what the contract calls it, whatever RFC 9864 says.
@pytest.mark.filterwarnings("ignore:EdDSA is deprecated")
@pytest.mark.parametrize("algorithm", ["ES256", "EdDSA", "RS256"])
async def test_a_command_is_signed_with_a_published_key(
    control_plane: ControlPlane, agent: Agent, algorithm: Any
) -> None:
    wanted = Command("api-1", "health_check", {"deep": True}, algorithm=algorithm)
    envelope = control_plane.enqueue(wanted)
    [command] = await agent.commands()
    assert command == envelope
    jwks = (await agent.http.get("/api/v1/servers/api-1/public-keys")).json()["data"]
    token = jwt.decode(command["token"], KeySet.import_key_set(jwks), algorithms=[algorithm])
    assert token.header["typ"] == "command+jwt"
    assert token.claims["aud"] == "api-1"
    assert token.claims["jti"] == command["command_id"]
    assert token.claims["parameters"] == command["parameters"] == {"deep": True}
    assert token.claims["exp"] - token.claims["iat"] <= 600


async def test_a_command_is_handed_out_until_its_result_came(
    control_plane: ControlPlane, agent: Agent
) -> None:
    envelope = control_plane.enqueue(Command("api-1", "get_metrics"))
    assert len(await agent.commands()) == len(await agent.commands()) == 1
    assert await agent.commands("api-2") == []
    assert (await agent.report(envelope["command_id"])).status_code == 200
    assert await agent.commands() == []


async def test_a_second_result_is_a_duplicate_and_another_one_a_conflict(
    control_plane: ControlPlane, agent: Agent
) -> None:
    control_plane.enqueue(Command("api-1", "get_metrics", command_id="c-1"))
    await agent.report("c-1")
    assert (await agent.report("c-1")).json()["error"] == "duplicate"
    assert (await agent.report("c-1", result={"ran": "twice"})).json()["error"] == "conflict"
    [command] = control_plane.ledger.commands()
    assert [result["repeated"] for result in command["results"]] == [1, 0]


@pytest.mark.parametrize("forge", FORGERIES)
async def test_every_forgery_can_be_made(control_plane: ControlPlane, agent: Agent, forge: str) -> None:
    control_plane.enqueue(Command("api-1", "health_check", forge=forge))
    [command] = await agent.commands()
    assert command["token"]


async def test_rotation_publishes_new_keys_and_drops_the_old_ones_unless_told(
    control_plane: ControlPlane,
) -> None:
    def kids() -> set[str]:
        return {key["kid"] for key in control_plane.keyring.jwks()["keys"]}

    before = kids()
    control_plane.keyring.rotate(keep_old=True)
    assert before < kids()
    control_plane.keyring.rotate()
    assert before.isdisjoint(kids())


# Faults


async def test_a_fault_strikes_its_endpoint_its_sessions_and_its_count(
    control_plane: ControlPlane, agent: Agent
) -> None:
    control_plane.fault("status", "usage-records", status=503, retry_after=7, count=1, sessions=["s1"])
    assert (await agent.usage(usage("s2"), "s2")).status_code == 200
    assert (await agent.post("start", event("start"))).status_code == 200
    struck = await agent.usage(usage())
    assert (struck.status_code, struck.headers["Retry-After"]) == (503, "7")
    assert (await agent.usage(usage())).status_code == 200


async def test_a_fault_strikes_its_share_of_the_requests(sandbox_ca: Path) -> None:
    async with ControlPlane(ca_file=sandbox_ca, chance=random.Random(1)) as control_plane:
        agent = Agent(control_plane)
        control_plane.fault("status", share=0.5)
        answers = [(await agent.heartbeat()).status_code for _ in range(60)]
        await agent.http.aclose()
    assert 15 < answers.count(503) < 45


@pytest.mark.parametrize(("kind", "recorded"), [("drop_before", 0), ("drop_after", 1)])
async def test_a_dropped_connection_leaves_the_record_stored_or_not(
    control_plane: ControlPlane, agent: Agent, kind: str, recorded: int
) -> None:
    control_plane.fault(kind, count=1)
    record = usage()
    with pytest.raises(httpx.TransportError):
        await agent.usage(record)
    await control_plane.until(lambda: bool(control_plane.ledger.counts))
    assert control_plane.stats().recorded["usage"] == recorded
    assert control_plane.book().arrivals[0].status == 0
    assert (await agent.usage(record)).status_code == (409 if recorded else 200)


@pytest.mark.parametrize(
    ("kind", "status", "content_type", "text"),
    [
        ("html_200", 200, "text/html", "proxy"),
        ("wrong_json", 200, "application/json", "["),
        ("empty_200", 200, "application/json", ""),
        ("redirect", 307, "", ""),
    ],
)
@pytest.mark.parametrize("stored", [False, True])
async def test_an_answer_that_confirms_nothing(
    control_plane: ControlPlane,
    agent: Agent,
    kind: str,
    status: int,
    content_type: str,
    text: str,
    stored: bool,
) -> None:
    control_plane.fault(kind, stored=stored)
    answer = await agent.usage(usage())
    assert answer.status_code == status
    assert answer.headers.get("Content-Type", "").startswith(content_type)
    assert text in answer.text
    assert control_plane.stats().recorded["usage"] == stored


async def test_a_hanging_request_ends_when_the_faults_are_cleared(
    control_plane: ControlPlane, agent: Agent
) -> None:
    control_plane.fault("hang")
    request = asyncio.create_task(agent.usage(usage()))
    await control_plane.until_arrived(1, "usage_records")
    assert not request.done()
    control_plane.clear_faults()
    with pytest.raises(httpx.TransportError):
        await request


async def test_an_outage_refuses_connections_and_ends_on_the_same_port(
    control_plane: ControlPlane, agent: Agent
) -> None:
    await agent.usage(usage())
    url = control_plane.url
    over = control_plane.outage()
    with pytest.raises(httpx.TransportError):
        await agent.usage(usage())
    with pytest.raises(httpx.ConnectError):
        await agent.usage(usage())
    async with httpx.AsyncClient() as admin:
        stats = (await admin.get(f"{control_plane.admin_url}/sandbox/stats")).json()
    assert (stats["outage"], stats["recorded"]["usage"]) == (True, 1)
    control_plane.clear_faults()
    await over
    assert control_plane.url == url
    assert not control_plane.down
    assert (await agent.usage(usage())).status_code == 200


async def test_an_outage_that_is_replaced_by_another_goes_on(
    control_plane: ControlPlane, agent: Agent
) -> None:
    over = control_plane.outage()
    control_plane.clear_faults()
    control_plane.fault("outage")
    with pytest.raises(httpx.ConnectError):
        await agent.usage(usage())
    assert control_plane.down
    control_plane.clear_faults()
    await over
    assert (await agent.usage(usage())).status_code == 200


async def test_a_port_that_is_taken_is_an_error_and_leaves_nothing_open(
    control_plane: ControlPlane, sandbox_ca: Path
) -> None:
    with pytest.raises(OSError, match="in use"):
        async with ControlPlane(ca_file=sandbox_ca, admin_port=control_plane.admin_port):
            pass


async def test_an_outage_ends_by_itself(control_plane: ControlPlane, agent: Agent) -> None:
    await control_plane.outage(0.05)
    assert (await agent.usage(usage())).status_code == 200
    assert control_plane.faults.rules == []


# The book, the admin port, the process


async def test_every_arrival_is_kept_with_its_key_content_and_answer(
    control_plane: ControlPlane, agent: Agent
) -> None:
    record = usage()
    control_plane.fault("status", count=1)
    for _ in range(3):
        await agent.usage(record)
    arrivals = control_plane.book().arrivals
    assert [one.status for one in arrivals] == [503, 200, 409]
    assert [one.verdict for one in arrivals] == [Verdict.FAULT, Verdict.RECORDED, Verdict.DUPLICATE]
    assert {one.idempotency_key for one in arrivals} == {record["transaction_id"]}
    assert {one.correlation_id for one in arrivals} == {"c-1"}
    assert len({one.content for one in arrivals}) == 1


async def test_answers_can_come_bare(control_plane: ControlPlane, agent: Agent) -> None:
    control_plane.settings = Settings(bare=True)
    answer = await agent.post("refresh", refresh())
    assert set(answer.json()) == {"transaction_id", "new_quota_amount", "final_quota"}


async def test_a_client_without_a_certificate_is_kept_out_where_one_is_asked_for(
    sandbox_ca: Path, tmp_path: Path
) -> None:
    async with ControlPlane(ca_file=sandbox_ca, client_certificates=True) as control_plane:
        keys = f"{control_plane.url}/api/v1/servers/a/public-keys"
        headers = {"X-API-Key": control_plane.api_key}
        cert_file, key_file = tmp_path / "cert.pem", tmp_path / "key.pem"
        control_plane.authority.issue_client(cert_file, key_file)
        context = ssl.create_default_context(cafile=str(sandbox_ca))
        async with httpx.AsyncClient(verify=context, headers=headers) as stranger:
            with pytest.raises(httpx.TransportError):
                await stranger.get(keys)
        context = ssl.create_default_context(cafile=str(sandbox_ca))
        context.load_cert_chain(cert_file, key_file)
        async with httpx.AsyncClient(verify=context, headers=headers) as known:
            assert (await known.get(keys)).status_code == 200


async def test_the_admin_port_steers_and_tells(control_plane: ControlPlane, agent: Agent) -> None:
    async with httpx.AsyncClient(base_url=control_plane.admin_url) as admin:
        fault = {"kind": "status", "endpoint": "usage_records", "status": 500}
        assert (await admin.put("/sandbox/faults", json=[fault])).status_code == 200
        assert (await agent.usage(usage())).status_code == 500
        assert (await admin.get("/sandbox/faults")).json() == [fault]
        refused = await admin.put("/sandbox/faults", json=[{"kind": "status", "endpoint": "nowhere"}])
        assert refused.status_code == 400
        assert (await admin.delete("/sandbox/faults")).json() == []
        assert (await agent.usage(usage())).status_code == 200
        await admin.put("/sandbox/settings", json={"strict_sessions": True})
        assert control_plane.settings == Settings(strict_sessions=True)
        command = {"server_id": "api-1", "command_type": "get_metrics"}
        assert (await admin.put("/sandbox/commands", json=command)).json()["token"]
        assert (await admin.put("/sandbox/commands", json={**command, "forge": "?"})).status_code == 400
        assert len((await admin.post("/sandbox/keys/rotate")).json()["kids"]) == 3
        book = (await admin.get("/sandbox/book")).json()
        assert book["next"] == len(book["transactions"]) == 1
        assert (await admin.get("/sandbox/book?after=1")).json()["transactions"] == []
        assert len((await admin.get("/sandbox/arrivals?after=1")).json()["arrivals"]) == 1
        await admin.put("/sandbox/api-keys", json={"api_keys": []})
        assert (await agent.usage(usage())).status_code == 401
        assert set((await admin.get("/sandbox/overview")).json()) >= {
            "stats",
            "servers",
            "sessions",
            "arrivals",
        }
        await admin.post("/sandbox/reset")
        assert (await admin.get("/sandbox/stats")).json()["arrivals"] == 0


async def test_a_killed_process_comes_back_with_its_book_on_its_port(tmp_path: Path) -> None:
    async with ControlPlaneProcess(db=tmp_path / "book.db") as process:
        agent, record, url = Agent(process), usage(), process.url
        assert (await agent.usage(record)).status_code == 200
        await process.kill()
        with pytest.raises(httpx.TransportError):
            await agent.usage(record)
        await process.start()
        assert process.url == url
        assert (await agent.usage(record)).json()["error"] == "duplicate"
        book = await process.book()
        assert [one.transaction_id for one in book.transactions] == [record["transaction_id"]]
        assert [one.status for one in book.arrivals] == [200, 409]
        await process.outage()
        assert (await process.stats()).outage
        await process.clear_faults()
        await process.until(lambda stats: not stats.outage)
        assert (await agent.heartbeat()).status_code == 404
        await agent.http.aclose()


async def test_a_process_that_cannot_serve_says_so() -> None:
    async with ControlPlaneProcess() as first:
        with pytest.raises(RuntimeError):
            async with ControlPlaneProcess(port=first.port):
                pass


async def test_the_page_is_one_file_that_loads_nothing(control_plane: ControlPlane) -> None:
    async with httpx.AsyncClient() as browser:
        page = await browser.get(f"{control_plane.admin_url}/")
    assert page.headers["Content-Type"].startswith("text/html")
    assert not re.search(r'(src|href)=(?!"data:)|@import|url\(', page.text)
