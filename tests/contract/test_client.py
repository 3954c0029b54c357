"""The ten calls against a ControlPlane over TLS that answers as each test tells it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trustme

from common.config import ControlPlane, Secret
from common.control_plane import errors
from common.control_plane.client import MOST_COMMANDS, BatchCall, ControlPlaneClient, build
from common.control_plane.gate import FIRST_PROBE, NOT_FOUND_STREAK
from common.control_plane.verdicts import SPLIT, SPLIT_ONE_BY_ONE
from common.outcomes import DELIVERED, DUPLICATE, Cause, Dead, Delivered, Reason, Retry

KEY = "key-of-the-client-test"
CALL = BatchCall("11111111-2222-5333-8444-555555555555", "corr-1", "00-" + "a" * 32 + "-" + "b" * 16 + "-01")

Reply = tuple[int, Any] | tuple[int, Any, dict[str, str]] | None
"""Status, body, headers; None hangs up without an answer."""


class Request:
    def __init__(self, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        self.method = method
        self.path = path
        self.headers = headers
        self.body = body


class Plane:
    """A ControlPlane of one page: `replies` are given in turn, then `otherwise` for ever."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.otherwise: Callable[[Request], Reply] = lambda request: (200, {"success": True})
        self.requests: list[Request] = []
        self.arrived = asyncio.Event()
        self.url = ""
        self.ca_file = ""

    @property
    def keys(self) -> list[str | None]:
        return [request.headers.get("idempotency-key") for request in self.requests]

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                line, *rest = head.strip().split("\r\n")
                headers = {name.lower(): value for name, value in (field.split(": ", 1) for field in rest)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, path, _ = line.split(" ")
                request = Request(method, path, headers, body)
                self.requests.append(request)
                self.arrived.set()
                reply = self.replies.pop(0) if self.replies else self.otherwise(request)
                if reply is None:
                    break
                status, content, *extra = reply
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                fields = {"Content-Length": str(len(data)), **(extra[0] if extra else {})}
                text = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
                writer.write(f"HTTP/1.1 {status} S\r\n{text}\r\n".encode() + data)
                await writer.drain()
        writer.close()


class Log:
    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def info(self, event: str, **facts: Any) -> None:
        self.lines.append((event.removeprefix("control_plane."), facts))

    warning = info


class Notes:
    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.retries: list[tuple[str, str]] = []

    def request(self, endpoint: str, status: str, seconds: float) -> None:
        assert seconds >= 0
        self.requests.append((endpoint, status))

    def retry(self, endpoint: str, cause: str) -> None:
        self.retries.append((endpoint, cause))

    def breaker_state(self, state: int) -> None: ...
    def breaker_opened(self, cause: str) -> None: ...
    def connected(self, connected: bool) -> None: ...


class Lowest(Random):
    """The shortest pauses there are."""

    def random(self) -> float:
        return 0.0


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, str]:
    ca = trustme.CA()
    file = tmp_path_factory.mktemp("ca") / "ca.pem"
    ca.cert_pem.write_to_path(str(file))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("localhost").configure_cert(context)
    return context, str(file)


@pytest.fixture
async def plane(tls: tuple[ssl.SSLContext, str]) -> AsyncIterator[Plane]:
    plane = Plane()
    context, plane.ca_file = tls
    server = await asyncio.start_server(plane.connected, "localhost", 0, family=socket.AF_INET, ssl=context)
    plane.url = f"https://localhost:{server.sockets[0].getsockname()[1]}"
    yield plane
    server.close()


@asynccontextmanager
async def speaking(
    plane: Plane, log: Log | None = None, notes: Notes | None = None, **settings: Any
) -> AsyncIterator[ControlPlaneClient]:
    defaults = {"base_url": plane.url, "ca_file": plane.ca_file, "api_key": Secret(KEY), "timeout": 5.0}
    client = build(
        ControlPlane(**{**defaults, **settings}),
        "server-1",
        "1.2.3",
        clock=asyncio.get_running_loop().time,
        random=Lowest(),
        logger=log or Log(),
        observer=notes,
    )
    try:
        yield client
    finally:
        await client.close(0)


