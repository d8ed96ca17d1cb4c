"""Small pools with round figures for the tests of the simulator."""

import random
from typing import Any

from planner.simulator.setup import Decodes, Prefills, Setup
from planner.simulator.speeds import SpeedCosts
from planner.traces import Request
from service.step_fit import StepSpeed

# A prompt token takes 0.1 ms, a step 10 ms, and 1 ms more for each sequence.
COSTS = SpeedCosts(
    prefill=StepSpeed(base_s=0.0, sequence_s=0.0, token_s=1e-4),
    decode=StepSpeed(base_s=10e-3, sequence_s=1e-3, token_s=1e-7),
    latency_s=1e-3,
    transfer_token_s=1e-5,
)


def split(prefills: int = 2, decodes: int = 2, **changed: Any) -> Setup:
    """Separate pools."""
    return Setup(
        prefills=Prefills(costs=COSTS, instances=prefills, kv_tokens=100_000),
        decodes=Decodes(costs=COSTS, instances=decodes, kv_tokens=100_000),
        **changed,
    )


def colocated(instances: int = 4, chunk_tokens: int = 512, **changed: Any) -> Setup:
    """Instances that do both."""
    decodes = Decodes(
        costs=COSTS, instances=instances, kv_tokens=100_000, chunk_tokens=chunk_tokens
    )
    return Setup(prefills=None, decodes=decodes, **changed)


def load(count: int, rate: float, seed: int = 0, *, most_tokens: int = 4000) -> list[Request]:
    """Requests at random, of many lengths; some answers have one token."""
    rng = random.Random(seed)
    at_s, found = 0.0, []
    for _ in range(count):
        at_s += rng.expovariate(rate)
        prompt_tokens = min(most_tokens, 1 + int(rng.lognormvariate(6, 1)))
        found.append(
            Request(at_s=at_s, prompt_tokens=prompt_tokens, output_tokens=rng.randint(1, 150))
        )
    return found
