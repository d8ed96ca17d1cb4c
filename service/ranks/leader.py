"""The first rank's side of an instance of several: what the others are told, and what they say.

Owns the streams to the other ranks. All ranks do the same things in the same order, so that the
first one knows what each of them has begun; what it cannot know is when their transfers end, and
whether they live: of that they tell. A rank that is lost is the end of the instance.
"""

import asyncio
import contextlib
import hmac
import time
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any

from twinpool.v1 import rank_pb2, rank_pb2_grpc

from service.errors import InvalidRequest, StartError
from service.instance import Incarnation
from service.ranks.joined import End
from service.ranks.wire import end_from_wire

# Ranks beat a few times a second; one that is silent for so long is stopped or out of reach.
SILENCE_S = 3.0

Message = rank_pb2.FollowResponse


class Followers(rank_pb2_grpc.RanksServicer):
    """The other ranks of an instance: `count` of them, numbered from 1.

    Args:
        on_lost: Called once with what happened when a rank is lost.

    `on_end` may be set: it is called with (rank, end) when a rank's part in a transfer has ended.
    Likewise `on_word`, with (rank, message) when it says something that is not known here.
    """

    def __init__(
        self,
        *,
        count: int,
        secret: bytes,
        who: Incarnation,
        on_lost: Callable[[str], None],
    ) -> None:
        self._count = count
        self._secret = secret
        self._welcome = Message(
            welcome=rank_pb2.RankWelcome(
                instance=who.name, epoch=who.epoch, data_token=who.data_token
            )
        )
        self.on_end: Callable[[int, End], None] = lambda rank, end: None
        self.on_word: Callable[[int, rank_pb2.FollowRequest], None] = lambda rank, message: None
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._outboxes: dict[int, asyncio.Queue[Message | None]] = {}
        self._ready: dict[int, rank_pb2.RankReady] = {}
        self._changed = asyncio.Event()
        self._heard_at: dict[int, float] = {}
        self._beats: dict[int, rank_pb2.RankHeartbeat] = {}
        self._closing = False

    # ---- any thread

    def tell(self, message: Message, ranks: Collection[int] | None = None) -> None:
        """Tell all ranks, or some; each hears everything in the order in which it was told."""
        self._loop.call_soon_threadsafe(self._put, message, ranks)

    # ---- the loop's thread

    async def wait_ready(self, blocks: int, fingerprint: str) -> list[tuple[str, int]]:
        """Return once all ranks have loaded the same model with as many blocks.

        The result is where each of them takes KV, in their order. Raises StartError where one has
        another model, or another number of blocks.
        """
        while len(self._ready) < self._count:
            self._changed.clear()
            await self._changed.wait()
        for rank, ready in sorted(self._ready.items()):
            if ready.fingerprint != fingerprint:
                raise StartError(f"rank {rank} has another model than rank 0: give all the same")
            if ready.blocks != blocks:
                raise StartError(
                    f"rank {rank} has a cache of {ready.blocks} blocks and rank 0 of {blocks}: "
                    f"give all the same settings"
                )
        return [(each.data_host, each.data_port) for _, each in sorted(self._ready.items())]

    async def watch(self) -> None:
        """Notice ranks that are silent once they are ready; for as long as the instance runs."""
        while True:
            await asyncio.sleep(SILENCE_S / 4)
            now = time.monotonic()
            for rank in self._ready:
                if now - self._heard_at[rank] > SILENCE_S:
                    self.lost(f"rank {rank} has been silent for more than {SILENCE_S:g} s")

    def beats(self) -> dict[int, rank_pb2.RankHeartbeat]:
        """What each rank last said of itself."""
        return dict(sorted(self._beats.items()))

    def lost(self, what: str) -> None:
        """A rank is lost, and with it the instance."""
        if not self._closing:
            self._closing = True
            self._on_lost(what)

    def close(self) -> None:
        """Let the ranks go: their streams end, and they with them."""
        self._closing = True
        for outbox in self._outboxes.values():
            outbox.put_nowait(None)

    async def Follow(
        self, request_iterator: AsyncIterator[rank_pb2.FollowRequest], context: Any
    ) -> AsyncIterator[Message]:
        """One rank's stream."""
        rank = self._admit(await anext(request_iterator, None))
        outbox: asyncio.Queue[Message | None] = asyncio.Queue()
        self._outboxes[rank] = outbox
        reader = asyncio.ensure_future(self._read(rank, request_iterator))
        try:
            yield self._welcome
            while (message := await outbox.get()) is not None:
                yield message
        finally:
            reader.cancel()
            self.lost(f"rank {rank} is lost")

    def _admit(self, message: rank_pb2.FollowRequest | None) -> int:
        hello = message.hello if message is not None else rank_pb2.RankHello()
        if not hmac.compare_digest(hello.secret, self._secret):
            raise InvalidRequest("secret", found="another one", hint="only own ranks may call")
        if not 1 <= hello.rank <= self._count or hello.rank in self._outboxes:
            raise InvalidRequest("rank", found=hello.rank, hint="each rank calls once")
        self._heard_at[hello.rank] = time.monotonic()
        return hello.rank

    async def _read(self, rank: int, messages: AsyncIterator[rank_pb2.FollowRequest]) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            async for message in messages:
                self._heard_at[rank] = time.monotonic()
                match message.WhichOneof("kind"):
                    case "transfer_end":
                        self.on_end(rank, end_from_wire(message.transfer_end))
                    case "ready":
                        self._ready[rank] = message.ready
                        self._changed.set()
                    case "heartbeat":
                        self._beats[rank] = message.heartbeat
                    case _:
                        self.on_word(rank, message)
        self.lost(f"rank {rank} has ended")

    def _put(self, message: Message, ranks: Collection[int] | None) -> None:
        for rank, outbox in self._outboxes.items():
            if ranks is None or rank in ranks:
                outbox.put_nowait(message)
