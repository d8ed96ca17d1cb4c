"""The bytes on the control lane.

Owns the messages, their format and its strict decoding (a malformed message is a
ProtocolViolation, never a guess). Decides nothing about transfers.
"""

import struct
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from enum import IntEnum
from typing import Any, ClassVar

from kvtransfer.errors import LayoutMismatch, ProtocolViolation
from kvtransfer.header import HEADER_BYTES, PROTOCOL_VERSION
from kvtransfer.shared import BOOT_ID_BYTES, MAX_LEASES, Lease, ShareHandle

COMPATIBILITY_BYTES = 32
MAX_TOKEN_BYTES = 64
MAX_NAME_BYTES = 255
MAX_ADDRESS_BYTES = 8192
MAX_REASON_BYTES = 512
MAX_CONTROL_BYTES = 16384


class LaneKind(IntEnum):
    """How a connection's payload travels."""

    MAPPED = 1  # the receiver reads it out of the sender's cache, which it has mapped
    STREAM = 2  # over the link's byte stream, header first
    TAGGED = 3  # as tagged messages into granted slots (UCX)
    DEVICE = 4  # the receiver's GPU reads it out of the sender's, which lends its memory


class Kind(IntEnum):
    """First byte of every control message but the hello."""

    WELCOME = 1
    REFUSED = 2
    CREDIT = 3
    MANIFEST = 4
    ACK = 5
    FAIL = 6
    ABORT = 7
    HEARTBEAT = 8
    BYE = 9
    TABLE = 10
    PIECE = 11
    TAKEN = 12
    PING = 13
    PONG = 14


