"""Sequences that get each other's blocks while bytes of the one before are still under way.

Owns a prefill and a decode rank over a late network, and the check that nothing foreign ever shows.
Knows nothing of what keeps the agents from harm: tests switch it off.
"""

import math
import random
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvtransfer import (
    Closed,
    Completed,
    Failed,
    Kept,
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
    uniform,
)
from kvtransfer.settings import Lane
from tests.unit.kvtransfer.agents import DECODE, PREFILL, WAIT_S, Events, eventually, one
from tests.unit.kvtransfer.late_network import LateNetwork

Words = npt.NDArray[np.int32]

LAYERS, BLOCK, BLOCKS, TOKENS = 3, 16, 24, 69
NEED = -(-TOKENS // BLOCK)
_TELL_S = 0.2
# Runs of 32 KiB, which go straight from block to block, and of 1 KiB, which are packed.
LONG, SHORT = 256, 8
ENDINGS = ("revoke", "abort", "both", "expire", "cut", "nothing")


class ForeignBytes(AssertionError):
    """Bytes of one sequence showed up in another one's blocks, or passed for it."""


@dataclass
class Move:
    """One transfer of one sequence, and how far it has come on either side."""

    number: int
    source: list[int]
    target: list[int]
    given_on: bool = False
    sent: threading.Event = field(default_factory=threading.Event)
    arrived: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)
    outcome: TransferEvent | None = None


