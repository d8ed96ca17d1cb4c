"""A GPU's memory, that is the CPU's in its place: what is refused, lent, and read too late."""

import re

import pytest
import torch

from kvtransfer import Completed, Failed, Span, uniform
from kvtransfer.addresses import Memory
from kvtransfer.device_memory import DeviceMemory
from kvtransfer.errors import ConnectionRefused, StaleRead
from kvtransfer.lane_choice import in_common, usable
from kvtransfer.layout import Box
from kvtransfer.loopback import Network
from kvtransfer.mapped_caches import LentCaches
from kvtransfer.shared import MappedRegion, NotMappable, SharedRegion
from kvtransfer.wire import LaneKind
from tests.lent_boxes import LentBoxes
from tests.unit.kvtransfer import agents
from tests.unit.kvtransfer.agents import SHAPE, Pair
from tests.unit.kvtransfer.layouts import whole
from tests.unit.kvtransfer.test_memory import LAYOUT

SIZES = (2, 2, 5, 2, 4, 8)


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Pair:
    monkeypatch.setattr(agents, "LANE", "mapped")
    monkeypatch.setattr(agents, "ON_GPU", True)
    return Pair()


def test_memory_of_another_shape_or_type_is_refused() -> None:
    boxes = LentBoxes()
    with pytest.raises(ValueError, match="needs"):
        DeviceMemory(torch.zeros(2, 2, 5, 2, 8, 8), LAYOUT, 0, boxes)
    with pytest.raises(ValueError, match="float32"):
        DeviceMemory(torch.zeros(SIZES, dtype=torch.bfloat16), LAYOUT, 0, boxes)
    memory = DeviceMemory(torch.zeros(SIZES), LAYOUT, 0, boxes)
    with pytest.raises(ValueError, match="reaches no runs"):
        memory.views(memory.table([0], 4), Box(Span(0, 2), Span(0, 2), Span(0, 4), 4))


def test_what_is_lent_is_read_where_it_lies() -> None:
    owner, reader, leases = LentBoxes(), LentBoxes(), SharedRegion()
    memory = owner.allocate(SIZES, torch.float32)
    lent = owner.lend(memory)
    caches = LentCaches(MappedRegion(leases.handle), [(0, SIZES[2])], [lent], reader)
    found = caches.memory(0, LAYOUT, 0)
    memory.fill_(3.0)
    mine = torch.zeros(SIZES)
    into: Memory = DeviceMemory(mine, LAYOUT, 0, reader)
    table = into.table([4], 4)
    into.copy_from(found, table, table, Box(Span(0, 2), Span(0, 2), Span(0, 4), 4))
    assert bool((mine[:, :, 4] == 3.0).all())
    assert mine.sum() == mine[:, :, 4].sum()
    lease = leases.lease()
    assert caches.stands(lease)
    leases.end(lease)
    assert not caches.stands(lease)
    assert caches.probe(1000) > 0


def test_memory_that_cannot_be_opened_or_is_of_another_size_is_refused() -> None:
    owner, leases = LentBoxes(), SharedRegion()
    lent = owner.lend(owner.allocate(SIZES, torch.float32))
    region = MappedRegion(leases.handle)
    with pytest.raises(NotMappable, match="lends no memory"):
        LentCaches(region, [(0, 5)], [], owner)
    gone = bytes(4) + lent[4:]  # another process's
    with pytest.raises(NotMappable, match="cannot be opened"):
        LentCaches(region, [(0, 5)], [gone], owner)
    caches = LentCaches(region, [(0, 6)], [lent], owner)
    with pytest.raises(ValueError, match=re.escape("the peer's cache has")):
        caches.memory(0, LAYOUT, 0)


def test_lanes_of_a_gpu_are_its_own_and_those_that_take_payloads() -> None:
    mine = usable("auto", rdma=True, on_device=True)
    assert mine == (LaneKind.DEVICE, LaneKind.TAGGED, LaneKind.STREAM)
    assert usable("mapped", rdma=False, on_device=True) == (LaneKind.DEVICE,)
    assert usable("auto", rdma=False, on_device=True, shares=False) == (LaneKind.STREAM,)
    of_a_host = frozenset(usable("auto", rdma=False, on_device=False))
    assert in_common(mine, of_a_host) == [LaneKind.STREAM]
    with pytest.raises(ConnectionRefused, match="device here, mapped there"):
        in_common((LaneKind.DEVICE,), frozenset({LaneKind.MAPPED}))


def test_a_sequence_goes_from_gpu_to_gpu_in_few_pieces_without_checksums(pair: Pair) -> None:
    pair.start(1)
    pair.sender.all_ready(1)
    sent, _ = pair.both(Completed)
    pair.receiver.memory.check(pair.cache, Span(0, pair.total))
    assert sent.stats.transport == "gpu"
    # Whole blocks, and the part-filled one: each at once, whatever a piece has at most elsewhere.
    assert sent.stats.messages <= 2
    assert pair.receiver.agent.stats().checksum_s == 0
    pair.close()


def test_what_is_read_after_the_blocks_were_let_go_does_not_count(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = LentBoxes.copy

    def copy_too_late(boxes: LentBoxes, *args: object) -> None:
        pair.sender.agent.abort(1)
        agents.eventually(lambda: pair.sender.region.leases == 0)
        copy(boxes, *args)

    pair.start(1)
    monkeypatch.setattr(LentBoxes, "copy", copy_too_late)
    pair.sender.all_ready(1)
    assert isinstance(pair.receiver.events.wait(Failed).error, StaleRead)
    monkeypatch.setattr(LentBoxes, "copy", copy)
    pair.transfer_works(2)
    pair.close()


def test_a_receiver_of_the_host_gets_what_a_gpu_has_by_payloads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agents, "LANE", "auto")
    monkeypatch.setattr(agents, "ON_GPU", True)
    network, layout = Network(), uniform(SHAPE, 16)
    sender = agents.Sender.start(network, layout, 133)
    monkeypatch.setattr(agents, "ON_GPU", False)
    receiver = agents.Receiver.start(network, layout, 133)
    sender.agent.connect(agents.address([receiver], layout))
    receiver.agent.open(receiver.grant(1, layout))
    sender.agent.begin(sender.transfer(1, layout))
    sender.all_ready(1)
    assert sender.events.wait(Completed).stats.transport == "loopback"
    receiver.memory.check(whole(SHAPE, 133, seed=0), Span(0, 133))
    sender.agent.close()
    receiver.agent.close()
