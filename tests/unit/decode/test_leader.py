"""The ranks of a decode instance take a sequence's KV and step with it as one."""

import asyncio
from collections.abc import Collection
from typing import Any

import pytest

from decode.admission import Admission
from decode.compute import Part, Row
from decode.config import DecodeConfig
from decode.leader import GroupReceiver, OtherRanks
from decode.orders import NOTHING, Order, Placing
from decode.prefixes import Prefixes
from decode.rank_wire import (
    loads_from_wire,
    loads_to_wire,
    order_from_wire,
    part_from_wire,
    part_to_wire,
    placing_from_wire,
    placing_to_wire,
    receive_from_wire,
    receive_to_wire,
    rows_from_wire,
    sequence_from_wire,
    sequence_to_wire,
    step_to_wire,
)
from decode.sequence import Reservation, SequenceRecord
from engine.blocks import BlockPool
from engine.sampling import Sampled, SamplingParams, TokenLogprobs
from engine.stopping import StopCriteria
from kvtransfer import (
    Closed,
    Completed,
    Failed,
    KVShape,
    ReceiveGrant,
    Span,
    TransferStats,
    uniform_cache,
)
from kvtransfer.errors import PeerLost
from service.ranks.leader import Message

SETTINGS = DecodeConfig(model="m", dp=2, tp=2)  # type: ignore[arg-type]
LAYOUT = uniform_cache((KVShape(layers=2, kv_heads=2, head_size=8, dtype="float32"),), 4)
PLACING = Placing(number=3, layer=40, slots=((0, 2), (1, 3)))
STATS = TransferStats(1, 1, 0.1, "tcp")


def grant(transfer_id: int) -> ReceiveGrant:
    return ReceiveGrant(
        transfer_id=transfer_id,
        epoch=6,
        nonce=bytes(16),
        tokens=Span(0, 9),
        total_tokens=9,
        block_ids=((4, 1, 0),),
        source_layout=LAYOUT,
        source_instance="prefill",
        ttl_s=3.0,
        kept=((4, 0),),
    )


class FakeAgent:
    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def open(self, grant: ReceiveGrant) -> None:
        self.calls.append(("open", grant.transfer_id))

    def revoke(self, transfer_id: int) -> None:
        self.calls.append(("revoke", transfer_id))


class FakeFollowers:
    def __init__(self) -> None:
        self.told: list[tuple[str | None, list[int] | None]] = []

    def tell(self, message: Message, ranks: Collection[int] | None = None) -> None:
        kind = message.WhichOneof("kind")
        self.told.append((kind, list(ranks) if ranks is not None else None))


class Group:
    def __init__(self) -> None:
        self.agent, self.followers = FakeAgent(), FakeFollowers()
        self.ends: list[Any] = []
        self.receiver = GroupReceiver(
            SETTINGS,
            self.agent,  # type: ignore[arg-type]
            self.followers,  # type: ignore[arg-type]
            self.ends.append,
        )

    async def open(self, transfer_id: int, dp_rank: int) -> None:
        opening = asyncio.ensure_future(self.receiver.open(grant(transfer_id), dp_rank))
        await asyncio.sleep(0)
        for rank in self.receiver.ranks_of(dp_rank):
            if rank:
                assert not opening.done()
                self.receiver.opened(rank, transfer_id)
        await opening


async def test_grant_is_out_when_all_ranks_of_the_dp_rank_take_it() -> None:
    group = Group()
    await group.open(1, dp_rank=0)
    await group.open(2, dp_rank=1)
    assert group.followers.told == [("receive", [0, 1]), ("receive", [2, 3])]
    assert group.agent.calls == [("open", 1)]


async def test_transfer_is_complete_when_it_is_on_all_of_its_ranks() -> None:
    group = Group()
    await group.open(2, dp_rank=1)
    group.receiver.take(3, Completed(2, STATS))
    assert group.ends == []
    group.receiver.take(2, Completed(2, STATS))
    assert [type(end) for end in group.ends] == [Completed]


async def test_failure_on_one_rank_ends_the_others_and_says_what_all_have() -> None:
    group = Group()
    await group.open(1, dp_rank=0)
    group.receiver.take(1, Failed(1, PeerLost("gone"), retryable=True, kept=((8, 4),)))
    assert group.agent.calls[-1] == ("revoke", 1)
    assert group.followers.told[-1] == ("revoke", [0, 1])
    group.receiver.take(0, Closed(1, ((6, 9),)))
    [end] = group.ends
    assert isinstance(end, Failed)
    assert end.kept == ((6, 4),)


