"""Laws of `common.signing`: what is no command of our ControlPlane is refused, whatever it looks like."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import math
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from joserfc import jws
from joserfc.jwk import ECKey, OctKey, OKPKey, RSAKey

from common.signing import (
    MAX_KEYS,
    MAX_TOKEN_BYTES,
    REFETCH_SECONDS,
    TRUST_SECONDS,
    Claims,
    KeySet,
    Refused,
    Undecided,
    published,
    usable,
)

NOW = 1_900_000_000
SERVER = "api-server-001"
ISSUER = "control-plane"

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a 1024-bit key is what the test is about
    PAIRS: dict[str, Any] = {
        "rsa": RSAKey.generate_key(2048, {"kid": "rsa"}),
        "ec": ECKey.generate_key("P-256", {"kid": "ec"}),
        "ed": OKPKey.generate_key("Ed25519", {"kid": "ed"}),
        "weak": RSAKey.generate_key(1024, {"kid": "weak"}),
        "p384": ECKey.generate_key("P-384", {"kid": "p384"}),
        "stranger": ECKey.generate_key("P-256", {"kid": "ec"}),
    }
ALGORITHM = {
    "rsa": "RS256",
    "ec": "ES256",
    "ed": "EdDSA",
    "weak": "RS256",
    "p384": "ES384",
    "stranger": "ES256",
}


class Command(msgspec.Struct):
    command_id: str = "cmd-1"
    command_type: str = "health_check"
    parameters: Any = None


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class ControlPlane:
    """Hands out a key set, counts how often, and is away when told so."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)
        self.fetches = 0
        self.away = False
        self.answer: asyncio.Event | None = None

    async def fetch(self) -> dict[str, Any]:
        self.fetches += 1
        if self.answer:
            await self.answer.wait()
        if self.away:
            raise ConnectionError("away")
        return jwks(*self.names)


def public(name: str, **members: Any) -> dict[str, Any]:
    return PAIRS[name].as_dict(private=False) | members


def jwks(*names: str) -> dict[str, Any]:
    return {"keys": [public(name) for name in names]}


def payload(**changes: Any) -> dict[str, Any]:
    claims = {
        "iss": ISSUER,
        "aud": SERVER,
        "jti": "cmd-1",
        "command_type": "health_check",
        "parameters": {},
        "iat": NOW - 5,
        "exp": NOW + 300,
    }
    return {name: value for name, value in (claims | changes).items() if value is not ...}


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def token(
    name: str = "ec", claims: dict[str, Any] | bytes | None = None, header: dict[str, Any] | None = None
) -> str:
    """A token signed by the named key, its header and claims changed as given (`...` takes a member away)."""
    plain = {"alg": ALGORITHM[name], "kid": PAIRS[name].kid, "typ": "command+jwt"} | (header or {})
    plain = {key: value for key, value in plain.items() if value is not ...}
    body = claims if isinstance(claims, bytes) else json.dumps(claims or payload()).encode()
    algorithm = jws.JWSRegistry.algorithms[ALGORITHM[name]]
    signed = f"{b64(json.dumps(plain).encode())}.{b64(body)}"
    return f"{signed}.{b64(algorithm.sign(signed.encode(), PAIRS[name]))}"


def unsigned(header: dict[str, Any], signature: Callable[[bytes], bytes]) -> str:
    signed = f"{b64(json.dumps(header).encode())}.{b64(json.dumps(payload()).encode())}"
    return f"{signed}.{b64(signature(signed.encode()))}"


def hs256(secret: bytes) -> str:
    header = {"alg": "HS256", "kid": "rsa", "typ": "command+jwt"}
    return unsigned(header, lambda signed: hmac.new(secret, signed, hashlib.sha256).digest())


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def control_plane() -> ControlPlane:
    return ControlPlane("rsa", "ec", "ed", "weak", "p384")


@pytest.fixture
def keys(control_plane: ControlPlane, clock: Clock) -> KeySet:
    return KeySet(control_plane.fetch, clock=clock)


def judge(keys: KeySet, text: Any, command: Command | None = None, now: float = NOW) -> Awaitable[Claims]:
    return keys.verify(text, audience=SERVER, issuer=ISSUER, command=command or Command(), now=now)


# What is believed.


@pytest.mark.parametrize("name", ["rsa", "ec", "ed"])
async def test_a_token_signed_by_a_key_of_the_set_is_believed(keys: KeySet, name: str) -> None:
    assert await judge(keys, token(name)) == Claims("cmd-1", "health_check", {}, NOW - 5, NOW + 300)


