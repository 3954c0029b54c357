"""What this process costs: memory, processor time, and how long ago it began. Linux tells it under /proc."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

_ROLLUP = Path("/proc/self/smaps_rollup")
_STAT = Path("/proc/self/stat")
_UPTIME = Path("/proc/uptime")


def memory_mb() -> float:
    """Proportional set size in MB, where what processes share is shared out; elsewhere the resident maximum."""
    try:
        for line in _ROLLUP.read_text().splitlines():
            if line.startswith("Pss:"):
                return round(int(line.split()[1]) / 1024, 1)
    except OSError:
        pass
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def cpu_seconds() -> float:
    """User and system time of this process so far."""
    return time.process_time()


def seconds_since_start() -> float:
    """Seconds since the process was created (forked or executed), to a hundredth."""
    try:
        started = int(_STAT.read_text().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
        return float(_UPTIME.read_text().split()[0]) - started
    except (OSError, ValueError, IndexError):
        return time.process_time()
