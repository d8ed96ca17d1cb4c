"""Calls of one gRPC method over HTTP/2, with a small part of what a general client costs.

A client of grpc.aio needs as much time for a token as the router that is to be measured. Owns one
connection and its frames; reads no header, so whether a call went well shows in its messages.
"""

import asyncio
import struct
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 0x1, 0x1, 0x4
_INITIAL_WINDOW_SIZE = 4
_LARGEST_WINDOW = (1 << 31) - 1
_DEFAULT_WINDOW = (1 << 16) - 1
# What has been read is given back to the sender in pieces of this size.
_REFILL = 1 << 24
_NO_CANCEL = 8


class Answer(Protocol):
    """Who gets what comes of one call."""

    def message(self, data: bytes, now: float) -> None:
        """Take one message, which was here at `now`."""
        ...

    def ended(self) -> None:
        """Nothing more comes."""
        ...


class Connection(asyncio.Protocol):
    """One connection, and the calls that are open on it."""

    def __init__(self, address: str, method: str, clock: Callable[[], float]) -> None:
        self._headers = _header_block(address, method)
        self._clock = clock
        self._answers: dict[int, Answer] = {}
        self._parts: dict[int, bytes] = {}
        self._rest = b""
        self._next_stream = 1
        self._window = _DEFAULT_WINDOW
        self._held: deque[bytes] = deque()
        self._read = 0
        self._is_closed = False
        self._transport: Any = None

    @classmethod
    async def open(cls, address: str, method: str, clock: Callable[[], float]) -> "Connection":
        """Connect to host:port; `method` is "/package.Service/Method", `clock` reads seconds."""
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: cls(address, method, clock), host, int(port)
        )
        return connection

    def call(self, request: bytes, answer: Answer) -> int:
        """Send one request, at most 16 KiB of it; `answer` gets what comes. Returns the stream."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        self._answers[stream] = answer
        body = b"\0" + len(request).to_bytes(4, "big") + request
        self._transport.write(_frame(_HEADERS, _END_HEADERS, stream, self._headers))
        self._held.append(_frame(_DATA, _END_STREAM, stream, body))
        self._send_held()
        return stream

    def cancel(self, stream: int) -> None:
        """Drop a call; its answer hears nothing more."""
        if self._answers.pop(stream, None) is not None:
            self._parts.pop(stream, None)
            self._transport.write(_frame(_RST_STREAM, 0, stream, _NO_CANCEL.to_bytes(4, "big")))

    def close(self) -> None:
        """Drop the connection and all calls; no answer hears of it."""
        self._is_closed = True
        self._answers.clear()
        self._transport.close()

    # ---- what asyncio calls

    def connection_made(self, transport: Any) -> None:
        """Say hello, and leave the sender all the room there can be."""
        self._transport = transport
        settings = struct.pack(">HI", _INITIAL_WINDOW_SIZE, _LARGEST_WINDOW)
        room = (_LARGEST_WINDOW - _DEFAULT_WINDOW).to_bytes(4, "big")
        transport.write(
            _PREFACE + _frame(_SETTINGS, 0, 0, settings) + _frame(_WINDOW_UPDATE, 0, 0, room)
        )

    def data_received(self, data: bytes) -> None:
        """Take frames as they come."""
        now = self._clock()
        data = self._rest + data if self._rest else data
        at, end = 0, len(data)
        while end - at >= 9:
            after = at + 9 + (data[at] << 16 | data[at + 1] << 8 | data[at + 2])
            if after > end:
                break
            stream = int.from_bytes(data[at + 5 : at + 9], "big")
            self._take(data[at + 3], data[at + 4], stream, data[at + 9 : after], now)
            at = after
        self._rest = data[at:]

    def connection_lost(self, exc: Exception | None) -> None:
        """End what is open."""
        answers, self._answers = self._answers, {}
        for answer in answers.values():
            answer.ended()

    # ---- frames

    def _take(self, kind: int, flags: int, stream: int, payload: bytes, now: float) -> None:
        if kind == _DATA:
            self._take_data(stream, payload, now)
        elif kind == _SETTINGS and not flags & _ACK:
            self._transport.write(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self._transport.write(_frame(_PING, _ACK, 0, payload))
        elif kind == _WINDOW_UPDATE and stream == 0:
            self._window += int.from_bytes(payload, "big")
            self._send_held()
        elif kind == _GOAWAY:
            self._transport.close()
        if (kind in (_DATA, _HEADERS) and flags & _END_STREAM) or kind == _RST_STREAM:
            self._parts.pop(stream, None)
            answer = self._answers.pop(stream, None)
            if answer is not None:
                answer.ended()

    def _take_data(self, stream: int, payload: bytes, now: float) -> None:
        self._read += len(payload)
        if self._read >= _REFILL:
            self._transport.write(_frame(_WINDOW_UPDATE, 0, 0, self._read.to_bytes(4, "big")))
            self._read = 0
        answer = self._answers.get(stream)
        if answer is None:
            return
        data = self._parts.pop(stream, b"") + payload
        at = 0
        while len(data) - at >= 5:
            after = at + 5 + int.from_bytes(data[at + 1 : at + 5], "big")
            if after > len(data):
                break
            answer.message(data[at + 5 : after], now)
            at = after
        if at < len(data):
            self._parts[stream] = data[at:]

    def _send_held(self) -> None:
        # A frame takes of the window what follows its head.
        while self._held and len(self._held[0]) - 9 <= self._window and not self._is_closed:
            frame = self._held.popleft()
            self._window -= len(frame) - 9
            self._transport.write(frame)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _header_block(address: str, method: str) -> bytes:
    """Return the headers of a call as literals that nobody has to remember (RFC 7541, 6.2.2)."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": method,
        ":authority": address,
        "te": "trailers",
        "content-type": "application/grpc",
    }
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in fields.items())


def _text(text: str) -> bytes:
    """Return a string of at most 126 bytes with its length before it."""
    encoded = text.encode()
    if len(encoded) > 126:
        raise ValueError(f"a header of {len(encoded)} bytes: at most 126 are written here")
    return bytes([len(encoded)]) + encoded
