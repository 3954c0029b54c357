"""The usage_forwarder with `max_in_flight` requests in flight, always: what the level is measured by."""

from __future__ import annotations

import sys

from common import delivery
from common.concurrency import Level
from usage_forwarder.__main__ import main


class Fixed(Level):
    """A level that learns nothing."""

    @property
    def limit(self) -> int:
        return self._most

    def ended(self, seconds: float, refused: bool) -> None:
        self.out -= 1

    def begin_again(self) -> None: ...


if __name__ == "__main__":
    delivery.Level = Fixed  # type: ignore[attr-defined]
    sys.exit(main())
