"""The border to Redis: every exception of the installed redis-py has a verdict, and nothing is retried behind us."""

from __future__ import annotations

import asyncio
import inspect
import re
from importlib.resources import files
from itertools import takewhile
from pathlib import Path

import pytest
import redis.exceptions as errors
from redis.asyncio import SSLConnection

from common import config
from common.config import Secret
from common.redis_border import (
    Away,
    Demoted,
    Denied,
    Full,
    GroupGone,
    RedisFault,
    Scripts,
    border,
    connect,
    fault,
)

OF_THE_LIBRARY = sorted(
    {
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, BaseException) and value.__module__ == errors.__name__
    },
    key=lambda kind: kind.__name__,
)

# What follows from each. A class that a new redis-py brings is missing here, and says so.
VERDICTS: dict[str, type[RedisFault]] = {
    "AskError": Away,
    "AuthenticationError": Denied,
    "AuthenticationWrongNumberOfArgsError": Denied,
    "AuthorizationError": Denied,
    "BusyLoadingError": Away,
    "ChildDeadlockedError": Away,
    "ClusterCrossSlotError": Away,
    "ClusterDownError": Away,
    "ClusterError": Away,
    "ConnectionError": Away,
    "CrossSlotTransactionError": Away,
    "DataError": Away,
    "ExecAbortError": Away,
    "ExternalAuthProviderError": Denied,
    "IncorrectPolicyType": Away,
    "InvalidPipelineStack": Away,
    "InvalidResponse": Away,
    "LockError": Away,
    "LockNotOwnedError": Away,
    "MasterDownError": Away,
    "MaxConnectionsError": Away,
    "ModuleError": Away,
    "MovedError": Away,
    "NoPermissionError": Denied,
    "NoScriptError": Away,
    "NoSuchFieldsetError": Away,
    "OutOfMemoryError": Full,
    "PubSubError": Away,
    "ReadOnlyError": Demoted,
    "RedisClusterException": Away,
    "RedisError": Away,
    "ResponseError": Away,
    "SlotNotCoveredError": Away,
    "TimeoutError": Away,
    "TryAgainError": Away,
    "UnixSocketError": Away,
    "WatchError": Away,
}


@pytest.mark.parametrize("kind", OF_THE_LIBRARY, ids=lambda kind: kind.__name__)
def test_every_exception_of_the_library_has_a_verdict(kind: type[Exception]) -> None:
    assert kind.__name__ in VERDICTS, f"{kind.__name__} is new: what follows from it?"
    raised = kind.__new__(kind)
    Exception.__init__(raised, "text")
    with pytest.raises(RedisFault) as caught, border():
        raise raised
    assert type(caught.value) is VERDICTS[kind.__name__]
    assert caught.value.__cause__ is raised


REPLIES: list[tuple[str, type[RedisFault]]] = [
    ("NOGROUP No such key 'queue:x' or consumer group 'g'", GroupGone),
    ("UNBLOCKED the stream key no longer exists", GroupGone),
    ("NOGROUP No such consumer group 'g' for key name 'x' script: abc, on @user_script:9.", GroupGone),
    ("ERR Error running script (call to f_1): @user_script:3: NOGROUP No such key", GroupGone),
    ("UNBLOCKED force unblock from blocking operation, instance state changed", Demoted),
    ("READONLY You can't write against a read only replica.", Demoted),
    ("OOM command not allowed when used memory > 'maxmemory'.", Full),
    ("NOAUTH Authentication required.", Denied),
    ("WRONGPASS invalid username-password pair or user is disabled.", Denied),
    ("NOPERM this user has no permissions to run the 'xadd' command", Denied),
    ("MISCONF Redis is configured to save RDB snapshots, but it's currently unable", Away),
    ("WRONGTYPE Operation against a key holding the wrong kind of value", Away),
    ("LOADING Redis is loading the dataset in memory", Away),
    ("ERR something new", Away),
    ("", Away),
]


@pytest.mark.parametrize(("text", "want"), REPLIES)
def test_a_reply_without_a_class_is_known_by_its_first_word(text: str, want: type[RedisFault]) -> None:
    assert type(fault(errors.ResponseError(text))) is want


@pytest.mark.parametrize(
    "raised",
    [OSError("no route"), ConnectionResetError(), TimeoutError()],
    ids=lambda raised: type(raised).__name__,
)
def test_what_the_socket_raises_means_that_redis_is_away(raised: Exception) -> None:
    with pytest.raises(Away), border():
        raise raised


def test_what_is_no_fault_of_redis_passes() -> None:
    with pytest.raises(ZeroDivisionError), border():
        raise ZeroDivisionError
    with pytest.raises(asyncio.CancelledError), border():
        raise asyncio.CancelledError


def test_a_refusal_says_the_remedy_and_no_text_grows_without_bound() -> None:
    assert "redis.username and redis.password" in str(fault(errors.NoPermissionError("no")))
    long = str(fault(errors.ResponseError("ERR " + "x" * 5000 + "\nsecond line")))
    assert len(long) < 400
    assert "second line" not in long


# -- the client --------------------------------------------------------------------------------------


def settings(**fields: object) -> config.Redis:
    return config.Redis(**{"host": "redis.internal", "port": 6380, **fields})  # type: ignore[arg-type]


def test_the_client_never_retries_by_itself() -> None:
    client = connect(settings(password=Secret("pw"), username="me", db=3, socket_timeout=7.0))
    options = client.connection_pool.connection_kwargs
    assert options["retry"].get_retries() == 0
    assert not issubclass(client.connection_pool.connection_class, SSLConnection)
    assert (options["host"], options["port"], options["db"]) == ("redis.internal", 6380, 3)
    assert (options["username"], options["password"]) == ("me", "pw")
    assert (options["socket_timeout"], options["socket_connect_timeout"]) == (7.0, 5.0)
    assert client.get_retry() is None or client.get_retry().get_retries() == 0


def test_an_empty_password_is_none() -> None:
    options = connect(settings()).connection_pool.connection_kwargs
    assert (options["username"], options["password"]) == (None, None)


def test_tls_is_verified_against_the_given_authority(tmp_path: Path) -> None:
    ca_file = str(tmp_path / "ca.pem")
    client = connect(settings(tls=True, ca_file=ca_file))
    assert issubclass(client.connection_pool.connection_class, SSLConnection)
    made = client.connection_pool.make_connection()
    assert (made.cert_reqs.name, made.ca_certs, made.check_hostname) == ("CERT_REQUIRED", ca_file, True)


# -- the scripts -------------------------------------------------------------------------------------

SCRIPTS = sorted(path.name for path in files("common.scripts").iterdir() if path.name.endswith(".lua"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_is_headed_by_its_legend_and_names_no_key_of_its_own(name: str) -> None:
    text = files("common.scripts").joinpath(name).read_text()
    legend = "\n".join(takewhile(lambda line: line.startswith("--"), text.splitlines()))
    for word in ("-- KEYS ", "-- ARGV ", "-- returns "):
        assert word in legend, word
    assert not re.search(r"KEYS\[\d\] *\.\.|\.\. *KEYS|queue:|dataplane:", text.removeprefix(legend))


async def test_a_script_that_does_not_exist_is_a_fault_of_ours() -> None:
    with pytest.raises(FileNotFoundError):
        await Scripts(connect(settings())).run("no_such_script", [], [])
