"""A prefill instance that hangs: another answers in its stead, and no token is wrong."""

import random
import re
import signal
import urllib.request
from pathlib import Path

from launch.builtin import MODEL_DIR
from tests.integration.cluster import Cluster, free_port
from tests.integration.conftest import BLOCK, reference
from tests.integration.test_faults import Attempt

METRICS = free_port()


def hedges(outcome: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{METRICS}/metrics", timeout=5) as page:
        text = page.read().decode()
    pattern = rf'^twinpool_router_hedges_total{{.*outcome="{outcome}".*}} (\S+)$'
    found = re.search(pattern, text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_prompt_at_an_instance_that_hangs_is_answered_by_another(tmp_path: Path) -> None:
    expected, rng = reference(MODEL_DIR), random.Random(5)
    with Cluster(
        MODEL_DIR,
        tmp_path,
        *("--dtype", "float32", "--block-size", str(BLOCK)),
        # Hung instances are not to be lost before the hedge has won.
        router_flags=(
            *("--hedge-prefill", "3", "--heartbeats-missed", "30"),
            *("--metrics-port", str(METRICS)),
        ),
        prefills=("a", "b"),
    ) as cluster:

        def prompt() -> list[int]:
            return [rng.randrange(300) for _ in range(600)]

        with cluster.client() as client:
            for _ in range(10):
                known = client.complete(prompt(), max_new_tokens=2, ignore_eos=True)
        assert known.stats.prefill_instance == "a"
        cluster.signal("a", signal.SIGSTOP)
        attempt = Attempt(cluster, prompt(), 12)
        attempt.join()
        cluster.signal("a", signal.SIGCONT)
        assert attempt.error is None
        attempt.check(expected)
        assert attempt.stats is not None
        assert (attempt.stats.prefill_instance, attempt.stats.retries) == ("b", 0)
        assert hedges("won") == 1
        cluster.wait_idle()
