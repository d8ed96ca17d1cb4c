"""Agents over the loopback transport, and a peer that can break every rule."""

import queue
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from kvtransfer import (
    PROTOCOL_VERSION,
    CacheLayout,
    Closed,
    Completed,
    Failed,
    Identity,
    KVLayout,
    KVShape,
    PeerAddress,
    PeerUp,
    ReceiveAgent,
    ReceiveGrant,
    SendAgent,
    SendTransfer,
    SharedRegion,
    Span,
    TransferEvent,
    TransferSettings,
    compatibility_hash,
    uniform,
    wire,
)
from kvtransfer.header import MEANT, DataHeader, seal
from kvtransfer.loopback import LoopbackLink, LoopbackTransport, Network
from kvtransfer.send_lanes import probe_header
from kvtransfer.settings import Lane
from kvtransfer.shared import Lease, boot_id
from kvtransfer.slots import data_tag
from kvtransfer.transport import Connected, ControlArrived, Done
from tests.lent_boxes import LentBoxes
from tests.unit.kvtransfer.layouts import RankMemory, whole

T = TypeVar("T")

WAIT_S = 10.0
SHAPE = KVShape(layers=4, kv_heads=2, head_size=8, dtype="bfloat16")
COMPATIBILITY = compatibility_hash(PROTOCOL_VERSION, "fingerprint", [SHAPE])
DECODE = Identity(instance="decode", epoch=7, compatibility=COMPATIBILITY, token=b"secret")
PREFILL = Identity(instance="prefill", epoch=3, compatibility=COMPATIBILITY, token=b"")
NONCE = b"nonce-of-16bytes"
QUICK = TransferSettings(
    lane="ucx",
    slot_bytes=4096,
    piece_bytes=8192,
    slots_per_connection=3,
    probe_bytes=0,
    connect_s=1.0,
    hello_s=0.3,
    heartbeat_s=0.1,
    credit_stall_s=0.4,
    ack_s=0.5,
)


# The lane of agents that a test starts; the fixture `lane` changes it.
LANE: Lane = "ucx"
# Whether their memory counts as a GPU's; the fixture `way` changes it.
ON_GPU = False
LANES: tuple[Lane, ...] = ("ucx", "stream", "mapped")
KINDS = {
    "ucx": wire.LaneKind.TAGGED,
    "stream": wire.LaneKind.STREAM,
    "mapped": wire.LaneKind.MAPPED,
}


