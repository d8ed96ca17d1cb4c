"""The bytes on the data path: slot headers, control messages and tags.

Owns formats and their strict decoding (a malformed message is a ProtocolViolation, never a
guess). Decides nothing about transfers.
"""

import struct
import zlib
from dataclasses import astuple, dataclass
from enum import IntEnum
from typing import Any, ClassVar

from kvtransfer.errors import LayoutMismatch, ProtocolViolation
from kvtransfer.layout import Span

PROTOCOL_VERSION = 1
COMPATIBILITY_BYTES = 32
NONCE_BYTES = 16
MAX_TOKEN_BYTES = 64
MAX_NAME_BYTES = 255
MAX_ADDRESS_BYTES = 8192
MAX_REASON_BYTES = 512
MAX_CONTROL_BYTES = 16384

# ---------------------------------------------------------------------------------- data messages

_HEADER = struct.Struct("<4sHHQQ16sHHIIHHHHIIII")
_MAGIC = b"TPKV"
HEADER_BYTES = 128
_CRC_AT = _HEADER.size - 4


@dataclass(frozen=True, slots=True)
class DataHeader:
    """What stands in front of the payload of each slot message."""

    epoch: int
    transfer_id: int
    nonce: bytes
    source_rank: int
    slot: int
    generation: int
    sequence: int
    layers: Span
    heads: Span
    tokens: Span
    payload_bytes: int


def seal(message: memoryview, header: DataHeader, *, checksum: bool) -> int:
    """Write `header` in front of the payload already in `message`; return the checksum.

    The crc32 covers the header and the payload; it is 0 where checksums are off.
    """
    h = header
    _HEADER.pack_into(
        message,
        0,
        _MAGIC,
        PROTOCOL_VERSION,
        1 if checksum else 0,
        h.epoch,
        h.transfer_id,
        h.nonce,
        h.source_rank,
        h.slot,
        h.generation,
        h.sequence,
        h.layers.begin,
        h.layers.end,
        h.heads.begin,
        h.heads.end,
        h.tokens.begin,
        h.tokens.end,
        h.payload_bytes,
        0,
    )
    crc = _crc(message, h.payload_bytes) if checksum else 0
    struct.pack_into("<I", message, _CRC_AT, crc)
    return crc


def unseal(message: memoryview) -> tuple[DataHeader, int, bool]:
    """Read the header: (header, crc32 as sent, whether a checksum was made).

    Raises ProtocolViolation for anything that `seal` cannot have written.
    """
    (
        magic,
        version,
        flags,
        epoch,
        transfer_id,
        nonce,
        source_rank,
        slot,
        generation,
        sequence,
        layer_begin,
        layer_end,
        head_begin,
        head_end,
        token_begin,
        token_end,
        payload_bytes,
        crc,
    ) = _HEADER.unpack_from(message)
    if magic != _MAGIC or version != PROTOCOL_VERSION or flags > 1:
        raise ProtocolViolation(
            f"no slot header: magic {magic!r}, version {version}, flags {flags}"
        )
    if payload_bytes > len(message) - HEADER_BYTES:
        raise ProtocolViolation(
            f"{payload_bytes} payload bytes in a slot of {len(message) - HEADER_BYTES}"
        )
    if layer_begin >= layer_end or head_begin >= head_end or token_begin >= token_end:
        raise ProtocolViolation("a slot header with an empty range")
    header = DataHeader(
        epoch=epoch,
        transfer_id=transfer_id,
        nonce=nonce,
        source_rank=source_rank,
        slot=slot,
        generation=generation,
        sequence=sequence,
        layers=Span(layer_begin, layer_end),
        heads=Span(head_begin, head_end),
        tokens=Span(token_begin, token_end),
        payload_bytes=payload_bytes,
    )
    return header, crc, flags == 1


def intact(message: memoryview, payload_bytes: int, crc: int) -> bool:
    """Whether header and payload are the bytes that the sender sealed with `crc`."""
    return _crc(message, payload_bytes) == crc


def _crc(message: memoryview, payload_bytes: int) -> int:
    head = zlib.crc32(message[:_CRC_AT])
    return zlib.crc32(message[HEADER_BYTES : HEADER_BYTES + payload_bytes], head)


def manifest_crc(checksums: list[int]) -> int:
    """Return the crc32 over the messages' own checksums, in sequence order."""
    return zlib.crc32(struct.pack(f"<{len(checksums)}I", *checksums))


# ------------------------------------------------------------------------------------------- tags

EPOCH_BITS, CONNECTION_BITS, SLOT_BITS, GENERATION_BITS, KIND_BITS = 8, 22, 6, 26, 2
MAX_CONNECTION = 1 << CONNECTION_BITS
MAX_GENERATION = 1 << GENERATION_BITS
_DATA_KIND = 1


