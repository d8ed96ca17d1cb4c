"""One connection of a sender that knows the protocol and does not keep to it.

Owns its links, its memory and what an honest sender would say; what is sent is up to the test.
"""

import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from kvtransfer import SharedRegion, Span, wire
from kvtransfer.header import MEANT, DataHeader, manifest_crc, seal
from kvtransfer.layout import uniform
from kvtransfer.loopback import LoopbackLink, Network
from kvtransfer.settings import Lane
from kvtransfer.shared import Lease, boot_id
from kvtransfer.slots import data_tag
from kvtransfer.transport import ControlArrived
from tests.unit.kvtransfer.agents import (
    COMPATIBILITY,
    DECODE,
    KINDS,
    QUICK,
    SHAPE,
    WAIT_S,
    Receiver,
)
from tests.unit.kvtransfer.siege import Breach

LAYOUT = uniform(SHAPE, 16)
TOTAL = 64
BLOCKS, TOKENS = 2, 32
SLOTS = 24
# Nothing may expire while the test itself is held up.
SETTINGS = replace(
    QUICK, slots_per_connection=SLOTS, heartbeat_s=5.0, credit_stall_s=WAIT_S, ack_s=WAIT_S
)


@dataclass(frozen=True)
class Grant:
    """One transfer: who may send it, and where it goes."""

    transfer_id: int
    nonce: bytes
    instance: str
    blocks: tuple[int, ...]
    lease: Lease


@dataclass(frozen=True)
class Piece:
    """A header and the bytes it stands for; slot and generation come when it is sent."""

    header: DataHeader
    payload: bytes


Frame = Piece | wire.Control


