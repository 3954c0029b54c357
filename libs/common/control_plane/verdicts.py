"""Answer -> outcome: the table of contract section 3, and nothing else. Pure.

    2xx with a JSON object, not "success": false; 204     Delivered
    2xx with anything else; /refresh without a grant      Retry(UNCONFIRMED)
    409                                                   Delivered(duplicate); a batch: Split(one_by_one)
    409 with "error": "conflict"                          Dead(CONFLICT)
    409 on /refresh                                       with the grant Delivered(duplicate), else Dead
    404 410                                               Retry(NOT_FOUND)
    401 403, a refused certificate                        Retry(HELD): auth
    3xx 501                                               Retry(HELD): configuration
    408 425 429, other 5xx, no answer                     Retry(TRANSIENT)
    any other 4xx                                         Dead(REJECTED); a batch: Split
    below 200, above 599                                  Retry(TRANSIENT): unheard of, so nothing is lost

An answer may come bare or wrapped in {"success": true, "data": {…}}.
Whatever is kept of an answer is cut short, made printable, and has the API key masked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Any, Literal
from urllib.parse import quote

import msgspec

from common.control_plane import errors
from common.outcomes import DELIVERED, DUPLICATE, Cause, Dead, Delivered, Outcome, Reason, Retry

EXCERPT_CHARS = 512
BRIEF_CHARS = 120
LONGEST_RETRY_AFTER = 900.0
MASKED = "***"

HoldKind = Literal["auth", "configuration"]


class Answer(msgspec.Struct, frozen=True, gc=False):
    """What came back: `body` is cut at the transport's limit, and then `truncated`."""

    status: int
    body: bytes = b""
    seconds: float = 0.0
    retry_after: str | None = None
    location: str | None = None
    truncated: bool = False


class Split(msgspec.Struct, frozen=True, gc=False):
    """A batch was refused: send its records in parts, or `one_by_one`, so that only the guilty one dies."""

    one_by_one: bool


SPLIT = Split(one_by_one=False)
SPLIT_ONE_BY_ONE = Split(one_by_one=True)


class Verdict(Enum):
    """What a status says before anybody has looked into the body."""

    SUCCESS = "success"
    DUPLICATE = "duplicate"
    NOT_FOUND = "not_found"
    AUTH = "auth"
    CONFIGURATION = "configuration"
    TRANSIENT = "transient"
    REJECTED = "rejected"


def of_status(status: int) -> Verdict:
    """The verdict of a status alone; every number has one."""
    match status:
        case 401 | 403:
            return Verdict.AUTH
        case 404 | 410:
            return Verdict.NOT_FOUND
        case 408 | 425 | 429:
            return Verdict.TRANSIENT
        case 409:
            return Verdict.DUPLICATE
        case 501:
            return Verdict.CONFIGURATION
    if 200 <= status < 300:
        return Verdict.SUCCESS
    if 300 <= status < 400:
        return Verdict.CONFIGURATION
    if 400 <= status < 500:
        return Verdict.REJECTED
    return Verdict.TRANSIENT


def hold_kind(held: Retry) -> HoldKind:
    """Which hold an answer that gave Retry(HELD) asks for."""
    return "auth" if held.http_status in (401, 403) else "configuration"


class Mask:
    """Hides secrets in text, in every spelling in which an answer may echo them."""

    def __init__(self, *secrets: str) -> None:
        spellings = {spelling for secret in secrets if secret for spelling in _spellings(secret)}
        self._spellings = sorted(spellings, key=len, reverse=True)
        self._overlap = max(map(len, self._spellings), default=1) - 1

    def text(self, text: str) -> str:
        for spelling in self._spellings:
            text = text.replace(spelling, MASKED)
        return text

    def excerpt(self, body: bytes, limit: int = EXCERPT_CHARS) -> str:
        """The beginning of a body: printable, on one line, at most `limit` characters, without a secret."""
        window = 4 * (limit + self._overlap)
        text = self.text(body[:window].decode("utf-8", "replace"))
        if len(body) > window:
            # A secret that the window cuts in two is not recognised: what could be its beginning goes too.
            text = text[: max(0, len(text) - self._overlap)]
        printable = "".join(character if character.isprintable() else " " for character in text)
        return " ".join(printable.split())[:limit]


_HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#x27;"})


def _spellings(secret: str) -> set[str]:
    escaped = {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
    return {
        secret,
        secret.translate(_HTML),
        quote(secret),
        quote(secret, safe=""),
        *escaped,
        *(spelling.replace("/", r"\/") for spelling in escaped),
    }


class Judge:
    """Reads answers. `wall` is the time of day in seconds, for a Retry-After that is a date."""

    def __init__(self, mask: Mask, wall: Callable[[], float]) -> None:
        self._mask = mask
        self._wall = wall

    def delivery(self, answer: Answer) -> Outcome:
        """A usage record, a start or a complete."""
        if 200 <= answer.status < 300:
            return (
                DELIVERED if _confirms(answer) else self._unconfirmed(answer, "no JSON object that confirms")
            )
        if answer.status == 409:
            return self._conflict(answer) if _is_conflict(_object(answer)) else DUPLICATE
        return self._refusal(answer)

    def batch(self, answer: Answer) -> Outcome | Split:
        """Several usage records in one request."""
        if answer.status == 409:
            return SPLIT_ONE_BY_ONE
        outcome = self.delivery(answer)
        return SPLIT if isinstance(outcome, Dead) else outcome

    def refresh(self, answer: Answer) -> Outcome:
        """A quota request: only an answer that carries the grant delivers it."""
        duplicate = answer.status == 409
        if not duplicate and not 200 <= answer.status < 300:
            return self._refusal(answer)
        reply = _object(answer)
        if duplicate and _is_conflict(reply):
            return self._conflict(answer)
        grant = None
        if reply is not None and (duplicate or reply.get("success") is not False):
            grant = _grant(reply)
        if grant is not None:
            return Delivered(duplicate=duplicate, answer=grant)
        if duplicate:
            return self._dead(Reason.REJECTED, answer, " without the grant")
        return self._unconfirmed(answer, "no numeric new_quota_amount")

    def reply(self, answer: Answer) -> dict[str, Any]:
        """The unwrapped JSON object of a periodic call ({} for a 204); raises a ControlPlaneError."""
        verdict = of_status(answer.status)
        if verdict is Verdict.SUCCESS and answer.status != 204:
            reply = _object(answer)
            if reply is None or reply.get("success") is False:
                raise errors.Unconfirmed(self._brief(answer), status=answer.status)
            return _unwrapped(reply)
        if verdict is Verdict.SUCCESS or verdict is Verdict.DUPLICATE:
            reply = _object(answer)
            if _is_conflict(reply):
                raise errors.Rejected(self._brief(answer), status=answer.status)
            return _unwrapped(reply or {})
        raise _ERRORS[verdict](
            self._brief(answer), status=answer.status, retry_after=self._retry_after(answer)
        )

    def no_answer(self, error: errors.TransportError) -> Outcome:
        """A request that got no answer: it may have arrived, so it is sent again under the same key."""
        if isinstance(error, errors.Transient):
            return Retry(Cause.TRANSIENT, str(error))
        if isinstance(error, errors.Rejected):
            return Dead(Reason.INVALID, str(error))
        return Retry(Cause.HELD, str(error))

    def _refusal(self, answer: Answer) -> Outcome:
        match of_status(answer.status):
            case Verdict.NOT_FOUND:
                return self._retry(Cause.NOT_FOUND, answer)
            case Verdict.AUTH | Verdict.CONFIGURATION:
                return self._retry(Cause.HELD, answer)
            case Verdict.REJECTED:
                return self._dead(Reason.REJECTED, answer)
            case _:
                return self._retry(Cause.TRANSIENT, answer)

    def _conflict(self, answer: Answer) -> Dead:
        return self._dead(Reason.CONFLICT, answer, " conflict: same key, other content")

    def _unconfirmed(self, answer: Answer, lack: str) -> Retry:
        return Retry(Cause.UNCONFIRMED, f"{lack}: {self._brief(answer)}", answer.status)

    def _retry(self, cause: Cause, answer: Answer) -> Retry:
        # What is not found, or forbidden to one entry alone, may be dead after the hold, of this very answer.
        final = answer.status in (403, 404, 410)
        excerpt = self._mask.excerpt(answer.body) or None if final else None
        return Retry(cause, self._brief(answer), answer.status, self._retry_after(answer), excerpt)

    def _dead(self, reason: Reason, answer: Answer, remark: str = "") -> Dead:
        error = f"answered {answer.status}{remark}"
        return Dead(reason, error, answer.status, self._mask.excerpt(answer.body) or None)

    def _brief(self, answer: Answer) -> str:
        said = self._mask.excerpt(answer.body, BRIEF_CHARS)
        to = f" to {self._mask.excerpt(answer.location.encode(), BRIEF_CHARS)}" if answer.location else ""
        return f"answered {answer.status}{to}" + (f": {said}" if said else "")

    def _retry_after(self, answer: Answer) -> float | None:
        if answer.retry_after is None or answer.status not in (429, 503):
            return None
        return retry_after(answer.retry_after, self._wall())


_ERRORS: dict[Verdict, type[errors.ControlPlaneError]] = {
    Verdict.NOT_FOUND: errors.NotFound,
    Verdict.AUTH: errors.AuthRefused,
    Verdict.CONFIGURATION: errors.ConfigurationFault,
    Verdict.TRANSIENT: errors.Transient,
    Verdict.REJECTED: errors.Rejected,
}


def retry_after(text: str, now: float) -> float | None:
    """Seconds to wait, from seconds or an HTTP date, at most 15 minutes; None: nothing readable."""
    text = text.strip()
    if text.isascii() and text.isdigit():
        # Longer than any wait we honour: no need to find out how long (int() refuses thousands of digits).
        seconds = float(text) if len(text) < 10 else LONGEST_RETRY_AFTER
    else:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - now
        except (ValueError, OverflowError, TypeError, IndexError):
            return None
    return min(seconds, LONGEST_RETRY_AFTER) if seconds > 0 else None


class _Confirmation(msgspec.Struct, gc=False):
    """All that is read of a 2xx whose content nobody needs; the rest is only skipped over."""

    success: Any = None


_confirmation = msgspec.json.Decoder(_Confirmation).decode
_any = msgspec.json.Decoder().decode


def _confirms(answer: Answer) -> bool:
    if answer.status == 204:
        return True
    if answer.truncated:
        return False
    try:
        return _confirmation(answer.body).success is not False
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return False


def _object(answer: Answer) -> dict[str, Any] | None:
    if answer.truncated:
        return None
    try:
        decoded = _any(answer.body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    return decoded if isinstance(decoded, dict) else None


def _unwrapped(reply: dict[str, Any]) -> dict[str, Any]:
    data = reply.get("data")
    return data if reply.get("success") is True and isinstance(data, dict) else reply


def _grant(reply: dict[str, Any]) -> dict[str, Any] | None:
    """The part of a reply that carries the grant: itself or its `data`, whatever `success` says."""
    for part in (reply, reply.get("data")):
        if isinstance(part, dict) and _is_number(part.get("new_quota_amount")):
            return part
    return None


def _is_conflict(reply: dict[str, Any] | None) -> bool:
    if reply is None:
        return False
    data = reply.get("data")
    return reply.get("error") == "conflict" or (isinstance(data, dict) and data.get("error") == "conflict")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
