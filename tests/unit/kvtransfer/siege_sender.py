"""A live sender, raw receivers that change what they answer, and an honest one.

Whatever a receiver says, the sender's memory stays as it is, a transfer counts as complete only if
it was acknowledged, and what was lent is given back.
"""

import random
import time
from dataclasses import replace

import numpy as np
import torch

from kvtransfer import Closed, Completed, PeerAddress, PeerUp, wire
from kvtransfer.loopback import LoopbackLink, Network
from kvtransfer.settings import Lane
from kvtransfer.slots import data_tag
from kvtransfer.transport import Accepted, Bytes, ControlArrived, Done
from tests.unit.kvtransfer.agents import (
    COMPATIBILITY,
    DECODE,
    KINDS,
    WAIT_S,
    Receiver,
    Sender,
    address,
    one,
)
from tests.unit.kvtransfer.mutation import changed_bytes, changed_field, encodable
from tests.unit.kvtransfer.raw_sender import LAYOUT, SETTINGS, SLOTS, TOTAL
from tests.unit.kvtransfer.siege import Breach, Tally, Watch

HONEST_EVERY = 100
PROBED = replace(SETTINGS, probe_bytes=8192)


class RawReceiver:
    """A listener that answers as the protocol wants it, or almost."""

    def __init__(self, network: Network, lane: Lane) -> None:
        self.lane = lane
        self.transport = network.transport()
        self.host, self.port = self.transport.listen("127.0.0.1", 0)
        self.link: LoopbackLink | None = None
        self.heard: list[wire.Control] = []
        self.saw_hello = False
        self.landed = 0
        self._generation = 0

    @property
    def alive(self) -> bool:
        """Whether there is a link that neither side has closed."""
        return self.link is not None and self.link.far is not None

    def hear(self, timeout_s: float = 0.0) -> None:
        """Take what has come: control messages, and slots that were filled."""
        for happening in self.transport.poll(timeout_s):
            match happening:
                case Accepted(LoopbackLink() as link):
                    self.drop()
                    self.link, self.saw_hello = link, False
                case ControlArrived(link, message) if link is self.link:
                    self._heard(message)
                case Done(link) if link is self.link:
                    self.landed += 1
                case _:
                    pass
        if self.link is not None:
            self.link.stream._arrived.clear()

    def _heard(self, message: bytes) -> None:
        if not self.saw_hello:
            wire.decode_hello(message, COMPATIBILITY)
            self.saw_hello = True
        else:
            self.heard.append(wire.decode(message))

    def wait_for_hello(self) -> None:
        """Wait until a sender has connected and said who it is."""
        until = time.monotonic() + WAIT_S
        while not (self.alive and self.saw_hello):
            if time.monotonic() > until:
                raise Breach("no sender says hello")
            self.hear(0.05)

    def welcome(self) -> wire.Welcome:
        """Return the answer that lets the sender begin."""
        return wire.Welcome(
            connection=1,
            epoch=DECODE.epoch,
            lane=KINDS[self.lane],
            window=SLOTS if self.lane == "ucx" else SETTINGS.window,
            slot_bytes=SETTINGS.slot_bytes,
            checksum=True,
            data_address=self.transport.data_address if self.lane == "ucx" else b"",
        )

    def credit(self, count: int) -> wire.Credit:
        """Return the grant of so many slots, after posting their receives."""
        assert self.link is not None
        slots = []
        for slot in range(count):
            self._generation += 1
            buffer: Bytes = np.zeros(SETTINGS.slot_bytes + 128, np.uint8)
            tag = data_tag(DECODE.epoch, 1, slot, self._generation)
            self.link.tagged.receive(tag, buffer, None)
            slots.append((slot, self._generation))
        return wire.Credit(tuple(slots))

    def say(self, message: bytes) -> None:
        """Send a control message as it is."""
        if self.link is not None:
            self.link.send_control(message)

    def drop(self) -> None:
        """Close the link, if there is one."""
        if self.link is not None:
            self.link.close()
            self.transport.network.streams.remove(self.link.stream)
            self.transport._links.remove(self.link)
        self.link = None
        self.heard.clear()
        self.landed = 0
        self.transport._unexpected.clear()


