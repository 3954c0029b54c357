"""Whatever the interleaving, an entry is in exactly one view or has left through exactly one count.

Three consumers, a producer and an operator do what they do in any order, late, twice, or with a lost reply, through
the functions that the services call. After every step Redis has to lie as the model says, and the laws have to hold.
More lives, and others each time: `pytest tests/property --hypothesis-profile=long`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from random import Random
from typing import Any, TypeVar, cast

import msgspec
import pytest
from hypothesis import note, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from common import dead_letters, figures, logs
from common.consumer import MAX_BYTES, Consumer
from common.delivery import Limits
from common.entries import SUSPECT, Entry, Hand, Row
from common.ledger import GONE
from common.outcomes import DELIVERED, DUPLICATE, Dead, Delivered, Reason
from common.redis_border import GroupGone, RedisFault, Scripts
from common.redis_state import RedisState
from common.settlement import TurnLost
from common.streams import Stream
from tests.integration import workbench
from tests.integration.workbench import Counts, LosesReplies, Pending, State, Told, id_order, new_gate
from tests.property.stream_model import StreamModel, Took
from tests.support import SERVERS, RedisServer, connect

T = TypeVar("T")

LIVES, STEPS = 22, 50
"""How many lives of how many steps each kind of stream has on each server, unless a profile asks for more."""

VISIBILITY = 1000.0
"""Seconds; no step takes so long, so an entry is idle only when the machine says so."""

IDLE_MS = 2_000_000
NOW = 1000.0


PLACES = ("pending", "dead", "unread")


class Kind(msgspec.Struct, frozen=True):
    """What a service is, as far as its stream is concerned."""

    stream: Stream
    ordered: bool = False
    response_stream: str | None = None


KINDS = {
    "plain": Kind(workbench.STREAM),
    "ordered": Kind(workbench.ORDERED, ordered=True),
    "answered": Kind(
        Stream("queue:quota_refresh", "quota_refresher"), response_stream="queue:quota_response"
    ),
}


class Bench:
    """A server, and the event loop on which everything in here happens."""

    def __init__(self, port: int, runner: asyncio.Runner) -> None:
        self.runner = runner
        self.redis: Redis = connect(port)
        self.scripts = LosesReplies(self.redis)

    def run(self, doing: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(doing)


class Process:
    """A consumer without its loop: the machine says what it does, and when."""

    def __init__(self, name: str, kind: Kind, scripts: Scripts) -> None:
        self.name = name
        self.now = 0.0
        self.met: list[Entry] = []  # all it ever had in hand, the newest last
        self.consumer = Consumer(
            name,
            kind.stream.group,
            kind.stream,
            Told(ordered=kind.ordered),
            Limits(
                read_count=100,
                max_in_flight=8,
                batch=1,
                visibility_timeout=VISIBILITY,
                claim_interval=1.0,
                max_deliveries=5,
                not_found_hold=300.0,
                doorbell=0.1,
            ),
            scripts=scripts,
            gate=new_gate(),
            redis_state=RedisState(scripts.redis, self.clock, lambda why: None, lambda yes: None),
            tally=Counts(),
            clock=self.clock,
            random=Random(7),
            response_stream=kind.response_stream,
        )
        self.turn = self.consumer.turn
        self.hand = self.consumer.hand
        self.settlement = self.consumer.settlement
        self.reclaimer = self.consumer._reclaimer

    def clock(self) -> float:
        return self.now

    @property
    def token(self) -> str | None:
        return self.turn and self.turn.token

    @property
    def sweeping(self) -> bool:
        return self.now >= self.reclaimer._sweep_at

    @property
    def in_hand(self) -> set[str]:
        return {entry.id.decode() for entry in self.hand}

    def some(self, which: set[int]) -> list[Entry]:
        """Entries it has met: first what it holds, then what it has held; some are long gone, or another's."""
        return picked(sorted(self.met, key=self.hand.holds, reverse=True), which)

    def take(self, rows: list[Row]) -> None:
        for row in rows:
            if row[0] not in self.hand:
                entry = Entry.of(row, self.now)
                self.hand.take([entry])
                self.met.append(entry)


