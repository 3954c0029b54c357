"""Laws of the service processes as their users see them: what becomes of an entry, and what a process says.

One process of each service runs for the whole module, configured by the environment alone; each test uses
sessions of its own. What would disturb the others (a batch size, a key file, a Redis that goes away) gets a
process, a stream and, where it must, a server of its own.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from hashlib import sha256
from itertools import count
from pathlib import Path
from shutil import copyfile
from typing import Any, NamedTuple
from uuid import NAMESPACE_URL, uuid5

import httpx
import pytest
import pytest_asyncio
from redis.asyncio import Redis

from common.streams import Stream
from sandbox.audio_api_server import DAMAGE, percentiles
from sandbox.control_plane import ControlPlane
from sandbox.ledger import Arrival
from sandbox.process import ControlPlaneProcess
from tests.services import STREAMS, ServiceProcess, Services, drained, figures_of, meanwhile, where_is
from tests.support import SERVERS, RedisServer, connect, eventually, free_port

pytestmark = pytest.mark.asyncio(loop_scope="module")

KIND = list(SERVERS)[-1]
"""redis-server where it is installed: the crash tests use the embedded Valkey."""

NOT_FOUND_HOLD = 2.0
MAX_BACKOFF = 1.0
"""A Retry-After above it parks the entry; no quick retry and no pause of the breaker is longer."""

QUOTA_REQUESTS = 200
QUOTA_BOUND = 0.1
"""Seconds, the 99th percentile on a machine that runs nothing else; it is printed."""
BUSY_MACHINE = 2.5
"""What other work on this machine may add before the test fails; a lost slot or a blocked loop costs more."""

_numbers = count(1)


class Call(NamedTuple):
    """One of the four calls for entries, and a message that leads to it, beside its session."""

    service: str
    endpoint: str
    kind: str
    message: dict[str, Any]


CALLS = {
    "usage_records": Call(
        "usage_forwarder",
        "usage_records",
        "usage",
        {
            "connection_duration_seconds": 361,
            "data_bytes_processed": 400_000,
            "audio_duration_seconds": 12.5,
            "request_timestamp": "2026-01-31T08:00:00Z",
            "response_timestamp": "2026-01-31T08:06:01Z",
        },
    ),
    "start": Call(
        "session_notifier", "start", "start", {"event_type": "start", "timestamp": "2026-01-31T08:00:00Z"}
    ),
    "complete": Call(
        "session_notifier",
        "complete",
        "complete",
        {"event_type": "session_completed", "timestamp": "2026-01-31T08:00:00Z"},
    ),
    "refresh": Call("quota_refresher", "refresh", "refresh", {"timestamp": "2026-01-31T08:00:00Z"}),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


class Entry(NamedTuple):
    """What was added."""

    id: bytes
    session: str
    transaction_id: str


class Site:
    """A Redis, a ControlPlane, and one process of each service that carries entries."""

    def __init__(self, redis: Redis, control_plane: ControlPlane, services: Services) -> None:
        self.redis = redis
        self.cp = control_plane
        self.services = services
        self.running: dict[str, ServiceProcess] = {}
        self.http = httpx.AsyncClient()

    # -- entries ---------------------------------------------------------------------------------------

    async def add(
        self,
        call: Call,
        *,
        session: str | None = None,
        stream: str | None = None,
        fields: Mapping[str, bytes | str] | None = None,
        **message: Any,
    ) -> Entry:
        """One entry of a new session and with a new transaction id, unless they are given."""
        session = session or f"session-{next(_numbers)}"
        document = {
            "api_session_id": session,
            "customer_id": "customer-1",
            "transaction_id": f"transaction-{next(_numbers)}",
            **call.message,
            **message,
        }
        data = json.dumps({name: value for name, value in document.items() if value is not None})
        entry_id = await self.redis.xadd(
            stream or STREAMS[call.service].name, {"data": data, **(fields or {})}
        )
        return Entry(entry_id, session, document["transaction_id"])

    async def becomes(self, call: Call, entry: Entry, fate: str, within: float = 10.0) -> None:
        """Returns as soon as the entry is where it is expected."""

        async def there() -> bool:
            return await where_is(self.redis, call.service, entry.id) == fate

        await eventually(there, within=within)

    async def death(self, call: Call, entry: Entry, reason: str, within: float = 10.0) -> dict[str, Any]:
        """The document of an entry that dies of this."""
        await self.becomes(call, entry, f"dead: {reason}", within)
        document = await self.redis.hget(STREAMS[call.service].dead_key, entry.id.decode())
        assert document is not None
        return dict(json.loads(document))

    def arrivals(self, session: str) -> list[Arrival]:
        return [arrival for arrival in self.cp.ledger.arrivals() if arrival.session_id == session]

    async def arrived(self, session: str, times: int = 1, within: float = 10.0) -> list[Arrival]:
        """The requests of a session, as soon as there are so many."""
        await self.cp.until(lambda: len(self.arrivals(session)) >= times, within)
        return self.arrivals(session)

    # -- processes -------------------------------------------------------------------------------------

    async def start(self, service: str, **overrides: str | float | None) -> ServiceProcess:
        return await self.services.start(service, **overrides).ready()

    async def metric(self, service: ServiceProcess | str, name: str, **labels: str) -> float:
        """The sum of a metric's series with these labels, as `/metrics/json` has it."""
        process = self.running[service] if isinstance(service, str) else service
        page = (await self.http.get(f"{process.metrics_url}/metrics/json")).json()
        return float(
            sum(
                series.get("value", series.get("count"))
                for series in page[name]["values"]
                if labels.items() <= series["labels"].items()
            )
        )

    async def outcomes(self, service: str) -> dict[str, float]:
        """Outcome -> entries so far."""
        page = (await self.http.get(f"{self.running[service].metrics_url}/metrics/json")).json()
        return {
            series["labels"]["outcome"]: series["value"]
            for series in page["dataplane_entries_total"]["values"]
        }

    async def counts(self, service: str, before: Mapping[str, float], **more: int) -> None:
        """Returns when exactly these outcomes have been counted since `before`."""
        wanted = {outcome: figure + more.get(outcome, 0) for outcome, figure in before.items()}

        async def counted() -> bool:
            return await self.outcomes(service) == wanted

        await eventually(counted, within=3)

    async def hold(self, process: ServiceProcess) -> dict[str, str] | None:
        found = (await self.http.get(f"{process.health_url}/health/detailed")).json()["hold"]
        return dict(found) if found else None


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory, sandbox_ca: Path) -> AsyncIterator[Site]:
    server = RedisServer(KIND, tmp_path_factory.mktemp("services"))
    server.start()
    async with ControlPlane(ca_file=sandbox_ca) as control_plane, connect(server.port) as redis:
        with Services(
            server.port,
            control_plane,
            control_plane__timeout=1.5,
            control_plane__max_backoff=MAX_BACKOFF,
            control_plane__not_found_hold_seconds=NOT_FOUND_HOLD,
            streams__visibility_timeout=2,
            streams__claim_interval=0.2,
        ) as services:
            site = Site(redis, control_plane, services)
            site.running = {name: services.start(name) for name in STREAMS}
            await asyncio.gather(*(process.ready() for process in site.running.values()))
            yield site
            await site.http.aclose()
    server.kill()


