"""The operator's command against real servers: what it prints, what it changes, how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import redis as redis_py

from common.streams import GREATEST_ID, HANDOVER
from dataplane_agent.cli import call
from tests.support import RedisServer, free_port

USAGE, GROUP = "queue:usage_records", "usage_forwarder"
EVENTS = "queue:session_lifecycle"
KEY = "the-key-nobody-may-see"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def redis(redis_server: RedisServer) -> Iterator[redis_py.Redis]:
    with redis_py.Redis(port=redis_server.port) as client:
        for stream, group in ((USAGE, GROUP), (EVENTS, "session_notifier")):
            client.xgroup_create(stream, group, "0", mkstream=True)
            client.xgroup_create(stream, f"{group}:dead", GREATEST_ID)
        yield client


@pytest.fixture
def environment(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name in [name for name in os.environ if name.startswith(("DATAPLANE_", "CREDENTIALS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DATAPLANE_REDIS__HOST", redis_server.host)
    monkeypatch.setenv("DATAPLANE_REDIS__PORT", str(redis_server.port))
    monkeypatch.setenv("DATAPLANE_CONTROL_PLANE__API_KEY", KEY)
    return dict(os.environ)


@pytest.fixture
def cli(environment: dict[str, str], capsys: pytest.CaptureFixture[str]) -> Run:
    """One command line: its exit code, what it printed, what it complained about."""

    def run(*tokens: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = call(list(tokens))
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


def kill(redis: redis_py.Redis, stream: str = USAGE, reason: str = "invalid", session: str = "s-1") -> str:
    entry_id: bytes = redis.xadd(stream, {"data": json.dumps({"api_session_id": session})})
    group = {USAGE: GROUP, EVENTS: "session_notifier"}[stream]
    redis.xgroup_setid(stream, group, entry_id)
    redis.xclaim(stream, f"{group}:dead", reason, 0, [entry_id], retrycount=2, force=True, justid=True)
    document = {"reason": reason, "error": "no such customer", "http_status": 422, "attempts": 2}
    redis.hset(f"{{{stream}}}:dead", entry_id, json.dumps(document))
    return entry_id.decode()


def in_twin(redis: redis_py.Redis, stream: str = USAGE, group: str = GROUP) -> int:
    return int(redis.xpending(stream, f"{group}:dead")["pending"])


# --- status -------------------------------------------------------------------------------------------------


def test_status_has_the_shape_that_scripts_rely_on(redis: redis_py.Redis, cli: Run) -> None:
    kill(redis)
    redis.xadd(USAGE, {"data": "{}"})
    redis.hset(f"{{{USAGE}}}:ledger", mapping={"base": 0, "delivered": 0})
    code, out, _ = cli("status", "--json")
    told = json.loads(out)
    assert code == 0
    usage = told["streams"][USAGE]
    age = usage.pop("oldest_age_seconds")
    assert 0 <= age < 60
    assert usage == {
        "group": GROUP,
        "backlog": 1,
        "pending": 0,
        "dead": {"invalid": 1},
        "consumers": [],
        "ledger": {"base": 0, "delivered": 0},
        "losses": {"missing": 0, "vanished": 0, "lost": 0},
    }
    assert set(told) == {"streams", "services"}
    assert set(told["services"]) == {"registrar", "usage_forwarder", "session_notifier", "quota_refresher"}
    assert told["services"]["registrar"] == {"status": "missing", "processes": []}


def test_status_ends_with_1_when_entries_are_missing(redis: redis_py.Redis, cli: Run) -> None:
    redis.hset(f"{{{USAGE}}}:ledger", "base", 0)
    redis.xdel(USAGE, redis.xadd(USAGE, {"data": "{}"}))
    code, out, _ = cli("status")
    assert code == 1
    [row] = [line for line in out.splitlines() if line.startswith("missing")]
    assert row.split()[1:3] == [USAGE, "1"]


@pytest.mark.parametrize("kind", ["vanished", "lost"])
def test_status_ends_with_1_when_entries_have_been_lost(redis: redis_py.Redis, cli: Run, kind: str) -> None:
    redis.hset(f"{{{USAGE}}}:ledger", mapping={"base": 0, "discarded": 0, kind: 7})
    if kind == "vanished":
        redis.hset(f"{{{USAGE}}}:ledger", "base", -7)
        redis.xadd(USAGE, {"data": "{}"})
    code, out, _ = cli("status")
    assert code == 1
    [row] = [line for line in out.splitlines() if line.startswith(kind)]
    assert row.split()[1:3] == [USAGE, "7"]
    assert json.loads(cli("status", "--json")[1])["streams"][USAGE]["losses"][kind] == 7


def test_status_works_on_an_empty_redis(redis_server: RedisServer, cli: Run) -> None:
    code, out, _ = cli("status")
    assert code == 0
    assert "missing" in out


# --- dead letters -------------------------------------------------------------------------------------------


def test_the_list_says_what_died_of_what(redis: redis_py.Redis, cli: Run) -> None:
    first, second = kill(redis), kill(redis, EVENTS, "rejected", "s-2")
    code, out, _ = cli("dead", "list", "--json")
    assert code == 0
    assert [(d["id"], d["stream"], d["reason"], d["session"], d["error"]) for d in json.loads(out)] == [
        (first, USAGE, "invalid", "s-1", "no such customer"),
        (second, EVENTS, "rejected", "s-2", "no such customer"),
    ]
    _, out, _ = cli("dead", "list", "--stream", "session_lifecycle")
    assert [line.split()[0] for line in out.splitlines()] == ["ID", second]
    assert json.loads(cli("dead", "list", "--json", "--reason", "poison")[1]) == []
    assert cli("dead", "list", "--session", "nobody")[1] == "no dead letters\n"


def test_the_list_can_be_read_in_pieces(redis: redis_py.Redis, cli: Run) -> None:
    first, second, third = kill(redis), kill(redis), kill(redis)
    assert [d["id"] for d in json.loads(cli("dead", "list", "--json", "--limit", "2")[1])] == [first, second]
    assert [d["id"] for d in json.loads(cli("dead", "list", "--json", "--after", second)[1])] == [third]


def test_one_dead_letter_is_shown_with_its_payload(redis: redis_py.Redis, cli: Run) -> None:
    entry = kill(redis)
    code, out, _ = cli("dead", "show", entry, "--json")
    assert code == 0
    told = json.loads(out)
    assert (told["http_status"], json.loads(told["data"])) == (422, {"api_session_id": "s-1"})
    assert '"api_session_id": "s-1"' in cli("dead", "show", entry)[1]
    assert cli("dead", "show", "1-1") == (1, "", "no dead letter 1-1\n")


def test_what_is_no_text_is_shown_as_base64(redis: redis_py.Redis, cli: Run) -> None:
    entry = redis.xadd(USAGE, {"data": b"\xff"}).decode()
    redis.xclaim(USAGE, f"{GROUP}:dead", "invalid", 0, [entry], force=True, justid=True)
    told = json.loads(cli("dead", "show", entry, "--json")[1])
    assert (told["data"], told["data_base64"]) == (None, "/w==")


def test_a_named_dead_letter_is_retried_at_once(redis: redis_py.Redis, cli: Run) -> None:
    named, other = kill(redis), kill(redis)
    code, out, _ = cli("dead", "retry", "--id", named, "--json")
    assert (code, json.loads(out)) == (
        0,
        {"retried": [{"stream": USAGE, "id": named}], "vanished": [], "absent": []},
    )
    [row] = redis.xpending_range(USAGE, GROUP, "-", "+", 10)
    assert (row["message_id"].decode(), row["consumer"].decode()) == (named, HANDOVER)
    assert cli("dead", "retry", named) == (1, f"retried 0\n{named} is no dead letter\n", "")
    assert [d["id"] for d in json.loads(cli("dead", "list", "--json")[1])] == [other]


@pytest.mark.parametrize(("command", "done"), [("retry", "retried"), ("discard", "discarded")])
def test_more_than_the_named_ones_wants_a_yes(
    redis: redis_py.Redis, cli: Run, command: str, done: str
) -> None:
    for session in ("s-1", "s-2", "s-2"):
        kill(redis, session=session)
    kill(redis, EVENTS)
    code, out, _ = cli("dead", command, "--session", "s-2")
    assert code == 2
    assert out.endswith(f"2 would be {done}: add --yes to do it\n")
    assert in_twin(redis) == 3
    code, out, _ = cli("dead", command, "--session", "s-2", "--yes")
    assert code == 0
    assert in_twin(redis) == 1
    assert cli("dead", command, "--session", "s-2")[:2] == (0, "no dead letters\n")
    assert in_twin(redis, EVENTS, "session_notifier") == 1


def test_what_a_discard_destroyed_is_in_the_audit_log(redis: redis_py.Redis, cli: Run) -> None:
    entry = kill(redis)
    code, out, err = cli("dead", "discard", entry)
    assert (code, out) == (0, "discarded 1\n")
    [line] = [json.loads(line) for line in err.splitlines()]
    assert (line["logger"], line["event"], line["entry_id"]) == ("audit", "entry.discarded", entry)
    assert len(line["sha256"]) == 64
    assert redis.xlen(USAGE) == 0


def test_a_retry_without_a_live_group_names_the_remedy(redis: redis_py.Redis, cli: Run) -> None:
    entry = kill(redis)
    redis.xgroup_destroy(USAGE, GROUP)
    code, out, err = cli("dead", "retry", entry)
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert "start its service" in err
    assert in_twin(redis) == 1


@pytest.mark.parametrize(
    "tokens",
    [
        ("dead", "show", "5"),
        ("dead", "retry", "--id", "5-"),
        ("dead", "list", "--after", "x"),
        ("dead", "list", "--stream", "queue:nonsense"),
        ("send", "usage", "--session", "..", "--customer", "c"),
        ("send", "usage", "--session", "s", "--customer", "c", "--connection-seconds", "1e300"),
        ("send", "start", "--session", "s", "--customer", "c", "--metadata", "{"),
    ],
)
def test_wrong_usage_ends_with_2_and_changes_nothing(
    redis: redis_py.Redis, cli: Run, tokens: tuple[str, ...]
) -> None:
    kill(redis)
    code, out, err = cli(*tokens)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert (in_twin(redis), redis.xlen(USAGE), redis.xlen(EVENTS)) == (1, 1, 0)


# --- send ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "more", "stream", "said"),
    [
        (
            "usage",
            ("--connection-seconds", "12.5"),
            USAGE,
            {"audio_duration_seconds": 12.5, "request_count": 1},
        ),
        ("start", ("--metadata", '{"a":1}'), EVENTS, {"event_type": "start", "metadata": {"a": 1}}),
        ("complete", ("--reason", "done"), EVENTS, {"event_type": "complete", "disconnect_reason": "done"}),
        ("quota", ("--transaction", "t-1"), "queue:quota_refresh", {"transaction_id": "t-1"}),
    ],
)
def test_what_is_sent_is_on_its_stream(
    redis: redis_py.Redis, cli: Run, kind: str, more: tuple[str, ...], stream: str, said: dict[str, object]
) -> None:
    code, out, _ = cli("send", kind, "--session", "s-1", "--customer", "c-1", *more, "--json")
    told = json.loads(out)
    assert (code, told["stream"]) == (0, stream)
    [(entry_id, fields)] = redis.xrange(stream)
    assert entry_id.decode() == told["id"]
    body = json.loads(fields[b"data"])
    assert body["transaction_id"] == told["transaction_id"]
    assert body.items() >= {"api_session_id": "s-1", "customer_id": "c-1"}.items()
    assert {name: body[name] for name in said} == said


# --- how it ends --------------------------------------------------------------------------------------------


def test_no_expected_failure_shows_a_traceback_or_a_secret(environment: dict[str, str]) -> None:
    wrong: list[tuple[list[str], dict[str, str], int]] = [
        (["status"], {"DATAPLANE_REDIS__PORT": str(free_port())}, 3),
        (["status"], {"DATAPLANE_REDIS__PASSWORD": KEY}, 3),
        (["run"], {"DATAPLANE_REDIS__PORT": "x", "DATAPLANE_STREAMS__READ_COUNT": "0"}, 2),
        (["run", "no_such_service"], {}, 2),
        (["run", "--replicas", "usage_forwarder"], {}, 2),
        (["--check-config", "--config", "/nowhere.yaml"], {}, 2),
        (["--version"], {}, 0),
    ]
    children = [
        (
            tokens,
            code,
            subprocess.Popen(
                [sys.executable, "-m", "dataplane_agent", *tokens],
                env=environment | change,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            ),
        )
        for tokens, change, code in wrong
    ]
    for tokens, code, child in children:
        out, err = child.communicate(timeout=30)
        assert child.returncode == code, (tokens, out, err)
        assert "Traceback" not in out + err, tokens
        assert KEY not in out + err, tokens
        assert (err == "") == (code == 0), tokens


def test_a_reader_that_has_seen_enough_ends_it_quietly(
    redis: redis_py.Redis, environment: dict[str, str]
) -> None:
    for _ in range(2000):
        kill(redis)
    child = subprocess.Popen(
        [sys.executable, "-m", "dataplane_agent", "dead", "list"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    assert child.stdout.readline().startswith(b"ID")
    child.stdout.close()
    complaint = child.stderr.read()
    child.stderr.close()
    assert (child.wait(10), complaint) == (141, b"")
