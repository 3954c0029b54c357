"""The simulation's Redis beside the real servers: the same steps, the same replies, the same state.

Walks over everything the agent and an operator do to a stream are drawn from a seed and taken on both.
What differs by its nature is left out of the comparison: milliseconds since something, and the words of an error.
So are consumers that have nothing pending, since the real servers differ among themselves: one lists who has only
ever polled in vain, another does not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any

import pytest
from redis import Connection
from redis.exceptions import RedisError

from common.streams import GREATEST_ID, HANDOVER, Stream
from simulation.redis_server import Server
from tests.support import RedisServer

STREAM = Stream("queue:usage_records", "usage_forwarder")
S, G, D = STREAM.name, STREAM.group, STREAM.dead_group
DEAD, LEDGER, SEEN, TURN = STREAM.dead_key, STREAM.ledger_key, STREAM.seen_key, STREAM.turn_key
SCRIPTS = {
    path.name.removesuffix(".lua"): path.read_text()
    for path in files("common.scripts").iterdir()
    if isinstance(path, Path) and path.suffix == ".lua"
}
CONSUMERS = ("a", "b")
LONGEST = 60
DOCUMENT = '{"reason": "%s", "attempts": %d, "error": "é", "http_status": null}'

Step = tuple[str | int, ...]
Execute = Callable[..., Any]


def script(name: str, keys: list[str], *args: str | int) -> Step:
    return ("EVAL", SCRIPTS[name], len(keys), *keys, *args)


class Walk:
    """Steps drawn from a seed. Ids are `n-0`, so that both sides have the same."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._last = 0

    def __iter__(self) -> Iterator[Step]:
        yield self.make_groups()
        yield self.keep_books()
        for _ in range(80):
            yield self._random.choice(self.STEPS)(self)

    def _id(self) -> str:
        return f"{self._random.randint(1, self._last + 1)}-0"

    def _ids(self) -> list[str]:
        return sorted({self._id() for _ in range(self._random.randint(1, 3))})

    def _counted(self) -> list[str | int]:
        return [word for entry_id in self._ids() for word in (entry_id, self._random.randint(1, 5))]

    def _me(self) -> str:
        return self._random.choice(CONSUMERS)

    def _turn(self, *keys: str) -> tuple[list[str], str]:
        fenced = self._random.random() < 0.3
        return [*keys, TURN] if fenced else list(keys), self._me() if fenced else ""

    def add(self) -> Step:
        self._last += 1
        data = "x" * self._random.choice((3, 20, LONGEST + 1))
        fields = self._random.choice((["data", data], ["data", data, "correlation_id", "c"], ["other", "1"]))
        return ("XADD", S, f"{self._last}-0", *fields)

    def read(self) -> Step:
        keys, token = self._turn(S)
        return script("read", keys, G, D, self._me(), self._random.choice((1, 2, 50)), 10_000, LONGEST, token)

    def settle(self) -> Step:
        keys, token = self._turn(S, DEAD, LEDGER)
        named: dict[str, list[str | int]] = {"delivered": [], "duplicate": []}
        for entry_id in self._ids():
            named[self._random.choice(("delivered", "duplicate"))] += [entry_id, 1, 2, 3, 4]
        return script("settle", keys, G, D, token, json.dumps(named))

    def bury(self) -> Step:
        keys, token = self._turn(S, DEAD, LEDGER)
        rows = [
            (i, reason, self._random.randint(1, 9), DOCUMENT % (reason, 1))
            for i in self._ids()
            for reason in [self._random.choice(("invalid", "rejected"))]
        ]
        return script("bury", keys, G, D, self._me(), token, *(word for row in rows for word in row))

    def answer(self) -> Step:
        rows = [word for i in self._ids() for word in (i, "delivered", "{}", "c")]
        return script("answer", [S, LEDGER, "responses"], G, self._me(), 3_600_000, *rows)

    def renew(self) -> Step:
        return script("renew", [S, LEDGER], G, self._me(), *self._counted())

    def hand_over(self) -> Step:
        return script("hand_over", [S, LEDGER], G, self._me(), HANDOVER, *self._counted())

    def fetch(self) -> Step:
        return script("fetch", [S, LEDGER], G, self._me(), LONGEST, *self._ids())

    def take_over(self) -> Step:
        keys, token = self._turn(S, LEDGER)
        idle = self._random.choice((-1, 0, 0, 3_600_000))
        cursor, count = self._random.choice(("0-0", self._id())), self._random.choice((1, 2, 100))
        return script("take_over", keys, G, self._me(), HANDOVER, idle, cursor, count, LONGEST, token)

    def age(self) -> Step:
        """As if it had been with its owner for two hours."""
        return ("XCLAIM", S, G, self._me(), 0, self._id(), "IDLE", 7_200_000, "JUSTID")

    def redrive(self) -> Step:
        return script("redrive", [S, DEAD, LEDGER], G, D, HANDOVER, *self._ids())

    def discard(self) -> Step:
        return script("discard", [S, DEAD, LEDGER], D, self._random.choice((1, 10_000)), *self._ids())

    def clear_ghosts(self) -> Step:
        return script("clear_ghosts", [S, DEAD, LEDGER], D, "-", self._random.choice((1, 100)))

    def forget_consumer(self) -> Step:
        return script("forget_consumer", [S], G, self._me())

    def forget_consumers(self) -> Step:
        return script("forget_consumers", [S], G, self._random.choice((0, 600_000)), HANDOVER, "a")

    def make_groups(self) -> Step:
        return script("make_groups", [S, LEDGER, DEAD], G, D, GREATEST_ID)

    def keep_books(self) -> Step:
        life = self._random.choice(("", "old", "new"))
        saw = (self._random.randint(0, 5), self._random.randint(0, 5), self._id())
        return script(
            "keep_books", [S, LEDGER, SEEN], G, D, self._random.choice(("new", "newer")), life, *saw
        )

    def turn_take(self) -> Step:
        return script("turn_take", [TURN], self._me(), 60_000)

    def turn_give_up(self) -> Step:
        return script("turn_give_up", [TURN], self._me())

    def remember(self) -> Step:
        return script("remember", ["{x}:k"], self._random.choice(("", "1")), self._random.choice("12"), 60)

    def delete(self) -> Step:
        return ("XDEL", S, self._id())

    def trim(self) -> Step:
        return ("XTRIM", S, "MAXLEN", 3)

    def remove(self) -> Step:
        """The stream or what was seen of it."""
        return ("DEL", self._random.choice((S, SEEN)))

    def destroy(self) -> Step:
        return ("XGROUP", "DESTROY", S, self._random.choice((G, D)))

    def pending(self) -> Step:
        return (
            "XPENDING",
            S,
            G,
            self._random.choice(("-", f"({self._id()}", self._id())),
            "+",
            2,
            self._me(),
        )

    def doorbell(self) -> Step:
        return ("XREAD", "COUNT", 1, "STREAMS", S, self._id())

    STEPS = (
        *(add,) * 6,
        *(read,) * 4,
        *(settle,) * 2,
        *(bury,) * 3,
        *(take_over,) * 4,
        *(renew, hand_over, fetch, age, redrive, discard, answer, clear_ghosts, make_groups, keep_books),
        *(forget_consumer, forget_consumers, turn_take, turn_give_up, remember, delete, trim, destroy),
        remove,
        *(pending, doorbell),
    )


