"""Laws of the registration that need nobody else: what the ControlPlane is told, and which address."""

from __future__ import annotations

import pytest

from common.config import Capabilities, Server
from registrar.registration import body, route_to


def test_the_registration_says_who_where_and_what() -> None:
    server = Server(
        id="s-1",
        region="eu-west-1",
        port=8123,
        capabilities=Capabilities(max_concurrent_sessions=7, supported_languages=("en-US", "de-DE")),
    )
    assert body(server, "10.0.0.7", "1.2.3") == {
        "server_id": "s-1",
        "region": "eu-west-1",
        "ip_address": "10.0.0.7",
        "port": 8123,
        "version": "1.2.3",
        "capabilities": {
            "max_concurrent_sessions": 7,
            "supported_products": "speech_transcription",
            "supported_languages": ("en-US", "de-DE"),
        },
    }


@pytest.mark.parametrize("url", ["https://127.0.0.1:8443", "http://127.0.0.1", "https://127.0.0.1/base"])
async def test_the_address_is_the_one_from_which_the_control_plane_is_reached(url: str) -> None:
    assert await route_to(url) == "127.0.0.1"


async def test_an_address_that_cannot_be_found_out_is_an_error() -> None:
    with pytest.raises(OSError, match=r".+"):
        await route_to("https://256.256.256.256")
