"""The ten calls of contract section 3: how a request is read, and what the ControlPlane makes of it."""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec
from aiohttp import web

from sandbox import wire
from sandbox.keys import LIFETIME_SECONDS
from sandbox.ledger import Grant, Ledger, RecordKind, Verdict, canonical

if TYPE_CHECKING:
    from sandbox.control_plane import ControlPlane

COMMAND_KEPT_SECONDS = 2 * LIFETIME_SECONDS

_ID = re.compile(wire.ID_PATTERN)


class Refusal(Exception):
    """An answer that records nothing."""

    def __init__(self, status: int, error: str, detail: str | None = None) -> None:
        super().__init__(error)
        self.status = status
        self.error = error
        self.detail = detail


class Call(msgspec.Struct):
    """One request, read. `records` are the bodies in it that carry a transaction id of their own."""

    request: web.Request
    endpoint: str
    session_id: str | None
    server_id: str | None
    key: str | None
    body: bytes
    document: Any
    records: list[dict[str, Any]]
    contents: list[str]
    batched: bool
    verdicts: list[str]

    def rows(self) -> list[dict[str, Any]]:
        """What the ledger notes of it: a row per record, one for a call that has none."""
        common = {
            "session_id": self.session_id,
            "server_id": self.server_id,
            "idempotency_key": self.key,
            "correlation_id": self.request.headers.get("X-Correlation-ID"),
            "traceparent": self.request.headers.get("traceparent"),
            "batched": self.batched,
        }
        printable = {name: _printable(value) for name, value in common.items()}
        if not self.records:
            return [printable]
        return [
            {**printable, "transaction_id": _printable(record.get("transaction_id")), "content": content}
            for record, content in zip(self.records, self.contents, strict=True)
        ]

    def judged(self, verdict: Verdict) -> None:
        """The same verdict for all of it."""
        self.verdicts = [verdict] * len(self.verdicts)


Answer = tuple[int, dict[str, Any]]


async def read(endpoint: str, request: web.Request) -> Call:
    """The request as a Call; whatever its body is, this does not fail."""
    body = await request.read()
    try:
        document = msgspec.json.decode(body) if body else None
    except (msgspec.DecodeError, RecursionError):
        document = None
    session_id = request.match_info.get("session_id")
    records: list[dict[str, Any]] = []
    batched = False
    if session_id is not None and isinstance(document, dict):
        listed = document.get("usage_records") if endpoint == "usage_records" else None
        batched = isinstance(listed, list)
        records = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else [document]
    scope = f"{endpoint} {session_id} "
    return Call(
        request=request,
        endpoint=endpoint,
        session_id=session_id,
        server_id=request.match_info.get("server_id"),
        key=request.headers.get("Idempotency-Key"),
        body=body,
        document=document,
        records=records,
        contents=[canonical(record, scope=scope) for record in records],
        batched=batched,
        verdicts=[Verdict.FAULT] * max(1, len(records)),
    )


