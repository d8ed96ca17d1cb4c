"""An in-process transport for tests, with faults.

Owns delivery between transports of one `Network`: order is kept on each lane, nothing is lost
unless a fault says so. Keeps to transport.py's contract in every respect that agents rely on.
"""

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from kvtransfer.errors import PeerLost
from kvtransfer.transport import (
    Accepted,
    Bytes,
    Connected,
    ControlArrived,
    Done,
    Happening,
    Lost,
)

Lane = Literal["control", "data", "stream"]
MAX_UNEXPECTED = 1024


@dataclass(frozen=True, slots=True)
class Delivery:
    """One arrival of a message: possibly late, possibly changed."""

    message: bytes
    delay_s: float = 0.0


Fault = Callable[[Lane, bytes], Sequence[Delivery]]


@dataclass(frozen=True, slots=True, eq=False)
class _Receive:
    link: "LoopbackLink"
    into: Bytes
    key: Any


class Network:
    """What loopback transports are plugged into; `fault` decides what becomes of each message.

    With `hold_receives`, receives of a closed link stay outstanding until `release_receives`, as
    on hardware that may still write. With `hold_streams`, stream sends are not read from their
    buffers before `release_streams`, as by a kernel whose socket is full.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.fault: Fault | None = None
        self.hold_receives = False
        self.hold_streams = False
        self._ports: dict[int, LoopbackTransport] = {}
        self._addresses: dict[bytes, LoopbackTransport] = {}
        self._numbers = itertools.count(1)
        self._held: list[_Receive] = []
        self.streams: list[LoopbackStream] = []

    def transport(self) -> "LoopbackTransport":
        """Return a new transport on this network."""
        with self.lock:
            made = LoopbackTransport(self, f"loopback-{next(self._numbers)}".encode())
            self._addresses[made.data_address] = made
            return made

    def release_receives(self) -> None:
        """Make the receives that `hold_receives` kept back terminal."""
        with self.lock:
            for receive in self._held:
                receive.link.owner.report(Done(receive.link, receive.key, "canceled"))
            self._held.clear()

    def release_streams(self) -> None:
        """Let the stream sends go that `hold_streams` kept back."""
        with self.lock:
            self.hold_streams = False
            for stream in self.streams:
                stream.flush()

    def bind(self, transport: "LoopbackTransport", port: int) -> int:
        """Give `transport` a port; raises OSError where it is taken."""
        with self.lock:
            port = port or 40000 + next(self._numbers)
            if port in self._ports:
                raise OSError(f"loopback port {port} is in use")
            self._ports[port] = transport
            return port

    def at_port(self, port: int) -> "LoopbackTransport | None":
        """Return who listens on `port`."""
        return self._ports.get(port)

    def at_address(self, address: bytes) -> "LoopbackTransport | None":
        """Return whose data address this is."""
        return self._addresses.get(address)

    def unplug(self, transport: "LoopbackTransport") -> None:
        """Forget a transport."""
        with self.lock:
            self._ports = {p: t for p, t in self._ports.items() if t is not transport}
            self._addresses.pop(transport.data_address, None)

    def cancel(self, receives: Sequence[_Receive]) -> None:
        """End the receives of a closed link, at once or when released."""
        if self.hold_receives:
            self._held += receives
            return
        for receive in receives:
            receive.link.owner.report(Done(receive.link, receive.key, "canceled"))

    def deliver(
        self,
        lane: Lane,
        message: bytes,
        target: "LoopbackTransport",
        arrive: Callable[[bytes], None],
    ) -> None:
        """Let `message` arrive at `target` as the fault rule wants it."""
        for delivery in self.fault(lane, message) if self.fault else (Delivery(message),):
            target.arrive_at(
                time.monotonic() + delivery.delay_s if delivery.delay_s else 0.0,
                partial(arrive, delivery.message),
            )


class LoopbackLink:
    """One end of a link."""

    stream_carrier = "loopback"

    def __init__(self, owner: "LoopbackTransport", far: "LoopbackLink | None" = None) -> None:
        self.owner = owner
        self.far = far
        self.closed = False
        self.stream = LoopbackStream(self)
        self.tagged = LoopbackTagged(self)
        owner.network.streams.append(self.stream)

    def send_control(self, message: bytes) -> None:
        """See Link."""
        with self.owner.network.lock:
            far = self.far
            if self.closed or far is None:
                return
            self.owner.act(
                lambda: self.owner.network.deliver(
                    "control", bytes(message), far.owner, far.control_arrives
                )
            )

    def control_arrives(self, message: bytes) -> None:
        """A control message reaches this end."""
        if not self.closed:
            self.owner.report(ControlArrived(self, message))

    def close(self) -> None:
        """See Link."""
        with self.owner.network.lock:
            if self.closed:
                return
            self.closed = True
            self.owner.network.cancel(self.owner.withdraw(self))
            self.stream.close()
            far = self.far
            if far is not None:
                self.owner.act(
                    lambda: far.owner.arrive_at(0.0, lambda: far.break_off("closed by the peer"))
                )

    def break_off(self, reason: str) -> None:
        """The far end is gone."""
        if not self.closed and self.far is not None:
            self.far = None
            self.owner.report(Lost(self, reason))


class LoopbackTagged:
    """A link's tagged messages."""

    carrier = "loopback"

    def __init__(self, link: LoopbackLink) -> None:
        self._link = link
        self._target: LoopbackTransport | None = None

    @property
    def address(self) -> bytes:
        """See Tagged."""
        return self._link.owner.data_address

    def open(self, address: bytes) -> None:
        """See Tagged."""
        network = self._link.owner.network
        with network.lock:
            self._target = network.at_address(address)
            if self._target is None:
                raise PeerLost("no loopback transport has this data address")

    def send(self, tag: int, message: Bytes, key: Any) -> None:
        """See Tagged."""
        link = self._link
        owner = link.owner
        with owner.network.lock:
            target = self._target
            if not link.closed and target is not None:
                copied = message.tobytes()
                owner.act(
                    lambda: owner.network.deliver(
                        "data", copied, target, lambda m: target.data_arrives(tag, m)
                    )
                )
            owner.report(Done(link, key, "closed" if link.closed else None))

    def receive(self, tag: int, into: Bytes, key: Any) -> None:
        """See Tagged."""
        with self._link.owner.network.lock:
            self._link.owner.post(tag, _Receive(self._link, into, key))


