"""The names in Redis: public ones as they were, our own beside them in the same slot of a cluster."""

from __future__ import annotations

import pytest
from redis.crc import key_slot

from common.streams import GREATEST_ID, Stream, command_key, presence_key, registrar_turn_key, side_key

STREAMS = [
    ("queue:usage_records", "usage_forwarder"),
    ("queue:session_lifecycle", "session_notifier"),
    ("queue:quota_refresh", "quota_refresher"),
    ("queue:commands", "registrar"),
    ("{tenant}queue", "g"),
    ("queue:{tenant}:usage", "g"),
    ("x", "g"),
]


def slot(key: str) -> int:
    return key_slot(key.encode())


@pytest.mark.parametrize(("name", "group"), STREAMS)
def test_every_key_of_a_stream_is_in_its_slot(name: str, group: str) -> None:
    stream = Stream(name, group)
    keys = {stream.dead_key, stream.ledger_key, stream.seen_key, stream.turn_key}
    assert {slot(key) for key in keys} == {slot(name)}
    assert len(keys | {name}) == 5


def test_the_slots_are_those_that_redis_computes() -> None:
    """Measured with CLUSTER KEYSLOT (docs/decisions)."""
    assert (slot("queue:usage_records"), slot("{queue:usage_records}:dead")) == (185, 185)
    assert slot("queue:usage_records:dead") == 11791


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("queue:usage_records", "{queue:usage_records}:dead"),
        ("{tenant}queue", "{tenant}queue:dead"),
        ("a{b}{c}", "a{b}{c}:dead"),
    ],
)
def test_a_side_key_is_the_name_in_braces_unless_it_has_a_tag(name: str, want: str) -> None:
    assert side_key(name, "dead") == want
    assert slot(want) == slot(name)


@pytest.mark.parametrize("name", ["{}queue", "queue{", "queue}", "a}b", "a}b{c}", "{queue", "a{}b"])
def test_a_name_whose_slot_nobody_can_share_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="hash tag"):
        side_key(name, "dead")


def test_the_twin_is_named_after_its_group_and_begins_behind_every_id() -> None:
    assert Stream("queue:usage_records", "usage_forwarder").dead_group == "usage_forwarder:dead"
    assert f"{2**64 - 1}-{2**64 - 1}" == GREATEST_ID


def test_keys_of_a_server_are_its_own() -> None:
    for key in (presence_key, registrar_turn_key):
        assert key("a") != key("b")
        assert key("a").startswith("dataplane:a:")
    assert command_key("a", "1") == "dataplane:a:command:1"