@pytest.fixture(autouse=True)
def anew(site: Site) -> None:
    """The ControlPlane remembers nothing of the test before, and does what it should."""
    site.cp.reset()


# -- the verdict table (contract section 3), row by row ----------------------------------------------------


CONFIRMED: dict[str, dict[str, Any] | None] = {
    "200 wrapped": None,
    "201 bare": {"status": 201, "body": {"new_quota_amount": 3600, "final_quota": False}},
    "204": {"status": 204, "body": {}},
}


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        pytest.param(call, CONFIRMED[answer], id=f"{endpoint}-{answer}")
        for endpoint, call in CALLS.items()
        for answer in CONFIRMED
        if (endpoint, answer) != ("refresh", "204")  # no grant: the row after next
    ],
)
async def test_a_2xx_with_a_json_object_delivers(
    site: Site, call: Call, answer: dict[str, Any] | None
) -> None:
    before = await site.outcomes(call.service)
    if answer:
        site.cp.fault("status", call.endpoint, **answer, count=1, stored=True)
    entry = await site.add(call)
    await site.becomes(call, entry, "settled")
    await site.counts(call.service, before, delivered=1)
    (arrival,) = site.arrivals(entry.session)
    assert (arrival.endpoint, arrival.idempotency_key, arrival.transaction_id) == (
        call.endpoint,
        entry.transaction_id,
        entry.transaction_id,
    )


UNCONFIRMED = {
    "an HTML page": {"kind": "html_200"},
    "JSON that is no object": {"kind": "wrong_json"},
    "no body": {"kind": "empty_200"},
    "success false": {"kind": "status", "status": 200, "body": {"success": False, "error": "later"}},
}


@pytest.mark.parametrize("fault", UNCONFIRMED.values(), ids=UNCONFIRMED)
async def test_a_2xx_that_confirms_nothing_is_tried_again_under_the_same_key_and_counted_apart(
    site: Site, fault: dict[str, Any]
) -> None:
    call = CALLS["usage_records"]
    before = await site.outcomes(call.service)
    site.cp.fault(**fault, endpoint=call.endpoint, count=3)
    entry = await site.add(call)
    await site.arrived(entry.session, 3)
    await site.becomes(call, entry, "pending")
    await site.counts(call.service, before, unconfirmed=1)
    await site.becomes(call, entry, "settled")
    await site.counts(call.service, before, unconfirmed=1, delivered=1)
    assert {arrival.idempotency_key for arrival in site.arrivals(entry.session)} == {entry.transaction_id}


@pytest.mark.parametrize(
    ("status", "data"),
    [(200, {}), (200, {"new_quota_amount": None}), (200, {"new_quota_amount": "3600"}), (204, {})],
    ids=repr,
)
async def test_a_grant_without_a_number_is_never_written(
    site: Site, status: int, data: dict[str, Any]
) -> None:
    call = CALLS["refresh"]
    body = {"success": True, "data": {"final_quota": False, **data}}
    site.cp.fault("status", call.endpoint, status=status, body=body, count=1, stored=True)
    entry = await site.add(call)
    await site.becomes(call, entry, "settled")
    assert [grant["new_quota_amount"] for grant in await grants(site, entry)] == [3600]
    assert [arrival.status for arrival in site.arrivals(entry.session)] == [status, 409]


async def grants(site: Site, entry: Entry) -> list[dict[str, Any]]:
    answers = [json.loads(fields[b"data"]) for _, fields in await site.redis.xrange("queue:quota_response")]
    return [answer for answer in answers if answer["transaction_id"] == entry.transaction_id]


