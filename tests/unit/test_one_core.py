"""When the threads of a process share a core: given what it used, and what it wanted."""

from __future__ import annotations

import pytest

from common.one_core import Use, belongs_together

APART, TOGETHER = False, True


@pytest.mark.parametrize(
    ("now", "use", "starved_before", "want"),
    [
        (APART, Use(0.0), False, APART),
        (APART, Use(0.4), False, APART),
        (APART, Use(0.6), False, TOGETHER),
        (APART, Use(1.4), False, TOGETHER),
        (TOGETHER, Use(0.95, 0.99), True, TOGETHER),  # it has its core for itself
        (TOGETHER, Use(0.4, 0.45), False, TOGETHER),  # less to do, but not calm
        (TOGETHER, Use(0.1, 0.12), False, APART),  # calm
        (TOGETHER, Use(0.5, 0.99), False, TOGETHER),  # others have the core half of the time, for a moment
        (TOGETHER, Use(0.5, 0.99), True, APART),  # and for longer
        (
            TOGETHER,
            Use(0.27, 0.76),
            True,
            APART,
        ),  # threads that take turns at a lock want a core now and then
        (TOGETHER, Use(0.6, 0.7), True, TOGETHER),  # it waits for answers, not for the core
    ],
)
def test_a_busy_process_keeps_to_one_core_unless_it_is_starved_there(
    now: bool, use: Use, starved_before: bool, want: bool
) -> None:
    assert belongs_together(now, use, starved_before) is want
