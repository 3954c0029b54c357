"""One process of a service over all its lives, started as a user starts it: `python -m <service>`.

What it logs goes to one file, over all lives.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from sandbox.chaos.crash_points import Plan

STOP_WITHIN = 15.0


class Replica:
    """A process slot: `usage_forwarder-1`. While a fault is `busy` with it, its end is the fault's business."""

    def __init__(
        self, service: str, number: int, logs: Path, environ: Mapping[str, str], prefix: Sequence[str]
    ) -> None:
        self.service = service
        self.name = f"{service}-{number}"
        self.busy = False
        self.log = logs / f"{self.name}.log"
        self._environ, self._prefix = dict(environ), list(prefix)
        self._process: subprocess.Popen[bytes] | None = None
        self._begin = 0
        self._says_nothing = False

    # -- its lives -------------------------------------------------------------------------------------

    def start(
        self, plan: Plan | None = None, environ: Mapping[str, str] | None = None, output: Path | None = None
    ) -> None:
        """Starts it and returns at once: by the plan of a crash, with more environment, with another output."""
        assert not self.running, f"{self.name} is running"
        program = ["-m", self.service]
        if plan is not None:
            program = ["-m", "sandbox.chaos.crash_points", self.service, msgspec.json.encode(plan).decode()]
        self.log.touch()
        self._begin = self.log.stat().st_size
        self._says_nothing = output is not None
        with (output or self.log).open("ab") as log:
            self._process = subprocess.Popen(
                [*self._prefix, sys.executable, *program],
                env={**self._environ, **(environ or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        """SIGKILL."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait(10)

    async def stop(self, within: float = STOP_WITHIN) -> int | None:
        """SIGTERM; the exit code, or None and a SIGKILL when it takes too long."""
        self._signal(signal.SIGTERM)
        if await self.ended(within) is None:
            self.kill()
            return None
        return self.exit_code

    async def ended(self, within: float) -> int | None:
        """The exit code, if it ends in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within):
                while self.running:
                    await asyncio.sleep(0.02)
        return self.exit_code

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self.running:
            self._process.send_signal(number)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        return None if self._process is None else self._process.poll()

    @property
    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    # -- what it says ----------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Has this life said that it is ready?"""
        if self._says_nothing:
            return self.running
        return self.running and any(line["event"] == "service.ready" for line in self.lines(self._begin))

    def lines(self, begin: int = 0) -> Iterator[dict[str, Any]]:
        """The lines of its log from a place on, those that a crash has left whole."""
        if not self.log.exists():
            return
        with self.log.open("rb") as log:
            log.seek(begin)
            for line in log:
                if line.startswith(b"{") and line.endswith(b"}\n"):
                    with suppress(msgspec.DecodeError):
                        yield msgspec.json.decode(line)

    def went_back(self) -> list[tuple[str, int]]:
        """Stream and estimated loss, each time it said that a stream has gone back."""
        if not self.log.exists():
            return []
        lines = self.log.read_bytes().splitlines()
        said = [line for line in lines if b'"stream.went_back"' in line and line.endswith(b"}")]
        return [(one["stream"], one["lost"]) for one in map(msgspec.json.decode, said)]

    def tracebacks(self) -> int:
        """How many there are in the log, formatted by it or printed past it."""
        if not self.log.exists():
            return 0
        return self.log.read_bytes().count(b"Traceback (most recent call last)")
