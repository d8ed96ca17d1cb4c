"""Aborts, late writes, silence and death: no foreign byte, no hang, everything given back."""

import threading
from dataclasses import replace

import pytest

from kvtransfer import (
    Closed,
    Completed,
    Failed,
    PeerDown,
    PeerUp,
    Span,
    TransferSettings,
    wire,
)
from kvtransfer.errors import (
    AckTimeout,
    CreditStalled,
    GrantExpired,
    GrantRefused,
    ManifestMismatch,
    PeerLost,
    StaleEpoch,
    TransferAborted,
)
from kvtransfer.layout import uniform
from kvtransfer.loopback import Delivery, Fault, Network
from tests.unit.kvtransfer.agents import (
    DECODE,
    QUICK,
    SHAPE,
    Pair,
    RawSender,
    Receiver,
    address,
    eventually,
)


def drop_data(lane: str, message: bytes) -> list[Delivery]:
    return [] if is_payload(lane, message) else [Delivery(message)]


def is_payload(lane: str, message: bytes) -> bool:
    """Whether this carries payload, or on a mapped lane the word that it is there."""
    return lane in ("data", "stream") or message[0] == wire.Kind.PIECE


def drop_kind(kind: wire.Kind) -> Fault:
    def fault(lane: str, message: bytes) -> list[Delivery]:
        return [] if lane == "control" and message[0] == kind else [Delivery(message)]

    return fault


pytestmark = pytest.mark.usefixtures("way")


# -------------------------------------------------------------------------------------- aborts


@pytest.mark.parametrize("phase", ["begun", "half ready", "stalled", "all sent"])
@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_abort_in_each_phase_closes_both_sides(phase: str, side: str) -> None:
    pair = Pair()
    if phase in ("stalled", "all sent"):
        pair.network.fault = drop_data if phase == "stalled" else drop_kind(wire.Kind.MANIFEST)
    pair.start(1)
    if phase != "begun":
        layers = Span(0, 2 if phase == "half ready" else SHAPE.layers)
        pair.sender.agent.ready(1, layers, Span(0, pair.total))
    if side == "sender":
        pair.sender.agent.abort(1)
        pair.sender.events.wait(Closed)
        told = pair.receiver.events.wait(Failed)
    else:
        pair.receiver.agent.revoke(1)
        pair.receiver.events.wait(Closed)
        told = pair.sender.events.wait(Failed)
    assert isinstance(told.error, TransferAborted | GrantRefused)
    pair.network.fault = None
    assert pair.receiver.agent.stats().active_transfers == 0
    assert pair.sender.agent.stats().active_transfers == 0
    pair.close()
    assert [type(e) for e in getattr(pair, side).events.outcomes(1)] == [Closed]


def test_abort_of_unknown_and_finished_transfers_is_answered() -> None:
    pair = Pair()
    pair.transfer_works(1)
    for transfer_id in (1, 2):
        pair.sender.agent.abort(transfer_id)
        assert pair.sender.events.wait(Closed).transfer_id == transfer_id
    pair.close()
    assert [type(e) for e in pair.sender.events.outcomes(1)] == [Completed, Closed]


def test_late_writes_after_revoke_never_reach_reused_blocks() -> None:
    network = Network()
    pair = Pair(network=network)
    pair.start(1)
    network.fault = lambda lane, m: [Delivery(m, 0.15 if is_payload(lane, m) else 0.0)]
    pair.sender.all_ready(1)
    threading.Event().wait(0.05)
    pair.receiver.agent.revoke(1)
    pair.receiver.events.wait(Closed)
    network.fault = None
    # The blocks belong to the next request from here on; the messages under way carry the
    # first one's bytes and arrive in the midst of it.
    assert pair.untouched()
    pair.sender.events.wait(Failed)
    pair.sender.memory.kv.neg_()
    pair.start(2, nonce=b"b" * 16)
    pair.sender.all_ready(2)
    pair.both(Completed)
    pair.receiver.memory.check(-pair.cache, Span(0, pair.total))
    assert pair.receiver.agent.stats().late_pieces > 0
    pair.close()


def test_a_raw_late_write_is_counted_and_dropped() -> None:
    network = Network()
    layout = uniform(SHAPE, 16)
    receiver = Receiver.start(network, layout, 64)
    sender = RawSender(network, receiver).up()
    receiver.agent.open(receiver.grant(1, layout))
    receiver.agent.revoke(1)
    receiver.events.wait(Closed)
    sender.piece()
    sender.settled()
    receiver.agent.revoke(1)
    receiver.events.wait(Closed)
    assert receiver.agent.stats().late_pieces == 1
    assert bool((receiver.memory.kv == -7.0).all())
    receiver.agent.close()


# ------------------------------------------------------------------------- silence and stalling


def test_lost_data_fails_both_sides_and_the_next_transfer_works() -> None:
    pair = Pair()
    pair.network.fault = drop_data
    pair.start(1)
    pair.sender.all_ready(1)
    # A stream's sender learns from the receiver that what it sent has not come.
    assert isinstance(pair.sender.events.wait(Failed).error, CreditStalled | ManifestMismatch)
    failed = pair.receiver.events.wait(Failed)
    assert isinstance(failed.error, TransferAborted | ManifestMismatch)
    assert pair.untouched()
    pair.close()