@every_call
async def test_a_409_delivers_what_was_recorded_already_and_counts_a_duplicate(
    site: Site, call: Call
) -> None:
    first = await site.add(call)
    await site.becomes(call, first, "settled")
    before = await site.outcomes(call.service)
    again = await site.add(call, session=first.session, transaction_id=first.transaction_id)
    await site.becomes(call, again, "settled")
    await site.counts(call.service, before, duplicate=1)
    assert [arrival.status for arrival in site.arrivals(first.session)] == [200, 409]
    if call.endpoint == "refresh":  # each request has its answer, and both tell of the one grant
        assert [grant["new_quota_amount"] for grant in await grants(site, first)] == [3600, 3600]
        assert sum(grant.transaction_id == first.transaction_id for grant in site.cp.book().grants) == 1


@every_call
async def test_a_409_with_the_word_conflict_kills(site: Site, call: Call) -> None:
    first = await site.add(call)
    await site.becomes(call, first, "settled")
    before = await site.outcomes(call.service)
    other = await site.add(
        call, session=first.session, transaction_id=first.transaction_id, customer_id="somebody else"
    )
    document = await site.death(call, other, "conflict")
    await site.counts(call.service, before, dead=1)
    assert document["http_status"] == 409
    assert "conflict" in document["response_excerpt"]


async def test_a_409_to_a_quota_request_without_the_grant_kills(site: Site) -> None:
    call = CALLS["refresh"]
    site.cp.fault("status", call.endpoint, status=409, body={"error": "already recorded"}, count=1)
    entry = await site.add(call)
    assert (await site.death(call, entry, "rejected"))["http_status"] == 409
    assert await grants(site, entry) == []


@pytest.mark.parametrize("status", [400, 402, 405, 406, 411, 413, 414, 415, 422, 451, 499])
async def test_any_other_4xx_rejects_the_record(site: Site, status: int) -> None:
    await dies_at_once(site, CALLS["usage_records"], status)


@pytest.mark.parametrize("endpoint", ["start", "complete", "refresh"])
async def test_any_other_4xx_rejects_the_entry_of_every_stream(site: Site, endpoint: str) -> None:
    await dies_at_once(site, CALLS[endpoint], 422)


async def dies_at_once(site: Site, call: Call, status: int) -> None:
    before = await site.outcomes(call.service)
    body = {"success": False, "error": "unwanted", "echo": site.cp.api_key}
    site.cp.fault("status", call.endpoint, status=status, body=body, count=1)
    entry = await site.add(call)
    document = await site.death(call, entry, "rejected")
    await site.counts(call.service, before, dead=1)
    assert len(site.arrivals(entry.session)) == 1
    assert (document["http_status"], document["attempts"], document["service"]) == (status, 1, call.service)
    assert "unwanted" in document["response_excerpt"]
    assert site.cp.api_key not in json.dumps(document)


async def test_a_session_that_is_not_found_is_waited_for_and_dies_only_after_the_hold(site: Site) -> None:
    call = CALLS["usage_records"]
    before = await site.outcomes(call.service)
    missing, gone, late = "nobody-404", "nobody-410", "late"
    site.cp.fault("status", call.endpoint, status=404, sessions=[missing])
    site.cp.fault("status", call.endpoint, status=410, sessions=[gone])
    site.cp.fault("status", call.endpoint, status=404, sessions=[late], count=1)
    begun = time.monotonic()
    dying = [await site.add(call, session=session) for session in (missing, gone)]
    found = await site.add(call, session=late)
    await site.arrived(late)
    assert await where_is(site.redis, call.service, found.id) == "pending"
    await site.becomes(call, found, "settled")
    documents = [await site.death(call, entry, "rejected") for entry in dying]
    assert time.monotonic() - begun >= NOT_FOUND_HOLD
    assert [document["http_status"] for document in documents] == [404, 410]
    assert all(document["response_excerpt"] for document in documents)
    after = await site.outcomes(call.service)
    assert (after["dead"] - before["dead"], after["delivered"] - before["delivered"]) == (2, 1)


async def test_twenty_sessions_in_a_row_not_found_are_no_verdict_on_entries(site: Site) -> None:
    call = CALLS["usage_records"]
    forwarder = site.running[call.service]
    site.cp.fault("status", call.endpoint, status=404)
    entries = [await site.add(call) for _ in range(25)]
    hold = await eventually(lambda: site.hold(forwarder))
    assert (hold["kind"], "404" in hold["detail"], "20 sessions" in hold["detail"]) == (
        "configuration",
        True,
        True,
    )
    await asyncio.sleep(NOT_FOUND_HOLD + 0.5)  # longer than a single session would have lived
    for entry in entries:
        assert await where_is(site.redis, call.service, entry.id) in ("pending", "waiting")
    site.cp.clear_faults()
    for entry in entries:
        await site.becomes(call, entry, "settled")
    assert await site.hold(forwarder) is None


HELD = [(401, "auth"), (403, "auth"), (301, "configuration"), (307, "configuration"), (501, "configuration")]


