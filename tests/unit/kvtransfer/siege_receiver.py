"""A live receiver, raw senders that change what they send, and an honest one among them.

Every changed message meets an open connection and, most often, an open grant. Whatever it does to
its own transfer and connection, no other block, transfer or connection may notice.
"""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kvtransfer import (
    Closed,
    Completed,
    Failed,
    Identity,
    PeerUp,
    ReceiveGrant,
    Span,
    TransferEvent,
    wire,
)
from kvtransfer.loopback import Network
from kvtransfer.settings import Lane
from kvtransfer.shared import Lease
from tests.unit.kvtransfer.agents import (
    COMPATIBILITY,
    DECODE,
    SHAPE,
    WAIT_S,
    Receiver,
    Sender,
    address,
    eventually,
    one,
)
from tests.unit.kvtransfer.layouts import whole
from tests.unit.kvtransfer.mutation import (
    changed_bytes,
    changed_field,
    changed_head,
    encodable,
)
from tests.unit.kvtransfer.raw_sender import (
    BLOCKS,
    LAYOUT,
    SETTINGS,
    SLOTS,
    TOKENS,
    TOTAL,
    Frame,
    Grant,
    Piece,
    RawSender,
)
from tests.unit.kvtransfer.siege import Breach, Tally, Watch

HONEST = Identity(instance="honest", epoch=3, compatibility=COMPATIBILITY, token=b"")
HONEST_EVERY = 100


