"""The log: one line an event, the event a constant, what it is about in fields.

    {"timestamp": "2026-01-31T08:00:00.123+00:00", "level": "warning", "event": "redis.unreachable",
     "logger": "consumer", "service": "usage_forwarder", "server_id": "api-server-001", …}

Logging never stops the service: a line that cannot be rendered is rendered poorer, one that cannot be written
(full disk, closed pipe, a reader that has stalled) is dropped and counted in `logs.dropped`.
What `mask` was told never appears in a line, not in an exception's text either.

A line about an entry names its `correlation_id` where it is written. Nothing is bound per entry, so one about
which there is nothing to say costs nothing.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import select
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from traceback import walk_tb
from types import TracebackType
from typing import Any, TextIO
from urllib.parse import quote

import orjson

from common.config import MASK, Monitoring, Secret


@contextmanager
def _absent(module: str) -> Iterator[None]:
    """While this lasts the module cannot be imported; one that is there already stays."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


with _absent("rich"):  # structlog takes it where it finds it: 5 MB and 80 ms a service, for nothing used here
    import structlog

Logger = structlog.typing.FilteringBoundLogger

dropped = 0
"""Lines that could not be written since the start; read it as `logs.dropped`."""

MAX_TEXT = 8192
"""Characters of a field that are kept: a payload or an answer's body is never a log line."""

MAX_ITEMS = 50
"""Items of a list or mapping that are kept."""

MAX_WAITING_BYTES = 1024 * 1024
"""Lines that wait for a reader who has stalled; what comes on top is dropped."""

_MAX_DEPTH = 6
_OUTER_FRAMES, _INNER_FRAMES, _MAX_CAUSES = 5, 15, 5
_CONSTANT = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")


class _Style:
    """What `setup` decides; until then, lines from INFO go to standard error as JSON."""

    def __init__(self) -> None:
        self.level = "INFO"
        self.console = False
        self.everywhere: dict[str, str] = {}
        self.now: Callable[[], datetime] = lambda: datetime.now(UTC)


_style = _Style()
_loggers: dict[str, Logger] = {}


def get(name: str) -> Logger:
    """The logger of that name, the same at every call; modules get theirs when they are imported."""
    if name not in _loggers:
        logger = structlog.wrap_logger(_sink, processors=[_render], wrapper_class=_filter(name))
        _loggers[name] = logger.bind(logger=name)
    return _loggers[name]


def setup(
    service: str,
    config: Monitoring,
    server_id: str,
    *,
    version: str | None = None,
    stream: TextIO | None = None,
    now: Callable[[], datetime] | None = None,
) -> None:
    """From here on lines go to the stream (standard output), from the configured level, in its format.

    What libraries log (redis, asyncio, warnings) comes along from WARNING, as the event `library.message`.
    """
    _style.level = config.log_level
    _style.console = config.log_format == "console"
    _style.everywhere = {"service": service, "server_id": server_id}
    if version is not None:
        _style.everywhere["version"] = version
    if now is not None:
        _style.now = now
    for name, logger in _loggers.items():
        logger.__class__ = _filter(name)  # its class is its level: what is below costs a call that returns
    _sink.open(sys.stdout if stream is None else stream)
    root = logging.getLogger()
    root.handlers[:] = [_FromLibraries(logging.WARNING)]
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)


def mask(secret: Secret | str) -> None:
    """From here on the secret is `***` in every line; of a Secret, also what it is reloaded to."""
    _masks.add(secret if isinstance(secret, Secret) else Secret(secret))


def flush(timeout: float = 1.0) -> bool:
    """Wait until every line is written; False when the reader does not take them in time."""
    return _sink.flush(timeout)


class Outage:
    """Two lines however long it lasts and however often it is noticed: when it begins and when it ends."""

    def __init__(
        self,
        log: Logger,
        event_down: str,
        event_up: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        level: int = logging.WARNING,
    ) -> None:
        self._log = log
        self._event_down = event_down
        self._event_up = event_up
        self._clock = clock
        self._level = level
        self._since: float | None = None

    @property
    def ongoing(self) -> bool:
        return self._since is not None

    def began(self, **facts: Any) -> None:
        """Log that it is down, unless that is known."""
        if self._since is None:
            self._since = self._clock()
            self._log.log(self._level, self._event_down, **facts)

    def ended(self, **facts: Any) -> None:
        """Log that it is up again, with `down_seconds`, unless it never was down."""
        if self._since is not None:
            down_seconds = round(self._clock() - self._since, 3)
            self._since = None
            # A warning as well: whoever filters for warnings and read the first line needs the second.
            self._log.warning(self._event_up, down_seconds=down_seconds, **facts)


