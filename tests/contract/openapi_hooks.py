"""What the schema cannot say, for schemathesis: a record's key is its id, its session is the path's."""

from __future__ import annotations

import re
from typing import Any

import schemathesis
from schemathesis import Case, HookContext

ID = re.compile(r"[A-Za-z0-9._:~-]{1,128}")


@schemathesis.hook
def before_call(context: HookContext, case: Case, kwargs: Any) -> None:
    """Make the key and the session of a request agree with its body, where both are there."""
    body, session = case.body, (case.path_parameters or {}).get("session_id")
    if session is None or not isinstance(body, dict):
        return
    key = body.get("transaction_id")
    if "Idempotency-Key" in (case.headers or {}) and isinstance(key, str) and ID.fullmatch(key):
        case.headers["Idempotency-Key"] = key
    records = body.get("usage_records")
    for record in records if isinstance(records, list) else [body]:
        if isinstance(record, dict) and isinstance(record.get("api_session_id"), str):
            record["api_session_id"] = session
