"""`python -m simulation`: plays seeds, says which promise was broken, and tells the story of the first that was."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from simulation.world import Verdict, play

STORY_BEGINS, STORY_ENDS = 40, 60
"""Lines of a failing seed's story that are told without `--verbose`."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many, one after the other")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument(
        "--verbose", action="store_true", help="the whole story of the first seed, or of one that fails"
    )
    parser.add_argument("--brief", action="store_true", help="no story of a seed that fails")
    parser.add_argument("--first", action="store_true", help="stop at the first seed that fails")
    options = parser.parse_args()
    began = time.perf_counter()
    failed: list[int] = []
    played = steps = calls = 0
    with _played(range(options.seed, options.seed + options.seeds), options.workers) as verdicts:
        for verdict in verdicts:
            played, steps, calls = played + 1, steps + verdict.steps, calls + verdict.calls
            if verdict.offences:
                failed.append(verdict.seed)
                print(f"seed {verdict.seed}: {verdict.offences[0]}", flush=True)
                if options.first:
                    break
    if options.verbose or (failed and not options.brief):
        _tell(failed[0] if failed else options.seed, whole=options.verbose)
    took = time.perf_counter() - began
    print(f"{played} seeds, {steps} steps, {calls} calls to Redis, {took:.1f} s")
    print(f"{played - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


@contextmanager
def _played(seeds: range, workers: int) -> Iterator[Iterable[Verdict]]:
    """Verdicts in the order of the seeds, played by so many processes."""
    if len(seeds) == 1 or workers == 1:
        yield map(play, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield pool.imap(play, seeds, chunksize=4)


def _tell(seed: int, whole: bool) -> None:
    told = play(seed, tracing=True)
    lines = told.story.splitlines()
    if not whole and len(lines) > STORY_BEGINS + STORY_ENDS:
        left_out = len(lines) - STORY_BEGINS - STORY_ENDS
        lines[STORY_BEGINS:-STORY_ENDS] = [f"… {left_out} lines left out: --seed {seed} --verbose has them"]
    print(*lines, sep="\n")
    for offence in told.offences:
        print(f"seed {seed}: {offence}")


if __name__ == "__main__":
    sys.exit(main())
