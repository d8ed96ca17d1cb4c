"""Real processes: what signals, bind errors and a parent's death do to a server."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.channels import dial
from service.errors import StartError
from service.lifecycle import Server, join_address

REPOSITORY = Path(__file__).parents[3]

# A process whose life is told on stdout; argv: port, seconds that its drain takes.
CHILD = """
import asyncio, sys
from service.errors import StartError
from service.lifecycle import Server, run

async def main():
    server = Server("child", port=int(sys.argv[1]))
    await server.start()

    async def drain():
        print("draining", flush=True)
        await asyncio.sleep(float(sys.argv[2]))
        print("drained", flush=True)

    async def background():
        if "fail" in sys.argv:
            raise StartError("the router refused this instance")
        if "defect" in sys.argv:
            raise ValueError("a defect")

    await server.serve_until_stopped(drain=drain, drain_timeout_s=1.0, background=[background()])
    print("stopped", flush=True)

run(main, role="child")
"""


class Child:
    """A child process with its output at hand."""

    def __init__(self, *args: str, environ: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *args],
            cwd=REPOSITORY,
            env={**os.environ, **(environ or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def wait(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=20)
        return self.process.returncode, output

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def children() -> Iterator[list[Child]]:
    started: list[Child] = []
    yield started
    for child in started:
        child.close()


def start(children: list[Child], *args: str) -> Child:
    child = Child("-c", CHILD, *args)
    children.append(child)
    return child


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_drains_then_stops(children: list[Child], number: signal.Signals) -> None:
    child = start(children, "0", "0.1")
    assert child.line().startswith("child ready on 127.0.0.1:")
    child.process.send_signal(number)
    code, output = child.wait()
    assert code == 0
    assert output.splitlines() == ["draining", "drained", "stopped"]


def test_drain_is_cut_at_its_time_limit(children: list[Child]) -> None:
    child = start(children, "0", "60")
    child.line()
    child.process.terminate()
    code, output = child.wait()
    assert code == 0
    assert "stopped" in output
    assert "drained" not in output


def test_second_signal_stops_at_once(children: list[Child]) -> None:
    child = start(children, "0", "60")
    child.line()
    child.process.terminate()
    assert child.line() == "draining"
    child.process.send_signal(signal.SIGINT)
    code, output = child.wait()
    assert code == 128 + signal.SIGINT
    assert "stopped" not in output


def test_port_in_use_is_one_line_and_exit_code_1(children: list[Child]) -> None:
    first = start(children, "0", "0")
    port = first.line().rpartition(":")[2]
    code, output = start(children, port, "0").wait()
    assert code == 1
    assert output == (
        f"child: port {port} on 127.0.0.1 is in use: choose another with --port or stop the other"
        " process\n"
    )


def test_background_that_fails_ends_the_process_with_its_message(children: list[Child]) -> None:
    code, output = start(children, "0", "0", "fail").wait()
    assert code == 1
    assert output.splitlines()[1:] == ["child: the router refused this instance"]


def test_background_defect_ends_the_process_with_a_trace(children: list[Child]) -> None:
    code, output = start(children, "0", "0", "defect").wait()
    assert code == 1
    assert "ValueError: a defect" in output


def test_signal_while_starting_ends_the_process_at_once(children: list[Child]) -> None:
    source = """
import time
from service.lifecycle import run
async def main():
    print("loading", flush=True)
    time.sleep(60)
run(main, role="child")
"""
    child = Child("-c", source)
    children.append(child)
    assert child.line() == "loading"
    child.process.terminate()
    assert child.wait()[0] == 128 + signal.SIGTERM


def test_thread_that_never_ends_does_not_keep_the_process(children: list[Child]) -> None:
    source = """
import threading, service.lifecycle as lifecycle
lifecycle._EXIT_GRACE_S = 0.2
async def main():
    threading.Event().wait(0)
    threading.Thread(target=threading.Event().wait).start()
lifecycle.run(main, role="child")
"""
    child = Child("-c", source)
    children.append(child)
    assert child.wait() == (0, "")


PARENT = """
import os, subprocess, sys
child = subprocess.Popen(
    [sys.executable, "-c", sys.argv[1], "0", "60"],
    env={**os.environ, "TWINPOOL_PARENT_PID": str(os.getpid())},
)
print(child.pid, flush=True)
child.wait()
"""


def test_child_does_not_outlive_a_killed_parent(children: list[Child]) -> None:
    parent = Child("-c", PARENT, CHILD)
    children.append(parent)
    pid = int(parent.line())
    assert parent.line().startswith("child ready")
    parent.process.kill()
    parent.process.wait()
    assert gone(pid)


def test_child_exits_when_its_parent_is_gone_before_it_looks(children: list[Child]) -> None:
    child = Child("-c", CHILD, "0", "60", environ={"TWINPOOL_PARENT_PID": "1"})
    children.append(child)
    assert child.wait() == (1, "")


def gone(pid: int) -> bool:
    for _ in range(500):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


async def test_health_follows_what_the_server_says() -> None:
    server = Server("test")
    server.add(lambda servicer, grpc_server: None, object(), "twinpool.v1.Inference")
    await server.start()
    async with dial(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def serving(service: str) -> bool:
            response = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

        assert await serving("")
        assert await serving("twinpool.v1.Inference")
        await server.set_serving("twinpool.v1.Inference", False)
        assert not await serving("twinpool.v1.Inference")
        with pytest.raises(grpc.aio.AioRpcError):
            await serving("unknown")
    await server.stop()


async def test_drain_command_stops_as_a_signal_does() -> None:
    server = Server("test")
    await server.start()
    drained = asyncio.Event()

    async def drain() -> None:
        drained.set()

    async def command() -> None:
        server.request_stop()

    await server.serve_until_stopped(drain=drain, background=[command()])
    assert drained.is_set()


@pytest.mark.parametrize(
    ("host", "says"),
    [("192.0.2.1", "is not an address of this machine"), ("no.such.invalid", "is not an address")],
)
async def test_bad_host_is_a_start_error(host: str, says: str) -> None:
    server = Server("test", host=host, port=9)
    with pytest.raises(StartError, match=says):
        await server.start()
    await server.stop()


async def test_reflection_lists_the_services_when_wanted() -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    server = Server("test", reflection=True)
    server.add(lambda servicer, grpc_server: None, object(), "twinpool.v1.Inference")
    await server.start()
    async with dial(server.address) as channel:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([request])
        )
        response = await anext(aiter(call))
    await server.stop()
    names = {service.name for service in response.list_services_response.service}
    assert {"twinpool.v1.Inference", "grpc.health.v1.Health"} <= names


def test_addresses_of_both_families_are_written_as_grpc_reads_them() -> None:
    assert join_address("127.0.0.1", 1) == "127.0.0.1:1"
    assert join_address("::1", 1) == "[::1]:1"
