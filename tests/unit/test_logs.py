"""The log: what a line says, what it never says, and that it never stands in the way."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

from common import logs
from common.config import Monitoring, Secret

Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    yield
    logs.setup("test", Monitoring(log_level="INFO"), "test", stream=sys.stderr, now=lambda: datetime.now(UTC))
    logs._masks.__init__()  # type: ignore[misc]
    logs._sink._unsaid = 0
    logging.captureWarnings(False)
    root.handlers[:] = [handler for handler in root.handlers if not isinstance(handler, logs._FromLibraries)]
    root.setLevel(level)


def setup(stream: Any = None, **monitoring: Any) -> io.StringIO:
    stream = io.StringIO() if stream is None else stream
    now = datetime(2026, 1, 31, 8, 0, 0, 123456, UTC)
    logs.setup(
        "usage_forwarder", Monitoring(**monitoring), "api-1", version="0.1.0", stream=stream, now=lambda: now
    )
    return stream  # type: ignore[no-any-return]


@pytest.fixture
def lines() -> Lines:
    stream = setup(log_level="DEBUG")
    return lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


class Kind(StrEnum):
    DEAD = "dead"


class Sulking:
    def __str__(self) -> str:
        raise RuntimeError("no")


# ---- a line ----------------------------------------------------------------------------------------------


def test_a_line_says_when_how_bad_what_who_and_the_facts(lines: Lines) -> None:
    logs.get("consumer").warning("entry.dead", reason=Kind.DEAD, correlation_id="c-1")
    assert lines() == [
        {
            "timestamp": "2026-01-31T08:00:00.123+00:00",
            "level": "warning",
            "event": "entry.dead",
            "logger": "consumer",
            "service": "usage_forwarder",
            "server_id": "api-1",
            "version": "0.1.0",
            "reason": "dead",
            "correlation_id": "c-1",
        }
    ]


def test_a_line_for_people_says_the_same() -> None:
    stream = setup(log_format="console")
    logs.get("consumer").warning("entry.dead", reason="invalid", error='a "b"\nc', n=2, at=None)
    assert stream.getvalue() == (
        "2026-01-31T08:00:00.123+00:00 [warning ] entry.dead "
        'reason=invalid error="a \\"b\\"\\nc" n=2 at=null '
        "logger=consumer service=usage_forwarder server_id=api-1 version=0.1.0\n"
    )


def test_a_logger_got_before_setup_obeys_it() -> None:
    log = logs.get("got.early")
    assert logs.get("got.early") is log
    stream = setup(log_level="ERROR")
    log.warning("not.said")
    log.error("said")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["said"]


@pytest.mark.parametrize(
    ("level", "want"),
    [
        ("DEBUG", ["debug", "info", "warning", "error", "critical"]),
        ("INFO", ["info", "warning", "error", "critical"]),
        ("WARNING", ["warning", "error", "critical"]),
        ("ERROR", ["error", "critical"]),
        ("CRITICAL", ["critical"]),
    ],
)
def test_what_is_below_the_level_is_not_written(level: str, want: list[str]) -> None:
    stream = setup(log_level=level)
    for name in ("debug", "info", "warning", "error", "critical"):
        getattr(logs.get("any"), name)("event")
    assert [json.loads(line)["level"] for line in stream.getvalue().splitlines()] == want


def test_no_level_hides_the_audit_log() -> None:
    stream = setup(log_level="CRITICAL")
    logs.get("audit").info("command.refused", command_id="c")
    assert json.loads(stream.getvalue())["logger"] == "audit"


def test_facts_never_replace_what_the_line_says_of_itself(lines: Lines) -> None:
    logs.get("presence").info("service.seen", service="registrar", level="x", timestamp=0)
    (line,) = lines()
    assert (line["service"], line["service_"]) == ("usage_forwarder", "registrar")
    assert (line["level"], line["level_"], line["timestamp_"]) == ("info", "x", 0)


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (None, None),
        (True, True),
        (1.5, 1.5),
        (float("nan"), None),
        (2**63, 2**63),
        (10**400, "an integer of more than 64 bits"),
        ("ü", "ü"),
        ("a\nb\tc", "a\nb\tc"),
        ("\x1b[31m\u2028\x9b\udcff", r"\x1b[31m\u2028\x9b\udcff"),
        (b"raw \xff", r"raw \xff"),
        (Secret("x"), "***"),
        ({1: {b"k": (1, 2)}}, {"1": {"k": [1, 2]}}),
        ({"only"}, ["only"]),
        (ValueError("bad"), "ValueError: bad"),
        (Sulking(), "a Sulking that cannot be shown"),
        ({Sulking(): 1}, {"a Sulking that cannot be shown": 1}),
        (Path("/a"), "/a"),
        ("x" * 10_000, "x" * logs.MAX_TEXT),
        (list(range(1000)), list(range(logs.MAX_ITEMS))),
    ],
)
def test_whatever_a_fact_is_it_comes_out_as_one_line(lines: Lines, given: Any, want: Any) -> None:
    logs.get("any").info("event", fact=given)
    (line,) = lines()
    assert line["fact"] == want


def test_a_fact_that_contains_itself_ends(lines: Lines) -> None:
    loop: list[Any] = []
    loop.append(loop)
    logs.get("any").info("event", fact=loop)
    assert json.dumps(lines()[0]["fact"]).count("[") == 6


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_no_text_can_make_a_second_line(log_format: str) -> None:
    stream = setup(log_format=log_format)
    logs.get("any").info("event\n{}", fact="a\nb\r\n\u2028\u0085\x0b\x0c\x1ec", more={"k\n": "\n"})
    assert len(stream.getvalue().splitlines()) == 1


# ---- exceptions ------------------------------------------------------------------------------------------


def deep(levels: int) -> None:
    if levels:
        deep(levels - 1)
    raise OSError("at the bottom")


def test_an_exception_is_one_line_with_a_bounded_traceback(lines: Lines) -> None:
    try:
        try:
            deep(100)
        except OSError as error:
            raise ValueError("on top\nsecond line") from error
    except ValueError:
        logs.get("any").exception("consumer.crashed")
    (line,) = lines()
    assert line["level"] == "error"
    assert line["exception"] == "ValueError: on top\nsecond line"
    assert [frame.split(" ")[1] for frame in line["traceback"]] == [
        "test_an_exception_is_one_line_with_a_bounded_traceback"
    ]
    (cause,) = line["causes"]
    assert cause.startswith("OSError: at the bottom (unit/test_logs.py:")


def test_a_long_traceback_keeps_both_its_ends(lines: Lines) -> None:
    try:
        deep(100)
    except OSError as error:
        logs.get("any").error("consumer.crashed", exc_info=error)
    (line,) = lines()
    assert len(line["traceback"]) == 21
    assert line["traceback"][0].endswith("test_a_long_traceback_keeps_both_its_ends")
    assert line["traceback"][5] == "… 82 more …"
    assert line["traceback"][-1].endswith("deep")


def test_a_group_names_its_members(lines: Lines) -> None:
    group = BaseExceptionGroup("both", [ValueError("a"), ExceptionGroup("inner", [OSError("b")])])
    logs.get("any").error("x", exc_info=group)
    assert [cause.partition(" (")[0] for cause in lines()[0]["causes"]] == [
        "ValueError: a",
        "ExceptionGroup: inner",
        "OSError: b",
    ]


def test_a_ring_of_causes_ends(lines: Lines) -> None:
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    logs.get("any").error("x", exc_info=one)
    assert lines()[0]["causes"] == ["ValueError: two ()"]


def test_no_exception_is_none(lines: Lines) -> None:
    logs.get("any").error("x", exc_info=True)
    logs.get("any").error("x", exc_info=(None, None, None))
    logs.get("any").error("x", exc_info=False)
    assert [line.keys() & {"exception", "exc_info", "traceback"} for line in lines()] == [set()] * 3


# ---- secrets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fact",
    [
        "redis://:p%22w%20%5C%2Fd@host",
        'it was p"w \\/d!',
        repr('p"w \\/d'),
        json.dumps({"key": 'p"w \\/d'}),
        b'p"w \\/d',
        ['p"w \\/d'],
        {'p"w \\/d': 1},
        ValueError('p"w \\/d'),
        "x" * (logs.MAX_TEXT - 3) + 'p"w \\/d',
        'p"w \\/d' * 10_000,
    ],
)
@pytest.mark.parametrize("log_format", ["json", "console"])
def test_what_is_masked_appears_nowhere(log_format: str, fact: Any) -> None:
    stream = setup(log_format=log_format)
    logs.mask('p"w \\/d')
    logs.get("any").info("event", fact=fact)
    written = stream.getvalue()
    assert 'p"w' not in written
    assert r"p\"w" not in written
    assert "p%22" not in written
    assert "***" in written or "xxx" in written


def test_a_masked_secret_is_not_in_an_exception_its_causes_or_a_librarys_message(lines: Lines) -> None:
    logs.mask(Secret("hunter2"))
    try:
        raise ValueError("top hunter2") from OSError("below hunter2")
    except ValueError:
        logs.get("any").exception("failed hunter2")
    logging.getLogger("redis").error("AUTH %s", "hunter2", exc_info=ValueError("hunter2"))
    assert "hunter2" not in json.dumps(lines())
    assert [line["event"] for line in lines()] == ["failed ***", "library.message"]


def test_masking_leaves_figures_and_the_lines_own_words_alone(lines: Lines) -> None:
    for secret in ("1", "redis", "event", ""):
        logs.mask(secret)
    logs.get("any").info("redis.unreachable", n=111, text="redis 1")
    (line,) = lines()
    assert (line["event"], line["n"], line["text"]) == ("redis.unreachable", 111, "*** ***")


def test_a_secret_that_is_reloaded_is_masked_in_its_old_and_new_form(lines: Lines, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("second-key")
    secret = Secret("first-key", str(file))
    logs.mask(secret)
    logs.get("any").info("event", fact="first-key")
    assert secret.reload()
    logs.get("any").info("event", fact="first-key second-key")
    assert [line["fact"] for line in lines()] == ["***", "*** ***"]


# ---- libraries -------------------------------------------------------------------------------------------


def test_what_libraries_log_is_one_event_from_warning() -> None:
    stream = setup()
    library = logging.getLogger("redis.connection")
    library.setLevel(logging.DEBUG)
    library.info("not said")
    library.warning("lost %s", "it")
    library.log(35, "odd level")
    library.error("bad %d", "format")
    library.log(99, "worst")
    warnings.warn_explicit("old", DeprecationWarning, "file.py", 1, registry={})
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["level"], line["event"], line["library"], line["message"][:9]) for line in lines] == [
        ("warning", "library.message", "redis.connection", "lost it"),
        ("warning", "library.message", "redis.connection", "odd level"),
        ("error", "library.message", "redis.connection", "bad %d"),
        ("critical", "library.message", "redis.connection", "worst"),
        ("warning", "library.message", "py.warnings", "file.py:1"),
    ]


# ---- outages ---------------------------------------------------------------------------------------------


def test_an_outage_is_two_lines(lines: Lines) -> None:
    clock = iter([100.0, 107.25, 200.0, 200.5]).__next__
    outage = logs.Outage(logs.get("consumer"), "redis.unreachable", "redis.recovered", clock=clock)
    outage.ended()
    for _ in range(1000):
        outage.began(error="refused")
    assert outage.ongoing
    outage.ended(attempts=3)
    outage.ended()
    assert not outage.ongoing
    outage.began()
    outage.ended()
    facts = ("event", "level", "error", "down_seconds", "attempts")
    assert [{name: line[name] for name in facts if name in line} for line in lines()] == [
        {"event": "redis.unreachable", "level": "warning", "error": "refused"},
        {"event": "redis.recovered", "level": "warning", "down_seconds": 7.25, "attempts": 3},
        {"event": "redis.unreachable", "level": "warning"},
        {"event": "redis.recovered", "level": "warning", "down_seconds": 0.5},
    ]


def test_an_outage_can_be_an_error(lines: Lines) -> None:
    logs.Outage(logs.get("c"), "a.down", "a.up", level=logging.ERROR).began()
    assert lines()[0]["level"] == "error"


# ---- nobody waits for the reader -------------------------------------------------------------------------


class Full(io.StringIO):
    full = True

    def write(self, text: str) -> int:
        if self.full:
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_a_line_that_cannot_be_written_is_dropped_and_counted_and_said_later() -> None:
    stream = setup(Full())
    before = logs.dropped
    for _ in range(3):
        logs.get("any").info("lost")
    assert logs.dropped == before + 3
    assert isinstance(stream, Full)
    stream.full = False
    logs.get("any").info("kept")
    said = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["event"], line.get("lines")) for line in said] == [
        ("kept", None),
        ("logs.lines_dropped", 3),
    ]


def test_a_closed_stream_is_no_error() -> None:
    stream = setup()
    stream.close()
    before = logs.dropped
    logs.get("any").info("lost")
    assert logs.dropped == before + 1


@pytest.fixture
def pipe() -> Iterator[tuple[int, Any]]:
    reader, writer = os.pipe()
    with open(writer, "w") as stream:
        yield reader, stream
        logs.setup("test", Monitoring(), "test", stream=sys.stderr)
    os.close(reader)


def test_a_reader_that_has_stalled_holds_nobody_up(pipe: tuple[int, Any]) -> None:
    reader, stream = pipe
    setup(stream)
    before = logs.dropped
    started = time.monotonic()
    written = 0
    while logs.dropped == before:
        logs.get("any").info("event", n=written, fact="x" * 5000)
        written += 1
    assert time.monotonic() - started < 5
    assert not logs.flush(0.01)

    said: list[dict[str, Any]] = []

    def read() -> None:
        with open(os.dup(reader)) as lines:
            for line in lines:
                said.append(json.loads(line))
                if said[-1]["event"] == "logs.lines_dropped":
                    return

    thread = threading.Thread(target=read)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert logs.flush(5)
    assert [line["n"] for line in said[:-1]] == list(range(written - 1))
    assert said[-1]["lines"] == 1


def test_a_broken_pipe_is_counted(pipe: tuple[int, Any]) -> None:
    reader, stream = pipe
    setup(stream)
    logs.get("any").info("read")
    assert logs.flush(5)
    before = logs.dropped
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, reader)  # nobody reads the pipe any more
    os.close(null)
    logs.get("any").info("lost")
    assert logs.flush(5)
    assert logs.dropped == before + 1


def test_a_pipe_that_somebody_made_nonblocking_loses_nothing(pipe: tuple[int, Any]) -> None:
    reader, stream = pipe
    os.set_blocking(stream.fileno(), False)
    setup(stream)
    for n in range(100):
        logs.get("any").info("event", n=n, fact="x" * 3000)
    with open(os.dup(reader)) as lines:
        assert [json.loads(lines.readline())["n"] for _ in range(100)] == list(range(100))


def run(code: str, **files: Any) -> subprocess.CompletedProcess[str]:
    head = """
