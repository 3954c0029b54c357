"""The catalogue of faults and the numbered crash points: names that reports and schedules refer to."""

from __future__ import annotations

import ast
from importlib.resources import files
from pathlib import Path

import pytest

import sandbox.chaos.__main__  # noqa: F401  registers every fault
from sandbox.chaos.catalogue import CATALOGUE, named
from sandbox.chaos.crash_points import OWN, POINTS, REQUEST, STEPS, points_of


def test_every_fault_says_what_it_does_and_what_is_expected() -> None:
    for fault in CATALOGUE.values():
        assert fault.does.endswith((".", ".)")), fault.name
        assert fault.expected.endswith("."), fault.name


def test_a_name_may_be_a_pattern_and_an_unknown_one_is_refused() -> None:
    assert {fault.name for fault in named(["redis_power_*", "refused"])} == {
        "redis_power_lost",
        "redis_power_lost_everysec",
        "refused",
    }
    with pytest.raises(ValueError, match="got redis_on_fire"):
        named(["refused", "redis_on_fire"])


def test_crash_points_are_numbered_in_the_order_of_an_entrys_way() -> None:
    assert [point.number for point in POINTS] == list(range(1, len(POINTS) + 1))
    assert [str(point) for point in POINTS if point.step in ("read", REQUEST, "settle")] == [
        "5: before read",
        "6: after read",
        "11: before request",
        "12: during request",
        "13: after request",
        "16: before settle",
        "17: after settle",
    ]


def test_every_crash_point_is_some_services_and_every_step_is_a_script_of_the_agent() -> None:
    assert {point.number for service in OWN for point in points_of(service)} == {p.number for p in POINTS}
    scripts = {Path(one.name).stem for one in files("common.scripts").iterdir() if one.name.endswith(".lua")}
    assert {*STEPS} - {REQUEST} <= scripts


def test_no_file_of_the_agent_knows_of_crash_points() -> None:
    root = Path(__file__).parents[2]
    for path in [
        *root.glob("libs/**/*.py"),
        *root.glob("services/**/*.py"),
        *root.glob("dataplane_agent/*.py"),
    ]:
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert not {name for name in names if "crash_point" in name.lower() or name == "SIGKILL"}, path