@pytest.mark.parametrize(
    ("claims", "command"),
    [
        (payload(aud=[SERVER]), Command()),
        (payload(parameters=...), Command()),
        (payload(parameters=None), Command(parameters={})),
        (payload(parameters={"b": [1, "x"], "a": True}), Command(parameters={"a": True, "b": [1, "x"]})),
        (payload(iat=NOW + 29), Command()),
        (payload(iat=NOW - 599, exp=NOW + 1), Command()),
        (payload(iat=NOW - 5.5, nbf=NOW - 5), Command()),
    ],
    ids=["audience as a list", "no parameters", "null and empty", "members in another order",
         "clock a little ahead", "the last second", "fractions and nbf"],
)  # fmt: skip
async def test_what_the_contract_leaves_open_is_believed(
    keys: KeySet, claims: dict[str, Any], command: Command
) -> None:
    assert (await judge(keys, token(claims=claims), command)).command_id == "cmd-1"


async def test_header_parameters_that_mean_nothing_here_are_ignored(keys: KeySet) -> None:
    assert await judge(keys, token(header={"x-trace": "1"}))


# What is refused without looking at a key.


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "token is missing"),
        ("", "token is missing"),
        (7, "token is missing"),
        ("a" * (MAX_TOKEN_BYTES + 1), "token is too long"),
        ("a.b", "token is no signed JWT"),
        ("a.b.c.d.e", "token is no signed JWT"),
        ("..", "token cannot be read"),
        ("ab+/.ab.ab", "token cannot be read"),
        (f"{b64(b'[]')}.{b64(b'{}')}.x", "token cannot be read"),
        (f"{b64(b'{}')}.{b64(b'7')}.x", "token cannot be read"),
        (f"{b64(b'[' * 9000)}.{b64(b'{}')}.x", "token cannot be read"),
        (f"{b64(bytes([0xff]) * 9)}.{b64(b'{}')}.x", "token cannot be read"),
        (token(claims=b'{"iat": 1e400}'), "token cannot be read"),
        (token(claims=b'{"iat": NaN}'), "token cannot be read"),
        (unsigned({"alg": "none", "kid": "ec", "typ": "command+jwt"}, lambda _: b""), "alg is not allowed"),
        (token(header={"alg": ["ES256"]}), "alg is not allowed"),
        (hs256(json.dumps(public("rsa")).encode()), "alg is not allowed"),
        (hs256(PAIRS["rsa"].as_pem(private=False)), "alg is not allowed"),
        (token("p384"), "alg is not allowed"),
        (token(header={"alg": "PS256"}), "alg is not allowed"),
        (token(header={"typ": "JWT"}), "typ is wrong"),
        (token(header={"typ": "COMMAND+JWT"}), "typ is wrong"),
        (token(header={"typ": ...}), "typ is wrong"),
        (token(header={"crit": ["exp"]}), "header has a parameter that is not allowed"),
        (token(header={"b64": True}), "header has a parameter that is not allowed"),
        (token("stranger", header={"jwk": public("stranger")}), "header has a parameter that is not allowed"),
        (token(header={"jku": "https://elsewhere/keys"}), "header has a parameter that is not allowed"),
        (token(header={"kid": ...}), "kid is missing"),
        (token(header={"kid": 7}), "kid is missing"),
    ],
)  # fmt: skip
async def test_a_malformed_token_is_refused(
    keys: KeySet, control_plane: ControlPlane, text: Any, reason: str
) -> None:
    with pytest.raises(Refused) as refused:
        await judge(keys, text)
    assert refused.value.reason == reason
    assert control_plane.fetches == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"iss": "somebody"}, "iss is wrong"),
        ({"iss": ...}, "iss is wrong"),
        ({"aud": "api-server-002"}, "aud is wrong"),
        ({"aud": [SERVER, "api-server-002"]}, "aud is wrong"),
        ({"aud": [SERVER, SERVER]}, "aud is wrong"),
        ({"aud": []}, "aud is wrong"),
        ({"aud": ...}, "aud is wrong"),
        ({"jti": "cmd-2"}, "jti is not the command_id"),
        ({"jti": ...}, "jti is not the command_id"),
        ({"command_type": "get_metrics"}, "command_type is another"),
        ({"command_type": ["health_check"]}, "command_type is another"),
        ({"parameters": {"a": 1}}, "parameters are others"),
        ({"parameters": []}, "parameters are others"),
        ({"iat": ...}, "iat is no time"),
        ({"iat": str(NOW)}, "iat is no time"),
        ({"iat": True}, "iat is no time"),
        ({"iat": 10**400}, "iat is no time"),
        ({"exp": ...}, "exp is no time"),
        ({"exp": -1}, "exp is no time"),
        ({"nbf": "now"}, "nbf is no time"),
        ({"iat": NOW + 31, "exp": NOW + 60}, "issued in the future"),
        ({"nbf": NOW + 31}, "issued in the future"),
        ({"iat": NOW - 301, "exp": NOW + 300}, "lifetime is too long"),
        ({"iat": NOW + 5, "exp": NOW + 1}, "lifetime is too long"),
        ({"exp": NOW}, "expired"),
        ({"iat": NOW - 900, "exp": NOW - 300}, "expired"),
    ],
)
async def test_a_claim_that_is_not_as_it_must_be_is_refused(
    keys: KeySet, control_plane: ControlPlane, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Refused) as refused:
        await judge(keys, token(claims=payload(**changes)))
    assert refused.value.reason == reason
    assert control_plane.fetches == 0


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        ({"a": True}, {"a": 1}),
        ({"a": 1}, {"a": 1.0}),
        ({"a": None}, {}),
        ({"a": [1, 2]}, {"a": [2, 1]}),
        ({}, []),
    ],
)
async def test_parameters_are_equal_as_json_not_as_python(keys: KeySet, inner: Any, outer: Any) -> None:
    with pytest.raises(Refused, match="parameters are others"):
        await judge(keys, token(claims=payload(parameters=inner)), Command(parameters=outer))


