"""The first rank hears of every other rank's end, and tells all of them the same in one order."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from twinpool.v1 import rank_pb2, rank_pb2_grpc

from engine.ring import Traffic
from kvtransfer import AgentStats, Closed, Completed, Failed, TransferStats
from kvtransfer.errors import ChecksumMismatch
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
        Failed(7, ChecksumMismatch("piece 3"), retryable=True, kept=((4, 0),)),
        Closed(7, ((5, 5), (1,))),
    ],
)
async def test_ends_of_transfers_arrive_as_they_were(end: End) -> None:
    again = end_from_wire(end_to_wire(end))
    assert type(again) is type(end)
    if isinstance(end, Failed):
        assert isinstance(again, Failed)
        assert (type(again.error), str(again.error)) == (ChecksumMismatch, "piece 3")
        assert again.kept == end.kept
    else:
        assert again == end
    async with group(count=1) as made:
        call = await made.ready(1)
        await call.write(rank_pb2.FollowRequest(transfer_end=end_to_wire(end)))
        await until(lambda: bool(made.ends))
        assert made.ends[0][0] == 1


async def test_some_ranks_are_told_alone() -> None:
    async with group() as made:
        calls = [await made.ready(1), await made.ready(2)]
        await made.followers.wait_ready(8, "f")
        for number, ranks in enumerate(({2}, None, range(1, 2))):
            message = Message(forget=rank_pb2.RankForget(request_id=number))
            made.followers.tell(message, ranks)
        heard = [
            [(await call.read()).forget.request_id for _ in range(n)]
            for call, n in ((calls[0], 2), (calls[1], 2))
        ]
        assert heard == [[1, 2], [0, 1]]


async def test_other_words_go_to_whoever_wants_them() -> None:
    async with group(count=1) as made:
        heard: list[tuple[int, int]] = []
        made.followers.on_word = lambda rank, message: heard.append(
            (rank, message.opened.transfer_id)
        )
        call = await made.ready(1)
        await call.write(rank_pb2.FollowRequest(opened=rank_pb2.RankOpened(transfer_id=4)))
        await until(lambda: heard == [(1, 4)])


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
