"""`dataplane demo` as a newcomer runs it: it adds up, and nothing is left of it, however it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = [sys.executable, "-m", "dataplane_agent", "demo"]


def processes_of(session: int) -> set[int]:
    """Who is alive in the session: everything the demo has started, wherever it hangs by now."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.add(int(stat.parent.name))
    return found


def run(*arguments: str, directory: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*DEMO, *arguments],
        env={**os.environ, "TMPDIR": str(directory)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_the_demo_survives_two_kills_and_an_outage_and_adds_up(tmp_path: Path) -> None:
    demo = run("--seconds", "5", directory=tmp_path)
    out, _ = demo.communicate(timeout=55)
    assert demo.returncode == 0, out
    last = out.splitlines()[-1]
    figures = re.fullmatch(
        r"produced (\d+) = delivered (\d+) \+ dead (\d+), lost 0, billed twice 0, out of order 0: it adds up",
        last,
    )
    assert figures, last
    produced, delivered, dead = map(int, figures.groups())
    assert produced == delivered + dead
    assert delivered > 500
    assert dead > 0
    assert out.count("SIGKILL for") == 2
    assert "the ControlPlane is cut off" in out
    assert "redis-cli XPENDING queue:usage_records usage_forwarder:dead" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="sessions are looked up in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_no_process_and_no_file(tmp_path: Path, number: signal.Signals) -> None:
    demo = run("--seconds", "60", directory=tmp_path)
    assert demo.stdout is not None
    assert any("AudioAPIServers write" in line for line in demo.stdout)
    demo.send_signal(number)
    rest = demo.stdout.read()
    assert demo.wait(20) == 130, rest
    assert "Traceback" not in rest
    assert processes_of(demo.pid) == set()
    assert list(tmp_path.iterdir()) == []


def test_a_demo_that_is_too_short_is_refused(tmp_path: Path) -> None:
    demo = run("--seconds", "1", directory=tmp_path)
    out, _ = demo.communicate(timeout=20)
    assert (demo.returncode, out) == (2, "--seconds: expected 5 to 86400, got 1\n")
