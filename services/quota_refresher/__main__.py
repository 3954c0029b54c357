"""`python -m quota_refresher`, the console script `quota-refresher`."""

from __future__ import annotations

import sys

from common import service
from common.service import Running, Service
from common.streams import Stream
from quota_refresher.handler import QuotaRefresher

NAME = "quota_refresher"


def build(running: Running) -> Service:
    streams = running.config.streams
    return Service(
        Stream(streams.quota_refresh, NAME), QuotaRefresher(running), response_stream=streams.quota_response
    )


def main() -> int:
    return service.run(NAME, build)


if __name__ == "__main__":
    sys.exit(main())
