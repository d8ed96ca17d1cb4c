"""What a receiver refuses: strangers, forgeries, stale, late, damaged and doubled data."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from kvtransfer import Closed, Failed, Identity, PeerDown, Span, TransferSettings, wire
from kvtransfer.errors import (
    ChecksumMismatch,
    ConnectionRefused,
    GrantExpired,
    GrantRefused,
    LayoutMismatch,
    ManifestMismatch,
    ProtocolViolation,
    StaleEpoch,
)
from kvtransfer.layout import uniform
from kvtransfer.loopback import Delivery, Network
from kvtransfer.settings import Lane
from tests.unit.kvtransfer.agents import (
    COMPATIBILITY,
    DECODE,
    NONCE,
    QUICK,
    SHAPE,
    Pair,
    RawSender,
    Receiver,
    one,
)

LAYOUT = uniform(SHAPE, 16)
UCX = pytest.mark.parametrize("lane", ["ucx"], indirect=True)


@pytest.fixture
def receiver(lane: Lane) -> Iterator[Receiver]:
    # A raw sender answers heartbeats only while its test waits for something.
    made = Receiver.start(Network(), LAYOUT, 64, settings=replace(QUICK, heartbeat_s=2.0))
    yield made
    made.agent.close()


def granted(receiver: Receiver, **changes: Any) -> RawSender:
    sender = RawSender(receiver.network, receiver).up()
    receiver.agent.open(receiver.grant(1, LAYOUT, **changes))
    return sender


def untouched(receiver: Receiver) -> bool:
    return bool((receiver.memory.kv == -7.0).all())


# ------------------------------------------------------------------------------------- hello


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"token": b"guess"}, ConnectionRefused, "token"),
        ({"target_epoch": 6}, StaleEpoch, "epoch 6"),
        ({"target_rank": 1}, ConnectionRefused, "rank 1"),
        ({"compatibility": COMPATIBILITY[::-1]}, LayoutMismatch, "compatibility hash"),
    ],
)
def test_a_wrong_hello_is_refused_by_name(
    receiver: Receiver, changes: dict[str, Any], error: type[Exception], reason: str
) -> None:
    stranger = RawSender(receiver.network, receiver).hello(**changes)
    refusal = stranger.heard(wire.Refused)
    assert refusal.code == error.code  # type: ignore[attr-defined]
    assert reason in refusal.reason
    stranger.until(lambda: stranger.lost)
    assert receiver.agent.stats().connections == 0


def test_an_earlier_epoch_of_a_known_instance_is_refused(receiver: Receiver) -> None:
    RawSender(receiver.network, receiver).up()
    older = RawSender(receiver.network, receiver).hello(epoch=2)
    assert older.heard(wire.Refused).code == StaleEpoch.code


def test_a_later_epoch_ends_the_connections_of_the_earlier_one(receiver: Receiver) -> None:
    old = RawSender(receiver.network, receiver).up()
    RawSender(receiver.network, receiver).hello(epoch=4, rank=1)
    old.until(lambda: old.lost)
    assert receiver.events.wait(PeerDown).error is not None


def test_silence_and_garbage_instead_of_a_hello_are_refused(receiver: Receiver) -> None:
    silent = RawSender(receiver.network, receiver)
    loud = RawSender(receiver.network, receiver)
    loud.link.send_control(b"GET / HTTP/1.1\r\n\r\n" + bytes(100))
    assert loud.heard(wire.Refused).code == ProtocolViolation.code
    assert silent.heard(wire.Refused).code == ConnectionRefused.code


def test_connections_are_limited() -> None:
    network = Network()
    settings = TransferSettings(max_connections=1, hello_s=5.0)
    receiver = Receiver.start(network, LAYOUT, 64, settings=settings)
    RawSender(network, receiver).up()
    assert "too many" in RawSender(network, receiver).heard(wire.Refused).reason
    receiver.agent.close()


def test_sender_refused_for_good_fails_its_transfers_by_name() -> None:
    pair = Pair(connect=False)
    other = Identity(instance="decode", epoch=7, compatibility=bytes(32), token=b"secret")
    wrong = Receiver.start(pair.network, LAYOUT, 64, identity=other)
    pair.start(1)
    pair.sender.agent.connect(
        type(pair.address)(
            instance="decode",
            epoch=7,
            layout=one(LAYOUT),
            ranks=((0, wrong.host, wrong.port),),
            token=b"secret",
        )
    )
    failed = pair.sender.events.wait(Failed)
    assert isinstance(failed.error, LayoutMismatch)
    assert not failed.retryable
    wrong.agent.close()
    pair.close()


# ------------------------------------------------------------------------------------- grants


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"epoch": 6}, StaleEpoch),
        ({"tokens": Span(0, 24)}, GrantRefused),
        ({"block_ids": ((0,),)}, GrantRefused),
        ({"block_ids": ((0, 0, 1, 2),)}, GrantRefused),
        ({"block_ids": ((0, 1, 2, 999),)}, GrantRefused),
        (
            {
                "source_layout": one(
                    uniform(type(SHAPE)(layers=4, kv_heads=2, head_size=4, dtype="float32"), 16)
                )
            },
            LayoutMismatch,
        ),
    ],
)
def test_a_senseless_grant_fails(
    receiver: Receiver, changes: dict[str, Any], error: type[Exception]
) -> None:
    receiver.agent.open(receiver.grant(1, LAYOUT, **changes))
    assert isinstance(receiver.events.wait(Failed).error, error)


def test_a_grant_is_good_once(receiver: Receiver) -> None:
    receiver.agent.open(receiver.grant(1, LAYOUT))
    receiver.agent.revoke(1)
    receiver.agent.open(receiver.grant(1, LAYOUT))
    assert isinstance(receiver.events.wait(Failed).error, GrantRefused)
    receiver.agent.open(receiver.grant(1, LAYOUT, nonce=b"another nonce 16"))
    receiver.agent.revoke(1)
    receiver.events.wait(Closed)


def test_a_grant_expires_without_any_sender(receiver: Receiver) -> None:
    receiver.agent.open(receiver.grant(1, LAYOUT, ttl_s=0.1))
    failed = receiver.events.wait(Failed)
    assert isinstance(failed.error, GrantExpired)
    assert failed.retryable


def test_an_expired_grant_takes_no_more_data_and_its_sender_is_told(receiver: Receiver) -> None:
    sender = granted(receiver, ttl_s=0.2)
    sender.piece()
    assert sender.heard(wire.Fail).code == GrantExpired.code
    receiver.memory.kv.fill_(-7.0)
    sender.piece(sequence=1, layers=Span(1, 2))
    sender.settled()
    assert untouched(receiver)


def test_revoke_is_answered_for_unknown_and_finished_transfers(receiver: Receiver) -> None:
    receiver.agent.revoke(99)
    receiver.agent.open(receiver.grant(1, LAYOUT))
    receiver.agent.revoke(1)
    receiver.agent.revoke(1)
    assert [receiver.events.wait(Closed).transfer_id for _ in range(3)] == [99, 1, 1]
    assert receiver.events.outcomes(1) == [
        Closed(1, ((0,) * LAYOUT.shape.layers,)),
        Closed(1),
    ]


# ------------------------------------------------------------------------------------- pieces


def test_a_forged_nonce_is_refused_and_harms_nobody(receiver: Receiver) -> None:
    sender = granted(receiver)
    sender.piece(nonce=b"x" * 16)
    assert sender.heard(wire.Fail).code == GrantRefused.code
    sender.settled()
    assert untouched(receiver)
    assert not receiver.events.outcomes(1)
    sender.piece()
    sender.settled()
    assert not untouched(receiver)
    assert not receiver.events.outcomes(1)


def test_data_without_a_grant_is_refused(receiver: Receiver) -> None:
    sender = RawSender(receiver.network, receiver).up()
    sender.piece()
    assert sender.heard(wire.Fail).code == GrantRefused.code
    sender.settled()
    assert untouched(receiver)


def test_another_instance_cannot_use_a_grant(receiver: Receiver) -> None:
    sender = granted(receiver, source_instance="somebody else")
    sender.piece()
    assert sender.heard(wire.Fail).code == GrantRefused.code
    assert untouched(receiver)
    assert not receiver.events.outcomes(1)


def test_data_of_an_earlier_epoch_is_stale(receiver: Receiver) -> None:
    sender = granted(receiver)
    sender.piece(epoch=6)
    assert sender.heard(wire.Fail).code == StaleEpoch.code
    sender.settled()
    assert untouched(receiver)
    assert not receiver.events.outcomes(1)


@pytest.mark.parametrize(
    "changes",
    [
        {"source_rank": 1},
        {"group": 1},
        {"layers": Span(4, 5)},
        {"heads": Span(0, 1), "payload_bytes": 512},
        {"tokens": Span(8, 24)},
        {"tokens": Span(64, 80)},
        {"payload_bytes": 512},
        {"checksum": False},
    ],
    ids=lambda c: "-".join(c),
)
def test_a_piece_that_was_not_granted_fails_its_transfer(
    receiver: Receiver, changes: dict[str, Any]
) -> None:
    sender = granted(receiver)
    sender.piece(**changes)
    assert isinstance(receiver.events.wait(Failed).error, ProtocolViolation)
    assert sender.heard(wire.Fail).code == ProtocolViolation.code
    sender.settled()
    assert untouched(receiver)


@UCX
@pytest.mark.parametrize("changes", [{"generation": 9}, {"slot": 2**10}], ids=lambda c: "-".join(c))
def test_a_message_for_another_slot_fails_its_transfer(
    receiver: Receiver, changes: dict[str, Any]
) -> None:
    sender = granted(receiver)
    sender.piece(**changes)
    assert isinstance(receiver.events.wait(Failed).error, ProtocolViolation)
    sender.settled()
    assert untouched(receiver)


@pytest.mark.parametrize("sequence", [0, 1])
def test_a_piece_that_comes_twice_fails_its_transfer(receiver: Receiver, sequence: int) -> None:
    sender = granted(receiver)
    sender.piece(fill=1)
    sender.settled()
    before = receiver.memory.kv.clone()
    sender.piece(fill=2, sequence=sequence)
    assert isinstance(receiver.events.wait(Failed).error, ProtocolViolation)
    assert bool((receiver.memory.kv == before).all())


def test_a_damaged_message_fails_its_transfer(receiver: Receiver) -> None:
    sender = granted(receiver)

    def damage(lane: str, message: bytes) -> list[Delivery]:
        """Flip a bit of the payload, or where only a header travels, of the checksum in it."""
        if lane == "control" and message[0] != wire.Kind.PIECE:
            return [Delivery(message)]
        at = 74 if lane == "control" else len(message) - 2
        return [Delivery(message[:at] + bytes([message[at] ^ 1]) + message[at + 1 :])]

    receiver.network.fault = damage
    sender.piece()
    assert isinstance(receiver.events.wait(Failed).error, ChecksumMismatch)
    assert untouched(receiver)


@UCX
def test_a_short_message_does_not_pass_with_the_last_ones_bytes(receiver: Receiver) -> None:
    sender = granted(receiver)
    sender.piece()
    sender.settled()
    before = receiver.memory.kv.clone()
    receiver.network.fault = lambda lane, m: [Delivery(m[:500] if lane == "data" else m)]
    for layer in range(1, 4):
        sender.piece(sequence=layer, layers=Span(layer, layer + 1), fill=3)
    assert isinstance(receiver.events.wait(Failed).error, ChecksumMismatch)
    assert bool((receiver.memory.kv == before).all())


@UCX
def test_an_empty_message_ends_the_connection(receiver: Receiver) -> None:
    sender = granted(receiver)
    receiver.network.fault = lambda lane, m: [Delivery(b"" if lane == "data" else m)]
    sender.piece()
    sender.until(lambda: sender.lost)
    assert untouched(receiver)


@UCX
def test_a_message_larger_than_its_slot_ends_the_connection(receiver: Receiver) -> None:
    sender = granted(receiver)
    sender.piece(payload_bytes=QUICK.slot_bytes + 1)
    sender.until(lambda: sender.lost)
    assert isinstance(receiver.events.wait(Failed).error, Exception)
    assert untouched(receiver)


@UCX
def test_a_second_delivery_into_the_same_slot_is_not_looked_at(receiver: Receiver) -> None:
    sender = granted(receiver)
    receiver.network.fault = lambda lane, m: [Delivery(m)] * (2 if lane == "data" else 1)
    sender.piece()
    sender.settled()
    sender.piece(sequence=1, layers=Span(1, 2))
    sender.settled()
    assert not receiver.events.outcomes(1)


# ----------------------------------------------------------------------------------- manifests


def send_all(sender: RawSender) -> list[int]:
    """Send the whole 64-token sequence block by block; return nothing useful yet but the count."""
    count = 0
    for layer in range(SHAPE.layers):
        for block in range(4):
            tokens = Span(block * 16, block * 16 + 16)
            sender.piece(sequence=count, layers=Span(layer, layer + 1), tokens=tokens)
            count += 1
    sender.settled()
    return list(range(count))


def manifest(**changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "transfer_id": 1,
        "epoch": DECODE.epoch,
        "nonce": NONCE,
        "source_rank": 0,
        "pieces": 16,
        "bytes": 16 * 1024,
        "crc32": 0,
    }
    return wire.encode(wire.Manifest(**{**fields, **changes}))


@pytest.mark.parametrize("changes", [{"pieces": 15}, {"bytes": 1}, {"crc32": 5}])
def test_a_manifest_that_disagrees_fails_the_transfer(
    receiver: Receiver, changes: dict[str, Any]
) -> None:
    sender = granted(receiver)
    send_all(sender)
    sender.link.send_control(manifest(**changes))
    assert isinstance(receiver.events.wait(Failed).error, ManifestMismatch)
    assert sender.heard(wire.Fail).code == ManifestMismatch.code


def test_a_manifest_of_what_never_comes_fails_in_time(receiver: Receiver) -> None:
    sender = granted(receiver)
    sender.piece()
    sender.link.send_control(manifest())
    failed = receiver.events.wait(Failed)
    assert isinstance(failed.error, ManifestMismatch)
    assert "missing" in str(failed.error)


def test_a_forged_manifest_is_refused_and_a_second_one_fails(receiver: Receiver) -> None:
    sender = granted(receiver)
    sender.link.send_control(manifest(nonce=bytes(16)))
    assert sender.heard(wire.Fail).code == GrantRefused.code
    assert not receiver.events.outcomes(1)
    sender.link.send_control(manifest())
    sender.link.send_control(manifest())
    assert isinstance(receiver.events.wait(Failed).error, ProtocolViolation)


def test_a_forged_abort_is_refused(receiver: Receiver) -> None:
    sender = granted(receiver)
    sender.link.send_control(wire.encode(wire.Abort(1, bytes(16))))
    assert sender.heard(wire.Fail).code == GrantRefused.code
    assert not receiver.events.outcomes(1)


def test_control_garbage_ends_the_connection(receiver: Receiver) -> None:
    sender = granted(receiver)
    sender.link.send_control(b"\xff" * 40)
    sender.until(lambda: sender.lost)
    receiver.events.wait(PeerDown)
