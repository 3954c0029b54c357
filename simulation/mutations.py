"""`python -m simulation.mutations`: takes one safety rule at a time out of a copy; does a seed notice?

A mutation is a few textual patches of the core. A patch that does not apply is an error: the rule has moved.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

ROOT = Path(__file__).parents[1]
TREES = ("libs", "services", "simulation")
SEEDS = 2000
TABLE = ROOT / "docs" / "mutations.md"

_SAID = re.compile(r"^seed (\d+): at ([0-9.]+) s: (.*)$", re.MULTILINE)


class Patch(msgspec.Struct, frozen=True):
    """In this file of `libs/common`, the one place that says `old` says `new`."""

    file: str
    old: str
    new: str

    def apply(self, root: Path) -> None:
        """Patches the copy below `root`. Raises ValueError unless the text is there exactly once."""
        path = root / "libs" / "common" / self.file
        text = path.read_text()
        if (found := text.count(self.old)) != 1:
            raise ValueError(f"{self.file}: expected once, found {found} times: {self.old!r}")
        path.write_text(text.replace(self.old, self.new))


class Mutation(msgspec.Struct, frozen=True):
    """A rule, and what takes it away."""

    rule: str
    patches: tuple[Patch, ...]


class Caught(msgspec.Struct, frozen=True):
    """The first seed that noticed."""

    seed: int
    said: str


def _one(rule: str, file: str, old: str, new: str) -> Mutation:
    return Mutation(rule, (Patch(file, old, new),))


MUTATIONS = (
    _one(
        "Only its owner buries an entry",
        "scripts/bury.lua",
        "if #pending == 1 and pending[1][2] == me then",
        "if #pending == 1 then",
    ),
    _one(
        "Only its owner answers a quota request",
        "scripts/answer.lua",
        "if #pending == 1 and pending[1][2] == ARGV[2] then",
        "if #pending == 1 then",
    ),
    _one(
        "A quota request is answered once",
        "scripts/answer.lua",
        "if #pending == 1 and pending[1][2] == ARGV[2] then",
        "if true then",
    ),
    _one(
        "Settling counts only what it removes",
        "scripts/settle.lua",
        "    if removed == 1 then\n      settled",
        "    if true then\n      settled",
    ),
    _one(
        "Dead before acknowledged",
        "scripts/bury.lua",
        "    local moved = redis.call('XCLAIM', stream, twin,",
        "    redis.call('XACK', stream, group, id)\n    local moved = redis.call('XCLAIM', stream, twin,",
    ),
    _one(
        "Reading is fenced by the turn",
        "scripts/read.lua",
        "if KEYS[2] and redis.call('GET', KEYS[2]) ~= ARGV[7] then return {-1} end",
        "",
    ),
    _one(
        "Settling is fenced by the turn",
        "scripts/settle.lua",
        "if KEYS[4] and redis.call('GET', KEYS[4]) ~= ARGV[3] then return -1 end",
        "",
    ),
    _one(
        "Burying is fenced by the turn",
        "scripts/bury.lua",
        "if KEYS[4] and redis.call('GET', KEYS[4]) ~= ARGV[4] then return -2 end",
        "",
    ),
    _one(
        "A key is the same at every delivery",
        "schemas.py",
        'str(uuid5(_TRANSACTIONS, f"{stream}\\n{entry}\\n{sha256(data).hexdigest()}"))',
        'str(__import__("uuid").uuid4())',
    ),
    _one(
        "A stop hands over what is in hand",
        "scripts/hand_over.lua",
        "if #pending == 1 and pending[1][2] == ARGV[2] then",
        "if false then",
    ),
    _one(
        "A stop counts no crash",
        "scripts/hand_over.lua",
        "'RETRYCOUNT', ARGV[i + 1], 'JUSTID'",
        "'RETRYCOUNT', ARGV[i + 1] + 1, 'JUSTID'",
    ),
    _one(
        "A re-made group does not read the dead",
        "scripts/read.lua",
        "if is_dead(id) then",
        "if false then",
    ),
    _one(
        "A group is re-made from the beginning",
        "scripts/make_groups.lua",
        "local live = make(ARGV[1], '0')",
        "local live = make(ARGV[1], '$')",
    ),
    _one(
        "A re-made twin shows again what is dead",
        "scripts/make_groups.lua",
        "if twin == 1 then",
        "if false then",
    ),
    _one(
        "What a failed read delivered to nobody is found",
        "consumer.py",
        "self._orphans = True  # what it read or took may be ours without our knowing",
        "pass",
    ),
    _one(
        "The lease of what is in hand is renewed",
        "lease.py",
        "if entry.leased_at <= oldest]",
        "if entry.leased_at < 0]",
    ),
    _one(
        "A new holder takes all that is pending before it reads",
        "consumer.py",
        "rows = await self._reclaimer.take_all()",
        "rows: list[Row] = []",
    ),
    Mutation(
        "A parked head blocks its lane",
        (
            Patch("delivery.py", "        self._lanes.block(entry)\n", "        self._lanes.finish(entry)\n"),
            Patch("delivery.py", "self._lanes.unblock(entry)", "self._lanes.push(entry)"),
        ),
    ),
    _one(
        "What was lost in order is taken again with all behind it",
        "delivery.py",
        "        if self._turn is not None:\n            self._let_go()",
        "        if False:\n            self._let_go()",
    ),
    _one(
        "Nothing is read while the gate is shut",
        "consumer.py",
        "            if self._gate.open:\n                return min(",
        "            if True:\n                return min(",
    ),
    _one(
        "A suspect is delivered alone",
        "delivery.py",
        "return None if self.in_flight else [self._suspects.popleft()]",
        "return [self._suspects.popleft()]",
    ),
    _one(
        "What is known of others is written before a suspect is delivered",
        "delivery.py",
        "        if not await self.settlement.flushed():\n            return False\n        unwritten",
        "        return True\n        unwritten",
    ),
    _one(
        "Poison is buried after so many deaths",
        "delivery.py",
        "if entry.died_alone < self._limits.max_deliveries:",
        "if True:",
    ),
    _one(
        "A held entry spends no attempt",
        "delivery.py",
        "    def _held(self, entry: Entry, retry: Retry) -> None:\n",
        "    def _held(self, entry: Entry, retry: Retry) -> None:\n        entry.attempts += 1\n",
    ),
    _one(
        "An answer that confirms nothing is no delivery",
        "control_plane/verdicts.py",
        "DELIVERED if _confirms(answer) else self._unconfirmed(",
        "DELIVERED if True else self._unconfirmed(",
    ),
)


def copy(target: Path) -> None:
    """The core and the simulation, without what Python has compiled of them."""
    for tree in TREES:
        shutil.copytree(ROOT / tree, target / tree, ignore=shutil.ignore_patterns("__pycache__"))


def check(mutation: Mutation, seeds: int = SEEDS, timeout: float = 1800) -> Caught | None:
    """Plays seeds against a copy without the rule, until one notices; None when none does."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        copy(root)
        for patch in mutation.patches:
            patch.apply(root)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(str(root / tree) for tree in ("libs", "services"))
        }
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        command = [sys.executable, "-m", "simulation", "--seeds", str(seeds), "--first", "--brief"]
        played = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
    if (found := _SAID.search(played.stdout)) is not None:
        return Caught(int(found[1]), found[3])
    if played.returncode:
        raise RuntimeError(f"{mutation.rule}: the simulation itself failed:\n{played.stderr[-2000:]}")
    return None