def _printable(value: Any) -> Any:
    """Text that SQLite can hold: header bytes that are no UTF-8 come escaped; other shapes are no ids."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    return value if isinstance(value, bool) else None


class Judge:
    """Decides about one call: returns the status and the data of its answer, or raises Refusal."""

    def __init__(self, control_plane: ControlPlane) -> None:
        self._cp = control_plane

    @property
    def _ledger(self) -> Ledger:
        return self._cp.ledger

    def judge(self, call: Call) -> Answer:
        """The answer, with its verdicts noted in the call."""
        self._admit(call)
        return CALLS[call.endpoint].judge(self, call)

    def _admit(self, call: Call) -> None:
        """Key, ids, shape of the request: what is asked of every call."""
        given = call.request.headers.get("X-API-Key", "").encode(errors="surrogateescape")
        # Every key is compared, so that the time taken tells nothing.
        if not any([hmac.compare_digest(given, key.encode()) for key in self._cp.api_keys]):  # noqa: C419
            raise Refusal(401, "unauthorized")
        for value in (call.session_id, call.server_id):
            if value is not None and not _is_id(value):
                raise Refusal(400, "invalid_id", "expected 1 to 128 of A-Z a-z 0-9 . _ : ~ -")
        if call.request.method != "GET":
            if call.request.content_type != "application/json":
                raise Refusal(415, "unsupported_media_type", "expected application/json")
            if not isinstance(call.document, dict):
                raise Refusal(400, "malformed", "expected a JSON object")

    def _usage_records(self, call: Call) -> Answer:
        if not call.batched:
            return self._record(call, "usage", wire.UsageRecord)
        if call.key is None:
            raise Refusal(400, "idempotency_key", "expected the header Idempotency-Key")
        _shaped(call.document, wire.UsageBatch)
        if any(record["api_session_id"] != call.session_id for record in call.records):
            raise Refusal(400, "session", "api_session_id differs from the path")
        return self._record_batch(call)

    def _record_batch(self, call: Call) -> Answer:
        assert call.session_id is not None
        ids = [record["transaction_id"] for record in call.records]
        known = [self._ledger.known(*one) for one in zip(ids, call.contents, strict=True)]
        if any(known) or len(set(ids)) < len(ids):
            call.verdicts = [verdict or Verdict.NOT_RECORDED for verdict in known]
            status = self._cp.settings.duplicate_status if set(known) == {Verdict.DUPLICATE} else 409
            return status, {
                "already_recorded": [id for id, verdict in zip(ids, known, strict=True) if verdict]
            }
        self._require_session(call)
        with self._ledger.together():
            for record, content in zip(call.records, call.contents, strict=True):
                self._ledger.record("usage", call.session_id, record, content)
        call.judged(Verdict.RECORDED)
        return 200, {"recorded": len(ids)}

    def _start(self, call: Call) -> Answer:
        return self._record(call, "start", wire.SessionStart)

    def _complete(self, call: Call) -> Answer:
        return self._record(call, "complete", wire.SessionComplete)

    def _refresh(self, call: Call) -> Answer:
        return self._record(call, "refresh", wire.QuotaRefresh)

    def _record(self, call: Call, kind: RecordKind, shape: type[wire.Strict]) -> Answer:
        assert call.session_id is not None
        if call.key is None:
            raise Refusal(400, "idempotency_key", "expected the header Idempotency-Key")
        _shaped(call.document, shape)
        record, content = call.records[0], call.contents[0]
        transaction_id: str = record["transaction_id"]
        if call.key != transaction_id:
            raise Refusal(400, "idempotency_key", "differs from transaction_id")
        if record.get("api_session_id", call.session_id) != call.session_id:
            raise Refusal(400, "session", "api_session_id differs from the path")
        known = self._ledger.known(transaction_id, content)
        if known is Verdict.CONFLICT:
            call.judged(known)
            raise Refusal(409, "conflict", "this transaction id is recorded with other content")
        data: dict[str, Any] = {"transaction_id": transaction_id}
        if known is Verdict.DUPLICATE:
            call.judged(known)
            if kind == "refresh":
                data = _grant_data(self._ledger.grant_again(transaction_id))
            return self._cp.settings.duplicate_status, data
        if kind in ("usage", "refresh"):
            self._require_session(call)
        with self._ledger.together():
            credits = self._ledger.record(kind, call.session_id, record, content)
            if kind == "usage":
                data["credits"] = credits
            if kind == "refresh":
                amount, most = self._cp.settings.quota_amount, self._cp.settings.grants_per_session
                data = _grant_data(self._ledger.grant(call.session_id, transaction_id, amount, most))
        call.judged(Verdict.RECORDED)
        return 200, data

    def _require_session(self, call: Call) -> None:
        assert call.session_id is not None
        known = self._ledger.session_state(call.session_id) in ("started", "completed")
        if self._cp.settings.strict_sessions and not known:
            raise Refusal(404, "unknown_session")

    def _register(self, call: Call) -> Answer:
        registration = _shaped(call.document, wire.Registration)
        self._ledger.register(registration.server_id, call.body)
        return self._accepted(call, {"server_id": registration.server_id})

    def _heartbeat(self, call: Call) -> Answer:
        assert call.server_id is not None
        heartbeat = _shaped(call.document, wire.Heartbeat)
        metrics = msgspec.json.encode(heartbeat.metrics)
        if not self._ledger.heartbeat(call.server_id, heartbeat.status, metrics):
            raise Refusal(404, "unknown_server", "register first")
        return self._accepted(call, {"server_id": call.server_id})

    def _commands(self, call: Call) -> Answer:
        assert call.server_id is not None
        return self._accepted(call, {"commands": self._ledger.poll(call.server_id, COMMAND_KEPT_SECONDS)})

    def _command_results(self, call: Call) -> Answer:
        assert call.server_id is not None
        result = _shaped(call.document, wire.CommandResult)
        verdict = self._ledger.result(call.server_id, result.command_id, call.document)
        call.judged(verdict)
        if verdict is Verdict.CONFLICT:
            raise Refusal(409, "conflict", "this command has reported another result")
        duplicate = verdict is Verdict.DUPLICATE
        return self._cp.settings.duplicate_status if duplicate else 200, {"command_id": result.command_id}

    def _public_keys(self, call: Call) -> Answer:
        return self._accepted(call, self._cp.keyring.jwks())

    def _shutdown(self, call: Call) -> Answer:
        assert call.server_id is not None
        self._ledger.shutdown(call.server_id, _shaped(call.document, wire.Shutdown).reason)
        return self._accepted(call, {"server_id": call.server_id})

    def _accepted(self, call: Call, data: dict[str, Any]) -> Answer:
        call.judged(Verdict.ACCEPTED)
        return 200, data


class Route(NamedTuple):
    """Where a call is served, and who judges it."""

    method: str
    path: str
    judge: Callable[[Judge, Call], Answer]


CALLS = {
    "usage_records": Route("POST", "/api/v1/sessions/{session_id}/usage-records", Judge._usage_records),
    "start": Route("POST", "/api/v1/sessions/{session_id}/start", Judge._start),
    "complete": Route("POST", "/api/v1/sessions/{session_id}/complete", Judge._complete),
    "refresh": Route("POST", "/api/v1/sessions/{session_id}/refresh", Judge._refresh),
    "register": Route("POST", "/api/v1/servers/register", Judge._register),
    "heartbeat": Route("PUT", "/api/v1/servers/{server_id}/heartbeat", Judge._heartbeat),
    "commands": Route("GET", "/api/v1/servers/{server_id}/commands", Judge._commands),
    "command_results": Route("POST", "/api/v1/servers/{server_id}/command-results", Judge._command_results),
    "public_keys": Route("GET", "/api/v1/servers/{server_id}/public-keys", Judge._public_keys),
    "shutdown": Route("POST", "/api/v1/servers/{server_id}/shutdown", Judge._shutdown),
}
ENDPOINTS = tuple(CALLS)

_Shape = TypeVar("_Shape", bound=wire.Strict)


def _shaped(document: Any, shape: type[_Shape]) -> _Shape:
    try:
        return msgspec.convert(document, shape)
    except msgspec.ValidationError as error:
        raise Refusal(422, "invalid", str(error)) from None


def _is_id(value: str) -> bool:
    return _ID.fullmatch(value) is not None and value not in (".", "..")


def _grant_data(grant: Grant) -> dict[str, Any]:
    return {
        "transaction_id": grant.transaction_id,
        "new_quota_amount": grant.new_quota_amount,
        "final_quota": grant.final_quota,
    }
