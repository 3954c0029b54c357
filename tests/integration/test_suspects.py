"""Suspects (law 8): what has been through two crashes is delivered alone, until it has proven harmless or poison."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from common import dead_letters
from common.outcomes import Cause, Reason, Retry
from tests.integration.workbench import (
    LATER,
    STREAM,
    Consuming,
    State,
    Told,
    add,
    consuming,
    imbalance,
    lay,
    new_gate,
    pending_of,
    settled,
    state,
)
from tests.support import RedisServer, eventually


def suspected(count: int = 3) -> dict[str, tuple[str, int]]:
    return {"1-0": ("dead", count)}


async def test_a_suspect_is_delivered_alone_and_its_count_is_written_before(
    redis: Redis, redis_server: RedisServer
) -> None:
    await lay(redis, live=suspected(), data=b"suspect")
    handler, gate = Told(), new_gate()
    handler.slow = {"a": asyncio.Event(), "suspect": asyncio.Event()}
    async with consuming(redis_server.port, handler, claim_interval=60.0, gate=gate) as me:
        await eventually(lambda: handler.begun == [("1-0",)], every=0.002)
        ids = await add(redis, "a", "b")
        await eventually(lambda: len(me.consumer.hand) == 3)
        assert handler.begun == [("1-0",)]  # nothing beside it
        assert (await state(redis)).live == {"1-0": ("me", 4), ids[0]: ("me", 1), ids[1]: ("me", 1)}
        handler.slow["suspect"].set()
        await handler.until_begun(3)
        handler.let_go()
        await settled(redis, 3)
    assert await imbalance(redis) == 0


async def test_a_suspect_waits_until_nothing_else_is_in_flight(
    redis: Redis, redis_server: RedisServer
) -> None:
    await lay(redis, live=suspected(), backlog=["2-0"], idle=0)
    handler = Told()
    handler.hold_all()
    async with consuming(redis_server.port, handler, visibility_timeout=0.3) as me:
        await handler.until_begun(1)
        await add(redis, "more")
        await eventually(lambda: b"1-0" in me.consumer.hand)
        assert "1-0" not in handler.delivered_ids
        handler.let_go()
        await settled(redis, 3)
    assert handler.begun[-1] == ("1-0",)


@pytest.mark.parametrize("batch", [1, 4])
async def test_suspects_are_delivered_one_by_one(redis: Redis, redis_server: RedisServer, batch: int) -> None:
    await lay(redis, live={f"{n}-0": ("dead", 2) for n in range(1, 6)}, backlog=["6-0", "7-0"])
    handler = Told(batch=batch)
    async with consuming(redis_server.port, handler):
        await settled(redis, 7)
    alone = [request for request in handler.begun if int(request[0].split("-")[0]) <= 5]
    assert [len(request) for request in alone] == [1] * 5
    assert sorted(handler.delivered_ids) == [f"{n}-0" for n in range(1, 8)]
    assert handler.most_in_flight <= 2


async def test_what_has_killed_often_enough_dies_of_it_without_another_delivery(
    redis: Redis, redis_server: RedisServer
) -> None:
    await lay(redis, live=suspected(3 + 5), backlog=["2-0"])
    handler = Told()
    async with consuming(redis_server.port, handler) as me:
        await eventually(lambda: me.tally.dead[Reason.POISON])
        await settled(redis, 1)
    assert handler.delivered_ids == ["2-0"]
    assert await state(redis) == State(
        entries=["1-0"],
        dead={"1-0": ("poison", 5)},
        documents=["1-0"],
        ledger={"dead:poison": 1, "delivered": 1},
    )


async def test_a_poisonous_entrys_attempts_are_the_deaths_that_it_caused(
    redis: Redis, redis_server: RedisServer
) -> None:
    await lay(redis, live=suspected(3 + 5))
    async with consuming(redis_server.port, Told()) as me:
        await eventually(lambda: me.tally.dead[Reason.POISON])
    (letter,) = [letter async for letter in dead_letters.find(redis, STREAM)]
    assert (letter.reason, letter.attempts) == ("poison", 5)


async def test_one_death_below_the_limit_it_is_delivered_once_more(
    redis: Redis, redis_server: RedisServer
) -> None:
    await lay(redis, live=suspected(3 + 4))
    async with consuming(redis_server.port, Told()):
        await settled(redis, 1)


async def test_every_death_alone_is_one_more_on_the_count(redis: Redis, redis_server: RedisServer) -> None:
    await lay(redis, live=suspected(1))
    counts = []
    for n in range(4):
        handler = Told()
        handler.hold_all()
        name = f"victim-{n}"
        async with consuming(redis_server.port, handler, name=name, visibility_timeout=0.2):
            await handler.until_begun(1)
            counts.append((await pending_of(redis, name))["1-0"])
    assert counts == [2, 4, 5, 6]  # one crash, then suspected: died alone once, twice, …


async def test_a_suspect_that_was_answered_starts_anew(redis: Redis, redis_server: RedisServer) -> None:
    await lay(redis, live=suspected(5), data=b"a")
    handler = Told()
    handler.answers = {"a": [LATER]}
    async with consuming(redis_server.port, handler, visibility_timeout=0.3):
        await handler.until(lambda: handler.ended)

        async def anew() -> bool:
            return (await state(redis)).live == {"1-0": ("me", 1)}

        await eventually(anew)


async def test_a_suspect_that_was_not_sent_keeps_its_count(redis: Redis, redis_server: RedisServer) -> None:
    await lay(redis, live=suspected(4), data=b"a")
    handler, gate = Told(), new_gate()
    handler.hold_all()
    handler.answers = {"a": [Retry(Cause.HELD, "HTTP 401", 401)]}
    async with consuming(redis_server.port, handler, gate=gate, visibility_timeout=0.3):
        await handler.until_begun(1)
        assert (await state(redis)).live == {"1-0": ("me", 5)}
        ticket = gate.enter()
        assert ticket is not None
        gate.refused(ticket, "auth", "HTTP 401")
        handler.let_go()

        async def as_before() -> bool:
            return (await state(redis)).live == {"1-0": ("me", 4)}

        await eventually(as_before)
        gate.lift()
        await settled(redis, 1)


async def test_a_suspect_held_although_the_gate_is_open_is_alone_again_later(
    redis: Redis, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.delivery.HELD_AGAIN_AFTER", 0.1)
    await lay(redis, live=suspected(), data=b"a")
    handler = Told(batch=4)
    handler.answers = {"a": [Retry(Cause.HELD, "HTTP 403", 403)]}
    handler.slow = {"slow": asyncio.Event()}
    async with consuming(redis_server.port, handler, max_in_flight=1) as me:
        await handler.until_begun(1)
        await add(redis, "slow", "a", "a", "a")
        await handler.until_begun(2)
        await eventually(lambda: len(me.consumer.hand) == 5)
        await asyncio.sleep(0.2)  # the held one is woken while others of its session are ready
        handler.let_go()
        await settled(redis, 5)
    assert sorted(len(request) for request in handler.begun) == [1, 1, 1, 3]
    assert handler.begun.count(("1-0",)) == 2


async def test_a_suspect_whose_call_to_redis_failed_is_tried_again_alone(
    redis: Redis, redis_server: RedisServer
) -> None:
    await lay(redis, live=suspected())
    handler = Told()
    handler.hold_all()

    def fails(me: Consuming) -> None:
        me.scripts.lose.update({"renew": 1, "fetch": 1})

    async with consuming(redis_server.port, handler, before=fails):
        await handler.until_begun(1)
        assert (await state(redis)).live == {"1-0": ("me", 4)}
