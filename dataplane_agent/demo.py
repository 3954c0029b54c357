"""`dataplane demo`: the whole thing on this machine, with nothing else installed.

Simulated AudioAPIServers write through an embedded Valkey; the four services deliver to a sandbox
ControlPlane over TLS. On the way a usage_forwarder and the active session_notifier are killed, and the
ControlPlane is cut off. At the end three books are compared: what was produced, what arrived, what Redis holds.
"""

from __future__ import annotations

import asyncio
import signal
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dataplane_agent.target import Failure

Seconds = Annotated[float, Parameter(help="How long traffic is produced.")]
Directory = Annotated[
    Path | None, Parameter(help="Keep logs, books and the streams here, instead of in a directory that goes.")
]

LEAST_SECONDS = 5.0
"""Less leaves no time to kill anything under load."""


async def demo(*, seconds: Seconds = 25.0, directory: Directory = None) -> int:
    """Runs the demo; exit code 1 if it does not add up."""
    if not LEAST_SECONDS <= seconds <= 86_400:
        raise Failure(f"--seconds: expected {LEAST_SECONDS:g} to 86400, got {seconds:g}", 2)
    try:
        from dataplane_agent import story
    except ModuleNotFoundError as missing:
        raise Failure(f"the demo needs {missing.name}: pip install 'dataplane-agent[sandbox]'", 2) from None
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, task.cancel)  # as Ctrl-C does: everything is stopped on the way out
    with ExitStack() as stack:
        if directory is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dataplane-demo-")))
        directory.mkdir(parents=True, exist_ok=True)
        return await story.tell(directory, seconds)