def data_tag(epoch: int, connection: int, slot: int, generation: int) -> int:
    """Return the 64-bit tag of one use of one slot; no tag comes twice in an epoch.

    UCX matches tags per worker and not per endpoint, so the receiver's connection number is in
    every tag: one sender can never hit another's slot.
    """
    if not (connection < MAX_CONNECTION and generation < MAX_GENERATION):
        raise OverflowError("tags of this connection are used up")
    tag = epoch & ((1 << EPOCH_BITS) - 1)
    tag = tag << CONNECTION_BITS | connection
    tag = tag << SLOT_BITS | slot
    tag = tag << GENERATION_BITS | generation
    return tag << KIND_BITS | _DATA_KIND


# ------------------------------------------------------------------------------- control messages


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


@dataclass(frozen=True, slots=True)
class Hello:
    """Opens a connection; compared field by field before anything is granted."""

    instance: str
    epoch: int
    rank: int
    target_epoch: int
    target_rank: int
    token: bytes
    data_address: bytes


@dataclass(frozen=True, slots=True)
class Welcome:
    """The receiver's answer: this connection's number and what it may send at once."""

    connection: int
    epoch: int
    slots: int
    slot_bytes: int
    checksum: bool
    data_address: bytes


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
class Heartbeat:
    """Alive."""


@dataclass(frozen=True, slots=True)
class Bye:
    """The other side closes in order."""


Control = Welcome | Refused | Credit | Manifest | Ack | Fail | Abort | Heartbeat | Bye

_PREAMBLE = struct.Struct(f"<4sH{COMPATIBILITY_BYTES}s")
_HELLO_MAGIC = b"TPHI"
_HELLO = struct.Struct("<QIQIBBH")
_WELCOME = struct.Struct("<IQHIBH")
_PAIR = struct.Struct("<II")
_TRANSFER = struct.Struct("<Q16s")
_FAIL = struct.Struct("<Q16sBH")
_REFUSED = struct.Struct("<BH")


def encode_hello(hello: Hello, compatibility: bytes) -> bytes:
    """Return the first message of a connection."""
    name = hello.instance.encode()
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
                len(hello.data_address),
            ),
            name,
            hello.token,
            hello.data_address,
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
    epoch, rank, target_epoch, target_rank, name, token, address = reader.fields(_HELLO)
    hello = Hello(
        instance=reader.text(name),
        epoch=epoch,
        rank=rank,
        target_epoch=target_epoch,
        target_rank=target_rank,
        token=reader.raw(token),
        data_address=reader.raw(address),
    )
    reader.end()
    return hello


def encode(message: Control) -> bytes:
    """Return one control message's bytes, at most MAX_CONTROL_BYTES."""
    match message:
        case Welcome(connection, epoch, slots, slot_bytes, checksum, address):
            head = _WELCOME.pack(connection, epoch, slots, slot_bytes, checksum, len(address))
            return bytes((Kind.WELCOME,)) + head + address
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
        case Heartbeat():
            return bytes((Kind.HEARTBEAT,))
        case Bye():
            return bytes((Kind.BYE,))


def decode(message: bytes) -> Control:
    """Read one control message; raises ProtocolViolation for anything `encode` did not write."""
    reader = _Reader(message, 1)
    kind = message[0] if message else 0
    decoded: Control
    if kind == Kind.WELCOME:
        connection, epoch, slots, slot_bytes, checksum, address = reader.fields(_WELCOME)
        raw = reader.raw(address)
        decoded = Welcome(connection, epoch, slots, slot_bytes, bool(checksum), raw)
    elif kind == Kind.REFUSED:
        code, length = reader.fields(_REFUSED)
        decoded = Refused(code, reader.text(length))
    elif kind == Kind.CREDIT:
        if (len(message) - 1) % _PAIR.size:
            raise ProtocolViolation("a credit of half a slot")
        decoded = Credit(tuple(_PAIR.iter_unpack(reader.raw(len(message) - 1))))
    elif kind == Kind.MANIFEST:
        decoded = Manifest(*reader.fields(Manifest.format))
    elif kind == Kind.ACK:
        decoded = Ack(*reader.fields(_TRANSFER))
    elif kind == Kind.FAIL:
        transfer_id, nonce, code, length = reader.fields(_FAIL)
        decoded = Fail(transfer_id, nonce, code, reader.text(length))
    elif kind == Kind.ABORT:
        decoded = Abort(*reader.fields(_TRANSFER))
    elif kind == Kind.HEARTBEAT:
        decoded = Heartbeat()
    elif kind == Kind.BYE:
        decoded = Bye()
    else:
        raise ProtocolViolation(f"control message of unknown kind {kind}")
    reader.end()
    return decoded


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
