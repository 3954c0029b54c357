"""The schedule of a chaos run: a seed is a run."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import sandbox.chaos.__main__  # noqa: F401  registers every fault
from sandbox.chaos.catalogue import CATALOGUE
from sandbox.chaos.schedule import PAIR_EVERY, steps

FAULTS = list(CATALOGUE.values())
ROUND = sum(fault.weight for fault in FAULTS)


def test_a_seed_repeats_its_schedule_and_another_seed_has_another() -> None:
    one, again, other = (list(islice(steps(seed, FAULTS), 200)) for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_the_randomness_of_a_fault_depends_on_seed_step_and_fault_alone() -> None:
    step = next(steps(1, FAULTS))
    drawn = [step.random(seed, name).random() for seed in (1, 1, 2) for name in ("refused", "slow")]
    assert drawn[:2] == drawn[2:4]
    assert len(set(drawn)) == 4


def test_in_every_round_each_fault_comes_as_often_as_it_weighs() -> None:
    drawn = [name for step in islice(steps(3, FAULTS), 4 * ROUND) for name in step.faults]
    for begin in range(0, 3 * ROUND, ROUND):
        counted = Counter(drawn[begin : begin + ROUND])
        # A pair may take its second fault from further down the deck.
        assert all(abs(counted[fault.name] - fault.weight) <= 2 for fault in FAULTS)
    assert set(Counter(drawn)) == set(CATALOGUE)


def test_every_fourth_step_is_a_pair_of_different_families() -> None:
    for step in islice(steps(5, FAULTS), 100):
        assert len(step.faults) == (2 if step.number % PAIR_EVERY == 0 else 1)
        assert len({CATALOGUE[name].family for name in step.faults}) == len(step.faults)


def test_faults_of_one_family_strike_one_by_one() -> None:
    alone = [fault for fault in FAULTS if fault.family == "redis"]
    assert all(len(step.faults) == 1 for step in islice(steps(5, alone), 50))
