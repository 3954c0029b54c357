"""The simulator's script, its damage and its book, without a Redis."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from random import Random

import pytest

from common.producer import READERS, Message, encode
from common.schemas import Invalid, QuotaRequest, SessionEvent, UsageRecord
from common.streams import FIELD_DATA
from sandbox.audio_api_server import DAMAGE, Grants, Session, kind_of, percentiles
from sandbox.book import Book, Row, read


def script(seed: int) -> list[Message]:
    session = Session("session-1", Random(seed), lambda: datetime(2026, 11, 21, 10, tzinfo=UTC))
    messages = []
    while not session.completed:
        messages.append(session.next(closing=False))
    return messages


SAMPLES = {type(message): message for seed in range(20) for message in script(seed)}


@pytest.mark.parametrize("seed", range(20))
def test_a_session_starts_first_completes_last_and_says_nothing_invalid(seed: int) -> None:
    messages = script(seed)
    assert [kind_of(messages[0]), kind_of(messages[-1])] == ["start", "complete"]
    assert {kind_of(message) for message in messages[1:-1]} <= {"usage", "quota"}
    for message in messages:
        READERS[type(message)](encode(message))


def test_the_seed_shapes_the_traffic() -> None:
    assert [encode(message) for message in script(1)] == [encode(message) for message in script(1)]
    assert [encode(message) for message in script(1)] != [encode(message) for message in script(2)]


def test_a_session_that_is_closed_completes() -> None:
    session = Session("session-1", Random(0), lambda: datetime(2026, 11, 21, tzinfo=UTC))
    session.next(closing=False)
    assert kind_of(session.next(closing=True)) == "complete"
    assert session.completed


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("message", SAMPLES.values(), ids=[kind.__name__ for kind in SAMPLES])
def test_damaged_entries_are_invalid_in_every_stream(damage: str, message: Message) -> None:
    assert SAMPLES.keys() == {UsageRecord, SessionEvent, QuotaRequest}
    data = DAMAGE[damage](encode(message)).get(FIELD_DATA)
    reader = READERS[type(message)]
    with pytest.raises(Invalid):
        reader(data)  # type: ignore[arg-type]


def test_percentiles_are_nearest_ranks() -> None:
    hundred = [float(number) for number in range(1, 101)]
    assert percentiles(hundred) == {"p50": 50, "p95": 95, "p99": 99, "max": 100}
    assert percentiles([0.5]) == {"p50": 0.5, "p95": 0.5, "p99": 0.5, "max": 0.5}
    assert percentiles([]) == {}


async def test_one_grant_per_entry_that_may_exist_is_right_and_one_more_is_not() -> None:
    grants = Grants()
    grants.came("early", 2.0)
    grants.asked("early", 1.0, entries=1, certain=True)
    grants.asked("twice", 1.0, entries=2, certain=True)
    grants.asked("lost", 1.0, entries=1, certain=False)
    assert (grants.requests, grants.missing, grants.excess) == (2, 1, 0)
    assert not await grants.complete(within=0)
    grants.came("twice", 3.0)
    grants.came("twice", 4.0)
    grants.came("somebody else's", 5.0)
    assert await grants.complete(within=0)
    assert (grants.missing, grants.excess, grants.seconds()) == (0, 0, [1.0, 2.0])
    grants.came("early", 6.0)
    assert grants.excess == 1


def test_a_book_is_read_back_up_to_where_its_writer_died(tmp_path: Path) -> None:
    rows = [
        Row("queue:usage_records", "usage", "1-0", "t", "s", "00", "ok", figures=(1, 2, 3, 4)),
        Row("queue:quota_refresh", "quota", None, None, None, None, "invalid", damage="empty"),
    ]
    path = tmp_path / "book.jsonl"
    book = Book(path)
    book.write(rows[:1])
    book.write(rows[1:])
    assert book.rows() == rows
    book.close()
    with path.open("ab") as file:
        file.write(b'{"stream":"queue:')
    assert list(read(path)) == rows
    assert [row.certain for row in rows] == [True, False]
