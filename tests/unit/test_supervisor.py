"""The supervisor's decisions: how long it waits after a death, and what its command line may say."""

from __future__ import annotations

import pytest

from dataplane_agent import supervisor
from dataplane_agent.supervisor import Child


def test_a_child_that_dies_young_waits_twice_as_long_each_time_up_to_half_a_minute() -> None:
    child, now, waited = Child("registrar", 0), 100.0, []
    for _ in range(7):
        child.started = now
        waited.append(child.died(now + 0.5))
        now = child.due
    assert waited == [1, 2, 4, 8, 16, 30, 30]


def test_the_wait_begins_anew_for_a_child_that_has_lived_for_a_while() -> None:
    child = Child("registrar", 0)
    for _ in range(5):
        child.died(1.0)
    child.started = 100.0
    assert child.died(100.0 + supervisor.SETTLED_SECONDS) == supervisor.FIRST_BACKOFF_SECONDS


@pytest.mark.parametrize(
    "typed",
    [
        ["nonsense"],
        ["--replicas", "usage_forwarder"],
        ["--replicas", "usage_forwarder=0"],
        ["--replicas", "usage_forwarder=65"],
        ["--replicas", "usage_forwarder=-1"],
        ["--replicas", "nonsense=1"],
        ["registrar", "--replicas", "usage_forwarder=2"],
    ],
)
def test_wrong_usage_ends_with_2(typed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        supervisor.main(typed)
    assert end.value.code == 2
    assert "expected" in capsys.readouterr().err
