"""What the commands do: three questions that change nothing but the key set's age."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from common import figures
from common.redis_border import Scripts
from common.signing import KeySet
from common.streams import Stream
from registrar.commands import Run
from registrar.overview import Overview, overall


def runs(keys: KeySet, overview: Overview, scripts: Scripts, streams: list[Stream]) -> dict[str, Run]:
    """The commands by their type; each takes the parameters and gives the result, or raises."""

    async def refresh_public_keys(_: Mapping[str, Any]) -> dict[str, Any]:
        await keys.refresh()
        return {"kids": keys.kids}

    async def health_check(_: Mapping[str, Any]) -> dict[str, Any]:
        await overview.look()
        services = overview.services()
        return {"status": overall(services.values()), "services": services}

    async def get_metrics(_: Mapping[str, Any]) -> dict[str, Any]:
        await overview.look()
        found = {stream.name: await figures.read(scripts, stream) for stream in streams}
        return {
            "metrics": msgspec.to_builtins(overview.figures()),
            "streams": {name: msgspec.to_builtins(read) for name, read in found.items()},
        }

    return {
        "refresh_public_keys": refresh_public_keys,
        "health_check": health_check,
        "get_metrics": get_metrics,
    }