def one(layout: KVLayout) -> CacheLayout:
    """A model with one cache group."""
    return CacheLayout((layout,))


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds; fail the test if it never does."""
    until = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until, "the condition never became true"
        time.sleep(0.005)


class Events:
    """What an agent reported, in order."""

    def __init__(self) -> None:
        self.all: list[TransferEvent] = []
        self._queue: queue.Queue[TransferEvent] = queue.Queue()

    def __call__(self, event: TransferEvent) -> None:
        self.all.append(event)
        self._queue.put(event)

    def wait(self, kind: type[T], match: Callable[[T], bool] = lambda _: True) -> T:
        """Return the next event of a kind, dropping others."""
        until = time.monotonic() + WAIT_S
        while True:
            try:
                event = self._queue.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {kind.__name__} came; only {self.all}") from None
            if isinstance(event, kind) and match(event):
                return event

    def outcomes(self, transfer_id: int) -> list[TransferEvent]:
        """All that was said of a transfer."""
        kinds = (Completed, Failed, Closed)
        return [e for e in self.all if isinstance(e, kinds) and e.transfer_id == transfer_id]


@dataclass
class Receiver:
    """One decode rank with its memory."""

    network: Network
    transport: LoopbackTransport
    memory: RankMemory
    agent: ReceiveAgent
    events: Events
    host: str
    port: int

    @classmethod
    def start(
        cls,
        network: Network,
        layout: KVLayout,
        total: int,
        *,
        rank: int = 0,
        settings: TransferSettings = QUICK,
        identity: Identity = DECODE,
    ) -> "Receiver":
        transport, events = network.transport(), Events()
        memory = RankMemory.make(layout, rank, total, random.Random(1), spare=40)
        agent = ReceiveAgent(
            transport=transport,
            memories=(memory.kv,),
            layout=one(layout),
            rank=rank,
            identity=identity,
            settings=replace(settings, lane=LANE),
            on_event=events,
            boxes=LentBoxes() if ON_GPU else None,
        )
        host, port = agent.start()
        return cls(network, transport, memory, agent, events, host, port)

    def grant(self, transfer_id: int, source: KVLayout, **changes: object) -> ReceiveGrant:
        total = self.memory.total_tokens
        base = ReceiveGrant(
            transfer_id=transfer_id,
            epoch=DECODE.epoch,
            nonce=NONCE,
            tokens=Span(0, total),
            total_tokens=total,
            block_ids=(tuple(self.memory.block_ids),),
            source_layout=one(source),
            source_instance=PREFILL.instance,
            ttl_s=WAIT_S,
        )
        return replace(base, **changes)  # type: ignore[arg-type]


@dataclass
class Sender:
    """One prefill rank with its memory."""

    transport: LoopbackTransport
    memory: RankMemory
    agent: SendAgent
    events: Events
    region: SharedRegion

    @classmethod
    def start(
        cls,
        network: Network,
        layout: KVLayout,
        total: int,
        *,
        rank: int = 0,
        settings: TransferSettings = QUICK,
        identity: Identity = PREFILL,
        seed: int = 0,
    ) -> "Sender":
        transport, events = network.transport(), Events()
        memory = RankMemory.make(layout, rank, total, random.Random(2), spare=40)
        region, boxes = SharedRegion(), LentBoxes() if ON_GPU else None
        shared = (boxes or region).allocate(memory.kv.shape, memory.kv.dtype)
        memory.kv = shared.copy_(memory.kv)
        memory.fill(whole(layout.shape, total, seed))
        agent = SendAgent(
            transport=transport,
            memories=(memory.kv,),
            layout=one(layout),
            rank=rank,
            identity=identity,
            settings=replace(settings, lane=LANE),
            on_event=events,
            region=region,
            boxes=boxes,
        )
        agent.start()
        return cls(transport, memory, agent, events, region)

    def transfer(self, transfer_id: int, target: KVLayout, **changes: object) -> SendTransfer:
        total = self.memory.total_tokens
        base = SendTransfer(
            transfer_id=transfer_id,
            epoch=DECODE.epoch,
            nonce=NONCE,
            target_instance=DECODE.instance,
            tokens=Span(0, total),
            total_tokens=total,
            block_ids=(tuple(self.memory.block_ids),),
            target_layout=one(target),
            ttl_s=WAIT_S,
        )
        return replace(base, **changes)  # type: ignore[arg-type]

    def all_ready(self, transfer_id: int) -> None:
        """Say that everything is computed."""
        layers = Span(0, self.memory.layout.shape.layers)
        self.agent.ready(transfer_id, layers, Span(0, self.memory.total_tokens))


def address(receivers: list[Receiver], layout: KVLayout, **changes: object) -> PeerAddress:
    base = PeerAddress(
        instance=DECODE.instance,
        epoch=DECODE.epoch,
        layout=one(layout),
        ranks=tuple((r.memory.shard.rank, r.host, r.port) for r in receivers),
        token=DECODE.token,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


class Pair:
    """One prefill rank and one decode rank of the same layout, connected."""

    def __init__(
        self,
        *,
        total: int = 133,
        settings: TransferSettings = QUICK,
        network: Network | None = None,
        connect: bool = True,
    ) -> None:
        self.closed = False
        self.network = network or Network()
        self.layout = uniform(SHAPE, 16)
        self.total = total
        self.cache = whole(SHAPE, total, seed=0)
        self.receiver = Receiver.start(self.network, self.layout, total, settings=settings)
        self.sender = Sender.start(self.network, self.layout, total, settings=settings)
        if connect:
            self.sender.agent.connect(self.address)
            self.sender.events.wait(PeerUp)
            self.receiver.events.wait(PeerUp)

    @property
    def address(self) -> PeerAddress:
        return address([self.receiver], self.layout)

    def start(self, transfer_id: int, **changes: object) -> None:
        """Open the grant and begin to send; nothing is ready yet."""
        self.receiver.agent.open(self.receiver.grant(transfer_id, self.layout, **changes))
        self.sender.agent.begin(self.sender.transfer(transfer_id, self.layout, **changes))

    def both(self, kind: type[T]) -> tuple[T, T]:
        """Wait for the same kind of event at sender and receiver."""
        return self.sender.events.wait(kind), self.receiver.events.wait(kind)

    def transfer_works(self, transfer_id: int) -> None:
        """Move the sequence once and check every byte."""
        self.receiver.memory.kv.fill_(-7.0)
        self.start(transfer_id)
        self.sender.all_ready(transfer_id)
        self.both(Completed)
        self.receiver.memory.check(self.cache, Span(0, self.total))

    def untouched(self) -> bool:
        """Whether the receiver's memory is as it was made."""
        return bool((self.receiver.memory.kv == -7.0).all())

    def close(self) -> None:
        self.sender.agent.close()
        self.receiver.agent.close()
        if not self.closed:
            self.closed = True
            assert self.sender.region.leases == 0
            self.sender.region.close()


