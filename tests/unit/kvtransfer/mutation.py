"""Changes to messages that no correct peer makes.

Pure: randomness is handed in, bytes and values come out.
"""

import random
import struct
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

from kvtransfer import Span, wire
from kvtransfer.header import HEADER_BYTES, DataHeader, seal, unseal

_TRIES = 20


def changed_bytes(rng: random.Random, message: bytes) -> bytes:
    """Flip some bits of a message, cut it, lengthen it, repeat a part of it, or make it anew."""
    return rng.choice((_flipped, _flipped, _cut, _lengthened, _overwritten, _anew))(rng, message)


def _flipped(rng: random.Random, message: bytes) -> bytes:
    changed = bytearray(message or b"\0")
    # Headers decide more than payloads do.
    most = rng.choice((len(changed), min(len(changed), HEADER_BYTES)))
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        changed[rng.randrange(most)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(rng: random.Random, message: bytes) -> bytes:
    return message[: rng.randrange(len(message))] if message else b""


def _lengthened(rng: random.Random, message: bytes) -> bytes:
    return message + rng.randbytes(rng.choice((1, 4, 100, 4000)))


def _overwritten(rng: random.Random, message: bytes) -> bytes:
    """Put one part of a message in the place of another."""
    if not message:
        return b"\xff"
    size = rng.randrange(1, min(len(message), 64) + 1)
    source, target = (rng.randrange(len(message) - size + 1) for _ in range(2))
    return message[:target] + message[source : source + size] + message[target + size :]


def _anew(rng: random.Random, message: bytes) -> bytes:
    kind = rng.choice((*wire.Kind, 0, 255))
    return bytes((kind,)) + rng.randbytes(rng.randrange(0, 2 * len(message) + 2))


def changed_value(rng: random.Random, value: Any) -> Any:
    """Return another value of the same type, most often one at a limit."""
    match value:
        case bool():
            return not value
        case int():
            near = (value - 1, value + 1, 0, 1, 2**16, 2**26, 2**32 - 1, 2**63, 2**64 - 1)
            return rng.choice((*near, rng.getrandbits(rng.choice((8, 16, 32, 64)))))
        case bytes():
            return changed_bytes(rng, value) if rng.random() < 0.3 else rng.randbytes(len(value))
        case str():
            return rng.choice(("", "x" * 300, value[:-1], value + "\0", "../" + value))
        case Span():
            ends = [changed_value(rng, value.begin), changed_value(rng, value.end), value.end]
            return rng.choice((Span(*sorted(rng.sample(ends, 2))), Span(value.end, value.end + 1)))
        case tuple():
            return _changed_tuple(rng, value)
        case frozenset():
            return frozenset(rng.sample(list(wire.LaneKind), rng.randrange(4)))
        case None:
            return None
        case _:
            assert is_dataclass(value), value
            return changed_field(rng, value)


def _changed_tuple(rng: random.Random, value: tuple[Any, ...]) -> tuple[Any, ...]:
    if not value or rng.random() < 0.2:
        return (*value, *value[:1], *value)
    at = rng.randrange(len(value))
    if rng.random() < 0.3:
        return (*value[:at], *value[at + 1 :])
    return (*value[:at], changed_value(rng, value[at]), *value[at + 1 :])


def changed_field(rng: random.Random, message: Any) -> Any:
    """Return a message of which one field has another value."""
    of = rng.choice(fields(message)) if fields(message) else None
    if of is None:
        return message
    return replace(message, **{of.name: changed_value(rng, getattr(message, of.name))})


def encodable(
    rng: random.Random, message: Any, change: Callable[..., Any], encode: Callable[..., bytes]
) -> bytes:
    """Change a message until what comes out can be encoded; else change its bytes."""
    for _ in range(_TRIES):
        try:
            return encode(change(rng, message))
        except (struct.error, ValueError, OverflowError, AttributeError):
            continue
    return changed_bytes(rng, encode(message))


def changed_head(rng: random.Random, head: bytes, parts: tuple[memoryview, ...]) -> bytes:
    """Return a header of which a field has another value, most often sealed as if it were right."""
    header, crc, checksummed = unseal(head)
    keep_seal = rng.random() < 0.2

    def sealed(other: DataHeader) -> bytes:
        made, _ = seal(other, parts, checksum=checksummed ^ (rng.random() < 0.05))
        if not keep_seal:
            return made
        return made[:72] + struct.pack("<I", crc) + made[76:]

    return encodable(rng, header, changed_field, sealed)
