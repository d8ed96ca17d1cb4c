"""Transfers that go well: any order of readiness, any layouts, exact bytes and events."""

import random
import threading
from dataclasses import replace
from itertools import pairwise

import pytest

from kvtransfer import Closed, Completed, Failed, PeerUp, SendAgent, Span, uniform
from kvtransfer.layout import KVLayout, KVShape
from kvtransfer.loopback import Delivery, Network
from tests.unit.kvtransfer.agents import (
    PREFILL,
    QUICK,
    SHAPE,
    Events,
    Pair,
    Receiver,
    Sender,
    address,
    one,
)
from tests.unit.kvtransfer.layouts import RankMemory, whole

pytestmark = pytest.mark.usefixtures("way")


def test_a_sequence_arrives_byte_for_byte() -> None:
    pair = Pair()
    pair.transfer_works(1)
    pair.close()
    assert [type(e) for e in pair.receiver.events.outcomes(1)] == [Completed]
    assert [type(e) for e in pair.sender.events.outcomes(1)] == [Completed]


def test_layers_and_chunks_become_ready_in_any_order() -> None:
    pair = Pair()
    pair.start(1)
    cuts = [0, 5, 16, 50, 97, pair.total]
    parts = [
        (Span(layer, layer + 1), Span(a, b))
        for layer in range(SHAPE.layers)
        for a, b in pairwise(cuts)
    ]
    random.Random(5).shuffle(parts)
    for layers, tokens in parts:
        pair.sender.agent.ready(1, layers, tokens)
    pair.both(Completed)
    pair.receiver.memory.check(pair.cache, Span(0, pair.total))
    pair.close()


def test_readiness_may_come_before_the_connection_and_the_grant() -> None:
    pair = Pair(connect=False)
    pair.sender.agent.begin(pair.sender.transfer(1, pair.layout))
    pair.sender.all_ready(1)
    pair.receiver.agent.open(pair.receiver.grant(1, pair.layout))
    pair.sender.agent.connect(pair.address)
    pair.both(Completed)
    pair.receiver.memory.check(pair.cache, Span(0, pair.total))
    pair.close()


def test_stats_tell_what_moved() -> None:
    pair = Pair()
    pair.start(1)
    pair.sender.all_ready(1)
    sent, received = pair.both(Completed)
    assert sent.stats.bytes == received.stats.bytes == 4 * 9 * 16 * 2 * 2 * 8 * 2
    assert sent.stats.messages == received.stats.messages > 1
    assert received.stats.transport in ("loopback", "mapped", "gpu")
    stats = pair.receiver.agent.stats()
    assert (stats.completed, stats.failed, stats.active_transfers) == (1, 0, 0)
    assert [(p.instance, p.bytes) for p in stats.peers] == [("prefill", received.stats.bytes)]
    assert (stats.bytes, stats.messages) == (received.stats.bytes, received.stats.messages)
    pair.close()
    ended = pair.receiver.agent.stats()
    assert (ended.bytes, ended.messages, ended.peers) == (stats.bytes, stats.messages, ())


def test_many_transfers_share_a_connection() -> None:
    pair = Pair()
    for transfer_id in range(1, 9):
        pair.start(transfer_id, nonce=bytes([transfer_id]) * 16)
    for transfer_id in range(1, 9):
        pair.sender.all_ready(transfer_id)
    done = {pair.receiver.events.wait(Completed).transfer_id for _ in range(8)}
    assert done == set(range(1, 9))
    pair.receiver.memory.check(pair.cache, Span(0, pair.total))
    pair.close()


def test_a_transfer_of_no_tokens_completes_at_once() -> None:
    pair = Pair(total=128)
    pair.start(1, tokens=Span(128, 128))
    sent, received = pair.both(Completed)
    assert sent.stats.bytes == received.stats.bytes == 0
    assert pair.untouched()
    pair.close()


def test_only_the_missing_suffix_is_sent() -> None:
    pair = Pair()
    pair.start(1, tokens=Span(64, pair.total))
    pair.sender.all_ready(1)
    pair.both(Completed)
    pair.receiver.memory.check(pair.cache, Span(64, pair.total))
    pair.close()


