"""`python -m session_notifier`, the console script `session-notifier`."""

from __future__ import annotations

import sys

from common import service
from common.service import Running, Service
from common.streams import Stream
from session_notifier.handler import SessionNotifier

NAME = "session_notifier"


def build(running: Running) -> Service:
    return Service(Stream(running.config.streams.session_lifecycle, NAME), SessionNotifier(running))


def main() -> int:
    return service.run(NAME, build)


if __name__ == "__main__":
    sys.exit(main())
