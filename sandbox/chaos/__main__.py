"""`python -m sandbox.chaos`: 0 everything held, 1 something did not, 2 wrong usage."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

import msgspec

from sandbox.chaos import (  # noqa: F401  each registers its faults
    control_plane_faults,
    redis_faults,
    report,
    service_faults,
    traffic_faults,
)
from sandbox.chaos.catalogue import Fault, named
from sandbox.chaos.redis_server import Kind, program
from sandbox.chaos.run import Report, run


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m sandbox.chaos",
        description="Try to break the agent, in every way an operator's life can, and print a table.",
    )
    parser.add_argument(
        "--seed", type=int, nargs="+", default=[1], help="one run each; a seed repeats its schedule"
    )
    parser.add_argument("--minutes", type=float, default=2.0, help="for how long faults strike (%(default)s)")
    parser.add_argument(
        "--faults", nargs="+", default=["*"], metavar="NAME", help="only these; `redis_*` is several (all)"
    )
    parser.add_argument("--list", action="store_true", help="print the catalogue of faults")
    parser.add_argument("--redis", choices=("redis", "valkey"), help="redis-server where it is installed")
    parser.add_argument("--rate", type=float, default=60.0, help="entries a second (%(default)s)")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep logs, books and schedule there, come what may"
    )
    parser.add_argument("--publish", type=Path, metavar="FILE", help="write the tables into this document")
    parser.add_argument(
        "--reports", type=Path, nargs="+", metavar="FILE", help="run nothing: publish these kept report.json"
    )
    options = parser.parse_args(argv)
    if options.list:
        print(report.catalogue())
        return 0
    try:
        faults = named(options.faults)
    except ValueError as error:
        parser.error(str(error))
    kind: Kind = options.redis or ("redis" if program("redis") else "valkey")
    if program(kind) is None:
        parser.error("redis-server is not installed; --redis valkey brings its own")
    if options.reports:
        reports = [msgspec.json.decode(path.read_bytes(), type=Report) for path in options.reports]
        complete = True
    else:
        runs = [_run(seed, options, faults, kind) for seed in options.seed]
        reports = [one for one in runs if one is not None]
        complete = len(reports) == len(runs)
    if options.publish is not None and reports:
        report.publish(reports, options.publish)
    return 0 if complete and all(one.ok for one in reports) else 1


def _run(seed: int, options: argparse.Namespace, faults: Sequence[Fault], kind: Kind) -> Report | None:
    """One seed; what it made is kept where it failed. None when the run itself could not be carried through."""
    directory = _directory(options.keep, seed)
    found = None
    try:
        found = asyncio.run(
            run(
                directory,
                seed=seed,
                minutes=options.minutes,
                faults=faults,
                kind=kind,
                rate=options.rate,
                say=lambda line: print(line, flush=True),
            )
        )
        print(f"\n{report.render(found)}\n", flush=True)
    except Exception:  # a run that could not be judged did not hold: what is kept is named below, exit code 1
        traceback.print_exc()
    if found is None or not found.ok or options.keep:
        print(f"logs, books, schedule: {directory}", flush=True)
    else:
        shutil.rmtree(directory, ignore_errors=True)
    return found


def _directory(keep: Path | None, seed: int) -> Path:
    if keep is None:
        return Path(tempfile.mkdtemp(prefix=f"chaos-{seed}-"))
    directory = keep / f"seed-{seed}"
    directory.mkdir(parents=True)
    return directory


if __name__ == "__main__":
    sys.exit(main())
