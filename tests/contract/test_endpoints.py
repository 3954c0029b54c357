from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from common.config import Secret
from common.endpoints import (
    BODY_BYTES,
    CONNECTIONS,
    Access,
    PortTaken,
    Request,
    Response,
    Route,
    Server,
    json_response,
)


def echo(request: Request) -> Response:
    return json_response({"path": request.path, "method": request.method, "peer": str(request.peer)})


async def later(request: Request) -> Response:
    await asyncio.sleep(0)
    return echo(request)


def broken(_: Request) -> Response:
    raise RuntimeError("a fault of ours")


async def never(_: Request) -> Response:
    answer: Response = await asyncio.get_running_loop().create_future()
    return answer


def large(_: Request) -> Response:
    return Response(b"x" * 30_000_000, content_type="text/plain")


ROUTES: dict[str, Route] = {
    "/health": echo,
    "/health/detailed": echo,
    "/later": later,
    "/broken": broken,
    "/never": never,
    "/large": large,
}


@pytest.fixture
async def serve() -> AsyncIterator[Callable[..., Any]]:
    servers: list[Server] = []

    async def start(routes: dict[str, Route] = ROUTES, **options: Any) -> int:
        servers.append(Server("127.0.0.1", 0, routes, **options))
        return await servers[-1].start()

    yield start
    for server in servers:
        await server.close()


@pytest.fixture
async def port(serve: Callable[..., Any]) -> int:
    started: int = await serve()
    return started


@pytest.fixture
async def client(port: int) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as one:
        yield one