def figures_of(number: int) -> tuple[int, int, int, int]:
    """No two entries have the same, so a sum tells which were counted."""
    return (10**12 - number, 10**11 + number, 2**40 - number, number)


def picked(among: Sequence[T], which: set[int]) -> list[T]:
    return [among[n] for n in sorted({n % len(among) for n in which})] if among else []


def leases(entries: Sequence[Entry]) -> Took:
    return [(entry.id.decode(), entry.deliveries) for entry in entries]


whose = st.integers(0, 5)
which = st.sets(st.integers(0, 9), min_size=1, max_size=4)
rooms = st.integers(1, 9)
outcomes = st.sampled_from([DELIVERED, DUPLICATE, *(Dead(reason, "why") for reason in Reason), None])
lost = st.sampled_from([False] * 5 + [True])


class Lives(RuleBasedStateMachine):
    """One life of a stream."""

    def __init__(self, bench: Bench, kind: Kind) -> None:
        super().__init__()
        self.bench, self.kind, self.stream = bench, kind, kind.stream
        self.redis, self.scripts = bench.redis, bench.scripts
        self.model = StreamModel(kind.stream)
        self.named = (f"{kind.stream.group}-{n}" for n in itertools.count(1))
        bench.run(self.redis.flushall())
        self.processes = bench.run(self._start(3))

    async def _start(self, n: int) -> list[Process]:
        return [Process(next(self.named), self.kind, self.scripts) for _ in range(n)]

    # -- doing a thing twice: in the model, and in Redis ----------------------------------------------

    def both(
        self,
        expected: Callable[[], T],
        doing: Callable[[], Coroutine[Any, Any, T]],
        who: Process | None = None,
        lose: str = "",
    ) -> T | None:
        """What both come to, a fault included; None after a fault. The reply to `lose` gets lost."""
        want = self._came_to(expected)
        self.scripts.lose.clear()
        self.scripts.lose[lose] += bool(lose)
        try:
            got: Any = self.bench.run(doing())
        except (RedisFault, TurnLost) as fault:
            got = fault
        was_lost = bool(lose) and not self.scripts.lose[lose]
        if isinstance(got, TurnLost) and who is not None:
            who.consumer._lose_turn()
        if isinstance(got, GroupGone) and who is not None:
            self.make_groups()  # as every service does before anything else
        if was_lost:
            assert isinstance(got, Exception), f"lost, and yet it came: {got!r}"
            return None
        if isinstance(want, Exception) or isinstance(got, Exception):
            assert type(want) is type(got), f"model: {want!r}, Redis: {got!r}"
            return None
        assert want == got
        return cast(T, got)

    @staticmethod
    def _came_to(expected: Callable[[], T]) -> T | Exception:
        try:
            return expected()
        except (RedisFault, TurnLost) as fault:
            return fault

    @property
    def somebody_has_read(self) -> bool:
        return any(one.met for one in self.processes)

    @property
    def suspects(self) -> bool:
        return any(item.count >= SUSPECT for item in self.model.at("pending"))

    @property
    def held_by_nobody(self) -> bool:
        """A read came to its name, and not to its hand."""
        hands = {one.name: one.in_hand for one in self.processes}
        return any(i.id not in hands.get(i.by, {i.id}) for i in self.model.at("pending"))

    def one(self, who: int) -> Process:
        """Any of the three, but more often one that can get something done: it has the turn, or entries in hand."""
        able = [
            one
            for one in self.processes
            if (one.token == self.model.turn if self.kind.ordered else len(one.hand))
        ]
        return able[who % len(able)] if able and who >= 3 else self.processes[who % 3]

    def ids(self, which: set[int], place: str, by: str | None = None) -> list[str]:
        """Entries of the stream: first those that are in this place, then all others."""
        there = self.model.at(place, by)
        others = [item for item in self.model.items.values() if item not in there]
        return [item.id for item in picked([*there, *others], which)]

    def getting(
        self, who: Process, expected: Callable[[], Took], doing: Callable[[], Awaitable[list[Row]]], lose: str
    ) -> None:
        """Entries come into a hand, unless the reply is lost."""
        rows: list[Row] = []

        async def took() -> Took:
            rows.extend(await doing())
            return [(row[0].decode(), row[4] if len(row) > 4 else 1) for row in rows]

        if (got := self.both(expected, took, who, lose)) is not None:
            note(f"{who.name} has {got}")
            for row in rows:
                assert row[1] == row[0] or (row[1] is None and row[4] >= 3), f"another's fields: {row}"
            who.take(rows)

    # -- the producer and the operator ---------------------------------------------------------------

    @initialize(entries=st.integers(0, 6), rooms=st.lists(rooms, min_size=3, max_size=3))
    def begin(self, entries: int, rooms: list[int]) -> None:
        """What is in the stream before its groups counts, too; then each has read, if need be one in its turn."""
        self.produce(entries)
        self.make_groups()
        for who, room in enumerate(rooms):
            if self.kind.ordered:
                self.ask_for_the_turn(self.processes[who])
            self.read(who, room, lost=False)

    @rule(entries=st.integers(1, 4))
    def produce(self, entries: int) -> None:
        for _ in range(entries):
            number = len(self.model.items) + 1
            entry_id = f"{number // 2 + 1}-{number % 2}"  # two share a millisecond
            self.model.add(entry_id, (0, 0, 0, 0) if self.kind.ordered else figures_of(number))
            self.bench.run(self.redis.xadd(self.stream.name, {"data": entry_id}, id=entry_id))

    @precondition(lambda self: self.model.state().entries)
    @rule(which=st.sets(st.integers(0, 9), min_size=1, max_size=2), place=st.sampled_from(PLACES))
    def operator_deletes(self, which: set[int], place: str) -> None:
        ids = self.ids(which, place)
        note(f"XDEL {ids}")
        for entry_id in ids:
            deleted = self.bench.run(self.redis.xdel(self.stream.name, entry_id))
            assert deleted == self.model.items[entry_id].stored
            self.model.delete(entry_id)

    @precondition(lambda self: self.model.at("pending") or self.model.at("dead"))
    @rule(groups=st.sampled_from(["twin", "live", "live and twin"]))
    def operator_destroys(self, groups: str) -> None:
        if "live" in groups:
            self.model.destroy_live()
            self.bench.run(self.redis.xgroup_destroy(self.stream.name, self.stream.group))
        if "twin" in groups:
            self.model.destroy_twin()
            self.bench.run(self.redis.xgroup_destroy(self.stream.name, self.stream.dead_group))

    @precondition(lambda self: not (self.model.live and self.model.twin))
    @rule()
    def make_groups(self) -> None:
        self.both(self.model.make_groups, lambda: workbench.make_groups(self.redis, self.stream))

    @precondition(lambda self: self.model.at("dead"))
    @rule(which=which, again=st.booleans())
    def operator_decides(self, which: set[int], again: bool) -> None:
        """Redrives or discards: the dead, and also what is not dead any more."""
        ids = self.ids(which, "dead")
        note(f"{'redrive' if again else 'discard'} {ids}")
        decide = self.model.redrive if again else self.model.discard
        carry_out = dead_letters.redrive if again else dead_letters.discard
        self.both(lambda: decide(ids), lambda: carry_out(self.redis, self.stream, ids))

    # -- the consumers get entries -------------------------------------------------------------------

    @precondition(lambda self: self.model.reached < len(self.model.items) or self.model.at("dead"))
    @rule(who=whose, room=rooms, lost=lost)
    def read(self, who: int, room: int, lost: bool) -> None:
        one = self.one(who)
        self.getting(
            one,
            lambda: self.model.read(one.name, one.token, room),
            lambda: one.consumer._read(room, MAX_BYTES),
            "read" if lost else "",
        )

    @precondition(lambda self: self.model.at("pending"))
    @rule(n=st.integers(0, 5))
    def nobody_hears_of_an_owner_any_more(self, n: int) -> None:
        """It is paused, dead, or cut off: the visibility timeout passes for what it has pending."""
        owners = sorted({item.by for item in self.model.at("pending")})
        silent = [item for item in self.model.at("pending", owners[n % len(owners)]) if item.stored]

        async def passes() -> None:
            for item in silent:
                await self.redis.xclaim(
                    self.stream.name, self.stream.group, item.by, 0, [item.id], idle=IDLE_MS,
                    retrycount=item.count, justid=True,
                )  # fmt: skip

        self.bench.run(passes())
        for item in silent:
            item.idle = True

    @precondition(lambda self: self.model.at("pending"))
    @rule(who=whose, room=rooms, seconds=st.sampled_from([0.0, 2.0]), lost=lost)
    def take_over(self, who: int, room: int, seconds: float, lost: bool) -> None:
        one = self.one(who)
        one.now += seconds
        sweeping, cursor = one.sweeping, one.reclaimer._cursor.decode()
        want: str | None = None

        def expected() -> Took:
            nonlocal want
            want, took = self.model.take_over(one.name, one.token, sweeping, cursor, room)
            return took

        self.getting(one, expected, lambda: one.reclaimer.take(room), "take_over" if lost else "")
        if not lost:
            assert one.reclaimer._cursor.decode() == (want or cursor)

    @precondition(lambda self: self.held_by_nobody)
    @rule(who=whose, lost=lost)
    def look_for_what_was_delivered_to_nobody(self, who: int, lost: bool) -> None:
        one = self.one(who)
        self.getting(
            one,
            lambda: self.model.recover(one.name, one.in_hand),
            one.reclaimer.recover,
            "fetch" if lost else "",
        )

    @precondition(lambda self: self.suspects)
    @rule(who=whose, which=which)
    def fetch_suspects(self, who: int, which: set[int]) -> None:
        """Or what was one: by now it may be another's, or gone."""
        one = self.one(who)
        ids = self.ids(which, "pending", one.name)
        self.getting(
            one,
            lambda: self.model.fetch(one.name, ids),
            lambda: one.reclaimer.fetch([entry_id.encode() for entry_id in ids]),
            "",
        )

    # -- the consumers end and keep entries -----------------------------------------------------------

    def confirm(self, one: Process, entry: Entry, outcome: Delivered) -> None:
        entry.message, entry.reply = self.model.items[entry.id.decode()].figures, b"{}"
        one.settlement.delivered([entry], outcome)

    def flush(self, one: Process, lose: str) -> None:
        """Ends what waits in the settlement: also what an earlier fault has left there."""
        settling = [(entry.id.decode(), duplicate) for entry, duplicate in one.settlement._settling]
        burying = [(e.id.decode(), dead.reason.value, e.attempts) for e, dead in one.settlement._burying]
        note(f"{one.name} settles {settling} and buries {burying}")

        self.both(lambda: self._flushed(one, settling, burying), one.settlement.flush, one, lose)

    def _flushed(
        self, one: Process, settling: list[tuple[str, bool]], burying: list[tuple[str, str, int]]
    ) -> None:
        """What a flush comes to in the model: what is to be buried is, whatever becomes of the rest."""
        try:
            if settling and self.kind.response_stream:
                self.model.answer(one.name, settling)
            elif settling:
                self.model.settle(one.token, settling)
        finally:
            if burying:
                self.model.bury(one.name, one.token, burying)

    @precondition(lambda self: self.somebody_has_read)
    @rule(who=whose, which=which, duplicate=st.booleans(), lost=lost)
    def settle(self, who: int, which: set[int], duplicate: bool, lost: bool) -> None:
        one = self.one(who)
        for entry in one.some(which):
            self.confirm(one, entry, DUPLICATE if duplicate else DELIVERED)
        self.flush(one, ("answer" if self.kind.response_stream else "settle") if lost else "")

    @precondition(lambda self: self.somebody_has_read)
    @rule(who=whose, which=which, reason=st.sampled_from(Reason), attempts=st.integers(0, 3), lost=lost)
    def bury(self, who: int, which: set[int], reason: Reason, attempts: int, lost: bool) -> None:
        one = self.one(who)
        for entry in one.some(which):
            entry.attempts = attempts
            one.settlement.died(entry, Dead(reason, "why"))
        self.flush(one, "bury" if lost else "")

    @precondition(lambda self: any(len(one.hand) for one in self.processes))
    @rule(who=whose, outcomes=st.lists(outcomes, min_size=1, max_size=6), lost=lost)
    def deliver(self, who: int, outcomes: list[Delivered | Dead | None], lost: bool) -> None:
        """What the ControlPlane says of all in hand; of which nothing is said is still out."""
        one = self.one(who)
        for entry, outcome in zip(list(one.hand), itertools.cycle(outcomes), strict=False):
            if isinstance(outcome, Dead):
                one.settlement.died(entry, outcome)
            elif outcome:
                self.confirm(one, entry, outcome)
        self.flush(one, "bury" if lost else "")

    @precondition(lambda self: self.somebody_has_read)
    @rule(who=whose, which=which, deliveries=st.integers(1, 5), lost=lost)
    def renew(self, who: int, which: set[int], deliveries: int, lost: bool) -> None:
        one = self.one(who)
        entries = list({entry.id: entry for entry in reversed(one.some(which))}.values())
        for entry in entries:
            entry.deliveries = deliveries
        note(f"{one.name} renews {leases(entries)}")

        async def renewed() -> set[str]:
            # What was lost long ago as well: the call may have been under way when it was.
            one.settlement.hand = Hand()
            for entry in entries:
                one.settlement.hand.take([entry])
            try:
                gone = await one.settlement.renew(entries)
            finally:
                one.settlement.hand = one.hand
            one.hand.drop(gone)
            return {entry.id.decode() for entry in gone}

        self.both(lambda: self.model.renew(one.name, leases(entries)), renewed, one, "renew" if lost else "")

    @precondition(lambda self: self.somebody_has_read)
    @rule(who=whose, which=which, lost=lost)
    def hand_over(self, who: int, which: set[int], lost: bool) -> None:
        one = self.one(who)
        entries = one.some(which)
        note(f"{one.name} hands over {leases(entries)}")
        self.both(
            lambda: self.model.hand_over(one.name, leases(entries)),
            lambda: one.settlement.hand_over(entries),
            one,
            "hand_over" if lost else "",
        )

    @precondition(lambda self: any(not item.stored for item in self.model.at("dead")))
    @rule(who=whose)
    def sweep(self, who: int) -> None:
        async def swept() -> int:
            return (await self.one(who).reclaimer.sweep()).ghosts

        self.both(self.model.sweep, swept)

    # -- processes come and go -----------------------------------------------------------------------

    @precondition(lambda self: self.somebody_has_read)
    @rule(who=whose, killed=st.booleans())
    def process_ends(self, who: int, killed: bool) -> None:
        """Another begins, under another name."""
        one = self.one(who)
        if not killed:
            self.drain(one)
        [self.processes[self.processes.index(one)]] = self.bench.run(self._start(1))

    def drain(self, one: Process) -> None:
        """The orderly end: a fault on the way leaves the rest to whoever takes over."""
        hand, settlement = list(one.hand), one.settlement
        settling = [(entry.id.decode(), duplicate) for entry, duplicate in settlement._settling]
        burying = [(e.id.decode(), dead.reason.value, e.attempts) for e, dead in settlement._burying]
        first = [] if self.kind.ordered else [e for e in hand if not (e.ended or e.suspect)]
        ended = {entry.id for entry, _ in (*settlement._settling, *settlement._burying)}
        rest = [e for e in hand if e not in first and e.id not in ended]

        def expected() -> None:
            try:
                self.model.hand_over(one.name, leases(first))
                self._flushed(one, settling, burying)
                self.model.hand_over(one.name, leases(rest))
                if one.turn is not None:
                    self.model.give_up_turn(one.turn.token, one.turn._next)
            except (RedisFault, TurnLost):
                pass

        async def stopped() -> None:
            one.consumer.stop()
            await one.consumer.drain(asyncio.get_running_loop().time() + 60.0)

        self.both(expected, stopped)

    # -- the turn ------------------------------------------------------------------------------------

    @precondition(lambda self: self.kind.ordered)
    @rule(who=whose, what=st.sampled_from(["ask", "replace", "runs out"]), lost=lost)
    def the_turn(self, who: int, what: str, lost: bool) -> None:
        if what == "ask":
            self.ask_for_the_turn(self.one(who))
        elif what == "replace":
            self.replace_the_token(self.one(who), lost)
        else:
            self.model.turn = None
            self.bench.run(self.redis.delete(self.stream.turn_key))
            self.ask_for_the_turn(self.processes[who % 3])

    def ask_for_the_turn(self, one: Process) -> None:
        turn = one.turn
        assert turn is not None
        self.both(lambda: self.model.take_turn(turn.token, turn._next), turn.ask)

    def replace_the_token(self, one: Process, lost: bool) -> None:
        """After a fault: what was sent under the old one and is still under way has to change nothing."""
        turn = one.turn
        assert turn is not None
        held, following = turn.held, turn._next or f"{turn._name}/{turn._replaced + 1}"

        def expected() -> None:
            had = self.model.turn in (turn.token, following)
            self.model.take_turn(following, turn.token)
            if not (had and held):
                raise TurnLost

        async def fenced() -> None:
            one.consumer._late = True
            await one.consumer._fence()

        self.both(expected, fenced, one, "turn_take" if lost else "")

    @precondition(lambda self: self.kind.ordered and self.model.at("pending"))
    @rule(who=whose)
    def take_all_that_is_pending(self, who: int) -> None:
        one = self.one(who)
        self.getting(one, lambda: self.model.take_all(one.name, one.token), one.reclaimer.take_all, "")

    # -- what holds after every step -----------------------------------------------------------------

    @invariant()
    def redis_lies_as_the_model_says_and_the_laws_hold(self) -> None:
        state, read_up_to, turn, grants, seen = self.bench.run(self._look())
        model = self.model
        assert state == model.state()
        assert read_up_to == (model.last_read if model.live else None)
        assert (turn and turn.decode()) == model.turn
        assert grants == model.grants
        every_entry_is_in_one_view(state, read_up_to)
        the_ledger_holds(state, seen, model.uncounted)
        the_figures_say_what_lies_there(state, read_up_to, seen)

    async def _look(self) -> tuple[State, str | None, bytes | None, int, figures.StreamFigures]:
        stream = self.stream
        async with self.redis.pipeline(transaction=False) as looking:
            looking.xrange(stream.name)
            for group in (stream.group, stream.dead_group):
                looking.xpending_range(stream.name, group, "-", "+", 1000)
            looking.hkeys(stream.dead_key)
            looking.hgetall(stream.ledger_key)
            looking.xinfo_groups(stream.name)
            looking.get(stream.turn_key)
            looking.xlen(self.kind.response_stream or "nowhere")
            entries, live, dead, documents, books, groups, turn, grants = await looking.execute(False)
        state = State(
            entries=[entry_id.decode() for entry_id, _ in entries],
            live=shown(live),
            dead=shown(dead),
            documents=sorted(field.decode() for field in documents),
            ledger={name.decode(): int(n) for name, n in sorted(books.items()) if name != b"base"},
        )
        read_up_to = {group["name"]: group["last-delivered-id"].decode() for group in groups}
        seen = await figures.read(self.scripts, stream, now=NOW)
        return state, read_up_to.get(stream.group.encode()), turn, grants, seen


