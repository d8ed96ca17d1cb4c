"""A server that a side asks, alive while the side is. Imports nothing of this project.

Its group is not the side's, so that it goes on where the side is stopped between turns: who serves
a cluster has to answer heartbeats.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

_START_S = 600.0
_POLL_S = 0.2
_TIED = Path(__file__).with_name("tied.py")


def start(
    command: Sequence[str],
    is_ready: Callable[[], bool],
    end_with: signal.Signals,
    environ: Mapping[str, str] | None = None,
) -> "subprocess.Popen[bytes]":
    """Start a server and return it once it is ready; what it says goes to stderr.

    Raises RuntimeError where it ends before.
    """
    server = spawn(command, end_with, environ)
    try:
        wait_until(is_ready, [server])
    except BaseException:
        kill(server)
        raise
    return server


def spawn(
    command: Sequence[str],
    end_with: signal.Signals,
    environ: Mapping[str, str] | None = None,
    *,
    cores: Iterable[int] = (),
    says_to: IO[Any] | None = None,
) -> "subprocess.Popen[bytes]":
    """Start a server and return it at once.

    It has this process's environment and cores unless others are given. The kernel sends it
    `end_with` when the thread that called this ends, however it does.
    """
    tie = (str(int(end_with)), str(os.getpid()), ",".join(map(str, cores)))
    return subprocess.Popen(
        # Isolated, for this start alone.
        [sys.executable, "-I", "-S", str(_TIED), *tie, *command],
        stdin=subprocess.DEVNULL,
        stdout=says_to or sys.stderr,
        stderr=says_to,
        env=environ,
        process_group=0,
    )


def wait_until(is_ready: Callable[[], bool], servers: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Wait; raises RuntimeError where one of the servers ends before, or it takes too long."""
    waited_until = time.monotonic() + _START_S
    while not is_ready():
        for server in servers:
            if server.poll() is not None:
                raise RuntimeError(f"the server has ended with {server.returncode}")
        if time.monotonic() > waited_until:
            raise RuntimeError(f"the server is not ready after {_START_S:g} s")
        time.sleep(_POLL_S)


def end(server: "subprocess.Popen[bytes]", within_s: float) -> None:
    """Let a server and what it has started end in its own order, and kill what then is left."""
    server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(within_s)
    kill(server)


def kill(server: "subprocess.Popen[bytes]") -> None:
    """End a server with all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def wake(server: "subprocess.Popen[bytes]") -> None:
    """Let a server that `rest` has stopped go on."""
    os.killpg(server.pid, signal.SIGCONT)


def rest(server: "subprocess.Popen[bytes]") -> None:
    """Stop a server, with all that it has started, until it is woken."""
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGSTOP)


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
