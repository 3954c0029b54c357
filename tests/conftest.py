"""How every test runs, and the ControlPlane it may talk to."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from sandbox.control_plane import ControlPlane

# Who runs in the background of a shell is started with SIGINT ignored, and so would be what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Repeatable, and never failing for a busy machine.
settings.register_profile(
    "project", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
# Many more, and others each time: `--hypothesis-profile=long`.
settings.register_profile("long", settings.get_profile("project"), derandomize=False, max_examples=400)
settings.load_profile("project")


@pytest.fixture(scope="session")
def sandbox_ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One certificate authority for the session: a ControlPlane made again is still trusted."""
    return tmp_path_factory.mktemp("ca") / "ca.pem"


@pytest.fixture
async def control_plane(sandbox_ca: Path) -> AsyncIterator[ControlPlane]:
    """A ControlPlane over TLS in this process, with an empty ledger; trust `control_plane.ca_file`."""
    async with ControlPlane(ca_file=sandbox_ca) as control_plane:
        yield control_plane
