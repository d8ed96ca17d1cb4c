"""Messages between the ranks of a ring. Owns tags, deadlines and counts; not the process group.

Both sides know every message's size from the plan, so no sizes travel, and empty messages do not.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from engine.ring.errors import CommError

# Tags go round after so many; long before that, the messages of earlier passes have arrived.
_TAGS = 1 << 20


class Pending(Protocol):
    """A message on its way; its tensor must be left alone until `wait` has returned."""

    def wait(self) -> None:
        """Return when the message has left or arrived; raises CommError if it did not in time."""
        ...


class Comm(Protocol):
    """Sends tensors between ranks. No two messages on their way may share a pair and a tag."""

    @property
    def rank(self) -> int:
        """This rank's number, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many ranks there are."""
        ...

    def send(self, message: Tensor, to: int, tag: int) -> Pending:
        """Begin to send a contiguous tensor; raises CommError where that is not possible."""
        ...

    def receive(self, into: Tensor, source: int, tag: int) -> Pending:
        """Begin to receive into a contiguous tensor; raises CommError like `send`."""
        ...


class GroupComm:
    """A `Comm` over a process group of torch.distributed, which its caller opens and closes."""

    def __init__(self, group: dist.ProcessGroup, timeout_s: float) -> None:
        self.rank = group.rank()
        self.size = group.size()
        self._group = group
        self._timeout = timedelta(seconds=timeout_s)

    def send(self, message: Tensor, to: int, tag: int) -> Pending:
        try:
            work = dist.isend(message, group=self._group, group_dst=to, tag=tag)
        except RuntimeError as error:
            raise CommError(f"rank {self.rank} cannot send to rank {to}: {error}") from error
        assert work is not None
        return _GroupPending(work, self._timeout, f"rank {self.rank}'s message to rank {to}")

    def receive(self, into: Tensor, source: int, tag: int) -> Pending:
        try:
            work = dist.irecv(into, group=self._group, group_src=source, tag=tag)
        except RuntimeError as error:
            raise CommError(f"rank {self.rank} cannot hear rank {source}: {error}") from error
        assert work is not None
        return _GroupPending(work, self._timeout, f"rank {source}'s message to rank {self.rank}")


class _GroupPending:
    def __init__(self, work: dist.Work, timeout: timedelta, what: str) -> None:
        self._work = work
        self._timeout = timeout
        self._what = what

    def wait(self) -> None:
        try:
            arrived = self._work.wait(self._timeout)
        except RuntimeError as error:
            raise CommError(f"{self._what} was lost: {error}") from error
        if not arrived:
            raise CommError(f"{self._what} took more than {self._timeout}")


class Solo:
    """The `Comm` of a ring of one rank, which has nobody to talk to."""

    rank = 0
    size = 1

    def send(self, message: Tensor, to: int, tag: int) -> Pending:
        raise CommError(f"a ring of one rank has no rank {to}")

    def receive(self, into: Tensor, source: int, tag: int) -> Pending:
        raise CommError(f"a ring of one rank has no rank {source}")


@dataclass
class Traffic:
    """What a rank has sent, and how long it stood still for messages."""

    bytes_sent: int = 0
    wait_s: float = 0.0


class Wire:
    """A `Comm` as the ring uses it: counted, with tags that the ranks agree on.

    All ranks must make the same calls of `tags` in the same order.
    """

    def __init__(self, comm: Comm, clock: Callable[[], float] = time.monotonic) -> None:
        self.rank = comm.rank
        self.size = comm.size
        self.traffic = Traffic()
        self._comm = comm
        self._clock = clock
        self._next_tag = 0

    def tags(self, count: int) -> range:
        """Return tags that no message on its way has."""
        if self._next_tag + count > _TAGS:
            self._next_tag = 0
        first = self._next_tag
        self._next_tag += count
        return range(first, self._next_tag)

    def send(self, message: Tensor, to: int, tag: int) -> Pending:
        """Begin to send; an empty message is done at once."""
        if not message.numel():
            return _DONE
        self.traffic.bytes_sent += message.nbytes
        return _Timed(self._comm.send(message, to, tag), self.traffic, self._clock)

    def receive(self, into: Tensor, source: int, tag: int) -> Pending:
        """Begin to receive; an empty message is there at once."""
        if not into.numel():
            return _DONE
        return _Timed(self._comm.receive(into, source, tag), self.traffic, self._clock)


class _Timed:
    def __init__(self, pending: Pending, traffic: Traffic, clock: Callable[[], float]) -> None:
        self._pending = pending
        self._traffic = traffic
        self._clock = clock

    def wait(self) -> None:
        began = self._clock()
        self._pending.wait()
        self._traffic.wait_s += self._clock() - began


class _Done:
    def wait(self) -> None:
        pass


_DONE = _Done()
