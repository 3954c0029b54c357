"""Whom to believe: the ControlPlane's key set, and the token every command must carry (contract section 5).

A token is believed when every rule holds; the first one that does not is the reason of a `Refused`.
All that can be judged without a key is judged first, so a token that is wrong anyway never causes a fetch.
A key that is not known, or a key set that is too old, is fetched once, and again after 30 s at the earliest;
until then the token is `Undecided`, never refused, so that a forgery cannot use up the genuine one's fetch.
What counts as a key: public, for signatures, RSA of 2048 bits and more, P-256 or Ed25519. The key's type
decides the algorithm; the token's header merely has to agree.

    fetched ──▶ trusted for an hour, fetched again every five minutes ──▶ too old: nothing is believed
"""

from __future__ import annotations

import asyncio
import base64
import math
import re
import warnings
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec

REFRESH_SECONDS = 300.0  # how old the key set gets while the ControlPlane answers
TRUST_SECONDS = 3600.0  # how old it may get at all: a key the ControlPlane withdrew is believed no longer
REFETCH_SECONDS = 30.0  # between two fetches that tokens cause

MAX_JWKS_BYTES = 64 * 1024
MAX_KEYS = 64
MAX_TOKEN_BYTES = 16 * 1024
MAX_LIFETIME_SECONDS = 600
LEEWAY_SECONDS = 30  # how far the ControlPlane's clock may be ahead of ours

TYP = "command+jwt"
MIN_RSA_BITS = 2048
_ALGORITHMS = frozenset({"RS256", "ES256", "EdDSA"})
_PRIVATE = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})
_PUBLIC = ("kty", "kid", "use", "key_ops", "alg", "n", "e", "crv", "x", "y")
_FOREIGN = frozenset({"crit", "b64", "zip", "jwk", "jku", "x5c", "x5u"})  # bend what verifies what
_BASE64URL = re.compile(r"[A-Za-z0-9_-]+")

Jwk = dict[str, Any]


class Refused(Exception):
    """Not a command of our ControlPlane to this server; `reason` quotes nothing of the token."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Undecided(Exception):
    """The keys to judge by are missing; ask again, after `after` seconds if it says so."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.after = reason, after


class Claimed(Protocol):
    """A command as it came, outside of its token; none of it is believed yet."""

    @property
    def command_id(self) -> str: ...
    @property
    def command_type(self) -> str: ...
    @property
    def parameters(self) -> Any: ...


class Claims(msgspec.Struct, frozen=True):
    """What a believed token says. Times in Unix seconds."""

    command_id: str
    command_type: str
    parameters: dict[str, Any]
    issued_at: float
    expires_at: float