def table(caught: dict[str, Caught | None]) -> str:
    """The page for the docs."""
    lines = [
        "# Which rule is missed when it is taken out",
        "",
        "`python -m simulation.mutations` takes one rule at a time out of a copy of the core, and plays seeds.",
        f"Every rule has to be missed within {SEEDS} seeds; this page is what the last run wrote.",
        "",
        "| rule | first seed that misses it | what the judge says |",
        "|---|---|---|",
    ]
    for mutation in MUTATIONS:
        if mutation.rule in caught:
            seen = caught[mutation.rule]
            told = (str(seen.seed), seen.said.replace("|", "\\|")[:160]) if seen else ("none", "")
            lines.append(f"| {mutation.rule} | {told[0]} | {told[1]} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m simulation.mutations", description=__doc__)
    parser.add_argument(
        "--only", default="", help="rules whose name contains this; the page is not written then"
    )
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    caught: dict[str, Caught | None] = {}
    for mutation in MUTATIONS:
        if options.only.lower() not in mutation.rule.lower():
            continue
        began = time.perf_counter()
        seen = caught[mutation.rule] = check(mutation, options.seeds)
        told = f"seed {seen.seed}: {seen.said[:140]}" if seen else f"NOT MISSED in {options.seeds} seeds"
        print(f"{mutation.rule}: {told}  ({time.perf_counter() - began:.0f} s)", flush=True)
    if not options.only:
        TABLE.write_text(table(caught))
    missed = [rule for rule, seen in caught.items() if seen is None]
    print(f"{len(caught) - len(missed)} of {len(caught)} rules are missed when they are taken out")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
