"""A byte stream over a non-blocking TCP socket, gathered from and scattered to many buffers.

Owns one socket and the operations queued on it. The kernel takes and gives bytes only within a
call from here, so an operation whose buffers were taken out (`divert`) cannot be touched late.
"""

import socket
from collections import deque
from collections.abc import Sequence
from typing import Any

from kvtransfer.control_socket import Broken

# Buffers handed to the kernel in one call (its own limit is 1,024), and bytes moved before others
# get a turn.
_PARTS = 512
_TURN_BYTES = 8 << 20
_NOTHING_BYTES = 1 << 20

_ZEROS = memoryview(bytes(_NOTHING_BYTES))
_TRASH = memoryview(bytearray(_NOTHING_BYTES))


class _Operation:
    """Buffers not yet moved, in order; the first one may be cut already."""

    __slots__ = ("_at", "_parts", "key", "left")

    def __init__(self, parts: Sequence[memoryview], key: Any) -> None:
        self.key = key
        self._parts = list(parts)
        self._at = 0
        self.left = sum(len(part) for part in parts)

    def next(self) -> list[memoryview]:
        return self._parts[self._at : self._at + _PARTS]

    def moved(self, count: int) -> None:
        self.left -= count
        parts, at = self._parts, self._at
        while count:
            size = len(parts[at])
            if count < size:
                parts[at] = parts[at][count:]
                break
            count -= size
            at += 1
        self._at = at

    def replace(self, nothing: memoryview, *, keep_first: bool) -> None:
        """Put `nothing` in the place of what is left, except of a first part that stays."""
        kept = self._parts[:1] if keep_first and not self._at else []
        whole, rest = divmod(self.left - sum(map(len, kept)), len(nothing))
        self._parts = kept + [nothing] * whole + ([nothing[:rest]] if rest else [])
        self._at = 0


class DataSocket:
    """One end of a stream."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self._out: deque[_Operation] = deque()
        self._in: deque[_Operation] = deque()

    @property
    def wants_to_write(self) -> bool:
        """Whether bytes wait for the socket to take them."""
        return bool(self._out)

    @property
    def wants_to_read(self) -> bool:
        """Whether bytes are asked for; what nobody asks for stays in the kernel: backpressure."""
        return bool(self._in)

    def send(self, parts: Sequence[memoryview], key: Any) -> None:
        """Queue an operation of at least one byte."""
        self._out.append(_Operation(parts, key))

    def receive(self, parts: Sequence[memoryview], key: Any) -> None:
        """Queue an operation of at least one byte."""
        self._in.append(_Operation(parts, key))

    def divert(self, key: Any) -> None:
        """See transport.Stream."""
        for operation in self._out:
            if operation.key == key:
                operation.replace(_ZEROS, keep_first=True)
        for operation in self._in:
            if operation.key == key:
                operation.replace(_TRASH, keep_first=False)

    def write(self) -> list[Any]:
        """Send what the socket takes; return the keys that are done. Raises Broken."""
        done: list[Any] = []
        budget = _TURN_BYTES
        while self._out and budget > 0:
            operation = self._out[0]
            try:
                count = self.socket.sendmsg(operation.next())
            except BlockingIOError:
                break
            except OSError as exc:
                raise Broken(str(exc)) from exc
            budget -= count
            operation.moved(count)
            if not operation.left:
                done.append(self._out.popleft().key)
        return done

    def read(self) -> list[Any]:
        """Receive what is there and asked for; return the keys that are done. Raises Broken."""
        done: list[Any] = []
        budget = _TURN_BYTES
        while self._in and budget > 0:
            operation = self._in[0]
            try:
                count = self.socket.recvmsg_into(operation.next())[0]
            except BlockingIOError:
                break
            except OSError as exc:
                raise Broken(str(exc)) from exc
            if not count:
                raise Broken("closed by the peer")
            budget -= count
            operation.moved(count)
            if not operation.left:
                done.append(self._in.popleft().key)
        return done

    def close(self) -> list[Any]:
        """Close the socket; return the keys of what was outstanding."""
        self.socket.close()
        keys = [operation.key for operation in (*self._out, *self._in)]
        self._out.clear()
        self._in.clear()
        return keys