@dataclass(slots=True, eq=False)
class _Operation:
    parts: list[memoryview]
    key: Any

    @property
    def left(self) -> int:
        return sum(len(part) for part in self.parts)

    def take_out(self, *, keep_first: bool) -> None:
        kept = self.parts[:1] if keep_first else []
        rest = memoryview(bytearray(self.left - sum(map(len, kept))))
        self.parts = [*kept, rest] if len(rest) else kept


class LoopbackStream:
    """A link's byte stream."""

    def __init__(self, link: LoopbackLink) -> None:
        self._link = link
        self._out: list[_Operation] = []
        self._in: deque[_Operation] = deque()
        self._arrived = bytearray()

    def send(self, parts: Sequence[memoryview], key: Any) -> None:
        """See Stream."""
        with self._link.owner.network.lock:
            self._out.append(_Operation(list(parts), key))
            if not self._link.owner.network.hold_streams:
                self.flush()

    def receive(self, parts: Sequence[memoryview], key: Any) -> None:
        """See Stream."""
        with self._link.owner.network.lock:
            if self._link.closed:
                self._link.owner.report(Done(self._link, key, "closed"))
                return
            self._in.append(_Operation(list(parts), key))
            self._fill()

    def divert(self, key: Any) -> None:
        """See Stream."""
        with self._link.owner.network.lock:
            for operation in self._out:
                if operation.key == key:
                    operation.take_out(keep_first=True)
            for operation in self._in:
                if operation.key == key:
                    operation.take_out(keep_first=False)

    def flush(self) -> None:
        """Read the buffers of what is to be sent, now."""
        link, out = self._link, self._out
        self._out = []
        for operation in out:
            far = link.far
            message = b"".join(operation.parts)
            if not link.closed and far is not None:
                link.owner.act(partial(self._deliver, message, far))
            link.owner.report(Done(link, operation.key, "closed" if link.closed else None))

    def _deliver(self, message: bytes, far: LoopbackLink) -> None:
        self._link.owner.network.deliver("stream", message, far.owner, far.stream.arrives)

    def arrives(self, message: bytes) -> None:
        """Bytes reach this end."""
        self._arrived += message
        self._fill()

    def close(self) -> None:
        """The link is closed."""
        for operation in self._in:
            self._link.owner.report(Done(self._link, operation.key, "closed"))
        self._in.clear()
        self.flush()

    def _fill(self) -> None:
        while self._in and self._arrived:
            operation = self._in[0]
            while operation.parts and self._arrived:
                part = operation.parts[0]
                count = min(len(part), len(self._arrived))
                part[:count] = self._arrived[:count]
                del self._arrived[:count]
                operation.parts[0] = part[count:]
                if not len(operation.parts[0]):
                    operation.parts.pop(0)
            if not operation.parts:
                self._in.popleft()
                self._link.owner.report(Done(self._link, operation.key, None))


