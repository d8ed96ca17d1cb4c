"""Whole systems on this machine, to be asked for their goodput one after another.

Owns how each is started and ended. They have the same cores, and nothing of each other's defaults.
"""

import http.client
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from twinpool import Client
from twinpool.errors import TwinpoolError

from bench.sides import peers, servers
from bench.sides.process import OF_THREADS, environment
from service.threads import default_threads, thread_env

TWINPOOL, VLLM = "twinpool", "vllm"
_MODEL = "served"
_ASK_S = 2.0
_END_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a system gets.

    Attributes:
        model: Folder of the checkpoint, with a tokenizer.
        max_context: Tokens of the longest request, prompt and answer.
        kv_gib: For KV, over all instances of a system.
        vllm_python: Interpreter of an environment with vLLM.
    """

    model: Path
    max_context: int
    kv_gib: int
    cores: tuple[int, ...]
    vllm_python: Path | None = None


@contextmanager
def twinpool(machine: Machine) -> Iterator[Sequence[str]]:
    """Run a router, a prefill and a decode instance; gives the benchmark's options for it."""
    address = f"127.0.0.1:{servers.free_port()}"
    threads = default_threads()
    command = [sys.executable, "-m", "launch", "serve", str(machine.model)]
    command += ["--port", address.rpartition(":")[2], "--threads", str(threads)]
    command += ["--log-level", "warning"]
    kv_mib = str(machine.kv_gib * 1024 // 2)
    kv = {f"TWINPOOL_{role}_KV_MEMORY_MIB": kv_mib for role in ("PREFILL", "DECODE")}

    def is_ready() -> bool:
        try:
            with Client(address) as client:
                return len(client.status(timeout_s=_ASK_S).instances) == 2
        except TwinpoolError:
            return False

    with _running(command, is_ready, thread_env(threads) | kv):
        yield ("--url", address)


@contextmanager
def vllm(machine: Machine) -> Iterator[Sequence[str]]:
    """Run vLLM with prefill and decode in one instance; gives the benchmark's options for it.

    Raises RuntimeError where there is no interpreter for it.
    """
    if machine.vllm_python is None:
        raise RuntimeError("vllm: --vllm-python is required")
    port = servers.free_port()
    command = [str(machine.vllm_python), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(machine.model), "--served-model-name", _MODEL]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
    command += ["--max-model-len", str(machine.max_context)]

    def is_ready() -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ASK_S)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.client.OK
        except OSError:
            return False
        finally:
            connection.close()

    with _running(command, is_ready, peers.vllm_settings(machine.cores, machine.kv_gib)):
        yield ("--backend", "openai", "--url", f"http://127.0.0.1:{port}")


SYSTEMS = {TWINPOOL: twinpool, VLLM: vllm}


@contextmanager
def _running(
    command: Sequence[str], is_ready: Callable[[], bool], settings: Mapping[str, str]
) -> Iterator[None]:
    """Run a server until the block ends; what it says goes to stderr.

    Raises RuntimeError where it does not come up.
    """
    environ = environment(settings, (*OF_THREADS, "TWINPOOL_"))
    server = servers.start(command, is_ready, signal.SIGTERM, environ)
    try:
        yield
    finally:
        # The first of its processes ends the others, in its own order.
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(_END_S)
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
