"""The connection to Redis over a real socket."""

from __future__ import annotations

import asyncio

from common import config
from common.redis_border import connect


async def test_no_cancellation_is_lost_while_sending() -> None:
    """On Python 3.11 `asyncio.wait_for` loses one now and then, and a stop would hang."""
    async with await asyncio.start_server(_says_pong, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        client = connect(config.Redis(host="127.0.0.1", port=port))

        async def ask() -> None:
            while True:
                await client.ping()

        for n in range(100):
            asking = asyncio.create_task(ask())
            for _ in range(n % 37):  # so many steps of the loop: it is cancelled in every one of them in turn
                await asyncio.sleep(0)
            asking.cancel()
            await asyncio.wait([asking], timeout=5)
            assert asking.cancelled()
        await client.aclose()


async def _says_pong(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while asked := await reader.read(4096):
        writer.write(b"+PONG\r\n" * max(1, asked.count(b"PING")))
    writer.close()