class KeySet:
    """The ControlPlane's public keys: fetched in single flight, bounded in size and age.

    `fetch` returns the JWKS document; what it raises, `refresh` raises. `clock` is monotonic.
    """

    def __init__(self, fetch: Callable[[], Awaitable[dict[str, Any]]], *, clock: Callable[[], float]) -> None:
        self._fetch, self._clock = fetch, clock
        self._keys: dict[tuple[str, str], Jwk] = {}  # by kid and algorithm: a kid may name one key of each
        self._named: set[str] = set()  # every kid of the document, also of keys that are no use
        self._fetched_at = -math.inf
        self._next_refetch = -math.inf
        self._flight: asyncio.Task[Exception | None] | None = None

    @property
    def age(self) -> float:
        """Seconds since the key set was fetched; infinite before the first time."""
        return self._clock() - self._fetched_at

    @property
    def trusted(self) -> bool:
        return self.age <= TRUST_SECONDS

    @property
    def kids(self) -> list[str]:
        return sorted({kid for kid, _ in self._keys})

    async def refresh(self) -> None:
        """Fetch now, or join the fetch that is under way. A failure leaves the old set, at its old age."""
        if self._flight is None or self._flight.done():
            self._flight = asyncio.create_task(self._load(), name="public-keys")
        # Whoever gives up waiting does not take the fetch away from the others.
        if error := await asyncio.shield(self._flight):
            raise error

    async def verify(self, token: str, *, audience: str, issuer: str, command: Claimed, now: float) -> Claims:
        """The claims of a token that proves `command`, at `now` (Unix seconds). Raises Refused, Undecided."""
        header, payload = _parse(token)
        algorithm, kid = _judge_header(header)
        claims = _judge_claims(payload, audience, issuer, command, now)
        key = await self._key(kid, algorithm)
        if not _signed(token, key, algorithm):
            raise Refused("signature is wrong")
        return claims

    async def _key(self, kid: str, algorithm: str) -> Jwk:
        if not self.trusted or kid not in self._named:
            await self._refetch()
        if key := self._keys.get((kid, algorithm)):
            return key
        if kid in self.kids:
            raise Refused("alg is not the key's")
        raise Refused("the key is no use for commands" if kid in self._named else "kid is unknown")

    async def _refetch(self) -> None:
        now = self._clock()
        if self._flight is None or self._flight.done():
            if now < self._next_refetch:
                raise Undecided("keys were fetched a moment ago", self._next_refetch - now)
            self._next_refetch = now + REFETCH_SECONDS
        try:
            await self.refresh()
        except Exception as error:
            raise Undecided("keys cannot be fetched") from error

    async def _load(self) -> Exception | None:
        asked_at = self._clock()
        try:
            document = await self._fetch()
            self._keys = usable(document)
        except Exception as error:
            return error  # as a value: a task whose waiters are all gone must not complain
        self._named = {str(key["kid"]) for key in document["keys"] if isinstance(key, dict) and "kid" in key}
        self._fetched_at = asked_at
        return None


def usable(document: Any) -> dict[tuple[str, str], Jwk]:
    """The keys of a JWKS document that may verify a command, by kid and algorithm; of equal ones the first.

    Raises ValueError for what is no JWKS or too large; a key that is no use is passed over.
    """
    keys = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(keys, list):
        raise ValueError("key set: expected {'keys': [...]}")
    if len(keys) > MAX_KEYS or len(msgspec.json.encode(document)) > MAX_JWKS_BYTES:
        raise ValueError(f"key set: expected at most {MAX_KEYS} keys in {MAX_JWKS_BYTES} bytes")
    found: dict[tuple[str, str], Jwk] = {}
    for key in keys:
        if isinstance(key, dict) and (algorithm := _algorithm(key)):
            found.setdefault((key["kid"], algorithm), key)
    return found


def published(document: Any) -> bytes:
    """The usable keys of a JWKS document as JWKS JSON, their public members only. Raises ValueError."""
    keys = usable(document).values()
    return msgspec.json.encode(
        {"keys": [{name: key[name] for name in _PUBLIC if name in key} for key in keys]}
    )


def _algorithm(key: Jwk) -> str | None:
    """The one algorithm this key verifies; None for a private, symmetric, weak or unfit key."""
    kid, operations = key.get("kid"), key.get("key_ops", ["verify"])
    if not isinstance(kid, str) or not 0 < len(kid) <= 256 or not _PRIVATE.isdisjoint(key):
        return None
    if key.get("use", "sig") != "sig" or not isinstance(operations, list) or "verify" not in operations:
        return None
    match key:
        case {"kty": "RSA", "n": str(n), "e": str()} if _bits(n) >= MIN_RSA_BITS:
            algorithm = "RS256"
        case {"kty": "EC", "crv": "P-256", "x": str(), "y": str()}:
            algorithm = "ES256"
        case {"kty": "OKP", "crv": "Ed25519", "x": str()}:
            algorithm = "EdDSA"
        case _:
            return None
    return algorithm if key.get("alg", algorithm) == algorithm else None


def _bits(number: str) -> int:
    try:
        return int.from_bytes(_unbase64(number)).bit_length()
    except ValueError:
        return 0


