"""Seed -> the steps of a run: always the same, without end.

Faults come in rounds, as from a shuffled deck: in every round each comes as often as it weighs. Every fourth step
is two at once, of different families.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

import msgspec

from sandbox.chaos.catalogue import Fault

PAIR_EVERY = 4


class Step(msgspec.Struct, frozen=True):
    """What strikes together."""

    number: int
    faults: tuple[str, ...]

    def random(self, seed: int, fault: str) -> Random:
        """The randomness of one fault in this step; the same in every run of the seed."""
        return Random(f"{seed}/{self.number}/{fault}")


def steps(seed: int, faults: Sequence[Fault]) -> Iterator[Step]:
    """The steps of this seed with these faults."""
    random = Random(seed)
    families = {fault.name: fault.family for fault in faults}
    deck: list[str] = []
    number = 0
    while True:
        number += 1
        first = _draw(deck, faults, random, set())
        drawn = [first]
        if number % PAIR_EVERY == 0 and len(set(families.values())) > 1:
            same = {name for name, family in families.items() if family == families[first]}
            drawn.append(_draw(deck, faults, random, same))
        yield Step(number, tuple(drawn))


def _draw(deck: list[str], faults: Sequence[Fault], random: Random, unwanted: set[str]) -> str:
    """The next card that is wanted; a new round is shuffled under the old one when there is none."""
    while True:
        for at, name in enumerate(deck):
            if name not in unwanted:
                return deck.pop(at)
        round_ = [fault.name for fault in faults for _ in range(fault.weight)]
        random.shuffle(round_)
        deck += round_
