"""docs/openapi.yaml and the sandbox's ControlPlane say the same: schemathesis finds nothing between them."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import yaml

from sandbox.calls import CALLS
from sandbox.control_plane import ControlPlane

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "openapi.yaml"


def test_the_document_describes_the_ten_calls_and_no_others() -> None:
    paths = yaml.safe_load(DOCUMENT.read_text())["paths"]
    described = {
        (method.upper(), path) for path, item in paths.items() for method in item if method != "parameters"
    }
    assert described == {(route.method, route.path) for route in CALLS.values()}
    assert len(described) == 10


async def test_schemathesis_finds_nothing(control_plane: ControlPlane, tmp_path: Path) -> None:
    configuration = tmp_path / "schemathesis.toml"
    configuration.write_text(f'[auth.openapi.apiKey]\napi_key = "{control_plane.api_key}"\n')
    command = [
        *(str(Path(sys.executable).with_name("st")), "--config-file", str(configuration)),
        *("run", str(DOCUMENT), "--url", control_plane.url, "--tls-verify", str(control_plane.ca_file)),
        *("--phases", "coverage,fuzzing", "--max-examples", "5", "--seed", "1", "--no-shrink", "--no-color"),
    ]
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(HERE), "SCHEMATHESIS_HOOKS": "openapi_hooks"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    report, _ = await process.communicate()
    assert process.returncode == 0, report.decode()
    assert b"No issues found" in report
    assert control_plane.stats().recorded["usage"] > 0
