"""A server that a side asks, alive while the side is. Imports nothing of this project.

Its group is not the side's, so that it goes on where the side is stopped between turns: who serves
a cluster has to answer heartbeats.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

_START_S = 600.0
_PR_SET_PDEATHSIG = 1


def start(
    command: Sequence[str],
    is_ready: Callable[[], bool],
    end_with: signal.Signals,
    environ: Mapping[str, str] | None = None,
) -> "subprocess.Popen[bytes]":
    """Start a server and return it once it is ready; raises RuntimeError where it ends before.

    It has this process's environment unless another is given. The kernel sends it `end_with` when
    this process ends, however it does.
    """
    libc = ctypes.CDLL(None)

    def die_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(end_with))

    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        env=environ,
        process_group=0,
        preexec_fn=die_with_parent,  # no thread has been started yet
    )
    waited_until = time.monotonic() + _START_S
    while not is_ready():
        if server.poll() is not None:
            raise RuntimeError(f"the server has ended with {server.returncode}")
        if time.monotonic() > waited_until:
            server.kill()
            raise RuntimeError(f"the server is not ready after {_START_S:g} s")
        time.sleep(0.2)
    return server


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
