"""Faults of the ControlPlane, of the way to it, and of the key that opens it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from email.utils import formatdate
from typing import Any

from common import dead_letters
from common.outcomes import Reason
from sandbox.chaos.catalogue import Scene, fault
from sandbox.chaos.world import PRODUCED, STREAMS, World

ENTRIES = ("usage_records", "start", "complete", "refresh")
"""The calls that carry entries."""

REJECTED = (400, 402, 405, 406, 411, 413, 414, 415, 418, 422, 451)
TRANSIENT = (408, 425, 429, 500, 502, 503, 504, 507, 599)
MISCONFIGURED = (300, 301, 302, 303, 307, 308, 501)
RECORDED = (200, 201, 202, 204, 409)

REDRIVE_WITHIN = 20.0


def _for_entries(**rule: Any) -> list[dict[str, Any]]:
    return [{"endpoint": endpoint, **rule} for endpoint in ENTRIES]


async def _holding(scene: Scene, *rules: dict[str, Any], seconds: float) -> None:
    async with scene.world.faulty(*rules):
        await asyncio.sleep(seconds)


@fault("control plane", weight=2)
async def refused(scene: Scene) -> None:
    """Connections are refused for some seconds, and those that are open are cut off.

    Expected: the breaker opens, nothing is read, no attempt is counted; it goes on by itself.
    """
    await _holding(scene, {"kind": "outage"}, seconds=scene.random.uniform(2.0, 6.0))
    scene.saw("outages")


@fault("control plane")
async def control_plane_killed(scene: Scene) -> None:
    """SIGKILL of the ControlPlane; it comes back with its book and with new signing keys.

    Expected: as for any outage; commands signed with the new keys are believed after one look.
    """
    control_plane = scene.world.control_plane
    await control_plane.kill()
    await asyncio.sleep(scene.random.uniform(0.5, 3.0))
    await control_plane.start()
    scene.saw("restarts")


@fault("control plane")
async def hanging(scene: Scene) -> None:
    """Requests are read and never answered, for longer than the time-out.

    Expected: they are sent again under the same key when the time-out has passed.
    """
    await _holding(scene, {"kind": "hang"}, seconds=scene.random.uniform(3.5, 6.0))
    scene.saw("hangs")


@fault("control plane")
async def slow(scene: Scene) -> None:
    """Every answer comes two seconds late, which is longer than the lease and shorter than the time-out.

    Expected: what is under way stays with its owner, because the lease is renewed.
    """
    await _holding(scene, {"kind": "latency", "seconds": 2.2}, seconds=6.0)
    scene.saw("slow spells")


@fault("control plane")
async def black_hole(scene: Scene) -> None:
    """Connections are accepted, and then nothing ever comes back (SIGSTOP of the ControlPlane).

    Expected: as for hanging.
    """
    scene.world.control_plane.pause()
    try:
        await asyncio.sleep(scene.random.uniform(3.5, 6.0))
    finally:
        scene.world.control_plane.resume()
    scene.saw("black holes")


@fault("control plane")
async def dropped_before(scene: Scene) -> None:
    """Half of all connections are closed before the record is stored.

    Expected: sent again under the same key, until it is recorded.
    """
    await _holding(scene, {"kind": "drop_before", "share": 0.5}, seconds=4.0)
    scene.saw("spells")


@fault("control plane")
async def dropped_after(scene: Scene) -> None:
    """Half of all connections are closed after the record was stored, before the answer.

    Expected: sent again under the same key; the ControlPlane knows it, and it counts as a duplicate.
    """
    await _holding(scene, {"kind": "drop_after", "share": 0.5}, seconds=4.0)
    scene.saw("spells")


@fault("control plane")
async def half_an_answer(scene: Scene) -> None:
    """Half of all answers break off in the middle, some after the record was stored.

    Expected: no answer is an answer; sent again under the same key.
    """
    rules = [{"kind": "half_answer", "share": 0.25}, {"kind": "half_answer", "share": 0.25, "stored": True}]
    await _holding(scene, *rules, seconds=4.0)
    scene.saw("spells")


@fault("control plane")
async def html_page(scene: Scene) -> None:
    """A proxy answers 200 with an HTML page; half of the time the record was stored.

    Expected: unconfirmed, so sent again under the same key.
    """
    rules = [{"kind": "html_200", "share": 0.3}, {"kind": "html_200", "share": 0.3, "stored": True}]
    await _holding(scene, *rules, seconds=4.0)
    scene.saw("spells")


@fault("control plane")
async def wrong_json(scene: Scene) -> None:
    """200 with JSON that is no answer, or with nothing.

    Expected: unconfirmed, so sent again under the same key; no grant with empty figures is ever written.
    """
    bodies: Iterable[Any] = ([], 17, None, "no", {"success": False})
    rules = [{"kind": "wrong_json", "share": 0.15, "body": body} for body in bodies]
    await _holding(scene, *rules, {"kind": "empty_200", "share": 0.2}, seconds=4.0)
    scene.saw("spells")


@fault("control plane")
async def other_successes(scene: Scene) -> None:
    """Every status that says that it is recorded, 204 and a bare 409 among them, and it is.

    Expected: settled; a refresh without a grant is asked again, and one that is dead for a 409 is brought back.
    """
    for status in RECORDED:
        await _holding(scene, *_for_entries(kind="status", status=status, stored=True, body={}), seconds=0.5)
        scene.saw("statuses")
    await _bring_back(scene)


@fault("control plane")
async def redirected(scene: Scene) -> None:
    """Every answer is a redirect or 501, of each kind half a second.

    Expected: a fault of the configuration: everything is held, nothing dies, and it goes on by itself.
    """
    for status in MISCONFIGURED:
        await _holding(scene, {"kind": "status", "status": status}, seconds=0.5)
        scene.saw("statuses")
    await _holding(scene, {"kind": "redirect"}, seconds=0.5)


@fault("control plane")
async def rejecting(scene: Scene) -> None:
    """A third of the entries is finally refused, with each of the statuses that say so; then all is redriven.

    Expected: those entries are dead letters, and no others; redriven, they are delivered. Their sessions' order is
    broken by that.
    """
    for status in REJECTED:
        await _holding(scene, *_for_entries(kind="status", status=status, share=0.3), seconds=0.4)
        scene.saw("statuses")
    await _bring_back(scene)


@fault("control plane")
async def conflicting(scene: Scene) -> None:
    """A third of the entries is said to be recorded with other content; then all is redriven.

    Expected: those entries are dead letters, and no others; redriven, they are delivered.
    """
    body = {"success": False, "error": "conflict"}
    await _holding(scene, *_for_entries(kind="status", status=409, share=0.3, body=body), seconds=1.5)
    scene.saw("spells")
    await _bring_back(scene)


async def _bring_back(scene: Scene) -> None:
    """Redrives what a fault made die, as an operator does, until there is none."""
    world = scene.world
    until = time.monotonic() + REDRIVE_WITHIN
    calm = 0
    while calm < 3 and time.monotonic() < until:
        brought = sum([await _redrive(scene, world, service) for service in PRODUCED])
        calm = 0 if brought else calm + 1
        await asyncio.sleep(0.4)


async def _redrive(scene: Scene, world: World, service: str) -> int:
    stream = STREAMS[service]
    async with world.connected() as redis:
        found = [
            letter
            for reason in (Reason.REJECTED, Reason.CONFLICT)
            async for letter in dead_letters.find(redis, stream, reason=reason)
        ]
        world.redriven |= {letter.session for letter in found if letter.session}
        moved = await dead_letters.redrive(redis, stream, [letter.id for letter in found])
    scene.saw("redriven", len(moved.done))
    return len(found)


@fault("control plane")
async def not_found(scene: Scene) -> None:
    """404 and 410 for half of the entries, for less than `not_found_hold_seconds`.

    Expected: held and tried again; none dies.
    """
    for status in (404, 410):
        await _holding(scene, *_for_entries(kind="status", status=status, share=0.5), seconds=1.5)
        scene.saw("statuses")


@fault("control plane")
async def not_found_at_all(scene: Scene) -> None:
    """404 for every entry: the address is wrong, not the entries.

    Expected: after 20 sessions in a row a fault of the configuration: everything is held, none dies.
    """
    await _holding(scene, *_for_entries(kind="status", status=404), seconds=5.0)
    scene.saw("spells")


@fault("control plane")
async def forbidden(scene: Scene) -> None:
    """403 for some entries, while the key as such is good.

    Expected: treated like a 404 after the first probe; none dies.
    """
    await _holding(scene, *_for_entries(kind="status", status=403, share=0.2), seconds=3.0)
    scene.saw("spells")


@fault("control plane")
async def failing(scene: Scene) -> None:
    """Every status that says to try again later, each for half a second.

    Expected: tried again under the same key, for ever.
    """
    for status in TRANSIENT:
        await _holding(scene, {"kind": "status", "status": status, "share": 0.7}, seconds=0.5)
        scene.saw("statuses")


@fault("control plane")
async def too_many_requests(scene: Scene) -> None:
    """429 and 503 with Retry-After, in seconds and as a date.

    Expected: none of them is tried again before its time.
    """
    in_a_moment = formatdate(time.time() + 2, usegmt=True)
    for status in (429, 503):
        for retry_after in ("1", in_a_moment):
            rule = {"kind": "status", "status": status, "share": 0.5, "retry_after": retry_after}
            await _holding(scene, rule, seconds=0.7)
            scene.saw("answers in seconds" if retry_after == "1" else "answers with a date")


@fault("control plane")
async def flapping(scene: Scene) -> None:
    """A second there, a second gone, five times.

    Expected: the breaker follows; nothing is lost, nothing dies.
    """
    for _ in range(5):
        await _holding(scene, {"kind": "outage"}, seconds=1.0)
        await asyncio.sleep(1.0)
        scene.saw("outages")


@fault("control plane")
async def certificate_expired(scene: Scene) -> None:
    """The ControlPlane shows a certificate that has expired.

    Expected: nobody sends anything to it; everything is held, and goes on when it shows a good one.
    """
    await _holding(scene, {"kind": "certificate", "certificate": "expired"}, seconds=4.0)
    scene.saw("spells")


@fault("control plane")
async def certificate_of_a_stranger(scene: Scene) -> None:
    """The ControlPlane shows a certificate of an authority that nobody here trusts.

    Expected: as for an expired one: not a byte of an entry goes to a stranger.
    """
    await _holding(scene, {"kind": "certificate", "certificate": "foreign"}, seconds=4.0)
    scene.saw("spells")


@fault("control plane")
async def certificate_changed(scene: Scene) -> None:
    """The ControlPlane's certificate is renewed by the same authority, and every connection is cut.

    Expected: nobody notices.
    """
    await scene.world.control_plane.fault("certificate", certificate="renewed")
    scene.saw("certificates")


@fault(
    "control plane", impossible=lambda w: None if w.own_hosts else "no process here can have its own hosts"
)
async def name_gone(scene: Scene) -> None:
    """The ControlPlane's host name is unknown for four seconds, and every connection is cut.

    Expected: as for any outage.
    """
    scene.world.keep_name(False)
    try:
        await _holding(scene, {"kind": "outage", "seconds": 0.1}, seconds=4.0)
    finally:
        scene.world.keep_name(True)
    scene.saw("spells")


@fault("control plane")
async def connections_closed(scene: Scene) -> None:
    """Every connection is closed a moment after an answer, while the next request may be on its way.

    Expected: sent again under the same key, at once.
    """
    rules = [{"kind": "close", "seconds": seconds, "share": 0.4} for seconds in (0.0, 0.005, 0.03)]
    await _holding(scene, *rules, seconds=4.0)
    scene.saw("spells")


@fault("control plane")
async def key_revoked(scene: Scene) -> None:
    """The API key is revoked; some seconds later the file that the services read it from has the new one.

    Expected: everything is held, no attempt is counted; it goes on by itself with the new key.
    """
    world = scene.world
    new = await world.control_plane.change_key()
    await asyncio.sleep(scene.random.uniform(1.0, 4.0))
    world.write_key(new)
    scene.saw("keys")
