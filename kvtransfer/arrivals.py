"""Sockets on their way to become a link: a link is two of them, for control and for data.

Owns accepted sockets until both halves of a link are there, and their limits in number and time.
A half says which link it belongs to by 16 random bytes that only the peer which opened both knows.
"""

import os
import socket
from dataclasses import dataclass, field

_MAGIC = b"TPL1"
_PAIR_BYTES = 16
_CONTROL, _DATA = b"C", b"D"
_PREAMBLE_BYTES = len(_MAGIC) + _PAIR_BYTES + 1
_MAX_ARRIVING = 256
_PATIENCE_S = 5.0


def preambles() -> tuple[bytes, bytes]:
    """Return what a connecting side sends first on a new link's control and data socket."""
    pair = _MAGIC + os.urandom(_PAIR_BYTES)
    return pair + _CONTROL, pair + _DATA


@dataclass(slots=True, eq=False)
class _Half:
    socket: socket.socket
    until: float
    received: bytes = b""


@dataclass(slots=True)
class Arrivals:
    """Accepted sockets that are not a link yet; `closed` collects those given up."""

    closed: list[socket.socket] = field(default_factory=list)
    _halves: dict[socket.socket, _Half] = field(default_factory=dict)
    _waiting: dict[bytes, _Half] = field(default_factory=dict)

    def add(self, sock: socket.socket, now: float) -> None:
        """Take an accepted socket; the oldest gives way where there are too many."""
        sock.setblocking(False)
        if len(self._halves) >= _MAX_ARRIVING:
            self._drop(next(iter(self._halves.values())))
        self._halves[sock] = _Half(sock, now + _PATIENCE_S)

    def waits(self, sock: socket.socket) -> bool:
        """Whether a half has said all and waits for the other: what comes next is the link's."""
        half = self._halves.get(sock)
        return half is not None and len(half.received) == _PREAMBLE_BYTES

    def readable(self, sock: socket.socket) -> tuple[socket.socket, socket.socket] | None:
        """Read a half's preamble; return (control, data) when the other half was there already."""
        half = self._halves.get(sock)
        if half is None:
            return None
        try:
            half.received += sock.recv(_PREAMBLE_BYTES - len(half.received)) or b"?"
        except BlockingIOError:
            return None
        except OSError:
            half.received = b"?"
        if not _MAGIC.startswith(half.received[: len(_MAGIC)]):
            self._drop(half)
            return None
        if len(half.received) < _PREAMBLE_BYTES:
            return None
        return self._pair(half)

    def _pair(self, half: _Half) -> tuple[socket.socket, socket.socket] | None:
        pair, role = half.received[:-1], half.received[-1:]
        other = self._waiting.get(pair)
        if role not in (_CONTROL, _DATA) or (other is not None and other.received[-1:] == role):
            self._drop(half)
            return None
        if other is None:
            self._waiting[pair] = half
            return None
        del self._waiting[pair], self._halves[half.socket], self._halves[other.socket]
        control, data = (half, other) if role == _CONTROL else (other, half)
        return control.socket, data.socket

    def expire(self, now: float) -> float | None:
        """Give up what has waited too long; return when to look again, None for never."""
        for half in list(self._halves.values()):
            if half.until > now:
                return half.until
            self._drop(half)
        return None

    def close(self) -> None:
        """Give all up."""
        for half in list(self._halves.values()):
            self._drop(half)

    def _drop(self, half: _Half) -> None:
        del self._halves[half.socket]
        if self._waiting.get(half.received[:-1]) is half:
            del self._waiting[half.received[:-1]]
        self.closed.append(half.socket)
