"""Registration: the ControlPlane knows this server, where it listens and what it can do.

Once at start-up, tried again for ever, and again when a heartbeat is answered with 404.
Registering resets the server's allocated sessions at the ControlPlane, so a registrar that stood by and takes
over does not register: its first heartbeat tells whether it has to.

    attempts     at once, then after about 1 s, 2, 4, … and at last every minute
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any
from urllib.parse import urlsplit

from common import config
from common.control_plane.backoff import park_delay
from common.control_plane.errors import ControlPlaneError
from common.logs import get
from common.service import Running
from common.turn import Turn
from registrar.periodic import CallOutage, until

_log = get("registrar")


class Registration:
    """Registers when it is `needed`; `done` while the ControlPlane knows us."""

    def __init__(self, running: Running, turn: Turn) -> None:
        self.needed = asyncio.Event()
        self.done = asyncio.Event()
        self._running, self._turn = running, turn
        self._outage = CallOutage("registration", running)

    async def run(self) -> None:
        """The child of the service's task group: ends when the service stops, never raises."""
        stopping = self._running.stopping
        if await self._stood_by():
            _log.info("registration.taken_over")
            self.confirmed()
        else:
            self.needed.set()
        while not stopping.is_set():
            if not self._turn.held:
                await until(stopping, self._turn.taken)
            elif not self.needed.is_set():
                await until(stopping, self.needed)
            else:
                await self._register()

    def confirmed(self) -> None:
        """The ControlPlane has shown that it knows us."""
        self._running.metrics.registered.set(1)
        self.done.set()

    def lost(self) -> None:
        """The ControlPlane does not know us: no heartbeat before the next registration."""
        _log.warning("registration.lost")
        self._running.metrics.registered.set(0)
        self.done.clear()
        self.needed.set()

    async def _stood_by(self) -> bool:
        """Waits for the turn; True when somebody else had it, for longer than a dead registrar's lasts."""
        running, waited = self._running, 0
        while not (running.stopping.is_set() or self._turn.held):
            await until(running.stopping, self._turn.taken, seconds=1.0)
            waited += running.redis_connected  # while Redis is away, nobody is known to have it
        return self._turn.held and waited > 2 * running.config.streams.visibility_timeout

    async def _register(self) -> None:
        """Until it has succeeded, the turn is lost, or the service stops."""
        attempt = 0
        while self._turn.held and not self._running.stopping.is_set():
            attempt += 1
            try:
                await self._running.client.register(await self._body())
            except (ControlPlaneError, OSError, ValueError) as error:
                self._outage.began(error)
                asked = error.retry_after if isinstance(error, ControlPlaneError) else None
                delay = park_delay(attempt, self._running.random) if asked is None else asked
                await until(self._running.stopping, seconds=delay)
                continue
            self._outage.ended()
            self.needed.clear()
            self.confirmed()
            _log.info("registration.done")
            return

    async def _body(self) -> dict[str, Any]:
        server = self._running.config.server
        address = server.ip_address or await route_to(self._running.config.control_plane.base_url)
        return body(server, address, self._running.version)


def body(server: config.Server, ip_address: str, version: str) -> dict[str, Any]:
    """What the ControlPlane is told about this server."""
    can = server.capabilities
    return {
        "server_id": server.id,
        "region": server.region,
        "ip_address": ip_address,
        "port": server.port,
        "version": version,
        "capabilities": {
            "max_concurrent_sessions": can.max_concurrent_sessions,
            "supported_products": can.supported_products,
            "supported_languages": can.supported_languages,
        },
    }


async def route_to(url: str) -> str:
    """The local address from which packets to the ControlPlane leave. Raises OSError, ValueError."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    found = await asyncio.get_running_loop().getaddrinfo(parts.hostname, port, type=socket.SOCK_DGRAM)
    error = OSError(f"no address for {parts.hostname}")
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0])
        except OSError as unreachable:  # this family has no route: the next one may
            error = unreachable
    raise error
