"""Every name the agent uses in Redis, on one page.

    key                                  structure  written by            read by               bounded by
    queue:usage_records                  stream     AudioAPIServer        usage_forwarder       deleted when settled
    queue:session_lifecycle              stream     AudioAPIServer        session_notifier      deleted when settled
    queue:quota_refresh                  stream     AudioAPIServer        quota_refresher       deleted when settled
    queue:quota_response                 stream     quota_refresher       AudioAPIServer        MINID, one hour
    queue:commands                       stream     registrar (poll)      registrar             deleted when settled
    {<stream>}:dead                      hash       settlement (bury)     CLI                   one field per dead entry
    {<stream>}:ledger                    hash       settlement, sentinel  CLI, metrics          a dozen fields
    {<stream>}:seen                      hash       sentinel (1 s)        sentinel              six fields
    {<stream>}:turn                      string     turn                  turn                  time to live
    dataplane:<server>:presence          hash       presence (5 s)        registrar, CLI        stale fields are removed
    dataplane:<server>:command:<id>      string     registrar             registrar             24 h
    dataplane:<server>:command:<id>/<digest>
                                         string     registrar             registrar             24 h (a refused one)
    dataplane:<server>:turn:registrar    string     turn                  turn                  time to live
    dataplane:public_keys                string     registrar             AudioAPIServer        one JWKS document

Groups: G = the service's name, with its twin `G:dead`, the dead-letter view.
Consumers in G: `<service>-<host>-<pid>-<6 hex>` and `handover`; consumers in the twin are the reasons.
"""

from __future__ import annotations

import msgspec

HANDOVER = "handover"
"""The consumer that holds what stopped processes left and what operators redrove; everybody looks into it."""

GREATEST_ID = "18446744073709551615-18446744073709551615"
"""The twin group starts here, so that nobody can read new entries through it."""

PUBLIC_KEYS = "dataplane:public_keys"

FIELD_DATA = b"data"
FIELD_CORRELATION_ID = b"correlation_id"
FIELD_TRACEPARENT = b"traceparent"

MAX_ENTRY_BYTES = 256 * 1024
"""An entry, all its fields together, is at most this long; a longer one is dead on arrival (`invalid`)."""


def side_key(stream: str, suffix: str) -> str:
    """A key that shares the stream's hash slot on a Redis Cluster.

    Raises ValueError for a name whose slot cannot be shared (`}` outside of one tag, or an empty tag).
    """
    opened, closed = stream.find("{"), stream.find("}")
    if opened == -1 and closed == -1:
        return f"{{{stream}}}:{suffix}"
    if opened == -1 or closed <= opened + 1:
        raise ValueError(f"stream name {stream!r} has no usable hash tag")
    return f"{stream}:{suffix}"


class Stream(msgspec.Struct, frozen=True):
    """One stream with its group and every name derived from the two."""

    name: str
    group: str

    @property
    def dead_group(self) -> str:
        return f"{self.group}:dead"

    @property
    def dead_key(self) -> str:
        return side_key(self.name, "dead")

    @property
    def ledger_key(self) -> str:
        return side_key(self.name, "ledger")

    @property
    def seen_key(self) -> str:
        return side_key(self.name, "seen")

    @property
    def turn_key(self) -> str:
        return side_key(self.name, "turn")


def presence_key(server_id: str) -> str:
    return f"dataplane:{server_id}:presence"


def command_key(server_id: str, command_id: str) -> str:
    return f"dataplane:{server_id}:command:{command_id}"


def registrar_turn_key(server_id: str) -> str:
    return f"dataplane:{server_id}:turn:registrar"
