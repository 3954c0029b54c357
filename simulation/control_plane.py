"""A ControlPlane with a book: it records every effect once per key, answers by the weather, and notices offences.

What it records is final, whether or not its answer arrives: that is what the judge compares with what was produced.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from random import Random
from typing import Any, NamedTuple, Protocol

import msgspec

from common.control_plane import errors
from common.control_plane.transport import Headers
from common.control_plane.verdicts import Answer
from simulation.loop import Loop, Process

SERVER_FIELDS = (
    "server_instance_id",
    "api_server_region",
    "agent_version",
    "processing_timestamp",
    "timestamp",
)
"""May differ between repetitions (contract section 3)."""

FATES: dict[str, tuple[str, ...]] = {
    "silent": ("hang", "hang", "record, hang", "late"),
    "broken": ("refuse", "drop", "record, drop"),
    "failing": ("500", "502", "503", "504", "record, 500", "408", "425"),
    "throttling": ("429", "429 for 3 s", "503 for 8 s"),
    "lying": ("html", "record, html", "unsuccessful", "half", "record, half"),
    "refusing": ("403", "401"),
    "misconfigured": ("301", "501"),
    "amnesiac": ("404",),
    "slow": ("slow",),
}
"""Kinds of weather, and what may become of a request in each."""


class Front(NamedTuple):
    """Weather of one kind, from `begins` to `ends`, over a share of the requests."""

    kind: str
    begins: float
    ends: float
    share: float


class Effect(NamedTuple):
    """What was recorded under a key."""

    serial: str
    content: bytes
    at: float
    grant: int | None


class Sessions(Protocol):
    """What is known of sessions and entries besides the requests themselves."""

    def knows(self, session: str) -> bool: ...
    def accepts(self, serial: str) -> str: ...
    def recorded(self, key: str, effect: Effect) -> None: ...
    def offence(self, text: str) -> None: ...
    def requested(self, process: Process, serials: list[str], session: str) -> None: ...
    def note(self, what: str, **facts: object) -> None: ...


class ControlPlane:
    """One ControlPlane for all processes."""

    def __init__(
        self,
        loop: Loop,
        random: Random,
        sessions: Sessions,
        fronts: list[Front],
        latency: float,
        timeout: float,
    ) -> None:
        self.effects: dict[str, Effect] = {}
        self.sends: Counter[str] = Counter()  # requests per serial, those that were held not counted
        self.out: Counter[Process] = Counter()  # requests under way
        self.shared_keys: set[str] = set()  # two contents under one key are what the producer did
        self._by_serial: dict[str, str] = {}
        self._loop = loop
        self._random = random
        self._sessions = sessions
        self._fronts = fronts
        self._latency = latency
        self._timeout = timeout

    # -- a request's way -----------------------------------------------------------------------------

    def send(
        self,
        process: Process,
        method: str,
        path: str,
        headers: Headers,
        body: bytes | None,
        answered: asyncio.Future[Answer],
    ) -> None:
        """Takes a request on its way; it ends in `answered`."""
        if not process.alive:
            return
        self.out[process] += 1
        request = _Request(process, method, path, headers, body, answered, self._loop.time())
        self._sessions.requested(process, [serial for serial, _, _ in request.records], request.session)
        self._loop.in_world(self._delay(), self._arrive, request)

    def _arrive(self, request: _Request) -> None:
        fate = self._fate()
        recording, _, plain = fate.rpartition(", ")
        counts = plain not in ("401", "301", "501")
        for serial, _, _ in request.records:
            self.sends[serial] += counts
        left = request.sent_at + self._timeout - self._loop.time()
        match plain:
            case "refuse":
                self._fail(request, errors.ConnectFailed("cannot connect: refused"), 0.0)
            case "hang":
                if recording:
                    self._decide(request)
                self._fail(request, errors.TimedOut("no answer in time"), left)
            case "late":
                self._fail(request, errors.TimedOut("no answer in time"), left)
                self._loop.in_world(left + self._timeout * self._random.random(), self._decide, request)
            case "drop":
                if recording:
                    self._decide(request)
                self._fail(request, errors.BrokenAnswer("the answer broke off"), self._delay())
            case "ok" | "slow":
                delay = self._delay() if plain == "ok" else self._timeout * 1.3 * self._random.random()
                answer = self._decide(request)
                if delay < left:
                    self._loop.in_world(delay, self._answer, request, answer)
                else:
                    self._fail(request, errors.TimedOut("no answer in time"), left)
            case _:
                if recording:
                    self._decide(request)
                self._loop.in_world(self._delay(), self._answer, request, _answers(plain))
        if fate != "ok":
            self._sessions.note("fate", fate=fate, path=request.path, process=request.process)

    def _fate(self) -> str:
        now = self._loop.time()
        for front in self._fronts:
            if front.begins <= now < front.ends and self._random.random() < front.share:
                return self._random.choice(FATES[front.kind])
        return "ok"

    def _answer(self, request: _Request, answer: Answer) -> None:
        self._end(request)
        if not request.answered.done():
            request.answered.set_result(answer)

    def _fail(self, request: _Request, error: errors.TransportError, after: float) -> None:
        self._loop.in_world(max(0.0, after), self._fail_now, request, error)

    def _fail_now(self, request: _Request, error: errors.TransportError) -> None:
        self._end(request)
        if not request.answered.done():
            request.answered.set_exception(error)

    def _end(self, request: _Request) -> None:
        self.out[request.process] -= 1

    def _delay(self) -> float:
        drawn = self._random.random()
        return self._latency * (0.2 + drawn) * (8 if drawn > 0.95 else 1)

    # -- the verdict and the book --------------------------------------------------------------------

    def _decide(self, request: _Request) -> Answer:
        """Judges the content as a ControlPlane in good health does, and records it."""
        if not request.records:
            return Answer(200, b'{"keys": []}')
        if not self._sessions.knows(request.session):
            return Answer(404, b'{"error": "no such session"}')
        verdicts = {self._sessions.accepts(serial) for serial, _, _ in request.records} - {"yes"}
        if verdicts:
            return Answer(int(min(verdicts)), b'{"error": "refused"}')
        many = len(request.records) > 1
        if many and request.key in [key for _, key, _ in request.records]:
            self._sessions.offence(f"a batch goes under the key of one of its records: {request.key}")
        known = [(serial, key, content) for serial, key, content in request.records if key in self.effects]
        conflict = any(self.effects[key].content != content for _, key, content in known)
        if many and known and (conflict or self._random.random() < 0.5):
            return Answer(409, b'{"error": "some of these are recorded already"}')
        for serial, key, content in request.records:
            self._record(serial, key, content, request.grants)
        if conflict:
            return Answer(409, b'{"error": "conflict"}')
        if request.grants:
            return self._grant(request, repeated=bool(known))
        if known and self._random.random() < 0.5:
            return Answer(409, b'{"error": "recorded already"}')
        return self._random.choice(_CONFIRMATIONS)

    def _record(self, serial: str, key: str, content: bytes, grants: bool) -> None:
        before = self.effects.get(key)
        if before is not None:
            if before.content != content and key not in self.shared_keys:
                self._sessions.offence(f"{serial} comes again under its key {key} with another content")
            return
        if (other := self._by_serial.setdefault(serial, key)) != key:
            self._sessions.offence(f"{serial} takes effect twice: under {other} and under {key}")
        grant = self._random.randrange(1, 1000) if grants else None
        effect = self.effects[key] = Effect(serial, content, self._loop.time(), grant)
        self._sessions.recorded(key, effect)

    def _grant(self, request: _Request, repeated: bool) -> Answer:
        amount = self.effects[request.records[0][1]].grant or 0
        body = b'{"new_quota_amount": %d, "final_quota": false}' % amount
        if self._random.random() < 0.5:
            body = b'{"success": true, "data": ' + body + b"}"
        return Answer(409 if repeated and self._random.random() < 0.5 else 200, body)


_CONFIRMATIONS = (
    Answer(200, b"{}"),
    Answer(201, b'{"success": true, "data": {"id": 7}, "timestamp": "2026-01-01T00:00:00Z"}'),
    Answer(204),
)


def _answers(fate: str) -> Answer:
    match fate:
        case "429 for 3 s":
            return Answer(429, b"{}", retry_after="3")
        case "503 for 8 s":
            return Answer(503, b"{}", retry_after="8")
        case "html":
            return Answer(200, b"<html>It works!</html>")
        case "unsuccessful":
            return Answer(200, b'{"success": false}')
        case "half":
            return Answer(200, b'{"success": tr')
        case "301":
            return Answer(301, b"", location="https://elsewhere.example/")
        case status:
            return Answer(int(status), b'{"error": "as it happens"}')


class _Request:
    """A request, read."""

    def __init__(
        self,
        process: Process,
        method: str,
        path: str,
        headers: Headers,
        body: bytes | None,
        answered: asyncio.Future[Answer],
        sent_at: float,
    ) -> None:
        self.process = process
        self.path = path
        self.answered = answered
        self.sent_at = sent_at
        self.key = dict(headers).get("Idempotency-Key", "")
        self.session, self.grants = "", False
        self.records: list[tuple[str, str, bytes]] = []  # serial, key, content
        if method == "POST":
            _, _, _, _, self.session, verb = path.split("/")
            self.grants = verb == "refresh"
            document: dict[str, Any] = msgspec.json.decode(body or b"{}")
            records = document.get("usage_records")
            self.records = [_read(record) for record in ([document] if records is None else records)]
            if records is None and self.records[0][1] != self.key:
                self.records[0] = (self.records[0][0], self.key, self.records[0][2])


def _read(record: dict[str, Any]) -> tuple[str, str, bytes]:
    content = {name: value for name, value in record.items() if name not in SERVER_FIELDS}
    return record["customer_id"], record["transaction_id"], msgspec.json.encode(content, order="sorted")


class Carrier:
    """What a client of one process sends through: like the real transport, a request outlives its caller."""

    def __init__(self, control_plane: ControlPlane, process: Process) -> None:
        self._control_plane = control_plane
        self._process = process
        self._running: dict[asyncio.Future[Answer], None] = {}
        self._closed = False

    @property
    def in_flight(self) -> int:
        return len(self._running)

    async def send(
        self,
        method: str,
        path: str,
        headers: Headers,
        body: bytes | None = None,
        timeout: float | None = None,
    ) -> Answer:
        if self._closed:
            raise errors.ConnectFailed("the transport is closed")
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._running[answered] = None
        answered.add_done_callback(self._ended)
        self._control_plane.send(self._process, method, path, headers, body, answered)
        return await asyncio.shield(answered)

    def _ended(self, answered: asyncio.Future[Answer]) -> None:
        self._running.pop(answered, None)
        if not answered.cancelled():
            answered.exception()  # its caller may have gone

    def renew(self) -> None:
        """Nothing to read anew."""

    async def close(self, timeout: float) -> int:
        if self._running:
            await asyncio.wait(list(self._running), timeout=timeout)
        self._closed = True
        abandoned = len(self._running)
        for answered in list(self._running):
            if not answered.done():
                answered.set_exception(errors.BrokenAnswer("given up on stop, before the answer came"))
        self._running.clear()
        return abandoned
