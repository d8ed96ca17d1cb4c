"""Leaks to plant in a rank: what a check for growth is worth, it shows on these."""

import itertools
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from kvtransfer.control_socket import Broken, ControlSocket
from kvtransfer.receive import ReceiveAgent
from kvtransfer.shared import Lease, SharedRegion
from kvtransfer.slots import Bytes, SendSlots, page_aligned

# Small enough for the heap, where no mapping shows it.
_HEAP_BYTES = 16 << 10


class Leak:
    """What leaks, until it is mended."""

    def __init__(self) -> None:
        self._kept: list[Any] = []
        self._mend: list[Callable[[], None]] = []

    def keep(self, thing: Any, drop: Callable[[], None] = lambda: None) -> None:
        """Let `thing` live until the leak is mended; `drop` then frees it."""
        self._kept.append(thing)
        self._mend.append(drop)

    def patch(self, owner: type, name: str, leaking: Callable[..., Any]) -> None:
        """Replace a method."""
        self._mend.append(patch(owner, name, leaking))

    def mend(self) -> None:
        """Put everything back and free what was kept."""
        for undo in reversed(self._mend):
            undo()
        self._kept.clear()
        self._mend.clear()

    def per_transfer(self, keep: Callable[[Any], None]) -> None:
        """Call `keep` with every transfer that the receiver completes."""
        complete = ReceiveAgent._complete

        def leaking(agent: ReceiveAgent, incoming: Any, now: float) -> None:
            keep(incoming)
            complete(agent, incoming, now)

        self.patch(ReceiveAgent, "_complete", leaking)


def patch(owner: type, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Replace a method; return what puts it back."""
    before = getattr(owner, name)
    setattr(owner, name, method)
    return lambda: setattr(owner, name, before)


def _buffer(leak: Leak) -> None:
    leak.per_transfer(lambda _: leak.keep(page_aligned(4096)))


def _heap(leak: Leak) -> None:
    leak.per_transfer(lambda _: leak.keep(bytearray(b"x") * _HEAP_BYTES))


def _crumb(leak: Leak) -> None:
    """Little enough that only many transfers show it."""
    leak.per_transfer(lambda _: leak.keep(bytes(200)))


def _object(leak: Leak) -> None:
    leak.per_transfer(leak.keep)


def _descriptor(leak: Leak) -> None:
    def keep(_: Any) -> None:
        descriptor = os.eventfd(0)
        leak.keep(None, lambda: os.close(descriptor))

    leak.per_transfer(keep)


def _thread(leak: Leak) -> None:
    """A thread that nobody ends, with every tenth transfer."""
    over = threading.Event()
    numbers = itertools.count()

    def keep(_: Any) -> None:
        if next(numbers) % 10 == 0:
            threading.Thread(target=over.wait, daemon=True).start()
            leak.keep(over, over.set)

    leak.per_transfer(keep)


def _lease(leak: Leak) -> None:
    """One lease that is never ended."""
    end, kept = SharedRegion.end, list[Lease]()

    def leaking(region: SharedRegion, lease: Lease) -> None:
        if kept:
            end(region, lease)
        else:
            kept.append(lease)

    leak.patch(SharedRegion, "end", leaking)


def _slot(leak: Leak) -> None:
    """One send buffer that is never given back."""
    give_back, kept = SendSlots.give_back, list[Bytes]()

    def leaking(slots: SendSlots, buffer: Bytes) -> None:
        if kept:
            give_back(slots, buffer)
        else:
            kept.append(buffer)

    leak.patch(SendSlots, "give_back", leaking)


def _socket(leak: Leak) -> None:
    """The control socket of every link that ends."""

    def leaking(control: ControlSocket) -> None:
        with suppress(Broken):
            control.flush()
        leak.keep(None, control.socket.close)

    leak.patch(ControlSocket, "close", leaking)


def _worker(leak: Leak) -> None:
    """The UCX worker of every link that ends; they have to go before their context does."""
    from kvtransfer.ucx_worker import Context, Worker  # reads the environment when it is loaded

    close, close_context, kept = Worker.close, Context.close, list[Worker]()

    def leaking(worker: Worker) -> list[Any]:
        kept.append(worker)
        return [key for _, key, _ in worker._outstanding]

    def closing(context: Context) -> None:
        for worker in kept:
            close(worker)
        close_context(context)

    leak.patch(Worker, "close", leaking)
    leak.patch(Context, "close", closing)


KINDS: dict[str, Callable[[Leak], None]] = {
    "buffer": _buffer,
    "heap": _heap,
    "crumb": _crumb,
    "object": _object,
    "descriptor": _descriptor,
    "thread": _thread,
    "lease": _lease,
    "slot": _slot,
    "socket": _socket,
    "worker": _worker,
}
