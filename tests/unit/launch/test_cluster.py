"""`serve` as a real process whose roles are small fakes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from twinpool.v1.common_pb2 import ROLE_DECODE, ROLE_PREFILL
from twinpool.v1.worker_pb2 import Capacity, GetStatusResponse, InstanceStatus

from launch import builtin
from launch.cluster import ClusterConfig, child_specs, free_port, missing_roles
from service.threads import default_threads

ROOT = Path(__file__).parents[3]

# argv: how the prefill role behaves. The fake router has all instances from the start, or none.
DRIVER = '''
import os, sys
from launch import cluster, serve
from launch.supervisor import ChildSpec

ROUTER = """
import asyncio, sys
from service.lifecycle import Server, run
from twinpool.v1 import worker_pb2, worker_pb2_grpc
from twinpool.v1.common_pb2 import ROLE_DECODE, ROLE_PREFILL

class Membership(worker_pb2_grpc.MembershipServicer):
    async def GetStatus(self, request, context):
        status = worker_pb2.GetStatusResponse()
        status.model.name = "fake"
        for role in () if "bad" in sys.argv else (ROLE_PREFILL, ROLE_DECODE):
            status.instances.add(role=role)
        return status
    async def Register(self, requests, context):
        raise NotImplementedError
    async def Drain(self, request, context):
        raise NotImplementedError

async def main():
    server = Server("router", port=int(sys.argv[1]))
    server.add(
        worker_pb2_grpc.add_MembershipServicer_to_server, Membership(), "twinpool.v1.Membership"
    )
    await server.start()
    await server.serve_until_stopped()

run(main, role="router")
"""
WORKER = """
import asyncio, os, sys
from service.errors import StartError
from service.lifecycle import Server, run

async def main():
    if "bad" in sys.argv:
        raise StartError("no config.json in /x")
    server = Server(sys.argv[1])
    await server.start()
    print("pid", os.getpid(), flush=True)
    await server.serve_until_stopped()

