"""`python -m benchmarks`: measures what is named, or everything; see benchmarks/README.md."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import crowded, distances, footprint, latency, levels, report, saturated, throughput
from benchmarks.contestants import AGENT, BARE, OURS, OURS_BATCH, PEERS
from benchmarks.lab import Lab
from benchmarks.plan import Plan, say

DOCS = Path(__file__).parents[1] / "docs"


def _throughput(lab: Lab, plan: Plan) -> dict[str, object]:
    return throughput.race(lab, plan, (BARE, OURS, OURS_BATCH) if plan.quick else AGENT)


def _peers(lab: Lab, plan: Plan) -> dict[str, object]:
    return throughput.race(lab, plan, (BARE, *PEERS))


MEASUREMENTS: dict[str, Callable[[Lab, Plan], Any]] = {
    "ceiling": lambda lab, _plan: throughput.ceiling(lab),
    "throughput": _throughput,
    "peers": _peers,
    "latency": latency.measure,
    "saturated": saturated.measure,
    "backlog": crowded.backlog,
    "dead": crowded.dead_letters,
    "takeover": crowded.takeover,
    "start": footprint.start,
    "idle": footprint.idle,
    "memory": footprint.memory,
    "distances": distances.measure,
    "levels": levels.measure,
}
QUICK = ("ceiling", "throughput", "latency", "saturated", "dead", "takeover", "start", "idle", "distances")


def main() -> int:
    """Measures, prints, writes results.json and results.md; 1 when a record did not arrive."""
    options = _arguments()
    names = options.names or (QUICK if options.quick else list(MEASUREMENTS))
    plan = Plan(
        options.records or (3000 if options.quick else 60_000),
        options.sessions,
        options.rounds or (1 if options.quick else 5),
        options.quick,
        options.full,
    )
    results: dict[str, Any] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended on the way out
    try:
        with Lab() as lab:
            results["meta"] = _meta(lab, plan)
            for name in names:
                say(f"{name}:")
                results[name] = MEASUREMENTS[name](lab, plan)
                _keep(results, options.out)  # a later measurement may fail
    except (AssertionError, TimeoutError, RuntimeError) as error:
        say(f"benchmarks: {error}")
        return 1
    if options.publish:
        _publish(results)
    say()
    say(report.markdown(results))
    say(
        f"written: {options.out}/results.json, {options.out}/results.md"
        + (", docs/performance.md" if options.publish else "")
    )
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MEASUREMENTS)}")
    parser.add_argument("--records", type=int, help="a contestant's records a round (default 60000)")
    parser.add_argument("--sessions", type=int, default=100)
    parser.add_argument("--rounds", type=int, help="default 5")
    parser.add_argument("--quick", action="store_true", help="does it work? the figures mean little")
    parser.add_argument("--full", action="store_true", help="the sizes of the bounds: takes long")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="default build/benchmarks")
    parser.add_argument("--publish", action="store_true", help="write docs/performance.md, with plots")
    options = parser.parse_args()
    for name in options.names:
        if name not in MEASUREMENTS:
            parser.error(f"expected names of {', '.join(MEASUREMENTS)}, got {name}")
    if options.publish and find_spec("matplotlib") is None:
        parser.error("--publish draws plots: install the extra `bench` (make bench does)")
    return options


def _meta(lab: Lab, plan: Plan) -> dict[str, object]:
    return {
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": f"Python {platform.python_version()}",
        "redis": f"{lab.redis_name} {lab.redis.info('server')['redis_version']}",
        "sink": lab.sink.name,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "rounds": plan.rounds,
        "records": plan.records,
        "sessions": plan.sessions,
    }


def _keep(results: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results))
    (out / "results.md").write_text(report.markdown(results))


def _publish(results: dict[str, Any]) -> None:
    from benchmarks import plots

    drawn = plots.draw(results, DOCS / "performance")
    (DOCS / "performance.md").write_text(report.markdown(results, drawn))


if __name__ == "__main__":
    sys.exit(main())
