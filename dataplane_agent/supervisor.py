"""Runs the services as children of one process: `dataplane run` becomes this.

It imports once what the services share, freezes it, and forks a child per service: so the four together take
little more memory than two would alone.
Itself it has no event loop and no client, and no thread but the log's: those do not survive a fork.

    a child dies            it is started again after 1 s, doubling to 30 s while it dies young
    … with exit code 2      its configuration is wrong: everything stops, exit code 2
    SIGTERM, SIGINT         stream services first, then the registrar, each within drain_seconds; then SIGKILL
    a second signal         everybody at once
    the supervisor dies     the kernel sends its children SIGTERM
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import msgspec

from common import config, logs, service
from common.config import Config

REGISTRAR = "registrar"
SERVICES = (REGISTRAR, "usage_forwarder", "session_notifier", "quota_refresher")

FIRST_BACKOFF_SECONDS = 1.0
LONGEST_BACKOFF_SECONDS = 30.0
SETTLED_SECONDS = 60.0
"""A child that lived this long did not die of its start: the backoff begins anew."""

KILL_MARGIN_SECONDS = 2.0
"""What a child gets beyond drain_seconds before it is killed."""

MAX_REPLICAS = 64

CONFIGURATION = 2
"""The exit code that no restart can mend."""

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15  # <linux/prctl.h>

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Child:
    """One process of a service, over all its lives."""

    def __init__(self, name: str, replica: int) -> None:
        self.name = name
        self.replica = replica
        self.pid: int | None = None
        self.started = 0.0
        self.deaths = 0
        self.due = 0.0

    def died(self, now: float) -> float:
        """Notes a death and says after how many seconds the next life begins."""
        self.pid = None
        self.deaths = 1 if now - self.started >= SETTLED_SECONDS else self.deaths + 1
        delay = min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0 ** (self.deaths - 1))
        self.due = now + delay
        return delay


class Supervisor:
    """Keeps the children alive until a signal says stop."""

    def __init__(
        self,
        settings: Config,
        builds: dict[str, Callable[..., Any]],
        replicas: dict[str, int],
        *,
        until_stdin_closes: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._builds = builds
        self._clock = clock
        self._children = [Child(name, replica) for name in builds for replica in range(replicas.get(name, 1))]
        self._log = logs.get("supervisor")
        self._signals = Signals(until_stdin_closes)
        self._stops = 0  # signals to stop, so far
        self._stopping: list[str] | None = None  # whose turn to stop it is
        self._deadline = 0.0
        self._code = 0

    def run(self) -> int:
        """Until everything has stopped. 2 for a configuration fault, 1 for a stop that went wrong, else 0."""
        while True:
            if self._stopping is None:
                self._start_due()
            elif not self._alive(self._stopping):
                if not self._alive(self._builds):
                    return self._code
                self._stop([REGISTRAR])
            elif self._clock() >= self._deadline:
                self._kill()
            for number in self._signals.wait(self._patience()):
                if number in STOP_SIGNALS:
                    self._asked_to_stop()
            self._reap()

    def _alive(self, names: Iterable[str]) -> list[Child]:
        return [child for child in self._children if child.pid is not None and child.name in names]

    def _patience(self) -> float:
        """Seconds until there is something to do without being woken."""
        if self._stopping is not None:
            return max(0.0, self._deadline - self._clock())
        due = [child.due for child in self._children if child.pid is None]
        return max(0.0, min(due) - self._clock()) if due else 3600.0

    # --- starting -------------------------------------------------------------------------------------------

    def _start_due(self) -> None:
        for child in self._children:
            if child.pid is None and self._clock() >= child.due:
                child.started = self._clock()
                child.pid = self._fork(child)
                self._log.info("process.started", name=child.name, replica=child.replica, pid=child.pid)

    def _fork(self, child: Child) -> int:
        supervisor = os.getpid()
        sys.stderr.flush()
        with self._signals.held_back():  # one that came in between would reach the supervisor's handler
            pid = os.fork()
            if pid == 0:
                self._signals.forget()
        if pid:
            return pid
        code = 1
        try:
            own_life(child.name, supervisor)
            code = service.serve(child.name, self._builds[child.name], self._config_of(child))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            logs.flush()
            sys.stderr.flush()
            os._exit(code)

    def _config_of(self, child: Child) -> Config:
        """The configuration; the second and later processes of a service listen on free ports."""
        if child.replica == 0:
            return self._settings
        free = msgspec.structs.replace(self._settings.monitoring, metrics_port=0, health_check_port=0)
        return msgspec.structs.replace(self._settings, monitoring=free)

    # --- ending ---------------------------------------------------------------------------------------------

    def _reap(self) -> None:
        while pid_and_status := _ended():
            pid, status = pid_and_status
            code = os.waitstatus_to_exitcode(status)
            for child in self._children:
                if child.pid == pid:
                    self._buried(child, code)

    def _buried(self, child: Child, code: int) -> None:
        pid, lived = child.pid, round(self._clock() - child.started, 3)
        delay = child.died(self._clock())
        about = {
            "name": child.name,
            "replica": child.replica,
            "pid": pid,
            "exit_code": code,
            "seconds": lived,
        }
        if self._stopping is not None:
            self._log.info("process.stopped", **about)
            if code not in (0, -signal.SIGTERM):  # the signal itself ends one that had not begun yet
                self._code = self._code or 1
        elif code == CONFIGURATION:
            self._log.error("process.misconfigured", **about)
            self._code = CONFIGURATION
            self._stop_streams()
        else:
            self._log.warning("process.died", **about, restart_after_seconds=delay)

    def _asked_to_stop(self) -> None:
        self._stops += 1
        self._log.info("supervisor.stopping", signals=self._stops)
        if self._stopping is None:
            self._stop_streams()
        elif self._stops == 2:
            self._stop(list(self._builds))
        else:
            self._kill()

    def _stop_streams(self) -> None:
        self._stop([name for name in self._builds if name != REGISTRAR])

    def _stop(self, names: list[str]) -> None:
        self._stopping = names
        self._deadline = self._clock() + self._settings.shutdown.drain_seconds + KILL_MARGIN_SECONDS
        self._signal(names, signal.SIGTERM)

    def _kill(self) -> None:
        self._deadline = self._clock() + KILL_MARGIN_SECONDS
        for child in self._signal(self._stopping or [], signal.SIGKILL):
            self._log.error("process.killed", name=child.name, replica=child.replica, pid=child.pid)

    def _signal(self, names: Iterable[str], number: signal.Signals) -> list[Child]:
        children = self._alive(names)
        for child in children:
            assert child.pid is not None
            os.kill(child.pid, number)  # one that has just ended is there until it is reaped
        return children


class Signals:
    """Signals as something one can wait for, without a race between looking and sleeping."""

    def __init__(self, until_stdin_closes: bool) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        asked = (number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN)  # nohup
        self._handled = (*asked, signal.SIGCHLD)
        for number in self._handled:
            signal.signal(number, _noted)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._watched = [self._read, *([0] if until_stdin_closes else [])]

    def wait(self, seconds: float) -> list[int]:
        """The signals that came, as soon as there is one; empty after so many seconds."""
        readable, _, _ = select.select(self._watched, [], [], seconds)
        came = list(os.read(self._read, 4096)) if self._read in readable else []
        if 0 in readable and not os.read(0, 4096):
            self._watched.remove(0)
            came.append(signal.SIGTERM)
        return came

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """While this lasts signals wait, in a child too."""
        signal.pthread_sigmask(signal.SIG_BLOCK, self._handled)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._handled)

    def forget(self) -> None:
        """In a child: signals are its own again."""
        signal.set_wakeup_fd(-1)
        for number in self._handled:
            signal.signal(number, signal.SIG_DFL)
        os.close(self._read)
        os.close(self._write)


def _noted(_number: int, _frame: FrameType | None) -> None:
    """Does nothing: what counts has been written to the wakeup descriptor."""


def _ended() -> tuple[int, int] | None:
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, status) if pid else None


# --- before and after the fork ------------------------------------------------------------------------------


def builds_of(names: Iterable[str]) -> dict[str, Callable[..., Any]]:
    """How each service is built. Importing it imports what the services share, once for all children."""
    builds = {name: importlib.import_module(f"{name}.__main__").build for name in names}
    gc.collect()
    gc.freeze()  # a collection in a child would write to every object, and unshare its page
    return builds


def own_life(name: str, supervisor: int) -> None:
    """In a child: its own group (Ctrl-C is for the supervisor), its own name, an end with the supervisor."""
    os.setpgid(0, 0)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_NAME, name.encode())
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != supervisor:  # it died before it could be asked for
            os.kill(os.getpid(), signal.SIGTERM)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line that `dataplane run` hands over."""
    parser = argparse.ArgumentParser(prog="dataplane run", description="Runs the services in the foreground.")
    parser.add_argument(
        "services", nargs="*", metavar="SERVICE", help=f"of {', '.join(SERVICES)}; all without any"
    )
    parser.add_argument("--replicas", action="append", default=[], metavar="SERVICE=N", type=_replicas)
    parser.add_argument("--config", action="append", default=[], metavar="FILE")
    parser.add_argument("--files-only", action="store_true", help="the environment configures nothing")
    parser.add_argument("--until-stdin-closes", action="store_true", help="stop when the starter ends")
    options = parser.parse_args(argv)
    names = [name for name in SERVICES if name in options.services or not options.services]
    for name in (*options.services, *(name for name, _ in options.replicas)):
        if name not in names:
            parser.error(f"expected services of {', '.join(SERVICES)}, got {name}")
    try:
        settings = config.load(options.config, {}) if options.files_only else config.load(options.config)
    except config.ConfigError as error:
        print("\n".join(str(fault) for fault in error.faults), file=sys.stderr)
        return CONFIGURATION
    logs.setup("supervisor", settings.monitoring, settings.server.id)
    supervisor = Supervisor(
        settings, builds_of(names), dict(options.replicas), until_stdin_closes=options.until_stdin_closes
    )
    return supervisor.run()


def _replicas(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if not number.isdecimal() or not 1 <= int(number) <= MAX_REPLICAS:
        raise argparse.ArgumentTypeError(f"expected SERVICE=N with N from 1 to {MAX_REPLICAS}, got {text}")
    return name, int(number)


if __name__ == "__main__":
    sys.exit(main())
