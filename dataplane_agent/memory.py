"""How much memory processes take: their proportional share (PSS), so that what they share counts once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path


def pss_mb(pid: int) -> float | None:
    """The proportional set size of a process in MB; None when it has gone."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return None
    found = re.search(r"^Pss:\s+(\d+) kB$", rollup, re.MULTILINE)
    return int(found[1]) / 1024 if found else None


def total_pss_mb(pids: Iterable[int]) -> float:
    """The sum over processes; what has gone counts nothing."""
    return sum(pss_mb(pid) or 0.0 for pid in pids)
