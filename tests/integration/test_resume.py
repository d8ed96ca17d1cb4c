"""One of two prefill instances goes away in the middle: no client sees it, no token is wrong."""

import random
import re
import signal
import time
import urllib.request
from collections.abc import Iterator

import pytest

from launch.builtin import MODEL_DIR
from tests.integration.cluster import Cluster, free_port, wait_until
from tests.integration.conftest import BLOCK, Reference, reference
from tests.integration.test_faults import SEED, Attempt

PROMPT = 4096
TOKENS = 24
REQUESTS = 24
METRICS = free_port()


@pytest.fixture(scope="module")
def expected() -> Reference:
    return reference(MODEL_DIR)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two prefill instances that take a long prompt in many steps; the first gets it."""
    with Cluster(
        MODEL_DIR,
        tmp_path_factory.mktemp("twins"),
        *("--dtype", "float32", "--block-size", str(BLOCK)),
        prefills=("a", "b"),
        more_flags={
            "a": ("--max-batched-tokens", "256"),
            "decode": ("--metrics-port", str(METRICS)),
        },
    ) as cluster:
        yield cluster


def metric(name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{METRICS}/metrics", timeout=5) as page:
        text = page.read().decode()
    found = re.search(rf"^twinpool_decode_{name} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def long_prompt(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(300) for _ in range(PROMPT)]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_lost_prefill_is_replaced_in_mid_transfer(
    twins: Cluster, expected: Reference, how: signal.Signals
) -> None:
    with twins.client() as client:
        whole = client.complete(long_prompt(100 + how), max_new_tokens=TOKENS, ignore_eos=True)
    assert whole.stats.prefill_instance == "a"
    arrived = metric("kv_transfer_bytes_total")
    resumed = metric("resumed_transfers_total")
    attempt = Attempt(twins, long_prompt(how), TOKENS)
    wait_until(
        lambda: metric("kv_transfer_bytes_total") > arrived, "the first bytes of the transfer"
    )
    twins.signal("a", how)
    attempt.join()
    if how is signal.SIGKILL:
        twins.kill("a")
        twins.start("a")
    else:
        twins.signal("a", signal.SIGCONT)
    assert attempt.error is None
    attempt.check(expected)
    assert metric("resumed_transfers_total") == resumed + 1
    stats = attempt.stats
    assert stats is not None
    assert (stats.prefill_instance, stats.retries) == ("b", 1)
    assert 0 < stats.kv_bytes < whole.stats.kv_bytes
    twins.wait_ready()
    twins.wait_idle()


def test_what_decode_has_of_a_prompt_stays_kept_when_prefill_is_lost(
    twins: Cluster, expected: Reference
) -> None:
    known = PROMPT // 2
    prompt = long_prompt(3)
    with twins.client() as client:
        first = client.complete(prompt[:known], max_new_tokens=2, ignore_eos=True)
    assert first.stats.prefill_instance == "a"
    arrived = metric("kv_transfer_bytes_total")
    resumed = metric("resumed_transfers_total")
    reused = metric("cached_tokens_total")
    attempt = Attempt(twins, prompt, TOKENS)
    wait_until(
        lambda: metric("kv_transfer_bytes_total") > arrived, "the first bytes of the transfer"
    )
    twins.kill("a")
    twins.start("a")
    attempt.join()
    assert attempt.error is None
    attempt.check(expected)
    assert metric("resumed_transfers_total") == resumed + 1
    assert metric("cached_tokens_total") == reused + known
    stats = attempt.stats
    assert stats is not None
    assert (stats.prefill_instance, stats.decode_cached_tokens) == ("b", known)
    # The rest of the other half.
    assert 0 < stats.kv_bytes < first.stats.kv_bytes
    twins.wait_ready()
    twins.wait_idle()


def test_prefill_killed_at_any_moment_is_not_noticed(twins: Cluster, expected: Reference) -> None:
    rng = random.Random(f"{SEED} resume")
    print(f"TWINPOOL_TEST_SEED={SEED}")
    attempts = []
    kill_after = rng.randrange(REQUESTS)
    for number in range(REQUESTS):
        prompt = [rng.randrange(300) for _ in range(rng.choice([3, 40, 300, 1500]))]
        attempts.append(Attempt(twins, prompt, rng.randint(2, 40)))
        time.sleep(rng.uniform(0, 0.02))
        if number == kill_after:
            twins.kill("a")
            twins.start("a")
    for attempt in attempts:
        attempt.join()
        assert attempt.error is None
        attempt.check(expected)
    twins.wait_ready()
    twins.wait_idle()
