"""What the ControlPlane accepts: one strict Struct per body, written from the contract alone.

Unknown fields are refused, because an agent must not forward them; docs/openapi.yaml says the same.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

ID_PATTERN = r"^[A-Za-z0-9._:~-]{1,128}$"
MAX_BODY_BYTES = 1024 * 1024

Id = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9._:~-]{1,128}\Z")]
CustomerId = Annotated[str, Meta(min_length=1, max_length=256, pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z")]
Text = Annotated[str, Meta(max_length=4096)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Instant = Annotated[datetime, Meta(tz=True)]
Seconds = Annotated[float, Meta(ge=0, le=1_000_000_000)]
Count = Annotated[float, Meta(ge=0, multiple_of=1)]
"""JSON knows no integers: 1.0 is one."""
Figure = Annotated[float, Meta(ge=0)]


class Strict(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A body that has these fields and no others."""


class UsageRecord(Strict):
    """POST /sessions/{id}/usage-records"""

    transaction_id: Id
    api_session_id: Id
    customer_id: CustomerId
    product_code: Literal["speech_transcription"]
    connection_duration_seconds: Seconds
    data_bytes_processed: Annotated[float, Meta(ge=0, le=2**40, multiple_of=1)]
    audio_duration_seconds: Seconds
    request_count: Annotated[float, Meta(ge=1, le=1_000_000_000, multiple_of=1)]
    request_timestamp: Instant
    response_timestamp: Instant
    processing_timestamp: Instant
    server_instance_id: Id
    api_server_region: Name
    agent_version: Name


class UsageBatch(Strict):
    """The same call with several records of one session."""

    usage_records: Annotated[list[UsageRecord], Meta(min_length=1)]


class SessionStart(Strict):
    """POST /sessions/{id}/start"""

    transaction_id: Id
    customer_id: CustomerId
    event_type: Literal["start"]
    started_at: Instant
    timestamp: Instant
    server_instance_id: Id
    api_server_region: Name
    agent_version: Name
    metadata: dict[str, Any] | None = None


class SessionComplete(Strict):
    """POST /sessions/{id}/complete"""

    transaction_id: Id
    customer_id: CustomerId
    event_type: Literal["complete"]
    completed_at: Instant
    timestamp: Instant
    server_instance_id: Id
    api_server_region: Name
    agent_version: Name
    disconnect_reason: Text | None = None
    final_usage_summary: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None


class QuotaRefresh(Strict):
    """POST /sessions/{id}/refresh"""

    transaction_id: Id
    api_session_id: Id
    customer_id: CustomerId
    product_code: Literal["speech_transcription"]
    timestamp: Instant
    server_instance_id: Id
    api_server_region: Name
    agent_version: Name


class Capabilities(Strict):
    max_concurrent_sessions: Annotated[float, Meta(ge=1, multiple_of=1)]
    supported_products: str | list[str]
    supported_languages: str | list[str]


class Registration(Strict):
    """POST /servers/register"""

    server_id: Id
    region: Name
    ip_address: Name
    port: Annotated[float, Meta(ge=1, le=65535, multiple_of=1)]
    version: Name
    capabilities: Capabilities


class HeartbeatMetrics(Strict):
    usage_records_processed: Count
    control_plane_requests: Count
    redis_queue_depth: Count
    failed_deliveries: Count
    memory_usage_mb: Figure
    cpu_usage_percent: Figure


class Heartbeat(Strict):
    """PUT /servers/{id}/heartbeat"""

    status: Literal["online", "offline", "degraded"]
    metrics: HeartbeatMetrics


class CommandResult(Strict):
    """POST /servers/{id}/command-results"""

    command_id: Id
    success: bool
    execution_timestamp: Instant
    result: Any = None
    error_message: Text | None = None


class Shutdown(Strict):
    """POST /servers/{id}/shutdown"""

    reason: Text
    timestamp: Instant