@pytest.fixture
async def client(plane: Plane) -> AsyncIterator[ControlPlaneClient]:
    async with speaking(plane) as client:
        yield client


# Calls for an entry.


@pytest.mark.parametrize(
    ("call", "verb"),
    [
        ("usage_record", "usage-records"),
        ("usage_batch", "usage-records"),
        ("start", "start"),
        ("complete", "complete"),
    ],
)
async def test_an_entrys_call_arrives_as_the_contract_says(
    plane: Plane, client: ControlPlaneClient, call: str, verb: str
) -> None:
    assert await getattr(client, call)("sess:1~a.b_c-d", b'{"a":1}', CALL) == DELIVERED
    (request,) = plane.requests
    assert (request.method, request.path) == ("POST", f"/api/v1/sessions/sess:1~a.b_c-d/{verb}")
    assert request.body == b'{"a":1}'
    assert {
        name: value
        for name, value in request.headers.items()
        if name not in ("host", "accept", "content-length")
    } == {
        "x-api-key": KEY,
        "x-correlation-id": "corr-1",
        "user-agent": "dataplane-agent/1.2.3",
        "traceparent": CALL.traceparent,
        "idempotency-key": CALL.transaction_id,
        "content-type": "application/json",
    }
    assert client.requests_total == 1
    assert client.last_success is not None
    assert client.connected
    assert client.in_flight == 0


async def test_a_refresh_brings_the_grant(plane: Plane, client: ControlPlaneClient) -> None:
    grant = {"new_quota_amount": 5, "final_quota": 7}
    plane.replies = [(200, {"success": True, "data": grant}), (409, grant)]
    assert await client.refresh("s", b"{}", CALL) == Delivered(answer=grant)
    assert await client.refresh("s", b"{}", CALL) == Delivered(duplicate=True, answer=grant)
    assert plane.requests[0].path == "/api/v1/sessions/s/refresh"


async def test_an_entry_without_traceparent_sends_none(plane: Plane, client: ControlPlaneClient) -> None:
    await client.start("s", b"{}", BatchCall("k", "corr-1"))
    assert "traceparent" not in plane.requests[0].headers


@pytest.mark.parametrize(
    "session", ["", ".", "..", "a/b", "../x", "a?b", "a#b", "a b", "a%2Fb", "ä", "a\n", "a" * 129, "a\\b"]
)
async def test_an_id_that_would_bend_the_path_is_dead_and_not_sent(
    plane: Plane, client: ControlPlaneClient, session: str
) -> None:
    outcome = await client.usage_record(session, b"{}", CALL)
    assert isinstance(outcome, Dead)
    assert outcome.reason is Reason.INVALID
    assert plane.requests == []


async def test_a_header_that_http_cannot_carry_is_dead_and_not_sent(
    plane: Plane, client: ControlPlaneClient
) -> None:
    outcome = await client.usage_record("s", b"{}", BatchCall("k", "a\r\nX-Evil: 1"))
    assert isinstance(outcome, Dead)
    assert outcome.reason is Reason.INVALID
    assert plane.requests == []


def test_a_server_id_that_would_bend_the_path_is_refused() -> None:
    with pytest.raises(ValueError):
        build(ControlPlane(), "a/b", "1", clock=lambda: 0.0, random=Random(), logger=Log())


@pytest.mark.parametrize("failure", [(503, {}), (200, b"<html>"), None])
async def test_a_failure_is_tried_again_at_most_twice_under_the_same_key(
    plane: Plane, failure: Reply
) -> None:
    notes = Notes()
    async with speaking(plane, notes=notes) as client:
        plane.replies = [failure, failure]
        assert await client.usage_record("s", b"{}", CALL) == DELIVERED
        assert plane.keys == [CALL.transaction_id] * 3
        plane.requests.clear()
        plane.otherwise = lambda request: failure
        outcome = await client.usage_record("s", b"{}", CALL)
        assert isinstance(outcome, Retry)
        assert outcome.cause in (Cause.TRANSIENT, Cause.UNCONFIRMED)
        assert plane.keys == [CALL.transaction_id] * 3
        assert client.last_error is not None
    cause = "connection" if failure is None else "status" if failure[0] == 503 else "unconfirmed"
    assert notes.retries == [("usage_records", cause)] * 4
    assert len(notes.requests) == client.requests_total == 6


