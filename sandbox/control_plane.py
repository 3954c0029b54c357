"""A ControlPlane good enough to integrate against: the ten calls of contract section 3, over TLS.

    request -> noted as an arrival -> faults that strike before -> key, shape, judgement, one transaction in
    the ledger -> faults that strike after -> answer, noted

It honours the idempotency key: a transaction id is recorded once; delivered again it is a duplicate, with
other content a conflict. Of a batch that holds one record already recorded nothing is recorded: it answers
409, and the agent sends record by record. Tests, the page and the command line steer it by the admin port
(`sandbox.admin`), which speaks plain HTTP and stays up while the ControlPlane itself is made to fail.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import socket
import ssl
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self
from uuid import uuid4

import msgspec
from aiohttp import web

from sandbox import admin, wire
from sandbox.calls import CALLS, ENDPOINTS, Call, Judge, Refusal, read
from sandbox.faults import Fault, Faults
from sandbox.keys import Command, Keyring
from sandbox.ledger import ControlPlaneBook, Ledger, RecordKind, Verdict
from sandbox.tls import Authority


class Settings(msgspec.Struct, forbid_unknown_fields=True):
    """What the ControlPlane does where the contract leaves it a choice; may be changed while it runs."""

    duplicate_status: Literal[200, 409] = 409
    strict_sessions: bool = False  # usage and quota of a session nobody started: 404
    bare: bool = False  # answers without the {"success", "data", "timestamp"} around them
    quota_amount: int = 3600
    grants_per_session: int = 100  # the last of them is final


class Stats(msgspec.Struct):
    """The figures of the moment. `answers`: endpoint -> status -> records; status 0: the caller was gone."""

    arrivals: int
    answers: dict[str, dict[str, int]]
    recorded: dict[str, int]
    duplicates: int
    conflicts: int
    refused: int
    credits: int
    sessions: dict[str, int]
    order_violations: int
    grants: int
    grants_repeated: int
    servers: dict[str, int]
    faults: int
    outage: bool
    uptime_seconds: float


class ControlPlane:
    """The server. `async with ControlPlane() as cp` serves on free ports until the block ends.

    `api_keys` may be changed at any time; `ledger`, `faults`, `keyring`, `settings` are what it works with.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        admin_host: str = "127.0.0.1",
        admin_port: int = 0,
        api_key: str | None = None,
        ca_file: Path | str | None = None,
        names: Sequence[str] = (),
        tls: bool = True,
        client_certificates: bool = False,
        db: Path | str | None = None,
        issuer: str = "control-plane",
        settings: Settings | None = None,
        chance: random.Random | None = None,
    ) -> None:
        self.host, self.port = host, port
        self.admin_host, self.admin_port = admin_host, admin_port
        self.api_key = api_key or secrets.token_urlsafe(24)
        self.api_keys = {self.api_key}
        self.settings = settings or Settings()
        self.ledger = Ledger(Path(db) if db else None)
        self.keyring = Keyring(issuer)
        self._judge = Judge(self)
        self.faults = Faults(ENDPOINTS, chance or random.Random())
        self._ca_file = Path(ca_file) if ca_file else None
        self._names = [*names, "localhost", "127.0.0.1", "::1"]
        self._tls, self._client_certificates = tls, client_certificates
        self._context: ssl.SSLContext | None = None
        self._listener: asyncio.Server | None = None
        self._outage: asyncio.Task[None] | None = None
        self._showing: asyncio.Task[None] | None = None
        self._waiters: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self.requests: Counter[str] = Counter()
        """Requests by endpoint, and all of them as `*`."""
        self._started = time.monotonic()

    # Running

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            stack.callback(self.ledger.close)
            if self._ca_file is None:
                directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="sandbox-"))
                self._ca_file = Path(directory) / "ca.pem"
            if self._tls:
                self._context = self.authority.server_context(
                    self._names, client_certificates=self._client_certificates
                )
            self._runner = await _set_up(stack, self._application())
            stack.callback(self._cut_off)
            await self._listen(_bound(self.host, self.port))
            admin_runner = await _set_up(stack, admin.application(self))
            admin_socket = _bound(self.admin_host, self.admin_port)
            self.admin_port = admin_socket.getsockname()[1]
            await web.SockSite(admin_runner, admin_socket).start()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in (self._outage, self._showing):
            if task is not None:
                task.cancel()
        self.faults.clear()
        await self._stack.aclose()

    @property
    def authority(self) -> Authority:
        """The CA that signs this server's certificate; it can issue client certificates."""
        return Authority(self.ca_file)

    @property
    def ca_file(self) -> Path:
        if self._ca_file is None:
            raise RuntimeError("the sandbox is not running")
        return self._ca_file

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://{_reachable(self.host)}:{self.port}"

    @property
    def admin_url(self) -> str:
        return f"http://{_reachable(self.admin_host)}:{self.admin_port}"

    async def _listen(self, bound: socket.socket) -> None:
        self.port = bound.getsockname()[1]
        server = self._runner.server
        assert server is not None
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(server, sock=bound, ssl=self._context, backlog=1024)

    def _cut_off(self) -> None:
        """Close the port, and every connection without a word."""
        if self._listener is not None:
            self._listener.close()
        self._cut_connections()

    def _cut_connections(self) -> None:
        server = self._runner.server
        assert server is not None
        for connection in server.connections:
            if connection.transport is not None:
                connection.transport.abort()

    # Steering: what the admin port and in-process tests do.

    def fault(self, kind: str, endpoint: str = "*", **fields: Any) -> Fault:
        """Put one fault in force (fields of sandbox.faults.Fault); `outage` begins at once."""
        return self.add_fault(msgspec.convert({"kind": kind, "endpoint": endpoint, **fields}, Fault))

    def add_fault(self, fault: Fault) -> Fault:
        self.faults.add(fault)
        if fault.kind == "outage" and not self.down:
            self._cut_off()
            self._outage = asyncio.create_task(self._stay_away())
        if fault.kind == "certificate":
            self._show(fault)
        return fault

    def clear_faults(self) -> None:
        """Lift all faults; an outage ends."""
        self.faults.clear()

    def outage(self, seconds: float | None = None) -> asyncio.Task[None]:
        """Refuse connections for `seconds`, or until the faults are cleared; await it for the end."""
        self.fault("outage", seconds=seconds)
        assert self._outage is not None
        return self._outage

    async def _stay_away(self) -> None:
        """Refuse connections as long as a rule says so, and serve again on the same port."""
        while True:
            # Bound but not listening: connections are refused, and nobody else can take the port meanwhile.
            bound = await _bound_again(self.host, self.port)
            try:
                while (rule := self.faults.outage) is not None:
                    await self.faults.lifted(rule.seconds)
                    self.faults.drop(rule)
            except asyncio.CancelledError:
                bound.close()
                raise
            await self._listen(bound)
            if self.faults.outage is None:
                return
            self._cut_off()

    def _show(self, fault: Fault) -> None:
        assert self._context is not None, "without TLS there is no certificate"
        if self._showing is not None:
            self._showing.cancel()
        self.authority.show(self._context, self._names, fault.certificate)
        self._cut_connections()
        if fault.certificate == "renewed":
            self.faults.drop(fault)
        else:
            self._showing = asyncio.create_task(self._show_until_lifted(fault, self._context))

    async def _show_until_lifted(self, fault: Fault, context: ssl.SSLContext) -> None:
        await self.faults.lifted(fault.seconds)
        self.faults.drop(fault)
        self.authority.show(context, self._names)
        self._cut_connections()

    @property
    def down(self) -> bool:
        """Is there an outage?"""
        return self._outage is not None and not self._outage.done()

    def enqueue(self, command: Command) -> dict[str, Any]:
        """Hold a command for its server's next poll; returns the envelope that will be handed out."""
        command_id = command.command_id or str(uuid4())
        envelope = {
            "command_id": command_id,
            "command_type": command.command_type,
            "parameters": command.parameters,
            "timestamp": _timestamp(),
            "token": self.keyring.token(command, command_id),
        }
        self.ledger.enqueue(command.server_id, envelope, command.forge)
        return envelope

    def stats(self) -> Stats:
        ledger = self.ledger
        answers: dict[str, dict[str, int]] = {}
        verdicts: dict[str, int] = {}
        for (endpoint, status, verdict), count in sorted(ledger.counts.items()):
            of_endpoint = answers.setdefault(endpoint, {})
            of_endpoint[str(status)] = of_endpoint.get(str(status), 0) + count
            verdicts[verdict] = verdicts.get(verdict, 0) + count
        grants, grants_repeated = ledger.grant_figures()
        servers: dict[str, int] = {}
        for server in ledger.servers():
            servers[server["status"]] = servers.get(server["status"], 0) + 1
        return Stats(
            arrivals=sum(verdicts.values()),
            answers=answers,
            recorded={kind: ledger.recorded[kind] for kind in ("usage", "start", "complete", "refresh")},
            duplicates=verdicts.get(Verdict.DUPLICATE, 0),
            conflicts=verdicts.get(Verdict.CONFLICT, 0),
            refused=verdicts.get(Verdict.REFUSED, 0),
            credits=ledger.credits,
            sessions=ledger.session_states(),
            order_violations=ledger.violation_count(),
            grants=grants,
            grants_repeated=grants_repeated,
            servers=servers,
            faults=len(self.faults.rules),
            outage=self.down,
            uptime_seconds=time.monotonic() - self._started,
        )

    def book(self) -> ControlPlaneBook:
        return self.ledger.book()

    async def until(self, reached: Callable[[], bool], timeout: float = 10) -> None:
        """Return as soon as `reached()`, asked after every arrival and answer; TimeoutError otherwise."""
        if reached():
            return
        waiter = (reached, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        try:
            await asyncio.wait_for(waiter[1], timeout)
        finally:
            self._waiters.remove(waiter)

    async def until_recorded(self, count: int, kind: RecordKind = "usage", timeout: float = 10) -> None:
        """Return as soon as so many transactions of a kind are recorded."""
        await self.until(lambda: self.ledger.recorded[kind] >= count, timeout)

    async def until_arrived(self, count: int, endpoint: str | None = None, timeout: float = 10) -> None:
        """Return as soon as so many requests have come since the start or the last reset, answered or not."""
        await self.until(lambda: self.requests[endpoint or "*"] >= count, timeout)

    def reset(self) -> None:
        """Forget everything but the keys and the settings; lift all faults."""
        self.clear_faults()
        self.ledger.clear()
        self.requests.clear()

    def _notify(self) -> None:
        for reached, future in self._waiters:
            if not future.done() and reached():
                future.set_result(None)

    # Serving: one path for all ten calls.

    def _application(self) -> web.Application:
        application = web.Application(middlewares=[_errors_as_json], client_max_size=wire.MAX_BODY_BYTES)
        for endpoint, route in CALLS.items():
            application.router.add_route(route.method, route.path, partial(self._serve, endpoint))
        return application

    async def _serve(self, endpoint: str, request: web.Request) -> web.StreamResponse:
        if self.down:
            # Its handshake was under way when the connections were cut.
            return _cut(request)
        call = await read(endpoint, request)
        rows = self.ledger.arrive(endpoint, call.rows())
        self.requests.update((endpoint, "*"))
        self._notify()
        status = 500
        try:
            answer = await self._answer(call)
            gone = request.transport is None or request.transport.is_closing()
            status = 0 if gone else answer.status
            return answer
        finally:
            self.ledger.answered(endpoint, rows, status, call.verdicts)
            self._notify()

    async def _answer(self, call: Call) -> web.Response:
        struck = self.faults.strike(call.endpoint, call.session_id)
        for fault in struck:
            if not fault.stored and (answer := await self._suffer(fault, call.request)) is not None:
                return answer
        try:
            answer = self._respond(*self._judge.judge(call))
        except Refusal as refusal:
            if call.verdicts[0] == Verdict.FAULT:
                call.judged(Verdict.REFUSED)
            answer = self._refuse(refusal.status, refusal.error, refusal.detail)
        for fault in struck:
            if fault.stored and (other := await self._suffer(fault, call.request)) is not None:
                return other
        return answer

    async def _suffer(self, fault: Fault, request: web.Request) -> web.Response | None:
        """Do what the fault says; None when the request goes on all the same."""
        match fault.kind:
            case "latency":
                await self.faults.lifted(fault.seconds if fault.seconds is not None else 1.0)
                return None
            case "hang":
                await self.faults.lifted(fault.seconds)
                return _cut(request)
            case "drop_before" | "drop_after":
                return _cut(request)
            case "html_200":
                page = fault.body if isinstance(fault.body, str) else _PROXY_PAGE
                return web.Response(text=page, content_type="text/html")
            case "redirect":
                return web.Response(status=307, headers={"Location": f"{self.url}/elsewhere"})
            case "wrong_json":
                return _json(200, ["not", "an", "object"] if fault.body is None else fault.body)
            case "empty_200":
                return web.Response(status=200, content_type="application/json")
            case "status":
                return self._failed(fault)
            case "half_answer":
                return await _halved(request)
            case "close":
                if request.transport is not None:
                    wait = fault.seconds if fault.seconds is not None else 0.02
                    asyncio.get_running_loop().call_later(wait, request.transport.close)
                return None
            case "outage" | "certificate":
                return None

    def _failed(self, fault: Fault) -> web.Response:
        headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
        if fault.status == 204:
            return web.Response(status=204, headers=headers)
        if isinstance(fault.body, str):
            return web.Response(status=fault.status, text=fault.body, headers=headers)
        body = fault.body or {"success": False, "error": "fault", "detail": "asked for by the sandbox"}
        return _json(fault.status, body, headers)

    def _respond(self, status: int, data: dict[str, Any]) -> web.Response:
        if status >= 300:
            return self._refuse(status, "duplicate", None, data)
        return _json(
            status, data if self.settings.bare else {"success": True, "data": data, "timestamp": _timestamp()}
        )

    def _refuse(
        self, status: int, error: str, detail: str | None, data: dict[str, Any] | None = None
    ) -> web.Response:
        body: dict[str, Any] = {"success": False, "error": error}
        if detail is not None:
            body["detail"] = detail
        if data:
            body |= data if self.settings.bare else {"data": data}
        return _json(status, body)


_PROXY_PAGE = "<!doctype html><title>Welcome</title><p>You are behind a proxy.</p>"


async def _set_up(stack: AsyncExitStack, application: web.Application) -> web.AppRunner:
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.2)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    return runner


