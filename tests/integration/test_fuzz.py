"""Whatever the three roles' processes are sent, they go on, and answer the next good request.

TWINPOOL_FUZZ_REQUESTS sets how many (900), TWINPOOL_TEST_SEED repeats a run.
"""

import asyncio
import os
import random
from collections.abc import Callable
from pathlib import Path

import grpc
from google.protobuf.message import Message
from twinpool.v1 import common_pb2, inference_pb2, worker_pb2

from launch.builtin import MODEL_DIR
from tests.fuzz import Fuzzer
from tests.integration.cluster import Cluster

REQUESTS = int(os.environ.get("TWINPOOL_FUZZ_REQUESTS", "900"))
SEED = int(os.environ.get("TWINPOOL_TEST_SEED", random.SystemRandom().randrange(1 << 32)))
AT_ONCE = 8
# Between two good ones.
ROUND = 300
SERVICES = {
    "router": [
        *inference_pb2.DESCRIPTOR.services_by_name.values(),
        worker_pb2.DESCRIPTOR.services_by_name["Membership"],
    ],
    "prefill": [worker_pb2.DESCRIPTOR.services_by_name["Prefill"]],
    "decode": [worker_pb2.DESCRIPTOR.services_by_name["Decode"]],
}
SAMPLING = common_pb2.SamplingParams(temperature=0.5, seed=7)
STOP = common_pb2.StopParams(max_new_tokens=4)


def seeds(rng: random.Random) -> dict[str, Callable[[], Message]]:
    """What an instance or a router would be sent."""

    def prefill() -> worker_pb2.PrefillRunRequest:
        start = worker_pb2.PrefillStart(
            request_id=rng.getrandbits(63),
            prompt_token_ids=[1, 2, 3],
            sampling=SAMPLING,
            stop=STOP,
            ttl_ms=500,
        )
        return worker_pb2.PrefillRunRequest(start=start)

    def reserve() -> worker_pb2.ReserveRequest:
        return worker_pb2.ReserveRequest(
            request_id=rng.getrandbits(63),
            router_id="fuzz",
            prompt_tokens=3,
            prompt_token_ids=[1, 2, 3],
            sampling=SAMPLING,
            stop=STOP,
            ttl_ms=500,
        )

    def run() -> worker_pb2.DecodeRunRequest:
        return worker_pb2.DecodeRunRequest(
            activate=worker_pb2.Activate(request_id=rng.getrandbits(63), first_token_id=1)
        )

    def ask() -> inference_pb2.GenerateRequest:
        prompt = inference_pb2.Prompt(text="say hello")
        return inference_pb2.GenerateRequest(prompt=prompt, sampling=SAMPLING, stop=STOP)

    return {
        "PrefillRunRequest": prefill,
        "ReserveRequest": reserve,
        "DecodeRunRequest": run,
        "GenerateRequest": ask,
        "RegrantRequest": lambda: worker_pb2.RegrantRequest(request_id=rng.getrandbits(63)),
        "PrefillAbortRequest": lambda: worker_pb2.PrefillAbortRequest(request_id=1),
    }


async def test_all_roles_go_on_whatever_they_are_sent(tmp_path: Path) -> None:
    print(f"TWINPOOL_TEST_SEED={SEED}")
    rng = random.Random(SEED)
    with Cluster(MODEL_DIR, tmp_path, "--dtype", "float32") as cluster:
        with cluster.client() as client:
            instances = {found.name: found.address for found in client.status().instances}
        addresses = {"router": cluster.address, **instances}
        channels = {role: grpc.aio.insecure_channel(addresses[role]) for role in SERVICES}
        fuzzers = [Fuzzer(channels[role], SERVICES[role], rng, seeds(rng)) for role in SERVICES]
        expected = await answer(cluster)
        for done in range(0, REQUESTS, ROUND):
            for _ in range(0, min(ROUND, REQUESTS - done), AT_ONCE):
                await asyncio.gather(*(rng.choice(fuzzers).call() for _ in range(AT_ONCE)))
            faults = [fault for fuzzer in fuzzers for fault in fuzzer.tally.faults]
            assert not faults, "\n".join(faults[:5])
            assert await answer(cluster) == expected
        for channel in channels.values():
            await channel.close()
        print({role: dict(f.tally.outcomes) for role, f in zip(SERVICES, fuzzers, strict=True)})
        await asyncio.to_thread(cluster.wait_idle)
        logs = {role: cluster.log(role) for role in SERVICES}
    assert not {role for role, log in logs.items() if "Traceback" in log}


async def answer(cluster: Cluster) -> str:
    def ask() -> str:
        with cluster.client() as client:
            return client.complete("say hello", max_new_tokens=8, timeout_s=60).text

    return await asyncio.to_thread(ask)