async def test_revoking_what_is_over_changes_nothing() -> None:
    group = Group()
    await group.open(1, dp_rank=0)
    for rank in (0, 1):
        group.receiver.take(rank, Completed(1, STATS))
    told = list(group.followers.told)
    group.receiver.revoke(1)
    assert group.followers.told == told
    assert group.agent.calls == [("open", 1)]


def record(dp_rank: int = 0, *, is_local: bool = False) -> SequenceRecord:
    admission = Admission(
        prefixes=[Prefixes(BlockPool(8), layers=2)] * 2,
        block_size=4,
        max_sequences=4,
        revoke=lambda _: None,
    )
    return admission.reserve(
        Reservation(
            request_id=2**63 + 5,
            router_id="r",
            prompt_tokens=5,
            prompt_ids=(3, 1, 3),
            output_ids=(6, 6),
            sampling=SamplingParams(
                temperature=0.5, repetition_penalty=1.25, seed=2**63, logprobs=0
            ),
            stop=StopCriteria(max_new_tokens=7, min_new_tokens=2, stop_token_ids=frozenset((8,))),
            ttl_s=10.0,
            dp_rank=dp_rank,
            is_local=is_local,
        )
    )


def test_sequence_arrives_as_it_was() -> None:
    sent = record()
    message = sequence_to_wire(sent)
    assert message.request_id == sent.request_id
    again = sequence_from_wire(message)
    assert list(again.blocks) == sent.blocks
    assert again.sampling.params == sent.reservation.sampling
    assert again.sampling.position == 5
    assert not again.sampling.suppresses  # two of its tokens have been generated
    assert list(again.prompt) == []


def test_prompt_that_is_computed_here_arrives_with_its_sequence() -> None:
    again = sequence_from_wire(sequence_to_wire(record(is_local=True)))
    assert list(again.prompt) == [3, 1, 3, 6, 6]
    assert again.sampling.position == 5


def test_step_and_its_tokens_arrive_as_they_were() -> None:
    rows = [[Row(2**63 + 1, 7, 900), Row(4, 0, 1)], []]
    assert rows_from_wire(step_to_wire(3, rows)) == rows
    pieces = [[Row(4, 9, 12), Row(5, 0, 32, 16)], [Row(6, 1, 2)]]
    assert rows_from_wire(step_to_wire(4, pieces)) == pieces
    report = TokenLogprobs(chosen=-0.5, top=((3, -0.25), (4, -2.0)))
    part = Part(sampled=[Sampled(token_id=5), Sampled(token_id=6, logprobs=report)], sample_s=0.5)
    assert part_from_wire(part_to_wire(3, part)) == part
    plain = Part(sampled=[Sampled(token_id=5)])
    assert part_from_wire(part_to_wire(3, plain)) == plain


def test_orders_placings_and_loads_arrive_as_they_were() -> None:
    for order in (NOTHING, Order(take_loads=True), Order(switch=2**40)):
        assert order_from_wire(step_to_wire(3, [[]], order)) == order
    assert placing_from_wire(placing_to_wire(PLACING)) == PLACING
    loads = {4: [0, 2**40], 7: [3, 1]}
    assert loads_from_wire(loads_to_wire(loads)) == loads


def test_grant_arrives_as_it_was() -> None:
    assert receive_from_wire(receive_to_wire(grant(9)), epoch=6) == grant(9)


@pytest.mark.parametrize("dp_rank", [0, 1])
def test_others_of_the_dp_rank_hear_of_a_sequence_and_all_of_steps(dp_rank: int) -> None:
    followers, taken = FakeFollowers(), list[tuple[int, int, Part]]()
    others = OtherRanks(SETTINGS, followers, lambda *part: taken.append(part))  # type: ignore[arg-type]
    sequence = record(dp_rank)
    others.add(sequence)
    others.grow(sequence.request_id, 7)
    others.step(1, [[], []], Order(take_loads=True))
    others.stage(PLACING)
    others.remove(sequence.request_id)
    others.remove(sequence.request_id)
    ranks = [2 * dp_rank, 2 * dp_rank + 1]
    assert followers.told == [
        ("sequence", ranks),
        ("grow", ranks),
        ("decode", None),
        ("placing", None),
        ("forget", ranks),
    ]
    others.sampled(2, part_to_wire(1, Part(sampled=[Sampled(token_id=3)])))
    assert taken == [(1, 1, Part(sampled=[Sampled(token_id=3)]))]
