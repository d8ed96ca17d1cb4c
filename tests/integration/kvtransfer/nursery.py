"""Forks ranks from one process that has imported all that they need, which takes seconds.

Owns the children until the channel to whoever asks for them ends, also those that are stopped. It
has one thread only, so that forking is safe.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
from contextlib import suppress

import torch

from kvtransfer import ucx_settings
from tests.integration.kvtransfer.rank import BLOCK_SIZE, Rank, known

MAX_REQUEST = 1 << 16


def main() -> None:
    """Fork a rank for every request; each comes with the socket on which the rank is driven."""
    faulthandler.register(signal.SIGUSR1)  # where is a rank that does not answer?
    torch.set_num_threads(1)
    _import_ucx()
    channel = socket.socket(fileno=int(sys.argv[1]))
    children: set[int] = set()
    while True:
        request, descriptors, _, _ = socket.recv_fds(channel, MAX_REQUEST, 1)
        if not request:
            break
        children -= _ended()
        config = json.loads(request)
        known(int(config["layers"]), -(-int(config["tokens"]) // BLOCK_SIZE))
        with socket.socket(fileno=descriptors[0]) as sock:
            pid = os.fork()
            if pid == 0:
                channel.close()
                _live(config, sock)
            children.add(pid)
    for pid in children - _ended():
        os.kill(pid, signal.SIGKILL)


def _import_ucx() -> None:
    """UCX takes longest to load, and must find what a rank would tell it first."""
    ucx_settings.apply(ucx_settings.UcxSettings())
    import kvtransfer.ucx_worker  # noqa: F401


def _live(config: dict[str, object], sock: socket.socket) -> None:
    try:
        rank = Rank(str(config["role"]), config, sock)
        rank.say({"answer": "born", "pid": os.getpid()})
        rank.obey()
    except Exception:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(0)


def _ended() -> set[int]:
    """Children that have ended; until then their ids belong to nobody else."""
    ended = set()
    with suppress(ChildProcessError):
        while pid := os.waitpid(-1, os.WNOHANG)[0]:
            ended.add(pid)
    return ended


if __name__ == "__main__":
    main()
