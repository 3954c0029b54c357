"""What the operator sees: tables, ages, payloads."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from dataplane_agent import printing


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "-"),
        (-1.0, "0ms"),
        (0.0, "0ms"),
        (0.84, "840ms"),
        (1.0, "1s"),
        (59.0, "59s"),
        (60.0, "1m"),
        (3600.0, "1h"),
        (86400.0 * 9, "9d"),
    ],
)
def test_an_age_is_shown_in_its_largest_unit(seconds: float | None, shown: str) -> None:
    assert printing.age(seconds) == shown


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90.0), ("90s", 90.0), ("15m", 900.0), ("1.5h", 5400.0), ("7d", 604800.0)]
)
def test_a_duration_is_a_number_with_a_unit(text: str, seconds: float) -> None:
    assert printing.duration(text) == seconds


@pytest.mark.parametrize("text", ["", "d", "-1", "7w", "1 d", "1e3", "inf", "nan", "٣"])
def test_anything_else_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        printing.duration(text)


def test_plain_columns_are_aligned_and_cut_off_nowhere() -> None:
    long = "x" * 300
    assert printing.plain(("id", "error"), [("1-1", long), ("100-1", None)]) == [
        "ID     ERROR",
        f"1-1    {long}",
        "100-1  -",
    ]


@pytest.mark.parametrize(
    ("value", "shown"), [("a\x1b[31mb", r"a\x1b[31mb"), ("a\nb", r"a\nb"), ("\u202e", r"\u202e"), ("ß", "ß")]
)
def test_what_a_terminal_would_obey_is_shown_instead(value: str, shown: str) -> None:
    assert printing.cell(value) == shown


def test_what_is_shown_is_no_markup() -> None:
    console = Console(width=40, record=True, file=io.StringIO())
    console.print(printing.drawn(("error",), [("[bold]no[/bold]",)]))
    assert "[bold]no[/bold]" in console.export_text()


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b'{"a":[1]}', '{\n  "a": [\n    1\n  ]\n}'),
        (b"\xff\x1b[2J", r"\xff\x1b[2J"),
        (b"", ""),
        (b"NaN", "NaN"),
    ],
)
def test_a_payload_is_indented_json_or_else_escaped(data: bytes, shown: str) -> None:
    assert printing.readable(data) == shown


def test_a_payload_of_any_depth_can_be_shown() -> None:
    assert printing.readable(b"[" * 20_000).startswith("[")
    assert printing.readable(b"[" * 20_000 + b"]" * 20_000).startswith("[")
