"""taskiq over a Redis stream, with httpx. Run as a program with a number, it queues so many tasks."""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
from typing import Any

import httpx
from taskiq_redis import RedisStreamBroker

from benchmarks.contestants.surroundings import CA, HEADERS, IN_FLIGHT, REDIS, URL
from benchmarks.load import record

broker = RedisStreamBroker(REDIS)
context = ssl.create_default_context(cafile=CA)
clients: list[httpx.AsyncClient] = []


async def forward(usage: dict[str, Any]) -> None:
    if not clients:
        clients.append(httpx.AsyncClient(verify=context, limits=httpx.Limits(max_connections=IN_FLIGHT)))
    headers = {**HEADERS, "Idempotency-Key": usage["transaction_id"]}
    response = await clients[0].post(URL, content=json.dumps(usage).encode(), headers=headers)
    response.raise_for_status()


forward_task = broker.task(task_name="forward")(forward)


async def queue(number: int) -> None:
    await broker.startup()
    for n in range(number):
        await forward_task.kiq(json.loads(record(n)))
    await broker.shutdown()


if __name__ == "__main__":
    from benchmarks.contestants import taskiq_tasks

    asyncio.run(taskiq_tasks.queue(int(sys.argv[1])))
