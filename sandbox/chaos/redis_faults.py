"""Faults of Redis, and of those who can do anything with it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from common.streams import Stream
from sandbox.chaos import views
from sandbox.chaos.catalogue import Scene, fault
from sandbox.chaos.redis_server import HOST
from sandbox.chaos.removals import Stretch
from sandbox.chaos.world import PRODUCED, STREAMS, VISIBILITY, World


@fault("redis", weight=2)
async def redis_killed(scene: Scene) -> None:
    """SIGKILL of Redis; it comes back a moment later with what it had on disk.

    Expected: every service waits and goes on by itself; nothing confirmed is lost (`appendfsync always`).
    """
    redis = scene.world.redis
    redis.kill()
    await asyncio.sleep(scene.random.uniform(0.0, 3.0))
    await redis.start()
    scene.saw("restarts")


@fault("redis")
async def redis_paused(scene: Scene) -> None:
    """SIGSTOP of Redis for longer than the lease and the socket timeout; then SIGCONT.

    Expected: every service waits; a call whose reply was lost is made again and changes nothing twice.
    """
    redis = scene.world.redis
    redis.pause()
    try:
        await asyncio.sleep(VISIBILITY + scene.random.uniform(0.5, 3.0))
    finally:
        redis.resume()
    scene.saw("pauses")


@fault("redis")
async def redis_slow(scene: Scene) -> None:
    """Redis works for 20 ms and stands for 80 ms, for five seconds.

    Expected: slower; nothing else.
    """
    redis, until = scene.world.redis, time.monotonic() + 5.0
    try:
        while time.monotonic() < until:
            redis.pause()
            await asyncio.sleep(0.08)
            redis.resume()
            await asyncio.sleep(0.02)
            scene.saw("stops")
    finally:
        redis.resume()


@fault("redis")
async def redis_connections_killed(scene: Scene) -> None:
    """CLIENT KILL of every connection, ten times within two seconds.

    Expected: everybody connects again; what a read had delivered to nobody is found.
    """
    for _ in range(10):
        with suppress(RedisError):
            scene.saw("connections killed", await scene.world.redis.command("CLIENT KILL", "TYPE", "normal"))
        await asyncio.sleep(0.2)


@fault("redis")
async def redis_clients_paused(scene: Scene) -> None:
    """CLIENT PAUSE, of all commands or of writes alone, for two seconds or longer than the lease.

    Expected: as while Redis hangs.
    """
    seconds = scene.random.choice((2.0, VISIBILITY + 1.5))
    await scene.world.redis.command(
        "CLIENT", "PAUSE", int(seconds * 1000), scene.random.choice(("ALL", "WRITE"))
    )
    await asyncio.sleep(seconds)
    scene.saw("pauses")


@fault("redis")
async def redis_flushed(scene: Scene) -> None:
    """FLUSHALL under load: streams, groups, dead letters, ledgers, the turn and the memory of commands are gone.

    Expected: what was in the streams is lost by somebody else's hand, and exactly that; the groups are made again,
    the books begin anew, and what is written from then on is delivered.
    """
    script = """
local reply = {}
for i = 1, #KEYS do
  reply[i] = {}
  for _, row in ipairs(redis.call('XRANGE', KEYS[i], '-', '+')) do table.insert(reply[i], row[1]) end
end
redis.call('FLUSHALL')
return reply
"""
    world = scene.world
    names = [STREAMS[service].name for service in PRODUCED]
    async with world.connected() as redis:
        gone = await _eval(redis, script, names)
    world.removals.all_gone()
    for name, ids in zip(names, gone, strict=True):
        world.removals.stream_gone(name, scene.fault, [one.decode() for one in ids])
        scene.saw("entries taken", len(ids))


@fault("redis")
async def stream_deleted(scene: Scene) -> None:
    """DEL of one stream under load, with both its groups.

    Expected: what was in it is lost by somebody else's hand, and exactly that; the groups are made again, the
    books begin anew, and what is written from then on is delivered.
    """
    script = """
