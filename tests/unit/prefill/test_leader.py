"""The first rank hears of every other rank's end, and tells all of them the same in one order."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from twinpool.v1 import rank_pb2, rank_pb2_grpc

from engine.ring import Traffic
from kvtransfer import (
    AgentStats,
    Closed,
    Completed,
    Failed,
    KVShape,
    Span,
    TransferStats,
    uniform_cache,
)
from kvtransfer.errors import ChecksumMismatch
from prefill.compute import Piece
from prefill.handoff import Grant, Handoff
from prefill.leader import GroupTransfers
from prefill.rank_wire import step_from_wire, step_to_wire
from service.errors import StartError
from service.instance import Incarnation
from service.ranks import leader
from service.ranks.joined import End
from service.ranks.leader import Followers, Message
from service.ranks.wire import (
    end_from_wire,
    end_to_wire,
    heartbeat_to_wire,
    links_from_wire,
    sum_of_ranks,
)
from service.status import StatusInterceptor

SECRET = b"of this start"
LAYOUT = uniform_cache((KVShape(layers=2, kv_heads=2, head_size=8, dtype="float32"),), 4)
GRANT = Grant(
    transfer_id=77,
    epoch=1,
    nonce=bytes(16),
    tokens=Span(0, 10),
    ttl_s=5.0,
    instance="decode",
    layout=LAYOUT,
)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


class Group:
    """Followers on real gRPC, and what became of them."""

    def __init__(self, count: int) -> None:
        self.lost: list[str] = []
        self.ends: list[tuple[int, End]] = []
        self.channel: grpc.aio.Channel
        self._hellos: list[asyncio.Future[None]] = []
        self.followers = Followers(
            count=count,
            secret=SECRET,
            who=Incarnation(name="p", epoch=5),
            on_lost=self.lost.append,
        )
        self.followers.on_end = lambda rank, end: self.ends.append((rank, end))

    def call(self, rank: int, secret: bytes = SECRET) -> Any:
        call = rank_pb2_grpc.RanksStub(self.channel).Follow()
        self._hellos.append(
            asyncio.ensure_future(
                call.write(
                    rank_pb2.FollowRequest(hello=rank_pb2.RankHello(rank=rank, secret=secret))
                )
            )
        )
        return call

    async def ready(self, rank: int, blocks: int = 8, fingerprint: str = "f") -> Any:
        call = self.call(rank)
        assert (await call.read()).welcome.instance == "p"
        await call.write(
            rank_pb2.FollowRequest(ready=rank_pb2.RankReady(blocks=blocks, fingerprint=fingerprint))
        )
        return call


@asynccontextmanager
async def group(count: int = 2) -> AsyncIterator[Group]:
    made = Group(count)
    server = grpc.aio.server(interceptors=[StatusInterceptor()])
    rank_pb2_grpc.add_RanksServicer_to_server(made.followers, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    made.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    try:
        yield made
    finally:
        made.followers.close()
        await made.channel.close(None)
        await server.stop(0)


async def test_all_ranks_hear_everything_in_order() -> None:
    async with group() as made:
        calls = [await made.ready(1), await made.ready(2)]
        await made.followers.wait_ready(8, "f")
        for number in range(50):
            made.followers.tell(Message(close=rank_pb2.RankClose(request_id=number)))
        for call in calls:
            heard = [(await call.read()).close.request_id for _ in range(50)]
            assert heard == list(range(50))
        assert made.lost == []


async def test_stranger_is_refused_and_nobody_is_lost() -> None:
    async with group() as made:
        for rank, secret in ((1, b"guessed"), (0, SECRET), (3, SECRET)):
            call = made.call(rank, secret)
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert made.lost == []


async def test_rank_whose_stream_ends_is_lost_once() -> None:
    async with group() as made:
        calls = [await made.ready(1), await made.ready(2)]
        calls[1].cancel()
        await until(lambda: bool(made.lost))
        calls[0].cancel()
        await asyncio.sleep(0.05)
        assert len(made.lost) == 1
        assert "rank 2" in made.lost[0]


async def test_silent_rank_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader, "SILENCE_S", 0.2)
    async with group(count=2) as made:
        calls = [await made.ready(1), await made.ready(2)]
        watching = asyncio.ensure_future(made.followers.watch())
        try:
            for _ in range(8):
                await calls[0].write(rank_pb2.FollowRequest(heartbeat=rank_pb2.RankHeartbeat()))
                await asyncio.sleep(0.05)
            await until(lambda: bool(made.lost))
        finally:
            watching.cancel()
        assert "rank 2 has been silent" in made.lost[0]


async def test_rank_with_another_model_or_cache_is_refused_at_start() -> None:
    async with group() as made:
        calls = [await made.ready(1), await made.ready(2, blocks=9, fingerprint="g")]
        with pytest.raises(StartError, match="rank 2 has another model"):
            await made.followers.wait_ready(8, "f")
        with pytest.raises(StartError, match="rank 1 has a cache of 8 blocks and rank 0 of 9"):
            await made.followers.wait_ready(9, "f")
        assert len(calls) == 2


@pytest.mark.parametrize(
    "end",
    [
        Completed(7, TransferStats(10, 2, 0.5, "tcp", 4)),
        Failed(7, ChecksumMismatch("piece 3"), retryable=True),
        Closed(7),
    ],
)
async def test_ends_of_transfers_arrive_as_they_were(end: End) -> None:
    again = end_from_wire(end_to_wire(end))
    assert type(again) is type(end)
    if isinstance(end, Failed):
        assert isinstance(again, Failed)
        assert (type(again.error), str(again.error)) == (ChecksumMismatch, "piece 3")
    else:
        assert again == end
    async with group(count=1) as made:
        call = await made.ready(1)
        await call.write(rank_pb2.FollowRequest(transfer_end=end_to_wire(end)))
        await until(lambda: bool(made.ends))
        assert made.ends[0][0] == 1


def test_steps_arrive_as_they_were() -> None:
    step = [
        Piece(request_id=2**63 + 1, start=32, token_ids=[5, 6], blocks=[9, 1], transfer=True),
        Piece(request_id=2, start=0, token_ids=[7], blocks=[3], transfer=False),
    ]
    assert step_from_wire(step_to_wire(step)) == step


def test_counters_of_ranks_add_up_to_the_instances() -> None:
    own = AgentStats(bytes=10, completed=1, pack_s=0.5, slots={"free": 3, "sending": 1})
    other = AgentStats(bytes=32, completed=2, pack_s=0.25, slots={"free": 4, "sending": 0})
    beat = heartbeat_to_wire(other, {"ring": Traffic(bytes_sent=7, wait_s=1.5)})
    assert links_from_wire(beat) == {"ring": Traffic(bytes_sent=7, wait_s=1.5)}
    total = sum_of_ranks(own, [beat.transfer, beat.transfer])
    assert (total.bytes, total.completed, total.pack_s) == (74, 5, 1.0)
    assert total.slots == {"free": 11, "sending": 1}
    assert isinstance(total.bytes, int)
    assert sum_of_ranks(own, []) == own


class FakeAgent:
    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def begin(self, transfer: Any) -> None:
        self.calls.append(("begin", transfer.transfer_id))

    def ready(self, transfer_id: int, layers: Span, tokens: Span) -> None:
        pass

    def abort(self, transfer_id: int) -> None:
        self.calls.append(("abort", transfer_id))


class Joint:
    """Transfers of two ranks, of which the second is only what it is told."""

    def __init__(self) -> None:
        self.agent = FakeAgent()
        self.told: list[Message] = []
        self.ends: list[Any] = []
        own = Handoff(self.agent, layers=2)  # type: ignore[arg-type]
        self.transfers = GroupTransfers(
            own,
            self.agent,  # type: ignore[arg-type]
            2,
            tell=self.told.append,
            emit=self.ends.append,
        )

    @property
    def kinds(self) -> list[str | None]:
        return [message.WhichOneof("kind") for message in self.told]


def test_ranks_are_told_all_that_this_one_does() -> None:
    joint = Joint()
    joint.transfers.expect(1)
    joint.transfers.grant(1, GRANT)
    joint.transfers.open(1, 10, [4, 2, 0])
    joint.transfers.cached(1, Span(0, 4))
    assert joint.kinds == ["expect", "grant", "open", "ready"]
    granted = joint.told[1].grant.grant
    assert (granted.transfer_id, granted.instance, granted.ttl_ms) == (77, "decode", 5000)
    assert list(joint.told[2].open.blocks) == [4, 2, 0]
    assert joint.agent.calls == [("begin", 77)]


def test_end_is_told_when_both_ranks_have_ended() -> None:
    joint = Joint()
    joint.transfers.expect(1)
    joint.transfers.open(1, 10, [4, 2, 0])
    joint.transfers.grant(1, GRANT)
    joint.transfers.take(0, Completed(77, TransferStats(1, 1, 0.1, "tcp")))
    assert joint.ends == []
    joint.transfers.take(1, Completed(77, TransferStats(1, 1, 0.1, "tcp")))
    assert [type(end) for end in joint.ends] == [Completed]
    assert joint.transfers.ended(77) == 1
    assert joint.transfers.ended(77) is None


def test_failure_on_one_rank_ends_the_transfer_on_the_other() -> None:
    joint = Joint()
    joint.transfers.expect(1)
    joint.transfers.open(1, 10, [4, 2, 0])
    joint.transfers.grant(1, GRANT)
    joint.transfers.take(1, Failed(77, ChecksumMismatch("x"), retryable=True))
    assert joint.agent.calls[-1] == ("abort", 77)
    assert joint.told[-1].abort.transfer_id == 77
    joint.transfers.take(0, Closed(77))
    assert [type(end) for end in joint.ends] == [Failed]


def test_closing_before_the_transfer_begins_leaves_nothing_to_wait_for() -> None:
    joint = Joint()
    joint.transfers.expect(1)
    joint.transfers.open(1, 10, [4, 2, 0])
    assert not joint.transfers.close(1)
    assert joint.kinds[-1] == "close"


def test_closing_waits_for_every_rank() -> None:
    joint = Joint()
    joint.transfers.expect(1)
    joint.transfers.open(1, 10, [4, 2, 0])
    joint.transfers.grant(1, GRANT)
    joint.transfers.take(1, Completed(77, TransferStats(1, 1, 0.1, "tcp")))
    assert joint.transfers.close(1)
    assert joint.ends == []
    joint.transfers.take(0, Closed(77))
    assert joint.ends == [Closed(77)]
