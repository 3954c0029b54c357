"""`python -m usage_forwarder`, the console script `usage-forwarder`."""

from __future__ import annotations

import sys

from common import service
from common.service import Running, Service
from common.streams import Stream
from usage_forwarder.handler import UsageForwarder

NAME = "usage_forwarder"


def build(running: Running) -> Service:
    handler = UsageForwarder(running)
    return Service(Stream(running.config.streams.usage_records, NAME), handler, on_figures=handler.estimate)


def main() -> int:
    return service.run(NAME, build)


if __name__ == "__main__":
    sys.exit(main())
