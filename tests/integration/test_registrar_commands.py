"""Laws of the command handler and the poll, with a real Redis: at most once successfully, reported once."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis

from common import logs, schemas
from common.config import Config, load
from common.control_plane import errors
from common.entries import Entry
from common.outcomes import DELIVERED, DUPLICATE, Cause, Dead, Outcome, Reason, Retry
from common.redis_border import Scripts
from common.service import Running
from common.signing import REFETCH_SECONDS, TRUST_SECONDS, KeySet
from common.streams import PUBLIC_KEYS, command_key
from registrar.commands import MAX_RETRIES, RUN_SECONDS, CommandHandler, CommandPoll
from registrar.memory import KEPT_SECONDS, Memory, Place, Record
from registrar.public_keys import PublicKeys
from sandbox.keys import FORGERIES, Command, Keyring
from tests.support import RedisServer

SERVER = "api-server-001"


class Wire:
    """The ControlPlane's side of three calls, by hand: what was reported, what the next ends in."""

    def __init__(self) -> None:
        self.last_success: float | None = None
        self.keyring = Keyring("control-plane")
        self.offered: list[dict[str, Any]] = []
        self.reports: list[dict[str, Any]] = []
        self.failures: list[errors.ControlPlaneError] = []
        self.keys_away = False
        self.before_report: Callable[[], Any] | None = None

    async def public_keys(self) -> dict[str, Any]:
        if self.keys_away:
            raise errors.ConnectFailed("away")
        return self.keyring.jwks()

    async def commands(self) -> list[dict[str, Any]]:
        return list(self.offered)

    async def command_result(self, body: dict[str, Any], correlation_id: str | None = None) -> dict[str, Any]:
        assert correlation_id == body["command_id"]
        if self.before_report is not None:
            await self.before_report()
        self.reports.append(json.loads(msgspec.json.encode(body)))
        if self.failures:
            raise self.failures.pop(0)
        return {}

    def command(self, command_id: str = "cmd-1", **fields: Any) -> dict[str, Any]:
        """A command as it is polled, its token forged if told so."""
        command = Command(SERVER, fields.pop("command_type", "health_check"), **fields)
        return {
            "command_id": command_id,
            "command_type": command.command_type,
            "parameters": command.parameters,
            "timestamp": "2026-01-31T08:00:00Z",
            "token": self.keyring.token(command, command_id),
        }


class Turn:
    held = True


def decoded(handler: CommandHandler, entry: Entry) -> str:
    """Its lane."""
    assert isinstance(entry.data, bytes)
    return handler.decode(entry, entry.data)


class Site:
    """A registrar's parts around a real Redis; `handler()` is another process of it."""

    def __init__(self, running: Running, wire: Wire) -> None:
        self.running, self.wire = running, wire
        self.memory = Memory(running.scripts, SERVER)
        self.now = time.time
        self.clock = 1000.0
        self.runs: list[str] = []
        self.fail: list[Exception] = []
        self.entries = 0
        self.poll = CommandPoll(running, Turn(), self.memory)  # type: ignore[arg-type]

    def handler(self) -> CommandHandler:
        keys = KeySet(self.wire.public_keys, clock=lambda: self.clock)
        runs = dict.fromkeys(("health_check", "get_metrics"), self._run)
        return CommandHandler(self.running, keys, self.memory, runs, lambda: self.now())

    async def _run(self, parameters: Any) -> dict[str, Any]:
        self.runs.append("run")
        await asyncio.sleep(0)
        if self.fail:
            raise self.fail.pop(0)
        return {"status": "healthy"}

    def entry(self, command: Any) -> Entry:
        self.entries += 1
        data = command if isinstance(command, bytes) else json.dumps(command).encode()
        return Entry(f"{self.entries}-0".encode(), data, "", None, 1, 0.0)

    async def deliver(self, handler: CommandHandler, command: Any) -> Outcome:
        """Delivers a command in an entry of its own, or once more in the one it has."""
        entry = command if isinstance(command, Entry) else self.entry(command)
        if entry.message is None:
            entry.lane = decoded(handler, entry)
        return await handler.deliver(entry)

    async def place(self, command_id: str = "cmd-1") -> Place:
        own, _ = await self.memory.recall(command_id, "")
        return own

    async def record(self) -> Record:
        record = (await self.place()).record
        assert record is not None
        return record

    def counted(self, kind: str, outcome: str) -> float:
        return float(self.running.metrics.commands(kind, outcome)._value.get())


