"""How figures and tables look: drawn on a terminal, plain aligned columns anywhere else."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table; plain output is cut off nowhere, so that it can be taken apart by column."""
    if sys.stdout.isatty():
        Console().print(drawn(headings, rows))
        return
    for line in plain(headings, rows):
        print(line)


def drawn(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """The table as rich draws it."""
    view = Table(header_style="bold", box=None, pad_edge=False, collapse_padding=True)
    for heading in headings:
        view.add_column(heading, overflow="fold")
    for row in rows:
        view.add_row(*(Text(cell(value)) for value in row))  # Text: what is shown is no markup
    return view


def plain(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The table as lines: columns two spaces apart, the last one ragged."""
    cells = [[heading.upper() for heading in headings], *([cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    return ["  ".join(c.ljust(width) for c, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def json(value: Any) -> None:
    """Prints one JSON document."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")


def age(seconds: float | None) -> str:
    """A duration in its largest fitting unit: 840ms, 12s, 7m, 3h, 9d; `-` for none."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{max(0.0, seconds) * 1000:.0f}ms"
    unit = next(u for u in reversed(UNITS) if seconds >= UNITS[u])
    return f"{seconds / UNITS[unit]:.0f}{unit}"


def duration(text: str) -> float:
    """`90`, `90s`, `15m`, `24h`, `7d` as seconds; raises ValueError for anything else."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd]?)", text)
    if found is None:
        raise ValueError(f"expected a duration such as 90s, 15m, 24h or 7d, got {text}")
    return float(found[1]) * UNITS[found[2] or "s"]


def counts(figures: dict[str, int]) -> str:
    """`invalid 3, rejected 1`, or `-`."""
    return ", ".join(f"{name} {figure}" for name, figure in figures.items() if figure) or "-"


def cell(value: object) -> str:
    """A value on one line; what a terminal would take for a command is shown, not sent."""
    return _printable("-" if value is None or value == "" else str(value))


def readable(data: bytes) -> str:
    """Bytes as text of several lines: JSON indented, everything that is no text escaped."""
    try:
        data = msgspec.json.format(data, indent=2)
    except (msgspec.DecodeError, RecursionError):
        pass  # then it is shown as it came
    return "\n".join(_printable(line) for line in data.decode(errors="backslashreplace").split("\n"))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
