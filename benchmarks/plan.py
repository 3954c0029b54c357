"""How much is measured, and where it is said."""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """How much of everything. `quick`: only whether it works; `full`: the sizes of the bounds."""

    records: int
    sessions: int
    rounds: int
    quick: bool
    full: bool

    def of(self, share: float) -> int:
        """The records of a contestant that gets this share of them."""
        return max(200, round(self.records * share))

    def size(self, quick: int, usual: int, full: int) -> int:
        return full if self.full else quick if self.quick else usual


def say(line: str = "") -> None:
    """Tells the person who waits."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