class SenderSiege:
    """One sender, a raw receiver that goes by ever new names, and an honest one."""

    def __init__(self, lane: Lane, seed: int) -> None:
        self.rng = random.Random(f"{seed} sender {lane}")
        self.lane = lane
        self.tally = Tally()
        self.network = Network()
        self.watch = Watch()
        self.sender = Sender.start(self.network, LAYOUT, TOTAL, settings=PROBED, seed=5)
        self.honest = Receiver.start(self.network, LAYOUT, TOTAL, settings=PROBED)
        self.sender.agent.connect(address([self.honest], LAYOUT))
        self.sender.events.wait(PeerUp)
        self.sender.agent._on_event = self.watch
        self.words = self.sender.memory.kv.view(torch.int16).numpy()
        self.before = self.words.copy()
        self.raw = RawReceiver(self.network, lane)
        self._names = 0
        self._ids = 0
        self._rounds = 0
        self._past: list[tuple[int, bytes]] = [(1, bytes(16))]
        self._said: set[bytes] = set()

    # ---------------------------------------------------------------------------------- rounds

    @property
    def name(self) -> str:
        """What the raw receiver is called now."""
        return f"raw-{self._names}"

    def _connect(self) -> None:
        """Have the sender connect anew, at once, and welcome it, now and then wrongly."""
        self.sender.agent.forget(self.name)
        self.raw.drop()
        self._names += 1
        self.sender.agent.connect(
            PeerAddress(
                instance=self.name,
                epoch=DECODE.epoch,
                layout=one(LAYOUT),
                ranks=((0, self.raw.host, self.raw.port),),
                token=DECODE.token,
            )
        )
        self.raw.wait_for_hello()
        welcome = self.raw.welcome()
        if self.rng.random() < 0.3:
            self._say_changed(welcome)
        else:
            self.raw.say(wire.encode(welcome))
        if self.lane == "ucx":
            self.raw.say(wire.encode(self.raw.credit(SLOTS)))
        self._settle()

    def round(self) -> None:
        """One transfer, and among the answers to it a wrong one."""
        rng = self.rng
        if not self.raw.alive or rng.random() < 0.02:
            self._connect()
        self._ids += 1
        self._said.clear()
        transfer_id, nonce = self._ids, rng.randbytes(16)
        begun = self.sender.transfer(transfer_id, LAYOUT, nonce=nonce, target_instance=self.name)
        self.sender.agent.begin(begun)
        self.sender.all_ready(transfer_id)
        self._settle()
        answers = self._answers(transfer_id, nonce)
        at = rng.randrange(len(answers) + 1)
        for place, answer in enumerate((*answers, wire.Heartbeat())):
            if place == at:
                self._wrong(transfer_id, nonce, answer)
            if place != at or rng.random() < 0.5:
                self._say(wire.encode(answer))
        self._settle()
        self.sender.agent.abort(transfer_id)
        self._settle()
        self._past = [*self._past[-20:], (transfer_id, nonce)]
        self._rounds += 1
        self.check(transfer_id, nonce)
        if not self._rounds % HONEST_EVERY:
            self.honest_transfer()

    def _answers(self, transfer_id: int, nonce: bytes) -> list[wire.Control]:
        """Return what an honest receiver would answer to what was heard."""
        answers: list[wire.Control] = []
        heard, self.raw.heard = self.raw.heard, []
        pieces = 0
        for message in heard:
            match message:
                case wire.Piece():
                    pieces += 1
                case wire.Ping(number, _):
                    answers.append(wire.Pong(number, 1))
                case wire.Manifest():
                    answers.append(wire.Ack(transfer_id, nonce))
                case _:
                    pass
        if pieces:
            answers.insert(0, wire.Taken(pieces))
        if self.raw.landed:
            answers.insert(0, self.raw.credit(self.raw.landed))
            self.raw.landed = 0
        return answers

    def _wrong(self, transfer_id: int, nonce: bytes, answer: wire.Control) -> None:
        """Say something that is almost `answer`, or of another transfer, or senseless."""
        rng = self.rng
        what = rng.randrange(4)
        if what < 2:
            self._say_changed(answer)
        elif what == 2:
            self.tally.note(f"twice {answer!r:.300}")
            self._say(wire.encode(answer))
            self._say(wire.encode(answer))
        else:
            strange = self._strange(transfer_id, nonce)
            self.tally.note(f"strange {strange!r:.300}")
            self._say(wire.encode(strange))

    def _say_changed(self, message: wire.Control) -> None:
        if self.rng.random() < 0.5:
            said = changed_bytes(self.rng, wire.encode(message))
        else:
            said = encodable(self.rng, message, changed_field, wire.encode)
        self.tally.note(f"{said!r:.300}, made of {message!r:.300}")
        self._say(said)

    def _say(self, message: bytes) -> None:
        self._said.add(message)
        self.raw.say(message)

    def _strange(self, transfer_id: int, nonce: bytes) -> wire.Control:
        rng = self.rng
        past_id, past_nonce = rng.choice(self._past)
        number = rng.getrandbits(32)
        return rng.choice(
            (
                wire.Ack(transfer_id, rng.randbytes(16)),
                wire.Ack(past_id, past_nonce),
                wire.Ack(past_id, nonce),
                wire.Fail(past_id, past_nonce, rng.randrange(256), "x"),
                wire.Fail(transfer_id, past_nonce, rng.randrange(256), "x"),
                wire.Fail(transfer_id, nonce, rng.randrange(256), "x" * rng.randrange(512)),
                wire.Abort(transfer_id, nonce),
                wire.Credit(((number, number), (number % 64, 1))),
                wire.Taken(number),
                wire.Taken(0),
                wire.Pong(number % 4, number),
                wire.Ping(number, number),
                wire.Manifest(transfer_id, DECODE.epoch, nonce, 0, 1, 1, 1),
                wire.Refused(rng.randrange(256), "no"),
                self.raw.welcome(),
                wire.Bye(),
            )
        )

    # ----------------------------------------------------------------------------------- checks

    def _settle(self) -> None:
        """Wait until the sender has looked at everything, and hear its answers."""
        self.watch.fence(self.sender.agent.abort)
        self.raw.hear()

    def check(self, transfer_id: int, nonce: bytes) -> None:
        """Raise Breach where a transfer ended wrongly or something was not given back."""
        outcome = self.watch.outcome(transfer_id)
        said = self.watch.said.pop(transfer_id)
        if [type(e) for e in said].count(Closed) != 1:
            raise Breach(f"not one answer to the abort: {said}; {self.tally.last}")
        acked = wire.encode(wire.Ack(transfer_id, nonce)) in self._said
        if isinstance(outcome, Completed) and not acked:
            raise Breach(f"complete without an acknowledgement; {self.tally.last}")
        if not np.array_equal(self.before, self.words):
            raise Breach(f"the sender's memory was changed; {self.tally.last}")
        if self.sender.region.leases:
            raise Breach(f"{self.sender.region.leases} leases still stand; {self.tally.last}")

    def honest_transfer(self) -> None:
        """Move a sequence to the honest receiver, whose connection must have stood all along."""
        self._ids += 1
        nonce = self.rng.randbytes(16)
        self.honest.memory.kv.fill_(-7.0)
        self.honest.agent.open(self.honest.grant(self._ids, LAYOUT, nonce=nonce))
        self.sender.agent.begin(self.sender.transfer(self._ids, LAYOUT, nonce=nonce))
        self.sender.all_ready(self._ids)
        self.honest.events.wait(Completed, lambda e: e.transfer_id == self._ids)
        self._settle()
        arrived = self.honest.memory.kv[:, :, self.honest.memory.block_ids].view(torch.int16)
        sent = self.before[:, :, self.sender.memory.block_ids]
        if not np.array_equal(arrived.numpy(), sent):
            raise Breach(f"an honest transfer arrived damaged; {self.tally.last}")

    def close(self) -> None:
        """End everything."""
        self.raw.drop()
        self.sender.agent.close()
        self.honest.agent.close()
        self.sender.region.close()