class LoopbackTransport:
    """One plug in a Network; see Transport."""

    def __init__(self, network: Network, address: bytes) -> None:
        self.network = network
        self.data_address = address
        self._changed = threading.Condition(network.lock)
        self._out: list[Happening] = []
        self._late: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._posted: dict[int, _Receive] = {}
        self._unexpected: dict[int, bytes] = {}
        self._links: list[LoopbackLink] = []
        self._woken = False
        self._frozen = False
        self._dead = False
        self._stopped: deque[Callable[[], None]] = deque()

    # ------------------------------------------------------------------------------ contract

    def listen(self, host: str, port: int) -> tuple[str, int]:
        """See Transport."""
        return host, self.network.bind(self, port)

    def connect(self, host: str, port: int) -> LoopbackLink:
        """See Transport."""
        with self.network.lock:
            near = LoopbackLink(self)
            self._links.append(near)
            there = self.network.at_port(port)
            if there is None or there._dead:
                self.report(Lost(near, "connection refused"))
                return near
            far = LoopbackLink(there, near)
            near.far = far
            there._links.append(far)
            there.arrive_at(0.0, lambda: there.report(Accepted(far)))
            self.report(Connected(near))
            return near

    def poll(self, timeout_s: float) -> list[Happening]:
        """See Transport."""
        until = time.monotonic() + timeout_s
        with self.network.lock:
            while True:
                if self._frozen and not self._dead:
                    self._changed.wait()
                    continue
                now = time.monotonic()
                self._run_late(now)
                if self._out:
                    out, self._out = self._out, []
                    return out
                if self._woken or now >= until:
                    self._woken = False
                    return []
                due = self._late[0][0] if self._late else until
                self._changed.wait(max(0.0, min(until, due) - now))

    rdma = False

    def wake(self) -> None:
        """See Transport."""
        with self.network.lock:
            self._woken = True
            self._changed.notify_all()

    def close(self) -> None:
        """See Transport."""
        with self.network.lock:
            for link in self._links:
                link.close()
            self._links.clear()
            self._posted.clear()
            self._unexpected.clear()
            self._dead = True
            self.network.unplug(self)

    # -------------------------------------------------------------------------------- faults

    def freeze(self, frozen: bool) -> None:
        """Stop (or resume) like a stopped process: `poll` stands, nothing goes in or out."""
        with self.network.lock:
            self._frozen = frozen
            while not frozen and self._stopped:
                self._stopped.popleft()()
            self._changed.notify_all()

    def die(self) -> None:
        """Vanish like a killed process: peers see their links break, no goodbye is said."""
        with self.network.lock:
            self._dead = self._frozen = True
            for link in self._links:
                far, link.far = link.far, None
                if far is not None:
                    far.owner.arrive_at(0.0, partial(far.break_off, "connection reset"))
            self._stopped.clear()
            self._out.clear()

    # ------------------------------------------------------------------- called under the lock

    def report(self, happening: Happening) -> None:
        """Queue for the next poll."""
        if not self._dead:
            self._out.append(happening)
            self._changed.notify_all()

    def act(self, what: Callable[[], None]) -> None:
        """Do what this side does to others, unless it is stopped."""
        if self._frozen:
            self._stopped.append(what)
        else:
            what()

    def arrive_at(self, due: float, arrive: Callable[[], None]) -> None:
        """Run `arrive` now (0) or when its time comes."""
        if self._dead:
            return
        if due:
            heapq.heappush(self._late, (due, next(self._order), arrive))
            self._changed.notify_all()
        elif self._frozen:
            self._stopped.append(arrive)
        else:
            arrive()

    def _run_late(self, now: float) -> None:
        while self._late and self._late[0][0] <= now and not self._frozen:
            heapq.heappop(self._late)[2]()

    def post(self, tag: int, receive: _Receive) -> None:
        """Post a receive, or fill it from what came before it."""
        early = self._unexpected.pop(tag, None)
        if early is not None:
            self._fill(receive, early)
        elif receive.link.closed:
            self.report(Done(receive.link, receive.key, "closed"))
        else:
            self._posted[tag] = receive

    def data_arrives(self, tag: int, message: bytes) -> None:
        """Put a message into the receive that waits for it."""
        receive = self._posted.pop(tag, None)
        if receive is not None:
            self._fill(receive, message)
        elif len(self._unexpected) < MAX_UNEXPECTED:
            self._unexpected[tag] = message

    def _fill(self, receive: _Receive, message: bytes) -> None:
        if len(message) > len(receive.into):
            self.report(Done(receive.link, receive.key, "message truncated"))
            return
        receive.into[: len(message)] = np.frombuffer(message, dtype=np.uint8)
        self.report(Done(receive.link, receive.key, None))

    def withdraw(self, link: LoopbackLink) -> list[_Receive]:
        """Take back the receives of a link."""
        mine = {tag: r for tag, r in self._posted.items() if r.link is link}
        for tag in mine:
            del self._posted[tag]
        return list(mine.values())
