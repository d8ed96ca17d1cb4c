"""Two ranks in processes of their own, the traffic between them, and checkpoints along the way.

Owns the processes; knows nothing of what counts as growth. Two processes and
not one: UCX over shared memory, the mapped lane and resident memory are what they are in service
only where each agent has a process to itself.
"""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from tests.flat.growth import Held

WAIT_S = 60.0
BATCH = 25
CHECKPOINTS = 9
_WIDE, _NARROW = 0, 1
Watched = dict[str, list[Held]]


@dataclass(frozen=True, kw_only=True)
class Lane:
    """A lane, what UCX may use, and what must turn out to carry the payload."""

    lane: str
    carrier: str
    tls: str | None = None


LANES = {
    "ucx-shm": Lane(lane="ucx", tls="posix,sysv,self,tcp", carrier="ucx/posix"),
    "ucx-tcp": Lane(lane="ucx", tls="tcp", carrier="ucx/tcp"),
    "stream": Lane(lane="stream", carrier="tcp"),
    "mapped": Lane(lane="mapped", carrier="mapped"),
}


class Process:
    """One rank."""

    def __init__(self, role: str) -> None:
        self.role = role
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.flat.rank", role],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # What several arenas of the allocator keep back is no leak and hides one.
            env={**os.environ, "MALLOC_ARENA_MAX": "1", "PYTHONFAULTHANDLER": "1"},
        )
        self._heard: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                self._heard.put(line)
        ended = f"the process has ended with {self._process.wait()}"
        self._heard.put(json.dumps({"error": ended}))

    def tell(self, do: str, **arguments: Any) -> None:
        """Give a command; its answer must be taken by `answer`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """Return the answer to the oldest command that has none."""
        said = json.loads(self._heard.get(timeout=WAIT_S))
        assert "error" not in said, f"{self.role}: {said['error']}"
        return said["answer"]

    def ask(self, do: str, **arguments: Any) -> Any:
        """Give a command, return its answer."""
        self.tell(do, **arguments)
        return self.answer()

    def close(self) -> None:
        """End the process, politely or not."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(10.0)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._reader.join(10.0)
        self._process.stdout.close()


class Ranks:
    """A sender and a receiver; `on` a lane they are joined."""

    def __init__(self) -> None:
        self._launch()
        self._bound: list[Any] = []
        self._next_id = 1
        self._used = False

    def _launch(self) -> None:
        self.both = (Process("send"), Process("receive"))
        self.send, self.receive = self.both

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        for process in self.both:
            process.close()

    def start(self, lane: Lane) -> None:
        """Start agents on a lane and connect them; anew where the last use of them broke off."""
        if self._used:
            self._close()
            self._launch()
        self._used = True
        for process in self.both:
            process.tell("start", lane=lane.lane, tls=lane.tls)
        _, self._bound = self.send.answer(), self.receive.answer()
        self.connect()
        assert self.carrier == lane.carrier, f"carried by {self.carrier}, not {lane.carrier}"

    def stop(self) -> None:
        """Close the agents."""
        for process in self.both:
            process.ask("stop")
        self._used = False

    def connect(self) -> None:
        self.send.ask("connect", bound=self._bound)
        self._both_hear("PeerUp", [0])

    def _both_hear(self, kind: str, ids: list[int]) -> None:
        for process in self.both:
            process.tell("expect", kind=kind, ids=ids)
        self.carrier, _ = self.send.answer(), self.receive.answer()

    def _ids(self, count: int) -> list[int]:
        self._next_id += count
        return list(range(self._next_id - count, self._next_id))

    def _begin(self, ids: list[int]) -> None:
        self.receive.ask("begin", ids=ids)
        self.send.ask("begin", ids=ids)

    def transfer(self, count: int) -> None:
        """Move so many sequences; of each batch two are aborted and two revoked in their midst:
        first while pieces travel, then when the others have arrived."""
        while count > 0:
            ids = self._ids(min(BATCH, count))
            count -= len(ids)
            early, late, whole = ids[:2], ids[2:4], ids[4:]
            self._begin(ids)
            self.send.ask("ready", ids=early + late, groups=[_WIDE])
            self.send.ask("ready", ids=whole, groups=[_WIDE, _NARROW])
            self._break_off(early)
            self._both_hear("Completed", whole)
            self._break_off(late)

    def _break_off(self, ids: list[int]) -> None:
        """Abort the first transfer, revoke the second; the other side hears that it failed."""
        ends = ((self.send, self.receive), (self.receive, self.send))
        for doomed, (end, other) in zip(ids, ends, strict=False):
            end.ask("end", ids=[doomed])
            other.ask("expect", kind="Failed", ids=[doomed])

    def reconnect(self, count: int) -> None:
        """Forget the peer and connect again; every other time in the midst of a transfer."""
        for number in range(count):
            doomed = self._ids(1) if number % 2 else []
            if doomed:
                self._begin(doomed)
                self.send.ask("ready", ids=doomed, groups=[_WIDE])
            self.send.ask("forget")
            self._both_hear("PeerDown", [0])
            self._both_hear("Failed", doomed)
            self.connect()

    def warm_up(self, transfers: int, reconnects: int) -> None:
        """Let everything grow that grows once: caches, pools, what is loaded when first used."""
        self.transfer(transfers // 2)
        self.reconnect(reconnects)
        self.transfer(transfers - transfers // 2)

    def plant(self, leak: str) -> None:
        """From now on both ranks leak."""
        for process in self.both:
            process.ask("plant", leak=leak)

    def watch_transfers(self, count: int) -> Watched:
        """Move so many sequences; return what each rank held along the way."""
        return self._watch(self.transfer, count)

    def watch_reconnects(self, count: int) -> Watched:
        """Reconnect so often; return what each rank held along the way."""
        return self._watch(self.reconnect, count)

    def _watch(self, act: Callable[[int], None], count: int) -> Watched:
        steps = min(CHECKPOINTS, count)
        held = [self.measure()]
        for step in range(steps):
            act(count * (step + 1) // steps - count * step // steps)
            held.append(self.measure())
        return {process.role: [each[process.role] for each in held] for process in self.both}

    def measure(self) -> dict[str, Held]:
        """What each rank holds, by role; the receiver after the sender has come to rest."""
        return {process.role: process.ask("measure") for process in self.both}
