"""Who takes part: the bare loop, the agent, and what users would pick instead."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from benchmarks import load
from benchmarks.lab import Lab
from benchmarks.processes import Process

HERE = "benchmarks.contestants"


@dataclass(frozen=True)
class Contestant:
    """One that takes part.

    `module` runs it, with the arguments `argv` where it is not a module of its own; it learns where everything is
    from its environment. `share`: how many of the records it gets, since a slow one would take for ever.
    `loads`: the module that queues the work of a contestant that does not read a stream.
    """

    name: str
    title: str
    module: str
    argv: tuple[str, ...] = ()
    http2: bool = False
    processes: int = 1
    share: float = 1.0
    sessions: int | None = None
    entry_field: str = "data"
    loads: str | None = None
    needs: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def missing(self) -> str | None:
        """The first of the modules it needs that is not installed."""
        return next((module for module in self.needs if find_spec(module) is None), None)

    @property
    def is_ours(self) -> bool:
        return self.module == "usage_forwarder"

    def fill(self, lab: Lab, url: str, records: int, sessions: int) -> None:
        """Everything it is to deliver lies ready."""
        if self.loads is None:
            load.fill(lab.redis, records, self.sessions or sessions, field=self.entry_field)
            return
        with lab.start(
            [sys.executable, "-m", self.loads, str(records)], self._environment(lab, url)
        ) as loader:
            loader.finish()

    def start(self, lab: Lab, url: str) -> list[Process]:
        """Its processes, begun."""
        argv = [sys.executable, "-m", self.module, *self.argv]
        return [lab.start(argv, self._environment(lab, url, number)) for number in range(self.processes)]

    def _environment(self, lab: Lab, url: str, number: int = 0) -> dict[str, str]:
        if self.is_ours:
            return lab.agent(url, **self.settings)
        where = {"REDIS": lab.redis_url, "URL": url, "CA": lab.ca_file, "CONSUMER": f"consumer-{number}"}
        return {f"BENCHMARK_{name}": str(value) for name, value in {**where, **self.settings}.items()}


BATCH = {"control_plane__usage_batch_size": 100}

BARE = Contestant("bare", "bare loop", f"{HERE}.bare", http2=True)
OURS = Contestant("ours", "the agent", "usage_forwarder", http2=True)
BARE_1 = Contestant("bare-http1", "bare loop, HTTP/1.1", f"{HERE}.bare")
OURS_1 = Contestant("ours-http1", "the agent, HTTP/1.1", "usage_forwarder")
OURS_TWICE = Contestant("ours-2", "the agent, 2 processes", "usage_forwarder", http2=True, processes=2)
OURS_BATCH = Contestant(
    "ours-batch",
    "the agent, 100 records a request, 20 sessions",
    "usage_forwarder",
    http2=True,
    share=3,
    sessions=20,
    settings=BATCH,
)
OURS_BATCH_TWICE = Contestant(
    "ours-batch-2",
    "the agent, 100 records a request, 20 sessions, 2 processes",
    "usage_forwarder",
    http2=True,
    processes=2,
    share=3,
    sessions=20,
    settings=BATCH,
)

AGENT = (BARE, OURS, BARE_1, OURS_1, OURS_TWICE, OURS_BATCH, OURS_BATCH_TWICE)

PEERS = (
    Contestant(
        "faststream-aiohttp",
        "FastStream, batches of 500, aiohttp",
        f"{HERE}.faststream_batches",
        share=0.15,
        entry_field="__data__",
        needs=("faststream", "aiohttp"),
        settings={"HTTP": "aiohttp"},
    ),
    Contestant(
        "faststream-httpx",
        "FastStream, batches of 500, httpx",
        f"{HERE}.faststream_batches",
        share=0.012,
        entry_field="__data__",
        needs=("faststream", "httpx"),
        settings={"HTTP": "httpx"},
    ),
    Contestant(
        "taskiq-httpx",
        "taskiq (taskiq-redis), 64 at once, httpx",
        "taskiq",
        argv=("worker", f"{HERE}.taskiq_tasks:broker", "--workers", "1", "--max-async-tasks", "64"),
        share=0.02,
        loads=f"{HERE}.taskiq_tasks",
        needs=("taskiq", "taskiq_redis", "httpx"),
    ),
    Contestant(
        "celery-requests",
        "celery, 4 processes, requests",
        "celery",
        argv=("-A", f"{HERE}.celery_tasks", "worker", "--pool", "prefork", "--concurrency", "4"),
        processes=1,
        share=0.02,
        loads=f"{HERE}.celery_tasks",
        needs=("celery", "requests"),
    ),
)
