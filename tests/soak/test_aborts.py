"""Requests aborted at every phase of their lives: what they held is nobody's within moments.

TWINPOOL_SOAK_ABORTS sets how many (5,000); TWINPOOL_TEST_SEED repeats a run. Prints how long blocks
stayed reserved or in use after an abort, and how long until all were free.
"""

import asyncio
import os
import random
import time
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from twinpool.aio import AsyncClient
from twinpool.errors import TwinpoolError

from launch.builtin import MODEL_DIR
from tests.integration.cluster import Cluster, free_port
from tests.integration.conftest import BLOCK
from tests.integration.test_faults import SEED

ABORTS = int(os.environ.get("TWINPOOL_SOAK_ABORTS", "5000"))
FLAGS = ("--dtype", "float32", "--block-size", str(BLOCK))
PROMPTS = (3, 40, 300, 1500)
NEW_TOKENS = 48
# Far beyond what is wanted: what is not free by then has leaked.
_LEAKED_S = 20.0


def blocks(ports: dict[str, int]) -> dict[str, float]:
    """Blocks of both instances together, by state."""
    found: dict[str, float] = {}
    for role, port in ports.items():
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            content = answer.read().decode()
        for family in text_string_to_metric_families(content):
            if family.name == f"twinpool_{role}_kv_blocks":
                for sample in family.samples:
                    state = sample.labels["state"]
                    found[state] = found.get(state, 0) + sample.value
    return found


async def left_after_abort(ports: dict[str, int]) -> tuple[float, float]:
    """Seconds until no block is reserved or in use, and until none is quarantined either."""
    began = time.perf_counter()
    let_go_s = None
    while True:
        now = await asyncio.to_thread(blocks, ports)
        passed_s = time.perf_counter() - began
        assert passed_s < _LEAKED_S, now
        if let_go_s is None and not now["reserved"] + now["used"]:
            let_go_s = passed_s
        if let_go_s is not None and not now["quarantined"]:
            return let_go_s, passed_s


async def aborted(client: AsyncClient, rng: random.Random, longest_s: float) -> bool:
    """Ask, and leave at a random moment; whether the answer had not ended before."""

    async def ask() -> None:
        prompt = [rng.randrange(300) for _ in range(rng.choice(PROMPTS))]
        with suppress(TwinpoolError):
            await client.complete(prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True)

    asked = asyncio.create_task(ask())
    # Early phases are short: half of the moments are before the first few tokens.
    await asyncio.sleep(rng.uniform(0, longest_s if rng.random() < 0.5 else longest_s / 8))
    has_left = asked.cancel()
    with suppress(asyncio.CancelledError):
        await asked
    return has_left


async def test_what_an_abort_leaves_is_free_within_moments(tmp_path: Path) -> None:
    print(f"TWINPOOL_TEST_SEED={SEED}")
    rng = random.Random(SEED)
    ports = {"prefill": free_port(), "decode": free_port()}
    more = {role: ("--metrics-port", str(port)) for role, port in ports.items()}
    with Cluster(MODEL_DIR, tmp_path, *FLAGS, more_flags=more) as cluster:
        async with AsyncClient(cluster.address) as client:
            began = time.perf_counter()
            await client.complete([1] * PROMPTS[-1], max_new_tokens=NEW_TOKENS, ignore_eos=True)
            longest_s = time.perf_counter() - began
            times, left = [], 0
            while left < ABORTS:
                left += await aborted(client, rng, longest_s)
                times.append(await left_after_abort(ports))
        await asyncio.to_thread(cluster.wait_idle)
    for what, seconds in zip(("let go", "free"), np.array(times).T, strict=True):
        at = np.percentile(seconds, [50, 99, 100]) * 1e3
        print(f"{left} aborts, {what}: median {at[0]:.1f}, p99 {at[1]:.1f}, most {at[2]:.1f} ms")
