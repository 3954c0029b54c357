"""A small HTTP/1.1 server for health and metrics: it answers GET and HEAD, and nothing makes it fall.

    accept ─▶ head (bounded, timed) ─▶ body (bounded, ignored) ─▶ route ─▶ answer ─▶ next request or close

It promises that a stranger can neither crash it nor hold it: rubbish gets 400, every wait has an end, and
connections are counted. Routes answer from memory, so that an answer waits for nothing but the event loop.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import ssl
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from email.utils import formatdate
from http import HTTPStatus
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

import h11
import msgspec

from common.config import Secret
from common.logs import get

HEAD_BYTES = 16 * 1024
BODY_BYTES = 16 * 1024
CONNECTIONS = 64
READ_BYTES = 4096

PART_SECONDS = 1.0
PART_READS = 64
"""How long, and how many reads, a peer has to notice our end of a connection before it is dropped."""

JSON = "application/json"

log = get("endpoints")

Address = IPv4Address | IPv6Address


class Request(msgspec.Struct, frozen=True):
    """One request. `headers`: names in lower case; of equal names the values in a row, joined by commas."""

    method: str
    path: str
    headers: Mapping[str, str]
    peer: Address | None


class Response(msgspec.Struct, frozen=True):
    """What a route answers."""

    body: bytes
    status: int = 200
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()


Route = Callable[[Request], Response | Awaitable[Response]]


class PortTaken(Exception):
    """A server cannot listen where the configuration says; the text names the key and the port."""

    def __init__(self, key: str, bind: str, port: int, why: str) -> None:
        super().__init__(f"{key}: expected a free port, got {port} on {bind} ({why})")
        self.key, self.bind, self.port = key, bind, port


def json_response(content: Any, status: int = 200, headers: tuple[tuple[str, str], ...] = ()) -> Response:
    return Response(msgspec.json.encode(content), status, headers=headers)


class Access:
    """Who may see more than the plain health: the holder of the key, or a peer from an allowed network.

    The peer is who the socket says it is: X-Forwarded-For is not believed. Without a key the networks decide.
    """

    def __init__(self, api_key: Secret, allow: Iterable[str]) -> None:
        self._api_key = api_key  # asked at every request: it may have been reloaded
        self._allow = [ip_network(cidr, strict=False) for cidr in allow]

    def guard(self, route: Route) -> Route:
        """The route for those who may, 401 for the others."""
        return lambda request: route(request) if self.permits(request) else UNAUTHORIZED

    def permits(self, request: Request) -> bool:
        return self._knows(request.peer) or any(map(self._matches, _credentials(request)))

    def _knows(self, peer: Address | None) -> bool:
        return peer is not None and any(peer in network for network in self._allow)

    def _matches(self, credential: str) -> bool:
        expected = self._api_key.reveal()
        return bool(expected) and hmac.compare_digest(credential.encode("latin-1"), expected.encode())


class Server:
    """One listening port with its routes; `key` is where the configuration names the port."""

    def __init__(
        self,
        bind: str,
        port: int,
        routes: Mapping[str, Route],
        *,
        key: str = "port",
        tls: ssl.SSLContext | None = None,
        head_seconds: float = 5.0,
        idle_seconds: float = 15.0,
    ) -> None:
        self._bind, self._port, self._key, self._tls = bind, port, key, tls
        self._routes = {_tidy(path): route for path, route in routes.items()}
        self._head_seconds, self._idle_seconds = head_seconds, idle_seconds
        self._conversations: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> int:
        """Listen, and return the port; raises PortTaken."""
        try:
            self._server = await asyncio.start_server(
                self._accept,
                self._bind,
                self._port,
                limit=HEAD_BYTES,
                ssl=self._tls,
                ssl_handshake_timeout=self._head_seconds if self._tls else None,
            )
        except (OSError, OverflowError) as error:
            raise PortTaken(self._key, self._bind, self._port, _why(error)) from None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def close(self) -> None:
        """Stop listening and end every conversation."""
        if self._server is not None:
            self._server.close()
        for conversation in self._conversations:
            conversation.cancel()
        await asyncio.gather(*self._conversations, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._conversations) >= CONNECTIONS:
            writer.write(
                b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
            )
            writer.close()
            return
        conversation = asyncio.create_task(
            self._converse(_Peer(reader, writer)), name="endpoint conversation"
        )
        self._conversations.add(conversation)
        conversation.add_done_callback(self._conversations.discard)

    async def _converse(self, peer: _Peer) -> None:
        """Answer one connection's requests in turn, until one side has had enough."""
        try:
            async with asyncio.timeout(self._head_seconds):
                more = await self._exchange(peer)
            while more:
                async with asyncio.timeout(self._idle_seconds):
                    await peer.wake()
                async with asyncio.timeout(self._head_seconds):
                    more = await self._exchange(peer)
            await peer.part()
        except (TimeoutError, OSError):
            pass  # too slow, or gone: nobody is left to be told
        except Exception:  # a fault of ours costs this conversation, not the listener
            log.exception("endpoint.failed")
        finally:
            peer.drop()

    async def _exchange(self, peer: _Peer) -> bool:
        """Read one request and answer it; False: it was the last of this connection."""
        try:
            request = await peer.request()
        except h11.RemoteProtocolError as error:
            return await peer.answer(_error(error.error_status_hint), last=True)
        return request is not None and await peer.answer(await self._answer(request))

    async def _answer(self, request: Request) -> Response:
        route = self._routes.get(request.path)
        if route is None:
            return NOT_FOUND
        if request.method not in ("GET", "HEAD"):
            return NOT_ALLOWED
        try:
            response = route(request)
            return await response if isinstance(response, Awaitable) else response
        except Exception:  # a route that stumbles is a 500, and said; the process goes on delivering
            log.exception("endpoint.failed", path=request.path)
            return FAILED