def configured(port: int, **environ: str) -> Config:
    return load(
        environ={
            "DATAPLANE_REDIS__PORT": str(port),
            "DATAPLANE_REDIS__HOST": "127.0.0.1",
            "DATAPLANE_CONTROL_PLANE__API_KEY": "k",
            "DATAPLANE_SERVER__ID": SERVER,
            **environ,
        }
    )


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
async def site(redis_server: RedisServer, redis: Redis, wire: Wire) -> Any:
    running = Running("registrar", configured(redis_server.port))
    running.client = wire  # type: ignore[assignment]
    yield Site(running, wire)
    await running.redis.aclose()


@pytest.fixture
def audit() -> Callable[[], list[dict[str, Any]]]:
    stream = io.StringIO()
    logs.setup("registrar", configured(1).monitoring, SERVER, stream=stream)

    def lines() -> list[dict[str, Any]]:
        assert logs.flush()
        read = (json.loads(line) for line in stream.getvalue().splitlines())
        return [line for line in read if line["logger"] == "audit"]

    return lines


# A command that is believed.


async def test_a_believed_command_runs_once_and_its_result_is_reported(site: Site, wire: Wire) -> None:
    assert await site.deliver(site.handler(), wire.command()) == DELIVERED
    (report,) = wire.reports
    assert schemas_timestamp(report.pop("execution_timestamp"))
    assert report == {"command_id": "cmd-1", "success": True, "result": {"status": "healthy"}}
    assert len(site.runs) == 1
    assert site.counted("health_check", "succeeded") == 1


def schemas_timestamp(text: str) -> bool:
    body = {"command_id": "x", "command_type": "y", "token": "z", "timestamp": text}
    return schemas.command(json.dumps(body).encode()).timestamp == text


async def test_the_result_is_stored_before_it_is_reported(site: Site, wire: Wire) -> None:
    stored: list[Record] = []

    async def look() -> None:
        stored.append(await site.record())

    wire.before_report = look
    await site.deliver(site.handler(), wire.command())
    assert [(one.state, one.reported) for one in stored] == [("ended", False)]
    assert stored[0].report == wire.reports[0]
    assert (await site.record()).reported


async def test_what_is_remembered_is_kept_for_a_day(site: Site, wire: Wire, redis: Redis) -> None:
    await site.deliver(site.handler(), wire.command())
    await site.deliver(site.handler(), wire.command("cmd-2", forge="expired"))
    keys = await redis.keys("dataplane:*")
    assert len(keys) == 2
    for key in keys:
        assert KEPT_SECONDS - 5 < await redis.ttl(key) <= KEPT_SECONDS


async def test_a_crash_between_run_and_report_sends_the_stored_result_and_runs_nothing(
    site: Site, wire: Wire
) -> None:
    entry, wire.failures = site.entry(wire.command()), [errors.ConnectFailed("away")]
    assert await site.deliver(site.handler(), entry) == Retry(Cause.TRANSIENT, "away")
    site.now = lambda: time.time() + 3600  # by now the token has expired, too
    wire.keys_away = True
    assert await site.deliver(site.handler(), entry) == DELIVERED
    assert wire.reports[0] == wire.reports[1]
    assert len(site.runs) == 1


async def test_a_command_that_was_reported_is_neither_run_nor_reported_again(site: Site, wire: Wire) -> None:
    command = wire.command()
    await site.deliver(site.handler(), command)
    assert await site.deliver(site.handler(), command) == DUPLICATE
    assert (len(site.runs), len(wire.reports)) == (1, 1)


async def test_a_report_that_the_control_plane_refuses_dies_visibly_and_runs_nothing_again(
    site: Site, wire: Wire
) -> None:
    entry, wire.failures = site.entry(wire.command()), [errors.Rejected("no", status=422)]
    assert await site.deliver(site.handler(), entry) == Dead(
        Reason.REJECTED, "the report was refused: no", 422
    )
    assert await site.deliver(site.handler(), entry) == DELIVERED  # redriven
    assert len(site.runs) == 1


# A command that fails in running.


async def test_a_command_that_fails_is_tried_again_and_may_succeed(site: Site, wire: Wire) -> None:
    entry, site.fail = site.entry(wire.command()), [ValueError("oops")]
    assert await site.deliver(site.handler(), entry) == Retry(Cause.TRANSIENT, "ValueError: oops")
    assert not wire.reports
    assert await site.deliver(site.handler(), entry) == DELIVERED
    assert [report["success"] for report in wire.reports] == [True]


