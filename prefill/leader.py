"""The first rank's side of an instance of several: what the others are told, and what they say.

Owns the streams to the other ranks. All ranks do the same things in the same order, so that the
first one knows what each of them has begun; what it cannot know is when their transfers end, and
whether they live: of that they tell. A rank that is lost is the end of the instance.
"""

import asyncio
import contextlib
import hmac
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any

from twinpool.v1 import rank_pb2, rank_pb2_grpc, worker_pb2

from kvtransfer import Closed, Completed, Failed, SendAgent, Span, TransferEvent
from prefill.compute import Piece
from prefill.handoff import Grant, Handoff
from prefill.joined import End, JoinedEnds
from prefill.peers import grant_to_wire
from prefill.rank_wire import end_from_wire, step_to_wire
from service.errors import InvalidRequest, StartError
from service.wire import span_to_wire

# Ranks beat a few times a second; one that is silent for so long is stopped or out of reach.
SILENCE_S = 3.0

Message = rank_pb2.FollowResponse


class Followers(rank_pb2_grpc.RanksServicer):
    """The other ranks of an instance: `count` of them, numbered from 1.

    Args:
        on_lost: Called once with what happened when a rank is lost.

    `on_end` may be set: it is called with (rank, end) when a rank's part in a transfer has ended.
    """

    def __init__(
        self,
        *,
        count: int,
        secret: bytes,
        instance: str,
        epoch: int,
        on_lost: Callable[[str], None],
    ) -> None:
        self._count = count
        self._secret = secret
        self._welcome = Message(welcome=rank_pb2.RankWelcome(instance=instance, epoch=epoch))
        self.on_end: Callable[[int, End], None] = lambda rank, end: None
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._outboxes: dict[int, asyncio.Queue[Message | None]] = {}
        self._ready: dict[int, rank_pb2.RankReady] = {}
        self._changed = asyncio.Event()
        self._heard_at: dict[int, float] = {}
        self._beats: dict[int, rank_pb2.RankHeartbeat] = {}
        self._closing = False

    # ---- any thread

    def tell(self, message: Message) -> None:
        """Tell all ranks; each hears everything in the order in which it was told."""
        self._loop.call_soon_threadsafe(self._put, message)

    # ---- the loop's thread

    async def wait_ready(self, blocks: int, fingerprint: str) -> None:
        """Return once all ranks have loaded the same model with as many blocks.

        Raises StartError where one has another model, or another number of blocks.
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
        self.lost(f"rank {rank} has ended")

    def _put(self, message: Message) -> None:
        for outbox in self._outboxes.values():
            outbox.put_nowait(message)


class GroupTransfers:
    """The transfers of all ranks of an instance as one; see handoff.Transfers.

    Args:
        own: Those of this rank, which stand for all: every rank begins the same ones.
        tell: Tells the other ranks.
        emit: Called with the end of each transfer, when no rank has a part in it any more.
    """

    def __init__(
        self,
        own: Handoff,
        agent: SendAgent,
        ranks: int,
        tell: Callable[[Message], None],
        emit: Callable[[TransferEvent], None],
    ) -> None:
        self._own = own
        self._agent = agent
        self._emit = emit
        self._ends = JoinedEnds(ranks)
        self._lock = threading.Lock()
        self._tell = tell

    def expect(self, request_id: int) -> None:
        """See Transfers."""
        with self._lock:
            self._own.expect(request_id)
            self._tell(Message(expect=rank_pb2.RankExpect(request_id=request_id)))

    def open(
        self, request_id: int, tokens: int, block_ids: Sequence[int], cp_first: int = 0
    ) -> None:
        """See Transfers."""
        with self._lock:
            with self._noting_begin(request_id):
                self._own.open(request_id, tokens, block_ids, cp_first)
            opened = rank_pb2.RankOpen(
                request_id=request_id, tokens=tokens, blocks=block_ids, cp_first=cp_first
            )
            self._tell(Message(open=opened))

    def grant(self, request_id: int, grant: Grant) -> None:
        """See Transfers."""
        with self._lock:
            with self._noting_begin(request_id):
                self._own.grant(request_id, grant)
            granted = rank_pb2.RankGrant(request_id=request_id, grant=grant_to_wire(grant))
            self._tell(Message(grant=granted))

    def cached(self, request_id: int, tokens: Span) -> None:
        """See Transfers."""
        with self._lock:
            self._own.cached(request_id, tokens)
            ready = rank_pb2.RankReadyTokens(request_id=request_id, tokens=span_to_wire(tokens))
            self._tell(Message(ready=ready))

    def close(self, request_id: int) -> bool:
        """See Transfers."""
        with self._lock:
            self._tell(Message(close=rank_pb2.RankClose(request_id=request_id)))
            return self._own.close(request_id)

    def ended(self, transfer_id: int) -> int | None:
        """See Transfers."""
        return self._own.ended(transfer_id)

    def take(self, rank: int, event: TransferEvent) -> None:
        """A rank's agent has something to say; from any thread."""
        if not isinstance(event, Completed | Failed | Closed):
            return
        with self._lock:
            joined = self._ends.take(rank, event)
            if joined.give_up:
                self._agent.abort(event.transfer_id)
                self._tell(Message(abort=rank_pb2.RankAbort(transfer_id=event.transfer_id)))
        if joined.end is not None:
            self._emit(joined.end)

    @contextlib.contextmanager
    def _noting_begin(self, request_id: int) -> Iterator[None]:
        before = self._own.transfer_of(request_id)
        yield
        transfer_id = self._own.transfer_of(request_id)
        if before is None and transfer_id is not None:
            self._ends.begin(transfer_id)


def step_message(pieces: Sequence[Piece]) -> Message:
    """What tells the ranks of a step."""
    return Message(step=step_to_wire(pieces))


def peers_message(peers: Iterable[worker_pb2.Peer]) -> Message:
    """What tells the ranks whom they may send to."""
    return Message(peers=worker_pb2.Peers(peers=peers))
