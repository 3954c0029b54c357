"""Faults of those who write the streams."""

from __future__ import annotations

from sandbox.audio_api_server import Traffic
from sandbox.chaos.catalogue import Scene, fault


@fault("traffic")
async def malformed_flood(scene: Scene) -> None:
    """For three seconds an AudioAPIServer writes hardly anything but what nobody can read, of every kind.

    Expected: each is a dead letter, `invalid`; the others are delivered beside it.
    """
    await _extra(
        scene, Traffic(rate=200, sessions=200, malformed=0.95, seed=scene.random.randrange(2**32)), 3.0
    )


@fault("traffic")
async def one_busy_session(scene: Scene) -> None:
    """For five seconds one session writes as much as all the others together.

    Expected: in order, and the others do not wait for it.
    """
    rate = scene.world.rate
    await _extra(scene, Traffic(rate, 1, seed=scene.random.randrange(2**32), uses=(10**6, 10**6)), 5.0)


@fault("traffic")
async def burst(scene: Scene) -> None:
    """For three seconds ten times as many entries as usual.

    Expected: backpressure is leaving them in Redis; they are worked off.
    """
    traffic = Traffic(10 * scene.world.rate, 500, seed=scene.random.randrange(2**32))
    await _extra(scene, traffic, 3.0)


async def _extra(scene: Scene, traffic: Traffic, seconds: float) -> None:
    server = scene.world.traffic.add(traffic)
    await server.run(seconds)
    scene.saw("entries", sum(server.stats().produced.values()))