async def raw(port: int, data: bytes, *, end: bool = False) -> bytes:
    """Send bytes and return all that comes back until the server ends the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    if end:
        writer.write_eof()
    try:
        async with asyncio.timeout(10):
            return await reader.read()
    finally:
        writer.close()


async def well(port: int) -> bool:
    return (await raw(port, b"GET /health HTTP/1.0\r\n\r\n")).startswith(b"HTTP/1.1 200 OK\r\n")


# -- answers


@pytest.mark.parametrize("path", ["/health", "/health/", "/health?verbose=1", "/health/?a=/b/"])
async def test_a_path_is_found_with_and_without_a_trailing_slash(
    client: httpx.AsyncClient, path: str
) -> None:
    response = await client.get(path)
    assert response.status_code == 200
    assert response.json() == {"path": "/health", "method": "GET", "peer": "127.0.0.1"}
    assert response.headers["content-type"] == "application/json"
    assert response.headers["cache-control"] == "no-store"
    assert "date" in response.headers


@pytest.mark.parametrize(
    "path", ["/", "/healthy", "/health/x", "//health", "/HEALTH", "/%2e%2e/etc/passwd", "/a" * 4000]
)
async def test_any_other_path_is_404_in_json(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(path)
    assert (response.status_code, response.json()) == (404, {"error": "not found"})


async def test_a_route_may_be_a_coroutine(client: httpx.AsyncClient) -> None:
    assert (await client.get("/later")).json()["path"] == "/later"


async def test_head_is_get_without_the_body(client: httpx.AsyncClient) -> None:
    get, head = await client.get("/health"), await client.head("/health")
    assert (head.status_code, head.content) == (200, b"")
    assert abs(int(head.headers["content-length"]) - len(get.content)) == 1  # the method is one letter longer


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
async def test_other_methods_are_refused_and_the_connection_lives_on(
    client: httpx.AsyncClient, method: str
) -> None:
    response = await client.request(method, "/health", content=b"x" * 1000)
    assert response.status_code == 405
    assert response.headers["allow"] == "GET, HEAD"
    assert (await client.get("/health")).status_code == 200


async def test_one_connection_carries_many_requests_also_pipelined(port: int) -> None:
    request = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = await raw(port, request * 20, end=True)
    assert answer.count(b"HTTP/1.1 200 OK") == 20


async def test_an_absolute_target_is_understood(port: int) -> None:
    answer = await raw(port, b"GET http://host/health/?q HTTP/1.1\r\nHost: host\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")


async def test_http_1_0_is_answered_and_closed(port: int) -> None:
    answer = await raw(port, b"GET /health HTTP/1.0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"Connection: close" in answer


async def test_a_route_that_fails_is_500_and_tells_nothing(client: httpx.AsyncClient) -> None:
    response = await client.get("/broken")
    assert (response.status_code, response.json()) == (500, {"error": "internal server error"})
    assert (await client.get("/health")).status_code == 200


# -- rubbish, floods and sloths


@pytest.mark.parametrize(
    ("rubbish", "status"),
    [
        (b"\x00" * 100 + b"\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 4 + b"\r\n\r\n", 400),
        (b"GET /health\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n", 505),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 40_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n" + b"x" * 99_999, 413),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n", 200),
        (b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n", 200),
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    ],
)
async def test_rubbish_is_answered_and_the_connection_ended(port: int, rubbish: bytes, status: int) -> None:
    answer = await raw(port, rubbish)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"connection: close" in answer.lower()
    assert await well(port)


@pytest.mark.parametrize(
    "cut",
    [b"", b"G", b"GET /health HTTP/1.1\r\nHos", b"POST /health HTTP/1.0\r\nContent-Length: 9\r\n\r\nab"],
)
async def test_a_peer_that_leaves_in_the_middle_is_let_go(port: int, cut: bytes) -> None:
    await raw(port, cut, end=True)
    assert await well(port)


async def test_a_peer_that_resets_is_let_go(port: int) -> None:
    for _ in range(20):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 50)
        writer.transport.abort()
    assert await well(port)


async def test_a_bounded_body_is_read_and_ignored(client: httpx.AsyncClient) -> None:
    response = await client.request("GET", "/health", content=b"x" * BODY_BYTES)
    assert response.status_code == 200
    assert (await client.request("GET", "/health", content=b"x" * (BODY_BYTES + 1))).status_code == 413


async def test_who_dawdles_over_a_head_is_cut_off(serve: Callable[..., Any]) -> None:
    port = await serve(head_seconds=0.1)
    assert await raw(port, b"GET /health HTTP/1.1\r\nHost") == b""
    assert await raw(port, b"") == b""
    assert await raw(port, b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n") == b""


async def test_who_idles_after_an_answer_is_cut_off(serve: Callable[..., Any]) -> None:
    port = await serve(idle_seconds=0.1)
    answer = await raw(port, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.count(b"200 OK") == 1


async def test_who_does_not_read_its_answer_is_cut_off(serve: Callable[..., Any]) -> None:
    port = await serve(head_seconds=0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
    writer.write(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
    assert await raw(port, b"GET /never HTTP/1.0\r\n\r\n") == b""  # began later, has ended by the same bound
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await reader.readexactly(31_000_000)
    writer.close()
    assert await well(port)


async def test_connections_are_bounded_and_come_free_again(port: int) -> None:
    holders = [await asyncio.open_connection("127.0.0.1", port) for _ in range(CONNECTIONS)]
    for reader, writer in holders:  # each has its place when it has its answer
        writer.write(b"HEAD /health HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
    assert (await raw(port, b"")).startswith(b"HTTP/1.1 503 ")
    for reader, writer in holders:
        writer.write_eof()
        await reader.read()
        writer.close()
    assert await well(port)


async def test_closing_ends_every_connection() -> None:
    server = Server("127.0.0.1", 0, ROUTES)
    port = await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"HEAD /health HTTP/1.1\r\nHost: x\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    waiting = asyncio.create_task(raw(port, b"GET /never HTTP/1.1\r\nHost: x\r\n\r\n"))
    await server.close()
    assert await reader.read() == b""
    writer.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)
    await asyncio.gather(waiting, return_exceptions=True)


# -- ports


async def test_port_0_is_a_free_port_and_a_taken_one_is_a_fault_that_names_it(port: int) -> None:
    assert port > 0
    with pytest.raises(PortTaken) as fault:
        await Server("127.0.0.1", port, ROUTES, key="monitoring.metrics_port").start()
    assert str(fault.value) == (
        f"monitoring.metrics_port: expected a free port, got {port} on 127.0.0.1 (Address already in use)"
    )


@pytest.mark.parametrize(("bind", "port"), [("127.0.0.1", 70_000), ("192.0.2.1", 0), ("no such host", 0)])
async def test_a_place_where_nobody_can_listen_is_a_fault_too(bind: str, port: int) -> None:
    with pytest.raises(PortTaken, match="health_check_port"):
        await Server(bind, port, ROUTES, key="monitoring.health_check_port").start()


async def test_it_speaks_tls_when_it_is_given_a_context(serve: Callable[..., Any]) -> None:
    authority = trustme.CA()
    ours, theirs = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(ours)
    authority.configure_trust(theirs)
    port = await serve(tls=ours, head_seconds=1.0)
    async with httpx.AsyncClient(verify=theirs, trust_env=False) as client:
        assert (await client.get(f"https://127.0.0.1:{port}/health")).status_code == 200
    assert not (await raw(port, b"GET /health HTTP/1.0\r\n\r\n")).startswith(b"HTTP")


# -- access


def request_from(peer: str, **headers: str) -> Request:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Request("GET", "/metrics", named, ip_address(peer))


async def guarded(serve: Callable[..., Any], key: Secret, *allow: str) -> httpx.AsyncClient:
    port = await serve({"/metrics": Access(key, allow).guard(echo)})
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"X-API-Key": "s3cret"}, 200),
        ({"x-api-key": "s3cret"}, 200),
        ({"Authorization": "Bearer s3cret"}, 200),
        ({"Authorization": "bearer s3cret"}, 200),
        ({"Authorization": "Basic s3cret"}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Authorization": "s3cret"}, 401),
        ({"X-API-Key": ""}, 401),
        ({"X-API-Key": "s3cre"}, 401),
        ({"X-API-Key": "s3cret2"}, 401),
        ({"X-API-Key": "wrong", "Authorization": "Bearer s3cret"}, 200),
        ({"X-API-Key": b"\xff\xfe"}, 401),
        ({"X-Forwarded-For": "10.0.0.1", "X-Real-IP": "10.0.0.1", "Forwarded": "for=10.0.0.1"}, 401),
    ],
)
async def test_metrics_want_the_key_in_either_header(
    serve: Callable[..., Any], headers: dict[str, Any], status: int
) -> None:
    async with await guarded(serve, Secret("s3cret"), "10.0.0.0/8") as client:
        response = await client.get("/metrics", headers=headers)
    assert response.status_code == status
    if status == 401:
        assert response.headers["www-authenticate"].startswith("Bearer")
        assert response.json() == {"error": "unauthorized"}


async def test_an_allowed_address_needs_no_key(serve: Callable[..., Any]) -> None:
    async with await guarded(serve, Secret("s3cret"), "127.0.0.0/8") as client:
        assert (await client.get("/metrics")).status_code == 200
        assert (await client.get("/metrics", headers={"X-API-Key": "wrong"})).status_code == 200


@pytest.mark.parametrize("headers", [{}, {"X-API-Key": ""}, {"Authorization": "Bearer"}])
async def test_without_a_key_only_the_allowed_addresses_may(
    serve: Callable[..., Any], headers: dict[str, str]
) -> None:
    async with await guarded(serve, Secret(""), "10.0.0.0/8") as client:
        assert (await client.get("/metrics", headers=headers)).status_code == 401


async def test_a_key_may_be_any_text_and_be_reloaded(serve: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("new")
    key = Secret("schlüssel", str(file))
    old, new = {b"X-API-Key": "schlüssel".encode()}, {b"X-API-Key": b"new"}
    async with await guarded(serve, key) as client:
        assert (await client.get("/metrics", headers=old)).status_code == 200
        assert key.reload()
        assert (await client.get("/metrics", headers=old)).status_code == 401
        assert (await client.get("/metrics", headers=new)).status_code == 200


@pytest.mark.parametrize(
    ("peer", "allow", "permitted"),
    [
        ("127.0.0.1", ["127.0.0.0/8", "::1/128"], True),
        ("::1", ["127.0.0.0/8", "::1/128"], True),
        ("::2", ["127.0.0.0/8", "::1/128"], False),
        ("10.1.2.3", ["10.1.2.3"], True),
        ("10.1.2.4", ["10.1.2.3"], False),
        ("10.1.2.4", ["10.1.2.3/16"], True),  # host bits set: the network is meant
        ("10.1.2.4", [], False),
        ("fe80::1%eth0", ["fe80::/10"], True),
    ],
)
def test_networks_allow_by_the_peers_address(peer: str, allow: list[str], permitted: bool) -> None:
    assert Access(Secret(""), allow).permits(request_from(peer)) == permitted


async def test_an_ipv4_peer_on_an_ipv6_socket_is_judged_as_ipv4(serve: Callable[..., Any]) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no dual-stack sockets")
    server = Server("127.0.0.1", 0, {"/metrics": Access(Secret(""), ["127.0.0.0/8"]).guard(echo)})
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listening:
        dual = await asyncio.start_server(server._accept, sock=listening)
        answer = await raw(listening.getsockname()[1], b"GET /metrics HTTP/1.0\r\n\r\n")
        dual.close()
        await server.close()
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["peer"] == "127.0.0.1"
