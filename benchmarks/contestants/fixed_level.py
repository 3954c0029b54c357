"""The usage_forwarder with as many requests in flight as MAX_IN_FLIGHT says, always: what the level is measured by."""

from __future__ import annotations

import sys

from common import concurrency
from usage_forwarder.__main__ import main


class Fixed(concurrency.Level):
    """A level that learns nothing."""

    def begun(self) -> None:
        self.limit = self._most
        self.out += 1

    def answered(self, seconds: float) -> None: ...
    def strained(self, seconds: float) -> None: ...
    def begin_again(self) -> None: ...


if __name__ == "__main__":
    concurrency.START = sys.maxsize
    from common.control_plane import client

    client.Level = Fixed  # type: ignore[attr-defined]
    sys.exit(main())
