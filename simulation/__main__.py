"""`python -m simulation`: plays seeds, says which promise was broken, and tells the story of the first that was."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time

from simulation.world import Verdict, play


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many, one after the other")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--verbose", action="store_true", help="tell the whole story, of one seed")
    parser.add_argument("--first", action="store_true", help="stop at the first seed that fails")
    parser.add_argument("--brief", action="store_true", help="no story of a seed that fails")
    options = parser.parse_args()
    seeds = range(options.seed, options.seed + options.seeds)
    began = time.perf_counter()
    failed: list[Verdict] = []
    played = steps = calls = 0
    if options.seeds == 1 or options.workers == 1:
        verdicts = map(play, seeds)
        pool = None
    else:
        pool = multiprocessing.get_context("spawn").Pool(options.workers)
        verdicts = pool.imap(play, seeds, chunksize=4)
    for verdict in verdicts:
        played, steps, calls = played + 1, steps + verdict.steps, calls + verdict.calls
        if verdict.offences:
            failed.append(verdict)
            print(f"seed {verdict.seed}: {verdict.offences[0]}", flush=True)
            if options.first:
                break
    if pool is not None:
        pool.terminate()
    if options.verbose or (failed and not options.brief):
        seed = failed[0].seed if failed else options.seed
        told = play(seed, tracing=True)
        lines = told.story.splitlines()
        print(*(lines if options.verbose else lines[:20] + lines[-60:]), sep="\n")
        for offence in told.offences:
            print(f"seed {seed}: {offence}")
    took = time.perf_counter() - began
    print(f"{played} seeds, {len(failed)} failed, {steps} steps, {calls} calls to Redis, {took:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
