"""The judge: what must hold, at the end of a run and where it can be all along.

Three books are compared, the producers', Redis's and the ControlPlane's (`sandbox.reconciler`), with the book of
what faults took away; beside them the agent's own ledger, its views, its logs and its processes.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

import msgspec

from common.figures import StreamFigures
from sandbox.book import Row
from sandbox.chaos import views
from sandbox.chaos.world import NAMES, PRODUCED, STREAMS, World
from sandbox.ledger import Ledger, Verdict
from sandbox.reconciler import Reconciliation, reconcile
from sandbox.redis_book import Holding, position, read_redis

DRAIN_WITHIN = 60.0
"""Seconds after the last entry was written in which everything must have ended."""

SWEEP_WITHIN = 75.0
"""Seconds in which ghosts in the dead-letter view are cleared: the janitor comes every minute."""

UNREAD = 10.0
"""A grant of a request this much older than a flush may have been written and flushed before it was read."""


class Check(msgspec.Struct):
    """Something that must not be, and what there is of it."""

    name: str
    found: list[str]

    @property
    def holds(self) -> bool:
        return not self.found


class Judgement(msgspec.Struct):
    """The verdict over one run."""

    checks: list[Check]
    reconciliation: Reconciliation
    figures: dict[str, int]
    drained_seconds: float

    @property
    def ok(self) -> bool:
        return all(check.holds for check in self.checks)


async def along(world: World) -> list[str]:
    """What is wrong right now, between two faults; empty when all is well."""
    wrong: list[str] = []
    for _ in range(5):  # the two looks are not one instant: what does not last is no finding
        wrong = []
        async with world.connected() as redis:
            for service in PRODUCED:
                stream = STREAMS[service]
                odd = await views.examine(redis, stream)
                found = await world.figures()
                if found is None:
                    return []
                wrong += [f"{stream.name}: {one} is in no view" for one in odd.strays]
                wrong += [f"{stream.name}: {one} is in two views" for one in odd.doubles]
                wrong += _imbalance(world, service, found[service], len(odd.ghosts))
        if not wrong:
            break
        await asyncio.sleep(0.1)
    return wrong


def _imbalance(world: World, service: str, figures: StreamFigures, ghosts: int) -> list[str]:
    """The ledger's imbalance is what others deleted unread, and what they deleted and nobody has noticed yet."""
    name = STREAMS[service].name
    expected = world.removals.imbalance[name] + ghosts
    if figures.imbalance == expected:
        return []
    return [f"{name}: the ledger's imbalance is {figures.imbalance}, expected {expected}: {figures.ledger}"]


def _granted_twice(world: World, rows: Iterable[Row]) -> list[str]:
    """Grants that AudioAPIServers received more often than there were or may have been requests."""
    asked = Counter(row.transaction_id for row in rows if row.kind == "quota" and row.transaction_id)
    found = world.grants.too_often(asked, world.removals.memory_gone)
    return [
        f"{NAMES.quota_response}: transaction {id}, received {times} times" for id, times in found.items()
    ]


def _ungranted(
    world: World,
    rows: Iterable[Row],
    holding: Holding,
    recorded: set[str],
    removed: Collection[tuple[str, str]],
) -> list[str]:
    """Requests that are settled and recorded, and whose grant AudioAPIServers never received."""
    there = holding.pending | holding.dead.keys() | holding.backlog
    return [
        f"{row.stream}: entry {row.entry_id}, transaction {row.transaction_id}"
        for row in rows
        if row.kind == "quota"
        and row.entry_id is not None
        and row.entry_id not in there
        and row.transaction_id in recorded
        and row.transaction_id not in world.grants.came
        and (row.stream, row.entry_id) not in removed
        and not any(0 < at - position(row.entry_id)[0] / 1000 < UNREAD for at in world.removals.memory_gone)
    ]


async def drained(world: World) -> str:
    """What is not at rest yet; empty when everything is."""
    found = await world.figures()
    if found is None:
        return "Redis does not answer"
    waiting = [
        f"{STREAMS[service].name}: backlog {one.backlog}, pending {one.pending}"
        for service, one in found.items()
        if one.backlog > 0 or one.pending > 0
    ]
    if not waiting and (open_ := await asyncio.to_thread(_commands_without_result, world)):
        waiting.append(f"{len(open_)} commands without a result")
    return "; ".join(waiting)


