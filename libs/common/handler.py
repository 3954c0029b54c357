"""What the handlers of the three streams share: an entry is read by its schema, and sent under its own key."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

from common import schemas
from common.control_plane.client import Delivering
from common.delivery import Handler
from common.entries import Entry
from common.service import Running


class Message(Protocol):
    """What every entry says, whatever else it says."""

    @property
    def api_session_id(self) -> str: ...
    @property
    def transaction_id(self) -> str | None: ...


class EntryHandler(Handler, ABC):
    """Delivers entries of one stream, one request each; `deliver` is what a service adds."""

    ordered = False
    batch = 1

    def __init__(self, running: Running, stream: str, read: Callable[[bytes | None], Message]) -> None:
        self._stream = stream
        self._read = read
        self._client = running.client
        self._sender = running.sender
        self._timestamp = running.timestamp

    def decode(self, entry: Entry, data: bytes | None) -> str:
        """Reads the message; its session is the lane. Raises schemas.Invalid."""
        message = entry.message = self._read(data)
        assert data is not None  # or it would have been invalid
        entry.transaction_id = message.transaction_id or schemas.transaction_id(self._stream, entry.id, data)
        return message.api_session_id

    @abstractmethod
    def deliver(self, entry: Entry) -> Delivering:
        """One request, and what became of it; never raises for the network."""