async def test_parameters_are_an_object(keys: KeySet) -> None:
    with pytest.raises(Refused, match="parameters are no object"):
        await judge(keys, token(claims=payload(parameters=[1])), Command(parameters=[1]))


# What is refused by the key.


def tampered() -> str:
    header, _, signature = token().split(".")
    return f"{header}.{b64(json.dumps(payload(exp=NOW + 301)).encode())}.{signature}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (token("weak"), "the key is no use for commands"),
        (token(header={"kid": "p384"}), "the key is no use for commands"),
        (token("ec", header={"kid": "rsa"}), "alg is not the key's"),
        (token("ec", header={"alg": "RS256", "kid": "rsa"}), "signature is wrong"),
        (token("stranger"), "signature is wrong"),
        (tampered(), "signature is wrong"),
        (token()[:-8], "signature is wrong"),
        (token().rpartition(".")[0] + ".", "signature is wrong"),
        (token().rpartition(".")[0] + ".ümläut", "signature is wrong"),
        (token(header={"x": "y" * 9000}), "signature is wrong"),
    ],
    ids=["RSA 1024", "P-384 key", "key of another type", "alg of another type", "stranger's key",
         "payload changed", "signature cut", "no signature", "no base64", "enormous header"],
)  # fmt: skip
async def test_a_forged_signature_is_refused(
    keys: KeySet, control_plane: ControlPlane, text: str, reason: str
) -> None:
    with pytest.raises(Refused) as refused:
        await judge(keys, text)
    assert refused.value.reason == reason
    assert control_plane.fetches == 1


async def test_a_refusal_quotes_nothing_of_the_token(keys: KeySet) -> None:
    with pytest.raises(Refused) as refused:
        await judge(keys, token(claims=payload(iss="hunter2")))
    assert "hunter2" not in repr(refused.value)


# Which keys count.


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        (public("rsa"), "RS256"),
        (public("ec", use="sig", alg="ES256", key_ops=["verify"]), "ES256"),
        (public("ed"), "EdDSA"),
        (PAIRS["ec"].as_dict(private=True), None),
        (PAIRS["rsa"].as_dict(private=True), None),
        (OctKey.generate_key(256, {"kid": "oct"}).as_dict(private=True), None),
        (public("weak"), None),
        (public("p384"), None),
        (public("ec", use="enc"), None),
        (public("ec", key_ops=["sign"]), None),
        (public("ec", key_ops="verify"), None),
        (public("ec", alg="RS256"), None),
        (public("rsa", alg="PS256"), None),
        (public("rsa", n="!"), None),
        (public("rsa", n=7), None),
        (public("ec", x=None), None),
        (public("ec", kid=None), None),
        (public("ec", kid=""), None),
        ({"kid": "x"}, None),
        ("key", None),
    ],
)
def test_only_public_strong_signature_keys_count(key: Any, algorithm: str | None) -> None:
    found = usable({"keys": [key]})
    assert list(found) == ([(key["kid"], algorithm)] if algorithm else [])


@pytest.mark.parametrize(
    "document",
    [None, [], {}, {"keys": {}}, {"keys": [{}] * (MAX_KEYS + 1)}, {"keys": [{"x": "y" * 70_000}]}],
    ids=["nothing", "a list", "no keys", "keys no list", "too many", "too long"],
)
def test_what_is_no_key_set_is_an_error(document: Any) -> None:
    with pytest.raises(ValueError, match="key set"):
        usable(document)


