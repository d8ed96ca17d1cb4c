"""Who goes first, who may overtake whom, and how often."""

import pytest

from router.ledger import Need, Placement
from router.queue import AdmissionQueue, QueueFull, Waiting
from router.views import Size
from tests.unit.router.test_ledger import PLACE


class Room:
    """So many free tokens of so many at all."""

    def __init__(self, free: int, total: int = 1000) -> None:
        self.free = free
        self.total = total
        self.asked = 0

    def place(self, waiting: Waiting) -> Placement | None:
        self.asked += 1
        return PLACE if waiting.need.total_tokens <= self.free else None

    def fits_ever(self, need: Need) -> bool:
        return need.total_tokens <= self.total

    def is_too_small_for(self, size: Size) -> bool:
        return size[0] + size[1] > self.free


def waiting(
    request_id: int,
    tokens: int = 10,
    *,
    priority: int = 0,
    start_by: float = 99.0,
    tenant: str = "",
) -> Waiting:
    return Waiting(
        request_id=request_id,
        need=Need(prompt_tokens=tokens - 2, max_new_tokens=2),
        priority=priority,
        start_by=start_by,
        tenant=tenant,
    )


def queue(*entries: Waiting, max_bypasses: int = 2) -> AdmissionQueue:
    made = AdmissionQueue(max_requests=10, max_bypasses=max_bypasses)
    for entry in entries:
        made.push(entry)
    return made


def admitted(line: AdmissionQueue, room: Room) -> list[int]:
    """Takes out all that fit, as if each left its room again at once."""
    ids = []
    while (found := line.next_admissible(room)) is not None:
        ids.append(found[0].request_id)
    return ids


def test_priority_then_deadline_then_arrival() -> None:
    line = queue(
        waiting(1, start_by=9),
        waiting(2, start_by=5),
        waiting(3, start_by=5),
        waiting(4, priority=1),
        waiting(5, priority=-1, start_by=1),
    )
    assert admitted(line, Room(100)) == [4, 2, 3, 1, 5]


def test_request_that_fits_passes_one_that_does_not() -> None:
    line = queue(waiting(1, tokens=50), waiting(2))
    assert admitted(line, Room(20)) == [2]
    assert admitted(line, Room(50)) == [1]


def test_request_passed_too_often_holds_back_the_ones_behind_it() -> None:
    line = queue(waiting(1, tokens=50), *(waiting(n) for n in range(2, 8)), max_bypasses=2)
    assert admitted(line, Room(20)) == [2, 3]
    assert admitted(line, Room(50)) == [1, 4, 5, 6, 7]


def test_later_requests_with_earlier_deadlines_cannot_starve_one_either() -> None:
    line = queue(waiting(1, start_by=99), max_bypasses=2)
    order = []
    for request_id in range(2, 7):
        line.push(waiting(request_id, start_by=1))
        found = line.next_admissible(Room(20))
        assert found is not None
        order.append(found[0].request_id)
    assert order[:3] == [2, 3, 1]


def test_higher_priority_passes_without_counting() -> None:
    line = queue(waiting(1, tokens=50), max_bypasses=1)
    for request_id in range(2, 6):
        line.push(waiting(request_id, priority=1))
        assert admitted(line, Room(20)) == [request_id]
    line.push(waiting(7))
    line.push(waiting(8))
    assert admitted(line, Room(20)) == [7]


def test_request_that_no_instance_can_hold_holds_nobody_back() -> None:
    line = queue(waiting(1, tokens=500), *(waiting(n) for n in range(2, 6)), max_bypasses=1)
    assert admitted(line, Room(20, total=100)) == [2, 3, 4, 5]


def test_queue_is_bounded() -> None:
    line = queue(*(waiting(n) for n in range(10)))
    with pytest.raises(QueueFull):
        line.push(waiting(11))


def test_expired_requests_are_taken_out() -> None:
    line = queue(waiting(1, start_by=3), waiting(2, start_by=1), waiting(3, start_by=5))
    assert line.next_expiry() == 1
    assert [w.request_id for w in line.take_expired(3)] == [2, 1]
    assert line.next_expiry() == 5
    assert len(line) == 1


def test_of_many_that_are_too_large_only_one_is_tried() -> None:
    line = queue(*(waiting(number, 100 + number) for number in range(8)))
    room = Room(99)
    assert line.next_admissible(room) is None
    assert room.asked == 1
    small = waiting(99, 10)
    line.push(small)
    found = line.next_admissible(room)
    assert found is not None
    assert found[0] is small
    # The small one has gone, and with it the reason to look at all.
    for entry in [*line][:5]:
        line.discard(entry)
    room.asked = 0
    assert line.next_admissible(room) is None
    assert room.asked == 1


def test_what_is_smaller_in_one_way_only_is_still_looked_for() -> None:
    """The least of each amount is of two requests, of which neither has both."""
    line = queue(waiting(1, 200), waiting(2, 90))
    found = line.next_admissible(Room(95))
    assert found is not None
    assert found[0].request_id == 2