@pytest.mark.parametrize(("status", "kind"), HELD)
async def test_an_answer_that_is_about_us_holds_everything_and_counts_no_attempt(
    site: Site, status: int, kind: str
) -> None:
    call = CALLS["start"]
    notifier = site.running[call.service]
    before = await site.outcomes(call.service)
    site.cp.fault("status", call.endpoint, status=status, count=1)
    entry = await site.add(call)
    held = await eventually(lambda: site.hold(notifier))
    assert held["kind"] == kind
    assert str(status) in held["detail"]
    behind = await site.add(call)
    health = await site.http.get(f"{notifier.health_url}/health")
    assert (health.status_code, health.json()["status"]) == (200, "degraded")
    assert await where_is(site.redis, call.service, entry.id) == "pending"
    assert await where_is(site.redis, call.service, behind.id) == "waiting"  # nothing is read meanwhile
    for one in (entry, behind):
        await site.becomes(call, one, "settled")
    await site.counts(call.service, before, delivered=2)
    assert await site.hold(notifier) is None


async def test_a_403_for_one_entry_alone_is_like_not_found_and_holds_nobody_else_up(site: Site) -> None:
    call = CALLS["usage_records"]
    site.cp.fault("status", call.endpoint, status=403, sessions=["forbidden"])
    forbidden = await site.add(call, session="forbidden")
    await site.arrived("forbidden", 2)  # the probe has passed, the entry is refused again
    other = await site.add(call)
    await site.becomes(call, other, "settled")
    assert (await site.death(call, forbidden, "rejected"))["http_status"] == 403


async def test_a_certificate_that_cannot_be_verified_holds_until_the_right_authority_is_there(
    site: Site, tmp_path: Path
) -> None:
    async with ControlPlane() as stranger:
        ca_file = tmp_path / "ca.pem"
        copyfile(stranger.ca_file, ca_file)
        forwarder = await site.start(
            "usage_forwarder", control_plane__ca_file=str(ca_file), streams__usage_records="queue:distrusted"
        )
        call = CALLS["usage_records"]
        entry = await site.add(call, stream="queue:distrusted")
        hold = await eventually(lambda: site.hold(forwarder))
        assert hold["kind"] == "auth"
        copyfile(site.cp.ca_file, ca_file)
        await site.arrived(entry.session)
        await eventually(lambda: nothing_in(site.redis, "queue:distrusted"))
    await forwarder.stop()


async def nothing_in(redis: Redis, stream: str) -> bool:
    return await redis.xlen(stream) == 0


FAILURES = {
    **{
        f"status {status}": {"kind": "status", "status": status}
        for status in (408, 425, 429, 500, 502, 503, 504, 599)
    },
    "connection lost before": {"kind": "drop_before"},
    "connection lost after": {"kind": "drop_after"},
    "timeout": {"kind": "hang"},
}


@pytest.mark.parametrize("fault", FAILURES.values(), ids=FAILURES)
async def test_a_transient_failure_is_retried_at_once_under_the_same_key(
    site: Site, fault: dict[str, Any]
) -> None:
    call = CALLS["complete"]
    retries = await site.metric(call.service, "dataplane_control_plane_retries_total")
    before = await site.outcomes(call.service)
    site.cp.fault(**fault, endpoint=call.endpoint, count=1)
    entry = await site.add(call)
    await site.becomes(call, entry, "settled")
    recorded_before = fault["kind"] == "drop_after"
    await site.counts(call.service, before, **{"duplicate" if recorded_before else "delivered": 1})
    assert await site.metric(call.service, "dataplane_control_plane_retries_total") == retries + 1
    assert [arrival.idempotency_key for arrival in site.arrivals(entry.session)] == [entry.transaction_id] * 2


@every_call
async def test_what_fails_three_times_is_parked_and_tried_again_on_its_own_schedule(
    site: Site, call: Call
) -> None:
    before = await site.outcomes(call.service)
    session = f"parked-{call.endpoint}"
    site.cp.fault("status", call.endpoint, status=503, sessions=[session], count=3)
    entry = await site.add(call, session=session)
    await site.arrived(session, 3)
    await site.counts(call.service, before, retried=1)
    assert await where_is(site.redis, call.service, entry.id) == "pending"
    other = await site.add(call)
    await site.becomes(call, other, "settled")  # a parked entry holds up nobody else
    await site.becomes(call, entry, "settled")
    await site.counts(call.service, before, retried=1, delivered=2)
    arrivals = site.arrivals(session)
    assert len(arrivals) == 4
    assert arrivals[3].at - arrivals[2].at > 0.7


@pytest.mark.parametrize(("status", "form"), [(429, "seconds"), (503, "date")])
async def test_retry_after_is_honoured(site: Site, status: int, form: str) -> None:
    call = CALLS["refresh"]
    asked = (
        2 if form == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=2.9), usegmt=True)
    )
    site.cp.fault("status", call.endpoint, status=status, retry_after=asked, count=1)
    entry = await site.add(call)
    await site.becomes(call, entry, "settled")
    first, second = site.arrivals(entry.session)
    assert second.at - first.at > (1.95 if form == "seconds" else 1.8)  # a date knows no fractions


async def test_a_complete_waits_for_its_parked_start_and_is_delivered_after_one_that_died(site: Site) -> None:
    start, complete = CALLS["start"], CALLS["complete"]
    site.cp.fault("status", "start", status=503, sessions=["waited-for"], count=3)
    site.cp.fault("status", "start", status=422, sessions=["given-up"])
    parked = await site.add(start, session="waited-for")
    behind = await site.add(complete, session="waited-for")
    dying = await site.add(start, session="given-up")
    bereft = await site.add(complete, session="given-up")
    await site.becomes(complete, bereft, "settled")
    await site.death(start, dying, "rejected")
    assert [arrival.endpoint for arrival in await site.arrived("waited-for", 3)] == ["start"] * 3
    assert await where_is(site.redis, start.service, parked.id) == "pending"
    await site.becomes(complete, behind, "settled")
    assert [arrival.endpoint for arrival in site.arrivals("waited-for")] == [*["start"] * 4, "complete"]


