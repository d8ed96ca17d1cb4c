"""Whatever a router is sent, it says what is wrong with it, and answers the next good request.

TWINPOOL_FUZZ_REQUESTS sets how many (1,500), TWINPOOL_TEST_SEED repeats a run.
"""

import asyncio
import os
import random
from collections.abc import Iterator

from twinpool.v1 import common_pb2, inference_pb2, worker_pb2

from tests.fuzz import Fuzzer
from tests.unit.router.system import collect, pair, text_of

REQUESTS = int(os.environ.get("TWINPOOL_FUZZ_REQUESTS", "1500"))
SEED = int(os.environ.get("TWINPOOL_TEST_SEED", random.SystemRandom().randrange(1 << 32)))
AT_ONCE = 32
# Between two good ones.
ROUND = 500


def good() -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        prompt=inference_pb2.Prompt(text="say hello"),
        stop=common_pb2.StopParams(max_new_tokens=4, stop=["never"]),
        sampling=common_pb2.SamplingParams(temperature=0.5, seed=7, logprobs=2),
    )


async def test_nonsense_is_refused_and_the_next_good_request_served() -> None:
    print(f"TWINPOOL_TEST_SEED={SEED}")
    async with pair() as (system, _, _):
        services = [
            *inference_pb2.DESCRIPTOR.services_by_name.values(),
            worker_pb2.DESCRIPTOR.services_by_name["Membership"],
        ]
        seeds = {
            "GenerateRequest": good,
            "CountTokensRequest": lambda: inference_pb2.CountTokensRequest(prompt=good().prompt),
        }
        fuzzer = Fuzzer(system.channel, services, random.Random(SEED), seeds)
        expected = text_of(await collect(system.generate(max_new_tokens=4)))
        for done in range(0, REQUESTS, ROUND):
            left = iter(range(min(ROUND, REQUESTS - done)))

            async def call_all(left: Iterator[int] = left) -> None:
                for _ in left:
                    await fuzzer.call()

            await asyncio.gather(*(call_all() for _ in range(AT_ONCE)))
            assert not fuzzer.tally.faults, "\n".join(fuzzer.tally.faults[:5])
            assert text_of(await collect(system.generate(max_new_tokens=4))) == expected
        print(dict(fuzzer.tally.outcomes))
        assert fuzzer.tally.outcomes["INVALID_ARGUMENT"] > REQUESTS / 10
        await system.settled()
