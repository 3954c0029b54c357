"""The judge: it looks on at every step, keeps its own books, and says which promise was broken first.

While it runs: an entry is in exactly one view; only its owner moves it; its delivery count rises only when a
process died; nothing is read while the gate is shut; nobody spins; sessions keep their order; only flawed entries die.
At the end: nothing is lost, nothing took effect twice, every grant was given once, and the ledger adds up.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from typing import Any

import msgspec
from fakeredis.model._stream import PelEntry, StreamEntryKey

from common.ledger import GONE, LOST, imbalance, parse
from common.schemas import transaction_id
from common.streams import HANDOVER, Stream
from simulation.agent import Agent
from simulation.control_plane import ControlPlane, Effect
from simulation.loop import Loop, Process
from simulation.plan import MAX_DELIVERIES, Plan, Planned
from simulation.redis_server import Reply, Server

MOST_CALLS = 300
"""Calls to Redis that a process may make within one virtual second; idle it makes about five."""

SUSPECT = 3

DIES_OF = {
    "garbled": "invalid",
    "empty": "invalid",
    "rejected": "rejected",
    "never known": "rejected",
    "forbidden": "rejected",
    "poison": "poison",
    "conflict": "conflict",
}

UNREADABLE = ("garbled", "empty")
"""What nobody can read belongs to no session that anybody could know of."""

Pending = dict[StreamEntryKey, PelEntry]


class Item:
    """One entry that was produced."""

    __slots__ = ("data", "exempt", "id", "key", "planned", "redriven")

    def __init__(self, planned: Planned, entry_id: str, key: str, data: bytes) -> None:
        self.planned = planned
        self.id = entry_id
        self.key = key
        self.data = data
        self.exempt = ""  # why nobody has to answer for it: deleted, trimmed, discarded
        self.redriven = False

    def __str__(self) -> str:
        flaw = f", {self.planned.flaw}" if self.planned.flaw else ""
        return f"{self.id} ({self.planned.serial} of {self.planned.session}{flaw})"


class Judge:
    """Sees everything: the calls to Redis, the book of the ControlPlane, and what was produced."""

    def __init__(self, plan: Plan, loop: Loop, server: Server, stream: Stream) -> None:
        self.plan = plan
        self.offences: list[str] = []
        self.items: dict[str, Item] = {}
        self.over = False
        self.tracing = False
        self.trace: list[str] = []
        self.books_lost = False  # the stream was deleted: its ledger begins anew
        self.unread_deleted = 0
        self.most_lost = 0  # with the stream itself, when it was deleted or flushed
        self.calls: Counter[str] = Counter()
        self.control_plane: ControlPlane
        self.agents: list[Agent] = []
        self._loop = loop
        self._server = server
        self._stream = stream
        self._group, self._twin = stream.group.encode(), stream.dead_group.encode()
        self._planned = {entry.serial: entry for entry in plan.entries}
        self._sessions: dict[str, list[Item]] = {}
        self._conflicts = {entry.key for entry in plan.entries if entry.flaw == "conflict"}
        self._recent: dict[Process, deque[float]] = {}
        self._trouble: dict[Process, float] = {}
        self._unrenewed: dict[Process, float] = {}
        self._alone: dict[StreamEntryKey, int] = {}
        self._known: dict[StreamEntryKey, int] = {}  # the highest delivery count it ever had
        self.disturbed_at = float("-inf")  # an operator took the turn or the group away: nobody is dead
        self._settled: list[str] = []
        self._buried: set[str] = set()
        self._old: tuple[Pending, Pending] = ({}, {})
        self._on_offence = lambda: None

    # -- what happens ----------------------------------------------------------------------------------

    @property
    def most_idle_calls(self) -> float:
        """Calls a second of a process that has nothing to do: looks, sweeps, doorbells, renewals of the turn."""
        return 6.0 + 10.0 / min(self.plan.claim_interval, 2.0) + 12.0 / self.plan.visibility_timeout

    def note(self, what: str, **facts: object) -> None:
        if self.tracing:
            told = " ".join(f"{name}={value}" for name, value in facts.items())
            self.trace.append(f"{self._loop.time():10.4f}  {what} {told}")

    def offence(self, text: str) -> None:
        if self.over:
            return  # what the coroutines of the dead say when they are swept up
        self.offences.append(f"at {self._loop.time():.4f} s: {text}")
        self.note("OFFENCE", text=text)

    def produced(self, planned: Planned, entry_id: str, data: bytes) -> None:
        key = planned.key or transaction_id(self._stream.name, entry_id, data)
        item = self.items[entry_id] = Item(planned, entry_id, key, data)
        self._sessions.setdefault(planned.session, []).append(item)
        self.note("produced", id=entry_id, serial=planned.serial, session=planned.session, flaw=planned.flaw)

    def excuse(self, ids: Iterable[str], why: str) -> None:
        """What was done to these is nobody's fault here."""
        live, twin = self._pending()
        stream = self._server.stream(self._stream.name)
        documents = set(
            self._server.execute("HKEYS", self._stream.dead_key)
        )  # dead, too, while there is no twin
        for entry_id in ids:
            item = self.items.get(entry_id)
            if item is None:
                continue
            key = _key(entry_id)
            in_no_view = key not in live and key not in twin and entry_id.encode() not in documents
            if stream is not None and key in stream and in_no_view:
                self.unread_deleted += 1
            item.exempt = item.exempt or why

    # -- what the ControlPlane asks and tells ------------------------------------------------------------

    def knows(self, session: str) -> bool:
        if any(item.planned.flaw == "never known" for item in self._sessions.get(session, ())):
            return False
        return self._loop.time() >= self.plan.known_at.get(session, 0.0)

    def accepts(self, serial: str) -> str:
        return {"rejected": "422", "forbidden": "403"}.get(self._planned[serial].flaw, "yes")

    def requested(self, process: Process, serials: list[str], session: str) -> None:
        self.note("request", process=process, serials=serials, session=session)

    def recorded(self, key: str, effect: Effect) -> None:
        self.note("recorded", serial=effect.serial, key=key)
        if self.plan.service == "session_notifier":
            self._check_order(effect.serial)

    def _check_order(self, serial: str) -> None:
        """Whatever came before it in its session has been recorded, or will never be."""
        planned = self._planned[serial]
        for item in self._sessions[planned.session]:
            before = item.planned
            if before.place >= planned.place:
                continue
            if (
                before.serial == serial
                or before.flaw in UNREADABLE
                or item.key in self.control_plane.effects
                or item.exempt
                or item.redriven
            ):
                continue
            if item.id in self._buried or self._is_dying(item.id):
                continue
            self.offence(f"order: {serial} took effect before {item} of the same session")

    def _is_dying(self, entry_id: str) -> bool:
        """Somebody has its verdict and is about to bury it."""
        named = entry_id.encode()
        return any(
            entry.ended for agent in self.agents if agent.alive for entry in agent.consumer.hand.of([named])
        )

    # -- what the network tells ------------------------------------------------------------------------

    def trouble(self, process: Process, name: str, error: Exception) -> None:
        self.note("trouble", process=process, call=name, error=error)
        if name != "XREAD":
            self._trouble[process] = self._loop.time()
        if name in ("renew", "XPENDING", "fetch", "turn_take"):
            self._unrenewed[process] = self._loop.time()

    def sends(self, process: Process, name: str, command: tuple[Any, ...]) -> None:
        now = self._loop.time()
        self.calls[process.name] += 1
        recent = self._recent.setdefault(process, deque())
        recent.append(now)
        while recent[0] < now - 1.0:
            recent.popleft()
        if len(recent) > MOST_CALLS:
            self.offence(
                f"busy: {process} makes more than {MOST_CALLS} calls to Redis in a second, now {name}"
            )
            recent.clear()
        if name == "read" and isinstance(process, Agent) and not self._unwell(process, 6.0):
            self._check_gate(process)
        if self.tracing and name != "XREAD":
            self.note("calls", process=process, call=name, args=_told(command))

    def _check_gate(self, agent: Agent) -> None:
        now = self._loop.time()
        hold = agent.gate.hold
        if hold is not None and now - hold.since > 1.0:
            self.offence(f"gate: {agent} reads while held since {hold.since:.3f} ({hold.detail})")
        if agent.gate.breaker.state == "open" and agent.opened_at is not None and now - agent.opened_at > 1.0:
            self.offence(f"gate: {agent} reads while the breaker is open since {agent.opened_at:.3f}")

    def before(self, process: Process, name: str, command: tuple[Any, ...]) -> None:
        live, twin = self._pending()
        self._old = dict(live), dict(twin)

    def after(self, process: Process, name: str, command: tuple[Any, ...], reply: Reply) -> None:
        self.note("effect", process=process, call=name, reply=_short(reply))
        live, twin = self._pending()
        old_live, old_twin = self._old
        if live != old_live:
            self._check_moves(process, name, old_live, live)
            if name in ("read", "settle", "bury", "take_over") and self.plan.service == "session_notifier":
                self._check_turn(process, name)
        for key in twin.keys() - old_twin.keys():
            self._buried.add(_id(key))
            self._check_death(key, twin[key].consumer_name.decode())
        self._check_views(live, twin, name)

    def _check_moves(self, process: Process, name: str, old: Pending, new: Pending) -> None:
        me = process.name.encode()
        for key, was in old.items():
            now = new.get(key)
            if now is None:
                if name == "settle":
                    self._settled.append(_id(key))
                elif name in ("bury", "answer") and was.consumer_name != me:
                    self.offence(
                        f"owner: {process} ends {_id(key)} by {name}, which is {was.consumer_name!r}'s"
                    )
                self._alone.pop(key, None)
            elif now != was:
                self._check_change(process, name, key, was, now)

    def _check_turn(self, process: Process, name: str) -> None:
        holder = self._server.execute("GET", self._stream.turn_key)
        if holder is None or holder.split(b"/")[0] != process.name.encode():
            self.offence(f"turn: {process} changes the pending list by {name}, but the turn is {holder!r}'s")

    def _check_change(
        self, process: Process, name: str, key: StreamEntryKey, was: PelEntry, now: PelEntry
    ) -> None:
        me = process.name.encode()
        known = self._known.get(key, 1)
        # A re-made group begins to count anew; who holds the entry knows better.
        before = max(was.times_delivered, known) if name == "renew" else was.times_delivered
        risen = now.times_delivered - before
        self._known[key] = max(known, now.times_delivered)
        match name:
            case "take_over":
                self._alone.pop(key, None)
                if risen > 0 and (why := self._no_crash(was.consumer_name, process)):
                    self.offence(f"count: {process} takes {_id(key)} over as from a crash, but {why}")
            case "renew" | "fetch" | "hand_over" if was.consumer_name != me:
                self.offence(f"owner: {process} moves {_id(key)} by {name}, which is {was.consumer_name!r}'s")
            case "renew" if risen > 0:
                self._alone[key] = before
                if before < SUSPECT and self._loop.time() - self._unrenewed.get(process, -1e9) > 10.0:
                    self.offence(f"count: {_id(key)} rises to {now.times_delivered} without a crash")
            case "renew":
                self._alone.pop(key, None)
            case "hand_over":
                calm = min(was.times_delivered, self._alone.pop(key, was.times_delivered))
                if now.times_delivered > calm:
                    self.offence(
                        f"count: {process} hands {_id(key)} over with {now.times_delivered}, not {calm}: a stop counts"
                    )
            case _ if risen > 0:
                self.offence(f"count: {_id(key)} rises to {now.times_delivered} by {name}")

    def _no_crash(self, owner: bytes, taker: Process) -> str:
        """Why nobody can have crashed; '' when somebody may have."""
        if owner == HANDOVER.encode():
            return "it was handed over"
        for agent in self.agents:
            if agent.name.encode() == owner:
                if not agent.alive:
                    return ""
                ill = max(self._unrenewed.get(agent, -1e9), agent.paused_at, self.disturbed_at)
                lapsed = self._loop.time() - ill < self.plan.visibility_timeout + 6.0
                return "" if lapsed else f"{agent} is alive and well"
        return "" if owner else "it had no owner"

    def _unwell(self, agent: Agent, within: float) -> bool:
        return self._loop.time() - max(self._trouble.get(agent, -1e9), agent.paused_at) < within

    def _check_death(self, key: StreamEntryKey, reason: str) -> None:
        item = self.items.get(_id(key))
        if item is None:
            return
        flaw = item.planned.flaw
        if item.key in self._conflicts and reason == "conflict":
            return
        if DIES_OF.get(flaw) != reason:
            self.offence(f"dead: {item} dies as {reason}")

    def _check_views(self, live: Pending, twin: Pending, name: str) -> None:
        stream = self._server.stream(self._stream.name)
        if stream is None:
            return
        group = stream.group_get(self._group)
        if group is None or stream.group_get(self._twin) is None:
            return
        for key in stream._ids:
            if key in live:
                if key in twin:
                    self.offence(f"views: {_id(key)} is pending in both groups after {name}")
            elif key not in twin and key <= group.last_delivered_key:
                self.offence(f"views: {_id(key)} is in no view after {name}")

    def _pending(self) -> tuple[Pending, Pending]:
        stream = self._server.stream(self._stream.name)
        if stream is None:
            return {}, {}
        live, twin = stream.group_get(self._group), stream.group_get(self._twin)
        return (live.pel if live is not None else {}), (twin.pel if twin is not None else {})

    # -- processes ---------------------------------------------------------------------------------------

    def ended(self, agent: Agent, began: float) -> None:
        """It has stopped in good order: nothing lies under its name."""
        live, _ = self._pending()
        left = [_id(key) for key, row in live.items() if row.consumer_name == agent.name.encode()]
        well = self._trouble.get(agent, -1e9) < began - 6.0 and agent.paused_at < began - 6.0
        if left and well and not agent.consumer.hand:  # else it ran out of time, and said so
            self.offence(f"stop: {agent} has stopped in good order and leaves {left} under its name")

    def poisoned(self, agent: Agent, item: Item) -> None:
        """Its delivery kills the process."""
        live, _ = self._pending()
        row = live.get(_key(item.id))
        self.note("poison", process=agent, id=item.id, count=row.times_delivered if row else 0)
        if row is None or row.times_delivered <= SUSPECT or self.plan.poison == "decode":
            return
        if (others := self.control_plane.out[agent]) > (1 if self.plan.poison == "answer" else 0):
            self.offence(f"poison: {item} takes {others} requests of its neighbours with it")
        if self._loop.time() - self._unrenewed.get(agent, -1e9) > 10.0:
            for entry in agent.consumer.hand:
                held = live.get(_key(entry.id.decode()))
                if held is None or held.consumer_name != agent.name.encode() or entry.id == item.id.encode():
                    continue
                if held.times_delivered > max(SUSPECT, entry.deliveries):
                    self.offence(
                        f"poison: the death by {item} counts against {entry}, which is proven harmless"
                    )
        if row.times_delivered > SUSPECT + MAX_DELIVERIES:
            self.offence(f"poison: {item} is delivered again after {MAX_DELIVERIES} deaths")

    # -- the end -----------------------------------------------------------------------------------------

    @property
    def drained(self) -> bool:
        """Whether nothing is left but dead letters."""
        stream = self._server.stream(self._stream.name)
        live, twin = self._pending()
        if stream is None:
            return not live and not twin
        return not live and all(key in twin for key in stream._ids) and all(key in stream for key in twin)

    def undrained(self) -> str:
        """What keeps it from being drained."""
        stream = self._server.stream(self._stream.name)
        live, twin = self._pending()
        rows = [f"{_id(k)} {live[k].consumer_name.decode()} x{live[k].times_delivered}" for k in live]
        ids = stream._ids if stream is not None else []
        unread = [_id(k) for k in ids if k not in live and k not in twin]
        ghosts = [_id(k) for k in twin if stream is None or k not in stream]
        return f"pending {rows}, unread or in no view {unread}, ghosts {ghosts}"

    def reconcile(self) -> None:
        """The three books side by side."""
        stream = self._server.stream(self._stream.name)
        _, twin = self._pending()
        effects = self.control_plane.effects
        for item in self.items.values():
            key = _key(item.id)
            if item.exempt or key in twin:
                continue
            if stream is not None and key in stream:
                self.offence(f"drain: {item} is still there")
            elif item.key not in effects:
                self.offence(f"lost: {item} is gone and was never recorded")
            elif item.planned.flaw == "poison":
                self.offence(f"poison: {item} is gone, not dead")
        self._check_documents(twin)
        self._check_ledger()
        if self.plan.service == "quota_refresher":
            self._check_grants()

    def _check_documents(self, twin: Pending) -> None:
        documents = self._server.execute("HGETALL", self._stream.dead_key)
        told = dict(zip(documents[::2], documents[1::2], strict=True))
        if {_id(key).encode() for key in twin} != set(told):
            self.offence(f"dead: the view has {sorted(map(_id, twin))}, the documents {sorted(told)}")
        for entry_id, document in told.items():
            item = self.items.get(entry_id.decode())
            if item is None:
                continue
            attempts = msgspec.json.decode(document)["attempts"]
            sends = self.control_plane.sends[item.planned.serial]
            most = (
                max(sends, MAX_DELIVERIES) if item.planned.flaw == "poison" else sends
            )  # its deaths, if it is that
            if attempts > most and item.planned.flaw != "forbidden":
                self.offence(f"attempts: {item} died after {attempts}, and {sends} requests were sent")

    def _check_ledger(self) -> None:
        raw = self._server.execute("HGETALL", self._stream.ledger_key)
        books = parse(dict(zip(raw[::2], raw[1::2], strict=True)))
        if books.get(LOST, 0) > self.most_lost:
            self.offence(f"ledger: {books[LOST]} entries are lost, at most {self.most_lost} can be")
        stream = self._server.stream(self._stream.name)
        if stream is None or self.books_lost:
            return
        off = imbalance(stream.entries_added, len(stream), books) - self.unread_deleted
        if off:
            told = {name: books.get(name, 0) for name in ("base", *GONE)}
            self.offence(f"ledger: {off} entries are not accounted for: {told}, {stream.entries_added} added")
        if self.plan.service == "usage_forwarder":
            audio = sum(
                _audio(self.items[entry_id].planned) for entry_id in self._settled if entry_id in self.items
            )
            if books.get("audio_ms", 0) != audio:
                self.offence(f"ledger: audio_ms is {books.get('audio_ms', 0)}, expected {audio}")

    def _check_grants(self) -> None:
        given = Counter[str]()
        effects = self.control_plane.effects
        for _, fields in self._server.execute("XRANGE", "queue:quota_response", "-", "+"):
            grant = msgspec.json.decode(fields[1])
            key = grant["transaction_id"]
            given[key] += 1
            if key not in effects or effects[key].grant != grant["new_quota_amount"]:
                self.offence(f"grants: {grant} is not what the ControlPlane granted")
        _, twin = self._pending()
        for item in self.items.values():
            granted = given[item.key]
            if granted > 1:
                self.offence(f"grants: {item} was answered {granted} times")
            if (
                not granted
                and not item.exempt
                and _key(item.id) not in twin
                and item.key not in self._conflicts
            ):
                self.offence(f"grants: {item} was never answered")


def _audio(planned: Planned) -> int:
    """Milliseconds, another for every entry."""
    return 1000 + int(planned.serial[1:])


def _key(entry_id: str) -> StreamEntryKey:
    milliseconds, _, number = entry_id.partition("-")
    return StreamEntryKey(int(milliseconds), int(number))


def _id(key: StreamEntryKey) -> str:
    return f"{key.ts}-{key.seq}"


def _told(command: tuple[Any, ...]) -> str:
    if command[0] == "SCRIPT LOAD":
        return ""
    if command[0] != "EVALSHA":
        return " ".join(map(_plain, command[1:6]))
    keys = int(command[2])
    return " ".join(map(_plain, command[3 + keys :]))[:300]


def _plain(word: Any) -> str:
    return word.decode("utf-8", "replace") if isinstance(word, bytes) else str(word)


def _short(reply: Any) -> str:
    if isinstance(reply, list):
        return "[" + ", ".join(_short(part) for part in reply) + "]"
    return _plain(reply)[:60]
