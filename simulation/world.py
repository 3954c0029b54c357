"""One seed, played: processes, Redis, ControlPlane, producer, operator, and the hand that breaks things."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from random import Random
from types import CoroutineType
from typing import Any
from unittest import mock

import msgspec
from msgspec.structs import replace

from common import config, logs
from common.dead_letters import LiveGroupMissing, discard, redrive
from common.redis_border import RedisFault
from common.streams import Stream
from simulation.agent import Agent
from simulation.control_plane import ControlPlane
from simulation.judge import Item, Judge, _audio
from simulation.loop import Loop, Process, Spinning, Stuck
from simulation.network import Line, Network, Trap
from simulation.plan import TROUBLE_ENDS, Fault, Plan, Planned, draw
from simulation.redis_server import Server

RESTARTS_AFTER = 1.0
"""Seconds after which a process that died or stopped is started again."""

LOOKS_EVERY = 0.5

_BASE = config.load(
    (), {"DATAPLANE_CONTROL_PLANE__API_KEY": "k", "DATAPLANE_CONTROL_PLANE__BASE_URL": "https://cp.example"}
)


class Verdict(msgspec.Struct, frozen=True):
    """How a seed ended. `digest` is the same whenever the seed is played."""

    seed: int
    offences: list[str]
    drained_at: float
    steps: int
    calls: int
    digest: str
    story: str = ""


def play(seed: int, tracing: bool = False) -> Verdict:
    """Plays one seed from its beginning to its end."""
    return World(draw(seed), tracing).play()


class World:
    """Everything there is in one seed."""

    def __init__(self, plan: Plan, tracing: bool = False) -> None:
        self.plan = plan
        self.loop = Loop(Random(f"loop {plan.seed}"))
        self.server = Server(self.loop.wall)
        streams = _BASE.streams
        names = {
            "usage_forwarder": streams.usage_records,
            "session_notifier": streams.session_lifecycle,
            "quota_refresher": streams.quota_refresh,
        }
        self.stream = Stream(names[plan.service], plan.service)
        self.response_stream = streams.quota_response if plan.service == "quota_refresher" else None
        self.judge = Judge(plan, self.loop, self.server, self.stream)
        self.judge.tracing = tracing
        self.network = Network(
            self.loop, Random(f"network {plan.seed}"), self.server, self.judge, plan.redis_latency
        )
        self.control_plane = self.judge.control_plane = ControlPlane(
            self.loop, Random(f"http {plan.seed}"), self.judge, plan.fronts, plan.http_latency, plan.timeout
        )
        self.control_plane.shared_keys = {entry.key for entry in plan.entries if entry.flaw == "conflict"}
        self.config = replace(
            _BASE,
            control_plane=replace(_BASE.control_plane, timeout=plan.timeout, usage_batch_size=plan.batch),
            shutdown=replace(_BASE.shutdown, drain_seconds=plan.drain_seconds),
        )
        self.operator = Process("operator")
        self._line = Line(self.network, self.operator)
        self._slots: list[Agent | None] = [None] * plan.processes
        self._stopping_since: dict[Agent, float] = {}
        self._started = 0
        self._over = False
        self._random = Random(f"world {plan.seed}")
        self._poisons: dict[str, Item] = {}
        self.drained_at = float("nan")

    def play(self) -> Verdict:
        judge, loop = self.judge, self.loop
        with _quiet(self):
            try:
                loop.run_until_complete(loop.create_task(self._life(), context=loop.world))
            except (Spinning, Stuck) as error:
                judge.offence(f"busy: {error}")
            except _Condemned:
                pass
            finally:
                judge.over = True
                loop.set_exception_handler(lambda loop, context: None)
                loop.dismiss()
        effects = [(key, effect.serial, effect.at) for key, effect in self.control_plane.effects.items()]
        digest = hashlib.sha256(
            repr((loop.steps, loop.time(), effects, judge.offences)).encode()
        ).hexdigest()[:16]
        story = "\n".join((str(self.plan), *judge.trace)) if judge.tracing else ""
        return Verdict(
            self.plan.seed,
            judge.offences,
            self.drained_at,
            loop.steps,
            sum(judge.calls.values()),
            digest,
            story,
        )

    # -- a life --------------------------------------------------------------------------------------------

    async def _life(self) -> None:
        plan, judge, loop = self.plan, self.judge, self.loop
        for entry in plan.entries:
            loop.call_at(entry.at, self._produce, entry)
        for fault in plan.faults:
            loop.call_at(fault.at, self._break, fault)
        for slot in range(plan.processes):
            loop.call_later(0.3 * slot, self._start, slot)
        await self._until(TROUBLE_ENDS)
        self.network.lossy = 0.0
        self.network.traps.clear()
        deadline = TROUBLE_ENDS + plan.patience
        while not judge.drained and loop.time() < deadline:
            await self._until(loop.time() + LOOKS_EVERY)
        if not judge.drained:
            judge.offence(
                f"drain: not within {plan.patience:.0f} s after the last fault: {judge.undrained()}"
            )
            raise _Condemned
        self.drained_at = loop.time()
        await self._until(loop.time() + RESTARTS_AFTER + 3.0)
        await self._idle(5.0)
        await self._stop_all()
        judge.reconcile()

    async def _until(self, when: float) -> None:
        while self.loop.time() < when:
            await asyncio.sleep(min(LOOKS_EVERY, when - self.loop.time()))
            if self.judge.offences:
                raise _Condemned

    async def _idle(self, seconds: float) -> None:
        """With nothing to do, nobody does much."""
        before = self.judge.calls.copy()
        await self._until(self.loop.time() + seconds)
        for name, calls in (self.judge.calls - before).items():
            if calls > self.judge.most_idle_calls * seconds:
                self.judge.offence(f"busy: {name} makes {calls} calls to Redis in {seconds:g} idle seconds")

    async def _stop_all(self) -> None:
        self._over = True
        for agent in self._slots:
            if agent is not None and agent.alive:
                self._stop(agent)
        await self._until(self.loop.time() + self.plan.drain_seconds + 1.0)
        for agent in self._slots:
            if agent is not None and agent.alive:
                self.judge.offence(f"stop: {agent} does not end within {self.plan.drain_seconds} s")

    # -- processes -----------------------------------------------------------------------------------------

    def _start(self, slot: int) -> None:
        if self._over:
            return
        self._started += 1
        name = f"{self.plan.service}-{slot}-{self._started}"
        agent = Agent(
            name,
            slot,
            loop=self.loop,
            plan=self.plan,
            config=self.config,
            stream=self.stream,
            response_stream=self.response_stream,
            network=self.network,
            control_plane=self.control_plane,
            random=Random(f"{name} {self.plan.seed}"),
            fuse=self._fuse,
            failed=self.judge.offence,
            ended=self._ended,
        )
        agent.died = lambda: self._died(agent)
        self._slots[slot] = agent
        self.judge.agents.append(agent)
        self.judge.note("started", process=agent)
        agent.start()

    def _died(self, agent: Agent) -> None:
        self.judge.note("died", process=agent, stopped=agent.stopped)
        if self._slots[agent.slot] is agent:
            self._slots[agent.slot] = None
            self.loop.in_world(RESTARTS_AFTER * (0.2 + self._random.random()), self._start, agent.slot)

    def _stop(self, agent: Agent) -> None:
        if not agent.stopping.is_set():
            self._stopping_since[agent] = self.loop.time()
            agent.stopping.set()

    def _ended(self, agent: Agent) -> None:
        self.judge.ended(agent, self._stopping_since[agent])

    def _fuse(self, agent: Agent, moment: str, entry_id: bytes) -> bool:
        item = self._poisons.get(entry_id.decode())
        if item is None or moment != self.plan.poison or not agent.alive:
            return False
        self.judge.poisoned(agent, item)
        agent.kill()
        return True

    # -- the producer ----------------------------------------------------------------------------------------

    def _produce(self, planned: Planned) -> None:
        data = _written(self.plan, planned)
        fields = ["data", data] if planned.flaw != "empty" else ["nothing", "here"]
        for _ in range(1 + planned.twice):
            entry_id = self.server.execute("XADD", self.stream.name, "*", *fields).decode()
            self.judge.produced(planned, entry_id, data)
            if planned.flaw == "poison":
                self._poisons[entry_id] = self.judge.items[entry_id]
        self.network.added()

    # -- what goes wrong ---------------------------------------------------------------------------------------

    def _break(self, fault: Fault) -> None:
        self.judge.note("FAULT", told=fault)
        agent = self._slots[fault.slot]
        network = self.network
        match fault.what:
            case "kill" if agent is not None:
                agent.kill()
            case "kill soon" if agent is not None:
                agent.dies_after = fault.callbacks
            case "kill at" | "reply lost":
                network.traps.append(Trap(fault.script, fault.moment, None, fault.what == "kill at"))  # type: ignore[arg-type]
            case "pause" if agent is not None:
                self._pause(agent, fault.seconds)
            case "stop" if agent is not None:
                self._stop(agent)
            case "stop and kill" if agent is not None:
                self._stop(agent)
                self.loop.in_world(fault.seconds, agent.kill)
            case "redis down":
                network.go_down()
                self.loop.in_world(fault.seconds, network.come_back)
                if self._random.random() < 0.5:
                    self.server.forget_scripts()
            case "redis stalls":
                network.stall(fault.seconds)
            case "redis lossy":
                network.lossy = fault.share
                self.loop.in_world(fault.seconds, setattr, network, "lossy", 0.0)
            case "connections cut":
                network.cut_all()
            case "scripts forgotten":
                self.server.forget_scripts()
            case "group destroyed" | "twin destroyed":
                group = self.stream.group if fault.what == "group destroyed" else self.stream.dead_group
                if (stream := self.server.stream(self.stream.name)) is not None:
                    if fault.what == "group destroyed":  # nobody will ever notice what vanished while pending
                        live, _ = self.judge._pending()
                        self.judge.disturbed_at = self.loop.time()
                        self.judge.unread_deleted += sum(key not in stream for key in live)
                    self.server.execute("XGROUP", "DESTROY", self.stream.name, group)
            case "stream deleted":
                self.judge.most_lost += len(self._ids()) + self.judge.unread_deleted
                self.judge.excuse(self._ids(), fault.what)
                self.judge.books_lost = True
                self.server.execute("DEL", self.stream.name)
            case "flushed":
                self.judge.most_lost += len(self.judge.items)  # as many as there were at the last look
                self.judge.excuse(list(self.judge.items), fault.what)  # the grants are gone as well
                self.judge.books_lost = True
                self.judge.disturbed_at = self.loop.time()
                self.server.execute("FLUSHALL")
            case "trimmed" | "pending deleted" | "dead deleted":
                self._delete(fault)
            case "redrive" | "discard":
                self._operate(fault)
            case "turn deleted":
                self.judge.disturbed_at = self.loop.time()
                self.server.execute("DEL", self.stream.turn_key)

    def _pause(self, agent: Agent, seconds: float) -> None:
        agent.paused = True
        agent.paused_at = self.loop.time() + seconds
        self.loop.in_world(seconds, self._resume, agent)

    def _resume(self, agent: Agent) -> None:
        self.judge.note("resumed", process=agent)
        self.loop.resume(agent)

    def _ids(self) -> list[str]:
        rows = self.server.execute("XRANGE", self.stream.name, "-", "+")
        return [entry_id.decode() for entry_id, _ in rows]

    def _delete(self, fault: Fault) -> None:
        live, twin = self.judge._pending()
        ids = {
            "trimmed": self._ids()[: 1 + fault.slot * 3],
            "pending deleted": [f"{key.ts}-{key.seq}" for key in live][: 1 + fault.slot],
            "dead deleted": [f"{key.ts}-{key.seq}" for key in twin][:1],
        }[fault.what]
        if ids:
            self.judge.note("deleted", ids=ids)
            self.judge.excuse(ids, fault.what)
            self.server.execute("XDEL", self.stream.name, *ids)

    def _operate(self, fault: Fault) -> None:
        _, twin = self.judge._pending()
        ids = [f"{key.ts}-{key.seq}" for key in twin]
        ids = [entry_id for entry_id in ids if entry_id not in self._poisons][: 1 + fault.slot]
        if ids:
            self.loop.spawn(self.operator, self._redrive_or_discard(fault.what, ids), fault.what)

    async def _redrive_or_discard(self, what: str, ids: list[str]) -> None:
        for entry_id in ids:
            item = self.judge.items[entry_id]
            item.redriven = True
            if what == "discard":
                item.exempt = item.exempt or what
        try:
            await (redrive if what == "redrive" else discard)(self._line, self.stream, ids)
        except (LiveGroupMissing, RedisFault) as error:
            self.judge.note("operator", error=error)


def _written(plan: Plan, planned: Planned) -> bytes:
    """What the producer writes; the serial is the customer, so that every effect can be told from every other."""
    if planned.flaw == "garbled":
        return b'{"customer_id": "' + planned.serial.encode() + b'", "api_session_id": '
    document: dict[str, Any] = {"api_session_id": planned.session, "customer_id": planned.serial}
    if planned.key:
        document["transaction_id"] = planned.key
    moment = "2026-01-01T00:00:00Z"
    match plan.service:
        case "usage_forwarder":
            document |= {
                "connection_duration_seconds": 1,
                "data_bytes_processed": 1,
                "audio_duration_seconds": _audio(planned) / 1000,
                "request_timestamp": moment,
                "response_timestamp": moment,
            }
        case "session_notifier":
            event = ("start", "complete", "session_started", "session_completed")[planned.place % 4]
            document |= {"event_type": event, "timestamp": moment}
        case "quota_refresher":
            document |= {"timestamp": moment}
    return msgspec.json.encode(document)


class _Condemned(Exception):
    """An offence is known: the rest does not matter."""


class _Told:
    """A logger whose lines go into the trace; an exception that the core swallows is an offence."""

    def __init__(self, world: World, name: str) -> None:
        self._judge = world.judge
        self._name = name

    def _say(self, event: str, **facts: object) -> None:
        self._judge.note(f"log {self._name} {event}", **facts)

    debug = info = warning = error = critical = _say

    def log(self, level: int, event: str, **facts: object) -> None:
        self._say(event, **facts)

    def exception(self, event: str, **facts: object) -> None:
        self._judge.offence(f"exception: {event}: {sys.exc_info()[1]!r} {facts}")


LOGGERS = (
    "consumer",
    "settlement",
    "delivery",
    "reclaimer",
    "turn",
    "sentinel",
    "redis",
    "control_plane",
    "service",
    "audit",
)


@contextmanager
def _quiet(world: World) -> Iterator[None]:
    """The process' own clock, log and garbage are put aside while a seed is played."""
    kept = dict(logs._loggers)
    logs._loggers.update({name: _Told(world, name) for name in LOGGERS})  # type: ignore[misc]
    world.loop.set_exception_handler(
        lambda loop, context: world.judge.offence(
            f"unhandled: {context['message']}: {context.get('exception')!r}"
        )
    )
    gc.disable()
    try:
        with mock.patch.object(time, "time", world.loop.wall):
            yield
    finally:
        for process in (*world.judge.agents, world.operator):
            _sweep_up(process.tasks)
        _sweep_up(world.loop.world_tasks)
        logs._loggers.clear()
        logs._loggers.update(kept)
        gc.enable()


def _sweep_up(tasks: list[asyncio.Task[Any]]) -> None:
    """Closes what the dead have left hanging, here and now, where what it says is heard by nobody."""
    for task in tasks:
        coroutine = task.get_coro()
        for _ in range(10):  # a clean-up that awaits does not end at the first close
            if not isinstance(coroutine, CoroutineType) or coroutine.cr_frame is None:
                break
            with suppress(Exception):
                coroutine.close()
    tasks.clear()
