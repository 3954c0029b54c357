"""Lanes: one at a time per session and in stream order where it is promised, fair shares where it is not."""

from __future__ import annotations

from itertools import count
from random import Random

import pytest

from common.entries import Entry, Hand
from common.lanes import Batches, Lanes, Queue


def entry(number: int, lane: str = "a") -> Entry:
    made = Entry(f"{number}-0".encode(), b"x", "", None, 1, 0.0)
    made.lane = lane
    return made


def entries(*named: str) -> list[Entry]:
    """`"a"`, `"b"`, … in stream order, each in the lane it names."""
    return [entry(number, lane) for number, lane in enumerate(named, 1)]


def lanes(*held: Entry) -> tuple[Lanes, Hand]:
    hand = Hand()
    made = Lanes(hand.park)
    for one in held:
        hand.take([one])
        made.push(one)
    return made, hand


def take_all(queue: Queue | Batches | Lanes) -> list[list[Entry]]:
    taken = []
    while (request := queue.take()) is not None:
        taken.append(request)
    return taken


# -- without order -----------------------------------------------------------------------------------


@pytest.mark.parametrize("queue", [Queue(), Batches(1)], ids=["Queue", "Batches"])
def test_first_come_first_served(queue: Queue | Batches) -> None:
    held = entries("a", "b", "c")
    for one in held:
        queue.push(one)
    assert take_all(queue) == [[one] for one in held]
    assert queue.take() is None


@pytest.mark.parametrize("queue", [Queue(), Batches(3)], ids=["Queue", "Batches"])
def test_what_was_taken_and_not_sent_comes_first_again(queue: Queue | Batches) -> None:
    for one in entries("a", "a", "a", "a"):
        queue.push(one)
    taken = queue.take()
    assert taken is not None
    queue.push_back(taken)
    assert queue.take() == taken


@pytest.mark.parametrize("queue", [Queue(), Batches(2)], ids=["Queue", "Batches"])
def test_a_parked_entry_holds_up_nobody_and_comes_back_at_the_end(queue: Queue | Batches) -> None:
    first, second = entries("a", "a")
    queue.push(first)
    assert queue.take() == [first]
    queue.block(first)
    queue.push(second)
    queue.unblock(first)
    assert [one for request in take_all(queue) for one in request] == [second, first]


@pytest.mark.parametrize("queue", [Queue(), Batches(2)], ids=["Queue", "Batches"])
def test_what_is_lost_is_not_taken(queue: Queue | Batches) -> None:
    first, second, third = entries("a", "a", "b")
    for one in (first, second, third):
        queue.push(one)
    queue.remove([first, third, entry(9)])
    assert take_all(queue) == [[second]]
    queue.push(first)
    queue.clear()
    assert queue.take() is None


def test_while_more_is_read_a_request_waits_until_it_is_full() -> None:
    batches = Batches(2)
    batches.expect(True)
    batches.push(entry(1, "a"))
    assert (batches.ready, batches.take()) == (0, None)
    batches.push(entry(2, "a"))
    assert batches.ready == 1
    assert [one.id for one in batches.take() or ()] == [b"1-0", b"2-0"]
    batches.push(entry(3, "a"))
    for number in (4, 5, 6, 7):
        batches.push(entry(number, "b"))
    assert (batches.ready, batches.take()) == (0, None)  # those behind it are full, and wait for their turn
    assert batches.expect(False)
    assert batches.ready == 3
    assert [one.id for one in batches.take() or ()] == [b"3-0"]


def test_a_batch_is_of_one_session_and_no_larger_than_told() -> None:
    queue = Batches(3)
    held = entries("a", "b", "a", "a", "b", "a")
    for one in held:
        queue.push(one)
    requests = take_all(queue)
    assert [[one.id for one in request] for request in requests] == [
        [b"1-0", b"3-0", b"4-0"],
        [b"2-0", b"5-0"],
        [b"6-0"],
    ]


def test_a_busy_session_does_not_keep_the_others_waiting() -> None:
    queue = Batches(2)
    for one in entries(*["busy"] * 7, "small", "other"):
        queue.push(one)
    served = [request[0].lane for request in take_all(queue)]
    assert served == ["busy", "small", "other", "busy", "busy", "busy"]


# -- in order ----------------------------------------------------------------------------------------


def test_a_session_has_one_request_at_a_time_and_sessions_go_side_by_side() -> None:
    first, other, second = entries("a", "b", "a")
    held, _ = lanes(first, other, second)
    assert take_all(held) == [[first], [other]]
    held.finish(first)
    assert take_all(held) == [[second]]
    held.finish(second)
    held.finish(other)
    assert held.take() is None


def test_an_older_entry_takes_its_place_in_its_session() -> None:
    first, third, fifth = entry(1), entry(30), entry(200)
    held, _ = lanes(third, fifth)
    held.push(first)  # a redriven one, before anything is out
    assert held.take() == [first]
    held.push(entry(0))  # behind what is out already
    held.push(entry(100))
    order = [first]
    while order[-1] is not fifth:
        held.finish(order[-1])
        request = held.take()
        assert request is not None
        order += request
    assert [one.id for one in order] == [b"1-0", b"0-0", b"30-0", b"100-0", b"200-0"]


