"""What a seed stands for: a service and its settings, what is produced, and what goes wrong when.

Everything is drawn here, before anything runs, so that a plan can be read.
"""

from __future__ import annotations

from random import Random
from typing import Any, Literal

import msgspec

from simulation.control_plane import FATES, Front

Kind = Literal["usage_forwarder", "session_notifier", "quota_refresher"]

TROUBLE_ENDS = 40.0
"""Seconds after which nothing more goes wrong."""

HOLD = 40.0
"""`not_found_hold_seconds`: longer than any session of the simulation stays unknown, unless it does for ever."""

FAULTS = (
    "kill",
    "kill soon",
    "kill at",
    "pause",
    "pause",
    "pause",
    "stop",
    "stop and kill",
    "redis down",
    "redis stalls",
    "redis lossy",
    "connections cut",
    "reply lost",
    "scripts forgotten",
    "group destroyed",
    "twin destroyed",
    "stream deleted",
    "flushed",
    "trimmed",
    "pending deleted",
    "dead deleted",
    "redrive",
    "discard",
    "turn deleted",
)

SCRIPTS = (
    "read",
    "read",
    "settle",
    "bury",
    "take_over",
    "hand_over",
    "renew",
    "answer",
    "fetch",
    "turn_take",
    "make_groups",
    "forget_consumer",
)

MOST_KILLS = 4
"""Below `max_deliveries`, so that no bad luck makes an innocent entry look poisonous."""

MAX_DELIVERIES = 5


class Fault(msgspec.Struct, frozen=True, order=True):
    """One thing that goes wrong."""

    at: float
    what: str
    slot: int = 0
    seconds: float = 0.0
    script: str = ""
    moment: str = ""
    share: float = 0.0
    callbacks: int = 0

    def __str__(self) -> str:
        facts = [f"process {self.slot}"]
        facts += [f"{self.seconds:.2f} s"] if self.seconds else []
        facts += [f"{self.moment} at {self.script}"] if self.script else []
        facts += [f"share {self.share:.2f}"] if self.share else []
        facts += [f"after {self.callbacks} callbacks"] if self.callbacks else []
        return f"{self.at:7.3f}  {self.what}: {', '.join(facts)}"


class Planned(msgspec.Struct, frozen=True, order=True):
    """One entry to be produced. `flaw`: what is wrong with it, '' for nothing."""

    at: float
    serial: str
    session: str
    place: int  # in its session
    flaw: str
    key: str  # the transaction id it carries, '' for none
    twice: bool  # the producer's XADD is repeated: two entries


class Plan(msgspec.Struct, frozen=True):
    """Everything that a seed decides beforehand."""

    seed: int
    service: Kind
    processes: int
    entries: list[Planned]
    faults: list[Fault]
    fronts: list[Front]
    known_at: dict[str, float]  # sessions that the ControlPlane does not know before
    poison: str  # where a poisonous entry kills: decode, send, answer
    visibility_timeout: float
    claim_interval: float
    read_count: int
    max_in_flight: int
    batch: int
    timeout: float
    drain_seconds: float
    redis_latency: float
    http_latency: float

    @property
    def patience(self) -> float:
        """Virtual seconds after the last fault within which everything has to be drained.

        The longest park and the longest hold, one after the other; how long the slots take for all entries; and what
        a poisonous entry takes to be found out, after each of whose victims much is sent again.
        """
        deaths = 2 + MAX_DELIVERIES + MOST_KILLS
        poisonous = any(entry.flaw == "poison" for entry in self.entries)
        sending = (
            3
            * len(self.entries)
            * (2 * self.http_latency + 4 * self.redis_latency)
            / min(4, self.max_in_flight)
        )
        return (
            HOLD
            + 75.0
            + 3 * self.timeout
            + 4 * self.visibility_timeout
            + sending
            + poisonous
            * deaths
            * (self.visibility_timeout + self.claim_interval + self.timeout + 5.0 + sending)
        )

    def __str__(self) -> str:
        settings = {name: getattr(self, name) for name in self.__struct_fields__[7:]}
        settings |= {"processes": self.processes, "entries": len(self.entries)}
        flaws = [f"{e.serial} ({e.session}): {e.flaw}" for e in self.entries if e.flaw]
        lines = [f"seed {self.seed}: {self.service}", f"  {settings}"]
        lines += [f"  flawed  {flaw}" for flaw in flaws]
        lines += [f"  unknown {session} before {at:.1f}" for session, at in self.known_at.items()]
        lines += [f"  weather {f.begins:7.3f} to {f.ends:.3f}  {f.kind}, {f.share:.0%}" for f in self.fronts]
        lines += [f"  fault {fault}" for fault in self.faults]
        return "\n".join(lines)