def _cut(request: web.Request) -> web.Response:
    """Close the connection without a word; the response returned goes nowhere."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=500)


async def _halved(request: web.Request) -> web.Response:
    """Begin a good answer, and close the connection in the middle of it."""
    answer = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "200"})
    await answer.prepare(request)
    await answer.write(b'{"success": true, "data": {"transaction_')
    await asyncio.sleep(0.01)  # it is on its way before the connection is gone
    return _cut(request)


def _json(status: int, body: Any, headers: dict[str, str] | None = None) -> web.Response:
    content = msgspec.json.encode(body)
    return web.Response(status=status, body=content, content_type="application/json", headers=headers)


@web.middleware
async def _errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        kept = {name: value for name, value in error.headers.items() if name == "Allow"}
        return _json(error.status, {"success": False, "error": error.reason}, kept)


def _timestamp() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _bound(host: str, port: int) -> socket.socket:
    """A TCP socket bound to the address, not yet listening."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.setblocking(False)
    except BaseException:
        bound.close()
        raise
    return bound


async def _bound_again(host: str, port: int) -> socket.socket:
    """The same port, as soon as the event loop has really closed the listener."""
    for _ in range(200):
        try:
            return _bound(host, port)
        except OSError:
            await asyncio.sleep(0.005)
    return _bound(host, port)


def _reachable(host: str) -> str:
    """The host as a client on this machine would write it into a URL."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"[{host}]" if ":" in host else host