def test_ids_are_compared_as_numbers() -> None:
    ids = ["9-0", "10-0", "10-2", "10-10"]
    made = [Entry(entry_id.encode(), b"x", "", None, 1, 0.0) for entry_id in ids]
    for one in made:
        one.lane = "a"
    held, _ = lanes(made[3], made[0], made[2], made[1])
    for one in made:
        assert held.take() == [one]
        held.finish(one)


def test_what_waits_behind_a_blocked_head_is_parked_with_it_and_returns_with_it() -> None:
    head, behind, other = entries("a", "a", "b")
    held, hand = lanes(head, behind, other)
    assert held.take() == [head]
    hand.park(head, True)
    held.block(head)
    assert (hand.parked, hand.active) == (2, 1)
    late = entry(4)
    hand.take([late])
    held.push(late)
    assert (hand.parked, hand.active) == (3, 1)
    assert take_all(held) == [[other]]
    held.unblock(head)
    assert (hand.parked, hand.active) == (0, 4)
    assert take_all(held) == [[head]]


def test_a_head_that_was_not_sent_is_the_next_again() -> None:
    first, other = entries("a", "b")
    held, _ = lanes(first, other)
    assert held.take() == [first]
    held.push_back([first])
    assert take_all(held) == [[first], [other]]


@pytest.mark.parametrize("how", ["waiting", "blocked", "out"])
def test_when_the_head_is_lost_the_next_one_goes(how: str) -> None:
    head, behind = entries("a", "a")
    held, hand = lanes(head, behind)
    if how != "waiting":
        held.take()
    if how == "blocked":
        hand.park(head, True)
        held.block(head)
    held.remove([head])
    hand.drop([head])
    assert take_all(held) == [[behind]]
    assert (hand.parked, hand.active) == (0, 1)


def test_what_is_lost_behind_a_blocked_head_leaves_the_head_blocked() -> None:
    head, lost, behind = entries("a", "a", "a")
    held, hand = lanes(head, lost, behind)
    held.take()
    hand.park(head, True)
    held.block(head)
    held.remove([lost])
    hand.drop([lost])
    assert (hand.parked, hand.active) == (2, 0)
    assert held.take() is None
    held.unblock(head)
    assert held.take() == [head]
    held.finish(head)
    assert held.take() == [behind]


def test_a_whole_session_can_be_lost_in_any_order() -> None:
    head, middle, last = entries("a", "a", "a")
    held, _ = lanes(head, middle, last)
    held.remove([last, head, middle])
    assert held.take() is None
    again = entry(9)
    held.push(again)
    assert held.take() == [again]


def test_what_ends_after_all_was_forgotten_changes_nothing() -> None:
    first, second = entries("a", "a")
    held, _ = lanes(first)
    held.take()
    held.clear()
    held.push(second)
    held.finish(first)
    assert take_all(held) == [[second]]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_a_session_stays_in_order_with_one_request_out(seed: int) -> None:
    """A random life: read, take, end, park, wake, lose. Nothing is stuck, nothing overtakes, the books are right."""
    random, numbers = Random(seed), count(1)
    held, hand = lanes()
    out: dict[bytes, Entry] = {}
    parked: dict[bytes, Entry] = {}
    ended: list[Entry] = []
    for _ in range(400):
        match random.randrange(7):
            case 0 | 1:
                made = entry(next(numbers), random.choice("abc"))
                hand.take([made])
                held.push(made)
            case 2 | 3:
                for taken in held.take() or []:
                    assert taken.lane not in {one.lane for one in (*out.values(), *parked.values())}
                    out[taken.id] = taken
            case 4 if out:
                done = out.pop(random.choice(list(out)))
                hand.drop([done])
                held.finish(done)
                ended.append(done)
            case 5 if out:
                late = out.pop(random.choice(list(out)))
                hand.park(late, True)
                held.block(late)
                parked[late.id] = late
            case 6 if parked:
                woken = parked.pop(random.choice(list(parked)))
                hand.park(woken, False)
                held.unblock(woken)
            case _ if random.random() < 0.2 and len(hand):
                lost = random.choice(list(hand))
                if lost.id not in out:
                    parked.pop(lost.id, None)
                    held.remove([lost])
                    hand.drop([lost])
        blocked = {one.lane for one in parked.values()}
        assert hand.parked == sum(one.lane in blocked for one in hand)
    for woken in parked.values():
        hand.park(woken, False)
        held.unblock(woken)
    for done in out.values():
        hand.drop([done])
        held.finish(done)
        ended.append(done)
    while (request := held.take()) is not None:
        hand.drop(request)
        held.finish(request[0])
        ended += request
    assert len(hand) == 0
    for lane in "abc":
        numbers_ended = [int(one.id.split(b"-")[0]) for one in ended if one.lane == lane]
        assert numbers_ended == sorted(numbers_ended)