class RawSender:
    """One connection of a sender that knows the protocol and does not keep to it."""

    def __init__(self, network: Network, receiver: Receiver, lane: Lane, instance: str) -> None:
        self.lane, self.instance = lane, instance
        self._network, self._receiver = network, receiver
        self._transport = network.transport()
        self.region = SharedRegion()
        kv = receiver.memory.kv
        self.memory = self.region.allocate(kv.shape, kv.dtype)
        words = self.memory.view(torch.int16)
        values = torch.arange(words.numel()) + len(instance)  # which differs between senders
        words.copy_(values.view(words.shape))
        self.words = words.numpy()
        self.link: LoopbackLink | None = None
        self._number = 0
        self._credits: list[tuple[int, int]] = []

    @property
    def alive(self) -> bool:
        """Whether there is a link that neither side has closed."""
        return self.link is not None and self.link.far is not None

    @property
    def credits(self) -> int:
        """Messages that may still be sent."""
        self._hear()
        return len(self._credits)

    def hello(self) -> wire.Hello:
        """What this sender truly is."""
        mapped = self.lane == "mapped"
        return wire.Hello(
            instance=self.instance,
            epoch=3,
            rank=0,
            target_epoch=DECODE.epoch,
            target_rank=0,
            token=DECODE.token,
            lanes=frozenset({KINDS[self.lane]}),
            boot_id=boot_id(),
            data_address=self._transport.data_address if self.lane == "ucx" else b"",
            share=self.region.handle if mapped else None,
            offsets=((self.region.offset_of(self.memory), self.memory.shape[2]),) if mapped else (),
        )

    def connect(self, hello: bytes | None = None) -> None:
        """Open a new link and say hello; with a given one, nothing is waited for."""
        self.close()
        self._credits.clear()
        self._number = 0
        self.link = self._transport.connect(self._receiver.host, self._receiver.port)
        self.link.send_control(hello or wire.encode_hello(self.hello(), COMPATIBILITY))
        until = time.monotonic() + WAIT_S
        while hello is None and not self._number:
            if time.monotonic() > until or not self.alive:
                raise Breach("an honest hello is not answered")
            self._hear(0.05)
        if self.lane == "ucx" and hello is None:
            self.link.tagged.open(self._address)
            while len(self._credits) < SLOTS:
                self._hear(0.05)

    def _hear(self, timeout_s: float = 0.0) -> None:
        for happening in self._transport.poll(timeout_s):
            if not isinstance(happening, ControlArrived) or happening.link is not self.link:
                continue
            match wire.decode(happening.message):
                case wire.Welcome(connection, data_address=address):
                    self._number, self._address = connection, address
                case wire.Credit(slots):
                    self._credits += slots
                case _:
                    pass

    def script(self, grant: Grant) -> list[Frame]:
        """Return all that an honest sender would send under a grant."""
        frames: list[Frame] = []
        if self.lane == "mapped":
            frames.append(
                wire.Table(grant.transfer_id, grant.nonce, grant.lease, 0, 0, grant.blocks)
            )
        checksums: list[int] = []
        for layer in range(SHAPE.layers):
            for index, block in enumerate(grant.blocks):
                payload = self.words[layer, :, block].tobytes()
                header = DataHeader(
                    epoch=DECODE.epoch,
                    transfer_id=grant.transfer_id,
                    nonce=grant.nonce,
                    source_rank=0,
                    slot=0,
                    generation=0,
                    sequence=len(checksums),
                    group=0,
                    layers=Span(layer, layer + 1),
                    heads=Span(0, 2),
                    tokens=Span(index * 16, index * 16 + 16),
                    payload_bytes=len(payload),
                )
                frames.append(Piece(header, payload))
                checksums.append(0)
        frames.append(wire.Heartbeat())
        return frames

    def manifest(self, grant: Grant, crcs: list[int], size: int) -> wire.Manifest:
        """Return the manifest of pieces that were sent with these checksums."""
        return wire.Manifest(
            grant.transfer_id, DECODE.epoch, grant.nonce, 0, len(crcs), size, manifest_crc(crcs)
        )

    def render(self, frame: Frame) -> tuple[bytes, bytes, tuple[int, int]]:
        """Return (head or message, payload, slot and generation); takes a credit where needed."""
        if not isinstance(frame, Piece):
            return wire.encode(frame), b"", (0, 0)
        slot = (0, 0)
        if self.lane == "ucx":
            slot = self._credits.pop(0)
        header = replace(frame.header, slot=slot[0], generation=slot[1])
        head, _ = seal(header, (memoryview(frame.payload),), checksum=True)
        return head, frame.payload, slot

    def send(self, frame: Frame) -> int:
        """Send a frame as it should be; return its checksum."""
        head, payload, slot = self.render(frame)
        self.put(isinstance(frame, Piece), head, payload, slot)
        return int.from_bytes(head[72:76], "little") if isinstance(frame, Piece) else 0

    def put(self, is_piece: bool, head: bytes, payload: bytes, slot: tuple[int, int]) -> None:
        """Send bytes as they are, where a piece or a control message belongs."""
        link = self.link
        assert link is not None
        if not is_piece:
            link.send_control(head)
        elif self.lane == "mapped":
            link.send_control(bytes((wire.Kind.PIECE,)) + head)
        elif self.lane == "stream":
            link.stream.send((memoryview(head + payload + MEANT),), None)
        else:
            # A worker of its own for each link: no other one's tags can be reached.
            tag = data_tag(DECODE.epoch, self._number, slot[0] % 64, slot[1] % (1 << 26))
            link.tagged.send(tag, np.frombuffer(head + payload, np.uint8), None)

    @property
    def unread(self) -> bool:
        """Whether the receiver still has bytes of the stream before it that it asks for."""
        with self._network.lock:
            far = self.link.far if self.link else None
            return far is not None and bool(far.stream._arrived) and bool(far.stream._in)

    def close(self) -> None:
        """Close the link, if there is one."""
        if self.link is not None:
            self.link.close()
            self._network.streams.remove(self.link.stream)
            self._transport._links.remove(self.link)
            self.link = None
