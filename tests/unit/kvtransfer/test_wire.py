"""Formats: what goes in comes out; anything altered is refused, never misread."""

import random
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer import header, slots, wire
from kvtransfer.errors import LayoutMismatch, ProtocolViolation
from kvtransfer.layout import Span
from kvtransfer.shared import Lease, ShareHandle

HASH = bytes(range(32))
HEADER = header.DataHeader(
    epoch=2**60 + 5,
    transfer_id=2**64 - 1,
    nonce=b"0123456789abcdef",
    source_rank=3,
    slot=5,
    generation=77,
    sequence=9,
    group=3,
    layers=Span(2, 4),
    heads=Span(0, 8),
    tokens=Span(128, 256),
    payload_bytes=1000,
)
HELLO = wire.Hello(
    instance="prefill-é",
    epoch=1,
    rank=2,
    target_epoch=3,
    target_rank=4,
    token=b"secret",
    lanes=frozenset(wire.LaneKind),
    boot_id=bytes(range(16)),
    data_address=b"address" * 30,
    share=ShareHandle(
        boot_id=bytes(range(16)), pid=7, descriptor=8, size=2**40, name="twinpool-kv-x"
    ),
    offsets=((65536, 100), (2**33, 5)),
    lent=(bytes(range(80)), b"l" * 80),
)
MESSAGES: list[wire.Control] = [
    wire.Welcome(3, 4, wire.LaneKind.STREAM, 6, 512 << 10, True, b"address", "why"),
    wire.Table(1, b"n" * 16, Lease(5, 2**60), 2, 0, (0, 7, 2**32 - 1)),
    wire.Piece(bytes(range(128))),
    wire.Taken(4),
    wire.Ping(1, 2),
    wire.Pong(1, 2),
    wire.Refused(5, "because"),
    wire.Credit(((0, 1), (5, 2**25))),
    wire.Manifest(1, 2, b"n" * 16, 3, 4, 5, 6),
    wire.Ack(1, b"n" * 16),
    wire.Fail(1, b"n" * 16, 6, "why"),
    wire.Abort(1, b"n" * 16),
    wire.Heartbeat(),
    wire.Bye(),
]


PAYLOAD = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8)


def parts(message: bytes, cuts: tuple[int, ...] = ()) -> list[memoryview]:
    ends = [*cuts, len(message)]
    return [memoryview(message)[a:b] for a, b in zip([0, *cuts], ends, strict=True)]


def sealed() -> tuple[bytes, int]:
    head, crc = header.seal(HEADER, (memoryview(PAYLOAD.data),), checksum=True)
    assert len(head) == header.HEADER_BYTES
    return head, crc


def test_a_sealed_header_reads_back() -> None:
    head, crc = sealed()
    assert header.unseal(head) == (HEADER, crc, True)
    assert header.intact(head, parts(PAYLOAD.tobytes()), crc)


def test_the_checksum_does_not_depend_on_how_the_payload_is_cut() -> None:
    head, crc = sealed()
    assert header.intact(head, parts(PAYLOAD.tobytes(), (1, 64, 999)), crc)


def test_every_altered_byte_is_noticed() -> None:
    head, _ = sealed()
    rng = random.Random(1)
    for place in (*range(76), *(header.HEADER_BYTES + at for at in rng.sample(range(1000), 300))):
        changed = bytearray(head + PAYLOAD.tobytes())
        changed[place] ^= 1 << rng.randrange(8)
        wrong, payload = bytes(changed[: header.HEADER_BYTES]), changed[header.HEADER_BYTES :]
        try:
            _, crc, checksummed = header.unseal(wrong)
        except ProtocolViolation:
            continue
        assert not (checksummed and header.intact(wrong, parts(bytes(payload)), crc)), place


@given(st.binary(min_size=128, max_size=400))
@settings(max_examples=300)
def test_random_bytes_are_no_header(garbage: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        header.unseal(garbage)


@pytest.mark.parametrize("message", MESSAGES)
def test_control_messages_read_back(message: wire.Control) -> None:
    encoded = wire.encode(message)
    assert len(encoded) <= wire.MAX_CONTROL_BYTES
    assert wire.decode(encoded) == message


@pytest.mark.parametrize("message", MESSAGES)
def test_cut_or_lengthened_control_messages_are_refused(message: wire.Control) -> None:
    encoded = wire.encode(message)
    for wrong in [encoded[:cut] for cut in range(len(encoded))] + [encoded + b"x"]:
        if isinstance(message, wire.Credit) and wrong and (len(wrong) - 1) % 8 == 0:
            continue
        with pytest.raises(ProtocolViolation):
            wire.decode(wrong)


@given(st.binary(max_size=200))
@settings(max_examples=500)
def test_decoding_garbage_raises_nothing_else(garbage: bytes) -> None:
    with suppress(ProtocolViolation):
        wire.decode(garbage)
    with suppress(ProtocolViolation, LayoutMismatch):
        wire.decode_hello(garbage, HASH)


def test_hello_reads_back() -> None:
    assert wire.decode_hello(wire.encode_hello(HELLO, HASH), HASH) == HELLO


def test_another_compatibility_hash_is_refused_before_the_rest_is_read() -> None:
    encoded = wire.encode_hello(HELLO, HASH[::-1])
    for end in (len(encoded), 38):
        with pytest.raises(LayoutMismatch, match="compatibility hash"):
            wire.decode_hello(encoded[:end], HASH)


def test_cut_hellos_are_refused() -> None:
    encoded = wire.encode_hello(HELLO, HASH)
    for cut in range(len(encoded)):
        with pytest.raises(ProtocolViolation):
            wire.decode_hello(encoded[:cut], HASH)


def test_long_reasons_are_clipped_at_a_whole_character() -> None:
    decoded = wire.decode(wire.encode(wire.Refused(1, "é" * 1000)))
    assert isinstance(decoded, wire.Refused)
    assert decoded.reason == "é" * (wire.MAX_REASON_BYTES // 2)


@given(st.integers(0, 2**22 - 1), st.integers(0, 63), st.integers(0, 2**26 - 1))
def test_tags_differ_when_anything_differs(connection: int, slot: int, generation: int) -> None:
    tag = slots.data_tag(7, connection, slot, generation)
    assert 0 <= tag < 2**64
    others = {
        slots.data_tag(8, connection, slot, generation),
        slots.data_tag(7, connection ^ 1, slot, generation),
        slots.data_tag(7, connection, slot ^ 1, generation),
        slots.data_tag(7, connection, slot, generation ^ 1),
    }
    assert tag not in others
    assert len(others) == 4


def test_tags_do_not_wrap_around() -> None:
    with pytest.raises(OverflowError):
        slots.data_tag(1, 0, 0, slots.MAX_GENERATION)


def test_the_manifest_depends_on_the_order_of_checksums() -> None:
    assert header.manifest_crc([1, 2]) != header.manifest_crc([2, 1])
    assert header.manifest_crc([]) == 0


def test_a_header_for_another_transfer_has_another_checksum() -> None:
    _, crc = sealed()
    payload = (memoryview(PAYLOAD.data),)
    _, other = header.seal(replace(HEADER, transfer_id=1), payload, checksum=True)
    assert other != crc