async def test_a_command_that_keeps_failing_is_retried_three_times_and_then_reported(
    site: Site, wire: Wire
) -> None:
    handler, entry = site.handler(), site.entry(wire.command())
    site.fail = [ValueError(f"oops {n}") for n in range(9)]
    for n in range(MAX_RETRIES):
        assert await site.deliver(handler, entry) == Retry(Cause.TRANSIENT, f"ValueError: oops {n}")
    assert await site.deliver(handler, entry) == DELIVERED
    assert (len(site.runs), site.counted("health_check", "failed")) == (4, 1)
    assert [(r["success"], r["error_message"]) for r in wire.reports] == [(False, "ValueError: oops 3")]


async def test_a_failed_command_is_not_retried_after_its_token_has_expired(site: Site, wire: Wire) -> None:
    handler, entry, site.fail = site.handler(), site.entry(wire.command()), [ValueError("oops")]
    await site.deliver(handler, entry)
    site.now = lambda: time.time() + 3600
    assert await site.deliver(handler, entry) == DELIVERED
    assert (len(site.runs), wire.reports[0]["error_message"]) == (1, "ValueError: oops")


async def test_a_process_that_died_while_a_command_ran_has_failed_it_once(site: Site, wire: Wire) -> None:
    entry = site.entry(wire.command())
    site.fail = [asyncio.CancelledError()]  # type: ignore[list-item]
    with pytest.raises(asyncio.CancelledError):
        await site.deliver(site.handler(), entry)
    assert (await site.record()).state == "running"
    assert await site.deliver(site.handler(), entry) == DELIVERED
    assert ((await site.record()).runs, wire.reports[0]["success"]) == (2, True)


async def test_a_command_that_kills_its_process_every_time_is_given_up_after_three_retries(
    site: Site, wire: Wire
) -> None:
    entry = site.entry(wire.command())
    site.fail = [asyncio.CancelledError() for _ in range(9)]  # type: ignore[misc]
    for _ in range(1 + MAX_RETRIES):
        with pytest.raises(asyncio.CancelledError):
            await site.deliver(site.handler(), entry)
    assert await site.deliver(site.handler(), entry) == DELIVERED
    assert (len(site.runs), wire.reports[0]["error_message"]) == (4, "died while it ran")


async def test_two_entries_of_one_command_in_two_processes_run_it_once(site: Site, wire: Wire) -> None:
    command = wire.command()
    entries = [site.entry(command), site.entry(command)]
    handlers = [site.handler(), site.handler()]
    for entry, handler in zip(entries, handlers, strict=True):
        entry.lane = decoded(handler, entry)
    outcomes = await asyncio.gather(*(h.deliver(e) for h, e in zip(handlers, entries, strict=True)))
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Delivered", "Retry"]
    waiting = entries[0] if isinstance(outcomes[0], Retry) else entries[1]
    assert await site.deliver(site.handler(), waiting) == DUPLICATE
    assert (len(site.runs), len(wire.reports)) == (1, 1)


async def test_while_a_command_runs_elsewhere_its_other_entry_waits(site: Site, wire: Wire) -> None:
    command = wire.command()
    site.fail = [asyncio.CancelledError()]  # type: ignore[list-item]
    with pytest.raises(asyncio.CancelledError):
        await site.deliver(site.handler(), command)
    other = site.entry(command)
    assert await site.deliver(site.handler(), other) == Retry(Cause.TRANSIENT, "it runs for another entry")
    assert len(site.runs) == 1
    site.now = lambda: time.time() + 2 * RUN_SECONDS  # the first entry is lost, with its process
    assert await site.deliver(site.handler(), other) == DELIVERED
    assert [report["success"] for report in wire.reports] == [True]


async def test_a_process_that_was_paused_cannot_end_what_another_has_begun_anew(
    site: Site, wire: Wire
) -> None:
    entry, paused = site.entry(wire.command()), asyncio.Event()
    run, resumed = site._run, asyncio.Event()

    async def slow(parameters: Any) -> dict[str, Any]:
        paused.set()
        await resumed.wait()
        return await run(parameters)

    first = site.handler()
    first._runs = {"health_check": slow}
    late = asyncio.create_task(site.deliver(first, entry))
    await paused.wait()
    assert await site.deliver(site.handler(), entry) == DELIVERED  # taken over
    resumed.set()
    assert await late == Retry(Cause.TRANSIENT, "another process was quicker")
    assert len(wire.reports) == 1


