"""The seam between the agents and whatever carries bytes.

Owns the contract: every operation that was started is reported terminal exactly once, and a
buffer belongs to the transport until then. A transport is entered from one thread only, the
agent's.

A link has a control lane and up to two ways for data. The control lane carries small ordered
messages (at most wire.MAX_CONTROL_BYTES); it is separate so that an abort passes while data is
stalled. The stream is a plain ordered run of bytes from sender to receiver. Tagged messages go
into receives that were posted before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


class Stream(Protocol):
    """Ordered bytes, scattered and gathered without a copy on the way."""

    def send(self, parts: Sequence[memoryview], key: Any) -> None:
        """Send the parts after what was sent before; they must not change until Done(key)."""
        ...

    def receive(self, parts: Sequence[memoryview], key: Any) -> None:
        """Fill the parts with the bytes that come next; they are the stream's until Done(key)."""
        ...

    def divert(self, key: Any) -> None:
        """Take the buffers out of an operation now, for good; Done(key) still comes in its turn.

        What is left to be sent goes as zeros, all but the operation's first part, which is no
        payload; what is left to be received is thrown away. So the order of bytes stays whole, and
        nobody touches the buffers any more.
        """
        ...


class Tagged(Protocol):
    """Messages that land where a receive of the same tag was posted."""

    @property
    def address(self) -> bytes:
        """Where this side is reached; goes to the peer in hello or welcome."""
        ...

    def open(self, address: bytes) -> None:
        """Bind to the peer's address; raises TransferError where it cannot."""
        ...

    def send(self, tag: int, message: Bytes, key: Any) -> None:
        """Send `message`; it must stay unchanged until Done(key) arrives."""
        ...

    def receive(self, tag: int, into: Bytes, key: Any) -> None:
        """Post a receive; `into` belongs to the transport until Done(key) arrives."""
        ...

    @property
    def carrier(self) -> str:
        """What carries the messages, as far as it is known: "ucx/posix", "loopback"."""
        ...


class Link(Protocol):
    """One connection. After `close` no new operation starts; those posted still complete."""

    @property
    def stream(self) -> Stream:
        """The link's byte stream."""
        ...

    @property
    def tagged(self) -> Tagged:
        """The link's tagged messages; raises TransferError where the transport has none."""
        ...

    @property
    def stream_carrier(self) -> str:
        """What carries the stream: "tcp", "loopback"."""
        ...

    def send_control(self, message: bytes) -> None:
        """Queue a control message; a broken link swallows it and reports Lost."""
        ...

    def close(self) -> None:
        """Close all lanes without waiting; Done still comes for every operation posted."""
        ...


@dataclass(frozen=True, slots=True)
class Accepted:
    """A stranger connected to the listener."""

    link: Link


@dataclass(frozen=True, slots=True)
class Connected:
    """A link from `connect` is up."""

    link: Link


@dataclass(frozen=True, slots=True)
class ControlArrived:
    """One control message, in order."""

    link: Link
    message: bytes


@dataclass(frozen=True, slots=True)
class Done:
    """A posted operation is terminal: the transport will not touch its buffer again."""

    link: Link
    key: Any
    error: str | None


@dataclass(frozen=True, slots=True)
class Lost:
    """The link broke or the peer closed it; comes once, and not after our own `close`."""

    link: Link
    reason: str


Happening = Accepted | Connected | ControlArrived | Done | Lost


class Transport(Protocol):
    """Makes links and hands over, in batches, what happened on them."""

    def listen(self, host: str, port: int) -> tuple[str, int]:
        """Accept links; returns the address bound. Raises OSError where it cannot."""
        ...

    def connect(self, host: str, port: int) -> Link:
        """Begin a link; Connected or Lost follows from `poll`."""
        ...

    def poll(self, timeout_s: float) -> list[Happening]:
        """Make progress; return what happened, waiting up to `timeout_s` only if nothing did."""
        ...

    @property
    def rdma(self) -> bool:
        """Whether tagged messages can go over hardware that writes into remote memory."""
        ...

    def wake(self) -> None:
        """Make a waiting `poll` return soon; callable from any thread."""
        ...

    def close(self) -> None:
        """Close everything and free descriptors, threads and memory; bounded in time."""
        ...