def draw(seed: int) -> Plan:
    """The plan of that seed."""
    random = Random(f"plan {seed}")
    services: tuple[Kind, ...] = ("usage_forwarder", "session_notifier", "quota_refresher")
    service = random.choices(services, (4, 5, 3))[0]
    sessions = [f"s{n}" for n in range(random.choice((2, 5, 12, 30)))]
    entries = _entries(random, service, sessions)
    unknown = random.sample(sessions, min(len(sessions) // 2, random.choice((0, 0, 1, 3))))
    never = {entry.session for entry in entries if entry.flaw == "never known"}
    processes = random.choice((1, 2, 2, 3, 3))
    return Plan(
        seed=seed,
        service=service,
        processes=processes,
        entries=entries,
        faults=_faults(random, service, processes),
        fronts=_fronts(random),
        known_at={name: random.uniform(5, 35) for name in unknown if name not in never},
        poison=random.choice(("decode", "send", "send", "answer")),
        visibility_timeout=random.choice((1.5, 3.0, 6.0)),
        claim_interval=random.choice((0.3, 1.0, 2.0)),
        read_count=random.choice((1, 4, 20, 100)),
        max_in_flight=random.choice((1, 3, 8, 16)),
        batch=random.choice((1, 1, 4, 20)) if service == "usage_forwarder" else 1,
        timeout=random.choice((1.0, 3.0)),
        drain_seconds=random.choice((1.0, 4.0, 8.0)),
        redis_latency=random.choice((0.0003, 0.002, 0.02)),
        http_latency=random.choice((0.005, 0.05, 0.4)),
    )


FLAWS = ("garbled", "empty", "rejected", "rejected", "never known", "forbidden", "poison", "conflict")


def _entries(random: Random, service: Kind, sessions: list[str]) -> list[Planned]:
    number = random.choice((8, 25, 50))
    spread = random.choice((1.0, 10.0, 30.0))
    flawed = random.choice((0.0, 0.1, 0.3))
    names_itself = random.choice((0.3, 1.0))
    twice = random.choice((0.0, 0.1)) if service != "quota_refresher" else 0.0
    hermits = iter(f"n{n}" for n in range(number))  # sessions that nobody else has a part in
    places: dict[str, int] = {}
    poisonous = False
    entries: list[Planned] = []
    for n, at in enumerate(sorted(random.uniform(0.2, spread) for _ in range(number))):
        session = random.choice(sessions)
        flaw = random.choice(FLAWS) if random.random() < flawed else ""
        if flaw == "poison":
            flaw, poisonous = ("" if poisonous else flaw), True
        if flaw == "never known" or (flaw == "conflict" and service == "session_notifier"):
            session, flaw = next(hermits), "never known"
        place = places[session] = places.get(session, -1) + 1
        key = f"t{n}" if random.random() < names_itself else ""
        repeated = bool(key) and not flaw and random.random() < twice
        if flaw == "conflict":
            others = [other.key for other in entries if other.key and not other.flaw and not other.twice]
            key, flaw = (random.choice(others), flaw) if others else (key, "")
        entries.append(Planned(at, f"e{n}", session, place, flaw, key, repeated))
    return entries


def _faults(random: Random, service: Kind, processes: int) -> list[Fault]:
    kinds = random.sample(FAULTS, random.randrange(1, 6))
    faults: list[Fault] = []
    kills = 0
    for _ in range(random.choice((0, 2, 4, 8, 12))):
        what = random.choice(kinds)
        at = random.uniform(0.1, TROUBLE_ENDS - 12.0)
        fault: dict[str, Any] = {"slot": random.randrange(processes)}
        if what in ("kill", "kill soon", "kill at", "stop and kill"):
            kills += 1
            if kills > MOST_KILLS:
                continue
        match what:
            case "pause":
                fault["seconds"] = random.uniform(0.5, 12.0)
            case "redis down" | "redis stalls" | "redis lossy":
                fault["seconds"] = random.uniform(0.05, 8.0)
                fault["share"] = random.choice((0.1, 0.4))
            case "stop and kill":
                fault["seconds"] = random.choice((0.01, 0.1, 1.0)) * random.random()
            case "kill soon":
                fault["callbacks"] = random.randrange(60)
            case "kill at" | "reply lost":
                fault["script"] = random.choice(SCRIPTS)
                fault["moment"] = random.choice(("lost", "sent", "done")) if what == "kill at" else "done"
        faults.append(Fault(at, what, **fault))
    if service != "session_notifier":
        faults = [fault for fault in faults if fault.what != "turn deleted"]
    return sorted(faults)


def _fronts(random: Random) -> list[Front]:
    fronts = []
    for _ in range(random.choice((0, 1, 2, 4))):
        begins = random.uniform(0.0, TROUBLE_ENDS - 12.0)
        ends = begins + random.choice((1.0, 4.0, 12.0)) * random.random()
        kind = random.choice(list(FATES))
        fronts.append(Front(kind, begins, ends, random.choice((0.2, 0.7, 1.0))))
    return sorted(fronts, key=lambda front: front.begins)
