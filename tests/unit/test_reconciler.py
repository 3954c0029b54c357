"""The reconciler's verdicts over three small books. Names: r(n) is the n-th usage record, id t<n>."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
import pytest

from sandbox.book import Row
from sandbox.ledger import Arrival, ControlPlaneBook, Grant, Transaction
from sandbox.reconciler import Reconciliation, reconcile
from sandbox.redis_book import Grants, Holding

USAGE, LIFECYCLE, QUOTA = "queue:usage_records", "queue:session_lifecycle", "queue:quota_refresh"
STREAM = {"usage": USAGE, "start": LIFECYCLE, "complete": LIFECYCLE, "quota": QUOTA}


def row(n: int, kind: Any = "usage", **fields: Any) -> Row:
    values: dict[str, Any] = {
        "stream": STREAM[kind],
        "kind": kind,
        "entry_id": f"{n}-0",
        "transaction_id": f"t{n}",
        "session": "s",
        "sha256": f"hash{n}",
        "expected": "ok",
    }
    return Row(**{**values, **fields})


def transaction(position: int, n: int, kind: str = "usage", **fields: Any) -> Transaction:
    body = {
        "audio_duration_seconds": 1.5,
        "connection_duration_seconds": 2,
        "data_bytes_processed": 3,
        "request_count": 4,
    }
    values: dict[str, Any] = {
        "position": position,
        "transaction_id": f"t{n}",
        "kind": kind,
        "session_id": "s",
        "content": f"content{n}",
        "fingerprint": f"print{n}",
        "credits": 1,
        "audio_seconds": 1.5,
        "connection_seconds": 2,
        "recorded_at": 0,
        "body": msgspec.Raw(msgspec.json.encode(body)),
    }
    return Transaction(**{**values, **fields})


def arrival(n: int, endpoint: str = "usage_records", **fields: Any) -> Arrival:
    values: dict[str, Any] = {
        "seq": 0,
        "request": 0,
        "at": 0,
        "endpoint": endpoint,
        "transaction_id": f"t{n}",
        "idempotency_key": f"t{n}",
        "content": f"content{n}",
        "status": 200,
        "verdict": "recorded",
    }
    return Arrival(**{**values, **fields})


def book(*transactions: Transaction, arrivals: list[Arrival] | None = None) -> ControlPlaneBook:
    return ControlPlaneBook(list(transactions), arrivals or [], [], [])


def wrongs(verdict: Reconciliation) -> dict[str, int]:
    """The kinds of wrong that were found, with how many."""
    figures = msgspec.to_builtins(verdict.streams)
    found: Counter[str] = Counter()
    for stream in figures.values():
        found.update(
            {name: len(value) for name, value in stream.items() if isinstance(value, list) and value}
        )
    return dict(found)


def test_every_entry_is_delivered_dead_pending_or_in_the_backlog() -> None:
    rows = [row(1), row(2, expected="invalid", transaction_id=None), row(3), row(4)]
    redis = {USAGE: Holding(pending={"3-0"}, dead={"2-0": "invalid"}, backlog={"4-0"})}
    verdict = reconcile(rows, book(transaction(1, 1)), redis)
    stream = verdict.streams[USAGE]
    assert (stream.produced, stream.delivered, stream.pending, stream.backlog) == (4, 1, 1, 1)
    assert stream.dead == {"invalid": 1}
    assert verdict.ok
    assert not verdict.settled


def test_an_entry_that_is_nowhere_is_lost_and_named() -> None:
    verdict = reconcile([row(1), row(2)], book(transaction(1, 2)), {USAGE: Holding()})
    assert wrongs(verdict) == {"lost": 1}
    assert "1-0" in verdict.wrong("lost")[0]
    assert "t1" in verdict.wrong("lost")[0]
    assert not verdict.ok


def test_an_entry_that_somebody_else_removed_is_not_lost_but_counted() -> None:
    rows = [row(1), row(2), row(3)]
    removed = {(USAGE, "1-0"), (USAGE, "2-0"), (QUOTA, "3-0")}
    verdict = reconcile(rows, book(transaction(1, 2)), {}, removed=removed)
    assert wrongs(verdict) == {"lost": 1}  # the third: it was another stream's entry that was removed
    assert (verdict.total("removed"), verdict.total("delivered")) == (1, 1)


def test_a_request_that_somebody_else_removed_need_not_be_answered() -> None:
    recorded = book(transaction(1, 1, "refresh"), transaction(2, 2, "refresh"))
    rows = [row(1, "quota"), row(2, "quota")]
    verdict = reconcile(rows, recorded, {}, Grants(), removed={(QUOTA, "1-0")})
    assert wrongs(verdict) == {"unanswered": 1}
    assert "t2" in verdict.wrong("unanswered")[0]


def test_an_invalid_entry_that_vanished_is_lost_too() -> None:
    verdict = reconcile([row(1, expected="invalid")], book(), {})
    assert wrongs(verdict) == {"lost": 1}


def test_an_entry_recorded_but_not_yet_settled_is_pending_and_not_counted_twice() -> None:
    verdict = reconcile([row(1)], book(transaction(1, 1)), {USAGE: Holding(pending={"1-0"})})
    stream = verdict.streams[USAGE]
    assert (stream.delivered, stream.pending) == (0, 1)


def test_a_good_entry_in_the_dead_view_is_unexpected() -> None:
    verdict = reconcile([row(1)], book(), {USAGE: Holding(dead={"1-0": "rejected"})})
    assert wrongs(verdict) == {"unexpected_dead": 1}


def test_a_conflict_that_the_producer_made_is_expected() -> None:
    rows = [row(1), row(2, transaction_id="t1")]
    redis = {USAGE: Holding(dead={"2-0": "conflict"})}
    arrivals = [arrival(1), arrival(1, content="other", verdict="conflict", status=409)]
    verdict = reconcile(rows, book(transaction(1, 1), arrivals=arrivals), redis)
    assert verdict.ok
    assert verdict.dead() == {"conflict": 1}


def test_a_malformed_entry_that_was_recorded_is_unexpected() -> None:
    verdict = reconcile([row(1, expected="invalid")], book(transaction(1, 1)), {})
    assert wrongs(verdict) == {"unexpected_delivered": 1}


def test_one_id_produced_twice_is_delivered_twice_and_billed_once() -> None:
    rows = [row(1), row(2, transaction_id="t1", sha256="hash1")]
    arrivals = [arrival(1), arrival(1, verdict="duplicate", status=409)]
    verdict = reconcile(rows, book(transaction(1, 1), arrivals=arrivals), {})
    assert verdict.ok
    assert (verdict.total("delivered"), verdict.total("duplicates")) == (2, 1)


def test_the_same_content_under_an_id_nobody_produced_is_billed_twice() -> None:
    again = transaction(2, 9, fingerprint="print1")
    verdict = reconcile([row(1)], book(transaction(1, 1), again), {})
    assert wrongs(verdict) == {"billed_twice": 1}


def test_an_id_nobody_produced_is_a_changed_key() -> None:
    verdict = reconcile([row(1)], book(transaction(1, 9)), {})
    assert wrongs(verdict) == {"key_changes": 1, "lost": 1}


def test_a_key_that_is_not_the_records_id_is_a_changed_key_unless_in_a_batch() -> None:
    batched = reconcile(
        [row(1)], book(transaction(1, 1), arrivals=[arrival(1, idempotency_key="b", batched=True)]), {}
    )
    single = reconcile([row(1)], book(transaction(1, 1), arrivals=[arrival(1, idempotency_key="b")]), {})
    assert (wrongs(batched), wrongs(single)) == ({}, {"key_changes": 1})


def test_other_content_in_a_repetition_is_a_content_change() -> None:
    arrivals = [arrival(1, status=503, verdict="fault"), arrival(1, content="other")]
    verdict = reconcile([row(1)], book(transaction(1, 1), arrivals=arrivals), {})
    assert wrongs(verdict) == {"content_changes": 1}


@pytest.mark.parametrize(
    ("figures", "session", "changes"),
    [((1500, 2000, 3, 4), "s", 0), ((1501, 2000, 3, 4), "s", 1), ((1500, 2000, 3, 4), "other", 1)],
)
def test_what_is_recorded_must_be_what_was_produced(
    figures: tuple[int, int, int, int], session: str, changes: int
) -> None:
    verdict = reconcile([row(1, figures=figures, session=session)], book(transaction(1, 1)), {})
    assert len(verdict.wrong("content_changes")) == changes


def test_a_sessions_events_are_recorded_in_stream_order() -> None:
    rows = [row(10, "complete"), row(9, "start"), row(11, "start", session="other")]
    good = book(transaction(1, 11, "start", session_id="other"), transaction(2, 9, "start"))
    good.transactions.append(transaction(3, 10, "complete"))
    assert reconcile(rows, good, {}).ok
    swapped = book(transaction(1, 10, "complete"), transaction(2, 9, "start"))
    verdict = reconcile(rows[:2], swapped, {})
    assert wrongs(verdict) == {"out_of_order": 1}


def test_a_complete_after_a_dead_start_is_in_order() -> None:
    rows = [row(1, "start", expected="invalid"), row(2, "complete")]
    redis = {LIFECYCLE: Holding(dead={"1-0": "invalid"})}
    assert reconcile(rows, book(transaction(1, 2, "complete")), redis).ok


def test_a_grant_nobody_asked_for_and_a_second_answer_are_second_grants() -> None:
    recorded = book(transaction(1, 1, "refresh"), transaction(2, 2, "refresh"), transaction(3, 9, "refresh"))
    answers = Grants(Counter({"t1": 1, "t2": 2}))
    verdict = reconcile([row(1, "quota"), row(2, "quota")], recorded, {}, answers)
    assert wrongs(verdict) == {"second_grants": 2}


def test_two_grants_of_one_transaction_at_the_control_plane_are_a_second_grant() -> None:
    recorded = book(transaction(1, 1, "refresh"))
    recorded.grants = [Grant("t1", "s", 1, False, 0, 0)] * 2
    assert wrongs(reconcile([row(1, "quota")], recorded, {})) == {"second_grants": 1}


def test_a_settled_request_without_its_answer_is_unanswered_unless_answers_were_trimmed() -> None:
    rows, recorded = [row(5, "quota")], book(transaction(1, 5, "refresh"))
    assert wrongs(reconcile(rows, recorded, {}, Grants())) == {"unanswered": 1}
    assert reconcile(rows, recorded, {}, Grants(complete_from_ms=5)).ok
    assert reconcile(rows, recorded, {QUOTA: Holding(pending={"5-0"})}, Grants()).ok
    assert reconcile(rows, recorded, {}).ok


def test_an_uncertain_entry_counts_only_when_it_arrived() -> None:
    known = row(1, entry_id=None)
    derived = row(2, entry_id=None, transaction_id=None, sha256=None)
    nothing = reconcile([known, derived], book(), {})
    assert (nothing.total("produced"), nothing.total("uncertain")) == (0, 2)
    both = reconcile([known, derived], book(transaction(1, 1), transaction(2, 77)), {})
    assert (both.total("produced"), both.total("delivered"), both.total("uncertain")) == (2, 2, 0)
    assert nothing.ok
    assert both.ok


def test_entries_of_somebody_else_are_foreign_and_no_fault() -> None:
    verdict = reconcile([row(1)], book(transaction(1, 1)), {USAGE: Holding(dead={"8-0": "invalid"})})
    assert verdict.total("foreign") == 1
    assert verdict.ok


def test_the_report_ends_with_the_totals_and_names_what_is_wrong() -> None:
    rows = [row(1), row(2), row(3, expected="invalid", transaction_id=None)]
    redis = {USAGE: Holding(dead={"3-0": "invalid"})}
    report = reconcile(rows, book(transaction(1, 1)), redis).render().splitlines()
    assert any(line.startswith("lost: queue:usage_records: entry 2-0") for line in report)
    assert report[-10:] == [
        "produced             3",
        "delivered            1",
        "duplicates           0",
        "dead                 1 (invalid 1)",
        "pending              0",
        "backlog              0",
        "lost                 1",
        "billed twice         0",
        "out of order         0",
        "second grants        0",
    ]