def test_what_is_published_is_the_public_members_of_usable_keys() -> None:
    keys = [public("ec", note="hello"), PAIRS["rsa"].as_dict(private=True), public("weak")]
    assert json.loads(published({"keys": keys})) == jwks("ec")


async def test_a_key_whose_point_is_not_on_its_curve_refuses(clock: Clock) -> None:
    async def fetch() -> dict[str, Any]:
        return {"keys": [public("ec", x="AAAA")]}

    with pytest.raises(Refused, match="signature is wrong"):
        await judge(KeySet(fetch, clock=clock), token())


# When keys are fetched.


async def test_the_first_token_fetches_the_keys_and_the_next_do_not(
    keys: KeySet, control_plane: ControlPlane
) -> None:
    assert keys.age == math.inf
    await judge(keys, token())
    await judge(keys, token("rsa"))
    assert (control_plane.fetches, keys.age) == (1, 0)


async def test_an_unknown_kid_is_refetched_once_and_a_rotated_key_is_believed(
    keys: KeySet, control_plane: ControlPlane
) -> None:
    control_plane.names = ["ec"]
    await keys.refresh()
    control_plane.names = ["ec", "rsa"]
    await judge(keys, token("rsa"))
    assert control_plane.fetches == 2


async def test_unknown_kids_cause_one_fetch_in_thirty_seconds_and_wait_rather_than_being_refused(
    keys: KeySet, control_plane: ControlPlane, clock: Clock
) -> None:
    unknown = token(header={"kid": "nobody"})
    await keys.refresh()
    with pytest.raises(Refused, match="kid is unknown"):
        await judge(keys, unknown)
    assert control_plane.fetches == 2
    clock.now += 10
    with pytest.raises(Undecided) as undecided:
        await judge(keys, unknown)
    assert (control_plane.fetches, undecided.value.after) == (2, REFETCH_SECONDS - 10)
    assert await judge(keys, token())  # the others are not held up
    clock.now += REFETCH_SECONDS - 10
    with pytest.raises(Refused, match="kid is unknown"):
        await judge(keys, unknown)
    assert control_plane.fetches == 3


async def test_many_tokens_at_once_share_one_fetch(keys: KeySet, control_plane: ControlPlane) -> None:
    control_plane.answer = asyncio.Event()
    judgements = [asyncio.ensure_future(judge(keys, token(name))) for name in ("ec", "rsa", "ed") * 3]
    while not control_plane.fetches:
        await asyncio.sleep(0)
    judgements.pop().cancel()  # whoever gives up does not take the fetch away from the others
    control_plane.answer.set()
    assert len(await asyncio.gather(*judgements)) == 8
    assert control_plane.fetches == 1


async def test_a_key_set_that_cannot_be_fetched_decides_nothing(
    keys: KeySet, control_plane: ControlPlane, clock: Clock
) -> None:
    control_plane.away = True
    with pytest.raises(Undecided):
        await judge(keys, token())
    with pytest.raises(Refused, match="expired"):  # what is wrong anyway needs no key
        await judge(keys, token(), now=NOW + 301)
    control_plane.away = False
    clock.now += REFETCH_SECONDS
    assert await judge(keys, token())


async def test_a_key_set_is_trusted_for_a_bounded_time_only(
    keys: KeySet, control_plane: ControlPlane, clock: Clock
) -> None:
    await keys.refresh()
    control_plane.away = True
    clock.now += TRUST_SECONDS
    assert await judge(keys, token())
    clock.now += 1
    assert not keys.trusted
    with pytest.raises(Undecided):
        await judge(keys, token())


async def test_a_withdrawn_key_is_not_believed_after_the_next_fetch(
    keys: KeySet, control_plane: ControlPlane
) -> None:
    await keys.refresh()
    assert await judge(keys, token())
    control_plane.names = ["rsa"]
    await keys.refresh()
    with pytest.raises(Refused, match="kid is unknown"):
        await judge(keys, token())


async def test_an_answer_that_is_no_key_set_leaves_the_old_one(clock: Clock) -> None:
    answers: list[Any] = [jwks("ec"), {"error": "oops"}]

    async def fetch() -> Any:
        return answers.pop(0)

    keys = KeySet(fetch, clock=clock)
    await keys.refresh()
    clock.now += 5
    with pytest.raises(ValueError, match="key set"):
        await keys.refresh()
    assert (keys.kids, keys.age) == (["ec"], 5)
