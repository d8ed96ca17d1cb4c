"""Starts the ranks of the ring as processes, once for a test session.

Run as a program it is their parent: it imports torch once, and forks.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from service.threads import set_thread_env

WAIT_S = 60.0


class Ranks:
    """The ranks' processes, which end with this."""

    def __init__(self, count: int, folder: Path) -> None:
        pairs = [socket.socketpair() for _ in range(count)]
        fds = [theirs.fileno() for _, theirs in pairs]
        self._parent = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.integration.ring.ranks",
                str(folder / "store"),
                *map(str, fds),
            ],
            pass_fds=fds,
        )
        self._sockets = [ours for ours, _ in pairs]
        for ours, theirs in pairs:
            theirs.close()
            ours.settimeout(WAIT_S)
        self._lines = [ours.makefile("rw") for ours in self._sockets]

    def ask(self, size: int, what: str, **command: Any) -> list[dict[str, Any]]:
        """Tell the first `size` ranks to do something together; return their answers."""
        for rank in range(size):
            self.tell(rank, what, **command)
        return [self.hear(rank) for rank in range(size)]

    def tell(self, rank: int, what: str, **command: Any) -> None:
        """Tell one rank to do something."""
        self._lines[rank].write(json.dumps({"do": what, **command}) + "\n")
        self._lines[rank].flush()

    def hear(self, rank: int) -> dict[str, Any]:
        """Return a rank's next answer."""
        line = self._lines[rank].readline()
        assert line, f"rank {rank} has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for lines, ours in zip(self._lines, self._sockets, strict=True):
            lines.close()
            ours.close()
        self._parent.wait(WAIT_S)


def main(store: str, fds: Sequence[int]) -> None:
    """Fork a rank for each socket, and wait for them."""
    set_thread_env(1)
    # Only now: torch reads the number of threads when it is imported.
    from tests.integration.ring.rank import serve

    sockets = [socket.socket(fileno=fd) for fd in fds]
    for rank, mine in enumerate(sockets):
        if os.fork() == 0:
            # A copy of another rank's socket would keep it open after the tests have closed it.
            for other in sockets:
                if other is not mine:
                    other.close()
            serve(rank, len(sockets), store, mine)
            os._exit(0)
    for each in sockets:
        each.close()
    for _ in sockets:
        os.wait()


if __name__ == "__main__":
    main(sys.argv[1], [int(fd) for fd in sys.argv[2:]])