def _filter(name: str) -> type[Any]:
    # The audit log is a record, not a diagnosis: no level hides it.
    return structlog.make_filtering_bound_logger("NOTSET" if name == "audit" else _style.level)


class _FromLibraries(logging.Handler):
    """What was logged through the standard library becomes a line like any other."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except Exception:  # arguments that do not fit their format
            message = str(record.msg)
        level = min(max(record.levelno // 10 * 10, logging.WARNING), logging.CRITICAL)
        get("library").log(
            level, "library.message", library=record.name, message=message, exc_info=record.exc_info
        )


# ---- from an event to a line -----------------------------------------------------------------------------


def _render(_: Any, level: str, fields: MutableMapping[str, Any]) -> bytes:
    """The line. Whatever is in the fields, it comes out as one line, and nothing is raised."""
    logger, event = fields.pop("logger", None), fields.pop("event", "")
    line: dict[str, Any] = {
        "timestamp": _style.now().isoformat(timespec="milliseconds"),
        "level": level,
        "event": event if isinstance(event, str) and _CONSTANT.fullmatch(event) else _plain(event),
        "logger": logger,
        **_style.everywhere,
    }
    try:
        error = _raised(fields.pop("exc_info", None))
        for name, value in (fields if error is None else {**fields, **_about(error)}).items():
            line[f"{name}_" if name in line else name] = _plain(value)
    except Exception as error:  # a field that fights back
        line["unrendered"] = type(error).__name__
    text = _for_people(line) if _style.console else orjson.dumps(line)
    return text + b"\n"


def _for_people(line: dict[str, Any]) -> bytes:
    """`timestamp [level] event fact=value … logger=… service=…`"""
    usual = {name: line.pop(name) for name in ("logger", *_style.everywhere)}
    timestamp, level, event = (line.pop(name) for name in ("timestamp", "level", "event"))
    facts = "".join(f" {name}={_short(value)}" for name, value in (line | usual).items())
    return f"{timestamp} [{level:<8}] {_short(event)}{facts}".encode()


def _short(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r'[^\s"=]+', value):
        return value
    return orjson.dumps(value).decode()


def _raised(exc_info: Any) -> BaseException | None:
    if isinstance(exc_info, tuple):
        return exc_info[1] if len(exc_info) > 1 and isinstance(exc_info[1], BaseException) else None
    if isinstance(exc_info, BaseException):
        return exc_info
    return sys.exc_info()[1] if exc_info else None


def _about(error: BaseException) -> dict[str, Any]:
    """What an exception says, where it was raised, and what led to it: bounded, and without values."""
    facts: dict[str, Any] = {"exception": error, "traceback": _frames(error.__traceback__)}
    causes: list[str] = []
    seen, open_ends = {id(error)}, [error]
    while open_ends and len(causes) < _MAX_CAUSES:
        last = open_ends.pop(0)
        members = last.exceptions if isinstance(last, BaseExceptionGroup) else ()
        context = last.__cause__ or (None if last.__suppress_context__ else last.__context__)
        for cause in (*members, context):
            if cause is not None and id(cause) not in seen:
                seen.add(id(cause))
                open_ends.append(cause)
                causes.append(f"{_described(cause)} ({', '.join(_frames(cause.__traceback__)[-1:])})")
    return facts | ({"causes": causes[:_MAX_CAUSES]} if causes else {})


def _frames(traceback: TracebackType | None) -> list[str]:
    """The frames, innermost last: `file:line function`, without the source, which would stay in memory."""
    outer: list[str] = []
    inner: deque[str] = deque(maxlen=_INNER_FRAMES)
    left_out = 0
    for frame, number in walk_tb(traceback):
        code = frame.f_code
        where = f"{'/'.join(code.co_filename.split(os.sep)[-2:])}:{number} {code.co_name}"
        if len(outer) < _OUTER_FRAMES:
            outer.append(where)
        else:
            left_out += len(inner) == _INNER_FRAMES
            inner.append(where)
    return [*outer, *([f"… {left_out} more …"] if left_out else []), *inner]


def _plain(value: Any, depth: int = 0) -> Any:
    """The value as JSON can say it: short, printable, and without secrets."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float):
        return float(value)
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**64 else "an integer of more than 64 bits"
    if isinstance(value, str):
        return _masked(str.__str__(value))
    if depth >= _MAX_DEPTH:
        return "…"
    if isinstance(value, Mapping):
        return {_masked(_described(k)): _plain(v, depth + 1) for k, v in islice(value.items(), MAX_ITEMS)}
    if isinstance(value, (list, tuple, AbstractSet, deque)):
        return [_plain(item, depth + 1) for item in islice(value, MAX_ITEMS)]
    return _masked(_described(value))


