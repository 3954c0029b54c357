"""Commands: polled from the ControlPlane, kept in a stream, carried out at most once, reported.

    poll ──XADD──▶ queue:commands ──▶ known already? ──▶ token believed? ──▶ run ──▶ stored ──▶ reported
                                          │                   │ no           │ failed
                                          ▼                   ▼              ▼
                                     reported, if it     refused: audit   again, 3 times, while
                                     was not yet         log, reported    the token is valid

The entry stays pending until the ControlPlane has the report, so a command survives a crash at any point.
The result is stored before it is reported: after a crash between the two, it is sent again, and nothing runs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from hashlib import sha256
from random import Random
from typing import Any, cast

import msgspec

from common import schemas
from common.control_plane import errors
from common.control_plane.backoff import park_delay
from common.delivery import Handler
from common.entries import Entry
from common.logs import get
from common.outcomes import DELIVERED, DUPLICATE, Cause, Dead, Outcome, Reason, Retry
from common.redis_border import RedisFault, border
from common.service import Running
from common.signing import KeySet, Refused, Undecided
from common.streams import MAX_ENTRY_BYTES
from common.turn import Turn
from registrar.heartbeat import Heartbeat
from registrar.memory import Memory, Place, Record
from registrar.periodic import CallOutage, every, rfc3339, until
from registrar.registration import Registration

MAX_RETRIES = 3
RUN_SECONDS = 60.0
"""A command that takes longer has failed."""

JITTER = 0.1
"""Of the poll's interval, more or less: a fleet that was started at once does not ask at once for ever."""

MAX_QUEUED = 1000
"""Entries looked through for a command that is there already; one beyond them is found out by its memory."""

_FIELDS = ("command_id", "command_type", "parameters", "timestamp", "token")
_ROOM = MAX_ENTRY_BYTES - 1024  # for the entry's other fields

_log = get("registrar")
_audit = get("audit")

Run = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]


class Order(msgspec.Struct, frozen=True):
    """A command as it was queued. Without `command` it has a `fault`, and is refused for it."""

    command_id: str
    command_type: str
    digest: str
    command: schemas.Command | None = None
    fault: str = ""


class _Named(msgspec.Struct):
    command_id: schemas.Id


def read(data: bytes | None) -> Order:
    """The order that an entry's `data` gives; raises Invalid only where there is nobody to answer to."""
    try:
        command = schemas.command(data)
    except schemas.Invalid as invalid:
        try:
            named = msgspec.json.decode(data or b"", type=_Named)
        except (ValueError, RecursionError):
            raise invalid from None
        return Order(named.command_id, "unknown", sha256(data or b"").hexdigest(), fault=str(invalid))
    # All that the token vouches for: a genuine token with other parameters is another order.
    judged = [command.command_type, command.parameters, command.token]
    digest = sha256(msgspec.json.encode(judged, order="deterministic")).hexdigest()
    return Order(command.command_id, command.command_type, digest, command)


class CommandPoll:
    """Asks for commands while we have the turn and are registered, and queues those that are new."""

    def __init__(self, running: Running, turn: Turn, memory: Memory) -> None:
        self._running, self._turn, self._memory = running, turn, memory
        self._stream = running.config.streams.commands
        self._outage = CallOutage("commands", running)

    async def run(self, registration: Registration, heartbeat: Heartbeat) -> None:
        """The child of the service's task group: ends when the service stops, never raises."""

        async def tick() -> None:
            await heartbeat.first()
            await self.poll()

        running = self._running
        interval = running.config.monitoring.command_poll_interval
        await every(
            lambda: jittered(interval, running.random),
            tick,
            stopping=running.stopping,
            clock=running.clock,
            when=(self._turn.taken, registration.done),
        )

    async def poll(self) -> int:
        """One poll; returns how many commands it has queued."""
        try:
            polled = await self._running.client.commands()
        except errors.ControlPlaneError as error:
            self._outage.began(error)
            return 0
        self._outage.ended()
        found = dict(filter(None, map(entry_data, polled)))
        attempt = 0
        while found and self._turn.held and not self._running.stopping.is_set():
            try:
                return await self._queue(found)
            except RedisFault as fault:  # the ControlPlane may not offer them again: keep trying
                attempt += 1
                _log.warning("commands.not_queued", error=str(fault), count=len(found))
                await until(self._running.stopping, seconds=park_delay(attempt, self._running.random))
        return 0

    async def _queue(self, found: Mapping[bytes, str]) -> int:
        redis, queued = self._running.redis, 0
        with border():
            rows = cast(
                "list[tuple[bytes, dict[bytes, bytes]]]", await redis.xrange(self._stream, count=MAX_QUEUED)
            )
        # In this order: what leaves the stream between the two questions has been remembered before.
        there = {fields.get(b"data") for _, fields in rows}
        for data, command_id in found.items():
            if data in there:
                continue
            own, refused = await self._memory.recall(command_id, read(data).digest)
            if own.reported or refused.reported:
                continue
            with border():
                await redis.xadd(self._stream, {b"data": data, b"correlation_id": command_id})
            _log.info("command.queued", command_id=command_id)
            queued += 1
        return queued


