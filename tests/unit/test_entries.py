"""An entry as scripts return it, and the hand that bounds what is read."""

from __future__ import annotations

import pytest

from common.entries import FIRST_READ, Entry, Hand, Row

TRACE = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def entry(number: int = 1, data: bytes | int | None = b"1234", deliveries: int = 1) -> Entry:
    return Entry.of([f"{number}-0".encode(), data, None, None, deliveries], 0.0)


@pytest.mark.parametrize(
    ("row", "want"),
    [
        ([b"1700000000123-4", b"{}", b"c-1", TRACE], (b"{}", 2, "c-1", TRACE.decode(), FIRST_READ)),
        ([b"1700000000123-4", b"{}", b"c-1", TRACE, 4], (b"{}", 2, "c-1", TRACE.decode(), 4)),
        ([b"1700000000123-4", None, None, None], (None, 0, "", None, FIRST_READ)),
        ([b"1700000000123-4", 5_000_000, None, None], (5_000_000, 0, "", None, FIRST_READ)),
        ([b"1700000000123-4", b"", b"bad\nid", b"bad"], (b"", 0, "", None, FIRST_READ)),
        ([b"1700000000123-4", b"", b"\xff", b"\xff"], (b"", 0, "", None, FIRST_READ)),
    ],
    ids=["new", "taken over", "without fields", "too long", "not well formed", "not UTF-8"],
)
def test_a_row_becomes_an_entry(row: Row, want: tuple[object, ...]) -> None:
    made = Entry.of(row, 42.0)
    assert (made.data, made.size, made.correlation_id, made.traceparent, made.deliveries) == want
    assert (made.id, made.added_at, made.leased_at) == (row[0], 1700000000.123, 42.0)


@pytest.mark.parametrize(
    ("deliveries", "suspect", "died_alone"),
    [(1, False, 0), (2, False, 0), (3, True, 0), (4, True, 1), (8, True, 5)],
)
def test_the_delivery_count_says_what_it_has_been_through(
    deliveries: int, suspect: bool, died_alone: int
) -> None:
    made = entry(deliveries=deliveries)
    assert (made.suspect, made.died_alone) == (suspect, died_alone)


def test_no_payload_in_a_repr() -> None:
    made = entry(data=b"secret")
    made.message = "secret"
    assert "secret" not in repr(made)


def test_the_hand_counts_entries_and_bytes() -> None:
    hand = Hand()
    first, second = entry(1), entry(2, b"12345678")
    hand.take([first, second])
    assert (len(hand), hand.bytes, hand.active, list(hand)) == (2, 12, 2, [first, second])
    assert b"1-0" in hand
    assert b"3-0" not in hand
    hand.resize(first, 100)
    assert hand.bytes == 108
    hand.drop([first, first, entry(3)])
    assert (len(hand), hand.bytes) == (1, 8)
    hand.clear()
    assert (len(hand), hand.bytes, hand.parked) == (0, 0, 0)


def test_a_parked_entry_takes_no_room_and_is_counted_once() -> None:
    hand = Hand()
    first, second = entry(1), entry(2)
    hand.take([first, second])
    for _ in range(2):
        hand.park(first, True)
        assert (hand.parked, hand.active) == (1, 1)
    for _ in range(2):
        hand.park(first, False)
        assert (hand.parked, hand.active) == (0, 2)
    hand.park(second, True)
    hand.drop([second])
    assert (hand.parked, hand.active) == (0, 1)


def test_what_is_not_held_changes_no_count() -> None:
    hand = Hand()
    hand.park(entry(1), True)
    assert (hand.parked, hand.active) == (0, 0)


def test_the_same_id_taken_anew_is_another_entry() -> None:
    """After a lost turn an old request may still be out for it: its end is no end of the new one."""
    hand = Hand()
    old, new = entry(1), entry(1)
    hand.take([old])
    hand.clear()
    hand.take([new])
    assert (hand.holds(old), hand.holds(new)) == (False, True)
    hand.park(old, True)
    hand.drop([old])
    assert (len(hand), hand.parked, hand.bytes) == (1, 0, 4)


def test_entries_are_found_by_their_ids() -> None:
    hand = Hand()
    first = entry(1)
    hand.take([first])
    assert hand.unheld([[b"1-0", b""], [b"2-0", b""]]) == [[b"2-0", b""]]
    assert hand.of([b"1-0", b"2-0"]) == [first]