@dataclass(frozen=True, slots=True)
class Hello:
    """Opens a connection; compared field by field before anything is granted.

    `lanes` are those that the sender can use: with TAGGED comes its `data_address`, with MAPPED
    its `share`, in which `offsets` gives each cache group's (offset in bytes, number of blocks).
    With DEVICE what is `lent` opens each group's memory, and the share has only the leases.
    """

    instance: str
    epoch: int
    rank: int
    target_epoch: int
    target_rank: int
    token: bytes = field(repr=False)
    lanes: frozenset[LaneKind]
    boot_id: bytes
    data_address: bytes = b""
    share: ShareHandle | None = None
    offsets: tuple[tuple[int, int], ...] = ()
    lent: tuple[bytes, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Welcome:
    """The receiver's answer: this connection's number, its lane, and how much may be under way.

    `window` counts slots on a tagged lane, pieces not yet taken on a mapped one. `note` says why
    the lane is slower than one would expect, for whoever looks after the pair.
    """

    connection: int
    epoch: int
    lane: LaneKind
    window: int
    slot_bytes: int
    checksum: bool
    data_address: bytes = b""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Refused:
    """The receiver's no, by code (kvtransfer.errors) and in words."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Credit:
    """Slots, each with its generation, into which one message may be sent."""

    slots: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What one source rank says it sent under a grant."""

    format: ClassVar[struct.Struct] = struct.Struct("<QQ16sIIQI")
    transfer_id: int
    epoch: int
    nonce: bytes
    source_rank: int
    pieces: int
    bytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Ack:
    """The receiver has every byte that the manifest names."""

    transfer_id: int
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Fail:
    """The receiver gave the transfer up: the sender should stop."""

    transfer_id: int
    nonce: bytes
    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Abort:
    """The sender gave the transfer up and sends nothing more of it."""

    transfer_id: int
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Table:
    """Where a transfer's blocks lie in the sender's mapped memory: ids from the `first`-th on."""

    transfer_id: int
    nonce: bytes
    lease: Lease
    group: int
    first: int
    block_ids: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece is ready to be read from the sender's mapped memory; `head` is its sealed header."""

    head: bytes


@dataclass(frozen=True, slots=True)
class Taken:
    """The receiver is done with so many more pieces, whatever it thought of them."""

    count: int


@dataclass(frozen=True, slots=True)
class Ping:
    """Asks for a Pong: with bytes, after so many of the lane's own have been taken as a probe."""

    number: int
    probe_bytes: int


@dataclass(frozen=True, slots=True)
class Pong:
    """The answer; what the receiver itself measured in microseconds, or 0."""

    number: int
    micros: int


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Alive."""


@dataclass(frozen=True, slots=True)
class Bye:
    """The other side closes in order."""


Control = (
    Welcome
    | Refused
    | Credit
    | Manifest
    | Ack
    | Fail
    | Abort
    | Table
    | Piece
    | Taken
    | Ping
    | Pong
    | Heartbeat
    | Bye
)

_PREAMBLE = struct.Struct(f"<4sH{COMPATIBILITY_BYTES}s")
_HELLO_MAGIC = b"TPHI"
_HELLO = struct.Struct(f"<QIQIBB{BOOT_ID_BYTES}sBHBBBB")
_SHARE = struct.Struct("<IIQ")
_OFFSET = struct.Struct("<QI")
_WELCOME = struct.Struct("<IQBHIBHH")
_PAIR = struct.Struct("<II")
_TRANSFER = struct.Struct("<Q16s")
_TABLE = struct.Struct("<Q16sIQBII")
_COUNT = struct.Struct("<I")
_PING = struct.Struct("<II")
TABLE_IDS = (MAX_CONTROL_BYTES - 1 - _TABLE.size) // 4
_FAIL = struct.Struct("<Q16sBH")
_REFUSED = struct.Struct("<BH")


def encode_hello(hello: Hello, compatibility: bytes) -> bytes:
    """Return the first message of a connection."""
    name, share = hello.instance.encode(), b""
    if hello.share is not None:
        at = hello.share
        share = _SHARE.pack(at.pid, at.descriptor, at.size) + at.name.encode()
    return b"".join(
        (
            _PREAMBLE.pack(_HELLO_MAGIC, PROTOCOL_VERSION, compatibility),
            _HELLO.pack(
                hello.epoch,
                hello.rank,
                hello.target_epoch,
                hello.target_rank,
                len(name),
                len(hello.token),
                hello.boot_id,
                sum(1 << lane for lane in hello.lanes),
                len(hello.data_address),
                len(share),
                len(hello.offsets),
                len(hello.lent),
                len(hello.lent[0]) if hello.lent else 0,
            ),
            name,
            hello.token,
            hello.data_address,
            share,
            *(_OFFSET.pack(*offset) for offset in hello.offsets),
            *hello.lent,
        )
    )


def decode_hello(message: bytes, compatibility: bytes) -> Hello:
    """Read a hello; the compatibility hash is compared before any other field is looked at.

    Raises LayoutMismatch for another protocol, model or KV shape, ProtocolViolation for garbage.
    """
    if len(message) < _PREAMBLE.size:
        raise ProtocolViolation(f"a hello of {len(message)} bytes is too short")
    magic, version, theirs = _PREAMBLE.unpack_from(message)
    if magic != _HELLO_MAGIC:
        raise ProtocolViolation("the first message of a connection is no hello")
    if version != PROTOCOL_VERSION:
        raise LayoutMismatch(f"KV protocol version {version} there, {PROTOCOL_VERSION} here")
    if theirs != compatibility:
        raise LayoutMismatch(
            f"compatibility hash {theirs.hex()[:12]} there, {compatibility.hex()[:12]} here: "
            "model, KV shape or element type differ between the pools"
        )
    reader = _Reader(message, _PREAMBLE.size)
    fields = reader.fields(_HELLO)
    epoch, rank, target_epoch, target_rank, name, token, boot_id, lanes, address = fields[:9]
    share, offsets, lent, lent_bytes = fields[9:]
    hello = Hello(
        instance=reader.text(name),
        epoch=epoch,
        rank=rank,
        target_epoch=target_epoch,
        target_rank=target_rank,
        token=reader.raw(token),
        lanes=frozenset(lane for lane in LaneKind if lanes & 1 << lane),
        boot_id=boot_id,
        data_address=reader.raw(address),
        share=_share(reader, boot_id, share) if share else None,
        offsets=tuple(_OFFSET.iter_unpack(reader.raw(offsets * _OFFSET.size))),
        lent=tuple(reader.raw(lent_bytes) for _ in range(lent)),
    )
    reader.end()
    return hello


def _share(reader: "_Reader", boot_id: bytes, length: int) -> ShareHandle:
    pid, descriptor, size = reader.fields(_SHARE)
    if length < _SHARE.size:
        raise ProtocolViolation("a hello with half a share")
    name = reader.text(length - _SHARE.size)
    return ShareHandle(boot_id=boot_id, pid=pid, descriptor=descriptor, size=size, name=name)


def encode(message: Control) -> bytes:
    """Return one control message's bytes, at most MAX_CONTROL_BYTES."""
    match message:
        case Welcome(connection, epoch, lane, window, slot_bytes, checksum, address, note):
            text = _clipped(note)
            sizes = (len(address), len(text))
            head = _WELCOME.pack(connection, epoch, lane, window, slot_bytes, checksum, *sizes)
            return b"".join((bytes((Kind.WELCOME,)), head, address, text))
        case Refused(code, reason):
            text = _clipped(reason)
            return bytes((Kind.REFUSED,)) + _REFUSED.pack(code, len(text)) + text
        case Credit(slots):
            return bytes((Kind.CREDIT,)) + b"".join(_PAIR.pack(*pair) for pair in slots)
        case Manifest():
            return bytes((Kind.MANIFEST,)) + Manifest.format.pack(*astuple(message))
        case Ack(transfer_id, nonce):
            return bytes((Kind.ACK,)) + _TRANSFER.pack(transfer_id, nonce)
        case Fail(transfer_id, nonce, code, reason):
            text = _clipped(reason)
            return bytes((Kind.FAIL,)) + _FAIL.pack(transfer_id, nonce, code, len(text)) + text
        case Abort(transfer_id, nonce):
            return bytes((Kind.ABORT,)) + _TRANSFER.pack(transfer_id, nonce)
        case Table(transfer_id, nonce, lease, group, first, ids):
            told = (transfer_id, nonce, lease.index, lease.value, group, first, len(ids))
            rest = struct.pack(f"<{len(ids)}I", *ids)
            return bytes((Kind.TABLE,)) + _TABLE.pack(*told) + rest
        case Piece(head):
            return bytes((Kind.PIECE,)) + head
        case Taken(count):
            return bytes((Kind.TAKEN,)) + _COUNT.pack(count)
        case Ping(number, probe_bytes):
            return bytes((Kind.PING,)) + _PING.pack(number, probe_bytes)
        case Pong(number, micros):
            return bytes((Kind.PONG,)) + _PING.pack(number, micros)
        case Heartbeat():
            return bytes((Kind.HEARTBEAT,))
        case Bye():
            return bytes((Kind.BYE,))


def decode(message: bytes) -> Control:
    """Read one control message; raises ProtocolViolation for anything `encode` did not write."""
    reader = _Reader(message, 1)
    read = _READ.get(message[0] if message else 0)
    if read is None:
        raise ProtocolViolation(f"control message of unknown kind {message[:1]!r}")
    decoded = read(reader)
    reader.end()
    return decoded


def _welcome(reader: "_Reader") -> Welcome:
    fields = reader.fields(_WELCOME)
    connection, epoch, lane, window, slot_bytes, checksum, address, note = fields
    if lane not in set(LaneKind):
        raise ProtocolViolation(f"a welcome to the unknown lane {lane}")
    return Welcome(
        connection=connection,
        epoch=epoch,
        lane=LaneKind(lane),
        window=window,
        slot_bytes=slot_bytes,
        checksum=bool(checksum),
        data_address=reader.raw(address),
        note=reader.text(note),
    )


def _refused(reader: "_Reader") -> Refused:
    code, length = reader.fields(_REFUSED)
    return Refused(code, reader.text(length))


def _credit(reader: "_Reader") -> Credit:
    if reader.left % _PAIR.size:
        raise ProtocolViolation("a credit of half a slot")
    return Credit(tuple(_PAIR.iter_unpack(reader.raw(reader.left))))


def _fail(reader: "_Reader") -> Fail:
    transfer_id, nonce, code, length = reader.fields(_FAIL)
    return Fail(transfer_id, nonce, code, reader.text(length))


def _table(reader: "_Reader") -> Table:
    transfer_id, nonce, index, value, group, first, count = reader.fields(_TABLE)
    if reader.left != 4 * count:
        raise ProtocolViolation(f"a table of {count} blocks in {reader.left} bytes")
    ids = struct.unpack(f"<{count}I", reader.raw(4 * count))
    if index >= MAX_LEASES:
        raise ProtocolViolation(f"lease word {index} does not exist")
    return Table(transfer_id, nonce, Lease(index, value), group, first, ids)


def _clipped(text: str) -> bytes:
    raw = text.encode()
    return raw[:MAX_REASON_BYTES].decode(errors="ignore").encode()


class _Reader:
    """Takes fields off a message and refuses to read past its end or to leave a rest."""

    def __init__(self, message: bytes, at: int) -> None:
        self._message = message
        self._at = at

    def fields(self, layout: struct.Struct) -> tuple[Any, ...]:
        return layout.unpack(self.raw(layout.size))

    @property
    def left(self) -> int:
        return len(self._message) - self._at

    def raw(self, length: int) -> bytes:
        end = self._at + length
        if end > len(self._message):
            raise ProtocolViolation(
                f"control message ends at {len(self._message)}, not before {end}"
            )
        part = self._message[self._at : end]
        self._at = end
        return part

    def text(self, length: int) -> str:
        try:
            return self.raw(length).decode()
        except UnicodeDecodeError as exc:
            raise ProtocolViolation("control message with text that is no UTF-8") from exc

    def end(self) -> None:
        if self._at != len(self._message):
            raise ProtocolViolation(
                f"control message with {len(self._message) - self._at} bytes more"
            )


_READ: dict[int, Callable[[_Reader], Control]] = {
    Kind.WELCOME: _welcome,
    Kind.REFUSED: _refused,
    Kind.CREDIT: _credit,
    Kind.MANIFEST: lambda reader: Manifest(*reader.fields(Manifest.format)),
    Kind.ACK: lambda reader: Ack(*reader.fields(_TRANSFER)),
    Kind.FAIL: _fail,
    Kind.ABORT: lambda reader: Abort(*reader.fields(_TRANSFER)),
    Kind.HEARTBEAT: lambda _: Heartbeat(),
    Kind.BYE: lambda _: Bye(),
    Kind.TABLE: _table,
    Kind.PIECE: lambda reader: Piece(reader.raw(HEADER_BYTES)),
    Kind.TAKEN: lambda reader: Taken(*reader.fields(_COUNT)),
    Kind.PING: lambda reader: Ping(*reader.fields(_PING)),
    Kind.PONG: lambda reader: Pong(*reader.fields(_PING)),
}
