"""What operators use: health, reflection, metrics, status, the effective configuration."""

import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from launch.builtin import MODEL_DIR
from tests.integration.cluster import ROOT, Cluster, free_port

METRICS_PORTS = {role: free_port() for role in ("prefill", "decode", "router")}


@pytest.fixture(scope="module")
def operated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        for role, port in METRICS_PORTS.items():
            patch.setenv(f"TWINPOOL_{role.upper()}_METRICS_PORT", str(port))
        patch.setenv("TWINPOOL_ROUTER_REFLECTION", "true")
        with Cluster(MODEL_DIR, tmp_path_factory.mktemp("operated")) as cluster:
            with cluster.client() as client:
                client.complete([1] * 40, max_new_tokens=5, ignore_eos=True)
            cluster.wait_idle()
            yield cluster


@pytest.mark.parametrize(
    ("role", "line"),
    [
        ("router", 'twinpool_router_requests_total{model_name="model",outcome="finished"} 1.0'),
        ("prefill", "twinpool_prefill_prompt_tokens_total 40.0"),
        ("prefill", "twinpool_prefill_kv_transfer_completed_total 1.0"),
        ("decode", "twinpool_decode_generated_tokens_total 4.0"),
        ("decode", 'twinpool_decode_kv_blocks{state="used"} 0.0'),
    ],
)
def test_metrics_tell_what_was_done(operated: Cluster, role: str, line: str) -> None:
    url = f"http://127.0.0.1:{METRICS_PORTS[role]}/metrics"
    with urllib.request.urlopen(url, timeout=10) as response:
        assert line in response.read().decode().splitlines()


def test_health_says_serving(operated: Cluster) -> None:
    with grpc.insecure_channel(operated.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="twinpool.v1.Inference")
        response = stub.Check(request, timeout=10)
    assert response.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_lists_the_services_where_it_is_on(operated: Cluster) -> None:
    with grpc.insecure_channel(operated.address) as channel:
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert {"twinpool.v1.Inference", "twinpool.v1.Membership"} <= set(services)


def test_status_command_shows_pools_and_blocks(operated: Cluster) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch", "status", "--router", operated.address],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    for word in ("prefill", "decode", "tp1", "free"):
        assert word in done.stdout
