"""Ways in which the sandbox's ControlPlane breaks what is below HTTP: connections, certificates, half answers."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator

import httpx
import pytest

from sandbox.control_plane import ControlPlane

HEARTBEAT = {
    "status": "online",
    "metrics": dict.fromkeys(
        (
            "usage_records_processed",
            "control_plane_requests",
            "redis_queue_depth",
            "failed_deliveries",
            "memory_usage_mb",
            "cpu_usage_percent",
        ),
        1,
    ),
}


@pytest.fixture
async def http(control_plane: ControlPlane) -> AsyncIterator[httpx.AsyncClient]:
    context = ssl.create_default_context(cafile=str(control_plane.ca_file))
    headers = {"X-API-Key": control_plane.api_key}
    async with httpx.AsyncClient(base_url=control_plane.url, verify=context, headers=headers) as client:
        yield client


async def beat(http: httpx.AsyncClient) -> int:
    return (await http.put("/api/v1/servers/api-1/heartbeat", json=HEARTBEAT)).status_code


@pytest.mark.parametrize("stored", [False, True])
async def test_half_an_answer_breaks_off_after_its_headers(
    control_plane: ControlPlane, http: httpx.AsyncClient, stored: bool
) -> None:
    control_plane.fault("half_answer", stored=stored, count=1)
    with pytest.raises(httpx.RemoteProtocolError, match="body"):
        await beat(http)
    await control_plane.until(lambda: bool(control_plane.ledger.counts))
    assert control_plane.book().arrivals[0].verdict == ("refused" if stored else "fault")
    assert await beat(http) == 404


async def test_a_connection_is_closed_after_a_good_answer(control_plane: ControlPlane) -> None:
    control_plane.fault("close", seconds=0, count=1)
    context = ssl.create_default_context(cafile=str(control_plane.ca_file))
    reader, writer = await asyncio.open_connection("127.0.0.1", control_plane.port, ssl=context)
    writer.write(
        b"GET /api/v1/servers/api-1/public-keys HTTP/1.1\r\nHost: localhost\r\n"
        b"X-API-Key: " + control_plane.api_key.encode() + b"\r\n\r\n"
    )
    everything = await asyncio.wait_for(
        reader.read(), 5
    )  # to the end, which would not come without the fault
    assert everything.startswith(b"HTTP/1.1 200")
    assert everything.endswith(b"}")
    assert b"Connection: close" not in everything
    writer.close()


@pytest.mark.parametrize(
    ("certificate", "because"),
    [("expired", "expired"), ("foreign", "unable to get local issuer|self.signed")],
)
async def test_a_bad_certificate_is_seen_by_all_until_the_faults_are_cleared(
    control_plane: ControlPlane, http: httpx.AsyncClient, certificate: str, because: str
) -> None:
    assert await beat(http) == 404
    control_plane.fault("certificate", certificate=certificate)
    with pytest.raises(httpx.TransportError):
        await beat(http)  # the connection there was has been cut
    with pytest.raises(httpx.ConnectError, match=because):
        await beat(http)
    control_plane.clear_faults()
    for _ in range(100):
        try:
            assert await beat(http) == 404
            return
        except httpx.TransportError:
            await asyncio.sleep(0.01)
    raise AssertionError("the good certificate did not come back")


async def test_a_renewed_certificate_is_as_good_as_the_old_one(
    control_plane: ControlPlane, http: httpx.AsyncClient
) -> None:
    before = await _shown(control_plane)
    control_plane.fault("certificate", certificate="renewed")
    assert await _shown(control_plane) != before
    assert not control_plane.faults.rules


async def _shown(control_plane: ControlPlane) -> bytes:
    context = ssl.create_default_context(cafile=str(control_plane.ca_file))
    _, writer = await asyncio.open_connection("127.0.0.1", control_plane.port, ssl=context)
    shown: ssl.SSLObject = writer.get_extra_info("ssl_object")
    certificate = shown.getpeercert(binary_form=True)
    assert certificate is not None
    writer.close()
    return certificate


async def test_a_204_has_no_body_and_is_recorded_when_so_asked(
    control_plane: ControlPlane, http: httpx.AsyncClient
) -> None:
    control_plane.fault("status", status=204, stored=True)
    answer = await http.put("/api/v1/servers/api-1/heartbeat", json=HEARTBEAT)
    assert (answer.status_code, answer.content) == (204, b"")