def _described(value: Any) -> str:
    try:
        if isinstance(value, (bytes, bytearray, memoryview)):
            return bytes(value[: 2 * MAX_TEXT]).decode(errors="backslashreplace")
        return f"{type(value).__name__}: {value}" if isinstance(value, BaseException) else str(value)
    except Exception:  # a fact whose own str() fails must not cost the line it is in
        return f"a {type(value).__name__} that cannot be shown"


class _Masks:
    """The secrets, in every spelling they may come in."""

    def __init__(self) -> None:
        self._secrets: list[Secret] = []
        self._known: set[str] = set()
        self._spellings: set[str] = set()
        self._pattern: re.Pattern[str] | None = None

    def add(self, secret: Secret) -> None:
        if not any(known is secret for known in self._secrets):
            self._secrets.append(secret)

    def apply(self, text: str) -> str:
        for secret in self._secrets:
            value = secret.reveal()
            if value and value not in self._known:
                self._learn(value)
        if self._pattern is None:
            return text[:MAX_TEXT]
        masked = self._pattern.sub(MASK, text[: 4 * MAX_TEXT])
        if len(text) > 4 * MAX_TEXT:  # the first half of a secret may stand where it was cut
            masked = masked[: -max(map(len, self._spellings))]
        return masked[:MAX_TEXT]

    def _learn(self, value: str) -> None:
        self._known.add(value)
        escaped = repr(value)[1:-1], json.dumps(value)[1:-1], quote(value, safe="")
        self._spellings.update((value, *escaped))
        longest_first = sorted(self._spellings, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))


_masks = _Masks()


def _masked(text: str) -> str:
    text = _masks.apply(text)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)


# ---- from a line to its reader ---------------------------------------------------------------------------


class _Sink:
    """Writes lines so that nobody waits for their reader: to what can stall, from a thread of its own."""

    def __init__(self) -> None:
        self._stream: TextIO | None = None
        self._descriptor: int | None = None
        self._can_stall = False
        self._torn = False
        self._unsaid = 0
        self.forget()

    def forget(self) -> None:
        """Begin with nothing waiting and no thread: a forked child has neither."""
        self._changed = threading.Condition()
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._thread: threading.Thread | None = None

    def open(self, stream: TextIO) -> None:
        self.flush(1.0)
        with self._changed:
            self._stream = stream
            self._torn = False
            try:
                self._descriptor = stream.fileno()
                self._can_stall = not stat.S_ISREG(os.fstat(self._descriptor).st_mode)
            except (AttributeError, OSError, ValueError):  # it is None, closed, or in memory
                self._descriptor = None
                self._can_stall = False

    def write(self, line: bytes) -> None:
        with self._changed:
            if not self._can_stall:
                self._say_dropped(self._put(line))
            elif self._waiting_bytes + len(line) > MAX_WAITING_BYTES:
                self._drop(1)
            else:
                self._waiting.append(line)
                self._waiting_bytes += len(line)
                self._changed.notify_all()
                self._start()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="logs", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # too many threads, or the interpreter is going away
                self._thread = None
                self._put_waiting()

    debug = info = warning = error = critical = write  # structlog calls the one that is named like the level

    def flush(self, timeout: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting_bytes, timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
            self._put_waiting()

    def _put_waiting(self) -> None:
        with self._changed:
            lines, self._waiting = self._waiting, []
        it_flows = self._put(b"".join(lines))
        with self._changed:
            self._waiting_bytes -= sum(map(len, lines))
            self._say_dropped(it_flows)
            self._changed.notify_all()

    def _say_dropped(self, it_flows: bool) -> None:
        if it_flows and self._unsaid:
            unsaid, self._unsaid = self._unsaid, 0
            get("logs").error("logs.lines_dropped", lines=unsaid)

    def _put(self, content: bytes) -> bool:
        left = b"\n" + content if self._torn else content
        try:
            if self._descriptor is None:
                stream = self._stream or sys.stderr
                stream.write(content.decode())
                stream.flush()
                left = b""
            # Past the stream's own buffer, which would try again at exit what it could not write.
            while left:
                left = left[self._write_some(left) :]
        except (OSError, ValueError, AttributeError):  # full, gone, closed; there is no stream at all
            self._drop(min(left.count(b"\n"), content.count(b"\n")))
            return False
        return True

    def _write_some(self, content: bytes) -> int:
        assert self._descriptor is not None
        try:
            written = os.write(self._descriptor, content)
        except BlockingIOError:  # somebody who shares the pipe made it so
            select.select([], [self._descriptor], [])
            return 0
        self._torn = content[written - 1 : written] != b"\n"
        return written

    def _drop(self, lines: int) -> None:
        global dropped
        dropped += lines
        self._unsaid += lines


_sink = _Sink()
os.register_at_fork(after_in_child=_sink.forget)
atexit.register(flush)