@pytest.mark.parametrize("status", [400, 404, 409])
async def test_a_verdict_is_not_tried_again(plane: Plane, client: ControlPlaneClient, status: int) -> None:
    plane.replies = [(status, {})]
    await client.usage_record("s", b"{}", CALL)
    assert len(plane.requests) == 1


async def test_a_longer_wait_than_max_backoff_is_left_to_the_parking(plane: Plane) -> None:
    async with speaking(plane, max_backoff=1.0) as client:
        plane.replies = [(429, {}, {"Retry-After": "120"})]
        outcome = await client.usage_record("s", b"{}", CALL)
        assert isinstance(outcome, Retry)
        assert (outcome.cause, outcome.after) == (Cause.TRANSIENT, 120.0)
        assert len(plane.requests) == 1


async def test_a_short_wait_that_is_asked_for_is_kept(plane: Plane, client: ControlPlaneClient) -> None:
    plane.replies = [(503, {}, {"Retry-After": "1"})]
    loop = asyncio.get_running_loop()
    begun = loop.time()
    assert await client.usage_record("s", b"{}", CALL) == DELIVERED
    assert loop.time() - begun >= 1


async def test_stop_ends_the_pause_before_a_quick_retry(plane: Plane, client: ControlPlaneClient) -> None:
    plane.replies = [(503, {}, {"Retry-After": "9"})]
    delivering = asyncio.create_task(client.usage_record("s", b"{}", CALL))
    await plane.arrived.wait()
    client.stop()
    outcome = await asyncio.wait_for(delivering, 5)
    assert isinstance(outcome, Retry)
    assert outcome.after == 9.0


@pytest.mark.parametrize(
    ("reply", "want"),
    [
        ((200, {}), DELIVERED),
        ((400, {}), SPLIT),
        ((413, {}), SPLIT),
        ((422, {}), SPLIT),
        ((409, {}), SPLIT_ONE_BY_ONE),
        ((409, {"error": "conflict"}), SPLIT_ONE_BY_ONE),
    ],
)
async def test_a_batch_is_delivered_or_split(
    plane: Plane, client: ControlPlaneClient, reply: Reply, want: Any
) -> None:
    plane.replies = [reply]
    assert await client.usage_batch("s", b"{}", CALL) == want


async def test_duplicates_and_conflicts_are_told_apart(plane: Plane, client: ControlPlaneClient) -> None:
    plane.replies = [(409, {}), (409, {"error": "conflict"})]
    assert await client.usage_record("s", b"{}", CALL) == DUPLICATE
    outcome = await client.usage_record("s", b"{}", CALL)
    assert isinstance(outcome, Dead)
    assert outcome.reason is Reason.CONFLICT


# The breaker.


async def test_an_outage_opens_the_breaker_and_one_request_closes_it(plane: Plane) -> None:
    log = Log()
    async with speaking(plane, log) as client:
        plane.otherwise = lambda request: (503, {})
        for _ in range(2):
            await client.usage_record("s", b"{}", CALL)
        assert client.gate.breaker.state == "open"
        sent = len(plane.requests)
        outcome = await client.usage_record("s", b"{}", CALL)
        assert isinstance(outcome, Retry)
        assert (outcome.cause, outcome.http_status) == (Cause.HELD, None)
        assert len(plane.requests) == sent
        plane.otherwise = lambda request: (200, {})
        await client.gate.wait()
        outcomes = await asyncio.gather(*(client.usage_record("s", b"{}", CALL) for _ in range(10)))
        assert outcomes.count(DELIVERED) == 1
        assert client.gate.open
    assert [event for event, _ in log.lines] == ["unreachable", "recovered"]