LOOK: tuple[Step, ...] = (
    ("XRANGE", S, "-", "+"),
    ("XPENDING", S, G, "-", "+", 1000),
    ("XPENDING", S, D, "-", "+", 1000),
    ("XINFO", "CONSUMERS", S, G),
    ("HGETALL", DEAD),
    ("HGETALL", LEDGER),
    *(("HGET", SEEN, field) for field in ("life", "added", "floor", "counted", "imbalance")),
    ("GET", TURN),
    ("XLEN", "responses"),
    script("figures", [S, LEDGER], G, D),
)


def told(execute: Execute, step: Step) -> Any:
    """The reply; of an error what decides: its first word."""
    try:
        return plain(step, execute(*step))
    except RedisError as error:
        return f"{type(error).__name__} {str(error).split(' ', 1)[0]}"


def plain(step: Step, reply: Any) -> Any:
    """Without what differs by its nature."""
    match step[:2]:
        case ("XPENDING", _):
            return [[row[0], row[1], row[3]] for row in reply]
        case ("XINFO", _):
            return sorted((row[1], row[3]) for row in reply if row[3])  # name and pending
        case ("HGETALL", _):
            return sorted(zip(reply[::2], reply[1::2], strict=True))
        case ("EVAL", text) if text == SCRIPTS["forget_consumers"]:
            return len(reply) >= 0
        case ("EVAL", text) if text == SCRIPTS["figures"]:
            consumers = sorted(row for row in zip(reply[5][::3], reply[5][1::3], strict=True) if row[1])
            dead = sorted(zip(reply[4][::2], reply[4][1::2], strict=True))
            return [*reply[:4], dead, consumers, sorted(zip(reply[6][::2], reply[6][1::2], strict=True))]
    return reply


@pytest.fixture
def real(redis_server: RedisServer) -> Iterator[Execute]:
    """Commands to the real server, and its replies as they come over the wire."""
    connection = Connection(host=redis_server.host, port=redis_server.port, protocol=2)

    def execute(*step: str | int) -> Any:
        connection.send_command(*step)
        return connection.read_response()

    yield execute
    connection.disconnect()


@pytest.mark.parametrize("seed", range(12))
def test_every_walk_ends_the_same_on_the_simulated_and_the_real_server(seed: int, real: Execute) -> None:
    fake = Server(time.time).execute
    taken: list[Step] = []
    for step in Walk(seed):
        taken.append((step[1][:60], *step[2:]) if step[0] == "EVAL" else step)  # type: ignore[index]
        assert told(fake, step) == told(real, step), taken[-12:]
        for look in LOOK:
            assert told(fake, look) == told(real, look), (look[:2], taken[-12:])


def test_scripts_that_were_forgotten_are_missed_alike(real: Execute) -> None:
    server = Server(time.time)
    step = ("EVALSHA", "0" * 40, 0)
    assert told(server.execute, step) == told(real, step)
