"""FastStream's Redis stream consumer at its best: batches of 500, gathered with 64 in flight."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

import uvloop
from faststream import FastStream
from faststream.redis import RedisBroker, StreamSub

from benchmarks.contestants.surroundings import (
    CA,
    CONSUMER,
    HEADERS,
    HTTP,
    IN_FLIGHT,
    READ,
    REDIS,
    URL,
)
from benchmarks.load import GROUP, USAGE

broker = RedisBroker(REDIS, logger=None)
app = FastStream(broker, logger=None)
stream = StreamSub(USAGE, group=GROUP, consumer=CONSUMER, last_id="0", batch=True, max_records=READ)
context = ssl.create_default_context(cafile=CA)
slots = asyncio.Semaphore(IN_FLIGHT)
Post = Callable[[bytes, dict[str, str]], Awaitable[int]]
posts: list[Post] = []


async def forward(records: list[dict[str, Any]]) -> None:
    await asyncio.gather(*(deliver(record) for record in records))


broker.subscriber(stream=stream)(forward)


async def deliver(record: dict[str, Any]) -> None:
    headers = {**HEADERS, "Idempotency-Key": record["transaction_id"]}
    async with slots:
        if await posts[0](json.dumps(record).encode(), headers) != 200:
            raise RuntimeError("not delivered")


async def main() -> None:
    if HTTP == "aiohttp":
        import aiohttp

        connector = aiohttp.TCPConnector(limit=IN_FLIGHT, ssl=context)
        session = aiohttp.ClientSession(connector=connector)

        async def post(body: bytes, headers: dict[str, str]) -> int:
            async with session.post(URL, data=body, headers=headers) as response:
                await response.read()
                return response.status
    else:
        import httpx

        client = httpx.AsyncClient(verify=context, limits=httpx.Limits(max_connections=IN_FLIGHT))

        async def post(body: bytes, headers: dict[str, str]) -> int:
            return (await client.post(URL, content=body, headers=headers)).status_code

    posts.append(post)
    await app.run()


if __name__ == "__main__":
    uvloop.run(main())