# A command that is refused.


@pytest.mark.parametrize("forge", FORGERIES)
async def test_a_forged_command_never_runs_is_reported_once_and_is_in_the_audit_log(
    site: Site, wire: Wire, audit: Callable[[], list[dict[str, Any]]], forge: str
) -> None:
    command = wire.command(forge=forge)
    handler = site.handler()
    assert await site.deliver(handler, command) == DELIVERED
    assert await site.deliver(handler, command) == DUPLICATE
    (report,) = wire.reports
    assert (report["success"], report["error_message"].split(":")[0]) == (False, "refused")
    assert not site.runs
    assert site.counted("health_check", "refused") == 1
    (line,) = audit()
    assert (line["event"], line["command_id"]) == ("command.refused", "cmd-1")
    assert command["token"] not in json.dumps(line)


async def test_a_forgery_does_not_block_the_genuine_command(site: Site, wire: Wire) -> None:
    genuine = wire.command()
    forgeries = [wire.command(forge=forge) for forge in FORGERIES if forge != "unknown_kid"]
    for forged in [*forgeries, genuine | {"parameters": {"a": 1}}, {**genuine, "token": 7}]:
        assert await site.deliver(site.handler(), forged) == DELIVERED
    assert not site.runs
    assert await site.deliver(site.handler(), genuine) == DELIVERED
    assert (len(site.runs), wire.reports[-1]["success"]) == (1, True)


async def test_a_forgery_while_the_genuine_command_waits_for_its_retry_changes_nothing(
    site: Site, wire: Wire
) -> None:
    entry, site.fail = site.entry(wire.command()), [ValueError("oops")]
    await site.deliver(site.handler(), entry)
    await site.deliver(site.handler(), wire.command(forge="bad_signature"))
    assert await site.deliver(site.handler(), entry) == DELIVERED
    assert [report["success"] for report in wire.reports] == [False, True]


async def test_a_forgery_after_the_genuine_command_runs_nothing_and_reports_nothing(
    site: Site, wire: Wire, audit: Callable[[], list[dict[str, Any]]]
) -> None:
    await site.deliver(site.handler(), wire.command())
    assert await site.deliver(site.handler(), wire.command(forge="none")) == DUPLICATE
    assert (len(site.runs), len(wire.reports)) == (1, 1)
    assert [line["event"] for line in audit()] == ["command.ended", "command.repeated"]


async def test_unknown_kids_are_decided_when_the_keys_may_be_fetched_again(site: Site, wire: Wire) -> None:
    handler = site.handler()
    first, second = (site.entry(wire.command(name, forge="unknown_kid")) for name in ("cmd-1", "cmd-2"))
    await site.deliver(handler, wire.command("cmd-0"))
    outcome = await site.deliver(handler, first)
    assert outcome == Retry(Cause.TRANSIENT, "keys were fetched a moment ago", after=REFETCH_SECONDS)
    site.clock += REFETCH_SECONDS
    assert await site.deliver(handler, first) == DELIVERED
    assert isinstance(await site.deliver(handler, second), Retry)
    assert [report["success"] for report in wire.reports] == [True, False]


async def test_a_type_that_is_unknown_or_not_allowed_here_is_refused(
    redis_server: RedisServer, wire: Wire
) -> None:
    config = configured(redis_server.port, DATAPLANE_COMMANDS__ALLOW="get_metrics")
    running = Running("registrar", config)
    running.client = wire  # type: ignore[assignment]
    site = Site(running, wire)
    await site.deliver(site.handler(), wire.command())
    await site.deliver(site.handler(), wire.command("cmd-2", command_type="reboot"))
    await site.deliver(site.handler(), wire.command("cmd-3", command_type="get_metrics"))
    assert [report.get("error_message") for report in wire.reports] == [
        "refused: command_type is not allowed by commands.allow",
        "refused: command_type is unknown",
        None,
    ]
    assert (site.counted("health_check", "refused"), site.counted("unknown", "refused")) == (1, 1)
    await running.redis.aclose()


async def test_a_command_that_breaks_the_schema_is_refused_and_one_without_an_id_is_invalid(
    site: Site, wire: Wire
) -> None:
    assert (
        await site.deliver(site.handler(), {"command_id": "cmd-1", "command_type": "health_check"})
        == DELIVERED
    )
    assert wire.reports[0]["error_message"].startswith("refused: ")
    with pytest.raises(schemas.Invalid):
        await site.deliver(site.handler(), b'{"command_type": "health_check"}')


