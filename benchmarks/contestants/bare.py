"""The bare loop, the yardstick: read 500, post them with 64 in flight, acknowledge and delete them; nothing else.

The same libraries as the agent's: redis-py with hiredis, its HTTP client as its transport makes it, uvloop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import uvloop
from redis.asyncio import Redis

from benchmarks.contestants.surroundings import CA, CONSUMER, IN_FLIGHT, READ, REDIS, URL
from benchmarks.load import GROUP, USAGE
from common.config import ControlPlane, Secret
from common.control_plane.transport import Transport


async def main() -> None:
    settings = ControlPlane(base_url=URL, api_key=Secret("benchmark-key"), ca_file=CA)
    http: Any = Transport(settings, "bare-loop")._build()
    redis = Redis.from_url(REDIS, protocol=2)
    try:
        await redis.xgroup_create(USAGE, GROUP, id="0")
    except Exception as error:
        if "BUSYGROUP" not in str(error):
            raise

    async def work(rows: deque[tuple[bytes, dict[bytes, bytes]]]) -> None:
        while rows:
            entry_id, fields = rows.popleft()
            headers = {"Content-Type": "application/json", "Idempotency-Key": entry_id.decode()}
            request = http.post(URL).headers(headers).body_bytes(fields[b"data"]).build()
            response = await request.send()
            if response.status != 200:
                raise RuntimeError(f"answered {response.status}")

    while True:
        read: Any = await redis.xreadgroup(GROUP, CONSUMER, {USAGE: ">"}, count=READ, block=1000)
        for _, rows in read:
            waiting = deque(rows)
            await asyncio.gather(*(work(waiting) for _ in range(IN_FLIGHT)))
            ids = [entry_id for entry_id, _ in rows]
            async with redis.pipeline(transaction=False) as pipe:
                pipe.xack(USAGE, GROUP, *ids)
                pipe.xdel(USAGE, *ids)
                await pipe.execute()


if __name__ == "__main__":
    uvloop.run(main())
