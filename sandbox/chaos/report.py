"""The table of a run: what struck, what was seen, how long it took to be well again, and whether all held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from sandbox.chaos.catalogue import CATALOGUE
from sandbox.chaos.run import Impossible, Report, Struck

NAMED = 5
BEGIN, END = "<!-- chaos: begin -->", "<!-- chaos: end -->"


class Line(msgspec.Struct):
    """One fault over all runs; recovery alone counts where it struck alone."""

    fault: str
    times: int = 0
    alone: list[float] = []
    together: list[float] = []
    seen: Counter[str] = msgspec.field(default_factory=Counter)
    broken: int = 0


def lines(steps: Iterable[Struck]) -> list[Line]:
    """A line a fault, in the catalogue's order."""
    found = {name: Line(name) for name in CATALOGUE}
    for step in steps:
        for name in step.faults:
            line = found[name]
            line.times += 1
            line.broken += len(step.broken)
            line.seen.update(step.seen.get(name, {}))
            if step.recovered_seconds is not None:
                (line.alone if len(step.faults) == 1 else line.together).append(step.recovered_seconds)
    return [line for line in found.values() if line.times]


def render(report: Report) -> str:
    """The report of one run, for a terminal."""
    judgement = report.judgement
    rows = [
        (line.fault, str(line.times), _worst(line.alone), _worst(line.together), _seen(line.seen))
        for line in lines(report.steps)
    ]
    text = _columns([("fault", "times", "alone", "paired", "seen"), *rows])
    text += [""]
    text += [f"{one.fault}: not possible here, {one.reason}" for one in report.impossible]
    text += [f"{count:>8,}  {name}" for name, count in judgement.figures.items()]
    text += ["", f"drained in {judgement.drained_seconds:.1f} s", ""]
    for check in judgement.checks:
        text.append(f"{len(check.found):>8,}  {check.name}{'' if check.holds else '   <- does not hold'}")
        text += [f"          {one}" for one in check.found[:NAMED]]
        if len(check.found) > NAMED:
            text.append(f"          and {len(check.found) - NAMED} more")
    verdict = "everything holds" if report.ok else "IT DOES NOT HOLD"
    text += ["", f"seed {report.seed}, {report.minutes:g} minutes, {report.server}: {verdict}"]
    return "\n".join(text)


def publish(reports: Sequence[Report], document: Path) -> None:
    """Writes the figures of these runs between the marks of a Markdown document."""
    text = document.read_text()
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{document}: expected the marks {BEGIN} and {END}")
    document.write_text(f"{head}{BEGIN}\n\n{markdown(reports)}\n{END}{tail}")


def markdown(reports: Sequence[Report]) -> str:
    """The tables of all runs."""
    parts = [_summary(reports), _figures(reports), _faults(reports)]
    impossible = sorted(
        {Impossible(one.fault, one.reason) for report in reports for one in report.impossible}, key=str
    )
    if impossible:
        parts.append(
            "\n".join(f"Not possible where it ran: `{one.fault}`, {one.reason}." for one in impossible)
        )
    return "\n\n".join(parts) + "\n"


def _summary(reports: Sequence[Report]) -> str:
    rows = [("run", *(f"seed {report.seed}" for report in reports))]
    rows.append(("minutes", *(f"{report.minutes:g}" for report in reports)))
    rows.append(("server", *(report.server for report in reports)))
    rows.append(("faults struck", *(str(sum(len(s.faults) for s in report.steps)) for report in reports)))
    rows.append(("drained in", *(f"{report.judgement.drained_seconds:.1f} s" for report in reports)))
    names = dict.fromkeys(check.name for report in reports for check in report.judgement.checks)
    rows += [(f"**{name}**", *(f"**{_found(report, name)}**" for report in reports)) for name in names]
    return _table(rows)


def _figures(reports: Sequence[Report]) -> str:
    names = dict.fromkeys(name for report in reports for name in report.judgement.figures)
    rows = [("figure", *(f"seed {report.seed}" for report in reports))]
    rows += [(name, *(f"{report.judgement.figures.get(name, 0):,}" for report in reports)) for name in names]
    return _table(rows)


def _faults(reports: Sequence[Report]) -> str:
    rows = [("fault", "what it does", "expected", "times", "worst recovery, alone / paired", "seen")]
    for line in lines(step for report in reports for step in report.steps):
        fault = CATALOGUE[line.fault]
        worst = f"{_worst(line.alone)} / {_worst(line.together)}"
        rows.append(
            (
                f"`{line.fault}`",
                fault.does,
                _sentence(fault.expected),
                str(line.times),
                worst,
                _seen(line.seen),
            )
        )
    return _table(rows)


def catalogue() -> str:
    """Every fault with what it does and what is expected, for a terminal."""
    text = []
    for fault in CATALOGUE.values():
        text += [
            f"{fault.name}  ({fault.family})",
            f"    {fault.does}",
            f"    Expected: {fault.expected}",
            "",
        ]
    return "\n".join(text)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _found(report: Report, name: str) -> int:
    return sum(len(check.found) for check in report.judgement.checks if check.name == name)


def _worst(seconds: Sequence[float]) -> str:
    return f"{max(seconds):.1f} s" if seconds else "–"


def _seen(seen: Counter[str]) -> str:
    """The observations in words; those at numbered points by number."""
    said = [f"{count:,} {name}" for name, count in sorted(seen.items()) if " point " not in name]
    for when, words in (
        (" at point ", "crashes at points"),
        (" never come to point ", "did not come to points"),
    ):
        places = [name for name in seen if when in name]
        numbers = sorted({int(name.partition(when)[2].partition(":")[0]) for name in places})
        if numbers:
            said.append(f"{sum(seen[name] for name in places)} {words} {', '.join(map(str, numbers))}")
    return ", ".join(said)


def _table(rows: Sequence[Sequence[str]]) -> str:
    first, *others = rows
    lined = [first, ["---"] * len(first), *others]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lined)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]) - 1)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]