def _unbase64(text: str) -> bytes:
    if not _BASE64URL.fullmatch(text):
        raise ValueError("not base64url")
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _parse(token: Any) -> tuple[Jwk, Jwk]:
    """Header and payload, neither believed."""
    if not isinstance(token, str) or not token:
        raise Refused("token is missing")
    if len(token) > MAX_TOKEN_BYTES:
        raise Refused("token is too long")
    parts = token.split(".")
    if len(parts) != 3:
        raise Refused("token is no signed JWT")
    try:
        header, payload = (msgspec.json.decode(_unbase64(part)) for part in parts[:2])
    except (ValueError, RecursionError):
        raise Refused("token cannot be read") from None
    if not isinstance(header, dict) or not isinstance(payload, dict):
        raise Refused("token cannot be read")
    return header, payload


def _judge_header(header: Jwk) -> tuple[str, str]:
    """Algorithm and kid that the token names."""
    algorithm, kid = header.get("alg"), header.get("kid")
    if not isinstance(algorithm, str) or algorithm not in _ALGORITHMS:
        raise Refused("alg is not allowed")
    if header.get("typ") != TYP:
        raise Refused("typ is wrong")
    if not _FOREIGN.isdisjoint(header):
        raise Refused("header has a parameter that is not allowed")
    if not isinstance(kid, str):
        raise Refused("kid is missing")
    return algorithm, kid


def _judge_claims(claims: Jwk, audience: str, issuer: str, command: Claimed, now: float) -> Claims:
    """The claims, when each is what it must be."""
    parameters = claims.get("parameters")
    issued_at, expires_at = _time(claims, "iat"), _time(claims, "exp")
    not_before = _time(claims, "nbf") if "nbf" in claims else issued_at
    if claims.get("iss") != issuer:
        raise Refused("iss is wrong")
    if claims.get("aud") != audience and claims.get("aud") != [audience]:
        raise Refused("aud is wrong")
    if claims.get("jti") != command.command_id:
        raise Refused("jti is not the command_id")
    if claims.get("command_type") != command.command_type:
        raise Refused("command_type is another")
    if _canonical(parameters) != _canonical(command.parameters):
        raise Refused("parameters are others")
    if parameters is not None and not isinstance(parameters, dict):
        raise Refused("parameters are no object")
    if max(issued_at, not_before) > now + LEEWAY_SECONDS:
        raise Refused("issued in the future")
    if not 0 < expires_at - issued_at <= MAX_LIFETIME_SECONDS:
        raise Refused("lifetime is too long")
    if expires_at <= now:
        raise Refused("expired")
    return Claims(command.command_id, command.command_type, parameters or {}, issued_at, expires_at)


def _time(claims: Jwk, name: str) -> float:
    value = claims.get(name)
    # A bool is an int to Python; an integer of a thousand digits is no float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**53:
        raise Refused(f"{name} is no time")
    return float(value)


def _canonical(value: Any) -> bytes:
    """Equal for equal JSON only: Python takes 1, 1.0 and true for the same. Absent is the empty object."""
    try:
        return msgspec.json.encode({} if value is None else value, order="deterministic")
    except (ValueError, RecursionError):
        raise Refused("parameters cannot be compared") from None


def _signed(token: str, key: Jwk, algorithm: str) -> bool:
    """Whether this key made the signature. False, too, for whatever the library cannot stomach."""
    # Imported when the first command comes: 9 MB that a server without commands does not spend.
    from joserfc import jws
    from joserfc.jwk import import_key

    registry = jws.JWSRegistry(algorithms=[algorithm], strict_check_header=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # RFC 9864 renames EdDSA; the contract does not
        try:
            public = import_key(
                {name: key[name] for name in ("kty", "n", "e", "crv", "x", "y") if name in key}
            )
            jws.deserialize_compact(token, public, registry=registry)
        except Exception:  # the library's errors have no common base, and none of them is a yes
            return False
    return True
