"""Small framed messages over a non-blocking TCP socket.

Owns one socket and its buffers, both bounded. Knows nothing of what the messages mean.
"""

import contextlib
import socket
import struct
from collections import deque

from kvtransfer.wire import MAX_CONTROL_BYTES

_LENGTH = struct.Struct("<I")
# A peer that stops reading must not make this side collect messages without end.
_MAX_UNSENT_BYTES = 1 << 20
_READ_BYTES = 1 << 16


class Broken(Exception):
    """The connection is over; the message says why."""


class ControlSocket:
    """One end of a control lane."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = sock
        self._received = bytearray()
        self._unsent: deque[bytes] = deque()
        self._unsent_bytes = 0

    @property
    def backlogged(self) -> bool:
        """Whether messages wait for the socket to become writable."""
        return bool(self._unsent)

    def send(self, message: bytes) -> None:
        """Send or queue one message; raises Broken."""
        if len(message) > MAX_CONTROL_BYTES:
            raise ValueError(f"control message of {len(message)} bytes")
        frame = _LENGTH.pack(len(message)) + message
        if not self._unsent:
            frame = frame[self._write(frame) :]
        if frame:
            self._unsent.append(frame)
            self._unsent_bytes += len(frame)
            if self._unsent_bytes > _MAX_UNSENT_BYTES:
                raise Broken("the peer does not read its control messages")

    def flush(self) -> None:
        """Send what is queued as far as the socket takes it; raises Broken."""
        while self._unsent:
            frame = self._unsent.popleft()
            sent = self._write(frame)
            self._unsent_bytes -= sent
            if sent < len(frame):
                self._unsent.appendleft(frame[sent:])
                return

    def _write(self, frame: bytes) -> int:
        try:
            return self.socket.send(frame)
        except BlockingIOError:
            return 0
        except OSError as exc:
            raise Broken(str(exc)) from exc

    def receive(self) -> tuple[list[bytes], str | None]:
        """Return the messages that are complete, and why the connection ended if it did."""
        ended = None
        try:
            chunk = self.socket.recv(_READ_BYTES)
            if not chunk:
                ended = "closed by the peer"
            self._received += chunk
        except BlockingIOError:
            pass
        except OSError as exc:
            ended = str(exc)
        messages: list[bytes] = []
        while len(self._received) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._received)
            if length > MAX_CONTROL_BYTES:
                return messages, f"control message of {length} bytes announced"
            end = _LENGTH.size + length
            if len(self._received) < end:
                break
            messages.append(bytes(self._received[_LENGTH.size : end]))
            del self._received[:end]
        return messages, ended

    def close(self) -> None:
        """Close the socket; what is queued is offered to the kernel once more."""
        with contextlib.suppress(Broken):
            self.flush()
        self.socket.close()
