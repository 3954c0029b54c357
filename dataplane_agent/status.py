"""`dataplane status`: the streams, the services and the ledger, as of one instant."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter
from redis.asyncio import Redis
from rich.console import Group
from rich.live import Live

from common import figures, presence
from common.config import Config
from common.figures import StreamFigures
from common.ledger import LOST, VANISHED
from common.presence import Presence
from common.redis_border import Scripts
from common.streams import Stream
from dataplane_agent import printing
from dataplane_agent.target import SERVICES, Files, Json, connected, load, streams

Watch = Annotated[bool, Parameter(negative="", help="Show it again and again, until interrupted.")]

WATCH_EVERY = 1.0

LOSSES = {
    "missing": "neither in the stream nor in the ledger: trimmed or deleted unread",
    VANISHED: "trimmed or deleted while they were pending or dead",
    LOST: "went with the stream, deleted, flushed or forgotten by Redis (an estimate)",
}
"""Each kind of loss in the words an operator needs; shown when there is any."""

STREAM_HEADINGS = ("stream", "backlog", "pending", "dead", "oldest", "delivered", "duplicate")
LOSS_HEADINGS = ("loss", "stream", "entries", "what became of them")
SERVICE_HEADINGS = (
    "service",
    "status",
    "process",
    "up",
    "in flight",
    "breaker",
    "last success",
    "last error",
)
CONSUMER_HEADINGS = ("consumer", "stream", "pending", "last sign of life")


class Snapshot(msgspec.Struct, frozen=True):
    """All there is to show: the streams' figures, and the processes heard of within the last 15 s."""

    at: float
    streams: list[tuple[Stream, StreamFigures]]
    processes: list[Presence]

    @property
    def imbalance(self) -> int:
        """Entries that left a stream without being counted: 0, or something was lost."""
        return sum(abs(figure.imbalance) for _, figure in self.streams)

    @property
    def well(self) -> bool:
        """Whether nothing was lost, in any way that can be seen, since the books began."""
        return not any(n for _, figure in self.streams for n in losses(figure).values())


async def status(*, config: Files = (), json: Json = False, watch: Watch = False) -> int:
    """Shows streams, services and ledger; exit code 1 when entries were lost, or a ledger does not add up."""
    settings = load(config)
    async with connected(settings) as redis:
        if watch:
            await _watch(redis, settings, json)
        snapshot = await read(redis, settings)
    if not watch:
        printing.json(document(snapshot)) if json else _print(snapshot)
    return 0 if snapshot.well else 1


async def read(redis: Redis, settings: Config) -> Snapshot:
    """One snapshot; raises RedisFault."""
    scripts, now = Scripts(redis), time.time()
    found = [(stream, await figures.read(scripts, stream, now)) for stream in streams(settings).values()]
    return Snapshot(now, found, await presence.read(redis, settings.server.id, now))


def losses(figure: StreamFigures) -> dict[str, int]:
    """What was lost of a stream, by kind; 0 for what was not."""
    return {"missing": figure.imbalance, **{kind: figure.ledger.get(kind, 0) for kind in (VANISHED, LOST)}}


def document(snapshot: Snapshot) -> dict[str, Any]:
    """The snapshot as `--json` prints it (contract section 9)."""
    return {
        "streams": {stream.name: _stream(stream, figure) for stream, figure in snapshot.streams},
        "services": {name: _service(name, snapshot.processes) for name in SERVICES},
    }


def _stream(stream: Stream, figure: StreamFigures) -> dict[str, Any]:
    return {
        "group": stream.group,
        "backlog": figure.backlog,
        "pending": figure.pending,
        "dead": figure.dead,
        "oldest_age_seconds": figure.oldest_age_seconds,
        "consumers": figure.consumers,
        "ledger": figure.ledger,
        "losses": losses(figure),
    }


def _service(name: str, processes: list[Presence]) -> dict[str, Any]:
    """One service: the status of its processes in one word, and each process as it last described itself."""
    mine = [process for process in processes if process.service == name]
    return {"status": overall([p.status for p in mine]), "processes": [_process(p) for p in mine]}


def _process(process: Presence) -> dict[str, Any]:
    told: dict[str, Any] = msgspec.to_builtins(process)
    del told["service"], told["stream"]  # both are said elsewhere in the document
    return told


def overall(statuses: list[str]) -> str:
    """What a service with these processes is: `missing` without any, else what they are, or `degraded`."""
    if not statuses:
        return "missing"
    return statuses[0] if len(set(statuses)) == 1 else "degraded"


# --- on the screen ------------------------------------------------------------------------------------------


async def _watch(redis: Redis, settings: Config, json: bool) -> None:
    if json or not sys.stdout.isatty():
        while True:
            snapshot = await read(redis, settings)
            if json:
                print(msgspec.json.encode(document(snapshot)).decode(), flush=True)  # one line each time
            else:
                _print(snapshot)
                print(flush=True)
            await asyncio.sleep(WATCH_EVERY)
    with Live(auto_refresh=False) as live:
        while True:
            live.update(view(await read(redis, settings)), refresh=True)
            await asyncio.sleep(WATCH_EVERY)


def view(snapshot: Snapshot) -> Group:
    """The snapshot as rich draws it."""
    return Group(*(printing.drawn(headings, rows) for headings, rows in tables(snapshot) if rows))


def _print(snapshot: Snapshot) -> None:
    for headings, rows in tables(snapshot):
        if rows:
            printing.table(headings, rows)
            print()


def tables(snapshot: Snapshot) -> list[tuple[tuple[str, ...], list[tuple[object, ...]]]]:
    """Headings and rows of the tables: streams, losses, services, consumers. Without losses there are no rows."""
    return [
        (STREAM_HEADINGS, [_stream_row(stream, figure) for stream, figure in snapshot.streams]),
        (LOSS_HEADINGS, [row for stream, figure in snapshot.streams for row in _losses(stream, figure)]),
        (SERVICE_HEADINGS, [row for name in SERVICES for row in _service_rows(name, snapshot)]),
        (
            CONSUMER_HEADINGS,
            [row for stream, figure in snapshot.streams for row in _consumers(stream, figure)],
        ),
    ]


def _stream_row(stream: Stream, figure: StreamFigures) -> tuple[object, ...]:
    return (
        stream.name,
        figure.backlog,
        figure.pending,
        printing.counts(figure.dead),
        printing.age(figure.oldest_age_seconds),
        figure.ledger.get("delivered", 0),
        figure.ledger.get("duplicate", 0),
    )


def _losses(stream: Stream, figure: StreamFigures) -> list[tuple[object, ...]]:
    return [(kind, stream.name, n, LOSSES[kind]) for kind, n in losses(figure).items() if n]


def _service_rows(name: str, snapshot: Snapshot) -> list[tuple[object, ...]]:
    mine = [process for process in snapshot.processes if process.service == name]
    if not mine:
        return [(name, "missing", None, None, None, None, None, None)]
    return [
        (
            name,
            process.status if process.hold is None else f"{process.status}: {process.hold.detail}",
            process.pid,
            printing.age(process.uptime_seconds),
            process.in_flight,
            process.breaker,
            process.last_success and f"{printing.age(snapshot.at - process.last_success)} ago",
            process.last_error,
        )
        for process in mine
    ]


def _consumers(stream: Stream, figure: StreamFigures) -> list[tuple[object, ...]]:
    return [(c.name, stream.name, c.pending, f"{printing.age(c.idle_seconds)} ago") for c in figure.consumers]
