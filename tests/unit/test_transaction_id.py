"""Derived ids hold for ever: a release that changed one would bill what is in flight twice."""

from __future__ import annotations

import pytest

from common import schemas

DATA = b'{"api_session_id":"session-0001"}'
GREATEST = "18446744073709551615-18446744073709551615"

# Computed with the standard library alone, from the rule in contract section 1.
GOLDEN = [
    ("queue:usage_records", "1700000000000-0", DATA, "ed79c0fe-ff37-5eb5-a37b-45711786009f"),
    ("queue:usage_records", "1700000000000-1", DATA, "6535af3e-7dee-525e-a316-ed8a81b84d88"),
    ("queue:session_lifecycle", "1700000000000-0", DATA, "5e6e0c13-2dfd-537e-9b03-00cc2fa8bc87"),
    ("queue:usage_records", "1700000000000-0", DATA + b" ", "472b5163-3215-5a11-8bfc-9b0579d23a34"),
    ("queue:usage_records", GREATEST, b"", "c6a7e5ce-06e1-5f03-bb19-d092dfc154d6"),
    ("queue:ü", "0-1", b"\xff\x00", "5a8e4552-d85e-5a66-b56b-58ac65f8996b"),
]


@pytest.mark.parametrize(("stream", "entry_id", "data", "want"), GOLDEN)
def test_the_derived_transaction_id_never_changes(stream: str, entry_id: str, data: bytes, want: str) -> None:
    assert schemas.transaction_id(stream, entry_id, data) == want
    assert schemas.transaction_id(stream, entry_id.encode(), data) == want


def test_the_batch_key_never_changes() -> None:
    assert schemas.batch_key(["a", "b"]) == "614bb9b3-8a57-55d8-927d-77667fa1a72d"


def test_another_batch_has_another_key() -> None:
    batches = [["a", "b"], ["b", "a"], ["a"], ["b"], ["ab"], ["a", "b", "c"]]
    assert len({schemas.batch_key(batch) for batch in batches}) == len(batches)
