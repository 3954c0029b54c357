"""The registry of faults: each has a name, a docstring that says what it does and what is expected, and a family.

A fault is one coroutine: it strikes, holds, and lifts again what it has done. Two faults of different families may
strike together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from fnmatch import fnmatchcase
from inspect import cleandoc
from random import Random
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from sandbox.chaos.world import World

Family = Literal["service", "redis", "control plane", "traffic"]


class Scene:
    """One strike of one fault: the world it strikes, alone or not, its own randomness, what it has to say."""

    def __init__(self, world: World, fault: str, random: Random, alone: bool) -> None:
        self.world, self.fault, self.random, self.alone = world, fault, random, alone
        self.seen: Counter[str] = Counter()
        self.broken: list[str] = []

    def saw(self, what: str, times: int = 1) -> None:
        """An observation for the table."""
        if times:
            self.seen[what] += times

    def expect(self, holds: bool, otherwise: str) -> None:
        """Something that this fault must not do to the agent."""
        if not holds:
            self.broken.append(f"{self.fault}: {otherwise}")


class Fault(NamedTuple):
    """One entry of the catalogue. `weight`: how often it comes in a round."""

    name: str
    family: Family
    does: str
    expected: str
    strike: Callable[[Scene], Awaitable[None]]
    impossible: Callable[[World], str | None]
    weight: int


CATALOGUE: dict[str, Fault] = {}

_Strike = Callable[[Scene], Awaitable[None]]


def fault(
    family: Family, *, weight: int = 1, impossible: Callable[[World], str | None] = lambda _: None
) -> Callable[[_Strike], _Strike]:
    """Registers a coroutine under its name; its docstring has what it does, then `Expected: …`."""

    def register(strike: _Strike) -> _Strike:
        does, _, expected = cleandoc(strike.__doc__ or "").partition("\n\nExpected: ")
        assert expected, f"{strike.__name__} does not say what it does and what is expected"
        name = strike.__name__
        CATALOGUE[name] = Fault(
            name, family, " ".join(does.split()), " ".join(expected.split()), strike, impossible, weight
        )
        return strike

    return register


def named(patterns: Iterable[str]) -> list[Fault]:
    """The faults whose names match any of the patterns (`redis_*`); raises ValueError for one that matches none."""
    found: dict[str, Fault] = {}
    for pattern in patterns:
        matching = {name: fault for name, fault in CATALOGUE.items() if fnmatchcase(name, pattern)}
        if not matching:
            raise ValueError(f"expected names of faults (--list prints them), got {pattern}")
        found |= matching
    return list(found.values())
