"""Starts ranks as processes of their own and talks to them."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

WAIT_S = 20.0
LAYERS = 4
DEFAULTS: dict[str, Any] = {"tokens": 1000, "layers": LAYERS, "sequences": 1}
DEFAULTS |= {"lane": "auto", "tls": None, "epoch": 7, "settings": {}}
INSTANCES = {"send": "prefill", "receive": "decode"}
_SLOTS = 6


@dataclass(frozen=True, kw_only=True)
class Way:
    """How KV travels: a lane, with what UCX may use, and what the agents then call it."""

    lane: str
    carrier: str
    tls: str | None = None


WAYS = {
    "ucx-shm": Way(lane="ucx", carrier="ucx/posix"),
    "ucx-tcp": Way(lane="ucx", carrier="ucx/tcp", tls="tcp"),
    "stream": Way(lane="stream", carrier="tcp"),
    "mapped": Way(lane="mapped", carrier="mapped"),
}


class RankProcess:
    """One rank, by the socket to it."""

    def __init__(self, config: dict[str, Any], sock: socket.socket) -> None:
        self.role: str = config["role"]
        self.lane: str = config["lane"]
        self.instance: str = config["instance"]
        self.epoch: int = config["epoch"]
        self._socket = sock
        self._closed = False
        self._bound: list[Any] | None = None
        self._heard: queue.Queue[dict[str, Any]] = queue.Queue()
        self._log: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._pidfd = os.pidfd_open(self.wait(answer="born")["pid"])
        if self.role == "send":
            self.ask("start")

    def _read(self) -> None:
        with suppress(ConnectionResetError):
            for line in self._socket.makefile():
                said = json.loads(line)
                self._log.append(said)
                self._heard.put(said)

    def do(self, what: str, **command: Any) -> None:
        """Give a command."""
        self._socket.sendall(json.dumps({"do": what, **command}).encode() + b"\n")

    def ask(self, what: str, **command: Any) -> dict[str, Any]:
        """Give a command and wait for its answer."""
        self.do(what, **command)
        return self.wait(answer=what)

    def wait(self, **wanted: Any) -> dict[str, Any]:
        """Return the next thing said that has these fields; others are dropped."""
        until = time.monotonic() + WAIT_S
        while True:
            try:
                said: dict[str, Any] = self._heard.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise self._silent(wanted) from None
            if _has(said, wanted):
                return said

    def find(
        self, *, patience_s: float = WAIT_S, since: float = 0.0, **wanted: Any
    ) -> dict[str, Any]:
        """Return an event, past or to come, that has these fields; nothing is dropped.

        A value may be a tuple of alternatives.
        """
        until = time.monotonic() + patience_s
        while True:
            for said in self._log[::-1]:
                if said.get("at", 0.0) >= since and _has(said, wanted):
                    return said
            if time.monotonic() > until:
                raise self._silent(wanted)
            time.sleep(0.002)

    def _silent(self, wanted: dict[str, Any]) -> AssertionError:
        """Have the rank print where its threads are; return the error to be raised."""
        with suppress(ProcessLookupError):
            self.signal(signal.SIGUSR1)
            time.sleep(0.5)
        return AssertionError(f"{self.instance}: {wanted} never came; heard {self._log[-20:]}")

    def said(self, **wanted: Any) -> int:
        """Return how often something with these fields has been said so far."""
        return sum(_has(each, wanted) for each in self._log)

    def becomes(self, **wanted: Any) -> None:
        """Wait until the agent's stats are these (they are a moment old)."""
        until = time.monotonic() + WAIT_S
        while True:
            stats = self.ask("stats")
            if all(stats[name] == value for name, value in wanted.items()):
                return
            assert time.monotonic() < until, f"{self.instance}: {wanted} never came: {stats}"
            time.sleep(0.02)

    def holds_nothing(self, connections: int) -> None:
        """Wait until no transfer holds anything: what is left belongs to open connections."""
        still: dict[str, Any] = {"active_transfers": 0, "connections": connections, "leases": 0}
        if self.role == "send":
            each = {"ucx": _SLOTS, "stream": 3}.get(self.lane, 0)
            still["slots"] = {"free": each * connections, "sending": 0}
        else:
            granted = _SLOTS * connections if self.lane == "ucx" else 0
            still["slots"] = {"granted": granted} if granted else {}
        self.becomes(**still)

    def check(self, sequence: int = 0, kept: Any = ()) -> dict[str, bool]:
        """See rank.Rank.check."""
        said = self.ask("check", sequence=sequence, kept=kept)
        return {name: value for name, value in said.items() if name != "answer"}

    @property
    def bound(self) -> list[Any]:
        """Where a receiver listens; starts it when asked first."""
        if self._bound is None:
            self._bound = list(self.ask("start")["bound"])
        return self._bound

    def signal(self, number: signal.Signals) -> float:
        """Send a signal; return when."""
        at = time.monotonic()
        signal.pidfd_send_signal(self._pidfd, number)
        return at

    def close(self) -> None:
        """End the process, whatever it does just now; once is enough."""
        if self._closed:
            return
        self._closed = True
        with suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self._reader.join(WAIT_S)
        self._socket.close()
        os.close(self._pidfd)


