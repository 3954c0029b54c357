"""The ControlPlane as a process of its own: its command line, and the handle that starts and steers it.

The handle speaks to the admin port alone, so it also works while the ControlPlane is made to fail, and the
child ends when the handle's process ends, however that happens.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import aiohttp
import msgspec
import uvloop

from sandbox.control_plane import ControlPlane, Settings, Stats
from sandbox.keys import Command
from sandbox.ledger import Arrival, ControlPlaneBook, Grant, RecordKind, Transaction, Violation
from sandbox.tls import write_secret

START_SECONDS = 20

_T = TypeVar("_T")


class Ready(msgspec.Struct):
    """The one line the child prints when it serves."""

    url: str
    admin_url: str
    port: int
    admin_port: int
    ca_file: str
    pid: int


class ControlPlaneProcess:
    """`async with ControlPlaneProcess(db=...) as cp`: cp.url, cp.admin_url, cp.ca_file, cp.api_key.

    `kill()` is a SIGKILL; `start()` again brings it back on the same ports with the same CA and API key, with
    the same book when it has a `db`, and with new signing keys.
    """

    def __init__(
        self,
        *,
        db: Path | None = None,
        ca_file: Path | None = None,
        api_key: str | None = None,
        port: int = 0,
        admin_port: int = 0,
        arguments: Sequence[str] = (),
    ) -> None:
        self.api_key = api_key or secrets.token_urlsafe(24)
        self.port, self.admin_port = port, admin_port
        self.url = self.admin_url = ""
        self._db, self._arguments = db, arguments
        self._directory = tempfile.TemporaryDirectory(prefix="sandbox-")
        self.ca_file = ca_file or Path(self._directory.name) / "ca.pem"
        self._key_file = Path(self._directory.name) / "api-key"
        write_secret(self._key_file, self.api_key.encode())
        self._process: Process | None = None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Start the child and wait until it serves; RuntimeError with its exit code when it does not."""
        command = ["-m", "sandbox", "control-plane", "--until-stdin-closes"]
        command += ["--port", str(self.port), "--admin-port", str(self.admin_port)]
        command += ["--api-key-file", str(self._key_file), "--ca-out", str(self.ca_file)]
        command += ["--db", str(self._db)] if self._db else []
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, *command, *self._arguments, stdin=PIPE, stdout=PIPE
        )
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), START_SECONDS)
        if not line:
            raise RuntimeError(f"the ControlPlane did not start: exit code {await self._process.wait()}")
        ready = msgspec.json.decode(line, type=Ready)
        self.url, self.admin_url = ready.url, ready.admin_url
        self.port, self.admin_port = ready.port, ready.admin_port
        if self._session is None:
            self._session = aiohttp.ClientSession()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def kill(self) -> None:
        """SIGKILL."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> None:
        """SIGTERM, and wait for the end."""
        await self._end(signal.SIGTERM)

    def pause(self) -> None:
        """SIGSTOP: connections are still accepted, by the kernel, and nobody answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)

    async def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._signal(how)
            await self._process.wait()

    async def close(self) -> None:
        """Stop the child and remove what was made for it."""
        await self.stop()
        if self._session is not None:
            await self._session.close()
            self._session = None
        self._directory.cleanup()

    # Steering, all of it through the admin port.

    async def stats(self) -> Stats:
        return await self._call("GET", "/sandbox/stats", Stats)

    async def overview(self) -> dict[str, Any]:
        return await self._call("GET", "/sandbox/overview", dict[str, Any])

    async def fault(self, kind: str, endpoint: str = "*", **fields: Any) -> None:
        """Put one fault in force (fields of sandbox.faults.Fault)."""
        await self._call("POST", "/sandbox/faults", object, {"kind": kind, "endpoint": endpoint, **fields})

    async def put_faults(self, rules: Sequence[dict[str, Any]]) -> None:
        """Put these rules in force, and no others."""
        await self._call("PUT", "/sandbox/faults", object, rules)

    async def outage(self, seconds: float | None = None) -> None:
        """Refuse connections from now on, for `seconds` or until the faults are cleared."""
        await self.fault("outage", seconds=seconds)

    async def clear_faults(self) -> None:
        await self._call("DELETE", "/sandbox/faults", object)

    async def change_settings(self, **settings: Any) -> Settings:
        return await self._call("PUT", "/sandbox/settings", Settings, settings)

    async def accept_keys(self, *api_keys: str) -> None:
        """Accept these API keys and no others."""
        await self._call("PUT", "/sandbox/api-keys", object, {"api_keys": api_keys})

    async def change_key(self) -> str:
        """Accept a new API key alone, also after a restart; returns it."""
        self.api_key = secrets.token_urlsafe(24)
        write_secret(self._key_file, self.api_key.encode())
        await self.accept_keys(self.api_key)
        return self.api_key

    async def enqueue(self, command: Command) -> dict[str, Any]:
        return await self._call("PUT", "/sandbox/commands", dict[str, Any], command)

    async def rotate_keys(self, *, keep_old: bool = False) -> None:
        await self._call("POST", "/sandbox/keys/rotate", object, {"keep_old": keep_old})

    async def reset(self) -> None:
        await self._call("POST", "/sandbox/reset", object)

    async def book(self) -> ControlPlaneBook:
        """The whole book, fetched page by page."""
        assert self._session is not None
        return await fetch_book(self._session, self.admin_url)

    async def until(self, reached: Callable[[Stats], bool], timeout: float = 10) -> Stats:
        """Return the figures as soon as they are `reached`; TimeoutError otherwise."""
        async with asyncio.timeout(timeout):
            while not reached(stats := await self.stats()):
                await asyncio.sleep(0.05)
        return stats

    async def until_recorded(self, count: int, kind: RecordKind = "usage", timeout: float = 10) -> None:
        """Return as soon as so many transactions of a kind are recorded."""
        await self.until(lambda stats: stats.recorded[kind] >= count, timeout)

    async def _call(self, method: str, path: str, shape: type[_T], body: Any = None) -> _T:
        assert self._session is not None
        content = None if body is None else msgspec.json.encode(body)
        async with self._session.request(method, self.admin_url + path, data=content) as answer:
            got = await answer.read()
            if answer.status >= 400:
                raise ValueError(got.decode(errors="replace"))
            return msgspec.json.decode(got, type=shape)


