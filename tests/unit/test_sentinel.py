"""What the sentinel remembers, and what it makes of what the script tells it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import pytest

from common import logs
from common.redis_border import Away, Full, RedisFault, Scripts
from common.sentinel import Sentinel
from common.streams import Stream

STREAM = Stream("queue:usage_records", "usage_forwarder")

Said = list[tuple[str, str, dict[str, object]]]


class Told:
    """Scripts that answer as they are told, a logger and a counter: what comes in and what goes out."""

    def __init__(self) -> None:
        self.reply: list[Any] | RedisFault = []
        self.saw: list[list[Any]] = []
        self.said: Said = []
        self.lost = 0

    async def run(self, name: str, keys: list[str], args: list[Any]) -> list[Any]:
        self.saw.append(args[3:])
        if isinstance(self.reply, RedisFault):
            raise self.reply
        return self.reply

    def error(self, event: str, **facts: object) -> None:
        self.said.append(("error", event, facts))

    def info(self, event: str, **facts: object) -> None:
        self.said.append(("info", event, facts))

    def lost_entries(self, n: int) -> None:
        self.lost += n


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    told = Told()
    monkeypatch.setitem(logs._loggers, "sentinel", told)  # type: ignore[misc]
    return told


@pytest.fixture
def sentinel(told: Told) -> Sentinel:
    return Sentinel(cast(Scripts, told), STREAM, "me", told)


NOW = [b"life", 7, 3, b"7-0"]
NOTHING = [NOW, 0, 0, 7, 0, 0, 0]


async def test_what_it_saw_is_what_it_compares_with_the_next_time(sentinel: Sentinel, told: Told) -> None:
    told.reply = NOTHING
    assert await sentinel.look() is False
    await sentinel.look()
    assert told.saw == [[b"", 0, 0, b""], NOW]
    assert (told.said, told.lost) == ([], 0)


@pytest.mark.parametrize("reply", [[], Full("OOM"), Away("gone")], ids=["no groups", "full", "away"])
async def test_what_it_saw_is_kept_while_it_cannot_look(
    sentinel: Sentinel, told: Told, reply: list[Any] | RedisFault
) -> None:
    told.reply = NOTHING
    await sentinel.look()
    told.reply = reply
    with pytest.raises(Away) if isinstance(reply, Away) else nullcontext():
        assert await sentinel.look() is False
    told.reply = NOTHING
    await sentinel.look()
    assert told.saw == [[b"", 0, 0, b""], NOW, NOW]


async def test_a_stream_that_went_back_is_an_error_with_its_facts_even_when_nothing_was_in_it(
    sentinel: Sentinel, told: Told
) -> None:
    for lost in (4, 0):
        told.reply = [NOW, 1, 1, 11, lost, 0, 0]
        assert await sentinel.look() is True
    facts = {"stream": STREAM.name, "seen": 11, "now": 7, "books_begun_anew": True}
    assert told.said == [("error", "stream.went_back", {**facts, "lost": lost}) for lost in (4, 0)]
    assert told.lost == 4


@pytest.mark.parametrize(
    ("imbalance", "before", "want"),
    [
        (0, 0, []),
        (3, 3, []),
        (3, 0, [("error", "ledger.imbalance", {"imbalance": 3, "more": 3})]),
        (5, 3, [("error", "ledger.imbalance", {"imbalance": 5, "more": 2})]),
        (2, 5, [("info", "ledger.imbalance_fell", {"imbalance": 2})]),
        (0, 5, [("info", "ledger.imbalance_fell", {"imbalance": 0})]),
    ],
)
async def test_only_a_rise_of_the_imbalance_is_an_error(
    sentinel: Sentinel, told: Told, imbalance: int, before: int, want: Said
) -> None:
    told.reply = [NOW, 0, 0, 7, 0, imbalance, before]
    await sentinel.look()
    assert told.said == [(level, event, {"stream": STREAM.name, **facts}) for level, event, facts in want]