def jittered(interval: float, random: Random) -> float:
    return interval * (1 + JITTER * (2 * random.random() - 1))


def entry_data(polled: Any) -> tuple[bytes, str] | None:
    """The `data` that queues a polled command, and its id; None where there is nobody to answer to."""
    try:
        command_id: str = msgspec.convert(polled, _Named).command_id
    except msgspec.ValidationError:
        _audit.warning("command.unreadable")
        return None
    try:
        data = msgspec.json.encode({name: polled[name] for name in _FIELDS if name in polled})
    except (ValueError, RecursionError):
        data = b""
    if not 0 < len(data) <= _ROOM:
        data = msgspec.json.encode({"command_id": command_id})  # will be refused, and answered all the same
    return data, command_id


class CommandHandler(Handler):
    """Carries out one command an entry; see the picture above."""

    ordered = False
    batch = 1

    def __init__(
        self,
        running: Running,
        keys: KeySet,
        memory: Memory,
        runs: Mapping[str, Run],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._running, self._keys, self._memory = running, keys, memory
        self._runs, self._now = runs, now

    def decode(self, entry: Entry, data: bytes | None) -> str:
        """Reads the order; the lane is the command's id. Raises schemas.Invalid."""
        order = read(data)
        entry.message, entry.transaction_id = order, order.command_id
        return order.command_id

    async def deliver(self, entry: Entry) -> Outcome:
        try:
            return await self._carry_out(entry.message, entry.id.decode())
        except RedisFault as fault:
            return Retry(Cause.TRANSIENT, str(fault))  # nothing was changed that is not remembered
        except Undecided as undecided:
            return Retry(Cause.TRANSIENT, undecided.reason, after=undecided.after)

    async def _carry_out(self, order: Order, entry_id: str) -> Outcome:
        own, refused = await self._memory.recall(order.command_id, order.digest)
        if refused.record is not None:
            return await self._report(refused, refused.record)
        record = own.record
        if record is not None and record.state == "ended":
            if record.digest != order.digest:
                _audit.warning("command.repeated", command_id=order.command_id)
            return await self._report(own, record)
        if record is not None and self._runs_elsewhere(record, entry_id):
            return Retry(Cause.TRANSIENT, "it runs for another entry")
        try:
            parameters = await self._believe(order)
        except Refused as refusal:
            if record is not None and record.digest == order.digest:
                return await self._end(own, order, record.runs, error=record.error or "died while it ran")
            return await self._refuse(refused, order, refusal)
        runs = record.runs if record is not None else 0
        if runs > MAX_RETRIES:  # the last run ended with the process
            return await self._end(own, order, runs, error="died while it ran")
        return await self._run(own, order, parameters, runs + 1, entry_id)

    def _runs_elsewhere(self, record: Record, entry_id: str) -> bool:
        """Another process is at it. An entry has one owner, so ours ran in a process that has died."""
        may_still_run = self._now() - record.began_at < 2 * RUN_SECONDS  # twice: two clocks may differ
        return record.state == "running" and record.entry != entry_id and may_still_run

    async def _believe(self, order: Order) -> Mapping[str, Any]:
        """The parameters of a command that is allowed and proven; raises Refused or Undecided."""
        config = self._running.config
        if order.command is None:
            raise Refused(order.fault)
        if order.command_type not in self._runs:
            raise Refused("command_type is unknown")
        if order.command_type not in config.commands.allow:
            raise Refused("command_type is not allowed by commands.allow")
        claims = await self._keys.verify(
            order.command.token,
            audience=config.server.id,
            issuer=config.control_plane.issuer,
            command=order.command,
            now=self._now(),
        )
        return claims.parameters

    async def _run(
        self, own: Place, order: Order, parameters: Mapping[str, Any], runs: int, entry_id: str
    ) -> Outcome:
        begun = Record(digest=order.digest, state="running", runs=runs, entry=entry_id, began_at=self._now())
        place = await self._memory.remember(own, begun)
        if place is None:
            return Retry(Cause.TRANSIENT, "another process was quicker")
        try:
            async with asyncio.timeout(RUN_SECONDS):
                result = await self._runs[order.command_type](parameters)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"[:500]
            if runs > MAX_RETRIES:
                return await self._end(place, order, runs, error=error)
            failed = Record(digest=order.digest, state="failed", runs=runs, error=error)
            await self._memory.remember(place, failed)
            _log.warning("command.run_failed", command_id=order.command_id, runs=runs, error=error)
            return Retry(Cause.TRANSIENT, error)
        return await self._end(place, order, runs, result=result)

    async def _refuse(self, place: Place, order: Order, refusal: Refused) -> Outcome:
        _audit.warning(
            "command.refused",
            command_id=order.command_id,
            command_type=order.command_type,
            reason=refusal.reason,
        )
        report = self._body(order, error=f"refused: {refusal.reason}")
        return await self._store(
            place, order, Record(digest=order.digest, state="ended", report=report), "refused"
        )

    async def _end(
        self,
        place: Place,
        order: Order,
        runs: int,
        *,
        result: dict[str, Any] | None = None,
        error: str | None = None,
    ) -> Outcome:
        outcome = "failed" if error is not None else "succeeded"
        _audit.info(
            "command.ended",
            outcome=outcome,
            command_id=order.command_id,
            command_type=order.command_type,
            runs=runs,
            error=error,
        )
        report = self._body(order, result=result, error=error)
        record = Record(digest=order.digest, state="ended", runs=runs, report=report)
        return await self._store(place, order, record, outcome)

    async def _store(self, place: Place, order: Order, record: Record, outcome: str) -> Outcome:
        """Remembers how it ended, then reports it."""
        stored = await self._memory.remember(place, record)
        if stored is None:
            return Retry(Cause.TRANSIENT, "another process was quicker")
        self._running.metrics.commands(order.command_type, outcome).inc()
        return await self._report(stored, record)

    async def _report(self, place: Place, record: Record) -> Outcome:
        """Tells the ControlPlane what is stored, once."""
        if record.reported or record.report is None:
            return DUPLICATE
        try:
            await self._running.client.command_result(record.report, record.report["command_id"])
        except errors.ControlPlaneError as error:
            return unreported(error)
        await self._memory.remember(place, msgspec.structs.replace(record, reported=True))
        return DELIVERED

    def _body(
        self, order: Order, *, result: dict[str, Any] | None = None, error: str | None = None
    ) -> dict[str, Any]:
        body: dict[str, Any] = {"command_id": order.command_id, "success": error is None}
        if result is not None:
            body["result"] = result
        if error is not None:
            body["error_message"] = error
        return body | {"execution_timestamp": rfc3339(self._now())}


def unreported(error: errors.ControlPlaneError) -> Outcome:
    """What becomes of an entry whose report did not get through; the result stays stored."""
    match error:
        case errors.Rejected():  # never as it is: an operator sees it among the dead letters
            return Dead(Reason.REJECTED, f"the report was refused: {error}", error.status)
        case errors.NotFound():
            cause = Cause.NOT_FOUND
        case errors.BreakerOpen():  # nothing was sent; goes when the gate opens
            cause = Cause.HELD
        case errors.Unconfirmed():
            cause = Cause.UNCONFIRMED
        case _:  # a key or a path that is wrong, too: in the registrar that concerns this call alone
            cause = Cause.TRANSIENT
    return Retry(cause, str(error), error.status, error.retry_after)