# -- batches -----------------------------------------------------------------------------------------------


class Batching:
    """A forwarder with batches of ten, and a stream of its own that is filled before it starts."""

    call = CALLS["usage_records"]

    def __init__(self, site: Site, number: int) -> None:
        self.site = site
        self.stream = Stream(f"queue:batched-{number}", "usage_forwarder")

    async def add(self, session: str, number: int, **message: Any) -> list[Entry]:
        return [
            await self.site.add(self.call, session=session, stream=self.stream.name, **message)
            for _ in range(number)
        ]

    async def deliver(self) -> None:
        """Starts the forwarder, waits until nothing but the dead is left, and stops it."""
        forwarder = await self.site.start(
            "usage_forwarder", control_plane__usage_batch_size=10, streams__usage_records=self.stream.name
        )

        async def over() -> bool:
            dead = (await self.site.redis.xpending(self.stream.name, self.stream.dead_group))["pending"]
            return await self.site.redis.xlen(self.stream.name) == dead

        await eventually(over)
        assert await forwarder.stop() == 0

    async def dead(self) -> dict[bytes, str]:
        rows = await self.site.redis.xpending_range(self.stream.name, self.stream.dead_group, "-", "+", 100)
        return {row["message_id"]: row["consumer"].decode() for row in rows}

    def requests(self, session: str) -> list[tuple[int, list[str]]]:
        """Status and transaction ids of every request of a session, in their order."""
        found: dict[int, tuple[int, list[str]]] = {}
        for arrival in self.site.arrivals(session):
            assert arrival.transaction_id is not None
            assert arrival.status is not None
            found.setdefault(arrival.request, (arrival.status, []))[1].append(arrival.transaction_id)
        return list(found.values())


@pytest.fixture
def batching(site: Site) -> Batching:
    return Batching(site, next(_numbers))


async def test_a_batch_carries_records_of_one_session_under_a_key_of_its_own(
    site: Site, batching: Batching
) -> None:
    many, few = await batching.add("batch-many", 25), await batching.add("batch-few", 3)
    await batching.deliver()
    assert sorted(len(ids) for _, ids in batching.requests("batch-many")) == [5, 10, 10]
    assert [len(ids) for _, ids in batching.requests("batch-few")] == [3]
    assert {arrival.transaction_id for arrival in site.arrivals("batch-few")} == {
        e.transaction_id for e in few
    }
    assert len({arrival.idempotency_key for arrival in site.arrivals("batch-many")}) == 3
    assert len({arrival.transaction_id for arrival in site.arrivals("batch-many")}) == len(many)


async def test_a_refused_batch_is_split_so_that_only_the_guilty_record_dies(
    site: Site, batching: Batching
) -> None:
    guilty, *innocent = await batching.add("batch-guilty", 8)
    # Refused: all eight, their first half, its first half, and at last the first record alone.
    site.cp.fault("status", "usage_records", status=422, sessions=["batch-guilty"], count=4)
    await batching.deliver()
    assert [(status, len(ids)) for status, ids in batching.requests("batch-guilty")] == [
        (422, 8), (422, 4), (422, 2), (422, 1), (200, 1), (200, 2), (200, 4)
    ]  # fmt: skip
    assert await batching.dead() == {guilty.id: "rejected"}
    recorded = {one.transaction_id for one in site.cp.book().transactions if one.session_id == "batch-guilty"}
    assert recorded == {entry.transaction_id for entry in innocent}


async def test_a_batch_with_something_recorded_already_goes_record_by_record(
    site: Site, batching: Batching
) -> None:
    call = batching.call
    known = await site.add(call, session="batch-known")
    await site.becomes(call, known, "settled")
    same = await batching.add("batch-known", 1, transaction_id=known.transaction_id)
    other = await batching.add("batch-known", 1, transaction_id=known.transaction_id, customer_id="another")
    new = await batching.add("batch-known", 2)
    await batching.deliver()
    assert [(status, len(ids)) for status, ids in batching.requests("batch-known")] == [
        (200, 1), (409, 4), (409, 1), (409, 1), (200, 1), (200, 1)
    ]  # fmt: skip
    assert await batching.dead() == {other[0].id: "conflict"}
    ledger = await site.redis.hgetall(batching.stream.ledger_key)
    assert (ledger[b"delivered"], ledger[b"duplicate"], ledger[b"dead:conflict"]) == (b"2", b"1", b"1")
    assert len(same) + len(new) == 3


async def test_a_batch_that_fails_transiently_comes_back_whole(site: Site, batching: Batching) -> None:
    await batching.add("batch-late", 6)
    site.cp.fault("status", "usage_records", status=503, sessions=["batch-late"], count=1)
    await batching.deliver()
    (_, first), (status, second) = batching.requests("batch-late")
    assert (status, first) == (200, second)


# -- entries that cannot be read ---------------------------------------------------------------------------

