"""A ControlPlane that answers after a while: one process, HTTP/1.1 over TLS, any number of requests at once.

It keeps the same log as the fast sink, and stands in for it where there is no nginx.
It may give way when asked too much at once: answer more slowly, by the square of what is too much, or with 503.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import ssl
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import uvloop

from benchmarks.sink import ANSWER

RESPONSE = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
    % (len(ANSWER), ANSWER.encode())
)  # fmt: skip
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
FLUSH_EVERY = 0.05


@dataclass
class Manner:
    """How it answers, and what it has in hand. `degrade_above`, `refuse_above`: requests at once; 0: never."""

    delay: float
    degrade_above: int = 0
    refuse_above: int = 0
    in_hand: int = 0
    lines: list[bytes] = field(default_factory=list)

    def begin(self) -> float | None:
        """Seconds until the answer to one more request; None: it is refused."""
        if self.refuse_above and self.in_hand >= self.refuse_above:
            return None
        self.in_hand += 1
        if self.degrade_above:
            return self.delay * max(1.0, self.in_hand / self.degrade_above) ** 2
        return self.delay


class Connection(asyncio.Protocol):
    """One request after the other, each answered a while after it has arrived."""

    def __init__(self, manner: Manner) -> None:
        self._manner = manner
        self._loop = asyncio.get_running_loop()
        self._received = b""
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(
            asyncio.WriteTransport, transport
        )  # uvloop's TLS transport is one by its manner

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (head_end := self._received.find(b"\r\n\r\n")) >= 0:
            lines = self._received[:head_end].lower().split(b"\r\n")[1:]
            head = {name: value for name, _, value in (line.partition(b": ") for line in lines)}
            length = int(head.get(b"content-length", b"0"))
            if len(self._received) < head_end + 4 + length:
                return
            self._received = self._received[head_end + 4 + length :]
            key = head.get(b"idempotency-key", b"-")
            delay = self._manner.begin()
            if delay is None:
                self._refuse(length, key)
            elif delay:
                self._loop.call_later(delay, self._answer, length, key)
            else:
                self._answer(length, key)

    def _refuse(self, length: int, key: bytes) -> None:
        assert self._transport is not None
        self._transport.write(REFUSAL)
        self._manner.lines.append(b"%.3f %d REFUSED %b\n" % (time.time(), length, key))

    def _answer(self, length: int, key: bytes) -> None:
        assert self._transport is not None
        self._manner.in_hand -= 1
        if not self._transport.is_closing():
            self._transport.write(RESPONSE)
            self._manner.lines.append(b"%.3f %d HTTP/1.1 %b\n" % (time.time(), length, key))


async def serve(manner: Manner, certificate: Path, log: Path) -> None:
    lines = manner.lines
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(manner), "127.0.0.1", 0, ssl=context)
    sys.stdout.write(json.dumps({"event": "listening", "port": server.sockets[0].getsockname()[1]}) + "\n")
    sys.stdout.flush()
    with log.open("ab", buffering=0) as file:
        while True:
            await asyncio.sleep(FLUSH_EVERY)
            if lines:
                file.write(b"".join(lines))
                lines.clear()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--delay", type=float, default=0.0, help="seconds")
    parser.add_argument("--degrade-above", type=int, default=0, help="requests at once; slower by the square")
    parser.add_argument("--refuse-above", type=int, default=0, help="requests at once; 503")
    parser.add_argument("--certificate", type=Path, required=True, help="PEM: key and chain")
    parser.add_argument("--log", type=Path, required=True)
    options = parser.parse_args()
    manner = Manner(options.delay, options.degrade_above, options.refuse_above)
    uvloop.run(serve(manner, options.certificate, options.log))


if __name__ == "__main__":
    main()
