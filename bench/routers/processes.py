"""Routers as processes, each on the core it is given. Owns their start and their end."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bench.movers.cores import pinned
from bench.sides.process import Side, SideFailed, environment
from service.parent import PARENT_PID_VARIABLE, exit_with_parent
from service.threads import thread_env

_READY = " ready on "
_EXIT_S = 10.0
# A soak of half an hour gives one answer.
_ANSWER_S = 7200.0


@dataclass(frozen=True)
class Started:
    """A router that serves: host:port, and the id of its process."""

    address: str
    process: int


@contextmanager
def router(core: int, options: Sequence[str] = ()) -> Iterator[Started]:
    """Run a router on one core until the block ends; raises SideFailed where it does not start."""
    with _started(core, ["router", "--port", "0", "--log-level", "warning", *options]) as found:
        yield found


@contextmanager
def bare(core: int) -> Iterator[Started]:
    """Run a relay in a router's place, as `router` does: see `bare`."""
    with _started(core, ["bench.routers.bare"]) as found:
        yield found


@contextmanager
def _started(core: int, module: Sequence[str]) -> Iterator[Started]:
    command = [sys.executable, "-m", *module]
    with ExitStack() as stack:
        stderr = stack.enter_context(tempfile.TemporaryFile())
        process = stack.enter_context(_process(core, command, stderr, subprocess.PIPE))
        assert process.stdout is not None
        ready = process.stdout.readline().decode()
        if _READY not in ready:
            stderr.seek(0)
            said = stderr.read().decode(errors="replace").strip()
            raise SideFailed(f"{module[0]} does not start; it said: {said[-2000:] or 'nothing'}")
        yield Started(ready.partition(_READY)[2].strip(), process.pid)


@contextmanager
def sglang(
    python: Path, core: int, prefills: Sequence[int], decodes: Sequence[int]
) -> Iterator[Started]:
    """Run sglang's router on one core, for workers on these ports, which need not be there yet."""
    port, metrics_port = free_ports(2)
    command = [str(python), "-m", "sglang_router.launch_router", "--pd-disaggregation"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]
    command += ["--prometheus-port", str(metrics_port)]
    for role, ports in (("--prefill", prefills), ("--decode", decodes)):
        for each in ports:
            command += [role, f"http://127.0.0.1:{each}"]
    with (
        tempfile.TemporaryFile() as output,
        _process(core, command, output, output, _ends_with(os.getpid())) as process,
    ):
        yield Started(f"127.0.0.1:{port}", process.pid)


@contextmanager
def _process(
    core: int,
    command: Sequence[str],
    stderr: IO[bytes],
    stdout: IO[bytes] | int,
    first_of_all: Callable[[], None] | None = None,
) -> Iterator["subprocess.Popen[bytes]"]:
    with pinned(core):
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=environment({PARENT_PID_VARIABLE: str(os.getpid())}, apart_from=("TWINPOOL_",)),
            # The peer's children are to end with it.
            process_group=0,
            preexec_fn=first_of_all,
        )
    with ExitStack() as stack:
        stack.enter_context(process)
        stack.callback(_end, process)
        yield process


def load(core: int) -> Side:
    """Return mock pools and clients on one core: see `load_side`."""
    with pinned(core):
        side = Side(
            "load",
            [sys.executable, "-m", "bench.routers.load_side"],
            thread_env(1),
            answer_s=_ANSWER_S,
        )
    return side.open()


def free_ports(count: int) -> list[int]:
    """Return ports that are free now, no two of them the same."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _ends_with(parent: int) -> Callable[[], None]:
    """Return what makes a process end with this one; our own see to that themselves."""
    return lambda: exit_with_parent(parent)


def _end(process: "subprocess.Popen[bytes]") -> None:
    # A drain would wait for streams that nobody reads any more.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(_EXIT_S)
