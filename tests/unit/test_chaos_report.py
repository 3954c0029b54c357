"""The table of a chaos run."""

from __future__ import annotations

from pathlib import Path

import pytest

import sandbox.chaos.__main__  # noqa: F401  registers every fault
from sandbox.chaos.judge import Check, Judgement
from sandbox.chaos.report import BEGIN, END, lines, publish, render
from sandbox.chaos.run import Impossible, Report, Struck
from sandbox.reconciler import Reconciliation

STEPS = [
    Struck(1, ["refused"], 0.0, 4.0, 2.5, {"refused": {"outages": 1}}, []),
    Struck(
        2, ["refused", "redis_killed"], 9.0, 12.0, 7.0, {"refused": {"outages": 1}, "redis_killed": {}}, []
    ),
    Struck(3, ["refused"], 20.0, 24.0, 3.5, {"refused": {"outages": 1}}, []),
    Struck(4, ["redis_killed"], 30.0, 31.0, None, {"redis_killed": {"restarts": 1}}, ["not well again"]),
]


def report(*found: str) -> Report:
    judgement = Judgement([Check("entries lost", list(found))], Reconciliation({}), {"delivered": 1234}, 0.4)
    return Report(7, 2.0, "Redis 7.0.15", STEPS, [Impossible("name_gone", "there is no unshare")], judgement)


def test_recovery_counts_where_a_fault_struck_alone() -> None:
    killed, refused = sorted(lines(STEPS), key=lambda line: line.fault)
    assert (refused.times, refused.alone, refused.together, refused.seen["outages"]) == (
        3,
        [2.5, 3.5],
        [7.0],
        3,
    )
    assert (killed.times, killed.alone, killed.together) == (2, [], [7.0])


def test_a_report_names_what_does_not_hold() -> None:
    assert "everything holds" in render(report())
    text = render(report("queue:usage_records: entry 1-0"))
    assert "IT DOES NOT HOLD" in text
    assert "queue:usage_records: entry 1-0" in text
    assert not report("one").ok


def test_observations_at_crash_points_are_told_by_their_numbers() -> None:
    seen = {"registrar at point 7: before take_over": 2, "registrar at point 12: during request": 1}
    struck = Struck(1, ["crash_point"], 0.0, 1.0, 1.0, {"crash_point": seen}, [])
    judgement = report().judgement
    text = render(Report(7, 2.0, "Redis", [struck], [], judgement))
    assert "3 crashes at points 7, 12" in text


def test_publishing_replaces_what_is_between_the_marks(tmp_path: Path) -> None:
    document = tmp_path / "reliability.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    publish([report(), report("lost one")], document)
    text = document.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "| **entries lost** | **0** | **1** |" in text
    assert "| `refused` |" in text
    publish([report()], document)
    assert "| **entries lost** | **0** |" in document.read_text()


def test_a_document_without_marks_is_left_alone(tmp_path: Path) -> None:
    document = tmp_path / "other.md"
    document.write_text("nothing to see")
    with pytest.raises(ValueError, match="expected the marks"):
        publish([report()], document)
    assert document.read_text() == "nothing to see"
