"""What lies in the streams before a run: records of one length, made by the server itself, fast."""

from __future__ import annotations

import json
from typing import cast

from redis import Redis

from common import schemas
from common.streams import GREATEST_ID

USAGE = "queue:usage_records"
QUOTA = "queue:quota_refresh"
GROUP = "usage_forwarder"
CHUNK = 10_000

TRANSACTION = "benchmark-record-%010d"
RECORD = {
    "api_session_id": "session-%05d",
    "customer_id": "customer-0001",
    "product_code": "speech_transcription",
    "connection_duration_seconds": 12.5,
    "data_bytes_processed": 400_000,
    "audio_duration_seconds": 11.25,
    "request_count": 3,
    "request_timestamp": "2026-01-01T12:00:00.000Z",
    "response_timestamp": "2026-01-01T12:00:12.500Z",
    "transaction_id": TRANSACTION,
}
TEMPLATE = json.dumps(RECORD)

_ADD = """
for i = tonumber(ARGV[2]), tonumber(ARGV[3]) do
  redis.call('XADD', KEYS[1], '*', ARGV[5], string.format(ARGV[1], i % tonumber(ARGV[4]), i))
end
"""

_LEAVE = (
    _ADD
    + """
redis.call('XREADGROUP', 'GROUP', ARGV[6], 'killed', 'COUNT', ARGV[3] + 1, 'STREAMS', KEYS[1], '>')
"""
)

_BURY = """
for _, row in ipairs(redis.call('XRANGE', KEYS[1], ARGV[2], '+', 'COUNT', ARGV[3])) do
  redis.call('XCLAIM', KEYS[1], ARGV[1], 'rejected', 0, row[1], 'FORCE', 'JUSTID')
  redis.call('HSET', KEYS[2], row[1], '{"reason":"rejected","error":"answered 422","http_status":422}')
  ARGV[2] = row[1]
end
return '(' .. ARGV[2]
"""


def record(number: int, sessions: int = 100) -> str:
    """The usage record of this number, as a producer writes it."""
    return TEMPLATE % (number % sessions, number)


def body_length(server_id: str, region: str, version: str) -> int:
    """Bytes of one record's body as the agent sends it."""
    timestamp = "2026-01-01T12:00:00.000+00:00"
    sent = schemas.usage_record(record(0).encode())
    return len(schemas.usage_body(sent, schemas.usage_stamp(server_id, region, timestamp, version)))


def record_key(number: int) -> str:
    return TRANSACTION % number


def fill(redis: Redis, records: int, sessions: int, *, first: int = 0, field: str = "data") -> None:
    """Puts so many records, of so many sessions, on the stream."""
    add = redis.register_script(_ADD)
    for begin in range(first, first + records, CHUNK):
        last = min(begin + CHUNK, first + records) - 1
        add(keys=[USAGE], args=[TEMPLATE, begin, last, sessions, field])


def fill_dead(redis: Redis, number: int) -> None:
    """Puts so many dead letters on an empty stream, and its live group behind them."""
    fill(redis, number, 100, first=5_000_000)
    redis.xgroup_create(USAGE, GROUP, id="$", mkstream=True)
    redis.xgroup_create(USAGE, f"{GROUP}:dead", id=GREATEST_ID)
    bury = redis.register_script(_BURY)
    start = b"-"
    for _ in range(0, number, CHUNK):
        start = cast(bytes, bury(keys=[USAGE, f"{{{USAGE}}}:dead"], args=[f"{GROUP}:dead", start, CHUNK]))


def leave_behind(redis: Redis, number: int) -> None:
    """Adds so many records that a consumer reads in the same moment, who is not there any more."""
    redis.register_script(_LEAVE)(keys=[USAGE], args=[TEMPLATE, 0, number - 1, 100, "data", GROUP])
