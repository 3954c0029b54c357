"""The book of what faults took away: what need not arrive, and what the agent's ledger has to say of it."""

from __future__ import annotations

from sandbox.book import Row
from sandbox.chaos.removals import Removals, Stretch

USAGE, QUOTA = "queue:usage_records", "queue:quota_refresh"


def row(entry_id: str | None, stream: str = USAGE) -> Row:
    return Row(stream, "usage", entry_id, "tx", "s", None, "ok")


def test_what_redis_lost_lies_between_what_it_kept_and_when_it_died() -> None:
    removals = Removals()
    removals.redis_lost([Stretch(USAGE, "1000-1", 2000, "redis_power_lost_everysec")])
    rows = [row("1000-1"), row("1000-2"), row("2000-7"), row("2001-0"), row(None), row("1500-0", QUOTA)]
    assert removals.of(rows) == {(USAGE, "1000-2"), (USAGE, "2000-7")}
    assert len(removals.memory_gone) == 1


def test_only_what_was_deleted_unread_is_the_ledgers_imbalance() -> None:
    removals = Removals()
    removals.took(USAGE, "stream_trimmed", ["1-0", "2-0", "3-0"], unread=1)
    removals.took(USAGE, "pending_deleted", ["4-0"])
    assert removals.imbalance[USAGE] == 1
    assert removals.of([]) == {(USAGE, f"{n}-0") for n in (1, 2, 3, 4)}


def test_with_a_stream_its_books_are_gone() -> None:
    removals = Removals()
    removals.took(USAGE, "stream_trimmed", ["1-0"], unread=1)
    removals.stream_gone(USAGE, "stream_deleted", ["2-0"])
    assert removals.imbalance[USAGE] == 0
    assert removals.of([]) == {(USAGE, "1-0"), (USAGE, "2-0")}


def test_a_stream_went_back_each_time_it_was_deleted_or_rolled_back_even_when_nothing_was_in_it() -> None:
    removals = Removals()
    removals.stream_gone(USAGE, "stream_deleted", [])
    removals.redis_lost([Stretch(USAGE, "1000-1", 2000, "x"), Stretch(QUOTA, "1-0", 2000, "x")])
    removals.took(QUOTA, "stream_trimmed", ["1-0"], unread=1)
    assert removals.went_back == {USAGE: 2, QUOTA: 1}