async def test_without_keys_nothing_is_decided_and_nothing_remembered(
    site: Site, wire: Wire, redis: Redis
) -> None:
    wire.keys_away = True
    assert await site.deliver(site.handler(), wire.command()) == Retry(
        Cause.TRANSIENT, "keys cannot be fetched"
    )
    assert await redis.keys("*") == []


async def test_without_redis_nothing_runs(site: Site, wire: Wire, redis_server: RedisServer) -> None:
    entry = site.entry(wire.command())
    redis_server.kill()
    outcome = await site.deliver(site.handler(), entry)
    assert isinstance(outcome, Retry)
    assert outcome.cause is Cause.TRANSIENT
    assert not site.runs
    assert not wire.reports


# The script that remembers.


async def test_the_second_of_two_who_remember_changes_nothing(redis: Redis) -> None:
    scripts = Scripts(redis)
    assert await scripts.run("remember", ["k"], ["", "one", 60]) == 1
    assert await scripts.run("remember", ["k"], ["", "two", 60]) == 0
    assert await redis.get("k") == b"one"
    assert await scripts.run("remember", ["k"], ["one", "two", 60]) == 1
    assert (
        await scripts.run("remember", ["k"], ["one", "two", 60]) == 1
    )  # its reply was lost: it is said again
    assert await scripts.run("remember", ["k"], ["one", "three", 60]) == 0
    assert await redis.get("k") == b"two"


# The poll.


async def queued(site: Site, redis: Redis) -> list[str]:
    rows = await redis.xrange(site.running.config.streams.commands)
    return [json.loads(fields[b"data"])["command_id"] for _, fields in rows]


async def test_polled_commands_are_queued_once_while_they_wait(site: Site, wire: Wire, redis: Redis) -> None:
    wire.offered = [wire.command("cmd-1"), wire.command("cmd-2"), {"command_id": "no/id"}, {}]
    assert await site.poll.poll() == 2
    assert await site.poll.poll() == 0
    assert await queued(site, redis) == ["cmd-1", "cmd-2"]


async def test_a_command_that_was_reported_is_not_queued_again(site: Site, wire: Wire, redis: Redis) -> None:
    done, refused, new = (
        wire.command("cmd-1"),
        wire.command("cmd-2", forge="expired"),
        wire.command("cmd-3"),
    )
    await site.deliver(site.handler(), done)
    await site.deliver(site.handler(), refused)
    wire.offered = [done, refused, new]
    assert await site.poll.poll() == 1
    assert await queued(site, redis) == ["cmd-3"]


async def test_a_command_whose_report_got_lost_is_queued_again_and_reported_from_memory(
    site: Site, wire: Wire, redis: Redis
) -> None:
    command, wire.failures = wire.command(), [errors.ConnectFailed("away")]
    await site.deliver(site.handler(), command)
    wire.offered = [command]
    assert await site.poll.poll() == 1  # its entry was lost with the report
    ((_, fields),) = await redis.xrange(site.running.config.streams.commands)
    assert await site.deliver(site.handler(), fields[b"data"]) == DELIVERED
    assert len(site.runs) == 1


async def test_a_poll_that_fails_queues_nothing_and_raises_nothing(site: Site, wire: Wire) -> None:
    async def away() -> list[dict[str, Any]]:
        raise errors.TimedOut("t")

    wire.commands = away  # type: ignore[method-assign]
    assert await site.poll.poll() == 0


# The key set in Redis.


async def test_the_key_set_is_kept_in_redis_for_as_long_as_it_is_trusted(
    site: Site, wire: Wire, redis: Redis
) -> None:
    keys = PublicKeys(site.running)
    await keys.refresh()
    kept = await redis.get(PUBLIC_KEYS)
    assert {key["kid"] for key in json.loads(kept)["keys"]} == set(keys.keys.kids)
    assert TRUST_SECONDS - 5 < await redis.ttl(PUBLIC_KEYS) <= TRUST_SECONDS
    wire.keys_away = True
    await keys.refresh()
    assert await redis.get(PUBLIC_KEYS) == kept


def test_the_key_of_a_command_is_the_one_on_the_page_of_names() -> None:
    assert command_key("s", "c") == "dataplane:s:command:c"