WORSE = {
    "1 MB": {b"data": b'{"note":"' + b"x" * 1_000_000 + b'"}'},
    "1 MB beside": {b"data": b"{}", b"note": b"x" * 1_000_000},
    "a million brackets": {b"data": b"[" * 200_000},
    "only zeros": {b"data": bytes(1000)},
}


@pytest.mark.parametrize("service", STREAMS)
async def test_whatever_arrives_dies_as_invalid_visibly_and_stops_nothing(site: Site, service: str) -> None:
    stream, process = STREAMS[service], site.running[service]
    call = next(call for call in CALLS.values() if call.service == service)
    before = await figures_of(site.redis, service)
    sound = json.dumps({"api_session_id": "s", "customer_id": "c", **call.message}).encode()
    entries = {name: damage(sound) for name, damage in DAMAGE.items()} | WORSE
    pid = process.process.pid
    async with site.redis.pipeline(transaction=False) as pipe:
        for fields in entries.values():
            pipe.xadd(stream.name, fields)  # type: ignore[arg-type]
        ids = await pipe.execute()
    good = await site.add(call)
    await site.becomes(call, good, "settled")
    for name, entry_id in zip(entries, ids, strict=True):
        document = await site.death(call, Entry(entry_id, name, ""), "invalid")
        assert (document["reason"], document["http_status"], document["attempts"]) == ("invalid", None, 0), (
            name
        )
        assert len(document["error"]) < 300, name
    after = await figures_of(site.redis, service)
    assert after.dead["invalid"] - before.dead.get("invalid", 0) == len(entries)
    assert after.ledger["dead:invalid"] - before.ledger.get("dead:invalid", 0) == len(entries)
    assert after.imbalance == 0
    assert (process.running, process.process.pid) == (True, pid)


# -- what goes along with an entry -------------------------------------------------------------------------


@every_call
async def test_an_entry_without_a_transaction_id_gets_the_same_one_at_every_delivery(
    site: Site, call: Call
) -> None:
    session = f"nameless-{call.endpoint}"
    site.cp.fault("drop_before", call.endpoint, sessions=[session], count=1)
    entry = await site.add(call, session=session, transaction_id=None)
    stream = STREAMS[call.service].name
    message = {"api_session_id": session, "customer_id": "customer-1", **call.message}
    digest = sha256(json.dumps(message).encode()).hexdigest()
    namespace = uuid5(NAMESPACE_URL, "dataplane-agent/transaction")
    derived = str(uuid5(namespace, f"{stream}\n{entry.id.decode()}\n{digest}"))
    await site.becomes(call, entry, "settled")
    arrivals = site.arrivals(session)
    assert {(arrival.transaction_id, arrival.idempotency_key) for arrival in arrivals} == {(derived, derived)}
    assert len(arrivals) == 2


TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@every_call
async def test_correlation_id_and_traceparent_are_forwarded_where_they_are_well_formed(
    site: Site, call: Call
) -> None:
    entry = await site.add(call, fields={"correlation_id": "order-4711", "traceparent": TRACE})
    await site.becomes(call, entry, "settled")
    (arrival,) = site.arrivals(entry.session)
    assert (arrival.correlation_id, arrival.traceparent) == ("order-4711", TRACE)
    if call.endpoint == "refresh":
        rows = await site.redis.xrange("queue:quota_response")
        (answer,) = [row for _, row in rows if entry.transaction_id.encode() in row[b"data"]]
        assert answer[b"correlation_id"] == b"order-4711"


@pytest.mark.parametrize("bad", ["", "two words", "a\r\nX-Evil: 1", "x" * 5000, b"\xff\xfe"], ids=repr)
async def test_what_is_not_well_formed_is_replaced_or_dropped(site: Site, bad: str | bytes) -> None:
    call = CALLS["start"]
    entry = await site.add(call, fields={"correlation_id": bad, "traceparent": bad})
    await site.becomes(call, entry, "settled")
    (arrival,) = site.arrivals(entry.session)
    assert arrival.correlation_id
    assert arrival.correlation_id not in (bad, str(bad))
    assert arrival.traceparent is None


# -- holds, outages, saturation ----------------------------------------------------------------------------


async def test_a_revoked_key_holds_everything_until_its_file_has_the_new_one(
    site: Site, tmp_path: Path
) -> None:
    key_file = tmp_path / "key"
    key_file.write_text("first-secret-key\n")
    site.cp.api_keys.add("first-secret-key")
    stream = "queue:revoked"
    forwarder = await site.start(
        "usage_forwarder",
        control_plane__api_key=None,
        control_plane__api_key_file=str(key_file),
        streams__usage_records=stream,
    )
    call = CALLS["usage_records"]
    await site.add(call, stream=stream)
    await eventually(lambda: nothing_in(site.redis, stream))

    site.cp.api_keys.discard("first-secret-key")
    entries = [await site.add(call, stream=stream) for _ in range(200)]
    hold = await eventually(lambda: site.hold(forwarder))
    assert hold["kind"] == "auth"
    probed = site.cp.requests["public_keys"]
    await site.cp.until_arrived(probed + 1, "public_keys")
    assert await site.redis.xlen(stream) == len(entries)
    site.cp.api_keys.add("second-secret-key")
    key_file.write_text("second-secret-key\n")
    await eventually(lambda: nothing_in(site.redis, stream))

    assert await site.hold(forwarder) is None
    assert [len(forwarder.lines(f"control_plane.{event}")) for event in ("held", "resumed")] == [1, 1]
    delivered = {one.transaction_id for one in site.cp.book().transactions}
    assert delivered >= {entry.transaction_id for entry in entries}
    assert await forwarder.stop() == 0
    assert "secret-key" not in forwarder.tail(1_000_000)