class ReceiverSiege:
    """One receiver, two raw senders, and an honest one."""

    def __init__(self, lane: Lane, seed: int) -> None:
        self.rng = random.Random(f"{seed} receiver {lane}")
        self.lane = lane
        self.network = Network()
        self.tally = Tally()
        self.receiver = Receiver.start(self.network, LAYOUT, TOTAL, settings=SETTINGS)
        self.words = self.receiver.memory.kv.view(torch.int16).numpy()
        self.want = self.words.copy()
        self.watch = Watch(self._over)
        self.receiver.agent._on_event = self.watch
        self.honest = Sender.start(
            self.network, LAYOUT, TOTAL, settings=SETTINGS, identity=HONEST, seed=5
        )
        self.honest.agent.connect(address([self.receiver], LAYOUT))
        self.honest.events.wait(PeerUp)
        self.raws = [
            RawSender(self.network, self.receiver, lane, name) for name in ("prefill", "other")
        ]
        taken = set(self.receiver.memory.block_ids)
        self._spare = [b for b in range(self.words.shape[2]) if b not in taken]
        self._open: dict[int, Grant] = {}
        self._past = [self._grant(self.raws[0])]
        self._ids = 1000
        self._rounds = 0
        self._true = True
        self._lent: tuple[RawSender, Lease] | None = None

    # ---------------------------------------------------------------------------------- rounds

    def _grant(self, raw: RawSender) -> Grant:
        self._ids = getattr(self, "_ids", 0) + 1
        return Grant(
            self._ids,
            self.rng.randbytes(16),
            raw.instance,
            tuple(self.rng.sample(self._spare, BLOCKS)),
            raw.region.lease(),
        )

    def round(self) -> None:
        """One transfer with one changed message in it, sometimes ahead of it a changed hello."""
        rng = self.rng
        raw, other = rng.sample(self.raws, 2)
        for each in (raw, other):
            if not each.alive or (self.lane == "ucx" and each.credits < SLOTS // 2):
                each.connect()
        if rng.random() < 0.05:
            self._changed_hello(raw)
        grant = self._grant(raw)
        self._open = {grant.transfer_id: grant}
        self._open_grant(grant)
        self._play(raw, other, grant)
        self._settle(raw, other)
        self.receiver.agent.revoke(grant.transfer_id)
        self._settle(raw, other)
        raw.region.end(grant.lease)
        if self._lent is not None:
            self._lent[0].region.end(self._lent[1])
            self._lent = None
        self._past.append(grant)
        self._past = self._past[-20:]
        self._rounds += 1
        self.check(grant)
        if not self._rounds % HONEST_EVERY:
            self.honest_transfer()

    def _open_grant(self, grant: Grant, **changes: Any) -> None:
        base = ReceiveGrant(
            transfer_id=grant.transfer_id,
            epoch=DECODE.epoch,
            nonce=grant.nonce,
            tokens=Span(0, TOKENS),
            total_tokens=TOKENS,
            block_ids=(grant.blocks,),
            source_layout=one(LAYOUT),
            source_instance=grant.instance,
            ttl_s=WAIT_S,
        )
        self.receiver.agent.open(replace(base, **changes))

    def _play(self, raw: RawSender, other: RawSender, grant: Grant) -> None:
        """Send a transfer, at one place of it something wrong, and most often what follows."""
        rng = self.rng
        script = raw.script(grant)
        at = rng.randrange(len(script) + 1)
        go_on = rng.random() < 0.7
        crcs: list[int] = []
        size = 0
        for place, frame in enumerate((*script, None)):
            if place == at:
                self._wrong(raw, other, grant, frame or raw.manifest(grant, crcs, size))
                if not go_on:
                    return
                if rng.random() < 0.5:
                    continue
            crc = raw.send(frame or raw.manifest(grant, crcs, size))
            if isinstance(frame, Piece):
                crcs.append(crc)
                size += len(frame.payload)

    def _wrong(self, raw: RawSender, other: RawSender, grant: Grant, frame: Frame) -> None:
        """Send something that is almost `frame`, or not at all."""
        ways = (self._bytes, self._bytes, self._field, self._field, self._cross, self._strange)
        way = self.rng.choice((*ways, self._replay, self._twice))
        # Whoever lies about a piece and seals the lie cannot be found out.
        self._true = not (way == self._field and isinstance(frame, Piece))
        self.tally.note(f"{way.__name__} of {type(frame).__name__}, seen as {frame!r:.300}")
        way(raw, other, grant, frame)

    def _bytes(self, raw: RawSender, _: RawSender, grant: Grant, frame: Frame) -> None:
        """Change bytes anywhere in the message."""
        head, payload, slot = raw.render(frame)
        if not isinstance(frame, Piece):
            raw.put(False, changed_bytes(self.rng, head), b"", slot)
        elif self.lane == "mapped":
            raw.put(True, changed_bytes(self.rng, head), b"", slot)
        else:
            raw.put(True, changed_bytes(self.rng, head + payload), b"", slot)

    def _field(self, raw: RawSender, _: RawSender, grant: Grant, frame: Frame) -> None:
        """Change a field and send the rest as if it were right; in a slot maybe another one's."""
        head, payload, slot = raw.render(frame)
        if isinstance(frame, Piece):
            head = changed_head(self.rng, head, (memoryview(payload),))
            if self.rng.random() < 0.2:
                slot = (slot[0] + self.rng.randrange(2), slot[1] + self.rng.randrange(2))
        else:
            head = encodable(self.rng, frame, changed_field, wire.encode)
        raw.put(isinstance(frame, Piece), head, payload, slot)

    def _cross(self, raw: RawSender, other: RawSender, grant: Grant, frame: Frame) -> None:
        """Send it on another instance's connection, or in another transfer's name.

        What another instance sends, and what bears a wrong nonce, are other bytes.
        """
        if self.rng.random() < 0.5:
            for each in self._of_another(other, grant) if isinstance(frame, Piece) else [frame]:
                other.send(each)
            return
        stolen = self.rng.choice(self._past)
        if isinstance(frame, Piece):
            header, what = frame.header, self.rng.randrange(3)
            if what != 0:
                header = replace(header, transfer_id=stolen.transfer_id)
            if what != 1:
                header = replace(header, nonce=stolen.nonce)
            frame = Piece(header, bytes(len(frame.payload)))
        elif isinstance(frame, wire.Manifest | wire.Table):
            frame = replace(frame, transfer_id=stolen.transfer_id)
        raw.send(frame)

    def _of_another(self, other: RawSender, grant: Grant) -> list[Frame]:
        """Return what another instance sends under a grant that it has got hold of."""
        self._lent = other, other.region.lease()
        table, *pieces = other.script(replace(grant, lease=self._lent[1]))
        piece = self.rng.choice(pieces[: SHAPE.layers])
        return [table, piece] if self.lane == "mapped" else [piece]

    def _replay(self, raw: RawSender, other: RawSender, grant: Grant, frame: Frame) -> None:
        """Send part of a transfer that is over."""
        for old in self.rng.sample(raw.script(self.rng.choice(self._past)), 3):
            raw.send(old)

    def _twice(self, raw: RawSender, other: RawSender, grant: Grant, frame: Frame) -> None:
        raw.send(frame)
        raw.send(frame)

    def _strange(self, raw: RawSender, other: RawSender, grant: Grant, frame: Frame) -> None:
        """Send something that is not for a receiver, or for none at this point."""
        rng = self.rng
        nonce = rng.choice((grant.nonce, rng.randbytes(16)))
        number = rng.getrandbits(32)
        raw.send(
            rng.choice(
                (
                    wire.Abort(grant.transfer_id, nonce),
                    wire.Abort(self._past[-1].transfer_id, self._past[-1].nonce),
                    wire.Ack(grant.transfer_id, nonce),
                    wire.Fail(grant.transfer_id, nonce, rng.randrange(256), "why not"),
                    wire.Credit(((number % 64, 1), (number % 7, 2))),
                    wire.Taken(number),
                    wire.Ping(number, rng.choice((0, 1, number))),
                    wire.Pong(number, number),
                    wire.Refused(rng.randrange(256), "no"),
                    wire.Table(grant.transfer_id, nonce, grant.lease, 0, number % 3, (number,)),
                    wire.Bye(),
                )
            )
        )

    def _changed_hello(self, raw: RawSender) -> None:
        # Under a name of its own: a later epoch is believed of whoever shows the token.
        hello = replace(raw.hello(), instance=f"stranger-{self.tally.count}")
        if self.rng.random() < 0.5:
            said = changed_bytes(self.rng, wire.encode_hello(hello, COMPATIBILITY))
        else:
            said = encodable(
                self.rng, hello, changed_field, lambda h: wire.encode_hello(h, COMPATIBILITY)
            )
        self.tally.note(f"hello {said!r}")
        raw.connect(said)
        self._settle(raw)
        raw.connect()

    # ----------------------------------------------------------------------------------- checks

    def _settle(self, *raws: RawSender) -> None:
        """Wait until the receiver has looked at everything."""
        self.watch.fence(self.receiver.agent.revoke)
        while any(raw.unread for raw in raws):
            self.watch.fence(self.receiver.agent.revoke)

    def _over(self, transfer_id: int) -> None:
        """From the agent's thread: what an ended transfer's blocks hold now, they hold for good."""
        grant = self._open.pop(transfer_id, None)
        if grant is not None:
            blocks = list(grant.blocks)
            self.want[:, :, blocks] = self.words[:, :, blocks]

    def check(self, grant: Grant) -> None:
        """Raise Breach where another block was touched, or one after its transfer's end."""
        said = self.watch.said.pop(grant.transfer_id, [])
        blocks = list(grant.blocks)
        if self._true:
            self._check_claims(grant, said)
        if [type(e) for e in said].count(Closed) != 1 or len(said) > 2:
            raise Breach(f"not one end and one answer: {said}; {self.tally.last}")
        differ = (self.words != self.want).any(axis=(0, 1, 3, 4, 5))
        if differ.any():
            touched = np.flatnonzero(differ).tolist()
            raise Breach(f"blocks {touched} were touched; granted {blocks}; {self.tally.last}")

    def _check_claims(self, grant: Grant, said: list[TransferEvent]) -> None:
        """Raise Breach where bytes are said to be there that its own sender does not have."""
        owner = next(raw for raw in self.raws if raw.instance == grant.instance)
        for event in said:
            kept = (TOKENS,) * SHAPE.layers if isinstance(event, Completed) else ()
            if isinstance(event, Failed) and event.kept:
                kept = event.kept[0]
            for layer, tokens in enumerate(kept):
                blocks = list(grant.blocks[: tokens // 16])
                if (self.want[layer, :, blocks] != owner.words[layer, :, blocks]).any():
                    raise Breach(f"{event} claims wrong bytes in {blocks}; {self.tally.last}")

    def honest_transfer(self) -> None:
        """Move a sequence on the honest connection, which must have stood all along."""
        self._ids += 1
        nonce = self.rng.randbytes(16)
        base = self.receiver.grant(self._ids, LAYOUT, source_instance="honest", nonce=nonce)
        self._open = {}
        blocks = self.receiver.memory.block_ids
        self.words[:, :, blocks] = -7
        self.receiver.agent.open(base)
        self.honest.agent.begin(self.honest.transfer(self._ids, LAYOUT, nonce=nonce))
        self.honest.all_ready(self._ids)
        self.honest.events.wait(Completed, lambda e: e.transfer_id == self._ids)
        self._settle()
        if not isinstance(self.watch.outcome(self._ids), Completed):
            raise Breach(f"an honest transfer did not complete; {self.tally.last}")
        found = self.receiver.memory.kv[:, :, blocks].permute(0, 1, 3, 2, 4, 5)
        if not torch.equal(found.reshape(4, 2, 2, 64, 8), whole(SHAPE, TOTAL, 5)):
            raise Breach(f"an honest transfer arrived damaged; {self.tally.last}")
        self.want[:, :, blocks] = self.words[:, :, blocks]

    def close(self) -> None:
        """End everything; every slot has been given back."""
        for raw in self.raws:
            raw.close()
            raw.region.close()
        eventually(lambda: self.receiver.agent.stats().connections == 1)
        eventually(lambda: set(self.receiver.agent.stats().slots) <= {"granted"})
        self.honest.agent.close()
        self.receiver.agent.close()
        self.honest.region.close()
