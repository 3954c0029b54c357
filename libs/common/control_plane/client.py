"""The ten calls of the ControlPlane's API (contract section 3).

    for an entry    usage_record, usage_batch, start, complete, refresh
                    bodies are bytes; every end is an outcome, nothing the network or the server does raises
    periodic        register, heartbeat, commands, command_result, public_keys, shutdown
                    bodies are bytes or what msgspec can encode; one try; a JSON object or an error

An entry's call is repeated quickly, at most twice and under the same key, when its failure is transient.
It stops as soon as the gate closes, the process stops, or the ControlPlane asks for a longer wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from functools import lru_cache
from random import Random
from typing import Any, Protocol
from uuid import UUID

import msgspec

from common.config import ControlPlane
from common.control_plane import errors
from common.control_plane.backoff import quick_delay
from common.control_plane.breaker import LONGEST_PAUSE
from common.control_plane.gate import Cause as FailureCause
from common.control_plane.gate import Gate, Logger, Observer, Ticket, Unobserved
from common.control_plane.transport import Headers, Transport
from common.control_plane.verdicts import Answer, Judge, Mask, Split, hold_kind
from common.outcomes import Cause, Dead, Delivered, Outcome, Reason, Retry
from common.schemas import fits_in_path

MOST_QUICK_RETRIES = 2
MOST_COMMANDS = 100
"""Of one poll; what is beyond comes with the next, once these have been answered."""

_BREAKER_OPEN = Retry(Cause.HELD, "not sent: the breaker is open")
_QUICK = (Cause.TRANSIENT, Cause.UNCONFIRMED)
_JSON = ("Content-Type", "application/json")


class Carrier(Protocol):
    """What the client needs of a transport."""

    @property
    def in_flight(self) -> int: ...
    async def send(
        self,
        method: str,
        path: str,
        headers: Headers,
        body: bytes | None = None,
        timeout: float | None = None,
    ) -> Answer: ...
    def renew(self) -> None: ...
    async def close(self, timeout: float) -> int: ...


class Call(Protocol):
    """What a call for an entry carries beside its body: an entry is one, and the same at every repetition."""

    @property
    def transaction_id(self) -> str:
        """The Idempotency-Key."""

    @property
    def correlation_id(self) -> str: ...
    @property
    def traceparent(self) -> str | None: ...
    @property
    def refused_before(self) -> bool:
        """It was answered with 403, and a probe has passed since."""


class BatchCall(msgspec.Struct, frozen=True, gc=False):
    """The call for several entries, which have one key together."""

    transaction_id: str
    correlation_id: str
    traceparent: str | None = None
    refused_before: bool = False


Delivering = Coroutine[Any, Any, Outcome]
_Judgement = Callable[[Judge, Answer], Outcome | Split]


class _Endpoint(msgspec.Struct, frozen=True):
    """One of the calls for an entry: its name in metrics, the end of its path, who reads its answers."""

    name: str
    verb: str
    judge: _Judgement


_USAGE_RECORD = _Endpoint("usage_records", "usage-records", Judge.delivery)
_USAGE_BATCH = _Endpoint("usage_records", "usage-records", Judge.batch)
_START = _Endpoint("start", "start", Judge.delivery)
_COMPLETE = _Endpoint("complete", "complete", Judge.delivery)
_REFRESH = _Endpoint("refresh", "refresh", Judge.refresh)


@lru_cache(1024)
def _path(session_id: str, verb: str) -> str:
    """The path of a session's call; remembered, since a session comes with many records. Raises ValueError."""
    if not fits_in_path(session_id):
        raise ValueError("api_session_id cannot stand in a path")
    return f"/api/v1/sessions/{session_id}/{verb}"


def _headers(call: Call) -> Headers:
    headers = (_JSON, ("Idempotency-Key", call.transaction_id), ("X-Correlation-ID", call.correlation_id))
    return headers if call.traceparent is None else (*headers, ("traceparent", call.traceparent))