SMALL = KVShape(layers=4, kv_heads=2, head_size=8, dtype="float16")


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (uniform(SMALL, 16, cp=2, cp_order="zigzag"), uniform(SMALL, 8, tp=2)),
        (uniform(SMALL, 8, cp=2, tp=2, cp_order="cyclic", cp_grain=16), uniform(SMALL, 16, tp=2)),
        (uniform(SMALL, 8, tp=2, pp=2), uniform(SMALL, 16)),
        (uniform(SMALL, 16, tp=4), uniform(SMALL, 4, tp=2, cp=2)),
        (uniform(SMALL, 16), uniform(SMALL, 16, tp=4)),
    ],
    ids=[
        "cp-zigzag-to-tp",
        "cp-cyclic-to-tp",
        "tp-pp-to-one",
        "replicas-to-tp-cp",
        "one-to-replicas",
    ],
)
def test_pools_of_different_layouts(source: KVLayout, target: KVLayout) -> None:
    network, total = Network(), 101
    cache = whole(SMALL, total, seed=0)
    receivers = [Receiver.start(network, target, total, rank=s.rank) for s in target.shards]
    senders = [Sender.start(network, source, total, rank=s.rank) for s in source.shards]
    for receiver in receivers:
        receiver.agent.open(receiver.grant(1, source))
    for sender in senders:
        sender.agent.connect(address(receivers, target))
        sender.agent.begin(sender.transfer(1, target))
        sender.all_ready(1)
    for events in [r.events for r in receivers] + [s.events for s in senders]:
        events.wait(Completed)
    for receiver in receivers:
        receiver.memory.check(cache, Span(0, total))
    for sender in senders:
        sender.agent.close()
    for receiver in receivers:
        receiver.agent.close()


def test_messages_that_overtake_one_another_do_no_harm() -> None:
    network = Network()
    rng = random.Random(3)
    pair = Pair(network=network)
    # A stream keeps its order whatever happens, and tagged messages need none.
    network.fault = lambda lane, message: [
        Delivery(message, rng.choice([0.0, 0.001, 0.02]) if lane == "data" else 0.0)
    ]
    pair.transfer_works(1)
    pair.close()


def test_a_callback_that_raises_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    pair = Pair()

    def angry(event: object) -> None:
        pair.receiver.events(event)  # type: ignore[arg-type]
        raise RuntimeError("callback")

    pair.receiver.agent._on_event = angry
    pair.transfer_works(1)
    pair.close()
    assert "callback" in caplog.text


def test_close_leaves_no_thread_and_ends_what_runs() -> None:
    before = set(threading.enumerate())
    pair = Pair()
    pair.start(1)
    pair.close()
    assert set(threading.enumerate()) == before
    failures = (*pair.sender.events.outcomes(1), *pair.receiver.events.outcomes(1))
    assert [type(e) for e in failures] == [Failed, Failed]
    pair.close()


def test_calls_after_close_do_nothing() -> None:
    pair = Pair()
    pair.close()
    pair.sender.agent.ready(1, Span(0, 1), Span(0, 1))
    pair.receiver.agent.revoke(1)
    assert not any(isinstance(e, Closed) for e in pair.receiver.events.all)


def test_reconnecting_to_the_same_peer_changes_nothing() -> None:
    pair = Pair()
    pair.sender.agent.connect(pair.address)
    pair.transfer_works(1)
    pair.close()
    assert sum(isinstance(e, PeerUp) for e in pair.sender.events.all) == 1


def test_a_taken_port_is_told_at_the_start_and_leaves_no_thread() -> None:
    network, layout = Network(), uniform(SHAPE, 16)
    first = Receiver.start(network, layout, 16)
    before = set(threading.enumerate())
    with pytest.raises(OSError, match="in use"):
        Receiver.start(network, layout, 16, settings=replace(QUICK, port=first.port))
    assert set(threading.enumerate()) == before
    first.agent.close()


def test_an_agent_that_was_never_started_can_be_closed() -> None:
    network, layout = Network(), uniform(SHAPE, 16)
    events, transport = Events(), network.transport()
    memory = RankMemory.make(layout, 0, 16, random.Random(0))
    agent = SendAgent(
        transport=transport,
        memories=(memory.kv,),
        layout=one(layout),
        rank=0,
        identity=PREFILL,
        settings=QUICK,
        on_event=events,
    )
    agent.close()
    assert network.at_address(transport.data_address) is None