class Stage:
    """One prefill and one decode rank on which sequences follow one another, block upon block."""

    def __init__(self, lane: Lane, *, long: bool, checksum: bool, seed: int) -> None:
        self.lane, self.rng = lane, random.Random(f"{seed} {lane} {long} {checksum}")
        self.network = LateNetwork(random.Random(self.rng.random()))
        self.layout = uniform(
            KVShape(layers=LAYERS, kv_heads=2, head_size=LONG if long else SHORT, dtype="float32"),
            BLOCK,
        )
        layer_bytes = 2 * BLOCK * 2 * self.layout.shape.head_size * 4
        settings = TransferSettings(
            lane=lane,
            checksum=checksum,
            slot_bytes=max(4096, layer_bytes),
            piece_bytes=max(8192, 2 * layer_bytes),
            slots_per_connection=3,
            probe_bytes=0,
            heartbeat_s=0.5,
            credit_stall_s=1.0,
            ack_s=1.0,
        )
        size = (LAYERS, 2, BLOCKS, 2, BLOCK, self.layout.shape.head_size)
        self.region = SharedRegion()
        source = self.region.allocate(size, torch.float32)
        target = torch.zeros(size, dtype=torch.float32)
        self.source: Words = source.view(torch.int32).numpy()
        self.target: Words = target.view(torch.int32).numpy()
        self.want = self.target.copy()
        self.moves: dict[int, Move] = {}
        self.follower: Move | None = None
        self.wrong: list[str] = []
        self.ups = Events()
        self.endings: Sequence[str] = ENDINGS
        self._numbers = 0
        self._ids = 0
        self.plug = self.network.late_transport()
        self.receiver = ReceiveAgent(
            transport=self.plug,
            memories=(target,),
            layout=one(self.layout),
            rank=0,
            identity=DECODE,
            settings=settings,
            on_event=self._at_receiver,
        )
        self.sender = SendAgent(
            transport=self.network.transport(),
            memories=(source,),
            layout=one(self.layout),
            rank=0,
            identity=PREFILL,
            settings=settings,
            on_event=self._at_sender,
            region=self.region,
        )
        host, port = self.receiver.start()
        self.sender.start()
        self.sender.connect(
            PeerAddress(
                instance=DECODE.instance,
                epoch=DECODE.epoch,
                layout=one(self.layout),
                ranks=((0, host, port),),
                token=DECODE.token,
            )
        )
        self.ups.wait(PeerUp)

    # ------------------------------------------------------------------------------- sequences

    def values(self, number: int) -> Words:
        """The words of a sequence's blocks, zero behind its last token; no two sequences agree."""
        size = (LAYERS, 2, NEED, 2, BLOCK, self.layout.shape.head_size)
        words = np.arange(1, math.prod(size) + 1, dtype=np.int32) + np.int32(number << 20)
        words = words.reshape(size)
        words[:, :, -1, :, TOKENS % BLOCK :] = 0
        return words

    def _sequence(self, source: list[int] | None = None, target: list[int] | None = None) -> Move:
        """Return a new sequence in random blocks, or in those of another one."""
        self._numbers = self._numbers % 1000 + 1
        return Move(
            self._numbers,
            source or self.rng.sample(range(BLOCKS), NEED),
            target or self.rng.sample(range(BLOCKS), NEED),
        )

    def _compute(self, move: Move) -> None:
        """Put a sequence into its source blocks, with garbage behind its last token."""
        words = self.values(move.number)
        words[:, :, -1, :, TOKENS % BLOCK :] = -1
        self.source[:, :, move.source] = words

    # ---------------------------------------------------------------------------------- events

    def _at_sender(self, event: TransferEvent) -> None:
        """Give the source blocks to the follower the moment they may be given."""
        self.ups(event)
        if isinstance(event, Completed | Failed | Closed):
            move = self.moves[event.transfer_id]
            follower = self.follower
            if follower is not None and move is not follower and not move.sent.is_set():
                self._compute(follower)
            move.sent.set()
            move.over.set()

    def _at_receiver(self, event: TransferEvent) -> None:
        """Check what is claimed, then give the target blocks to the follower."""
        if not isinstance(event, Completed | Failed | Closed):
            return
        move = self.moves[event.transfer_id]
        if move.arrived.is_set():
            return
        if isinstance(event, Completed):
            self._check_kept(move, ((TOKENS,) * LAYERS,), "completed")
            if self.target[:, :, move.target[-1], :, TOKENS % BLOCK :].any():
                self.wrong.append("something is left behind the last token")
        elif isinstance(event, Failed):
            self._check_kept(move, event.kept, f"kept after {event.error!r}")
        follower = self.follower
        if follower is not None and move is not follower and follower.given_on:
            self.target[:, :, follower.target] = self.values(follower.number)
        move.outcome = event
        move.arrived.set()
        move.over.set()

    def _check_kept(self, move: Move, kept: Kept, claim: str) -> None:
        found = self.target[:, :, move.target].transpose(0, 1, 3, 2, 4, 5)
        words = self.values(move.number).transpose(0, 1, 3, 2, 4, 5)
        for layer, tokens in enumerate(kept[0] if kept else ()):
            is_, was = (
                x[layer].reshape(2, 2, NEED * BLOCK, -1)[:, :, :tokens] for x in (found, words)
            )
            if not np.array_equal(is_, was):
                self.wrong.append(f"layer {layer}, {tokens} tokens, {claim}: not what was sent")

    # ---------------------------------------------------------------------------------- rounds

    def reading(self) -> None:
        """A mapped receiver is about to read: hold it up until the blocks are another's."""
        move = self._first
        if self.rng.random() < 0.3 and move is not None:
            move.sent.wait(0.03)

    _first: Move | None = None

    def rounds(self, count: int) -> None:
        """Play so many rounds; see `round`."""
        for _ in range(count):
            self.round()

    def round(self) -> None:
        """Let one sequence end in some way, and another one have its blocks at once.

        Raises ForeignBytes where anything of the first shows, or was claimed wrongly.
        """
        rng, network = self.rng, self.network
        first = self._first = self._sequence()
        written = rng.random() < 0.5
        ending = rng.choice(self.endings)
        network.most_s = rng.choice((0.0, 0.003, 0.015))
        network.outlive_s = rng.choice((0.0, 0.3)) if ending == "cut" else 0.0
        network.hold_streams = rng.random() < 0.5
        self.plug.linger = True
        self._compute(first)
        follower = self._sequence(first.source, first.target)
        follower.given_on = written
        self.follower = follower
        self._begin(first, ttl_s=0.01 if ending == "expire" else WAIT_S)
        self._pause()
        leave = rng.choice(("before the end", "when given on", "after the end"))
        if ending == "nothing" or leave == "before the end":
            network.release_streams()
        self._end(ending)
        if leave == "when given on":
            first.sent.wait(_TELL_S)
            network.release_streams()
        self._wait(first)
        network.outlive_s = 0.0
        if not written:
            self.move(follower)
        third = self._sequence()
        while set(third.target) & set(first.target):
            third = self._sequence()
        self.follower = self._first = None
        self._drain()
        self._compute(third)
        self.move(third)
        self.want[:, :, follower.target] = self.values(follower.number)
        self.want[:, :, third.target] = self.values(third.number)
        self.check()

    def take_back(self) -> None:
        """Abort while pieces wait to be sent, and let them go while the word of it is under way."""
        first = self._sequence()
        self.follower = self._sequence(first.source)
        self._compute(first)
        self.network.hold_streams = True
        self.network.delay_control(0.3)
        self._begin(first)
        eventually(lambda: self.network.holds)
        self.sender.abort(self._current)
        assert first.sent.wait(WAIT_S)
        self._drain()
        self._wait(first)
        if self.wrong:
            raise ForeignBytes(self.wrong)

    def check(self) -> None:
        """Raise ForeignBytes where the receiver's memory is not what it must be."""
        if self.wrong:
            raise ForeignBytes(self.wrong)
        differ = (self.target != self.want).any(axis=(0, 1, 3, 4, 5))
        if differ.any():
            raise ForeignBytes(f"foreign bytes in blocks {np.flatnonzero(differ).tolist()}")

    def move(self, move: Move) -> None:
        """Move a sequence, again where a broken link was in the way; ForeignBytes if wrong."""
        for _ in range(6):
            self._begin(move)
            self._pause()
            self.network.release_streams()
            self._wait(move)
            if self.wrong or isinstance(move.outcome, Completed):
                return
            for event in (move.sent, move.arrived, move.over):
                event.clear()
        raise AssertionError(f"a clean transfer fails again and again: {move.outcome}")

    def _begin(self, move: Move, ttl_s: float = WAIT_S) -> None:
        """Open the grant and send, layer by layer."""
        self._ids += 1
        self._current = self._ids
        self.moves[self._ids] = move
        self.moves.pop(self._ids - 50, None)
        common: dict[str, Any] = {
            "transfer_id": self._ids,
            "epoch": DECODE.epoch,
            "nonce": self.rng.randbytes(16),
            "tokens": Span(0, TOKENS),
            "total_tokens": TOKENS,
        }
        short = self.rng.choice((("r",), ("s",), ("r", "s")))
        self.receiver.open(
            ReceiveGrant(
                **common,
                block_ids=(move.target,),
                source_layout=one(self.layout),
                source_instance=PREFILL.instance,
                ttl_s=ttl_s if "r" in short else WAIT_S,
            )
        )
        self.sender.begin(
            SendTransfer(
                **common,
                block_ids=(move.source,),
                target_layout=one(self.layout),
                target_instance=DECODE.instance,
                ttl_s=ttl_s if "s" in short else WAIT_S,
            )
        )
        for layer in range(LAYERS):
            self.sender.ready(self._ids, Span(layer, layer + 1), Span(0, TOKENS))

    def _end(self, ending: str) -> None:
        if ending in ("revoke", "both"):
            self.receiver.revoke(self._current)
        if ending in ("abort", "both"):
            self.sender.abort(self._current)
        if ending == "cut":
            self.network.cut()

    def _pause(self) -> None:
        time.sleep(self.rng.choice((0.0, self.rng.random() * 0.01)))

    def _wait(self, move: Move) -> None:
        """Wait until both sides are done with a transfer.

        Where one has failed and the link is gone on which it told the other, the control path ends
        it there.
        """
        assert move.over.wait(WAIT_S), f"transfer {self._current} never ended"
        for side, end in ((move.sent, self.sender.abort), (move.arrived, self.receiver.revoke)):
            if not side.wait(_TELL_S):
                end(self._current)
            assert side.wait(WAIT_S), f"transfer {self._current} never ended"

    def _drain(self) -> None:
        """Wait until nothing is under way any more."""
        self.network.release_streams()
        eventually(lambda: not self.plug.awaits)
        self.plug.let_go()
        self.network.most_s = 0.0

    def close(self) -> None:
        """End both agents; every slot and lease has been given back."""
        with suppress(AssertionError):
            self._drain()
        self.sender.close()
        self.receiver.close()
        leases = self.region.leases
        self.region.close()
        assert not leases

    def slots_become_whole(self) -> None:
        """Wait until every slot is one that an open connection has granted, or none is left."""
        eventually(lambda: set(self.receiver.stats().slots) <= {"granted"})
