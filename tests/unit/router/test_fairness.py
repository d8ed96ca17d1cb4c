"""What tenants get of the room, on a virtual clock, and what their caps refuse them."""

import random
from collections.abc import Callable

import pytest

from router.config import RouterConfig
from router.fairness import ANYONE, FairShares, Tenants
from router.ledger import Need
from router.queue import AdmissionQueue, QueueFull
from service.config import ConfigError, load
from service.errors import Refused
from tests.unit.router.pools import Call, Pools, arrivals
from tests.unit.router.test_queue import Room, admitted, waiting

Sizes = Callable[[random.Random], tuple[int, int]]


def short(rng: random.Random) -> tuple[int, int]:
    return rng.randrange(20, 200), rng.randrange(16, 128)


def long(rng: random.Random) -> tuple[int, int]:
    return rng.randrange(500, 2000), rng.randrange(100, 400)


def flood(
    pools: Pools,
    tenant: str,
    *,
    per_s: float,
    sizes: Sizes = short,
    since: float = 0.0,
    until: float = 400.0,
    part: float = 0.5,
    patience_s: float = 60.0,
) -> None:
    """Has requests of a tenant come at random, whose answers are `part` of what they may be."""
    rng = random.Random(hash((len(tenant), per_s, since)))

    def come() -> None:
        prompt, most = sizes(rng)
        pools.come(
            Call(
                tenant=tenant,
                came_at=pools.now,
                start_by=pools.now + patience_s,
                need=Need(prompt_tokens=prompt, max_new_tokens=most),
                output_tokens=max(1, int(most * part * rng.uniform(0.5, 1.0))),
            )
        )

    for moment in arrivals(rng, per_s, until - since):
        pools.at(since + moment, come)