def build(
    config: ControlPlane,
    server_id: str,
    version: str,
    *,
    clock: Callable[[], float],
    random: Random,
    logger: Logger,
    observer: Observer | None = None,
) -> ControlPlaneClient:
    """The client as a service uses it: over the network, with a gate of its own."""
    gate = Gate(
        clock=clock,
        random=random,
        logger=logger,
        observer=observer,
        longest_pause=min(LONGEST_PAUSE, config.max_backoff),
    )
    transport = Transport(config, f"dataplane-agent/{version}")
    return ControlPlaneClient(
        config, server_id, transport=transport, gate=gate, random=random, observer=observer
    )


class ControlPlaneClient:
    """Speaks for one server with its ControlPlane; all calls of a process share it, and its gate."""

    def __init__(
        self,
        config: ControlPlane,
        server_id: str,
        *,
        transport: Carrier,
        gate: Gate,
        random: Random,
        observer: Observer | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        if not fits_in_path(server_id):
            raise ValueError(f"server id {server_id!r} cannot stand in a path")
        self.gate = gate
        """How many requests for entries may be in flight, from what became of those before."""
        self.transport = transport
        self.requests_total = 0
        self.last_success: float | None = None
        """Time of day of the last call that succeeded."""
        self.last_error: str | None = None
        self._config = config
        self._server = f"/api/v1/servers/{server_id}"
        self._random = random
        self._observer: Observer = observer or Unobserved()
        self._wall = wall
        self._quick_retries = min(config.retry_attempts, MOST_QUICK_RETRIES)
        self._secret = config.api_key.reveal()
        self._judge = Judge(Mask(self._secret), wall)

    @property
    def connected(self) -> bool:
        return self.gate.connected

    @property
    def in_flight(self) -> int:
        return self.transport.in_flight

    def stop(self) -> None:
        """No more quick retries and no more probes; what is in flight goes on."""
        self.gate.stop()

    async def close(self, timeout: float) -> int:
        """Waits for what is in flight, at most `timeout` seconds; returns how many requests it gave up."""
        self.stop()
        return await self.transport.close(timeout)

    # Calls for an entry.

    # No coroutines of their own: each one between a slot and the transport is paid for at every request.

    def usage_record(self, session_id: str, body: bytes, call: Call) -> Delivering:
        return self._send(_USAGE_RECORD, session_id, body, call)

    def usage_batch(self, session_id: str, body: bytes, call: Call) -> Coroutine[Any, Any, Outcome | Split]:
        """Several records of one session; a Split says that they must be sent in parts."""
        return self._send(_USAGE_BATCH, session_id, body, call)

    def start(self, session_id: str, body: bytes, call: Call) -> Delivering:
        return self._send(_START, session_id, body, call)

    def complete(self, session_id: str, body: bytes, call: Call) -> Delivering:
        return self._send(_COMPLETE, session_id, body, call)

    def refresh(self, session_id: str, body: bytes, call: Call) -> Delivering:
        """A Delivered carries the grant in `answer`."""
        return self._send(_REFRESH, session_id, body, call)

    async def _send(self, endpoint: _Endpoint, session_id: str, body: bytes, call: Call) -> Any:
        """The first try and its quick retries; returns what the judge does, a Split only for a batch."""
        try:
            path = _path(session_id, endpoint.verb)
        except ValueError as error:
            return Dead(Reason.INVALID, str(error))
        headers = _headers(call)
        failure: FailureCause = "connection"
        retry = 0
        tried: Retry | None = None
        while (ticket := self.gate.enter()) is not None:
            if tried is not None:
                self._observer.retry(endpoint.name, failure)
            self.requests_total += 1
            try:
                answer = await self.transport.send("POST", path, headers, body)
            except errors.TransportError as error:
                failure = "timeout" if isinstance(error, errors.TimedOut) else "connection"
                outcome = self._learn_silence(ticket, endpoint, failure, error)
            except BaseException:
                self.gate.abandoned(ticket)
                raise
            else:
                outcome = self._learn(ticket, endpoint, answer)
                if isinstance(outcome, Delivered):
                    return outcome
                outcome = self._learn_no(ticket, session_id, call, outcome)
            if not isinstance(outcome, Retry) or outcome.cause not in _QUICK:
                return outcome
            if outcome.http_status is not None:
                failure = _failure_of(outcome)
            tried = outcome
            asked = outcome.after or 0.0
            if retry == self._quick_retries or asked > self._config.max_backoff:
                return tried  # parked: tried again on its own schedule
            retry += 1
            delay = quick_delay(retry, self._random, self._config.max_backoff)
            if not await self.gate.pause(max(delay, asked)):
                return tried  # the gate closed, or the process stops: parked
        return tried or self._not_sent()

    def _learn(self, ticket: Ticket, endpoint: _Endpoint, answer: Answer) -> Outcome | Split:
        """What an answer means; of a success the gate learns."""
        self._observer.request(endpoint.name, _LABELS.get(answer.status, _OTHER), answer.seconds)
        outcome = endpoint.judge(self._judge, answer)
        if isinstance(outcome, Delivered):
            self.gate.delivered(ticket)
            self.last_success = self._wall()
        return outcome

    def _learn_no(
        self, ticket: Ticket, session_id: str, call: Call, outcome: Outcome | Split
    ) -> Outcome | Split:
        """Tells the gate of an answer that is no success; what it knows of others may change the outcome."""
        if isinstance(outcome, Retry | Dead):
            self.last_error = outcome.error
        match outcome:
            case Retry(cause=Cause.TRANSIENT | Cause.UNCONFIRMED):
                self.gate.failed(ticket, _failure_of(outcome), outcome.error)
            case Retry(cause=Cause.NOT_FOUND):
                return self._not_found(ticket, session_id, outcome)
            case Retry(cause=Cause.HELD, http_status=403) if call.refused_before:
                # A probe has passed since: the key is good, it is this entry that is not wanted.
                return self._not_found(ticket, session_id, outcome)
            case Retry(cause=Cause.HELD):
                self.gate.refused(ticket, hold_kind(outcome), outcome.error)
            case _:
                self.gate.decided(ticket)
        return outcome

    def _learn_silence(
        self, ticket: Ticket, endpoint: _Endpoint, failure: FailureCause, error: errors.TransportError
    ) -> Outcome | Split:
        """What it means that there is no answer; the gate learns of it."""
        self._observer.request(endpoint.name, "error", error.seconds)
        self.last_error = text = str(error)
        match error:
            case errors.TlsFailed():
                self.transport.renew()  # the next client reads CA file and certificate again
                self.gate.unsent(ticket, "auth", text)
            case errors.CannotSend():
                self.gate.unsent(ticket, "configuration", text)
            case errors.NotARequest():
                self.gate.abandoned(ticket)
            case _:
                self.gate.failed(ticket, failure, text)
        return self._judge.no_answer(error)

    def _not_found(self, ticket: Ticket, session_id: str, outcome: Retry) -> Retry:
        status = outcome.http_status or 404
        held = self.gate.not_found(ticket, session_id, status)
        cause = Cause.HELD if held else Cause.NOT_FOUND
        return Retry(cause, outcome.error, status, response_excerpt=outcome.response_excerpt)

    def _not_sent(self) -> Retry:
        hold = self.gate.hold
        return (
            _BREAKER_OPEN if hold is None else Retry(Cause.HELD, f"not sent: {hold.kind} hold, {hold.detail}")
        )

    # Periodic calls. A hold is none of theirs; the breaker is, and each may be its probe.

    async def register(self, body: Any) -> dict[str, Any]:
        return await self._call("register", "POST", "/api/v1/servers/register", body)

    async def heartbeat(self, body: Any) -> dict[str, Any]:
        return await self._call("heartbeat", "PUT", f"{self._server}/heartbeat", body)

    async def commands(self) -> list[dict[str, Any]]:
        """The commands that wait for this server, at most MOST_COMMANDS, each a JSON object."""
        reply = await self._call("commands", "GET", f"{self._server}/commands")
        commands = reply.get("commands", [])
        if not isinstance(commands, list):
            raise errors.Unconfirmed("`commands` is no list")
        return [command for command in commands[:MOST_COMMANDS] if isinstance(command, dict)]

    async def command_result(self, body: Any, correlation_id: str | None = None) -> dict[str, Any]:
        return await self._call(
            "command_results", "POST", f"{self._server}/command-results", body, correlation_id
        )

    async def public_keys(self) -> dict[str, Any]:
        """The JWKS: `{"keys": […]}`."""
        reply = await self._call("public_keys", "GET", f"{self._server}/public-keys")
        if not isinstance(reply.get("keys"), list):
            raise errors.Unconfirmed("no list `keys`")
        return reply

    async def shutdown(self, body: Any) -> dict[str, Any]:
        return await self._call("shutdown", "POST", f"{self._server}/shutdown", body)

    async def _call(
        self, endpoint: str, method: str, path: str, body: Any = None, correlation_id: str | None = None
    ) -> dict[str, Any]:
        ticket = self.gate.enter(despite_hold=True)
        if ticket is None:
            raise errors.BreakerOpen(_BREAKER_OPEN.error, retry_after=self.gate.breaker.remaining)
        try:
            reply = await self._ask(endpoint, method, path, body, correlation_id)
        except errors.ControlPlaneError as error:
            self.last_error = str(error)
            self._learn_error(ticket, error)
            raise
        except BaseException:
            self.gate.abandoned(ticket)
            raise
        self.gate.decided(ticket)
        self.last_success = self._wall()
        return reply

    def _learn_error(self, ticket: Ticket, error: errors.ControlPlaneError) -> None:
        """What a periodic call's error means to the breaker; it holds nobody else up."""
        match error:
            case errors.TimedOut():
                self.gate.failed(ticket, "timeout", str(error))
            case errors.ConnectFailed() | errors.BrokenAnswer():
                self.gate.failed(ticket, "connection", str(error))
            case errors.Transient():
                self.gate.failed(ticket, "status", str(error))
            case errors.Unconfirmed():
                self.gate.failed(ticket, "unconfirmed", str(error))
            case errors.TlsFailed():
                self.gate.abandoned(ticket)
                self.transport.renew()
            case errors.CannotSend() | errors.NotARequest():
                self.gate.abandoned(ticket)
            case errors.AuthRefused() | errors.ConfigurationFault():
                self.gate.turned_away(ticket)
            case _:
                self.gate.decided(ticket)
        if isinstance(error, errors.AuthRefused):
            self.reload_key()

    async def _ask(
        self, endpoint: str, method: str, path: str, body: Any = None, correlation_id: str | None = None
    ) -> dict[str, Any]:
        headers = [("X-Correlation-ID", correlation_id or self._correlation_id())]
        content: bytes | None = None
        if body is not None:
            headers.append(_JSON)
            content = body if isinstance(body, bytes) else msgspec.json.encode(body)
        self.requests_total += 1
        try:
            answer = await self.transport.send(method, path, headers, content)
        except errors.TransportError as error:
            self._observer.request(endpoint, "error", error.seconds)
            raise
        self._observer.request(endpoint, _LABELS.get(answer.status, _OTHER), answer.seconds)
        return self._judge.reply(answer)

    # The probe of a hold.

    async def run_probe(self) -> None:
        """While a hold is on, probes until one passes and lifts it. Ends when the client is stopped."""
        while await self.gate.wait_for_hold() is not None:
            if await self.gate.pause_on_hold() and await self.probe():
                self.gate.lift()

    async def probe(self) -> bool:
        """Does the ControlPlane accept us, with the key as its file has it now? No news for the breaker."""
        self.reload_key()
        try:
            await self._ask("public_keys", "GET", f"{self._server}/public-keys")
        except errors.ControlPlaneError as error:
            self.last_error = str(error)
            if isinstance(error, errors.TlsFailed):
                self.transport.renew()
            return False
        self.gate.answered()
        return True

    def reload_key(self) -> None:
        """Reads the API key's file again; from the next request on a new one is used."""
        if self._config.api_key.reload():
            old, self._secret = self._secret, self._config.api_key.reveal()
            # An answer to a request under way may still echo the old one.
            self._judge = Judge(Mask(self._secret, old), self._wall)
            self.transport.renew()

    def _correlation_id(self) -> str:
        return str(UUID(int=self._random.getrandbits(128), version=4))


_LABELS = {status: str(status) for status in range(100, 600)}
_OTHER = "other"
"""The status as a metric's label: what is no status of HTTP is one and the same."""


def _failure_of(answered: Retry) -> FailureCause:
    """What went wrong with an answer that is to be asked for again."""
    return "unconfirmed" if answered.cause is Cause.UNCONFIRMED else "status"
