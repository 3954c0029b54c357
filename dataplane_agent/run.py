"""`dataplane run`: the services in the foreground, one process each.

The command line ends here: the process becomes the supervisor, without the libraries of the command line,
because what it has in memory its children have too.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

from cyclopts import Parameter

from dataplane_agent.target import Files

Services = Annotated[tuple[str, ...], Parameter(help="Which services; all four without any.")]
Replicas = Annotated[
    tuple[str, ...],
    Parameter(negative="", help="SERVICE=N: so many processes of a service; repeatable."),
]


def run(*services: str, replicas: Replicas = (), config: Files = ()) -> NoReturn:
    """Runs the services, restarts what dies, and stops the registrar last."""
    sys.stdout.flush()
    os.execv(sys.executable, command(services, replicas, [str(file) for file in config]))


def command(services: tuple[str, ...], replicas: tuple[str, ...], files: list[str]) -> list[str]:
    """The command line of the supervisor; `-P`: what lies in the working directory is not what is meant."""
    options = [part for one in replicas for part in ("--replicas", one)]
    options += [part for file in files for part in ("--config", file)]
    return [sys.executable, "-P", "-m", "dataplane_agent.supervisor", *options, *services]