run(main, role=sys.argv[1])
"""

def fakes(config, port):
    env = dict(os.environ)
    def spec(name, source, *args, order=1):
        argv = (sys.executable, "-c", source, *args)
        return ChildSpec(name=name, argv=argv, env=env, stop_order=order)
    return [
        spec("router", ROUTER, str(port), *sys.argv[1:], order=0),
        spec("prefill", WORKER, "prefill", *sys.argv[1:]),
        spec("decode", WORKER, "decode"),
    ]

cluster.child_specs = fakes
serve.start(cluster.ClusterConfig(port=0, drain_timeout_s=2))
'''


class Serve:
    """A running `serve` and its output so far."""

    def __init__(self, *args: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, *args],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []

    def until(self, *parts: str) -> None:
        """Reads until each part was in some line."""
        while not all(any(part in line for line in self.lines) for part in parts):
            self.read_line()

    def read_line(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.lines
        self.lines.append(line.rstrip())

    def wait(self) -> int:
        output, _ = self.process.communicate(timeout=30)
        self.lines += output.splitlines()
        return self.process.returncode

    @property
    def pids(self) -> list[int]:
        return [int(line.split()[-1]) for line in self.lines if "| pid" in line]


@pytest.fixture
def started() -> Iterator[list[Serve]]:
    running: list[Serve] = []
    yield running
    for serve in running:
        serve.process.kill()
        serve.process.communicate()


def start(started: list[Serve], *args: str) -> Serve:
    serve = Serve(*args)
    started.append(serve)
    return serve


def gone(pids: list[int]) -> bool:
    for _ in range(1000):
        if not any(Path(f"/proc/{pid}/cmdline").exists() and _running(pid) for pid in pids):
            return True
        time.sleep(0.01)
    return False


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ready_is_said_and_a_signal_ends_everything_in_order(
    started: list[Serve], number: signal.Signals
) -> None:
    serve = start(started)
    serve.until("twinpool ready on 127.0.0.1:", "prefill | pid", "decode  | pid")
    serve.process.send_signal(number)
    assert serve.wait() == 0
    assert len(serve.pids) == 2
    assert gone(serve.pids)


def test_role_that_dies_is_started_again(started: list[Serve]) -> None:
    serve = start(started)
    serve.until("twinpool ready on", "prefill | pid", "decode  | pid")
    os.kill(serve.pids[0], signal.SIGKILL)
    serve.until("was killed by SIGKILL, starting it again in 0.5 s")
    while len(serve.pids) < 3:
        serve.read_line()
    serve.process.terminate()
    assert serve.wait() == 0
    assert gone(serve.pids)


def test_role_that_cannot_start_ends_everything_with_its_message(started: list[Serve]) -> None:
    serve = start(started, "bad")
    assert serve.wait() == 1
    assert serve.lines[-1] == (
        "serve: prefill ended with exit code 1: prefill: no config.json in /x"
    )
    assert gone(serve.pids)


def test_nothing_outlives_a_killed_serve(started: list[Serve]) -> None:
    serve = start(started)
    serve.until("twinpool ready on", "prefill | pid", "decode  | pid")
    serve.process.kill()
    assert gone(serve.pids)


def test_second_signal_ends_everything_at_once(started: list[Serve]) -> None:
    serve = start(started)
    serve.until("twinpool ready on", "prefill | pid", "decode  | pid")
    for pid in serve.pids:
        os.kill(pid, signal.SIGSTOP)
    serve.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    serve.process.send_signal(signal.SIGINT)
    assert serve.wait() in (0, 128 + signal.SIGINT)
    assert gone(serve.pids)


def test_command_lines_share_port_threads_and_model() -> None:
    config = ClusterConfig(model=Path("/m"), threads=3, host="0.0.0.0")
    specs = {spec.name: spec for spec in child_specs(config, 9123)}
    assert list(specs) == ["router", "prefill", "decode"]
    router = " ".join(specs["router"].argv)
    assert "-m router --host 0.0.0.0 --port 9123" in router
    for role in ("prefill", "decode"):
        line = " ".join(specs[role].argv)
        assert f"-m {role} /m --name {role}-0 --router 127.0.0.1:9123 --threads 3" in line
        env = specs[role].env
        assert (env["OMP_NUM_THREADS"], env["MKL_NUM_THREADS"]) == ("3", "3")
        assert (env["OMP_WAIT_POLICY"], env["GOMP_SPINCOUNT"]) == ("PASSIVE", "0")
        assert specs[role].stop_order > specs["router"].stop_order


def test_command_lines_are_what_the_roles_accept() -> None:
    from decode.config import DecodeConfig
    from prefill.config import PrefillConfig
    from router.config import RouterConfig

    models: dict[str, type[BaseModel]] = {
        "router": RouterConfig,
        "prefill": PrefillConfig,
        "decode": DecodeConfig,
    }
    for spec in child_specs(ClusterConfig(), 9123):
        flags = {part for part in spec.argv if part.startswith("--")}
        fields = {f"--{name.replace('_', '-')}" for name in models[spec.name].model_fields}
        assert flags <= fields


def secured(**changes: Any) -> ClusterConfig:
    files = ("tls_cert", "tls_key", "tls_ca", "tokens_file", "worker_token_file", "token_file")
    settings: dict[str, Any] = {name: Path(f"/{name}") for name in files}
    return ClusterConfig(**settings | {"tls_require_client_cert": True} | changes)


def test_roles_are_given_certificates_and_the_workers_token_and_only_the_router_the_file() -> None:
    specs = {spec.name: " ".join(spec.argv) for spec in child_specs(secured(), 9123)}
    for line in specs.values():
        assert "--tls-cert /tls_cert --tls-key /tls_key --tls-ca /tls_ca" in line
        assert "--worker-token-file /worker_token_file --tls-require-client-cert" in line
        assert "/token_file" not in line.split()
    assert [name for name, line in specs.items() if "--tokens-file /tokens_file" in line] == [
        "router"
    ]


@pytest.mark.parametrize("missing", ["token_file", "worker_token_file", "tls_key", "tls_cert"])
def test_half_of_what_a_secured_cluster_needs_is_refused(missing: str) -> None:
    with pytest.raises(ValidationError, match=f"--{missing.replace('_', '-')}: is required"):
        secured(**{missing: None})


def test_model_is_the_built_in_one_unless_given() -> None:
    assert ClusterConfig().model == builtin.MODEL_DIR
    specs = child_specs(ClusterConfig(), 1)
    assert "--served-model-name builtin" in " ".join(specs[1].argv)
    assert "--served-model-name" not in child_specs(ClusterConfig(model=Path("/m")), 1)[1].argv


def test_readiness_needs_both_pools_and_no_drain() -> None:
    prefill = InstanceStatus(role=ROLE_PREFILL)
    decode = InstanceStatus(role=ROLE_DECODE)
    draining = InstanceStatus(role=ROLE_DECODE, draining=True)
    connecting = InstanceStatus(role=ROLE_DECODE, connecting=True)
    assert missing_roles(GetStatusResponse()) == "prefill and decode"
    assert missing_roles(GetStatusResponse(instances=[prefill])) == "decode"
    assert missing_roles(GetStatusResponse(instances=[prefill, draining])) == "decode"
    assert missing_roles(GetStatusResponse(instances=[prefill, connecting])) == "decode"
    assert missing_roles(GetStatusResponse(instances=[prefill, decode])) == ""


def test_readiness_of_colocated_instances_needs_all_of_them() -> None:
    one = InstanceStatus(role=ROLE_DECODE, capacity=Capacity(colocated=True))
    connecting = InstanceStatus(role=ROLE_DECODE, capacity=one.capacity, connecting=True)
    assert missing_roles(GetStatusResponse(), colocated=2) == "2 of 2 colocated"
    some = GetStatusResponse(instances=[one, connecting])
    assert missing_roles(some, colocated=2) == "1 of 2 colocated"
    assert missing_roles(some, colocated=1) == ""


def test_colocated_instances_are_all_that_is_started_beside_the_router() -> None:
    config = ClusterConfig(model=Path("/m"), colocated=True, replicas=2, threads=3)
    router, *instances = child_specs(config, 9123)
    assert router.name == "router"
    assert [spec.name for spec in instances] == ["colocated-0", "colocated-1"]
    for spec in instances:
        line = " ".join(spec.argv)
        assert f"-m decode /m --name {spec.name} --colocated --router 127.0.0.1:9123" in line
        assert spec.env["OMP_NUM_THREADS"] == "3"


def test_cores_are_divided_among_replicas_unless_threads_are_given() -> None:
    for replicas in (1, 2):
        config = ClusterConfig(colocated=True, replicas=replicas)
        assert config.instance_threads == default_threads(replicas)
    assert ClusterConfig().instance_threads == default_threads()
    assert ClusterConfig(colocated=True, threads=5).instance_threads == 5


def test_replicas_of_split_roles_are_refused() -> None:
    with pytest.raises(ValidationError, match="--replicas: found 2 without --colocated"):
        ClusterConfig(replicas=2)


def test_free_ports_can_be_bound() -> None:
    assert 0 < free_port("127.0.0.1") < 65536


def test_prefill_gives_way_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TWINPOOL_PREFILL_NICE", raising=False)
    assert {spec.env["TWINPOOL_PREFILL_NICE"] for spec in child_specs(ClusterConfig(), 1)} == {"10"}
    monkeypatch.setenv("TWINPOOL_PREFILL_NICE", "0")
    assert {spec.env["TWINPOOL_PREFILL_NICE"] for spec in child_specs(ClusterConfig(), 1)} == {"0"}
