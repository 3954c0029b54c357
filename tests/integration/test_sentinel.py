"""The sentinel: what a whole stream lost is counted once, by whoever notices, and what is not lost by nobody."""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable

import pytest
from redis.asyncio import Redis

from common import figures, ledger, logs
from common.redis_border import Scripts
from common.sentinel import Sentinel
from common.streams import GREATEST_ID
from tests.integration.workbench import (
    STREAM,
    Counts,
    Told,
    add,
    consuming,
    imbalance,
    make_groups,
    out_of_memory,
    settle,
    settled,
)
from tests.support import RedisServer, connect, eventually


class Lines:
    """A logger whose lines can be read: level, event, facts."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str, dict[str, object]]] = []

    def error(self, event: str, **facts: object) -> None:
        self.said.append(("error", event, facts))

    def info(self, event: str, **facts: object) -> None:
        self.said.append(("info", event, facts))

    def events(self) -> list[str]:
        return [event for _, event, _ in self.said]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Lines:
    """What all sentinels of a test say."""
    said = Lines()
    monkeypatch.setitem(logs._loggers, "sentinel", said)  # type: ignore[misc]
    return said


class Replica:
    """What one process knows and counts."""

    def __init__(self, redis: Redis, name: str = "a") -> None:
        self.redis = redis
        self.counts = Counts()
        self._sentinel = Sentinel(Scripts(redis), STREAM, name, self.counts)

    async def look(self) -> bool:
        return await self._sentinel.look()


async def three_replicas(redis: Redis) -> list[Replica]:
    await make_groups(redis)
    return [Replica(redis, name) for name in "abc"]


async def lost(redis: Redis) -> int:
    return (await ledger.read(redis, STREAM)).get("lost", 0)


async def remake(redis: Redis) -> None:
    keys = [STREAM.name, STREAM.ledger_key, STREAM.dead_key]
    assert await Scripts(redis).run("make_groups", keys, [STREAM.group, STREAM.dead_group, GREATEST_ID]) == [
        1,
        1,
    ]


async def begin_again(redis: Redis, replica: Replica) -> None:
    """As a consumer does it when its group has gone."""
    await remake(redis)
    assert await replica.look()


async def read_and_settle(redis: Redis, *ids: str) -> None:
    await redis.xreadgroup(STREAM.group, "me", {STREAM.name: ">"})
    assert await settle(redis, *ids) == len(ids)


async def everything(redis: Redis) -> dict[bytes, object]:
    """All there is about the stream, to see that nothing has changed."""
    dump = {key: await redis.dump(key) for key in sorted(await redis.keys("*"))}
    return {**dump}


# -- the stream was deleted, or everything was flushed --------------------------------------------------


async def delete(redis: Redis) -> None:
    await redis.delete(STREAM.name)


async def flush(redis: Redis) -> None:
    await redis.flushall()


GONE: dict[str, Callable[[Redis], Awaitable[None]]] = {"DEL": delete, "FLUSHALL": flush}


@pytest.mark.parametrize("goes", GONE.values(), ids=GONE)
async def test_what_went_with_the_stream_is_counted_once_by_whoever_makes_it_again(
    redis: Redis, lines: Lines, goes: Callable[[Redis], Awaitable[None]]
) -> None:
    first, second, third = await three_replicas(redis)
    ids = await add(redis, *"abcde")
    await read_and_settle(redis, *ids[:2])
    for replica in (first, second, third):
        await replica.look()
    await goes(redis)
    await begin_again(redis, first)
    assert (first.counts.lost, await lost(redis)) == (3, 3)
    before = await everything(redis)
    await second.look()
    await third.look()
    await first.look()
    assert await everything(redis) == before
    assert second.counts.lost == third.counts.lost == 0
    facts = {"stream": STREAM.name, "seen": 5, "now": 0, "lost": 3, "books_begun_anew": True}
    assert lines.said == [("error", "stream.went_back", facts)]
    assert await imbalance(redis) == 0


@pytest.mark.parametrize("goes", GONE.values(), ids=GONE)
async def test_while_the_groups_are_missing_nobody_looks_and_nothing_is_forgotten(
    redis: Redis, goes: Callable[[Redis], Awaitable[None]]
) -> None:
    first, second, _ = await three_replicas(redis)
    await add(redis, *"abc")
    await first.look()
    await second.look()
    await goes(redis)
    await second.look()
    await add(redis, "early")  # a producer is sooner than the groups
    await second.look()
    assert await lost(redis) == 0
    await begin_again(redis, first)
    assert (await lost(redis), await imbalance(redis)) == (3, 0)


async def test_a_deleted_stream_is_noticed_by_a_process_that_never_saw_it(redis: Redis) -> None:
    first, second, _ = await three_replicas(redis)
    ids = await add(redis, *"abcde")
    await first.look()
    await read_and_settle(redis, ids[0])
    await redis.delete(STREAM.name)
    await begin_again(redis, second)
    assert (second.counts.lost, await lost(redis)) == (4, 4)


async def test_of_a_deleted_stream_what_was_delivered_from_the_next_one_is_not_taken_for_its_end(
    redis: Redis,
) -> None:
    first, *_ = await three_replicas(redis)
    ids = await add(redis, *"abcde")
    await read_and_settle(redis, ids[0])
    await first.look()
    await redis.delete(STREAM.name)
    (new, _) = await add(redis, "x", "y")
    await remake(redis)
    await read_and_settle(redis, new)
    assert await first.look()
    assert (await lost(redis), await imbalance(redis)) == (4, 0)


async def test_a_deleted_stream_is_noticed_when_the_next_one_has_outgrown_it(redis: Redis) -> None:
    first, *_ = await three_replicas(redis)
    ids = await add(redis, *"abcde")
    await read_and_settle(redis, *ids[:3])
    await first.look()
    await redis.delete(STREAM.name)
    await add(redis, *"uvwxyz")
    await begin_again(redis, first)
    assert (await lost(redis), await imbalance(redis)) == (2, 0)


async def test_dead_letters_of_a_deleted_stream_have_vanished_and_are_not_lost_a_second_time(
    redis: Redis,
) -> None:
    first, *_ = await three_replicas(redis)
    dead, *_ = await add(redis, *"abc")
    await redis.xreadgroup(STREAM.group, "me", {STREAM.name: ">"})
    keys = [STREAM.name, STREAM.dead_key, STREAM.ledger_key]
    args: list[str | int] = [STREAM.group, STREAM.dead_group, "me", "", dead, "rejected", 1, "{}"]
    assert await Scripts(redis).run("bury", keys, args) == [1]
    await first.look()
    await redis.delete(STREAM.name)
    await begin_again(redis, first)
    books = await ledger.read(redis, STREAM)
    assert (books["vanished"], books["lost"]) == (1, 2)
    assert await imbalance(redis) == 0


async def test_a_stream_that_goes_twice_is_counted_twice(redis: Redis) -> None:
    first, second, _ = await three_replicas(redis)
    for total in (2, 4):
        await add(redis, *"ab")
        await first.look()
        await second.look()
        await redis.delete(STREAM.name)
        await begin_again(redis, second)
        await first.look()
        assert await lost(redis) == total
    assert (first.counts.lost, second.counts.lost) == (0, 4)


async def test_a_first_start_on_a_stream_in_use_loses_nothing(redis: Redis, lines: Lines) -> None:
    await add(redis, *"abcde")
    await redis.xtrim(STREAM.name, maxlen=2, approximate=False)
    await make_groups(redis)
    assert (await lost(redis), await imbalance(redis), lines.said) == (0, 0, [])


async def test_books_from_before_there_was_a_sentinel_have_lost_nothing(redis: Redis, lines: Lines) -> None:
    first, *_ = await three_replicas(redis)
    await read_and_settle(redis, *await add(redis, *"abc"))
    await first.look()
    await redis.delete(STREAM.seen_key)
    await first.look()
    assert (await lost(redis), lines.said) == (0, [])


async def test_a_group_that_was_destroyed_loses_nothing(redis: Redis, lines: Lines) -> None:
    first, *_ = await three_replicas(redis)
    await add(redis, *"abc")
    await first.look()
    await redis.xgroup_destroy(STREAM.name, STREAM.group)
    await make_groups(redis)
    await first.look()
    assert (await lost(redis), lines.said) == (0, [])


# -- Redis came back with less ---------------------------------------------------------------------------


class Rolling:
    """A server that can come back as it was: its append-only file is kept and put back."""

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._live = server.directory / "appendonlydir"
        self._kept = server.directory / "kept"

    def keep(self) -> None:
        """What a power failure will leave."""
        shutil.rmtree(self._kept, ignore_errors=True)
        shutil.copytree(self._live, self._kept)

    async def roll_back(self, redis: Redis) -> None:
        await redis.connection_pool.disconnect()
        self._server.kill()
        shutil.rmtree(self._live)
        shutil.copytree(self._kept, self._live)
        self._server.start()


@pytest.fixture
def rolling(durable_redis: RedisServer) -> Rolling:
    return Rolling(durable_redis)


@pytest.mark.parametrize("written_since", [0, 1, 50], ids=["nothing", "less than was lost", "more"])
async def test_a_roll_back_is_noticed_however_much_was_written_since_and_counted_once(
    durable_redis: RedisServer, rolling: Rolling, lines: Lines, written_since: int
) -> None:
    async with connect(durable_redis.port) as redis:
        first, second, third = await three_replicas(redis)
        ids = await add(redis, *"abcde")
        await read_and_settle(redis, *ids)
        await add(redis, *"fg")
        for replica in (first, second, third):
            await replica.look()
        rolling.keep()
        await add(redis, *"hij")
        for replica in (first, second):  # the third has not looked since: it misses nothing
            await replica.look()
        await rolling.roll_back(redis)
        await add(redis, *("x",) * written_since)
        for replica in (third, first, second, Replica(redis, "new"), third, first):
            await replica.look()
        assert await lost(redis) == 3
        assert [replica.counts.lost for replica in (first, second, third)] == [3, 0, 0]
        facts = {
            "stream": STREAM.name,
            "seen": 10,
            "now": 7 + written_since,
            "lost": 3,
            "books_begun_anew": False,
        }
        assert lines.said == [("error", "stream.went_back", facts)]
        assert await imbalance(redis) == 0


async def test_of_what_was_rolled_back_no_more_is_lost_than_was_there(
    durable_redis: RedisServer, rolling: Rolling, lines: Lines
) -> None:
    async with connect(durable_redis.port) as redis:
        first, *_ = await three_replicas(redis)
        rolling.keep()
        ids = await add(redis, *"abcde")
        await read_and_settle(redis, *ids[:4])
        await first.look()
        await rolling.roll_back(redis)
        await first.look()
        assert (first.counts.lost, lines.events()) == (1, ["stream.went_back"])


async def test_a_restart_that_lost_nothing_is_no_loss(durable_redis: RedisServer, lines: Lines) -> None:
    async with connect(durable_redis.port) as redis:
        first, *_ = await three_replicas(redis)
        await read_and_settle(redis, *await add(redis, *"abc"))
        await first.look()
        await add(redis, "d")
        await redis.connection_pool.disconnect()
        durable_redis.restart()
        await first.look()
        assert (await lost(redis), lines.said) == (0, [])


async def test_a_note_alone_that_was_lost_is_no_loss_while_its_entry_is_there(
    durable_redis: RedisServer, rolling: Rolling, lines: Lines
) -> None:
    async with connect(durable_redis.port) as redis:
        first, *_ = await three_replicas(redis)
        await add(redis, *"abc")
        rolling.keep()
        await first.look()
        await rolling.roll_back(redis)
        await first.look()
        assert (await lost(redis), lines.said) == (0, [])


async def test_a_roll_back_that_takes_its_own_count_along_is_counted_again(
    durable_redis: RedisServer, rolling: Rolling
) -> None:
    async with connect(durable_redis.port) as redis:
        first, second, _ = await three_replicas(redis)
        rolling.keep()
        await add(redis, *"abc")
        await first.look()
        await second.look()
        await rolling.roll_back(redis)
        await first.look()
        assert await lost(redis) == 3
        await add(redis, *"de")
        await first.look()
        await rolling.roll_back(redis)
        await second.look()
        await first.look()
        assert first.counts.lost + second.counts.lost - 3 == await lost(redis) > 0


async def test_who_may_not_ask_which_run_of_the_server_this_is_notices_what_it_can(redis: Redis) -> None:
    port = redis.connection_pool.connection_kwargs["port"]
    await redis.execute_command("ACL", "SETUSER", "few", "on", ">x", "~*", "+@all", "-info")
    try:
        async with connect(port, username="few", password="x") as few:
            await make_groups(few)
            replica = Replica(few)
            await add(few, *"abc")
            await replica.look()
            await redis.flushall()
            await begin_again(few, replica)
            assert replica.counts.lost == 3
    finally:
        await redis.execute_command("ACL", "DELUSER", "few")


# -- the imbalance, and limits -----------------------------------------------------------------------------


async def test_each_rise_of_the_imbalance_is_an_error_once_over_all_replicas(
    redis: Redis, lines: Lines
) -> None:
    first, second, _ = await three_replicas(redis)
    ids = await add(redis, *"abcdefgh")
    for taken in (ids[:3], ids[3:4]):
        await redis.xdel(STREAM.name, *taken)
        for replica in (second, first, second, Replica(redis, "new")):
            await replica.look()
    assert lines.said == [
        ("error", "ledger.imbalance", {"stream": STREAM.name, "imbalance": 3, "more": 3}),
        ("error", "ledger.imbalance", {"stream": STREAM.name, "imbalance": 4, "more": 1}),
    ]
    assert (await figures.read(Scripts(redis), STREAM)).imbalance == 4


async def test_an_imbalance_that_falls_alarms_nobody(redis: Redis, lines: Lines) -> None:
    first, *_ = await three_replicas(redis)
    ids = await add(redis, *"ab")
    await redis.xreadgroup(STREAM.group, "me", {STREAM.name: ">"})
    await redis.xdel(STREAM.name, *ids)
    await first.look()
    args: list[str | int] = [STREAM.group, "me", 1000, *ids]
    await Scripts(redis).run("fetch", [STREAM.name, STREAM.ledger_key], args)
    await first.look()
    assert [(level, event) for level, event, _ in lines.said] == [
        ("error", "ledger.imbalance"),
        ("info", "ledger.imbalance_fell"),
    ]


async def test_an_operator_who_has_taken_note_moves_the_base_and_the_books_add_up_again(
    redis: Redis, lines: Lines
) -> None:
    first, *_ = await three_replicas(redis)
    ids = await add(redis, *"abcd")
    await redis.xdel(STREAM.name, *ids[:3])
    await first.look()
    await redis.hincrby(STREAM.ledger_key, "base", 3)
    await first.look()
    assert (await imbalance(redis), await lost(redis)) == (0, 0)
    assert lines.events() == ["ledger.imbalance", "ledger.imbalance_fell"]


async def test_while_redis_is_full_nothing_is_noted_and_nothing_is_forgotten(redis: Redis) -> None:
    first, *_ = await three_replicas(redis)
    await add(redis, *"abc")
    await first.look()
    await add(redis, "d")
    async with out_of_memory(redis):
        await first.look()
    await redis.delete(STREAM.name)
    await begin_again(redis, first)
    assert await lost(redis) == 3


async def test_an_idle_stream_is_looked_at_without_a_write(redis: Redis) -> None:
    first, second, _ = await three_replicas(redis)
    await add(redis, *"abc")
    for replica in (first, second):
        await replica.look()
    before = (await redis.info("persistence"))["rdb_changes_since_last_save"]
    for replica in (first, second):
        await replica.look()
    assert (await redis.info("persistence"))["rdb_changes_since_last_save"] == before


# -- a consumer that runs ------------------------------------------------------------------------------------


async def test_a_consumer_that_makes_its_groups_again_counts_what_was_taken(
    redis: Redis, redis_server: RedisServer, lines: Lines
) -> None:
    handler = Told()
    async with consuming(redis_server.port, handler) as me:
        await add(redis, *"abc")
        await handler.until_begun(3)
        await me.consumer.sentinel.look()
        await redis.delete(STREAM.name)
        await eventually(lambda: me.tally.lost)
        handler.let_go()
        await add(redis, "d")
        await settled(redis, 1)
    assert (await lost(redis), lines.events()) == (3, ["stream.went_back"])
    assert await imbalance(redis) == 0