async def test_an_outage_of_seconds_under_load_logs_exactly_two_lines_and_loses_nothing(site: Site) -> None:
    call = CALLS["usage_records"]
    forwarder = site.running[call.service]
    before, told = await figures_of(site.redis, call.service), len(forwarder.lines())
    entries = [await site.add(call) for _ in range(100)]
    outage = site.cp.outage(3)
    entries += [await site.add(call) for _ in range(400)]
    await eventually(lambda: forwarder.lines("control_plane.unreachable"))
    assert (await site.http.get(f"{forwarder.health_url}/readyz")).status_code == 200
    assert (await site.http.get(f"{forwarder.health_url}/health")).json()["status"] == "degraded"
    await outage
    await eventually(lambda: drained(site.redis, call.service))
    after = await figures_of(site.redis, call.service)
    assert after.dead == before.dead
    assert after.imbalance == 0
    delivered = {one.transaction_id for one in site.cp.book().transactions}
    assert delivered >= {entry.transaction_id for entry in entries}
    assert [line["event"] for line in forwarder.lines()[told:]] == [
        "control_plane.unreachable",
        "control_plane.recovered",
    ]


async def test_quota_is_granted_quickly_while_usage_is_saturated(
    site: Site, sandbox_ca: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From XADD to grant, by Redis's own clock.

    The forwarder has a backlog and every slot taken by a slow answer; the refresher's ControlPlane is a process
    that has nothing else to do. How fast the sandbox can be is not what is measured.
    """
    call = CALLS["refresh"]
    requests, responses = "queue:quota_timed", "queue:quota_timed_response"
    usage = json.dumps({"api_session_id": "saturated", "customer_id": "c", **CALLS["usage_records"].message})

    async def saturate() -> None:
        """Keeps a backlog, whatever the forwarder's speed."""
        while True:
            if await site.redis.xlen("queue:usage_records") < 500:
                async with site.redis.pipeline(transaction=False) as pipe:
                    for _ in range(200):
                        pipe.xadd("queue:usage_records", {"data": usage})
                    await pipe.execute()
            await asyncio.sleep(0.05)

    async with ControlPlaneProcess(ca_file=sandbox_ca, api_key=site.cp.api_key) as quick:
        refresher = await site.start(
            call.service,
            control_plane__base_url=quick.url,
            streams__quota_refresh=requests,
            streams__quota_response=responses,
        )
        asked: dict[str, int] = {}
        site.cp.fault("latency", "usage_records", seconds=0.2)
        async with meanwhile(saturate()):
            await site.cp.until_arrived(site.cp.requests["usage_records"] + 200, "usage_records")
            for _ in range(QUOTA_REQUESTS):
                entry = await site.add(call, stream=requests)
                asked[entry.transaction_id] = _milliseconds(entry.id)
                await asyncio.sleep(0.01)
            await eventually(lambda: nothing_in(site.redis, requests))
            assert await site.redis.xlen("queue:usage_records") > 0
        await refresher.stop()
    granted = {
        json.loads(fields[b"data"])["transaction_id"]: _milliseconds(entry_id)
        for entry_id, fields in await site.redis.xrange(responses)
    }
    assert granted.keys() == asked.keys()
    found = percentiles(sorted((granted[key] - at) / 1000 for key, at in asked.items()))
    with capsys.disabled():
        print(f"\n  quota while usage is saturated: p50 {found['p50']:.3f} s, p99 {found['p99']:.3f} s")  # noqa: T201
    site.cp.clear_faults()
    await eventually(lambda: drained(site.redis, "usage_forwarder"), within=20)
    assert found["p99"] < QUOTA_BOUND * BUSY_MACHINE


def _milliseconds(entry_id: bytes) -> int:
    return int(entry_id.partition(b"-")[0])


# -- endpoints (contract section 7) ------------------------------------------------------------------------


@pytest.mark.parametrize("service", STREAMS)
async def test_every_service_answers_on_its_endpoints(site: Site, service: str) -> None:
    process, get = site.running[service], site.http.get
    health = await get(f"{process.health_url}/health")
    assert health.status_code == 200
    assert {name: type(value) for name, value in health.json().items()} == {
        "status": str,
        "service": str,
        "server_id": str,
        "timestamp": str,
        "version": str,
        "uptime_seconds": float,
        "redis_connected": bool,
        "control_plane_connected": bool,
    }
    assert (health.json()["status"], health.json()["service"]) == ("healthy", service)
    for path in ("/health/detailed", "/status"):
        detailed = (await get(process.health_url + path)).json()
        assert detailed.keys() - health.json().keys() == {
            "breaker", "hold", "in_flight", "backlog", "pending", "dead",
            "oldest_age_seconds", "last_success", "last_error",
        }  # fmt: skip
    for path, status in (
        ("/healthz", "ok"),
        ("/readyz", "ready"),
        ("/healthz/", "ok"),
        ("/health/", "healthy"),
    ):
        answer = await get(process.health_url + path)
        assert (answer.status_code, answer.json()["status"]) == (200, status)
    assert (await get(f"{process.health_url}/nothing")).status_code == 404

    text = await get(f"{process.metrics_url}/metrics")
    assert text.headers["content-type"].startswith("text/plain")
    open_metrics = await get(
        f"{process.metrics_url}/metrics", headers={"Accept": "application/openmetrics-text"}
    )
    assert open_metrics.headers["content-type"].startswith("application/openmetrics-text")
    assert open_metrics.text.endswith("# EOF\n")
    labels = f'queue_name="{STREAMS[service].name}",region="us-east-1",server_id="api-server-001"'
    assert f"dataplane_queue_depth{{{labels}}}" in text.text
    for reason in ("invalid", "rejected", "conflict", "poison"):
        assert f'reason="{reason}"' in text.text
    assert (await get(f"{process.metrics_url}/metrics/json")).json()["dataplane_queue_depth"][
        "type"
    ] == "gauge"


async def test_figures_want_credentials_and_a_lost_redis_is_told(site: Site, tmp_path: Path) -> None:
    server = RedisServer(KIND, tmp_path)
    server.start()
    key = "metrics-secret"
    with Services(server.port, site.cp) as services:
        process = await services.start(
            "session_notifier",
            monitoring__metrics_auth__api_key=key,
            monitoring__metrics_auth__allow="10.0.0.0/8",
        ).ready()
        guarded = [
            f"{process.health_url}/health/detailed",
            f"{process.health_url}/status",
            f"{process.metrics_url}/metrics",
            f"{process.metrics_url}/metrics/json",
        ]
        for url in guarded:
            for headers, status in (
                ({}, 401),
                ({"X-API-Key": "wrong"}, 401),
                ({"Authorization": f"Basic {key}"}, 401),
                ({"X-Forwarded-For": "10.1.2.3"}, 401),
                ({"X-API-Key": key}, 200),
                ({"Authorization": f"Bearer {key}"}, 200),
            ):
                answer = await site.http.get(url, headers=headers)
                assert answer.status_code == status, (url, headers)

        async def answers(path: str, status: int) -> dict[str, Any] | None:
            answer = await site.http.get(process.health_url + path)
            return dict(answer.json()) if answer.status_code == status else None

        assert await eventually(lambda: answers("/health", 200))
        server.kill()
        told = await eventually(lambda: answers("/health", 503))
        assert (told["status"], told["redis_connected"]) == ("unhealthy", False)
        assert (await eventually(lambda: answers("/readyz", 503)))["reasons"] == ["Redis is not reachable"]
        assert await answers("/healthz", 200) == {"status": "ok"}
        server.start()
        assert await eventually(lambda: answers("/readyz", 200)) == {"status": "ready"}
        assert (await eventually(lambda: answers("/health", 200)))["redis_connected"]
        assert [len(process.lines(f"redis.{event}")) for event in ("unreachable", "recovered")] == [1, 1]
        assert await process.stop() == 0
        assert key not in process.tail(1_000_000)
    server.kill()


# -- the command line --------------------------------------------------------------------------------------


async def command(service: str, *arguments: str, **environ: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a service that does not stay."""
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", service, *arguments],
        env=environ,
        capture_output=True,
        text=True,
        timeout=20,
    )
    return done.returncode, done.stdout, done.stderr


async def test_every_service_tells_its_version() -> None:
    told = await asyncio.gather(*(command(service, "--version") for service in (*STREAMS, "registrar")))
    assert len(set(told)) == 1
    assert told[0][0] == 0


async def test_a_configuration_without_fault_is_found_so(site: Site) -> None:
    environ = site.running["usage_forwarder"].environ
    assert await command("usage_forwarder", "--check-config", **environ) == (0, "", "")


@pytest.mark.parametrize("arguments", [(), ("--check-config",)], ids=["started", "--check-config"])
async def test_every_fault_of_the_configuration_is_printed_with_its_key(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "server: {id: 'no good'}\nredis: {prot: 6379}\ncontrol_plane: {api_key: '${UNSET_KEY}'}\n"
    )
    code, _, said = await command(
        "usage_forwarder", "--config", str(file), *arguments, DATAPLANE_STREAMS__READ_COUNT="many"
    )
    assert code == 2
    for key in ("server.id", "redis.prot", "redis.port", "control_plane.api_key", "streams.read_count"):
        assert key in said, (key, said)
    assert "Traceback" not in said


@pytest.mark.parametrize("key", ["metrics_port", "health_check_port"])
async def test_a_taken_port_is_a_fault_that_names_it(site: Site, key: str) -> None:
    base = free_port()
    taken = await asyncio.start_server(lambda *_: None, "127.0.0.1", base + 2)  # the notifier is service 2
    async with taken:
        process = site.services.start("session_notifier", **{f"monitoring__{key}": base})
        assert await process.ended() == 2
        said = process.tail()
        assert f"monitoring.{key}" in said
        assert str(base + 2) in said
        assert "Traceback" not in said


async def test_a_wrong_redis_password_is_fatal_and_names_the_remedy(site: Site, tmp_path: Path) -> None:
    server = RedisServer(KIND, tmp_path)
    server.start()
    async with connect(server.port) as redis:
        await redis.config_set("requirepass", "right")
    with Services(server.port, site.cp) as services:
        for given in ("wrong-password", None):
            process = services.start("quota_refresher", redis__password=given)
            assert await process.ended(within=10) == 3
            assert "check redis.username and redis.password" in process.tail()
            assert "Traceback" not in process.tail()
            assert "wrong-password" not in process.tail()
        await services.start("quota_refresher", redis__password="right").ready()
    server.kill()
