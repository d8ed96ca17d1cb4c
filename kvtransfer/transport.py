"""The seam between the agents and what carries their bytes.

Owns the interface only. An implementation owns connections and outstanding operations; agents
own buffers and meaning. Everything but `wake` is called from one thread, the agent's.

A link has two lanes. The control lane carries small ordered messages (at most
wire.MAX_CONTROL_BYTES); it is separate so that an abort passes while data is stalled, and so that
a stranger is refused before the data lane knows of it. The data lane carries tagged messages into
receives that were posted before.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


class Link(Protocol):
    """One connection. After `close` no new operation starts; those posted still complete."""

    @property
    def data_address(self) -> bytes:
        """Where this side's data lane is reached; goes to the peer in hello or welcome."""
        ...

    @property
    def carrier(self) -> str:
        """What carries the data, as far as the transport knows: "ucx/posix", "loopback"."""
        ...

    def send_control(self, message: bytes) -> None:
        """Queue a control message; a broken link swallows it and reports Lost."""
        ...

    def open_data(self, address: bytes) -> None:
        """Bind the data lane to the peer's data address; raises TransferError where it cannot."""
        ...

    def send(self, tag: int, message: Bytes, key: Any) -> None:
        """Send `message`; it must stay unchanged until Done(key) arrives."""
        ...

    def receive(self, tag: int, into: Bytes, key: Any) -> None:
        """Post a receive; `into` belongs to the transport until Done(key) arrives."""
        ...

    def close(self) -> None:
        """Close both lanes without waiting; Done still comes for every operation posted."""
        ...


@dataclass(frozen=True, slots=True)
class Accepted:
    """A stranger connected to the listener."""

    link: Link


@dataclass(frozen=True, slots=True)
class Connected:
    """The control lane of a link from `connect` is up."""

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

    def wake(self) -> None:
        """Make a waiting `poll` return soon; callable from any thread."""
        ...

    def close(self) -> None:
        """Close everything and free descriptors, threads and memory; bounded in time."""
        ...