class RawSender:
    """A sender that follows the protocol only as far as a test wants it to."""

    def __init__(self, network: Network, receiver: Receiver, lane: Lane | None = None) -> None:
        self.transport = network.transport()
        self.receiver = receiver
        self.lane = lane or LANE
        self.credits: list[tuple[int, int]] = []
        self.controls: list[wire.Control] = []
        self.welcome: wire.Welcome | None = None
        self.lost = False
        self.sent = self.taken = 0
        self.region = SharedRegion()
        self.boxes = LentBoxes() if ON_GPU else None
        kv = receiver.memory.kv
        self.memory = (self.boxes or self.region).allocate(kv.shape, kv.dtype)
        self.lease: Lease | None = None
        self.link: LoopbackLink = self.transport.connect(receiver.host, receiver.port)

    def hello(self, compatibility: bytes = COMPATIBILITY, **changes: object) -> "RawSender":
        mapped = self.lane == "mapped"
        base = wire.Hello(
            instance=PREFILL.instance,
            epoch=PREFILL.epoch,
            rank=0,
            target_epoch=DECODE.epoch,
            target_rank=0,
            token=DECODE.token,
            lanes=frozenset({wire.LaneKind.DEVICE if self.boxes else KINDS[self.lane]}),
            boot_id=boot_id(),
            data_address=self.transport.data_address if self.lane == "ucx" else b"",
            share=self.region.handle if mapped else None,
            offsets=((self._offset, self.memory.shape[2]),) if mapped else (),
            lent=(self.boxes.lend(self.memory),) if self.boxes else (),
        )
        hello = replace(base, **changes)  # type: ignore[arg-type]
        self.link.send_control(wire.encode_hello(hello, compatibility))
        return self

    @property
    def _offset(self) -> int:
        return 0 if self.boxes else self.region.offset_of(self.memory)

    def up(self) -> "RawSender":
        """Say hello and wait for what allows to send."""
        self.hello()
        self.until(lambda: self.welcome and (self.credits or self.lane != "ucx"))
        assert self.welcome is not None
        if self.lane == "ucx":
            self.link.tagged.open(self.welcome.data_address)
        return self

    def until(self, condition: Callable[[], object]) -> None:
        until = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < until, f"never happened; heard {self.controls}"
            for happening in self.transport.poll(0.05):
                if isinstance(happening, ControlArrived):
                    self._heard(wire.decode(happening.message))
                elif not isinstance(happening, Connected | Done):
                    self.lost = True

    def _heard(self, message: wire.Control) -> None:
        if isinstance(message, wire.Credit):
            self.credits += message.slots
        elif isinstance(message, wire.Taken):
            self.taken += message.count
        elif isinstance(message, wire.Welcome):
            self.welcome = message
        elif isinstance(message, wire.Heartbeat):
            self.link.send_control(wire.encode(message))
        else:
            self.controls.append(message)

    def heard(self, kind: type[T]) -> T:
        """Wait for a control message of a kind."""
        self.until(lambda: any(isinstance(m, kind) for m in self.controls))
        return next(m for m in self.controls if isinstance(m, kind))

    def name(self, transfer_id: int = 1, **changes: object) -> None:
        """Tell where a transfer's blocks lie in the mapped memory, under a new lease."""
        self.lease = self.region.lease()
        base = wire.Table(
            transfer_id=transfer_id,
            nonce=NONCE,
            lease=self.lease,
            group=0,
            first=0,
            block_ids=tuple(self.receiver.memory.block_ids),
        )
        table = replace(base, **changes)  # type: ignore[arg-type]
        self.link.send_control(wire.encode(table))

    def piece(self, *, fill: int = 1, checksum: bool = True, **changes: object) -> DataHeader:
        """Send one block of one layer; on a mapped lane the whole memory is filled with `fill`."""
        slot, generation = 0, 0
        if self.lane == "ucx":
            self.until(lambda: self.credits)
            slot, generation = self.credits.pop(0)
        base = DataHeader(
            epoch=DECODE.epoch,
            transfer_id=1,
            nonce=NONCE,
            source_rank=0,
            slot=slot,
            generation=generation,
            sequence=0,
            group=0,
            layers=Span(0, 1),
            heads=Span(0, 2),
            tokens=Span(0, 16),
            payload_bytes=2 * 2 * 16 * 8 * 2,
        )
        header = replace(base, **changes)  # type: ignore[arg-type]
        payload = np.full(header.payload_bytes, fill, dtype=np.uint8)
        head, _ = seal(header, (memoryview(payload.data),), checksum=checksum)
        self.raw(head, payload.tobytes(), slot, generation)
        return header

    def raw(self, head: bytes, payload: bytes, slot: int = 0, generation: int = 0) -> None:
        """Send a header and a payload as they are."""
        self.sent += 1
        if self.lane == "ucx":
            assert self.welcome is not None
            tag = data_tag(DECODE.epoch, self.welcome.connection, slot, generation)
            message = np.frombuffer(head + payload, dtype=np.uint8)
            self.link.tagged.send(tag, message, None)
        elif self.lane == "stream":
            self.link.stream.send((memoryview(head), memoryview(payload + MEANT)), None)
        else:
            if payload:
                self.memory.view(torch.uint8).fill_(payload[0])
            if self.lease is None:
                self.name()
            self.link.send_control(wire.encode(wire.Piece(head)))

    def settled(self) -> None:
        """Wait until everything sent has been looked at."""
        if self.lane == "ucx":
            self.until(lambda: len(self.credits) == QUICK.slots_per_connection)
        elif self.lane == "mapped":
            self.until(lambda: self.taken == self.sent)
        else:
            # Control and stream are not ordered among one another: a ping answered after that
            # many bytes of probes is.
            probe = replace(_PROBE, payload_bytes=1)
            head, _ = seal(probe, (), checksum=False)
            self.link.stream.send((memoryview(head + b"p" + MEANT),), None)
            self.probes += 1
            self.link.send_control(wire.encode(wire.Ping(7, self.probes)))
            before = sum(isinstance(m, wire.Pong) for m in self.controls)
            self.until(lambda: sum(isinstance(m, wire.Pong) for m in self.controls) > before)

    probes = 0


_PROBE = probe_header(1)
