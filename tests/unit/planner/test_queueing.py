import numpy as np
import pytest

from planner.queueing import Array, Wait, poisson_mean, poisson_within, prefill_wait


def waits(rate_per_s: float, busy_s: Array, servers: int) -> Array:
    """Simulate random arrivals at servers that take the first in line."""
    rng = np.random.default_rng(7)
    arrivals = np.cumsum(rng.exponential(1 / rate_per_s, 60_000))
    free = [0.0] * servers
    found = []
    for at, busy in zip(arrivals, rng.choice(busy_s, len(arrivals)), strict=True):
        first = min(range(servers), key=free.__getitem__)
        start = max(float(at), free[first])
        found.append(start - at)
        free[first] = start + busy
    return np.array(found)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.9])
def test_one_server_with_random_arrivals_is_pollaczek_and_khinchines(load: float) -> None:
    busy_s = np.array([0.1, 0.2, 0.6])
    rate = load / busy_s.mean()
    wait = prefill_wait(rate, busy_s, 1, 1.0)
    assert wait is not None
    expected = rate * (busy_s**2).mean() / (2 * (1 - load))
    assert wait.chance == pytest.approx(load)
    assert wait.chance * wait.mean_s == pytest.approx(expected)


@pytest.mark.parametrize(("servers", "load"), [(1, 0.5), (1, 0.8), (4, 0.7), (8, 0.85)])
def test_waits_are_near_those_of_a_simulated_queue(servers: int, load: float) -> None:
    busy_s = np.array([0.05, 0.1, 0.1, 0.3])
    rate = servers * load / busy_s.mean()
    wait = prefill_wait(rate, busy_s, servers, 1.0)
    assert wait is not None
    simulated = waits(rate, busy_s, servers)
    assert wait.chance * wait.mean_s == pytest.approx(simulated.mean(), rel=0.15)
    limits = np.array([0.1, 0.3, 1.0])
    shares = (simulated[:, None] <= limits).mean(axis=0)
    assert wait.within(limits) == pytest.approx(shares, abs=0.06)


def test_bursts_make_requests_wait_longer_and_overload_has_no_wait() -> None:
    busy_s = np.array([0.1])
    even, bursty = prefill_wait(5.0, busy_s, 1, 1.0), prefill_wait(5.0, busy_s, 1, 9.0)
    assert even is not None
    assert bursty is not None
    assert bursty.mean_s > 5 * even.mean_s
    assert prefill_wait(10.0, busy_s, 1, 1.0) is None


def test_nothing_waits_when_nothing_comes() -> None:
    wait = prefill_wait(0.0, np.array([0.1]), 1, 1.0)
    assert wait == Wait(chance=0.0, mean_s=0.0)
    assert list(wait.within(np.array([-0.1, 0.0, 1.0]))) == [0, 1, 1]


def test_no_wait_is_within_a_limit_that_is_already_over() -> None:
    assert Wait(chance=0.5, mean_s=1.0).within(np.array([-1.0])) == [0]


def test_poisson_numbers_are_counted_as_they_are_distributed() -> None:
    drawn = np.random.default_rng(3).poisson(20.0, 200_000)
    for most in (10, 20, 30):
        assert poisson_within(20.0, most) == pytest.approx((drawn <= most).mean(), abs=0.005)
    assert poisson_within(0.0, 0) == 1
    assert poisson_within(5.0, -1) == 0
    assert poisson_within(1000.0, 4000) == pytest.approx(1)


def test_the_largest_mean_that_keeps_a_share_keeps_just_that() -> None:
    for most in (1, 8, 300):
        assert poisson_within(poisson_mean(most, 0.95), most) == pytest.approx(0.95, abs=1e-6)
    assert poisson_mean(0, 0.95) == pytest.approx(0.0513, abs=1e-3)
