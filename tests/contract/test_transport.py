"""The transport over real sockets and TLS, against servers that misbehave.

Each law here is one that any HTTP library in its place must keep.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import inspect
import os
import resource
import socket
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from pyreqwest import exceptions as foreign

from common.config import ControlPlane, Secret
from common.control_plane import errors
from common.control_plane.transport import ANSWER_LIMIT, BORDER, Transport, translated

KEY = "key-of-the-contract-test"
OK = b'HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n{"success":true}'


class Request:
    """What a server read: the first line, the headers in lower case, the body."""

    def __init__(self, line: str, headers: dict[str, str], body: bytes) -> None:
        self.line = line
        self.headers = headers
        self.body = body


class Server:
    """A raw server: what it does with a request is up to `answer`."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.connections = 0
        self.arrived = asyncio.Event()
        self.go = asyncio.Event()
        self.port = 0
        self.tls = False

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://localhost:{self.port}"


Script = Callable[[Server, asyncio.StreamWriter], Awaitable[Any]]


async def _read(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    line, *rest = head.strip().split("\r\n")
    headers = {name.lower(): value for name, value in (field.split(": ", 1) for field in rest)}
    return Request(line, headers, await reader.readexactly(int(headers.get("content-length", 0))))


@asynccontextmanager
async def serving(script: Script, tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    server = Server()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.connections += 1
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while not writer.is_closing():
                server.requests.append(await _read(reader))
                server.arrived.set()
                await script(server, writer)
        writer.close()

    listener = await asyncio.start_server(connected, "localhost", 0, family=socket.AF_INET, ssl=tls)
    server.port = listener.sockets[0].getsockname()[1]
    server.tls = tls is not None
    try:
        yield server
    finally:
        listener.close()


def says(data: bytes) -> Script:
    """Answers every request with these bytes and keeps the connection."""

    async def script(server: Server, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()

    return script


def ends(data: bytes, *, reset: bool = False) -> Script:
    """Sends these bytes, then ends the connection."""

    async def script(server: Server, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        if reset:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
        writer.close()

    return script


def waits(data: bytes = b"") -> Script:
    """Sends these bytes, then nothing until the test says `go`, then a good answer."""

    async def script(server: Server, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await server.go.wait()
        writer.write(OK)
        await writer.drain()

    return script


class Authority:
    """A CA with its file, and server contexts of its certificates."""

    def __init__(self, folder: Path, name: str) -> None:
        self.ca = trustme.CA()
        self.file = str(folder / f"{name}.pem")
        self.ca.cert_pem.write_to_path(self.file)
        self._folder = folder

    def context(
        self, name: str = "localhost", clients: Authority | None = None, **dates: Any
    ) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.ca.issue_cert(name, **dates).configure_cert(context)
        if clients is not None:
            clients.ca.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def client_files(self) -> dict[str, str]:
        leaf = self.ca.issue_cert("agent.test")
        cert, key = self._folder / "agent.pem", self._folder / "agent.key"
        cert.write_bytes(b"".join(part.bytes() for part in leaf.cert_chain_pems))
        leaf.private_key_pem.write_to_path(str(key))
        return {"cert_file": str(cert), "key_file": str(key)}


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ours")


@pytest.fixture
def theirs(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "theirs")


@asynccontextmanager
async def speaking(url: str, **settings: Any) -> AsyncIterator[Transport]:
    config = ControlPlane(base_url=url, **{"api_key": Secret(KEY), "timeout": 5.0, **settings})
    transport = Transport(config, "dataplane-agent/1.2.3")
    try:
        yield transport
    finally:
        await transport.close(0)


async def post(transport: Transport, path: str = "/api/v1/x", **kwargs: Any) -> Any:
    return await transport.send("POST", path, {"Idempotency-Key": "k-1"}, b'{"a":1}', **kwargs)


# The border.


def test_every_exception_of_the_installed_library_has_a_verdict() -> None:
    found = {
        member
        for _, member in inspect.getmembers(foreign, inspect.isclass)
        if issubclass(member, foreign.PyreqwestError)
    }
    assert found == set(BORDER)


@pytest.mark.parametrize("kind", [kind for kind in BORDER if kind is not foreign.JSONDecodeError])
def test_every_exception_of_the_library_becomes_a_transport_error(kind: type[foreign.PyreqwestError]) -> None:
    error = (
        kind("text", {"causes": None, "status": 500}) if kind is not foreign.PyreqwestError else kind("text")
    )
    assert isinstance(translated(error), BORDER[kind])


@pytest.mark.parametrize(
    ("cause", "want"),
    [
        ("invalid peer certificate: UnknownIssuer", errors.TlsFailed),
        ("received fatal alert: CertificateRequired", errors.TlsFailed),
        ("received fatal alert: UnknownCA", errors.TlsFailed),
        ("received fatal alert: HandshakeFailure", errors.TlsFailed),
        ("received fatal alert: InternalError", errors.ConnectFailed),
        ("Connection refused (os error 111)", errors.ConnectFailed),
    ],
)
def test_a_refused_certificate_is_told_from_a_refused_connection(
    cause: str, want: type[errors.TransportError]
) -> None:
    error = foreign.ConnectError("connection error", {"causes": [{"message": cause}]})
    assert type(translated(error)) is want


# What is sent.


async def test_a_request_arrives_as_it_was_sent() -> None:
    async with serving(says(OK)) as server, speaking(server.url) as transport:
        answer = await post(transport)
    assert (answer.status, answer.body, answer.truncated) == (200, b'{"success":true}', False)
    assert 0 < answer.seconds < 5
    (request,) = server.requests
    assert request.line == "POST /api/v1/x HTTP/1.1"
    assert request.body == b'{"a":1}'
    assert request.headers["x-api-key"] == KEY
    assert request.headers["user-agent"] == "dataplane-agent/1.2.3"
    assert request.headers["idempotency-key"] == "k-1"
    assert "referer" not in request.headers
    assert "accept-encoding" not in request.headers


async def test_a_base_url_with_a_path_and_a_slash_is_a_prefix() -> None:
    async with serving(says(OK)) as server, speaking(f"{server.url}/prefix/") as transport:
        await transport.send("GET", "/api/v1/y", {})
    assert server.requests[0].line == "GET /prefix/api/v1/y HTTP/1.1"


async def test_a_header_that_http_cannot_carry_is_not_sent() -> None:
    async with serving(says(OK)) as server, speaking(server.url) as transport:
        with pytest.raises(errors.NotARequest) as raised:
            await transport.send("POST", "/", {"X-Correlation-ID": "a\r\nX-Evil: 1"}, b"")
    assert "Evil" not in str(raised.value)
    assert server.connections == 0


async def test_a_connection_is_kept_and_used_again() -> None:
    async with serving(says(OK)) as server, speaking(server.url) as transport:
        for _ in range(5):
            await post(transport)
    assert server.connections == 1


async def test_a_key_that_was_replaced_is_used_after_renew(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("new-key")
    secret = Secret(KEY, str(file))
    async with serving(says(OK)) as server, speaking(server.url, api_key=secret) as transport:
        await post(transport)
        assert secret.reload()
        transport.renew()
        await post(transport)
    assert [request.headers["x-api-key"] for request in server.requests] == [KEY, "new-key"]


async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(ends(b"")) as proxy, serving(says(OK)) as server:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        async with speaking(server.url) as transport:
            assert (await post(transport)).status == 200
    assert proxy.connections == 0


async def test_a_redirect_is_an_answer_and_the_key_goes_nowhere_else() -> None:
    async with serving(says(OK)) as other:
        redirect = f"HTTP/1.1 307 T\r\nLocation: {other.url}/y\r\nContent-Length: 0\r\n\r\n"
        async with serving(says(redirect.encode())) as server, speaking(server.url) as transport:
            answer = await post(transport)
    assert (answer.status, answer.location) == (307, f"{other.url}/y")
    assert other.connections == 0


# What comes back, or does not.


@pytest.mark.parametrize("status", [200, 204, 299, 404, 409, 429, 500, 503, 999])
async def test_every_status_is_an_answer(status: int) -> None:
    text = b"" if status == 204 else b"Content-Length: 2\r\n"
    body = b"" if status == 204 else b"{}"
    data = f"HTTP/1.1 {status} S\r\nRetry-After: 7\r\n".encode() + text + b"\r\n" + body
    async with serving(says(data)) as server, speaking(server.url) as transport:
        answer = await post(transport)
    assert (answer.status, answer.body) == (status, body)
    assert answer.retry_after == (None if status < 300 else "7")


async def test_a_chunked_answer_is_read_whole() -> None:
    data = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n"
    async with serving(says(data)) as server, speaking(server.url) as transport:
        assert (await post(transport)).body == b"{}"


@pytest.mark.parametrize("length", [b"Content-Length: 209715200\r\n", b""])
async def test_a_huge_answer_is_read_up_to_the_limit_only(length: bytes) -> None:
    sent = 0

    async def script(server: Server, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\n" + length + b"\r\n")
        for _ in range(200):
            writer.write(bytes(1024 * 1024))
            await writer.drain()
            sent += 1
        writer.close()

    async with serving(script) as server, speaking(server.url) as transport:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answer = await post(transport)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert answer.truncated
    assert len(answer.body) == ANSWER_LIMIT
    assert sent < 50
    assert grown < 60_000


@pytest.mark.parametrize(
    ("script", "want"),
    [
        (ends(b""), errors.BrokenAnswer),
        (ends(b"", reset=True), errors.BrokenAnswer),
        (ends(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"), errors.BrokenAnswer),
        (ends(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", reset=True), errors.BrokenAnswer),
        (ends(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n"), errors.BrokenAnswer),
        (ends(b"SSH-2.0-OpenSSH_9.9\r\n"), errors.BrokenAnswer),
        (ends(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 2_000_000), errors.BrokenAnswer),
    ],
    ids=["FIN", "RST", "FIN in body", "RST in body", "bad chunk", "garbage", "endless header"],
)
async def test_an_answer_that_breaks_off_is_an_error_and_nothing_is_sent_twice(
    script: Script, want: type[errors.TransportError]
) -> None:
    async with serving(script) as server, speaking(server.url) as transport:
        with pytest.raises(want):
            await post(transport)
    assert len(server.requests) == 1
    assert transport.in_flight == 0


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"])
async def test_silence_ends_with_the_timeout(data: bytes) -> None:
    async with serving(waits(data)) as server, speaking(server.url, timeout=0.2) as transport:
        with pytest.raises(errors.TimedOut) as raised:
            await post(transport)
    assert 0.1 < raised.value.seconds < 2


async def test_a_request_may_have_a_timeout_of_its_own() -> None:
    async with serving(waits()) as server, speaking(server.url, timeout=60.0) as transport:
        with pytest.raises(errors.TimedOut):
            await post(transport, timeout=0.1)


async def test_a_refused_connection_and_an_unknown_name_are_failed_connections() -> None:
    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        for url in (f"http://localhost:{unused.getsockname()[1]}", "http://nowhere.invalid"):
            async with speaking(url) as transport:
                with pytest.raises(errors.ConnectFailed):
                    await post(transport)


async def test_a_connection_that_the_server_closed_while_idle_is_not_used_again() -> None:
    async with serving(ends(OK)) as server, speaking(server.url) as transport:
        for _ in range(3):
            assert (await post(transport)).status == 200
            await asyncio.sleep(0.05)  # until the FIN is here: nothing in the process tells of it
    assert server.connections == 3


# TLS.


async def test_the_configured_ca_is_trusted(ours: Authority) -> None:
    async with (
        serving(says(OK), ours.context()) as server,
        speaking(server.url, ca_file=ours.file) as transport,
    ):
        assert (await post(transport)).status == 200


@pytest.mark.parametrize("ca_file", [None, "theirs"])
async def test_an_unknown_ca_is_refused_and_the_key_stays_here(
    ours: Authority, theirs: Authority, ca_file: str | None
) -> None:
    async with (
        serving(says(OK), ours.context()) as server,
        speaking(server.url, ca_file=ca_file and theirs.file) as transport,
    ):
        with pytest.raises(errors.TlsFailed, match="UnknownIssuer"):
            await post(transport)
    assert server.requests == []


async def test_a_certificate_for_another_name_is_refused(ours: Authority) -> None:
    async with (
        serving(says(OK), ours.context("elsewhere.test")) as server,
        speaking(server.url, ca_file=ours.file) as transport,
    ):
        with pytest.raises(errors.TlsFailed, match="not valid for name"):
            await post(transport)


async def test_an_expired_certificate_is_refused(ours: Authority) -> None:
    long_ago = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    context = ours.context(not_before=long_ago, not_after=long_ago + datetime.timedelta(days=1))
    async with serving(says(OK), context) as server, speaking(server.url, ca_file=ours.file) as transport:
        with pytest.raises(errors.TlsFailed, match="expired"):
            await post(transport)


async def test_ca_files_of_the_environment_do_not_matter_and_stay_as_they_were(
    ours: Authority, theirs: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", ours.file)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    async with serving(says(OK), ours.context()) as server:
        for ca_file in (None, theirs.file):
            async with speaking(server.url, ca_file=ca_file) as transport:
                with pytest.raises(errors.TlsFailed):
                    await post(transport)
    assert os.environ["SSL_CERT_FILE"] == ours.file
    assert "SSL_CERT_DIR" not in os.environ


async def test_a_client_certificate_is_shown(ours: Authority, theirs: Authority) -> None:
    context = ours.context(clients=theirs)
    files = theirs.client_files()
    async with (
        serving(says(OK), context) as server,
        speaking(server.url, ca_file=ours.file, **files) as transport,
    ):
        assert (await post(transport)).status == 200


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_server_that_refuses_our_certificate_is_a_tls_failure(
    ours: Authority, theirs: Authority, version: ssl.TLSVersion
) -> None:
    context = ours.context(clients=theirs)
    context.minimum_version = context.maximum_version = version

    def refuse(listener: socket.socket) -> None:
        # A plain socket: asyncio's own TLS server hangs up without sending its alert.
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            context.wrap_socket(connection, server_side=True).recv(1)

    with socket.create_server(("localhost", 0)) as listener:
        refusing = threading.Thread(target=refuse, args=(listener,))
        refusing.start()
        url = f"https://localhost:{listener.getsockname()[1]}"
        async with speaking(url, ca_file=ours.file) as transport:
            with pytest.raises(errors.TransportError) as raised:
                await post(transport)
        await asyncio.to_thread(refusing.join)
    # After a TLS 1.3 handshake the reset may overtake the alert: then it is a lost connection, tried again.
    allowed = (
        errors.TlsFailed if version is ssl.TLSVersion.TLSv1_2 else errors.TlsFailed | errors.BrokenAnswer
    )
    assert isinstance(raised.value, allowed)


@pytest.mark.parametrize("content", [None, "no certificate in here"])
async def test_a_ca_file_that_is_none_cannot_be_sent_with_until_it_is_one(
    ours: Authority, tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "ca.pem"
    good = ours.ca.cert_pem.bytes()
    if content is not None:
        file.write_text(content)
    async with (
        serving(says(OK), ours.context()) as server,
        speaking(server.url, ca_file=str(file)) as transport,
    ):
        with pytest.raises(errors.CannotSend):
            await post(transport)
        file.write_bytes(good)
        assert (await post(transport)).status == 200


async def test_a_certificate_without_its_key_cannot_be_sent_with(ours: Authority, theirs: Authority) -> None:
    files = {**ours.client_files(), "key_file": ours.file}
    async with speaking("https://localhost:1", ca_file=ours.file, **files) as transport:
        with pytest.raises(errors.CannotSend):
            await post(transport)


# HTTP/2.


async def _speak_http2(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """As little of HTTP/2 as answers 200 with `{}` to every request."""

    def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
        return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload

    await reader.readexactly(len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
    writer.write(frame(4, 0, 0))
    with contextlib.suppress(asyncio.IncompleteReadError, OSError):
        while True:
            head = await reader.readexactly(9)
            await reader.readexactly(int.from_bytes(head[:3], "big"))
            kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big")
            if kind == 4 and not flags & 1:
                writer.write(frame(4, 1, 0))
            elif kind in (0, 1) and flags & 1:  # the request has ended: :status 200, then the body
                writer.write(frame(1, 4, stream, b"\x88") + frame(0, 1, stream, b"{}"))
    writer.close()


async def test_http2_is_spoken_where_offered_over_one_connection(ours: Authority) -> None:
    context = ours.context()
    context.set_alpn_protocols(["h2", "http/1.1"])
    connections = 0

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await _speak_http2(reader, writer)

    listener = await asyncio.start_server(connected, "localhost", 0, family=socket.AF_INET, ssl=context)
    async with (
        listener,
        speaking(f"https://localhost:{listener.sockets[0].getsockname()[1]}", ca_file=ours.file) as t,
    ):
        await post(t)
        answers = await asyncio.gather(*(post(t) for _ in range(50)))
        assert {(answer.status, answer.body) for answer in answers} == {(200, b"{}")}
        assert connections == 1
        await t.close(0)


# Cancellation and the end.


async def test_a_cancelled_callers_request_runs_on() -> None:
    async with serving(waits()) as server, speaking(server.url) as transport:
        caller = asyncio.create_task(post(transport))
        await server.arrived.wait()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert transport.in_flight == 0
        server.go.set()
        assert (await post(transport)).status == 200


async def test_close_waits_for_what_is_in_flight() -> None:
    async with serving(waits()) as server, speaking(server.url) as transport:
        caller = asyncio.create_task(post(transport))
        await server.arrived.wait()
        closing = asyncio.create_task(transport.close(5))
        await asyncio.sleep(0)
        server.go.set()
        assert await closing == 0
        assert (await caller).status == 200


async def test_close_gives_up_after_its_timeout_and_says_how_many() -> None:
    async with serving(waits()) as server, speaking(server.url) as transport:
        callers = [asyncio.create_task(post(transport)) for _ in range(3)]
        await server.arrived.wait()
        assert await transport.close(0.05) == 3
        for caller in callers:
            with pytest.raises(errors.BrokenAnswer):
                await caller


async def test_nothing_is_sent_after_close() -> None:
    async with serving(says(OK)) as server, speaking(server.url) as transport:
        await transport.close(0)
        with pytest.raises(errors.ConnectFailed):
            await post(transport)
    assert server.connections == 0


def test_the_library_takes_no_huge_pages_which_cost_11_mb_a_process() -> None:
    program = "import common.control_plane.transport; print(open('/proc/self/status').read())"
    environment = {name: value for name, value in os.environ.items() if name != "MIMALLOC_ALLOW_THP"}
    told = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "THP_enabled:\t0" in told.stdout


async def test_the_client_and_its_threads_are_made_with_the_first_request_hence_after_a_fork() -> None:
    async with speaking("http://localhost:1") as transport:
        assert transport._client is None
        with pytest.raises(errors.ConnectFailed):
            await post(transport)
        assert transport._client is not None
