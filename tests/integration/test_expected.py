"""Placement by expected times over real instances, which say how fast they are."""

import random
from pathlib import Path

import grpc
from twinpool.v1 import common_pb2, worker_pb2
from twinpool.v1.worker_pb2_grpc import MembershipStub

from launch.builtin import MODEL_DIR
from tests.integration.cluster import Cluster
from tests.integration.conftest import BLOCK, reference
from tests.integration.test_faults import Attempt


def status(cluster: Cluster) -> worker_pb2.GetStatusResponse:
    with grpc.insecure_channel(cluster.address) as channel:
        found: worker_pb2.GetStatusResponse = MembershipStub(channel).GetStatus(
            worker_pb2.GetStatusRequest(), timeout=5
        )
        return found


def test_instances_tell_their_speed_and_answers_are_right_before_and_after(tmp_path: Path) -> None:
    expected, rng = reference(MODEL_DIR), random.Random(7)
    with Cluster(
        MODEL_DIR,
        tmp_path,
        *("--dtype", "float32", "--block-size", str(BLOCK)),
        router_flags=("--policy", "expected", "--heartbeat-interval-s", "0.2"),
        decodes=("x", "y"),
    ) as cluster:

        def ask_two() -> None:
            # Side by side, so that both decode instances get some.
            prompts = [[rng.randrange(300) for _ in range(rng.randrange(3, 99))] for _ in "xy"]
            attempts = [Attempt(cluster, prompt, 12) for prompt in prompts]
            for attempt in attempts:
                attempt.join()
                assert attempt.error is None
                attempt.check(expected)

        def known() -> bool:
            return all(instance.HasField("speed") for instance in status(cluster).instances)

        assert not known()
        rounds = 0
        while not known():
            assert (rounds := rounds + 1) < 100, "an instance does not tell how fast it is"
            ask_two()
        for _ in range(8):
            ask_two()
        for instance in status(cluster).instances:
            speed = instance.speed
            assert min(speed.base_s, speed.sequence_s, speed.token_s) >= 0
            size = 100 if instance.role == common_pb2.ROLE_PREFILL else 1000
            step_s = speed.base_s + speed.sequence_s + size * speed.token_s
            assert 0 < step_s < 10
        cluster.wait_idle()
