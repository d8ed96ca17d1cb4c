"""Ranks as threads of one process, and a pass cut over them and put together again."""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from engine.ring.comm import Pending
from engine.ring.errors import CommError

T = TypeVar("T")
Mail = dict[tuple[int, int, int], "queue.Queue[_Sent]"]


class LoopbackComm:
    """A `Comm` that moves a message as late as it may: when the receiver waits for it."""

    def __init__(self, rank: int, size: int, mail: Mail, timeout_s: float = 10.0) -> None:
        self.rank = rank
        self.size = size
        self._mail = mail
        self._timeout_s = timeout_s

    def send(self, message: Tensor, to: int, tag: int) -> Pending:
        assert message.is_contiguous()
        sent = _Sent(message, self._timeout_s)
        self._box(self.rank, to, tag).put(sent)
        return sent

    def _box(self, source: int, to: int, tag: int) -> "queue.Queue[_Sent]":
        # At once, whoever of the two comes first: a defaultdict can make two boxes and keep one.
        return self._mail.setdefault((source, to, tag), queue.Queue())

    def receive(self, into: Tensor, source: int, tag: int) -> Pending:
        if into.is_floating_point():
            into.fill_(torch.nan)  # whoever reads it before `wait` shall be found out
        return _Received(into, self._box(source, self.rank, tag), self._timeout_s)


@dataclass
class _Sent:
    message: Tensor
    timeout_s: float

    def __post_init__(self) -> None:
        self.taken = threading.Event()

    def wait(self) -> None:
        if not self.taken.wait(self.timeout_s):
            raise CommError("a message was not taken")


@dataclass
class _Received:
    into: Tensor
    box: "queue.Queue[_Sent]"
    timeout_s: float

    def wait(self) -> None:
        try:
            sent = self.box.get(timeout=self.timeout_s)
        except queue.Empty:
            raise CommError("a message did not arrive") from None
        self.into.copy_(sent.message)
        sent.taken.set()


def on_ranks(size: int, run: Callable[[LoopbackComm], T]) -> Sequence[T]:
    """Run a function on every rank at the same time; return what each returned."""
    mail: Mail = {}
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, [LoopbackComm(rank, size, mail) for rank in range(size)]))


class Meeting:
    """Where ranks find out what is the greatest of what each of them has."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=10)
        self._given: list[Tensor] = []

    def greatest(self, x: Tensor) -> Tensor:
        self._given.append(x)
        self._barrier.wait()
        found = torch.stack(self._given).amax(0)
        if self._barrier.wait() == 0:
            self._given = []
        self._barrier.wait()
        return found