import os, sys
from common import logs
from common.config import Monitoring
logs.setup("s", Monitoring(), "api-1")
log = logs.get("any")
"""
    files = {"stdout": subprocess.PIPE} | files
    return subprocess.run(
        [sys.executable, "-c", head + code], stderr=subprocess.PIPE, text=True, timeout=30, **files
    )


def test_what_was_logged_last_is_written_before_the_process_ends() -> None:
    done = run("for n in range(1000): log.info('event', n=n)")
    assert [json.loads(line)["n"] for line in done.stdout.splitlines()] == list(range(1000))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_forked_child_logs_for_itself() -> None:
    done = run("""
log.info("before")
logs.flush()
child = os.fork()
log.info("child" if child == 0 else "parent")
logs.flush()
if child == 0:
    os._exit(0)
os.waitpid(child, 0)
""")
    assert sorted(json.loads(line)["event"] for line in done.stdout.splitlines()) == [
        "before",
        "child",
        "parent",
    ]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_ends_nothing() -> None:
    with open("/dev/full", "w") as full:
        done = run("log.info('lost'); logs.flush(); sys.exit(logs.dropped)", stdout=full)
    assert (done.returncode, done.stderr) == (1, "")


def test_importing_it_brings_no_rich_and_leaves_rich_importable() -> None:
    done = run("print('rich' in sys.modules, 'attr' in sys.modules); import rich.console; print('fine')")
    assert done.stdout == "False False\nfine\n"
