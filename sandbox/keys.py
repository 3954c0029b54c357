"""The keys that sign commands: published as JWKS, rotated on command, and forged on request.

A forgery is a token that an agent must refuse (contract section 5); `FORGERIES` names every kind that can be
asked for.
"""

from __future__ import annotations

import hmac
import time
import warnings
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal, get_args
from uuid import uuid4

import msgspec
from joserfc import jws
from joserfc.errors import SecurityWarning
from joserfc.jwk import ECKey, KeyParameters, OKPKey, RSAKey

Algorithm = Literal["ES256", "EdDSA", "RS256"]
Forgery = Literal[
    "none",  # alg none, no signature
    "hs256",  # HMAC with the public key as the secret
    "expired",
    "long_lived",  # good for an hour
    "no_expiry",
    "future",  # issued in an hour
    "wrong_aud",
    "extra_aud",  # this server and another one
    "wrong_iss",
    "wrong_typ",
    "wrong_jti",
    "other_type",  # the token names another command_type than the envelope
    "other_parameters",
    "unknown_kid",
    "no_kid",
    "bad_signature",  # a published kid, another key
    "small_rsa",  # a published RSA key of 1024 bits
    "garbage",
]

ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
FORGERIES: tuple[str, ...] = get_args(Forgery)
LIFETIME_SECONDS = 300

_Key = ECKey | OKPKey | RSAKey
_REGISTRY = jws.JWSRegistry(algorithms=list(ALGORITHMS))


class Command(msgspec.Struct, forbid_unknown_fields=True):
    """A command to enqueue; `forge` names a way in which its token is wrong (sandbox.keys.FORGERIES)."""

    server_id: str
    command_type: str
    parameters: dict[str, Any] = {}
    forge: str | None = None
    algorithm: Algorithm = "ES256"
    command_id: str | None = None


class Keyring:
    """One key per algorithm. `rotate` replaces them; the old stay published only when told so."""

    def __init__(self, issuer: str, clock: Callable[[], float] = time.time) -> None:
        self.issuer = issuer
        self._clock = clock
        self._signing: dict[Algorithm, _Key] = {name: _first(name) for name in ALGORITHMS}
        self._published: list[_Key] = list(self._signing.values())

    def jwks(self) -> dict[str, Any]:
        """The published public keys."""
        return {"keys": [dict(key.as_dict(private=False)) for key in self._published]}

    def rotate(self, *, keep_old: bool = False) -> list[str]:
        """Sign with new keys from now on; returns their kids."""
        self._signing = {name: _generate(name) for name in ALGORITHMS}
        old = self._published if keep_old else []
        self._published = [*self._signing.values(), *old]
        return [str(key.kid) for key in self._signing.values()]

    def token(self, command: Command, command_id: str) -> str:
        """A signed command token, or the named forgery of one; raises ValueError for an unknown name."""
        server_id, command_type, parameters = command.server_id, command.command_type, command.parameters
        algorithm, forge = command.algorithm, command.forge
        if forge is not None and forge not in FORGERIES:
            raise ValueError(f"forge: expected one of {', '.join(FORGERIES)}, got {forge}")
        if forge == "garbage":
            return "not.a.token"
        now = int(self._clock())
        key = self._signing[algorithm]
        header: dict[str, Any] = {"alg": algorithm, "kid": key.kid, "typ": "command+jwt"}
        claims: dict[str, Any] = {
            "iss": self.issuer,
            "aud": server_id,
            "jti": command_id,
            "command_type": command_type,
            "parameters": parameters,
            "iat": now,
            "exp": now + LIFETIME_SECONDS,
        }
        signer = key
        match forge:
            case "none":
                header["alg"] = "none"
                return _unsigned(header, claims)
            case "hs256":
                header["alg"] = "HS256"
                # By hand, because the library knows better than to take a PEM for a secret.
                signed = _unsigned(header, claims).removesuffix(".")
                digest = hmac.digest(key.as_pem(private=False), signed.encode(), "sha256")
                return f"{signed}.{_segment(digest)}"
            case "expired":
                claims |= {"iat": now - 2 * LIFETIME_SECONDS, "exp": now - LIFETIME_SECONDS}
            case "long_lived":
                claims["exp"] = now + 3600
            case "no_expiry":
                del claims["exp"]
            case "future":
                claims |= {"iat": now + 3600, "exp": now + 3600 + LIFETIME_SECONDS}
            case "wrong_aud":
                claims["aud"] = "another-server"
            case "extra_aud":
                claims["aud"] = [server_id, "another-server"]
            case "wrong_iss":
                claims["iss"] = "somebody-else"
            case "wrong_typ":
                header["typ"] = "JWT"
            case "wrong_jti":
                claims["jti"] = str(uuid4())
            case "other_type":
                claims["command_type"] = "get_metrics" if command_type != "get_metrics" else "health_check"
            case "other_parameters":
                claims["parameters"] = {**parameters, "forged": True}
            case "unknown_kid":
                signer = _generate(algorithm)
                header["kid"] = signer.kid
            case "no_kid":
                del header["kid"]
            case "bad_signature":
                signer = _generate(algorithm)
            case "small_rsa":
                signer = _small_rsa_key()
                self._published.append(signer)
                header |= {"alg": "RS256", "kid": signer.kid}
        with warnings.catch_warnings():
            # EdDSA is what the contract calls it, whatever RFC 9864 says.
            warnings.simplefilter("ignore", SecurityWarning)
            return jws.serialize_compact(header, msgspec.json.encode(claims), signer, registry=_REGISTRY)


def _generate(algorithm: Algorithm) -> _Key:
    about: KeyParameters = {"kid": str(uuid4()), "use": "sig", "alg": algorithm}
    match algorithm:
        case "ES256":
            return ECKey.generate_key("P-256", about)
        case "EdDSA":
            return OKPKey.generate_key("Ed25519", about)
        case "RS256":
            return RSAKey.generate_key(2048, about)


@cache
def _first(algorithm: Algorithm) -> _Key:
    # An RSA key takes a tenth of a second to find: the sandboxes of one process share their first keys.
    return _generate(algorithm)


def _small_rsa_key() -> RSAKey:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecurityWarning)
        return RSAKey.generate_key(1024, {"kid": str(uuid4()), "use": "sig", "alg": "RS256"})


def _unsigned(header: Mapping[str, Any], claims: Mapping[str, Any]) -> str:
    return f"{_segment(msgspec.json.encode(header))}.{_segment(msgspec.json.encode(claims))}."


def _segment(content: bytes) -> str:
    return urlsafe_b64encode(content).rstrip(b"=").decode()