def kv_seconds(pools: Pools, tenant: str, since: float, until: float) -> float:
    """Room that a tenant held in a span of time."""
    total = 0.0
    for call in pools.calls:
        if call.tenant == tenant and call.placed_at is not None:
            end = min(call.ended_at if call.ended_at is not None else until, until)
            blocks = -(-call.need.total_tokens // 16)
            total += max(0.0, end - max(call.placed_at, since)) * blocks * 16
    return total


def shared(weights: dict[str, float], *, max_queue: int = 256) -> Pools:
    """Pools that give back about ten short requests' room a second."""
    tenants = Tenants(weights=weights)
    return Pools(tenants=tenants, max_queue=max_queue, blocks=512, sequences=512, token_s=0.15)


def test_two_busy_tenants_get_room_by_their_weights() -> None:
    pools = shared({"b": 3.0})
    flood(pools, "a", per_s=15)
    flood(pools, "b", per_s=15)
    pools.run(400)
    ratio = kv_seconds(pools, "b", 50, 400) / kv_seconds(pools, "a", 50, 400)
    assert ratio == pytest.approx(3.0, rel=0.1)


def test_room_counts_and_not_requests_nor_what_was_guessed() -> None:
    pools = shared({"b": 3.0})
    flood(pools, "a", per_s=25, part=0.1, until=900)
    flood(pools, "b", per_s=1, sizes=long, part=1.0, until=900)
    pools.run(900)
    ratio = kv_seconds(pools, "b", 300, 900) / kv_seconds(pools, "a", 300, 900)
    assert ratio == pytest.approx(3.0, rel=0.1)


def test_tenant_alone_gets_all_of_the_room() -> None:
    pools = shared({"b": 9.0})
    flood(pools, "a", per_s=15)
    pools.run(200)
    assert kv_seconds(pools, "a", 50, 200) > 0.9 * 150 * 512 * 16


def test_idle_tenant_saves_nothing_up() -> None:
    pools = shared({})
    flood(pools, "a", per_s=15)
    flood(pools, "b", per_s=2, until=1)
    flood(pools, "b", per_s=15, since=200)
    pools.run(400)
    ratio = kv_seconds(pools, "b", 220, 400) / kv_seconds(pools, "a", 220, 400)
    assert ratio == pytest.approx(1.0, rel=0.1)


def test_flood_of_one_tenant_does_not_make_another_wait() -> None:
    pools = shared({})
    flood(pools, "flood", per_s=30)
    flood(pools, "b", per_s=0.5)
    pools.run(400)
    calls = [c for c in pools.calls if c.tenant == "b" and c.came_at < 390]
    assert all(not c.reason for c in calls)
    waits = sorted(c.wait_s for c in calls)
    # Until a few of the flood's requests have ended, of which each takes up to nineteen seconds.
    assert waits[-1] < 3.0
    flooded = [c.wait_s for c in pools.calls if c.tenant == "flood" and c.placed_at is not None]
    assert max(flooded) > 5 * waits[-1]


# ---- the order


def test_least_served_tenant_goes_first_and_its_requests_in_order() -> None:
    shares = FairShares()
    line = AdmissionQueue(max_requests=10, max_bypasses=2, shares=shares)
    for number, tenant in enumerate("aabb"):
        line.push(waiting(number, tenant=tenant))
    shares.serve(0, "a", 10.0)
    assert admitted(line, Room(100)) == [2, 3, 0, 1]


def test_tenant_that_was_overtaken_for_fairness_alone_gains_nothing() -> None:
    shares = FairShares()
    line = AdmissionQueue(max_requests=100, max_bypasses=2, shares=shares)
    line.push(waiting(1, tenant="a"))
    shares.serve(0, "a", 1000.0)
    for number in range(2, 20):
        line.push(waiting(number, tenant="b"))
        found = line.next_admissible(Room(100))
        assert found is not None
        assert found[0].request_id == number
    assert not next(iter(line)).overdue


def test_large_request_holds_other_tenants_back_once_passed_too_often() -> None:
    line = AdmissionQueue(max_requests=100, max_bypasses=3)
    line.push(waiting(1, tokens=50, tenant="a"))
    passed = 0
    for number in range(2, 9):
        line.push(waiting(number, tenant=f"t{number}"))
        passed += line.next_admissible(Room(20)) is not None
    assert passed == 3
    assert admitted(line, Room(50))[0] == 1


def test_full_queue_lets_the_tenant_with_most_in_it_give_way() -> None:
    line = AdmissionQueue(max_requests=4, max_bypasses=2)
    flooding = [waiting(number, tenant="flood") for number in range(4)]
    for entry in flooding:
        line.push(entry)
    assert line.push(waiting(10, tenant="b")) is flooding[-1]
    assert line.push(waiting(11, tenant="b")) is flooding[-2]
    with pytest.raises(QueueFull):
        line.push(waiting(12, tenant="b"))
    line.check_integrity()


def test_full_queue_takes_no_place_from_a_higher_priority() -> None:
    line = AdmissionQueue(max_requests=2, max_bypasses=2)
    for number in range(2):
        line.push(waiting(number, tenant="flood", priority=1))
    with pytest.raises(QueueFull):
        line.push(waiting(10, tenant="b"))


# ---- settings


def test_settings_by_tenant_come_from_the_command_line() -> None:
    flags = {"tenant_weight": ["a=3", "*=0.5"], "max_tenant_tokens": ["a=4096"]}
    tenants = load("router", RouterConfig, flags=flags, environ={}).config.tenants
    assert [tenants.weight(name) for name in ("a", "b")] == [3.0, 0.5]
    assert tenants.max_tokens == {"a": 4096}


@pytest.mark.parametrize(
    "flags",
    [{"tenant_weight": ["a=0"]}, {"tenant_weight": ["a=inf"]}, {"max_tenant_queued": ["a=0"]}],
)
def test_weight_or_cap_of_nothing_is_refused(flags: dict[str, list[str]]) -> None:
    with pytest.raises(ConfigError):
        load("router", RouterConfig, flags=flags, environ={})


# ---- caps


def offered(pools: Pools, tenant: str, tokens: int = 160) -> Call:
    call = Call(
        tenant=tenant,
        came_at=pools.now,
        start_by=pools.now + 50,
        need=Need(prompt_tokens=tokens - 10, max_new_tokens=10),
        output_tokens=10,
    )
    pools.come(call)
    pools.run(pools.now)
    return call


@pytest.mark.parametrize(
    "caps",
    [
        Tenants(max_requests={ANYONE: 2, "vip": 9}),
        Tenants(max_tokens={ANYONE: 320, "vip": 9000}),
        Tenants(max_requests={"a": 2}),
    ],
)
def test_cap_refuses_one_more_until_another_has_ended(caps: Tenants) -> None:
    pools = Pools(tenants=caps)
    assert [offered(pools, "a").reason for _ in range(3)] == ["", "", "TENANT_CAP"]
    assert not offered(pools, "vip").reason
    assert not offered(pools, "vip").reason
    assert not offered(pools, "vip").reason
    pools.run(10.0)
    assert not offered(pools, "a").reason


def test_cap_on_those_that_wait_counts_no_others() -> None:
    pools = Pools(sequences=1, tenants=Tenants(max_queued={ANYONE: 1}))
    assert [offered(pools, "a").reason for _ in range(3)] == ["", "", "TENANT_CAP"]


def test_request_above_a_cap_on_tokens_is_refused_for_ever() -> None:
    pools = Pools(tenants=Tenants(max_tokens={"a": 100}))
    with pytest.raises(Refused, match=r"may have 100 tokens of room.*never") as caught:
        pools.gate.offer(waiting(1, tokens=160, tenant="a"), 0.0)
    assert not caught.value.retryable
    assert (caught.value.needed, caught.value.free) == (160, 100)