def shown(rows: list[dict[str, Any]] | ResponseError) -> Pending | None:
    """What is pending in a group; None where there is no group."""
    if isinstance(rows, ResponseError):
        return None
    return {r["message_id"].decode(): (r["consumer"].decode(), r["times_delivered"]) for r in rows}


# -- the laws, of what lies in Redis alone -----------------------------------------------------------


def every_entry_is_in_one_view(state: State, read_up_to: str | None) -> None:
    """In the backlog, pending with one owner, or dead with a document: in none means lost, in two doubled."""
    pending, documents = set(state.live or {}), set(state.documents)
    dead = documents if state.dead is None else set(state.dead)
    assert dead == documents
    unread = {i for i in state.entries if id_order(i) > id_order(read_up_to or "0-0")} - dead
    views = Counter(itertools.chain(unread, pending, dead))
    assert not [i for i in state.entries if not views[i]], "in no view"
    assert not [i for i, n in views.items() if n > 1], "in two views"


def the_ledger_holds(state: State, seen: figures.StreamFigures, uncounted: int) -> None:
    """Contract section 2; what an operator deleted shows as imbalance, until somebody has met it and counts it."""
    ended = sum(state.ledger.get(way, 0) for way in GONE)
    assert seen.entries_added == seen.ledger["base"] + ended + len(state.entries) + uncounted
    assert seen.imbalance == uncounted


