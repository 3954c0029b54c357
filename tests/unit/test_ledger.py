"""The sum that every ledger has to come to."""

from __future__ import annotations

import pytest

from common import ledger
from common.outcomes import Reason


@pytest.mark.parametrize(
    ("added", "length", "books", "missing"),
    [
        (0, 0, {}, 0),
        (10, 4, {"delivered": 3, "duplicate": 1, "discarded": 1, "vanished": 1}, 0),
        (110, 4, {"base": 100, "delivered": 6}, 0),
        (10, 4, {"delivered": 3}, 3),
        (10, 8, {"delivered": 3}, -1),
        (10, 7, {"delivered": 3, "redriven": 5, "dead:invalid": 5, "audio_ms": 10**12}, 0),
    ],
)
def test_what_came_in_is_there_or_has_left_by_one_of_four_ways(
    added: int, length: int, books: dict[str, int], missing: int
) -> None:
    assert ledger.imbalance(added, length, books) == missing


def test_a_reply_becomes_figures() -> None:
    assert ledger.parse({b"delivered": b"12", b"base": b"-3"}) == {"base": -3, "delivered": 12}


def test_every_reason_has_its_field() -> None:
    assert [ledger.DEAD[reason] for reason in Reason] == [f"dead:{reason.value}" for reason in Reason]
