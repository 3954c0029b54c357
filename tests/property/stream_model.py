"""A stream as it has to be: every entry is in one place, and what left it was counted once.

Each method does what the script of its name promises, raises what its caller would see, and says what it returns.
The place is a single word, so no entry can be in no view or in two: where Redis agrees, neither is it there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

from common.dead_letters import LiveGroupMissing, Moved
from common.entries import SUSPECT
from common.ledger import SUMS
from common.redis_border import GroupGone
from common.settlement import TurnLost
from common.streams import HANDOVER, Stream
from tests.integration.workbench import Pending, State

Figures = tuple[int, int, int, int]
Took = list[tuple[str, int]]
"""Ids with their delivery counts."""


class Item(msgspec.Struct):
    """One entry, and the place it is in."""

    id: str
    number: int  # from 1 on, in stream order
    figures: Figures
    place: Literal["unread", "pending", "dead", "gone"] = "unread"
    by: str = ""  # its owner, its reason, or how it went; `lost` is what no ledger has counted
    count: int = 0  # deliveries; attempts where it is dead
    idle: bool = False  # nobody has been heard of for longer than the visibility timeout
    stored: bool = True  # its payload is in the stream, unless it has ended or an operator has deleted it


class StreamModel:
    """One stream with its two groups, its ledger and its turn."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.items: dict[str, Item] = {}
        self.live = self.twin = False
        self.reached = 0  # the number of the last entry that was read through the live group
        self.begun = False
        self.ledger: Counter[str] = Counter()
        self.turn: str | None = None
        self.grants = 0

    # -- what is there -------------------------------------------------------------------------------

    def at(self, place: str, by: str | None = None) -> list[Item]:
        return [i for i in self.items.values() if i.place == place and (by is None or i.by == by)]

    def state(self) -> State:
        """What has to lie in Redis."""

        def shown(place: str) -> Pending:
            return {item.id: (item.by, item.count) for item in self.at(place)}

        return State(
            entries=[item.id for item in self.items.values() if item.stored],
            live=shown("pending") if self.live else None,
            dead=shown("dead") if self.twin else None,
            documents=sorted(item.id for item in self.at("dead")),
            ledger={name: n for name, n in sorted(self.ledger.items()) if n},
        )

    @property
    def last_read(self) -> str:
        return next((i.id for i in self.items.values() if i.number == self.reached), "0-0")

    @property
    def uncounted(self) -> int:
        """Entries that an operator deleted and no script has met since: the imbalance, exactly."""
        ghosts = [i for i in self.items.values() if i.place in ("pending", "dead") and not i.stored]
        return len(ghosts) + len(self.at("gone", "lost"))

    # -- producers and operators ---------------------------------------------------------------------

    def add(self, entry_id: str, figures: Figures) -> None:
        self.items[entry_id] = Item(entry_id, len(self.items) + 1, figures)

    def delete(self, entry_id: str) -> None:
        item = self.items[entry_id]
        item.stored = False
        if item.place == "unread":
            self._lose(item)

    def destroy_live(self) -> None:
        """What was pending is unread again: the group is made again from the beginning."""
        for item in self.at("pending"):
            self._unread(item)
            if not item.stored:
                self._lose(item)
        self.live, self.reached = False, 0

    def destroy_twin(self) -> None:
        """The dead are in no group, but their documents stay."""
        self.twin = False

    def make_groups(self) -> list[int]:
        made = [int(not self.live), int(not self.twin), int(not self.begun)]
        if not self.twin:
            for item in self.at("dead"):
                if not item.stored:
                    self._leave(item, "vanished")
        self.live = self.twin = self.begun = True
        return made

    def redrive(self, ids: Iterable[str]) -> Moved:
        named = [self.items[entry_id] for entry_id in ids]
        dead = [item for item in named if item.place == "dead" and self.twin]
        if not self.live and (dead or not self.twin):
            raise LiveGroupMissing(self.stream)
        vanished = [item for item in dead if not item.stored]
        for item in vanished:
            self._leave(item, "vanished")
        done = [item for item in dead if item.stored]
        for item in done:
            if item.number <= self.reached:
                self._own(item, HANDOVER, 1)
            else:
                self._unread(item)
            self.ledger["redriven"] += 1
        return _moved(named, done, vanished)

    def discard(self, ids: Iterable[str]) -> Moved:
        named = [self.items[entry_id] for entry_id in ids]
        dead = [item for item in named if item.place == "dead" and self.twin]
        vanished = [item for item in dead if not item.stored]
        done = [item for item in dead if item.stored]
        for item in dead:
            self._leave(item, "discarded" if item.stored else "vanished")
        return _moved(named, done, vanished)

    # -- consumers: getting entries ------------------------------------------------------------------

    def read(self, me: str, token: str | None, room: int) -> Took:
        self._fence(token)
        self._want(self.live and self.twin)
        new = [item for item in self.items.values() if item.stored and item.number > self.reached][:room]
        for item in new:
            self.reached = item.number
            if item.place == "unread":
                self._own(item, me, 1)
        return [(item.id, 1) for item in new if item.place == "pending"]

    def take_over(
        self, me: str, token: str | None, sweeping: bool, cursor: str, room: int
    ) -> tuple[str | None, Took]:
        """The next cursor, or None when only `handover` was looked into."""
        self._fence(token)
        self._want(self.live)
        handed = self.at("pending", HANDOVER)[:room]
        if handed or not sweeping:
            return None, self._take(me, handed)
        got, looked = [], room * 10
        waiting = [i for i in self.at("pending") if i.number >= self._number(cursor)]
        while waiting and room and looked:
            item = waiting.pop(0)
            looked -= 1
            if item.idle or not item.stored:
                got.append(item)
                room -= 1
        return (waiting[0].id if waiting else "0-0"), self._take(me, got, crashed=True)

    def take_all(self, me: str, token: str | None) -> Took:
        """What a new holder of the turn does; its own and what was handed over has seen no crash."""
        self._fence(token)
        self._want(self.live)
        pending = self.at("pending")
        calm = [i for i in pending if i.by in (me, HANDOVER)]
        self._take(me, calm)
        self._take(me, [i for i in pending if i not in calm], crashed=True)
        return [(i.id, i.count) for i in pending if i.place == "pending"]

    def fetch(self, me: str, ids: Iterable[str]) -> Took:
        self._want(self.live)
        return self._take(me, [i for i in self._named(ids) if i.place == "pending" and i.by == me])

    def recover(self, me: str, hand: set[str]) -> Took:
        self._want(self.live)
        return self.fetch(me, [i.id for i in self.at("pending", me) if i.id not in hand])

    # -- consumers: ending and keeping entries -------------------------------------------------------

    def settle(self, token: str | None, ended: Iterable[tuple[str, bool]]) -> None:
        self._fence(token)
        for entry_id, duplicate in ended:
            item = self.items[entry_id]
            if item.place == "pending" or (item.place == "dead" and self.twin):
                self._leave(item, "duplicate" if duplicate else "delivered")
                self.ledger.update(dict(zip(SUMS, item.figures, strict=True)))

    def answer(self, me: str, ended: Iterable[tuple[str, bool]]) -> None:
        self._want(self.live)
        for entry_id, duplicate in ended:
            item = self.items[entry_id]
            if item.place == "pending" and item.by == me:
                self._leave(item, "duplicate" if duplicate else "delivered")
                self.grants += 1

    def bury(self, me: str, token: str | None, deaths: Iterable[tuple[str, str, int]]) -> None:
        self._fence(token)
        self._want(self.live)
        for entry_id, reason, attempts in deaths:
            item = self.items[entry_id]
            if item.place == "pending" and item.by == me:
                self._want(self.twin)
                if item.stored:
                    item.place, item.by, item.count = "dead", reason, max(1, attempts)
                    self.ledger[f"dead:{reason}"] += 1
                else:
                    self._leave(item, "vanished")

    def renew(self, me: str, leases: Took) -> set[str]:
        """The ids that are somebody else's by now, or nobody's."""
        self._want(self.live or not leases)
        gone = set()
        for entry_id, count in leases:
            item = self.items[entry_id]
            if item.place == "pending" and item.by == me and item.stored:
                self._own(item, me, count)
                continue
            if item.place == "pending" and item.by == me:
                self._leave(item, "vanished")
            gone.add(entry_id)
        return gone

    def hand_over(self, me: str, leases: Took) -> int:
        self._want(self.live or not leases)
        n = 0
        for entry_id, count in leases:
            item = self.items[entry_id]
            if item.place == "pending" and item.by == me:
                if item.stored:
                    self._own(item, HANDOVER, count)
                    n += 1
                else:
                    self._leave(item, "vanished")
        return n

    def sweep(self) -> int:
        """The janitor's round: how many ghosts it clears."""
        self._want(self.live and self.twin)
        ghosts = [item for item in self.at("dead") if not item.stored]
        for item in ghosts:
            self._leave(item, "vanished")
        return len(ghosts)

    # -- the turn ------------------------------------------------------------------------------------

    def take_turn(self, token: str, replaces: str | None) -> bool:
        if self.turn not in (None, token, replaces):
            return False
        self.turn = token
        return True

    def give_up_turn(self, *tokens: str | None) -> None:
        if self.turn in tokens:
            self.turn = None

    # -- inside --------------------------------------------------------------------------------------

    def _named(self, ids: Iterable[str]) -> Iterator[Item]:
        return (self.items[entry_id] for entry_id in ids)

    def _number(self, cursor: str) -> int:
        return self.items[cursor].number if cursor in self.items else 0

    def _unread(self, item: Item) -> None:
        item.place, item.by, item.count, item.idle = "unread", "", 0, False

    def _own(self, item: Item, owner: str, count: int) -> None:
        item.place, item.by, item.count, item.idle = "pending", owner, count, False

    def _take(self, me: str, items: Iterable[Item], crashed: bool = False) -> Took:
        """One crash more is counted up to that which makes a suspect."""
        took = []
        for item in items:
            if item.stored:
                more = int(crashed and item.count < SUSPECT)
                self._own(item, me, item.count + more)
                took.append((item.id, item.count))
            else:
                self._leave(item, "vanished")
        return took

    def _leave(self, item: Item, how: str) -> None:
        """The only way out that is counted."""
        assert item.place in ("pending", "dead"), f"{item} leaves twice, or unread"
        item.place, item.by, item.stored = "gone", how, False
        self.ledger[how] += 1

    def _lose(self, item: Item) -> None:
        item.place, item.by = "gone", "lost"

    def _fence(self, token: str | None) -> None:
        if token is not None and token != self.turn:
            raise TurnLost

    def _want(self, there: bool) -> None:
        if not there:
            raise GroupGone("a group is missing")


def _moved(named: list[Item], done: list[Item], vanished: list[Item]) -> Moved:
    absent = [item for item in named if item not in done and item not in vanished]
    return Moved(*(tuple(item.id for item in some) for some in (done, vanished, absent)))
