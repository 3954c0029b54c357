"""`dataplane config`: is the configuration right, and where does each value come from?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter

from common.config import effective
from dataplane_agent import printing
from dataplane_agent.target import Files, Json, load

Origin = Annotated[bool, Parameter(negative="", help="Say after each value where it comes from.")]


def check(*, config: Files = ()) -> None:
    """Validates the configuration; tells every fault with its key and ends with exit code 2."""
    load(config)
    print("the configuration is valid")


def show(*, config: Files = (), origin: Origin = False, json: Json = False) -> None:
    """Shows the effective configuration, secrets masked, as a file would say it."""
    settings = load(config)
    values = effective(settings)
    if json:
        printing.json({"values": values, "origins": settings.origins} if origin else values)
        return
    for line in yaml(values, settings.origins if origin else {}):
        print(line)


def yaml(values: dict[str, Any], origins: dict[str, str], above: tuple[str, ...] = ()) -> Iterator[str]:
    """The lines of a configuration file; every value is written as JSON, which YAML reads too."""
    indent = "  " * len(above)
    for key, value in values.items():
        path = (*above, key)
        if isinstance(value, dict):
            yield f"{indent}{key}:"
            yield from yaml(value, origins, path)
        else:
            origin = origins.get(".".join(path))
            comment = f"  # {origin}" if origin else ""
            yield f"{indent}{key}: {msgspec.json.encode(value).decode()}{comment}"