async def test_quick_retries_end_when_the_breaker_opens(plane: Plane, client: ControlPlaneClient) -> None:
    plane.otherwise = lambda request: (503, {})
    outcomes = [await client.usage_record("s", b"{}", CALL) for _ in range(2)]
    assert {outcome.cause for outcome in outcomes if isinstance(outcome, Retry)} == {Cause.TRANSIENT}
    assert len(plane.requests) == 5


async def test_a_cancelled_probe_frees_its_slot(plane: Plane, client: ControlPlaneClient) -> None:
    plane.otherwise = lambda request: (503, {})
    for _ in range(2):
        await client.usage_record("s", b"{}", CALL)
    await client.gate.wait()
    probing = asyncio.create_task(client.usage_record("s", b"{}", CALL))
    await asyncio.sleep(0)
    assert client.gate.permits() == 0
    probing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probing
    assert client.gate.permits() == 1


# Holds.


async def test_a_refused_key_is_replaced_from_its_file_and_nothing_is_lost(
    plane: Plane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.control_plane.gate.FIRST_PROBE", 0.02)
    good = "the-new-key"

    def answer(request: Request) -> Reply:
        return (200, {"keys": []}) if request.headers["x-api-key"] == good else (401, {"you": KEY})

    file = tmp_path / "key"
    file.write_text(KEY)
    plane.otherwise = answer
    log = Log()
    async with speaking(plane, log, api_key=Secret(KEY, str(file))) as client:
        probing = asyncio.create_task(client.run_probe())
        outcome = await client.usage_record("s", b"{}", CALL)
        assert outcome == Retry(Cause.HELD, 'answered 401: {"you": "***"}', 401)
        assert client.gate.hold is not None
        assert client.gate.hold.kind == "auth"
        held = await client.usage_record("s", b"{}", CALL)
        assert isinstance(held, Retry)
        assert (held.cause, held.http_status) == (Cause.HELD, None)
        file.write_text(good)
        await asyncio.wait_for(client.gate.wait(), 10)
        assert await client.usage_record("s", b"{}", CALL) == DELIVERED
        client.stop()
        await asyncio.wait_for(probing, 5)
    assert [event for event, _ in log.lines] == ["held", "resumed"]
    assert KEY not in str(log.lines)
    paths = [request.path for request in plane.requests]
    assert paths.count("/api/v1/sessions/s/usage-records") == 2
    assert "/api/v1/servers/server-1/public-keys" in paths


def test_the_first_probe_goes_after_a_second() -> None:
    assert FIRST_PROBE == 1.0


async def test_an_entry_refused_again_after_a_passed_probe_is_not_found(
    plane: Plane, client: ControlPlaneClient
) -> None:
    plane.otherwise = lambda request: (200, {}) if request.method == "GET" else (403, {})
    outcome = await client.usage_record("s", b"{}", CALL)
    assert isinstance(outcome, Retry)
    assert (outcome.cause, outcome.http_status) == (Cause.HELD, 403)
    assert await client.probe()
    client.gate.lift()
    again = BatchCall(CALL.transaction_id, "corr-1", refused_before=True)
    outcome = await client.usage_record("s", b"{}", again)
    assert isinstance(outcome, Retry)
    assert (outcome.cause, outcome.http_status) == (Cause.NOT_FOUND, 403)
    assert client.gate.open


async def test_a_401_always_holds(plane: Plane, client: ControlPlaneClient) -> None:
    plane.otherwise = lambda request: (401, {})
    outcome = await client.usage_record("s", b"{}", BatchCall("k", "c", refused_before=True))
    assert isinstance(outcome, Retry)
    assert outcome.cause is Cause.HELD
    assert client.gate.hold is not None


@pytest.mark.parametrize("status", [302, 501])
async def test_a_fault_of_configuration_holds_and_says_which(
    plane: Plane, client: ControlPlaneClient, status: int
) -> None:
    plane.replies = [(status, b"", {"Location": "https://elsewhere.test/"})]
    outcome = await client.usage_record("s", b"{}", CALL)
    assert isinstance(outcome, Retry)
    assert (outcome.cause, outcome.http_status) == (Cause.HELD, status)
    assert client.gate.hold is not None
    assert client.gate.hold.kind == "configuration"
    assert client.gate.hold.detail == f"answered {status} to https://elsewhere.test/"


async def test_twenty_sessions_not_found_in_a_row_are_no_verdict_on_entries(
    plane: Plane, client: ControlPlaneClient
) -> None:
    plane.otherwise = lambda request: (404, {})
    outcomes = [await client.usage_record(f"s{n}", b"{}", CALL) for n in range(NOT_FOUND_STREAK + 1)]
    causes = [outcome.cause for outcome in outcomes if isinstance(outcome, Retry)]
    assert causes == [*[Cause.NOT_FOUND] * (NOT_FOUND_STREAK - 1), Cause.HELD, Cause.HELD]
    assert len(plane.requests) == NOT_FOUND_STREAK
    assert client.gate.hold is not None
    assert client.gate.hold.kind == "configuration"


async def test_an_untrusted_ca_is_an_auth_hold_that_ends_when_the_file_is_mended(
    plane: Plane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.control_plane.gate.FIRST_PROBE", 0.02)
    file = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(file))
    good = Path(plane.ca_file).read_bytes()  # noqa: ASYNC240
    async with speaking(plane, ca_file=str(file)) as client:
        probing = asyncio.create_task(client.run_probe())
        outcome = await client.usage_record("s", b"{}", CALL)
        assert isinstance(outcome, Retry)
        assert (outcome.cause, outcome.http_status) == (Cause.HELD, None)
        assert client.gate.hold is not None
        assert client.gate.hold.kind == "auth"
        file.write_bytes(good)
        await asyncio.wait_for(client.gate.wait(), 10)
        assert await client.usage_record("s", b"{}", CALL) == DELIVERED
        client.stop()
        await asyncio.wait_for(probing, 5)


async def test_a_client_that_cannot_be_made_is_a_configuration_hold(plane: Plane, tmp_path: Path) -> None:
    async with speaking(plane, ca_file=str(tmp_path / "none.pem")) as client:
        outcome = await client.usage_record("s", b"{}", CALL)
        assert isinstance(outcome, Retry)
        assert outcome.cause is Cause.HELD
        assert client.gate.hold is not None
        assert client.gate.hold.kind == "configuration"
        assert not await client.probe()


# Periodic calls.


PERIODIC = [
    ("register", ({"server_id": "server-1"},), "POST", "/api/v1/servers/register"),
    ("heartbeat", ({"status": "online"},), "PUT", "/api/v1/servers/server-1/heartbeat"),
    ("command_result", (b'{"success": true}',), "POST", "/api/v1/servers/server-1/command-results"),
    ("shutdown", ({"reason": "stop"},), "POST", "/api/v1/servers/server-1/shutdown"),
    ("public_keys", (), "GET", "/api/v1/servers/server-1/public-keys"),
    ("commands", (), "GET", "/api/v1/servers/server-1/commands"),
]


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize(("call", "arguments", "method", "path"), PERIODIC)
async def test_a_periodic_call_gives_the_unwrapped_object(
    plane: Plane,
    client: ControlPlaneClient,
    call: str,
    arguments: tuple[Any, ...],
    method: str,
    path: str,
    wrapped: bool,
) -> None:
    data = {"keys": [], "commands": [{"command_id": "c"}], "n": 1}
    plane.replies = [(200, {"success": True, "data": data} if wrapped else data)]
    want = data["commands"] if call == "commands" else data
    assert await getattr(client, call)(*arguments) == want
    (request,) = plane.requests
    assert (request.method, request.path) == (method, path)
    assert re.fullmatch(r"[0-9a-f-]{36}", request.headers["x-correlation-id"])
    assert ("content-type" in request.headers) == bool(arguments)
    if arguments:
        body = arguments[0]
        assert json.loads(request.body) == (json.loads(body) if isinstance(body, bytes) else body)


@pytest.mark.parametrize(
    ("reply", "want"),
    [
        ((503, {}, {"Retry-After": "30"}), errors.Transient),
        (None, errors.BrokenAnswer),
        ((200, b"<html>"), errors.Unconfirmed),
        ((200, {"success": False}), errors.Unconfirmed),
        ((401, {}), errors.AuthRefused),
        ((403, {}), errors.AuthRefused),
        ((404, {}), errors.NotFound),
        ((302, b""), errors.ConfigurationFault),
        ((422, {}), errors.Rejected),
    ],
)
async def test_a_periodic_call_is_tried_once_and_raises_and_holds_nobody_up(
    plane: Plane, client: ControlPlaneClient, reply: Reply, want: type[errors.ControlPlaneError]
) -> None:
    plane.replies = [reply]
    with pytest.raises(want) as raised:
        await client.heartbeat({})
    assert len(plane.requests) == 1
    assert client.connected == (want in (errors.NotFound, errors.Rejected))
    assert client.gate.hold is None
    assert raised.value.retry_after == (30.0 if reply is not None and reply[0] == 503 else None)
    assert client.last_error == str(raised.value)


async def test_a_periodic_call_that_is_refused_reads_the_key_again(plane: Plane, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("the-new-key")
    async with speaking(plane, api_key=Secret(KEY, str(file))) as client:
        plane.replies = [(403, {})]
        with pytest.raises(errors.AuthRefused):
            await client.heartbeat({})
        await client.heartbeat({})
    assert [request.headers["x-api-key"] for request in plane.requests] == [KEY, "the-new-key"]


async def test_periodic_calls_wait_for_the_breaker_and_the_heartbeat_may_be_its_probe(
    plane: Plane, client: ControlPlaneClient
) -> None:
    plane.otherwise = lambda request: (500, {})
    for _ in range(5):
        with pytest.raises(errors.Transient):
            await client.heartbeat({})
    with pytest.raises(errors.BreakerOpen) as raised:
        await client.heartbeat({})
    assert raised.value.retry_after is not None
    assert len(plane.requests) == 5
    plane.otherwise = lambda request: (200, {})
    await client.gate.wait()
    await client.heartbeat({})
    assert client.gate.open


async def test_periodic_calls_go_despite_a_hold(plane: Plane, client: ControlPlaneClient) -> None:
    plane.replies = [(403, {})]
    await client.usage_record("s", b"{}", CALL)
    assert client.gate.hold is not None
    await client.heartbeat({})


async def test_commands_are_objects_and_no_more_than_a_poll_can_take(
    plane: Plane, client: ControlPlaneClient
) -> None:
    plane.replies = [
        (200, {"commands": [{"n": n} for n in range(1000)]}),
        (200, {"commands": [1, {"n": 1}, None]}),
        (200, {}),
        (204, b""),
        (200, {"commands": "none"}),
    ]
    assert len(await client.commands()) == MOST_COMMANDS
    assert await client.commands() == [{"n": 1}]
    assert await client.commands() == []
    assert await client.commands() == []
    with pytest.raises(errors.Unconfirmed):
        await client.commands()


async def test_a_page_without_keys_is_no_key_set(plane: Plane, client: ControlPlaneClient) -> None:
    plane.replies = [(200, {"hello": "world"})]
    with pytest.raises(errors.Unconfirmed):
        await client.public_keys()


# The end.


async def test_close_waits_for_what_is_in_flight(plane: Plane, client: ControlPlaneClient) -> None:
    delivering = asyncio.create_task(client.usage_record("s", b"{}", CALL))
    await plane.arrived.wait()
    assert await client.close(5) == 0
    assert await delivering == DELIVERED