def test_a_lost_acknowledgement_fails_the_sender_in_time() -> None:
    pair = Pair()
    pair.network.fault = drop_kind(wire.Kind.ACK)
    pair.start(1)
    pair.sender.all_ready(1)
    pair.receiver.events.wait(Completed)
    assert isinstance(pair.sender.events.wait(Failed).error, AckTimeout)
    pair.network.fault = None
    pair.transfer_works(2)
    pair.close()


def test_a_sender_that_never_becomes_ready_expires() -> None:
    pair = Pair()
    pair.start(1, ttl_s=0.2)
    kinds = {type(f.error) for f in pair.both(Failed)}
    assert kinds <= {GrantExpired, TransferAborted}
    pair.transfer_works(2)
    pair.close()


def test_no_peer_within_the_connect_time_fails() -> None:
    pair = Pair(connect=False)
    pair.sender.agent.begin(pair.sender.transfer(1, pair.layout))
    assert isinstance(pair.sender.events.wait(Failed).error, PeerLost)
    pair.close()


def test_a_stopped_receiver_is_noticed_by_its_silence() -> None:
    pair = Pair(settings=TransferSettings(slot_bytes=4096, heartbeat_s=0.1, credit_stall_s=5.0))
    pair.start(1)
    pair.receiver.transport.freeze(True)
    pair.sender.all_ready(1)
    failed = pair.sender.events.wait(Failed)
    assert isinstance(failed.error, PeerLost)
    assert "silent" in str(failed.error)
    pair.receiver.transport.freeze(False)
    pair.sender.events.wait(PeerUp)
    pair.receiver.events.wait(Failed)
    pair.transfer_works(2)
    pair.close()


def test_a_stopped_sender_is_noticed_by_its_silence() -> None:
    pair = Pair()
    pair.start(1)
    pair.sender.agent.ready(1, Span(0, 1), Span(0, 64))
    pair.sender.transport.freeze(True)
    assert isinstance(pair.receiver.events.wait(Failed).error, PeerLost)
    assert pair.receiver.events.wait(PeerDown).instance == "prefill"
    pair.sender.transport.freeze(False)
    pair.sender.events.wait(Failed)
    pair.sender.events.wait(PeerUp)
    pair.transfer_works(2)
    pair.close()


# --------------------------------------------------------------------------------------- death


def test_a_dead_sender_fails_its_transfers_and_others_go_on() -> None:
    pair = Pair()
    pair.start(1)
    pair.sender.agent.ready(1, Span(0, 2), Span(0, pair.total))
    pair.sender.transport.die()
    assert isinstance(pair.receiver.events.wait(Failed).error, PeerLost)
    eventually(lambda: not pair.receiver.agent.stats().slots)
    stats = pair.receiver.agent.stats()
    assert (stats.connections, stats.active_transfers) == (0, 0)
    second = Pair(network=pair.network)
    second.transfer_works(1)
    second.close()
    pair.close()


def test_a_dead_receiver_fails_transfers_and_its_successor_serves() -> None:
    pair = Pair()
    pair.start(1)
    pair.receiver.transport.die()
    assert isinstance(pair.sender.events.wait(Failed).error, PeerLost)
    born = replace(DECODE, epoch=8)
    successor = Receiver.start(pair.network, pair.layout, pair.total, identity=born)
    pair.sender.agent.connect(address([successor], pair.layout, epoch=8))
    pair.sender.events.wait(PeerUp)
    pair.sender.agent.begin(pair.sender.transfer(1, pair.layout))
    assert isinstance(pair.sender.events.wait(Failed).error, StaleEpoch)
    successor.agent.open(successor.grant(2, pair.layout, epoch=8))
    pair.sender.agent.begin(pair.sender.transfer(2, pair.layout, epoch=8))
    pair.sender.all_ready(2)
    successor.events.wait(Completed)
    successor.memory.check(pair.cache, Span(0, pair.total))
    successor.agent.close()
    pair.close()


@pytest.mark.parametrize("way", ["ucx"], indirect=True)
def test_slots_of_a_dead_link_stay_aside_until_the_transport_lets_go() -> None:
    network = Network()
    pair = Pair(network=network)
    network.hold_receives = True
    pair.sender.transport.die()
    pair.receiver.events.wait(PeerDown)
    assert pair.receiver.agent.stats().slots == {"quarantined": QUICK.slots_per_connection}
    second = Pair(network=network, connect=False)
    peer = RawSender(network, pair.receiver).up()
    peer.piece()
    peer.settled()
    assert pair.receiver.agent.stats().slots["quarantined"] == QUICK.slots_per_connection
    network.release_receives()
    eventually(lambda: "quarantined" not in pair.receiver.agent.stats().slots)
    second.close()
    pair.close()


def test_forgetting_a_peer_fails_its_transfers() -> None:
    pair = Pair()
    pair.start(1)
    pair.sender.agent.forget("decode")
    assert isinstance(pair.sender.events.wait(Failed).error, PeerLost)
    pair.receiver.events.wait(Failed)
    pair.sender.agent.connect(pair.address)
    pair.sender.events.wait(PeerUp)
    pair.transfer_works(2)
    pair.close()


def test_either_side_closing_in_order_ends_the_others_transfer() -> None:
    for side, other in (("sender", "receiver"), ("receiver", "sender")):
        pair = Pair()
        pair.start(1)
        getattr(pair, side).agent.close()
        failed = getattr(pair, other).events.wait(Failed)
        assert isinstance(failed.error, TransferAborted | PeerLost)
        pair.close()