def _has(said: dict[str, Any], wanted: dict[str, Any]) -> bool:
    for name, value in wanted.items():
        if said.get(name) not in (value if isinstance(value, tuple) else (value,)):
            return False
    return True


Start = Callable[..., RankProcess]


class Ranks:
    """Starts ranks, and ends them with itself."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._nursery = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.integration.kvtransfer.nursery",
                    str(theirs.fileno()),
                ],
                pass_fds=[theirs.fileno()],
            )
        self._started: list[RankProcess] = []

    def start(self, role: str, **config: Any) -> RankProcess:
        """Return a new rank, a sender started; see DEFAULTS for its configuration."""
        full = {**DEFAULTS, "instance": INSTANCES[role], **config, "role": role}
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._channel, [json.dumps(full).encode()], [theirs.fileno()])
        rank = RankProcess(full, ours)
        self._started.append(rank)
        return rank

    @contextmanager
    def of(self, way: Way) -> Iterator[Start]:
        """Give what starts ranks that use a way, and end those that it started."""
        before = len(self._started)
        try:
            yield partial(self.start, lane=way.lane, tls=way.tls)
        finally:
            while len(self._started) > before:
                self._started.pop().close()

    def end(self, rank: RankProcess) -> None:
        """End one rank before the others."""
        self._started.remove(rank)
        rank.close()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while self._started:
            self._started.pop().close()
        self._channel.close()
        self._nursery.wait(WAIT_S)


def join(sender: RankProcess, receiver: RankProcess) -> None:
    """Connect a sender to a receiver."""
    sender.do("connect", instance=receiver.instance, bound=receiver.bound, epoch=receiver.epoch)
    sender.wait(event="PeerUp", instance=receiver.instance)
    receiver.wait(event="PeerUp", instance=sender.instance)


def begin(sender: RankProcess, receiver: RankProcess, transfer_id: int, sequence: int = 0) -> None:
    """Open the grant for one of the receiver's sequences, then begin; nothing is ready yet."""
    common = {"id": transfer_id, "epoch": receiver.epoch}
    receiver.ask("open", **common, instance=sender.instance, sequence=sequence)
    sender.ask("open", **common, instance=receiver.instance, sequence=0)


def transfer(
    sender: RankProcess, receiver: RankProcess, transfer_id: int, sequence: int = 0
) -> dict[str, Any]:
    """Move the whole sequence and check every byte; return the receiver's Completed."""
    begin(sender, receiver, transfer_id, sequence)
    sender.do("ready", id=transfer_id, layers=[0, LAYERS])
    sender.wait(event="Completed", id=transfer_id)
    done = receiver.wait(event="Completed", id=transfer_id)
    assert all(receiver.check(sequence).values())
    return done