async def judge(world: World, drained_seconds: float, undrained: str, broken: Iterable[str]) -> Judgement:
    """The verdict, when nothing is moving any more."""
    names = [STREAMS[service] for service in PRODUCED]
    rows = world.traffic.rows()
    removed = world.removals.of(rows)
    odd: list[str] = []
    imbalances: list[str] = []
    async with world.connected() as redis:
        holdings = await read_redis(redis, names)
        found = await world.figures()
        for service, stream in STREAMS.items():
            oddities = await views.examine(redis, stream)
            odd += (f"{stream.name}: {one} is in no view" for one in oddities.strays)
            odd += (f"{stream.name}: {one} is in two views" for one in oddities.doubles)
            odd += (f"{stream.name}: {one} is in a view and gone" for one in oddities.ghosts)
            if found is not None and service in PRODUCED:
                imbalances += _imbalance(world, service, found[service], 0)
    ledger = Ledger(world.book_file)
    try:
        book = ledger.book()
        commands = ledger.commands()
    finally:
        ledger.close()
    books = reconcile(rows, book, holdings, removed=removed)
    recorded = {one.transaction_id for one in book.transactions}
    ungranted = _ungranted(world, rows, holdings[NAMES.quota_refresh], recorded, removed)
    wrong = books.wrong
    conflicts = [
        f"{one.endpoint}: transaction {one.transaction_id} with other content"
        for one in book.arrivals
        if one.verdict == Verdict.CONFLICT and one.endpoint != "command_results"
    ]
    twice = [
        f"command {one['command_id']} has {len(one['results'])} results"
        for one in commands
        if len(one["results"]) > 1 and not _forgot_between(world, one["results"])
    ]
    obeyed = [
        f"command {one['command_id']}, forged ({one['forge']}), was carried out"
        for one in commands
        if one["forge"] is not None and any(result["body"]["success"] for result in one["results"])
    ]
    said = [one for replica in world.replicas for one in replica.went_back()]
    times = Counter(stream for stream, _ in said)
    without_cause = [
        f"{name}: said {times[name]} times, it was {world.removals.went_back[name]}"
        for name in (stream.name for stream in names)
        if times[name] > world.removals.went_back[name]
    ]
    tracebacks = [f"{replica.name}: {n}" for replica in world.replicas if (n := replica.tracebacks())]
    checks = [
        Check("entries lost", wrong("lost")),
        Check("second effects of one transaction", wrong("billed_twice")),
        Check("repetitions with another key", wrong("key_changes")),
        Check("repetitions with other content", [*wrong("content_changes"), *conflicts]),
        Check("order violations", _but_of(wrong("out_of_order"), world.redriven)),
        Check("second grants", [*wrong("second_grants"), *_granted_twice(world, rows)]),
        Check("quota requests settled without a grant", ungranted),
        Check("commands with two results", twice),
        Check("forged commands carried out", obeyed),
        Check("ledger imbalance beyond what others deleted", imbalances),
        Check("streams said to have gone back that have not", without_cause),
        Check("entries not in exactly one view", odd),
        Check("dead letters that are not faulty", _but_of(wrong("unexpected_dead"), world.poisoned)),
        Check("faulty entries delivered", wrong("unexpected_delivered")),
        Check(f"entries or commands under way after {DRAIN_WITHIN:.0f} s", [undrained] if undrained else []),
        Check("processes that ended by themselves", [*world.died, *world.traffic.failures]),
        Check("tracebacks in the logs", tracebacks),
        Check("expectations of a fault that were not met", [*broken]),
    ]
    figures = {
        "entries produced": books.total("produced"),
        "delivered": books.total("delivered"),
        "sent again and absorbed by the ControlPlane": books.total("duplicates"),
        **{f"dead, {reason}": n for reason, n in sorted(books.dead().items())},
        "taken away by others before delivery": books.total("removed"),
        "lost with their stream, as the services estimated": sum(lost for _, lost in said),
        "XADDs with a lost reply": books.total("uncertain"),
        "commands": len(commands),
        "commands with a forged token": sum(one["forge"] is not None for one in commands),
        "requests that arrived": book.arrivals[-1].request if book.arrivals else 0,
    }
    return Judgement(checks, books, figures, drained_seconds)


def _forgot_between(world: World, results: list[dict[str, Any]]) -> bool:
    first, last = results[0]["received_at"], results[-1]["received_at"]
    return any(first < at < last for at in world.removals.memory_gone)


def _but_of(found: list[str], sessions: set[str]) -> list[str]:
    """What does not concern these sessions."""
    return [one for one in found if one.partition("session ")[2].partition(",")[0] not in sessions]


def _commands_without_result(world: World) -> list[str]:
    ledger = Ledger(world.book_file)
    try:
        return [one["command_id"] for one in ledger.commands() if not one["results"]]
    finally:
        ledger.close()