class _TransactionPage(msgspec.Struct):
    transactions: list[Transaction]
    next: int


class _ArrivalPage(msgspec.Struct):
    arrivals: list[Arrival]
    next: int


class _GrantPage(msgspec.Struct):
    grants: list[Grant]
    order_violations: list[Violation]


async def fetch_book(session: aiohttp.ClientSession, admin_url: str) -> ControlPlaneBook:
    """The whole book of the ControlPlane whose admin port is at `admin_url`."""

    async def get(path: str, shape: type[_T]) -> _T:
        async with session.get(admin_url.rstrip("/") + path) as answer:
            answer.raise_for_status()
            return msgspec.json.decode(await answer.read(), type=shape)

    last = await get("/sandbox/grants", _GrantPage)
    book = ControlPlaneBook([], [], last.grants, last.order_violations)
    after = 0
    while (recorded := await get(f"/sandbox/book?after={after}", _TransactionPage)).transactions:
        book.transactions += recorded.transactions
        after = recorded.next
    after = 0
    while (arrived := await get(f"/sandbox/arrivals?after={after}", _ArrivalPage)).arrivals:
        book.arrivals += arrived.arrivals
        after = arrived.next
    return book


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the ControlPlane until stopped; one JSON line says where, as soon as it serves."""
    parser = argparse.ArgumentParser(prog="python -m sandbox control-plane", description=main.__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: a free one (default)")
    parser.add_argument("--admin-host", default="127.0.0.1")
    parser.add_argument(
        "--admin-port", type=int, default=0, help="the page and /sandbox/*; 0: a free one (default)"
    )
    parser.add_argument("--api-key", help="default: one is made up and printed")
    parser.add_argument("--api-key-file", type=Path)
    parser.add_argument(
        "--ca-out", type=Path, help="where the CA's PEM is written; one that is there is used again"
    )
    parser.add_argument(
        "--name", action="append", default=[], help="a host name for the certificate (repeatable)"
    )
    parser.add_argument("--db", type=Path, help="the book; default: in memory")
    parser.add_argument("--issuer", default="control-plane")
    parser.add_argument("--plain-http", action="store_true", help="no TLS")
    parser.add_argument("--client-certificates", action="store_true", help="mutual TLS, by the same CA")
    parser.add_argument("--duplicate-status", type=int, choices=(200, 409), default=409)
    parser.add_argument("--strict-sessions", action="store_true", help="404 for usage of an unknown session")
    parser.add_argument("--bare", action="store_true", help="answers without the wrapping")
    parser.add_argument(
        "--until-stdin-closes", action="store_true", help="end with the process that started it"
    )
    options = parser.parse_args(argv)
    try:
        return uvloop.run(_serve(options))
    except OSError as error:
        print(f"sandbox: {error}", file=sys.stderr)
        return 2


async def _serve(options: argparse.Namespace) -> int:
    given = options.api_key or (options.api_key_file and options.api_key_file.read_text().strip())
    control_plane = ControlPlane(
        host=options.host,
        port=options.port,
        admin_host=options.admin_host,
        admin_port=options.admin_port,
        api_key=given,
        ca_file=options.ca_out,
        names=options.name,
        tls=not options.plain_http,
        client_certificates=options.client_certificates,
        db=options.db,
        issuer=options.issuer,
        settings=Settings(
            duplicate_status=options.duplicate_status,
            strict_sessions=options.strict_sessions,
            bare=options.bare,
        ),
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    watching = asyncio.create_task(_until_stdin_closes(stop)) if options.until_stdin_closes else None
    async with control_plane as cp:
        ready = Ready(cp.url, cp.admin_url, cp.port, cp.admin_port, str(cp.ca_file), os.getpid())
        made_up = {} if given else {"api_key": cp.api_key}
        print(msgspec.json.encode({**msgspec.to_builtins(ready), **made_up}).decode(), flush=True)
        await stop.wait()
    if watching is not None:
        watching.cancel()
    return 0


async def _until_stdin_closes(stop: asyncio.Event) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    await reader.read()
    stop.set()