local reply = {}
for _, row in ipairs(redis.call('XRANGE', KEYS[1], '-', '+')) do table.insert(reply, row[1]) end
redis.call('DEL', KEYS[1])
return reply
"""
    name = STREAMS[scene.random.choice(PRODUCED)].name
    async with scene.world.connected() as redis:
        gone = await _eval(redis, script, [name])
    scene.world.removals.stream_gone(name, scene.fault, [one.decode() for one in gone])
    scene.saw("entries taken", len(gone))


@fault("redis")
async def live_group_destroyed(scene: Scene) -> None:
    """XGROUP DESTROY of a live group under load: who has what is forgotten.

    Expected: it is made again from the stream's beginning; what was pending is delivered again under the same key,
    what is dead stays dead, and nothing is lost.
    """
    stream = STREAMS[scene.random.choice(PRODUCED)]
    scene.saw("groups", await scene.world.redis.command("XGROUP", "DESTROY", stream.name, stream.group))


@fault("redis")
async def dead_group_destroyed(scene: Scene) -> None:
    """XGROUP DESTROY of a twin group: the dead-letter view is gone, its entries and documents are still there.

    Expected: the view is made again with all that was in it.
    """
    stream = STREAMS[scene.random.choice(PRODUCED)]
    scene.saw("groups", await scene.world.redis.command("XGROUP", "DESTROY", stream.name, stream.dead_group))


@fault("redis")
async def pending_deleted(scene: Scene) -> None:
    """XDEL of up to 20 entries of a stream while they are pending.

    Expected: each is delivered all the same, because it was in hand, or counted as vanished and logged.
    """
    stream = STREAMS[scene.random.choice(PRODUCED)]
    async with _standing(scene.world, stream), scene.world.connected() as redis:
        taken = await views.delete(redis, stream, "pending", 20)
    _took(scene, stream, taken)


@fault("redis")
async def dead_deleted(scene: Scene) -> None:
    """XDEL of up to 5 dead entries of a stream.

    Expected: the janitor clears them from the view within a minute, and counts them as vanished.
    """
    stream = STREAMS[scene.random.choice(PRODUCED)]
    async with scene.world.connected() as redis:
        taken = await views.delete(redis, stream, "dead", 5)
    _took(scene, stream, taken)


@fault("redis")
async def stream_trimmed(scene: Scene) -> None:
    """XTRIM of the 30 oldest entries of a stream, dead, pending or not yet read.

    Expected: what was dead or pending is counted as vanished, what was not yet read is the ledger's imbalance, to
    the entry.
    """
    stream = STREAMS[scene.random.choice(PRODUCED)]
    async with _standing(scene.world, stream), scene.world.connected() as redis:
        taken = await views.trim(redis, stream, 30)
    _took(scene, stream, taken)


@fault("redis")
async def redis_out_of_memory(scene: Scene) -> None:
    """Redis is at its memory limit for four seconds (`maxmemory` 1 MB, noeviction).

    Expected: producers wait, draining goes on; grants and dead letters wait; nothing is lost.
    """
    redis = scene.world.redis
    await redis.command("CONFIG", "SET", "maxmemory", "1mb")
    try:
        await asyncio.sleep(4.0)
    finally:
        await redis.command("CONFIG", "SET", "maxmemory", "0")
    scene.saw("limits")


@fault("redis")
async def redis_disk_full(scene: Scene) -> None:
    """MISCONF for four seconds: a background save fails, so Redis refuses every write, reads of a group included.

    Expected: every service waits and goes on by itself.
    """
    redis = scene.world.redis
    obstacle = redis.directory / "dump.rdb"
    obstacle.unlink(missing_ok=True)
    obstacle.mkdir()  # a file cannot be renamed over a directory
    try:
        await redis.command("CONFIG", "SET", "save", "3600 1")
        await redis.command("BGSAVE")
        failed = await _until_save_failed(redis.command)
        await asyncio.sleep(4.0)
    finally:
        await redis.command("CONFIG", "SET", "save", "")
        obstacle.rmdir()
    scene.saw("refused writes" if failed else "saves that did not fail")


async def _until_save_failed(command: Any) -> bool:
    for _ in range(50):
        about = await command("INFO", "persistence")
        if about.get("rdb_last_bgsave_status") == "err":
            return True
        await asyncio.sleep(0.1)
    return False


@fault("redis")
async def redis_failover(scene: Scene) -> None:
    """The FAILOVER command: a replica that has everything becomes the primary; the old one stays, as a replica.

    Expected: READONLY makes everybody connect again, to the new primary; nothing is lost.
    """
    world, old = scene.world, scene.world.redis
    new = world.new_redis()
    try:
        await new.start("--replicaof", f"{HOST} {old.port}")
        await _replicated(new.command)
        await old.command("FAILOVER", "TO", HOST, new.port)
        await _has_role(new.command, b"master")
        await _swap_ports(world, old, new)
        await asyncio.sleep(1.5)
        scene.saw("failovers")
    finally:
        if world.redis is new:
            old.kill()
        else:
            new.kill()


@fault("redis")
async def redis_failover_after_crash(scene: Scene) -> None:
    """SIGKILL of the primary; its replica takes its place with what had reached it.

    Expected: what had not reached the replica is Redis's own loss, counted apart; nothing else is lost.
    """
    world, old = scene.world, scene.world.redis
    new = world.new_redis()
    await new.start("--replicaof", f"{HOST} {old.port}")
    await _replicated(new.command)
    await asyncio.sleep(1.0)
    old.kill()
    died_at = time.time()
    await new.command("REPLICAOF", "NO", "ONE")
    lost = await _stretches(scene, new.command, died_at)
    port = old.port
    await new.command("CONFIG", "SET", "port", port)
    new.move(port)
    world.redis = new
    world.removals.redis_lost(lost)
    scene.saw("failovers")


async def _swap_ports(world: World, old: Any, new: Any) -> None:
    """The new primary listens where the old one did; those who are connected to the old one stay until they notice."""
    port, other = old.port, new.port
    await old.command("CONFIG", "SET", "port", 0)
    await new.command("CONFIG", "SET", "port", port)
    new.move(port)
    world.redis = new
    old.move(other)


async def _replicated(command: Any) -> None:
    async with asyncio.timeout(20):
        while b"connected" not in (await command("ROLE"))[3:4]:
            await asyncio.sleep(0.05)


async def _has_role(command: Any, role: bytes) -> None:
    async with asyncio.timeout(20):
        while True:
            with suppress(RedisError):
                if (await command("ROLE"))[0] == role:
                    return
            await asyncio.sleep(0.02)


def _no_witness(world: World) -> str | None:
    return None if world.witness else "there is no C compiler to build the fsync witness with"


@fault("redis", impossible=_no_witness)
async def redis_power_lost(scene: Scene) -> None:
    """SIGKILL of Redis, and only what was fsynced is left of its append-only file, under `appendfsync always`.

    Expected: nothing confirmed is lost.
    """
    redis = scene.world.redis
    scene.saw("bytes cut off", redis.lose_power())
    await redis.start()
    scene.saw("restarts")


@fault("redis", impossible=_no_witness)
async def redis_power_lost_everysec(scene: Scene) -> None:
    """The same after three seconds of `appendfsync everysec`, which is not what the agent is shipped with.

    Expected: what was written since the last fsync is Redis's own loss, counted apart; nothing else is lost.
    """
    redis = scene.world.redis
    await redis.command("CONFIG", "SET", "appendfsync", "everysec")
    await asyncio.sleep(3.0 + scene.random.random())
    scene.saw("bytes cut off", redis.lose_power())
    died_at = time.time()
    # On another port, so that nobody writes before we have looked.
    port = redis.port
    redis.move(scene.world.spare_port)
    await redis.start()
    lost = await _stretches(scene, redis.command, died_at)
    await redis.command("CONFIG", "SET", "port", port)
    redis.move(port)
    scene.world.removals.redis_lost(lost)
    scene.saw("restarts")


async def _stretches(scene: Scene, command: Any, died_at: float) -> list[Stretch]:
    """What was written after the last entry that Redis still knows, in each stream."""
    stretches = []
    for service in PRODUCED:
        name = STREAMS[service].name
        about = await command("XINFO STREAM", name)
        kept = about["last-generated-id"].decode()
        stretches.append(Stretch(name, kept, int(died_at * 1000), scene.fault))
    return stretches


@asynccontextmanager
async def _standing(world: World, stream: Stream) -> AsyncIterator[None]:
    """The stream's services stand still, with requests out and more to read: so entries lie in every place."""
    service = next(name for name, one in STREAMS.items() if one is stream)
    replicas = [replica for replica in world.of(service) if not replica.busy]
    async with world.faulty({"kind": "latency", "seconds": 2.0}):
        await asyncio.sleep(1.0)
        for replica in replicas:
            replica.busy = True
            replica.pause()
        try:
            await asyncio.sleep(VISIBILITY / 3)
            yield
        finally:
            for replica in replicas:
                replica.resume()
                replica.busy = False


def _took(scene: Scene, stream: Stream, taken: dict[str, views.Place]) -> None:
    unread = sum(place == "unread" for place in taken.values())
    scene.world.removals.took(stream.name, scene.fault, taken, unread=unread)
    for place in taken.values():
        scene.saw(f"{place} taken")


async def _eval(redis: Redis, script: str, keys: Sequence[str]) -> Any:
    answer: Any = redis.eval(script, len(keys), *keys)
    return await answer