class _Peer:
    """One connection as HTTP/1.1 messages; h11 knows the grammar, this class the socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
        self._head_only = False
        self._address = _address(writer.get_extra_info("peername"))
        # Drained then means that the kernel has it all: no unread answer stays in memory.
        writer.transport.set_write_buffer_limits(0)

    async def wake(self) -> None:
        """Return when the next request begins, or the connection ends."""
        await asyncio.sleep(0)  # a peer that sends requests without a pause waits its turn like everyone else
        if not self._http.trailing_data[0]:
            await self._receive()

    async def request(self) -> Request | None:
        """The next request, or None when the peer has gone; raises h11.RemoteProtocolError for rubbish."""
        head = await self._event()
        if not isinstance(head, h11.Request):
            return None
        if not head.http_version.startswith(b"1."):
            raise h11.RemoteProtocolError("not HTTP/1", 505)
        size = 0
        while not self._http.they_are_waiting_for_100_continue:  # who asks first is answered without it
            match await self._event():
                case h11.Data(data=data):
                    size += len(data)
                    if size > BODY_BYTES:
                        raise h11.RemoteProtocolError("body too long", 413)
                case _:
                    break
        self._head_only = head.method == b"HEAD"
        headers: dict[str, str] = {}
        for name, value in head.headers:
            field, text = name.decode("latin-1"), value.decode("latin-1")
            headers[field] = f"{headers[field]}, {text}" if field in headers else text
        return Request(
            head.method.decode("latin-1"), _path(head.target.decode("latin-1")), headers, self._address
        )

    async def answer(self, response: Response, *, last: bool = False) -> bool:
        """Send a response; True when the connection may carry another request."""
        last = last or self._http.their_state is not h11.DONE
        headers = [
            ("Date", formatdate(usegmt=True)),
            ("Content-Type", response.content_type),
            ("Content-Length", str(len(response.body))),
            ("Cache-Control", "no-store"),
            *response.headers,
            *([("Connection", "close")] if last else []),
        ]
        reason = HTTPStatus(response.status).phrase.encode()
        self._send(h11.Response(status_code=response.status, headers=headers, reason=reason))
        if not self._head_only:
            self._send(h11.Data(data=response.body))
        self._send(h11.EndOfMessage())
        await self._writer.drain()
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True

    async def part(self) -> None:
        """End in order: say so, and let the peer's rest run out, lest a reset swallow our last answer."""
        if self._writer.can_write_eof():
            self._writer.write_eof()
        async with asyncio.timeout(PART_SECONDS):
            for _ in range(PART_READS):
                if not await self._reader.read(READ_BYTES):
                    return

    def drop(self) -> None:
        self._writer.transport.abort()

    async def _event(self) -> Any:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            await self._receive()
        return event

    async def _receive(self) -> None:
        self._http.receive_data(await self._reader.read(READ_BYTES))

    def _send(self, event: h11.Event) -> None:
        if data := self._http.send(event):
            self._writer.write(data)


def _error(status: int, headers: tuple[tuple[str, str], ...] = ()) -> Response:
    return json_response({"error": HTTPStatus(status).phrase.lower()}, status, headers)


UNAUTHORIZED = _error(401, (("WWW-Authenticate", 'Bearer realm="dataplane"'),))
NOT_FOUND = _error(404)
NOT_ALLOWED = _error(405, (("Allow", "GET, HEAD"),))
FAILED = _error(500)


def _credentials(request: Request) -> Iterator[str]:
    if (key := request.headers.get("x-api-key")) is not None:
        yield key
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        yield token.strip()


def _path(target: str) -> str:
    """The path of a request target, which may be absolute (`http://host/path`) and have a query."""
    if not target.startswith("/"):
        target = "/" + target.partition("://")[2].partition("/")[2]
    return _tidy(target.partition("?")[0])


def _tidy(path: str) -> str:
    return path.rstrip("/") or "/"


def _address(peername: Any) -> Address | None:
    """The peer's address, an IPv4 one also where the socket speaks IPv6; None where sockets have none."""
    if not isinstance(peername, tuple):
        return None
    address = ip_address(peername[0])
    return getattr(address, "ipv4_mapped", None) or address


def _why(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno and error.errno > 0:
        return os.strerror(error.errno)  # asyncio's own text repeats the address
    return str(error)
