"""How long to wait before trying again. Pure: randomness comes in.

quick retries    up to 0.1 s, then up to 0.2 s, never above `max_backoff` (full jitter: anything from 0)
parked entries   about 1 s, 2, 4, 8, 16, 32 s, then about a minute, for ever (a quarter less at most)
"""

from __future__ import annotations

from random import Random

QUICK_BASE = 0.1
PARK_BASE = 1.0
PARK_CAP = 60.0
PARK_JITTER = 0.25


def quick_delay(retry: int, random: Random, max_backoff: float) -> float:
    """Seconds before quick retry number `retry` (from 1): exponential, full jitter, at most `max_backoff`."""
    return random.random() * _doubled(QUICK_BASE, retry, max_backoff)


def park_delay(attempt: int, random: Random) -> float:
    """Seconds until a parked entry is tried again after its attempt number `attempt` (from 1)."""
    return _doubled(PARK_BASE, attempt, PARK_CAP) * (1 - PARK_JITTER * random.random())


def _doubled(base: float, step: int, cap: float) -> float:
    # The exponent is bounded first: 2 ** 2000 is no float.
    return min(cap, base * 2.0 ** min(max(step - 1, 0), 30))
