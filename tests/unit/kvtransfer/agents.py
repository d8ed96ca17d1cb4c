"""Agents over the loopback transport, and a peer that can break every rule."""

import queue
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from kvtransfer import (
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
    Span,
    TransferEvent,
    TransferSettings,
    compatibility_hash,
    uniform,
    wire,
)
from kvtransfer.loopback import LoopbackLink, LoopbackTransport, Network
from kvtransfer.transport import Connected, ControlArrived, Done
from tests.unit.kvtransfer.layouts import RankMemory, whole

T = TypeVar("T")

WAIT_S = 10.0
SHAPE = KVShape(layers=4, kv_heads=2, head_size=8, dtype="bfloat16")
COMPATIBILITY = compatibility_hash(wire.PROTOCOL_VERSION, "fingerprint", SHAPE)
DECODE = Identity(instance="decode", epoch=7, compatibility=COMPATIBILITY, token=b"secret")
PREFILL = Identity(instance="prefill", epoch=3, compatibility=COMPATIBILITY, token=b"")
NONCE = b"nonce-of-16bytes"
QUICK = TransferSettings(
    slot_bytes=4096,
    slots_per_connection=3,
    connect_s=1.0,
    hello_s=0.3,
    heartbeat_s=0.1,
    credit_stall_s=0.4,
    ack_s=0.5,
)


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
            memory=memory.kv,
            layout=layout,
            rank=rank,
            identity=identity,
            settings=settings,
            on_event=events,
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
            block_ids=tuple(self.memory.block_ids),
            source_layout=source,
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
        memory.fill(whole(layout.shape, total, seed))
        agent = SendAgent(
            transport=transport,
            memory=memory.kv,
            layout=layout,
            rank=rank,
            identity=identity,
            settings=settings,
            on_event=events,
        )
        agent.start()
        return cls(transport, memory, agent, events)

    def transfer(self, transfer_id: int, target: KVLayout, **changes: object) -> SendTransfer:
        total = self.memory.total_tokens
        base = SendTransfer(
            transfer_id=transfer_id,
            epoch=DECODE.epoch,
            nonce=NONCE,
            target_instance=DECODE.instance,
            tokens=Span(0, total),
            total_tokens=total,
            block_ids=tuple(self.memory.block_ids),
            target_layout=target,
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
        layout=layout,
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


class RawSender:
    """A sender that follows the protocol only as far as a test wants it to."""

    def __init__(self, network: Network, receiver: Receiver) -> None:
        self.transport = network.transport()
        self.receiver = receiver
        self.credits: list[tuple[int, int]] = []
        self.controls: list[wire.Control] = []
        self.welcome: wire.Welcome | None = None
        self.lost = False
        self.link: LoopbackLink = self.transport.connect(receiver.host, receiver.port)

    def hello(self, compatibility: bytes = COMPATIBILITY, **changes: object) -> "RawSender":
        base = wire.Hello(
            instance=PREFILL.instance,
            epoch=PREFILL.epoch,
            rank=0,
            target_epoch=DECODE.epoch,
            target_rank=0,
            token=DECODE.token,
            data_address=self.transport.data_address,
        )
        hello = replace(base, **changes)  # type: ignore[arg-type]
        self.link.send_control(wire.encode_hello(hello, compatibility))
        return self

    def up(self) -> "RawSender":
        """Say hello and wait for welcome and credits."""
        self.hello()
        self.until(lambda: self.credits)
        assert self.welcome is not None
        self.link.open_data(self.welcome.data_address)
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

    def piece(self, *, fill: int = 1, checksum: bool = True, **changes: object) -> wire.DataHeader:
        """Send one block of one layer into the next granted slot."""
        self.until(lambda: self.credits)
        slot, generation = self.credits.pop(0)
        base = wire.DataHeader(
            epoch=DECODE.epoch,
            transfer_id=1,
            nonce=NONCE,
            source_rank=0,
            slot=slot,
            generation=generation,
            sequence=0,
            layers=Span(0, 1),
            heads=Span(0, 2),
            tokens=Span(0, 16),
            payload_bytes=2 * 2 * 16 * 8 * 2,
        )
        header = replace(base, **changes)  # type: ignore[arg-type]
        message = np.full(wire.HEADER_BYTES + header.payload_bytes, fill, dtype=np.uint8)
        wire.seal(memoryview(message.data), header, checksum=checksum)
        assert self.welcome is not None
        tag = wire.data_tag(DECODE.epoch, self.welcome.connection, slot, generation)
        self.link.send(tag, message, None)
        return header

    def settled(self) -> None:
        """Wait until every slot has been given back."""
        self.until(lambda: len(self.credits) == QUICK.slots_per_connection)
