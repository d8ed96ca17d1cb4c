"""Slot states, slot memory and settings."""

from collections.abc import Mapping

import pytest

from kvtransfer import Identity, PeerAddress, Span, TransferSettings, uniform_cache
from kvtransfer.errors import ChecksumMismatch, TransferError, from_code
from kvtransfer.header import HEADER_BYTES
from kvtransfer.layout import KVShape
from kvtransfer.slots import MAX_GENERATION, ReceiveSlots, SendSlots, SlotState


def test_a_slot_goes_round_and_each_use_has_its_generation() -> None:
    slots = ReceiveSlots(1, 4096)
    slot = next(iter(slots))
    for generation in (1, 2):
        slot.buffer[:] = 9
        assert slots.grant(slot) == generation
        assert not slot.buffer[:HEADER_BYTES].any()
        for state in (SlotState.FILLING, SlotState.VERIFIED, SlotState.FREE):
            slot.become(state)


def test_an_outstanding_slot_is_quarantined_until_it_is_let_go() -> None:
    slots = ReceiveSlots(3, 4096)
    first, second, _ = slots
    slots.grant(first)
    slots.grant(second)
    assert slots.quarantine()
    assert not slots.quiet
    with pytest.raises(AssertionError):
        slots.grant(first)
    for slot in (first, second):
        slot.become(SlotState.FREE)
    assert slots.quiet
    assert slots.counts() == {SlotState.FREE: 3}


def test_generations_never_start_over() -> None:
    slots = ReceiveSlots(1, 4096)
    slot = next(iter(slots))
    slot.generation = MAX_GENERATION - 1
    with pytest.raises(OverflowError):
        slots.grant(slot)


def test_a_send_buffer_is_lent_to_one_send_at_a_time() -> None:
    slots = SendSlots(2, 4096)
    one, two = slots.take(), slots.take()
    assert one is not None
    assert two is not None
    assert slots.take() is None
    slots.give_back(one)
    assert slots.take() is one


@pytest.mark.parametrize(
    "wrong",
    [
        {"slot_bytes": 1},
        {"slots_per_connection": 65},
        {"port": -1},
        {"hello_s": 0.0},
        {"heartbeat_misses": 0},
    ],
)
def test_senseless_settings_are_refused(wrong: Mapping[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TransferSettings(**wrong)  # type: ignore[arg-type]


def test_secrets_stay_out_of_what_is_printed() -> None:
    identity = Identity(instance="decode", epoch=1, compatibility=bytes(32), token=b"hidden")
    layout = uniform_cache((KVShape(layers=1, kv_heads=1, head_size=1, dtype="float32"),), 1)
    peer = PeerAddress(instance="d", epoch=1, layout=layout, ranks=(), token=b"hidden")
    assert "hidden" not in f"{identity} {peer}"


def test_errors_keep_their_kind_across_the_wire() -> None:
    assert isinstance(from_code(ChecksumMismatch.code, "x"), ChecksumMismatch)
    assert type(from_code(200, "x")) is TransferError


def test_a_span_is_a_range() -> None:
    with pytest.raises(ValueError, match="range"):
        Span(3, 2)
    assert len(Span(2, 5).meet(Span(7, 9))) == 0
