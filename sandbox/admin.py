"""The admin port: the page, and `/sandbox/*` to steer the ControlPlane and read its book. Plain HTTP, no key.

It is a port of its own, so that an outage of the ControlPlane does not cut off those who watch it.

    GET    /                        the page
    GET    /sandbox/stats           figures of the moment
    GET    /sandbox/overview        what the page shows: stats, servers, sessions, arrivals, commands, faults
    GET    /sandbox/book            {"transactions", "next"} recorded after ?after=, at most ?limit= of them
    GET    /sandbox/arrivals        {"arrivals", "next"} likewise
    GET    /sandbox/grants          grants and order violations
    GET    /sandbox/faults          the rules in force; PUT replaces them, POST adds one, DELETE lifts all
    GET    /sandbox/settings        PUT changes the named ones
    PUT    /sandbox/api-keys        {"api_keys": [...]}: the keys accepted from now on; [] revokes all
    PUT    /sandbox/commands        enqueues a command for a server; answers its envelope
    POST   /sandbox/keys/rotate     {"keep_old": bool}? new signing keys
    DELETE /sandbox/servers/{id}    forgets a server: its next heartbeat gets 404
    POST   /sandbox/reset           forgets everything but keys and settings
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from aiohttp import web

from sandbox.faults import Fault
from sandbox.keys import FORGERIES, Command

if TYPE_CHECKING:
    from sandbox.control_plane import ControlPlane

PAGE_ROWS = 40
BOOK_ROWS = 5000

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_T = TypeVar("_T")


def application(control_plane: ControlPlane) -> web.Application:
    """The admin port's routes."""
    port = _AdminPort(control_plane)
    app = web.Application(middlewares=[_faults_as_json])
    app.add_routes(
        [
            web.get("/", port.page),
            web.get("/sandbox/stats", port.stats),
            web.get("/sandbox/overview", port.overview),
            web.get("/sandbox/book", port.book),
            web.get("/sandbox/arrivals", port.arrivals),
            web.get("/sandbox/grants", port.grants),
            web.get("/sandbox/faults", port.faults),
            web.put("/sandbox/faults", port.replace_faults),
            web.post("/sandbox/faults", port.add_fault),
            web.delete("/sandbox/faults", port.clear_faults),
            web.get("/sandbox/settings", port.settings),
            web.put("/sandbox/settings", port.change_settings),
            web.put("/sandbox/api-keys", port.replace_api_keys),
            web.put("/sandbox/commands", port.enqueue),
            web.post("/sandbox/keys/rotate", port.rotate),
            web.delete("/sandbox/servers/{server_id}", port.forget_server),
            web.post("/sandbox/reset", port.reset),
        ]
    )
    return app


class ApiKeys(msgspec.Struct, forbid_unknown_fields=True):
    """The keys accepted from now on."""

    api_keys: list[str]


class Rotation(msgspec.Struct, forbid_unknown_fields=True):
    """Are the old signing keys published on?"""

    keep_old: bool = False


class _AdminPort:
    def __init__(self, control_plane: ControlPlane) -> None:
        self._cp = control_plane
        self._page = Path(__file__).with_name("page.html").read_text("utf-8")

    async def page(self, _: web.Request) -> web.Response:
        return web.Response(text=self._page, content_type="text/html", headers={"Cache-Control": "no-store"})

    async def stats(self, _: web.Request) -> web.Response:
        return _json(self._cp.stats())

    async def overview(self, _: web.Request) -> web.Response:
        ledger = self._cp.ledger
        return _json(
            {
                "url": self._cp.url,
                "stats": self._cp.stats(),
                "servers": ledger.servers(),
                "sessions": ledger.sessions(PAGE_ROWS),
                "arrivals": ledger.arrivals(limit=PAGE_ROWS, newest=True),
                "order_violations": ledger.violations()[-PAGE_ROWS:],
                "commands": ledger.commands(PAGE_ROWS),
                "faults": self._cp.faults.rules,
                "settings": self._cp.settings,
                "forgeries": FORGERIES,
            }
        )

    async def book(self, request: web.Request) -> web.Response:
        after, limit = _range(request)
        rows = self._cp.ledger.transactions(after, limit)
        return _json({"transactions": rows, "next": rows[-1].position if rows else after})

    async def arrivals(self, request: web.Request) -> web.Response:
        after, limit = _range(request)
        rows = self._cp.ledger.arrivals(after, limit)
        return _json({"arrivals": rows, "next": rows[-1].seq if rows else after})

    async def grants(self, _: web.Request) -> web.Response:
        ledger = self._cp.ledger
        return _json({"grants": ledger.grants(), "order_violations": ledger.violations()})

    async def faults(self, _: web.Request) -> web.Response:
        return _json(self._cp.faults.rules)

    async def replace_faults(self, request: web.Request) -> web.Response:
        wanted = await _body(request, list[Fault])
        for fault in wanted:
            self._cp.faults.check(fault)
        self._cp.clear_faults()
        for fault in wanted:
            self._cp.add_fault(fault)
        return _json(self._cp.faults.rules)

    async def add_fault(self, request: web.Request) -> web.Response:
        return _json(self._cp.add_fault(await _body(request, Fault)))

    async def clear_faults(self, _: web.Request) -> web.Response:
        self._cp.clear_faults()
        return _json([])

    async def settings(self, _: web.Request) -> web.Response:
        return _json(self._cp.settings)

    async def change_settings(self, request: web.Request) -> web.Response:
        changes = await _body(request, dict[str, Any])
        changed = {**msgspec.to_builtins(self._cp.settings), **changes}
        self._cp.settings = msgspec.convert(changed, type(self._cp.settings))
        return _json(self._cp.settings)

    async def replace_api_keys(self, request: web.Request) -> web.Response:
        self._cp.api_keys = set((await _body(request, ApiKeys)).api_keys)
        return _json({"accepted": len(self._cp.api_keys)})

    async def enqueue(self, request: web.Request) -> web.Response:
        return _json(self._cp.enqueue(await _body(request, Command)))

    async def rotate(self, request: web.Request) -> web.Response:
        rotation = await _body(request, Rotation) if request.can_read_body else Rotation()
        return _json({"kids": self._cp.keyring.rotate(keep_old=rotation.keep_old)})

    async def forget_server(self, request: web.Request) -> web.Response:
        self._cp.ledger.forget_server(request.match_info["server_id"])
        return _json({})

    async def reset(self, _: web.Request) -> web.Response:
        self._cp.reset()
        return _json({})


async def _body(request: web.Request, shape: type[_T]) -> _T:
    return msgspec.json.decode(await request.read(), type=shape)


def _range(request: web.Request) -> tuple[int, int]:
    after, limit = int(request.query.get("after", 0)), int(request.query.get("limit", BOOK_ROWS))
    return after, max(1, min(limit, BOOK_ROWS))


def _json(body: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(body), content_type="application/json")


@web.middleware
async def _faults_as_json(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ValueError as error:
        # Bad JSON, a wrong shape, an endpoint or a forgery that does not exist: all are ValueErrors.
        return _json({"error": str(error)}, 400)
