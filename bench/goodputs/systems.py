"""Whole systems on this machine, to be asked for their goodput one after another.

Owns how each is laid out over the cores, started and asked. All have the same cores, as much memory
for KV and no prefix cache; else each has its own defaults.
"""

import http.client
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from twinpool import Client
from twinpool.errors import TwinpoolError

from bench.goodputs.backend import Backend
from bench.goodputs.openai_backend import OpenAIBackend
from bench.goodputs.pair_backend import PairBackend
from bench.goodputs.programs import Program, running
from bench.goodputs.turns_backend import TurnsBackend
from bench.goodputs.twinpool_backend import TwinpoolBackend
from bench.sides import peers, servers
from launch.cluster import import_env
from service.threads import thread_env

_MODEL = "served"
# Of a GPU's memory, what all instances have together; a context of CUDA takes some besides.
_OF_GPU = 0.92
_HOST = "127.0.0.1"
_ASK_S = 2.0
# As `twinpool serve` starts prefill, which here shares its core with router and client.
PREFILL = ("prefill", "--nice", "10")
DECODE = ("decode",)
_NIXL = json.dumps(
    {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
)

OpenBackend: TypeAlias = Callable[[], Backend]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a system gets.

    Attributes:
        model: Folder of the checkpoint, with a tokenizer.
        max_context: Tokens of the longest request, prompt and answer.
        kv_gib: For KV, over all instances of a system.
        logs: Folder for what its programs say.
        vllm_python: Interpreter of an environment with vLLM.
        device: Where Twinpool's models run; with cuda all on one GPU.
        host_copy: Whether a GPU's KV goes by the host's memory, or from cache to cache.
    """

    model: Path
    max_context: int
    kv_gib: int
    cores: tuple[int, ...]
    logs: Path
    vllm_python: Path | None = None
    device: str = "cpu"
    host_copy: bool = True

    def parts(self, count: int) -> list[tuple[int, ...]]:
        """Return the cores of each of so many instances."""
        each = len(self.cores) // count
        return [self.cores[each * n : each * (n + 1)] for n in range(count)]


@dataclass(frozen=True, kw_only=True)
class System:
    """One way to serve.

    Attributes:
        instances: Between how many its cores are split.
        hands_over: Whether a prefill instance hands requests over to a decode instance.
        start: Runs it until the block ends; gives what opens a backend that asks it, in the loop
            that is to use that. Raises RuntimeError where it does not run.
    """

    instances: int
    hands_over: bool = False
    is_vllm: bool = False
    start: Callable[[Machine], AbstractContextManager[OpenBackend]]


@contextmanager
def _twinpool(
    machine: Machine, *roles: Sequence[str], router: Sequence[str] = ()
) -> Iterator[OpenBackend]:
    """Run a router, with options of its own, and instances of these roles."""
    with at_address(machine, *roles, router=router) as address:
        yield lambda: TwinpoolBackend(address, ca=None, token_file=None)


@contextmanager
def at_address(
    machine: Machine, *roles: Sequence[str], router: Sequence[str] = ()
) -> Iterator[str]:
    """Run a router, and instances that each have their part of the cores; gives its address."""
    port = servers.free_port()
    address = f"{_HOST}:{port}"
    quiet = ("--log-level", "warning")
    launch = (sys.executable, "-P", "-m", "launch")
    kv_mib = machine.kv_gib * 1024 // len(roles)
    programs = [
        Program(
            name="router",
            command=(*launch, "router", "--port", str(port), *router, *quiet),
            settings=import_env(),
            cores=machine.cores,
        )
    ]
    for number, (role, cores) in enumerate(zip(roles, machine.parts(len(roles)), strict=True)):
        name, *options = role
        command = [*launch, name, str(machine.model), *options, *quiet, "--no-prefix-cache"]
        command += ["--router", address, "--name", f"{name}-{number}"]
        command += ["--threads", str(len(cores)), "--kv-memory-mib", str(kv_mib)]
        command += ["--device", machine.device]
        if machine.device == "cuda":
            command += ["--gpu-memory-fraction", f"{_OF_GPU / len(roles):g}"]
            command += ["--kv-host-copy" if machine.host_copy else "--no-kv-host-copy"]
        settings = thread_env(len(cores)) | import_env()
        programs.append(
            Program(name=f"{name}-{number}", command=command, settings=settings, cores=cores)
        )

    def is_ready() -> bool:
        try:
            with Client(address) as client:
                found = client.status(timeout_s=_ASK_S).instances
        except TwinpoolError:
            return False
        return len(found) == len(roles)

    with running(programs, is_ready, machine.logs):
        yield address


def _vllm_program(machine: Machine, name: str, port: int, cores: tuple[int, ...]) -> Program:
    if machine.vllm_python is None:
        raise RuntimeError("--vllm-python is required")
    command = [str(machine.vllm_python), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(machine.model), "--served-model-name", _MODEL]
    command += ["--host", _HOST, "--port", str(port), "--dtype", "bfloat16"]
    command += ["--max-model-len", str(machine.max_context), "--no-enable-prefix-caching"]
    kv_gib = machine.kv_gib * len(cores) // len(machine.cores)
    settings = peers.vllm_settings(cores, max(1, kv_gib))
    return Program(name=name, command=command, settings=settings, cores=cores)


@contextmanager
def _vllm(machine: Machine, instances: int) -> Iterator[OpenBackend]:
    """Run instances of vLLM, each with its part of the cores, that are asked in turn."""
    ports = [servers.free_port() for _ in range(instances)]
    programs = [
        _vllm_program(machine, f"vllm-{number}", port, cores)
        for number, (port, cores) in enumerate(zip(ports, machine.parts(instances), strict=True))
    ]
    with running(programs, lambda: all(map(_is_healthy, ports)), machine.logs):
        yield lambda: TurnsBackend([OpenAIBackend(_url(port)) for port in ports])


@contextmanager
def _vllm_pair(machine: Machine) -> Iterator[OpenBackend]:
    """Run vLLM's prefill and decode with half of the cores each, KV by NIXL between them."""
    ports = [servers.free_port() for _ in range(2)]
    programs = []
    for name, port, cores in zip(("prefill", "decode"), ports, machine.parts(2), strict=True):
        plain = _vllm_program(machine, f"vllm-{name}", port, cores)
        side_channel = {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": _HOST,
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(servers.free_port()),
            "UCX_TLS": "all",
        }
        programs.append(
            Program(
                name=plain.name,
                command=(*plain.command, "--kv-transfer-config", _NIXL),
                settings={**plain.settings, **side_channel},
                cores=cores,
            )
        )
    with running(programs, lambda: all(map(_is_healthy, ports)), machine.logs):
        yield lambda: PairBackend(*map(_url, ports))


def _url(port: int) -> str:
    return f"http://{_HOST}:{port}"


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(_HOST, port, timeout=_ASK_S)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


_COLOCATED = ("decode", "--colocated")
# Prompts of up to so many tokens may be computed at decode, in pieces, where that is sooner done.
_EITHER = ("--local-prefill-max", "1024")
_TAKES_PROMPTS = (*DECODE, "--local-prefill-tokens", "256")
OURS = "Twinpool 1P1D"
SYSTEMS: dict[str, System] = {
    OURS: System(instances=2, hands_over=True, start=lambda it: _twinpool(it, PREFILL, DECODE)),
    "Twinpool 1P1D, prompts at either": System(
        instances=2,
        start=lambda it: _twinpool(it, PREFILL, _TAKES_PROMPTS, router=_EITHER),
    ),
    "Twinpool colocated x2": System(
        instances=2, start=lambda it: _twinpool(it, _COLOCATED, _COLOCATED)
    ),
    "Twinpool colocated": System(instances=1, start=lambda it: _twinpool(it, _COLOCATED)),
    "vLLM": System(instances=1, is_vllm=True, start=partial(_vllm, instances=1)),
    "vLLM x2": System(instances=2, is_vllm=True, start=partial(_vllm, instances=2)),
    "vLLM 1P1D NIXL": System(instances=2, hands_over=True, is_vllm=True, start=_vllm_pair),
}
