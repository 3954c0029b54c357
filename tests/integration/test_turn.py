"""The turn: at most one holder, found out of memory too, and a token that says whose it is."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from common.redis_border import Away, RedisFault, Scripts
from common.turn import Turn
from tests.integration.workbench import LosesReplies, out_of_memory
from tests.support import RedisServer, eventually

KEY = "{stream}:turn"
TTL_MS = 60_000


async def take(redis: Redis, token: str, ttl_ms: int = TTL_MS) -> int:
    return int(await Scripts(redis).run("turn_take", [KEY], [token, ttl_ms]))


async def give_up(redis: Redis, token: str) -> int:
    return int(await Scripts(redis).run("turn_give_up", [KEY], [token]))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def turn(redis: Redis, token: str = "me", ttl: float = 60.0, clock: Clock | None = None) -> Turn:
    return Turn(Scripts(redis), KEY, token, ttl, clock=clock or Clock())


# -- the scripts -------------------------------------------------------------------------------------


async def test_the_turn_is_taken_once_renewed_by_its_holder_and_refused_to_others(redis: Redis) -> None:
    assert await take(redis, "a") == 2
    await redis.pexpire(KEY, 1000)
    assert await take(redis, "b") == 0
    assert await redis.pttl(KEY) <= 1000  # who is refused renews nothing
    assert await take(redis, "a") == 1
    assert await redis.pttl(KEY) > 1000
    assert await redis.get(KEY) == b"a"


async def test_the_turn_is_given_up_by_its_holder_alone(redis: Redis) -> None:
    await take(redis, "a")
    assert await give_up(redis, "b") == 0
    assert await redis.get(KEY) == b"a"
    assert await give_up(redis, "a") == 1
    assert await give_up(redis, "a") == 0
    assert await take(redis, "b") == 2


async def test_a_turn_that_is_not_renewed_ends_by_itself(redis: Redis) -> None:
    await take(redis, "a", ttl_ms=20)
    await eventually(lambda: take(redis, "b"))
    assert await redis.get(KEY) == b"b"


async def test_out_of_memory_the_turn_is_found_renewed_and_given_up(redis: Redis) -> None:
    async with out_of_memory(redis):
        assert await take(redis, "a") == 2
        assert await take(redis, "a") == 1
        assert await take(redis, "b") == 0
        assert await give_up(redis, "a") == 1
        assert await take(redis, "b") == 2


# -- the class ---------------------------------------------------------------------------------------


async def test_of_many_who_ask_one_holds(redis: Redis) -> None:
    turns = [turn(redis, f"process-{n}") for n in range(20)]
    assert sum(await asyncio.gather(*(one.ask() for one in turns))) == 1
    assert sum(await asyncio.gather(*(one.ask() for one in turns))) == 1
    assert sum(one.era for one in turns) == 1


async def test_who_finds_somebody_elses_token_has_lost_the_turn(redis: Redis) -> None:
    mine = turn(redis)
    await mine.ask()
    await redis.set(KEY, "somebody")
    assert not await mine.ask()
    assert not mine.held
    await redis.delete(KEY)
    assert await mine.ask()
    assert mine.era == 2


async def test_who_takes_a_turn_it_thought_it_held_begins_a_new_era(redis: Redis) -> None:
    """It had run out: between the two somebody else may have held it."""
    mine = turn(redis)
    await mine.ask()
    await redis.delete(KEY)
    assert await mine.ask()
    assert mine.era == 2


async def test_a_turn_is_fresh_for_half_its_time_to_live_from_before_the_call(redis: Redis) -> None:
    clock = Clock()
    mine = turn(redis, ttl=10.0, clock=clock)
    assert not mine.fresh
    await mine.ask()
    clock.now += 4.9
    assert mine.fresh
    clock.now += 0.2
    assert (mine.fresh, mine.held) == (False, True)
    await mine.ask()
    assert mine.fresh


async def test_a_slow_answer_makes_no_turn_fresher_than_it_is(
    redis: Redis, redis_server: RedisServer
) -> None:
    clock = Clock()
    mine = turn(redis, ttl=10.0, clock=clock)
    await mine.ask()
    redis_server.pause()
    try:
        asking = asyncio.create_task(mine.ask())
        await asyncio.sleep(0)
        clock.now += 6.0
    finally:
        redis_server.resume()
    assert await asking
    assert not mine.fresh


async def test_what_is_given_up_is_not_taken_back_by_an_answer_under_way(
    redis: Redis, redis_server: RedisServer
) -> None:
    mine = turn(redis)
    await mine.ask()
    redis_server.pause()
    try:
        asking, giving = asyncio.create_task(mine.ask()), asyncio.create_task(mine.give_up())
        await asyncio.sleep(0)
    finally:
        redis_server.resume()
    await giving
    await asking
    assert not mine.held
    assert await redis.get(KEY) is None
    assert not await mine.ask()
    assert await redis.get(KEY) is None


async def test_while_redis_is_away_a_turn_ends_with_its_time_to_live(redis: Redis) -> None:
    clock = Clock()
    scripts = LosesReplies(redis)
    mine = Turn(scripts, KEY, "me", 0.03, clock=clock)
    faults: list[RedisFault] = []
    answered = 0

    def answer() -> None:
        nonlocal answered
        answered += 1

    def on_fault(fault: RedisFault) -> float:
        faults.append(fault)
        clock.now += 0.02
        return 5.0  # however long the others wait, who holds the turn asks in time

    running = asyncio.create_task(mine.run(on_fault, answer))
    try:
        async with asyncio.timeout(5):
            await mine.taken.wait()
            scripts.lose["turn_take"] = 4
            while mine.held:
                await asyncio.sleep(0.001)
            assert len(faults) in (3, 4)  # lost, it is asked for again at once
            assert isinstance(faults[0], Away)
            await mine.taken.wait()
        assert (mine.era, answered > 1) == (2, True)
    finally:
        running.cancel()
        await asyncio.wait([running])


@pytest.mark.parametrize("given_up", [False, True])
async def test_the_task_ends_when_the_turn_is_given_up(redis: Redis, given_up: bool) -> None:
    mine = turn(redis, ttl=0.03)
    running = asyncio.create_task(mine.run(lambda fault: 0.1, lambda: None))
    await mine.taken.wait()
    if given_up:
        await mine.give_up()
    else:
        running.cancel()
    await asyncio.wait([running], timeout=5)
    assert running.done()