def the_figures_say_what_lies_there(
    state: State, read_up_to: str | None, seen: figures.StreamFigures
) -> None:
    live, dead = state.live or {}, state.dead or {}
    assert seen.length == len(state.entries)
    assert seen.pending == len(live)
    assert seen.dead == Counter(reason for reason, _ in dead.values())
    assert seen.backlog == len(state.entries) - len(live) - len(dead)
    assert {one.name: one.pending for one in seen.consumers if one.pending} == Counter(
        owner for owner, _ in live.values()
    )
    assert {name: n for name, n in seen.ledger.items() if name != "base"} == state.ledger
    unread = [i for i in state.entries if id_order(i) > id_order(read_up_to or "0-0")]
    oldest = min(live or unread, key=id_order, default=None)
    age = None if oldest is None else NOW - id_order(oldest)[0] / 1000
    assert seen.oldest_age_seconds == age


# -- the tests ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One process of each kind for all lives; each begins with nothing in it."""
    server = RedisServer(request.param, tmp_path_factory.mktemp(request.param))
    server.start()
    yield server
    server.kill()


@pytest.mark.timeout(400)  # to make what it has found as small as it can be may take five minutes
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_whatever_the_interleaving_no_entry_is_lost_doubled_or_counted_twice(
    server: RedisServer, kind: Kind, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = settings.get_current_profile_name() == "project"
    lives = settings(max_examples=LIVES) if usual else settings()
    with asyncio.Runner() as runner:
        bench = Bench(server.port, runner)

        def live() -> Lives:
            return Lives(bench, kind)

        try:
            if usual:
                live = seed(list(SERVERS).index(server.kind))(live)  # each server sees lives of its own
            run_state_machine_as_test(live, settings=settings(lives, stateful_step_count=STEPS))
        finally:
            bench.run(bench.redis.aclose())
            logs.flush()
            capsys.readouterr()  # what was logged in all those lives would bury the one that failed
